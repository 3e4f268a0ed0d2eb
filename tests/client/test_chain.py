"""A hand that has the ledger's file, and everything but the key."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import sqlite3
from collections.abc import Callable
from contextlib import AbstractContextManager, closing, suppress
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from client.book import Entry, Kind
from client.chain import WAY_OUT, Mac, _unreadable
from client.keyfile import NodeKey
from client.ledger import Ledger, Place
from common.errors import LedgerError

Hand = Callable[[Place], AbstractContextManager[sqlite3.Connection]]
COLUMNS = (*Entry._fields, "head", "seal")
LAST_BEFORE_GAP = 16
TEXTS = ("run", "part", "task", "unit", "cohort", "release", "note", "time", "head", "seal")


def everything(place: Place) -> dict[str, bytes]:
    """Every file of a ledger, its witness file with it."""
    home = place.folder.parent
    return {
        str(path.relative_to(home)): path.read_bytes()
        for path in home.rglob("*")
        if path.is_file() and not path.is_symlink()
    }


def refusal(place: Place) -> str:
    """The error by which a ledger does not open, which has a way out and changes nothing."""
    before = everything(place)
    with pytest.raises(LedgerError, match=re.escape(str(place.folder.parent))) as refused:
        Ledger(place)
    assert str(refused.value).endswith(WAY_OUT)
    assert everything(place) == before
    return str(refused.value).removesuffix(WAY_OUT)


def bad(place: Place) -> set[int]:
    """The number that an error names, or the two where it cannot know which of them it is."""
    return set(map(int, re.findall(r"entry (\d+) (?:is not as|is gone)", refusal(place))))


def alter(hand: Hand, place: Place, column: str, value: Any, number: int) -> bool:
    """Put a value into a column of an entry; whether the database took it as something new."""
    look = "SELECT typeof(IT), hex(IT) FROM entry WHERE number = ?".replace("IT", column)
    with hand(place) as database:
        before: tuple[str, str] = database.execute(look, (number,)).fetchone()
        change = "UPDATE entry SET IT = ? WHERE number = ?".replace("IT", column)
        with suppress(sqlite3.IntegrityError):  # a rule of the table's own
            database.execute(change, (value, number))
        after: tuple[str, str] = database.execute(look, (number,)).fetchone()
    return after != before


def value_of(place: Place, column: str, number: int) -> Any:
    look = "SELECT IT FROM entry WHERE number = ?".replace("IT", column)
    with closing(sqlite3.connect(place.database)) as database:
        return database.execute(look, (number,)).fetchone()[0]


def number_of(place: Place, kind: Kind) -> int:
    with closing(sqlite3.connect(place.database)) as database:
        look = "SELECT number FROM entry WHERE kind = ?"
        return int(database.execute(look, (kind,)).fetchone()[0])


def numbers(place: Place) -> list[int]:
    with closing(sqlite3.connect(place.database)) as database:
        return [number for (number,) in database.execute("SELECT number FROM entry")]


def test_the_ledger_that_the_others_alter_is_whole_and_has_an_entry_of_every_kind(lived: Place):
    before = everything(lived)
    ledger = Ledger(lived)
    assert {entry.kind for entry in ledger.entries()} == set(Kind)
    assert ledger.book.last == 101
    ledger.disconnect()
    assert everything(lived) == before


# --- The database's own rules -------------------------------------------------------------------


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE entry SET steps = 0",
        "UPDATE entry SET noise_multiplier = 100 WHERE number = 9",
        "DELETE FROM entry",
        "DELETE FROM entry WHERE number = 101",
        "INSERT INTO entry SELECT 50, kind, run, part, round, task, sampling_rate, 99, steps, "
        "unit, divergence, refers, nonce, cohort, release, note, time, head, seal FROM entry "
        "WHERE number = 9",
        "INSERT OR REPLACE INTO entry SELECT number, kind, run, part, round, task, sampling_rate, "
        "99, steps, unit, divergence, refers, nonce, cohort, release, note, time, head, seal "
        "FROM entry",
        "REPLACE INTO entry SELECT * FROM entry WHERE number = 9",
    ],
)
def test_the_database_itself_lets_nothing_be_changed_but_by_adding(lived: Place, statement: str):
    ledger = Ledger(lived)
    before = list(ledger.entries())
    with closing(sqlite3.connect(lived.database)) as database:
        with pytest.raises(sqlite3.IntegrityError, match="append only"):
            database.execute(statement)
        database.rollback()
    assert list(ledger.entries()) == before
    assert list(Ledger(lived).entries()) == before


@pytest.mark.parametrize(
    "statement",
    [
        "DROP TRIGGER entry_stays",
        "DROP TRIGGER entry_kept",
        "DROP TRIGGER entry_new",
        "CREATE TRIGGER quiet BEFORE INSERT ON entry BEGIN SELECT RAISE(IGNORE); END",
        "CREATE TRIGGER thief AFTER INSERT ON entry BEGIN DELETE FROM entry; END",
        "CREATE TABLE other (a)",
        "ALTER TABLE entry ADD COLUMN more TEXT",
    ],
)
def test_a_database_with_other_rules_is_not_opened(lived: Place, statement: str):
    with closing(sqlite3.connect(lived.database)) as database:
        database.execute(statement)
        database.commit()
    assert "tables or triggers were changed" in refusal(lived)


def test_what_a_database_does_for_itself_is_no_tampering(lived: Place):
    with closing(sqlite3.connect(lived.database)) as database:
        database.execute("ANALYZE")
        database.execute("VACUUM")
    assert Ledger(lived).book.last == 101


# --- Alterations --------------------------------------------------------------------------------


def other(value: Any) -> Any:
    """Something else of the same type."""
    if isinstance(value, str):
        return value[:-1] + ("0" if value[-1:] != "0" else "1")
    return 0.5 if value is None else value + 1


@pytest.mark.parametrize("kind", Kind)
@pytest.mark.parametrize("column", COLUMNS[1:])
def test_no_value_of_any_kind_of_entry_can_be_altered(
    lived: Place, hand: Hand, kind: Kind, column: str
):
    number = number_of(lived, kind)
    assert alter(hand, lived, column, other(value_of(lived, column, number)), number)
    jumped = {LAST_BEFORE_GAP + 1} if kind == Kind.CARRIED else set()
    assert bad(lived) == {number} | jumped


@pytest.mark.parametrize("kind", Kind)
def test_no_entry_can_be_given_another_number(lived: Place, hand: Hand, kind: Kind):
    number = number_of(lived, kind)
    assert alter(hand, lived, "number", number + 500, number)
    found = bad(lived)
    first = 2 if number == 1 else min(number, LAST_BEFORE_GAP + 1)
    assert min(found) == first


def confused(value: Any) -> list[Any]:
    """Other values that a person, or a careless seal, would read the same."""
    text = str(value)
    blobs = [text.encode(), ascii(text).encode()]
    if isinstance(value, str):
        return [*blobs, None, f"{text} ", f"'{text}'", f"{text}\0", f"{text}\x1f"]
    return [*blobs, None if value is not None else "None", f"'{text}'", f"{text} x", "nan"]


@pytest.mark.parametrize("column", COLUMNS[1:])
def test_a_value_cannot_be_taken_for_another_of_another_type(lived: Place, hand: Hand, column: str):
    whole, seen = lived.database.read_bytes(), 0
    for number in (1, 9, 10):
        for value in confused(value_of(lived, column, number)):
            if alter(hand, lived, column, value, number):
                assert bad(lived) == {number}
                seen += 1
            lived.database.write_bytes(whole)
    assert seen >= 9


@pytest.mark.parametrize("between", ["\x1f", "", "', '", "\0"])
@pytest.mark.parametrize(("left", "right"), list(pairwise(TEXTS)))
def test_where_one_value_ends_cannot_be_moved(
    lived: Place, hand: Hand, left: str, right: str, between: str
):
    one, two = (value_of(lived, column, 9) for column in (left, right))
    longer, shorter = f"{one}{between}{two[:2]}", two[2:]
    if not two:
        longer, shorter = one[:-2], f"{one[-2:]}{between}"
    alter(hand, lived, left, longer, 9)
    alter(hand, lived, right, shorter, 9)
    assert bad(lived) == {9}


ENTRIES = st.lists(st.text() | st.integers() | st.floats(allow_nan=False) | st.none(), max_size=4)


@given(ENTRIES, ENTRIES)
def test_two_lists_of_values_have_one_mac_only_if_they_are_one_list(one, two):
    same = repr(one) == repr(two)  # 1 and 1.0 and True are not the same here
    mac = Mac(b"k" * 32)
    assert (mac.of("", tuple(one)) == mac.of("", tuple(two))) == same


def test_a_mac_is_keyed_blake2b_and_its_key_and_what_came_before_count():
    plain = hashlib.blake2b(b"('before', 1, None, '\\xe4')", key=b"k" * 32, digest_size=32)
    values = (1, None, "\u00e4")
    mac = Mac(b"k" * 32)
    for _ in range(2):
        assert mac.of("before", values) == plain.hexdigest()
    assert mac.of("other", values) != plain.hexdigest() != Mac(b"l" * 32).of("before", values)


@pytest.mark.parametrize("number", [*range(1, 17), 100])
def test_an_entry_that_is_gone_is_named(lived: Place, hand: Hand, number: int):
    with hand(lived) as database:
        assert database.execute("DELETE FROM entry WHERE number = ?", (number,)).rowcount == 1
    assert min(bad(lived)) == (2 if number == 1 else min(number, LAST_BEFORE_GAP + 1))


def copied_in(hand: Hand, place: Place, source: int, number: int) -> None:
    copy = "INSERT INTO entry SELECT ?, REST FROM entry WHERE number = ?"
    with hand(place) as database:
        database.execute(copy.replace("REST", ", ".join(COLUMNS[1:])), (number, source))


@pytest.mark.parametrize(("one", "two"), [(1, 2), (6, 7), (9, 11), (3, 101)])
def test_two_entries_that_were_exchanged_are_found_at_the_first(
    lived: Place, hand: Hand, one: int, two: int
):
    with hand(lived) as database:
        for old, new in ((one, -1), (two, one), (-1, two)):
            database.execute("UPDATE entry SET number = ? WHERE number = ?", (new, old))
    assert bad(lived) == {one}


@pytest.mark.parametrize("number", [50, 102])
@pytest.mark.parametrize("source", [1, 9, 100, 101])
def test_an_entry_that_was_copied_in_is_named(lived: Place, hand: Hand, number: int, source: int):
    copied_in(hand, lived, source, number)
    assert number in bad(lived)


@pytest.mark.parametrize("column", ["head", "seal"])
@pytest.mark.parametrize("source", [1, 8, 10, 101])
def test_the_seal_of_another_entry_is_no_seal(lived: Place, hand: Hand, column: str, source: int):
    assert alter(hand, lived, column, value_of(lived, column, source), 9)
    assert bad(lived) == {9}


@pytest.mark.parametrize("same_key", [True, False])
def test_an_entry_of_another_ledger_is_no_entry_here_though_the_key_were_the_same(
    lived: Place, hand: Hand, tmp_path: Path, same_key: bool
):
    key = lived.key if same_key else NodeKey(b"another" + bytes(25))
    elsewhere = Place(tmp_path / "elsewhere", key)
    Ledger.create(elsewhere, site="north", by="x", first=102).disconnect()
    with hand(lived) as database:
        database.execute("ATTACH ? AS elsewhere", (str(elsewhere.database),))
        database.execute("INSERT INTO entry SELECT * FROM elsewhere.entry WHERE number = 102")
        database.commit()
        database.execute("DETACH elsewhere")
    assert bad(lived) == {102}


def test_a_ledger_of_another_key_says_that_the_key_may_be_another(lived: Place):
    foreign = replace(lived, key=NodeKey(b"another" + bytes(25)))
    assert "node.key is another's" in refusal(foreign)


# --- Files --------------------------------------------------------------------------------------


def garbage(path: Path) -> None:
    path.write_bytes(os.urandom(path.stat().st_size))


def emptied(path: Path) -> None:
    path.write_bytes(b"")


def zeroed(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def halved(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def without_its_beginning(path: Path) -> None:
    path.write_bytes(bytes(4096) + path.read_bytes()[4096:])


def flipped(path: Path) -> None:
    """Every page but the first two damaged."""
    content = bytearray(path.read_bytes())
    for place in range(8192, len(content), 512):
        content[place] ^= 0xFF
    path.write_bytes(content)


def a_name_that_is_no_text(path: Path) -> None:
    """One byte in the schema, which lies in the first page of the file."""
    content = path.read_bytes()
    place = content.index(b"entry_stays")
    path.write_bytes(content[:place] + b"\xff" + content[place + 1 :])


def a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def gone(path: Path) -> None:
    path.unlink()


def a_database_of_somebody(path: Path) -> None:
    path.unlink()
    with closing(sqlite3.connect(path)) as database:
        database.executescript("CREATE TABLE entry (number); INSERT INTO entry VALUES (1)")


def an_older_format(path: Path) -> None:
    with closing(sqlite3.connect(path)) as database:
        database.execute("PRAGMA user_version = 1")


def no_table(path: Path) -> None:
    path.unlink()
    with closing(sqlite3.connect(path)) as database:
        database.execute("PRAGMA user_version = 2")


def no_entry(path: Path) -> None:
    with closing(sqlite3.connect(path)) as database:
        database.executescript("DROP TRIGGER entry_kept; DELETE FROM entry")


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (garbage, "damaged"),
        (emptied, "format 0"),
        (zeroed, "damaged|format 0"),
        (halved, "damaged"),
        (without_its_beginning, "damaged|format 0"),
        (flipped, "damaged|entry"),
        (a_name_that_is_no_text, "damaged|changed"),
        (a_folder, "missing"),
        (gone, "missing"),
        (a_database_of_somebody, "format 0, this version reads 2"),
        (an_older_format, "format 1, this version reads 2"),
        (no_table, "damaged|holds no entry"),
        (no_entry, "holds no entry"),
    ],
)
def test_a_file_that_is_no_whole_ledger_stops_the_node_and_is_left_as_it_is(
    lived: Place, damage: Callable[[Path], None], said: str
):
    damage(lived.database)
    assert re.search(said, refusal(lived))


def test_no_byte_of_the_schema_ends_in_a_stack_trace(lived: Place):
    content = lived.database.read_bytes()
    begin = content.index(b"CREATE TRIGGER") - 100
    for place in range(begin, begin + 1500, 7):
        if place >= 4096:
            break
        lived.database.write_bytes(content[:place] + b"\xff" + content[place + 1 :])
        for opened in (Ledger, Ledger.salvaged):
            with suppress(LedgerError):
                opened(lived)


def test_a_disk_that_takes_no_writing_is_not_taken_for_damage():
    error = sqlite3.OperationalError("attempt to write a readonly database")
    error.sqlite_errorcode = sqlite3.SQLITE_READONLY_CANTINIT
    said = str(_unreadable(Path("ledger.sqlite"), "damaged", error))
    assert "cannot be written" in said
    assert "recover" not in said
    error.sqlite_errorcode = sqlite3.SQLITE_CORRUPT
    assert str(_unreadable(Path("ledger.sqlite"), "damaged", error)).endswith(WAY_OUT)


def test_a_ledger_whose_folder_is_gone_stops_the_node_and_is_not_begun_anew(lived: Place):
    shutil.rmtree(lived.folder)
    assert "missing" in refusal(lived)
    assert not lived.folder.exists()


def test_a_ledger_is_never_made_over_another(lived: Place):
    before = everything(lived)
    with pytest.raises(LedgerError, match="already"):
        Ledger.create(replace(lived, witness=None), site="north")
    lived.database.rename(lived.database.with_name("ledger.sqlite-wal"))
    with pytest.raises(LedgerError, match="already"):
        Ledger.create(replace(lived, witness=None), site="north")
    lived.database.with_name("ledger.sqlite-wal").rename(lived.database)
    assert everything(lived) == before


def test_another_file_in_its_place_stops_a_node_that_runs(lived: Place):
    ledger = Ledger(lived)
    copy = lived.database.with_name("copy")
    shutil.copyfile(lived.database, copy)
    copy.replace(lived.database)
    with pytest.raises(LedgerError, match="another file lies there"):
        _ = ledger.book
    with pytest.raises(LedgerError, match="another file lies there"):
        ledger.lapse("a" * 64)
    assert Ledger(lived).book.last == 101


def test_an_entry_that_appears_altered_under_a_node_that_runs_stops_it(lived: Place, hand: Hand):
    ledger = Ledger(lived)
    copied_in(hand, lived, 9, 102)
    with pytest.raises(LedgerError, match="entry 102 is not as this node wrote it"):
        _ = ledger.book
    with pytest.raises(LedgerError, match="entry 102 is not as this node wrote it"):
        ledger.lapse("a" * 64)
    assert numbers(lived)[-1] == 102
