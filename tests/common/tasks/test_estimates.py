"""Means and quotients by patient, against rows that are really resampled."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from common.tasks.estimates import Estimate, estimates, means, patient_weights, ratios

IMAGES, PATIENTS = 60, 11
RESAMPLES = 400


def generator(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


@pytest.fixture
def patients() -> NDArray[np.int64]:
    """Of very different numbers of images; their numbers are neither dense nor in order."""
    shares = np.arange(1, PATIENTS + 1) / sum(range(1, PATIENTS + 1))
    names = np.arange(PATIENTS) * 7 + 3
    more = generator(1).choice(names, IMAGES - PATIENTS, p=shares)
    return generator(9).permutation(np.concatenate([names, more]))


@pytest.fixture
def figures(patients: NDArray[np.int64]) -> NDArray[np.float64]:
    """A figure an image, much alike within a patient."""
    return patients / 10 + generator(2).normal(0, 0.5, IMAGES)


def resampled(patients: NDArray[np.int64], source: np.random.Generator) -> list[NDArray[np.int64]]:
    """Row numbers of each resample: its patients are drawn, and all their rows repeated."""
    names = np.unique(patients)
    drawn = source.integers(0, len(names), size=(RESAMPLES, len(names)))
    return [
        np.concatenate([np.flatnonzero(patients == names[number]) for number in row])
        for row in drawn
    ]


def slow(statistic: Any, patients: NDArray[np.int64]) -> tuple[float, float]:
    values = np.array([statistic(rows) for rows in resampled(patients, generator(5))])
    low, high = np.percentile(values[np.isfinite(values)], (2.5, 97.5))
    return float(low), float(high)


def test_a_mean_and_its_interval_are_those_of_resampled_patients(
    patients: NDArray[np.int64], figures: NDArray[np.float64]
):
    found = means({"x": figures}, patients, resamples=RESAMPLES, generator=generator(5))["x"]
    assert found.value == pytest.approx(figures.mean())
    low, high = slow(lambda rows: figures[rows].mean(), patients)
    assert (found.low, found.high) == pytest.approx((low, high))

    alone = np.arange(IMAGES)  # the negative control: images resampled one by one
    narrow = means({"x": figures}, alone, resamples=RESAMPLES, generator=generator(5))["x"]
    assert narrow.low is not None
    assert narrow.high is not None
    assert narrow.high - narrow.low < 0.7 * (high - low)


def test_an_image_without_a_figure_does_not_count(
    patients: NDArray[np.int64], figures: NDArray[np.float64]
):
    figures[::3] = np.nan
    found = means({"x": figures}, patients, resamples=RESAMPLES, generator=generator(5))["x"]
    assert found.value == pytest.approx(np.nanmean(figures))
    expected = slow(lambda rows: np.nanmean(figures[rows]), patients)
    assert (found.low, found.high) == pytest.approx(expected)


def test_a_quotient_is_of_sums_and_not_the_mean_of_quotients(patients: NDArray[np.int64]):
    objects = generator(3).integers(0, 6, IMAGES)
    hits = generator(4).binomial(objects, 0.6)
    parts = {"recall": (hits, objects)}
    found = ratios(parts, patients, resamples=RESAMPLES, generator=generator(5))["recall"]
    assert found.value == pytest.approx(hits.sum() / objects.sum())
    expected = slow(lambda rows: hits[rows].sum() / objects[rows].sum(), patients)
    assert (found.low, found.high) == pytest.approx(expected)
    by_image = (hits[objects > 0] / objects[objects > 0]).mean()
    assert abs(by_image - hits.sum() / objects.sum()) > 1e-3


def test_all_figures_see_the_same_resamples(
    patients: NDArray[np.int64], figures: NDArray[np.float64]
):
    rows = {"one": figures, "other": -figures, "again": figures}
    found = means(rows, patients, resamples=50, generator=generator())
    assert found["one"] == found["again"]
    one, other = found["one"], found["other"]
    assert one.low == pytest.approx(-(other.high or 0.0))
    assert one.high == pytest.approx(-(other.low or 0.0))


@pytest.mark.parametrize(
    ("figures", "value"),
    [
        (np.full(4, np.nan), None),
        (np.array([1.0, np.inf, 2.0, 3.0]), None),
        (np.array([]), None),
        (np.array([1.0, np.nan, np.nan, 2.0]), 1.5),
    ],
)
def test_what_has_no_meaning_is_none(figures: NDArray[np.float64], value: float | None):
    numbers = np.arange(len(figures))
    found = means({"x": figures}, numbers, resamples=20, generator=generator())["x"]
    assert found.value == value
    assert (found == Estimate(None)) == (value is None)


@pytest.mark.parametrize(("resamples", "names"), [(0, [1, 2, 3]), (50, [1, 1, 1])])
def test_no_interval_without_resamples_or_with_one_patient(resamples: int, names: list[int]):
    rows = {"x": np.array([1.0, 2.0, 6.0])}
    found = means(rows, np.array(names), resamples=resamples, generator=generator())["x"]
    assert found == Estimate(3.0)


def test_a_resample_without_meaning_is_left_out_of_the_interval():
    parts = {"x": (np.array([0, 1, 0, 0]), np.array([0, 2, 0, 0]))}  # one image has objects
    found = ratios(parts, np.arange(4), resamples=100, generator=generator())["x"]
    assert found == Estimate(0.5, 0.5, 0.5)


def test_intervals_do_not_depend_on_how_many_are_computed_together(
    patients: NDArray[np.int64], figures: NDArray[np.float64], monkeypatch: pytest.MonkeyPatch
):
    whole = means({"x": figures}, patients, resamples=64, generator=generator())
    monkeypatch.setattr("common.tasks.estimates._CHUNK", 7 * IMAGES)
    parts = means({"x": figures}, patients, resamples=64, generator=generator())
    assert parts["x"].low == pytest.approx(whole["x"].low, rel=1e-12)
    assert parts["x"].value == whole["x"].value


def test_any_statistic_of_weights_can_be_estimated(patients: NDArray[np.int64]):
    """Here the number of different patients in a resample."""
    first = np.unique(patients, return_index=True)[1]
    found = estimates(
        lambda weights: {"n": (weights[:, first] > 0).sum(axis=1).astype(np.float64)},
        patients,
        resamples=500,
        generator=generator(),
    )["n"]
    assert found.value == PATIENTS
    expected = PATIENTS * (1 - (1 - 1 / PATIENTS) ** PATIENTS)
    assert (found.low or 0) < expected < (found.high or 0) < PATIENTS


def test_a_patients_images_have_one_weight(patients: NDArray[np.int64]):
    weights = patient_weights(patients, 30, generator())
    for name in np.unique(patients):
        assert (np.ptp(weights[:, patients == name], axis=1) == 0).all()
    first = np.unique(patients, return_index=True)[1]
    assert (weights[:, first].sum(axis=1) == PATIENTS).all()
