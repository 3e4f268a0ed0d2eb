"""A cohort, through its public face: what a reader may rely on, and what it refuses."""

from __future__ import annotations

import os
import pickle
import sqlite3
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from client.intake.builder import CohortBuilder, ImageRecord, Label
from common.cohort import IMAGES_FILE, INDEX_FILE, Cohort, CohortMeta
from common.errors import CohortError
from common.spec import RunSpec, parse_run_text

SPEC = """
name = "test"
rounds = 1
[task]
kind = "binary"
classes = ["normal", "finding"]
[model]
name = "small-cnn"
[input]
channels = 1
height = 8
width = 10
[optimizer]
name = "sgd"
learning_rate = 0.1
[local]
batch_size = 4
[privacy]
mechanism = "none"
[aggregation]
strategy = "fedavg"
"""

Write = Callable[..., Path]


def spec_of(changes: dict[str, str] | None = None) -> RunSpec:
    text = SPEC
    for old, new in (changes or {}).items():
        assert old in text
        text = text.replace(old, new)
    return parse_run_text(text, source="test.toml").spec


def private(unit: str) -> RunSpec:
    text = SPEC.replace(
        'mechanism = "none"',
        f'mechanism = "dp-sgd"\nunit = "{unit}"\nnoise_multiplier = 1.0\ndelta = 1e-4',
    )
    return parse_run_text(text, source="test.toml").spec


def pixels_of(number: int, shape: tuple[int, int, int] = (1, 8, 10)) -> NDArray[np.uint16]:
    return np.random.default_rng(number).integers(0, 65536, shape, dtype=np.uint16)


META = CohortMeta.of(spec_of(), unit="patient", source="test", created="2026-01-01")


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def _write(
        patients: Sequence[str],
        labels: Sequence[Label],
        splits: Sequence[str] | None = None,
        meta: CohortMeta = META,
    ) -> Path:
        path = tmp_path / "cohort"
        with CohortBuilder(path, meta.shape) as builder:
            for number, (patient, label) in enumerate(zip(patients, labels, strict=True)):
                split = splits[number] if splits else ""
                record = ImageRecord(patient, "st", "se", str(number), label, 20, 30, split)
                builder.add(record, pixels_of(number, meta.shape))
            builder.finish(meta)
        return path

    return _write


def test_holds_what_was_written(write: Write) -> None:
    cohort = Cohort.open(write(["p2", "p1", "p2", "p3"], [0, 1, 1, 0]))

    assert len(cohort) == 4
    assert cohort.patients == ("p1", "p2", "p3")
    assert cohort.patient_index.tolist() == [1, 0, 1, 2]
    assert cohort.labels.dtype == np.int64
    assert cohort.labels.tolist() == [0, 1, 1, 0]
    assert (cohort.unit, cohort.kind, cohort.shape) == ("patient", "binary", (1, 8, 10))
    assert cohort.classes == ("normal", "finding")
    images = cohort.images([3, 0, 3])
    assert images.dtype == np.float32
    for image, number in zip(images, (3, 0, 3), strict=True):
        np.testing.assert_array_equal(
            image, pixels_of(number).astype(np.float32) / np.float32(65535)
        )
    cohort.verify()


def test_rows_of_agrees_with_patient_index(write: Write) -> None:
    names = [f"p{number}" for number in np.random.default_rng(1).integers(0, 9, 50)]
    cohort = Cohort.open(write(names, [0] * 50))

    for patient in range(len(cohort.patients)):
        expected = np.flatnonzero(cohort.patient_index == patient)
        np.testing.assert_array_equal(cohort.rows_of(patient), expected)
    for wrong in (-1, len(cohort.patients)):
        with pytest.raises(CohortError, match="this cohort has 9"):
            cohort.rows_of(wrong)


def test_multilabel_labels_are_vectors(write: Write) -> None:
    meta = replace(META, kind="multilabel")
    cohort = Cohort.open(write(["a", "b"], [(0, 1), (1, 1)], meta=meta))

    assert cohort.labels.dtype == np.float32
    assert cohort.labels.tolist() == [[0, 1], [1, 1]]


