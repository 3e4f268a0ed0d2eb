"""A run that begins at a trained model: given, checked, and where it is pruned, still so after."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from common.errors import PackageError, RunError, SpecError
from common.package import PERSONAL, Package
from deploy.simulation import prepare, simulate

Write = Callable[..., Path]

ADAPTIVE = """
[aggregation]
strategy = "fedadam"
average_decay = 0.5
"""


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def trained(write_run: Write, tmp_path: Path, watching: Any) -> Path:
    """The folder of a finished run."""
    folder = prepare(write_run(), tmp_path / "runs")
    simulate(folder, workers=0, observer=watching())
    return folder


def pruned(run: Path) -> Path:
    """The same with four of five of its weights zero, in a folder beside it."""
    made = run.with_name(f"{run.name}-pruned")
    made.mkdir()
    weights = load_file(run / "model.safetensors")
    every = np.sort(np.abs(np.concatenate([array.ravel() for array in weights.values()])))
    least = every[int(0.8 * len(every))]
    save_file(
        {n: np.where(np.abs(a) < least, 0, a).astype(np.float32) for n, a in weights.items()},
        made / "model.safetensors",
    )
    (made / "spec.json").write_bytes((run / "spec.json").read_bytes())
    return made


def begins(model: Path, more: str = "") -> tuple[str, str]:
    """The change of a run's file by which it begins at a model."""
    return named(sha256(model / "model.safetensors"), more)


def named(digest: str, more: str = "") -> tuple[str, str]:
    start = f'[start]\nmodel_sha256 = "{digest}"\n{more}'
    return "[simulation]\n", f"{start}\n[simulation]\n"


@pytest.mark.parametrize("more", ["", ADAPTIVE], ids=["fedavg", "fedadam and an average"])
def test_pruned_fine_tuned_by_rounds_and_as_sparse_as_before(
    trained: Path, write_run: Write, tmp_path: Path, watching: Any, more: str
):
    model = pruned(trained)
    sparse = ("width = 4", "width = 4\nsparse = true")
    run_file = write_run(changes=[sparse, begins(model, more)])
    folder = prepare(run_file, tmp_path / "runs", model)
    simulate(folder, workers=0, observer=watching())
    before, after = (load_file(path / "model.safetensors") for path in (model, folder))
    zeros = {name: array == 0 for name, array in before.items()}
    assert sum(int(mask.sum()) for mask in zeros.values()) > 1000
    assert all(np.array_equal(after[name] == 0, mask) for name, mask in zeros.items())
    assert any(not np.array_equal(before[name], after[name]) for name in before)
    card = (folder / "model_card.md").read_text()
    assert "began with the model" in card
    assert sha256(model / "model.safetensors") in card


def test_a_run_begins_at_the_very_weights(
    trained: Path, write_run: Write, tmp_path: Path, watching: Any
):
    """At a rate of almost nothing it ends where it began."""
    still = ("learning_rate = 0.1", "learning_rate = 1e-12")
    run_file = write_run(changes=[still, begins(trained)])
    folder = prepare(run_file, tmp_path / "runs", trained)
    simulate(folder, workers=0, observer=watching())
    before, after = (load_file(path / "model.safetensors") for path in (trained, folder))
    for name, array in before.items():
        np.testing.assert_allclose(after[name], array, atol=1e-6)


def test_the_digest_in_the_run_s_file_decides(trained: Path, write_run: Write, tmp_path: Path):
    runs = tmp_path / "others"
    with pytest.raises(SpecError, match=r"give the model with --model PACKAGE"):
        prepare(write_run(changes=[begins(trained)]), runs)
    with pytest.raises(SpecError, match=r"model_sha256 is none, and .* holds [0-9a-f]{64}; write"):
        prepare(write_run(), runs, trained)
    with pytest.raises(SpecError, match=r"model_sha256 is a{64}, and"):
        prepare(write_run(changes=[named("a" * 64)]), runs, trained)
    assert not runs.exists()


def test_a_model_of_another_network_is_refused(trained: Path, write_run: Write, tmp_path: Path):
    run_file = write_run(changes=[("width = 4", "width = 8"), begins(trained)])
    with pytest.raises(PackageError, match="whose weights do not fit the run's 'small-cnn'"):
        prepare(run_file, tmp_path / "others", trained)


def test_no_run_begins_at_a_personal_model(trained: Path, write_run: Write, tmp_path: Path):
    card = trained / "model_card.json"
    card.write_text(json.dumps(json.loads(card.read_text()) | {PERSONAL: {"warning": "mine"}}))
    assert PERSONAL in Package.open(trained, unsigned=True).card
    with pytest.raises(PackageError, match="a personal model, trained on the patients of one site"):
        prepare(write_run(changes=[begins(trained)]), tmp_path / "others", trained)


def test_nor_when_its_card_was_left_behind(trained: Path, write_run: Write, tmp_path: Path):
    """The mark is in the weights' own file too."""
    weights = load_file(trained / "model.safetensors")
    bare = tmp_path / "bare"
    bare.mkdir()
    save_file(weights, bare / "model.safetensors", {PERSONAL: "mine"})
    (bare / "spec.json").write_bytes((trained / "spec.json").read_bytes())
    assert not Package.open(bare, unsigned=True).card
    with pytest.raises(PackageError, match="a personal model, trained on the patients of one site"):
        prepare(write_run(changes=[begins(bare)]), tmp_path / "others", bare)


def test_weights_that_were_changed_since_are_not_begun_with(
    trained: Path, write_run: Write, tmp_path: Path, watching: Any
):
    folder = prepare(write_run(changes=[begins(trained)]), tmp_path / "others", trained)
    with (folder / "start.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x01")
    with pytest.raises(RunError, match=r"start\.safetensors: its SHA-256 is"):
        simulate(folder, workers=0, observer=watching())


def test_sparse_means_nothing_to_a_run_that_begins_at_random(write_run: Write, tmp_path: Path):
    run_file = write_run(changes=[("width = 4", "width = 4\nsparse = true")])
    with pytest.raises(SpecError, match=r"model\.sparse = True: .*\[start\]"):
        prepare(run_file, tmp_path / "runs")
