from __future__ import annotations

from common.spec import Task
from common.tasks import words
from common.tasks.estimates import Estimate


def test_estimates():
    assert words.estimate(Estimate(0.5, 0.25, 0.75)) == "0.500 (0.250 to 0.750)"
    assert words.estimate(Estimate(0.5), digits=1) == "0.5"
    assert words.estimate(Estimate(None)) == "–"


def test_counts():
    assert words.counted(1, "site") == "1 site"
    assert words.counted(1200, "image") == "1,200 images"


def test_a_task_is_named_as_people_do():
    assert words.task(Task(name="classification", kind="binary")) == "binary classification"
    assert words.task(Task(name="segmentation", kind="mask")) == "segmentation"
