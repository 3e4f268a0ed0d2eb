"""A folder of PNG and JPEG pictures with their labels, masks or boxes as a source.

For a task with labels a CSV has the columns ``file`` (a path within the folder), ``label`` (or
one column for each class of a multilabel task), and optionally ``patient`` and ``split``. With a
patient column the cohort's unit is the patient. A run of modalities needs a column ``modality``.
Masks and boxes: `client.intake.annotations`.

A mask is a picture of its own, in grey or with a palette, of the same size, whose values are
class numbers; where there are two classes, 255 may stand for the second. Whatever is annotated
moves with its picture to the run's size (`client.intake.pixels`).

A picture of ``cloister generate`` says in its text what it is, and is not taken: no patient stands
behind it, and a cohort of pictures is one of patients or of their images.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Self, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from client.intake.annotations import Annotation, PixelBox, read_annotations
from client.intake.builder import Box, ImageRecord, Label
from client.intake.items import walk
from client.intake.keys import SiteKey
from client.intake.labels import LabelEntry, LabelTable, modality_of, read_labels
from client.intake.part10 import CLOSED_FOLDER, Limits
from client.intake.pixels import box_to_shape, mask_to_shape, shown, to_shape
from client.intake.source import Kept, NotUsed, Step
from common.cohort import SYNTHETIC, Unit
from common.errors import ConfigError, IntakeError
from common.spec import RunSpec
from common.task_sections import Detection

LABEL_KEYS = ("file",)
_Read = TypeVar("_Read")
_FORMATS = ("PNG", "JPEG")
_SUFFIXES = (".png", ".jpg", ".jpeg")
_DEEP = ("I;16", "I;16B", "I")
_HIGHEST = 2**16 - 1
_PAINTED = 255  # the one class of a mask that was painted in black and white
_ORIENTATION, _UPRIGHT = 0x0112, (0, 1)
_BESIDE = 0.5  # pixels by which a box may lie beside its picture: programs round


@dataclass
class Pictures:
    """A folder of pictures.

    Args:
        folder: where they lie, at any depth.
        labels: read with `LABEL_KEYS`, or by `read_annotations`.
        spec: the run.
        key: of the pseudonyms.
        split: put on every image; if empty, the label table's split is.
        keep_empty: whether a mask of the background alone is one; it may as well be one that was
            never drawn, and is not used otherwise.

    Raises:
        IntakeError: if there is no such folder.
        ConfigError: if the run asks for modalities, and no line names one.
    """

    folder: Path
    labels: LabelTable
    spec: RunSpec
    key: SiteKey
    split: str = ""
    keep_empty: bool = False
    limits: Limits = field(default_factory=Limits)
    kind: str = field(default="pictures", init=False)
    unit: Unit = field(default="patient", init=False)

    def __post_init__(self) -> None:
        if not self.folder.is_dir():
            raise IntakeError(f"{self.folder}: no such folder; expected a folder of pictures")
        if self.spec.input.modalities and not any(e.modality for e in self.labels.entries.values()):
            raise ConfigError(
                f"{self.labels.source}: names no modality; input.modalities asks for a column "
                f"'modality' with {' or '.join(self.spec.input.modalities)} in each line"
            )
        self.unit = "patient" if self.labels.names_patients else "image"
        masks = {e.mask for e in self.labels.entries.values() if isinstance(e, Annotation)}
        labelled = {str(PurePosixPath(name)) for name in (*self.labels.entries, *masks)}
        self._others: dict[str, str] = {}
        for path in sorted(walk(self.folder)):
            name = path.relative_to(self.folder).as_posix()
            if path.is_dir():
                self._others[name] = CLOSED_FOLDER
            elif name.lower().endswith(_SUFFIXES) and name not in labelled:
                self._others[name] = f"no label: {self.labels.source} does not name it"

    @classmethod
    def of(
        cls, folder: Path, labels: Path, spec: RunSpec, key: SiteKey, *, split: str = ""
    ) -> Self:
        """A folder with its labels, masks or boxes, as the run's task has them.

        Raises:
            IntakeError: if there is no such folder.
            ConfigError: if what stands in `labels` is wrong.
        """
        if spec.task.kind in ("mask", "boxes"):
            table = read_annotations(labels, spec.task)
        else:
            table = read_labels(labels, spec.task, LABEL_KEYS)
        return cls(folder, table, spec, key, split)

    def __len__(self) -> int:
        return len(self.labels.entries) + len(self._others)

    def steps(self) -> Iterator[Step]:
        """See `Source`."""
        for name, entry in sorted(self.labels.entries.items(), key=self._place):
            try:
                yield Step(name, images=(self._keep(name, entry),))
            except IntakeError as error:
                where = f"{name} ({self.labels.place(entry)})"
                yield Step(name, not_used=(NotUsed(where, str(error)),))
        for name, reason in self._others.items():
            yield Step(name, not_used=(NotUsed(name, reason),))

    def _keep(self, name: str, entry: LabelEntry) -> Kept:
        if isinstance(entry, Annotation) and entry.problem:
            raise IntakeError(entry.problem)
        if self.unit == "patient" and not entry.patient:
            raise IntakeError("no patient identifier")
        modality = modality_of(entry, "", self.spec.input)
        path = _within(self.folder, name)
        stored, highest = _read(path, self.limits)
        label, mask = self._target(path, entry, (stored.shape[0], stored.shape[1]))
        instance = self.key.pseudonym("instance", str(PurePosixPath(name)))
        patient = self.key.pseudonym("patient", "", entry.patient) if entry.patient else instance
        record = ImageRecord(
            patient=patient,
            study="",
            series="",
            instance=instance,
            label=label,
            height=stored.shape[0],
            width=stored.shape[1],
            split=self.split or entry.split,
            modality=modality,
        )
        image = shown(stored, highest, self.spec.input.window)
        return Kept(record, to_shape(image, self.spec.input), mask)

    def _target(
        self, path: Path, entry: LabelEntry, size: tuple[int, int]
    ) -> tuple[Label, NDArray[np.uint16] | None]:
        """The label and the mask of a picture of that (height, width)."""
        if not isinstance(entry, Annotation):
            return entry.label, None
        if _is_turned(path):
            raise IntakeError(
                "its EXIF orientation turns it, and what is annotated may be of either position; "
                "store it upright"
            )
        if entry.size not in (None, size):
            raise IntakeError(f"it has {_shown(size)}; it was annotated at {_shown(entry.size)}")
        if entry.mask:
            return 0, mask_to_shape(self._mask(entry.mask, size), self.spec.input)
        return self._boxes(entry.boxes, size), None

    def _mask(self, name: str, size: tuple[int, int]) -> NDArray[np.integer[Any]]:
        """The class numbers of a mask, as large as its picture."""
        classes = self.spec.task.classes
        mask = _opened(_within(self.folder, name), self.limits, _numbers)
        if mask.shape != size:
            raise IntakeError(
                f"its mask {name} has {_shown(mask.shape)}, the picture {_shown(size)}"
            )
        values = np.unique(mask)
        if len(classes) == 2 and set(values.tolist()) <= {0, _PAINTED}:
            mask, values = mask // _PAINTED, values // _PAINTED
        if values[-1] >= len(classes):
            raise IntakeError(
                f"its mask {name} has the value {values[-1]}; expected 0 to {len(classes) - 1}, "
                f"the numbers of {', '.join(map(repr, classes))}"
            )
        if not values.any() and not self.keep_empty:
            raise IntakeError(
                f"its mask {name} is empty: nothing but {classes[0]!r}; say --keep-empty if there "
                "is nothing to be found on such pictures"
            )
        return mask

    def _boxes(self, boxes: tuple[PixelBox, ...], size: tuple[int, int]) -> tuple[Box, ...]:
        """Boxes in parts of the sides of the run's image."""
        most = self.spec.task_as(Detection).most_boxes
        if len(boxes) > most:
            raise IntakeError(f"it has {len(boxes)} boxes; task.most_boxes allows {most}")
        kept = []
        for box in boxes:
            if problem := _problem_with(box, size):
                raise IntakeError(problem)
            if (moved := box_to_shape(box[:4], size, self.spec.input)) is not None:
                kept.append((*moved, box.kind))
        return tuple(kept)

    def _place(self, item: tuple[str, LabelEntry]) -> str:
        return self.key.pseudonym("order", item[0])


