"""What the files say of one image, volume and study, as plain data.

Of a model of single images a study's probabilities are the mean and the largest over its answered
images. It has no decision: the threshold on the model's card is one for images. Of a model of
several images of a study the study has the one decision, and its images what they weighed in it.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from client.intake.frames import Plane
from client.prediction.geometry import Scan, boxes_to_source, mask_to_source
from client.prediction.reading import Frame, Named
from common.errors import ModelError
from common.spec import RunSpec
from common.tasks.answers import Answer

HOW = {
    "image": (
        "Of a study: the mean and the largest of its images' probabilities, boxes and pixels "
        "summed, the mean and the largest anomaly score. A study has no decision of its own."
    ),
    "study": (
        "A study is one decision, from those of its images that are marked as seen; attention is "
        "what each weighed in it. An image has no decision of its own."
    ),
    "volume": (
        "Each series of parallel slices is one volume; voxels are those of the slices as they were "
        "taken. A study has its series' volumes, and no sum of them: they may show the same."
    ),
}
WARNING = "Not for clinical use; made by a model, verified by nobody"
NOT_ALL = "objects of the study that were not answered, and did not move the decision: {}"
PARTLY = "objects of the study of which some frames alone were answered: {}"
NOT_THERE = "no image of the study that was answered is of {}, of which the model takes images too"
UNPLACED = (
    "objects of the source of which the series could not be read, and which may be of this study "
    "(no volume is said): {}"
)
_SUREST = 1e-6  # what is printed of a probability is never that it cannot be otherwise
_PARALLEL = 1e-3
_REGULAR = 0.1
_DIGITS = 6
NOTHING = np.zeros((0, 0, 0), dtype=np.uint16)
Row = dict[str, Any]


def asked_of(spec: RunSpec) -> str:
    """What one answer of a model is about: a key of `HOW`."""
    return "volume" if spec.input.depth is not None else spec.input.row_name


def decided_by(spec: RunSpec) -> str:
    """How a model of this run decides, in as few words as a DICOM value has."""
    threshold = spec.evaluation.threshold
    return {
        "binary": f"decides by threshold {threshold:g} of the raw probability",
        "multilabel": f"decides by threshold {threshold:g} of each raw probability",
        "multiclass": "decides for the likeliest class",
        "mask": "decides for the likeliest class of each pixel",
        "boxes": f"gives boxes of a certainty above {threshold:g}",
    }.get(spec.task.kind, "decides nothing: it gives a score")


@dataclass(frozen=True, eq=False)
class Seen:
    """One image or volume that was answered.

    Attributes:
        named: whose it is; of a volume its first object.
        frame: of its object; of a volume its grid.
        size: rows and columns of the source.
        count: frames of its object.
        objects: of a volume, as its scan numbers them.
        scan: where a volume's voxels lie; None of an image, and of a cohort, which does not say.
        whole: whether a volume has all its slices, as far as that can be known.
    """

    named: Named
    frame: Frame
    size: tuple[int, int]
    count: int = 1
    objects: tuple[Named, ...] = ()
    scan: Scan | None = None
    whole: bool = True

    @property
    def without_pixels(self) -> Seen:
        """The same, for what is made of a whole study."""
        return replace(self, frame=replace(self.frame, pixels=NOTHING))


@dataclass(frozen=True)
class Rows:
    """Makes rows of answers of one run."""

    spec: RunSpec

    def of_image(
        self, number: int, seen: Seen, answer: Answer, calibrated: NDArray[np.float64] | None
    ) -> Row:
        """The row of image or volume `number`."""
        return self._placed(number, seen, self._said(seen, answer, calibrated))

    def of_part(self, number: int, seen: Seen, weight: float | None) -> Row:
        """The row of image `number` of a study that has one decision.

        Args:
            number: of the image.
            seen: it.
            weight: what it weighed in the decision; None if it was not seen.
        """
        said = {"seen": weight is not None, "attention": None if weight is None else _short(weight)}
        return self._placed(number, seen, said)

    def of_study(self, answer: Answer, calibrated: NDArray[np.float64] | None) -> Row:
        """What is said of a study by its one decision."""
        if answer.probabilities is None:
            raise ModelError(f"an answer of {self.spec.task.name} is none of a study")
        return self._probabilities(answer.probabilities, calibrated)

    def _placed(self, number: int, seen: Seen, said: Row) -> Row:
        named = seen.named
        row: Row = {
            "number": number,
            "file": named.place,
            "file_sha256": named.sha256,
            "patient_id": named.patient,
            "issuer": named.issuer,
            "accession_number": named.accession,
            "study_instance_uid": named.study,
            "series_instance_uid": named.series,
        }
        if self.spec.input.depth is None:
            of = {"sop_instance_uid": named.instance, "frame": seen.frame.number + 1}
            row |= of | {"frames": seen.count}
        else:
            row["slices"] = None if seen.scan is None else seen.scan.shape[0]
        row |= {"modality": named.modality, "rows": seen.size[0], "columns": seen.size[1]}
        return row | said | {"caveats": list(seen.frame.caveats)}

    def _said(self, seen: Seen, answer: Answer, calibrated: NDArray[np.float64] | None) -> Row:
        if answer.probabilities is not None:
            return self._probabilities(answer.probabilities, calibrated)
        if answer.mask is not None:
            volume = self.spec.input.depth is not None
            return (self._voxels if volume else self._mask)(seen, answer.mask)
        if answer.boxes is not None:
            return {"boxes": self._boxes(seen, answer.boxes)}
        return {"anomaly_score": answer.anomaly}

    def _probabilities(
        self, raw: NDArray[np.float32], calibrated: NDArray[np.float64] | None
    ) -> Row:
        spec, classes = self.spec, self.spec.task.classes
        threshold = spec.evaluation.threshold
        decided: Any
        if spec.task.kind == "multiclass":
            decided = classes[int(raw.argmax())]
        elif spec.task.kind == "binary":
            decided = classes[int(raw[1] > threshold)]
        else:
            decided = [name for name, p in zip(classes, raw, strict=True) if p > threshold]
        return {
            "model_decision": decided,
            "raw_probability": _named(classes, raw),
            "probability": None if calibrated is None else _named(classes, calibrated),
        }

    def _mask(self, seen: Seen, mask: NDArray[np.uint16]) -> Row:
        classes = self.spec.task.classes
        counts = np.bincount(
            mask_to_source(mask, seen.size, self.spec.input).ravel(), minlength=len(classes)
        )
        pixels = {name: int(counts[number]) for number, name in enumerate(classes) if number}
        plane = seen.frame.plane
        each = None if plane is None else plane.spacing[0] * plane.spacing[1]
        areas = {n: None if each is None else _finite(c * each) for n, c in pixels.items()}
        return {"pixels": pixels, "area_mm2": areas}

    def _voxels(self, seen: Seen, mask: NDArray[np.uint16]) -> Row:
        """Of a volume, in voxels as it was taken; of a cohort's, in those of the run's grid."""
        classes, settings, scan = self.spec.task.classes, self.spec.input, seen.scan
        spacing = (settings.spacing or (math.nan,)) if scan is None else scan.spacing
        found = mask if scan is None else scan.back(mask, settings)
        counts = np.bincount(found.ravel(), minlength=len(classes))
        voxels = {name: int(counts[number]) for number, name in enumerate(classes) if number}
        each = math.prod(spacing)
        return {
            "voxels": voxels,
            "volume_mm3": {n: _finite(c * each) if seen.whole else None for n, c in voxels.items()},
        }

    def _boxes(self, seen: Seen, boxes: NDArray[np.float32]) -> list[Row]:
        there = boxes_to_source(boxes[:, :4], seen.size, self.spec.input)
        return [
            {
                "class": self.spec.task.classes[int(kind)],
                "score": _short(certainty),
                **dict(zip(("left", "top", "right", "bottom"), map(_short, box), strict=True)),
            }
            for box, kind, certainty in zip(there, boxes[:, 4], boxes[:, 5], strict=True)
            if (box[:2] < box[2:]).all()  # none that lies in the padding alone
        ]


@dataclass
class Study:
    """What is said of one study, from the rows of its images; it holds no image.

    Attributes:
        lost: its objects that were not answered, or not all of their frames.
        gaps: series of which one was not answered: they have no volume.
        unplaced: how many objects of the source may be of any series: then none has a volume.
        decided: what is said of it by one decision, where it has one.
        without: modalities of the run of which it has no image.
    """

    spec: RunSpec
    named: Named
    images: int = 0
    lost: Set[str] = frozenset()
    unplaced: int = 0
    gaps: Set[str] = frozenset()
    decided: Row = field(default_factory=dict)
    without: tuple[str, ...] = ()
    _answered: set[str] = field(default_factory=set)
    _caveats: dict[str, None] = field(default_factory=dict)
    _values: dict[tuple[str, str], list[float]] = field(default_factory=lambda: defaultdict(list))
    _slices: dict[str, list[tuple[Plane | None, Mapping[str, float | None]]]] = field(
        default_factory=lambda: defaultdict(list)
    )

    _volumes: dict[str, Mapping[str, float | None]] = field(default_factory=dict)

    def add(self, seen: Seen, row: Row) -> None:
        """Count one of its images in."""
        self.images += 1
        self._answered |= {named.key for named in seen.objects or (seen.named,)}
        self._caveats |= dict.fromkeys(row["caveats"])
        for key in ("raw_probability", "probability", "pixels"):
            for name, value in (row.get(key) or {}).items():
                self._values[key, name].append(value)
        if "boxes" in row:
            for name in self.spec.task.classes:
                scores = [box["score"] for box in row["boxes"] if box["class"] == name]
                self._values["boxes", name].append(len(scores))
                self._values["score", name].append(max(scores, default=0.0))
        if "anomaly_score" in row:
            self._values["anomaly_score", ""].append(row["anomaly_score"])
        if "voxels" in row:
            self._volumes[row["series_instance_uid"]] = row["volume_mm3"]
        if "area_mm2" in row:
            self._slices[seen.named.series].append((seen.frame.plane, row["area_mm2"]))

    @property
    def refused(self) -> int:
        """How many of its objects were not answered."""
        return len(self.lost - self._answered)

    @property
    def caveats(self) -> tuple[str, ...]:
        """What must be borne in mind of the study as a whole."""
        said = (
            (NOT_ALL, self.refused if self.decided else 0),
            (NOT_THERE, ", ".join(self.without)),
            (PARTLY, len(self.lost & self._answered)),
            (UNPLACED, self.unplaced),
        )
        return tuple(text.format(what) for text, what in said if what)

    def row(self) -> Row:
        """What is said of it."""
        return {
            "patient_id": self.named.patient,
            "issuer": self.named.issuer,
            "accession_number": self.named.accession,
            "study_instance_uid": self.named.study,
            "images": self.images,
            "refused": self.refused,
            **dict(self._said()),
            **self.decided,
            "caveats": list(dict.fromkeys((*self._caveats, *self.caveats))),
        }

    def _said(self) -> Iterator[tuple[str, Any]]:
        if self._volumes:
            yield "volume_mm3", self._volumes
        for key in ("raw_probability", "probability"):
            if self._of(key):
                yield f"mean_{key}", self._each(key, np.mean)
                yield f"largest_{key}", self._each(key, np.max)
        if self._of("boxes"):
            yield "boxes", self._sums("boxes")
            yield "largest_score", self._each("score", np.max)
        if self._of("pixels"):
            yield "pixels", self._sums("pixels")
            yield (
                "volume_mm3",
                {
                    series: None if self.unplaced or series in self.gaps else volumes(slices)
                    for series, slices in self._slices.items()
                },
            )
        if scores := self._values.get(("anomaly_score", "")):
            yield "mean_anomaly_score", float(np.mean(scores))
            yield "largest_anomaly_score", float(np.max(scores))

    def _of(self, key: str) -> dict[str, list[float]]:
        return {name: values for (kept, name), values in self._values.items() if kept == key}

    def _sums(self, key: str) -> dict[str, int]:
        return {name: int(sum(values)) for name, values in self._of(key).items()}

    def _each(self, key: str, how: Any) -> dict[str, float]:
        return {name: _short(how(values)) for name, values in self._of(key).items()}


def volumes(
    slices: Sequence[tuple[Plane | None, Mapping[str, float | None]]],
) -> Mapping[str, float | None] | None:
    """Volumes by class of the slices of one series; None unless they are parallel and regular.

    Positions in two frames of reference say nothing of the distance between them (PS3.3 C.7.4.1).

    Args:
        slices: of each where it lies, and its areas by class in mm².

    Returns:
        In mm³: the areas times the distance of neighbouring slices; None if one is no number.
    """
    planes = [plane for plane, _ in slices if plane is not None]
    if len(planes) != len(slices) or len(planes) < 2:
        return None
    normal = planes[0].normal
    if len({plane.reference for plane in planes}) > 1:
        return None
    if any(np.abs(plane.normal - normal).max() > _PARALLEL for plane in planes):
        return None
    places = np.sort([float(plane.position @ normal) for plane in planes])
    gaps = np.diff(places)
    gap = float(np.median(gaps))
    if gap <= 0 or np.abs(gaps - gap).max() > _REGULAR * gap:
        return None
    names = slices[0][1]
    return {name: _finite(gap * sum(areas[name] or 0.0 for _, areas in slices)) for name in names}


def _finite(value: float) -> float | None:
    return round(value, _DIGITS) if math.isfinite(value) else None


def _named(classes: Sequence[str], values: NDArray[Any]) -> dict[str, float]:
    held = values.astype(np.float64).clip(_SUREST, 1 - _SUREST)
    return {name: _short(value) for name, value in zip(classes, held, strict=True)}


def _short(value: float) -> float:
    return round(float(value), _DIGITS)
