"""Answers as DICOM: a structured report of a study, and segmentations of its series.

The report is a Comprehensive SR after TID 1500 (PS3.16): the model is its observing device, and no
person has verified it. A segmentation has the geometry of its source, pixel by pixel (PS3.3
A.51). Both are made by highdicom, of the study's own identifiers; their files are named by
numbers of ours.

Class names have no codes of a terminology: they stand in a private scheme, ``99CLOISTER``, each
under a hash of itself, so that one code is of one name whatever the model.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property, partial
from importlib.metadata import version
from typing import Any

import numpy as np
from highdicom import UID, AlgorithmIdentificationSequence
from highdicom import seg as hdseg
from highdicom import sr as hdsr
from highdicom._standard_utils import ModuleUsageValues, get_module_usage
from numpy.typing import NDArray
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.sr.codedict import codes
from pydicom.sr.coding import Code
from pydicom.uid import ExplicitVRLittleEndian

from client.intake.deidentify import text_of
from client.intake.frames import Plane, plane_of
from client.intake.items import Item
from client.intake.part10 import DicomFile, Limits
from client.intake.quiet import quiet
from client.prediction.geometry import mask_to_source
from client.prediction.predict import NotMade, Told, ToldStudy, not_made
from client.prediction.reading import Named, check_same
from client.prediction.rows import WARNING, Row, decided_by
from common.errors import IntakeError
from common.package import Package
from common.spec import RunSpec

MAKER = "Cloister"
SCHEME = "99CLOISTER"

_Group = (
    hdsr.MeasurementsAndQualitativeEvaluations | hdsr.PlanarROIMeasurementsAndQualitativeEvaluations
)
Mask = NDArray[np.unsignedinteger[Any]]
_LONGEST, _SHORT_TEXT, _HASHED = 64, 16, 10
_UTF_8 = "ISO_IR 192"
_SAME = 4  # decimals of a cosine or of a spacing in mm
_MOST_PIXELS = 2**27
"""Of one segmentation: a longer series becomes several, a larger object none."""
_SERIES = {"sr": 9901, "seg": 9902}
_DATE, _TIME = re.compile(r"\d{8}"), re.compile(r"\d{2}(\d{2}(\d{2}(\.\d{1,6})?)?)?")
_FORMS = {"PatientBirthDate": _DATE, "StudyDate": _DATE, "StudyTime": _TIME}
_PLACE = ("FrameOfReferenceUID", "ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing")
_SIZES = (
    ("pixels", "pix", "Pixels", Code("{pixels}", "UCUM", "pixels")),
    ("voxels", "vox", "Voxels", Code("{voxels}", "UCUM", "voxels")),
    ("area_mm2", "area", "Area", codes.UCUM.SquareMillimeter),
    ("volume_mm3", "volume", "Volume", codes.UCUM.CubicMillimeter),
)
_PATIENT = (
    "PatientName",
    "PatientID",
    "IssuerOfPatientID",
    "PatientBirthDate",
    "PatientSex",
    "AccessionNumber",
    "StudyID",
    "StudyDate",
    "StudyTime",
    "ReferringPhysicianName",
)


@dataclass(frozen=True)
class _Objects:
    """What both kinds of objects say of the model that they are of."""

    package: Package
    limits: Limits = field(default_factory=Limits)

    @property
    def spec(self) -> RunSpec:
        """The run's."""
        return self.package.spec

    @property
    def model(self) -> str:
        """What tells one model from another."""
        return self.package.model_sha256

    @cached_property
    def device(self) -> UID:
        """The observer: the same of the same weights (PS3.5 B.2)."""
        return UID(f"2.25.{int(self.model[:32], 16)}")

    @property
    def parameters(self) -> list[str]:
        """What has to be known of an answer, in lines as short as DICOM has them."""
        calibration = self.package.calibration
        said = [
            WARNING,
            f"model sha256 {self.model[:32]}",
            f"model sha256 (2) {self.model[32:]}",
            _cut(decided_by(self.spec)),
        ]
        if calibration is not None:
            heats = " ".join(f"{heat:.4g}" for heat in calibration.temperatures)
            said.append(_cut(f"temperature {heats}"))
        return said

    def header(self, item: Item, sha256: str) -> Dataset:
        """The header of an object, read again, with all that has to stand in one.

        What of patient and study is missing is empty, and so is a date or time that is none.

        Raises:
            IntakeError: if the object is another than the one that was answered.
        """
        with quiet(), item.open(self.limits.read_bytes) as stream:
            check_same(stream, sha256)
            file = DicomFile.parse(stream, self.limits)
        found = FileDataset("", file.header, file_meta=FileMetaDataset())
        for keyword in _PATIENT:
            if keyword not in found:
                setattr(found, keyword, "")
        for keyword, form in _FORMS.items():
            if not form.fullmatch(text_of(found, keyword)):
                setattr(found, keyword, "")
        found.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        return found

    @property
    def description(self) -> str:
        """Of a series: what is cut off is the end of the model's name, never the warning."""
        return _cut(f"NOT FOR CLINICAL USE: {self.spec.name}")

    def code(self, key: str, meaning: str, of: str = "") -> Code:
        """A code of our own; of what is said by class the name's hash is in it."""
        value = f"{key}-{hashlib.sha256(of.encode()).hexdigest()[:_HASHED]}" if of else key
        return Code(value[:_SHORT_TEXT], SCHEME, _cut(meaning))


