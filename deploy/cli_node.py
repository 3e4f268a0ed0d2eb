"""`cloister node`: what a hospital's security officer does with a node."""

from __future__ import annotations

import getpass
import importlib.util
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer
from rich.console import Console, RenderableType
from rich.progress import track
from rich.text import Text

from common.errors import ConfigError, Refusal
from deploy.cli_fine_tune import fine_tune
from deploy.cli_join import join, renew, request
from deploy.cli_listen import listen
from deploy.cli_node_service import doctor, start, status
from deploy.screen import printable

if TYPE_CHECKING:  # each command imports what it needs: --help answers at once
    from client.approval import Asked
    from client.book import Book, Limit
    from client.folder import NodeFolder
    from client.ledger import Ledger, Signed
    from common.spec import RunSpec
    from deploy.node_budget import Figures
    from deploy.node_review import State

HOME_VARIABLE = "CLOISTER_NODE_HOME"

node_app = typer.Typer(
    name="node",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    help="Set up, check, approve, watch and audit a hospital's node.",
    epilog="In this order: `init`, `check`, `admit`; then `requests`, `show`, `approve` for each "
    "run that asks; `budget` and `audit` at any time. A node's folder is HOME: an argument, or "
    f"`--home`, or the variable {HOME_VARIABLE}, or the current folder.",
)
console = Console()

HomeArgument = Annotated[
    Path, typer.Argument(envvar=HOME_VARIABLE, help="The node's folder.", show_default="here")
]
HomeOption = Annotated[
    Path, typer.Option("--home", "--node", envvar=HOME_VARIABLE, help="The node's folder.")
]
ReasonOption = Annotated[str, typer.Option(help="Why; it is booked in the ledger for good.")]
ByOption = Annotated[
    str, typer.Option(help="Who decides.", show_default="the user who is logged in")
]
DigestArgument = Annotated[
    str, typer.Argument(help="The beginning of a run's digest, as `requests` or `budget` show it.")
]


@node_app.command()
def init(
    home: Annotated[Path, typer.Argument(help="The node's new folder.")],
    *,
    site: Annotated[str, typer.Option(help="The public name of the site.")],
    declared_size: Annotated[
        int,
        typer.Option(
            min=1,
            help="The public, rounded number of patients that you choose to state. Nothing "
            "derives it from the data, and nothing should.",
        ),
    ],
    epsilon: Annotated[float, typer.Option(help="The budget for the site's whole life.")],
    delta: Annotated[float, typer.Option(help="Its delta, below 1 / declared size.")],
    cohort: Annotated[
        Path | None, typer.Option(help="A cohort whose public description fills [data].")
    ] = None,
    cohort_key: Annotated[
        Path | None, typer.Option(help="The file of its key, if that cohort is sealed.")
    ] = None,
    by: ByOption = "",
) -> None:
    """Make a node: a commented node.toml on the safe side, its key, and an empty ledger.

    As it is made, the node takes part in nothing: name operators and networks in node.toml,
    then see what it means with `cloister node check`.

    Example: `cloister node init north --site north --declared-size 400 --epsilon 8
    --delta 1e-5 --cohort cohorts/chest`
    """
    from deploy.node_setup import NewNode, set_up

    new = NewNode(site, declared_size, epsilon, delta, cohort, cohort_key)
    set_up(home, new, by=_by(by))
    _say(f"{home} is a node now: node.toml, node.key, an empty ledger and its witness.")
    _say("Keep a copy of node.key apart from this machine: without it nothing can be read.")
    _say(f"Next: name operators and networks in {home / 'node.toml'}, then")
    _say(f"      cloister node check {home}")


@node_app.command()
def check(
    home: Annotated[
        Path,
        typer.Argument(
            envvar=HOME_VARIABLE, help="A node's folder, or a node.toml.", show_default="here"
        ),
    ] = Path(),
    run: Annotated[Path | None, typer.Argument(help="A run's TOML file.")] = None,
) -> None:
    """Say in plain language what this node would and would not do, and what a run would cost.

    Every limit is a sentence, also those at their default. What is said of the cohort is for
    this screen alone. Ends with 0 if all is well (for a run: yes, or it would wait for a
    person), with 1 if not.

    Example: `cloister node check north run.toml`
    """
    from deploy import node_pages, node_review

    node = _folder_or_file(home)
    found = node_review.state(node)
    if run is None:
        good = _check_node(node, found)
    else:
        from common.spec import read_run_file

        spec = read_run_file(run).spec
        judged = node_review.review(node, spec, found.book, found.cohort)
        _show(node_pages.run_page(spec, judged))
        _show(node_pages.verdict(judged))
        good = judged.answer != "no"
        if not found.set_up:
            _say("No node is set up there: reckoned as if nothing was spent.")
        if found.bad:
            _show(node_pages.findings("What stands in the way", found.bad))
    if found.bad or not good:
        raise typer.Exit(1)


