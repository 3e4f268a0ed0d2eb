"""A contact sheet: a few of a cohort's images side by side, for a person's eyes."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from common.cohort import Cohort
from common.errors import CohortError

_GAP = 4
_SHORTEST = 96
_FLAT = 3  # numbers in the shape of an image


def write_sheet(cohort: Cohort, file: Path, *, columns: int = 8, rows: int = 4) -> int:
    """Write a PNG of up to columns x rows images, evenly spread over the cohort.

    Of a volume it shows the slice in the middle.

    It shows patients' images, so only its owner may read it (mode 0600).

    Returns:
        How many images are on it.

    Raises:
        CohortError: if the cohort is empty, or the file exists or cannot be written.
    """
    if not len(cohort):
        raise CohortError(f"{cohort.path}: is empty; there is nothing to put on a sheet")
    count = min(columns * rows, len(cohort))
    chosen = np.linspace(0, len(cohort) - 1, count).round().astype(np.int64)
    shown = np.stack([_shown(cohort.images([int(row)])[0]) for row in chosen])
    sheet = Image.fromarray(_tiled(shown, columns))
    try:
        descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "wb") as stream:
            sheet.save(stream, format="PNG")
    except OSError as error:
        raise CohortError(f"{file}: cannot be written ({error})") from error
    return count


def _shown(image: NDArray[np.float32]) -> NDArray[np.float32]:
    """(channels, height, width) of an image or of a volume."""
    return image if image.ndim == _FLAT else image[:, image.shape[1] // 2]


def _tiled(images: NDArray[np.float32], columns: int) -> NDArray[np.uint8]:
    """(n, channels, height, width) in 0..1 as one grey or RGB picture, small images enlarged."""
    enlarge = max(1, -(-_SHORTEST // images.shape[-1]))
    tiles = np.rint(images * 255).astype(np.uint8).transpose(0, 2, 3, 1)
    tiles = tiles.repeat(enlarge, axis=1).repeat(enlarge, axis=2)
    count, height, width, channels = tiles.shape
    columns = min(columns, count)
    step_down, step_right = height + _GAP, width + _GAP
    size = (-(-count // columns) * step_down - _GAP, columns * step_right - _GAP, channels)
    canvas = np.full(size, 64, dtype=np.uint8)
    for number, tile in enumerate(tiles):
        top, left = number // columns * step_down, number % columns * step_right
        canvas[top : top + height, left : left + width] = tile
    return canvas.squeeze(-1) if channels == 1 else canvas
