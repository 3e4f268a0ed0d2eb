"""Two models on the same images: by how much each metric differs, and how sure that is."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from common.tasks.estimates import Estimate
from common.tasks.task import Evidence, Task

_RESAMPLES = 300


def paired_differences(
    task: Task,
    pair: tuple[Evidence, Evidence],
    patients: NDArray[np.int64],
    *,
    generator: np.random.Generator,
    resamples: int = _RESAMPLES,
) -> dict[str, Estimate]:
    """Second minus first, of each metric, with its 95 % interval over resamples of patients.

    Both are resampled alike, so that what images have in common cancels out: the interval is much
    narrower than those of the two metrics, and is the one that says whether something was lost.

    Args:
        task: the run's.
        pair: evidence of N images, before and after.
        patients: (N,) integers; equal numbers are one patient.
        generator: of the bootstrap.
        resamples: of it; where a metric has no value in one, that is left out.
    """
    _, index = np.unique(patients, return_inverse=True)
    rows_of = np.split(np.argsort(index, kind="stable"), np.cumsum(np.bincount(index))[:-1])
    whole = _difference(task, pair, rows_of, generator)
    drawn: dict[str, list[float]] = {name: [] for name in whole}
    for _ in range(resamples if len(rows_of) > 1 else 0):
        chosen = [rows_of[who] for who in generator.integers(0, len(rows_of), len(rows_of))]
        for name, value in _difference(task, pair, chosen, generator).items():
            drawn.setdefault(name, []).append(value)
    return {name: _interval(value, drawn[name]) for name, value in whole.items()}


def _difference(
    task: Task,
    pair: tuple[Evidence, Evidence],
    people: list[NDArray[np.int64]],
    generator: np.random.Generator,
) -> dict[str, float]:
    """Of each metric that both have; a patient who was drawn twice counts as two."""
    rows = np.concatenate(people)
    who = np.repeat(np.arange(len(people)), [len(each) for each in people])
    found = [
        task.score(
            {name: array[rows] for name, array in evidence.items()},
            who,
            resamples=0,
            generator=generator,
        )
        for evidence in pair
    ]
    values = {name: [each[name].value for each in found] for name in found[0]}
    return {
        name: second - first
        for name, (first, second) in values.items()
        if first is not None and second is not None
    }


def _interval(value: float, drawn: list[float]) -> Estimate:
    if not drawn:
        return Estimate(value)
    low, high = np.percentile(drawn, (2.5, 97.5))
    return Estimate(value, float(low), float(high))
