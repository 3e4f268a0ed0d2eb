"""The coordinator's side of Flower: its state on disk, the fleet API alone, a grid upon the state.

Flower's SuperLink serves three interfaces on one port, and only one of them knows who is asking.
Here that one is served, to nodes; what the other two do is done by calling Flower's own handlers
upon the state, in the coordinator's processes, so there is nothing to guard. What of Flower is no
public API is touched here and in `client.link` alone; `tests/system/test_link.py` fails when it
moves.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import sqlite3
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from flwr.app import ArrayRecord, Message, Metadata, RecordDict
from flwr.app.message import make_message, remove_content_from_message
from flwr.app.user_config import UserConfig
from flwr.cli.build import build_fab_from_disk
from flwr.common.constant import (
    NOOP_ACCOUNT_NAME,
    NOOP_FLWR_AID,
    TRANSPORT_TYPE_GRPC_RERE,
    SubStatus,
)
from flwr.common.serde import (
    message_from_proto,
    message_to_proto,
    run_from_proto,
    user_config_to_proto,
)
from flwr.proto.control_pb2 import RegisterNodeRequest, StartRunRequest, UnregisterNodeRequest
from flwr.proto.fab_pb2 import Fab
from flwr.proto.fleet_pb2 import PullMessagesRequest
from flwr.proto.message_pb2 import ObjectTree
from flwr.proto.runtime_pb2 import (
    GetNodesRequest,
    PullAppMessagesRequest,
    PullTaskInputRequest,
    PushAppMessagesRequest,
)
from flwr.proto.task_pb2 import Task
from flwr.server.superlink.linkstate import LinkStateFactory, sql_linkstate
from flwr.server.superlink.linkstate.sql_linkstate import SqlLinkState
from flwr.server.superlink.linkstate.utils import create_message_error_unavailable_res_message
from flwr.supercore import sql_mixin
from flwr.supercore.auth.typing import AccountInfo
from flwr.supercore.constant import FLEET_HTTP_PUBLIC_KEY_HEADER
from flwr.supercore.error import http_error_translator
from flwr.supercore.inflatable.inflatable_object import iterate_object_tree
from flwr.supercore.object_store import NoObjectInStoreError
from flwr.supercore.primitives.asymmetric import public_key_to_bytes
from flwr.supercore.protobuf.translation import ProtobufTranslationMiddleware
from flwr.supercore.state.schema.linkstate_models import MessageIns, MessageRes
from flwr.supercore.state.schema.objectstore_models import StoredObject
from flwr.supercore.task_identity import TaskIdentity
from flwr.supercore.utils import uint64_to_int64
from flwr.superlink.config_loader import (
    get_federation_manager,
    get_objectstore_linkstate_factories,
)
from flwr.superlink.grid import HttpGrid
from flwr.superlink.routers.fleet.node_auth import NodeAuthMiddleware
from flwr.superlink.routers.fleet.router import router as fleet_router
from flwr.superlink.servicer.control import control_handlers
from flwr.superlink.servicer.runtime import runtime_handlers
from sqlalchemy import func, select
from sqlalchemy.exc import SQLAlchemyError
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware, RequestResponseEndpoint
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from common.certificates import public_key
from common.errors import MessageError, RunError
from common.parcel import Parcel, pieces_of
from server.allowance import LARGEST_REPLY, MOST_PARTS, Allowance, RefusedError
from server.telling import Told

log = logging.getLogger("cloister.link")

PUBLIC_KEY_HEADER = FLEET_HTTP_PUBLIC_KEY_HEADER.lower().encode()
"""Of each request: the key that signed it, PEM in base64."""
FLEET = "/v1/fleet/"
SITE = "cloister.site"
"""In an ASGI scope: the name of the site that calls, once it is known."""

_ACCOUNT = AccountInfo(NOOP_FLWR_AID, NOOP_ACCOUNT_NAME)
_BUSY_MILLISECONDS = "60000"
_BEAT_SECONDS = 10.0
_HELD_SECONDS, _LOOK_SECONDS = 1.0, 0.01  # of a node that asks for a message
_BUNDLE = """
[project]
name = "cloister"
version = "0.1.0"
license = "Apache-2.0"

[tool.flwr.app]
publisher = "cloister"
fab-include = ["LICENSE"]

[tool.flwr.app.components]
serverapp = "server.app:app"
clientapp = "client.app:app"

[tool.flwr.app.config]
largest-reply = 0
"""


StateError = SQLAlchemyError
"""What Flower's state raises where its file is damaged, or the disk is full."""


