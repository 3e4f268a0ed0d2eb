"""`cloister intake`: a hospital's or researcher's images into a cohort."""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from deploy.cli_fetch import fetch
from deploy.cli_keys import new_key, officer_key, reidentify, rotate_key
from deploy.cli_labels import labels
from deploy.cli_review import review
from deploy.cli_take import (
    CohortKeyFile,
    Labels,
    Node,
    NotUsed,
    Spec,
    Split,
    export,
    run,
    sealing_key,
)
from deploy.cli_verify import verify
from deploy.intake_words import (
    console,
    print_contents,
    print_summary,
    progress_bar,
    write_listing,
)

if TYPE_CHECKING:  # each command imports what it needs: --help answers at once
    from client.intake.keys import SiteKey
    from client.intake.source import Source
    from common.spec import RunSpec

intake_app = typer.Typer(
    name="intake",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    help="Turn images into a cohort that a run can train on.",
    epilog="A cohort holds pixels, keyed pseudonyms and labels, and nothing else of the source; "
    "it is pseudonymised patient data all the same, readable by its owner alone.",
)


class Part(StrEnum):
    """The parts of a MedMNIST file."""

    TRAIN = "train"
    VAL = "val"
    TEST = "test"


Direction = Literal["sagittal", "coronal", "axial"]


CohortArgument = Annotated[
    Path, typer.Argument(help="The cohort's directory; it must not exist yet.")
]
KeyOption = Annotated[
    Path | None,
    typer.Option(
        help="File of the site's pseudonym key, made on first use. With it, a patient has the "
        "same pseudonym in every cohort; without it, a key is drawn and forgotten."
    ),
]


def medmnist(
    file: Annotated[Path, typer.Argument(help="A MedMNIST file, such as pneumoniamnist.npz.")],
    cohort: CohortArgument,
    *,
    spec: Spec,
    part: Annotated[
        Part | None, typer.Option(help="Only this part; all three if not given.")
    ] = None,
) -> None:
    """Take in a MedMNIST `.npz`; its parts become splits.

    It names no patients, so the unit of privacy is the image, and the run has to say
    `unit = "image"`. The spec's classes are in the order of the file's label numbers.

    Example: `cloister intake medmnist pneumoniamnist.npz test.cohort --spec run.toml --part test`
    """
    from client.intake.keys import SiteKey
    from client.intake.medmnist import PARTS, MedMnist
    from common.spec import read_run_file

    run = read_run_file(spec).spec
    parts = PARTS if part is None else (part.value,)
    take_in(MedMnist(file, run, SiteKey.random(), parts), cohort, run)


def pictures(
    folder: Annotated[Path, typer.Argument(help="A folder of PNG and JPEG files.")],
    cohort: CohortArgument,
    *,
    spec: Spec,
    labels: Labels,
    site_key: KeyOption = None,
    split: Split = None,
    not_used: NotUsed = None,
    keep_empty: Annotated[
        bool, typer.Option("--keep-empty", help="Use pictures whose mask is the background alone.")
    ] = False,
) -> None:
    """Take in a folder of PNG and JPEG pictures.

    The CSV has the columns `file` (a path within the folder) and `label`, and optionally
    `patient` and `split`. Without a column `patient` the unit of privacy is the image. A run with
    `input.modalities` needs a column `modality`.

    For a run of masks it has `file` and `mask`, the path of a PNG whose values are class numbers.
    For one of boxes it has `file`, `left`, `top`, `right`, `bottom` (pixels) and `label`, one line
    a box; or `--labels` is COCO's JSON, or a folder of VOC's XML.

    Example: `cloister intake pictures photos skin.cohort --spec run.toml --labels labels.csv`
    """
    from client.intake.pictures import Pictures
    from common.spec import read_run_file

    run = read_run_file(spec).spec
    source = Pictures.of(folder, labels, run, _key(site_key), split=split or "")
    source.keep_empty = keep_empty
    take_in(source, cohort, run, not_used)


