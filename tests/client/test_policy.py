"""The hospital's own limits: read strictly, and widened by nothing that a message says."""

from __future__ import annotations

import contextlib
import math
import os
import re
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from client.book import Book, Entry, Kind, columns, note
from client.intake.deid.profile import Profile
from client.intake.settings import Encryption, IntakeSettings, Reidentification, cohort_key
from client.keyfile import create_key
from client.ledger import Ledger, Signed, TaskKey
from client.policy import Policy, read_policy
from common import accounting
from common.accounting import Share, SubsampledGaussian
from common.clock import Clock
from common.errors import ConfigError, Refusal, RefusalCode
from common.spec import RunSpec

Spec = Callable[..., RunSpec]

PARAMETERS = 1000
LATER, BUDGET = RefusalCode.LATER, RefusalCode.BUDGET


def refusal(call: Callable[..., Any], *args: Any) -> Refusal:
    with pytest.raises(Refusal) as refused:
        call(*args)
    return refused.value


# --- What a run may be ------------------------------------------------------------------------

IMAGES = {"least_unit": "image", "data": {"unit": "image"}}
EVALUATED = {"evaluation": {"federated": {"noise_multiplier": 2.0}}}
EVALUATES = {"federated_evaluation": True}

LIMITS: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any], str]] = {
    # what the policy says, a run that is just within, one just beyond, and what the no names
    "operator": (
        {"limits": {"operators": ["acme", "other"]}},
        {"operator": "acme"},
        {"operator": "acme2"},
        r"operator 'acme2' is not on this site's list \(acme, other\)",
    ),
    "an operator without a name": (
        {"limits": {"operators": ["acme"]}},
        {"operator": "acme"},
        {"operator": ""},
        r"operator '' is not on this site's list \(acme\)",
    ),
    "network": (
        {"limits": {"models": ["small-cnn"]}},
        {},
        {"model": {"name": "resnet18"}},
        r"network 'resnet18' is not on this site's list \(small-cnn\)",
    ),
    "a withdrawn model": (
        {"limits": {"withdrawn": ["5d" * 32]}},
        {"start": {"model_sha256": "5e" * 32}},
        {"start": {"model_sha256": "5d" * 32}},
        f"it begins at the model {'5d' * 32}, which is withdrawn here",
    ),
    "noise": (
        {"limits": {"least_noise_multiplier": 0.9}},
        {"privacy": {"noise_multiplier": 0.9}},
        {"privacy": {"noise_multiplier": 0.8999}},
        r"noise multiplier of training: 0.8999, at least 0.9",
    ),
    "noise for a target": (
        {"limits": {"least_noise_multiplier": 1.0}},
        {"privacy": {"noise_multiplier": None, "target_epsilon": 1.0}},
        {"privacy": {"noise_multiplier": None, "target_epsilon": 2.0}},
        r"noise multiplier of training: 0.\d+, at least 1",
    ),
    "sampling rate": (
        {"limits": {"greatest_sampling_rate": 0.25}},
        {"local": {"batch_size": 10}},
        {"local": {"batch_size": 11}},
        r"sampling rate: 0.275, at most 0.25",
    ),
    "steps": (
        {"limits": {"greatest_steps_a_round": 5}},
        {"local": {"steps": 5}},
        {"local": {"steps": 6}},
        r"steps a round: 6, at most 5",
    ),
    "rounds": (
        {"limits": {"greatest_rounds": 7}},
        {"rounds": 7},
        {"rounds": 8},
        r"rounds: 8, at most 7",
    ),
    "no privacy": (
        {},
        {},
        {"privacy": {"mechanism": "none"}},
        r"run 'small' asks for no privacy; allow_no_privacy is false",
    ),
    "the unit": (
        {},
        {},
        {"privacy": {"unit": "image"}},
        r"it protects images alone, the unit is to be at least the patient; unit: image, .*",
    ),
    "federated evaluation": (
        {},
        {},
        EVALUATED,
        r"it asks for a federated evaluation; federated_evaluation is false",
    ),
    "noise of a federated evaluation": (
        {"limits": EVALUATES | {"least_noise_multiplier": 1.0}},
        {"evaluation": {"federated": {"noise_multiplier": 1.0}}},
        {"evaluation": {"federated": {"noise_multiplier": 0.999}}},
        r"noise multiplier of evaluation: 0.999, at least 1",
    ),
    "slots too short to hide behind": (
        {"release": {"pace": 0.5, "least_slot": 30.0}},
        {"federation": {"deadline_seconds": 60}},
        {"federation": {"deadline_seconds": 59}},
        r"a reply's slot: 29.5 s, at least 30 s",
    ),
    "slots that take the node away": (
        {"release": {"pace": 0.5, "greatest_slot": 3600.0}},
        {"federation": {"deadline_seconds": 7200}},
        {"federation": {"deadline_seconds": 7201}},
        r"a reply's slot: 3600.5 s, at most 3600 s",
    ),
    "kind of task": (
        {"data": {"kind": "multilabel"}},
        {"task": {"kind": "multilabel"}},
        {"task": {"kind": "multiclass"}},
        r"this site's data: task.kind is multilabel, the run asks for multiclass",
    ),
    "classes": (
        {},
        {},
        {"task": {"classes": ["finding", "normal"]}},  # the other way round is another task
        r"this site's data: task.classes is \('normal', 'finding'\), "
        r"the run asks for \('finding', 'normal'\)",
    ),
    "shape": (
        {},
        {},
        {"input": {"height": 32}},
        r"image's shape: \(1, 32, 16\), this site's data are \(1, 16, 16\); preprocessing: .*",
    ),
    "preprocessing": (
        {},
        {},
        {"input": {"window": "range"}},
        r"preprocessing: [0-9a-f]{64}, this site's data are [0-9a-f]{64}",
    ),
    "the unit of the data": (
        {"least_unit": "image"},
        {},
        {"privacy": {"unit": "image"}},
        r"unit: image, this site's data are patient",
    ),
}


@pytest.mark.parametrize("limit", LIMITS)
def test_each_limit_takes_what_is_just_within_and_names_what_is_just_beyond(
    make_policy, make_spec: Spec, limit: str
):
    says, within, beyond, named = LIMITS[limit]
    policy = make_policy(**says)
    assert policy.judge(make_spec(**within), PARAMETERS)
    no = refusal(policy.judge, make_spec(**beyond), PARAMETERS)
    assert no.code is RefusalCode.POLICY
    assert re.fullmatch(named, no.detail)


