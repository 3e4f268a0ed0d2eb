"""Settings against learning by heart: each does something wherever a run's file may set it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from common import models
from common.errors import ModelError, SpecError
from common.noise import Keystream
from common.spec import RunSpec
from common.tasks import task_for

Spec = Callable[..., RunSpec]

TASKS: dict[str, dict[str, Any]] = {
    "vector": {},
    "map": {
        "task": {"name": "segmentation", "kind": "mask", "classes": ["none", "a"]},
        "loss": {"name": "dice-cross-entropy"},
        "evaluation": {"metric": "dice"},
    },
    "boxes": {
        "task": {"name": "detection", "kind": "boxes", "classes": ["a"]},
        "loss": {"name": "heatmap"},
        "evaluation": {"metric": "map50"},
    },
    "image": {
        "task": {"name": "reconstruction", "kind": "none", "classes": []},
        "loss": {"name": "mse"},
        "evaluation": {"metric": "psnr"},
    },
    "pair": {
        "task": {"name": "generation", "classes": ["a", "b"]},
        "loss": {"name": "adversarial"},
        "evaluation": {"metric": "tstr-auroc"},
    },
}


def of_network(make_spec: Spec, name: str, **more: Any) -> RunSpec:
    line = models.NETWORKS[name]
    side = max(32, line.smallest_side)
    size = {"height": side, "width": side}
    return make_spec(**TASKS[line.gives], model={"name": name} | more, input=size)


@pytest.mark.parametrize("name", models.names())
def test_dropout_acts_in_every_network_that_takes_it(make_spec: Spec, name: str):
    """In training two passes of one batch differ by the masks alone; with none they do not."""
    given = torch.rand(2, *of_network(make_spec, name).input.shape)
    differ = []
    for dropout in (0.0, 0.5):
        network: nn.Module = models.build(of_network(make_spec, name, dropout=dropout)).train()
        passes = []
        with torch.no_grad():
            for seed in (1, 2):
                torch.manual_seed(seed if dropout else 1)  # a variational code is drawn as well
                passes.append(network(given))
        differ.append(not torch.equal(*passes))
        network.eval()
        with torch.no_grad():
            assert torch.equal(network(given), network(given))
    assert differ == [False, True]


def test_dropout_of_a_network_that_has_none_is_refused(make_spec: Spec, linear_network: str):
    models.build(make_spec(model={"name": linear_network}))
    for made in (models.build, models.shapes):
        with pytest.raises(ModelError, match=r"model\.dropout = 0\.5: 'linear' has no dropout"):
            made(make_spec(model={"name": linear_network, "dropout": 0.5}))


@pytest.mark.parametrize(
    "optimizer",
    [
        {"name": "sgd", "learning_rate": 0.1},
        {"name": "adam", "learning_rate": 0.01},
        {"name": "adamw", "learning_rate": 0.01},
    ],
    ids=lambda chosen: chosen["name"],
)
@pytest.mark.parametrize("mechanism", ["none", "dp-sgd"])
def test_weight_decay_pulls_towards_zero_with_and_without_privacy(  # noqa: PLR0913, PLR0917
    make_spec: Spec,
    make_trainer: Any,
    array_cohort: Any,
    global_weights: Any,
    optimizer: dict[str, Any],
    mechanism: str,
):
    norms = []
    for decay in (0.0, 0.5):
        spec = make_spec(
            optimizer=optimizer | {"weight_decay": decay},
            local={"batch_size": 4, "steps": 5},
            privacy={"mechanism": "none"} if mechanism == "none" else {},
        )
        images = np.random.default_rng(1).random((4, *spec.input.shape), dtype=np.float32)
        trainer = make_trainer(spec, array_cohort(images, np.arange(4) % 2), 4)
        weights = global_weights(spec)
        update = trainer.train(weights, 1, Keystream.seeded(1, "north", 1)).update
        after = np.concatenate([(weights[name] + update[name]).ravel() for name in weights])
        norms.append(np.linalg.norm(after))
    assert norms[1] < norms[0]


@pytest.mark.parametrize("loss", ["cross-entropy", "focal", "dice-cross-entropy"])
def test_label_smoothing_acts_on_every_loss_of_masks_that_takes_it(make_spec: Spec, loss: str):
    outputs = torch.randn(2, 2, 8, 8, generator=torch.Generator().manual_seed(1))
    masks = torch.zeros(2, 8, 8, dtype=torch.int64)
    parts = TASKS["map"]
    plain, smooth = (
        task_for(make_spec(**parts | {"loss": {"name": loss, "label_smoothing": part}}))
        for part in (0.0, 0.2)
    )
    assert not torch.allclose(plain.losses(outputs, masks), smooth.losses(outputs, masks))


@pytest.mark.parametrize(
    ("parts", "told"),
    [
        (TASKS["map"] | {"loss": {"name": "dice", "label_smoothing": 0.1}}, "takes none"),
        (TASKS["map"] | {"loss": {"name": "dice", "focal_gamma": 1.0}}, "it is of 'focal'"),
        ({"loss": {"name": "cross-entropy", "focal_gamma": 1.0}}, "it is of 'focal'"),
        (TASKS["boxes"] | {"loss": {"name": "heatmap", "label_smoothing": 0.1}}, "no loss of"),
    ],
)
def test_a_setting_of_the_loss_that_would_do_nothing_is_refused(
    make_spec: Spec, parts: dict[str, Any], told: str
):
    with pytest.raises(SpecError, match=told):
        make_spec(**parts)
