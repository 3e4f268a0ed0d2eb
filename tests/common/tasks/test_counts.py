"""Counts at public thresholds: exact tables, their sensitivity, and what noised ones still say."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from sklearn.metrics import roc_auc_score

from common.errors import SpecError
from common.spec import RunSpec
from common.tasks import counts

Spec = Callable[..., RunSpec]
FEDERATED = {"federated": {"noise_multiplier": 2.0, "bins": 10}}
KINDS = {
    "binary": {"kind": "binary", "classes": ["no", "yes"]},
    "multiclass": {"kind": "multiclass", "classes": ["a", "b", "c"]},
    "multilabel": {"kind": "multilabel", "classes": ["a", "b", "c", "d"]},
}


def drawn(kind: str, patients: int = 200, seed: int = 1) -> tuple[NDArray[Any], NDArray[Any]]:
    """Probabilities and labels that have something to do with each other."""
    rng = np.random.default_rng(seed)
    classes = len(KINDS[kind]["classes"])
    if kind == "multilabel":
        labels = rng.integers(0, 2, (patients, classes))
        return np.clip(rng.normal(0.4 + 0.2 * labels, 0.2), 0, 1).astype(np.float32), labels
    labels = rng.integers(0, classes, patients)
    raw = rng.random((patients, classes)) + 0.5 * np.eye(classes)[labels]
    return (raw / raw.sum(axis=1, keepdims=True)).astype(np.float32), labels


@pytest.mark.parametrize("kind", KINDS)
def test_each_patient_is_counted_once_in_each_column(make_spec: Spec, kind: str):
    spec = make_spec(task=KINDS[kind], evaluation=FEDERATED)
    probabilities, labels = drawn(kind)
    table = counts.tabulate(spec, probabilities, labels)
    assert table.shape == counts.shape(spec)
    assert table.sum(axis=(1, 2)).tolist() == [200] * len(table)
    for column in range(len(table)):
        which = column + (kind == "binary")
        has = labels[:, which] == 1 if kind == "multilabel" else labels == which
        for truth in (0, 1):
            for cell in range(10):
                low, high = cell / 10, (cell + 1) / 10
                p = probabilities[:, which].astype(np.float64)
                inside = (p >= low) & ((p < high) | (cell == 9))
                expected = (inside & (has == bool(truth))).sum()
                assert abs(table[column, truth, cell] - expected) <= 1  # an edge in float32


@pytest.mark.parametrize("kind", KINDS)
def test_no_patient_moves_a_table_by_more_than_the_noise_is_made_for(make_spec: Spec, kind: str):
    spec = make_spec(task=KINDS[kind], evaluation=FEDERATED)
    bound = counts.deviation(spec) / 2.0  # over the noise multiplier
    probabilities, labels = drawn(kind)
    probabilities[3] = np.nan
    probabilities[4] = np.inf
    probabilities[5] = -np.inf
    whole = counts.tabulate(spec, probabilities, labels)
    for patient in range(40):
        kept = np.arange(200) != patient
        without = counts.tabulate(spec, probabilities[kept], labels[kept])
        moved = float(np.linalg.norm(whole - without))
        assert moved <= bound + 1e-9
        assert moved >= bound - 1e-9  # and the noise is not more than it need be


@pytest.mark.parametrize("kind", KINDS)
def test_without_noise_the_auroc_is_that_of_the_binned_scores(make_spec: Spec, kind: str):
    spec = make_spec(task=KINDS[kind], evaluation=FEDERATED)
    probabilities, labels = drawn(kind)
    seen = counts.metrics(counts.tabulate(spec, probabilities, labels), 0.5)
    binned = np.minimum((probabilities * 10).astype(int), 9)
    columns = range(1, 2) if kind == "binary" else range(probabilities.shape[1])
    truths = [labels[:, c] if kind == "multilabel" else labels == c for c in columns]
    pairs = list(zip(columns, truths, strict=True))
    assert seen["auroc"] == pytest.approx(
        np.mean([roc_auc_score(truth, binned[:, c]) for c, truth in pairs])
    )
    decided = [(binned[:, c] >= 5, truth.astype(bool)) for c, truth in pairs]
    assert seen["sensitivity"] == pytest.approx(np.mean([d[t].mean() for d, t in decided]))
    assert seen["specificity"] == pytest.approx(np.mean([(~d)[~t].mean() for d, t in decided]))


def test_a_table_of_nothing_says_nothing(make_spec: Spec):
    spec = make_spec(evaluation=FEDERATED)
    empty = counts.tabulate(spec, np.empty((0, 2), np.float32), np.empty(0, np.int64))
    assert counts.metrics(empty, 0.5) == dict.fromkeys(counts.METRICS)
    assert counts.metrics(empty - 3.0, 0.5) == dict.fromkeys(counts.METRICS)
    assert counts.intervals(empty, 0.0, 0.5, seed=1) == {}


def test_an_interval_holds_the_value_without_noise_as_often_as_it_says(make_spec: Spec):
    spec = make_spec(evaluation=FEDERATED)
    exact = counts.tabulate(spec, *drawn("binary", 2000))
    truth = counts.metrics(exact, 0.5)["specificity"]
    assert truth is not None
    rng, held = np.random.default_rng(2), 0
    for seed in range(200):
        noised = exact + rng.normal(0.0, 20.0, exact.shape)
        low, high = counts.intervals(noised, 20.0, 0.5, seed=seed, resamples=100)["specificity"]
        held += low <= truth <= high
    assert 175 <= held <= 200  # 95 % of 200; resamples of 100 are coarse


def test_a_run_without_a_federated_evaluation_has_no_table(make_spec: Spec):
    with pytest.raises(SpecError, match=r"evaluation\.federated"):
        counts.shape(make_spec())
