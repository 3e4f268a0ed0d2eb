"""How far one patient can move the sum before noise: at most by the clip norm C.

Each case trains one step twice through the real trainer, with and without one patient, and looks
at the sum to which the noise is added. Everyone is sampled (q = 1) and the noise is zero, so what
differs is that patient. The augmentation is drawn image by image in the order of the patients; the
one who is taken away stands last, so that the others' draws stay what they were.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from opacus.grad_sample import GradSampleModuleFastGradientClipping
from opacus.optimizers import DPOptimizerFastGradientClipping
from opacus.utils.fast_gradient_clipping_utils import DPLossFastGradientClipping
from torch import Tensor, nn

from client import training
from client.training import LocalTrainer, PatientOptimizer
from common import models
from common.spec import RunSpec
from common.tasks import task_for
from common.tasks.classification import Classification

PATIENTS = 5
POISONED = 2
TOLERANCE = 1e-5  # of C, for float32
# Where rounding may push a ReLU over its edge: deep networks, and weights chosen to do harm. What
# it costs depends on how a kernel adds for that size of batch; the guarantee is for real numbers.
EDGES = 2e-3

HEAVY = ("resnet18", "densenet121", "efficientnet-b0")
LIGHT = tuple(name for name in models.names("vector") if name not in HEAVY)
LOSSES = ("cross-entropy", "mse", "focal")
LOADED = {"class_weights": [0.5, 3.0], "label_smoothing": 0.1}
# Far below every patient's norm, and near it, where a change of the norm would show.
CLIP_NORMS = (1e-3, 0.3)

Vector = NDArray[np.float64]
SumOf = Callable[[Sequence[int]], Vector]
Weights = dict[str, NDArray[np.float32]]


def drawn_weights(spec: RunSpec, largest: float) -> Weights:
    """Weights of a coordinator that means no good: accepted, and as large as they may be."""
    rng = np.random.default_rng(3)
    named = models.build(spec).named_parameters()
    return {
        name: rng.uniform(-largest, largest, tuple(parameter.shape)).astype(np.float32)
        for name, parameter in named
    }


@dataclass
class Bench:
    """One run's trainer, its cohort and weights; `sum_of` says what the noise is added to."""

    spec: RunSpec
    trainer: LocalTrainer
    cohort: Any
    weights: Weights
    watch: Callable[[], Any]
    keystream: Callable[[], Any]
    zeroed: list[int] = field(default_factory=list)

    @property
    def clip_norm(self) -> float:
        return float(self.spec.privacy.clip_norm)  # type: ignore[union-attr]

    def sum_of(self, patients: Sequence[int]) -> Vector:
        self.cohort.show([[patient] for patient in patients])
        with self.watch() as steps:
            result = self.trainer.train(self.weights, 1, self.keystream())
        assert result.sampled == (len(patients),)
        self.zeroed.append(result.zeroed)
        return np.asarray(steps[0].summed, dtype=np.float64)


