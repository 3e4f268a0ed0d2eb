"""Counts at public thresholds: what a site may say of its own held-out patients.

One table a site: for each column (a binary task's positive class, else each class), for those who
have it and those who have not, how many patients were predicted in each of `bins` equal intervals
of the probability. A patient adds one to one cell of each column, so adding or removing one moves
the table by the square root of the number of columns in L2 norm: that is its sensitivity, and the
noise is in proportion to it. Everything that is computed from noised tables is post-processing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from common.errors import SpecError
from common.spec import FederatedEvaluation, RunSpec

Table = NDArray[np.float64]

METRICS = ("auroc", "sensitivity", "specificity")


def settings(spec: RunSpec) -> FederatedEvaluation:
    """The spec's federated evaluation.

    Raises:
        SpecError: if it asks for none.
    """
    if spec.evaluation.federated is None:
        raise SpecError("evaluation.federated: the run asks for no federated evaluation")
    return spec.evaluation.federated


def shape(spec: RunSpec) -> tuple[int, int, int]:
    """(columns, 2, bins): has it not or has it; from low probability to high."""
    return spec.task.outputs, 2, settings(spec).bins


def deviation(spec: RunSpec) -> float:
    """The standard deviation of the noise on each count of one site, in patients."""
    return settings(spec).noise_multiplier * math.sqrt(spec.task.outputs)


def tabulate(spec: RunSpec, probabilities: NDArray[np.float32], labels: NDArray[np.int64]) -> Table:
    """The exact table, one row of `probabilities` and of `labels` a patient.

    Args:
        spec: the run.
        probabilities: (patients, classes) in 0..1; what is not a number counts as 0.
        labels: (patients,) class numbers, or (patients, classes) of 0 and 1.

    Returns:
        (columns, 2, bins); it is private: nothing of it leaves without noise.
    """
    columns, _, bins = shape(spec)
    binary = spec.task.kind == "binary"
    scores = np.nan_to_num(probabilities[:, 1:] if binary else probabilities, nan=0.0).clip(0, 1)
    truths = labels if labels.ndim == 2 else labels[:, None] == np.arange(probabilities.shape[1])
    truths = (truths[:, 1:] if binary else truths).astype(np.int64)
    cells = np.minimum((scores * bins).astype(np.int64), bins - 1)
    table = np.zeros((columns, 2, bins))
    for column in range(columns):
        np.add.at(table[column], (truths[:, column], cells[:, column]), 1.0)
    return table


def metrics(table: Table, threshold: float) -> Mapping[str, float | None]:
    """What noised counts say: each metric's mean over the columns in which it has a meaning.

    ``auroc`` takes all of a bin as tied; the decision is taken at the edge of a bin that is
    nearest to `threshold`. Counts that noise made negative stay so, or the sums over many bins
    would all be too large; what comes out is cut to 0..1.
    """
    edge = round(threshold * table.shape[2])
    values: dict[str, list[float]] = {name: [] for name in METRICS}
    for negatives, positives in table:
        have, have_not = positives.sum(), negatives.sum()
        if have > 0:
            values["sensitivity"].append(float(positives[edge:].sum() / have))
        if have_not > 0:
            values["specificity"].append(float(negatives[:edge].sum() / have_not))
        if have > 0 and have_not > 0:
            above = have - np.cumsum(positives)
            ranked = (negatives * (above + positives / 2)).sum()
            values["auroc"].append(float(ranked / (have * have_not)))
    return {
        name: float(np.clip(seen, 0, 1).mean()) if seen else None for name, seen in values.items()
    }


def intervals(
    table: Table, noise: float, threshold: float, *, seed: int, resamples: int = 500
) -> Mapping[str, tuple[float, float]]:
    """How far the noise alone may have moved each metric: 2.5th to 97.5th percentile.

    Args:
        table: the sum of the sites' noised tables.
        noise: the standard deviation of the noise on each of its counts.
        threshold: as `metrics`.
        seed: of the resamples.
        resamples: tables drawn around this one.
    """
    generator = np.random.default_rng(seed)
    drawn = [
        metrics(table + generator.normal(0.0, noise, table.shape), threshold)
        for _ in range(resamples)
    ]
    found = {}
    for name in METRICS:
        seen = [value for row in drawn if (value := row[name]) is not None]
        if seen:
            low, high = np.percentile(seen, (2.5, 97.5))
            found[name] = (float(low), float(high))
    return found
