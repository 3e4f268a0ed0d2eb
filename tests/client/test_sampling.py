"""Poisson sampling: each patient by itself, at each step, with the public probability.

How often a patient is included says nothing: shuffled batches pass that exactly, and have no
amplification. What tells them apart is how inclusions vary *together*. X below is what a real
trainer drew, (steps, patients) of 0 and 1; with Y = X - q, any two different entries of Y are
uncorrelated, so that a sum of M products of two of them has the variance M (q (1 - q))^2.

Each check returns a p-value under right sampling; the seeds are fixed. The right sampler passes
at `UNLIKELY`, and each planted one must be `IMPOSSIBLE` for the checks that are named with it.
"""

from __future__ import annotations

from collections.abc import Callable
from multiprocessing import get_context
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy import stats

from common.noise import Keystream
from common.spec import RunSpec

PATIENTS, BATCH, DECLARED = 120, 30, 300
RATE = BATCH / DECLARED  # not 30 / 120: the real number has no part in it
ROUNDS, STEPS = 60, 20
UNLIKELY, IMPOSSIBLE = 1e-5, 1e-9

Drawn = NDArray[np.int8]
Check = Callable[[Drawn], float]


def inclusion(drawn: Drawn) -> float:
    """The blind one: how often patients are included, over all."""
    return float(stats.binomtest(int(drawn.sum()), drawn.size, RATE).pvalue)


def variance_of_size(drawn: Drawn) -> float:
    """The batch's size has the variance N q (1 - q): two-sided, by chi-squared over the steps."""
    expected, count = drawn.shape[1] * RATE, len(drawn)
    total = np.square(drawn.sum(axis=1) - expected).sum() / (expected * (1 - RATE))
    return float(2 * min(stats.chi2.sf(total, count), stats.chi2.cdf(total, count)))


def products(first: NDArray[Any], second: NDArray[Any]) -> float:
    score = (first * second).sum() / (np.sqrt(first.size) * RATE * (1 - RATE))
    return float(2 * stats.norm.sf(abs(score)))


def across_steps(drawn: Drawn, lags: tuple[int, ...] = (1, 2, 3, 4, 10, STEPS)) -> float:
    """A patient's inclusion says nothing of the same patient's in a later step or round."""
    centred = drawn - RATE
    return min(1.0, len(lags) * min(products(centred[:-lag], centred[lag:]) for lag in lags))


def across_patients(drawn: Drawn, gaps: tuple[int, ...] = (1, 2, 7, 40)) -> float:
    """Nor of another patient's in the same step."""
    centred = drawn - RATE
    return min(1.0, len(gaps) * min(products(centred[:, :-gap], centred[:, gap:]) for gap in gaps))


def between(drawn: Drawn, other: Drawn) -> float:
    """Nor of the same patient's in the same step of another process."""
    return products(drawn - RATE, other - RATE)


SEEING: list[Check] = [variance_of_size, across_steps, across_patients]


class Draws:
    """Runs rounds of a real trainer on a cohort that remembers who was asked for."""

    def __init__(self, trainer: Any, cohort: Any, weights: Any) -> None:
        self._trainer, self._cohort, self._weights = trainer, cohort, weights
        patients = range(len(cohort.patients))
        self._owner = {int(row): patient for patient in patients for row in cohort.rows_of(patient)}
        self.images: list[int] = []

    def __call__(self, rounds: int, keystream: Callable[[int], Keystream]) -> Drawn:
        return np.concatenate([self.round(number, keystream(number)) for number in range(rounds)])

    def round(self, number: int, keystream: Keystream) -> Drawn:
        """(steps, patients): the patients of each step, as their images were read."""
        self._cohort.reads.clear()
        result = self._trainer.train(self._weights, 1 + number % 3, keystream)
        drawn = np.zeros((len(result.sampled), len(self._cohort.patients)), dtype=np.int8)
        images = [row for rows in self._cohort.reads for row in rows]
        steps = np.repeat(np.arange(len(drawn)), result.sampled)
        for step, image in zip(steps, images, strict=True):
            drawn[step, self._owner[image]] += 1
        self.images += images
        return drawn


