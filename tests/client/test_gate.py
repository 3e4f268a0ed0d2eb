"""The only way out: what a node answers on every path, and what never leaves with it."""

from __future__ import annotations

import logging
import random
import re
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import get_ident
from time import sleep
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import ConfigRecord, RecordDict
from flwr.common.serde import recorddict_to_proto

from client.app import answer
from client.gate import Gate, Site
from client.ledger import Ledger, TaskKey
from client.policy import Policy
from client.training import LocalTrainer
from common.accounting import SubsampledGaussian, epsilon_at_order
from common.clock import Clock
from common.cohort import Cohort
from common.errors import LedgerError, RefusalCode
from common.messages import (
    PROTOCOL,
    Closed,
    Closing,
    Invitation,
    NodeCard,
    RefusalReply,
    Release,
    Reply,
    Request,
    TrainTask,
    read_reply,
)
from common.noise import Keystream
from common.spec import RunSpec

Spec = Callable[..., RunSpec]

CANARIES = ("p00017", "MRN-4711", "Doe^John", "/srv/pacs/", "0.69314", "23 patients")
SECRET = f"cannot read /srv/pacs/{'/'.join(CANARIES)}: loss 0.69314 over 23 patients"
RELEASED = ("round", "private", "sampling_rate", "noise_multiplier", "steps", "unit", "digest")
ONE_ROUND = SubsampledGaussian(4 / 40, 1.0, 1, "patient")
COHORT = "c" * 64  # as `make_ledger` admits


class Time:
    """A clock that a test moves; waiting takes no time, and is noted."""

    def __init__(self) -> None:
        self.passed = 1000.0
        self.waits: list[float] = []
        self.clock = Clock(now=lambda: self.passed, sleep=self._wait)

    def _wait(self, seconds: float) -> None:
        self.waits.append(seconds)
        self.passed += seconds


@dataclass
class Node:
    """One site: its gate, and what stands behind it."""

    gate: Gate
    ledger: Ledger
    cohort: Cohort
    folder: Path
    trainer_for: Callable[..., Any]

    def answer(self, message: Request) -> RecordDict:
        """As the node's ClientApp does."""
        return answer(message.to_records(), lambda: self.gate)

    def reply(self, message: Request) -> Reply:
        return read_reply(self.answer(message))

    def code(self, message: Request) -> RefusalCode:
        reply = self.reply(message)
        assert isinstance(reply, RefusalReply), reply
        return reply.code

    def joins(self, *specs: RunSpec) -> Node:
        """The same node, in which these runs are set aside."""
        for spec in specs:
            assert isinstance(self.reply(Invitation(spec)), NodeCard)
        return self

    @property
    def spent(self) -> list[SubsampledGaussian]:
        return self.ledger.book.spent()

    @property
    def entries(self) -> list[Any]:
        return list(self.ledger.entries())


@pytest.fixture
def make_node(
    make_spec: Spec, make_policy: Any, make_ledger: Any, make_trainer: Any, write_cohort: Any
) -> Callable[..., Node]:
    """A node with 23 patients that declares 40, and any part of it replaced."""
    numbers = iter(range(100))

    def make(
        *,
        owners: Any = range(23),
        policy: Policy | None = None,
        trainer_for: Callable[..., Any] | None = None,
        ledger: Ledger | None = None,
        **parts: Any,
    ) -> Node:
        number = next(numbers)
        cohort = write_cohort(make_spec(), owners, name=f"cohort-{number}")
        limits = policy or make_policy()
        kept = ledger or make_ledger(limits, name=f"ledger-{number}")

        def real(spec: RunSpec, mechanism: SubsampledGaussian | None) -> LocalTrainer:
            trainer: LocalTrainer = make_trainer(spec, cohort, 40)
            return trainer

        chosen = trainer_for or real
        gate = Gate(Site(limits, kept, COHORT), trainer_for=chosen, **parts)
        return Node(gate, kept, cohort, cohort.path.with_name(f"ledger-{number}"), chosen)

    return make


@pytest.fixture
def task(make_spec: Spec, global_weights: Any) -> TrainTask:
    spec = make_spec()
    return TrainTask(spec, 1, global_weights(spec))


