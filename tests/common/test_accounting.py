"""What a run costs, against published figures, closed forms and three independent accountants."""

from __future__ import annotations

import itertools
import math
import re
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import pytest
from dp_accounting import NeighboringRelation
from dp_accounting.pld import PLDAccountant, privacy_loss_distribution
from opacus.accountants import GaussianAccountant, IAccountant, PRVAccountant, RDPAccountant
from scipy.optimize import brentq
from scipy.stats import norm

from common import accounting
from common.accounting import (
    SubsampledGaussian,
    epsilon,
    epsilon_at_order,
    epsilon_by_renyi,
    noise_for,
    planned,
    sampling_rate,
)
from common.errors import SpecError
from common.spec import RunSpec

ROOT = Path(__file__).parents[2]
ROOMS = ("client", "common", "deploy", "server")
PRV_ERROR = 0.01  # what Opacus adds on top, so that its figure is an upper bound
GRID = 1e-4  # the grid of our privacy losses

MakeSpec = Callable[..., RunSpec]
ROW = tuple[float, float, int, float]

# q, sigma, T, delta: by Renyi, by PRV, by PLD; computed once with Opacus 1.6.0 and
# dp-accounting 0.6.0 from the command line of each, and rounded to three decimals.
KNOWN: list[tuple[ROW, float, float, float]] = [
    ((0.01, 1.0, 1000, 1e-5), 2.101, 1.838, 1.828),
    ((0.032, 1.1, 300, 1e-5), 3.349, 2.990, 2.980),
    ((0.1, 2.0, 500, 1e-5), 6.034, 5.566, 5.556),
    ((0.01, 0.6, 1000, 1e-5), 8.666, 7.444, 7.434),
    ((0.25, 4.0, 100, 1e-5), 2.935, 2.701, 2.691),
    ((0.01, 1.0, 1000, 1e-6), 2.437, 2.135, 2.125),
]
ROWS = [row for row, *_ in KNOWN] + [(0.5, 3.0, 40, 1e-4), (1.0, 8.0, 30, 1e-4)]


def of(rate: float, noise: float, steps: int = 1) -> SubsampledGaussian:
    return SubsampledGaussian(rate, noise, steps, "patient")


def by_opacus(accountant: IAccountant, mechanisms: list[SubsampledGaussian], delta: float) -> float:
    accountant.history = [(m.noise_multiplier, m.sampling_rate, m.steps) for m in mechanisms]
    return float(accountant.get_epsilon(delta))


@lru_cache
def optimistic(rate: float, noise: float, steps: int, delta: float) -> float:
    """A lower bound on the truth: every privacy loss rounded down to the grid."""
    one = privacy_loss_distribution.from_gaussian_mechanism(
        noise,
        sampling_prob=rate,
        pessimistic_estimate=False,
        use_connect_dots=False,
        value_discretization_interval=GRID,
    )
    return float(one.self_compose(steps).get_epsilon_for_delta(delta))


def is_between(figure: float, row: ROW) -> bool:
    """Whether a figure lies between what is surely too little and what is surely enough."""
    rate, noise, steps, delta = row
    enough = epsilon_by_renyi([of(rate, noise, steps)], delta)
    return optimistic(rate, noise, steps, delta) <= figure <= enough


def exact_delta_of_one_step(rate: float, noise: float, bound: float) -> float:
    """delta(epsilon) of one step, from its definition: the hockey stick, in both directions.

    P is the mixture (1 - q) N(0, s^2) + q N(1, s^2), Q is N(0, s^2); P/Q rises with x.
    """

    def crossing(ratio: float) -> float:
        """Where P/Q is `ratio`."""
        if ratio <= 1 - rate:
            return -math.inf
        return noise**2 * math.log((ratio - (1 - rate)) / rate) + 0.5

    def mixture_above(x: float) -> float:
        return float((1 - rate) * norm.sf(x / noise) + rate * norm.sf((x - 1) / noise))

    adding = crossing(math.exp(bound))
    removing = crossing(math.exp(-bound))
    added = mixture_above(adding) - math.exp(bound) * norm.sf(adding / noise)
    removed = norm.cdf(removing / noise) - math.exp(bound) * (1 - mixture_above(removing))
    return float(max(added, removed))


