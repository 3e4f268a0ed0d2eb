"""The node's process: it asks the coordinator for work, for years, and lets nothing end it.

    coordinator <--TLS 1.3-- NodeService --pipe--> worker (client.worker: gate, torch, cohort)
                             | heartbeats          |
                             | client.health       ledger, cohort, GPU

The service reads no more of a message than its head: whose run it is, of what kind, until when it
is good for anything. What a run consists of is checked once a run (`client.bundle`), and a message
is handed, unopened, to the worker. Whatever comes is answered: with a release, or with a code.

What ends the service is a person (SIGTERM, SIGINT), a folder that is not in order, or a coordinator
that refuses this node for good. Everything else is waited out, and told once a minute.
"""

from __future__ import annotations

import fcntl
import logging
import math
import os
import signal
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import Protocol, TypeVar

from client.book import Book
from client.bundle import check_bundle
from client.cgroup import memory_limit
from client.credentials import Credentials
from client.folder import NodeFolder
from client.incident import REFUSED, incident_reply
from client.ledger import stamp
from client.link import Answer, FleetLink, Letter
from client.worker import STARTING, AbandonedError, Asked, Bounds, Worker, WorkerLostError
from common.errors import (
    CloisterError,
    CohortError,
    ConfigError,
    IdentityError,
    LedgerError,
    LinkBusyError,
    LinkError,
    LinkOverError,
    LinkRefusedError,
    MessageError,
    RefusalCode,
)
from common.messages import CLOSE, COUNT, INVITE, TRAIN, RefusalReply
from common.noise import KeystreamSource, fresh_keystream
from common.parcel import Parcel

log = logging.getLogger("cloister.node")

PID_FILE = "node.pid"
LARGEST_SKEW = 3.0
"""Seconds by which the clock may be off: the coordinator refuses what is 5 s ahead of it."""
_HANDING_OVER = 10.0
"""Seconds that a released answer may take to come out of the worker while the node stops."""

_KINDS = (INVITE, TRAIN, COUNT, CLOSE)
_PACED = (TRAIN, COUNT)
_KNOWN_RUNS = 1024
_OVERHEAD = 8 * 2**20
_T = TypeVar("_T")


class AlreadyRunningError(ConfigError):
    """Another process runs this node."""


class DuplicateError(LinkRefusedError):
    """The coordinator does not know the node, or a second process with its key is alive."""


EXIT_CODES: tuple[tuple[type[CloisterError], int], ...] = (
    (AlreadyRunningError, os.EX_TEMPFAIL),
    (DuplicateError, os.EX_TEMPFAIL),
    (LinkRefusedError, os.EX_NOPERM),
    (LedgerError, os.EX_DATAERR),
    (WorkerLostError, os.EX_OSERR),
    (CloisterError, os.EX_CONFIG),
)
"""What the process ends with (sysexits.h); a person who stops it gets 0. docs/node-service.md."""


def exit_code(error: CloisterError) -> int:
    """What the process ends with after this error."""
    return next(code for kind, code in EXIT_CODES if isinstance(error, kind))


@dataclass(frozen=True)
class Pace:
    """How often, how long; all in seconds.

    Attributes:
        quickest: between two looks for a message, just after one has come.
        busy: at most, while a run is going.
        idle: at most, else.
        going: a run from which nothing has come for so long is not going any more.
        beat: between two heartbeats; two that are refused end the service, within 25 s.
        another: for so long an earlier process of this node may seem alive.
        retry: at most, between two attempts to reach the coordinator.
        tell: between two lines about the same trouble.
        grace: that an attempt under way gets when the node is stopped.
        late: that a worker gets beyond a message's deadline, to commit what it has trained.
        look: between two looks at the folder for a new certificate.
    """

    quickest: float = 0.02
    busy: float = 0.5
    idle: float = 2.0
    going: float = 600.0
    beat: float = 10.0
    another: float = 90.0
    retry: float = 60.0
    tell: float = 60.0
    grace: float = 60.0
    late: float = 60.0
    look: float = 5.0


class Approach(Protocol):
    """How the node comes to its coordinator."""

    def open(self, most_bytes: int) -> FleetLink:
        """A new connection, as the node is now.

        Raises:
            ConfigError, IdentityError: if it is not in order.
        """

    def superseded(self) -> bool:
        """Whether it should be opened anew."""

    def days_left(self, now: datetime) -> float:
        """Until the node can connect no more."""