def content_of(records: RecordDict) -> bytes:
    content: bytes = recorddict_to_proto(records).SerializeToString(deterministic=True)
    return content


MALFORMED = RefusalReply(code=RefusalCode.MALFORMED)


def found_in(records: RecordDict) -> list[str]:
    """The canaries that a reply carries, in any encoding that a text has in it."""
    content = content_of(records)
    return [canary for canary in CANARIES if canary.encode() in content]


# --- Yes --------------------------------------------------------------------------------------


def test_an_invitation_is_answered_by_a_card_and_spends_nothing(make_node, task: TrainTask):
    node = make_node()
    card = node.reply(Invitation(task.spec))
    assert isinstance(card, NodeCard)
    assert (card.site, card.declared_size, card.digest) == ("north", 40, task.spec.digest)
    assert not card.paced
    assert card.witness == node.ledger.witness
    assert node.spent == []
    assert node.ledger.book.set_aside() == [ONE_ROUND.of_steps(3)]  # the whole run


def test_a_task_is_answered_by_a_release_of_the_declared_mechanism(make_node, task: TrainTask):
    node = make_node().joins(task.spec)
    records = node.answer(task)
    release = read_reply(records)
    assert isinstance(release, Release)
    assert release.mechanism == ONE_ROUND
    assert node.spent == [release.mechanism]
    assert node.ledger.book.set_aside() == [ONE_ROUND.of_steps(2)]
    assert {name: a.shape for name, a in release.update.items()} == {
        name: a.shape for name, a in task.weights.items()
    }
    assert set(records) == {"release", "update"}
    assert set(records["release"]) == {"protocol", *RELEASED}


def test_a_run_without_privacy_is_released_as_such_where_it_is_allowed(
    make_node, make_policy: Any, make_spec: Spec, global_weights: Any
):
    spec = make_spec(privacy={"mechanism": "none"})
    node = make_node(policy=make_policy(allow_no_privacy=True)).joins(spec)
    release = node.reply(TrainTask(spec, 1, global_weights(spec)))
    assert isinstance(release, Release)
    assert release.mechanism is None
    assert node.spent == []
    assert "reserved" in {entry.kind for entry in node.entries}  # it is on record all the same


def test_a_task_asked_again_has_the_same_bytes_from_disk_at_no_cost(make_node, task: TrainTask):
    node = make_node().joins(task.spec)
    first = content_of(node.answer(task))
    kept = node.entries
    shown = TrainTask(task.spec, 1, task.weights, node.ledger.witness)
    assert {content_of(node.answer(again)) for again in (task, shown, task)} == {first}
    assert node.entries == kept


def test_a_repeated_release_says_what_was_booked_for_it_whatever_is_declared_today(
    make_node, make_policy: Any, task: TrainTask
):
    node = make_node().joins(task.spec)
    first = content_of(node.answer(task))
    site = Site(make_policy(declared_size=80), node.ledger, COHORT)
    later = Gate(site, trainer_for=node.trainer_for)
    assert content_of(answer(task.to_records(), lambda: later)) == first
    new = later.train(TrainTask(task.spec, 2, task.weights))
    assert new == RefusalReply(code=RefusalCode.APPROVAL)  # it is to be invited again first


def test_a_trainer_is_kept_between_the_rounds_of_a_run_and_no_longer(
    make_node, make_spec: Spec, task: TrainTask
):
    made: list[tuple[str, int]] = []

    def counted(spec: RunSpec, mechanism: SubsampledGaussian | None) -> Any:
        held = gate._warm is not None  # two networks at once would be twice the memory
        made.append((spec.name, int(held)))
        return inner.trainer_for(spec, mechanism)

    inner, node = make_node(), make_node(trainer_for=counted)
    gate, other = node.gate, make_spec(name="other")
    node.joins(task.spec, other)
    for spec, number in ((task.spec, 1), (task.spec, 2), (other, 1), (other, 2)):
        assert isinstance(node.reply(TrainTask(spec, number, task.weights)), Release)
    assert made == [("small", 0), ("other", 0)]
    node.reply(Closing(other.digest))
    assert gate._warm is None


# --- No ---------------------------------------------------------------------------------------

