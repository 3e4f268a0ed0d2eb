"""Calibration: probabilities that are borne out as often as they say, by one temperature.

Temperature scaling (Guo et al. 2017, arXiv:1706.04599): a model's logits are divided by T, which
changes how sure it is and never which class it holds for the likelier one. T is that of the least
cross-entropy on the *validation* part of the central cohort. The test part chooses nothing; it
only says what was gained. A binary and a multiclass task have one T, a multilabel task one for
each label.

The validation part has also chosen the best round, so that T is fitted on images for which the
model does a little better than on others. It is calibrated to the prevalence among those images,
and to no other.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator
from scipy.optimize import minimize_scalar
from scipy.special import logsumexp

from common.spec import RunSpec, Section
from common.tasks.estimates import Estimate
from common.tasks.metrics import Predictions, score

Floats = NDArray[np.float64]

LEAST_IMAGES, LEAST_OF_A_CLASS = 30, 5
COOLEST, HOTTEST = 0.05, 20.0
KINDS = ("binary", "multiclass", "multilabel")

_JUDGED = ("brier", "ece")
_TINY = 1e-30  # a probability that float32 rounds to zero still has a logarithm
_VALIDATION = "validation_"
_RESAMPLES = 500

Temperature = Annotated[float, Field(ge=COOLEST, le=HOTTEST)]


class Calibration(Section):
    """The temperatures of one model; ``calibration.json`` of a package.

    Attributes:
        format: of this file.
        kind: of the task.
        temperatures: one, or for a multilabel task one a label.
        images: of the validation part, that they were fitted on.
        patients: of how many patients.
        left: labels whose temperature is 1 because too few images have them, or have them not.
    """

    format: Literal[1] = 1
    kind: Literal["binary", "multiclass", "multilabel"]
    temperatures: Annotated[tuple[Temperature, ...], Field(min_length=1)]
    images: Annotated[int, Field(ge=LEAST_IMAGES)]
    patients: Annotated[int, Field(ge=1)]
    left: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _one_or_one_a_label(self) -> Self:
        if self.kind != "multilabel" and len(self.temperatures) != 1:
            raise ValueError(f"a {self.kind} task has one temperature, not {self.temperatures}")
        return self

    def problem_with(self, spec: RunSpec) -> str:
        """Why it is not of a model of this run; empty if it is."""
        labels = len(spec.task.classes) if self.kind == "multilabel" else 1
        if (self.kind, len(self.temperatures)) == (spec.task.kind, labels):
            return ""
        return (
            f"{len(self.temperatures)} temperatures of a {self.kind} task; the run's is "
            f"{spec.task.kind}"
        )

    def __call__(self, probabilities: NDArray[Any]) -> Floats:
        """Calibrated probabilities.

        Args:
            probabilities: (N, classes) as the task gives them; binary: 1 - p, then p.
        """
        heat = np.array(self.temperatures)
        scaled = _scaled(_choices(self.kind, probabilities), heat[:, None])
        return np.exp(scaled[..., 1] if self.kind == "multilabel" else scaled)


class Judged(NamedTuple):
    """Brier score and calibration error on the test part, with intervals by patient."""

    before: Mapping[str, Estimate]
    after: Mapping[str, Estimate]
    images: int

    def to_json(self) -> dict[str, Any]:
        """For a card."""
        return {
            "images": self.images,
            **{
                when: {name: found.to_json() for name, found in metrics.items()}
                for when, metrics in (("before", self.before), ("after", self.after))
            },
        }


@dataclass(frozen=True)
class Calibrated:
    """What became of a run's calibration.

    Attributes:
        calibration: None if there is none.
        why: why there is none, in a sentence; else how it was made.
        test: what it changes on the test part; None if there is none of both.
    """

    calibration: Calibration | None
    why: str
    test: Judged | None = None

    def to_json(self) -> dict[str, Any]:
        """For a card."""
        found = self.calibration
        return {
            "why": self.why,
            "temperatures": None if found is None else list(found.temperatures),
            "test": None if self.test is None else self.test.to_json(),
        }


def calibrate(spec: RunSpec, arrays: Mapping[str, NDArray[Any]]) -> Calibrated:
    """Fit a run's calibration on the validation part, and judge it on the test part.

    Args:
        spec: the run's.
        arrays: of its ``evaluation.npz``, as `server.evaluation` keeps them.
    """
    kind = spec.task.kind
    if kind not in KINDS or "probabilities" not in _names(arrays):
        return Calibrated(None, f"A task of {spec.task.name} has no probabilities to calibrate.")
    if f"{_VALIDATION}probabilities" not in arrays:
        return Calibrated(
            None,
            "Not calibrated: the run had no validation part, and the test part may choose nothing.",
        )
    found = _part(spec, arrays, _VALIDATION)
    fitted = fit(found, spec.task.classes)
    if isinstance(fitted, str):
        return Calibrated(None, f"Not calibrated: {fitted}.")
    left = f", but for {', '.join(fitted.left)}" if fitted.left else ""
    why = (
        f"By temperature, fitted on {fitted.images:,} images of the validation part{left}; "
        "it holds for their prevalence."
    )
    return Calibrated(fitted, why, _judge(spec, arrays, fitted))


def _names(arrays: Mapping[str, NDArray[Any]]) -> set[str]:
    """The names of evidence, whichever part it is of."""
    return {name.removeprefix(_VALIDATION) for name in arrays}


def fit(predictions: Predictions, classes: tuple[str, ...]) -> Calibration | str:
    """The calibration of a model by what it said of one part; or why there is none.

    Args:
        predictions: of the part.
        classes: their names.
    """
    kind, images = predictions.kind, len(predictions)
    if images < LEAST_IMAGES:
        return f"the validation part has {images} images, expected at least {LEAST_IMAGES}"
    if not np.isfinite(predictions.probabilities).all():
        return "the model's probabilities are not finite"
    right = _chosen(predictions)
    choices = _choices(kind, predictions.probabilities)
    if kind != "multilabel":
        counts = np.bincount(right[:, 0], minlength=choices.shape[-1])
        if (counts >= LEAST_OF_A_CLASS).sum() < 2:
            return f"fewer than two classes have {LEAST_OF_A_CLASS} images in the validation part"
        choices = choices[:, None]
    enough = [LEAST_OF_A_CLASS <= has.sum() <= images - LEAST_OF_A_CLASS for has in right.T]
    single = kind != "multilabel"
    if not single and not any(enough):
        return f"no label has {LEAST_OF_A_CLASS} images with it and as many without"
    heats = [
        _best(choices[:, label], right[:, label]) if single or enough[label] else 1.0
        for label in range(choices.shape[1])
    ]
    left = () if single else tuple(n for n, ok in zip(classes, enough, strict=True) if not ok)
    return Calibration(
        kind=kind,  # type: ignore[arg-type]  # checked by pydantic
        temperatures=tuple(heats),
        images=images,
        patients=len(np.unique(predictions.patients)),
        left=left,
    )


def _best(log_p: Floats, right: NDArray[np.int64]) -> float:
    """The temperature of the least cross-entropy, which is convex in 1 / T.

    Args:
        log_p: (N, choices).
        right: (N,) the true choice.
    """
    rows = np.arange(len(right))

    def cost(heat: float) -> float:
        return -float(_scaled(log_p, np.exp(heat))[rows, right].mean())

    ends = (math.log(COOLEST), math.log(HOTTEST))
    found = math.exp(minimize_scalar(cost, bounds=ends, method="bounded").x)
    return min(max(found, COOLEST), HOTTEST)


def _choices(kind: str, probabilities: NDArray[Any]) -> Floats:
    """(N, choices) logarithms, or (N, labels, 2) for a multilabel task: without it and with it."""
    values = probabilities.astype(np.float64)
    if kind == "multilabel":
        values = np.stack([1 - values, values], axis=-1)
    logarithms: Floats = np.log(np.clip(values, _TINY, 1))
    return logarithms


def _scaled(log_p: Floats, heat: float | Floats) -> Floats:
    logits = log_p / heat
    scaled: Floats = logits - logsumexp(logits, axis=-1, keepdims=True)
    return scaled


def _chosen(predictions: Predictions) -> NDArray[np.int64]:
    """(N, 1) the true class, or (N, labels) whether a label holds."""
    labels = predictions.labels.astype(np.int64)
    return labels if predictions.kind == "multilabel" else labels[:, None]


def _part(spec: RunSpec, arrays: Mapping[str, NDArray[Any]], prefix: str) -> Predictions:
    probabilities, labels, patients = (
        arrays[prefix + name] for name in ("probabilities", "labels", "patients")
    )
    return Predictions(spec.task.kind, probabilities, labels, patients, spec.evaluation.threshold)


def _judge(
    spec: RunSpec, arrays: Mapping[str, NDArray[Any]], calibration: Calibration
) -> Judged | None:
    """What the calibration changes on the test part; None without one."""
    if "probabilities" not in arrays:
        return None
    test = _part(spec, arrays, "")

    def judged(probabilities: NDArray[Any]) -> dict[str, Estimate]:
        seen = Predictions(test.kind, probabilities, test.labels, test.patients, test.threshold)
        found = score(seen, resamples=_RESAMPLES, generator=np.random.default_rng(spec.seed))
        return {name: found.metrics[name] for name in _JUDGED}

    after = calibration(test.probabilities)
    return Judged(judged(test.probabilities), judged(after), len(test))
