"""What may stand on a person's screen. Every command needs it, so it imports next to nothing."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from typer import Abort

from common.errors import ConfigError


@contextmanager
def asking(instead: str) -> Iterator[None]:
    """A person is asked something within; where nobody can be, say what to give `instead`.

    Raises:
        ConfigError: if the question met no terminal.
    """
    try:
        yield
    except Abort:
        if sys.stdin.isatty():
            raise  # Ctrl-C
        raise ConfigError(f"nobody can be asked here, without a terminal; {instead}") from None


def printable(text: str) -> str:
    """A text that somebody else wrote, for a terminal: what would steer it stands as its escape."""
    return "".join(
        mark if mark.isprintable() else mark.encode("unicode_escape").decode() for mark in text
    )
