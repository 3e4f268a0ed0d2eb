"""From images to answers: the network, batch by batch, and its probabilities calibrated."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from client.prediction.rows import Seen
from common.calibration import Calibration
from common.cohort import PIXEL_MAX
from common.errors import PackageError
from common.package import Package
from common.tasks import task_for
from common.tasks.answers import Answer
from common.tasks.preprocess import normalise
from common.tasks.task import Task

_BATCH_PIXELS = 1 << 21
_MOST_IMAGES = 64


class Drawn(NamedTuple):
    """What moved an answer: a PNG, the class that it explains, and the methods from left on."""

    png: bytes
    explains: str
    methods: tuple[str, ...]


class Pictures(Protocol):
    """Makes what moved answers."""

    def __call__(
        self, images: NDArray[np.float32], answers: Sequence[Answer], patients: Sequence[str]
    ) -> Sequence[Drawn | None]:
        """Of images, (N, channels, height, width) in 0..1, their answers, and whose they are.

        None for what cannot be explained; that costs no answer.
        """

    def examined(self) -> Mapping[str, Any]:
        """What is said of the methods themselves, once all is answered; by method."""


class Answered(NamedTuple):
    """An answer, its calibrated probabilities, and what moved it; the last two may be missing."""

    answer: Answer
    calibrated: NDArray[np.float64] | None
    picture: Drawn | None


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
        self.task: Task = task_for(self.package.spec)
        reason = self.task.without_answers()
        if self.package.spec.input.images > 1:
            reason = "it takes several images of a study at once"
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
        size = int(np.prod(self.package.spec.input.shape))
        most = max(1, min(_MOST_IMAGES, _BATCH_PIXELS // size))
        images = iter(seen)
        while batch := list(itertools.islice(images, most)):
            names, pixels = zip(*batch, strict=True)
            patients = [one.named.patient for one in names]
            answered = self._batch(np.stack(pixels), pictures, patients)
            yield from zip(names, answered, strict=True)

    def _batch(
        self, pixels: NDArray[np.uint16], pictures: Pictures | None, patients: Sequence[str]
    ) -> list[Answered]:
        images = np.divide(pixels, np.float32(PIXEL_MAX), dtype=np.float32)
        inputs = torch.from_numpy(images).to(self.device)
        rows = normalise(inputs, self.package.spec.input)
        with torch.no_grad():
            outputs = self.network(rows).float()
            answers = self.task.answers(outputs, inputs)
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
