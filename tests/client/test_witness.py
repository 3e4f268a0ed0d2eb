"""A ledger that lost its end: found by the witness file, or by a witness from outside."""

from __future__ import annotations

import re
import shutil
import sqlite3
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, closing
from dataclasses import replace
from pathlib import Path

import pytest

from client.book import Kind
from client.chain import WAY_OUT
from client.keyfile import NodeKey
from client.ledger import Attempt, Ledger, Place, Signed, TaskKey
from client.witness import (
    Witness,
    Witnesses,
    add_witness,
    genuine,
    highest_number,
    highest_witnesses,
    last_witnesses,
)
from common.accounting import Share, SubsampledGaussian
from common.errors import LedgerError, Refusal, RefusalCode

Hand = Callable[[Place], AbstractContextManager[sqlite3.Connection]]
SIGNED = Signed("a person", "a reason")
MECHANISM = SubsampledGaussian(0.1, 1.5, 4, "patient")
SHARES = [Share("training", MECHANISM, 1)]
RUN, NEW = "a" * 64, "5" * 64


def cut(hand: Hand, place: Place, after: int) -> None:
    with hand(place) as database:
        database.execute("DELETE FROM entry WHERE number > ?", (after,))


def next_round(ledger: Ledger, number: int = 4) -> Attempt:
    return ledger.reserve(TaskKey(RUN, "training", number, NEW), MECHANISM)


def stopped(place: Place) -> str:
    with pytest.raises(LedgerError, match=re.escape(str(place.folder.parent))) as refused:
        Ledger(place)
    assert str(refused.value).endswith(WAY_OUT)
    return str(refused.value).removesuffix(WAY_OUT)


def kinds(place: Place) -> list[str]:
    ledger = Ledger(place)
    found = [entry.kind for entry in ledger.entries()]
    ledger.disconnect()
    return found


# --- The witness file ---------------------------------------------------------------------------


@pytest.mark.parametrize("after", [1, 2, 9, 16, 100])
def test_entries_cut_off_at_the_end_are_missed_by_the_witness_file(
    lived: Place, hand: Hand, after: int
):
    cut(hand, lived, after)
    before = lived.database.read_bytes()
    said = f"ends at entry {after}, but a witness has seen entry 101"
    assert said in stopped(lived)
    assert lived.database.read_bytes() == before
    Ledger(replace(lived, witness=None))  # nothing else could know


def test_an_older_copy_is_missed_by_the_witness_file_though_it_has_gone_on_since(lived: Place):
    older = shutil.copytree(lived.folder, lived.folder.with_name("older"))
    ledger = Ledger(lived)
    ledger.earmark("1" * 64, SHARES)
    ledger.disconnect()
    shutil.rmtree(lived.folder)
    older.rename(lived.folder)
    assert "ends at entry 101, but a witness has seen entry 102" in stopped(lived)
    unwatched = Ledger(replace(lived, witness=None))
    unwatched.earmark("2" * 64, SHARES)  # another entry of the same number
    unwatched.disconnect()
    assert "entry 102 is not the one a witness saw" in stopped(lived)


def test_a_write_ahead_log_that_is_gone_is_missed_by_the_witness_file(lived: Place):
    ledger = Ledger(lived)
    next_round(ledger)
    crashed = shutil.copytree(lived.folder.parent, lived.folder.parent.with_name("crashed"))
    place = Place(crashed / "ledger", lived.key, crashed / "ledger.witness")
    log = place.database.with_name("ledger.sqlite-wal")
    assert log.stat().st_size > 0
    kept = log.read_bytes()
    log.unlink()
    place.database.with_name("ledger.sqlite-shm").unlink()
    assert "ends at entry 101, but a witness has seen entry 102" in stopped(place)
    log.write_bytes(kept)  # with it, nothing is lost
    assert Ledger(place).book.last == 102


@pytest.mark.parametrize(
    "content",
    [
        None,
        b"",
        b"\n\n",
        bytes(4000),
        b"\xff\xfe\x00 garbage " * 50,
        b"1:2:3\n",
        b"101:" + b"0" * 64 + b":" + b"0" * 64 + b"\n",
        b"9" * 5000 + b":" + b"0" * 64 + b":" + b"0" * 64 + b"\n",
    ],
)
def test_a_witness_file_without_a_witness_of_this_key_stops_the_node(
    lived: Place, content: bytes | None
):
    assert lived.witness is not None
    lived.witness.unlink()
    if content is not None:
        lived.witness.write_bytes(content)
    assert "holds no witness of this ledger; put the file back" in stopped(lived)
    assert (lived.witness.read_bytes() if lived.witness.exists() else None) == content