def _within(folder: Path, name: str) -> Path:
    """The path of `name`, which may not leave the folder."""
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise IntakeError("it lies outside the folder; write its path within the folder")
    path = folder / name
    try:
        found = path.is_file()
    except OSError as error:  # a name that is too long, a folder that may not be entered
        raise IntakeError(f"label without a picture: {error.strerror}") from error
    if not found:
        raise IntakeError("label without a picture: there is no such file in the folder")
    return path


def _problem_with(box: PixelBox, size: tuple[int, int]) -> str:
    """Why a box is none of a picture of that (height, width), or nothing."""
    left, top, right, bottom = box[:4]
    sides = f"the box {left:g}, {top:g}, {right:g}, {bottom:g}"
    if min(left, top) < -_BESIDE or right > size[1] + _BESIDE or bottom > size[0] + _BESIDE:
        return f"{sides} reaches outside of the picture, which has {_shown(size)}"
    if not (left < right and top < bottom):
        return f"{sides} has no area; expected left below right and top below bottom"
    return ""


def _shown(size: tuple[int, ...] | None) -> str:
    return " x ".join(map(str, reversed(size or ()))) + " pixels"


def _is_turned(path: Path) -> bool:
    """Whether its EXIF says that it is to be shown turned or mirrored."""
    with Image.open(path, formats=_FORMATS) as picture:
        return picture.getexif().get(_ORIENTATION, 1) not in _UPRIGHT


