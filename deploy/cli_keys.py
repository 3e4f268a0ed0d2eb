"""`cloister intake`: the keys of an intake, and the sealed table of who a pseudonym stands for."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from deploy.intake_words import console
from deploy.screen import printable


def new_key(
    key_file: Annotated[Path, typer.Argument(help="The file; it must not exist yet.")],
) -> None:
    """Make a key: 64 random hexadecimal digits, readable by its owner alone.

    For `[intake.encryption]` of node.toml, or `--cohort-key`. (A site key is made on first use.)
    Keep a copy apart from this machine: a sealed cohort whose key is lost has to be taken in again.

    Example: `cloister intake new-key north/cohort.key`
    """
    from client.keyfile import create_key
    from common.errors import ConfigError

    if not create_key(key_file):
        raise ConfigError(f"{key_file}: there is a file already; it is never written over")
    _say(f"{key_file} is a new key. Keep a copy apart from this machine.")


def rotate_key(
    key_file: Annotated[Path, typer.Argument(help="The site key.")],
) -> None:
    """Set the site key aside and put a new one in its place.

    From then on the same patient has another pseudonym, other UIDs and another shift of dates:
    what was taken in before and after cannot be linked by them. (Two copies of one image still
    look alike.) An intake that has begun, or that waits for a review, goes on only with the key
    that it began with: finish it first. The old key stays beside the new one under today's date,
    and is never written over; destroy it when nobody has to find the old patients again. Not
    for the key of sealed cohorts: what is sealed opens with the old one alone.

    Example: `cloister intake rotate-key north/site.key`
    """
    from datetime import date

    from client import keyfile

    old = keyfile.rotate_key(key_file, date.today())
    _say(f"{key_file} is a new key; the old one is {old.name} beside it.")
    _say("From now on the same patient has another pseudonym, other UIDs and another shift of")
    _say("dates: cohorts from before and after cannot be linked by them. Intakes that have begun")
    _say("go on only with the old key.")


def officer_key(
    private: Annotated[Path, typer.Argument(help="File of the private key, to be made.")],
    public: Annotated[Path, typer.Argument(help="File of the public key, to be made.")],
) -> None:
    """Make the pair of keys of a re-identification table, on the officer's own machine.

    The private key is under a passphrase, which is asked for; it never comes near the node. The
    public one goes there: `[intake.reidentification] public_key` in node.toml. From then on
    the intake adds each new patient to a table that only the private key opens.

    Example: `cloister intake officer-key officer.key officer.pem`
    """
    from client.intake.reidentify import LEAST_PASSPHRASE, create_officer_key

    asked = f"Passphrase, {LEAST_PASSPHRASE} characters or more"
    passphrase = typer.prompt(asked, hide_input=True, confirmation_prompt=True)
    create_officer_key(private, public, passphrase)
    _say(f"{private} stays here, {public} goes to the node.")
    _say("Without the private key and its passphrase nobody can read the table, ever.")


def reidentify(
    table: Annotated[Path, typer.Argument(help="The table, or a copy of it.")],
    pseudonyms: Annotated[list[str], typer.Argument(help="Pseudonyms of patients.")],
    key: Annotated[Path, typer.Option(help="File of the officer's private key.")],
) -> None:
    """Say who pseudonyms stand for; on the officer's machine, never on the node's.

    Ends with 1 if one of them is not in the table. Nothing is written.

    Example: `cloister intake reidentify reidentification.sealed --key officer.key
    0f3c5a7e9b1d2c4f6a8e0b2d4c6f8a1e`
    """
    from client.intake.reidentify import read_officer_key, read_table

    private = read_officer_key(key, typer.prompt("Passphrase", hide_input=True))
    with console.status("Opening the table …"):
        content = read_table(table, private)
    shown = Table("pseudonym", "patient", "issued by")
    missing = []
    for pseudonym in pseudonyms:
        found = content.identities.get(pseudonym, ())
        missing += [] if found else [pseudonym]
        for identity in found:
            row = (pseudonym, identity.patient, identity.issuer)
            shown.add_row(*(Text(printable(text)) for text in row))
        if len(found) > 1:
            _warn(f"{pseudonym}: {len(found)} different patients; at most one record is true.")
    if shown.row_count:
        console.print(shown)
    if content.damaged:
        numbers = ", ".join(map(str, content.damaged))
        _warn(f"Records that cannot be opened, damaged or of another key: {numbers}.")
    if content.torn:
        _warn("The file ends within a record, as after a crash or half a copy.")
    if missing:
        _warn(f"Not in the table: {', '.join(map(printable, missing))}")
        raise typer.Exit(1)


def _say(text: str) -> None:
    console.print(Text(printable(text)), soft_wrap=True)


def _warn(text: str) -> None:
    console.print(Text(printable(text), style="bold yellow"), soft_wrap=True)
