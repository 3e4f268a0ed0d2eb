"""A trained model on new studies: what they are, what it says of each image, what is written.

    look      every object says what it is; what the model is not meant for is refused by name
    read      the rest is decoded study by study over all cores, as the intake does it
    answer    batch by batch, in that order; rows go to the disk as they come
    finish    the folder takes its name

A refused object costs itself and no other. Memory holds what objects there are, and the images
and answers of one study.
"""

from __future__ import annotations

import itertools
import json
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
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
from client.prediction.answering import Answered, Drawn, Model, Pictures
from client.prediction.output import FORMAT, Results, check_target
from client.prediction.reading import (
    NO_BODY_PART,
    NO_MODALITY,
    Frame,
    Look,
    Looked,
    Named,
    Prepare,
    Prepared,
    StudyReader,
    reason_of,
)
from client.prediction.rows import HOW, WARNING, Row, Rows, Seen, Study, decided_by
from common.cohort import PIXEL_MAX, Cohort
from common.errors import CohortError, ConfigError, IntakeError, PackageError
from common.files import disk_refuses
from common.package import Package
from common.spec import Input, Use

Question = Look | Prepare
Reply = Looked | Prepared
Progress = Callable[[str, int, int], None]
"""Told what is being done, how much of it is done, and of how much."""

COPY = "a copy of another object, byte for byte, which is answered"
AMBIGUOUS = "other bytes have the same SOP Instance UID: one of them has a wrong one"
TWO_PATIENTS = "its study names two patients: whose it is, is not known"
TWO_ORDERS = "the objects of its study have different accession numbers"
UNEXPLAINED = "what moved its answer could not be drawn"
NOT_WRITTEN = "what is said of it holds a number that is none"
NOT_MADE = "it could not be made"
NOT_NUMBERS = "the network's outputs are not numbers"
PSEUDONYMS = "Pseudonyms of a cohort; its images have no true identifiers."
_AT_ONCE = 256
NO_CARD = "The model came without a card: for what it was made, and how well it does, is not said."
IDENTITIES = (
    "True identifiers of patients. This folder is readable by its owner alone and must stay "
    "within the hospital."
)


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