def _check_node(node: NodeFolder, found: State) -> bool:
    """The page of a whole node; whether it would take part in anything."""
    from deploy import node_pages, node_words

    policy = node.policy
    _say(f"{policy.site}, as {node.path / 'node.toml'} has it", bold=True)
    _show(node_pages.paragraphs(node_words.explained(policy)))
    _show(node_pages.findings("The node", found.node))
    _show(node_pages.findings("The cohort; for this screen alone", found.data))
    notes = [*node_words.warnings(policy), *found.notes]
    if notes:
        _say("Attention", bold=True)
        _show([node_pages.bullets(notes, "!", "yellow")])
    idle = list(node_words.idle(policy))
    if idle:
        _say("No run could be taken", bold=True)
        _show([node_pages.bullets(idle, "✗", "red")])
    takes = not idle and not found.bad
    if takes and not found.set_up:
        _say("No node is set up here: this is what the file would mean.", style="bold yellow")
    elif takes:
        _say("This node takes part in runs within these limits.", style="bold green")
    else:
        _say("It takes part in nothing before what is marked ✗ is settled.", style="bold red")
    return takes


@node_app.command()
def admit(home: HomeArgument = Path(), *, reason: ReasonOption, by: ByOption = "") -> None:
    """Take responsibility for the cohort as it is now; the node trains on no other.

    Every image is compared with its SHA-256; the cohort has to be the one that [data] describes,
    with enough patients and more than one class. If it changes later, the node asks again.

    Example: `cloister node admit north --reason "checked against the register"`
    """
    from client.folder import cohort_digest
    from deploy import node_pages, node_review

    node, signed = _folder(home), _signed(by, reason)
    ledger = _sound(node)
    digest = cohort_digest(node.cohort_path)
    found = list(node_review.examine(node))
    _show(node_pages.findings("The cohort; for this screen alone", found))
    bad = [text for good, text in found if not good]
    if bad:
        _show(node_pages.data_as_it_is(node))
        _no("not admitted, nothing was booked", " ".join(bad))
    cohort = node.open_cohort()
    for _ in track(cohort.verified(), "Comparing images", len(cohort), console=console):
        pass
    ledger.admit(digest, signed)
    _say(f"Admitted by {signed.by}: the cohort with the digest {digest}.")


@node_app.command()
def requests(home: HomeArgument = Path()) -> None:
    """List the runs that wait for a person, and the part of the budget that each would take.

    Example: `cloister node requests north`
    """
    from client.folder import cohort_digest
    from deploy import node_pages, node_review

    node = _folder(home)
    waiting = node.requests.waiting()
    _tell_of_odd_requests(node)
    if not waiting:
        _say("No run waits.")
        return
    book, cohort = _sound(node).book, cohort_digest(node.cohort_path)
    judged = [(spec, node_review.review(node, spec, book, cohort)) for spec in waiting]
    _show([node_pages.waiting(judged)])
    _say("Look at one with `cloister node show DIGEST`.")


@node_app.command()
def show(digest: DigestArgument, home: HomeOption = Path()) -> None:
    """Show everything that a person needs to decide about a run, or what became of it.

    Example: `cloister node show 3f2a9c --home north`
    """
    from client.folder import cohort_digest
    from deploy import node_pages, node_review

    node = _folder(home)
    book = _sound(node).book
    spec = _waiting(node, digest)
    if spec is None:
        found = _known(book, digest)
        (share,) = (run for run in _figures(node, book).runs if run.digest == found)
        _show(node_pages.known_run(book, found, share))
        return
    judged = node_review.review(node, spec, book, cohort_digest(node.cohort_path))
    _show(node_pages.whole_page(spec, judged))


