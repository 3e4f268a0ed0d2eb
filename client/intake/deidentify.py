"""What a data set says, read with care: it may be broken, hostile, or name a patient anywhere."""

from __future__ import annotations

from functools import cache

from pydicom.dataset import Dataset
from pydicom.tag import BaseTag, Tag
from pydicom.uid import UID

from client.intake.deid.vocabulary import terms

_SHORT = 5


def text_of(dataset: Dataset, keyword: str) -> str:
    """An attribute's value as text without its padding; empty where there is none."""
    element = dataset.get(_tag(keyword))
    if element is None or (value := element.value) is None:
        return ""
    parts = [value] if isinstance(value, str | int | float) else list(value)
    return "\\".join(map(str, parts)).strip(" \0\t\r\n")


def items_of(dataset: Dataset, keyword: str) -> list[Dataset]:
    """The items of a sequence; none where it is missing or empty."""
    element = dataset.get(_tag(keyword))
    return [] if element is None else list(element.value or ())


@cache
def _tag(keyword: str) -> BaseTag:
    return Tag(keyword)


def quoted(text: str) -> str:
    """A value as a reason may show it: a technical term, a short number, or not at all.

    In a file that is broken or hostile any attribute may hold a name.
    """
    short = text.removeprefix("-").isdecimal() and len(text) <= _SHORT
    return repr(text) if not text or short or text in terms() else "a text that is not shown here"


def counted(number: int) -> str:
    """A number as a reason may show it: one of more digits could be that of a patient."""
    most = 10**_SHORT - 1
    return str(number) if number <= most else f"more than {most}"


def registered_name(uid: str) -> str:
    """The standard's name for a UID, in quotes; whatever else stands in its place is not shown."""
    name = UID(uid).name
    return repr(name) if name != uid else "one that the standard does not register"
