"""A policy in words: every key of it is on the page, and changes it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from pydantic import BaseModel

from client import policy as policy_module
from client.policy import Policy
from deploy.node_words import explained, idle, warnings

DEFAULTS = {"budget", "limits", "data", "release", "machine", "ledger"}
CHANGES: dict[str, Any] = {
    "site": "south",
    "declared_size": 70,
    "cohort": "another",
    "least_unit": "image",
    "approval": "ask",
    "allow_no_privacy": True,
    "budget.epsilon": 7.0,
    "budget.delta": 1e-5,
    "budget.order": 3.0,
    "budget.period": {"days": 30, "epsilon": 6.5},
    "limits.operators": ["trial-office"],
    "limits.tasks": ["other"],
    "limits.models": ["small-cnn", "resnet18"],
    "limits.greatest_parameters": 123456,
    "limits.least_noise_multiplier": 0.77,
    "limits.greatest_sampling_rate": 0.123,
    "limits.greatest_steps_a_round": 77,
    "limits.greatest_rounds": 88,
    "limits.greatest_rounds_a_day": 66,
    "limits.greatest_open_runs": 9,
    "limits.greatest_new_runs_a_day": 17,
    "limits.least_patients": 55,
    "limits.lapse_days": 44,
    "limits.federated_evaluation": True,
    "limits.withdrawn": ["5d" * 32],
    "limits.hours": ["20:00-06:00"],
    "data.unit": "image",
    "data.kind": "multiclass",
    "data.classes": ["no", "maybe"],
    "data.shape": [3, 32, 48],
    "data.preprocessing": "ab" * 32,
    "data.modalities": ["CT", "MR"],
    "data.synthetic": "made/cohort",
    "data.synthetic_without_privacy": True,
    "release.pace": 0.25,
    "release.least_slot": 41.0,
    "release.greatest_slot": 4321.0,
    "machine.device": "cuda:1",
    "machine.gradient_memory": 999,
    "ledger.witness": "/mnt/log/north",
    "intake": {"profile": {"faces": "keep"}},
    "listen": {"transport": "plain", "callers": [{"ae_title": "PACS"}]},
}


def keys(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name in model.model_fields:
        inner = getattr(policy_module, {"release": "Releases", "ledger": "LedgerFiles"}.get(
            name, name.title()), None)  # fmt: skip
        if not prefix and name in DEFAULTS and inner is not None:
            yield from keys(inner, f"{name}.")
        else:
            yield prefix + name


def page(policy: Policy) -> str:
    lines = [line for part in explained(policy) for line in part.sentences]
    return "\n".join([*lines, *warnings(policy), *idle(policy)])


def nested(key: str, value: Any) -> dict[str, Any]:
    table, _, name = key.rpartition(".")
    return {table: {name: value}} if table else {name: value}


def test_every_key_of_a_policy_is_looked_at():
    assert set(keys(Policy)) == set(CHANGES)


@pytest.mark.parametrize("key", CHANGES)
def test_a_change_of_a_key_can_be_read_on_the_page(key: str, make_policy: Callable[..., Policy]):
    paced = {"release": {"pace": 0.5, "least_slot": 30.0}, "budget": {"order": 4.0}}
    before = make_policy(**paced)
    change = nested(key, CHANGES[key])
    merged = {
        table: paced.get(table, {}) | value if isinstance(value, dict) else value
        for table, value in change.items()
    }
    after = make_policy(**(paced | merged))
    assert after != before
    assert page(after) != page(before)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"limits": {"operators": []}}, "No operator may launch a run here."),
        ({"limits": {"operators": []}}, "No operator is allowed"),
        ({"limits": {"models": []}}, "No network is allowed"),
        ({"allow_no_privacy": True}, "can tell of single patients"),
        ({"release": {"pace": 0.0}}, "how long this node takes to answer tells"),
        ({"least_unit": "image"}, "may protect single images"),
        ({"data": {"unit": "image"}}, 'least_unit = "image"'),
        ({}, "nobody has chosen which"),
        ({}, "Cohorts lie unsealed"),
        ({"intake": {"encryption": {"key_file": "/mnt/k"}}}, "their key comes from /mnt/k"),
        ({"intake": {"reidentification": {"public_key": "o.pem"}}}, "private key to o.pem alone"),
    ],
)
def test_what_a_person_should_know_is_said(
    changes: dict[str, Any], text: str, make_policy: Callable[..., Policy]
):
    assert text in page(make_policy(**changes))


def test_a_strict_policy_needs_no_warning(make_policy: Callable[..., Policy]):
    strict = make_policy(
        limits={"operators": ["trial-office"], "models": ["small-cnn"]}, release={"pace": 0.5}
    )
    assert list(warnings(strict)) == []
    assert list(idle(strict)) == []