SEGMENTATION = {
    "task": {"name": "segmentation", "classes": ["background", "organ"]},
    "loss": {"name": "dice"},
    "evaluation": {"metric": "dice"},
    "model": {"name": "unet"},
}
RECONSTRUCTION = {
    "task": {"name": "reconstruction"},
    "loss": {"name": "l1"},
    "evaluation": {"metric": "psnr"},
    "model": {"name": "vae"},
}


def test_a_site_with_masks_takes_a_segmentation_if_its_list_has_it(make_policy, make_spec: Spec):
    data = {"kind": "mask", "classes": ["background", "organ"]}
    listed = {"tasks": ["segmentation"], "models": "any"}
    assert make_policy(data=data, limits=listed).judge(make_spec(**SEGMENTATION), PARAMETERS)
    usual = make_policy(data=data, limits={"models": "any"})
    no = refusal(usual.judge, make_spec(**SEGMENTATION), PARAMETERS)
    assert no.detail == "task 'segmentation' is not on this site's list (classification)"
    no = refusal(make_policy(data=data, limits=listed).judge, make_spec(), PARAMETERS)
    assert "task.kind is mask, the run asks for binary" in no.detail


@pytest.mark.parametrize(
    "data",
    [
        {"kind": "mask", "classes": ["background", "organ"]},
        {"kind": "boxes", "classes": ["lesion"]},
        {"kind": "none", "classes": []},
        {},
    ],
)
def test_whatever_its_data_a_site_can_take_what_looks_at_no_target(
    make_policy, make_spec: Spec, data: dict[str, Any]
):
    policy = make_policy(data=data, limits={"tasks": "any", "models": "any"})
    assert policy.judge(make_spec(**RECONSTRUCTION), PARAMETERS)


@pytest.mark.parametrize(
    ("known", "said"),
    [
        ([], "were not asked for when it was made, the run asks for CT, MR"),
        (["US", "PT"], "are US, PT, the run asks for CT, MR"),
        (["MR", "US"], ""),
    ],
)
def test_a_run_of_modalities_is_taken_where_there_is_one_of_them(
    make_policy, make_spec: Spec, known: list[str], said: str
):
    run = make_spec(input={"height": 16, "width": 16, "modalities": ["CT", "MR"]})
    policy = make_policy(
        data={"modalities": known, "preprocessing": run.input.preprocessing_digest}
    )
    if not said:
        assert policy.judge(run, PARAMETERS)
        return
    assert f"this site's data: its images' modalities {said}" in (
        refusal(policy.judge, run, PARAMETERS).detail
    )


@pytest.mark.parametrize(
    ("kind", "classes", "fewest"), [("mask", ["one"], 2), ("boxes", [], 1), ("binary", [], 2)]
)
def test_data_of_too_few_classes_are_none(make_policy, kind: str, classes: list[str], fewest: int):
    with pytest.raises(ValidationError, match=f"expected at least {fewest}"):
        make_policy(data={"kind": kind, "classes": classes})


def test_a_network_is_measured_by_its_parameters(make_policy, make_spec: Spec):
    policy = make_policy(limits={"greatest_parameters": 500})
    assert policy.judge(make_spec(), 500)
    no = refusal(policy.judge, make_spec(), 501)
    assert (no.code, no.detail) == (RefusalCode.POLICY, "parameters: 501, at most 500")


def test_what_one_patient_takes_has_to_fit_into_the_memory(make_policy):
    policy, fits = make_policy(machine={"gradient_memory": 16}), 16 * 2**20
    assert not [*policy.objections_to_memory({"training": fits})]
    (no,) = policy.objections_to_memory({"training": fits + 1, "federated evaluation": fits})
    assert no == (
        "memory for one patient in training: 17 MiB, at most 16 (machine.gradient_memory)"
    )


def test_a_task_that_is_not_on_the_list_is_refused(make_policy, make_spec: Spec):
    no = refusal(make_policy(limits={"tasks": []}).judge, make_spec(), PARAMETERS)
    assert no.detail == "task 'classification' is not on this site's list (none)"


def test_a_run_beyond_several_limits_is_told_of_all_of_them(make_policy, make_spec: Spec):
    policy = make_policy(limits={"operators": ["acme"], "greatest_rounds": 1, "models": []})
    no = refusal(policy.judge, make_spec(privacy={"noise_multiplier": 0.1}), PARAMETERS)
    for part in ("operator ''", "network 'small-cnn'", "rounds: 3", "noise multiplier of training"):
        assert part in no.detail


def test_what_a_hospital_opens_is_open(make_policy, make_spec: Spec):
    """Each no above is the limit's, and nothing else's."""
    policy = make_policy(allow_no_privacy=True)
    assert policy.judge(make_spec(privacy={"mechanism": "none"}), PARAMETERS) == ()
    assert make_policy(**IMAGES).judge(make_spec(privacy={"unit": "image"}), PARAMETERS)
    policy = make_policy(limits=EVALUATES)
    shares = policy.judge(make_spec(**EVALUATED), PARAMETERS)
    assert [share.part for share in shares] == ["training", "evaluation"]


def test_allowing_no_privacy_does_not_take_it_from_a_run_that_has_it(make_policy, make_spec: Spec):
    spec = make_spec()
    allowed = make_policy(allow_no_privacy=True).judge(spec, PARAMETERS)
    assert allowed == make_policy().judge(spec, PARAMETERS) == accounting.shares(spec, 40)


def test_a_run_is_planned_at_the_declared_size(make_policy, make_spec: Spec):
    spec = make_spec(rounds=3, local={"steps": 2, "batch_size": 4})
    (share,) = make_policy(declared_size=400).judge(spec, PARAMETERS)
    assert share == Share("training", SubsampledGaussian(0.01, 1.0, 2, "patient"), 3)


@pytest.mark.parametrize(
    ("changes", "size"),
    [
        ({"local": {"batch_size": 401}}, 400),
        ({"privacy": {"delta": 0.0025}}, 400),
        ({"privacy": {"delta": 0.5}}, 16),
        ({"privacy": {"noise_multiplier": None, "target_epsilon": 1e-9, "delta": 1e-30}}, 400),
    ],
    ids=["a batch above the declared size", "delta of 1 / size", "delta above", "out of reach"],
)
def test_a_run_that_makes_no_sense_at_the_size_is_refused(
    make_policy, make_spec: Spec, changes, size: int
):
    policy = make_policy(declared_size=size)
    assert refusal(policy.judge, make_spec(**changes), PARAMETERS).code is RefusalCode.SPEC


