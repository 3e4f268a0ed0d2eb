"""Single values: which may stay, what stands for one that may not, and dates on another day.

Everything here is a pure function of one value representation (PS3.5 6.2) and its values.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from datetime import date, timedelta
from functools import partial
from typing import Any

from pydicom.datadict import dictionary_has_tag
from pydicom.dataelem import DataElement
from pydicom.multival import MultiValue
from pydicom.tag import Tag

from client.intake.deid.vocabulary import is_known_uid, largest_numbers, terms

NUMBERS = frozenset({"US", "SS", "UL", "SL", "UV", "SV", "FL", "FD", "DS", "IS"})
TEXTS = frozenset({"LO", "SH", "ST", "LT", "UT", "UC"})
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d{1,3})?")
_DATE = re.compile(r"(\d{4})\.?(\d{2})\.?(\d{2})")
_TIME = re.compile(r"\d{2}(:?\d{2}(:?\d{2}(\.\d{1,6})?)?)?")
_DATETIME = re.compile(r"(\d{8})(\d{0,6}(?:\.\d{1,6})?)([+-]\d{4})?")
_AGE = re.compile(r"\d{3}[DWMY]")
_UID = re.compile(r"[0-9.]{1,64}")
_OLDEST = 90
"""Years: all older ages are one age, as the HIPAA Safe Harbor rule has it."""

DUMMY_DATE = "19000101"
_TEXT_DUMMY = "REMOVED"
_DUMMIES: dict[str, Any] = {
    **dict.fromkeys((*TEXTS, "PN", "AE"), _TEXT_DUMMY),
    **dict.fromkeys(("US", "SS", "UL", "SL", "UV", "SV", "FL", "FD", "AT"), 0),
    **dict.fromkeys(("DS", "IS"), "0"),
    **dict.fromkeys(("OB", "OW", "OV", "OL", "OF", "OD", "UN"), bytes(8)),
    "AS": "000Y",
    "CS": "UNKNOWN",
    "DA": DUMMY_DATE,
    "DT": f"{DUMMY_DATE}000000",
    "TM": "000000",
    "UR": "urn:removed",
}


def values_of(element: DataElement) -> list[Any]:
    """The values of an element; none if it is empty."""
    value = element.value
    if value is None or value in ("", b""):
        return []
    return list(value) if isinstance(value, MultiValue | list | tuple) else [value]


def dummy(representation: str) -> Any:
    """A value that is valid for a value representation and the same for everybody."""
    return _DUMMIES.get(representation, "")


def kept_numbers(keyword: str, values: Iterable[Any]) -> list[Any] | None:
    """The numbers of a listed attribute; None if it is not listed, or one is too large for it."""
    largest = largest_numbers().get(keyword)
    if largest is None:
        return None
    texts = [str(value).strip(" \0") for value in values]
    fine = all(_NUMBER.fullmatch(text) and abs(float(text)) <= largest for text in texts)
    return list(texts if _are_texts(values) else values) if fine else None


def _are_texts(values: Iterable[Any]) -> bool:
    """Whether numbers are of DS or IS, which keep the spelling of the file beside the number."""
    return any(hasattr(value, "original_string") or isinstance(value, str) for value in values)


def is_well_formed(representation: str, values: Sequence[Any]) -> bool:
    """Whether values are what their representation says: what a profile keeps is no free text.

    Only of the representations that have a form; a text has none.
    """
    form = _FORMS.get(representation)
    return form is None or all(form(str(value).strip(" \0")) for value in values)


def whole_numbers(values: Iterable[Any]) -> list[str]:
    """Numbers of frames and the like, of at most five digits; others become empty."""
    texts = [str(value).strip(" \0") for value in values]
    return [text if text.isdecimal() and len(text) <= 5 else "" for text in texts]


def kept_terms(values: Iterable[Any]) -> list[str]:
    """Those values that are terms of the list, one for one; the others become empty."""
    texts = [str(value).strip(" \0") for value in values]
    return [text if text in terms() else "" for text in texts]


def kept_pointers(values: Iterable[Any]) -> list[Any] | None:
    """Attribute tags, if all of them are of standard attributes."""
    tags = [Tag(value) for value in values]
    return tags if all(dictionary_has_tag(tag) for tag in tags) else None


def replaced_uids(values: Iterable[Any], new: Callable[[str], str]) -> list[str]:
    """UIDs that the standard registered, as they are; every other by `new`."""
    texts = [str(value).strip(" \0") for value in values]
    return [text if is_known_uid(text) else new(text) for text in texts if text]


def moved(representation: str, text: str, days: int) -> str | None:
    """A DA, DT or TM some days later; a time of day stays. None for anything else.

    Args:
        representation: its value representation.
        text: its value.
        days: may be negative.
    """
    text = text.strip(" \0")
    if representation == "TM":
        return text if _TIME.fullmatch(text) else None
    if representation == "DA":
        return _moved_date(text, days)
    if representation == "DT" and (match := _DATETIME.fullmatch(text)):
        day = _moved_date(match[1], days)
        return None if day is None else day + match[2] + (match[3] or "")
    return None


def _moved_date(text: str, days: int) -> str | None:
    """Its form is that of PS3.5 6.2, or with the points of ACR-NEMA; the result's is the former."""
    match = _DATE.fullmatch(text)
    if match is None:
        return None
    try:
        day = date(*(int(part) for part in match.groups())) + timedelta(days)
    except (ValueError, OverflowError):
        return None
    return f"{day.year:04d}{day.month:02d}{day.day:02d}"


def capped_age(age: str) -> str:
    """A well-formed age string (AS), at most 90 years."""
    years = int(age[:3]) / {"D": 365.25, "W": 52.18, "M": 12, "Y": 1}[age[3]]
    return f"{_OLDEST:03d}Y" if years >= _OLDEST else age


_FORMS: dict[str, Callable[[str], object]] = {
    "AS": _AGE.fullmatch,
    "DS": _NUMBER.fullmatch,
    "IS": _NUMBER.fullmatch,
    "UI": _UID.fullmatch,
    **{name: partial(moved, name, days=0) for name in ("DA", "TM", "DT")},
}
