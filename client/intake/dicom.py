"""A folder of DICOM as a source of a cohort: any depth, any names, every file with an outcome."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from numpy.typing import NDArray
from pydicom.dataset import Dataset

from client.intake.builder import ImageRecord
from client.intake.deid.seam import SafePixels
from client.intake.deidentify import Deidentifier, text_of
from client.intake.display import brightness
from client.intake.keys import SiteKey
from client.intake.labels import LabelEntry, LabelTable, read_labels
from client.intake.part10 import BoundedFile, DicomFile, Directory, FrameDecoder, Geometry, Limits
from client.intake.pixels import to_shape
from client.intake.quiet import quiet
from client.intake.source import Kept, NotUsed, Step
from common.cohort import PIXEL, Unit
from common.errors import IntakeError
from common.spec import Input, RunSpec

# Pixel data that shows no patient: what someone or something drew or computed upon an image.
_NO_PICTURES = {
    "1.2.840.10008.5.1.4.1.1.30": "a parametric map",
    "1.2.840.10008.5.1.4.1.1.66.4": "a segmentation",
    "1.2.840.10008.5.1.4.1.1.66.7": "a label map segmentation",
    "1.2.840.10008.5.1.4.1.1.481.2": "a radiotherapy dose",
}


@dataclass(frozen=True)
class FileResult:
    """What became of one file.

    Attributes:
        images: what is kept.
        reason: why nothing is; empty if something is, or if the file is a DICOMDIR.
        names_patient: whether it is DICOM with a patient identifier.
        put_aside: it names no patient, and was not decoded for that.
        line: the line of the label table that spoke of it; 0 if none did.
    """

    images: tuple[Kept, ...] = ()
    reason: str = ""
    names_patient: bool = False
    put_aside: bool = False
    line: int = 0


@dataclass(frozen=True)
class FileReader:
    """Reads one file at a time into what is kept of it; it can be sent to another process.

    Args:
        settings: the run's `Input`.
        labels: whose key tells which identifier finds a file's label.
        deidentify: through which every image passes.
        split: put on every image; if empty, the label table's split is.
        limits: what a file may ask for.
    """

    settings: Input
    labels: LabelTable
    deidentify: Deidentifier
    split: str = ""
    limits: Limits = field(default_factory=Limits)

    def read(self, path: Path, *, without_patient: bool = False) -> FileResult:
        """Read a file; all that is wrong with it is in the result.

        Args:
            path: a file of any kind.
            without_patient: the source names no patients at all, so a file that names none is
                read like any other and not put aside.
        """
        found: dict[str, Any] = {}
        try:
            with quiet(), BoundedFile(path, self.limits.read_bytes) as stream:
                file = DicomFile.parse(stream, self.limits)
                return self._read(file, found, without_patient)
        except Directory:
            return FileResult()
        except IntakeError as error:
            return FileResult(reason=str(error), **found)
        except Exception as error:  # noqa: BLE001
            # Parsers and codecs raise whatever the bytes of a broken file drive them to.
            return FileResult(reason=f"cannot be read ({_brief(error)})", **found)

    def _read(self, file: DicomFile, found: dict[str, Any], without_patient: bool) -> FileResult:
        header = file.header
        found["names_patient"] = bool(text_of(header, "PatientID"))
        if kind := _NO_PICTURES.get(text_of(header, "SOPClassUID")):
            raise IntakeError(f"it is {kind}, no picture of a patient")
        element = file.pixel_element()
        entry = self._label(header)
        found["line"] = entry.line
        if not found["names_patient"] and not without_patient:
            return FileResult(put_aside=True, **found)
        geometry = file.geometry(self.limits)
        frames = self._frames(geometry)
        decode = FrameDecoder(file, element, geometry)
        kept = tuple(self._keep(header, entry, frame, decode(frame)) for frame in frames)
        return FileResult(kept, **found)

    def _label(self, header: Dataset) -> LabelEntry:
        key = text_of(header, self.labels.key)
        if not key:
            raise IntakeError(f"no label: its {self.labels.key} is empty")
        if key not in self.labels.entries:
            raise IntakeError(f"no label: its {self.labels.key} is not in the label table")
        return self.labels.entries[key]

    def _frames(self, geometry: Geometry) -> range:
        """Which frames the spec's rule takes."""
        count, rule = geometry.frames, self.settings.frames
        if count > 1 and rule == "refuse":
            raise IntakeError(
                f"it has {count} frames and input.frames = 'refuse'; 'first', 'middle' or 'all' "
                "in the run's spec would take it"
            )
        if rule != "all":
            first = count // 2 if rule == "middle" else 0
            return range(first, first + 1)
        stored = count * math.prod(self.settings.shape) * PIXEL.itemsize
        if stored > self.limits.stored_bytes:
            raise IntakeError(
                f"{count} frames would take {stored} bytes in the cohort; at most "
                f"{self.limits.stored_bytes} of one file: use frames = 'first' or 'middle'"
            )
        return range(count)

    def _keep(self, header: Dataset, entry: LabelEntry, frame: int, stored: NDArray[Any]) -> Kept:
        shown = brightness(stored, header, frame, self.settings.window)
        clean = self.deidentify(header, frame, shown)
        record = ImageRecord(
            patient=clean.patient or clean.instance,
            study=clean.study,
            series=clean.series,
            instance=clean.instance,
            label=entry.label,
            height=stored.shape[0],
            width=stored.shape[1],
            split=self.split or entry.split,
        )
        return Kept(record, to_shape(clean.pixels, self.settings))