@pytest.fixture
def make_bench(  # noqa: PLR0913, PLR0917 - a bench is put together from these
    make_spec: Any,
    make_trainer: Any,
    array_cohort: Any,
    watch_steps: Any,
    quiet_keystream: Any,
    global_weights: Any,
) -> Callable[..., Bench]:
    def make(  # noqa: PLR0913 - what the cases differ in
        model: str = "small-cnn",
        *,
        loss: dict[str, Any] | None = None,
        kind: str = "binary",
        copies: int = 1,
        clip_norm: float = 0.3,
        physical: int = 2,
        poison: float | None = None,
        largest_weight: float | None = None,
    ) -> Bench:
        line = models.NETWORKS[model]
        classes = ["a", "b"] if kind == "binary" else ["a", "b", "c"]
        spec = make_spec(
            task={"kind": kind, "classes": classes},
            model={"name": model} | ({"width": 4} if line.takes_width else {}),
            input={"height": line.smallest_side, "width": line.smallest_side},
            augmentation={"rotate": 20.0, "shift": 0.1, "multiplicity": copies},
            loss=loss or {},
            local={"batch_size": PATIENTS},
            privacy={"clip_norm": clip_norm},
        )
        rng = np.random.default_rng(11)
        images = rng.random((PATIENTS, *spec.input.shape), dtype=np.float32)
        if poison is not None:
            images[POISONED, 0, line.smallest_side // 2, line.smallest_side // 2] = poison
        labels = np.arange(PATIENTS) % len(classes)
        if kind == "multilabel":
            labels = rng.integers(0, 2, (PATIENTS, 3)).astype(np.float32)
        weights = global_weights(spec)
        if largest_weight is not None:
            weights = drawn_weights(spec, largest_weight)
        cohort = array_cohort(images, labels)
        trainer = make_trainer(spec, cohort, PATIENTS, physical_images=physical * copies)
        return Bench(spec, trainer, cohort, weights, watch_steps, quiet_keystream)

    return make


def moves(
    sum_of: SumOf, clip_norm: float, patients: int = PATIENTS, removed: Sequence[int] | None = None
) -> Vector:
    """By how many clip norms the sum moves when each of `removed` is taken away."""
    moved = []
    for patient in range(patients) if removed is None else removed:
        others = [other for other in range(patients) if other != patient]
        difference = sum_of([*others, patient]) - sum_of(others)
        moved.append(float(np.linalg.norm(difference)) / clip_norm)
    return np.asarray(np.nan_to_num(np.array(moved), nan=np.inf), dtype=np.float64)


def is_bounded(moved: Vector, tolerance: float = TOLERANCE) -> bool:
    return bool((moved <= 1 + tolerance).all())


# --- at most C ---------------------------------------------------------------------------------


def of_loss(name: str, *, loaded: bool) -> dict[str, Any]:
    return {"name": name} | (LOADED if loaded else {})


@pytest.mark.parametrize(("copies", "clip_norm"), [(1, min(CLIP_NORMS)), (3, max(CLIP_NORMS))])
@pytest.mark.parametrize("loaded", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize("loss", LOSSES)
def test_no_patient_moves_the_sum_of_the_small_cnn_by_more_than_c(
    make_bench, loss, loaded, copies, clip_norm
):
    bench = make_bench(loss=of_loss(loss, loaded=loaded), copies=copies, clip_norm=clip_norm)
    moved = moves(bench.sum_of, clip_norm)
    assert is_bounded(moved)
    if clip_norm == min(CLIP_NORMS):
        assert (moved > 0.99).all()  # everyone is clipped: the bound is met, not only kept


def in_turn(networks: Sequence[str]) -> list[tuple[str, str, int]]:
    """Every network with every loss; one copy and three take turns, so that each meets both."""
    return [
        (model, loss, 1 + 2 * ((row + column) % 2))
        for row, model in enumerate(networks)
        for column, loss in enumerate(LOSSES)
    ]


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("kind", ["multiclass", "multilabel"])
def test_nor_with_many_classes_or_labels(make_bench, kind, loss):
    weights = {"class_weights": [0.5, 3.0, 1.0], "label_smoothing": 0.1}
    bench = make_bench(loss={"name": loss} | weights, kind=kind, copies=3)
    assert is_bounded(moves(bench.sum_of, bench.clip_norm))


@pytest.mark.parametrize(
    ("model", "loss", "copies"), in_turn([name for name in LIGHT if name != "small-cnn"])
)
def test_nor_that_of_another_light_network(make_bench, model, loss, copies):
    bench = make_bench(model, loss=of_loss(loss, loaded=True), copies=copies)
    assert is_bounded(moves(bench.sum_of, bench.clip_norm))


@pytest.mark.parametrize(("model", "loss", "copies"), in_turn(HEAVY))
def test_nor_that_of_a_large_network(make_bench, model, loss, copies):
    """Three patients, one of whom has an infinite pixel, and another goes."""
    clip_norm = CLIP_NORMS[copies == 1]
    bench = make_bench(
        model,
        loss=of_loss(loss, loaded=True),
        copies=copies,
        clip_norm=clip_norm,
        poison=np.inf,
    )
    removed = [LOSSES.index(loss) % POISONED]
    moved = moves(bench.sum_of, clip_norm, POISONED + 1, removed)
    assert is_bounded(moved, EDGES)
    assert moved[0] > 0.99 or clip_norm == max(CLIP_NORMS)
    assert bench.zeroed == [1, 1]


@pytest.mark.parametrize(("poison", "copies"), [(np.inf, 3), (-np.inf, 1), (np.nan, 1)])
@pytest.mark.parametrize("model", LIGHT)
def test_a_patient_with_an_infinite_pixel_moves_nothing_and_spoils_nothing(
    make_bench, model, copies, poison
):
    bench = make_bench(model, copies=copies, poison=poison)
    moved = moves(bench.sum_of, bench.clip_norm)
    assert is_bounded(moved)
    assert moved[POISONED] == 0
    assert np.delete(moved, POISONED).min() > 0.1
    assert sorted(set(bench.zeroed)) == [0, 1]


@pytest.mark.parametrize(
    ("model", "largest_weight"),
    [*((model, w) for model in LIGHT for w in (1.0, 1e6)), *((m, 1e6) for m in HEAVY)],
)
def test_hostile_weights_do_not_help(make_bench, model, largest_weight):
    removed = range(PATIENTS) if model in LIGHT else [0]
    bench = make_bench(model, largest_weight=largest_weight)
    assert is_bounded(moves(bench.sum_of, bench.clip_norm, removed=removed), EDGES)


def test_the_norm_of_millions_of_numbers_is_exact_enough():
    """One float32 sum over them loses 1e-4, and with it the bound."""
    numbers = torch.randn(2, 3_000_000, generator=torch.Generator().manual_seed(1))
    summed = clipped_alone(numbers, clip_norm=1.0)
    assert summed.double().norm() == pytest.approx(1.0, abs=TOLERANCE / 4)
    naive = numbers[0] / numbers[:1].norm(dim=1)  # the negative control
    assert not naive.double().norm() <= 1 + TOLERANCE


def clipped_alone(gradients: Tensor, clip_norm: float) -> Tensor:
    """The first patient's part of the sum, given the gradients of all."""
    parameter = nn.Parameter(torch.zeros(gradients.shape[1]))
    optimizer = PatientOptimizer(
        torch.optim.SGD([parameter], lr=1.0),
        noise_multiplier=1.0,
        clip_norm=clip_norm,
        normaliser=1,
        keystream=None,  # type: ignore[arg-type]
    )
    optimizer.begin()
    parameter.grad_sample = gradients[:1]  # type: ignore[attr-defined]
    optimizer.accumulate(patients=1)
    return parameter.summed_grad  # type: ignore[attr-defined,no-any-return]


def rounding_amplifier(weights: Weights) -> Weights:
    """Weights of a reference CNN whose logit is a difference that is zero but for rounding.

    Hidden units hold a sum, one part of it and the other part; a million times what is left
    decides the loss, and it depends on the order in which a kernel adds, so on the batch's size.
    """
    rng = np.random.default_rng(0)
    dense, output = np.zeros_like(weights["dense.weight"]), np.zeros_like(weights["output.weight"])
    for unit in range(0, 510, 3):
        whole = np.asarray(rng.uniform(1e3, 2e3, dense.shape[1]), dtype=np.float32)
        part = rng.integers(0, 2, dense.shape[1]).astype(np.float32)
        dense[unit : unit + 3] = whole, whole * part, whole * (1 - part)
    output[0, :510] = np.tile([1e6, -1e6, -1e6], 170)
    zero = {name: np.zeros_like(weights[name]) for name in ("dense.bias", "output.bias")}
    return weights | zero | {"dense.weight": dense, "output.weight": output}


def test_weights_that_amplify_rounding_are_harmless_one_patient_at_a_time(make_bench):
    """The guarantee is for real arithmetic. In float32 such weights moved the sum by 3 C at some
    sizes of a physical batch; where each patient goes alone, no one depends on who else is there.
    """
    bench = make_bench("reference-cnn", clip_norm=1.0, physical=1)
    bench.weights = rounding_amplifier(bench.weights)
    moved = moves(bench.sum_of, bench.clip_norm)
    assert is_bounded(moved)
    assert moved.max() > 0.99


# --- what the sum is -----------------------------------------------------------------------------


def one_patient_at_a_time(bench: Bench, inputs: Tensor, labels: NDArray[Any]) -> Vector:
    """The clipped sum, slow and obvious: plain autograd, float64 norms, no Opacus."""
    network, task = models.build(bench.spec), task_for(bench.spec)
    network.load_state_dict({name: torch.from_numpy(w) for name, w in bench.weights.items()})
    parameters, total = list(network.parameters()), np.zeros(0)
    for images, label in zip(inputs.chunk(len(labels)), labels, strict=True):
        repeated = torch.as_tensor(np.repeat(label[None], len(images), axis=0))
        loss = torch.stack(
            [
                task.losses(network(images[i : i + 1]), repeated[i : i + 1])[0]
                for i in range(len(images))
            ]
        ).mean()
        flat = torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)])
        gradient = flat.double().numpy()
        clipped = gradient * min(1.0, bench.clip_norm / float(np.linalg.norm(gradient)))
        total = clipped + (total if len(total) else 0)
    return total