NO: dict[RefusalCode, tuple[dict[str, Any], dict[str, Any]]] = {
    RefusalCode.POLICY: ({"privacy": {"mechanism": "none"}}, {}),
    RefusalCode.SPEC: ({"local": {"batch_size": 41}}, {}),
    RefusalCode.BUDGET: ({}, {"budget": {"epsilon": 2.0}}),
}


@pytest.mark.parametrize("code", NO)
def test_a_refusal_is_a_code_and_books_nothing(
    make_node, make_spec: Spec, make_policy: Any, task: TrainTask, code: RefusalCode
):
    changes, limits = NO[code]
    node, spec = make_node(policy=make_policy(**limits)), make_spec(**changes)
    before = node.entries
    assert node.reply(Invitation(spec)) == RefusalReply(code=code)
    never_invited = RefusalCode.APPROVAL if code is RefusalCode.BUDGET else code
    assert node.code(TrainTask(spec, 1, task.weights)) is never_invited
    assert node.entries == before


def test_a_run_that_was_never_set_aside_is_not_trained(make_node, task: TrainTask):
    node = make_node()
    before = node.entries
    assert node.code(task) is RefusalCode.APPROVAL
    assert node.entries == before
    assert isinstance(node.joins(task.spec).reply(task), Release)


def test_the_whole_run_is_weighed_at_the_invitation(make_node, make_policy, make_spec: Spec):
    enough_for_three = {"epsilon": 6.0, "delta": 1e-5}
    node = make_node(policy=make_policy(budget=enough_for_three))
    node.joins(make_spec(rounds=3))
    assert node.code(Invitation(make_spec(rounds=300))) is RefusalCode.BUDGET


def test_two_runs_that_fit_alone_are_not_both_told_yes(make_node, make_policy, make_spec: Spec):
    cost = [epsilon_at_order([ONE_ROUND.of_steps(3 * n)], 1e-4, 8.0) for n in (1, 2)]
    one_fits = {"epsilon": sum(cost) / 2, "order": 8.0}
    node = make_node(policy=make_policy(budget=one_fits))
    node.joins(make_spec())
    assert node.code(Invitation(make_spec(name="second"))) is RefusalCode.BUDGET
    node.joins(make_spec())  # the first stands, as often as it asks
    node.reply(Closing(make_spec().digest))
    node.joins(make_spec(name="second"))


def test_a_cohort_that_nobody_admitted_is_not_trained_on(make_node, task: TrainTask):
    node = make_node().joins(task.spec)
    other = Gate(Site(node.gate._policy, node.ledger, "d" * 64), trainer_for=node.trainer_for)
    before = node.entries
    for message in (Invitation(task.spec), task):
        assert read_reply(answer(message.to_records(), lambda: other)) == RefusalReply(
            code=RefusalCode.POLICY
        )
    assert node.entries == before
    assert isinstance(node.reply(task), Release)


def weight(change: Callable[[np.ndarray], Any]) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """A change of the first array."""

    def changed(weights: dict[str, Any]) -> dict[str, Any]:
        name = min(weights)
        array = weights[name].copy()
        result = change(array)
        return weights | {name: array if result is None else result}

    return changed


def put(value: float) -> Callable[[np.ndarray], None]:
    def change(array: np.ndarray) -> None:
        array.flat[-1] = value

    return change


@pytest.mark.parametrize(
    "change",
    [
        weight(put(np.nan)),
        weight(put(np.inf)),
        weight(put(-np.inf)),
        weight(put(1e30)),
        weight(lambda array: array[..., None]),
        weight(lambda array: array[:1]),
        lambda weights: weights | {"extra": np.ones(1, dtype=np.float32)},
        lambda weights: dict(list(weights.items())[1:]),
    ],
    ids=["nan", "inf", "-inf", "absurd", "dimension", "shape", "one too many", "one too few"],
)
def test_weights_that_cannot_be_trained_are_refused_before_anything_is_booked(
    make_node, task: TrainTask, change: Any
):
    node = make_node().joins(task.spec)
    before = node.entries
    odd = TrainTask(task.spec, 1, change(dict(task.weights)))
    assert node.reply(odd) == RefusalReply(code=RefusalCode.WEIGHTS)
    assert node.entries == before
    assert isinstance(node.reply(task), Release)  # nor does it stand in the way of the right one