@pytest.fixture
def make_draws(
    make_spec: Any,
    make_trainer: Any,
    array_cohort: Any,
    global_weights: Any,
    linear_network: str,
) -> Callable[..., Draws]:
    def make(patients: int = PATIENTS, **changes: Any) -> Draws:
        spec: RunSpec = make_spec(
            model={"name": linear_network},
            input={"height": 8, "width": 8},
            local={"steps": STEPS, "batch_size": BATCH} | changes,
        )
        rows = [list(range(3 * p, 3 * p + 1 + p % 3)) for p in range(patients)]
        images = np.zeros((3 * patients, 1, 8, 8), dtype=np.float32)
        cohort = array_cohort(images, np.zeros(3 * patients, dtype=np.int64), rows)
        trainer = make_trainer(spec, cohort, DECLARED, physical_images=8)
        return Draws(trainer, cohort, global_weights(spec))

    return make


def by_seed(seed: int) -> Callable[[int], Keystream]:
    return lambda number: Keystream.seeded(seed, "sampling", number)


def test_patients_are_drawn_independently_at_the_declared_rate(make_draws) -> None:
    draws = make_draws()
    drawn = draws(ROUNDS, by_seed(1))  # each round with a keystream of its own
    assert drawn.shape == (ROUNDS * STEPS, PATIENTS)
    assert set(np.unique(drawn)) == {0, 1}  # no patient twice in a step
    assert inclusion(drawn) > UNLIKELY
    for check in SEEING:
        assert check(drawn) > UNLIKELY, check.__name__
    assert evenness(drawn.sum(axis=0)) > UNLIKELY

    of_three = [image % 3 for image in draws.images if image // 3 % 3 == 2]
    assert stats.chisquare(np.bincount(of_three, minlength=3)).pvalue > UNLIKELY


def evenness(counts: NDArray[np.int64]) -> float:
    """Whether every patient is included as often as chance has it: no more even, and no less."""
    steps = ROUNDS * STEPS
    chi = np.square(counts - steps * RATE).sum() / (steps * RATE * (1 - RATE))
    return float(2 * min(stats.chi2.sf(chi, len(counts)), stats.chi2.cdf(chi, len(counts))))


@pytest.mark.parametrize("real", [20, 60, 240])
def test_the_rate_follows_from_the_declared_size_whatever_the_real_one(make_draws, real) -> None:
    drawn = make_draws(patients=real)(12, by_seed(2))
    assert inclusion(drawn) > UNLIKELY
    assert variance_of_size(drawn) > UNLIKELY
    of_the_real_size = min(1.0, BATCH / real)
    assert stats.binomtest(int(drawn.sum()), drawn.size, of_the_real_size).pvalue < IMPOSSIBLE


def test_a_batch_is_never_truncated_filled_or_drawn_again(make_draws) -> None:
    """A batch of less than one patient expected is empty as often as it should be."""
    drawn = make_draws(patients=20, batch_size=6)(30, by_seed(3))  # 0.4 patients expected
    sizes = drawn.sum(axis=1)
    seen = np.bincount(np.minimum(sizes, 3), minlength=4)
    chances = stats.binom.pmf(range(3), 20, 6 / DECLARED)
    expected = len(drawn) * np.array([*chances, 1 - chances.sum()])
    assert stats.chisquare(seen, expected).pvalue > UNLIKELY
    filled = seen[1:] * len(drawn) / seen[1:].sum()  # as a sampler would that never has none
    assert stats.chisquare(np.array([0, *filled]), expected).pvalue < IMPOSSIBLE


# --- processes ---------------------------------------------------------------------------------


def in_forks(draws: Draws, keystreams: list[Callable[[int], Keystream]]) -> list[Drawn]:
    """What children of this process draw, forked while its trainer was warm."""
    context = get_context("fork")

    def child(pipe: Any, keystream: Callable[[int], Keystream]) -> None:
        torch.set_num_threads(1)
        pipe.send(draws(10, keystream))

    answers = []
    for keystream in keystreams:
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=child, args=(sender, keystream))
        process.start()
        sender.close()
        answers.append(receiver.recv())
        process.join()
    return answers


