"""Losses and probabilities, against torch's own, one image at a time."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from common.errors import ModelError
from common.spec import Loss, RunSpec
from common.tasks.classification import Classification

IMAGES = 7
WEIGHTS = (0.5, 2.0, 3.0)
LOSSES: list[dict[str, Any]] = [
    {"name": name, "label_smoothing": smoothing, "focal_gamma": gamma}
    for name, gammas in {"cross-entropy": (2.0,), "mse": (2.0,), "focal": (0.0, 0.5, 2.0)}.items()
    for smoothing in (0.0, 0.1)
    for gamma in gammas
]
KINDS = ("binary", "multiclass", "multilabel")


def make_task(kind: str, loss: dict[str, Any], *, weighted: bool = False) -> Classification:
    classes = ["a", "b"] if kind == "binary" else ["a", "b", "c"]
    weights = {"class_weights": WEIGHTS[: len(classes)]} if weighted else {}
    document = {
        "name": "test",
        "rounds": 1,
        "task": {"kind": kind, "classes": classes},
        "model": {"name": "small-cnn"},
        "input": {"height": 28, "width": 28},
        "loss": loss | weights,
        "optimizer": {"name": "sgd", "learning_rate": 0.1},
        "local": {"batch_size": 4},
        "privacy": {"mechanism": "none"},
    }
    return Classification(RunSpec.from_json(json.dumps(document)))


def batch(kind: str, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    outputs = 3 * torch.randn(IMAGES, 1 if kind == "binary" else 3, generator=generator)
    if kind == "multilabel":
        return outputs, torch.randint(2, (IMAGES, 3), generator=generator).float()
    return outputs, torch.randint(2 if kind == "binary" else 3, (IMAGES,), generator=generator)


def two_choices(logit: Tensor, label: Tensor, loss: Loss) -> Tensor:
    """Torch's own loss of one logit against absent (0) or present (1)."""
    target = label.double() * (1 - loss.label_smoothing) + loss.label_smoothing / 2
    if loss.name == "mse":
        return functional.mse_loss(torch.sigmoid(logit), target)
    if loss.name == "cross-entropy":
        return functional.binary_cross_entropy_with_logits(logit, target)
    p, gamma = torch.sigmoid(logit), loss.focal_gamma
    present = target * (1 - p) ** gamma * torch.log(p)
    return -(present + (1 - target) * p**gamma * torch.log(1 - p))


def many_choices(logits: Tensor, label: Tensor, loss: Loss) -> Tensor:
    """Torch's own loss of a row of logits against one right class."""
    if loss.name == "cross-entropy":
        return functional.cross_entropy(logits, label, label_smoothing=loss.label_smoothing)
    smoothing = loss.label_smoothing
    target = functional.one_hot(label, len(logits)) * (1 - smoothing) + smoothing / len(logits)
    p = torch.softmax(logits, dim=0)
    if loss.name == "mse":
        return functional.mse_loss(p, target)
    terms = [t * (1 - q) ** loss.focal_gamma * torch.log(q) for t, q in zip(target, p, strict=True)]
    return -torch.stack(terms).sum()


def slow_loss(kind: str, output: Tensor, label: Tensor, loss: Loss, weights: tuple[float, ...]):
    """The loss of one image in float64, written out kind by kind."""
    output = output.double()
    if kind == "binary":
        return weights[int(label)] * two_choices(output[0], label, loss)
    if kind == "multiclass":
        return weights[int(label)] * many_choices(output, label, loss)
    terms = [w * two_choices(o, y, loss) for o, y, w in zip(output, label, weights, strict=True)]
    return torch.stack(terms).mean()


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("loss", LOSSES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_every_loss_agrees_with_torch_image_by_image(kind, loss, weighted):
    outputs, labels = batch(kind)
    weights = WEIGHTS if weighted else (1.0, 1.0, 1.0)
    losses = make_task(kind, loss, weighted=weighted).losses(outputs, labels)
    expected = torch.stack(
        [
            slow_loss(kind, output, label, Loss(**loss), weights)
            for output, label in zip(outputs, labels, strict=True)
        ]
    )
    assert losses.shape == (IMAGES,)
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses.double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("loss", LOSSES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_a_loss_is_a_function_of_its_own_image_alone(kind, loss):
    task = make_task(kind, loss, weighted=True)
    outputs, labels = batch(kind)
    others, other_labels = batch(kind, seed=1)
    others[2], other_labels[2] = outputs[2], labels[2]
    losses, changed = task.losses(outputs, labels), task.losses(others, other_labels)
    assert losses[2] == changed[2]
    assert not torch.allclose(losses, changed)
    alone = task.losses(outputs[2:3], labels[2:3])  # a mean over the batch's weights would move it
    torch.testing.assert_close(alone[0], losses[2])


@pytest.mark.parametrize("loss", LOSSES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_certain_outputs_keep_losses_and_slopes_finite(kind, loss):
    outputs, labels = batch(kind)
    outputs = (outputs.sign() * 200).requires_grad_()
    losses = make_task(kind, loss).losses(outputs, labels)
    losses.sum().backward()
    assert torch.isfinite(losses).all()
    assert outputs.grad is not None
    assert torch.isfinite(outputs.grad).all()


def test_class_weights_multiply_the_loss_of_their_class():
    outputs, labels = batch("binary")
    plain = make_task("binary", {}).losses(outputs, labels)
    weighted = make_task("binary", {}, weighted=True).losses(outputs, labels)
    torch.testing.assert_close(weighted / plain, torch.tensor(WEIGHTS)[labels])


def test_probabilities_of_each_kind():
    outputs, _ = batch("binary")
    p = torch.sigmoid(outputs[:, 0])
    both = make_task("binary", {}).probabilities(outputs)
    torch.testing.assert_close(both, torch.stack([1 - p, p], dim=1))
    outputs, _ = batch("multiclass")
    chosen = make_task("multiclass", {}).probabilities(outputs)
    torch.testing.assert_close(chosen, torch.softmax(outputs, dim=1))
    torch.testing.assert_close(
        make_task("multilabel", {}).probabilities(outputs), torch.sigmoid(outputs)
    )


def test_outputs_of_half_precision_are_taken_up_to_float32():
    outputs, labels = batch("multiclass")
    task = make_task("multiclass", {})
    losses = task.losses(outputs.bfloat16(), labels)
    assert losses.dtype == task.probabilities(outputs.bfloat16()).dtype == torch.float32
    assert torch.equal(losses, task.losses(outputs.bfloat16().float(), labels))


def test_an_empty_batch_has_no_losses():
    for kind in KINDS:
        outputs, labels = batch(kind)
        assert make_task(kind, {}).losses(outputs[:0], labels[:0]).shape == (0,)


@pytest.mark.parametrize(
    ("kind", "outputs", "labels"),
    [
        ("binary", (4, 1), (4, 1)),
        ("binary", (4, 2), (4,)),
        ("binary", (4,), (4,)),
        ("multiclass", (4, 3), (3,)),
        ("multiclass", (4, 3), (4, 3)),
        ("multilabel", (4, 3), (4,)),
    ],
)
def test_other_shapes_are_refused(kind, outputs, labels):
    with pytest.raises(ModelError, match="expected"):
        make_task(kind, {}).losses(torch.zeros(outputs), torch.zeros(labels, dtype=torch.int64))