@pytest.mark.parametrize(
    "changes",
    [
        {"local": {"steps": 10**400}},
        {"local": {"steps": 10**4000}, "privacy": {"noise_multiplier": None, "target_epsilon": 1}},
        {"federation": {"deadline_seconds": 1e300}},
        {"evaluation": {"federated": {"noise_multiplier": 1e-300}}},
        {"privacy": {"noise_multiplier": 1e-300}},
    ],
    ids=["steps", "steps with noise for a target", "deadline", "evaluation", "noise"],
)
def test_no_number_that_a_spec_can_hold_is_more_than_a_policy_can_judge(
    make_policy, make_spec: Spec, changes: Any
):
    """A failure would be an incident; and noise for a target takes long to find without bounds."""
    policy = make_policy(limits=EVALUATES, release={"pace": 0.5})
    no = refusal(policy.judge, make_spec(**changes), PARAMETERS)
    assert no.code is RefusalCode.POLICY
    assert len(no.detail) < 200


# --- The safe side ----------------------------------------------------------------------------

MINIMAL = """\
site = "north"
declared_size = 400
cohort = "cohort"

[budget]
epsilon = 3.0
delta = 1e-5

[data]
unit = "patient"
kind = "binary"
classes = ["normal", "finding"]
shape = [1, 16, 16]
preprocessing = "PREPROCESSING"
"""


@pytest.fixture
def minimal(make_spec: Spec) -> str:
    return MINIMAL.replace("PREPROCESSING", make_spec().input.preprocessing_digest)


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str], Path]:
    def _write(text: str) -> Path:
        path = tmp_path / "node.toml"
        path.write_text(text, encoding="utf-8")
        return path

    return _write


def test_a_file_that_names_nobody_takes_part_in_nothing(write, minimal: str, make_spec: Spec):
    policy = read_policy(write(minimal))
    no = refusal(policy.judge, make_spec(operator="acme"), PARAMETERS)
    assert no.detail == (
        "operator 'acme' is not on this site's list (none); "
        "network 'small-cnn' is not on this site's list (none)"
    )
    opened = minimal + '[limits]\noperators = ["acme"]\nmodels = ["small-cnn"]\n'
    assert read_policy(write(opened)).judge(make_spec(operator="acme"), PARAMETERS)


def test_what_a_file_leaves_out_is_on_the_safe_side(write, minimal: str):
    policy = read_policy(write(minimal))
    assert policy.approval == "ask"
    assert policy.least_unit == "patient"
    assert not policy.allow_no_privacy
    assert not policy.limits.federated_evaluation
    assert policy.release.pace == 0.5
    assert policy.limits.least_patients >= 10
    assert policy.limits.greatest_sampling_rate < 1
    assert policy.limits.least_noise_multiplier >= 0.5


# --- The budget -------------------------------------------------------------------------------


def cost_of_gaussians(count: float, sigma: float, order: float, delta: float) -> float:
    """Canonne, Kamath and Steinke 2020, proposition 12, for Gaussians without sampling."""
    divergence = count * order / (2 * sigma**2)
    converted = math.log((order - 1) / order) - (math.log(delta) + math.log(order)) / (order - 1)
    return divergence + converted


class Time:
    """The date, moved by the test; noon of a day, UTC."""

    def __init__(self) -> None:
        self.date = datetime(2026, 3, 1, 12, tzinfo=UTC)
        self.clock = Clock(date=lambda: self.date)

    def pass_(self, **passed: float) -> None:
        self.date += timedelta(**passed)


class Desk:
    """A site's policy on its ledger, asked as the gate asks."""

    def __init__(self, policy: Policy, ledger: Ledger, time: Time) -> None:
        self.policy, self.ledger, self.time = policy, ledger, time

    def invite(self, spec: RunSpec) -> None:
        shares = self.policy.judge(spec, PARAMETERS)
        self.ledger.earmark(
            spec.digest,
            shares,
            run_id=spec.run_id,
            allow=lambda book: self.policy.check_earmark(book, spec.digest, shares),
        )

    def attempt(self, spec: RunSpec, number: int) -> None:
        shares = self.policy.judge(spec, PARAMETERS)
        self.ledger.reserve(
            TaskKey(spec.digest, "training", number, f"{number}"),
            shares[0].mechanism if shares else None,
            allow=lambda book: self.policy.check_attempt(
                book, self.time.date, spec.digest, "training", number
            ),
        )


@pytest.fixture
def make_desk(make_policy, make_ledger) -> Callable[..., Desk]:
    def make(**says: Any) -> Desk:
        policy, time = make_policy(**says), Time()
        return Desk(policy, make_ledger(policy, clock=time.clock), time)

    return make


OPEN = {"limits": {"greatest_sampling_rate": 1.0}}


def everybody(make_spec: Spec, rounds: int, name: str = "small") -> RunSpec:
    """A run that takes everybody in each step, so that its cost is a formula's."""
    privacy = {"noise_multiplier": 20.0}
    return make_spec(name=name, rounds=rounds, local={"batch_size": 40}, privacy=privacy)


def enough_for(rounds: float, order: float = 8.0) -> dict[str, Any]:
    """A budget for so many rounds of `everybody`, and not for a tenth of a round more."""
    epsilon = cost_of_gaussians(rounds, 20.0, order, 1e-4) * (1 + 1e-6)
    return OPEN | {"budget": {"epsilon": epsilon, "order": order}}


@pytest.mark.parametrize("order", [2.0, 8.0, 30.0])
def test_the_budget_counts_by_the_renyi_divergence_at_its_order(
    make_desk, make_spec: Spec, order: float
):
    desk = make_desk(**enough_for(7, order))
    no = refusal(desk.invite, everybody(make_spec, 8))
    assert no.code is BUDGET
    cost = cost_of_gaussians(8, 20.0, order, 1e-4)
    assert no.detail.startswith(f"epsilon would reach {cost:.3f} of ")
    desk.invite(everybody(make_spec, 7))