class SubmissionLostError(OSError):
    """Flower takes a submission for over that is not; a new one goes on with the run."""


@dataclass(frozen=True)
class Seen:
    """A node as Flower's state has it.

    Attributes:
        number: Flower's.
        public_key: in the bytes of Flower (`public_key_to_bytes`).
        online: whether its heartbeats come.
        left: when it was last seen to go, ISO 8601; empty if never.
    """

    number: int
    name: str
    public_key: bytes
    online: bool
    left: str


def bundle() -> bytes:
    """What Flower takes a run to consist of: a name and a licence, and no code (ADR 0006)."""
    with tempfile.TemporaryDirectory(prefix="cloister-bundle-") as folder:
        (Path(folder) / "pyproject.toml").write_text(_BUNDLE)
        (Path(folder) / "LICENSE").write_text("Apache-2.0\n")
        return build_fab_from_disk(Path(folder))


def flower_key(key: bytes) -> bytes:
    """A public key as Flower has it, of its bytes as `common.certificates` has them."""
    return public_key_to_bytes(public_key(key))


class Exchange:
    """Flower's state in a file; several processes may open one.

    Args:
        database: the file; made if there is none.
    """

    def __init__(self, database: Path) -> None:
        _patient_database()
        _keep_answers()
        _, self.factory = get_objectstore_linkstate_factories(
            str(database.absolute()), get_federation_manager()
        )

    @cached_property
    def state(self) -> SqlLinkState:
        """Flower's state."""
        made = self.factory.state()
        if not isinstance(made, SqlLinkState):
            raise RunError(f"Flower keeps its state in a {type(made).__name__}, not in the file")
        return made

    def register(self, public_key: bytes, name: str) -> int:
        """Let the node of this key take part, under a name; returns Flower's number for it."""
        request = RegisterNodeRequest(public_key=public_key, name=name)
        response = control_handlers.register_node(request, _ACCOUNT, self.state)
        return int(response.node_id)

    def unregister(self, number: int) -> None:
        """Let a node take part no longer; its key is not taken again."""
        control_handlers.unregister_node(
            UnregisterNodeRequest(node_id=number), _ACCOUNT, self.state
        )

    def nodes(self) -> list[Seen]:
        """All that are registered."""
        return [
            Seen(
                node.node_id,
                node.name,
                bytes(node.public_key),
                node.status == "online",
                node.last_deactivated_at or "",
            )
            for node in self.state.get_node_info(owner_aids=[_ACCOUNT.flwr_aid])
            if node.status != "unregistered"
        ]

    def nobody_is_here(self) -> None:
        """Take all nodes for gone, as after a restart; those that live say so in a moment.

        A node that has noticed nothing is taken back by its next heartbeat, and one that connects
        anew need not wait until Flower has forgotten the connection that died with the process.
        """
        for node in self.nodes():
            if node.online:
                self.state.deactivate_node(node.number)

    def left(self) -> dict[str, str]:
        """When each site that is not connected was last seen to go; empty if it never came."""
        nodes = self.nodes()
        here = {node.name for node in nodes if node.online}
        return {node.name: node.left for node in nodes if node.name not in here}

    def submit(self, bundle: bytes, config: UserConfig) -> int:
        """Submit a bundle with its configuration; returns Flower's number of the run."""
        fab = Fab(hash_str=hashlib.sha256(bundle).hexdigest(), content=bundle)
        request = StartRunRequest(fab=fab, override_config=user_config_to_proto(config))
        response = control_handlers.start_run(request, _ACCOUNT, self.state, None)
        if not response.run_id:
            raise RunError("Flower takes no such run; its own log above says why")
        return int(response.run_id)

    @contextmanager
    def conducting(
        self,
        run: int,
        *,
        check: Callable[[], None] = lambda: None,
        largest_reply: int = LARGEST_REPLY,
    ) -> Iterator[LinkGrid]:
        """Conduct a run that was submitted and that nobody conducts yet.

        Flower holds a run whose conductor does not say that it is alive for failed. So heartbeats
        are sent as long as this lasts, and at its end Flower learns how the run ended.

        Args:
            run: Flower's number of it.
            check: is called before whatever is asked of the grid; what it raises, the grid raises.
            largest_reply: in bytes; a larger one is dropped unread.

        Raises:
            RunError: if somebody conducts it, or it is over.
            SubmissionLostError: from the grid, if Flower has not heard of this process for too
                long, as when the machine slept.
        """
        task, over, lost = self._claimed(run), threading.Event(), threading.Event()

        def still() -> None:
            if lost.is_set():
                raise SubmissionLostError(f"Flower takes run {run} for over; submit it again")
            check()

        given = runtime_handlers.pull_task_input(PullTaskInputRequest(), self.state, task)
        _identify(given.task_id, run, given.context.node_id)
        grid = LinkGrid(_Handlers(self.state, task, still), largest_reply)
        grid.set_run(run_from_proto(given.run))
        beating = threading.Thread(target=self._beat, args=(task.task_id, over, lost), daemon=True)
        beating.start()
        status, details = SubStatus.FAILED, "it did not come to its end"
        try:
            yield grid
            status, details = SubStatus.COMPLETED, ""
        finally:
            over.set()
            beating.join()
            self.state.finish_task(task.task_id, sub_status=status, details=details)
            self.state.cleanup_run(run)

    def stop(self, run: int) -> None:
        """Have Flower drop a run and all that is on its way to nodes."""
        self.state.stop_run(run)
        self.state.cleanup_run(run)

    def _claimed(self, run: int) -> Task:
        found = self.state.get_run_info(run_ids=[run])
        wanted = found[0].primary_task_id if found else None
        for task in self.state.get_tasks(task_ids=[wanted]) if wanted is not None else ():
            if self.state.claim_task(task.task_id):
                return task
        raise RunError(f"run {run} of Flower's is conducted already, or over; submit it again")

    def _beat(self, task: int, over: threading.Event, lost: threading.Event) -> None:
        while not over.wait(_BEAT_SECONDS):
            try:
                if not self.state.acknowledge_task_heartbeat(task):
                    lost.set()
            except StateError as error:
                log.error("Flower's state: %s", error)


