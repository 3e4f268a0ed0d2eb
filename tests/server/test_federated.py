"""The sites' tables together: what is refused by name, and what their sum says."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from common.accounting import SubsampledGaussian
from common.errors import RefusalCode, UpdateError
from common.messages import Counts, RefusalReply
from common.spec import RunSpec
from common.tasks import counts
from server.federated import result_of, table_of

PLANNED = SubsampledGaussian(1.0, 2.0, 1, "patient")


@pytest.fixture
def spec(make_spec: Callable[..., RunSpec]) -> RunSpec:
    return make_spec(evaluation={"federated": {"noise_multiplier": 2.0, "bins": 10}})


def honest(spec: RunSpec, fill: float = 3.0) -> Counts:
    return Counts(spec.digest, PLANNED, np.full(counts.shape(spec), fill, dtype=np.float32))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"digest": "0" * 64}, "not the counts of this run"),
        ({"mechanism": replace(PLANNED, noise_multiplier=0.1)}, "is not the one that was planned"),
        ({"mechanism": replace(PLANNED, unit="image")}, "is not the one that was planned"),
        ({"table": np.zeros((1, 2, 9), np.float32)}, "counts of shape"),
        ({"table": np.full((1, 2, 10), np.nan, np.float32)}, "not finite"),
        ({"table": np.full((1, 2, 10), np.inf, np.float32)}, "not finite"),
    ],
)
def test_counts_that_are_not_this_runs_are_refused(
    spec: RunSpec, change: dict[str, Any], reason: str
):
    with pytest.raises(UpdateError, match=reason):
        table_of(replace(honest(spec), **change), spec)
    assert table_of(honest(spec), spec).sum() == 60  # the control


def test_another_message_is_no_table(spec: RunSpec):
    with pytest.raises(UpdateError, match="not the counts"):
        table_of(RefusalReply(code=RefusalCode.LATER), spec)


def test_tables_add_up_and_so_does_their_noise(spec: RunSpec):
    one, other = np.zeros(counts.shape(spec)), np.zeros(counts.shape(spec))
    one[0, 0, :5], one[0, 1, 5:] = 10, 10  # it ranks all of its own rightly
    other[0, 0, 9], other[0, 1, 0] = 50, 50  # and here all wrongly
    together = result_of(spec, {"north": one, "south": other}, {"west": "refused: policy"})
    assert together.patients == 200
    assert together.deviation == pytest.approx(2.0 * math.sqrt(2))
    assert together.sites == {"north": "ok", "south": "ok", "west": "refused: policy"}
    alone = result_of(spec, {"north": one}, {})
    assert alone.metrics["auroc"].value == 1.0
    assert together.metrics["auroc"].value == counts.metrics(one + other, 0.5)["auroc"]
    estimate = together.metrics["auroc"]
    assert estimate.low is not None
    assert estimate.high is not None
    assert estimate.low < counts.metrics(one + other, 0.5)["auroc"] < estimate.high  # type: ignore[operator]


def test_without_any_table_no_figure_has_a_value(spec: RunSpec):
    nothing = result_of(spec, {}, {"north": "no answer before the deadline"})
    assert nothing.patients == 0
    assert {estimate.value for estimate in nothing.metrics.values()} == {None}
    assert nothing.to_json()["metrics"]["auroc"] == {"value": None, "low": None, "high": None}
