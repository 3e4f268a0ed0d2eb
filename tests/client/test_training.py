"""A round of local steps: what is released, with and without privacy, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import combinations
from multiprocessing import get_context
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy import stats
from torch import Tensor, nn
from torch.nn import functional

from client import training
from client.training import LocalResult, LocalTrainer, PatientOptimizer
from common import models
from common.accounting import SubsampledGaussian, planned
from common.errors import ModelError, Refusal, RefusalCode
from common.noise import Keystream
from common.spec import RunSpec

PATIENTS, BATCH = 12, 4
UNLIKELY, IMPOSSIBLE = 1e-5, 1e-12  # p-values: see test_noise.py in common

Weights = dict[str, NDArray[np.float32]]
Vector = NDArray[np.float64]


@dataclass
class Site:
    """One run at one site, and everything that it consists of."""

    spec: RunSpec
    trainer: LocalTrainer
    cohort: Any
    weights: Weights
    watch: Callable[[], Any]

    def train(self, seed: int = 1, round_number: int = 1) -> LocalResult:
        return self.trainer.train(self.weights, round_number, Keystream.seeded(seed, round_number))

    def steps(self, keystream: Keystream, round_number: int = 1) -> Any:
        """The steps of a round, as torch's optimiser met them."""
        with self.watch() as steps:
            self.trainer.train(self.weights, round_number, keystream)
        return steps

    def noise(self, keystream: Keystream, round_number: int = 1) -> list[Vector]:
        """The noise that was added in each step of a round, in units of sigma C."""
        privacy: Any = self.spec.privacy
        deviation = privacy.noise_multiplier * privacy.clip_norm
        batch = self.spec.local.batch_size
        steps = self.steps(keystream, round_number)
        return [(step.gradient * batch - step.summed.astype(float)) / deviation for step in steps]


@pytest.fixture
def make_site(
    make_spec: Any, make_trainer: Any, array_cohort: Any, global_weights: Any, watch_steps: Any
) -> Callable[..., Site]:
    """A site of twelve patients who are all in each step, unless it declares another size."""

    def make(
        cohort: Any = None,
        *,
        declared: int = BATCH,
        physical: int | None = None,
        device: str = "cpu",
        **changes: Any,
    ) -> Site:
        spec = make_spec(**changes)
        if cohort is None:
            rng = np.random.default_rng(5)
            images = rng.random((PATIENTS, *spec.input.shape), dtype=np.float32)
            cohort = array_cohort(images, np.arange(PATIENTS) % 2)
        trainer = make_trainer(spec, cohort, declared, physical_images=physical, device=device)
        return Site(spec, trainer, cohort, global_weights(spec), watch_steps)

    return make


def planned_round(site: Site, declared: int) -> SubsampledGaussian | None:
    whole = planned(site.spec, declared)
    return whole and whole.of_steps(site.spec.local.steps)


def flat(arrays: Weights) -> NDArray[np.float32]:
    return np.concatenate([array.ravel() for array in arrays.values()])


def same(first: LocalResult, second: LocalResult) -> bool:
    pairs = ((first.update[name], second.update[name]) for name in first.update)
    return all(np.array_equal(one, other) for one, other in pairs)


# --- noise ---------------------------------------------------------------------------------------


def normality(numbers: Vector) -> float:
    """The lesser p-value of the distribution's shape and of its spread."""
    shape = stats.kstest(numbers, "norm", method="asymp").pvalue
    total, count = float(np.square(numbers).sum()), len(numbers)
    return float(min(shape, stats.chi2.sf(total, count), stats.chi2.cdf(total, count)))


def dependence(first: Vector, second: Vector) -> float:
    """The least p-value of the correlations of two samples and of their squares."""
    pairs = [(first, second), (first**2, second**2)]
    scores = [np.corrcoef(*pair)[0, 1] * np.sqrt(len(first)) for pair in pairs]
    return float(min(1.0, 2 * min(2 * stats.norm.sf(abs(score)) for score in scores)))


