"""The node's line to the coordinator: Flower's fleet protocol, over a TLS context of ours.

What Flower offers for this (`flwr.supernode`) parses the coordinator's bundle, opens a port for
workers, sleeps for seconds, and ends the process on a refusal. So its client and its messages are
used, and nothing around them. The other side is not trusted: no redirect is followed, and no
answer is read beyond a limit. What of Flower is no public API is touched here and in
`server.link` alone; `tests/client/test_link.py` fails when it moves.
"""

from __future__ import annotations

import ssl
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import httpx
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.app import Message, RecordDict
from flwr.app.message import remove_content_from_message
from flwr.common.constant import HEARTBEAT_DEFAULT_INTERVAL
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto.fab_pb2 import GetFabRequest
from flwr.proto.fleet_pb2 import (
    ActivateNodeRequest,
    DeactivateNodeRequest,
    PullMessagesRequest,
    PushMessagesRequest,
)
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest
from flwr.proto.node_pb2 import Node
from flwr.proto.run_pb2 import GetRunRequest
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_tree,
    iterate_object_tree,
    no_object_id_recompute,
)
from flwr.supercore.inflatable.inflatable_protobuf_utils import (
    make_confirm_message_received_fn_protobuf,
    make_pull_object_fn_protobuf,
    make_push_object_fn_protobuf,
)
from flwr.supercore.inflatable.inflatable_utils import (
    inflate_object_from_contents,
    pull_objects,
    push_objects,
)
from flwr.supercore.interceptors.http.runtime_version import RuntimeVersionHttpInterceptor
from flwr.supercore.primitives.asymmetric import public_key_to_bytes
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

from common.errors import LinkBusyError, LinkError, LinkRefusedError, MessageError

_SECONDS = 30.0
_OVERHEAD = 2**20
_FIRST_WAIT, _LONGEST_WAIT = 0.02, 0.5
_MOST_OBJECTS = 100_000


@dataclass(frozen=True)
class Letter:
    """A message of the coordinator, whole.

    Attributes:
        run: Flower's number of the submission.
        message: for the reply; its content is not trusted.
    """

    run: int
    message: Message

    @property
    def kind(self) -> str:
        """The message's type, such as ``train.step``."""
        return str(self.message.metadata.message_type)

    @property
    def content(self) -> RecordDict:
        """What was sent; empty where the message holds an error or nothing."""
        return self.message.content if self.message.has_content() else RecordDict()


@dataclass(frozen=True)
class Bundle:
    """What the coordinator says that a run consists of, unopened.

    Attributes:
        app: publisher and name, as the run has them.
        digest: SHA-256, as the run has it.
        kind: Flower's type of the run's first task.
        content: the bundle's bytes.
    """

    app: str
    digest: str
    kind: str
    content: bytes


