"""Cutting one cohort into the sites of a simulation, always by patient.

Pure functions of cohort, number of sites and seed. Each returns, for every site, patient numbers
of the cohort in ascending order (for `Cohort.subset`); together they hold each patient once. No
site is left empty while there are patients enough.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from common.cohort import Cohort
from common.errors import ConfigError

Partition = tuple[NDArray[np.int64], ...]


def iid(cohort: Cohort, sites: int, seed: int) -> Partition:
    """Equal shares of the shuffled patients; sizes differ by at most one."""
    order = _shuffled(cohort, sites, np.random.default_rng(seed))
    return _sorted(np.array_split(order, sites))


def quantity(cohort: Cohort, sites: int, seed: int, *, alpha: float = 1.0) -> Partition:
    """Unequal sizes, drawn from a symmetric Dirichlet distribution.

    Args:
        cohort: whose patients are cut.
        sites: how many parts.
        seed: of the draw.
        alpha: concentration; the smaller, the more unequal.
    """
    random = np.random.default_rng(seed)
    order = _shuffled(cohort, sites, random)
    shares = random.dirichlet(np.full(sites, _checked(alpha)))
    return _sorted(_cut(order, shares))


def power_law(cohort: Cohort, sites: int, seed: int, *, exponent: float = 1.0) -> Partition:
    """Unequal sizes by rank: the site of rank k has a share in proportion to k ** -exponent."""
    order = _shuffled(cohort, sites, np.random.default_rng(seed))
    shares = np.arange(1, sites + 1, dtype=np.float64) ** -_checked(exponent)
    return _sorted(_cut(order, shares / shares.sum()))


def dirichlet(cohort: Cohort, sites: int, seed: int, *, alpha: float) -> Partition:
    """Unequal mixtures of labels (Hsu et al. 2019, arXiv:1909.06335).

    The patients of each label are dealt out in shares from a symmetric Dirichlet distribution.
    A patient's label is that of the first image; for a multilabel task each combination counts
    as one. Where images have no labels (masks, boxes) all count as alike: sizes differ then.

    Args:
        cohort: whose patients are cut.
        sites: how many parts.
        seed: of the draw.
        alpha: concentration; at 100 the sites are much alike, at 0.1 most have one label.
    """
    random = np.random.default_rng(seed)
    order = _shuffled(cohort, sites, random)
    labels = _patient_labels(cohort)
    parts: list[list[NDArray[np.int64]]] = [[] for _ in range(sites)]
    for label in np.unique(labels):
        shares = random.dirichlet(np.full(sites, _checked(alpha)))
        for part, piece in zip(parts, _cut(order[labels[order] == label], shares), strict=True):
            part.append(piece)
    return _sorted([np.concatenate([order[:0], *part]) for part in parts])


def _patient_labels(cohort: Cohort) -> NDArray[np.int64]:
    """(patients,) a number for the label of each patient's first image."""
    first = np.array([cohort.rows_of(number)[0] for number in range(len(cohort.patients))])
    labels = cohort.labels[first.astype(np.int64)]
    if not labels.size:
        return np.zeros(0, dtype=np.int64)
    return np.unique(labels, axis=0, return_inverse=True)[1].reshape(-1).astype(np.int64)


def _shuffled(cohort: Cohort, sites: int, random: np.random.Generator) -> NDArray[np.int64]:
    if sites < 1:
        raise ConfigError(f"{sites} sites: a partition has at least one")
    return random.permutation(len(cohort.patients)).astype(np.int64)


def _cut(order: NDArray[np.int64], shares: NDArray[np.float64]) -> list[NDArray[np.int64]]:
    """Consecutive pieces of `order` in proportion to `shares`."""
    bounds = np.rint(np.cumsum(shares)[:-1] * len(order)).astype(np.int64)
    return np.split(order, np.clip(bounds, 0, len(order)))


def _none_empty(parts: list[NDArray[np.int64]]) -> list[NDArray[np.int64]]:
    """The largest parts give one patient each to those that have none."""
    parts = list(parts)
    for number, part in enumerate(parts):
        largest = max(range(len(parts)), key=lambda other: len(parts[other]))
        if not len(part) and len(parts[largest]) > 1:
            parts[number], parts[largest] = parts[largest][-1:], parts[largest][:-1]
    return parts


def _sorted(parts: list[NDArray[np.int64]]) -> Partition:
    return tuple(np.sort(part) for part in _none_empty(parts))


def _checked(number: float) -> float:
    if not 0 < number < np.inf:
        raise ConfigError(f"{number}: expected a number above 0")
    return number