WIDE = {"model": {"name": "linear"}, "input": {"height": 96, "width": 96}}
LOUD = {"optimizer": {"learning_rate": 0.5}, "privacy": {"noise_multiplier": 3.0, "clip_norm": 0.2}}


def released_noise(site: Site, result: LocalResult) -> Vector:
    """A release of one step of SGD, in units of sigma C."""
    privacy: Any = site.spec.privacy
    unit = privacy.noise_multiplier * privacy.clip_norm / site.spec.local.batch_size
    return np.asarray(flat(result.update) / (site.spec.optimizer.learning_rate * unit), dtype=float)


@pytest.fixture
def silent_site(make_site: Any, write_cohort: Any, linear_network: str) -> Callable[[str], Site]:
    """A site where nobody is sampled: it is empty, or the draw takes none of its patients."""

    def make(why: str) -> Site:
        parts = {"declared": 9_000, "local": {"batch_size": 1}, **WIDE, **LOUD}
        site: Site = make_site(**parts)
        if why == "empty cohort":
            site = make_site(write_cohort(site.spec, []), **parts)
        return site

    return make


@pytest.mark.parametrize("why", ["empty cohort", "nobody drawn"])
def test_where_nobody_is_sampled_pure_noise_is_released(silent_site, why: str) -> None:
    site = silent_site(why)
    result = site.train()
    assert result.sampled == (0,)
    assert result.drawn == planned_round(site, 9_000)
    assert np.isnan(result.mean_loss)
    assert normality(released_noise(site, result)) > UNLIKELY


def test_an_empty_cohort_and_an_empty_batch_release_the_same(silent_site) -> None:
    empty, nobody = silent_site("empty cohort").train(), silent_site("nobody drawn").train()
    assert same(empty, nobody)


class SkipsEmptyBatches(PatientOptimizer):
    def add_noise(self) -> None:
        if any(parameter.summed_grad.any() for parameter in self.params):
            super().add_noise()
        else:
            for parameter in self.params:
                parameter.grad = torch.zeros_like(parameter)


class DividesByAnotherNumber(PatientOptimizer):
    def scale_grad(self) -> None:
        for parameter in self.params:
            parameter.grad /= 1.1 * self.expected_batch_size


class ForgetsTheClipNorm(PatientOptimizer):
    def add_noise(self) -> None:
        self.max_grad_norm = 1.0
        super().add_noise()


@pytest.mark.parametrize("fault", [SkipsEmptyBatches, DividesByAnotherNumber, ForgetsTheClipNorm])
def test_a_release_with_other_noise_is_found(silent_site, monkeypatch, fault: Any) -> None:
    monkeypatch.setattr(training, "PatientOptimizer", fault)
    site = silent_site("nobody drawn")
    assert normality(released_noise(site, site.train())) < IMPOSSIBLE


def test_noise_is_normal_and_independent_across_steps_and_rounds(make_site, linear_network) -> None:
    site = make_site(local={"steps": 3}, **WIDE, **LOUD)
    drawn = [noise for r in (1, 2, 3) for noise in site.noise(Keystream.seeded(1, r), r)]
    assert len(drawn) == 9
    assert min(normality(noise) for noise in drawn) > UNLIKELY / 9
    assert min(dependence(*pair) for pair in combinations(drawn, 2)) > UNLIKELY / 36


def test_noise_is_independent_across_the_parameters_of_a_network(make_site) -> None:
    site = make_site(model={"name": "small-cnn", "width": 16})
    (noise,) = site.noise(Keystream.seeded(1))
    assert normality(noise) > UNLIKELY
    shape = {name: array.size for name, array in site.weights.items()}
    parts = np.split(noise, np.cumsum(list(shape.values()))[:-1])
    large = [part for part in parts if len(part) > 4000]
    assert len(large) >= 2
    for one, other in combinations(large, 2):
        count = min(len(one), len(other))
        assert dependence(one[:count], other[:count]) > UNLIKELY


