"""Tesseract as a second opinion: the program itself, on drawn pictures."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from client.intake.ocr import Reader
from client.intake.verify.pictures import readings
from common.errors import ConfigError, IntakeError

needs_tesseract = pytest.mark.skipif(
    shutil.which("tesseract") is None, reason="tesseract is not installed"
)


def picture(*lines: str, side: int = 256) -> NDArray[np.uint8]:
    """A soft dark hill with lines of bright text on it."""
    y, x = np.mgrid[-1 : 1 : side * 1j, -1 : 1 : side * 1j]
    hill = (90 * np.exp(-2 * (x**2 + y**2))).astype(np.uint8)
    layer = Image.fromarray(hill)
    for number, line in enumerate(lines):
        font = ImageFont.load_default(20)
        ImageDraw.Draw(layer).text((8, 8 + 30 * number), line, font=font, fill=255)
    return np.asarray(layer)


@needs_tesseract
def test_words_are_read_where_they_stand_and_nothing_where_there_are_none() -> None:
    reader = Reader()

    words = reader.words(picture("HOSPITAL NORTH", "MEYER ANNA"))

    assert {"HOSPITAL", "MEYER"} <= {word.text for word in words}
    (meyer,) = (word for word in words if word.text == "MEYER")
    assert abs(meyer.top - 43) < 8
    assert abs(meyer.left - 9) < 8
    assert all(word.confidence >= reader.least_confidence for word in words)
    assert reader.words(picture()) == []


@needs_tesseract
def test_dark_words_on_a_light_ground_are_read_too() -> None:
    words = Reader().words(255 - picture("HOSPITAL NORTH"))

    assert "HOSPITAL" in {word.text for word in words}


@needs_tesseract
def test_words_that_are_short_or_uncertain_are_left_out() -> None:
    text = picture("HOSPITAL OF")

    assert {len(word.text) >= 3 for word in Reader().words(text)} == {True}
    assert Reader(least_confidence=100.1).words(text) == []


@needs_tesseract
def test_it_takes_no_longer_than_it_may() -> None:
    with pytest.raises(IntakeError, match=r"more than 0\.001 seconds"):
        Reader(seconds=0.001).words(picture("HOSPITAL"))


def test_without_the_program_the_way_out_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")

    with pytest.raises(ConfigError, match="apt install tesseract-ocr"):
        Reader()


@needs_tesseract
def test_pictures_of_a_folder_with_words_are_listed(film: Any, tmp_path: Path) -> None:
    for name, lines in (("1.dcm", ["HOSPITAL NORTH"]), ("2.dcm", [])):
        film(picture(*lines).astype(np.uint16) * 16).save_as(
            tmp_path / name, enforce_file_format=True
        )
    (tmp_path / "3.dcm").write_bytes((tmp_path / "1.dcm").read_bytes()[:-9000])
    (tmp_path / "notes.txt").write_text("no picture")
    done: list[tuple[int, int]] = []

    found = readings(tmp_path, Reader(), lambda *step: done.append(step))

    assert [(one.file, one.number, bool(one.words)) for one in found] == [
        ("1.dcm", 0, True),
        ("3.dcm", 0, False),
    ]
    assert "cannot be decoded" in found[1].failed
    assert done[-1] == (3, 3)


@needs_tesseract
def test_pictures_of_a_cohort_with_words_are_listed(hospital: Any) -> None:
    hospital.film("a", (picture("HOSPITAL NORTH").astype(np.uint16) * 16))
    wide = {"height": 256, "width": 256}
    profile = hospital.labels({"P1": "normal"})
    path = hospital.take_in(profile, input=wide).cohort.path

    assert readings(path, Reader()) == []
