"""The files of a prediction: whole or not at all, and for their owner's eyes alone.

They name patients: that is what a hospital needs of them. So the folder has mode 0700 and its
files 0600, and no file is named by anything that stood in a DICOM file.

``predictions.json``  format, model, warnings, and every image, study and refused object
``predictions.csv``   one line an image, or a volume
``studies.csv``       one line a study
``refused.csv``       one line an object that was not answered, with the reason
``not_made.csv``      one line a report or segmentation that could not be made, with the reason

Until then they grow in a hidden folder beside it, ``.NAME.predicting``::

    asked.json      whose answers these are: model, options, source
    journal.jsonl   a line a study, written when all that is said of it lies on the disk, and
                    begun with the SHA-256 of itself and what its last line began with
    answers/        what becomes the folder of the results

A prediction that was killed leaves that folder, and goes on by it when it is asked for again: a
study whose line is whole is answered, and of any other nothing is left. Memory does not grow with
the number of images.
"""

from __future__ import annotations

import csv
import hashlib
import json
import os
import shutil
import stat
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, Self, TextIO

from common.errors import ConfigError, RunError
from common.files import disk_refuses, flush_folder, locked, write_durably

FORMAT = "cloister predictions 1"
JSON_FILE = "predictions.json"
CSV_FILES = {
    "images": "predictions.csv",
    "studies": "studies.csv",
    "refused": "refused.csv",
    "not_made": "not_made.csv",
}
PARTS = tuple(CSV_FILES)
Row = Mapping[str, Any]

_FORMULAS = (*"=+-@", "\uff1d", "\uff0b", "\uff0d", "\uff20")
_ASKED, _JOURNAL, _ANSWERS = "asked.json", "journal.jsonl", "answers"


@dataclass
class Entry:
    """All that is said of one study, and written of it at once.

    Attributes:
        study: its name.
        objects: what tells each object that was asked about from any other.
        rows: by part.
        files: of its own, by their names within the folder.
        likeness: how like what moved its answers is to what moves random weights'.
    """

    study: str
    objects: list[str] = field(default_factory=list)
    rows: dict[str, list[Row]] = field(default_factory=lambda: {part: [] for part in PARTS})
    files: list[str] = field(default_factory=list)
    likeness: list[dict[str, Any]] = field(default_factory=list)

    def add(self, part: str, row: Row) -> bool:
        """Enter one row of a part.

        Returns:
            False, and nothing is entered, if it holds a number that is none.
        """
        try:
            json.dumps(row, allow_nan=False)
        except ValueError:
            return False
        self.rows[part].append(row)
        return True