class HoldsItsNoise(PatientOptimizer):
    """Draws once and adds the same in each step, which a difference of two releases removes."""

    def add_noise(self) -> None:
        if not hasattr(self, "held"):
            count = sum(parameter.numel() for parameter in self.params)
            self.held = self.keystream.gaussian(count)
        kept, self.keystream = self.keystream, Replay(self.held)
        super().add_noise()
        self.keystream = kept


class Replay(Keystream):
    def __init__(self, numbers: Vector) -> None:
        self._numbers = numbers

    def gaussian(self, count: int) -> Vector:
        return self._numbers[:count]


def test_noise_that_is_used_twice_is_found(make_site, linear_network, monkeypatch) -> None:
    site = make_site(local={"steps": 2}, **WIDE, **LOUD)
    once, again = (site.noise(Keystream.seeded(1, "the same round"))[0] for _ in range(2))
    assert dependence(once, again) < IMPOSSIBLE
    monkeypatch.setattr(training, "PatientOptimizer", HoldsItsNoise)
    assert dependence(*site.noise(Keystream.seeded(1))) < IMPOSSIBLE


@pytest.mark.skipif(torch.cuda.is_available(), reason="autograd on CUDA does not survive a fork")
def test_noise_of_forked_workers_is_independent(make_site, linear_network) -> None:
    site = make_site(**WIDE, **LOUD)
    here = site.noise(Keystream.fresh())[0]
    first, second = (in_a_fork(lambda: site.noise(Keystream.fresh())[0]) for _ in range(2))
    for pair in combinations((here, first, second), 2):
        assert dependence(*pair) > IMPOSSIBLE
    again = [in_a_fork(lambda: site.noise(Keystream.seeded(1))[0]) for _ in range(2)]
    assert dependence(*again) < IMPOSSIBLE  # the negative control: a key that both have


def in_a_fork(work: Callable[[], Any]) -> Any:
    receiver, sender = get_context("fork").Pipe(duplex=False)

    def child() -> None:
        torch.set_num_threads(1)
        sender.send(work())

    process = get_context("fork").Process(target=child)
    process.start()
    sender.close()
    answer = receiver.recv()
    process.join()
    return answer


# --- the same again, and not the same ------------------------------------------------------------

LIVELY = {
    "augmentation": {"rotate": 10.0, "flip_horizontal": True, "multiplicity": 2},
    "model": {"name": "small-cnn", "width": 4, "dropout": 0.2},
    "local": {"steps": 3, "batch_size": 4},
    "optimizer": {"name": "sgd", "learning_rate": 0.1, "momentum": 0.9},
}


def test_the_same_key_gives_the_same_update_and_another_another(make_site) -> None:
    site = make_site(declared=8, **LIVELY)
    result = site.train(seed=1)
    assert same(result, site.train(seed=1))
    assert result.sampled == site.train(seed=1).sampled
    assert not same(result, site.train(seed=2))
    fresh = [site.trainer.train(site.weights, 1, Keystream.fresh()) for _ in range(2)]
    assert not same(*fresh)


def test_a_warm_trainer_is_as_good_as_a_new_one(make_site) -> None:
    warm = make_site(declared=8, **LIVELY)
    for number in (1, 2, 3):
        new = make_site(declared=8, **LIVELY)
        assert same(warm.train(round_number=number), new.train(round_number=number))


def test_a_physical_batch_changes_nothing_but_memory(make_site) -> None:
    quiet = {"augmentation": {}, "model": {"name": "small-cnn", "width": 4, "dropout": 0.0}}
    whole, parts = (
        make_site(declared=8, physical=physical, **LIVELY | quiet) for physical in (None, 3)
    )
    np.testing.assert_allclose(
        flat(whole.train().update), flat(parts.train().update), rtol=0, atol=1e-6
    )


def test_the_state_of_global_generators_is_left_alone(make_site) -> None:
    site = make_site(declared=8, **LIVELY)
    torch.manual_seed(3)
    np.random.seed(3)
    expected = torch.rand(4), np.random.rand(4)
    torch.manual_seed(3)
    np.random.seed(3)
    first = site.train()
    assert torch.equal(torch.rand(4), expected[0])
    assert np.array_equal(np.random.rand(4), expected[1])
    assert same(first, site.train())  # and they have no say in what is drawn