class FleetLink:
    """One connection; not to be shared between threads, but for `beat`.

    Args:
        address: ``host:port`` of the coordinator.
        key: the node's; it signs every request.
        context: TLS as the node wants it; None for plain HTTP on loopback, in tests.
        most_bytes: of a whole message, either way.
    """

    def __init__(
        self,
        address: str,
        key: ec.EllipticCurvePrivateKey,
        context: ssl.SSLContext | None,
        *,
        most_bytes: int,
    ) -> None:
        self._public = public_key_to_bytes(key.public_key())
        self._most = most_bytes
        self._client = FleetHttpClient(
            f"{'http' if context is None else 'https'}://{address}",
            interceptors=[
                RuntimeVersionHttpInterceptor(component_name="SuperNode"),
                NodeAuthHttpInterceptor(key, key.public_key()),
            ],
        )
        self._client._client.close()
        transport = _Bounded(
            httpx.HTTPTransport(verify=context or True, proxy=proxy_for(address)),
            most_bytes + _OVERHEAD,
        )
        self._client._client = httpx.Client(transport=transport, timeout=_SECONDS)
        self._node: Node | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Say that the node leaves, if it can be said, and end the connection."""
        try:
            if self._node is not None:
                self._client.DeactivateNode(DeactivateNodeRequest(node_id=self._node.node_id))
        except (httpx.HTTPError, RuntimeError):
            pass  # the coordinator notices by the heartbeats that do not come
        finally:
            self._client.close()

    def activate(self) -> int:
        """Say that the node is there; returns the number that the coordinator has for it.

        Raises:
            LinkBusyError: if it is not known there, or an earlier process of it seems alive.
            LinkRefusedError: if it may not take part, or no longer.
            LinkError: if the coordinator cannot be reached, or answers nonsense.
        """
        request = ActivateNodeRequest(
            public_key=self._public, heartbeat_interval=HEARTBEAT_DEFAULT_INTERVAL
        )
        with _told():
            self._node = Node(node_id=self._client.ActivateNode(request).node_id)
        return self._node.node_id

    def beat(self) -> None:
        """Say that the node is still there.

        Raises:
            LinkRefusedError: if it is not known there, or no longer.
            LinkError: if the coordinator cannot be reached, or answers nonsense.
        """
        request = SendNodeHeartbeatRequest(
            node=self._here, heartbeat_interval=HEARTBEAT_DEFAULT_INTERVAL
        )
        with _told():
            if not self._client.SendNodeHeartbeat(request).success:
                raise LinkRefusedError("the coordinator has no place for this node's heartbeat")

    def receive(self) -> Letter | None:
        """The next message, whole; None if there is none.

        Raises:
            MessageError: if it is larger than the limit or not what it says it is; it is gone.
            LinkRefusedError, LinkError: as `activate` does.
        """
        with _told():
            response = self._client.PullMessages(PullMessagesRequest(node=self._here))
            if not response.messages_list:
                return None
            head = message_from_proto(response.messages_list[0])
            run, identity = head.metadata.run_id, head.metadata.message_id
            objects = [
                tree.object_id for tree in iterate_object_tree(response.message_object_trees[0])
            ]
            contents = self._pulled(run, objects)
            make_confirm_message_received_fn_protobuf(
                self._client.ConfirmMessageReceived, self._here, run
            )(identity)
            message = inflate_object_from_contents(identity, contents)
        if not isinstance(message, Message):
            raise MessageError(f"a {type(message).__name__} came; expected a message")
        message.metadata.__dict__["_message_id"] = identity
        return Letter(run, message)

    def _pulled(self, run: int, objects: list[str]) -> dict[str, bytes]:
        if len(objects) > _MOST_OBJECTS:
            raise MessageError(f"a message of {len(objects)} parts; at most {_MOST_OBJECTS}")
        left = self._most
        pull = make_pull_object_fn_protobuf(self._client.PullObject, self._here, run)

        def bounded(identity: str) -> bytes:
            nonlocal left
            content = pull(identity)
            left -= len(content)
            if left < 0:
                raise MessageError(f"a message of more than {self._most} bytes")
            return content

        return pull_objects(
            objects,
            pull_object_fn=bounded,
            max_time=_SECONDS,
            initial_backoff=_FIRST_WAIT,
            backoff_cap=_LONGEST_WAIT,
        )

    def reply(self, letter: Letter, records: RecordDict) -> None:
        """Send the answer to a message; how long it took is not said.

        Raises:
            LinkRefusedError, LinkError: as `activate` does.
        """
        answer = Message(records, reply_to=letter.message)
        with no_object_id_recompute(), _told():
            answer.metadata.__dict__["_message_id"] = answer.object_id
            request = PushMessagesRequest(
                node=self._here,
                messages_list=[message_to_proto(remove_content_from_message(answer))],
                message_object_trees=[get_object_tree(answer)],
                clientapp_runtime_list=[0.0],
            )
            response = self._client.PushMessages(request)
            push_objects(
                get_all_nested_objects(answer),
                push_object_fn=make_push_object_fn_protobuf(
                    self._client.PushObject, self._here, letter.run, response.session_id
                ),
                object_ids_to_push=set(response.objects_to_push),
            )

    def bundle(self, run: int) -> Bundle:
        """What a run says that it consists of.

        Raises:
            LinkRefusedError, LinkError: as `activate` does.
        """
        with _told():
            said = self._client.GetRun(GetRunRequest(node=self._here, run_id=run)).run
            fab = self._client.GetFab(
                GetFabRequest(node=self._here, hash_str=said.fab_hash, run_id=run)
            ).fab
        return Bundle(said.fab_id, said.fab_hash, said.primary_task_type, fab.content)

    @property
    def _here(self) -> Node:
        if self._node is None:
            raise LinkError("this node has not said that it is there; `activate` comes first")
        return self._node


def proxy_for(address: str) -> str | None:
    """The proxy that the environment names for a coordinator; loopback is never sent to one."""
    host = address.rpartition(":")[0].strip("[]")
    if host in ("localhost", "127.0.0.1", "::1") or urllib.request.proxy_bypass(host):
        return None
    return urllib.request.getproxies().get("https")


@contextmanager
def _told() -> Iterator[None]:
    """Every way in which the other side can fail, as an error of ours."""
    try:
        yield
    except httpx.HTTPStatusError as error:
        status = error.response.status_code
        if status in (httpx.codes.UNAUTHORIZED, httpx.codes.FORBIDDEN):
            raise LinkRefusedError(
                f"the coordinator refuses this node ({status}): its certificate or its key is "
                "revoked or unknown there, or the two clocks differ by more than a few seconds"
            ) from error
        if status == httpx.codes.PRECONDITION_FAILED:
            raise LinkBusyError(
                "the coordinator does not know this node's key, or still holds an earlier process "
                "of it for alive: that passes within a minute"
            ) from error
        raise LinkError(f"the coordinator answers {status}") from error
    except (MessageError, LinkError):
        raise
    except Exception as error:
        # Whatever Flower's parsers and the network raise on what a stranger sends.
        raise LinkError(
            f"the coordinator cannot be reached, or answers nonsense ({type(error).__name__}: "
            f"{error})"
        ) from error


class _Bounded(httpx.BaseTransport):
    """A transport that reads no more of an answer than a limit."""

    def __init__(self, inner: httpx.BaseTransport, most: int) -> None:
        self._inner = inner
        self._most = most

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        response = self._inner.handle_request(request)
        if not isinstance(response.stream, httpx.SyncByteStream):
            raise LinkError("an answer that is no stream")
        response.stream = _Counted(response.stream, self._most)
        return response

    def close(self) -> None:
        self._inner.close()


class _Counted(httpx.SyncByteStream):
    def __init__(self, inner: httpx.SyncByteStream, most: int) -> None:
        self._inner = inner
        self._most = most

    def __iter__(self) -> Iterator[bytes]:
        left = self._most
        for piece in self._inner:
            left -= len(piece)
            if left < 0:
                raise LinkError(f"the coordinator answers with more than {self._most} bytes")
            yield piece

    def close(self) -> None:
        self._inner.close()
