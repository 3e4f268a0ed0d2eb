"""De-identified DICOM files, for annotation or publication: every object of a source once.

    FOLDER/patient/study/series/instance.dcm

in pseudonyms and new UIDs. Like an intake it keeps a desk (``FOLDER.intake``), goes on where it
was killed, waits for a person where the rules say so, and adds what has come since.
"""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import shutil
from collections.abc import Collection, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import BinaryIO

import numpy as np
from pydicom.dataset import Dataset

from client.intake.builder import ImageRecord
from client.intake.decision import Decision, Shot
from client.intake.deid.engine import Cleaned, Engine
from client.intake.deid.profile import Profile
from client.intake.deid.save import save
from client.intake.deid.seam import blanked, decided, found_text, patient_of
from client.intake.deid.walk import Account
from client.intake.deidentify import text_of
from client.intake.desk import WORK, Desk, Row, State
from client.intake.dicom import MOST_SHOTS, FileResult, Task, Written, result_of, spread
from client.intake.digest import deidentification_digest
from client.intake.display import brightness
from client.intake.items import listed
from client.intake.keys import SiteKey
from client.intake.part10 import BoundedFile, DicomFile, FrameDecoder, Limits
from client.intake.pixels import Floats
from client.intake.pool import Bounds, Pool
from client.intake.reading import Reading, Workers
from client.intake.registry import Registry
from client.intake.run import Progress
from client.intake.shots import shot
from client.intake.source import NotUsed
from client.intake.take import at_work, check_target, not_used
from common.errors import CohortError, IntakeError, ReviewError
from common.files import disk_refuses, flush_folder

_PSEUDONYM, _UID = re.compile(r"[0-9a-f]{32}"), re.compile(r"[0-9][0-9.]{0,63}")


@dataclass(frozen=True)
class ExportOrder:
    """What is exported, where to, and how; see `client.intake.take.Order`."""

    source: Path
    folder: Path
    key: SiteKey
    profile: Profile = field(default_factory=Profile)
    workers: int = 0
    bounds: Bounds = field(default_factory=Bounds)
    registry: Registry | None = None
    batch: int = 64


@dataclass(frozen=True)
class ExportSummary:
    """What an export has done; for the hospital's own eyes.

    Attributes:
        folder: where the files are.
        files: how many there are now.
        patients: of how many patients.
        not_used: what of the source is not among them, each with a reason.
    """

    folder: Path
    files: int
    patients: int
    not_used: tuple[NotUsed, ...]


def export(
    order: ExportOrder, *, progress: Progress | None = None, pool: Workers = Pool
) -> ExportSummary:
    """Write the de-identified files of a source, or go on with it, or add what has come since.

    Raises:
        CohortError: if the folder is not that of this desk, or cannot be written.
        ConfigError: if it was begun with another key or profile.
        IntakeError: if there is no such source.
    """
    check_target(order.folder, order.source)
    listing = listed(order.source)
    with at_work(order.folder, order.key) as desk:
        desk.settle(
            makes="files",
            profile=order.profile.digest,
            deidentification=deidentification_digest(order.profile),
        )
        _check_folder(desk, order.folder)
        items = desk.plan(order.source, listing.items)
        desk.reopen_decided(items)
        _take_back(desk, order.folder)
        work = desk.path / WORK
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(mode=0o700)
        if numbers := desk.numbers(State.OPEN):
            engine = Engine(order.profile, order.key, spool=work)
            reader = FileExporter(engine, work, order.registry)
            workers = order.workers or len(os.sched_getaffinity(0))
            with pool(reader, workers, order.bounds) as mapper:
                sink = _Files(order.folder)
                Reading(desk, items, mapper, sink, order.batch, progress).through(numbers)
        shutil.rmtree(work)  # a worker that was lost may have left something there
        records = [row.record for row in desk.rows()]
        patients = len({record.patient for record in records})
        unused = (*not_used(desk), *listing.unusable)
        return ExportSummary(order.folder, len(records), patients, unused)


def place_of(folder: Path, record: ImageRecord) -> Path:
    """Where the file of an object lies.

    Raises:
        IntakeError: if one of its identifiers is no name of a folder: missing, or made to lead
            elsewhere.
    """
    parts = (record.patient, record.study, record.series, record.instance)
    if not (_PSEUDONYM.fullmatch(parts[0]) and all(map(_UID.fullmatch, parts[1:]))):
        raise IntakeError("its identifiers are missing, or none that a folder can be named by")
    return folder.joinpath(*parts[:3], f"{record.instance}.dcm")


