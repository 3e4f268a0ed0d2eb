"""Masks and boxes of pictures: from CSV, from COCO's JSON, from a folder of VOC's XML.

A CSV of masks has the columns ``file`` and ``mask``, both paths within the folder of the pictures.
A CSV of boxes has ``file``, ``left``, ``top``, ``right``, ``bottom`` and ``label``, one line a
box; a line with a file and nothing else says that there is nothing on that picture. Both may have
``patient`` and ``split``.

Boxes are in pixels from the left and the top edge of the picture: of a picture of 10 pixels the
whole is 0 to 10. VOC counts pixels from 1, the last one included: its 1 to 10 is the same.

What is wrong with one picture's annotation is kept beside it and told when the picture's turn
comes; what is wrong with a file as a whole is a `ConfigError`.
"""

from __future__ import annotations

import csv
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

from pydantic import BaseModel, ConfigDict, ValidationError

from client.intake.labels import LabelEntry, LabelTable, read_rows
from common.cohort import SPLITS
from common.errors import ConfigError
from common.spec import Task

_SIDES = ("left", "top", "right", "bottom")
_MOST_XML = 2**22  # bytes; one of 1,000 boxes has a twentieth


class PixelBox(NamedTuple):
    """A box in pixels of its picture, and the number of its class."""

    left: float
    top: float
    right: float
    bottom: float
    kind: int


@dataclass(frozen=True)
class Annotation(LabelEntry):
    """What is said of one picture.

    Attributes:
        mask: the path of its mask; empty where boxes are annotated.
        boxes: on it.
        size: the (height, width) for which they were drawn, where that is said.
        problem: why it cannot be used, or nothing.
    """

    mask: str = ""
    boxes: tuple[PixelBox, ...] = ()
    size: tuple[int, int] | None = None
    problem: str = ""


@dataclass
class _Gathered:
    """What was read so far of one picture."""

    line: int = 0
    patient: str = ""
    split: str = ""
    size: tuple[int, int] | None = None
    boxes: list[PixelBox] = field(default_factory=list)
    problem: str = ""

    def whole(self) -> Annotation:
        """All of it."""
        boxes = () if self.problem else tuple(self.boxes)
        return Annotation(
            label=0,
            split=self.split,
            line=self.line,
            patient=self.patient,
            boxes=boxes,
            size=self.size,
            problem=self.problem,
        )


def read_annotations(path: Path, task: Task) -> LabelTable:
    """Read what is annotated for `task`, whose kind is ``mask`` or ``boxes``.

    Args:
        path: a CSV; for boxes also COCO's ``.json``, or a folder of VOC's ``.xml``.
        task: whose classes are annotated.

    Returns:
        A table whose entries are `Annotation`, by the path of their picture.

    Raises:
        ConfigError: naming file and place: it cannot be read, a column or key is missing, one
            picture stands there twice, or there is nothing in it.
    """
    if task.kind == "mask":
        entries = _masks(path)
    elif path.is_dir():
        entries = _voc(path, task)
    elif path.suffix.lower() == ".json":
        entries = _coco(path, task)
    else:
        entries = _boxes(path, task)
    if not entries:
        raise ConfigError(f"{path}: nothing is annotated in it; expected an entry for each picture")
    return LabelTable(str(path), "file", entries)


def read_owners(path: Path) -> dict[str, LabelEntry]:
    """Whose volume each file is: a CSV with ``file``, ``patient`` and if wished ``split``.

    Raises:
        ConfigError: as `read_annotations`.
    """
    owners: dict[str, LabelEntry] = {}
    for line, row in _lines(path, ("file", "patient")):
        where = f"{path}:{line}"
        if row["file"] in owners:
            raise ConfigError(f"{where}: {row['file']!r} stands there twice")
        owners[row["file"]] = LabelEntry(0, _split(where, row), line, row["patient"])
    return owners


# --- CSV -----------------------------------------------------------------------------------------


def _masks(path: Path) -> dict[str, Annotation]:
    entries: dict[str, Annotation] = {}
    for line, row in _lines(path, ("file", "mask")):
        name, where = row["file"], f"{path}:{line}"
        if name in entries:
            first = entries[name].line
            raise ConfigError(f"{where}: {name!r} stands there twice, first on line {first}")
        patient, split = row.get("patient", ""), _split(where, row)
        problem = "" if row["mask"] else f"line {line} names no mask"
        entries[name] = Annotation(0, split, line, patient, mask=row["mask"], problem=problem)
    return entries


def _boxes(path: Path, task: Task) -> dict[str, Annotation]:
    gathered: dict[str, _Gathered] = {}
    for line, row in _lines(path, ("file", *_SIDES, "label")):
        where, patient = f"{path}:{line}", row.get("patient", "")
        found = _Gathered(line, patient, _split(where, row))
        picture = gathered.setdefault(row["file"], found)
        if (picture.patient, picture.split) != (found.patient, found.split):
            raise ConfigError(
                f"{where}: {row['file']!r} has another patient or split than on line "
                f"{picture.line}; decide which is right"
            )
        sides = [row[side] for side in _SIDES]
        if any((*sides, row["label"])):
            _add(picture, f"line {line}", sides, row["label"], task)
    return {name: picture.whole() for name, picture in gathered.items()}


