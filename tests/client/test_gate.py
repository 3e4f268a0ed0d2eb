"""The only way out: what a node answers on every path, and what never leaves with it."""

from __future__ import annotations

import logging
import random
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import ConfigRecord, RecordDict
from flwr.common.serde import recorddict_to_proto

from client.app import answer
from client.gate import Gate
from client.ledger import Ledger
from client.policy import Budget, Policy
from client.training import LocalTrainer
from common.accounting import SubsampledGaussian, epsilon_at_order
from common.cohort import Cohort
from common.errors import RefusalCode
from common.messages import (
    Invitation,
    NodeCard,
    RefusalReply,
    Release,
    TrainTask,
    read_reply,
)
from common.noise import Keystream
from common.spec import RunSpec

Spec = Callable[..., RunSpec]

CANARIES = ("p00017", "MRN-4711", "Doe^John", "/srv/pacs/", "0.69314", "23 patients")
SECRET = f"cannot read /srv/pacs/{'/'.join(CANARIES)}: loss 0.69314 over 23 patients"
RELEASED = ("round", "private", "sampling_rate", "noise_multiplier", "steps", "unit", "digest")


@dataclass
class Node:
    """One site: its gate, and what stands behind it."""

    gate: Gate
    ledger: Ledger
    cohort: Cohort
    folder: Path
    trainer_for: Callable[..., Any]

    def answer(self, message: Invitation | TrainTask) -> RecordDict:
        """As the node's ClientApp does."""
        return answer(message.to_records(), lambda: self.gate)

    def reply(self, message: Invitation | TrainTask) -> NodeCard | Release | RefusalReply:
        return read_reply(self.answer(message))


@pytest.fixture
def make_node(
    tmp_path: Path, make_spec: Spec, make_trainer: Any, write_cohort: Any
) -> Callable[..., Node]:
    """A node with 23 patients that declares 40, and any part of it replaced."""
    numbers = iter(range(100))

    def make(
        *,
        owners: Any = range(23),
        budget: Budget | None = None,
        trainer_for: Callable[..., Any] | None = None,
        ledger: Ledger | None = None,
        **parts: Any,
    ) -> Node:
        number = next(numbers)
        cohort = write_cohort(make_spec(), owners, name=f"cohort-{number}")
        folder = tmp_path / f"ledger-{number}"
        kept = ledger or Ledger(folder)

        def real(spec: RunSpec, mechanism: SubsampledGaussian | None) -> LocalTrainer:
            trainer: LocalTrainer = make_trainer(spec, cohort, 40)
            return trainer

        policy = Policy(site="north", declared_size=40, budget=budget, cohort="cohort")
        chosen = trainer_for or real
        gate = Gate(policy=policy, ledger=kept, trainer_for=chosen, **parts)
        return Node(gate, kept, cohort, folder, chosen)

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


def test_an_invitation_is_answered_by_a_card_and_costs_nothing(make_node, task: TrainTask):
    node = make_node()
    card = node.reply(Invitation(task.spec))
    assert isinstance(card, NodeCard)
    assert (card.site, card.declared_size, card.digest) == ("north", 40, task.spec.digest)
    assert node.ledger.spent() == []


def test_a_task_is_answered_by_a_release_of_the_declared_mechanism(make_node, task: TrainTask):
    node = make_node()
    records = node.answer(task)
    release = read_reply(records)
    assert isinstance(release, Release)
    assert release.mechanism == SubsampledGaussian(4 / 40, 1.0, 1, "patient")
    assert node.ledger.spent() == [release.mechanism]
    assert {name: a.shape for name, a in release.update.items()} == {
        name: a.shape for name, a in task.weights.items()
    }
    assert set(records) == {"release", "update"}
    assert set(records["release"]) == {"protocol", *RELEASED}


def test_a_run_without_privacy_is_released_as_such_where_it_is_allowed(
    make_node, make_spec: Spec, global_weights: Any
):
    spec = make_spec(privacy={"mechanism": "none"})
    node = make_node()
    policy = Policy(site="n", declared_size=40, budget=None, allow_no_privacy=True, cohort="cohort")
    trainer = LocalTrainer(spec, node.cohort, declared_size=40, mechanism=None)
    gate = Gate(policy=policy, ledger=node.ledger, trainer_for=lambda *_: trainer)
    release = gate.train(TrainTask(spec, 1, global_weights(spec)))
    assert isinstance(release, Release)
    assert release.mechanism is None
    assert node.ledger.spent() == []