class LinkGrid(HttpGrid):
    """Flower's Grid upon the state itself, without a network in between.

    Nothing waits in it: a reply is pulled when all of it is there, and one at a time. A message
    that can have no answer any more, since its node went away with it or its upload broke off, is
    answered by an error of Flower's, NODE_UNAVAILABLE: the node may be asked again.
    """

    def __init__(self, handlers: _Handlers, largest_reply: int) -> None:
        super().__init__(token="unused: nothing is sent")  # noqa: S106
        self._handlers = handlers
        self._largest = largest_reply
        self._sent: dict[str, Metadata] = {}

    @property
    def _runtime_client(self) -> Any:
        return self._handlers

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """See `Grid`; empty for what could not be sent.

        Of a node that is asked anew, nobody waits any more for what it was asked of this kind.
        """
        wanted, identities = list(messages), []
        self._forget_what_is_over({_question(message.metadata) for message in wanted})
        packed: dict[tuple[int, ...], dict[str, bytes]] = {}
        for message in wanted:
            records = message.content.values()
            shared = tuple(id(each) for each in records if isinstance(each, ArrayRecord))
            if shared not in packed:
                packed = {shared: pieces_of(message.content)}
            parcel = Parcel.of(message.content, packed[shared])
            message.metadata.__dict__["_message_id"] = parcel.identity
            identities.append(self._handlers.send(message, parcel))
            if identities[-1]:
                self._sent[parcel.identity] = message.metadata
        return identities

    def pull_messages(self, message_ids: Iterable[str]) -> Iterator[Message]:
        """See `Grid`."""
        asked = [identity for identity in message_ids if identity in self._sent]
        here = {node.node_id for node in self.get_nodes()}
        standing = self._handlers.standing(asked)  # what one sent before it left is seen by now
        for identity in asked:
            found = standing.get(identity)
            if found is not None and found.whole and found.size > self._largest:
                log.warning("a reply of %d bytes, expected at most %d", found.size, self._largest)
                yield self._lost(identity, "msg_unavail")
            elif found is not None and found.whole:
                del self._sent[identity]
                yield from self._handlers.take(identity)
            elif found is None or self._sent[identity].dst_node_id not in here:
                yield self._lost(identity, "node_unavail")

    def _lost(self, identity: str, kind: str) -> Message:
        metadata = self._sent.pop(identity)
        self._handlers.drop(identity)
        return create_message_error_unavailable_res_message(metadata, kind)

    def _forget_what_is_over(self, asked_anew: Set[tuple[int, str]]) -> None:
        """What nobody can answer any more would fill the disk until the run's end."""
        for identity, metadata in list(self._sent.items()):
            over = metadata.created_at + metadata.ttl < time.time()
            if over or _question(metadata) in asked_anew:
                del self._sent[identity]
                self._handlers.drop(identity)

    def close(self) -> None:
        """There is no connection to end."""