def _read(path: Path, limits: Limits) -> tuple[NDArray[Any], int]:
    """The picture upright as (height, width[, 3]), and its value of full brightness."""

    def read(picture: Image.Image) -> tuple[NDArray[Any], int]:
        values = _values(ImageOps.exif_transpose(picture))
        _check_mark(picture)  # a PNG may have its text behind its pixels
        return values

    return _opened(path, limits, read)


def _check_mark(picture: Image.Image) -> None:
    """Refuse a picture that `deploy.synthetic` made, also one that was stored as JPEG since."""
    text = picture.info.get("Comment", picture.info.get("comment", ""))
    if isinstance(text, bytes):
        text = text.decode("latin-1")
    if str(text).partition(";")[0].strip().lower() == SYNTHETIC:
        raise IntakeError(
            f"its text says {str(text)[:80]!r}: it is no patient's picture, and is counted as "
            "nobody's; name the cohort that `cloister generate` wrote beside it, as synthetic in "
            "[data] or [simulation]"
        )


def _opened(path: Path, limits: Limits, read: Callable[[Image.Image], _Read]) -> _Read:
    """What `read` makes of a picture that is not too large."""
    try:
        with Image.open(path, formats=_FORMATS) as picture:
            if picture.width * picture.height > limits.frame_samples:
                raise IntakeError(
                    f"it has {picture.width} x {picture.height} pixels; "
                    f"at most {limits.frame_samples} are read"
                )
            return read(picture)
    except UnidentifiedImageError as error:
        raise IntakeError("it is neither PNG nor JPEG") from error
    except IntakeError:
        raise
    except Exception as error:
        # A codec raises whatever the bytes of a broken file drive it to.
        raise IntakeError(f"it cannot be read ({type(error).__name__}: {error})") from error


def _numbers(picture: Image.Image) -> NDArray[np.integer[Any]]:
    """The values of a mask: those of a grey picture, or the numbers of a palette's colours."""
    if picture.format != "PNG":
        raise IntakeError(f"its mask is a {picture.format}, which changes values; expected a PNG")
    if picture.mode not in ("1", "L", "P", *_DEEP):
        raise IntakeError(
            f"its mask has the mode {picture.mode}; expected grey or a palette, whose values are "
            "class numbers"
        )
    return np.asarray(picture).astype(np.int64)


def _values(picture: Image.Image) -> tuple[NDArray[Any], int]:
    """Grey stays grey, at its own depth; everything else becomes RGB."""
    if picture.mode in _DEEP:
        return np.asarray(picture).astype(np.int64), _HIGHEST
    grey = picture.mode in ("1", "L", "LA", "La")
    return np.asarray(picture.convert("L" if grey else "RGB")), 255
