"""Real files of many makers and transfer syntaxes: each has an outcome, and pixels agree."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from pydicom import dcmread

from client.intake.decision import Decision
from client.intake.deid.engine import Engine
from client.intake.deid.profile import Profile
from client.intake.deid.seam import CohortDeidentifier
from client.intake.dicom import FileReader, FileResult, Task
from client.intake.items import FileItem
from client.intake.keys import SiteKey
from client.intake.labels import DICOM_KEYS, LabelEntry, LabelTable
from common.spec import RunSpec

LOSSY = ("1.2.4.50", "1.2.4.51", "1.2.4.81", "1.2.4.91", "1.2.4.53", "1.2.4.55")
Read = Callable[[Path], FileResult]


class EveryKey(dict[str, LabelEntry]):
    """A label for whatever is asked."""

    def __contains__(self, key: object) -> bool:
        return True

    def __missing__(self, key: str) -> LabelEntry:
        return LabelEntry(0, "", 2)


@pytest.fixture(scope="module")
def read(make_spec: Callable[..., RunSpec]) -> Read:
    settings = make_spec(input={"height": 128, "width": 128, "frames": "middle"}).input
    deidentify = CohortDeidentifier(Engine(Profile(), SiteKey(bytes(32)), checks={}))
    whole = Decision("release", found=False)

    def _read(path: Path) -> FileResult:
        """Read by whichever identifier the file has."""
        dataset = dcmread(path, stop_before_pixels=True, specific_tags=list(DICOM_KEYS), force=True)
        column = next((key for key in DICOM_KEYS if dataset.get(key)), "PatientID")
        table = LabelTable("labels.csv", column, EveryKey())
        return FileReader(settings, table, deidentify)(Task(FileItem(path, ""), whole, True))

    return _read


def test_every_file_has_an_outcome_with_a_reason(shared_data: Path, read: Read) -> None:
    with (shared_data / "dicom" / "index.csv").open(encoding="utf-8") as index:
        rows = list(csv.DictReader(index))
    assert len(rows) > 150

    refused = {}
    for row in rows:
        result = read(shared_data / "dicom" / row["file"])
        assert bool(result.images) != bool(result.reason), row["file"]
        if result.reason:
            refused[row["file"]] = (result.reason, row["sop_class"], row["decode_plugins"])

    for name, (reason, kind, decodes) in refused.items():
        pictures = not any(word in kind for word in ("Segment", "Map", "66.7"))
        if decodes == "ok" and pictures:
            assert reason == "no label: its PatientID is empty", (name, reason)
    assert len(refused) < 45


def test_one_ct_in_many_transfer_syntaxes(shared_data: Path, read: Read) -> None:
    folder = shared_data / "dicom" / "cornerstone-ct-ts"
    pixels: dict[str, NDArray[np.uint16]] = {}
    undecodable: dict[str, str] = {}
    for path in sorted(folder.glob("CTImage.dcm_*")):
        result = read(path)
        uid = path.name.rpartition("_")[2].removesuffix(".dcm")
        if result.images:
            pixels[uid] = result.images[0].pixels
        else:
            undecodable[uid] = result.reason
    reference = pixels["1.2.840.10008.1.2.1"]
    assert reference.std() > 5000

    for uid, seen in pixels.items():
        if uid.endswith(LOSSY):
            assert np.abs(seen.astype(int) - reference).mean() < 0.02 * 65535, uid
        else:
            np.testing.assert_array_equal(seen, reference, err_msg=uid)
    assert len(pixels) >= 13
    for reason in undecodable.values():
        assert "which cannot be decoded here" in reason
    lossless = [uid for uid in pixels if not uid.endswith(LOSSY)]
    assert len(lossless) >= 8


def test_the_file_without_pixels_says_so(shared_data: Path, read: Read) -> None:
    result = read(shared_data / "dicom" / "cornerstone-ct-ts" / "no-pixel-data.dcm")

    assert "it has no pixel data" in result.reason


def test_a_film_and_its_monochrome1_twin_complement_each_other(
    shared_data: Path, read: Read
) -> None:
    folder = shared_data / "dicom" / "torchxrayvision-cr" / "tests"
    (twin,) = folder.glob("Fake_MONO*.dcm")
    (film,) = set(folder.glob("*.dcm")) - {twin}
    assert (dcmread(film).pixel_array == dcmread(twin).pixel_array).all()

    plain, inverted = (read(path).images[0].pixels.astype(int) for path in (film, twin))

    assert plain.std() > 5000
    assert np.abs(plain + inverted - 65535).max() <= 1
