from __future__ import annotations

import json
import time
import warnings

import numpy as np
import pytest
from sklearn import metrics as sk

from common.tasks.estimates import Estimate, patient_weights
from common.tasks.metrics import (
    NAMES,
    Predictions,
    auroc,
    average_precision,
    confusion_matrix,
    point_estimates,
    ranking,
    score,
    weighted_metrics,
)

KINDS = ("binary", "multiclass", "multilabel")


def make(kind, *, images=120, patients=70, ties=False):
    """Predictions better than chance; with `ties` most scores have an equal."""
    rng = np.random.default_rng(0)
    classes = {"binary": 2, "multiclass": 3, "multilabel": 4}[kind]
    labels = rng.integers(0, classes, images)
    if kind == "multilabel":
        labels = rng.integers(0, 2, (images, classes)).astype(np.float32)
        logits = rng.normal(size=labels.shape) + 1.3 * labels
        probabilities = 1 / (1 + np.exp(-logits))
    else:
        logits = rng.normal(size=(images, classes))
        logits[np.arange(images), labels] += 1.3
        probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    if ties:
        probabilities = np.round(probabilities * 8) / 8
    if kind == "binary":
        probabilities[:, 0] = 1 - probabilities[:, 1]
    who = rng.integers(0, patients, images)
    return Predictions(kind, probabilities.astype(np.float32), labels, who, threshold=0.4)


def rows(predictions, index):
    """The predictions of the rows `index`, repeated as they stand in it."""
    p = predictions
    parts = (p.probabilities[index], p.labels[index], p.patients[index])
    return Predictions(p.kind, *parts, p.threshold)


def interval(found, name="auroc"):
    """The interval of a metric that has one."""
    estimate = found.metrics[name]
    assert estimate.low is not None
    assert estimate.high is not None
    return estimate.low, estimate.high


def scikit(predictions):
    """The same metrics by scikit-learn, on predictions in which every class is there."""
    truths, scores = predictions.truths.astype(int), predictions.scores
    decisions = predictions.decisions.astype(int)
    columns = list(zip(truths.T, scores.T, decisions.T, strict=True))

    def mean(metric):
        return np.mean([metric(t, s, d) for t, s, d in columns])

    right = (truths == decisions).all(axis=1) if predictions.kind == "multiclass" else None
    brier = mean(lambda t, s, _: sk.brier_score_loss(t, s, pos_label=1))
    return {
        "auroc": mean(lambda t, s, _: sk.roc_auc_score(t, s)),
        "auprc": mean(lambda t, s, _: sk.average_precision_score(t, s)),
        "accuracy": (truths == decisions).mean() if right is None else right.mean(),
        "sensitivity": mean(lambda t, _, d: sk.recall_score(t, d)),
        "specificity": mean(lambda t, _, d: sk.recall_score(t, d, pos_label=0)),
        "f1": mean(lambda t, _, d: sk.f1_score(t, d)),
        "brier": brier * (len(columns) if predictions.kind == "multiclass" else 1),
    }


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ties", [False, True])
def test_point_estimates_are_scikit_learns(kind, ties):
    predictions = make(kind, ties=ties)
    ours = point_estimates(predictions)
    assert set(ours) == set(NAMES)
    for name, value in scikit(predictions).items():
        assert ours[name] == pytest.approx(value, abs=1e-5), name


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ties", [False, True])
def test_weighted_formulas_agree_with_rows_that_are_really_resampled(kind, ties):
    predictions = make(kind, ties=ties)
    weights = patient_weights(predictions.patients, 12, np.random.default_rng(3))
    fast = weighted_metrics(predictions, weights)
    for replicate, row in enumerate(weights.astype(int)):
        slow = point_estimates(rows(predictions, np.repeat(np.arange(len(row)), row)))
        for name in NAMES:
            assert fast[name][replicate] == pytest.approx(slow[name], abs=1e-5), name


def test_ties_that_are_broken_would_be_noticed():
    # The control: a hair's breadth between equal scores, in favour of the positives.
    predictions = make("binary", ties=True)
    broken = predictions.scores[:, 0] + 1e-4 * predictions.truths[:, 0]
    weights = np.ones((1, len(predictions)))
    curve = ranking(broken, predictions.truths[:, 0], weights)
    right = scikit(predictions)
    assert auroc(curve)[0] > right["auroc"] + 0.01
    assert average_precision(curve)[0] > right["auprc"] + 0.01


