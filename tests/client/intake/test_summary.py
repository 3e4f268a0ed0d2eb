"""Figures of a cohort, its warnings, and the contact sheet."""

from __future__ import annotations

import stat
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from client.intake.builder import CohortBuilder, ImageRecord, Label
from client.intake.sheet import write_sheet
from client.intake.summary import ClassCount, summarise
from common.cohort import Cohort, CohortMeta, Unit
from common.errors import CohortError
from common.spec import RunSpec, Task

Row = tuple[str, Label, str]
Write = Callable[..., Cohort]


@pytest.fixture
def write(tmp_path: Path, make_spec: Callable[..., RunSpec]) -> Write:
    def _write(rows: Sequence[Row], unit: Unit = "patient", channels: int = 1) -> Cohort:
        spec = make_spec(input={"channels": channels})
        meta = CohortMeta.of(spec, unit=unit, source="test", created="2026-01-01")
        with CohortBuilder(tmp_path / "c", spec.input.shape) as builder:
            for number, (patient, label, split) in enumerate(rows):
                pixels = np.full(spec.input.shape, number * 1000, dtype=np.uint16)
                record = ImageRecord(patient, "", "", str(number), label, 9, 9, split)
                builder.add(record, pixels)
            builder.finish(meta)
        return Cohort.open(tmp_path / "c")

    return _write


def test_counts(write: Write) -> None:
    rows = [("a", 0, ""), ("a", 0, ""), ("a", 1, ""), ("b", 0, "test"), ("c", 1, "")]

    summary = summarise(write(rows))

    assert (summary.images, summary.patients, summary.unit) == (5, 3, "patient")
    assert summary.classes == (ClassCount("normal", 3, 2), ClassCount("finding", 2, 2))
    assert summary.images_a_patient == (1, 5 / 3, 3)
    assert summary.splits == {"": 4, "test": 1}


@pytest.mark.parametrize(
    ("kind", "labels", "found"),
    [
        ("mask", [0, 0], (ClassCount("normal", 2, 2), ClassCount("finding", 1, 1))),
        (
            "boxes",
            [((0.1, 0.1, 0.2, 0.2, 1), (0.5, 0.5, 0.7, 0.7, 1)), ()],
            (ClassCount("normal", 0, 0), ClassCount("finding", 1, 1)),
        ),
        ("none", [0, 0], ()),
    ],
)
def test_counts_of_masks_boxes_and_nothing(
    tmp_path: Path, make_spec: Callable[..., RunSpec], kind: str, labels: Any, found: Any
) -> None:
    spec = make_spec()
    classes = spec.task.classes if found else ()
    meta = replace(
        CohortMeta.of(spec, unit="patient", source="test", created="2026-01-01"),
        kind=kind,
        classes=classes,
    )
    task = Task(name="test", kind=kind, classes=classes)
    mask = np.zeros(spec.input.shape[1:], dtype=np.uint16)
    with CohortBuilder(tmp_path / "c", spec.input.shape, task=task) as builder:
        for number, label in enumerate(labels):
            pixels = np.zeros(spec.input.shape, dtype=np.uint16)
            record = ImageRecord(f"p{number}", "", "", str(number), label, 9, 9)
            builder.add(record, pixels, mask if kind == "mask" else None)
            mask = mask.copy()
            mask[3, 4] = 1
        builder.finish(meta)

    summary = summarise(Cohort.open(tmp_path / "c"))

    assert (summary.images, summary.classes) == (2, found)
    absent = [text for text in summary.warnings if text.startswith("No image of")]
    assert absent == (["No image of 'normal'."] if kind == "boxes" else [])
    assert not any("one class" in text for text in summary.warnings)


def test_a_patient_in_two_splits_is_a_warning(write: Write) -> None:
    rows = [("a", 0, "train"), ("a", 1, "test"), ("b", 0, "train"), ("c", 1, "test")]

    assert any(text.startswith("1 patients have") for text in summarise(write(rows)).warnings)


def test_a_placeholder_patient_is_a_warning(write: Write) -> None:
    rows = [("anonymous", number % 2, "") for number in range(8)] + [("b", 0, "")]

    assert any("8 of 9 images" in text for text in summarise(write(rows)).warnings)


def test_a_sound_cohort_has_no_warning(write: Write) -> None:
    rows = [("a", 0, ""), ("b", 1, ""), ("c", 0, "")]

    assert summarise(write(rows)).warnings == ()


@pytest.mark.parametrize("channels", [1, 3])
def test_a_sheet_shows_some_images_to_its_owner_alone(
    write: Write, tmp_path: Path, channels: int
) -> None:
    cohort = write([(str(number), 0, "") for number in range(50)], channels=channels)

    count = write_sheet(cohort, tmp_path / "sheet.png", columns=4, rows=2)

    assert count == 8
    assert stat.S_IMODE((tmp_path / "sheet.png").stat().st_mode) == 0o600
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.mode == ("L" if channels == 1 else "RGB")
        assert sheet.size == (4 * 100 - 4, 2 * 100 - 4)
        assert sheet.convert("L").getpixel((0, 0)) == 0
        assert sheet.convert("L").getpixel((395, 195)) == round(49000 / 65535 * 255)
    with pytest.raises(CohortError, match="cannot be written"):
        write_sheet(cohort, tmp_path / "sheet.png")


def test_an_empty_cohort_has_no_sheet(write: Write, tmp_path: Path) -> None:
    with pytest.raises(CohortError, match="is empty"):
        write_sheet(write([]), tmp_path / "sheet.png")
