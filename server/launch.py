"""A run is checked, given its identity, and put into the queue."""

from __future__ import annotations

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
from server.runs import CoordinatorHome, Run, Standing


def launch(home: CoordinatorHome, run_file: Path) -> Run:
    """Check a run and put it into the queue of a home.

    Raises:
        SpecError: if the run's file is wrong.
        ModelError: if the network cannot be made, or not be trained under privacy.
        CohortError: if the evaluation's cohort is missing or does not fit.
        RunError: if the folder cannot be written.
    """
    read = read_run_file(run_file).spec
    stamp = datetime.now(UTC).strftime("%Y%m%d-%H%M%S")
    spec = read.identified(f"{read.name.lower()}-{stamp}-{secrets.token_hex(2)}")
    _check(home, spec)
    made = Run(home.runs / spec.run_id)
    partial = home.runs / f".{spec.run_id}.partial"
    try:
        partial.mkdir(parents=True)
        write_durably(partial / "spec.json", spec.canonical_json.encode())
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
    models.check_private(models.build(spec))
    CentralEvaluator(spec, Cohort.open(home.evaluation))
