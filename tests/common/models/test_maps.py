"""The networks that answer with maps: their shapes, and that they stand Opacus' hooks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from opacus import GradSampleModule
from torch import Tensor, nn

from common import models
from common.errors import ModelError
from common.spec import RunSpec

SEGMENTATION = {"name": "segmentation", "classes": ["background", "head", "tail"]}
DETECTION = {"name": "detection", "classes": ["cell", "clot"]}
TASKS = {
    "unet": (SEGMENTATION, "dice", "dice-cross-entropy", 3),
    "centernet": (DETECTION, "map50", "heatmap", 6),
}
Make = Callable[..., RunSpec]


@pytest.fixture
def of_network(make_spec: Make) -> Make:
    """A run of the network `name` on images of a shape, with its own task."""

    def make(name: str, shape: tuple[int, int, int] = (1, 48, 48), **model: Any) -> RunSpec:
        task, metric, loss, _ = TASKS[name]
        channels, height, width = shape
        return make_spec(
            task=task,
            loss={"name": loss},
            evaluation={"metric": metric},
            model={"name": name} | model,
            input={"channels": channels, "height": height, "width": width},
        )

    return make


def drawn(count: int, shape: tuple[int, int, int]) -> Tensor:
    return torch.rand(count, *shape, generator=torch.Generator().manual_seed(7))


@pytest.mark.parametrize("shape", [(1, 32, 32), (3, 48, 64), (1, 47, 61), (1, 33, 100)])
@pytest.mark.parametrize("name", TASKS)
def test_a_map_has_a_place_for_every_pixel_or_every_fourth(of_network, name, shape):
    model = models.build(of_network(name, shape))
    models.check_private(model)
    result = model(drawn(2, shape))
    stride = {"unet": 1, "centernet": 4}[name]
    places = tuple(-(-side // stride) for side in shape[1:])
    assert result.shape == (2, TASKS[name][3], *places)
    assert torch.isfinite(result).all()


def test_the_u_net_has_the_number_of_parameters_that_it_says(of_network):
    model = models.build(of_network("unet"))
    assert sum(parameter.numel() for parameter in model.parameters()) == 461_875


def test_a_centre_is_rare_to_begin_with(of_network):
    maps = models.build(of_network("centernet"))(drawn(4, (1, 48, 48)))
    assert maps[:, :2].sigmoid().mean() < 0.05


@pytest.mark.parametrize("name", TASKS)
def test_width_scales_and_any_width_is_built(of_network, name):
    def count(**options: Any) -> int:
        built = models.build(of_network(name, **options))
        return sum(parameter.numel() for parameter in built.parameters())

    assert count(width=4) < count(width=5) < count(width=6) < count() < count(width=40)


@pytest.mark.parametrize("name", TASKS)
def test_dropout_is_applied_and_leaves_the_names_of_the_weights(of_network, name):
    plain, dropped = (models.build(of_network(name, dropout=d)) for d in (0.0, 0.5))
    assert list(plain.state_dict()) == list(dropped.state_dict())
    batch = drawn(2, (1, 48, 48))
    assert torch.equal(plain(batch), plain(batch))
    assert not torch.equal(dropped(batch), dropped(batch))
    dropped.eval()
    assert torch.equal(dropped(batch), dropped(batch))


class Centred(nn.Module):
    """A leak between the images of a batch, for the negative control."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.inner(x)
        return out - out.mean(dim=0)


def leak(model: nn.Module) -> float:
    """How much the answer to image 0 moves when image 2 changes."""
    batch = drawn(3, (1, 48, 48))
    before = model(batch)[0]
    batch[2] = batch[2] * 50 - 20
    return float((model(batch)[0] - before).detach().abs().max())


@pytest.mark.parametrize("name", TASKS)
def test_an_image_is_seen_by_its_own_answer_alone(of_network, name):
    model = models.build(of_network(name))
    assert leak(model) < 1e-6
    assert leak(Centred(model)) > 1e-3


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
@pytest.mark.parametrize("name", TASKS)
def test_the_hooks_give_each_image_its_own_gradient(of_network, name):
    """Against plain autograd, one image at a time; odd sides, where the U-Net pads."""
    shape = (1, 35, 46)
    spec = of_network(name, shape, width=4)
    batch = drawn(3, shape)
    hooked = GradSampleModule(models.build(spec), loss_reduction="sum", strict=True)
    hooked(batch).square().mean(dim=(1, 2, 3)).sum().backward()
    alone = models.build(spec)
    parameters = list(alone.named_parameters())
    per_image = {key: p.grad_sample for key, p in hooked._module.named_parameters()}
    assert set(per_image) == {key for key, _ in parameters}
    for number, image in enumerate(batch):
        loss = alone(image[None]).square().mean()
        slopes = torch.autograd.grad(loss, [p for _, p in parameters])
        for (key, _), slope in zip(parameters, slopes, strict=True):
            assert torch.allclose(per_image[key][number], slope, rtol=1e-3, atol=1e-6), key


@pytest.mark.parametrize("name", TASKS)
def test_a_task_of_labels_refuses_a_network_of_maps(make_spec, name):
    side = {"height": 48, "width": 48}
    with pytest.raises(ModelError, match=name):
        models.build(make_spec(model={"name": name}, input=side))
