"""The objects of a source as series with their segmentations: what a mask needs to be beside.

Every object is looked at once, header alone, in the processes that read later. Images of one
series become one item with the segmentations that speak of it; all else is told with its reason.
A segmentation names its images by their UIDs, or its series, or it names none and lies in the
frame of reference of one series alone. One that names a series and cannot be used costs the series:
without it, what it marks would pass for background. One that names what is not there may be of
images whose UIDs were changed since: it puts those of its frame of reference in doubt, or all.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, BinaryIO, NamedTuple

from pydicom.dataset import Dataset

from client.intake.deid.seam import patient_of
from client.intake.deidentify import text_of
from client.intake.dicom import NO_PICTURES, digest_of, gone_wrong
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
_SAME = "it is a copy of another segmentation, byte for byte, which is used"
_OTHER = (
    "two segmentations of it have one SOP Instance UID and differ; leave the right one beside it"
)
_DROPPED = (
    "a segmentation that names it cannot be used, and what it marks would be taken for background; "
    "it is listed with its reason: mend it, or take it out of the source"
)
_DIRECTORY = "a DICOMDIR"
DOUBTFUL = ("--without-mask empty is refused", "--without-class empty is refused")
TAKEN_EMPTY = "masks: taken as empty"
"""What an account calls the images, and the classes, of which no segmentation spoke."""


class SeriesItem(NamedTuple):
    """One series of a source as an `Item`.

    Attributes:
        place: that of its first image.
        images: in the order of their places.
        segmentations: that speak of it.
        uid: its Series Instance UID, unverified.
        fault: why it cannot be used, whatever its own objects are; empty if it can.
        doubts: objects of the source that may be segmentations of it, for all that is known: what
            could not be read, and what could not be put to all that it names, where it lies in
            this series' frame of reference, or in that of none.
    """

    place: str
    images: tuple[Item, ...]
    segmentations: tuple[Item, ...]
    uid: str = ""
    fault: str = ""
    doubts: int = 0

    @property
    def stamp(self) -> str:
        """See `Item`."""
        files = (f"{one.place} {one.stamp}" for one in (*self.images, *self.segmentations))
        return "\n".join((self.fault, *files))

    def open(self, limit: int) -> BinaryIO:
        """Its first image."""
        return self.images[0].open(limit)


class RefusedItem(NamedTuple):
    """An object that is no part of a series, as an `Item` that is entered and not read.

    Attributes:
        place: its own.
        of: the object.
        reason: why it is none.
        names_patient: whether it is DICOM with a patient identifier.
        images: none.
    """

    place: str
    of: Item
    reason: str
    names_patient: bool = False
    images: tuple[Item, ...] = ()

    @property
    def stamp(self) -> str:
        """See `Item`."""
        return f"{self.reason}\n{self.of.stamp}"

    def open(self, limit: int) -> BinaryIO:
        """See `Item`."""
        return self.of.open(limit)


@dataclass(frozen=True)
class Described:
    """What the header of one object says of where it belongs.

    Attributes:
        series: its Series Instance UID.
        instance: its own UID.
        reference: of its frame of reference.
        names: of a segmentation, the UIDs that it refers to: of each series with its images, and
            of images that it lists under none.
        is_mask: whether it is a segmentation.
        content: SHA-256 of a segmentation.
        names_patient: whether it is DICOM with a patient identifier.
        reason: why it is neither an image nor a segmentation; empty if it is one.
        doubtful: whether it may be a segmentation of any series for all that is known.
        failure: as that of a `FileResult`.
    """

    series: str = ""
    instance: str = ""
    reference: str = ""
    names: tuple[frozenset[str], ...] = ()
    is_mask: bool = False
    content: str = ""
    names_patient: bool = False
    reason: str = ""
    doubtful: bool = False
    failure: str = ""


@dataclass(frozen=True)
class Describer:
    """Looks at one object, in any process; what is wrong with it is in the answer."""

    limits: Limits

    def __call__(self, item: Item) -> Described:
        """See `Described`."""
        try:
            with quiet(), item.open(self.limits.read_bytes) as stream:
                found = _described(DicomFile.parse(stream, self.limits).header)
                stream.seek(0)
                return replace(found, content=digest_of(stream)) if found.is_mask else found
        except Directory:
            return Described(reason=_DIRECTORY)
        except Exception as error:  # noqa: BLE001 - as in `client.intake.dicom.result_of`
            wrong = gone_wrong(error)
            return Described(reason=wrong.reason, doubtful=True, failure=wrong.failure)


def _described(header: Dataset) -> Described:
    kind, named = text_of(header, "SOPClassUID"), bool(patient_of(header)[1])
    is_mask = kind in (SEGMENTATION, LABEL_MAP)
    if not is_mask and kind in NO_PICTURES:
        why = f"it is {NO_PICTURES[kind]}, no picture of a patient"
        return Described(reason=why, names_patient=named)
    if not is_mask and "Rows" not in header:
        return Described(reason="it has no pixel data", names_patient=named)
    series, instance = text_of(header, "SeriesInstanceUID"), text_of(header, "SOPInstanceUID")
    known = "" if series and instance else "it names no series, or no instance"
    return Described(
        series,
        instance,
        text_of(header, "FrameOfReferenceUID"),
        _named(header) if is_mask else (),
        is_mask,
        names_patient=named,
        reason=known and f"{known}; masks are found by these",
    )


def _named(header: Dataset) -> tuple[frozenset[str], ...]:
    """See `Described.names` (PS3.3 C.12.1)."""
    listed = [
        frozenset(
            text_of(image, "ReferencedSOPInstanceUID")
            for image in items_of(series, "ReferencedInstanceSequence")
        )
        | {text_of(series, "SeriesInstanceUID")}
        for series in items_of(header, "ReferencedSeriesSequence")
    ]
    others = frozenset(_drawn_upon(header)).difference(*listed)
    return tuple(filter(None, (names - {""} for names in (*listed, others))))


def _drawn_upon(header: Dataset) -> Iterator[str]:
    """UIDs of the images that its frames were drawn upon (PS3.3 C.7.6.16.2.6)."""
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
    groups = _Groups(doubts=len(listing.unusable))
    unusable = list(listing.unusable)
    with pool(Describer(limits), workers, bounds) as looking:
        answers = zip(listing.items, looking.map(listing.items), strict=True)
        for item, answer in sorted(answers, key=lambda pair: pair[0].place):
            if isinstance(answer, WorkerLostError):
                groups.refuse(item, Described(reason=str(answer), doubtful=True))
            elif answer.failure:
                raise CohortError(f"{item.place}: {answer.failure}")
            elif answer.reason == _DIRECTORY:
                unusable.append(NotUsed(item.place, _DIRECTORY))
            else:
                groups.enter(item, answer)
    return Listing((*groups.series(), *groups.refused), tuple(unusable))


@dataclass
class _Groups:
    """Objects on their way into series; they are entered in the order of their places."""

    doubts: int
    refused: list[RefusedItem] = field(default_factory=list)
    _doubts_of: Counter[str] = field(default_factory=Counter)
    _images: dict[str, list[Item]] = field(default_factory=lambda: defaultdict(list))
    _masks: list[tuple[Item, Described]] = field(default_factory=list)
    _seen: set[tuple[str, str]] = field(default_factory=set)
    _series_of: dict[str, set[str]] = field(default_factory=lambda: defaultdict(set))
    _frames_of: dict[str, set[str]] = field(default_factory=lambda: defaultdict(set))

    def refuse(self, item: Item, said: Described, reason: str = "") -> None:
        """Enter what is no part of a series."""
        self.doubts += said.doubtful
        self.refused.append(
            RefusedItem(item.place, item, reason or said.reason, said.names_patient)
        )

    def enter(self, item: Item, said: Described) -> None:
        """Enter an image or a segmentation, or what is neither."""
        if said.is_mask:
            self._masks.append((item, said))
        elif said.reason:
            self.refuse(item, said)
        elif (said.series, said.instance) in self._seen:
            self.refuse(item, said, _TWICE)
        else:
            self._seen.add((said.series, said.instance))
            self._images[said.series].append(item)
            for name in (said.instance, said.series):
                self._series_of[name].add(said.series)
            self._frames_of[said.reference or said.series].add(said.series)

    def series(self) -> list[SeriesItem]:
        """All series of what was entered, when nothing comes any more."""
        masks: dict[str, list[Item]] = defaultdict(list)
        faults: dict[str, str] = {}
        first: dict[str, tuple[str, set[str]]] = {}
        for item, said in self._masks:
            found = self._meant(said)
            content, others = first.setdefault(said.instance or item.place, ("", found))
            if content == said.content:
                self.refuse(item, said, _SAME)
                continue
            if content:
                faults |= dict.fromkeys(found | others, _OTHER)
            first[said.instance or item.place] = said.content, found | others
            placed = len(found) == 1 and not said.reason
            if not all(map(self._named, said.names)) or not (said.names or placed):
                self._doubt(said)
            if placed:
                masks[next(iter(found))].append(item)
                continue
            self.refuse(item, said, self._why(said, found))
            if said.names:
                faults |= {uid: faults.get(uid, _DROPPED) for uid in found}
        return [
            SeriesItem(
                of[0].place,
                tuple(of),
                tuple(masks[uid]),
                uid,
                faults.get(uid, ""),
                self.doubts + self._doubts_of[uid],
            )
            for uid, of in self._images.items()
        ]

    def _meant(self, said: Described) -> set[str]:
        """The series that a segmentation speaks of; if it names none, those of its frame."""
        if not said.names:
            return self._frames_of.get(said.reference, set())
        return {uid for names in said.names for uid in self._named(names)}

    def _named(self, names: frozenset[str]) -> set[str]:
        return {uid for name in names for uid in self._series_of.get(name, ())}

    def _doubt(self, said: Described) -> None:
        """Images that were given new UIDs still lie where a segmentation of them lies.

        Those that were given another frame of reference too may be any, unless it names others:
        it is used upon these then, or costs them.
        """
        named = self._meant(said) if said.names else set()
        beside = self._frames_of.get(said.reference, set()) - named
        self._doubts_of.update(beside)
        self.doubts += not beside and not named

    @staticmethod
    def _why(said: Described, found: set[str]) -> str:
        if said.reason:
            return said.reason
        if found:
            return f"it is a segmentation of images of {len(found)} series; expected one"
        return (
            "it is a segmentation of images that are not in the source; expected the images beside "
            "it, under the UIDs that it names"
        )
