"""New studies: first what each object says it is, then its images as a cohort has them.

Images are read object by object; of a run of volumes all objects of a series are one task.

Both happen in the intake's worker processes, and by the intake's own functions: the header goes
through the hospital's profile, text in the pixels is blanked, and brightness and shape follow the
run's `Input`, so that a network sees here what it was trained on. What is kept beside the pixels
is the opposite of a cohort's: the true identifiers, by which a hospital can act on an answer.
"""

from __future__ import annotations

import hashlib
import itertools
import re
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import BinaryIO
from unicodedata import normalize

import numpy as np
from numpy.typing import NDArray
from pydicom.datadict import tag_for_keyword
from pydicom.dataset import Dataset

from client.intake.deid.burned_in import risk_of
from client.intake.deid.classes import SECONDARY_CAPTURE, check_class
from client.intake.deid.seam import CleanFile, Deidentifier
from client.intake.deidentify import counted, quoted, text_of
from client.intake.dicom import NO_PICTURES, frames_of
from client.intake.display import PHOTOMETRICS, brightness
from client.intake.frames import Plane, plane_of
from client.intake.grids import brightness_to_grid, is_cut, laid_volume
from client.intake.items import Item
from client.intake.part10 import DicomFile, Directory, FrameDecoder, Geometry, Limits
from client.intake.pixels import placement, to_shape
from client.intake.quiet import quiet
from client.intake.scans import ScanFrame, brightness_of, frame_of_scan
from client.intake.volumes import volume_of
from client.prediction.anatomy import body_parts, contradicts, parts_of_frame
from client.prediction.geometry import Scan, Source
from common.errors import IntakeError
from common.spec import MOST_VOXELS, Input, Use

_UID = re.compile(r"[0-9]{1,64}(\.[0-9]{1,64})*")
_LONGEST_UID = 64
_PIECE = 2**20
_MOST_RUNS = 20
_LAST, _DIGITS = 2**31 - 1, 10
_LEAST_SPACING, _MOST_SPACING, _FARTHEST = 1e-4, 1e4, 1e6  # mm
NOWHERE = "where it lies cannot be: areas and volumes are not known"
_SEEN_AS_CUT = 0.5  # pixels: less is rounding
BLANKED = "what looks like text was blanked in some of its slices"
CUT_OFF = "what does not fit the model's input was cut off, and was not seen"
TWO_PARTS = "its Body Part Examined and the codes of its region name different parts of the body"
CHANGED = "it was changed while it was being read"
NO_MODALITY = "the model does not say for which modalities it is meant"
NO_BODY_PART = "the model does not say for which body parts it is meant"


_MAGIC, _MAGIC_END = b"DICM", 132
_BESIDE = (
    *("thumbs.db", "desktop.ini", "autorun.inf", ".txt", ".md", ".log", ".csv", ".json", ".xml"),
    *(".html", ".htm", ".css", ".js", ".pdf", ".rtf", ".doc", ".docx", ".exe", ".dll", ".jar"),
)


@dataclass(frozen=True, slots=True)
class Named:
    """Who and what an object is, as its header says.

    Attributes:
        place: its path within the source.
        sha256: of its bytes.
        issuer: of the patient's identifier, without which that may be of two patients.
        name: the patient's, as names are compared; of several ways to write it the first.
        birth: the patient's date of birth.
        sex: the patient's.
        beside: it is no object, and nobody takes it for one: a text, a page, a system's own file.
        number: its Instance Number, or the last there can be.
    """

    place: str
    sha256: str = ""
    patient: str = ""
    issuer: str = ""
    accession: str = ""
    study: str = ""
    series: str = ""
    instance: str = ""
    sop_class: str = ""
    modality: str = ""
    number: int = _LAST
    name: str = ""
    birth: str = ""
    sex: str = ""
    beside: bool = False

    @property
    def key(self) -> str:
        """What tells it from any other object, and from itself before it was changed."""
        return f"{self.sha256} {self.place}"

    @property
    def placed(self) -> bool:
        """Whether it is known of which series it is, or that it is of none."""
        return self.beside or is_uid(self.series)

    @property
    def order(self) -> tuple[str, str, int, str, str]:
        """By which objects are sorted: studies and series together, images as they were taken."""
        return self.study, self.series, self.number, self.instance, self.place


