"""What a worker process does (`client.worker`): open the node, then answer what it is handed."""

from __future__ import annotations

import logging
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

from client.app import REQUESTS, answer, open_node
from client.gate import Gate
from client.incident import REFUSED
from client.worker import Asked, get, put
from common.errors import CloisterError, LedgerError, MessageError, RefusalCode
from common.messages import RefusalReply
from common.noise import KeystreamSource
from common.parcel import Parcel

log = logging.getLogger("cloister.gate")


def opened(home: Path, keystream: KeystreamSource) -> dict[str, str]:
    """Open the node, and hold it; what stands in the way, for `client.worker` to raise."""
    try:
        open_node(home, keystream)
    except LedgerError as error:
        return {"error": "ledger", "text": str(error)}
    except CloisterError as error:
        return {"error": "config", "text": str(error)}
    return {"error": "", "text": ""}


def serve(pipe: Connection, home: Path, keystream: KeystreamSource) -> None:
    """Answer for ever.

    Raises:
        EOFError, OSError: when the node is gone.
    """
    while True:
        kind, parcel = get(pipe.recv_bytes)
        put(pipe, Asked(kind, said(kind, parcel, lambda: open_node(home, keystream))))


def said(kind: str, parcel: Parcel, gate_of: Callable[[], Gate]) -> Parcel:
    """The answer to a request of a known kind; on every path."""
    try:
        records = parcel.records()
    except MessageError as error:
        log.warning(REFUSED, error)
        return Parcel.of(RefusalReply(code=RefusalCode.MALFORMED).to_records())
    return Parcel.of(answer(records, gate_of, expected=REQUESTS[kind]))
