from __future__ import annotations

import pytest

from common.spec import Metric, Task
from common.tasks import words
from common.tasks.estimates import Estimate

PX, PERCENT, DECIBELS, PLAIN = (Metric("A", unit=unit) for unit in ("px", "%", "dB", ""))


@pytest.mark.parametrize(
    ("metric", "found", "printed"),
    [
        (PLAIN, Estimate(0.5, 0.25, 0.75), "0.500 (0.250 to 0.750)"),
        (PLAIN, Estimate(0.94849, 0.93049, 0.96451), "0.948 (0.930 to 0.965)"),
        (PLAIN, Estimate(None), "–"),
        (PLAIN, Estimate(0.0), "0.000"),
        (PLAIN, Estimate(0.5), "0.500"),
        # an interval is seen to have a width
        (PLAIN, Estimate(0.0031, 0.0029, 0.0033), "0.0031 (0.0029 to 0.0033)"),
        (PLAIN, Estimate(0.00312, 0.003104, 0.003136), "0.00312 (0.00310 to 0.00314)"),
        (PLAIN, Estimate(0.881, 0.879, 0.883), "0.881 (0.879 to 0.883)"),
        (DECIBELS, Estimate(-0.059, -0.127, 0.007), "−0.06 (−0.13 to 0.01)"),
        # one that has none says nothing
        (PLAIN, Estimate(1.0, 1.0, 1.0), "1.000"),
        (PERCENT, Estimate(0.0, 0.0, 0.0), "0.0"),
        (PLAIN, Estimate(0.25, 0.25, 0.25 + 1e-9), "0.250"),
        # a small figure alone has two that are not zero, but no more than six digits
        (PLAIN, Estimate(0.003), "0.0030"),
        (PLAIN, Estimate(0.0000005), "0.000000"),
        # nothing is less than nothing
        (PLAIN, Estimate(-0.0001, -0.004, 0.003), "0.000 (−0.004 to 0.003)"),
        (DECIBELS, Estimate(-0.004, -0.5, 0.5), "0.00 (−0.50 to 0.50)"),
        (DECIBELS, Estimate(-1.83, -1.92, -1.72), "−1.83 (−1.92 to −1.72)"),
        # by unit
        (PX, Estimate(12.289, 10.606, 14.194), "12.3 (10.6 to 14.2)"),
        (PERCENT, Estimate(110.433, 95.423, 128.395), "110 (95 to 128)"),
        (PERCENT, Estimate(3851.26, 3500.4, 4237.4), "3851 (3500 to 4237)"),
        (PERCENT, Estimate(-99.96, -103.2, -90), "−100.0 (−103.2 to −90.0)"),
        (Metric("A", unit="ml"), Estimate(195.306, 149.65, 228.91), "195.3 (149.7 to 228.9)"),
        (DECIBELS, Estimate(22.345, 22.281, 22.409), "22.34 (22.28 to 22.41)"),
        (Metric("Ratio", unit=": 1"), Estimate(16.0), "16.0"),
    ],
)
def test_a_figure_has_as_many_digits_as_it_says_something_by(metric, found, printed):
    assert words.estimate(found, words.digits(metric)) == printed


def test_digits_are_as_many_as_asked_for_where_there_is_no_more_to_say():
    assert words.estimate(Estimate(0.52), digits=2) == "0.52"
    assert words.number(-0.0001) == "0.000"
    assert words.number(None) == "–"
    assert words.interval(Estimate(0.5)) == ""


def test_counts():
    assert words.counted(1, "site") == "1 site"
    assert words.counted(1200, "image") == "1,200 images"


def test_a_task_is_named_as_people_do():
    assert words.task(Task(name="classification", kind="binary")) == "binary classification"
    assert words.task(Task(name="segmentation", kind="mask")) == "segmentation"
