"""A node that is killed in any state of its gate spends what it booked, and nothing else leaves.

The node is a process of its own (mortal.py): the shipped gate on a real folder, with a real
ledger, cohort and training. It is killed with SIGKILL in a given state, started again on the same
folder, and asked again by a coordinator that has seen its reply or has not. What must hold is
checked on a copy of what the dead node left on the disk, and again after each answer, by code that
knows the ledger's rows and Renyi's formula and nothing of the ledger. SIGKILL ends a process, not
a machine: whether the disk keeps what it was told to keep is not seen here.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import dataclass, field, replace
from hashlib import sha256
from itertools import chain
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
from flwr.proto.recorddict_pb2 import RecordDict as RecordDictProto
from numpy.typing import NDArray
from safetensors.numpy import save

from client.home import NodeHome, cohort_digest
from client.ledger import Ledger, Place, Signed
from common.errors import LedgerError, RefusalCode
from common.messages import (
    Closed,
    Closing,
    Counts,
    EvaluationTask,
    Invitation,
    NodeCard,
    RefusalReply,
    Release,
    Reply,
    Request,
    TrainTask,
    read_reply,
)
from common.spec import RunSpec

PROGRAM = Path(__file__).with_name("mortal.py")
MEMORY = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None  # noqa: S108 - nothing is secret
DEADLINE = 300.0  # seconds for any one answer, on a machine however busy
TIMES, LANES = 20, 2
ORDER, EPSILON, DELTA = 8, 60.0, 1e-4
BATCH, NOISE = 16, 8.0

Spec = Callable[..., RunSpec]
Vector = NDArray[np.float64]


class Moment(NamedTuple):
    """Some seconds after a node has told so many events, whatever it is doing then."""

    events: int
    seconds: float


class State(NamedTuple):
    """Where a node dies: at an event of a request, which is told just before it happens.

    `booked` is how many of the request's transactions are in the ledger then, for good.
    """

    request: str
    event: str
    number: int
    booked: int


STATES = {
    # The invitation is one transaction of two entries, the run's training and its evaluation.
    "before the earmark": State("invite", "BEGIN", 1, 0),
    "half-way through the earmark": State("invite", "INSERT earmarked", 2, 0),
    "after the earmark, before the card": State("invite", "reply", 1, 1),
    "before reserve": State("train", "BEGIN", 1, 0),
    "within reserve, before its commit": State("train", "COMMIT", 1, 0),
    "after reserve, as training begins": State("train", "network", 1, 1),
    "in mid-training, between two steps": State("train", "network", 2, 1),
    "after training, before commit": State("train", "log", 1, 1),
    "release on the disk, no entry": State("train", "BEGIN", 2, 1),
    "after commit, before its witness": State("train", "open ledger.witness", 4, 2),
    "after commit, before the reply": State("train", "reply", 1, 2),
    "after the reply": State("train", "replied", 1, 2),
}
BETWEEN = {
    "within the earmark": State("invite", "INSERT earmarked", 1, 0),
    "before the earmark's commit": State("invite", "COMMIT", 1, 0),
    "after the earmark, before its witness": State("invite", "open ledger.witness", 2, 1),
    "after the card": State("invite", "replied", 1, 1),
    "within reserve, before its entry": State("train", "INSERT reserved", 1, 0),
    "after reserve, before its witness": State("train", "open ledger.witness", 2, 1),
    "in mid-training, within a step": State("train", "step", 2, 1),
    "as the release is written": State("train", "open N.sealed.N.partial", 1, 1),
    "before the release has its name": State("train", "os.rename N.sealed.N.partial", 1, 1),
    "within commit": State("train", "INSERT committed", 1, 1),
    "before commit's commit": State("train", "COMMIT", 2, 1),
    "before the counts are booked": State("count", "COMMIT", 1, 0),
    "counts booked, not yet made": State("count", "open N.sealed.N.partial", 1, 1),
    "counts on the disk, no entry": State("count", "BEGIN", 2, 1),
    "counts committed, not sent": State("count", "reply", 1, 2),
    "before the run is closed": State("close", "COMMIT", 1, 0),
    "closed, its releases still there": State("close", "os.scandir releases", 1, 1),
    "closed, half of its releases gone": State("close", "os.remove N.sealed", 2, 1),
    "closed, not answered": State("close", "reply", 1, 1),
}
BOOKS = {
    "invite": [["earmarked", "earmarked"]],
    "train": [["reserved"], ["committed"]],
    "count": [["reserved"], ["committed"]],
    "close": [["closed"]],
}
"""The entries of a request that nothing disturbs, by transaction."""

LIVES = {
    "invite": ("invite", "close"),
    "train": ("invite", "train", "close"),
    "count": ("invite", "count", "close"),
    "close": ("invite", "train", "count", "close"),
}
"""The requests of a run in which the node dies in the one named."""

ANSWERS: dict[str, type[Any]] = {
    "invite": NodeCard,
    "train": Release,
    "count": Counts,
    "close": Closed,
}


# --- The node, from outside ----------------------------------------------------------------------


@dataclass
class Heard:
    """What came of one request.

    Attributes:
        events: that were told, in order, each with its number.
        left: the bytes that left the node; None if it died before.
        died: the event at which it died.
        killed: whether it was killed before all of this was heard.
    """

    events: list[tuple[str, int]] = field(default_factory=list)
    left: bytes | None = None
    died: tuple[str, int] | None = None
    killed: bool = False


class Nursery:
    """Where nodes come from; `bear` gives the line to a new one, and its process."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        alone = {f"{name}_NUM_THREADS": "1" for name in ("OMP", "MKL", "OPENBLAS")}
        self._server = subprocess.Popen(
            [sys.executable, str(PROGRAM), str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            env=os.environ | alone | {"PYTHONPATH": str(PROGRAM.parents[2])},
        )
        theirs.close()
        self._orders = ours

    def bear(self, home: Path, node: str) -> tuple[Connection, int]:
        ours, theirs = socket.socketpair()
        order = json.dumps({"home": str(home), "node": node}).encode()
        with theirs:
            socket.send_fds(self._orders, [order], [theirs.fileno()])
        line = Connection(ours.detach())
        assert line.poll(DEADLINE), "no node was born"
        process, threads = json.loads(line.recv_bytes())
        assert threads == 1, "a fork of a process with threads is no clean start"
        return line, process

    def close(self) -> None:
        self._orders.close()
        self._server.wait(DEADLINE)


class Hospital:
    """A node's folder, the node that lives in it now, and all that it ever told and sent."""

    def __init__(self, home: Path, nursery: Nursery, node: str = "shipped") -> None:
        self.home, self._nursery, self._node = home, nursery, node
        self._line: Connection | None = None
        self.sent: list[Reply] = []
        self.noise: list[Vector] = []
        self.log: list[str] = []

    def ask(
        self, request: Request, end: State | None = None, moment: Moment | None = None
    ) -> Heard:
        """Ask the node, started anew if it is dead; it dies at `end`, or is killed at `moment`."""
        if self._line is None:
            self._line, self._process = self._nursery.bear(self.home, self._node)
        heard, line, hold = Heard(), self._line, moment.events if moment else 0
        try:
            line.send_bytes(json.dumps([end and [end.event, end.number], hold]).encode())
            line.send_bytes(recorddict_to_proto(request.to_records()).SerializeToString())
            while heard.killed or heard.events[-1:] != [("ready", 1)]:
                if moment and len(heard.events) == hold and not heard.killed:
                    heard.killed = self._kill(moment)
                assert line.poll(DEADLINE), f"no answer: {self.log[-5:]}"
                self._take(line.recv_bytes(), heard)
        except (EOFError, ConnectionError):
            self.stop()
        return heard

    def _kill(self, moment: Moment) -> bool:
        if self._line is not None and moment.events:
            self._line.send_bytes(b"go on")
        time.sleep(moment.seconds)
        os.kill(self._process, signal.SIGKILL)
        return True

    def stop(self) -> None:
        """Let go of the node, which ends when nobody asks any more, and see it gone.

        A line is heard to be cut before the dead have let go of their locks.
        """
        if self._line is None:
            return
        self._line.close()
        self._line, end = None, time.monotonic() + DEADLINE
        with suppress(ProcessLookupError):
            while time.monotonic() < end:
                os.kill(self._process, 0)
                time.sleep(0.001)
            pytest.fail(f"process {self._process} does not end")

    def _take(self, frame: bytes, heard: Heard) -> None:
        kind, content = frame[:1], frame[1:]
        if kind == b"E":
            event, number = json.loads(content)
            heard.events.append((event, number))
        elif kind == b"X":
            event, number = json.loads(content)
            heard.died = event, number
        elif kind == b"L":
            heard.left = content
            self.sent.append(reply_of(content))
        elif kind == b"G":
            made, summed = np.frombuffer(content, "<f4").astype(np.float64).reshape(2, -1)
            self.noise.append(made * BATCH - summed)
        else:
            self.log.append(content.decode())


def reply_of(content: bytes) -> Reply:
    return read_reply(recorddict_from_proto(RecordDictProto.FromString(content)))


# --- What must hold, by the rows alone -----------------------------------------------------------

Row = sqlite3.Row


@dataclass(frozen=True)
class Disk:
    """What lies in a node's folder: the rows, and what the ledger itself makes of them."""

    rows: list[Row]
    witnesses: list[str]
    kept: list[str]
    ledger_says: str
    total: float = math.nan
    remaining: dict[tuple[str, str], int] = field(default_factory=dict)


def disk_of(home: Path) -> Disk:
    """Read a copy: what a dead node left must be found by the next node as it was left."""
    with tempfile.TemporaryDirectory(dir=MEMORY) as folder:
        copy = Path(shutil.copytree(home, Path(folder) / "home"))
        kept = sorted(path.name for path in (copy / "ledger" / "releases").iterdir())
        witnesses = (copy / "ledger.witness").read_text().splitlines()
        with closing(sqlite3.connect(copy / "ledger" / "ledger.sqlite")) as database:
            database.row_factory = sqlite3.Row
            rows = database.execute("SELECT * FROM entry ORDER BY number").fetchall()
        at_rest = NodeHome.open(copy)
        try:
            ledger = Ledger(Place(copy / "ledger", at_rest.key, copy / "ledger.witness"))
        except LedgerError as error:
            return Disk(rows, witnesses, kept, str(error))
        book = ledger.book
        remaining: dict[tuple[str, str], int] = {
            (digest, part): run.remaining(part)
            for digest, run in book.runs.items()
            for part in run.shares
        }
        total = book.divergence(ORDER)
        ledger.disconnect()
        return Disk(rows, witnesses, kept, "", total, remaining)


def of(rows: list[Row], kind: str, **fields: Any) -> list[Row]:
    """The rows of a kind that have just these values."""
    return [
        row
        for row in rows
        if row["kind"] == kind and all(row[name] == value for name, value in fields.items())
    ]


def cost(row: Any, rounds: int = 1) -> float:
    """Renyi divergence of a row's mechanism, at a whole order (Mironov et al. 2019, 3.3)."""
    rate, noise = row["sampling_rate"], row["noise_multiplier"]
    terms = (
        math.comb(ORDER, k)
        * (1 - rate) ** (ORDER - k)
        * rate**k
        * math.exp(k * (k - 1) / (2 * noise**2))
        for k in range(ORDER + 1)
    )
    return float(rounds * row["steps"] * math.log(sum(terms)) / (ORDER - 1))


def remaining_by_rows(rows: list[Row]) -> dict[tuple[str, str], int]:
    """Rounds of each run and part that are set aside and were never attempted."""
    left = {}
    for row in of(rows, "earmarked"):
        run, part = row["run"], row["part"]
        tried = {r["round"] for r in of(rows, "reserved", run=run, part=part)}
        left[run, part] = 0 if of(rows, "closed", run=run) else row["round"] - len(tried)
    return left


def total_by_rows(rows: list[Row]) -> float:
    """What counts against the budget: every attempt, and what is still set aside."""
    aside = remaining_by_rows(rows)
    earmarks = {(row["run"], row["part"]): row for row in of(rows, "earmarked")}
    spent = sum(cost(row) for row in of(rows, "reserved"))
    return spent + sum(cost(earmarks[key], rounds) for key, rounds in aside.items())


def allowed_by_rows(rows: list[Row]) -> float:
    """The divergence that the budget leaves room for (Canonne et al. 2020, Proposition 12)."""
    said = json.loads(of(rows, "budget")[-1]["note"])
    order, delta = said["order"], said["delta"]
    return float(
        said["epsilon"] - math.log((order - 1) / order) + math.log(delta * order) / (order - 1)
    )


def faults(disk: Disk, sent: list[Reply]) -> list[str]:
    """Everything that is wrong, now, with what a node has booked and sent."""
    rows = disk.rows
    by_rows, allowed = total_by_rows(rows), allowed_by_rows(rows)
    found = [disk.ledger_says] if disk.ledger_says else []
    if not math.isclose(disk.total, by_rows, rel_tol=1e-6, abs_tol=1e-9):
        found.append(f"the ledger counts {disk.total}, its rows {by_rows}")
    if by_rows > allowed * (1 + 1e-6):
        found.append(f"{by_rows} is counted, {allowed} was allowed")
    if disk.remaining != remaining_by_rows(rows):
        found.append(f"set aside: {disk.remaining}, by rows {remaining_by_rows(rows)}")
    return found + commit_faults(rows) + witness_faults(disk) + sent_faults(rows, sent)


def commit_faults(rows: list[Row]) -> list[str]:
    """One release a task, of an attempt that was booked before it."""
    attempts = {row["number"]: row for row in of(rows, "reserved")}
    released = [attempts.get(row["refers"]) for row in of(rows, "committed")]
    tasks = [(row["run"], row["part"], row["round"]) for row in released if row is not None]
    found = [] if len(tasks) == len(released) else ["a release of no attempt"]
    late = [row["number"] for row in of(rows, "committed") if row["refers"] > row["number"]]
    found += [f"entry {number} commits a later one" for number in late]
    return found if len(set(tasks)) == len(tasks) else [*found, "two releases of one task"]


def witness_faults(disk: Disk) -> list[str]:
    """Every witness was true, and at most the last transaction is without one."""
    heads = {row["number"]: row["head"] for row in disk.rows}
    told = dict(line.split(":")[:2] for line in disk.witnesses)
    found = [f"a witness of entry {n} is not true" for n in told if told[n] != heads.get(int(n))]
    untold = [row for row in disk.rows if row["number"] > max(map(int, told))]
    if len({(row["run"], row["kind"]) for row in untold}) > 1:
        found.append(f"{len(untold)} entries are without a witness")
    return found


def sent_faults(rows: list[Row], sent: list[Reply]) -> list[str]:
    """What left is what a committed entry says, and one task's release is one."""
    found = []
    of_task: dict[tuple[str, str, int], set[str]] = {}
    for reply in sent:
        if isinstance(reply, Release):
            task, arrays = (reply.digest, "training", reply.round_number), dict(reply.update)
        elif isinstance(reply, Counts):
            task, arrays = (reply.digest, "evaluation", 1), {"counts": reply.table}
        else:
            continue
        of_task.setdefault(task, set()).add(sha256(save(arrays)).hexdigest())
    for (run, part, number), digests in of_task.items():
        attempts = of(rows, "reserved", run=run, part=part, round=number)
        numbers = [row["number"] for row in attempts]
        booked = {r["release"] for r in of(rows, "committed") if r["refers"] in numbers}
        if digests - booked:
            found.append(f"{part}, round {number}: what left was never booked")
        if len(digests) > 1:
            found.append(f"{part}, round {number}: {len(digests)} releases left")
    return found


def noise_faults(noise: list[Vector]) -> list[str]:
    """No two steps share noise, of whichever attempts; and it is noise."""
    if len(noise) < 2:
        return []
    correlations = np.asarray(np.corrcoef(np.stack(noise)))[~np.eye(len(noise), dtype=bool)]
    found = []
    if np.abs(correlations).max() > 6.5 / math.sqrt(len(noise[0])):
        found.append(f"two steps share noise: correlation {np.abs(correlations).max():.3f}")
    if min(np.std(vector) for vector in noise) < 1.0:
        found.append("a step without noise")
    return found


# --- The story of a run, with a death in it ------------------------------------------------------


@dataclass
class Story:
    """One run at a hospital from its invitation to its end, as its coordinator tells it.

    Attributes:
        anew: whether the coordinator invites again after a death, and shows the new witness.
    """

    hospital: Hospital
    spec: RunSpec
    weights: dict[str, NDArray[np.float32]]
    anew: bool
    witness: str = ""
    _answered: bool = False

    def told_with(self, death: State) -> list[str]:
        """Everything that was wrong in this run, in which the node dies once."""
        found, booked = [], list[str]()
        for kind in LIVES[death.request]:
            transactions = BOOKS[kind]
            if kind == death.request:
                lost = list(chain(*transactions[: death.booked]))
                found += self._died(death) + self._wrong(booked + lost)
                found += self._asked("invite") if self.anew and kind in ("train", "count") else []
                booked += lost if death.booked < len(transactions) else []
            booked += chain(*transactions)
            found += self._asked(kind)
            found += self._wrong(booked) if kind == death.request else []
            found += self._asked(kind)  # the same, at no cost
        found += self._asked("train", RefusalReply)  # what is over stays over
        return found + self._wrong(booked)

    def request(self, kind: str) -> Request:
        if kind == "invite":
            return Invitation(self.spec)
        if kind == "train":
            return TrainTask(self.spec, 1, self.weights, self.witness)
        if kind == "count":
            return EvaluationTask(self.spec, self.weights, self.witness)
        return Closing(self.spec.digest)

    def _died(self, death: State) -> list[str]:
        heard = self.hospital.ask(self.request(death.request), end=death)
        self._answered = heard.left is not None
        if heard.died != (death.event, death.number):
            return [f"it never came to {death}: {heard.events}"]
        if self._answered != (death.event == "replied"):
            return ["it replied" if self._answered else "it did not reply"]
        return []

    def _asked(self, kind: str, answer: type[Any] | None = None) -> list[str]:
        heard = self.hospital.ask(self.request(kind))
        self._answered = heard.left is not None
        reply = heard.left and reply_of(heard.left)
        if isinstance(reply, NodeCard):
            self.witness = reply.witness
        return [] if isinstance(reply, answer or ANSWERS[kind]) else [f"{kind}: {reply}"]

    def _wrong(self, booked: list[str]) -> list[str]:
        """What is wrong, and the run's entries if they are others than `booked`."""
        disk = disk_of(self.hospital.home)
        kinds = [row["kind"] for row in disk.rows if row["run"] == self.spec.digest]
        found = [] if kinds == booked else [f"booked {kinds}, expected {booked}"]
        if kinds[-1:] == ["closed"] and disk.kept and self._answered:
            found.append(f"kept of a run that is over: {disk.kept}")
        told = disk.witnesses[-1].partition(":")[0]
        if self._answered and told != str(disk.rows[-1]["number"]):
            found.append(f"it answered, and the last entry with a witness is {told}")
        return found + faults(disk, self.hospital.sent)


@pytest.fixture(scope="module")
def nursery() -> Iterator[Nursery]:
    with closing(Nursery()) as made:
        yield made


@pytest.fixture(scope="session")
def run_of(make_spec: Spec) -> Callable[..., RunSpec]:
    """A run under an identity of its own: three patients in four, two steps a round."""

    def made(name: str, **changes: Any) -> RunSpec:
        spec = make_spec(
            **{"rounds": 2, "evaluation": {"federated": {"noise_multiplier": NOISE}}} | changes,
            local={"steps": 2, "batch_size": BATCH},
            privacy={"noise_multiplier": NOISE},
        )
        return spec.identified(name)

    return made


@pytest.fixture
def hospital(
    nursery: Nursery, run_of: Any, make_policy: Any, write_cohort: Any
) -> Iterator[Callable[..., Hospital]]:
    """`hospital(node, epsilon)`: a new folder with policy, key, ledger and an admitted cohort."""
    made, cohort = list[Hospital](), write_cohort(run_of("any"), range(23))

    def make(node: str = "shipped", epsilon: float = EPSILON) -> Hospital:
        policy = make_policy(
            declared_size=20,
            cohort=str(cohort.path),
            budget={"epsilon": epsilon, "delta": DELTA, "order": ORDER},
            limits={
                "greatest_sampling_rate": 1.0,
                "greatest_rounds_a_day": 10**6,
                "federated_evaluation": True,
            },
        )
        folder = Path(tempfile.mkdtemp(dir=MEMORY))
        (folder / "node.toml").write_text(
            toml(policy.model_dump(mode="json", exclude_none=True, exclude={"intake"}))
        )
        home = NodeHome.open(folder)
        ledger = home.create(by="a test")
        ledger.admit(cohort_digest(home.cohort_path), Signed("a test", "it is one"))
        ledger.disconnect()
        made.append(Hospital(folder, nursery, node))
        return made[-1]

    yield make
    for one in made:
        one.stop()
        shutil.rmtree(one.home)


def toml(document: dict[str, Any]) -> str:
    """A document of tables, one deep; JSON's values are TOML's."""
    plain = [f"{k} = {json.dumps(v)}" for k, v in document.items() if not isinstance(v, dict)]
    tables = [f"[{k}]\n{toml(v)}" for k, v in document.items() if isinstance(v, dict)]
    return "\n".join(plain + tables) + "\n"


@pytest.fixture
def deaths(hospital: Any, run_of: Any, global_weights: Any) -> Callable[..., list[str]]:
    """`deaths(state, times, node)`: what was wrong in so many runs, each with that death in it."""

    def lane(state: State, times: int, node: str) -> list[str]:
        here, found = hospital(node), []
        for number in range(times):
            spec = run_of(f"run-{number}")
            found += Story(here, spec, global_weights(spec), anew=number % 2 > 0).told_with(state)
        return found + noise_faults(here.noise)

    def died(state: State, times: int = TIMES, node: str = "shipped") -> list[str]:
        shares = [len(range(n, times, LANES)) for n in range(LANES)]
        with ThreadPoolExecutor(LANES) as lanes:
            found = lanes.map(lambda share: lane(state, share, node), filter(None, shares))
            return [fault for one in found for fault in one]

    return died


# --- The matrix ----------------------------------------------------------------------------------


@pytest.mark.parametrize("state", STATES.values(), ids=STATES)
def test_a_node_killed_in_any_state_spends_what_it_booked(deaths: Any, state: State):
    """Two nodes, each of which dies twice."""
    assert deaths(state, times=4) == []


@pytest.mark.slow
@pytest.mark.parametrize("state", [*STATES.values(), *BETWEEN.values()], ids=[*STATES, *BETWEEN])
def test_nor_one_that_is_killed_there_again_and_again(deaths: Any, state: State):
    assert deaths(state) == []


@pytest.mark.slow
def test_no_state_is_left_out(deaths: Any, hospital: Any, run_of: Any, global_weights: Any):
    story = Story(hospital(), run_of("calm"), global_weights(run_of("calm")), anew=False)
    found, states = {}, dict.fromkeys([*STATES.values(), *BETWEEN.values()])
    for kind in BOOKS:
        events = story.hospital.ask(story.request(kind)).events[:-1]
        for here, (event, number) in enumerate(events):
            commits = sum(before == "COMMIT" for before, _ in events[:here])
            state = State(kind, event, number, commits)
            if states.pop(state, True):
                found[state] = deaths(state, times=4)
    assert not states, "events that never came, or not where they were thought to be"
    assert {state: wrong for state, wrong in found.items() if wrong} == {}
    assert len(found) > 20


# --- At any moment -------------------------------------------------------------------------------

SEVERAL, RETRIES, EVENTS = 20, 2, 24
STEPS_OF_A_ROUND = {"sampling_rate": 0.8, "noise_multiplier": NOISE, "steps": 2}
COUNTS_ONCE = {"sampling_rate": 1.0, "noise_multiplier": NOISE, "steps": 1}


def epsilon_for(attempts: int) -> float:
    """A budget that holds so many attempts, the counts, and half an attempt more."""
    total = cost(STEPS_OF_A_ROUND) * (attempts + 0.5) + cost(COUNTS_ONCE)
    return total + math.log((ORDER - 1) / ORDER) - math.log(DELTA * ORDER) / (ORDER - 1)


@pytest.mark.slow
@pytest.mark.parametrize(
    "epsilon", [EPSILON, epsilon_for(SEVERAL + RETRIES)], ids=["enough", "hardly enough"]
)
def test_a_node_killed_at_any_moment_spends_what_it_booked(
    hospital: Any, run_of: Any, global_weights: Any, epsilon: float
):
    spec, here = run_of("any-moment", rounds=SEVERAL), hospital(epsilon=epsilon)
    weights, rng, killed, refused = global_weights(spec), np.random.default_rng(8), 0, 0
    assert here.ask(Invitation(spec)).left
    here.stop()
    for number in range(1, SEVERAL + 1):
        chance, reply = 1.0, None
        while reply is None:
            moment = Moment(int(rng.integers(0, EVENTS)), rng.integers(2) * rng.exponential(0.002))
            in_peace, chance = rng.random() > chance, 0.6
            heard = here.ask(TrainTask(spec, number, weights), moment=None if in_peace else moment)
            reply = heard.left and reply_of(heard.left)
            killed += heard.killed
            assert faults(disk_of(here.home), here.sent) == []
        if isinstance(reply, Release):
            weights = {name: weights[name] + reply.update[name] for name in weights}
        else:
            assert reply == RefusalReply(code=RefusalCode.BUDGET), here.log[-1]
            assert of(disk_of(here.home).rows, "reserved", round=number)  # it was a retry
            refused += 1
    rows = disk_of(here.home).rows
    attempts, done = of(rows, "reserved"), of(rows, "committed")
    assert len({row["round"] for row in attempts}) == SEVERAL == len(done) + refused
    assert killed > SEVERAL // 3
    assert len(attempts) > len(done), "not one death between reserve and commit"
    if epsilon < EPSILON:
        assert len(attempts) <= SEVERAL + RETRIES
        assert len(attempts) == SEVERAL + RETRIES or not refused
    assert noise_faults(here.noise) == []


# --- What the matrix must find -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("node", "state", "fault"),
    [
        ("commits first", "in mid-training, between two steps", "booked"),
        ("commits first", "after the reply", "what left was never booked"),
        ("replies first", "after the reply", "what left was never booked"),
        ("retries for nothing", "after training, before commit", "booked"),
        ("keyed by task", "after training, before commit", "share noise"),
    ],
)
def test_a_node_that_is_wrong_is_found(deaths: Any, node: str, state: str, fault: str):
    assert [found for found in deaths(STATES[state], times=2, node=node) if fault in found]


