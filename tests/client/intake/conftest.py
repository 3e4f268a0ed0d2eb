"""What the tests of intake share: drawn DICOM files, label tables, the way in."""

from __future__ import annotations

import resource
import signal
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import pytest
from numpy.typing import NDArray
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import UID, ComputedRadiographyImageStorage, ExplicitVRLittleEndian

from client.intake.deid.profile import Profile
from client.intake.dicom import FileResult, Task
from client.intake.keys import SiteKey
from client.intake.labels import read_labels
from client.intake.pool import Bounds
from client.intake.reading import Reader
from client.intake.run import IntakeSummary
from client.intake.take import Order, take_in
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


@pytest.fixture(scope="session")
def film() -> Callable[..., FileDataset]:
    """`film(pixels, **attributes)`: a CR in memory."""
    return make_film


class InThisProcess:
    """Reads one object after another, without another process."""

    def __init__(self, reader: Reader, _workers: int = 1, _bounds: Bounds | None = None) -> None:
        self._reader = reader

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def map(self, tasks: Iterable[Task]) -> Iterator[FileResult]:
        return map(self._reader, tasks)


@pytest.fixture(scope="session")
def in_this_process() -> Callable[..., InThisProcess]:
    """`take_in(order, pool=in_this_process)`."""
    return InThisProcess


@pytest.fixture
def small_files() -> Callable[[int], AbstractContextManager[None]]:
    """`with small_files(1000)`: the system refuses to write more bytes than that to a file."""

    @contextmanager
    def limited(most: int) -> Iterator[None]:
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, before[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
            signal.signal(signal.SIGXFSZ, handler)

    return limited


class Hospital:
    """A folder of DICOM files, a label table, a site key, and the way in."""

    def __init__(self, place: Path, make_spec: Callable[..., RunSpec]) -> None:
        self.place = place
        self.folder = place / "source"
        self.folder.mkdir()
        self.key = SiteKey(bytes(range(32)))
        self.make_spec = make_spec
        self._files = 0

    def film(self, name: str, pixels: NDArray[Any] | None = None, **attributes: Any) -> Path:
        """Write `make_film` to a file, an instance of its own unless told otherwise."""
        self._files += 1
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        made = make_film(pixels, **{"SOPInstanceUID": f"{STUDY}.6.{self._files}"} | attributes)
        made.save_as(path, enforce_file_format=True)
        return path

    def labels(self, entries: Mapping[str, str], column: str = "PatientID") -> Path:
        """Write a label table; its first entry stands on line 2."""
        path = self.place / "labels.csv"
        lines = [f"{name},{label}" for name, label in entries.items()]
        path.write_text("\n".join([f"{column},label", *lines]), encoding="utf-8")
        return path

    def take_in(
        self, labels: Path, name: str = "cohort", *, split: str = "", **changes: Any
    ) -> Taken:
        """Take the folder in for the small run with `changes`, one object after another."""
        order = self.order(labels, name, split=split, **changes)
        return Taken(take_in(order, pool=InThisProcess), Cohort.open(order.cohort))

    def order(
        self,
        labels: Path,
        name: str = "cohort",
        *,
        split: str = "",
        profile: Profile | None = None,
        **changes: Any,
    ) -> Order:
        """What `take_in` takes in."""
        run = self.make_spec(**changes)
        return Order(
            self.folder,
            self.place / name,
            run,
            read_labels(labels, run.task),
            self.key,
            profile or Profile(),
            split,
        )


@pytest.fixture
def hospital(tmp_path: Path, make_spec: Callable[..., RunSpec]) -> Hospital:
    """An empty hospital."""
    return Hospital(tmp_path, make_spec)
