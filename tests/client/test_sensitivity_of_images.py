"""How far one patient moves the sum before noise where images are given back or told apart: by C.

As in `test_sensitivity`: one step of the real trainer with and without one patient, who stands
last; everyone is sampled and the noise is zero, so what differs is that patient. Physical batches
of two leave the others' own draws (noise, codes, synthetic images) what they were.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from torch import Tensor

from client import training
from common import models
from common.tasks import task_for
from common.tasks.generation import Generation
from common.tasks.reconstruction import Reconstruction

PATIENTS = 5
POISONED = 2
TOLERANCE = 1e-5  # of C, for float32
EDGES = 2e-3  # where rounding may push a ReLU over its edge: weights chosen to do harm
SIDE = 16

AUTOENCODER: dict[str, Any] = {
    "task": {"name": "reconstruction", "goal": "compress"},
    "model": {"name": "autoencoder", "width": 4},
    "evaluation": {"metric": "psnr"},
}
DENOISER = AUTOENCODER | {"task": {"name": "reconstruction", "goal": "denoise", "noise": 0.2}}
RESIDUAL = DENOISER | {"model": {"name": "residual-unet", "width": 4}}
VARIATIONAL = AUTOENCODER | {
    "task": {"name": "reconstruction", "goal": "anomaly", "kl_weight": 0.5},
    "model": {"name": "vae", "width": 4},
}
PAIR: dict[str, Any] = {
    "task": {"name": "generation", "classes": ["normal", "finding"], "latent": 16},
    "model": {"name": "dcgan", "width": 4},
    "evaluation": {"metric": "tstr-auroc"},
}
CASES = [
    (AUTOENCODER, "mse"),
    (AUTOENCODER, "l1"),
    (DENOISER, "mse"),
    (RESIDUAL, "mse"),
    (RESIDUAL, "l1"),
    (VARIATIONAL, "mse"),
    (VARIATIONAL, "l1"),
    (PAIR, "adversarial"),
    (PAIR, "wasserstein"),
]
SumOf = Callable[[Sequence[int]], NDArray[np.float64]]
NAMES = [
    f"{tables['model']['name']}-{loss}-{number}" for number, (tables, loss) in enumerate(CASES)
]
case = pytest.mark.parametrize(("tables", "loss"), CASES, ids=NAMES)


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
            augmentation={"rotate": 20.0 if copies > 1 else 0.0, "multiplicity": copies},
            loss={"name": loss},
            local={"batch_size": PATIENTS},
            privacy={"clip_norm": clip_norm},
        )
        rng = np.random.default_rng(11)
        images = rng.random((PATIENTS, *spec.input.shape), dtype=np.float32)
        if poison is not None:
            images[POISONED, 0, SIDE // 2, SIDE // 2] = poison
        labels = np.zeros(PATIENTS, np.int64) if "goal" in tables["task"] else np.arange(5) % 2
        weights = global_weights(spec)
        if largest_weight is not None:
            limits = -largest_weight, largest_weight
            weights = {
                name: rng.uniform(*limits, array.shape).astype(np.float32)
                for name, array in weights.items()
            }
        cohort = array_cohort(images, labels)
        of_each = copies * spec.task.VIEWS
        trainer = make_trainer(spec, cohort, PATIENTS, physical_images=physical * of_each)

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
        {"copies": 3, "clip_norm": 1e-4},
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
        PATIENTS, make_sum_of(tables, loss, poison=poison, copies=2, clip_norm=1e-4), 1e-4
    )
    assert moved[POISONED] == 0
    assert (moved <= 1 + TOLERANCE).all()
    assert np.delete(moved, POISONED).min() > 0.99


@case
def test_hostile_weights_do_not_help(make_sum_of, moves, tables, loss):
    moved = moves(PATIENTS, make_sum_of(tables, loss, largest_weight=1e6), 0.3)
    assert (moved <= 1 + EDGES).all()


@case
def test_a_loss_that_grows_with_the_batch_is_found(make_sum_of, moves, monkeypatch, tables, loss):
    """The planted fault, at a clip norm that each patient alone keeps."""
    kind = Generation if "latent" in tables["task"] else Reconstruction

    class OverTheBatch(kind):  # type: ignore[misc, valid-type]
        def losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
            whole = PATIENTS * self.spec.task.VIEWS
            each = super().losses(outputs, targets)
            scaled: Tensor = each * (len(outputs) / whole) ** 3
            return scaled

    alone = make_sum_of(tables, loss, clip_norm=1e3)
    clip_norm = max(float(np.linalg.norm(alone([patient]))) for patient in range(PATIENTS))
    right = make_sum_of(tables, loss, physical=PATIENTS, clip_norm=clip_norm)
    assert (moves(PATIENTS, right, clip_norm) <= 1 + TOLERANCE).all()
    monkeypatch.setattr(training, "task_for", lambda spec: OverTheBatch(task_for(spec).spec))
    wrong = make_sum_of(tables, loss, physical=PATIENTS, clip_norm=clip_norm)
    assert moves(PATIENTS, wrong, clip_norm).max() > 1.2


def test_every_network_of_images_and_pairs_is_here():
    here = {(tables["model"]["name"], loss) for tables, loss in CASES}
    images = {(name, loss) for name in models.names("image") for loss in ("mse", "l1")}
    pairs = {
        (name, loss) for name in models.names("pair") for loss in ("adversarial", "wasserstein")
    }
    assert here == images | pairs
