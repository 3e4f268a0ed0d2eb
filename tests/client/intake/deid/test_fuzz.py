"""Broken and hostile files: a new object or a reason; no crash, no hang, no name in either.

    CLOISTER_FUZZ=20000 pytest tests/client/intake/deid/test_fuzz.py

looks at that many mutated files; otherwise it is 2,400.
"""

from __future__ import annotations

import io
import os
import resource
import time
import zipfile
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from pydicom import dcmread
from pydicom.datadict import dictionary_VR, keyword_dict
from pydicom.dataset import Dataset, FileDataset
from pydicom.encaps import encapsulate
from pydicom.fileset import FileSet
from pydicom.sequence import Sequence
from pydicom.uid import JPEG2000Lossless, JPEGBaseline8Bit

from client.intake.deid.engine import Engine
from client.intake.deid.save import save
from client.intake.items import listed
from client.intake.part10 import Limits
from client.intake.quiet import quiet
from common.errors import DataError

NAME = b"QXKOWALSKI"
LIMITS = Limits(frame_samples=2**16, samples=2**18, read_bytes=2**20)
FILES = int(os.environ.get("CLOISTER_FUZZ", "2400"))
MUTATIONS = FILES // 24
"""Of each of the three files, eight at a time."""
MOST_TAKEN = 2**28
"""Bytes that all of it may add to the memory of the process at its peak."""
REPRESENTATIONS = [b"LO", b"PN", b"UI", b"DA", b"US", b"SQ", b"CS", b"SH", b"IS", b"UN"]
Film = Callable[..., FileDataset]


def outcome(engine: Engine, data: bytes) -> bytes:
    """Everything that is given away of a file: the new object, or the reason."""
    started = time.process_time()
    try:
        cleaned = engine.clean_stream(BytesIO(data), LIMITS)
    except DataError as reason:
        return str(reason).encode()
    finally:
        assert time.process_time() - started < 5
    written = BytesIO()
    with quiet():
        cleaned.dataset.save_as(written, enforce_file_format=True)
    return written.getvalue() + repr(cleaned.account).encode()


def named(film: Film, syntax: str | None) -> FileDataset:
    """A small film with one name in many places."""
    pixels = np.arange(1024, dtype=np.uint8).reshape(32, 32)
    name = NAME.decode()
    item = Dataset()
    item.PatientName = item.SequenceName = name
    made = film(
        pixels,
        PatientName=name,
        PatientComments=name,
        ReceiveCoilName=name,
        InstitutionName=name,
        ReferencedStudySequence=Sequence([item]),
        PatientID=name,
    )
    made.private_block(0x0009, name, create=True).add_new(1, "LO", name)
    if syntax is not None:
        buffer = BytesIO()
        Image.fromarray(pixels).save(buffer, syntax)
        made.PixelData = encapsulate([buffer.getvalue()])
        made["PixelData"].VR = "OB"
        made.file_meta.TransferSyntaxUID = (
            JPEGBaseline8Bit if syntax == "JPEG" else JPEG2000Lossless
        )
    return made


def mutations(data: bytes, random: np.random.Generator) -> Iterator[bytes]:
    """Flipped bytes, a cut, a piece taken out, a piece doubled, a piece moved."""
    changed = np.frombuffer(data, dtype=np.uint8).copy()
    where = random.integers(128, len(data), random.integers(1, 12))
    changed[where] = random.integers(0, 256, len(where))
    yield changed.tobytes()
    start, length = int(random.integers(0, len(data))), int(random.integers(1, 64))
    piece = data[start : start + length]
    yield data[:start]
    yield data[:start] + data[start + length :]
    yield data[:start] + piece * 2 + data[start + length :]
    # Within the header: moved among the pixels, a name would be a picture of itself.
    pixels = data.index(b"\xe0\x7f\x10\0")
    place = int(random.integers(132, pixels))
    yield data[:place] + piece + data[place:]
    yield from structured(data, random, pixels)


def structured(data: bytes, random: np.random.Generator, pixels: int) -> Iterator[bytes]:
    """An element with another length, another representation, another tag."""
    heads = [at for at in range(132, pixels) if data[at + 4 : at + 6] in REPRESENTATIONS]
    at = int(random.choice(heads))
    length = int(random.choice([0, 1, 7, 0x7FFF, 0xFFFF])).to_bytes(2, "little")
    yield data[: at + 6] + length + data[at + 8 :]
    yield data[: at + 4] + bytes(random.choice(REPRESENTATIONS)) + data[at + 6 :]
    yield data[:at] + random.bytes(4) + data[at + 4 :]


