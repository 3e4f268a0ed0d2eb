"""What is in a cohort, in figures, and what a person should look at before a run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from common.cohort import Cohort, Unit

_LARGE_SHARE = 0.5


@dataclass(frozen=True)
class ClassCount:
    """A class, the images that have it and their patients."""

    name: str
    images: int
    patients: int


@dataclass(frozen=True)
class CohortSummary:
    """Exact figures of a cohort. They are patient data: they stay with the hospital.

    Attributes:
        images_a_patient: fewest, mean, most; zeros for an empty cohort.
        splits: images by split.
        modalities: images by modality; empty where nothing named one.
        warnings: what a person should settle before a run, in sentences.
    """

    source: str
    unit: Unit
    images: int
    patients: int
    classes: tuple[ClassCount, ...]
    images_a_patient: tuple[int, float, int]
    splits: Mapping[str, int]
    modalities: Mapping[str, int]
    warnings: tuple[str, ...]


def summarise(cohort: Cohort) -> CohortSummary:
    """Count what is in a cohort."""
    counts = np.bincount(cohort.patient_index, minlength=len(cohort.patients))
    classes = tuple(_classes(cohort))
    return CohortSummary(
        source=cohort.meta.source,
        unit=cohort.unit,
        images=len(cohort),
        patients=len(cohort.patients),
        classes=classes,
        images_a_patient=_spread(counts),
        splits=_counted(cohort.splits),
        modalities=_counted(cohort.modalities[cohort.modalities != ""]),
        warnings=tuple(_warnings(cohort, classes, counts)),
    )


def _classes(cohort: Cohort) -> Iterator[ClassCount]:
    for name, has in zip(cohort.classes, cohort.present().T, strict=True):
        yield ClassCount(name, int(has.sum()), len(np.unique(cohort.patient_index[has])))


def _counted(names: NDArray[np.str_]) -> dict[str, int]:
    known, numbers = np.unique(names, return_counts=True)
    return {str(name): int(number) for name, number in zip(known, numbers, strict=True)}


def _spread(counts: NDArray[np.int64]) -> tuple[int, float, int]:
    if not counts.size:
        return 0, 0.0, 0
    return int(counts.min()), float(counts.mean()), int(counts.max())


def _warnings(
    cohort: Cohort, classes: tuple[ClassCount, ...], counts: NDArray[np.int64]
) -> Iterator[str]:
    if not len(cohort):
        yield "The cohort is empty: a node with it would train on nothing and release noise."
        return
    present = [count.name for count in classes if count.images]
    if cohort.kind in ("binary", "multiclass") and len(present) == 1:
        yield f"All images are of one class, {present[0]!r}: nothing can be learned from them."
    absent = [count.name for count in classes if not count.images]
    if absent and (len(present) != 1 or cohort.kind not in ("binary", "multiclass")):
        yield f"No image of {', '.join(map(repr, absent))}."
    if cohort.unit == "image":
        yield (
            "The source names no patients: the unit is the image, and that is all that "
            "differential privacy can protect here."
        )
        return
    if counts.max() > _LARGE_SHARE * len(cohort) and len(counts) > 1:
        yield (
            f"One patient has {counts.max()} of {len(cohort)} images: is that identifier a "
            "person's, or a placeholder?"
        )
    yield from _split_warnings(cohort)
    yield from _modality_warnings(cohort)


def _split_warnings(cohort: Cohort) -> Iterator[str]:
    pairs = np.unique(np.stack([cohort.patient_index, _codes(cohort.splits)]), axis=1)
    several = int((np.bincount(pairs[0]) > 1).sum())
    if several:
        yield (
            f"{several} patients have images in more than one split: an evaluation on one part "
            "would know patients of the other."
        )


def _modality_warnings(cohort: Cohort) -> Iterator[str]:
    absent = [name for name in cohort.meta.modalities if name not in cohort.modalities]
    if absent:
        yield f"No image of the modality {', '.join(map(repr, absent))}."


def _codes(values: NDArray[np.str_]) -> NDArray[np.int64]:
    return np.unique(values, return_inverse=True)[1].astype(np.int64)
