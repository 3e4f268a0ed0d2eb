"""The node's line to the coordinator: Flower's fleet protocol, over a TLS context of ours.

What Flower offers for this (`flwr.supernode`) parses the coordinator's bundle, opens a port for
workers, sleeps for seconds, and ends the process on a refusal. So its client and its messages are
used, and nothing around them. The other side is not trusted: no redirect is followed, no answer is
read beyond a limit, and what it sends is not looked into here (`Parcel.records` is for the worker
process). A task and its answer take four requests, two each, and one more for each further 4 MiB.
What of Flower is no public API is touched here and in `server.link` alone;
`tests/system/test_link.py` fails when it moves.
"""

from __future__ import annotations

import ipaddress
import math
import ssl
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from types import TracebackType
from typing import Self

import httpx
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.app import Message, RecordDict
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
from flwr.supercore.inflatable.inflatable_object import iterate_object_tree
from flwr.supercore.inflatable.inflatable_protobuf_utils import (
    make_pull_object_fn_protobuf,
    make_push_object_fn_protobuf,
)
from flwr.supercore.inflatable.inflatable_utils import (
    ObjectPullError,
    pull_objects,
    push_object_contents_from_iterable,
)
from flwr.supercore.interceptors.http.runtime_version import RuntimeVersionHttpInterceptor
from flwr.supercore.primitives.asymmetric import public_key_to_bytes
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

from client.bundle import LARGEST_BUNDLE, Bundle
from common.errors import (
    LinkBusyError,
    LinkError,
    LinkOverError,
    LinkRefusedError,
    MessageError,
    PeerError,
)
from common.parcel import Parcel

_HEARTBEAT = 15.0  # the coordinator waits two of these; the node sends one every 10 s
_SECONDS = 30.0
_OVERHEAD = 2**20
_FIRST_WAIT, _LONGEST_WAIT = 0.02, 0.5
_MOST_OBJECTS = 100_000
_LARGEST_ANSWER = 16 * 2**20  # the list of a message's objects is the longest
_LONGEST_ANSWER = 600.0
_LONGEST_LIFE = 8 * 86_400.0
_PULL, _BUNDLE = "/v1/fleet/pull-object", "/v1/fleet/get-fab"
_REFUSED = (httpx.codes.UNAUTHORIZED, httpx.codes.FORBIDDEN)


@dataclass(frozen=True)
class Letter:
    """A message of the coordinator, announced; what is in it is fetched when it is asked for.

    Attributes:
        run: Flower's number of the submission.
        kind: the message's type, such as ``train.step``; not trusted.
        ends: when it is of no use to anybody any more, by this machine's monotonic clock.
        lifetime: seconds from when it was written until then.
    """

    run: int
    kind: str
    ends: float
    lifetime: float
    _head: Message = field(repr=False)
    _fetch: Callable[[Letter], Parcel] = field(repr=False)

    def fetch(self) -> Parcel:
        """What was sent, unopened; may be asked for again after a LinkError.

        Raises:
            MessageError: if it is larger than the limit, or the coordinator has it no more.
            LinkOverError: if the run is over.
            LinkRefusedError, LinkError: as `FleetLink.activate` does.
        """
        return self._fetch(self)

    @property
    def content(self) -> RecordDict:
        """What was sent, opened; empty where the message holds an error or nothing."""
        return self.fetch().records()


