"""Modalities of a run: the file that asks for them, the cohort that has them, rows of both."""

from __future__ import annotations

import logging
import pickle
import sqlite3
from collections.abc import Callable
from contextlib import closing
from typing import Any

import numpy as np
import pytest

from common.cohort import INDEX_FILE, Cohort
from common.errors import CohortError, SpecError
from common.noise import Keystream
from common.spec import RunSpec
from common.studies import ABSENT, Studies, rows_for, seen_by

# Three patients: of 0 and 1 there are both, of 2 an MR alone; patient 3 has nothing but US.
OWNERS = [0, 0, 0, 0, 1, 1, 1, 2, 2, 3, 0]
STUDIES = ["c", "c", "c", "m", "x", "x", "x", "x", "x", "x", "c"]
MADE = ["CT", "CT", "CT", "MR", "CT", "MR", "US", "MR", "MR", "US", "CT"]
SEEN = {"height": 8, "width": 8, "images": 2, "modalities": ["CT", "MR"]}


@pytest.fixture
def run(make_spec: Callable[..., RunSpec]) -> Callable[..., RunSpec]:
    def make(together: str = "patient", **changes: Any) -> RunSpec:
        return make_spec(input=SEEN | {"together": together} | changes.pop("input", {}), **changes)

    return make


@pytest.fixture
def rows(run: Any, write_cohort: Any) -> Callable[..., Studies]:
    def make(together: str = "patient", **given: Any) -> Studies:
        spec = run(together)
        cohort = write_cohort(spec, OWNERS, studies=STUDIES, modalities=MADE, **given)
        found = rows_for(spec, cohort)
        assert isinstance(found, Studies)
        return found

    return make


# --- The run's file ------------------------------------------------------------------------------


def test_a_run_without_modalities_has_the_digest_that_it_had(make_spec: Any) -> None:
    plain = make_spec(input={"height": 8, "width": 8})
    assert make_spec(input={"height": 8, "width": 8, "modalities": []}).digest == plain.digest
    assert make_spec(input={"height": 8, "width": 8, "together": "study"}).digest == plain.digest
    assert "modalities" not in plain.canonical_json.split('"use"')[0]
    assert "together" not in plain.canonical_json


def test_their_order_is_part_of_the_run_and_no_part_of_its_cohort(run: Any) -> None:
    one, other = run(), run(input={"modalities": ["MR", "CT"]})
    assert one.digest != other.digest
    assert one.input.preprocessing_digest == other.input.preprocessing_digest
    assert RunSpec.from_json(one.canonical_json).input.modalities == ("CT", "MR")
    assert (one.input.places, one.input.row_shape) == (4, (4, 1, 8, 8))
    assert (one.input.row_name, run("study").input.row_name) == ("patient", "study")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"input": {"modalities": ["CT", "CT"]}}, "'CT' twice"),
        ({"input": {"modalities": ["ct"]}}, "input.modalities.0 = 'ct'"),
        ({"input": {"modalities": ["", "CT"]}}, "input.modalities.0 = ''"),
        ({"input": {"modalities": ["A" * 17]}}, "input.modalities.0"),
        ({"input": {"modalities": [f"M{n}" for n in range(9)]}}, "at most 8 items"),
        ({"input": {"modalities": [], "images": 1}}, "together = 'patient' is of several images"),
        ({"privacy": {"unit": "image"}}, "privacy.unit = 'image' protects one image"),
        ({"augmentation": {"synthetic": 4}}, "no synthetic image says its modality"),
        ({"input": {"together": "series"}}, "input.together = 'series'"),
    ],
)
def test_a_run_of_modalities_that_cannot_be_is_refused(run: Any, changes: Any, said: str) -> None:
    with pytest.raises(SpecError) as refused:
        run(**changes)
    assert said in str(refused.value)


@pytest.mark.parametrize("task", ["segmentation", "detection", "reconstruction", "generation"])
def test_tasks_that_decide_on_single_images_have_none(run: Any, task: str) -> None:
    asked = {"name": task, "kind": None, "classes": ["a", "b"]}
    kinds = {"segmentation": "mask", "detection": "boxes", "reconstruction": "none"}
    asked["kind"] = kinds.get(task, "binary")
    losses = {"segmentation": "dice", "detection": "heatmap", "reconstruction": "mse"}
    metrics = {"segmentation": "dice", "detection": "map50", "reconstruction": "psnr"}
    loss, metric = losses.get(task, "adversarial"), metrics.get(task, "tstr-auroc")
    with pytest.raises(SpecError, match=rf"\['CT', 'MR'\]: {task} takes one image at a time"):
        run(task=asked, loss={"name": loss}, evaluation={"metric": metric})


# --- Rows ----------------------------------------------------------------------------------------