def test_a_witness_file_of_another_node_stops_this_one(lived: Place):
    other = Place(lived.folder.with_name("other"), NodeKey(bytes(32)), lived.witness)
    assert lived.witness is not None
    lived.witness.unlink()
    Ledger.create(other, site="south")
    assert "holds no witness of this ledger" in stopped(lived)


def test_foreign_lines_in_a_witness_file_do_no_harm(lived: Place):
    assert lived.witness is not None
    genuine_lines = lived.witness.read_text()
    foreign = "Jan  1 00:00:00 loghost rsyslogd: \u00e4 line of somebody else\n" * 20
    lived.witness.write_text(foreign + genuine_lines + foreign, encoding="utf-8")
    ledger = Ledger(lived)
    next_round(ledger)
    assert Ledger(lived).book.last == 102


def test_the_newest_witness_counts_wherever_it_stands(lived: Place, hand: Hand):
    assert lived.witness is not None
    lines = lived.witness.read_text().splitlines()
    lived.witness.write_text("\n".join([lines[-1], *lines[:-1]]) + "\n")
    cut(hand, lived, 100)
    assert "a witness has seen entry 101" in stopped(lived)


def test_old_genuine_lines_appended_do_not_hide_the_newest(lived: Place, hand: Hand):
    """Who can append alone: the old lines again, with the old ledger put back."""
    assert lived.witness is not None
    lines = lived.witness.read_text().splitlines()
    old = [line for line in lines if int(line.partition(":")[0]) <= 9]
    with lived.witness.open("a") as file:
        file.write("\n".join(old * 40) + "\n")
    cut(hand, lived, 9)
    assert "a witness has seen entry 101" in stopped(lived)


def test_invented_lines_of_higher_numbers_hide_nothing(lived: Place, hand: Hand):
    assert lived.witness is not None
    with lived.witness.open("a") as file:
        file.writelines(f"{10**6 + n}:{'0' * 64}:{'0' * 64}\n" for n in range(5000))
    assert [w.number for w in highest_witnesses(lived.witness, lived.key)] == [101]
    Ledger(lived).disconnect()
    cut(hand, lived, 100)
    assert "a witness has seen entry 101" in stopped(lived)


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
@pytest.mark.parametrize("filler", [0, 1, 146, 147, 300, 1 << 20])
def test_the_highest_is_found_across_blocks_and_long_lines(
    tmp_path: Path, filler: int, newline: str
):
    key, file = NodeKey(bytes(range(32))), tmp_path / "witness"
    tokens = [Witnesses(key).token(Witness(n, "a" * 64)) for n in (7, 9, 8)]
    for order in (tokens, tokens[::-1]):
        text = f"{newline}{'x' * filler}{newline}".join(order)
        for end in ("", newline, newline * ((1 << 20) - 200)):
            file.write_bytes((text + end).encode())
            assert highest_witnesses(file, key) == [Witness(9, "a" * 64)]
            assert highest_number(file, below=100) == 9
    file.write_bytes(("9" + tokens[1]).encode())
    assert highest_witnesses(file, key) == []
    assert highest_number(file, below=10) == 0


def test_a_fork_is_seen_from_both_sides(tmp_path: Path):
    key, file = NodeKey(bytes(range(32))), tmp_path / "witness"
    for head in "aba":
        add_witness(file, Witnesses(key).token(Witness(5, head * 64)))
    assert highest_witnesses(file, key) == [Witness(5, "a" * 64), Witness(5, "b" * 64)]
    assert highest_witnesses(tmp_path / "none", key) == []


def test_a_long_witness_file_is_looked_through_quickly(tmp_path: Path):
    key, file = NodeKey(bytes(range(32))), tmp_path / "witness"
    make = Witnesses(key).token
    lines = [make(Witness(n, f"{n:064x}")) for n in range(1, 100_001)]
    file.write_text("\n".join(lines) + "\n")
    begin = time.process_time()
    assert [w.number for w in highest_witnesses(file, key)] == [100_000]
    assert time.process_time() - begin < 2  # it takes a quarter of a second


def test_a_line_that_was_torn_spoils_no_other(lived: Place):
    assert lived.witness is not None
    whole = lived.witness.read_bytes()
    lived.witness.write_bytes(whole + whole.splitlines()[-1][:70])
    next_round(Ledger(lived))
    assert genuine(lived.key, last_witnesses(lived.witness))[-1].number == 102


def test_what_a_crash_kept_from_being_told_is_told_when_the_ledger_is_opened(lived: Place):
    assert lived.witness is not None
    next_round(Ledger(replace(lived, witness=None)))  # as if killed before telling
    assert genuine(lived.key, last_witnesses(lived.witness))[-1].number == 101
    Ledger(lived).disconnect()
    assert genuine(lived.key, last_witnesses(lived.witness))[-1].number == 102


