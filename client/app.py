"""The Flower ClientApp: wiring only. Records in, the gate's answer out, nothing else.

A node's ``client.app:app`` opens the site that ``CLOISTER_NODE_HOME`` names: its policy, its
ledger, its cohort, and fresh randomness for each attempt. The simulation wires the same functions
to sites of its own making (`register`), with randomness that can be drawn again.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp

from client.gate import Gate, incident_reply
from client.ledger import Ledger
from client.policy import read_policy
from client.training import LocalTrainer
from common.accounting import SubsampledGaussian
from common.cohort import Cohort
from common.errors import ConfigError, MessageError, RefusalCode, VersionError
from common.messages import (
    Invitation,
    NodeCard,
    RefusalReply,
    Release,
    TrainTask,
    read_request,
)
from common.spec import RunSpec

log = logging.getLogger("cloister.gate")

GateOf = Callable[[Context], Gate]

app = ClientApp()


def register(client_app: ClientApp, gate_of: GateOf) -> None:
    """Answer the two requests of the protocol on `client_app` by the gate of the context."""

    @client_app.query("invite")
    def invite(message: Message, context: Context) -> Message:
        return Message(answer(message.content, lambda: gate_of(context)), reply_to=message)

    @client_app.train("step")
    def step(message: Message, context: Context) -> Message:
        return Message(answer(message.content, lambda: gate_of(context)), reply_to=message)


def answer(records: RecordDict, gate_of: Callable[[], Gate]) -> RecordDict:
    """The records of the reply to one request; on every path, whatever fails."""
    try:
        request = read_request(records)
        return _ask(gate_of(), request).to_records()
    except MessageError as error:
        log.warning("refused: %s", error)
        other = isinstance(error, VersionError)
        code = RefusalCode.VERSION if other else RefusalCode.MALFORMED
        return RefusalReply(code=code).to_records()
    except Exception:  # noqa: BLE001 - the edge of the node: no text may leave it
        return incident_reply().to_records()


@lru_cache(maxsize=1)
def open_node(home: Path) -> Gate:
    """The gate of the node installed in `home`: ``node.toml``, and the ledger beside it."""
    policy = read_policy(home / "node.toml")
    cohort = Cohort.open(home / policy.cohort).with_split("", "train")

    def trainer_for(spec: RunSpec, mechanism: SubsampledGaussian | None) -> LocalTrainer:
        cohort.check_fits(spec)
        return LocalTrainer(spec, cohort, declared_size=policy.declared_size, mechanism=mechanism)

    return Gate(policy=policy, ledger=Ledger(home / "ledger"), trainer_for=trainer_for)


def _ask(gate: Gate, request: Invitation | TrainTask) -> NodeCard | Release | RefusalReply:
    return gate.invite(request) if isinstance(request, Invitation) else gate.train(request)


def _installed_gate(_: Context) -> Gate:
    home = os.environ.get("CLOISTER_NODE_HOME")
    if not home:
        raise ConfigError("CLOISTER_NODE_HOME is not set: expected the folder that holds node.toml")
    return open_node(Path(home))


register(app, _installed_gate)
