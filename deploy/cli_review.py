"""`cloister intake review`: a person looks at what waits, and decides."""

from __future__ import annotations

import getpass
import importlib.util
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console, RenderableType
from rich.text import Text

from common.errors import ConfigError
from deploy.cli_take import CohortKeyFile, Node

if TYPE_CHECKING:  # the command imports what it needs: --help answers at once
    from client.intake.decision import Decision
    from client.intake.desk import Desk
    from deploy.intake_review import Case, Queue

console = Console()


CohortArgument = Annotated[
    Path, typer.Argument(help="The cohort, or the exported files, as `run` or `export` had it.")
]
KeyFile = Annotated[
    Path | None,
    typer.Option("--site-key", help="File of the site key that the intake was begun with."),
]
Identifier = Annotated[str, typer.Argument(metavar="[ID]", help="The beginning of an object's id.")]
Release = Annotated[
    bool, typer.Option("--release", help="Let the object through at the next `run`.")
]
Reject = Annotated[
    bool, typer.Option("--reject", help="Nothing of it is kept, whatever was kept before.")
]
Blank = Annotated[
    list[str] | None,
    typer.Option(
        metavar="TOP,LEFT,BOTTOM,RIGHT",
        help="A rectangle to blank in every frame, each end excluded; may be given again.",
    ),
]
LeaveFound = Annotated[
    bool,
    typer.Option("--leave-found", help="What was found by itself is NOT blanked: it is no text."),
]
Because = Annotated[
    str, typer.Option(help="Why, in your words; kept sealed. A rejection needs it.")
]
By = Annotated[str, typer.Option(help="Who decides.", show_default="the user who is logged in")]
Yes = Annotated[bool, typer.Option("--yes", help="Without being asked.")]
PageOption = Annotated[
    bool, typer.Option("--page", help="Show pictures in the browser of this machine.")
]
Port = Annotated[int, typer.Option(min=0, max=65535, help="Of the page; 0: any that is free.")]
Decisions = Annotated[
    bool, typer.Option("--decisions", help="List what was decided: when, who, why.")
]
QueueOption = Annotated[
    str, typer.Option("--list", help="waits, decided, blanked (and kept), or rejected.")
]
Rows = Annotated[int, typer.Option(min=1, help="How many of a list are shown.")]


def review(
    cohort: CohortArgument,
    identifier: Identifier = "",
    *,
    release: Release = False,
    reject: Reject = False,
    blank: Blank = None,
    leave_found: LeaveFound = False,
    because: Because = "",
    by: By = "",
    yes: Yes = False,
    page: PageOption = False,
    port: Port = 0,
    decisions: Decisions = False,
    queue: QueueOption = "waits",
    rows: Rows = 30,
    node: Node = None,
    site_key: KeyFile = None,
    cohort_key: CohortKeyFile = None,
) -> None:
    """Look at what an intake would not keep without a person, and decide.

    Without ID: a list of what waits, and why. With ID: one object. With `--release` or `--reject`
    the decision is recorded with your name and the time, and the next `cloister intake run` acts
    on it. What was kept with pixels blanked (`--list blanked`) can be decided otherwise too.

    `--page` shows the pictures: before and after, with what was found; a rectangle is drawn with
    the mouse. They are served from memory, to this machine alone, and never written to the disk.

    Example: `cloister intake review north.cohort --page`, or without a browser
    `cloister intake review north.cohort 3f2a9c --release --blank 0,0,40,512`
    """
    said = _Said(release, reject, tuple(blank or ()), leave_found, because)
    said.check(identifier)
    chosen = _queue(queue)
    open_desk = _opener(cohort, node, site_key, cohort_key)
    with open_desk() as desk:
        if page:
            first = desk.find(identifier).id if identifier else ""
            _serve(open_desk, by.strip(), first, port)
        elif decisions or not identifier:
            _list(desk, None if decisions else chosen, rows)
        else:
            _one(desk, identifier, said.decision(by) if said.asked else None, sure=yes)


