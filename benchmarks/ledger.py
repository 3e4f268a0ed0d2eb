"""What the ledger costs: beside a round of the demo, and when it has grown long.

    python benchmarks/ledger.py

First the demo's own federation, and on the same disk, right after it, what a node's ledger does:
look at the coordinator's witness, set a run aside, reserve, keep a release of the demo's size and
commit, prune. The median of each; a run is set aside once, so a round bears its part of that. The
share is what the target of 1 % speaks of. Nearly all of it is waiting for the disk: beside it
stands how long that takes to flush 4 KiB. Beside the round as it was, for machines that have other
work: what its training takes of the processor, over all cores; no round can be shorter.

Then ledgers of 1,000 to 100,000 entries: seconds to open one (every entry checked) and to say what
counts against the budget, in a fresh process, without the time that Python and imports take, and
how much of that the processor worked: the rest, others did. The target is one second.
"""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table
from safetensors.numpy import save

from client.book import Entry, Kind, columns, note
from client.chain import Chain
from client.keyfile import NodeKey
from client.ledger import Ledger, Limit, Place, Signed, TaskKey
from common import models
from common.accounting import Share, SubsampledGaussian
from common.spec import RunSpec
from deploy import simulation
from deploy.demo import prepare_demo
from server.rounds import LogObserver

KEY = NodeKey(bytes(range(32)))
SIGNED = Signed("the benchmark", "to measure")
MECHANISM = SubsampledGaussian(0.2, 1.0, 12, "patient")
ROUNDS, LENGTHS = 200, (1_000, 10_000, 100_000)
STEPS = ("witness", "earmark", "reserve", "commit", "prune")

OPEN = """
import json, sys, time
from pathlib import Path
from client.keyfile import NodeKey
from client.ledger import Ledger, Place
place = Place(Path(sys.argv[1]), NodeKey(bytes(range(32))), Path(sys.argv[2]))
before, started = time.process_time(), time.perf_counter()
ledger = Ledger(place)
opened = time.perf_counter()
total = ledger.book.divergence(8.0)
answered = time.perf_counter()
assert total > 0
worked = time.process_time() - before
print(json.dumps([ledger.book.last, opened - started, answered - opened, worked]))
"""


def main() -> None:
    """Run both and print their tables."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        with redirect_stdout(io.StringIO()):
            run_file = prepare_demo(folder / "demo", Console())
        run = simulation.prepare(run_file, folder / "timed")
        spec, plan = simulation.load(run)
        timings = simulation.run_locally(run, spec, plan, workers=None, observer=LogObserver())
        rows = (run / "metrics.jsonl").read_text().splitlines()
        a_round = float(np.median([json.loads(row)["seconds"] for row in rows][1:]))
        trained = sum(timing.processor for timing in timings) / len(rows)
        release = save({n: p.detach().numpy() for n, p in models.build(spec).named_parameters()})
        steps = rounds(place_in(folder / "rounds"), spec, release)
        lengths = [(length, *opened(folder / str(length), length)) for length in LENGTHS]
        flush = one_flush(folder / "flushed")
    quiet = trained / (os.cpu_count() or 1)
    Console().print(
        beside_the_demo(steps, flush, {"took": a_round, "training": quiet}, spec.rounds)
    )
    Console().print(when_it_is_long(lengths))


def place_in(folder: Path) -> Place:
    """A node's ledger and witness file below `folder`."""
    folder.mkdir()
    return Place(folder / "ledger", KEY, folder / "ledger.witness")


def rounds(place: Place, spec: RunSpec, release: bytes) -> dict[str, float]:
    """Median seconds of each step of a round; each round is a run of its own here, set aside."""
    ledger = Ledger.create(place, site="north")
    ledger.set_budget(Limit(1e6, 1e-5, 8.0), SIGNED)
    seconds: dict[str, list[float]] = {step: [] for step in STEPS}
    for number in range(1, ROUNDS + 1):
        run, token = f"{number:064x}", ledger.witness
        task = TaskKey(run, "training", 1, "1" * 64)
        shares = [Share("training", MECHANISM, spec.rounds)]
        with_time(seconds["witness"], lambda token=token: ledger.check_witness(token))
        with_time(seconds["earmark"], lambda run=run, s=shares: ledger.earmark(run, s))
        attempt = with_time(
            seconds["reserve"], lambda task=task: ledger.reserve(task, MECHANISM, allow=allow)
        )
        with_time(seconds["commit"], lambda attempt=attempt: ledger.commit(attempt, release))
        with_time(seconds["prune"], lambda run=run: ledger.prune(run, keep=1))
        ledger.close(run, SIGNED)
    return {step: float(np.median(taken)) for step, taken in seconds.items()}


