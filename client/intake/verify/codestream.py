"""Words in compressed frames: comments, application data, and bytes behind the picture's end."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

_COMMENT, _SCAN, _END, _JFIF_SEGMENT, _ADOBE_SEGMENT = 0xFE, 0xDA, 0xD9, 0xE0, 0xEE
_APPLICATION = range(0xE0, 0xF0)
_ALONE = (*range(0xD0, 0xD8), 0x01)
_FRAME_HEADERS = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC} | {0xF7}
# Coded data ends at a marker that is no stuffing and no restart (ITU-T T.81 B.1.1.5, T.87 C.2.1).
_MARKER = re.compile(rb"\xff+[\x80-\xcf\xd8-\xfe]")
_JFIF_LENGTH, _ADOBE_LENGTH = 16, 14
_TILE, _DATA, _J2K_END, _J2K_COMMENT, _J2K_SIZE = (
    b"\xff\x90", b"\xff\x93", b"\xff\xd9", b"\xff\x64", b"\xff\x51",
)  # fmt: skip


class Spot(NamedTuple):
    """Bytes of a frame that are not of the picture, and what they are."""

    offset: int
    length: int
    what: str


class _Cut(Exception):  # noqa: N818
    """A frame ends before its end."""

    def __init__(self, offset: int) -> None:
        super().__init__(f"cut at byte {offset}")
        self.offset = offset


def words_in(frame: bytes) -> Iterator[Spot]:
    """Whatever in a JPEG, JPEG-LS or JPEG 2000 frame is not needed to draw it.

    A frame of another coding has no such places. One that cannot be followed to its end is a
    spot from there on.
    """
    try:
        if frame[:2] == b"\xff\xd8":
            yield from _jpeg(frame)
        elif frame[:4] == b"\xff\x4f\xff\x51":
            yield from _jpeg_2000(frame)
        elif frame[4:8] == b"jP  ":
            yield Spot(0, len(frame), "boxes around a JPEG 2000 codestream")
    except _Cut as cut:
        yield Spot(cut.offset, len(frame) - cut.offset, "a frame that cannot be followed")


def precision_of(frame: bytes) -> int:
    """Bits of each sample, as the codestream has it; 0 if it does not say."""
    if frame[:4] == b"\xff\x4f\xff\x51":
        return (frame[42] & 0x7F) + 1 if len(frame) > 42 else 0
    if frame[:2] != b"\xff\xd8":
        return 0
    try:
        return next(
            (frame[at + 4] for at, mark, _ in _segments(frame) if mark in _FRAME_HEADERS), 0
        )
    except (_Cut, IndexError):
        return 0


def _number(data: bytes, at: int, size: int) -> int:
    piece = data[at : at + size]
    if len(piece) < size:
        raise _Cut(at)
    return int.from_bytes(piece, "big")


def _segments(frame: bytes) -> Iterator[tuple[int, int, int]]:
    """Start, marker and end of each marker segment; a scan ends with its coded data."""
    at = 2
    while True:
        marker = _number(frame, at + 1, 1)
        if frame[at] != 0xFF:
            raise _Cut(at)
        if marker == 0xFF:
            at += 1
            continue
        end = at + 2
        if marker not in (*_ALONE, _END):
            end += _number(frame, end, 2)
        if marker == _SCAN:
            found = _MARKER.search(frame, end)
            end = found.end() - 2 if found else len(frame) + 1
        if end > len(frame):
            raise _Cut(at)
        yield at, marker, end
        if marker == _END:
            return
        at = end


def _jpeg(frame: bytes) -> Iterator[Spot]:
    for at, marker, end in _segments(frame):
        length = end - at - 2
        plain = (marker == _JFIF_SEGMENT and length == _JFIF_LENGTH) or (
            marker == _ADOBE_SEGMENT and length == _ADOBE_LENGTH
        )
        if marker == _COMMENT:
            yield Spot(at, end - at, "a comment")
        elif marker in _APPLICATION and not plain:
            yield Spot(at, end - at, "application data")
        elif marker == _END:
            yield from _behind(frame, end)


def _jpeg_2000(frame: bytes) -> Iterator[Spot]:
    at = 2
    while frame[at : at + 2] != _TILE:
        end = at + 2 + _number(frame, at + 2, 2)
        if frame[at : at + 2] == _J2K_COMMENT:
            yield Spot(at, end - at, "a comment")
        at = end
    while frame[at : at + 2] == _TILE:
        length = _number(frame, at + 6, 4) or frame.rfind(_J2K_END) - at
        if length < 14 or at + length > len(frame):
            raise _Cut(at)
        yield from _tile_comments(frame, at)
        at += length
    if frame[at : at + 2] != _J2K_END:
        raise _Cut(at)
    yield from _behind(frame, at + 2)


def _tile_comments(frame: bytes, at: int) -> Iterator[Spot]:
    at += 12
    while frame[at : at + 2] != _DATA:
        end = at + 2 + _number(frame, at + 2, 2)
        if frame[at : at + 2] == _J2K_COMMENT and any(frame[at + 6 : end]):
            yield Spot(at, end - at, "a comment")
        at = end


def _behind(frame: bytes, end: int) -> Iterator[Spot]:
    if any(frame[end:]):
        yield Spot(end, len(frame) - end, "bytes behind the end of the picture")
