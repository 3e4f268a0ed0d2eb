"""The coordinator's side of Flower: its state on disk, the fleet API alone, a grid upon the state.

Flower's SuperLink serves three interfaces on one port, and only one of them knows who is asking.
Here that one is served, to nodes; what the other two do is done by calling Flower's own handlers
upon the state, in the coordinator's processes, so there is nothing to guard. What of Flower is no
public API is touched here and in `client.link` alone; `tests/server/test_link.py` fails when it
moves.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from flwr.app.user_config import UserConfig
from flwr.common.constant import (
    NOOP_ACCOUNT_NAME,
    NOOP_FLWR_AID,
    TRANSPORT_TYPE_GRPC_RERE,
    SubStatus,
)
from flwr.common.serde import (
    run_from_proto,
    user_config_to_proto,
)
from flwr.proto.control_pb2 import RegisterNodeRequest, StartRunRequest, UnregisterNodeRequest
from flwr.proto.fab_pb2 import Fab
from flwr.proto.runtime_pb2 import AcquireTaskRequest, PullTaskInputRequest
from flwr.proto.task_pb2 import Task
from flwr.server.superlink.linkstate import LinkState, LinkStateFactory
from flwr.supercore import sql_mixin
from flwr.supercore.auth.typing import AccountInfo
from flwr.supercore.constant import TaskType
from flwr.supercore.error import http_error_translator
from flwr.supercore.protobuf.translation import ProtobufTranslationMiddleware
from flwr.supercore.servicer.runtime import runtime_handlers as core_handlers
from flwr.supercore.task_identity import TaskIdentity
from flwr.superlink.config_loader import (
    get_federation_manager,
    get_objectstore_linkstate_factories,
)
from flwr.superlink.grid import HttpGrid
from flwr.superlink.routers.fleet.node_auth import NodeAuthMiddleware
from flwr.superlink.routers.fleet.router import router as fleet_router
from flwr.superlink.servicer.control import control_handlers
from flwr.superlink.servicer.runtime import runtime_handlers
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from common.errors import RunError

_ACCOUNT = AccountInfo(NOOP_FLWR_AID, NOOP_ACCOUNT_NAME)
_BUSY_MILLISECONDS = "60000"
_BEAT_SECONDS = 10.0


@dataclass(frozen=True)
class Seen:
    """A node as Flower's state has it.

    Attributes:
        number: Flower's.
        public_key: in the bytes of Flower (`public_key_to_bytes`).
        online: whether its heartbeats come.
    """

    number: int
    name: str
    public_key: bytes
    online: bool
    last_seen: str


class Exchange:
    """Flower's state in a file; several processes may open one.

    Args:
        database: the file; made if there is none.
    """

    def __init__(self, database: Path) -> None:
        _patient_database()
        _, self.factory = get_objectstore_linkstate_factories(
            str(database.absolute()), get_federation_manager()
        )

    @cached_property
    def state(self) -> LinkState:
        """Flower's state."""
        return self.factory.state()

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
                node.last_activated_at,
            )
            for node in self.state.get_node_info(owner_aids=[_ACCOUNT.flwr_aid])
        ]

    def submit(self, bundle: bytes, config: UserConfig) -> int:
        """Submit a bundle with its configuration; returns Flower's number of the run."""
        fab = Fab(hash_str=hashlib.sha256(bundle).hexdigest(), content=bundle)
        request = StartRunRequest(fab=fab, override_config=user_config_to_proto(config))
        response = control_handlers.start_run(request, _ACCOUNT, self.state, None)
        if not response.run_id:
            raise RunError("Flower takes no such run; its own log above says why")
        return int(response.run_id)

    @contextmanager
    def conducting(self, run: int) -> Iterator[LinkGrid]:
        """Conduct a run that was submitted and that nobody conducts yet.

        Flower holds a run whose conductor does not say that it is alive for failed. So heartbeats
        are sent as long as this lasts, and at its end Flower learns how the run ended.

        Raises:
            RunError: if somebody conducts it, or it is over.
        """
        task = self._claimed(run)
        given = runtime_handlers.pull_task_input(PullTaskInputRequest(), self.state, task)
        _identify(given.task_id, run, given.context.node_id)
        grid = LinkGrid(_Handlers(self.state, task))
        grid.set_run(run_from_proto(given.run))
        over = threading.Event()
        beating = threading.Thread(target=self._beat, args=(task.task_id, over), daemon=True)
        beating.start()
        status, details = SubStatus.FAILED, "it did not come to its end"
        try:
            yield grid
            status, details = SubStatus.COMPLETED, ""
        finally:
            over.set()
            beating.join()
            self.state.finish_task(task.task_id, sub_status=status, details=details)

    def stop(self, run: int) -> None:
        """Have Flower drop a run and all that is on its way to nodes."""
        self.state.stop_run(run)

    def _claimed(self, run: int) -> Task:
        wanted = AcquireTaskRequest(supported_task_types=[TaskType.SERVER_APP])
        while (acquired := core_handlers.acquire_task(wanted, self.state)).HasField("task"):
            if acquired.task.run_id == run:
                return acquired.task
            self.state.finish_task(
                acquired.task.task_id, sub_status=SubStatus.STOPPED, details="nobody conducts it"
            )
        raise RunError(f"run {run} of Flower's is conducted already, or over; submit it again")

    def _beat(self, task: int, over: threading.Event) -> None:
        while not over.wait(_BEAT_SECONDS):
            self.state.acknowledge_task_heartbeat(task)


