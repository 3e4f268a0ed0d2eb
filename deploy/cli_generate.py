"""`cloister generate`: synthetic images from a finished run, as pictures and as a cohort."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

if TYPE_CHECKING:  # each command imports what it needs: --help answers at once
    from common.tasks.generation import Drawn

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

    Example: `cloister generate runs/my-gan-20260101-120000-ab12 synthetic --images 2000`
    """
    from deploy import synthetic

    generator = synthetic.load_generator(run)
    synthetic.refuse_what_is_there(out)
    with console.status("Drawing …"):
        drawn = generator.draw(images, seed)
    synthetic.write(out, generator, drawn, seed)
    console.print(f"{images} images in {out}", highlight=False, markup=False, soft_wrap=True)
    if against is not None:
        _compare(drawn, against)


def _compare(drawn: Drawn, path: Path) -> None:
    """Say how near the images come to those of a cohort; nothing of it is kept."""
    import numpy as np

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