class Addition(Protocol):
    """Something more that is made of a study.

    Attributes:
        name: such as ``structured report``.
    """

    @property
    def name(self) -> str:
        """See `Addition`."""

    def of_study(
        self, items: Mapping[str, Item], images: Sequence[Told], refused: int
    ) -> Iterator[tuple[str, bytes] | NotMade]:
        """Files by name, and what could not be made.

        Args:
            items: finds each image's object by its place.
            images: of the study, that were answered.
            refused: how many of its objects were not.
        """


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
        images: that were answered.
        studies: with at least one such image.
        refused: what was not, and why.
        not_made: reports and segmentations that could not be made, and why.
        decisions: how many images each class was decided for.
    """

    images: int = 0
    studies: int = 0
    refused: list[NotUsed] = field(default_factory=list)
    not_made: list[NotUsed] = field(default_factory=list)
    decisions: Counter[str] = field(default_factory=Counter)


def predict(order: Order, progress: Progress | None = None, pool: Workers = Pool) -> Summary:
    """Answer all that can be answered; what cannot is named with its reason.

    Raises:
        ConfigError: if the results cannot be put where they should.
        IntakeError: if there is no such source.
        PackageError: if the model's card is of another preprocessing.
        RunError: if the disk is full.
    """
    check_target(order.target)
    check_card(order.model.package)
    listing = listed(order.source)
    workers = order.workers or len(os.sched_getaffinity(0))
    columns = columns_of(order.model)
    with (
        Results.at(order.target, columns, every_line(order.model)) as results,
        pool(order.reader, workers, order.bounds) as readers,
    ):
        work = _Prediction(order, results, progress or _silent)
        for gone in listing.unusable:
            work.refuse(Named(gone.what), gone.reason)
        work.objects(listing.items, readers)
        results.finish(_head_of(order))
    return work.summary


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
    columns = columns_of(order.model)
    with Results.at(order.target, columns, every_line(order.model)) as results:
        work = _Prediction(order, results, progress or _silent)
        work.cohort(cohort)
        results.finish(_head_of(order) | {"identities": PSEUDONYMS})
    return work.summary


def _silent(_what: str, _done: int, _total: int) -> None: ...


def _head_of(order: Order) -> dict[str, Any]:
    head = head_of(order.model)
    return head if order.pictures is None else head | {"explained": order.pictures.examined()}


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
        self._lost: Counter[str] = Counter()
        self._gaps: set[str] = set()

    def objects(self, items: Sequence[Item], readers: Mapper) -> None:
        """Look, then answer study by study."""
        by_place = {item.place: item for item in items}
        wanted = self._wanted(self._looked(items, readers))
        self._answer(self._images(wanted, by_place, readers), by_place)

    def cohort(self, cohort: Cohort) -> None:
        """Answer a cohort's images study by study."""
        self._answer(self._stored(cohort), {})

    def _answer(self, seen: Iterator[tuple[Seen, Any]], by_place: Mapping[str, Item]) -> None:
        answered = self._order.model.answers(seen, self._order.pictures)
        studies = itertools.groupby(answered, key=lambda one: one[0].named.study)
        for _, images in studies:
            self._study(images, by_place)

    def refuse(self, named: Named, reason: str) -> None:
        """Write down that an object is not answered."""
        self.summary.refused.append(NotUsed(named.place, reason))
        if reason != COPY:
            self._lost[named.study] += 1
            self._gaps.add(named.series)
        self._results.add(
            "refused",
            {
                "file": named.place,
                "patient_id": named.patient,
                "issuer": named.issuer,
                "study_instance_uid": named.study,
                "series_instance_uid": named.series,
                "sop_instance_uid": named.instance,
                "reason": reason,
            },
        )

    def _stored(self, cohort: Cohort) -> Iterator[tuple[Seen, Any]]:
        """A cohort's images, in the order of its studies."""
        said = _of_cohort(self._rows.spec.use)
        order = np.argsort(cohort.study_index, kind="stable")
        for start in range(0, len(order), _AT_ONCE):
            rows = order[start : start + _AT_ONCE]
            self._progress("Answering", start, len(order))
            stored = np.rint(cohort.images(rows) * PIXEL_MAX).astype(np.uint16)
            for row, pixels in zip(rows.tolist(), stored, strict=True):
                name = f"image {row + 1}"
                patient = cohort.patients[cohort.patient_index[row]]
                study = f"study {cohort.study_index[row] + 1}"
                named = Named(name, patient=patient, study=study, instance=name)
                yield Seen(named, Frame(0, pixels, None, said), pixels.shape[1:]), pixels
        self._progress("Answering", len(order), len(order))

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
        return sorted(self._of_one_patient(wanted), key=lambda named: named.order)

    def _of_one_patient(self, found: Sequence[Named]) -> Iterator[Named]:
        """The objects of studies that are of one patient, as a study has to be (PS3.3 A.1.2)."""
        patients: defaultdict[str, set[tuple[str, str]]] = defaultdict(set)
        for named in found:
            patients[named.study].add((named.issuer, named.patient))
        for named in found:
            if len(patients[named.study]) > 1:
                self.refuse(named, TWO_PATIENTS)
            else:
                yield named

    def _images(
        self, wanted: Sequence[Named], items: Mapping[str, Item], readers: Mapper
    ) -> Iterator[tuple[Seen, Any]]:
        """The images of these objects, in order; what cannot be read is refused on the way."""
        orders: defaultdict[str, set[str]] = defaultdict(set)
        for named in wanted:
            orders[named.study].add(named.accession)
        tasks = (Prepare(items[named.place], named.sha256) for named in wanted)
        replies = readers.map(tasks)
        for done, (named, reply) in enumerate(zip(wanted, replies, strict=True), start=1):
            self._progress("Answering", done, len(wanted))
            if isinstance(reply, Prepared) and not reply.reason:
                said = (TWO_ORDERS,) if len(orders[named.study]) > 1 else ()
                for frame in reply.frames:
                    told = replace(frame, caveats=(*frame.caveats, *said))
                    yield Seen(named, told, reply.size, reply.count), frame.pixels
            else:
                self.refuse(named, reply.reason if isinstance(reply, Prepared) else str(reply))

    def _study(self, images: Iterable[tuple[Seen, Answered]], items: Mapping[str, Item]) -> None:
        """Write what is said of one study."""
        study: Study | None = None
        kept: list[Told] = []
        for seen, answered in images:
            if not answered.answer.finite:
                self.refuse(seen.named, NOT_NUMBERS)
                continue
            study = study or Study(self._rows.spec, seen.named)
            row = self._rows.of_image(
                self.summary.images + 1, seen, answered.answer, answered.calibrated
            )
            row |= self._pictured(row, answered.picture)
            if not self._write(study, seen, row, answered.picture):
                self.refuse(seen.named, NOT_WRITTEN)
                continue
            if self._order.additions:
                kept.append(Told(seen.without_pixels, answered._replace(picture=None), row))
        if study is None or not study.images:
            return
        self.summary.studies += 1
        study.refused, study.gaps = self._lost.pop(study.named.study, 0), self._gaps
        self._add(study, items, kept)
        if not self._results.add("studies", study.row()):
            self.refuse(replace(study.named, place=f"study {study.named.study}"), NOT_WRITTEN)

    def _add(self, study: Study, items: Mapping[str, Item], kept: Sequence[Told]) -> None:
        """Make what is made of a study besides; that it cannot be made costs no answer."""
        for addition in self._order.additions:
            try:
                for made in addition.of_study(items, kept, study.refused):
                    if isinstance(made, NotMade):
                        self._not_made(made)
                    else:
                        self._results.write(*made)
            except Exception as error:
                # A header that is good enough to be decoded may still be no good to be written.
                if disk_refuses(error):
                    raise
                what = f"{addition.name} of study {study.named.study}"
                self._not_made(not_made(what, study.named, error))

    def _not_made(self, lost: NotMade) -> None:
        """Write down what is missing; its images are answered all the same."""
        self.summary.not_made.append(NotUsed(lost.what, lost.reason))
        self._results.add(
            "not_made",
            {
                "what": lost.what,
                "patient_id": lost.named.patient,
                "issuer": lost.named.issuer,
                "study_instance_uid": lost.named.study,
                "reason": lost.reason,
            },
        )

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

    def _write(self, study: Study, seen: Seen, row: Row, picture: Drawn | None) -> bool:
        """Write an image's row and picture, and count it in; False if it is no row."""
        if not self._results.add("images", row):
            return False
        if picture is not None:
            self._results.write(row["explanation"], picture.png)
        self.summary.images += 1
        decided = row.get("model_decision", ())
        self.summary.decisions.update([decided] if isinstance(decided, str) else decided)
        study.add(seen, row)
        return True


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


