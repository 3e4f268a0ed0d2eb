"""What may stand on a person's screen. Every command needs it, so it imports nothing."""

from __future__ import annotations


def printable(text: str) -> str:
    """A text that somebody else wrote, for a terminal: what would steer it stands as its escape."""
    return "".join(
        mark if mark.isprintable() else mark.encode("unicode_escape").decode() for mark in text
    )