@dataclass(frozen=True)
class Looked:
    """What an object is, and why it is not answered; neither of a DICOMDIR, which is none."""

    named: Named
    reason: str = ""
    ignored: bool = False


@dataclass(frozen=True, eq=False)
class Frame:
    """One image as the network sees it.

    Attributes:
        number: of the frame, from 0.
        pixels: (channels, height, width) of the run, 0..65535.
        plane: where it lies in the patient; None where the header does not say.
    """

    number: int
    pixels: NDArray[np.uint16]
    plane: Plane | None = None
    caveats: tuple[str, ...] = ()


@dataclass(frozen=True)
class Prepared:
    """The images of one object, or why there are none.

    Attributes:
        size: rows and columns of the source.
        frames: that are answered.
        count: how many frames the object has.
        left_out: which frames are not answered, and why; empty if all are that the run takes.
    """

    reason: str = ""
    size: tuple[int, int] = (0, 0)
    frames: tuple[Frame, ...] = ()
    count: int = 0
    left_out: str = ""


@dataclass(frozen=True, eq=False)
class PreparedSeries:
    """The one volume of a series, or why there is none.

    Attributes:
        at: which object is at fault; None if it is the series as a whole.
        pixels: (channels, depth, height, width) of the run, 0..65535.
        scan: where its voxels lie; its sources number the objects as they were asked for.
    """

    reason: str = ""
    at: int | None = None
    pixels: NDArray[np.uint16] | None = None
    scan: Scan | None = None
    caveats: tuple[str, ...] = ()


@dataclass(frozen=True)
class Look:
    """A question to `StudyReader`: what is this?"""

    item: Item


@dataclass(frozen=True)
class Prepare:
    """A question to `StudyReader`: its images, if its bytes still are those of this SHA-256."""

    item: Item
    sha256: str


@dataclass(frozen=True)
class PrepareSeries:
    """A question to `StudyReader`: the volume that these objects are together."""

    objects: tuple[Prepare, ...]


class _FaultyError(IntakeError):
    """What is wrong with one object of a series."""

    def __init__(self, reason: str, at: int) -> None:
        super().__init__(reason)
        self.at = at