def test_another_content_of_a_released_round_is_refused(make_node, task: TrainTask):
    node = make_node().joins(task.spec)
    assert isinstance(node.reply(task), Release)
    before = node.entries
    other = weight(put(0.5))(dict(task.weights))
    refused = node.reply(TrainTask(task.spec, 1, other))
    assert refused == RefusalReply(code=RefusalCode.REPLAY)
    assert node.entries == before


def test_what_is_not_on_the_list_is_malformed(make_node):
    node = make_node()
    for records in (
        RecordDict(),
        RecordDict({"invitation": ConfigRecord({"spec": "{}", "digest": "0" * 64})}),
        RecordDict({"what": ConfigRecord({"is": "this"})}),
    ):
        reply = read_reply(answer(records, lambda: node.gate))
        assert reply == MALFORMED


# --- Two at once ------------------------------------------------------------------------------


def meanwhile(node: Node, happens: Callable[[], Any]) -> Callable[..., Any]:
    """A factory of trainers that takes so long that something else is done in between."""

    def trainer_for(spec: RunSpec, mechanism: SubsampledGaussian | None) -> Any:
        happens()
        return node.trainer_for(spec, mechanism)

    return trainer_for


def test_two_nodes_of_one_ledger_do_not_both_spend_the_last_of_the_budget(
    make_node, make_policy, open_ledger, task: TrainTask
):
    """What the run set aside is its own; a second attempt at a round is what is left to fight for.

    Both find room for one more, and while the first makes its trainer the second takes it.
    """
    costs = [epsilon_at_order([ONE_ROUND.of_steps(3 + n)], 1e-4, 8.0) for n in (1, 2)]
    policy = make_policy(budget={"epsilon": sum(costs) / 2, "order": 8.0})
    other = make_node(policy=policy).joins(task.spec)
    failing = Gate(Site(policy, other.ledger, COHORT), trainer_for=always_failing)
    assert failing.train(task).code is RefusalCode.INCIDENT  # type: ignore[union-attr]
    answers: list[Any] = []
    node = make_node(
        policy=policy,
        ledger=open_ledger(name="ledger-0"),
        trainer_for=meanwhile(other, lambda: answers.append(failing.train(task))),
    )
    answers.append(node.reply(task))
    assert [reply.code for reply in answers] == [RefusalCode.INCIDENT, RefusalCode.BUDGET]
    assert node.spent == [ONE_ROUND.of_steps(2)]


def test_two_nodes_of_one_ledger_do_not_both_release_a_round_with_different_content(
    make_node, open_ledger, task: TrainTask
):
    other = make_node().joins(task.spec)
    rival = TrainTask(task.spec, 1, weight(put(0.5))(dict(task.weights)))
    answers: list[Any] = []
    node = make_node(
        ledger=open_ledger(name="ledger-0"),
        trainer_for=meanwhile(other, lambda: answers.append(other.reply(rival))),
    )
    answers.append(node.reply(task))
    assert [type(reply) for reply in answers] == [Release, RefusalReply]
    assert answers[1].code is RefusalCode.REPLAY
    assert node.spent == [ONE_ROUND]


def test_a_run_that_is_closed_while_it_is_made_ready_is_not_trained(
    make_node, open_ledger, task: TrainTask
):
    other = make_node().joins(task.spec)
    node = make_node(
        ledger=open_ledger(name="ledger-0"),
        trainer_for=meanwhile(other, lambda: other.reply(Closing(task.spec.digest))),
    )
    assert node.code(task) is RefusalCode.REPLAY
    assert node.spent == []


