"""A run whose weights cannot travel, or that the disk has no room for, is refused at its launch."""

from __future__ import annotations

from collections import namedtuple
from pathlib import Path

import pytest

from common.clock import Clock
from common.errors import CohortError, RunError
from server.authority import Authority, NewFederation, Signed
from server.launch import launch
from server.runs import CoordinatorHome

Usage = namedtuple("Usage", "total used free")
RUN = """
name = "large"
rounds = 1
[task]
classes = ["no", "yes"]
[model]
name = "reference-cnn"
[input]
height = {side}
width = {side}
[optimizer]
name = "sgd"
learning_rate = 0.1
[local]
batch_size = 1
steps = 1
[privacy]
mechanism = "none"
[federation]
quorum = 2
"""
NETWORK = 4 * (512 * 128 * 2 * 2 + 400_000)
"""About as many bytes as the network for images of 62 pixels has."""


@pytest.fixture
def home(tmp_path: Path) -> CoordinatorHome:
    new = NewFederation("demo", ["127.0.0.1"], 8443)
    signed = Signed("Ada", "a test")
    Authority.create(tmp_path / "home", new, "a passphrase of a test", signed, Clock())
    made = CoordinatorHome(tmp_path / "home")
    made.evaluation.mkdir()
    return made


def run_file(folder: Path, side: int) -> Path:
    path = folder / "run.toml"
    path.write_text(RUN.format(side=side))
    return path


def left_behind(home: CoordinatorHome) -> list[Path]:
    return list(home.runs.iterdir()) if home.runs.exists() else []


def test_weights_that_no_node_can_seal_are_refused(home: CoordinatorHome, tmp_path: Path):
    with pytest.raises(RunError, match=r"21\d\d MiB of weights, expected at most 2032"):
        launch(home, run_file(tmp_path, 1518))
    assert not left_behind(home)


@pytest.mark.parametrize(
    ("free", "told"),
    [(NETWORK, (RunError, "make room")), (20 * NETWORK, (CohortError, "not a cohort"))],
)
def test_a_disk_without_room_for_a_round_is_told_before_the_run(
    home: CoordinatorHome,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    free: int,
    told: tuple[type[Exception], str],
):
    """With room, the next thing that is missing is told: the evaluation's cohort is empty here."""
    monkeypatch.setattr("server.launch.shutil.disk_usage", lambda _: Usage(free, 0, free))
    error, words = told
    with pytest.raises(error, match=words):
        launch(home, run_file(tmp_path, 62))
    assert not left_behind(home)
