"""The Flower ClientApp: wiring only. Records in, the gate's answer out, nothing else.

A node's ``client.app:app`` opens the site that ``CLOISTER_NODE_HOME`` names: its policy, its
ledger, its cohort, and fresh randomness for each attempt. The simulation wires the same functions
to sites of its own making (`register`), with randomness that can be drawn again.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import lru_cache
from pathlib import Path

from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp

from client.gate import Gate
from client.home import NodeHome
from client.incident import REFUSED, incident_reply
from common.errors import ConfigError, LedgerError, MessageError, RefusalCode, VersionError
from common.files import locked
from common.messages import (
    CLOSE,
    COUNT,
    INVITE,
    TRAIN,
    Closing,
    EvaluationTask,
    Invitation,
    RefusalReply,
    Reply,
    Request,
    TrainTask,
    read_request,
)
from common.noise import KeystreamSource, fresh_keystream

log = logging.getLogger("cloister.gate")

GateOf = Callable[[Context], Gate]

REQUESTS: Mapping[str, type[Request]] = {
    INVITE: Invitation,
    TRAIN: TrainTask,
    COUNT: EvaluationTask,
    CLOSE: Closing,
}
"""What comes under which kind of message; a node answers no other."""

app = ClientApp()

_held: dict[Path, ExitStack] = {}
_PATIENCE = 3.0


def register(client_app: ClientApp, gate_of: GateOf) -> None:
    """Answer the requests of the protocol on `client_app` by the gate of the context."""

    def answering(expected: type[Request]) -> Callable[[Message, Context], Message]:
        def reply(message: Message, context: Context) -> Message:
            asked = message.content if message.has_content() else RecordDict()
            said = answer(asked, lambda: gate_of(context), expected=expected)
            return Message(said, reply_to=message)

        return reply

    for kind, expected in REQUESTS.items():
        category, _, action = kind.partition(".")
        getattr(client_app, category)(action)(answering(expected))


def answer(
    records: RecordDict,
    gate_of: Callable[[], Gate],
    *,
    expected: type[Request] | None = None,
) -> RecordDict:
    """The records of the reply to one request; on every path, whatever fails.

    Args:
        records: what was asked.
        gate_of: opens the gate.
        expected: the request that came under this kind of message; any, if not said.
    """
    try:
        request = read_request(records)
        if expected is not None and not isinstance(request, expected):
            raise MessageError(
                f"a {type(request).__name__} came where a {expected.__name__} is expected"
            )
        return _ask(gate_of(), request).to_records()
    except MessageError as error:
        log.warning(REFUSED, error)
        other = isinstance(error, VersionError)
        code = RefusalCode.VERSION if other else RefusalCode.MALFORMED
        return RefusalReply(code=code).to_records()
    except LedgerError as error:
        log.error("this node does not open: %s", error)
        return RefusalReply(code=RefusalCode.LEDGER).to_records()
    except Exception:  # noqa: BLE001 - the edge of the node: no text may leave it
        return incident_reply().to_records()


@lru_cache(maxsize=1)
def open_node(home: Path, keystream: KeystreamSource = fresh_keystream) -> Gate:
    """The gate of the node installed in `home`, which this process then holds to its end.

    With two of them, whether a task asked twice comes back as it was or trained afresh would tell
    how long training takes (docs/privacy.md 6).

    Args:
        home: the node's folder.
        keystream: as `Gate`; a node leaves it at its default.

    Raises:
        ConfigError: if another process answers for it, or the folder is not in order.
    """
    with ExitStack() as held:
        if home not in _held:
            _hold(home, held)
        gate = NodeHome.open(home).gate(keystream)
        _held.setdefault(home, held.pop_all())
    return gate


def _hold(home: Path, held: ExitStack) -> None:
    """Take the folder for this process; one that was killed lets go of it in a moment."""
    last = time.monotonic() + _PATIENCE
    while True:
        try:
            held.enter_context(locked(home))
            return
        except OSError as error:
            if not isinstance(error, BlockingIOError) or time.monotonic() > last:
                raise ConfigError(
                    f"{home}: another process answers for this node, or it is no folder ({error})"
                ) from error
            time.sleep(0.1)


def _ask(gate: Gate, request: Request) -> Reply:
    match request:
        case Invitation():
            return gate.invite(request)
        case TrainTask():
            return gate.train(request)
        case EvaluationTask():
            return gate.count(request)
        case Closing():
            return gate.close(request)


def _installed_gate(_: Context) -> Gate:
    home = os.environ.get("CLOISTER_NODE_HOME")
    if not home:
        raise ConfigError("CLOISTER_NODE_HOME is not set: expected the folder that holds node.toml")
    return open_node(Path(home))


register(app, _installed_gate)
