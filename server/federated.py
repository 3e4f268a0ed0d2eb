"""The federated evaluation: what the sites' own held-out patients say of the final model.

Each site releases one table of noised counts (`common.tasks.counts`); the tables are added up, and
every figure is computed from their sum, so it is post-processing and costs nothing more. The
interval of a figure says how far the noise alone may have moved it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common.accounting import evaluation_of
from common.errors import UpdateError
from common.messages import Counts, Reply
from common.spec import RunSpec
from common.tasks import counts
from common.tasks.estimates import Estimate

FEDERATED_FILE = "federated.json"


@dataclass(frozen=True)
class FederatedResult:
    """What came of it.

    Attributes:
        sites: each site that was asked -> ``ok``, or why it gave no counts.
        patients: how many were counted, with the noise of all sites on it.
        deviation: the standard deviation of the noise on each count of the sum, in patients.
        metrics: by name; the interval is that of the noise.
    """

    sites: Mapping[str, str]
    patients: float
    deviation: float
    metrics: Mapping[str, Estimate]

    def to_json(self) -> dict[str, Any]:
        """The content of ``federated.json``."""
        return {
            "sites": dict(self.sites),
            "patients": self.patients,
            "deviation": self.deviation,
            "metrics": {name: value.to_json() for name, value in self.metrics.items()},
        }


def table_of(answer: Reply, spec: RunSpec) -> NDArray[np.float64]:
    """The counts of one site, checked.

    Raises:
        UpdateError: if they are not those of this run, or not finite.
    """
    if not isinstance(answer, Counts) or answer.digest != spec.digest:
        raise UpdateError("not the counts of this run")
    if answer.mechanism != evaluation_of(spec):
        raise UpdateError(f"mechanism {answer.mechanism} is not the one that was planned")
    if answer.table.shape != counts.shape(spec):
        raise UpdateError(f"counts of shape {answer.table.shape}, expected {counts.shape(spec)}")
    if not np.isfinite(answer.table).all():
        raise UpdateError("counts that are not finite")
    return answer.table.astype(np.float64)


def result_of(
    spec: RunSpec, tables: Mapping[str, NDArray[np.float64]], refused: Mapping[str, str]
) -> FederatedResult:
    """The sites' tables together; without any, no figure has a value."""
    total = np.sum([np.zeros(counts.shape(spec)), *tables.values()], axis=0)
    noise = counts.deviation(spec) * math.sqrt(len(tables))
    threshold = spec.evaluation.threshold
    values = counts.metrics(total, threshold) if tables else dict.fromkeys(counts.METRICS)
    spread = counts.intervals(total, noise, threshold, seed=spec.seed) if tables else {}
    metrics = {
        name: Estimate(value, *spread.get(name, ())) if value is not None else Estimate(None)
        for name, value in values.items()
    }
    status = dict.fromkeys(tables, "ok") | dict(refused)
    return FederatedResult(status, float(total[0].sum()), noise, metrics)