# --- No ---------------------------------------------------------------------------------------

LITTLE = Budget(epsilon=0.5, delta=1e-5)


NO: dict[RefusalCode, tuple[dict[str, Any], Budget | None]] = {
    RefusalCode.POLICY: ({"privacy": {"mechanism": "none"}}, None),
    RefusalCode.SPEC: ({"local": {"batch_size": 41}}, None),
    RefusalCode.BUDGET: ({}, LITTLE),
}


@pytest.mark.parametrize("code", NO)
def test_a_refusal_is_a_code_and_books_nothing(
    make_node, make_spec: Spec, task: TrainTask, code: RefusalCode
):
    changes, budget = NO[code]
    node, spec = make_node(budget=budget), make_spec(**changes)
    for message in (Invitation(spec), TrainTask(spec, 1, task.weights)):
        assert node.reply(message) == RefusalReply(code=code)
    assert node.ledger.spent() == []


def test_the_whole_run_is_weighed_at_the_invitation(make_node, make_spec: Spec):
    enough_for_three = Budget(epsilon=6.0, delta=1e-5)
    node = make_node(budget=enough_for_three)
    assert isinstance(node.reply(Invitation(make_spec(rounds=3))), NodeCard)
    refused = RefusalReply(code=RefusalCode.BUDGET)
    assert node.reply(Invitation(make_spec(rounds=300))) == refused


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
    node = make_node()
    odd = TrainTask(task.spec, 1, change(dict(task.weights)))
    assert node.reply(odd) == RefusalReply(code=RefusalCode.WEIGHTS)
    assert node.ledger.spent() == []
    assert isinstance(node.reply(task), Release)  # nor does it stand in the way of the right one


def test_another_content_of_a_released_round_is_refused(make_node, task: TrainTask):
    node = make_node()
    assert isinstance(node.reply(task), Release)
    other = weight(put(0.5))(dict(task.weights))
    refused = node.reply(TrainTask(task.spec, 1, other))
    assert refused == RefusalReply(code=RefusalCode.REPLAY)
    assert len(node.ledger.spent()) == 1


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
    make_node, make_spec: Spec, task: TrainTask
):
    one = SubsampledGaussian(4 / 40, 1.0, 1, "patient")
    costs = [epsilon_at_order([one] * times, 1e-5, 8.0) for times in (1, 2)]
    exactly_one = Budget(epsilon=sum(costs) / 2, delta=1e-5)
    other = make_node(budget=exactly_one)
    rival = TrainTask(make_spec(name="rival"), 1, task.weights)
    answers: list[Any] = []
    node = make_node(
        budget=exactly_one,
        ledger=Ledger(other.folder),
        trainer_for=meanwhile(other, lambda: answers.append(other.reply(rival))),
    )
    answers.append(node.reply(task))
    assert [type(reply) for reply in answers] == [Release, RefusalReply]
    assert answers[1].code is RefusalCode.BUDGET
    assert node.ledger.spent() == [one]


def test_two_nodes_of_one_ledger_do_not_both_release_a_round_with_different_content(
    make_node, task: TrainTask
):
    other = make_node()
    rival = TrainTask(task.spec, 1, weight(put(0.5))(dict(task.weights)))
    answers: list[Any] = []
    node = make_node(
        ledger=Ledger(other.folder),
        trainer_for=meanwhile(other, lambda: answers.append(other.reply(rival))),
    )
    answers.append(node.reply(task))
    assert [type(reply) for reply in answers] == [Release, RefusalReply]
    assert answers[1].code is RefusalCode.REPLAY


# --- What goes wrong --------------------------------------------------------------------------


class Failing:
    """A trainer that fails where it is told to."""

    def __init__(self, where: str, error: Exception) -> None:
        self._where, self._error = where, error

    def check(self, weights: Any) -> None:
        if self._where == "check":
            raise self._error

    def train(self, *_: Any) -> Any:
        raise self._error


def failing_node(make_node: Callable[..., Node], where: str, error: Exception) -> Node:
    def fail(*_: Any, **__: Any) -> Any:
        raise error

    def lose_the_disk(**_: Any) -> Keystream:
        shutil.rmtree(node.folder)
        return Keystream.fresh()

    if where == "factory":
        return make_node(trainer_for=fail)
    if where == "keystream":
        return make_node(keystream=fail)
    if where == "disk":
        node = make_node(keystream=lose_the_disk)
        return node
    return make_node(trainer_for=lambda *_: Failing(where, error))


