"""Label tables: a CSV that a person wrote, read strictly.

One column names what a line is about; its header says which identifier it is. A binary or
multiclass task has a column ``label`` with the name of a class; a multilabel task has one column
for each class, holding 0 or 1; a task whose target is no label has neither. An optional column
``split`` holds ``train``, ``validation``, ``test`` or nothing. Where lines are of single images and
the run asks for modalities, a column ``modality`` names that of each. Other columns are not read.
"""

from __future__ import annotations

import csv
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from client.intake.builder import Label
from client.intake.source import NotUsed
from common.cohort import LABELLED, SPLITS
from common.errors import ConfigError, IntakeError
from common.spec import Input, Task

DICOM_KEYS = ("PatientID", "StudyInstanceUID", "AccessionNumber", "SOPInstanceUID")
OF_AN_IMAGE = ("SOPInstanceUID", "file")
_NUMBERS = {"0": 0, "1": 1}


@dataclass(frozen=True)
class LabelEntry:
    """What the table says of one key, and on which line of the file.

    ``modality`` is empty where the table says none, or speaks of more than one image.
    """

    label: Label
    split: str
    line: int
    patient: str = ""
    modality: str = ""


@dataclass(frozen=True)
class LabelTable:
    """A whole table.

    Attributes:
        source: the file's path.
        key: the column that names what a line is about.
        entries: by key.
        names_patients: whether there was a column ``patient`` with a value in it.
    """

    source: str
    key: str
    entries: Mapping[str, LabelEntry]

    @property
    def names_patients(self) -> bool:
        """Whether any line names its patient."""
        return any(entry.patient for entry in self.entries.values())

    def place(self, entry: LabelEntry) -> str:
        """Where an entry of it stands."""
        return f"{self.source}:{entry.line}" if entry.line else self.source


def read_labels(path: Path, task: Task, keys: Sequence[str] = DICOM_KEYS) -> LabelTable:
    """Read a label table for `task`.

    Args:
        path: a CSV in UTF-8 with a header, separated by commas.
        task: whose classes the labels name.
        keys: columns of which exactly one must be there.

    Raises:
        ConfigError: naming file, line, value and what was expected: no such file, a missing
            column, no or several key columns, an unknown class, an empty value, one key with
            different labels or splits, no line at all.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            return _read(str(path), csv.DictReader(file, strict=True), task, keys)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(f"{path}: cannot be read as a CSV in UTF-8 ({error})") from error


def modality_of(entry: LabelEntry, named: str, settings: Input) -> str:
    """The modality of an image, as the table says it, or else as the image itself does.

    Where the run asks for none, none is kept: what is kept is a word of the run's file, and never
    one of a header or a table.

    Raises:
        IntakeError: if the run asks for modalities, and this is none of them.
    """
    found, asked = entry.modality or named, settings.modalities
    if asked and found not in asked:
        said = "its modality is none of" if found else "nothing says its modality; expected one of"
        raise IntakeError(f"{said} {', '.join(asked)} (input.modalities)")
    return found if asked else ""


def labels_without_image(labels: LabelTable, used: Collection[str]) -> Iterator[NotUsed]:
    """The lines of a table of which nothing was kept; for the hospital's own eyes."""
    for name, entry in labels.entries.items():
        if name not in used:
            where = f"{labels.source}:{entry.line} ({labels.key} {name})"
            yield NotUsed(where, "label without a usable image")


def _read(source: str, reader: csv.DictReader[str], task: Task, keys: Sequence[str]) -> LabelTable:
    header = [name.strip() for name in reader.fieldnames or ()]
    reader.fieldnames = header
    key = _check_header(source, header, task, keys)
    entries: dict[str, LabelEntry] = {}
    for line, row in read_rows(source, reader):
        name = row[key]
        if not name:
            raise ConfigError(f"{source}:{line}: {key} is empty; write one or drop the line")
        modality = row.get("modality", "") if key in OF_AN_IMAGE else ""
        entry = _entry(f"{source}:{line}", line, row, task, modality)
        _check_same(f"{source}:{line}", f"{key} {name!r}", entries.setdefault(name, entry), entry)
    if not entries:
        raise ConfigError(f"{source}: has a header and no line; expected one for each {key}")
    return LabelTable(source, key, entries)


def read_rows(source: str, reader: csv.DictReader[str]) -> Iterator[tuple[int, dict[str, str]]]:
    """(line number, stripped values) of every line of a CSV that is not blank.

    Raises:
        ConfigError: for a line that has not as many values as the header.
    """
    for row in reader:
        if None in row or None in row.values():
            raise ConfigError(
                f"{source}:{reader.line_num}: has not as many values as the header; "
                "put a value with a comma in it between double quotes"
            )
        stripped = {name: value.strip() for name, value in row.items()}
        if any(stripped.values()):
            yield reader.line_num, stripped


def _check_header(source: str, header: list[str], task: Task, keys: Sequence[str]) -> str:
    """The one key column; all other columns that the task needs are there too."""
    found = [name for name in header if name in keys]
    if len(found) != 1:
        seen = ", ".join(map(repr, header)) or "nothing"
        raise ConfigError(
            f"{source}:1: the header is {seen}; expected exactly one of {', '.join(keys)}"
            + ("" if len(header) > 1 else " and a label, separated by commas")
        )
    twice = sorted({name for name in header if header.count(name) > 1})
    if twice:
        raise ConfigError(f"{source}:1: column {twice[0]!r} stands there twice")
    needed = _label_columns(task)
    for name in needed:
        if name not in header:
            raise ConfigError(
                f"{source}:1: column {name!r} is missing; a {task.kind} task needs "
                f"{', '.join(map(repr, needed))}, the header has {', '.join(map(repr, header))}"
            )
    return found[0]


def _label_columns(task: Task) -> tuple[str, ...]:
    if task.kind not in LABELLED:
        return ()
    return task.classes if task.kind == "multilabel" else ("label",)


def _entry(where: str, line: int, row: Mapping[str, str], task: Task, modality: str) -> LabelEntry:
    split = row.get("split", "")
    if split not in SPLITS:
        expected = "train, validation, test or nothing"
        raise ConfigError(f"{where}: split {split!r} is unknown; expected {expected}")
    return LabelEntry(_label(where, row, task), split, line, row.get("patient", ""), modality)


def _label(where: str, row: Mapping[str, str], task: Task) -> Label:
    if task.kind not in LABELLED:
        return () if task.kind == "boxes" else 0
    if task.kind == "multilabel":
        return tuple(_flag(where, name, row[name]) for name in task.classes)
    name = row["label"]
    if name not in task.classes:
        expected = ", ".join(map(repr, task.classes))
        problem = f"label {name!r} is unknown" if name else "the label is empty"
        raise ConfigError(f"{where}: {problem}; the run's classes are {expected}")
    return task.classes.index(name)


def _flag(where: str, name: str, value: str) -> int:
    if value not in _NUMBERS:
        raise ConfigError(f"{where}: column {name!r} has {value!r}; expected 0 or 1")
    return _NUMBERS[value]


def _check_same(where: str, what: str, first: LabelEntry, again: LabelEntry) -> None:
    """One thing has one label, split, patient and modality, however often it is named."""
    for attribute in ("label", "split", "patient", "modality"):
        if getattr(first, attribute) != getattr(again, attribute):
            raise ConfigError(
                f"{where}: {what} has another {attribute} here than on line {first.line}; "
                "decide which is right"
            )
