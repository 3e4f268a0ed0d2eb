"""What a ledger's entries mean: a pure fold over them, which files and databases know nothing of.

Every entry is one of these kinds; the table says what must have come before it:

    opened      the site's ledger begins             nothing; it is the first
    budget      the lifetime budget is set           opened
    admitted    a person takes responsibility for    opened
                a cohort
    approved    a person says yes to a run           opened
    denied      a person says no to a run            opened
    earmarked   a run is set aside whole, one        opened; the run is not closed
                entry for each part of it
    reserved    one attempt at one round: spent      the run is earmarked, and open; earlier
                                                     attempts at the round were the same task
    committed   the attempt was released             its attempt, once; nothing was released
                                                     of its round
    lapsed      a run that nobody asked for any      the run is earmarked, and open
                more is no longer set aside
    closed      the run is over, for good            the run is earmarked, and open or lapsed
    halted      a witness knows of entries that      opened
                are not here: the node stops
    carried     a person signs for what was spent    opened
                elsewhere: the node goes on

Entries are numbered from 1 without a gap, but for ``carried``: it may jump over numbers that a
lost ledger had used. What counts against the budget: every attempt ever reserved, what was
carried, and of each open run the rounds that were set aside and not yet attempted.
"""

from __future__ import annotations

import json
from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, NamedTuple, TypedDict

from common import accounting
from common.accounting import Part, Share, SubsampledGaussian, Unit
from common.errors import LedgerError


class Kind(StrEnum):
    """See the table above."""

    OPENED = "opened"
    BUDGET = "budget"
    ADMITTED = "admitted"
    APPROVED = "approved"
    DENIED = "denied"
    EARMARKED = "earmarked"
    RESERVED = "reserved"
    COMMITTED = "committed"
    LAPSED = "lapsed"
    CLOSED = "closed"
    HALTED = "halted"
    CARRIED = "carried"


class Entry(NamedTuple):
    """One line of the ledger, without what seals it.

    Attributes:
        number: from 1.
        kind: a `Kind`.
        run: digest of the run's spec.
        part: of the run: ``training``.
        round: of an attempt, its round; of an earmark, the number of rounds set aside.
        task: digest of the task.
        sampling_rate, noise_multiplier, steps, unit: the mechanism of one round.
        divergence: carried: a Renyi divergence at the budget's order.
        refers: committed: the number of its attempt.
        nonce: 16 random bytes in hex: the same bookings twice are two entries all the same.
        cohort: digest of the cohort's index.
        release: SHA-256 of the released bytes.
        note: JSON: who, why, and the figures of a person's decision.
        time: when it was written: ISO 8601, UTC, to the millisecond.
    """

    number: int
    kind: str
    run: str = ""
    part: str = ""
    round: int = 0
    task: str = ""
    sampling_rate: float | None = None
    noise_multiplier: float | None = None
    steps: int | None = None
    unit: str = ""
    divergence: float | None = None
    refers: int = 0
    nonce: str = ""
    cohort: str = ""
    release: str = ""
    note: str = "{}"
    time: str = ""

    @property
    def mechanism(self) -> SubsampledGaussian | None:
        """The mechanism of one round, if the entry has one."""
        step = self.step
        return step and _mechanisms({step: self.steps or 0})[0]

    @property
    def step(self) -> Step | None:
        """One step of that mechanism."""
        if self.steps is None:
            return None
        unit: Any = self.unit
        return Step(self.sampling_rate or 0.0, self.noise_multiplier or 0.0, unit)

    @property
    def said(self) -> dict[str, Any]:
        """The note, parsed."""
        parsed: dict[str, Any] = json.loads(self.note)
        return parsed


BOOKED = Entry._fields[: Entry._fields.index("cohort")]
"""The fields that say what was spent, and the nonce; the others tell of it."""


class Step(NamedTuple):
    """One step of a mechanism, by which equal ones are counted together."""

    sampling_rate: float
    noise_multiplier: float
    unit: Unit