@pytest.mark.parametrize(
    ("model", "kind", "copies"),
    [
        ("small-cnn", "binary", 1),
        ("small-cnn", "binary", 3),
        ("small-cnn", "multiclass", 3),
        ("small-cnn", "multilabel", 3),
        *((name, "binary", 3) for name in LIGHT if name != "small-cnn"),
        ("resnet18", "binary", 1),
        ("densenet121", "binary", 3),
        ("efficientnet-b0", "multiclass", 3),
    ],
)
def test_the_sum_is_that_of_patients_taken_one_at_a_time(
    make_bench, seen_by_the_network, model, kind, copies
):
    everyone = list(range(PATIENTS))
    bench = make_bench(model, kind=kind, copies=copies, clip_norm=0.3)
    with seen_by_the_network() as inputs:
        fast = bench.sum_of(everyone)
    assert [len(part) for part in inputs] == [2 * copies, 2 * copies, copies]
    slow = one_patient_at_a_time(bench, torch.cat(inputs), bench.cohort.labels)
    assert np.linalg.norm(slow) > 0.3
    tolerance = EDGES if model in HEAVY else TOLERANCE
    assert np.linalg.norm(fast - slow) < tolerance * np.linalg.norm(slow)


def test_the_copies_of_a_patient_differ_and_count_as_one(make_bench, seen_by_the_network):
    bench = make_bench(copies=3)
    with seen_by_the_network() as inputs:
        bench.sum_of([0])
    first, second, third = torch.cat(inputs)
    assert not torch.equal(first, second)
    assert not torch.equal(second, third)


