"""How far one patient moves the sum before noise where a study's images are seen together.

As in `test_sensitivity`: one step of the real trainer with and without one patient, who stands
last; everyone is sampled and the noise is zero, so what differs is that patient. The encoder sees
several rows of a patient, the layers after it one: both have to come out as that patient's. Of a
run of modalities each encoder sees its own, and of a patient without one it learns nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from common import models
from common.cohort import Cohort
from common.models import studies as networks
from common.models.studies import StudyNetwork
from common.spec import RunSpec
from common.studies import Studies
from common.tasks import task_for

PLACES = 3
IMAGES = (3, 1, 2, 0, 3)  # of each patient's study; one has none at all
ABSENT = ((), (1,), (0,), (0, 1), ())  # which modalities each patient has not, where there are two
TWO = ("CT", "MR")
PATIENTS = len(IMAGES)
POISONED = 2
TOLERANCE = 1e-5  # of C, for float32
EDGES = 2e-3  # where rounding may push a ReLU over its edge: weights chosen to do harm
MODELS = ("small-cnn", "vit", "compact-cnn", "alexnet")
Vector = NDArray[np.float64]


class Bench:
    """One run's trainer, and studies in memory; `sum_of` says what the noise is added to."""

    def __init__(self, spec: RunSpec, cohort: Any, trainer: Any, weights: Any, tools: Any) -> None:
        self.spec, self.cohort, self.trainer, self.weights = spec, cohort, trainer, weights
        self._watch, self._keystream = tools
        self.clip_norm = spec.privacy.clip_norm  # type: ignore[union-attr]

    def sum_of(self, patients: Sequence[int]) -> Vector:
        self.cohort.show([[patient] for patient in patients])
        with self._watch() as steps:
            self.trainer.train(self.weights, 1, self._keystream())
        return np.asarray(steps[0].summed, dtype=np.float64)

    def moves(self) -> Vector:
        """By how many clip norms the sum moves when each patient is taken away."""
        moved = []
        for patient in range(PATIENTS):
            others = [other for other in range(PATIENTS) if other != patient]
            difference = self.sum_of([*others, patient]) - self.sum_of(others)
            moved.append(float(np.linalg.norm(difference)) / self.clip_norm)
        return np.asarray(np.nan_to_num(np.array(moved), nan=np.inf), dtype=np.float64)


@pytest.fixture
def make_bench(  # noqa: PLR0913, PLR0917 - it is put together from these
    make_spec: Any,
    make_trainer: Any,
    array_cohort: Any,
    watch_steps: Any,
    quiet_keystream: Any,
    global_weights: Any,
) -> Callable[..., Bench]:
    class ArrayStudies(array_cohort, Studies):  # type: ignore[misc]
        """Studies in memory, for what no file can hold."""

        drawn = Cohort.drawn

    in_memory: Any = ArrayStudies

    def make(  # noqa: PLR0913 - what the cases differ in
        model: str = "small-cnn",
        *,
        copies: int = 1,
        clip_norm: float = 0.3,
        physical: int = 2,
        poison: float | None = None,
        largest_weight: float | None = None,
        kind: str = "binary",
        modalities: Sequence[str] = (),
        places: int = PLACES,
    ) -> Bench:
        classes = ["a", "b"] if kind == "binary" else ["a", "b", "c"]
        spec = make_spec(
            task={"kind": kind, "classes": classes},
            model={"name": model, "width": 4},
            input={"height": 16, "width": 16, "images": places, "modalities": list(modalities)},
            augmentation={"rotate": 20.0, "multiplicity": copies},
            local={"batch_size": PATIENTS},
            privacy={"clip_norm": clip_norm},
        )
        rng = np.random.default_rng(11)
        images = rng.random((PATIENTS, *spec.input.row_shape), dtype=np.float32)
        if poison is not None:
            images[POISONED, -2 if places > 1 else -1, 0, 8, 8] = poison
        for study, count, absent in zip(images, IMAGES, ABSENT, strict=True):
            study[count if not modalities else spec.input.places :] = np.nan
            for modality in absent if modalities else ():
                study[modality * places : (modality + 1) * places] = np.nan
        labels = np.arange(PATIENTS) % len(classes)
        if kind == "multilabel":
            labels = rng.integers(0, 2, (PATIENTS, 3)).astype(np.float32)
        weights = global_weights(spec)
        if largest_weight is not None:
            weights = {
                name: rng.uniform(-largest_weight, largest_weight, array.shape).astype(np.float32)
                for name, array in weights.items()
            }
        cohort = in_memory(images, labels)
        at_once = physical * copies * spec.input.places
        trainer = make_trainer(spec, cohort, PATIENTS, physical_images=at_once)
        return Bench(spec, cohort, trainer, weights, (watch_steps, quiet_keystream))

    return make


