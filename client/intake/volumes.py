"""A series of slices as a volume, in the patient's coordinates, for networks in three dimensions.

Slices are put in order by where they lie, never by their numbers, which scanners and archives
give as they please. What is not one regular grid is refused with the reason: a slice that is
missing or there twice, slices of several orientations, spacings or sizes, a tilted gantry.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset
from scipy import ndimage

from client.intake.deidentify import text_of
from client.intake.display import rescaled
from client.intake.frames import Plane, macro, plane_of
from common.errors import IntakeError
from common.spec import MOST_VOXELS

_SAME_DIRECTION = 1e-3
_SAME_SPACING = 1e-3
_UNEVEN = 0.02
"""Of a slice distance: how far a slice may be from its place. Positions are rounded in files."""
_ASIDE = 0.5
"""Of a pixel: how far a slice may lie beside the first one."""
_SAME_PLACE = 1e-2
"""Millimetres: slices that are no farther apart lie at one place."""
_EDGE = 1e-3
"""Of a voxel: how far the last one may lie beyond the given volume, for positions are rounded."""
_WIDTH = 2 * float(np.sqrt(2 * np.log(2)))
"""Of a Gaussian: its full width at half its height, in standard deviations."""


class Slice(NamedTuple):
    """A decoded frame: the header of its object (cleaned will do), its number from 0, its values.

    ``stored`` is (rows, columns), as `FrameDecoder` gives it.
    """

    header: Dataset
    frame: int
    stored: NDArray[Any]


@dataclass(frozen=True, eq=False)
class Volume:
    """Values on a regular grid in the patient's coordinates (left, back, head; millimetres).

    Attributes:
        values: (slices, rows, columns).
        spacing: between the centres of slices, rows and columns.
        orientation: (3, 3) unit vectors: its rows point from slice to slice, from row to row, and
            from column to column.
        origin: (3,) the centre of the first voxel.
        order: for each slice, which of the given ones it is; empty once resampled.
    """

    values: NDArray[Any]
    spacing: tuple[float, float, float]
    orientation: NDArray[np.float64]
    origin: NDArray[np.float64]
    order: tuple[int, ...] = ()

    def world(self, voxels: NDArray[Any]) -> NDArray[np.float64]:
        """Where the centres of voxels lie.

        Args:
            voxels: (..., 3) slice, row and column; fractions are fine.

        Returns:
            (..., 3) millimetres.
        """
        steps = np.asarray(self.spacing)[:, None] * self.orientation
        there: NDArray[np.float64] = self.origin + np.asarray(voxels, dtype=np.float64) @ steps
        return there

    def labelled(self, labels: Sequence[NDArray[np.uint8]]) -> Volume:
        """The same grid with masks: one for each of the slices that it was made of.

        Args:
            labels: (rows, columns) each, in the order in which the slices were given.

        Raises:
            IntakeError: if they are not as many, or of another size.
        """
        if len(labels) != len(self.order) or any(
            mask.shape != self.values.shape[1:] for mask in labels
        ):
            raise IntakeError(
                f"{len(labels)} masks for {len(self.order)} slices of "
                f"{self.values.shape[1]} x {self.values.shape[2]}; expected one of that size each"
            )
        return replace(self, values=np.stack([labels[number] for number in self.order]))


def volume_of(slices: Sequence[Slice]) -> Volume:
    """Slices of one series, or frames of one object, as a volume of rescaled values.

    Values are those of the modality (Hounsfield units in CT), float32; padding is the lowest
    value of the rest. Memory: what is given, and 4 bytes a voxel.

    Args:
        slices: in any order.

    Raises:
        IntakeError: if they are not one regular grid, with what is wrong.
    """
    _check_kind(slices)
    planes = [plane_of(one.header, one.frame) for one in slices]
    _check_alike(planes)
    along = np.array([plane.position @ planes[0].normal for plane in planes])
    order = np.argsort(along, kind="stable")
    distance = _checked_distance(along[order])
    positions = np.array([planes[number].position for number in order])
    _check_upright(positions, planes[0].normal, min(planes[0].spacing))
    return Volume(
        values=_stacked([slices[number] for number in order]),
        spacing=(distance, *planes[0].spacing),
        orientation=np.stack([planes[0].normal, planes[0].down, planes[0].across]),
        origin=positions[0],
        order=tuple(order.tolist()),
    )


def resampled(
    volume: Volume,
    spacing: tuple[float, float, float],
    rule: Literal["linear", "nearest"] = "linear",
) -> Volume:
    """The same volume on a grid of another spacing, whose first voxel is the same.

    Takes up to four times the volume's memory besides.

    ``linear`` is antialiased where the grid becomes coarser, and exact for whatever is linear in
    space; ``nearest`` is for labels, of which it makes no new ones.

    Args:
        volume: of any spacing.
        spacing: between slices, rows and columns, in millimetres.
        rule: how values between voxels come about.

    Returns:
        A volume that ends at the last voxel that still lies within the given one.

    Raises:
        IntakeError: for a spacing that is none, or more voxels than `MOST_VOXELS`.
    """
    if not all(np.isfinite(step) and step > 0 for step in spacing):
        raise IntakeError(f"spacing {spacing}: expected three lengths above 0, in millimetres")
    factors = tuple(new / old for new, old in zip(spacing, volume.spacing, strict=True))
    lengths = list(map(length_at, volume.values.shape, factors))
    _check_size(lengths)
    values = volume.values
    if rule == "linear":
        values = values.astype(np.float32, copy=False)
        for axis, factor in enumerate(factors):
            values = _smoothed(values, axis, factor)
    order = 1 if rule == "linear" else 0
    values = ndimage.affine_transform(
        values, factors, output_shape=tuple(lengths), order=order, mode="nearest"
    )
    return replace(volume, values=values, spacing=spacing, order=())


def length_at(length: int, factor: float) -> int:
    """How many voxels `resampled` makes of so many, each `factor` times as far from the next."""
    return int((length - 1) / factor + _EDGE) + 1


def _smoothed(values: NDArray[np.float32], axis: int, factor: float) -> NDArray[np.float32]:
    """Blur along one axis, so that voxels are as wide as those that are `factor` times as large.

    The width is that of Cardoso et al., Scale factor point spread function matching (2015).
    Beyond its ends the volume goes on as if mirrored in its last voxel, in place and value: a
    ramp goes on as a ramp.
    """
    length = values.shape[axis]
    if factor <= 1 or length == 1:
        return values
    sigma = float(np.sqrt(factor**2 - 1)) / _WIDTH
    radius = min(int(4 * sigma + 0.5) or 1, length - 1)
    margins = [(0, 0)] * values.ndim
    margins[axis] = (radius, radius)
    wide = np.pad(values, margins, mode="reflect", reflect_type="odd")
    blurred: NDArray[np.float32] = ndimage.gaussian_filter1d(wide, sigma, axis, radius=radius)
    return np.take(blurred, range(radius, radius + length), axis=axis)


def _check_kind(slices: Sequence[Slice]) -> None:
    """Enough of them, in grey, none a localiser, and not too large."""
    if len(slices) < 2:
        raise IntakeError(f"{len(slices)} slices are no volume; expected two or more")
    shapes = Counter(one.stored.shape for one in slices)
    if len(shapes) > 1 or any(len(shape) != 2 for shape in shapes):
        seen = ", ".join(" x ".join(map(str, shape)) for shape in sorted(shapes))
        raise IntakeError(f"its slices are of sizes {seen}; expected one size, in grey")
    localisers = sum(_is_localiser(one) for one in slices)
    if localisers:
        raise IntakeError(
            f"{localisers} of its {len(slices)} slices are localisers, which lie across the "
            "others; expected none"
        )
    _check_size([len(slices), *slices[0].stored.shape])


def _is_localiser(one: Slice) -> bool:
    level = next(
        (
            item
            for keyword in ("CTImageFrameTypeSequence", "MRImageFrameTypeSequence")
            if (item := macro(one.header, one.frame, keyword)) is not one.header
        ),
        one.header,
    )
    kinds = text_of(level, "FrameType") or text_of(one.header, "ImageType")
    return "LOCALIZER" in kinds.upper().split("\\")


def _check_size(lengths: Sequence[int]) -> None:
    if np.prod(np.array(lengths, dtype=np.float64)) > MOST_VOXELS:
        seen = " x ".join(map(str, lengths))
        raise IntakeError(f"a volume of {seen} voxels; at most {MOST_VOXELS} are held")


def _check_alike(planes: Sequence[Plane]) -> None:
    first = planes[0]
    if any(plane.reference != first.reference for plane in planes):
        raise IntakeError("its slices are of several frames of reference; expected one")
    for plane in planes:
        turned = max(
            float(np.abs(plane.across - first.across).max()),
            float(np.abs(plane.down - first.down).max()),
        )
        if turned > _SAME_DIRECTION:
            raise IntakeError("its slices have several orientations; expected one")
        if not np.allclose(plane.spacing, first.spacing, rtol=_SAME_SPACING, atol=0):
            raise IntakeError("its slices have several pixel spacings; expected one")


def _checked_distance(along: NDArray[np.float64]) -> float:
    """The distance between slices, from their ascending positions along the normal."""
    gaps = np.diff(along)
    doubled = int((gaps < _SAME_PLACE).sum())
    if doubled:
        raise IntakeError(
            f"{doubled} of its {len(along)} slices lie where another one does, as several echoes, "
            "phases or reconstructions do; expected one at each place"
        )
    usual = float(np.median(gaps))
    missing = int(np.sum(np.rint(gaps / usual) - 1, where=gaps > usual * 1.5))
    if missing:
        raise IntakeError(
            f"{missing} slices are missing between its {len(along)}: the usual distance is "
            f"{usual:.3g} mm, the largest {float(gaps.max()):.3g} mm"
        )
    distance = float(along[-1] - along[0]) / len(gaps)
    even = along[0] + distance * np.arange(len(along))
    if float(np.abs(along - even).max()) > max(_UNEVEN * distance, _SAME_PLACE):
        raise IntakeError(
            f"its slices are not evenly spaced: from {float(gaps.min()):.3g} to "
            f"{float(gaps.max()):.3g} mm"
        )
    return distance


def _check_upright(
    positions: NDArray[np.float64], normal: NDArray[np.float64], pixel: float
) -> None:
    """Slices lie straight above one another, or the gantry was tilted (or the table moved)."""
    way = positions - positions[0]
    aside = np.linalg.norm(way - np.outer(way @ normal, normal), axis=1)
    if aside.max() > _ASIDE * pixel:
        angle = float(np.degrees(np.arctan2(aside[-1], way[-1] @ normal)))
        raise IntakeError(
            f"its slices are not stacked at right angles but {angle:.1f} degrees off, as by a "
            "tilted gantry; expected a volume without tilt"
        )


def _stacked(slices: Sequence[Slice]) -> NDArray[np.float32]:
    values = np.empty((len(slices), *slices[0].stored.shape), dtype=np.float32)
    for number, (header, frame, stored) in enumerate(slices):
        values[number] = rescaled(stored, header, frame)
    return values
