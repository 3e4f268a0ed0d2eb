"""`cloister intake labels`: what a person types, and what they then have."""

from __future__ import annotations

import csv
import stat
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pydicom
import pytest
from pydicom import dcmread

from client.intake.labels import read_labels
from common.spec import read_run_file

CODES = """
verified = false

[[finding]]
class = "finding"
concept = ["81827009", "SCT"]
at_least = 8.0
unit = "mm"
"""
PACKAGED = Path(pydicom.__file__).parent / "data" / "test_files"


@pytest.fixture
def source(tmp_path: Path, shared_data: Path) -> Path:
    """A ZIP in a folder, with the report on a CT, the CT, a report that says nothing, and junk."""
    folder = tmp_path / "source"
    folder.mkdir()
    report = shared_data / "dicom" / "highdicom" / "sr_document_with_multiple_groups.dcm"
    with zipfile.ZipFile(folder / "export.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.write(report, "SR1")
        archive.write(PACKAGED / "CT_small.dcm", "IM1")
    (folder / "silent").write_bytes((PACKAGED / "test-SR.dcm").read_bytes())
    (folder / "MUELLER\x1b[2J").write_bytes(b"junk")
    return folder


@pytest.fixture
def run_file(tmp_path: Path, spec_text: str) -> Path:
    path = tmp_path / "run.toml"
    path.write_text(spec_text)
    return path


@pytest.fixture
def label(
    cloister: Callable[..., Any], source: Path, run_file: Path, tmp_path: Path
) -> Callable[..., Any]:
    """`label(codes, *options)`: the command on the source."""

    def _label(codes: str, *options: object) -> Any:
        path = tmp_path / "codes.toml"
        path.write_text(codes)
        table = tmp_path / "labels.csv"
        given = ("--codes", path, "--spec", run_file)
        return cloister("intake", "labels", source, table, *given, *options)

    return _label


def test_reports_become_a_label_table(
    label: Callable[..., Any], tmp_path: Path, run_file: Path
) -> None:
    listing = tmp_path / "without.csv"
    study = str(dcmread(PACKAGED / "CT_small.dcm").StudyInstanceUID)
    silent = str(dcmread(PACKAGED / "test-SR.dcm").StudyInstanceUID)

    said = label(CODES, "--not-labelled", listing)

    assert said.code == 0, said
    assert "1 studies are in" in said.words
    assert "Without a label: 2." in said.words
    table = read_labels(tmp_path / "labels.csv", read_run_file(run_file).spec.task)
    assert {key: entry.label for key, entry in table.entries.items()} == {study: 1}
    with listing.open(newline="") as file:
        rows = {row["what"]: row["reason"] for row in csv.DictReader(file)}
    assert set(rows) == {silent, "MUELLER\\x1b[2J"}
    for path in (tmp_path / "labels.csv", listing):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert "\x1b" not in said.out


def test_without_any_label_there_is_no_table(label: Callable[..., Any], tmp_path: Path) -> None:
    listing = tmp_path / "without.csv"

    said = label(CODES.replace("verified = false", ""), "--not-labelled", listing)

    assert said.code == 2
    assert "no study of it gets a label" in said.words
    assert "are not verified" in listing.read_text()
    assert not (tmp_path / "labels.csv").exists()


def test_nothing_is_overwritten(label: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "labels.csv").write_text("mine")

    said = label(CODES)

    assert said.code == 2
    assert "nothing is overwritten" in said.words
    assert (tmp_path / "labels.csv").read_text() == "mine"


def test_a_wrong_file_is_named(label: Callable[..., Any], tmp_path: Path) -> None:
    said = label(CODES.replace("at_least", "atleast"))

    assert said.code == 2
    assert "codes.toml: finding.0.atleast = 8.0: unknown key" in said.words


def test_the_help_has_a_file_to_begin_with(cloister: Callable[..., Any]) -> None:
    said = cloister("intake", "labels", "--help")

    assert said.code == 0
    for text in ("[[finding]]", 'value = ["36118008", "SCT"]', "Example: cloister intake labels"):
        assert text in said.words
