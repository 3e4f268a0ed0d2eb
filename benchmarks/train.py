"""Images a second and peak memory of local training, with and without differential privacy.

    python benchmarks/train.py                     # on CUDA if there is one, else the CPU
    python benchmarks/train.py --model resnet18

Each figure is a process of its own, with and without privacy by turns, and the better of the
repetitions; the machine's own noise cancels in the ratio. On the CPU one thread computes, as in
the workers of a simulation, and glibc's malloc keeps its pages, as there; ``--malloc default``
shows what that is worth. Memory is the process's peak (on CUDA the device's) beyond what it was
before the first step.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from synthetic import write_cohort

from client.training import Compute, LocalTrainer, best_device
from common import accounting, models
from common.cohort import Cohort
from common.noise import Keystream
from common.spec import parse_run_text
from deploy.workers import ROOMY_MALLOC

RUN = """
name = "train"
rounds = 10
[task]
classes = ["no", "yes"]
[model]
name = "{model}"
[input]
channels = 3
height = {side}
width = {side}
[optimizer]
name = "sgd"
learning_rate = 0.01
[local]
batch_size = {batch}
steps = 2
[privacy]
{privacy}
"""
PRIVACY = {
    "private": 'mechanism = "dp-sgd"\nnoise_multiplier = 1.0\ndelta = 1e-4',
    "plain": 'mechanism = "none"',
}
SIDES = {"reference-cnn": 150, "resnet18": 112, "densenet121": 112}
MIB = 2**20


def main() -> None:
    """Measure each network side by side and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--malloc", choices=("roomy", "default"), default="roomy")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.one:
        print(json.dumps(measure(*asked.one, asked.batch)))
        return
    table = Table(title=f"{best_device()}, batch {asked.batch}, malloc {asked.malloc}")
    for column in ("network", "parameters", "images/s", "private", "time ratio", "MiB", "private"):
        table.add_column(column, justify="left" if column == "network" else "right")
    for name in asked.model:
        table.add_row(*side_by_side(name, asked))
    Console().print(table)


def side_by_side(name: str, asked: argparse.Namespace) -> list[str]:
    """One network's line."""
    best: dict[str, dict[str, float]] = {}
    for _ in range(asked.repeat):
        for kind in PRIVACY:
            found = in_a_process(name, kind, asked)
            if kind not in best or found["rate"] > best[kind]["rate"]:
                best[kind] = found
    plain, private = best["plain"], best["private"]
    return [
        f"{name}, {SIDES[name]} pixels",
        f"{int(plain['parameters']):,}",
        f"{plain['rate']:.1f}",
        f"{private['rate']:.1f}",
        f"{plain['rate'] / private['rate']:.2f}",
        f"{plain['memory']:.0f}",
        f"{private['memory']:.0f}",
    ]


def in_a_process(name: str, kind: str, asked: argparse.Namespace) -> dict[str, float]:
    """What `measure` finds in a fresh process."""
    malloc = ROOMY_MALLOC if asked.malloc == "roomy" else {}
    command = [sys.executable, "-W", "ignore", __file__, "--one", name, kind]
    done = subprocess.run(
        [*command, "--batch", str(asked.batch)],
        env=os.environ | malloc,
        check=True,
        capture_output=True,
        text=True,
    )
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def measure(name: str, kind: str, batch: int) -> dict[str, float]:
    """Images a second over the best of a few rounds, and the peak memory in MiB."""
    torch.set_num_threads(1)
    text = RUN.format(model=name, side=SIDES[name], batch=batch, privacy=PRIVACY[kind])
    spec = parse_run_text(text, source="train").spec
    device = best_device()
    with tempfile.TemporaryDirectory() as scratch:
        write_cohort(Path(scratch) / "cohort", spec, images=batch, seed=1)
        trainer = LocalTrainer(
            spec,
            Cohort.open(Path(scratch) / "cohort"),
            declared_size=batch,  # sampling rate 1: every step sees `batch` images
            mechanism=accounting.planned(spec, batch),
            compute=Compute(device),
        )
        network = models.build(spec)
        weights = {n: p.detach().numpy().copy() for n, p in network.named_parameters()}
        before, seconds = peak_memory(device), []
        for number in range(1, 5):
            started = time.perf_counter()
            trainer.train(weights, number, Keystream.fresh())
            seconds.append(time.perf_counter() - started)
    return {
        "rate": spec.local.steps * batch / min(seconds[1:]),
        "memory": peak_memory(device) - before,
        "parameters": float(sum(array.size for array in weights.values())),
    }


def peak_memory(device: torch.device) -> float:
    """The peak so far, in MiB: of the device on CUDA, else of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / MIB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / MIB


if __name__ == "__main__":
    main()
