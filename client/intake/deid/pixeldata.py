"""Pixels: as many as the header describes, in as many bits, and none where there is text.

Frames that are compressed stay compressed, if nothing in them is blanked and their coding is one
whose words can be taken out (`client.intake.deid.codestrip`); all others are decoded and written
uncompressed. A codestream may hold more bits than the header gives it: it is decoded then, too.

Memory is that of one frame, however many there are: what is done waits in a file without a name
(`client.intake.deid.spool`) if it is large. Each frame is read once, so that what was searched
for text is what is written.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from io import BufferedIOBase
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset
from pydicom.encaps import get_frame
from pydicom.uid import UID, ExplicitVRLittleEndian

from client.intake.decision import Decision
from client.intake.deid.burned_in import Box, outermost, outside_regions
from client.intake.deid.codestrip import stripped
from client.intake.deid.findtext import find_text
from client.intake.deid.profile import Profile
from client.intake.deid.spool import FrameSpool, NativeSpool
from client.intake.deidentify import counted, quoted, text_of
from client.intake.palette import palette_of
from client.intake.part10 import DicomFile, FrameDecoder, Geometry, Limits, PixelElement
from common.errors import IntakeError, ReviewError

_PALETTE = "PALETTE COLOR"
_COLOUR_BY_PIXEL = {"PhotometricInterpretation": "RGB", "PlanarConfiguration": 0}
_MOST_BYTES = 2**32 - 2  # what the length of an element can say (PS3.5 7.1.2)
_MOST_COVERED = 0.5
_ROUNDING = 2
Finder = Callable[[NDArray[Any]], list[Box]]


@dataclass(frozen=True)
class CleanPixels:
    """Pixel data of a new object.

    Attributes:
        syntax: its transfer syntax.
        data: the value of (7FE0,0010), to be read; if it is large, a file without a name.
        attributes: of the image pixel module, where they changed.
        boxes: how many boxes were blanked, in all frames.
        outside: whether what lies outside of the ultrasound regions was blanked.
    """

    syntax: UID
    data: BufferedIOBase
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
        spool: folder for files without a name, as large as the pixels; the system's for
            temporary files if not given.
    """

    profile: Profile
    limits: Limits = field(default_factory=Limits)
    find: Finder = find_text
    outside: Callable[[Dataset, int, int], NDArray[np.bool_] | None] = outside_regions
    strip: Callable[[bytes, UID], Any] = stripped
    mask: Callable[[NDArray[Any], Dataset], NDArray[Any]] = field(default_factory=lambda: masked)
    decision: Decision | None = None
    spool: Path | None = None

    def __call__(self, file: DicomFile) -> CleanPixels:
        """Clean all frames of a file that has just been parsed.

        Raises:
            IntakeError: if there are none, they cannot be decoded, or text may not be blanked.
        """
        element = file.pixel_element()
        geometry = file.geometry(self.limits)
        _check_described(file.header, element)
        size = _described(file.header, geometry)
        pixels = _Pixels(file, element, geometry)
        outside = self.outside(file.header, geometry.rows, geometry.columns)
        native = NativeSpool(size, self.spool, packed=text_of(file.header, "BitsAllocated") == "1")
        kept = FrameSpool(geometry.frames, size, self.spool)
        compressed, boxes = file.syntax.is_encapsulated and outside is None, 0
        for number in range(geometry.frames):
            stored = self.mask(pixels.decoded(number), file.header)
            found = self._boxes(list(planes_of(stored, file.header)))
            boxes += len(found)
            native.add(_blanked(stored, file.header, found, outside))
            compressed = compressed and not found and self._keep(pixels, number, kept)
        if compressed:
            return CleanPixels(file.syntax, kept.value(), {}, 0, False)
        attributes = _COLOUR_BY_PIXEL if geometry.samples > 1 else {}
        data = native.value()
        return CleanPixels(ExplicitVRLittleEndian, data, attributes, boxes, outside is not None)

    def _boxes(self, planes: list[NDArray[Any]]) -> list[Box]:
        said = self.decision
        if said is None:
            return text_in(planes, self.profile, self.find)
        found = [box for plane in planes for box in self.find(plane)] if said.found else []
        return [*said.blank, *outermost(found)]

    def _keep(self, pixels: _Pixels, number: int, kept: FrameSpool) -> bool:
        """Pass a frame on, compressed as it was but without words; False if it is to be decoded."""
        clean = self.strip(pixels.encoded(number), pixels.file.syntax)
        if clean is None or clean.bits > int(text_of(pixels.file.header, "BitsStored")):
            return False
        kept.add(clean.data)
        return True


