"""How far one patient moves the sum before noise where pixels or boxes are learned: at most by C.

As in `test_sensitivity`: one step of the real trainer with and without one patient, who stands
last; everyone is sampled and the noise is zero, so what differs is that patient. One kind of
augmentation alone: with two, the others' draws would depend on how many stand in the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from client import training
from common import models
from common.tasks import task_for
from common.tasks.task import Task

PATIENTS = 4
POISONED = 1
TOLERANCE = 1e-5  # of C, for float32
EDGES = 2e-3  # where rounding may push a ReLU over its edge: weights chosen to do harm
SIDE = 32

SEGMENTATION: dict[str, Any] = {
    "task": {"name": "segmentation", "classes": ["background", "head", "tail"]},
    "model": {"name": "unet", "width": 4},
    "evaluation": {"metric": "dice"},
}
DETECTION: dict[str, Any] = {
    "task": {"name": "detection", "classes": ["cell", "clot"]},
    "model": {"name": "centernet", "width": 4},
    "evaluation": {"metric": "map50"},
}
HEAVIEST = {"unet": [0.1, 1.0, 9.0], "centernet": [0.5, 7.0]}
CASES = [
    *((SEGMENTATION, loss) for loss in ("cross-entropy", "dice", "dice-cross-entropy", "focal")),
    (DETECTION, "heatmap"),
]
SumOf = Callable[[Sequence[int]], NDArray[np.float64]]
case = pytest.mark.parametrize(("tables", "loss"), CASES, ids=[loss for _, loss in CASES])


def masks(rng: np.random.Generator) -> NDArray[np.int64]:
    """One a patient; the last has the background alone."""
    found = rng.integers(0, 3, (PATIENTS, SIDE, SIDE))
    found[-1] = 0
    return found


def boxes(rng: np.random.Generator) -> NDArray[np.float32]:
    """As many boxes a patient as his number: the first has none."""
    low = rng.random((PATIENTS, PATIENTS, 2)) * 0.6
    sides = 0.1 + rng.random((PATIENTS, PATIENTS, 2)) * 0.3
    kinds = rng.integers(0, 2, (PATIENTS, PATIENTS, 1))
    found = np.concatenate([low, low + sides, kinds], axis=2).astype(np.float32)
    found[np.triu_indices(PATIENTS)] = [0, 0, 0, 0, -1]
    return found


@pytest.fixture
def make_sum_of(  # noqa: PLR0913, PLR0917 - it is put together from these
    make_spec: Any,
    make_trainer: Any,
    array_cohort: Any,
    watch_steps: Any,
    quiet_keystream: Any,
    global_weights: Any,
) -> Callable[..., SumOf]:
    def make(  # noqa: PLR0913 - what the cases differ in
        tables: dict[str, Any],
        loss: str,
        *,
        copies: int = 1,
        clip_norm: float = 0.3,
        poison: float | None = None,
        largest_weight: float | None = None,
        physical: int = 2,
    ) -> SumOf:
        spec = make_spec(
            **tables,
            input={"height": SIDE, "width": SIDE},
            augmentation={"rotate": 20.0, "multiplicity": copies},
            loss={"name": loss, "class_weights": HEAVIEST[tables["model"]["name"]]},
            local={"batch_size": PATIENTS},
            privacy={"clip_norm": clip_norm},
        )
        rng = np.random.default_rng(11)
        images = rng.random((PATIENTS, *spec.input.shape), dtype=np.float32)
        if poison is not None:
            images[POISONED, 0, SIDE // 2, SIDE // 2] = poison
        targets = masks(rng) if spec.task.kind == "mask" else boxes(rng)
        weights = global_weights(spec)
        if largest_weight is not None:
            limits = -largest_weight, largest_weight
            weights = {
                name: rng.uniform(*limits, array.shape).astype(np.float32)
                for name, array in weights.items()
            }
        cohort = array_cohort(images, targets)
        trainer = make_trainer(spec, cohort, PATIENTS, physical_images=physical * copies)

        def sum_of(patients: Sequence[int]) -> NDArray[np.float64]:
            cohort.show([[patient] for patient in patients])
            with watch_steps() as steps:
                trainer.train(weights, 1, quiet_keystream())
            return np.asarray(steps[0].summed, dtype=np.float64)

        return sum_of

    return make


@case
@pytest.mark.parametrize(
    "how",
    [
        {"copies": 3, "clip_norm": 1e-3},
        {"copies": 1, "clip_norm": 0.3},
    ],
)
def test_no_patient_moves_the_sum_by_more_than_c(make_sum_of, moves, tables, loss, how):
    moved = moves(PATIENTS, make_sum_of(tables, loss, **how), how["clip_norm"])
    assert (moved <= 1 + TOLERANCE).all()
    if how["clip_norm"] < 0.01:
        assert (moved > 0.99).all()  # everyone is clipped: the bound is met, not only kept


@case
@pytest.mark.parametrize("poison", [np.inf, np.nan])
def test_a_patient_with_an_infinite_pixel_moves_nothing_and_spoils_nothing(
    make_sum_of, moves, tables, loss, poison
):
    moved = moves(
        PATIENTS, make_sum_of(tables, loss, poison=poison, copies=2, clip_norm=1e-3), 1e-3
    )
    assert moved[POISONED] == 0
    assert (moved <= 1 + TOLERANCE).all()
    assert np.delete(moved, POISONED).min() > 0.99


@case
def test_hostile_weights_do_not_help(make_sum_of, moves, tables, loss):
    moved = moves(PATIENTS, make_sum_of(tables, loss, largest_weight=1e6), 0.3)
    assert (moved <= 1 + EDGES).all()


class OverTheBatch(Task):
    """The planted fault: each loss times the images of its batch, as a sum for a mean would be."""

    def __init__(self, right: Task) -> None:
        super().__init__(right.spec)
        self._right = right

    def losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return self._right.losses(outputs, targets) * len(outputs)

    measured = score = None  # type: ignore[assignment]


OverTheBatch.__abstractmethods__ = frozenset()


@case
def test_a_loss_that_knows_its_batch_is_found(make_sum_of, moves, monkeypatch, tables, loss):
    """At a C that nobody's fourfold gradient reaches: clipping does not hide the fault."""
    alone = make_sum_of(tables, loss, clip_norm=1e5)
    largest = max(float(np.linalg.norm(alone([patient]))) for patient in range(PATIENTS))
    clip_norm = PATIENTS * largest
    how = {"clip_norm": clip_norm, "physical": PATIENTS}
    assert (
        moves(PATIENTS, make_sum_of(tables, loss, **how), clip_norm).max()
        < 1 / PATIENTS + TOLERANCE
    )
    monkeypatch.setattr(training, "task_for", lambda spec: OverTheBatch(task_for(spec)))
    assert moves(PATIENTS, make_sum_of(tables, loss, **how), clip_norm).max() > 1.01


def test_every_network_of_maps_and_boxes_is_here():
    here = {tables["model"]["name"] for tables, _ in CASES}
    assert here == {*models.names("map"), *models.names("boxes")}
    losses = {(tables["model"]["name"], loss) for tables, loss in CASES}
    assert len(losses) == len(CASES)
    assert torch.get_default_dtype() == torch.float32
