"""PneumoniaMNIST federated over 4 IID sites, with and without differential privacy.

    python benchmarks/pneumonia.py                      # all settings, seeds 1 2 3
    python benchmarks/pneumonia.py --setting eps3 --seeds 1

Each run trains on the official training part, split evenly by image, and is evaluated once, on
the official test part, with the averaged model of its last round: nothing is chosen by the test
part. The file names no patients, so the unit of privacy is the image. Settings stand in
``benchmarks/pneumonia/*.toml``; the data is read from ``../shared/data/medmnist``.
"""

from __future__ import annotations

import argparse
import json
import re
import tempfile
import time
from pathlib import Path
from statistics import mean

from rich.console import Console
from rich.table import Table

from client.intake.keys import SiteKey
from client.intake.medmnist import MedMnist, Part
from client.intake.run import intake
from common.spec import read_run_file
from deploy import simulation
from server.rounds import LogObserver

HERE = Path(__file__).resolve().parent
DATA = HERE.parents[1] / "shared" / "data" / "medmnist" / "pneumoniamnist.npz"
TARGETS = {"none": 0.955, "eps3": 0.945, "eps1": 0.92}

PLAN = """
[simulation]
evaluation = "test"
cohort = "train"
partition = "iid"
sites = 4
declared_size = 1177
"""


def main() -> None:
    """Run the settings and print one line each."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--setting", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--settings-folder", type=Path, default=HERE / "pneumonia")
    asked = parser.parse_args()
    console = Console()
    table = Table(title=f"PneumoniaMNIST, 4 IID sites, test AUC of seeds {asked.seeds}")
    for column in ("setting", "epsilon", "AUC by seed", "mean", "target", "seconds a run"):
        table.add_column(column)
    with tempfile.TemporaryDirectory() as scratch:
        for setting in asked.setting:
            text = (asked.settings_folder / f"{setting}.toml").read_text()
            found = [run(Path(scratch), text, seed) for seed in asked.seeds]
            console.print(setting, found)
            table.add_row(setting, *summary(found, TARGETS[setting]))
    console.print(table)


def run(scratch: Path, text: str, seed: int) -> dict[str, float | None]:
    """One run; its test AUC, the largest epsilon of a site, and its seconds."""
    run_file = scratch / "run.toml"
    run_file.write_text(re.sub(r"^seed = \d+$", f"seed = {seed}", text, flags=re.M) + PLAN)
    part: Part
    for name, part in (("train", "train"), ("test", "test")):
        if not (scratch / name).exists():
            spec = read_run_file(run_file).spec
            intake(MedMnist(DATA, spec, SiteKey.random(), (part,)), scratch / name, spec)
    started = time.perf_counter()
    folder = simulation.prepare(run_file, scratch / "runs")
    simulation.simulate(folder, observer=LogObserver())
    last = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    sites = json.loads((folder / "privacy.json").read_text())["sites"].values()
    spent = [site["epsilon"] for site in sites if site["epsilon"] is not None]
    return {
        "auc": last["evaluation"]["test"]["metrics"]["auroc"]["value"],
        "epsilon": max(spent) if spent else None,
        "seconds": time.perf_counter() - started,
    }


def summary(found: list[dict[str, float | None]], target: float) -> tuple[str, ...]:
    """The cells of one setting's line."""
    areas = [one["auc"] or 0.0 for one in found]
    spent = [one["epsilon"] for one in found if one["epsilon"] is not None]
    verdict = "met" if mean(areas) >= target else "not met"
    return (
        f"{max(spent):.3f}" if spent else "no privacy",
        " ".join(f"{area:.4f}" for area in areas),
        f"{mean(areas):.4f}",
        f"{target} {verdict}",
        f"{mean(one['seconds'] or 0.0 for one in found):.0f}",
    )


if __name__ == "__main__":
    main()
