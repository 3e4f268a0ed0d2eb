"""DICOMDIRs: what they list is found, and nothing outside of their folder is."""

from __future__ import annotations

import os
import random
import shutil
import struct
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pydicom
import pytest
from pydicom import config, dcmread
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.uid import (
    UID,
    CTImageStorage,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    MediaStorageDirectoryStorage,
)

from client.intake.items import FileItem, Listing, listed
from common.errors import IntakeError

LIMIT = 2**20
DISC = Path(pydicom.__file__).parent / "data" / "test_files" / "dicomdirtests"
OFFSETS = (
    "OffsetOfTheNextDirectoryRecord",
    "OffsetOfReferencedLowerLevelDirectoryEntity",
)


@pytest.fixture
def disc(tmp_path: Path) -> Path:
    """A folder with two images and a file outside of it."""
    folder = tmp_path / "disc"
    (folder / "DICOM" / "S1").mkdir(parents=True)
    (folder / "DICOM" / "S1" / "IM1").write_bytes(b"1")
    (folder / "DICOM" / "S1" / "IM2").write_bytes(b"2")
    (tmp_path / "SECRET").write_bytes(b"secret")
    return folder


def record(file_id: Any = None, kind: str = "IMAGE", **values: Any) -> Dataset:
    made = Dataset()
    made.OffsetOfTheNextDirectoryRecord = 0
    made.RecordInUseFlag = 0xFFFF
    made.OffsetOfReferencedLowerLevelDirectoryEntity = 0
    made.DirectoryRecordType = kind
    if file_id is not None:
        with config.disable_value_validation():
            made.ReferencedFileID = file_id
    for keyword, value in values.items():
        setattr(made, keyword, value)
    return made


def write(
    folder: Path,
    records: Sequence[Dataset],
    *,
    delimited: bool = False,
    syntax: UID = ExplicitVRLittleEndian,
) -> Path:
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = MediaStorageDirectoryStorage
    meta.MediaStorageSOPInstanceUID = UID("1.2.3")
    meta.TransferSyntaxUID = syntax
    encoding = (syntax.is_implicit_VR, syntax.is_little_endian)
    made = FileDataset("", {}, b"\0" * 128, meta, *encoding)
    made.FileSetID = "DISC"
    made.DirectoryRecordSequence = list(records)
    made["DirectoryRecordSequence"].is_undefined_length = delimited
    path = folder / "DICOMDIR"
    with config.disable_value_validation():
        made.save_as(path, enforce_file_format=True)
    return path


def outcome(listing: Listing) -> dict[str, bytes | str]:
    """Of each place the bytes, or why there are none."""
    found: dict[str, bytes | str] = {one.what: one.reason for one in listing.unusable}
    return found | {item.place: item.open(LIMIT).read() for item in listing.items}


IM1 = ["DICOM", "S1", "IM1"]
IM2 = ["DICOM", "S1", "IM2"]
BOTH = {"DICOM/S1/IM1": b"1", "DICOM/S1/IM2": b"2"}


@pytest.mark.parametrize("name", sorted(path.name for path in DISC.glob("DICOMDIR*")))
def test_the_published_ones_list_what_their_records_say(name: str) -> None:
    # Two patients; bad or no offsets, records in another order, three transfer syntaxes.
    directory = dcmread(DISC / name)
    expected = {
        "/".join(one.ReferencedFileID)
        for one in directory.DirectoryRecordSequence
        if "ReferencedFileID" in one
    }

    listing = listed(DISC / name)

    assert {item.place for item in listing.items} == expected
    assert len(expected) == (0 if "empty" in name else 31)
    assert not listing.unusable
    assert all(dcmread(item.open(2**29)).SOPInstanceUID for item in listing.items)


def test_places_are_those_that_the_folder_has() -> None:
    whole = {item.place: item for item in listed(DISC).items}

    assert all(whole[item.place] == item for item in listed(DISC / "DICOMDIR").items)


@pytest.mark.parametrize("syntax", [ImplicitVRLittleEndian, ExplicitVRBigEndian], ids=str)
@pytest.mark.parametrize("delimited", [False, True])
def test_other_encodings(disc: Path, syntax: UID, delimited: bool) -> None:
    records = [record(kind="PATIENT"), record(IM1), record(IM2)]
    path = write(disc, records, delimited=delimited, syntax=syntax)

    assert dcmread(path).DirectoryRecordSequence[1].ReferencedFileID == IM1
    assert outcome(listed(path)) == BOTH


