"""Networks: the registry, their shapes, and that an image's output is its own."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from opacus import GradSampleModule
from torch import nn

from common import models
from common.errors import ModelError
from common.spec import RunSpec

ROOT = Path(__file__).parents[3]
BINARY = {"classes": ["normal", "opacity"]}
FOUR = {"kind": "multiclass", "classes": ["a", "b", "c", "d"]}
SIZES = [
    ("reference-cnn", (3, 150, 150)),
    ("reference-cnn", (1, 46, 61)),
    ("compact-cnn", (1, 28, 28)),
    ("compact-cnn", (3, 61, 46)),
    ("pooled-cnn", (1, 28, 28)),
    ("pooled-cnn", (3, 64, 48)),
    ("small-cnn", (1, 28, 28)),
    ("small-cnn", (3, 64, 48)),
    ("small-cnn", (1, 16, 16)),
    ("resnet18", (1, 28, 28)),
    ("resnet18", (3, 64, 80)),
    ("densenet121", (1, 32, 32)),
    ("densenet121", (3, 64, 48)),
    ("alexnet", (1, 28, 28)),
    ("alexnet", (3, 64, 90)),
    ("efficientnet-b0", (1, 16, 40)),
    ("efficientnet-b0", (3, 64, 80)),
    ("vit", (1, 28, 28)),
    ("vit", (3, 70, 66)),
    ("vit", (1, 130, 128)),
]
SMALLEST = {
    "alexnet": 16,
    "compact-cnn": 16,
    "densenet121": 32,
    "efficientnet-b0": 16,
    "pooled-cnn": 16,
    "reference-cnn": 46,
    "resnet18": 16,
    "small-cnn": 16,
    "vit": 16,
}
WITH_WIDTH = ("alexnet", "compact-cnn", "pooled-cnn", "small-cnn", "vit")


def make_spec(
    name: str, shape: tuple[int, int, int] = (1, 48, 48), seed: int = 1, **parts: Any
) -> RunSpec:
    channels, height, width = shape
    document = {
        "name": "test",
        "seed": seed,
        "rounds": 2,
        "task": parts.get("task", BINARY),
        "model": {"name": name, **parts.get("model", {})},
        "input": {"channels": channels, "height": height, "width": width},
        "optimizer": {"name": "sgd", "learning_rate": 0.1},
        "local": {"batch_size": 4},
        "privacy": {"mechanism": "none"},
    }
    return RunSpec.from_json(json.dumps(document))


def images(count: int, shape: tuple[int, int, int]) -> torch.Tensor:
    return torch.rand(count, *shape, generator=torch.Generator().manual_seed(7))


def fingerprint(model: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode() + tensor.numpy().tobytes())
    return digest.hexdigest()


class Centred(nn.Module):
    """A leak between the images of a batch, for the negative control."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.inner(x)
        return out - out.mean(dim=0)


def worst_leak(model: nn.Module, shape: tuple[int, int, int]) -> float:
    """How much the outputs and input gradients of image 0 move when image 2 changes."""
    seen = []
    for changed in (False, True):
        batch = images(3, shape)
        batch[2] = batch[2] * 50 - 20 if changed else batch[2]
        batch.requires_grad_()
        torch.manual_seed(3)  # dropout's masks are the same in both passes
        outputs = model(batch)
        (gradient,) = torch.autograd.grad(outputs[0].sum(), batch)
        seen.append((outputs[0].detach(), gradient))
    (before, slope), (after, new_slope) = seen
    elsewhere = slope[1:].abs().max().item()
    moved = (before - after).abs().max().item(), (slope[0] - new_slope[0]).abs().max().item()
    return float(max(*moved, elsewhere))


