"""What a task may do beyond a loss: rows of its own, a part that learns, steps that follow.

The toy here is a pair of networks: a critic, which alone sees patients, and a follower, which
learns from the critic.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from client.training import LocalTrainer
from common import models, tasks
from common.errors import ModelError
from common.noise import Keystream
from common.spec import Metric, RunSpec
from common.spec import Task as Section
from common.tasks.task import Task

PATIENTS, VIEWS = 5, 2
C = 0.3


class PairSection(Section):
    LOSSES: ClassVar[tuple[str, ...]] = ("cross-entropy",)
    METRICS: ClassVar[Mapping[str, Metric]] = {"auroc": Metric("AUROC")}
    NETWORK: ClassVar[str] = "pair"
    VIEWS: ClassVar[int] = VIEWS

    name: str = "pair"
    kind: str = "binary"


class PairTask(Task):
    """Each image is a row as it is and a row of the follower's making, with its label and 1."""

    def losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return functional.binary_cross_entropy_with_logits(
            outputs[:, 0], targets.float(), reduction="none"
        )

    def examples(
        self, images: Tensor, targets: Tensor, network: Any, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        noise = torch.rand(len(images), 1, generator=generator)
        made = network.follower(noise).view(-1, 1, 1, 1) * images
        rows = torch.stack([images, made], dim=1).flatten(0, 1)
        return rows, torch.stack([targets, torch.ones_like(targets)], dim=1).flatten()

    def private(self, network: Any) -> nn.Module:
        critic: nn.Module = network.critic
        return critic

    def follow(self, network: Any, generator: torch.Generator) -> None:
        self.steps = getattr(self, "steps", 0) + 1  # of this round
        made = network.follower(torch.rand(4, 1, generator=generator)).view(-1, 1, 1, 1)
        network.critic(made.expand(-1, 1, 8, 8)).mean().backward()
        with torch.no_grad():
            for parameter in network.follower.parameters():
                parameter.add_(parameter.grad, alpha=-0.1 / self.steps)
                parameter.grad = None

    def measured(self, outputs: Tensor, images: Tensor, targets: Tensor) -> Any:
        raise NotImplementedError

    def score(self, evidence: Any, patients: Any, **_: Any) -> Any:
        raise NotImplementedError


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.follower = nn.Linear(1, 1)
        self.critic = nn.Sequential(nn.Flatten(), nn.Linear(64, 1))


def pair(spec: RunSpec) -> nn.Module:
    return Pair()


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = tasks.TaskEntry(f"{__name__}:PairSection", f"{__name__}:PairTask")
    monkeypatch.setitem(tasks.TASKS, "pair", entry)
    line = models.Network(f"{__name__}:pair", smallest_side=8, gives="pair")
    monkeypatch.setitem(models.NETWORKS, "pair", line)


@pytest.fixture
def make(
    toy: None, make_spec: Any, make_trainer: Any, array_cohort: Any
) -> Callable[..., tuple[LocalTrainer, Any]]:
    """A trainer of the toy, every patient of which is in every batch, and its cohort."""

    def of(physical: int = 100, **changes: Any) -> tuple[LocalTrainer, Any]:
        parts: dict[str, Any] = {
            "task": {"name": "pair", "kind": "binary", "classes": ["a", "b"]},
            "model": {"name": "pair"},
            "input": {"height": 8, "width": 8},
            "local": {"batch_size": PATIENTS, "steps": 1},
            "privacy": {"clip_norm": C},
        }
        spec = make_spec(**(parts | changes))
        rng = np.random.default_rng(5)
        images = rng.random((PATIENTS, 1, 8, 8), dtype=np.float32)
        cohort = array_cohort(images, np.arange(PATIENTS) % 2)
        return make_trainer(spec, cohort, PATIENTS, physical_images=physical), cohort

    return of


def weights() -> dict[str, NDArray[np.float32]]:
    rng = np.random.default_rng(1)
    named = Pair().named_parameters()
    return {n: rng.normal(0, 0.3, tuple(p.shape)).astype(np.float32) for n, p in named}


def summed(
    trainer: LocalTrainer, watch_steps: Any, keystream: Any, larger: float = 1.0
) -> NDArray[np.float64]:
    with watch_steps() as steps:
        trainer.train({n: w * np.float32(larger) for n, w in weights().items()}, 1, keystream)
    return np.asarray(steps[0].summed, dtype=np.float64)


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """What the follower was given for each patient, in order."""
    found: list[Tensor] = []
    real = torch.rand

    def rand(*size: Any, **options: Any) -> Tensor:
        numbers = real(*size, **options)
        if size[1:] == (1,) and len(found) < PATIENTS:
            found.extend(numbers)
        return numbers

    monkeypatch.setattr(torch, "rand", rand)
    return found


def slow_sum(
    images: NDArray[np.float32], labels: Any, noise: Tensor, clip_norm: float
) -> NDArray[np.float64]:
    """Patient by patient, both rows of each, by plain autograd."""
    network = Pair()
    network.load_state_dict({name: torch.from_numpy(w) for name, w in weights().items()})
    parameters, total = list(network.critic.parameters()), np.zeros(65)
    for number, (image, label) in enumerate(zip(images, labels, strict=True)):
        seen = (torch.from_numpy(image)[None] - 0.5) / 0.25
        made = network.follower(noise[number]).detach() * torch.from_numpy(image)[None]
        both = [(seen, label), ((made - 0.5) / 0.25, 1)]
        loss = sum(
            functional.binary_cross_entropy_with_logits(
                network.critic(row)[0, 0], torch.tensor(float(answer))
            )
            for row, answer in both
        )
        grads = torch.autograd.grad(loss, parameters)  # type: ignore[arg-type]
        flat = torch.cat([g.flatten() for g in grads]).double().numpy()
        total += flat * min(1.0, clip_norm / float(np.linalg.norm(flat)))
    return total


@pytest.mark.parametrize(("physical", "clip_norm"), [(2, C), (4, C), (100, C), (4, 1e3)])
def test_the_rows_of_a_patient_are_added_up_and_clipped_as_one(
    make: Any, watch_steps: Any, drawn: list[Tensor], physical: int, clip_norm: float
):
    trainer, cohort = make(physical, privacy={"clip_norm": clip_norm})
    fast = summed(trainer, watch_steps, Keystream(bytes(32)))
    slow = slow_sum(cohort._pixels, cohort.labels, torch.stack(drawn), clip_norm)
    np.testing.assert_allclose(fast, slow, rtol=1e-4, atol=1e-4)
    alone = slow_sum(cohort._pixels[:1], cohort.labels[:1], drawn[0][None], 1e9)
    assert (np.linalg.norm(alone) > clip_norm) == (clip_norm == C)


@pytest.mark.parametrize(("poison", "largest"), [(0.5, 1), (np.inf, 1), (0.5, 1e6), (np.inf, 1e6)])
def test_no_patient_moves_the_sum_by_more_than_c_whatever_the_rows(
    make: Any, watch_steps: Any, quiet_keystream: Any, poison: float, largest: float
):
    """The last one goes, so that what the others draw is the same."""
    trainer, cohort = make(2)
    cohort._pixels[1, 0, 3, 3] = poison
    cohort.show([[number] for number in range(PATIENTS)])
    whole = summed(trainer, watch_steps, quiet_keystream(), largest)
    cohort.show([[number] for number in range(PATIENTS - 1)])
    without = summed(trainer, watch_steps, quiet_keystream(), largest)
    moved = float(np.linalg.norm(whole - without)) / C
    assert moved <= 1 + 1e-4
    assert moved > 0.99 or largest > 1


def test_no_more_rows_go_together_than_memory_has_room_for(
    make: Any, quiet_keystream: Any, monkeypatch: Any
):
    sizes: list[int] = []
    right = PairTask.losses

    def losses(self: Any, outputs: Tensor, targets: Tensor) -> Tensor:
        sizes.append(len(outputs))
        return right(self, outputs, targets)

    monkeypatch.setattr(PairTask, "losses", losses)
    trainer, _ = make(13, augmentation={"multiplicity": 3})
    trainer.train(weights(), 1, quiet_keystream())
    assert sizes == [12, 12, 6]  # of 2 x 3 rows of each of five patients


def test_rows_that_were_not_told_of_are_refused(make: Any, monkeypatch: Any, quiet_keystream: Any):
    monkeypatch.setattr(PairTask, "examples", lambda self, i, t, network, generator: (i, t))
    trainer, _ = make()
    with pytest.raises(ModelError, match=r"losses of shape \(5,\) for 5 patients .* 2 views"):
        trainer.train(weights(), 1, quiet_keystream())


def test_a_loss_that_was_reduced_is_refused(make: Any, monkeypatch: Any, quiet_keystream: Any):
    monkeypatch.setattr(PairTask, "losses", lambda self, outputs, targets: outputs.mean())
    trainer, _ = make()
    with pytest.raises(ModelError, match=r"losses of shape \(\)"):
        trainer.train(weights(), 1, quiet_keystream())


@pytest.mark.parametrize("privacy", [{"clip_norm": C}, None])
def test_the_update_has_every_parameter_by_its_own_name(
    make: Any, quiet_keystream: Any, privacy: Any
):
    changes = {} if privacy else {"privacy": {"mechanism": "none"}}
    trainer, _ = make(**changes)
    update = trainer.train(weights(), 1, quiet_keystream()).update
    assert set(update) == {
        *("follower.weight", "follower.bias", "critic.1.weight", "critic.1.bias")
    }
    assert all(np.abs(array).max() > 0 for array in update.values())


def test_only_what_is_private_is_clipped_noised_and_pulled_back(
    make: Any, monkeypatch: Any, quiet_keystream: Any, watch_steps: Any
):
    """Without a step that follows, the follower is as it came, under FedProx too."""
    monkeypatch.setattr(PairTask, "follow", lambda self, network, generator: None)
    trainer, _ = make(
        aggregation={"strategy": "fedprox", "mu": 0.5}, local={"batch_size": PATIENTS, "steps": 3}
    )
    with watch_steps() as steps:
        update = trainer.train(weights(), 1, quiet_keystream()).update
    assert steps[0].gradient.shape == (65,)
    assert not update["follower.weight"].any()
    assert update["critic.1.weight"].any()


def followed(trainer: LocalTrainer, keystream: Any) -> NDArray[np.float32]:
    update = trainer.train(weights(), 1, keystream).update
    return np.concatenate([update["follower.weight"].ravel(), update["follower.bias"]])


def test_what_follows_is_a_function_of_the_noised_weights_and_not_of_the_batch(
    make: Any, quiet_keystream: Any, monkeypatch: Any
):
    """With the critic held still, who is in a batch, and how many, moves nothing."""
    trainer, cohort = make(
        local={"batch_size": PATIENTS, "steps": 3},
        optimizer={"name": "sgd", "learning_rate": 1e-30},
    )
    seen = followed(trainer, quiet_keystream())
    cohort.show([[0]])
    np.testing.assert_array_equal(seen, followed(trainer, quiet_keystream()))
    cohort.show([])
    np.testing.assert_array_equal(seen, followed(trainer, quiet_keystream()))
    assert np.abs(seen).max() > 0

    shared: list[torch.Generator] = []
    right = PairTask.examples
    wrong = PairTask.follow

    def examples(self: Any, i: Tensor, t: Tensor, network: Any, generator: Any) -> Any:
        shared.append(generator)
        return right(self, i, t, network, generator)

    def follow(self: Any, network: Any, generator: Any) -> None:
        wrong(self, network, shared[-1] if shared else generator)

    # The negative control: randomness that the batch has drawn from tells how large it was.
    monkeypatch.setattr(PairTask, "examples", examples)
    monkeypatch.setattr(PairTask, "follow", follow)
    cohort.show([[number] for number in range(PATIENTS)])
    many = followed(trainer, quiet_keystream())
    cohort.show([[0]])
    assert np.abs(many - followed(trainer, quiet_keystream())).max() > 0


def test_what_follows_is_not_pulled_back_with_what_learns(make: Any, quiet_keystream: Any):
    still = {"name": "sgd", "learning_rate": 1e-30}
    changes = {"local": {"batch_size": PATIENTS, "steps": 3}, "optimizer": still}
    free, _ = make(**changes)
    pulled, _ = make(**changes, aggregation={"strategy": "fedprox", "mu": 0.5})
    np.testing.assert_array_equal(
        followed(free, quiet_keystream()), followed(pulled, quiet_keystream())
    )


def test_nor_of_what_the_batch_drew_from_torchs_own_generator(
    make: Any, quiet_keystream: Any, monkeypatch: Any
):
    """As dropout and a variational network's code do, among the patients and after them."""
    right, after = PairTask.examples, PairTask.follow
    own = torch.default_generator
    monkeypatch.setattr(PairTask, "examples", lambda self, i, t, n, _: right(self, i, t, n, own))
    monkeypatch.setattr(PairTask, "follow", lambda self, network, _: after(self, network, own))
    still = {"name": "sgd", "learning_rate": 1e-30}
    trainer, cohort = make(local={"batch_size": PATIENTS, "steps": 3}, optimizer=still)
    many = followed(trainer, quiet_keystream())
    cohort.show([[0]])
    np.testing.assert_array_equal(many, followed(trainer, quiet_keystream()))
    assert np.abs(many).max() > 0


def test_what_follows_leaves_the_patients_gradients_alone(
    make: Any, watch_steps: Any, quiet_keystream: Any, monkeypatch: Any
):
    """The second step's sum is that of the same step without a follower that went before."""
    still = {
        "optimizer": {"name": "sgd", "learning_rate": 1e-30},
        "local": {"batch_size": PATIENTS, "steps": 2},
    }
    monkeypatch.setattr(  # rows that do not see the follower
        PairTask,
        "examples",
        lambda self, i, t, network, generator: (
            i.repeat_interleave(2, dim=0),
            t.repeat_interleave(2),
        ),
    )
    trainer, _ = make(**still)
    with watch_steps() as steps:
        trainer.train(weights(), 1, quiet_keystream())
    np.testing.assert_array_equal(steps[0].summed, steps[1].summed)


def test_each_round_begins_with_a_task_that_keeps_nothing(make: Any, quiet_keystream: Any):
    """A trainer that is kept warm gives what a new one gives: a retry is a function of the task."""
    trainer, _ = make(local={"batch_size": PATIENTS, "steps": 2})
    first = followed(trainer, quiet_keystream())
    np.testing.assert_array_equal(first, followed(trainer, quiet_keystream()))