@dataclass(frozen=True)
class Reports(_Objects):
    """A structured report of each study, ``sr/N.dcm``."""

    name, kind = "structured report", "sr"

    def of_study(self, study: ToldStudy) -> Iterator[bytes]:
        """The report of one study."""
        objects = _objects_of(study.images)
        count = len(objects)
        part = f"answered {count} of {count + study.refused} objects of the study"
        said = (WARNING, part, *study.caveats)
        first = objects[0]
        with quiet():
            source = self._source(self.header(study.items[first.place], first.sha256))
            evidence = [self._evidence(source, named) for named in objects]
            groups = list(self._groups(study, said))
            report = hdsr.MeasurementReport(
                observation_context=hdsr.ObservationContext(observer_device_context=self._device),
                procedure_reported=codes.SCT.ImagingProcedure,
                imaging_measurements=groups,
                title=codes.DCM.ImagingMeasurementReport,
            )
            document = hdsr.ComprehensiveSR(
                evidence=evidence,
                content=report[0],
                series_instance_uid=UID(),
                series_number=_SERIES["sr"],
                sop_instance_uid=UID(),
                instance_number=1,
                manufacturer=MAKER,
                is_complete=False,
                is_final=False,
                is_verified=False,
            )
            document.SeriesDescription = self.description
            yield _bytes_of(document)

    @property
    def _device(self) -> hdsr.ObserverContext:
        said = hdsr.DeviceObserverIdentifyingAttributes(
            uid=self.device,
            name=_cut(self.spec.name),
            manufacturer_name=MAKER,
            model_name=_cut(self.spec.model.name),
            serial_number=self.model,
        )
        return hdsr.ObserverContext(codes.DCM.Device, said)

    @cached_property
    def _algorithm(self) -> hdsr.AlgorithmIdentification:
        return hdsr.AlgorithmIdentification(
            name=_cut(self.spec.name),
            version=self.model[:_SHORT_TEXT],
            parameters=self.parameters,
            family=codes.DCM.ArtificialIntelligence,
            manufacturer=MAKER,
        )

    def _source(self, header: Dataset) -> Dataset:
        """Patient and study of a header, and nothing else of it."""
        source = Dataset()
        for keyword in _PATIENT:
            setattr(source, keyword, header.get(keyword, ""))
        return source

    def _evidence(self, source: Dataset, named: Named) -> Dataset:
        one = Dataset()
        one.update(source)
        one.SOPClassUID, one.SOPInstanceUID = named.sop_class, named.instance
        one.StudyInstanceUID, one.SeriesInstanceUID = named.study, named.series
        return one

    def _groups(self, study: ToldStudy, said: Sequence[str]) -> Iterator[_Group]:
        """Of a model of studies one group; else one an image or volume, or of each a box."""
        if self.spec.input.of_studies:
            seen = [told for told in study.images if told.row["seen"]]
            yield self._said(self._measured("study", study.row, seen), said, study.row)
            return
        for told in study.images:
            boxes = told.row.get("boxes")
            groups: Iterable[_Group]
            if boxes:
                groups = (self._box(told, number, box) for number, box in enumerate(boxes))
            else:
                groups = [self._measured(_name_of(told), told.row, [told])]
            for group in groups:
                yield self._said(group, said, told.row)

    @staticmethod
    def _said(group: _Group, said: Sequence[str], row: Row) -> _Group:
        """With the warning, and all that whoever reads a group must bear in mind."""
        text = "; ".join(dict.fromkeys((*said, *row["caveats"])))
        group[0].ContentSequence.append(
            hdsr.TextContentItem(codes.DCM.Comment, text, hdsr.RelationshipTypeValues.CONTAINS)
        )
        return group

    def _measured(
        self, name: str, row: Row, of: Sequence[Told]
    ) -> hdsr.MeasurementsAndQualitativeEvaluations:
        """All that a row says, of these images or volumes."""
        return hdsr.MeasurementsAndQualitativeEvaluations(
            tracking_identifier=_tracking(name),
            algorithm_id=self._algorithm,
            measurements=list(self._measurements(row)),
            qualitative_evaluations=list(self._decisions(row)),
            source_images=[source for told in of for source in _sources_of(told)],
        )

    def _measurements(self, row: Row) -> Iterator[hdsr.Measurement]:
        units = {"probability": codes.UCUM.NoUnits, "raw_probability": codes.UCUM.NoUnits}
        titles = {"probability": "Probability", "raw_probability": "Probability, not calibrated"}
        for key, title in titles.items():
            for name, value in (row.get(key) or {}).items():
                code = self.code(key[:3], f"{title}: {name}", name)
                yield hdsr.Measurement(code, value, units[key])
        for key, short, title, unit in _SIZES:
            for name, value in row.get(key, {}).items():
                if value is not None:
                    yield hdsr.Measurement(self.code(short, f"{title}: {name}", name), value, unit)
        if "anomaly_score" in row:
            code = self.code("anomaly", "Anomaly score")
            yield hdsr.Measurement(code, row["anomaly_score"], codes.UCUM.NoUnits)

    def _decisions(self, row: Row) -> Iterator[hdsr.QualitativeEvaluation]:
        said = row.get("model_decision", ())
        for name in [said] if isinstance(said, str) else said:
            yield hdsr.QualitativeEvaluation(
                self.code("decision", "Class that the model decided for"),
                self.code("class", name, name),
            )

    def _box(
        self, told: Told, number: int, box: Row
    ) -> hdsr.PlanarROIMeasurementsAndQualitativeEvaluations:
        named, kind = told.seen.named, box["class"]
        left, top, right, bottom = (box[side] for side in ("left", "top", "right", "bottom"))
        corners = [[left, top], [right, top], [right, bottom], [left, bottom], [left, top]]
        source = hdsr.SourceImageForRegion(
            UID(named.sop_class), UID(named.instance), _frames_of(told)
        )
        region = hdsr.ImageRegion(
            hdsr.GraphicTypeValues.POLYLINE, np.array(corners), source_image=source
        )
        return hdsr.PlanarROIMeasurementsAndQualitativeEvaluations(
            tracking_identifier=_tracking(f"image {told.row['number']} box {number + 1}"),
            referenced_region=region,
            finding_type=self.code("class", kind, kind),
            algorithm_id=self._algorithm,
            measurements=[
                hdsr.Measurement(
                    self.code("score", "Certainty of a box"), box["score"], codes.UCUM.NoUnits
                )
            ],
        )


