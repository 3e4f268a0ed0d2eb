"""Where objects lie that came over the network, until an intake takes them in.

    INBOX/            0700, its files 0600
        inbox.key     of the names; it recognises nobody that the files beside it do not name
        incoming/     what is being received; emptied at the start, nothing in it was acknowledged
        arriving/     STUDY/OBJECT.dcm: kept for good, and more of the study may come
        complete/     the same after some time of silence: `cloister intake run INBOX/complete …`

The objects are **originals, with every identity in them**. The names are not: they are keyed
pseudonyms of UIDs, so a listing, a log or a backup's catalogue tells of nobody.

An object is on the disk before its sender is told so: written aside, flushed, renamed, the folders
flushed. What comes after a study was complete arrives anew, and joins the rest when it is silent
again. One process at a time has an inbox.
"""

from __future__ import annotations

import hashlib
import io
import logging
import math
import os
import secrets
import shutil
import stat
import threading
import zlib
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import BinaryIO, NamedTuple, Self

from pydicom.dataset import Dataset
from pydicom.filereader import read_dataset
from pydicom.tag import BaseTag
from pydicom.uid import UID, DeflatedExplicitVRLittleEndian

from client.intake.deid.classes import ALLOWED
from client.intake.deidentify import text_of
from client.intake.keys import SiteKey
from client.intake.quiet import quiet
from common.clock import Clock
from common.errors import ConfigError, IntakeError
from common.files import flush_folder, locked

LOG = logging.getLogger("cloister.inbox")
INCOMING, ARRIVING, COMPLETE = "incoming", "arriving", "complete"
KEY_FILE, SUFFIX = "inbox.key", ".dcm"
_STORAGE = "1.2.840.10008.5.1.4.1.1."
REPORTS = frozenset(
    _STORAGE + number
    for number in ("88.11", "88.22", "88.33", "88.34", "88.35", "88.50", "88.65", "88.69")
)
SEGMENTATIONS = frozenset(_STORAGE + number for number in ("66.4", "66.7"))
TAKEN = ALLOWED | REPORTS | SEGMENTATIONS
"""SOP classes that may be sent: images, and what says where and what the findings are."""

_PREAMBLE, _PREFIX = 128, b"DICM"
_META_GROUP = 0x0002
_STUDY = 0x0020000D
_HEAD = 8 * 2**20
"""Bytes in which an object has to name its study; all that stands before it is descriptive."""
_ASK_DISK_EVERY = 2**22
_BLOCK = 2**20
_SECONDS_A_DAY = 86_400


class Trouble(StrEnum):
    """Why an object is not kept; the words may be told to its sender."""

    TOO_LARGE = "the object is larger than this node takes"
    DISK_FULL = "this node's disk is full"
    STUDY_FULL = "the study has more objects than this node takes"
    UNREADABLE = "the data set cannot be read, or names no study, class or instance"
    FOREIGN = "the data set is not the object that was announced"


class NotKeptError(IntakeError):
    """An object is not kept; nothing of it is left."""

    def __init__(self, trouble: Trouble) -> None:
        super().__init__(trouble.value)
        self.trouble = trouble


class Outcome(StrEnum):
    """What became of an object that is on the disk now."""

    NEW = "taken"
    AGAIN = "sent again"
    VERSION = "with other content"


class Names(NamedTuple):
    """What an object calls itself (PS3.3 C.12.1), or is called; empty where nothing is said."""

    sop_class: str = ""
    instance: str = ""
    study: str = ""

    def agree(self, announced: Names) -> bool:
        """Whether nothing that was announced is otherwise."""
        return all(not said or said == seen for seen, said in zip(self, announced, strict=True))


@dataclass(frozen=True)
class Bounds:
    """How much an inbox takes, in bytes and objects."""

    object_bytes: int = 2**31
    least_free: int = 10 * 2**30
    objects_a_study: int = 20_000


