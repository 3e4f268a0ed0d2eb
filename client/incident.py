"""What a failure becomes at the edge of a node: a number that leaves, and a text that stays."""

from __future__ import annotations

import logging
import secrets

from common.errors import RefusalCode
from common.messages import RefusalReply

log = logging.getLogger("cloister.gate")

REFUSED = "refused: %.2000s"
"""For the log; a coordinator cannot fill the disk with it."""


def incident_reply() -> RefusalReply:
    """A failure, to be called while an exception is handled: its text goes to the log alone."""
    number = secrets.token_hex(8)
    log.exception("incident %s", number)
    return RefusalReply(code=RefusalCode.INCIDENT, incident=number)