def test_a_row_has_the_places_of_each_modality_and_a_patient_without_any_is_not_there(rows):
    found = rows()
    whole = Cohort.open(found.path)
    assert (len(found), found.row_shape) == (3, (4, 1, 8, 8))
    assert found.patients == ("p00000", "p00001", "p00002")
    images = found.images([0, 1, 2])
    assert np.array_equal(images[0, :3], whole.images([0, 10, 3]))  # of four CT the first and last
    assert np.array_equal(images[1, [0, 2]], whole.images([4, 5]))
    assert np.array_equal(images[2, 2:], whole.images([7, 8]))
    absent = np.isnan(images).all(axis=(2, 3, 4))
    assert absent.tolist() == [
        [False, False, False, True],
        [False, True, False, True],
        [True, True, False, False],
    ]


def test_of_studies_a_patients_ct_and_mr_are_two_rows(rows: Any) -> None:
    found = rows("study")
    assert (len(found), len(found.patients)) == (4, 3)
    assert found.patient_index.tolist() == [0, 0, 1, 2]


def test_each_modality_is_drawn_by_itself(rows: Any) -> None:
    found, below = rows(), Keystream.seeded(1).below
    seen = set()
    for _ in range(40):
        drawn = found.drawn(np.array([0, 2]), below)
        assert set(drawn[0, :2]) < {0, 1, 2, 8}  # numbers among what is seen: US is left out
        assert drawn[0, 2:].tolist() == [3, ABSENT]
        assert drawn[1].tolist() == [ABSENT, ABSENT, 6, 7]
        seen.add(tuple(drawn[0, :2]))
    assert len(seen) == 6  # two of four


def test_what_a_row_is_labelled_is_no_matter_of_which_of_its_places_is_empty(rows: Any) -> None:
    labels = [0] * 7 + [1, 0, 1, 0]
    found = rows(labels=labels)
    assert found.labels.tolist() == [0, 0, 1]  # and the US, which is positive, is nobody's
    drawn = found.drawn(np.array([2, 0]), Keystream.seeded(1).below)
    assert found.targets(drawn).tolist() == [1, 0]


def test_views_and_pickles_keep_modalities(rows: Any) -> None:
    found = rows()
    part = pickle.loads(pickle.dumps(found.subset([0, 2])))  # noqa: S301 - our own
    assert np.array_equal(part.images([1]), found.images([2]), equal_nan=True)
    assert part.row_shape == found.row_shape
    assert len(found.subset([])) == 0
    assert repr(part).endswith("2 patients)")


def test_what_is_not_seen_is_told_the_sites_own_log(run: Any, write_cohort: Any, caplog: Any):
    spec = run()
    cohort = write_cohort(spec, OWNERS, studies=STUDIES, modalities=MADE)
    with caplog.at_level(logging.WARNING, logger="cloister.studies"):
        rows_for(spec, cohort)
    assert "2 of 11 images are of none of CT, MR" in caplog.text
    assert "patients who have no other: 1" in caplog.text
    assert len(seen_by(spec, cohort)) == 9


# --- Cohorts -------------------------------------------------------------------------------------


def test_a_cohort_says_which_modalities_it_was_made_for(run: Any, write_cohort: Any) -> None:
    cohort = write_cohort(run(), OWNERS, modalities=MADE)
    assert cohort.meta.modalities == ("CT", "MR")
    assert cohort.modalities.tolist() == MADE
    assert cohort.subset([2]).modalities.tolist() == ["MR", "MR"]
    cohort.check_fits(run(input={"modalities": ["MR", "PT"]}))  # a site without PT takes part
    with pytest.raises(CohortError, match="modalities are CT, MR, the run asks for PT, US"):
        cohort.check_fits(run(input={"modalities": ["PT", "US"]}))


def test_whether_it_fits_does_not_depend_on_its_images(run: Any, write_cohort: Any) -> None:
    """What a node answers follows from what a cohort was made for, not from its patients."""
    empty = write_cohort(run(), [], modalities=[])
    empty.check_fits(run())
    only = write_cohort(run(), [0, 1], modalities=["MR", "MR"], name="only")
    only.check_fits(run(input={"modalities": ["CT"]}))


def test_a_cohort_without_the_column_is_read_and_does_not_serve_such_a_run(
    run: Any, make_spec: Any, write_cohort: Any
) -> None:
    plain = make_spec(input={"height": 8, "width": 8})
    path = write_cohort(plain, OWNERS, studies=STUDIES).path
    with closing(sqlite3.connect(path / INDEX_FILE)) as database:
        database.execute("ALTER TABLE image DROP COLUMN modality")
        database.execute("DELETE FROM meta WHERE key = 'modalities'")
        database.execute("UPDATE meta SET value = '3' WHERE key = 'format'")
        database.commit()
    cohort = Cohort.open(path)
    cohort.verify()
    cohort.check_fits(plain)
    assert set(cohort.modalities) == {""}
    with pytest.raises(CohortError, match=r"modalities were not asked for when it was made.*CT"):
        cohort.check_fits(run())
