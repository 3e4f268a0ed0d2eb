"""The desk of an intake: what became of every object, what waits for a person, what was decided.

A folder beside the cohort (or the exported files), readable by its owner alone:

    journal.sqlite   the state of every object, the rows of the cohort, decisions, counts
    review/          pictures before and after, sealed, one file an object
    work/            the cohort as far as it has come, while an intake runs
    report.html, report.json

File names name patients. So the journal knows an object by a keyed pseudonym; its place in the
source and what is known of its images are sealed, and open to whoever holds the site's key (and
the cohort's, if that is sealed). Nothing else of an identity is in this folder.

Everything that is told of one object is told in one transaction, after its pixels are on the disk:
an intake that is killed goes on where it was, and comes to the same cohort.
"""

from __future__ import annotations

import hmac
import json
import os
import secrets
import sqlite3
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from client.intake.builder import ImageRecord
from client.intake.decision import Decision, Shot
from client.intake.deid.burned_in import Box
from client.intake.deid.walk import Account
from client.intake.dicom import NO_LABEL, FileResult
from client.intake.items import Item
from client.intake.keys import SiteKey
from client.intake.series import DOUBTFUL, TAKEN_EMPTY, SeriesItem
from common.errors import CohortError, ConfigError
from common.files import flush_folder, write_durably
from common.sealed import Seal

SUFFIX = ".intake"
JOURNAL, REVIEW, WORK = "journal.sqlite", "review", "work"
FORMAT = 1
SHORT = 8
"""Digits of an id that are shown; `Desk.find` takes any beginning that is one object's alone."""
_SCHEMA = """
CREATE TABLE setting (key TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE item (
    number INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE, place BLOB NOT NULL,
    state TEXT NOT NULL, reason TEXT NOT NULL DEFAULT '', content TEXT NOT NULL DEFAULT '',
    named INT NOT NULL DEFAULT 0, label TEXT NOT NULL DEFAULT '', boxes INT NOT NULL DEFAULT 0,
    account INT NOT NULL DEFAULT 0, decision INT NOT NULL DEFAULT 0,
    stamp TEXT NOT NULL DEFAULT ''
);
CREATE INDEX item_by_state ON item (state, number);
CREATE INDEX item_by_content ON item (content) WHERE state = 'rejected';
CREATE TABLE image (
    row INTEGER PRIMARY KEY, item INT NOT NULL, instance TEXT NOT NULL UNIQUE,
    image BLOB NOT NULL
);
CREATE INDEX image_by_item ON image (item);
CREATE TABLE label (name TEXT PRIMARY KEY, said TEXT NOT NULL);
CREATE TABLE account (number INTEGER PRIMARY KEY, counts TEXT NOT NULL UNIQUE);
CREATE TABLE decision (number INTEGER PRIMARY KEY, item INT NOT NULL, said BLOB NOT NULL);
CREATE INDEX decision_by_item ON decision (item);
"""


class State(StrEnum):
    """Where an object stands.

    ``open``: not read yet; ``aside``: names no patient, and waits until all others are seen;
    ``kept``: something of it is in the cohort; ``waits``: a person has to look at it;
    ``refused``: nothing of it can be kept; ``copy``: all of it is there already; ``rejected``: a
    person said no; ``ignored``: a DICOMDIR; ``gone``: it was listed once, and is not there now.
    """

    OPEN = "open"
    ASIDE = "aside"
    KEPT = "kept"
    WAITS = "waits"
    REFUSED = "refused"
    COPY = "copy"
    REJECTED = "rejected"
    IGNORED = "ignored"
    GONE = "gone"


@dataclass(frozen=True)
class Entry:
    """One object, as the journal knows it.

    Attributes:
        number: in the order in which objects are read.
        id: 32 hexadecimal digits.
        reason: why nothing is kept; it names no patient.
        content: keyed digest of its bytes.
        boxes: rectangles that were blanked in it.
        label: keyed digest of what finds its label; empty if none was found.
        decision: number of the decision under which it was read; 0 for none.
    """

    number: int
    id: str
    state: State
    reason: str
    content: str
    boxes: int
    label: str
    decision: int

    @property
    def short(self) -> str:
        """The beginning of its id, as it is shown."""
        return self.id[:SHORT]


