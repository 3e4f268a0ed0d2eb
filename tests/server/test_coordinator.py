"""The coordinator's process under attack: every caller over real TLS, on loopback."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import socket
import ssl
import threading
import time
from base64 import b64encode
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
import httpx
import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.app import ArrayRecord, ConfigRecord, RecordDict
from flwr.proto.fleet_pb2 import ActivateNodeRequest, PullMessagesRequest, PushMessagesRequest
from flwr.proto.message_pb2 import PullObjectRequest
from flwr.proto.node_pb2 import Node
from flwr.supercore.interceptors.http.runtime_version import RuntimeVersionHttpInterceptor
from flwr.supercore.primitives.asymmetric import public_key_to_bytes
from flwr.supercore.protobuf.constants import PROTOBUF_MEDIA_TYPE
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor
from grpc_health.v1 import health_pb2, health_pb2_grpc
from sqlalchemy import text
from sqlalchemy.exc import OperationalError

from client.link import FleetLink
from common import certificates
from common.clock import Clock
from common.enrolment import Bundle, Request
from common.errors import CloisterError, ConfigError, LinkError, LinkRefusedError, RunError
from server.authority import Authority, Lifetimes, NewFederation, Signed
from server.coordinator import Coordinator, Settings, is_served, open_exchange, run_service
from server.fleet import Limits, bound
from server.health import Health
from server.link import Exchange, bundle
from server.runs import CoordinatorHome

PASSPHRASE = "five words that were drawn by lot"  # noqa: S105 - of this test
SIGNED = Signed("Ada", "a test")
MEGABYTE = 2**20
PATIENCE = 120.0
QUICK = Limits(
    handshake_seconds=5.0, head_seconds=1.0, body_seconds=1.0, answer_seconds=3.0, connections=8
)


def wait_until(true: Callable[[], Any], seconds: float = PATIENCE) -> None:
    last = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < last, "waited in vain"
        time.sleep(0.02)


@dataclass(frozen=True)
class Caller:
    """A key, the bundle that enrolled it, and how it speaks."""

    key: ec.EllipticCurvePrivateKey
    bundle: Bundle
    port: int

    @property
    def identity(self) -> bytes:
        own = certificates.certificate_pem(self.bundle.certificate)
        return certificates.key_pem(self.key) + own

    def context(self, identity: bytes | None = None) -> ssl.SSLContext:
        return certificates.client_context(identity or self.identity, self.bundle.authority)

    def link(self, key: ec.EllipticCurvePrivateKey | None = None) -> FleetLink:
        return FleetLink(
            f"localhost:{self.port}", key or self.key, self.context(), most_bytes=MEGABYTE
        )

    def client(self) -> httpx.Client:
        return httpx.Client(
            base_url=f"https://localhost:{self.port}", verify=self.context(), timeout=30
        )

    def fleet(self) -> FleetHttpClient:
        made = FleetHttpClient(
            f"https://localhost:{self.port}",
            interceptors=[
                RuntimeVersionHttpInterceptor(component_name="SuperNode"),
                NodeAuthHttpInterceptor(self.key, self.key.public_key()),
            ],
        )
        made._client.close()
        made._client = httpx.Client(verify=self.context(), timeout=30)
        return made

    def socket(self, receive: int = 0) -> ssl.SSLSocket:
        plain = socket.socket()
        if receive:
            plain.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive)
        plain.settimeout(30)
        plain.connect(("127.0.0.1", self.port))
        return self.context().wrap_socket(plain, server_hostname="localhost")


class Service:
    """A coordinator in a thread."""

    def __init__(self, home: CoordinatorHome, settings: Settings, clock: Clock) -> None:
        self.coordinator = Coordinator(home, settings, clock)
        self.error: BaseException | None = None
        self.port = 0
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()
        wait_until(lambda: self.port or self.error)

    def _serve(self) -> None:
        try:
            self.coordinator.serve(self._ready)
        except CloisterError as error:
            self.error = error

    def _ready(self, port: int) -> None:
        self.port = port

    def close(self) -> None:
        self.coordinator.stop()
        self._thread.join(PATIENCE)
        assert not self._thread.is_alive()


class Federation:
    """A home, its authority, and a service on it."""

    def __init__(self, folder: Path, clock: Clock | None = None) -> None:
        new = NewFederation("chest", ["localhost"], 9092, Lifetimes())
        began = clock or Clock()
        self.authority = Authority.create(folder / "home", new, PASSPHRASE, SIGNED, began)
        self.home = CoordinatorHome(folder / "home")
        self.services: list[Service] = []

    def serve(self, clock: Clock | None = None, **settings: Any) -> Service:
        found = Settings(host="127.0.0.1", port=0, limits=QUICK, **settings)
        self.services.append(Service(self.home, found, clock or Clock()))
        assert self.services[-1].error is None, self.services[-1].error
        return self.services[-1]

    @property
    def port(self) -> int:
        return self.services[-1].port

    def enrol(self, site: str, days: int = 30) -> Caller:
        key = certificates.new_key()
        made = self.authority.enrol(Request.make(key, site), 100, days, SIGNED)
        return Caller(key, made, self.port)

    def known(self, caller: Caller) -> bool:
        exchange = self.services[-1].coordinator._exchange
        key = public_key_to_bytes(caller.key.public_key())
        return key in {node.public_key for node in exchange.nodes()}

    def enter(self, site: str) -> Caller:
        caller = self.enrol(site)
        wait_until(lambda: self.known(caller))
        return caller

    def close(self) -> None:
        for service in self.services:
            service.close()


@pytest.fixture
def federation(tmp_path: Path) -> Iterator[Federation]:
    made = Federation(tmp_path)
    yield made
    made.close()


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Federation, Caller]]:
    """A federation that no test changes, and its site `north`."""
    made = Federation(tmp_path_factory.mktemp("shared"))
    made.serve()
    yield made, made.enter("north")
    made.close()


def refused(call: Callable[[], Any]) -> bool:
    """Whether the other side ends the connection, in the handshake or right after it.

    Of TLS 1.3 a client learns only when it reads that its certificate was not taken.
    """
    try:
        call()
    except (ssl.SSLError, ConnectionError, httpx.TransportError):
        return True
    return False


# --- Who may speak ------------------------------------------------------------------------------


def test_an_enrolled_node_comes_in(shared: tuple[Federation, Caller]):
    _, north = shared
    with north.link() as link:
        assert link.activate()
        link.beat()
        assert link.receive() is None


def test_nobody_comes_in_without_a_certificate_of_the_authority(
    shared: tuple[Federation, Caller], tmp_path: Path
):
    federation, north = shared
    trusting = ssl.create_default_context()
    trusting.check_hostname, trusting.verify_mode = False, ssl.CERT_NONE
    url = f"https://localhost:{federation.port}/v1/fleet/pull-messages"
    assert refused(lambda: httpx.post(url, verify=trusting))

    other = Federation(tmp_path)
    other.services = federation.services
    stranger = other.enrol("north")
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    certificates.load_identity(context, stranger.identity)
    assert refused(lambda: httpx.post(url, verify=context))

    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    certificates.load_identity(context, north.identity)
    assert not refused(lambda: httpx.post(url, verify=context))


def test_the_coordinator_s_own_certificate_is_no_node_s(shared: tuple[Federation, Caller]):
    federation, north = shared
    own = (federation.home.path / "tls.pem").read_bytes()
    context = north.context(own)
    url = f"https://localhost:{federation.port}/v1/fleet/pull-messages"
    assert refused(lambda: httpx.post(url, verify=context))


def test_a_copied_certificate_is_nothing_without_its_key(shared: tuple[Federation, Caller]):
    _, north = shared
    stolen = certificates.key_pem(certificates.new_key())
    stolen += certificates.certificate_pem(north.bundle.certificate)
    with pytest.raises(ssl.SSLError, match=r"(?i)mismatch"):
        north.context(stolen)


def test_tls_1_2_and_plain_http_are_not_spoken(shared: tuple[Federation, Caller]):
    federation, north = shared
    context = north.context()
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    url = f"localhost:{federation.port}/v1/fleet/pull-messages"
    assert refused(lambda: httpx.post(f"https://{url}", verify=context))
    assert refused(lambda: httpx.post(f"http://{url}"))
    assert not refused(lambda: httpx.post(f"https://{url}", verify=north.context()))


@pytest.mark.parametrize(
    "path",
    [
        "/",
        "/docs",
        "/openapi.json",
        "/health",
        "/v1/control/start-run",
        "/v1/control/register-node",
        "/v1/control/unregister-node",
        "/v1/control/list-nodes",
        "/v1/runtime/acquire-task",
        "/v1/runtime/push-messages",
        "/v1/fleet/../control/start-run",
        "/v1/fleet/%2e%2e/control/start-run",
        "//v1/control/start-run",
        "/v1/fleet",
        "/v1/fleet/",
        "/v1/fleet/register-node",
        "/v1/fleet/unregister-node",
        "/v1/fleet/pull-messages/",
        "/v1/fleet//pull-messages",
        "/v1/fleet/pull-messages%3f/../x",
        "/v1/fleet/PULL-MESSAGES",
        "http://localhost/v1/control/start-run",
        "*",
    ],
)
def test_an_enrolled_node_reaches_the_fleet_s_interface_alone(
    shared: tuple[Federation, Caller], path: str
):
    _, north = shared
    key = b64encode(public_key_to_bytes(north.key.public_key()))
    with north.socket() as line:
        head = f"POST {path} HTTP/1.1\r\nhost: localhost\r\ncontent-length: 0\r\n".encode()
        head += b"content-type: application/x-protobuf\r\nflwr-public-key: " + key
        line.sendall(head + b"\r\n\r\n")
        assert line.recv(4096).startswith(b"HTTP/1.1 404")


def test_a_node_cannot_register_or_unregister(shared: tuple[Federation, Caller]):
    federation, north = shared
    before = federation.known(north)
    with north.fleet() as fleet:
        for path in ("register-node", "unregister-node"):
            answer = fleet._client.post(
                f"https://localhost:{federation.port}/v1/fleet/{path}",
                content=b"",
                headers={"content-type": "application/x-protobuf"},
            )
            assert answer.status_code == 404
    assert before is federation.known(north) is True


def test_a_node_does_not_speak_with_the_key_of_another(federation: Federation):
    federation.serve()
    north, south = federation.enter("north"), federation.enter("south")
    with north.link() as link:
        link.activate()
    crossed = north.link(south.key)  # the connection is north's, the signature south's
    with pytest.raises(LinkRefusedError, match="401"):
        crossed.activate()
    crossed.close()
    here = {node.name: node.online for node in Exchange(federation.home.database).nodes()}
    assert here["south"] is False


def test_a_node_does_not_answer_in_the_name_of_another(federation: Federation):
    federation.serve()
    north, south = federation.enter("north"), federation.enter("south")
    exchange = Exchange(federation.home.database)
    run = exchange.submit(bundle(), {})
    with north.link() as one, south.link() as other, exchange.conducting(run) as grid:
        number = one.activate()
        asked = RecordDict({"question": ConfigRecord({"round": 1})})
        (identity,) = grid.push_messages(
            [grid.create_message(asked, "train.step", number, "", ttl=60.0)]
        )
        letter = one.receive()
        assert letter is not None
        forger = other.activate()
        assert forger != number
        with pytest.raises(LinkError, match="401"):
            other.reply(letter, RecordDict({"answer": ConfigRecord({"said": b"forged"})}))
        assert list(grid.pull_messages([identity])) == []
        one.reply(letter, RecordDict({"answer": ConfigRecord({"said": b"true"})}))
        (reply,) = grid.pull_messages([identity])
    assert reply.content["answer"] == {"said": b"true"}


def test_a_node_does_not_ask_for_what_is_another_s(federation: Federation):
    federation.serve()
    north, south = federation.enter("north"), federation.enter("south")
    with north.link() as one, south.link() as other:
        number = one.activate()
        other.activate()
        with south.fleet() as fleet, pytest.raises(httpx.HTTPStatusError, match="401"):
            fleet.PullMessages(PullMessagesRequest(node=Node(node_id=number)))
        with south.fleet() as fleet, pytest.raises(httpx.HTTPStatusError):
            fleet.PushMessages(PushMessagesRequest(node=Node(node_id=other._here.node_id)))


# --- Who may speak no longer --------------------------------------------------------------------


def test_a_revoked_node_is_refused_at_its_next_word_on_an_open_connection(federation: Federation):
    federation.serve()
    north = federation.enter("north")
    with north.link() as link:
        link.activate()
        assert link.receive() is None
        federation.authority.revoke("north", SIGNED)
        for say in (link.receive, link.beat, link.activate):
            with pytest.raises(LinkRefusedError, match="401"):
                say()
    wait_until(lambda: not federation.known(north))
    again = federation.enter("north")  # with a new key
    with again.link() as link:
        assert link.activate()


def in_days(days: float) -> Clock:
    return Clock(date=lambda: datetime.now(UTC) + timedelta(days=days))


def test_an_expired_node_is_refused_in_the_handshake(tmp_path: Path):
    federation = Federation(tmp_path, in_days(-3))
    federation.serve()
    try:
        link = federation.enrol("north", days=1).link()
        with pytest.raises(LinkError, match="cannot be reached"):
            link.activate()
        with federation.enter("south").link() as link:
            assert link.activate()
    finally:
        federation.close()


def test_a_certificate_that_ends_while_its_node_is_connected_is_good_no_more(
    federation: Federation,
):
    """OpenSSL looks at the time in the handshake alone; the guard looks at each request."""
    federation.serve(in_days(29))
    north = federation.enter("north")
    with north.link() as link:
        assert link.activate()
    federation.services[-1].close()
    federation.serve(in_days(31))
    again = Caller(north.key, north.bundle, federation.port)
    link = again.link()
    with pytest.raises(LinkRefusedError, match="401"):
        link.activate()


def test_a_stolen_or_edited_roster_lets_nobody_in(federation: Federation):
    federation.serve()
    north = federation.enter("north")
    roster = federation.home.path / "roster.json"
    before = roster.read_bytes()
    federation.authority.revoke("north", SIGNED)
    newest = roster.read_bytes()
    link = north.link()
    for content in (before, newest.replace(b"revoked", b"enrolled")):
        roster.write_bytes(content)
        with pytest.raises(LinkError, match=r"503|401") as error:
            link.activate()
        assert error.type in (LinkError, LinkRefusedError)
    roster.unlink()
    with pytest.raises(LinkError, match="503"):
        link.activate()
    roster.write_bytes(newest)
    with pytest.raises(LinkRefusedError, match="401"):
        link.activate()


def test_a_roster_that_cannot_be_read_refuses_nobody_for_good(federation: Federation):
    """An honest node takes 401 for its end; a coordinator in trouble must not say it."""
    federation.serve()
    north = federation.enter("north")
    roster = federation.home.path / "roster.json"
    kept = roster.read_bytes()
    with north.link() as link:
        link.activate()
        roster.write_bytes(b"{}")
        with pytest.raises(LinkError, match="503") as error:
            link.receive()
        assert error.type is LinkError
        roster.write_bytes(kept)
        assert link.receive() is None


def test_a_new_certificate_is_shown_to_new_connections_and_the_old_ones_go_on(
    federation: Federation,
):
    service = federation.serve()
    north = federation.enter("north")

    def shown() -> bytes | None:
        with north.socket() as line:
            return line.getpeercert(True)

    with north.link() as link:
        link.activate()
        before = shown()
        federation.authority.renew_tls((), None, 30, SIGNED)
        service.coordinator.refresh()
        wait_until(lambda: shown() != before)
        link.beat()


# --- What one caller may take -------------------------------------------------------------------


def test_a_request_that_comes_drop_by_drop_is_cut_off(shared: tuple[Federation, Caller]):
    _, north = shared
    began = time.monotonic()
    with north.socket() as slow:
        slow.settimeout(30)
        slow.sendall(b"POST /v1/fleet/pull-messages HTTP/1.1\r\n")
        while not _is_closed(slow):
            slow.settimeout(30)
            with suppress(OSError):
                slow.sendall(b"x-drop: 1\r\n")
            time.sleep(0.1)
            assert time.monotonic() - began < 20


def test_a_body_that_comes_drop_by_drop_is_cut_off(shared: tuple[Federation, Caller]):
    _, north = shared
    key = b64encode(public_key_to_bytes(north.key.public_key()))
    with north.socket() as slow:
        slow.settimeout(30)
        head = b"POST /v1/fleet/pull-messages HTTP/1.1\r\nhost: x\r\ncontent-length: 1000\r\n"
        slow.sendall(head + b"flwr-public-key: " + key + b"\r\n\r\nx")
        assert slow.recv(4096).startswith(b"HTTP/1.1 408")


@pytest.mark.parametrize("path", ["pull-messages", "push-object"])
@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_that_is_too_large_is_not_read(
    shared: tuple[Federation, Caller], path: str, chunked: bool
):
    _, north = shared
    most = 8 * MEGABYTE if path == "push-object" else 65536
    key = b64encode(public_key_to_bytes(north.key.public_key()))
    with north.socket() as line:
        head = f"POST /v1/fleet/{path} HTTP/1.1\r\nhost: x\r\n".encode()
        head += b"flwr-public-key: " + key + b"\r\n"
        if chunked:
            line.sendall(head + b"transfer-encoding: chunked\r\n\r\n")
            piece = b"10000\r\n" + b"x" * 65536 + b"\r\n"
            with suppress(OSError):
                for _ in range(most // 65536 + 2):
                    line.sendall(piece)
        else:
            line.sendall(head + f"content-length: {most + 1}\r\n\r\n".encode())
        assert line.recv(4096).startswith(b"HTTP/1.1 413")


def test_many_connections_of_strangers_and_of_one_node_keep_nobody_out(federation: Federation):
    federation.serve()
    north, south = federation.enter("north"), federation.enter("south")
    elsewhere = ("127.0.0.2", 0)
    idle = [
        socket.create_connection(("127.0.0.1", north.port), source_address=elsewhere)
        for _ in range(300)
    ]
    lines = [north.socket() for _ in range(3 * QUICK.connections)]
    try:
        with south.link() as link:
            link.activate()
            link.beat()

        def closed() -> int:
            return sum(_is_closed(line) for line in lines)

        wait_until(lambda: closed() >= 2 * QUICK.connections)
        assert sum(map(_is_closed, idle)) >= 300 - QUICK.strangers  # before a handshake's time
        wait_until(lambda: all(map(_is_closed, idle)))  # a handshake has its time
    finally:
        for line in [*idle, *lines]:
            line.close()
    with north.link() as link:
        wait_until(lambda: not refused_by_link(link))


def refused_by_link(link: FleetLink) -> bool:
    try:
        link.activate()
    except LinkError:
        return True
    return False


def _is_closed(line: socket.socket) -> bool:
    line.settimeout(0.005)
    try:
        return line.recv(1) == b""
    except (TimeoutError, ssl.SSLWantReadError):
        return False
    except OSError:
        return True


def said(north: Caller, request: bytes) -> bytes:
    """What comes back to any bytes, until the other side has said enough."""
    with north.socket() as line:
        with suppress(OSError):
            line.sendall(request)
        found = b""
        with suppress(OSError):
            while piece := line.recv(65536):
                found += piece
                if b"\r\n\r\n" in found:
                    break
        return found


def head_of(north: Caller, *lines: bytes, method: bytes = b"POST") -> bytes:
    key = b64encode(public_key_to_bytes(north.key.public_key()))
    first = method + b" /v1/fleet/pull-messages HTTP/1.1"
    return b"\r\n".join([first, b"host: x", b"flwr-public-key: " + key, *lines, b"", b""])


SMUGGLED = b"POST /v1/control/start-run HTTP/1.1\r\nhost: x\r\ncontent-length: 0\r\n\r\n"


@pytest.mark.parametrize(
    "lines",
    [
        (b"content-length: 5", b"content-length: 6"),
        (b"content-length: 5, 6",),
        (b"content-length: -1",),
        (b"content-length: +5",),
        (b"content-length: " + b"9" * 5000,),
        (b"transfer-encoding: gzip, chunked",),
        (b"transfer-encoding: chunked", b"transfer-encoding: identity"),
        (b"transfer-encoding : chunked",),
        (b" folded: x",),
        (b"x: a\x00b",),
        (b"x: " + b"a" * 100_000,),
    ],
)
def test_a_head_that_two_could_read_in_two_ways_is_read_in_none(
    shared: tuple[Federation, Caller], lines: tuple[bytes, ...]
):
    _, north = shared
    answer = said(north, head_of(north, *lines) + b"0\r\n\r\n" + SMUGGLED)
    assert answer[:12] in {b"HTTP/1.1 %d" % status for status in (400, 401, 413, 501)} or not answer
    assert answer.count(b"HTTP/1.1") <= 1  # what came behind it was not read as a request


def test_what_follows_a_request_on_its_line_is_a_request_of_its_own(
    shared: tuple[Federation, Caller],
):
    """A length beside chunks: the chunks count, and the line ends with the answer."""
    _, north = shared
    both = (b"content-length: 300", b"transfer-encoding: chunked")
    with north.socket() as line:
        line.sendall(head_of(north, *both) + b"0\r\n\r\n" + SMUGGLED)
        answers, until = b"", time.monotonic() + 5
        line.settimeout(1)
        while time.monotonic() < until:
            with suppress(TimeoutError, OSError):
                piece = line.recv(65536)
                answers += piece
                if not piece:
                    break
    assert b"HTTP/1.1 2" not in answers
    assert answers.count(b"HTTP/1.1 404") <= 1


@pytest.mark.parametrize(
    "method", [b"GET", b"HEAD", b"PUT", b"DELETE", b"OPTIONS", b"TRACE", b"CONNECT", b"PRI", b"X"]
)
def test_no_other_method_is_spoken(shared: tuple[Federation, Caller], method: bytes):
    _, north = shared
    answer = said(north, head_of(north, b"content-length: 0", method=method))
    assert answer.startswith((b"HTTP/1.1 404", b"HTTP/1.1 400"))


def test_no_other_protocol_is_spoken(shared: tuple[Federation, Caller]):
    _, north = shared
    upgrade = (b"connection: upgrade", b"upgrade: websocket", b"sec-websocket-version: 13")
    asked = head_of(north, *upgrade, b"sec-websocket-key: AAAAAAAAAAAAAAAAAAAAAA==", method=b"GET")
    assert not said(north, asked).startswith(b"HTTP/1.1 101")
    assert b"HTTP/1.1 101" not in said(
        north, head_of(north, b"connection: upgrade", b"upgrade: h2c", b"content-length: 0")
    )
    assert not said(north, b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n").startswith(b"HTTP/2")


def test_a_packed_body_is_not_unpacked(shared: tuple[Federation, Caller]):
    _, north = shared
    bomb = gzip.compress(b"\x0a" * 50 * MEGABYTE)
    assert len(bomb) < 65536
    with north.fleet() as fleet:
        before = fleet._client.post
        answer = before(
            f"https://localhost:{north.port}/v1/fleet/pull-messages",
            content=bomb,
            headers={
                "content-type": PROTOBUF_MEDIA_TYPE,
                "content-encoding": "gzip",
                "flwr-public-key": b64encode(public_key_to_bytes(north.key.public_key())).decode(),
            },
        )
    assert answer.status_code in (400, 401)


def test_a_host_that_is_a_path_is_nobody_s(federation: Federation):
    """What is asked for is in the first line alone: no other part of a head can say it."""
    federation.serve()
    north = federation.enter("north")
    with north.link() as link:
        link.activate()
        hosts = ("x/v1/control/start-run?", "x/v1/runtime/push-messages#", "u:p@x/y?z", "")
        for host in hosts:
            link._client._client.headers["host"] = host
            link.beat()  # it is what it would be with any other host


def test_what_is_signed_is_good_for_its_own_connection_alone(federation: Federation):
    """Who has seen a request, whole, cannot say it again: that takes the certificate's key."""
    federation.serve()
    north, south = federation.enter("north"), federation.enter("south")
    seen: dict[str, str] = {}
    with north.link() as link:
        link._client._client.event_hooks = {"request": [lambda r: seen.update(r.headers)]}
        link.activate()
    body = ActivateNodeRequest(
        public_key=public_key_to_bytes(north.key.public_key()), heartbeat_interval=30.0
    ).SerializeToString()
    heads = {name: value for name, value in seen.items() if name != "content-length"}
    with south.client() as replayed:
        answer = replayed.post("/v1/fleet/activate-node", content=body, headers=heads)
    assert answer.status_code == 401
    here = {node.name: node.online for node in Exchange(federation.home.database).nodes()}
    assert here == {"north": False, "south": False}


