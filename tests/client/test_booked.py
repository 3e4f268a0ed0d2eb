"""What the ledger booked against what a run really drew: sampling rate, noise, steps.

A run goes through the gate as a coordinator drives it, on a site under observation: the cohort
remembers who was asked for, and every step is seen where torch's optimiser meets it. Two
accountants that agree say nothing about this; a ledger that books another mechanism than the
one that ran would satisfy both.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NoReturn, cast

import numpy as np
import pytest
import torch
from flwr.common.serde import recorddict_to_proto
from numpy.typing import NDArray
from scipy import stats

from client import training
from client.book import Book
from client.gate import Gate, Site
from client.ledger import Attempt, Ledger
from client.policy import Policy
from client.training import LocalTrainer, PatientOptimizer
from common.accounting import SubsampledGaussian, epsilon, planned
from common.errors import RefusalCode
from common.messages import Invitation, NodeCard, RefusalReply, Release, TrainTask
from common.noise import Keystream
from common.spec import RunSpec

PATIENTS, DECLARED, BATCH, STEPS, ROUNDS = 150, 200, 20, 4, 12
SIDES = {"height": 64, "width": 64}
COHORT = "c" * 64  # as `make_ledger` admits
UNLIKELY, IMPOSSIBLE = 1e-5, 1e-12  # p-values: see test_noise.py in common


def seeded(*, run_id: str, round_number: int) -> Keystream:
    return Keystream.seeded(11, run_id, round_number)


@dataclass
class Seen:
    """What an observer of a site saw of its run.

    Attributes:
        steps: of every trainer, as torch's optimiser met them.
        reads: the images that the cohort was asked for, in order.
    """

    steps: list[Any] = field(default_factory=list)
    reads: list[list[int]] = field(default_factory=list)

    def noise(self, spec: RunSpec) -> NDArray[np.float64]:
        """All that was added to sums of clipped gradients, in units of C."""
        privacy: Any = spec.privacy
        batch = spec.local.batch_size
        added = [step.gradient.astype(float) * batch - step.summed for step in self.steps]
        return np.asarray(np.concatenate(added) / privacy.clip_norm, dtype=np.float64)

    @property
    def inclusions(self) -> int:
        return sum(len(rows) for rows in self.reads)


class Node:
    """A site's gate on a ledger, which can be opened again as after a restart."""

    def __init__(self, policy: Policy, cohort: Any, make_trainer: Any, open_ledger: Any) -> None:
        self.policy, self.cohort = policy, cohort
        self.make_trainer, self.open_ledger = make_trainer, open_ledger
        self.gate = self.opened()

    def opened(self, ledger: type[Ledger] = Ledger, keystream: Any = seeded) -> Gate:
        def trainer_for(spec: RunSpec, mechanism: SubsampledGaussian | None) -> LocalTrainer:
            trainer: LocalTrainer = self.make_trainer(spec, self.cohort, DECLARED)
            return trainer

        site = Site(self.policy, self.open_ledger(ledger), COHORT)
        return Gate(site, trainer_for=trainer_for, keystream=keystream)

    def joins(self, spec: RunSpec) -> None:
        assert isinstance(self.gate.invite(Invitation(spec)), NodeCard)

    @property
    def booked(self) -> list[SubsampledGaussian]:
        """As someone else reads it from the disk."""
        book: Book = self.open_ledger().book
        return book.spent()


@pytest.fixture
def policy_of(make_policy: Any, make_spec: Any) -> Callable[[str], Policy]:
    """Of a site whose images have the size of those here, by their unit."""
    digest = make_spec(input=SIDES).input.preprocessing_digest

    def policy(unit: str) -> Policy:
        data = {"unit": unit, "shape": [1, 64, 64], "preprocessing": digest}
        budget = {"epsilon": 100.0, "delta": 1e-5}
        parts = {"declared_size": DECLARED, "least_unit": unit, "data": data, "budget": budget}
        return cast("Policy", make_policy(**parts))

    return policy


