"""Table E.1-1 of PS3.15: what a profile does to each attribute that it names.

`profile.csv` holds every row of edition 2025c of the standard, the newest that two independent
copies of the table agree on, and the seven rows that edition 2026c adds to it. For those seven
only the Basic Profile's action is known to us: their options are empty, so no option relaxes them.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from functools import cache
from importlib.resources import files
from typing import Literal, NamedTuple, get_args

EDITION = "2025c with the rows new in 2026c"
PROFILE_FILE = "profile.csv"

Option = Literal[
    "safe_private",
    "uids",
    "device",
    "institution",
    "patient",
    "full_dates",
    "modified_dates",
    "descriptors",
    "structured",
    "graphics",
]
"""The option columns of the table, by their names in `profile.csv`."""


class Action(StrEnum):
    """The action codes of PS3.15 E.3; those of two or three letters are settled in `RESOLVED`."""

    DUMMY = "D"
    EMPTY = "Z"
    REMOVE = "X"
    KEEP = "K"
    CLEAN = "C"
    REPLACE_UID = "U"


RESOLVED: Mapping[str, Action] = {
    **{action.value: action for action in Action},
    "X/Z": Action.EMPTY,
    "X/D": Action.DUMMY,
    "Z/D": Action.DUMMY,
    "X/Z/D": Action.DUMMY,
    "X/Z/U*": Action.REPLACE_UID,
}
"""Where the table leaves the choice to the attribute's type, the action that is valid for each.

A dummy is valid for type 1, 2 and 3, an empty value for 2 and 3. ``U*`` keeps a sequence with the
UIDs in it replaced (PS3.15 Table E.1-1a).
"""


@dataclass(frozen=True)
class Row:
    """A row: ``tag`` as the standard writes it, and what each option's column says."""

    tag: str
    name: str
    edition: str
    basic: str
    options: Mapping[Option, str]

    @property
    def is_date(self) -> bool:
        """Whether it is one of the dates and times that only the date options speak about."""
        return "modified_dates" in self.options


class _Mask(NamedTuple):
    """A repeating group: the bits of a tag that count, and their values."""

    bits: int
    value: int
    row: Row


@dataclass(frozen=True)
class Table:
    """The rows, found by tag. Private attributes have a row too, which no tag finds."""

    rows: tuple[Row, ...]

    def __post_init__(self) -> None:
        exact = {int(row.tag[1:5] + row.tag[6:10], 16): row for row in self.rows if _exact(row.tag)}
        masks = tuple(_mask(row) for row in self.rows if not (_exact(row.tag) or "odd" in row.tag))
        object.__setattr__(self, "_by_tag", exact)
        object.__setattr__(self, "_masks", masks)

    def find(self, tag: int) -> Row | None:
        """The row of a standard attribute; None if the table does not name it."""
        by_tag: dict[int, Row] = self._by_tag  # type: ignore[attr-defined]
        masks: tuple[_Mask, ...] = self._masks  # type: ignore[attr-defined]
        if (row := by_tag.get(int(tag))) is not None:
            return row
        return next((mask.row for mask in masks if int(tag) & mask.bits == mask.value), None)


@cache
def standard_table() -> Table:
    """The table as it is in `profile.csv`."""
    text = (files(__package__) / PROFILE_FILE).read_text(encoding="utf-8")
    return Table(tuple(_rows(text)))


def _rows(text: str) -> Iterator[Row]:
    for line in csv.DictReader(text.splitlines()):
        options: dict[Option, str] = {name: line[name] for name in get_args(Option) if line[name]}
        yield Row(line["tag"], line["name"], line["edition"], line["basic"], options)


def _exact(tag: str) -> bool:
    return re.fullmatch(r"\([0-9A-F]{4},[0-9A-F]{4}\)", tag) is not None


def _mask(row: Row) -> _Mask:
    digits = row.tag[1:5] + row.tag[6:10]
    bits = int("".join("0" if digit == "x" else "F" for digit in digits), 16)
    return _Mask(bits, int(digits.replace("x", "0"), 16), row)
