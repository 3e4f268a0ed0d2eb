"""Studies in the place of images: several images of a study for one decision.

A row is a study of one patient: where a source names none, all images of a patient are one. It
has as many places as the run's file says (``input.images``). A study with fewer images leaves
places empty; of one with more, training draws which are seen, each time anew, and evaluation takes
them evenly spaced. A place without an image is NaN throughout, which no stored pixel can be.

**Labels.** A study has a finding (``binary``, ``multilabel``) if one of its images has it. Of
``multiclass`` labels only one can be right, and all images of a study must have the same. That is
what an operator's evaluation cohort is held to (`check`). A site's training cohort is not: whether
a node answers must not depend on its patients (docs/privacy.md 5), so a study whose images differ
has the class that most of them have, the first of equals, and the node's own log says how many.
"""

from __future__ import annotations

import logging
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from common.cohort import Cohort, Draw, Rows
from common.errors import CohortError
from common.spec import RunSpec

log = logging.getLogger("cloister.studies")

ABSENT = -1


class Studies(Cohort):
    """A view of a cohort whose rows are studies; all numbers of rows are numbers of studies.

    Args:
        cohort: the images.
        places: images that one study has room for.
    """

    def __init__(self, cohort: Cohort, places: int) -> None:
        super().__init__(cohort.path, cohort.meta, cohort._index, cohort._rows, cohort._seal)
        self.places = places
        self._whole = cohort
        _, first, study = np.unique(self.study_index, return_index=True, return_inverse=True)
        self._order = np.argsort(study, kind="stable").astype(np.int64)
        self._starts = np.searchsorted(study[self._order], np.arange(len(first) + 1))
        self._study = study.astype(np.int64)
        self.labels = _labels(self.kind, self.labels, self._study, len(self.classes))
        self.patient_index = self.patient_index[first]
        self.splits = self.splits[first]

    def __len__(self) -> int:
        return len(self.patient_index)

    def __repr__(self) -> str:
        return f"Studies({str(self.path)!r}, {len(self)} studies of {len(self.patients)} patients)"

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self._whole, self.places)

    @property
    def row_shape(self) -> tuple[int, ...]:
        """(places, channels, height, width)."""
        return self.places, *self.shape

    @property
    def contradictory(self) -> NDArray[np.int64]:
        """Numbers of the studies whose images have different classes where one is right."""
        if self.kind != "multiclass":
            return np.zeros(0, dtype=np.int64)
        differ = self._whole.labels != self.labels[self._study]
        return np.unique(self._study[differ])

    def images_of(self, study: int) -> NDArray[np.int64]:
        """Numbers of a study's images in the cohort of images, ascending; never empty."""
        return self._order[self._starts[study] : self._starts[study + 1]]

    def drawn(self, rows: Rows, below: Draw) -> NDArray[np.int64]:
        """(N, places) for each study numbers of its images, at random where it has too many.

        They are ascending, and `ABSENT` behind them; `images` and `targets` take them.
        """
        owned = [self.images_of(int(row)) for row in rows]
        return self._placed([_some(images, self.places, below) for images in owned])

    def images(self, rows: Rows) -> NDArray[np.float32]:
        """(N, places, channels, height, width) in 0..1, NaN where there is no image.

        Args:
            rows: (N,) studies, whose images are taken evenly spaced, or what `drawn` gave.
        """
        chosen = self.chosen(rows)
        there = chosen != ABSENT
        found = np.full((*chosen.shape, *self.shape), np.nan, dtype=np.float32)
        found[there] = self._whole.images(chosen[there])
        return found

    def targets(self, rows: Rows) -> NDArray[Any]:
        """The labels of studies; `rows` as for `images`."""
        wanted = np.asarray(rows, dtype=np.int64)
        return np.asarray(self.labels[wanted if wanted.ndim == 1 else self._study[wanted[:, 0]]])

    def chosen(self, rows: Rows) -> NDArray[np.int64]:
        """(N, places) the numbers of the images that `images` reads."""
        wanted = np.asarray(rows, dtype=np.int64)
        if wanted.ndim != 1:
            return wanted
        owned = [self.images_of(int(row)) for row in wanted]
        return self._placed([images[spaced(len(images), self.places)] for images in owned])

    def _placed(self, chosen: list[NDArray[np.int64]]) -> NDArray[np.int64]:
        placed = np.full((len(chosen), self.places), ABSENT, dtype=np.int64)
        for row, images in zip(placed, chosen, strict=True):
            row[: len(images)] = images
        return placed

    def _view(self, mask: NDArray[np.bool_]) -> Self:
        return type(self)(self._whole._view(mask[self._study]), self.places)


def rows_for(spec: RunSpec, cohort: Cohort) -> Cohort:
    """`cohort` as a run takes it: studies where it asks for several images, else itself."""
    if spec.input.images == 1 or isinstance(cohort, Studies):
        return cohort
    studies = Studies(cohort, spec.input.images)
    if len(studies.contradictory):
        log.warning(
            "%d of %d studies have images of different classes; each counts as the class that "
            "most of its images have",
            len(studies.contradictory),
            len(studies),
        )
    return studies


def check(cohort: Cohort) -> None:
    """Refuse studies whose images have different classes where only one is right.

    Raises:
        CohortError: naming how many there are, and one of them.
    """
    if not isinstance(cohort, Studies) or not len(cohort.contradictory):
        return
    study = int(cohort.contradictory[0])
    names = sorted({cohort.classes[n] for n in cohort._whole.labels[cohort.images_of(study)]})
    raise CohortError(
        f"{cohort.path}: {len(cohort.contradictory)} of {len(cohort)} studies have images of "
        f"different classes, one of patient {cohort.patients[cohort.patient_index[study]]} has "
        f"{' and '.join(names)}; expected one class a study: correct the labels and take in again, "
        "or ask for a multilabel task"
    )


def spaced(count: int, most: int) -> NDArray[np.int64]:
    """At most `most` of the numbers below `count`, evenly spaced from the first to the last.

    One alone is that in the middle.
    """
    if most == 1:
        return np.array([(count - 1) // 2])
    return np.unique(np.linspace(0, count - 1, min(count, most)).round().astype(np.int64))


def _some(images: NDArray[np.int64], most: int, below: Draw) -> NDArray[np.int64]:
    """At most `most` of them, every choice as likely as any other (Fisher and Yates)."""
    if len(images) <= most:
        return images
    shuffled = images.copy()
    places = np.arange(most, dtype=np.int64)
    for place, ahead in zip(places, below(len(images) - places), strict=True):
        shuffled[[place, place + ahead]] = shuffled[[place + ahead, place]]
    return np.sort(shuffled[:most])


def _labels(
    kind: str, labels: NDArray[Any], study: NDArray[np.int64], classes: int
) -> NDArray[Any]:
    """The label of each study; see the text of this module."""
    count = int(study.max(initial=-1)) + 1
    if kind == "multiclass":
        votes = np.zeros((count, classes), dtype=np.int64)
        np.add.at(votes, (study, labels), 1)
        return np.asarray(votes.argmax(axis=1))
    found = np.zeros((count, *labels.shape[1:]), dtype=labels.dtype)
    np.maximum.at(found, study, labels)
    return found