def test_what_was_drawn_is_what_was_planned(make_site) -> None:
    site = make_site(declared=8, **LIVELY)
    result = site.train()
    assert result.drawn == planned_round(site, 8)
    assert len(result.sampled) == 3


# --- a step --------------------------------------------------------------------------------------


def by_hand(site: Site, round_number: int, mu: float = 0.0) -> NDArray[np.float32]:
    """The round without privacy, on everyone in each step: textbook formulas, in float64."""
    spec = site.spec
    network = models.build(spec).double()
    network.load_state_dict({name: torch.from_numpy(w) for name, w in site.weights.items()})
    parameters = list(network.parameters())
    start = [parameter.detach().clone() for parameter in parameters]
    rows = np.arange(len(site.cohort))
    pixels = (torch.from_numpy(site.cohort.images(rows)).double() - 0.5) / 0.25
    labels = torch.from_numpy(site.cohort.labels).double()
    state: dict[str, Any] = {}
    for step in range(spec.local.steps):
        losses = functional.binary_cross_entropy_with_logits(
            network(pixels)[:, 0], labels, reduction="sum"
        )
        gradients = torch.autograd.grad(losses / spec.local.batch_size, parameters)
        with torch.no_grad():
            pulled = [
                g + mu * (p - s) for g, p, s in zip(gradients, parameters, start, strict=True)
            ]
            moved = textbook(spec.optimizer, pulled, parameters, state)
            rate = spec.learning_rate(round_number, step)
            for parameter, move in zip(parameters, moved, strict=True):
                parameter.sub_(rate * move)
    differences = [p.detach() - s for p, s in zip(parameters, start, strict=True)]
    return torch.cat([difference.flatten() for difference in differences]).float().numpy()


def textbook(
    chosen: Any, gradients: list[Tensor], parameters: list[nn.Parameter], state: dict[str, Any]
) -> list[Tensor]:
    """What a learning rate of one subtracts: SGD with momentum; Adam; AdamW."""
    decay = chosen.weight_decay
    if chosen.name != "adamw":
        gradients = [g + decay * p for g, p in zip(gradients, parameters, strict=True)]
    if chosen.name == "sgd":
        held = state.get("m", [torch.zeros_like(g) for g in gradients])
        state["m"] = [chosen.momentum * m + g for m, g in zip(held, gradients, strict=True)]
        return list(state["m"])
    count = state["t"] = state.get("t", 0) + 1
    zero = [torch.zeros_like(g) for g in gradients]
    b1, b2 = chosen.beta1, chosen.beta2
    first = zip(state.get("m", zero), gradients, strict=True)
    second = zip(state.get("v", zero), gradients, strict=True)
    state["m"] = [b1 * m + (1 - b1) * g for m, g in first]
    state["v"] = [b2 * v + (1 - b2) * g**2 for v, g in second]
    moves = [
        (m / (1 - b1**count)) / ((v / (1 - b2**count)).sqrt() + 1e-8)
        for m, v in zip(state["m"], state["v"], strict=True)
    ]
    if chosen.name == "adamw":
        moves = [move + decay * p for move, p in zip(moves, parameters, strict=True)]
    return moves


NO_PRIVACY = {"mechanism": "none"}
# Sigma C is 1e-6 and nobody is clipped: DP-SGD without what makes it private.
NEARLY_NONE = {"mechanism": "dp-sgd", "noise_multiplier": 1e-9, "clip_norm": 1e3, "delta": 1e-4}
OPTIMIZERS = [
    {"name": "sgd", "learning_rate": 0.1},
    {"name": "sgd", "learning_rate": 0.1, "momentum": 0.9, "weight_decay": 0.01},
    {"name": "adam", "learning_rate": 0.01, "beta1": 0.8, "beta2": 0.95, "weight_decay": 0.01},
    {"name": "adamw", "learning_rate": 0.01, "weight_decay": 0.1},
]