def test_the_refusal_tells_the_hospital_what_was_asked_and_what_there_is(
    make_desk, make_spec: Spec
):
    no = refusal(make_desk(budget={"epsilon": 2.0}).invite, make_spec())
    assert re.fullmatch(r"epsilon would reach \d\.\d{3} of 2 for life \(delta 0.0001\)", no.detail)


def test_no_budget_is_for_cohorts_without_patients(make_policy, make_spec: Spec):
    policy = make_policy(budget=None, limits={"greatest_rounds": 100_000})
    shares = policy.judge(make_spec(rounds=100_000), PARAMETERS)
    policy.check_earmark(Book(), "run", shares)


def test_what_is_set_aside_is_not_there_for_another_run(make_desk, make_spec: Spec):
    desk = make_desk(**enough_for(7))
    desk.invite(everybody(make_spec, 4))
    assert refusal(desk.invite, everybody(make_spec, 4, "second")).code is BUDGET
    desk.invite(everybody(make_spec, 3, "second"))
    assert refusal(desk.invite, everybody(make_spec, 1, "third")).code is BUDGET


def test_what_is_spent_counts_on_and_what_was_not_needed_comes_back(make_desk, make_spec: Spec):
    desk, spec = make_desk(**enough_for(7)), everybody(make_spec, 5)
    desk.invite(spec)
    for number in (1, 2):
        desk.attempt(spec, number)
    assert refusal(desk.invite, everybody(make_spec, 3, "second")).code is BUDGET
    desk.ledger.close(spec.digest, Signed("a test", "over"))
    assert refusal(desk.invite, everybody(make_spec, 6, "second")).code is BUDGET
    desk.invite(everybody(make_spec, 5, "second"))


def test_a_run_that_is_set_aside_anew_does_not_count_twice(make_desk, make_policy, make_spec: Spec):
    """As after a change of the declared size: the rounds that are left are set aside as they are
    now, and what was set aside for them before is free."""
    desk, spec = make_desk(**enough_for(6)), everybody(make_spec, 6)
    desk.invite(spec)
    desk.attempt(spec, 1)
    desk.policy = make_policy(**enough_for(6) | {"declared_size": 80})
    desk.invite(spec)
    book = desk.ledger.book
    assert book.set_aside() == [SubsampledGaussian(0.5, 20.0, 5, "patient")]
    assert book.spent() == [SubsampledGaussian(1.0, 20.0, 1, "patient")]
    desk.policy = make_policy(**enough_for(6))
    desk.invite(spec)
    assert desk.ledger.book.divergence(8.0) == pytest.approx(6 * 8 / (2 * 20.0**2))
    desk.policy = make_policy(**enough_for(5.9))
    assert refusal(desk.invite, everybody(make_spec, 1, "other")).code is BUDGET


def test_a_second_attempt_at_a_round_is_a_charge_on_top(make_desk, make_spec: Spec):
    desk, spec = make_desk(**enough_for(4)), everybody(make_spec, 3)
    desk.invite(spec)
    for number in (1, 1, 2, 3):
        desk.attempt(spec, number)
    assert refusal(desk.attempt, spec, 3).code is BUDGET
    assert desk.ledger.book.spent() == [SubsampledGaussian(1.0, 20.0, 4, "patient")]


def test_a_retry_may_not_take_what_the_other_rounds_need(make_desk, make_spec: Spec):
    desk, spec = make_desk(**enough_for(3)), everybody(make_spec, 3)
    desk.invite(spec)
    desk.attempt(spec, 1)
    assert refusal(desk.attempt, spec, 1).code is BUDGET
    for number in (2, 3):
        desk.attempt(spec, number)


def test_what_a_person_carried_over_counts(make_desk, make_spec: Spec):
    desk = make_desk(**enough_for(7))
    desk.ledger.carry(5 * 8 / (2 * 20.0**2), Signed("a test", "spent elsewhere"))
    assert refusal(desk.invite, everybody(make_spec, 3)).code is BUDGET
    desk.invite(everybody(make_spec, 2))


def test_a_budget_that_a_person_lowers_stops_an_open_run(make_desk, make_policy, make_spec: Spec):
    desk, spec = make_desk(**enough_for(5)), everybody(make_spec, 5)
    desk.invite(spec)
    desk.attempt(spec, 1)
    desk.policy = make_policy(**enough_for(4))
    assert refusal(desk.attempt, spec, 2).code is BUDGET


MECHANISMS = st.builds(
    SubsampledGaussian,
    st.floats(0.001, 1),
    st.floats(0.5, 20),
    st.integers(1, 50),
    st.just("patient"),
)
RUNS = st.lists(st.tuples(MECHANISMS, st.integers(1, 12)), min_size=1, max_size=4)


def book_with(*entries: Entry) -> Book:
    book = Book()
    for entry in (Entry(1, Kind.OPENED), *entries):
        book.apply(entry._replace(number=book.last + 1))
    return book


def set_aside(run: str, share: Share) -> Entry:
    mechanism = columns(share.mechanism)
    return Entry(0, Kind.EARMARKED, run, "training", share.rounds, note=note(), **mechanism)


def attempted(run: str, number: int, share: Share) -> Entry:
    return Entry(0, Kind.RESERVED, run, "training", number, f"{number}", **columns(share.mechanism))


def policy_with(make_policy: Any, epsilon: float, delta: float) -> Policy:
    budget = {"epsilon": epsilon, "delta": delta, "order": 8.0}
    policy: Policy = make_policy(budget=budget, limits={"greatest_open_runs": 9})
    return policy


@settings(deadline=None, max_examples=60)
@given(runs=RUNS, slack=st.sampled_from([1.0, 1.0 + 1e-9, 1.0 + 2e-9]), data=st.data())
def test_a_run_that_was_set_aside_whole_is_never_refused_by_a_rounding(
    make_policy, runs: list[tuple[SubsampledGaussian, int]], slack: float, data: st.DataObject
):
    """The budget is what the runs take to the last bit, and the sums come in any order."""
    shares = {f"{n}": Share("training", *run) for n, run in enumerate(runs)}
    total = sum(accounting.divergence(share.whole, 8.0) for share in shares.values())
    epsilon = accounting.epsilon_of(total, 1e-4, 8.0)
    assume(accounting.divergence_within(epsilon, 1e-4, 8.0) > 0)
    policy, book = policy_with(make_policy, epsilon / slack, 1e-4), book_with()
    for run, share in shares.items():
        try:
            policy.check_earmark(book, run, (share,))
        except Refusal:
            assert slack > 1.0 + 1e-9 / 2  # and then by the last bit alone
            assume(False)
        book.apply(set_aside(run, share)._replace(number=book.last + 1))
    rounds = [(run, n + 1) for run, share in shares.items() for n in range(share.rounds)]
    for run, number in data.draw(st.permutations(rounds)):
        policy.check_attempt(book, datetime.now(UTC), run, "training", number)
        book.apply(attempted(run, number, shares[run])._replace(number=book.last + 1))