def _lines(path: Path, needed: tuple[str, ...]) -> Iterator[tuple[int, dict[str, str]]]:
    """(line number, values) of a CSV's lines, each with a file."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, strict=True)
            reader.fieldnames = header = [name.strip() for name in reader.fieldnames or ()]
            missing = [name for name in needed if name not in header]
            if missing:
                raise ConfigError(
                    f"{path}:1: column {missing[0]!r} is missing; expected "
                    f"{', '.join(needed)}, the header has {', '.join(map(repr, header))}"
                )
            for line, row in read_rows(str(path), reader):
                if not row["file"]:
                    raise ConfigError(f"{path}:{line}: file is empty; write one or drop the line")
                yield line, row
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(f"{path}: cannot be read as a CSV in UTF-8 ({error})") from error


def _split(where: str, row: Mapping[str, str]) -> str:
    split = row.get("split", "")
    if split not in SPLITS:
        expected = "train, validation, test or nothing"
        raise ConfigError(f"{where}: split {split!r} is unknown; expected {expected}")
    return split


def _add(picture: _Gathered, where: str, sides: list[str], label: str, task: Task) -> None:
    """Add a box, or what is wrong with it; the first that is wrong is told."""
    try:
        left, top, right, bottom = (float(side) for side in sides)
    except ValueError:
        picture.problem = picture.problem or f"{where} has the box {sides}; expected four numbers"
        return
    if not all(map(math.isfinite, (left, top, right, bottom))):
        picture.problem = picture.problem or f"{where} has the box {sides}; expected finite numbers"
    elif label not in task.classes:
        known = ", ".join(map(repr, task.classes))
        picture.problem = picture.problem or (
            f"{where} has the unknown label {label!r}; the run's classes are {known}"
        )
    else:
        picture.boxes.append(PixelBox(left, top, right, bottom, task.classes.index(label)))


# --- COCO ----------------------------------------------------------------------------------------


class _Coco(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")


class _CocoImage(_Coco):
    id: int
    file_name: str
    height: int
    width: int
    patient: str = ""
    split: str = ""


class _CocoCategory(_Coco):
    id: int
    name: str


class _CocoBox(_Coco):
    id: int
    image_id: int
    category_id: int
    bbox: tuple[float, float, float, float]
    iscrowd: int = 0


class _CocoFile(_Coco):
    images: tuple[_CocoImage, ...]
    categories: tuple[_CocoCategory, ...]
    annotations: tuple[_CocoBox, ...]


def _coco(path: Path, task: Task) -> dict[str, Annotation]:
    try:
        file = _CocoFile.model_validate_json(path.read_bytes())
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise ConfigError(f"{path}: {where}: {first['msg']}; expected COCO's JSON") from None
    pictures = {
        image.id: _Gathered(0, image.patient, _split(f"{path}: {image.file_name}", vars(image)))
        for image in file.images
    }
    names = {image.file_name: image.id for image in file.images}
    if len(names) != len(file.images) or len(pictures) != len(file.images):
        raise ConfigError(f"{path}: an image stands there twice; expected each file and id once")
    for image in file.images:
        pictures[image.id].size = (image.height, image.width)
    kinds = defaultdict(str, {kind.id: kind.name for kind in file.categories})
    for box in file.annotations:
        if box.image_id not in pictures:
            raise ConfigError(f"{path}: annotation {box.id} is of no image: {box.image_id}")
        picture, (left, top, width, height) = pictures[box.image_id], box.bbox
        if box.iscrowd:
            picture.problem = f"annotation {box.id} is a crowd; expected a box for each thing"
        sides = [str(side) for side in (left, top, left + width, top + height)]
        _add(picture, f"annotation {box.id}", sides, kinds[box.category_id], task)
    return {name: pictures[number].whole() for name, number in names.items()}


# --- VOC -----------------------------------------------------------------------------------------


def _voc(folder: Path, task: Task) -> dict[str, Annotation]:
    entries: dict[str, Annotation] = {}
    for path in sorted(folder.glob("*.xml")):
        name, found = _voc_file(path, task)
        if name in entries:
            raise ConfigError(f"{path}: annotates {name!r}, which another file does as well")
        entries[name] = found
    return entries


def _voc_file(path: Path, task: Task) -> tuple[str, Annotation]:
    """The picture that one file annotates, by its own name if it says none."""
    picture = _Gathered()
    try:
        root = _parsed(path)
        height, width = (int(root.findtext(f"size/{side}", "0")) for side in ("height", "width"))
        picture.size = (height, width) if height > 0 and width > 0 else None
        name = (root.findtext("filename") or path.name).strip()
        for number, thing in enumerate(root.iter("object"), start=1):
            corners = [thing.findtext(f"bndbox/{k}", "") for k in ("xmin", "ymin", "xmax", "ymax")]
            label = (thing.findtext("name") or "").strip()
            _add(picture, f"{path.name}, object {number}", corners, label, task)
    except (OSError, ValueError, LookupError, ElementTree.ParseError) as error:
        # LookupError: of an encoding that there is not.
        problem = f"{path.name} cannot be read as VOC's XML ({error})"
        return path.name, replace(_Gathered().whole(), problem=problem)
    picture.boxes = [
        box._replace(left=max(box.left - 1, 0.0), top=max(box.top - 1, 0.0))
        for box in picture.boxes
    ]
    return name, picture.whole()


def _parsed(path: Path) -> ElementTree.Element:
    if path.stat().st_size > _MOST_XML:
        raise ValueError(f"it has more than {_MOST_XML} bytes")
    content = path.read_bytes()
    # What a document may do to its reader, it does in a DTD, which VOC has no use for.
    if b"<!DOCTYPE" in content or b"<!ENTITY" in content or b"\x00" in content:
        raise ValueError("it has a document type, or is no UTF-8")
    return ElementTree.fromstring(content)  # noqa: S314 - without a DTD
