"""Taking DICOM in: every object of a source once, over all cores, into a cohort that is whole.

    plan      what is in the source is entered in the desk's journal, in an order the key draws
    read      worker processes read and de-identify; results are committed in that order
    finish    the index is written, the folder takes the cohort's name, the journal says so

Killed at any point and started again with the same arguments, it goes on where it was and comes to
the same bytes. Started again when it was complete, it takes in what is new in the source and what
a person has released since, and takes out what a person has rejected.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import shutil
from collections.abc import Collection, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from datetime import date
from pathlib import Path

import numpy as np

from client.folder import cohort_digest
from client.intake.annotated import Marking, SeriesReader
from client.intake.builder import ImageFile, write_index
from client.intake.deid.engine import Engine
from client.intake.deid.profile import Profile
from client.intake.deid.seam import CohortDeidentifier
from client.intake.desk import SUFFIX, WORK, Desk, Row, State
from client.intake.dicom import FileReader, FileResult
from client.intake.digest import deidentification_digest
from client.intake.items import Item, Listing, listed
from client.intake.keys import SiteKey
from client.intake.labels import LabelTable, labels_without_image
from client.intake.part10 import Limits
from client.intake.pool import Bounds, Pool
from client.intake.reading import NO_PATIENT, Reading, Workers
from client.intake.registry import Registry
from client.intake.run import IntakeSummary, Progress
from client.intake.series import SeriesItem, in_series
from client.intake.source import NotUsed
from client.intake.summary import summarise
from common.cohort import PIXEL, PIXEL_MAX, Cohort, CohortMeta, Unit
from common.cohort_seal import CohortSeal
from common.errors import CohortError, IntakeError
from common.files import flush_folder, locked
from common.spec import RunSpec

_COPIED, _COPIED_BYTES = 256, 2**28
_SECONDS_AN_IMAGE = 2
_SUPERSEDED = "superseded"
_WORKING, _FINISHING, _COMPLETE = "working", "finishing", "complete"
_NOT_USED = (State.WAITS, State.REFUSED, State.COPY, State.REJECTED, State.GONE)


@dataclass(frozen=True)
class Order:
    """What is taken in, for which run, and how.

    Args:
        source: a folder, a ZIP, or a DICOMDIR.
        cohort: the cohort's directory.
        spec: the run that the cohort is for: its classes and its input.
        labels: of its images.
        key: the site's, for pseudonyms and for the desk.
        profile: the hospital's choice of de-identification.
        split: put on every image; if empty, the label table's split is.
        cohort_key: 32 bytes that seal the cohort at rest; None leaves it plain.
        workers: processes that read; one for each core if 0.
        bounds: what one object may take.
        registry: is told who a pseudonym stands for; None where no table is kept.
        batch: objects that are committed together: a killed intake reads them again at most.
        marking: what a person says of masks, where the run is one of masks; its table of labels
            is one of segments then (`client.intake.segments`), and an object is a series.
    """

    source: Path
    cohort: Path
    spec: RunSpec
    labels: LabelTable
    key: SiteKey
    profile: Profile = field(default_factory=Profile)
    split: str = ""
    cohort_key: bytes | None = field(default=None, repr=False)
    workers: int = 0
    bounds: Bounds = field(default_factory=Bounds)
    registry: Registry | None = None
    batch: int = 64
    marking: Marking = field(default_factory=Marking)

    @property
    def desk(self) -> Path:
        """The folder of the desk, beside the cohort."""
        return desk_of(self.cohort)

    @property
    def reader(self) -> FileReader | SeriesReader:
        """What reads one object, or one series."""
        deidentify = CohortDeidentifier(Engine(self.profile, self.key))
        files = FileReader(
            self.spec.input, self.labels, deidentify, self.split, registry=self.registry
        )
        return SeriesReader(files, self.spec, self.marking) if self.has_masks else files

    @property
    def has_masks(self) -> bool:
        """Whether the run is one of masks."""
        return self.spec.task.kind == "mask"


def desk_of(target: Path) -> Path:
    """Where the desk of a cohort, or of exported files, lies."""
    return target.with_name(target.name + SUFFIX)


def check_target(target: Path, source: Path) -> None:
    """What is there already is an intake's own, beside its desk, and apart from the source.

    Raises:
        CohortError: otherwise.
    """
    if not target.name:
        raise CohortError(f"{target}: no name for something new; expected one such as north.cohort")
    here = source.resolve()
    for made in (target.resolve(), desk_of(target).resolve()):
        if made.is_relative_to(here) or here.is_relative_to(made):
            raise CohortError(
                f"{made}: within the source {source}, or around it: what is made would be taken "
                "in itself; choose a place beside it"
            )
    if target.exists() and not desk_of(target).exists():
        raise CohortError(
            f"{target}: exists already, without the desk {desk_of(target).name} of an intake; "
            "nothing is ever overwritten: choose another name, or remove it if it is yours to "
            "remove"
        )


def take_in(
    order: Order,
    *,
    progress: Progress | None = None,
    today: date | None = None,
    pool: Workers = Pool,
) -> IntakeSummary:
    """Take a source in, or go on with it, or add what has come since.

    Args:
        order: what and how.
        progress: called with the objects that were read and those to read.
        today: the date that the cohort bears; today's if none is given.
        pool: makes what reads objects, given what reads one, how many at a time, and bounds.

    Raises:
        CohortError: if the cohort cannot be written, or is not that of this desk.
        ConfigError: if it was begun with another key, spec or profile, or a label has changed.
        IntakeError: if there is no such source, or it is not of one kind.
    """
    check_target(order.cohort, order.source)
    listing = listed(order.source)
    if order.has_masks:
        workers = order.workers or len(os.sched_getaffinity(0))
        listing = in_series(listing, Limits(), workers, order.bounds, pool)
        series = [item for item in listing.items if isinstance(item, SeriesItem)]
        longest = max((len(one.images) for one in series), default=1)
        seconds = order.bounds.seconds + _SECONDS_AN_IMAGE * longest
        order = replace(order, bounds=replace(order.bounds, seconds=seconds, ahead=1))
    with at_work(order.cohort, order.key, order.cohort_key) as desk:
        return _Intake(order, desk, listing, today or date.today(), pool).run(progress)


@contextmanager
def at_work(target: Path, key: SiteKey, cohort_key: bytes | None = None) -> Iterator[Desk]:
    """The desk of what is made at `target`, for this process alone.

    Raises:
        CohortError: if another intake is at work there, or the disk refuses.
        ConfigError: if it is another key's.
    """
    with Desk.create(desk_of(target), key, cohort_key) as desk:
        try:
            with locked(desk.path):
                yield desk
        except BlockingIOError:
            raise CohortError(
                f"{desk.path}: another intake is at work here; wait for it to end"
            ) from None
        except OSError as error:
            raise CohortError(
                f"{desk.path}: work cannot go on ({error}); check the folder, its rights and its "
                "space, and start again"
            ) from error


def not_used(desk: Desk) -> Iterator[NotUsed]:
    """What of the source nothing was made of, and why; for the hospital's own eyes.

    What was kept as it was then, and is another now, is told as well.
    """
    for entry in (*desk.entries(*_NOT_USED), *desk.changed()):
        yield NotUsed(desk.place(entry), entry.reason)


class _Intake:
    """One start of an intake, at a desk that is its own."""

    def __init__(
        self, order: Order, desk: Desk, listing: Listing, today: date, pool: Workers
    ) -> None:
        self._order = order
        self._desk = desk
        self._listing = listing
        self._today = today
        self._pool = pool
        self._work = desk.path / WORK
        self._digest = deidentification_digest(order.profile)

    def run(self, progress: Progress | None) -> IntakeSummary:
        """Go on with what was begun, then with what has come since."""
        order = self._order
        self._desk.settle(
            makes="a cohort",
            spec=_spec_digest(order.spec),
            labels=order.labels.key,
            split=order.split,
            profile=order.profile.digest,
            deidentification=self._digest,
            **self._masks_settled(),
        )
        self._desk.settle_labels(_said(order.labels))
        self._check_cohort()
        if self._phase == _FINISHING:
            self._finish()
        elif self._phase == _COMPLETE:
            shutil.rmtree(self._desk.path / _SUPERSEDED, ignore_errors=True)
        items = self._desk.plan(order.source, self._listing.items)
        if self._phase == _WORKING:
            self._pass(items, progress)
        self._desk.reopen_decided(items)
        if self._anything_new():
            self._begin()
            self._pass(items, progress)
        return self._summary()

    def _masks_settled(self) -> dict[str, str]:
        return {"masks": self._order.marking.settled} if self._order.has_masks else {}

    @property
    def _phase(self) -> str:
        return self._desk.setting("phase")

    def _check_cohort(self) -> None:
        """The cohort in its place is the one that this desk knows, or there is none.

        Raises:
            CohortError: otherwise.
        """
        desk, cohort = self._desk, self._order.cohort
        known, there = desk.setting("completed"), os.path.lexists(cohort)
        ours = {known, desk.setting("coming")} - {""}
        if there and (not cohort.is_dir() or _digest_of(cohort) not in ours):
            raise CohortError(
                f"{cohort}: exists already, and is not of this intake, or was changed since; a "
                "cohort is never overwritten: move it away, or choose another name"
            )
        if known and not there and self._phase != _FINISHING:
            raise CohortError(
                f"{self._order.cohort}: this intake was complete, and its cohort is gone; put it "
                f"back, or remove {self._order.desk} to begin anew (its decisions go with it)"
            )

    def _anything_new(self) -> bool:
        desk = self._desk
        dead = desk.images() > len(desk.live_rows())
        return not self._phase or dead or bool(desk.numbers(State.OPEN, State.ASIDE))

    def _begin(self) -> None:
        """A working folder with the images that are there already and still the cohort's."""
        shutil.rmtree(self._work, ignore_errors=True)
        self._work.mkdir(mode=0o700)
        number = secrets.token_hex(16)
        if self._phase == _COMPLETE:
            self._copy(number)
        created = self._today.isoformat()
        self._desk.drop_dead_rows(phase=_WORKING, created=created, cohort=number)

    def _copy(self, number: str) -> None:
        cohort = Cohort.open(self._order.cohort, self._order.cohort_key)
        digests = [row.sha256 for row in self._desk.rows()]
        live = self._desk.live_rows()
        with closing(self._images(number)) as images:
            at_once = max(1, min(_COPIED, _COPIED_BYTES // cohort.meta.image_bytes))
            for start in range(0, len(live), at_once):
                rows = live[start : start + at_once]
                stored = np.rint(cohort.images(rows) * PIXEL_MAX).astype(PIXEL)
                if cohort.kind == "mask":
                    masks = cohort.targets(rows).astype(PIXEL)[:, None]
                    stored = np.concatenate([stored, masks], axis=1)
                seen = [images.append(pixels.tobytes()) for pixels in stored]
                if seen != [digests[row] for row in rows]:
                    raise CohortError(
                        f"{self._order.cohort}: its images are not those that were taken in; the "
                        "file is damaged or was changed: put back a copy, or take in anew"
                    )
            images.flush()

    def _images(self, number: str) -> ImageFile:
        meta = self._meta("patient")
        return ImageFile(self._work, meta.image_bytes, self._seal(number))

    def _seal(self, number: str) -> CohortSeal | None:
        key = self._order.cohort_key
        return None if key is None else CohortSeal(key, number)

    def _meta(self, unit: Unit) -> CohortMeta:
        return CohortMeta.of(
            self._order.spec,
            unit=unit,
            source="dicom",
            created=self._desk.setting("created"),
            deidentification=self._digest,
        )

    def _pass(self, items: Mapping[int, Item], progress: Progress | None) -> None:
        """Read all that is open into the working folder, and give it the cohort's name."""
        desk, order = self._desk, self._order
        workers = order.workers or len(os.sched_getaffinity(0))
        with closing(self._images(desk.setting("cohort"))) as images:
            images.truncate(desk.images())
            with self._pool(order.reader, workers, order.bounds) as pool:
                reading = Reading(desk, items, pool, _Images(images), order.batch, progress)
                reading.through(desk.numbers(State.OPEN))
                self._settle_aside(reading)
        desk.change(phase=_FINISHING)
        self._finish()

    def _settle_aside(self, reading: Reading) -> None:
        """Those that name no patient, now that all others are seen.

        If any object names a patient, they cannot be used; if none does, the source has no
        patients to protect by name, and a pseudonym stands for an image. That is settled before
        any of them is kept, and for good.

        Raises:
            IntakeError: if it is settled that there are none, and there are.
        """
        desk = self._desk
        aside, named, unit = desk.numbers(State.ASIDE), desk.names_patients(), desk.setting("unit")
        if named and unit == "image":
            raise IntakeError(
                f"{self._order.source}: names patients, and what was taken in before names none, "
                "so its unit is the image; take this source in under another cohort's name"
            )
        if not unit and (named or aside):
            desk.change(unit="patient" if named else "image")
        if desk.setting("unit") == "image":
            reading.through(aside, without_patient=True)
        else:
            reading.refuse(aside, NO_PATIENT)

    def _finish(self) -> None:
        """The index, then the name; done again from any point of it."""
        desk, cohort = self._desk, self._order.cohort
        old = desk.path / _SUPERSEDED
        if self._work.exists():
            unit: Unit = "image" if desk.setting("unit") == "image" else "patient"
            rows = ((row.record, row.sha256) for row in desk.rows())
            write_index(self._work, self._meta(unit), rows, self._seal(desk.setting("cohort")))
            self._check_cohort()
            desk.change(coming=cohort_digest(self._work))
            if cohort.exists():
                shutil.rmtree(old, ignore_errors=True)
                cohort.rename(old)
            self._work.rename(cohort)
            flush_folder(cohort.parent)
        desk.change(phase=_COMPLETE, completed=desk.setting("coming"))
        shutil.rmtree(old, ignore_errors=True)

    def _summary(self) -> IntakeSummary:
        order, desk = self._order, self._desk
        used = desk.labelled()
        found = {name for name in order.labels.entries if desk.label_id(name) in used}
        labels = labels_without_image(order.labels, found)
        contents = summarise(Cohort.open(order.cohort, order.cohort_key))
        unusable = self._listing.unusable
        if order.has_masks:  # a line of its table is of a kind of thing, and of no image
            return IntakeSummary(order.cohort, contents, (*not_used(desk), *unusable))
        return IntakeSummary(order.cohort, contents, (*not_used(desk), *unusable, *labels))


class _Images:
    """The images of a cohort as a sink."""

    def __init__(self, images: ImageFile) -> None:
        self._images = images

    def take(self, result: FileResult, new: Collection[str]) -> list[Row]:
        return [
            Row(image.record, self._images.append(image.stored))
            for image in result.images
            if image.record.instance in new
        ]

    def flush(self) -> None:
        self._images.flush()


def _digest_of(cohort: Path) -> str:
    """That of a cohort's index; empty for a folder that is no cohort."""
    try:
        return cohort_digest(cohort)
    except CohortError:
        return ""


def _spec_digest(spec: RunSpec) -> str:
    """Of what a cohort depends on: how images are made, and the classes."""
    said = [spec.input.preprocessing_digest, spec.task.kind, *spec.task.classes]
    if spec.input.modalities:
        said.append(f"modalities {' '.join(spec.input.modalities)}")
    return hashlib.sha256("\n".join(said).encode()).hexdigest()


def _said(labels: LabelTable) -> dict[str, str]:
    """What each line of a table says, by what finds it."""
    return {
        name: repr((entry.label, entry.split, *filter(None, [entry.modality])))
        for name, entry in labels.entries.items()
    }
