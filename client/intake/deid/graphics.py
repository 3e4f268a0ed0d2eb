"""Overlays under Clean Graphics: the bitmap stays, without lines of text in it (PS3.15 E.3.3)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset
from pydicom.tag import Tag

from client.intake.deid.burned_in import Box

KEYWORDS = frozenset(
    {
        "OverlayRows",
        "OverlayColumns",
        "NumberOfFramesInOverlay",
        "OverlayType",
        "OverlayOrigin",
        "ImageFrameOrigin",
        "OverlayBitsAllocated",
        "OverlayBitPosition",
        "OverlayData",
    }
)
"""What an overlay plane needs (PS3.3 C.9.2.1)."""
_ROWS, _COLUMNS, _FRAMES, _POSITION, _DATA = 0x0010, 0x0011, 0x0015, 0x0102, 0x3000
_SMALLEST_SIDE = 24
_MOST_BITS = 2**31
_BRIGHT = np.uint8(255)


def clean_overlays(clean: Dataset, find: Callable[[NDArray[Any]], list[Box]]) -> int:
    """Blank the text of every overlay; what is none, or too small to be searched, goes.

    Args:
        clean: a data set whose overlays are all that is left of graphics; changed in place.
        find: finds lines of text in a plane.

    Returns:
        How many boxes were blanked.
    """
    groups = {element.tag.group for element in clean if element.tag.group >> 8 == 0x60}
    return sum(_clean_overlay(clean, group, find) for group in sorted(groups))


def _clean_overlay(clean: Dataset, group: int, find: Callable[[NDArray[Any]], list[Box]]) -> int:
    planes = _planes(clean, group)
    if planes is None:
        for tag in [element.tag for element in clean if element.tag.group == group]:
            del clean[tag]
        return 0
    count = 0
    for plane in planes:
        boxes = find(plane * _BRIGHT)
        count += len(boxes)
        for box in boxes:
            plane[box.top : box.bottom, box.left : box.right] = 0
    data = np.packbits(planes.ravel(), bitorder="little").tobytes()
    clean.add_new((group, _DATA), "OW", data + bytes(len(data) % 2))
    return count


def _planes(clean: Dataset, group: int) -> NDArray[np.uint8] | None:
    """The bits that an overlay describes, (frames, rows, columns); None if it is not all there."""
    sizes = [_number(clean, group, element) for element in (_ROWS, _COLUMNS)]
    frames = _number(clean, group, _FRAMES) or 1
    rows, columns = sizes
    data = clean.get(Tag(group, _DATA))
    bits = frames * rows * columns
    if data is None or min(sizes) < _SMALLEST_SIDE or bits > min(_MOST_BITS, 8 * len(data.value)):
        return None
    if _number(clean, group, _POSITION):
        return None
    unpacked = np.unpackbits(np.frombuffer(data.value, dtype=np.uint8), bitorder="little")
    return unpacked[:bits].reshape(frames, rows, columns)


def _number(clean: Dataset, group: int, element: int) -> int:
    found = clean.get(Tag(group, element))
    text = "" if found is None else str(found.value)
    return int(text) if text.isdecimal() else 0
