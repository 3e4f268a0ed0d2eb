"""A ZIP as a source (PKWARE APPNOTE 6.3): its members are listed once, and opened one by one.

Nothing is unpacked to the disk, so a member's name leads nowhere. A member is inflated into
memory, within a limit; `zipfile` inflates it and proves its CRC-32. The directory of an archive
is not trusted: members that share bytes, sizes that do not hold and headers that are not there
are refused with a reason.
"""

from __future__ import annotations

import io
import re
import stat
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from client.intake.part10 import BoundedFile
from client.intake.source import NotUsed
from common.errors import IntakeError

LARGEST_DIRECTORY = 2**27
"""Bytes of the directory of an archive that is looked into: more than a million members."""
_CHUNK = 2**20
_LOCAL_HEADER = struct.Struct("<4s22xHH")  # signature, lengths of name and extra field (4.3.7)
_LOCAL_SIGNATURE = b"PK\x03\x04"
_ENCRYPTED = 0x0001 | 0x0040 | 0x2000  # bits 0, 6 and 13 (4.4.4)
_UNIX = 3
# `zipfile` inflates bzip2 and LZMA without a bound, and hospitals' archives have neither.
_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
_OTHER_TOOL = "unpack the ZIP yourself and give the folder"
_DAMAGED = f"it is damaged within the ZIP: {_OTHER_TOOL}, or export it again"
_SHARED = "it shares bytes with another member of the ZIP, which no honest ZIP does"
# What `zipfile` and what it calls raise on broken bytes.
_BROKEN = (
    zipfile.BadZipFile,
    zlib.error,
    struct.error,
    EOFError,
    NotImplementedError,
    OSError,
    OverflowError,
    ValueError,
)


@dataclass(frozen=True, slots=True)
class MemberItem:
    """A member of a ZIP.

    Attributes:
        archive: the ZIP.
        place: see `Item`.
        start: first byte of the member's own header.
        room: bytes from there that belong to no other member.
        packed: bytes that it takes in the ZIP.
        size: bytes that it says it has.
        crc: CRC-32 of them.
        method: how it is compressed.
    """

    archive: Path
    place: str
    start: int
    room: int
    packed: int
    size: int
    crc: int
    method: int

    @property
    def stamp(self) -> str:
        """What the directory of the ZIP says of its bytes, and where they are."""
        return f"{self.size} {self.crc} {self.start} {self.room} {self.packed}"

    def open(self, limit: int) -> BinaryIO:
        """Inflate it into memory, at most `limit` bytes.

        Raises:
            IntakeError: if it is larger, damaged, or not as large as the ZIP says.
        """
        if self.size > limit:
            raise IntakeError(
                f"it has {self.size} bytes once it is unpacked, and at most {limit} of a ZIP's "
                f"member are held in memory: {_OTHER_TOOL}"
            )
        with _damage(_DAMAGED), BoundedFile(self.archive, _CHUNK) as file:
            self._to_data(file)
            return self._inflated(file)

    def _to_data(self, file: BinaryIO) -> None:
        """Go to the first byte behind the member's own header."""
        file.seek(self.start)
        signature, *lengths = _LOCAL_HEADER.unpack(file.read(_LOCAL_HEADER.size))
        if signature != _LOCAL_SIGNATURE:
            raise IntakeError(_DAMAGED)
        if _LOCAL_HEADER.size + sum(lengths) + self.packed > self.room:
            raise IntakeError(_SHARED)
        file.seek(sum(lengths), io.SEEK_CUR)

    def _inflated(self, packed: BinaryIO) -> io.BytesIO:
        info = zipfile.ZipInfo()
        info.compress_type, info.compress_size, info.CRC = self.method, self.packed, self.crc
        info.file_size = self.size + 1  # it would be cut to its claim: one more shows a lie
        inflated = io.BytesIO()
        with zipfile.ZipExtFile(packed, "r", info) as member:
            while chunk := member.read(_CHUNK):
                inflated.write(chunk)
        if inflated.tell() != self.size:
            raise IntakeError(_DAMAGED)
        inflated.seek(0)
        return inflated


