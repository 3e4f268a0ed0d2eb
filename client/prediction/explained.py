"""What moved an answer, as a picture beside the image: `common.explanation`, drawn."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin

from client.prediction.answering import Drawn, Likeness, Model
from client.prediction.rows import WARNING
from common import explanation
from common.errors import ConfigError, ModelError
from common.explanation import Explanation, Similarity, decided, explain, explains, scaled
from common.tasks import pictures
from common.tasks.answers import Answer

# As in `common.tasks.explained`: what torch and captum raise, such as for lack of memory.
_FAILURES = (ModelError, RuntimeError, ValueError, AssertionError, MemoryError)
_NOT_COMPARED = "not known: it could not be compared with that of random weights"
_FONT, _FONTS = 14, 60  # pixels a letter is high; a wide picture's letters are a part of its width
_EXAMINED = 8  # images whose maps are compared with those of random weights


class Explainer:
    """Explains a model's answers: of each the class that it says most for.

    Attributes:
        compared: how many images have been compared with what random weights give.

    Raises:
        ConfigError: if nothing explains what the model's network gives.
    """

    def __init__(self, model: Model) -> None:
        self.compared = 0
        self._model, self._spec = model, model.package.spec
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
            self._tried(image[None], answer, patient)[0] if answer.finite else None
            for image, answer, patient in zip(images, answers, patients, strict=True)
        ]

    def of_study(
        self, images: NDArray[np.float32], answer: Answer, patient: str
    ) -> list[Drawn | None]:
        """See `client.prediction.answering.Pictures`."""
        return self._tried(images, answer, patient)

    def examined(self, likeness: Sequence[Likeness]) -> Mapping[str, Any]:
        """By method, whether its maps depend on what was learned, on the first images.

        The intervals are over patients, of whom several images may be.
        """
        methods = list(dict.fromkeys(method for one in likeness for method in one["methods"]))
        if any(like is None for one in likeness for like in one["methods"].values()):
            return {method: {"map": _NOT_COMPARED} for method in methods}
        people = np.unique([one["patient"] for one in likeness], return_inverse=True)[1]
        count = int(people.max(initial=-1)) + 1
        said = {}
        for method in methods:
            pairs = np.array([one["methods"][method] for one in likeness], dtype=np.float32)
            figures = explanation.estimated(Similarity(*pairs.T), self._spec, people)
            said[method] = {
                "map": explanation.verdict(figures["rank"], count),
                "images": len(likeness),
                "patients": count,
                "rank_correlation_with_random_weights": figures["rank"].to_json(),
                "ssim_with_random_weights": figures["ssim"].to_json(),
            }
        return said

    def _tried(
        self, images: NDArray[np.float32], answer: Answer, patient: str
    ) -> list[Drawn | None]:
        try:
            return [*self._drawn(images, answer, patient)]
        except _FAILURES:
            return [None] * len(images)

    def _drawn(self, images: NDArray[np.float32], answer: Answer, patient: str) -> Iterator[Drawn]:
        """Of one image, or of the images of a study that is explained as one."""
        number = decided(answer, self._spec)
        asked = images[None] if self._spec.input.of_studies else images
        found = explain(self._model.network, self._spec, asked, [number])
        likeness = self._likeness(asked, number, found, patient)
        name = self._spec.task.classes[number]
        said = _caption(number, name, [*found])
        maps = {method: scaled(each.maps) for method, each in found.items()}
        for place, levels in enumerate(pictures.grey_levels(images)):
            overlaid = [pictures.overlaid(levels, each[place]) for each in maps.values()]
            picture = pictures.beside([pictures.canvas(levels), *overlaid])
            like = likeness[place] if place < len(likeness) else None
            png = _png(_captioned(picture, said), said, self._model.package.model_sha256)
            yield Drawn(png, name, tuple(found), like)

    def _likeness(
        self,
        asked: NDArray[np.float32],
        number: int,
        found: Mapping[str, Explanation],
        patient: str,
    ) -> list[Likeness]:
        """Of each image, as long as there are too few; None by a method where it is not known."""
        if self.compared >= _EXAMINED:
            return []
        count = len(next(iter(found.values())).maps)
        methods: list[dict[str, list[float] | None]] = [dict.fromkeys(found) for _ in range(count)]
        try:
            like = explanation.dependence(found, self._spec, asked, [number], self.compared)
        except _FAILURES:
            like = {}
        for method, (ranks, ssims) in like.items():
            for each, rank, ssim in zip(methods, ranks, ssims, strict=True):
                each[method] = [float(rank), float(ssim)]
        self.compared += count
        return [{"patient": patient, "methods": each} for each in methods]


def _caption(number: int, name: str, methods: Sequence[str]) -> str:
    """What must be known of a picture, for it is shown without its folder; it names no patient.

    The class has its number, too: the font has not the letters of every name.
    """
    columns = ", ".join(["the image", *(explanation.TITLES[method] for method in methods)])
    return (
        f"What moved the answer, for class {number}: {name}\n"
        f"From left to right: {columns}. Orange speaks for the class, blue against it; each map "
        f"has its own scale.\n{WARNING}."
    )


def _captioned(picture: NDArray[np.uint8], said: str) -> Image.Image:
    """A picture, (H, W, 3), with words beneath it, in lines as long as it is wide."""
    tall, wide, _ = picture.shape
    high = max(_FONT, wide // _FONTS)
    font = ImageFont.load_default(high)
    letters = max(_FONTS, int(wide / font.getlength("n")))
    text = "\n".join(textwrap.fill(line, letters) for line in said.split("\n"))
    ruler = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    _, _, right, bottom = map(int, ruler.multiline_textbbox((0, 0), text, font))
    margin = high // 2
    sides = (max(wide, right + 2 * margin), tall + bottom + 2 * margin)
    made = Image.new("RGB", sides, "white")
    made.paste(Image.fromarray(picture))
    ImageDraw.Draw(made).multiline_text((margin, tall + margin), text, "black", font)
    return made


def _png(picture: Image.Image, said: str, model: str) -> bytes:
    """In a file that says the same in words, and of which model it is."""
    words = PngImagePlugin.PngInfo()
    words.add_itxt("Description", said)
    words.add_itxt("Model SHA-256", model)
    content = io.BytesIO()
    picture.save(content, "PNG", pnginfo=words)
    return content.getvalue()
