"""Witnesses: how far a ledger went, told to someone who will remember it.

Entries that were cut off at the end of a ledger leave no trace in it, and neither does an older
copy that was put back. A witness is the number of an entry and the head of the chain there, under
the node's key: whoever shows it later proves that the ledger once led there. The node adds one to
a file after each booking, and the coordinator gives back the last one that it saw. A whole machine
that is put back in time is found by a witness outside the machine alone.
"""

from __future__ import annotations

import hmac
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, NamedTuple

from client.chain import UNWRITABLE, Mac
from client.keyfile import NodeKey
from common.errors import LedgerError

_TOKEN = re.compile(r"([1-9][0-9]{0,17}):([0-9a-f]{64}):[0-9a-f]{64}")
_LINE = re.compile(rb"([1-9][0-9]{0,17}):[0-9a-f]{64}:[0-9a-f]{64}")
_BLOCK, _LONGEST = 1 << 20, 256  # bytes read at once; no token is as long as the second


class Witness(NamedTuple):
    """How far a ledger went: the number of its last entry, and the head there."""

    number: int
    head: str


class Witnesses:
    """Makes and knows the witnesses of one node's key."""

    def __init__(self, key: NodeKey) -> None:
        self._mac = Mac(key.derive("ledger witness"))

    def token(self, witness: Witness) -> str:
        """The witness as text, sealed: ``number:head:MAC``."""
        return f"{witness.number}:{witness.head}:{self._mac.of(witness.head, witness[:1])}"

    def parsed(self, token: str) -> Witness | None:
        """The witness in a token; None if this node did not make it."""
        found = _TOKEN.fullmatch(token)
        if found is None:
            return None
        witness = Witness(int(found[1]), found[2])
        return witness if hmac.compare_digest(self.token(witness), token) else None


def genuine(key: NodeKey, tokens: Iterable[str]) -> list[Witness]:
    """Those of `tokens` that the node with this key made, as they were read."""
    witnesses = Witnesses(key)
    return [witness for token in tokens if (witness := witnesses.parsed(token))]


def last_witnesses(path: Path, most: int = 100) -> list[str]:
    """The last lines of a witness file; none if it is not there or cannot be read."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - most * 160))
            return file.read().decode("ascii", "replace").splitlines()[-most:]
    except OSError:
        return []


def highest_witnesses(path: Path, key: NodeKey) -> list[Witness]:
    """The genuine witnesses with the highest number in a whole file; none if it is not there.

    Whoever can only add lines cannot hide one, with however many old or invented ones. Numbers
    that go down again are no fault: processes that book at once write out of turn. There is more
    than one such witness only where a ledger was forked.
    """
    witnesses, best = Witnesses(key), 0
    found: set[Witness] = set()
    for number, token in _backwards(path):  # the highest is near the end, few others are checked
        if number < best:
            continue
        witness = witnesses.parsed(token.decode())
        if witness is not None:
            found = found | {witness} if number == best else {witness}
            best = number
    return sorted(found)


def highest_number(path: Path, below: int) -> int:
    """The highest number `below` another that any line has, genuine or not; 0 for none."""
    return max((number for number, _ in _backwards(path) if number < below), default=0)


def _backwards(path: Path) -> Iterator[tuple[int, bytes]]:
    """Whatever looks like a token, with its number, from the last line to the first."""
    for line in _lines_backwards(path):
        found = _LINE.fullmatch(line)
        if found is not None:
            yield int(found[1]), line


def _lines_backwards(path: Path) -> Iterator[bytes]:
    """The lines of a file from the end; no more than two blocks of it are held at once."""
    try:
        with path.open("rb") as file:
            position, rest = file.seek(0, os.SEEK_END), b""
            while position > 0:
                begin = max(0, position - _BLOCK)
                file.seek(begin)
                lines = (file.read(position - begin) + rest).splitlines()
                position, rest = begin, lines[0][-_LONGEST:]  # its beginning may lie before
                yield from reversed(lines[1:])
            yield rest
    except OSError:
        return


def check_writable(path: Path) -> None:
    """See that lines can be added to a witness file.

    Raises:
        LedgerError: if not.
    """
    with _adding(path):
        pass


def add_witness(path: Path, token: str) -> None:
    """Add a line to a witness file.

    It is not flushed to the disk: the entries are there before it, what a power failure takes of
    it is told again when the ledger is next opened, and a flush is half of what a booking costs.

    Raises:
        LedgerError: if it cannot be written.
    """
    with _adding(path) as file:
        end = file.seek(0, os.SEEK_END)
        file.seek(max(0, end - 1))
        torn = file.read(1) not in (b"", b"\n")  # a full disk cut the last one short
        file.write((b"\n" if torn else b"") + token.encode() + b"\n")


@contextmanager
def _adding(path: Path) -> Iterator[IO[bytes]]:
    try:
        with open(path, "a+b", opener=_private) as file:
            yield file
    except OSError as error:
        raise LedgerError(
            f"{path}: the witness {UNWRITABLE} ({error}); mend the disk or the mount, or "
            "name another file in node.toml, [ledger] witness"
        ) from error


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)
