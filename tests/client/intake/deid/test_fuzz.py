"""Broken and hostile files: a new object or a reason; no crash, no hang, no name in either."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from io import BytesIO
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from pydicom.datadict import dictionary_VR, keyword_dict
from pydicom.dataset import Dataset, FileDataset
from pydicom.encaps import encapsulate
from pydicom.sequence import Sequence
from pydicom.uid import JPEG2000Lossless, JPEGBaseline8Bit

from client.intake.deid.engine import Engine
from client.intake.part10 import Limits
from client.intake.quiet import quiet
from common.errors import DataError

NAME = b"QXKOWALSKI"
LIMITS = Limits(frame_samples=2**16, samples=2**18, read_bytes=2**20)
MUTATIONS = 150
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
    place = int(random.integers(132, data.index(b"\xe0\x7f\x10\0")))
    yield data[:place] + piece + data[place:]


@pytest.mark.parametrize("syntax", [None, "JPEG", "JPEG2000"])
def test_mutated_files_have_an_outcome_without_a_name(
    film: Film, as_bytes: Any, engine: Engine, syntax: str | None
) -> None:
    with quiet():
        data = as_bytes(named(film, syntax))
    random = np.random.default_rng(3)

    kept = 0
    for _ in range(MUTATIONS):
        for mutated in mutations(data, random):
            given = outcome(engine, mutated)
            kept += given.startswith(bytes(128))
            assert NAME not in given
    assert 0 < kept < 5 * MUTATIONS


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
