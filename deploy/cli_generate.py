"""`cloister generate`: synthetic images from a finished run, as pictures and as a cohort."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from deploy.cli_take import CohortKeyFile, Node, sealing_key

if TYPE_CHECKING:  # each command imports what it needs: --help answers at once
    from common.cohort import Cohort
    from common.spec import RunSpec
    from common.tasks.generation import Drawn

_RESAMPLES = 500

console = Console()


def generate(
    run: Annotated[Path, typer.Argument(help="Folder of a finished run of the task generation.")],
    out: Annotated[Path, typer.Argument(help="A folder that is not there yet.")],
    *,
    images: Annotated[int, typer.Option(min=1, help="How many images to make.")] = 1000,
    seed: Annotated[int, typer.Option(min=0, help="Another seed gives other images.")] = 1,
    against: Annotated[
        Path | None,
        typer.Option(help="A cohort that was trained on: say how near the images come to it."),
    ] = None,
    node: Node = None,
    cohort_key: CohortKeyFile = None,
) -> None:
    """Make synthetic images from a finished run: pictures, labels, and a cohort.

    Example: `cloister generate runs/my-gan-20260101-120000-ab12 synthetic --images 2000`
    """
    from common.files import refuse_what_is_there
    from deploy import synthetic

    generator = synthetic.load_generator(run)
    refuse_what_is_there(out)
    key, cohort = sealing_key(node, cohort_key), None
    if against is not None:
        cohort = _trained_on(against, key, generator.task.spec)
    with console.status("Drawing …"):
        drawn = generator.draw(images, seed)
    synthetic.write(out, generator, drawn, seed)
    console.print(f"{images} images in {out}", highlight=False, markup=False, soft_wrap=True)
    if cohort is not None:
        _compare(drawn, cohort)


def _trained_on(path: Path, key: bytes | None, spec: RunSpec) -> Cohort:
    """The cohort that the images are compared with, looked at before anything is made."""
    from common.cohort import Cohort
    from common.errors import CohortError
    from common.spec import NoPrivacy

    cohort = Cohort.open(path, key)
    # Nothing of it is released here, so the run's unit of privacy does not bind it.
    unbound = NoPrivacy(mechanism="none", unit=cohort.unit)
    cohort.check_fits(spec.model_copy(update={"privacy": unbound}))
    if not len(cohort):
        raise CohortError(f"{path}: it has no image; expected one that was trained on")
    return cohort


def _compare(drawn: Drawn, cohort: Cohort) -> None:
    """Say how near the images come to those of a cohort; nothing of it is kept."""
    import numpy as np

    from common.tasks.generation import distances, memory
    from common.tasks.words import estimate

    found = memory(
        distances(cohort, drawn.images),
        cohort.patient_index,
        resamples=_RESAMPLES,
        generator=np.random.default_rng(1),
    )
    console.print(
        f"Against {cohort.path}: the nearest synthetic image, of as many as the cohort's, is "
        f"{estimate(found['nearest'], 2)} times as far as the nearest image of another patient; "
        f"{estimate(found['copies'], 1)} % of its images have one of all that were made as "
        "near as a copy. "
        "Copies among images that were trained on, and none among others, are memorised patients.",
        highlight=False,
        markup=False,
    )
