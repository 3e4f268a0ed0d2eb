"""The book of witnesses: a file that several runs share, and in which nothing goes back."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from common.errors import LedgerError, RunError
from server.witness import WitnessBook, entry_of


def token(entry: int, head: str = "a") -> str:
    return f"{entry}:{head * 64}:{head * 64}"


@pytest.fixture
def book(tmp_path: Path) -> WitnessBook:
    return WitnessBook(tmp_path / "witnesses.json")


def test_a_book_without_a_file_is_empty(book: WitnessBook):
    assert book.read() == {}
    assert not book.path.exists()


def test_what_is_kept_is_read_by_the_next_process(book: WitnessBook):
    book.keep({"north": token(3), "south": token(0)})
    assert WitnessBook(book.path).read() == {"north": token(3), "south": token(0)}


def test_a_witness_gives_way_to_one_that_goes_farther_and_to_no_other(book: WitnessBook):
    book.keep({"north": token(5)})
    for other in (token(4), token(0), token(5, "b")):
        book.keep({"north": other, "south": token(1)})
        assert book.read()["north"] == token(5)
    book.keep({"north": token(6, "b")})
    assert book.read() == {"north": token(6, "b"), "south": token(1)}


def test_numbers_are_compared_as_numbers(book: WitnessBook):
    book.keep({"north": token(9)})
    book.keep({"north": token(10)})
    assert entry_of(book.read()["north"]) == 10
    with pytest.raises(LedgerError, match="at entry 9, but was seen at entry 10"):
        book.check("north", token(9), book.read())


@pytest.mark.parametrize("shown", [token(5), token(6), token(6, "b"), token(10**12 - 1)])
def test_a_ledger_that_may_lead_there_passes(book: WitnessBook, shown: str):
    book.check("north", shown, {"north": token(5), "south": token(9)})
    book.check("east", shown, {"north": token(5)})  # never seen before


@pytest.mark.parametrize("shown", [token(4), token(0), token(5, "b")])
def test_a_ledger_that_cannot_is_named_with_the_way_out(book: WitnessBook, shown: str):
    with pytest.raises(LedgerError) as caught:
        book.check("north", shown, {"north": token(5)})
    for part in ("site 'north'", "node audit", "node recover", token(5), str(book.path)):
        assert part in str(caught.value)


DAMAGED = {
    "empty": b"",
    "cut off": b'{"format": 1, "sites": {"north": "5:aa',
    "no text": b"\xff\xfe\x00",
    "a list": b"[]",
    "another format": b'{"format": 2, "sites": {}}',
    "an unknown key": b'{"format": 1, "sites": {}, "more": 1}',
    "no witness": b'{"format": 1, "sites": {"north": "5"}}',
    "a path for a name": b'{"format": 1, "sites": {"../x": "' + token(5).encode() + b'"}}',
}


@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_file_stops_and_is_not_written_over(book: WitnessBook, content: bytes):
    book.path.write_bytes(content)
    for use in (book.read, lambda: book.keep({"south": token(1)})):
        with pytest.raises(RunError, match=re.escape(str(book.path)) + ".*from a copy"):
            use()
    assert book.path.read_bytes() == content


def test_a_folder_that_cannot_be_written_stops_with_the_file(tmp_path: Path):
    missing = WitnessBook(tmp_path / "gone" / "witnesses.json")
    with pytest.raises(RunError, match=r"witnesses\.json: .*cannot be written"):
        missing.keep({"north": token(1)})


KEEP = """
import sys
from pathlib import Path
from server.witness import WitnessBook

book, name = WitnessBook(Path(sys.argv[1])), sys.argv[2]
for entry in range(1, int(sys.argv[3]) + 1):
    head = "a" * 64
    book.keep({name: f"{entry}:{head}:{head}"})
    print(entry, flush=True)
"""


def keeping(book: WitnessBook, name: str, entries: int) -> subprocess.Popen[bytes]:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-c", KEEP, str(book.path), name, str(entries)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE)


def test_processes_at_once_lose_nothing_of_each_other(book: WitnessBook):
    names = [f"site-{number}" for number in range(4)]
    for process in [keeping(book, name, 50) for name in names]:
        process.communicate(timeout=120)
        assert process.returncode == 0
    assert book.read() == dict.fromkeys(names, token(50))


def test_a_process_that_is_killed_leaves_what_it_had_kept(book: WitnessBook):
    process = keeping(book, "north", 100_000)
    assert process.stdout is not None
    for _ in range(5):
        said = int(process.stdout.readline())
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    assert entry_of(book.read()["north"]) >= said
    book.keep({"south": token(1)})  # the lock went with it
    assert set(book.read()) == {"north", "south"}
