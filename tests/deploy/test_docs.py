"""Every page: the commands that it shows are commands of ours, with options that they have."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
import typer.main

from deploy.cli import app

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    str(page.relative_to(ROOT))
    for page in (*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"))
    if "$ cloister " in page.read_text()
)
ROOT_COMMAND = typer.main.get_group(app)


def complaint(line: str) -> str:
    """What the command line says of it before anything is done; empty if nothing."""
    command: click.Command = ROOT_COMMAND
    words = shlex.split(line, comments=True)[1:]
    context = click.Context(command)
    while isinstance(command, click.Group):
        found = command.get_command(context, words[0]) if words else None
        if found is None:
            return f"there is no command {words[:1]}"
        command, words = found, words[1:]
    try:
        command.make_context("cloister", [word for word in words if word != "…"])
    except click.ClickException as error:
        said = error.format_message()
        return "" if "does not exist" in said else said  # no run lies here
    return ""


def commands(group: click.Group, path: str = "cloister") -> Iterator[tuple[str, click.Command]]:
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from commands(command, f"{path} {name}")
        else:
            yield f"{path} {name}", command


@pytest.mark.parametrize("page", PAGES)
def test_every_command_of_a_page_is_one_with_its_options(page: str) -> None:
    text = (ROOT / page).read_text()
    lines = re.findall(r"^\$ (cloister .*)$", text, re.MULTILINE)
    assert lines
    assert {line: said for line in lines if (said := complaint(line))} == {}


def test_every_command_of_the_intake_teaches_with_an_example_that_it_takes() -> None:
    wrong = {}
    for name, command in commands(ROOT_COMMAND):
        said = " ".join(str(command.help).split())
        examples = re.findall(r"`(cloister [^`]*)`", said.partition("Example:")[2])
        if name.startswith("cloister intake ") and not examples:
            wrong[name] = "no example"
        wrong |= {line: said for line in examples if (said := complaint(line))}
    assert wrong == {}


@pytest.mark.parametrize(
    "line",
    [
        "cloister intake take films cohort",
        "cloister intake run films cohort --labels labels.csv",
        "cloister intake verify cohort --againts films",
        "cloister intake run films cohort --spec a --labels b --split training",
    ],
)
def test_a_line_that_is_wrong_is_found(line: str) -> None:
    assert complaint(line)