@dataclass(frozen=True)
class StudyReader:
    """Reads an object or a series at a time; works in any process, and raises nothing.

    Args:
        settings: the run's `Input`.
        use: what the model is meant for.
        deidentify: by which a cohort's pixels are made; its pseudonyms are not used.
        limits: what a file may ask for.
    """

    settings: Input
    use: Use
    deidentify: Deidentifier
    limits: Limits = field(default_factory=Limits)

    def __call__(self, task: Look | Prepare | PrepareSeries) -> Looked | Prepared | PreparedSeries:
        """Answer a question; all that is wrong with an object is in the answer."""
        if isinstance(task, Look):
            return self._look(task.item)
        return self._prepare(task) if isinstance(task, Prepare) else self._prepare_series(task)

    def _look(self, item: Item) -> Looked:
        named = Named(item.place)
        try:
            with quiet(), item.open(self.limits.read_bytes) as stream:
                sha256 = _digest(stream)
                file = DicomFile.parse(stream, self.limits)
                named = _named(item.place, sha256, file.header)
                self._check(file)
            return Looked(named)
        except Directory:
            return Looked(named, ignored=True)
        except Exception as error:  # noqa: BLE001
            # Parsers raise whatever the bytes of a broken file drive them to.
            return Looked(replace(named, beside=_lies_beside(item, self.limits)), reason_of(error))

    def _check(self, file: DicomFile) -> None:
        """Refuse what the header alone shows to be nothing for this model.

        Raises:
            IntakeError: with the reason.
        """
        header = file.header
        if kind := NO_PICTURES.get(text_of(header, "SOPClassUID")):
            raise IntakeError(f"it is {kind}, no picture of a patient")
        check_class(header)
        if text_of(header, "SOPClassUID") in SECONDARY_CAPTURE:
            raise IntakeError("it is a secondary capture, no image as a scanner makes it")
        for keyword in ("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID"):
            if not is_uid(text_of(header, keyword)):
                raise IntakeError(f"its {keyword} is missing or no UID: no answer could name it")
        photometric = text_of(header, "PhotometricInterpretation")
        if photometric not in PHOTOMETRICS:
            raise IntakeError(
                f"its photometric interpretation is {quoted(photometric)}; expected one of "
                f"{', '.join(PHOTOMETRICS)}"
            )
        check_use(self.use, header, file.geometry(self.limits))
        file.pixel_element()

    def _prepare(self, task: Prepare) -> Prepared:
        try:
            with quiet(), task.item.open(self.limits.read_bytes) as stream:
                check_same(stream, task.sha256)
                return self._prepared(DicomFile.parse(stream, self.limits))
        except Exception as error:  # noqa: BLE001
            # Codecs raise whatever the bytes of a broken file drive them to.
            return Prepared(reason_of(error))

    def _prepared(self, file: DicomFile) -> Prepared:
        element = file.pixel_element()
        geometry = file.geometry(self.limits)
        decode = FrameDecoder(file, element, geometry)
        clean, said = self.deidentify(file.header), caveats_of(self.use, file.header)
        if self._cut_off(geometry):
            said = (*said, CUT_OFF)
        wanted = frames_of(geometry, self.settings, self.limits)
        shown = [number for number in wanted if is_meant(self.use, file.header, number)]
        left_out = _left_out(self.use, file.header, sorted({*wanted} - {*shown}))
        if not shown:
            raise IntakeError(left_out)
        frames = tuple(self._frame(file.header, clean, decode, number, said) for number in shown)
        return Prepared("", (geometry.rows, geometry.columns), frames, geometry.frames, left_out)

    def _prepare_series(self, task: PrepareSeries) -> PreparedSeries:
        try:
            with quiet():
                return self._prepared_series(task)
        except _FaultyError as error:
            return PreparedSeries(str(error), error.at)
        except Exception as error:  # noqa: BLE001
            # What comes together from many headers may be anything at all.
            return PreparedSeries(reason_of(error))

    def _prepared_series(self, task: PrepareSeries) -> PreparedSeries:
        """As the intake makes a volume of a series (`client.intake.annotated`)."""
        frames: list[ScanFrame] = []
        sources: list[Source] = []
        said: dict[str, None] = {}
        for at, one in enumerate(task.objects):
            try:
                with one.item.open(self.limits.read_bytes) as stream:
                    check_same(stream, one.sha256)
                    file = DicomFile.parse(stream, self.limits)
                    self._take(file, at, frames, sources, said)
            except Exception as error:
                raise _FaultyError(reason_of(error), at) from error
        volume = volume_of([frame.slice for frame in frames])
        direction = self.settings.direction or "axial"
        bright = laid_volume(brightness_of(volume, frames, self.settings.window), direction)
        if self.settings.fit == "crop" and is_cut(bright, self.settings):
            said[CUT_OFF] = None
        pixels = brightness_to_grid(bright, self.settings)
        return PreparedSeries("", None, pixels, Scan.of(volume, sources), tuple(said))

    def _take(
        self,
        file: DicomFile,
        at: int,
        frames: list[ScanFrame],
        sources: list[Source],
        said: dict[str, None],
    ) -> None:
        """Enter the frames of object number `at`, and what must be borne in mind of it."""
        element, geometry = file.pixel_element(), file.geometry(self.limits)
        if (len(frames) + geometry.frames) * geometry.rows * geometry.columns > MOST_VOXELS:
            raise IntakeError(f"its series has more than {MOST_VOXELS} voxels, which are not held")
        decode, clean = FrameDecoder(file, element, geometry), self.deidentify(file.header)
        said |= dict.fromkeys(caveats_of(self.use, file.header))
        every = range(geometry.frames)
        strange = [number for number in every if not is_meant(self.use, file.header, number)]
        if strange:
            raise IntakeError(_left_out(self.use, file.header, strange))
        for number in every:
            if contradicts(file.header, number):
                said[TWO_PARTS] = None
            stored = decode(number)
            shown = brightness(stored, clean.header, number, self.settings.window)
            kept = clean.frame(number, shown)
            if kept.boxes:
                said[BLANKED] = None
            frames.append(frame_of_scan(clean.header, number, stored, kept, self.settings.window))
            sources.append(Source(at, number, plane_of(file.header, number)))

    def _cut_off(self, geometry: Geometry) -> bool:
        """Whether the run's fit leaves out part of the image."""
        box = placement(geometry.rows, geometry.columns, self.settings).box
        if box is None:
            return False
        cut = np.subtract(box, (0, 0, geometry.columns, geometry.rows))
        return bool(np.abs(cut).max() >= _SEEN_AS_CUT)

    def _frame(
        self,
        header: Dataset,
        clean: CleanFile,
        decode: FrameDecoder,
        number: int,
        said: tuple[str, ...],
    ) -> Frame:
        """What the intake does to a frame of a file for a cohort (`client.intake.dicom`)."""
        shown = brightness(decode(number), clean.header, number, self.settings.window)
        kept = clean.frame(number, shown)
        if contradicts(header, number):
            said = (*said, TWO_PARTS)
        if kept.boxes:
            said = (*said, f"what looks like text was blanked: {counted(len(kept.boxes))} boxes")
        plane = None
        with suppress(IntakeError):
            plane = plane_of(header, number)
        if plane is not None and not _possible(plane):
            plane, said = None, (*said, NOWHERE)
        return Frame(number, to_shape(kept.pixels, self.settings), plane, said)


