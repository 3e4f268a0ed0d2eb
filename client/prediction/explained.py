"""What moved an answer, as a picture beside the image: `common.explanation`, drawn."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from client.prediction.answering import Drawn, Model, Pictures
from common.errors import ConfigError
from common.explanation import decided, explain, explains, scaled
from common.tasks import pictures
from common.tasks.answers import Answer


def explainer(model: Model) -> Pictures:
    """What explains the answers of this model: the class that each says most for.

    Raises:
        ConfigError: if nothing explains what its network gives.
    """
    spec = model.package.spec
    if not explains(spec):
        raise ConfigError(f"--explain: answers of {spec.task.name} cannot be explained")

    def drawn(images: NDArray[np.float32], answers: Sequence[Answer]) -> list[Drawn | None]:
        rows = [row for row, answer in enumerate(answers) if answer.finite]
        found: list[Drawn | None] = [None] * len(answers)
        if not rows:
            return found
        classes = [decided(answers[row], spec) for row in rows]
        explained = explain(model.network, spec, images[rows], classes)
        levels = pictures.grey_levels(images[rows])
        maps = [scaled(each.maps) for each in explained.values()]
        for place, (row, number) in enumerate(zip(rows, classes, strict=True)):
            picture = pictures.beside(
                [
                    pictures.canvas(levels[place]),
                    *(pictures.overlaid(levels[place], each[place]) for each in maps),
                ]
            )
            found[row] = Drawn(_png(picture), spec.task.classes[number], tuple(explained))
        return found

    return drawn


def _png(picture: NDArray[np.uint8]) -> bytes:
    content = io.BytesIO()
    Image.fromarray(picture).save(content, "PNG")
    return content.getvalue()
