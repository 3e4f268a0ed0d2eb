"""What a source says of people: every value that may identify somebody, in pieces to look for.

The source is read by pydicom, what was made of it by `client.intake.verify.layout`: what one of
the two readers overlooks, the other sees.
"""

from __future__ import annotations

import io
import re
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from pydicom import dcmread
from pydicom.dataelem import DataElement, RawDataElement
from pydicom.dataset import Dataset, FileDataset
from pydicom.multival import MultiValue

from client.intake.quiet import quiet
from client.intake.verify.words import (
    LETTERS,
    SHORTEST,
    class_words,
    common_words,
    dates_in,
    is_neutral_uid,
    listed_words,
    maker_words,
)
from common.errors import DataError

_TEXTS = frozenset({"LO", "SH", "LT", "ST", "UT", "UC", "AE", "CS", "UR"})
_NOT_DATES = ("19000101", "00010101")
_RUN = re.compile(rb"(?:[\x20-\x7e]|[\xc3-\xdf][\x80-\xbf]|[\xe0-\xef][\x80-\xbf]{2}){6,}")
_LETTERS_OF_RUN = 6
_MIXED = re.compile(r"[A-Za-z0-9]{6,}")
_DIGITS = re.compile(r"(?<![\d.])\d{4,}(?!\.?\d)")
_LARGEST_VALUE = 2**20
_RECORD_DIGITS = 8
_LONGEST_VALUE = 64
_SHORTEST_VALUE = 8
_ZIP, _PDF = b"PK\x03\x04", b"%PDF"
_MOST = 2**31


@dataclass
class Identities:
    """Pieces of a source's values; all texts are in lower case.

    Attributes:
        words: of four letters or more, which are on no list of terms; of other scripts, of one.
        names: words of people's names that are on a list of terms, such as Brown.
        mixed: runs of letters and digits, such as record numbers.
        numbers: of four digits or more, without leading zeros.
        dates: year, month and day as eight digits.
        uids: those that are neither the standard's nor made of UUIDs.
        values: names and identifiers as they are spelled, with what separates their parts.
    """

    words: set[str] = field(default_factory=set)
    names: set[str] = field(default_factory=set)
    mixed: set[str] = field(default_factory=set)
    numbers: set[str] = field(default_factory=set)
    dates: set[str] = field(default_factory=set)
    uids: set[str] = field(default_factory=set)
    values: set[str] = field(default_factory=set)

    def __len__(self) -> int:
        return sum(len(kind) for kind in vars(self).values())

    def add_file(self, content: bytes, name: str) -> None:
        """Take up what a file says, and its name; it need not be DICOM."""
        for part in Path(name).parts:
            self.add_text(part)
        if content[:4] == _ZIP:
            self._add_archive(content)
            return
        with quiet():
            header = _header(content)
            if header is not None:
                self._add_level(header.file_meta)
                self._add_level(header)
            elif content[:4] == _PDF or b"\0" not in content[:4096]:
                self._add_runs(content[:_LARGEST_VALUE])

    def _add_archive(self, content: bytes) -> None:
        try:
            with zipfile.ZipFile(io.BytesIO(content)) as archive:
                for entry in archive.infolist():
                    if not entry.is_dir() and entry.file_size < _MOST:
                        self.add_file(archive.read(entry), entry.filename)
        except (zipfile.BadZipFile, OSError, RuntimeError, NotImplementedError, ValueError):
            self._add_runs(content[:_LARGEST_VALUE])

    def _add_level(self, level: Dataset) -> None:
        for tag in list(level.keys()):
            raw = level.get_item(tag)
            try:
                element = level[tag]
            except Exception:  # noqa: BLE001
                # As above: of what cannot be read, the letters in it.
                element = raw
            if isinstance(element, RawDataElement) or element is None:
                self._add_runs(getattr(raw, "value", b"") or b"")
            elif element.VR == "SQ":
                for item in element.value:
                    self._add_level(item)
            else:
                self._add_element(element)

    def _add_element(self, element: DataElement) -> None:
        name = element.VR
        for value in _values(element):
            if isinstance(value, bytes):
                if element.tag.is_private or name == "UN" or element.keyword in _DOCUMENTS:
                    self._add_runs(value[:_LARGEST_VALUE])
            elif name == "PN":
                self._add_name(str(value))
            elif name == "UI":
                self._add_uid(str(value))
            elif name in ("DA", "DT"):
                self._add_date(str(value))
            elif name in ("IS", "DS"):
                self._add_number(value)
            elif name in _TEXTS or element.tag.is_private:
                self.add_text(str(value), is_value=name in ("LO", "SH", "AE"))

    def _add_name(self, name: str) -> None:
        self.add_text(name, is_value=True)
        self.names |= {
            word.lower()
            for word in LETTERS.findall(name)
            if len(word) >= SHORTEST and word.lower() in _terms() - listed_words() - _NOBODY
        }

    def _add_uid(self, uid: str) -> None:
        uid = uid.strip(" \0")
        if uid.count(".") > 3 and not is_neutral_uid(uid):
            self.uids.add(uid)

    def _add_date(self, text: str) -> None:
        digits = text.replace(".", "").replace("-", "")[:8]
        if len(digits) == 8 and digits.isdecimal() and digits not in _NOT_DATES:
            self.dates.add(digits)

    def _add_number(self, value: Any) -> None:
        text = str(getattr(value, "original_string", value)).strip()
        if text.isdecimal() and len(text.lstrip("0")) >= _RECORD_DIGITS:
            self.numbers.add(text.lstrip("0"))

    def _add_runs(self, raw: bytes) -> None:
        """The letters of bytes whose meaning nobody knows."""
        if isinstance(raw, bytes):
            for run in _RUN.findall(raw):
                self.add_text(run.decode("utf-8", "ignore"), shortest=_LETTERS_OF_RUN)

    def add_text(self, text: str, *, is_value: bool = False, shortest: int = SHORTEST) -> None:
        """Take up the words, numbers, dates and UIDs of a text.

        Args:
            text: in any spelling.
            is_value: whether all of it names somebody or something.
            shortest: letters of the shortest word, and digits of the shortest number.
        """
        folded = text.strip(" \0").lower()
        if is_value and _SHORTEST_VALUE <= len(folded) <= _LONGEST_VALUE and _is_telling(folded):
            self.values.add(folded)
        for word in LETTERS.findall(folded):
            if (len(word) >= shortest or not word.isascii()) and word not in _terms():
                self.words.add(word)
        for run in _MIXED.findall(folded):
            letters = run.strip("0123456789")
            if letters and not run.isalpha() and letters not in _terms():
                self.mixed.add(run)
        for digits in _DIGITS.findall(folded):
            if len(digits.lstrip("0")) >= shortest:
                self.numbers.add(digits.lstrip("0"))
        for _, match in dates_in(folded):
            self.dates |= set(_as_dates(match[0]))
        for uid in _UIDS.findall(folded):
            self._add_uid(uid)


