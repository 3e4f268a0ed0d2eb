"""What privacy a run costs: mechanisms as frozen events, and the epsilon that they add up to.

The figure that Cloister prints is the pessimistic one of privacy loss distributions (PLD;
Koskela et al. 2020, Doroshenko et al. 2022) from Google's dp-accounting, for adding or removing
one unit's whole record. It holds for mechanisms fixed in advance, as those of one run are. The
GDP accountant is never used: it lies below the truth (docs/privacy.md 9).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import lru_cache, reduce
from itertools import groupby
from typing import Literal, NamedTuple

import dp_accounting
from dp_accounting import rdp
from dp_accounting.pld import privacy_loss_distribution
from dp_accounting.pld.privacy_loss_distribution import PrivacyLossDistribution as _Losses

from common.errors import SpecError
from common.spec import DpSgd, RunSpec

Unit = Literal["patient", "image"]

_SMALLEST_NOISE, _LARGEST_NOISE = 0.2, 1e5
_MEANINGLESS = 100.0
_MOST_KINDS = 128
_FEW_KINDS = 16
_GRID = 5e-4  # of privacy losses
_AT_ONCE = 1000  # steps: dp-accounting raises a size to this power, as an exact whole number
_ORDERS = (*(n / 4 for n in range(8, 32)), *range(8, 17), 20, 24, 28, 32, 48, 64, 96, 128, 256)


Part = Literal["training", "evaluation"]
"""What of a run a mechanism serves."""


@dataclass(frozen=True, order=True)
class SubsampledGaussian:
    """The mechanism of DP-SGD, as its definition.

    `steps` times: take each unit independently with probability `sampling_rate`, sum their
    vectors of L2 norm at most C, and add Gaussian noise of standard deviation
    `noise_multiplier` x C to each coordinate.
    """

    sampling_rate: float
    noise_multiplier: float
    steps: int
    unit: Unit

    def __post_init__(self) -> None:
        if not 0 < self.sampling_rate <= 1:
            raise ValueError(f"sampling_rate = {self.sampling_rate}: expected 0 < q <= 1")
        if not (self.noise_multiplier > 0 and math.isfinite(self.noise_multiplier)):
            raise ValueError(f"noise_multiplier = {self.noise_multiplier}: expected a number > 0")
        if self.steps < 1:
            raise ValueError(f"steps = {self.steps}: expected at least 1")

    def of_steps(self, steps: int) -> SubsampledGaussian:
        """The same mechanism, taken `steps` times."""
        return replace(self, steps=steps)

    @property
    def event(self) -> dp_accounting.DpEvent:
        """One step, as dp-accounting writes it."""
        return dp_accounting.PoissonSampledDpEvent(
            self.sampling_rate, dp_accounting.GaussianDpEvent(self.noise_multiplier)
        )


def epsilon(mechanisms: Iterable[SubsampledGaussian], delta: float) -> float:
    """The epsilon of all `mechanisms` together at `delta`, by pessimistic PLD (0 for none).

    Never above the Renyi bound, which holds as well. That bound alone is the answer where it is
    beyond 100, which means as little and would take PLD gigabytes to say, and for more than 128
    different mechanisms, where PLD would take long.
    """
    return _epsilon(_merged(mechanisms), delta)


def epsilon_by_renyi(mechanisms: Iterable[SubsampledGaussian], delta: float) -> float:
    """The same by Renyi differential privacy: an independent, looser upper bound.

    It is the best of the orders from 2 to 256. Below 2, dp-accounting's divergence of a sampled
    mechanism is far above the true one where the order is no whole number, or infinite.
    """
    accountant = rdp.RdpAccountant(orders=_ORDERS)
    for mechanism in _merged(mechanisms):
        accountant.compose(mechanism.event, mechanism.steps)
    return float(accountant.get_epsilon(delta))


def epsilon_at_order(mechanisms: Iterable[SubsampledGaussian], delta: float, order: float) -> float:
    """The Renyi bound at one fixed order, which stays valid when mechanisms are chosen adaptively.

    Feldman and Zrnic 2021 (arXiv:2008.11193): a filter on the sum of divergences at that order.
    """
    return epsilon_of(sum(divergence(mechanism, order) for mechanism in mechanisms), delta, order)


def divergence(mechanism: SubsampledGaussian, order: float) -> float:
    """The Renyi divergence of `order` of all the mechanism's steps: what a filter adds up."""
    one = mechanism.sampling_rate, mechanism.noise_multiplier
    return mechanism.steps * _divergence_of_a_step(*one, order)