def exact_epsilon_of_gaussian(noise: float, steps: int, delta: float) -> float:
    """Balle and Wang 2018, theorem 8: without sampling, T steps are one of sigma / sqrt(T)."""
    mu = math.sqrt(steps) / noise

    def excess(bound: float) -> float:
        left = norm.cdf(mu / 2 - bound / mu)
        return float(left - math.exp(bound) * norm.cdf(-mu / 2 - bound / mu) - delta)

    return float(brentq(excess, 0, 50))


# --- epsilon ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("row", "renyi", "prv", "pld"), KNOWN)
def test_known_values(row: ROW, renyi: float, prv: float, pld: float) -> None:
    rate, noise, steps, delta = row
    mechanism = of(rate, noise, steps)
    assert epsilon([mechanism], delta) == pytest.approx(pld, abs=6e-4)
    # Opacus' Renyi orders are finer than Google's at high epsilon.
    assert epsilon_by_renyi([mechanism], delta) == pytest.approx(renyi, rel=2e-3)
    assert by_opacus(PRVAccountant(), [mechanism], delta) == pytest.approx(prv, abs=6e-4)
    assert by_opacus(RDPAccountant(), [mechanism], delta) == pytest.approx(renyi, abs=6e-4)


@pytest.mark.parametrize("row", ROWS)
def test_the_figure_lies_between_the_optimistic_bound_and_renyi(row: ROW) -> None:
    rate, noise, steps, delta = row
    assert is_between(epsilon([of(rate, noise, steps)], delta), row)


@pytest.mark.filterwarnings("ignore:divide by zero encountered in log")  # Opacus, at q = 1
@pytest.mark.parametrize("row", ROWS)
def test_the_figure_agrees_with_opacus_prv(row: ROW) -> None:
    """PRV is above the truth by at most its error on either side; so neither may be far off."""
    rate, noise, steps, delta = row
    mechanisms = [of(rate, noise, steps)]
    ours = epsilon(mechanisms, delta)
    assert abs(by_opacus(PRVAccountant(), mechanisms, delta) - ours - PRV_ERROR) < 2e-3


@pytest.mark.filterwarnings("ignore:GDP accounting is experimental")
@pytest.mark.parametrize("row", [row for row in ROWS if row[0] < 0.05])
def test_the_gaussian_limit_is_found_to_be_no_bound(row: ROW) -> None:
    """The negative control: GDP's figure, which lies below what is surely too little."""
    rate, noise, steps, delta = row
    accountant = GaussianAccountant()
    accountant.history = [(noise, rate, steps)]
    assert not is_between(accountant.get_epsilon(delta), row)


@pytest.mark.parametrize(("rate", "noise"), [(0.01, 0.7), (0.1, 1.0), (0.5, 2.0), (0.9, 4.0)])
@pytest.mark.parametrize("delta", [1e-3, 1e-5])
def test_one_step_is_its_closed_form(rate: float, noise: float, delta: float) -> None:
    ours = epsilon([of(rate, noise)], delta)
    assert exact_delta_of_one_step(rate, noise, ours) <= delta
    assert exact_delta_of_one_step(rate, noise, ours - 2 * GRID) > delta


@pytest.mark.parametrize(("noise", "steps"), [(1.0, 1), (8.0, 30), (20.0, 500)])
def test_without_sampling_it_is_the_closed_form(noise: float, steps: int) -> None:
    exact = exact_epsilon_of_gaussian(noise, steps, 1e-5)
    assert exact <= epsilon([of(1.0, noise, steps)], 1e-5) <= exact + 2e-3


def test_nothing_done_costs_nothing() -> None:
    assert epsilon([], 1e-5) == 0


