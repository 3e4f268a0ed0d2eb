"""The coordinator's process: the fleet's listener, the roster as it changes, and the runs.

One process holds a home (`CoordinatorHome`). It serves Flower's fleet API to enrolled nodes
(`server.fleet`), registers with Flower's state whom the roster names, takes new certificates
while it serves, and has a conductor for each run that is not over (`server.conductor`). Killed
and started again, it goes on with all of them.

What it needs from outside is the folder: the authority's passphrase is never asked for here.
"""

from __future__ import annotations

import json
import logging
import os
import resource
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from common.clock import Clock
from common.errors import CloisterError, ConfigError, RunError
from common.files import locked, write_durably
from server.fleet import Guard, Limits, Listener, bound
from server.health import Health
from server.link import Exchange, StateError, fleet_app, flower_key
from server.roster import Roster
from server.roster import Standing as KeyStanding
from server.runs import OPEN, OVER, CoordinatorHome, Run, Standing
from server.telling import Told
from server.tls import ServerTls

log = logging.getLogger("cloister.coordinator")

SERVICE = "service.json"
_TICK, _LOOK_AT_TLS, _LOOK_AT_STATE = 0.25, 5.0, 10.0
_WAITS = (1.0, 5.0, 20.0, 60.0, 180.0)
"""Seconds before a conductor that died is started again; one that dies after the last is not."""
_LEAST_FREE = 2**28
_DESCRIPTORS = 65536
_QUIET = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"}


@dataclass(frozen=True)
class Settings:
    """How a coordinator serves.

    Attributes:
        host: the address on which nodes are heard.
        port: theirs.
        health_port: for probes, on loopback; 0 for none.
        most_runs: that are conducted at once; others wait.
        waits: see `_WAITS`.
        limits: of one caller.
    """

    host: str = "0.0.0.0"  # noqa: S104 - who may speak is decided by certificate
    port: int = 9092
    health_port: int = 0
    most_runs: int = 4
    waits: tuple[float, ...] = _WAITS
    limits: Limits = field(default_factory=Limits)


