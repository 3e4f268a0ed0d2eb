"""Pictures of an evaluation, drawn on plain arrays: what is true and what was found, on the image.

Truth is a whole line in blue, what was found a broken one in orange: the two differ in form as
well as in colour, and where they lie upon each other both are seen. The colours are Okabe and
Ito's, which people with colour blindness tell apart. Where there are several classes, each thing
has the number of its own beside it: above it that of a true one, below it that of a found one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

TRUE = (86, 180, 233)
FOUND = (230, 159, 0)

SMALLEST_SHOWN = 256  # a smaller image is enlarged, so that a line is thinner than what it bounds
_DASH = 6
_GAP = 4
_STRONGEST = 0.8  # of a map over an image, which must still be seen
_DOT = 2  # pixels of a picture for a dot of a number
_DIGITS = tuple(  # 3 x 5 dots each, 0 to 9
    np.array([dot == "1" for dot in dots]).reshape(5, 3)
    for dots in (
        "111101101101111",
        "010110010010111",
        "111001111100111",
        "111001111001111",
        "101101111001001",
        "111100111001111",
        "111100111101111",
        "111001010010010",
        "111101111101111",
        "111101111001111",
    )
)
_THIN = 400  # pixels of a picture's side for each pixel that a line is widened by

Pixels = NDArray[np.uint8]
Mask = NDArray[np.bool_]


def spread(images: int, wanted: int) -> NDArray[np.int64]:
    """Numbers of at most `wanted` images, evenly spread: neighbours are slices of one patient."""
    shown = min(images, wanted)
    return (np.arange(shown) * images + images // 2) // max(1, shown)


def grey_levels(images: NDArray[Any]) -> Pixels:
    """(N, C, H, W) brightness in 0..1 to (N, C, H, W) grey levels, as a gallery keeps them."""
    return np.asarray(np.rint(np.clip(np.nan_to_num(images), 0, 1) * 255), dtype=np.uint8)


def enlargement(height: int, width: int) -> int:
    """How many times an image is enlarged to be shown."""
    return max(1, -(-SMALLEST_SHOWN // max(height, width)))


def canvas(levels: Pixels) -> Pixels:
    """(C, H, W) grey levels, one channel or three, to an enlarged (H', W', 3) picture."""
    colours = np.broadcast_to(levels, (3, *levels.shape[1:])).transpose(1, 2, 0)
    return np.ascontiguousarray(enlarged(colours, enlargement(*levels.shape[1:])))


def overlaid(levels: Pixels, values: NDArray[Any]) -> Pixels:
    """`canvas` with (H, W) values in -1..1 over it: above 0 orange, below it blue, 0 unchanged."""
    picture = canvas(levels)
    over = enlarged(values, enlargement(*values.shape))[..., None]
    colours = np.where(over > 0, FOUND, TRUE)
    strength = _STRONGEST * np.abs(over)
    return np.asarray(np.rint(picture + strength * (colours - picture)), dtype=np.uint8)


def beside(drawn: Sequence[Pixels]) -> Pixels:
    """Pictures of one height in one row, (H, W, 3), with a white gap between them."""
    gap = np.full((len(drawn[0]), _GAP, 3), 255, dtype=np.uint8)
    joined = [part for picture in drawn for part in (picture, gap)][:-1]
    return np.concatenate(joined, axis=1)


def enlarged(pixels: NDArray[Any], times: int) -> NDArray[Any]:
    """(H, W, …), each pixel repeated `times` in both directions."""
    return pixels.repeat(times, axis=0).repeat(times, axis=1)


def legend(names: Sequence[str]) -> str:
    """How a picture of `compared` is to be read, of things of these classes."""
    numbers = ", ".join(f"{number} {name}" for number, name in enumerate(names, start=1))
    said = "True: the whole blue line. Found: the broken orange one."
    return f"{said} {numbers}." if len(names) > 1 else said


class Shapes(NamedTuple):
    """Things on a picture: their lines, and of each its class, from 1, and where it lies."""

    lines: Mask
    things: Sequence[tuple[int, tuple[slice, slice]]]


def outlined(classes: NDArray[Any]) -> Shapes:
    """(H, W) class numbers, 0 the background: each class is a thing."""
    places = enumerate(ndimage.find_objects(classes.astype(np.int64)), start=1)
    return Shapes(outline(classes), [(n, place) for n, place in places if place is not None])


def framed(boxes: NDArray[Any], height: int, width: int) -> Shapes:
    """Boxes, a row ``x0 y0 x1 y1 class`` each, in parts of the sides of a picture of that size."""
    borders = [frame(box[:4], height, width) for box in boxes]
    places = [ndimage.find_objects(border.astype(np.int64))[0] for border in borders]
    lines = np.any([np.zeros((height, width), dtype=np.bool_), *borders], axis=0)
    return Shapes(lines, [(int(box[4]) + 1, p) for box, p in zip(boxes, places, strict=True)])


def compared(picture: Pixels, true: Shapes, found: Shapes, classes: int) -> Pixels:
    """Draw what is true and what was found into a `canvas`, numbers where there are classes."""
    draw_true(picture, true.lines)
    draw_found(picture, found.lines)
    if classes > 1:
        for number, (down, right) in true.things:
            dots = _written(number)
            _write(picture, dots, TRUE, down.start - len(dots), right.start)
        for number, (down, right) in found.things:
            dots = _written(number)
            _write(picture, dots, FOUND, down.stop, right.stop - dots.shape[1])
    return picture


def _write(picture: Pixels, dots: Mask, colour: Sequence[int], row: int, column: int) -> None:
    """A number with a black edge, at a place or as near to it as the picture allows."""
    dots = dots[: picture.shape[0], : picture.shape[1]]
    tall, wide = dots.shape
    row = min(max(0, row), picture.shape[0] - tall)
    column = min(max(0, column), picture.shape[1] - wide)
    place = picture[row : row + tall, column : column + wide]
    place[ndimage.binary_dilation(dots, np.ones((3, 3)))] = 0
    place[dots] = colour


def _written(number: int) -> Mask:
    digits = [np.pad(_DIGITS[int(digit)], ((0, 0), (0, 1))) for digit in str(number)]
    return np.pad(enlarged(np.concatenate(digits, axis=1), _DOT)[:, :-_DOT], 1)


def outline(classes: NDArray[Any]) -> Mask:
    """(H, W) class numbers, 0 the background: the pixels of a class that touch another one."""
    around = np.pad(classes, 1, mode="edge")
    neighbours = (around[:-2, 1:-1], around[2:, 1:-1], around[1:-1, :-2], around[1:-1, 2:])
    differs = np.any([other != classes for other in neighbours], axis=0)
    return np.asarray((classes > 0) & differs)


def frame(box: NDArray[Any], height: int, width: int) -> Mask:
    """The border of a box ``x0 y0 x1 y1`` in parts of the sides, on a picture of that size."""
    x0, y0, x1, y1 = np.rint(box * [width, height, width, height]).astype(int)
    left, right = sorted(np.clip([x0, x1 - 1], 0, width - 1))
    top, bottom = sorted(np.clip([y0, y1 - 1], 0, height - 1))
    border = np.zeros((height, width), dtype=np.bool_)
    border[[top, bottom], left : right + 1] = True
    border[top : bottom + 1, [left, right]] = True
    return border


def draw_true(picture: Pixels, lines: Mask) -> None:
    """Draw a whole line into `picture`."""
    picture[_widened(lines)] = TRUE


def draw_found(picture: Pixels, lines: Mask) -> None:
    """Draw a broken line into `picture`."""
    rows, columns = np.indices(lines.shape)
    picture[_widened(lines) & ((rows + columns) // _DASH % 2 == 0)] = FOUND


def _widened(lines: Mask) -> Mask:
    """Lines that are still seen when the picture is shown small."""
    wide = ndimage.binary_dilation(lines, iterations=max(1, max(lines.shape) // _THIN))
    return np.asarray(wide, dtype=np.bool_)
