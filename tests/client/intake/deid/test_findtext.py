"""The detector of text: drawn lines of many sizes and greys are found, and clean images are not."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from scipy import ndimage

from client.intake.deid.findtext import find_text

WORDS = ("MUSTERMANN^ERIKA", "Doe, John 62Y", "DOB 12.08.1964", "ID: 4711-0815", "22/11/2026")
SIDE = 384


def backgrounds() -> Iterator[tuple[str, NDArray[np.int16]]]:
    """Clean images: anatomy-like shapes, smooth and textured, with noise and with hard edges."""
    random = np.random.default_rng(1)
    y, x = np.mgrid[-1 : 1 : SIDE * 1j, -1 : 1 : SIDE * 1j]
    body = 1500 * (x**2 / 0.6 + y**2 < 0.8)
    yield "body", body.astype(np.int16)
    yield "ramp", (1000 * (x + y)).astype(np.int16)
    ribs = body + 500 * (np.sin(24 * y + 4 * x) > 0.7) * (body > 0)
    yield "ribs", ndimage.gaussian_filter(ribs, 2).astype(np.int16)
    noise = random.normal(0, 60, (SIDE, SIDE))
    yield "noisy body", (body + noise).astype(np.int16)
    bones = ndimage.gaussian_filter(random.normal(0, 1, (SIDE, SIDE)), 2) * 2500
    yield "trabeculae", (body + bones * (body > 0)).astype(np.int16)
    yield "noise", (10 * noise).astype(np.int16)
    grid = np.zeros((SIDE, SIDE), dtype=np.int16)
    grid[::48] = grid[:, ::48] = 900
    yield "grid", grid
    yield "flat", np.full((SIDE, SIDE), 7, dtype=np.int16)


CLEAN = dict(backgrounds())


@pytest.mark.parametrize("name", CLEAN)
def test_a_clean_image_is_left_alone(name: str) -> None:
    assert find_text(CLEAN[name]) == []


def drawn(image: NDArray[Any], random: np.random.Generator) -> Iterator[tuple[NDArray[Any], Any]]:
    """The image with one line of text at a time, and where its letters are."""
    values = (int(image.max()) + 400, int(image.max()) + 300, int(image.min()) - 400)
    for size in range(10, 37, 4):
        word, value = WORDS[size % len(WORDS)], values[size // 4 % 3]
        font = ImageFont.load_default(size)
        _, _, right, bottom = map(int, font.getbbox(word))
        layer = Image.new("L", (SIDE, SIDE))
        place = random.integers(0, (SIDE - right, SIDE - bottom))
        ImageDraw.Draw(layer).text((int(place[0]), int(place[1])), word, font=font, fill=255)
        part = np.asarray(layer) / 255
        yield (image * (1 - part) + value * part).astype(image.dtype), part > 0.5


def test_at_least_nine_of_ten_single_lines_are_found() -> None:
    random, found = np.random.default_rng(2), []
    for name in ("body", "ramp", "ribs", "noisy body"):
        for image, letters in drawn(CLEAN[name], random):
            covered = np.zeros(image.shape, dtype=np.bool_)
            for box in find_text(image):
                covered[box.top : box.bottom, box.left : box.right] = True
            found.append(covered[letters].mean() >= 0.8)

    assert len(found) == 28
    assert np.mean(found) >= 0.9


def test_boxes_are_boxes_and_not_the_image() -> None:
    layer = Image.new("L", (SIDE, SIDE))
    ImageDraw.Draw(layer).text((40, 50), WORDS[0], font=ImageFont.load_default(20), fill=255)

    (box,) = find_text(np.asarray(layer))

    assert 30 <= box.top <= 50
    assert 70 <= box.bottom <= 90
    assert 10 <= box.left <= 40
    assert 200 <= box.right <= 300


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_are_no_numbers(value: float) -> None:
    image = CLEAN["body"].astype(np.float32)
    image[5:9, 5:9] = value

    assert find_text(image) == []


def test_an_image_too_small_for_text() -> None:
    assert find_text(np.arange(400).reshape(20, 20)) == []