@pytest.mark.parametrize("privacy", [NO_PRIVACY, NEARLY_NONE], ids=["none", "nearly none"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=lambda o: "-".join(map(str, o.values())))
def test_the_update_is_that_of_a_loop_made_by_hand(
    make_site, linear_network, optimizer: Any, privacy: Any
) -> None:
    changes = {"optimizer": optimizer, "privacy": privacy, "schedule": {"name": "cosine"}}
    model = {"name": linear_network} if optimizer["name"] != "sgd" else {}
    site = make_site(physical=5, local={"steps": 4}, model=model, **changes)
    for number in (1, 3):  # an optimiser begins anew with each round
        update = flat(site.train(round_number=number).update)
        expected = by_hand(site, number)
        assert np.abs(expected).max() > 1e-3
        np.testing.assert_allclose(update, expected, rtol=0, atol=2e-3 * np.abs(expected).max())
        wrong = by_hand(site, 2)  # the negative control: another round has other rates
        assert np.abs(update - wrong).max() > 1e-2 * np.abs(expected).max()


@pytest.mark.parametrize("privacy", [NO_PRIVACY, NEARLY_NONE], ids=["none", "nearly none"])
def test_fedprox_pulls_towards_the_global_model(make_site, privacy: Any) -> None:
    changes = {"privacy": privacy, "local": {"steps": 5}, "optimizer": {"learning_rate": 0.5}}
    prox = make_site(aggregation={"strategy": "fedprox", "mu": 0.8}, **changes)
    update = flat(prox.train().update)
    expected, without = by_hand(prox, 1, mu=0.8), by_hand(prox, 1)
    np.testing.assert_allclose(update, expected, rtol=0, atol=2e-3 * np.abs(expected).max())
    assert np.abs(update - without).max() > 0.05 * np.abs(expected).max()
    assert np.linalg.norm(expected) < np.linalg.norm(without)
    none = make_site(aggregation={"strategy": "fedprox", "mu": 0.0}, **changes)
    assert same(none.train(), make_site(**changes).train())


@pytest.mark.parametrize("name", ["constant", "exponential", "cosine", "cyclical"])
def test_each_step_has_the_learning_rate_of_the_schedule(make_site, name: str) -> None:
    schedule = {"name": name, "final": 0.1, "warmup_rounds": 1}
    site = make_site(rounds=4, local={"steps": 3}, schedule=schedule)
    rates = [
        [step.rate for step in site.steps(Keystream.seeded(1), number)] for number in range(1, 5)
    ]
    expected = [[site.spec.learning_rate(number, s) for s in range(3)] for number in range(1, 5)]
    assert rates == expected
    assert len({rate for round_rates in rates for rate in round_rates}) > 3


def test_half_precision_is_for_cuda_alone(make_site) -> None:
    exact, asked = (make_site(local={"precision": p}) for p in ("float32", "bfloat16"))
    assert same(exact.train(), asked.train())


@pytest.mark.parametrize(("copies", "physical"), [(2, 5), (3, 3), (3, 7), (4, 3), (4, 100)])
def test_the_copies_of_a_patient_stay_in_one_physical_batch(
    make_site, array_cohort, seen_by_the_network, copies: int, physical: int
) -> None:
    """Each patient's image has one grey level, which no change of the picture alters."""
    levels = np.linspace(0, 1, PATIENTS, dtype=np.float32)
    images = np.ones((PATIENTS, 1, 16, 16), dtype=np.float32) * levels[:, None, None, None]
    change = {"rotate": 20.0, "shift": 0.1, "zoom": 0.2, "flip_vertical": True}
    site = make_site(
        array_cohort(images, np.arange(PATIENTS) % 2),
        physical=physical,
        input={"mean": [0.0], "std": [1.0]},
        augmentation=change | {"multiplicity": copies},
    )
    with seen_by_the_network() as inputs:
        result = site.train()
    assert result.sampled == (PATIENTS,)
    means = [part.mean(dim=(1, 2, 3)).numpy() for part in inputs]
    seen = [np.abs(mean[:, None] - levels).argmin(axis=1) for mean in means]
    for part in seen:
        patients = part.reshape(-1, copies)
        assert (patients == patients[:, :1]).all()
        assert len(part) <= max(copies, physical)
    assert np.concatenate(seen).tolist() == np.repeat(np.arange(PATIENTS), copies).tolist()


# --- what cannot be trained ----------------------------------------------------------------------


def with_batch_norm(spec: RunSpec) -> nn.Module:
    network = nn.Sequential(nn.Flatten(), nn.Linear(256, 4))
    network.add_module("norm_of_the_head", nn.BatchNorm1d(4, affine=False))
    network.add_module("head", nn.Linear(4, spec.task.outputs))
    return network


@pytest.mark.parametrize("privacy", [None, NO_PRIVACY], ids=["dp-sgd", "none"])
def test_batch_norm_is_refused_by_its_name(make_site, monkeypatch, privacy: Any) -> None:
    line = models.Network(f"{__name__}:with_batch_norm", smallest_side=8)
    monkeypatch.setitem(models.NETWORKS, "with-batch-norm", line)
    with pytest.raises(ModelError, match="norm_of_the_head: BatchNorm1d"):
        make_site(model={"name": "with-batch-norm"}, **({"privacy": privacy} if privacy else {}))


def spoiled(weights: Weights, how: str) -> Weights:
    name = next(iter(weights))
    wrong = {key: array.copy() for key, array in weights.items()}
    last = tuple(size - 1 for size in wrong[name].shape)
    values = {"nan": np.nan, "inf": np.inf, "-inf": -np.inf, "absurd": 1.1e6, "-absurd": -3e38}
    if how in values:
        wrong[name][last] = values[how]
    elif how == "float64":
        wrong[name] = wrong[name].astype(np.float64)
    elif how == "shape":
        wrong[name] = wrong[name][..., None]
    elif how == "transposed":
        wrong[name] = np.ascontiguousarray(wrong[name].T)
    elif how == "missing":
        del wrong[name]
    elif how == "more":
        wrong["another"] = np.zeros(1, dtype=np.float32)
    elif how == "renamed":
        wrong["_module." + name] = wrong.pop(name)
    return wrong


class Untouched(Keystream):
    """A keystream from which nothing may be drawn."""

    def words(self, count: int) -> NDArray[np.uint64]:
        raise AssertionError("something was drawn")


SPOILED = [
    *("nan", "inf", "-inf", "absurd", "-absurd", "float64"),
    *("shape", "transposed", "missing", "more", "renamed"),
]


@pytest.mark.parametrize("how", SPOILED)
def test_weights_that_are_not_the_networks_are_refused(make_site, how: str) -> None:
    site = make_site()
    before = site.train()
    wrong = spoiled(site.weights, how)
    site.cohort.reads.clear()
    for refuse in (
        lambda: site.trainer.check(wrong),
        lambda: site.trainer.train(wrong, 1, Untouched(bytes(32))),
    ):
        with pytest.raises(Refusal) as refusal:
            refuse()
        assert refusal.value.code is RefusalCode.WEIGHTS
    assert site.cohort.reads == []  # no patient was looked at
    assert same(before, site.train())  # and nothing was changed


def test_the_largest_weights_that_are_not_absurd_are_taken(make_site) -> None:
    site = make_site()
    site.weights = {name: np.full_like(array, 1e6) for name, array in site.weights.items()}
    assert np.isfinite(flat(site.train().update)).all()


@pytest.mark.filterwarnings("error")
def test_incoming_weights_are_not_written_to(make_site) -> None:
    site = make_site(aggregation={"strategy": "fedprox", "mu": 0.1})
    kept = {name: array.copy() for name, array in site.weights.items()}
    for array in site.weights.values():
        array.flags.writeable = False
    site.train()
    assert all(np.array_equal(kept[name], site.weights[name]) for name in kept)


def test_privacy_cannot_be_lost_between_the_spec_and_the_mechanism(make_spec, array_cohort) -> None:
    """A trainer without the mechanism that its spec asks for would release without noise."""
    cohort = array_cohort(np.zeros((2, 1, 16, 16), dtype=np.float32), np.zeros(2, dtype=np.int64))
    private, open_ = make_spec(), make_spec(privacy=NO_PRIVACY)
    mechanism = planned(private, 40)
    assert mechanism is not None
    for spec, wrong in (
        (private, None),
        (open_, mechanism),
        (private, replace(mechanism, sampling_rate=0.05)),
    ):
        with pytest.raises(ValueError, match="mechanism"):
            LocalTrainer(spec, cohort, declared_size=40, mechanism=wrong)


# --- gradients that are not numbers --------------------------------------------------------------


def test_a_patient_without_a_finite_gradient_is_left_out_and_counted(
    make_site, array_cohort, quiet_keystream
) -> None:
    rng = np.random.default_rng(5)
    images = rng.random((PATIENTS, 1, 16, 16), dtype=np.float32)
    images[3], images[8, 0, 2, 2] = np.nan, np.inf
    rows = [[row] for row in range(PATIENTS)]
    cohort = array_cohort(images, np.arange(PATIENTS) % 2, rows)
    site = make_site(cohort, physical=5, local={"steps": 2})
    with site.watch() as steps:
        result = site.trainer.train(site.weights, 1, quiet_keystream())
    assert (result.zeroed, result.sampled) == (4, (PATIENTS, PATIENTS))
    assert np.isfinite(flat(result.update)).all()

    cohort.show([row for row in rows if row not in ([3], [8])])
    with site.watch() as alone:
        result = site.trainer.train(site.weights, 1, quiet_keystream())
    assert result.zeroed == 0
    np.testing.assert_allclose(steps[0].summed, alone[0].summed, rtol=0, atol=1e-6)


def test_a_cohort_of_nothing_finite_releases_noise(make_site, array_cohort, linear_network) -> None:
    shape = (PATIENTS, 1, 96, 96)
    cohort = array_cohort(np.full(shape, np.inf, dtype=np.float32), np.arange(PATIENTS) % 2)
    site = make_site(cohort, **WIDE, **LOUD)
    result = site.train()
    assert result.zeroed == PATIENTS
    assert normality(released_noise(site, result)) > UNLIKELY


# --- accelerators --------------------------------------------------------------------------------

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")


@needs_cuda
@pytest.mark.parametrize("model", models.names("vector"))
def test_clipped_gradients_on_cuda_and_cpu_agree(make_site, quiet_keystream, model: str) -> None:
    line = models.NETWORKS[model]
    parts = {
        "model": {"name": model},
        "input": {"height": line.smallest_side, "width": line.smallest_side},
        "augmentation": {"rotate": 10.0, "multiplicity": 2},
    }
    sums = [
        make_site(device=device, physical=8, **parts).steps(quiet_keystream())[0].summed
        for device in ("cpu", "cuda")
    ]
    assert np.linalg.norm(sums[0]) > 0.5
    assert np.linalg.norm(sums[0] - sums[1]) < 2e-3 * np.linalg.norm(sums[0])


@needs_cuda
def test_half_precision_on_cuda_clips_in_float32(make_site, quiet_keystream) -> None:
    parts = {"local": {"precision": "bfloat16"}, "privacy": {"clip_norm": 1e-3}}
    site = make_site(device="cuda", **parts)
    for patient in range(PATIENTS):
        site.cohort.show([[patient]])
        norm = np.linalg.norm(site.steps(quiet_keystream())[0].summed.astype(float))
        assert 0.99e-3 < norm <= 1e-3 * (1 + 1e-5)


@needs_cuda
def test_noise_on_cuda_is_that_of_the_keystream(make_site, linear_network) -> None:
    sites = [make_site(device=device, **WIDE, **LOUD) for device in ("cpu", "cuda")]
    one, other = (site.noise(Keystream.seeded(1))[0] for site in sites)
    np.testing.assert_allclose(one, other, atol=1e-4)