class LinkGrid(HttpGrid):
    """Flower's Grid upon the state itself, without a network in between."""

    def __init__(self, handlers: _Handlers) -> None:
        super().__init__(token="unused: nothing is sent")  # noqa: S106
        self._handlers = handlers

    @property
    def _runtime_client(self) -> Any:
        return self._handlers

    def close(self) -> None:
        """There is no connection to end."""


class _Handlers:
    """Flower's runtime handlers for one task, with the methods of its HTTP client."""

    def __init__(self, state: LinkState, task: Task) -> None:
        self._state = state
        self._task = task

    def GetNodes(self, request: Any) -> Any:  # noqa: N802
        return runtime_handlers.get_nodes(request, self._state, self._task)

    def PushMessages(self, request: Any) -> Any:  # noqa: N802
        return runtime_handlers.push_messages(request, self._state, self._task)

    def PullMessages(self, request: Any) -> Any:  # noqa: N802
        return runtime_handlers.pull_messages(request, self._state, self._task)

    def PushObject(self, request: Any) -> Any:  # noqa: N802
        return runtime_handlers.push_object(request, self._state, self._task)

    def PullObject(self, request: Any) -> Any:  # noqa: N802
        return runtime_handlers.pull_object(request, self._state, self._task)

    def ConfirmMessageReceived(self, request: Any) -> Any:  # noqa: N802
        return runtime_handlers.confirm_message_received(request, self._state, self._task)


def fleet_app(factory: LinkStateFactory) -> FastAPI:
    """The fleet API and nothing else: every other path is 404, for everybody.

    Each request has to be signed by a key that is registered (Flower's node authentication).
    """
    app = FastAPI(
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
        middleware=[
            Middleware(_FleetAlone),
            Middleware(BaseHTTPMiddleware, dispatch=http_error_translator),
            Middleware(ProtobufTranslationMiddleware),
            Middleware(NodeAuthMiddleware),
        ],
    )
    app.state.linkstate_factory = factory
    app.state.enable_supernode_auth = True
    app.state.fleet_api_type = TRANSPORT_TYPE_GRPC_RERE
    app.state.fleet_event_log_plugin = None
    app.include_router(fleet_router)
    return app


class _FleetAlone:
    """Whatever is not the fleet API's is not there; asked before anything else of it is read."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and not scope["path"].startswith("/v1/fleet/"):
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
