"""Two modalities, two encoders: whose weights learn from what, and what an absent one leaves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from common import models
from common.models.studies import ModalityNetwork
from common.spec import RunSpec
from common.tasks import task_for

SHAPE = (1, 48, 48)
IMAGES = 2
CT, MR = slice(0, IMAGES), slice(IMAGES, 2 * IMAGES)


@pytest.fixture
def of_modalities(make_spec: Callable[..., RunSpec]) -> Callable[..., RunSpec]:
    def make(name: str = "small-cnn", images: int = IMAGES, **changes: Any) -> RunSpec:
        width = {"width": 4} if models.NETWORKS[name].takes_width else {}
        seen = {"height": 48, "width": 48, "images": images, "modalities": ["CT", "MR"]}
        return make_spec(model={"name": name} | width, input=seen, **changes)

    return make


def drawn(patients: int, images: int = IMAGES, seed: int = 7) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(patients, 2 * images, *SHAPE, generator=generator)


def slopes(network: Any, loss: Tensor) -> list[float]:
    """The largest slope in either encoder, its attention included."""
    network.zero_grad()
    loss.backward()
    return [max(float(p.grad.abs().max()) for p in each.parameters()) for each in network.each]


@pytest.mark.parametrize(
    ("name", "images"), [("small-cnn", 1), *((name, 2) for name in models.names("vector"))]
)
def test_every_network_of_vectors_sees_modalities(of_modalities, name: str, images: int) -> None:
    spec = of_modalities(name, images, task={"kind": "multiclass", "classes": ["a", "b", "c"]})
    network: Any = models.build(spec)
    models.check_private(network)
    shown = drawn(3, images)
    shown[1, :images] = torch.nan
    logits, weights = network.attended(shown)
    assert logits.shape == (3, 3)
    assert torch.isfinite(logits).all()
    of_each = weights.view(3, 2, images).sum(dim=2)
    assert torch.allclose(of_each, torch.tensor([[1.0, 1.0], [0.0, 1.0], [1.0, 1.0]]))
    assert dict(models.shapes(spec)) == {k: tuple(p.shape) for k, p in network.named_parameters()}


@pytest.mark.parametrize(("name", "images"), [("small-cnn", 1), ("small-cnn", 2), ("vit", 2)])
def test_a_patient_without_a_modality_moves_its_encoder_by_exactly_nothing(
    of_modalities, name: str, images: int
) -> None:
    spec = of_modalities(name, images)
    network, task = models.build(spec), task_for(spec)
    found = torch.tensor([1])
    for absent in (0, 1):
        shown = drawn(1, images)
        shown[:, absent * images : (absent + 1) * images] = torch.nan
        moved = slopes(network, task.losses(network(shown), found).sum())
        assert moved[absent] == 0
        assert moved[1 - absent] > 0
    both = drawn(1, images)  # the negative control
    assert min(slopes(network, task.losses(network(both), found).sum())) > 0


def test_the_logits_are_those_of_the_formula(of_modalities) -> None:
    """What is pooled of each, side by side, and beside them which is absent."""
    network: Any = models.build(of_modalities()).eval()
    shown = drawn(2)
    shown[1, MR] = torch.nan
    for row, patient in enumerate(shown):
        parts = []
        for pool, places in zip(network.each, (CT, MR), strict=True):
            there = [image for image in patient[places] if not image.isnan().any()]
            h = [pool.encoder(image[None])[0] for image in there]
            scores = [
                pool.weight(pool.content(f).tanh() * pool.gate(f).sigmoid()).exp()[0] for f in h
            ]
            total: Any = sum(scores)
            empty = torch.zeros(network.each[0].content.in_features)
            parts.append(sum((s / total * f for s, f in zip(scores, h, strict=True)), empty))
        absent = torch.tensor([0.0, float(row == 1)])
        expected = network.output(torch.cat([*parts, absent]))
        assert torch.allclose(network(shown)[row], expected, atol=1e-5)


def test_each_modality_has_an_encoder_of_its_own(of_modalities) -> None:
    assert isinstance(models.build(of_modalities()), ModalityNetwork)
    network: Any = models.build(of_modalities()).eval()
    first, second = (pool.encoder[0].weight for pool in network.each)
    assert not torch.equal(first, second)
    shown = drawn(1)
    assert torch.allclose(network(shown), network(shown[:, [1, 0, 3, 2]]), atol=1e-6)
    assert not torch.allclose(network(shown), network(shown[:, [2, 3, 0, 1]]), atol=1e-3)


def test_absence_is_learned_and_not_the_same_as_nothing_to_be_seen(of_modalities) -> None:
    network: Any = models.build(of_modalities(images=1)).eval()
    shown = drawn(1, 1)
    shown[:, 1] = torch.nan
    before = network(shown)
    with torch.no_grad():
        network.output.weight[:, -1] += 2.0  # the column of an absent MR
    assert torch.allclose(network(shown), before + 2.0, atol=1e-5)
    shown[:, 1] = 0.0
    there = network(shown)
    with torch.no_grad():
        network.output.weight[:, -1] += 2.0
    assert torch.equal(network(shown), there)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_a_patient_is_seen_by_their_own_answer_alone(of_modalities, dropout: float) -> None:
    spec = of_modalities()
    spec = spec.model_copy(update={"model": spec.model.model_copy(update={"dropout": dropout})})
    network, answers = models.build(spec), []
    for factor in (1.0, torch.nan):
        shown = drawn(3)
        shown[2] *= factor
        torch.manual_seed(3)
        answers.append(network(shown))
    assert torch.allclose(answers[0][:2], answers[1][:2], atol=1e-6)
    assert not torch.allclose(answers[0][2], answers[1][2], atol=1e-4)
