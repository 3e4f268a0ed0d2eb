"""What privacy was spent: written before it is spent, never rewritten, and sealed.

One SQLite file a site, in WAL mode with ``synchronous=FULL``; what its entries mean stands in
`client.book`. Each entry carries two values under the node's key:

``head``  a MAC over the head before it and everything that was booked. It is the *witness* that a
          node shows: whoever keeps one can later ask whether this ledger still leads there.
``seal``  a MAC over the seal before it, the whole entry (who, why, when, which bytes) and the
          head.

So an edit, a deletion or an insertion by someone without the key is found at the entry where it
was made. Entries cut off at the end are found by a witness outside this file: the node writes one
to its witness file after each entry, and the coordinator gives back the last one that it saw. A
whole machine that is put back in time is found by a witness outside the machine alone.

An attempt is *reserved* durably before training and *committed* with the digest of its release
after; a crash in between leaves it reserved, and what is reserved counts as spent. A second
attempt at the same task is a new entry and a new charge. A task that is committed answers with
the same bytes again, from disk, at no cost. Kept releases are encrypted (AES-256-GCM).
"""

from __future__ import annotations

import gc
import hmac
import os
import sqlite3
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from hashlib import blake2b, sha256
from pathlib import Path
from typing import Any, NamedTuple, Self

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from client.approval import Asked
from client.book import BOOKED, Book, Entry, Kind, Limit, RunBook, columns, note
from client.keyfile import NodeKey
from common.accounting import Part, Share, SubsampledGaussian
from common.clock import Clock
from common.errors import LedgerError, Refusal, RefusalCode
from common.files import flush_folder, write_durably

DATABASE = "ledger.sqlite"
FORMAT = 2
_FIELDS = (*Entry._fields, "head", "seal")
_SCHEMA = f"""
CREATE TABLE entry (
    number INTEGER PRIMARY KEY, kind TEXT NOT NULL, run TEXT NOT NULL, part TEXT NOT NULL,
    round INTEGER NOT NULL, task TEXT NOT NULL, sampling_rate REAL, noise_multiplier REAL,
    steps INTEGER, unit TEXT NOT NULL, divergence REAL, refers INTEGER NOT NULL,
    cohort TEXT NOT NULL, release TEXT NOT NULL, note TEXT NOT NULL, time TEXT NOT NULL,
    head TEXT NOT NULL, seal TEXT NOT NULL
);
CREATE TRIGGER entry_stays BEFORE UPDATE ON entry
    BEGIN SELECT RAISE(ABORT, 'the ledger is append only'); END;
CREATE TRIGGER entry_kept BEFORE DELETE ON entry
    BEGIN SELECT RAISE(ABORT, 'the ledger is append only'); END;
CREATE TRIGGER entry_new BEFORE INSERT ON entry
    WHEN EXISTS (SELECT 1 FROM entry WHERE number >= NEW.number)
    BEGIN SELECT RAISE(ABORT, 'the ledger is append only'); END;
PRAGMA user_version = {FORMAT};
"""  # noqa: S608 - no value of anybody is in it
_READ = f"SELECT {', '.join(_FIELDS)} FROM entry WHERE number > ? ORDER BY number"  # noqa: S608
_WRITE = f"INSERT INTO entry VALUES ({', '.join('?' * len(_FIELDS))})"  # noqa: S608
_BOOKED, _BEGIN = len(BOOKED), "0" * 64
_SEALED_FILE = b"CLREL1"
_NONCE = 12

Allow = Callable[[Book], None]
"""Raises a Refusal if what the book says leaves no room."""


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


