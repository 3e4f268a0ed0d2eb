"""What a codestream says of itself, against what its decoder makes of it."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pydicom import dcmread
from pydicom.encaps import generate_frames

from client.intake.codestream import claimed_size
from common.errors import IntakeError


@pytest.mark.parametrize("kind", ["JPEG", "JPEG2000"])
@pytest.mark.parametrize(("rows", "columns", "mode"), [(7, 300, "L"), (513, 20, "RGB")])
def test_reads_what_an_encoder_wrote(kind: str, rows: int, columns: int, mode: str) -> None:
    buffer = BytesIO()
    Image.new(mode, (columns, rows)).save(buffer, kind)

    claim = claimed_size(buffer.getvalue())

    assert claim == (rows, columns, len(mode))


def test_a_progressive_jpeg_with_comments_is_read_too() -> None:
    buffer = BytesIO()
    Image.new("L", (30, 20)).save(buffer, "JPEG", progressive=True, comment=b"\xff\xc0" * 40)

    assert claimed_size(buffer.getvalue()) == (20, 30, 1)


def test_other_coding_makes_no_claim() -> None:
    assert claimed_size(bytes(64)) is None
    assert claimed_size(b"") is None


@pytest.mark.parametrize("kind", ["JPEG", "JPEG2000"])
def test_any_cut_before_the_size_is_an_error_and_never_a_crash(kind: str) -> None:
    buffer = BytesIO()
    Image.new("L", (30, 20)).save(buffer, kind)
    data = buffer.getvalue()

    answers = []
    for length in range(12, len(data)):
        try:
            answers.append(claimed_size(data[:length]))
        except IntakeError:
            answers.append(None)
    assert set(answers) == {None, (20, 30, 1)}
    random = np.random.default_rng(0)
    for _ in range(500):
        broken = np.frombuffer(data, dtype=np.uint8).copy()
        broken[random.integers(12, len(broken), 8)] = random.integers(0, 256, 8)
        try:
            claimed_size(broken.tobytes())
        except IntakeError:
            continue


def test_agrees_with_the_headers_of_real_files(shared_data: Path) -> None:
    checked = 0
    for path in sorted((shared_data / "dicom" / "cornerstone-ct-ts").iterdir()):
        dataset = dcmread(path)
        if not dataset.file_meta.TransferSyntaxUID.is_encapsulated:
            continue
        claim = claimed_size(next(generate_frames(dataset.PixelData, number_of_frames=1)))
        if claim is not None:
            assert claim == (dataset.Rows, dataset.Columns, dataset.SamplesPerPixel), path
            checked += 1
    assert checked >= 10
