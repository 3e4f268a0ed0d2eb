"""The central evaluation: what the global model is worth on the operator's own cohort.

The cohort's patients are split once. The *validation* part chooses the best model and stops a
run early; the *test* part makes the headline, and decides nothing. No patient is in both.

Evaluation patients are not covered by the privacy claim: their metrics are published as they are,
and their hospital permits that use.
"""

from __future__ import annotations

import dataclasses
import io
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from common import studies
from common.cohort import Cohort, Unit
from common.errors import CohortError, RunError
from common.files import write_durably
from common.spec import NoPrivacy, RunSpec
from common.tasks import task_for
from common.tasks.estimates import Estimate, resampler
from common.tasks.task import Evidence

_log = logging.getLogger("cloister.evaluation")

PartName = Literal["validation", "test"]
PARTS: tuple[PartName, PartName] = ("validation", "test")
PREFIXES: Mapping[PartName, str] = {"validation": "validation_", "test": ""}
PATIENTS, UNIT = "patients", "unit"
GALLERY = "gallery"  # how the names of evidence begin that is kept of some images only


@dataclass(frozen=True)
class PartResult:
    """What a model reached on one part of the central cohort.

    Attributes:
        evidence: what the task keeps of the model's answers, by name, a row an image.
        patient_index: (images,) integers; equal numbers are one patient.
        metrics: what the evidence is worth.
        unit: what the intervals resample; ``image`` where the cohort knows no patients.
    """

    evidence: Evidence
    patient_index: NDArray[np.int64]
    metrics: Mapping[str, Estimate]
    unit: Unit

    @property
    def images(self) -> int:
        """How many images."""
        return len(self.patient_index)

    @property
    def patients(self) -> int:
        """Of how many patients (each image its own where the unit is the image)."""
        return len(np.unique(self.patient_index))

    def to_json(self) -> dict[str, Any]:
        """The form of it in ``metrics.jsonl``: no NaN, None where a metric has no meaning."""
        return {
            "images": self.images,
            "patients": self.patients,
            "unit": self.unit,
            "metrics": {name: found.to_json() for name, found in self.metrics.items()},
        }

    def arrays(self) -> dict[str, NDArray[Any]]:
        """The evidence, the patients (N,) int64 and the unit."""
        return {**self.evidence, PATIENTS: self.patient_index, UNIT: np.array(self.unit)}


@dataclass(frozen=True)
class EvaluationResult:
    """Both parts after one round; None for a part that the cohort does not have."""

    validation: PartResult | None
    test: PartResult | None

    def to_json(self) -> dict[str, Any]:
        """The form of it in ``metrics.jsonl``."""
        return {name: part and part.to_json() for name, part in self._parts()}

    def arrays(self) -> dict[str, NDArray[Any]]:
        """What ``evaluation.npz`` holds: the test part's arrays, the others by a prefix."""
        return {
            PREFIXES[name] + key: array
            for name, part in self._parts()
            if part is not None
            for key, array in part.arrays().items()
        }

    def save(self, path: Path) -> None:
        """Write `arrays` as ``evaluation.npz``, whole or not at all."""
        content = io.BytesIO()
        np.savez(content, allow_pickle=False, **self.arrays())
        write_durably(path, content.getvalue())

    def _parts(self) -> tuple[tuple[PartName, PartResult | None], ...]:
        return ("validation", self.validation), ("test", self.test)


def score_part(
    spec: RunSpec,
    name: PartName,
    evidence: Evidence,
    patients: NDArray[np.int64],
    unit: Unit,
) -> PartResult:
    """Score one part; the same evidence gives the same intervals, in a round and in a report.

    Raises:
        ValueError: if the evidence is not what a part's can be: an array has not as many rows as
            there are images, or holds pictures that the run did not ask for.
    """
    _check_evidence(evidence, patients, _most_pictures(spec, name))
    generator = resampler(spec.seed, name)
    found = task_for(spec).score(
        evidence, patients, resamples=spec.evaluation.bootstrap, generator=generator
    )
    metrics = {name: found.get(name, Estimate(None)) for name in spec.metrics}
    return PartResult(evidence, patients, metrics, unit)


def _most_pictures(spec: RunSpec, name: PartName) -> int:
    """Of how many images pictures may be kept: none unless the run's file asks for it."""
    return spec.evaluation.gallery if name == "test" else 0


