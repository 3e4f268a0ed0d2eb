"""A small federation on disk: two sites, an evaluation cohort, and the run's file."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from common.spec import RunSpec

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
