"""Worker processes that can be lost: what kills one costs the object it was at, and no other.

Codecs are native code, and the bytes they get may be hostile: one that crashes, never ends, or
takes all memory ends its own process. The kernel holds each worker to its time (SIGALRM, which
native code cannot put off) and to its memory (RLIMIT_DATA); the parent notices that it is gone,
and gives the task to another: the system or a person may have ended the first one for no fault of
the task. Lost twice, the task is given up, with the reason. A worker whose parent is gone finds
its pipe closed and ends.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import resource
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from types import TracebackType
from typing import Any, Generic, NamedTuple, Self, TypeVar

from common.errors import CloisterError, RunError

T = TypeVar("T")
R = TypeVar("R")

_PRELOADED = ["client.intake.dicom"]


@dataclass(frozen=True)
class Bounds:
    """What tasks may take.

    Attributes:
        seconds: of one task.
        memory: bytes of one task, beside the program's own.
        ahead: tasks a worker whose answers may wait for an earlier one: they bound what lies in
            memory.
    """

    seconds: int = 300
    memory: int = 4 * 2**30
    ahead: int = 4


class WorkerLostError(CloisterError):
    """The worker ended before it answered; the text is the reason."""


class _Asked(NamedTuple, Generic[T]):
    number: int
    task: T
    again: bool = False


@dataclass
class _Worker(Generic[T]):
    process: BaseProcess
    pipe: Connection
    asked: _Asked[T] | None = None


class Pool(Generic[T, R]):
    """A job in several processes; use it as a context manager.

    Args:
        job: is sent to each worker once; takes a task and raises nothing.
        workers: how many processes; at least 1.
        bounds: what a task may take.
    """

    def __init__(self, job: Callable[[T], R], workers: int, bounds: Bounds) -> None:
        self._job = job
        self._bounds = bounds
        # Not by fork: the parent shows progress from a thread, and a forked lock stays locked.
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(_PRELOADED)
        self._workers = [self._started() for _ in range(max(1, workers))]
        for worker in self._workers:
            _wait_until_ready(worker)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for worker in self._workers:
            _ended(worker)

    def map(self, tasks: Iterable[T]) -> Iterator[R | WorkerLostError]:
        """The answers in the order of the tasks; one that lost two workers has the error why.

        Tasks are drawn as workers become free, a few ahead of the answer that is next.
        """
        source = enumerate(tasks)
        answers: dict[int, R | WorkerLostError] = {}
        expected: deque[int] = deque()
        while True:
            for worker in self._workers:
                room = len(expected) < self._bounds.ahead * len(self._workers)
                if worker.asked is None and room and (drawn := next(source, None)) is not None:
                    expected.append(drawn[0])
                    _ask(worker, _Asked(*drawn))
            if not expected:
                return
            answers |= self._answered()
            while expected and expected[0] in answers:
                yield answers.pop(expected.popleft())

    def _answered(self) -> dict[int, R | WorkerLostError]:
        """Wait for one answer or a loss; a lost worker is replaced."""
        busy = {worker.pipe: worker for worker in self._workers if worker.asked is not None}
        answers: dict[int, R | WorkerLostError] = {}
        for pipe in wait(list(busy)):
            worker = busy[pipe]  # type: ignore[index]  # what went in comes out
            asked, worker.asked = worker.asked, None
            if asked is None:
                continue
            try:
                answers[asked.number] = worker.pipe.recv()
            except (EOFError, OSError):
                reason = self._loss(worker)
                fresh = self._replaced(worker)
                if asked.again:
                    answers[asked.number] = WorkerLostError(reason)
                else:
                    _ask(fresh, asked._replace(again=True))
        return answers

    def _replaced(self, worker: _Worker[T]) -> _Worker[T]:
        self._workers[self._workers.index(worker)] = fresh = self._started()
        _wait_until_ready(fresh)
        return fresh

    def _started(self) -> _Worker[T]:
        ours, theirs = self._context.Pipe()
        process = self._context.Process(
            target=_serve, args=(theirs, self._job, self._bounds), daemon=True
        )
        process.start()
        theirs.close()
        return _Worker(process, ours)

    def _loss(self, worker: _Worker[T]) -> str:
        worker.process.join()
        worker.pipe.close()
        code = worker.process.exitcode or 0
        if code == -signal.SIGALRM:
            return f"it took more than {self._bounds.seconds} s"
        how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        return f"the process that read it ended ({how}): most likely a codec that it crashed"


def _ask(worker: _Worker[T], asked: _Asked[T]) -> None:
    worker.asked = asked
    with suppress(OSError):  # it is gone: its pipe says so when it is read
        worker.pipe.send(asked.task)


def _wait_until_ready(worker: _Worker[Any]) -> None:
    try:
        worker.pipe.recv()
    except (EOFError, OSError) as error:
        raise RunError(
            "a worker process of the intake does not start; is there memory left, and is the "
            "installation whole? `--workers 1` takes the least"
        ) from error


def _ended(worker: _Worker[Any]) -> None:
    """End a worker, whatever it is at."""
    worker.pipe.close()
    worker.process.kill()
    worker.process.join()


def _serve(pipe: Connection, job: Callable[[Any], Any], bounds: Bounds) -> None:
    """What a worker does until its pipe is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends it
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    limit = bounds.memory + _data_now()
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a core file would hold patients' data
    _say_nothing()
    gc.freeze()
    try:
        pipe.send(True)
        while True:
            task = pipe.recv()
            signal.alarm(bounds.seconds)
            answer = job(task)
            signal.alarm(0)
            pipe.send(answer)
    except (EOFError, OSError):
        os._exit(0)  # the parent is gone, or has enough
    except BaseException:  # noqa: BLE001
        os._exit(os.EX_SOFTWARE)  # without a word: what went wrong may quote what it read


def _say_nothing() -> None:
    """Codecs write to the terminal what they think of a file, and quote it."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(nowhere, stream)


def _data_now() -> int:
    """Bytes of memory that this process has for itself, as RLIMIT_DATA counts (proc(5), VmData)."""
    with open("/proc/self/status", encoding="ascii") as status:
        for line in status:
            if line.startswith("VmData:"):
                return int(line.split()[1]) * 1024
    return 0
