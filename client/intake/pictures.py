"""A folder of PNG and JPEG pictures with a CSV as a source.

The CSV has the columns ``file`` (a path within the folder), ``label`` (or one column for each
class of a multilabel task), and optionally ``patient`` and ``split``. With a patient column the
cohort's unit is the patient.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from client.intake.builder import ImageRecord
from client.intake.items import walk
from client.intake.keys import SiteKey
from client.intake.labels import LabelEntry, LabelTable, read_labels
from client.intake.part10 import CLOSED_FOLDER, Limits
from client.intake.pixels import shown, to_shape
from client.intake.source import Kept, NotUsed, Step
from common.cohort import Unit
from common.errors import IntakeError
from common.spec import Input, RunSpec

LABEL_KEYS = ("file",)
_FORMATS = ("PNG", "JPEG")
_SUFFIXES = (".png", ".jpg", ".jpeg")
_DEEP = ("I;16", "I;16B", "I")
_HIGHEST = 2**16 - 1


@dataclass
class Pictures:
    """A folder of pictures.

    Args:
        folder: where they lie, at any depth.
        labels: read with `LABEL_KEYS`.
        settings: the run's `Input`.
        key: of the pseudonyms.
        split: put on every image; if empty, the label table's split is.

    Raises:
        IntakeError: if there is no such folder.
    """

    folder: Path
    labels: LabelTable
    settings: Input
    key: SiteKey
    split: str = ""
    limits: Limits = field(default_factory=Limits)
    kind: str = field(default="pictures", init=False)
    unit: Unit = field(default="patient", init=False)

    def __post_init__(self) -> None:
        if not self.folder.is_dir():
            raise IntakeError(f"{self.folder}: no such folder; expected a folder of pictures")
        self.unit = "patient" if self.labels.names_patients else "image"
        labelled = {str(PurePosixPath(name)) for name in self.labels.entries}
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
        """A folder with its CSV, for a run.

        Raises:
            IntakeError: if there is no such folder.
            ConfigError: if the CSV is wrong.
        """
        return cls(folder, read_labels(labels, spec.task, LABEL_KEYS), spec.input, key, split)

    def __len__(self) -> int:
        return len(self.labels.entries) + len(self._others)

    def steps(self) -> Iterator[Step]:
        """See `Source`."""
        for name, entry in sorted(self.labels.entries.items(), key=self._place):
            try:
                yield Step(name, images=(self._keep(name, entry),))
            except IntakeError as error:
                where = f"{name} ({self.labels.source}:{entry.line})"
                yield Step(name, not_used=(NotUsed(where, str(error)),))
        for name, reason in self._others.items():
            yield Step(name, not_used=(NotUsed(name, reason),))

    def _keep(self, name: str, entry: LabelEntry) -> Kept:
        if self.unit == "patient" and not entry.patient:
            raise IntakeError("no patient identifier")
        stored, highest = _read(_within(self.folder, name), self.limits)
        instance = self.key.pseudonym("instance", str(PurePosixPath(name)))
        patient = self.key.pseudonym("patient", "", entry.patient) if entry.patient else instance
        record = ImageRecord(
            patient=patient,
            study="",
            series="",
            instance=instance,
            label=entry.label,
            height=stored.shape[0],
            width=stored.shape[1],
            split=self.split or entry.split,
        )
        image = shown(stored, highest, self.settings.window)
        return Kept(record, to_shape(image, self.settings))

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


def _read(path: Path, limits: Limits) -> tuple[NDArray[Any], int]:
    """The picture upright as (height, width[, 3]), and its value of full brightness."""
    try:
        with Image.open(path, formats=_FORMATS) as picture:
            if picture.width * picture.height > limits.frame_samples:
                raise IntakeError(
                    f"it has {picture.width} x {picture.height} pixels; "
                    f"at most {limits.frame_samples} are read"
                )
            return _values(ImageOps.exif_transpose(picture))
    except UnidentifiedImageError as error:
        raise IntakeError("it is neither PNG nor JPEG") from error
    except IntakeError:
        raise
    except Exception as error:
        # A codec raises whatever the bytes of a broken file drive it to.
        raise IntakeError(f"it cannot be read ({type(error).__name__}: {error})") from error


def _values(picture: Image.Image) -> tuple[NDArray[Any], int]:
    """Grey stays grey, at its own depth; everything else becomes RGB."""
    if picture.mode in _DEEP:
        return np.asarray(picture).astype(np.int64), _HIGHEST
    grey = picture.mode in ("1", "L", "LA", "La")
    return np.asarray(picture.convert("L" if grey else "RGB")), 255
