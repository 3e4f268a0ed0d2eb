"""Lookup tables and colour profiles: binary attributes that belong to the pixels."""

from __future__ import annotations

from functools import cache
from typing import Any

from PIL import ImageCms
from pydicom.dataelem import DataElement
from pydicom.dataset import Dataset

COLOUR_PROFILE = "ICCProfile"
_PALETTES = ("Red", "Green", "Blue", "Alpha")
TABLES = {
    "LUTData": "LUTDescriptor",
    **{
        f"{colour}PaletteColorLookupTableData": f"{colour}PaletteColorLookupTableDescriptor"
        for colour in _PALETTES
    },
}
"""Keyword of each lookup table, and of its descriptor."""
_MOST_ENTRIES = 2**16
_CREATED = slice(24, 36)


def cut_table(element: DataElement, level: Dataset) -> Any:
    """A table's entries and nothing behind them (PS3.3 C.11.1.1, C.7.6.3.1.5).

    It is empty if nothing describes it.
    """
    descriptor = level.get(TABLES[element.keyword])
    try:
        count = int(descriptor[0]) or _MOST_ENTRIES
    except (TypeError, ValueError, IndexError, KeyError):
        return None if element.VR == "US" else b""
    if isinstance(element.value, bytes):
        return element.value[: 2 * count]
    return list(element.value)[:count]


@cache
def colour_profile() -> bytes:
    """sRGB, always the same bytes: the time of its making is taken out."""
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    profile[_CREATED] = bytes(12)
    return bytes(profile)
