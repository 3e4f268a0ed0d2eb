"""Labels of studies from the coded findings of their Structured Reports.

The hospital writes which codes mean which class of a run, in a TOML file::

    verified = true              # only reports that somebody has signed; the default

    [[finding]]                  # the item "Finding" with the value "Pneumothorax"
    class = "pneumothorax"
    concept = ["121071", "DCM"]
    value = ["36118008", "SCT"]

    [[finding]]                  # the item "Pneumothorax" with yes, no, present, absent, …
    class = "pneumothorax"
    concept = ["36118008", "SCT"]

    [[finding]]                  # a measurement: there from 8 mm on
    class = "nodule"
    concept = ["81827009", "SCT"]
    at_least = 8.0
    unit = "mm"

Nothing is guessed. A study gets a label if its reports say so in these codes and say nothing
else; where they contradict each other, are unclear or are silent, the study is listed instead.
``unmentioned = "absent"`` is the hospital's own word that a complete report of its templates
names whatever was found, so that silence means absence.
"""

from __future__ import annotations

import csv
import io
import json
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Annotated, Literal, NamedTuple, Self

from pydantic import Field, ValidationError, model_validator
from pydicom.dataset import Dataset
from pydicom.uid import UID

from client.intake.builder import Label
from client.intake.deidentify import text_of
from client.intake.items import Item
from client.intake.part10 import DicomFile, Directory, Limits
from client.intake.quiet import quiet
from client.intake.source import NotUsed
from client.intake.structured_report import (
    ANY_CLASS,
    CLASSES,
    Coded,
    Presence,
    Statement,
    presence_of,
    statements,
)
from common.errors import ConfigError, IntakeError
from common.files import write_durably
from common.spec import Section, Task, explain_detail

KEY = "StudyInstanceUID"
Text = Annotated[str, Field(min_length=1, max_length=128, pattern=r"^[^\s\p{Cc}].*$")]
CodeText = tuple[Text, Text]
"""Code value and coding scheme designator."""
NO_REPORT = "no structured report"
NOT_READ = "its structured reports are of classes other than Basic Text, Enhanced and Comprehensive"
NOT_VERIFIED = "its structured reports are not verified; verified = false would take them"
SILENT = "its structured reports name no finding of the file with the codes"
BROKEN = "one of its structured reports cannot be read"
OTHER_PATIENT = "conflict: its objects name different patients"


class Said(Enum):
    """What one statement says of a class."""

    PRESENT = "present"
    ABSENT = "absent"
    OUTSIDE = "outside"  # a measurement that is not in the range: another one may well be
    UNCLEAR = "unclear"


class Finding(Section):
    """Which content items speak of a class, and what makes it present.

    With ``value``, an item of that value. With ``at_least`` or ``below`` or both, a number in
    that range and in that unit. With neither, an item whose value is yes, present or positive.
    """

    name: Annotated[str, Field(alias="class")]
    concept: CodeText
    value: CodeText | None = None
    at_least: float | None = None
    below: float | None = None
    unit: Text | None = None

    @model_validator(mode="after")
    def _parts_fit(self) -> Self:
        measured = self.at_least is not None or self.below is not None
        if measured and self.value is not None:
            raise ValueError("value together with at_least or below; expected one or the other")
        if measured != (self.unit is not None):
            raise ValueError('at_least or below needs a unit (UCUM, such as "mm"), and only they')
        if self.at_least is not None and self.below is not None and self.at_least >= self.below:
            raise ValueError(f"at_least = {self.at_least:g} is not less than below")
        return self

    def says(self, statement: Statement) -> Said | None:
        """What a statement says of the class; None if it is about something else."""
        if statement.name != Coded.of(*self.concept):
            return None
        said = self._measured(statement) if self.unit else self._stated(statement)
        if said is None or statement.presence is Presence.PRESENT:
            return said
        if said is Said.PRESENT and statement.presence is Presence.ABSENT:
            return Said.ABSENT
        return Said.UNCLEAR

    def _stated(self, statement: Statement) -> Said | None:
        if statement.value is None:
            return Said.UNCLEAR
        if self.value is not None and statement.value == Coded.of(*self.value):
            return Said.PRESENT
        presence = presence_of(statement.value)
        if self.value is None:
            return Said((presence or Presence.UNCLEAR).value)
        # It is asked for one value, and another one says nothing of it, but for a plain no.
        return None if presence in (None, Presence.PRESENT) else Said(presence.value)

    def _measured(self, statement: Statement) -> Said:
        number = statement.number
        if number is None or statement.unit != self.unit:
            return Said.UNCLEAR
        enough = self.at_least is None or number >= self.at_least
        return (
            Said.PRESENT if enough and (self.below is None or number < self.below) else Said.OUTSIDE
        )


