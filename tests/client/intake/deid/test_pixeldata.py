"""Pixels come through as they are, but for text, unused bits and words in codestreams."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from jpeg_ls import encode_array
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from pydicom import dcmread
from pydicom.dataset import Dataset, FileDataset
from pydicom.encaps import encapsulate
from pydicom.pixels.utils import pixel_array
from pydicom.sequence import Sequence
from pydicom.uid import (
    UID,
    ExplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGLSLossless,
    RLELossless,
)

from client.intake.deid.codestrip import stripped
from client.intake.deid.pixeldata import masked
from common.errors import IntakeError

Film = Callable[..., FileDataset]
Clean = Callable[..., Any]
STORAGE = "1.2.840.10008.5.1.4.1.1."


def hill(side: int = 64, highest: int = 3000) -> NDArray[Any]:
    y, x = np.mgrid[-1 : 1 : side * 1j, -1 : 1 : side * 1j]
    shape: NDArray[Any] = highest * np.exp(-2 * (x**2 + y**2))
    return shape


def written(pixels: NDArray[Any], value: int, *lines: str) -> NDArray[Any]:
    layer = Image.new("L", pixels.shape[::-1])
    for row, line in enumerate(lines):
        font = ImageFont.load_default(14)
        ImageDraw.Draw(layer).text((4, 4 + 22 * row), line, font=font, fill=255)
    changed = pixels.copy()
    changed[np.asarray(layer) > 128] = value
    return changed


@pytest.mark.parametrize("kind", ["uint8", "uint16", "int16"])
def test_grey_comes_through_exactly(film: Film, clean: Clean, kind: str) -> None:
    pixels = (hill(highest=200) - (100 if kind == "int16" else 0)).astype(kind)

    again = clean(film(pixels)).again

    np.testing.assert_array_equal(again.pixel_array, pixels)


def test_frames_and_colour_come_through_exactly(film: Film, clean: Clean) -> None:
    frames = np.stack([hill(highest=top) for top in (100, 150, 200)]).astype(np.uint8)
    stack = film(frames, NumberOfFrames=3, Rows=64, Columns=64)
    np.testing.assert_array_equal(clean(stack).again.pixel_array, frames)

    colour = np.moveaxis(frames, 0, -1)
    planes = film(
        frames,
        SamplesPerPixel=3,
        PhotometricInterpretation="RGB",
        PlanarConfiguration=1,
        Rows=64,
        Columns=64,
    )
    again = clean(planes).again
    np.testing.assert_array_equal(again.pixel_array, colour)
    assert again.PlanarConfiguration == 0


def test_single_bits_come_through_exactly(film: Film, clean: Clean) -> None:
    bits = (hill(highest=200) > 50).astype(np.uint8)
    made = film(bits, BitsAllocated=1, BitsStored=1, HighBit=0)
    made.PixelData = np.packbits(bits.ravel(), bitorder="little").tobytes()

    np.testing.assert_array_equal(clean(made).again.pixel_array, bits)


def test_unused_bits_are_the_signs() -> None:
    header = Dataset()
    header.BitsStored = 12
    stored = np.array([0xF123, 0x0FFF, 0x7800], dtype=np.uint16)

    assert masked(stored, header).tolist() == [0x123, 0xFFF, 0x800]
    assert masked(stored.astype(np.int16), header).tolist() == [0x123, -1, -0x800]


def test_text_is_blanked_in_every_frame_and_elsewhere_nothing(film: Film, clean: Clean) -> None:
    plain = hill(128).astype(np.uint16)
    marked = written(plain, 4000, "DOE JOHN", "12.08.1964")
    stack = film(np.stack([plain, marked]), NumberOfFrames=2, Rows=128, Columns=128)

    result = clean(stack)

    first, second = result.again.pixel_array
    np.testing.assert_array_equal(first, plain)
    text = marked != plain
    assert second.max() < 4000
    assert (second[text] == plain.min()).mean() > 0.98
    rest = ~np.pad(text, 16)[:, :]  # the margin of a box reaches a little beyond the letters
    assert (second == plain)[70:].all()
    assert rest.any()
    assert result.cleaned.account.counts["pixels: box blanked", "PixelData"] >= 1


def test_text_on_a_film_where_white_is_low(film: Film, clean: Clean) -> None:
    marked = written(hill(128).astype(np.uint16), 0, "DOE JOHN", "12.08.1964")

    again = clean(film(marked, PhotometricInterpretation="MONOCHROME1")).again.pixel_array

    text = marked != hill(128).astype(np.uint16)
    assert (again[text] == marked.max()).mean() > 0.98


def test_text_is_refused_if_pixels_are_not_to_be_cleaned(film: Film, clean: Clean) -> None:
    marked = written(hill(128).astype(np.uint16), 4000, "DOE JOHN", "12.08.1964")

    with pytest.raises(IntakeError, match="clean_pixel_data = true in the profile"):
        clean(film(marked), clean_pixel_data=False)


def test_coloured_text_is_blanked(film: Film, clean: Clean) -> None:
    grey = hill(128, 120).astype(np.uint8)
    for channel in range(3):
        colour = np.stack([grey] * 3, axis=-1)
        colour[..., channel] = written(grey, 255, "DOE JOHN", "12.08.1964")
        made = film(
            colour,
            SamplesPerPixel=3,
            PhotometricInterpretation="RGB",
            PlanarConfiguration=0,
            Rows=128,
            Columns=128,
        )

        assert clean(made).again.pixel_array.max() < 255


def test_coloured_text_of_the_grounds_own_brightness_is_blanked(film: Film, clean: Clean) -> None:
    """Ground and letters have the same largest and the same smallest channel."""
    letters = written(np.zeros((128, 128), dtype=np.uint8), 1, "DOE JOHN", "12.08.1964") > 0
    colour = np.where(letters[..., None], (60, 200, 60), (200, 60, 60)).astype(np.uint8)
    made = film(
        colour, SamplesPerPixel=3, PhotometricInterpretation="RGB", PlanarConfiguration=0,
        Rows=128, Columns=128,
    )  # fmt: skip

    again = clean(made).again.pixel_array

    assert (again[letters] == 0).mean() > 0.98


def test_outside_of_ultrasound_regions_is_black(film: Film, clean: Clean) -> None:
    region = Dataset()
    region.RegionLocationMinX0, region.RegionLocationMinY0 = 10, 20
    region.RegionLocationMaxX1, region.RegionLocationMaxY1 = 49, 59
    pixels = (hill(highest=150) + 50).astype(np.uint8)
    screen = film(
        pixels,
        SOPClassUID=f"{STORAGE}6.1",
        Modality="US",
        SequenceOfUltrasoundRegions=Sequence([region]),
    )

    again = clean(screen).again.pixel_array

    np.testing.assert_array_equal(again[20:60, 10:50], pixels[20:60, 10:50])
    outside = again.copy()
    outside[20:60, 10:50] = pixels.min()
    assert (outside == pixels.min()).all()


def jpeg(pixels: NDArray[Any], **options: Any) -> bytes:
    buffer = BytesIO()
    Image.fromarray(pixels).save(buffer, **options)
    return buffer.getvalue()


def compressed(film: Film, pixels: NDArray[Any], syntax: UID, data: bytes) -> FileDataset:
    made = film(pixels)
    made.file_meta.TransferSyntaxUID = syntax
    made.PixelData = encapsulate([data])
    made["PixelData"].VR = "OB"
    return made


@pytest.mark.parametrize(
    ("syntax", "options"),
    [
        (JPEGBaseline8Bit, {"format": "JPEG", "comment": b"Mustermann"}),
        (JPEGBaseline8Bit, {"format": "JPEG", "restart_marker_blocks": 2, "exif": b"Mustermann"}),
        (JPEGBaseline8Bit, {"format": "JPEG", "progressive": True}),
        (JPEG2000Lossless, {"format": "JPEG2000", "comment": b"Mustermann"}),
        (JPEG2000Lossless, {"format": "JPEG2000", "no_jp2": True, "tile_size": (32, 32)}),
        (JPEGLSLossless, {}),
    ],
)
def test_compressed_frames_stay_as_they_are_without_their_words(
    film: Film, clean: Clean, syntax: UID, options: dict[str, Any]
) -> None:
    pixels = hill(highest=200).astype(np.uint8)
    data = jpeg(pixels, **options) if options else bytes(encode_array(pixels))
    made = compressed(film, pixels, syntax, data + b"Mustermann")

    result = clean(made)

    assert result.again.file_meta.TransferSyntaxUID == syntax
    np.testing.assert_array_equal(result.again.pixel_array, made.pixel_array)
    assert b"Mustermann" not in result.data


def test_run_lengths_are_decoded(film: Film, clean: Clean) -> None:
    made = film(hill(highest=200).astype(np.uint8))
    before = made.pixel_array
    made.compress(RLELossless)

    again = clean(made).again

    assert again.file_meta.TransferSyntaxUID == ExplicitVRLittleEndian
    np.testing.assert_array_equal(again.pixel_array, before)


def test_a_codestream_of_more_bits_than_described_is_decoded(film: Film, clean: Clean) -> None:
    pixels = hill().astype(np.uint16)
    hidden = pixels | 0xA000
    made = compressed(film, pixels, JPEGLSLossless, bytes(encode_array(hidden)))

    again = clean(made).again

    assert again.file_meta.TransferSyntaxUID == ExplicitVRLittleEndian
    np.testing.assert_array_equal(again.pixel_array, pixels)


@pytest.mark.parametrize("syntax", [JPEGBaseline8Bit, JPEG2000Lossless, JPEGLSLossless])
def test_a_frame_that_breaks_off_is_not_passed_on(syntax: UID) -> None:
    pixels = hill(highest=200).astype(np.uint8)
    kinds = {JPEGBaseline8Bit: "JPEG", JPEG2000Lossless: "JPEG2000"}
    whole = jpeg(pixels, format=kinds[syntax]) if syntax in kinds else bytes(encode_array(pixels))

    for length in (0, 2, 3, 20, len(whole) // 2, len(whole) - 1):
        with pytest.raises(IntakeError, match="cannot be followed to its end"):
            stripped(whole[:length], syntax)


FRAMES, SIDE = 1000, 512
CHILD = """
import resource, sys
from pathlib import Path
from client.intake.deid.burned_in import Box
from client.intake.deid.engine import Engine
from client.intake.deid.pixeldata import PixelCleaner
from client.intake.deid.profile import Profile
from client.intake.deid.save import save
from client.intake.keys import SiteKey
from client.intake.part10 import BoundedFile

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

