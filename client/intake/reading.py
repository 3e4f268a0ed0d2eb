"""One pass over what is open at a desk: read in processes, committed in order, batch by batch."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

from client.intake.desk import Desk, Row, State
from client.intake.dicom import FileResult, Task, Written
from client.intake.items import Item
from client.intake.pool import Bounds, WorkerLostError
from client.intake.run import Progress
from client.intake.source import Kept
from common.errors import CohortError

_LONGEST_BATCH = 1.0
"""Seconds of work that a killed intake does again at most, but for the object it was at."""
Reader = Callable[[Task], FileResult]
"""What is done with one object."""
CHANGED = "its bytes are no longer those that a person decided on: look at it again"
COPY = "a copy of an image already taken in"
NO_PATIENT = "no patient identifier"
OTHER = (
    "its SOP Instance UID is that of another image already taken in, and it is not the same one: "
    "one of the two has a wrong UID, or was changed"
)
REJECTED = "a person rejected the same bytes under another name"


class Mapper(Protocol):
    """Reads objects, however many at a time: a `Pool`."""

    def map(self, tasks: Iterable[Task]) -> Iterator[FileResult | WorkerLostError]:
        """What became of each, in the order of the tasks."""


Workers = Callable[[Reader, int, Bounds], AbstractContextManager[Mapper]]
"""Makes a `Mapper`."""


class Sink(Protocol):
    """Where what is made of objects goes."""

    def take(self, result: FileResult, new: Collection[str]) -> Sequence[Row]:
        """Put there what was made of one object, but nothing whose instance is not in `new`.

        Returns:
            What was put, in order.
        """

    def flush(self) -> None:
        """Return when all of them are on the disk."""


class _Told(NamedTuple):
    number: int
    state: State
    result: FileResult
    rows: Sequence[Row]


@dataclass
class Reading:
    """Reads objects of a desk.

    Args:
        desk: whose objects they are.
        items: each object's item, by number.
        pool: of workers that read.
        sink: takes what is made of them.
        batch: how many objects are committed together at most.
        progress: called with the objects that were read, and those to read.
    """

    desk: Desk
    items: Mapping[int, Item]
    pool: Mapper
    sink: Sink
    batch: int
    progress: Progress | None

    def __post_init__(self) -> None:
        self._done = 0
        self._total = len(self.desk.numbers(State.OPEN, State.ASIDE))
        self._pending: dict[str, Row] = {}

    def through(self, numbers: Sequence[int], *, without_patient: bool = False) -> None:
        """Read these objects and record what becomes of each.

        Raises:
            CohortError: if the disk refuses, or something else that is no object's own fault.
        """
        batch: list[_Told] = []
        began = time.monotonic()
        tasks = (self._task(number, without_patient) for number in numbers)
        for number, answer in zip(numbers, self.pool.map(tasks), strict=True):
            batch.append(self._told(number, answer))
            now = time.monotonic()
            if len(batch) >= self.batch or now - began > _LONGEST_BATCH:
                self._commit(batch)
                batch, began = [], now
        self._commit(batch)

    def _task(self, number: int, without_patient: bool) -> Task:
        told = self.desk.decision_of(self.desk.entry(number))
        return Task(self.items[number], told and told[0], without_patient)

    def _told(self, number: int, answer: FileResult | WorkerLostError) -> _Told:
        """What is said of an object; its images are in the sink already, and not held here."""
        if isinstance(answer, WorkerLostError):
            return _Told(number, State.REFUSED, FileResult(reason=str(answer)), ())
        if answer.failure:
            raise CohortError(
                f"{self.desk.path}: {answer.failure}; the object at hand was not recorded: see to "
                "it, and start again"
            )
        known = {made.record.instance: self._row_of(made) for made in answer.made}
        state, reason = self._judged(number, answer, known)
        kept = state is State.KEPT
        new = {instance for instance, row in known.items() if kept and row is None}
        rows = self.sink.take(answer, new)
        self._pending |= {row.record.instance: row for row in rows}
        return _Told(number, state, replace(answer, images=(), written=None, reason=reason), rows)

    def _row_of(self, made: Kept | Written) -> Row | None:
        """What is there already under its instance."""
        instance = made.record.instance
        return self._pending.get(instance) or self.desk.row(instance)

    def _judged(
        self, number: int, answer: FileResult, known: Mapping[str, Row | None]
    ) -> tuple[State, str]:
        """Where an object stands now, and why nothing of it is kept."""
        told = self.desk.decision_of(self.desk.entry(number))
        content = self.desk.content_id(answer.content)
        if told and content and content != told[1]:
            return State.WAITS, CHANGED
        if not told and self.desk.is_rejected(content):
            return State.REJECTED, REJECTED
        if answer.reason:
            return State.WAITS if answer.reviewable else State.REFUSED, answer.reason
        if not answer.made:
            return State.ASIDE if answer.put_aside else State.IGNORED, ""
        if not all(_same(made, known[made.record.instance]) for made in answer.made):
            return State.REFUSED, OTHER
        return (State.COPY, COPY) if all(known.values()) else (State.KEPT, "")

    def _commit(self, batch: Sequence[_Told]) -> None:
        if not batch:
            return
        self.sink.flush()
        self.desk.record(batch)
        self._pending.clear()  # the journal knows them from here on
        self._done += sum(told.state is not State.ASIDE for told in batch)
        if self.progress is not None:
            self.progress(min(self._done, self._total), self._total)

    def refuse(self, numbers: Sequence[int], reason: str) -> None:
        """Record that nothing of these objects can be kept."""
        refused = FileResult(reason=reason)
        for start in range(0, len(numbers), self.batch):
            some = numbers[start : start + self.batch]
            self._commit([_Told(number, State.REFUSED, refused, ()) for number in some])


def _same(made: Kept | Written, row: Row | None) -> bool:
    """Whether a row is of what was made, if there is one; a UID alone proves nothing."""
    if row is None:
        return True
    return (made.record.patient, made.sha256) == (row.record.patient, row.sha256)
