"""`cloister predict`, from the command line to the folder that it leaves."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import UID, ComputedRadiographyImageStorage, ExplicitVRLittleEndian
from safetensors.torch import save_file

from common import models
from common.spec import RunSpec

Cloister = Callable[..., Any]


def write_film(path: Path, number: int, **attributes: Any) -> None:
    """A CR of patient P1."""
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = ComputedRadiographyImageStorage
    meta.MediaStorageSOPInstanceUID = UID(f"1.2.3.4.{number}")
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    film = FileDataset("", {}, preamble=b"\0" * 128, file_meta=meta)
    pixels = np.random.default_rng(number).integers(0, 4096, (20, 30), dtype=np.uint16)
    values: dict[str, Any] = {
        "SOPClassUID": ComputedRadiographyImageStorage,
        "SOPInstanceUID": f"1.2.3.4.{number}",
        "StudyInstanceUID": f"1.2.3.{number // 2}",
        "SeriesInstanceUID": "1.2.3.9",
        "Modality": "CR",
        "PatientID": "P1",
        "SamplesPerPixel": 1,
        "PhotometricInterpretation": "MONOCHROME2",
        "Rows": 20,
        "Columns": 30,
        "BitsAllocated": 16,
        "BitsStored": 12,
        "HighBit": 11,
        "PixelRepresentation": 0,
        "PixelData": pixels.tobytes(),
    }
    for keyword, value in (values | attributes).items():
        setattr(film, keyword, value)
    film.save_as(path, enforce_file_format=True)


@pytest.fixture
def run(tmp_path: Path, make_spec: Callable[..., RunSpec]) -> Path:
    """A finished run's folder, of a model that is meant for CR."""
    spec = make_spec(use={"modalities": ["CR"]})
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "spec.json").write_text(spec.canonical_json)
    save_file(models.build(spec).state_dict(), folder / "model.safetensors")
    return folder


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Three films of two studies, and one of another modality."""
    folder = tmp_path / "source"
    folder.mkdir()
    for number in range(3):
        write_film(folder / f"{number}.dcm", number)
    write_film(folder / "3.dcm", 3, Modality="MR")
    return folder


def test_studies_are_answered_in_worker_processes_and_summed_up(
    cloister: Cloister, run: Path, source: Path, tmp_path: Path
) -> None:
    archive = Path(shutil.make_archive(str(tmp_path / "studies"), "zip", source))
    out = tmp_path / "out"
    said = cloister("predict", run, archive, out, "--unsigned", "--workers", 1, "--sr")
    assert said.code == 0, said
    assert "signed by nobody" in said.out
    assert "Not for clinical use" in said.out
    assert "Refused: 1" in said.out
    assert "names patients" in said.out
    found = json.loads((out / "predictions.json").read_text())
    assert [len(found[part]) for part in ("images", "studies", "refused")] == [3, 2, 1]
    assert "'MR'" in found["refused"][0]["reason"]
    assert len(list((out / "sr").iterdir())) == 2


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ((), "which nobody has signed"),
        (("--unsigned", "--seg"), "it has no masks"),
        (("--unsigned", "--node", "x", "--profile", "y"), "--node"),
    ],
)
def test_what_cannot_be_asked_is_refused_before_anything_is_made(
    cloister: Cloister, run: Path, source: Path, options: Any, words: str
) -> None:
    said = cloister("predict", run, source, run.parent / "out", *options)
    assert said.code == 2
    assert words in said.err
    assert {path.name for path in run.parent.iterdir()} == {"run", "source"}


def test_a_folder_that_is_there_is_never_written_into(
    cloister: Cloister, run: Path, source: Path
) -> None:
    said = cloister("predict", run, source, source, "--unsigned")
    assert said.code == 2
    assert "expected a new name" in said.err
    assert len(list(source.iterdir())) == 4