@pytest.mark.parametrize(("name", "shape"), SIZES)
@pytest.mark.parametrize(("task", "outputs"), [(BINARY, 1), (FOUR, 4)])
def test_every_network_gives_one_row_of_logits_an_image(name, shape, task, outputs):
    model = models.build(make_spec(name, shape, task=task))
    models.check_private(model)
    result = model(images(2, shape))
    assert result.shape == (2, outputs)
    assert torch.isfinite(result).all()
    assert model.training
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_the_table_of_sizes_covers_the_registry():
    assert {name for name, _ in SIZES} == set(models.names("vector")) == set(SMALLEST)


def test_reference_cnn_has_the_published_number_of_parameters():
    model = models.build(make_spec("reference-cnn", (3, 150, 150)))
    assert sum(parameter.numel() for parameter in model.parameters()) == 3_453_121


@pytest.mark.parametrize(
    ("name", "shape"),
    [("alexnet", (1, 70, 66)), ("efficientnet-b0", (1, 64, 70)), ("vit", (3, 66, 75))],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
def test_the_hooks_give_each_image_its_own_gradient(name, shape):
    """Against plain autograd, one image at a time, at sizes that the tests of sums do not have."""
    width = {"width": 6} if name in WITH_WIDTH else {}
    spec, batch = make_spec(name, shape, task=FOUR, model=width), images(2, shape)
    hooked = GradSampleModule(models.build(spec), loss_reduction="sum", strict=True)
    hooked(batch).square().mean(dim=1).sum().backward()
    alone = models.build(spec)
    named = dict(alone.named_parameters())
    found = {key: p.grad_sample for key, p in hooked._module.named_parameters()}
    assert set(found) == set(named)
    for number, image in enumerate(batch):
        slopes = torch.autograd.grad(alone(image[None]).square().mean(), list(named.values()))
        assert any(slope.abs().max() > 1e-3 for slope in slopes)
        for key, slope in zip(named, slopes, strict=True):
            assert torch.allclose(found[key][number], slope, rtol=1e-3, atol=1e-5), key


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("name", models.names("vector"))
def test_an_image_is_seen_by_its_own_output_alone_in_training(name, dropout):
    shape = (1, 48, 48)
    model = models.build(make_spec(name, shape, model={"dropout": dropout}))
    assert worst_leak(model, shape) < 1e-6
    assert worst_leak(Centred(model), shape) > 1e-3  # the test sees a leak where there is one


@pytest.mark.parametrize("name", models.names("vector"))
def test_dropout_is_applied(name):
    model = models.build(make_spec(name, model={"dropout": 0.5}))
    batch = images(2, (1, 48, 48))
    assert not torch.equal(model(batch), model(batch))
    model.eval()
    assert torch.equal(model(batch), model(batch))


@pytest.mark.parametrize("name", models.names("vector"))
def test_dropout_leaves_the_names_of_the_weights(name):
    plain, dropped = (
        models.build(make_spec(name, model={"dropout": dropout})).state_dict()
        for dropout in (0.0, 0.5)
    )
    assert list(plain) == list(dropped)


@pytest.mark.parametrize("name", ["small-cnn", "alexnet", "vit"])
def test_width_scales_a_network(name):
    def count(**options: Any) -> int:
        built = models.build(make_spec(name, model=options))
        return sum(parameter.numel() for parameter in built.parameters())

    assert count(width=4) < count(width=6) < count(width=7) < count() <= count(width=64)


@pytest.mark.parametrize("name", sorted(set(models.names("vector")) - set(WITH_WIDTH)))
def test_width_is_refused_where_it_means_nothing(name):
    with pytest.raises(ModelError, match=r"model\.width = 16"):
        models.build(make_spec(name, model={"width": 16}))


def test_an_unknown_name_is_refused_with_the_known_ones():
    with pytest.raises(ModelError) as caught:
        models.build(make_spec("resnet19"))
    assert "'resnet19'" in str(caught.value)
    assert all(name in str(caught.value) for name in models.names("vector"))


def test_a_network_that_gives_something_else_is_refused_and_those_that_fit_are_named():
    with pytest.raises(ModelError) as caught:
        models.build(make_spec("unet"))
    assert "'map'" in str(caught.value)
    assert "'vector'" in str(caught.value)
    assert "small-cnn" in str(caught.value)
    assert "vae" not in str(caught.value)


@pytest.mark.parametrize(("name", "side"), SMALLEST.items())
def test_an_image_too_small_for_the_network_is_refused(name, side):
    outputs = models.build(make_spec(name, (1, side, side)))(images(2, (1, side, side)))
    assert outputs.shape == (2, 1)
    for height, width in ((side - 1, 64), (64, side - 1)):
        with pytest.raises(ModelError, match=f"{height} x {width}.*at least {side} pixels"):
            models.build(make_spec(name, (1, height, width)))


ELSEWHERE = """
import json, sys
sys.path[:0] = sys.argv[2:]
import torch
from common import models
from common.spec import RunSpec
from test_models import fingerprint
torch.manual_seed(99)
specs = [RunSpec.from_json(text) for text in json.loads(sys.argv[1])]
print(json.dumps([fingerprint(models.build(spec)) for spec in specs]))
"""


@pytest.mark.slow
def test_the_same_spec_gives_the_same_weights_in_another_process():
    specs = [make_spec(name) for name in reversed(models.names("vector"))]
    texts = json.dumps([spec.canonical_json for spec in specs])
    command = [sys.executable, "-c", ELSEWHERE, texts, str(ROOT), str(Path(__file__).parent)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    there = json.loads(done.stdout)
    assert there == [fingerprint(models.build(spec)) for spec in specs]
    others = [make_spec(name, seed=2) for name in reversed(models.names("vector"))]
    assert not set(there) & {fingerprint(models.build(spec)) for spec in others}


@pytest.mark.parametrize("name", models.names("vector"))
def test_building_leaves_the_global_generator_alone(name):
    torch.manual_seed(5)
    expected = torch.rand(4)
    torch.manual_seed(5)
    models.build(make_spec(name))
    assert torch.equal(torch.rand(4), expected)


class HomeMadeBatchNorm(nn.Module):
    """Not a subclass of torch's, and without state."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x - x.mean(dim=0)) / (x.std(dim=0) + 1e-5)


def frozen(layer: nn.Module) -> nn.Module:
    return layer.eval().requires_grad_(False)


@pytest.mark.parametrize(
    "layer",
    [
        nn.BatchNorm1d(4),
        nn.BatchNorm2d(4),
        nn.BatchNorm3d(4),
        nn.LazyBatchNorm2d(),
        nn.SyncBatchNorm(4),
        nn.BatchNorm2d(4, affine=False),
        nn.BatchNorm2d(4, track_running_stats=False),
        nn.BatchNorm2d(4, affine=False, track_running_stats=False),
        frozen(nn.BatchNorm2d(4)),
        HomeMadeBatchNorm(),
    ],
    ids=repr,
)
def test_batch_norm_in_every_form_is_refused_by_the_name_of_its_layer(layer):
    model = models.build(make_spec("small-cnn"))
    model.add_module("stem", nn.Sequential(nn.Conv2d(1, 4, 3), layer))
    with pytest.raises(ModelError, match=r"stem\.1: .*BatchNorm.*use GroupNorm"):
        models.check_private(model)


def test_state_that_is_no_parameter_is_refused_by_name():
    model = nn.Sequential(nn.Linear(4, 4), nn.InstanceNorm1d(4, track_running_stats=True))
    with pytest.raises(ModelError, match=r"1\.running_mean: .*without being a parameter"):
        models.check_private(model)
    constant = nn.Linear(4, 4)
    constant.register_buffer("positions", torch.arange(4.0), persistent=False)
    models.check_private(constant)


def test_shared_weights_are_parameters_under_either_name():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    models.check_private(model)


def test_an_activation_in_place_is_refused_by_the_name_of_its_layer():
    with pytest.raises(ModelError, match="1: ReLU works in place"):
        models.check_private(nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True)))
