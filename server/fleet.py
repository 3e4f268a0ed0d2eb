"""The fleet's listener: TLS 1.3 both ways, and a guard before everything that Flower does.

A caller without a certificate of this federation's authority does not get past the handshake. Of
those that do, each request is checked: the key of the certificate is the key of Flower's header,
and the roster has it now. What a caller may send, how slowly, and how much at once is bounded,
so that one enrolled site cannot keep the others out.
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import socket
import ssl
import threading
import time
from base64 import b64decode
from collections import Counter
from dataclasses import dataclass
from typing import Any, ClassVar

import uvicorn
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from common.certificates import key_of_certificate, key_of_pem
from common.errors import ConfigError, IdentityError, RunError
from server.link import FLEET, PUBLIC_KEY_HEADER, SITE
from server.roster import Roster, Site
from server.telling import Few, Told

log = logging.getLogger("cloister.fleet")

PEER = "cloister.peer"
"""In an ASGI scope: the caller's certificate, DER."""

_MEGABYTE = 2**20
_BODY = 64 * 1024
_BODIES = {
    f"{FLEET}{name}": size
    for name, size in {
        "activate-node": _BODY,
        "deactivate-node": _BODY,
        "send-node-heartbeat": _BODY,
        "pull-messages": _BODY,
        "push-messages": _MEGABYTE,
        "get-run": _BODY,
        "get-fab": _BODY,
        "push-object": 8 * _MEGABYTE,
        "pull-object": _BODY,
        "confirm-message-received": _BODY,
    }.items()
}
"""What there is, and how long the body of a request for it may be. The paths by which Flower lets
a node register itself are not there."""
_OURS = frozenset({b"content-type", b"content-length"})
_FLOWERS = b"flwr-"


@dataclass(frozen=True)
class Limits:
    """What one caller may take.

    Attributes:
        handshake_seconds: for TLS.
        head_seconds: for the head of a request.
        body_seconds: for the body of one, which is at most 8 MiB.
        answer_seconds: to read what it asked for, of which a part is 4 MiB.
        connections: of one certificate at once.
        requests: of one site at once.
        strangers: connections of one address that are in their handshake at once.
        all_strangers: of all addresses.
    """

    handshake_seconds: float = 10.0
    head_seconds: float = 20.0
    body_seconds: float = 180.0
    answer_seconds: float = 180.0
    connections: int = 32
    requests: int = 12
    strangers: int = 64
    all_strangers: int = 4096


class Guard:
    """Lets a request through to `app` if its caller may speak now, and it is within bounds.

    404 for whatever is not the fleet's, to anyone; 401 for a caller that is not enrolled, is
    revoked or expired, or signs with another key than that of its certificate; 503 where the
    roster itself cannot be relied on; 413, 408 and 429 for what is beyond the limits.
    """

    def __init__(self, app: ASGIApp, roster: Roster, limits: Limits | None = None) -> None:
        self._app, self._roster, self._limits = app, roster, limits or Limits()
        self._open: Counter[str] = Counter()
        self._told = Told()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await _refuse(404, "not found", scope, receive, send)
            return
        if scope["path"] not in _BODIES or scope["method"] != "POST":
            self._told.tell(log, f"{_host(scope)} asks for what is not there")
            await _refuse(404, "not found", scope, receive, send)
            return
        try:
            site = self._caller(scope)
        except IdentityError as error:
            self._told.tell(log, f"{_host(scope)} is refused: {error}")
            await _refuse(401, "not enrolled, or no longer", scope, receive, send)
        except ConfigError as error:
            self._told.tell(log, f"nobody is let in: {error}")
            await _refuse(503, "the roster cannot be relied on", scope, receive, send)
        else:
            await self._answer(site, scope, receive, send)

    def _caller(self, scope: Scope) -> Site:
        """Whose request it is.

        Raises:
            IdentityError: if nobody's that may speak.
            ConfigError: if the roster cannot be relied on.
        """
        shown = scope.get(PEER)
        if not isinstance(shown, bytes):
            raise IdentityError("no certificate was shown")
        said = [value for name, value in scope["headers"] if name == PUBLIC_KEY_HEADER]
        if len(said) != 1:
            raise IdentityError(f"{len(said)} keys in the head of the request, expected one")
        try:
            signer = key_of_pem(b64decode(said[0], validate=True))
        except ValueError:
            raise IdentityError("the key in the head of the request is not base64") from None
        key = key_of_certificate(shown)
        if signer != key:
            raise IdentityError("signed with another key than that of the certificate")
        return self._roster.site_of(key)

    async def _answer(self, site: Site, scope: Scope, receive: Receive, send: Send) -> None:
        if self._open[site.name] >= self._limits.requests:
            await _refuse(429, "too many requests at once", scope, receive, send)
            return
        self._open[site.name] += 1
        try:
            body = await self._body(scope, receive)
            if isinstance(body, int):
                self._told.tell(log, f"a request of {site.name} is too large, or too slow: {body}")
                await _refuse(body, "too large, or too slow", scope, receive, send)
                return
            await self._app(_bare(scope, site), _replayed(body, receive), send)
        except Exception as error:  # noqa: BLE001
            # Whatever Flower's handlers raise on what a stranger sends; it has been answered (500).
            what = f"{type(error).__name__}: {error!s:.200}"
            self._told.tell(log, f"a request of {site.name} cannot be answered ({what})")
        finally:
            self._open[site.name] -= 1
            if not self._open[site.name]:
                del self._open[site.name]

    async def _body(self, scope: Scope, receive: Receive) -> bytes | int:
        """The body of a request, or the status that says why it is not read."""
        most = _BODIES[scope["path"]]
        lengths = [value for name, value in scope["headers"] if name == b"content-length"]
        if lengths and int(lengths[0]) > most:
            return 413
        parts, size = [], 0
        try:
            async with asyncio.timeout(self._limits.body_seconds):
                while True:
                    message = await receive()
                    parts.append(message.get("body", b""))
                    size += len(parts[-1])
                    if size > most:
                        return 413
                    if not message.get("more_body"):
                        return b"".join(parts)
        except TimeoutError:
            return 408


