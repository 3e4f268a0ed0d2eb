"""From updates to the next model, against slow and obvious arithmetic and against Flower's own."""

from __future__ import annotations

import itertools
import tracemalloc
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import (
    FedAdagrad,
    FedAdam,
    FedAvg,
    FedAvgM,
    FedMedian,
    FedTrimmedAvg,
    FedYogi,
    MultiKrum,
)
from flwr.supercore.task_identity import TaskIdentity
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from common.errors import UpdateError
from common.spec import RunSpec
from server.aggregation import Aggregator, GlobalModel, aggregator_for, check_update

Spec = Callable[..., RunSpec]
Arrays = dict[str, NDArray[np.float32]]
Updates = list[tuple[str, Arrays, float]]

SHAPES = {"conv.weight": (3, 2), "head.bias": (4,), "temperature": ()}
FAIR = {"quorum": 7}


def arrays(seed: int, scale: float = 1.0) -> Arrays:
    rng = np.random.default_rng(seed)
    drawn = {name: scale * rng.normal(size=shape) for name, shape in SHAPES.items()}
    return {name: np.asarray(array, dtype=np.float32) for name, array in drawn.items()}


def updates(count: int) -> Updates:
    return [(f"site-{n}", arrays(n), float(10 * n + 3)) for n in range(count)]


@pytest.fixture
def rule(make_spec: Spec) -> Callable[..., Callable[[], Aggregator]]:
    """`rule("median")()` is the aggregator of one round of a run with that strategy."""

    def of(strategy: str, **options: Any) -> Callable[[], Aggregator]:
        spec = make_spec(aggregation={"strategy": strategy, **options}, federation=FAIR)
        return lambda: aggregator_for(spec)

    return of


def aggregate(aggregator: Aggregator, folded: Iterable[tuple[str, Arrays, float]]) -> Arrays:
    for site, update, weight in folded:
        aggregator.fold(site, update, weight)
    return dict(aggregator.result())


def assert_close(one: Mapping[str, Any], other: Mapping[str, Any], tolerance: float = 1e-6) -> None:
    assert set(one) == set(other)
    for name, array in one.items():
        assert array.shape == np.shape(other[name])
        np.testing.assert_allclose(array, other[name], rtol=tolerance, atol=tolerance)


# --- Slow and obvious -------------------------------------------------------------------------


def coordinate_by_coordinate(folded: Updates, of_column: Callable[[list[float]], float]) -> Arrays:
    """Applies a rule to the list of the sites' numbers at each place of each array."""
    result = {}
    for name, shape in SHAPES.items():
        columns = [[float(update[name].flat[i]) for _, update, _ in folded] for i in range_of(name)]
        result[name] = np.array([of_column(c) for c in columns], dtype=np.float32).reshape(shape)
    return result


def range_of(name: str) -> range:
    return range(int(np.prod(SHAPES[name])))


def median(column: list[float]) -> float:
    ordered, middle = sorted(column), len(column) // 2
    return ordered[middle] if len(column) % 2 else (ordered[middle - 1] + ordered[middle]) / 2


def trimmed(part: float) -> Callable[[list[float]], float]:
    def mean(column: list[float]) -> float:
        cut = int(part * len(column))
        kept = sorted(column)[cut : len(column) - cut]
        return sum(kept) / len(kept)

    return mean


def krum(folded: Updates, byzantine: int, keep: int) -> Arrays:
    """Blanchard et al. 2017, in the words of the paper."""

    def distance(one: Arrays, other: Arrays) -> float:
        return sum(float(((one[n].astype(float) - other[n]) ** 2).sum()) for n in SHAPES)

    def score(number: int) -> float:
        mine = folded[number][1]
        others = sorted(distance(mine, u) for n, (_, u, _) in enumerate(folded) if n != number)
        return sum(others[: len(folded) - byzantine - 2])

    best = sorted(range(len(folded)), key=score)[:keep]
    return coordinate_by_coordinate([folded[n] for n in best], lambda c: sum(c) / len(c))


@pytest.mark.parametrize("count", [1, 2, 7])
def test_mean(rule, count: int):
    total = sum(weight for _, _, weight in updates(count))
    expected = {
        name: sum(weight * update[name].astype(float) for _, update, weight in updates(count))
        / total
        for name in SHAPES
    }
    assert_close(aggregate(rule("fedavg")(), updates(count)), expected)


