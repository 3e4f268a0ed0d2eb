from __future__ import annotations

import pytest

from common.spec import Metric
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
    assert wording.estimate(Estimate(0, 0, 0), Metric("Copies", unit="%")) == "0.0 %"


def test_an_interval_without_a_width_says_so_in_words():
    metric = Metric("Copies", unit="%")
    assert wording.interval(Estimate(0, 0, 0), metric) == wording.SAME
    assert wording.interval(Estimate(0), metric) == ""
    assert wording.interval(Estimate(1, 0.5, 2), metric) == "0.5 to 2.0"


def test_two_figures_in_one_line_have_the_same_digits():
    error = Metric("Mean squared error")
    test, validation = Estimate(0.0031, 0.0029, 0.0033), Estimate(0.012, 0.001, 0.023)
    assert wording.figure(validation, error) == "0.012"
    assert wording.figure(validation, error, test) == "0.0120"


@pytest.mark.parametrize(
    ("value", "printed"),
    [
        (True, "yes"),
        (None, "–"),
        ("", "–"),
        ((0.5, 1.0), "0.5, 1"),
        ("pad", "pad"),
        (60.0, "60"),
        (3, "3"),
    ],
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
    error, distance = (Metric(title, lower_is_better=True) for title in ("Error", "Distance"))
    fit = Metric("Fit", note="Above 1 is luck.")
    said = wording.metric_notes([error, fit, distance])
    assert said == "Lower is better: Error and Distance. Above 1 is luck."
    assert wording.metric_notes([Metric("Fit")]) == ""