class Limit(NamedTuple):
    """A lifetime budget as it was set: (epsilon, delta), filtered at one Renyi order."""

    epsilon: float
    delta: float
    order: float


class Decision(NamedTuple):
    """What a person said of a run; `approval` is the digest of everything that was shown."""

    approved: bool
    approval: str
    by: str
    reason: str
    time: str


@dataclass
class RunBook:
    """What the ledger holds of one run.

    Attributes:
        run_id: the identity that the coordinator gave it.
        name: the run's name, for people.
        synthetic: the images that it mixed in when it was set aside; empty: none.
        state: ``open``, ``lapsed``, ``closed``, or ``""`` before it was set aside.
        shares: what is set aside, by part.
        attempts: (part, round) -> the task, which no later attempt may change.
        attempted: part -> rounds that were attempted at least once.
        numbers: of each attempt's entry -> its part and round.
        released: (part, round) -> the attempt that was released, and the SHA-256 of its bytes.
        steps: what its attempts took: step -> how many.
        begun: when it was first set aside; empty before.
        last: time of its last entry.
    """

    run_id: str = ""
    name: str = ""
    synthetic: str = ""
    state: str = ""
    decision: Decision | None = None
    shares: dict[Part, Share] = field(default_factory=dict)
    attempts: dict[tuple[str, int], str] = field(default_factory=dict)
    attempted: dict[str, int] = field(default_factory=dict)
    numbers: dict[int, tuple[str, int]] = field(default_factory=dict)
    released: dict[tuple[str, int], tuple[int, str]] = field(default_factory=dict)
    steps: dict[Step, int] = field(default_factory=dict)
    begun: str = ""
    last: str = ""

    def spent(self) -> list[SubsampledGaussian]:
        """What its attempts took."""
        return _mechanisms(self.steps)

    def remaining(self, part: Part) -> int:
        """Rounds of `part` that are set aside and were not yet attempted."""
        share = self.shares.get(part)
        if self.state != "open" or share is None:
            return 0
        return max(0, share.rounds - self.attempted.get(part, 0))


class Charge(NamedTuple):
    """One attempt, as the pace of the budget sees it; no step without privacy."""

    time: str
    run: str
    step: Step | None
    steps: int

    @property
    def mechanism(self) -> SubsampledGaussian | None:
        """What it took."""
        return self.step and SubsampledGaussian(
            self.step.sampling_rate, self.step.noise_multiplier, self.steps, self.step.unit
        )


