"""From the run's geometry back to the source's: the way back of the intake's pixels and grids."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from client.intake.frames import Plane
from client.intake.grids import from_grid, laid_volume
from client.intake.pixels import Placement, placement
from client.intake.volumes import Volume
from common.spec import Input


class Source(NamedTuple):
    """Where a slice of a volume comes from: object and frame, from 0, and where that lies."""

    at: int
    frame: int
    plane: Plane


@dataclass(frozen=True, eq=False)
class Scan:
    """A volume as it was taken, without its values.

    Attributes:
        shape: slices, rows and columns.
        spacing: between them, in mm.
        orientation: as that of a `Volume`.
        origin: as that of a `Volume`.
        sources: of each slice, in their order in space.
    """

    shape: tuple[int, int, int]
    spacing: tuple[float, float, float]
    orientation: NDArray[np.float64]
    origin: NDArray[np.float64]
    sources: tuple[Source, ...]

    @classmethod
    def of(cls, volume: Volume, given: Sequence[Source]) -> Self:
        """Of a volume and the sources of its slices, in the order in which it was given them."""
        slices, rows, columns = volume.values.shape
        sources = tuple(given[number] for number in volume.order)
        geometry = (volume.spacing, volume.orientation, volume.origin)
        return cls((slices, rows, columns), *geometry, sources)

    def back(self, mask: NDArray[np.uint16], settings: Input) -> NDArray[np.uint16]:
        """Class numbers of its voxels, each that of the run's voxel that is nearest.

        What was cut off has not been seen, and is background (0).

        Args:
            mask: (depth, height, width) of the run.
            settings: the run's `Input`.

        Returns:
            (slices, rows, columns).
        """
        found = np.zeros(self.shape, dtype=np.uint16)
        volume = Volume(found, self.spacing, self.orientation, self.origin)
        from_grid(mask, laid_volume(volume, settings.direction or "axial"), settings)
        return found


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