@pytest.mark.parametrize(
    ("statement", "fault"),
    [
        ("DELETE FROM entry WHERE number = (SELECT max(number) FROM entry)", "cut off"),
        ("DELETE FROM entry WHERE kind = 'reserved'", "is gone"),
        ("UPDATE entry SET release = '' WHERE kind = 'committed'", "what left was never booked"),
        ("UPDATE entry SET refers = 1 WHERE kind = 'committed'", "of no attempt"),
        ("UPDATE entry SET head = seal WHERE kind = 'reserved'", "is not true"),
        ("UPDATE entry SET note = replace(note, '60.0', '0.9')", "was allowed"),
        ("UPDATE entry SET noise_multiplier = 9.0 WHERE kind = 'reserved'", "the ledger counts"),
    ],
)
def test_a_disk_that_is_wrong_is_found(
    hospital: Any, run_of: Any, global_weights: Any, statement: str, fault: str
):
    spec, here = run_of("damaged"), hospital()
    for request in (Invitation(spec), TrainTask(spec, 1, global_weights(spec))):
        here.ask(request)
    here.stop()
    assert faults(disk_of(here.home), here.sent) == []
    with closing(sqlite3.connect(here.home / "ledger" / "ledger.sqlite")) as database:
        rules = database.execute("SELECT name, sql FROM sqlite_schema WHERE type = 'trigger'")
        drop, make = zip(
            *[(f"DROP TRIGGER {name};", f"{sql};") for name, sql in rules], strict=True
        )
        database.executescript("\n".join([*drop, statement + ";", *make]))
    assert [found for found in faults(disk_of(here.home), here.sent) if fault in found]


def test_a_count_that_is_wrong_is_found(hospital: Any, run_of: Any, global_weights: Any):
    spec, here = run_of("other"), hospital()
    for request in (Invitation(spec), TrainTask(spec, 1, global_weights(spec))):
        here.ask(request)
    disk, sent = disk_of(here.home), here.sent
    once, nothing = cost(STEPS_OF_A_ROUND), dict.fromkeys(disk.remaining, 0)
    other = replace(sent[-1], update=global_weights(spec))
    for wrong, replies, fault in (
        (replace(disk, total=disk.total - once), sent, "the ledger counts"),
        (replace(disk, remaining=nothing), sent, "set aside"),
        (replace(disk, witnesses=disk.witnesses[:3]), sent, "without a witness"),
        (disk, [*sent, other], "2 releases left"),
        (disk, [other], "never booked"),
    ):
        assert faults(disk, sent) == []
        assert [found for found in faults(wrong, replies) if fault in found]