class Results:
    """A folder of results that grows, under its name only when `finish` has put it there.

    Args:
        place: the hidden folder, which is locked.
        columns: of each part's CSV.
        every: cells that each line has, where there is a column for them.

    Attributes:
        answered: of each study that was answered before, which of its objects were asked about.
    """

    def __init__(
        self, place: Path, columns: Mapping[str, Sequence[str]], every: Mapping[str, str]
    ) -> None:
        self.folder = place / _ANSWERS
        self.answered: dict[str, frozenset[str]] = {}
        self._place, self._columns, self._every = place, columns, dict(every)
        self._count: Counter[str] = Counter()
        self._files: list[str] = []
        self._last = b""

    @classmethod
    @contextmanager
    def at(
        cls,
        target: Path,
        asked: Mapping[str, str],
        columns: Mapping[str, Sequence[str]],
        every: Mapping[str, str],
    ) -> Iterator[Self]:
        """Results that have the name `target` when the body has ended well.

        If it has not, what was answered waits for the next time that the same is asked; if nothing
        was, nothing is left.

        Args:
            target: the folder of the results, not there yet.
            asked: all that an answer depends on but the studies, in words by its name.
            columns: see the class.
            every: see the class.

        Raises:
            ConfigError: if there is something already, nothing can be written there, or what waits
                there was asked otherwise, or is not this user's alone.
            RunError: if the disk is full.
        """
        check_target(target)
        place = working_folder(target)
        try:
            place.mkdir(mode=0o700, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"{target}: cannot be written ({error.strerror})") from error
        _check_own(place)
        try:
            with locked(place):
                results = cls(place, columns, every)
                results._begin(target, asked)
                try:
                    yield results
                    results._put(target)
                except BaseException:
                    if not results.answered:
                        shutil.rmtree(place, ignore_errors=True)
                    raise
        except BlockingIOError as error:
            raise ConfigError(f"{target}: another prediction is writing there") from error
        except BaseException as error:
            if full := disk_refuses(error):
                raise RunError(
                    f"{target}: {full}; nothing was put there. Make room and give the same command "
                    f"again: what was answered waits in {place}, and names patients"
                ) from error
            raise

    def entries(self) -> Iterator[Entry]:
        """What was said of each study, in the order in which they were answered."""
        before = b""
        for number, line in enumerate(self._lines(), start=1):
            digest, _, text = line[:-1].partition(b" ")
            before = _digest(before + text)
            if before != digest:
                journal = self._place / _JOURNAL
                raise ConfigError(f"{journal}: line {number} is not as it was; {self._anew}")
            yield Entry(**json.loads(text))
        self._last = before

    def number(self, kind: str) -> str:
        """A number that no other file of a kind has: the next one."""
        self._count[kind] += 1
        return str(self._count[kind])

    def write(self, name: str, content: bytes) -> None:
        """Write a file of its own, such as ``sr/1.dcm``; it belongs to the entry that is next."""
        path = self.folder / name
        path.parent.mkdir(mode=0o700, exist_ok=True)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
        descriptor = os.open(path, flags, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        self._files.append(name)

    def commit(self, entry: Entry) -> None:
        """Write an entry down: from now on its study is answered, whatever happens."""
        entry.files, self._files = self._files, []
        for folder in {self.folder, *((self.folder / name).parent for name in entry.files)}:
            flush_folder(folder)
        text = json.dumps(vars(entry)).encode()
        self._last = _digest(self._last + text)
        with self._opened(self._place / _JOURNAL, os.O_APPEND) as journal:
            journal.write(f"{self._last.decode()} {text.decode()}\n")
            journal.flush()
            os.fsync(journal.fileno())
        self.answered[entry.study] = frozenset(entry.objects)

    def finish(self, head: Row, refused: Sequence[Row]) -> None:
        """Put tables and ``predictions.json`` together.

        Args:
            head: what the JSON says before the rows.
            refused: objects that belong to no entry.
        """
        with self._new(JSON_FILE) as file:
            file.write("{\n")
            for key, value in head.items():
                file.write(f" {json.dumps(key)}: {json.dumps(value, allow_nan=False)},\n")
            for part in PARTS:
                file.write(f' "{part}": [\n')
                of_entries = (row for entry in self.entries() for row in entry.rows[part])
                with self._new(CSV_FILES[part]) as table:
                    known: Iterable[Row] = refused if part == "refused" else ()
                    self._tell(part, chain(known, of_entries), file, table)
                file.write(" ]\n" if part == PARTS[-1] else " ],\n")
            file.write("}\n")

    def _tell(self, part: str, rows: Iterable[Row], file: TextIO, table: TextIO) -> None:
        """Write the rows of one part into both."""
        cells, before = csv.writer(table), ""
        cells.writerow(map(safe, self._columns[part]))
        for row in rows:
            file.write(f"{before}  {json.dumps(row, allow_nan=False)}")
            before = ",\n"
            flat = self._every | dict(flattened(row))
            cells.writerow(safe(flat.get(name)) for name in self._columns[part])
        file.write("\n" if before else "")

    # --- What is there before and after ---------------------------------------------------------

    def _begin(self, target: Path, asked: Mapping[str, str]) -> None:
        try:
            self._take_up(target, asked)
        except OSError as error:
            if disk_refuses(error):
                raise
            raise ConfigError(f"{self._place}: cannot be used ({error.strerror})") from error

    def _take_up(self, target: Path, asked: Mapping[str, str]) -> None:
        """Go on with what waits there, or begin anew."""
        with self._opened(self._place / _JOURNAL, 0) as journal:
            # Without the answers the journal is of results that were put, and moved away since.
            whole = sum(map(len, self._lines())) if self.folder.is_dir() else 0
            os.truncate(journal.fileno(), whole)
        for entry in self.entries():
            self.answered[entry.study] = frozenset(entry.objects)
            self._files += entry.files
        if self.answered:
            self._check_same(target, asked)
        else:
            write_durably(self._place / _ASKED, json.dumps(asked).encode(), mode=0o600)
        self.folder.mkdir(mode=0o700, exist_ok=True)
        flush_folder(self._place)
        known, self._files = set(self._files), []
        for name in known:
            if not (self.folder / name).is_file():
                raise ConfigError(f"{self.folder / name}: was written, and is gone; {self._anew}")
        for path in list(self.folder.rglob("*")):
            folder = stat.S_ISDIR(path.lstat().st_mode)
            if not folder and str(path.relative_to(self.folder)) not in known:
                path.unlink()
        self._count.update(name.partition("/")[0] for name in known)

    @property
    def _anew(self) -> str:
        return f"remove {self._place}, and give the command again: it begins anew"

    def _check_same(self, target: Path, asked: Mapping[str, str]) -> None:
        try:
            before = dict(json.loads((self._place / _ASKED).read_bytes()))
        except (OSError, ValueError, TypeError, RecursionError):
            before = {}
        keys = dict.fromkeys((*before, *asked))
        differ = [key for key in keys if before.get(key) != asked.get(key)]
        if differ:
            told = "; ".join(
                f"{key} was {before.get(key) or 'not said'}, and is {asked.get(key) or 'not said'}"
                for key in differ
            )
            raise ConfigError(
                f"{target}: an earlier start was ended before it was through, and was asked "
                f"otherwise: {told}. Give its command again to go on with it, or another name; "
                f"or remove {self._place}, in which its answers are"
            )

    def _lines(self) -> Iterator[bytes]:
        """The whole lines of the journal; the last one may have been cut off."""
        path = self._place / _JOURNAL
        with os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW), "rb") as journal:
            for line in journal:
                if not line.endswith(b"\n"):
                    return
                yield line

    def _put(self, target: Path) -> None:
        """Give the results their name."""
        flush_folder(self.folder)
        if os.path.lexists(target):
            raise ConfigError(f"{target}: has come to be meanwhile; nothing was put there")
        self.folder.rename(target)
        flush_folder(target.parent)
        shutil.rmtree(self._place)

    @contextmanager
    def _new(self, name: str) -> Iterator[TextIO]:
        """A file of the results, which is on the disk when the body ends."""
        with self._opened(self.folder / name, os.O_CREAT | os.O_TRUNC) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())

    @staticmethod
    def _opened(path: Path, flags: int) -> TextIO:
        # The name of a file may be no text in UTF-8, and no file may stop the others.
        return os.fdopen(
            os.open(path, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | flags, 0o600),
            "w",
            encoding="utf-8",
            errors="backslashreplace",
            newline="",
        )


