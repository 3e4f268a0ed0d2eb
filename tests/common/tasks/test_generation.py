"""Generation: losses, what teaches the generator, what a judge learns from it, and distances."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from common import models
from common.errors import ModelError, SpecError
from common.spec import RunSpec
from common.tasks import task_for
from common.tasks.exhibits import Chart, Gallery
from common.tasks.generation import Generation, bound_slopes, distances, memory

SIDE = 16
Make = Callable[..., Generation]


@pytest.fixture
def generation(make_spec: Callable[..., RunSpec]) -> Make:
    """The task of a run; `task`, `evaluation` and others change those tables."""

    def make(**changes: Any) -> Generation:
        classes = ["normal", "finding"]
        task = {"name": "generation", "classes": classes, "latent": 8} | changes.pop("task", {})
        evaluation = {"metric": "tstr-auroc", "bootstrap": 50} | changes.pop("evaluation", {})
        loss = changes.pop("loss", {"name": "adversarial"})
        spec = make_spec(
            task=task,
            evaluation=evaluation,
            loss=loss,
            model={"name": "dcgan", "width": 4},
            **changes,
        )
        made = task_for(spec)
        assert isinstance(made, Generation)
        return made

    return make


def source(seed: int = 5) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pair_of(task: Generation) -> Any:
    return models.build(task.spec)


class Images:
    """As much of a cohort as an evaluation reads; each image of its own patient if not said."""

    def __init__(self, images: Tensor, labels: Any, patients: Any = None) -> None:
        self._images = images.numpy()
        self._labels = np.asarray(labels)
        self.shape = self.row_shape = images.shape[1:]
        self.patient_index = np.arange(len(images)) if patients is None else np.asarray(patients)

    def __len__(self) -> int:
        return len(self._images)

    def images(self, rows: Any) -> Any:
        return self._images[rows]

    def targets(self, rows: Any) -> Any:
        return self._labels[rows]

    def examples(self, rows: Any) -> Any:
        return self.images(rows), self.targets(rows)


class Painter(nn.Module):
    """A generator that paints by class: a bright upper half, lower half, or neither, and noise.

    With `confused` it takes the last class for the first, and so on.
    """

    def __init__(self, given: int, classes: int, *, confused: bool = False) -> None:
        super().__init__()
        self.given, self.classes, self.confused = given, classes, confused
        self.unused = nn.Parameter(torch.zeros(1))

    def forward(self, given: Tensor) -> Tensor:
        has = given[:, -self.classes :]
        noise = given[:, :1, None, None] * torch.linspace(-1, 1, SIDE)
        if self.confused:
            has = has.flip(1)
        return painted(has) + 0.02 * noise


def painted(has: Tensor) -> Tensor:
    images = torch.full((len(has), 1, SIDE, SIDE), 0.3)
    images[:, :, : SIDE // 2] += 0.4 * has[:, -1, None, None, None]
    images[:, :, :, SIDE // 2 :] += 0.2 * has[:, 0, None, None, None]
    return images


def real(labels: Tensor, classes: int, seed: int = 1) -> Tensor:
    has = labels.float() if labels.dim() == 2 else functional.one_hot(labels, classes).float()
    images = painted(has)
    return (images + 0.05 * torch.randn(images.shape, generator=source(seed))).clamp(0, 1)


def worth(task: Generation, generator: nn.Module, cohort: Any) -> Any:
    network = pair_of(task)
    network.generator = generator
    network.eval()
    evidence = task.evidence(network, cohort, torch.device("cpu"))
    figures = task.score(
        evidence, cohort.patient_index, resamples=20, generator=np.random.default_rng(1)
    )
    return evidence, figures


# --- Losses ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["binary", "multilabel"])
def test_each_image_has_a_synthetic_one_of_its_class_behind_it(generation: Make, kind):
    task = generation(task={"kind": kind})
    labels = (
        torch.tensor([0, 1, 1]) if kind == "binary" else torch.tensor([[0.0, 0], [1, 0], [1, 1]])
    )
    has = functional.one_hot(labels, 2).float() if kind == "binary" else labels
    images, network = torch.rand(3, 1, SIDE, SIDE, generator=source()), pair_of(task)
    network.generator = Painter(10, 2)
    rows, targets = task.examples(images, labels, network, source())
    assert torch.equal(rows[::2], images)
    assert (rows[1::2] - painted(has)).abs().max() < 0.1
    assert torch.equal(targets[::2], torch.cat([has, torch.ones(3, 1)], dim=1))
    assert torch.equal(targets[1::2], torch.cat([has, torch.zeros(3, 1)], dim=1))


def test_the_logistic_loss_is_torchs_of_what_the_discriminator_says_of_the_class(generation: Make):
    outputs = torch.tensor([[0.5, 1.0, -3.0], [0.5, 1.0, -3.0]])
    targets = torch.tensor([[1.0, 0, 1], [0, 1, 0]])
    expected = functional.binary_cross_entropy_with_logits(
        torch.tensor([1.5, -2.5]), torch.tensor([1.0, 0.0]), reduction="none"
    )
    assert torch.allclose(generation().losses(outputs, targets), expected)


def test_the_wasserstein_loss_is_what_the_discriminator_says_with_its_sign(generation: Make):
    task = generation(loss={"name": "wasserstein"})
    outputs = torch.tensor([[0.5, 1.0, -3.0], [0.5, 1.0, -3.0]])
    targets = torch.tensor([[1.0, 0, 1], [0, 1, 0]])
    expected = torch.tensor([-1.5 + 1e-3 * 1.5**2, -2.5 + 1e-3 * 2.5**2])
    assert torch.allclose(task.losses(outputs, targets), expected)


@pytest.mark.parametrize("shape", [(4,), (4, 1), (4, 2)])
def test_a_shape_that_does_not_fit_is_named(generation: Make, shape):
    with pytest.raises(ModelError, match=r"expected \(4, 3\)"):
        generation().losses(torch.zeros(shape), torch.zeros(4, 3))


# --- What follows a step -------------------------------------------------------------------------


@pytest.mark.parametrize("loss", ["adversarial", "wasserstein"])
def test_the_generator_comes_to_please_the_discriminator_and_leaves_it_as_it_is(
    generation: Make, loss
):
    task = generation(
        task={"generator_learning_rate": 1e-2, "generator_steps": 30}, loss={"name": loss}
    )
    network = pair_of(task)
    bound_slopes(network.discriminator)
    before = [p.detach().clone() for p in network.discriminator.parameters()]
    weights = {name: p.detach().clone() for name, p in network.generator.named_parameters()}

    def pleased() -> float:
        drawn = task.draw(network, 64, source(1))
        rows = torch.cat([functional.one_hot(drawn.labels, 2).float(), torch.ones(64, 1)], dim=1)
        return -float(task.losses(network(drawn.images * 4 - 2), rows).mean().detach())

    at_first = pleased()
    task.follow(network, source())
    assert pleased() > at_first + 0.01
    after = list(network.discriminator.parameters())
    assert all(torch.allclose(a, b) for a, b in zip(before, after, strict=True))
    assert all(parameter.grad is None for parameter in after)
    moved = {n for n, p in network.generator.named_parameters() if not torch.equal(p, weights[n])}
    assert moved == set(weights)


def test_no_slope_of_a_layer_is_above_one_and_those_below_stay_as_they_are():
    steep, flat = nn.Conv2d(2, 3, 3), nn.Linear(4, 5)
    with torch.no_grad():
        steep.weight.mul_(9)
        flat.weight.mul_(float(0.5 / np.linalg.norm(flat.weight.numpy(), ord=2)))
    before = flat.weight.detach().clone()
    direction = steep.weight.detach().clone() / steep.weight.norm()
    bound_slopes(nn.Sequential(steep, flat))
    slopes = np.linalg.svd(steep.weight.detach().flatten(1).numpy(), compute_uv=False)
    assert slopes.max() == pytest.approx(1, abs=1e-5)
    assert torch.allclose(steep.weight / steep.weight.norm(), direction, atol=1e-6)
    assert torch.equal(flat.weight, before)


def test_weights_that_are_no_numbers_do_not_stop_a_node():
    layer = nn.Linear(2, 2)
    nn.init.constant_(layer.weight, torch.inf)
    bound_slopes(layer)
    assert torch.isinf(layer.weight).all()


# --- Drawing -------------------------------------------------------------------------------------


def test_what_is_drawn_follows_from_the_source_and_begins_alike(generation: Make):
    task = generation()
    network = pair_of(task).eval()
    few, many = (task.draw(network, count, source()) for count in (5, 600))
    assert torch.equal(few.images, many.images[:5])
    assert torch.equal(few.labels, many.labels[:5])
    assert many.images.shape == (600, 1, SIDE, SIDE)
    assert 0 <= many.images.min() <= many.images.max() <= 1
    assert 240 < many.labels.sum() < 360
    assert not torch.equal(task.draw(network, 5, source(6)).images, few.images)


# --- What it is worth --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "task",
    [
        {},
        {"kind": "multiclass", "classes": ["a", "b", "c"]},
        {"kind": "multilabel", "classes": ["a", "b", "c"]},
    ],
)
def test_a_judge_taught_on_good_images_knows_real_ones(generation: Make, task):
    made = generation(task=task, evaluation={"gallery": 4})
    classes = len(made.spec.task.classes)
    labels = torch.arange(90) % classes
    if task.get("kind") == "multilabel":
        labels = torch.randint(2, (90, classes), generator=source()).float()
        labels[:, 1] = labels[:, 0]  # the painter shows the first and the last
    cohort = Images(real(labels, classes), labels)
    painter = Painter(8 + classes, classes)
    evidence, figures = worth(made, painter, cohort)
    auroc = figures["tstr-auroc"]
    assert auroc.value > (0.95 if classes == 2 else 0.6)
    assert auroc.low <= auroc.value <= auroc.high
    network = pair_of(made)
    network.generator = painter
    some: Any = cohort
    evidence |= made.gallery(network, some, torch.device("cpu"))
    shown: Any = made.exhibits(evidence, np.arange(90))
    assert [type(each) for each in shown] == [Chart, Chart, Gallery]
    assert len(shown[-1].pictures) == len(shown[-1].captions) == 4


def test_a_judge_taught_on_images_of_the_wrong_class_is_wrong(generation: Make):
    labels = torch.arange(200) % 2
    cohort = Images(real(labels, 2), labels)
    _, good = worth(generation(), Painter(10, 2), cohort)
    _, bad = worth(generation(), Painter(10, 2, confused=True), cohort)
    assert good["tstr-auroc"].value > 0.95
    assert bad["tstr-auroc"].value < 0.05
    again = worth(generation(), Painter(10, 2), cohort)[1]
    assert again == good


def test_images_that_are_no_numbers_leave_no_figure(generation: Make):
    class Broken(Painter):
        def forward(self, given: Tensor) -> Tensor:
            return super().forward(given) * torch.nan

    labels = torch.arange(20) % 2
    _, figures = worth(generation(), Broken(10, 2), Images(real(labels, 2), labels))
    assert all(figure.value is None for figure in figures.values())


# --- Memory ------------------------------------------------------------------------------------


def test_distances_are_those_of_a_slow_search_and_leave_the_patients_own_images_out():
    images = torch.rand(12, 1, SIDE, SIDE, generator=source())
    synthetic = torch.rand(30, 1, SIDE, SIDE, generator=source(2))
    patients = np.arange(12) // 2
    found = distances(Images(images, np.zeros(12), patients), synthetic)  # type: ignore[arg-type]
    for row, image in enumerate(images):
        made = [float((image - other).square().mean().sqrt()) for other in synthetic]
        others = [
            float((image - other).square().mean().sqrt())
            for other, patient in zip(images, patients, strict=True)
            if patient != patients[row]
        ]
        assert found["nearest"][row] == pytest.approx(min(made[:12]), abs=1e-5)
        assert found["nearest_of_all"][row] == pytest.approx(min(made), abs=1e-5)
        assert found["nearest_real"][row] == pytest.approx(min(others), abs=1e-5)


def test_a_copy_may_be_any_of_the_images_that_were_made():
    images = torch.rand(4, 1, SIDE, SIDE, generator=source())
    synthetic = torch.cat([torch.rand(30, 1, SIDE, SIDE, generator=source(2)), images[:1]])
    cohort: Any = Images(images, np.zeros(4))
    found = distances(cohort, synthetic)
    told = memory(found, cohort.patient_index, resamples=0, generator=np.random.default_rng(1))
    assert told["copies"].value == pytest.approx(25.0)


def test_a_generator_that_gives_its_training_images_back_is_told_from_one_that_does_not(
    generation: Make,
):
    labels = torch.arange(40) % 2
    cohort = Images(torch.rand(40, 1, SIDE, SIDE, generator=source()), labels)

    class Parrot(Painter):
        def forward(self, given: Tensor) -> Tensor:
            return torch.from_numpy(cohort.images(np.arange(len(given)) % 40))

    _, parrot = worth(generation(), Parrot(10, 2), cohort)
    _, painter = worth(generation(), Painter(10, 2), cohort)
    assert parrot["copies"].value == 100
    assert parrot["nearest"].value == pytest.approx(0, abs=1e-3)
    assert painter["copies"].value == 0
    assert painter["nearest"].value > 0.6


def test_one_patient_alone_has_nobody_to_be_compared_with(generation: Make):
    labels = torch.arange(6) % 2
    cohort = Images(real(labels, 2), labels, np.zeros(6, dtype=np.int64))
    evidence, figures = worth(generation(), Painter(10, 2), cohort)
    assert figures["copies"].value is None
    assert figures["nearest"].value is None
    assert len(generation().exhibits(evidence, cohort.patient_index)) == 1


# --- The section -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loss": {"name": "mse"}}, "expected one of adversarial, wasserstein"),
        (
            {"loss": {"name": "adversarial", "class_weights": [1.0, 2.0]}},
            r"loss\.class_weights = .*leave it out",
        ),
        ({"task": {"classes": ["one"]}}, "classes"),
        ({"evaluation": {"metric": "copies"}}, "expected one of tstr-auroc, tstr-accuracy"),
        ({"task": {"latent": 0}}, "latent"),
    ],
)
def test_what_does_not_fit_a_generation_is_refused(generation: Make, changes, message):
    with pytest.raises(SpecError, match=message):
        generation(**changes)


def test_among_what_is_measured_is_no_picture(generation: Make):
    labels = torch.arange(20) % 2
    evidence, _ = worth(
        generation(evaluation={"gallery": 4}), Painter(10, 2), Images(real(labels, 2), labels)
    )
    assert not [name for name in evidence if name.startswith("gallery")]
