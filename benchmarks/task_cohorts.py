"""Cohorts of the benchmarks of tasks: real data, through the intake, split by patient.

Each function writes one cohort, whose images are marked ``train``, ``validation`` or ``test``. The
key of its pseudonyms is a constant: nobody is hidden by it, and the same files give the same
cohort, order and split included. The data is not part of the project.

    python benchmarks/task_cohorts.py    # whose are the volumes of the hippocampus?
"""

from __future__ import annotations

import hashlib
import re
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import nibabel
import numpy as np

from client.intake.annotations import Annotation, read_annotations
from client.intake.keys import SiteKey
from client.intake.labels import LabelEntry, LabelTable
from client.intake.medmnist import MedMnist
from client.intake.nifti import NiftiPairs
from client.intake.pictures import Pictures
from client.intake.run import IntakeSummary, intake
from client.intake.source import Step
from common.cohort import Unit
from common.spec import Direction, RunSpec

KEY = SiteKey(hashlib.sha256(b"benchmarks/tasks.py").digest())
_TEST, _VALIDATION = 0.2, 0.1  # parts of the patients of what has no parts of its own
_OFFICIAL = {"train": "train", "val": "validation", "test": "test"}


def hippocampus(data: Path, scratch: Path, cohort: Path, spec: RunSpec) -> IntakeSummary:
    """Sagittal slices, or volumes. A fifth of the patients is for the test, a tenth for validation.

    Volumes 2k - 1 and 2k are taken for one patient's: see `pairs`.
    """
    folder = unpacked(data / "hippocampus" / "msd_task04_subset.zip", scratch / "hippocampus")
    names = sorted(path.name for path in (folder / "labels").glob("*.nii.gz"))
    patient = {name: (number_of(name) + 1) // 2 for name in names}
    split = splits(sorted(set(patient.values())))
    owners = {n: LabelEntry(0, split[patient[n]], 0, f"patient {patient[n]}") for n in names}
    images, labels = folder / "images", folder / "labels"
    cut: Direction | None = None if spec.input.depth else "sagittal"
    return intake(NiftiPairs(images, labels, spec, KEY, cut, owners), cohort, spec)


def bccd(data: Path, scratch: Path, cohort: Path, spec: RunSpec) -> IntakeSummary:
    """Blood smears with VOC's boxes, in their official parts; no patients, so by image."""
    folder = unpacked(data / "bccd" / "bccd.zip", scratch / "bccd") / "BCCD"
    split = {
        f"{name}.jpg": ours
        for theirs, ours in _OFFICIAL.items()
        for name in (folder / "ImageSets" / "Main" / f"{theirs}.txt").read_text().split()
    }
    read = read_annotations(folder / "Annotations", spec.task)
    entries = {
        name: replace(entry, split=split[name])
        for name, entry in read.entries.items()
        if isinstance(entry, Annotation)
    }
    table = LabelTable(read.source, read.key, entries)
    return intake(Pictures(folder / "JPEGImages", table, spec, KEY), cohort, spec)


def pneumonia(
    data: Path, scratch: Path, cohort: Path, spec: RunSpec, *, fewer: int | None = None
) -> IntakeSummary:
    """Chest X-rays with their labels, in their official parts; no patients, so by image.

    `fewer` images of the training part are drawn, if that is given, and all of the others.
    """
    source = MedMnist(data / "medmnist" / "pneumoniamnist.npz", spec, KEY)
    return intake(source if fewer is None else Drawn(source, fewer), cohort, spec)


@dataclass
class Drawn:
    """A source of which some training images are drawn, always the same for a number of them."""

    source: MedMnist
    training: int
    kind: str = "medmnist, drawn"
    unit: Unit = "image"

    def __len__(self) -> int:
        return len(self.source)

    def steps(self) -> Iterator[Step]:
        """See `Source`."""
        steps = list(self.source.steps())
        places = [n for n, step in enumerate(steps) if step.images[0].record.split == "train"]
        chosen = set(np.random.default_rng(0).permutation(places)[: self.training].tolist())
        dropped = set(places) - chosen
        yield from (step for n, step in enumerate(steps) if n not in dropped)


def splits(patients: list[int]) -> dict[int, str]:
    """The split of each patient: of a permutation that is always the same, first the test's."""
    order = np.random.default_rng(0).permutation(len(patients))
    test, validation = (round(part * len(patients)) for part in (_TEST, _TEST + _VALIDATION))
    names = ["test"] * test + ["validation"] * (validation - test)
    names += ["train"] * (len(patients) - validation)
    return {patients[place]: name for place, name in zip(order, names, strict=True)}


def number_of(name: str) -> int:
    """The number in the name of a volume, such as 3 of ``hippocampus_003.nii.gz``.

    Raises:
        ValueError: if there is none.
    """
    found = re.search(r"_(\d+)\.", name)
    if found is None:
        raise ValueError(f"{name}: expected a name such as hippocampus_003.nii.gz")
    return int(found[1])


def unpacked(archive: Path, folder: Path) -> Path:
    """The archive's files below `folder`, unpacked once."""
    if not folder.exists():
        half = folder.with_name(f"{folder.name}.half")
        with zipfile.ZipFile(archive) as file:
            file.extractall(half)
        half.rename(folder)
    return folder


def pairs(folder: Path) -> dict[str, tuple[int, float]]:
    """How alike two volumes of the hippocampus are whose numbers follow each other.

    Brightness has no unit in MR, and its scale is that of one scan: two crops of one scan share it.

    Returns:
        For 2k - 1 and 2k, and as a control for 2k and 2k + 1: how many such pairs there are, and
        the correlation of the logarithms of their median brightness.
    """
    level = {
        number_of(path.name): float(
            np.log(np.median(np.asarray(nibabel.Nifti1Image.from_filename(path).dataobj)))
        )
        for path in sorted((folder / "images").glob("*.nii.gz"))
    }
    found = {}
    for name, odd in (("2k - 1 and 2k", 1), ("2k and 2k + 1", 0)):
        both = [(level[n], level[n + 1]) for n in level if n % 2 == odd and n + 1 in level]
        found[name] = len(both), float(np.corrcoef(np.array(both).T)[0, 1])
    return found


if __name__ == "__main__":
    data = Path(__file__).resolve().parents[2] / "shared" / "data"
    with tempfile.TemporaryDirectory() as scratch:
        archive = data / "hippocampus" / "msd_task04_subset.zip"
        for name, (count, alike) in pairs(unpacked(archive, Path(scratch) / "volumes")).items():
            print(f"volumes {name}: {count} pairs, correlation {alike:.4f}")