source, folder = map(Path, sys.argv[1:])
find = lambda plane: [Box(0, 0, 8, 8)] if plane[0, 0] > 200 else []
pixels = PixelCleaner(Profile(), find=find, spool=folder)
engine = Engine(Profile(), SiteKey(bytes(32)), pixels=pixels)
with BoundedFile(source, 2**29) as stream:
    before = peak()
    cleaned = engine.clean_stream(stream)
path = save(cleaned, folder)
print(peak() - before, path.name, cleaned.dataset.file_meta.TransferSyntaxUID)
"""


def long_film(film: Film, compressed: bool, marked: bool) -> FileDataset:
    """A run of 250 MiB, with something in a corner of its last frame."""
    plain = hill(SIDE, 150).astype(np.uint8)
    last = plain.copy()
    last[:8, :8] = 255 if marked else last[:8, :8]
    made = film(plain, NumberOfFrames=FRAMES)
    if compressed:
        coded, ending = (jpeg(one, format="JPEG", quality=95) for one in (plain, last))
        made.PixelData = encapsulate([coded] * (FRAMES - 1) + [ending])
        made.file_meta.TransferSyntaxUID = JPEGBaseline8Bit
    else:
        made.PixelData = plain.tobytes() * (FRAMES - 1) + last.tobytes()
    made["PixelData"].VR = "OB"
    made["PixelData"].is_undefined_length = compressed
    return made


@pytest.mark.parametrize(
    ("compressed", "marked"),
    [
        (True, True),
        pytest.param(False, True, marks=pytest.mark.slow),
        pytest.param(True, False, marks=pytest.mark.slow),
    ],
)
def test_memory_is_that_of_a_frame_however_many_there_are(
    film: Film, tmp_path: Path, compressed: bool, marked: bool
) -> None:
    source, folder = tmp_path / "long.dcm", tmp_path / "clean"
    folder.mkdir()
    long_film(film, compressed, marked).save_as(source, enforce_file_format=True)

    done = subprocess.run(
        [sys.executable, "-c", CHILD, source, folder],
        capture_output=True, text=True, check=True, timeout=300,
    )  # fmt: skip

    taken, name, syntax = done.stdout.split()
    assert int(taken) < 2**26 < FRAMES * SIDE**2
    assert [path.name for path in folder.iterdir()] == [name]
    again = dcmread(folder / name)
    assert syntax == (JPEGBaseline8Bit if compressed and not marked else ExplicitVRLittleEndian)
    for number in (0, FRAMES - 1):
        frame = pixel_array(folder / name, index=number).astype(np.int16)
        assert np.abs(frame - hill(SIDE, 150).astype(np.uint8))[16:, 16:].max() <= 8
        assert frame[:8, :8].max() < 100
    assert again.NumberOfFrames == FRAMES


def test_a_large_file_is_refused_where_nothing_can_be_put_aside(
    film: Film, tmp_path: Path, engine: Any, but: Any, as_bytes: Any
) -> None:
    large = film(np.zeros((4200, 4200), dtype=np.uint8))
    nowhere = but(engine, spool=tmp_path / "missing")

    with pytest.raises(IntakeError, match="cannot be put aside on the disk"):
        nowhere.clean_stream(BytesIO(as_bytes(large)))