def test_every_entry_is_told_of_to_nobody_else(lived: Place):
    assert lived.witness is not None
    seen = genuine(lived.key, lived.witness.read_text().splitlines())
    ledger = Ledger(lived)
    assert seen[-1].number == ledger.book.last
    assert [witness.number for witness in seen] == sorted({w.number for w in seen})
    assert lived.witness.stat().st_mode & 0o077 == 0


def test_a_witness_that_cannot_be_written_costs_nothing(lived: Place):
    assert lived.witness is not None
    ledger, real = Ledger(lived), lived.witness.with_name("real")
    lived.witness.rename(real)
    lived.witness.mkdir()
    for _ in range(3):
        with pytest.raises(LedgerError, match="the witness cannot be written") as refused:
            next_round(ledger)
        assert "[ledger] witness" in str(refused.value)
    assert ledger.book.last == 101
    lived.witness.rmdir()
    real.rename(lived.witness)
    next_round(ledger)


def test_a_disk_that_fills_while_a_witness_is_written_costs_one_booking_and_no_more(lived: Place):
    assert lived.witness is not None
    ledger, real = Ledger(lived), lived.witness.with_name("real")
    lived.witness.rename(real)
    lived.witness.symlink_to("/dev/full")
    for _ in range(3):
        with pytest.raises(LedgerError, match="No space left on device"):
            next_round(ledger)
    assert ledger.book.last == 102  # the first was booked, and nothing after it
    lived.witness.unlink()
    real.rename(lived.witness)
    next_round(ledger)
    assert genuine(lived.key, last_witnesses(lived.witness))[-1].number == 103


def test_a_ledger_is_not_begun_anew_under_a_witness_that_knows_of_more(lived: Place):
    shutil.rmtree(lived.folder)
    with pytest.raises(LedgerError, match=r"went to entry 101.*cloister node recover"):
        Ledger.create(lived, site="north")
    assert not lived.folder.exists()
    anew = Ledger.create(lived, site="north", first=102)
    assert anew.book.last == 102
    assert Ledger(lived).book.site == "north"


def test_only_the_end_of_a_long_witness_file_is_read(tmp_path: Path):
    file = tmp_path / "witness"
    file.write_text("".join(f"line {number}\n" for number in range(10_000)))
    lines = last_witnesses(file)
    assert len(lines) == 100
    assert lines[-1] == "line 9999"
    assert last_witnesses(tmp_path / "none") == []
    add_witness(file, "last")
    assert last_witnesses(file)[-2:] == ["line 9999", "last"]


# --- A witness from outside ---------------------------------------------------------------------


def rolled_back(place: Place, entries: int = 1) -> str:
    """Put everything back, the witness file with it; the witness that the coordinator holds."""
    home = place.folder.parent
    older = shutil.copytree(home, home.with_name("older"))
    ledger = Ledger(place)
    for number in range(entries):
        ledger.earmark(str(number) * 64, SHARES)
    token = ledger.witness
    ledger.disconnect()
    shutil.rmtree(home)
    older.rename(home)
    return token


def test_a_machine_that_was_put_back_is_found_by_a_witness_from_outside_alone(lived: Place):
    token = rolled_back(lived)
    ledger = Ledger(lived)
    assert ledger.book.halted == ""
    with pytest.raises(LedgerError, match="ends at entry 101, but a witness has seen entry 102"):
        ledger.check_witness(token)
    assert kinds(lived)[-1] == Kind.HALTED


def test_a_node_put_back_that_has_gone_on_is_found_as_well(lived: Place):
    token = rolled_back(lived, 2)
    ledger = Ledger(lived)
    ledger.earmark("8" * 64, SHARES)
    ledger.earmark("9" * 64, SHARES)
    with pytest.raises(LedgerError, match="entry 103 is not the one a witness saw"):
        ledger.check_witness(token)


def test_a_halted_node_stays_halted_across_restarts_and_says_why(lived: Place):
    token = rolled_back(lived)
    with pytest.raises(LedgerError):
        Ledger(lived).check_witness(token)
    for _ in range(3):
        ledger = Ledger(lived)
        for ask in (
            lambda ledger=ledger: ledger.check_witness(token),
            lambda ledger=ledger: ledger.check_witness(ledger.witness),
            lambda ledger=ledger: next_round(ledger),
            lambda ledger=ledger: ledger.earmark("e" * 64, SHARES),
        ):
            with pytest.raises(LedgerError, match="halted: ends at entry 101") as refused:
                ask()
            assert str(refused.value).endswith(WAY_OUT)
        ledger.disconnect()
    assert kinds(lived).count(Kind.HALTED) == 2  # one of them long ago


def test_a_halt_is_booked_once_by_two_processes_that_both_see_the_witness(lived: Place):
    token = rolled_back(lived)
    one, two = Ledger(lived), Ledger(lived)
    for ledger in (one, two, one):
        with pytest.raises(LedgerError):
            ledger.check_witness(token)
    assert kinds(lived).count(Kind.HALTED) == 2


