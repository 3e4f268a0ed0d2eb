"""Real files of many makers: an outcome for each, no text of their headers left, still valid."""

from __future__ import annotations

import csv
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from pydicom import dcmread
from pydicom.dataset import Dataset

from client.intake.deid.engine import Engine
from client.intake.deid.profile import Profile
from client.intake.deid.vocabulary import terms
from client.intake.keys import SiteKey
from client.intake.part10 import BoundedFile, Limits
from client.intake.quiet import quiet
from common.errors import IntakeError

IDENTITIES = ("PN", "LO", "SH", "LT", "ST", "UT", "DA", "DT", "UI", "AE")
READ = 2**29


class Outcome(NamedTuple):
    """What became of a file: the bytes of the new one, or the reason against it."""

    source: Path
    row: dict[str, str]
    data: bytes
    reason: str


@pytest.fixture(scope="module")
def outcomes(shared_data: Path) -> list[Outcome]:
    """Every file under a profile that trusts the detector and keeps heads."""
    engine = Engine(Profile(risky_pixels="blank", faces="keep"), SiteKey(bytes(32)))
    with (shared_data / "dicom" / "index.csv").open(encoding="utf-8") as index:
        return [_outcome(engine, shared_data / "dicom" / row["file"], row) for row in _small(index)]


def _small(index: Any) -> Iterator[dict[str, str]]:
    """Without the films of many megapixels, which take the detector seconds each."""
    for row in csv.DictReader(index):
        if int(row["rows"] or 0) * int(row["cols"] or 0) * int(row["frames"] or 1) < 2**21:
            yield row


def _outcome(engine: Engine, path: Path, row: dict[str, str]) -> Outcome:
    try:
        with BoundedFile(path, READ) as stream:
            cleaned = engine.clean_stream(stream, Limits())
    except IntakeError as reason:
        return Outcome(path, row, b"", str(reason))
    written = BytesIO()
    with quiet():
        cleaned.dataset.save_as(written, enforce_file_format=True)
    return Outcome(path, row, written.getvalue(), "")


def test_every_file_has_an_outcome_and_most_images_are_kept(outcomes: list[Outcome]) -> None:
    assert len(outcomes) > 150
    reasons = Counter(re.sub(r"'.*'", "…", outcome.reason) for outcome in outcomes)
    assert reasons[""] > 110
    assert not [reason for reason in reasons if "cannot be read" in reason]

    refused = ("SOP class", "patient identifier", "no pixel data")
    images = [one for one in outcomes if not any(word in one.reason for word in refused)]
    decodable = [one for one in images if one.row["decode_plugins"] == "ok"]
    assert sum(bool(one.data) for one in decodable) >= 0.95 * len(decodable)


def values(level: Dataset) -> Iterator[tuple[str, str]]:
    """Every text, name, date and UID of a header, at any depth, private ones too."""
    for element in level:
        if element.VR == "SQ":
            for item in element.value:
                yield from values(item)
        elif element.VR in IDENTITIES:
            parts = element.value if element.VM > 1 else [element.value]
            yield from ((element.keyword, str(part).strip(" \0")) for part in parts)


def test_nothing_of_a_header_is_left_but_terms(outcomes: list[Outcome]) -> None:
    """Of all texts of all files, those that stay are technical terms, codes and known UIDs."""
    left: Counter[str] = Counter()
    with quiet():
        for outcome in outcomes:
            if outcome.data:
                header = dcmread(outcome.source, stop_before_pixels=True, force=True)
                before = {text for _, text in values(header) if len(text) > 3}
                after = dict(
                    (text, keyword)
                    for keyword, text in values(dcmread(BytesIO(outcome.data)))
                    if text in before and text not in terms()
                )
                left.update(keyword for keyword in after.values())

    codes = {"CodeValue", "CodingSchemeDesignator", "CodeMeaning"}
    assert left.keys() <= codes | {"SOPClassUID", "ReferencedSOPClassUID", "DeidentificationMethod"}


def test_pixels_of_images_without_text_are_the_same(outcomes: list[Outcome]) -> None:
    compared: list[float] = []
    with quiet():
        for outcome in outcomes:
            if outcome.data and outcome.row["modality"] in ("CT", "MR"):
                before, after = dcmread(outcome.source), dcmread(BytesIO(outcome.data))
                same = (before.pixel_array == after.pixel_array).mean()
                compared.append(float(same))
    exactly = sum(same == 1 for same in compared)
    assert len(compared) > 70
    assert exactly >= 0.93 * len(compared)  # two of them have text burned in
    assert min(compared) > 0.5


@pytest.mark.skipif(shutil.which("dciodvfy") is None, reason="dciodvfy is not installed")
def test_no_new_error_of_dciodvfy(outcomes: list[Outcome], tmp_path: Path) -> None:
    for outcome in outcomes:
        if outcome.data:
            clean = tmp_path / "clean.dcm"
            clean.write_bytes(outcome.data)
            new = errors(clean) - errors(outcome.source)
            assert not new, (outcome.row["file"], new)


def errors(path: Path) -> Counter[str]:
    """Errors by attribute and text, whatever the value and place."""
    said = subprocess.run(["dciodvfy", "-new", path], capture_output=True, check=False)
    lines = said.stderr.decode(errors="replace").splitlines()
    found = [line for line in lines if line.startswith("Error")]
    return Counter(re.sub(r"^(Error - )<(?:.*/)?([^>]*)>", r"\1<\2>", line) for line in found)


def test_planted_identities_are_gone(
    shared_data: Path, clean: Callable[..., Any], as_bytes: Any
) -> None:
    """The pseudo-identities of the slices that TCIA made for the purpose."""
    folder = shared_data / "dicom" / "flywheel-tcia-pseudophi" / "dicom"
    for path in sorted(folder.glob("*.dcm"))[:6]:
        header = dcmread(path, stop_before_pixels=True)
        names = {part for part in re.split(r"\W+", str(header.PatientName)) if len(part) > 3}
        data = clean(path.read_bytes()).data
        assert names
        for name in (*names, str(header.PatientID), str(header.PatientBirthDate)):
            assert name.encode() not in data
