"""The size that a compressed frame claims for itself.

A decoder allocates what the codestream says, not what the DICOM header says: a 200-byte JPEG 2000
frame may claim 60000 x 60000 pixels. So the claim is read first, and believed only where it is
that of the header.
"""

from __future__ import annotations

from typing import NamedTuple

from common.errors import IntakeError

_JPEG_START = b"\xff\xd8"
_J2K_START = b"\xff\x4f\xff\x51"
_BOX_HEADER = 8
_JP2_START = b"\x00\x00\x00\x0cjP  "
# Start of frame: SOF0 to SOF15 without DHT, JPG and DAC (ITU-T T.81 B.1.1.3), SOF55 of JPEG-LS.
_FRAME_MARKERS = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC} | {0xF7}
_WITHOUT_LENGTH = frozenset(range(0xD0, 0xD9)) | {0x01}


class Claim(NamedTuple):
    """Rows, columns and components that a codestream says it holds."""

    rows: int
    columns: int
    components: int


def claimed_size(frame: bytes) -> Claim | None:
    """Read the claim of a JPEG, JPEG-LS or JPEG 2000 frame; None for other coding (RLE).

    Raises:
        IntakeError: if it begins like one of these and ends before it names its size.
    """
    try:
        if frame[:2] == _JPEG_START:
            return _jpeg(frame)
        if frame[:4] == _J2K_START:
            return _jpeg2000(frame, 0)
        if frame[:8] == _JP2_START:
            return _jpeg2000(frame, _codestream_box(frame))
    except (IndexError, ValueError) as error:
        raise IntakeError("its compressed image ends before it names its size") from error
    return None


def _jpeg(frame: bytes) -> Claim:
    """Walk the marker segments to the frame header (ITU-T T.81 B.2.2, T.87 C.1.1)."""
    position = 2
    while True:
        if frame[position] != 0xFF:
            raise ValueError("no marker where one belongs")
        marker = frame[position + 1]
        if marker == 0xFF:
            position += 1
        elif marker in _WITHOUT_LENGTH:
            position += 2
        elif marker in _FRAME_MARKERS:
            rows, columns = (_number(frame, position + at, 2) for at in (5, 7))
            return Claim(rows, columns, frame[position + 9])
        else:
            position += 2 + _number(frame, position + 2, 2)


def _codestream_box(frame: bytes) -> int:
    """Walk the boxes of a JP2 file to its codestream (ITU-T T.800 I.4).

    A box shorter than its own header would keep a careless reader on the spot for ever.
    """
    position = 12
    while frame[position + 4 : position + 8] != b"jp2c":
        length = _number(frame, position, 4)
        if length < _BOX_HEADER:
            raise ValueError("a box shorter than its header")
        position += length
    if frame[position + 8 : position + 12] != _J2K_START:
        raise ValueError("no codestream where one belongs")
    return position + 8


def _jpeg2000(frame: bytes, start: int) -> Claim:
    """The SIZ marker segment (ITU-T T.800 A.5.1)."""
    right, bottom, left, top = (_number(frame, start + at, 4) for at in (8, 12, 16, 20))
    return Claim(bottom - top, right - left, _number(frame, start + 40, 2))


def _number(data: bytes, start: int, length: int) -> int:
    piece = data[start : start + length]
    if len(piece) < length:
        raise IndexError(start)
    return int.from_bytes(piece, "big")