class Enrolled:
    """By the identity in the node's folder."""

    def __init__(self, home: Path) -> None:
        self._home = home
        self._credentials: Credentials | None = None

    def open(self, most_bytes: int) -> FleetLink:
        """See `Approach`."""
        found = self._credentials = Credentials.open(self._home)
        address = found.address.removeprefix("https://")
        return FleetLink(address, found.private_key, found.ssl_context(), most_bytes=most_bytes)

    def superseded(self) -> bool:
        """See `Approach`."""
        return self._credentials is not None and self._credentials.superseded()

    def days_left(self, now: datetime) -> float:
        """See `Approach`; below 0 before the first `open`, and where that failed."""
        return -1.0 if self._credentials is None else self._credentials.days_left(now)


@dataclass
class State:
    """What the service is at; written by its loop, read by the watchdog.

    Attributes:
        phase: starting, connecting, waiting, working, stopping or stopped.
        ticked: when the loop came by last, by the monotonic clock.
        until: before then it may be busy with one message.
        contact: when the coordinator answered last; None: never.
        skew: seconds by which this machine's clock is ahead of the coordinator's.
        trouble: what stands in the way of the connection.
        ledger: what is wrong with the ledger.
        worker: what is wrong with the worker.
    """

    phase: str = "starting"
    ticked: float = field(default_factory=time.monotonic)
    until: float = 0.0
    contact: float | None = None
    skew: float | None = None
    trouble: str = ""
    ledger: str = ""
    worker: str = ""

    def tick(self) -> None:
        """The loop is alive."""
        self.ticked = time.monotonic()

    def met(self, link: FleetLink) -> None:
        """The coordinator has answered."""
        self.contact, self.skew, self.trouble = time.monotonic(), link.skew, ""


