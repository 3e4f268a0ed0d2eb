"""Overlays: gone by default; under Clean Graphics their bitmap without lines of text."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from pydicom.dataset import FileDataset
from pydicom.uid import ExplicitVRBigEndian

Film = Callable[..., FileDataset]
Clean = Callable[..., Any]
SIDE = 96


def bitmap(*lines: str) -> NDArray[np.uint8]:
    layer = Image.new("1", (SIDE, SIDE))
    draw = ImageDraw.Draw(layer)
    draw.ellipse((20, 60, 60, 90), outline=1)
    for row, line in enumerate(lines):
        draw.text((4, 4 + 22 * row), line, font=ImageFont.load_default(14), fill=1)
    return np.asarray(layer).astype(np.uint8)


def with_overlay(film: Film, bits: NDArray[np.uint8], group: int = 0x6002) -> FileDataset:
    made = film(np.zeros((SIDE, SIDE), dtype=np.uint16))
    made.add_new((group, 0x0010), "US", bits.shape[0])
    made.add_new((group, 0x0011), "US", bits.shape[1])
    made.add_new((group, 0x0022), "LO", "Mustermann")
    made.add_new((group, 0x0040), "CS", "G")
    made.add_new((group, 0x0050), "SS", [1, 1])
    made.add_new((group, 0x0100), "US", 1)
    made.add_new((group, 0x0102), "US", 0)
    data = np.packbits(bits.ravel(), bitorder="little").tobytes()
    made.add_new((group, 0x3000), "OW", data + b"Mustermann")
    return made


def test_an_overlay_goes_by_default(film: Film, clean: Clean) -> None:
    again = clean(with_overlay(film, bitmap())).again

    assert not [element for element in again if element.tag.group == 0x6002]


def test_a_drawing_of_a_big_endian_file_is_the_same(film: Film, clean: Clean) -> None:
    made = with_overlay(film, bitmap())
    overlay = made[0x6002, 0x3000]
    overlay.value = np.frombuffer(overlay.value, dtype="<u2").byteswap().tobytes()
    made.set_original_encoding(False, False)
    made.file_meta.TransferSyntaxUID = ExplicitVRBigEndian

    result = clean(made, clean_graphics=True)

    np.testing.assert_array_equal(result.again.overlay_array(0x6002), bitmap())


def test_a_drawing_stays_and_its_text_does_not(film: Film, clean: Clean) -> None:
    made = with_overlay(film, bitmap("DOE JOHN", "12.08.1964"))

    result = clean(made, clean_graphics=True)

    np.testing.assert_array_equal(result.again.overlay_array(0x6002), bitmap())
    assert (0x6002, 0x0022) not in result.again
    assert b"Mustermann" not in result.data
    counts = result.cleaned.account.counts
    assert counts["overlays: box blanked", "OverlayData"] >= 1


@pytest.mark.parametrize(
    ("element", "representation", "value"),
    [
        (0x3000, "OW", b"\xff\xff"),
        (0x0102, "US", 12),
        (0x0010, "US", 20),
        (0x0010, "US", 60000),
    ],
)
def test_an_overlay_that_cannot_be_searched_goes(
    film: Film, clean: Clean, element: int, representation: str, value: Any
) -> None:
    made = with_overlay(film, bitmap())
    made.add_new((0x6002, element), representation, value)

    again = clean(made, clean_graphics=True).again

    assert not [found for found in again if found.tag.group == 0x6002]


def test_curves_go_whatever_is_wished(film: Film, clean: Clean) -> None:
    made = film()
    made.add_new((0x5000, 0x2500), "LO", "CHEST")
    made.add_new((0x5000, 0x3000), "OW", b"Mustermann")

    again = clean(made, clean_graphics=True).again

    assert not [found for found in again if found.tag.group == 0x5000]
