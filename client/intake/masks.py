"""DICOM segmentations as masks: for each frame of an image, which segment each pixel is of.

A segmentation (PS3.3 A.51, C.8.20) has a frame for each segment on each image where the segment
has a pixel at all; each frame names its image, or lies where the image lies. Nothing is resampled:
a mask that is not of its image's size and place is refused, for a label that is off by a little
teaches a network just that.

The masks' places are the images' own, unverified UIDs: whoever keeps a mask keeps it under the
pseudonym of its image. Of a segment's own words nothing is kept but codes of the standard.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset

from client.intake.deid.rules import code_of
from client.intake.deidentify import quoted, registered_name, text_of
from client.intake.frames import Plane, groups_of, items_of, numbers, plane_of
from client.intake.part10 import DicomFile, FrameDecoder, Geometry, Limits
from common.errors import IntakeError

SEGMENTATION = "1.2.840.10008.5.1.4.1.1.66.4"
LABEL_MAP = "1.2.840.10008.5.1.4.1.1.66.7"

Labels = NDArray[np.uint8]
Overlap = Literal["refuse", "highest"]
_BACKGROUND = 0
_MOST_SEGMENTS = 255
_HALF = 0.5
_TOLERANCE = 0.1
"""Of a pixel: how far a mask's corners may be from those of its image."""


class Place(NamedTuple):
    """One frame of one image: the image's SOP Instance UID, unverified, and the frame, from 1."""

    instance: str
    frame: int


class Code(NamedTuple):
    """A code of the standard's: value, scheme and meaning; "Unknown" for any other."""

    value: str
    scheme: str
    meaning: str


@dataclass(frozen=True)
class Segment:
    """What a segment is.

    Attributes:
        number: its label, 1 to 255.
        category: of the property, such as anatomical structure.
        kind: the property itself, such as liver.
        names: under which a hospital's table may have it: its code as ``scheme:value``, and its
            label. They are the file's own words, unverified: to look up, never to keep or show.
    """

    number: int
    category: Code
    kind: Code
    names: tuple[str, ...] = field(default=(), repr=False, compare=False)


class _Piece(NamedTuple):
    """A frame of the segmentation, from 0, and its segment; None if its pixels say which."""

    frame: int
    segment: int | None


@dataclass(frozen=True)
class Masks:
    """The masks of one segmentation, decoded one by one; its stream has to stay open.

    Memory is that of one mask and one decoded frame.

    Attributes:
        segments: by number. Background is 0 and is none of them.
        shape: rows and columns of every mask.
        places: the images' frames that have a mask, in the segmentation's order.
    """

    segments: Mapping[int, Segment]
    shape: tuple[int, int]
    _pieces: Mapping[Place, tuple[_Piece, ...]]
    _reader: _Reader
    _overlap: Overlap
    _numbers: Mapping[int, int] | None = None

    @property
    def places(self) -> tuple[Place, ...]:
        """The images' frames that have a mask, in the segmentation's order."""
        return tuple(self._pieces)

    def numbered(self, numbers: Mapping[int, int]) -> Masks:
        """The same masks in other numbers: what each segment is, 0 for the background.

        Segments that become one number do not overlap each other; of others the higher *number*
        is taken where that is asked for.

        Args:
            numbers: up to 255, for every one of `segments`.
        """
        return replace(self, _numbers={_BACKGROUND: _BACKGROUND, **numbers})

    def __iter__(self) -> Iterator[tuple[Place, Labels]]:
        """Every mask with its place.

        Raises:
            IntakeError: as `labels`; at the end, if not one of them has a pixel.
        """
        marked = False
        for place in self.places:
            labels = self.labels(place)
            marked = marked or bool(labels.any())
            yield place, labels
        if not marked:
            raise IntakeError("its masks are empty: no pixel is of any segment")

    def labels(self, place: Place) -> Labels:
        """One mask.

        Args:
            place: one of `places`.

        Returns:
            (rows, columns) segment numbers, or those of `numbered`, 0 where there is none.

        Raises:
            IntakeError: if two segments have the same pixel and that is refused, or a pixel is
                of a segment that is not described.
        """
        labels: Labels = np.zeros(self.shape, dtype=np.uint8)
        for piece in sorted(self._pieces[place], key=self._number_of):
            values = self._reader(piece.frame)
            if piece.segment is None:
                labels = self._renumbered(self._checked(values))
            elif self._number_of(piece) != _BACKGROUND:
                self._add(labels, self._reader.marked(values), self._number_of(piece))
        return labels

    def _number_of(self, piece: _Piece) -> int:
        segment = piece.segment or _BACKGROUND
        return segment if self._numbers is None else self._numbers[segment]

    def _renumbered(self, labels: Labels) -> Labels:
        if self._numbers is None:
            return labels
        table = np.zeros(_MOST_SEGMENTS + 1, dtype=np.uint8)
        for segment, number in self._numbers.items():
            table[segment] = number
        return table[labels]

    def _add(self, labels: Labels, marked: NDArray[np.bool_], segment: int) -> None:
        """In ascending order of the segments, so the highest number is what stays."""
        others = np.unique(labels[marked])
        others = others[(others != _BACKGROUND) & (others != segment)]
        what = "segments" if self._numbers is None else "classes"
        if self._overlap == "refuse" and others.size:
            raise IntakeError(
                f"its {what} {int(others[0])} and {segment} overlap; one pixel has one label. "
                "overlap = 'highest' would take the higher number"
            )
        labels[marked] = segment

    def _checked(self, values: NDArray[Any]) -> Labels:
        for value in np.unique(values):
            if int(value) != _BACKGROUND and int(value) not in self.segments:
                raise IntakeError(f"a pixel is of segment {int(value)}, which it does not describe")
        return values.astype(np.uint8)


