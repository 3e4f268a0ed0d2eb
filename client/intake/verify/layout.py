"""Where each element of a DICOM file begins and ends: a reader of its own, strict and complete.

pydicom reads files as they come; what it skips or mends nobody sees. This reader accounts for every
byte of a file: each belongs to an element, or is a gap (PS3.5 7, PS3.10 7.1).
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Literal, NamedTuple

from pydicom.datadict import dictionary_has_tag, dictionary_VR, keyword_for_tag

_PREFIX, _START = b"DICM", 132
_UNDEFINED = 0xFFFFFFFF
_ITEM_GROUP = 0xFFFE
_ITEM, _ITEM_END, _SEQUENCE_END = 0xFFFEE000, 0xFFFEE00D, 0xFFFEE0DD
_DELIMITER = 8
_IMPLICIT, _BIG = "1.2.840.10008.1.2", "1.2.840.10008.1.2.2"
_DEFLATED = ("1.2.840.10008.1.2.1.99", "1.2.840.10008.1.2.4.95")
_LONG = frozenset({"OB", "OW", "OF", "OD", "OL", "OV", "SQ", "UC", "UR", "UT", "UN", "SV", "UV"})
_SHORT = frozenset(
    {"AE", "AS", "AT", "CS", "DA", "DS", "DT", "FL", "FD", "IS", "LO", "LT", "PN", "SH", "SL"}
    | {"SS", "ST", "TM", "UI", "UL", "US"}
)
_DEEPEST = 64
_LARGEST = 2**31


class Broken(Exception):  # noqa: N818
    """Bytes that are no element; what follows them cannot be told apart."""

    def __init__(self, offset: int) -> None:
        super().__init__(f"no element at byte {offset}")
        self.offset = offset


@dataclass
class Level:
    """A data set, or an item of a sequence: its elements by tag, and its place in words."""

    place: str = ""
    depth: int = 0
    elements: dict[int, Element] = field(default_factory=dict)


class _Head(NamedTuple):
    """Tag, representation and length of an element, and where its value begins and ends."""

    tag: int
    representation: str
    length: int
    value: int
    end: int


class Element(NamedTuple):
    """An element: where it and its value stand. The value of a sequence is its items' bytes.

    ``fragments`` are the (offset, length) of the pieces of encapsulated pixel data, the first of
    which is the table of offsets.
    """

    level: Level
    tag: int
    representation: str
    start: int
    value_at: int
    length: int
    end: int
    fragments: tuple[tuple[int, int], ...] = ()

    @property
    def keyword(self) -> str:
        """The standard's name; empty if it has none."""
        return _keyword(self.tag)

    @property
    def is_private(self) -> bool:
        """Whether its group is odd."""
        return bool(self.tag >> 16 & 1)

    @property
    def where(self) -> str:
        """Its place in words: no value, and of a private attribute the tag alone."""
        return f"{self.level.place}{named(self.tag)}"


@dataclass(frozen=True)
class Layout:
    """A DICOM file, taken apart.

    Attributes:
        data: its bytes; of a deflated file, those of the file meta information and then those of
            the data set as it was before.
        syntax: the transfer syntax that it names.
        is_big: whether its numbers are big endian.
        meta: the elements of its file meta information.
        elements: all others, in their order, those of items too.
        top: the data set.
        gaps: (offset, length) of bytes that belong to none.
    """

    data: bytes
    syntax: str
    is_big: bool
    meta: tuple[Element, ...]
    elements: tuple[Element, ...]
    top: Level
    gaps: tuple[tuple[int, int], ...]

    def value(self, element: Element) -> bytes:
        """The bytes of an element's value."""
        return self.data[element.value_at : element.value_at + element.length]


def is_dicom(data: bytes) -> bool:
    """Whether bytes are a file of PS3.10."""
    return data[128:_START] == _PREFIX


def take_apart(data: bytes) -> Layout:
    """Take a file of PS3.10 apart; it never raises, whatever the bytes are.

    What cannot be followed is a gap to the end.
    """
    level, gaps = Level(), []
    cursor = _Cursor(data, implicit=False, big=False)
    meta: list[Element] = []
    end = _end_of_meta(data)
    try:
        meta.extend(cursor.elements(_START, end, level))
    except Broken:
        end = meta[-1].end if meta else _START
    syntax = next((_text(data, one) for one in meta if one.tag == 0x00020010), "")
    if syntax in _DEFLATED:
        data = data[:end] + _inflated(data[end:])
    top = Level()
    cursor = _Cursor(data, implicit=syntax == _IMPLICIT, big=syntax == _BIG)
    found: list[Element] = []
    try:
        found.extend(cursor.elements(end, len(data), top))
    except Broken:
        behind = found[-1].end if found else end
        gaps = [(behind, len(data) - behind)]
    return Layout(data, syntax, syntax == _BIG, tuple(meta), tuple(found), top, tuple(gaps))


def _end_of_meta(data: bytes) -> int:
    """Where group 2 ends: by its tags, whatever its length says."""
    position, cursor = _START, _Cursor(data, implicit=False, big=False)
    while data[position : position + 2] == b"\x02\0":
        try:
            position = cursor.head(position).end
        except Broken:
            break
    return position


