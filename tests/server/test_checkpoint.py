"""One whole checkpoint at any moment; what is not this run's is refused by name."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common.errors import RunError
from server.checkpoint import Checkpoint, load_checkpoint, save_checkpoint

DIGEST = "d" * 64


def made(number: int = 3) -> Checkpoint:
    rng = np.random.default_rng(number)
    weights = {
        "conv.weight": rng.normal(size=(3, 2)).astype(np.float32),
        "a/b": np.array([np.nan, -0.0], dtype=np.float32),
        "temperature": np.array(number, dtype=np.float32),
    }
    return Checkpoint(
        spec_digest=DIGEST,
        round_number=number,
        groups={"weights": weights, "best": weights, "momentum": {"conv.weight": np.float32([1])}},  # type: ignore[arg-type, dict-item]
        history=tuple({"round": n, "evaluation": None, "é": 0.1} for n in range(1, number + 1)),
        notes={"stopping": {"best_value": None}, "sites": {}},
    )


def same(one: Checkpoint, other: Checkpoint) -> None:
    assert replace(one, groups={}) == replace(other, groups={})
    assert one.groups.keys() == other.groups.keys()
    for group, named in one.groups.items():
        assert named.keys() == other.groups[group].keys()
        for name, array in named.items():
            assert other.groups[group][name].shape == array.shape
            assert other.groups[group][name].tobytes() == array.tobytes()


def test_what_was_saved_is_loaded(tmp_path: Path):
    save_checkpoint(tmp_path / "checkpoint", made())
    found = load_checkpoint(tmp_path / "checkpoint", DIGEST)
    assert found is not None
    same(found, made())


def test_where_none_was_saved_there_is_none(tmp_path: Path):
    assert load_checkpoint(tmp_path, DIGEST) is None
    assert load_checkpoint(tmp_path / "missing", DIGEST) is None


def test_the_last_replaces_the_one_before(tmp_path: Path):
    for number in (1, 2, 3):
        save_checkpoint(tmp_path, made(number))
    found = load_checkpoint(tmp_path, DIGEST)
    assert found is not None
    same(found, made(3))
    assert {path.name for path in tmp_path.iterdir()} == {"round-000003.safetensors", "state.json"}


def write_on(folder: Path, ready: Any) -> None:
    """Go on after the last round, round after round, until killed."""
    found = load_checkpoint(folder, DIGEST)
    ready.set()
    for number in range(found.round_number + 1 if found else 1, 100_000):
        array = np.full(50_000, number, dtype=np.float32)
        history = tuple({"round": n} for n in range(1, number + 1))
        groups = {"weights": {"w": array}, "best": {"w": array}}
        save_checkpoint(folder, Checkpoint(DIGEST, number, groups, history, {"last": number}))


def test_a_killed_writer_leaves_the_checkpoint_of_a_round_that_it_finished(tmp_path: Path):
    """Twenty times at a random moment; each writer goes on where the last was killed."""
    last, fork = 0, get_context("fork")
    for moment in np.random.default_rng(0).uniform(0, 0.05, 20):
        ready = fork.Event()
        process = fork.Process(target=write_on, args=(tmp_path, ready))
        process.start()
        ready.wait()
        time.sleep(moment)
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        found = load_checkpoint(tmp_path, DIGEST)
        if found is None:
            assert not last
            continue
        assert found.round_number >= last
        last = found.round_number
        assert len(found.history) == found.notes["last"] == last
        for group in ("weights", "best"):
            assert (found.groups[group]["w"] == last).all()
    assert last > 0  # or nothing was seen at all


# --- What is refused --------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_checkpoint(tmp_path, made())
    return tmp_path


def test_another_runs_checkpoint_is_refused(folder: Path):
    with pytest.raises(RunError, match=r"the run dddddddddddd.*version 1 of eeeeeeeeeeee"):
        load_checkpoint(folder, "e" * 64)


def test_another_version_is_refused(folder: Path):
    edit(folder, version=2)
    with pytest.raises(RunError, match=r"state\.json: a checkpoint of version 2"):
        load_checkpoint(folder, DIGEST)


def edit(folder: Path, **changes: Any) -> None:
    path = folder / "state.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


ARRAYS = "round-000003.safetensors"
DAMAGE: dict[str, Callable[[Path], Any]] = {
    "a cut state": lambda folder: cut(folder / "state.json"),
    "no state at all": lambda folder: (folder / "state.json").write_bytes(b""),
    "binary": lambda folder: (folder / "state.json").write_bytes(b"\xff\x00"),
    "a list": lambda folder: (folder / "state.json").write_text("[]"),
    "null": lambda folder: (folder / "state.json").write_text("null"),
    "an empty state": lambda folder: (folder / "state.json").write_text("{}"),
    "a digest that is a number": lambda folder: edit(folder, spec_digest=3),
    "a file that is not there": lambda folder: (folder / ARRAYS).unlink(),
    "a cut file": lambda folder: cut(folder / ARRAYS),
    "one bit": lambda folder: flip(folder / ARRAYS),
    "another file of the same name": lambda folder: (folder / ARRAYS).write_bytes(b"safetensors"),
    "a history of fewer rounds": lambda folder: edit(folder, history=[{"round": 1}]),
    "a round that is none": lambda folder: edit(folder, round="three"),
    "no history": lambda folder: edit(folder, history=None),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_checkpoint_is_refused_by_name(folder: Path, damage: Callable[[Path], Any]):
    damage(folder)
    with pytest.raises(RunError, match=str(folder)):
        load_checkpoint(folder, DIGEST)


def test_the_checkpoint_that_the_damaged_ones_are_made_from_is_whole(folder: Path):
    assert load_checkpoint(folder, DIGEST)
