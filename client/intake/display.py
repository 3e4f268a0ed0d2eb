"""From stored values to brightness: the grey and colour pipelines of DICOM.

Stored values go through the modality LUT or rescale (PS3.3 C.11.1), the VOI LUT or window
(C.11.2), and the photometric interpretation (C.7.6.3.1.2). In enhanced multi-frame objects a
frame's own functional groups take precedence (C.7.6.16).
"""

from __future__ import annotations

import math
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset
from pydicom.pixels.processing import apply_color_lut

from client.intake.deidentify import quoted, text_of
from client.intake.pixels import Floats, clipped, shown, stretch
from common.errors import IntakeError

Rule = Literal["dicom", "range", "percentile"]
_GREY = ("MONOCHROME1", "MONOCHROME2")
_COLOUR = ("RGB", "YBR_FULL", "YBR_FULL_422", "YBR_ICT", "YBR_RCT")
_TRANSFORMS = (
    "BitsStored",
    "ModalityLUTSequence",
    "PhotometricInterpretation",
    "PixelPaddingRangeLimit",
    "PixelPaddingValue",
    "PixelRepresentation",
    "RescaleIntercept",
    "RescaleSlope",
    "VOILUTFunction",
    "VOILUTSequence",
    "WindowCenter",
    "WindowWidth",
)
_MAX_LUT = 2**16
_PALETTES = ("RedPalette", "GreenPalette", "BluePalette", "AlphaPalette")


def brightness(stored: NDArray[Any], header: Dataset, frame: int, rule: Rule) -> Floats:
    """What a viewer would show of one decoded frame.

    Args:
        stored: (rows, columns), or (rows, columns, 3) already in RGB.
        header: the data set's attributes.
        frame: number of the frame, from 0.
        rule: see `Input.window`. Colour has no window: ``dicom`` is its whole range.

    Returns:
        (rows, columns) or (rows, columns, 3) in 0..1, finite; padding is 0.

    Raises:
        IntakeError: for a photometric interpretation or a table that cannot be shown.
    """
    attributes = _of_frame(header, frame)
    photometric = text_of(attributes, "PhotometricInterpretation")
    if photometric == "PALETTE COLOR" and stored.ndim == 2:
        return shown(*_through_palette(stored, header), rule)
    if photometric in _COLOUR and stored.ndim == 3:
        return shown(stored[..., :3], 2 ** _number(attributes, "BitsStored", 8) - 1, rule)
    if photometric in _GREY and stored.ndim == 2:
        return _grey(stored, attributes, rule, inverted=photometric == "MONOCHROME1")
    raise IntakeError(
        f"its photometric interpretation is {quoted(photometric)}, of pixels of shape "
        f"{stored.shape}; expected one of {', '.join((*_GREY, 'PALETTE COLOR', *_COLOUR))}"
    )


def _grey(stored: NDArray[Any], header: Dataset, rule: Rule, *, inverted: bool) -> Floats:
    values = _modality_values(stored, header)
    valid = np.isfinite(values) & ~_padding(stored, header)
    presented = _presented(values, header) if rule == "dicom" else None
    if presented is None:
        presented = stretch(values, "range" if rule == "dicom" else rule, valid)
    return np.where(valid, 1 - presented if inverted else presented, 0)


def _of_frame(header: Dataset, frame: int) -> Dataset:
    """The attributes of the pipeline that hold for one frame, in a flat data set."""
    flat = Dataset()
    _take(flat, header)
    shared = list(header.get("SharedFunctionalGroupsSequence") or ())[:1]
    own = list(header.get("PerFrameFunctionalGroupsSequence") or ())[frame : frame + 1]
    for group in (*shared, *own):
        for name in ("PixelValueTransformationSequence", "FrameVOILUTSequence"):
            for item in list(group.get(name) or ())[:1]:
                _take(flat, item)
    flat.set_original_encoding(*header.original_encoding)
    return flat


def _take(flat: Dataset, level: Dataset) -> None:
    for keyword in _TRANSFORMS:
        if keyword in level:
            flat[keyword] = level[keyword]


def _modality_values(stored: NDArray[Any], header: Dataset) -> Floats:
    """Apply the modality LUT, else rescale (PS3.3 C.11.1)."""
    values: Floats = stored.astype(np.float32 if stored.dtype.itemsize <= 2 else np.float64)
    if header.get("ModalityLUTSequence"):
        table, first, _ = _lookup_table(header, "ModalityLUTSequence")
        return _looked_up(values, table.astype(np.float32), first)
    slope = _decimal(header, "RescaleSlope")
    intercept = _decimal(header, "RescaleIntercept")
    return values * (1.0 if slope is None else slope) + (intercept or 0.0)