def is_uid(text: str) -> bool:
    """Whether a text is an UID (PS3.5 9.1)."""
    return len(text) <= _LONGEST_UID and _UID.fullmatch(text) is not None


def check_use(use: Use, header: Dataset, geometry: Geometry) -> None:
    """Refuse an image for which the model is not meant, or that does not say what it is.

    Raises:
        IntakeError: with what was seen, and what is declared.
    """
    modality = text_of(header, "Modality").upper()
    seen = (
        ("modality", (modality,) if modality else (), use.modalities),
        ("body part", body_parts(header), use.body_parts),
    )
    for what, named, declared in seen:
        if declared and not set(named) & set(declared):
            told = ", ".join(map(quoted, named)) or "not given"
            raise IntakeError(f"its {what} is {told}; the model is meant for {', '.join(declared)}")
    sides = (geometry.rows, geometry.columns)
    shown = f"it has {counted(sides[0])} x {counted(sides[1])} pixels; the model is meant for"
    if use.smallest_side is not None and min(sides) < use.smallest_side:
        raise IntakeError(f"{shown} sides of at least {use.smallest_side}")
    if use.largest_side is not None and max(sides) > use.largest_side:
        raise IntakeError(f"{shown} sides of at most {use.largest_side}")


def is_meant(use: Use, header: Dataset, number: int) -> bool:
    """Whether the model is meant for the part of the body that frame `number`, from 0, shows."""
    return not use.body_parts or bool({*parts_of_frame(header, number)} & {*use.body_parts})


def _left_out(use: Use, header: Dataset, frames: Sequence[int]) -> str:
    """Why frames, numbered from 0, are not answered; empty if there are none."""
    if not frames:
        return ""
    parts = dict.fromkeys(part for one in frames for part in parts_of_frame(header, one))
    told = ", ".join(map(quoted, parts)) or "not given"
    which = f"{'frame' if len(frames) == 1 else 'frames'} {_runs_of(frames)}"
    meant = ", ".join(use.body_parts)
    return f"the body part of its {which} is {told}; the model is meant for {meant}"


def _runs_of(frames: Sequence[int]) -> str:
    """Numbers of frames as DICOM counts, from 1, in as few words as they need, and not too many."""
    runs = [
        [number + 1 for _, number in run]
        for _, run in itertools.groupby(enumerate(frames), lambda pair: pair[1] - pair[0])
    ]
    said = [str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs]
    return ", ".join(said[:_MOST_RUNS]) + ", and others" * (len(said) > _MOST_RUNS)


