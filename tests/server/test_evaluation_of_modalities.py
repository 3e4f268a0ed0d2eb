"""The central evaluation and the report of a run of modalities."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from common import models
from common.errors import CohortError
from common.spec import RunSpec
from common.tasks import task_for
from common.tasks.exhibits import Gallery, Table
from common.tasks.metrics import Predictions, score
from server.evaluation import CentralEvaluator

# Twelve patients of both, six of CT alone, six of MR alone, two of nothing that is asked for.
OWNERS = [*sorted([*range(12)] * 2), *range(12, 26)]
MADE = [*["CT", "MR"] * 12, *["CT"] * 6, *["MR"] * 6, *["US"] * 2]
LABELS = [owner % 2 for owner in OWNERS]


@pytest.fixture
def run_of(make_spec: Callable[..., RunSpec]) -> Callable[..., RunSpec]:
    def make(**changes: Any) -> RunSpec:
        seen = {"height": 16, "width": 16, "modalities": ["CT", "MR"], "together": "patient"}
        wanted = {"gallery": 4, "bootstrap": 20, "validation_fraction": 0.0}
        return make_spec(
            model={"name": "small-cnn", "width": 4}, input=seen, evaluation=wanted, **changes
        )

    return make


def test_a_part_has_a_row_a_patient_who_has_one_of_them(run_of, write_cohort):
    spec = run_of()
    cohort = write_cohort(spec, OWNERS, labels=LABELS, modalities=MADE)
    found: Any = CentralEvaluator(spec, cohort).evaluate(models.build(spec)).test
    assert (found.images, found.patients) == (24, 24)
    assert found.evidence["modalities"].tolist() == [[1, 1]] * 12 + [[1, 0]] * 6 + [[0, 1]] * 6


def test_probabilities_are_those_of_a_patient_put_together_by_hand(run_of, write_cohort):
    spec = run_of()
    cohort = write_cohort(spec, OWNERS, labels=LABELS, modalities=MADE)
    network: Any = models.build(spec).eval()
    found: Any = CentralEvaluator(spec, cohort).evaluate(network).test
    ct, mr = (network.each[number].encoder for number in range(2))
    seen = torch.from_numpy((cohort.images([0, 1, 24]) - spec.input.mean[0]) / spec.input.std[0])
    with torch.no_grad():
        whole = torch.cat([ct(seen[:1]), mr(seen[1:2]), torch.zeros(1, 2)], dim=1)
        alone = torch.cat([ct(seen[2:]), torch.zeros_like(mr(seen[:1])), torch.eye(2)[1:]], dim=1)
        expected = torch.sigmoid(network.output(torch.cat([whole, alone])))[:, 0]
    assert found.evidence["probabilities"][[0, 12], 1] == pytest.approx(expected.numpy(), abs=1e-6)


def test_the_report_says_how_it_does_where_one_is_absent(run_of, write_cohort):
    spec = run_of()
    cohort = write_cohort(spec, OWNERS, labels=LABELS, modalities=MADE)
    evaluator, network = CentralEvaluator(spec, cohort), models.build(spec).eval()
    task, part, cpu = task_for(spec), evaluator.parts["test"], torch.device("cpu")
    with torch.no_grad():
        evidence = {**task.evidence(network, part, cpu), **task.pictures(network, part, cpu)}
    shown = task.exhibits(evidence, part.patient_index)
    (table,) = (one for one in shown if isinstance(one, Table))
    assert [row[:2] for row in table.rows] == [
        ("CT and MR", "12"),
        ("CT alone", "6"),
        ("MR alone", "6"),
    ]
    only = slice(12, 18)  # the AUROC in the second line is that of those patients alone
    them = Predictions(
        "binary",
        evidence["probabilities"][only],
        evidence["labels"][only],
        part.patient_index[only],
    )
    assert table.rows[1][2].startswith(f"{score(them).metrics['auroc'].value:.3f}")
    (gallery,) = (one for one in shown if isinstance(one, Gallery))
    captions = [caption.split("; ", 2)[2] for caption in gallery.captions]
    assert captions[0] == "CT 1.00; MR 1.00"
    assert captions[-1] == "CT absent; MR 1.00"
    assert (gallery.pictures[-1][:, :8] == 255).all()  # the place of the CT stays white


def test_a_run_without_modalities_keeps_no_word_of_them(make_spec, write_cohort):
    spec = make_spec(input={"height": 16, "width": 16, "images": 2})
    cohort = write_cohort(spec, [0, 0, 1, 2, 3], labels=[0, 0, 1, 0, 1])
    found: Any = CentralEvaluator(spec, cohort).evaluate(models.build(spec)).test
    assert set(found.evidence) == {"probabilities", "labels"}


def test_a_cohort_with_no_image_of_them_is_refused_by_name(run_of, write_cohort):
    spec = run_of()
    cohort = write_cohort(spec, [0, 1], labels=[0, 1], modalities=["US", "US"])
    with pytest.raises(CohortError, match=r"no image of CT or MR.*they are of US"):
        CentralEvaluator(spec, cohort)


def test_patients_whose_images_differ_in_class_are_refused(run_of, write_cohort):
    spec = run_of(task={"kind": "multiclass", "classes": ["a", "b", "c"]})
    labels = [1 if number == 1 else 0 for number in range(len(OWNERS))]
    cohort = write_cohort(spec, OWNERS, labels=labels, modalities=MADE)
    with pytest.raises(CohortError, match=r"1 of 24 patients have .*expected one class a patient"):
        CentralEvaluator(spec, cohort)
    assert np.unique(cohort.modalities).tolist() == ["CT", "MR", "US"]