# --- at most C ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("copies", "clip_norm"), [(3, 1e-3), (1, 0.3)])
@pytest.mark.parametrize("model", MODELS)
def test_no_patient_moves_the_sum_by_more_than_c(make_bench, model, copies, clip_norm):
    moved = make_bench(model, copies=copies, clip_norm=clip_norm).moves()
    assert (moved <= 1 + TOLERANCE).all()
    if clip_norm < 0.01:
        assert (moved > 0.99).all()  # everyone is clipped, one without any image as well


@pytest.mark.parametrize("kind", ["multiclass", "multilabel"])
def test_nor_with_many_classes_or_labels(make_bench, kind):
    assert (make_bench(kind=kind, copies=2).moves() <= 1 + TOLERANCE).all()


@pytest.mark.parametrize("poison", [np.inf, np.nan])
@pytest.mark.parametrize("model", MODELS)
def test_a_patient_with_an_infinite_pixel_moves_nothing_and_spoils_nothing(
    make_bench, model, poison
):
    """A pixel that is no number makes no absent image: the whole image has to be none."""
    moved = make_bench(model, poison=poison, clip_norm=1e-3).moves()
    assert moved[POISONED] == 0
    assert (moved <= 1 + TOLERANCE).all()
    assert np.delete(moved, POISONED).min() > 0.99


@pytest.mark.parametrize("largest_weight", [1.0, 1e6])
@pytest.mark.parametrize("model", MODELS)
def test_hostile_weights_do_not_help(make_bench, model, largest_weight):
    assert (make_bench(model, largest_weight=largest_weight).moves() <= 1 + EDGES).all()


def over_the_batch(scores: Tensor, dim: int) -> Tensor:
    """The planted fault: weights that add up to one over the patients of a batch."""
    return torch.softmax(scores, dim=1 - dim)


def test_attention_that_mixes_patients_is_found(make_bench, monkeypatch):
    monkeypatch.setattr(Tensor, "softmax", over_the_batch)
    moved = make_bench(clip_norm=1e-3, physical=PATIENTS).moves()
    assert moved.max() > 1.01


@pytest.mark.parametrize(("model", "places"), [("small-cnn", 1), ("small-cnn", 2), ("vit", 1)])
def test_no_patient_of_two_modalities_moves_the_sum_by_more_than_c(make_bench, model, places):
    bench = make_bench(model, modalities=TWO, places=places, clip_norm=1e-3, copies=2)
    moved = bench.moves()
    assert (moved <= 1 + TOLERANCE).all()
    assert (moved > 0.99).all()  # everyone is clipped, who has neither as well
    assert (make_bench(model, modalities=TWO, places=places).moves() <= 1 + TOLERANCE).all()


@pytest.mark.parametrize("places", [1, 2])
def test_nor_with_an_infinite_pixel_or_hostile_weights(make_bench, places):
    poisoned = make_bench(modalities=TWO, places=places, poison=np.inf, clip_norm=1e-3).moves()
    assert poisoned[POISONED] == 0
    assert (poisoned <= 1 + TOLERANCE).all()
    assert np.delete(poisoned, POISONED).min() > 0.99
    hostile = make_bench(modalities=TWO, places=places, largest_weight=1e3)
    assert (hostile.moves() <= 1 + EDGES).all()


def filled_from_the_batch(self: networks.One, images: Tensor) -> tuple[Tensor, Tensor]:
    """The planted fault: who has no MR is given the mean of those who have."""
    known, features = networks.encoded(self.encoder, images)
    mean = (features * known[..., None]).sum(0) / known.sum().clamp_min(1)
    return torch.where(known, features[:, 0], mean), known.to(features.dtype)


def test_an_absent_modality_that_is_filled_from_others_is_found(make_bench, monkeypatch):
    monkeypatch.setattr(networks.One, "pooled", filled_from_the_batch)
    moved = make_bench(modalities=TWO, places=1, clip_norm=1e-3, physical=PATIENTS).moves()
    assert moved.max() > 1.01


# --- what the sum is -----------------------------------------------------------------------------