def test_who_does_not_read_its_answer_is_cut_off(federation: Federation):
    federation.serve()
    north = federation.enter("north")
    exchange = Exchange(federation.home.database)
    run = exchange.submit(bundle(), {})
    numbers = RecordDict({"w": ArrayRecord([np.ones(4 * MEGABYTE, np.float32)])})
    with north.link() as link, exchange.conducting(run) as grid:
        number = link.activate()
        list(grid.push_messages([grid.create_message(numbers, "train.step", number, "", ttl=60.0)]))
        letter = link.receive()
        assert letter is not None
        heads: dict[str, str] = {}
        link._client._client.event_hooks = {"request": [lambda r: heads.update(r.headers)]}
        link.beat()
        name, *_ = exchange_parts(exchange)
        body = PullObjectRequest(
            node=Node(node_id=number), run_id=run, object_id=name
        ).SerializeToString()
        kept = {k: v for k, v in heads.items() if k.startswith("flwr") or k == "content-type"}
        kept |= {"host": "x", "content-length": str(len(body))}
        head = "".join(f"{k}: {v}\r\n" for k, v in kept.items())
        asked = f"POST /v1/fleet/pull-object HTTP/1.1\r\n{head}\r\n".encode() + body
        lines = [north.socket(receive=4096) for _ in range(6)]
        for line in lines:
            line.sendall(6 * asked)  # more than the kernel has room for
        time.sleep(0.5)
        link.beat()  # nobody else waits for it
        time.sleep(QUICK.answer_seconds + 1)
        assert all(len(read_all(line)) < 24 * MEGABYTE for line in lines)
        with north.socket() as reads:
            reads.sendall(6 * asked)
            reads.settimeout(10)
            found = b""
            while len(found) < 24 * MEGABYTE:
                found += reads.recv(2**20)


