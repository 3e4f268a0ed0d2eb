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


class Few(logging.Filter):
    """Lets so many records through in a minute, and then says how many it has kept back."""

    def __init__(self, most: int = 60, seconds: float = 60.0) -> None:
        super().__init__()
        self._most, self._seconds = most, seconds
        self._began, self._count = time.monotonic(), 0

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether a record goes on."""
        now = time.monotonic()
        if now - self._began >= self._seconds:
            back, self._began, self._count = self._count - self._most, now, 0
            if back > 0:
                record.msg, record.args = f"{record.getMessage()} (and {back} lines before)", ()
        self._count += 1
        return self._count <= self._most
