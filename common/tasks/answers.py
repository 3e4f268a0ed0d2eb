"""What a network says of one image, when nobody knows what is true: for `cloister predict`."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, eq=False)
class Answer:
    """One image's answer, in the geometry of the run's input; what a task does not give is None.

    Attributes:
        finite: whether the network's outputs were numbers; if not, there is nothing else.
        probabilities: (classes,) float32, not calibrated; binary: 1 - p, then p.
        mask: (height, width) uint16, of a volume (depth, height, width): the number of each
            pixel's class.
        boxes: (boxes, 6) float32, the most certain first: left, top, right and bottom in parts of
            the sides, the class, and the certainty; those above the run's threshold.
        anomaly: how badly the image was given back, for one of what needs no training
            (`common.tasks.reconstruction`); the larger, the less usual.
    """

    finite: bool
    probabilities: NDArray[np.float32] | None = None
    mask: NDArray[np.uint16] | None = None
    boxes: NDArray[np.float32] | None = None
    anomaly: float | None = None
