from __future__ import annotations

import json
import re

import numpy as np
import pytest
from sklearn import metrics as sk

from common.spec import RunSpec
from common.tasks import task_for
from common.tasks.exhibits import Chart, Exhibit, Matrix, Table

CLASSES = {
    "binary": ("clear", "finding"),
    "multiclass": ("clear", "nodule", "effusion"),
    "multilabel": ("cardiomegaly", "nodule", "effusion"),
}
CURVES = ["Receiver operating curve", "Precision and recall", "Calibration"]


def make_spec(kind, threshold=0.5):
    return RunSpec.from_json(
        json.dumps(
            {
                "name": "shown",
                "rounds": 1,
                "task": {"kind": kind, "classes": CLASSES[kind]},
                "model": {"name": "small-cnn"},
                "input": {"height": 8, "width": 8},
                "optimizer": {"name": "sgd", "learning_rate": 0.1},
                "local": {"batch_size": 4},
                "privacy": {"mechanism": "none"},
                "evaluation": {"bootstrap": 20, "threshold": threshold},
            }
        )
    )


def answers(kind, images=120):
    rng = np.random.default_rng(3)
    classes = len(CLASSES[kind])
    if kind == "multilabel":
        labels = (rng.random((images, classes)) < 0.4).astype(np.float32)
        probabilities = 1 / (1 + np.exp(-2 * (labels - 0.5) - rng.normal(size=labels.shape)))
    else:
        labels = rng.integers(0, classes, images)
        powers = np.exp(np.eye(classes)[labels] + rng.normal(size=(images, classes)))
        probabilities = powers / powers.sum(axis=1, keepdims=True)
    return {"probabilities": probabilities.astype(np.float32), "labels": labels}


def exhibits(kind, evidence, threshold=0.5) -> list[Exhibit]:
    patients = np.arange(len(evidence["labels"])) // 2
    return list(task_for(make_spec(kind, threshold)).exhibits(evidence, patients))


def titles(shown):
    return [one.title for one in shown]


@pytest.mark.parametrize("threshold", [0.5, 0.7])
def test_decisions_of_a_binary_task_are_counted_and_read_out(threshold):
    evidence = answers("binary")
    matrix = exhibits("binary", evidence, threshold)[0]
    assert isinstance(matrix, Matrix)
    said = evidence["probabilities"][:, 1] > threshold
    assert (matrix.counts == sk.confusion_matrix(evidence["labels"], said)).all()
    assert matrix.names == CLASSES["binary"]
    assert f"threshold {threshold}" in matrix.title
    (clear, mistaken), (missed, found) = matrix.counts
    assert matrix.says == (
        f"Of {missed + found} images with “finding”, {found} are found. "
        f"Of {clear + mistaken} images without, {mistaken} are called so by mistake."
    )


def test_one_is_read_out_as_one():
    evidence = {"probabilities": np.array([[0.1, 0.9], [0.9, 0.1]]), "labels": np.array([1, 0])}
    matrix = exhibits("binary", evidence)[0]
    assert isinstance(matrix, Matrix)
    assert matrix.says == (
        "Of 1 image with “finding”, 1 is found. Of 1 image without, 0 are called so by mistake."
    )


def test_each_class_stands_for_itself():
    evidence = answers("multiclass")
    shown = exhibits("multiclass", evidence)
    assert titles(shown)[1:] == ["By class", *CURVES]
    assert isinstance(shown[0], Matrix)
    top = evidence["probabilities"].argmax(axis=1)
    assert (shown[0].counts == sk.confusion_matrix(evidence["labels"], top)).all()
    table = shown[1]
    assert isinstance(table, Table)
    for number, (name, images, auroc, *_) in enumerate(table.rows):
        truth = evidence["labels"] == number
        expected = sk.roc_auc_score(truth, evidence["probabilities"][:, number])
        assert (name, images) == (CLASSES["multiclass"][number], str(truth.sum()))
        value, low, high = map(float, re.findall(r"[0-9.]+", auroc))
        assert f"{value:.3f}" == f"{expected:.3f}"
        assert low < value < high


def test_labels_have_no_confusion_but_decisions_of_their_own():
    evidence = answers("multilabel")
    shown = exhibits("multilabel", evidence)
    assert titles(shown) == ["By class", *CURVES]
    table = shown[0]
    assert isinstance(table, Table)
    assert [*table.head] == ["Class", "Images", "AUROC", "AUPRC", "Sensitivity", "Specificity"]
    assert "95 % intervals" in table.note
    for number, row in enumerate(table.rows):
        truth = evidence["labels"][:, number]
        said = evidence["probabilities"][:, number] > 0.5
        assert row[4].startswith(f"{sk.recall_score(truth, said):.3f} (")
        assert row[5].startswith(f"{sk.recall_score(1 - truth, ~said):.3f} (")


def test_the_curves_are_those_of_the_predictions():
    evidence = answers("binary")
    roc, recall, calibration = exhibits("binary", evidence)[1:]
    scores, labels = evidence["probabilities"][:, 1], evidence["labels"]
    assert isinstance(roc, Chart)
    assert isinstance(recall, Chart)
    assert isinstance(calibration, Chart)
    x, y, _ = sk.roc_curve(labels, scores, drop_intermediate=False)
    assert roc.lines[0].x == pytest.approx(x)
    assert roc.lines[0].y == pytest.approx(y)
    at = np.interp(0.1, x, y)
    assert f"at a false positive rate of 0.1 the sensitivity is {at:.2f}" in roc.says
    assert recall.level == pytest.approx(labels.mean())
    assert recall.lines[0].steps
    assert roc.diagonal
    assert calibration.diagonal
    assert not recall.diagonal
    assert calibration.bars is not None
    assert calibration.bars.counts.sum() == len(labels)
    assert calibration.lines[0].marks


@pytest.mark.parametrize("kind", ["multiclass", "multilabel"])
def test_there_is_a_curve_for_each_class_and_no_one_chance(kind):
    roc, recall, calibration = exhibits(kind, answers(kind))[-3:]
    assert isinstance(roc, Chart)
    assert isinstance(recall, Chart)
    assert isinstance(calibration, Chart)
    assert tuple(line.name for line in roc.lines) == CLASSES[kind]
    assert all(f"{name}: at a recall" in recall.says for name in CLASSES[kind])
    assert recall.level is None
    assert len(calibration.lines) == 1


def test_without_both_classes_there_is_no_curve():
    evidence = answers("binary")
    evidence["labels"] = np.zeros_like(evidence["labels"])
    assert len(exhibits("binary", evidence)) == 1


@pytest.mark.parametrize("kind", CLASSES)
def test_a_network_gone_to_nan_is_shown_by_its_decisions_alone(kind):
    evidence = answers(kind)
    evidence["probabilities"][5] = np.nan
    assert all(isinstance(one, Matrix) for one in exhibits(kind, evidence))
