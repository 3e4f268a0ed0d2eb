from __future__ import annotations

import numpy as np
import pytest
from sklearn import calibration as sk_calibration
from sklearn import metrics as sk

from common.tasks.curves import GRID, Column, calibration, precision_recall, roc


def make(images=300, patients=150, decimals=None):
    rng = np.random.default_rng(2)
    truths = rng.random(images) < 0.4
    scores = 1 / (1 + np.exp(-rng.normal(1.5 * truths - 0.75, 1)))
    scores = scores if decimals is None else scores.round(decimals)
    return Column(scores.astype(np.float32), truths, rng.integers(0, patients, images), 1)


@pytest.mark.parametrize("decimals", [None, 1])
def test_roc_is_scikit_learns(decimals):
    column = make(decimals=decimals)
    x, y, _ = sk.roc_curve(column.truths, column.scores, drop_intermediate=False)
    curve = roc(column)
    assert curve.x == pytest.approx(x)
    assert curve.y == pytest.approx(y)


@pytest.mark.parametrize("decimals", [None, 1])
def test_precision_recall_is_scikit_learns(decimals):
    column = make(decimals=decimals)
    precision, recall, _ = sk.precision_recall_curve(column.truths, column.scores)
    curve = precision_recall(column)
    kept = len(curve.x) if curve.x[-1] < 1 else int(np.argmax(curve.x == 1)) + 1
    assert curve.x[:kept] == pytest.approx(recall[-2::-1][:kept])
    assert curve.y[:kept] == pytest.approx(precision[-2::-1][:kept])


@pytest.mark.parametrize("draw", [roc, precision_recall])
def test_the_band_is_around_the_curve_and_narrows_with_more_patients(draw):
    def width(column):
        curve = draw(column)
        inner = slice(10, 91)
        assert (curve.low <= curve.high).all()
        exact = np.interp(GRID, curve.x, curve.y)[inner]
        inside = (curve.low[inner] - 0.02 <= exact) & (exact <= curve.high[inner] + 0.02)
        assert inside.mean() > 0.95
        return float((curve.high - curve.low)[inner].mean())

    assert width(make(3000, 3000)) < 0.6 * width(make(300, 300))
    # The control: patients of ten images each know less than as many images of their own.
    assert width(make(3000, 300)) > 0.9 * width(make(3000, 3000))


def test_calibration_is_scikit_learns():
    column = make()
    frequency, confidence = sk_calibration.calibration_curve(
        column.truths, column.scores, n_bins=10
    )
    found = calibration(column)
    assert found.frequency == pytest.approx(frequency)
    assert found.confidence == pytest.approx(confidence, abs=1e-6)
    assert found.images.sum() == 300
    assert (found.low <= found.frequency).all()
    assert (found.frequency <= found.high).all()


def test_a_probability_of_one_is_in_the_last_bin():
    scores = np.array([1.0, 0.95, 0.05], np.float32)
    found = calibration(Column(scores, np.array([True, True, False]), np.arange(3), 0))
    assert found.images.tolist() == [1, 2]


@pytest.mark.parametrize(
    ("scores", "truths"),
    [([0.1, 0.2], [True, True]), ([0.1, 0.2], [False, False]), ([0.1, np.nan], [True, False])],
)
def test_what_cannot_be_drawn_says_so(scores, truths):
    column = Column(np.array(scores, np.float32), np.array(truths), np.arange(2), 0)
    assert not column.drawable
