from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import pytest

from common.spec import Metric, Task
from common.tasks.estimates import Estimate
from server import wording


@pytest.mark.parametrize(
    ("value", "printed"),
    [(2.99, "2.99"), (2.9901, "3.00"), (3.0, "3.00"), (0.0, "0.00"), (0.001, "0.01"), (None, "–")],
)
def test_epsilon_is_rounded_up(value, printed):
    assert wording.epsilon(value) == printed


@pytest.mark.parametrize(
    ("value", "printed"),
    [(1e-5, "10⁻⁵"), (4e-4, "4 × 10⁻⁴"), (1.25e-4, "1.25 × 10⁻⁴"), (0, "0"), (None, "–")],
)
def test_small_numbers(value, printed):
    assert wording.scientific(value) == printed


@pytest.mark.parametrize(
    ("seconds", "printed"),
    [(0.25, "0.2 s"), (59.9, "59.9 s"), (87.2, "1 min 27 s"), (3600, "1 h 0 min")],
)
def test_durations(seconds, printed):
    assert wording.duration(seconds) == printed


def test_estimates():
    plain, level = Metric("Dice"), Metric("PSNR", unit="dB")
    assert wording.estimate(Estimate(0.5, 0.25, 0.75), plain) == "0.500 (0.250 to 0.750)"
    assert wording.estimate(Estimate(0.5), plain) == "0.500"
    assert wording.estimate(Estimate(None), plain) == "–"
    assert wording.estimate(Estimate(27.305, 26, 28.5), level) == "27.30 dB (26.00 to 28.50)"
    assert wording.estimate(Estimate(None), level) == "–"


@pytest.mark.parametrize(
    ("value", "printed"),
    [(True, "yes"), (None, "–"), ((0.5, 1.0), "0.5, 1"), ("pad", "pad"), (60.0, "60"), (3, "3")],
)
def test_settings(value, printed):
    assert wording.setting(value) == printed


@pytest.mark.parametrize(
    ("names", "printed"),
    [(["a"], "a"), (["a", "b"], "a and b"), (["a", "b", "c"], "a, b and c")],
)
def test_names(names, printed):
    assert wording.listed(names) == printed


def test_metrics_say_what_is_not_in_their_title():
    class Toy(Task):
        METRICS: ClassVar[Mapping[str, Metric]] = {
            "a": Metric("Error", lower_is_better=True),
            "b": Metric("Fit", note="Above 1 is luck."),
            "c": Metric("Distance", lower_is_better=True),
        }

    said = wording.metric_notes(Toy(name="toy", kind="none"))
    assert said == "Lower is better: Error and Distance. Above 1 is luck."
    Toy.METRICS = {"b": Metric("Fit")}
    assert wording.metric_notes(Toy(name="toy", kind="none")) == ""
