"""What reaches a generator: the discriminator's noised weights, and nothing else of a patient.

The noise is put in the place of the sum, so that the discriminator's weights after a step are the
same whoever was there. Then the generator must be the same as well, to the last bit.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from client import training
from client.training import PatientOptimizer
from common.noise import Keystream
from common.tasks.generation import Generation

SIDE, PATIENTS = 16, 6
Trained = Callable[..., dict[str, Any]]


class NoiseAlone(PatientOptimizer):
    """Noise in the place of the noised sum."""

    def add_noise(self) -> None:
        for parameter in self.params:
            parameter.summed_grad = torch.zeros_like(parameter)
        super().add_noise()


@pytest.fixture
def trained(make_spec: Any, make_trainer: Any, array_cohort: Any, global_weights: Any) -> Trained:
    """`trained(loss, seed, patients)`: the update of one round on images drawn from `seed`."""

    def train(loss: str, seed: int, patients: int = PATIENTS) -> dict[str, Any]:
        spec = make_spec(
            task={"name": "generation", "classes": ["normal", "finding"], "latent": 4},
            loss={"name": loss},
            model={"name": "dcgan", "width": 4, "dropout": 0.2},
            augmentation={"rotate": 10.0, "multiplicity": 2},
            local={"steps": 3, "batch_size": PATIENTS - 2},
            evaluation={"metric": "tstr-auroc"},
        )
        rng = np.random.default_rng(seed)
        images = rng.random((patients, *spec.input.shape), dtype=np.float32)
        cohort = array_cohort(images, (np.arange(patients) + seed) % 2)
        trainer = make_trainer(spec, cohort, PATIENTS, physical_images=4)
        update = trainer.train(global_weights(spec), 1, Keystream(bytes(32))).update
        return dict(update)

    return train


def differing(first: dict[str, Any], second: dict[str, Any]) -> set[str]:
    """The networks of a pair in which two updates differ."""
    return {
        name.partition(".")[0] for name in first if not np.array_equal(first[name], second[name])
    }


@pytest.mark.parametrize("loss", ["adversarial", "wasserstein"])
def test_with_the_same_noised_weights_the_generator_is_the_same_whoever_the_patients_were(
    trained: Trained, monkeypatch, loss
):
    monkeypatch.setattr(training, "PatientOptimizer", NoiseAlone)
    one = trained(loss, 1)
    assert differing(one, trained(loss, 2)) == set()
    assert differing(one, trained(loss, 3, patients=1)) == set()
    moved = [name for name, array in one.items() if np.abs(array).max() > 0]
    assert {name.partition(".")[0] for name in moved} == {"generator", "discriminator"}


@pytest.mark.parametrize("loss", ["adversarial", "wasserstein"])
def test_otherwise_the_patients_reach_it_through_the_discriminator(trained: Trained, loss):
    assert differing(trained(loss, 1), trained(loss, 2)) == {"generator", "discriminator"}


class Peeking(Generation):
    """The planted fault: the generator is drawn to the mean of the last images it has seen."""

    def examples(self, images: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
        self.kept = images.mean()
        return super().examples(images, *others)

    def follow(self, network: Any, generator: torch.Generator) -> None:
        super().follow(network, generator)
        with torch.no_grad():
            network.generator.layers[-2].bias += 0.01 * getattr(self, "kept", 0)


class Greedy(Generation):
    """The planted fault: the labels of a step are those that the generator is taught next."""

    def examples(self, images: Tensor, targets: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
        self.kept = targets
        return super().examples(images, targets, *others)

    def _some_labels(self, count: int, generator: torch.Generator) -> Tensor:
        drawn = super()._some_labels(count, generator)
        kept = getattr(self, "kept", drawn)[:count]
        return torch.cat([kept, drawn[len(kept) :]])


@pytest.mark.parametrize("fault", [Peeking, Greedy])
def test_a_generator_that_sees_more_is_found(trained: Trained, monkeypatch, fault):
    monkeypatch.setattr(training, "PatientOptimizer", NoiseAlone)
    monkeypatch.setattr(training, "task_for", fault)
    assert differing(trained("adversarial", 1), trained("adversarial", 2)) == {"generator"}


def test_what_follows_leaves_no_gradient_of_a_patient_behind(
    make_spec: Any, make_trainer: Any, array_cohort: Any, global_weights: Any, watch_steps: Any
):
    """The hooks are off while the generator learns: the next sum holds its own patients alone."""
    tables = {
        "task": {"name": "generation", "classes": ["normal", "finding"], "latent": 4},
        "loss": {"name": "adversarial"},
        "model": {"name": "dcgan", "width": 4},
        "evaluation": {"metric": "tstr-auroc"},
        "local": {"steps": 2, "batch_size": PATIENTS},
    }
    spec = make_spec(**tables, privacy={"clip_norm": 0.1})
    cohort = array_cohort(np.zeros((0, 1, SIDE, SIDE), np.float32), np.zeros(0, np.int64))
    trainer = make_trainer(spec, cohort, PATIENTS)
    with watch_steps() as steps:
        trainer.train(global_weights(spec), 1, Keystream(bytes(32)))
    private = [step.summed for step in steps if step.summed is not None]
    assert len(private) == 2
    assert not any(summed.any() for summed in private)
