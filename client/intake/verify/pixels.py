"""Pixel data that holds more than its pixels: bytes, bits, words, tables and colour profiles."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from client.intake.verify.codestream import precision_of, words_in
from client.intake.verify.finding import Finding, masked
from client.intake.verify.header import PIXELS, TABLES
from client.intake.verify.layout import Element, Layout, Level
from client.intake.verify.words import common_words, strange_words

_ROWS, _COLUMNS, _SAMPLES, _FRAMES = 0x00280010, 0x00280011, 0x00280002, 0x00280008
_ALLOCATED, _STORED, _SIGNED = 0x00280100, 0x00280101, 0x00280103
_PHOTOMETRIC = 0x00280004
_SUBSAMPLED = ("YBR_FULL_422", "YBR_PARTIAL_422")
_TAGS = {
    "LUTDescriptor": 0x00283002,
    "RedPaletteColorLookupTableDescriptor": 0x00281101,
    "GreenPaletteColorLookupTableDescriptor": 0x00281102,
    "BluePaletteColorLookupTableDescriptor": 0x00281103,
    "AlphaPaletteColorLookupTableDescriptor": 0x00281104,
}
_MOST_ENTRIES = 2**16
_PROFILE_WORDS = frozenset(
    {"srgb", "built", "copyright", "freely", "lcms", "profile", "para", "curv", "desc"}
)
_PROFILE_MARK, _PROFILE_DATE = slice(36, 40), slice(24, 36)
_CHUNK = 2**24
_RLE = "1.2.840.10008.1.2.5"
_STARTS = (b"\xff\xd8\xff", b"\xff\x4f\xff\x51")


class Spot(NamedTuple):
    """A part of a value: where it starts in the file, its bytes, the rule and the reason."""

    offset: int
    length: int
    rule: str
    why: str


def pixel_findings(layout: Layout, file: str) -> Iterator[Finding]:
    """What stands in pixel data, lookup tables and colour profiles that is not of the picture.

    Args:
        layout: a file, taken apart.
        file: its path within what is searched.
    """
    for element in layout.elements:
        for spot in _spots(layout, element):
            value = layout.data[spot.offset : spot.offset + min(spot.length, 64)]
            yield Finding(
                file, element.where, spot.offset, spot.length, spot.rule, spot.why, masked(value)
            )


def _spots(layout: Layout, element: Element) -> Iterator[Spot]:
    if element.keyword in PIXELS:
        if element.fragments:
            yield from _encapsulated(layout, element)
        elif element.length:
            yield from _native(layout, element)
    elif element.keyword in TABLES:
        yield from _table(layout, element)
    elif element.keyword == "ICCProfile" and element.length:
        yield from _profile(layout, element)


def _number(layout: Layout, level: Level, tag: int, default: int = 0) -> int:
    element = level.elements.get(tag)
    if element is None or not element.length:
        return default
    raw = layout.value(element)
    if element.representation == "IS":
        text = raw.decode("ascii", "replace").strip(" \0")
        return int(text) if text.isdecimal() else default
    return int.from_bytes(raw[:2], "big" if layout.is_big else "little")


def _described(layout: Layout, element: Element) -> int:
    """Bytes that the header describes for uncompressed pixels (PS3.5 8.1.1), padded to even."""
    level = element.level
    sizes = [_number(layout, level, tag) for tag in (_ROWS, _COLUMNS)]
    samples, frames = (_number(layout, level, tag, 1) for tag in (_SAMPLES, _FRAMES))
    bits = {"FloatPixelData": 32, "DoubleFloatPixelData": 64}.get(
        element.keyword, _number(layout, level, _ALLOCATED)
    )
    photometric = level.elements.get(_PHOTOMETRIC)
    name = layout.value(photometric).decode("ascii", "replace").strip(" \0") if photometric else ""
    if name in _SUBSAMPLED:
        samples = 2
    size = (math.prod(sizes) * samples * max(frames, 1) * bits + 7) // 8
    return size + size % 2


def _native(layout: Layout, element: Element) -> Iterator[Spot]:
    described = _described(layout, element)
    beyond = element.length - described
    if beyond > 0:
        start = element.value_at + described
        why = "more bytes than rows, columns and frames describe"
        yield Spot(start, beyond, "loose bytes", why)
    allocated = _number(layout, element.level, _ALLOCATED)
    unused = allocated - _number(layout, element.level, _STORED, allocated)
    if unused > 0 and allocated in (8, 16, 32):
        yield from _unused_bits(layout, element, allocated, unused)


def _unused_bits(layout: Layout, element: Element, allocated: int, unused: int) -> Iterator[Spot]:
    """Bits above the highest stored one are zero, or repeat the sign (PS3.5 8.1.1)."""
    signed = _number(layout, element.level, _SIGNED) == 1
    kind = f"{'>' if layout.is_big else '<'}{'i' if signed else 'u'}{allocated // 8}"
    width = allocated // 8
    for at in range(element.value_at, element.value_at + element.length, _CHUNK):
        end = min(at + _CHUNK, element.value_at + element.length)
        words = np.frombuffer(layout.data[at : at + (end - at) // width * width], dtype=kind)
        wrong = np.flatnonzero(((words << unused) >> unused) != words)
        if wrong.size:
            first, last = int(wrong[0]) * width, (int(wrong[-1]) + 1) * width
            why = "bits above BitsStored hold something: an overlay, or words"
            yield Spot(at + first, last - first, "unused bits", why)


def _encapsulated(layout: Layout, element: Element) -> Iterator[Spot]:
    """Frames, one after the other; a frame of several fragments begins with its first."""
    table, *fragments = element.fragments
    if table[1] % 4:
        yield Spot(*table, "loose bytes", "a table of offsets that is none")
    for start, frame in _frames(layout, fragments):
        for spot in words_in(frame):
            yield Spot(start + spot.offset, spot.length, "words in a frame", spot.what)
        stored = _number(layout, element.level, _STORED)
        if stored and precision_of(frame) > stored:
            why = "the compressed image has more bits than BitsStored"
            yield Spot(start, len(frame), "unused bits", why)
    if layout.syntax == _RLE:
        yield from _run_lengths(layout, fragments)


def _frames(layout: Layout, fragments: list[tuple[int, int]]) -> Iterator[tuple[int, bytes]]:
    """A fragment that begins no codestream goes on with the one before it."""
    start, pieces = -1, b""
    for at, length in fragments:
        piece = layout.data[at : at + length]
        if start >= 0 and not piece.startswith(_STARTS):
            pieces += piece
            continue
        if start >= 0:
            yield start, pieces
        start, pieces = at, piece
    if start >= 0:
        yield start, pieces


def _run_lengths(layout: Layout, fragments: list[tuple[int, int]]) -> Iterator[Spot]:
    """Bytes behind the last segment of an RLE frame (PS3.5 G): unpacked, they are not of it."""
    for at, length in fragments:
        frame = layout.data[at : at + length]
        count = int.from_bytes(frame[:4], "little")
        if not 0 < count <= 15 or length < 64:
            yield Spot(at, length, "words in a frame", "a frame that cannot be followed")
            continue
        last = int.from_bytes(frame[4 * count : 4 * count + 4], "little")
        ends = _unpacked_end(frame, last, _plane(layout))
        if any(frame[ends:]):
            why = "bytes behind the end of the picture"
            yield Spot(at + ends, length - ends, "words in a frame", why)


def _plane(layout: Layout) -> int:
    return math.prod(_number(layout, layout.top, tag) for tag in (_ROWS, _COLUMNS))


def _unpacked_end(frame: bytes, at: int, wanted: int) -> int:
    """Where a PackBits segment has given as many bytes as a plane has."""
    done = 0
    while done < wanted and at < len(frame):
        code = frame[at]
        if code < 128:
            at, done = at + code + 2, done + code + 1
        else:
            at, done = at + (2 if code > 128 else 1), done + (257 - code if code > 128 else 0)
    return at


def _table(layout: Layout, element: Element) -> Iterator[Spot]:
    """A lookup table has as many entries as its descriptor says (PS3.3 C.11.1.1)."""
    descriptor = element.level.elements.get(_TAGS[TABLES[element.keyword]])
    entries = 0
    if descriptor is not None and descriptor.length >= 6:
        order = "big" if layout.is_big else "little"
        raw = layout.value(descriptor)
        entries = int.from_bytes(raw[:2], order) or _MOST_ENTRIES  # type: ignore[arg-type]
    beyond = element.length - 2 * entries
    if beyond > 0:
        start = element.value_at + 2 * entries
        yield Spot(start, beyond, "loose bytes", "more entries than its descriptor has")


def _profile(layout: Layout, element: Element) -> Iterator[Spot]:
    """A colour profile (ICC.1) has room for texts, a date and whatever follows its end."""
    raw = layout.value(element)
    size = int.from_bytes(raw[:4], "big")
    whole = (element.value_at, element.length, "colour profile")
    if raw[_PROFILE_MARK] != b"acsp" or not 128 < size <= len(raw):
        yield Spot(*whole, "bytes that are no colour profile")
        return
    if any(raw[size:]):
        yield Spot(element.value_at + size, len(raw) - size, "loose bytes", "behind the profile")
    if any(raw[_PROFILE_DATE]):
        yield Spot(*whole, "it says when it was made")
    texts = (raw[128:size].decode("latin-1"), raw[128:size].decode("utf-16-be", "ignore"))
    known = common_words() | _PROFILE_WORDS
    for text in texts:
        if _strange_run(text, known):
            yield Spot(*whole, "it holds a text that is not the standard profile's")
            return


def _strange_run(text: str, known: frozenset[str]) -> bool:
    runs = "".join(letter if " " <= letter <= "~" else "\n" for letter in text).splitlines()
    return any(any(strange_words(run, known)) for run in runs if len(run) >= 6)