class Coordinator:
    """The service on one home.

    Args:
        home: its folder, made by `cloister coordinator init`.
        settings: how it serves.
        clock: gives the dates of certificates.

    Raises:
        ConfigError: if another process serves the home, the port is taken, or a file is not in
            order.
        IdentityError: if a certificate is not in force.
    """

    def __init__(
        self, home: CoordinatorHome, settings: Settings, clock: Clock | None = None
    ) -> None:
        self._home, self._settings, self._clock = home, settings, clock or Clock()
        self._over, self._refresh = threading.Event(), threading.Event()
        self._conductors: dict[str, _Conductor] = {}
        self._settled: set[str] = set()
        self._tls_looked = self._state_looked = 0.0
        self._told = Told()

    def serve(self, ready: Callable[[int], None] = lambda _: None) -> None:
        """Serve until `stop` is called.

        Args:
            ready: is called with the port as soon as nodes are heard.

        Raises:
            RunError: if the listener dies.
        """
        _many_files()
        with ExitStack() as held:
            held.enter_context(_held(self._home))
            self._roster = Roster(self._home.path, self._clock)
            self._tls = ServerTls(self._home.path, self._clock)
            listening = bound(self._settings.host, self._settings.port)
            held.callback(listening.close)
            self._exchange = open_exchange(self._home.database)
            self._exchange.nobody_is_here()
            self._registrar = Registrar(self._roster, self._exchange)
            self._registrar.follow()
            guard = Guard(fleet_app(self._exchange.factory), self._roster, self._settings.limits)
            self._listener = Listener(guard, self._tls.context, listening, self._settings.limits)
            self._listener.start()
            held.callback(self._listener.stop)
            self._health = held.enter_context(Health(self._settings.health_port).serving())
            held.callback(self._leave)
            port = listening.getsockname()[1]
            self._announce(port)
            held.callback((self._home.service / SERVICE).unlink, missing_ok=True)
            ready(port)
            self._go_on()

    def stop(self) -> None:
        """End; runs that are not over go on when the service is started again."""
        self._over.set()

    def refresh(self) -> None:
        """Take certificates that are new on the disk now, not in a few seconds."""
        self._refresh.set()

    def _go_on(self) -> None:
        while not self._over.wait(_TICK):
            if not self._listener.alive:
                raise RunError("the fleet's listener ended; the log above says why")
            self._follow_roster()
            self._follow_tls()
            self._health.report(self._ills())
            self._tend()

    def _follow_roster(self) -> None:
        """Do what the roster says, and look whether Flower's state still does what it is told.

        Raises:
            RunError: if its file is damaged: started again, the service sets it aside.
        """
        now = time.monotonic()
        try:
            self._registrar.follow()
            if now - self._state_looked > _LOOK_AT_STATE:
                self._state_looked = now
                self._exchange.nodes()
        except StateError as error:
            if is_damage(error):
                raise RunError(
                    f"{self._home.database}: damaged ({error}); start the service again: it sets "
                    "the file aside, and its runs go on"
                ) from error
            self._told.tell(log, f"Flower's state: {error}")

    def _follow_tls(self) -> None:
        now = time.monotonic()
        if not self._refresh.is_set() and now - self._tls_looked < _LOOK_AT_TLS:
            return
        self._refresh.clear()
        self._tls_looked = now
        try:
            if self._tls.refresh():
                log.info("a new certificate is in force, until %s", self._tls.ends)
        except CloisterError as error:
            self._told.tell(log, f"the certificate on the disk is not taken: {error}")

    def _ills(self) -> dict[str, str]:
        """What is wrong, by part; empty words where nothing is."""
        free = os.statvfs(self._home.path)
        left = free.f_bavail * free.f_frsize
        days = self._tls.days_left(self._clock.date())
        return {
            "roster": self._registrar.ill,
            "disk": f"{left // 2**20} MiB are free" if left < _LEAST_FREE else "",
            "certificate": "" if days > 0 else "no node can connect: the certificate has ended",
        }

    # --- Runs -----------------------------------------------------------------------------------

    def _tend(self) -> None:
        """Look after every run that is not over."""
        for run in self._home.all_runs():
            try:
                if run.name not in self._settled:
                    self._tend_one(run)
            except (RunError, OSError) as error:
                self._told.tell(log, f"run {run.name}: {error}")

    def _tend_one(self, run: Run) -> None:
        conductor = self._conductors.get(run.name)
        if conductor is not None:
            if conductor.alive:
                if run.asked("stop"):
                    conductor.stop()
                return
            del self._conductors[run.name]
            self._bury(run, conductor)
        state = run.state
        if state.standing in OVER:
            self._settled.add(run.name)
            return
        if run.asked("resume") or (run.asked("stop") and state.standing is Standing.FAILED):
            run.write(Standing.QUEUED, deaths=0)
            run.answered("resume")
            state = run.state
        if state.standing in OPEN:
            self._begin(run, state.standing, state.deaths)

    def _begin(self, run: Run, standing: Standing, deaths: int) -> None:
        """Start a conductor, if it is its time and there is room."""
        if run.asked("stop") and not run.state.submission:
            run.write(Standing.STOPPED, "a person ended it before it began")
            run.answered("stop")
            return
        waited = (datetime.now(UTC) - run.state.since).total_seconds()
        due = standing is not Standing.WAITING or waited >= self._settings.waits[deaths - 1]
        if due and len(self._conductors) < self._settings.most_runs:
            run.write(Standing.RUNNING)
            self._conductors[run.name] = _Conductor(self._home, run)

    def _bury(self, run: Run, conductor: _Conductor) -> None:
        """Settle what a conductor left that has ended."""
        state = run.state
        if state.standing is not Standing.RUNNING:  # it said itself how the run stands
            log.info("run %s is %s. %s", run.name, state.standing, state.reason)
            run.answered("stop")
            return
        deaths = 1 if run.finished_rounds > conductor.rounds else state.deaths + 1
        reason = f"its conductor died ({conductor.how}); see {run.path / 'conductor.log'}"
        if deaths > len(self._settings.waits):
            run.write(Standing.FAILED, f"{reason}; mend the cause, then resume it", deaths=deaths)
        else:
            run.write(Standing.WAITING, reason, deaths=deaths)
        log.error("run %s: %s", run.name, reason)

    def _leave(self) -> None:
        for conductor in self._conductors.values():
            conductor.leave()

    def _announce(self, port: int) -> None:
        said = {"process": os.getpid(), "host": self._settings.host, "port": port}
        said["since"] = datetime.now(UTC).isoformat(timespec="seconds")
        write_durably(self._home.service / SERVICE, json.dumps(said).encode())


class Registrar:
    """Has Flower's state know whom the roster names, and nobody whom it has revoked.

    A key that has ended stays registered: the guard refuses it, and it may be renewed; Flower
    takes no key twice.
    """

    def __init__(self, roster: Roster, exchange: Exchange) -> None:
        self._roster, self._exchange = roster, exchange
        self._followed = 0
        self.ill = ""

    def follow(self) -> None:
        """Do what the roster says now; where it cannot be relied on, nothing."""
        try:
            content = self._roster.content()
        except CloisterError as error:
            if not self.ill:
                log.error("the roster: %s", error)
            self.ill = str(error)
            return
        self.ill = ""
        if content.number == self._followed:
            return
        there = {node.public_key: node for node in self._exchange.nodes()}
        for known in content.all_keys:
            key = flower_key(known.content)
            if known.standing is KeyStanding.REVOKED and key in there:
                self._exchange.unregister(there[key].number)
                log.warning("%s is revoked", known.site)
            elif known.standing is not KeyStanding.REVOKED and key not in there:
                self._exchange.register(key, known.site)
                log.info("%s may take part", known.site)
        self._followed = content.number