@settings(deadline=None, max_examples=40)
@given(st.lists(MECHANISMS, max_size=4), st.floats(0.1, 20))
def test_what_is_refused_stays_refused_when_more_is_spent(
    make_policy, history: list[SubsampledGaussian], epsilon: float
):
    assume(accounting.divergence_within(epsilon, 1e-4, 8.0) > 0)
    policy, book = policy_with(make_policy, epsilon, 1e-4), book_with()
    wanted = Share("training", SubsampledGaussian(0.01, 1.0, 10, "patient"), 1)
    refusals = [refuses(policy, book, wanted)]
    for number, mechanism in enumerate(history):
        share = Share("training", mechanism, 1)
        for entry in (set_aside(f"{number}", share), attempted(f"{number}", 1, share)):
            book.apply(entry._replace(number=book.last + 1))
        refusals.append(refuses(policy, book, wanted))
    assert refusals == sorted(refusals)


def refuses(policy: Policy, book: Book, wanted: Share) -> bool:
    try:
        policy.check_earmark(book, "wanted", (wanted,))
    except Refusal as no:
        return no.code is BUDGET
    return False


# --- Not now ----------------------------------------------------------------------------------


def test_no_more_runs_are_open_at_once_than_may_be(make_desk, make_spec: Spec):
    desk = make_desk(limits={"greatest_open_runs": 2})
    runs = [make_spec(name=f"run-{n}", rounds=1) for n in range(3)]
    for spec in runs[:2]:
        desk.invite(spec)
    assert refusal(desk.invite, runs[2]).code is LATER
    desk.invite(runs[0])  # it is one of them
    desk.ledger.close(runs[0].digest, Signed("a test", "over"))
    desk.invite(runs[2])


def test_a_day_has_no_more_rounds_than_may_be_whatever_the_run(make_desk, make_spec: Spec):
    desk = make_desk(limits={"greatest_rounds_a_day": 3}, allow_no_privacy=True)
    runs = [make_spec(), make_spec(privacy={"mechanism": "none"})]
    for spec in runs:
        desk.invite(spec)
    desk.attempt(runs[0], 1)
    desk.time.pass_(hours=1)
    desk.attempt(runs[1], 1)
    desk.attempt(runs[1], 1)  # a retry is a round
    for spec in runs:
        no = refusal(desk.attempt, spec, 2)
        assert (no.code, no.detail) == (LATER, "3 rounds in the last 24 hours")
    desk.time.pass_(hours=23, seconds=1)
    desk.attempt(runs[0], 2)
    assert refusal(desk.attempt, runs[0], 3).code is LATER


def test_the_budget_is_paced_over_a_period_and_nothing_is_given_back(make_desk, make_spec: Spec):
    says = enough_for(7)
    period = {"days": 30, "epsilon": cost_of_gaussians(2, 20.0, 8.0, 1e-4) * (1 + 1e-6)}
    desk = make_desk(**says | {"budget": says["budget"] | {"period": period}})
    spec = everybody(make_spec, 7)
    desk.invite(spec)
    desk.attempt(spec, 1)
    desk.time.pass_(days=10)
    desk.attempt(spec, 2)
    no = refusal(desk.attempt, spec, 3)
    assert no.code is LATER
    assert no.detail.endswith("in 30 days")
    desk.time.pass_(days=20, seconds=1)
    desk.attempt(spec, 3)  # the first is out of the period
    assert refusal(desk.attempt, spec, 4).code is LATER
    desk.time.pass_(days=300)
    for number in (4, 5):
        desk.attempt(spec, number)
    assert refusal(desk.attempt, spec, 6).code is LATER
    desk.time.pass_(days=300)
    desk.attempt(spec, 6)
    assert refusal(desk.attempt, spec, 6).code is BUDGET  # for life: a period brings nothing back


