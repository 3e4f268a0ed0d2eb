"""`cloister predict`, from the command line to the folder that it leaves."""

from __future__ import annotations

import hashlib
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
from common.package import entry_of
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
    assert "3.dcm" not in said.out + said.err
    assert "'MR'" in found["refused"][0]["reason"]
    assert len(list((out / "sr").iterdir())) == 2
    assert "To be borne in mind" in said.out
    assert len({row["caveats"][0] for row in found["images"]}) == 1
    assert found["images"][0]["caveats"][0].split()[0] in said.out


def test_where_nothing_is_answered_it_says_so_and_fails(
    cloister: Cloister, run: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "source"
    folder.mkdir()
    write_film(folder / "Doe.dcm", 1, Modality="MR")
    out = tmp_path / "out"
    said = cloister("predict", run, folder, out, "--unsigned", "--workers", 1)
    assert said.code == 1
    assert "Nothing was answered" in said.out
    assert "Doe" not in said.out + said.err
    assert "Doe.dcm" in (out / "refused.csv").read_text()


def test_one_model_alone_can_be_asked_for(cloister: Cloister, run: Path, source: Path) -> None:
    digest = hashlib.sha256((run / "model.safetensors").read_bytes()).hexdigest()
    asked = ("predict", run, source, run.parent / "out", "--unsigned", "--workers", 1, "--expect")
    said = cloister(*asked, "0" * 64)
    assert said.code == 2
    assert f"its model is {digest}" in said.err.replace("\n", "")
    assert not (run.parent / "out").exists()
    for slip in ("", " ", digest[:-1]):  # "$SHA256" of a variable that is not set
        said = cloister(*asked, slip)
        assert said.code == 2
        assert "64 hex digits" in said.err
    assert not (run.parent / "out").exists()
    assert cloister(*asked, digest.upper()).code == 0


def test_of_a_signature_that_is_not_checked_nothing_is_claimed(
    cloister: Cloister, run: Path, source: Path
) -> None:
    (run / "model_card.md").write_text("A card.")
    card = {
        "spec_sha256": hashlib.sha256((run / "spec.json").read_bytes()).hexdigest(),
        "model": {
            "safetensors_sha256": hashlib.sha256(
                (run / "model.safetensors").read_bytes()
            ).hexdigest()
        },
    }
    (run / "model_card.json").write_text(json.dumps(card))
    files = {path.name: entry_of(path).model_dump() for path in run.iterdir()}
    manifest = {"format": "cloister package 1", "made": "2026-01-01T00:00:00Z", "files": files}
    (run / "manifest.json").write_text(json.dumps(manifest))
    (run / "manifest.sig").write_text("whatever")
    out = run.parent / "out"
    said = cloister("predict", run, source, out, "--unsigned", "--workers", 1)
    assert said.code == 0, said
    assert "its signature was not checked" in said.out
    assert "signed by nobody" not in said.out


def test_help_says_that_it_is_not_for_clinical_use(cloister: Cloister) -> None:
    assert "Not for clinical use" in cloister("predict", "--help").out


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
    assert "is there already" in said.err
    assert len(list(source.iterdir())) == 4


def test_a_source_that_is_not_there_is_said_before_anything_of_the_model(
    cloister: Cloister, run: Path
) -> None:
    said = cloister("predict", run, run.parent / "nowhere", run.parent / "out", "--unsigned")
    assert said.code == 2
    assert "nowhere" in said.err
    assert "signed" not in said.out + said.err
    assert not (run.parent / "out").exists()
