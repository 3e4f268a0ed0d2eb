"""The pages that people read say what the code does."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, get_args

import pytest
from click.testing import CliRunner
from pydantic import BaseModel
from typer.main import get_command

from common import spec as spec_module
from common.models import shapes
from common.spec import RunSpec, Section, parse_run_text, read_run_file
from common.tasks import TASKS, section_for
from deploy import simulation
from deploy.cli import app

DOCS = Path(__file__).parents[1] / "docs"
PAGES = sorted([*DOCS.glob("*.md"), *DOCS.glob("tasks/*.md"), DOCS.parent / "README.md"])
PRESETS = sorted((DOCS.parent / "benchmarks" / "tasks").glob("*.toml"))


def run_file_example() -> str:
    text = (DOCS / "run-file.md").read_text()
    found = re.search(r"```toml\n(.*?)```", text, re.DOTALL)
    assert found
    return found[1]


def sections() -> Iterator[type[BaseModel]]:
    for module in (spec_module, simulation):
        for value in vars(module).values():
            ours = getattr(value, "__module__", "") == module.__name__
            if ours and isinstance(value, type) and issubclass(value, Section):
                yield value


def test_the_example_of_the_run_file_is_a_run() -> None:
    read = parse_run_text(run_file_example(), source="docs/run-file.md")
    simulation.read_simulation(read.simulation, "docs/run-file.md")


@pytest.mark.parametrize("section", list(sections()), ids=lambda section: section.__name__)
def test_the_example_names_every_key(section: type[BaseModel]) -> None:
    words = set(re.findall(r"[a-z_0-9]+", run_file_example()))
    assert set(section.model_fields) <= words


def test_the_example_names_no_default_but_the_real_one() -> None:
    """Where the page shows a default, leaving the key out gives the same run."""
    text = run_file_example()
    example = parse_run_text(text, source="docs").spec
    for table in ("augmentation", "schedule", "federation", "evaluation"):
        bare = re.sub(rf"\[{table}\].*?(?=\n\[)", "", text, flags=re.DOTALL)
        assert getattr(parse_run_text(bare, source="docs").spec, table) == getattr(example, table)
    assert isinstance(example, RunSpec)


@pytest.mark.parametrize("name", [name for name in TASKS if name != "classification"])
def test_a_task_s_page_names_every_key_of_its_section(name: str) -> None:
    words = set(re.findall(r"[a-z_0-9]+", (DOCS / "tasks" / f"{name}.md").read_text()))
    fields = section_for(name).model_fields.items()
    assert {key for key, field in fields if len(get_args(field.annotation)) != 1} <= words


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_a_preset_is_a_run_that_its_task_s_page_leads_to(path: Path) -> None:
    spec = read_run_file(path).spec
    shapes(spec)
    assert path.name in (DOCS / "tasks" / f"{spec.task.name}.md").read_text()


TREE = get_command(app)


@cache
def helps(*words: str) -> bool:
    """Whether a command says what it is for, if it is asked."""
    return CliRunner().invoke(TREE, [*words, "--help"]).exit_code == 0


def commands(text: str) -> Iterator[list[str]]:
    for line in re.findall(r"^\$ (cloister .*)$", text, re.MULTILINE):
        yield re.sub(r"\s+#.*", "", line).split()[1:]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_on_the_page_exists(page: Path) -> None:
    """The words and options are the command line's; what they do is tested elsewhere."""
    for words in commands(page.read_text()):
        path: list[str] = []
        command: Any = TREE
        while hasattr(command, "commands") and words[len(path)] in command.commands:
            path.append(words[len(path)])
            command = command.commands[path[-1]]
        assert not hasattr(command, "commands"), words
        known = {option for parameter in command.params for option in parameter.opts}
        assert {word for word in words if word.startswith("--")} <= known, words
        assert helps(*path)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_on_the_page_leads_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        if not target.startswith("https://"):
            assert (page.parent / target).exists(), target
