"""What has to be in order before a node's first run, looked at in the order in which it matters.

Each look is short, changes nothing, and ends in a finding: in order or not, what was seen, and what
to mend. One that rests on another is left out where that one failed.
"""

from __future__ import annotations

import shutil
import socket
import ssl
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from urllib.parse import urlsplit

from client.credentials import Credentials
from client.folder import NodeFolder, check_budget, cohort_digest
from client.health import gpu_fault
from client.link import FleetLink, proxy_for
from client.node import LARGEST_SKEW, running
from common.errors import (
    CloisterError,
    LinkBusyError,
    LinkError,
    LinkRefusedError,
)

_SECONDS = 10.0
_LITTLE_DISK = 2 * 2**30
_FEW_DAYS = 14
_SMALL = 2**20


@dataclass(frozen=True)
class Finding:
    """One line of the doctor's.

    Attributes:
        good: whether it is in order.
        what: was looked at.
        text: what was seen; and where it is not in order, what to mend.
    """

    good: bool
    what: str
    text: str


class UnwellError(CloisterError):
    """Something is not in order; the text says what to mend."""


def examine(node: NodeFolder) -> Iterator[Finding]:
    """Look at a node: first its folder, then its way to the coordinator."""
    yield Finding(True, "policy", f"node.toml of {node.policy.site} is in order")
    for what, look in _FOLDER:
        yield _found(what, lambda look=look: look(node))  # type: ignore[misc]
    try:
        own = Credentials.open(node.path)
    except CloisterError as error:
        yield Finding(False, "identity", str(error))
        return
    yield _identity(own)
    for what, seek in _WAY:
        finding = _found(what, lambda seek=seek: seek(own))  # type: ignore[misc]
        yield finding
        if not finding.good:
            yield Finding(False, "roster", f"not asked: {what} comes first")
            return
    yield from _asked(node, own)


def _found(what: str, look: Callable[[], str]) -> Finding:
    try:
        return Finding(True, what, look())
    except (CloisterError, OSError) as error:
        return Finding(False, what, str(error))


# --- The folder ---------------------------------------------------------------------------------


def _ledger(node: NodeFolder) -> str:
    ledger = node.ledger()
    try:
        book = ledger.book
        check_budget(node.policy, book.limit)
        if book.halted:
            raise UnwellError(f"the ledger is halted: {book.halted}; see `cloister node audit`")
        return f"{book.last} entries, every one as this node wrote it"
    finally:
        ledger.disconnect()


def _cohort(node: NodeFolder) -> str:
    cohort = node.open_cohort()
    ledger = node.ledger()
    try:
        if ledger.book.admitted != cohort_digest(node.cohort_path):
            raise UnwellError(
                "no person has admitted the cohort that lies there; look at it with `cloister "
                "node check`, then `cloister node admit`"
            )
    finally:
        ledger.disconnect()
    del cohort
    return "admitted, and whole as far as its index says"


def _disk(node: NodeFolder) -> str:
    free = shutil.disk_usage(node.path).free
    if free < _LITTLE_DISK:
        raise UnwellError(
            f"{free // 2**20} MiB are free, at least {_LITTLE_DISK // 2**20} MiB; the ledger keeps "
            "releases, and without room nothing is answered"
        )
    return f"{free / 2**30:.1f} GiB are free"


def _device(node: NodeFolder) -> str:
    device = node.policy.machine.device
    fault = gpu_fault(device)
    if fault:
        raise UnwellError(fault)
    return f"{device}, as the policy says"


_FOLDER: tuple[tuple[str, Callable[[NodeFolder], str]], ...] = (
    ("ledger", _ledger),
    ("cohort", _cohort),
    ("disk", _disk),
    ("device", _device),
)


# --- The way to the coordinator -----------------------------------------------------------------


