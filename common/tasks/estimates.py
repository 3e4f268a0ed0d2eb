"""Figures with their intervals, by patient.

An interval is the 2.5th to 97.5th percentile over resamples of *patients* with replacement: the
images of one patient are not independent. A resample is a row of weights, how often each image's
patient was drawn, so that all resamples are computed together by weighted formulas.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

_INTERVAL = (2.5, 97.5)
_CHUNK = 1 << 20  # weights at a time: what is computed together stays in the cache
_FEWEST_PATIENTS = 2  # one patient resampled is always the same patient


@dataclass(frozen=True)
class Estimate:
    """A metric's value and its 95 % interval; None where it has no meaning."""

    value: float | None
    low: float | None = None
    high: float | None = None

    def to_json(self) -> dict[str, float | None]:
        """The form of it in ``metrics.jsonl``."""
        return {"value": self.value, "low": self.low, "high": self.high}


def means(
    rows: Mapping[str, NDArray[np.floating]],
    patients: NDArray[np.int64],
    *,
    resamples: int,
    generator: np.random.Generator,
) -> dict[str, Estimate]:
    """The mean of each figure over the images that have it, with its interval.

    Args:
        rows: by name a figure an image, (N,); NaN where an image has none, and it does not count.
            A figure that is infinite makes the mean None: so is one to be written that follows
            from an answer which is no number.
        patients: (N,) integers; equal numbers are one patient.
        resamples: of the bootstrap; 0 gives no interval.
        generator: of the bootstrap.
    """
    parts = {}
    for name, figures in rows.items():
        has = ~np.isnan(figures)
        parts[name] = np.where(has, figures, 0.0), has
    return ratios(parts, patients, resamples=resamples, generator=generator)


def ratios(
    parts: Mapping[str, tuple[NDArray[np.generic], NDArray[np.generic]]],
    patients: NDArray[np.int64],
    *,
    resamples: int,
    generator: np.random.Generator,
) -> dict[str, Estimate]:
    """Quotients of two sums over images, such as hits over objects, each with its interval.

    Args:
        parts: by name numerators and denominators, (N,) each, no denominator below 0. A quotient
            whose denominators are all 0, or that is not finite, is None.
        patients: as `means`.
        resamples: as `means`.
        generator: as `means`.
    """

    def quotients(weights: Floats) -> dict[str, Floats]:
        with np.errstate(invalid="ignore"):  # infinite, of which a resample has none
            return {
                name: ratio(weights @ above.astype(np.float64), weights @ below.astype(np.float64))
                for name, (above, below) in parts.items()
            }

    return estimates(quotients, patients, resamples=resamples, generator=generator)


def estimates(
    statistics: Callable[[Floats], Mapping[str, Floats]],
    patients: NDArray[np.int64],
    *,
    resamples: int,
    generator: np.random.Generator,
) -> dict[str, Estimate]:
    """What `statistics` says of all images, and of resamples of their patients.

    Args:
        statistics: from (R, N) weights of images to (R,) figures by name, NaN (or infinite) where
            one has no meaning.
        patients: as `means`.
        resamples: as `means`.
        generator: as `means`.
    """
    whole = statistics(np.ones((1, len(patients))))
    limits = intervals(statistics, patients, resamples=resamples, generator=generator)
    return {
        name: Estimate(float(value[0]), *limits.get(name, ()))
        if np.isfinite(value[0])
        else Estimate(None)
        for name, value in whole.items()
    }


def intervals(
    statistics: Callable[[Floats], Mapping[str, Floats]],
    patients: NDArray[np.int64],
    *,
    resamples: int,
    generator: np.random.Generator,
) -> dict[str, tuple[float, float]]:
    """The 2.5th and 97.5th percentile of each figure over resamples; see `estimates`.

    A resample in which a figure has no meaning is left out of its interval. There are none
    without resamples, or with fewer than two patients.
    """
    if not resamples or len(np.unique(patients)) < _FEWEST_PATIENTS:
        return {}
    at_once = max(1, _CHUNK // len(patients))
    chunks = [
        statistics(patient_weights(patients, min(at_once, resamples - start), generator))
        for start in range(0, resamples, at_once)
    ]
    found = {name: np.concatenate([chunk[name] for chunk in chunks]) for name in chunks[0]}
    return {name: limits for name, r in found.items() if (limits := _percentiles(r))}


def resampler(seed: int, part: Literal["validation", "test"]) -> np.random.Generator:
    """What a part's metrics are resampled by; who asks anew has the same intervals again."""
    return np.random.default_rng([seed, ("validation", "test").index(part)])


def patient_weights(
    patients: NDArray[np.int64], resamples: int, generator: np.random.Generator
) -> Floats:
    """Bootstrap weights: how often each image's patient is drawn.

    Each row draws as many patients as there are, with replacement.

    Args:
        patients: (N,) one number a patient.
        resamples: R.
        generator: where the draws come from.

    Returns:
        (R, N) whole numbers as float64; the images of one patient have the same weight.
    """
    _, index = np.unique(patients, return_inverse=True)
    count = int(index.max(initial=-1)) + 1
    drawn = generator.integers(0, count, size=(resamples, count))
    drawn += count * np.arange(resamples)[:, None]
    times = np.bincount(drawn.ravel(), minlength=resamples * count)
    return times.reshape(resamples, count).astype(np.float64)[:, index]


def ratio(numerator: Floats, denominator: Floats) -> Floats:
    """The quotient; NaN where nothing is divided."""
    nothing = np.full(denominator.shape, np.nan)
    return np.asarray(np.divide(numerator, denominator, out=nothing, where=denominator > 0))


def _percentiles(replicates: Floats) -> tuple[float, float] | None:
    defined = replicates[np.isfinite(replicates)]
    if not len(defined):
        return None
    low, high = np.percentile(defined, _INTERVAL)
    return float(low), float(high)
