"""The `cloister` command: one group of commands for each of the three people who use it."""

from __future__ import annotations

import logging
import os
import shlex
import signal
from importlib.metadata import version
from pathlib import Path
from types import FrameType
from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text

QUIET = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"}
os.environ.update(QUIET)  # law 8: before anything of Flower is imported

from common.errors import CloisterError  # noqa: E402
from deploy.cli_coordinator import coordinator_app  # noqa: E402
from deploy.cli_generate import generate  # noqa: E402
from deploy.cli_intake import intake_app  # noqa: E402
from deploy.cli_model import export, verify_model  # noqa: E402
from deploy.cli_node import node_app  # noqa: E402
from deploy.cli_optimise import optimise  # noqa: E402
from deploy.cli_predict import predict  # noqa: E402
from deploy.screen import printable  # noqa: E402
from deploy.workers import fork_server  # noqa: E402

app = typer.Typer(
    name="cloister",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    help="Federated learning for medical imaging, with patient-level differential privacy.",
    epilog="A first run: `cloister demo`. On your own data: `cloister intake --help`, then "
    "`cloister simulate run.toml`.",
)
spec_app = typer.Typer(no_args_is_help=True, help="Look at a run's description before it runs.")
app.add_typer(intake_app, name="intake")
app.add_typer(node_app, name="node")
app.add_typer(coordinator_app, name="coordinator")
app.add_typer(spec_app, name="spec")
app.command()(generate)
app.command()(predict)
app.command()(export)
app.command()(verify_model)
app.command()(optimise)

console = Console()


def _show_version(wanted: bool) -> None:
    if wanted:
        console.print(f"cloister {version('cloister')}", highlight=False)
        raise typer.Exit


@app.callback()
def options(
    _: Annotated[
        bool,
        typer.Option(
            "--version", callback=_show_version, is_eager=True, help="Show the version, and end."
        ),
    ] = False,
) -> None:
    """What holds for the whole command line."""


@app.command()
def demo(
    folder: Annotated[
        Path, typer.Argument(help="Where hospitals, cohorts and the run are put.")
    ] = Path("demo"),
) -> None:
    """Three synthetic hospitals train one network together, from DICOM to report."""
    fork_server()  # it imports while we do
    from deploy import simulation
    from deploy.demo import prepare_demo

    run_file = prepare_demo(folder, console)
    report = conduct(simulation.prepare(run_file, folder / "runs"))
    _show_report(report)


@app.command()
def simulate(
    run: Annotated[
        Path | None, typer.Argument(help="The run's TOML file, with a [simulation] table.")
    ] = None,
    *,
    runs: Annotated[Path, typer.Option(help="Folder in which the run's folder is made.")] = Path(
        "runs"
    ),
    engine: Annotated[
        str, typer.Option(help="local: warm processes on this machine. ray: Flower's runtime.")
    ] = "local",
    workers: Annotated[
        int | None,
        typer.Option(
            min=0, help="Processes of the local engine; 0: all in one. Default: a site each."
        ),
    ] = None,
    model: Annotated[
        Path | None,
        typer.Option(help="A package, or a finished run's folder, at which [start] begins."),
    ] = None,
    resume: Annotated[
        Path | None, typer.Option(help="Go on with the killed run in this folder.")
    ] = None,
) -> None:
    """Run a whole federation on this machine, on your own cohorts.

    Example: `cloister simulate run.toml`, and after a crash
    `cloister simulate --resume runs/my-run-20260101-120000-ab12`.
    """
    if engine == "local":
        fork_server()  # it imports while we do
    from deploy import simulation

    if (run is None) == (resume is None):
        raise typer.BadParameter("give a run's TOML file, or --resume with a run's folder")
    if resume is not None and model is not None:
        raise typer.BadParameter("--model: a run that goes on has begun already; leave it out")
    if engine not in ("local", "ray"):
        raise typer.BadParameter(f"--engine {engine!r}: expected local or ray")
    if resume is not None:
        simulation.load(resume)  # what is no such folder is told before anything is shown
    folder = resume if resume is not None else simulation.prepare(run or Path(), runs, model)
    report = conduct(folder, engine=engine, workers=workers)
    _show_report(report)


def conduct(folder: Path, *, engine: str = "local", workers: int | None = None) -> Path:
    """Conduct the simulated run in `folder` before the person's eyes; returns its report."""
    from deploy import simulation
    from deploy.live import LiveObserver

    console.print(f"run folder: {folder}", highlight=False, markup=False, soft_wrap=True)
    chosen: simulation.Engine = "ray" if engine == "ray" else "local"
    try:
        with LiveObserver(console).showing() as observer:
            simulation.simulate(folder, engine=chosen, workers=workers, observer=observer)
    except (KeyboardInterrupt, Terminated):
        way_on = f"cloister simulate --resume {shlex.quote(str(folder))}"
        console.print(
            f"interrupted; go on with: {way_on}", highlight=False, markup=False, soft_wrap=True
        )
        raise
    summary(folder)
    return folder / "report.html"


def _show_report(report: Path) -> None:
    """Its address on a line of its own, unbroken: a terminal makes a link of it."""
    console.print(f"\nOpen the report: [bold]{report.resolve().as_uri()}", soft_wrap=True)


def summary(folder: Path) -> None:
    """Print what the run reached and what it cost."""
    from deploy.explain import outcome

    for part in outcome(folder):
        console.print(part)


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(help="A run's folder.", exists=True, file_okay=False)],
) -> None:
    """Write a run's report and model card again, from what its folder holds."""
    from common.package import refuse_unfinished
    from server.card import write_card
    from server.report import write_report

    refuse_unfinished(folder)
    write_card(folder)
    _show_report(write_report(folder))


@app.command()
def models() -> None:
    """List the networks that a run's file may name, with the tasks that take them."""
    from common.models import NETWORKS, names
    from common.tasks import TASKS, section_for

    takes = {task: section_for(task).NETWORK for task in TASKS}
    for name in names():
        tasks = (task for task, gives in takes.items() if gives == NETWORKS[name].gives)
        console.print(f"{name:<16}{', '.join(tasks)}", highlight=False)


@spec_app.command()
def explain(
    run: Annotated[Path, typer.Argument(help="The run's TOML file.")],
    declared_size: Annotated[
        list[int] | None,
        typer.Option(min=1, help="A site's declared size; may be given again for another site."),
    ] = None,
) -> None:
    """Say in words what a run will do, and what it will cost each site in epsilon.

    Sites come from the file's [simulation] table, or from --declared-size. Nothing is run.
    """
    from deploy.explain import explain_run

    for part in explain_run(run, declared_size or []):
        console.print(part)


class Terminated(SystemExit):
    """SIGTERM, or SIGHUP of a closed terminal.

    It unwinds the stack as Ctrl-C does, so that nothing started or half written here stays behind.
    """


def _terminate(number: int, _: FrameType | None) -> None:
    raise Terminated(128 + number)


def main() -> None:
    """Run the command line; an error of ours is one message, not a stack."""
    signal.signal(signal.SIGTERM, _terminate)
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # nohup's word holds
        signal.signal(signal.SIGHUP, _terminate)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    try:
        app(prog_name="cloister")
    except CloisterError as error:
        said = "\n".join(map(printable, str(error).split("\n")))
        shown = Text.assemble(("error:", "red"), f" {said}")  # its brackets are no markup
        Console(stderr=True).print(shown, soft_wrap=True)
        raise SystemExit(2) from None