@pytest.mark.parametrize("kind", KINDS)
def test_weights_of_one_give_the_point_estimates(kind):
    predictions = make(kind)
    ones = weighted_metrics(predictions, np.ones((2, len(predictions))))
    for name, value in point_estimates(predictions).items():
        assert ones[name] == pytest.approx([value, value], abs=1e-5), name


def test_a_confidence_of_exactly_zero_or_one_is_binned_as_torchmetrics_does():
    probabilities = np.array([[1, 0], [0, 1], [0.5, 0.5], [0, 1], [0.1, 0.9]], np.float32)
    predictions = Predictions("binary", probabilities, np.array([0, 0, 1, 1, 1]), np.arange(5))
    weights = np.array([[1.0, 2, 0, 1, 1]])
    resampled = rows(predictions, np.array([0, 1, 1, 3, 4]))
    slow = point_estimates(resampled)["ece"]
    assert weighted_metrics(predictions, weights)["ece"][0] == pytest.approx(slow, abs=1e-6)


def test_the_images_of_one_patient_are_drawn_together():
    patients = np.array([7, 3, 7, 3, 3, 9])
    weights = patient_weights(patients, 400, np.random.default_rng(0))
    assert (weights[:, 0] == weights[:, 2]).all()
    assert (weights[:, [1]] == weights[:, [3, 4]]).all()
    drawn = weights[:, [0, 1, 5]]
    assert (drawn.sum(axis=1) == 3).all()
    assert drawn.mean(axis=0) == pytest.approx([1, 1, 1], abs=0.12)
    assert (drawn[:, 0] != drawn[:, 1]).any()


def test_an_image_told_three_times_makes_no_interval_narrower():
    single = make("binary", images=80, patients=10**9)
    thrice = np.repeat(np.arange(80), 3)
    together = rows(single, thrice)
    apart = Predictions("binary", together.probabilities, together.labels, np.arange(240))

    def width(predictions):
        found = score(predictions, resamples=600, generator=np.random.default_rng(1))
        low, high = interval(found)
        return high - low

    assert width(together) == pytest.approx(width(single), rel=0.15)
    assert width(apart) < 0.7 * width(single)  # the control: patients taken for independent


def test_the_interval_covers_the_truth_about_as_often_as_it_says():
    # AUROC of two normals one deviation apart is Phi(1 / sqrt 2) = 0.7602.
    rng = np.random.default_rng(5)
    covered = []
    for _ in range(120):
        labels = rng.integers(0, 2, 150)
        scores = 1 / (1 + np.exp(-rng.normal(labels, 1)))
        drawn = Predictions("binary", np.stack([1 - scores, scores], 1), labels, np.arange(150))
        low, high = interval(score(drawn, resamples=200, generator=rng))
        covered.append(low <= 0.7602 <= high)
    assert 0.88 <= np.mean(covered) <= 0.995


@pytest.mark.parametrize("truth", [0, 1])
def test_one_class_only_gives_null_and_no_crash(truth):
    probabilities = np.array([[0.2, 0.8], [0.6, 0.4], [0.9, 0.1]], np.float32)
    one = Predictions("binary", probabilities, np.full(3, truth), np.arange(3))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = score(one, resamples=50, generator=np.random.default_rng(0)).metrics
    assert found["auroc"] == Estimate(None, None, None)
    assert found["specificity" if truth else "sensitivity"] == Estimate(None)
    assert found["accuracy"].value == pytest.approx(1 / 3 if truth else 2 / 3)
    assert "NaN" not in json.dumps({k: e.to_json() for k, e in found.items()}, allow_nan=False)


def test_a_class_that_is_absent_is_left_out_of_the_mean():
    predictions = make("multiclass")
    kept = np.flatnonzero(predictions.labels != 2)
    found = point_estimates(rows(predictions, kept))
    truths, scores = predictions.truths[kept], predictions.scores[kept]
    expected = np.mean([sk.roc_auc_score(truths[:, c], scores[:, c]) for c in (0, 1)])
    assert found["auroc"] == pytest.approx(expected, abs=1e-5)


