"""What moved an answer, as a picture beside the image: `common.explanation`, drawn."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from client.prediction.answering import Drawn, Model
from common import explanation
from common.errors import ConfigError, ModelError
from common.explanation import Explanation, decided, explain, explains, scaled
from common.tasks import pictures
from common.tasks.answers import Answer

# As in `common.tasks.explained`: what torch and captum raise, such as for lack of memory.
_FAILURES = (ModelError, RuntimeError, ValueError, AssertionError, MemoryError)
_NOT_COMPARED = "not known: it could not be compared with that of random weights"
_EXAMINED = 8  # images whose maps are compared with those of random weights


class _Kept(NamedTuple):
    """An image whose maps are compared with those of random weights."""

    image: NDArray[np.float32]
    number: int
    patient: str
    found: dict[str, Explanation]


class Explainer:
    """Explains a model's answers: of each the class that it says most for.

    Raises:
        ConfigError: if nothing explains what the model's network gives.
    """

    def __init__(self, model: Model) -> None:
        self._model, self._spec = model, model.package.spec
        self._kept: list[_Kept] = []
        if not explains(self._spec):
            raise ConfigError(
                f"--explain: answers of {self._spec.task.name} by {self._spec.model.name} on such "
                "images cannot be explained; leave it out"
            )

    def __call__(
        self, images: NDArray[np.float32], answers: Sequence[Answer], patients: Sequence[str]
    ) -> list[Drawn | None]:
        """See `client.prediction.answering.Pictures`."""
        return [
            self._tried(image, answer, patient) if answer.finite else None
            for image, answer, patient in zip(images, answers, patients, strict=True)
        ]

    def examined(self) -> Mapping[str, Any]:
        """By method, whether its maps depend on what was learned, on the first images.

        The intervals are over patients, of whom several images may be.
        """
        if not self._kept:
            return {}
        try:
            return self._compared()
        except _FAILURES:
            return {method: {"map": _NOT_COMPARED} for method in self._kept[0].found}

    def _compared(self) -> dict[str, Any]:
        images, classes = np.stack([k.image for k in self._kept]), [k.number for k in self._kept]
        people = np.unique([k.patient for k in self._kept], return_inverse=True)[1]
        count = int(people.max()) + 1
        found = {
            method: Explanation(np.concatenate([k.found[method].maps for k in self._kept]))
            for method in self._kept[0].found
        }
        said = {}
        for method, like in explanation.dependence(found, self._spec, images, classes).items():
            figures = explanation.estimated(like, self._spec, people)
            said[method] = {
                "map": explanation.verdict(figures["rank"], count),
                "images": len(images),
                "patients": count,
                "rank_correlation_with_random_weights": figures["rank"].to_json(),
                "ssim_with_random_weights": figures["ssim"].to_json(),
            }
        return said

    def _tried(self, image: NDArray[np.float32], answer: Answer, patient: str) -> Drawn | None:
        try:
            return self._drawn(image, answer, patient)
        except _FAILURES:
            return None

    def _drawn(self, image: NDArray[np.float32], answer: Answer, patient: str) -> Drawn:
        number = decided(answer, self._spec)
        found = explain(self._model.network, self._spec, image[None], [number])
        if len(self._kept) < _EXAMINED:
            self._kept.append(_Kept(image, number, patient, found))
        (levels,) = pictures.grey_levels(image[None])
        maps = [pictures.overlaid(levels, scaled(each.maps)[0]) for each in found.values()]
        picture = pictures.beside([pictures.canvas(levels), *maps])
        return Drawn(_png(picture), self._spec.task.classes[number], tuple(found))


def _png(picture: NDArray[np.uint8]) -> bytes:
    content = io.BytesIO()
    Image.fromarray(picture).save(content, "PNG")
    return content.getvalue()
