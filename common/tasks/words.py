"""How a number is written for people, in exhibits, reports and cards alike."""

from __future__ import annotations

from common.spec import Task
from common.tasks.estimates import Estimate

NONE = "–"

_ADJECTIVES = ("binary", "multiclass", "multilabel")


def number(value: float | None, digits: int = 3) -> str:
    """A figure with so many digits after the point; a dash for None."""
    return NONE if value is None else f"{value:.{digits}f}"


def interval(estimate: Estimate, digits: int = 3) -> str:
    """The interval alone, or nothing."""
    if estimate.low is None or estimate.high is None:
        return ""
    return f"{estimate.low:.{digits}f} to {estimate.high:.{digits}f}"


def estimate(found: Estimate, digits: int = 3) -> str:
    """A value and its interval, ``0.912 (0.871 to 0.946)``."""
    limits = interval(found, digits)
    return number(found.value, digits) + (f" ({limits})" if limits else "")


def counted(count: int, noun: str) -> str:
    """``1 site``, ``4 sites``, ``4 studies``."""
    return f"{count:,} {noun if count == 1 else plural(noun)}"


def plural(noun: str) -> str:
    """``sites``, ``studies``."""
    return f"{noun[:-1]}ies" if noun.endswith("y") else f"{noun}s"


def task(section: Task) -> str:
    """``binary classification``, ``segmentation``."""
    kind = f"{section.kind} " if section.kind in _ADJECTIVES else ""
    return f"{kind}{section.name}"
