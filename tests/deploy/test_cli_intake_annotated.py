"""`cloister intake` of masks and boxes: what a person types, and what they then see."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
from click.testing import Result
from PIL import Image
from typer.testing import CliRunner

from common.cohort import Cohort
from common.errors import ConfigError
from deploy.cli_intake import intake_app

TABLES = {
    "mask": ('name = "segmentation"\nclasses = ["none", "organ"]', "unet", "dice", "dice"),
    "boxes": ('name = "detection"\nclasses = ["cell"]', "centernet", "heatmap", "map50"),
}


def call(*arguments: object) -> Result:
    runner = CliRunner(env={"COLUMNS": "200", "TERM": "dumb", "NO_COLOR": "1"})
    return runner.invoke(intake_app, list(map(str, arguments)))


@pytest.fixture
def run_file(tmp_path: Path, spec_text: str) -> Any:
    def _write(kind: str) -> Path:
        task, model, loss, metric = TABLES[kind]
        text = spec_text.replace('classes = ["normal", "finding"]', task)
        text = text.replace('"small-cnn"', f'"{model}"').replace("= 16", "= 32")
        text = text.replace("[input]", '[input]\nwindow = "range"')
        extra = f'\n[loss]\nname = "{loss}"\n\n[evaluation]\nmetric = "{metric}"\n'
        path = tmp_path / "run.toml"
        path.write_text(text + extra)
        return path

    return _write


@pytest.fixture
def volumes(tmp_path: Path) -> tuple[Path, Path]:
    folders = tmp_path / "images", tmp_path / "masks"
    mask = np.zeros((6, 20, 20), dtype=np.uint8)
    mask[2:4, 5:9, 5:9] = 1
    for folder in folders:
        folder.mkdir()
    for name in ("a.nii.gz", "b.nii.gz"):
        image = np.random.default_rng(1).random((6, 20, 20)).astype(np.float32)
        nibabel.save(nibabel.Nifti1Image(image, np.eye(4)), folders[0] / name)
        nibabel.save(nibabel.Nifti1Image(mask, np.eye(4)), folders[1] / name)
    return folders


def test_volumes_of_whom_it_is_said(run_file: Any, volumes: Any, tmp_path: Path) -> None:
    (tmp_path / "patients.csv").write_text("file,patient\na.nii.gz,P1\nb.nii.gz,P1\n")
    how = ("--spec", run_file("mask"), "--direction", "sagittal")
    taken = call("nifti", *volumes, tmp_path / "c", *how, "--patients", tmp_path / "patients.csv")
    assert taken.exit_code == 0, taken.output
    cohort = Cohort.open(tmp_path / "c")
    assert (len(cohort), len(cohort.patients), cohort.kind) == (12, 1, "mask")
    each = call("nifti", *volumes, tmp_path / "d", *how, "--each-file-a-patient", "--split", "test")
    assert each.exit_code == 0, each.output
    cohort = Cohort.open(tmp_path / "d")
    assert (len(cohort.patients), set(cohort.splits)) == (2, {"test"})


@pytest.mark.parametrize("flags", [(), ("--each-file-a-patient", "--patients", "p.csv")])
def test_nobody_guesses_whose_a_volume_is(
    run_file: Any, volumes: Any, tmp_path: Path, flags: tuple[str, ...]
) -> None:
    how = ("--spec", run_file("mask"), "--direction", "axial", *flags)
    refused = call("nifti", *volumes, tmp_path / "c", *how)
    assert isinstance(refused.exception, ConfigError)
    assert "whose are the volumes?" in str(refused.exception)
    assert not (tmp_path / "c").exists()


def test_boxes_and_what_is_wrong_with_one(run_file: Any, tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for name in ("a", "b"):
        Image.fromarray(np.full((40, 40), 9, dtype=np.uint8)).save(folder / f"{name}.png")
    labels = tmp_path / "boxes.csv"
    labels.write_text("file,left,top,right,bottom,label\na.png,1,1,9,9,cell\nb.png,1,1,99,9,cell\n")
    cohort, listing = tmp_path / "c", tmp_path / "not-used.csv"
    given = ("--spec", run_file("boxes"), "--labels", labels, "--not-used", listing)
    taken = call("pictures", folder, cohort, *given)
    assert taken.exit_code == 0, taken.output
    assert "reaches outside of the picture" in listing.read_text()
    assert Cohort.open(tmp_path / "c").targets([0])[0, 0, 4] == 0


def test_empty_masks_are_asked_for(run_file: Any, tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for name in ("a", "m"):
        Image.fromarray(np.zeros((40, 40), dtype=np.uint8)).save(folder / f"{name}.png")
    (tmp_path / "m.csv").write_text("file,mask\na.png,m.png\n")
    how = ("--spec", run_file("mask"), "--labels", tmp_path / "m.csv")
    listing = tmp_path / "not-used.csv"
    call("pictures", folder, tmp_path / "c", *how, "--not-used", listing)
    assert "is empty" in listing.read_text()
    kept = call("pictures", folder, tmp_path / "d", *how, "--keep-empty")
    assert kept.exit_code == 0, kept.output
    assert len(Cohort.open(tmp_path / "d")) == 1