@pytest.mark.parametrize("count", [3, 4, 7])
def test_median(rule, count: int):
    expected = coordinate_by_coordinate(updates(count), median)
    assert_close(aggregate(rule("median")(), updates(count)), expected)


@pytest.mark.parametrize("trim", [0.15, 0.2, 0.34, 0.49])
@pytest.mark.parametrize("count", [3, 8])
def test_trimmed_mean(rule, trim: float, count: int):
    expected = coordinate_by_coordinate(updates(count), trimmed(trim))
    assert_close(aggregate(rule("trimmed-mean", trim=trim)(), updates(count)), expected)


@pytest.mark.parametrize(("byzantine", "keep"), [(0, 1), (1, 1), (1, 3), (2, 2)])
def test_krum(rule, byzantine: int, keep: int):
    expected = krum(updates(8), byzantine, keep)
    made = aggregate(rule("krum", byzantine=byzantine, keep=keep)(), updates(8))
    assert_close(made, expected)


def test_krum_of_too_few_says_how_many_it_needs(rule):
    with pytest.raises(UpdateError, match="byzantine = 2 needs at least 5 updates; 4 came"):
        aggregate(rule("krum", byzantine=2)(), updates(4))


STRATEGIES: dict[str, dict[str, Any]] = {
    "fedavg": {},
    "median": {},
    "trimmed-mean": {"trim": 0.3},
    "krum": {"byzantine": 1, "keep": 2},
}


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_order_in_which_sites_answer_does_not_matter(rule, strategy: str):
    folded = updates(5)
    aggregator = rule(strategy, **STRATEGIES[strategy])
    expected = aggregate(aggregator(), folded)
    for order in itertools.permutations(folded):
        assert_close(aggregate(aggregator(), order), expected, tolerance=1e-7)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_order_in_which_a_site_names_its_arrays_does_not_matter(rule, strategy: str):
    # A release that is asked for again comes back sorted by name.
    folded = updates(5)
    aggregator = rule(strategy, **STRATEGIES[strategy])
    turned = [
        (site, {name: update[name] for name in sorted(update, reverse=number % 2 == 0)}, weight)
        for number, (site, update, weight) in enumerate(folded)
    ]
    assert_close(aggregate(aggregator(), turned), aggregate(aggregator(), folded))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_what_was_folded_in_is_not_changed(rule, strategy: str):
    folded = updates(5)
    made = aggregate(rule(strategy, **STRATEGIES[strategy])(), folded)
    for name in made:
        made[name] += 1
    for (_, update, _), (_, again, _) in zip(folded, updates(5), strict=True):
        assert_close(update, again, tolerance=0)


@pytest.mark.parametrize("strategy", ["median", "trimmed-mean", "krum"])
def test_one_hostile_site_cannot_move_a_robust_rule_out_of_the_honest_range(rule, strategy: str):
    honest = updates(6)
    hostile = ("zz", {name: array * 0 + 1e6 for name, array in arrays(0).items()}, 1e12)
    made = aggregate(rule(strategy, **STRATEGIES[strategy])(), [*honest, hostile])
    moved = aggregate(rule("fedavg")(), [*honest, hostile])
    for name, array in made.items():
        low = np.min([update[name] for _, update, _ in honest], axis=0)
        high = np.max([update[name] for _, update, _ in honest], axis=0)
        assert ((array >= low) & (array <= high)).all()
        assert not ((moved[name] >= low) & (moved[name] <= high)).any()  # the control


@settings(deadline=None, max_examples=60)
@given(
    folded=st.lists(
        st.tuples(
            st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=3, max_size=3),
            st.floats(1, 1e9),
        ),
        min_size=1,
        max_size=6,
    )
)
def test_a_mean_lies_between_the_smallest_and_the_largest(folded: Any, mean_of: Any):
    aggregator = mean_of()
    for number, (values, weight) in enumerate(folded):
        aggregator.fold(str(number), {"w": np.array(values, dtype=np.float32)}, weight)
    columns = np.array([values for values, _ in folded], dtype=np.float32)
    made = aggregator.result()["w"]
    slack = np.abs(columns).max(axis=0) * 1e-6
    assert made.dtype == np.float32
    assert (made >= columns.min(axis=0) - slack).all()
    assert (made <= columns.max(axis=0) + slack).all()


