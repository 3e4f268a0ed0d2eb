"""Tesseract as a second opinion on text in pictures: it lists what it reads, and decides nothing.

It reads fewer lines than `client.intake.deid.findtext` finds, and sees letters in trabeculae; but
it errs in other ways. The program is optional, and a process of its own with a time limit.
"""

from __future__ import annotations

import csv
import io
import shutil
import subprocess
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from common.errors import ConfigError, IntakeError

_PROGRAM = "tesseract"
_SPARSE_TEXT = "11"
"""Page segmentation: find as much text as possible, in no order."""
_ENLARGED = 2
_FEWEST_LETTERS = 3
_WORD_LEVEL = "5"
_BACKGROUND = 127


class Word(NamedTuple):
    """A word that was read: its letters are patient data. Rows and columns are the picture's."""

    text: str
    confidence: float
    top: int
    left: int
    bottom: int
    right: int


@dataclass(frozen=True)
class Reader:
    """Reads words in pictures.

    Args:
        least_confidence: of a word, in per cent.
        seconds: for one picture.

    Raises:
        ConfigError: if the program is not installed, with the way out.
    """

    least_confidence: float = 60.0
    seconds: float = 60.0

    def __post_init__(self) -> None:
        if shutil.which(_PROGRAM) is None:
            raise ConfigError(
                f"the program {_PROGRAM} is not installed, and a second opinion needs it: "
                "`apt install tesseract-ocr` (or your system's package of that name), "
                "or go without --ocr"
            )

    def words(self, picture: NDArray[np.uint8]) -> list[Word]:
        """Words of three letters or more, as dark on light and as light on dark.

        Args:
            picture: (height, width) of greys.

        Raises:
            IntakeError: if the program fails, or takes too long.
        """
        enlarged = Image.fromarray(picture).resize(
            (picture.shape[1] * _ENLARGED, picture.shape[0] * _ENLARGED), Image.Resampling.BICUBIC
        )
        greys = np.asarray(enlarged)
        if greys.mean() < _BACKGROUND:
            greys = 255 - greys
        read = sorted(self._read(greys) + self._read(255 - greys), key=lambda one: -one.confidence)
        once: list[Word] = []
        for word in read:
            if not any(word.text == other.text and _overlap(word, other) for other in once):
                once.append(word)
        return sorted(once, key=lambda word: (word.top, word.left))

    def _read(self, greys: NDArray[np.uint8]) -> list[Word]:
        buffer = io.BytesIO()
        Image.fromarray(greys).save(buffer, "PNG")
        command = [_PROGRAM, "stdin", "stdout", "--psm", _SPARSE_TEXT, "tsv"]
        try:
            done = subprocess.run(  # noqa: S603 - a fixed command; the picture is on its stdin
                command,
                input=buffer.getvalue(),
                capture_output=True,
                timeout=self.seconds,
                check=True,
                env={"OMP_THREAD_LIMIT": "1", "PATH": _path()},
            )
        except subprocess.TimeoutExpired:
            raise IntakeError(
                f"{_PROGRAM} took more than {self.seconds:g} seconds for one picture"
            ) from None
        except (OSError, subprocess.CalledProcessError) as error:
            # What it prints may quote what it read.
            raise IntakeError(f"{_PROGRAM} failed ({type(error).__name__})") from None
        return list(filter(None, map(self._word, _rows(done.stdout))))

    def _word(self, row: dict[str, str]) -> Word | None:
        text = (row.get("text") or "").strip()
        if row.get("level") != _WORD_LEVEL or sum(map(str.isalnum, text)) < _FEWEST_LETTERS:
            return None
        confidence = float(row["conf"])
        if confidence < self.least_confidence:
            return None
        left, top, width, height = (int(row[name]) for name in ("left", "top", "width", "height"))
        sides = (top, left, top + height, left + width)
        return Word(text, confidence, *(side // _ENLARGED for side in sides))


def _overlap(one: Word, other: Word) -> bool:
    return (
        one.top < other.bottom
        and other.top < one.bottom
        and one.left < other.right
        and other.left < one.right
    )


def _path() -> str:
    program = shutil.which(_PROGRAM)
    return "" if program is None else program.rpartition("/")[0]


def _rows(output: bytes) -> list[dict[str, str]]:
    text = output.decode("utf-8", "replace")
    return list(csv.DictReader(io.StringIO(text), delimiter="\t", quoting=csv.QUOTE_NONE))
