"""What the intake commands show: progress, what was not used and why, what is in a cohort."""

from __future__ import annotations

import csv
import os
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

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

from common.errors import ConfigError
from deploy.screen import printable

if TYPE_CHECKING:  # each command imports what it needs: --help answers at once
    from client.intake.run import IntakeSummary
    from client.intake.source import NotUsed
    from client.intake.summary import CohortSummary

_EXAMPLES_SHOWN = 3
_REASONS_SHOWN = 25
console = Console()


@contextmanager
def progress_bar() -> Iterator[Progress]:
    """A bar that moves while the body works."""
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
    print_not_used(summary.not_used)
    print_contents(summary.cohort, summary.contents)


def print_not_used(not_used: tuple[NotUsed, ...]) -> None:
    """Show what nothing was made of, by reason; nothing if there is none."""
    if not_used:
        title = f"Not used: {len(not_used)}. For your own eyes: names may tell of patients"
        console.print(reasons(not_used, title, "with --not-used FILE"))


def print_contents(path: Path, contents: CohortSummary) -> None:
    """Show what is in a cohort."""
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
    for name, images in contents.modalities.items():
        table.add_row(f"modality {escape(name)}", f"{images} images")
    for name, images in contents.splits.items():
        table.add_row(f"split {name or '(none)'}", f"{images} images")
    console.print(table)
    for warning in contents.warnings:
        console.print(f"[bold yellow]Attention:[/] {escape(warning)}", highlight=False)


def reasons(not_used: tuple[NotUsed, ...], title: str, where: str) -> Table:
    """One line a reason, the most frequent first, with a few examples.

    `where` says in which file all of them are listed.
    """
    by_reason: defaultdict[str, list[str]] = defaultdict(list)
    for item in not_used:
        by_reason[item.reason].append(printable(item.what))
    table = Table("reason", "how many", "for example", title=title, title_justify="left")
    ranked = sorted(by_reason.items(), key=lambda entry: -len(entry[1]))
    for reason, things in ranked[:_REASONS_SHOWN]:
        more = "\n…" if len(things) > _EXAMPLES_SHOWN else ""
        examples = "\n".join(things[:_EXAMPLES_SHOWN]) + more
        table.add_row(escape(reason), str(len(things)), escape(examples))
    if len(ranked) > _REASONS_SHOWN:
        table.add_row(f"{len(ranked) - _REASONS_SHOWN} more reasons", "", f"all {where}")
    return table


def check_listing(path: Path | None) -> None:
    """See, before the work is done, that a listing can be written there; None is none.

    Raises:
        ConfigError: if there is something already, or no folder for it.
    """
    if path is not None and (os.path.lexists(path) or not path.parent.is_dir()):
        raise ConfigError(
            f"{path}: the listing cannot be written; expected a new name in a folder that is there"
        )


def write_listing(path: Path, not_used: tuple[NotUsed, ...]) -> None:
    """Write everything that was not used to a new file, readable by its owner alone.

    Raises:
        ConfigError: if it exists, or cannot be written.
    """
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w", encoding="utf-8", newline="") as file:
            table = csv.writer(file)
            table.writerow(("what", "reason"))
            table.writerows((printable(item.what), item.reason) for item in not_used)
    except OSError as error:
        raise ConfigError(f"{path}: the listing cannot be written ({error})") from error
