"""Studies in the place of images: several images of a study for one decision.

A row is a study of one patient: where a source names none, all images of a patient are one. It
has as many places as the run's file says (``input.images``). A study with fewer images leaves
places empty; of one with more, training draws which are seen, each time anew, and evaluation takes
them evenly spaced. A place without an image is NaN throughout, which no stored pixel can be.

With ``input.together = "patient"`` a row is a whole patient: CT and MR mostly are two studies.

**Modalities.** With ``input.modalities`` a row has that many places *for each*, those of the first
one in front. Each modality's images are chosen by themselves, so that forty slices of CT leave a
single radiograph its place. A study without one of them is no error: its places are NaN. An image
of no listed modality is not there at all (`seen_by`): it is not seen, decides no label, and a
patient who has no other image is not in the rows. Whether a patient is, follows from that
patient's record alone, so the sampling of the others stays as it is (docs/privacy.md 2).

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
from common.spec import Input, RunSpec

log = logging.getLogger("cloister.studies")

ABSENT = -1


class Studies(Cohort):
    """A view of a cohort whose rows are studies; all numbers of rows are numbers of studies.

    Args:
        cohort: the images, all of `modalities` if there are any.
        places: images that one study has room for, of each modality.
        modalities: in the order of their places; none: all images are alike.
        together: what a row is, ``study`` or ``patient``.
    """

    def __init__(
        self,
        cohort: Cohort,
        places: int,
        modalities: tuple[str, ...] = (),
        together: str = "study",
    ) -> None:
        super().__init__(cohort.path, cohort.meta, cohort._index, cohort._rows, cohort._seal)
        self.places = places
        self.asked = modalities
        self.together = together
        self._whole = cohort
        of = self.patient_index if together == "patient" else self.study_index
        _, first, study = np.unique(of, return_index=True, return_inverse=True)
        self._order = np.argsort(study, kind="stable").astype(np.int64)
        self._starts = np.searchsorted(study[self._order], np.arange(len(first) + 1))
        self._study = study.astype(np.int64)
        self.labels = _labels(self.kind, self.labels, self._study, len(self.classes))
        self.patient_index = self.patient_index[first]
        self.splits = self.splits[first]

    def __len__(self) -> int:
        return len(self.patient_index)

    def __repr__(self) -> str:
        rows = f"{len(self)} studies of " if self.together == "study" else ""
        return f"Studies({str(self.path)!r}, {rows}{len(self.patients)} patients)"

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self._whole, self.places, self.asked, self.together)

    @property
    def row_shape(self) -> tuple[int, ...]:
        """(places of all modalities, channels, height, width)."""
        return self.places * max(1, len(self.asked)), *self.shape

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

        Of each modality they are ascending, and `ABSENT` behind them; `images` and `targets` take
        them.
        """
        owned = [self._by_modality(int(row)) for row in rows]
        return self._placed([[_some(of, self.places, below) for of in each] for each in owned])

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
        if wanted.ndim == 1:
            return np.asarray(self.labels[wanted])
        return np.asarray(self.labels[self._study[wanted.max(axis=1)]])  # any that is there

    def chosen(self, rows: Rows) -> NDArray[np.int64]:
        """(N, places) the numbers of the images that `images` reads."""
        wanted = np.asarray(rows, dtype=np.int64)
        if wanted.ndim != 1:
            return wanted
        owned = [self._by_modality(int(row)) for row in wanted]
        return self._placed([[of[spaced(len(of), self.places)] for of in each] for each in owned])

    def _by_modality(self, study: int) -> list[NDArray[np.int64]]:
        """Its images of each modality, where none is asked for all in one; some may be empty."""
        images = self.images_of(study)
        if not self.asked:
            return [images]
        of = self._whole.modalities[images]
        return [images[of == name] for name in self.asked]

    def _placed(self, chosen: list[list[NDArray[np.int64]]]) -> NDArray[np.int64]:
        placed = np.full((len(chosen), self.row_shape[0]), ABSENT, dtype=np.int64)
        for row, each in zip(placed, chosen, strict=True):
            for number, images in enumerate(each):
                start = number * self.places
                row[start : start + len(images)] = images
        return placed

    def _view(self, mask: NDArray[np.bool_]) -> Self:
        whole = self._whole._view(mask[self._study])
        return type(self)(whole, self.places, self.asked, self.together)


def seen_by(spec: RunSpec, cohort: Cohort) -> Cohort:
    """The images of `cohort` that a run sees: those of its modalities, or all if it names none."""
    if not spec.input.modalities or isinstance(cohort, Studies):
        return cohort
    return cohort._view(np.isin(cohort.modalities, np.asarray(spec.input.modalities)))


def rows_for(spec: RunSpec, cohort: Cohort) -> Cohort:
    """`cohort` as a run takes it: studies where it asks for several images, else itself."""
    seen = spec.input
    if not seen.of_studies or isinstance(cohort, Studies):
        return cohort
    listed = seen_by(spec, cohort)
    if left := len(cohort) - len(listed):
        log.warning(
            "%d of %d images are of none of %s, and not seen; patients who have no other: %d",
            left,
            len(cohort),
            ", ".join(seen.modalities),
            len(cohort.patients) - len(listed.patients),
        )
    studies = Studies(listed, seen.images, seen.modalities, seen.together)
    if len(studies.contradictory):
        log.warning(
            "%d of %d %s have images of different classes; each counts as the class that "
            "most of its images have",
            len(studies.contradictory),
            len(studies),
            _named(studies),
        )
    return studies


def in_words(seen: Input) -> str:
    """What one decision is about, for who has to judge a run; empty where it is one image."""
    if not seen.of_studies:
        return ""
    each = f"up to {seen.images} " if seen.images > 1 else "one "
    if not seen.modalities:
        return f"one decision is about {each}images of a {seen.together}"
    images = "images" if seen.images > 1 else "image"
    return (
        f"one decision is about a {seen.together}: {each}{images} of each of "
        f"{', '.join(seen.modalities)}, with an encoder for each; one that is absent is left out"
    )


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
        f"{cohort.path}: {len(cohort.contradictory)} of {len(cohort)} {_named(cohort)} have images "
        f"of different classes, one of patient {cohort.patients[cohort.patient_index[study]]} has "
        f"{' and '.join(names)}; expected one class a {cohort.together}: correct the labels and "
        "take in again, or ask for a multilabel task"
    )


def _named(studies: Studies) -> str:
    return "studies" if studies.together == "study" else "patients"


def spaced(count: int, most: int) -> NDArray[np.int64]:
    """At most `most` of the numbers below `count`, evenly spaced from the first to the last.

    One alone is that in the middle.
    """
    if most == 1:
        return np.array([(count - 1) // 2])[:count]
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
