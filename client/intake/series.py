"""The objects of a source as series with their segmentations: what a mask needs to be beside.

Every object is looked at once, header alone, in the processes that read later. Images of one
series become one item with the segmentations that speak of it; all else is told with its reason.
A segmentation names its images by their UIDs, or its series, or it names none and lies in the
frame of reference of one series alone.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO, NamedTuple

from pydicom.dataset import Dataset

from client.intake.deidentify import text_of
from client.intake.dicom import NO_PICTURES, gone_wrong
from client.intake.frames import items_of
from client.intake.items import Item, Listing
from client.intake.masks import LABEL_MAP, SEGMENTATION
from client.intake.part10 import DicomFile, Directory, Limits
from client.intake.pool import Bounds, WorkerLostError
from client.intake.quiet import quiet
from client.intake.source import NotUsed
from common.errors import CohortError

_TWICE = (
    "its SOP Instance UID is that of another image of the same series, which is used: a copy, or "
    "one of the two has a wrong UID"
)


class SeriesItem(NamedTuple):
    """One series of a source as an `Item`.

    Attributes:
        place: that of its first image.
        images: in the order of their places.
        segmentations: that speak of it.
    """

    place: str
    images: tuple[Item, ...]
    segmentations: tuple[Item, ...]

    @property
    def stamp(self) -> str:
        """See `Item`."""
        return "\n".join(f"{one.place} {one.stamp}" for one in (*self.images, *self.segmentations))

    def open(self, limit: int) -> BinaryIO:
        """Its first image."""
        return self.images[0].open(limit)


@dataclass(frozen=True)
class Described:
    """What the header of one object says of where it belongs.

    Attributes:
        series: its Series Instance UID.
        instance: its own UID.
        reference: of its frame of reference.
        names: of a segmentation, the UIDs of images and series that it refers to.
        is_mask: whether it is a segmentation.
        reason: why it is neither an image nor a segmentation; empty if it is one.
        failure: as that of a `FileResult`.
    """

    series: str = ""
    instance: str = ""
    reference: str = ""
    names: frozenset[str] = frozenset()
    is_mask: bool = False
    reason: str = ""
    failure: str = ""


@dataclass(frozen=True)
class Describer:
    """Looks at one object, in any process; what is wrong with it is in the answer."""

    limits: Limits

    def __call__(self, item: Item) -> Described:
        """See `Described`."""
        try:
            with quiet(), item.open(self.limits.read_bytes) as stream:
                return _described(DicomFile.parse(stream, self.limits).header)
        except Directory:
            return Described(reason="a DICOMDIR")
        except Exception as error:  # noqa: BLE001 - as in `client.intake.dicom.result_of`
            wrong = gone_wrong(error)
            return Described(reason=wrong.reason, failure=wrong.failure)


def _described(header: Dataset) -> Described:
    kind = text_of(header, "SOPClassUID")
    is_mask = kind in (SEGMENTATION, LABEL_MAP)
    if not is_mask and kind in NO_PICTURES:
        return Described(reason=f"it is {NO_PICTURES[kind]}, no picture of a patient")
    series, instance = text_of(header, "SeriesInstanceUID"), text_of(header, "SOPInstanceUID")
    if not is_mask and "Rows" not in header:
        return Described(reason="it has no pixel data")
    if not (series and instance):
        return Described(reason="it names no series, or no instance; masks are found by these")
    names = frozenset(_named(header)) if is_mask else frozenset()
    return Described(series, instance, text_of(header, "FrameOfReferenceUID"), names, is_mask)


def _named(header: Dataset) -> Iterator[str]:
    """UIDs of images and series that a segmentation refers to (PS3.3 C.12.1, C.7.6.16.2.6)."""
    for series in items_of(header, "ReferencedSeriesSequence"):
        yield text_of(series, "SeriesInstanceUID")
        for image in items_of(series, "ReferencedInstanceSequence"):
            yield text_of(image, "ReferencedSOPInstanceUID")
    groups = (
        *items_of(header, "SharedFunctionalGroupsSequence"),
        *items_of(header, "PerFrameFunctionalGroupsSequence"),
    )
    for group in groups:
        for derivation in items_of(group, "DerivationImageSequence"):
            for source in items_of(derivation, "SourceImageSequence"):
                yield text_of(source, "ReferencedSOPInstanceUID")


def in_series(listing: Listing, limits: Limits, workers: int, bounds: Bounds, pool: Any) -> Listing:
    """A source's objects as series.

    Args:
        listing: its objects, one by one.
        limits: what a file may ask for.
        workers: processes that look.
        bounds: of each.
        pool: makes what looks, as `client.intake.take.take_in` has it.

    Raises:
        CohortError: for what is no object's own fault.
    """
    described: list[tuple[Item, Described]] = []
    unusable = list(listing.unusable)
    with pool(Describer(limits), workers, bounds) as looking:
        for item, answer in zip(listing.items, looking.map(listing.items), strict=True):
            if isinstance(answer, WorkerLostError):
                unusable.append(NotUsed(item.place, str(answer)))
            elif answer.failure:
                raise CohortError(f"{item.place}: {answer.failure}")
            elif answer.reason:
                unusable.append(NotUsed(item.place, answer.reason))
            else:
                described.append((item, answer))
    series, wrong = _grouped(described)
    return Listing(tuple(series), (*unusable, *wrong))


def _grouped(
    described: list[tuple[Item, Described]],
) -> tuple[list[SeriesItem], list[NotUsed]]:
    described = sorted(described, key=lambda pair: pair[0].place)
    images: dict[str, list[Item]] = defaultdict(list)
    seen: set[tuple[str, str]] = set()
    wrong = []
    series_of: dict[str, set[str]] = defaultdict(set)
    frames_of: dict[str, set[str]] = defaultdict(set)
    for item, said in described:
        if not said.is_mask and (said.series, said.instance) in seen:
            wrong.append(NotUsed(item.place, _TWICE))
        elif not said.is_mask:
            seen.add((said.series, said.instance))
            images[said.series].append(item)
            for name in (said.instance, said.series):
                series_of[name].add(said.series)
            frames_of[said.reference or said.series].add(said.series)
    masks: dict[str, list[Item]] = defaultdict(list)
    for item, said in described:
        if said.is_mask:
            meant = {series for name in said.names for series in series_of.get(name, ())}
            found = meant or frames_of.get(said.reference, set())
            if len(found) == 1:
                masks[next(iter(found))].append(item)
            else:
                wrong.append(NotUsed(item.place, _several(len(found))))
    made = [
        SeriesItem(min(one.place for one in of), _ordered(of), _ordered(masks[series]))
        for series, of in images.items()
    ]
    return made, wrong


def _ordered(items: list[Item]) -> tuple[Item, ...]:
    return tuple(sorted(items, key=lambda item: item.place))


def _several(series: int) -> str:
    if series:
        return f"it is a segmentation of images of {series} series; expected one"
    return (
        "it is a segmentation of images that are not in the source; expected the images beside it"
    )
