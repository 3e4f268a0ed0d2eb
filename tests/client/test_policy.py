"""The hospital's own limits: read strictly, and widened by nothing that a message says."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from client.policy import Budget, Policy, read_policy
from common.accounting import SubsampledGaussian, planned
from common.errors import ConfigError, Refusal, RefusalCode
from common.spec import RunSpec

Spec = Callable[..., RunSpec]

NODE = """\
site = "north"
declared_size = 400
cohort = "cohort"

[budget]
epsilon = 3.0
delta = 1e-5
"""


def policy(
    *, epsilon: float = 3.0, order: float = 8.0, size: int = 400, allowed: bool = False
) -> Policy:
    return Policy(
        site="north",
        declared_size=size,
        budget=Budget(epsilon=epsilon, delta=1e-5, order=order),
        allow_no_privacy=allowed,
        cohort="cohort",
    )


def code_of(refused: pytest.ExceptionInfo[Refusal]) -> RefusalCode:
    return refused.value.code


# --- What runs may ask ------------------------------------------------------------------------


def test_a_run_without_privacy_is_refused(make_spec: Spec):
    with pytest.raises(Refusal, match="allow_no_privacy is false") as refused:
        policy().plan(make_spec(privacy={"mechanism": "none"}))
    assert code_of(refused) is RefusalCode.POLICY


def test_a_run_without_privacy_is_taken_where_the_hospital_says_so(make_spec: Spec):
    assert policy(allowed=True).plan(make_spec(privacy={"mechanism": "none"})) is None


def test_allowing_no_privacy_does_not_take_it_from_a_run_that_has_it(make_spec: Spec):
    assert policy(allowed=True).plan(make_spec()) == policy().plan(make_spec())


def test_a_run_is_planned_whole_at_the_declared_size(make_spec: Spec):
    spec = make_spec(rounds=3, local={"steps": 2, "batch_size": 4})
    mechanism = policy(size=400).plan(spec)
    assert mechanism == SubsampledGaussian(0.01, 1.0, 6, "patient") == planned(spec, 400)


@pytest.mark.parametrize(
    ("changes", "size"),
    [
        ({"local": {"batch_size": 401}}, 400),
        ({"privacy": {"delta": 0.0025}}, 400),
        ({"privacy": {"delta": 0.5}}, 4),
    ],
    ids=["a batch above the declared size", "delta of 1 / size", "delta above"],
)
def test_a_run_that_makes_no_sense_at_the_size_is_refused(make_spec: Spec, changes, size: int):
    with pytest.raises(Refusal) as refused:
        policy(size=size).plan(make_spec(**changes))
    assert code_of(refused) is RefusalCode.SPEC


# --- The budget -------------------------------------------------------------------------------


def cost_of_gaussians(count: float, sigma: float, order: float) -> float:
    """Canonne, Kamath and Steinke 2020, proposition 12, for Gaussians without sampling."""
    divergence = count * order / (2 * sigma**2)
    converted = math.log((order - 1) / order) - (math.log(1e-5) + math.log(order)) / (order - 1)
    return divergence + converted


@pytest.mark.parametrize("order", [2.0, 8.0, 30.0])
def test_the_budget_is_spent_by_the_renyi_divergence_at_its_order(order: float):
    spent = [SubsampledGaussian(1.0, 20.0, 4, "patient")]
    wanted = SubsampledGaussian(1.0, 20.0, 3, "patient")
    cost = cost_of_gaussians(7, 20.0, order)
    policy(epsilon=cost * 1.0001, order=order).check_budget(spent, wanted)
    with pytest.raises(Refusal, match="epsilon would reach") as refused:
        policy(epsilon=cost * 0.9999, order=order).check_budget(spent, wanted)
    assert code_of(refused) is RefusalCode.BUDGET


def test_the_refusal_tells_the_hospital_what_was_asked_and_what_there_is():
    with pytest.raises(Refusal, match=r"reach \d+\.\d{3} of 3\.0 for life \(delta 1e-05\)"):
        policy().check_budget([], SubsampledGaussian(1.0, 0.5, 1, "patient"))


def test_no_budget_is_for_cohorts_without_patients():
    unlimited = policy().model_copy(update={"budget": None})
    unlimited.check_budget([], SubsampledGaussian(1.0, 0.2, 10**6, "patient"))


@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.tuples(st.floats(0.001, 1), st.floats(0.5, 20), st.integers(1, 500)), max_size=4),
    st.floats(0.1, 20),
)
def test_what_is_refused_stays_refused_when_more_is_spent(
    history: list[tuple[float, float, int]], epsilon: float
):
    spent = [SubsampledGaussian(rate, noise, steps, "patient") for rate, noise, steps in history]
    wanted = SubsampledGaussian(0.01, 1.0, 10, "patient")
    refusals = [refuses(policy(epsilon=epsilon), spent[:n], wanted) for n in range(len(spent) + 1)]
    assert refusals == sorted(refusals)


def refuses(limits: Policy, spent: list[SubsampledGaussian], wanted: SubsampledGaussian) -> bool:
    try:
        limits.check_budget(spent, wanted)
    except Refusal:
        return True
    return False


# --- The file ---------------------------------------------------------------------------------


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str], Path]:
    def _write(text: str) -> Path:
        path = tmp_path / "node.toml"
        path.write_text(text, encoding="utf-8")
        return path

    return _write


def test_a_file_is_read(write: Callable[[str], Path]):
    assert read_policy(write(NODE)) == policy()
    full = "allow_no_privacy = true\n" + NODE + "order = 16\n"
    assert read_policy(write(full)) == policy(allowed=True, order=16)


def test_a_policy_cannot_be_changed():
    with pytest.raises(ValidationError):
        policy().declared_size = 5  # type: ignore[misc]


def changed(old: str, new: str) -> str:
    assert NODE.count(old) == 1
    return NODE.replace(old, new)


WRONG = {
    "no TOML": ("site = ", ["node.toml", "expected the node's TOML file"]),
    "a number beyond reading": (
        changed("400", "1" + "0" * 5000),
        ["node.toml", "expected the node's TOML file"],
    ),
    "an unknown key": (
        changed("declared_size = 400", "declared_size = 400\nallow_all = true"),
        ["node.toml: allow_all = True: ", "unknown key"],
    ),
    "an unknown key of the budget": (
        NODE + "period = 30\n",
        ["node.toml: budget.period = 30: ", "unknown key"],
    ),
    "no site": (changed('site = "north"\n', ""), ["node.toml: site is missing"]),
    "no size": (changed("declared_size = 400\n", ""), ["node.toml: declared_size is missing"]),
    "no budget": (NODE.partition("[budget]")[0], ["node.toml: budget is missing"]),
    "no cohort": (changed('cohort = "cohort"\n', ""), ["node.toml: cohort is missing"]),
    "a site that is a path": (changed('"north"', '"../x"'), ["node.toml: site = '../x'"]),
    "a size of none": (changed("400", "0"), ["node.toml: declared_size = 0", "greater than"]),
    "a size in words": (changed("400", '"400"'), ["node.toml: declared_size = '400'", "integer"]),
    "a budget of nothing": (changed("3.0", "0.0"), ["node.toml: budget.epsilon = 0.0"]),
    "a budget without end": (changed("3.0", "inf"), ["node.toml: budget.epsilon = inf"]),
    "a certain delta": (changed("1e-5", "1.0"), ["node.toml: budget.delta = 1.0"]),
    "an order of one": (NODE + "order = 1.0\n", ["node.toml: budget.order = 1.0"]),
    "a yes that is no truth value": (
        'allow_no_privacy = "no"\n' + NODE,
        ["node.toml: allow_no_privacy = 'no'", "boolean"],
    ),
    "a budget that is none": (
        NODE.partition("[budget]")[0] + 'budget = "none"\n',
        ["node.toml: budget = 'none'"],
    ),
}


@pytest.mark.parametrize(("text", "parts"), WRONG.values(), ids=WRONG)
def test_a_mistake_is_named_with_file_key_and_value(
    write: Callable[[str], Path], text: str, parts: list[str]
):
    with pytest.raises(ConfigError) as caught:
        read_policy(write(text))
    for part in parts:
        assert part in str(caught.value)


@pytest.mark.parametrize("content", [None, b"\xff\xfe"], ids=["missing", "no text"])
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, content: bytes | None):
    path = tmp_path / "node.toml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"node\.toml: .*expected the node's TOML file"):
        read_policy(path)
