"""A site's noised counts: one image a patient, noise from the keystream, nothing from the rest."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from client.counting import noised_counts
from common.noise import Keystream
from common.spec import RunSpec
from common.tasks import counts

CPU = torch.device("cpu")
FEDERATED = {"federated": {"noise_multiplier": 3.0, "bins": 8}}
Spec = Callable[..., RunSpec]


def test_without_noise_every_patient_is_there_once(
    make_spec: Spec, write_cohort: Any, global_weights: Any, quiet_keystream: Any
):
    spec = make_spec(evaluation=FEDERATED)
    owners = [0] * 9 + list(range(1, 20))  # nine images of one patient
    cohort = write_cohort(spec, owners)
    table = noised_counts(
        spec, global_weights(spec), cohort, keystream=quiet_keystream(), device=CPU
    )
    assert table.shape == (1, 2, 8)
    assert table.dtype == np.float32
    assert table.sum() == 20


def test_one_patient_moves_the_table_by_one(
    make_spec: Spec, write_cohort: Any, global_weights: Any, quiet_keystream: Any
):
    spec = make_spec(evaluation=FEDERATED)
    rng = np.random.default_rng(1)
    pixels = rng.integers(0, 65536, (20, 1, 16, 16), dtype=np.uint16)
    labels = rng.integers(0, 2, 20)
    tables = []
    for name, kept in (("with", 20), ("without", 19)):
        cohort = write_cohort(
            spec, range(kept), labels=labels[:kept], pixels=pixels[:kept], name=name
        )
        tables.append(
            noised_counts(
                spec, global_weights(spec), cohort, keystream=quiet_keystream(), device=CPU
            )
        )
    assert np.linalg.norm(tables[0] - tables[1]) == pytest.approx(1.0)


def test_an_empty_cohort_releases_noise_of_the_stated_deviation(
    make_spec: Spec, write_cohort: Any, global_weights: Any
):
    spec = make_spec(evaluation={"federated": {"noise_multiplier": 3.0, "bins": 1000}})
    cohort = write_cohort(spec, [])
    weights = global_weights(spec)
    one, other = (
        noised_counts(spec, weights, cohort, keystream=Keystream.fresh(), device=CPU)
        for _ in range(2)
    )
    assert one.std() == pytest.approx(counts.deviation(spec), rel=0.1)
    assert abs(np.corrcoef(one.ravel(), other.ravel())[0, 1]) < 0.15


def test_several_columns_have_noise_for_their_sensitivity(
    make_spec: Spec, write_cohort: Any, global_weights: Any
):
    spec = make_spec(
        task={"kind": "multilabel", "classes": ["a", "b", "c", "d"]},
        evaluation={"federated": {"noise_multiplier": 3.0, "bins": 500}},
    )
    assert counts.deviation(spec) == 6.0
    cohort = write_cohort(make_spec(), []).with_split("test")
    table = noised_counts(
        spec, global_weights(spec), cohort, keystream=Keystream.fresh(), device=CPU
    )
    assert table.std() == pytest.approx(6.0, rel=0.1)