def nifti(
    images: Annotated[Path, typer.Argument(help="A folder of NIfTI volumes.")],
    masks: Annotated[Path, typer.Argument(help="A folder of their masks, under the same names.")],
    cohort: CohortArgument,
    *,
    spec: Spec,
    direction: Annotated[
        Direction | None,
        typer.Option(help="Which slices are cut; not for a run of volumes, whose file says it."),
    ] = None,
    patients: Annotated[
        Path | None, typer.Option(help="A CSV with `file`, `patient` and if wished `split`.")
    ] = None,
    each_file_a_patient: Annotated[
        bool, typer.Option("--each-file-a-patient", help="No two volumes are of one patient.")
    ] = False,
    site_key: KeyOption = None,
    split: Split = None,
    not_used: NotUsed = None,
) -> None:
    """Take in pairs of NIfTI volumes, an image and its mask: slice by slice, or whole.

    For a run of volumes (`input.depth`) each becomes one, on the run's grid.

    All slices of a volume are one patient's. Whose it is, the CSV says; or you do, with
    `--each-file-a-patient`: a patient with two volumes would be protected less than a report says.

    Example: `cloister intake nifti images labels brain.cohort --spec run.toml
    --direction sagittal --patients patients.csv`
    """
    from client.intake.annotations import read_owners
    from client.intake.nifti import NiftiPairs
    from common.errors import ConfigError
    from common.spec import read_run_file

    if (patients is None) != each_file_a_patient:
        raise ConfigError(
            "whose are the volumes? Name a CSV with --patients, or say --each-file-a-patient; "
            "one of the two"
        )
    run = read_run_file(spec).spec
    owners = None if patients is None else read_owners(patients)
    key = _key(site_key)
    source = NiftiPairs(images, masks, run, key, direction, owners, split or "")
    take_in(source, cohort, run, not_used)


def show(
    cohort: Annotated[Path, typer.Argument(help="A cohort's directory.")],
    verify: Annotated[
        bool, typer.Option("--verify", help="Recompute the SHA-256 of every image.")
    ] = False,
    node: Node = None,
    cohort_key: CohortKeyFile = None,
    sheet: Annotated[
        Path | None, typer.Option(help="Write a PNG with a few of the images side by side.")
    ] = None,
) -> None:
    """Show what is in a cohort. The figures are exact, so they stay with the hospital.

    Example: `cloister intake show north.cohort --verify --sheet north.png`
    """
    from client.intake.sheet import write_sheet
    from client.intake.summary import summarise
    from common.cohort import Cohort

    opened = Cohort.open(cohort, sealing_key(node, cohort_key))
    print_contents(cohort, summarise(opened))
    if verify:
        with console.status("Verifying every image …"):
            opened.verify()
        console.print(f"[green]All {len(opened)} images are as they were stored.")
    if sheet is not None:
        count = write_sheet(opened, sheet)
        console.print(f"{count} images are on {sheet}: patient data, so mind where it goes.")


def _key(path: Path | None) -> SiteKey:
    from client.intake.keys import SiteKey

    return SiteKey.random() if path is None else SiteKey.from_file(path)


def take_in(source: Source, cohort: Path, spec: RunSpec, listing: Path | None = None) -> None:
    """Take a source in under a progress bar and show what became of it.

    Args:
        source: where the images come from.
        cohort: a directory that does not exist yet.
        spec: the run that the cohort is for.
        listing: a new CSV for everything that was not used, if one is wished.

    Raises:
        CohortError, DataError: as `client.intake.run.intake` does.
        ConfigError: if the listing cannot be written; the cohort is there all the same.
    """
    from client.intake.run import intake
    from common.files import refuse_what_is_there

    refuse_what_is_there(cohort)
    with progress_bar() as progress:
        task = progress.add_task("Taking in", total=len(source))
        summary = intake(
            source,
            cohort,
            spec,
            progress=lambda done, total: progress.update(task, completed=done, total=total),
        )
    if listing is not None:
        write_listing(listing, summary.not_used)
    print_summary(summary)


_COMMANDS: dict[str, tuple[Callable[..., None], ...]] = {
    "From DICOM": (run, export, labels, fetch),
    "Look at what was made": (review, verify, show),
    "Keys": (new_key, rotate_key, officer_key, reidentify),
    "From other files, for research": (pictures, nifti, medmnist),
}
for _panel, _commands in _COMMANDS.items():
    for _command in _commands:
        intake_app.command(rich_help_panel=_panel)(_command)