def read_all(line: ssl.SSLSocket) -> bytes:
    found = b""
    line.settimeout(5)
    with suppress(OSError):
        while piece := line.recv(2**20):
            found += piece
    return found


def exchange_parts(exchange: Exchange) -> list[str]:
    with exchange.state.session() as session:
        rows = session.execute(
            text("SELECT object_id FROM objects ORDER BY LENGTH(content) DESC")
        ).all()
    return [str(name) for (name,) in rows]


# --- The home -----------------------------------------------------------------------------------


def test_one_service_serves_a_home(federation: Federation):
    service = federation.serve()
    assert is_served(federation.home)
    with pytest.raises(ConfigError, match=f"another process serves it; process {os.getpid()}"):
        Coordinator(federation.home, Settings("127.0.0.1", 0)).serve()
    service.close()
    assert not is_served(federation.home)


def test_a_port_that_is_taken_is_said(federation: Federation):
    with bound("127.0.0.1", 0) as taken:
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"127.0.0.1 port {port}: cannot listen there"):
            Coordinator(federation.home, Settings("127.0.0.1", port)).serve()
    assert not is_served(federation.home)


def test_a_damaged_database_is_set_aside_and_everybody_is_known_again(federation: Federation):
    first = federation.serve()
    north = federation.enter("north")
    first.close()
    database = federation.home.database
    content = bytearray(database.read_bytes())
    content[4096:8192] = b"\xff" * 4096
    database.write_bytes(content)
    for left in ("-wal", "-shm"):
        Path(f"{database}{left}").unlink(missing_ok=True)

    federation.serve()
    asides = database.parent.glob("flower.sqlite.damaged-*")
    (aside,) = (path for path in asides if not path.name.endswith(("-wal", "-shm")))
    assert aside.read_bytes() == bytes(content)
    again = Caller(north.key, north.bundle, federation.port)
    with again.link() as link:
        assert link.activate()


