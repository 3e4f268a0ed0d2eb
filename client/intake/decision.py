"""What a person sees of a file that waits, and what that person says of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from client.intake.deid.burned_in import Box

LONGEST = 1024
"""Pixels of the longer side of a picture."""


@dataclass(frozen=True)
class Shot:
    """A picture of one frame for a person's eyes: patient data, never outside the sealed store.

    Attributes:
        frame: its number, from 0.
        before: a PNG of the frame as it came, with at most `LONGEST` pixels a side.
        after: a PNG of what is kept; empty where nothing is.
        boxes: what was found (and blanked, if kept), in the frame's own rows and columns.
        rows, columns: the frame's own size.
    """

    frame: int
    before: bytes
    after: bytes
    boxes: tuple[Box, ...]
    rows: int
    columns: int


@dataclass(frozen=True)
class Decision:
    """What a person said of one file.

    Attributes:
        verdict: ``release``: it may be taken in; ``reject``: nothing of it is kept, whatever was
            kept before.
        blank: rectangles to blank in every frame, beside those that are found.
        found: whether those that are found are blanked as well.
        by: who said so.
        at: when, ISO 8601 in UTC.
        why: in that person's words.
    """

    verdict: Literal["release", "reject"]
    blank: tuple[Box, ...] = ()
    found: bool = True
    by: str = ""
    at: str = ""
    why: str = ""