class Arrival:
    """An object on its way in: a file that nobody sees, removed unless the inbox keeps it.

    Writing never raises for what is wrong with the object or the disk: a sender may well have to
    be heard to its end. The first trouble is remembered, and from then on nothing is stored.
    """

    def __init__(self, path: Path, bounds: Bounds) -> None:
        self.path = path
        self.trouble: Trouble | None = None
        self.heard = 0
        self._bounds = bounds
        self._asked = -_ASK_DISK_EVERY
        self._file: BinaryIO | None = None
        with self._storing():
            self._file = os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb")

    def write(self, data: bytes) -> None:
        """Take in more of the object."""
        self.heard += len(data)
        if self.trouble is not None or self._file is None:
            return
        if self.heard > self._bounds.object_bytes:
            self._give_up(Trouble.TOO_LARGE)
        elif self._disk_is_full():
            self._give_up(Trouble.DISK_FULL)
        else:
            with self._storing():
                self._file.write(data)

    def flush(self) -> None:
        """Put all of it on the disk.

        Raises:
            NotKeptError: if there was trouble.
        """
        if self._file is not None and self.trouble is None:
            with self._storing():
                self._file.flush()
                os.fsync(self._file.fileno())
                self._file.close()
        if self.trouble is not None:
            raise NotKeptError(self.trouble)

    def drop(self) -> None:
        """Leave nothing of it; once it is kept this does nothing."""
        if self._file is not None:
            with suppress(OSError):  # what a full disk could not take is not wanted any more
                self._file.close()
        with suppress(OSError):
            self.path.unlink()

    def _disk_is_full(self) -> bool:
        if self.heard - self._asked < _ASK_DISK_EVERY:
            return False
        self._asked = self.heard
        return free_bytes(self.path.parent) < self._bounds.least_free

    def _give_up(self, trouble: Trouble) -> None:
        self.trouble = trouble
        self.drop()

    @contextmanager
    def _storing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            LOG.error("the inbox cannot be written (%s)", error.strerror)
            self._give_up(Trouble.DISK_FULL)


