"""From a volume as it was taken to the grid that a run asks for: turned, resampled, placed.

A volume is turned by right angles alone, so that its slices are those of the run's direction to
within 45 degrees: a scan that lies oblique in the patient is not interpolated into another plane.
What is placed is never scaled; `Input` says what becomes of one that is larger than the grid.

Directions are those of a viewer: in a slice the head or the front is on top, and the patient's
front or right side on the left. Everything but what `resampled` makes is a view.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import nibabel
import numpy as np
from numpy.typing import NDArray

from client.intake.volumes import Volume, length_at, resampled
from common.cohort import PIXEL_MAX
from common.errors import IntakeError
from common.spec import Direction, Input

AXES: dict[Direction, int] = {"sagittal": 0, "coronal": 1, "axial": 2}
_EVERY_AXIS = [0, 1, 2]


class Laid(NamedTuple):
    """Values whose axes are slices, rows and columns of one direction, and their spacing in mm."""

    values: NDArray[Any]
    spacing: tuple[float, float, float]


def canonical(
    values: NDArray[Any], affine: NDArray[np.float64]
) -> tuple[NDArray[Any], NDArray[np.float64]]:
    """Values with their axes towards the right, the front and the head, and their affine.

    Args:
        values: (i, j, k) of any order.
        affine: (4, 4) from voxels to millimetres towards the right, the front and the head.

    Raises:
        IntakeError: if the affine says of an axis not where it runs.
    """
    finite = np.isfinite(affine).all()
    turned = nibabel.io_orientation(affine if finite else np.zeros((4, 4)))  # type: ignore[no-untyped-call]
    if np.isnan(turned).any() or sorted(turned[:, 0]) != _EVERY_AXIS:
        raise IntakeError("its affine does not say where each of its three axes runs")
    back = nibabel.orientations.inv_ornt_aff(turned, values.shape)  # type: ignore[no-untyped-call]
    return nibabel.apply_orientation(values, turned), affine @ back  # type: ignore[no-untyped-call]


def laid(values: NDArray[Any], affine: NDArray[np.float64], direction: Direction) -> Laid:
    """A volume of `canonical` as slices of one direction."""
    axis = AXES[direction]
    sides = np.delete(np.linalg.norm(affine[:3, :3], axis=0), axis)
    across, down = map(float, sides)
    between = float(np.linalg.norm(affine[:3, axis]))
    return Laid(
        np.moveaxis(values, axis, 0).transpose(0, 2, 1)[:, ::-1, ::-1], (between, down, across)
    )


def laid_volume(volume: Volume, direction: Direction) -> Laid:
    """A volume of DICOM, in the patient's coordinates, as slices of one direction."""
    steps = np.asarray(volume.spacing)[:, None] * volume.orientation
    to_world = np.eye(4)
    # DICOM's axes run to the left and the back, an affine's to the right and the front.
    to_world[:3, :3] = (steps * [-1, -1, 1]).T
    to_world[:3, 3] = volume.origin * [-1, -1, 1]
    return laid(*canonical(volume.values, to_world), direction)


def to_grid(volume: Laid, settings: Input, rule: Literal["linear", "nearest"]) -> NDArray[Any]:
    """A volume on the run's grid; what it does not fill is 0.

    Args:
        volume: of the run's direction.
        settings: the run's `Input`, which has a depth.
        rule: as `resampled` takes it; ``nearest`` is for labels.

    Returns:
        (depth, height, width) of the run: float32, of labels their own type.

    Raises:
        IntakeError: if it is larger than the grid and the run's file does not let it be cut.
    """
    spacing = settings.spacing or volume.spacing
    on_spacing = _respaced(volume, spacing, rule)
    sides = settings.sides
    if settings.fit != "crop" and is_cut(volume, settings):
        have, room = (" x ".join(map(str, shape)) for shape in (on_spacing.shape, sides))
        raise IntakeError(
            f"it has {have} voxels of {' x '.join(f'{step:g}' for step in spacing)} mm, and the "
            f"run's grid {room}; a larger grid would hold it, input.fit = 'crop' would cut it"
        )
    grid = np.zeros(sides, dtype=on_spacing.dtype)
    pairs = [_placed(have, room) for have, room in zip(on_spacing.shape, sides, strict=True)]
    grid[tuple(there for _, there in pairs)] = on_spacing[tuple(here for here, _ in pairs)]
    return grid


def is_cut(volume: Laid, settings: Input) -> bool:
    """Whether a volume has more than the run's grid holds."""
    spacing = settings.spacing or volume.spacing
    axes = zip(volume.values.shape, volume.spacing, spacing, settings.sides, strict=True)
    return any(length_at(have, new / old) > room for have, old, new, room in axes)


def from_grid(grid: NDArray[Any], volume: Laid, settings: Input) -> None:
    """Bring labels on the run's grid back upon a volume, in place: the way back of `to_grid`.

    Args:
        grid: (depth, height, width) of the run.
        volume: of the run's direction; each of its voxels becomes the class of the grid's voxel
            that is nearest, and 0 where it was cut off.
        settings: the run's `Input`, which has a depth.
    """
    spacing = settings.spacing or volume.spacing
    axes = zip(volume.values.shape, volume.spacing, spacing, settings.sides, strict=True)
    near = [_nearest(have, new / old, room) for have, old, new, room in axes]
    seen = [at >= 0 for at in near]
    volume.values[...] = 0
    chosen = (at[there] for at, there in zip(near, seen, strict=True))
    volume.values[np.ix_(*seen)] = grid[np.ix_(*chosen)]


def brightness_to_grid(volume: Laid, settings: Input) -> NDArray[np.uint16]:
    """(channels, depth, height, width) of a volume of brightness in 0..1; see `to_grid`."""
    grid = to_grid(volume, settings, "linear")
    np.clip(grid, 0, 1, out=grid)
    np.rint(np.multiply(grid, np.float32(PIXEL_MAX), out=grid), out=grid)
    stored = grid.astype(np.uint16)[None]
    return stored if settings.channels == 1 else np.repeat(stored, settings.channels, axis=0)


def _respaced(
    volume: Laid, spacing: tuple[float, float, float], rule: Literal["linear", "nearest"]
) -> NDArray[Any]:
    if np.allclose(volume.spacing, spacing, rtol=1e-6, atol=0):
        return volume.values
    here = Volume(volume.values, volume.spacing, np.eye(3), np.zeros(3))
    return resampled(here, spacing, rule).values


def _placed(have: int, room: int) -> tuple[slice, slice]:
    """Which part of so many voxels comes to lie where in so much room, both around the middle."""
    length = min(have, room)
    here, there = (have - length) // 2, (room - length) // 2
    return slice(here, here + length), slice(there, there + length)


def _nearest(have: int, factor: float, room: int) -> NDArray[np.int64]:
    """For each of so many voxels along an axis the grid's that is nearest; -1: it was cut off."""
    length = length_at(have, factor)
    near = np.minimum(np.rint(np.arange(have) / factor).astype(np.int64), length - 1)
    here, there = _placed(length, room)
    inside = (near >= here.start) & (near < here.stop)
    return np.where(inside, near - here.start + there.start, -1)