@dataclass(frozen=True)
class _Piece:
    """One frame of a source and its mask, which is made when it is asked for: it may be large."""

    named: Named
    frame: int
    count: int
    size: tuple[int, int]
    plane: Plane | None
    mask: Callable[[], Mask]

    @property
    def placed(self) -> bool:
        """Whether where it lies is known: a position says nothing without what it is told by."""
        return self.plane is not None and bool(self.plane.reference)

    @property
    def position(self) -> tuple[float, ...]:
        """Where its first pixel lies; nothing where that is not known."""
        found = () if self.plane is None else self.plane.position.round(_SAME) + 0.0
        return tuple(map(float, found))

    @property
    def where(self) -> tuple[str | float, ...]:
        """All of where it lies but its position; nothing where that is not known."""
        if self.plane is None or not self.placed:
            return ()
        plane = self.plane
        numbers = np.concatenate([plane.across, plane.down, plane.spacing]).round(_SAME)
        return plane.reference, *(numbers + 0.0).tolist()

    @property
    def together(self) -> tuple[object, ...]:
        """What all frames of one segmentation have in common."""
        many = self.count > 1
        apart = self.where if self.placed and not many else (self.named.instance,)
        return self.named.series, self.size, self.named.sop_class, many, apart


@dataclass(frozen=True)
class Segmentations(_Objects):
    """The masks of each series, ``seg/N.dcm``; none where nothing was found."""

    name, kind = "segmentation", "seg"

    def of_study(self, study: ToldStudy) -> Iterator[bytes | NotMade]:
        """One object a series, or several of a long one; of a multi-frame source one each.

        That there can be none of one series costs no other series its own.
        """
        pieces = [piece for told in study.images for piece in self._pieces(told)]
        for part in _parts_of(pieces):
            try:
                content = self._content(study.items, part)
            except Exception as error:  # noqa: BLE001
                # highdicom raises whatever a header that does not fit drives it to.
                what = f"{self.name} of series {part[0].named.series}"
                yield not_made(what, part[0].named, error)
                continue
            if content:
                yield content

    def _pieces(self, told: Told) -> Iterator[_Piece]:
        """The masks of an image, or of each slice of a volume in the order of its sources."""
        seen, mask = told.seen, told.answered.answer.mask
        if mask is None:
            return
        settings, kind, scan = self.spec.input, self._type, seen.scan
        if scan is None:

            def of_image() -> Mask:
                return mask_to_source(mask, seen.size, settings).astype(kind)

            yield _Piece(
                seen.named, seen.frame.number, seen.count, seen.size, seen.frame.plane, of_image
            )
            return

        @cache
        def of_volume() -> Mask:
            return scan.back(mask, settings).astype(kind)

        frames = Counter(source.at for source in scan.sources)
        for number, (at, frame, plane) in enumerate(scan.sources):
            yield _Piece(
                seen.objects[at],
                frame,
                frames[at],
                seen.size,
                plane,
                partial(_nth, of_volume, number),
            )

    def _content(self, items: Mapping[str, Item], part: Sequence[_Piece]) -> bytes:
        """Of one segmentation; empty where nothing was found.

        Raises:
            IntakeError: if its source has more frames than can be held at its own size: DICOM
                knows no segmentation of some frames that highdicom would make.
        """
        count, (rows, columns) = part[0].count, part[0].size
        if count > 1 and count * rows * columns > _MOST_PIXELS:
            raise IntakeError(
                f"its masks are {count} frames of {rows} x {columns} pixels; at most "
                f"{_MOST_PIXELS} pixels of one object are held"
            )
        masks = [piece.mask() for piece in part]
        if not any(mask.any() for mask in masks):
            return b""
        with quiet():
            return _bytes_of(self._segmentation(items, part, masks))

    @property
    def _type(self) -> type[np.uint8] | type[np.uint16]:
        return np.uint8 if len(self.spec.task.classes) <= 256 else np.uint16

    def _segmentation(
        self,
        items: Mapping[str, Item],
        part: Sequence[_Piece],
        masks: list[Mask],
    ) -> Dataset:
        named = dict.fromkeys(piece.named for piece in part)
        sources = [self.header(items[one.place], one.sha256) for one in named]
        if len({piece.where for piece in part}) > 1:
            raise IntakeError("its frames differ in direction or pixel spacing")
        placed = part[0].placed
        if not placed:
            for source, keyword in itertools.product(sources, _PLACE):
                source.pop(keyword, None)
        _check_place(sources[0], part[0].count, placed)
        stack = np.stack(masks)
        if part[0].count > 1:
            stack = np.zeros((part[0].count, *masks[0].shape), dtype=self._type)
            for piece, mask in zip(part, masks, strict=True):
                stack[piece.frame] = mask
        made = hdseg.Segmentation(
            source_images=sources,
            pixel_array=stack,
            segmentation_type=hdseg.SegmentationTypeValues.BINARY,
            segment_descriptions=self._described,
            series_instance_uid=UID(),
            series_number=_SERIES["seg"],
            sop_instance_uid=UID(),
            instance_number=1,
            manufacturer=MAKER,
            manufacturer_model_name=_cut(self.spec.name),
            software_versions=version("cloister"),
            device_serial_number=self.model,
            content_label="CLOISTER",
            content_description=WARNING,
            specific_character_set=_UTF_8,
        )
        made.SeriesDescription = self.description
        if not placed:
            made.PatientOrientation = ""  # of type 2C where no orientation is known (PS3.3 C.7.6.1)
        return made

    @cached_property
    def _described(self) -> list[hdseg.SegmentDescription]:
        algorithm = AlgorithmIdentificationSequence(
            name=_cut(self.spec.name),
            family=codes.DCM.ArtificialIntelligence,
            version=self.model,
            source=MAKER,
        )
        return [
            hdseg.SegmentDescription(
                segment_number=number,
                segment_label=_cut(name),
                segmented_property_category=codes.SCT.SpatialAndRelationalConcept,
                segmented_property_type=self.code("class", name, name),
                algorithm_type=hdseg.SegmentAlgorithmTypeValues.AUTOMATIC,
                algorithm_identification=algorithm,
            )
            for number, name in enumerate(self.spec.task.classes)
            if number
        ]