@pytest.fixture
def node(
    policy_of: Any, make_trainer: Any, array_cohort: Any, make_ledger: Any, open_ledger: Any
) -> Node:
    images = np.random.default_rng(2).random((PATIENTS, 1, 64, 64), dtype=np.float32)
    cohort = array_cohort(images, np.arange(PATIENTS) % 2)
    policy = policy_of("patient")
    make_ledger(policy).disconnect()
    return Node(policy, cohort, make_trainer, open_ledger)


@pytest.fixture
def spec(make_spec: Callable[..., RunSpec], linear_network: str) -> RunSpec:
    made = make_spec(
        model={"name": linear_network},
        input=SIDES,
        rounds=ROUNDS,
        local={"batch_size": BATCH, "steps": STEPS},
        privacy={"noise_multiplier": 1.3, "clip_norm": 0.7, "delta": 1e-4},
    )
    return made.identified("a-run")


def a_round_of(spec: RunSpec, rounds: int = 1) -> SubsampledGaussian:
    whole = planned(spec, DECLARED)
    assert whole is not None
    return whole.of_steps(rounds * STEPS)


@pytest.fixture
def task_of(global_weights: Any) -> Callable[..., TrainTask]:
    def task(spec: RunSpec, round_number: int = 1, shift: float = 0.0) -> TrainTask:
        weights = {name: array + np.float32(shift) for name, array in global_weights(spec).items()}
        return TrainTask(spec, round_number, weights)

    return task


@pytest.fixture
def conduct(node: Node, task_of: Any, watch_steps: Any) -> Callable[[RunSpec], Seen]:
    """Drive a whole run through the gate, each round from where the last one ended."""

    def run(spec: RunSpec) -> Seen:
        seen = Seen(reads=node.cohort.reads)
        node.joins(spec)
        weights = task_of(spec).weights
        with watch_steps() as seen.steps:
            for number in range(1, spec.rounds + 1):
                release = node.gate.train(TrainTask(spec, number, weights))
                assert isinstance(release, Release)
                weights = {name: weights[name] + release.update[name] for name in weights}
        return seen

    return run


# --- booked and drawn ----------------------------------------------------------------------------


def disagreement(booked: list[SubsampledGaussian], seen: Seen, spec: RunSpec) -> dict[str, float]:
    """How probable what was seen is under what was booked, for each part of the mechanism."""
    (one,) = booked
    noise = seen.noise(spec) / one.noise_multiplier
    total, count = float(np.square(noise).sum()), len(noise)
    draws = PATIENTS * one.steps
    return {
        "steps": float(len(seen.steps) == one.steps),
        "noise": 2 * min(stats.chi2.sf(total, count), stats.chi2.cdf(total, count)),
        "rate": stats.binomtest(seen.inclusions, draws, one.sampling_rate).pvalue,
    }


def test_what_was_booked_is_what_was_drawn(node, conduct, spec) -> None:
    seen = conduct(spec)
    assert node.booked == [SubsampledGaussian(BATCH / DECLARED, 1.3, ROUNDS * STEPS, "patient")]
    assert node.booked == [planned(spec, DECLARED)]
    assert min(disagreement(node.booked, seen, spec).values()) > UNLIKELY


def test_noise_for_a_target_is_booked_as_it_was_drawn(node, conduct, spec, policy_of) -> None:
    node.policy = policy_of("image")
    node.gate = node.opened()
    privacy = {"mechanism": "dp-sgd", "target_epsilon": 2.0, "delta": 1e-4, "unit": "image"}
    changed = spec.model_dump(mode="json") | {"privacy": privacy, "rounds": 3}
    aimed = RunSpec.from_json(json.dumps(changed))
    seen = conduct(aimed)
    assert [m.unit for m in node.booked] == ["image"]
    assert min(disagreement(node.booked, seen, aimed).values()) > UNLIKELY
    assert 1.9 < epsilon(node.booked, 1e-4) <= 2.0


class LessNoise(PatientOptimizer):
    def __init__(self, *args: Any, **settings: Any) -> None:
        settings["noise_multiplier"] *= 0.95
        super().__init__(*args, **settings)