@pytest.mark.parametrize(
    "file_id",
    [
        ["..", "SECRET"],
        ["DICOM", "..", "..", "SECRET"],
        ["", "SECRET"],
        "../SECRET",
        "/SECRET",
        ["DICOM", ".", "S1", "IM1"],
        ["DICOM/../../SECRET"],
        ["DICOM", "", "S1", "IM1"],
        ["UP", "SECRET"],
        ["UP", "NOWHERE"],
        "LINK",
        ["DICOM", "HOP", "UP", "SECRET"],
    ],
    ids=str,
)
def test_what_lies_outside_is_out_of_reach(disc: Path, file_id: Any) -> None:
    (disc / "UP").symlink_to("..", target_is_directory=True)
    (disc / "LINK").symlink_to("../SECRET")
    (disc / "DICOM" / "HOP").symlink_to("..", target_is_directory=True)

    found = outcome(listed(write(disc, [record(file_id), record(IM1)])))

    assert b"secret" not in found.values()
    assert found.pop("DICOM/S1/IM1") == b"1"
    (reason,) = found.values()
    assert "outside of the DICOMDIR's folder" in str(reason)


def test_an_absolute_path_is_outside(disc: Path, tmp_path: Path) -> None:
    found = outcome(listed(write(disc, [record(f"{tmp_path}/SECRET")])))

    assert "outside" in str(found[f"{tmp_path}/SECRET"])


def test_a_link_within_the_folder_is_followed(disc: Path) -> None:
    (disc / "S1").symlink_to("DICOM/S1", target_is_directory=True)

    assert outcome(listed(write(disc, [record(["S1", "IM1"])]))) == {"S1/IM1": b"1"}


def test_links_in_a_circle(disc: Path) -> None:
    (disc / "A").symlink_to("B")
    (disc / "B").symlink_to("A")

    found = outcome(listed(write(disc, [record(["A", "X"]), record("B"), record(IM1)])))

    assert found.pop("DICOM/S1/IM1") == b"1"
    assert set(found) == {"A/X", "B"}


def test_what_is_missing_or_deleted_is_unusable(disc: Path) -> None:
    gone = record(IM2, RecordInUseFlag=0)

    found = outcome(listed(write(disc, [record(IM1), record(["DICOM", "NO"]), gone])))

    assert found["DICOM/S1/IM1"] == b"1"
    assert "is not there" in str(found["DICOM/NO"])
    assert "no longer in use" in str(found["DICOM/S1/IM2"])


@pytest.mark.parametrize("rename", ["dicom/s1/im1", "dicom/S1/IM1.;1", "DICOM/s1/im1;1"])
def test_a_copied_disc_may_spell_its_names_otherwise(disc: Path, rename: str) -> None:
    shutil.rmtree(disc / "DICOM")
    (disc / rename).parent.mkdir(parents=True)
    (disc / rename).write_bytes(b"1")

    assert outcome(listed(write(disc, [record(IM1)]))) == {rename: b"1"}


def test_of_two_spellings_neither_is_guessed_and_the_exact_one_is_taken(disc: Path) -> None:
    for name in ("a", "A.", "Im1"):
        (disc / name).write_bytes(name.encode())
    (disc / "IM1").write_bytes(b"exact")

    found = outcome(listed(write(disc, [record("A"), record("IM1")])))

    assert found["IM1"] == b"exact"
    assert "is not there" in str(found["A"])


def test_a_file_that_is_listed_twice_is_one_item(disc: Path) -> None:
    path = write(disc, [record(IM1), record(IM1, kind="PRIVATE"), record("DICOM/S1/IM1")])

    assert [item.place for item in listed(path).items] == ["DICOM/S1/IM1"]


def test_a_dicomdir_that_lists_itself_is_no_item(disc: Path) -> None:
    assert outcome(listed(write(disc, [record("DICOMDIR"), record(IM1)]))) == {"DICOM/S1/IM1": b"1"}


def test_offsets_in_circles_and_into_nothing_are_not_followed(disc: Path) -> None:
    records = [record(IM1), record(kind="STUDY"), record(IM2)]
    for number, one in enumerate(records):
        for keyword in OFFSETS:
            setattr(one, keyword, (0, 400, 2**32 - 1)[number])
    path = write(disc, records)
    made = dcmread(path)
    made.OffsetOfTheFirstDirectoryRecordOfTheRootDirectoryEntity = 400
    made.OffsetOfTheLastDirectoryRecordOfTheRootDirectoryEntity = 2**32 - 1
    made.save_as(path)

    assert outcome(listed(path)) == BOTH


def test_a_value_that_cannot_be_read_costs_one_record(disc: Path) -> None:
    path = write(disc, [record(IM1), record(IM2)])
    text = struct.pack("<HH2s", 4, 0x1500, b"CS")
    data = path.read_bytes()
    assert data.count(text) == 2
    path.write_bytes(data.replace(text, text.replace(b"CS", b"FD"), 1))

    found = outcome(listed(path))

    assert "a record of the DICOMDIR cannot be read" in str(found.pop("DICOMDIR"))
    assert found == {"DICOM/S1/IM2": b"2"}


