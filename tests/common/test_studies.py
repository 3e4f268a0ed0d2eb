"""Studies as rows: which images go together, which of them are seen, what a study's label is."""

from __future__ import annotations

import logging
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from common.cohort import Cohort
from common.errors import CohortError
from common.noise import Keystream
from common.spec import RunSpec
from common.studies import ABSENT, Studies, check, rows_for, spaced

# Two patients have a study of one name; the second patient's lies in two places of the file.
OWNERS = [1, 1, 1, 0, 0, 1, 2, 0, 2, 2, 2, 2]
NAMES = ["x", "x", "y", "x", "z", "x", "w", "x", "w", "w", "w", "w"]
IMAGES = [[3, 7], [4], [0, 1, 5], [2], [6, 8, 9, 10, 11]]
PATIENTS = [0, 0, 1, 1, 2]
MANY = {"kind": "multiclass", "classes": ["a", "b", "c"]}


@pytest.fixture
def study_spec(make_spec: Callable[..., RunSpec]) -> Callable[..., RunSpec]:
    def make(places: int = 3, **changes: Any) -> RunSpec:
        asked = {"images": places} if places > 1 else {}
        return make_spec(input={"height": 8, "width": 8} | asked, **changes)

    return make


@pytest.fixture
def studies(study_spec: Any, write_cohort: Any) -> Callable[..., Studies]:
    def make(
        places: int = 3,
        labels: list[Any] | None = None,
        splits: list[str] | None = None,
        **changes: Any,
    ) -> Studies:
        spec = study_spec(places, **changes)
        cohort = write_cohort(spec, OWNERS, studies=NAMES, labels=labels, splits=splits)
        return Studies(cohort, places)

    return make


def numbered(labels: dict[int, Any], other: Any = 0) -> list[Any]:
    return [labels.get(row, other) for row in range(len(OWNERS))]


def first_of_all(bounds: NDArray[np.int64]) -> NDArray[np.int64]:
    return np.zeros_like(bounds)


def test_a_row_is_a_study_of_one_patient(studies: Any) -> None:
    found = studies()
    assert len(found) == len(IMAGES)
    assert [found.images_of(study).tolist() for study in range(5)] == IMAGES
    assert found.patient_index.tolist() == PATIENTS
    assert [found.rows_of(patient).tolist() for patient in range(3)] == [[0, 1], [2, 3], [4]]
    assert found.row_shape == (3, *found.shape) == (3, 1, 8, 8)


def test_where_a_source_names_no_study_a_patient_has_one(study_spec: Any, write_cohort: Any):
    cohort = write_cohort(study_spec(), OWNERS, studies=[""] * len(OWNERS))
    assert [len(Studies(cohort, 3).images_of(study)) for study in range(3)] == [3, 4, 5]


def test_images_are_those_of_the_cohort_and_nothing_stands_where_there_is_none(studies: Any):
    found = studies()
    whole = Cohort.open(found.path)
    images = found.images([4, 1, 0])
    assert images.shape == (3, 3, 1, 8, 8)
    assert np.array_equal(images[0], whole.images([6, 9, 11]))  # evenly spaced of five
    assert np.array_equal(images[1, :1], whole.images([4]))
    assert np.array_equal(images[2, :2], whole.images([3, 7]))
    assert np.isnan(images[1, 1:]).all()
    assert np.isnan(images[2, 2:]).all()
    assert np.isfinite(images[0]).all()


def test_a_drawn_study_is_its_own_images_each_at_most_once(studies: Any) -> None:
    found, below = studies(), Keystream.seeded(1).below
    for _ in range(20):
        drawn = found.drawn(np.array([4, 0, 2]), below)
        assert drawn.shape == (3, 3)
        assert set(drawn[0]) <= set(IMAGES[4])
        assert drawn[0].tolist() == sorted(set(drawn[0]))
        assert drawn[1:].tolist() == [[3, 7, ABSENT], [0, 1, 5]]
    assert np.array_equal(found.images(drawn)[2], found.images([2])[0])
    assert found.targets(drawn).tolist() == found.targets([4, 0, 2]).tolist()


def test_every_choice_of_images_is_as_likely(studies: Any) -> None:
    found, below = studies(places=2), Keystream.seeded(2).below
    drawn = found.drawn(np.full(5000, 4), below)
    pairs, counts = np.unique(drawn, axis=0, return_counts=True)
    assert len(pairs) == 10
    chi = ((counts - 500) ** 2 / 500).sum()
    assert chi < 30  # of nine degrees of freedom: p = 0.0004
    biased = found.drawn(np.full(5000, 4), first_of_all)  # the negative control
    assert len(np.unique(biased, axis=0)) == 1


