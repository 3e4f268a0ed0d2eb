"""Synthetic images that a site mixes in with its patients (``augmentation.synthetic``).

They are no patients: they need no budget, and are not counted. That is true only of images whose
generator kept its own patients' secrets. One that was trained without differential privacy may
repeat them, so such a cohort is taken only where a person at the site says so.
"""

from __future__ import annotations

import json
from pathlib import Path

from common.cohort import Cohort
from common.errors import CohortError

SOURCE = "synthetic"
ABOUT = "about.json"
PRIVATE = "differential_privacy"
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
    if not (without_privacy or _was_private(path)):
        raise CohortError(
            f"{path.parent / ABOUT}: does not say that the images come from a run with "
            "differential privacy, so they may give patients away; take others, or say "
            "synthetic_without_privacy = true beside the cohort's name"
        )
    return cohort


def _was_private(path: Path) -> bool:
    try:
        with (path.parent / ABOUT).open("rb") as file:
            about = json.loads(file.read(_LARGEST))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(about, dict) and about.get(PRIVATE) is True
