"""A federation's messages on one machine: Flower's `Grid`, without SuperLink and without Ray.

Each worker is a warm process that runs the same `ClientApp` as a hospital's node; a message is
serialised as it would be on the wire, and goes through a pipe. Workers are forked from a server
process that has imported everything and computed nothing, so they start at once and no device or
thread pool is shared. A worker that dies takes its message with it: the site's answer is an
error, as it would be in the field, and a new worker stands ready for the next round.

Flower's parts that are not public API are touched here alone: `TaskIdentity`, without which no
`Message` can be made in a process, a message's id, and the conversion to protobuf.
"""

from __future__ import annotations

import itertools
import logging
import os
import signal
import struct
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from importlib import import_module
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

import torch
from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.constant import ErrorCode
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto.message_pb2 import Message as MessageProto
from flwr.proto.node_pb2 import NodeInfo
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from deploy.workers import fork_server

log = logging.getLogger("cloister.simulation")

RUN_ID = 1

_PATIENCE = 1.0
_SERVER_NODE = 0
_HEADER = struct.Struct("<dd")


@dataclass(frozen=True)
class ClientAppAt:
    """Where a ClientApp stands, and the run configuration that its contexts carry.

    Attributes:
        module: to import.
        attribute: the `ClientApp` in it.
        run_config: as `Context.run_config`.
    """

    module: str
    attribute: str
    run_config: dict[str, Any]


@dataclass(frozen=True)
class Timing:
    """How long a worker took for one message, in seconds; for benchmarks of this engine.

    It goes beside the message, not in it: no such figure leaves a node.
    """

    node_id: int
    wall: float
    processor: float


@dataclass
class _Worker:
    """A process and its messages; only the first of them is on its way.

    Were there more in the pipe, both ends could wait for each other to read.
    """

    process: BaseProcess
    pipe: Connection
    pending: list[Message] = field(default_factory=list)

    def send_next(self) -> None:
        """Send the first of the pending messages; that a dead worker cannot take it shows later."""
        if self.pending:
            with suppress(OSError):
                self.pipe.send_bytes(_pack(self.pending[0]))


