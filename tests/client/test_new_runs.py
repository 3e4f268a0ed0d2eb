"""A coordinator that invites without end: the ledger does not grow by being asked."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

from client.gate import Gate, Site
from common.clock import Clock
from common.errors import RefusalCode
from common.messages import Closing, Invitation, NodeCard, RefusalReply
from common.spec import RunSpec


def test_so_many_new_runs_a_day_and_no_more_however_fast_they_are_closed(
    make_policy: Any, make_ledger: Any, make_spec: Callable[..., RunSpec]
):
    policy = make_policy(limits={"greatest_new_runs_a_day": 3})
    date = [datetime(2026, 3, 1, 12, tzinfo=UTC)]
    clock = Clock(date=lambda: date[0])
    ledger = make_ledger(policy, clock=clock)
    gate = Gate(Site(policy, ledger, "c" * 64), trainer_for=lambda *_: None, clock=clock)  # type: ignore[arg-type]

    def ask(number: int) -> NodeCard | RefusalReply:
        spec = make_spec(name=f"run-{number}")
        answer = gate.invite(Invitation(spec))
        if number % 2:  # some stay open
            gate.close(Closing(spec.digest))
        return answer

    assert [type(ask(number)) for number in (1, 2, 3)] == [NodeCard] * 3
    before = list(ledger.entries())
    for number in range(4, 40):
        assert ask(number) == RefusalReply(code=RefusalCode.LATER)
    assert list(ledger.entries()) == before
    assert isinstance(ask(2), NodeCard)  # one that is here already is none of the new
    assert list(ledger.entries()) == before

    date[0] += timedelta(days=1, seconds=1)
    assert isinstance(ask(40), NodeCard)