@dataclass
class Inbox:
    """The folder of what was received; make one with `opened`.

    Attributes:
        tally: objects since it was opened: by outcome, and by trouble.
    """

    path: Path
    bounds: Bounds
    silence: float
    clock: Clock
    tally: Counter[Outcome | Trouble] = field(default_factory=Counter)
    _heard: dict[str, float] = field(default_factory=dict)
    _sizes: dict[str, int] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @classmethod
    @contextmanager
    def opened(
        cls, path: Path, bounds: Bounds | None = None, *, silence: float, clock: Clock | None = None
    ) -> Iterator[Self]:
        """Open an inbox for this process alone, and make it if it is not there.

        What a killed process had half received is removed; what it had kept goes on arriving.

        Args:
            path: the folder.
            bounds: how much it takes.
            silence: seconds after which a study is complete.
            clock: which measures them.

        Raises:
            ConfigError: if others may look into it, another process has it, or it cannot be
                written.
        """
        with ExitStack() as stack:
            try:
                _make(path)
                stack.enter_context(locked(path))
                inbox = cls(path, bounds or Bounds(), silence, clock or Clock())
                inbox._begin()
            except BlockingIOError:
                raise ConfigError(
                    f"{path}: another process takes objects in there; stop it, or take another "
                    "folder"
                ) from None
            except OSError as error:
                raise ConfigError(f"{path}: no inbox can be there ({error.strerror})") from error
            yield inbox

    def __post_init__(self) -> None:
        self._key = SiteKey.from_file(self.path / KEY_FILE)

    def arrival(self) -> Arrival:
        """Begin to receive an object; `keep` it or `drop` it."""
        return Arrival(self.path / INCOMING / secrets.token_hex(16), self.bounds)

    def keep(self, arrival: Arrival, announced: Names | None = None) -> Outcome:
        """Keep an object for good; when this returns it is on the disk.

        An object that is there already with the same data set is kept once; one that has the UID
        of another and another data set is kept beside it.

        Args:
            arrival: all of it, as a file of PS3.10.
            announced: what its sender said that it is.

        Raises:
            NotKeptError: and nothing of it is left.
        """
        try:
            outcome = self._keep(arrival, announced or Names())
        except NotKeptError as error:
            self._count(error.trouble)
            raise
        finally:
            arrival.drop()
        self._count(outcome)
        return outcome

    def _keep(self, arrival: Arrival, announced: Names) -> Outcome:
        arrival.flush()
        try:
            names = names_in(arrival.path)
            if not names.agree(announced):
                raise NotKeptError(Trouble.FOREIGN)
            with self._lock:
                return self._place(arrival.path, names)
        except OSError as error:
            LOG.error("the inbox cannot be written (%s)", error.strerror)
            raise NotKeptError(Trouble.DISK_FULL) from None

    def _count(self, what: Outcome | Trouble) -> None:
        with self._lock:
            self.tally[what] += 1

    def has(self, names: Names) -> bool:
        """Whether an object of that study and instance is there, whatever its content."""
        study, name = self._pseudonyms(names)
        return self._where(study, name) is not None

    def settle(self) -> int:
        """Complete the studies that have been silent long enough; how many those were."""
        now = self.clock.now()
        with self._lock:
            silent = [name for name, last in self._heard.items() if now - last >= self.silence]
            for study in self._sizes.keys() - self._heard.keys():
                del self._sizes[study]
        for study in silent:
            self._complete(study)
        return len(silent)

    def complete(self, study_uid: str) -> None:
        """Complete a study whose objects are known to be all there."""
        self._complete(self._key.pseudonym("study", study_uid))

    def expire(self, days: int) -> int:
        """Remove the complete studies to which nothing came for so many days; how many."""
        oldest = self.clock.date().timestamp() - days * _SECONDS_A_DAY
        with self._lock:
            old = [study for study in _folders(self.path / COMPLETE) if _newest(study) < oldest]
            for study in old:
                shutil.rmtree(study, ignore_errors=True)
        return len(old)

    def studies(self) -> tuple[int, int]:
        """How many studies are arriving, and how many are complete."""
        return len(self._heard), len(_folders(self.path / COMPLETE))

    def _begin(self) -> None:
        shutil.rmtree(self.path / INCOMING, ignore_errors=True)
        for name in (INCOMING, ARRIVING, COMPLETE):
            (self.path / name).mkdir(mode=0o700, exist_ok=True)
        flush_folder(self.path)
        now = self.clock.now()
        self._heard = {study.name: now for study in _folders(self.path / ARRIVING)}

    def _place(self, arrived: Path, names: Names) -> Outcome:
        study, name = self._pseudonyms(names)
        outcome, there = Outcome.NEW, self._where(study, name)
        if there is not None:
            content = _content(arrived)
            version = f"{name}-{self._key.pseudonym('content', content)}"
            same = self._where(study, version) or (there if _content(there) == content else None)
            if same is not None:
                os.utime(same)  # whoever sends it again counts on it
                return Outcome.AGAIN
            name, outcome = version, Outcome.VERSION
        if self._size(study) >= self.bounds.objects_a_study:
            raise NotKeptError(Trouble.STUDY_FULL)
        folder = self.path / ARRIVING / study
        if not folder.is_dir():
            folder.mkdir(mode=0o700)
            flush_folder(folder.parent)
        os.rename(arrived, folder / (name + SUFFIX))
        flush_folder(folder)
        self._sizes[study] += 1
        self._heard[study] = self.clock.now()
        return outcome

    def _complete(self, study: str) -> None:
        """Move a study, or what came to it later, over to the complete ones."""
        source, target = self.path / ARRIVING / study, self.path / COMPLETE / study
        with self._lock:
            self._heard.pop(study, None)
            self._sizes.pop(study, None)
            if not source.is_dir():
                return
            if target.is_dir():
                for file in list(source.iterdir()):
                    os.rename(file, target / file.name)
                flush_folder(target)
                source.rmdir()
            else:
                os.rename(source, target)
            flush_folder(target.parent)
            flush_folder(source.parent)

    def _pseudonyms(self, names: Names) -> tuple[str, str]:
        key = self._key
        return key.pseudonym("study", names.study), key.pseudonym("instance", names.instance)

    def _where(self, study: str, name: str) -> Path | None:
        for folder in (ARRIVING, COMPLETE):
            path = self.path / folder / study / (name + SUFFIX)
            if path.is_file():
                return path
        return None

    def _size(self, study: str) -> int:
        """Objects of a study; counted once, then kept up."""
        if study not in self._sizes:
            folders = (self.path / name / study for name in (ARRIVING, COMPLETE))
            self._sizes[study] = sum(len(os.listdir(each)) for each in folders if each.is_dir())
        return self._sizes[study]


