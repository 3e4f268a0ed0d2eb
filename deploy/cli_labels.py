"""`cloister intake labels`: labels from the coded findings of structured reports."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from deploy.intake_words import console, progress_bar, reasons, write_listing

if TYPE_CHECKING:
    from client.intake.findings import Findings, Labelled
    from common.spec import Task


Source = Annotated[
    Path, typer.Argument(help="A folder of DICOM files at any depth, a ZIP, or a DICOMDIR.")
]
TableFile = Annotated[
    Path, typer.Argument(metavar="LABELS.csv", help="The label table; it must not exist yet.")
]
CodesFile = Annotated[Path, typer.Option(help="A TOML file: which codes mean which class.")]
SpecFile = Annotated[Path, typer.Option(help="The run's TOML file: its [task] names the classes.")]
NotLabelled = Annotated[
    Path | None,
    typer.Option(help="Write every study and object without a label to this CSV."),
]


def labels(
    source: Source,
    table: TableFile,
    *,
    codes: CodesFile,
    spec: SpecFile,
    not_labelled: NotLabelled = None,
) -> None:
    """Make a label table from the coded findings of the source's structured reports.

    Text is never interpreted and nothing is guessed: a study whose reports contradict each
    other, are unclear, or say nothing of a class gets no label and is listed with the reason.
    Both files name studies, so only their owner may read them.

    The file with the codes has one or more `[[finding]]` for each class. It says `class`, the
    `concept` of a content item as value and coding scheme, and what makes the class present:
    a `value` (a code), or a number `at_least` or `below` in a `unit`; with none of these, the
    item's value has to be yes, no, present, absent, or the like:

        [[finding]]
        class = "pneumothorax"
        concept = ["121071", "DCM"]
        value = ["36118008", "SCT"]

    At its top may stand `verified = false`, which takes reports that nobody has signed, and
    `unmentioned = "absent"`, if complete reports name whatever was found.

    Example: `cloister intake labels /archive/chest labels.csv --codes codes.toml --spec run.toml`
    """
    from client.intake.findings import Findings, read_codes, write_labels
    from common.errors import ConfigError, IntakeError
    from common.spec import read_run_file

    task = read_run_file(spec).spec.task
    findings = Findings(read_codes(codes, task), task)
    for path in filter(None, (table, not_labelled)):
        if path.exists():
            raise ConfigError(f"{path}: exists already, and nothing is overwritten")
    found = _read(source, findings)
    if not_labelled is not None:
        write_listing(not_labelled, found.not_labelled)
    _show(found, task)
    if not found.labels:
        raise IntakeError(f"{source}: no study of it gets a label, so {table} is not written")
    write_labels(table, found.labels, task)
    console.print(f"{len(found.labels)} studies are in {table}.", highlight=False, markup=False)


def _read(source: Path, findings: Findings) -> Labelled:
    """All that the source says, under a progress bar."""
    from client.intake.items import listed

    with console.status("Looking through the source …"):
        listing = listed(source)
    with progress_bar() as progress:
        for item in progress.track(listing.items, description="Reading"):
            findings.take(item)
    found = findings.labels()
    return found._replace(not_labelled=(*found.not_labelled, *listing.unusable))


def _show(found: Labelled, task: Task) -> None:
    """How many studies each class has, and why others have no label."""
    from rich.markup import escape
    from rich.table import Table

    if found.not_labelled:
        title = f"Without a label: {len(found.not_labelled)}. For your own eyes"
        console.print(reasons(found.not_labelled, title, "with --not-labelled FILE"))
    shown = Table("class", "studies", title="Labels", title_justify="left")
    for number, name in enumerate(task.classes):
        count = sum(
            bool(label[number]) if isinstance(label, tuple) else label == number
            for label in found.labels.values()
        )
        shown.add_row(escape(name), str(count))
    console.print(shown)
