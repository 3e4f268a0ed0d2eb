"""What privacy was spent: written before it is spent, never rewritten.

One SQLite file a site, in WAL mode with ``synchronous=FULL``. An attempt is *reserved* durably
before training and *committed* with the digest of its release after; a crash in between leaves it
reserved, and what is reserved counts as spent. A second attempt at the same task is a new row and
a new charge. A task that is committed answers with the same bytes again, from disk, at no cost;
if these bytes are gone, or the round is asked with other content, the answer is no.
"""

from __future__ import annotations

import hashlib
import sqlite3
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from common.accounting import SubsampledGaussian
from common.errors import Refusal, RefusalCode
from common.files import write_durably

_SCHEMA = """
CREATE TABLE IF NOT EXISTS attempt (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    run TEXT NOT NULL, round INTEGER NOT NULL, task TEXT NOT NULL,
    sampling_rate REAL, noise_multiplier REAL, steps INTEGER, unit TEXT,
    reserved TEXT NOT NULL
);
CREATE TABLE IF NOT EXISTS release (
    attempt INTEGER PRIMARY KEY REFERENCES attempt (id),
    digest TEXT NOT NULL, committed TEXT NOT NULL
);
CREATE INDEX IF NOT EXISTS attempt_by_round ON attempt (run, round);
CREATE INDEX IF NOT EXISTS release_by_digest ON release (digest);
"""
_APPEND_ONLY = """
CREATE TRIGGER IF NOT EXISTS {table}_stays BEFORE UPDATE ON {table}
    BEGIN SELECT RAISE(ABORT, 'the ledger is append only'); END;
CREATE TRIGGER IF NOT EXISTS {table}_kept BEFORE DELETE ON {table}
    BEGIN SELECT RAISE(ABORT, 'the ledger is append only'); END;
CREATE TRIGGER IF NOT EXISTS {table}_new BEFORE INSERT ON {table}
    WHEN EXISTS (SELECT 1 FROM {table} WHERE {key} = NEW.{key})
    BEGIN SELECT RAISE(ABORT, 'the ledger is append only'); END;
"""

Allow = Callable[[list[SubsampledGaussian]], None]
"""Raises a Refusal if what was spent leaves no room."""


@dataclass(frozen=True)
class Attempt:
    """A reserved attempt: the right, once, to train and release."""

    number: int
    run: str
    round_number: int
    task: str


class Ledger:
    """The ledger in `folder`, made if it is not there."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._releases = folder / "releases"
        self._releases.mkdir(exist_ok=True, mode=0o700)
        (folder / "ledger.sqlite").touch(mode=0o600)
        self._database = sqlite3.connect(folder / "ledger.sqlite", timeout=60)
        self._database.execute("PRAGMA journal_mode=WAL")
        self._database.execute("PRAGMA synchronous=FULL")
        self._database.executescript(_SCHEMA)
        for table, key in (("attempt", "id"), ("release", "attempt")):
            self._database.executescript(_APPEND_ONLY.format(table=table, key=key))

    def spent(self) -> list[SubsampledGaussian]:
        """Every attempt ever reserved, committed or not, that had a mechanism."""
        rows = self._database.execute(
            "SELECT sampling_rate, noise_multiplier, sum(steps), unit FROM attempt "
            "WHERE steps IS NOT NULL GROUP BY 1, 2, 4"
        )
        return [SubsampledGaussian(*row) for row in rows]

    def released(self, run: str, round_number: int, task: str) -> bytes | None:
        """The stored release of this very task, or None if it was never committed.

        Raises:
            Refusal: ``replay``: the round was asked with other content, or the bytes are gone.
        """
        digests = self._digests(run, round_number, task)
        return self._stored(digests[0]) if digests else None

    def reserve(
        self,
        run: str,
        round_number: int,
        task: str,
        mechanism: SubsampledGaussian | None,
        *,
        allow: Allow = lambda _: None,
    ) -> Attempt:
        """Book one attempt durably; from here on it counts as spent, whatever happens.

        No other process can book between what `allow` sees and this booking.

        Raises:
            Refusal: ``replay``: the round was asked with other content; or what `allow` raises.
        """
        parts = (None, None, None, None)
        if mechanism is not None:
            m = mechanism
            parts = (m.sampling_rate, m.noise_multiplier, m.steps, m.unit)  # type: ignore[assignment]
        with self._database:
            self._database.execute("BEGIN IMMEDIATE")
            self._digests(run, round_number, task)
            allow(self.spent())
            cursor = self._database.execute(
                "INSERT INTO attempt (run, round, task, sampling_rate, noise_multiplier, steps, "
                "unit, reserved) VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                (run, round_number, task, *parts, _now()),
            )
        return Attempt(int(cursor.lastrowid or 0), run, round_number, task)

    def commit(self, attempt: Attempt, release: bytes) -> None:
        """Keep the release's bytes durably, then book it as released."""
        digest = hashlib.sha256(release).hexdigest()
        write_durably(self._releases / digest, release)
        with self._database:
            self._database.execute(
                "INSERT INTO release (attempt, digest, committed) VALUES (?, ?, ?)",
                (attempt.number, digest, _now()),
            )

    def prune(self, run: str, before_round: int) -> None:
        """Drop the stored bytes of a run's earlier rounds; the bookings stay.

        A coordinator that is past a round has its release; one that asks again is refused.
        """
        rows = self._database.execute(
            "SELECT r.digest FROM attempt a JOIN release r ON r.attempt = a.id "
            "WHERE a.run = :run AND a.round < :round AND NOT EXISTS ("
            "SELECT 1 FROM release s JOIN attempt b ON s.attempt = b.id "
            "WHERE s.digest = r.digest AND (b.run <> :run OR b.round >= :round))",
            {"run": run, "round": before_round},
        )
        for (digest,) in rows:
            (self._releases / digest).unlink(missing_ok=True)

    def _digests(self, run: str, round_number: int, task: str) -> list[str]:
        """Of the releases of this task; a round that was asked with other content is refused."""
        rows = self._database.execute(
            "SELECT a.task, r.digest FROM attempt a LEFT JOIN release r ON r.attempt = a.id "
            "WHERE a.run = ? AND a.round = ?",
            (run, round_number),
        ).fetchall()
        if any(seen != task for seen, _ in rows):
            raise Refusal(RefusalCode.REPLAY, f"round {round_number} was asked with other content")
        return [digest for _, digest in rows if digest is not None]

    def _stored(self, digest: str) -> bytes:
        try:
            release = (self._releases / digest).read_bytes()
        except FileNotFoundError:
            raise Refusal(RefusalCode.REPLAY, "that release is no longer kept") from None
        if hashlib.sha256(release).hexdigest() != digest:
            raise Refusal(RefusalCode.REPLAY, "the stored release is damaged")
        return release


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")
