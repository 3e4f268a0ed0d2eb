"""The values of a source, looked for in bytes: in any case, in several spellings and encodings."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from datetime import date
from typing import NamedTuple

import numpy as np

from client.intake.verify.identities import Identities
from client.intake.verify.needles import Needles
from client.intake.verify.words import LETTERS, SHORTEST, common_words

_MONTHS = ["jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec"]
_ENCODINGS = ("utf-8", "latin-1", "iso8859-2", "iso8859-5", "iso8859-7", "iso8859-9", "gb18030",
              "euc_kr", "shift_jis", "iso2022_jp", "utf-16-le", "utf-16-be")  # fmt: skip
# Digits and letters of these are drawn at random, computed or of the standard: pseudonyms, UUIDs,
# digests, tags of attributes, and the codes of what was done (PS3.16 CID 7050).
_OPAQUE = re.compile(
    rb"2\.25\.\d{1,39}|[0-9a-f]{32,}|\([0-9a-f]{4},[0-9a-fx]{4}\)|\b1131(?:0\d|1[0-2])\b"
)
_GAP = re.compile(r"[^\w \-._/,^=\\]|  ")
"""What does not stand between the letters of one word."""
_UIDS = re.compile(rb"[0-2](?:\.\d+){4,}")
_SUBSTRING = 6
"""From this many letters on, a word counts within a longer one too."""
_SQUEEZED, _SQUEEZED_NUMBER = 6, 8
_BULK_BYTES, _BULK_DIFFERENT = 8, 4


class Hit(NamedTuple):
    """A value of the source: where it stands, its bytes, and of which kind it is."""

    offset: int
    length: int
    kind: str


class Searcher:
    """Looks for the identities of a source.

    Args:
        identities: what the source says of people.
        excused: words that stand for nothing where this is used.
    """

    def __init__(self, identities: Identities, excused: frozenset[str]) -> None:
        self._excused = excused
        self._uids = frozenset(uid.encode() for uid in identities.uids)
        self._kinds: dict[bytes, str] = {}
        self._add("a name's word", identities.names)
        self._add("a word", identities.words - excused)
        self._add("a record number", identities.mixed)
        self._add("a value", identities.values - excused)
        self._add("a number", identities.numbers)
        self._kinds |= dict.fromkeys(
            (spelling for day in identities.dates for spelling in _dates(day)), "a date"
        )
        self._needles = Needles(self._kinds, 4)
        bulk = [text for text, kind in self._kinds.items() if _is_rare(text, kind)]
        self._bulk = Needles(bulk, 8)
        squeezed = {"".join(filter(str.isalnum, text)) for text in identities.values}
        squeezed |= {text for text in identities.words | identities.mixed if text.isascii()}
        self._squeezed = Needles(
            (text.encode() for text in squeezed - excused if len(text) >= _least_letters(text)), 4
        )

    def _add(self, kind: str, texts: Iterable[str]) -> None:
        for text in texts:
            for spelled in _spellings(text):
                self._kinds.setdefault(spelled, kind)

    def is_uid(self, uid: str) -> bool:
        """Whether a UID is one of the source."""
        return uid.encode("utf-8", "replace") in self._uids

    def in_text(self, data: bytes, edges: frozenset[int] = frozenset()) -> Iterator[Hit]:
        """Look through bytes that are texts, or texts between others.

        Args:
            data: the bytes.
            edges: offsets where one thing ends and another begins.
        """
        folded = data.lower()
        opaque = [match.span() for match in _OPAQUE.finditer(folded)]
        for offset, found in self._needles.find(folded):
            kind = self._kinds[found]
            end = offset + len(found)
            if any(start <= offset and end <= stop for start, stop in opaque):
                continue
            if _stands_alone(folded, offset, end, kind, edges) and not self._is_within_term(
                folded, offset, end
            ):
                yield Hit(offset, len(found), kind)
        for match in _UIDS.finditer(data):
            if match[0] in self._uids:
                yield Hit(match.start(), len(match[0]), "a UID")

    def _is_within_term(self, folded: bytes, start: int, end: int) -> bool:
        """Whether it is a part of a longer word that stands for nothing."""
        if not folded[start:end].isalpha():
            return False
        first, last = start, end
        while folded[first - 1 : first].isalpha():
            first -= 1
        while folded[last : last + 1].isalpha():
            last += 1
        longer = last - first > end - start
        return longer and folded[first:last].decode("ascii", "replace") in self._excused

    def in_bulk(self, data: bytes) -> Iterator[Hit]:
        """Look through many bytes that are no text, such as pixels: for long strings alone.

        By chance a picture holds every short one.
        """
        for offset, found in self._bulk.find(data):
            end = offset + len(found)
            before, behind = data[max(offset - 1, 0) : offset], data[end : end + 1]
            if not (before.isalnum() or behind.isalnum()):
                yield Hit(offset, len(found), self._kinds[found])

    def in_letters(self, text: str) -> Iterator[Hit]:
        """Look through a text without what separates its letters; offsets are characters."""
        folded = text.lower().encode("ascii", "replace")
        letters = np.frombuffer(folded, dtype=np.uint8)
        is_letter = _ALPHANUMERIC[letters]
        if is_letter.all():
            return
        places = np.flatnonzero(is_letter)
        for offset, found in self._squeezed.find(letters[is_letter].tobytes()):
            start, end = int(places[offset]), int(places[offset + len(found) - 1]) + 1
            alone = not (start and is_letter[start - 1]) and not is_letter[end : end + 1].any()
            whole = text[start:end]
            has_gaps = end - start > len(found) and not _GAP.search(whole)
            if alone and has_gaps and not _is_of_terms(whole):
                yield Hit(start, end - start, "a value with gaps")


def _least_letters(text: str) -> int:
    return _SQUEEZED if text.isalpha() else _SQUEEZED_NUMBER


_ALPHANUMERIC = np.array([bytes([code]).isalnum() for code in range(256)])


def _is_of_terms(text: str) -> bool:
    """Whether there are whole words in a text with gaps, and all of them are terms."""
    words = [word.lower() for word in LETTERS.findall(text) if len(word) >= SHORTEST]
    return bool(words) and all(word in common_words() for word in words)


def _is_rare(text: bytes, kind: str) -> bool:
    """Whether a string is long and varied enough not to stand in pixels by chance."""
    return (
        len(text) >= _BULK_BYTES
        and len(set(text)) >= _BULK_DIFFERENT
        and kind not in ("a number", "a date")
        and b"\0" not in text
    )


def _spellings(text: str) -> Iterator[bytes]:
    """A text in the encodings that files have, and of other scripts than ASCII in every case."""
    if text.isascii():
        yield from (text.encode(), text.encode("utf-16-le"), text.encode("utf-16-be"))
        return
    for form in {text, text.upper(), text.title()}:
        for encoding in _ENCODINGS:
            try:
                spelled = form.encode(encoding)
            except UnicodeEncodeError:
                continue
            yield spelled.removesuffix(b"\x1b(B").lower()


def _dates(day: str) -> Iterator[bytes]:
    """Year, month and day as people and programs write them."""
    try:
        date(int(day[:4]), int(day[4:6]), int(day[6:]))
    except ValueError:
        yield day.encode()
        return
    year, month, number = day[:4], day[4:6], day[6:]
    name = _MONTHS[int(month) - 1]
    texts = {day, f"{number} {name} {year}", f"{name} {number}, {year}", f"{number}-{name}-{year}"}
    for mark in "-./ ":
        for parts in ((year, month, number), (number, month, year), (month, number, year)):
            texts |= {mark.join(parts), mark.join(part.lstrip("0") for part in parts)}
    for text in texts:
        yield text.encode()
        yield text.encode("utf-16-le")


def _stands_alone(folded: bytes, start: int, end: int, kind: str, edges: frozenset[int]) -> bool:
    """Whether what was found is not merely a part of something else."""
    found = folded[start:end]
    if b"\0" in found or not found.isascii():
        return True
    if kind == "a number":
        while start not in edges and folded[max(start - 1, 0) : start] == b"0":
            start -= 1
    before = b"" if start in edges else folded[max(start - 2, 0) : start]
    behind = b"" if end in edges else folded[end : end + 1]
    if kind in ("a number", "a date"):
        if found.isdigit() and kind == "a date" and folded[end : end + 6].isdigit():
            behind = b""
        fraction = before[-1:] == b"." and before[:1].isdigit()
        return not (before[-1:].isalnum() or behind.isalnum() or fraction)
    if kind == "a record number" or len(found) < _SUBSTRING:
        return not (before[-1:].isalpha() or behind.isalpha())
    return True