class Witness(NamedTuple):
    """How far a ledger went: the number of its last entry, and the head there."""

    number: int
    head: str


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
        self._open(place)
        self._check_witness_file()

    @classmethod
    def create(cls, place: Place, *, site: str, by: str = "", first: int = 1) -> Self:
        """Make an empty ledger; its entries are numbered from `first`.

        Raises:
            LedgerError: if there is one already.
        """
        (place.folder / "releases").mkdir(parents=True, exist_ok=True, mode=0o700)
        place.folder.chmod(0o700)
        if place.database.exists():
            raise LedgerError(
                f"{place.database}: there is a ledger already; it is never written over"
            )
        date = stamp(place.clock.date())
        opened = Entry(first, Kind.OPENED, note=note(site=site, by=by), time=date)
        head = _mac(place.key.derive("ledger head"), _BEGIN, opened[:_BOOKED])
        seal = _mac(place.key.derive("ledger seal"), _BEGIN, (*opened, head))
        _lay_down(place.database, (*opened, head, seal))
        made = cls.__new__(cls)
        made._open(place)
        made.tell()
        return made

    @classmethod
    def salvaged(cls, place: Place) -> Salvage:
        """As much of a ledger as is whole, whatever a witness says: for an audit or a recovery.

        Raises:
            LedgerError: if there is no database of this version that can be read at all.
        """
        found = cls.__new__(cls)
        found._connect(place)
        try:
            found._catch_up()
        except LedgerError as error:
            return Salvage(found, found._book, found._unread(), str(error))
        return Salvage(found, found._book, 0, "")

    def disconnect(self) -> None:
        """Let go of the file, so that it can be moved; nothing can be asked of this object then."""
        self._database.close()

    def _open(self, place: Place) -> None:
        self._connect(place)
        self._catch_up()
        if not self._book.last:
            raise LedgerError(f"{place.database}: holds no entry; {WAY_OUT}")

    def _unread(self) -> int:
        """Entries in the file after the last that is whole, as far as it can be counted."""
        counting = "SELECT count(*) FROM entry WHERE number > ?"
        try:
            (found,) = self._database.execute(counting, (self._book.last,)).fetchone()
        except sqlite3.Error:
            return 0
        return int(found)

    def _connect(self, place: Place) -> None:
        self._place, key = place, place.key
        self._head_key, self._seal_key = (
            key.derive("ledger head"),
            key.derive("ledger seal"),
        )
        self._witness_key = key.derive(_WITNESS)
        self._releases = AESGCM(key.derive("release at rest"))
        self._database = _connect(place.database)
        self._file = _identity(place.database)
        self._book, self._head, self._seal = Book(), _BEGIN, _BEGIN

    # --- Reading --------------------------------------------------------------------------------

    @property
    def book(self) -> Book:
        """Everything booked so far, by any process; to be read only.

        Raises:
            LedgerError: if what was added since is not whole.
        """
        self._catch_up()
        return self._book

    def entries(self) -> Iterator[Entry]:
        """All entries, from the first; they were checked when the ledger was opened."""
        rows = self._database.execute(_READ, (0,))
        return (Entry._make(row[:-2]) for row in rows)

    @property
    def witness(self) -> str:
        """How far this ledger went, sealed: to be kept outside."""
        self._catch_up()
        return _token(self._witness_key, Witness(self._book.last, self._head))

    def check_witness(self, token: str) -> None:
        """Stop this node if a genuine witness knows of entries that are not here.

        A token that this node never made says nothing: a coordinator cannot stop a node by
        inventing one.

        Raises:
            Refusal: ``malformed`` for a token that this node did not make.
            LedgerError: if the ledger was rolled back or rewritten; it is booked, and every later
                request is refused, until a person has recovered it.
        """
        if not token:
            return
        check_sound(self.book)  # booked once, however often it is asked
        reason = self.contradiction(token)
        if reason:
            self._write(lambda _: [Entry(0, Kind.HALTED, note=note(reason=reason, witness=token))])
            raise LedgerError(f"{self._place.database}: {reason}; {WAY_OUT}")

    def contradiction(self, token: str) -> str:
        """What is wrong if `token` was once true of this ledger; empty if nothing.

        Raises:
            Refusal: ``malformed`` for a token that this node did not make.
        """
        seen = _parsed(self._witness_key, token)
        if seen is None:
            raise Refusal(RefusalCode.MALFORMED, f"not a witness of this node's ledger: {token}")
        return self._contradiction(seen)

    def released(self, task: TaskKey) -> bytes | None:
        """The stored release of this very task, or None if it was never committed.

        Raises:
            Refusal: ``replay``: the round was asked with other content, or the bytes are gone.
        """
        known = self.book.run(task.run)
        _check_content(known, task)
        kept = known.released.get((task.part, task.round_number))
        return None if kept is None else self._stored(*kept)

    # --- Writing --------------------------------------------------------------------------------

    def reserve(
        self,
        task: TaskKey,
        mechanism: SubsampledGaussian | None,
        *,
        cohort: str = "",
        allow: Allow = lambda _: None,
    ) -> Attempt:
        """Book one attempt durably; from here on it counts as spent, whatever happens.

        No other process can book between what `allow` sees and this booking.

        Raises:
            Refusal: ``replay``: the round was asked with other content, or the run is over;
                ``approval``: the run was never set aside; or what `allow` raises.
        """
        run, part, number, digest = task
        booked = columns(mechanism)
        attempt = Entry(0, Kind.RESERVED, run, part, number, digest, cohort=cohort, **booked)

        def entries(book: Book) -> list[Entry]:
            check_open(book, run)
            _check_content(book.run(run), task)
            allow(book)
            return [attempt]

        return Attempt(self._write(entries), task)

    def commit(self, attempt: Attempt, release: bytes) -> None:
        """Keep the release's bytes durably, encrypted, then book it as released."""
        digest = sha256(release).hexdigest()
        nonce = os.urandom(_NONCE)
        sealed = self._releases.encrypt(nonce, release, _label(attempt.number, digest))
        write_durably(self._path(attempt.number), _SEALED_FILE + nonce + sealed)
        done = Entry(0, Kind.COMMITTED, attempt.task.run, refers=attempt.number, release=digest)
        self._write(lambda _: [done])

    def earmark(
        self,
        run: str,
        shares: Iterable[Share],
        *,
        name: str = "",
        run_id: str = "",
        allow: Allow = lambda _: None,
    ) -> None:
        """Set a run aside whole, unless just this is set aside already.

        Raises:
            Refusal: ``replay``: the run is over here, or its identity belongs to another spec;
                or what `allow` raises.
        """
        wanted, said = tuple(shares), note(name=name, run_id=run_id)

        def entries(book: Book) -> list[Entry]:
            _check_identity(book, run, run_id)
            return _earmarks(book, run, wanted, said, allow)

        self._write(entries)

    def approve(self, asked: Asked, signed: Signed, *, allow: Allow = lambda _: None) -> None:
        """Book a person's yes to just what was asked, and set the run aside: both, or neither.

        Raises:
            Refusal: as `earmark`; nothing is booked then.
        """
        run, name, run_id = asked.spec.digest, asked.spec.name, asked.spec.run_id
        yes = note(approval=asked.digest, name=name, **signed._asdict())

        def entries(book: Book) -> list[Entry]:
            _check_identity(book, run, run_id)
            said = note(name=name, run_id=run_id)
            aside = _earmarks(book, run, asked.shares, said, allow)
            return [Entry(0, Kind.APPROVED, run, note=yes), *aside]

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
        said = note(**signed._asdict())
        self._write(lambda _: [Entry(0, Kind.ADMITTED, cohort=cohort, note=said)])

    def set_budget(self, limit: Limit, signed: Signed) -> None:
        """Book the lifetime budget.

        Raises:
            LedgerError: if something is spent already and delta or order would change: a filter
                holds at the order that was fixed before.
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
            return [Entry(0, Kind.BUDGET, note=said)]

        self._write(entries)

    def carry(self, divergence: float, signed: Signed, *, after: int = 0) -> None:
        """Book what was spent outside of this ledger, and go on after entry number `after`."""
        said = note(**signed._asdict())
        entry = Entry(0, Kind.CARRIED, divergence=float(divergence), note=said)
        self._write(lambda book: [entry._replace(number=max(after, book.last) + 1)])

    def lapse(self, run: str) -> None:
        """Take back what is set aside for a run; it may be set aside again."""
        self._end(run, Entry(0, Kind.LAPSED, run))

    def close(self, run: str, signed: Signed) -> None:
        """Take back what is set aside for a run, for good, and drop its kept releases."""
        self._end(run, Entry(0, Kind.CLOSED, run, note=note(**signed._asdict())))
        self.prune(run)

    def _end(self, run: str, entry: Entry) -> None:
        self._write(lambda book: [entry] if book.run(run).state == "open" else [])

    def prune(self, run: str, *, before_round: int | None = None) -> None:
        """Drop the stored bytes of a run (or of its earlier rounds); the bookings stay.

        A coordinator that is past a round has its release; one that asks again is refused.
        """
        attempts = self.book.attempts_of(run)
        for path in (self._place.folder / "releases").glob("*.sealed"):
            number = attempts.get(int(path.stem))
            if number is not None and (before_round is None or number < before_round):
                path.unlink(missing_ok=True)

    # --- Within ---------------------------------------------------------------------------------

    def _write(self, entries: Callable[[Book], list[Entry]]) -> int:
        """Append what `entries` makes of the book, alone and durably; the last one's number."""
        self._database.execute("BEGIN IMMEDIATE")
        seen = -1
        try:
            self._catch_up()
            seen = self._book.last
            for entry in entries(self._book):
                self._append(entry)
            self._database.execute("COMMIT")
        except BaseException:
            self._database.execute("ROLLBACK")
            if self._book.last != seen:
                self._book, self._head, self._seal = (
                    Book(),
                    _BEGIN,
                    _BEGIN,
                )  # read again what is on disk
            raise
        if self._book.last != seen:
            self.tell()
        return self._book.last

    def _append(self, entry: Entry) -> None:
        number = max(entry.number, self._book.last + 1)
        whole = entry._replace(number=number, time=stamp(self._place.clock.date()))
        head = _mac(self._head_key, self._head, whole[:_BOOKED])
        seal = _mac(self._seal_key, self._seal, (*whole, head))
        row = (*whole, head, seal)
        self._database.execute(_WRITE, row)
        self._take(row)

    def _catch_up(self) -> None:
        """Check and take the entries that this process has not seen yet."""
        if _identity(self._place.database) != self._file:
            raise LedgerError(
                f"{self._place.database}: another file lies there than this process opened; "
                "start the node again, and have nothing else move its ledger"
            )
        try:
            with _uncollected():
                for row in self._database.execute(_READ, (self._book.last,)):
                    self._take(row)
        except (sqlite3.Error, UnicodeError) as error:
            raise LedgerError(f"{self._place.database}: damaged ({error}); {WAY_OUT}") from error

    def _take(self, row: tuple[Any, ...]) -> None:
        """Check one entry against the chain, and apply it."""
        try:
            if row[-1] != _mac(self._seal_key, self._seal, row[:-1]):
                raise LedgerError(
                    f"entry {row[0]} is not as this node wrote it, or one before it is gone"
                )
            self._book.apply(Entry._make(row[:-2]))
        except (LedgerError, KeyError, TypeError, ValueError) as error:
            raise LedgerError(f"{self._place.database}: {error}; {WAY_OUT}") from error
        self._head, self._seal = row[-2:]

    def tell(self) -> None:
        """Add the newest witness to the witness file.

        Raises:
            LedgerError: if it cannot be written.
        """
        if self._place.witness is None:
            return
        try:
            descriptor = os.open(self._place.witness, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
            try:
                os.write(descriptor, f"{self.witness}\n".encode())
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        except OSError as error:
            raise LedgerError(
                f"{self._place.witness}: the witness cannot be written ({error}); mend the disk or "
                "the mount, or name another file in node.toml, [ledger] witness"
            ) from error

    def _check_witness_file(self) -> None:
        if self._place.witness is None:
            return
        tokens = last_witnesses(self._place.witness)
        seen = genuine(self._place.key, tokens)
        if not seen:
            raise LedgerError(
                f"{self._place.witness}: holds no witness of this ledger; put the file back; "
                f"{WAY_OUT}"
            )
        reason = self._contradiction(max(seen))
        if reason:
            raise LedgerError(f"{self._place.database}: {reason}; {WAY_OUT}")

    def _contradiction(self, seen: Witness) -> str:
        """What is wrong if `seen` was once true of this ledger; empty if nothing."""
        self._catch_up()
        if seen.number > self._book.last:
            return (
                f"ends at entry {self._book.last}, but a witness has seen entry {seen.number}: "
                "it was cut off or put back"
            )
        row = self._database.execute(
            "SELECT head FROM entry WHERE number = ?", (seen.number,)
        ).fetchone()
        if row is None:
            return ""  # before the ledger was recovered
        return "" if row[0] == seen.head else f"entry {seen.number} is not the one a witness saw"

    def _path(self, attempt: int) -> Path:
        return self._place.folder / "releases" / f"{attempt:08d}.sealed"

    def _stored(self, attempt: int, digest: str) -> bytes:
        try:
            content = self._path(attempt).read_bytes()
        except FileNotFoundError:
            raise Refusal(RefusalCode.REPLAY, "that release is no longer kept") from None
        start = len(_SEALED_FILE)
        nonce, sealed = content[start : start + _NONCE], content[start + _NONCE :]
        try:
            return self._releases.decrypt(nonce, sealed, _label(attempt, digest))
        except (InvalidTag, ValueError):
            raise Refusal(RefusalCode.REPLAY, "the stored release is damaged") from None


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


WAY_OUT = (
    "this node stops. Look with `cloister node audit`; put the true file back from a copy, or "
    "sign for what was spent with `cloister node recover`"
)


def check_open(book: Book, run: str) -> None:
    """Refuse an attempt at a run that is not set aside.

    Raises:
        Refusal: ``replay`` if it is over, ``approval`` if it never was set aside, or lapsed.
        LedgerError: if the node was halted.
    """
    check_sound(book)
    state = book.run(run).state
    if state == Kind.CLOSED:
        raise Refusal(RefusalCode.REPLAY, "the run is over at this site")
    if state != "open":
        raise Refusal(RefusalCode.APPROVAL, "the run is not set aside at this site; invite first")


def check_sound(book: Book) -> None:
    """Refuse everything after a halt.

    Raises:
        LedgerError: if the node was halted.
    """
    if book.halted:
        raise LedgerError(f"halted: {book.halted}; {WAY_OUT}")


def genuine(key: NodeKey, tokens: Iterable[str]) -> list[Witness]:
    """Those of `tokens` that the node with this key made, as they were read."""
    derived = key.derive(_WITNESS)
    return [witness for token in tokens if (witness := _parsed(derived, token))]


def last_witnesses(path: Path, most: int = 100) -> list[str]:
    """The last lines of a witness file; none if it is not there or cannot be read."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - most * 160))
            return file.read().decode("ascii", "replace").splitlines()[-most:]
    except OSError:
        return []


@contextmanager
def _uncollected() -> Iterator[None]:
    """Without the collection of cycles: looking for them is half the time of a long ledger."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _lay_down(path: Path, first: tuple[Any, ...]) -> None:
    """Make the database with its first entry, whole or not at all."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    partial.unlink(missing_ok=True)
    partial.touch(mode=0o600)
    with closing(sqlite3.connect(partial)) as database:
        database.executescript(_SCHEMA)
        database.execute(_WRITE, first)
        database.commit()
    partial.replace(path)
    flush_folder(path.parent)


def _identity(path: Path) -> tuple[int, int] | None:
    """Which file it is; a copy that is put in its place is another."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _connect(path: Path) -> sqlite3.Connection:
    if not path.is_file():
        raise LedgerError(f"{path}: the ledger is missing; {WAY_OUT}")
    try:
        database = sqlite3.connect(path, timeout=60, isolation_level=None)
        database.execute("PRAGMA journal_mode=WAL")
        database.execute("PRAGMA synchronous=FULL")
        (version,) = database.execute("PRAGMA user_version").fetchone()
    except sqlite3.Error as error:
        raise LedgerError(f"{path}: damaged ({error}); {WAY_OUT}") from error
    if version != FORMAT:
        raise LedgerError(f"{path}: format {version}, this version reads {FORMAT}; {WAY_OUT}")
    return database


_BETWEEN = "\x1f"
_WITNESS = "ledger witness"


def _token(key: bytes, witness: Witness) -> str:
    mac = _mac(key, witness.head, (witness.number,))
    return f"{witness.number}:{witness.head}:{mac}"


def _parsed(key: bytes, token: str) -> Witness | None:
    """The witness in a token; None unless it was made with this key."""
    number, _, rest = token.partition(":")
    if not number.isascii() or not number.isdecimal():
        return None
    witness = Witness(int(number), rest.partition(":")[0])
    made = hmac.compare_digest(_token(key, witness).encode(), token.encode())
    return witness if made else None


def _mac(key: bytes, before: str, values: tuple[Any, ...]) -> str:
    """Keyed BLAKE2b (RFC 7693) over the head before and the values, 256 bits in hex.

    No two lists of values read the same: none may hold what stands between them.

    Raises:
        ValueError: if one does.
    """
    text = _BETWEEN.join([before, *map(str, values)])
    if text.count(_BETWEEN) != len(values):
        raise ValueError(f"a value holds {_BETWEEN!r}")
    return blake2b(text.encode(), key=key, digest_size=32).hexdigest()


def _label(attempt: int, digest: str) -> bytes:
    """Binds kept bytes to their attempt: none can stand in for another."""
    return f"{attempt} {digest}".encode()


def _check_content(run: RunBook, task: TaskKey) -> None:
    number = task.round_number
    if run.attempts.get((task.part, number), task.digest) != task.digest:
        raise Refusal(RefusalCode.REPLAY, f"round {number} was asked with other content")


def _earmarks(
    book: Book, run: str, wanted: tuple[Share, ...], said: str, allow: Allow
) -> list[Entry]:
    """What sets a run aside; nothing if just this is set aside already."""
    known = book.run(run)
    if known.state == Kind.CLOSED:
        raise Refusal(RefusalCode.REPLAY, "the run is over at this site")
    if known.state == "open" and tuple(known.shares.values()) == wanted:
        return []
    allow(book)
    if not wanted:
        return [Entry(0, Kind.EARMARKED, run, note=said)]
    return [
        Entry(0, Kind.EARMARKED, run, part, rounds, note=said, **columns(mechanism))
        for part, mechanism, rounds in wanted
    ]


def _check_identity(book: Book, run: str, run_id: str) -> None:
    if run_id and any(
        known.run_id == run_id and digest != run for digest, known in book.runs.items()
    ):
        raise Refusal(RefusalCode.REPLAY, f"run {run_id!r} was another one here before")


def stamp(date: datetime) -> str:
    """A date as entries carry it: the texts of two dates sort as they do."""
    return date.astimezone(UTC).isoformat(timespec="milliseconds")