def _presented(values: Floats, header: Dataset) -> Floats | None:
    """Apply the first VOI LUT, else the first window; None where the file has neither."""
    if header.get("VOILUTSequence"):
        table, first, bits = _lookup_table(header, "VOILUTSequence")
        highest = max(2**bits - 1, int(table.max()))
        return _looked_up(values, (table / highest).astype(np.float32), first)
    centre, width = _decimal(header, "WindowCenter"), _decimal(header, "WindowWidth")
    if centre is None or width is None:
        return None
    return _windowed(values, centre, width, text_of(header, "VOILUTFunction") or "LINEAR")


def _windowed(values: Floats, centre: float, width: float, function: str) -> Floats | None:
    """PS3.3 C.11.2.1.2 and C.11.2.1.3 with an output of 0..1; None for an impossible width."""
    if function == "LINEAR" and width >= 1:
        scale = max(width - 1, 1e-6)
        return clipped((values - (centre - 0.5)) / scale + 0.5)
    if function == "LINEAR_EXACT" and width > 0:
        return clipped((values - centre) / width + 0.5)
    if function == "SIGMOID" and width > 0:
        return clipped(1 / (1 + np.exp(np.clip(-4 * (values - centre) / width, -80, 80))))
    if function in ("LINEAR", "LINEAR_EXACT", "SIGMOID"):
        return None
    raise IntakeError(f"its VOI LUT function is {quoted(function)}; expected LINEAR or SIGMOID")


def _padding(stored: NDArray[Any], header: Dataset) -> NDArray[np.bool_]:
    """Where the file says that there is no image (PS3.3 C.7.5.1.1.2)."""
    value = _decimal(header, "PixelPaddingValue")
    if value is None:
        return np.zeros(stored.shape, dtype=np.bool_)
    limit = _decimal(header, "PixelPaddingRangeLimit")
    low, high = sorted((value, value if limit is None else limit))
    return (stored >= low) & (stored <= high)


def _lookup_table(header: Dataset, keyword: str) -> tuple[NDArray[np.uint16], int, int]:
    """Entries, the value of the first one, and bits an entry (PS3.3 C.11.1.1, C.11.2.1.1)."""
    item = header[keyword].value[0]
    count, first, bits = (int(number) for number in item.LUTDescriptor)
    count = count or _MAX_LUT
    if first >= 2**15 and _number(header, "PixelRepresentation", 0):
        first -= 2**16
    data = item.LUTData
    if isinstance(data, bytes):
        little = header.original_encoding[1] is not False
        word = "u1" if len(data) in (count, count + 1) and bits <= 8 else f"{'><'[little]}u2"
        data = np.frombuffer(data, dtype=word)
    table = np.atleast_1d(np.asarray(data)).astype(np.uint16)[:count]
    if len(table) < count or not 1 <= bits <= 16:
        raise IntakeError(
            f"its {keyword} describes {count} entries of {bits} bits and holds {len(table)}"
        )
    return table, first, bits


def _looked_up(values: Floats, table: NDArray[np.float32], first: int) -> Floats:
    finite = np.nan_to_num(values)
    index: NDArray[np.int64] = np.clip(np.rint(finite) - first, 0, len(table) - 1).astype(np.int64)
    return table[index]


def _through_palette(stored: NDArray[Any], header: Dataset) -> tuple[NDArray[Any], int]:
    """RGB from a palette (PS3.3 C.7.6.3.1.5), and its highest value."""
    for name in _PALETTES:
        _check_segments(header, f"Segmented{name}ColorLookupTableData")
    colours = apply_color_lut(stored, header)[..., :3]
    bits = int(header.RedPaletteColorLookupTableDescriptor[2])
    eight = colours.dtype.itemsize == 1 or (bits == 8 and colours.max() < 2**8)
    return colours, 2**8 - 1 if eight else 2**16 - 1


def _check_segments(header: Dataset, keyword: str) -> None:
    """Refuse a segmented palette that would grow beyond a palette (PS3.3 C.7.9.2).

    A linear segment of three words stands for up to 65535 entries, and an indirect one for other
    segments: a few kilobytes could ask for all memory.
    """
    data = header.get(keyword)
    if not data:
        return
    words = np.frombuffer(bytes(data)[: len(data) // 2 * 2], dtype="<u2").tolist()
    position, entries = 0, 0
    while position + 1 < len(words):
        kind, count = words[position : position + 2]
        entries += count
        position += 2 + (count if kind == 0 else 1)
        if kind > 1 or entries > _MAX_LUT:
            raise IntakeError(
                f"its {keyword} has an indirect segment or more than {_MAX_LUT} entries"
            )


def _decimal(header: Dataset, keyword: str) -> float | None:
    """The first value of a numeric attribute; None where there is none that is finite."""
    first = text_of(header, keyword).split("\\")[0]
    try:
        number = float(first)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def _number(header: Dataset, keyword: str, default: int) -> int:
    value = _decimal(header, keyword)
    return default if value is None else int(value)
