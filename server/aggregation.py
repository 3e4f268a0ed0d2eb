"""From the sites' updates to the next global model.

An aggregator takes updates one by one, as they arrive; a server optimiser applies the result. The
mean (`StreamingMean`) keeps one running sum, so memory does not grow with the number of sites;
the robust rules (`AllAtOnce`) must hold every update of the round. Everything here is computed
from releases alone: post-processing, which costs no privacy.

Sums are float64: the order in which sites happen to answer changes them by 1e-16, not the model.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from common import models
from common.errors import UpdateError
from common.messages import Arrays
from common.spec import FedAvgM, FedOpt, Krum, RunSpec, TrimmedMean
from common.spec import Median as MedianRule

State = dict[str, dict[str, NDArray[np.float32]]]


class Aggregator(Protocol):
    """One round's updates, folded in."""

    def fold(self, site: str, update: Arrays, weight: float) -> None:
        """Add one site's checked update."""

    def result(self) -> dict[str, NDArray[np.float32]]:
        """The aggregate of all that was folded in; at least one update."""


class StreamingMean:
    """The weighted mean, as a running sum: one model in memory, however many sites."""

    def __init__(self) -> None:
        self._sum: dict[str, NDArray[np.float64]] = {}
        self._weight = 0.0

    def fold(self, site: str, update: Arrays, weight: float) -> None:
        """Add one site's checked update."""
        for name, array in update.items():
            if name not in self._sum:
                self._sum[name] = np.zeros(array.shape)
            self._sum[name] += weight * array.astype(np.float64)
        self._weight += weight

    def result(self) -> dict[str, NDArray[np.float32]]:
        """The aggregate of all that was folded in."""
        return {name: (s / self._weight).astype(np.float32) for name, s in self._sum.items()}


class AllAtOnce:
    """What the robust rules share: every update of the round is held, as one flat vector.

    Its arrays lie in the order of their names: sites may send them in different ones.
    Weights are ignored: a rule that a hostile site is to survive cannot trust a size it declares.
    """

    def __init__(self) -> None:
        self._held: dict[str, NDArray[np.float32]] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}

    def fold(self, site: str, update: Arrays, weight: float) -> None:
        """Add one site's checked update."""
        self._shapes = {name: update[name].shape for name in sorted(update)}
        self._held[site] = np.concatenate([update[name].ravel() for name in self._shapes])

    def result(self) -> dict[str, NDArray[np.float32]]:
        """The aggregate of all that was folded in."""
        flat = self._combine(np.stack([self._held[site] for site in sorted(self._held)]))
        sizes = [int(np.prod(shape)) for shape in self._shapes.values()]
        parts = np.split(flat.astype(np.float32), np.cumsum(sizes)[:-1])
        named = zip(self._shapes.items(), parts, strict=True)
        return {name: part.reshape(shape) for (name, shape), part in named}

    def _combine(self, updates: NDArray[np.float32]) -> NDArray[np.float32]:
        """(sites, parameters) to (parameters,)."""
        raise NotImplementedError


class CoordinateMedian(AllAtOnce):
    """The median of each coordinate (Yin et al. 2018)."""

    def _combine(self, updates: NDArray[np.float32]) -> NDArray[np.float32]:
        return np.median(updates, axis=0).astype(np.float32)


class CoordinateTrimmedMean(AllAtOnce):
    """The mean of each coordinate without the part `trim` at either end (Yin et al. 2018)."""

    def __init__(self, trim: float) -> None:
        super().__init__()
        self._trim = trim

    def _combine(self, updates: NDArray[np.float32]) -> NDArray[np.float32]:
        cut = int(self._trim * len(updates))
        ordered = np.sort(updates, axis=0)[cut : len(updates) - cut]
        mean: NDArray[np.float32] = ordered.mean(axis=0, dtype=np.float64).astype(np.float32)
        return mean


class MultiKrum(AllAtOnce):
    """The mean of the `keep` updates nearest to their neighbours (Blanchard et al. 2017)."""

    def __init__(self, byzantine: int, keep: int) -> None:
        super().__init__()
        self._byzantine, self._keep = byzantine, keep

    def _combine(self, updates: NDArray[np.float32]) -> NDArray[np.float32]:
        neighbours = len(updates) - self._byzantine - 2
        if neighbours < 1:
            raise UpdateError(
                f"krum with byzantine = {self._byzantine} needs at least "
                f"{self._byzantine + 3} updates; {len(updates)} came"
            )
        scores = [
            np.sort(((updates - one) ** 2).sum(axis=1, dtype=np.float64))[1 : neighbours + 1].sum()
            for one in updates
        ]
        best = np.argsort(scores, kind="stable")[: self._keep]
        mean: NDArray[np.float32] = updates[best].mean(axis=0, dtype=np.float64).astype(np.float32)
        return mean


def aggregator_for(spec: RunSpec) -> Aggregator:
    """The aggregator of one round, empty."""
    rule = spec.aggregation
    if isinstance(rule, MedianRule):
        return CoordinateMedian()
    if isinstance(rule, TrimmedMean):
        return CoordinateTrimmedMean(rule.trim)
    if isinstance(rule, Krum):
        return MultiKrum(rule.byzantine, rule.keep)
    return StreamingMean()