def test_where_no_record_begins_nothing_is_taken_for_one(disc: Path) -> None:
    path = write(disc, [record(IM1), record(IM2)])
    data = path.read_bytes()
    at = data.rindex(b"\xfe\xff\x00\xe0")
    path.write_bytes(data[:at] + b"\x04\x00\x34\x12" + data[at + 4 :])

    found = outcome(listed(path))

    assert "is damaged from here on" in str(found.pop("DICOMDIR"))
    assert found == {"DICOM/S1/IM1": b"1"}


@pytest.mark.parametrize("delimited", [False, True])
def test_a_dicomdir_cut_anywhere_says_so(disc: Path, delimited: bool) -> None:
    path = write(disc, [record(IM1), record(kind="STUDY"), record(IM2)], delimited=delimited)
    data = path.read_bytes()
    start = data.index(b"\x04\x00\x20\x12SQ")
    seen = set()
    for length in range(132, len(data)):
        path.write_bytes(data[:length])
        try:
            listing = listed(path)
        except IntakeError:
            assert length < start + 12
            continue
        if length >= start + 12:
            assert "is damaged from here on" in listing.unusable[-1].reason
        seen.add(tuple(item.place for item in listing.items))
    assert ("DICOM/S1/IM1",) in seen


def test_no_change_of_a_byte_reaches_outside_or_crashes(disc: Path) -> None:
    path = write(disc, [record(IM1), record(kind="STUDY"), record(IM2)], delimited=True)
    data = path.read_bytes()
    source = random.Random(2)  # noqa: S311
    for _ in range(1500):
        changed = bytearray(data)
        for _ in range(source.choice((1, 1, 2, 8))):
            changed[source.randrange(128, len(data))] = source.choice((0, 1, 0x7F, 0xFF, 0x2E))
        path.write_bytes(changed)
        try:
            found = outcome(listed(path))
        except IntakeError:
            continue
        assert {one for one in found.values() if isinstance(one, bytes)} <= {b"1", b"2"}


def test_sequences_nested_without_end_are_a_reason(disc: Path) -> None:
    path = write(disc, [record(IM1), record(kind="STUDY"), record(IM2)], delimited=True)
    data = path.read_bytes()
    nested = struct.pack("<HH2sHI", 0x0008, 0x1140, b"SQ", 0, 2**32 - 1)
    nested += struct.pack("<HHI", 0xFFFE, 0xE000, 2**32 - 1)
    end = data.rindex(struct.pack("<HH", 0xFFFE, 0xE0DD))
    head = struct.pack("<HHI", 0xFFFE, 0xE000, 2**32 - 1)
    path.write_bytes(data[:end] + head + nested * 20_000)

    found = outcome(listed(path))

    assert BOTH.items() <= found.items()
    assert "is damaged from here on" in str(found["DICOMDIR"])


@pytest.mark.parametrize("kind", ["deflated", "another class", "no records", "huge"])
def test_what_is_no_dicomdir_of_the_standard_is_refused(disc: Path, kind: str) -> None:
    path = write(disc, [record(IM1)])
    if kind == "huge":
        os.truncate(path, 2**28 + 1)
    else:
        made = dcmread(path)
        if kind == "deflated":
            made.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
        elif kind == "another class":
            made.file_meta.MediaStorageSOPClassUID = CTImageStorage
        else:
            del made.DirectoryRecordSequence
        made.save_as(path)

    if kind == "no records":
        assert listed(path) == Listing(())
        return
    with pytest.raises(IntakeError, match=r"DICOMDIR"):
        listed(path)


def test_a_name_of_its_own_makes_no_difference(disc: Path) -> None:
    path = write(disc, [record(IM1)])
    path = path.rename(disc / "index.dcm")

    assert outcome(listed(path)) == {"DICOM/S1/IM1": b"1"}


def test_two_patients_are_two_patients(disc: Path, film: Callable[..., FileDataset]) -> None:
    for number in (1, 2):
        film(PatientID=f"P{number}").save_as(disc / f"P{number}", enforce_file_format=True)
    records = [record(kind="PATIENT"), record("P1"), record(kind="PATIENT"), record("P2")]

    items = listed(write(disc, records)).items

    assert [dcmread(item.open(LIMIT)).PatientID for item in items] == ["P1", "P2"]
    assert all(isinstance(item, FileItem) for item in items)


def test_thousands_of_records_take_seconds(disc: Path) -> None:
    for number in range(3000):
        (disc / f"I{number}").touch()
    path = write(disc, [record(f"I{number}") for number in range(3000)])
    started = time.monotonic()

    assert len(listed(path).items) == 3000
    assert time.monotonic() - started < 30