@dataclass(frozen=True)
class _Standing:
    """What has come of a message that is known to Flower: whether its reply is whole, its bytes."""

    whole: bool = False
    size: int = 0


class _Handlers:
    """Flower's runtime handlers for one task, with the methods of its HTTP client."""

    def __init__(self, state: SqlLinkState, task: Task, check: Callable[[], None]) -> None:
        self._state = state
        self._task = task
        self._check = check

    def standing(self, asked: Sequence[str]) -> dict[str, _Standing]:
        """What has come of these messages; one that Flower has dropped is not among them."""
        self._check()
        if not asked:
            return {}
        with self._state.session() as session:
            known = session.scalars(
                select(MessageIns.message_id).where(MessageIns.message_id.in_(asked))
            ).all()
            replies = session.execute(
                select(MessageRes.reply_to_message_id, MessageRes.message_id).where(
                    MessageRes.reply_to_message_id.in_(asked)
                )
            ).all()
            found = {str(identity): _Standing() for identity in known}
            return found | {str(of): self._reply(session, str(reply)) for of, reply in replies}

    def _reply(self, session: Any, identity: str) -> _Standing:
        try:
            tree = self._state.object_store.get_object_tree(identity)
        except NoObjectInStoreError:
            return _Standing()
        parts = {part.object_id for part in iterate_object_tree(tree)}
        if len(parts) > MOST_PARTS:
            return _Standing(whole=True, size=sys.maxsize)
        there, size = session.execute(
            select(
                func.sum(StoredObject.is_available), func.sum(func.length(StoredObject.content))
            ).where(StoredObject.object_id.in_(parts))
        ).one()
        return _Standing(there == len(parts), size or 0)

    def drop(self, identity: str) -> None:
        """Have Flower forget a message, and what came of it."""
        with self._state.session() as session:
            replies = session.scalars(
                select(MessageRes.message_id).where(MessageRes.reply_to_message_id == identity)
            ).all()
            self._state.delete_messages({identity})
        for each in (identity, *map(str, replies)):
            self._state.object_store.delete(each)

    def GetNodes(self, request: GetNodesRequest) -> Any:  # noqa: N802
        self._check()
        return runtime_handlers.get_nodes(request, self._state, self._task)

    def send(self, message: Message, parcel: Parcel) -> str:
        """Have a node get a message; its identity, or nothing if Flower does not take it.

        Raises:
            SubmissionLostError: if Flower takes the message, and not what belongs to it.
        """
        self._check()
        request = PushAppMessagesRequest(
            messages_list=[message_to_proto(remove_content_from_message(message))],
            message_object_trees=[parcel.tree],
        )
        small = len(parcel.objects) == 1  # a large one must not keep the nodes' heartbeats waiting
        with self._state.session() if small else nullcontext():
            response = runtime_handlers.push_messages(request, self._state, self._task)
            for name in response.objects_to_push:
                content, session = parcel.objects[name], response.session_id
                if not self._state.store_object(self._task.run_id, session, name, content):
                    raise SubmissionLostError("Flower keeps no message; its log above says why")
        return str(response.message_ids[0])

    def take(self, identity: str) -> list[Message]:
        """The reply to a message, of which all has come; Flower forgets both."""
        request = PullAppMessagesRequest(message_ids=[identity])
        response = runtime_handlers.pull_messages(request, self._state, self._task)
        self._state.object_store.delete(identity)
        found = zip(response.messages_list, response.message_object_trees, strict=True)
        return [self._unpacked(message_from_proto(head), tree) for head, tree in found]

    def _unpacked(self, head: Message, tree: ObjectTree) -> Message:
        parts = {part.object_id for part in iterate_object_tree(tree)}
        run = self._task.run_id
        objects = {name: self._state.get_object(run, name) or b"" for name in parts}
        self._state.object_store.delete(tree.object_id)
        if head.has_error():
            return head
        try:
            content = Parcel(tree.object_id, objects).records()
        except MessageError as error:
            log.warning("a reply that cannot be read: %s", error)
            content = RecordDict()  # which is no reply of ours: whoever reads it says so
        return make_message(metadata=head.metadata, content=content)


