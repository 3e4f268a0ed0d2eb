"""From images to answers: the network, batch by batch, and its probabilities calibrated."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, cast

import numpy as np
import torch
from numpy.typing import NDArray

from client.prediction.rows import Seen
from common.calibration import Calibration
from common.cohort import PIXEL_MAX
from common.errors import PackageError
from common.package import Package
from common.spec import Input
from common.studies import spaced
from common.tasks import task_for
from common.tasks.answers import Answer
from common.tasks.preprocess import normalise
from common.tasks.task import Task

_BATCH_PIXELS = 1 << 21
_MOST_IMAGES = 64


Likeness = dict[str, Any]
"""Of one image: its ``patient``, and by method how like its map is to that of random weights."""


class Drawn(NamedTuple):
    """What moved an answer: a PNG, the class that it explains, and the methods from left on.

    Of the first images ``likeness`` says how much of it was learned.
    """

    png: bytes
    explains: str
    methods: tuple[str, ...]
    likeness: Likeness | None = None


class Pictures(Protocol):
    """Makes what moved answers.

    Attributes:
        compared: how many images have a likeness by now.
    """

    compared: int

    def __call__(
        self, images: NDArray[np.float32], answers: Sequence[Answer], patients: Sequence[str]
    ) -> Sequence[Drawn | None]:
        """Of images, (N, channels, height, width) in 0..1, their answers, and whose they are.

        None for what cannot be explained; that costs no answer.
        """

    def of_study(
        self, images: NDArray[np.float32], answer: Answer, patient: str
    ) -> Sequence[Drawn | None]:
        """As a call, for the images of a study that are in one decision, which is `answer`."""

    def examined(self, likeness: Sequence[Likeness]) -> Mapping[str, Any]:
        """What is said of the methods themselves, once all is answered; by method."""


class Answered(NamedTuple):
    """An answer, its calibrated probabilities, and what moved it; the last two may be missing."""

    answer: Answer
    calibrated: NDArray[np.float64] | None
    picture: Drawn | None


class Decided(NamedTuple):
    """A decision from several images of a study.

    Attributes:
        answered: the decision; it has no picture.
        seen: numbers of the images that are in it.
        weights: (seen,) what the network's attention gave each; of each modality they add up to 1.
        pictures: of each what moved the decision; None for none.
    """

    answered: Answered
    seen: tuple[int, ...]
    weights: NDArray[np.float32]
    pictures: tuple[Drawn | None, ...]


@dataclass
class Model:
    """A trained model at work.

    Args:
        package: that it is of.

    Raises:
        PackageError: if it says nothing of single images, or its weights cannot be used.
    """

    package: Package

    def __post_init__(self) -> None:
        spec = self.package.spec
        self.task: Task = task_for(spec)
        reason = self.task.without_answers()
        if spec.input.of_studies and spec.input.together != "study":
            reason = (
                'its run says input.together = "patient", and a source seldom has all studies of '
                'one: train a model with "study"'
            )
        if reason:
            raise PackageError(f"{self.package.path}: {reason}; it cannot be used by predict")
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.network = self.package.network().to(self.device)

    @property
    def calibration(self) -> Calibration | None:
        """By which its probabilities are put right."""
        return self.package.calibration

    def answers(
        self,
        seen: Iterable[tuple[Seen, NDArray[np.uint16]]],
        pictures: Pictures | None = None,
    ) -> Iterator[tuple[Seen, Answered]]:
        """Answers in the order of the images, a batch at a time.

        Args:
            seen: of each image whose it is, and its pixels as a cohort stores them.
            pictures: makes what moved an answer; None for none.
        """
        shape = self.package.spec.input.shape
        most = max(1, min(_MOST_IMAGES, _BATCH_PIXELS // int(np.prod(shape))))
        if self.package.spec.input.depth is not None:
            most = 1  # of a volume the network holds each layer in three dimensions
        images = iter(seen)
        while batch := list(itertools.islice(images, most)):
            names, pixels = zip(*batch, strict=True)
            patients = [one.named.patient for one in names]
            answered = self._batch(np.stack(pixels), pictures, patients)
            yield from zip(names, answered, strict=True)

    def decision(
        self,
        pixels: NDArray[np.uint16],
        modalities: Sequence[str],
        patient: str,
        pictures: Pictures | None = None,
    ) -> Decided | None:
        """The one answer of a study; of too many images it sees some, evenly spaced.

        Args:
            pixels: (N, channels, height, width) of its images, as a cohort stores them.
            modalities: N, of which those that the run does not list are not seen.
            patient: whose it is.
            pictures: makes what moved the answer; None for none.

        Returns:
            None if it has no image to be seen.
        """
        seen = self.package.spec.input
        chosen, places = _placed(modalities, seen)
        if not len(chosen):
            return None
        images = np.divide(pixels[chosen], np.float32(PIXEL_MAX), dtype=np.float32)
        placed = np.full((1, seen.places, *seen.shape), np.nan, dtype=np.float32)
        placed[0, places] = images
        inputs = torch.from_numpy(placed).to(self.device)
        with torch.no_grad():
            outputs, weights = cast(Any, self.network).attended(normalise(inputs, seen))
            (answer,) = self.task.answers(outputs.float(), inputs)
        drawn: Sequence[Drawn | None] = [None] * len(chosen)
        if pictures is not None and answer.finite:
            drawn = pictures.of_study(images, answer, patient)
        return Decided(
            Answered(answer, self._calibrated(answer), None),
            tuple(chosen.tolist()),
            weights[0].float().cpu().numpy()[places],
            tuple(drawn),
        )

    def _batch(
        self, pixels: NDArray[np.uint16], pictures: Pictures | None, patients: Sequence[str]
    ) -> list[Answered]:
        images = np.divide(pixels, np.float32(PIXEL_MAX), dtype=np.float32)
        inputs = torch.from_numpy(images).to(self.device)
        with torch.no_grad():
            answers = self.task.answers(self.task.through(self.network, inputs).float(), inputs)
        drawn = None if pictures is None else pictures(images, answers, patients)
        return [
            Answered(answer, self._calibrated(answer), None if drawn is None else drawn[row])
            for row, answer in enumerate(answers)
        ]

    def _calibrated(self, answer: Answer) -> NDArray[np.float64] | None:
        if self.calibration is None or answer.probabilities is None or not answer.finite:
            return None
        calibrated: NDArray[np.float64] = self.calibration(answer.probabilities[None])[0]
        return calibrated


def _placed(modalities: Sequence[str], seen: Input) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Numbers of the images that are seen, and of the places in which they are."""
    of, known = np.array(modalities), seen.modalities
    groups = [np.flatnonzero(of == name) for name in known] if known else [np.arange(len(of))]
    some = [each[spaced(len(each), seen.images)] if len(each) else each for each in groups]
    places = [number * seen.images + np.arange(len(each)) for number, each in enumerate(some)]
    return np.concatenate(some), np.concatenate(places)