@node_app.command()
def approve(
    digest: DigestArgument,
    home: HomeOption = Path(),
    *,
    reason: ReasonOption,
    by: ByOption = "",
    shown: Annotated[
        str, typer.Option(help="Only if it is still this approval digest, as `show` printed it.")
    ] = "",
    yes: Annotated[
        bool, typer.Option("--yes", help="Whatever holds now, without being asked.")
    ] = False,
) -> None:
    """Say yes to a run that waits, and set what it costs aside: both, or neither.

    What is approved is this version of Cloister, the run, the cohort and the cost together; if one
    of them changes, the run waits again. You are shown it once more, and asked; where nobody can
    be asked, say `--shown` with what you were shown, or `--yes`.

    Example: `cloister node approve 3f2a9c --home north --reason "ethics 2026-114"`
    """
    from client.approval import beginning
    from client.folder import cohort_digest
    from client.gate import lapse
    from common.clock import Clock
    from deploy import node_pages, node_review

    node, signed = _folder(home), _signed(by, reason)
    ledger = _sound(node)
    _tell_of_odd_requests(node)
    spec = node.requests.find(digest)
    if shown:
        shown = beginning(shown)
    elif not yes and not sys.stdin.isatty():
        raise ConfigError(
            "nobody can be asked here: say --shown DIGEST with the approval digest that `cloister "
            "node show` printed, or --yes for whatever holds now"
        )
    lapse(ledger, node.policy, Clock())
    judged = node_review.review(node, spec, ledger.book, cohort_digest(node.cohort_path))
    _show(node_pages.whole_page(spec, judged))
    if judged.asked is None or judged.objections:
        _no(_NOT_APPROVED, "; ".join(judged.objections))
    elif not judged.asked.digest.startswith(shown):
        _no(_NOT_APPROVED, f"the approval digest is {judged.asked.digest} now")
    elif not (shown or yes or typer.confirm("Say yes to this?")):
        _no(_NOT_APPROVED, "you did not say yes")
    else:
        _approve(node, ledger, judged.asked, signed)
        _say(f"{judged.part:.1%} of the budget is set aside.")


_NOT_APPROVED = "not approved, nothing was booked"


def _approve(node: NodeFolder, ledger: Ledger, asked: Asked, signed: Signed) -> None:
    """Book the yes and set the run aside, or say why not."""
    run, shares, policy = asked.spec.digest, asked.shares, node.policy
    try:
        ledger.approve(asked, signed, allow=lambda book: policy.check_earmark(book, run, shares))
    except Refusal as refusal:
        _no(_NOT_APPROVED, refusal.detail)
    node.requests.drop(asked.spec)
    _say(f"Approved by {signed.by}: {asked.spec.name}.")
    _say(f"approval {asked.digest}")


@node_app.command()
def deny(
    digest: DigestArgument, home: HomeOption = Path(), *, reason: ReasonOption, by: ByOption = ""
) -> None:
    """Say no to a run: one that waits, or one that is open, which is closed then.

    A no is for good; the operator may launch the run anew.

    Example: `cloister node deny 3f2a9c --home north --reason "not our question"`
    """
    node, signed = _folder(home), _signed(by, reason)
    ledger = _sound(node)
    spec = _waiting(node, digest)
    run = spec.digest if spec else _known(ledger.book, digest)
    name = spec.name if spec else ledger.book.run(run).name
    ledger.decide(run, approved=False, approval="", signed=signed, name=name)
    ledger.close(run, signed)
    if spec:
        node.requests.drop(spec)
    _say(f"Denied by {signed.by}: {name}. Nothing is set aside for it.")


@node_app.command()
def close(
    run: DigestArgument, home: HomeOption = Path(), *, reason: ReasonOption, by: ByOption = ""
) -> None:
    """End a run here for good: what is set aside for it is free, its kept releases are dropped.

    Its coordinator does this when a run is over; do it for one that has forgotten.

    Example: `cloister node close 3f2a9c --home north --reason "the study has ended"`
    """
    node, signed = _folder(home), _signed(by, reason)
    ledger = _sound(node)
    digest = _known(ledger.book, run)
    known = ledger.book.run(digest)
    if known.state not in ("open", "lapsed"):
        raise ConfigError(f"run {known.name!r} is {known.state or 'not set aside'}; nothing to end")
    ledger.close(digest, signed)
    _say(f"Closed by {signed.by}: {known.name}.")


