"""The hospital's pages: every command on them is run, and every key is the real one."""

from __future__ import annotations

import re
import shlex
import shutil
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from client import policy as policy_module
from client.folder import NodeFolder
from client.home import NodeHome
from client.policy import Policy, read_policy
from common.errors import RefusalCode
from common.messages import Invitation, NodeCard, RefusalReply, Release, TrainTask
from common.spec import RunSpec, Section, read_run_file
from deploy.hospitals import make_hospitals

DOCS = Path(__file__).parents[2] / "docs"
RUN = """\
name = "chest"
operator = "trial-office"
rounds = 15
[task]
classes = ["normal", "opacity"]
[model]
name = "compact-cnn"
[input]
height = 64
width = 64
[optimizer]
name = "sgd"
learning_rate = 1.0
[local]
batch_size = 80
[privacy]
mechanism = "dp-sgd"
target_epsilon = 2.0
delta = 1e-5
"""


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


def commands() -> list[str]:
    text = (DOCS / "hospital.md").read_text()
    return re.findall(r"^\$ cloister (.*)$", text, re.MULTILINE)


class Page:
    """The hospital's page as it is worked through, with a coordinator at the other end."""

    def __init__(self, folder: Path, weights: Callable[[RunSpec], Any]) -> None:
        self.folder, self.home, self.weights = folder, folder / "north", weights
        self.spec = read_run_file(folder / "run.toml").spec.identified("chest-1")
        self.digest = self.spec.digest

    def before(self, words: list[str]) -> None:
        """What happens between the lines of the page, before a command on it."""
        match words[:2]:
            case ["node", "check"] if not words[3:]:
                self.edit("operators = []", 'operators = ["trial-office"]')
                self.edit("\nmodels = []", '\nmodels = ["compact-cnn"]')
            case ["node", "requests"]:
                self.edit("pace = 0.5", "pace = 0.0")  # nobody waits for a test
                self.asked(self.spec)
            case ["node", "deny"]:
                other = self.spec.identified("chest-2")
                self.asked(other)
                self.digest = other.digest
            case ["node", "budget"]:
                gate = NodeHome.open(self.home).gate()
                assert isinstance(gate.invite(Invitation(self.spec)), NodeCard)
                task = TrainTask(self.spec, 1, self.weights(self.spec))
                assert isinstance(gate.train(task), Release)
                self.digest = self.spec.digest
            case ["node", "set-budget"]:
                self.edit("epsilon = 8.0", "epsilon = 10.0")
            case ["node", "audit"] if "epsilon = 10.0" in (self.home / "node.toml").read_text():
                shutil.rmtree(self.home / "ledger")

    def asked(self, spec: RunSpec) -> None:
        reply = NodeHome.open(self.home).gate().invite(Invitation(spec))
        assert isinstance(reply, RefusalReply)
        assert reply.code is RefusalCode.APPROVAL

    def edit(self, old: str, new: str) -> None:
        text = (self.home / "node.toml").read_text()
        (self.home / "node.toml").write_text(text.replace(old, new))

    def filled(self, word: str) -> str:
        """A digest and a witness are others each time."""
        if word == "TOKEN":
            return NodeFolder.open(self.home).ledger().witness
        return self.digest[:8] if re.fullmatch(r"[0-9a-f]{8}", word) else word


@pytest.fixture
def page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, global_weights: Callable[[RunSpec], Any]
) -> Page:
    hospital = make_hospitals(tmp_path / "hospitals", seed=1, size=0.2)[0]
    hospital.folder.rename(tmp_path / "films")
    hospital.labels.rename(tmp_path / "labels.csv")
    (tmp_path / "run.toml").write_text(RUN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LOGNAME", "ada")
    return Page(tmp_path, global_weights)


def test_every_command_of_the_hospitals_page_does_what_the_page_says(
    cloister: Callable[..., Any], page: Page
):
    codes = []
    for command in commands():
        words = shlex.split(command)
        page.before(words)
        said = cloister(*map(page.filled, words))
        codes.append((" ".join(words[:2]), said.code))
        assert said.code in (0, 1), said
    assert [name for name, code in codes if code] == ["node check", "node audit"]
    seen = {name.removeprefix("node ") for name, _ in codes}
    every = "init check admit requests show approve deny budget audit close set-budget recover"
    assert set(every.split()) <= seen
    assert codes[-1] == ("node recover", 0)


def test_the_page_shows_what_the_commands_print(
    cloister: Callable[..., Any], page: Page, monkeypatch: pytest.MonkeyPatch
):
    """Words and layout, not figures: those are of another hospital of the demo."""
    text = (DOCS / "hospital.md").read_text()
    monkeypatch.setenv("COLUMNS", "80")
    for command in commands()[:4]:
        words = shlex.split(command)
        page.before(words)
        said = cloister(*words)
        printed = plain(said.out)
        after = text.partition(f"$ cloister {command}\n")[2].partition("```")[0]
        shown = [line for line in plain(after) if "…" not in line]
        assert [line for line in shown if line not in printed] == [], command


def plain(text: str) -> set[str]:
    """Sentences without figures, bars and digests, wherever they were broken."""
    joined = re.sub(r"\n\s+(?![✓✗•!])", " ", re.sub(r"[│┌┐└┘─┃━]", "", text))
    lines = (re.sub(r"[0-9a-f]{12,}|[\d.:]+%?", "#", line) for line in joined.splitlines())
    return {" ".join(line.split()) for line in lines if line.strip()}
