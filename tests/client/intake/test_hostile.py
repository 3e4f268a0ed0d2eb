"""Broken and hostile files: a reason for each, no crash, and memory within bounds."""

from __future__ import annotations

import dataclasses
import tracemalloc
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pydicom import dcmread
from pydicom.encaps import encapsulate
from pydicom.uid import MPEG2MPML, UID, JPEG2000Lossless, JPEGBaseline8Bit, RLELossless

from client.intake.deid.engine import Engine
from client.intake.deid.profile import Profile
from client.intake.deid.seam import CohortDeidentifier
from client.intake.dicom import FileReader, FileResult, Task
from client.intake.items import FileItem
from client.intake.labels import read_labels
from client.intake.part10 import Limits
from common.spec import RunSpec

MEGABYTE = 2**20


@contextmanager
def memory_below(limit: int) -> Iterator[None]:
    """Python's and NumPy's own allocations stay below `limit` bytes at every moment."""
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < limit
    finally:
        tracemalloc.stop()


@pytest.fixture
def reader(hospital: Any) -> FileReader:
    run: RunSpec = hospital.make_spec(input={"frames": "all"})
    table = read_labels(hospital.labels({"P1": "normal"}), run.task)
    return FileReader(run.input, table, CohortDeidentifier(Engine(Profile(), hospital.key)))


@pytest.fixture
def read(reader: FileReader) -> Callable[[Path], FileResult]:
    return lambda path: reader(Task(FileItem(path, "")))


def encoded(kind: str, side: int) -> bytes:
    buffer = BytesIO()
    Image.new("L", (side, side)).save(buffer, kind)
    return buffer.getvalue()


def transfer(path: Path, syntax: UID, data: bytes | None = None) -> Path:
    """Put other pixel data, in another transfer syntax, into a file."""
    dataset = dcmread(path)
    dataset.file_meta.TransferSyntaxUID = syntax
    if data is not None:
        dataset.PixelData = encapsulate([data])
        dataset["PixelData"].VR = "OB"
    dataset.save_as(path)
    return path


@pytest.mark.parametrize(
    "claim",
    [
        {"Rows": 65535, "Columns": 65535},
        {"NumberOfFrames": 2_000_000_000},
        {"Rows": 8000, "Columns": 8000, "NumberOfFrames": 1000},
        {"SamplesPerPixel": 65535, "Rows": 2000},
    ],
)
@pytest.mark.parametrize("syntax", [None, RLELossless, JPEG2000Lossless])
def test_a_file_that_claims_to_be_huge(
    hospital: Any, read: Any, claim: dict[str, int], syntax: UID | None
) -> None:
    path = hospital.film("x", **claim)
    if syntax is not None:
        transfer(path, syntax, encoded("JPEG2000", 16))

    with memory_below(8 * MEGABYTE):
        result = read(path)

    assert not result.images
    assert any(word in result.reason for word in ("claims", "cut short", "cannot be read"))


@pytest.mark.parametrize(
    ("kind", "syntax"), [("JPEG2000", JPEG2000Lossless), ("JPEG", JPEGBaseline8Bit)]
)
def test_a_codestream_that_is_larger_than_its_header(
    hospital: Any, read: Any, kind: str, syntax: UID
) -> None:
    small = np.zeros((16, 16), dtype=np.uint8)
    good = transfer(hospital.film("good", small), syntax, encoded(kind, 16))
    bomb = transfer(hospital.film("bomb", small), syntax, encoded(kind, 4096))

    with memory_below(8 * MEGABYTE):
        result = read(bomb)

    assert "its compressed image has rows, columns, samples (4096, 4096, 1)" in result.reason
    assert len(read(good).images) == 1


def test_a_deflated_bomb(hospital: Any, reader: FileReader) -> None:
    path = hospital.film("x", np.zeros((16, 16), dtype=np.uint16))
    plain = transfer(path, UID("1.2.840.10008.1.2.1.99"))
    assert len(reader(Task(FileItem(plain, ""))).images) == 1
    data = plain.read_bytes()
    start = data.index(b"1.2.840.10008.1.2.1.99") + 22
    packer = zlib.compressobj(9, wbits=-15)
    zeros = bytes(MEGABYTE)
    bomb = b"".join(packer.compress(zeros) for _ in range(64)) + packer.flush()
    assert len(bomb) < MEGABYTE // 10
    plain.write_bytes(data[:start] + bomb)
    small = dataclasses.replace(reader, limits=Limits(read_bytes=4 * MEGABYTE))

    with memory_below(16 * MEGABYTE):
        result = small(Task(FileItem(plain, "")))

    assert "inflates to more than 4194304 bytes" in result.reason


def test_a_box_that_leads_nowhere_does_not_hang(hospital: Any, read: Any) -> None:
    path = hospital.film("x", np.zeros((16, 16), dtype=np.uint8))
    stuck = b"\0\0\0\x0cjP  \r\n\x87\n" + bytes(100)
    transfer(path, JPEG2000Lossless, stuck)

    assert "ends before it names its size" in read(path).reason