@dataclass(frozen=True)
class Row:
    """One image of the cohort, in the order of the stored images."""

    record: ImageRecord
    sha256: str


CHANGED = (
    "it has changed since it was taken in (files came, went or were written anew), and the cohort "
    "has it as it was: reject it, or take the source in under another cohort's name"
)
_DOUBTED = (
    "it was taken in as if nothing were where nobody marked anything, and an object has come that "
    "may be its segmentation: it could not be read or placed, and is listed with its reason; mend "
    "it, or take it out of the source, or reject this series"
)
_GONE = "it is no longer in the source"
_ENTRY = "number, id, state, reason, content, boxes, label, decision"


class Desk:
    """The desk in `path`; use it as a context manager, or call `close`.

    Args:
        path: the folder.
        key: the site's.
        cohort_key: the cohort's, if it is sealed at rest.

    Raises:
        ConfigError: if there is no desk, of another version, or of another key, or its journal
            cannot be opened.
    """

    def __init__(self, path: Path, key: SiteKey, cohort_key: bytes | None = None) -> None:
        self.path = path
        self.key = key
        secret = hmac.digest(key.derive("desk of an intake"), cohort_key or b"", "sha256")
        self._seal = Seal(secret)
        if not (path / JOURNAL).is_file():
            raise ConfigError(
                f"{path}: no desk of an intake; `cloister intake run` makes one beside the cohort"
            )
        self._database = _connected(path / JOURNAL)
        try:
            check = hmac.digest(secret, b"which key", "sha256").hex()
            self.settle(format=str(FORMAT), key=check)
        except BaseException:
            self.close()
            raise

    @classmethod
    def create(cls, path: Path, key: SiteKey, cohort_key: bytes | None = None) -> Self:
        """The desk in `path`, an empty one if there is none yet.

        Raises:
            CohortError: if it cannot be made.
        """
        try:
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
            path.chmod(0o700)
            (path / REVIEW).mkdir(mode=0o700, exist_ok=True)
            if not (path / JOURNAL).exists():
                _new_journal(path / JOURNAL)
        except (OSError, sqlite3.Error) as error:
            raise CohortError(f"{path}: the desk cannot be made ({error})") from error
        return cls(path, key, cohort_key)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the journal."""
        self._database.close()

    # What holds for the whole of it.

    def settle(self, **settings: str) -> None:
        """Write what holds for the whole intake; what is there already has to be the same.

        Raises:
            ConfigError: naming what differs.
        """
        if not all(map(self.setting, settings)):
            with self._transaction():
                self._database.executemany(
                    "INSERT OR IGNORE INTO setting VALUES (?, ?)", list(settings.items())
                )
        self._check(settings)

    def setting(self, name: str, default: str = "") -> str:
        """What was settled under a name."""
        found = self._database.execute("SELECT value FROM setting WHERE key = ?", (name,))
        row = found.fetchone()
        return str(row[0]) if row else default

    def change(self, **settings: str) -> None:
        """Write over settings, all in one transaction."""
        with self._transaction():
            self._set(settings)

    # The objects of the source.

    def plan(self, source: Path, items: Iterable[Item]) -> dict[int, Item]:
        """Enter what is in the source now; returns every item by the number of its object.

        What is new is put in an order that the key draws: names of files often are patients'
        names, and the order of a cohort's images then says nothing of them. What is not read yet
        and no longer there is ``gone``; what is back, or was refused and is another file now, is
        to be read.
        """
        where = os.fspath(source.resolve())
        known = dict(self._database.execute("SELECT id, number FROM item"))
        by_id = {self._id_of(where, item): item for item in items}
        new = sorted(by_id.keys() - known.keys())
        with self._transaction():
            first = self._one("SELECT COALESCE(MAX(number), 0) FROM item") + 1
            for number, name in enumerate(new, start=first):
                known[name] = number
                place = self._seal.close(by_id[name].place.encode("utf-8", "surrogateescape"), name)
                self._database.execute(
                    "INSERT INTO item (number, id, place, state) VALUES (?, ?, ?, ?)",
                    (number, name, place, State.OPEN),
                )
            present = {known[name]: item for name, item in by_id.items()}
            self._forget_parts(where, present.values())
            self._mark_gone(present)
            self._reopen_changed(present)
        return present

    def _id_of(self, where: str, item: Item) -> str:
        """By its place; of a series by its UID, for its first image may be another one later."""
        if isinstance(item, SeriesItem):
            return self.key.pseudonym("item", where, "series", item.uid)
        return self.key.pseudonym("item", where, item.place)

    def _forget_parts(self, where: str, items: Iterable[Item]) -> None:
        """What was refused by itself, and is a part of a series now, is no object of its own."""
        parts = (
            (self.key.pseudonym("item", where, part.place),)
            for item in items
            if isinstance(item, SeriesItem)
            for part in (*item.images, *item.segmentations)
        )
        self._database.executemany("DELETE FROM item WHERE id = ? AND state = 'refused'", parts)

    def _mark_gone(self, present: Mapping[int, Item]) -> None:
        """What waits to be read and is not in the source now; what is back is read."""
        for number in self.numbers(State.OPEN, State.ASIDE):
            if number not in present:
                self._put(number, State.GONE, _GONE)
        for number in self.numbers(State.GONE):
            if number in present:
                self._put(number, State.OPEN)

    def _reopen_changed(self, present: Mapping[int, Item]) -> None:
        """What was refused may have been copied in part then, or mended since.

        A series that was kept stays as it was taken in; that it has changed is told, and that what
        was taken for empty is so no more for certain.
        """
        asked = (
            "SELECT number, state, stamp, reason, account IN "
            "(SELECT number FROM account WHERE counts LIKE ?) FROM item "
            "WHERE state IN ('open', 'aside', 'refused', 'kept')"
        )
        said = (f'%"{TAKEN_EMPTY}"%',)
        for number, state, stamp, reason, empty in self._database.execute(asked, said).fetchall():
            item = present.get(number)
            if state == State.KEPT and not isinstance(item, SeriesItem):
                continue
            now = self._stamp_of(item) if item else stamp
            doubts = item.doubts if isinstance(item, SeriesItem) else 0
            if state == State.KEPT:
                told = CHANGED if now != stamp else _DOUBTED if doubts and empty else ""
                self._put(number, State.KEPT, told)
                continue
            if isinstance(item, SeriesItem) and not doubts and reason.startswith(DOUBTFUL):
                self._put(number, State.OPEN)
            if now != stamp:
                self._set_stamp(number, now)
                if state == State.REFUSED:
                    self._put(number, State.OPEN)

    def _stamp_of(self, item: Item) -> str:
        return self.key.pseudonym("content", item.stamp)

    def _set_stamp(self, number: int, stamp: str) -> None:
        self._database.execute("UPDATE item SET stamp = ? WHERE number = ?", (stamp, number))

    def reopen_decided(self, present: Mapping[int, Item]) -> None:
        """Act on what was decided since: released objects are read again, rejected ones taken out.

        The images of both are no longer the cohort's.

        Args:
            present: every item that is in the source now, by the number of its object; others
                cannot be read again.
        """
        with self._transaction():
            for number, item in self._database.execute(
                "SELECT MAX(d.number), d.item FROM decision d JOIN item i ON i.number = d.item "
                "GROUP BY d.item HAVING MAX(d.number) > MAX(i.decision)"
            ).fetchall():
                if self._said(number, item).verdict == "reject":
                    self._put(item, State.REJECTED, "a person rejected it")
                elif item in present:
                    self._put(item, State.OPEN)
                    self._set_stamp(item, self._stamp_of(present[item]))
                else:
                    self._put(item, State.GONE, _GONE)
                self._database.execute(
                    "UPDATE item SET decision = ? WHERE number = ?", (number, item)
                )
                self._database.execute("UPDATE image SET item = -item WHERE item = ?", (item,))

    def _put(self, number: int, state: State, reason: str = "") -> None:
        self._database.execute(
            "UPDATE item SET state = ?, reason = ? WHERE number = ?", (state, reason, number)
        )

    def numbers(self, *states: State) -> list[int]:
        """The numbers of all objects in these states, ascending."""
        marks = ", ".join("?" * len(states))
        query = f"SELECT number FROM item WHERE state IN ({marks}) ORDER BY number"  # noqa: S608
        return [row[0] for row in self._database.execute(query, states)]

    def entries(self, *states: State) -> Iterator[Entry]:
        """All objects in these states; all there are if none is given."""
        marks = ", ".join("?" * len(states or State))
        query = f"SELECT {_ENTRY} FROM item WHERE state IN ({marks}) ORDER BY number"  # noqa: S608
        for row in self._database.execute(query, states or tuple(State)).fetchall():
            yield _entry(row)

    def changed(self) -> Iterator[Entry]:
        """The objects that were kept as they were, and have changed since."""
        return (entry for entry in self.entries(State.KEPT) if entry.reason)

    def entry(self, number: int) -> Entry:
        """The object of a number.

        Raises:
            ConfigError: if there is none.
        """
        row = self._database.execute(
            f"SELECT {_ENTRY} FROM item WHERE number = ?",  # noqa: S608
            (number,),
        ).fetchone()
        if row is None:
            raise ConfigError(
                f"{self.path}: no object {number}; `cloister intake review` lists them"
            )
        return _entry(row)

    def find(self, beginning: str) -> Entry:
        """The one object whose id begins so.

        Raises:
            ConfigError: if none does, or several do.
        """
        bare = beginning.strip().lower()
        found = self._database.execute(
            "SELECT number FROM item WHERE substr(id, 1, ?) = ? LIMIT 2", (len(bare), bare)
        ).fetchall()
        if len(found) != 1 or not bare:
            what = "several objects begin" if found else "no object begins"
            raise ConfigError(
                f"{self.path}: {what} with {beginning!r}; `cloister intake review` lists their ids"
            )
        return self.entry(found[0][0])

    def place(self, entry: Entry) -> str:
        """Where an object lies in the source: it may name a patient, so it is for the screen alone.

        Raises:
            SealError: if the journal was changed.
        """
        sealed = self._database.execute(
            "SELECT place FROM item WHERE number = ?", (entry.number,)
        ).fetchone()
        return self._seal.open(sealed[0], entry.id).decode("utf-8", "surrogateescape")

    # What became of them.

    def record(self, results: Sequence[tuple[int, State, FileResult, Sequence[Row]]]) -> None:
        """What became of some objects, in one transaction; their pixels are on the disk already.

        Args:
            results: number, state, result, and the rows that were appended for it, in order.
        """
        for number, _, result, _ in results:
            self._keep_shots(self.entry(number), result.shots)
        with self._transaction():
            row = self._one("SELECT COALESCE(MAX(row), -1) FROM image") + 1
            for number, state, result, rows in results:
                self._record(number, state, result)
                for image in rows:
                    self._add(row, number, image)
                    row += 1

    def _record(self, number: int, state: State, result: FileResult) -> None:
        account = self._account(result.account) if state is State.KEPT else 0
        boxes = result.account.counts["pixels: box blanked", "PixelData"]
        self._database.execute(
            "UPDATE item SET state = ?, reason = ?, content = ?, named = ?, label = ?, boxes = ?, "
            "account = ? WHERE number = ?",
            (
                state,
                result.reason,
                self.content_id(result.content),
                result.names_patient,
                self.label_id(result.label),
                boxes,
                account,
                number,
            ),
        )

    def _add(self, row: int, item: int, image: Row) -> None:
        told = json.dumps(asdict(image.record) | {"sha256": image.sha256}).encode()
        instance = image.record.instance
        sealed = self._seal.close(told, f"image {instance}")
        self._database.execute(
            "INSERT INTO image VALUES (?, ?, ?, ?)", (row, item, instance, sealed)
        )

    def _account(self, account: Account) -> int:
        """The number of an account; the slices of a series mostly share one."""
        told = [[*what, number] for what, number in sorted(account.counts.items()) if number]
        text = json.dumps(told)
        self._database.execute("INSERT OR IGNORE INTO account (counts) VALUES (?)", (text,))
        return self._one("SELECT number FROM account WHERE counts = ?", text)

    def row(self, instance: str) -> Row | None:
        """The image of this instance that is in the cohort already."""
        found = self._database.execute("SELECT image FROM image WHERE instance = ?", (instance,))
        sealed = found.fetchone()
        return None if sealed is None else self._opened(instance, sealed[0])

    def is_rejected(self, content: str) -> bool:
        """Whether a person has rejected these bytes, wherever in the source they were."""
        asked = "SELECT EXISTS(SELECT 1 FROM item WHERE state = 'rejected' AND content = ?)"
        return bool(content and self._one(asked, content))

    def images(self) -> int:
        """How many rows there are, those of objects that were taken out among them."""
        return self._one("SELECT COUNT(*) FROM image")

    def rows(self) -> Iterator[Row]:
        """Every image of the cohort, in the order of the stored ones."""
        for instance, sealed in self._database.execute(
            "SELECT instance, image FROM image ORDER BY row"
        ):
            yield self._opened(instance, sealed)

    def _opened(self, instance: str, sealed: bytes) -> Row:
        values = json.loads(self._seal.open(sealed, f"image {instance}"))
        if isinstance(values["label"], list):
            values["label"] = tuple(
                tuple(part) if isinstance(part, list) else part for part in values["label"]
            )
        sha256 = values.pop("sha256")
        return Row(ImageRecord(**values), sha256)

    def live_rows(self) -> list[int]:
        """The rows whose objects are still the cohort's, ascending."""
        query = "SELECT row FROM image WHERE item > 0 ORDER BY row"
        return [row[0] for row in self._database.execute(query)]

    def drop_dead_rows(self, **settings: str) -> None:
        """Forget the rows of objects that were taken out, number the others anew, and settle."""
        live = self.live_rows()
        with self._transaction():
            self._database.execute("DELETE FROM image WHERE item < 0")
            for new, old in enumerate(live):
                self._database.execute("UPDATE image SET row = ? WHERE row = ?", (new, old))
            self._set(settings)

    def names_patients(self) -> bool:
        """Whether any object that was read names a patient."""
        return bool(self._one("SELECT EXISTS(SELECT 1 FROM item WHERE named)"))

    # The label table.

    def label_id(self, value: str) -> str:
        """The keyed digest that stands for what finds a label; empty for nothing."""
        return self.key.pseudonym("label", value) if value else ""

    def settle_labels(self, table: Mapping[str, str]) -> None:
        """Hold the label table to what it said before; it may only have grown.

        What was refused for want of a label is to be read again where there are new lines.

        Args:
            table: what each line says, by what finds it.

        Raises:
            ConfigError: if a line is gone, or says something else.
        """
        said = {
            self.label_id(name): self.key.pseudonym("label", name, text)
            for name, text in table.items()
        }
        known = dict(self._database.execute("SELECT name, said FROM label"))
        gone = len(known.keys() - said.keys())
        other = sum(said[name] != told for name, told in known.items() if name in said)
        if gone or other:
            raise ConfigError(
                f"{self.path}: {gone} lines of the label table are gone since the intake's first "
                f"start, and {other} say something else; a table may only grow: put them back, or "
                "take in under another cohort's name"
            )
        new = [(name, said[name]) for name in sorted(said.keys() - known.keys())]
        if new:
            with self._transaction():
                self._database.executemany("INSERT INTO label VALUES (?, ?)", new)
                self._database.execute(
                    "UPDATE item SET state = 'open', reason = '' "
                    "WHERE state = 'refused' AND reason LIKE ?",
                    (f"{NO_LABEL}%",),
                )

    def labelled(self) -> set[str]:
        """The keyed digests of what found the labels of which something was kept."""
        query = "SELECT DISTINCT label FROM item WHERE state IN ('kept', 'copy')"
        return {row[0] for row in self._database.execute(query)}

    # For the report.

    def totals(self) -> Mapping[State, int]:
        """How many objects stand where."""
        found = self._database.execute("SELECT state, COUNT(*) FROM item GROUP BY state")
        return {State(state): count for state, count in found}

    def reasons(self, *states: State) -> list[tuple[str, int]]:
        """Reasons in these states, and how many objects each holds for, the most frequent first."""
        marks = ", ".join("?" * len(states))
        query = (
            f"SELECT reason, COUNT(*) FROM item WHERE state IN ({marks}) "  # noqa: S608
            "GROUP BY reason ORDER BY COUNT(*) DESC, reason"
        )
        return [(row[0], row[1]) for row in self._database.execute(query, states)]

    def account(self) -> Account:
        """What was done to the headers and pixels of all objects that are kept."""
        total = Account()
        for counts, times in self._database.execute(
            "SELECT a.counts, COUNT(*) FROM item i JOIN account a ON a.number = i.account "
            "WHERE i.state = 'kept' GROUP BY a.number"
        ):
            for rule, attribute, number in json.loads(counts):
                total.counts[rule, attribute] += number * times
        return total

    # What a person sees, and says.

    def _keep_shots(self, entry: Entry, shots: Sequence[Shot]) -> None:
        file = self._shots_file(entry)
        if not shots:
            file.unlink(missing_ok=True)
            return
        pictures = b"".join(shot.before + shot.after for shot in shots)
        heads = [
            asdict(shot) | {"before": len(shot.before), "after": len(shot.after)} for shot in shots
        ]
        content = json.dumps(heads).encode() + b"\n" + pictures
        write_durably(file, self._seal.close(content, f"shots {entry.id}"), 0o600)

    def shots(self, entry: Entry) -> tuple[Shot, ...]:
        """The pictures of an object; none if it waits for nobody and nothing was blanked.

        Raises:
            SealError: if the file was changed, or is another object's.
        """
        try:
            sealed = self._shots_file(entry).read_bytes()
        except FileNotFoundError:
            return ()
        content = self._seal.open(sealed, f"shots {entry.id}")
        heads, _, rest = content.partition(b"\n")
        shots, at = [], 0
        for head in json.loads(heads):
            middle = at + head["before"]
            end = middle + head["after"]
            head["boxes"] = tuple(Box(*box) for box in head["boxes"])
            shots.append(Shot(**head | {"before": rest[at:middle], "after": rest[middle:end]}))
            at = end
        return tuple(shots)

    def _shots_file(self, entry: Entry) -> Path:
        return self.path / REVIEW / f"{entry.id}.sealed"

    def content_id(self, sha256: str) -> str:
        """The keyed digest that stands for bytes of this SHA-256; empty for none."""
        return self.key.pseudonym("content", sha256) if sha256 else ""

    def decide(self, entry: Entry, decision: Decision) -> int:
        """Record what a person said of an object; the next `intake run` acts on it.

        Returns:
            The decision's number.

        Raises:
            ConfigError: if the object is in a state in which nothing can be decided, or has
                changed since `entry` was read.
        """
        if entry.state not in (State.WAITS, State.KEPT, State.REJECTED):
            raise ConfigError(
                f"{entry.short}: it is {entry.state} ({entry.reason or 'no reason'}); only what "
                "waits, was kept or was rejected can be decided on"
            )
        with self._transaction():
            if self.entry(entry.number) != entry:
                raise ConfigError(f"{entry.short}: it was read again meanwhile; look at it again")
            number = self._one("SELECT COALESCE(MAX(number), 0) FROM decision") + 1
            said = json.dumps(asdict(decision) | {"content": entry.content}).encode()
            sealed = self._seal.close(said, f"decision {number} of {entry.id}")
            self._database.execute(
                "INSERT INTO decision VALUES (?, ?, ?)", (number, entry.number, sealed)
            )
        return number

    def decisions(self, entry: Entry | None = None) -> Iterator[tuple[int, Entry, Decision]]:
        """Everything that was ever decided, or of one object: number, object, what was said."""
        for number, item in self._database.execute(
            "SELECT number, item FROM decision WHERE ? IN (0, item) ORDER BY number",
            (entry.number if entry else 0,),
        ).fetchall():
            yield number, self.entry(item), self._said(number, item)

    def blanked(self) -> list[int]:
        """The kept objects in which pixels were blanked, ascending."""
        query = (
            "SELECT number FROM item WHERE state = 'kept' AND account IN "
            "(SELECT number FROM account WHERE counts LIKE '%\"pixels: %') ORDER BY number"
        )
        return [row[0] for row in self._database.execute(query)]

    def undone(self) -> list[int]:
        """The objects on which a decision was made that no run has acted on yet."""
        query = (
            "SELECT d.item FROM decision d JOIN item i ON i.number = d.item "
            "GROUP BY d.item HAVING MAX(d.number) > MAX(i.decision)"
        )
        return [row[0] for row in self._database.execute(query)]

    def decision_of(self, entry: Entry) -> tuple[Decision, str] | None:
        """The decision under which an object is read, and the digest of what was decided on."""
        if not entry.decision:
            return None
        said = self._told(entry.decision, entry.number)
        content = said.pop("content")
        return _decision(said), str(content)

    def _said(self, number: int, item: int) -> Decision:
        said = self._told(number, item)
        said.pop("content")
        return _decision(said)

    def _told(self, number: int, item: int) -> dict[str, Any]:
        sealed = self._database.execute(
            "SELECT said FROM decision WHERE number = ?", (number,)
        ).fetchone()[0]
        label = f"decision {number} of {self.entry(item).id}"
        told: dict[str, Any] = json.loads(self._seal.open(sealed, label))
        return told

    # The file.

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        try:
            self._database.execute("BEGIN IMMEDIATE")
            yield
            self._database.execute("COMMIT")
        except sqlite3.Error as error:
            raise CohortError(
                f"{self.path}: the journal cannot be written ({error}); check the folder, its "
                "rights and its space, and start again"
            ) from error
        finally:
            if self._database.in_transaction:  # of some errors SQLite has rolled back itself
                self._database.execute("ROLLBACK")

    def _set(self, settings: Mapping[str, str]) -> None:
        self._database.executemany(
            "INSERT OR REPLACE INTO setting VALUES (?, ?)", list(settings.items())
        )

    def _one(self, query: str, *values: object) -> int:
        return int(self._database.execute(query, values).fetchone()[0])

    def _check(self, expected: Mapping[str, str]) -> None:
        for name, value in expected.items():
            if (seen := self.setting(name)) != value:
                raise ConfigError(_difference(self.path, name, seen, value))


