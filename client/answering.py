"""What a worker process does (`client.worker`): open the node, then answer what it is handed."""

from __future__ import annotations

import logging
from multiprocessing.connection import Connection
from pathlib import Path

from client.app import REQUESTS, answer, open_node
from client.incident import REFUSED
from client.link import Parcel
from client.worker import Asked, get, put
from common.errors import CloisterError, LedgerError, MessageError, RefusalCode
from common.messages import RefusalReply

log = logging.getLogger("cloister.gate")


def opened(home: Path) -> dict[str, str]:
    """Open the node, and hold it; what stands in the way, for `client.worker` to raise."""
    try:
        open_node(home)
    except LedgerError as error:
        return {"error": "ledger", "text": str(error)}
    except CloisterError as error:
        return {"error": "config", "text": str(error)}
    return {"error": "", "text": ""}


def serve(pipe: Connection, home: Path) -> None:
    """Answer for ever.

    Raises:
        EOFError, OSError: when the node is gone.
    """
    while True:
        kind, parcel = get(pipe.recv_bytes)
        put(pipe, Asked(kind, said(kind, parcel, home)))


def said(kind: str, parcel: Parcel, home: Path) -> Parcel:
    """The answer to a request of a known kind; on every path."""
    try:
        records = parcel.records()
    except MessageError as error:
        log.warning(REFUSED, error)
        return Parcel.of(RefusalReply(code=RefusalCode.MALFORMED).to_records())
    return Parcel.of(answer(records, lambda: open_node(home), expected=REQUESTS[kind]))
