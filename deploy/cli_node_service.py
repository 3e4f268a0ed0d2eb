"""`cloister node start`, `status`, `doctor`: the node at work."""

from __future__ import annotations

import logging
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from common.errors import CloisterError
from deploy.screen import printable

if TYPE_CHECKING:  # each command imports what it needs: --help answers at once
    from client.doctor import Finding
    from client.folder import NodeFolder
    from client.health import Report

HEALTH = "127.0.0.1:9094"
_OLD = 60.0
console = Console()

HomeArgument = Annotated[
    Path,
    typer.Argument(envvar="CLOISTER_NODE_HOME", help="The node's folder.", show_default="here"),
]


def start(
    home: HomeArgument = Path(),
    *,
    health: Annotated[
        str,
        typer.Option(
            envvar="CLOISTER_NODE_HEALTH",
            help="Where the gRPC health service answers probes (`live`, `ready`), in plain text "
            "and with nothing but yes or no; 'none' for no such service.",
        ),
    ] = HEALTH,
) -> None:
    """Take part: connect to the coordinator, and answer what it asks, until somebody stops it.

    Outgoing connections alone are made, by TLS 1.3, to the address in the bundle that the node
    has joined with (through HTTPS_PROXY where that is set). SIGTERM or Ctrl-C stops the node: a
    round that is booked may finish for a minute; a second one stops it at once. Killed at any
    moment, it may be started again: nothing is spent twice, and nothing is lost but time.

    Ends with 0 if it was stopped, 77 if the coordinator refuses this site for good, 75 if another
    process runs the node, 78 if the folder is not in order, 65 if the ledger is not.

    Example: `cloister node start north`
    """
    from deploy.workers import fork_server

    fork_server("client.answering")  # it imports while we do
    from client.health import Watch
    from client.node import NodeService, exit_code
    from client.worker import log, log_to_stderr

    log_to_stderr()
    try:
        service = NodeService(home)
        takes, beginning = _beginning(service.folder)
        log.log(logging.INFO if takes else logging.WARNING, "%s", printable(beginning))
        service.run(Watch(service, None if health == "none" else health).watching())
    except CloisterError as error:
        shown = Text.assemble(("error:", "red"), f" {printable(str(error))}")
        Console(stderr=True).print(shown, soft_wrap=True)
        raise typer.Exit(exit_code(error)) from None


def status(
    home: HomeArgument = Path(),
    *,
    probe: Annotated[
        str, typer.Option(help="Say nothing, and end with 0 or 1: 'live' or 'ready'.")
    ] = "",
) -> None:
    """Show whether the node runs, whether it could answer now, and what stands in the way.

    Ends with 0 if it is ready, with 1 if not.

    Example: `cloister node status north`
    """
    from client.health import last_report
    from client.node import running

    if probe not in ("", "live", "ready"):
        raise typer.BadParameter(f"--probe {probe!r}: expected live or ready")
    process, found = running(home), last_report(home)
    age = _age(found) if found else 0.0
    current = process is not None and found is not None and age < _OLD
    good = bool(current and found and (found.live if probe == "live" else found.ready))
    if not probe:
        _show(process, found, age)
    raise typer.Exit(0 if good else 1)


def doctor(home: HomeArgument = Path()) -> None:
    """Look at everything between this node and its first run, and say what to mend.

    Name, port, TLS, clock, identity, roster, ledger, cohort, disk and device; nothing is changed.
    Ends with 0 if all is in order, with 1 if not.

    Example: `cloister node doctor north`
    """
    from client.doctor import examine
    from client.folder import NodeFolder

    good = True
    for finding in examine(NodeFolder.open(home)):
        _tell(finding)
        good = good and finding.good
    raise typer.Exit(0 if good else 1)


def _beginning(node: NodeFolder) -> tuple[bool, str]:
    """Whether a run could be taken; and who starts, where it goes, and why none could."""
    from client.credentials import Credentials
    from client.folder import cohort_digest
    from deploy.node_words import idle

    try:
        where = f"coordinator {Credentials.open(node.path).address}"
    except CloisterError:
        where = "in no federation yet (`cloister node join`)"
    lacking = [sentence.rstrip(".") for sentence in idle(node.policy)]
    ledger = node.ledger()
    try:
        if ledger.book.admitted != cohort_digest(node.cohort_path):
            lacking.append("the cohort is not admitted (`cloister node admit`)")
    finally:
        ledger.disconnect()
    why = f"; takes no run yet: {'; '.join(lacking)}" if lacking else ""
    return not lacking, f"{node.policy.site}, {where}{why}"


def _tell(finding: Finding) -> None:
    mark = ("✓", "green") if finding.good else ("✗", "bold red")
    text = Text.assemble(mark, f" {finding.what:<9}", printable(finding.text))
    console.print(text, soft_wrap=True)


def _age(found: Report) -> float:
    return (datetime.now(UTC) - datetime.fromisoformat(found.time)).total_seconds()


def _show(process: int | None, found: Report | None, age: float) -> None:
    if process is None:
        console.print("The node does not run.")
        if found is not None:
            console.print(f"It was {printable(found.phase)} last, {_span(age)} ago.")
        return
    if found is None or age > _OLD:
        console.print(f"Process {process} runs the node, and has said nothing for a while.")
        return
    table = Table.grid(padding=(0, 2))
    word = Text("ready", "bold green") if found.ready else Text("not ready", "bold red")
    table.add_row("node", Text.assemble(printable(found.site), ", ", word))
    table.add_row("process", f"{process}, {printable(found.phase)}")
    table.add_row("coordinator", _contact(found))
    table.add_row("certificate", f"{found.certificate_days:.0f} days left")
    table.add_row("disk", f"{found.free_bytes / 2**30:.1f} GiB free")
    console.print(table)
    for mark, style, lines in (("✗", "red", found.faults), ("!", "yellow", found.warnings)):
        for line in lines:
            console.print(Text.assemble((mark, style), " ", printable(line)), soft_wrap=True)


def _contact(found: Report) -> str:
    if found.contact_seconds is None:
        return "has not answered yet"
    skew = "" if found.skew_seconds is None else f", clock {found.skew_seconds:+.0f} s"
    return f"answered {_span(found.contact_seconds)} ago{skew}"


def _span(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = seconds / 60
    return f"{minutes:.0f} min" if minutes < 120 else f"{minutes / 60:.0f} h"
