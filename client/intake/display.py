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

from client.intake.deidentify import quoted, text_of
from client.intake.frames import groups_of, items_of
from client.intake.palette import Palette, descriptor_of, is_little, palette_of, words_of
from client.intake.pixels import Floats, clipped, shown, stretch
from common.errors import IntakeError

Rule = Literal["dicom", "range", "percentile"]
_GREY = ("MONOCHROME1", "MONOCHROME2")
_COLOUR = ("RGB", "YBR_FULL", "YBR_FULL_422", "YBR_ICT", "YBR_RCT")
PHOTOMETRICS = (*_GREY, "PALETTE COLOR", *_COLOUR)
"""Those that can be shown (PS3.3 C.7.6.3.1.2)."""
_TRANSFORMS = (
    "BitsAllocated",
    "BitsStored",
    "DoubleFloatPixelPaddingRangeLimit",
    "DoubleFloatPixelPaddingValue",
    "FloatPixelPaddingRangeLimit",
    "FloatPixelPaddingValue",
    "ModalityLUTSequence",
    "PhotometricInterpretation",
    "PixelPaddingRangeLimit",
    "PixelPaddingValue",
    "PixelPresentation",
    "PixelRepresentation",
    "RescaleIntercept",
    "RescaleSlope",
    "VOILUTFunction",
    "VOILUTSequence",
    "WindowCenter",
    "WindowWidth",
)
_PADDINGS = ("PixelPadding", "FloatPixelPadding", "DoubleFloatPixelPadding")
_FRAME_TYPES = (
    "CTImageFrameTypeSequence",
    "MRImageFrameTypeSequence",
    "PETFrameTypeSequence",
    "USImageDescriptionSequence",
)


