"""Classification of images: binary, one of many classes, or any of many labels.

Every loss is written on the log-probabilities of a choice among classes, last dimension: the
classes themselves where one is right, "absent or present" for a binary task and for each label of
a multilabel one. A formula stands here once and serves all three kinds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from common import task_sections
from common.cohort import Cohort
from common.errors import ModelError
from common.models.studies import ModalityNetwork, StudyNetwork
from common.spec import Loss, RunSpec
from common.tasks import by_modality, pictures
from common.tasks.answers import Answer
from common.tasks.classification_exhibits import exhibits, studies
from common.tasks.estimates import Estimate
from common.tasks.exhibits import Exhibit
from common.tasks.metrics import Predictions, score
from common.tasks.preprocess import normalise
from common.tasks.task import Evidence, Task

_TINY = 1e-12


class Classification(Task):
    """Losses and probabilities of a classification task.

    Its evidence is ``probabilities``, (N, classes) float32, and ``labels``, as in the cohort; of a
    run of modalities also which of them were there (`common.tasks.by_modality`).

    An image's loss is multiplied by the weight of its class, a literal of the spec; a multilabel
    image's loss is the mean over its labels, each multiplied by its own weight. Label smoothing s
    moves s of the target evenly onto all choices, as in torch.
    """

    def __init__(self, spec: RunSpec) -> None:
        super().__init__(spec)
        section = spec.task_as(task_sections.Classification)
        self.kind = section.kind
        self.classes = len(section.classes)
        self.loss = spec.loss

    def losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """One loss an image: (B, outputs) logits and targets to (B,) float32.

        Args:
            outputs: (B, 1) for a binary task, else (B, classes).
            targets: (B,) int64, or (B, classes) of 0 and 1 for a multilabel task.

        Raises:
            ModelError: if a shape is another; a loss of shape (B, 1) would void the clipping.
        """
        self._check_shapes(outputs, targets)
        log_p = self._log_probabilities(outputs)
        losses = _FORMULAS[self.loss.name](log_p, self._targets(log_p, targets), self.loss)
        weights = self._weights(outputs.device)
        if self.kind == "multilabel":
            return (losses * weights).mean(dim=1)
        return losses * weights[targets]

    def probabilities(self, outputs: Tensor) -> Tensor:
        """(B, outputs) logits to (B, classes) float32 in 0..1.

        For a binary task 1 - p stands in column 0, p in column 1.
        """
        probabilities = self._log_probabilities(outputs).exp()
        return probabilities[..., 1] if self.kind == "multilabel" else probabilities

    def measured(self, outputs: Tensor, images: Tensor, targets: Tensor) -> Evidence:
        """Probabilities and labels of one batch."""
        probabilities = self.probabilities(outputs).float().cpu().numpy()
        known = by_modality.present(images, self.spec)
        return {"probabilities": probabilities, "labels": targets.cpu().numpy(), **known}

    def served(self, outputs: Tensor) -> Mapping[str, Tensor]:
        """Logits, and (B, classes) probabilities."""
        return {"logits": outputs, "probabilities": self.probabilities(outputs)}

    def pictures(self, network: nn.Module, cohort: Cohort, device: torch.device) -> Evidence:
        """Of studies evenly spread over the cohort the images, and the weight that each had."""
        if not isinstance(network, StudyNetwork | ModalityNetwork):
            return {}
        rows = pictures.spread(len(cohort), self.spec.evaluation.gallery)
        images = cohort.images(rows)
        seen = normalise(torch.from_numpy(images).to(device), self.spec.input)
        weights = network.attended(seen)[1].float().cpu().numpy()
        absent = np.isnan(images).reshape(*weights.shape, -1).all(axis=2)
        return {
            "gallery_rows": rows,
            "gallery_studies": pictures.grey_levels(images),
            "gallery_weights": np.where(absent, np.nan, weights),
        }

    def without_answers(self) -> str:
        """Nothing: every image has its probabilities."""
        return ""

    def answers(self, outputs: Tensor, images: Tensor) -> Sequence[Answer]:
        """The probabilities of each image."""
        probabilities = self.probabilities(outputs).cpu().numpy()
        return [Answer(bool(np.isfinite(row).all()), row) for row in probabilities]

    def score(
        self,
        evidence: Evidence,
        patients: NDArray[np.int64],
        *,
        resamples: int,
        generator: np.random.Generator,
    ) -> Mapping[str, Estimate]:
        """Every metric with its interval; see `common.tasks.metrics`."""
        predictions = self.predictions(evidence, patients)
        return score(predictions, resamples=resamples, generator=generator).metrics

    def exhibits(self, evidence: Evidence, patients: NDArray[np.int64]) -> Sequence[Exhibit]:
        """See `common.tasks.classification_exhibits`."""
        predictions = self.predictions(evidence, patients)
        shown: list[Exhibit] = [*exhibits(predictions, self.spec)]
        shown += by_modality.table(evidence, predictions, self.spec)
        if len(evidence.get("gallery_studies", ())):
            shown.append(studies(evidence, self.spec))
        return shown

    def without_value(self, evidence: Evidence) -> str:
        """Why there is no AUROC."""
        if not np.isfinite(evidence["probabilities"]).all():
            return "The model's probabilities are not finite."
        return "The test part has images of one class only."

    def predictions(self, evidence: Evidence, patients: NDArray[np.int64]) -> Predictions:
        """The evidence, with the threshold of the run, as the metrics take it."""
        probabilities, labels = evidence["probabilities"], evidence["labels"]
        threshold = self.spec.evaluation.threshold
        return Predictions(self.kind, probabilities, labels, patients, threshold)

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
