"""Lookup tables and colour profiles: binary attributes that belong to the pixels.

What is written is little endian, so the words of a big endian file are turned (PS3.5 7.3).
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from PIL import ImageCms
from pydicom.dataelem import DataElement
from pydicom.dataset import Dataset

from client.intake.palette import MOST_ENTRIES, is_little, segments_length
from common.errors import IntakeError

COLOUR_PROFILE = "ICCProfile"
_PALETTES = ("Red", "Green", "Blue", "Alpha")
_SEGMENTED = "Segmented"
TABLES = {
    "LUTData": "LUTDescriptor",
    **{
        f"{how}{colour}PaletteColorLookupTableData": f"{colour}PaletteColorLookupTableDescriptor"
        for colour in _PALETTES
        for how in ("", _SEGMENTED)
    },
}
"""Keyword of each lookup table, and of its descriptor."""
_CREATED = slice(24, 36)


def cut_table(element: DataElement, level: Dataset) -> Any:
    """A table's entries and nothing behind them (PS3.3 C.11.1.1, C.7.6.3.1.5).

    It is empty if nothing describes it.
    """
    descriptor = level.get(TABLES[element.keyword])
    try:
        count, bits = int(descriptor[0]) or MOST_ENTRIES, int(descriptor[2])
    except (TypeError, ValueError, IndexError, KeyError):
        return None if element.VR == "US" else b""
    if not isinstance(element.value, bytes):
        return list(element.value)[:count]
    data = in_little_endian(element.value, level)
    if not element.keyword.startswith(_SEGMENTED):
        return data[: 2 * count]
    try:
        length = segments_length(data, min(count, MOST_ENTRIES), bits)
    except IntakeError:
        return b""
    return data[:length] + bytes(length % 2)


def in_little_endian(data: bytes, level: Dataset) -> bytes:
    """The words of an OW as they are written, whatever their order in the file."""
    if is_little(level):
        return data
    return np.frombuffer(data[: len(data) // 2 * 2], dtype=np.uint16).byteswap().tobytes()


@cache
def colour_profile() -> bytes:
    """sRGB, always the same bytes: the time of its making is taken out."""
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    profile[_CREATED] = bytes(12)
    return bytes(profile)