@pytest.mark.skipif(torch.cuda.is_available(), reason="autograd on CUDA does not survive a fork")
def test_forked_workers_draw_independently(make_draws) -> None:
    draws = make_draws()
    here = draws(10, lambda number: Keystream.fresh())
    first, second = in_forks(draws, [lambda number: Keystream.fresh()] * 2)
    for one, other in ((here, first), (first, second), (here, second)):
        assert between(one, other) > IMPOSSIBLE
    # The negative control: workers that share a key share their patients.
    same, again = in_forks(draws, [by_seed(5)] * 2)
    assert np.array_equal(same, again)
    assert between(same, again) < IMPOSSIBLE


# --- planted samplers, which the same checks find -----------------------------------------------


def shuffled(rng: np.random.Generator, steps: int) -> Drawn:
    """Epochs of a shuffled order, cut into batches of one size: what most code calls DP-SGD."""
    size = round(RATE * PATIENTS)
    drawn = np.zeros((steps, PATIENTS), dtype=np.int8)
    order = np.concatenate([rng.permutation(PATIENTS) for _ in range(1 + steps * size // PATIENTS)])
    for step in range(steps):
        drawn[step, order[step * size : (step + 1) * size]] = 1
    return drawn


def of_one_size(rng: np.random.Generator, steps: int) -> Drawn:
    """A fresh batch at each step, without replacement, always as large."""
    size = round(RATE * PATIENTS)
    drawn = np.zeros((steps, PATIENTS), dtype=np.int8)
    for step in range(steps):
        drawn[step, rng.choice(PATIENTS, size, replace=False)] = 1
    return drawn


def truncated(rng: np.random.Generator, steps: int) -> Drawn:
    """Poisson, but never more than a batch that memory holds."""
    drawn = poisson(rng, steps)
    for row in drawn:
        row[np.flatnonzero(row)[round(RATE * PATIENTS) :]] = 0
    return drawn


def held(rng: np.random.Generator, steps: int) -> Drawn:
    """Poisson, drawn once for every two steps."""
    return np.repeat(poisson(rng, (steps + 1) // 2), 2, axis=0)[:steps]


def the_same_each_round(rng: np.random.Generator, steps: int) -> Drawn:
    """Poisson, from a key that every round has again."""
    return np.tile(poisson(rng, STEPS), (1 + steps // STEPS, 1))[:steps]


def by_the_family(rng: np.random.Generator, steps: int) -> Drawn:
    """Neighbours enter together."""
    return np.repeat(poisson(rng, steps)[:, : PATIENTS // 2], 2, axis=1)


def poisson(rng: np.random.Generator, steps: int) -> Drawn:
    return (rng.random((steps, PATIENTS)) < RATE).astype(np.int8)


@pytest.mark.parametrize(
    ("sampler", "found_by"),
    [
        (shuffled, {variance_of_size, across_steps}),
        (of_one_size, {variance_of_size}),
        (truncated, {variance_of_size}),
        (held, {across_steps}),
        (the_same_each_round, {across_steps}),
        (by_the_family, {variance_of_size, across_patients}),
    ],
)
def test_a_planted_sampler_is_found(sampler: Any, found_by: set[Check]) -> None:
    drawn = sampler(np.random.default_rng(1), ROUNDS * STEPS)
    for check in found_by:
        assert check(drawn) < IMPOSSIBLE, check.__name__


def test_counting_inclusions_alone_is_blind_to_shuffled_batches() -> None:
    assert inclusion(shuffled(np.random.default_rng(1), ROUNDS * STEPS)) > 0.5


def test_the_checks_pass_numpy_s_own_poisson_sampling() -> None:
    drawn = poisson(np.random.default_rng(1), ROUNDS * STEPS)
    assert min(check(drawn) for check in SEEING) > UNLIKELY