_OF_OBJECTS = ("SOPClassUID", "PatientID", "DirectoryRecordSequence", "Rows")
_DOCUMENTS = ("EncapsulatedDocument", "DataSetTrailingPadding", "EncryptedContent")
_UIDS = re.compile(r"[0-2](?:\.\d+){4,}")
# What stands for nobody's name in many files.
_NOBODY = frozenset({"none", "unknown", "removed", "name", "patient", "test", "phantom", "series"})


def _header(content: bytes) -> FileDataset | None:
    """The header of an object or of a DICOMDIR; None for what is neither."""
    try:
        header = dcmread(io.BytesIO(content), force=True)
    except Exception:  # noqa: BLE001
        # Parsers raise whatever the bytes of a broken file drive them to.
        return None
    return header if any(keyword in header for keyword in _OF_OBJECTS) else None


@cache
def _terms() -> frozenset[str]:
    return common_words() | maker_words() | class_words()


def _is_telling(value: str) -> bool:
    """Whether a value has a word or number in it that is no term."""
    words = [word for word in LETTERS.findall(value) if len(word) >= SHORTEST]
    return any(word not in _terms() for word in words) or bool(_DIGITS.search(value))


def _values(element: DataElement) -> Iterator[Any]:
    value = element.value
    if isinstance(value, MultiValue | list | tuple):
        yield from value
    elif value is not None:
        yield value


def _as_dates(text: str) -> Iterator[str]:
    """Year, month and day of a date in a text, in either order of day and month."""
    digits = re.findall(r"\d+", text)
    if len(digits) == 1 and len(digits[0]) == 8:
        yield digits[0]
    elif len(digits) == 3 and len(digits[0]) == 4:
        yield "".join(part.zfill(2) for part in digits)
    elif len(digits) == 3 and len(digits[2]) == 4:
        first, second, year = digits[0].zfill(2), digits[1].zfill(2), digits[2]
        yield from {year + second + first, year + first + second}


def identities_of(
    source: Path, progress: Callable[[int, int], None] = lambda _done, _total: None
) -> Identities:
    """Everything in a source that may identify somebody.

    Args:
        source: a folder, a ZIP or one file: what was taken in.
        progress: told how many files are done, of how many.

    Raises:
        DataError: if there is no such source, or nothing in it.
    """
    files = [source] if source.is_file() else sorted(_files(source))
    if not files:
        raise DataError(f"{source}: nothing is there; expected what the cohort was made from")
    found = Identities()
    for number, path in enumerate(files, 1):
        name = path.name if path == source else str(path.relative_to(source))
        found.add_file(_content(path), name)
        progress(number, len(files))
    return found


def _files(folder: Path) -> Iterator[Path]:
    for path in folder.rglob("*"):
        if path.is_file():
            yield path


def _content(path: Path) -> bytes:
    """Its bytes, up to a limit; what cannot be read says nothing but its name."""
    try:
        with path.open("rb") as file:
            return file.read(_MOST)
    except OSError:
        return b""
