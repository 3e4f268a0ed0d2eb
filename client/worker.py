"""The process in which a node's requests are answered: long-lived, warm, and expendable.

It is forked from a server that has imported everything and computed nothing (multiprocessing's
*forkserver*), so that no thread, lock or device is shared, and CUDA may be used in it. It holds the
node's folder (`client.app.open_node`), opens what the coordinator sent, and answers it. One that
crashes, hangs or takes too much memory takes one request with it; another one is started then.
What was booked in the ledger for that request stays booked.

A worker whose node is gone ends at once: it holds one end of a pipe whose other end the node has.
"""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import NamedTuple

from common.errors import CloisterError, ConfigError, LedgerError
from common.noise import KeystreamSource, fresh_keystream
from common.parcel import Parcel

log = logging.getLogger("cloister.node")

PRELOADED = ["client.answering", "torch._dynamo"]
"""What the fork server imports; the last is what torch imports at an optimiser's first step."""
STARTING = 600.0
"""Seconds for the first worker: it imports torch, and verifies every entry of the ledger."""

_TURN = 0.2
_FIRST_TO_DIE = "500"  # proc(5), oom_score_adj: when memory ends, the worker and not the node


class WorkerLostError(CloisterError):
    """The worker ended before it answered, or had to be ended; the text is the reason."""


class AbandonedError(CloisterError):
    """Somebody wants the node to stop; the worker was ended."""


class Asked(NamedTuple):
    """A request of a known kind, unopened; or the answer to it."""

    kind: str
    parcel: Parcel


@dataclass(frozen=True)
class Bounds:
    """What a worker may take: bytes of memory beside what it takes at its start; None: all."""

    memory: int | None = None


class Worker:
    """One worker at a time for the node in `home`; use it as a context manager.

    Args:
        home: the node's folder.
        bounds: what it may take.
        keystream: as `client.gate.Gate`; a node leaves it at its default.
    """

    def __init__(
        self,
        home: Path,
        bounds: Bounds | None = None,
        keystream: KeystreamSource = fresh_keystream,
    ) -> None:
        self._home, self._bounds, self._keystream = home, bounds or Bounds(), keystream
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(PRELOADED)
        self._process: BaseProcess | None = None
        self._pipe: Connection | None = None
        self._lifeline: Connection | None = None

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    @property
    def pid(self) -> int | None:
        """Of the process; None if there is none."""
        return None if self._process is None else self._process.pid

    def start(self, stopping: Callable[[], bool] = lambda: False) -> None:
        """Start the process, and wait until it has opened the node; nothing if it is there.

        Raises:
            ConfigError, CohortError: if the folder is not in order.
            LedgerError: if the ledger cannot be relied on.
            WorkerLostError: if it cannot be started, or does not come up.
            AbandonedError: if the node is to stop meanwhile.
        """
        if self._process is not None and self._process.is_alive():
            return
        self.end()
        try:
            self._process = self._forked()
        except (OSError, EOFError) as error:
            self.end()
            raise WorkerLostError(
                f"no worker can be started ({type(error).__name__}: {error}): memory, processes or "
                "open files are at their end"
            ) from error
        try:
            said = json.loads(self._heard(time.monotonic() + STARTING, stopping))
        except (WorkerLostError, AbandonedError):
            self.end()
            raise
        if said["error"]:
            self.end()
            raise _ERRORS.get(said["error"], ConfigError)(said["text"])

    def _forked(self) -> BaseProcess:
        self._pipe, theirs = self._context.Pipe()
        self._lifeline, held = self._context.Pipe()
        process = self._context.Process(
            target=_serve,
            args=(theirs, held, self._home, self._bounds, self._keystream),
            daemon=True,
        )
        with theirs, held:
            process.start()
        return process

    def answer(self, asked: Asked, last: float, stopping: Callable[[], bool]) -> Parcel:
        """What the node says to a request.

        Args:
            asked: the request.
            last: until when it may take, by the monotonic clock.
            stopping: whether the node is to stop without the answer.

        Raises:
            WorkerLostError: if the worker died over it, or took too long and was ended.
            AbandonedError: if the node is to stop; the worker was ended.
            ConfigError, CohortError, LedgerError: if a new worker cannot be started.
        """
        self.start(stopping)
        try:
            return self._answered(asked, last, stopping)
        except (WorkerLostError, AbandonedError):
            self.end()
            raise

    def end(self) -> None:
        """End the process, whatever it is at."""
        for pipe in (self._lifeline, self._pipe):
            if pipe is not None:
                pipe.close()
        if self._process is not None:
            self._process.kill()
            self._process.join()
        self._process = self._pipe = self._lifeline = None

    def _answered(self, asked: Asked, last: float, stopping: Callable[[], bool]) -> Parcel:
        sending = threading.Thread(target=self._send, args=(asked,), daemon=True)
        sending.start()  # a worker that reads nothing must not hold the node
        return get(lambda: self._heard(last, stopping)).parcel

    def _send(self, asked: Asked) -> None:
        if self._pipe is not None:
            with suppress(OSError):  # it is gone: its pipe says so when it is read
                put(self._pipe, asked)

    def _heard(self, last: float, stopping: Callable[[], bool]) -> bytes:
        """The next frame from the worker."""
        pipe = self._pipe
        if pipe is None:
            raise WorkerLostError("there is no worker")
        try:
            while not pipe.poll(_TURN):
                if stopping():
                    raise AbandonedError("the node stops")
                if time.monotonic() > last:
                    raise WorkerLostError("the worker took longer than the request is good for")
            return pipe.recv_bytes()
        except (EOFError, OSError):
            raise WorkerLostError(self._loss()) from None

    def _loss(self) -> str:
        code = None
        if self._process is not None:
            self._process.join(5)
            code = self._process.exitcode
        if code is None or code >= 0:
            return f"the worker ended (exit code {code})"
        return (
            f"the worker was ended by {signal.Signals(-code).name}; SIGKILL is what the system "
            "does when memory is short"
        )


