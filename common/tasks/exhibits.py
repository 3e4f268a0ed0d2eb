"""What a report shows, as plain data: a task says what, the server draws it.

Texts are shown as they stand and are never parsed. Each exhibit that is a picture says in words
what it shows (`says`), for those who do not see it. `note` is for all: how it is to be read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray


@dataclass(frozen=True)
class Line:
    """A curve, and, where known, the band around it.

    Attributes:
        name: what it is of; a single line of a chart needs none.
        x: ascending.
        y: as many.
        low: the lower limit.
        high: the upper limit.
        limits_at: the x at which the limits are known; None: at the curve's own.
        steps: whether a value holds from the x before until its own, instead of a straight line.
        marks: whether each point has a mark, and its limits are a bar instead of a band.
    """

    name: str
    x: NDArray[Any]
    y: NDArray[Any]
    low: NDArray[Any] | None = None
    high: NDArray[Any] | None = None
    limits_at: NDArray[Any] | None = None
    steps: bool = False
    marks: bool = False


@dataclass(frozen=True)
class Bars:
    """Grey bars on the ground of a chart: how many there are at each x, to no scale."""

    x: NDArray[Any]
    counts: NDArray[Any]


@dataclass(frozen=True)
class Chart:
    """Curves in one frame.

    Attributes:
        title: what it is, such as ``FROC``.
        x: what runs to the right, with its unit.
        y: what runs up, with its unit.
        lines: the curves; of several, none is drawn with a band, and each has its colour.
        says: the figure in words.
        unit_square: whether both axes run from 0 to 1.
        diagonal: whether chance (or perfection) is the diagonal.
        level: a horizontal line of comparison, or None.
        bars: how many stand behind each x, or None.
        note: how it is to be read, where `says` does not say it; the same note of neighbours is
            printed once.
    """

    title: str
    x: str
    y: str
    lines: Sequence[Line]
    says: str
    unit_square: bool = False
    diagonal: bool = False
    level: float | None = None
    bars: Bars | None = None
    note: str = ""


@dataclass(frozen=True)
class Matrix:
    """Counts of decisions about what is true.

    Attributes:
        title: what is counted, and how was decided.
        names: of the classes.
        counts: (classes, classes) whole numbers, rows by truth and columns by decision.
        says: a reading of it, in sentences for everyone; empty: none.
    """

    title: str
    names: Sequence[str]
    counts: NDArray[Any]
    says: str = ""


@dataclass(frozen=True)
class Table:
    """Rows of texts under a head; the first column names the row.

    A column of figures alone is set to the right.
    """

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""


@dataclass(frozen=True)
class Gallery:
    """Pictures with a caption each; shown only where the spec's ``evaluation.gallery`` asks for it.

    Attributes:
        title: what they are.
        pictures: (N, H, W, 3) uint8; large ones are shown smaller.
        captions: N short texts.
        says: what all of them show.
        note: how they are to be read, such as which colour is what.
    """

    title: str
    pictures: NDArray[Any]
    captions: Sequence[str]
    says: str
    note: str = ""


Exhibit = Chart | Matrix | Table | Gallery
