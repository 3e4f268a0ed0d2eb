"""What people do while a node is at work: the budget, a no, another cohort."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from client.book import Limit
from client.gate import Gate, Site
from client.ledger import Ledger, Signed
from client.training import Compute, LocalTrainer
from common.errors import CohortError, RefusalCode
from common.messages import Invitation, NodeCard, RefusalReply, Release, TrainTask
from common.spec import RunSpec

ADA = Signed("Ada", "as agreed")
ADMITTED = "c" * 64


class AtWork:
    """A node that trains, and something that happens in the middle of it."""

    def __init__(self, policy: Any, ledger: Ledger, cohort: Any) -> None:
        self.ledger, self.cohort = ledger, cohort
        self.meanwhile: Callable[[], None] = lambda: None
        self.there: list[Exception] = []
        site = Site(policy, ledger, ADMITTED, check_cohort=self._look)
        self.gate = Gate(site, trainer_for=self._trainer)

    def _look(self) -> None:
        for error in self.there:
            raise error

    def _trainer(self, spec: RunSpec, mechanism: Any) -> LocalTrainer:
        node, on_cpu = self, Compute(torch.device("cpu"))

        class Trainer(LocalTrainer):
            def train(self, *arguments: Any) -> Any:
                node.meanwhile()
                return super().train(*arguments)

        return Trainer(spec, self.cohort, declared_size=40, mechanism=mechanism, compute=on_cpu)


@pytest.fixture
def at_work(make_policy: Any, make_ledger: Any, make_spec: Any, write_cohort: Any) -> AtWork:
    policy = make_policy()
    return AtWork(policy, make_ledger(policy), write_cohort(make_spec(), range(23)))


@pytest.fixture
def task(make_spec: Any, global_weights: Any) -> TrainTask:
    return TrainTask(make_spec(), 1, global_weights(make_spec()))


def test_a_budget_that_a_person_books_binds_a_node_at_work(at_work: AtWork, task: TrainTask):
    assert isinstance(at_work.gate.invite(Invitation(task.spec)), NodeCard)
    limit = at_work.ledger.book.limit
    assert limit is not None
    at_work.ledger.set_budget(limit._replace(epsilon=limit.epsilon / 2), ADA)
    spent = at_work.ledger.book.spent()
    no = RefusalReply(code=RefusalCode.POLICY)
    assert at_work.gate.train(task) == no
    assert at_work.gate.invite(Invitation(task.spec)) == no
    assert at_work.ledger.book.spent() == spent
    at_work.ledger.set_budget(Limit(*limit), ADA)
    assert isinstance(at_work.gate.train(task), Release)


@pytest.mark.parametrize("ended", ["denied", "closed"])
def test_a_no_in_the_middle_of_training_holds(at_work: AtWork, task: TrainTask, ended: str):
    assert isinstance(at_work.gate.invite(Invitation(task.spec)), NodeCard)
    run, place = task.spec.digest, at_work.ledger

    def meanwhile() -> None:
        if ended == "denied":
            place.decide(run, approved=False, approval="a" * 64, signed=ADA)
        place.close(run, ADA)

    at_work.meanwhile = meanwhile
    assert isinstance(at_work.gate.train(task), RefusalReply)
    code = RefusalCode.DENIED if ended == "denied" else RefusalCode.REPLAY
    assert at_work.gate.train(task) == RefusalReply(code=code)
    assert [entry.kind for entry in at_work.ledger.entries()].count("committed") == 0
    assert len(at_work.ledger.book.charges) == 1  # it is spent all the same


def test_each_attempt_looks_whether_the_cohort_is_still_there(at_work: AtWork, task: TrainTask):
    assert isinstance(at_work.gate.invite(Invitation(task.spec)), NodeCard)
    assert isinstance(at_work.gate.train(task), Release)  # and keeps its trainer warm

    at_work.there.append(CohortError("another cohort lies there"))
    again = at_work.gate.train(TrainTask(task.spec, 2, task.weights))
    assert isinstance(again, RefusalReply)
    assert again.code is RefusalCode.INCIDENT
    assert len(at_work.ledger.book.charges) == 1
