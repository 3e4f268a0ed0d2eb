"""`cloister intake verify`: an independent look at what intake has made."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.progress import Progress
from rich.table import Table

from common.errors import ConfigError
from deploy.cli_take import CohortKeyFile, Node, sealing_key
from deploy.intake_words import console, progress_bar
from deploy.screen import printable

if TYPE_CHECKING:
    from client.intake.ocr import Reader
    from client.intake.verify.check import Verdict
    from client.intake.verify.identities import Identities
    from client.intake.verify.pictures import Reading

_ROWS_SHOWN = 40
_MEGABYTE = 1e6


PlaceArgument = Annotated[
    Path,
    typer.Argument(help="A cohort, exported DICOM, the desk of an intake, or any folder."),
]
AgainstOption = Annotated[
    Path | None,
    typer.Option(help="What it was made from: its names, numbers and dates are looked for."),
]
OcrOption = Annotated[
    bool, typer.Option("--ocr", help="Read the pictures too, with tesseract: a second opinion.")
]
ReportOption = Annotated[
    Path | None, typer.Option(help="Write a record without any value to this new JSON file.")
]


def verify(
    place: PlaceArgument,
    *,
    against: AgainstOption = None,
    ocr: OcrOption = False,
    node: Node = None,
    cohort_key: CohortKeyFile = None,
    report: ReportOption = None,
) -> None:
    """Search a cohort or exported files for anything that looks like an identity.

    It shares no code with the engine of de-identification. Without `--against` it goes by
    structure and shape: private attributes, names, dates, unknown words, bytes where none belong.
    With it, every name, number, date and UID of the source is looked for as well, in headers,
    databases, texts and pixels. It exits with 1 if there is anything a person has to look at.

    Text that is burned into pixels is not seen but by `--ocr`, which overlooks much and decides
    nothing: look at the pictures (`cloister intake show --sheet`).

    Example: `cloister intake verify north.cohort --against /archive/chest --report verified.json`
    """
    from client.intake.verify.check import Settings
    from client.intake.verify.check import verify as verified

    key = sealing_key(node, cohort_key)
    reader = _reader() if ocr else None
    _check_new(report)
    with progress_bar() as progress:
        identities = _identities(against, progress) if against else None
        bar = _told(progress, "Looking")
        verdict = verified(place, identities, bar, Settings(_said(), key))
    _print(verdict, place)
    read = _read(place, reader, key) if reader else None
    if report is not None:
        _write(report, verdict, read)
    if verdict.findings:
        raise typer.Exit(1)


def _said() -> str:
    """What the report and the page of the intake are made of."""
    ours = (file for file in files(__package__).iterdir() if file.name.startswith("intake_"))
    return "\n".join(file.read_text(encoding="utf-8") for file in ours)


def _reader() -> Reader:
    from client.intake.ocr import Reader

    return Reader()


def _identities(source: Path, progress: Progress) -> Identities:
    from client.intake.verify.identities import identities_of

    return identities_of(source, _told(progress, "Reading the source"))


def _told(progress: Progress, what: str) -> Callable[[int, int], None]:
    task = progress.add_task(what, total=None)
    return lambda done, total: progress.update(task, completed=done, total=total)


def _print(verdict: Verdict, place: Path) -> None:
    size = f"{verdict.files} files, {verdict.size / _MEGABYTE:.1f} MB"
    if not verdict.findings:
        console.print(f"[green]Nothing in {escape(str(place))} looks like an identity[/] ({size}).")
    else:
        console.print(_table(verdict))
        for rule, count in verdict.by_rule().most_common():
            console.print(f"  {count} × {escape(rule)}", highlight=False)
        console.print(
            f"[bold red]{len(verdict.findings)} findings[/] in {size}: a person has to look at "
            "them before anything of this leaves or is trained on.",
            highlight=False,
        )
    if not verdict.against_source:
        console.print("Looked at shapes alone; --against SOURCE looks for the source's own values.")


def _table(verdict: Verdict) -> Table:
    table = Table("file", "where", "at byte", "rule", "value", "why", title_justify="left",
                  title="Looks like an identity. For your own eyes: names of files may tell of "
                  "patients")  # fmt: skip
    for finding in verdict.findings[:_ROWS_SHOWN]:
        offset = "" if finding.offset < 0 else str(finding.offset)
        cells = (finding.file, finding.where, offset, finding.rule, finding.masked, finding.why)
        table.add_row(*(escape(printable(cell)) for cell in cells))
    if len(verdict.findings) > _ROWS_SHOWN:
        more = f"{len(verdict.findings) - _ROWS_SHOWN} more"
        table.add_row(more, "", "", "all with --report FILE", "", "")
    return table


def _read(place: Path, reader: Reader, key: bytes | None) -> list[Reading]:
    from client.intake.verify.finding import masked
    from client.intake.verify.pictures import readings

    with progress_bar() as progress:
        found = readings(place, reader, _told(progress, "Reading the pictures"), key)
    if not found:
        console.print("Tesseract reads no word in any picture. It overlooks much.")
        return found
    title = "A second opinion: pictures with words, by tesseract. It decides nothing"
    table = Table("file", "picture", "words", title=title, title_justify="left")
    for reading in found[:_ROWS_SHOWN]:
        words = ", ".join(masked(word.text) for word in reading.words) or reading.failed
        table.add_row(escape(printable(reading.file)), str(reading.number), escape(words))
    console.print(table)
    console.print(f"{len(found)} pictures to look at.", highlight=False)
    return found


def _check_new(report: Path | None) -> None:
    if report is not None and report.exists():
        raise ConfigError(f"{report}: exists already; expected a new file for the record")


def _write(path: Path, verdict: Verdict, read: list[Reading] | None) -> None:
    """The record, readable by its owner alone."""
    document = json.loads(verdict.to_json())
    if read is not None:
        document["pictures_with_words"] = len(read)
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(json.dumps(document, indent=2) + "\n")
    except OSError as error:
        raise ConfigError(f"{path}: the record cannot be written ({error.strerror})") from error