# --- planted faults, which the same check finds --------------------------------------------------


class ReducedOverTheBatch(Classification):
    """Weighted cross-entropy with reduction="mean": each loss over the weights of the batch."""

    def losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        weights = torch.tensor(self.loss.class_weights)
        return super().losses(outputs, targets) / weights[targets].sum()


def test_a_loss_reduced_over_the_batch_is_found(make_bench, monkeypatch):
    weights = [0.05, 40.0]
    loss = {"class_weights": weights}
    right = make_bench(loss=loss, physical=PATIENTS)
    right.cohort.labels = np.array([0, 0, 1, 0, 0])
    assert is_bounded(moves(right.sum_of, right.clip_norm))

    monkeypatch.setattr(training, "task_for", ReducedOverTheBatch)
    wrong = make_bench(loss=loss, physical=PATIENTS, clip_norm=0.05)
    wrong.cohort.labels = right.cohort.labels
    assert moves(wrong.sum_of, wrong.clip_norm).max() > 2


class StandardisedOverTheBatch(nn.Module):
    """What BatchNorm does, in a layer whose name and state do not say so."""

    def forward(self, x: Tensor) -> Tensor:
        return (x - x.mean(dim=0)) / (x.std(dim=0, correction=0) + 1e-3)


def mixing(spec: RunSpec) -> nn.Module:
    pixels = int(np.prod(spec.input.shape))
    return nn.Sequential(
        nn.Flatten(), StandardisedOverTheBatch(), nn.Linear(pixels, spec.task.outputs)
    )


