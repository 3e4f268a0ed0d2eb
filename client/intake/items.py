"""What a source holds, object by object, before anything of it is read.

A source is a folder, with the ZIPs that lie in it; a ZIP; or a DICOMDIR, which lists files. What
it names and does not have, or nobody can look into, is listed beside the items, with a reason.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, Protocol

from client.intake.archive import looks_like_archive, members
from client.intake.dicomdir import is_directory_file, referenced
from client.intake.part10 import CLOSED_FOLDER, BoundedFile
from client.intake.source import NotUsed
from common.errors import IntakeError

WITHIN = "!"
"""Stands between the place of a ZIP and the name of its member."""
_EXPECTED = "expected a folder of DICOM files, a ZIP, or a DICOMDIR"
_NO_FILE = "not a regular file"


class Item(Protocol):
    """One object of a source; it can be sent to another process.

    Attributes:
        place: its path within the source; it may well name a patient. No two items of a source
            have the same.
    """

    @property
    def place(self) -> str:
        """See `Item`."""

    @property
    def stamp(self) -> str:
        """What tells, without reading it, that it is not what it was; empty if nothing does."""

    def open(self, limit: int) -> BinaryIO:
        """Open it for reading and seeking.

        Of a file one read returns at most `limit` bytes; a member of a ZIP has at most as many,
        and they are in memory.

        Raises:
            IntakeError: if it cannot be opened, or is nothing to read.
        """


@dataclass(frozen=True, slots=True)
class FileItem:
    """A file, by its path within a folder."""

    folder: Path
    place: str

    @property
    def path(self) -> Path:
        """Where it is."""
        return self.folder / self.place

    @property
    def stamp(self) -> str:
        """Size, and when bytes or rights were changed."""
        try:
            found = self.path.stat()
        except OSError:
            return ""
        return f"{found.st_size} {found.st_mtime_ns} {found.st_ctime_ns}"

    def open(self, limit: int) -> BinaryIO:
        """See `Item`."""
        try:
            return BoundedFile(self.path, limit)
        except OSError as error:
            raise IntakeError(f"it cannot be opened ({error.strerror})") from None


@dataclass(frozen=True)
class Listing:
    """A source's items, and what of it cannot be one."""

    items: tuple[Item, ...]
    unusable: tuple[NotUsed, ...] = ()

    @classmethod
    def of(cls, found: Iterable[Item | NotUsed]) -> Listing:
        """Told apart, in their order."""
        items: list[Item] = []
        unusable: list[NotUsed] = []
        for one in found:
            if isinstance(one, NotUsed):
                unusable.append(one)
            else:
                items.append(one)
        return cls(tuple(items), tuple(unusable))


def check_source(source: Path) -> None:
    """See that there is something, before anything is made for it.

    Raises:
        IntakeError: otherwise.
    """
    if not source.exists():
        raise IntakeError(f"{source}: no such folder or file; {_EXPECTED}")


def listed(source: Path) -> Listing:
    """What is in a source.

    Of a folder every file but DICOMDIRs, at any depth, and the members of every ZIP; links to
    folders are not followed. Of a DICOMDIR the files that it lists within its own folder.

    Raises:
        IntakeError: if there is no such source, or it is of no kind that is read.
    """
    check_source(source)
    try:
        if source.is_dir():
            os.scandir(source).close()
            return Listing.of(_in_folder(source))
        if source.is_file() and is_directory_file(source):
            return Listing.of(_in_dicomdir(source))
        if source.is_file() and looks_like_archive(source):
            return Listing.of(members(source, _Places()))
    except OSError as error:
        raise IntakeError(f"{source}: cannot be looked into ({error.strerror})") from error
    except IntakeError as error:
        raise IntakeError(f"{source}: {str(error).removeprefix(f'{source}: ')}") from error
    raise IntakeError(
        f"{source}: neither a folder nor a ZIP nor a DICOMDIR; {_EXPECTED}: put a single file "
        "into a folder and give that"
    )


def walk(folder: Path) -> Iterator[Path]:
    """All files below `folder` but DICOMDIRs, and each folder that is not looked into.

    Those are links to folders, which could lead anywhere and back again, and folders that the
    system does not list.
    """
    return (folder / place for place, _ in _walked(folder))


@dataclass
class _Places:
    """A place of its own for each thing, however its name may be chosen."""

    prefix: str = ""
    taken: set[str] = field(default_factory=set)
    times: Counter[str] = field(default_factory=Counter)

    def __call__(self, name: str) -> str:
        wanted = place = f"{self.prefix}{name}"
        while place in self.taken:
            self.times[wanted] += 1
            place = f"{wanted} ({self.times[wanted] + 1})"
        self.taken.add(place)
        return place


def _in_folder(folder: Path) -> Iterator[Item | NotUsed]:
    archives: list[str] = []
    taken: set[str] = set()
    for place, reason in _walked(folder):
        if reason:
            yield NotUsed(place, reason)
        elif place.lower().endswith(".zip") and looks_like_archive(folder / place):
            archives.append(place)
        else:
            taken.add(place)
            yield FileItem(folder, place)
    for place in archives:
        try:
            yield from members(folder / place, _Places(place + WITHIN, taken))
        except IntakeError as error:
            yield NotUsed(place, str(error))


def _in_dicomdir(directory: Path) -> Iterator[Item | NotUsed]:
    for found in referenced(directory):
        yield found if isinstance(found, NotUsed) else FileItem(directory.parent, found)


def _walked(folder: Path) -> Iterator[tuple[str, str]]:
    """The path of each file within `folder`, with the reason why it is none, if it is none."""
    waiting = [""]
    while waiting:
        within = waiting.pop()
        try:
            with os.scandir(folder / within) as entries:
                found = sorted(entries, key=lambda entry: entry.name)
        except OSError:
            yield within, CLOSED_FOLDER
            continue
        for entry in found:
            place = os.path.join(within, entry.name)
            if entry.is_dir(follow_symlinks=False):
                waiting.append(place)
            elif entry.name.upper() != "DICOMDIR":
                yield place, _no_file(entry)


def _no_file(entry: os.DirEntry[str]) -> str:
    """Why an entry that is no folder is no file; empty if it is one."""
    try:
        if entry.is_file():
            return ""
        return CLOSED_FOLDER if entry.is_dir() else _NO_FILE
    except OSError:  # such as a link that leads in a circle
        return _NO_FILE
