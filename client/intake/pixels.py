"""Brightness and shape: from the values of any image to what a run's spec asks for.

Pure functions on arrays. Nothing here is fitted on more than the one image at hand, so nothing
here tells of other patients (docs/privacy.md 3).
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, TypeAlias

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
_LEAST_SEEN = 0.25  # as in `common.tasks.augment`


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
    del counted  # of a volume as much as the volume
    bright: Floats = values - low
    bright /= high - low
    return np.clip(bright, 0, 1, out=bright)


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


def mask_to_shape(mask: NDArray[np.integer[Any]], settings: Input) -> NDArray[np.uint16]:
    """Bring a mask to where `to_shape` brings its image: each pixel takes the nearest's class.

    Args:
        mask: (height, width) class numbers of its image's size; what is padded becomes 0.
        settings: the run's `Input`.

    Returns:
        (height, width) of the run.
    """
    placed = placement(mask.shape[0], mask.shape[1], settings)
    picture = Image.fromarray(np.ascontiguousarray(mask, dtype=np.int32))
    inner = picture.resize(placed.size, Image.Resampling.NEAREST, box=placed.box)
    canvas = np.zeros((settings.height, settings.width), dtype=np.uint16)
    canvas[placed.rows, placed.columns] = np.asarray(inner)
    return canvas


def box_to_shape(
    box: tuple[float, float, float, float], size: tuple[int, int], settings: Input
) -> tuple[float, float, float, float] | None:
    """Bring a box to where `to_shape` brings its image, cut at what is cut off.

    Args:
        box: left, top, right and bottom in pixels of the image.
        size: (height, width) of the image.
        settings: the run's `Input`.

    Returns:
        Left, top, right and bottom in parts of the run's sides; None where less than a quarter of
        the box is left, which shows too little of the thing.
    """
    placed = placement(*size, settings)
    source = placed.box or (0, 0, size[1], size[0])
    left, top, right, bottom = (
        (
            (value - source[side]) / (source[side + 2] - source[side]) * placed.size[side]
            + (placed.left, placed.top)[side]
        )
        / (settings.width, settings.height)[side]
        for value, side in zip(box, (0, 1, 0, 1), strict=True)
    )
    cut = [min(max(value, 0.0), 1.0) for value in (left, top, right, bottom)]
    seen = (cut[2] - cut[0]) * (cut[3] - cut[1])
    if seen <= 0 or seen < _LEAST_SEEN * (right - left) * (bottom - top):
        return None
    return cut[0], cut[1], cut[2], cut[3]


class Placement(NamedTuple):
    """Where an image comes to lie in the run's height and width.

    Attributes:
        box: the part of the image that is used, as left, top, right and bottom; None: all of it.
        size: the (width, height) that it is brought to.
        left: of its first column in the run's.
        top: of its first row in the run's.
    """

    box: tuple[float, float, float, float] | None
    size: tuple[int, int]
    left: int = 0
    top: int = 0

    @property
    def rows(self) -> slice:
        """The run's rows that it fills."""
        return slice(self.top, self.top + self.size[1])

    @property
    def columns(self) -> slice:
        """The run's columns that it fills."""
        return slice(self.left, self.left + self.size[0])


def placement(rows: int, columns: int, settings: Input) -> Placement:
    """How `Input.fit` brings an image of so many rows and columns to the run's."""
    height, width = settings.height, settings.width
    if settings.fit == "stretch":
        return Placement(None, (width, height))
    if settings.fit == "crop":
        return Placement(_central_box((columns, rows), width / height), (width, height))
    scale = min(height / rows, width / columns)
    size = (max(1, round(columns * scale)), max(1, round(rows * scale)))
    return Placement(None, size, (width - size[0]) // 2, (height - size[1]) // 2)


def _fit(plane: NDArray[np.float32], settings: Input) -> NDArray[np.float32]:
    placed = placement(plane.shape[0], plane.shape[1], settings)
    inner = _resized(Image.fromarray(plane), placed.size, placed.box)
    if settings.fit != "pad":
        return inner
    canvas = np.zeros((settings.height, settings.width), dtype=np.float32)
    canvas[placed.rows, placed.columns] = inner
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
