"""A DICOMDIR as a source (PS3.10 8, PS3.3 annex F): the files that it lists.

Its records are read one after the other as they stand. The offsets by which they point at each
other may be broken or lead in circles, and nothing here follows them: a record that refers to a
file names it, whoever's record it is.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple

from pydicom.dataset import Dataset
from pydicom.filereader import read_dataset, read_sequence_item
from pydicom.tag import BaseTag
from pydicom.uid import (
    UID,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    MediaStorageDirectoryStorage,
)

from client.intake.part10 import BoundedFile
from client.intake.quiet import quiet
from client.intake.source import NotUsed
from common.errors import IntakeError

LARGEST = 2**28
"""Bytes of a DICOMDIR that is read: some 500,000 records."""
_RECORDS = 0x00041220
_UNDEFINED = 0xFFFFFFFF
# Tags of an item and of the delimiter behind the last one (PS3.5 7.5).
_ITEM = (b"\xfe\xff\x00\xe0", b"\xfe\xff\xdd\xe0")
_ITEM_BIG_ENDIAN = (b"\xff\xfe\xe0\x00", b"\xff\xfe\xe0\xdd")
_SYNTAXES = (ExplicitVRLittleEndian, ImplicitVRLittleEndian, ExplicitVRBigEndian)
_BROKEN_OFF = (
    "the DICOMDIR is damaged from here on, so files that it lists may be missing: "
    "give its folder instead"
)
_UNREADABLE = (
    "a record of the DICOMDIR cannot be read, so a file that it lists may be missing: "
    "give its folder instead"
)
_OUTSIDE = "the DICOMDIR refers to it, and it lies outside of the DICOMDIR's folder"
_MISSING = "the DICOMDIR refers to it, and it is not there"
_DELETED = "its record in the DICOMDIR is marked as no longer in use"


def is_directory_file(path: Path) -> bool:
    """Whether a file says of itself that it is a DICOMDIR."""
    try:
        with quiet(), BoundedFile(path, LARGEST) as stream:
            return _class_and_syntax(stream)[0] == MediaStorageDirectoryStorage
    except Exception:  # noqa: BLE001
        # Parsers raise whatever the bytes of a broken file drive them to.
        return False


def referenced(directory: Path) -> Iterator[str | NotUsed]:
    """The files that a DICOMDIR lists, each once, as paths within its folder.

    What cannot be used comes as `NotUsed`: what is not there, is marked as deleted or lies
    outside; and a directory that breaks off, after all that stands before that.

    Raises:
        IntakeError: if it is no DICOMDIR that can be read.
    """
    found = _Folder(directory.parent)
    seen = {directory.name}
    for record in _records(directory):
        reference = record if isinstance(record, NotUsed) else _reference(record)
        if isinstance(reference, NotUsed):
            yield NotUsed(directory.name, reference.reason)
        elif reference.file_id:
            place = found.place(reference.file_id)
            what = place if isinstance(place, str) else place.what
            if what not in seen:
                seen.add(what)
                yield place if reference.in_use else NotUsed(what, _DELETED)


class _Reference(NamedTuple):
    """What a record says of a file; of none if the File ID has no components."""

    file_id: list[str]
    in_use: bool


@dataclass
class _Folder:
    """The folder of a DICOMDIR: finds files by their File ID, and never one outside of it."""

    path: Path

    def __post_init__(self) -> None:
        self._root = self.path.resolve()
        self._names: dict[str, dict[str, list[str]]] = {}

    def place(self, parts: list[str]) -> str | NotUsed:
        """The path of a file within the folder."""
        what = "/".join(parts)
        if any(part in ("", ".", "..") or "\0" in part for part in parts):
            return NotUsed(what, _OUTSIDE)
        within = ""
        for part in parts:
            name = self._as_it_is_written(within, part)
            if name is None:
                return NotUsed(what, _MISSING)
            within = os.path.join(within, name)
            if not self._is_inside(within):
                return NotUsed(what, _OUTSIDE)
        return within

    def _is_inside(self, within: str) -> bool:
        """Whether it still is when all links are followed."""
        try:
            return (self.path / within).resolve().is_relative_to(self._root)
        except (OSError, RuntimeError):  # a circle of links
            return False

    def _as_it_is_written(self, within: str, part: str) -> str | None:
        """A name as it stands on the disk, or None.

        A File ID is in capitals (PS3.10 8.2), and a disc that is mounted or copied may give the
        same names in small letters, or with ISO 9660's version and dot behind them.
        """
        if within not in self._names:
            self._names[within] = _names(self.path / within)
        alike = self._names[within].get(_plain(part), [])
        if part in alike:
            return part
        return alike[0] if len(alike) == 1 else None


def _names(folder: Path) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    try:
        for name in os.listdir(folder):
            found.setdefault(_plain(name), []).append(name)
    except OSError:
        return {}
    return found


def _plain(name: str) -> str:
    return name.upper().partition(";")[0].rstrip(".")


def _reference(record: Dataset) -> _Reference | NotUsed:
    """The file that a record refers to (PS3.3 F.3.2.2); some writers put slashes into its ID."""
    try:
        value = record.get("ReferencedFileID") or []
        components = [value] if isinstance(value, str) else list(value)
        parts = [part for text in components for part in str(text).strip().split("/")]
        return _Reference(parts, record.get("RecordInUseFlag") != 0)
    except Exception:  # noqa: BLE001
        # Parsers raise whatever the bytes of a broken element drive them to.
        return NotUsed("", _UNREADABLE)


def _records(directory: Path) -> Iterator[Dataset | NotUsed]:
    """Every record as it stands; memory is that of one."""
    with quiet(), BoundedFile(directory, LARGEST) as stream:
        size = os.fstat(stream.fileno()).st_size
        if size > LARGEST:
            raise IntakeError(
                f"this DICOMDIR has {size} bytes; at most {LARGEST} are read: give its folder"
            )
        try:
            syntax, end = _to_records(stream)
        except Exception:  # noqa: BLE001
            # Parsers raise whatever the bytes of a broken file drive them to.
            raise IntakeError("this DICOMDIR is damaged: give its folder instead") from None
        try:
            while stream.tell() != end and (record := _next(stream, syntax)) is not None:
                yield record
        except Exception:  # noqa: BLE001
            yield NotUsed(directory.name, _BROKEN_OFF)


def _to_records(stream: BinaryIO) -> tuple[UID, int]:
    """Go to the first record; the transfer syntax, and where the records end.

    The end is -1 where a delimiter says it.

    Raises:
        IntakeError: if the file is no DICOMDIR, or of a transfer syntax that none has.
    """
    kind, syntax = _class_and_syntax(stream)
    if kind != MediaStorageDirectoryStorage or syntax not in _SYNTAXES:
        raise IntakeError("no DICOMDIR")
    read_dataset(stream, syntax.is_implicit_VR, syntax.is_little_endian, stop_when=_at_records)
    head = stream.read(8 if syntax.is_implicit_VR else 12)
    if not head:
        return syntax, stream.tell()
    length = int.from_bytes(head[-4:], "little" if syntax.is_little_endian else "big")
    return syntax, -1 if length == _UNDEFINED else stream.tell() + length


def _next(stream: BinaryIO, syntax: UID) -> Dataset | None:
    """The next record; None at the delimiter behind the last one.

    Raises:
        ValueError: if no record begins here.
    """
    tag = stream.read(4)
    if tag not in (_ITEM if syntax.is_little_endian else _ITEM_BIG_ENDIAN):
        raise ValueError("no item")
    stream.seek(-len(tag), os.SEEK_CUR)
    return read_sequence_item(stream, syntax.is_implicit_VR, syntax.is_little_endian, "iso8859")


def _class_and_syntax(stream: BinaryIO) -> tuple[str, UID]:
    """From the file meta information (PS3.10 7.1), which a DICOMDIR always has."""
    stream.seek(128)
    if stream.read(4) != b"DICM":
        return "", UID("")
    meta = read_dataset(stream, False, True, stop_when=_behind_meta)
    return str(meta.get("MediaStorageSOPClassUID")), UID(meta.get("TransferSyntaxUID") or "")


def _behind_meta(tag: BaseTag, _representation: str | None, _length: int) -> bool:
    return bool(tag >> 16 != 0x0002)


def _at_records(tag: BaseTag, _representation: str | None, _length: int) -> bool:
    return bool(tag >= _RECORDS)