def fleet_app(factory: LinkStateFactory) -> FastAPI:
    """The fleet API and nothing else: every other path is 404, for everybody.

    Each request has to be signed by a key that is registered (Flower's node authentication).
    """
    allowed = _Allowed(Allowance(Path(factory.database)))
    app = FastAPI(
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
        middleware=[
            Middleware(_FleetAlone),
            Middleware(BaseHTTPMiddleware, dispatch=http_error_translator),
            Middleware(ProtobufTranslationMiddleware),
            Middleware(NodeAuthMiddleware),
            Middleware(BaseHTTPMiddleware, dispatch=allowed),
            Middleware(BaseHTTPMiddleware, dispatch=_once_there_is_something),
        ],
    )
    app.state.linkstate_factory = factory
    app.state.enable_supernode_auth = True
    app.state.fleet_api_type = TRANSPORT_TYPE_GRPC_RERE
    app.state.fleet_event_log_plugin = None
    app.state.arrivals = _Arrivals(factory.database)
    app.include_router(fleet_router)
    return app


class _Allowed:
    """Flower's handlers believe who has proved who it is; `Allowance` looks at what it wants."""

    def __init__(self, allowance: Allowance) -> None:
        self._allowance, self._told = allowance, Told()

    async def __call__(self, request: Request, go_on: RequestResponseEndpoint) -> Response:
        try:
            self._allowance.check(getattr(request.state, "protobuf_request", None))
        except RefusedError as error:
            site = request.scope.get(SITE, "a node")
            self._told.tell(log, f"{site} is refused ({error.status}): {error}")
            return JSONResponse({"detail": str(error)}, error.status)
        return await go_on(request)


def _question(metadata: Metadata) -> tuple[int, str]:
    return metadata.dst_node_id, metadata.message_type


async def _once_there_is_something(request: Request, go_on: RequestResponseEndpoint) -> Response:
    """A node that asks for a message when there is none waits for it here, and not in between."""
    said = getattr(request.state, "protobuf_request", None)
    if isinstance(said, PullMessagesRequest):
        await request.app.state.arrivals.wait(said.node.node_id)
    return await go_on(request)


class _Arrivals:
    """When there are messages for nodes; another process writes them.

    Args:
        database: Flower's.
    """

    def __init__(self, database: str) -> None:
        self._database = database
        self._connection: sqlite3.Connection | None = None

    async def wait(self, node: int) -> None:
        """Until there is a message for a node, or `_HELD_SECONDS`."""
        last, seen = time.monotonic() + _HELD_SECONDS, None
        while time.monotonic() < last:
            try:
                now = self._version()
                if now != seen and self._is_there(node):
                    return
            except sqlite3.Error:
                return  # Flower's own look at the database says what is wrong
            seen = now
            await asyncio.sleep(_LOOK_SECONDS)

    def _version(self) -> int:
        """Another number whenever the database was changed."""
        if self._connection is None:
            place = Path(self._database).absolute().as_uri()
            self._connection = sqlite3.connect(f"{place}?mode=ro", uri=True)
        return int(self._connection.execute("PRAGMA data_version").fetchone()[0])

    def _is_there(self, node: int) -> bool:
        if self._connection is None:
            return True
        found = self._connection.execute(
            "SELECT 1 FROM message_ins WHERE dst_node_id = ? AND delivered_at = ''"
            " AND created_at + ttl > ? LIMIT 1",
            (uint64_to_int64(node), time.time()),
        )
        return found.fetchone() is not None


class _FleetAlone:
    """Whatever is not the fleet API's is not there; asked before anything else of it is read."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and not scope["path"].startswith(FLEET):
            await PlainTextResponse("not found\n", status_code=404)(scope, receive, send)
            return
        await self._app(scope, receive, send)


def _identify(task: int, run: int, node: int) -> None:
    """Flower's messages take these from the process: it conducts one run."""
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = task, run, node


def _patient_database() -> None:
    """Large models hold the database's lock for longer than the 5 s that Flower waits for it."""
    pragmas = dict(vars(sql_mixin)["SQLITE_PRAGMAS"])
    vars(sql_mixin)["SQLITE_PRAGMAS"] = tuple(
        (pragmas | {"busy_timeout": _BUSY_MILLISECONDS}).items()
    )


def _keep_answers() -> None:
    """Flower throws an answer away whose node has left since; who is missing is `LinkGrid`'s."""
    vars(sql_linkstate)["check_node_availability_for_in_message"] = _nobody_is_missing


def _nobody_is_missing(**_asked: Any) -> dict[str, Message]:
    return {}