class Answer:
    """The reply to a message, which may be sent again: it is the same one then."""

    def __init__(self, letter: Letter, parcel: Parcel) -> None:
        self.run = letter.run
        self.parcel = parcel
        self.message = Message(RecordDict(), reply_to=letter._head)
        self.message.metadata.__dict__["_message_id"] = parcel.identity


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
        self._transport = _Bounded(
            httpx.HTTPTransport(verify=context or True, proxy=proxy_for(address)),
            most_bytes + _OVERHEAD,
        )
        self._client._client = httpx.Client(
            transport=self._transport,
            timeout=_SECONDS,
            headers={"accept-encoding": "identity"},
            trust_env=False,
        )
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
                self._leave()
        finally:
            self._client.close()

    def _leave(self) -> None:
        """Whatever comes of it: the coordinator notices by the heartbeats that do not come."""
        with suppress(LinkError), _told():
            self._client.DeactivateNode(DeactivateNodeRequest(node_id=self._here.node_id))

    def activate(self) -> int:
        """Say that the node is there; returns the number that the coordinator has for it.

        Raises:
            LinkBusyError: if it is not known there, or an earlier process of it seems alive.
            LinkRefusedError: if it may not take part, or no longer.
            LinkError: if the coordinator cannot be reached, or answers nonsense.
        """
        request = ActivateNodeRequest(public_key=self._public, heartbeat_interval=_HEARTBEAT)
        with _told():
            self._node = Node(node_id=self._client.ActivateNode(request).node_id)
        return self._node.node_id

    def come_again(self) -> None:
        """Say that the node leaves, and that it is there: what it has not answered is asked again.

        A message goes to its node once. One that was lost with the line, on its way, would not be
        sent again to a node that has been there all the time.

        Raises:
            LinkBusyError: if a heartbeat came in between.
            LinkRefusedError, LinkError: as `activate` does.
        """
        self._leave()
        self.activate()

    def beat(self) -> None:
        """Say that the node is still there.

        Raises:
            LinkRefusedError: if it is not known there, or no longer.
            LinkError: if the coordinator cannot be reached, or answers nonsense.
        """
        request = SendNodeHeartbeatRequest(node=self._here, heartbeat_interval=_HEARTBEAT)
        with _told():
            if not self._client.SendNodeHeartbeat(request).success:
                raise LinkRefusedError("the coordinator has no place for this node's heartbeat")

    def receive(self) -> Letter | None:
        """The next message, of which only the head has come; None if there is none.

        Raises:
            LinkRefusedError, LinkError: as `activate` does.
        """
        with _told():
            response = self._client.PullMessages(PullMessagesRequest(node=self._here))
            if not response.messages_list:
                return None
            head = message_from_proto(response.messages_list[0])
            tree = response.message_object_trees[0]
            names = [each.object_id for each in iterate_object_tree(tree)]
            said = head.metadata
            life = said.ttl if math.isfinite(said.ttl) else 0.0
            life = min(max(life, 0.0), _LONGEST_LIFE)
            age = time.time() - (self.skew or 0.0) - said.created_at
            left = min(max(life - age, 0.0), life) if math.isfinite(age) else 0.0
        return Letter(
            said.run_id,
            str(said.message_type),
            time.monotonic() + left,
            life,
            head,
            lambda letter: self._fetched(letter, names),
        )

    def _fetched(self, letter: Letter, names: list[str]) -> Parcel:
        with _told(of_run=True):
            return Parcel(letter._head.metadata.message_id, self._pulled(letter, names))

    def _pulled(self, letter: Letter, names: list[str]) -> dict[str, bytes]:
        if len(names) > _MOST_OBJECTS:
            raise MessageError(f"a message of {len(names)} parts; at most {_MOST_OBJECTS}")
        left, counting = self._most, threading.Lock()
        pull = make_pull_object_fn_protobuf(self._client.PullObject, self._here, letter.run)

        def bounded(identity: str) -> bytes:
            nonlocal left
            content = pull(identity)
            with counting:
                left -= len(content)
                if left < 0:
                    raise MessageError(f"a message of more than {self._most} bytes")
            return content

        return pull_objects(
            names,
            pull_object_fn=bounded,
            max_time=max(_SECONDS, letter.ends - time.monotonic()),  # it may still be on its way
            initial_backoff=_FIRST_WAIT,
            backoff_cap=_LONGEST_WAIT,
        )

    def reply(self, letter: Letter, records: RecordDict) -> None:
        """Send the answer to a message; how long it took is not said.

        Raises:
            LinkOverError: if the run is over.
            LinkRefusedError, LinkError: as `activate` does.
        """
        self.send(Answer(letter, Parcel.of(records)))

    def send(self, answer: Answer) -> None:
        """Send an answer; one that was lost on the way may be sent again.

        Raises:
            LinkOverError: if the run is over.
            LinkRefusedError, LinkError: as `activate` does.
        """
        parcel = answer.parcel
        request = PushMessagesRequest(
            node=self._here,
            messages_list=[message_to_proto(answer.message)],
            message_object_trees=[parcel.tree],
            clientapp_runtime_list=[0.0],
        )
        with _told(of_run=True):
            response = self._client.PushMessages(request)
            asked = set(response.objects_to_push)
            push_object_contents_from_iterable(
                ((name, each) for name, each in parcel.objects.items() if name in asked),
                push_object_fn=make_push_object_fn_protobuf(
                    self._client.PushObject, self._here, answer.run, response.session_id
                ),
            )

    def bundle(self, run: int) -> Bundle:
        """What a run says that it consists of.

        Raises:
            MessageError: if it is larger than a bundle may be by far.
            LinkOverError: if the run is over.
            LinkRefusedError, LinkError: as `activate` does.
        """
        with _told(of_run=True):
            said = self._client.GetRun(GetRunRequest(node=self._here, run_id=run)).run
            fab = self._client.GetFab(
                GetFabRequest(node=self._here, hash_str=said.fab_hash, run_id=run)
            ).fab
        return Bundle(said.fab_id, said.fab_hash, said.primary_task_type, fab.content)

    @property
    def skew(self) -> float | None:
        """Seconds by which this machine's clock is ahead of the coordinator's; within a second.

        As of its last answer; None before the first.
        """
        return self._transport.skew

    @property
    def _here(self) -> Node:
        if self._node is None:
            raise LinkError("this node has not said that it is there; `activate` comes first")
        return self._node


