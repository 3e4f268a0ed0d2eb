"""What a run costs, against published figures, closed forms and three independent accountants."""

from __future__ import annotations

import itertools
import math
import re
import time
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from decimal import Decimal, localcontext
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
from dp_accounting import NeighboringRelation
from dp_accounting.pld import PLDAccountant, privacy_loss_distribution
from dp_accounting.rdp import RdpAccountant
from opacus.accountants import GaussianAccountant, IAccountant, PRVAccountant, RDPAccountant
from opacus.accountants.analysis.rdp import compute_rdp
from scipy.integrate import quad
from scipy.optimize import brentq
from scipy.stats import norm

from common import accounting
from common.accounting import (
    SubsampledGaussian,
    divergence,
    divergence_within,
    epsilon,
    epsilon_at_order,
    epsilon_by_renyi,
    epsilon_of,
    filter_order,
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
def optimistic(rate: float, noise: float, steps: int, delta: float, *, grid: float = GRID) -> float:
    """A lower bound on the truth: every privacy loss rounded down to the grid."""
    one = privacy_loss_distribution.from_gaussian_mechanism(
        noise,
        sampling_prob=rate,
        pessimistic_estimate=False,
        use_connect_dots=False,
        value_discretization_interval=grid,
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


# --- many steps and many mechanisms ----------------------------------------------------------


def on_a_grid(mechanism: SubsampledGaussian, grid: float) -> float:
    """By dp-accounting's own accountant; the finer, the nearer to the truth from above."""
    accountant = PLDAccountant(value_discretization_interval=grid)
    accountant.compose(mechanism.event, mechanism.steps)
    return float(accountant.get_epsilon(1e-5))


@pytest.mark.parametrize(
    "mechanism", [of(1e-3, 2.0, 50_000), of(3e-4, 1.5, 100_000), of(1e-2, 10.0, 20_000)]
)
def test_small_steps_are_counted_finely(mechanism: SubsampledGaussian) -> None:
    truth, ours = on_a_grid(mechanism, 1e-5), epsilon([mechanism], 1e-5)
    assert truth - 1e-6 <= ours <= 1.01 * truth
    assert on_a_grid(mechanism, 5e-4) - truth > 3 * (ours - truth)  # on one grid for all


@pytest.mark.parametrize("steps", [999, 1000, 1001, 2500])
def test_steps_taken_by_the_thousand_cost_what_they_cost_at_once(steps: int) -> None:
    accountant = PLDAccountant(value_discretization_interval=5e-4)
    accountant.compose(of(0.02, 1.2).event, steps)
    assert epsilon([of(0.02, 1.2, steps)], 1e-5) == pytest.approx(
        accountant.get_epsilon(1e-5), abs=1e-6
    )


def test_ten_million_steps_are_counted_in_seconds() -> None:
    """Against the limit of many small steps: one Gaussian mechanism of sigma / (q sqrt(T))."""
    started = time.process_time()
    figure = epsilon([of(0.001, 8.0, 10**7)], 1e-5)
    assert time.process_time() - started < 10
    limit = exact_epsilon_of_gaussian(8.0 / (0.001 * math.sqrt(10**7)), 1, 1e-5)
    assert limit < figure < 1.04 * limit


def test_a_hundred_thousand_attempts_cost_what_their_sum_costs() -> None:
    kinds = [of(0.004, 4.0, 3), of(0.002, 3.0, 5), of(0.001, 2.0, 1)]
    attempts = [kinds[number % 3] for number in range(100_000)]
    counts = [33_334, 33_333, 33_333]
    started = time.process_time()
    figure = epsilon(attempts, 1e-5)
    assert time.process_time() - started < 10
    assert figure == epsilon(
        [m.of_steps(m.steps * n) for m, n in zip(kinds, counts, strict=True)], 1e-5
    )


def alike(kinds: int) -> list[SubsampledGaussian]:
    """Different mechanisms that are nearly one: 600 steps of q = 0.02, sigma 1.2 and a little."""
    return [of(0.02, 1.2 + number * 1e-7, 600 // kinds) for number in range(kinds)]


@pytest.mark.parametrize(("kinds", "waste"), [(1, 0.001), (20, 0.001), (120, 0.005)])
def test_many_different_mechanisms_are_counted_coarsely_and_upward(
    kinds: int, waste: float
) -> None:
    figure = epsilon(alike(kinds), 1e-5)
    one = epsilon(alike(1), 1e-5)
    assert optimistic(0.02, 1.2 + 1e-4, 600, 1e-5) <= figure
    assert one - 1e-6 <= figure <= one * (1 + waste)
    assert figure < epsilon_by_renyi(alike(1), 1e-5)


def test_beyond_the_most_mechanisms_renyi_is_the_answer() -> None:
    mechanisms = [of(0.02, 1.2 + number * 1e-7, 4) for number in range(150)]
    figure = epsilon(mechanisms, 1e-5)
    assert figure == epsilon_by_renyi(mechanisms, 1e-5)
    assert figure == pytest.approx(by_opacus(RDPAccountant(), alike(1), 1e-5), rel=2e-3)
    assert figure > epsilon(alike(1), 1e-5)


def test_the_figure_is_never_above_renyi_however_small_the_steps() -> None:
    """PLD would be, where a step moves the privacy loss by less than any grid shows."""
    mechanism = of(1e-6, 1.0, 10**9)
    bound = epsilon_by_renyi([mechanism], 1e-5)
    assert epsilon([mechanism], 1e-5) == bound
    assert on_a_grid(of(3e-4, 1.5, 100_000), 5e-4) > epsilon_by_renyi(
        [of(3e-4, 1.5, 100_000)], 1e-5
    )


# --- the filter ------------------------------------------------------------------------------

MECHANISMS = [
    (1e-6, 1.0),
    (1e-5, 0.8),
    (1e-4, 1.0),
    (1e-3, 0.6),
    (0.01, 1.0),
    (0.05, 0.75),
    (0.25, 0.5),
    (0.25, 0.2),
    (0.9, 4.0),
]
ORDERS = [2.0, 3.0, 8.0, 16.0, 64.0, 256.0]
PARTIAL_ORDERS = [2.25, 2.5, 3.75, 5.25, 7.5, 10.25, 15.75]
ROUNDING = 1e-16  # of a step: a budget of a million steps is off by less than 1e-9


def exact_divergence(rate: float, noise: float, order: int) -> float:
    """Mironov, Talwar and Zhang 2019, section 3.3: the binomial sum, with sixty digits."""
    with localcontext() as context:
        context.prec = 60
        q, variance = Decimal(rate), Decimal(noise) ** 2
        total = sum(
            math.comb(order, k)
            * q**k
            * (1 - q) ** (order - k)
            * (Decimal(k * k - k) / (2 * variance)).exp()
            for k in range(order + 1)
        )
        return float(Decimal(total).ln() / (order - 1))


def divergence_from_its_definition(rate: float, noise: float, order: float) -> float:
    """The moment of the likelihood ratio, integrated; the mixture is the first distribution."""

    def integrand(x: float) -> float:
        ratio = np.logaddexp(math.log1p(-rate), math.log(rate) + (2 * x - 1) / (2 * noise**2))
        return float(math.exp(order * ratio - x * x / (2 * noise**2)))

    edges = [-12 * noise, 0.0, order / 2, order, order + 12 * noise]
    parts = [quad(integrand, low, high, limit=500)[0] for low, high in itertools.pairwise(edges)]
    return math.log(sum(parts) / (noise * math.sqrt(2 * math.pi))) / (order - 1)


@pytest.mark.parametrize("order", [*ORDERS, *PARTIAL_ORDERS])
@pytest.mark.parametrize(("noise", "steps"), [(0.5, 1), (3.0, 7), (40.0, 1000)])
def test_without_sampling_the_divergence_is_its_closed_form(
    noise: float, steps: int, order: float
) -> None:
    expected = steps * order / (2 * noise**2)
    assert divergence(of(1.0, noise, steps), order) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(("rate", "noise"), MECHANISMS)
@pytest.mark.parametrize("order", ORDERS)
def test_the_divergence_at_a_whole_order_is_the_binomial_sum(
    rate: float, noise: float, order: float
) -> None:
    exact = exact_divergence(rate, noise, int(order))
    assert divergence(of(rate, noise), order) == pytest.approx(exact, rel=1e-8, abs=ROUNDING)


@pytest.mark.parametrize(
    ("rate", "noise"), [row for row in MECHANISMS if row[0] > 1e-4 and row[1] >= 0.5]
)
@pytest.mark.parametrize("order", PARTIAL_ORDERS)
def test_the_divergence_between_whole_orders_is_its_integral_or_a_little_more(
    rate: float, noise: float, order: float
) -> None:
    """dp-accounting adds up the absolute values of an alternating series there."""
    exact = divergence_from_its_definition(rate, noise, order)
    assert exact * (1 - 1e-7) <= divergence(of(rate, noise), order) <= exact * 1.02


def test_the_integral_is_the_binomial_sum_where_both_are_known() -> None:
    """The two references agree with each other; a sign or a missing term would show."""
    for order in (2, 3, 8):
        exact = exact_divergence(0.05, 0.75, order)
        assert divergence_from_its_definition(0.05, 0.75, order) == pytest.approx(exact, rel=1e-9)
        assert exact < order / (2 * 0.75**2)  # sampling does protect


@pytest.mark.parametrize(("rate", "noise"), MECHANISMS)
@pytest.mark.parametrize("order", [*ORDERS, *PARTIAL_ORDERS])
def test_what_is_read_off_the_accountant_is_what_it_holds(
    rate: float, noise: float, order: float
) -> None:
    accountant = RdpAccountant(orders=[order])
    accountant.compose(of(rate, noise).event)
    ours, held = divergence(of(rate, noise), order), float(accountant._rdp[0])
    assert ours == pytest.approx(held, rel=1e-9, abs=ROUNDING / 1e4)


@pytest.mark.parametrize(("rate", "noise"), MECHANISMS)
@pytest.mark.parametrize("order", [*ORDERS, *PARTIAL_ORDERS])
def test_the_divergence_is_not_below_that_of_opacus(
    rate: float, noise: float, order: float
) -> None:
    other = float(compute_rdp(q=rate, noise_multiplier=noise, steps=1, orders=order))
    ours = divergence(of(rate, noise), order)
    assert ours >= other * (1 - 1e-6) - 1e-14
    if order.is_integer():
        assert ours == pytest.approx(other, rel=1e-6, abs=1e-14)


def test_the_divergence_grows_with_the_rate_the_steps_the_order_and_less_noise() -> None:
    rates, noises = [1e-5, 1e-3, 0.01, 0.1, 0.5, 1.0], [8.0, 2.0, 1.0, 0.6, 0.3]
    for order, noise in itertools.product([2.0, 2.25, 7.5, 8.0, 40.0], noises):
        assert_rising([divergence(of(rate, noise), order) for rate in rates])
    for order, rate in itertools.product([2.0, 2.25, 7.5, 8.0, 40.0], rates):
        assert_rising([divergence(of(rate, noise), order) for noise in noises])
        assert_rising([divergence(of(rate, 1.0, steps), order) for steps in (1, 2, 30, 10**6)])
    for rate, noise in itertools.product(rates, noises):
        assert_rising([divergence(of(rate, noise), float(order)) for order in range(2, 65)])


def assert_rising(figures: list[float]) -> None:
    assert all(math.isfinite(figure) and figure > 0 for figure in figures)
    assert all(less < more for less, more in itertools.pairwise(figures)), figures


@pytest.mark.parametrize("delta", [1e-3, 1e-4, 1e-5, 1e-7])
@pytest.mark.parametrize("budget", [0.3, 1.0, 2.0, 3.0, 5.0, 8.0, 12.0, 20.0])
def test_the_order_lets_a_budget_go_as_far_as_any_order_does(budget: float, delta: float) -> None:
    """Against every order on a fine grid: the steps of a Gaussian mechanism that are allowed."""

    def noise_of_the_one_step(order: float) -> float:
        """The least noise that fits; the conversion is written out (Canonne et al. 2020)."""
        room = budget - math.log((order - 1) / order) + math.log(delta * order) / (order - 1)
        return math.sqrt(order / (2 * room)) if room > 0 else math.inf

    chosen = filter_order(budget, delta)
    least = min(noise_of_the_one_step(n / 200) for n in range(202, 256 * 200))
    assert least <= noise_of_the_one_step(chosen) <= 1.01 * least
    assert 2 <= chosen <= 256
    step = of(1.0, noise_of_the_one_step(chosen) * (1 + 1e-9))
    assert epsilon_at_order([step], delta, chosen) == pytest.approx(budget, rel=1e-6)
    assert epsilon([step], delta) < budget


def test_a_fixed_order_costs_ten_to_fifteen_percent_over_pld() -> None:
    """docs/privacy.md 9: what the filter wastes on runs as they are, at the budget's own order."""
    order = filter_order(3.0, 1e-5)
    for mechanism in (of(0.01, 1.0, 2500), of(0.032, 1.2, 330), of(0.1, 2.2, 190)):
        wasted = epsilon_at_order([mechanism], 1e-5, order) / epsilon([mechanism], 1e-5)
        assert 1.08 < wasted < 1.2


def test_what_a_budget_allows_is_what_its_epsilon_is_turned_back_into() -> None:
    for budget, delta, order in itertools.product((0.5, 3.0, 20.0), (1e-4, 1e-6), (2.0, 7.5, 64.0)):
        room = divergence_within(budget, delta, order)
        if room > 0:
            assert epsilon_of(room, delta, order) == pytest.approx(budget, rel=1e-12)
            assert epsilon_of(room * 1.001, delta, order) > budget
    assert divergence_within(0.05, 1e-5, 2.0) < 0
    assert epsilon_of(0.0, 1e-5, 8.0) == 0


def test_every_order_that_a_budget_takes_counts_every_mechanism() -> None:
    """None is infinite, as dp-accounting's is below 2: a run would be refused for no reason."""
    orders = {filter_order(e / 10, d) for e in range(1, 400) for d in (1e-3, 1e-5, 1e-7)}
    assert min(orders) == 2
    for order, (rate, noise) in itertools.product(sorted(orders), MECHANISMS):
        assert math.isfinite(divergence(of(rate, noise), order))
    assert divergence(of(0.05, 0.75), 1.25) == math.inf


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
