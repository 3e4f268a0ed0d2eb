"""MedMNIST files: pixels and labels as published, the unit an image, nothing executed."""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from client.intake.keys import SiteKey
from client.intake.medmnist import MedMnist, Part
from client.intake.run import intake
from common.cohort import Cohort
from common.errors import CohortError, IntakeError
from common.spec import RunSpec

Spec = Callable[..., RunSpec]
Arrays = dict[str, Any]


def arrays(shape: tuple[int, ...] = (16, 16), labels: int = 1) -> Arrays:
    random = np.random.default_rng(0)
    made: Arrays = {}
    for part, count in (("train", 5), ("val", 2), ("test", 3)):
        made[f"{part}_images"] = random.integers(0, 256, (count, *shape), dtype=np.uint8)
        made[f"{part}_labels"] = random.integers(0, 2, (count, labels), dtype=np.uint8)
    return made


def take_in(tmp_path: Path, spec: RunSpec, content: Arrays, *parts: Part) -> Cohort:
    np.savez_compressed(tmp_path / "x.npz", **content)
    source = MedMnist(tmp_path / "x.npz", spec, SiteKey.random(), parts or ("train", "val", "test"))
    intake(source, tmp_path / "cohort", spec)
    return Cohort.open(tmp_path / "cohort")


def test_pixels_labels_and_parts_come_through(tmp_path: Path, make_spec: Spec) -> None:
    content = arrays()

    cohort = take_in(tmp_path, make_spec(), content)

    assert (cohort.unit, len(cohort), len(cohort.patients)) == ("image", 10, 10)
    assert cohort.splits.tolist() == ["train"] * 5 + ["validation"] * 2 + ["test"] * 3
    pixels = np.concatenate([content[f"{part}_images"] for part in ("train", "val", "test")])
    np.testing.assert_array_equal(np.rint(cohort.images(range(10))[:, 0] * 255), pixels)
    labels = np.concatenate([content[f"{part}_labels"] for part in ("train", "val", "test")])
    np.testing.assert_array_equal(cohort.labels, labels[:, 0])


def test_one_part_colour_and_several_labels(tmp_path: Path, make_spec: Spec) -> None:
    spec = make_spec(task={"kind": "multilabel", "classes": ["a", "b", "c"]}, input={"channels": 3})
    content = arrays((16, 16, 3), labels=3)

    cohort = take_in(tmp_path, spec, content, "val")

    np.testing.assert_array_equal(cohort.labels, content["val_labels"])
    seen = np.rint(cohort.images([0, 1]) * 255).transpose(0, 2, 3, 1)
    np.testing.assert_array_equal(seen, content["val_images"])


@pytest.mark.parametrize("labels", [1, 14])
def test_a_run_that_looks_at_no_label_takes_any_file(
    tmp_path: Path, make_spec: Spec, labels: int
) -> None:
    spec = make_spec(
        task={"name": "reconstruction"},
        loss={"name": "l1"},
        evaluation={"metric": "psnr"},
        privacy={"unit": "image"},
    )

    cohort = take_in(tmp_path, spec, arrays(labels=labels))

    assert (len(cohort), cohort.kind, cohort.targets([0, 1]).shape) == (10, "none", (2, 0))
    cohort.check_fits(spec)


def test_a_run_of_masks_is_told_that_there_are_none(tmp_path: Path, make_spec: Spec) -> None:
    spec = make_spec(
        task={"name": "segmentation", "classes": ["background", "organ"]},
        loss={"name": "dice"},
        evaluation={"metric": "dice"},
    )
    with pytest.raises(CohortError, match="its mask is missing"):
        take_in(tmp_path, spec, arrays())
    assert not (tmp_path / "cohort").exists()


