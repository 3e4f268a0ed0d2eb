"""Compressed frames without words: comments, application data and trailing bytes taken out.

Only segments that say nothing of the picture go; not one bit of the coded picture changes. What
cannot be walked to its end is not passed on.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from pydicom.uid import (
    HTJ2K,
    JPEG2000,
    JPEG2000MC,
    UID,
    HTJ2KLossless,
    HTJ2KLosslessRPCL,
    JPEG2000Lossless,
    JPEG2000MCLossless,
    JPEGBaseline8Bit,
    JPEGExtended12Bit,
    JPEGLossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    JPEGLSNearLossless,
)

from common.errors import IntakeError

JPEG = frozenset({JPEGBaseline8Bit, JPEGExtended12Bit, JPEGLossless, JPEGLosslessSV1,
                  JPEGLSLossless, JPEGLSNearLossless})  # fmt: skip
JPEG_2000 = frozenset({JPEG2000, JPEG2000Lossless, JPEG2000MC, JPEG2000MCLossless, HTJ2K,
                       HTJ2KLossless, HTJ2KLosslessRPCL})  # fmt: skip

_SOI, _EOI, _SOS, _TEM, _COM = 0xD8, 0xD9, 0xDA, 0x01, 0xFE
_APP0, _ADOBE = 0xE0, 0xEE
_APPLICATION = range(0xE0, 0xF0)
_RESTARTS = range(0xD0, 0xD8)
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC} | {0xF7}
_EXTENSIONS = frozenset(range(0xF0, 0xFE)) - {0xF7, 0xF8}
# What a decoder needs of JFIF and Adobe: how the components are coloured, and nothing else.
_JFIF = b"\xff\xe0\x00\x10JFIF\x00\x01\x01\x00\x00\x01\x00\x01\x00\x00"
_ADOBE_START = b"\xff\xee\x00\x0eAdobe\x00\x64\x00\x00\x00\x00"
_ADOBE_LENGTH = 16

_J2K_SOC, _J2K_SIZ, _J2K_COM = b"\xff\x4f", b"\xff\x51", b"\xff\x64"
_J2K_SOT, _J2K_SOD, _J2K_EOC = b"\xff\x90", b"\xff\x93", b"\xff\xd9"


class Stripped(NamedTuple):
    """A frame without words, and how many bits each of its samples has."""

    data: bytes
    bits: int


def stripped(frame: bytes, syntax: UID) -> Stripped | None:
    """A compressed frame as it may be passed on; None for a coding that has to be decoded.

    Raises:
        IntakeError: if it ends before its end, or is not of its transfer syntax.
    """
    try:
        if syntax in JPEG:
            return _jpeg(frame)
        if syntax in JPEG_2000:
            return _jpeg_2000(frame)
    except (IndexError, ValueError) as error:
        raise IntakeError("its compressed image cannot be followed to its end") from error
    return None


def _jpeg(frame: bytes) -> Stripped:
    """Marker segments of a JPEG (ITU-T T.81 B.1) or JPEG-LS (T.87 C) frame."""
    if frame[:2] != b"\xff\xd8":
        raise ValueError("no start of image")
    pieces, bits = [frame[:2]], 0
    for marker, segment in _segments(frame):
        if marker in _FRAMES:
            bits = segment[4]
        pieces.append(_kept_segment(marker, segment))
    if not bits:
        raise ValueError("no frame header")
    return Stripped(b"".join(pieces), bits)


def _segments(frame: bytes) -> Iterator[tuple[int, bytes]]:
    """Each marker with its segment; that of a scan includes the coded data behind it."""
    position = 2
    while True:
        if frame[position] != 0xFF:
            raise ValueError("no marker where one belongs")
        marker = frame[position + 1]
        if marker == 0xFF:
            position += 1
            continue
        end = position + 2
        if marker == _EOI:
            yield marker, frame[position:end]
            return
        if marker not in (*_RESTARTS, _TEM):
            end += _number(frame, end, 2)
        if marker == _SOS:
            end = _end_of_scan(frame, end)
        if end > len(frame):
            raise ValueError("a segment beyond the end")
        yield marker, frame[position:end]
        position = end


def _end_of_scan(frame: bytes, position: int) -> int:
    """Coded data ends at a marker that is neither stuffing nor a restart (T.81 B.1.1.5).

    In JPEG-LS a byte below 0x80 behind 0xFF is stuffing too (T.87 C.2.1), which no marker is.
    """
    while True:
        position = frame.index(b"\xff", position)
        following = frame[position + 1]
        if following >= 0x80 and following not in _RESTARTS and following != 0xFF:
            return position
        position += 1 if following == 0xFF else 2


def _kept_segment(marker: int, segment: bytes) -> bytes:
    if marker == _APP0 and segment[4:9] == b"JFIF\0":
        return _JFIF
    if marker == _ADOBE and segment[4:9] == b"Adobe" and len(segment) >= _ADOBE_LENGTH:
        return _ADOBE_START + segment[15:16]
    if marker == _COM or marker in _APPLICATION or marker in _EXTENSIONS - {0xF8}:
        return b""
    return segment


def _jpeg_2000(frame: bytes) -> Stripped:
    """A JPEG 2000 codestream (ITU-T T.800 A) out of its boxes, without its comments."""
    start = frame.index(_J2K_SOC + _J2K_SIZ)
    position, pieces = start + 2, [_J2K_SOC]
    bits = (frame[start + 42] & 0x7F) + 1
    while frame[position : position + 2] != _J2K_SOT:
        end = position + 2 + _number(frame, position + 2, 2)
        if frame[position : position + 2] != _J2K_COM:
            pieces.append(frame[position:end])
        position = end
    while frame[position : position + 2] == _J2K_SOT:
        length = _number(frame, position + 6, 4)
        end = position + length if length else _last_end(frame)
        if end > len(frame) or end < position + 14:
            raise ValueError("a tile-part beyond the end")
        pieces.append(_without_words(frame[position:end]))
        position = end
    if frame[position : position + 2] != _J2K_EOC:
        raise ValueError("no end of codestream")
    return Stripped(b"".join((*pieces, _J2K_EOC)), bits)


def _last_end(frame: bytes) -> int:
    """A tile-part of length 0 reaches to the end of the codestream (T.800 A.4.2)."""
    return frame.rindex(_J2K_EOC)


def _without_words(tile_part: bytes) -> bytes:
    """Comments of a tile-part's header become zeros of the same length, so that lengths hold."""
    changed, position = bytearray(tile_part), 12
    while tile_part[position : position + 2] != _J2K_SOD:
        end = position + 2 + _number(tile_part, position + 2, 2)
        if tile_part[position : position + 2] == _J2K_COM:
            changed[position + 6 : end] = bytes(end - position - 6)
        position = end
    return bytes(changed)


def _number(data: bytes, start: int, length: int) -> int:
    piece = data[start : start + length]
    if len(piece) < length:
        raise IndexError(start)
    return int.from_bytes(piece, "big")
