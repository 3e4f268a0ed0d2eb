"""What goes wrong again and again, told once in a while: people read a log, and it has a disk."""

from __future__ import annotations

import logging
import time
from collections import OrderedDict

_MOST = 1000


class Told:
    """Tells the same thing at most once in `seconds`."""

    def __init__(self, seconds: float = 60.0) -> None:
        self._seconds = seconds
        self._when: OrderedDict[str, float] = OrderedDict()

    def tell(self, log: logging.Logger, text: str) -> None:
        """Log `text` as a warning, unless it has just been."""
        now = time.monotonic()
        if now - self._when.get(text, -self._seconds) < self._seconds:
            return
        self._when[text] = now
        self._when.move_to_end(text)
        if len(self._when) > _MOST:
            self._when.popitem(last=False)
        log.warning("%s", text)