def allow(book) -> None:
    """What a policy looks at before it lets an attempt through."""
    book.divergence(8.0)
    book.since("2026")


def with_time(seconds: list[float], act: Callable):
    """What `act` returns; how long it took is added to `seconds`."""
    started = time.perf_counter()
    found = act()
    seconds.append(time.perf_counter() - started)
    return found


def opened(folder: Path, length: int) -> tuple[float, float, float]:
    """Seconds to open a ledger of `length` entries, to add it up, and of the processor.

    The best of three.
    """
    place = place_in(folder)
    Ledger.create(place, site="north").disconnect()
    chain = Chain(place.database, KEY)
    chain.book(lambda _: list(history(length)))
    chain.close()
    words = [sys.executable, "-c", OPEN, str(place.folder), str(place.witness)]
    found = []
    for _ in range(3):
        done = subprocess.run(words, check=True, stdout=subprocess.PIPE)
        last, *seconds = json.loads(done.stdout)
        if last != length:
            raise RuntimeError(f"{last} entries, expected {length}")
        found.append(tuple(seconds))
    return min(found, key=lambda seconds: seconds[0] + seconds[1])


def history(length: int) -> Iterator[Entry]:
    """Runs of 100 rounds, each released; the last is still open. Its first entry is there."""
    number, start = 1, 0
    plain = Entry(0, "", time="2026-01-01T00:00:00.000+00:00")
    while number < length:
        within = (number - 1) % 202
        run = f"{(number - 1) // 202:064x}"
        if within == 0:
            booked = columns(SubsampledGaussian(0.2, 1 + number / length, 12, "patient"))
            said = note(name="run", run_id="")
            new = plain._replace(kind=Kind.EARMARKED, round=100, note=said, **booked)
            new = new._replace(part="training")
        elif within == 201:
            new = plain._replace(kind=Kind.LAPSED)
        elif within % 2:
            new = plain._replace(kind=Kind.RESERVED, round=within, task=run, cohort=run, **booked)
            new, start = new._replace(part="training"), number + 1
        else:
            new = plain._replace(kind=Kind.COMMITTED, refers=start, release=run)
        yield new._replace(run=run)
        number += 1


def one_flush(path: Path) -> float:
    """Median seconds for 4 KiB added to a file to be on the disk."""
    seconds: list[float] = []
    with path.open("wb", buffering=0) as file:
        for _ in range(ROUNDS):
            file.write(bytes(4096))
            with_time(seconds, lambda: os.fsync(file.fileno()))
    return float(np.median(seconds))


def beside_the_demo(
    steps: dict[str, float], flush: float, demo: dict[str, float], rounds: int
) -> Table:
    """What a round of the ledger takes, and the share of the demo's."""
    table = Table(title=f"a round, median of {ROUNDS}")
    for column in ("", "ms", "share of it"):
        table.add_column(column, justify="right" if column else "left")
    for step, seconds in steps.items():
        table.add_row(step, f"{1000 * seconds:.2f}", "")
    together = sum(steps.values()) - steps["earmark"] * (1 - 1 / rounds)
    table.add_row(f"a round, with 1/{rounds} of setting aside", f"{1000 * together:.2f}", "")
    table.add_row("for comparison: a flush of 4 KiB", f"{1000 * flush:.2f}", "")
    table.add_section()
    for what, seconds in (
        ("the demo's round as it was", demo["took"]),
        ("its training, if all cores had nothing else to do", demo["training"]),
    ):
        table.add_row(what, f"{1000 * seconds:.0f}", f"{together / seconds:.2%}")
    return table


def when_it_is_long(lengths: list[tuple[int, float, float, float]]) -> Table:
    """Seconds by the number of entries, and what one entry takes."""
    table = Table(title="seconds for a long ledger, the best of three")
    for column in ("entries", "to open", "to add up", "together", "processor", "µs an entry"):
        table.add_column(column, justify="right", no_wrap=True)
    for length, to_open, to_add, worked in lengths:
        cells = (f"{seconds:.3f}" for seconds in (to_open, to_add, to_open + to_add, worked))
        table.add_row(f"{length:,}", *cells, f"{1e6 * worked / length:.1f}")
    return table


if __name__ == "__main__":
    main()
