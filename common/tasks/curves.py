"""Curves of one column of predictions: receiver operating, precision-recall, calibration.

Each has a 95 % band from resamples of patients, pointwise: in 95 of 100 cohorts of such patients
one *point* of the curve lies in its band, not the whole curve.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from common.tasks.estimates import Floats, patient_weights
from common.tasks.metrics import (
    CALIBRATION_BINS,
    Ranking,
    calibration_bin,
    ranking,
)

GRID: Floats = np.linspace(0, 1, 101)
_INTERVAL = (2.5, 97.5)
_RESAMPLES = 200


@dataclass(frozen=True)
class Column:
    """One column of a part's predictions.

    Attributes:
        scores: (N,) probabilities.
        truths: (N,) whether it holds.
        patients: (N,) whom the images are of.
        seed: of the resamples.
    """

    scores: NDArray[np.float32]
    truths: NDArray[np.bool_]
    patients: NDArray[np.int64]
    seed: int

    @property
    def drawable(self) -> bool:
        """Whether both classes are there and every score is a number."""
        return bool(self.truths.any() and not self.truths.all() and np.isfinite(self.scores).all())

    @property
    def prevalence(self) -> float:
        """The part of the images where it holds."""
        return float(self.truths.mean())


@dataclass(frozen=True)
class Curve:
    """A curve, and its band over `GRID`."""

    x: Floats
    y: Floats
    low: Floats
    high: Floats


def roc(column: Column) -> Curve:
    """Sensitivity (y) against 1 - specificity (x), linear between the distinct scores."""
    exact, resampled = _rankings(column)
    lines = [np.interp(GRID, fp, tp) for fp, tp in _rates(resampled)]
    x, y = next(_rates(exact))
    return Curve(x, y, *_band(lines))


def precision_recall(column: Column) -> Curve:
    """Precision (y) against recall (x), a step: the precision where the recall is first reached."""
    exact, resampled = _rankings(column)
    lines = [_precision_at(tp, fp) for tp, fp in _counts(resampled)]
    tp, fp = next(_counts(exact))
    return Curve(tp / tp[-1], tp / np.maximum(tp + fp, 1), *_band(lines))


@dataclass(frozen=True)
class Calibration:
    """Of each bin that has images: mean probability, how often it held, the band, how many."""

    confidence: Floats
    frequency: Floats
    low: Floats
    high: Floats
    images: NDArray[np.int64]


def calibration(column: Column) -> Calibration:
    """The reliability diagram, in the bins of the calibration error."""
    bins = np.minimum(calibration_bin(column.scores), CALIBRATION_BINS - 1)
    member = (bins[:, None] == np.arange(CALIBRATION_BINS)).astype(np.float64)
    images = member.sum(axis=0)
    used = images > 0
    weights = _weights(column)
    held = weights @ (member * column.truths[:, None])
    drawn = weights @ member
    frequency = np.divide(held, drawn, out=np.full(drawn.shape, np.nan), where=drawn > 0)
    low, high = np.nanpercentile(frequency[:, used], _INTERVAL, axis=0)
    return Calibration(
        confidence=(column.scores @ member)[used] / images[used],
        frequency=(column.truths @ member)[used] / images[used],
        low=low,
        high=high,
        images=images[used].astype(np.int64),
    )


def _weights(column: Column) -> Floats:
    generator = np.random.default_rng(column.seed)
    return patient_weights(column.patients, _RESAMPLES, generator)


def _rankings(column: Column) -> tuple[Ranking, Ranking]:
    ones = np.ones((1, len(column.scores)))
    return (
        ranking(column.scores, column.truths, ones),
        ranking(column.scores, column.truths, _weights(column)),
    )


def _counts(curve: Ranking) -> Iterator[tuple[Floats, Floats]]:
    """True and false positives of each row that has both classes."""
    for tp, fp in zip(curve.true_positives, curve.false_positives, strict=True):
        if tp[-1] > 0 and fp[-1] > 0:
            yield tp, fp


def _rates(curve: Ranking) -> Iterator[tuple[Floats, Floats]]:
    """False and true positive rates of each row, from (0, 0)."""
    for tp, fp in _counts(curve):
        yield np.append(0, fp / fp[-1]), np.append(0, tp / tp[-1])


def _precision_at(tp: Floats, fp: Floats) -> Floats:
    first = np.searchsorted(tp, np.maximum(GRID * tp[-1], 1))
    return np.asarray(tp[first] / (tp + fp)[first])


def _band(lines: list[Floats]) -> tuple[Floats, Floats]:
    low, high = np.percentile(np.stack(lines), _INTERVAL, axis=0)
    return low, high
