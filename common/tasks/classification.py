"""Classification of images: binary, one of many classes, or any of many labels.

Every loss is written on the log-probabilities of a choice among classes, last dimension: the
classes themselves where one is right, "absent or present" for a binary task and for each label of
a multilabel one. A formula stands here once and serves all three kinds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Self

import torch
from torch import Tensor
from torch.nn import functional

from common.errors import ModelError
from common.spec import Loss, RunSpec

_TINY = 1e-12


@dataclass(frozen=True)
class Classification:
    """Losses and probabilities of a classification task.

    An image's loss is multiplied by the weight of its class, a literal of the spec; a multilabel
    image's loss is the mean over its labels, each multiplied by its own weight. Label smoothing s
    moves s of the target evenly onto all choices, as in torch.
    """

    kind: Literal["binary", "multiclass", "multilabel"]
    classes: int
    loss: Loss

    @classmethod
    def from_spec(cls, spec: RunSpec) -> Self:
        """The task of a run."""
        return cls(spec.task.kind, len(spec.task.classes), spec.loss)

    def losses(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """One loss an image: (B, outputs) logits and labels to (B,) float32.

        Args:
            outputs: (B, 1) for a binary task, else (B, classes).
            labels: (B,) int64, or (B, classes) of 0 and 1 for a multilabel task.

        Raises:
            ModelError: if a shape is another; a loss of shape (B, 1) would void the clipping.
        """
        self._check_shapes(outputs, labels)
        log_p = self._log_probabilities(outputs)
        losses = _FORMULAS[self.loss.name](log_p, self._targets(log_p, labels), self.loss)
        weights = self._weights(outputs.device)
        if self.kind == "multilabel":
            return (losses * weights).mean(dim=1)
        return losses * weights[labels]

    def probabilities(self, outputs: Tensor) -> Tensor:
        """(B, outputs) logits to (B, classes) float32; see `ImageTask.probabilities`."""
        probabilities = self._log_probabilities(outputs).exp()
        return probabilities[..., 1] if self.kind == "multilabel" else probabilities

    def _log_probabilities(self, outputs: Tensor) -> Tensor:
        """(B, choices), or (B, classes, 2) for a multilabel task, in float32."""
        outputs = outputs.float()
        if self.kind == "multiclass":
            return functional.log_softmax(outputs, dim=-1)
        logits = outputs if self.kind == "multilabel" else outputs[:, 0]
        return torch.stack([functional.logsigmoid(-logits), functional.logsigmoid(logits)], dim=-1)

    def _targets(self, log_p: Tensor, labels: Tensor) -> Tensor:
        """The smoothed target distribution, of the shape of `log_p`."""
        smoothing, choices = self.loss.label_smoothing, log_p.shape[-1]
        if self.kind == "multilabel":
            exact = torch.stack([1 - labels, labels], dim=-1).to(log_p)
        else:
            exact = functional.one_hot(labels, choices).to(log_p)
        return exact * (1 - smoothing) + smoothing / choices

    def _weights(self, device: torch.device) -> Tensor:
        weights = self.loss.class_weights or (1.0,) * self.classes
        return torch.tensor(weights, dtype=torch.float32, device=device)

    def _check_shapes(self, outputs: Tensor, labels: Tensor) -> None:
        images = len(outputs)
        expected = (images, 1 if self.kind == "binary" else self.classes)
        wanted = (images, self.classes) if self.kind == "multilabel" else (images,)
        if outputs.shape != expected or labels.shape != wanted:
            raise ModelError(
                f"a {self.kind} task of {self.classes} classes met outputs of shape "
                f"{tuple(outputs.shape)} and labels of shape {tuple(labels.shape)}; expected "
                f"{expected} and {wanted}"
            )


def _cross_entropy(log_p: Tensor, target: Tensor, loss: Loss) -> Tensor:
    return -(target * log_p).sum(dim=-1)


def _mse(log_p: Tensor, target: Tensor, loss: Loss) -> Tensor:
    """The Brier score over the number of choices: (p - y)^2 where there are two."""
    return (log_p.exp() - target).square().mean(dim=-1)


def _focal(log_p: Tensor, target: Tensor, loss: Loss) -> Tensor:
    """Lin et al. 2017: (1 - p)^gamma times the cross-entropy; finite slopes for any gamma."""
    doubt = (-torch.expm1(log_p)).clamp_min(_TINY)
    return -(target * doubt.pow(loss.focal_gamma) * log_p).sum(dim=-1)


_FORMULAS: dict[str, Callable[[Tensor, Tensor, Loss], Tensor]] = {
    "cross-entropy": _cross_entropy,
    "mse": _mse,
    "focal": _focal,
}