def free_bytes(folder: Path) -> int:
    """What its owner may still write on a folder's disk."""
    disk = os.statvfs(folder)
    return disk.f_bavail * disk.f_frsize


def names_in(path: Path) -> Names:
    """What a file of PS3.10 calls itself, by its data set and not by its file meta information.

    Raises:
        NotKeptError: if it cannot be read, or leaves class, instance or study out.
    """
    with path.open("rb") as file:
        stream = io.BytesIO(file.read(_HEAD))
    try:
        with quiet():
            syntax = _syntax(stream)
            if syntax == DeflatedExplicitVRLittleEndian:
                inflater = zlib.decompressobj(-zlib.MAX_WBITS)
                stream = io.BytesIO(inflater.decompress(stream.read(), _HEAD))
            head = _until_study(stream, syntax)
            keywords = "SOPClassUID", "SOPInstanceUID", "StudyInstanceUID"
            sop_class, instance, study = (text_of(head, keyword) for keyword in keywords)
    except Exception:  # noqa: BLE001
        # Parsers raise whatever the bytes of a broken file drive them to.
        raise NotKeptError(Trouble.UNREADABLE) from None
    if not (sop_class and instance and study):
        raise NotKeptError(Trouble.UNREADABLE)
    return Names(sop_class, instance, study)


def _until_study(stream: BinaryIO, syntax: UID) -> Dataset:
    wanted: list[BaseTag | int] = [0x00080016, 0x00080018, _STUDY]
    return read_dataset(
        stream,
        syntax.is_implicit_VR,
        syntax.is_little_endian,
        stop_when=lambda tag, _representation, _length: tag > _STUDY,
        specific_tags=wanted,
    )


def _syntax(stream: BinaryIO) -> UID:
    """The transfer syntax of a file (PS3.10 7.1); the stream stands at its data set afterwards."""
    if stream.read(_PREAMBLE + len(_PREFIX))[_PREAMBLE:] != _PREFIX:
        raise IntakeError("no file of PS3.10")
    meta = read_dataset(
        stream,
        False,
        True,
        stop_when=lambda tag, _representation, _length: (tag >> 16) != _META_GROUP,
    )
    return UID(meta.TransferSyntaxUID)


def _content(path: Path) -> str:
    """SHA-256 of a file's data set and its transfer syntax; its file meta information is no part.

    The same object may have come from two senders, each of which writes its own.
    """
    with path.open("rb") as file, quiet():
        digest = hashlib.sha256(_syntax(file).encode())
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def _make(path: Path) -> None:
    """The folder itself, for its owner alone."""
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        mode = stat.S_IMODE(path.stat().st_mode)
    except OSError as error:
        raise ConfigError(f"{path}: the inbox cannot be made ({error.strerror})") from error
    if mode & 0o077:
        raise ConfigError(
            f"{path}: the inbox has mode {mode:04o}, others may look into it; expected 0700: run "
            f"`chmod 700 {path}` and think about who has looked"
        )


def _folders(place: Path) -> list[Path]:
    with os.scandir(place) as entries:
        return [Path(entry) for entry in entries if entry.is_dir(follow_symlinks=False)]


def _newest(study: Path) -> float:
    """When something last came to a study; it is never old while a person removes it."""
    try:
        times = [file.stat().st_mtime for file in (study, *study.iterdir())]
    except FileNotFoundError:
        return math.inf
    return max(times)