@pytest.mark.parametrize(
    "error",
    [
        OSError(28, "No space left on device"),
        OperationalError("INSERT", {}, Exception("database or disk is full")),
    ],
)
def test_a_home_that_cannot_be_written_is_said_with_the_way_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
):
    def serve(*_: Any) -> None:
        raise error

    monkeypatch.setattr(Coordinator, "serve", serve)
    with pytest.raises(RunError, match=r"(No space|is full).*start the service again"):
        run_service(CoordinatorHome(tmp_path), Settings(), lambda _: None)


def test_a_database_that_is_whole_stays(federation: Federation):
    exchange = open_exchange_of(federation.home)
    number = exchange.register(public_key_to_bytes(certificates.new_key().public_key()), "north")
    assert [node.number for node in open_exchange_of(federation.home).nodes()] == [number]


def open_exchange_of(home: CoordinatorHome) -> Exchange:
    home.service.mkdir(exist_ok=True)
    return open_exchange(home.database)


def probe(port: int) -> Callable[[str], int]:
    """Asks for a part: 1 if it serves, 2 if it does not."""

    def ask(part: str) -> int:
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
            stub = health_pb2_grpc.HealthStub(channel)
            return int(stub.Check(health_pb2.HealthCheckRequest(service=part), timeout=30).status)

    return ask


