"""What is learned: how a task turns a network's outputs into losses and probabilities."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from common.spec import RunSpec
from common.tasks.classification import Classification


class ImageTask(Protocol):
    """A task on whole images; B images, ``spec.task.outputs`` outputs each."""

    def losses(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """One loss an image, never reduced over the batch (PRIVACY.md 2).

        Args:
            outputs: (B, outputs), logits of any floating type.
            labels: (B,) int64, or (B, classes) for a multilabel task.

        Returns:
            (B,) float32; value i is a function of image i alone.
        """

    def probabilities(self, outputs: Tensor) -> Tensor:
        """(B, classes) float32 in 0..1; for a binary task 1 - p in column 0, p in column 1."""


_TASKS = {"classification": Classification.from_spec}


def task_for(spec: RunSpec) -> ImageTask:
    """The task that a run's spec describes."""
    return _TASKS[spec.task.name](spec)
