"""What a coordinator needs before its first run: each part looked at, and what to mend."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from urllib.parse import urlsplit

from common.certificates import shown
from common.clock import Clock
from common.cohort import Cohort
from common.errors import CloisterError, ConfigError
from server.coordinator import is_served
from server.roster import Roster
from server.runs import CoordinatorHome
from server.tls import ServerTls

_LEAST_FREE = 5 * 2**30
_SOON_DAYS = 30
_LEAST_FILES = 4096
_NO_SERVICE = "does not run; `cloister coordinator start` starts it"


@dataclass(frozen=True)
class Finding:
    """What came of one look: of what, whether it is well, and in words.

    ``well`` is None of what is not wrong, and not yet there.
    """

    what: str
    well: bool | None
    said: str


def examined(home: CoordinatorHome) -> Iterator[Finding]:
    """Every finding, in the order in which things are needed."""
    for what, look in _LOOKS.items():
        try:
            said = look(home)
            yield Finding(what, None if said == _NO_SERVICE else True, said)
        except (CloisterError, OSError) as error:
            yield Finding(what, False, str(error))


def _service(home: CoordinatorHome) -> str:
    return "runs" if is_served(home) else _NO_SERVICE


def _certificate(home: CoordinatorHome) -> str:
    tls = ServerTls(home.path)
    days = tls.days_left(Clock().date())
    if days < _SOON_DAYS:
        raise ConfigError(
            f"it ends at {shown(tls.ends)}, and then no node can connect; `cloister coordinator "
            "renew` makes another"
        )
    return f"until {shown(tls.ends)}, for {', '.join(tls.hosts)}"


def _roster(home: CoordinatorHome) -> str:
    sites = Roster(home.path).sites()
    ended = [site.name for site in sites if not site.keys]
    if ended:
        raise ConfigError(f"the certificates of {', '.join(ended)} have ended; have them renewed")
    if not sites:
        raise ConfigError("no site is enrolled; see `cloister coordinator enrol`")
    return f"{len(sites)} sites: {', '.join(site.name for site in sites)}"


def _name(home: CoordinatorHome) -> str:
    host = urlsplit(Roster(home.path).content().address).hostname or ""
    try:
        found = sorted({str(each[4][0]) for each in socket.getaddrinfo(host, None)})
    except OSError as error:
        raise ConfigError(f"nodes were told {host}, which has no address ({error})") from error
    return f"nodes were told {host}, which is {', '.join(found)} from here"


def _port(home: CoordinatorHome) -> str:
    port = urlsplit(Roster(home.path).content().address).port or 0
    with socket.socket() as probe:
        probe.settimeout(5)
        answers = probe.connect_ex(("127.0.0.1", port)) == 0
    if answers != is_served(home):
        raise ConfigError(
            f"{port} is taken by another program"
            if answers
            else f"the service does not listen on {port}, which nodes were told"
        )
    return f"{port}, {'where the service listens' if answers else 'which is free'}"


def _evaluation(home: CoordinatorHome) -> str:
    cohort = Cohort.open(home.evaluation)
    return f"{len(cohort)} images in {home.evaluation}"


def _disk(home: CoordinatorHome) -> str:
    found = os.statvfs(home.path)
    free = found.f_bavail * found.f_frsize
    if free < _LEAST_FREE:
        raise ConfigError(f"{free // 2**20} MiB are free; expected {_LEAST_FREE // 2**30} GiB")
    return f"{free // 2**30} GiB are free"


_LOOKS: dict[str, Callable[[CoordinatorHome], str]] = {
    "certificate": _certificate,
    "roster": _roster,
    "name": _name,
    "port": _port,
    "evaluation cohort": _evaluation,
    "disk": _disk,
    "service": _service,
}