def _check_evidence(evidence: Evidence, patients: NDArray[np.int64], pictures: int) -> None:
    if patients.ndim != 1 or patients.dtype.kind not in "iu":
        raise ValueError(f"{PATIENTS}: {patients.dtype} of shape {patients.shape}, not (images,)")
    for key, array in evidence.items():
        if key in (PATIENTS, UNIT) or key.startswith(PREFIXES["validation"]):
            raise ValueError(f"{key}: a name that evidence cannot have")
        if array.dtype.kind not in "biuf" or not array.ndim:
            raise ValueError(f"{key}: {array.dtype} of shape {array.shape}, expected numbers")
        most, rows = min(pictures, len(patients)), len(array)
        if rows > most if key.startswith(GALLERY) else rows != len(patients):
            expected = f"at most {most}" if key.startswith(GALLERY) else str(len(patients))
            raise ValueError(f"{key}: {rows} rows, expected {expected}")


class CentralEvaluator:
    """Evaluates models on the two parts of a cohort.

    A cohort with images marked ``validation`` or ``test`` keeps those parts, and nothing else of
    it is used. Otherwise a permutation of its patients, seeded by the spec, gives
    ``validation_fraction`` of them to validation, each combination of classes in proportion;
    images marked ``train`` are not used.

    Args:
        spec: the run's.
        cohort: images are read from it batch by batch.
        device: where models are evaluated; None means wherever a model lies.

    Raises:
        CohortError: if the cohort does not fit the spec, has no image to evaluate, has a patient
            marked for both parts, or a study of which nobody can say what class it has.
    """

    def __init__(
        self, spec: RunSpec, cohort: Cohort, *, device: torch.device | None = None
    ) -> None:
        # Its patients are outside the claim, so the run's unit of privacy does not bind it.
        unbound = NoPrivacy(mechanism="none", unit=cohort.unit)
        cohort.check_fits(spec.model_copy(update={"privacy": unbound}))
        self._spec = spec
        self._device = device
        self._task = task_for(spec)
        seen = studies.seen_by(spec, cohort)
        if len(cohort) and not len(seen):
            known = ", ".join(sorted(set(cohort.modalities.tolist()))) or "none"
            raise CohortError(
                f"{cohort.path}: no image of {' or '.join(spec.input.modalities)} "
                f"(input.modalities), they are of {known}; name another evaluation cohort"
            )
        parts = split_cohort(seen, spec)
        self.parts: Mapping[PartName, Cohort] = {
            name: studies.rows_for(spec, part) for name, part in parts.items()
        }
        for part in self.parts.values():
            studies.check(part)

    def evaluate(self, model: nn.Module, *, pictures: bool = False) -> EvaluationResult:
        """Evaluate `model` on both parts.

        Args:
            model: the network.
            pictures: whether pictures of the test part are kept as well, if the run's file asks
                for any: of the model that a run ends with, and of no other.

        The model is put into evaluation mode for as long as this takes, and on the evaluator's
        device for good. Answers that are not finite make metrics of None, not an error.
        """
        device = self._device or next(model.parameters()).device
        training = model.training
        model.to(device).eval()
        try:
            results = {
                name: self._evaluate_part(
                    model, name, device, _most_pictures(self._spec, name) if pictures else 0
                )
                for name in self.parts
            }
        finally:
            model.train(training)
        return EvaluationResult(results.get("validation"), results.get("test"))

    def _evaluate_part(
        self, model: nn.Module, name: PartName, device: torch.device, pictures: int
    ) -> PartResult:
        cohort = self.parts[name]
        found = self._task.evidence(model, cohort, device)
        evidence = {key: array for key, array in found.items() if not key.startswith(GALLERY)}
        if pictures:
            shown = self._task.gallery(model, cohort, device)
            evidence |= {k: array[:pictures] for k, array in shown.items() if k.startswith(GALLERY)}
        part = score_part(self._spec, name, evidence, cohort.patient_index, cohort.unit)
        if all(found.value is None for found in part.metrics.values()):
            _log.warning("no metric has a value on the %s part: has the model diverged?", name)
        return part


# --- The two parts ----------------------------------------------------------------------------


def split_cohort(cohort: Cohort, spec: RunSpec) -> dict[PartName, Cohort]:
    """The parts of an evaluation cohort, as views; a part without images is left out.

    Raises:
        CohortError: as `CentralEvaluator`.
    """
    if np.isin(cohort.splits, PARTS).any():
        marked: dict[PartName, Cohort] = {name: cohort.with_split(name) for name in PARTS}
        _refuse_shared_patients(cohort, marked)
        return {name: part for name, part in marked.items() if len(part)}
    kept = cohort.with_split("")
    if not len(kept):
        raise CohortError(
            f"{cohort.path}: no image to evaluate on; an evaluation cohort needs images that "
            "are not marked 'train'"
        )
    chosen = _choose(kept, spec)
    parts: dict[PartName, Cohort] = {
        "validation": kept.subset(np.flatnonzero(chosen)),
        "test": kept.subset(np.flatnonzero(~chosen)),
    }
    return {name: part for name, part in parts.items() if len(part)}


