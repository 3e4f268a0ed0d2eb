"""What the engines cost beyond training: 4 sites, a tiny model, 10 rounds, both in one run.

    python benchmarks/overhead.py

Per engine: seconds from command to report, in a process of its own as a user would start it, and
seconds a round beyond training. For the local engine training is the slowest site's own time in
its worker; the rest of the round (messages, folding, evaluation, checkpoint) is overhead. Ray
gives no such figure. The last line is the demo's own run, on its own films: which part of all
cores' time goes into training.
"""

from __future__ import annotations

import argparse
import io
import json
import os
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
from deploy.local_engine import Timing
from server.rounds import LogObserver

SITES = 4

RUN = """
name = "overhead"
rounds = {rounds}
[task]
classes = ["no", "yes"]
[model]
name = "small-cnn"
width = {width}
[input]
height = {side}
width = {side}
[optimizer]
name = "sgd"
learning_rate = 0.1
[local]
batch_size = {batch}
steps = {steps}
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

TINY = {"rounds": 10, "width": 4, "side": 16, "batch": 16, "steps": 1}


def main() -> None:
    """Run both engines side by side and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--conduct", nargs=2, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.conduct:
        conduct(Path(asked.conduct[0]), asked.conduct[1])
        return
    with tempfile.TemporaryDirectory() as scratch:
        tiny = measure(Path(scratch) / "tiny", TINY)
        run_file = prepare_demo(Path(scratch) / "demo", Console(file=io.StringIO()))
        demo = measure_engine(run_file, "local")
    Console().print(report(tiny, demo))


def conduct(folder: Path, engine: str) -> None:
    """One run, in this process; what the local engine measured goes beside its record."""
    spec, plan = simulation.load(folder)
    if engine == "ray":
        simulation.simulate(folder, engine="ray", observer=LogObserver())
        return
    timings = simulation.run_locally(folder, spec, plan, workers=None, observer=LogObserver())
    (folder / "timings.json").write_text(json.dumps([vars(timing) for timing in timings]))


def measure(folder: Path, sizes: dict[str, int]) -> dict[str, dict]:
    """The figures of each engine on one and the same run and data."""
    folder.mkdir()
    sites = "".join(SITE.format(n=n) for n in range(SITES))
    (folder / "run.toml").write_text(RUN.format(sites=sites, **sizes))
    spec = parse_run_text((folder / "run.toml").read_text(), source="overhead").spec
    for number, name in enumerate(["evaluation", *(f"site-{n}" for n in range(SITES))]):
        write_cohort(folder / name, spec, images=200, seed=number)
    return {engine: measure_engine(folder / "run.toml", engine) for engine in ("local", "ray")}


def measure_engine(run_file: Path, engine: str) -> dict:
    """Start the run in a new process and take its times."""
    run = simulation.prepare(run_file, run_file.parent / "runs")
    started = time.perf_counter()
    command = [sys.executable, __file__, "--conduct", str(run), engine]
    status = os.spawnv(os.P_WAIT, sys.executable, command)
    elapsed = time.perf_counter() - started
    if status or not (run / "report.html").exists():
        raise SystemExit(f"{engine}: the run failed with status {status}")
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    found = {"command_to_report": elapsed, "rounds": [row["seconds"] for row in rows]}
    if (run / "timings.json").exists():
        text = (run / "timings.json").read_text()
        found["timings"] = [Timing(**timing) for timing in json.loads(text)]
    return found


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
