"""How a number is written for people, in exhibits, reports and cards alike."""

from __future__ import annotations

import math

from common.spec import Metric, Task
from common.tasks.estimates import Estimate

NONE = "–"

_ADJECTIVES = ("binary", "multiclass", "multilabel")
_DIGITS = {"": 3, "px": 1, "mm": 1, "%": 1, ": 1": 1}  # after the point, by unit; of others 2
_MOST_DIGITS = 6
_LARGE = 100
_NARROWEST = 2  # units of the last digit that an interval as it is written is wide


def digits(metric: Metric) -> int:
    """How many digits of a metric stand after the point, where no interval asks for more."""
    return _DIGITS.get(metric.unit, 2)


def number(value: float | None, digits: int = 3) -> str:
    """A figure with so many digits after the point; a dash for None, and no minus before zero."""
    if value is None:
        return NONE
    written = f"{value:.{digits}f}"
    return written.lstrip("-") if float(written) == 0 else written.replace("-", "−")


def enough(found: Estimate, digits: int = 3) -> int:
    """At least so many digits after the point, and as many as what is written must have.

    An interval is seen to have a width: 0.003 (0.003 to 0.003) is 0.0031 (0.0029 to 0.0033). A
    value without one has two figures that are not zero. More than six are no use to anyone, nor
    are as many of 3,851 as of 8.5: from 100 on it is one less, from 1,000 on two.
    """
    if found.value is None:
        return digits
    if abs(found.value) >= _LARGE:
        digits = max(0, digits + 1 - math.floor(math.log10(abs(found.value))))
    if _wide(found):
        needed = math.log10(_NARROWEST / _width(found))
    elif found.value:
        needed = 1 - math.floor(math.log10(abs(found.value)))
    else:
        return digits
    return max(digits, min(_MOST_DIGITS, math.ceil(needed - 1e-9)))


def _width(found: Estimate) -> float:
    return 0.0 if found.low is None or found.high is None else found.high - found.low


def _wide(found: Estimate) -> bool:
    return _width(found) >= _NARROWEST * 0.1**_MOST_DIGITS


def interval(found: Estimate, digits: int = 3) -> str:
    """The interval alone; nothing without one, or where it has no width and so says nothing."""
    if not _wide(found):
        return ""
    shown = enough(found, digits)
    return f"{number(found.low, shown)} to {number(found.high, shown)}"


def estimate(found: Estimate, digits: int = 3) -> str:
    """A value and its interval, ``0.912 (0.871 to 0.946)``."""
    limits = interval(found, digits)
    return number(found.value, enough(found, digits)) + (f" ({limits})" if limits else "")


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