class NodeService:
    """The node in `home`.

    Args:
        home: the node's folder.
        approach: to the coordinator; by its identity if not said.
        pace: how often, how long.
        keystream: as `client.gate.Gate`; a node leaves it at its default.
    """

    def __init__(
        self,
        home: Path,
        approach: Approach | None = None,
        pace: Pace | None = None,
        keystream: KeystreamSource = fresh_keystream,
    ) -> None:
        self.home = home
        self.approach = approach or Enrolled(home)
        self.state = State()
        self.folder = NodeFolder.open(home)
        self._pace = pace or Pace()
        bounds = Bounds(memory_for_worker(self.folder.policy.machine.device))
        self._worker = Worker(home, bounds, keystream)
        self._runs: OrderedDict[int, str] = OrderedDict()
        self._stop, self._stopped, self._now = threading.Event(), 0.0, threading.Event()
        self._under_way = -math.inf  # when an attempt was seen under way by a node that stops
        self._told = Told(self._pace.tell)
        self._last_letter = self._mended = -math.inf
        self._wait = self._pace.idle

    def run(self, watch: AbstractContextManager[None] | None = None) -> None:
        """Serve until somebody stops it.

        Args:
            watch: is entered once this process has the node to itself.

        Raises:
            AlreadyRunningError: if another process runs this node.
            ConfigError, CohortError: if the folder is not in order.
            LedgerError: if the ledger cannot be relied on.
            LinkRefusedError: if the coordinator refuses this node for good.
        """
        with ExitStack() as held:
            held.enter_context(alone(self.home))
            held.enter_context(watch or nullcontext())
            held.enter_context(self._signals())
            held.enter_context(self._worker)
            try:
                self.state.until = time.monotonic() + STARTING
                self._worker.start(self._stop.is_set)
                self.state.until = 0.0
                self._stay()
            except AbandonedError:
                log.info("stopped before the node was open")
            finally:
                self.state.phase = "stopped"

    def stop(self) -> None:
        """End it: once an attempt under way is finished, or its grace is over; twice: at once."""
        if self._stop.is_set():
            self._now.set()
        self._stopped = self._stopped or time.monotonic()
        self._stop.set()
        self.state.phase = "stopping"

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """SIGTERM and SIGINT stop the service, where it has the main thread."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def asked(number: int, _: FrameType | None) -> None:
            log.info("%s: the node stops", signal.Signals(number).name)
            self.stop()

        before = {each: signal.signal(each, asked) for each in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    # --- The connection -------------------------------------------------------------------------

    def _stay(self) -> None:
        """Stay connected, whatever happens, until it is over."""
        waits, refused = Growing(1.0, self._pace.retry), False
        while not self._stop.is_set():
            self.state.phase = "connecting"
            self.state.tick()
            try:
                with self.approach.open(self._most_bytes) as link:
                    self._serve(link, waits, refused)
                refused = False
                continue
            except LinkRefusedError as error:
                for_good, text = self._diagnosed(error, refused)
                if for_good:
                    kind = LinkRefusedError if refused else type(error)
                    raise kind(text) from error
                refused = True
                self._trouble(text)
            except (LinkError, IdentityError, ConfigError) as error:
                self._trouble(str(error))
            self._pause(waits.next())

    def _serve(self, link: FleetLink, waits: Growing, refused: bool) -> None:
        """Say that the node is there, and take what comes; until it stops, or has a new key.

        A line that is lost is waited for with the same connection: a new process would have to wait
        until the coordinator has forgotten that the node is there. What was lost with it on its way
        here is asked again.
        """
        self._come_in(link, 0.0 if refused else self._pace.another)
        looked, lost = time.monotonic(), False
        with Heart(link, self._pace.beat, lambda: self.state.met(link)) as heart:
            while not self._stop.is_set():
                self.state.tick()
                heart.check()
                if time.monotonic() - looked > self._pace.look:
                    looked = time.monotonic()
                    if self._superseded():
                        log.info("there is a new certificate; connecting anew")
                        return
                try:
                    if lost:
                        link.come_again()
                    lost = False
                    self._turn(link, heart)
                    waits.reset()
                except LinkRefusedError:
                    self._note_skew(link)
                    raise
                except LinkError as error:
                    lost, self.state.phase = True, "connecting"
                    self._trouble(str(error))
                    self._pause(waits.next())

    def _turn(self, link: FleetLink, heart: Heart) -> None:
        """Look for a message, and answer it if there is one."""
        letter = link.receive()
        self.state.phase = "waiting"
        self.state.met(link)
        if letter is None:
            self._rest()
        else:
            self._take(link, letter, heart)

    def _superseded(self) -> bool:
        try:
            return self.approach.superseded()
        except CloisterError as error:
            self._told.tell(str(error))
            return False

    def _note_skew(self, link: FleetLink) -> None:
        self.state.skew = self.state.skew if link.skew is None else link.skew

    def _come_in(self, link: FleetLink, patience: float) -> None:
        last = time.monotonic() + patience
        while not self._stop.is_set():
            try:
                number = link.activate()
                self.state.met(link)
                log.info("connected; the coordinator knows this node as %d", number)
                return
            except LinkBusyError as error:
                if time.monotonic() > last:
                    raise DuplicateError(
                        f"{error}. It has not passed in {patience:g} s: this node's key "
                        "is not enrolled there any more, or another machine has a copy of it"
                    ) from error
                self._trouble(str(error))
            except LinkRefusedError:
                self._note_skew(link)
                raise
            self._pause(min(2.0, self._pace.retry))

    def _diagnosed(self, error: LinkRefusedError, before: bool) -> tuple[bool, str]:
        """Whether a refusal is for good, and what a person should know of it.

        Args:
            error: the refusal.
            before: whether the one before it was one, too; a first one may pass.
        """
        skew = self.state.skew
        if skew is not None and abs(skew) > LARGEST_SKEW:
            # Two digits: the same words each time, so that they are told once a minute.
            return False, (
                "the coordinator refuses this node because of its clock, which is "
                f"{float(f'{skew:.2g}'):+.0f} s off the coordinator's; let it be set over the "
                "network (NTP, chrony)"
            )
        days = self.approach.days_left(datetime.now(UTC))
        if days < 0:
            return False, (
                "the coordinator refuses this node because its certificate has ended; see "
                "`cloister node renew`"
            )
        if isinstance(error, DuplicateError) and not before:
            return True, str(error)
        return before, (
            f"{error}. The clock and the certificate are in order, so the site was revoked, or its "
            "key was replaced: speak with the coordinator's operator; coming back takes a new key "
            "(`cloister node request --afresh`)"
        )

    def _trouble(self, text: str) -> None:
        self.state.trouble = text
        self._told.tell(text)

    def _pause(self, seconds: float) -> None:
        """Wait, and let the watchdog see that the loop is alive."""
        last = time.monotonic() + seconds
        while (left := last - time.monotonic()) > 0 and not self._stop.wait(min(left, 5.0)):
            self.state.tick()

    def _mend(self) -> None:
        """Start a worker again that was lost, so that the next message does not wait for it."""
        if not self.state.worker or time.monotonic() < self._mended + self._pace.retry:
            return
        self._mended = time.monotonic()
        self.state.until = self._mended + STARTING
        try:
            self._worker.start(self._stop.is_set)
            self.state.worker = self.state.ledger = ""
        except AbandonedError:
            return
        except CloisterError as error:
            self.state.worker = str(error)
            self._told.tell(f"no worker starts: {error}")
        finally:
            self.state.until = 0.0

    def _rest(self) -> None:
        """Wait for the next look: shortly after a message, longer the longer none has come."""
        self._mend()
        quiet = time.monotonic() - self._last_letter
        most = self._pace.busy if quiet < self._pace.going else self._pace.idle
        self._stop.wait(self._wait)
        self._wait = min(self._wait * 1.5, most)

    @property
    def _most_bytes(self) -> int:
        return 4 * self.folder.policy.limits.greatest_parameters + _OVERHEAD

    # --- One message ----------------------------------------------------------------------------

    def _take(self, link: FleetLink, letter: Letter, heart: Heart) -> None:
        """Answer a message, if that is still possible."""
        self.state.phase = "working"
        self.state.until = letter.ends + self._pace.late
        self._last_letter = time.monotonic() if letter.kind != CLOSE else -math.inf
        self._wait = self._pace.quickest
        try:
            said = self._said(letter, link, heart)
            if said is not None:
                answer = Answer(letter, said)
                self._persist(lambda: link.send(answer), letter)
                self.state.met(link)
        except LinkOverError as error:
            log.info("%s of run %d: %s", printable(letter.kind), letter.run, error)
        except AbandonedError:
            heart.check()
            log.warning("a message was left unanswered: the node stops; the ledger has what it was")
        finally:
            self.state.until = 0.0

    def _said(self, letter: Letter, link: FleetLink, heart: Heart) -> Parcel | None:
        """The answer to a message; None where it would come too late for anybody."""
        if letter.ends <= time.monotonic():
            log.warning("a message came after its deadline; nothing was done for it")
            return None
        started = time.monotonic()
        try:
            self._check(letter, link)
            parcel = self._persist(letter.fetch, letter)
            since = stamp(datetime.now(UTC))
            asked = Asked(letter.kind, parcel)
            said = self._worker.answer(
                asked, letter.ends + self._pace.late, lambda: heart.refused or self._abandons(since)
            )
            fault = _ledger_fault(said)
        except MessageError as error:
            log.warning(REFUSED, error)
            return Parcel.of(RefusalReply(code=RefusalCode.MALFORMED).to_records())
        except LedgerError as error:
            self.state.ledger = str(error)
            log.error("this node answers nothing more: %s", error)
            return Parcel.of(RefusalReply(code=RefusalCode.LEDGER).to_records())
        except (WorkerLostError, ConfigError, CohortError) as error:
            self.state.worker = str(error)
            return self._incident(letter, started)
        self.state.worker = ""
        self.state.ledger = fault
        return said

    def _check(self, letter: Letter, link: FleetLink) -> None:
        """Check what a run consists of, once, and that a message is of a kind of ours.

        Raises:
            MessageError: if not.
        """
        fault = self._runs.get(letter.run)
        if fault is None:
            bundle = self._persist(lambda: link.bundle(letter.run), letter)
            try:
                check_bundle(bundle)
                fault = ""
            except MessageError as error:
                fault = str(error)
            self._runs[letter.run] = fault
            while len(self._runs) > _KNOWN_RUNS:
                self._runs.popitem(last=False)
        if fault:
            raise MessageError(f"run {letter.run}: {fault}")
        if letter.kind not in _KINDS:
            raise MessageError(f"a message of the kind {letter.kind!a:.80}; expected {_KINDS}")

    def _persist(self, call: Callable[[], _T], letter: Letter) -> _T:
        """Do what the line may hinder, again and again for as long as the message is good."""
        waits = Growing(0.1, 5.0)
        while True:
            try:
                return call()
            except (LinkRefusedError, LinkOverError):
                raise
            except LinkError as error:
                if self._stop.is_set() or time.monotonic() > letter.ends:
                    raise
                self._trouble(str(error))
            self._pause(waits.next())

    def _incident(self, letter: Letter, started: float) -> Parcel | None:
        """The answer where no worker gave one: at a slot, as the worker's would be.

        When a worker dies may depend on what it was training on.
        """
        reply = Parcel.of(incident_reply().to_records())
        slot = self.folder.policy.release.pace * letter.lifetime
        if letter.kind in _PACED and slot > 0:
            passed = time.monotonic() - started
            self._pause(math.ceil(passed / slot) * slot - passed)
        late = self._stop.is_set() or letter.ends <= time.monotonic()
        return None if late else reply

    def _abandons(self, since: str) -> bool:
        """Whether a request has to be given up: the node stops, and it is not worth its grace."""
        if not self._stop.is_set():
            return False
        if self._now.is_set() or time.monotonic() - self._stopped > self._pace.grace:
            return True
        try:
            ledger = self.folder.ledger()
        except CloisterError:
            return True
        try:
            if under_way(ledger.book, since):
                self._under_way = time.monotonic()
        finally:
            ledger.disconnect()
        # What has just been released is on its way out of the worker.
        return time.monotonic() - self._under_way > _HANDING_OVER


def under_way(book: Book, since: str) -> bool:
    """Whether the last attempt was booked at `since` or later, and is not yet released.

    Then giving it up would cost what was booked for it; else it costs nothing, for what is
    released is there for the asking.
    """
    attempts = [
        (number, key in run.released)
        for run in book.runs.values()
        for number, key in run.numbers.items()
    ]
    if not attempts or book.charges[-1].time < since:
        return False
    return not max(attempts)[1]


def _ledger_fault(said: Parcel) -> str:
    refusal = said.outline().get("refusal")
    if refusal is not None and refusal.get("code") == RefusalCode.LEDGER:
        return "the ledger cannot be relied on; see `cloister node audit`"
    return ""


# --- Small parts --------------------------------------------------------------------------------


class Heart:
    """Heartbeats from a thread of their own, while the loop is busy with a message.

    Args:
        link: to the coordinator.
        seconds: between two.
        met: called after each that was answered.
    """

    def __init__(self, link: FleetLink, seconds: float, met: Callable[[], None]) -> None:
        self._link, self._seconds, self._met = link, seconds, met
        self._over = threading.Event()
        self._refusal: LinkRefusedError | None = None
        self._thread = threading.Thread(target=self._beat, name="heartbeats", daemon=True)

    def __enter__(self) -> Heart:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    @property
    def refused(self) -> bool:
        """Whether two heartbeats in a row were refused."""
        return self._refusal is not None

    def check(self) -> None:
        """Raise what the heartbeats were refused with.

        Raises:
            LinkRefusedError: if they were.
        """
        if self._refusal is not None:
            raise self._refusal

    def _beat(self) -> None:
        refusals = 0
        while not self._over.wait(self._seconds):
            try:
                self._link.beat()
                self._met()
                refusals = 0
            except LinkRefusedError as error:
                refusals += 1
                if refusals > 1:
                    self._refusal = error
                    return
            except LinkError as error:
                log.debug("a heartbeat was lost: %s", error)


class Growing:
    """Waits that double, up to a longest one."""

    def __init__(self, first: float, longest: float) -> None:
        self._first, self._longest = min(first, longest), longest
        self._next = self._first

    def next(self) -> float:
        """The next one, in seconds."""
        now, self._next = self._next, min(2 * self._next, self._longest)
        return now

    def reset(self) -> None:
        """Begin again."""
        self._next = self._first


class Told:
    """Says the same thing once in a while."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._text, self._when = "", -math.inf

    def tell(self, text: str) -> None:
        """Log it, unless it was logged just now."""
        now = time.monotonic()
        if text != self._text or now - self._when >= self._seconds:
            self._text, self._when = text, now
            log.warning("%s", printable(text))