def _identity(own: Credentials) -> Finding:
    days = own.days_left(datetime.now(UTC))
    text = f"{own.site}, for another {days:.0f} days"
    if days < _FEW_DAYS:
        return Finding(False, "identity", f"{text}; renew it now: `cloister node renew`")
    return Finding(True, "identity", text)


def _place(own: Credentials) -> tuple[str, int]:
    parts = urlsplit(own.address)
    return parts.hostname or "", parts.port or 0


def _proxy(own: Credentials) -> str | None:
    return proxy_for(own.address.removeprefix("https://"))


def _name(own: Credentials) -> str:
    proxy = _proxy(own)
    host, port = _place(own)
    if proxy is not None:
        parts = urlsplit(proxy)
        socket.getaddrinfo(parts.hostname, parts.port or 80)
        return f"{host} is left to the proxy {parts.hostname}, whose name is known"
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError as error:
        raise UnwellError(
            f"{host}: the name is not known here ({error}); ask for it in this hospital's DNS, or "
            "set HTTPS_PROXY where a proxy knows it"
        ) from error
    return f"{host} is {found[0][4][0]}"


def _port(own: Credentials) -> str:
    proxy = _proxy(own)
    host, port = _place(own)
    if proxy is not None:
        parts = urlsplit(proxy)
        host, port = parts.hostname or "", parts.port or 80
    try:
        socket.create_connection((host, port), timeout=_SECONDS).close()
    except OSError as error:
        raise UnwellError(
            f"{host}:{port} does not answer ({error}); let the firewall open outgoing TCP to it, "
            "or ask the operator whether the coordinator runs"
        ) from error
    return f"{host}:{port} answers"


def _tls(own: Credentials) -> str:
    host, port = _place(own)
    if _proxy(own) is not None:
        return "goes through the proxy; seen below"
    context = own.ssl_context()
    try:
        with (
            socket.create_connection((host, port), timeout=_SECONDS) as plain,
            context.wrap_socket(plain, server_hostname=host) as secure,
        ):
            shown = secure.getpeercert() or {}
            version = secure.version()
    except ssl.SSLCertVerificationError as error:
        raise UnwellError(
            f"the coordinator's certificate is not believed: {error.verify_message}; either it "
            "has ended, its name is another, or somebody on the way answers in its place: speak "
            "with the operator"
        ) from error
    except (ssl.SSLError, OSError) as error:
        raise UnwellError(
            f"no TLS 1.3 with {host}:{port} ({error}); a device on the way may break the "
            "connection open: the node needs a way around it"
        ) from error
    ends = ssl.cert_time_to_seconds(str(shown["notAfter"]))
    days = (datetime.fromtimestamp(ends, UTC) - datetime.now(UTC)).days
    return f"{version}, the coordinator's certificate fits {host} for another {days} days"


_WAY: tuple[tuple[str, Callable[[Credentials], str]], ...] = (
    ("name", _name),
    ("port", _port),
    ("tls", _tls),
)


def _asked(node: NodeFolder, own: Credentials) -> Iterator[Finding]:
    """The clock and the roster, as the coordinator sees them."""
    process = running(node.path)
    address = own.address.removeprefix("https://")
    with FleetLink(address, own.private_key, own.ssl_context(), most_bytes=_SMALL) as link:
        good, text = True, "the coordinator takes this node"
        try:
            link.activate()
        except LinkBusyError as error:
            good = process is not None
            text = f"the node runs as process {process}" if good else str(error)
        except (LinkRefusedError, LinkError) as error:
            good, text = False, str(error)
        yield _clock(link.skew)
        yield Finding(good, "roster", text)


def _clock(skew: float | None) -> Finding:
    if skew is None:
        return Finding(False, "clock", "not compared: the coordinator has not answered")
    text = f"{skew:+.0f} s against the coordinator's"
    if abs(skew) > LARGEST_SKEW:
        return Finding(
            False, "clock", f"{text}, at most {LARGEST_SKEW:g} s; let it be set over the network"
        )
    return Finding(True, "clock", text)
