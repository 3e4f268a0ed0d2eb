"""What each rule does with an element: a table of functions.

A `Treatment` returns the element of the new data set, or None for none. `TREATMENTS` is handed to
the engine, so that a test can put each rule out of force in turn.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from pydicom import config
from pydicom.datadict import dictionary_has_tag, dictionary_VR
from pydicom.dataelem import DataElement
from pydicom.sequence import Sequence

from client.intake.deid import values
from client.intake.deid.graphics import KEYWORDS
from client.intake.deid.lookup import colour_profile, cut_table, in_little_endian
from client.intake.deid.profile import PrivateElement
from client.intake.deid.rules import CODE_KEYWORDS, OF_ACTION, Rule, Scope, code_of, keyword_of
from client.intake.deid.table import RESOLVED, Action, Row, standard_table
from client.intake.deid.vocabulary import words_of

Treatment = Callable[[Scope, DataElement], DataElement | None]

# What must not be empty where it stands (type 1), and is text or a word that may not stay.
_TYPE_ONE: Mapping[str, Any] = {
    "ImageType": ["DERIVED", "SECONDARY"],
    "FrameType": ["DERIVED", "SECONDARY", "OTHER", "NONE"],
    "Modality": "OT",
    "Manufacturer": "REMOVED",
    "ManufacturerModelName": "REMOVED",
    "SoftwareVersions": "REMOVED",
    "LUTExplanation": "REMOVED",
    "LUTLabel": "REMOVED",
    "StackID": "1",
    "OpticalPathIdentifier": "1",
    "DimensionDescriptionLabel": "REMOVED",
    "TextValue": "REMOVED",
    "UniversalEntityID": "urn:removed",
    "UniversalEntityIDType": "URI",
}
# Values whose places have meanings (PS3.3 C.7.6.1.1.2), so none may be left out between others.
_POSITIONAL = ("ImageType", "FrameType")


def _new(element: DataElement, value: Any) -> DataElement:
    if isinstance(value, list) and len(value) == 1:
        (value,) = value
    return DataElement(element.tag, element.VR, value, validation_mode=config.IGNORE)


def _emptied(element: DataElement) -> DataElement:
    if element.VR == "SQ":
        return DataElement(element.tag, "SQ", Sequence())
    nothing = None if element.VR in values.NUMBERS else ""
    return DataElement(element.tag, element.VR, nothing, already_converted=True)


def drop(_scope: Scope, _element: DataElement) -> None:
    """It is not in the new data set."""


def empty_unreadable(scope: Scope, element: DataElement) -> DataElement | None:
    """Nothing of its bytes; if it is the standard's and may stand empty, an empty one."""
    tag = element.tag
    if tag.is_private or not dictionary_has_tag(tag):
        return None
    row = standard_table().find(tag)
    if row is not None and scope.profile.action(row) is Action.REMOVE:
        return None
    return _emptied(DataElement(tag, dictionary_VR(tag).split(" or ")[0], None))


def empty(_scope: Scope, element: DataElement) -> DataElement:
    """Zero length (PS3.15 E.3, Z)."""
    return _emptied(element)


def replace_by_dummy(scope: Scope, element: DataElement) -> DataElement:
    """A value that is the same for everybody (D); of a sequence, one item, cleaned."""
    if element.VR == "SQ":
        items = Sequence(list(element.value)[:1])
        return DataElement(element.tag, "SQ", scope.clean_items(items, scope.depth + 1))
    if element.VR == "UI":
        return replace_uids(scope, element)
    return DataElement(element.tag, element.VR, values.dummy(element.VR))


def pseudonymise(scope: Scope, element: DataElement) -> DataElement:
    """The patient's keyed pseudonym, for the patient; nothing for a patient of an item."""
    return _new(element, scope.patient) if scope.depth == 0 else _emptied(element)


def replace_uids(scope: Scope, element: DataElement) -> DataElement:
    """Keyed UIDs, the same for the same wherever they stand (U); in sequences too (U*)."""
    if element.VR == "SQ":
        return clean_sequence(scope, element)
    return _new(element, values.replaced_uids(values.values_of(element), scope.key.uid))


def clean_sequence(scope: Scope, element: DataElement) -> DataElement:
    """The same rules for what stands in its items."""
    items = Sequence(list(element.value))
    return DataElement(element.tag, "SQ", scope.clean_items(items, scope.depth + 1))


def keep(scope: Scope, element: DataElement) -> DataElement | None:
    """As it stands, for an option's sake; sequences are cleaned (PS3.15 E.3, K)."""
    if element.VR == "SQ":
        return clean_sequence(scope, element)
    if element.VR == "UN":
        return None
    if not values.is_well_formed(element.VR, values.values_of(element)):
        return _emptied(element)
    if element.VR == "AS":
        return _new(element, [values.capped_age(text) for text in values.values_of(element)])
    return DataElement(element.tag, element.VR, element.value)


def clean(scope: Scope, element: DataElement) -> DataElement | None:
    """Dates on another day, of texts the technical words (C); all else is as in Basic."""
    row = standard_table().find(element.tag)
    if element.VR == "SQ":
        return clean_sequence(scope, element)
    if row is None or element.tag.group >> 8 == 0x60:
        return _clean_overlay(scope, element)
    if row.is_date:
        return _move(scope, element, row)
    if element.VR in values.TEXTS and element.tag.group >> 8 != 0x50:
        return _new(element, [words_of(str(value)) for value in values.values_of(element)])
    return _as_in_basic(scope, element, row)