@pytest.fixture
def clocks_of_utc(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("TZ", "UTC")
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


@pytest.mark.parametrize(
    "window",
    [
        ([], "12:00", True),
        (["08:00-12:00"], "07:59", False),
        (["08:00-12:00"], "08:00", True),
        (["08:00-12:00"], "11:59", True),
        (["08:00-12:00"], "12:00", False),
        (["20:00-06:00"], "19:59", False),
        (["20:00-06:00"], "20:00", True),
        (["20:00-06:00"], "00:00", True),
        (["20:00-06:00"], "05:59", True),
        (["20:00-06:00"], "06:00", False),
        (["08:00-09:00", "20:00-06:00"], "08:30", True),
        (["08:00-09:00", "20:00-06:00"], "09:00", False),
    ],
)
def test_rounds_are_trained_within_the_hours_alone(
    make_desk, make_spec: Spec, clocks_of_utc, window: tuple[list[str], str, bool]
):
    hours, asked, opened = window
    desk, spec = make_desk(limits={"hours": hours}), make_spec()
    hour, minute = map(int, asked.split(":"))
    desk.time.date = desk.time.date.replace(hour=hour, minute=minute)
    desk.invite(spec)  # at any hour
    if opened:
        desk.attempt(spec, 1)
    else:
        assert refusal(desk.attempt, spec, 1).code is LATER


def test_hours_are_those_of_the_machine(make_desk, make_spec: Spec, monkeypatch, clocks_of_utc):
    desk, spec = make_desk(limits={"hours": ["20:00-06:00"]}), make_spec()
    desk.invite(spec)
    assert refusal(desk.attempt, spec, 1).code is LATER  # it is noon here
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    time.tzset()
    desk.attempt(spec, 1)  # it is nine in the evening there


def test_a_run_of_which_nothing_is_heard_lapses(make_desk, make_spec: Spec):
    desk = make_desk(**enough_for(7) | {"limits": OPEN["limits"] | {"lapse_days": 30}})
    spec, second = everybody(make_spec, 7), everybody(make_spec, 6, "second")
    desk.invite(spec)
    desk.time.pass_(days=20)
    desk.attempt(spec, 1)
    desk.time.pass_(days=30)
    assert desk.policy.lapsed(desk.ledger.book, desk.time.date) == []
    assert refusal(desk.invite, second).code is BUDGET
    desk.time.pass_(seconds=1)
    assert desk.policy.lapsed(desk.ledger.book, desk.time.date) == [spec.digest]
    desk.ledger.lapse(spec.digest)
    assert desk.policy.lapsed(desk.ledger.book, desk.time.date) == []
    assert refusal(desk.attempt, spec, 2).code is RefusalCode.APPROVAL
    desk.invite(second)
    assert refusal(desk.invite, spec).code is BUDGET  # it may come back where there is room


# --- The file ---------------------------------------------------------------------------------


def test_a_file_is_read_whole(write, minimal: str):
    full = (
        'approval = "automatic"\nallow_no_privacy = true\nleast_unit = "image"\n'
        + minimal.replace("delta = 1e-5", "delta = 1e-5\norder = 16")
        + "[budget.period]\ndays = 365\nepsilon = 2.0\n"
        + '[limits]\nhours = ["20:00-06:00"]\noperators = "any"\nlapse_days = 7\n'
        + '[release]\npace = 0\n[machine]\ndevice = "cuda:1"\ngradient_memory = 64\n'
        + '[ledger]\nwitness = "/mnt/other/north.witness"\n'
    )
    policy = read_policy(write(full))
    assert (policy.approval, policy.allow_no_privacy) == ("automatic", True)
    assert policy.budget is not None
    assert policy.budget.period is not None
    assert (policy.budget.at_order, policy.budget.period.days) == (16, 365)
    assert (policy.limits.operators, policy.limits.hours) == ("any", ("20:00-06:00",))
    assert (policy.release.pace, policy.machine.device) == (0, "cuda:1")
    assert policy.ledger.witness == "/mnt/other/north.witness"


def test_the_order_is_that_at_which_the_budget_goes_farthest(write, minimal: str):
    budget = read_policy(write(minimal)).budget
    assert budget is not None
    best = accounting.divergence_within(3.0, 1e-5, budget.at_order) / budget.at_order
    for order in (2.0, 4.0, 8.0, 16.0, 32.0):
        assert accounting.divergence_within(3.0, 1e-5, order) / order <= best
    assert budget.limit == (3.0, 1e-5, budget.at_order)


def test_a_policy_cannot_be_changed(make_policy):
    policy = make_policy()
    with pytest.raises(ValidationError):
        policy.declared_size = 5
    with pytest.raises(ValidationError):
        policy.limits.greatest_rounds = 5


WRONG: dict[str, tuple[str, str, list[str]]] = {
    "no TOML": ('site = "north"', "site = ", ["expected the node's TOML file"]),
    "a number beyond reading": ("400", "1" + "0" * 5000, ["expected the node's TOML file"]),
    "an unknown key": (
        "declared_size = 400",
        "declared_size = 400\nallow_all = true",
        ["node.toml: allow_all = True: unknown key"],
    ),
    "an unknown key of the budget": (
        "epsilon = 3.0",
        "epsilon = 3.0\nmonthly = 1",
        ["node.toml: budget.monthly = 1: unknown key"],
    ),
    "no site": ('site = "north"', "", ["node.toml: site is missing"]),
    "no size": ("declared_size = 400", "", ["node.toml: declared_size is missing"]),
    "no cohort": ('cohort = "cohort"', "", ["node.toml: cohort is missing"]),
    "no epsilon": ("epsilon = 3.0", "", ["node.toml: budget.epsilon is missing"]),
    "no classes": ('classes = ["normal", "finding"]', "", ["node.toml: data.classes is missing"]),
    "a site that is a path": ('"north"', '"../x"', ["node.toml: site = '../x'"]),
    "a site without a name": ('"north"', '""', ["node.toml: site = ''"]),
    "a size of none": ("400", "0", ["node.toml: declared_size = 0", "greater than"]),
    "a size in words": ("400", '"400"', ["node.toml: declared_size = '400'", "integer"]),
    "a size with a fraction": ("400", "400.5", ["node.toml: declared_size = 400.5", "integer"]),
    "a size that is a truth value": ("400", "true", ["node.toml: declared_size = True"]),
    "a budget of nothing": ("3.0", "0.0", ["node.toml: budget.epsilon = 0.0"]),
    "a budget in words": ("3.0", '"3.0"', ["node.toml: budget.epsilon = '3.0'", "number"]),
    "a budget without end": ("3.0", "inf", ["node.toml: budget.epsilon = inf"]),
    "a budget that is no number": ("3.0", "nan", ["node.toml: budget.epsilon = nan"]),
    "a debt": ("3.0", "-3.0", ["node.toml: budget.epsilon = -3.0"]),
    "a certain delta": ("1e-5", "1.0", ["node.toml: budget.delta = 1.0"]),
    "a delta of nothing": ("1e-5", "0.0", ["node.toml: budget.delta = 0.0"]),
    "an order of one": ("1e-5", "1e-5\norder = 1.0", ["node.toml: budget.order = 1.0"]),
    "a budget without room": (
        "epsilon = 3.0",
        "epsilon = 3.0\norder = 2.0",
        ["node.toml: budget: epsilon = 3.0 at delta = 1e-05 and order 2 leaves room for no run"],
    ),
    "a period without room": (
        "epsilon = 3.0",
        "epsilon = 3.0\nperiod = { days = 30, epsilon = 0.5 }",
        ["node.toml: budget: period.epsilon = 0.5", "leaves room for no run"],
    ),
    "a period of no days": (
        "epsilon = 3.0",
        "epsilon = 3.0\nperiod = { days = 0, epsilon = 3.0 }",
        ["node.toml: budget.period.days = 0"],
    ),
    "a budget that is none": (
        "[budget]\nepsilon = 3.0\ndelta = 1e-5\n",
        'budget = "none"\n',
        ["node.toml: budget = 'none'"],
    ),
    "a yes that is no truth value": (
        'site = "north"',
        'site = "north"\nallow_no_privacy = "no"',
        ["node.toml: allow_no_privacy = 'no'", "boolean"],
    ),
    "an approval that there is not": (
        'site = "north"',
        'site = "north"\napproval = "auto"',
        ["node.toml: approval = 'auto'", "'ask' or 'automatic'"],
    ),
    "a unit that there is not": ('"patient"', '"study"', ["node.toml: data.unit = 'study'"]),
    "one class": ('"normal", ', "", ["node.toml: data.classes"]),
    "a shape in two dimensions": ("[1, 16, 16]", "[16, 16]", ["node.toml: data.shape"]),
    "a digest that is none": ('"PREPROCESSING"', '"abc"', ["node.toml: data.preprocessing"]),
}


@pytest.mark.parametrize(("old", "new", "parts"), WRONG.values(), ids=WRONG)
def test_a_mistake_is_named_with_file_key_and_value(
    write: Callable[[str], Path], old: str, new: str, parts: list[str]
):
    assert MINIMAL.count(old) == 1
    with pytest.raises(ConfigError) as caught:
        read_policy(write(MINIMAL.replace(old, new).replace("PREPROCESSING", "0" * 64)))
    for part in parts:
        assert part in str(caught.value)


ODD_TABLES: dict[str, tuple[str, str]] = {
    "hours that are none": ('[limits]\nhours = ["20-06"]', "limits.hours: '20-06': expected a"),
    "hours of a long day": ('[limits]\nhours = ["20:00-25:00"]', "'20:00-25:00': expected a"),
    "hours without length": ('[limits]\nhours = ["20:00-20:00"]', "'20:00-20:00': expected a"),
    "hours that are a time": ("[limits]\nhours = [20:00:00]", "'20:00:00': expected a"),
    "hours in one text": ('[limits]\nhours = "20:00-06:00"', "limits.hours = '20:00-06:00'"),
    "everybody, misspelt": ('[limits]\noperators = "all"', "limits.operators"),
    "a rate above one": ("[limits]\ngreatest_sampling_rate = 1.5", "sampling_rate = 1.5"),
    "no noise at all": ("[limits]\nleast_noise_multiplier = 0", "noise_multiplier = 0"),
    "noise that is no number": ("[limits]\nleast_noise_multiplier = nan", "multiplier = nan"),
    "no rounds": ("[limits]\ngreatest_rounds_a_day = 0", "greatest_rounds_a_day = 0"),
    "a limit that there is not": ("[limits]\ngreatest_round = 5", "unknown key"),
    "a pace beyond the deadline": ("[release]\npace = 1.5", "release.pace = 1.5"),
    "slots that cannot be": ("[release]\nleast_slot = 1e6", "release: least_slot = 1e+06 is above"),
    "a device that there is not": ('[machine]\ndevice = "tpu"', "machine.device = 'tpu'"),
    "no memory": ("[machine]\ngradient_memory = 0", "machine.gradient_memory = 0"),
    "a table that there is not": ("[limit]\nhours = []", "limit = "),
}


@pytest.mark.parametrize(("table", "part"), ODD_TABLES.values(), ids=ODD_TABLES)
def test_a_mistake_in_a_table_is_named(write, minimal: str, table: str, part: str):
    assert read_policy(write(minimal))  # the control: it is the table's
    with pytest.raises(ConfigError, match=r"^\S*node\.toml: ") as caught:
        read_policy(write(minimal + table + "\n"))
    assert part in str(caught.value)


@pytest.mark.parametrize("content", [None, b"\xff\xfe"], ids=["missing", "no text"])
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, content: bytes | None):
    path = tmp_path / "node.toml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"node\.toml: .*expected the node's TOML file"):
        read_policy(path)