@pytest.mark.parametrize("kind", ["binary", "multilabel"])
def test_an_empty_cohort_opens_and_works(write: Write, kind: str) -> None:
    cohort = Cohort.open(write([], [], meta=replace(META, kind=kind)))

    assert len(cohort) == 0
    assert cohort.patients == ()
    assert cohort.images([]).shape == (0, 1, 8, 10)
    assert cohort.labels.shape[0] == 0
    assert len(cohort.subset([])) == 0
    assert len(cohort.with_split("train")) == 0
    cohort.verify()


def test_a_subset_is_a_cohort_of_fewer_patients(write: Write) -> None:
    cohort = Cohort.open(write(["b", "a", "c", "b", "a"], [0, 1, 0, 1, 1]))

    view = cohort.subset([2, 0])

    assert view.patients == ("a", "c")
    assert view.patient_index.tolist() == [0, 1, 0]
    assert view.labels.tolist() == [1, 0, 1]
    assert view.rows_of(0).tolist() == [0, 2]
    np.testing.assert_array_equal(view.images([1]), cohort.images([2]))
    np.testing.assert_array_equal(view.subset([0]).images([1]), cohort.images([4]))
    assert len(cohort) == 5
    with pytest.raises(CohortError, match="this cohort has 3"):
        cohort.subset([3])


def test_splits_are_views(write: Write) -> None:
    cohort = Cohort.open(write(["a", "b", "c"], [0, 1, 0], ["train", "test", ""]))

    assert cohort.splits.tolist() == ["train", "test", ""]
    assert cohort.with_split("train", "test").patients == ("a", "b")
    assert cohort.with_split("").patients == ("c",)
    with pytest.raises(CohortError, match="'training'"):
        cohort.with_split("training")


def test_pickles_by_path(write: Write) -> None:
    cohort = Cohort.open(write(["a", "b"] * 50, [0, 1] * 50))
    cohort.images([0])

    carried = pickle.dumps(cohort)

    assert len(carried) < 1000
    np.testing.assert_array_equal(pickle.loads(carried).images([7]), cohort.images([7]))  # noqa: S301
    view = pickle.loads(pickle.dumps(cohort.subset([1])))  # noqa: S301
    assert view.patients == ("b",)
    with get_context("spawn").Pool(1) as pool:
        seen = pool.apply(_first_image, (cohort.subset([1]),))
    np.testing.assert_array_equal(seen, cohort.images([1])[0])


def _first_image(cohort: Cohort) -> NDArray[np.float32]:
    return np.array(cohort.images([0])[0])


def test_opening_and_reading_leaves_the_directory_as_it_is(write: Write) -> None:
    path = write(["a"], [0])
    before = {file.name: file.stat().st_mtime_ns for file in path.iterdir()}

    cohort = Cohort.open(path)
    cohort.images([0])
    cohort.verify()

    assert {file.name: file.stat().st_mtime_ns for file in path.iterdir()} == before


@pytest.mark.parametrize("missing", [INDEX_FILE, IMAGES_FILE])
def test_refuses_what_is_incomplete(write: Write, missing: str) -> None:
    path = write(["a"], [0])
    (path / missing).unlink()

    with pytest.raises(CohortError, match=missing):
        Cohort.open(path)


def test_refuses_a_missing_directory(tmp_path: Path) -> None:
    with pytest.raises(CohortError, match="not a cohort"):
        Cohort.open(tmp_path / "nowhere")


@pytest.mark.parametrize("change", [-2, 2])
def test_refuses_pixels_of_another_size(write: Write, change: int) -> None:
    path = write(["a", "b"], [0, 1])
    size = (path / IMAGES_FILE).stat().st_size
    os.truncate(path / IMAGES_FILE, size + change)

    with pytest.raises(CohortError, match=f"{size + change} bytes, the index describes {size}"):
        Cohort.open(path)