def _digest(text: bytes) -> bytes:
    return hashlib.sha256(text).hexdigest().encode()


def working_folder(target: Path) -> Path:
    """Where results wait until they are whole."""
    return target.with_name(f".{target.name}.predicting")


def check_target(target: Path) -> None:
    """See, before the work is done, that results can be put there.

    Of a prediction that was killed when its results had their name already, what is left is gone.

    Raises:
        ConfigError: if there is something already, or no folder for it, or where it would grow is
            something that is not this user's alone.
    """
    place = working_folder(target)
    if os.path.lexists(target) and place.is_dir() and not (place / _ANSWERS).exists():
        with suppress(OSError), locked(place):
            shutil.rmtree(place)
    if os.path.lexists(target):
        raise ConfigError(
            f"{target}: is there already, and nothing is written over; expected a new name"
        )
    if not target.parent.is_dir():
        raise ConfigError(f"{target}: there is no folder {target.parent} to put it into")
    _check_own(place)


def _check_own(place: Path) -> None:
    """What waits is this user's, and nobody else's to open: whoever made it first would read all.

    Its rights are not mended, for who has opened a file keeps it.

    Raises:
        ConfigError: otherwise.
    """
    folders, files = (place, place / _ANSWERS), (place / _ASKED, place / _JOURNAL)
    for path in (*folders, *files):
        try:
            found = path.lstat()
        except FileNotFoundError:
            continue
        except OSError as error:
            raise ConfigError(f"{path}: cannot be looked at ({error.strerror})") from error
        kind = "folder" if path in folders else "file"
        is_kind = stat.S_ISDIR if kind == "folder" else stat.S_ISREG
        if not is_kind(found.st_mode):
            wrong = f"is a link, no {kind}" if stat.S_ISLNK(found.st_mode) else f"is no {kind}"
        elif found.st_uid != os.geteuid():
            wrong = "belongs to another user"
        elif found.st_mode & 0o077:
            wrong = f"is open to others (mode {stat.S_IMODE(found.st_mode):04o})"
        else:
            continue
        raise ConfigError(
            f"{path}: {wrong}; expected a {kind} of your own that nobody else can open, for "
            f"answers name patients. Give another name, or remove {place}; a file system that "
            "keeps no rights does not do"
        )


def flattened(row: Row) -> Iterator[tuple[str, Any]]:
    """A row's cells by column: ``probability {opacity}`` for what is told by class."""
    for key, value in row.items():
        if isinstance(value, Mapping):
            yield from ((f"{key} {{{name}}}", inner) for name, inner in value.items())
        elif isinstance(value, list):
            yield key, len(value) if key == "boxes" else "; ".join(value)
        else:
            yield key, value


def safe(value: Any) -> Any:
    """A cell that no spreadsheet takes for a formula (CWE-1236): a text gets a quote before it."""
    if isinstance(value, str) and (value[:1].isspace() or value.startswith(_FORMULAS)):
        return f"'{value}"
    return value