def test_noise_that_was_not_booked_is_found(node, conduct, spec, monkeypatch) -> None:
    monkeypatch.setattr(training, "PatientOptimizer", LessNoise)
    seen = conduct(spec)
    assert disagreement(node.booked, seen, spec)["noise"] < IMPOSSIBLE


def test_a_rate_that_was_not_booked_is_found(node, conduct, spec) -> None:
    """As if the rate had been taken from the real number of patients."""
    node.make_trainer = lambda *args: real_size(args[0], node.cohort)
    seen = conduct(spec)
    assert disagreement(node.booked, seen, spec)["rate"] < IMPOSSIBLE


def real_size(spec: RunSpec, cohort: Any) -> LocalTrainer:
    mechanism = planned(spec, PATIENTS)
    compute = training.Compute(torch.device("cpu"))
    return LocalTrainer(spec, cohort, declared_size=PATIENTS, mechanism=mechanism, compute=compute)


class OneStepMore(LocalTrainer):
    """Takes a step that nobody asked for."""

    def _optimizer(self, keystream: Keystream) -> Any:
        optimizer = super()._optimizer(keystream)
        weights = {name: p.detach().numpy().copy() for name, p in self._named()}
        rows = self._sample(keystream.derive("one more"))
        self._begin(optimizer)
        self._add(optimizer, self._cohort, rows, torch.Generator())
        self._finish(optimizer, weights)
        return optimizer


def test_a_step_that_was_not_booked_is_found(node, conduct, spec) -> None:
    def more(spec: RunSpec, cohort: Any, declared: int) -> LocalTrainer:
        return OneStepMore(
            spec,
            cohort,
            declared_size=declared,
            mechanism=planned(spec, declared),
            compute=training.Compute(torch.device("cpu")),
        )

    node.make_trainer = more
    seen = conduct(spec)
    assert disagreement(node.booked, seen, spec)["steps"] == 0


def test_an_accountant_made_anew_each_round_would_show_less(node, task_of, spec) -> None:
    """Where the account is not kept over the rounds, each looks like the first."""
    kept, anew = [], []
    node.joins(spec)
    weights = task_of(spec).weights
    for number in range(1, 5):
        release = node.gate.train(TrainTask(spec, number, weights))
        kept.append(epsilon(node.booked, 1e-4))
        anew.append(epsilon([release.mechanism], 1e-4))
    assert anew[0] == anew[3]
    assert kept[0] == anew[0]
    assert kept == sorted(set(kept))
    assert kept[3] > 1.3 * anew[3]
    assert kept[3] < 4 * anew[3]  # and adding the rounds' figures up would show too much


# --- attempts that do not end --------------------------------------------------------------------


class DiesBeforeItCommits(Ledger):
    def commit(self, attempt: Attempt, release: bytes) -> NoReturn:
        os._exit(9)


def dies_before_it_trains(*, run_id: str, round_number: int) -> NoReturn:
    os._exit(9)


@pytest.mark.skipif(torch.cuda.is_available(), reason="autograd on CUDA does not survive a fork")
@pytest.mark.parametrize(
    "parts",
    [{"ledger": DiesBeforeItCommits}, {"keystream": dies_before_it_trains}],
    ids=lambda parts: next(iter(parts)),
)
def test_a_process_that_is_killed_in_an_attempt_has_spent_it(node, task_of, spec, parts) -> None:
    node.joins(spec)

    def child() -> None:
        torch.set_num_threads(1)
        node.opened(**parts).train(task_of(spec))

    process = get_context("fork").Process(target=child)
    process.start()
    process.join()
    assert process.exitcode == 9
    assert node.booked == [a_round_of(spec)]
    assert isinstance(node.opened().train(task_of(spec)), Release)
    assert node.booked == [a_round_of(spec, 2)]  # the second attempt is a second charge


def test_an_attempt_is_on_disk_before_anything_is_drawn(node, task_of, spec) -> None:
    node.joins(spec)
    seen: list[list[SubsampledGaussian]] = []

    def look(*, run_id: str, round_number: int) -> Keystream:
        seen.append(node.booked)
        assert node.cohort.reads == []
        return Keystream.fresh()

    node.opened(keystream=look).train(task_of(spec))
    assert seen == [[a_round_of(spec)]]