_MEANING = {
    "format": "the format of the desk",
    "makes": "what the desk is of",
    "key": "the site's key (or the key of the sealed cohort)",
    "spec": "what the run's file says of images and classes ([input], [task])",
    "labels": "the label table's key column",
    "profile": "the profile of de-identification",
    "deidentification": "the version of this software, or its tables,",
}
_DIGESTS = ("key", "spec", "profile", "deidentification")


def _difference(path: Path, name: str, seen: str, expected: str) -> str:
    what = _MEANING.get(name, name)
    shown = "" if name in _DIGESTS else f": {seen!r} then, {expected!r} now"
    return (
        f"{path}: {what} is not that of the intake's first start{shown}; go on with the same, take "
        "in under another cohort's name, or remove this folder and what it made to begin anew"
    )


def _decision(said: Mapping[str, Any]) -> Decision:
    return Decision(**{**said, "blank": tuple(Box(*box) for box in said["blank"])})


def _entry(row: Sequence[Any]) -> Entry:
    return Entry(row[0], row[1], State(row[2]), *row[3:])


def _new_journal(file: Path) -> None:
    """An empty journal under its name, unless another process was faster; or none."""
    partial = file.with_name(f"{file.name}.{secrets.token_hex(8)}.partial")
    os.close(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
    try:
        database = sqlite3.connect(partial)
        with database:
            database.executescript(_SCHEMA)
            database.execute("INSERT INTO setting VALUES ('format', ?)", (str(FORMAT),))
        database.close()
        with suppress(FileExistsError):
            os.link(partial, file)
        flush_folder(file.parent)
    finally:
        partial.unlink(missing_ok=True)


def _connected(file: Path) -> sqlite3.Connection:
    try:
        database = sqlite3.connect(file, timeout=60, isolation_level=None)
        database.execute("PRAGMA journal_mode = WAL")
        database.execute("PRAGMA synchronous = FULL")
    except sqlite3.Error as error:
        raise ConfigError(
            f"{file}: the journal cannot be opened ({error}); if it is damaged, put back a copy"
        ) from error
    return database