def test_two_threads_of_one_node_do_not_train_on_one_network_at_once(
    make_node, make_spec: Spec, task: TrainTask
):
    at_once: list[int] = []
    training: set[int] = set()

    class Watched:
        def __init__(self, trainer: Any) -> None:
            self._trainer = trainer

        def train(self, *asked: Any) -> Any:
            training.add(get_ident())
            at_once.append(len(training))
            sleep(0.1)
            training.remove(get_ident())
            return self._trainer.train(*asked)

    inner = make_node()
    node = make_node(trainer_for=lambda *asked: Watched(inner.trainer_for(*asked)))
    node.joins(task.spec)
    tasks = [TrainTask(task.spec, number, task.weights) for number in (1, 2, 3)]
    with ThreadPoolExecutor(3) as threads:
        replies = list(threads.map(node.gate.train, tasks))
    assert all(isinstance(reply, Release) for reply in replies)
    assert at_once == [1, 1, 1]
    assert node.spent == [ONE_ROUND.of_steps(3)]


# --- The end of a run -------------------------------------------------------------------------


def test_a_closed_run_is_over_for_good_and_what_it_left_is_free(
    make_node, make_spec: Spec, task: TrainTask
):
    node, other = make_node(), make_spec(name="other")
    node.joins(task.spec, other)
    for spec in (task.spec, other):
        assert isinstance(node.reply(TrainTask(spec, 1, task.weights)), Release)
    closed = node.reply(Closing(task.spec.digest))
    assert closed == Closed(digest=task.spec.digest, witness=node.ledger.witness)
    assert node.ledger.book.set_aside() == [ONE_ROUND.of_steps(2)]  # of the other one
    assert node.spent == [ONE_ROUND.of_steps(2)]  # what was spent stays so
    before = node.entries
    second = TrainTask(task.spec, 2, task.weights)
    for message in (Invitation(task.spec), task, second):
        assert node.code(message) is RefusalCode.REPLAY
    closed = node.reply(Closing(task.spec.digest))
    assert closed == Closed(digest=task.spec.digest, witness=node.ledger.witness)
    assert node.entries == before
    assert len(list((node.folder / "releases").glob("*.sealed"))) == 1
    assert isinstance(node.reply(TrainTask(other, 1, task.weights)), Release)


def test_closing_what_is_not_there_changes_nothing(make_node, task: TrainTask):
    node = make_node()
    before = node.entries
    closed = node.reply(Closing(task.spec.digest))
    assert closed == Closed(digest=task.spec.digest, witness=node.ledger.witness)
    assert node.entries == before
    assert isinstance(node.joins(task.spec).reply(task), Release)


# --- When replies leave -----------------------------------------------------------------------


def taking(seconds: float, time: Time, node: Node) -> Callable[..., Any]:
    """A factory of trainers that take so long; without seconds: that are interrupted."""

    class Slow:
        def __init__(self, trainer: Any) -> None:
            self._trainer = trainer

        def train(self, *asked: Any) -> Any:
            time.passed += seconds
            if not seconds:
                raise KeyboardInterrupt
            return self._trainer.train(*asked)

    return lambda spec, mechanism: Slow(node.trainer_for(spec, mechanism))


PACED = {"pace": 0.5, "least_slot": 10.0}


@pytest.fixture
def make_paced(make_node, make_policy) -> Callable[..., tuple[Node, Time]]:
    def make(seconds: float, **parts: Any) -> tuple[Node, Time]:
        time = Time()
        inner = make_node()
        chosen = parts.pop("trainer_for", None) or taking(seconds, time, inner)
        policy = make_policy(release=PACED)
        return make_node(policy=policy, trainer_for=chosen, clock=time.clock, **parts), time

    return make


@pytest.mark.parametrize(("seconds", "left"), [(1, 50), (37.25, 50), (50, 50), (51, 100)])
def test_a_release_leaves_at_a_slot_however_long_training_took(
    make_paced, make_spec: Spec, global_weights, seconds: float, left: float
):
    spec = make_spec(federation={"deadline_seconds": 100})
    node, time = make_paced(seconds)
    node.joins(spec)
    arrived = time.passed
    assert isinstance(node.reply(TrainTask(spec, 1, global_weights(spec))), Release)
    assert time.passed - arrived == pytest.approx(left)


def test_a_failure_after_the_booking_leaves_at_its_slot_too(
    make_paced, make_spec: Spec, global_weights
):
    spec = make_spec(federation={"deadline_seconds": 100})
    node, time = make_paced(1, trainer_for=always_failing)
    node.joins(spec)
    arrived = time.passed
    assert node.code(TrainTask(spec, 1, global_weights(spec))) is RefusalCode.INCIDENT
    assert time.passed - arrived == pytest.approx(50)