class Listener:
    """The fleet's listener, in a thread of its own.

    Args:
        app: what answers, its guard included.
        context: TLS.
        listening: a socket that is bound.
        limits: as the guard's.
    """

    def __init__(
        self,
        app: ASGIApp,
        context: ssl.SSLContext,
        listening: socket.socket,
        limits: Limits | None = None,
    ) -> None:
        limits = limits or Limits()
        config = uvicorn.Config(
            app,
            http=_Protocol.of(limits),
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            proxy_headers=False,
            server_header=False,
            timeout_keep_alive=75,
            timeout_graceful_shutdown=5,
            ssl_context_factory=lambda *_: context,
        )
        self._server = uvicorn.Server(config)
        self._socket, self._limits = listening, limits
        self._thread = threading.Thread(target=self._run, name="fleet", daemon=True)

    def start(self, patience: float = 30.0) -> None:
        """Begin to serve.

        Raises:
            RunError: if it does not.
        """
        self._thread.start()
        until = time.monotonic() + patience
        while not self._server.started:
            if not self._thread.is_alive() or time.monotonic() > until:
                raise RunError("the fleet's listener does not start; the log above says why")
            time.sleep(0.01)

    @property
    def alive(self) -> bool:
        """Whether it serves."""
        return self._thread.is_alive() and self._server.started

    def stop(self) -> None:
        """End it; requests that are being answered have a few seconds."""
        self._server.should_exit = True
        self._thread.join(15)

    def _run(self) -> None:
        few, talkative = Few(), logging.getLogger("flwr")
        talkative.addFilter(few)  # it has a line for each request that it refuses, or several
        try:
            with asyncio.Runner(loop_factory=lambda: _Loop(self._limits)) as runner:
                runner.run(self._server.serve(sockets=[self._socket]))
        finally:
            talkative.removeFilter(few)


class _Loop(asyncio.SelectorEventLoop):
    """Ends a handshake that takes too long, and begins few at once of one address.

    uvicorn has no setting for either.
    """

    def __init__(self, limits: Limits) -> None:
        super().__init__()
        self._limits = limits
        self._strangers: Counter[str] = Counter()

    async def create_server(self, *args: Any, **settings: Any) -> asyncio.Server:
        if settings.get("ssl") is not None:
            seconds = self._limits.handshake_seconds
            settings |= {"ssl_handshake_timeout": seconds, "ssl_shutdown_timeout": 5.0}
        return await super().create_server(*args, **settings)

    async def _accept_connection2(
        self, factory: Any, connection: Any, extra: Any, *rest: Any, **named: Any
    ) -> None:
        """Of asyncio's own: lasts until the handshake is over."""
        here, address = self._strangers, _network(str(extra["peername"][0]))
        if here[address] >= self._limits.strangers or here.total() >= self._limits.all_strangers:
            connection.close()
            return
        here[address] += 1
        try:
            inherited: Any = super()
            await inherited._accept_connection2(factory, connection, extra, *rest, **named)
        finally:
            here[address] -= 1
            if not here[address]:
                del here[address]