def epsilon_of(total: float, delta: float, order: float) -> float:
    """The epsilon at `delta` of a total Renyi divergence (0 for none; Canonne et al. 2020)."""
    return float(rdp.compute_epsilon([order], [total], delta)[0])


def divergence_within(epsilon: float, delta: float, order: float) -> float:
    """The total Renyi divergence that (epsilon, delta) allows at `order`; below 0: none at all."""
    return epsilon - _conversion(delta, order)


def filter_order(epsilon: float, delta: float) -> float:
    """The order at which (epsilon, delta) allows the most steps of a Gaussian mechanism.

    Its divergence grows as the order, so this is where the allowed divergence over the order is
    greatest. Orders from 2 to 256 are looked at, in steps of a quarter up to 16 (see
    `epsilon_by_renyi` for those below).
    """
    orders = [n / 4 for n in range(8, 65)] + [float(n) for n in range(17, 257)]
    return max(orders, key=lambda order: divergence_within(epsilon, delta, order) / order)


def planned(spec: RunSpec, declared_size: int) -> SubsampledGaussian | None:
    """What a site of `declared_size` units does if it takes part in every round of `spec`.

    Returns:
        The mechanism, or None where the spec says ``mechanism = "none"``.

    Raises:
        SpecError: if the run makes no sense at that size: q above 1, delta not below 1 / size,
            or a target that no noise reaches.
    """
    privacy, rate = spec.privacy, sampling_rate(spec, declared_size)
    if not isinstance(privacy, DpSgd):
        return None
    if privacy.delta >= 1 / declared_size:
        raise SpecError(
            f"privacy.delta = {privacy.delta}: expected below 1 / declared size = "
            f"{1 / declared_size:.3g} of a site that declares {declared_size}"
        )
    noise = privacy.noise_multiplier
    if noise is None:
        target = privacy.target_epsilon or 0.0
        besides = evaluation_of(spec)
        noise = noise_for(rate, spec.total_steps, target, privacy.delta, besides=besides)
    return SubsampledGaussian(rate, noise, spec.total_steps, privacy.unit)


class Share(NamedTuple):
    """What one part of a run does at a site: `mechanism`, once in each of `rounds` rounds."""

    part: Part
    mechanism: SubsampledGaussian
    rounds: int

    @property
    def whole(self) -> SubsampledGaussian:
        """Over all rounds."""
        return self.mechanism.of_steps(self.mechanism.steps * self.rounds)


def shares(spec: RunSpec, declared_size: int) -> tuple[Share, ...]:
    """Everything private that a site of `declared_size` units does in `spec`; none without privacy.

    Raises:
        SpecError: as `planned`.
    """
    whole, evaluated = planned(spec, declared_size), evaluation_of(spec)
    found = []
    if whole is not None:
        found.append(Share("training", whole.of_steps(spec.local.steps), spec.rounds))
    if evaluated is not None:
        found.append(Share("evaluation", evaluated, 1))
    return tuple(found)


def evaluation_of(spec: RunSpec) -> SubsampledGaussian | None:
    """The mechanism of a run's federated evaluation: every held-out patient, once; or None."""
    federated = spec.evaluation.federated
    if federated is None:
        return None
    return SubsampledGaussian(1.0, federated.noise_multiplier, 1, spec.privacy.unit)


def sampling_rate(spec: RunSpec, declared_size: int) -> float:
    """The public q = expected batch / declared size; never from the real number of patients.

    Raises:
        SpecError: if it is above 1.
    """
    if spec.local.batch_size > declared_size:
        raise SpecError(
            f"local.batch_size = {spec.local.batch_size}: a site declares {declared_size} "
            f"{spec.privacy.unit}s, so the sampling rate would be above 1; take a smaller batch"
        )
    return spec.local.batch_size / declared_size