def test_order_and_grouping_do_not_matter() -> None:
    parts = [of(0.01, 1.0, 30), of(0.02, 1.2, 10), of(0.01, 1.0, 20), of(0.05, 2.0, 7)]
    together = epsilon([of(0.01, 1.0, 50), of(0.02, 1.2, 10), of(0.05, 2.0, 7)], 1e-5)
    assert together > epsilon(parts[:2], 1e-5)
    for order in itertools.permutations(parts):
        assert epsilon(order, 1e-5) == pytest.approx(together, abs=1e-9)
    split = [of(0.01, 1.0, 1)] * 50 + parts[1:2] + parts[3:]
    assert epsilon(split, 1e-5) == pytest.approx(together, abs=1e-9)
    assert by_opacus(PRVAccountant(), parts, 1e-5) == pytest.approx(together + PRV_ERROR, abs=2e-3)


def test_the_unit_is_not_a_matter_of_arithmetic() -> None:
    patients = of(0.2, 4.0, 10)
    images = replace(patients, unit="image")
    assert epsilon([patients], 1e-5) == epsilon([images], 1e-5)
    assert epsilon([patients, images], 1e-5) == pytest.approx(epsilon([of(0.2, 4.0, 20)], 1e-5))


@pytest.mark.parametrize(
    ("less", "more"),
    [
        (of(0.05, 1.5, 100), of(0.05, 1.5, 101)),
        (of(0.05, 1.5, 100), of(0.051, 1.5, 100)),
        (of(0.05, 1.5, 100), of(0.05, 1.49, 100)),
    ],
    ids=["steps", "sampling rate", "less noise"],
)
def test_more_of_anything_costs_more(less: SubsampledGaussian, more: SubsampledGaussian) -> None:
    for figure in (epsilon, epsilon_by_renyi, lambda m, d: epsilon_at_order(m, d, 8)):
        assert figure([less], 1e-5) < figure([more], 1e-5)


def test_a_fixed_order_adds_up_and_is_never_below_the_best_order() -> None:
    """Divergences add, and the conversion adds a constant: a filter may stop at a sum."""
    first, second = of(0.01, 1.0, 300), of(0.05, 2.0, 100)

    def at_order(*mechanisms: SubsampledGaussian) -> float:
        return epsilon_at_order(mechanisms, 1e-5, 8)

    one, two, both = at_order(first), at_order(second), at_order(first, second)
    twice = at_order(first, first)
    assert both - one == pytest.approx(at_order(first, second, second) - both)
    assert twice - one == pytest.approx(at_order(first, second, first) - both)
    assert both < one + two  # the constant is paid once
    assert epsilon([first, second], 1e-5) <= epsilon_by_renyi([first, second], 1e-5) <= both


@pytest.mark.parametrize(
    "wrong",
    [
        {"sampling_rate": 0.0},
        {"sampling_rate": 1.0001},
        {"sampling_rate": math.nan},
        {"noise_multiplier": 0.0},
        {"noise_multiplier": -1.0},
        {"noise_multiplier": math.inf},
        {"noise_multiplier": math.nan},
        {"steps": 0},
    ],
    ids=str,
)
def test_a_mechanism_that_is_none_cannot_be_made(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        replace(of(0.1, 1.0, 10), **wrong)  # type: ignore[arg-type]


# --- the noise for a target ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rate", "steps", "target", "delta"),
    [(0.01, 1000, 1.0, 1e-5), (0.25, 150, 8.0, 1e-4), (1.0, 10, 2.0, 1e-4)],
)
def test_noise_keeps_the_target_and_is_no_more_than_needed(
    rate: float, steps: int, target: float, delta: float
) -> None:
    noise = noise_for(rate, steps, target, delta)
    assert noise == round(noise, 3)
    assert epsilon([of(rate, noise, steps)], delta) <= target
    # The search uses a coarser, larger figure: what it wastes stays below half a per cent.
    assert epsilon([of(rate, noise - 0.001, steps)], delta) > 0.995 * target


def test_a_target_that_no_noise_reaches_is_refused() -> None:
    with pytest.raises(SpecError, match=r"target_epsilon = 1e-06 .* out of reach for 1000 steps"):
        noise_for(1.0, 1000, 1e-6, 1e-9)


# --- what a site will do ---------------------------------------------------------------------


