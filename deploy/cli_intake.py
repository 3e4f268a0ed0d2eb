"""`cloister intake`: a hospital's or researcher's images into a cohort."""

from __future__ import annotations

import csv
import os
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from client.intake.dicom import DicomFolder
from client.intake.keys import SiteKey
from client.intake.medmnist import PARTS, MedMnist
from client.intake.pictures import Pictures
from client.intake.run import IntakeSummary, intake
from client.intake.sheet import write_sheet
from client.intake.source import NotUsed, Source
from client.intake.summary import CohortSummary, summarise
from common.cohort import Cohort
from common.errors import ConfigError
from common.spec import RunSpec, read_run_file

_EXAMPLES_SHOWN = 3
_REASONS_SHOWN = 25

intake_app = typer.Typer(
    name="intake",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    help="Turn images into a cohort that a run can train on.",
    epilog="A cohort holds pixels, keyed pseudonyms and labels, and nothing else of the source; "
    "it is pseudonymised patient data all the same, readable by its owner alone.",
)
console = Console()


class Split(StrEnum):
    """The splits that an image can be put into."""

    TRAIN = "train"
    VALIDATION = "validation"
    TEST = "test"


class Part(StrEnum):
    """The parts of a MedMNIST file."""

    TRAIN = "train"
    VAL = "val"
    TEST = "test"


CohortArgument = Annotated[
    Path, typer.Argument(help="The cohort's directory; it must not exist yet.")
]
SpecOption = Annotated[
    Path,
    typer.Option(help="The run's TOML file: its [task] names the classes, its [input] the shape."),
]
LabelsOption = Annotated[Path, typer.Option(help="A CSV with the labels; see above.")]
KeyOption = Annotated[
    Path | None,
    typer.Option(
        help="File of the site's pseudonym key, made on first use. With it, a patient has the "
        "same pseudonym in every cohort; without it, a key is drawn and forgotten."
    ),
]
NotUsedOption = Annotated[
    Path | None,
    typer.Option(help="Write everything that was not used, with its reason, to this CSV."),
]
SplitOption = Annotated[Split | None, typer.Option(help="Put every image into this split.")]


@intake_app.command()
def dicom(
    source: Annotated[Path, typer.Argument(help="A folder of DICOM files, at any depth.")],
    cohort: CohortArgument,
    *,
    spec: SpecOption,
    labels: LabelsOption,
    site_key: KeyOption = None,
    split: SplitOption = None,
    not_used: NotUsedOption = None,
) -> None:
    """Take in a folder of DICOM, of any depth and with any names.

    The CSV has one column that says what a line is about (`PatientID`, `StudyInstanceUID`,
    `AccessionNumber` or `SOPInstanceUID`) and one named `label` with the name of a class. A
    multilabel task has a column of 0 and 1 for each class. A column `split` is optional.

    Example: `cloister intake dicom /archive/chest north.cohort --spec run.toml
    --labels labels.csv --site-key north.key`
    """
    run = read_run_file(spec).spec
    key = _key(site_key)
    take_in(DicomFolder.of(source, labels, run, key, split=split or ""), cohort, run, not_used)


@intake_app.command()
def medmnist(
    file: Annotated[Path, typer.Argument(help="A MedMNIST file, such as pneumoniamnist.npz.")],
    cohort: CohortArgument,
    *,
    spec: SpecOption,
    part: Annotated[
        Part | None, typer.Option(help="Only this part; all three if not given.")
    ] = None,
) -> None:
    """Take in a MedMNIST `.npz`; its parts become splits.

    It names no patients, so the unit of privacy is the image, and the run has to say
    `unit = "image"`. The spec's classes are in the order of the file's label numbers.

    Example: `cloister intake medmnist pneumoniamnist.npz test.cohort --spec run.toml --part test`
    """
    run = read_run_file(spec).spec
    parts = PARTS if part is None else (part.value,)
    take_in(MedMnist(file, run, SiteKey.random(), parts), cohort, run)


@intake_app.command()
def pictures(
    folder: Annotated[Path, typer.Argument(help="A folder of PNG and JPEG files.")],
    cohort: CohortArgument,
    *,
    spec: SpecOption,
    labels: LabelsOption,
    site_key: KeyOption = None,
    split: SplitOption = None,
    not_used: NotUsedOption = None,
) -> None:
    """Take in a folder of PNG and JPEG pictures.

    The CSV has the columns `file` (a path within the folder) and `label`, and optionally
    `patient` and `split`. Without a column `patient` the unit of privacy is the image.

    Example: `cloister intake pictures photos skin.cohort --spec run.toml --labels labels.csv`
    """
    run = read_run_file(spec).spec
    key = _key(site_key)
    take_in(Pictures.of(folder, labels, run, key, split=split or ""), cohort, run, not_used)


