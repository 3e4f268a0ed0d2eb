"""A node that dies when it is told to: the program that test_crash.py starts.

A server that has imported everything and computed nothing forks one process for each order on its
socket. That process is a shipped node, gate and all, behind `client.app.answer`. It is watched by
what interpreter, SQLite, torch and logging offer to anybody: audit events of its files (PEP 578),
statements as they begin, steps of an optimiser, records of its log. At the event that a request
names, it kills itself with SIGKILL: nothing is flushed, closed or rolled back.

With each request comes the event at which to die, or none, and the number of the event at which to
wait for the test, or 0. To the test go frames, a letter and
content:

    E  an event, just before what it names    X  the event at which it dies
    L  a reply: these bytes have left         D  a text of its log, to find out what went wrong
    G  a step's noised gradient, and the sum of clipped ones that it was made from; float32
"""

from __future__ import annotations

import gc
import json
import logging
import os
import re
import signal
import socket
import sqlite3
import sys
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import torch._dynamo  # which torch itself imports at an optimiser's first step
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
from flwr.proto.recorddict_pb2 import RecordDict as RecordDictProto
from safetensors.numpy import save
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from client.app import answer, open_node
from client.gate import Gate, Site
from client.home import NodeHome, cohort_digest, compute_of
from client.ledger import Attempt, Ledger, TaskKey
from client.training import LocalTrainer
from common.accounting import SubsampledGaussian
from common.cohort import Cohort
from common.errors import CloisterError
from common.noise import Keystream
from common.spec import RunSpec

_SQL = re.compile(r"(BEGIN|COMMIT|ROLLBACK)|INSERT INTO entry VALUES *\( *[0-9.]+, *'(\w+)'")


class Watch:
    """Tells every event of this process on `line`, and kills it at the one that it is told."""

    def __init__(self, home: Path, line: Connection) -> None:
        self._home, self._line = str(home), line
        self._databases: list[sqlite3.Connection] = []
        self._seen: Counter[str] | None = None
        self._last = self._statement = ""
        self._end: list[Any] | None = None
        self._hold = 0
        self._in_step = False

    def begin(self, end: list[Any] | None, hold: int) -> None:
        """A request comes in: count from here.

        Die at the event `end`, a name and a number; at the event number `hold` wait for a word.
        """
        for database in self._databases:
            with suppress(sqlite3.ProgrammingError):  # closed by now
                database.set_trace_callback(self._sql)
        self._seen, self._last, self._end, self._hold = Counter(), "", end, hold
        self._in_step = False

    def see(self, event: str) -> None:
        """It is about to happen. One file opened is heard twice where Python opens it by a way."""
        if self._seen is None or (event == self._last and event.startswith("open")):
            return
        self._last = event
        self._seen[event] += 1
        here = [event, self._seen[event]]
        if here == self._end:
            self.tell("X", json.dumps(here).encode())
            os.kill(os.getpid(), signal.SIGKILL)
        self.tell("E", json.dumps(here).encode())
        if self._seen.total() == self._hold:
            self._line.recv_bytes()

    def tell(self, kind: str, content: bytes) -> None:
        self._line.send_bytes(kind.encode() + content)

    def listen(self) -> None:
        """From here on, for the life of this process."""
        sys.addaudithook(self._audit)
        register_module_forward_pre_hook(self._network)
        register_optimizer_step_pre_hook(self._step)
        register_optimizer_step_post_hook(self._stepped)
        log = logging.getLogger("cloister")
        log.setLevel(logging.INFO)
        log.propagate = False
        log.addHandler(_Told(self))

    def _audit(self, event: str, args: tuple[Any, ...]) -> None:
        if event == "sqlite3.connect/handle":
            self._databases.append(args[0])  # not yet open
        elif args and isinstance(args[0], str | os.PathLike):
            path = os.fspath(args[0])
            if path.startswith(self._home):
                name = re.sub("[0-9a-f]{64}|[0-9]+", "N", os.path.basename(path))
                self.see(f"{event} {name}")

    def _sql(self, statement: str) -> None:
        found, again = _SQL.match(statement), statement == self._statement
        self._statement = statement
        if found and not again:  # an insertion is told once more for the trigger that it sets off
            self.see(found[1] or f"INSERT {found[2]}")

    def _network(self, _: Any, inputs: tuple[Any, ...]) -> None:
        outline = any(getattr(each, "is_meta", False) for each in inputs)  # memory is measured
        if not (self._in_step or outline):
            self._in_step = True
            self.see("network")

    def _step(self, optimizer: Any, *_: Any) -> None:
        parameters = optimizer.param_groups[0]["params"]
        for name in ("grad", "summed_grad"):
            if not all(hasattr(parameter, name) for parameter in parameters):
                return
        made = [torch.cat([p.grad.detach().flatten() for p in parameters])]
        made += [torch.cat([p.summed_grad.detach().flatten() for p in parameters])]
        self.tell("G", torch.cat(made).numpy().tobytes())
        self.see("step")

    def _stepped(self, *_: Any) -> None:
        self._in_step = False
        self.see("stepped")


