"""A study's network: what it does with absent images, and that a study is seen alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from common import models
from common.errors import ModelError
from common.models import studies
from common.spec import RunSpec
from common.tasks.augment import augment
from common.tasks.preprocess import normalise

SHAPE = (1, 48, 48)
PLACES = 4


@pytest.fixture
def study_spec(make_spec: Callable[..., RunSpec]) -> Callable[..., RunSpec]:
    def make(name: str = "small-cnn", **changes: Any) -> RunSpec:
        width = {"width": 4} if models.NETWORKS[name].takes_width else {}
        seen = {"height": 48, "width": 48, "images": PLACES} | changes.pop("input", {})
        return make_spec(model={"name": name} | width, input=seen, **changes)

    return make


def drawn(*counts: int, seed: int = 7) -> Tensor:
    """Studies with as many images each."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(len(counts), PLACES, *SHAPE, generator=generator)
    for study, count in zip(images, counts, strict=True):
        study[count:] = torch.nan
    return images


@pytest.mark.parametrize("name", models.names("vector"))
def test_every_network_of_vectors_sees_studies(study_spec, name):
    spec = study_spec(name, task={"kind": "multiclass", "classes": ["a", "b", "c"]})
    network: Any = models.build(spec)
    models.check_private(network)
    logits, weights = network.attended(drawn(4, 1, 2))
    assert logits.shape == (3, 3)
    assert torch.isfinite(logits).all()
    assert torch.allclose(weights.sum(dim=1), torch.ones(3))
    assert (weights == 0).tolist() == [[False] * 4, [False, *[True] * 3], [False] * 2 + [True] * 2]
    named = {key: tuple(p.shape) for key, p in network.named_parameters()}
    assert dict(models.shapes(spec)) == named


def test_the_logits_are_those_of_the_formula(study_spec):
    """Against the sum written out image by image, from the encoder's features."""
    network: Any = models.build(study_spec()).eval()
    images = drawn(3)
    features = [network.encoder(images[0, place][None])[0] for place in range(3)]
    scores = []
    for h in features:
        gated = torch.tanh(network.content.weight @ h + network.content.bias) * torch.sigmoid(
            network.gate.weight @ h + network.gate.bias
        )
        scores.append(network.weight.weight[0] @ gated + network.weight.bias[0])
    total = sum(torch.exp(score) for score in scores)
    pooled = sum(torch.exp(s) / total * h for s, h in zip(scores, features, strict=True))
    expected = network.output.weight @ pooled + network.output.bias
    assert torch.allclose(network(images)[0], expected, atol=1e-6)


def test_absent_images_and_the_order_of_images_change_nothing(study_spec):
    network = models.build(study_spec()).eval()
    images = drawn(3)
    alone = network(images[:, :3])
    assert torch.allclose(network(images), alone, atol=1e-6)
    assert torch.allclose(network(images[:, [3, 2, 0, 1]]), alone, atol=1e-6)
    with_zeros = torch.where(images.isnan(), 0.0, images)  # the negative control: black images
    assert not torch.allclose(network(with_zeros), alone, atol=1e-4)


def test_a_study_without_images_has_an_answer_and_slopes_that_are_numbers(study_spec):
    network: Any = models.build(study_spec())
    logits, weights = network.attended(drawn(0))
    assert weights.abs().max() == 0
    assert torch.allclose(logits[0], network.output.bias)
    logits.sum().backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in network.parameters())
    assert network.encoder[0].weight.grad.abs().max() == 0


def test_an_image_with_one_pixel_that_is_no_number_is_not_absent(study_spec):
    images = drawn(4)
    images[0, 1, 0, 5, 5] = torch.nan
    assert models.build(study_spec())(images).isnan().all()


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_a_study_is_seen_by_its_own_answer_alone(study_spec, dropout):
    spec = study_spec()
    spec = spec.model_copy(update={"model": spec.model.model_copy(update={"dropout": dropout})})
    network = models.build(spec)
    answers = []
    for factor in (1.0, 50.0):
        images = drawn(4, 2, 3)
        images[2, :, :, :20] *= factor
        torch.manual_seed(3)
        answers.append(network(images))
    assert torch.allclose(answers[0][:2], answers[1][:2], atol=1e-6)
    assert not torch.allclose(answers[0][2], answers[1][2], atol=1e-4)


def test_each_image_of_a_study_is_normalised_for_itself(study_spec):
    colours = {"channels": 3, "mean": [0.1, 0.2, 0.3], "std": [0.5, 0.5, 0.5]}
    for seen in (colours, {"channels": 3, "normalize": "image"}):
        spec = study_spec(input=seen).input
        images = torch.rand(2, PLACES, 3, 8, 8, generator=torch.Generator().manual_seed(1))
        images[1, 2:] = torch.nan
        found = normalise(images, spec)
        alone = study_spec(input=seen | {"images": 1}).input
        for study in range(2):
            for place in range(PLACES if study == 0 else 2):
                single = normalise(images[study, place][None], alone)[0]
                assert torch.allclose(found[study, place], single, atol=1e-6)
        assert found[1, 2:].isnan().all()


def test_an_absent_image_stays_absent_when_it_is_augmented(make_spec):
    augmentation = make_spec(
        augmentation={"rotate": 20.0, "shift": 0.1, "flip_horizontal": True}
    ).augmentation
    images = drawn(4, 2)
    moved, _ = augment(images, augmentation, torch.Generator().manual_seed(1))
    assert moved.shape == images.shape
    assert moved[1, 2:].isnan().all()
    assert torch.isfinite(moved[0]).all()
    assert torch.isfinite(moved[1, :2]).all()


def test_a_network_without_features_is_refused(study_spec, monkeypatch):
    line = models.Network(f"{__name__}:without_features", smallest_side=8)
    monkeypatch.setitem(models.NETWORKS, "bare", line)
    with pytest.raises(ModelError, match="'bare': it does not end with a linear layer of 1"):
        models.build(study_spec("bare"))


def without_features(spec: RunSpec) -> nn.Module:
    return nn.Sequential(nn.Linear(48, 2), nn.Conv2d(1, 1, 3))


def test_the_weights_without_studies_are_what_they_were(study_spec):
    """The network of single images is built as before, and its names have no prefix."""
    spec = study_spec(input={"images": 1})
    assert not isinstance(models.build(spec), studies.StudyNetwork)
    assert np.prod(models.build(spec)(torch.rand(2, *SHAPE)).shape) == 2