@dataclass(frozen=True)
class _Pixels:
    """The frames of a file, one at a time."""

    file: DicomFile
    element: PixelElement
    geometry: Geometry

    @cached_property
    def decoded(self) -> FrameDecoder:
        return FrameDecoder(self.file, self.element, self.geometry, unused_bits=True)

    def encoded(self, number: int) -> bytes:
        header, stream = self.file.header, self.file.stream
        tables = [header.get(f"ExtendedOffsetTable{what}") for what in ("", "Lengths")]
        offsets = (tables[0], tables[1]) if all(tables) else None
        stream.seek(self.element.start)
        count = self.geometry.frames
        return get_frame(stream, number, number_of_frames=count, extended_offsets=offsets)


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
        if boxes and _covered(boxes, plane.shape) > _MOST_COVERED:
            raise ReviewError(
                "what looks like text covers half of its pixels: a person has to look at it"
            )
        found += boxes
    if found and not profile.clean_pixel_data:
        raise ReviewError(
            "there seems to be text in its pixels; clean_pixel_data = true in the profile "
            "would blank it"
        )
    return outermost(found)


def _covered(boxes: list[Box], shape: tuple[int, ...]) -> float:
    """The part of an image that is in boxes."""
    covered = np.zeros(shape, dtype=np.bool_)
    for box in boxes:
        covered[box.top : box.bottom, box.left : box.right] = True
    return float(covered.mean())


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


def _described(header: Dataset, geometry: Geometry) -> int:
    """Bytes of all frames, uncompressed.

    Raises:
        IntakeError: if that is more than an element can have.
    """
    size = math.prod(geometry) * int(text_of(header, "BitsAllocated") or 8) // 8
    if size > _MOST_BYTES:
        raise IntakeError(
            f"its {counted(geometry.frames)} frames take more than the {_MOST_BYTES} bytes that "
            "an element can have"
        )
    return size


def masked(stored: NDArray[Any], header: Dataset) -> NDArray[Any]:
    """The bits stored, and the sign carried into the others; what else stood there is gone."""
    unused = stored.dtype.itemsize * 8 - int(text_of(header, "BitsStored"))
    if stored.dtype.kind not in "iu" or unused <= 0:
        return stored
    return (stored << unused) >> unused


def planes_of(stored: NDArray[Any], header: Dataset) -> Iterator[NDArray[Any]]:
    """Where text would stand out: grey as it is; of colour each channel, if they differ."""
    if stored.ndim == 2 and text_of(header, "PhotometricInterpretation") != _PALETTE:
        yield stored
        return
    colour = stored if stored.ndim == 3 else palette_of(header)(stored)
    yield from channels_of(colour)


def channels_of(colour: NDArray[Any], step: float = 1) -> Iterator[NDArray[Any]]:
    """The channels of an image (rows, columns, channels); the first alone if it is grey.

    Any two colours differ in a channel; they may have the same brightness, and the same largest
    and smallest channel.

    Args:
        colour: the image.
        step: between two values; channels that differ by the rounding of a conversion are alike.
    """
    channels = [np.ascontiguousarray(colour[..., number]) for number in range(colour.shape[2])]
    yield channels[0]
    grey = all(_alike(channel, channels[0], step) for channel in channels[1:])
    yield from () if grey else channels[1:]


def _alike(one: NDArray[Any], other: NDArray[Any], step: float) -> bool:
    """Whether two channels differ by no more than the rounding of a conversion of colours."""
    high, low = np.maximum(one, other), np.minimum(one, other)
    return bool((high - low).max() <= _ROUNDING * step * 1.001)


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
        colours = palette_of(header)(present).astype(np.int64)
        return present[colours.sum(axis=1).argmin()]
    return stored.max() if photometric == "MONOCHROME1" else stored.min()