class Book:
    """The state that a list of entries adds up to.

    Attributes:
        site: whose ledger it is.
        limit: the lifetime budget.
        admitted: digest of the cohort that a person takes responsibility for.
        halted: why the node stopped; empty if it did not.
        witnessed: the highest number that a witness knew of which halted the node.
        recovered: number of the last entry by which a person let the node go on after a loss; what
            an older witness saw was signed for there.
        carried: Renyi divergence that was spent elsewhere.
        runs: digest -> what is known of the run.
        charges: every attempt, as it was reserved.
        last: number of the last entry.
    """

    def __init__(self) -> None:
        self.site = ""
        self.limit: Limit | None = None
        self.admitted = ""
        self.halted = ""
        self.witnessed = 0
        self.recovered = 0
        self.carried = 0.0
        self.runs: dict[str, RunBook] = {}
        self.charges: list[Charge] = []
        self.last = 0
        self._steps: dict[Step, int] = {}
        self._latest: list[str] = []
        self._waiting: dict[int, str] = {}

    # --- Reading --------------------------------------------------------------------------------

    def spent(self) -> list[SubsampledGaussian]:
        """Every attempt ever reserved, equal mechanisms counted together."""
        return _mechanisms(self._steps)

    def set_aside(self) -> list[SubsampledGaussian]:
        """What open runs may still take without asking again."""
        return [
            share.mechanism.of_steps(share.mechanism.steps * rounds)
            for run in self.runs.values()
            for part, share in run.shares.items()
            if (rounds := run.remaining(part))
        ]

    def divergence(self, order: float) -> float:
        """The total that counts against the budget: spent, carried and set aside."""
        counted = [*self.spent(), *self.set_aside()]
        return self.carried + sum(accounting.divergence(m, order) for m in counted)

    def run(self, digest: str) -> RunBook:
        """What is known of a run; nothing for one that was never heard of."""
        return self.runs.get(digest, RunBook())

    def open_runs(self) -> list[str]:
        """Digests of the runs that are set aside."""
        return [digest for digest, run in self.runs.items() if run.state == "open"]

    def attempts_of(self, run: str) -> dict[int, tuple[str, int]]:
        """Number of each attempt at a run -> its part and round, released or not."""
        return self.run(run).numbers

    def check_waiting(self, attempt: int) -> None:
        """Check that an attempt was reserved and not yet committed.

        Raises:
            LedgerError: otherwise.
        """
        if attempt not in self._waiting:
            raise LedgerError(f"{attempt} is no attempt that waits to be committed")

    def since(self, time: str) -> list[Charge]:
        """The attempts reserved at `time` or later; the clock may have been put back since."""
        first = bisect_left(self._latest, time)  # nothing before it is as late
        return [charge for charge in self.charges[first:] if charge.time >= time]

    # --- Writing --------------------------------------------------------------------------------

    def apply(self, entry: Entry) -> None:
        """Take one more entry.

        Raises:
            LedgerError: if it cannot follow on what came before; the book is then of no use.
        """
        self._check_number(entry)
        act = _ACTS.get(entry.kind)
        if act is None:
            raise LedgerError(f"entry {entry.number}: kind {entry.kind!r} is not known")
        act(self, entry)
        self.last = entry.number

    def _check_number(self, entry: Entry) -> None:
        opening = entry.kind == Kind.OPENED
        if opening != (self.last == 0):
            raise LedgerError(f"entry {entry.number}: {entry.kind} where the ledger begins or not")
        jumps = opening or entry.kind == Kind.CARRIED
        if entry.number != self.last + 1 and not (jumps and entry.number > self.last):
            raise LedgerError(f"entry {self.last + 1}: missing; {entry.number} follows")

    def _opened(self, entry: Entry) -> None:
        self.site = str(entry.said.get("site", ""))

    def _budget(self, entry: Entry) -> None:
        said = entry.said
        self.limit = Limit(said["epsilon"], said["delta"], said["order"])

    def _admitted(self, entry: Entry) -> None:
        self.admitted = entry.cohort

    def _decided(self, entry: Entry) -> None:
        said = entry.said
        run = self._known(entry)
        yes = entry.kind == Kind.APPROVED
        run.decision = Decision(yes, said["approval"], said["by"], said["reason"], entry.time)

    def _earmarked(self, entry: Entry) -> None:
        run = self._known(entry)
        if run.state == "closed":
            raise LedgerError(f"entry {entry.number}: earmarks a run that is closed")
        run.run_id, run.state = str(entry.said.get("run_id", "")), "open"
        run.synthetic = str(entry.said.get("synthetic", ""))
        run.begun = run.begun or entry.time
        mechanism = entry.mechanism
        if mechanism is not None:
            part: Any = entry.part
            run.shares[part] = Share(part, mechanism, entry.round)

    def _reserved(self, entry: Entry) -> None:
        run = self.runs.get(entry.run)
        if run is None or run.state != "open":
            raise LedgerError(f"entry {entry.number}: an attempt at a run that is not set aside")
        key = entry.part, entry.round
        if run.attempts.get(key, entry.task) != entry.task:
            raise LedgerError(f"entry {entry.number}: another content of round {entry.round}")
        if key not in run.attempts:
            run.attempts[key] = entry.task
            run.attempted[entry.part] = run.attempted.get(entry.part, 0) + 1
        step = entry.step
        if step is not None:
            for counted in (self._steps, run.steps):
                counted[step] = counted.get(step, 0) + (entry.steps or 0)
        run.last = entry.time
        self.charges.append(Charge(entry.time, entry.run, step, entry.steps or 0))
        self._latest.append(max(self._latest[-1], entry.time) if self._latest else entry.time)
        run.numbers[entry.number] = key
        self._waiting[entry.number] = entry.run

    def _committed(self, entry: Entry) -> None:
        if entry.refers not in self._waiting:
            raise LedgerError(f"entry {entry.number}: commits {entry.refers}, no waiting attempt")
        run = self.runs[self._waiting[entry.refers]]
        key = run.numbers[entry.refers]
        if key in run.released:
            raise LedgerError(f"entry {entry.number}: releases round {key[1]} a second time")
        run.released[key] = entry.refers, entry.release
        del self._waiting[entry.refers]

    def _ended(self, entry: Entry) -> None:
        run = self.runs.get(entry.run)
        over = entry.kind == Kind.CLOSED
        if run is None or not (run.state == "open" or (over and run.state == Kind.LAPSED)):
            raise LedgerError(f"entry {entry.number}: ends a run that is not open")
        run.state = entry.kind

    def _halted(self, entry: Entry) -> None:
        self.halted = str(entry.said["reason"])
        self.witnessed = max(self.witnessed, int(entry.said["number"]))

    def _carried(self, entry: Entry) -> None:
        if self.halted or entry.number != self.last + 1:
            self.recovered = entry.number
        self.carried += entry.divergence or 0.0
        self.halted = ""

    def _known(self, entry: Entry) -> RunBook:
        run = self.runs.setdefault(entry.run, RunBook())
        run.name = str(entry.said.get("name", run.name))
        run.last = entry.time
        return run


