"""What a task is: the one seam between the house and what is learned.

A task knows how images and their targets become what a network sees, what one image's loss is,
what a network's answer is worth, and what a report shows of it. Trainer, evaluator, record, card
and report call what stands here, and know no task by name.

How an image flows. In training: a cohort's `images` and `targets`, augmented (`Task.moved` moves
the targets along), turned into rows for the network (`Task.examples`), normalised, through the
network (`Task.private` says which part of it learns from patients), one loss a row
(`Task.losses`). In evaluation: `Task.evidence` makes arrays of numbers for each image, which the
run's folder keeps; `Task.score` makes metrics of them and `Task.exhibits` what a person looks at,
both from the arrays alone, so that a report can be written again from the folder.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from common.cohort import Cohort
from common.errors import ModelError
from common.spec import RunSpec
from common.tasks import explained
from common.tasks.answers import Answer
from common.tasks.augment import Motion
from common.tasks.estimates import Estimate
from common.tasks.exhibits import Exhibit
from common.tasks.preprocess import normalise

Evidence = Mapping[str, NDArray[Any]]
"""Arrays of numbers by name, each with one row an image of a part, in the cohort's order.

Those named ``gallery…`` have as many rows as the spec's ``evaluation.gallery`` allows; they are
kept of the test part alone, and where it is 0 there are none. ``patients``, ``unit`` and what
begins with ``validation_`` are no names of evidence.
"""

_BATCH_PIXELS = 1 << 22  # 16 MB of float32 into the first layer, whatever the image's size
_BATCH_IMAGES = (8, 512)
_VOLUME = 4  # numbers in the shape of one


class Task(ABC):
    """A task of one run; made by `common.tasks.task_for`.

    Which losses and metrics it has, and what a network has to give it, stands in its section
    (`common.spec.Task`, here ``spec.task``), which is read without torch.

    Attributes:
        spec: the run.
        views: how many rows `examples` makes of one image; its loss is their sum.
    """

    def __init__(self, spec: RunSpec) -> None:
        self.spec = spec
        self.views = spec.task.VIEWS

    # --- Training -----------------------------------------------------------------------------

    def taken(
        self, cohort: Cohort, rows: NDArray[np.int64], copies: int, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """What a step takes of a cohort: `copies` of each image with its target, image by image.

        Args:
            cohort: the site's.
            rows: image numbers.
            copies: of each; a task that takes a part of an image takes another for each copy.
            generator: the source of randomness, on any device.
        """
        images, targets = map(torch.from_numpy, cohort.examples(rows))
        return images.repeat_interleave(copies, dim=0), targets.repeat_interleave(copies, dim=0)

    @abstractmethod
    def losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """One loss a row, never reduced over the batch (docs/privacy.md 2).

        Args:
            outputs: what the network gave for the rows of `examples`, of any floating type.
            targets: as `examples` returned them.

        Returns:
            (rows,) float32; value i is a function of row i alone.

        Raises:
            ModelError: if a shape is another than the task's.
        """

    def moved(self, targets: Tensor, motion: Motion) -> Tensor:
        """The targets after the images were changed by `motion`; as they are, by default."""
        return targets

    def examples(
        self, images: Tensor, targets: Tensor, network: nn.Module, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Rows for the network and their targets, `views` for each image, image by image.

        Row i is a function of image i // views, of fresh randomness and of the network's weights.

        Args:
            images: (B, channels, height, width) brightness in 0..1, augmented, on the device.
            targets: the cohort's, moved along.
            network: the whole network, for what needs another part of it (a GAN's generator); no
                gradient flows here.
            generator: the source of randomness, on any device.
        """
        return images, targets

    def private(self, network: nn.Module) -> nn.Module:
        """The part of `network` that sees patients, and is trained by DP-SGD: all of it."""
        return network

    def follow(self, network: nn.Module, generator: torch.Generator) -> None:
        """What comes after each step and sees no patient: post-processing. Nothing, by default.

        Nothing that a patient moved may reach it but the weights of `private`, which are noised:
        no images, and no randomness that `examples` has drawn from. A task is made anew for each
        round, so an optimiser that is kept in it starts afresh as the patients' own does.

        Args:
            network: the whole network, in training mode.
            generator: the source of randomness, on any device.
        """
        return

    # --- Evaluation ---------------------------------------------------------------------------

    def through(self, network: nn.Module, images: Tensor) -> Tensor:
        """What `network` gives for whole images, (B, …) brightness in 0..1: all at once."""
        outputs: Tensor = network(normalise(images, self.spec.input))
        return outputs

    @torch.no_grad()
    def evidence(self, network: nn.Module, cohort: Cohort, device: torch.device) -> Evidence:
        """What is kept of a network's answers on `cohort`; the network is in evaluation mode.

        Here: batch by batch through the network, `measured`, and joined.
        """
        pieces = []
        for rows in batches(cohort):
            images, targets = (torch.from_numpy(a).to(device) for a in cohort.examples(rows))
            outputs = self.through(network, images)
            pieces.append(self.measured(outputs.float(), images, targets))
        return {key: np.concatenate([piece[key] for piece in pieces]) for key in pieces[0]}

    @abstractmethod
    def measured(self, outputs: Tensor, images: Tensor, targets: Tensor) -> Evidence:
        """What is kept of one batch.

        Args:
            outputs: the network's, float32.
            images: brightness in 0..1.
            targets: the cohort's.
        """

    def pictures(self, network: nn.Module, cohort: Cohort, device: torch.device) -> Evidence:
        """What a gallery shows of some images of `cohort`; nothing, by default.

        Asked for once, of the model that a run ends with, and only where ``evaluation.gallery``
        is above 0; the network is in evaluation mode, and no gradient flows.

        Returns:
            Arrays whose names begin with ``gallery``, each with at most so many rows.
        """
        return {}

    @torch.no_grad()
    def gallery(self, network: nn.Module, cohort: Cohort, device: torch.device) -> Evidence:
        """`pictures`, and what the network's answers to some of these images rest on."""
        shown = self.pictures(network, cohort, device)
        return {**shown, **explained.evidence(self, network, cohort, device)}

    # --- Use --------------------------------------------------------------------------------

    def served(self, outputs: Tensor) -> Mapping[str, Tensor]:
        """What a model that is exported gives to other programs, by name; the last is what counts.

        Made by torch's operations alone, for B images of any B: an export records them.

        Args:
            outputs: the network's, float32.
        """
        return {"outputs": outputs}

    def without_answers(self) -> str:
        """Why such a model says nothing of single new images; empty if it does."""
        return f"a model of {self.spec.task.name} says nothing of single images"

    def answers(self, outputs: Tensor, images: Tensor) -> Sequence[Answer]:
        """What a network says of new images, one answer an image.

        Args:
            outputs: the network's, float32.
            images: (B, channels, height, width) brightness in 0..1.

        Raises:
            ModelError: if such a model has no answers; see `without_answers`.
        """
        raise ModelError(self.without_answers())

    @abstractmethod
    def score(
        self,
        evidence: Evidence,
        patients: NDArray[np.int64],
        *,
        resamples: int,
        generator: np.random.Generator,
    ) -> Mapping[str, Estimate]:
        """Every metric of `METRICS` with its interval over resampled patients.

        Args:
            evidence: of N images.
            patients: (N,) integers; equal numbers are one patient.
            resamples: of the bootstrap; 0 gives no interval.
            generator: of the bootstrap.
        """

    def exhibits(self, evidence: Evidence, patients: NDArray[np.int64]) -> Sequence[Exhibit]:
        """What the report shows of the test part, beyond the metrics; drawn by the server."""
        return ()

    def shown(self, evidence: Evidence, patients: NDArray[np.int64]) -> Sequence[Exhibit]:
        """`exhibits`, and explanations where there are any."""
        own = self.exhibits(evidence, patients)
        return [*own, *explained.exhibits(evidence, patients, self.spec)]

    def without_value(self, evidence: Evidence) -> str:
        """Why the headline has no value on this evidence, in a sentence."""
        return "It has no meaning on the images of the test part."


def batches(cohort: Cohort) -> Iterator[NDArray[np.int64]]:
    """Image numbers of a cohort in order, as many at a time as fit into little memory.

    Volumes one by one: of a volume a network holds each layer in three dimensions.
    """
    smallest, largest = _BATCH_IMAGES if len(cohort.shape) < _VOLUME else (1, 1)
    size = max(smallest, min(largest, _BATCH_PIXELS // int(np.prod(cohort.row_shape))))
    for start in range(0, len(cohort), size):
        yield np.arange(start, min(start + size, len(cohort)), dtype=np.int64)
