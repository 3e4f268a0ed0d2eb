"""What a Structured Report says in codes and numbers (PS3.3 A.35, C.17.3); text is never read.

A report is a tree of content items. Only what is said of the patient of now counts: items under
a heading such as History, about another subject, or that merely describe another item's name or
context are left out. A finding that is qualified as absent, or as anything but present, is said
to be so.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from enum import Enum
from typing import NamedTuple

from pydicom.dataelem import RawDataElement
from pydicom.dataset import Dataset
from pydicom.sr._snomed_dict import mapping
from pydicom.uid import (
    BasicTextSRStorage,
    Comprehensive3DSRStorage,
    ComprehensiveSRStorage,
    EnhancedSRStorage,
    ExtensibleSRStorage,
)

from client.intake.deidentify import text_of

CLASSES = (
    BasicTextSRStorage,
    EnhancedSRStorage,
    ComprehensiveSRStorage,
    Comprehensive3DSRStorage,
    ExtensibleSRStorage,
)
"""SOP classes of the reports that are read."""
ANY_CLASS = "1.2.840.10008.5.1.4.1.1.88."
"""What the UIDs of all SOP classes of Structured Reports begin with."""
_DEEPEST = 64
_UNDEFINED = 0xFFFFFFFF
_RETIRED_SNOMED = ("SRT", "SNM3", "99SDM")  # PS3.16 8.1


class Coded(NamedTuple):
    """A coded concept, by what identifies it; SNOMED RT as the SNOMED CT that replaced it."""

    value: str
    scheme: str

    @classmethod
    def of(cls, value: str, scheme: str) -> Coded:
        """A concept as it is written in a report or in a file."""
        if scheme in _RETIRED_SNOMED and (current := mapping["SRT"].get(value)):
            return cls(current, "SCT")
        return cls(value, scheme)


class Presence(Enum):
    """How a statement is made."""

    PRESENT = "present"
    ABSENT = "absent"
    UNCLEAR = "unclear"


class Statement(NamedTuple):
    """One content item: what it is about, and what it says.

    Attributes:
        name: the concept.
        value: of a CODE item; None if the item has none that can be read.
        number: of a NUM item; None if it has none.
        unit: of the number (UCUM).
        presence: whether it is qualified.
    """

    name: Coded
    value: Coded | None
    number: float | None
    unit: str
    presence: Presence


def _coded(scheme: str, *values: str) -> frozenset[Coded]:
    return frozenset(Coded(value, scheme) for value in values)


# CID 230, 240 and 250: yes, present, positive; and the like of SNOMED CT and DCM (TID 4022).
_PRESENT = _coded("SCT", "373066001", "52101004", "10828004", "373573001", "410515003")
_PRESENT |= _coded("DCM", "121053")
_ABSENT = _coded("SCT", "373067005", "272519000", "2667000", "260385009", "373572006", "410516002")
_ABSENT |= _coded("DCM", "121054")
# Undetermined, unknown, suspected, known possible, indeterminate, equivocal, not applicable.
_UNCLEAR = _coded("SCT", "373068000", "261665006", "415684004", "410590009", "82334004")
_UNCLEAR |= _coded("SCT", "42425007", "385432009") | _coded("DCM", "121059")
# Names of items that qualify another: presence of property, presence, finding context.
_QUALIFIERS = _coded("DCM", "121052") | _coded("SCT", "705057003", "408729009")
# Certainty of feature, finding, impression, and of whatever.
_CERTAINTIES = _coded("DCM", "111011", "111012", "111013") | _coded("SCT", "246103008")

# Headings (CID 7001) of what was, is asked or is advised: history, request, prior procedures,
# previous findings, recommendations, indications, presentation, clinical information, comparison.
_NOT_OF_NOW = _coded("DCM", "121060", "121062", "121066", "121068", "121074", "121109", "121110")
_NOT_OF_NOW |= _coded("LN", "11329-0", "55115-0", "55114-3", "18834-2", "18783-1", "18785-6")
_NOT_OF_NOW |= _coded("LN", "55108-5", "55752-0")
_MEASUREMENT_GROUP = Coded("125007", "DCM")
_SUBJECT_CLASS, _PATIENT = Coded("121024", "DCM"), Coded("121025", "DCM")
# Relationships (C.17.3.2.4) of items that say nothing by themselves.
_CONTEXT = ("HAS OBS CONTEXT", "HAS ACQ CONTEXT", "HAS CONCEPT MOD")
_NAME_MODIFIER = "HAS CONCEPT MOD"


def presence_of(value: Coded) -> Presence | None:
    """What a code says of whether something is there; None if it is about something else."""
    for codes, presence in (
        (_PRESENT, Presence.PRESENT),
        (_ABSENT, Presence.ABSENT),
        (_UNCLEAR, Presence.UNCLEAR),
    ):
        if value in codes:
            return presence
    return None


def statements(report: Dataset) -> Iterator[Statement]:
    """Everything that a report says in CODE and NUM items, at any depth.

    Raises:
        Exception: of any kind, if the report is broken.
    """
    _check_whole(report)
    waiting = [(report, 0)]
    while waiting:
        parent, depth = waiting.pop()
        if depth > _DEEPEST:
            raise ValueError("content items are nested too deep")
        children = list(parent.get("ContentSequence") or [])
        if not _is_of_the_patient(children):
            continue
        around = _qualified(children) if _name(parent) == _MEASUREMENT_GROUP else Presence.PRESENT
        for item in children:
            if text_of(item, "RelationshipType") in _CONTEXT or _name(item) in _NOT_OF_NOW:
                continue
            said = _statement(item, around)
            if said is not None:
                yield said
            if said is None or said.presence is Presence.PRESENT:
                waiting.append((item, depth + 1))


def _check_whole(report: Dataset) -> None:
    """A report that is cut short is read without a word, and then lacks what stood behind."""
    raw = report.get_item("ContentSequence") if "ContentSequence" in report else None
    if isinstance(raw, RawDataElement) and raw.length not in (len(raw.value or b""), _UNDEFINED):
        raise ValueError("a report that is cut short")
    if not report.get("ContentSequence"):
        raise ValueError("a report without content")


def _statement(item: Dataset, around: Presence) -> Statement | None:
    """What a CODE or NUM item says; None for any other."""
    kind, name = text_of(item, "ValueType"), _name(item)
    if kind not in ("CODE", "NUM") or name is None or name in _QUALIFIERS | _CERTAINTIES:
        return None
    presence = _qualified(list(item.get("ContentSequence") or []))
    if presence is Presence.PRESENT and kind == "CODE":
        presence = around
    if kind == "CODE":
        return Statement(name, _code(item, "ConceptCodeSequence"), None, "", presence)
    number, unit = _measured(item)
    return Statement(name, None, number, unit, presence)


def _qualified(children: list[Dataset]) -> Presence:
    """What the items beside or below a finding make of it: the least certain of them."""
    said = {_qualification(child) for child in children}
    if Presence.UNCLEAR in said:
        return Presence.UNCLEAR
    return Presence.ABSENT if Presence.ABSENT in said else Presence.PRESENT


def _qualification(child: Dataset) -> Presence:
    name = _name(child)
    if name in _CERTAINTIES:
        return Presence.UNCLEAR
    value = _code(child, "ConceptCodeSequence")
    presence = presence_of(value) if value else None
    if name in _QUALIFIERS:
        return presence or Presence.UNCLEAR
    if text_of(child, "RelationshipType") == _NAME_MODIFIER and presence is not None:
        # "No" to something else that is a part of the finding's name: who knows what remains.
        return Presence.PRESENT if presence is Presence.PRESENT else Presence.UNCLEAR
    return Presence.PRESENT


def _is_of_the_patient(children: list[Dataset]) -> bool:
    """Whether the subject is not said to be another, such as a fetus (TID 1006)."""
    return all(
        _code(child, "ConceptCodeSequence") == _PATIENT
        for child in children
        if _name(child) == _SUBJECT_CLASS
    )


def _name(item: Dataset) -> Coded | None:
    return _code(item, "ConceptNameCodeSequence")


def _code(item: Dataset, keyword: str) -> Coded | None:
    """The concept of a code sequence (PS3.3 8.8); None if it has not exactly one."""
    codes = item.get(keyword) or []
    if len(codes) != 1:
        return None
    keywords = ("CodeValue", "LongCodeValue", "URNCodeValue")
    value = next((text for keyword in keywords if (text := text_of(codes[0], keyword))), "")
    return Coded.of(value, text_of(codes[0], "CodingSchemeDesignator")) if value else None


def _measured(item: Dataset) -> tuple[float | None, str]:
    """Number and unit of a NUM item (C.18.1); no number where it was not measured."""
    measured = item.get("MeasuredValueSequence") or []
    if len(measured) != 1:
        return None, ""
    try:
        number = float(text_of(measured[0], "NumericValue"))
    except ValueError:
        return None, ""
    unit = _code(measured[0], "MeasurementUnitsCodeSequence")
    return (number if math.isfinite(number) else None), unit.value if unit else ""