def test_refuses_an_index_that_is_not_one(write: Write) -> None:
    path = write(["a"], [0])
    (path / INDEX_FILE).write_bytes(b"no database at all" * 100)

    with pytest.raises(CohortError, match="damaged"):
        Cohort.open(path)


@pytest.mark.parametrize(
    ("statement", "reason"),
    [
        ("UPDATE meta SET value = '99' WHERE key = 'format'", "format 99"),
        ("DELETE FROM meta WHERE key = 'format'", "format None"),
        ("DELETE FROM meta WHERE key = 'unit'", "unit"),
        ("UPDATE meta SET value = '\"person\"' WHERE key = 'unit'", "person"),
        ("UPDATE meta SET value = '[0, 8, 10]' WHERE key = 'shape'", "shape"),
        ("UPDATE meta SET value = '{' WHERE key = 'classes'", "cannot be understood"),
        ("UPDATE image SET label = '2' WHERE row = 0", "one of its 2 classes"),
        ("UPDATE image SET label = '0.5' WHERE row = 0", "one of its 2 classes"),
        ("UPDATE image SET label = 'x' WHERE row = 0", "cannot be understood"),
        ("UPDATE image SET label = '[0, 1]' WHERE row = 0", "cannot be understood"),
        ("UPDATE image SET split = 'dev' WHERE row = 0", "split"),
        ("UPDATE image SET row = 7 WHERE row = 0", "numbered"),
        ("DROP TABLE image", "damaged"),
    ],
)
def test_refuses_an_index_that_does_not_add_up(write: Write, statement: str, reason: str) -> None:
    path = write(["a", "b"], [0, 1])
    with closing(sqlite3.connect(path / INDEX_FILE)) as database:
        database.execute(statement)
        database.commit()

    with pytest.raises(CohortError, match=reason):
        Cohort.open(path)


def test_verify_sees_one_changed_bit(write: Write) -> None:
    path = write(["a", "b"], [0, 1])
    data = bytearray((path / IMAGES_FILE).read_bytes())
    data[-1] ^= 1
    (path / IMAGES_FILE).write_bytes(data)

    cohort = Cohort.open(path)
    with pytest.raises(CohortError, match="image 1 has SHA-256"):
        cohort.verify()


def test_fits_the_run_it_was_made_for(write: Write) -> None:
    cohort = Cohort.open(write(["a"], [0]))

    cohort.check_fits(spec_of())
    cohort.check_fits(private("patient"))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"height = 8": "height = 16"}, "shape is"),
        ({"width = 10": 'width = 10\nfit = "crop"'}, "fit=pad.*fit=crop"),
        ({'"finding"': '"nodule"'}, "nodule"),
        ({'"binary"': '"multiclass"'}, "multiclass"),
    ],
)
def test_names_what_does_not_fit(write: Write, changes: dict[str, str], named: str) -> None:
    cohort = Cohort.open(write(["a"], [0]))

    with pytest.raises(CohortError, match=named):
        cohort.check_fits(spec_of(changes))


def test_normalisation_is_not_part_of_preprocessing(write: Write) -> None:
    cohort = Cohort.open(write(["a"], [0]))

    cohort.check_fits(spec_of({"width = 10": "width = 10\nmean = [0.1]"}))


def test_the_unit_is_never_dressed_up(write: Write) -> None:
    cohort = Cohort.open(write(["a", "b"], [0, 1], meta=replace(META, unit="image")))

    cohort.check_fits(private("image"))
    for claim in (private("patient"), spec_of()):
        with pytest.raises(CohortError, match="unit"):
            cohort.check_fits(claim)


def test_an_image_level_claim_on_patients_is_refused_unless_there_is_no_privacy(
    write: Write,
) -> None:
    cohort = Cohort.open(write(["a", "b"], [0, 1]))

    with pytest.raises(CohortError, match="unit"):
        cohort.check_fits(private("image"))
    cohort.check_fits(spec_of({'"none"': '"none"\nunit = "image"'}))
