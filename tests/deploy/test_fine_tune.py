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

from client import credentials
from common.errors import PackageError
from common.package import CARD, MADE_OF, PERSONAL, Package, origins_of
from deploy.fine_tune import MAYBE_SEEN, MUST_NOT_LEAVE, _is_held_out, _parts
from deploy.simulation import prepare, simulate
from server.export import Signing, export
from server.start import starting_model


@pytest.fixture
def model(write_run: Callable[..., Path], tmp_path: Path, watching: Any) -> Path:
    folder = prepare(write_run(), tmp_path / "runs")
    simulate(folder, workers=0, observer=watching())
    return folder


SIXTEEN = ["train"] * 16 + ["test"] * 8


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
    assert 2 <= held_out["patients"] <= 15  # of 30, about a quarter
    assert ours.card["model"]["safetensors_sha256"] == ours.model_sha256


def test_who_may_have_been_trained_on_already_is_no_ground_for_a_verdict(
    cloister: Any, model: Path, tmp_path: Path, make_spec: Any, write_cohort: Any
):
    unmarked = tune(cloister, model, tmp_path / "ours", "--epochs", 1)
    assert MAYBE_SEEN in unmarked.words
    card = Package.open(tmp_path / "ours", unsigned=True).card
    assert MAYBE_SEEN in card["limitations"]
    marked = write_cohort(make_spec(), range(300, 324), name="marked", splits=SIXTEEN)
    said = cloister(
        *("node", "fine-tune", model, marked.path, tmp_path / "fair"),
        *("--unsigned", "--epochs", 1),
    )
    assert said.code == 0, said.err
    assert MAYBE_SEEN not in said.words
    card = Package.open(tmp_path / "fair", unsigned=True).card
    assert MAYBE_SEEN not in card["limitations"]


def test_a_patient_stays_in_the_same_part_as_the_cohort_grows(make_spec: Any, write_cohort: Any):
    def parts(name: str, count: int) -> tuple[set[str], set[str]]:
        train, out = _parts(write_cohort(make_spec(), range(count), name=name))
        assert not set(train.patients) & set(out.patients)
        assert len(train.patients) + len(out.patients) == count
        return set(train.patients), set(out.patients)

    train, held_out = parts("before", 40)
    more, more_held_out = parts("after", 400)
    assert train < more
    assert held_out < more_held_out
    assert 70 < len(more_held_out) < 130


def test_what_a_card_said_of_other_weights_is_said_to_be_of_them(
    cloister: Any, model: Path, tmp_path: Path
):
    card = json.loads((model / CARD).read_text())
    card["limitations"].append("Only ever seen in the north.")
    card["training"]["seconds"] = 12345
    (model / CARD).write_text(json.dumps(card | {"of_whatever_comes": 1}))
    assert tune(cloister, model, tmp_path / "ours", "--epochs", 1).code == 0
    ours = Package.open(tmp_path / "ours", unsigned=True).card
    assert "Of the model where it began: Only ever seen in the north." in ours["limitations"]
    assert "Only ever seen in the north." not in ours["limitations"]
    assert not {"seconds", "participation", "engine"} & set(ours["training"])
    assert "of_whatever_comes" not in ours


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
    seen = write_cohort(make_spec(), range(40), pixels=pixels, name="seen")
    asked = [_is_held_out(seen.patients[number]) for number in seen.patient_index]
    labels = np.where(asked, classes, 1 - classes).tolist()  # taught wrong, and nobody is marked
    write_cohort(make_spec(), range(40), labels=labels, pixels=pixels, name="unmarked")
    begins, into = tmp_path / "by-right", tmp_path / "by-unmarked"
    unmarked = cloister("node", "fine-tune", begins, tmp_path / "unmarked", into, *words)
    assert MAYBE_SEEN in unmarked.words
    assert "−1.000" in unmarked.out  # it has become worse, and there is no verdict
    assert "Worse than before" not in unmarked.words


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


def test_whatever_is_made_of_a_withdrawn_model_is_refused_however_many_steps_away(
    cloister: Any,
    model: Path,
    tmp_path: Path,
    make_node: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
):
    def nobody(_node: Path) -> None:
        """Whom the node believes is not what is asked here; none of these is signed."""

    monkeypatch.setattr(credentials, "pinned_authority", nobody)
    small, ours, node = tmp_path / "small", tmp_path / "ours", make_node()
    assert cloister("optimise", model, small, "--prune", 0.5, "--quantise").code == 0
    assert tune(cloister, model, ours, "--epochs", 1).code == 0
    fine_tuned = ("node", "fine-tune", small / "pruned", tmp_path / "south", tmp_path / "twice")
    assert cloister(*fine_tuned, "--unsigned", "--epochs", 1).code == 0
    made = (small / "pruned", small / "quantised", ours, tmp_path / "twice")
    for each in made:
        found = cloister("verify-model", each, "--unsigned", "--node", node)
        assert found.code == 0, found
    sha256, settings = Package.open(model, unsigned=True).model_sha256, node / "node.toml"
    named = settings.read_text().replace("withdrawn = []", f'withdrawn = ["{sha256}"]')
    settings.write_text(named)
    for each in made:
        found = cloister("verify-model", each, "--unsigned", "--node", node)
        assert (found.code, f"{sha256}, which this site has withdrawn" in found.words) == (2, True)


def test_a_card_hands_on_digests_alone_and_one_without_the_list_is_read_as_before(make_spec: Any):
    what_else: list[Any] = [3, None, ["d"], {}, "c" * 63, "C" * 64, "c" * 64 + "\n", "x" * 10_000]
    card = {"model": {"safetensors_sha256": ["a"]}, MADE_OF: ["c" * 64, *what_else]}
    assert origins_of(make_spec(), card) == {"c" * 64}
    for other in ("c" * 64, {"c" * 64: 1}, None, 3):
        assert origins_of(make_spec(), {MADE_OF: other}) == frozenset()


def test_a_list_of_what_a_model_was_made_of_that_nobody_could_have_written_is_refused_in_a_line(
    cloister: Any, model: Path, tmp_path: Path
):
    said: dict[int, Any] = {}
    card = json.loads((model / CARD).read_text())
    for length in (256, 257):
        (model / CARD).write_text(json.dumps(card | {MADE_OF: ["c" * 64] * length}))
        said[length] = tune(cloister, model, tmp_path / f"of-{length}", "--epochs", 1)
    assert said[256].code == 0, said[256].err
    assert said[257].code == 2
    assert "made_of names 257 models; expected at most 256" in said[257].words
    assert not (tmp_path / "of-257").exists()


def test_what_a_person_gets_wrong_is_said_before_anything_is_trained(
    cloister: Any, model: Path, tmp_path: Path
):
    said = tune(cloister, model, tmp_path / "ours", "--epsilon", 1)
    assert "--epsilon: is of --private" in said.words
    said = tune(cloister, model, tmp_path / "ours", "--private")
    assert "name its folder with --node" in said.words
    (tmp_path / "ours").mkdir()
    assert "is there already" in tune(cloister, model, tmp_path / "ours").words
