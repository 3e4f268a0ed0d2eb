"""What the tests of intake share: drawn DICOM files, label tables, the way in."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from numpy.typing import NDArray
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import UID, ComputedRadiographyImageStorage, ExplicitVRLittleEndian

from client.intake.dicom import DicomFolder
from client.intake.keys import SiteKey
from client.intake.run import IntakeSummary, intake
from common.cohort import Cohort
from common.spec import RunSpec

STUDY = "1.2.3.4.5"


class Taken(NamedTuple):
    """What an intake has made."""

    summary: IntakeSummary
    cohort: Cohort

    @property
    def reasons(self) -> dict[str, str]:
        """Why a thing was not used, by its name."""
        return {item.what: item.reason for item in self.summary.not_used}


def make_film(pixels: NDArray[Any] | None = None, **attributes: Any) -> FileDataset:
    """A CR of patient P1: 12 bits, 20 x 30; an attribute given as None is left out."""
    if pixels is None:
        pixels = np.arange(600, dtype=np.uint16).reshape(20, 30)
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = ComputedRadiographyImageStorage
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    film = FileDataset("", {}, preamble=b"\0" * 128, file_meta=meta)
    depth = pixels.dtype.itemsize * 8
    values: dict[str, Any] = {
        "SOPClassUID": ComputedRadiographyImageStorage,
        "SOPInstanceUID": f"{STUDY}.6.7",
        "StudyInstanceUID": STUDY,
        "SeriesInstanceUID": f"{STUDY}.6",
        "AccessionNumber": "A1",
        "Modality": "CR",
        "PatientID": "P1",
        "SamplesPerPixel": 1,
        "PhotometricInterpretation": "MONOCHROME2",
        "Rows": pixels.shape[0],
        "Columns": pixels.shape[1],
        "BitsAllocated": depth,
        "BitsStored": 12 if depth == 16 else depth,
        "HighBit": 11 if depth == 16 else depth - 1,
        "PixelRepresentation": int(pixels.dtype.kind == "i"),
        "PixelData": pixels.tobytes(),
    }
    for keyword, value in (values | attributes).items():
        if value is not None:
            setattr(film, keyword, value)
    meta.MediaStorageSOPInstanceUID = UID(film.get("SOPInstanceUID", "1.2.3"))
    return film


def save_film(path: Path, pixels: NDArray[Any] | None = None, **attributes: Any) -> Path:
    """Write `make_film` to a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    make_film(pixels, **attributes).save_as(path, enforce_file_format=True)
    return path


@pytest.fixture(scope="session")
def film() -> Callable[..., FileDataset]:
    """`film(pixels, **attributes)`: a CR in memory."""
    return make_film


@pytest.fixture(scope="session")
def save() -> Callable[..., Path]:
    """`save(path, pixels, **attributes)`: a CR in a file."""
    return save_film


@pytest.fixture(scope="session")
def key() -> SiteKey:
    return SiteKey(bytes(range(32)))


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """An empty folder."""
    folder = tmp_path / "source"
    folder.mkdir()
    return folder


@pytest.fixture
def labels(tmp_path: Path) -> Callable[..., Path]:
    """`labels({"P1": "normal"}, column="PatientID")`: a label table in a file."""

    def write(entries: Mapping[str, str], column: str = "PatientID") -> Path:
        path = tmp_path / "labels.csv"
        lines = [f"{name},{label}" for name, label in entries.items()]
        path.write_text("\n".join([f"{column},label", *lines]), encoding="utf-8")
        return path

    return write


@pytest.fixture
def take_in(
    tmp_path: Path, source: Path, key: SiteKey, make_spec: Callable[..., RunSpec]
) -> Callable[..., Taken]:
    """`take_in(labels_csv, spec, folder)`: the folder as a cohort."""

    def _take_in(
        table: Path, spec: RunSpec | None = None, folder: Path | None = None, name: str = "cohort"
    ) -> Taken:
        run = spec or make_spec()
        path = tmp_path / name
        summary = intake(DicomFolder.of(folder or source, table, run, key), path, run)
        return Taken(summary, Cohort.open(path))

    return _take_in