def _text(data: bytes, element: Element) -> str:
    value = data[element.value_at : element.value_at + element.length]
    return value.decode("ascii", "replace").strip(" \0")


def _inflated(data: bytes) -> bytes:
    inflater = zlib.decompressobj(-zlib.MAX_WBITS)
    try:
        return inflater.decompress(data, _LARGEST) + inflater.unused_data
    except zlib.error:
        return data


class _Cursor:
    """Reads elements of one encoding."""

    def __init__(self, data: bytes, *, implicit: bool, big: bool) -> None:
        self._data, self._implicit = data, implicit
        self._order: Literal["little", "big"] = "big" if big else "little"

    def _number(self, at: int, size: int) -> int:
        piece = self._data[at : at + size]
        if len(piece) < size:
            raise Broken(at)
        return int.from_bytes(piece, self._order)

    def _tag(self, at: int) -> int:
        return self._number(at, 2) << 16 | self._number(at + 2, 2)

    def head(self, at: int) -> _Head:
        """What stands before a value.

        Raises:
            Broken: if nothing of the kind stands there, or the value ends beyond the file.
        """
        tag = self._tag(at)
        if self._implicit or tag >> 16 == _ITEM_GROUP:
            name = _representation(tag)
            length, value = self._number(at + 4, 4), at + 8
        else:
            name = self._data[at + 4 : at + 6].decode("ascii", "replace")
            if name in _LONG:
                length, value = self._number(at + 8, 4), at + 12
            elif name in _SHORT:
                length, value = self._number(at + 6, 2), at + 8
            else:
                raise Broken(at)
        end = value if length == _UNDEFINED else value + length
        if end > len(self._data):
            raise Broken(at)
        return _Head(tag, name, length, value, end)

    def elements(self, at: int, end: int, level: Level) -> Iterator[Element]:
        """The elements from one byte to another; those of items behind their sequence.

        Raises:
            Broken: where one cannot be followed.
        """
        while at < end:
            element, inner = self._element(at, level)
            if element.end > end:
                raise Broken(at)
            yield element
            yield from inner
            at = element.end

    def _element(self, at: int, level: Level) -> tuple[Element, list[Element]]:
        tag, name, length, value, end = self.head(at)
        inner: list[Element] = []
        fragments: tuple[tuple[int, int], ...] = ()
        if tag >> 16 == _ITEM_GROUP:
            raise Broken(at)
        if length == _UNDEFINED and name in ("OB", "OW"):
            fragments, end = self._fragments(value)
        elif name == "SQ" or length == _UNDEFINED:
            reader = self
            if name == "UN" and not self._implicit:
                reader = _Cursor(self._data, implicit=True, big=False)
            stop = None if length == _UNDEFINED else end
            inner, end = reader._items(tag, value, stop, level)
        made = Element(level, tag, name, at, value, end - value, end, fragments)
        level.elements[tag] = made
        return made, inner

    def _fragments(self, at: int) -> tuple[tuple[tuple[int, int], ...], int]:
        found: list[tuple[int, int]] = []
        while True:
            tag, _, length, value, behind = self.head(at)
            if tag == _SEQUENCE_END:
                return tuple(found), behind
            if tag != _ITEM or length == _UNDEFINED:
                raise Broken(at)
            found.append((value, length))
            at = behind

    def _items(
        self, tag: int, at: int, stop: int | None, level: Level
    ) -> tuple[list[Element], int]:
        """What stands in the items of a sequence, and the byte behind it."""
        if level.depth >= _DEEPEST:
            raise Broken(at)
        found: list[Element] = []
        number = 0
        while stop is None or at < stop:
            mark, _, length, value, behind = self.head(at)
            if mark == _SEQUENCE_END and stop is None:
                return found, behind
            if mark != _ITEM:
                raise Broken(at)
            item = Level(f"{level.place}{named(tag)}[{number}].", level.depth + 1)
            if length == _UNDEFINED:
                at = self._open_item(value, item, found)
            else:
                found.extend(self.elements(value, behind, item))
                at = behind
            number += 1
        return found, at

    def _open_item(self, at: int, item: Level, found: list[Element]) -> int:
        """An item without a length: up to its delimiter."""
        while self._tag(at) != _ITEM_END:
            element, inner = self._element(at, item)
            found += [element, *inner]
            at = element.end
        return at + _DELIMITER


@lru_cache(4096)
def _keyword(tag: int) -> str:
    return keyword_for_tag(tag) or ""


def named(tag: int) -> str:
    """The standard's keyword for a tag, else the tag."""
    return _keyword(tag) or f"({tag >> 16:04X},{tag & 0xFFFF:04X})"


def _representation(tag: int) -> str:
    """That of an element in implicit VR; of one that nobody knows, UN."""
    if tag >> 16 & 1 and tag & 0xFFFF in range(0x10, 0x100):
        return "LO"
    if tag & 0xFFFF == 0:
        return "UL"
    return dictionary_VR(tag).split(" or ")[-1] if dictionary_has_tag(tag) else "UN"
