"""One DICOM file against itself, and against what the source says of people."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterator
from pathlib import PurePath

from client.intake.verify.finding import Finding, masked
from client.intake.verify.header import (
    TABLES,
    TEXTS,
    claims_of,
    header_findings,
    text_of,
    top_text,
)
from client.intake.verify.layout import Element, Layout, take_apart
from client.intake.verify.pixels import pixel_findings
from client.intake.verify.search import Hit, Searcher
from client.intake.verify.words import code_meaning, common_words, strange_words

_BULK = frozenset({"OB", "OD", "OF", "OL", "OV", "OW", "UN"})
_MUCH = 4096
_CODES = ("CodeValue", "CodeMeaning", "CodingSchemeDesignator")
_CODE_VALUE, _SCHEME, _INSTANCE = 0x00080100, 0x00080102, 0x00080018
_FULL_DATES, _MODIFIED_DATES, _RETAINED_UIDS = "113106", "113107", "113110"
_DATES = ("DA", "DT")
_OF_DATES = ("a date", "a number")
_COUNTED = frozenset({"AS", "AT", "DS", "FD", "FL", "IS", "SL", "SS", "SV", "TM", "UL", "US", "UV"})
"""Representations in which only a whole value can be a record number."""
_FEW_DIGITS, _LONGEST_NUMBER = 7, 64
_NAME = re.compile(r"[0-9.]+|[0-9a-f]{32,}")


def object_findings(data: bytes, file: str, searcher: Searcher | None) -> Iterator[Finding]:
    """Everything that speaks against a DICOM file.

    Args:
        data: its bytes.
        file: its path within what is searched.
        searcher: looks for the source's values, if there is a source.
    """
    layout = take_apart(data)
    yield from header_findings(layout, file)
    yield from pixel_findings(layout, file)
    yield from _name_findings(layout, file)
    if searcher is not None:
        yield from _Known(layout, file, searcher).findings()


def _name_findings(layout: Layout, file: str) -> Iterator[Finding]:
    """A de-identified file is called by its UID, by a number, or by words that name nobody."""
    path = PurePath(file)
    for part in (*path.parts[:-1], path.stem):
        if part == top_text(layout, _INSTANCE) or _NAME.fullmatch(part):
            continue
        if any(strange_words(part, common_words())):
            why = "expected the object's own UID, or a word of a technical kind"
            yield Finding(file, "name of the file", -1, len(part), "file name", why, masked(part))
            return


class _Known:
    """Values of the source in one file."""

    def __init__(self, layout: Layout, file: str, searcher: Searcher) -> None:
        self._layout, self._file, self._searcher = layout, file, searcher
        self._claims = claims_of(layout)
        self._elements = sorted((*layout.meta, *layout.elements), key=lambda one: one.start)
        self._starts = [element.start for element in self._elements]

    def findings(self) -> Iterator[Finding]:
        """All of them, in headers, in pixels, and in texts as they are read."""
        for start, end, much in self._regions():
            piece = self._layout.data[start:end]
            for hit in self._searcher.in_bulk(piece) if much else self._in_header(piece, start):
                yield from self._told(hit._replace(offset=start + hit.offset))
        for element in self._elements:
            if element.representation in TEXTS:
                yield from self._in_text(element)
            elif element.representation == "UI":
                yield from self._in_uids(element)

    def _in_header(self, piece: bytes, start: int) -> Iterator[Hit]:
        """A value ends where its element does, whatever byte the next one begins with."""
        inside = [one for one in self._elements if start <= one.start < start + len(piece)]
        edges = {one.value_at - start for one in inside} | {one.end - start for one in inside}
        yield from self._searcher.in_text(piece, frozenset(edges))

    def _regions(self) -> Iterator[tuple[int, int, bool]]:
        """Start, end, and whether it holds much data that is no text."""
        at, length = 0, len(self._layout.data)
        for element in self._elements:
            much = element.representation in _BULK and (
                element.length > _MUCH or element.keyword in TABLES or bool(element.fragments)
            )
            if much and element.value_at >= at:
                yield at, element.value_at, False
                at = element.value_at + element.length
                yield element.value_at, at, True
        yield at, length, False

    def _in_text(self, element: Element) -> Iterator[Finding]:
        """Of other scripts, and with gaps between the letters."""
        raw = self._layout.value(element)
        text = text_of(self._layout, element)
        if not raw.isascii() or b"\x1b" in raw:
            for hit in self._searcher.in_text(text.encode("utf-8", "replace")):
                whole = Hit(element.value_at, element.length, hit.kind)
                yield from self._told(whole)
        for hit in self._searcher.in_letters(text):
            yield from self._told(Hit(element.value_at, element.length, hit.kind))

    def _in_uids(self, element: Element) -> Iterator[Finding]:
        for uid in text_of(self._layout, element).split("\\"):
            if self._searcher.is_uid(uid.strip(" \0")):
                yield from self._told(Hit(element.value_at, element.length, "a UID"))

    def _told(self, hit: Hit) -> Iterator[Finding]:
        element = self._at(hit.offset)
        if element is None or not self._is_excused(element, hit):
            value = self._layout.data[hit.offset : hit.offset + hit.length]
            yield Finding(
                self._file,
                element.where if element else "between elements",
                hit.offset,
                hit.length,
                "value of the source",
                f"{hit.kind} that stands in the source",
                masked(value),
            )

    def _at(self, offset: int) -> Element | None:
        """The innermost element that a byte belongs to."""
        number = bisect_right(self._starts, offset) - 1
        while number >= 0:
            if self._elements[number].end > offset:
                return self._elements[number]
            number -= 1
        return None

    def _is_excused(self, element: Element, hit: Hit) -> bool:
        """Whether what stands there is declared, said of everybody, or no identity in its place."""
        kind, representation = hit.kind, element.representation
        if representation == "UI":
            return kind != "a UID" or _RETAINED_UIDS in self._claims.codes
        if representation in _COUNTED:
            return not self._is_whole_number(element, hit)
        return (
            self._claims.retains(element.keyword)
            or (representation in _DATES and self._are_dates_declared() and kind in _OF_DATES)
            or (representation == "CS" and kind in _OF_DATES)
            or (kind == "a name's word" and representation not in TEXTS - {"CS"})
            or (element.keyword in _CODES and self._is_code(element))
        )

    def _are_dates_declared(self) -> bool:
        return bool({_FULL_DATES, _MODIFIED_DATES} & self._claims.codes)

    def _is_whole_number(self, element: Element, hit: Hit) -> bool:
        if hit.kind != "a number" or hit.length < _FEW_DIGITS or element.length > _LONGEST_NUMBER:
            return False
        digits = text_of(self._layout, element).lstrip("+-0")
        return digits.isdecimal() and hit.length == len(digits)

    def _is_code(self, element: Element) -> bool:
        beside = element.level.elements
        value, scheme = (
            text_of(self._layout, beside[tag]) if tag in beside else ""
            for tag in (_CODE_VALUE, _SCHEME)
        )
        meanings = code_meaning(scheme, value)
        if not meanings:
            return scheme == "DCM" and value.startswith("1131")
        text = text_of(self._layout, element)
        return element.keyword != "CodeMeaning" or text in {name[:64].strip() for name in meanings}
