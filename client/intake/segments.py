"""The table of segments: which class of a run each segment of a DICOM segmentation is.

A CSV with the columns ``segment`` and ``class``. A segment is named by the code of its property,
``scheme:value`` (``SCT:10200004``), or by its label as the files have it. A class is one of the
run's; what is listed as the first, the background, is looked at and not marked.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path

from client.intake.dicom import NO_LABEL
from client.intake.labels import LabelEntry, LabelTable, read_rows
from client.intake.masks import Segment
from common.errors import ConfigError, IntakeError
from common.spec import Task

_COLUMNS = ("segment", "class")


def read_segments(path: Path, task: Task) -> LabelTable:
    """Read a table of segments; its entries' labels are class numbers.

    Raises:
        ConfigError: naming file, line and value: it cannot be read, a column is missing, a
            segment stands there twice, a class is none of the run's, or there is no line.
    """
    if task.kind != "mask":
        raise ConfigError(f"{path}: a table of segments is for a run of masks, not {task.kind!r}")
    entries: dict[str, LabelEntry] = {}
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, strict=True)
            reader.fieldnames = header = [name.strip() for name in reader.fieldnames or ()]
            if missing := [name for name in _COLUMNS if name not in header]:
                raise ConfigError(
                    f"{path}:1: column {missing[0]!r} is missing; expected {', '.join(_COLUMNS)}"
                )
            for line, row in read_rows(str(path), reader):
                _add(entries, f"{path}:{line}", LabelEntry(0, "", line), row, task)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(f"{path}: cannot be read as a CSV in UTF-8 ({error})") from error
    if not entries:
        raise ConfigError(f"{path}: has a header and no line; expected one for each segment")
    return LabelTable(str(path), "segment", entries)


def _add(
    entries: dict[str, LabelEntry],
    where: str,
    entry: LabelEntry,
    row: Mapping[str, str],
    task: Task,
) -> None:
    name, kind = (row[column] for column in _COLUMNS)
    if not name or name in entries:
        raise ConfigError(f"{where}: segment {name!r} is empty or stands there twice")
    if kind not in task.classes:
        known = ", ".join(map(repr, task.classes))
        raise ConfigError(f"{where}: class {kind!r} is unknown; the run's classes are {known}")
    entries[name] = LabelEntry(task.classes.index(kind), "", entry.line)


def classes_of(segments: Mapping[int, Segment], table: LabelTable) -> dict[int, int]:
    """The class number of each segment, by the segment's number.

    Raises:
        IntakeError: if the table has no line for one of them, or two that say different things.
    """
    numbers: dict[int, int] = {}
    for number, segment in segments.items():
        found = {table.entries[name].label for name in segment.names if name in table.entries}
        said = [label for label in found if isinstance(label, int)]
        if len(said) > 1:
            raise IntakeError(
                f"its segment {number} has one class by its code and another by its label in the "
                "table of segments; decide which is right"
            )
        if not said:
            raise IntakeError(
                f"{NO_LABEL}: its segment {number} ({segment.kind.meaning}) is in no line of the "
                "table of segments; write one, with the background's class if it is to be passed "
                "over"
            )
        numbers[number] = said[0]
    return numbers
