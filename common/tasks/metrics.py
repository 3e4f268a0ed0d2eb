"""The field's metrics for a classifier, with intervals by patient.

Everything is computed on *columns*: a binary task has one (the positive class), a multiclass
task one for each class against the rest, a multilabel task one for each label.

===========  =====================================================================================
auroc        area under the receiver operating curve; mean over the columns
auprc        average precision, sum of (R_n - R_{n-1}) P_n; mean over the columns
accuracy     part of the decisions that are right: of images, or of (image, label) pairs
sensitivity  TP / (TP + FN); mean over the columns
specificity  TN / (TN + FP); mean over the columns
f1           2 TP / (2 TP + FP + FN); mean over the columns
brier        mean squared error of the probability; multiclass: summed over the classes
             (Brier 1950, 0..2); multilabel: mean over the labels
ece          expected calibration error in `CALIBRATION_BINS` equal bins (Guo et al. 2017,
             arXiv:1706.04599): of the positive's probability; multiclass: of the top class's
             confidence; multilabel: mean over the labels
===========  =====================================================================================

A decision is positive when its probability is *above* the threshold; a multiclass decision is the
most probable class. A column where a metric has no meaning (AUROC with one class only) is left
out of the mean; where no column is left, or a probability is not finite, the value is None.

Point estimates are torchmetrics'. Intervals come from weighted formulas over resampled patients
(`common.tasks.estimates`); tests hold them against the same metrics on rows that are really
resampled.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torchmetrics.functional import classification as tm
from torchmetrics.functional.regression import mean_squared_error

from common.task_sections import Classification
from common.tasks.estimates import Estimate, Floats, intervals, ratio

NAMES = tuple(Classification.METRICS)
LOWER_IS_BETTER = frozenset(n for n, m in Classification.METRICS.items() if m.lower_is_better)
CALIBRATION_BINS = 10


@dataclass(frozen=True)
class Scores:
    """All metrics of one part of a cohort.

    ``confusion`` counts images, rows by truth and columns by decision: (2, 2), or
    (classes, classes), or (labels, 2, 2) for a multilabel task.
    """

    metrics: Mapping[str, Estimate]
    confusion: NDArray[np.int64]


@dataclass(frozen=True)
class Predictions:
    """What a model said of N images, and what is true.

    Attributes:
        kind: the task's.
        probabilities: (N, classes); binary: column 1 is the positive's.
        labels: (N,) integers, or (N, classes) of 0 and 1 for a multilabel task.
        patients: (N,) integers; equal numbers are one patient.
        threshold: a probability above it is a positive decision.

    Raises:
        ValueError: if the shapes do not fit each other.
    """

    kind: str
    probabilities: NDArray[Any]
    labels: NDArray[Any]
    patients: NDArray[np.int64]
    threshold: float = 0.5

    def __post_init__(self) -> None:
        images = len(self.patients)
        expected = self.probabilities.shape if self.kind == "multilabel" else (images,)
        if self.probabilities.ndim != 2 or len(self.probabilities) != images:
            raise ValueError(
                f"probabilities have shape {self.probabilities.shape}, expected ({images}, classes)"
            )
        if self.labels.shape != expected:
            raise ValueError(f"labels have shape {self.labels.shape}, expected {expected}")

    def __len__(self) -> int:
        return len(self.patients)

    @cached_property
    def scores(self) -> NDArray[np.float32]:
        """(N, columns): the probability of each column."""
        columns = self.probabilities[:, 1:] if self.kind == "binary" else self.probabilities
        return columns.astype(np.float32)

    @cached_property
    def truths(self) -> NDArray[np.bool_]:
        """(N, columns): whether the column holds."""
        if self.kind == "multilabel":
            return np.asarray(self.labels > 0)
        classes = np.arange(self.probabilities.shape[1])
        hot: NDArray[np.bool_] = self.labels[:, None] == classes
        return hot[:, 1:] if self.kind == "binary" else hot

    @cached_property
    def decisions(self) -> NDArray[np.bool_]:
        """(N, columns): what is decided."""
        if self.kind != "multiclass":
            return np.asarray(self.scores > self.threshold)
        top = self.scores.argmax(axis=1) if len(self) else np.empty(0, np.int64)
        return np.asarray(top[:, None] == np.arange(self.scores.shape[1]))

    @cached_property
    def correct(self) -> NDArray[np.float64]:
        """(N,): the part of an image's decisions that is right."""
        right = self.decisions == self.truths
        every = right.all(axis=1) if self.kind == "multiclass" else right.mean(axis=1)
        return np.asarray(every, dtype=np.float64)

    @cached_property
    def squared_error(self) -> Floats:
        """(N,): an image's Brier score."""
        error = np.square(self.scores.astype(np.float64) - self.truths)
        summed = self.kind == "multiclass"
        return np.asarray(error.sum(axis=1) if summed else error.mean(axis=1))

    @cached_property
    def calibrated(self) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        """Confidences and whether each was borne out, (N, columns) or (N, 1) each."""
        if self.kind != "multiclass":
            return self.scores, self.truths
        return self.scores.max(axis=1, keepdims=True, initial=0), self.correct[:, None] > 0

    @property
    def finite(self) -> bool:
        """Whether every probability is a number."""
        return bool(np.isfinite(self.scores).all())