def test_two_processes_that_see_the_witness_at_one_moment_book_one_halt(lived: Place):
    token = rolled_back(lived)

    def ask(ledger: Ledger) -> None:
        with pytest.raises(LedgerError):
            ledger.check_witness(token)

    ledgers = [Ledger(lived) for _ in range(4)]
    with closing(sqlite3.connect(lived.database, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")  # until all of them have looked, and wait to book
        threads = [threading.Thread(target=ask, args=(ledger,)) for ledger in ledgers]
        for thread in threads:
            thread.start()
        time.sleep(0.5)
        other.execute("ROLLBACK")
    for thread in threads:
        thread.join()
    assert kinds(lived).count(Kind.HALTED) == 2


def test_a_person_lets_a_halted_node_go_on_beyond_everything_the_witness_knew(lived: Place):
    token = rolled_back(lived, 7)
    with pytest.raises(LedgerError):
        Ledger(lived).check_witness(token)
    Ledger(lived).carry(0.125, SIGNED)
    ledger = Ledger(lived)
    assert ledger.book.halted == ""
    assert ledger.book.last == 109  # the witness had seen 108
    assert ledger.book.carried == 0.375
    ledger.check_witness(token)
    ledger.check_witness(ledger.witness)
    next_round(ledger)


def test_a_witness_that_a_person_has_signed_for_does_not_halt_the_node_again(lived: Place):
    token = rolled_back(lived, 2)
    ledger = Ledger(lived)
    ledger.earmark("8" * 64, SHARES)
    between = ledger.witness  # entry 102 of this branch
    ledger.earmark("9" * 64, SHARES)
    with pytest.raises(LedgerError):
        ledger.check_witness(token)
    ledger.carry(0.0, SIGNED)
    for older in (token, between):
        ledger.check_witness(older)
    newer = rolled_back(lived)
    with pytest.raises(LedgerError):
        Ledger(lived).check_witness(newer)


def test_carrying_without_a_loss_excuses_no_witness(lived: Place):
    token = rolled_back(lived)
    ledger = Ledger(lived)
    ledger.carry(0.5, SIGNED)
    with pytest.raises(LedgerError, match="entry 102 is not the one a witness saw"):
        ledger.check_witness(token)


def test_every_witness_of_its_own_past_is_true(lived: Place):
    assert lived.witness is not None
    ledger = Ledger(lived)
    for token in lived.witness.read_text().splitlines():
        ledger.check_witness(token)
    ledger.check_witness("")
    assert ledger.book.halted == ""


def altered(token: str, place: int) -> str:
    return token[:place] + ("1" if token[place] != "1" else "2") + token[place + 1 :]


def forgeries(lived: Place) -> list[str]:
    token = Ledger(lived).witness
    number, head, mac = token.split(":")
    others = Witnesses(NodeKey(bytes(32)))
    return [
        *(altered(token, place) for place in range(len(token))),
        f"999:{head}:{mac}",
        f"0{token}",
        f" {token}",
        f"{token}\n",
        f"{token}:",
        token.upper(),
        token[:-1],
        f"{number}:{head}",
        f"{number}:{head}:",
        "::",
        "x",
        "9" * 5000 + f":{head}:{mac}",
        f"\u0661:{head}:{mac}",
        f"-1:{head}:{mac}",
        others.token(Witness(999, head)),
    ]


def test_a_forged_witness_is_refused_and_never_halts_the_node(lived: Place):
    ledger, before = Ledger(lived), kinds(lived)
    for forged in forgeries(lived):
        with pytest.raises(Refusal) as refused:
            ledger.check_witness(forged)
        assert refused.value.code is RefusalCode.MALFORMED
    next_round(ledger)
    assert kinds(lived) == [*before, Kind.RESERVED]


def test_a_genuine_witness_is_known_by_its_key_alone():
    mine, other = Witnesses(NodeKey(bytes(range(32)))), Witnesses(NodeKey(bytes(32)))
    seen = Witness(12, "a" * 64)
    assert mine.parsed(mine.token(seen)) == seen
    assert other.parsed(mine.token(seen)) is None


def test_the_same_bookings_twice_have_two_witnesses(lived: Place):
    """A ledger that was put back and books the same again is another one."""
    tokens = []
    for copy in ("one", "other"):
        home = shutil.copytree(lived.folder.parent, lived.folder.parent.with_name(copy))
        ledger = Ledger(Place(home / "ledger", lived.key, home / "ledger.witness"))
        next_round(ledger)
        tokens.append(ledger.witness.split(":"))
    assert tokens[0][0] == tokens[1][0]
    assert tokens[0][1] != tokens[1][1]
    assert list(map(len, tokens[0])) == list(map(len, tokens[1]))