def test_what_the_cohort_has_no_part_in_is_answered_at_once(
    make_paced, make_spec: Spec, global_weights
):
    spec = make_spec(federation={"deadline_seconds": 100})
    weights = global_weights(spec)
    node, time = make_paced(1)
    card = node.reply(Invitation(spec))
    assert card.paced
    assert node.code(TrainTask(spec, 1, weight(put(np.nan))(weights))) is RefusalCode.WEIGHTS
    assert node.code(Invitation(make_spec(rounds=2000))) is RefusalCode.POLICY
    assert time.waits == []
    node.reply(TrainTask(spec, 1, weights))
    assert len(time.waits) == 1
    node.reply(TrainTask(spec, 1, weights))  # from disk
    node.reply(Closing(spec.digest))
    assert len(time.waits) == 1


def test_a_person_who_stops_the_node_does_not_wait_for_the_slot(
    make_paced, make_spec: Spec, global_weights
):
    spec = make_spec(federation={"deadline_seconds": 100})
    node, time = make_paced(0)
    node.joins(spec)
    with pytest.raises(KeyboardInterrupt):
        node.reply(TrainTask(spec, 1, global_weights(spec)))
    assert time.waits == []
    assert node.spent == [ONE_ROUND]


# --- Put back in time -------------------------------------------------------------------------


def test_a_node_whose_ledger_was_put_back_stops_when_the_coordinator_knows_more(
    make_node, open_ledger, task: TrainTask
):
    first = make_node().joins(task.spec)
    folder, file = first.folder, first.folder.with_name("ledger-0.witness")
    before = folder.with_name("before")
    first.ledger.disconnect()
    shutil.copytree(folder, before)
    written = file.read_text()
    later = make_node(ledger=open_ledger(name="ledger-0"))
    assert isinstance(later.reply(task), Release)
    seen = later.ledger.witness
    later.ledger.disconnect()
    shutil.rmtree(folder)
    before.rename(folder)
    file.write_text(written)  # the whole machine was put back
    node = make_node(ledger=open_ledger(name="ledger-0"))
    told = TrainTask(task.spec, 1, task.weights, seen)
    assert node.code(told) is RefusalCode.LEDGER
    halted = node.entries
    assert halted[-1].kind == "halted"
    for message in (Invitation(task.spec), task, told, Closing(task.spec.digest)):
        assert node.code(message) is RefusalCode.LEDGER
    assert node.entries == halted  # however often it is told
    assert node.spent == []


def test_a_witness_that_this_node_never_made_stops_nothing(make_node, task: TrainTask):
    node = make_node().joins(task.spec)
    number, head, seal = node.ledger.witness.split(":")
    before = node.entries
    forged = f"{int(number) + 5}:{head}:{seal}"
    assert node.code(TrainTask(task.spec, 1, task.weights, forged)) is RefusalCode.MALFORMED
    assert node.entries == before
    assert isinstance(node.reply(task), Release)


# --- What goes wrong --------------------------------------------------------------------------


class Failing:
    """A trainer that fails."""

    def __init__(self, error: Exception) -> None:
        self._error = error

    def train(self, *_: Any) -> Any:
        raise self._error


def always_failing(*_: Any) -> Any:
    return Failing(ValueError(SECRET))


def failing_node(make_node: Callable[..., Node], where: str, error: Exception) -> Node:
    def fail(*_: Any, **__: Any) -> Any:
        raise error

    def lose_the_disk(**_: Any) -> Keystream:
        shutil.rmtree(node.folder / "releases")
        (node.folder / "releases").touch()
        return Keystream.fresh()

    if where == "factory":
        return make_node(trainer_for=fail)
    if where == "keystream":
        return make_node(keystream=fail)
    if where == "disk":
        node = make_node(keystream=lose_the_disk)
        return node
    return make_node(trainer_for=lambda *_: Failing(error))


ERRORS = [
    ValueError(SECRET),
    OSError(5, SECRET, "/srv/pacs/p00017.dcm"),
    KeyError("p00017"),
    MemoryError(),
    RuntimeError(SECRET * 1000),
]
PLACES = ["factory", "train", "keystream", "disk"]