@pytest.fixture(scope="module")
def mean_of(make_spec: Spec) -> Callable[[], Aggregator]:
    spec = make_spec()
    return lambda: aggregator_for(spec)


# --- Memory -----------------------------------------------------------------------------------


def peak_of(aggregator: Aggregator, count: int) -> int:
    """Bytes at the worst moment while `count` updates of 400 kB come one after another."""
    tracemalloc.start()
    try:
        for number in range(count):
            update = np.full(100_000, number, dtype=np.float32)
            aggregator.fold(f"site-{number}", {"w": update}, 1.0)
            del update
        aggregator.result()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_memory_of_a_mean_does_not_grow_with_the_sites(rule):
    assert peak_of(rule("fedavg")(), 50) < 1.02 * peak_of(rule("fedavg")(), 5)


def test_memory_of_a_robust_rule_does(rule):  # the control: the measure sees it
    assert peak_of(rule("median")(), 50) > 5 * peak_of(rule("median")(), 5)


# --- Server optimisers, against Flower 1.41 -----------------------------------------------------


def replies(weights: Arrays, folded: Updates) -> list[Message]:
    """What Flower's strategies take: whole models, with a number of examples each."""
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 0, 0
    return [
        Message(
            RecordDict(
                {
                    "arrays": ArrayRecord(
                        {n: Array(np.asarray(weights[n] + update[n])) for n in SHAPES}
                    ),
                    "metrics": MetricRecord({"num-examples": weight}),
                }
            ),
            number,
            "train",
        )
        for number, (_, update, weight) in enumerate(folded, start=1)
    ]


def records_of(weights: Arrays) -> ArrayRecord:
    return ArrayRecord({name: Array(np.asarray(array)) for name, array in weights.items()})


def flower_says(strategy: Any, number: int, weights: Arrays, folded: Updates) -> Arrays:
    made, _ = strategy.aggregate_train(number, replies(weights, folded))
    assert made is not None
    return {name: array.numpy() for name, array in made.items()}


def round_updates(number: int, count: int = 5) -> Updates:
    return [(f"site-{n}", arrays(100 * number + n), float(n + 1)) for n in range(count)]


def our_rounds(spec: RunSpec, count: int) -> list[Arrays]:
    """The global weights before round 1 and after each of `count` rounds."""
    model = GlobalModel(spec, arrays(0))
    seen = [dict(model.weights)]
    for number in range(1, count + 1):
        model.apply(aggregate(aggregator_for(spec), round_updates(number)), number)
        seen.append(dict(model.weights))
    return seen


def test_fedavg_is_flowers(make_spec: Spec):
    ours = our_rounds(make_spec(), 3)
    for number in (1, 2, 3):
        theirs = flower_says(FedAvg(), number, ours[number - 1], round_updates(number))
        assert_close(ours[number], theirs)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_fedavgm_is_flowers(make_spec: Spec, momentum: float):
    options: dict[str, Any] = {"server_learning_rate": 0.7, "server_momentum": momentum}
    ours = our_rounds(make_spec(aggregation={"strategy": "fedavgm", **options}), 4)
    strategy = FedAvgM(**options)
    for number in range(1, 5):
        strategy.current_arrays = records_of(ours[number - 1])
        theirs = flower_says(strategy, number, ours[number - 1], round_updates(number))
        assert_close(ours[number], theirs, tolerance=1e-5)


def adaptive(make_spec: Spec, strategy: str) -> tuple[list[Arrays], dict[str, Any]]:
    options = {"beta1": 0.8, "beta2": 0.95, "tau": 0.01}
    table = {"strategy": strategy, "server_learning_rate": 0.3, **options}
    ours = our_rounds(make_spec(aggregation=table), 5)
    return ours, {"beta_1": 0.8, "beta_2": 0.95, "tau": 0.01}


def test_fedyogi_is_flowers(make_spec: Spec):
    ours, options = adaptive(make_spec, "fedyogi")
    strategy = FedYogi(eta=0.3, **options)
    for number in range(1, 6):
        strategy.current_arrays = ours[number - 1]
        theirs = flower_says(strategy, number, ours[number - 1], round_updates(number))
        assert_close(ours[number], theirs, tolerance=1e-5)


