"""One series of DICOM with its segmentations into slices with masks, or into one volume with one.

A series is used whole or not at all: a mask that does not fit, a slice without one, a segment of
no class, images of several patients, or slices that are no regular grid cost the series, with the
reason. Every image passes the engine of de-identification as any other does; of a segmentation
nothing is kept but numbers of classes.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import numpy as np
from pydicom.dataset import Dataset

from client.intake.builder import ImageRecord
from client.intake.decision import Decision, Shot
from client.intake.deid.seam import CleanFrame, found_text, patient_of
from client.intake.deid.walk import Account
from client.intake.deidentify import text_of
from client.intake.dicom import (
    MOST_SHOTS,
    FileReader,
    FileResult,
    digest_of,
    frames_of,
    gone_wrong,
    spread,
)
from client.intake.dicom import Task as DicomTask
from client.intake.display import brightness
from client.intake.grids import brightness_to_grid, laid_volume, to_grid
from client.intake.items import Item
from client.intake.labels import LabelEntry
from client.intake.masks import Labels, Masks, Overlap, Place, absent_of, read_masks
from client.intake.part10 import DicomFile, FrameDecoder, Geometry
from client.intake.pixels import Floats, mask_to_shape, to_shape
from client.intake.quiet import quiet
from client.intake.scans import ScanFrame, brightness_of, frame_of_scan
from client.intake.segments import classes_of
from client.intake.series import DOUBTFUL, TAKEN_EMPTY, RefusedItem, SeriesItem
from client.intake.shots import shot
from client.intake.source import Kept
from client.intake.volumes import volume_of
from common.cohort import PIXEL
from common.errors import IntakeError, ReviewError
from common.spec import MOST_VOXELS, RunSpec

Unmarked = Literal["refuse", "empty"]
_NO_LABEL = LabelEntry(0, "", 0)
_MOST_REASONS = 8
_EMPTY = "--without-mask empty would take what has none as if nothing were on it"


@dataclass(frozen=True)
class Marking:
    """What a person says of masks.

    Attributes:
        unmarked: images that no segmentation speaks of: ``refuse`` their series, or take them as
            ``empty``, which says that nothing is on them.
        overlap: what becomes of a pixel that is of two classes: ``refuse`` the series, or take
            the ``highest`` class number.
        undescribed: a class that no segment of the series' segmentations is of: ``refuse`` the
            series, or take the class as ``empty``, which says that nothing of it is there.
    """

    unmarked: Unmarked = "refuse"
    overlap: Overlap = "refuse"
    undescribed: Unmarked = "refuse"

    @property
    def settled(self) -> str:
        """What an intake holds to, from its first start on."""
        more = "" if self.undescribed == "refuse" else f" without class {self.undescribed}"
        return f"{self.unmarked} {self.overlap}{more}"


class _Part(NamedTuple):
    """A frame of a volume and its mask."""

    of: ScanFrame
    labels: Labels
    record: ImageRecord


@dataclass(frozen=True)
class SeriesReader:
    """Reads one series at a time into what a cohort keeps of it; works in any process.

    Args:
        files: reads a single image; its label table is one of segments.
        spec: the run, of masks.
        marking: what a person says of masks.
    """

    files: FileReader
    spec: RunSpec
    marking: Marking = Marking()

    def __call__(self, task: DicomTask) -> FileResult:
        """Read a series; all that is wrong with it is in the result."""
        item, known = task.item, FileResult()
        if isinstance(item, RefusedItem):
            return FileResult(reason=item.reason, names_patient=item.names_patient)
        try:
            if not isinstance(item, SeriesItem):
                raise IntakeError("it is a single object; expected a series")
            with quiet():
                known, fault = self._known(item)
                if fault or item.fault:
                    return replace(known, reason=fault or item.fault)
                if not known.names_patient and not task.without_patient:
                    return replace(known, put_aside=True)
                with _Series(self, item, task.decision) as series:
                    return series.read(known)
        except Exception as error:  # noqa: BLE001 - as in `client.intake.dicom.result_of`
            wrong = gone_wrong(error)
            return replace(wrong, content=known.content, names_patient=known.names_patient)

    def _known(self, item: SeriesItem) -> tuple[FileResult, str]:
        """The digest of all its objects and whether one names a patient, and what is wrong."""
        digest = hashlib.sha256()
        patients: list[tuple[str, str]] = []
        wrong = ""
        for one in (*item.images, *item.segmentations):
            try:
                with one.open(self.files.limits.read_bytes) as stream:
                    digest.update(bytes.fromhex(digest_of(stream)))
                    patients.append(patient_of(DicomFile.parse(stream, self.files.limits).header))
            except Exception as error:
                gone = gone_wrong(error)
                if gone.failure:
                    raise
                wrong = wrong or gone.reason
        if not wrong and not _one_patient(patients, len(item.images)):
            people = len(set(patients))
            wrong = f"its images and segmentations are of {people} patients; expected one"
        named = any(patient for _, patient in patients)
        return FileResult(names_patient=named, content=digest.hexdigest()), wrong


def _one_patient(patients: Sequence[tuple[str, str]], images: int) -> bool:
    """Whether a series, its images first, is of one patient.

    Within a series, and nowhere else, an issuer that is left out is no other issuer: tools that
    write segmentations drop it.
    """
    issuers = {issuer for issuer, _ in patients} - {""}
    identifiers = {patient for _, patient in patients}
    return len(set(patients[:images])) == 1 and len(issuers) <= 1 and len(identifiers) == 1


class _Series(ExitStack):
    """A series that is being read, and what is open for it."""

    def __init__(self, reader: SeriesReader, item: SeriesItem, decision: Decision | None) -> None:
        super().__init__()
        self._reader, self._item, self._decision = reader, item, decision
        self._files, self._spec = reader.files, reader.spec
        self._account = Account()
        self._shots: list[Shot] = []
        self._others: list[Shot] = []
        self._left = 0
        self._flagged: dict[int, str] = {}
        self._segmentations: list[Dataset] = []
        self._kept: list[Kept] = []
        self._parts: list[_Part] = []

    def read(self, known: FileResult) -> FileResult:
        """What is kept of it, or what a person is to look at."""
        headers = self._headers()
        masks = self._masks(headers)
        self._check_marked(headers, masks)
        for number, image in enumerate(self._item.images):
            try:
                with ExitStack() as opened:
                    self._take(opened, image, masks)
            except ReviewError as error:
                self._flagged[number] = str(error)
        if reasons := self._reasons():
            return replace(known, reason=reasons, reviewable=True, shots=self._seen())
        images = tuple(self._kept) if self._spec.input.depth is None else (self._volume(),)
        if not any(kept.mask is not None and kept.mask.any() for kept in images):
            self._refuse_empty()
        if known.names_patient and self._files.registry is not None:
            self._files.registry.add(images[0].record.patient, *patient_of(headers[0]))
        shots = (*self._shots, *self._others)[:MOST_SHOTS]
        return replace(known, images=images, account=self._account, shots=shots)

    def _headers(self) -> list[Dataset]:
        """Those of its images.

        Raises:
            IntakeError: if together they are more than is held of a series.
        """
        files = [self._opened(image) for image in self._item.images]
        settings, limits = self._spec.input, self._files.limits
        sizes = [file.geometry(limits) for file in files]
        if settings.depth is not None:
            have, room = sum(at.rows * at.columns * at.frames for at in sizes), MOST_VOXELS
        else:
            each = math.prod(settings.shape) * PIXEL.itemsize
            have = each * sum(len(frames_of(at, settings, limits)) for at in sizes)
            room = limits.stored_bytes
        if have > room:
            what = "bytes in the cohort" if settings.depth is None else "voxels"
            raise IntakeError(f"its images are {have} {what} together; at most {room} are held")
        return [file.header for file in files]

    def _reasons(self) -> str:
        """All for which a person has to look, each once; one release lets all of it through."""
        found = list(dict.fromkeys(self._flagged.values()))
        if self._left > MOST_SHOTS:
            found.append(
                f"what looks like text is in {self._left} of its frames and {MOST_SHOTS} are "
                "shown, so it cannot be left: release it with what was found blanked, or reject it"
            )
        more = len(found) - _MOST_REASONS
        return "; ".join(
            [*found[:_MOST_REASONS], *([f"and {more} more reasons"] if more > 0 else [])]
        )

    # --- Masks --------------------------------------------------------------------------------

    def _masks(self, headers: Sequence[Dataset]) -> list[Masks]:
        """Those of each segmentation as classes; their streams stay open with this."""
        found: list[Masks] = []
        said: set[int] = set()
        for one in self._item.segmentations:
            stream = self.enter_context(one.open(self._files.limits.read_bytes))
            file = DicomFile.parse(stream, self._files.limits)
            self._check_whole(file.header, headers)
            self._segmentations.append(file.header)
            overlap = self._reader.marking.overlap
            masks = read_masks(file, headers, overlap=overlap, limits=self._files.limits)
            numbers = classes_of(masks.segments, self._files.labels)
            classes = set(numbers.values()) - {0}
            if twice := sorted(said & classes):
                name = self._spec.task.classes[twice[0]]
                raise IntakeError(
                    f"two segmentations of it have the class {name!r}; leave the right one beside "
                    "it"
                )
            said |= classes
            found.append(masks.numbered(numbers))
        if found:
            self._check_classes(said)
        return found

    def _check_classes(self, said: set[int]) -> None:
        """Every class has a segment, unless a person said what it means if it has none."""
        named = enumerate(self._spec.task.classes)
        missing = [name for number, name in named if number and number not in said]
        if not missing:
            return
        nobody = f"no segmentation of it has a segment of the class {missing[0]!r}"
        if self._reader.marking.undescribed == "refuse":
            raise IntakeError(
                f"{nobody}, so nobody said that nothing of it is there; --without-class empty "
                "would take it so"
            )
        self._check_doubts(DOUBTFUL[1], nobody)
        self._account.counts[TAKEN_EMPTY, "SegmentSequence"] += len(missing)

    def _check_doubts(self, refused: str, nobody: str) -> None:
        """What nobody marked is empty only if no object of the source may have marked it."""
        if doubts := self._item.doubts:
            raise IntakeError(
                f"{refused}: {nobody}, and {doubts} objects of the source may be one that does: "
                "they could not be read or placed, and are listed with their reasons; mend them, "
                "or take them out of the source"
            )

    def _check_whole(self, segmentation: Dataset, headers: Sequence[Dataset]) -> None:
        """A volume has all images that it was drawn upon: one that lost its end looks whole."""
        absent = absent_of(segmentation, self._item.uid, headers)
        if absent and self._spec.input.depth is not None:
            raise IntakeError(
                f"{absent} images of the series that its segmentation names are not in the source, "
                "or cannot be read; a volume is used whole"
            )

    def _check_marked(self, headers: Sequence[Dataset], masks: Sequence[Masks]) -> None:
        """Every image has a word of a segmentation, unless a person said what it means if not."""
        empty = self._reader.marking.unmarked == "empty"
        if not masks and not empty:
            raise IntakeError(f"no segmentation speaks of it; {_EMPTY}")
        marked = {place.instance for one in masks for place in one.places}
        missing = sum(text_of(header, "SOPInstanceUID") not in marked for header in headers)
        if not missing:
            return
        nobody = f"no segmentation speaks of {missing} of its {len(headers)} images"
        if not empty:
            raise IntakeError(f"{nobody}; {_EMPTY}")
        self._check_doubts(DOUBTFUL[0], nobody)
        self._account.counts[TAKEN_EMPTY, "SOPInstanceUID"] += missing

    def _labels(self, place: Place, masks: Sequence[Masks], shape: tuple[int, ...]) -> Labels:
        """The classes of one frame's pixels."""
        labels: Labels = np.zeros(shape, dtype=np.uint8)
        for one in masks:
            if place not in one.places:
                continue
            more = one.labels(place)
            both = (labels > 0) & (more > 0)
            if both.any() and self._reader.marking.overlap == "refuse":
                raise IntakeError("two segmentations of it overlap; one pixel has one class")
            labels = np.maximum(labels, more)
        return labels

    def _refuse_empty(self) -> None:
        if self._reader.marking.unmarked == "refuse":
            raise IntakeError(f"its masks are empty: no pixel is of any class; {_EMPTY}")

    # --- Images -------------------------------------------------------------------------------

    def _opened(self, image: Item, within: ExitStack | None = None) -> DicomFile:
        """A parsed object, open as long as `within` is, or else its header alone."""
        with ExitStack() as here:
            stream = (within or here).enter_context(image.open(self._files.limits.read_bytes))
            return DicomFile.parse(stream, self._files.limits)

    def _take(self, opened: ExitStack, image: Item, masks: Sequence[Masks]) -> None:
        """De-identify the frames of one object and keep them with their masks.

        Raises:
            ReviewError: if a person has to look at it first.
        """
        file = self._opened(image, opened)
        element, geometry = file.pixel_element(), file.geometry(self._files.limits)
        clean = self._files.deidentify(file.header, self._decision)
        clean.check(self._segmentations)
        decode = FrameDecoder(file, element, geometry)
        settings, instance = self._spec.input, text_of(file.header, "SOPInstanceUID")
        volume = settings.depth is not None
        for number in self._frames(geometry):
            stored = decode(number)
            shown = brightness(stored, clean.header, number, settings.window)
            frame = clean.frame(number, shown)
            self._tell(frame, number, shown)
            labels = self._labels(Place(instance, number + 1), masks, stored.shape[:2])
            record = self._files.record(frame, _NO_LABEL, stored.shape)
            if volume:
                of = frame_of_scan(clean.header, number, stored, frame, settings.window)
                self._parts.append(_Part(of, labels, record))
            else:
                mask = mask_to_shape(labels.astype(np.int32), settings)
                self._kept.append(Kept(record, to_shape(frame.pixels, settings), mask))
        self._account.counts.update(clean.account.counts)

    def _tell(self, frame: CleanFrame, number: int, shown: Floats) -> None:
        counts = self._account.counts
        counts["pixels: box blanked", "PixelData"] += len(frame.boxes)
        counts["pixels: outside of regions blanked", "PixelData"] += frame.outside
        said = self._decision
        found = len(frame.boxes) > len(said.blank if said else ())
        if said and not said.found:
            found = bool(found_text(shown))
            self._left += found
        seen = self._shots if found else self._others
        if (frame.boxes or frame.outside) and len(seen) < MOST_SHOTS:
            seen.append(shot(number, shown, frame.pixels, frame.boxes))

    def _seen(self) -> tuple[Shot, ...]:
        """Pictures of what waits; what cannot be shown has none.

        All frames with what looks like text, while there is room, for a person may say that it
        is to be left; then images that wait, evenly spread.
        """
        flagged = list(self._flagged)
        chosen = {flagged[which] for which in spread(len(flagged))}
        boxed: list[Shot] = []
        others: list[Shot] = []
        for which, image in enumerate(self._item.images):
            with suppress(Exception), ExitStack() as opened:
                for one in self._shown(self._opened(image, opened)):
                    if one.boxes and len(boxed) < MOST_SHOTS:
                        boxed.append(one)
                    elif which in chosen and one.frame == 0:
                        others.append(one)
        return (*boxed, *others)[:MOST_SHOTS]

    def _shown(self, file: DicomFile) -> Iterator[Shot]:
        """A picture of every frame that would be kept of an image."""
        element, geometry = file.pixel_element(), file.geometry(self._files.limits)
        clean = self._files.deidentify(file.header, self._decision)
        decode, settings = FrameDecoder(file, element, geometry), self._spec.input
        for number in self._frames(geometry):
            pixels = brightness(decode(number), clean.header, number, settings.window)
            yield shot(number, pixels, None, found_text(pixels))

    def _frames(self, geometry: Geometry) -> range:
        """Which frames of an image are kept."""
        if self._spec.input.depth is not None:
            return range(geometry.frames)
        return frames_of(geometry, self._spec.input, self._files.limits)

    # --- A volume -----------------------------------------------------------------------------

    def _volume(self) -> Kept:
        """All its frames as one volume with its mask, on the run's grid."""
        settings, parts = self._spec.input, self._parts
        volume = volume_of([part.of.slice for part in parts])
        marks = volume.labelled([part.labels for part in parts])
        direction = settings.direction or "axial"
        grid = to_grid(laid_volume(marks, direction), settings, "nearest").astype(np.uint16)
        if marks.values.any() and not grid.any():
            raise IntakeError("its mask is empty on the run's grid: all of it was cut off")
        first = parts[volume.order[0]].record
        bright = brightness_of(volume, [part.of for part in parts], settings.window)
        stored = brightness_to_grid(laid_volume(bright, direction), settings)
        return Kept(first, stored, grid)