@contextmanager
def alone(home: Path) -> Iterator[None]:
    """Run this node from this process alone; the system lets go of it when the process ends.

    Raises:
        AlreadyRunningError: if another process runs it.
        ConfigError: if the folder cannot be written.
    """
    path = home / PID_FILE
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written ({error})") from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"{os.getpid()}\n".encode())
        yield
        os.ftruncate(descriptor, 0)
    except BlockingIOError:
        raise AlreadyRunningError(
            f"{home}: process {running(home)} runs this node; see `cloister node status`"
        ) from None
    finally:
        os.close(descriptor)


def running(home: Path) -> int | None:
    """The process that runs the node in `home`; None if none does."""
    try:
        descriptor = os.open(home / PID_FILE, os.O_RDONLY | os.O_NOFOLLOW)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return None
    except BlockingIOError:
        said = os.read(descriptor, 32).strip()
        return int(said) if said.isdigit() else 0
    finally:
        os.close(descriptor)


def memory_for_worker(device: str) -> int | None:
    """Bytes that a worker may take: what the machine, or its cgroup, has; None where CUDA is.

    CUDA maps the whole device's memory into the process.
    """
    if device.startswith("cuda"):
        return None
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return int(0.9 * min(machine, memory_limit() or machine))


def printable(text: str) -> str:
    """A text of the coordinator's, on one line of a log."""
    return "".join(each if each.isprintable() else "?" for each in text[:2000])