_ERRORS: dict[str, type[CloisterError]] = {"ledger": LedgerError, "config": ConfigError}


def put(pipe: Connection, asked: Asked) -> None:
    """Send a parcel, which is empty then."""
    kind, parcel = asked
    head = {"kind": kind, "identity": parcel.identity, "names": list(parcel.objects)}
    pipe.send_bytes(json.dumps(head).encode())
    for name in head["names"]:
        pipe.send_bytes(parcel.objects.pop(str(name)))


def get(frame: Callable[[], bytes]) -> Asked:
    """The parcel that the next frames hold."""
    head = json.loads(frame())
    objects = {name: frame() for name in head["names"]}
    return Asked(head["kind"], Parcel(head["identity"], objects))


def log_to_stderr() -> None:
    """What the node and its worker do, for this hospital's own log; of others, warnings alone."""
    form = "%(asctime)s %(levelname)s %(name)s: %(message)s"
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr, format=form, force=True)
    for own in (log, logging.getLogger("cloister.gate")):
        own.setLevel(logging.INFO)
    logging.getLogger("flwr").setLevel(logging.ERROR)


# --- In the worker ------------------------------------------------------------------------------


def _serve(
    pipe: Connection,
    lifeline: Connection,
    home: Path,
    bounds: Bounds,
    keystream: KeystreamSource,
) -> None:
    """What a worker does until the node is gone, or has enough of it."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # the node ends it
    threading.Thread(target=_end_with, args=(lifeline,), daemon=True).start()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a core file would hold patients' images
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text(_FIRST_TO_DIE)
    log_to_stderr()
    try:
        _work(pipe, home, bounds, keystream)
    except (EOFError, OSError):
        os._exit(0)  # the node is gone, or has enough
    except BaseException:
        log.exception("the worker ends")
        os._exit(os.EX_SOFTWARE)


def _work(pipe: Connection, home: Path, bounds: Bounds, keystream: KeystreamSource) -> None:
    from client import answering  # noqa: PLC0415 - torch is for the worker, not for the node

    found = answering.opened(home, keystream)
    _limit(bounds)
    pipe.send_bytes(json.dumps(found).encode())
    if not found["error"]:
        answering.serve(pipe, home, keystream)


def _end_with(lifeline: Connection) -> None:
    """End this process when the node does, wherever it is then: it answers to nobody."""
    with suppress(EOFError, OSError):
        lifeline.recv_bytes()
    os._exit(0)


def _limit(bounds: Bounds) -> None:
    """Hold this process to its memory, as RLIMIT_DATA counts it (proc(5), VmData)."""
    if bounds.memory is None:
        return
    limit = bounds.memory
    for line in Path("/proc/self/status").read_text("ascii").splitlines():
        if line.startswith("VmData:"):
            limit += int(line.split()[1]) * 1024
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
