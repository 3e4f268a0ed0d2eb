"""Which rule holds for an element of a data set, and what each rule does with it.

`rule_of` looks at an element in the order of the standard and of default deny: what nobody can
read, what is private, what the profile's table names; then, of all the rest, sequences, numbers,
words, codes and UIDs by list. `Rule.OTHER` is the last one: the value goes.

What each rule then does is in `client.intake.deid.treatments`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

from pydicom.datadict import dictionary_has_tag
from pydicom.dataelem import DataElement
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence
from pydicom.tag import BaseTag

from client.intake.deid import values
from client.intake.deid.lookup import COLOUR_PROFILE, TABLES
from client.intake.deid.profile import Profile
from client.intake.deid.table import Action, standard_table
from client.intake.deid.vocabulary import meaning_of
from client.intake.keys import SiteKey

UNKNOWN_CODE = ("261665006", "SCT", "Unknown")
CODE_KEYWORDS = ("CodeValue", "CodingSchemeDesignator", "CodeMeaning")
_CODE_VALUES = ("CodeValue", "LongCodeValue", "URNCodeValue")
# The rest of a code item (PS3.3 8.8): where the code came from, which its scheme says already.
_CODE_DETAILS = frozenset(
    {
        "LongCodeValue",
        "URNCodeValue",
        "CodingSchemeVersion",
        "ContextIdentifier",
        "ContextUID",
        "MappingResource",
        "MappingResourceUID",
        "MappingResourceName",
        "ContextGroupVersion",
        "ContextGroupExtensionFlag",
        "ContextGroupLocalVersion",
        "ContextGroupExtensionCreatorUID",
    }
)
_COMMAND_GROUP, _META_GROUP, _PIXEL_GROUP = 0x0000, 0x0002, 0x7FE0
_PATIENT_ID = 0x00100020
# Identities under somebody's key (PS3.15 E.1.1): ours are not in the file at all.
_ENCRYPTED = 0x04000500
# Said anew of every file when its header is done (`client.intake.deid.stamp`).
_SAID_ANEW = frozenset({0x00120062, 0x00120063, 0x00120064, 0x00280301, 0x00280302, 0x00280303})


class Rule(StrEnum):
    """Why an element is treated as it is."""

    UNREADABLE = "unreadable"
    STRUCTURE = "structure"
    PRIVATE = "private"
    UNKNOWN = "unknown"
    PATIENT = "patient identifier"
    REMOVE = "table: remove"
    EMPTY = "table: empty"
    DUMMY = "table: dummy"
    REPLACE_UID = "table: replace UID"
    KEEP = "table: keep"
    CLEAN = "table: clean"
    SEQUENCE = "sequence"
    CODE = "code"
    CODE_DETAIL = "code detail"
    NUMBER = "number"
    POINTER = "pointer"
    UID = "UID"
    TERM = "term"
    LOOKUP_TABLE = "lookup table"
    COLOUR_PROFILE = "colour profile"
    OTHER = "not on a list"


OF_ACTION = {
    Action.REMOVE: Rule.REMOVE,
    Action.EMPTY: Rule.EMPTY,
    Action.DUMMY: Rule.DUMMY,
    Action.REPLACE_UID: Rule.REPLACE_UID,
    Action.KEEP: Rule.KEEP,
    Action.CLEAN: Rule.CLEAN,
}


@dataclass(frozen=True)
class Scope:
    """What holds while one data set or one item of it is walked.

    Attributes:
        profile: the hospital's choice.
        key: the site's.
        patient: the patient's pseudonym.
        days: by which the patient's dates move.
        level: the data set or item that the element stands in, unverified.
        depth: 0 for the data set, 1 for the items of its sequences, and so on.
        clean_items: applies the rules to the items of a sequence.
    """

    profile: Profile
    key: SiteKey
    patient: str
    days: int
    level: Dataset
    depth: int
    clean_items: Callable[[Sequence, int], Sequence]


def rule_of(scope: Scope, element: DataElement) -> Rule:
    """The one rule that holds for an element."""
    for test in (_of_tag, _of_code, _of_table, _of_group):
        if (rule := test(scope, element)) is not None:
            return rule
    return _of_value(element)


def _of_tag(scope: Scope, element: DataElement) -> Rule | None:
    tag = element.tag
    if tag.is_private:
        return Rule.PRIVATE
    if _is_structure(tag, scope.depth):
        return Rule.STRUCTURE
    return Rule.PATIENT if tag == _PATIENT_ID else None


def _is_structure(tag: BaseTag, depth: int) -> bool:
    """Group lengths, commands, file meta, pixels, and what is said anew: written by us or not."""
    return (
        tag.element == 0
        or tag.group in (_COMMAND_GROUP, _META_GROUP, _PIXEL_GROUP)
        or tag == _ENCRYPTED
        or (depth == 0 and int(tag) in _SAID_ANEW)
    )


def _of_code(scope: Scope, element: DataElement) -> Rule | None:
    if scope.depth and is_code(scope.level):
        if element.keyword in CODE_KEYWORDS:
            return Rule.CODE
        return Rule.CODE_DETAIL if element.keyword in _CODE_DETAILS else None
    return None


def _of_table(scope: Scope, element: DataElement) -> Rule | None:
    row = standard_table().find(element.tag)
    return None if row is None else OF_ACTION[scope.profile.action(row)]


def _of_group(scope: Scope, element: DataElement) -> Rule | None:
    """The rest of an overlay is of use only with its data; curves and unknown groups never."""
    tag = element.tag
    if tag.group >> 8 not in (0x50, 0x60) and dictionary_has_tag(tag):
        return None
    graphics = "graphics" in scope.profile.options and tag.group >> 8 == 0x60
    return Rule.CLEAN if graphics else Rule.UNKNOWN


def _of_value(element: DataElement) -> Rule:
    representation, keyword = element.VR, element.keyword
    if representation == "SQ":
        return Rule.SEQUENCE
    if keyword in TABLES:
        return Rule.LOOKUP_TABLE
    if keyword == COLOUR_PROFILE:
        return Rule.COLOUR_PROFILE
    if representation in values.NUMBERS:
        return Rule.NUMBER
    if representation == "CS" or representation in values.TEXTS:
        return Rule.TERM
    return {"UI": Rule.UID, "AT": Rule.POINTER}.get(representation, Rule.OTHER)


def is_code(item: Dataset) -> bool:
    """Whether an item is a code (PS3.3 8.8)."""
    return any(keyword in item for keyword in _CODE_VALUES)


def code_of(item: Dataset) -> tuple[str, str, str]:
    """Value, scheme and meaning from the standard; the code for "unknown" if it has none."""
    value, scheme = (str(item.get(name) or "").strip(" \0") for name in CODE_KEYWORDS[:2])
    meaning = meaning_of(scheme, value)
    return (value, scheme, meaning) if meaning else UNKNOWN_CODE
