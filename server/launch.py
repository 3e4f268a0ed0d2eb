"""A run is checked, given its identity, and put into the queue."""

from __future__ import annotations

import math
import secrets
import shutil
from datetime import UTC, datetime
from pathlib import Path

from common import models
from common.cohort import Cohort
from common.errors import CohortError, RunError
from common.files import flush_folder, write_durably
from common.spec import RunSpec, read_run_file
from server.evaluation import CentralEvaluator
from server.roster import Roster
from server.runs import CoordinatorHome, Run, Standing
from server.start import START_FILE, starting_model

LARGEST_WEIGHTS = 2**31 - 2**24
"""Bytes of a network's weights: a node keeps its release sealed in one piece (AES-GCM, 2 GiB)."""
_COPIES = 6  # on the coordinator's disk, beside the sites' answers: tasks, checkpoints, results


def launch(home: CoordinatorHome, run_file: Path, model: Path | None = None) -> Run:
    """Check a run and put it into the queue of a home.

    Args:
        home: the coordinator's.
        run_file: what a person wrote.
        model: at which the run begins, where its file names one.

    Raises:
        SpecError: if the run's file is wrong.
        ModelError: if the network cannot be made, or not be trained under privacy.
        PackageError: if `model` is not one at which the run can begin.
        CohortError: if the evaluation's cohort is missing or does not fit.
        RunError: if the folder cannot be written, the weights are too large to travel, or the
            disk has no room for a round of them.
    """
    read = read_run_file(run_file).spec
    stamp = datetime.now(UTC).strftime("%Y%m%d-%H%M%S")
    spec = read.identified(f"{read.name.lower()}-{stamp}-{secrets.token_hex(2)}")
    _check(home, spec)
    start = starting_model(spec, model)
    made = Run(home.runs / spec.run_id)
    partial = home.runs / f".{spec.run_id}.partial"
    try:
        partial.mkdir(parents=True)
        write_durably(partial / "spec.json", spec.canonical_json.encode())
        if start is not None:
            write_durably(partial / START_FILE, start)
        Run(partial).write(Standing.QUEUED)
        partial.rename(made.path)
        flush_folder(home.runs)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise RunError(f"{made.path}: cannot be written ({error})") from error
    return made


def _check(home: CoordinatorHome, spec: RunSpec) -> None:
    if not home.evaluation.exists():
        raise CohortError(
            f"{home.evaluation}: is not there; expected the cohort on which models are "
            "evaluated: `cloister intake run SOURCE COHORT` makes one of DICOM"
        )
    _check_size(home, sum(4 * math.prod(shape) for shape in models.shapes(spec).values()))
    models.check_private(models.build(spec))
    models.learned(spec)
    CentralEvaluator(spec, Cohort.open(home.evaluation))


def _check_size(home: CoordinatorHome, size: int) -> None:
    if size > LARGEST_WEIGHTS:
        raise RunError(
            f"the network has {size / 2**20:.0f} MiB of weights, expected at most "
            f"{LARGEST_WEIGHTS / 2**20:.0f}: take a smaller network, or smaller images"
        )
    needed = size * (_COPIES + len(Roster(home.path).sites()))
    free = shutil.disk_usage(home.path).free
    if free < needed:
        raise RunError(
            f"{home.path}: {free / 2**20:.0f} MiB are free on its disk, and rounds of "
            f"{size / 2**20:.0f} MiB of weights take {needed / 2**20:.0f}: make room, or take a "
            "smaller network"
        )
