"""Random cohorts for the benchmarks that look at speed and memory alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from client.intake.builder import CohortBuilder, ImageRecord
from common.cohort import CohortMeta
from common.spec import RunSpec


def write_cohort(path: Path, spec: RunSpec, *, images: int, seed: int) -> None:
    """Random images, one a patient, the classes by turns."""
    generator = np.random.default_rng(seed)
    with CohortBuilder(path, spec.input.shape) as builder:
        for number in range(images):
            pixels = generator.integers(0, 65536, spec.input.shape, dtype=np.uint16)
            name = f"{number:064x}"
            record = ImageRecord(name, name, name, name, number % 2, *spec.input.shape[1:])
            builder.add(record, pixels)
        builder.finish(CohortMeta.of(spec, unit="patient", source="random", created="2000-01-01"))
