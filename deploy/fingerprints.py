"""Two people compare a fingerprint on the phone, and only then a command goes on."""

from __future__ import annotations

import typer
from rich.console import Console
from rich.text import Text

from common.certificates import fingerprint, is_fingerprint
from common.errors import IdentityError
from deploy.screen import asking


def show(key: bytes, console: Console) -> None:
    """Show a key's fingerprint on a line of its own, to be read out."""
    console.print(Text(f"\n    {fingerprint(key)}\n", style="bold"), soft_wrap=True)


def confirm(what: str, key: bytes, typed: str, who: str, console: Console) -> None:
    """Have a person say that `who` has read the same fingerprint to them.

    Args:
        what: whose fingerprint it is.
        key: bytes of the key.
        typed: the fingerprint as it was read out, where it was given beforehand; else "".
        who: the one at the other end.
        console: where it is shown.

    Raises:
        IdentityError: if it is another one, or the person says no.
    """
    if typed:
        if not is_fingerprint(typed, key):
            raise IdentityError(
                f"{what} has the fingerprint {fingerprint(key)}, and not the one that was read "
                "to you: what came is not what was sent, or the wrong file was taken. Nothing "
                "was done; have it sent again by another way"
            )
        return
    console.print(Text(f"{what} has the fingerprint"))
    show(key, console)
    with asking("give what was read to you on the phone with --fingerprint"):
        same = typer.confirm(f"Has {who}, called at a number that you know, read the same to you?")
    if not same:
        raise IdentityError(
            f"{what}: the fingerprints were not compared, or differ; nothing was done. If they "
            "differ, somebody has put another file in its place: have it sent by another way"
        )