def test_fedadam_is_flowers_without_its_bias_correction(make_spec: Spec):
    # Reddi et al. 2021, algorithm 2, has none; Flower multiplies its rate by Adam's.
    ours, options = adaptive(make_spec, "fedadam")
    strategy = FedAdam(**options)
    for number in range(1, 6):
        correction = np.sqrt(1 - 0.95 ** (number + 1)) / (1 - 0.8 ** (number + 1))
        strategy.eta = 0.3 / float(correction)
        strategy.current_arrays = ours[number - 1]
        theirs = flower_says(strategy, number, ours[number - 1], round_updates(number))
        assert_close(ours[number], theirs, tolerance=1e-5)


def test_fedadagrad_is_flowers(make_spec: Spec):
    table = {"strategy": "fedadagrad", "server_learning_rate": 0.3, "beta1": 0.0, "tau": 0.01}
    ours = our_rounds(make_spec(aggregation=table), 4)
    strategy = FedAdagrad(eta=0.3, tau=0.01)
    for number in range(1, 5):
        strategy.current_arrays = ours[number - 1]
        theirs = flower_says(strategy, number, ours[number - 1], round_updates(number))
        assert_close(ours[number], theirs, tolerance=1e-5)


def test_the_adaptive_rules_are_the_papers_for_one_number(make_spec: Spec):
    deltas, rate, b1, b2, tau = (0.5, -0.25, 2.0), 0.1, 0.9, 0.99, 1e-3
    for name in ("fedadam", "fedyogi", "fedadagrad"):
        x = m = v = 0.0
        spec = make_spec(aggregation={"strategy": name, "server_learning_rate": rate})
        model = GlobalModel(spec, {"w": np.zeros(1, dtype=np.float32)})
        for number, delta in enumerate(deltas, start=1):
            m = b1 * m + (1 - b1) * delta
            if name == "fedadam":
                v = b2 * v + (1 - b2) * delta**2
            elif name == "fedyogi":
                v = v - (1 - b2) * delta**2 * np.sign(v - delta**2)
            else:
                v = v + delta**2
            x = x + rate * m / (np.sqrt(v) + tau)
            model.apply({"w": np.array([delta], dtype=np.float32)}, number)
        assert model.weights["w"] == pytest.approx([x], rel=1e-5)


def test_the_robust_rules_are_flowers(make_spec: Spec):
    table: list[tuple[dict[str, Any], Any]] = [
        ({"strategy": "median"}, FedMedian()),
        ({"strategy": "trimmed-mean", "trim": 0.25}, FedTrimmedAvg(beta=0.25)),
        (
            {"strategy": "krum", "byzantine": 2, "keep": 3},
            MultiKrum(num_malicious_nodes=2, num_nodes_to_select=3),
        ),
    ]
    weights = arrays(0)
    folded = [(site, update, 1.0) for site, update, _ in updates(9)]
    for options, strategy in table:
        spec = make_spec(aggregation=options, federation=FAIR)
        model = GlobalModel(spec, weights)
        model.apply(aggregate(aggregator_for(spec), folded), 1)
        theirs = flower_says(strategy, 1, weights, folded)
        assert_close(model.weights, theirs, tolerance=1e-5)


def test_fedprox_is_fedavg_at_the_server(make_spec: Spec):
    prox = make_spec(aggregation={"strategy": "fedprox", "mu": 0.5})
    for one, other in zip(our_rounds(prox, 2), our_rounds(make_spec(), 2), strict=True):
        assert_close(one, other, tolerance=0)


# --- The moving average, and going on -----------------------------------------------------------


def test_without_an_average_the_weights_are_evaluated(make_spec: Spec):
    model = GlobalModel(make_spec(), arrays(0))
    model.apply(arrays(1), 1)
    assert model.evaluated is model.weights
    assert model.state == {}


