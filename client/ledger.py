"""What privacy was spent: written before it is spent, never rewritten, and sealed.

What its entries mean stands in `client.book`, how they lie on the disk in `client.chain`, and what
finds a ledger that was cut off or put back in `client.witness`. What a node may write next is
decided by `client.rules`, and written here in one step with it.

An attempt is *reserved* durably before training and *committed* with the digest of its release
after; a crash in between leaves it reserved, and what is reserved counts as spent. A second
attempt at the same task is a new entry and a new charge. A task that is committed answers with
the same bytes again, from disk, at no cost (`client.kept`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple, Self, Unpack

from client.approval import Asked
from client.book import Book, Entry, Kind, Limit, Said, aside, columns, note
from client.chain import WAY_OUT, Chain, Entries
from client.kept import KeptReleases
from client.keyfile import NodeKey
from client.rules import (
    Allow,
    check_content,
    check_identity,
    check_open,
    check_sound,
    check_unreleased,
    earmarks,
)
from client.witness import Witness, Witnesses, add_witness, check_writable, highest_witnesses
from common import accounting
from common.accounting import Part, Share, SubsampledGaussian
from common.clock import Clock
from common.errors import ConfigError, LedgerError, Refusal, RefusalCode

DATABASE = "ledger.sqlite"


class Signed(NamedTuple):
    """Who decided, and why."""

    by: str
    reason: str


class TaskKey(NamedTuple):
    """What makes two tasks the same: run, part, round, and the digest of all of it."""

    run: str
    part: Part
    round_number: int
    digest: str


@dataclass(frozen=True)
class Attempt:
    """A reserved attempt, by the number of its entry: the right, once, to train and release."""

    number: int
    task: TaskKey


@dataclass(frozen=True)
class Place:
    """Where a ledger lies, and what seals it.

    Attributes:
        folder: holds the database and the kept releases.
        key: the node's.
        witness: the file to which a witness is added after each entry; best on another machine.
        clock: gives the dates.
    """

    folder: Path
    key: NodeKey
    witness: Path | None = None
    clock: Clock = field(default_factory=Clock)

    @property
    def database(self) -> Path:
        """The SQLite file."""
        return self.folder / DATABASE


class Ledger:
    """The ledger at `place`; `create` makes one, the constructor opens it and checks all of it.

    Raises:
        LedgerError: if it is missing, damaged, altered, sealed by another key, or shorter than
            the witness file says; the text has the way out.
    """

    def __init__(self, place: Place) -> None:
        self._connect(place)
        try:
            if not self._chain.catch_up().last:
                raise LedgerError(f"{place.database}: holds no entry; {WAY_OUT}")
            self._chain.check_rules()
            self._check_witness_file()
        except BaseException:
            self._chain.close()
            raise

    @classmethod
    def create(cls, place: Place, *, site: str, by: str = "", first: int = 1) -> Self:
        """Make an empty ledger; its entries are numbered from `first`.

        Raises:
            LedgerError: if there is one already, or a witness knows of one that went beyond
                `first`.
        """
        known = max(_kept(place), default=Witness(0, ""))
        if known.number >= first:
            raise LedgerError(
                f"{place.witness}: knows of a ledger that went to entry {known.number}, and this "
                f"one would begin at {first}; the way on is `cloister node recover`"
            )
        (place.folder / "releases").mkdir(parents=True, exist_ok=True, mode=0o700)
        place.folder.chmod(0o700)
        date = stamp(place.clock.date())
        opened = Entry(first, Kind.OPENED, note=note(site=site, by=by), time=date)
        Chain.create(place.database, place.key, opened)
        made = cls.salvaged(place).ledger
        made.tell()
        made.disconnect()
        return cls(place)

    @classmethod
    def salvaged(cls, place: Place) -> Salvage:
        """As much of a ledger as is whole, whatever a witness says: for an audit or a recovery.

        Raises:
            LedgerError: if there is no database of this version that can be read at all.
        """
        found = cls.__new__(cls)
        found._connect(place)
        try:
            fault = ""
            found._chain.catch_up()
        except LedgerError as error:
            fault = str(error)
        return Salvage(found, found._chain.seen, found._chain.unseen() if fault else 0, fault)

    def disconnect(self) -> None:
        """Let go of the file, so that it can be moved; nothing can be asked of this object then."""
        self._chain.close()

    def _connect(self, place: Place) -> None:
        self._place, self._witnesses = place, Witnesses(place.key)
        self._releases = KeptReleases(place.folder / "releases", place.key)
        self._chain = Chain(place.database, place.key)
        self._untold = False

    # --- Reading --------------------------------------------------------------------------------

    @property
    def book(self) -> Book:
        """Everything booked so far, by any process; to be read only.

        Raises:
            LedgerError: if what was added since is not whole.
        """
        return self._chain.catch_up()

    def entries(self, first: int = -(2**63)) -> Iterator[Entry]:
        """All entries as they lie in the file; those up to the book's last are whole."""
        return (Entry._make(row[:-2]) for row in self._chain.rows(first))

    @property
    def witness(self) -> str:
        """How far this ledger went, sealed: to be kept outside."""
        return self._witnesses.token(Witness(*self._chain.end()))

    def check_witness(self, token: str) -> None:
        """Stop this node if a genuine witness knows of entries that are not here.

        A token that this node never made says nothing: a coordinator cannot stop a node by
        inventing one.

        Raises:
            Refusal: ``malformed`` for a token that this node did not make.
            LedgerError: if the ledger was rolled back or rewritten; it is booked, once, and every
                later request is refused, until a person has recovered it.
        """
        if not token:
            return
        check_sound(self.book)
        reason = self.contradiction(token)
        if reason:
            said = note(reason=reason, witness=token, number=int(token.partition(":")[0]))
            self._write(lambda book: [] if book.halted else [Entry(0, Kind.HALTED, note=said)])
            raise LedgerError(f"{self._place.database}: {reason}; {WAY_OUT}")

    def contradiction(self, token: str) -> str:
        """What is wrong if `token` was once true of this ledger; empty if nothing.

        Raises:
            Refusal: ``malformed`` for a token that this node did not make.
        """
        seen = self._witnesses.parsed(token)
        if seen is None:
            raise Refusal(RefusalCode.MALFORMED, f"not a witness of this node's ledger: {token}")
        return self._contradiction(seen)

    def released(self, task: TaskKey) -> bytes | None:
        """The stored release of this very task, or None if it was never committed.

        Raises:
            Refusal: ``replay``: the round was asked with other content, or the bytes are gone.
        """
        known = self.book.run(task.run)
        check_content(known, *task[1:])
        kept = known.released.get((task.part, task.round_number))
        return None if kept is None else self._releases.get(*kept)

    def mechanism_of(self, task: TaskKey) -> SubsampledGaussian | None:
        """What was booked for the release of this task; None without privacy.

        Raises:
            KeyError: if it was never committed.
        """
        attempt, _ = self.book.run(task.run).released[task.part, task.round_number]
        return next(entry for entry in self.entries(attempt) if entry.number == attempt).mechanism

    # --- Writing --------------------------------------------------------------------------------

    def reserve(
        self,
        task: TaskKey,
        mechanism: SubsampledGaussian | None,
        *,
        cohort: str = "",
        asked: datetime | None = None,
        allow: Allow = lambda _: None,
    ) -> Attempt:
        """Book one attempt durably; from here on it counts as spent, whatever happens.

        No other process can book between what `allow` sees and this booking. It is dated by when
        it was `asked` for (None: now): limits look back on that date, and how long the cohort took
        to load must not be told from them (docs/privacy.md 6).

        Raises:
            Refusal: ``replay``: the round was asked with other content, or the run is over;
                ``approval``: the run was never set aside; ``later``: the task was released
                meanwhile, and is free when it is asked again; or what `allow` raises.
        """
        run, part, number, digest = task
        booked = columns(mechanism)
        date = stamp(asked) if asked else ""
        attempt = Entry(
            0, Kind.RESERVED, run, part, number, digest, cohort=cohort, time=date, **booked
        )

        def entries(book: Book) -> list[Entry]:
            check_open(book, run)
            check_content(book.run(run), part, number, digest)
            check_unreleased(book, run, part, number)
            allow(book)
            return [attempt]

        return Attempt(self._write(entries), task)

    def commit(self, attempt: Attempt, release: bytes) -> None:
        """Keep the release's bytes durably, encrypted, then book it as released.

        Raises:
            Refusal: ``later``, if another attempt at the task was released meanwhile: there is
                one release of a task; ``replay``, if the run was ended meanwhile.
            LedgerError: if there is no such attempt, or it was committed before.
            OSError: if the bytes cannot be kept; the attempt is spent all the same.
        """
        number, (run, part, round_number, _) = attempt.number, attempt.task
        self.book.check_waiting(number)  # before its bytes could be written over
        digest = self._releases.put(number, release)
        done = Entry(0, Kind.COMMITTED, run, refers=number, release=digest)

        def entries(book: Book) -> list[Entry]:
            check_open(book, run)  # a person may have said no meanwhile
            check_unreleased(book, run, part, round_number)
            return [done]

        try:
            self._write(entries)
        except (Refusal, LedgerError):
            self._releases.drop({number})
            raise

    def earmark(
        self,
        run: str,
        shares: Iterable[Share],
        *,
        allow: Allow = lambda _: None,
        **said: Unpack[Said],
    ) -> None:
        """Set a run aside whole, unless just this is set aside already.

        Raises:
            Refusal: ``replay``: the run is over here, or its identity belongs to another spec;
                or what `allow` raises.
        """
        wanted = tuple(shares)

        def entries(book: Book) -> list[Entry]:
            check_identity(book, run, said.get("run_id", ""))
            return earmarks(book, run, wanted, aside(said), allow)

        self._write(entries)

    def approve(self, asked: Asked, signed: Signed, *, allow: Allow = lambda _: None) -> None:
        """Book a person's yes to just what was asked, and set the run aside: both, or neither.

        Raises:
            Refusal: as `earmark`; nothing is booked then.
        """
        run, said = asked.spec.digest, asked.said
        yes = note(approval=asked.digest, name=asked.spec.name, **signed._asdict())

        def entries(book: Book) -> list[Entry]:
            check_identity(book, run, asked.spec.run_id)
            held = earmarks(book, run, asked.shares, aside(said), allow)
            return [Entry(0, Kind.APPROVED, run, note=yes), *held]

        self._write(entries)

    def decide(
        self, run: str, *, approved: bool, approval: str, signed: Signed, name: str = ""
    ) -> None:
        """Book what a person said of a run, and of what exactly (`approval`, a digest)."""
        kind = Kind.APPROVED if approved else Kind.DENIED
        said = note(approval=approval, name=name, **signed._asdict())
        self._write(lambda _: [Entry(0, kind, run, note=said)])

    def admit(self, cohort: str, signed: Signed) -> None:
        """Book that a person takes responsibility for the cohort with this digest."""
        said = _signed(signed)
        self._write(lambda _: [Entry(0, Kind.ADMITTED, cohort=cohort, note=said)])

    def set_budget(self, limit: Limit, signed: Signed) -> None:
        """Book the lifetime budget.

        Raises:
            LedgerError: if something is spent already and delta or order would change: a filter
                holds at the order that was fixed before.
            ConfigError: if more counts already than the new epsilon: the statement that it makes
                of the past would be false.
        """
        said = note(**limit._asdict(), **signed._asdict())

        def entries(book: Book) -> list[Entry]:
            old = book.limit
            if old and (book.charges or book.carried) and old[1:] != limit[1:]:
                raise LedgerError(
                    f"the budget counts at delta {old.delta} and order {old.order}, and "
                    "something is spent: only epsilon can still be changed; write "
                    f"delta = {old.delta} and order = {old.order} in node.toml, [budget]"
                )
            counted = accounting.epsilon_of(book.divergence(limit.order), limit.delta, limit.order)
            if counted > limit.epsilon:
                raise ConfigError(
                    f"epsilon = {limit.epsilon:g}: {counted:.3f} is spent or set aside already; "
                    "write at least that (open runs can be ended with `cloister node close`). To "
                    "take part in nothing more, leave limits.operators empty"
                )
            return [Entry(0, Kind.BUDGET, note=said)]

        self._write(entries)

    def carry(self, divergence: float, signed: Signed, *, after: int = 0) -> None:
        """Book what was spent outside of this ledger, and go on after entry number `after`.

        A halt ends here; the next number is beyond what the witness knew of that halted the node.

        Args:
            divergence: a Renyi divergence at the budget's order.
            signed: who takes responsibility, and why.
            after: the highest number that a lost ledger is known to have used.

        Raises:
            LedgerError: if it is no number of at least 0, or there is no budget whose order says
                what it means.
        """
        if not (math.isfinite(divergence) and divergence >= 0):
            raise LedgerError(f"carried: {divergence}; expected a divergence of at least 0")
        carried = Entry(0, Kind.CARRIED, divergence=float(divergence), note=_signed(signed))

        def entries(book: Book) -> list[Entry]:
            if divergence and book.limit is None:
                raise LedgerError(
                    "carried: no budget is set that says at which order; set it first"
                )
            return [carried._replace(number=max(after, book.last, book.witnessed) + 1)]

        self._write(entries)

    def lapse(self, run: str) -> None:
        """Take back what is set aside for a run, and drop its kept releases.

        It may be set aside again.
        """
        self._end(run, Entry(0, Kind.LAPSED, run), "open")
        self.prune(run)

    def close(self, run: str, signed: Signed) -> None:
        """Take back what is set aside for a run, for good, and drop its kept releases."""
        self._end(run, Entry(0, Kind.CLOSED, run, note=_signed(signed)), "open", Kind.LAPSED)
        self.prune(run)

    def _end(self, run: str, entry: Entry, *states: str) -> None:
        self._write(lambda book: [entry] if book.run(run).state in states else [])

    def prune(self, run: str, *, keep: int = 0) -> None:
        """Drop the stored bytes of a run; of its training, all but the `keep` newest releases.

        The bookings stay. A coordinator that is past a round has its release; one that asks again
        is refused.
        """
        book = self.book
        released = book.run(run).released.items()
        trained = sorted(number for (part, _), (number, _) in released if part == "training")
        oldest = min(trained[-keep:], default=0) if keep else None
        self._releases.drop(
            {
                number
                for number, (part, _) in book.attempts_of(run).items()
                if oldest is None or (part == "training" and number < oldest)
            }
        )

    # --- Within ---------------------------------------------------------------------------------

    def _write(self, entries: Entries) -> int:
        """Append what `entries` makes of the book, alone and durably; the last one's number."""

        def dated(book: Book) -> list[Entry]:
            date = stamp(self._place.clock.date())
            return [entry._replace(time=entry.time or date) for entry in entries(book)]

        if self._place.witness is not None:  # a booking that cannot be told of would be wasted
            check_writable(self._place.witness)
        if self._untold:
            self.tell()
        last = self._chain.book(dated)
        if last:
            self.tell()
        return last

    def tell(self) -> None:
        """Add the newest witness to the witness file.

        Raises:
            LedgerError: if it cannot be written.
        """
        if self._place.witness is not None:
            self._untold = True
            add_witness(self._place.witness, self.witness)
            self._untold = False

    def _check_witness_file(self) -> None:
        if self._place.witness is None:
            return
        seen = max(_kept(self._place), default=None)
        if seen is None:
            raise LedgerError(
                f"{self._place.witness}: holds no witness of this ledger; put the file back; "
                f"{WAY_OUT}"
            )
        reason = self._contradiction(seen)
        if reason:
            raise LedgerError(f"{self._place.database}: {reason}; {WAY_OUT}")
        if seen.number < self.book.last:
            self.tell()  # a crash came between booking and telling

    def _contradiction(self, seen: Witness) -> str:
        """What is wrong if `seen` was once true of this ledger; empty if nothing."""
        book = self.book
        if seen.number <= book.recovered:
            return ""  # a person has signed for what it knows of
        if seen.number > book.last:
            return (
                f"ends at entry {book.last}, but a witness has seen entry {seen.number}: "
                "it was cut off or put back"
            )
        if self._chain.head_at(seen.number) in (None, seen.head):
            return ""  # none: of a ledger before this one, which began after it
        return f"entry {seen.number} is not the one a witness saw"


class Salvage(NamedTuple):
    """What can be relied on of a ledger that may be damaged.

    Attributes:
        ledger: open; where there is a fault, nothing can be booked in it.
        book: of the entries before the first that is not whole.
        unread: how many entries lie in the file from there on.
        fault: what is wrong with that one; empty if the chain is whole.
    """

    ledger: Ledger
    book: Book
    unread: int
    fault: str


def _kept(place: Place) -> list[Witness]:
    """The newest genuine witnesses of the witness file, if there is one."""
    if place.witness is None:
        return []
    return highest_witnesses(place.witness, place.key)


def _signed(signed: Signed) -> str:
    return note(**signed._asdict())


def stamp(date: datetime) -> str:
    """A date as entries carry it: the texts of two dates sort as they do."""
    return date.astimezone(UTC).isoformat(timespec="milliseconds")
