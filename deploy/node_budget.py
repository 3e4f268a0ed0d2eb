"""What a site's ledger adds up to, for a person: by run, over time, and against the budget.

Shares are parts of the divergence that the budget allows at its order: they add up to the whole,
which epsilons do not.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import NamedTuple

from client.book import Book, Limit, RunBook, Step
from common import accounting

MOST_MECHANISMS = 16
"""Distinct ones up to which PLD is reckoned unasked: some hundredths of a second each."""

_DAYS, _MONTHS = 31, 36


class RunShare(NamedTuple):
    """One run's part of the budget.

    Attributes:
        digest, name: of the run.
        state: ``open``, ``lapsed``, ``closed``, or empty.
        attempted: rounds that were attempted, of all its parts.
        rounds: rounds that were set aside.
        spent, aside: parts of the whole budget.
    """

    digest: str
    name: str
    state: str
    attempted: int
    rounds: int
    spent: float
    aside: float


class Span(NamedTuple):
    """A day, month or year, and the part of the whole budget that was spent in it."""

    label: str
    spent: float


@dataclass(frozen=True)
class Figures:
    """The state of a budget; `spent`, `carried` and `aside` are parts of the whole.

    ``epsilon`` is what counts now, ``epsilon_spent`` without what is set aside, both at the
    filter's order.
    """

    limit: Limit
    spent: float
    carried: float
    aside: float
    epsilon: float
    epsilon_spent: float
    runs: tuple[RunShare, ...]
    spans: tuple[Span, ...]

    @property
    def left(self) -> float:
        """Part of the budget that nothing stands against; never below 0."""
        return max(0.0, 1 - self.spent - self.carried - self.aside)


def figures(book: Book, limit: Limit) -> Figures:
    """What `book` adds up to under `limit`."""
    whole = allowed(limit)
    cost = _Costs(limit.order, whole)
    runs = tuple(_run(digest, run, cost) for digest, run in book.runs.items() if run.last)
    spent, carried = sum(run.spent for run in runs), book.carried / whole
    aside = sum(run.aside for run in runs)
    now = accounting.epsilon_of((spent + carried + aside) * whole, limit.delta, limit.order)
    done = accounting.epsilon_of((spent + carried) * whole, limit.delta, limit.order)
    ranked = tuple(sorted(runs, key=lambda run: (-run.spent - run.aside, run.name)))
    return Figures(limit, spent, carried, aside, now, done, ranked, _spans(book, cost))


def allowed(limit: Limit) -> float:
    """The divergence that a budget allows."""
    return accounting.divergence_within(limit.epsilon, limit.delta, limit.order)


def fixed_in_advance(book: Book, limit: Limit, *, however_long: bool = False) -> float | str:
    """The epsilon of the whole history by PLD, or why there is none, in words."""
    if book.carried:
        return "no figure by PLD: what was carried over has no mechanism"
    spent = book.spent()
    if len(spent) > MOST_MECHANISMS and not however_long:
        return f"no figure by PLD: {len(spent)} distinct mechanisms take a while; say --pld"
    return accounting.epsilon(spent, limit.delta)


class _Costs(dict[Step, float]):
    """The part of the whole budget that one step takes, reckoned once for each."""

    def __init__(self, order: float, whole: float) -> None:
        super().__init__()
        self._order, self._whole = order, whole

    def __missing__(self, step: Step) -> float:
        mechanism = accounting.SubsampledGaussian(
            step.sampling_rate, step.noise_multiplier, 1, step.unit
        )
        self[step] = accounting.divergence(mechanism, self._order) / self._whole
        return self[step]


def _run(digest: str, run: RunBook, cost: _Costs) -> RunShare:
    spent = sum(cost[step] * steps for step, steps in run.steps.items())
    aside = 0.0
    for part, (_, mechanism, _) in run.shares.items():
        step = Step(mechanism.sampling_rate, mechanism.noise_multiplier, mechanism.unit)
        aside += cost[step] * mechanism.steps * run.remaining(part)
    rounds = sum(share.rounds for share in run.shares.values())
    attempted = sum(run.attempted.values())
    return RunShare(digest, run.name, run.state, attempted, rounds, spent, aside)


def _spans(book: Book, cost: _Costs) -> tuple[Span, ...]:
    """By day, month or year: whichever still fits on a screen."""
    by_day: defaultdict[str, float] = defaultdict(float)
    for time, _, step, steps in book.charges:
        if step is not None:
            by_day[time[:10]] += cost[step] * steps
    found = dict(by_day)
    for length, most in ((7, _DAYS), (4, _MONTHS)):
        if len(found) <= most:
            break
        merged: defaultdict[str, float] = defaultdict(float)
        for label, spent in found.items():
            merged[label[:length]] += spent
        found = dict(merged)
    return tuple(Span(label, spent) for label, spent in sorted(found.items()))
