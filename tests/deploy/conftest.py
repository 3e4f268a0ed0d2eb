"""The command line; a small federation on disk: two sites, an evaluation cohort, the run's file."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from common.spec import RunSpec
from deploy import cli

EXTRA = """
[evaluation]
bootstrap = 0
validation_fraction = 0.0
"""
SITES = """
[simulation]
evaluation = "evaluation"
[[simulation.site]]
name = "north"
cohort = "north"
declared_size = 20
[[simulation.site]]
name = "south"
cohort = "south"
declared_size = 30
"""


class Said(NamedTuple):
    """What a command left: its exit code and its two streams."""

    code: int
    out: str
    err: str

    @property
    def words(self) -> str:
        """All of it on one line: where it was broken says nothing."""
        return " ".join(f"{self.out} {self.err}".split())


@pytest.fixture
def cloister(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., Said]:
    """`cloister("spec", "explain", path)`: the whole command line, in this process."""
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("NO_COLOR", "1")

    def run(*arguments: object) -> Said:
        monkeypatch.setattr(sys, "argv", ["cloister", *map(str, arguments)])
        capsys.readouterr()
        code: object = 0
        try:
            cli.main()
        except SystemExit as end:
            code = end.code or 0
        out, err = capsys.readouterr()
        assert isinstance(code, int)
        return Said(code, out, err)

    return run


OFFICE = "trial-office"
LET_THROUGH = (
    ("operators = []", f'operators = ["{OFFICE}"]'),
    ("models = []", 'models = ["small-cnn"]'),
    ("least_patients = 50", "least_patients = 5"),
    ("pace = 0.5", "pace = 0.0"),
)


@pytest.fixture
def node_run(make_spec: Callable[..., RunSpec]) -> Callable[..., RunSpec]:
    """The small run as an operator launches it, with changes; each call is one launch."""

    def make(run_id: str = "small-1", **changes: Any) -> RunSpec:
        return make_spec(operator=OFFICE, **changes).identified(run_id)

    return make


@pytest.fixture
def make_node(
    tmp_path: Path, cloister: Callable[..., Said], write_cohort: Any, node_run: Any
) -> Callable[..., Path]:
    """A node's folder, set up by the commands, that lets the small run through once approved.

    Called with `changes` of node.toml as pairs of old and new text; `owners` and `labels` of its
    cohort; and whether the cohort is `admitted`.
    """

    def make(
        changes: Sequence[tuple[str, str]] = (),
        *,
        owners: Sequence[int] = range(24),
        labels: Sequence[int] | None = None,
        admitted: bool = True,
        epsilon: float = 20.0,
    ) -> Path:
        home, cohort = tmp_path / "north", tmp_path / "cohort"
        write_cohort(node_run(), owners, labels=labels)
        made = cloister(
            *("node", "init", home, "--site", "north", "--declared-size", 40, "--delta", 1e-4),
            *("--epsilon", epsilon, "--cohort", cohort, "--by", "Ada"),
        )
        assert made.code == 0, made
        text = (home / "node.toml").read_text()
        for old, new in (*LET_THROUGH, *changes):
            assert old in text, old
            text = text.replace(old, new)
        (home / "node.toml").write_text(text)
        if admitted:
            done = cloister("node", "admit", home, "--reason", "it is one", "--by", "Ada")
            assert done.code == 0, done
        return home

    return make


@pytest.fixture
def write_run(
    tmp_path: Path, spec_text: str, make_spec: Callable[..., RunSpec], write_cohort: Any
) -> Callable[..., Path]:
    """Write a run's file, and the cohorts of its sites beside it.

    Called with the text of the ``[simulation]`` table where it is not the one of two sites,
    `changes` as pairs of old and new text, and cohorts by name as (owners, labels).
    """

    def write(
        simulation: str = SITES,
        changes: Sequence[tuple[str, str]] = (),
        **cohorts: tuple[Sequence[int], Sequence[int] | None],
    ) -> Path:
        usual: dict[str, tuple[Sequence[int], Sequence[int] | None]] = {
            "north": ([0, 1, 1, *range(2, 22)], None),
            "south": (range(100, 130), None),
            "evaluation": (range(200, 212), [0, 1] * 6),
        }
        for name, (owners, labels) in (usual | cohorts).items():
            if not (tmp_path / name).exists():
                write_cohort(make_spec(), owners, labels=labels, name=name)
        text = spec_text + EXTRA + simulation
        for old, new in changes:
            assert old in text
            text = text.replace(old, new)
        path = tmp_path / "run.toml"
        path.write_text(text)
        return path

    return write


class Watching:
    """An observer that keeps what it is told, and calls `then` after each site's answer."""

    def __init__(self, then: Callable[[int, str], Any] = lambda *_: None) -> None:
        self.answers: list[tuple[int, str, str]] = []
        self.rows: list[Any] = []
        self._then = then

    def run_opened(self, spec: RunSpec, sites: list[str], finished_rounds: int) -> None:
        self.sites, self.finished_rounds = sites, finished_rounds

    def sites_wait(self, waiting: Mapping[str, str]) -> None: ...

    def round_opened(self, number: int) -> None:
        self._then(number, "")

    def site_answered(self, number: int, site: str, status: str) -> None:
        self.answers.append((number, site, status))
        self._then(number, site)

    def round_closed(self, row: Any) -> None:
        self.rows.append(row)


@pytest.fixture
def watching() -> Iterator[type[Watching]]:
    """`watching(then)`: an observer of one run."""
    return Watching  # type: ignore[return-value]
