"""From the run's geometry back to the source's: the inverse of `client.intake.pixels`."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from client.intake.pixels import Placement, placement
from common.spec import Input


def mask_to_source(
    mask: NDArray[np.uint16], size: tuple[int, int], settings: Input
) -> NDArray[np.uint16]:
    """Class numbers of a source's pixels, each that of the run's pixel in which its centre lies.

    What was cut off of the source has not been seen, and is background (0).

    Args:
        mask: (height, width) of the run.
        size: rows and columns of the source.
        settings: the run's `Input`.

    Returns:
        (rows, columns).
    """
    placed = placement(*size, settings)
    rows, columns = (_sources(placed, size, axis) for axis in (0, 1))
    found = np.zeros(size, dtype=np.uint16)
    inside = np.ix_(rows >= 0, columns >= 0)
    found[inside] = mask[np.ix_(rows[rows >= 0], columns[columns >= 0])]
    return found


def boxes_to_source(
    boxes: NDArray[np.float32], size: tuple[int, int], settings: Input
) -> NDArray[np.float64]:
    """Boxes in pixels of the source, within it.

    Args:
        boxes: (N, 4) left, top, right and bottom in parts of the run's sides.
        size: rows and columns of the source.
        settings: the run's `Input`.

    Returns:
        (N, 4) left, top, right and bottom; 0 is the outer edge of the first pixel.
    """
    placed = placement(*size, settings)
    sides = np.array([settings.width, settings.height] * 2, dtype=np.float64)
    corner = np.array([placed.left, placed.top] * 2, dtype=np.float64)
    left, top, right, bottom = _box(placed, size)
    scale = np.array([right - left, bottom - top] * 2) / np.array(placed.size * 2)
    there = (boxes.astype(np.float64) * sides - corner) * scale + np.array([left, top] * 2)
    found: NDArray[np.float64] = there.clip(0, np.array([size[1], size[0]] * 2))
    return found


def _box(placed: Placement, size: tuple[int, int]) -> tuple[float, float, float, float]:
    return placed.box or (0.0, 0.0, float(size[1]), float(size[0]))


def _sources(placed: Placement, size: tuple[int, int], axis: int) -> NDArray[np.int64]:
    """For each row (axis 0) or column of the source the run's; -1 where it was cut off."""
    box, across = _box(placed, size), 1 - axis  # boxes and sizes have the columns first
    low, high = box[across], box[across + 2]
    parts = (np.arange(size[axis]) + 0.5 - low) / (high - low)
    found = np.floor(parts * placed.size[across]).astype(np.int64)
    inside = (parts >= 0) & (parts < 1)
    start = placed.top if axis == 0 else placed.left
    return np.where(inside, np.minimum(found, placed.size[across] - 1) + start, -1)
