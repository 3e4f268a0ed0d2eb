"""Sealed entries in one SQLite file: each is chained to the last, and found whole or refused.

WAL mode with ``synchronous=FULL``: what was booked is on the disk when `Chain.book` returns.
Each entry carries two values under the node's key:

``head``  a MAC over the head before it and everything that was booked. It is the *witness* that a
          node shows: whoever keeps one can later ask whether this ledger still leads there.
``seal``  a MAC over the seal before it, the whole entry (who, why, when, which bytes) and the
          head.

So an edit, a deletion or an insertion by someone without the key is found at the entry where it
was made. Entries cut off at the end are not: that takes a witness (`client.witness`).
"""

from __future__ import annotations

import gc
import os
import secrets
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from hashlib import blake2b
from pathlib import Path
from threading import RLock
from typing import Any

from client.book import BOOKED, Book, Entry
from client.keyfile import NodeKey
from common.errors import LedgerError
from common.files import flush_folder

WAY_OUT = (
    "this node stops. Look with `cloister node audit`; put the true file back from a copy, or "
    "sign for what was spent with `cloister node recover`"
)
UNWRITABLE = "cannot be written"
_MEND = "see that the disk has room, that this user may write there, and that it is not read-only"
PATIENCE = 60.0
"""Seconds that a process waits for another's booking."""