def looks_like_archive(path: Path) -> bool:
    """Whether a file is a ZIP, or was one before it was damaged."""
    try:
        with BoundedFile(path, LARGEST_DIRECTORY) as file:
            return file.read(2) == _LOCAL_SIGNATURE[:2] or zipfile.is_zipfile(file)
    except (IntakeError, OSError):
        return False


def members(archive: Path, place_of: Callable[[str], str]) -> Iterator[MemberItem | NotUsed]:
    """The members of a ZIP in the order of its directory; folders and DICOMDIRs are passed over.

    Args:
        archive: the ZIP.
        place_of: the place of a member by its name, a different one at each call.

    Raises:
        IntakeError: if its directory cannot be read; before anything is yielded.
    """
    entries, end = _directory(archive)
    rooms = _rooms(entries, end)
    for number, entry in enumerate(entries):
        if _is_passed_over(entry):
            continue
        place = place_of(entry.filename)
        if reason := _refusal(entry) or ("" if number in rooms else _SHARED):
            yield NotUsed(place, reason)
        else:
            yield MemberItem(
                *(archive, place, entry.header_offset, rooms[number]),
                *(entry.compress_size, entry.file_size, entry.CRC, entry.compress_type),
            )


def _directory(archive: Path) -> tuple[list[zipfile.ZipInfo], int]:
    """What the directory lists, and where it begins."""
    with (
        _damage("its directory is damaged, cut short, or not that of a ZIP: export it again"),
        BoundedFile(archive, LARGEST_DIRECTORY) as file,
        zipfile.ZipFile(file) as opened,
    ):
        return opened.infolist(), opened.start_dir


def _rooms(entries: list[zipfile.ZipInfo], end: int) -> dict[int, int]:
    """By number, the bytes from an entry's header to the next one's; only of entries that fit.

    One whose bytes are another's as well is left out, and so is the other: thousands of members
    of the same bytes are how a small file becomes a large one (Fifield 2019, "A better zip bomb").
    """
    order = sorted(range(len(entries)), key=lambda number: entries[number].header_offset)
    next_starts = [entries[number].header_offset for number in order[1:]] + [end]
    rooms: dict[int, int] = {}
    shared: set[int] = set()
    reach, widest = 0, -1
    for number, next_start in zip(order, next_starts[: len(order)], strict=True):
        start = entries[number].header_offset
        stop = start + _LOCAL_HEADER.size + entries[number].compress_size
        if start < reach:
            shared |= {number, widest}
        if stop > reach:
            reach, widest = stop, number
        if start >= 0 and stop <= end:
            rooms[number] = next_start - start
    return {number: room for number, room in rooms.items() if number not in shared}


def _is_passed_over(entry: zipfile.ZipInfo) -> bool:
    if entry.filename.endswith("/"):
        return not entry.file_size
    return re.split(r"[/\\]", entry.filename)[-1].upper() == "DICOMDIR"


def _refusal(entry: zipfile.ZipInfo) -> str:
    """Why a member cannot be an item; empty if it can."""
    kind = stat.S_IFMT(entry.external_attr >> 16) if entry.create_system == _UNIX else 0
    if kind not in (0, stat.S_IFREG):
        return "not a regular file"
    if entry.flag_bits & _ENCRYPTED:
        return f"it is encrypted within the ZIP: {_OTHER_TOOL}"
    if entry.compress_type not in _METHODS:
        method = entry.compress_type
        return f"it is compressed by method {method}, which is not read here: {_OTHER_TOOL}"
    if entry.filename.lower().endswith(".zip"):
        return f"a ZIP within a ZIP, which is not looked into: {_OTHER_TOOL}"
    return ""


@contextmanager
def _damage(reason: str) -> Iterator[None]:
    """Whatever broken bytes drive `zipfile` to, as one reason; it would tell names."""
    try:
        yield
    except IntakeError:
        raise
    except _BROKEN as error:
        told = isinstance(error, OSError) and error.strerror
        raise IntakeError(f"cannot be read ({told})" if told else reason) from None
