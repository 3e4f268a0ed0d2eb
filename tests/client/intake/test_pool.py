"""Workers that are lost: by a crash, by time, by memory, each costs its own task and no other."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from itertools import chain
from operator import methodcaller
from pathlib import Path
from typing import Any

import pytest

from client.intake.pool import Bounds, Pool, WorkerLostError

BOUNDS = Bounds(seconds=20, memory=2**29)


def run(tasks: list[Any], workers: int = 2, bounds: Bounds = BOUNDS) -> list[Any]:
    """A task is a function of nothing; the job calls it."""
    with Pool(methodcaller("__call__"), workers, bounds) as pool:
        return list(pool.map(tasks))


def test_answers_come_in_the_order_of_the_tasks() -> None:
    tasks = [partial(time.sleep, delay) for delay in (0.3, 0, 0.2, 0)]
    numbered = [partial(divmod, number, 7) for number in range(40)]

    assert run(tasks) == [None] * 4
    assert run(numbered) == [divmod(number, 7) for number in range(40)]


def test_a_crash_in_native_code_costs_one_task_and_says_how() -> None:
    tasks = [partial(abs, -1), partial(ctypes.string_at, 0), partial(os.abort), partial(abs, -2)]

    first, crashed, aborted, last = run(tasks, workers=1)

    assert (first, last) == (1, 2)
    assert isinstance(crashed, WorkerLostError)
    assert isinstance(aborted, WorkerLostError)
    assert "SIGSEGV" in str(crashed)
    assert "SIGABRT" in str(aborted)


def once(marker: Path) -> str:
    """Ends its process the first time."""
    if not marker.exists():
        marker.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return "done"


def test_a_worker_that_somebody_else_ended_costs_nothing(tmp_path: Path) -> None:
    tasks = [partial(once, tmp_path / "a"), partial(abs, -1), partial(once, tmp_path / "b")]

    assert run(tasks) == ["done", 1, "done"]


def test_what_never_ends_is_ended() -> None:
    endless = partial(pow, 3, 3**20)  # within one call of native code, which no handler interrupts

    before = time.monotonic()
    lost, fine = run([endless, partial(abs, -1)], workers=1, bounds=Bounds(1, 2**29))

    assert isinstance(lost, WorkerLostError)
    assert "more than 1 s" in str(lost)
    assert fine == 1
    assert time.monotonic() - before < 60


def test_memory_is_bounded_by_the_kernel() -> None:
    lost, fine = run([partial(bytearray, 2**31), partial(abs, -1)], workers=1)

    assert isinstance(lost, WorkerLostError)
    assert fine == 1


def test_tasks_are_drawn_a_few_ahead_and_no_more() -> None:
    drawn: list[int] = []

    def tasks() -> Iterator[Any]:
        for number in range(1000):
            drawn.append(number)
            yield partial(abs, number)

    with Pool(methodcaller("__call__"), 2, BOUNDS) as pool:
        answers = pool.map(tasks())
        assert next(answers) == 0
        assert len(drawn) <= 16

    drawn.clear()
    with Pool(methodcaller("__call__"), 2, replace(BOUNDS, ahead=1)) as pool:
        answers = pool.map(chain([partial(time.sleep, 0.5)], tasks()))
        assert next(answers) is None
        assert len(drawn) <= 1  # beside the one that takes its time


def test_workers_end_with_the_pool_and_with_the_parent() -> None:
    with Pool(methodcaller("__call__"), 2, BOUNDS) as pool:
        pids = list(pool.map([partial(os.getpid), partial(os.getpid)]))
    assert len(pids) == 2
    assert not any(alive(int(str(pid))) for pid in pids)

    program = subprocess.run(
        [sys.executable, "-c", LONELY], stdout=subprocess.PIPE, check=False, timeout=120
    )
    assert program.returncode == -signal.SIGKILL
    worker = int(program.stdout)
    until = time.monotonic() + 30
    while alive(worker) and time.monotonic() < until:
        time.sleep(0.05)
    assert not alive(worker)


LONELY = """
import os, signal
from functools import partial
from itertools import chain
from operator import methodcaller
from client.intake.pool import Bounds, Pool
pool = Pool(methodcaller("__call__"), 1, Bounds(20, 2**29))
print(next(pool.map([partial(os.getpid)])), flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def test_nothing_that_a_codec_prints_reaches_the_terminal(
    capfd: pytest.CaptureFixture[str],
) -> None:
    run([partial(os.write, 1, b"MUSTERMANN"), partial(os.write, 2, b"MUSTERMANN")], workers=1)

    assert "MUSTERMANN" not in "".join(capfd.readouterr())
