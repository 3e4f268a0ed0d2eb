"""What holds for one frame of an object: its functional groups, and where it lies in the patient.

Single-frame objects say it at the top of their header, enhanced multi-frame ones in functional
groups, shared by all frames or of each (PS3.3 C.7.6.16). All lengths are millimetres, all vectors
in the patient's coordinates: towards the left, the back and the head (PS3.3 C.7.6.2.1.1).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence

from client.intake.deidentify import text_of
from common.errors import IntakeError

_UNIT = 1e-3
"""How far a cosine may be off: files have them in as few as four digits."""


@dataclass(frozen=True, eq=False)
class Plane:
    """Where a frame lies.

    Attributes:
        position: (3,) the centre of its first pixel.
        across: (3,) unit vector along a row, from column to column.
        down: (3,) unit vector along a column, from row to row.
        spacing: between rows, and between columns.
        shape: rows and columns.
        reference: UID of the frame of reference; empty if the file names none.
    """

    position: NDArray[np.float64]
    across: NDArray[np.float64]
    down: NDArray[np.float64]
    spacing: tuple[float, float]
    shape: tuple[int, int]
    reference: str

    @property
    def normal(self) -> NDArray[np.float64]:
        """Unit vector at right angles to the frame; right-handed with `across` and `down`."""
        return np.cross(self.across, self.down)

    def at(self, row: float, column: float) -> NDArray[np.float64]:
        """(3,) where a pixel's centre lies (PS3.3 equation C.7.6.2.1-1)."""
        rows, columns = self.spacing
        there: NDArray[np.float64] = (
            self.position + row * rows * self.down + column * columns * self.across
        )
        return there

    def distance(self, other: Plane) -> float:
        """How far the corners of two frames are apart, at most."""
        rows, columns = (length - 1 for length in self.shape)
        corners = ((0, 0), (rows, 0), (0, columns))
        return max(float(np.linalg.norm(self.at(*at) - other.at(*at))) for at in corners)


def items_of(level: Dataset, keyword: str) -> list[Dataset]:
    """The items of a sequence; none where there is none, or what is there is no sequence."""
    value = level.get(keyword)
    return list(value) if isinstance(value, Sequence) else []


def groups_of(header: Dataset, frame: int) -> list[Dataset]:
    """The functional groups that hold for a frame (from 0): the shared ones, then its own."""
    shared = items_of(header, "SharedFunctionalGroupsSequence")[:1]
    return shared + items_of(header, "PerFrameFunctionalGroupsSequence")[frame : frame + 1]


def macro(header: Dataset, frame: int, keyword: str) -> Dataset:
    """The first item of a functional group macro for a frame, or else the header itself.

    A frame's own goes before that of all frames.
    """
    found = [item for group in groups_of(header, frame) for item in items_of(group, keyword)[:1]]
    return found[-1] if found else header


def plane_of(header: Dataset, frame: int) -> Plane:
    """Where a frame lies.

    Args:
        header: of its object, unverified or cleaned.
        frame: its number, from 0.

    Raises:
        IntakeError: if the header does not say it, or says what cannot be.
    """
    position = macro(header, frame, "PlanePositionSequence")
    orientation = macro(header, frame, "PlaneOrientationSequence")
    measures = macro(header, frame, "PixelMeasuresSequence")
    cosines = np.array(numbers(orientation, "ImageOrientationPatient", 6))
    across, down = _unit(cosines[:3]), _unit(cosines[3:])
    if abs(float(across @ down)) > _UNIT:
        raise IntakeError("the rows and columns of its ImageOrientationPatient are not square")
    rows, columns = numbers(measures, "PixelSpacing", 2)
    if min(rows, columns) <= 0:
        raise IntakeError("its PixelSpacing is not above 0")
    return Plane(
        position=np.array(numbers(position, "ImagePositionPatient", 3)),
        across=across,
        down=down,
        spacing=(rows, columns),
        shape=(_length(header, "Rows"), _length(header, "Columns")),
        reference=text_of(header, "FrameOfReferenceUID"),
    )


def numbers(level: Dataset, keyword: str, count: int) -> list[float]:
    """The values of a numeric attribute.

    Raises:
        IntakeError: if they are not `count` finite numbers.
    """
    try:
        values = [float(text) for text in text_of(level, keyword).split("\\")]
    except ValueError:
        values = []
    if len(values) != count or not all(map(math.isfinite, values)):
        raise IntakeError(f"its {keyword} is missing or wrong; expected {count} numbers")
    return values


def _length(header: Dataset, keyword: str) -> int:
    text = text_of(header, keyword)
    if not text.isdecimal():
        raise IntakeError(f"its {keyword} is missing or wrong; expected a number")
    return int(text)


def _unit(vector: NDArray[np.float64]) -> NDArray[np.float64]:
    length = float(np.linalg.norm(vector))
    if abs(length - 1) > _UNIT:
        raise IntakeError("its ImageOrientationPatient has a direction that is not of length 1")
    unit: NDArray[np.float64] = vector / length
    return unit
