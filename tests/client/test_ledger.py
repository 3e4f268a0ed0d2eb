"""The rules by which a node writes, by one process and by many, some of them killed."""

from __future__ import annotations

import json
import os
import random
import shutil
import sqlite3
import stat
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

import client.chain
from client.approval import Asked
from client.book import Book, Kind, Limit
from client.keyfile import NodeKey
from client.ledger import Ledger, Place, Signed, TaskKey, stamp
from client.policy import Policy
from client.witness import genuine, last_witnesses
from common import accounting
from common.accounting import Share, SubsampledGaussian
from common.clock import Clock
from common.errors import LedgerError, Refusal, RefusalCode
from common.spec import RunSpec

MECHANISM = SubsampledGaussian(0.1, 1.5, 4, "patient")
OTHER = SubsampledGaussian(0.2, 1.0, 3, "patient")
SHARES = (Share("training", MECHANISM, 5),)
SIGNED = Signed("a person", "a reason")
OPEN, DENIED, LAPSED, CLOSED = (letter * 64 for letter in "abcd")
NEW = "9" * 64


def task(run: str = OPEN, number: int = 4, digest: str = "4" * 64) -> TaskKey:
    return TaskKey(run, "training", number, digest)


def code_of(ask: Callable[[], object]) -> RefusalCode:
    with pytest.raises(Refusal) as refused:
        ask()
    return refused.value.code


def kinds(ledger: Ledger) -> list[str]:
    return [entry.kind for entry in ledger.entries()]


@pytest.fixture
def ledger(lived: Place) -> Ledger:
    return Ledger(lived)


# --- One process --------------------------------------------------------------------------------


