"""The page of the node's file: every key on it is the real one, and no other."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from client import policy as policy_module
from client.policy import Policy, read_policy
from common.spec import Section

DOCS = Path(__file__).parents[2] / "docs"


def example() -> str:
    found = re.search(r"```toml\n(.*?)```", (DOCS / "node-file.md").read_text(), re.DOTALL)
    assert found
    return found[1]


def sections() -> Iterator[type[Section]]:
    for value in vars(policy_module).values():
        ours = getattr(value, "__module__", "") == policy_module.__name__
        if ours and isinstance(value, type) and issubclass(value, Section):
            yield value


def test_the_example_of_the_nodes_file_is_a_policy(tmp_path: Path):
    (tmp_path / "node.toml").write_text(example())
    assert read_policy(tmp_path / "node.toml").site == "north"


@pytest.mark.parametrize("section", list(sections()), ids=lambda section: section.__name__)
def test_the_example_names_every_key(section: type[Section]):
    written = re.sub(r"#.*", "", example())
    assert set(section.model_fields) <= set(re.findall(r"[a-z_]+", written))


def test_the_example_names_no_default_but_the_real_one(tmp_path: Path):
    """Where the page shows a default, leaving the key out gives the same policy."""
    document = tomllib.loads(example())
    (tmp_path / "node.toml").write_text(example())
    whole = read_policy(tmp_path / "node.toml")
    for name, field in Policy.model_fields.items():
        if not field.is_required() and name != "listen":  # shown whole, and left out by default
            assert getattr(whole, name) == field.get_default(), name
    assert whole.budget is not None
    without = whole.budget.model_copy(update={"order": None})
    assert without.at_order == whole.budget.order == document["budget"]["order"]


def test_every_key_is_explained():
    table = (DOCS / "node-file.md").read_text().partition("## Why each is there")[2]
    for key, value in tomllib.loads(example()).items():
        names = [f"{key}.{inner}" for inner in value] if isinstance(value, dict) else [key]
        for name in names:
            assert f"`{name}`" in table or f"`{name.partition('.')[0]}.*`" in table, name
