"""A model of the site's own: what is gained, what is marked, and what is booked."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from safetensors.numpy import load_file

from common.errors import PackageError
from common.package import PERSONAL, Package
from deploy.fine_tune import MUST_NOT_LEAVE
from deploy.simulation import prepare, simulate
from server.export import Signing, export
from server.start import starting_model


@pytest.fixture
def model(write_run: Callable[..., Path], tmp_path: Path, watching: Any) -> Path:
    folder = prepare(write_run(), tmp_path / "runs")
    simulate(folder, workers=0, observer=watching())
    return folder


def tune(cloister: Any, model: Path, out: Path, *more: object) -> Any:
    cohort = model.parent.parent / "south"
    return cloister("node", "fine-tune", model, cohort, out, "--unsigned", *more)


def test_nothing_is_booked_and_the_model_must_not_leave(cloister: Any, model: Path, tmp_path: Path):
    said = tune(cloister, model, tmp_path / "ours", "--epochs", 2)
    assert said.code == 0, said.err
    assert MUST_NOT_LEAVE in said.words
    assert "Nothing was booked" in said.words
    ours = Package.open(tmp_path / "ours", unsigned=True)
    assert ours.card[PERSONAL]["warning"] == MUST_NOT_LEAVE
    assert MUST_NOT_LEAVE in (tmp_path / "ours" / "model_card.md").read_text().replace("\n", " ")
    assert ours.card["privacy"]["protected"] is False
    before, after = load_file(model / "model.safetensors"), dict(ours.network().named_parameters())
    assert any(not np.array_equal(before[n], a.detach().numpy()) for n, a in after.items())
    held_out = ours.card["evaluation"]["test"]
    assert (held_out["patients"], ours.card["model"]["safetensors_sha256"]) == (
        8,
        ours.model_sha256,
    )


def test_a_rate_for_noised_gradients_is_not_used_on_plain_ones(
    cloister: Any, model: Path, tmp_path: Path
):
    def optimiser(out: str, *more: object) -> Any:
        assert tune(cloister, model, tmp_path / out, "--epochs", 1, *more).code == 0
        return Package.open(tmp_path / out, unsigned=True).spec.optimizer

    assert Package.open(model, unsigned=True).spec.optimizer.name == "sgd"
    assert (found := optimiser("ours")).name == "adamw"
    assert found.learning_rate == 1e-3
    assert optimiser("other", "--learning-rate", 0.25).learning_rate == 0.25


def test_a_model_that_has_become_worse_is_said_to_be(
    cloister: Any, model: Path, tmp_path: Path, make_spec: Any, write_cohort: Any
):
    classes = np.arange(40) % 2
    shape = make_spec().input.shape
    pixels = np.broadcast_to(classes[:, None, None, None] * 60000, (40, *shape)).astype(np.uint16)
    splits = ["train"] * 24 + ["test"] * 16
    said = {}
    for name, train, began in (("right", classes, model), ("wrong", 1 - classes, "by-right")):
        labels = [*train[:24].tolist(), *classes[24:].tolist()]
        write_cohort(make_spec(), range(40), labels=labels, pixels=pixels, splits=splits, name=name)
        words = ("--unsigned", "--epochs", 30, "--learning-rate", 0.01)
        begins, out = tmp_path / began, tmp_path / f"by-{name}"
        said[name] = cloister("node", "fine-tune", begins, tmp_path / name, out, *words)
        assert said[name].code == 0
    assert "Worse than before" not in said["right"].words
    assert "Worse than before: AUROC" in said["wrong"].words
    assert "do not use it. Try a smaller --learning-rate" in said["wrong"].words


def test_a_head_of_its_own_over_the_shared_body(cloister: Any, model: Path, tmp_path: Path):
    assert tune(cloister, model, tmp_path / "ours", "--epochs", 2, "--head-only").code == 0
    before, after = (load_file(p / "model.safetensors") for p in (model, tmp_path / "ours"))
    moved = {name for name, array in before.items() if not np.array_equal(array, after[name])}
    assert moved == set(list(Package.open(model, unsigned=True).network().state_dict())[-2:])
    card = json.loads((tmp_path / "ours" / "model_card.json").read_text())
    assert card[PERSONAL]["head_only"] is True


def test_no_run_begins_at_it_and_no_coordinator_signs_it(
    cloister: Any, model: Path, tmp_path: Path, make_spec: Any
):
    assert tune(cloister, model, tmp_path / "ours", "--epochs", 1).code == 0
    sha256 = Package.open(tmp_path / "ours", unsigned=True).model_sha256
    with pytest.raises(PackageError, match="a personal model"):
        starting_model(make_spec(start={"model_sha256": sha256}), tmp_path / "ours")
    signing = cast(Signing, SimpleNamespace(authority=None, unsigned=True))
    with pytest.raises(PackageError, match="no federation signs it"):
        export(tmp_path / "ours", tmp_path / "out", "package", signing=signing)
    assert not (tmp_path / "out").exists()


def test_what_a_person_gets_wrong_is_said_before_anything_is_trained(
    cloister: Any, model: Path, tmp_path: Path
):
    said = tune(cloister, model, tmp_path / "ours", "--epsilon", 1)
    assert "--epsilon: is of --private" in said.words
    said = tune(cloister, model, tmp_path / "ours", "--private")
    assert "name its folder with --node" in said.words
    (tmp_path / "ours").mkdir()
    assert "is there already" in tune(cloister, model, tmp_path / "ours").words