@pytest.mark.parametrize("syntax", [None, "JPEG", "JPEG2000"])
def test_mutated_files_have_an_outcome_without_a_name(
    film: Film, as_bytes: Any, engine: Engine, syntax: str | None
) -> None:
    with quiet():
        data = as_bytes(named(film, syntax))
    random, before = np.random.default_rng(3), peak()

    kept = 0
    for _ in range(MUTATIONS):
        for mutated in mutations(data, random):
            given = outcome(engine, mutated)
            kept += given.startswith(bytes(128))
            assert NAME not in given
    assert 0 < kept < 8 * MUTATIONS
    assert peak() - before < MOST_TAKEN


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def test_of_mutated_files_only_whole_ones_are_written(
    film: Film, as_bytes: Any, engine: Engine, tmp_path: Path
) -> None:
    with quiet():
        data = as_bytes(named(film, None))
    random, saved, refused = np.random.default_rng(4), 0, 0

    for _ in range(MUTATIONS // 4):
        for mutated in mutations(data, random):
            try:
                path = save(engine.clean_stream(BytesIO(mutated), LIMITS), tmp_path)
            except DataError:
                refused += 1
                continue
            saved += 1
            again = dcmread(path)
            assert len(again.PixelData) == again.Rows * again.Columns
            assert list(tmp_path.iterdir()) == [path]
            path.unlink()
    assert saved
    assert refused
    assert list(tmp_path.iterdir()) == []


def packed(data: bytes) -> bytes:
    """A ZIP of three files."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in ("a/1", "a/2", "b.dcm"):
            archive.writestr(name, data)
    return buffer.getvalue()


def directory(folder: Path) -> bytes:
    """The DICOMDIR of a folder."""
    made = FileSet()
    for path in sorted(folder.iterdir()):
        made.add(path)
    made.write(folder.parent / "set")
    return (folder.parent / "set" / "DICOMDIR").read_bytes()


@pytest.mark.parametrize("kind", ["ZIP", "DICOMDIR"])
def test_mutated_archives_and_directories_give_items_or_reasons(
    film: Film, as_bytes: Any, engine: Engine, tmp_path: Path, kind: str
) -> None:
    with quiet():
        dated = named(film, None)
        dated.StudyDate, dated.StudyTime, dated.StudyID = "20260101", "101500", "1"
        dated.SeriesNumber = dated.InstanceNumber = 1
        data = as_bytes(dated)
        if kind == "ZIP":
            whole, target = packed(data), tmp_path / "source.zip"
        else:
            (tmp_path / "files").mkdir()
            (tmp_path / "files" / "1").write_bytes(data)
            whole, target = directory(tmp_path / "files"), tmp_path / "set" / "DICOMDIR"
    random, before, seen = np.random.default_rng(5), peak(), {"item": 0, "reason": 0}

    for _ in range(MUTATIONS):
        target.write_bytes(damaged(whole, random))
        for told in from_source(engine, target):
            seen["item" if told.startswith(bytes(128)) else "reason"] += 1
            assert NAME not in told
    assert all(seen.values())
    assert peak() - before < MOST_TAKEN


def damaged(data: bytes, random: np.random.Generator) -> bytes:
    """Some bytes changed, or a piece taken out."""
    changed = bytearray(data)
    for where in random.integers(0, len(data), random.integers(1, 6)):
        changed[where] = int(random.integers(0, 256))
    if random.random() < 0.3:
        start = int(random.integers(0, len(data)))
        del changed[start : start + int(random.integers(1, 64))]
    return bytes(changed)


def from_source(engine: Engine, source: Path) -> Iterator[bytes]:
    """Everything that is given away of a source."""
    started = time.process_time()
    try:
        listing = listed(source)
    except DataError as reason:
        yield str(reason).encode()
        return
    finally:
        assert time.process_time() - started < 5
    yield from (unused.reason.encode() for unused in listing.unusable)
    for item in listing.items:
        try:
            with item.open(LIMITS.read_bytes) as stream:
                data = stream.read()
        except DataError as reason:
            yield str(reason).encode()
        else:
            yield outcome(engine, data)


KEYWORDS = sorted(
    name
    for name, tag in keyword_dict.items()
    if tag >> 16 not in (0, 2, 4, 0x7FE0) and " " not in dictionary_VR(tag)
)
TEXTS = ("LO", "SH", "CS", "LT", "UT", "PN", "UI", "AE", "DA", "OB", "DS", "IS")
SLOW = settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@SLOW
@given(
    places=st.lists(
        st.tuples(st.sampled_from(KEYWORDS), st.sampled_from(TEXTS), st.integers(0, 3)),
        min_size=1,
        max_size=12,
    )
)
def test_a_name_in_any_attribute_as_any_representation(
    film: Film, as_bytes: Any, engine: Engine, places: list[tuple[str, str, int]]
) -> None:
    """Whatever an attribute's representation ought to be, and at any depth."""
    made = film()
    with quiet():
        _plant(made, places)
        data = as_bytes(made)
    for representation in ("DS", "IS"):
        data = data.replace(b"LO\x0a\0" + NAME, representation.encode() + b"\x0a\0" + NAME)

    assert NAME not in outcome(engine, data)


def _plant(made: Dataset, places: list[tuple[str, str, int]]) -> None:
    for keyword, representation, depth in places:
        level: Dataset = made
        for _ in range(depth):
            if "ReferencedSeriesSequence" not in level:
                level.ReferencedSeriesSequence = Sequence([Dataset()])
            level = level.ReferencedSeriesSequence[0]
        value = NAME if representation == "OB" else NAME.decode()
        if keyword not in ("PixelData", "SpecificCharacterSet"):
            level.add_new(
                keyword, "LO" if representation in ("DS", "IS") else representation, value
            )
