"""What the engines cost beyond training: 4 sites, a tiny model, 10 rounds, both in one run.

    python benchmarks/overhead.py

Per engine: seconds from command to report, as a person types it, and seconds a round beyond
training. For the local engine training is the slowest site's own time in
its worker; the rest of the round (messages, folding, evaluation, checkpoint) is overhead. Ray
gives no such figure. The last line is the demo's own run, on its own films: which part of all
cores' time goes into training.
"""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table
from synthetic import write_cohort

from common.spec import parse_run_text
from deploy import simulation
from deploy.demo import prepare_demo
from server.rounds import LogObserver

SITES = 4

RUN = """
name = "overhead"
rounds = 10
[task]
classes = ["no", "yes"]
[model]
name = "small-cnn"
width = 4
[input]
height = 16
width = 16
[optimizer]
name = "sgd"
learning_rate = 0.1
[local]
batch_size = 16
steps = 1
[privacy]
mechanism = "dp-sgd"
noise_multiplier = 1.0
delta = 1e-4
[evaluation]
bootstrap = 100
[simulation]
evaluation = "evaluation"
{sites}
"""
SITE = '[[simulation.site]]\nname = "site-{n}"\ncohort = "site-{n}"\ndeclared_size = 200\n'


def main() -> None:
    """Run both engines side by side and print the table."""
    with tempfile.TemporaryDirectory() as scratch:
        run_file = write_run(Path(scratch) / "tiny")
        tiny = {engine: command(run_file, engine) for engine in ("local", "ray")}
        tiny["local"] |= rounds(run_file)
        films = prepare_demo(Path(scratch) / "demo", Console(file=io.StringIO()))
        demo = rounds(films)
    Console().print(report(tiny, demo))


def write_run(folder: Path) -> Path:
    """The tiny run and its random cohorts; returns the run's file."""
    folder.mkdir()
    run_file = folder / "run.toml"
    run_file.write_text(RUN.format(sites="".join(SITE.format(n=n) for n in range(SITES))))
    spec = parse_run_text(run_file.read_text(), source="overhead").spec
    for number, name in enumerate(["evaluation", *(f"site-{n}" for n in range(SITES))]):
        write_cohort(folder / name, spec, images=200, seed=number)
    return run_file


def command(run_file: Path, engine: str) -> dict:
    """What a person types, in a process of its own: seconds from command to report."""
    runs = run_file.parent / engine
    cloister = Path(sys.executable).parent / "cloister"
    words = ["simulate", str(run_file), "--runs", str(runs), "--engine", engine]
    started = time.perf_counter()
    subprocess.run([str(cloister), *words], check=True, stdout=subprocess.DEVNULL)
    elapsed = time.perf_counter() - started
    (found,) = runs.glob("*/report.html")
    return {"command_to_report": elapsed, "rounds": seconds_of(found.parent)}


def rounds(run_file: Path) -> dict:
    """The local engine in this process, with what its workers took for each message."""
    run = simulation.prepare(run_file, run_file.parent / "timed")
    spec, plan = simulation.load(run)
    timings = simulation.run_locally(run, spec, plan, workers=None, observer=LogObserver())
    return {"rounds": seconds_of(run), "timings": timings}


def seconds_of(run: Path) -> list[float]:
    """Seconds of each round, from the run's record."""
    rows = (run / "metrics.jsonl").read_text().splitlines()
    return [json.loads(row)["seconds"] for row in rows]


def beyond_training(found: dict) -> float:
    """The median round's seconds beyond its slowest site; the first round warms up."""
    trained = [t.wall for t in found["timings"][SITES:]]  # the invitations came first
    slowest = [max(trained[n : n + SITES]) for n in range(0, len(trained), SITES)]
    return float(np.median(np.subtract(found["rounds"], slowest)[1:]))


def share_of_cores(found: dict) -> float:
    """The sites' processor time over all cores' time in the rounds, without the first."""
    sites = len({t.node_id for t in found["timings"]})
    spent = sum(t.processor for t in found["timings"][2 * sites :])
    return spent / ((os.cpu_count() or 1) * sum(found["rounds"][1:]))


def report(tiny: dict[str, dict], demo: dict[str, dict]) -> Table:
    """Both engines, and the ratio between them."""
    table = Table(title=f"{SITES} sites, {os.cpu_count()} cores")
    for column in ("", "command to report (s)", "a round (s)", "beyond training (s)"):
        table.add_column(column, justify="left" if not column else "right")
    for engine, found in tiny.items():
        beyond = f"{beyond_training(found):.4f}" if "timings" in found else "–"
        a_round = f"{np.median(found['rounds'][1:]):.4f}"
        table.add_row(engine, f"{found['command_to_report']:.1f}", a_round, beyond)
    ratio = tiny["ray"]["command_to_report"] / tiny["local"]["command_to_report"]
    table.add_row("ray / local", f"{ratio:.1f}", "", "")
    table.add_section()
    share = f"{share_of_cores(demo):.0%} of the cores' time"
    table.add_row(f"the demo trains in {share}", "", f"{np.median(demo['rounds'][1:]):.4f}", "")
    return table


if __name__ == "__main__":
    main()