@intake_app.command()
def show(
    cohort: Annotated[Path, typer.Argument(help="A cohort's directory.")],
    verify: Annotated[
        bool, typer.Option("--verify", help="Recompute the SHA-256 of every image.")
    ] = False,
    sheet: Annotated[
        Path | None, typer.Option(help="Write a PNG with a few of the images side by side.")
    ] = None,
) -> None:
    """Show what is in a cohort. The figures are exact, so they stay with the hospital.

    Example: `cloister intake show north.cohort --verify --sheet north.png`
    """
    opened = Cohort.open(cohort)
    _print_contents(cohort, summarise(opened))
    if verify:
        with console.status("Verifying every image …"):
            opened.verify()
        console.print(f"[green]All {len(opened)} images are as they were stored.")
    if sheet is not None:
        count = write_sheet(opened, sheet)
        console.print(f"{count} images are on {sheet}: patient data, so mind where it goes.")


def _key(path: Path | None) -> SiteKey:
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
    with _progress_bar() as progress:
        task = progress.add_task("Taking in", total=len(source))
        summary = intake(
            source,
            cohort,
            spec,
            progress=lambda done, total: progress.update(task, completed=done, total=total),
        )
    if listing is not None:
        _write_listing(listing, summary.not_used)
    print_summary(summary)


@contextmanager
def _progress_bar() -> Iterator[Progress]:
    with Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
    ) as progress:
        yield progress


def print_summary(summary: IntakeSummary) -> None:
    """Show what an intake has done: contents, what was not used and why, warnings."""
    if summary.not_used:
        console.print(_reasons(summary.not_used))
    _print_contents(summary.cohort, summary.contents)


def _print_contents(path: Path, contents: CohortSummary) -> None:
    few, mean, many = contents.images_a_patient
    table = Table(title=f"Cohort {escape(str(path))}", title_justify="left", show_header=False)
    table.add_row("source", contents.source)
    table.add_row("unit of privacy", f"[bold]{contents.unit}")
    table.add_row("images", str(contents.images))
    if contents.unit == "patient":
        table.add_row("patients", str(contents.patients))
        table.add_row("images a patient", f"{few} to {many}, {mean:.2f} on average")
    for count in contents.classes:
        patients = f" of {count.patients} patients" if contents.unit == "patient" else ""
        table.add_row(f"class {escape(count.name)}", f"{count.images} images{patients}")
    for name, images in contents.splits.items():
        table.add_row(f"split {name or '(none)'}", f"{images} images")
    console.print(table)
    for warning in contents.warnings:
        console.print(f"[bold yellow]Attention:[/] {escape(warning)}", highlight=False)


def _reasons(not_used: tuple[NotUsed, ...]) -> Table:
    """One line a reason, the most frequent first, with a few examples."""
    by_reason: defaultdict[str, list[str]] = defaultdict(list)
    for item in not_used:
        by_reason[item.reason].append(_printable(item.what))
    title = f"Not used: {len(not_used)}. For your own eyes: names may tell of patients"
    table = Table("reason", "how many", "for example", title=title, title_justify="left")
    ranked = sorted(by_reason.items(), key=lambda entry: -len(entry[1]))
    for reason, things in ranked[:_REASONS_SHOWN]:
        more = "\n…" if len(things) > _EXAMPLES_SHOWN else ""
        examples = "\n".join(things[:_EXAMPLES_SHOWN]) + more
        table.add_row(escape(reason), str(len(things)), escape(examples))
    if len(ranked) > _REASONS_SHOWN:
        table.add_row(
            f"{len(ranked) - _REASONS_SHOWN} more reasons", "", "all with --not-used FILE"
        )
    return table


def _write_listing(path: Path, not_used: tuple[NotUsed, ...]) -> None:
    """Everything that was not used, readable by its owner alone."""
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w", encoding="utf-8", newline="") as file:
            table = csv.writer(file)
            table.writerow(("what", "reason"))
            table.writerows((_printable(item.what), item.reason) for item in not_used)
    except OSError as error:
        raise ConfigError(f"{path}: the listing cannot be written ({error})") from error


def _printable(name: str) -> str:
    """A file name may hold bytes that are no text."""
    return name.encode("utf-8", "backslashreplace").decode("utf-8")
