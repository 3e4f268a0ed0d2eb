"""What a report shows, as plain data: a task says what, the server draws it.

Texts are shown as they stand and are never parsed. Each exhibit says in words what it shows
(`says`), for those who do not see it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from numpy.typing import NDArray


@dataclass(frozen=True)
class Line:
    """A curve: x and y of equal length, and, where known, the band around y."""

    name: str
    x: NDArray[Any]
    y: NDArray[Any]
    low: NDArray[Any] | None = None
    high: NDArray[Any] | None = None
    steps: bool = False


@dataclass(frozen=True)
class Chart:
    """Curves in one frame.

    Attributes:
        title: what it is, such as ``FROC``.
        x: what runs to the right, with its unit.
        y: what runs up, with its unit.
        lines: the curves; a single one needs no name.
        says: the figure in words.
        unit_square: whether both axes run from 0 to 1.
        diagonal: whether chance (or perfection) is the diagonal.
        level: a horizontal line of comparison, or None.
    """

    title: str
    x: str
    y: str
    lines: Sequence[Line]
    says: str
    unit_square: bool = False
    diagonal: bool = False
    level: float | None = None


@dataclass(frozen=True)
class Matrix:
    """Counts, rows by truth and columns by decision."""

    title: str
    names: Sequence[str]
    counts: NDArray[Any]


@dataclass(frozen=True)
class Table:
    """Rows of texts under a head; the first column names the row."""

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""


@dataclass(frozen=True)
class Gallery:
    """Pictures with a caption each: (N, H, W, 3) uint8, shown at least 150 pixels wide."""

    title: str
    pictures: NDArray[Any]
    captions: Sequence[str]
    says: str
    note: str = field(default="")


Exhibit = Chart | Matrix | Table | Gallery
