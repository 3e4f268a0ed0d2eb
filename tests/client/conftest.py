"""A site under observation: its trainer, and each step as the optimiser sees it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.optim import optimizer as torch_optimizer

from client.training import Compute, LocalTrainer
from common.accounting import planned
from common.cohort import Cohort
from common.spec import RunSpec


@dataclass(frozen=True)
class Step:
    """One local step, as torch's own optimiser meets it.

    Attributes:
        rate: the learning rate.
        gradient: (D,) what is applied, over all parameters.
        summed: (D,) the sum of the clipped gradients before noise; None without privacy.
    """

    rate: float
    gradient: NDArray[np.float32]
    summed: NDArray[np.float32] | None


def _flat(tensors: list[Tensor]) -> NDArray[np.float32]:
    return torch.cat([tensor.detach().flatten() for tensor in tensors]).cpu().numpy().copy()


@pytest.fixture
def watch_steps() -> Callable[[], AbstractContextManager[list[Step]]]:
    """`with watch_steps() as steps:` lists every step of every trainer meanwhile."""

    @contextmanager
    def watch() -> Iterator[list[Step]]:
        steps: list[Step] = []

        def see(optimizer: Any, args: Any, kwargs: Any) -> None:
            group = optimizer.param_groups[0]
            private = hasattr(group["params"][0], "summed_grad")
            summed = _flat([p.summed_grad for p in group["params"]]) if private else None
            gradient = _flat([parameter.grad for parameter in group["params"]])
            steps.append(Step(group["lr"], gradient, summed))

        handle = torch_optimizer.register_optimizer_step_pre_hook(see)
        try:
            yield steps
        finally:
            handle.remove()

    return watch


@pytest.fixture
def make_trainer() -> Callable[..., LocalTrainer]:
    """`make_trainer(spec, cohort, declared_size)`: on the CPU, with the planned mechanism."""

    def make(
        spec: RunSpec,
        cohort: Cohort,
        declared_size: int,
        *,
        physical_images: int | None = None,
        device: str = "cpu",
    ) -> LocalTrainer:
        return LocalTrainer(
            spec,
            cohort,
            declared_size=declared_size,
            mechanism=planned(spec, declared_size),
            compute=Compute(torch.device(device), physical_images),
        )

    return make