def test_a_network_that_mixes_patients_is_found(make_bench, monkeypatch):
    line = models.Network(f"{__name__}:mixing", smallest_side=16)
    monkeypatch.setitem(models.NETWORKS, "mixing", line)
    bench = make_bench("mixing", clip_norm=1e-3, physical=PATIENTS)
    assert moves(bench.sum_of, bench.clip_norm).max() > 1.2


class ClippedByImage(PatientOptimizer):
    """The image as unit where the patient was promised."""

    def accumulate(self, patients: int) -> None:
        super().accumulate(len(self.params[0].grad_sample))


class ClippedByLayer(PatientOptimizer):
    """Each parameter's gradient clipped to C by itself."""

    def accumulate(self, patients: int) -> None:
        for parameter in self.params:
            samples = self._by_patient(parameter, patients)
            norms = samples.flatten(1).norm(dim=1)
            factor = (self.max_grad_norm / norms).clamp(max=1.0)
            parameter.summed_grad += (factor @ samples.flatten(1)).view_as(parameter)
            parameter.grad_sample = None


class Unclipped(PatientOptimizer):
    def accumulate(self, patients: int) -> None:
        for parameter in self.params:
            parameter.summed_grad += self._by_patient(parameter, patients).sum(dim=0)
            parameter.grad_sample = None


@pytest.mark.parametrize("fault", [ClippedByImage, ClippedByLayer, Unclipped])
def test_a_fault_in_clipping_is_found(make_bench, monkeypatch, fault):
    monkeypatch.setattr(training, "PatientOptimizer", fault)
    bench = make_bench(copies=3, clip_norm=1e-3)
    assert moves(bench.sum_of, bench.clip_norm).min() > 2


def test_an_infinite_pixel_that_is_let_through_is_found(make_bench, monkeypatch):
    monkeypatch.setattr(training, "PatientOptimizer", Unclipped)
    bench = make_bench(poison=np.inf)
    assert moves(bench.sum_of, bench.clip_norm).max() == np.inf


def ghost_sum_of(images: Tensor, labels: Tensor, *, column: bool) -> SumOf:
    """Opacus 1.6's ghost clipping at C = 1; with `column` its losses have shape (B, 1)."""

    def criterion(outputs: Tensor, targets: Tensor) -> Tensor:
        losses = nn.functional.binary_cross_entropy_with_logits(outputs, targets, reduction="none")
        return losses if column else losses[:, 0]

    def sum_of(patients: Sequence[int]) -> Vector:
        layer = nn.Linear(256, 1)
        nn.init.constant_(layer.weight, 0.01)
        nn.init.zeros_(layer.bias)
        network = GradSampleModuleFastGradientClipping(
            nn.Sequential(nn.Flatten(), layer),
            max_grad_norm=1.0,
            use_ghost_clipping=True,
            loss_reduction="sum",
        )
        optimizer = DPOptimizerFastGradientClipping(
            torch.optim.SGD(network.parameters(), lr=1.0),
            noise_multiplier=0.0,
            max_grad_norm=1.0,
            expected_batch_size=PATIENTS,
            loss_reduction="sum",
        )
        seen: Any = criterion
        seen.reduction = "sum"
        loss = DPLossFastGradientClipping(network, optimizer, seen, loss_reduction="sum")
        rows = torch.tensor(list(patients))
        loss(network(images[rows]), labels[rows][:, None]).backward()
        return torch.cat([p.grad.flatten() for p in network.parameters()]).double().numpy()

    return sum_of


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
def test_opacus_ghost_clipping_with_a_column_of_losses_is_found():
    """Its defect with a one-unit head, which our hooks and losses of shape (patients,) avoid."""
    images = torch.rand(PATIENTS, 1, 16, 16, generator=torch.Generator().manual_seed(1))
    labels = torch.tensor([0.0, 0, 1, 0, 0])
    assert is_bounded(moves(ghost_sum_of(images, labels, column=False), 1.0))
    assert moves(ghost_sum_of(images, labels, column=True), 1.0).max() > 2
