"""Synthetic images that a site mixes in with its patients (``augmentation.synthetic``).

They are no patients: they need no budget, and are not counted. That is true only of images whose
generator kept its own patients' secrets. One that was trained without differential privacy may
repeat them, so such a cohort is taken only where a person at the site says so.

What says that it did lies in a file beside the cohort, and names it by the SHA-256 of its index.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path

from client.folder import cohort_digest
from common.cohort import Cohort
from common.errors import CohortError
from common.spec import NoPrivacy, RunSpec
from common.studies import rows_for

log = logging.getLogger("cloister.synthetic")

SOURCE = "synthetic"
ABOUT = "about.json"
PRIVATE = "differential_privacy"
COHORT = "cohort_sha256"
_LARGEST = 2**20


def synthetic_cohort(path: Path, key: bytes | None = None, *, without_privacy: bool) -> Cohort:
    """Open a cohort that `cloister generate` made.

    Args:
        path: the cohort, beside which lies what it is (`ABOUT`).
        key: of a sealed one.
        without_privacy: whether one is taken whose generator had no differential privacy, or of
            which nothing says that it had.

    Raises:
        CohortError: if it is not synthetic, or its generator had no privacy and that is not said.
    """
    cohort = Cohort.open(path, key)
    if cohort.meta.source != SOURCE:
        raise CohortError(
            f"{path}: its source is {cohort.meta.source!r}, expected {SOURCE!r}, as `cloister "
            "generate` makes it: patients are never mixed in without being counted"
        )
    if _was_private(path):
        return cohort
    if not without_privacy:
        raise CohortError(
            f"{path.parent / ABOUT}: does not say that the images of just this cohort come from a "
            "model whose patients were protected, so they may give patients away; take others, or "
            "say synthetic_without_privacy = true beside the cohort's name"
        )
    log.warning(
        "%s: synthetic images without differential privacy are mixed in: what a run gives of the "
        "patients behind them is in no account (synthetic_without_privacy)",
        path,
    )
    return cohort


def fitting(spec: RunSpec, synthetic: Cohort | None) -> Cohort | None:
    """The synthetic cohort as a run mixes it in; None where the run or the site has none.

    Raises:
        CohortError: if its images do not fit the run, or are fewer than it expects in a batch.
    """
    if synthetic is None or not spec.augmentation.synthetic:
        return None
    # No patient stands behind its images, so the run's unit of privacy does not bind it.
    unbound = NoPrivacy(mechanism="none", unit=synthetic.unit)
    synthetic.check_fits(spec.model_copy(update={"privacy": unbound}))
    rows = rows_for(spec, synthetic)
    check_enough(spec, rows)
    return rows


def check_enough(spec: RunSpec, rows: Cohort) -> None:
    """Whether there are as many as the run expects in a batch.

    Raises:
        CohortError: if there are fewer.
    """
    wanted = spec.augmentation.synthetic
    if len(rows) < wanted:
        raise CohortError(
            f"{rows.path}: {len(rows)} synthetic images, the run expects {wanted} in a batch; make "
            "more with `cloister generate`"
        )


def _was_private(path: Path) -> bool:
    try:
        with (path.parent / ABOUT).open("rb") as file:
            about = json.loads(file.read(_LARGEST))
    except (OSError, ValueError, RecursionError):
        return False
    if not isinstance(about, dict) or about.get(PRIVATE) is not True:
        return False
    return about.get(COHORT) == cohort_digest(path)
