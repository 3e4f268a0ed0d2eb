"""`cloister generate`: synthetic images from a finished run, as pictures and as a cohort.

What it writes is of nobody and says so: the cohort's source and every pseudonym, the text in each
picture, and ``about.json`` beside them. A run, or an intake, reads it like any other::

    OUT/images/000001.png …    one picture an image, 16 bits deep if grey
    OUT/labels.csv             file and label, as `cloister intake` takes them
    OUT/cohort/                what [simulation] takes
    OUT/about.json             of which run and model it is, and how it was drawn
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import typer
from numpy.typing import NDArray
from rich.console import Console

if TYPE_CHECKING:
    from torch import nn

    from common.spec import RunSpec
    from common.tasks.generation import Drawn, Generation

SYNTHETIC = "synthetic"
MODEL_FILE = "model.safetensors"
_RESAMPLES = 500

console = Console()


def generate(
    run: Annotated[Path, typer.Argument(help="Folder of a finished run of the task generation.")],
    out: Annotated[Path, typer.Argument(help="A folder that is not there yet.")],
    images: Annotated[int, typer.Option(min=1, help="How many images to make.")] = 1000,
    seed: Annotated[int, typer.Option(min=0, help="Another seed gives other images.")] = 1,
    against: Annotated[
        Path | None,
        typer.Option(help="A cohort that was trained on: say how near the images come to it."),
    ] = None,
) -> None:
    """Make synthetic images from a finished run: pictures, labels, and a cohort.

    Example: `cloister generate runs/my-gan-20260101-120000-ab12 synthetic --images 2000`.
    """
    import torch

    from common.files import write_durably

    task, network, model_digest = load_generator(run)
    _refuse_what_is_there(out)
    drawn = task.draw(network, images, torch.Generator().manual_seed(seed))
    about = {
        "what": "synthetic images, of nobody; not to be taken for evidence of anything",
        "run": task.spec.name,
        "run_digest": task.spec.digest,
        "model_sha256": model_digest,
        "seed": seed,
        "images": images,
        "classes": list(task.spec.task.classes),
    }
    (out / "images").mkdir(parents=True, mode=0o700)
    names = list(write_pictures(out / "images", drawn, f"{SYNTHETIC}; {task.spec.name}"))
    write_durably(out / "labels.csv", _label_table(names, drawn, task.spec))
    write_cohort(out / "cohort", drawn, task.spec)
    write_durably(out / "about.json", json.dumps(about, indent=2).encode())
    console.print(f"{images} images in {out}", highlight=False, markup=False, soft_wrap=True)
    if against is not None:
        _compare(drawn, against)


def load_generator(run: Path) -> tuple[Generation, nn.Module, str]:
    """The task of a finished run, its network in evaluation mode, and its model's SHA-256.

    Raises:
        RunError: if it is no finished run, has another task, or its model is not its network's.
    """
    import torch
    from safetensors import SafetensorError
    from safetensors.numpy import load

    from common import models
    from common.errors import RunError, SpecError
    from common.spec import RunSpec
    from common.tasks import task_for
    from common.tasks.generation import Generation

    try:
        content = (run / MODEL_FILE).read_bytes()
        spec = RunSpec.from_json((run / "spec.json").read_text("utf-8"), source=str(run))
        weights = load(content)
    except (OSError, UnicodeDecodeError, SafetensorError, SpecError) as error:
        raise RunError(
            f"{run}: not the folder of a finished run ({error}); expected one that holds spec.json "
            f"and {MODEL_FILE}, as `cloister simulate` leaves it"
        ) from error
    task = task_for(spec)
    if not isinstance(task, Generation):
        raise RunError(
            f"{run}: its task.name is {spec.task.name!r}, which makes no images; expected a run of "
            "'generation'"
        )
    network = models.build(spec)
    expected = {name: tuple(p.shape) for name, p in network.named_parameters()}
    if {name: array.shape for name, array in weights.items()} != expected:
        raise RunError(
            f"{run / MODEL_FILE}: its weights are not those of {spec.model.name}; the folder holds "
            "parts of two runs: copy it anew"
        )
    network.load_state_dict({name: torch.from_numpy(array) for name, array in weights.items()})
    return task, network.eval(), hashlib.sha256(content).hexdigest()


def _refuse_what_is_there(out: Path) -> None:
    from common.errors import ConfigError

    if out.exists():
        raise ConfigError(
            f"{out}: is there already; give a folder that is not: nothing is written over"
        )


def stored(images: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Brightness in 0..1 as a cohort stores it."""
    from common.cohort import PIXEL_MAX

    return np.rint(np.clip(np.nan_to_num(images), 0, 1) * PIXEL_MAX).astype("<u2")


def write_pictures(folder: Path, drawn: Drawn, text: str) -> Iterator[str]:
    """Write one PNG an image, with `text` in it; yields their names."""
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

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
    """A CSV as `cloister intake` takes it."""
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
    from client.intake.builder import CohortBuilder, ImageRecord
    from common.cohort import CohortMeta

    height, width = spec.input.shape[1:]
    with CohortBuilder(path, spec.input.shape) as builder:
        pairs = zip(drawn.images.numpy(), drawn.labels.numpy(), strict=True)
        for number, (image, label) in enumerate(pairs, start=1):
            who = f"{SYNTHETIC}-{number:06d}"
            kept: Any = int(label) if label.ndim == 0 else tuple(map(int, label))
            builder.add(ImageRecord(who, who, who, who, kept, height, width), stored(image))
        today = datetime.now(UTC).date().isoformat()
        builder.finish(CohortMeta.of(spec, unit="image", source=SYNTHETIC, created=today))


def _compare(drawn: Drawn, path: Path) -> None:
    """Say how near the images come to those of a cohort; nothing of it is kept."""
    from common.cohort import Cohort
    from common.tasks.generation import distances, memory
    from common.tasks.words import estimate

    cohort = Cohort.open(path)
    found = memory(
        distances(cohort, drawn.images),
        cohort.patient_index,
        resamples=_RESAMPLES,
        generator=np.random.default_rng(1),
    )
    console.print(
        f"Against {path}: the nearest synthetic image is {estimate(found['nearest'], 2)} times as "
        "far as the nearest image of another patient; "
        f"{estimate(found['copies'], 1)} % of its images have a synthetic one as near as a copy. "
        "Copies among images that were trained on, and none among others, are memorised patients.",
        highlight=False,
        markup=False,
    )