class LocalGrid(Grid):
    """A `Grid` whose nodes are the sites 0 .. `sites` - 1, served by warm worker processes.

    Use it as a context manager: leaving it ends the workers.

    Args:
        sites: the sites' names, in the order of their partition numbers.
        client_app: what answers.
        workers: processes; 0 runs everything in this one, message by message.
    """

    def __init__(self, sites: Sequence[str], client_app: ClientAppAt, *, workers: int) -> None:
        identify(node_id=_SERVER_NODE)
        self._names = list(sites)
        self._client_app = client_app
        self._numbers = itertools.count(1)
        self._inline: list[Message] = []
        self._done: dict[str, Message] = {}
        self._threads = max(1, (os.cpu_count() or 1) // max(1, workers))
        self._workers = [self._start() for _ in range(workers)]
        self.timings: list[Timing] = []

    def __enter__(self) -> LocalGrid:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the workers; what they were doing is lost, as in a power cut."""
        for worker in self._workers:
            worker.pipe.close()
            worker.process.kill()  # one that hangs or is stopped hears nothing gentler
            worker.process.join()
        self._workers = []

    @property
    def processes(self) -> list[int]:
        """The workers' process ids, in the order of the sites they serve first."""
        return [int(worker.process.pid or 0) for worker in self._workers]

    def context(self, run_config: dict[str, Any]) -> Context:
        """What the ServerApp is called with."""
        return _context(_SERVER_NODE, {}, run_config)

    @property
    def run(self) -> Run:
        """What Flower knows of the run: nothing but an id."""
        return Run.create_empty(RUN_ID)

    def set_run(self, run: Run) -> None:
        """There is one run a grid."""

    def get_node_ids(self) -> Iterable[int]:
        """Node ids: the partition number plus 1."""
        return range(1, len(self._names) + 1)

    def get_nodes(self) -> Iterable[NodeInfo]:
        """The nodes with their sites' names."""
        return [NodeInfo(node_id=n, name=name) for n, name in enumerate(self._names, start=1)]

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """See Flower's `Grid`."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Hand each message to its site's worker; returns the messages' ids."""
        return [self._push(message) for message in messages]

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """The replies that are there, each once; waits a moment for the first."""
        wanted = [identity for identity in message_ids if identity in self._outstanding()]
        ready = self._take(wanted)
        if not ready and wanted:
            self._receive()
            ready = self._take(wanted)
        return ready

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Not offered: waiting without a bound is what the round loop is there to avoid."""
        raise NotImplementedError("use push_messages and pull_messages")

    def _push(self, message: Message) -> str:
        identity = f"local-{next(self._numbers)}"
        message.metadata.__dict__["_message_id"] = identity
        self._forget(message.metadata.dst_node_id)
        if not self._workers:
            self._inline.append(message)
            return identity
        worker = self._workers[(message.metadata.dst_node_id - 1) % len(self._workers)]
        worker.pending.append(message)
        if len(worker.pending) == 1:
            worker.send_next()
        return identity

    def _forget(self, node_id: int) -> None:
        """Drop replies of a node that came too late for anybody to ask for them."""
        stale = [key for key, reply in self._done.items() if reply.metadata.src_node_id == node_id]
        for key in stale:
            del self._done[key]

    def _outstanding(self) -> set[str]:
        pending = (m for worker in self._workers for m in worker.pending)
        messages = itertools.chain(pending, self._inline)
        return {message.metadata.message_id for message in messages} | self._done.keys()

    def _take(self, wanted: list[str]) -> list[Message]:
        return [self._done.pop(identity) for identity in wanted if identity in self._done]

    def _receive(self) -> None:
        """Take in one reply; wait at most a second for any.

        The others stay in their pipes: memory does not grow with the sites that are ready.
        """
        if not self._workers:
            message = self._inline.pop(0)
            self._finish(answer(self._client_app, message), message)
            return
        waited_for: list[Any] = [w.pipe for w in self._workers if w.pending]
        for pipe in wait(waited_for, timeout=_PATIENCE)[:1]:
            number = next(n for n, w in enumerate(self._workers) if w.pipe is pipe)
            self._receive_from(number)

    def _receive_from(self, number: int) -> None:
        worker = self._workers[number]
        try:
            received = worker.pipe.recv_bytes()
        except (EOFError, OSError):
            self._replace(number)
            return
        request = worker.pending.pop(0)
        self.timings.append(Timing(request.metadata.dst_node_id, *_HEADER.unpack_from(received)))
        self._finish(_unpack(received[_HEADER.size :]), request)
        worker.send_next()

    def _finish(self, reply: Message, request: Message) -> None:
        self._done[request.metadata.message_id] = reply

    def _replace(self, number: int) -> None:
        """A worker died: the message it had fails, a new worker takes its place and the rest."""
        dead = self._workers[number]
        dead.process.join()
        log.warning("worker %d ended with exit code %s", number, dead.process.exitcode)
        lost, *rest = dead.pending
        error = Error(code=ErrorCode.CLIENT_APP_CRASHED, reason="the worker died")
        self._finish(Message(error, reply_to=lost), lost)
        self._workers[number] = self._start()
        self._workers[number].pending = rest
        self._workers[number].send_next()

    def _start(self) -> _Worker:
        context = fork_server(self._client_app.module)
        ours, theirs = context.Pipe()
        process = context.Process(
            target=serve, args=(theirs, self._client_app, self._threads), daemon=True
        )
        process.start()
        theirs.close()
        return _Worker(process, ours)


def serve(pipe: Connection, client_app: ClientAppAt, threads: int) -> None:
    """A worker: answer messages until nobody is at the other end any more.

    Ctrl-C reaches a whole group of processes; here the first of them ends the others.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(threads)
    with suppress(EOFError, ConnectionError):
        while True:
            request = _unpack(pipe.recv_bytes())
            wall, processor = time.perf_counter(), time.process_time()
            reply = answer(client_app, request)
            spent = time.perf_counter() - wall, time.process_time() - processor
            pipe.send_bytes(_HEADER.pack(*spent) + _pack(reply))


def answer(client_app: ClientAppAt, message: Message) -> Message:
    """The ClientApp's reply, in this process."""
    identify(node_id=message.metadata.dst_node_id)
    app = _load(client_app)
    node_id = message.metadata.dst_node_id
    context = _context(node_id, {"partition-id": node_id - 1}, client_app.run_config)
    reply: Message = app(message, context)
    identify(node_id=_SERVER_NODE)
    return reply


def _context(node_id: int, node: dict[str, Any], run_config: dict[str, Any]) -> Context:
    return Context(RUN_ID, node_id, node, RecordDict(), run_config)


def identify(*, node_id: int) -> None:
    """Say who this process is, which Flower asks for before it makes a `Message`."""
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = RUN_ID, node_id, 0


def _load(client_app: ClientAppAt) -> ClientApp:
    loaded: ClientApp = getattr(import_module(client_app.module), client_app.attribute)
    return loaded


def _pack(message: Message) -> bytes:
    packed: bytes = message_to_proto(message).SerializeToString()
    return packed


def _unpack(content: bytes) -> Message:
    return message_from_proto(MessageProto.FromString(content))