_WHO = ("patient_id", "issuer", "accession_number", "study_instance_uid")
_IMAGE = (
    "number",
    *_WHO,
    "series_instance_uid",
    "sop_instance_uid",
    "frame",
    "modality",
    "rows",
    "columns",
)
_LAST = ("model_sha256", "warning")
_REFUSED = (
    "file",
    "patient_id",
    "issuer",
    "study_instance_uid",
    "series_instance_uid",
    "sop_instance_uid",
    "reason",
)


def every_line(model: Model) -> dict[str, str]:
    """What each line of an answer says, for lines are copied out of their table."""
    return {"model_sha256": model.package.model_sha256, "warning": WARNING}


def columns_of(model: Model) -> dict[str, tuple[str, ...]]:
    """The columns of each CSV, which follow from the model alone."""
    task = model.package.spec.task
    image, study = _columns_by_kind(model)
    named = [
        tuple(
            f"{key} {{{name}}}" if by_class else key
            for key, by_class in columns
            for name in (_classes_of(task.kind, task.classes, key) if by_class else ("",))
        )
        for columns in (image, study)
    ]
    return {
        "images": (*_IMAGE, *named[0], "caveats", "file", "file_sha256", *_LAST),
        "studies": (*_WHO, "images", "refused", *named[1], "caveats", *_LAST),
        "refused": _REFUSED,
        "not_made": ("what", "patient_id", "issuer", "study_instance_uid", "reason"),
    }


def _classes_of(kind: str, classes: tuple[str, ...], key: str) -> tuple[str, ...]:
    return classes[1:] if kind == "mask" else classes


def _columns_by_kind(
    model: Model,
) -> tuple[tuple[tuple[str, bool], ...], tuple[tuple[str, bool], ...]]:
    """Of an image and of a study: the columns, and whether there is one for each class."""
    kind = model.package.spec.task.kind
    if kind == "mask":
        return (("pixels", True), ("area_mm2", True)), (("pixels", True),)
    if kind == "boxes":
        return (("boxes", False),), (("boxes", True), ("largest_score", True))
    if kind == "none":
        scores = (("mean_anomaly_score", False), ("largest_anomaly_score", False))
        return (("anomaly_score", False),), scores
    keys = ["raw_probability"] + ["probability"] * (model.calibration is not None)
    image = (("model_decision", False), *((key, True) for key in reversed(keys)))
    study = tuple((f"{how}_{key}", True) for key in reversed(keys) for how in ("mean", "largest"))
    return image, study


def warnings_of(package: Package) -> list[str]:
    """What must be borne in mind of a model: our own words first, then its card's.

    Raises:
        PackageError: if the card does not say it in text.
    """
    card = package.card
    if not card:
        return [WARNING, NO_CARD]
    said = [card.get(key, "") for key in ("not_for_clinical_use", "intended_use")]
    limitations = card.get("limitations", [])
    texts = [*said, *limitations] if isinstance(limitations, list) else [None]
    if not all(isinstance(text, str) for text in texts):
        raise PackageError(
            f"{package.path}: what its card says of its use and limitations is no text; expected "
            "one as `cloister export` writes it"
        )
    return [WARNING, *filter(None, texts)]


def head_of(model: Model) -> dict[str, Any]:
    """What ``predictions.json`` says before the rows."""
    package = model.package
    spec, signer = package.spec, package.signer
    return {
        "format": FORMAT,
        "made": datetime.now(UTC).isoformat(timespec="seconds"),
        "identities": IDENTITIES,
        "model": {
            "name": spec.name,
            "run_id": spec.run_id,
            "network": spec.model.name,
            "task": spec.task.name,
            "kind": spec.task.kind,
            "classes": list(spec.task.classes),
            "model_sha256": package.model_sha256,
            "spec_sha256": spec.digest,
            "preprocessing_sha256": spec.input.preprocessing_digest,
            "decision": decided_by(spec),
            "signed_by": signer and f"{signer.coordinator} of {signer.federation}",
            "calibration": package.calibration and package.calibration.model_dump(mode="json"),
            "intended_inputs": spec.use.model_dump(mode="json"),
        },
        "warnings": warnings_of(package),
        "aggregation": HOW,
    }