def proxy_for(address: str) -> str | None:
    """The proxy that the environment names for a coordinator; loopback is never sent to one."""
    host = address.rpartition(":")[0].strip("[]")
    if host == "localhost" or _is_loopback(host) or urllib.request.proxy_bypass(host):
        return None
    return urllib.request.getproxies().get("https")


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


@contextmanager
def _told(*, of_run: bool = False) -> Iterator[None]:
    """Every way in which the other side can fail, as an error of ours.

    Where it is asked about a run, the coordinator forbids (403) what belongs to one that is over,
    or is asked no longer.
    """
    try:
        yield
    except httpx.HTTPStatusError as error:
        raise _error_of(error.response, of_run) from error
    except (MessageError, LinkError):
        raise
    except ObjectPullError as error:
        raise MessageError(f"a part of the message is not to be had ({error!s:.200})") from error
    except Exception as error:
        # Whatever Flower's parsers and the network raise on what a stranger sends.
        raise LinkError(
            f"the coordinator cannot be reached, or answers nonsense ({type(error).__name__}: "
            f"{error!s:.300})"
        ) from error


def _error_of(response: httpx.Response, of_run: bool) -> LinkError:
    status = response.status_code
    if of_run and status == httpx.codes.FORBIDDEN:
        return LinkOverError(
            "the run is over at the coordinator, or nobody there waits for this any more"
        )
    if status in _REFUSED:
        return LinkRefusedError(
            f"the coordinator refuses this node ({status}): its certificate or its key is "
            "revoked or unknown there, or the two clocks differ by more than a few seconds"
        )
    if status == httpx.codes.PRECONDITION_FAILED:
        return LinkBusyError(
            "the coordinator does not know this node's key, or still holds an earlier process "
            "of it for alive: that passes within half a minute"
        )
    return LinkError(f"the coordinator answers {status}")


class _Bounded(httpx.BaseTransport):
    """A transport that reads no more of an answer than a limit, and no packed one.

    Attributes:
        skew: see `FleetLink.skew`.
    """

    def __init__(self, inner: httpx.BaseTransport, most: int) -> None:
        self._inner = inner
        self._most = most
        self.skew: float | None = None

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        late = threading.Timer(_LONGEST_ANSWER, self._inner.close)
        late.daemon = True
        late.start()  # a head may come drop by drop, or after any number of others (RFC 9110, 15.2)
        try:
            response = self._inner.handle_request(request)
        finally:
            late.cancel()
        if not isinstance(response.stream, httpx.SyncByteStream):
            raise LinkError("an answer that is no stream")
        path = request.url.path
        too_much = MessageError if path in (_PULL, _BUNDLE) else LinkError  # refused, not retried
        response.stream = _Counted(response.stream, self._most_of(path), too_much)
        if response.headers.get("content-encoding", "identity") != "identity":
            response.close()  # a few bytes could become any number
            raise LinkError("the coordinator packs its answer, which nobody asked for")
        response.headers.pop("set-cookie", None)  # a node says nothing again that it is told to
        with suppress(KeyError, ValueError, TypeError, OverflowError):
            said = parsedate_to_datetime(response.headers["date"]).timestamp()
            self.skew = time.time() - said
        return response

    def _most_of(self, path: str) -> int:
        if path == _PULL:
            return self._most
        if path == _BUNDLE:
            return LARGEST_BUNDLE + _OVERHEAD
        return _LARGEST_ANSWER

    def close(self) -> None:
        self._inner.close()


class _Counted(httpx.SyncByteStream):
    def __init__(self, inner: httpx.SyncByteStream, most: int, too_much: type[PeerError]) -> None:
        self._inner = inner
        self._most = most
        self._too_much = too_much

    def __iter__(self) -> Iterator[bytes]:
        left, last = self._most, time.monotonic() + _LONGEST_ANSWER
        for piece in self._inner:
            left -= len(piece)
            if left < 0:
                raise self._too_much(f"the coordinator answers with more than {self._most} bytes")
            if time.monotonic() > last:
                raise LinkError(f"the coordinator's answer takes more than {_LONGEST_ANSWER:g} s")
            yield piece

    def close(self) -> None:
        self._inner.close()