def _refuse_shared_patients(cohort: Cohort, parts: Mapping[PartName, Cohort]) -> None:
    names: dict[str, set[str]] = {name: set(part.patients) for name, part in parts.items()}
    names["train"] = set(cohort.with_split("train").patients)
    for one, other in combinations(names, 2):
        if both := names[one] & names[other]:
            raise CohortError(
                f"{cohort.path}: {len(both)} patients have images in {one!r} and in {other!r}; "
                "expected each patient in one part: mark all its images alike"
            )


def _choose(cohort: Cohort, spec: RunSpec) -> NDArray[np.bool_]:
    """(patients,) True for validation: in a random order, sorted by classes, every so many-th."""
    order = np.random.default_rng(spec.seed).permutation(len(cohort.patients))
    order = order[np.lexsort(_classes_of_patients(cohort)[order].T)]
    places = np.floor(np.arange(len(order) + 1) * spec.evaluation.validation_fraction + 0.5)
    chosen = np.zeros(len(order), dtype=np.bool_)
    chosen[order] = np.diff(places) > 0
    if chosen.all():
        chosen[order[-1]] = False  # a headline needs a test part more than a choice needs its own
    return chosen


def _classes_of_patients(cohort: Cohort) -> NDArray[np.bool_]:
    """(patients, 1 + classes): which classes each patient's images have, after a constant."""
    present = cohort.present()
    has = np.zeros((len(cohort.patients), 1 + present.shape[1]), dtype=np.bool_)
    np.logical_or.at(has[:, 1:], cohort.patient_index, present)
    return has


# --- The best round, and when to stop ---------------------------------------------------------


@dataclass(frozen=True)
class EarlyStopping:
    """The best round so far by the validation part, and how long nothing better came.

    A value: `after` returns the next one. Any gain makes a round the best; only a gain of
    `min_delta` over `reference` starts the patience anew. A metric without meaning is no gain.
    Without a validation part nothing is best and nothing stops.

    Attributes:
        metric: its name.
        lower_is_better: whether the best is the lowest.
        patience: evaluations without gain until `stop`; 0 means never.
        min_delta: the gain that counts.
        best_round: None until there is one.
        best_value: the metric in that round.
        reference: the value from which `min_delta` is measured.
        waited: evaluations since then.
    """

    metric: str
    lower_is_better: bool
    patience: int
    min_delta: float
    best_round: int | None = None
    best_value: float | None = None
    reference: float | None = None
    waited: int = 0

    @classmethod
    def of(cls, spec: RunSpec) -> Self:
        """Before the first round of a run."""
        e = spec.evaluation
        lower = spec.metrics[e.metric].lower_is_better
        return cls(e.metric, lower, e.patience, e.min_delta)

    @property
    def stop(self) -> bool:
        """Whether the run's patience is at its end."""
        return 0 < self.patience <= self.waited

    def after(self, round_number: int, evaluation: EvaluationResult) -> Self:
        """What holds after one more evaluation."""
        if evaluation.validation is None:
            return self
        value = evaluation.validation.metrics[self.metric].value
        if value is None:
            return dataclasses.replace(self, waited=self.waited + 1)
        best = self
        if self._gain(value, self.best_value) > 0:
            best = dataclasses.replace(self, best_round=round_number, best_value=value)
        gain = self._gain(value, self.reference)
        if gain > 0 and gain >= self.min_delta:
            return dataclasses.replace(best, reference=value, waited=0)
        return dataclasses.replace(best, waited=self.waited + 1)

    def to_json(self) -> dict[str, Any]:
        """For the checkpoint."""
        fields = dataclasses.asdict(self)
        del fields["lower_is_better"]
        return fields

    @classmethod
    def from_json(cls, state: Mapping[str, Any], spec: RunSpec) -> Self:
        """What `to_json` wrote in a run of `spec`.

        Raises:
            RunError: if it is something else.
        """
        start = cls.of(spec)
        known, asked = start.to_json(), ("metric", "patience", "min_delta")
        if set(state) != set(known) or any(state[key] != known[key] for key in asked):
            raise RunError(
                f"early stopping in the checkpoint is {dict(state)!r}, expected the keys "
                f"{', '.join(sorted(known))}, and metric {start.metric}; it is of another version "
                "or run: start the run anew"
            )
        return dataclasses.replace(start, **state)

    def _gain(self, value: float, before: float | None) -> float:
        if before is None:
            return float("inf")
        return before - value if self.lower_is_better else value - before
