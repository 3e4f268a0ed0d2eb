"""One pass over what is open at a desk: read in processes, committed in order, batch by batch."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

from client.intake.desk import Desk, Row, State
from client.intake.dicom import FileResult, Task
from client.intake.items import Item
from client.intake.pool import Bounds, WorkerLostError
from client.intake.run import Progress

_LONGEST_BATCH = 1.0
"""Seconds of work that a killed intake does again at most, but for the object it was at."""
Reader = Callable[[Task], FileResult]
"""What is done with one object."""
CHANGED = "its bytes are no longer those that a person decided on: look at it again"
COPY = "a copy of an image already taken in"
NO_PATIENT = "no patient identifier"


class Mapper(Protocol):
    """Reads objects, however many at a time: a `Pool`."""

    def map(self, tasks: Iterable[Task]) -> Iterator[FileResult | WorkerLostError]:
        """What became of each, in the order of the tasks."""


Workers = Callable[[Reader, int, Bounds], AbstractContextManager[Mapper]]
"""Makes a `Mapper`."""


class Sink(Protocol):
    """Where the images of objects go."""

    def take(self, result: FileResult) -> Sequence[Row]:
        """Put the images of one object there, but copies; what was put, in order."""

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
        sink: takes their images.
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

    def through(self, numbers: Sequence[int], *, without_patient: bool = False) -> None:
        """Read these objects and record what becomes of each."""
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
        lost = isinstance(answer, WorkerLostError)
        result = FileResult(reason=str(answer)) if isinstance(answer, WorkerLostError) else answer
        told = None if lost else self.desk.decision_of(self.desk.entry(number))
        if told and self.desk.content_id(result.content) != told[1]:
            result = replace(result, images=(), reason=CHANGED, reviewable=True)
        rows = self.sink.take(result)
        state = _state(result, rows)
        reason = COPY if state is State.COPY else result.reason
        return _Told(number, state, replace(result, images=(), reason=reason), rows)

    def _commit(self, batch: Sequence[_Told]) -> None:
        if not batch:
            return
        self.sink.flush()
        self.desk.record(batch)
        self._done += sum(told.state is not State.ASIDE for told in batch)
        if self.progress is not None:
            self.progress(min(self._done, self._total), self._total)

    def those_aside(self) -> str:
        """Settle those that name no patient, now that all others are seen.

        If any object names a patient, they cannot be used; if none does, the source has no
        patients to protect by name.

        Returns:
            What a pseudonym stands for: ``patient`` or ``image``.
        """
        aside = self.desk.numbers(State.ASIDE)
        if not self.desk.names_patients():
            self.through(aside, without_patient=True)
            return "image" if aside or self.desk.setting("unit") == "image" else "patient"
        refused = FileResult(reason=NO_PATIENT)
        for start in range(0, len(aside), self.batch):
            some = aside[start : start + self.batch]
            self._commit([_Told(number, State.REFUSED, refused, ()) for number in some])
        return "patient"


def _state(result: FileResult, rows: Sequence[Row]) -> State:
    if result.reason:
        return State.WAITS if result.reviewable else State.REFUSED
    if result.put_aside:
        return State.ASIDE
    if rows:
        return State.KEPT
    return State.COPY if result.images or result.written else State.IGNORED