@lru_cache(maxsize=256)
def noise_for(
    rate: float,
    steps: int,
    target_epsilon: float,
    delta: float,
    *,
    besides: SubsampledGaussian | None = None,
) -> float:
    """The least noise multiplier, to three decimals, that keeps `steps` within the target.

    What is spent `besides` counts towards the target as well.

    Raises:
        SpecError: if not even a noise multiplier of 100,000 does.
    """

    def cost(thousandths: int) -> float:
        mechanism = SubsampledGaussian(rate, thousandths / 1000, steps, "patient")
        return _epsilon((mechanism, besides) if besides else (mechanism,), delta)

    low, high = int(_SMALLEST_NOISE * 1000), 1000
    while cost(high) > target_epsilon:
        low, high = high, high * 2
        if high > _LARGEST_NOISE * 1000:
            raise SpecError(
                f"privacy.target_epsilon = {target_epsilon} at delta = {delta} is out of reach "
                f"for {steps} steps at a sampling rate of {rate:.4g}"
            )
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if cost(middle) <= target_epsilon else (middle, high)
    return high / 1000


def _merged(mechanisms: Iterable[SubsampledGaussian]) -> tuple[SubsampledGaussian, ...]:
    """Equal steps counted together: composition does not depend on the order."""

    def kind(mechanism: SubsampledGaussian) -> tuple[float, float, Unit]:
        return mechanism.sampling_rate, mechanism.noise_multiplier, mechanism.unit

    return tuple(
        SubsampledGaussian(rate, noise, sum(mechanism.steps for mechanism in same), unit)
        for (rate, noise, unit), same in groupby(sorted(mechanisms, key=kind), key=kind)
    )


_PROBE_STEPS, _PROBE_DELTA = 10**9, 1e-100


@lru_cache(maxsize=65536)
def _divergence_of_a_step(rate: float, noise: float, order: float) -> float:
    """Read off the accountant's epsilon of very many steps, which is the divergence and a constant.

    Many steps and a tiny delta keep it clear of the roundings and short cuts for small ones.
    """
    accountant = rdp.RdpAccountant(orders=[order])
    accountant.compose(SubsampledGaussian(rate, noise, 1, "patient").event, _PROBE_STEPS)
    bound = float(accountant.get_epsilon(_PROBE_DELTA)) - _conversion(_PROBE_DELTA, order)
    return max(0.0, bound / _PROBE_STEPS)


def _conversion(delta: float, order: float) -> float:
    """What turns a divergence into an epsilon (Canonne et al. 2020, arXiv:2004.00010, Prop. 12)."""
    return math.log1p(-1 / order) - math.log(delta * order) / (order - 1)


@lru_cache(maxsize=4096)
def _epsilon(mechanisms: tuple[SubsampledGaussian, ...], delta: float) -> float:
    if not mechanisms:
        return 0.0
    bound = epsilon_by_renyi(mechanisms, delta)
    if bound > _MEANINGLESS or len(mechanisms) > _MOST_KINDS:
        return bound
    grid = _grid(mechanisms)
    losses = reduce(_Losses.compose, (_losses(mechanism, grid) for mechanism in mechanisms))
    return min(bound, float(losses.get_epsilon_for_delta(delta)))


def _losses(mechanism: SubsampledGaussian, grid: float) -> _Losses:
    """The distribution of the privacy loss of all the mechanism's steps, rounded upward."""
    one = _losses_of_a_step(mechanism.sampling_rate, mechanism.noise_multiplier, grid)
    often, rest = divmod(mechanism.steps, _AT_ONCE)
    parts = [one.self_compose(_AT_ONCE).self_compose(often)] if often else []
    return reduce(_Losses.compose, parts + ([one.self_compose(rest)] if rest else []))


@lru_cache(maxsize=64)
def _losses_of_a_step(rate: float, noise: float, grid: float) -> _Losses:
    return privacy_loss_distribution.from_gaussian_mechanism(
        noise, sampling_prob=rate, value_discretization_interval=grid
    )


def _grid(mechanisms: tuple[SubsampledGaussian, ...]) -> float:
    """How far apart the privacy losses stand that PLD counts with; it is pessimistic for any.

    What it adds grows with the grid over a step's own spread of losses: a small spread takes a
    half of the grid, down to an eighth. Many different mechanisms take one of twice the width or
    more, and so about as long as a few.
    """
    steps = sum(mechanism.steps for mechanism in mechanisms)
    spread = math.sqrt(sum(divergence(mechanism, 2) for mechanism in mechanisms) / steps)
    finer = math.ceil(math.log2(_GRID / min(max(spread / 4, _GRID / 8), _GRID)))
    coarser = math.ceil(math.log2(max(1.0, len(mechanisms) / _FEW_KINDS)))
    return _GRID * 2.0 ** (coarser - finer)