@node_app.command()
def page(
    run: DigestArgument,
    file: Annotated[Path, typer.Argument(help="The page to write.")] = Path("run.html"),
    home: HomeOption = Path(),
) -> None:
    """Write what happened in a run here, round by round: for this hospital alone.

    Losses and numbers of patients never leave with a release; do not send this page outside.

    Example: `cloister node page 3f2a9c run.html --home north`
    """
    from client.diary import Diary
    from deploy.node_run import run_at_site, write_page

    node = _folder(home)
    book = node.ledger().book
    digest = _known(book, run)
    write_page(file, run_at_site(book, digest, Diary(node.path / "runs").read(digest)))
    console.print(f"The page: {file.resolve().as_uri()}", soft_wrap=True, highlight=False)


@node_app.command()
def budget(
    home: HomeArgument = Path(),
    picture: Annotated[
        Path | None, typer.Option(help="Write a figure to this file, .svg or .png.")
    ] = None,
    pld: Annotated[
        bool, typer.Option("--pld", help="Reckon PLD also where it takes a while.")
    ] = False,
) -> None:
    """Show what was spent, set aside, carried over, and what is left: in all, by run, over time.

    What counts is the filter's figure, which holds when runs are chosen by earlier results.
    Beside it stands what PLD gives for the same history, had it been fixed in advance.

    Example: `cloister node budget north --picture budget.svg`
    """
    from deploy import node_pages
    from deploy.node_budget import fixed_in_advance

    node = _folder(home)
    ledger = node.ledger()
    book = ledger.book
    figures = _figures(node, book)
    fixed = fixed_in_advance(book, figures.limit, however_long=pld)
    _show(node_pages.budget_page(node.policy, figures, fixed))
    if book.halted:
        _say(f"This node is halted: {book.halted}. See `cloister node audit`.", style="bold red")
    if picture is not None:
        _draw(picture, node, ledger, figures)


def _draw(picture: Path, node: NodeFolder, ledger: Ledger, figures: Figures) -> None:
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError("--picture needs matplotlib: pip install matplotlib")
    from deploy import node_picture

    points = node_picture.timeline(list(ledger.entries()), figures)
    node_picture.draw(picture, node.policy.site, figures, points)
    _say(f"The picture is in {picture}.")


@node_app.command()
def audit(
    home: HomeArgument = Path(),
    witness: Annotated[
        list[str] | None,
        typer.Option(help="A witness from elsewhere: a log, or the coordinator's record."),
    ] = None,
    decisions: Annotated[
        bool, typer.Option("--decisions", help="List what people decided: when, who, why.")
    ] = False,
) -> None:
    """Verify every entry of the ledger, and compare it with every witness at hand.

    The first entry that is not as this node wrote it is named. Ends with 1 if anything is wrong.
    With --decisions, every admission, yes, no, end, budget and recovery, with who and why.

    Example: `cloister node audit north --witness "$(tail -n 1 /mnt/log/north.witness)"`
    """
    from client import recovery
    from deploy import node_pages

    node, given = _folder(home), witness or []
    standing = recovery.inspect(node, given)
    _show(node_pages.standing_page(standing, node, given))
    if decisions and standing.ledger is not None:
        _show(node_pages.decisions(standing.ledger.entries(), up_to=standing.book.last))
    if not standing.sound:
        raise typer.Exit(1)


@node_app.command(name="set-budget")
def set_budget(home: HomeArgument = Path(), *, reason: ReasonOption, by: ByOption = "") -> None:
    """Book the [budget] of node.toml as the lifetime budget.

    Once something is spent only epsilon may change: the filter holds at the delta and the order
    that were fixed before. What was spent stays spent.

    Example: `cloister node set-budget north --reason "board decision 12/2026"`
    """
    node, signed = _folder(home), _signed(by, reason)
    ledger = _sound(node)
    written, booked = node.policy.budget, ledger.book.limit
    if written is None:
        raise ConfigError(f"{node.path}: node.toml has no budget")
    if written.limit == booked:
        _say(f"{_limit(written.limit)} is booked already; nothing to do.")
        return
    ledger.set_budget(written.limit, signed)
    before = _limit(booked) if booked else "nothing"
    _say(f"Booked by {signed.by}: {_limit(written.limit)}; before: {before}.")
    _say(f"{_figures(node, ledger.book).left:.1%} of it is left.")