def one_patient_at_a_time(bench: Bench, inputs: Tensor) -> Vector:
    """The clipped sum, slow and obvious: plain autograd, float64 norms, no Opacus, and studies
    that hold no more places than they have images."""
    network, task = models.build(bench.spec), task_for(bench.spec)
    network.load_state_dict({name: torch.from_numpy(w) for name, w in bench.weights.items()})
    parameters, total = list(network.parameters()), np.zeros(0)
    for patient, copies in enumerate(inputs.chunk(PATIENTS)):
        label = torch.as_tensor(bench.cohort.labels[patient])[None]
        whole = copies
        if not bench.spec.input.modalities:
            whole = copies[:, : max(1, IMAGES[patient])]
        losses = [task.losses(network(study[None]), label)[0] for study in whole]
        slopes = torch.autograd.grad(torch.stack(losses).mean(), parameters)
        gradient = torch.cat([slope.flatten() for slope in slopes]).double().numpy()
        clipped = gradient * min(1.0, bench.clip_norm / float(np.linalg.norm(gradient)))
        total = clipped + (total if len(total) else 0)
    return total


@pytest.fixture
def apart(seen_by_the_network: Any) -> Callable[[Bench], float]:
    """How far the trainer's sum is from the slow one, for one of the slow one."""

    def of(bench: Bench) -> float:
        with seen_by_the_network() as inputs:
            fast = bench.sum_of(range(PATIENTS))
        slow = one_patient_at_a_time(bench, torch.cat(inputs))
        return float(np.linalg.norm(fast - slow) / np.linalg.norm(slow))

    return of


@pytest.mark.parametrize(("model", "copies"), [*((m, 1) for m in MODELS), ("small-cnn", 3)])
def test_the_sum_is_that_of_patients_taken_one_at_a_time(make_bench, apart, model, copies):
    assert apart(make_bench(model, copies=copies)) < TOLERANCE


@pytest.mark.parametrize(("places", "copies"), [(1, 1), (2, 1), (2, 3)])
def test_so_is_the_sum_of_patients_of_two_modalities(make_bench, apart, places, copies):
    assert apart(make_bench(modalities=TWO, places=places, copies=copies)) < TOLERANCE


def test_an_encoder_learns_exactly_nothing_from_patients_without_its_modality(make_bench):
    """Patient 1 has no MR, patient 2 no CT: what is summed of either is one encoder's alone."""
    bench = make_bench(modalities=TWO, places=2)
    sizes = {name: array.size for name, array in bench.weights.items()}
    ends = np.cumsum(list(sizes.values()))
    for patient, absent in ((1, 1), (2, 0), (0, None)):
        parts = dict(zip(sizes, np.split(bench.sum_of([patient]), ends[:-1]), strict=True))
        moved = [
            max(np.abs(part).max() for name, part in parts.items() if name.startswith(f"each.{m}."))
            for m in range(2)
        ]
        assert [value == 0 for value in moved] == [absent == 0, absent == 1]


class OutOfOrder(StudyNetwork):
    """The planted fault: the same answers, by rows that do not lie patient by patient."""

    def attended(self, images: Tensor) -> tuple[Tensor, Tensor]:
        encoder, places = self.encoder, images.shape[1]

        def mixed(rows: Tensor) -> Tensor:
            by_place = rows.unflatten(0, (-1, places)).transpose(0, 1)
            features: Tensor = encoder(by_place.flatten(0, 1))
            ordered: Tensor = features.unflatten(0, (places, -1)).transpose(0, 1)
            return ordered.flatten(0, 1)

        self._modules["encoder"] = None
        try:
            object.__setattr__(self, "encoder", mixed)
            return super().attended(images)
        finally:
            object.__delattr__(self, "encoder")
            self._modules["encoder"] = encoder


def test_rows_that_do_not_lie_patient_by_patient_are_found(make_bench, apart, monkeypatch):
    right = make_bench(clip_norm=1e3, physical=PATIENTS)
    expected = right.sum_of(range(PATIENTS))
    monkeypatch.setattr(networks, "StudyNetwork", OutOfOrder)
    wrong = make_bench(clip_norm=1e3, physical=PATIENTS)
    assert np.allclose(wrong.sum_of(range(PATIENTS)), expected, rtol=1e-3, atol=1e-5)  # unclipped
    assert apart(make_bench(clip_norm=0.1, physical=PATIENTS)) > 0.01