class _Told(logging.Handler):
    """What the node writes into its log is told to the test."""

    def __init__(self, watch: Watch) -> None:
        super().__init__()
        self._watch = watch

    def emit(self, record: logging.LogRecord) -> None:
        self._watch.tell("D", self.format(record).encode())
        if record.levelno == logging.INFO:
            self._watch.see("log")


# --- Nodes that are wrong, each in one way: the matrix must find it ------------------------------


class CommitsFirst(Ledger):
    """Books a release before there is one."""

    def reserve(self, task: TaskKey, mechanism: SubsampledGaussian | None, **more: Any) -> Attempt:
        attempt = super().reserve(task, mechanism, **more)
        super().commit(attempt, save({"nothing": np.zeros(1, np.float32)}))
        return attempt

    def commit(self, attempt: Attempt, release: bytes) -> None:
        """It is booked already."""


class RepliesFirst(Ledger):
    """Books a release when the next task comes in."""

    waiting: tuple[Attempt, bytes] | None = None

    def commit(self, attempt: Attempt, release: bytes) -> None:
        self.waiting = attempt, release

    def check_witness(self, token: str) -> None:
        if self.waiting is not None:
            super().commit(*self.waiting)
            self.waiting = None
        super().check_witness(token)


class RetriesForNothing(Ledger):
    """Trains again on the booking of the attempt that was killed."""

    def reserve(self, task: TaskKey, mechanism: SubsampledGaussian | None, **more: Any) -> Attempt:
        made = self.book.attempts_of(task.run).items()
        known = [number for number, of in made if of == (task.part, task.round_number)]
        return Attempt(known[0], task) if known else super().reserve(task, mechanism, **more)


def with_ledger(kind: type[Ledger]) -> Callable[[Path], Gate]:
    """A node in which the ledger alone is another."""

    class Home(NodeHome):
        kept_by: ClassVar[type[Ledger]] = kind

        def ledger(self) -> Ledger:
            return self.kept_by(self.place)

    return lambda path: Home.open(path).gate()


def keyed_by_task(path: Path) -> Gate:
    """A node whose second attempt at a task draws what the first one drew."""
    home = NodeHome.open(path)
    cohort = Cohort.open(home.cohort_path)

    def trainer_for(spec: RunSpec, mechanism: SubsampledGaussian | None) -> LocalTrainer:
        size, compute = home.policy.declared_size, compute_of(home.policy)
        return LocalTrainer(spec, cohort, declared_size=size, mechanism=mechanism, compute=compute)

    def keystream(*, run_id: str, round_number: int) -> Keystream:
        return Keystream.seeded(7, run_id, round_number)

    site = Site(home.policy, home.ledger(), cohort_digest(home.cohort_path), home.requests)
    return Gate(site, trainer_for=trainer_for, keystream=keystream)


NODES: dict[str, Callable[[Path], Gate]] = {
    "shipped": open_node,
    "commits first": with_ledger(CommitsFirst),
    "replies first": with_ledger(RepliesFirst),
    "retries for nothing": with_ledger(RetriesForNothing),
    "keyed by task": keyed_by_task,
}


# --- The processes -------------------------------------------------------------------------------


def live(node: Callable[[Path], Gate], home: Path, line: Connection) -> None:
    """Answer what comes in, until nobody asks any more."""
    watch = Watch(home, line)
    watch.listen()
    gate = cache(lambda: node(home))
    try:
        gate()
    except CloisterError as error:  # each request will be refused
        watch.tell("D", str(error).encode())
    while True:
        end, hold = json.loads(line.recv_bytes())
        asked = recorddict_from_proto(RecordDictProto.FromString(line.recv_bytes()))
        watch.begin(end, hold)
        reply = recorddict_to_proto(answer(asked, gate))
        watch.see("reply")
        watch.tell("L", reply.SerializeToString(deterministic=True))
        watch.see("replied")
        watch.see("ready")


def serve(orders: socket.socket) -> None:
    """Fork a node for each order: which one, where it lives, and the line to the test."""
    torch.set_num_threads(1)
    torch.backends.mkldnn.set_flags(False)  # for a few small steps its setting up is half the time
    gc.freeze()  # what is shared with every node is looked at by none
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the system reaps the dead
    threads = len(os.listdir("/proc/self/task")) if os.path.isdir("/proc/self/task") else 1
    while True:
        order, lines, _, _ = socket.recv_fds(orders, 2**16, 1)
        if not order:
            os._exit(0)
        wanted = json.loads(order)
        if os.fork() == 0:
            orders.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            try:
                with Connection(lines[0]) as line:
                    line.send_bytes(json.dumps([os.getpid(), threads]).encode())
                    live(NODES[wanted["node"]], Path(wanted["home"]), line)
            except (EOFError, BrokenPipeError, ConnectionResetError):
                os._exit(0)
            except BaseException:
                logging.exception("the node failed where no node may")
            os._exit(1)
        os.close(lines[0])


if __name__ == "__main__":
    serve(socket.socket(fileno=int(sys.argv[1])))