@dataclass(frozen=True)
class FileExporter:
    """Writes the de-identified file of one object at a time; works in any process.

    Args:
        engine: de-identifies.
        work: a folder in which files wait for their names.
        registry: is told who a pseudonym stands for.
        limits: what a file may ask for.
    """

    engine: Engine
    work: Path
    registry: Registry | None = None
    limits: Limits = field(default_factory=Limits)

    def __call__(self, task: Task) -> FileResult:
        """Write an object's file; all that is wrong with it is in the result."""
        found = FileResult()

        def read(file: DicomFile) -> FileResult:
            nonlocal found
            found = replace(found, names_patient=bool(text_of(file.header, "PatientID")))
            try:
                return self._written(task, file, found)
            except ReviewError as error:
                shots = tuple(self._seen(task, None))
                return replace(found, reason=str(error), reviewable=True, shots=shots)

        return replace(result_of(task, self.limits, read), names_patient=found.names_patient)

    def _written(self, task: Task, file: DicomFile, found: FileResult) -> FileResult:
        patient = patient_of(file.header)
        cleaned = decided(self.engine, task.decision).clean(file)
        record = _record(cleaned.dataset)
        place = self.work / secrets.token_hex(16)
        place_of(place, record)
        if self.registry is not None:
            self.registry.add(record.patient, *patient)
        place.mkdir(mode=0o700)
        path = self._saved(cleaned, place)
        shots = tuple(self._seen(task, path)) if _blanked(cleaned.account) else ()
        with path.open("rb") as stream:
            written = Written(path, record, hashlib.file_digest(stream, "sha256").hexdigest())
        return replace(found, written=written, account=cleaned.account, shots=shots)

    def _saved(self, cleaned: Cleaned, place: Path) -> Path:
        """The file, in a folder of its own; of an error only what says nothing of where it was."""
        try:
            return save(cleaned, place)
        except IntakeError as error:
            shutil.rmtree(place)
            if full := disk_refuses(error):
                raise CohortError(f"{self.work}: cannot be written ({full})") from None
            raise IntakeError("what was made of it cannot be encoded") from None

    def _seen(self, task: Task, written: Path | None) -> Iterator[Shot]:
        """Pictures of the frames in which something was blanked; of all, if nothing was written."""
        try:
            with task.item.open(self.limits.read_bytes) as stream:
                before = _Frames(stream, self.limits)
                if written is None:
                    for number in spread(before.count):
                        pixels = before(number)
                        yield shot(number, pixels, None, found_text(pixels))
                    return
                with BoundedFile(written, self.limits.read_bytes) as file:
                    after = _Frames(file, self.limits)
                    yield from islice(_differences(before, after, task.decision), MOST_SHOTS)
        except Exception:  # noqa: BLE001
            return  # one that cannot be shown has no picture


class _Frames:
    """The brightness of single frames of a file, as a viewer shows them."""

    def __init__(self, stream: BinaryIO, limits: Limits) -> None:
        file = DicomFile.parse(stream, limits)
        element = file.pixel_element()
        geometry = file.geometry(limits)
        self._header = file.header
        self._decode = FrameDecoder(file, element, geometry)
        self.count = geometry.frames

    def __call__(self, number: int) -> Floats:
        return brightness(self._decode(number), self._header, number, "dicom")


def _differences(before: _Frames, after: _Frames, said: Decision | None) -> Iterator[Shot]:
    """Pictures of frames that are not as they were."""
    for number in range(before.count):
        came, kept = before(number), after(number)
        if not np.array_equal(came, kept):
            yield shot(number, came, kept, blanked(came, said))


def _blanked(account: Account) -> bool:
    """Whether something was blanked in the pixels."""
    return any(
        number and rule.startswith("pixels: ") for (rule, _), number in account.counts.items()
    )


def _record(clean: Dataset) -> ImageRecord:
    names = ("PatientID", "StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID")
    patient, study, series, instance = (text_of(clean, name) for name in names)
    rows, columns = int(clean.Rows), int(clean.Columns)
    return ImageRecord(patient, study, series, instance, 0, height=rows, width=columns)


class _Files:
    """Exported files as a sink: each that is taken gets its name, any other is removed."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._touched: set[Path] = set()

    def take(self, result: FileResult, new: Collection[str]) -> list[Row]:
        written = result.written
        if written is None:
            return []
        if written.record.instance not in new:
            shutil.rmtree(written.path.parent)
            return []
        target = place_of(self._folder, written.record)
        try:
            self._folder.parent.mkdir(parents=True, exist_ok=True)
            for made in reversed(target.parents[:4]):  # the mode of `mkdir` is the last one's alone
                made.mkdir(mode=0o700, exist_ok=True)
            written.path.rename(target)
            written.path.parent.rmdir()
        except OSError as error:
            raise CohortError(f"{target}: cannot be written ({error.strerror})") from error
        self._touched |= {*target.parents[:3], self._folder, self._folder.parent}
        return [Row(written.record, written.sha256)]

    def flush(self) -> None:
        for folder in self._touched:
            flush_folder(folder)
        self._touched.clear()


def _check_folder(desk: Desk, folder: Path) -> None:
    """What was written is still in its place.

    Raises:
        CohortError: otherwise.
    """
    if desk.images() and not folder.is_dir():
        raise CohortError(
            f"{folder}: files were written there, and it is gone; put it back, or remove "
            f"{desk.path} to begin anew (its decisions go with it)"
        )


def _take_back(desk: Desk, folder: Path) -> None:
    """Remove the files of objects that a person rejected, or that are to be written anew."""
    live = set(desk.live_rows())
    for number, row in enumerate(desk.rows()):
        if number not in live:
            file = place_of(folder, row.record)
            file.unlink(missing_ok=True)
            for empty in file.parents[:3]:
                with suppress(OSError):  # others are in there
                    empty.rmdir()
    desk.drop_dead_rows()