class Codes(Section):
    """The whole file.

    Attributes:
        verified: take only reports whose Verification Flag is VERIFIED (PS3.3 C.17.2).
        unmentioned: whether a class that complete reports do not mention is absent.
        finding: for each class any number.
    """

    verified: bool = True
    unmentioned: Literal["unknown", "absent"] = "unknown"
    finding: Annotated[tuple[Finding, ...], Field(min_length=1)]


def read_codes(path: Path, task: Task) -> Codes:
    """Read the file with the codes of a task's classes.

    Raises:
        ConfigError: naming file, key, value and what was expected; a class that the run does
            not have, or has and the file does not name.
    """
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
        codes = Codes.model_validate_json(json.dumps(document, default=str))
    except ValidationError as error:
        lines = (f"{path}: {explain_detail(detail)}" for detail in error.errors())
        raise ConfigError("\n".join(lines)) from None
    except (OSError, ValueError, RecursionError) as error:  # not there, not text, not TOML
        raise ConfigError(f"{path}: {error}; expected a TOML file with [[finding]]") from error
    _check_classes(str(path), codes, task)
    return codes


def _check_classes(source: str, codes: Codes, task: Task) -> None:
    named = {finding.name for finding in codes.finding}
    # The negative class of a binary task is there if the positive one is said not to be.
    needed = task.classes[1:] if task.kind == "binary" else task.classes
    expected = ", ".join(map(repr, task.classes))
    if unknown := sorted(named.difference(task.classes)):
        raise ConfigError(f"{source}: class {unknown[0]!r}: the run's classes are {expected}")
    if missing := [name for name in needed if name not in named]:
        raise ConfigError(f"{source}: class {missing[0]!r} has no [[finding]]; write at least one")
    if codes.unmentioned == "absent" and task.kind == "multiclass":
        raise ConfigError(
            f"{source}: unmentioned = 'absent' in a multiclass task, where no class is what is "
            "left if the others are absent; leave it out"
        )


@dataclass
class _Study:
    """What the objects of a study say, gathered; reports go by their instance UID."""

    reports: dict[str, frozenset[Statement]] = field(default_factory=dict)
    complete: set[str] = field(default_factory=set)
    superseded: set[str] = field(default_factory=set)
    patients: set[str] = field(default_factory=set)
    without: str = NO_REPORT
    broken: bool = False

    def current(self) -> frozenset[Statement]:
        """What the reports say that no later one replaces."""
        counted = (told for uid, told in self.reports.items() if uid not in self.superseded)
        return frozenset().union(*counted)


class Labelled(NamedTuple):
    """Labels by StudyInstanceUID, and the studies and objects without one, with the reason."""

    labels: Mapping[str, Label]
    not_labelled: tuple[NotUsed, ...]