def test_each_attempt_has_randomness_of_its_own(node, task_of, spec) -> None:
    """A second attempt with the first one's noise would give it away by a difference."""
    node.joins(spec)
    drawn: list[bytes] = []

    def look(*, run_id: str, round_number: int) -> Keystream:
        stream = Keystream.fresh()
        drawn.append(stream.derive("noise").words(4).tobytes())
        return stream

    class Full(Ledger):
        def commit(self, attempt: Attempt, release: bytes) -> None:
            raise OSError(28, "no space left on device")

    for _ in range(2):
        reply = node.opened(ledger=Full, keystream=look).train(task_of(spec))
        assert reply.code is RefusalCode.INCIDENT
    assert len(set(drawn)) == 2
    assert node.booked == [a_round_of(spec, 2)]


def test_a_trainer_that_failed_is_not_used_again(node, task_of, spec) -> None:
    """A failure between forward and backward leaves activations in the network's hooks, on which
    every later attempt would fail, each of them booked.
    """
    node.joins(spec)
    right = node.cohort.labels
    node.cohort.labels = right + 7  # a class that there is not: the loss fails
    assert node.gate.train(task_of(spec)).code is RefusalCode.INCIDENT
    node.cohort.labels = right
    release = node.gate.train(task_of(spec))
    assert isinstance(release, Release)
    assert node.booked == [a_round_of(spec, 2)]
    untroubled = node.make_trainer(spec, node.cohort, DECLARED)
    expected = untroubled.train(task_of(spec).weights, 1, seeded(run_id="a-run", round_number=1))
    assert all(np.array_equal(release.update[n], expected.update[n]) for n in expected.update)


# --- the same task again -------------------------------------------------------------------------


def content(reply: Any) -> bytes:
    written: bytes = recorddict_to_proto(reply.to_records()).SerializeToString(deterministic=True)
    return written


def test_the_same_task_has_the_same_release_at_no_cost(node, task_of, spec, watch_steps) -> None:
    node.joins(spec)
    first = node.opened(keystream=fresh).train(task_of(spec))
    booked = node.booked
    with watch_steps() as steps:
        again = [node.opened(keystream=fresh).train(task_of(spec)) for _ in range(3)]
    assert steps == []  # nothing was trained
    assert node.booked == booked
    for reply in again:
        assert reply.mechanism == first.mechanism
        assert {name: array.tobytes() for name, array in reply.update.items()} == {
            name: array.tobytes() for name, array in first.update.items()
        }
    assert {content(reply) for reply in again} == {content(first)}


def fresh(*, run_id: str, round_number: int) -> Keystream:
    return Keystream.fresh()


def test_the_same_round_with_other_content_is_refused(node, task_of, spec) -> None:
    node.joins(spec)
    assert isinstance(node.gate.train(task_of(spec)), Release)
    booked = node.booked
    for gate in (node.gate, node.opened()):
        reply = gate.train(task_of(spec, shift=1e-3))
        assert isinstance(reply, RefusalReply)
        assert reply.code is RefusalCode.REPLAY
    assert node.booked == booked
    assert isinstance(node.gate.train(task_of(spec, 2, shift=1e-3)), Release)


def test_a_release_whose_bytes_are_gone_is_refused_not_made_again(
    node, task_of, spec, tmp_path: Path
) -> None:
    node.joins(spec)
    assert isinstance(node.gate.train(task_of(spec)), Release)
    booked = node.booked
    for file in (tmp_path / "ledger" / "releases").iterdir():
        file.unlink()
    for gate in (node.gate, node.opened()):
        assert gate.train(task_of(spec)).code is RefusalCode.REPLAY
    assert node.booked == booked


def test_a_round_that_is_long_past_is_refused(node, task_of, spec) -> None:
    node.joins(spec)
    for number in (1, 2, 3):
        assert isinstance(node.gate.train(task_of(spec, number)), Release)
    booked = node.booked
    assert node.gate.train(task_of(spec, 1)).code is RefusalCode.REPLAY
    assert isinstance(node.gate.train(task_of(spec, 3)), Release)
    assert node.booked == booked