@pytest.mark.parametrize("count", range(1, 12))
@pytest.mark.parametrize("most", range(1, 6))
def test_evenly_spaced_is_from_the_first_to_the_last(count: int, most: int) -> None:
    found = spaced(count, most)
    assert len(found) == min(count, most)
    assert len(set(found)) == len(found)
    assert found.min() >= 0
    if most > 1:
        assert (found[0], found[-1]) == (0, count - 1)
        assert np.ptp(np.diff(found)) <= 1 if len(found) > 2 else True
    else:
        assert abs(found[0] - (count - 1) / 2) <= 0.5


# --- Labels --------------------------------------------------------------------------------------


def test_a_study_has_a_finding_if_one_of_its_images_has(studies: Any) -> None:
    assert studies(labels=numbered({5: 1, 9: 1})).labels.tolist() == [0, 0, 1, 0, 1]


def test_a_study_has_every_label_that_one_of_its_images_has(studies: Any) -> None:
    task = {"kind": "multilabel", "classes": ["a", "b", "c"]}
    many = studies(labels=numbered({5: (1, 0, 0), 1: (0, 0, 1)}, (0, 0, 0)), task=task)
    assert many.labels.tolist() == [[0, 0, 0], [0, 0, 0], [1, 0, 1], [0, 0, 0], [0, 0, 0]]
    assert many.labels.dtype == np.float32
    assert not len(many.contradictory)


def test_of_classes_of_which_one_is_right_most_images_decide_and_an_evaluation_refuses(
    studies: Any,
) -> None:
    labels = numbered({0: 2, 1: 2, 5: 1, 6: 1, 8: 1, 9: 2, 10: 2, 11: 0})
    found = studies(labels=labels, task=MANY)
    assert found.labels.tolist() == [0, 0, 2, 0, 1]  # the first of equals
    assert found.contradictory.tolist() == [2, 4]
    with pytest.raises(CohortError, match=r"2 of 5 studies .* p00001 has b and c; expected one"):
        check(found)


def test_studies_that_agree_pass(studies: Any) -> None:
    found = studies(labels=numbered({0: 2, 1: 2, 5: 2}), task=MANY)
    check(found)
    check(Cohort.open(found.path))
    assert found.labels.tolist() == [0, 0, 2, 0, 0]


def test_a_site_is_not_refused_for_its_patients_labels_but_told(
    studies: Any, study_spec: Any, caplog: Any
) -> None:
    """What a node answers must not depend on its cohort; its own log may."""
    cohort = Cohort.open(studies(labels=numbered({0: 2}), task=MANY).path)
    with caplog.at_level(logging.WARNING, logger="cloister.studies"):
        assert isinstance(rows_for(study_spec(task=MANY), cohort), Studies)
    assert "1 of 5 studies" in caplog.text


# --- Views ---------------------------------------------------------------------------------------


def test_a_run_of_single_images_takes_the_cohort_as_it_is(studies: Any, study_spec: Any) -> None:
    found = studies()
    cohort = Cohort.open(found.path)
    assert rows_for(study_spec(1), cohort) is cohort
    assert rows_for(study_spec(), found) is found
    assert cohort.drawn([3, 1], first_of_all).tolist() == [3, 1]
    assert cohort.row_shape == cohort.shape
    cohort.check_fits(study_spec())  # one cohort serves both


def test_a_view_of_patients_has_their_studies(studies: Any) -> None:
    found = studies()
    part = found.subset([1, 2])
    assert part.patients == found.patients[1:]
    assert len(part) == 3
    assert part.patient_index.tolist() == [0, 0, 1]
    assert np.array_equal(part.images([2, 0]), found.images([4, 2]))
    assert np.array_equal(part.labels, found.labels[2:])
    assert len(found.subset([])) == 0
    assert found.subset([]).images([]).shape == (0, 3, 1, 8, 8)


def test_a_view_of_a_part_keeps_studies_whole(studies: Any) -> None:
    splits = ["test" if owner == 2 else "train" for owner in OWNERS]
    found = studies(splits=splits)
    assert len(found.with_split("test")) == 1
    assert [len(found.with_split("train").images_of(s)) for s in range(4)] == [2, 1, 3, 1]


def test_a_pickle_opens_the_same_studies(studies: Any) -> None:
    found = studies().subset([0, 2])
    again = pickle.loads(pickle.dumps(found))  # noqa: S301 - our own
    assert repr(again) == repr(found)
    assert np.array_equal(again.images([2]), found.images([2]))