def _clean_overlay(scope: Scope, element: DataElement) -> DataElement | None:
    """What an overlay's bitmap needs; the bitmap itself is cleaned when the walk is over."""
    if keyword_of(int(element.tag)) not in KEYWORDS:
        return None
    if element.VR in ("CS", "IS"):
        known = values.kept_terms if element.VR == "CS" else values.whole_numbers
        return _new(element, known(values.values_of(element)))
    if element.VR == "OW":
        return _new(element, in_little_endian(element.value or b"", scope.level))
    return DataElement(element.tag, element.VR, element.value)


def _move(scope: Scope, element: DataElement, row: Row) -> DataElement | None:
    texts = [str(value) for value in values.values_of(element)]
    moved = [values.moved(element.VR, text, scope.days) for text in texts]
    if any(text is None for text in moved):
        return _as_in_basic(scope, element, row)
    return _new(element, moved) if moved else _emptied(element)


def _as_in_basic(scope: Scope, element: DataElement, row: Row) -> DataElement | None:
    return TREATMENTS[OF_ACTION[RESOLVED[row.basic]]](scope, element)


def keep_safe_private(scope: Scope, element: DataElement) -> DataElement | None:
    """Only what the profile lists, by group, element and creator of the block (PS3.5 7.8)."""
    tag, safe = element.tag, scope.profile.safe_private
    if not safe or tag.element < 0x1000:
        return None
    block = scope.level.get((tag.group, tag.element >> 8))
    creator = "" if block is None else str(block.value).strip(" \0")
    listed = PrivateElement(tag.group, tag.element & 0xFF, creator) in safe
    return keep(scope, element) if listed else None


def keep_numbers(_scope: Scope, element: DataElement) -> DataElement:
    """Of listed attributes, up to a largest number."""
    found = values.values_of(element)
    kept = values.kept_numbers(keyword_of(int(element.tag)), found)
    if not kept:
        return _emptied(element)
    if kept == [getattr(number, "original_string", number) for number in found]:
        return DataElement(element.tag, element.VR, element.value, already_converted=True)
    return _new(element, kept)


def keep_pointers(_scope: Scope, element: DataElement) -> DataElement:
    """Tags of standard attributes."""
    kept = values.kept_pointers(values.values_of(element))
    return _new(element, kept) if kept else _emptied(element)


def keep_terms(_scope: Scope, element: DataElement) -> DataElement:
    """Words of the list; others become empty, or a dummy where something has to stand."""
    keyword = keyword_of(int(element.tag))
    if keyword == "SpecificCharacterSet":
        return _new(element, "ISO_IR 192")
    kept = values.kept_terms(values.values_of(element))
    if keyword in _POSITIONAL and all(kept[:2]):
        last = max(place for place, text in enumerate(kept) if text)
        pairs = list(zip(kept, values.values_of(element), strict=True))[: last + 1]
        return _new(element, [new or ("OTHER" if old else "") for new, old in pairs])
    if kept and kept == values.values_of(element):
        return DataElement(element.tag, element.VR, element.value, already_converted=True)
    known = [text for text in kept if text]
    if known and keyword not in _POSITIONAL:
        return _new(element, known)
    fallback = _TYPE_ONE.get(keyword) if kept else None
    return _emptied(element) if fallback is None else _new(element, fallback)


def keep_code(scope: Scope, element: DataElement) -> DataElement:
    """A code that the standard uses, with the standard's meaning, or the code for "unknown"."""
    return _new(element, code_of(scope.level)[CODE_KEYWORDS.index(element.keyword)])


def keep_table(scope: Scope, element: DataElement) -> DataElement:
    """A lookup table in the length that its descriptor gives."""
    return DataElement(element.tag, element.VR, cut_table(element, scope.level))


def replace_colour_profile(_scope: Scope, element: DataElement) -> DataElement:
    """Put sRGB for whatever there was: an ICC profile has texts and a serial number of its own."""
    return DataElement(element.tag, element.VR, colour_profile())


TREATMENTS: Mapping[Rule, Treatment] = {
    Rule.UNREADABLE: empty_unreadable,
    Rule.STRUCTURE: drop,
    Rule.PRIVATE: keep_safe_private,
    Rule.UNKNOWN: drop,
    Rule.PATIENT: pseudonymise,
    Rule.REMOVE: drop,
    Rule.EMPTY: empty,
    Rule.DUMMY: replace_by_dummy,
    Rule.REPLACE_UID: replace_uids,
    Rule.KEEP: keep,
    Rule.CLEAN: clean,
    Rule.SEQUENCE: clean_sequence,
    Rule.CODE: keep_code,
    Rule.CODE_DETAIL: drop,
    Rule.NUMBER: keep_numbers,
    Rule.POINTER: keep_pointers,
    Rule.UID: replace_uids,
    Rule.TERM: keep_terms,
    Rule.LOOKUP_TABLE: keep_table,
    Rule.COLOUR_PROFILE: replace_colour_profile,
    Rule.OTHER: empty,
}
"""What each rule does."""