@pytest.mark.parametrize("length", [0x7FFFFFF0, 0xFFFFFFFE])
def test_an_element_that_lies_about_its_length(hospital: Any, read: Any, length: int) -> None:
    path = hospital.film("x", PatientComments="CANARY01")
    data = bytearray(path.read_bytes())
    at = data.index(b"CANARY01")
    data[at - 4 : at - 2] = b"UN"
    data[at - 2 : at] = b"\0\0"
    data[at : at + 4] = length.to_bytes(4, "little")
    path.write_bytes(data)

    with memory_below(8 * MEGABYTE):
        result = read(path)

    assert result.reason


def test_pixel_data_that_is_cut_short(hospital: Any, read: Any) -> None:
    path = hospital.film("x")
    data = path.read_bytes()
    for missing in (1, 100, 1199, 1200, 1206):
        path.write_bytes(data[:-missing])
        assert "cut short" in read(path).reason or "no pixel data" in read(path).reason


def test_sequences_without_end(hospital: Any, read: Any) -> None:
    path = hospital.film("x", PixelData=None)
    nest = b"\x08\x00\x40\x11SQ\0\0\xff\xff\xff\xff\xfe\xff\x00\xe0\xff\xff\xff\xff"
    data = path.read_bytes()
    at = data.index(b"\x10\x00\x20\x00LO")
    path.write_bytes(data[:at] + nest * 20_000)

    assert read(path).reason


@pytest.mark.parametrize(
    ("attributes", "reason"),
    [
        ({"PixelData": None}, "no pixel data"),
        ({"Rows": None}, "its Rows is ''"),
        ({"Columns": 0}, "its Columns is '0'"),
        ({"NumberOfFrames": -1}, "its NumberOfFrames is '-1'"),
        ({"BitsAllocated": 13}, "cannot be read"),
        ({"PhotometricInterpretation": None}, "cannot be read"),
        ({"PhotometricInterpretation": "HSV"}, "interpretation is 'HSV'"),
        ({"SOPClassUID": "1.2.840.10008.5.1.4.1.1.66.4"}, "it is a segmentation"),
    ],
)
def test_an_image_that_is_none(
    hospital: Any, read: Any, attributes: dict[str, Any], reason: str
) -> None:
    result = read(hospital.film("x", **attributes))

    assert reason in result.reason
    assert not result.images


def test_a_transfer_syntax_that_nobody_decodes_is_named(hospital: Any, read: Any) -> None:
    path = transfer(hospital.film("x"), MPEG2MPML, b"\0\0\1\xb3" + bytes(60))

    assert "MPEG2" in read(path).reason


def test_a_bare_data_set_is_read_and_one_without_pixels_refused(hospital: Any, read: Any) -> None:
    path = hospital.film("x")
    dataset = dcmread(path)
    dataset.save_as(path, enforce_file_format=False)
    data = path.read_bytes()
    path.write_bytes(data[data.index(b"\x08\x00\x16\x00UI") :])

    assert len(read(path).images) == 1


def mutations(data: bytes, random: np.random.Generator) -> Iterator[bytes]:
    """Flipped bytes, a cut, a piece taken out, a piece doubled."""
    changed = np.frombuffer(data, dtype=np.uint8).copy()
    where = random.integers(128, len(data), random.integers(1, 20))
    changed[where] = random.integers(0, 256, len(where))
    yield changed.tobytes()
    start, length = int(random.integers(0, len(data))), int(random.integers(1, 64))
    yield data[:start]
    yield data[:start] + data[start + length :]
    yield data[:start] + data[start : start + length] * 2 + data[start + length :]


def test_values_that_pydicom_dislikes_are_not_printed(
    hospital: Any, read: Any, caplog: pytest.LogCaptureFixture, recwarn: pytest.WarningsRecorder
) -> None:
    path = hospital.film("x", StudyInstanceUID="1.2.3.4.5.99")
    path.write_bytes(path.read_bytes().replace(b"1.2.3.4.5.99", b"Erika Muster"))

    assert len(read(path).images) == 1
    assert "Erika" not in caplog.text
    assert not len(recwarn)

    assert dcmread(path).StudyInstanceUID == "Erika Muster"
    assert "Erika" in caplog.text


@pytest.mark.parametrize("syntax", [None, "JPEG2000", "JPEG"])
def test_mutated_files_never_crash_or_hang(hospital: Any, read: Any, syntax: str | None) -> None:
    path = hospital.film("x", np.zeros((16, 16), dtype=np.uint8))
    if syntax is not None:
        uid = JPEG2000Lossless if syntax == "JPEG2000" else JPEGBaseline8Bit
        transfer(path, uid, encoded(syntax, 16))
    data, random = path.read_bytes(), np.random.default_rng(7)

    outcomes = set()
    for _ in range(120):
        for mutated in mutations(data, random):
            path.write_bytes(mutated)
            result = read(path)
            outcomes.add(bool(result.images))
            assert result.images or result.reason or result.put_aside or result == FileResult()
    assert outcomes == {True, False}


def test_a_decoder_that_panics_is_a_reason(hospital: Any, read: Any) -> None:
    """Run lengths whose header points behind their end: the decoder's panic is no `Exception`."""
    offsets = (1).to_bytes(4, "little") + (64).to_bytes(4, "little") + bytes(56)
    path = hospital.film("x", np.zeros((16, 16), dtype=np.uint8))
    for cut in (b"", b"\x7f", b"\x81", b"\x02\x00"):
        transfer(path, RLELossless, offsets + cut)

        result = read(path)

        assert result.reason
        assert not result.images
