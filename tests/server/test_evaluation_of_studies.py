"""The central evaluation and the report of a run that decides on studies."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from common import models
from common.cohort import Cohort
from common.errors import CohortError
from common.spec import RunSpec
from common.tasks import task_for
from common.tasks.exhibits import Gallery, Matrix
from server.evaluation import CentralEvaluator

OWNERS = [number // 4 for number in range(48)]
NAMES = ["x" if number % 4 < 3 else "y" for number in range(48)]  # of three images, and of one
LABELS = [int(number % 8 == 1) for number in range(48)]


@pytest.fixture
def run_of_studies(make_spec: Callable[..., RunSpec]) -> Callable[..., RunSpec]:
    def make(**changes: Any) -> RunSpec:
        seen = {"height": 16, "width": 16, "images": 2}
        wanted = {"gallery": 5, "bootstrap": 20, "validation_fraction": 0.5}
        return make_spec(
            model={"name": "small-cnn", "width": 4}, input=seen, evaluation=wanted, **changes
        )

    return make


def test_a_part_has_a_row_a_study_and_its_patients(run_of_studies, write_cohort):
    spec = run_of_studies()
    cohort = write_cohort(spec, OWNERS, studies=NAMES, labels=LABELS)
    found = CentralEvaluator(spec, cohort).evaluate(models.build(spec))
    for part in (found.validation, found.test):
        assert part is not None
        assert (part.images, part.patients) == (12, 6)
        assert sorted(part.evidence["labels"]) == [0] * 9 + [1] * 3


def test_probabilities_are_those_of_a_study_put_together_by_hand(run_of_studies, write_cohort):
    spec = run_of_studies()
    cohort = write_cohort(spec, OWNERS, studies=NAMES, labels=LABELS, splits=["test"] * 48)
    network = models.build(spec).eval()
    found: Any = CentralEvaluator(spec, cohort).evaluate(network).test
    rows = [0, 2]  # the first and the last of the first patient's three images
    first = torch.from_numpy(Cohort.open(cohort.path).images(rows))
    seen = ((first - spec.input.mean[0]) / spec.input.std[0])[None]
    with torch.no_grad():
        expected = torch.sigmoid(network(seen))[0, 0]
    assert found.evidence["probabilities"][0, 1] == pytest.approx(float(expected), abs=1e-6)


def test_a_study_of_several_classes_is_refused_by_name(run_of_studies, write_cohort):
    spec = run_of_studies(task={"kind": "multiclass", "classes": ["a", "b", "c"]})
    labels = [2 if number == 5 else 1 for number in range(48)]
    cohort = write_cohort(spec, OWNERS, studies=NAMES, labels=labels)
    with pytest.raises(CohortError, match=r"1 of 12 studies .*p00001 has b and c"):
        CentralEvaluator(spec, cohort)


def test_the_report_shows_studies_with_the_weights_of_their_images(run_of_studies, write_cohort):
    spec = run_of_studies()
    cohort = write_cohort(spec, OWNERS, studies=NAMES, labels=LABELS)
    evaluator, network = CentralEvaluator(spec, cohort), models.build(spec).eval()
    part = evaluator.parts["test"]
    task = task_for(spec)
    with torch.no_grad():
        kept = task.pictures(network, part, torch.device("cpu"))
    evidence = {**task.evidence(network, part, torch.device("cpu")), **kept}
    shown = task.exhibits(evidence, part.patient_index)
    (matrix,) = (one for one in shown if isinstance(one, Matrix))
    assert matrix.title.startswith("Studies of the test part")
    assert "3 studies with" in matrix.says
    (gallery,) = (one for one in shown if isinstance(one, Gallery))
    assert len(gallery.pictures) == len(gallery.captions) == 5
    for caption in gallery.captions:
        weights = [float(text) for text in re.findall(r"[01]\.\d\d", caption.split("weights")[1])]
        assert len(weights) in (1, 2)
        assert sum(weights) == pytest.approx(1, abs=0.011)
    alone = [len(re.findall(r"\d\.\d\d", c.split("weights")[1])) == 1 for c in gallery.captions]
    white = [bool((picture[:, -16:] == 255).all()) for picture in gallery.pictures]
    assert white == alone  # a place without an image stays white
    assert any(alone)
    assert not all(alone)
    bars = (gallery.pictures[:, -1] != 255).any(axis=-1).sum(axis=1)
    assert np.ptp(bars) <= 2  # weights of all images of a study add up to one
