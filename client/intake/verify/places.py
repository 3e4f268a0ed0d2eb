"""What lies in a folder: databases, texts, archives, pixels, and bytes of any other kind."""

from __future__ import annotations

import base64
import gzip
import io
import re
import sqlite3
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import closing
from typing import NamedTuple

_SQLITE, _ZIP, _GZIP, _PDF = b"SQLite format 3\0", b"PK\x03\x04", b"\x1f\x8b\x08", b"%PDF"
_RUN = re.compile(rb"(?:[\t\x20-\x7e]|[\xc3-\xdf][\x80-\xbf]){8,}")
_LONG_RUN = re.compile(rb"(?:[\t\x20-\x7e]|[\xc3-\xdf][\x80-\xbf]){24,}")
_SAMPLE = 2**16
_WIDE_RUN = re.compile(rb"(?:[\x20-\x7e\xa0-\xff]\0){6,}")
_BASE64 = re.compile(r"(?<![\w+/=])[A-Za-z0-9+/]{24,}={0,2}(?![\w+/=])")
_STREAM = re.compile(rb"stream\r?\n(.*?)endstream", re.DOTALL)
# Bytes that say that the newest pages stand in another file; they are searched as that file.
_JOURNAL_MODE = 18
_MOST = 2**31
_DEEPEST = 3
_HEX = re.compile(r"[0-9a-f]+")
_PSEUDONYMS = ("patient", "study", "series", "instance")


class Text(NamedTuple):
    """A text of a file: where it stands, in words and from which byte, and what it is.

    ``pseudonym`` is whether nothing but a pseudonym may stand there, ``is_between`` whether it is
    what of other bytes looks like a text.
    """

    where: str
    offset: int
    text: str
    pseudonym: bool = False
    is_between: bool = False


class Content(NamedTuple):
    """What one file holds: its texts, and its bytes as they are."""

    texts: Iterator[Text]
    data: bytes
    is_text: bool


def content_of(data: bytes, *, is_index: bool = False) -> Content:
    """What the bytes of a file hold, by their own first bytes and not by its name.

    Args:
        data: the bytes.
        is_index: whether they are said to be the index of a cohort.
    """
    if data.startswith(_SQLITE):
        return Content(_cells(data, is_index=is_index), data, is_text=False)
    if data.startswith(_PDF):
        return Content(_document(data), data, is_text=False)
    text = _as_text(data)
    if text is None:
        return Content(runs(data), data, is_text=False)
    return Content(_text_and_encoded(text), data, is_text=True)


def members(data: bytes, depth: int = 0) -> Iterator[tuple[str, bytes]]:
    """Name and bytes of each file in an archive; none if it is no archive.

    An archive within an archive is opened, too, up to three of them.
    """
    if depth >= _DEEPEST:
        return
    if data.startswith(_GZIP):
        yield "", _unzipped(data)
    elif data.startswith(_ZIP):
        try:
            with zipfile.ZipFile(io.BytesIO(data)) as archive:
                for entry in archive.infolist():
                    if not entry.is_dir() and entry.file_size < _MOST:
                        yield entry.filename, archive.read(entry)
        except (zipfile.BadZipFile, OSError, RuntimeError, NotImplementedError, ValueError):
            return


def _unzipped(data: bytes) -> bytes:
    try:
        return gzip.GzipFile(fileobj=io.BytesIO(data)).read(_MOST)
    except (OSError, EOFError, zlib.error):
        return b""


def _as_text(data: bytes) -> str | None:
    if b"\0" in data[:4096]:
        return None
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return None


def _text_and_encoded(text: str) -> Iterator[Text]:
    yield Text("text", 0, text)
    for match in _BASE64.finditer(text):
        decoded = _decoded(match[0])
        for run in _RUN.finditer(decoded):
            yield _between("text in base64", match.start(), run[0])


def _between(where: str, offset: int, run: bytes, encoding: str = "utf-8") -> Text:
    return Text(where, offset, run.decode(encoding, "replace"), is_between=True)


def _decoded(text: str) -> bytes:
    if _HEX.fullmatch(text):
        return b""
    try:
        return base64.b64decode(text + "=" * (-len(text) % 4))
    except ValueError:
        return b""


def runs(data: bytes) -> Iterator[Text]:
    """Texts between other bytes, in one byte a letter or in two.

    Bytes that are sealed or compressed have short texts by chance.
    """
    for match in (_LONG_RUN if _is_noise(data) else _RUN).finditer(data):
        yield _between("text between bytes", match.start(), match[0])
    for match in _WIDE_RUN.finditer(data):
        yield _between("text in UTF-16", match.start(), match[0], "utf-16-le")


def _is_noise(data: bytes) -> bool:
    """Whether bytes cannot be made fewer, as those that are sealed."""
    sample = data[:_SAMPLE]
    return len(zlib.compress(sample, 1)) >= len(sample)


def _document(data: bytes) -> Iterator[Text]:
    """A PDF's texts, those of its compressed streams too; its letters may stand apart."""
    yield from runs(data)
    for match in _STREAM.finditer(data):
        inflater = zlib.decompressobj()
        try:
            inflated = inflater.decompress(match[1], _MOST)
        except zlib.error:
            continue
        for run in _RUN.finditer(inflated):
            yield _between("text in a stream", match.start(1), run[0])


def _cells(data: bytes, *, is_index: bool) -> Iterator[Text]:
    """Every cell of every table of a database, as it lies there; of a damaged one its texts."""
    settled = data[:_JOURNAL_MODE] + b"\1\1" + data[_JOURNAL_MODE + 2 :]
    try:
        with closing(sqlite3.connect(":memory:")) as database:
            database.deserialize(settled)
            database.text_factory = lambda raw: raw.decode("utf-8", "replace")
            names = database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")
            for (name,) in names.fetchall():
                yield from _rows(database, str(name), is_index=is_index)
    except sqlite3.Error:
        yield from runs(data)


def _of_blob(cell: bytes) -> Iterator[Text]:
    text = _as_text(cell)
    if text is not None and text.isprintable():
        yield Text("", 0, text)
    else:
        yield from runs(cell)


def _rows(database: sqlite3.Connection, table: str, *, is_index: bool) -> Iterator[Text]:
    quoted = '"' + table.replace('"', '""') + '"'
    rows = database.execute(f"SELECT * FROM {quoted}")  # noqa: S608
    columns = [column[0] for column in rows.description]
    for row in rows:
        for column, cell in zip(columns, row, strict=True):
            where = f"table {table}, column {column}"
            if isinstance(cell, str):
                keyed = is_index and table == "image" and column in _PSEUDONYMS
                yield Text(where, 0, cell, pseudonym=keyed)
            elif isinstance(cell, bytes):
                yield from (text._replace(where=where) for text in _of_blob(cell))
