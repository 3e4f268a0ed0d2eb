"""`cloister coordinator start`, `launch`, `runs`, …: a federation at work."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from common.errors import RunError
from deploy.screen import printable

if TYPE_CHECKING:  # each command imports what it needs: --help answers at once
    from deploy.live import LiveObserver
    from server.roster import Roster
    from server.runs import CoordinatorHome, Run

HOME_VARIABLE = "CLOISTER_COORDINATOR_HOME"
_LOOK_SECONDS = 0.25
_MARKS = {True: ("ok", "green"), False: ("!!", "red"), None: ("--", "yellow")}

console = Console()

HomeOption = Annotated[
    Path, typer.Option("--home", envvar=HOME_VARIABLE, help="The coordinator's folder.")
]
RunArgument = Annotated[str, typer.Argument(help="The run's name, as `runs` lists it.")]


def start(
    home: Annotated[
        Path, typer.Argument(envvar=HOME_VARIABLE, help="The coordinator's folder.")
    ] = Path(),
    *,
    listen: Annotated[
        str, typer.Option(help="The address of this machine on which nodes are heard.")
    ] = "0.0.0.0",  # noqa: S104 - who may speak is decided by certificate
    port: Annotated[
        int | None,
        typer.Option(
            min=1, max=65535, help="Nodes' port.", show_default="the one that nodes were told"
        ),
    ] = None,
    health_port: Annotated[
        int,
        typer.Option(
            min=0, max=65535, help="Answer gRPC health probes on loopback at this port; 0: don't."
        ),
    ] = 0,
    most_runs: Annotated[int, typer.Option(min=1, help="Runs at once; others wait.")] = 4,
) -> None:
    """Serve the federation: hear the nodes, and conduct the runs that were launched.

    It runs until it is ended (Ctrl-C, SIGTERM). Started again, it goes on with every run that is
    not over, at its last finished round. It needs no passphrase. A new roster or certificate is
    taken while it runs.

    Example: `cloister coordinator start federation`
    """
    from server import coordinator, fleet
    from server.coordinator import Settings, run_service
    from server.roster import Roster
    from server.runs import open_home

    found = open_home(home)
    chosen = port or int(Roster(found.path).content().address.rpartition(":")[2])
    settings = Settings(listen, chosen, health_port, most_runs)
    for log in (coordinator.log, fleet.log):
        log.setLevel(logging.INFO)
    _quieten_flower()
    run_service(found, settings, lambda heard: _say(f"Nodes are heard on {listen} port {heard}."))
    _say("The service has ended. Its runs go on when it is started again.")


def launch(
    run_file: Annotated[Path, typer.Argument(help="The run's TOML file.")],
    *,
    home: HomeOption = Path(),
    model: Annotated[
        Path | None,
        typer.Option(help="A package, or a finished run's folder, at which [start] begins."),
    ] = None,
    follow: Annotated[
        bool, typer.Option("--follow/--detach", help="Watch it until it is over.")
    ] = True,
) -> None:
    """Check a run, put it into the queue, and watch it. Ctrl-C ends the watching, not the run.

    The operator's held-out cohort lies in HOME/evaluation; each round is evaluated on it.

    Example: `cloister coordinator launch run.toml --home federation`
    """
    from server.coordinator import is_served
    from server.launch import launch as put_into_queue
    from server.runs import open_home

    found = open_home(home)
    run = put_into_queue(found, run_file, model)
    _say(f"{run.name} is in the queue; its folder is {run.path}")
    if not is_served(found):
        _say("No service runs on this home: `cloister coordinator start` begins with it.")
    elif follow:
        _follow(found, run)


def watch(run: RunArgument, *, home: HomeOption = Path()) -> None:
    """Watch a run until it is over. Ctrl-C ends the watching, not the run.

    Example: `cloister coordinator watch chest-20260711-093000-8f2c`
    """
    from server.runs import open_home

    found = open_home(home)
    _follow(found, found.run(run))


def runs(*, home: HomeOption = Path()) -> None:
    """List the runs, and how each stands.

    Example: `cloister coordinator runs --home federation`
    """
    from server.runs import open_home

    table, why = Table(Column("run", no_wrap=True), "stands", "rounds", "since"), []
    for run in open_home(home).all_runs():
        state = run.state
        rounds = f"{run.finished_rounds} of {run.spec.rounds}"
        since = f"{state.since:%Y-%m-%d %H:%M}"
        table.add_row(run.name, state.standing, rounds, since)
        if state.reason:
            why.append(f"{run.name}: {state.reason}")
    console.print(table)
    for line in why:  # below: a command in it is to be copied whole
        _say(line)


def status(*, home: HomeOption = Path()) -> None:
    """Say whether the service runs, and which sites are connected, and since when others are not.

    Example: `cloister coordinator status --home federation`
    """
    from server.coordinator import is_served
    from server.link import Exchange
    from server.members import Enrolled
    from server.roster import Roster
    from server.runs import open_home

    found = open_home(home)
    served = is_served(found)
    _say("The service runs." if served else "The service does not run.")
    table = Table("site", "is")
    _quieten_flower()
    roster = Roster(found.path)
    left = Exchange(found.database).left if found.database.exists() else _nobody_yet(roster)
    members = Enrolled(roster, left)
    for name in sorted(members.names()):
        known = members.absent(name) or ("" if served else "not known: nobody hears it")
        table.add_row(name, Text(known or "connected", style="yellow" if known else "green"))
    console.print(table)
    runs(home=home)
    if not served:
        raise typer.Exit(1)


def stop(run: RunArgument, *, home: HomeOption = Path()) -> None:
    """End a run for good: its sites are told, and its result is that of its last round.

    It cannot be resumed. To pause a run, end the service.

    Example: `cloister coordinator stop chest-20260711-093000-8f2c`
    """
    from server.runs import OVER, open_home

    found = open_home(home).run(run)
    if found.state.standing in OVER:
        raise RunError(f"run {run} is {found.state.standing} already")
    found.ask("stop")
    _say("It ends as soon as the service has told its sites.")


def resume(
    run: RunArgument,
    *,
    home: HomeOption = Path(),
    follow: Annotated[
        bool, typer.Option("--follow/--detach", help="Watch it until it is over.")
    ] = True,
) -> None:
    """Go on with a run that failed, at its last finished round, when the cause is mended.

    Example: `cloister coordinator resume chest-20260711-093000-8f2c`
    """
    from server.coordinator import is_served
    from server.runs import OPEN, OVER, Standing, open_home

    home_found = open_home(home)
    found = home_found.run(run)
    standing = found.state.standing
    if standing in OVER:
        raise RunError(f"run {run} is {standing}; launch a new one")
    if standing in OPEN - {Standing.WAITING}:
        raise RunError(f"run {run} is {standing}: there is nothing to resume")
    told = found.told
    found.ask("resume")
    if not is_served(home_found):
        _say("No service runs on this home: `cloister coordinator start` goes on with it.")
    elif follow:
        _follow(home_found, found, told)


def report(run: RunArgument, *, home: HomeOption = Path()) -> None:
    """Write a run's report and model card again, from what its folder holds.

    Example: `cloister coordinator report chest-20260711-093000-8f2c`
    """
    from common.package import refuse_unfinished
    from server.card import write_card
    from server.report import write_report
    from server.runs import open_home

    folder = open_home(home).run(run).path
    refuse_unfinished(folder)
    write_card(folder)
    _show_report(write_report(folder))


def doctor(*, home: HomeOption = Path()) -> None:
    """Check all that a run needs here, and say what to mend.

    Example: `cloister coordinator doctor --home federation`
    """
    from server.doctor import examined
    from server.runs import open_home

    found = list(examined(open_home(home)))
    for finding in found:
        mark, style = _MARKS[finding.well]
        line = Text.assemble((f"{mark}  ", style), printable(f"{finding.what}: {finding.said}"))
        console.print(line, soft_wrap=True)
    if any(finding.well is False for finding in found):
        raise typer.Exit(1)


def register(app: typer.Typer) -> None:
    """Add the commands to `cloister coordinator`."""
    for command in (start, launch, watch, runs, status, stop, resume, report, doctor):
        app.command()(command)


# --- What they share ----------------------------------------------------------------------------


def _quieten_flower() -> None:
    """What it warns of is logged once, as ours is; what it opens is not told."""
    flower = logging.getLogger("flwr")
    flower.setLevel(logging.WARNING)
    flower.handlers.clear()


def _nobody_yet(roster: Roster) -> Callable[[], Mapping[str, str]]:
    """When each site was last seen to go, where no service ran yet: none has ever connected."""
    return lambda: {site.name: "" for site in roster.sites()}


def _follow(home: CoordinatorHome, run: Run, start: int = 0) -> None:
    """Show a run until it is over, or the person has seen enough; `start` as of a `Follower`."""
    from deploy.live import LiveObserver
    from server.runs import OPEN, Standing

    try:
        with LiveObserver(console).showing() as observer:
            _tell(home, run, observer, start)
    except KeyboardInterrupt:
        _say(f"The run goes on: `cloister coordinator watch {run.name}`")
        return
    state = run.state
    if state.standing in OPEN:
        raise RunError(f"the service has ended; run {run.name} goes on when it is started again")
    if state.standing is Standing.FAILED:
        raise RunError(f"{state.reason}\ngo on with it: `cloister coordinator resume {run.name}`")
    if (run.path / "report.html").exists():
        from deploy.explain import outcome

        for part in outcome(run.path):
            console.print(part)
        _show_report(run.path / "report.html")
    _say(f"{run.name} is {state.standing}. {state.reason}")


def _tell(home: CoordinatorHome, run: Run, observer: LiveObserver, start: int) -> None:
    from server.coordinator import is_served
    from server.runs import OPEN, Follower

    follower = Follower(run, observer, start)
    while True:
        over = run.state.standing not in OPEN and not run.asked("resume")
        gone = not is_served(home)
        follower.follow()
        if over or gone:
            return
        time.sleep(_LOOK_SECONDS)


def _say(text: str) -> None:
    console.print(Text(printable(text)), soft_wrap=True)


def _show_report(path: Path) -> None:
    console.print(f"\nOpen the report: [bold]{path.resolve().as_uri()}", soft_wrap=True)