def test_resamples_without_a_class_are_left_out_of_the_interval():
    probabilities = np.linspace(0, 1, 6, dtype=np.float32)
    labels = np.array([0, 0, 1, 0, 0, 0])
    pairs = np.stack([1 - probabilities, probabilities], axis=1)
    one = Predictions("binary", pairs, labels, np.arange(6))  # a third of the resamples lack it
    low, high = interval(score(one, resamples=300, generator=np.random.default_rng(0)))
    assert 0 <= low < high <= 1


@pytest.mark.parametrize("kind", KINDS)
def test_no_images_give_null(kind):
    empty = rows(make(kind), np.empty(0, np.int64))
    found = score(empty, resamples=10, generator=np.random.default_rng(0))
    assert all(estimate == Estimate(None) for estimate in found.metrics.values())
    assert found.confusion.sum() == 0


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_that_went_to_nan_gives_null(kind):
    predictions = make(kind)
    predictions.probabilities[3] = np.nan
    found = score(predictions, resamples=10, generator=np.random.default_rng(0))
    assert all(estimate == Estimate(None) for estimate in found.metrics.values())


@pytest.mark.parametrize(
    ("resamples", "generator", "patients"),
    [(0, np.random.default_rng(0), 9), (50, None, 9), (50, np.random.default_rng(0), 1)],
)
def test_no_bootstrap_no_interval(resamples, generator, patients):
    predictions = make("binary", patients=patients)
    found = score(predictions, resamples=resamples, generator=generator).metrics
    assert all(e.value is not None and e.low is None and e.high is None for e in found.values())


def test_the_same_generator_gives_the_same_intervals():
    first, again = (
        score(make("binary"), resamples=50, generator=np.random.default_rng(4)) for _ in range(2)
    )
    assert first.metrics == again.metrics


def test_intervals_do_not_depend_on_how_many_are_computed_together(monkeypatch):
    whole = score(make("binary"), resamples=64, generator=np.random.default_rng(4))
    monkeypatch.setattr("common.tasks.estimates._CHUNK", 16 * 120)
    parts = score(make("binary"), resamples=64, generator=np.random.default_rng(4))
    assert parts.metrics == whole.metrics


def test_confusion_has_the_truth_in_rows():
    probabilities = np.array([[0.9, 0.1], [0.2, 0.8], [0.3, 0.7], [0.8, 0.2]], np.float32)
    predictions = Predictions("binary", probabilities, np.array([0, 0, 1, 1]), np.arange(4))
    assert confusion_matrix(predictions).tolist() == [[1, 1], [1, 1]]
    only = rows(predictions, np.array([1]))
    assert confusion_matrix(only).tolist() == [[0, 1], [0, 0]]


@pytest.mark.parametrize("kind", KINDS)
def test_confusion_is_scikit_learns(kind):
    predictions = make(kind, ties=True)
    if kind == "multilabel":
        expected = sk.multilabel_confusion_matrix(predictions.truths, predictions.decisions)
    elif kind == "multiclass":
        expected = sk.confusion_matrix(predictions.labels, predictions.decisions.argmax(axis=1))
    else:
        expected = sk.confusion_matrix(predictions.labels, predictions.decisions[:, 0])
    assert (confusion_matrix(predictions) == expected).all()


def test_a_probability_at_the_threshold_is_no_positive():
    probabilities = np.array([[0.5, 0.5], [0.4, 0.6]], np.float32)
    predictions = Predictions("binary", probabilities, np.array([1, 1]), np.arange(2))
    assert predictions.decisions[:, 0].tolist() == [False, True]


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"probabilities have shape \(3, 2\), expected \(4"):
        Predictions("binary", np.zeros((3, 2)), np.zeros(4, int), np.arange(4))
    with pytest.raises(ValueError, match=r"labels have shape \(4, 1\), expected \(4,\)"):
        Predictions("binary", np.zeros((4, 2)), np.zeros((4, 1), int), np.arange(4))


def test_fast_enough_for_every_round():
    predictions = make("binary", images=1000, patients=800)
    rng = np.random.default_rng(0)
    score(predictions, resamples=500, generator=rng)
    start = time.process_time()
    score(predictions, resamples=500, generator=rng)
    assert time.process_time() - start < 0.3
