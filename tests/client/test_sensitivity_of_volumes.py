"""How far one patient moves the sum before noise where volumes are learned by patches: at most C.

As in `test_sensitivity_of_maps`: the patient who is taken away stands last, so the others' patches
are at the places where they were. Patches alone and no augmentation, for the same reason.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from torch import Tensor

from client import training
from common.tasks.segmentation import Segmentation

PATIENTS, POISONED = 3, 1
TOLERANCE = 1e-5  # of C, for float32
GRID, PATCH = (18, 32, 34), (16, 32, 32)
LOSSES = ("cross-entropy", "dice", "dice-cross-entropy", "focal")
SumOf = Callable[[Sequence[int]], NDArray[np.float64]]


@pytest.fixture
def make_sum_of(  # noqa: PLR0913, PLR0917 - it is put together from these
    make_spec: Any,
    make_trainer: Any,
    make_volumes: Any,
    watch_steps: Any,
    quiet_keystream: Any,
    global_weights: Any,
) -> Callable[..., SumOf]:
    def make(
        loss: str,
        *,
        copies: int = 1,
        clip_norm: float = 1e-3,
        poison: float | None = None,
        physical: int = 2,
    ) -> SumOf:
        depth, height, width = GRID
        grid = {"depth": depth, "height": height, "width": width, "patch": list(PATCH)}
        spec = make_spec(
            task={"name": "segmentation", "classes": ["background", "head", "tail"]},
            model={"name": "unet", "width": 4},
            evaluation={"metric": "dice"},
            input=grid | {"spacing": [1, 1, 1], "direction": "axial"},
            augmentation={"multiplicity": copies},
            loss={"name": loss, "class_weights": [0.1, 1.0, 9.0]},
            local={"batch_size": PATIENTS},
            privacy={"clip_norm": clip_norm},
        )
        rng = np.random.default_rng(11)
        images = rng.random((PATIENTS, 1, *GRID), dtype=np.float32)
        if poison is not None:
            images[POISONED, 0, GRID[0] // 2, 16, 16] = poison
        masks = rng.integers(0, 3, (PATIENTS, *GRID))
        masks[-1] = 0
        cohort = make_volumes(images, masks)
        trainer = make_trainer(spec, cohort, PATIENTS, physical_images=physical * copies)
        weights = global_weights(spec)

        def sum_of(patients: Sequence[int]) -> NDArray[np.float64]:
            cohort.show([[patient] for patient in patients])
            with watch_steps() as steps:
                trainer.train(weights, 1, quiet_keystream())
            return np.asarray(steps[0].summed, dtype=np.float64)

        return sum_of

    return make


@pytest.fixture
def make_volumes(array_cohort: Any) -> Any:
    class Volumes(array_cohort):  # type: ignore[misc]
        """Volumes in memory, and parts of them as a cohort on disk gives them."""

        def patches(
            self, rows: Any, corners: NDArray[np.int64], sides: Sequence[int]
        ) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
            images, masks = self.images(rows), self.targets(rows)
            where = [
                tuple(slice(c, c + side) for c, side in zip(corner, sides, strict=True))
                for corner in corners.tolist()
            ]
            pairs = list(enumerate(where))
            parts = np.stack([images[n][:, *part] for n, part in pairs])
            return parts, np.stack([masks[n][part] for n, part in pairs])

    return Volumes


@pytest.mark.parametrize("loss", LOSSES)
def test_no_patient_moves_the_sum_by_more_than_c(make_sum_of: Any, moves: Any, loss: str) -> None:
    moved = moves(PATIENTS, make_sum_of(loss, copies=2 if loss == "dice" else 1), 1e-3)
    assert (moved <= 1 + TOLERANCE).all()
    assert (moved[:-1] > 0.99).all()  # clipped: the bound is met, not only kept


def test_a_patient_with_an_infinite_voxel_moves_nothing_and_spoils_nothing(
    make_sum_of: Any,
    moves: Any,
) -> None:
    moved = moves(PATIENTS, make_sum_of("dice-cross-entropy", poison=np.inf), 1e-3)
    assert moved[POISONED] == 0
    assert np.delete(moved, POISONED).min() > 0.99


def test_a_loss_that_knows_its_batch_is_found(
    make_sum_of: Any, moves: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At a C that nobody's gradient reaches: clipping does not hide the fault."""

    class OverTheBatch(Segmentation):
        def losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
            return super().losses(outputs, targets) * len(outputs)

    alone = make_sum_of("dice", clip_norm=1e5)
    clip_norm = PATIENTS * max(float(np.linalg.norm(alone([n]))) for n in range(PATIENTS))
    how: dict[str, Any] = {"clip_norm": clip_norm, "physical": PATIENTS}
    # Alone a patient's patch is at another place: the bound is met but for that.
    assert moves(PATIENTS, make_sum_of("dice", **how), clip_norm).max() < 1.1 / PATIENTS
    monkeypatch.setattr(training, "task_for", OverTheBatch)
    assert moves(PATIENTS, make_sum_of("dice", **how), clip_norm).max() > 2 / PATIENTS
