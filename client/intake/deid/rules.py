"""Which rule holds for an element of a data set, and what each rule does with it.

`rule_of` looks at a tag in the order of default deny: what is private, what is a code, what the
profile's table names. Of all the rest `rule_of_value` looks at the value: sequences, numbers, words
and UIDs by list. `Rule.OTHER` is the last one: the value goes.

What each rule then does is in `client.intake.deid.treatments`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property, lru_cache

from pydicom.datadict import dictionary_has_tag, keyword_for_tag
from pydicom.dataelem import DataElement
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence
from pydicom.tag import BaseTag, Tag

from client.intake.deid import values
from client.intake.deid.lookup import COLOUR_PROFILE, TABLES
from client.intake.deid.profile import Profile
from client.intake.deid.table import Action, standard_table
from client.intake.deid.vocabulary import meaning_of
from client.intake.deidentify import text_of
from client.intake.keys import SiteKey

UNKNOWN_CODE = ("261665006", "SCT", "Unknown")
CODE_KEYWORDS = ("CodeValue", "CodingSchemeDesignator", "CodeMeaning")
_CODE_VALUES = tuple(map(Tag, ("CodeValue", "LongCodeValue", "URNCodeValue")))
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
_MOST_KNOWN = 2**14
_COMMAND_GROUP, _META_GROUP, _PIXEL_GROUP, _DELIMITER_GROUP = 0x0000, 0x0002, 0x7FE0, 0xFFFE
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


_BEFORE_CODES = frozenset({Rule.PRIVATE, Rule.STRUCTURE, Rule.PATIENT})
OF_ACTION = {
    Action.REMOVE: Rule.REMOVE,
    Action.EMPTY: Rule.EMPTY,
    Action.DUMMY: Rule.DUMMY,
    Action.REPLACE_UID: Rule.REPLACE_UID,
    Action.KEEP: Rule.KEEP,
    Action.CLEAN: Rule.CLEAN,
}


@lru_cache(maxsize=2**13)
def keyword_of(tag: int) -> str:
    """The keyword of a standard attribute; empty for any other."""
    return keyword_for_tag(tag)


class TagRules:
    """The rule for each attribute that its tag alone settles under a profile; remembered."""

    def __init__(self, profile: Profile) -> None:
        self._profile = profile
        self._known: dict[tuple[int, bool], Rule | None] = {}

    def __call__(self, tag: BaseTag, *, top: bool) -> Rule | None:
        """The rule, or None if the value decides.

        Args:
            tag: of the element.
            top: whether it stands in the data set itself, and in no item.
        """
        key = (int(tag), top)
        if key not in self._known:
            if len(self._known) >= _MOST_KNOWN:
                self._known.clear()
            self._known[key] = _of_tag(tag, top=top) or self._of_table(tag) or self._of_group(tag)
        return self._known[key]

    def _of_table(self, tag: BaseTag) -> Rule | None:
        row = standard_table().find(tag)
        return None if row is None else OF_ACTION[self._profile.action(row)]

    def _of_group(self, tag: BaseTag) -> Rule | None:
        """The rest of an overlay is of use only with its data; curves and unknown groups never."""
        if tag.group >> 8 not in (0x50, 0x60) and dictionary_has_tag(tag):
            return None
        graphics = "graphics" in self._profile.options and tag.group >> 8 == 0x60
        return Rule.CLEAN if graphics else Rule.UNKNOWN


@lru_cache(maxsize=16)
def tag_rules(profile: Profile) -> TagRules:
    """The rules by tag under a profile."""
    return TagRules(profile)


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
        by_tag: the rules by tag under the profile.
    """

    profile: Profile
    key: SiteKey
    patient: str
    days: int
    level: Dataset
    depth: int
    clean_items: Callable[[Sequence, int], Sequence]
    by_tag: TagRules

    @cached_property
    def in_code(self) -> bool:
        """Whether the level is the item of a code."""
        return self.depth > 0 and is_code(self.level)


def rule_of(scope: Scope, tag: BaseTag) -> Rule | None:
    """The one rule that holds for an element whatever its value; None if the value decides."""
    rule = scope.by_tag(tag, top=scope.depth == 0)
    if not scope.in_code or rule in _BEFORE_CODES:
        return rule
    keyword = keyword_of(int(tag))
    if keyword in CODE_KEYWORDS:
        return Rule.CODE
    return Rule.CODE_DETAIL if keyword in _CODE_DETAILS else rule


def rule_of_value(element: DataElement) -> Rule:
    """The rule for an element whose value decides."""
    representation, keyword = element.VR, keyword_of(int(element.tag))
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


def _of_tag(tag: BaseTag, *, top: bool) -> Rule | None:
    if tag.is_private:
        return Rule.PRIVATE
    if _is_structure(tag, top=top):
        return Rule.STRUCTURE
    return Rule.PATIENT if tag == _PATIENT_ID else None


def _is_structure(tag: BaseTag, *, top: bool) -> bool:
    """Group lengths, commands, delimiters, file meta, pixels, what is said anew: ours or none."""
    return (
        tag.element == 0
        or tag.group in (_COMMAND_GROUP, _META_GROUP, _PIXEL_GROUP, _DELIMITER_GROUP)
        or tag == _ENCRYPTED
        or (top and int(tag) in _SAID_ANEW)
    )


def is_code(item: Dataset) -> bool:
    """Whether an item is a code (PS3.3 8.8)."""
    return any(tag in item for tag in _CODE_VALUES)


def code_of(item: Dataset) -> tuple[str, str, str]:
    """Value, scheme and meaning from the standard; the code for "unknown" if it has none."""
    value, scheme = (text_of(item, name) for name in CODE_KEYWORDS[:2])
    meaning = meaning_of(scheme, value)
    return (value, scheme, meaning) if meaning else UNKNOWN_CODE
