"""What a report shows of a run of modalities: how it does where one of them is absent."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from common.models.studies import there
from common.spec import RunSpec
from common.tasks import words
from common.tasks.exhibits import Table
from common.tasks.metrics import Predictions, score

PRESENT = "modalities"
"""The name of the evidence: (N, modalities) 1 where a row has an image of it, else 0."""

_SHOWN = {
    "binary": ("auroc", "sensitivity", "specificity"),
    "multiclass": ("auroc", "accuracy"),
    "multilabel": ("auroc", "sensitivity", "specificity"),
}


def present(images: Tensor, spec: RunSpec) -> Mapping[str, NDArray[Any]]:
    """Of (B, places, C, H, W) what `PRESENT` names; nothing of a run without modalities."""
    if not spec.input.modalities:
        return {}
    known = there(images).cpu().numpy()
    of_each = known.reshape(len(known), len(spec.input.modalities), spec.input.images)
    return {PRESENT: np.asarray(of_each.any(axis=2), dtype=np.uint8)}


def table(
    evidence: Mapping[str, NDArray[Any]], predictions: Predictions, spec: RunSpec
) -> Iterator[Table]:
    """The metrics of the rows that have the same modalities, the most complete first."""
    has = evidence.get(PRESENT)
    if has is None or not len(has) or not predictions.finite:
        return
    kinds = {tuple(map(int, row)) for row in has}
    ordered = sorted(kinds, key=lambda kind: (-sum(kind), [-has for has in kind]))
    shown = _SHOWN[predictions.kind]
    rows = [
        _row(kind, _of(predictions, (has == kind).all(axis=1)), spec, shown) for kind in ordered
    ]
    yield Table(
        "By what was there",
        (
            "Modalities",
            words.plural(spec.input.row_name).capitalize(),
            *(spec.task.METRICS[name].title for name in shown),
        ),
        rows,
        "Each line is of other patients, so a difference between lines need not come from what "
        "is absent. In brackets: the 95 % interval.",
    )


def _of(predictions: Predictions, mask: NDArray[np.bool_]) -> Predictions:
    return replace(
        predictions,
        probabilities=predictions.probabilities[mask],
        labels=predictions.labels[mask],
        patients=predictions.patients[mask],
    )


def _row(
    kind: tuple[int, ...], part: Predictions, spec: RunSpec, shown: tuple[str, ...]
) -> tuple[str, ...]:
    generator = np.random.default_rng(spec.seed)
    found = score(part, resamples=spec.evaluation.bootstrap, generator=generator).metrics
    name = _named(kind, spec.input.modalities)
    return (name, str(len(part)), *(words.estimate(found[metric]) for metric in shown))


def _named(kind: tuple[int, ...], modalities: tuple[str, ...]) -> str:
    """``CT and MR``, ``CT alone``."""
    names = [name for name, there in zip(modalities, kind, strict=True) if there]
    return f"{names[0]} alone" if len(names) == 1 < len(modalities) else " and ".join(names)