def brightness(stored: NDArray[Any], header: Dataset, frame: int, rule: Rule) -> Floats:
    """What a viewer would show of one decoded frame.

    Args:
        stored: (rows, columns), or (rows, columns, 3) already in RGB.
        header: the data set's attributes.
        frame: number of the frame, from 0.
        rule: see `Input.window`. Colour has no window: ``dicom`` is its whole range. Where a
            palette goes with an image in grey (PS3.3 C.7.6.19), ``dicom`` shows its colours, the
            other rules the values themselves.

    Returns:
        (rows, columns) or (rows, columns, 3) in 0..1, finite; padding is 0.

    Raises:
        IntakeError: for a photometric interpretation or a table that cannot be shown.
    """
    attributes = _of_frame(header, frame)
    photometric = text_of(attributes, "PhotometricInterpretation")
    if photometric == "PALETTE COLOR" and stored.ndim == 2:
        palette = palette_of(header)
        return shown(palette(stored), palette.highest, rule)
    if photometric in _COLOUR and stored.ndim == 3:
        return shown(stored[..., :3], 2 ** _number(attributes, "BitsStored", 8) - 1, rule)
    if photometric in _GREY and stored.ndim == 2:
        grey = _grey(stored, attributes, rule, inverted=photometric == "MONOCHROME1")
        supplement = _supplement(header, frame) if rule == "dicom" else None
        return grey if supplement is None else _coloured(grey, stored, supplement)
    raise IntakeError(
        f"its photometric interpretation is {quoted(photometric)}, of pixels of shape "
        f"{stored.shape}; expected one of {', '.join(PHOTOMETRICS)}"
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
    for group in groups_of(header, frame):
        for name in ("PixelValueTransformationSequence", "FrameVOILUTSequence"):
            for item in items_of(group, name)[:1]:
                _take(flat, item)
    flat.set_original_encoding(*header.original_encoding)
    return flat


def _take(flat: Dataset, level: Dataset) -> None:
    for keyword in _TRANSFORMS:
        if keyword in level:
            flat[keyword] = level[keyword]


def rescaled(stored: NDArray[Any], header: Dataset, frame: int) -> Floats:
    """The values of one decoded frame in the modality's own unit, such as Hounsfield's.

    Args:
        stored: (rows, columns).
        header: of its object.
        frame: its number, from 0.

    Returns:
        (rows, columns), finite; padding, and what is no number, has the lowest value of the rest.

    Raises:
        IntakeError: for a table that cannot be applied, or if nothing is left of the image.
    """
    attributes = _of_frame(header, frame)
    values = _modality_values(stored, attributes)
    valid = np.isfinite(values) & ~_padding(stored, attributes)
    if not valid.any():
        raise IntakeError("it has no pixel with a finite value")
    return np.where(valid, values, values[valid].min())


def _modality_values(stored: NDArray[Any], header: Dataset) -> Floats:
    """Apply the modality LUT, else rescale (PS3.3 C.11.1)."""
    values: Floats = stored.astype(np.float32 if stored.dtype.itemsize <= 2 else np.float64)
    if header.get("ModalityLUTSequence"):
        signed = _number(header, "PixelRepresentation", 0) == 1
        table, first, _ = _lookup_table(header, "ModalityLUTSequence", signed=signed)
        return _looked_up(values, table.astype(np.float32), first)
    slope = _decimal(header, "RescaleSlope")
    intercept = _decimal(header, "RescaleIntercept")
    return values * (1.0 if slope is None else slope) + (intercept or 0.0)


def _presented(values: Floats, header: Dataset) -> Floats | None:
    """Apply the first VOI LUT, else the first window; None where the file has neither."""
    if header.get("VOILUTSequence"):
        signed = _number(header, "PixelRepresentation", 0) == 1
        signed = signed or (_decimal(header, "RescaleIntercept") or 0) < 0
        table, first, bits = _lookup_table(header, "VOILUTSequence", signed=signed)
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
    for name in _PADDINGS:
        value, limit = (_decimal(header, f"{name}{part}") for part in ("Value", "RangeLimit"))
        if value is not None:
            ends = [value, value if limit is None else limit]
            low, high = sorted(_as_stored(end, stored) for end in ends)
            return (stored >= low) & (stored <= high)
    return np.zeros(stored.shape, dtype=np.bool_)


def _as_stored(value: float, stored: NDArray[Any]) -> float:
    """A value as pixels have it: some files write one of the other sign, of the same bits."""
    if stored.dtype.kind == "f":
        return float(stored.dtype.type(value))
    if stored.dtype.kind == "u" and value < 0:
        return value + 2**16
    return value - 2**16 if stored.dtype == np.int16 and value >= 2**15 else value


def _supplement(header: Dataset, frame: int) -> Palette | None:
    """The palette of an image in grey that has colours besides (PS3.3 C.7.6.19, C.8.16.2.1.1.1)."""
    if "RedPaletteColorLookupTableDescriptor" not in header:
        return None
    types = [
        item
        for group in groups_of(header, frame)
        for name in _FRAME_TYPES
        for item in items_of(group, name)[:1]
    ]
    said = {text_of(level, "PixelPresentation") for level in (header, *types)}
    return palette_of(header) if said & {"COLOR", "MIXED"} else None


def _coloured(grey: Floats, stored: NDArray[Any], palette: Palette) -> Floats:
    """Stored values from the first of the palette on are colours; those below are grey."""
    colours = shown(palette(stored), palette.highest, "dicom")
    return np.where((stored >= palette.first)[..., None], colours, grey[..., None])


def _lookup_table(
    header: Dataset, keyword: str, *, signed: bool
) -> tuple[NDArray[np.uint16], int, int]:
    """Entries, the value of the first one, and bits an entry (PS3.3 C.11.1.1, C.11.2.1.1).

    The first value is signed if what goes into the table can be; the descriptor's own
    representation is lost in implicit VR.
    """
    item = (items_of(header, keyword) or [Dataset()])[0]
    count, first, bits = descriptor_of(item, "LUTDescriptor")
    if first >= 2**15 and signed:
        first -= 2**16
    table = words_of(item.get("LUTData"), count, little=is_little(header), bits=bits)
    if len(table) < count:
        raise IntakeError(
            f"its {keyword} describes {count} entries of {bits} bits and holds {len(table)}"
        )
    return table, first, bits


def _looked_up(values: Floats, table: NDArray[np.float32], first: int) -> Floats:
    finite = np.nan_to_num(values)
    index: NDArray[np.int64] = np.clip(np.rint(finite) - first, 0, len(table) - 1).astype(np.int64)
    return table[index]


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
