"""A cohort, through its public face: what a reader may rely on, and what it refuses."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import sqlite3
import stat
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from client.intake.builder import CohortBuilder, ImageFile, ImageRecord, Label, write_index
from common.cohort import IMAGES_FILE, INDEX_FILE, Cohort, CohortMeta
from common.cohort_seal import SEAL_FILE, SEALED_IMAGES, SEALED_INDEX, CohortSeal, key_id
from common.errors import CohortError, SealError
from common.sealed import OVERHEAD
from common.spec import RunSpec, Task, parse_run_text

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

KEY, OTHER_KEY = bytes(range(32)), bytes(range(1, 33))
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


def pixels_of(number: int, shape: tuple[int, ...] = (1, 8, 10)) -> NDArray[np.uint16]:
    return np.random.default_rng(number).integers(0, 65536, shape, dtype=np.uint16)


META = CohortMeta.of(spec_of(), unit="patient", source="test", created="2026-01-01")


MASKS = replace(META, kind="mask", classes=("background", "organ", "lesion"))
BOXES = replace(META, kind="boxes", classes=("red", "white"))
NOTHING = replace(META, kind="none", classes=())


def task_of(meta: CohortMeta) -> Task:
    """The section of a task with the target that `meta` describes."""
    return Task(name="test", kind=meta.kind, classes=meta.classes)


def mask_of(number: int) -> NDArray[np.uint16]:
    return np.random.default_rng([number, 1]).integers(0, 3, (8, 10)).astype(np.uint16)


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def _write(
        patients: Sequence[str],
        labels: Sequence[Label],
        splits: Sequence[str] | None = None,
        meta: CohortMeta = META,
        key: bytes | None = None,
    ) -> Path:
        path = tmp_path / f"cohort{len(list(tmp_path.iterdir()))}"
        with CohortBuilder(path, meta.shape, key, task_of(meta)) as builder:
            for number, (patient, label) in enumerate(zip(patients, labels, strict=True)):
                split = splits[number] if splits else ""
                record = ImageRecord(patient, "st", "se", str(number), label, 20, 30, split)
                mask = mask_of(number) if meta.kind == "mask" else None
                builder.add(record, pixels_of(number, meta.shape), mask)
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


@pytest.mark.parametrize("key", [None, KEY], ids=["plain", "sealed"])
def test_a_mask_is_kept_behind_its_image(write: Write, key: bytes | None) -> None:
    path = write(["p2", "p1", "p2"], [0, 0, 0], meta=MASKS, key=key)
    cohort = Cohort.open(path, key)

    assert (cohort.kind, cohort.shape) == ("mask", (1, 8, 10))
    masks = cohort.targets([2, 0, 2])
    assert masks.dtype == np.int64
    for mask, number in zip(masks, (2, 0, 2), strict=True):
        np.testing.assert_array_equal(mask, mask_of(number))
    np.testing.assert_array_equal(
        cohort.images([1])[0], pixels_of(1).astype(np.float32) / np.float32(65535)
    )
    of_second = cohort.subset([1])  # views count by themselves
    np.testing.assert_array_equal(of_second.targets([0, 1]), np.stack([mask_of(0), mask_of(2)]))
    assert cohort.labels.tolist() == [0, 0, 0]
    assert cohort.targets([]).shape == (0, 8, 10)
    cohort.verify()


@pytest.mark.parametrize("key", [None, KEY], ids=["plain", "sealed"])
def test_an_image_and_its_mask_are_opened_once(
    write: Write, key: bytes | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[int] = []
    open_image = CohortSeal.open_image

    def count(seal: CohortSeal, row: int, *rest: Any) -> bytes:
        opened.append(row)
        return open_image(seal, row, *rest)

    monkeypatch.setattr(CohortSeal, "open_image", count)
    cohort = Cohort.open(write(["p2", "p1", "p2"], [0] * 3, meta=MASKS, key=key), key).subset([1])
    images, masks = cohort.examples([1, 0, 1])
    assert opened == ([] if key is None else [2, 0, 2])
    np.testing.assert_array_equal(images, cohort.images([1, 0, 1]))
    np.testing.assert_array_equal(masks, cohort.targets([1, 0, 1]))
    assert images.dtype == np.float32
    assert masks.dtype == np.int64


@pytest.mark.parametrize("key", [None, KEY], ids=["plain", "sealed"])
def test_a_mask_of_no_class_reaches_no_loss_beside_its_image_either(
    write: Write, key: bytes | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    cohort = Cohort.open(write(["a"], [0], meta=MASKS, key=key), key)
    images, masks = cohort.examples([0])
    stored = np.concatenate([images * 65535, masks[:, None] + 3], axis=1).astype(np.uint16)
    monkeypatch.setattr(cohort, "_stored", lambda _: stored)
    with pytest.raises(CohortError, match="expected one of 3 classes"):
        cohort.examples([0])


def test_a_changed_mask_is_seen_and_one_of_no_class_never_reaches_a_loss(write: Write) -> None:
    path = write(["a", "b"], [0, 0], meta=MASKS)
    data = bytearray((path / IMAGES_FILE).read_bytes())
    data[-2] = 3  # the last pixel of the last mask
    (path / IMAGES_FILE).write_bytes(data)

    cohort = Cohort.open(path)
    with pytest.raises(CohortError, match="image 1 has SHA-256"):
        cohort.verify()
    cohort.images([0, 1])
    cohort.targets([0])
    with pytest.raises(CohortError, match="class number 3; expected one of 3 classes"):
        cohort.targets([0, 1])


@pytest.mark.parametrize("key", [None, KEY], ids=["plain", "sealed"])
def test_boxes_are_padded_to_the_image_that_has_most(write: Write, key: bytes | None) -> None:
    first, second = (0.0, 0.25, 0.5, 1.0, 1), (0.1, 0.2, 0.3, 0.4, 0)
    path = write(["b", "a", "c"], [(first, second), (), (second,)], meta=BOXES, key=key)
    cohort = Cohort.open(path, key)

    boxes = cohort.targets([1, 0, 2])
    assert boxes.dtype == np.float32
    none = (0, 0, 0, 0, -1)
    expected = np.array([[none, none], [first, second], [second, none]], dtype=np.float32)
    np.testing.assert_array_equal(boxes, expected)
    alone = cohort.subset([2])
    np.testing.assert_array_equal(alone.targets([0]), expected[2:])  # as wide as in every view
    assert cohort.labels.tolist() == [0, 0, 0]


def test_where_there_is_nothing_to_learn_a_target_is_empty(write: Write) -> None:
    cohort = Cohort.open(write(["a", "b"], [0, 0], meta=NOTHING))

    assert cohort.targets([1, 0]).shape == (2, 0)
    assert cohort.labels.tolist() == [0, 0]
    assert cohort.classes == ()
    assert cohort.present().shape == (2, 0)


def test_labels_are_the_targets_where_there_are_labels(write: Write) -> None:
    cohort = Cohort.open(write(["a", "b", "c"], [0, 1, 1]))
    assert cohort.targets([2, 0]).tolist() == [1, 0]
    assert cohort.targets([2, 0]).dtype == np.int64


def test_which_classes_an_image_has(write: Write) -> None:
    box = (0.1, 0.2, 0.3, 0.4, 1)
    boxes = Cohort.open(write(["a", "b"], [(box, box), ()], meta=BOXES))
    assert boxes.present().tolist() == [[False, True], [False, False]]
    labels = Cohort.open(write(["a", "b"], [1, 0]))
    assert labels.present().tolist() == [[False, True], [True, False]]
    many = Cohort.open(write(["a"], [(1, 1)], meta=replace(META, kind="multilabel")))
    assert many.present().tolist() == [[True, True]]
    names = [f"p{number}" for number in range(70)]  # more than are looked through at once
    masks = Cohort.open(write(names, [0] * 70, meta=MASKS)).subset(range(3, 69))
    slow = [[c in masks.targets([row])[0] for c in range(3)] for row in range(len(masks))]
    assert masks.present().tolist() == slow


BAD_TARGETS = {
    "a mask of another size": (MASKS, 0, np.zeros((10, 8), np.uint16), r"mask of shape \(10, 8\)"),
    "a mask of another type": (MASKS, 0, np.zeros((8, 10), np.int64), "type int64"),
    "a value of no class": (MASKS, 0, np.full((8, 10), 3, np.uint16), "the value 3; .* 3 classes"),
    "no mask": (MASKS, 0, None, "its mask is missing"),
    "a mask beside a label": (META, 0, np.zeros((8, 10), np.uint16), "without masks"),
    "a mask beside boxes": (BOXES, (), np.zeros((8, 10), np.uint16), "without masks"),
    "a box outside": (BOXES, ((0.1, 0.1, 1.2, 0.5, 0),), None, "1.2, 0.5 lies outside"),
    "a box in pixels": (BOXES, ((3.0, 4.0, 90.0, 80.0, 0),), None, "parts of its sides"),
    "a box inside out": (BOXES, ((0.5, 0.1, 0.2, 0.3, 0),), None, "no area"),
    "a box of no height": (BOXES, ((0.1, 0.3, 0.2, 0.3, 0),), None, "no area"),
    "a box of no number": (BOXES, ((0.1, float("nan"), 0.2, 0.3, 0),), None, "outside"),
    "a box of no class": (BOXES, ((0.1, 0.1, 0.2, 0.3, 2),), None, "class number 2; .* 2 classes"),
    "the second box": (
        *(BOXES, ((0.1, 0.1, 0.2, 0.3, 0), (0.1, 0.1, 0.2, 0.3, -1)), None),
        "class number -1",
    ),
    "four numbers": (BOXES, ((0.1, 0.1, 0.2, 0.3),), None, "left, top, right, bottom and class"),
    "no boxes": (BOXES, 0, None, "0: expected boxes"),
}


@pytest.mark.parametrize(("meta", "label", "mask", "reason"), BAD_TARGETS.values(), ids=BAD_TARGETS)
def test_a_target_that_is_none_is_refused_by_the_name_of_its_image(
    tmp_path: Path, meta: CohortMeta, label: Any, mask: NDArray[Any] | None, reason: str
) -> None:
    with CohortBuilder(tmp_path / "c", meta.shape, None, task_of(meta)) as builder:
        with pytest.raises(CohortError, match=f"image i7: .*{reason}"):
            builder.add(ImageRecord("p", "", "", "i7", label, 1, 1), pixels_of(0), mask)
        assert len(builder) == 0  # nothing of it is left


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[[0.5, 0.5, 0.4, 0.9, 0]]", "no area"),
        ("[[0, 0, 1, 1, 2]]", "class number 2"),
        ("[[0, 0, 1, 1]]", "cannot be understood"),
        ("[[0, 0, 1, 1, null]]", "class number nan"),
        ('"x"', "cannot be understood"),
    ],
)
def test_an_index_with_a_box_that_is_none_is_refused(write: Write, text: str, reason: str) -> None:
    path = write(["a"], [((0.0, 0.0, 1.0, 1.0, 1),)], meta=BOXES)
    Cohort.open(path)
    with closing(sqlite3.connect(path / INDEX_FILE)) as database:
        database.execute("UPDATE image SET label = ?", (text,))
        database.commit()
    with pytest.raises(CohortError, match=reason):
        Cohort.open(path)


def test_a_cohort_of_format_2_is_still_read(write: Write) -> None:
    path = write(["a", "b"], [0, 1])
    with closing(sqlite3.connect(path / INDEX_FILE)) as database:
        database.execute("UPDATE meta SET value = '2' WHERE key = 'format'")
        database.commit()
    assert Cohort.open(path).labels.tolist() == [0, 1]


def test_a_run_of_masks_and_a_cohort_of_labels_do_not_fit(write: Write) -> None:
    cohort = Cohort.open(write(["a", "b"], [0, 1]))
    run = spec_of(
        {
            'kind = "binary"': 'name = "segmentation"',
            "[optimizer]": '[loss]\nname = "dice"\n[evaluation]\nmetric = "dice"\n[optimizer]',
        }
    )
    with pytest.raises(CohortError, match=r"task\.kind is binary, the run asks for mask"):
        cohort.check_fits(run)


def test_a_run_that_looks_at_no_target_takes_every_cohort(write: Write) -> None:
    run = spec_of(
        {
            'kind = "binary"\nclasses = ["normal", "finding"]': 'name = "reconstruction"',
            "[optimizer]": '[loss]\nname = "mse"\n[evaluation]\nmetric = "psnr"\n[optimizer]',
        }
    )
    for meta, label in ((META, 0), (MASKS, 0), (BOXES, ()), (NOTHING, 0)):
        Cohort.open(write(["a"], [label], meta=meta)).check_fits(run)


@pytest.mark.parametrize("kind", ["binary", "multilabel", "mask", "boxes"])
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


def test_says_how_it_was_de_identified(write: Write) -> None:
    digest = "ab" * 32
    meta = replace(META, deidentification=digest)

    assert Cohort.open(write(["a"], [0], meta=meta)).meta.deidentification == digest
    assert Cohort.open(write(["a"], [0])).meta.deidentification == ""
    with pytest.raises(CohortError, match="expected a SHA-256"):
        replace(META, deidentification="the usual way")


def test_a_cohort_of_format_1_is_still_read(write: Write) -> None:
    path = write(["a", "b"], [0, 1])
    with closing(sqlite3.connect(path / INDEX_FILE)) as database:
        database.execute("UPDATE meta SET value = '1' WHERE key = 'format'")
        database.execute("DELETE FROM meta WHERE key = 'deidentification'")
        database.commit()

    cohort = Cohort.open(path)

    assert cohort.meta == META
    cohort.verify()


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
        ("UPDATE image SET sha256 = 'ab' WHERE row = 0", "SHA-256"),
        ("DELETE FROM meta WHERE key = 'deidentification'", "deidentification"),
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


# --- Sealed at rest -----------------------------------------------------------------------------

PIECE = 8 * 10 * 2 + OVERHEAD


@pytest.fixture
def sealed(write: Write) -> Path:
    return write(["secret-b", "secret-a", "secret-b"], [0, 1, 1], ["train", "test", ""], key=KEY)


def swap(file: Path, one: int, other: int) -> None:
    content = bytearray(file.read_bytes())
    a, b = slice(one * PIECE, (one + 1) * PIECE), slice(other * PIECE, (other + 1) * PIECE)
    content[a], content[b] = content[b], content[a]
    file.write_bytes(content)


def flip(file: Path, at: int) -> None:
    content = bytearray(file.read_bytes())
    content[at] ^= 1
    file.write_bytes(content)


def everything(cohort: Cohort) -> tuple[object, ...]:
    return (
        cohort.meta,
        cohort.patients,
        cohort.patient_index.tolist(),
        cohort.labels.tolist(),
        cohort.splits.tolist(),
        cohort.images(range(len(cohort))).tolist(),
        cohort.images([2, 0, 2]).tolist(),
        cohort.subset([1]).images([0]).tolist(),
        cohort.with_split("test").images([0]).tolist(),
    )


def test_a_sealed_cohort_reads_as_the_plain_one(write: Write, sealed: Path) -> None:
    plain = write(["secret-b", "secret-a", "secret-b"], [0, 1, 1], ["train", "test", ""])

    cohort = Cohort.open(sealed, KEY)

    assert everything(cohort) == everything(Cohort.open(plain))
    assert (cohort.is_sealed, Cohort.open(plain, KEY).is_sealed) == (True, False)
    cohort.verify()
    assert KEY.hex() not in repr(vars(cohort))
    assert repr(KEY) not in repr(vars(cohort))


@pytest.mark.parametrize("kind", ["binary", "multilabel"])
def test_an_empty_cohort_can_be_sealed(write: Write, kind: str) -> None:
    cohort = Cohort.open(write([], [], meta=replace(META, kind=kind), key=KEY), KEY)

    assert len(cohort) == 0
    assert cohort.images([]).shape == (0, 1, 8, 10)
    cohort.verify()


def test_nothing_of_a_sealed_cohort_is_plain_on_the_disk(write: Write, sealed: Path) -> None:
    plain = write(["secret-a"] * 2, [0, 1])

    assert b"secret-a" in (plain / INDEX_FILE).read_bytes()  # what is looked for would be found
    assert pixels_of(1).tobytes() in (plain / IMAGES_FILE).read_bytes()
    assert {file.name for file in sealed.iterdir()} == {SEALED_IMAGES, SEALED_INDEX, SEAL_FILE}
    for file in sealed.iterdir():
        content = file.read_bytes()
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
        for told in (b"secret", b"SQLite", b"finding", *(pixels_of(n).tobytes() for n in range(3))):
            assert told not in content
        assert KEY not in content
        assert KEY.hex().encode() not in content
    said = json.loads((sealed / SEAL_FILE).read_text())
    assert set(said) == {"format", "cohort", "key"}
    assert said["key"] == key_id(KEY) != key_id(OTHER_KEY)


def test_equal_images_are_not_equal_on_the_disk(tmp_path: Path) -> None:
    with CohortBuilder(tmp_path / "c", META.shape, KEY) as builder:
        for number in range(2):
            builder.add(ImageRecord("p", "", "", str(number), 0, 1, 1), pixels_of(0))
        builder.finish(META)

    content = (tmp_path / "c" / SEALED_IMAGES).read_bytes()

    assert len(content) == 2 * PIECE
    assert content[:PIECE] != content[PIECE:]
    swap(tmp_path / "c" / SEALED_IMAGES, 0, 1)
    with pytest.raises(CohortError, match="image 0 is not the one"):
        Cohort.open(tmp_path / "c", KEY).images([0])


def test_only_the_rows_that_are_asked_for_are_opened(sealed: Path) -> None:
    flip(sealed / SEALED_IMAGES, PIECE + 20)

    cohort = Cohort.open(sealed, KEY)

    assert cohort.images([0, 2]).shape == (2, 1, 8, 10)
    with pytest.raises(CohortError, match=rf"{SEALED_IMAGES}: image 1 is not the one.*take in"):
        cohort.images([0, 1])
    with pytest.raises(CohortError, match="image 1"):
        cohort.verify()


def test_a_sealed_cohort_without_its_key_says_which_is_expected(sealed: Path) -> None:
    with pytest.raises(CohortError, match=rf"{key_id(KEY)}.*\[intake.encryption\]"):
        Cohort.open(sealed)
    with pytest.raises(CohortError, match=rf"{key_id(KEY)}, given was the key {key_id(OTHER_KEY)}"):
        Cohort.open(sealed, OTHER_KEY)
    with pytest.raises(CohortError, match="31 bytes"):
        Cohort.open(sealed, KEY[:31])


@pytest.mark.parametrize("at", [0, 12, 100, -1])
def test_a_changed_byte_of_a_sealed_index_is_refused(sealed: Path, at: int) -> None:
    flip(sealed / SEALED_INDEX, at)

    with pytest.raises(CohortError, match=rf"{SEALED_INDEX}: .*cannot be opened.*take in again"):
        Cohort.open(sealed, KEY)


@pytest.mark.parametrize("length", [0, 1, 28, 1000])
def test_a_truncated_sealed_index_is_refused(sealed: Path, length: int) -> None:
    os.truncate(sealed / SEALED_INDEX, length)

    with pytest.raises(CohortError, match=rf"{SEALED_INDEX}: .*cannot be opened"):
        Cohort.open(sealed, KEY)


@pytest.mark.parametrize("count", [2 * PIECE, 3 * PIECE - 1, 4 * PIECE, 0])
def test_sealed_images_of_another_size_are_refused(sealed: Path, count: int) -> None:
    os.truncate(sealed / SEALED_IMAGES, count)

    with pytest.raises(CohortError, match=f"{count} bytes, the index describes {3 * PIECE}"):
        Cohort.open(sealed, KEY)


def test_sealed_images_do_not_change_places(sealed: Path) -> None:
    swap(sealed / SEALED_IMAGES, 0, 2)

    cohort = Cohort.open(sealed, KEY)

    assert len(cohort.images([1])) == 1
    for row in (0, 2):
        with pytest.raises(CohortError, match=f"image {row} is not the one that was sealed there"):
            cohort.images([row])


def test_a_sealed_image_does_not_move_between_cohorts_of_one_key(
    write: Write, sealed: Path
) -> None:
    """The same pixels, row and key: only the cohort differs."""
    other = write(["a", "b", "c"], [0, 1, 1], key=KEY)
    shutil.copy(other / SEALED_IMAGES, sealed / SEALED_IMAGES)

    with pytest.raises(CohortError, match="image 0 is not the one"):
        Cohort.open(sealed, KEY).images([0])
    shutil.copy(other / SEALED_INDEX, sealed / SEALED_INDEX)
    with pytest.raises(CohortError, match="cannot be opened"):
        Cohort.open(sealed, KEY)
    shutil.copy(other / SEAL_FILE, sealed / SEAL_FILE)
    Cohort.open(sealed, KEY).verify()  # all three: it is the other cohort


def test_an_older_version_of_an_image_is_refused_at_its_own_place(tmp_path: Path) -> None:
    """One cohort, one row, one key: a version that the index no longer has."""
    seal = CohortSeal.new(KEY)
    images = ImageFile(tmp_path, META.image_bytes, seal)
    images.append(pixels_of(1).tobytes())
    older = (tmp_path / SEALED_IMAGES).read_bytes()
    images.truncate(0)
    sha256 = images.append(pixels_of(2).tobytes())
    images.close()
    write_index(tmp_path, META, [(ImageRecord("p", "", "", "i", 0, 1, 1), sha256)], seal)
    Cohort.open(tmp_path, KEY).verify()

    (tmp_path / SEALED_IMAGES).write_bytes(older)

    with pytest.raises(CohortError, match="image 0 is not the one"):
        Cohort.open(tmp_path, KEY).images([0])


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "{}",
        '"text"',
        "[" * 100_000,
        '{"format": 3, "cohort": "%(cohort)s", "key": "%(key)s"}',
        '{"format": 2, "cohort": "../..", "key": "%(key)s"}',
        '{"format": 2, "cohort": 7, "key": "%(key)s"}',
        '{"format": 2, "cohort": "%(cohort)s", "key": "%(key)s", "more": 1}',
        '{"format": 2, "cohort": "00000000000000000000000000000000", "key": "%(key)s"}',
        '{"format": 2, "cohort": "%(cohort)s", "key": "0000000000000000"}',
    ],
)
def test_a_changed_seal_file_is_refused(sealed: Path, content: str) -> None:
    said = json.loads((sealed / SEAL_FILE).read_text())
    (sealed / SEAL_FILE).write_text(content % said if "%" in content else content)

    with pytest.raises(CohortError, match=r"sealed\.json|cannot be opened|given was the key"):
        Cohort.open(sealed, KEY)


@pytest.mark.parametrize("missing", [SEALED_INDEX, SEALED_IMAGES, SEAL_FILE])
def test_a_sealed_cohort_that_is_incomplete_is_refused(sealed: Path, missing: str) -> None:
    (sealed / missing).unlink()

    with pytest.raises(CohortError, match=missing):
        Cohort.open(sealed, KEY)


@pytest.mark.parametrize("dropped", [(), (SEAL_FILE,), (SEAL_FILE, SEALED_IMAGES)])
def test_a_plain_cohort_slipped_beside_a_sealed_one_is_refused(
    write: Write, sealed: Path, dropped: tuple[str, ...]
) -> None:
    plain = write(["attacker"], [0])
    for name in (INDEX_FILE, IMAGES_FILE):
        shutil.copy(plain / name, sealed / name)
    for name in dropped:
        (sealed / name).unlink()

    with pytest.raises(CohortError, match="a plain and a sealed cohort at once"):
        Cohort.open(sealed, KEY)


def test_a_worker_process_opens_a_sealed_cohort_by_itself(sealed: Path) -> None:
    cohort = Cohort.open(sealed, KEY)
    cohort.images([0])
    before = {file.name for file in sealed.iterdir()}

    carried = pickle.dumps(cohort)

    assert len(carried) < 1000
    assert KEY in carried  # as the docstring says: as secret as the key
    with get_context("spawn").Pool(1) as pool:
        seen = pool.apply(_first_image, (cohort.subset([0]),))
    np.testing.assert_array_equal(seen, cohort.images([1])[0])
    assert {file.name for file in sealed.iterdir()} == before


def test_a_large_index_is_sealed_in_several_pieces() -> None:
    seal = CohortSeal.new(KEY)
    content = os.urandom(3 * (1 << 24) + 5)

    closed = seal.close_index(content)

    assert len(closed) == len(content) + 4 * OVERHEAD
    assert seal.open_index(closed) == content
    piece = (1 << 24) + OVERHEAD
    for damaged in (
        closed[piece:],
        closed[: 3 * piece],
        closed[piece : 2 * piece] + closed[:piece] + closed[2 * piece :],
        closed + closed[:piece],
    ):
        with pytest.raises(SealError):
            seal.open_index(damaged)
