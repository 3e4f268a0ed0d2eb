"""What the engines cost beyond training: 4 sites, a tiny model, 10 rounds, both in one run.

    python benchmarks/overhead.py

Per engine: seconds from command to report, in a process of its own as a user would start it, and
seconds a round beyond training. For the local engine training is the slowest site's own time in
its worker; the rest of the round (messages, folding, evaluation, checkpoint) is overhead. Ray
reports no such figure, so for it the whole round stands there. A third line runs the demo's
network and shows which part of the cores' time goes into training.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from client.intake.builder import CohortBuilder, ImageRecord
from common.cohort import CohortMeta
from common.spec import RunSpec, parse_run_text
from deploy import simulation
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
DEMO = {"rounds": 5, "width": 16, "side": 64, "batch": 64, "steps": 4}


def main() -> None:
    """Run both engines side by side and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--conduct", nargs=2, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.conduct:
        conduct(Path(asked.conduct[0]), asked.conduct[1])
        return
    with tempfile.TemporaryDirectory() as scratch:
        tiny = measure(Path(scratch) / "tiny", TINY, ("local", "ray"))
        demo = measure(Path(scratch) / "demo", DEMO, ("local",))
    Console().print(report(tiny, demo))


def conduct(folder: Path, engine: str) -> None:
    """One run, in this process; what the local engine measured goes beside its record."""
    spec, plan = simulation.load(folder)
    if engine == "ray":
        simulation.simulate(folder, engine="ray", observer=LogObserver())
        return
    timings = simulation.run_locally(folder, spec, plan, workers=None, observer=LogObserver())
    (folder / "timings.json").write_text(json.dumps([vars(timing) for timing in timings]))


def measure(folder: Path, sizes: dict[str, int], engines: tuple[str, ...]) -> dict[str, dict]:
    """The figures of each engine on one and the same run and data."""
    folder.mkdir()
    sites = "".join(SITE.format(n=n) for n in range(SITES))
    (folder / "run.toml").write_text(RUN.format(sites=sites, **sizes))
    spec = parse_run_text((folder / "run.toml").read_text(), source="overhead").spec
    for number, name in enumerate(["evaluation", *(f"site-{n}" for n in range(SITES))]):
        write_cohort(folder / name, spec, images=200, seed=number)
    return {engine: measure_engine(folder, engine) for engine in engines}


def measure_engine(folder: Path, engine: str) -> dict:
    """Start the run in a new process and take its times."""
    run = simulation.prepare(folder / "run.toml", folder / "runs")
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
    trained = [t.wall for t in found["timings"][SITES:]]
    slowest = [max(trained[n : n + SITES]) for n in range(0, len(trained), SITES)]
    return float(np.median(np.subtract(found["rounds"], slowest)[1:]))


def share_of_cores(found: dict) -> float:
    """The sites' processor time over all cores' time in the rounds, without the first."""
    spent = sum(t.processor for t in found["timings"][2 * SITES :])
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
    share = f"{share_of_cores(demo['local']):.0%} of the cores' time in training"
    table.add_row(f"demo's network, local: {share}", "", "", "")
    return table


def write_cohort(path: Path, spec: RunSpec, *, images: int, seed: int) -> None:
    """Random images, one a patient."""
    generator = np.random.default_rng(seed)
    with CohortBuilder(path, spec.input.shape) as builder:
        for number in range(images):
            pixels = generator.integers(0, 65536, spec.input.shape, dtype=np.uint16)
            name = f"{number:064x}"
            record = ImageRecord(name, name, name, name, number % 2, *spec.input.shape[1:])
            builder.add(record, pixels)
        builder.finish(CohortMeta.of(spec, unit="patient", source="random", created="2000-01-01"))


if __name__ == "__main__":
    main()