class _Protocol(H11Protocol):
    """The protocol of uvicorn, which says who calls, and waits for no head and no reader for ever.

    Attributes:
        limits: of the listener.
        opened: how many connections each certificate has; one count a listener.
    """

    limits: ClassVar[Limits]
    opened: ClassVar[Counter[bytes]]
    _waits: asyncio.TimerHandle | None = None
    _unread: asyncio.TimerHandle | None = None
    _peer: bytes | None = None

    @classmethod
    def of(cls, limits: Limits) -> type[_Protocol]:
        """The protocol of one listener."""
        return type("FleetProtocol", (cls,), {"limits": limits, "opened": Counter()})

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        tls = transport.get_extra_info("ssl_object")
        self._peer = tls.getpeercert(True) if tls is not None else None
        self.app = self._told(self.app)
        self._wait()
        if self._peer is not None:
            self.opened[self._peer] += 1
            if self.opened[self._peer] > self.limits.connections:
                transport.abort()

    def data_received(self, data: bytes) -> None:
        if self._waits is None and (self.cycle is None or self.cycle.response_complete):
            self._wait()
        super().data_received(data)

    def pause_writing(self) -> None:
        super().pause_writing()
        seconds = self.limits.answer_seconds
        self._unread = self.loop.call_later(seconds, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._is_read()

    def connection_lost(self, exc: Exception | None) -> None:
        self._is_whole()
        self._is_read()
        if self._peer is not None:
            self.opened[self._peer] -= 1
            if not self.opened[self._peer]:
                del self.opened[self._peer]
        super().connection_lost(exc)

    def _told(self, app: ASGIApp) -> ASGIApp:
        async def told(scope: Scope, receive: Receive, send: Send) -> None:
            self._is_whole()
            await app({**scope, PEER: self._peer}, receive, send)

        return told

    def _wait(self) -> None:
        self._waits = self.loop.call_later(self.limits.head_seconds, self.transport.abort)

    def _is_read(self) -> None:
        if self._unread is not None:
            self._unread.cancel()
            self._unread = None

    def _is_whole(self) -> None:
        if self._waits is not None:
            self._waits.cancel()
            self._waits = None


def bound(host: str, port: int) -> socket.socket:
    """A socket that listens there.

    Raises:
        ConfigError: if it cannot, as where another process does.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    made = socket.socket(family, socket.SOCK_STREAM)
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind((host, port))
    except OSError as error:
        made.close()
        raise ConfigError(
            f"{host} port {port}: cannot listen there ({error.strerror}); another program may, or "
            "the address is not this machine's: name another with --listen"
        ) from None
    return made


def _network(address: str) -> str:
    """What one stranger has of addresses: of IPv6 a network (RFC 4291, section 2.5.4)."""
    if ":" not in address:
        return address
    return str(ipaddress.ip_network((address.partition("%")[0], 64), strict=False))


def _replayed(body: bytes, receive: Receive) -> Receive:
    """What `receive` would have given, for a body that was read already."""
    told = False

    async def replay() -> Message:
        nonlocal told
        if told:
            return await receive()
        told = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay


def _bare(scope: Scope, site: Site) -> Scope:
    """A request without what its sender could have Flower read out of it beside what it is for."""
    kept = [
        (name, value)
        for name, value in scope["headers"]
        if name in _OURS or name.startswith(_FLOWERS)
    ]
    return {**scope, "headers": kept, "query_string": b"", "root_path": "", SITE: site.name}


async def _refuse(status: int, text: str, scope: Scope, receive: Receive, send: Send) -> None:
    if scope["type"] != "http":
        return
    headers = {"connection": "close"}
    await PlainTextResponse(f"{text}\n", status_code=status, headers=headers)(scope, receive, send)


def _host(scope: Scope) -> str:
    client = scope.get("client")
    return str(client[0]) if client else "somebody"
