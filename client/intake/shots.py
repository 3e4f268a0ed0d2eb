"""Pictures for the eyes of the person who reviews; patient data, so they are only ever sealed."""

from __future__ import annotations

from io import BytesIO

import numpy as np
from PIL import Image

from client.intake.decision import LONGEST, Shot
from client.intake.deid.burned_in import Box
from client.intake.pixels import Floats


def shot(frame: int, before: Floats, after: Floats | None, boxes: tuple[Box, ...]) -> Shot:
    """A picture of one frame, and of what is kept of it.

    Args:
        frame: its number, from 0.
        before: brightness in 0..1, (height, width) or (height, width, 3), as it came.
        after: the same of what is kept; None where nothing is.
        boxes: in the frame's own rows and columns.
    """
    rows, columns = before.shape[:2]
    kept = b"" if after is None else _png(after)
    return Shot(frame, _png(before), kept, boxes, rows, columns)


def _png(pixels: Floats) -> bytes:
    picture = Image.fromarray(np.rint(pixels * 255).astype(np.uint8))
    picture.thumbnail((LONGEST, LONGEST))
    file = BytesIO()
    picture.save(file, format="PNG", compress_level=1)
    return file.getvalue()