def test_the_average_forgets_faster_while_it_is_young(make_spec: Spec):
    spec = make_spec(aggregation={"strategy": "fedavg", "average_decay": 0.5})
    model = GlobalModel(spec, {"w": np.zeros(1, dtype=np.float32)})
    weight = average = 0.0
    for number in range(1, 21):
        model.apply({"w": np.ones(1, dtype=np.float32)}, number)
        weight += 1
        decay = min(0.5, number / (number + 9))
        before = weight if number == 1 else average  # it starts at the first model there is
        average = decay * before + (1 - decay) * weight
        assert model.weights["w"] == weight
        assert model.evaluated["w"] == pytest.approx([average], rel=1e-6)
    assert average == pytest.approx(weight - 1, abs=0.01)  # the lag of a decay of 0.5 is one round


WITH_STATE: list[dict[str, Any]] = [
    {"strategy": "fedavg"},
    {"strategy": "fedavgm"},
    {"strategy": "fedadam"},
    {"strategy": "fedyogi", "average_decay": 0.9},
    {"strategy": "fedadagrad", "average_decay": 0.5},
]


@pytest.mark.parametrize("table", WITH_STATE, ids=lambda table: table["strategy"])
def test_a_model_goes_on_from_its_state_as_if_it_had_never_stopped(make_spec: Spec, table):
    spec = make_spec(aggregation=table)
    whole = GlobalModel(spec, arrays(0))
    for number in (1, 2):
        whole.apply(arrays(number), number)
    resumed = GlobalModel(spec, whole.weights, whole.state)
    for number in (3, 4):
        whole.apply(arrays(number), number)
        resumed.apply(arrays(number), number)
    assert_close(resumed.weights, whole.weights, tolerance=0)
    assert_close(resumed.evaluated, whole.evaluated, tolerance=0)


@pytest.mark.parametrize("table", WITH_STATE, ids=lambda table: table["strategy"])
def test_a_step_does_not_change_the_model_before_it(make_spec: Spec, table):
    model = GlobalModel(make_spec(aggregation=table), arrays(0))
    kept = []
    for number in (1, 2, 3):
        kept.append((model.evaluated, {n: a.copy() for n, a in model.evaluated.items()}))
        model.apply(arrays(number), number)
    for then, copied in kept:
        assert_close(dict(then), copied, tolerance=0)


def test_everything_stays_float32(make_spec: Spec):
    for table in WITH_STATE:
        model = GlobalModel(make_spec(aggregation=table), arrays(0))
        model.apply(arrays(1), 1)
        groups = [model.weights, model.evaluated, *model.state.values()]
        assert {a.dtype for group in groups for a in group.values()} == {np.dtype(np.float32)}


# --- What an update must be ---------------------------------------------------------------------


def test_the_norm_is_that_of_all_arrays_together():
    update = arrays(1)
    flat = np.concatenate([array.ravel() for array in update.values()])
    expected = float(np.linalg.norm(flat.astype(np.float64)))
    assert check_update(update, arrays(0), None) == pytest.approx(expected, rel=1e-6)
    assert check_update(update, arrays(0), expected * 1.001) == pytest.approx(expected, rel=1e-6)


def change(name: str, value: Any) -> Arrays:
    return arrays(1) | {name: np.asarray(value, dtype=np.float32)}


@pytest.mark.parametrize(
    ("update", "said"),
    [
        (change("extra", [1]), r"parameters differ from the model's: \['extra'\]"),
        ({"head.bias": arrays(1)["head.bias"]}, r"differ.*'conv.weight', 'temperature'"),
        ({}, "parameters differ"),
        (change("head.bias", [1, 2, 3]), r"head.bias: shape \(3,\), expected \(4,\)"),
        (change("head.bias", [[1, 2, 3, 4]]), r"head.bias: shape \(1, 4\), expected \(4,\)"),
        (change("temperature", [1]), r"temperature: shape \(1,\), expected \(\)"),
        (change("head.bias", [1, np.nan, 3, 4]), "head.bias: not finite"),
        (change("head.bias", [1, np.inf, 3, 4]), "head.bias: not finite"),
        (change("head.bias", [1, 2, 3, -np.inf]), "head.bias: not finite"),
        (change("head.bias", [100, 0, 0, 0]), r"norm 100.* above .*max_update_norm = 50"),
        (change("head.bias", [3e38] * 4), r"norm 6e\+38 above"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_wrong_with_an_update_is_named(update: Arrays, said: str):
    with pytest.raises(UpdateError, match=said):
        check_update(update, arrays(0), 50.0)
