"""An audit of the whole mechanism in one run: Steinke, Nasr and Jagielski 2023 (2305.08846).

Each of many canaries is a patient who is there or not by a coin of its own. Patient j's one image
has one bright pixel, the j-th, and the network is one linear layer, so that its clipped gradient is
C along the j-th weight and nothing else; the adversary, who chooses the global weights, sends zeros
in every round. From the releases alone it guesses the coins that it is surest of. How many it gets
right bounds epsilon from below: correct code stays under what the accountant says, and code that
adds too little noise, clips wrongly or samples otherwise is caught.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats

from client import training
from client.training import PatientOptimizer
from common.accounting import epsilon, planned
from common.noise import Keystream
from common.spec import RunSpec

SIDE = 64
CANARIES = SIDE * SIDE
BATCH, DECLARED = 2048, 4096
ROUNDS, NOISE, DELTA = 12, 6.0, 1e-5
CONFIDENCE = 0.95
GUESSES = (100, 200, 400, 800, 1600)  # as many of the surest; Bonferroni over the five

Coins = NDArray[np.bool_]
Scores = NDArray[np.float64]


# --- the bound ---------------------------------------------------------------------------------


def chance_of_guessing(right: int, guesses: int, bound: float) -> float:
    """At most this probable are `right` of `guesses` under (`bound`, DELTA)-DP: theorem 5.2.

    For delta = 0 it is a binomial tail, with e^epsilon / (1 + e^epsilon) for each guess; what
    delta adds is 2 m delta times the largest mean of that tail's last terms.
    """
    each = 1 / (1 + np.exp(-bound))
    tail = stats.binom.sf(right - 1, guesses, each)
    below = stats.binom.pmf(np.arange(right - 1, -1, -1), guesses, each).cumsum()
    steepest = (below / np.arange(1, right + 1)).max(initial=0.0)
    return float(min(1.0, tail + 2 * CANARIES * DELTA * steepest))


def lower_bound(right: int, guesses: int, doubt: float) -> float:
    """The largest epsilon that is refuted with the confidence 1 - `doubt`."""
    low, high = 0.0, 20.0
    while high - low > 1e-3:
        middle = (low + high) / 2
        refuted = chance_of_guessing(right, guesses, middle) < doubt
        low, high = (middle, high) if refuted else (low, middle)
    return low


def audit(present: Coins, scores: Scores) -> float:
    """What the scores, high for who seems present, prove about epsilon."""
    order = np.argsort(scores)
    doubt = (1 - CONFIDENCE) / len(GUESSES)
    bounds = []
    for guesses in GUESSES:
        absent, there = order[: guesses // 2], order[-guesses // 2 :]
        right = int((~present[absent]).sum() + present[there].sum())
        bounds.append(lower_bound(right, guesses, doubt))
    return max(bounds)


@pytest.mark.parametrize("true", [0.5, 1.0, 3.0])
def test_the_bound_is_below_the_truth_and_not_far(present: Coins, true: float) -> None:
    """Randomised response, whose epsilon is known."""
    stream = Keystream.seeded(7, "response")
    told = stream.uniform(CANARIES) < 1 / (1 + np.exp(-true))
    scores = np.where(told, present, ~present) + 0.1 * stream.uniform(CANARIES)
    assert 0.75 * true - 0.1 < audit(present, scores) < true


def test_guessing_at_random_proves_nothing_and_knowing_proves_much(present: Coins) -> None:
    assert audit(present, Keystream.seeded(7, "random").uniform(CANARIES)) == 0
    assert audit(present, present.astype(float)) > 5


# --- the run -----------------------------------------------------------------------------------


@dataclass
class Audit:
    claimed: float
    proved: float


@pytest.fixture
def run_audit(
    make_spec: Any, make_trainer: Any, array_cohort: Any, linear_network: str
) -> Callable[..., Audit]:
    def run(present: Coins) -> Audit:
        spec: RunSpec = make_spec(
            model={"name": linear_network},
            input={"height": SIDE, "width": SIDE, "mean": [0.0], "std": [0.01]},
            rounds=ROUNDS,
            local={"batch_size": BATCH},
            privacy={"noise_multiplier": NOISE, "delta": DELTA},
        )
        images = np.eye(CANARIES, dtype=np.float32).reshape(CANARIES, 1, SIDE, SIDE)
        rows = [[int(row)] for row in np.flatnonzero(present)]
        cohort = array_cohort(images, np.ones(CANARIES, dtype=np.int64), rows)
        trainer = make_trainer(spec, cohort, DECLARED)
        zeros = {"1.weight": np.zeros((1, CANARIES), dtype=np.float32)}
        scores = np.zeros(CANARIES)
        for number in range(1, ROUNDS + 1):
            released = trainer.train(zeros, number, Keystream.seeded(7, "audit", number)).update
            scores += released["1.weight"][0]  # the label is 1, so a step goes up
        mechanism = planned(spec, DECLARED)
        assert mechanism is not None
        return Audit(epsilon([mechanism], DELTA), audit(present, scores))

    return run


@pytest.fixture
def present() -> Coins:
    return Keystream.seeded(7, "coins").uniform(CANARIES) < 0.5


def test_the_bound_of_correct_code_stays_under_epsilon(run_audit, present) -> None:
    seen = run_audit(present)
    assert 0.1 < seen.proved < seen.claimed


class AQuarterOfTheNoise(PatientOptimizer):
    def __init__(self, *args: Any, **settings: Any) -> None:
        settings["noise_multiplier"] /= 4
        super().__init__(*args, **settings)


class ClippedTooLate(PatientOptimizer):
    """Each patient clipped to 4 C, under noise for C."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        settings["clip_norm"] *= 4
        settings["noise_multiplier"] /= 4
        super().__init__(*args, **settings)


@pytest.mark.parametrize("fault", [AQuarterOfTheNoise, ClippedTooLate])
def test_a_planted_fault_is_proved(run_audit, present, monkeypatch, fault) -> None:
    monkeypatch.setattr(training, "PatientOptimizer", fault)
    seen = run_audit(present)
    assert seen.proved > seen.claimed