def test_a_loop_that_hangs_is_not_alive(free_port: Callable[[], int]):
    port = free_port()
    with Health(port, stale=0.5).serving() as health:
        ask = probe(port)
        assert ask("live") == 2
        health.report({"disk": ""})
        assert ask("live") == ask("") == ask("disk") == 1
        wait_until(lambda: {ask("live"), ask(""), ask("disk")} == {2})
        health.report({"disk": "full"})
        assert (ask("live"), ask("ready"), ask("disk")) == (1, 2, 2)
        with pytest.raises(ConfigError, match="cannot listen there for probes"):
            Health(port).serving().__enter__()


def test_probes_learn_whether_it_is_well(federation: Federation, free_port: Callable[[], int]):
    port = free_port()
    federation.serve(health_port=port)

    ask = probe(port)
    wait_until(lambda: ask("") == ask("ready") == 1)
    roster = federation.home.path / "roster.json"
    shutil.move(roster, roster.with_suffix(".away"))
    wait_until(lambda: ask("roster") == ask("") == 2)
    assert ask("disk") == ask("live") == 1
    shutil.move(roster.with_suffix(".away"), roster)
    wait_until(lambda: ask("") == 1)


def test_what_serves_is_on_the_disk_while_it_does(federation: Federation):
    service = federation.serve()
    path = federation.home.service / "service.json"
    assert json.loads(path.read_text())["port"] == service.port
    service.close()
    assert not path.exists()
