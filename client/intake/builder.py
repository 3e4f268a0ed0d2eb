"""Writing a cohort: append only, all or nothing.

The cohort grows in a hidden directory beside its target. Only `CohortBuilder.finish` gives it
its name, after every byte is on the disk. Whatever ends the work before that (an error, a full
disk) removes the hidden directory; what a killed process left behind is removed by the next
intake to the same target. Memory does not grow with the cohort.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
from numpy.typing import NDArray

from common.cohort import IMAGES_FILE, INDEX_FILE, PIXEL, SCHEMA_SQL, CohortMeta
from common.errors import CohortError

Label = int | tuple[int, ...]
"""A class number; for a multilabel task a 0 or 1 for each class."""


@dataclass(frozen=True)
class ImageRecord:
    """All that is kept of an image beside its pixels.

    ``patient``, ``study``, ``series`` and ``instance`` are keyed pseudonyms
    (`client.intake.keys`), ``height`` and ``width`` the size of the original in pixels.
    """

    patient: str
    study: str
    series: str
    instance: str
    label: Label
    height: int
    width: int
    split: str = ""


class CohortBuilder:
    """Writes one cohort; use it as a context manager and call `finish` inside.

    Args:
        path: the cohort's directory, which must not exist.
        shape: (channels, height, width) of every image.

    Raises:
        CohortError: if `path` exists, cannot be written, or is being written by another process.
    """

    def __init__(self, path: Path, shape: tuple[int, int, int]) -> None:
        self._path = path
        self._shape = shape
        self._count = 0
        self._finished = False
        if path.exists() or path.is_symlink():
            raise CohortError(
                f"{path}: exists already; a cohort is never overwritten: choose another name, "
                "or remove it if it is yours to remove"
            )
        self._work = path.parent / f".{path.name}.partial"
        with _writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._lock = _claim(self._work)
            self._images = os.fdopen(_create(self._work / IMAGES_FILE), "wb")
            os.close(_create(self._work / INDEX_FILE))
            self._database = _new_index(self._work / INDEX_FILE)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._database.close()
        if not self._finished:
            shutil.rmtree(self._work, ignore_errors=True)
        self._close_images(failing=error is not None or not self._finished)
        os.close(self._lock)

    def __len__(self) -> int:
        return self._count

    def add(self, record: ImageRecord, pixels: NDArray[np.uint16]) -> None:
        """Append one image; `pixels` has the cohort's shape.

        Raises:
            CohortError: if the shape or type differ, or the disk refuses.
        """
        if pixels.shape != self._shape or pixels.dtype != np.uint16:
            raise CohortError(
                f"{self._path}: an image of shape {pixels.shape} and type {pixels.dtype}; "
                f"expected {self._shape} of uint16"
            )
        data = pixels.astype(PIXEL, copy=False).tobytes()
        with _writing(self._path):
            self._images.write(data)
            self._database.execute(
                "INSERT INTO image VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (self._count, *_columns(record, hashlib.sha256(data).hexdigest())),
            )
        self._count += 1

    def finish(self, meta: CohortMeta) -> None:
        """Put everything on the disk, then give the cohort its name.

        Raises:
            CohortError: if the description does not fit the images, the disk refuses, or the
                target has come into being meanwhile. Nothing is left in each case.
        """
        if meta.shape != self._shape:
            raise CohortError(f"{self._path}: shape {meta.shape}; the images have {self._shape}")
        with _writing(self._path):
            self._database.executemany("INSERT INTO meta VALUES (?, ?)", meta.to_rows())
            self._database.commit()
            self._database.close()
            self._images.flush()
            os.fsync(self._images.fileno())
            self._images.close()
            _sync(self._work / INDEX_FILE)
            _sync(self._work)
            os.rename(self._work, self._path)
            self._finished = True
            _sync(self._path.parent)

    def _close_images(self, *, failing: bool) -> None:
        """Close the pixels; what a full disk could not take matters only to a finished cohort."""
        try:
            self._images.close()
        except OSError:
            if not failing:
                raise


def _columns(record: ImageRecord, sha256: str) -> tuple[str | int, ...]:
    return (
        record.patient,
        record.study,
        record.series,
        record.instance,
        json.dumps(record.label),
        sha256,
        record.height,
        record.width,
        record.split,
    )


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, sqlite3.Error) as error:
        raise CohortError(
            f"{path}: cannot be written ({error}); check the folder, its rights and its space"
        ) from error


def _create(file: Path) -> int:
    """A new file that only its owner may read."""
    return os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)


def _new_index(file: Path) -> sqlite3.Connection:
    """An empty index in one transaction; it needs no journal: unfinished, it is thrown away."""
    database = sqlite3.connect(file, isolation_level=None)
    database.execute("PRAGMA journal_mode = OFF")
    database.execute("PRAGMA synchronous = OFF")
    database.executescript(SCHEMA_SQL)
    database.execute("BEGIN")
    return database


def _claim(work: Path) -> int:
    """Create the hidden directory and lock it; a dead process' one is removed first.

    Returns:
        A descriptor whose lock lasts until it is closed, or the process ends.
    """
    if work.is_dir() and not work.is_symlink():
        stale = _lock(work)
        shutil.rmtree(work)
        os.close(stale)
    os.mkdir(work, 0o700)
    return _lock(work)


def _lock(work: Path) -> int:
    descriptor = os.open(work, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise CohortError(f"{work}: another intake is writing this cohort; wait for it") from None
    return descriptor


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
