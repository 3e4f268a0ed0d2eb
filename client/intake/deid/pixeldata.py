"""Pixels: as many as the header describes, in as many bits, and none where there is text.

Frames that are compressed stay compressed, if nothing in them is blanked and their coding is one
whose words can be taken out (`client.intake.deid.codestrip`); all others are decoded and written
uncompressed. A codestream may hold more bits than the header gives it: it is decoded then, too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate, get_frame
from pydicom.pixels.processing import apply_color_lut
from pydicom.uid import UID, ExplicitVRLittleEndian

from client.intake.decision import Decision
from client.intake.deid.burned_in import Box, outside_regions
from client.intake.deid.codestrip import stripped
from client.intake.deid.findtext import find_text
from client.intake.deid.profile import Profile
from client.intake.deidentify import quoted, text_of
from client.intake.part10 import DicomFile, FrameDecoder, Geometry, Limits, PixelElement
from common.errors import IntakeError, ReviewError

_PALETTE = "PALETTE COLOR"
_COLOUR_BY_PIXEL = {"PhotometricInterpretation": "RGB", "PlanarConfiguration": 0}
_MOST_BYTES = 2**31
_MOST_COVERED = 0.5
Finder = Callable[[NDArray[Any]], list[Box]]


@dataclass(frozen=True)
class CleanPixels:
    """Pixel data of a new object.

    Attributes:
        syntax: its transfer syntax.
        data: the value of (7FE0,0010).
        attributes: of the image pixel module, where they changed.
        boxes: how many boxes were blanked, in all frames.
        outside: whether what lies outside of the ultrasound regions was blanked.
    """

    syntax: UID
    data: bytes
    attributes: Mapping[str, Any]
    boxes: int
    outside: bool


@dataclass(frozen=True)
class PixelCleaner:
    """Cleans the pixels of one file at a time.

    Args:
        profile: whether text that is found is blanked or refused.
        limits: what a file may ask for.
        find: finds lines of text in a plane.
        outside: where an ultrasound screen has no image.
        strip: takes the words out of a compressed frame.
        mask: takes out the bits that the header does not describe.
        decision: what a person said of the file, if one did: it goes before the profile.
    """

    profile: Profile
    limits: Limits = field(default_factory=Limits)
    find: Finder = find_text
    outside: Callable[[Dataset, int, int], NDArray[np.bool_] | None] = outside_regions
    strip: Callable[[bytes, UID], Any] = stripped
    mask: Callable[[NDArray[Any], Dataset], NDArray[Any]] = field(default_factory=lambda: masked)
    decision: Decision | None = None

    def __call__(self, file: DicomFile) -> CleanPixels:
        """Clean all frames of a file that has just been parsed.

        Raises:
            IntakeError: if there are none, they cannot be decoded, or text may not be blanked.
        """
        element = file.pixel_element()
        geometry = file.geometry(self.limits)
        _check_described(file.header, element)
        _check_size(file.header, geometry)
        decode = FrameDecoder(file, element, geometry, unused_bits=True)
        outside = self.outside(file.header, geometry.rows, geometry.columns)
        frames, boxes = [], 0
        for number in range(geometry.frames):
            stored = self.mask(decode(number), file.header)
            found = self._boxes(list(_planes(stored, file.header)))
            boxes += len(found)
            frames.append(_blanked(stored, file.header, found, outside))
        if not boxes and outside is None:
            kept = self._compressed(file, element, geometry)
            if kept is not None:
                return CleanPixels(file.syntax, encapsulate(kept), {}, 0, False)
        attributes = _COLOUR_BY_PIXEL if frames[0].ndim == 3 else {}
        data = _native(frames, file.header)
        return CleanPixels(ExplicitVRLittleEndian, data, attributes, boxes, outside is not None)

    def _boxes(self, planes: list[NDArray[Any]]) -> list[Box]:
        said = self.decision
        if said is None:
            return text_in(planes, self.profile, self.find)
        found = [box for plane in planes for box in self.find(plane)] if said.found else []
        return [*said.blank, *found]

    def _compressed(
        self, file: DicomFile, element: PixelElement, geometry: Geometry
    ) -> list[bytes] | None:
        """All frames, compressed as they were but without words; None if one has to be decoded."""
        if not file.syntax.is_encapsulated:
            return None
        kept, described = [], int(text_of(file.header, "BitsStored"))
        for frame in _encoded(file, element, geometry):
            clean = self.strip(frame, file.syntax)
            if clean is None or clean.bits > described:
                return None
            kept.append(clean.data)
        return kept


def text_in(
    planes: Iterable[NDArray[Any]], profile: Profile, find: Finder = find_text
) -> list[Box]:
    """The boxes to blank in an image, given as one plane or more.

    Raises:
        ReviewError: if there are any and the profile blanks none, or if they are so large that
            they may be the image itself.
    """
    found: list[Box] = []
    for plane in planes:
        boxes = find(plane)
        covered = sum((box.bottom - box.top) * (box.right - box.left) for box in boxes)
        if covered > _MOST_COVERED * plane.size:
            raise ReviewError(
                "what looks like text covers half of its pixels: a person has to look at it"
            )
        found += boxes
    if found and not profile.clean_pixel_data:
        raise ReviewError(
            "there seems to be text in its pixels; clean_pixel_data = true in the profile "
            "would blank it"
        )
    return found


def _native(frames: list[NDArray[Any]], header: Dataset) -> bytes:
    """Uncompressed, little endian, colour by pixel, of even length (PS3.5 8.1, 8.2)."""
    if text_of(header, "BitsAllocated") == "1":
        bits = np.concatenate([frame.ravel() for frame in frames])
        data = np.packbits(bits, bitorder="little").tobytes()
    else:
        data = b"".join(map(_little, frames))
    return data + bytes(len(data) % 2)


def _check_described(header: Dataset, element: PixelElement) -> None:
    """Integers whose bits are the low ones of their words (PS3.5 8.1.1).

    Raises:
        IntakeError: otherwise; overlays and names have stood in the other bits.
    """
    if element.keyword != "PixelData":
        raise IntakeError(f"its pixels are {element.keyword}; expected PixelData")
    stored, high = (text_of(header, name) for name in ("BitsStored", "HighBit"))
    if not (stored.isdecimal() and high.isdecimal() and int(high) == int(stored) - 1):
        raise IntakeError(
            f"its BitsStored is {quoted(stored)}, its HighBit {quoted(high)}; "
            "expected the high bit to be one less"
        )


def _check_size(header: Dataset, geometry: Geometry) -> None:
    size = math.prod(geometry) * int(text_of(header, "BitsAllocated") or 8) // 8
    if size > _MOST_BYTES:
        raise IntakeError(
            f"its {geometry.frames} frames take {size} bytes; at most {_MOST_BYTES} are cleaned"
        )


def _encoded(file: DicomFile, element: PixelElement, geometry: Geometry) -> Iterator[bytes]:
    tables = [file.header.get(f"ExtendedOffsetTable{what}") for what in ("", "Lengths")]
    offsets = (tables[0], tables[1]) if all(tables) else None
    count = geometry.frames
    for number in range(count):
        file.stream.seek(element.start)
        yield get_frame(file.stream, number, number_of_frames=count, extended_offsets=offsets)


def masked(stored: NDArray[Any], header: Dataset) -> NDArray[Any]:
    """The bits stored, and the sign carried into the others; what else stood there is gone."""
    unused = stored.dtype.itemsize * 8 - int(text_of(header, "BitsStored"))
    if stored.dtype.kind not in "iu" or unused <= 0:
        return stored
    return (stored << unused) >> unused


def _little(stored: NDArray[Any]) -> bytes:
    return np.ascontiguousarray(stored, dtype=stored.dtype.newbyteorder("<")).tobytes()


def _planes(stored: NDArray[Any], header: Dataset) -> Iterator[NDArray[Any]]:
    """Where text would stand out: grey as it is, of colour the brightest and darkest channel."""
    if stored.ndim == 2 and text_of(header, "PhotometricInterpretation") != _PALETTE:
        yield stored
        return
    colour = stored if stored.ndim == 3 else apply_color_lut(stored, header)[..., :3]
    brightest, darkest = colour.max(axis=2), colour.min(axis=2)
    yield brightest
    if (brightest != darkest).any():
        yield darkest


def _blanked(
    stored: NDArray[Any],
    header: Dataset,
    boxes: list[Box],
    outside: NDArray[np.bool_] | None,
) -> NDArray[Any]:
    if not boxes and outside is None:
        return stored
    dark = _dark(stored, header)
    clean = stored.copy()
    for box in boxes:
        clean[box.top : box.bottom, box.left : box.right] = dark
    if outside is not None:
        clean[outside] = dark
    return clean


def _dark(stored: NDArray[Any], header: Dataset) -> Any:
    """The stored value of the image's own black."""
    photometric = text_of(header, "PhotometricInterpretation")
    if stored.ndim == 3:
        return 0
    if photometric == _PALETTE:
        present = np.unique(stored)
        colours = apply_color_lut(present[None], header)[0, :, :3].astype(np.int64)
        return present[colours.sum(axis=1).argmin()]
    return stored.max() if photometric == "MONOCHROME1" else stored.min()
