"""Synthetic images from a finished run, as pictures and as a cohort.

What it writes is synthetic and says so: the cohort's source and every pseudonym, the text in each
picture, and ``about.json`` beside them, which says as well whether the model's patients were
protected: if not, the images may give them away. A run mixes the cohort in; no intake takes the
pictures for patients'::

    OUT/images/000001.png …    one picture an image, 16 bits deep if grey
    OUT/labels.csv             file and label
    OUT/cohort/                what ``synthetic`` of [data] or [simulation] names
    OUT/about.json             of which run and model it is, and how it was drawn
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import nn

from client.folder import cohort_digest
from client.intake.builder import CohortBuilder, ImageRecord
from client.synthetic import ABOUT, COHORT, PRIVATE, Claim
from common.cohort import PIXEL_MAX, SYNTHETIC, CohortMeta
from common.errors import RunError
from common.files import new_folder, write_durably
from common.package import Package
from common.spec import RunSpec
from common.tasks import task_for
from common.tasks.generation import Drawn, Generation


@dataclass(frozen=True)
class Generator:
    """A trained generator.

    Attributes:
        task: the run's.
        network: in evaluation mode.
        model_sha256: of the run's model file.
        claim: of all patients that it was ever trained on; None: they are not known to be
            protected.
    """

    task: Generation
    network: nn.Module
    model_sha256: str
    claim: Claim | None

    def draw(self, images: int, seed: int) -> Drawn:
        """So many images with their labels; the same seed gives the same ones."""
        return self.task.draw(self.network, images, torch.Generator().manual_seed(seed))


def load_generator(run: Path) -> Generator:
    """The generator of a finished run.

    Raises:
        PackageError: if it is no finished run, or its model is not its network's.
        RunError: if it has another task.
    """
    package = Package.open(run, unsigned=True)  # it is used where it was made
    spec = package.spec
    task = task_for(spec)
    if not isinstance(task, Generation):
        raise RunError(
            f"{run}: its task.name is {spec.task.name!r}, which makes no images; expected a run of "
            "'generation'"
        )
    return Generator(task, package.network(), package.model_sha256, _claim(package))


def _claim(package: Package) -> Claim | None:
    """By its card: a seeded run protects nobody, and what a run began with is not in its card."""
    said = package.card.get("privacy")
    if package.spec.start is not None or not isinstance(said, dict):
        return None
    if said.get("protected") is not True:
        return None
    figures = {"epsilon": said.get("all_sites_epsilon"), "delta": said.get("all_sites_delta")}
    return Claim.of(figures | {"unit": package.spec.privacy.unit})


def write(out: Path, generator: Generator, drawn: Drawn, seed: int) -> None:
    """Write pictures, labels, the cohort and what they are into the new folder `out`.

    It has its name when all of it is there; what ends the work before that leaves nothing.

    Raises:
        ConfigError: if `out` is there.
        RunError: if it cannot be written.
    """
    with new_folder(out) as work:
        _write_parts(work, generator, drawn, seed)


def _write_parts(out: Path, generator: Generator, drawn: Drawn, seed: int) -> None:
    spec = generator.task.spec
    about = {
        "what": "synthetic images; not to be taken for evidence of anything",
        "privacy": _privacy(generator),
        PRIVATE: generator.claim and asdict(generator.claim),
        "run": spec.name,
        "run_digest": spec.digest,
        "model_sha256": generator.model_sha256,
        "seed": seed,
        "images": len(drawn.images),
        "classes": list(spec.task.classes),
    }
    (out / "images").mkdir(mode=0o700)
    names = list(write_pictures(out / "images", drawn, f"{SYNTHETIC}; {spec.name}"))
    write_durably(out / "labels.csv", _label_table(names, drawn, spec))
    write_cohort(out / "cohort", drawn, spec)
    about[COHORT] = cohort_digest(out / "cohort")
    write_durably(out / ABOUT, json.dumps(about, indent=2).encode())


def _privacy(generator: Generator) -> str:
    if generator.claim is not None:
        return f"of a run with differential privacy: {generator.claim}, over all its sites"
    return "of a model that is not known to be protected: they may give patients away; keep them so"


def stored(images: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Brightness in 0..1 as a cohort stores it."""
    return np.rint(np.clip(np.nan_to_num(images), 0, 1) * PIXEL_MAX).astype("<u2")


def write_pictures(folder: Path, drawn: Drawn, text: str) -> Iterator[str]:
    """Write one PNG an image, with `text` in it; yields their names."""
    marks = PngInfo()
    marks.add_text("Comment", text)
    for number, image in enumerate(drawn.images.numpy(), start=1):
        name = f"{number:06d}.png"
        if len(image) == 1:
            picture = Image.fromarray(stored(image)[0].astype(np.uint16))
        else:
            picture = Image.fromarray((stored(image) >> 8).astype(np.uint8).transpose(1, 2, 0))
        picture.save(folder / name, pnginfo=marks)
        yield name


def _label_table(names: list[str], drawn: Drawn, spec: RunSpec) -> bytes:
    """A CSV of file and label, or a column for each class of a multilabel task."""
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    many, classes = spec.task.kind == "multilabel", spec.task.classes
    table.writerow(["file", *(classes if many else ["label"])])
    for name, label in zip(names, drawn.labels.numpy(), strict=True):
        table.writerow([name, *(label.astype(int) if many else [classes[int(label)]])])
    return text.getvalue().encode()


def write_cohort(path: Path, drawn: Drawn, spec: RunSpec) -> None:
    """Write the images as a cohort that fits `spec`, its unit the image and its source synthetic.

    Raises:
        CohortError: if the disk refuses.
    """
    height, width = spec.input.shape[1:]
    with CohortBuilder(path, spec.input.shape) as builder:
        pairs = zip(drawn.images.numpy(), drawn.labels.numpy(), strict=True)
        for number, (image, label) in enumerate(pairs, start=1):
            who = f"{SYNTHETIC}-{number:06d}"
            kept: Any = int(label) if label.ndim == 0 else tuple(map(int, label))
            builder.add(ImageRecord(who, who, who, who, kept, height, width), stored(image))
        today = datetime.now(UTC).date().isoformat()
        builder.finish(CohortMeta.of(spec, unit="image", source=SYNTHETIC, created=today))
