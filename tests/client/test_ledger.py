"""The ledger as a file on a disk: never rewritten, shared by processes, pruned of bytes alone."""

from __future__ import annotations

import os
import sqlite3
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from client.ledger import Ledger
from common.accounting import SubsampledGaussian
from common.errors import Refusal, RefusalCode

MECHANISM = SubsampledGaussian(0.1, 1.0, 2, "patient")
TASK = "1" * 64

BOOKER = """
import sys
from pathlib import Path
from client.ledger import Ledger
from common.accounting import SubsampledGaussian
from common.errors import Refusal, RefusalCode
folder, name, most = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])

def allow(spent):
    if sum(mechanism.steps for mechanism in spent) >= most:
        raise Refusal(RefusalCode.BUDGET, "no more")

ledger, booked = Ledger(folder), 0
print("ready", flush=True)
sys.stdin.readline()
for number in range(1, 31):
    try:
        attempt = ledger.reserve(
            name, number, "t", SubsampledGaussian(0.1, 1.0, 1, "patient"), allow=allow
        )
        ledger.commit(attempt, f"{name} {number}".encode())
        booked += 1
    except Refusal:
        pass
print(booked, flush=True)
"""


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return Ledger(tmp_path / "ledger")


@pytest.fixture
def database(ledger: Ledger, tmp_path: Path) -> Iterator[sqlite3.Connection]:
    """A released attempt and a reserved one, and another hand on the same file."""
    ledger.commit(ledger.reserve("run", 1, TASK, MECHANISM), b"release")
    ledger.reserve("run", 2, TASK, MECHANISM)
    with closing(sqlite3.connect(tmp_path / "ledger" / "ledger.sqlite")) as connection:
        yield connection


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE attempt SET steps = 0",
        "UPDATE attempt SET noise_multiplier = 100 WHERE id = 2",
        "DELETE FROM attempt",
        "DELETE FROM attempt WHERE id = 2",
        "INSERT OR REPLACE INTO attempt SELECT id, run, round, task, 0.1, 99, 0, unit, reserved "
        "FROM attempt",
        "UPDATE release SET digest = ''",
        "DELETE FROM release",
        "INSERT OR REPLACE INTO release SELECT attempt, 'other', committed FROM release",
    ],
)
def test_what_is_written_stays(ledger: Ledger, database: sqlite3.Connection, statement: str):
    everything = "SELECT a.*, r.* FROM attempt a LEFT JOIN release r ON r.attempt = a.id"
    before = database.execute(everything).fetchall()
    with pytest.raises(sqlite3.IntegrityError, match="append only"):
        database.execute(statement)
    database.rollback()
    assert database.execute(everything).fetchall() == before
    assert ledger.spent() == [MECHANISM.of_steps(4)]
    assert ledger.released("run", 1, TASK) == b"release"


def test_opening_again_changes_nothing(ledger: Ledger, tmp_path: Path):
    ledger.reserve("run", 1, TASK, MECHANISM)
    assert Ledger(tmp_path / "ledger").spent() == ledger.spent() == [MECHANISM]


def test_a_second_commit_of_one_attempt_is_refused(ledger: Ledger):
    attempt = ledger.reserve("run", 1, TASK, MECHANISM)
    ledger.commit(attempt, b"first")
    with pytest.raises(sqlite3.IntegrityError):
        ledger.commit(attempt, b"second")
    assert ledger.released("run", 1, TASK) == b"first"


def test_nobody_else_reads_its_folder(ledger: Ledger, tmp_path: Path):
    for folder in (tmp_path / "ledger", tmp_path / "ledger" / "releases"):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700


# --- Processes --------------------------------------------------------------------------------


def booked_by(folder: Path, *, processes: int, most: int) -> list[int]:
    """How many bookings each of some processes made that all started at once."""
    started = [
        subprocess.Popen(
            [sys.executable, "-c", BOOKER, str(folder), f"run-{number}", str(most)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        )
        for number in range(processes)
    ]
    for process in started:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in started:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    counts = [int(process.communicate(timeout=60)[0]) for process in started]
    assert [process.returncode for process in started] == [0] * processes
    return counts


def test_two_processes_lose_no_booking_and_never_pass_a_limit_together(tmp_path: Path):
    folder = tmp_path / "ledger"
    counts = booked_by(folder, processes=2, most=37)
    assert sum(counts) == 37
    ledger = Ledger(folder)
    assert [mechanism.steps for mechanism in ledger.spent()] == [37]
    for number, count in enumerate(counts):
        assert count == 30 or ledger.released(f"run-{number}", 30, "t") is None
        assert ledger.released(f"run-{number}", 1, "t") == f"run-{number} 1".encode()


def test_a_refused_booking_leaves_no_trace(ledger: Ledger):
    def never(_: list[SubsampledGaussian]) -> None:
        raise Refusal(RefusalCode.BUDGET, "no")

    with pytest.raises(Refusal):
        ledger.reserve("run", 1, TASK, MECHANISM, allow=never)
    assert ledger.spent() == []
    assert ledger.released("run", 1, "another task") is None
    ledger.reserve("run", 1, TASK, MECHANISM)  # and no lock


def test_a_booking_of_other_content_is_refused(ledger: Ledger):
    ledger.reserve("run", 1, TASK, MECHANISM)
    with pytest.raises(Refusal, match="other content") as refused:
        ledger.reserve("run", 1, "2" * 64, MECHANISM)
    assert refused.value.code is RefusalCode.REPLAY
    assert ledger.spent() == [MECHANISM]


# --- Pruning ----------------------------------------------------------------------------------


def test_pruning_drops_the_bytes_of_earlier_rounds_of_that_run_alone(ledger: Ledger):
    for run in ("run", "other"):
        for number in (1, 2, 3):
            attempt = ledger.reserve(run, number, TASK, MECHANISM)
            ledger.commit(attempt, f"{run} {number}".encode())
    ledger.prune("run", before_round=3)
    assert ledger.released("run", 3, TASK) == b"run 3"
    for number in (1, 2, 3):
        assert ledger.released("other", number, TASK) == f"other {number}".encode()
    for number in (1, 2):
        with pytest.raises(Refusal, match="no longer kept") as refused:
            ledger.released("run", number, TASK)
        assert refused.value.code is RefusalCode.REPLAY
    assert ledger.spent() == [MECHANISM.of_steps(12)]


def test_pruning_twice_and_pruning_nothing_are_no_mistakes(ledger: Ledger):
    ledger.commit(ledger.reserve("run", 1, TASK, MECHANISM), b"release")
    ledger.prune("run", before_round=0)
    assert ledger.released("run", 1, TASK) == b"release"
    ledger.prune("run", before_round=2)
    ledger.prune("run", before_round=2)
    ledger.prune("unknown", before_round=2)


def test_damaged_bytes_are_never_given_out(ledger: Ledger, tmp_path: Path):
    ledger.commit(ledger.reserve("run", 1, TASK, MECHANISM), b"release")
    (stored,) = (tmp_path / "ledger" / "releases").iterdir()
    stored.write_bytes(b"releasE")
    with pytest.raises(Refusal, match="damaged") as refused:
        ledger.released("run", 1, TASK)
    assert refused.value.code is RefusalCode.REPLAY


def test_pruning_keeps_bytes_that_a_later_round_released_as_well(ledger: Ledger):
    for number in (1, 2, 3):  # an empty site without privacy releases the same zeros each time
        ledger.commit(ledger.reserve("run", number, TASK, None), b"zeros")
    ledger.prune("run", before_round=3)
    assert ledger.released("run", 3, TASK) == b"zeros"