@dataclass(frozen=True)
class _Reader:
    """Decodes a segmentation's frames, and knows from which value on a pixel is marked."""

    decode: FrameDecoder
    threshold: float

    def __call__(self, frame: int) -> NDArray[Any]:
        return self.decode(frame)

    def marked(self, values: NDArray[Any]) -> NDArray[np.bool_]:
        """Where a frame of one segment is set."""
        return values >= self.threshold


def read_masks(
    file: DicomFile,
    images: Iterable[Dataset],
    *,
    overlap: Overlap = "refuse",
    limits: Limits | None = None,
) -> Masks:
    """The masks that a segmentation has for images.

    A frame that names its image belongs to it; one that names none belongs to the image at the
    same place in the same frame of reference. An image that the segmentation names, without a
    frame for it, has an empty mask (PS3.3 C.8.20.2: empty frames may be left out).

    Args:
        file: the segmentation, just parsed.
        images: unverified headers of all images that it may speak of.
        overlap: what to do where two segments have the same pixel: ``refuse``, or take the one
            with the ``highest`` number.
        limits: what the file may ask for.

    Of fractional segments (probability or occupancy) a pixel counts from one half on.

    Raises:
        IntakeError: if it is no segmentation, a segment is not described, an image is missing, or
            is of another size or at another place than its mask.
    """
    limits = limits or Limits()
    header = file.header
    _check_class(header)
    element, geometry = file.pixel_element(), file.geometry(limits)
    segments = _segments(header)
    atlas = _Atlas(images, geometry)
    pieces: dict[Place, list[_Piece]] = {place: [] for place in atlas.named(header)}
    for frame, groups in enumerate(_descriptions(header, geometry)):
        piece = _Piece(frame, _segment_of(header, groups, frame, segments))
        pieces.setdefault(atlas.place(header, groups, frame), []).append(piece)
    _check_one_label_map(header, pieces)
    reader = _Reader(FrameDecoder(file, element, geometry), _threshold(header))
    shape = geometry.rows, geometry.columns
    return Masks(segments, shape, {at: tuple(of) for at, of in pieces.items()}, reader, overlap)


def absent_of(segmentation: Dataset, series: str, images: Iterable[Dataset]) -> int:
    """How many images of a series a segmentation names that are not among those given.

    Args:
        segmentation: its unverified header.
        series: the Series Instance UID.
        images: unverified headers.
    """
    named = {
        text_of(image, "ReferencedSOPInstanceUID")
        for one in items_of(segmentation, "ReferencedSeriesSequence")
        if text_of(one, "SeriesInstanceUID") == series
        for image in items_of(one, "ReferencedInstanceSequence")
    }
    return len(named - {text_of(image, "SOPInstanceUID") for image in images})


