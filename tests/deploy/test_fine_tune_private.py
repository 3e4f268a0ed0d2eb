"""`cloister node fine-tune --private`: booked is what is drawn, once, and nothing else leaves."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn, cast

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch.optim import optimizer as torch_optimizer

from client import home as node_home
from client.folder import NodeFolder
from client.node import alone
from client.training import LocalTrainer
from common import accounting
from common.errors import PackageError
from common.files import locked
from common.package import CARD, MADE_OF, MODEL, PERSONAL, SPEC, Package
from deploy.fine_tune import NOT_PROTECTED
from deploy.simulation import prepare, simulate
from server import export
from server.export import Signing
from server.start import starting_model

SPLITS = ["train"] * 16 + ["test"] * 8
ANYBODY = ('operators = ["trial-office"]', 'operators = "any"')


@pytest.fixture
def model(write_run: Callable[..., Path], tmp_path: Path, watching: Any) -> Path:
    """A finished run, whose card says that it was protected, as that of a real one does."""
    folder = prepare(write_run(), tmp_path / "runs")
    simulate(folder, workers=0, observer=watching())
    rewrite(folder, protected=True, warning=None)
    return folder


def rewrite(run: Path, **privacy: Any) -> None:
    card = json.loads((run / CARD).read_text())
    card["privacy"] |= privacy
    (run / CARD).write_text(json.dumps(card))


@pytest.fixture
def make_home(
    make_node: Callable[..., Path], cloister: Any, write_cohort: Any, node_run: Any, tmp_path: Path
) -> Callable[..., Path]:
    """A node whose admitted cohort has a held-out part."""

    def make(owners: Any = range(24), splits: Any = SPLITS, changes: Any = ()) -> Path:
        home = make_node((ANYBODY, *changes), admitted=False)
        shutil.rmtree(tmp_path / "cohort")
        write_cohort(node_run(), owners, labels=[0, 1] * 12, splits=splits)
        done = cloister("node", "admit", home, "--reason", "it is one", "--by", "Ada")
        assert done.code == 0, done
        return home

    return make


@pytest.fixture
def tune(cloister: Any, model: Path, tmp_path: Path) -> Callable[..., Any]:
    """The command; every call is the same training unless it says otherwise."""

    def call(home: Path, out: str = "ours") -> Any:
        return cloister(
            *("node", "fine-tune", model, tmp_path / "cohort", tmp_path / out, "--unsigned"),
            *("--private", "--node", home, "--epsilon", 4, "--epochs", 1),
        )

    return call


@pytest.fixture
def approved(make_home: Any, tune: Any, cloister: Any) -> Path:
    """A node where a person has said yes to the training that waited."""
    home: Path = make_home()
    assert "waits for a person" in tune(home).words
    assert not book(home).charges
    say_yes(cloister, home)
    return home


def say_yes(cloister: Any, home: Path) -> None:
    (waiting,) = NodeFolder.open(home).requests.waiting()
    because = ("--reason", "our own", "--by", "Ada", "--yes")
    yes = cloister("node", "approve", waiting.digest[:10], "--home", home, *because)
    assert yes.code == 0, yes


def book(home: Path) -> Any:
    ledger = NodeFolder.open(home).ledger()
    found = ledger.book
    ledger.disconnect()
    return found


def test_what_is_booked_is_what_is_drawn(approved: Path, tune: Any, tmp_path: Path):
    noises: list[Any] = []

    def see(optimizer: Any, args: Any, kwargs: Any) -> None:
        parameters = optimizer.param_groups[0]["params"]
        flat = [4 * p.grad - p.summed_grad for p in parameters]  # 4: the public batch
        noises.append(torch.cat([part.flatten() for part in flat]).detach().cpu().numpy())

    handle = torch_optimizer.register_optimizer_step_pre_hook(see)
    try:
        said = tune(approved)
    finally:
        handle.remove()
    assert said.code == 0, said.err
    (mechanism,) = book(approved).spent()
    spec = Package.open(tmp_path / "ours", unsigned=True).spec
    assert (mechanism.steps, mechanism.sampling_rate) == (len(noises), 4 / 40)
    drawn = np.concatenate(noises) / spec.privacy.clip_norm  # type: ignore[union-attr]
    assert drawn.std() == pytest.approx(mechanism.noise_multiplier, rel=0.03)
    delta = spec.privacy.delta  # type: ignore[union-attr]
    epsilon = accounting.epsilon([mechanism], delta)
    assert 3.9 < epsilon <= 4.0  # what was asked for, and not what the model's own run had
    assert f"Booked: epsilon {epsilon:.3f}" in said.words
    privacy = Package.open(tmp_path / "ours", unsigned=True).card["privacy"]
    assert (
        f"further training is ({epsilon:.2f}, {delta:g})-differentially private under adding or "
        "removing one patient's whole record" in privacy["claim"][0]
    )
    assert "bears the composition of both" in privacy["claim"][0]
    assert (privacy["all_sites_epsilon"], privacy["all_sites_delta"]) == (None, None)
    assert privacy["sites"] == {}
    for said_before in privacy["claim"][1:]:
        assert said_before.startswith("Of the model where it began: ")
        assert "composition" not in said_before
    assert any("spent ε = " in said_before for said_before in privacy["claim"][1:])


def test_nobody_is_trained_on_who_is_held_out(
    approved: Path, tune: Any, monkeypatch: pytest.MonkeyPatch
):
    seen: list[Any] = []

    class Watched(LocalTrainer):
        def __init__(self, spec: Any, cohort: Any, **rest: Any) -> None:
            seen.append(cohort)
            super().__init__(spec, cohort, **rest)

    monkeypatch.setattr(node_home, "LocalTrainer", Watched)
    assert tune(approved).code == 0
    (cohort,) = seen
    assert (set(cohort.splits), len(cohort.patients)) == ({"train"}, 16)


def test_nothing_of_the_held_out_patients_is_in_the_package(
    approved: Path, tune: Any, model: Path, tmp_path: Path
):
    """docs/privacy.md 13: exact figures and real numbers of patients are on the screen alone."""
    card = json.loads((model / CARD).read_text())
    of_its_weights_alone = {"calibration": {"why": "w", "test": None}, "smaller": {"said": ["s"]}}
    counted = {"federated_evaluation": {"sites": {}, "patients": 3.0, "metrics": {}}}
    (model / CARD).write_text(json.dumps(card | of_its_weights_alone | counted))
    said = tune(approved)
    assert "must not leave the site" in said.words
    assert "8 held-out patients" in said.words
    ours = Package.open(tmp_path / "ours", unsigned=True)
    assert ours.card["evaluation"] == {"validation": None, "test": None}
    assert PERSONAL not in ours.card
    assert not set(of_its_weights_alone) & set(ours.card)
    begun = Package.open(model, unsigned=True)
    changed = {k for k in ours.card if ours.card[k] != begun.card.get(k)} - {"created"}
    assert changed == {
        *("name", "run_id", "spec_sha256", "model", "data", "training", "privacy", "versions"),
        *("evaluation", "federated_evaluation", "limitations", MADE_OF),
    }
    assert ours.card["federated_evaluation"] is None
    assert f"by one site, from the model {begun.model_sha256}" in ours.card["data"]["note"]
    assert "is not in this card" in ours.card["limitations"][0]
    assert ours.card["training"]["rounds_planned"] == 1
    with safe_open(tmp_path / "ours" / MODEL, "np") as file:
        assert PERSONAL not in file.metadata()
    assert not {"images", "patients", "metrics"} & keys(ours.card["evaluation"])
    assert ours.card["privacy"]["protected"] is True
    assert "differentially private" in ours.card["privacy"]["claim"][0]
    assert "It may be published" in said.words


def keys(document: Any) -> set[str]:
    if not isinstance(document, dict):
        return set()
    return set(document).union(*map(keys, document.values()))


@pytest.mark.parametrize("warning", ["Accounted, not protected. From a seed.", None])
def test_what_was_not_protected_before_is_not_protected_after(
    approved: Path, tune: Any, model: Path, tmp_path: Path, warning: str | None
):
    rewrite(model, protected=False, warning=warning, claim=["These hold for other nodes."])
    said = tune(approved)
    privacy = Package.open(tmp_path / "ours", unsigned=True).card["privacy"]
    assert privacy["protected"] is False
    assert privacy["warning"] == (warning or NOT_PROTECTED)
    assert "Of the model where it began: These hold for other nodes." in privacy["claim"]
    assert "It may be published" not in said.words
    assert (warning or NOT_PROTECTED) in said.words


def test_killed_before_it_is_written_it_comes_back_the_same_and_is_booked_once(
    approved: Path, tune: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    kept: list[bytes] = []

    def killed(out: Path, kind: str, files: Any, **_: Any) -> NoReturn:
        kept.append(files[MODEL])
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(export, "write_folder", killed)
        tune(approved)
    assert not (tmp_path / "ours").exists()
    assert len(book(approved).charges) == 1
    again = tune(approved)
    assert again.code == 0, again.err
    assert (tmp_path / "ours" / MODEL).read_bytes() == kept[0]
    assert len(book(approved).charges) == 1
    assert not book(approved).open_runs()
    third = tune(approved, "third")
    assert "the run is over at this site" in third.words
    assert len(book(approved).charges) == 1


def test_a_refusal_for_now_keeps_the_approval(approved: Path, tune: Any, tmp_path: Path):
    settings = approved / "node.toml"
    text, (run,) = settings.read_text(), book(approved).open_runs()
    settings.write_text(text.replace("hours = []", f'hours = ["{_another_hour()}"]'))
    assert "says no: later" in tune(approved).words
    assert book(approved).open_runs() == [run]
    settings.write_text(text)
    assert tune(approved).code == 0


def _another_hour() -> str:
    hour = (datetime.now().astimezone().hour + 6) % 24
    return f"{hour:02}:00-{hour:02}:30"


def test_what_can_be_foreseen_spends_nothing(
    approved: Path, tune: Any, model: Path, tmp_path: Path
):
    (tmp_path / "file").write_text("no folder")
    assert "cannot be made" in tune(approved, "file/ours").words
    card = (model / CARD).read_text()
    (model / CARD).write_text(json.dumps(json.loads(card) | {PERSONAL: {"warning": "mine"}}))
    assert "a personal model" in tune(approved).words
    (model / CARD).unlink()
    assert "has no model card" in tune(approved).words
    (model / CARD).write_text(card)
    for held in (alone, locked):
        with held(approved):
            assert "stop the node first" in tune(approved).words
    assert not book(approved).charges
    assert tune(approved).code == 0


def test_a_patient_of_both_parts_is_refused(make_home: Any, tune: Any):
    home = make_home(owners=[0, *range(1, 23), 0])
    assert "1 patients have images to train on and images marked 'test'" in tune(home).words
    assert not NodeFolder.open(home).requests.waiting()


def test_without_it_the_weights_themselves_say_that_they_must_stay(
    model: Path, cloister: Any, make_spec: Any, tmp_path: Path
):
    """A card is soon left behind; the file of the weights has the mark as well, pruned or not."""
    ours, smaller = tmp_path / "ours", tmp_path / "smaller"
    said = cloister("node", "fine-tune", model, tmp_path / "south", ours, "--unsigned")
    assert said.code == 0, said.err
    assert "signed by nobody" in said.words
    pruned = ("--prune", 0.3, "--cohort", tmp_path / "evaluation")
    assert cloister("optimise", ours, smaller, *pruned).code == 0
    signing = cast(Signing, SimpleNamespace(authority=None, unsigned=True))
    for folder in (ours, smaller / "pruned"):
        bare = tmp_path / f"bare-{folder.name}"
        bare.mkdir()
        for name in (SPEC, MODEL):
            shutil.copy(folder / name, bare / name)
        start = {"model_sha256": Package.open(bare, unsigned=True).model_sha256}
        with pytest.raises(PackageError, match="a personal model"):
            starting_model(make_spec(start=start), bare)
        with pytest.raises(PackageError, match="no federation signs it"):
            export.export(bare, tmp_path / "out", "package", signing=signing)
