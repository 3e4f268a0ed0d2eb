"""Brightness and shape: from the values of any image to what a run's spec asks for.

Pure functions on arrays. Nothing here is fitted on more than the one image at hand, so nothing
here tells of other patients (docs/privacy.md 3).
"""

from __future__ import annotations

from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from common.cohort import PIXEL_MAX
from common.errors import IntakeError
from common.spec import Input

Floats: TypeAlias = NDArray[np.floating[Any]]
# ITU-R BT.601 luma: what PIL calls "L" and a viewer shows for colour in grey.
_LUMA = np.array([0.299, 0.587, 0.114], dtype=np.float32)
_PERCENTILES = (1, 99)


def clipped(values: Floats) -> Floats:
    """`values` held within 0..1."""
    held: Floats = np.clip(values, 0, 1)
    return held


def stretch(
    values: Floats, rule: Literal["range", "percentile"], valid: NDArray[np.bool_]
) -> Floats:
    """Map the range of an image's valid values to 0..1; a constant image becomes 0.

    Args:
        values: any shape.
        rule: ``range`` from lowest to highest, ``percentile`` from the 1st to the 99th.
        valid: which values count (neither padding nor not-a-number); the same shape.

    Raises:
        IntakeError: if no value is valid.
    """
    counted = values[valid]
    if not counted.size:
        raise IntakeError("it has no pixel with a finite value")
    if rule == "range":
        low, high = float(counted.min()), float(counted.max())
    else:
        low, high = (float(value) for value in np.percentile(counted, _PERCENTILES))
    if not high > low:
        return np.zeros_like(values)
    return clipped((values - low) / (high - low))


def shown(
    stored: NDArray[Any], highest: int, rule: Literal["dicom", "range", "percentile"]
) -> Floats:
    """Brightness of a picture that is already as a viewer shows it (PNG, JPEG, RGB).

    Args:
        stored: (height, width) or (height, width, 3), from 0 to `highest`.
        highest: the value of full brightness.
        rule: see `Input.window`; a picture has no window of its own, so ``dicom`` keeps it as
            it is.
    """
    values: Floats = stored.astype(np.float32) / np.float32(highest)
    if rule == "dicom":
        return clipped(values)
    return stretch(values, rule, np.isfinite(values))


def to_shape(image: Floats, settings: Input) -> NDArray[np.uint16]:
    """Bring an image to the run's channels, height and width.

    Grey is repeated for three channels, colour becomes luma for one. Downscaling is antialiased.

    Args:
        image: (height, width) or (height, width, 3) in 0..1, without not-a-number.
        settings: the run's `Input`.

    Returns:
        (channels, height, width), 0..65535.
    """
    planes = _planes(image, settings.channels)
    fitted = [_fit(np.ascontiguousarray(plane, dtype=np.float32), settings) for plane in planes]
    if len(fitted) < settings.channels:
        fitted = fitted * settings.channels
    return np.rint(np.clip(np.stack(fitted), 0, 1) * PIXEL_MAX).astype(np.uint16)


def _planes(image: Floats, channels: int) -> list[Floats]:
    """The planes to fit: one for grey (whatever the channels), three for colour."""
    if image.ndim == 2:
        return [image]
    if channels == 1:
        return [image.astype(np.float32, copy=False) @ _LUMA]
    return [image[..., plane] for plane in range(3)]


def _fit(plane: NDArray[np.float32], settings: Input) -> NDArray[np.float32]:
    height, width = settings.height, settings.width
    picture = Image.fromarray(plane)
    if settings.fit == "stretch":
        return _resized(picture, (width, height), None)
    if settings.fit == "crop":
        return _resized(picture, (width, height), _central_box(picture.size, width / height))
    scale = min(height / picture.height, width / picture.width)
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    inner = _resized(picture, size, None)
    canvas = np.zeros((height, width), dtype=np.float32)
    top, left = (height - size[1]) // 2, (width - size[0]) // 2
    canvas[top : top + size[1], left : left + size[0]] = inner
    return canvas


def _central_box(size: tuple[int, int], aspect: float) -> tuple[float, float, float, float]:
    """The largest central box of a (width, height) picture whose width / height is `aspect`."""
    width, height = min(size[0], size[1] * aspect), min(size[1], size[0] / aspect)
    left, top = (size[0] - width) / 2, (size[1] - height) / 2
    return left, top, left + width, top + height


def _resized(
    picture: Image.Image, size: tuple[int, int], box: tuple[float, float, float, float] | None
) -> NDArray[np.float32]:
    """Bilinear; PIL widens the filter when it shrinks, which is the antialiasing."""
    if box is None and picture.size == size:
        return np.asarray(picture, dtype=np.float32)
    return np.asarray(picture.resize(size, Image.Resampling.BILINEAR, box=box), dtype=np.float32)
