"""What moved an answer, as a picture beside the image: `common.explanation`, drawn."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from client.prediction.answering import Drawn, Model
from common import explanation
from common.errors import ConfigError
from common.explanation import Explanation, decided, explain, explains, scaled
from common.tasks import pictures
from common.tasks.answers import Answer

_EXAMINED = 8  # images whose maps are compared with those of random weights


class Explainer:
    """Explains a model's answers: of each the class that it says most for.

    Raises:
        ConfigError: if nothing explains what the model's network gives.
    """

    def __init__(self, model: Model) -> None:
        self._model, self._spec = model, model.package.spec
        self._kept: list[tuple[NDArray[np.float32], int, dict[str, Explanation]]] = []
        if not explains(self._spec):
            raise ConfigError(
                f"--explain: answers of {self._spec.task.name} by {self._spec.model.name} on such "
                "images cannot be explained; leave it out"
            )

    def __call__(
        self, images: NDArray[np.float32], answers: Sequence[Answer]
    ) -> list[Drawn | None]:
        """See `client.prediction.answering.Pictures`."""
        return [
            self._drawn(image, answer) if answer.finite else None
            for image, answer in zip(images, answers, strict=True)
        ]

    def examined(self) -> Mapping[str, Any]:
        """By method, whether its maps depend on what was learned, on the first images.

        The intervals are over images, which are taken as they came.
        """
        if not self._kept:
            return {}
        images, classes = np.stack([k[0] for k in self._kept]), [k[1] for k in self._kept]
        found = {
            method: Explanation(np.concatenate([k[2][method].maps for k in self._kept]))
            for method in self._kept[0][2]
        }
        said = {}
        for method, like in explanation.dependence(found, self._spec, images, classes).items():
            figures = explanation.estimated(like, self._spec, np.arange(len(images)))
            said[method] = {
                "map": explanation.verdict(figures["rank"], len(images)),
                "images": len(images),
                "rank_correlation_with_random_weights": figures["rank"].to_json(),
                "ssim_with_random_weights": figures["ssim"].to_json(),
            }
        return said

    def _drawn(self, image: NDArray[np.float32], answer: Answer) -> Drawn:
        number = decided(answer, self._spec)
        found = explain(self._model.network, self._spec, image[None], [number])
        if len(self._kept) < _EXAMINED:
            self._kept.append((image, number, found))
        (levels,) = pictures.grey_levels(image[None])
        maps = [pictures.overlaid(levels, scaled(each.maps)[0]) for each in found.values()]
        picture = pictures.beside([pictures.canvas(levels), *maps])
        return Drawn(_png(picture), self._spec.task.classes[number], tuple(found))


def _png(picture: NDArray[np.uint8]) -> bytes:
    content = io.BytesIO()
    Image.fromarray(picture).save(content, "PNG")
    return content.getvalue()