def test_the_plan_follows_from_the_spec_and_the_declared_size(make_spec: MakeSpec) -> None:
    spec = make_spec(rounds=6, local={"steps": 5, "batch_size": 32}, privacy={"unit": "patient"})
    assert sampling_rate(spec, 320) == 0.1
    assert planned(spec, 320) == SubsampledGaussian(0.1, 1.0, 30, "patient")
    assert planned(spec, 640) == SubsampledGaussian(0.05, 1.0, 30, "patient")
    assert planned(spec, 32) == SubsampledGaussian(1.0, 1.0, 30, "patient")


def test_the_unit_of_the_spec_is_the_unit_of_the_plan(make_spec: MakeSpec) -> None:
    plan = planned(make_spec(privacy={"unit": "image"}), 100)
    assert plan is not None
    assert plan.unit == "image"


def test_noise_follows_from_the_target_and_the_declared_size(make_spec: MakeSpec) -> None:
    privacy = {"mechanism": "dp-sgd", "target_epsilon": 2.0, "delta": 1e-4}
    spec = make_spec(rounds=50, local={"steps": 4, "batch_size": 20}, privacy=privacy)
    small, large = planned(spec, 100), planned(spec, 1000)
    assert small is not None
    assert large is not None
    assert small.noise_multiplier > large.noise_multiplier
    for plan in (small, large):
        assert plan.steps == 200
        assert 1.98 < epsilon([plan], 1e-4) <= 2.0


def test_no_privacy_has_no_mechanism(make_spec: MakeSpec) -> None:
    assert planned(make_spec(privacy={"mechanism": "none"}), 100) is None


@pytest.mark.parametrize("size", [10_000, 10_001, 1_000_000])
def test_delta_not_below_one_in_the_declared_size_is_refused(
    make_spec: MakeSpec, size: int
) -> None:
    with pytest.raises(SpecError, match=r"privacy\.delta = 0\.0001: expected below 1 / declared"):
        planned(make_spec(privacy={"delta": 1e-4}), size)


def test_delta_just_below_one_in_the_declared_size_is_taken(make_spec: MakeSpec) -> None:
    assert planned(make_spec(privacy={"delta": 1e-4}), 9_999) is not None


def test_a_batch_above_the_declared_size_is_refused(make_spec: MakeSpec) -> None:
    spec = make_spec(local={"batch_size": 33})
    for ask in (planned, sampling_rate):
        with pytest.raises(SpecError, match=r"batch_size = 33: a site declares 32 patients"):
            ask(spec, 32)


# --- what is never used ----------------------------------------------------------------------


def test_no_product_file_names_the_accountant_of_the_gaussian_limit() -> None:
    forbidden = re.compile(r"GaussianAccountant|accountants\.gdp|[\"']gdp[\"']|poisson_sampling")
    sources = [path for room in ROOMS for path in (ROOT / room).rglob("*.py")]
    assert accounting.__file__ in map(str, sources)
    assert [path for path in sources if forbidden.search(path.read_text())] == []
    assert forbidden.search(Path(__file__).read_text())  # it is found where it is


def test_next_to_no_noise_costs_a_bound_and_not_the_machine() -> None:
    """PLD of these would take gigabytes; Renyi's bound says as much: no privacy to speak of."""
    tracemalloc.start()
    spent = [SubsampledGaussian(0.5, 0.01, 1000, "patient")]
    assert epsilon(spent, 1e-5) == epsilon_by_renyi(spent, 1e-5) > 1e4
    assert tracemalloc.get_traced_memory()[1] < 2**28
    tracemalloc.stop()


def test_replacing_a_patient_costs_more_than_the_printed_figure() -> None:
    """The figure of docs/privacy.md, by the same accountant under the other adjacency."""
    mechanism = SubsampledGaussian(0.01, 1.0, 1000, "patient")
    replacing = PLDAccountant(NeighboringRelation.REPLACE_ONE)
    replacing.compose(mechanism.event, mechanism.steps)
    assert replacing.get_epsilon(1e-5) == pytest.approx(2.84, abs=0.01)
    assert epsilon([mechanism], 1e-5) == pytest.approx(1.83, abs=0.01)
