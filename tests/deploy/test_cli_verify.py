"""`cloister intake verify`: what a person types, sees and keeps."""

from __future__ import annotations

import json
import os
import shutil
import stat
from pathlib import Path

import pytest
from click.testing import Result
from typer.testing import CliRunner

from common.errors import ConfigError, DataError
from deploy.cli_intake import intake_app
from deploy.hospitals import Hospital, make_hospitals

NAME = "Kowalski^Wilhelmine"


def call(*arguments: object, **environment: str) -> Result:
    settings = {"COLUMNS": "200", "TERM": "dumb", "NO_COLOR": "1"} | environment
    return CliRunner(env=settings).invoke(intake_app, ["verify", *map(str, arguments)])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Something that was left behind, and something that was not."""
    place = tmp_path / "out"
    place.mkdir()
    (place / "report.txt").write_text(f"made of {NAME}")
    (place / "card.txt").write_text("made of images")
    return place


@pytest.fixture
def hospital(tmp_path: Path) -> Hospital:
    return make_hospitals(tmp_path / "hospitals", seed=1, size=0.02)[0]


def test_findings_are_shown_masked_and_kept_without_a_value(folder: Path, tmp_path: Path) -> None:
    record = tmp_path / "record.json"

    done = call(folder, "--report", record)

    assert done.exit_code == 1, done.output
    for text in ("report.txt", "Ko…(19)", "1 findings", "a person has to look at", "--against"):
        assert text in done.output
    assert "owalski" not in done.output
    kept = json.loads(record.read_text())
    assert kept["findings_by_rule"] == {"name": 1}
    assert kept["findings"][0].keys() == {"file", "where", "offset", "length", "rule", "why"}
    assert "Ko" not in record.read_text()
    assert stat.S_IMODE(record.stat().st_mode) == 0o600


def test_what_is_clean_is_said_to_be(folder: Path) -> None:
    (folder / "report.txt").unlink()

    done = call(folder)

    assert done.exit_code == 0, done.output
    assert "looks like an identity (1 files" in " ".join(done.output.split())


def test_a_cohort_against_its_source(hospital: Hospital, tmp_path: Path, spec_text: str) -> None:
    run = tmp_path / "run.toml"
    run.write_text(spec_text.replace('"finding"', '"opacity"'))
    cohort = tmp_path / "c"
    taken = CliRunner().invoke(
        intake_app,
        ["run", str(hospital.folder), str(cohort), "--spec", str(run), "--labels",
         str(hospital.labels), "--workers", "1"],
    )  # fmt: skip
    assert taken.exit_code == 0, taken.output

    clean = call(cohort, "--against", hospital.folder)
    desk = call(f"{cohort}.intake", "--against", hospital.folder)
    source = call(hospital.folder, "--against", hospital.folder)

    assert clean.exit_code == 0, clean.output
    assert desk.exit_code == 0, desk.output
    assert source.exit_code == 1
    assert "value of the source" in source.output
    assert "more" in source.output


def test_mistakes_are_errors_of_ours(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "there").write_text("")
    for arguments, kind, words in (
        ((tmp_path / "nowhere",), DataError, "no file in it"),
        ((folder, "--against", tmp_path / "nowhere"), DataError, "nothing is there"),
        ((folder, "--report", tmp_path / "there"), ConfigError, "exists already"),
    ):
        done = call(*arguments)
        assert isinstance(done.exception, kind)
        assert words in str(done.exception)
    assert (tmp_path / "there").read_text() == ""


def test_a_second_opinion_needs_its_program(folder: Path) -> None:
    done = call(folder, "--ocr", PATH="")

    assert isinstance(done.exception, ConfigError)
    assert "tesseract-ocr" in str(done.exception)


@pytest.mark.skipif(shutil.which("tesseract") is None, reason="tesseract is not installed")
def test_a_second_opinion_decides_nothing(folder: Path, shared_data: Path, tmp_path: Path) -> None:
    """A real screen with a test patient's name in the pixels: listed, masked, and no finding."""
    screens = shared_data / "dicom" / "deid-data"
    screen = screens / "ultrasounds" / "GREYSCALE_IMAGE.dcm"
    (folder / "report.txt").unlink()
    shutil.copy(screen, folder / "1.dcm")
    record = tmp_path / "record.json"

    plain, read = call(folder), call(folder, "--ocr", "--report", record)

    assert plain.exit_code == read.exit_code == 1
    assert "A second opinion: pictures with words" in read.output
    assert json.loads(record.read_text())["pictures_with_words"] == 1
    assert os.fspath(folder) not in record.read_text()


def test_help_teaches_with_an_example() -> None:
    assert "Example: cloister intake verify" in call("--help").output