# --- [intake] -----------------------------------------------------------------------------------

NODE_TOML = """
site = "north"
declared_size = 400
cohort = "cohort"
[budget]
epsilon = 8.0
delta = 1e-5
[data]
unit = "patient"
kind = "binary"
classes = ["a", "b"]
shape = [1, 8, 8]
preprocessing = "0000000000000000000000000000000000000000000000000000000000000000"
"""
HEX = "0123456789abcdef" * 4


def read_intake(folder: Path, section: str) -> IntakeSettings:
    (folder / "node.toml").write_text(NODE_TOML + section)
    return read_policy(folder / "node.toml").intake


def test_an_intake_that_nobody_wrote_of_is_on_the_safe_side(tmp_path: Path):
    found = read_intake(tmp_path, "")
    assert found == IntakeSettings()
    assert (found.site_key, found.profile.options) == ("site.key", frozenset())
    assert found.profile.risky_pixels == found.profile.faces == "refuse"
    assert cohort_key(tmp_path, found) is None


def test_the_hospital_chooses_its_profile(tmp_path: Path):
    section = """
    [intake]
    site_key = "keys/site.key"
    [intake.profile]
    dates = "modified"
    retain_safe_private = ["(0019,xx0C) SIEMENS MR HEADER"]
    """
    found = read_intake(tmp_path, section)
    assert found.site_key == "keys/site.key"
    assert found.profile.options == {"modified_dates", "safe_private"}


REFUSED_SECTIONS = {
    "UIDs without dates": ("[intake.profile]\nretain_uids = true", r"intake\.profile.*'full'"),
    "graphics alone": (
        "[intake.profile]\nclean_graphics = true\nclean_pixel_data = false",
        r"intake\.profile.*expected both",
    ),
    "blank nothing": (
        '[intake.profile]\nrisky_pixels = "blank"\nclean_pixel_data = false',
        r"intake\.profile.*nothing would be blanked",
    ),
    "no private attribute": (
        '[intake.profile]\nretain_safe_private = ["(0018,xx0C) A"]',
        r"intake\.profile\.retain_safe_private.*names no private attribute",
    ),
    "an unknown option": (
        "[intake.profile]\nretain_names = true",
        r"intake\.profile\.retain_names",
    ),
    "a word that is none": ('[intake.profile]\ndates = "shifted"', r"intake\.profile\.dates"),
    "a number for a word": ("[intake.profile]\nfaces = 1", r"intake\.profile\.faces"),
    "no key": ("[intake.encryption]", r"intake\.encryption.*neither.*exactly one"),
    "two keys": (
        '[intake.encryption]\nkey_file = "a"\nkey_command = ["b"]',
        r"intake\.encryption.*both of key_file and key_command",
    ),
    "a command in one text": (
        '[intake.encryption]\nkey_command = "vault get key"',
        r"intake\.encryption\.key_command",
    ),
    "a command of nothing": ("[intake.encryption]\nkey_command = []", r"key_command"),
    "an empty program": ('[intake.encryption]\nkey_command = [""]', r"first entry is empty"),
    "no time": (
        '[intake.encryption]\nkey_command = ["a"]\ncommand_seconds = 0',
        r"intake\.encryption\.command_seconds",
    ),
    "a key in the file itself": (
        f'[intake.encryption]\nkey = "{HEX}"',
        r"intake\.encryption\.key",
    ),
    "a control character": ('[intake]\nsite_key = "a\\u0000b"', r"intake\.site_key"),
    "no site key": ('[intake]\nsite_key = ""', r"intake\.site_key"),
    "no public key": ("[intake.reidentification]", r"intake\.reidentification\.public_key"),
}