@dataclass
class DicomFolder:
    """A folder of DICOM with a label table.

    Files are visited in an order drawn from the site key: the order of a cohort's images then
    says nothing of file names, which often are patients' names.

    A file without a patient identifier waits until all others are seen. If any of them names a
    patient it is not used; if none does, the source has no patients to protect by name, and the
    cohort's unit is the image.

    Raises:
        IntakeError: if there is no such folder.
    """

    folder: Path
    reader: FileReader
    key: SiteKey
    kind: str = field(default="dicom", init=False)
    unit: Unit = field(default="patient", init=False)

    def __post_init__(self) -> None:
        if not self.folder.is_dir():
            raise IntakeError(f"{self.folder}: no such folder; expected a folder of DICOM files")
        self._files = sorted(walk(self.folder), key=self._place)

    @classmethod
    def of(
        cls,
        folder: Path,
        labels: Path,
        spec: RunSpec,
        key: SiteKey,
        *,
        split: str = "",
    ) -> Self:
        """A folder with its label table, for a run, under the strictest profile.

        Args:
            folder: searched at any depth.
            labels: a CSV; see `client.intake.labels`.
            spec: the run.
            key: of the pseudonyms.
            split: put on every image; if empty, the label table's split is.

        Raises:
            IntakeError: if there is no such folder.
            ConfigError: if the label table is wrong.
        """
        table = read_labels(labels, spec.task)
        return cls(folder, FileReader(spec.input, table, SafePixels(key), split), key)

    def __len__(self) -> int:
        return len(self._files)

    def steps(self) -> Iterator[Step]:
        """See `Source`."""
        aside: list[Path] = []
        lines: set[int] = set()
        named = False
        for path in self._files:
            result = self.reader.read(path)
            named = named or result.names_patient
            lines.add(result.line if result.images else 0)
            if result.put_aside:
                aside.append(path)
            else:
                yield self._step(path, result)
        self.unit = "image" if aside and not named else "patient"
        for path in aside:
            if named:
                yield self._step(path, FileResult(reason="no patient identifier"))
            else:
                result = self.reader.read(path, without_patient=True)
                lines.add(result.line if result.images else 0)
                yield self._step(path, result)
        table = self.reader.labels
        yield Step(table.source, not_used=tuple(_labels_without_image(table, lines)))

    def _step(self, path: Path, result: FileResult) -> Step:
        what = str(path.relative_to(self.folder))
        refused = (NotUsed(what, result.reason),) if result.reason else ()
        return Step(what, result.images, refused)

    def _place(self, path: Path) -> str:
        return self.key.pseudonym("order", os.fspath(path.relative_to(self.folder)))


def walk(folder: Path) -> Iterator[Path]:
    """All files below `folder` but DICOMDIRs, and each folder that is not looked into.

    Those are links to folders, which could lead anywhere and back again, and folders that the
    system does not list.
    """
    closed: list[Path] = []
    for place, folders, files in os.walk(folder, onerror=lambda e: closed.append(Path(e.filename))):
        for name in files:
            if name.upper() != "DICOMDIR":
                yield Path(place, name)
        yield from (link for name in folders if (link := Path(place, name)).is_symlink())
    yield from closed


def _labels_without_image(labels: LabelTable, used: set[int]) -> Iterator[NotUsed]:
    for name, entry in labels.entries.items():
        if entry.line not in used:
            where = f"{labels.source}:{entry.line} ({labels.key} {name})"
            yield NotUsed(where, "label without a usable image")


def _brief(error: Exception) -> str:
    """The kind of an error; its text only from the system, for others quote what they read."""
    told = isinstance(error, OSError) and error.strerror
    return f"{type(error).__name__}: {told}" if told else type(error).__name__