@pytest.mark.parametrize("where", PLACES)
def test_a_failure_is_a_number_whose_text_stays_in_the_nodes_log(
    make_node, task: TrainTask, where: str, caplog: pytest.LogCaptureFixture
):
    node = failing_node(make_node, where, ValueError(SECRET)).joins(task.spec)
    records = node.answer(task)
    reply = read_reply(records)
    assert isinstance(reply, RefusalReply)
    assert reply.code is RefusalCode.INCIDENT
    assert re.fullmatch(r"[0-9a-f]{16}", reply.incident)
    assert found_in(records) == []
    assert reply.incident in caplog.text
    assert where == "disk" or SECRET in caplog.text
    assert node.spent == ([] if where == "factory" else [ONE_ROUND])


def test_the_search_for_what_leaves_finds_what_leaves(make_node, task: TrainTask):
    # The control: an error's text in any field would have been seen above.
    for canary in CANARIES:
        leaky = RecordDict({"refusal": ConfigRecord({"code": "incident", "incident": SECRET})})
        assert canary in found_in(leaky)


@pytest.mark.parametrize("where", PLACES)
def test_every_failure_has_the_same_form_and_size(make_node, task: TrainTask, where: str):
    nodes = [failing_node(make_node, where, error).joins(task.spec) for error in ERRORS]
    replies = [node.answer(task) for node in nodes]
    assert {len(content_of(records)) for records in replies} == {
        len(content_of(RefusalReply(code=RefusalCode.INCIDENT, incident="0" * 16).to_records()))
    }
    assert all(set(records) == {"refusal"} for records in replies)


def test_a_node_that_cannot_open_answers_all_the_same(task: TrainTask):
    def broken() -> Gate:
        raise OSError(SECRET)

    records = answer(task.to_records(), broken)
    assert read_reply(records).code is RefusalCode.INCIDENT  # type: ignore[union-attr]
    assert found_in(records) == []


def test_a_node_whose_ledger_cannot_be_relied_on_says_so_and_no_more(task: TrainTask):
    def broken() -> Gate:
        raise LedgerError(SECRET)

    records = answer(task.to_records(), broken)
    assert read_reply(records) == RefusalReply(code=RefusalCode.LEDGER)
    assert found_in(records) == []


def test_a_refusal_of_one_code_is_the_same_bytes_whatever_it_was_about(
    make_node, make_spec: Spec, task: TrainTask
):
    node = make_node()
    by_code: dict[str, set[bytes]] = {}
    for name in ("a", "quite-another-run-with-a-long-name"):
        for changes in ({"privacy": {"mechanism": "none"}}, {"local": {"batch_size": 41}}):
            records = node.answer(Invitation(make_spec(name=name, **changes)))
            code = read_reply(records).code  # type: ignore[union-attr]
            by_code.setdefault(code, set()).add(content_of(records))
    assert {code: len(seen) for code, seen in by_code.items()} == {"policy": 1, "spec": 1}


def test_incident_numbers_cannot_be_foretold(make_node, task: TrainTask):
    seen = set()
    for _ in range(8):
        random.seed(1)
        np.random.seed(1)
        torch.manual_seed(1)
        node = failing_node(make_node, "factory", ValueError(SECRET))
        reply = node.joins(task.spec).reply(task)
        assert isinstance(reply, RefusalReply)
        seen.add(reply.incident)
    assert len(seen) == 8


def test_a_failed_attempt_counts_and_does_not_block_the_next(
    make_node, make_policy, task: TrainTask
):
    node = make_node().joins(task.spec)
    site = Site(make_policy(), node.ledger, COHORT)
    broken = Gate(site, trainer_for=always_failing)
    assert broken.train(task).code is RefusalCode.INCIDENT  # type: ignore[union-attr]
    assert isinstance(node.reply(task), Release)
    assert node.spent == [ONE_ROUND.of_steps(2)]
    assert node.ledger.book.set_aside() == [ONE_ROUND.of_steps(2)]  # the retry came on top