FORMAT = 2
_FIELDS = (*Entry._fields, "head", "seal")
_SCHEMA = f"""
CREATE TABLE entry (
    number INTEGER PRIMARY KEY, kind TEXT NOT NULL, run TEXT NOT NULL, part TEXT NOT NULL,
    round INTEGER NOT NULL, task TEXT NOT NULL, sampling_rate REAL, noise_multiplier REAL,
    steps INTEGER, unit TEXT NOT NULL, divergence REAL, refers INTEGER NOT NULL,
    nonce TEXT NOT NULL, cohort TEXT NOT NULL, release TEXT NOT NULL, note TEXT NOT NULL,
    time TEXT NOT NULL,
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
_RULES = "SELECT type, name, sql FROM sqlite_schema WHERE name NOT LIKE 'sqlite_%' ORDER BY name"
_BOOKED, _BEGIN = len(BOOKED), "0" * 64
_NONCE_BYTES = 16
_FULL_OR_READ_ONLY = (sqlite3.SQLITE_READONLY, sqlite3.SQLITE_FULL)

Entries = Callable[[Book], list[Entry]]
"""What is to be booked, seeing everything booked before; the number 0 stands for the next."""


class Chain:
    """The entries in the file at `path`, and the book that they add up to.

    Any thread may use it, one at a time; any number of processes may have the file open.

    Raises:
        LedgerError: if the file is missing, no database, or of another format; the text has the
            way out. Opening checks no entry: `catch_up` does.
    """

    def __init__(self, path: Path, key: NodeKey) -> None:
        self._path = path
        self._keys = _Keys(key)
        self._lock = RLock()
        self._database = _connect(path)
        self._file = _identity(path)
        self._book, self._head, self._seal = Book(), _BEGIN, _BEGIN

    @classmethod
    def create(cls, path: Path, key: NodeKey, first: Entry) -> None:
        """Make the file with its first entry, whole or not at all.

        Raises:
            LedgerError: if there is one already, or something of one.
        """
        left_over = [path.with_name(path.name + end) for end in ("", "-wal", "-journal")]
        for found in filter(Path.exists, left_over):
            raise LedgerError(
                f"{found}: there is a ledger already; it is never written over. If it is to be "
                "given up, sign for what was spent with `cloister node recover`"
            )
        partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
        partial.unlink(missing_ok=True)
        partial.touch(mode=0o600)
        try:
            with closing(sqlite3.connect(partial)) as database:
                database.execute("PRAGMA journal_mode=WAL")  # from now on; opening changes nothing
                database.executescript(_SCHEMA)
                database.execute(_WRITE, _Keys(key).sealed(first, _BEGIN, _BEGIN))
                database.commit()
            os.link(partial, path)  # unlike a rename, this never takes another's place
        except FileExistsError:
            raise LedgerError(f"{path}: another process made a ledger in this moment") from None
        finally:
            partial.unlink()
        flush_folder(path.parent)

    def close(self) -> None:
        """Let go of the file; nothing can be asked of this object then."""
        self._database.close()

    # --- Reading --------------------------------------------------------------------------------

    @property
    def seen(self) -> Book:
        """What was found whole so far."""
        return self._book

    def end(self) -> tuple[int, str]:
        """The number of the last entry, and the head there."""
        with self._lock:
            return self.catch_up().last, self._head

    def unseen(self) -> int:
        """Entries that lie in the file after the last that was found whole, if it can be read."""
        counting = "SELECT count(*) FROM entry WHERE number > ?"
        try:
            (found,) = self._database.execute(counting, (self._book.last,)).fetchone()
        except (sqlite3.Error, UnicodeError):
            return 0
        return int(found)

    def catch_up(self) -> Book:
        """Check and take the entries that this process has not seen yet.

        Raises:
            LedgerError: naming the first that is not as this node wrote it.
        """
        with self._lock:
            if _identity(self._path) != self._file:
                raise LedgerError(
                    f"{self._path}: another file lies there than this process opened; start the "
                    "node again, and have nothing else move its ledger"
                )
            try:
                with _uncollected():
                    for row in self._database.execute(_READ, (self._book.last,)):
                        self._take(row)
            except (sqlite3.Error, UnicodeError) as error:
                what = f"damaged after entry {self._book.last}"
                raise _unreadable(self._path, what, error) from error
            except BaseException as error:
                if not isinstance(error, LedgerError):  # interrupted between two steps
                    self._begin_again()
                raise
            return self._book

    def check_rules(self) -> None:
        """Check that the database still refuses to forget.

        Raises:
            LedgerError: if its table or its triggers are not as `create` made them.
        """
        with closing(sqlite3.connect(":memory:")) as fresh:
            fresh.executescript(_SCHEMA)
            expected = fresh.execute(_RULES).fetchall()
        try:
            found = self._database.execute(_RULES).fetchall()
        except (sqlite3.Error, UnicodeError) as error:
            raise _unreadable(self._path, "damaged", error) from error
        if found != expected:
            names = {name for _, name, _ in set(found) ^ set(expected)}
            raise LedgerError(
                f"{self._path}: tables or triggers were changed ({', '.join(sorted(names))}); "
                f"{WAY_OUT}"
            )

    def rows(self, first: int) -> Iterator[tuple[Any, ...]]:
        """What lies in the file, whole or not, from the number `first` on."""
        return self._database.execute(_READ, (max(first, -(2**63) + 1) - 1,))

    def head_at(self, number: int) -> str | None:
        """The head of one entry; None if no entry has that number."""
        found = self._database.execute("SELECT head FROM entry WHERE number = ?", (number,))
        row = found.fetchone()
        return None if row is None else str(row[0])

    # --- Writing --------------------------------------------------------------------------------

    def book(self, entries: Entries) -> int:
        """Append what `entries` makes of the book, alone and durably.

        Returns:
            The number of the last one; 0 if there was none.

        Raises:
            LedgerError: if the file cannot be written, or is not whole. Then, and with whatever
                `entries` raises, nothing is booked.
        """
        with self._lock:
            new: list[Entry] = []
            try:
                self._database.execute("BEGIN IMMEDIATE")
                new = entries(self.catch_up())
                for entry in new:
                    self._append(entry)
                self._database.execute("COMMIT")
            except BaseException as error:
                with suppress(sqlite3.Error):
                    self._database.execute("ROLLBACK")
                if new:  # what is in memory may not be what is on the disk
                    self._begin_again()
                if isinstance(error, sqlite3.Error):
                    raise LedgerError(
                        f"{self._path}: nothing was booked ({error}); see that the disk has room, "
                        "that this process may write there, and that no other holds the file"
                    ) from error
                raise
            return self._book.last if new else 0

    def _append(self, entry: Entry) -> None:
        number = max(entry.number, self._book.last + 1)
        row = self._keys.sealed(entry._replace(number=number), self._head, self._seal)
        self._database.execute(_WRITE, row)
        self._take(row)

    def _take(self, row: tuple[Any, ...]) -> None:
        """Check one entry against the chain, and apply it."""
        if row[-1] != self._keys.seal(self._seal, row[:-1]):
            raise LedgerError(f"{self._path}: {self._fault(row[0])}; {WAY_OUT}")
        try:
            self._book.apply(Entry._make(row[:-2]))
        except (LedgerError, KeyError, TypeError, ValueError) as error:
            raise LedgerError(f"{self._path}: {error}; {WAY_OUT}") from error
        self._head, self._seal = str(row[-2]), str(row[-1])

    def _fault(self, number: int) -> str:
        last = self._book.last
        if last == 0:
            return f"entry {number} is not as this node wrote it, or node.key is another's"
        if number != last + 1:
            return f"entry {last + 1} is gone, or entry {number} is not as this node wrote it"
        return f"entry {number} is not as this node wrote it"

    def _begin_again(self) -> None:
        self._book, self._head, self._seal = Book(), _BEGIN, _BEGIN


class _Keys:
    """What seals entries."""

    def __init__(self, key: NodeKey) -> None:
        self._head, self._seal = Mac(key.derive("ledger head")), Mac(key.derive("ledger seal"))

    def sealed(self, entry: Entry, head: str, seal: str) -> tuple[Any, ...]:
        """The row of `entry` after the one that ended in `head` and `seal`.

        Its nonce makes the head another each time: a ledger that was put back and books the same
        tasks again does not come to the same heads, and a witness of the first time finds it.
        """
        whole = entry._replace(kind=str(entry.kind), nonce=secrets.token_hex(_NONCE_BYTES))
        row = (*whole, self._head.of(head, whole[:_BOOKED]))
        return (*row, self.seal(seal, row))

    def seal(self, before: str, row: tuple[Any, ...]) -> str:
        """The seal of a row without it."""
        return self._seal.of(before, row)


class Mac:
    """Keyed BLAKE2b (RFC 7693), 256 bits in hex, over lists of values.

    Over their Python literal in ASCII, so that no two lists read the same: neither values that
    are cut elsewhere, nor a number and its text, nor nothing and the word for it.
    """

    def __init__(self, key: bytes) -> None:
        self._keyed = blake2b(key=key, digest_size=32)

    def of(self, before: str, values: tuple[Any, ...]) -> str:
        """Over the values and what came before them."""
        digest = self._keyed.copy()
        digest.update(ascii((before, *values)).encode())
        return digest.hexdigest()


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


def _identity(path: Path) -> tuple[int, int] | None:
    """Which file it is; a copy that is put in its place is another."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _unreadable(path: Path, what: str, error: sqlite3.Error | UnicodeError) -> LedgerError:
    """What to say of an error while reading; on a disk that takes no writing nothing is lost."""
    code = getattr(error, "sqlite_errorcode", 0) & 0xFF
    shut = code == sqlite3.SQLITE_CANTOPEN and not os.access(path.parent, os.W_OK)
    if shut or code in _FULL_OR_READ_ONLY:
        return LedgerError(f"{path}: {UNWRITABLE} ({error}); {_MEND}")
    return LedgerError(f"{path}: {what} ({error}); {WAY_OUT}")


def _connect(path: Path) -> sqlite3.Connection:
    """Open what is there; a file that is not a ledger of this format is left as it is."""
    if not path.is_file():
        raise LedgerError(f"{path}: the ledger is missing; {WAY_OUT}")
    try:
        # `book` and `catch_up` let in one thread at a time
        database = sqlite3.connect(
            f"{path.absolute().as_uri()}?mode=rw",
            uri=True,
            timeout=PATIENCE,
            isolation_level=None,
            check_same_thread=False,
        )
    except sqlite3.Error as error:
        raise _unreadable(path, "cannot be opened", error) from error
    try:
        (version,) = database.execute("PRAGMA user_version").fetchone()
        if version != FORMAT:
            raise LedgerError(f"{path}: format {version}, this version reads {FORMAT}; {WAY_OUT}")
        database.execute("PRAGMA synchronous=FULL")
    except (sqlite3.Error, UnicodeError) as error:
        database.close()
        raise _unreadable(path, "damaged", error) from error
    except LedgerError:
        database.close()
        raise
    return database
