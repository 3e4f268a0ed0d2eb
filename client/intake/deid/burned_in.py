"""Whether text in the pixels is to be expected, by what the header says, and where none can be.

The flag (0028,0301) alone is no evidence of absence: few makers set it. So a class, a modality, a
way of conversion and words of the image type speak too (PS3.3 C.7.6.1, C.8.6.1); and of an
ultrasound screen nothing is kept but the regions that hold an image (C.8.5.5).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset

from client.intake.deid.classes import SECONDARY_CAPTURE, ULTRASOUND
from client.intake.deidentify import text_of

_CONVERSIONS = frozenset({"DV", "DI", "DF", "WSD", "SD", "SI", "DRW", "SYN"})
_MODALITIES = frozenset({"OT", "DOC", "SC", "SD", "XC"})
_IMAGE_TYPE_WORDS = ("SCREEN", "SAVE", "CAPTURE", "REPORT", "PROT", "PASTED", "DOSE", "LABEL")


class Box(NamedTuple):
    """Rows and columns of a rectangle, each end excluded."""

    top: int
    left: int
    bottom: int
    right: int

    def holds(self, other: Box) -> bool:
        """Whether another lies within it; it holds itself."""
        return (
            self.top <= other.top
            and self.left <= other.left
            and self.bottom >= other.bottom
            and self.right >= other.right
        )


def outermost(boxes: Iterable[Box]) -> list[Box]:
    """Boxes without those that lie within another, from the top: they cover the same, once."""
    kept: list[Box] = []
    for box in sorted(set(boxes), key=lambda box: (box.top - box.bottom) * (box.right - box.left)):
        if not any(larger.holds(box) for larger in kept):
            kept.append(box)
    return sorted(kept)


def risk_of(header: Dataset) -> str:
    """Why text in the pixels is likely; empty if nothing in the header says so."""
    return next((reason for rule in _RULES if (reason := rule(header))), "")


def _flagged(header: Dataset) -> str:
    flag = text_of(header, "BurnedInAnnotation").upper()
    return "its header says that it has burned-in annotation" if flag.startswith("Y") else ""


def _captured(header: Dataset) -> str:
    if text_of(header, "SOPClassUID") in SECONDARY_CAPTURE:
        return "it is a secondary capture"
    if text_of(header, "ConversionType").upper() in _CONVERSIONS:
        return "it was converted from a screen, a film or paper"
    return ""


def _of_modality(header: Dataset) -> str:
    if text_of(header, "Modality").upper() in _MODALITIES:
        return "its modality is none that makes images of its own"
    return ""


def _of_type(header: Dataset) -> str:
    image_type = text_of(header, "ImageType").upper()
    if any(word in image_type for word in _IMAGE_TYPE_WORDS):
        return "its image type is that of a screen, a report or a label"
    if text_of(header, "SpecimenLabelInImage").upper().startswith("Y"):
        return "it shows the label of a specimen"
    return ""


def _ultrasound_screen(header: Dataset) -> str:
    ultrasound = text_of(header, "SOPClassUID") in ULTRASOUND
    if ultrasound and not any(ultrasound_regions(header, 1 << 16, 1 << 16)):
        return "it is an ultrasound screen without regions that say where the image is"
    return ""


_RULES: tuple[Callable[[Dataset], str], ...] = (
    _flagged,
    _captured,
    _of_modality,
    _of_type,
    _ultrasound_screen,
)


def ultrasound_regions(header: Dataset, rows: int, columns: int) -> Iterator[Box]:
    """The rectangles that hold an image, of an ultrasound screen of this size."""
    for region in header.get("SequenceOfUltrasoundRegions") or ():
        corners = [
            text_of(region, f"RegionLocation{corner}")
            for corner in ("MinX0", "MinY0", "MaxX1", "MaxY1")
        ]
        if all(corner.isdecimal() for corner in corners):
            left, top, right, bottom = map(int, corners)
            box = Box(top, left, min(bottom + 1, rows), min(right + 1, columns))
            if box.top < box.bottom and box.left < box.right:
                yield box


def outside_regions(header: Dataset, rows: int, columns: int) -> NDArray[np.bool_] | None:
    """Where an ultrasound screen has no image; None for other images, or without regions."""
    if text_of(header, "SOPClassUID") not in ULTRASOUND:
        return None
    regions = list(ultrasound_regions(header, rows, columns))
    if not regions:
        return None
    outside = np.ones((rows, columns), dtype=np.bool_)
    for box in regions:
        outside[box.top : box.bottom, box.left : box.right] = False
    return outside
