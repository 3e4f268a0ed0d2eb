"""`cloister node listen`: what a hospital's PACS sends comes into an inbox."""

from __future__ import annotations

from contextlib import nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.text import Text

if TYPE_CHECKING:  # the command imports what it needs: --help answers at once
    from rich.status import Status

    from client.intake.listen import Listener
    from client.intake.reception import Listen

_EVERY = 1.0
"""Seconds between two looks at what is silent, and at what there is to show."""
_CLEAN_EVERY = 3600.0
console = Console()


def listen(
    home: Annotated[
        Path,
        typer.Argument(envvar="CLOISTER_NODE_HOME", help="The node's folder.", show_default="here"),
    ] = Path(),
    *,
    host: Annotated[
        str | None, typer.Option(help="Address to listen at, instead of node.toml's.")
    ] = None,
    keep_days: Annotated[
        int | None,
        typer.Option(min=1, help="Remove complete studies after so many days; else they stay."),
    ] = None,
) -> None:
    """Receive what a PACS or a scanner sends (DICOM C-STORE), into an inbox.

    Who may send stands in node.toml, `[listen]`, with this node's AE title and its certificate.
    A study is complete when nothing was added to it for a while; then it is in INBOX/complete, and
    `cloister intake run INBOX/complete COHORT` takes it in. Ends with Ctrl-C or SIGTERM: an
    object that is on its way may arrive, and no other one is begun.

    **These are originals, with every identity in them.** Only the names of the files say nothing.
    Keep the inbox on an encrypted disk, let this user alone read it, take it out of the backups,
    and say `--keep-days` or remove what was taken in. docs/pacs.md is for the PACS administrator.

    Example: `cloister node listen north --keep-days 14`
    """
    from client.folder import NodeFolder
    from client.intake.inbox import Inbox
    from client.intake.listen import Listener, bounds
    from common.errors import ConfigError
    from deploy.cli import Terminated

    node = NodeFolder.open(home)
    settings = node.policy.listen
    if settings is None:
        raise ConfigError(
            f"{home / 'node.toml'}: there is no table [listen]; expected an AE title, callers and "
            "a certificate, as docs/pacs.md shows them"
        )
    path = node.path / settings.inbox
    with Inbox.opened(path, bounds(settings), silence=settings.silence_seconds) as inbox:
        listener = Listener(settings, node.path, inbox, host)
        with listener.serving(), suppress(KeyboardInterrupt, Terminated):
            _say(opening(settings, host, listener.port))
            _say(f"Originals with identities come to {path}; complete ones are in {path}/complete.")
            _watch(listener, keep_days or settings.keep_days)
        _say(f"Stopped. {count(listener)}")


def opening(settings: Listen, host: str | None, port: int) -> str:
    """Where the node listens, by which name, for whom."""
    callers = ", ".join(caller.ae_title for caller in settings.callers)
    if settings.transport == "plain":
        how = "PLAIN TCP: whoever is on the way can read and change what is sent"
    elif settings.ask_callers_for == "certificate":
        how = "TLS with a certificate of the caller"
    else:
        how = "TLS, callers show no certificate"
    where = f"{host or settings.address}:{port}"
    return f"{settings.ae_title} listens at {where} for {callers}; {how}."


def count(listener: Listener) -> str:
    """What came until now, in one line; nothing of it comes from an object."""
    from client.intake.inbox import Outcome, Trouble

    tally = listener.inbox.tally
    arriving, complete = listener.inbox.studies()
    refused = sum(tally[trouble] for trouble in Trouble)
    objects = sum(tally[outcome] for outcome in (Outcome.NEW, Outcome.VERSION))
    return (
        f"studies: {arriving} arriving, {complete} complete; objects: {objects} taken, "
        f"{tally[Outcome.AGAIN]} sent again, {tally[Outcome.VERSION]} with other content, "
        f"{refused} refused; connections: {listener.associations} now, "
        f"{sum(listener.turned_away.values())} turned away"
    )


def _watch(listener: Listener, keep_days: int | None) -> None:
    """Complete, clean and show, until somebody ends it."""
    inbox, clock = listener.inbox, listener.inbox.clock
    status = console.status("") if console.is_terminal else None
    shown, cleaned = "", -_CLEAN_EVERY
    with status or nullcontext():
        while True:
            inbox.settle()
            if keep_days is not None and clock.now() - cleaned >= _CLEAN_EVERY:
                cleaned = clock.now()
                inbox.expire(keep_days)
            line = count(listener)
            if line != shown:
                _show(status, line)
                shown = line
            clock.sleep(_EVERY)


def _show(status: Status | None, line: str) -> None:
    if status is None:
        _say(line)
    else:
        status.update(Text(line))


def _say(line: str) -> None:
    console.print(Text(line), soft_wrap=True)
