"""Writing a cohort: append only, all or nothing.

The cohort grows in a hidden directory beside its target. Only `CohortBuilder.finish` gives it
its name, after every byte is on the disk. Whatever ends the work before that (an error, a full
disk) removes the hidden directory; what a killed process left behind is removed by the next
intake to the same target. Memory does not grow with the cohort, but for the index of a sealed one,
some hundred bytes an image, which is made in memory.

What writes the files (`ImageFile`, `write_index`) serves a writer that goes on after a kill too.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import math
import os
import shutil
import sqlite3
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from common.cohort import (
    BOX_NUMBERS,
    IMAGES_FILE,
    INDEX_FILE,
    PIXEL,
    SCHEMA_SQL,
    CohortMeta,
    problem_with_box,
)
from common.cohort_seal import SEAL_FILE, SEALED_IMAGES, SEALED_INDEX, CohortSeal
from common.errors import CohortError
from common.files import flush_folder
from common.sealed import OVERHEAD
from common.spec import Task

Box = tuple[float, float, float, float, int]
"""Left, top, right and bottom in parts of the image's sides, and a class number."""

Label = int | tuple[int, ...] | tuple[Box, ...]
"""A class number; for a multilabel task a 0 or 1 for each class; boxes; 0 beside a mask."""


@dataclass(frozen=True)
class ImageRecord:
    """All that is kept of an image beside its pixels.

    ``patient``, ``study``, ``series`` and ``instance`` are keyed pseudonyms
    (`client.intake.keys`), ``height`` and ``width`` the size of the original in pixels,
    ``modality`` what the source or the label table calls the way it was made.
    """

    patient: str
    study: str
    series: str
    instance: str
    label: Label
    height: int
    width: int
    split: str = ""
    modality: str = ""


