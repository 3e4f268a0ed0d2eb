"""Exports are what the network is: ONNX by onnxruntime, a bundle by MONAI's own tools."""

from __future__ import annotations

import json
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from monai.bundle.config_parser import ConfigParser
from monai.bundle.scripts import run as run_bundle
from monai.bundle.scripts import verify_net_in_out
from torch import nn

from common import models
from common.calibration import Calibration
from common.errors import ModelError
from common.package import check_folder
from common.spec import RunSpec
from server.export import Described, export
from server.graph import OPSET, compare, graph
from server.monai_bundle import monai_files
from server.served import Served

ROOT = Path(__file__).parents[2]
LABELS = {"kind": "multilabel", "classes": ["a", "b", "c"]}
EVERY: list[tuple[str, dict[str, Any]]] = [
    ("compact-cnn", {}),
    ("pooled-cnn", {"input": {"channels": 3}}),
    ("vit", {}),
    ("alexnet", {}),
    ("efficientnet-b0", {}),
    ("resnet18", {}),
    ("densenet121", {}),
    ("unet", {"task": {"name": "segmentation", "classes": ["none", "left"]}, "metric": "dice"}),
    ("centernet", {"task": {"name": "detection", "classes": ["cell"]}, "metric": "map50"}),
    ("autoencoder", {"task": {"name": "reconstruction", "classes": ["a", "b"]}, "metric": "psnr"}),
    ("residual-unet", {"task": {"name": "reconstruction", "classes": []}, "metric": "psnr"}),
    ("vae", {"task": {"name": "reconstruction", "classes": ["a", "b"]}, "metric": "psnr"}),
    ("small-cnn", {"input": {"images": 3}}),
    ("pooled-cnn", {"input": {"modalities": ["CT", "MR"]}}),
    ("small-cnn", {"input": {"images": 2, "modalities": ["CT", "MR"]}}),
]
LOSSES = {"segmentation": "dice", "detection": "heatmap", "reconstruction": "mse"}


@pytest.fixture
def network_of(make_spec: Callable[..., RunSpec]) -> Callable[..., tuple[nn.Module, RunSpec]]:
    """A network with weights that are not those it begins with, and its spec."""

    def make(name: str, **changes: Any) -> tuple[nn.Module, RunSpec]:
        tables: dict[str, Any] = {
            "model": {"name": name},
            "input": {"height": 36, "width": 44} | changes.get("input", {}),
        }
        if "task" in changes:
            tables["task"] = changes["task"]
        if "metric" in changes:
            tables["loss"] = {"name": LOSSES[changes["task"]["name"]]}
            tables["evaluation"] = {"metric": changes["metric"]}
        spec = make_spec(**tables)
        network, source = models.build(spec).eval(), torch.Generator().manual_seed(3)
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=source))
        return network, spec

    return make


def run_graph(content: bytes, given: np.ndarray) -> dict[str, np.ndarray]:
    """A model by plain onnxruntime: every output by its name."""
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    (place,) = session.get_inputs()
    return dict(zip(names, session.run(None, {place.name: given}), strict=True))


# --- ONNX -----------------------------------------------------------------------------------------


def test_an_onnx_model_normalises_and_calibrates_by_itself(network_of):
    """Against the formulas written out: (x - mean) / std, the network, logits / T, sigmoid."""
    network, spec = network_of(
        "compact-cnn", task=LABELS, input={"mean": [0.4], "std": [0.2], "channels": 1}
    )
    heat = Calibration(
        kind="multilabel", temperatures=(0.5, 1.0, 3.0), images=100, patients=60, left=()
    )
    content = graph(Served(network, spec, heat), {"run": "small"})
    images = np.random.default_rng(1).random((7, 1, 36, 44), dtype=np.float32)
    images[1:3] = [[[[0.0]]], [[[1.0]]]]
    found = run_graph(content, images)
    with torch.no_grad():
        logits = network(torch.from_numpy((images - 0.4) / 0.2)).double().numpy()
    expected = 1 / (1 + np.exp(-logits / np.array([0.5, 1.0, 3.0])))
    assert list(found) == ["logits", "probabilities"]
    assert np.abs(found["probabilities"] - expected).max() < 1e-4
    uncalibrated = 1 / (1 + np.exp(-logits))
    assert np.abs(found["probabilities"] - uncalibrated).max() > 1e-2  # the temperatures matter
    for row in range(7):  # of one image as of many
        alone = run_graph(content, images[row : row + 1])["probabilities"]
        assert np.abs(alone - expected[row]).max() < 1e-4
    model = onnx.load_from_string(content)
    assert {entry.domain: entry.version for entry in model.opset_import}[""] == OPSET
    assert {entry.key: entry.value for entry in model.metadata_props}["run"] == "small"
    assert str(ROOT).encode() not in content  # nothing of the machine that it was made on