class Findings:
    """Gathers what the objects of a source say, one by one, and then decides.

    Args:
        codes: which mean what.
        task: of the run.
        limits: what an object may ask for.
    """

    def __init__(self, codes: Codes, task: Task, limits: Limits | None = None) -> None:
        self._codes, self._task, self._limits = codes, task, limits or Limits()
        self._studies: dict[str, _Study] = {}
        self._not_read: list[NotUsed] = []

    def take(self, item: Item) -> None:
        """Read one object, of any kind; what is wrong with it is listed in the end."""
        try:
            with quiet(), item.open(self._limits.read_bytes) as stream:
                self._take(DicomFile.parse(stream, self._limits).header)
        except Directory:
            return
        except IntakeError as error:
            self._not_read.append(NotUsed(item.place, str(error)))
        except Exception as error:  # noqa: BLE001
            # Parsers raise whatever the bytes of a broken file drive them to, and quote them.
            reason = f"cannot be read ({type(error).__name__})"
            self._not_read.append(NotUsed(item.place, reason))

    def _take(self, header: Dataset) -> None:
        uid = text_of(header, KEY)
        if not uid or not UID(uid).is_valid:
            raise IntakeError(f"its {KEY} is empty, or is no UID")
        study = self._studies.setdefault(uid, _Study())
        if patient := text_of(header, "PatientID"):
            study.patients.add(patient)
        kind = text_of(header, "SOPClassUID")
        if kind in CLASSES:
            self._take_report(study, header)
        elif kind.startswith(ANY_CLASS) and study.without == NO_REPORT:
            study.without = NOT_READ

    def _take_report(self, study: _Study, header: Dataset) -> None:
        if self._codes.verified and text_of(header, "VerificationFlag") != "VERIFIED":
            study.without = NOT_VERIFIED
            return
        try:
            told = frozenset(filter(self._is_of_interest, statements(header)))
            replaced = frozenset(_predecessors(header))
        except Exception:
            study.broken = True
            raise
        instance = text_of(header, "SOPInstanceUID")
        study.reports[instance] = study.reports.get(instance, frozenset()) | told
        study.superseded |= replaced
        if text_of(header, "CompletionFlag") == "COMPLETE":
            study.complete.add(instance)

    def _is_of_interest(self, statement: Statement) -> bool:
        return any(finding.says(statement) for finding in self._codes.finding)

    def labels(self) -> Labelled:
        """A label for each study whose reports give one; for the others the reason."""
        labels: dict[str, Label] = {}
        not_labelled: list[NotUsed] = []
        for uid, study in sorted(self._studies.items()):
            try:
                labels[uid] = self._label(study)
            except IntakeError as reason:
                not_labelled.append(NotUsed(uid, str(reason)))
        return Labelled(labels, (*not_labelled, *self._not_read))

    def _label(self, study: _Study) -> Label:
        if study.broken:
            raise IntakeError(BROKEN)
        if not study.reports:
            raise IntakeError(study.without)
        if len(study.patients) > 1:
            raise IntakeError(OTHER_PATIENT)
        classes, told = self._task.classes, study.current()
        present = {name: self._state(name, told) for name in classes}
        whole = study.complete - study.superseded
        silence = False if whole and self._codes.unmentioned == "absent" else None
        if self._task.kind == "binary":
            return _binary(classes, present, silence)
        if self._task.kind == "multiclass":
            return _multiclass(classes, present)
        return _multilabel(present, silence)

    def _state(self, name: str, told: frozenset[Statement]) -> bool | None:
        """Whether a class is there; None if nothing is said of it."""
        rules = [finding for finding in self._codes.finding if finding.name == name]
        said = {answer for rule in rules for one in told if (answer := rule.says(one))}
        if Said.UNCLEAR in said:
            raise IntakeError(
                f"unclear: {name!r} has a value, a unit or a qualifier that the codes do not settle"
            )
        if {Said.PRESENT, Said.ABSENT} <= said:
            raise IntakeError(f"conflict: {name!r} is said to be present and to be absent")
        return Said.PRESENT in said if said else None


def _binary(
    classes: tuple[str, ...], present: Mapping[str, bool | None], silence: bool | None
) -> int:
    """The negative class is there if it is said to be, or if the positive one is said not to be.

    That the negative one is said not to be makes no positive one: it may be a third thing.
    """
    negative, positive = classes
    there = present[positive]
    if there is None:
        there = False if present[negative] else silence
    if there is None:
        raise IntakeError(SILENT)
    if present[negative] is not None and present[negative] == there:
        raise IntakeError(f"conflict: of {negative!r} and {positive!r} one is there, and only one")
    return int(there)


def _multiclass(classes: tuple[str, ...], present: Mapping[str, bool | None]) -> int:
    there = [name for name in classes if present[name]]
    if len(there) > 1:
        raise IntakeError(f"conflict: {', '.join(map(repr, there))} exclude each other")
    if not there:
        raise IntakeError(SILENT)
    return classes.index(there[0])


def _multilabel(present: Mapping[str, bool | None], silence: bool | None) -> tuple[int, ...]:
    known = {name: silence if there is None else there for name, there in present.items()}
    if set(known.values()) == {None}:
        raise IntakeError(SILENT)
    for name, there in known.items():
        if there is None:
            raise IntakeError(f"nothing is said of {name!r}")
    return tuple(int(bool(there)) for there in known.values())


def _predecessors(header: Dataset) -> Iterator[str]:
    """The reports that a report replaces (PS3.3 C.17.2)."""
    for study in header.get("PredecessorDocumentsSequence") or []:
        for series in study.get("ReferencedSeriesSequence") or []:
            for report in series.get("ReferencedSOPSequence") or []:
                if uid := text_of(report, "ReferencedSOPInstanceUID"):
                    yield uid


def write_labels(path: Path, labels: Mapping[str, Label], task: Task) -> None:
    """Write a label table that `client.intake.labels` reads, for its owner's eyes alone (0600).

    Raises:
        ConfigError: if the file exists, or cannot be written.
    """
    columns = task.classes if task.kind == "multilabel" else ("label",)
    table = io.StringIO(newline="")
    writer = csv.writer(table)
    writer.writerow((KEY, *columns))
    for uid, label in labels.items():
        cells = label if isinstance(label, tuple) else (task.classes[label],)
        writer.writerow((uid, *cells))
    if path.exists():
        raise ConfigError(f"{path}: exists already, and nothing is overwritten; choose another")
    try:
        write_durably(path, table.getvalue().encode(), 0o600)
    except OSError as error:
        raise ConfigError(f"{path}: the labels cannot be written ({error})") from error
