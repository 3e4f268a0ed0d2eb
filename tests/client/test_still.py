"""What a run holds still: weights that are zero in a sparse run, all but the last layer of a head.

What is held still takes no part of a patient's clip norm, and gets no noise.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from client.training import LocalTrainer
from common import models
from common.errors import ModelError
from common.noise import Keystream
from common.spec import RunSpec

PATIENTS, C = 5, 0.3
START = {"model_sha256": "a" * 64}
OPTIMISERS = {
    "sgd": {"name": "sgd", "learning_rate": 0.1, "momentum": 0.9, "weight_decay": 0.1},
    "adam": {"name": "adam", "learning_rate": 0.01},
    "adamw": {"name": "adamw", "learning_rate": 0.01, "weight_decay": 0.1},
}

Weights = dict[str, Any]
Make = Callable[..., tuple[LocalTrainer, Weights, Any]]


@pytest.fixture
def make(make_spec: Any, make_trainer: Any, array_cohort: Any, global_weights: Any) -> Make:
    """A trainer of everyone, a model of which four of five weights are zero, and its cohort."""

    def of(**changes: Any) -> Any:
        parts: dict[str, Any] = {
            "model": {"name": "small-cnn", "width": 4, "sparse": True},
            "local": {"batch_size": PATIENTS, "steps": 3},
            "privacy": {"clip_norm": C},
            "start": START,
        }
        spec: RunSpec = make_spec(**(parts | changes))
        rng = np.random.default_rng(5)
        images = rng.random((PATIENTS, *spec.input.shape), dtype=np.float32)
        cohort = array_cohort(images, np.arange(PATIENTS) % 2)
        weights = {
            name: np.where(rng.random(array.shape) < 0.8, 0, array + 0.01).astype(np.float32)
            for name, array in global_weights(spec).items()
        }
        return make_trainer(spec, cohort, PATIENTS), weights, cohort

    return of


@pytest.mark.parametrize("optimizer", OPTIMISERS)
@pytest.mark.parametrize("private", [True, False])
@pytest.mark.parametrize(
    "aggregation", [{"strategy": "fedavg"}, {"strategy": "fedprox", "mu": 0.5}]
)
def test_what_is_zero_stays_zero_through_noise_momentum_and_decay(
    make: Make, optimizer: str, private: bool, aggregation: Any
):
    changes: dict[str, Any] = {} if private else {"privacy": {"mechanism": "none"}}
    made = make(optimizer=OPTIMISERS[optimizer], aggregation=aggregation, **changes)
    trainer, weights, _ = made
    update = trainer.train(weights, 1, Keystream.seeded(1, "north", 1)).update
    for name, array in weights.items():
        assert not update[name][array == 0].any()
    moved = [update[name][array != 0] for name, array in weights.items()]
    assert np.concatenate(moved).all() if private else np.concatenate(moved).any()


def test_without_sparse_the_same_weights_grow_again(make: Make):
    trainer, weights, _ = make(model={"name": "small-cnn", "width": 4})
    update = trainer.train(weights, 1, Keystream.seeded(1, "north", 1)).update
    assert any(update[name][array == 0].any() for name, array in weights.items())


@pytest.mark.parametrize("clip_norm", [1e-3, 0.3])
def test_no_patient_moves_the_sum_of_a_sparse_network_by_more_than_c(
    make: Make, watch_steps: Any, quiet_keystream: Any, clip_norm: float
):
    trainer, weights, cohort = make(
        privacy={"clip_norm": clip_norm}, local={"batch_size": PATIENTS, "steps": 1}
    )

    def sum_of(patients: list[int]) -> Any:
        cohort.show([[patient] for patient in patients])
        with watch_steps() as steps:
            trainer.train(weights, 1, quiet_keystream())
        return steps[0].summed.astype(np.float64)

    everyone = list(range(PATIENTS))
    zero = np.concatenate([array.ravel() == 0 for array in weights.values()])
    assert not sum_of(everyone)[zero].any()
    moved = []
    for patient in everyone:
        others = [other for other in everyone if other != patient]
        moved.append(np.linalg.norm(sum_of([*others, patient]) - sum_of(others)) / clip_norm)
    assert max(moved) <= 1 + 1e-5
    if clip_norm < 0.01:  # what is left after the zeros were taken out is as long as C
        assert min(moved) > 0.99


def test_of_a_head_nothing_but_the_last_layer_moves(make: Make):
    trainer, weights, _ = make(model={"name": "small-cnn", "width": 4, "trained": "head"})
    update = trainer.train(weights, 1, Keystream.seeded(1, "north", 1)).update
    moved = {name for name, array in update.items() if array.any()}
    last = list(weights)[-2:]
    assert moved == set(last) == models.learned(trainer._spec)


@pytest.mark.parametrize("name", models.names("vector"))
def test_every_network_of_vectors_ends_with_a_head(make_spec: Any, name: str):
    side = max(32, models.NETWORKS[name].smallest_side)
    spec = make_spec(model={"name": name, "trained": "head"}, input={"height": side, "width": side})
    learned, shapes = models.learned(spec), models.shapes(spec)
    assert 0 < len(learned) <= 2
    assert all(shapes[own][0] == spec.task.outputs for own in learned)


def test_what_has_no_head_of_its_own_is_refused_by_name(make_spec: Any):
    generation = {
        "task": {"name": "generation", "classes": ["a", "b"]},
        "loss": {"name": "adversarial"},
        "evaluation": {"metric": "tstr-auroc"},
        "model": {"name": "dcgan", "trained": "head"},
    }
    with pytest.raises(ModelError, match=r"model\.trained = 'head': 'dcgan' does not end with"):
        models.learned(make_spec(**generation))