def test_a_graph_that_is_not_the_network_is_not_exported(network_of):
    network, spec = network_of("compact-cnn")
    content = graph(Served(network, spec), {})
    assert compare(Served(network, spec), content) < 1e-4
    with torch.no_grad():
        next(network.parameters()).view(-1)[0] += 0.05
    with pytest.raises(ModelError, match="nothing was exported"):
        compare(Served(network, spec), content)
    with torch.no_grad():
        next(network.parameters()).view(-1)[0] = torch.nan
    with pytest.raises(ModelError, match="nothing was exported"):
        compare(Served(network, spec), content)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "changes"), EVERY, ids=[name for name, _ in EVERY])
def test_every_network_gives_the_same_in_onnxruntime(network_of, name: str, changes):
    network, spec = network_of(name, **changes)
    served = Served(network, spec)
    content = graph(served, {})
    assert compare(served, content) < 1e-4
    images = torch.rand(4, *served.given, generator=torch.Generator().manual_seed(8))
    with torch.no_grad():
        expected = served(images)
    found = run_graph(content, images.numpy())
    assert list(found) == list(served.names)
    for ours, theirs in zip(expected, found.values(), strict=True):
        assert np.abs(ours.numpy() - theirs).max() < 1e-4


@pytest.mark.slow
def test_of_a_pair_the_generator_alone_is_exported(make_spec: Callable[..., RunSpec]):
    spec = make_spec(
        task={"name": "generation", "classes": ["normal", "finding"], "latent": 4},
        loss={"name": "adversarial"},
        model={"name": "dcgan", "width": 4},
        evaluation={"metric": "tstr-auroc"},
    )
    pair = models.build(spec).eval()
    content = graph(Served(pair, spec), {})
    given = torch.randn(5, 6, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        expected = pair.get_submodule("generator")(given).numpy()
    assert np.abs(run_graph(content, given.numpy())["image"] - expected).max() < 1e-4
    held = {tuple(array.dims) for array in onnx.load_from_string(content).graph.initializer}
    discriminator = pair.get_submodule("discriminator")
    assert tuple(next(discriminator.parameters()).shape) not in held


# --- MONAI ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def template(
    prepared_runs: Callable[..., Path],
    finish_run: Callable[..., Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """A finished run and its bundle, not to be changed."""
    place = tmp_path_factory.mktemp("made")
    run = finish_run(Path(shutil.copytree(prepared_runs(kind="multiclass"), place / "run")))
    export(run, place / "bundle", "monai", signing=None)
    return place


@pytest.fixture
def bundle(template: Path, tmp_path: Path) -> Path:
    shutil.copytree(template / "run", tmp_path / "run")
    return Path(shutil.copytree(template / "bundle", tmp_path / "bundle"))


def files_of(bundle: Path) -> dict[str, Any]:
    names = {"meta_file": "metadata", "config_file": "inference"}
    return {key: str(bundle / "configs" / f"{name}.json") for key, name in names.items()}


def test_monais_own_check_finds_what_the_metadata_says(bundle: Path, edit: Callable[..., None]):
    said: dict[str, Any] = {"net_id": "network_def", "device": "cpu", "bundle_root": str(bundle)}
    verify_net_in_out(**files_of(bundle), **said)
    metadata = bundle / "configs" / "metadata.json"
    known = json.loads(metadata.read_text())["network_data_format"]
    assert known["inputs"]["image"]["spatial_shape"] == [64, 64]
    assert known["outputs"]["pred"]["channel_def"]["1"] == "nodule"
    known["outputs"]["pred"]["num_channels"] = 7
    edit(metadata, network_data_format=known)
    with pytest.raises(ValueError, match="doesn't match"):
        verify_net_in_out(**files_of(bundle), **said)


MANDATORY = {
    *("version", "monai_version", "pytorch_version", "numpy_version"),
    *("optional_packages_version", "task", "description", "authors", "copyright"),
    "network_data_format",
}
OF_A_TENSOR = {
    *("type", "format", "num_channels", "spatial_shape", "dtype", "value_range"),
    *("is_patch_data", "channel_def"),
}


def test_the_metadata_has_every_key_that_the_specification_asks_for(bundle: Path):
    metadata = json.loads((bundle / "configs" / "metadata.json").read_text())
    assert set(metadata) >= MANDATORY
    for tensors in metadata["network_data_format"].values():
        assert all(set(tensor) >= OF_A_TENSOR for tensor in tensors.values())


def test_monais_parser_makes_the_runs_network_of_it(bundle: Path):
    parser = ConfigParser()
    parser.read_config(files_of(bundle)["config_file"])
    parser["bundle_root"] = str(bundle)
    network = parser.get_parsed_content("network")
    package = Described.of(bundle.parent / "run").package
    images = torch.rand(5, 1, 64, 64, generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        found = network(images)
        logits = package.network()((images - 0.5) / 0.25)
    heat = Described.of(bundle.parent / "run").calibration
    assert heat is not None
    expected = (logits / heat.temperatures[0]).softmax(dim=1)
    assert torch.allclose(found, expected, atol=1e-5)


def test_monai_runs_it_over_a_folder(bundle: Path, tmp_path: Path):
    (tmp_path / "in").mkdir()
    for name in ("a", "b"):
        np.save(tmp_path / "in" / f"{name}.npy", np.full((1, 64, 64), 0.3, np.float32))
    where = {"bundle_root": bundle, "dataset_dir": tmp_path / "in", "output_dir": tmp_path / "out"}
    paths = {key: str(path) for key, path in where.items()}
    run_bundle(run_id="run", init_id="", final_id="", **files_of(bundle), **paths)
    answers = [np.load(tmp_path / "out" / f"{name}.npy") for name in ("a", "b")]
    assert answers[0].shape == (3,)
    assert answers[0].sum() == pytest.approx(1, abs=1e-5)
    assert np.array_equal(*answers)


def test_a_bundle_names_nothing_of_the_machine_and_holds_no_state_dictionary(bundle: Path):
    for path in bundle.rglob("*"):
        assert path.suffix not in (".pt", ".pth", ".pkl")
        assert path.is_dir() or str(ROOT).encode() not in path.read_bytes()
    with zipfile.ZipFile(bundle / "models" / "model.ts") as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    assert not any(str(ROOT).encode() in content for content in parts.values())


def test_a_bundle_is_checked_like_every_export(bundle: Path):
    check_folder(bundle, unsigned=True)
    (bundle / "models" / "model.ts").write_bytes(b"x")
    with pytest.raises(Exception, match=r"model\.ts: altered"):
        check_folder(bundle, unsigned=True)


def test_a_network_that_is_given_no_image_is_no_bundle(
    make_spec: Callable[..., RunSpec], build_run: Callable[..., Path], finish_run: Any
):
    described = Described.of(finish_run(build_run()))
    spec = described.package.spec
    several = json.loads(spec.canonical_json)
    several["input"]["images"] = 2
    shutil.copytree(described.package.path, described.package.path.parent / "studies")
    folder = described.package.path.parent / "studies"
    (folder / "spec.json").write_text(json.dumps(several))
    with pytest.raises(ModelError, match="several images of a study"):
        monai_files(Described.of(finish_run(folder)))