def score(
    predictions: Predictions, *, resamples: int = 0, generator: np.random.Generator | None = None
) -> Scores:
    """All metrics of `predictions`, with intervals from `resamples` of their patients.

    The intervals are None without resamples, without a generator, or with fewer than two
    patients. A resample in which a metric has no meaning is left out of its interval.
    """
    confusion = confusion_matrix(predictions)
    if not len(predictions) or not predictions.finite:
        return Scores({name: Estimate(None) for name in NAMES}, confusion)
    values = point_estimates(predictions)
    limits: dict[str, tuple[float, float]] = {}
    if generator is not None:
        limits = intervals(
            partial(weighted_metrics, predictions),
            predictions.patients,
            resamples=resamples,
            generator=generator,
        )
    metrics = {
        name: Estimate(value, *limits.get(name, ())) if value is not None else Estimate(None)
        for name, value in values.items()
    }
    return Scores(metrics, confusion)


def confusion_matrix(predictions: Predictions) -> NDArray[np.int64]:
    """Counts of images, rows by truth and columns by decision; see `Scores`."""
    if predictions.kind == "multiclass":
        truth, decision = (m.astype(np.int64) for m in (predictions.truths, predictions.decisions))
        return truth.T @ decision
    pairs = zip(predictions.truths.T, predictions.decisions.T, strict=True)
    tables = [np.bincount(2 * t + d, minlength=4).reshape(2, 2) for t, d in pairs]
    return np.stack(tables) if predictions.kind == "multilabel" else tables[0]


# --- Point estimates: torchmetrics ------------------------------------------------------------


def point_estimates(predictions: Predictions) -> dict[str, float | None]:
    """Each metric of finite predictions of at least one image, by torchmetrics."""
    columns = [_Column(*arrays) for arrays in _columns(predictions)]
    confidences, outcomes = predictions.calibrated
    calibration = [
        float(tm.binary_calibration_error(_tensor(c), _tensor(o).int(), n_bins=CALIBRATION_BINS))
        for c, o in zip(confidences.T, outcomes.T, strict=True)
    ]
    return {
        "auroc": _mean(column.auroc for column in columns),
        "auprc": _mean(column.auprc for column in columns),
        "accuracy": _accuracy(predictions),
        "sensitivity": _mean(column.sensitivity for column in columns),
        "specificity": _mean(column.specificity for column in columns),
        "f1": _mean(column.f1 for column in columns),
        "brier": _brier(predictions),
        "ece": _mean(calibration),
    }


class _Column:
    """torchmetrics of one column; None where the denominator is empty."""

    def __init__(
        self, scores: NDArray[np.float32], truths: NDArray[Any], decisions: NDArray[Any]
    ) -> None:
        self._scores, self._truths = _tensor(scores), _tensor(truths).int()
        self._decisions = _tensor(decisions).int()
        self._positives, self._negatives = int(truths.sum()), int((~truths).sum())
        self._decided = int((truths | decisions).sum())

    @property
    def auroc(self) -> float | None:
        both = self._positives and self._negatives
        return float(tm.binary_auroc(self._scores, self._truths)) if both else None

    @property
    def auprc(self) -> float | None:
        if not self._positives:
            return None
        return float(tm.binary_average_precision(self._scores, self._truths))

    @property
    def sensitivity(self) -> float | None:
        return float(tm.binary_recall(*self._hard)) if self._positives else None

    @property
    def specificity(self) -> float | None:
        return float(tm.binary_specificity(*self._hard)) if self._negatives else None

    @property
    def f1(self) -> float | None:
        return float(tm.binary_f1_score(*self._hard)) if self._decided else None

    @property
    def _hard(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self._decisions, self._truths


def _accuracy(predictions: Predictions) -> float:
    truths, decisions = _tensor(predictions.truths).int(), _tensor(predictions.decisions).int()
    if predictions.kind != "multiclass":
        return float(tm.binary_accuracy(decisions.flatten(), truths.flatten()))
    classes = truths.shape[1]
    top, label = decisions.argmax(dim=1), truths.argmax(dim=1)
    return float(tm.multiclass_accuracy(top, label, num_classes=classes, average="micro"))


def _brier(predictions: Predictions) -> float:
    scores, truths = _tensor(predictions.scores), _tensor(predictions.truths).float()
    error = float(mean_squared_error(scores.flatten(), truths.flatten()))
    return error * scores.shape[1] if predictions.kind == "multiclass" else error


def _columns(predictions: Predictions) -> Iterator[tuple[NDArray[Any], ...]]:
    arrays = (predictions.scores, predictions.truths, predictions.decisions)
    return zip(*(array.T for array in arrays), strict=True)


def _tensor(array: NDArray[Any]) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(array))


