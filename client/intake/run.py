"""Taking a source in: the one way from images of any format to a cohort."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from pathlib import Path

from client.intake.builder import CohortBuilder
from client.intake.source import Kept, NotUsed, Source
from client.intake.summary import CohortSummary, summarise
from common.cohort import Cohort, CohortMeta
from common.spec import RunSpec

Progress = Callable[[int, int], None]
"""Called with the steps done and the steps expected."""


@dataclass(frozen=True)
class IntakeSummary:
    """What an intake has done; for the hospital's own eyes.

    Attributes:
        cohort: the directory that was written.
        contents: what is in it.
        not_used: what of the source is not in it, each with a reason.
    """

    cohort: Path
    contents: CohortSummary
    not_used: tuple[NotUsed, ...]


def intake(
    source: Source,
    cohort_path: Path,
    spec: RunSpec,
    *,
    progress: Progress | None = None,
    today: date | None = None,
) -> IntakeSummary:
    """Write the cohort of a source.

    The cohort appears under its name when it is complete, and not at all after an error. A
    second image of the same instance is a copy and is not used. A cohort that is empty or has
    one class is written all the same: `CohortSummary.warnings` says so, and a person decides.

    Args:
        source: where the images come from.
        cohort_path: a directory that does not exist yet.
        spec: the run that the cohort is for: its classes and its input.
        progress: called after every step.
        today: the date that the cohort bears; today's if none is given.

    Raises:
        CohortError: if the cohort cannot be written.
        DataError: if the source as a whole cannot be used.
    """
    not_used: list[NotUsed] = []
    seen: set[bytes] = set()
    with CohortBuilder(cohort_path, spec.input.shape, task=spec.task) as builder:
        for done, step in enumerate(source.steps(), start=1):
            not_used += step.not_used
            for image in step.images:
                if _is_new(image, seen):
                    builder.add(image.record, image.pixels, image.mask)
                else:
                    not_used.append(NotUsed(step.what, "a copy of an image already taken in"))
            if progress is not None:
                progress(min(done, len(source)), len(source))
        created = (today or date.today()).isoformat()
        meta = CohortMeta.of(spec, unit=source.unit, source=source.kind, created=created)
        builder.finish(meta)
    return IntakeSummary(cohort_path, summarise(Cohort.open(cohort_path)), tuple(not_used))


def _is_new(image: Kept, seen: set[bytes]) -> bool:
    instance = bytes.fromhex(image.record.instance)
    known = instance in seen
    seen.add(instance)
    return not known
