"""Palettes: the colours that stored values stand for (PS3.3 C.7.6.3.1.5, C.7.6.3.1.6, C.7.9).

A palette is written out or in segments, of which a few bytes can ask for as many entries as they
like; never more is made than the descriptor says, which is 65536 at most.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset

from common.errors import IntakeError

MOST_ENTRIES = 2**16
COLOURS = ("Red", "Green", "Blue")
_DESCRIPTOR = "{}PaletteColorLookupTableDescriptor"
_DISCRETE, _LINEAR, _INDIRECT = range(3)


@dataclass(frozen=True, eq=False)
class Palette:
    """What stored values look like.

    Attributes:
        colours: (entries, 3) red, green and blue.
        first: the stored value of the first entry; lower ones have its colour, and those beyond
            the last have that of the last.
        highest: of a colour, the value of full brightness.
    """

    colours: NDArray[np.uint16]
    first: int
    highest: int

    def __call__(self, stored: NDArray[Any]) -> NDArray[np.uint16]:
        """The colours of (rows, columns) stored values: (rows, columns, 3)."""
        index = np.clip(stored.astype(np.int64) - self.first, 0, len(self.colours) - 1)
        shown: NDArray[np.uint16] = self.colours[index]
        return shown


class _Segment(NamedTuple):
    """A segment: its kind, how many entries it adds (or segments it copies), where its data is."""

    kind: int
    size: int
    data: int
    end: int


def palette_of(header: Dataset) -> Palette:
    """The palette of an image.

    Raises:
        IntakeError: if it has none, or one that is not what its descriptor says.
    """
    descriptors = {descriptor_of(header, _DESCRIPTOR.format(colour)) for colour in COLOURS}
    if len(descriptors) > 1:
        raise IntakeError("its palette has descriptors that differ; expected three of a kind")
    ((_, first, bits),) = descriptors
    colours = np.stack([_channel(header, colour) for colour in COLOURS], axis=-1)
    # Entries of 8 bits are written as 16 bits by some who call them such.
    eight = bits <= 8 and int(colours.max()) < 2**8
    return Palette(colours, _signed(first, header), 2**8 - 1 if eight else 2**16 - 1)


def words_of(data: Any, count: int, *, little: bool, bits: int) -> NDArray[np.uint16]:
    """The entries of a table that is written out, one a byte or one a word.

    Args:
        data: its value: bytes, or numbers.
        count: how many entries its descriptor gives it.
        little: whether words are little endian.
        bits: of an entry, by the descriptor.
    """
    if not isinstance(data, bytes):
        numbers = [data] if isinstance(data, int) else list(data or ())
        return np.array(numbers[:count], dtype=np.uint16)
    if bits <= 8 and len(data) < 2 * count:
        return _bytes_of(data, little=little)[:count].astype(np.uint16)
    words = np.frombuffer(data[: len(data) // 2 * 2], dtype="<u2" if little else ">u2")
    return words.astype(np.uint16)[:count]


def segments_length(data: bytes, count: int, bits: int) -> int:
    """Bytes of a palette in segments, in little endian, that its descriptor gives a meaning.

    Raises:
        IntakeError: if they are not as many entries as it says.
    """
    units = _units(data, bits, little=True)
    _, used = _expanded(units, count, bits)
    return used * (1 if bits <= 8 else 2)


def is_little(header: Dataset) -> bool:
    """Whether the words of its binary values are little endian, as those of a new one are."""
    return header.original_encoding[1] is not False


def _channel(header: Dataset, colour: str) -> NDArray[np.uint16]:
    count, _, bits = descriptor_of(header, _DESCRIPTOR.format(colour))
    little = is_little(header)
    name = f"{colour}PaletteColorLookupTableData"
    if plain := header.get(name):
        table = words_of(plain, count, little=little, bits=bits)
    elif segmented := header.get(f"Segmented{name}"):
        table = np.array(_expanded(_units(bytes(segmented), bits, little=little), count, bits)[0])
    else:
        raise IntakeError(f"its {name} is missing")
    if len(table) != count:
        raise IntakeError(
            f"its {name} describes {count} entries of {bits} bits and holds {len(table)}"
        )
    return table.astype(np.uint16)


def descriptor_of(level: Dataset, keyword: str) -> tuple[int, int, int]:
    """Number of entries, first value mapped, bits of an entry (PS3.3 C.11.1.1, C.7.6.3.1.5).

    Raises:
        IntakeError: if they are not there, or cannot be.
    """
    try:
        count, first, bits = (int(number) for number in level[keyword].value)
    except (KeyError, TypeError, ValueError):
        raise IntakeError(f"its {keyword} is missing or wrong; expected 3 numbers") from None
    if not 0 <= count <= MOST_ENTRIES or not 1 <= bits <= 16:
        raise IntakeError(f"its {keyword} says {count} entries of {bits} bits")
    return count or MOST_ENTRIES, first, bits


def _signed(first: int, header: Dataset) -> int:
    signed = str(header.get("PixelRepresentation") or 0) == "1"
    return first - 2**16 if signed and first >= 2**15 else first


def _bytes_of(data: bytes, *, little: bool) -> NDArray[np.uint8]:
    """Bytes in their order: those of a big endian word stand the other way round (PS3.5 7.3)."""
    seen = np.frombuffer(data, dtype=np.uint8)
    return seen if little else seen[: len(seen) // 2 * 2].reshape(-1, 2)[:, ::-1].ravel()


def _units(data: bytes, bits: int, *, little: bool) -> list[int]:
    """What segments are made of: bytes or words (PS3.3 C.7.9.2)."""
    if bits <= 8:
        return list(map(int, _bytes_of(data, little=little)))
    return list(map(int, np.frombuffer(data[: len(data) // 2 * 2], "<u2" if little else ">u2")))


def _expanded(units: Sequence[int], count: int, bits: int) -> tuple[list[int], int]:
    """The entries that segments stand for, and how many units they take (PS3.3 C.7.9.2).

    Raises:
        IntakeError: if they are not as many as `count`, or no segments.
    """
    table: list[int] = []
    position = 0
    while len(table) < count:
        segment = _segment(units, position, bits)
        position = segment.end
        if segment.kind != _INDIRECT:
            _extend(table, units, segment, count)
            continue
        start = _target(units, segment, bits)
        for _ in range(segment.size):
            copied = _segment(units, start, bits)
            if copied.kind == _INDIRECT:
                raise IntakeError("its palette has an indirect segment that leads to another")
            _extend(table, units, copied, count)
            start = copied.end
    return table, position


def _segment(units: Sequence[int], position: int, bits: int) -> _Segment:
    """The segment at a position; each adds an entry or more, so that there is an end to them."""
    kind, size = units[position : position + 2] if position + 1 < len(units) else (None, 1)
    lengths = {_DISCRETE: size, _LINEAR: 1, _INDIRECT: 4 if bits <= 8 else 2}
    end = position + 2 + lengths.get(kind or 0, 0)
    if kind is None or end > len(units):
        raise IntakeError("its palette in segments ends early")
    if kind not in lengths or not size:
        raise IntakeError("its palette in segments has one of no known kind, or of no length")
    return _Segment(kind, size, position + 2, end)


def _extend(table: list[int], units: Sequence[int], segment: _Segment, most: int) -> None:
    if len(table) + segment.size > most:
        raise IntakeError(f"its palette in segments has more than the {most} entries it says")
    if segment.kind == _DISCRETE:
        table.extend(units[segment.data : segment.end])
    elif not table:
        raise IntakeError("its palette in segments begins with a line from nowhere")
    else:
        line = np.linspace(table[-1], units[segment.data], segment.size + 1)[1:]
        table.extend(np.rint(line).astype(int).tolist())


def _target(units: Sequence[int], segment: _Segment, bits: int) -> int:
    """Where an indirect segment leads; the standard counts in bytes, low half first."""
    parts = units[segment.data : segment.end]
    width = 8 if bits <= 8 else 16
    offset = sum(part << width * place for place, part in enumerate(parts))
    return offset if bits <= 8 else offset // 2