def _check_place(source: Dataset, count: int, placed: bool) -> None:
    """See that there can be a segmentation of an image or of `count` frames that lie so.

    Raises:
        IntakeError: if there cannot.
    """
    if not placed:
        if count > 1:
            raise IntakeError(
                "it has several frames and does not say where they lie, or in which frame of "
                "reference; a segmentation is then of one frame alone"
            )
        usage = get_module_usage("frame-of-reference", source.SOPClassUID)
        if usage is ModuleUsageValues.MANDATORY:
            raise IntakeError(
                "it does not say where it lies, or in which frame of reference; an object of its "
                "kind has to, and so has its segmentation"
            )
    elif count > 1:
        places = [tuple(plane_of(source, number).position.round(_SAME)) for number in range(count)]
        if len({*places}) < count:
            raise IntakeError("several of its frames lie at one place, such as echoes or phases")


def _parts_of(pieces: Sequence[_Piece]) -> Iterator[list[_Piece]]:
    """Frames that go into one segmentation: of one series and geometry, and not too many.

    A segmentation has one pixel spacing, one direction and one frame of reference for all, and of
    single images no two at one place: the first echo at each place is one, the second another.
    """

    def together(piece: _Piece) -> tuple[object, ...]:
        return piece.together

    for _, group in itertools.groupby(sorted(pieces, key=together), key=together):
        for part in _without_doubles(group):
            most = max(1, _MOST_PIXELS // max(1, part[0].size[0] * part[0].size[1]))
            step = len(part) if part[0].count > 1 else most
            yield from (part[start : start + step] for start in range(0, len(part), step))


def _without_doubles(group: Iterable[_Piece]) -> list[list[_Piece]]:
    """Frames in sets of which none has a place twice; those of one object stay together."""
    sets: list[list[_Piece]] = []
    seen: Counter[tuple[float, ...]] = Counter()
    for piece in group:
        number = seen[piece.position] if piece.count == 1 else 0
        seen[piece.position] += 1
        if number == len(sets):
            sets.append([])
        sets[number].append(piece)
    return sets


def _nth(volume: Callable[[], Mask], number: int) -> Mask:
    one: Mask = volume()[number]
    return one


def _objects_of(images: Sequence[Told]) -> list[Named]:
    """The objects of images and volumes, each once, in order."""
    every = (named for told in images for named in told.seen.objects or (told.seen.named,))
    return list({named.instance: named for named in every}.values())


def _name_of(told: Told) -> str:
    return f"{'volume' if told.seen.objects else 'image'} {told.row['number']}"


def _sources_of(told: Told) -> list[hdsr.SourceImageForMeasurementGroup]:
    """What an image or a volume is in the PACS."""
    seen = told.seen
    return [
        hdsr.SourceImageForMeasurementGroup(
            UID(named.sop_class), UID(named.instance), _frames_of(told)
        )
        for named in seen.objects or (seen.named,)
    ]


def _frames_of(told: Told) -> list[int] | None:
    """The frame that was answered, as DICOM counts; None for an object that has no frames."""
    return [told.seen.frame.number + 1] if told.seen.count > 1 else None


def _tracking(name: str) -> hdsr.TrackingIdentifier:
    return hdsr.TrackingIdentifier(UID(), name)


def _bytes_of(dataset: Dataset) -> bytes:
    """In UTF-8 whatever the source is in: it has every name of a patient and of a class."""
    dataset.SpecificCharacterSet = _UTF_8
    content = io.BytesIO()
    dataset.save_as(content, enforce_file_format=True)
    return content.getvalue()


def _cut(text: str) -> str:
    """A text as short as a value of DICOM has to be, without what would part it in two."""
    return text.replace("\\", "/")[:_LONGEST]
