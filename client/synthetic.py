"""Synthetic images that a site mixes in with its patients (``augmentation.synthetic``).

They are no patients: they need no budget, and are not counted. That is true only of images whose
generator kept its own patients' secrets, in the unit of the run: then what is computed from them
is post-processing (docs/privacy.md). One that was trained without differential privacy may repeat
them, so such a cohort is taken only where a person at the site says so, and in a run under
differential privacy only if the run says so too: its card and report then tell it.

What says that it did lies in a file beside the cohort, and names it by the SHA-256 of its index.
"""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from pathlib import Path

from client.folder import cohort_digest
from common.accounting import Unit
from common.cohort import SYNTHETIC, Cohort
from common.errors import CohortError
from common.spec import Behind, DpSgd, NoPrivacy, RunSpec
from common.studies import rows_for

log = logging.getLogger("cloister.synthetic")

ABOUT = "about.json"
PRIVATE = "differential_privacy"
UNIT = "unit_of_privacy"
COHORT = "cohort_sha256"
_LARGEST = 2**20


@dataclass(frozen=True)
class Synthetic:
    """A synthetic cohort, and who is behind it.

    Attributes:
        cohort: the images.
        unit: what its generator's training protected; None: nothing is known to have been.
        without_privacy: whether a person at the site takes it where that is not enough.
    """

    cohort: Cohort
    unit: Unit | None
    without_privacy: bool

    def behind(self, spec: RunSpec) -> Behind:
        """Whether those behind it are protected in the unit of a run: an image is no patient."""
        enough = self.unit == "patient" or (self.unit is not None and spec.privacy.unit == "image")
        return "protected" if enough else "unprotected"


def synthetic_cohort(path: Path, key: bytes | None = None, *, without_privacy: bool) -> Synthetic:
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
    if cohort.meta.source != SYNTHETIC:
        raise CohortError(
            f"{path}: its source is {cohort.meta.source!r}, expected {SYNTHETIC!r}, as `cloister "
            "generate` makes it: patients are never mixed in without being counted"
        )
    unit = _protected_unit(path)
    if unit is not None:
        return Synthetic(cohort, unit, without_privacy)
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
    return Synthetic(cohort, None, without_privacy)


def fitting(spec: RunSpec, synthetic: Synthetic | None) -> Cohort | None:
    """The synthetic cohort as a run mixes it in; None where the run or the site has none.

    Raises:
        CohortError: if its images do not fit the run, are fewer than it expects in a batch, or
            those behind them are not protected and that is not said by run and site both.
    """
    if synthetic is None or not spec.augmentation.synthetic:
        return None
    _check_behind(spec, synthetic)
    cohort = synthetic.cohort
    # No patient stands behind its images, so the run's unit of privacy does not bind it.
    unbound = NoPrivacy(mechanism="none", unit=cohort.unit)
    cohort.check_fits(spec.model_copy(update={"privacy": unbound}))
    rows = rows_for(spec, cohort)
    check_enough(spec, rows)
    return rows


def _check_behind(spec: RunSpec, synthetic: Synthetic) -> None:
    if not isinstance(spec.privacy, DpSgd) or synthetic.behind(spec) == "protected":
        return
    path, unit = synthetic.cohort.path, spec.privacy.unit
    if not synthetic.without_privacy:
        raise CohortError(
            f"{path}: its generator's training protected single images, the run protects the "
            f"{unit}; take others, or say synthetic_without_privacy = true beside its name"
        )
    if not spec.augmentation.synthetic_without_privacy:
        raise CohortError(
            f"{path}: nothing says that the {unit}s behind these synthetic images were protected, "
            "and the run takes no such images: its figures would not cover them. Expected others, "
            "or a run that says augmentation.synthetic_without_privacy = true"
        )


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


def _protected_unit(path: Path) -> Unit | None:
    """What the generator's training protected, as the file beside the cohort says of just it."""
    try:
        with (path.parent / ABOUT).open("rb") as file:
            about = json.loads(file.read(_LARGEST))
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(about, dict) or about.get(PRIVATE) is not True:
        return None
    if about.get(COHORT) != cohort_digest(path):
        return None
    return "patient" if about.get(UNIT) == "patient" else "image"