def test_what_a_coordinator_writes_does_not_fill_the_log(
    make_node, make_spec: Spec, caplog: pytest.LogCaptureFixture
):
    node = make_node()
    long = "x" * 100_000
    assert node.code(Invitation(make_spec(model={"name": long}))) is RefusalCode.SPEC
    classes = make_spec(task={"classes": ["a", long]})
    assert node.code(Invitation(classes)) is RefusalCode.POLICY
    odd = RecordDict({"invitation": ConfigRecord({long: 1, "spec": long})})
    assert read_reply(answer(odd, lambda: node.gate)) == MALFORMED
    assert caplog.text.count("refused") >= 3
    assert len(caplog.text) < 15_000


# --- What never leaves ------------------------------------------------------------------------


def test_a_release_says_nothing_of_the_cohort_beside_its_noised_array(
    make_node, make_spec: Spec, task: TrainTask, caplog: pytest.LogCaptureFixture
):
    caplog.set_level(logging.INFO, "cloister.gate")
    nodes = [make_node(owners=owners) for owners in (range(23), range(22), [0] * 50, [])]
    spec = make_spec()
    cards = [node.reply(Invitation(spec)) for node in nodes]
    witnesses = [card.witness for card in cards]
    assert len({len(content_of(card.to_records())) for card in cards}) == 1
    replies = [node.answer(task) for node in nodes]
    assert len({card.model_copy(update={"witness": witnesses[0]}) for card in cards}) == 1
    assert len({token.partition(":")[0] for token in witnesses}) == 1  # as many entries
    assert len(set(witnesses)) == len(nodes)  # but for that, seals over random numbers
    assert len({len(content_of(records)) for records in replies}) == 1
    scalars = {content_of(RecordDict({"release": records["release"]})) for records in replies}
    assert len(scalars) == 1
    assert len({content_of(records) for records in replies}) == len(nodes)
    assert "mean loss" in caplog.text  # it was there to be told


def test_a_ledger_that_was_put_back_and_books_the_same_again_is_found(
    make_policy: Any, make_ledger: Any, open_ledger: Any, tmp_path: Path, task: TrainTask
):
    policy = make_policy()
    ledger, folder = make_ledger(policy), tmp_path / "ledger"
    ledger.earmark(task.spec.digest, policy.judge(task.spec, 1))
    told = tmp_path / "ledger.witness"
    before = {path: path.read_bytes() for path in (*folder.iterdir(), told) if path.is_file()}
    key = TaskKey(task.spec.digest, "training", 1, task.digest)

    def train(ledger: Ledger) -> str:
        ledger.commit(ledger.reserve(key, ONE_ROUND), b"release")
        return ledger.witness

    witness = train(ledger)
    ledger.disconnect()
    for path in folder.glob("ledger.sqlite*"):
        path.unlink()
    for path, content in before.items():  # the witness file too
        path.write_bytes(content)
    put_back = open_ledger()
    again = train(put_back)
    assert again.partition(":")[0] == witness.partition(":")[0]
    with pytest.raises(LedgerError, match="not the one"):
        put_back.check_witness(witness)


def test_two_nodes_with_one_cohort_release_different_noise(make_node, task: TrainTask):
    nodes = [make_node(owners=[]).joins(task.spec) for _ in range(2)]
    updates = [node.reply(task).update for node in nodes]
    assert not any(np.array_equal(updates[0][name], updates[1][name]) for name in updates[0])


def test_why_a_request_was_malformed_stands_in_the_nodes_log(
    make_node, caplog: pytest.LogCaptureFixture
):
    node = make_node()
    records = RecordDict({"invitation": ConfigRecord({"protocol": PROTOCOL, "oddity": 3})})
    assert read_reply(answer(records, lambda: node.gate)) == MALFORMED
    assert "oddity" in caplog.text


def test_another_protocol_is_refused_as_such_whatever_else_it_says(make_node):
    node = make_node()
    for record in (
        ConfigRecord({"protocol": PROTOCOL - 1}),
        ConfigRecord({"protocol": PROTOCOL + 1, "of": "a version to come"}),
    ):
        refusal = read_reply(answer(RecordDict({"invitation": record}), lambda: node.gate))
        assert refusal == RefusalReply(code=RefusalCode.VERSION)
