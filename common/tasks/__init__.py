"""The registry of tasks.

A new task is one file with two classes, and one line in the table below: its *section*, which
says what may stand in a run's file and is read without torch by policy, ledger and intake, and
its *behaviour* (`common.tasks.task.Task`). The table names classes instead of importing them:
a run has one task, and torch takes seconds to import.
"""

from __future__ import annotations

import pkgutil
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from common import spec as specs
    from common.tasks.task import Task


class TaskEntry(NamedTuple):
    """One line of the registry, each as ``module:class``.

    Attributes:
        section: a `common.spec.Task`, found without importing torch.
        behaviour: a `common.tasks.task.Task`.
    """

    section: str
    behaviour: str


TASKS = {
    "classification": TaskEntry(
        "common.task_sections:Classification", "common.tasks.classification:Classification"
    ),
    "segmentation": TaskEntry(
        "common.task_sections:Segmentation", "common.tasks.segmentation:Segmentation"
    ),
    "detection": TaskEntry("common.task_sections:Detection", "common.tasks.detection:Detection"),
    "reconstruction": TaskEntry(
        "common.task_sections:Reconstruction", "common.tasks.reconstruction:Reconstruction"
    ),
    "generation": TaskEntry(
        "common.task_sections:Generation", "common.tasks.generation:Generation"
    ),
}


def section_for(name: str) -> type[specs.Task]:
    """The class of ``[task]`` in a run's file whose ``task.name`` is `name`, one of `TASKS`."""
    section: type[specs.Task] = pkgutil.resolve_name(TASKS[name].section)
    return section


def task_for(spec: specs.RunSpec) -> Task:
    """The task that a run's spec describes."""
    task: Task = pkgutil.resolve_name(TASKS[spec.task.name].behaviour)(spec)
    return task