def test_a_new_ledger_says_whose_it_is_and_who_made_it(tmp_path: Path):
    place = Place(tmp_path / "ledger", NodeKey(bytes(32)), tmp_path / "witness")
    made = Ledger.create(place, site="north", by="a person")
    (opened,) = made.entries()
    assert (opened.number, opened.kind) == (1, Kind.OPENED)
    assert opened.said == {"site": "north", "by": "a person"}
    for path in (place.folder, place.folder / "releases"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o700
    assert stat.S_IMODE(place.database.stat().st_mode) == 0o600


def test_opening_again_changes_nothing(lived: Place, ledger: Ledger):
    ledger.reserve(task(), MECHANISM)
    assert list(Ledger(lived).entries()) == list(ledger.entries())
    assert Ledger(lived).book.divergence(8.0) == ledger.book.divergence(8.0)


def test_what_is_booked_is_in_the_book_at_once_and_on_the_disk(lived: Place, ledger: Ledger):
    attempt = ledger.reserve(task(), MECHANISM, cohort="e" * 64)
    found = Ledger(lived)
    written = list(found.entries())[-1]
    assert len(bytes.fromhex(written.nonce)) == 16
    assert written._replace(nonce="")[:-1] == (
        *(attempt.number, Kind.RESERVED, OPEN, "training", 4, "4" * 64),
        *(0.1, 1.5, 4, "patient", None, 0, "", "e" * 64, "", "{}"),
    )
    for book in (ledger.book, found.book):
        assert book.spent() == [MECHANISM.of_steps(16)]


@pytest.mark.parametrize(
    ("run", "code"),
    [
        (CLOSED, RefusalCode.REPLAY),
        (LAPSED, RefusalCode.APPROVAL),
        (DENIED, RefusalCode.APPROVAL),
        (NEW, RefusalCode.APPROVAL),
    ],
)
def test_an_attempt_at_a_run_that_is_not_set_aside_is_refused(
    ledger: Ledger, run: str, code: RefusalCode
):
    assert code_of(lambda: ledger.reserve(task(run), MECHANISM)) is code
    assert ledger.book.last == 101


@pytest.mark.parametrize("number", [1, 3])
def test_other_content_of_a_round_is_refused_released_or_not(ledger: Ledger, number: int):
    other = task(number=number, digest="f" * 64)
    assert code_of(lambda: ledger.reserve(other, MECHANISM)) is RefusalCode.REPLAY
    assert code_of(lambda: ledger.released(other)) is RefusalCode.REPLAY
    assert ledger.book.last == 101


class Interrupted(BaseException):
    """As a signal would be."""


@pytest.mark.parametrize(
    "error", [Refusal(RefusalCode.BUDGET, "no"), ValueError("a bug"), Interrupted()]
)
def test_whatever_keeps_an_attempt_from_being_allowed_leaves_no_trace_and_no_lock(
    lived: Place, ledger: Ledger, error: BaseException
):
    def never(_: Book) -> None:
        raise error

    before = list(ledger.entries())
    for ask in (
        lambda: ledger.reserve(task(), MECHANISM, allow=never),
        lambda: ledger.earmark(NEW, SHARES, allow=never),
    ):
        with pytest.raises(type(error)):
            ask()
    assert list(Ledger(lived).entries()) == before
    Ledger(lived).reserve(task(), MECHANISM)
    assert ledger.book.last == 102


def test_what_is_allowed_sees_everything_that_anybody_booked(lived: Place, ledger: Ledger):
    Ledger(lived).reserve(task(), MECHANISM)
    seen: list[list[SubsampledGaussian]] = []
    ledger.reserve(task(), MECHANISM, allow=lambda book: seen.append(book.spent()))
    assert seen == [[MECHANISM.of_steps(16)]]


def test_setting_the_same_run_aside_twice_is_booked_once(ledger: Ledger):
    for _ in range(3):
        ledger.earmark(NEW, SHARES, name="new", run_id="r9")
    assert kinds(ledger)[-2:] == [Kind.ADMITTED, Kind.EARMARKED]
    assert (ledger.book.run(NEW).name, ledger.book.run(NEW).run_id) == ("new", "r9")


def test_a_changed_run_is_set_aside_anew_and_asks_again(ledger: Ledger):
    asked: list[str] = []
    for share in (SHARES[0], SHARES[0], Share("training", OTHER, 5)):
        ledger.earmark(OPEN, [share], allow=lambda book: asked.append(book.run(OPEN).state))
    assert asked == ["open"]
    assert ledger.book.run(OPEN).shares == {"training": Share("training", OTHER, 5)}


def test_a_run_of_several_parts_is_set_aside_in_one_piece(ledger: Ledger):
    parts = (*SHARES, Share("evaluation", OTHER, 1))
    ledger.earmark(NEW, parts)
    assert tuple(ledger.book.run(NEW).shares.values()) == parts
    ledger.earmark(NEW, parts)
    assert ledger.book.last == 103


def test_an_identity_belongs_to_one_run(ledger: Ledger):
    assert code_of(lambda: ledger.earmark(NEW, SHARES, run_id=OPEN[:8])) is RefusalCode.REPLAY
    ledger.earmark(NEW, SHARES, run_id="another")
    ledger.earmark("8" * 64, SHARES)  # and one that says none is not that of another


def test_a_closed_run_is_over_for_good(ledger: Ledger):
    for _ in range(2):
        assert code_of(lambda: ledger.earmark(CLOSED, SHARES)) is RefusalCode.REPLAY
        ledger.close(CLOSED, SIGNED)
        ledger.lapse(CLOSED)
    assert ledger.book.last == 101


def test_a_lapsed_run_can_be_set_aside_again_or_closed_for_good(ledger: Ledger):
    ledger.earmark(LAPSED, SHARES)
    assert LAPSED in ledger.book.open_runs()
    ledger.lapse(LAPSED)
    ledger.close(LAPSED, SIGNED)
    assert code_of(lambda: ledger.earmark(LAPSED, SHARES)) is RefusalCode.REPLAY


@pytest.mark.parametrize("run", [DENIED, NEW])
def test_a_run_that_was_never_set_aside_cannot_be_ended(ledger: Ledger, run: str):
    ledger.close(run, SIGNED)
    ledger.lapse(run)
    assert ledger.book.last == 101


def test_a_yes_sets_aside_in_the_same_moment_or_not_at_all(
    ledger: Ledger, make_spec: Callable[..., RunSpec]
):
    asked = Asked(make_spec(), "e" * 64, SHARES)

    def never(_: Book) -> None:
        raise Refusal(RefusalCode.BUDGET, "no")

    with pytest.raises(Refusal):
        ledger.approve(asked, SIGNED, allow=never)
    assert ledger.book.run(asked.spec.digest).decision is None
    ledger.approve(asked, SIGNED)
    run = ledger.book.run(asked.spec.digest)
    assert run.decision is not None
    assert (run.decision.approved, run.decision.approval) == (True, asked.digest)
    assert (run.state, tuple(run.shares.values())) == ("open", SHARES)


def test_the_order_of_a_budget_stays_when_something_is_spent(ledger: Ledger):
    with pytest.raises(LedgerError, match="only epsilon can still be changed"):
        ledger.set_budget(Limit(3.0, 1e-5, 9.0), SIGNED)
    with pytest.raises(LedgerError, match="order = 8"):
        ledger.set_budget(Limit(3.0, 1e-6, 8.0), SIGNED)
    ledger.set_budget(Limit(4.0, 1e-5, 8.0), SIGNED)
    assert ledger.book.limit == Limit(4.0, 1e-5, 8.0)


@pytest.mark.parametrize("divergence", [-0.1, float("nan"), float("inf"), -float("inf")])
def test_nothing_is_given_back_and_nothing_without_a_number_is_carried(
    lived: Place, ledger: Ledger, divergence: float
):
    with pytest.raises(LedgerError, match="expected a divergence of at least 0"):
        ledger.carry(divergence, SIGNED)
    assert Ledger(lived).book.carried == 0.25


def test_what_was_spent_elsewhere_means_something_at_the_order_of_a_budget_alone(tmp_path: Path):
    made = Ledger.create(Place(tmp_path / "ledger", NodeKey(bytes(32))), site="north")
    with pytest.raises(LedgerError, match="no budget is set"):
        made.carry(0.5, SIGNED)
    made.set_budget(Limit(3.0, 1e-5, 8.0), SIGNED)
    made.carry(0.5, SIGNED)
    with pytest.raises(LedgerError, match="only epsilon"):
        made.set_budget(Limit(3.0, 1e-5, 9.0), SIGNED)
    assert made.book.carried == 0.5


@pytest.mark.parametrize(
    "reason", ["", "x" * 2**21, "it's \x1f|\x00'\"; DROP TABLE entry;--", "\u2028 ünïcode \ud800"]
)
def test_a_note_may_be_long_and_may_hold_anything(lived: Place, ledger: Ledger, reason: str):
    signed = Signed("Ä. Person", reason)
    ledger.decide(NEW, approved=False, approval="d" * 64, signed=signed, name="new")
    decision = Ledger(lived).book.run(NEW).decision
    assert decision is not None
    assert (decision.by, decision.reason) == signed


def test_dates_are_the_clocks_to_the_millisecond_and_sort_as_text(tmp_path: Path):
    noon = datetime(2026, 3, 1, 12, tzinfo=UTC)
    dates = iter([noon, noon + timedelta(days=3650), noon - timedelta(days=1)])
    clock = Clock(date=lambda: next(dates))
    made = Ledger.create(Place(tmp_path / "ledger", NodeKey(bytes(32)), clock=clock), site="x")
    made.admit("1" * 64, SIGNED)
    made.admit("2" * 64, SIGNED)  # the clock was put back
    times = [entry.time for entry in made.entries()]
    assert times == [
        "2026-03-01T12:00:00.000+00:00",
        "2036-02-27T12:00:00.000+00:00",
        "2026-02-28T12:00:00.000+00:00",
    ]
    assert Ledger(Place(tmp_path / "ledger", NodeKey(bytes(32)))).book.admitted == "2" * 64


@pytest.mark.parametrize("seconds", [0, 0.0004, 59.9996, 10**6])
def test_a_date_of_another_zone_is_stamped_as_the_same_moment(seconds: float):
    date = datetime(2026, 3, 1, tzinfo=UTC) + timedelta(seconds=seconds)
    abroad = date.astimezone(datetime.fromisoformat("2026-01-01T00:00+05:45").tzinfo)
    assert stamp(abroad) == stamp(date)
    assert len(stamp(date)) == len("2026-03-01T00:00:00.000+00:00")


# --- Threads and processes ----------------------------------------------------------------------


def test_threads_may_share_a_ledger(lived: Place, ledger: Ledger):
    """Whatever runs a node may ask from another thread than the one that opened it."""

    def book(number: int) -> int:
        if number % 3:
            return ledger.reserve(task(), MECHANISM).number
        assert ledger.witness
        return 0

    with ThreadPoolExecutor(8) as pool:
        booked = sorted(filter(None, pool.map(book, range(60))))
    assert booked == list(range(102, 142))
    assert Ledger(lived).book.last == 141


HERD = """
import json, os, resource, sys, traceback
from pathlib import Path

import client.ledger
from client.keyfile import NodeKey
from client.ledger import Ledger, Place, TaskKey
from client.rules import check_open
from client.policy import Policy
from common.accounting import Share, SubsampledGaussian
from common.clock import Clock
from common.errors import LedgerError, Refusal, RefusalCode

MECHANISM = SubsampledGaussian(0.1, 1.5, 4, "patient")
RUN = "a" * 64
order = json.loads(sys.argv[1])
policy = Policy.model_validate_json(order["policy"]) if order["policy"] else None

def place_of(home):
    home = Path(home)
    return Place(home / "ledger", NodeKey(bytes(range(32))), home / "ledger.witness")

def key(number, digest):
    return TaskKey(RUN, "training", number, digest)

def allow(book):
    check_open(book, RUN)
    policy.check_attempt(book, Clock().date(), RUN, "training", 3)

def attempts(ledger, me):
    granted = 0
    while True:
        try:
            ledger.reserve(key(3, "3" * 64), MECHANISM, allow=allow)
            granted += 1
        except Refusal as refusal:
            assert refusal.code is RefusalCode.BUDGET, refusal
            return granted

def runs(ledger, me):
    run, shares = f"{me:064x}", (Share("training", MECHANISM, 10),)
    try:
        ledger.earmark(run, shares, allow=lambda book: policy.check_earmark(book, run, shares))
        return 1
    except Refusal as refusal:
        assert refusal.code is RefusalCode.BUDGET, refusal
        return 0

def contents(ledger, me):
    try:
        ledger.commit(ledger.reserve(key(5, f"{me:064x}"), MECHANISM), str(me).encode())
        return 1
    except Refusal as refusal:
        assert refusal.code is RefusalCode.REPLAY, refusal
        return 0

def openings(ledger, me):
    for _ in range(5):
        ledger.reserve(key(5, "5" * 64), MECHANISM)
        ledger.disconnect()
        ledger = Ledger(place)
    return 5

def creations(home, me):
    try:
        Ledger.create(place_of(home), site=str(me))
        return 1
    except LedgerError as error:
        assert "already" in str(error) or "in this moment" in str(error) or "knows of" in str(error)
        return 0

def dies(ledger, me):
    word, _, count = order["at"][order["homes"].index(home)].partition(" ")
    left = [int(count or 1)]
    def die(*_):
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), 9)
    watched = lambda statement: die() if statement.startswith(word) else None
    if word == "tell":
        client.ledger.add_witness = die
    ledger._chain._database.set_trace_callback(watched)
    shares = (Share("training", MECHANISM, 7), Share("evaluation", MECHANISM, 1))
    ledger.earmark("9" * 64, shares)
    return 1

def fills(ledger, me):
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard))
    attempt, said = None, []
    for _ in range(1000):
        try:
            attempt = ledger.reserve(key(5, "5" * 64), MECHANISM)
        except LedgerError as error:
            said.append(str(error))
            if len(said) == 3:
                break
    try:
        ledger.commit(attempt, bytes(400_000))
    except OSError as error:
        said.append(str(error))
    before = ledger.book.last
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    ledger.commit(attempt, bytes(400_000))
    assert ledger.book.last == before + 1
    place.folder.with_name("said.json").write_text(json.dumps([before, said]))
    return 1

def child(home, me, go):
    global place
    place = place_of(home)
    act = globals()[order["act"]]
    ledger = home if act is creations else Ledger(place)
    os.read(go, 1)
    return act(ledger, me)

for home in order["homes"]:
    go, start = os.pipe()
    children = []
    for me in range(order["processes"]):
        pid = os.fork()
        if pid == 0:
            os.close(start)
            code = 99
            try:
                code = child(home, me, go)
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)
        children.append(pid)
    os.close(go)
    print(json.dumps(children), flush=True)
    sys.stdin.readline()
    os.close(start)
    left = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children]
    print(json.dumps(left), flush=True)
"""


class Herd:
    """Processes that all do one thing at one moment to a ledger, home after home."""

    def __init__(self, act: str, homes: list[Path], processes: int = 8, **more: Any) -> None:
        plain = {"act": act, "homes": list(map(str, homes)), "processes": processes, "policy": ""}
        self._homes = homes
        self._started = subprocess.Popen(
            [sys.executable, "-c", HERD, json.dumps(plain | more)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        )

    def __iter__(self) -> Iterator[tuple[Path, list[int]]]:
        """Each home, and how each process there ended: what it was granted, or by which signal."""
        for home in self._homes:
            yield home, self.run()
        assert self._started.wait(timeout=60) == 0

    def run(self, *, kill: random.Random | None = None) -> list[int]:
        """The next home; `kill` draws three of the processes, and when they are killed."""
        assert self._started.stdin is not None
        assert self._started.stdout is not None
        children = json.loads(self._started.stdout.readline())
        self._started.stdin.write("go\n")
        self._started.stdin.flush()
        if kill is not None:
            for pid in kill.sample(children, 3):
                time.sleep(kill.uniform(0, 0.05))
                with suppress(ProcessLookupError):  # it was quicker
                    os.kill(pid, 9)
        ended: list[int] = json.loads(self._started.stdout.readline())
        return ended


def copies(place: Place, count: int) -> list[Path]:
    home = place.folder.parent
    return [Path(shutil.copytree(home, home.with_name(f"{home.name}-{n}"))) for n in range(count)]


def at(home: Path) -> Place:
    return Place(home / "ledger", NodeKey(bytes(range(32))), home / "ledger.witness")


FITS = 40


@pytest.fixture
def scarce(lived: Place, make_policy: Callable[..., Policy]) -> str:
    """A policy with room for `FITS` rounds beyond what stands in the lived ledger.

    What does not count as room is the ledger's open run as it was set aside.
    """
    ledger = Ledger(lived)
    cost = accounting.divergence(MECHANISM, 8.0)
    room = ledger.book.divergence(8.0) + (FITS + 0.5) * cost
    epsilon = accounting.epsilon_of(room, 1e-5, 8.0)
    budget = {"epsilon": epsilon, "delta": 1e-5, "order": 8.0}
    limits = {"greatest_rounds_a_day": 10**6, "greatest_open_runs": 100}
    policy = make_policy(budget=budget, limits=limits)
    ledger.disconnect()
    return policy.model_dump_json()


def reserved(home: Path) -> int:
    """Attempts in a ledger that is whole, and agrees with its witness file."""
    ledger = Ledger(at(home))
    found = Counter(entry.kind for entry in ledger.entries())
    witness = at(home).witness
    assert witness is not None
    seen = genuine(at(home).key, last_witnesses(witness))
    assert max(seen).number == ledger.book.last
    ledger.disconnect()
    return found[Kind.RESERVED]


def test_eight_processes_that_spend_the_last_of_a_budget_are_granted_what_fits(
    lived: Place, scarce: str
):
    before, races = reserved(lived.folder.parent), 0
    for home, granted in Herd("attempts", copies(lived, 4), policy=scarce):
        assert sum(granted) == FITS
        races += max(granted) < FITS
        assert reserved(home) == before + FITS
    assert races  # on a busy machine the first may be done before the others begin


def test_eight_processes_with_three_of_them_killed_are_granted_what_fits(lived: Place, scarce: str):
    before, kill = reserved(lived.folder.parent), random.Random(1)  # noqa: S311
    homes, killed = copies(lived, 5), 0
    herd = Herd("attempts", homes, policy=scarce)
    for home in homes:
        ended = herd.run(kill=kill)
        assert reserved(home) == before + FITS
        assert sum(code for code in ended if code >= 0) <= FITS
        killed += ended.count(-9)
    assert killed  # on a busy machine some are done before


def test_eight_processes_that_each_ask_for_a_run_are_granted_as_many_as_fit(
    lived: Place, scarce: str
):
    for home, granted in Herd("runs", copies(lived, 3), policy=scarce):
        assert sorted(granted) == [0, 0, 0, 0, 1, 1, 1, 1]
        open_runs = Ledger(at(home)).book.open_runs()
        assert len(open_runs) == 1 + FITS // 10


def test_of_eight_contents_for_one_round_one_is_taken(lived: Place):
    for home, granted in Herd("contents", copies(lived, 3)):
        assert sorted(granted) == [0] * 7 + [1]
        (winner,) = [me for me, code in enumerate(granted) if code]
        ledger = Ledger(at(home))
        asked = TaskKey(OPEN, "training", 5, f"{winner:064x}")
        assert ledger.released(asked) == str(winner).encode()
        with pytest.raises(Refusal, match="other content"):
            ledger.released(asked._replace(digest="e" * 64))


def test_processes_that_open_and_book_by_turns_lose_nothing(lived: Place):
    before = reserved(lived.folder.parent)
    for home, booked in Herd("openings", copies(lived, 1)):
        assert booked == [5] * 8
        assert reserved(home) == before + 40


def test_of_eight_processes_one_makes_the_ledger(tmp_path: Path):
    homes = [tmp_path / str(number) for number in range(3)]
    for home in homes:
        home.mkdir()
    for home, made in Herd("creations", homes):
        assert sorted(made) == [0] * 7 + [1]
        ledger = Ledger(at(home))
        assert ledger.book.site == str(made.index(1))
        assert not list(home.glob("ledger/*.partial"))


def test_a_process_that_runs_for_long_sees_what_others_book(lived: Place, ledger: Ledger):
    before = ledger.book.last
    other = Herd("openings", [lived.folder.parent], processes=2)
    assert other.run() == [5, 5]
    assert ledger.book.last == before + 10
    content = task(number=5, digest="e" * 64)
    assert code_of(lambda: ledger.reserve(content, MECHANISM)) is RefusalCode.REPLAY
    assert ledger.reserve(task(number=5, digest="5" * 64), MECHANISM).number == before + 11


def test_a_file_that_another_holds_too_long_is_said_and_costs_nothing(
    lived: Place, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(client.chain, "PATIENCE", 0.1)
    ledger = Ledger(lived)
    with closing(sqlite3.connect(lived.database, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(LedgerError, match=r"nothing was booked \(database is locked\)"):
            ledger.reserve(task(), MECHANISM)
        assert ledger.book.last == 101  # reading goes on
        other.execute("ROLLBACK")
    assert ledger.reserve(task(), MECHANISM).number == 102


# --- Crashes ------------------------------------------------------------------------------------


EVENTS = {
    "BEGIN": 0,
    "SELECT": 0,
    "INSERT": 0,
    "INSERT 2": 0,
    "COMMIT": 0,
    "tell": 2,
    "nothing": 2,
}
"""Where a process dies, and how many entries it has booked then."""


def test_a_process_killed_while_it_books_books_all_or_nothing(lived: Place):
    herd = Herd("dies", copies(lived, len(EVENTS)), processes=1, at=list(EVENTS))
    for (event, booked), (home, ended) in zip(EVENTS.items(), herd, strict=True):
        assert ended == [1 if event == "nothing" else -9], event
        place = at(home)
        ledger = Ledger(place)
        assert ledger.book.last == 101 + booked, event
        assert len(ledger.book.run(NEW).shares) == booked, event
        assert place.witness is not None
        assert genuine(place.key, last_witnesses(place.witness))[-1].number == 101 + booked, event
        ledger.reserve(task(), MECHANISM)
        assert Ledger(place).book.last == 102 + booked, event


def test_a_full_disk_is_said_costs_nothing_and_is_forgotten_when_there_is_room(lived: Place):
    (ended,) = Herd("fills", [lived.folder.parent], processes=1)
    assert ended[1] == [1]
    last, said = json.loads((lived.folder.parent / "said.json").read_text())
    assert len(said) == 4
    for text in said[:3]:
        assert "nothing was booked" in text
        assert "see that the disk has room" in text
    assert "File too large" in said[3]
    assert last > 110
    ledger = Ledger(lived)
    assert ledger.book.last == last + 1
    assert ledger.released(task(number=5, digest="5" * 64)) == bytes(400_000)
    assert not list(lived.folder.glob("releases/*.partial"))


def test_a_read_only_database_is_said(lived: Place):
    ledger = Ledger(lived)
    ledger._chain._database.execute("PRAGMA query_only = ON")
    with pytest.raises(LedgerError, match="readonly"):
        ledger.reserve(task(), MECHANISM)
    ledger._chain._database.execute("PRAGMA query_only = OFF")
    assert replace(ledger.reserve(task(), MECHANISM), number=0).task == task()
