"""Smaller models: what is pruned, what is quantised, and whether the comparison holds."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from common import models
from common.calibration import Calibration
from common.cohort import Cohort
from common.errors import ModelError
from common.package import MADE_OF, Package
from common.spec import RunSpec
from common.tasks import task_for
from common.tasks.paired import paired_differences
from server.export import Described, write_folder
from server.graph import graph
from server.optimise import (
    OnnxNetwork,
    Optimised,
    optimise,
    pruned_network,
    quantised_graph,
    raw,
    zeros_of,
)
from server.served import Served


@pytest.fixture
def network(make_spec: Callable[..., RunSpec]) -> nn.Module:
    return models.build(make_spec(model={"name": "compact-cnn"})).eval()


def layers_of(network: nn.Module) -> list[nn.Module]:
    return [layer for layer in network.modules() if isinstance(layer, nn.Conv2d | nn.Linear)]


# --- Pruning --------------------------------------------------------------------------------------


def test_the_smallest_weights_of_the_whole_network_become_zero_and_no_others_change(network):
    made = pruned_network(network, 0.4, structured=False)
    before = torch.cat([layer.get_parameter("weight").flatten() for layer in layers_of(network)])
    after = torch.cat([layer.get_parameter("weight").flatten() for layer in layers_of(made)])
    gone = after == 0
    assert int(gone.sum()) == round(0.4 * len(before))
    assert before[gone].abs().max() <= before[~gone].abs().min()
    assert torch.equal(after[~gone], before[~gone])
    untouched = {name for name, _ in network.named_parameters() if "bias" in name}
    changed = dict(made.named_parameters())
    assert all(torch.equal(changed[n], p) for n, p in network.named_parameters() if n in untouched)


def test_whole_filters_become_zero_but_never_all_and_never_an_answer(network):
    made = pruned_network(network, 0.5, structured=True)
    *hidden, last = zip(layers_of(network), layers_of(made), strict=True)
    for before, after in hidden:
        norms = before.get_parameter("weight").flatten(1).norm(dim=1)
        gone = after.get_parameter("weight").flatten(1).abs().sum(dim=1) == 0
        assert int(gone.sum()) == round(0.5 * len(norms))
        assert norms[gone].max() <= norms[~gone].min()
    assert torch.equal(last[0].get_parameter("weight"), last[1].get_parameter("weight"))
    almost = pruned_network(network, 0.99, structured=True)
    assert all(layer.get_parameter("weight").any() for layer in layers_of(almost))


def test_the_network_that_was_given_stays_as_it_is(network):
    before = {name: p.clone() for name, p in network.named_parameters()}
    pruned_network(network, 0.9, structured=True)
    pruned_network(network, 0.9, structured=False)
    assert all(torch.equal(before[name], p) for name, p in network.named_parameters())


# --- The difference -------------------------------------------------------------------------------


def evidence(spec: RunSpec, labels: np.ndarray, noise: float, seed: int) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    positive = 1 / (1 + np.exp(-(2 * labels - 1 + noise * rng.normal(size=len(labels)))))
    both = np.stack([1 - positive, positive], axis=1).astype(np.float32)
    return {"probabilities": both, "labels": labels}


def test_a_difference_is_that_on_the_same_patients_and_its_interval_is_by_patient(
    make_spec: Callable[..., RunSpec],
):
    """Brier scores are means over images: bootstrap means of the differences, written out."""
    spec, rng = make_spec(), np.random.default_rng(5)
    patients = np.sort(rng.integers(0, 60, 240))
    labels = rng.integers(0, 2, 240)
    before, after = (evidence(spec, labels, noise, 3) for noise in (0.8, 1.2))
    found = paired_differences(
        task_for(spec), (before, after), patients, generator=np.random.default_rng(1)
    )["brier"]
    errors = [(e["probabilities"][:, 1] - labels) ** 2 for e in (before, after)]
    change = errors[1] - errors[0]
    names = np.unique(patients)
    sums = np.array([change[patients == name].sum() for name in names])
    counts = np.array([(patients == name).sum() for name in names])
    drawn = np.random.default_rng(2).integers(0, len(names), (4000, len(names)))
    low, high = np.percentile(sums[drawn].sum(1) / counts[drawn].sum(1), (2.5, 97.5))
    assert found.value == pytest.approx(change.mean(), abs=1e-6)
    assert found.low == pytest.approx(low, abs=0.15 * (high - low))
    assert found.high == pytest.approx(high, abs=0.15 * (high - low))
    assert found.low is not None
    assert found.low > 0  # worse, and seen to be


def test_a_model_that_is_the_same_differs_by_nothing(make_spec: Callable[..., RunSpec]):
    spec, labels = make_spec(), np.arange(60) % 2
    same = evidence(spec, labels, 1.0, 3)
    found = paired_differences(
        task_for(spec),
        (same, same),
        np.arange(60),
        generator=np.random.default_rng(1),
        resamples=20,
    )
    assert {(each.value, each.low, each.high) for each in found.values()} == {(0.0, 0.0, 0.0)}


# --- Quantisation ---------------------------------------------------------------------------------


def test_convolutions_are_in_8_bits_and_an_answer_depends_on_its_image_alone(
    network, make_spec: Callable[..., RunSpec]
):
    spec = make_spec(model={"name": "compact-cnn"}, input={"mean": [0.4], "std": [0.2]})
    content = graph(Served(network, spec), {})
    eight = quantised_graph(content)
    operators = [node.op_type for node in onnx.load_from_string(eight).graph.node]
    assert operators.count("ConvInteger") == 2
    assert "Conv" not in operators
    assert len(eight) < len(content)
    session = onnxruntime.InferenceSession(eight, providers=["CPUExecutionProvider"])
    images = np.random.default_rng(1).random((2, 1, 16, 16), dtype=np.float32)
    with pytest.raises(Exception, match=r"[Ii]nvalid dimensions"):
        session.run(None, {"images": images})
    found = OnnxNetwork(eight, network)(torch.from_numpy(images))
    with torch.no_grad():
        exact = network((torch.from_numpy(images) - 0.4) / 0.2)
    assert torch.allclose(found, exact, atol=0.2)
    assert not torch.equal(found, exact)
    assert torch.equal(OnnxNetwork(eight, network)(torch.from_numpy(images[1:])), found[1:])
    assert raw(spec).input.mean == (0.0,)


# --- All of it ------------------------------------------------------------------------------------


def test_a_model_is_measured_and_what_comes_out_has_papers_of_its_own(
    build_run: Callable[..., Path],
    finish_run: Callable[..., Path],
    write_cohort: Callable[..., Cohort],
    tmp_path: Path,
):
    run = finish_run(build_run(protection="none"))
    spec = RunSpec.from_json((run / "spec.json").read_text())
    cohort = write_cohort(spec, list(range(150)))
    made = optimise(Described.of(run), cohort, prune=0.5, structured=False, quantise=True)
    check_papers(run, made, tmp_path)
    check_table(made)


def check_papers(run: Path, made: Optimised, tmp_path: Path) -> None:
    assert made.pruned is not None
    assert made.quantised is not None
    write_folder(tmp_path / "pruned", "package", made.pruned)
    before = Package.open(run, unsigned=True)
    after = Package.open(tmp_path / "pruned", unsigned=True)
    assert after.spec == before.spec
    assert after.model_sha256 != before.model_sha256
    assert zeros_of(after.network()) == pytest.approx(0.5, abs=0.02)
    assert after.card["smaller"]["of_model_sha256"] == before.model_sha256
    assert after.card[MADE_OF] == [before.model_sha256]
    told = made.measured["pruned"].result
    assert told is not None
    assert told.test is not None
    auroc = told.test.metrics["auroc"].to_json()
    assert after.card["evaluation"]["test"]["metrics"]["auroc"] == auroc
    assert "## Made smaller" in (tmp_path / "pruned" / "model_card.md").read_text()
    check_eight_bits(made, after)


def check_eight_bits(made: Optimised, pruned: Package) -> None:
    """It says all that was done to it, by hashes of its own, and its figures are its own."""
    assert made.quantised is not None
    card, content = json.loads(made.quantised["model_card.json"]), made.quantised["model.onnx"]
    assert [said.partition(":")[0] for said in card["smaller"]["said"]] == [
        "weights pruned",
        "quantised",
    ]
    assert card["smaller"]["of_model_sha256"] == pruned.model_sha256
    assert card[MADE_OF] == sorted(pruned.origins())  # not only the step before
    assert len(card[MADE_OF]) == 2
    assert card["model"]["safetensors_sha256"] is None
    assert card["model"]["onnx_sha256"] == hashlib.sha256(content).hexdigest()
    model = onnx.load_from_string(content)
    told = {entry.key: entry.value for entry in model.metadata_props}
    assert told["of_model_sha256"] == pruned.model_sha256
    assert json.loads(told["smaller"]) == card["smaller"]["said"]
    del model.metadata_props[:]
    assert told["model_sha256"] == hashlib.sha256(model.SerializeToString()).hexdigest()
    assert card["evaluation"] != pruned.card["evaluation"]
    assert made.measured["quantised"].size == len(content)


def test_what_is_measured_is_the_graph_that_is_written(
    build_run: Callable[..., Path],
    finish_run: Callable[..., Path],
    write_cohort: Callable[..., Cohort],
    monkeypatch: pytest.MonkeyPatch,
):
    """Every network that onnxruntime answers for is kept; the last one measured is the one out."""
    seen: list[bytes] = []

    class Seen(OnnxNetwork):
        def __init__(self, content: bytes, *more: Any) -> None:
            seen.append(content)
            super().__init__(content, *more)

    monkeypatch.setattr("server.optimise.OnnxNetwork", Seen)
    run = finish_run(build_run(protection="none"))
    spec = RunSpec.from_json((run / "spec.json").read_text())
    cohort = write_cohort(spec, list(range(150)))
    made = optimise(Described.of(run), cohort, prune=0, structured=False, quantise=True)
    assert made.quantised is not None
    card = json.loads(made.quantised["model_card.json"])
    assert card["calibration"]["temperatures"]  # else both are one
    model = onnx.load_from_string(made.quantised["model.onnx"])
    del model.metadata_props[:]
    assert model.SerializeToString() == seen[-1]


def test_a_calibrated_graph_answers_as_without_its_temperatures_where_it_is_measured(
    network, make_spec: Callable[..., RunSpec]
):
    spec = make_spec(model={"name": "compact-cnn"})
    heat = Calibration(kind="binary", temperatures=(2.5,), images=100, patients=60)
    plain, warm = (graph(Served(network, spec, each), {}) for each in (None, heat))
    images = torch.rand(3, 1, 16, 16, generator=torch.Generator().manual_seed(1))
    expected = OnnxNetwork(plain, network)(images)
    assert torch.allclose(OnnxNetwork(warm, network, (2.5,))(images), expected, atol=1e-5)
    assert not torch.allclose(OnnxNetwork(warm, network)(images), expected, atol=1e-3)


def check_table(made: Optimised) -> None:
    """Every form is in it; a difference stands where there can be one."""
    assert list(made.measured) == ["as it is", "pruned", "ONNX", "quantised"]
    sizes = {name: one.size for name, one in made.measured.items()}
    assert sizes["quantised"] < sizes["ONNX"]
    packed = {name: one.compressed for name, one in made.measured.items()}
    assert packed["pruned"] < 0.8 * packed["as it is"]
    assert sizes["pruned"] == pytest.approx(sizes["as it is"], rel=0.05)  # zeros take their place
    assert not made.measured["as it is"].differences
    assert set(made.measured["pruned"].differences) >= {"auroc", "brier"}
    assert all(one.milliseconds > 0 for one in made.measured.values())
    assert json.loads(made.table())["pruned"]["zero_weights"] > 0.4


def test_a_generator_is_not_quantised(
    make_spec: Callable[..., RunSpec], write_cohort: Callable[..., Cohort], tmp_path: Path
):
    spec = make_spec(
        task={"name": "generation", "classes": ["clear", "finding"], "latent": 4},
        loss={"name": "adversarial"},
        model={"name": "dcgan", "width": 4},
        evaluation={"metric": "tstr-auroc"},
    )
    run = tmp_path / "run"
    run.mkdir()
    (run / "spec.json").write_text(spec.canonical_json)
    save_file(models.build(spec).state_dict(), run / "model.safetensors")
    sha256 = Package.open(run, unsigned=True).model_sha256
    card = {"spec_sha256": spec.digest, "model": {"safetensors_sha256": sha256}}
    (run / "model_card.json").write_text(json.dumps(card))
    described, cohort = Described.of(run), write_cohort(spec, [1, 2])
    with pytest.raises(ModelError, match="not quantised"):
        optimise(described, cohort, prune=0, structured=False, quantise=True)