class _Conductor:
    """The process that conducts a run."""

    def __init__(self, home: CoordinatorHome, run: Run) -> None:
        self.rounds = run.finished_rounds
        self._stopping = False
        path = os.pathsep.join(part for part in sys.path if part)
        with (run.path / "conductor.log").open("ab") as output:
            self._process = subprocess.Popen(  # noqa: S603 - this interpreter, our own module
                [sys.executable, "-P", "-m", "server.conductor", str(home.path), run.name],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=os.environ | _QUIET | {"PYTHONPATH": path},
            )

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    @property
    def how(self) -> str:
        """How it ended."""
        code = self._process.returncode
        return f"signal {-code}" if code < 0 else f"exit code {code}"

    def stop(self) -> None:
        """Have it end its run in order."""
        if not self._stopping:
            self._stopping = True
            self._say(b"stop\n")

    def leave(self) -> None:
        """End it; its run goes on another time."""
        with suppress(OSError):
            self._pipe.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _say(self, line: bytes) -> None:
        with suppress(OSError):  # it is dying; that is seen elsewhere
            self._pipe.write(line)
            self._pipe.flush()

    @property
    def _pipe(self) -> Any:
        return self._process.stdin


@contextmanager
def _held(home: CoordinatorHome) -> Iterator[None]:
    """Hold a home for this process alone."""
    try:
        home.service.mkdir(mode=0o700, exist_ok=True)
        with ExitStack() as held:
            held.enter_context(locked(home.service))
            yield
    except BlockingIOError:
        raise ConfigError(f"{home.path}: another process serves it; {_who(home)}") from None


def _many_files() -> None:
    """Each connection takes a descriptor; the usual limit of 1024 is soon met."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = _DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, _DESCRIPTORS)
    if soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def is_served(home: CoordinatorHome) -> bool:
    """Whether a service holds a home now."""
    if not home.service.is_dir():
        return False
    try:
        with locked(home.service):
            return False
    except BlockingIOError:
        return True


def _who(home: CoordinatorHome) -> str:
    with suppress(OSError, ValueError):
        said = json.loads((home.service / SERVICE).read_text())
        return f"process {said['process']} since {said['since']}"
    return "it is starting or ending"


def open_exchange(database: Path) -> Exchange:
    """Flower's state; one that is damaged is set aside, and a new one begun.

    Nothing is lost by that: who is enrolled is in the roster, what was reached is with each run,
    and what was on its way is asked again.
    """
    if database.exists() and not _is_whole(database):
        aside = database.with_name(f"{database.name}.damaged-{int(time.time())}")
        for suffix in ("", "-wal", "-shm"):
            with suppress(FileNotFoundError):
                Path(f"{database}{suffix}").rename(f"{aside}{suffix}")
        log.error("%s was damaged: it is %s now, and a new one is begun", database, aside.name)
    exchange = Exchange(database)
    _ = exchange.state
    return exchange


def is_damage(error: StateError) -> bool:
    """Whether this says that the file is damaged, and not that the disk is full or slow."""
    return any(words in str(error) for words in ("malformed", "not a database"))


def _is_whole(database: Path) -> bool:
    try:
        with closing(sqlite3.connect(database)) as found:
            return bool(found.execute("PRAGMA quick_check(1)").fetchone() == ("ok",))
    except sqlite3.DatabaseError:
        return False


def run_service(home: CoordinatorHome, settings: Settings, ready: Callable[[int], None]) -> None:
    """Serve in this process, until SIGTERM or SIGINT; SIGHUP has it look at its certificates.

    Args:
        home: as `Coordinator`.
        settings: likewise.
        ready: is called when nodes are heard.

    Raises:
        CloisterError: as `Coordinator`.
    """
    coordinator = Coordinator(home, settings)
    before = {}
    for number in (signal.SIGTERM, signal.SIGINT):
        before[number] = signal.signal(number, lambda *_: coordinator.stop())
    before[signal.SIGHUP] = signal.signal(signal.SIGHUP, lambda *_: coordinator.refresh())
    try:
        coordinator.serve(ready)
    except (OSError, StateError) as error:
        said = str(error).partition("\n")[0]
        raise RunError(
            f"{home.path}: cannot be served ({said}); its disk may be full, or its files "
            "another's: mend that, and start the service again: its runs go on"
        ) from error
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