def _mean(values: Iterator[float | None] | list[float]) -> float | None:
    defined = [value for value in values if value is not None]
    return sum(defined) / len(defined) if defined else None


# --- Resamples: weighted formulas -------------------------------------------------------------


def weighted_metrics(predictions: Predictions, weights: Floats) -> dict[str, Floats]:
    """Each metric under each row of (R, N) `weights`: (R,), NaN where it has no meaning."""
    total = weights.sum(axis=1)
    ranked = [ranking(scores, truths, weights) for scores, truths, _ in _columns(predictions)]
    return {
        "auroc": _row_mean([auroc(curve) for curve in ranked]),
        "auprc": _row_mean([average_precision(curve) for curve in ranked]),
        "accuracy": ratio(weights @ predictions.correct, total),
        **_weighted_decisions(predictions, weights),
        "brier": ratio(weights @ predictions.squared_error, total),
        "ece": _weighted_calibration(predictions, weights),
    }


class Ranking(NamedTuple):
    """Weighted counts above each distinct score, from the highest score down.

    Attributes:
        true_positives: (R, G); the last column is the weight of all positives.
        false_positives: (R, G); the last column is the weight of all negatives.
        scores: (G,) the distinct scores.
    """

    true_positives: Floats
    false_positives: Floats
    scores: NDArray[Any]


def ranking(scores: NDArray[Any], truths: NDArray[np.bool_], weights: Floats) -> Ranking:
    """Rank N images by `scores` under (R, N) `weights`; images of equal score stay together."""
    order = np.argsort(-scores, kind="stable")
    ranked = scores[order]
    last = np.flatnonzero(np.append(ranked[1:] != ranked[:-1], [True][: len(ranked)]))
    heavy = weights[:, order]
    everything = np.cumsum(heavy, axis=1)[:, last]
    true_positives = np.cumsum(heavy * truths[order], axis=1)[:, last]
    return Ranking(true_positives, everything - true_positives, ranked[last])


def auroc(curve: Ranking) -> Floats:
    """(R,) the trapezoids under true against false positives; NaN with one class only."""
    tp, fp = curve.true_positives, curve.false_positives
    doubled = np.einsum("rg,rg->r", _steps(fp), 2 * tp - _steps(tp))
    return ratio(doubled, 2 * tp[:, -1] * fp[:, -1])


def average_precision(curve: Ranking) -> Floats:
    """(R,) the sum of (R_n - R_{n-1}) P_n; NaN without a positive."""
    tp, fp = curve.true_positives, curve.false_positives
    precision = tp / np.maximum(tp + fp, 1)  # a weight is a whole number: below 1 is none
    return ratio(np.einsum("rg,rg->r", _steps(tp), precision), tp[:, -1])


def _steps(values: Floats) -> Floats:
    return np.diff(values, axis=1, prepend=0)


def _weighted_decisions(predictions: Predictions, weights: Floats) -> dict[str, Floats]:
    truths, decisions = predictions.truths, predictions.decisions
    hits, decided, holds, images = (
        weights @ cell.astype(np.float64)
        for cell in (truths & decisions, decisions, truths, np.ones_like(truths))
    )
    clear = images - holds - decided + hits
    return {
        "sensitivity": _row_mean(list(ratio(hits, holds).T)),
        "specificity": _row_mean(list(ratio(clear, images - holds).T)),
        "f1": _row_mean(list(ratio(2 * hits, holds + decided).T)),
    }


def _weighted_calibration(predictions: Predictions, weights: Floats) -> Floats:
    """In each bin |sum of w (confidence - outcome)|: the bins' own sizes cancel."""
    confidences, outcomes = predictions.calibrated
    columns = []
    for confidence, outcome in zip(confidences.T, outcomes.T, strict=True):
        gap = np.zeros((len(confidence), CALIBRATION_BINS + 1))
        gap[np.arange(len(gap)), calibration_bin(confidence)] = confidence - outcome
        columns.append(ratio(np.abs(weights @ gap).sum(axis=1), weights.sum(axis=1)))
    return _row_mean(columns)


def calibration_bin(confidence: NDArray[np.float32]) -> NDArray[np.int64]:
    """The bin of each confidence, from 0; torchmetrics gives exactly 1.0 a bin of its own."""
    edges = torch.linspace(0, 1, CALIBRATION_BINS + 1).numpy()
    return np.asarray(np.searchsorted(edges, confidence, side="right") - 1, dtype=np.int64)


def _row_mean(columns: list[Floats]) -> Floats:
    """The mean over the columns that have a meaning; NaN where none has."""
    if len(columns) == 1:
        return columns[0]
    stacked = np.stack(columns)
    defined = np.isfinite(stacked)
    return ratio(np.where(defined, stacked, 0).sum(axis=0), defined.sum(axis=0))