def caveats_of(use: Use, header: Dataset) -> tuple[str, ...]:
    """What whoever reads an answer must bear in mind of this object."""
    said = []
    if not use.modalities:
        said.append(NO_MODALITY)
    if not use.body_parts:
        said.append(NO_BODY_PART)
    if risk := risk_of(header):
        said.append(f"{risk}: text in its pixels is likely, and may have moved the answer")
    if text_of(header, "LossyImageCompression") == "01":
        said.append("it was compressed with loss")
    if text_of(header, "PresentationIntentType").upper() == "FOR PROCESSING":
        said.append("it is for processing, not for presentation")
    return tuple(said)


def reason_of(error: Exception) -> str:
    """Why an object is not answered; the text of a foreign error is not shown: it may quote."""
    if isinstance(error, IntakeError):
        return str(error)
    if isinstance(error, MemoryError):
        return "it needs more memory than a worker may take"
    if isinstance(error, OSError) and error.strerror:
        return f"cannot be read ({error.strerror})"
    return f"cannot be read ({type(error).__name__})"


def _lies_beside(item: Item, limits: Limits) -> bool:
    """Whether a file is what a medium or a system puts beside objects: by its name and beginning.

    A file without such a name may be an object that was damaged.
    """
    name = item.place.rpartition("/")[2].lower()
    if not (name.startswith(".") or name.endswith(_BESIDE)):
        return False
    try:
        with item.open(limits.read_bytes) as stream:
            return stream.read(_MAGIC_END)[-len(_MAGIC) :] != _MAGIC
    except (IntakeError, OSError):
        return False


def _named(place: str, sha256: str, header: Dataset) -> Named:
    """Who and what it is; nothing of a header's last element, which may have been cut off.

    Of a whole image that is one of its pixels' description.
    """
    last = max(header.keys(), default=None)

    def said(keyword: str) -> str:
        return "" if tag_for_keyword(keyword) == last else text_of(header, keyword)

    number = said("InstanceNumber")
    return Named(
        place=place,
        sha256=sha256,
        patient=said("PatientID"),
        issuer=said("IssuerOfPatientID"),
        accession=said("AccessionNumber"),
        study=said("StudyInstanceUID"),
        series=said("SeriesInstanceUID"),
        instance=said("SOPInstanceUID"),
        sop_class=said("SOPClassUID"),
        modality=said("Modality").upper(),  # some devices write it small
        number=int(number) if number.isdecimal() and len(number) < _DIGITS else _LAST,
        name="" if tag_for_keyword("PatientName") == last else _name_of(header),
        birth="".join(filter(str.isdecimal, said("PatientBirthDate"))),
        sex=said("PatientSex").upper(),
    )


def is_one_patient(objects: Iterable[Named]) -> bool:
    """Whether objects may be of one patient; a patient without an identifier is told by the name.

    Who has one identifier, but two names, may have married, or was spelled in two ways.
    """
    every = list(objects)
    whose = {(one.issuer, one.patient, "" if one.patient else one.name) for one in every}
    births, sexes = ({getattr(one, of) for one in every} - {""} for of in ("birth", "sex"))
    return max(map(len, (whose, births, sexes))) <= 1


def _name_of(header: Dataset) -> str:
    """The patient's name; case, width, and how its parts are set apart say nothing (PS3.5 6.2.1).

    Of several ways to write it the first.
    """
    name = normalize("NFKC", str(header.get("PatientName") or "")).casefold()
    ways = (way.replace("^", " ").split() for way in name.split("="))
    return next(filter(None, map(" ".join, ways)), "")


def check_same(stream: BinaryIO, sha256: str) -> None:
    """See that these are the bytes by which an answer names its patient.

    Raises:
        IntakeError: if they are others.
    """
    if _digest(stream) != sha256:
        raise IntakeError(CHANGED)


def _possible(plane: Plane) -> bool:
    """Whether a frame lies where a patient can."""
    spaced = all(_LEAST_SPACING <= gap <= _MOST_SPACING for gap in plane.spacing)
    return spaced and bool((np.abs(plane.position) < _FARTHEST).all())


def _digest(stream: BinaryIO) -> str:
    """SHA-256 of a stream from its beginning, where it stands again afterwards."""
    digest = hashlib.sha256()
    while piece := stream.read(_PIECE):
        digest.update(piece)
    stream.seek(0)
    return digest.hexdigest()
