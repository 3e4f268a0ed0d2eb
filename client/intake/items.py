"""What a source holds, object by object, before anything of it is read.

A source is a folder. What it names and does not have, or nobody can look into, is listed beside
the items, with a reason.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol

from client.intake.part10 import BoundedFile
from client.intake.source import NotUsed
from common.errors import IntakeError


class Item(Protocol):
    """One object of a source; it can be sent to another process.

    Attributes:
        place: its path within the source; it may well name a patient.
    """

    @property
    def place(self) -> str:
        """See `Item`."""

    def open(self, limit: int) -> BinaryIO:
        """Open it for reading; one read returns at most `limit` bytes.

        Raises:
            IntakeError: if it cannot be opened, or is nothing to read.
        """


@dataclass(frozen=True)
class FileItem:
    """A file."""

    path: Path
    place: str

    def open(self, limit: int) -> BinaryIO:
        """See `Item`."""
        return BoundedFile(self.path, limit)


@dataclass(frozen=True)
class Listing:
    """A source's items, and what of it cannot be one."""

    items: tuple[Item, ...]
    unusable: tuple[NotUsed, ...] = ()


def listed(source: Path) -> Listing:
    """What is in a source.

    Raises:
        IntakeError: if there is no such source, or it is of no kind that is read.
    """
    if not source.is_dir():
        raise IntakeError(f"{source}: no such folder; expected a folder of DICOM files")
    return Listing(tuple(FileItem(path, str(path.relative_to(source))) for path in walk(source)))


def walk(folder: Path) -> Iterator[Path]:
    """All files below `folder` but DICOMDIRs, and each folder that is not looked into.

    Those are links to folders, which could lead anywhere and back again, and folders that the
    system does not list.
    """
    closed: list[Path] = []
    for place, folders, files in os.walk(folder, onerror=lambda e: closed.append(Path(e.filename))):
        for name in files:
            if name.upper() != "DICOMDIR":
                yield Path(place, name)
        yield from (link for name in folders if (link := Path(place, name)).is_symlink())
    yield from closed
