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
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from client.book import RunBook
from client.folder import NodeFolder, cohort_digest
from common.accounting import Unit
from common.cohort import SYNTHETIC, Cohort
from common.errors import CohortError, Refusal, RefusalCode
from common.spec import Behind, DpSgd, NoPrivacy, RunSpec
from common.studies import rows_for

log = logging.getLogger("cloister.synthetic")

ABOUT = "about.json"
PRIVATE = "differential_privacy"
COHORT = "cohort_sha256"
_LARGEST = 2**20


@dataclass(frozen=True)
class Claim:
    """What the training of a generator cost those it was trained on, whoever was at every site.

    Attributes:
        unit: whom it protected.
        epsilon: at `delta`.
        delta: 0 to 1.
    """

    unit: Unit
    epsilon: float
    delta: float

    @classmethod
    def of(cls, said: Any) -> Self | None:
        """What a file or a card says; None if it is no claim: one without figures is none."""
        if not isinstance(said, Mapping):
            return None
        epsilon, delta = _number(said.get("epsilon")), _number(said.get("delta"))
        if not (0 <= epsilon < math.inf and 0 < delta < 1):
            return None
        return cls("patient" if said.get("unit") == "patient" else "image", epsilon, delta)

    def __str__(self) -> str:
        return f"ε = {self.epsilon:.2f} at δ = {self.delta:g} for each {self.unit}"


@dataclass(frozen=True)
class Synthetic:
    """A synthetic cohort, and who is behind it.

    Attributes:
        cohort: the images.
        digest: `client.folder.cohort_digest` of them as they were opened.
        claim: of the patients behind them; None: nothing is known to protect them.
        without_privacy: whether a person at the site takes it where that is not enough.
    """

    cohort: Cohort
    digest: str
    claim: Claim | None
    without_privacy: bool

    def behind(self, spec: RunSpec) -> Behind:
        """Whether those behind it are protected in the unit of a run: an image is no patient."""
        unit = self.claim and self.claim.unit
        enough = unit == "patient" or (unit is not None and spec.privacy.unit == "image")
        return "protected" if enough else "unprotected"

    def check_same(self) -> None:
        """Check that the images on the disk are still those that were opened.

        Raises:
            CohortError: if they are others.
        """
        if cohort_digest(self.cohort.path) != self.digest:
            raise CohortError(
                f"{self.cohort.path}: other synthetic images lie there than when the node was "
                "started; put those back, or start the node again"
            )

    def __str__(self) -> str:
        """What a person says yes to, and the ledger keeps of the images that a run began with."""
        by = "not known to be protected" if self.claim is None else f"protected by {self.claim}"
        return f"{self.digest}, the patients behind them {by}"


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
    digest = cohort_digest(path)
    claim = _claim(path, digest)
    if claim is not None:
        return Synthetic(cohort, digest, claim, without_privacy)
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
    return Synthetic(cohort, digest, None, without_privacy)


def synthetic_of(home: NodeFolder) -> Synthetic | None:
    """The synthetic cohort that runs may mix in at a node; None where [data] names none.

    Raises:
        CohortError: as `synthetic_cohort`.
        ConfigError: if its key cannot be had.
    """
    data = home.policy.data
    if data is None or data.synthetic is None:
        return None
    path, key = home.path / data.synthetic, home.cohort_key
    return synthetic_cohort(path, key, without_privacy=data.synthetic_without_privacy)


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


def check_synthetic(spec: RunSpec, synthetic: Synthetic | None, known: RunBook) -> None:
    """Whether a run can mix in a site's images, and those that it was set aside with.

    Raises:
        Refusal: ``policy``, saying what is wrong with them.
    """
    try:
        fitting(spec, synthetic)
    except CohortError as error:
        raise Refusal(RefusalCode.POLICY, str(error)) from error
    if known.state == "open" and known.synthetic not in {"", str(synthetic or "")}:
        raise Refusal(
            RefusalCode.POLICY,
            f"the synthetic images are not those that the run was set aside with, which the "
            f"coordinator was told of: {known.synthetic}; put them back, or the run ends here",
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


def _claim(path: Path, digest: str) -> Claim | None:
    """Of the generator, as the file beside the cohort says of just this one."""
    try:
        with (path.parent / ABOUT).open("rb") as file:
            about = json.loads(file.read(_LARGEST))
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(about, dict) or about.get(COHORT) != digest:
        return None
    return Claim.of(about.get(PRIVATE))


def _number(value: Any) -> float:
    """As a float; what is none is not a number either."""
    known = isinstance(value, float | int) and not isinstance(value, bool)
    return float(value) if known and abs(value) < sys.float_info.max else math.nan
