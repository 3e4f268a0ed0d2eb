"""A trained model on new studies: what they are, what it says of them, what is written.

    look      every object says what it is; what the model is not meant for is refused by name
    read      the rest is decoded study by study over all cores, as the intake does it
    answer    study by study, so that an answer does not depend on whose images lie beside them
    commit    all that is said of a study goes to the disk at once, and is never asked again
    finish    tables are made, and the folder takes its name

A refused object costs itself and no other, but its own volume. Memory holds what objects there
are, and the answers of one study.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from pydicom.datadict import tag_for_keyword

from client.intake.deid.engine import Engine
from client.intake.deid.profile import Profile
from client.intake.deid.seam import CohortDeidentifier
from client.intake.items import Item, listed
from client.intake.keys import SiteKey
from client.intake.pool import Bounds, Pool, WorkerLostError
from client.intake.source import NotUsed
from client.prediction.answering import Answered, Drawn, Likeness, Model, Pictures
from client.prediction.output import Entry, Results, check_target
from client.prediction.reading import (
    NO_BODY_PART,
    NO_MODALITY,
    Frame,
    Look,
    Looked,
    Named,
    Prepare,
    Prepared,
    PreparedSeries,
    PrepareSeries,
    StudyReader,
    is_one_patient,
    reason_of,
)
from client.prediction.rows import NOTHING, UNPLACED, Row, Rows, Seen, Study, asked_of
from client.prediction.tables import columns_of, every_line, head_of, warnings_of
from common.cohort import PIXEL_MAX, Cohort, index_file
from common.errors import CohortError, ConfigError, IntakeError, PackageError
from common.files import disk_refuses
from common.package import Package
from common.spec import Input, Use

Question = Look | Prepare | PrepareSeries
Reply = Looked | Prepared | PreparedSeries
Progress = Callable[[str, int, int], None]
"""Told what is being done, how much of it is done, and of how much."""

COPY = "a copy of another object, byte for byte, which is answered"
AMBIGUOUS = "other bytes have the same SOP Instance UID: one of them has a wrong one"
TWO_PATIENTS = "its study names two patients: whose it is, is not known"
TWO_ORDERS = "the objects of its study have different accession numbers"
TWO_NAMES = "the objects of its study name its one patient in different ways"
UNEXPLAINED = "what moved its answer could not be drawn"
NOT_WRITTEN = "what is said of it holds a number that is none"
NOT_MADE = "it could not be made"
NOT_NUMBERS = "the network's outputs are not numbers"
NOT_WHOLE = "an object of its series is not answered, and a volume is used whole"
LATE = "its study was answered before it came, or before it was changed: ask for it apart"
PSEUDONYMS = "Pseudonyms of a cohort; its images have no true identifiers."
_AT_ONCE = 256


class Mapper(Protocol):
    """Reads objects, however many at a time: a `Pool`."""

    def map(self, tasks: Iterable[Question]) -> Iterator[Reply | WorkerLostError]:
        """What became of each, in the order of the tasks."""


Workers = Callable[[StudyReader, int, Bounds], AbstractContextManager[Mapper]]


class Told(NamedTuple):
    """One image that was answered, without its pixels."""

    seen: Seen
    answered: Answered
    row: Row


class NotMade(NamedTuple):
    """Something more that could not be made of answers, which cost none of them."""

    what: str
    named: Named
    reason: str


def not_made(what: str, named: Named, error: Exception) -> NotMade:
    """Why something could not be made; of a foreign error what is wrong with a header, if known.

    Its text is not shown: it may quote what stands in the header.
    """
    missing = getattr(error, "name", None)
    if isinstance(error, AttributeError) and missing and tag_for_keyword(missing) is not None:
        reason = f"a header lacks {missing}"
    elif isinstance(error, IntakeError | MemoryError | OSError):
        reason = reason_of(error)
    else:
        reason = f"the headers do not allow it ({type(error).__name__})"
    return NotMade(what, named, f"{NOT_MADE}: {reason}")


class ToldStudy(NamedTuple):
    """One study that was answered: its images or volumes, its own row, and what was not answered.

    Attributes:
        items: find each object by its place.
        refused: how many of its objects were not answered.
        caveats: what must be borne in mind of all that is said of it.
    """

    images: Sequence[Told]
    row: Row
    refused: int
    items: Mapping[str, Item]
    caveats: tuple[str, ...] = ()


class Addition(Protocol):
    """Something more that is made of a study.

    Attributes:
        name: such as ``structured report``.
        kind: the folder of its files, which have a number each.
    """

    @property
    def name(self) -> str:
        """See `Addition`."""

    @property
    def kind(self) -> str:
        """See `Addition`."""

    def of_study(self, study: ToldStudy) -> Iterator[bytes | NotMade]:
        """Files, and what could not be made."""


@dataclass(frozen=True)
class Order:
    """What is asked.

    Args:
        model: opened.
        source: a folder, a ZIP or a DICOMDIR.
        target: the folder of the results, not there yet.
        profile: the hospital's, by which a cohort's pixels are made.
        workers: processes that read; one for each core if 0.
        additions: what is made of each study besides.
        pictures: makes what moved each answer; None for none.
        bounds: what one object may take.
    """

    model: Model
    source: Path
    target: Path
    profile: Profile = field(default_factory=Profile)
    workers: int = 0
    additions: tuple[Addition, ...] = ()
    pictures: Pictures | None = None
    bounds: Bounds = field(default_factory=Bounds)

    @property
    def reader(self) -> StudyReader:
        """What reads one object."""
        spec = self.model.package.spec
        engine = Engine(self.profile, SiteKey.random())
        return StudyReader(spec.input, spec.use, CohortDeidentifier(engine))


@dataclass
class Summary:
    """What became of a source.

    Attributes:
        images: that were answered, or volumes; of a model of studies those that were seen.
        studies: with at least one such image.
        before: of these, the studies that an earlier start had answered.
        refused: what was not, and why.
        not_made: reports and segmentations that could not be made, and why.
        decisions: how many images, or studies, each class was decided for.
        caveats: of ``images`` and of ``studies``, how many must be read with each.
    """

    images: int = 0
    studies: int = 0
    before: int = 0
    refused: list[NotUsed] = field(default_factory=list)
    not_made: list[NotUsed] = field(default_factory=list)
    decisions: Counter[str] = field(default_factory=Counter)
    caveats: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))

    def add(self, entry: Entry) -> None:
        """Count what is said of one study."""
        self.images += sum(row.get("seen", True) for row in entry.rows["images"])
        self.studies += len(entry.rows["studies"])
        self.refused += [NotUsed(row["file"], row["reason"]) for row in entry.rows["refused"]]
        self.not_made += [NotUsed(row["what"], row["reason"]) for row in entry.rows["not_made"]]
        for part in ("images", "studies"):
            for row in entry.rows[part]:
                self.caveats[part].update(row["caveats"] if row.get("seen", True) else ())
        for row in (*entry.rows["images"], *entry.rows["studies"]):
            decided = row.get("model_decision", ())
            self.decisions.update([decided] if isinstance(decided, str) else decided)


def predict(order: Order, progress: Progress | None = None, pool: Workers = Pool) -> Summary:
    """Answer all that can be answered; what cannot is named with its reason.

    Raises:
        ConfigError: if the results cannot be put where they should.
        IntakeError: if there is no such source.
        PackageError: if the model's card is of another preprocessing.
        RunError: if the disk is full.
    """
    check_target(order.target)
    _check_apart(order.source, order.target)
    check_card(order.model.package)
    listing = listed(order.source)
    workers = order.workers or len(os.sched_getaffinity(0))
    with (
        _results(order, order.source) as results,
        pool(order.reader, workers, order.bounds) as readers,
    ):
        work = _Prediction(order, results, progress or _silent)
        for gone in listing.unusable:
            work.refuse(Named(gone.what), gone.reason)
        work.objects(listing.items, readers)
        work.finish({})
    return work.summary


def _check_apart(source: Path, target: Path) -> None:
    """Results that grew among the objects would be read as some of them the next time.

    Raises:
        ConfigError: if the results would lie in the source.
    """
    if target.resolve().is_relative_to(source.resolve()):
        raise ConfigError(f"{target}: lies in {source}, which is read; name a place outside of it")


def predict_cohort(order: Order, cohort: Cohort, progress: Progress | None = None) -> Summary:
    """Answer the images of a cohort, under their pseudonyms.

    Raises:
        ConfigError: if the results cannot be put where they should, or DICOM is to be made, which
            needs the true files.
        CohortError: if the cohort was made by another preprocessing.
    """
    check_target(order.target)
    check_card(order.model.package)
    ours = order.model.package.spec.input
    if cohort.preprocessing_digest != ours.preprocessing_digest:
        raise CohortError(
            f"{cohort.path}: made by another preprocessing ({cohort.meta.preprocessing}) than the "
            "model's; take the source in again with the model's spec.json"
        )
    if order.additions:
        names = " and ".join(f"a {addition.name}" for addition in order.additions)
        raise ConfigError(f"{cohort.path}: {names} needs DICOM files, and this is a cohort")
    with _results(order, cohort.path, cohort) as results:
        work = _Prediction(order, results, progress or _silent)
        work.cohort(cohort)
        work.finish({"identities": PSEUDONYMS})
    return work.summary


def _results(
    order: Order, source: Path, cohort: Cohort | None = None
) -> AbstractContextManager[Results]:
    model = order.model
    question = asked(order, source, cohort)
    return Results.at(order.target, question, columns_of(model), every_line(model))


def asked(order: Order, source: Path, cohort: Cohort | None = None) -> dict[str, str]:
    """All that an answer depends on, in words, so that no folder has answers to two questions.

    The objects of a source are told apart by their bytes; a cohort's images have but numbers, which
    mean something in this cohort alone. Its index has the SHA-256 of each of them.
    """
    package = order.model.package
    made = ["tables", *(one.name for one in order.additions)]
    calibration = "" if package.calibration is None else package.calibration.model_dump_json()
    card = json.dumps(dict(package.card), sort_keys=True)
    return {
        "the version of Cloister": version("cloister"),
        "the model": package.model_sha256,
        "its run's file": package.spec.digest,
        "its card and calibration": _digest(card + calibration),
        "the profile": _digest(order.profile.model_dump_json()),
        "what is made": " and ".join([*made, *["explanation"] * (order.pictures is not None)]),
        "the source": str(source.resolve()),
    } | ({} if cohort is None else {"the cohort": _digest_of(index_file(cohort.path))})


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _digest_of(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _silent(_what: str, _done: int, _total: int) -> None: ...


def check_card(package: Package) -> None:
    """What the card says of the input is what is done here, and its warnings are text.

    Raises:
        PackageError: otherwise.
    """
    warnings_of(package)
    model = package.card.get("model")
    said = model.get("input") if isinstance(model, dict) else None
    if said is None:
        return
    try:
        digest = Input.model_validate_json(json.dumps(said)).preprocessing_digest
    except ValueError:
        digest = ""
    ours = package.spec.input.preprocessing_digest
    if digest != ours:
        raise PackageError(
            f"{package.path}: its card describes another preprocessing than its spec (SHA-256 "
            f"{digest[:12] or 'of nothing'} and {ours[:12]}); copy the model anew"
        )


class _Prediction:
    """One pass over a source."""

    def __init__(self, order: Order, results: Results, progress: Progress) -> None:
        self.summary = Summary()
        self._order = order
        self._results = results
        self._progress = progress
        self._rows = Rows(order.model.package.spec)
        self._asked = asked_of(order.model.package.spec)
        self._likeness: list[Likeness] = []
        self._images = 0
        self._refused: list[Row] = []
        self._lost: defaultdict[str, set[str]] = defaultdict(set)
        self._gaps: set[str] = set()
        self._unplaced = 0
        for entry in results.entries():
            self._count(entry)
        self.summary.before = self.summary.studies

    def objects(self, items: Sequence[Item], readers: Mapper) -> None:
        """Look, then answer study by study."""
        by_place = {item.place: item for item in items}
        wanted = self._wanted(self._looked(items, readers))
        self._orders: defaultdict[str, set[str]] = defaultdict(set)
        self._names: defaultdict[str, set[str]] = defaultdict(set)
        for named in wanted:
            self._orders[named.study].add(named.accession)
            self._names[named.study] |= {named.name} - {""}
        units = self._units([named for named in wanted if self._is_new(named)])
        done = len(wanted) - sum(map(len, units))
        replies = readers.map(self._question(unit, by_place) for unit in units)
        pairs = zip(units, replies, strict=True)
        for study, read in itertools.groupby(pairs, key=lambda pair: pair[0][0].study):
            entry = Entry(study)
            self._study(entry, self._seen(entry, read, done, len(wanted)), by_place)
            done += len(entry.objects)
        self._progress("Answering", len(wanted), len(wanted))

    def cohort(self, cohort: Cohort) -> None:
        """Answer a cohort's images study by study."""
        done = 0
        for _, rows in itertools.groupby(
            np.argsort(cohort.study_index, kind="stable").tolist(),
            key=lambda row: int(cohort.study_index[row]),
        ):
            mine = list(rows)
            entry = Entry(_study_name(cohort, mine[0]))
            if entry.study not in self._results.answered:
                self._study(entry, self._stored(entry, cohort, mine), {})
            done += len(mine)
            self._progress("Answering", done, len(cohort))

    def finish(self, head: Mapping[str, Any]) -> None:
        """Put the folder together."""
        said = head_of(self._order.model) | dict(head)
        if self._order.pictures is not None:
            said["explained"] = self._order.pictures.examined(self._likeness)
        self._results.finish(said, self._refused)

    def refuse(self, named: Named, reason: str, entry: Entry | None = None) -> None:
        """Write down that an object is not answered.

        Args:
            named: which.
            reason: why.
            entry: of its study; None if it was refused before its study was asked about.
        """
        if entry is None and named.key in self._results.answered.get(named.study, ()):
            return  # an earlier start has answered it, or said why not
        if named.key in self._lost[named.study]:
            return  # for another of its frames
        if reason != COPY:
            self._lost[named.study].add(named.key)
            self._gaps.add(named.series)
        row = {
            "file": named.place,
            "patient_id": named.patient,
            "issuer": named.issuer,
            "study_instance_uid": named.study,
            "series_instance_uid": named.series,
            "sop_instance_uid": named.instance,
            "reason": reason,
        }
        if entry is None:
            self._unplaced += not named.placed
            self._refused.append(row)
            self.summary.refused.append(NotUsed(named.place, reason))
        else:
            entry.add("refused", row)

    # --- Which objects ------------------------------------------------------------------------

    def _looked(self, items: Sequence[Item], readers: Mapper) -> Iterator[Named]:
        """What can be answered, as far as its header says."""
        replies = readers.map(map(Look, items))
        for done, (item, reply) in enumerate(zip(items, replies, strict=True), start=1):
            self._progress("Looking", done, len(items))
            if isinstance(reply, WorkerLostError):
                self.refuse(Named(item.place), str(reply))
            elif isinstance(reply, Looked) and reply.reason:
                self.refuse(reply.named, reply.reason)
            elif isinstance(reply, Looked) and not reply.ignored:
                yield reply.named

    def _wanted(self, found: Iterable[Named]) -> list[Named]:
        """One object for each instance, sorted; of instances that several are, none or one."""
        by_instance: defaultdict[str, list[Named]] = defaultdict(list)
        for named in found:
            by_instance[named.instance].append(named)
        wanted = []
        for same in by_instance.values():
            first, *others = sorted(same, key=lambda named: named.place)
            differ = len({named.sha256 for named in same}) > 1
            for named in others if not differ else same:
                self.refuse(named, AMBIGUOUS if differ else COPY)
            if not differ:
                wanted.append(first)
        wanted = list(self._of_one_patient(wanted))
        if self._asked == "volume":
            wanted = list(self._whole(wanted))
        return sorted(wanted, key=lambda named: named.order)

    def _of_one_patient(self, found: Sequence[Named]) -> Iterator[Named]:
        """The objects of studies that are of one patient, as a study has to be (PS3.3 A.1.2)."""
        studies: defaultdict[str, list[Named]] = defaultdict(list)
        for named in found:
            studies[named.study].append(named)
        for objects in studies.values():
            if is_one_patient(objects):
                yield from objects
            else:
                for named in objects:
                    self.refuse(named, TWO_PATIENTS)

    def _whole(self, found: Sequence[Named]) -> Iterator[Named]:
        """The objects of series of which none was refused: a volume that lost its end looks whole.

        A series is a volume of one study.
        """
        studies: defaultdict[str, set[str]] = defaultdict(set)
        for named in found:
            studies[named.series].add(named.study)
        torn = self._gaps | {series for series, of in studies.items() if len(of) > 1}
        for named in found:
            if named.series in torn:
                self.refuse(named, NOT_WHOLE)
            else:
                yield named

    def _is_new(self, named: Named) -> bool:
        """Whether no earlier start has answered its study; what has come to one is refused."""
        known = self._results.answered.get(named.study)
        if known is not None and named.key not in known:
            self.refuse(named, LATE)
        return known is None

    def _units(self, wanted: Sequence[Named]) -> list[list[Named]]:
        """What is read together: an object, or of a model of volumes a series."""
        if self._asked != "volume":
            return [[named] for named in wanted]
        groups = itertools.groupby(wanted, key=lambda named: named.series)
        return [list(group) for _, group in groups]

    def _question(self, unit: Sequence[Named], items: Mapping[str, Item]) -> Question:
        each = tuple(Prepare(items[named.place], named.sha256) for named in unit)
        return PrepareSeries(each) if self._asked == "volume" else each[0]

    # --- Their images -------------------------------------------------------------------------

    def _seen(
        self, entry: Entry, read: Iterable[tuple[list[Named], Any]], done: int, total: int
    ) -> Iterator[tuple[Seen, Any]]:
        """The images or volumes of a study; what cannot be read is refused on the way."""
        several = ((TWO_ORDERS, self._orders), (TWO_NAMES, self._names))
        said = tuple(caveat for caveat, of in several if len(of[entry.study]) > 1)
        for unit, reply in read:
            entry.objects += [named.key for named in unit]
            self._progress("Answering", done + len(entry.objects), total)
            if isinstance(reply, Prepared) and not reply.reason:
                if reply.left_out:
                    self.refuse(unit[0], reply.left_out, entry)
                for frame in reply.frames:
                    told = replace(frame, caveats=(*frame.caveats, *said))
                    yield Seen(unit[0], told, reply.size, reply.count), frame.pixels
            elif isinstance(reply, PreparedSeries) and reply.pixels is not None:
                yield self._volume(unit, reply, said), reply.pixels
            else:
                self._refuse_unit(entry, unit, reply)

    def _volume(self, unit: list[Named], reply: PreparedSeries, said: tuple[str, ...]) -> Seen:
        """A series that was read, and what must be borne in mind of it."""
        caveats = [*reply.caveats, *said]
        if self._unplaced:
            caveats.append(UNPLACED.format(self._unplaced))
        scan = reply.scan
        size = (0, 0) if scan is None else scan.shape[1:]
        frame = Frame(0, NOTHING, None, tuple(caveats))
        return Seen(unit[0], frame, size, 1, tuple(unit), scan, whole=not self._unplaced)

    def _refuse_unit(self, entry: Entry, unit: list[Named], reply: Any) -> None:
        """Refuse what could not be read, and the rest of its series with it."""
        reason = str(reply) if isinstance(reply, WorkerLostError) else reply.reason
        at = reply.at if isinstance(reply, PreparedSeries) else None
        for number, named in enumerate(unit):
            alone = at is None or number == at
            self.refuse(named, reason if alone else NOT_WHOLE, entry)

    def _stored(
        self, entry: Entry, cohort: Cohort, rows: Sequence[int]
    ) -> Iterator[tuple[Seen, Any]]:
        """A study's images in a cohort."""
        said = _of_cohort(self._rows.spec.use)
        step = 1 if self._asked == "volume" else _AT_ONCE
        for start in range(0, len(rows), step):
            some = rows[start : start + step]
            stored = np.rint(cohort.images(np.array(some)) * PIXEL_MAX).astype(np.uint16)
            for row, pixels in zip(some, stored, strict=True):
                name = f"image {row + 1}"
                patient = cohort.patients[cohort.patient_index[row]]
                study = _study_name(cohort, row)
                modality = str(cohort.modalities[row]) if self._rows.spec.input.modalities else ""
                named = Named(name, patient=patient, study=study, instance=name, modality=modality)
                entry.objects.append(named.key)
                yield Seen(named, Frame(0, NOTHING, None, said), pixels.shape[-2:]), pixels

    # --- Their answers ------------------------------------------------------------------------

    def _study(
        self, entry: Entry, seen: Iterator[tuple[Seen, Any]], items: Mapping[str, Item]
    ) -> None:
        """Answer one study, and write all that is said of it."""
        answer = self._one_decision if self._asked == "study" else self._each
        study, told = answer(entry, seen)
        if study is not None:
            study.lost, study.gaps = self._lost[entry.study], self._gaps
            study.unplaced = self._unplaced
            row = study.row()
            if entry.add("studies", row):
                self._add(entry, ToldStudy(told, row, study.refused, items, study.caveats))
            else:
                self.refuse(replace(study.named, place=f"study {entry.study}"), NOT_WRITTEN, entry)
        self._results.commit(entry)
        self._count(entry)

    def _each(
        self, entry: Entry, seen: Iterator[tuple[Seen, Any]]
    ) -> tuple[Study | None, list[Told]]:
        """Answer the images or volumes of a study one by one."""
        study: Study | None = None
        kept: list[Told] = []
        for one, answered in self._order.model.answers(seen, self._order.pictures):
            if not answered.answer.finite:
                self._refuse_seen([one], NOT_NUMBERS, entry)
                continue
            number = self._images + len(entry.rows["images"]) + 1
            row = self._rows.of_image(number, one, answered.answer, answered.calibrated)
            row |= self._pictured(row, answered.picture)
            if not entry.add("images", row):
                self._refuse_seen([one], NOT_WRITTEN, entry)
                continue
            self._draw(entry, row, answered.picture)
            study = study or Study(self._rows.spec, one.named)
            study.add(one, row)
            if self._order.additions:
                kept.append(Told(one.without_pixels, answered._replace(picture=None), row))
        return study, kept

    def _one_decision(
        self, entry: Entry, seen: Iterator[tuple[Seen, Any]]
    ) -> tuple[Study | None, list[Told]]:
        """Answer a study by one decision from its images."""
        of, pixels = self._collected(entry, seen)
        if not of:
            return None, []
        decided = self._order.model.decision(
            np.stack(pixels),
            [one.named.modality for one in of],
            of[0].named.patient,
            self._order.pictures,
        )
        if decided is None:
            listed_ones = ", ".join(self._rows.spec.input.modalities)
            self._refuse_seen(of, f"no image of its study is of {listed_ones}", entry)
            return None, []
        answer, calibrated, _ = decided.answered
        if not answer.finite:
            self._refuse_seen(of, NOT_NUMBERS, entry)
            return None, []
        study = Study(self._rows.spec, of[0].named)
        study.decided = self._rows.of_study(answer, calibrated)
        there = {of[number].named.modality for number in decided.seen}
        study.without = tuple(
            name for name in self._rows.spec.input.modalities if name not in there
        )
        weights = dict(zip(decided.seen, decided.weights.tolist(), strict=True))
        drawn = dict(zip(decided.seen, decided.pictures, strict=True))
        kept = []
        for place, one in enumerate(of):
            number = self._images + len(entry.rows["images"]) + 1
            row = self._rows.of_part(number, one, weights.get(place))
            if place in weights:
                row |= self._pictured(row, drawn[place])
            entry.add("images", row)
            self._draw(entry, row, drawn.get(place))
            study.add(one, row)
            kept.append(Told(one.without_pixels, decided.answered, row))
        return study, kept

    def _collected(
        self, entry: Entry, seen: Iterator[tuple[Seen, Any]]
    ) -> tuple[list[Seen], list[Any]]:
        """All images of a study; none, and they are refused, if they are too many to be held."""
        of: list[Seen] = []
        pixels: list[Any] = []
        room = self._order.reader.limits.stored_bytes
        for one, stored in seen:
            of.append(one.without_pixels)
            room -= stored.nbytes
            if room >= 0:
                pixels.append(stored)
        if room >= 0:
            return of, pixels
        self._refuse_seen(of, f"its study has {len(of)} images, more than are held at once", entry)
        return [], []

    def _refuse_seen(self, of: Iterable[Seen], reason: str, entry: Entry) -> None:
        """Refuse the objects of images that were read."""
        for named in dict.fromkeys(named for one in of for named in one.objects or (one.named,)):
            self.refuse(named, reason, entry)

    def _add(self, entry: Entry, study: ToldStudy) -> None:
        """Make what is made of a study besides; that it cannot be made costs no answer."""
        for addition in self._order.additions:
            try:
                for made in addition.of_study(study):
                    if isinstance(made, NotMade):
                        _enter(entry, made)
                    else:
                        number = self._results.number(addition.kind)
                        self._results.write(f"{addition.kind}/{number}.dcm", made)
            except Exception as error:
                # A header that is good enough to be decoded may still be no good to be written.
                if disk_refuses(error):
                    raise
                what = f"{addition.name} of study {entry.study}"
                _enter(entry, not_made(what, study.images[0].seen.named, error))

    def _pictured(self, row: Row, picture: Drawn | None) -> Row:
        """What a row says of its picture, which is named by the row's number alone."""
        if picture is None:
            missing = self._order.pictures is not None
            return {"caveats": [*row["caveats"], *[UNEXPLAINED] * missing]}
        return {
            "explanation": f"explanations/{row['number']:06}.png",
            "explains": picture.explains,
            "explained_by": list(picture.methods),
        }

    def _draw(self, entry: Entry, row: Row, picture: Drawn | None) -> None:
        """Write the picture of a row that is entered."""
        if picture is None:
            return
        self._results.write(row["explanation"], picture.png)
        if picture.likeness is not None:
            entry.likeness.append(picture.likeness)

    def _count(self, entry: Entry) -> None:
        """Count an entry in that lies on the disk."""
        self.summary.add(entry)
        self._images += len(entry.rows["images"])
        self._likeness += entry.likeness
        if self._order.pictures is not None:
            self._order.pictures.compared = len(self._likeness)


def _study_name(cohort: Cohort, row: int) -> str:
    return f"study {cohort.study_index[row] + 1}"


def _enter(entry: Entry, lost: NotMade) -> None:
    """Write down what is missing; its images are answered all the same."""
    entry.add(
        "not_made",
        {
            "what": lost.what,
            "patient_id": lost.named.patient,
            "issuer": lost.named.issuer,
            "study_instance_uid": lost.named.study,
            "reason": lost.reason,
        },
    )


def _of_cohort(use: Use) -> tuple[str, ...]:
    """What must be borne in mind of a cohort's images, which do not say what they are."""
    declared = (("modalities", use.modalities), ("body parts", use.body_parts))
    meant = "; ".join(f"{what} {', '.join(names)}" for what, names in declared if names)
    sides = use.smallest_side is not None or use.largest_side is not None
    said = [NO_MODALITY] * (not use.modalities) + [NO_BODY_PART] * (not use.body_parts)
    if meant or sides:
        meant = meant or "sides of its own"
        said.append(f"the model is meant for {meant}; whether this is one, a cohort does not say")
    return tuple(said)