ERRORS = [
    ValueError(SECRET),
    OSError(5, SECRET, "/srv/pacs/p00017.dcm"),
    KeyError("p00017"),
    MemoryError(),
    RuntimeError(SECRET * 1000),
]
PLACES = ["factory", "check", "train", "keystream", "disk"]


@pytest.mark.parametrize("where", PLACES)
def test_a_failure_is_a_number_whose_text_stays_in_the_nodes_log(
    make_node, task: TrainTask, where: str, caplog: pytest.LogCaptureFixture
):
    node = failing_node(make_node, where, ValueError(SECRET))
    records = node.answer(task)
    reply = read_reply(records)
    assert isinstance(reply, RefusalReply)
    assert reply.code is RefusalCode.INCIDENT
    assert re.fullmatch(r"[0-9a-f]{16}", reply.incident)
    assert found_in(records) == []
    assert reply.incident in caplog.text
    assert where == "disk" or SECRET in caplog.text


def test_the_search_for_what_leaves_finds_what_leaves(make_node, task: TrainTask):
    # The control: an error's text in any field would have been seen above.
    for canary in CANARIES:
        leaky = RecordDict({"refusal": ConfigRecord({"code": "incident", "incident": SECRET})})
        assert canary in found_in(leaky)


@pytest.mark.parametrize("where", PLACES)
def test_every_failure_has_the_same_form_and_size(make_node, task: TrainTask, where: str):
    replies = [failing_node(make_node, where, error).answer(task) for error in ERRORS]
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
        reply = node.reply(task)
        assert isinstance(reply, RefusalReply)
        seen.add(reply.incident)
    assert len(seen) == 8


def test_a_failed_attempt_counts_and_does_not_block_the_next(make_node, task: TrainTask):
    node = make_node()
    broken = failing_node(make_node, "train", ValueError(SECRET))
    gate = Gate(
        policy=Policy(site="n", declared_size=40, budget=None, cohort="c"),
        ledger=node.ledger,
        trainer_for=broken.trainer_for,
    )
    assert gate.train(task).code is RefusalCode.INCIDENT  # type: ignore[union-attr]
    assert isinstance(node.reply(task), Release)
    assert [mechanism.steps for mechanism in node.ledger.spent()] == [2]


# --- What never leaves ------------------------------------------------------------------------


def test_a_release_says_nothing_of_the_cohort_beside_its_noised_array(
    make_node, make_spec: Spec, task: TrainTask, caplog: pytest.LogCaptureFixture
):
    caplog.set_level(logging.INFO, "cloister.gate")
    nodes = [make_node(owners=owners) for owners in (range(23), range(22), [0] * 50, [])]
    spec = make_spec()
    cards = {content_of(node.answer(Invitation(spec))) for node in nodes}
    replies = [node.answer(task) for node in nodes]
    assert len(cards) == 1
    assert len({len(content_of(records)) for records in replies}) == 1
    scalars = {content_of(RecordDict({"release": records["release"]})) for records in replies}
    assert len(scalars) == 1
    assert len({content_of(records) for records in replies}) == len(nodes)
    assert "mean loss" in caplog.text  # it was there to be told


def test_two_nodes_with_one_cohort_release_different_noise(make_node, task: TrainTask):
    ledgers = [make_node(owners=[]), make_node(owners=[])]
    updates = [node.reply(task).update for node in ledgers]
    assert not any(np.array_equal(updates[0][name], updates[1][name]) for name in updates[0])


def test_why_a_request_was_malformed_stands_in_the_nodes_log(
    make_node, caplog: pytest.LogCaptureFixture
):
    node = make_node()
    records = RecordDict({"invitation": ConfigRecord({"protocol": 1, "oddity": 3})})
    assert read_reply(answer(records, lambda: node.gate)) == MALFORMED
    assert "oddity" in caplog.text


def test_another_protocol_is_refused_as_such_whatever_else_it_says(make_node):
    node = make_node()
    for record in (
        ConfigRecord({"protocol": 2}),
        ConfigRecord({"protocol": 2, "of": "a version to come"}),
    ):
        refusal = read_reply(answer(RecordDict({"invitation": record}), lambda: node.gate))
        assert refusal == RefusalReply(code=RefusalCode.VERSION)