@node_app.command()
def recover(
    home: HomeArgument = Path(),
    *,
    reason: ReasonOption,
    by: ByOption = "",
    spent: Annotated[
        float | None,
        typer.Option(
            min=0.0,
            help="The epsilon that this site has spent over its whole life, as you sign for it: "
            "the filter's figure, as `budget` showed it, not the lower one by PLD. Without it the "
            "whole budget counts as spent.",
        ),
    ] = None,
    witness: Annotated[
        list[str] | None,
        typer.Option(help="A witness from elsewhere: a log, or the coordinator's record."),
    ] = None,
    new_key: Annotated[
        bool,
        typer.Option(
            "--new-key",
            help="Make a new node.key, where the old one is lost or others have read it. Kept "
            "releases and the old ledger can never be read again without the old one.",
        ),
    ] = False,
) -> None:
    """Go on after the ledger was lost, damaged, put back in time, or halted.

    Look with `cloister node audit` first; a true copy that you can put back is always better.
    Nobody can know what was spent in entries that are gone, so the whole lifetime budget counts
    as spent, unless you sign for less with `--spent`; never for less than can still be read.
    Nothing is deleted: a damaged ledger is moved aside. Stop the node before, and start it after.

    Example: `cloister node recover north --reason "disk lost; budget showed 4 before" --spent 4`
    """
    from client import recovery
    from deploy import node_pages

    node, signed = _folder(home), _signed(by, reason)
    done = recovery.recover(node, signed, spent=spent, tokens=witness or [], new_key=new_key)
    _show(node_pages.recovered_page(done, f"{node.policy.budget and node.policy.budget.epsilon:g}"))


# --- What the commands share --------------------------------------------------------------------


def _show(parts: Iterable[RenderableType]) -> None:
    for part in parts:
        if isinstance(part, str):  # to be copied: never broken
            console.print(part, soft_wrap=True, markup=False, highlight=False)
        else:
            console.print(part)


def _say(text: str, *, bold: bool = False, style: str = "") -> None:
    console.print(Text(text, style="bold" if bold else style))


def _no(what: str, why: str) -> NoReturn:
    """End with what the node would not do."""
    console.print(Text.assemble((f"{what}: ", "bold red"), why))
    raise typer.Exit(1)


def _by(by: str) -> str:
    try:
        return by.strip() or getpass.getuser()
    except (OSError, KeyError) as error:
        raise ConfigError("nobody is logged in here; say who decides with --by") from error


def _signed(by: str, reason: str) -> Signed:
    from client.ledger import Signed

    if not reason.strip():
        raise ConfigError("--reason is empty; it is what the ledger will say in ten years")
    return Signed(_by(by), reason.strip())


def _folder(home: Path) -> NodeFolder:
    from client.folder import NodeFolder

    return NodeFolder.open(home)


def _folder_or_file(home: Path) -> NodeFolder:
    from client.folder import NodeFolder
    from client.policy import read_policy

    return NodeFolder.open(home) if home.is_dir() else NodeFolder(home.parent, read_policy(home))


def _sound(node: NodeFolder) -> Ledger:
    """The ledger, if a person's decision can be booked in it."""
    from client.rules import check_sound

    ledger = node.ledger()
    check_sound(ledger.book)
    return ledger


def _figures(node: NodeFolder, book: Book) -> Figures:
    from deploy.node_budget import figures

    if book.limit is None:
        raise ConfigError(f"{node.path}: no budget is booked; see `cloister node set-budget`")
    return figures(book, book.limit)


def _waiting(node: NodeFolder, start: str) -> RunSpec | None:
    """The run that waits under this digest; None if none does."""
    from client.approval import beginning

    begin = beginning(start)
    _tell_of_odd_requests(node)
    found = [spec for spec in node.requests.waiting() if spec.digest.startswith(begin)]
    return node.requests.find(start) if found else None


def _tell_of_odd_requests(node: NodeFolder) -> None:
    """Name the files among the requests that hold no run."""
    from deploy import node_pages

    faults = node.requests.faults()
    if faults:
        _show([node_pages.bullets(map(printable, faults), "!", "yellow")])


def _known(book: Book, start: str) -> str:
    """Digest of the run that the ledger knows by its beginning."""
    from client.approval import beginning

    begin = beginning(start)
    found = [digest for digest in book.runs if digest.startswith(begin)]
    if len(found) != 1:
        raise ConfigError(
            f"{start!r}: {len(found)} runs begin with it; `cloister node requests` and `cloister "
            "node budget` list them"
        )
    return found[0]


def _limit(limit: Limit) -> str:
    return f"epsilon {limit.epsilon:g} at delta {limit.delta:g}, order {limit.order:g}"


for command in (listen, request, join, renew, start, status, doctor):
    node_app.command()(command)
node_app.command(name="fine-tune")(fine_tune)