class _Atlas:
    """The images that masks may belong to, by their UIDs and by their places."""

    def __init__(self, images: Iterable[Dataset], mask: Geometry) -> None:
        self._images = {text_of(image, "SOPInstanceUID"): image for image in images}
        self._mask = mask
        self._planes: dict[Place, Plane | None] = {}

    def named(self, header: Dataset) -> Iterator[Place]:
        """The single-frame images that the segmentation names at the top of its header."""
        for series in items_of(header, "ReferencedSeriesSequence"):
            for item in items_of(series, "ReferencedInstanceSequence"):
                uid = text_of(item, "ReferencedSOPInstanceUID")
                if uid in self._images and _frames(self._images[uid]) == 1:
                    yield Place(uid, 1)

    def place(self, header: Dataset, groups: list[Dataset], frame: int) -> Place:
        """Where a frame of the segmentation belongs."""
        sources = [place for place in _sources(groups) if place.instance in self._images]
        if not sources and any(True for _ in _sources(groups)):
            raise IntakeError(
                f"the image that its frame {frame + 1} refers to is missing; "
                "expected all images of the segmentation beside it"
            )
        place = self._among(sources, header, frame) if sources else self._at(header, frame)
        self._check(place, header, frame)
        return place

    def _among(self, sources: list[Place], header: Dataset, frame: int) -> Place:
        """The one image that a frame names; of several, the one that it lies upon."""
        whole = [
            Place(at.instance, number)
            for at in dict.fromkeys(sources)
            for number in ([at.frame] if at.frame else self._described(at.instance))
        ]
        return whole[0] if len(whole) == 1 else self._nearest(whole, header, frame)

    def _described(self, instance: str) -> range:
        """The frames that an image has a word for: as many as it claims are too many to try."""
        image = self._images[instance]
        groups = len(items_of(image, "PerFrameFunctionalGroupsSequence"))
        return range(1, max(1, min(_frames(image), groups)) + 1)

    def _at(self, header: Dataset, frame: int) -> Place:
        """The image at the same place, for a frame that names none."""
        every = [Place(uid, number) for uid in self._images for number in self._described(uid)]
        return self._nearest(every, header, frame)

    def _nearest(self, places: list[Place], header: Dataset, frame: int) -> Place:
        mask = plane_of(header, frame)
        here = [place for place in places if _same_plane(mask, self._plane(place))]
        if len(here) != 1:
            raise IntakeError(
                f"its frame {frame + 1} names no single image and lies upon {len(here)} of "
                f"{len(places)}; expected one"
            )
        return here[0]

    def _check(self, place: Place, header: Dataset, frame: int) -> None:
        image = self._images[place.instance]
        if not 1 <= place.frame <= _frames(image):
            raise IntakeError(
                f"it refers to frame {place.frame} of an image of {_frames(image)} frames"
            )
        size = text_of(image, "Rows"), text_of(image, "Columns")
        if size != (str(self._mask.rows), str(self._mask.columns)):
            raise IntakeError(
                f"its masks are {self._mask.rows} x {self._mask.columns}, the image is "
                f"{' x '.join(map(quoted, size))}; expected the same size"
            )
        mask, below = _plane_or_none(header, frame), self._plane(place)
        if mask is None and below is not None:
            raise IntakeError(
                f"its frame {frame + 1} does not say where it lies, and the image that it refers "
                "to does; expected a readable place, for masks are not put by their name alone"
            )
        if mask is not None and below is not None and not _same_plane(mask, below):
            raise IntakeError(
                f"its frame {frame + 1} does not lie upon the image that it refers to: "
                f"{mask.distance(below):.3g} mm apart"
            )

    def _plane(self, place: Place) -> Plane | None:
        if place not in self._planes:
            image = self._images[place.instance]
            self._planes[place] = _plane_or_none(image, place.frame - 1)
        return self._planes[place]


def _check_class(header: Dataset) -> None:
    uid = text_of(header, "SOPClassUID")
    if uid not in (SEGMENTATION, LABEL_MAP):
        seen = registered_name(uid) if uid else "missing"
        raise IntakeError(f"its SOP class is {seen}; expected a segmentation")
    if text_of(header, "DimensionOrganizationType") == "TILED_FULL":
        raise IntakeError("it is a segmentation in tiles (TILED_FULL), which is not read")


def _segments(header: Dataset) -> dict[int, Segment]:
    items = items_of(header, "SegmentSequence")
    described: dict[int, Segment] = {}
    for item in items[: _MOST_SEGMENTS + 2]:
        number = _whole(item, "SegmentNumber")
        if number in described:
            raise IntakeError(f"it describes segment {number} twice")
        described[number] = Segment(
            number,
            _code(item, "SegmentedPropertyCategoryCodeSequence"),
            _code(item, "SegmentedPropertyTypeCodeSequence"),
            _names(item),
        )
    # A label map may describe its background (PS3.3 C.8.20.2).
    described.pop(_BACKGROUND, None)
    if not described or max(described) > _MOST_SEGMENTS:
        raise IntakeError(
            f"it describes {len(items)} segments, with numbers up to "
            f"{max(described, default=0)}; expected 1 to {_MOST_SEGMENTS}"
        )
    return described


