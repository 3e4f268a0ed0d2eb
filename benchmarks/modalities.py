"""Two modalities by two encoders against either alone, on made-up patients of real films.

    python benchmarks/modalities.py                     # both, then each alone; seeds 1 2 3

PneumoniaMNIST has one film of each patient. Here two of its films are taken for one made-up
patient, the first called FRONTAL, the second LATERAL. Who has pneumonia shows it in one of the
two, drawn at random; the other is normal, as are both of who has none. So each modality holds half
of the evidence. Of every fourth patient one film is left out, whichever, and what is left shows
what there is. Films of the official training part become the sites', those of the test part the
evaluation's; no film is used twice. Nothing is chosen by the test part.

Compared is on the test patients who have both films, the same for all three: the encoder of one
modality sees one of theirs. The data is read from ``../shared/data/medmnist``, goes through
``cloister intake pictures``' own source, and three federated runs of 4 sites follow.
"""

from __future__ import annotations

import argparse
import csv
import re
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from rich.console import Console
from rich.table import Table

from client.intake.keys import SiteKey
from client.intake.pictures import Pictures
from client.intake.run import intake
from common.cohort import Cohort
from common.spec import RunSpec, read_run_file
from common.tasks import words
from common.tasks.estimates import Estimate
from common.tasks.metrics import Predictions, score
from deploy import simulation
from server.evaluation import CentralEvaluator
from server.rounds import LogObserver

HERE = Path(__file__).resolve().parent
DATA = HERE.parents[1] / "shared" / "data" / "medmnist" / "pneumoniamnist.npz"
MODALITIES = ("FRONTAL", "LATERAL")
PARTS = {"sites": "train", "evaluation": "test"}
ALONE_OF = 4  # every fourth patient has one film alone
PLAN = """
[simulation]
evaluation = "evaluation"
cohort = "sites"
partition = "iid"
sites = 4
declared_size = 200
"""


class Film(NamedTuple):
    """One line of the label table."""

    patient: str
    modality: str
    finding: int
    row: int


def main() -> None:
    """Make the patients, run, and print one line a run."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    asked = parser.parse_args()
    table = Table(title="AUROC (95 % interval) on test patients with both films, 4 sites")
    for column in ("seed", "modalities", "patients", "AUROC", "seconds"):
        table.add_column(column)
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch)
        make_cohorts(place)
        for seed in asked.seeds:
            for listed in (MODALITIES, *((name,) for name in MODALITIES)):
                began = time.perf_counter()
                count, found = run(place, listed, seed)
                seconds = f"{time.perf_counter() - began:.0f}"
                said = words.estimate(found)
                table.add_row(str(seed), " and ".join(listed), str(count), said, seconds)
    Console().print(table)


def patients(labels: NDArray[Any], part: str) -> Iterator[Film]:
    """Films put together to made-up patients, as many ill as well."""
    generator = np.random.default_rng(len(labels))
    healthy, ill = (list(generator.permutation(np.flatnonzero(labels == n))) for n in (0, 1))
    for number in range(len(healthy) // 3 * 2):
        finding = number % 2
        rows = [ill.pop() if finding else healthy.pop(), healthy.pop()]
        first = int(generator.integers(2))
        films = [
            Film(f"{part}{number}", MODALITIES[first ^ n], finding, row)
            for n, row in enumerate(rows)
        ]
        yield from films[:1] if number // 2 % ALONE_OF == 0 else films


def make_cohorts(place: Path) -> None:
    """The sites' and the evaluation's, by pictures and a label table."""
    (place / "run.toml").write_text((HERE / "modalities" / "both.toml").read_text() + PLAN)
    spec, key = read_run_file(place / "run.toml").spec, SiteKey.random()
    with np.load(DATA) as file:
        for name, part in PARTS.items():
            images, labels = file[f"{part}_images"], file[f"{part}_labels"].reshape(-1)
            write_pictures(place / f"{name}-pictures", images, list(patients(labels, part)), spec)
            folder = place / f"{name}-pictures"
            source = Pictures.of(folder, folder / "labels.csv", spec, key, split=part)
            intake(source, place / name, spec)


def write_pictures(folder: Path, images: NDArray[Any], films: list[Film], spec: RunSpec) -> None:
    """PNG files, and the table of what they are."""
    folder.mkdir()
    with (folder / "labels.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(("file", "label", "patient", "modality"))
        for film in films:
            Image.fromarray(images[film.row]).save(folder / f"{film.row}.png")
            label = spec.task.classes[film.finding]
            table.writerow((f"{film.row}.png", label, film.patient, film.modality))


def run(place: Path, listed: tuple[str, ...], seed: int) -> tuple[int, Estimate]:
    """One run; how many test patients have both films, and its AUROC on them."""
    text = (HERE / "modalities" / "both.toml").read_text()
    named = ", ".join(f'"{name}"' for name in listed)
    for key, value in (("seed", str(seed)), ("modalities", f"[{named}]")):
        text = re.sub(rf"^{key} = .*$", f"{key} = {value}", text, flags=re.M)
    run_file = place / "run.toml"
    run_file.write_text(text + PLAN)
    folder = simulation.prepare(run_file, place / "runs")
    simulation.simulate(folder, observer=LogObserver())
    spec = read_run_file(run_file).spec
    whole = Cohort.open(place / "evaluation")
    part = CentralEvaluator(spec, whole).parts["test"]
    known: dict[str, set[str]] = {who: set() for who in whole.patients}
    for row, modality in zip(whole.patient_index, whole.modalities, strict=True):
        known[whole.patients[row]].add(str(modality))
    both = np.array([known[part.patients[n]] == set(MODALITIES) for n in part.patient_index])
    with np.load(folder / "evaluation.npz", allow_pickle=False) as kept:
        predictions = Predictions(
            "binary",
            kept["probabilities"][both],
            kept["labels"][both],
            part.patient_index[both],
        )
    generator = np.random.default_rng(seed)
    return int(both.sum()), score(predictions, resamples=500, generator=generator).metrics["auroc"]


if __name__ == "__main__":
    main()
