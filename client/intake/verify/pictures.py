"""The pictures of a cohort or of DICOM files, as greys for a reader of text."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydicom import dcmread
from pydicom.pixels.utils import iter_pixels

from client.intake.ocr import Reader, Word
from client.intake.quiet import quiet
from client.intake.verify.header import PIXELS
from client.intake.verify.layout import is_dicom
from common.cohort import INDEX_FILE, Cohort
from common.cohort_seal import SEALED_INDEX
from common.errors import DataError

_HEAD, _LARGE = 132, 4096
_COLOUR = 3


class Picture(NamedTuple):
    """One picture: the file it is of, its number in it from 0, and its greys."""

    file: str
    number: int
    greys: NDArray[np.uint8]


class Reading(NamedTuple):
    """The words that were read in one picture; ``failed`` says why there is nothing to say."""

    file: str
    number: int
    words: tuple[Word, ...]
    failed: str = ""


def readings(
    place: Path,
    reader: Reader,
    progress: Callable[[int, int], None] = lambda _done, _total: None,
    cohort_key: bytes | None = None,
) -> list[Reading]:
    """Every picture in which words can be read, or that cannot be looked at.

    Args:
        place: a cohort, a folder of DICOM files, or one of them.
        reader: reads words.
        progress: told how many pictures of a cohort, or files, are done, of how many.
        cohort_key: opens a sealed cohort.

    Raises:
        DataError: if a cohort cannot be opened.
    """
    found = []
    for picture, done, total in _pictures(place, cohort_key):
        if isinstance(picture, Reading):
            found.append(picture)
        else:
            try:
                words = tuple(reader.words(picture.greys))
            except DataError as error:
                found.append(Reading(picture.file, picture.number, (), str(error)))
            else:
                if words:
                    found.append(Reading(picture.file, picture.number, words))
        progress(done, total)
    return found


def _pictures(
    place: Path, cohort_key: bytes | None
) -> Iterator[tuple[Picture | Reading, int, int]]:
    if any((place / name).is_file() for name in (INDEX_FILE, SEALED_INDEX)):
        cohort = Cohort.open(place, cohort_key)
        for row in range(len(cohort)):
            image = cohort.images([row])[0].max(axis=0)
            greys = np.rint(image * 255).astype(np.uint8)
            for plane in greys.reshape(-1, *greys.shape[-2:]):  # of a volume each slice
                yield Picture("images", row, plane), row + 1, len(cohort)
        return
    files = [place] if place.is_file() else sorted(path for path in place.rglob("*"))
    files = [path for path in files if path.is_file() and _is_object(path)]
    for number, path in enumerate(files, 1):
        name = path.name if path == place else str(path.relative_to(place))
        for picture in _frames(path, name):
            yield picture, number, len(files)


def _is_object(path: Path) -> bool:
    with path.open("rb") as file:
        return is_dicom(file.read(_HEAD))


def _frames(path: Path, name: str) -> Iterator[Picture | Reading]:
    with quiet():
        try:
            header = dcmread(path, defer_size=_LARGE)
            if not any(keyword in header for keyword in PIXELS):
                return
            for number, frame in enumerate(iter_pixels(path)):
                yield Picture(name, number, _greys(frame))
        except Exception as error:  # noqa: BLE001
            # Codecs raise whatever broken bytes drive them to, and quote them.
            yield Reading(name, 0, (), f"cannot be decoded ({type(error).__name__})")


def _greys(frame: NDArray[Any]) -> NDArray[np.uint8]:
    """Brightness over the whole range of the picture, 0 to 255."""
    plane = frame.max(axis=2) if frame.ndim == _COLOUR else frame
    low, high = float(plane.min()), float(plane.max())
    scaled = (plane.astype(np.float32) - low) * (255 / (high - low or 1))
    return scaled.astype(np.uint8)