@dataclass(frozen=True)
class _Said:
    """What the options say of an object."""

    release: bool
    reject: bool
    blank: tuple[str, ...]
    leave_found: bool
    because: str

    @property
    def asked(self) -> bool:
        return self.release or self.reject

    def check(self, identifier: str) -> None:
        """Raise if the options do not go together."""
        details = bool(self.leave_found or self.blank or self.because)
        if (self.asked or details) and not identifier:
            raise ConfigError("say on which object, by the beginning of its id: ID is missing")
        if self.release and self.reject:
            raise ConfigError("--release and --reject together; expected one of them")
        if details and not self.asked:
            raise ConfigError("say what you decide: --release or --reject")
        if self.reject and (self.blank or self.leave_found):
            raise ConfigError("--reject keeps nothing: --blank and --leave-found go with --release")

    def decision(self, by: str) -> Decision:
        from client.intake.decision import Decision
        from deploy.intake_review import parsed_box

        verdict: Literal["release", "reject"] = "release" if self.release else "reject"
        boxes = tuple(map(parsed_box, self.blank))
        found = not self.leave_found
        return Decision(verdict, boxes, found=found, by=_person(by), why=self.because)


def _list(desk: Desk, queue: Queue | None, rows: int) -> None:
    """A queue, or all decisions."""
    from deploy import intake_review

    if queue is None:
        _show(intake_review.decisions(desk))
    else:
        _show(intake_review.overview(desk, queue, rows))


def _one(desk: Desk, identifier: str, said: Decision | None, *, sure: bool) -> None:
    """One object, and what is said of it."""
    from deploy.intake_review import Case, one

    case = Case.of(desk, desk.find(identifier))
    _show(one(case))
    if said is not None:
        _decide(desk, case, said, sure=sure)


def _queue(name: str) -> Queue:
    from deploy.intake_review import Queue

    try:
        return Queue(name)
    except ValueError:
        raise ConfigError(f"--list {name!r}; expected one of {', '.join(Queue)}") from None


def _opener(
    cohort: Path, node: Path | None, site_key: Path | None, cohort_key: Path | None
) -> Callable[[], Desk]:
    """Opens the desk of an intake that was begun; no key is made."""
    from client.intake.desk import JOURNAL, Desk
    from client.intake.take import desk_of
    from deploy.cli_take import means_of

    path = desk_of(cohort)
    if not (path / JOURNAL).is_file():
        raise ConfigError(
            f"{path}: no desk of an intake; give the cohort as `cloister intake run` was given it"
        )
    means = means_of(path, node, None, site_key, cohort_key)
    return lambda: Desk(path, means.key, means.cohort_key)


def _decide(desk: Desk, case: Case, said: Decision, *, sure: bool) -> None:
    from deploy.intake_review import decide, in_words

    if not sure and not sys.stdin.isatty():
        raise ConfigError("nobody can be asked here; say --yes if you are sure")
    if not sure and not typer.confirm(f"Record for {said.by}: {in_words(said)}?"):
        console.print(Text("Nothing was recorded.", style="bold"))
        raise typer.Exit(1)
    done = decide(desk, case, said)
    line = f"Recorded by {done.by}: {in_words(done)}. The next `cloister intake run` acts on it."
    console.print(Text(line, style="bold"))


def _serve(open_desk: Callable[[], Desk], by: str, first: str, port: int) -> None:
    if importlib.util.find_spec("jinja2") is None:
        raise ConfigError("--page needs jinja2: pip install jinja2")
    from deploy.intake_page import Page

    with Page(open_desk, by or _login(), named=bool(by), first=first, port=port) as page:
        console.print("The review, for a browser on this machine; this address opens once:")
        console.print(page.address, soft_wrap=True, markup=False, highlight=False)
        console.print(Text("Ctrl-C ends it; so does half an hour without a click.", style="dim"))
        try:
            page.serve()
        except KeyboardInterrupt:
            console.print()
    console.print("The page is closed. `cloister intake run` acts on what was decided.")


def _show(parts: Iterable[RenderableType]) -> None:
    for part in parts:
        console.print(part)


def _login() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):
        return ""


def _person(by: str) -> str:
    named = by.strip() or _login()
    if not named:
        raise ConfigError("nobody is logged in here; say who decides with --by")
    return named
