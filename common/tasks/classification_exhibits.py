"""What a report shows of a classification: confusion, each class, and three curves."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common.spec import RunSpec
from common.tasks import curves, pictures, words
from common.tasks.curves import GRID, Column, Curve
from common.tasks.exhibits import Bars, Chart, Exhibit, Gallery, Line, Matrix, Table
from common.tasks.metrics import Predictions, confusion_matrix, score

_MOST_COLUMNS = 24
_BAR = 12  # pixels
_READING = (
    "Shaded and barred: 95 % pointwise, by resampling. Dotted: chance, or perfect calibration. "
    "Grey bars: how many have such a probability."
)


def exhibits(predictions: Predictions, spec: RunSpec) -> list[Exhibit]:
    """The confusion matrix and the curves; each class for itself where there are several."""
    return [
        *_confusion(predictions, spec),
        *_by_class(predictions, spec),
        *_charts(predictions, spec),
    ]


def _columns(predictions: Predictions, spec: RunSpec) -> Iterator[tuple[str, Column]]:
    names = ("",) if predictions.kind == "binary" else spec.task.classes
    p = predictions
    for name, scores, truths in zip(names, p.scores.T, p.truths.T, strict=True):
        yield name, Column(scores, truths, p.patients, spec.seed)


# --- Decisions --------------------------------------------------------------------------------


def _confusion(predictions: Predictions, spec: RunSpec) -> Iterator[Matrix]:
    """Nothing where labels do not exclude each other."""
    if predictions.kind == "multilabel":
        return
    counts = confusion_matrix(predictions)
    binary = predictions.kind == "binary"
    how = f"threshold {predictions.threshold}" if binary else "most probable class"
    says = _reading(counts.tolist(), spec) if binary else ""
    rows = words.plural(spec.input.row_name).capitalize()
    yield Matrix(f"{rows} of the test part, {how}", spec.task.classes, counts, says)


def _reading(counts: Sequence[Sequence[int]], spec: RunSpec) -> str:
    (clear, mistaken), (missed, found) = counts
    name, finding = spec.input.row_name, spec.task.classes[1]
    return (
        f"Of {words.counted(missed + found, name)} with “{finding}”, {found} "
        f"{'is' if found == 1 else 'are'} found. Of {words.counted(clear + mistaken, name)} "
        f"without, {mistaken} {'is' if mistaken == 1 else 'are'} called so by mistake."
    )


def _by_class(predictions: Predictions, spec: RunSpec) -> Iterator[Table]:
    if predictions.kind == "binary" or not predictions.finite:
        return
    labels = predictions.kind == "multilabel"
    shown = ("auroc", "auprc", *(("sensitivity", "specificity") if labels else ()))
    titles = [spec.task.METRICS[name].title for name in shown]
    yield Table(
        "By class",
        (
            "Class",
            words.plural(spec.input.row_name).capitalize(),
            *titles,
        ),
        [
            (name, str(int(column.truths.sum())), *_figures(column, spec, shown))
            for name, column in _columns(predictions, spec)
        ],
        f"Each label for itself, threshold {predictions.threshold}, with 95 % intervals."
        if labels
        else "Each class against the rest, with 95 % intervals.",
    )


def _figures(column: Column, spec: RunSpec, shown: Sequence[str]) -> Iterator[str]:
    both = np.stack([1 - column.scores, column.scores], axis=1)
    labels, settings = column.truths.astype(np.int64), spec.evaluation
    alone = Predictions("binary", both, labels, column.patients, settings.threshold)
    generator = np.random.default_rng(spec.seed)
    found = score(alone, resamples=settings.bootstrap, generator=generator).metrics
    for name in shown:
        yield words.estimate(found[name])


# --- Curves -----------------------------------------------------------------------------------


def _charts(predictions: Predictions, spec: RunSpec) -> Iterator[Chart]:
    drawn = [(name, c) for name, c in _columns(predictions, spec) if c.drawable][:_MOST_COLUMNS]
    if drawn:
        yield _roc([_Named(name, curves.roc(c)) for name, c in drawn])
        chance = drawn[0][1].prevalence if len(drawn) == 1 else None
        yield _recall([_Named(name, curves.precision_recall(c)) for name, c in drawn], chance)
        yield _calibration(predictions, spec)


@dataclass(frozen=True)
class _Named:
    """A curve and what it is of; the empty name where there is only one."""

    name: str
    curve: Curve

    def line(self, *, steps: bool) -> Line:
        curve = self.curve
        return Line(self.name, curve.x, curve.y, curve.low, curve.high, GRID, steps)


def _roc(named: Sequence[_Named]) -> Chart:
    places = (0.05, 0.1, 0.2)
    points = _points_in_words(named, "at a false positive rate of", "the sensitivity is", places)
    return Chart(
        "Receiver operating curve",
        "1 − specificity",
        "sensitivity",
        [one.line(steps=False) for one in named],
        f"Receiver operating curve: {points}",
        unit_square=True,
        diagonal=True,
        note=_READING,
    )


def _recall(named: Sequence[_Named], chance: float | None) -> Chart:
    points = _points_in_words(named, "at a recall of", "the precision is", (0.5, 0.8, 0.95))
    return Chart(
        "Precision and recall",
        "recall (sensitivity)",
        "precision",
        [one.line(steps=True) for one in named],
        f"Precision-recall curve: {points}",
        unit_square=True,
        level=chance,
        note=_READING,
    )


def _calibration(predictions: Predictions, spec: RunSpec) -> Chart:
    """The reliability diagram; the labels of a multilabel task are taken together."""
    confidences, outcomes = predictions.calibrated
    patients = np.repeat(predictions.patients, confidences.shape[1])
    found = curves.calibration(Column(confidences.ravel(), outcomes.ravel(), patients, spec.seed))
    at, held = found.confidence, found.frequency
    triples = zip(at, held, found.images, strict=True)
    bins = "; ".join(
        f"{c:.2f} predicted, {f:.2f} observed, {words.counted(n, spec.input.row_name)}"
        for c, f, n in triples
    )
    return Chart(
        "Calibration",
        "predicted probability",
        "observed frequency",
        [Line("", at, held, found.low, found.high, marks=True)],
        f"Reliability diagram, by bin: {bins}.",
        unit_square=True,
        diagonal=True,
        bars=Bars(at, found.images),
        note=_READING,
    )


def _points_in_words(named: Sequence[_Named], at: str, reads: str, places: Sequence[float]) -> str:
    said = []
    for one in named:
        values = np.interp(places, one.curve.x, one.curve.y)
        pairs = (f"{at} {p:g} {reads} {v:.2f}" for p, v in zip(places, values, strict=True))
        said.append((f"{one.name}: " if one.name else "") + ", ".join(pairs))
    return "; ".join(said) + "."


# --- Studies ----------------------------------------------------------------------------------


def studies(evidence: Mapping[str, NDArray[Any]], spec: RunSpec) -> Gallery:
    """Some studies, image by image, each above a bar as long as its weight in the decision."""
    drawn, captions = [], []
    each = (evidence[f"gallery_{name}"] for name in ("rows", "studies", "weights"))
    for row, images, weights in zip(*each, strict=True):
        drawn.append(pictures.beside([_weighed(*one) for one in zip(images, weights, strict=True)]))
        captions.append(f"{_found(evidence, int(row), spec)}; {_weights(weights, spec)}")
    of_all = "all of a modality" if spec.input.modalities else f"all of a {spec.input.row_name}"
    rows = words.plural(spec.input.row_name)
    return Gallery(
        f"{rows.capitalize()}, and what their images weighed",
        np.stack(drawn),
        captions,
        f"{rows.capitalize()} of the test part, image beside image.",
        note=f"Orange: the weight of an image in the decision; {of_all} add up to 1. "
        "A place that stays white had no image. A weight says where the network looked, not why.",
    )


def _weights(weights: NDArray[Any], spec: RunSpec) -> str:
    """``weights 0.40, 0.60``; of modalities ``CT 0.40, 0.60; MR absent``."""
    names = spec.input.modalities or ("weights",)
    said = []
    for name, part in zip(names, np.split(weights, len(names)), strict=True):
        shown = ", ".join(f"{weight:.2f}" for weight in part[~np.isnan(part)])
        said.append(f"{name} {shown or 'absent'}")
    return "; ".join(said)


def _weighed(levels: pictures.Pixels, weight: float) -> pictures.Pixels:
    """An image and a bar beneath it; white where there is none."""
    picture = pictures.canvas(levels)
    below = np.full((_BAR, picture.shape[1], 3), 255, dtype=np.uint8)
    if np.isnan(weight):
        picture = np.full_like(picture, 255)
    else:
        below[_BAR // 3 :, : round(weight * picture.shape[1])] = pictures.FOUND
    return np.concatenate([picture, below])


def _found(evidence: Mapping[str, NDArray[Any]], row: int, spec: RunSpec) -> str:
    """What is true of a study, and how probable its likeliest class is."""
    classes, label = np.array(spec.task.classes), evidence["labels"][row]
    likely = evidence["probabilities"][row]
    true = ", ".join(classes[label > 0]) if np.ndim(label) else str(classes[label])
    number = int(likely.argmax())
    return f"true: {true or 'none'}; {classes[number]} {likely[number]:.2f}"