class ImageFile:
    """The images of a cohort that grows, plain or sealed: appended, cut back, never rewritten.

    A file that is there already is gone on with; a piece that a killed process wrote in part is
    cut off. The caller sees to it that nobody else writes there.

    Args:
        folder: where it lies, under the name that a cohort has for it.
        image_bytes: of one image's pixels.
        seal: seals each image; None for a plain file.

    Raises:
        CohortError: if it cannot be opened or made.
    """

    def __init__(self, folder: Path, image_bytes: int, seal: CohortSeal | None = None) -> None:
        self._path = folder / (IMAGES_FILE if seal is None else SEALED_IMAGES)
        self._image_bytes = image_bytes
        self._seal = seal
        self._piece = image_bytes + (0 if seal is None else OVERHEAD)
        self._descriptor = -1
        with _writing(self._path):
            flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW
            self._descriptor = os.open(self._path, flags, 0o600)
            self._count = os.fstat(self._descriptor).st_size // self._piece
            os.ftruncate(self._descriptor, self._count * self._piece)

    def __len__(self) -> int:
        """Whole images in the file."""
        return self._count

    def append(self, pixels: bytes) -> str:
        """Add one image, as stored (`common.cohort.PIXEL`), as the row ``len(self)``.

        Returns:
            The SHA-256 of `pixels`, as the index has it.

        Raises:
            CohortError: if it has another size, or the disk refuses; nothing of it is left then.
        """
        if len(pixels) != self._image_bytes:
            raise CohortError(
                f"{self._path}: an image of {len(pixels)} bytes; expected {self._image_bytes}"
            )
        sha256 = hashlib.sha256(pixels).hexdigest()
        sealed = self._seal and self._seal.close_image(self._count, pixels, sha256)
        with _writing(self._path):
            try:
                _write_whole(self._descriptor, sealed or pixels)
            except OSError:
                os.ftruncate(self._descriptor, self._count * self._piece)
                raise
        self._count += 1
        return sha256

    def truncate(self, count: int) -> None:
        """Keep the first `count` images alone.

        Raises:
            CohortError: if there are fewer, or the disk refuses.
        """
        if not 0 <= count <= self._count:
            raise CohortError(
                f"{self._path}: {self._count} images, expected at least {count}; some were lost: "
                "begin the intake anew"
            )
        with _writing(self._path):
            os.ftruncate(self._descriptor, count * self._piece)
        self._count = count

    def flush(self) -> None:
        """Return when everything is on the disk.

        Raises:
            CohortError: if the disk refuses.
        """
        with _writing(self._path):
            os.fsync(self._descriptor)

    def close(self) -> None:
        """Close the file; a second time does nothing."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


class _IndexFile:
    """The index of a cohort that grows; under its name only when `finish` has put it there.

    A sealed one is made in memory, so that nothing of it is ever plain on the disk.
    """

    def __init__(self, folder: Path, seal: CohortSeal | None) -> None:
        self._folder = folder
        self._seal = seal
        self._count = 0
        self._path = folder / (INDEX_FILE if seal is None else SEALED_INDEX)
        self._partial = _partial(self._path)
        if seal is None:
            os.close(_create(self._partial))
        self._database = _new_index(":memory:" if seal else str(self._partial))

    def __len__(self) -> int:
        return self._count

    def add(self, record: ImageRecord, sha256: str) -> None:
        self._database.execute(
            "INSERT INTO image VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (self._count, *_columns(record, sha256)),
        )
        self._count += 1

    def finish(self, meta: CohortMeta) -> None:
        """Describe the cohort, and put everything on the disk."""
        self._database.executemany("INSERT INTO meta VALUES (?, ?)", meta.to_rows())
        self._database.commit()
        if self._seal is not None:
            _put(self._folder / SEAL_FILE, self._seal.content)
            _put(self._path, self._seal.close_index(self._database.serialize()))
            return
        self._database.close()
        flush_folder(self._partial)  # a file is flushed alike
        self._partial.replace(self._path)
        flush_folder(self._folder)

    def close(self) -> None:
        """Close it; what was not finished is removed."""
        self._database.close()
        self._partial.unlink(missing_ok=True)


def write_index(
    folder: Path,
    meta: CohortMeta,
    rows: Iterable[tuple[ImageRecord, str]],
    seal: CohortSeal | None = None,
) -> int:
    """Write the index of a cohort, durably and at once; one that is there is replaced.

    A plain one is the same file, byte for byte, for the same rows and the same version of SQLite.

    Args:
        folder: the cohort's, with its `ImageFile`.
        meta: what holds for the cohort.
        rows: the record of each image and the SHA-256 of its pixels, in the order of the images.
        seal: as that of the images; it is named in ``sealed.json`` then.

    Returns:
        How many rows there are.

    Raises:
        CohortError: if the disk refuses.
    """
    with _writing(folder):
        index = _IndexFile(folder, seal)
    with closing(index):
        for record, sha256 in rows:
            with _writing(folder):
                index.add(record, sha256)
        with _writing(folder):
            index.finish(meta)
        return len(index)


class CohortBuilder:
    """Writes one cohort; use it as a context manager and call `finish` inside.

    Args:
        path: the cohort's directory, which must not exist.
        shape: (channels, height, width) of every image, of volumes with their depth.
        key: of 32 bytes, seals it; None leaves it plain.
        task: that the cohort is for; without one there are neither masks nor boxes.

    Raises:
        CohortError: if `path` exists, cannot be written, or is being written by another process.
    """

    def __init__(
        self,
        path: Path,
        shape: tuple[int, ...],
        key: bytes | None = None,
        task: Task | None = None,
    ) -> None:
        self._path = path
        self._shape = shape
        self._task = task
        self._finished = False
        if path.exists() or path.is_symlink():
            raise CohortError(
                f"{path}: exists already; a cohort is never overwritten: choose another name, "
                "or remove it if it is yours to remove"
            )
        self._work = path.parent / f".{path.name}.partial"
        seal = None if key is None else CohortSeal.new(key)
        with _writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._lock = _claim(self._work)
            masks = math.prod(shape[1:]) if task is not None and task.kind == "mask" else 0
            self._images = ImageFile(self._work, (math.prod(shape) + masks) * PIXEL.itemsize, seal)
            self._index = _IndexFile(self._work, seal)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._index.close()
        self._images.close()
        if not self._finished:
            shutil.rmtree(self._work, ignore_errors=True)
        os.close(self._lock)

    def __len__(self) -> int:
        return len(self._images)

    def add(
        self,
        record: ImageRecord,
        pixels: NDArray[np.uint16],
        mask: NDArray[np.uint16] | None = None,
    ) -> None:
        """Append one image.

        Args:
            record: its names and its label.
            pixels: of the cohort's shape.
            mask: class numbers of its sides, where the task has masks.

        Raises:
            CohortError: if a shape or type differs, the target is none of the task's, or the disk
                refuses.
        """
        if pixels.shape != self._shape or pixels.dtype != np.uint16:
            raise CohortError(
                f"{self._path}: an image of shape {pixels.shape} and type {pixels.dtype}; "
                f"expected {self._shape} of uint16"
            )
        if problem := problem_with_target(self._task, record.label, mask, pixels.shape[1:]):
            raise CohortError(f"{self._path}: image {record.instance}: {problem}")
        sha256 = self._images.append(stored(pixels, mask))
        with _writing(self._path):
            self._index.add(record, sha256)

    def finish(self, meta: CohortMeta) -> None:
        """Put everything on the disk, then give the cohort its name.

        Raises:
            CohortError: if the description does not fit the images, the disk refuses, or the
                target has come into being meanwhile. Nothing is left in each case.
        """
        if meta.shape != self._shape:
            raise CohortError(f"{self._path}: shape {meta.shape}; the images have {self._shape}")
        kind = "" if self._task is None else self._task.kind
        if (meta.kind == "mask") != (kind == "mask"):
            raise CohortError(f"{self._path}: described as {meta.kind}, written for {kind or None}")
        with _writing(self._path):
            self._images.flush()
            self._index.finish(meta)
            os.rename(self._work, self._path)
            self._finished = True
            flush_folder(self._path.parent)


def problem_with_target(
    task: Task | None, label: Label, mask: NDArray[Any] | None, size: tuple[int, ...]
) -> str:
    """Why a mask or boxes do not serve a task, or nothing.

    Args:
        task: that the cohort is for; None: one with labels.
        label: the image's.
        mask: the image's.
        size: the sides of the image.
    """
    kind, classes = ("", 0) if task is None else (task.kind, len(task.classes))
    if (mask is not None) != (kind == "mask"):
        return "a mask for a task without masks" if mask is not None else "its mask is missing"
    if mask is not None:
        return _problem_with_mask(mask, classes, size)
    if kind == "boxes":
        if not isinstance(label, tuple):
            return f"{label!r}: expected boxes, of which there may be none"
        return next((f"box {p}" for box in label if (p := _problem_with_box(box, classes))), "")
    return ""


def _problem_with_mask(mask: NDArray[Any], classes: int, size: tuple[int, ...]) -> str:
    if mask.shape != size or mask.dtype != np.uint16:
        return f"a mask of shape {mask.shape} and type {mask.dtype}; expected {size} of uint16"
    if mask.max(initial=0) >= classes:
        return f"its mask has the value {mask.max()}; expected class numbers of {classes} classes"
    return ""


def _problem_with_box(box: Any, classes: int) -> str:
    if not isinstance(box, tuple) or len(box) != BOX_NUMBERS:
        return f"{box!r}: expected left, top, right, bottom and class"
    return problem_with_box(box, classes)


def stored(pixels: NDArray[np.uint16], mask: NDArray[np.uint16] | None = None) -> bytes:
    """An image, and its mask behind it, as a cohort stores them."""
    planes = pixels.astype(PIXEL, copy=False).tobytes()
    return planes if mask is None else planes + mask.astype(PIXEL, copy=False).tobytes()


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
        record.modality,
    )


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, sqlite3.Error) as error:
        raise CohortError(
            f"{path}: cannot be written ({error}); check the folder, its rights and its space"
        ) from error


def _write_whole(descriptor: int, content: bytes) -> None:
    rest = memoryview(content)
    while rest:
        rest = rest[os.write(descriptor, rest) :]


def _partial(path: Path) -> Path:
    """Where a file grows; what a killed process left there is removed."""
    partial = path.with_name(f"{path.name}.partial")
    partial.unlink(missing_ok=True)
    return partial


def _create(file: Path) -> int:
    """A new file that only its owner may read."""
    return os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)


def _put(path: Path, content: bytes) -> None:
    """Put a whole file that only its owner may read under its name, durably."""
    partial = _partial(path)
    descriptor = _create(partial)
    try:
        _write_whole(descriptor, content)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    partial.replace(path)
    flush_folder(path.parent)


def _new_index(place: str) -> sqlite3.Connection:
    """An empty index in one transaction; it needs no journal: unfinished, it is thrown away."""
    database = sqlite3.connect(place, isolation_level=None)
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
