"""Clipping and noise at the smallest and largest numbers that a run may ask for.

float32 has no numbers between 0 and 1e-45. A coordinator who chose C down there would see noise
that rounds to nothing beside a patient who does not (`test_below_the_bound_...` is the attack).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

from client.training import PatientOptimizer
from common.errors import SpecError
from common.noise import Keystream
from common.spec import LARGEST_CLIP_NORM, SMALLEST_CLIP_NORM

ALLOWED = (SMALLEST_CLIP_NORM, 1.0, LARGEST_CLIP_NORM)
DENORMAL = 0.72e-45  # rounds to one step of float32's denormals, and half of it to zero
SIZE = 14
SIGMA = 0.5
ROUNDS = 600


def of_size(clip_norm: float, *, sigma: float = SIGMA, size: int = SIZE) -> Any:
    """An optimiser of one parameter of `size` numbers."""
    return PatientOptimizer(
        torch.optim.SGD([nn.Parameter(torch.zeros(size))], lr=1.0),
        noise_multiplier=sigma,
        clip_norm=clip_norm,
        normaliser=1,
        keystream=Keystream.seeded(1, "small numbers"),
    )


def unbounded(clip_norm: float) -> Any:
    """The negative control: an optimiser that does not look at C."""
    optimizer = of_size(1.0)
    optimizer.max_grad_norm = clip_norm
    return optimizer


def summed(optimizer: Any, gradient: torch.Tensor) -> NDArray[np.float64]:
    """What one patient of that gradient adds to the sum."""
    parameter = optimizer.params[0]
    optimizer.begin()
    parameter.grad_sample = gradient[None].clone()
    optimizer.accumulate(1)
    return np.asarray(parameter.summed_grad.double().numpy(), dtype=np.float64)


def releases(optimizer: Any, gradient: torch.Tensor | None) -> NDArray[np.float64]:
    """(ROUNDS, SIZE) what leaves of a batch of one patient, or of nobody, in clip norms."""
    seen = []
    for _ in range(ROUNDS):
        optimizer.begin()
        if gradient is not None:
            optimizer.params[0].grad_sample = gradient[None].clone()
            optimizer.accumulate(1)
        optimizer.add_noise()
        optimizer.scale_grad()
        seen.append(optimizer.params[0].grad.double().numpy() / optimizer.max_grad_norm)
    return np.array(seen)


def told_apart(optimizer: Any) -> tuple[float, NDArray[np.float64]]:
    """How often the best test of "present" is right, and the releases without the patient.

    The patient's gradient is above C, and the same in every number: the sum of the release decides.
    """
    gradient = torch.full((SIZE,), max(0.53, optimizer.max_grad_norm))
    middle = summed(optimizer, gradient).sum() / optimizer.max_grad_norm / 2
    present = releases(optimizer, gradient).sum(axis=1)
    absent = releases(optimizer, None)
    right = np.mean(present > middle) + np.mean(absent.sum(axis=1) <= middle)
    return float(right) / 2, absent


BEST = 0.841  # Phi(1 / (2 sigma)): nobody can do better against Gaussian noise


@pytest.mark.parametrize("clip_norm", ALLOWED)
def test_at_every_allowed_c_nobody_and_one_patient_are_as_hard_to_tell_apart(clip_norm: float):
    right, absent = told_apart(of_size(clip_norm))
    assert right == pytest.approx(BEST, abs=0.04)
    assert absent.std() == pytest.approx(SIGMA, rel=0.03)
    assert abs(absent.mean()) < 4 * SIGMA / np.sqrt(absent.size)


def test_the_noise_of_the_smallest_c_is_that_of_one_to_the_last_bits():
    small, one = (releases(of_size(clip_norm), None) for clip_norm in (SMALLEST_CLIP_NORM, 1.0))
    assert small == pytest.approx(one, rel=1e-6)


def test_below_the_bound_float32_would_switch_the_noise_off():
    right, absent = told_apart(unbounded(DENORMAL))
    assert right > 0.95
    assert absent.std() != pytest.approx(SIGMA, rel=0.03)


@pytest.mark.parametrize("size", [1, SIZE, 100_000])
@pytest.mark.parametrize("clip_norm", ALLOWED)
def test_no_finite_gradient_adds_more_than_c(clip_norm: float, size: int):
    """Over all of float32: its squares under- and overflow long before it does."""
    direction = torch.randn(size, generator=torch.Generator().manual_seed(1)).double()
    direction /= direction.norm()
    optimizer = of_size(clip_norm, size=size)
    for exponent in np.arange(-30, 38.51, 0.25):
        gradient = (direction * 10.0**exponent).float()
        assert np.linalg.norm(summed(optimizer, gradient)) <= clip_norm * (1 + 1e-5), exponent


@pytest.mark.parametrize("clip_norm", ALLOWED)
@pytest.mark.parametrize("norm", [1e4, 1e12, 1e17])
def test_a_long_gradient_adds_the_whole_of_c(clip_norm: float, norm: float):
    """The bound above is met, not only kept."""
    gradient = torch.full((SIZE,), norm)
    length = np.linalg.norm(summed(of_size(clip_norm), gradient))
    assert length == pytest.approx(min(clip_norm, norm * np.sqrt(SIZE)), rel=1e-4)


def test_a_gradient_too_long_for_its_norm_to_be_taken_is_zeroed_and_counted():
    optimizer = of_size(1.0, size=1)
    assert summed(optimizer, torch.tensor([1e38])) == 0
    assert optimizer.zeroed == 1


@pytest.mark.parametrize(
    ("sigma", "clip_norm"),
    [
        (SIGMA, DENORMAL),
        (SIGMA, 1e-39),
        (1e-7, SMALLEST_CLIP_NORM),
        (1e-13, 1.0),
        (1.0, 1e39),
        (1e39, 1.0),
        (SIGMA, float("nan")),
    ],
)
def test_numbers_that_float32_cannot_carry_are_refused(sigma: float, clip_norm: float):
    with pytest.raises(ValueError, match="float32"):
        of_size(clip_norm, sigma=sigma)


def test_a_trainer_says_so_before_it_is_asked_for_a_round(
    make_spec: Any, make_trainer: Any, write_cohort: Any
):
    privacy = {"clip_norm": SMALLEST_CLIP_NORM, "noise_multiplier": 1e-7}
    spec = make_spec(privacy=privacy)
    with pytest.raises(ValueError, match="float32"):
        make_trainer(spec, write_cohort(spec, range(8)), 40)


def test_a_spec_cannot_ask_for_them(make_spec: Any):
    assert make_spec(privacy={"clip_norm": SMALLEST_CLIP_NORM})
    with pytest.raises(SpecError, match="clip_norm"):
        make_spec(privacy={"clip_norm": DENORMAL})
