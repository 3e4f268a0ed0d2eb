"""One object of DICOM into what a cohort keeps of it; whatever is wrong with it is a result."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import BinaryIO

from pydicom.dataset import Dataset

from client.intake.builder import ImageRecord
from client.intake.decision import Decision, Shot
from client.intake.deid.seam import (
    CleanFile,
    CleanFrame,
    Deidentifier,
    found_text,
    patient_of,
)
from client.intake.deid.walk import Account
from client.intake.deidentify import counted, text_of
from client.intake.display import brightness
from client.intake.items import Item
from client.intake.labels import LabelEntry, LabelTable, modality_of
from client.intake.part10 import DicomFile, Directory, FrameDecoder, Geometry, Limits
from client.intake.pixels import to_shape
from client.intake.quiet import quiet
from client.intake.registry import Registry
from client.intake.shots import shot
from client.intake.source import Kept
from common.cohort import PIXEL
from common.errors import CohortError, ConfigError, IntakeError, ReviewError
from common.files import disk_refuses
from common.spec import Input

NO_LABEL = "no label"
MOST_SHOTS = 16
"""Pictures of one file for review; of more frames, they are spread evenly."""

_PIECE = 2**20

# Pixel data that shows no patient: what someone or something drew or computed upon an image.
NO_PICTURES = {
    "1.2.840.10008.5.1.4.1.1.30": "a parametric map",
    "1.2.840.10008.5.1.4.1.1.66.4": "a segmentation",
    "1.2.840.10008.5.1.4.1.1.66.7": "a label map segmentation",
    "1.2.840.10008.5.1.4.1.1.481.2": "a radiotherapy dose",
}


@dataclass(frozen=True)
class Written:
    """A de-identified file that waits for its name: where it is, and whose it is in pseudonyms."""

    path: Path
    record: ImageRecord
    sha256: str


@dataclass(frozen=True)
class FileResult:
    """What became of one object.

    Attributes:
        images: what is kept.
        reason: why nothing is; empty if something is, or if the file is a DICOMDIR.
        reviewable: a person may let it through.
        names_patient: whether it is DICOM with a patient identifier.
        put_aside: it names no patient, and was not decoded for that.
        label: the value of its key in the label table, an identifier; empty if none spoke of it.
        content: SHA-256 of its bytes; empty if they could not be read.
        written: the file that was written of it, for an export.
        account: what was done to its header.
        shots: for a person's eyes.
        failure: why it could not be read or written, if that is no fault of its own: a full disk.
    """

    images: tuple[Kept, ...] = ()
    reason: str = ""
    reviewable: bool = False
    names_patient: bool = False
    put_aside: bool = False
    label: str = field(default="", repr=False)
    content: str = ""
    written: Written | None = None
    account: Account = field(default_factory=Account)
    shots: tuple[Shot, ...] = ()
    failure: str = ""

    @property
    def made(self) -> tuple[Kept | Written, ...]:
        """All that was made of it."""
        return self.images if self.written is None else (self.written,)


@dataclass(frozen=True)
class Task:
    """What a worker is asked: one object, what a person said of it, and whether it needs a patient.

    Attributes:
        without_patient: the source names no patients at all, so an object that names none is
            read like any other and not put aside.
    """

    item: Item
    decision: Decision | None = None
    without_patient: bool = False


def result_of(task: Task, limits: Limits, read: Callable[[DicomFile], FileResult]) -> FileResult:
    """Open and parse an object, and read it; all that goes wrong is in the result.

    Args:
        task: what to read; whether its decision was on these bytes is for the desk to say.
        limits: what a file may ask for.
        read: what is made of it.
    """
    content = ""
    try:
        with quiet(), task.item.open(limits.read_bytes) as stream:
            content = digest_of(stream)
            return replace(read(DicomFile.parse(stream, limits)), content=content)
    except Directory:
        return FileResult(content=content)
    except Exception as error:  # noqa: BLE001
        # Parsers and codecs raise whatever the bytes of a broken file drive them to.
        return replace(gone_wrong(error), content=content)


def gone_wrong(error: Exception) -> FileResult:
    """What an error says of an object, or of the machine."""
    if isinstance(error, CohortError | ConfigError):
        return FileResult(failure=str(error))
    if full := disk_refuses(error):
        return FileResult(failure=full)
    if isinstance(error, IntakeError):
        return FileResult(reason=str(error), reviewable=isinstance(error, ReviewError))
    if isinstance(error, MemoryError):
        return FileResult(reason="it needs more memory than a worker may take")
    return FileResult(reason=f"cannot be read ({_brief(error)})")


@dataclass(frozen=True)
class FileReader:
    """Reads one object at a time into what a cohort keeps of it; works in any process.

    Args:
        settings: the run's `Input`.
        labels: whose key tells which identifier finds a file's label.
        deidentify: through which every image passes.
        split: put on every image; if empty, the label table's split is.
        limits: what a file may ask for.
        registry: is told who a pseudonym stands for; None where no table is kept.
    """

    settings: Input
    labels: LabelTable
    deidentify: Deidentifier
    split: str = ""
    limits: Limits = field(default_factory=Limits)
    registry: Registry | None = None

    def __call__(self, task: Task) -> FileResult:
        """Read an object; all that is wrong with it is in the result."""
        found = FileResult()

        def read(file: DicomFile) -> FileResult:
            nonlocal found
            found = replace(found, names_patient=bool(text_of(file.header, "PatientID")))
            if kind := NO_PICTURES.get(text_of(file.header, "SOPClassUID")):
                raise IntakeError(f"it is {kind}, no picture of a patient")
            element = file.pixel_element()
            entry = self._label(file.header)
            found = replace(found, label=text_of(file.header, self.labels.key))
            if not found.names_patient and not task.without_patient:
                return replace(found, put_aside=True)
            clean = self.deidentify(file.header, task.decision)
            geometry = file.geometry(self.limits)
            frames = frames_of(geometry, self.settings, self.limits)
            decode = FrameDecoder(file, element, geometry)
            kept = self._judged(clean, entry, frames, decode, found)
            if kept.images and found.names_patient and self.registry is not None:
                self.registry.add(kept.images[0].record.patient, *patient_of(file.header))
            return kept

        result = result_of(task, self.limits, read)
        return replace(result, names_patient=found.names_patient, label=found.label)

    def _judged(
        self,
        clean: CleanFile,
        entry: LabelEntry,
        frames: range,
        decode: FrameDecoder,
        found: FileResult,
    ) -> FileResult:
        """What is kept, or what a person is to look at."""
        try:
            clean.check()
            return self._kept(clean, entry, frames, decode, found)
        except ReviewError as error:
            shots = tuple(self.seen(clean, frames, decode))
            return replace(found, reason=str(error), reviewable=True, shots=shots)

    def _kept(
        self,
        clean: CleanFile,
        entry: LabelEntry,
        frames: range,
        decode: FrameDecoder,
        found: FileResult,
    ) -> FileResult:
        images: list[Kept] = []
        shots: list[Shot] = []
        counts = clean.account.counts
        modality = modality_of(entry, text_of(clean.header, "Modality"), self.settings)
        for number in frames:
            stored = decode(number)
            shown = brightness(stored, clean.header, number, self.settings.window)
            frame = clean.frame(number, shown)
            counts["pixels: box blanked", "PixelData"] += len(frame.boxes)
            counts["pixels: outside of regions blanked", "PixelData"] += frame.outside
            if (frame.boxes or frame.outside) and len(shots) < MOST_SHOTS:
                shots.append(shot(number, shown, frame.pixels, frame.boxes))
            record = replace(self.record(frame, entry, stored.shape), modality=modality)
            images.append(Kept(record, to_shape(frame.pixels, self.settings)))
        return replace(found, images=tuple(images), account=clean.account, shots=tuple(shots))

    def record(self, frame: CleanFrame, entry: LabelEntry, size: tuple[int, ...]) -> ImageRecord:
        """What is kept of a frame beside its pixels."""
        return ImageRecord(
            patient=frame.patient or frame.instance,
            study=frame.study,
            series=frame.series,
            instance=frame.instance,
            label=entry.label,
            height=size[0],
            width=size[1],
            split=self.split or entry.split,
        )

    def seen(self, clean: CleanFile, frames: range, decode: FrameDecoder) -> Iterator[Shot]:
        """Pictures of a file that waits for a person; one that cannot be shown has none."""
        for number in spread(len(frames)):
            with suppress(Exception):
                frame = frames[number]
                pixels = brightness(decode(frame), clean.header, frame, self.settings.window)
                yield shot(frame, pixels, None, found_text(pixels))

    def _label(self, header: Dataset) -> LabelEntry:
        key = text_of(header, self.labels.key)
        if not key:
            raise IntakeError(f"{NO_LABEL}: its {self.labels.key} is empty")
        if key not in self.labels.entries:
            raise IntakeError(f"{NO_LABEL}: its {self.labels.key} is not in the label table")
        return self.labels.entries[key]


def frames_of(geometry: Geometry, settings: Input, limits: Limits) -> range:
    """Which frames of an object the spec's rule takes.

    Raises:
        IntakeError: if it takes none of such an object, or they are too many.
    """
    count, rule = geometry.frames, settings.frames
    if count > 1 and rule == "refuse":
        raise IntakeError(
            f"it has {counted(count)} frames and input.frames = 'refuse'; 'first', 'middle' or "
            "'all' in the run's spec would take it"
        )
    if rule != "all":
        first = count // 2 if rule == "middle" else 0
        return range(first, first + 1)
    each = math.prod(settings.shape) * PIXEL.itemsize
    if count * each > limits.stored_bytes:
        raise IntakeError(
            f"{counted(count)} frames would take {each} bytes each in the cohort; at most "
            f"{limits.stored_bytes} of one file: use frames = 'first' or 'middle'"
        )
    return range(count)


def spread(frames: int) -> range:
    """The frames of which pictures are shown, at most `MOST_SHOTS`."""
    return range(0, frames, max(1, math.ceil(frames / MOST_SHOTS)))


def digest_of(stream: BinaryIO) -> str:
    """SHA-256 of a stream from its beginning, where it stands again afterwards."""
    digest = hashlib.sha256()
    while piece := stream.read(_PIECE):
        digest.update(piece)
    stream.seek(0)
    return digest.hexdigest()


def _brief(error: Exception) -> str:
    """The kind of an error; its text only from the system, for others quote what they read."""
    told = isinstance(error, OSError) and error.strerror
    return f"{type(error).__name__}: {told}" if told else type(error).__name__