_ACTS: dict[str, Callable[[Book, Entry], None]] = {
    Kind.OPENED: Book._opened,
    Kind.BUDGET: Book._budget,
    Kind.ADMITTED: Book._admitted,
    Kind.APPROVED: Book._decided,
    Kind.DENIED: Book._decided,
    Kind.EARMARKED: Book._earmarked,
    Kind.RESERVED: Book._reserved,
    Kind.COMMITTED: Book._committed,
    Kind.LAPSED: Book._ended,
    Kind.CLOSED: Book._ended,
    Kind.HALTED: Book._halted,
    Kind.CARRIED: Book._carried,
}


def _mechanisms(steps: Mapping[Step, int]) -> list[SubsampledGaussian]:
    return [SubsampledGaussian(rate, noise, n, unit) for (rate, noise, unit), n in steps.items()]


def book_of(entries: Iterable[Entry]) -> Book:
    """The book of a whole list."""
    book = Book()
    for entry in entries:
        book.apply(entry)
    return book


def note(**said: Any) -> str:
    """A note's canonical JSON."""
    return json.dumps(said, sort_keys=True, separators=(",", ":"))


class Said(TypedDict, total=False):
    """What an entry that sets a run aside says of it: an identity is one run's for good.

    Attributes:
        name: the run's, for people.
        run_id: the identity that the coordinator gave it.
        synthetic: the images that it mixes in, as `client.synthetic.Synthetic` says of them.
    """

    name: str
    run_id: str
    synthetic: str


def aside(said: Said) -> str:
    """The note of an entry that sets a run aside."""
    always: Said = {"name": "", "run_id": ""}
    return note(**(always | said))


def columns(mechanism: SubsampledGaussian | None) -> Mapping[str, Any]:
    """A mechanism as an entry's fields."""
    if mechanism is None:
        return {}
    return {
        "sampling_rate": float(mechanism.sampling_rate),
        "noise_multiplier": float(mechanism.noise_multiplier),
        "steps": mechanism.steps,
        "unit": mechanism.unit,
    }
