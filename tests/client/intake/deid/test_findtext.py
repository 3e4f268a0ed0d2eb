"""The detector of text: drawn lines of many sizes and greys are found, and clean images are not."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from matplotlib import font_manager
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
    spine = np.zeros((SIDE, SIDE))
    for top in range(10, SIDE - 24, 25):
        spine[top : top + 20, 170 + top // 20 : 205 + top // 20] = 900
    yield "spine", ndimage.gaussian_filter(spine, 2).astype(np.int16)


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


KINDS = {
    "light": 0.95,
    "dark": 0.9,
    "of any grey": 0.85,
    "hard-edged and 6 pixels high": 0.85,
    "large": 0.75,
    "read upwards": 0.9,
    "read downwards": 0.95,
    "upside down": 0.85,
    "at the border": 0.95,
    "on a plate": 0.95,
    "with an outline": 0.95,
    "blurred": 0.75,
}
"""How text is drawn, and which part of such lines has to be found."""
TURNS = {"read upwards": 1, "upside down": 2, "read downwards": 3}
SIZES = {"large": (40, 52), "hard-edged and 6 pixels high": (9, 12)}
FONTS = ("DejaVu Sans", "DejaVu Sans Mono", "DejaVu Serif", "STIXGeneral")


def letters(random: np.random.Generator, kind: str) -> NDArray[np.float64]:
    """How much of each pixel one line covers."""
    size = int(random.integers(*SIZES.get(kind, (13, 32))))
    font = ImageFont.truetype(font_manager.findfont(str(random.choice(FONTS))), size)
    word = str(random.choice(WORDS))[: 9 if kind == "large" else None]
    left, top, right, bottom = map(int, font.getbbox(word))
    line = Image.new("L", (right - left + 2, bottom - top + 2))
    ImageDraw.Draw(line).text((1 - left, 1 - top), word, font=font, fill=255)
    drawn = np.rot90(np.asarray(line) / 255, TURNS.get(kind, 0))
    room = [SIDE - side for side in drawn.shape]
    y, x = (int(random.integers(0, most)) for most in room)
    if kind == "at the border":
        y = int(random.choice([0, room[0]]))
    part = np.zeros((SIDE, SIDE))
    part[y : y + drawn.shape[0], x : x + drawn.shape[1]] = drawn
    return part


def marked(
    ground: NDArray[np.int16], random: np.random.Generator, kind: str
) -> tuple[NDArray[np.int16], NDArray[np.bool_]]:
    """An image with one line of a kind, and where its letters are."""
    part, image = letters(random, kind), ground.astype(np.float64)
    low, high = float(ground.min()), float(ground.max())
    value, near = high + 0.2 * (high - low), part > 0
    if kind == "dark":
        value = low - 0.2 * (high - low)
    elif kind == "of any grey":
        under = np.median(image[part > 0.5])
        greys = np.linspace(low, high, 50)
        value = float(random.choice(greys[abs(greys - under) > (high - low) / 3]))
    elif kind == "on a plate":
        y, x = np.nonzero(near)
        image[max(0, y.min() - 4) : y.max() + 4, max(0, x.min() - 4) : x.max() + 4] = low
    elif kind == "with an outline":
        image[ndimage.binary_dilation(near)] = low
    elif kind == "blurred":
        part = ndimage.gaussian_filter(part, 0.7)
    elif kind in SIZES:
        part = np.rint(part)
    return (image * (1 - part) + value * part).astype(np.int16), part > 0.5


def covered(image: NDArray[np.int16], where: NDArray[np.bool_]) -> bool:
    """Whether boxes cover four fifths of the letters, and not everything."""
    found = np.zeros(image.shape, dtype=np.bool_)
    for box in find_text(image):
        found[box.top : box.bottom, box.left : box.right] = True
    return bool(found[where].mean() >= 0.8 and found.mean() < 0.5)


@pytest.mark.parametrize("kind", KINDS)
def test_lines_of_every_kind_are_found(kind: str) -> None:
    random = np.random.default_rng(7)
    grounds = [CLEAN[name] for name in ("body", "ramp", "ribs", "noisy body")] * 5

    found = [covered(*marked(ground, random, kind)) for ground in grounds]

    assert np.mean(found) >= KINDS[kind]


def test_of_lines_on_texture_most_are_found() -> None:
    random = np.random.default_rng(8)

    found = [covered(*marked(CLEAN["trabeculae"], random, kind)) for kind in list(KINDS) * 3]

    assert np.mean(found) >= 0.8


def test_of_several_lines_side_by_side_each_has_a_box_of_its_own() -> None:
    """Letters that stand below each other are no upright lines."""
    layer = Image.new("L", (SIDE, SIDE))
    for row in range(6):
        text = ("ERIKA 4711", "DOB 12.08.1964")[row % 2]
        font = ImageFont.truetype(font_manager.findfont("DejaVu Sans Mono"), 16)
        ImageDraw.Draw(layer).text((20, 20 + 60 * row), text, font=font, fill=255)

    boxes = find_text(np.asarray(layer))

    assert len(boxes) == 6
    assert all(box.bottom - box.top < 40 for box in boxes)


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