def _code(item: Dataset, keyword: str) -> Code:
    codes = items_of(item, keyword)
    return Code(*code_of(codes[0] if codes else Dataset()))


def _names(item: Dataset) -> tuple[str, ...]:
    codes = items_of(item, "SegmentedPropertyTypeCodeSequence")[:1]
    parts = [
        (text_of(code, "CodingSchemeDesignator"), text_of(code, "CodeValue")) for code in codes
    ]
    return (*(":".join(part) for part in parts if all(part)), text_of(item, "SegmentLabel"))


def _descriptions(header: Dataset, geometry: Geometry) -> list[list[Dataset]]:
    """The functional groups of every frame."""
    described = len(items_of(header, "PerFrameFunctionalGroupsSequence"))
    if described != geometry.frames:
        raise IntakeError(f"it has {geometry.frames} frames and describes {described}")
    return [groups_of(header, frame) for frame in range(geometry.frames)]


def _segment_of(
    header: Dataset, groups: list[Dataset], frame: int, segments: Mapping[int, Segment]
) -> int | None:
    if _is_label_map(header):
        return None
    items = [item for group in groups for item in items_of(group, "SegmentIdentificationSequence")]
    number = _whole(items[-1] if items else Dataset(), "ReferencedSegmentNumber")
    if number not in segments:
        raise IntakeError(
            f"its frame {frame + 1} is of segment {number}, which it does not describe"
        )
    return number


def _sources(groups: list[Dataset]) -> Iterator[Place]:
    """The images that a frame was drawn upon (PS3.3 C.7.6.16.2.6); frame 0 if none is named.

    Raises:
        IntakeError: if it says itself that it lies elsewhere.
    """
    for group in groups:
        for derivation in items_of(group, "DerivationImageSequence"):
            for source in items_of(derivation, "SourceImageSequence"):
                if text_of(source, "SpatialLocationsPreserved") == "NO":
                    raise IntakeError("its masks do not lie upon the images that it refers to")
                uid = text_of(source, "ReferencedSOPInstanceUID")
                for number in text_of(source, "ReferencedFrameNumber").split("\\"):
                    yield Place(uid, int(number) if number.isdecimal() else 0)


def _check_one_label_map(header: Dataset, pieces: Mapping[Place, list[_Piece]]) -> None:
    if _is_label_map(header) and any(len(of) > 1 for of in pieces.values()):
        raise IntakeError("it has two label maps for one image; expected one")


def _is_label_map(header: Dataset) -> bool:
    return text_of(header, "SegmentationType") == "LABELMAP"


def _threshold(header: Dataset) -> float:
    """From which stored value on a pixel is of a segment (PS3.3 C.8.20.2.3)."""
    kind = text_of(header, "SegmentationType")
    if kind in ("BINARY", "LABELMAP"):
        return 1
    if kind != "FRACTIONAL":
        raise IntakeError(
            f"its SegmentationType is {quoted(kind)}; expected BINARY, FRACTIONAL or LABELMAP"
        )
    (highest,) = numbers(header, "MaximumFractionalValue", 1)
    if not 1 <= highest <= _MOST_SEGMENTS:
        raise IntakeError("its MaximumFractionalValue is not one; expected 1 to 255")
    return _HALF * highest


def _whole(item: Dataset, keyword: str) -> int:
    text = text_of(item, keyword)
    if not text.isdecimal() or len(text) > 5:
        raise IntakeError(f"its {keyword} is {quoted(text)}; expected a number")
    return int(text)


def _frames(image: Dataset) -> int:
    text = text_of(image, "NumberOfFrames")
    return int(text) if text.isdecimal() else 1


def _plane_or_none(header: Dataset, frame: int) -> Plane | None:
    """None for images without a place in a patient (a CR, a slide)."""
    try:
        return plane_of(header, frame)
    except IntakeError:
        return None


def _same_plane(mask: Plane, image: Plane | None) -> bool:
    if image is None or mask.reference != image.reference:
        return False
    return mask.shape == image.shape and mask.distance(image) <= _TOLERANCE * min(image.spacing)