class GlobalModel:
    """The global weights, the server optimiser's state and the averaged weights.

    Args:
        spec: the run.
        weights: where it starts.
        state: of an earlier `state`, when a run goes on.
    """

    def __init__(self, spec: RunSpec, weights: Arrays, state: Mapping[str, Arrays] | None = None):
        self._rule = spec.aggregation
        self.weights: Arrays = dict(weights)
        self._slots: State = {name: dict(arrays) for name, arrays in (state or {}).items()}

    @property
    def evaluated(self) -> Arrays:
        """What is evaluated and kept: the moving average where there is one, else the weights."""
        return self._slots.get("average", self.weights)

    @property
    def state(self) -> Mapping[str, Arrays]:
        """Everything beside the weights that the next round needs."""
        return self._slots

    def apply(self, update: Arrays, round_number: int) -> None:
        """Make the step of one round from the aggregated `update`."""
        step = self._step(update)
        self.weights = {
            name: (array + step[name]).astype(np.float32) for name, array in self.weights.items()
        }
        if self._rule.average_decay:
            self._average(round_number)

    def _step(self, update: Arrays) -> Arrays:
        rule = self._rule
        if isinstance(rule, FedAvgM):
            momentum = self._blend("momentum", update, rule.server_momentum, 1.0)
            return {name: rule.server_learning_rate * array for name, array in momentum.items()}
        return self._adaptive(update, rule) if isinstance(rule, FedOpt) else update

    def _adaptive(self, update: Arrays, rule: FedOpt) -> Arrays:
        """FedAdam, FedYogi and FedAdagrad (Reddi et al. 2021, algorithm 2)."""
        first = self._blend("first", update, rule.beta1, 1 - rule.beta1)
        second = self._slot("second", update)
        for name, array in update.items():
            square = array**2
            if rule.strategy == "fedadam":
                second[name] = rule.beta2 * second[name] + (1 - rule.beta2) * square
            elif rule.strategy == "fedyogi":
                sign = np.sign(second[name] - square)
                second[name] = second[name] - (1 - rule.beta2) * square * sign
            else:
                second[name] = second[name] + square
        rate, tau = rule.server_learning_rate, rule.tau
        return {
            name: (rate * first[name] / (np.sqrt(second[name]) + tau)).astype(np.float32)
            for name in update
        }

    def _blend(self, slot: str, update: Arrays, keep: float, take: float) -> Arrays:
        """Decay a slot by `keep` and add `take` x update; a slot starts at zero."""
        kept = self._slot(slot, update)
        for name, array in update.items():
            kept[name] = (keep * kept[name] + take * array).astype(np.float32)
        return kept

    def _slot(self, slot: str, like: Arrays) -> dict[str, NDArray[np.float32]]:
        if slot not in self._slots:
            self._slots[slot] = {name: np.zeros_like(array) for name, array in like.items()}
        return self._slots[slot]

    def _average(self, round_number: int) -> None:
        """Exponential moving average; a young one forgets faster, so the start does not linger."""
        decay = min(self._rule.average_decay, round_number / (round_number + 9))
        old = self._slots.get("average", self.weights)
        self._slots["average"] = {
            name: (decay * old[name] + (1 - decay) * array).astype(np.float32)
            for name, array in self.weights.items()
        }


def check_update(update: Arrays, like: Arrays, largest_norm: float | None) -> float:
    """The L2 norm of an update that can be aggregated.

    Raises:
        UpdateError: if parameters or shapes differ from the model's, a number is not finite, or
            the norm is above `largest_norm`.
    """
    if set(update) != set(like):
        raise UpdateError(
            f"parameters differ from the model's: {sorted(set(update) ^ set(like))[:3]}"
        )
    for name, array in update.items():
        if array.shape != like[name].shape:
            raise UpdateError(f"{name}: shape {array.shape}, expected {like[name].shape}")
        if not np.isfinite(array).all():
            raise UpdateError(f"{name}: not finite")
    norm = float(np.sqrt(sum(float(np.vdot(a.astype(np.float64), a)) for a in update.values())))
    if largest_norm is not None and norm > largest_norm:
        raise UpdateError(f"norm {norm:.4g} above aggregation.max_update_norm = {largest_norm:g}")
    return norm


def check_still(update: Arrays, weights: Arrays, spec: RunSpec) -> None:
    """Refuse an update that moves what the run holds still, of which a mean would not be zero.

    Raises:
        UpdateError: naming the parameter: of a sparse run, a weight that is zero in `weights`; of
            one that trains the last layer, any other.
    """
    learned = models.learned(spec)
    for name, array in update.items():
        if name not in learned and np.any(array):
            raise UpdateError(f"{name}: moved, and model.trained is {spec.model.trained!r}")
        if spec.model.sparse and np.any(array[weights[name] == 0]):
            raise UpdateError(f"{name}: moved where the global model is zero; the run is sparse")