def test_it_fits_only_a_run_whose_unit_is_the_image(tmp_path: Path, make_spec: Spec) -> None:
    cohort = take_in(tmp_path, make_spec(), arrays())

    cohort.check_fits(make_spec(privacy={"unit": "image"}))
    with pytest.raises(CohortError, match="unit"):
        cohort.check_fits(make_spec(privacy={"unit": "patient"}))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"val_images": None}, "val_images"),
        ({"val_labels": np.zeros((1, 1), dtype=np.uint8)}, "2 val_images and 1 val_labels"),
        ({"val_labels": np.full((2, 1), 2, dtype=np.uint8)}, r"val_labels\[0\] is \[2\]"),
        ({"val_labels": np.zeros((2, 3), dtype=np.uint8)}, r"is \[0, 0, 0\]"),
        ({"val_labels": np.zeros((2, 1))}, "float64"),
        ({"val_images": np.zeros((2, 16, 16))}, "float64"),
        ({"val_images": np.zeros((2, 16, 16, 16), dtype=np.uint8)}, "expected uint8 of"),
        ({"val_images": np.zeros((2, 0, 16), dtype=np.uint8)}, "expected uint8 of"),
        ({"val_images": np.uint8(5)}, "none of MedMNIST"),
        ({"val_images": np.asfortranarray(np.ones((2, 16, 17), dtype=np.uint8))}, "MedMNIST"),
    ],
)
def test_refuses_what_does_not_fit_and_leaves_nothing(
    tmp_path: Path, make_spec: Spec, change: Arrays, reason: str
) -> None:
    content = {k: v for k, v in (arrays() | change).items() if v is not None}

    with pytest.raises(IntakeError, match=reason):
        take_in(tmp_path, make_spec(), content)
    assert not (tmp_path / "cohort").exists()


class Malice:
    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("/tmp/executed-by-a-pickle"),)  # noqa: S108


def test_a_pickle_within_is_not_executed(tmp_path: Path, make_spec: Spec) -> None:
    malice = np.array([[Malice()], [Malice()]], dtype=object)

    with pytest.raises(IntakeError):
        take_in(tmp_path, make_spec(), arrays() | {"val_labels": malice})
    assert not Path("/tmp/executed-by-a-pickle").exists()  # noqa: S108


@pytest.mark.parametrize("content", [b"", b"PK\3\4 no zip", b"\x93NUMPY"])
def test_refuses_what_is_no_archive(tmp_path: Path, make_spec: Spec, content: bytes) -> None:
    (tmp_path / "x.npz").write_bytes(content)

    with pytest.raises(IntakeError, match=r"x\.npz: cannot be read as a MedMNIST"):
        MedMnist(tmp_path / "x.npz", make_spec(), SiteKey.random())


def test_an_array_that_ends_too_early_leaves_nothing(tmp_path: Path, make_spec: Spec) -> None:
    np.savez(tmp_path / "whole.npz", **arrays())
    with (
        zipfile.ZipFile(tmp_path / "whole.npz") as whole,
        zipfile.ZipFile(tmp_path / "x.npz", "w") as cut,
    ):
        for name in whole.namelist():
            data = whole.read(name)
            cut.writestr(name, data[:-1] if name == "test_images.npy" else data)
    source = MedMnist(tmp_path / "x.npz", make_spec(), SiteKey.random())

    with pytest.raises(IntakeError, match="test_images"):
        intake(source, tmp_path / "cohort", make_spec())
    assert not (tmp_path / "cohort").exists()


def test_the_published_file(shared_data: Path, tmp_path: Path, make_spec: Spec) -> None:
    file = shared_data / "medmnist" / "breastmnist.npz"
    spec = make_spec(task={"classes": ["malignant", "benign"]}, input={"height": 28, "width": 28})

    intake(MedMnist(file, spec, SiteKey.random(), ("test",)), tmp_path / "cohort", spec)

    cohort = Cohort.open(tmp_path / "cohort")
    with np.load(file, allow_pickle=False) as published:
        images = np.rint(cohort.images(range(156))[:, 0] * 255)
        np.testing.assert_array_equal(images, published["test_images"])
        np.testing.assert_array_equal(cohort.labels, published["test_labels"][:, 0])