@pytest.mark.parametrize("name", REFUSED_SECTIONS)
def test_what_the_intake_cannot_be_is_refused_by_its_key(tmp_path: Path, name: str):
    section, named = REFUSED_SECTIONS[name]
    with pytest.raises(ConfigError, match=named) as refused:
        read_intake(tmp_path, section)
    assert str(tmp_path / "node.toml") in str(refused.value)


def test_reading_a_policy_waits_for_no_dicom():
    """A person at the command line does not wait for what only an intake needs."""
    code = (
        "import sys, client.policy; print(sorted({'pydicom', 'torch', 'PIL'} & set(sys.modules)))"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert said.stdout == "[]\n"


def encrypted(**says: Any) -> IntakeSettings:
    return IntakeSettings(encryption=Encryption(**says))


def test_the_key_of_cohorts_comes_from_a_file_beside_the_policy(tmp_path: Path):
    settings = encrypted(key_file="keys/cohort.key")
    with pytest.raises(ConfigError, match=r"keys.cohort\.key: the cohort key cannot be read"):
        cohort_key(tmp_path, settings)
    assert list(tmp_path.iterdir()) == []  # reading makes none
    create_key(tmp_path / "keys" / "cohort.key")
    found = cohort_key(tmp_path, settings)
    assert found is not None
    assert found.hex() == (tmp_path / "keys" / "cohort.key").read_text().strip()
    (tmp_path / "keys" / "cohort.key").chmod(0o644)
    with pytest.raises(ConfigError, match="mode 0644"):
        cohort_key(tmp_path, settings)


def printing(content: str, then: str = "") -> IntakeSettings:
    code = f"import sys, time; sys.stdout.write({content!r}); sys.stdout.flush(); {then}"
    return encrypted(key_command=(sys.executable, "-c", code), command_seconds=60.0)


@pytest.mark.parametrize("content", [HEX, HEX + "\n", f"\n {HEX.upper()} \r\n"])
def test_the_key_of_cohorts_comes_from_what_a_command_prints(tmp_path: Path, content: str):
    assert cohort_key(tmp_path, printing(content)) == bytes.fromhex(HEX)


def test_the_command_runs_in_the_folder_of_the_policy_and_in_no_shell(tmp_path: Path):
    program = tmp_path / "print-key"
    program.write_text(f'#!/bin/sh\n[ "$1" = "; exit 1" ] && echo {HEX}\n')
    program.chmod(0o700)
    assert cohort_key(tmp_path, encrypted(key_command=("./print-key", "; exit 1"))) is not None
    assert list(tmp_path.iterdir()) == [program]


@pytest.mark.parametrize("content", ["", HEX[:-1], HEX + "0", f"{HEX}\n{HEX}", "g" * 64, "ü" * 32])
def test_a_command_that_prints_no_key_is_refused_and_not_quoted(
    tmp_path: Path, content: str, capfd, caplog
):
    with pytest.raises(ConfigError, match=r"that are no key; expected 64 hex") as refused:
        cohort_key(tmp_path, printing(content))
    assert not any(HEX[n : n + 6] in str(refused.value).partition(":")[2] for n in range(58))
    assert capfd.readouterr() == ("", "")
    assert not caplog.records


def test_a_command_that_fails_is_refused_whatever_it_printed(tmp_path: Path, capfd):
    says = f"sys.stderr.write('{HEX}'); sys.exit(3)"
    with pytest.raises(ConfigError, match=r"ended with status 3; run it by hand"):
        cohort_key(tmp_path, printing(HEX, then=says))
    assert capfd.readouterr() == ("", "")
    with pytest.raises(ConfigError, match="cannot be run"):
        cohort_key(tmp_path, encrypted(key_command=("./nowhere",)))


def test_a_command_that_hangs_is_ended_with_all_that_it_started(tmp_path: Path):
    mark = f"3599.{os.getpid()}"
    code = f"import subprocess, time; subprocess.Popen(['sleep', '{mark}']); time.sleep(3599)"
    settings = encrypted(key_command=(sys.executable, "-c", code), command_seconds=3.0)
    begun = time.monotonic()
    with pytest.raises(ConfigError, match="took longer than 3 s"):
        cohort_key(tmp_path, settings)
    assert time.monotonic() - begun < 60
    deadline = time.monotonic() + 30
    while mark in (left := running()) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert mark not in left


def running() -> str:
    """The command lines of this machine."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            found.append(entry.read_bytes().replace(b"\0", b" ").decode("utf-8", "replace"))
    return "\n".join(found)


def test_a_command_that_never_stops_printing_fills_no_memory(tmp_path: Path):
    settings = encrypted(key_command=("yes", HEX), command_seconds=60.0)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ConfigError, match="are no key"):
        cohort_key(tmp_path, settings)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # KiB


def test_the_page_of_the_nodes_file_shows_what_can_be_sealed(tmp_path: Path):
    page = (Path(__file__).parents[2] / "docs" / "node-file.md").read_text()
    first, second = re.findall(r"```toml\n(.*?)```", page, re.DOTALL)
    found = read_intake(tmp_path, second)
    assert found.encryption == Encryption(key_file="cohort.key")
    assert found.reidentification == Reidentification(public_key="officer.pem")
    for section in (IntakeSettings, Encryption, Reidentification, Profile):
        for key in section.model_fields:
            assert re.search(rf"^(# )?{key} =|\[intake\.{key}\]", first + second, re.MULTILINE), key
