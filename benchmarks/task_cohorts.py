"""Cohorts of the benchmarks of tasks: real data, through the intake, split by patient.

Each function writes one cohort, whose images are marked ``train``, ``validation`` or ``test``. The
key of its pseudonyms is a constant: nobody is hidden by it, and the same files give the same
cohort, order and split included. The data is not part of the project.
"""

from __future__ import annotations

import hashlib
import re
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np

from client.intake.annotations import Annotation, read_annotations
from client.intake.keys import SiteKey
from client.intake.labels import LabelEntry, LabelTable
from client.intake.medmnist import MedMnist
from client.intake.nifti import NiftiPairs
from client.intake.pictures import Pictures
from client.intake.run import IntakeSummary, intake
from common.spec import RunSpec

KEY = SiteKey(hashlib.sha256(b"benchmarks/tasks.py").digest())
_TEST, _VALIDATION = 0.2, 0.1  # parts of the patients of what has no parts of its own
_OFFICIAL = {"train": "train", "val": "validation", "test": "test"}


def hippocampus(data: Path, scratch: Path, cohort: Path, spec: RunSpec) -> IntakeSummary:
    """Sagittal slices. A fifth of the patients is for the test, a tenth for validation.

    Volumes 2k - 1 and 2k are one patient's: see `benchmarks/hippocampus_pairs.py`.
    """
    folder = unpacked(data / "hippocampus" / "msd_task04_subset.zip", scratch / "hippocampus")
    names = sorted(path.name for path in (folder / "labels").glob("*.nii.gz"))
    patient = {name: (number_of(name) + 1) // 2 for name in names}
    split = splits(sorted(set(patient.values())))
    owners = {n: LabelEntry(0, split[patient[n]], 0, f"patient {patient[n]}") for n in names}
    images, labels = folder / "images", folder / "labels"
    return intake(NiftiPairs(images, labels, spec, KEY, "sagittal", owners), cohort, spec)


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


def pneumonia(data: Path, scratch: Path, cohort: Path, spec: RunSpec) -> IntakeSummary:
    """Chest X-rays with their labels, in their official parts; no patients, so by image."""
    return intake(MedMnist(data / "medmnist" / "pneumoniamnist.npz", spec, KEY), cohort, spec)


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
