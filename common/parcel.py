"""Records as they travel: one object, and beside it their numbers in pieces where they are many.

Flower sends each record, each array and each chunk of an array as an object of its own, and each
costs a signed request. Here a message is as few of its objects as can be:

    the first    what the records are, without the numbers of their arrays; few numbers as well
    the others   4 MiB of the numbers each; the same ones for all to whom the same is sent

Nothing of a parcel is looked into before `Parcel.records`, which is for whoever may fail over it.
Each number travels once: no piece is named twice, so that few bytes cannot become many.
"""

from __future__ import annotations

import hashlib
import os
import struct
from collections.abc import Iterator, Mapping
from typing import NamedTuple, Self

from flwr.app import Array, ArrayRecord, RecordDict
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
from flwr.proto.message_pb2 import ObjectTree
from flwr.proto.recorddict_pb2 import RecordDict as RecordDictProto

from common.errors import MessageError

PIECE = 4 * 2**20
"""Bytes of numbers in a piece."""
FEW = 2**20
"""Bytes of numbers that travel in the first object."""

_FORM, _NONCE = b"parcel1\n", 16
_LENGTHS = struct.Struct(">III")  # of the outline, in bytes; of the arrays; of the pieces
_LENGTH, _NAME = struct.Struct(">Q"), hashlib.sha256().digest_size
_NUMBER = struct.Struct(">I")
_SALT = os.urandom(_NONCE)
"""Of this process's pieces: nobody can guess the name of one, and take it for something else."""


class Parcel(NamedTuple):
    """Records as they travel: objects in Flower's form, by their SHA-256.

    Attributes:
        identity: of the first one; no two parcels have the same.
        objects: all of them.
    """

    identity: str
    objects: dict[str, bytes]

    @classmethod
    def of(cls, records: RecordDict, pieces: Mapping[str, bytes] | None = None) -> Self:
        """Pack records.

        Args:
            records: they are left as they are.
            pieces: of the same arrays, where they are at hand (`pieces_of`).
        """
        pieces = pieces_of(records) if pieces is None else pieces
        arrays = [array.data for array in _arrays(records)]
        outline = _outline(records)
        first = _object(
            b"".join(
                (
                    *(_FORM, os.urandom(_NONCE)),
                    _LENGTHS.pack(len(outline), len(arrays), len(pieces)),
                    *(_LENGTH.pack(len(data)) for data in arrays),
                    *map(bytes.fromhex, pieces),
                    outline,
                    *(() if pieces else arrays),
                )
            )
        )
        identity = _name(first)
        return cls(identity, {identity: first, **pieces})

    @property
    def tree(self) -> ObjectTree:
        """What belongs to what, for Flower."""
        others = [ObjectTree(object_id=name) for name in self.objects if name != self.identity]
        return ObjectTree(object_id=self.identity, children=others)

    def outline(self) -> RecordDict:
        """The records without the numbers of their arrays.

        Raises:
            MessageError: if it holds anything else, or is damaged.
        """
        return _First.read(self.objects.get(self.identity, b"")).records

    def records(self) -> RecordDict:
        """Unpack them; the parcel is empty then.

        Raises:
            MessageError: if it holds anything else, or is damaged.
        """
        first = _First.read(self.objects.pop(self.identity, b""))
        if set(first.pieces) != set(self.objects) or len(first.pieces) != len(self.objects):
            raise MessageError(f"{len(self.objects)} pieces came, expected {len(first.pieces)}")
        numbers = _Numbers(first, self.objects)
        for array, length in zip(_arrays(first.records), first.lengths, strict=True):
            array.data = numbers.take(length)
        numbers.end()
        return first.records


def pieces_of(records: RecordDict) -> dict[str, bytes]:
    """The numbers of all arrays in pieces, by name and in order; empty where they are few."""
    arrays = [memoryview(array.data) for array in _arrays(records)]
    if sum(map(len, arrays)) <= FEW:
        return {}
    pieces = {}
    for number, parts in enumerate(_cut(arrays)):
        piece = _object(b"".join((_SALT, _NUMBER.pack(number), *parts)))
        pieces[_name(piece)] = piece
    return pieces


def _cut(arrays: list[memoryview]) -> Iterator[list[memoryview]]:
    """What each piece consists of."""
    parts: list[memoryview] = []
    room = PIECE
    for array in arrays:
        start = 0
        while start < len(array):
            parts.append(array[start : start + room])
            start += len(parts[-1])
            room -= len(parts[-1])
            if not room:
                yield parts
                parts, room = [], PIECE
    if parts:
        yield parts


class _First(NamedTuple):
    """The first object of a parcel, taken apart."""

    records: RecordDict
    lengths: list[int]
    pieces: list[str]
    numbers: bytes

    @classmethod
    def read(cls, content: bytes) -> Self:
        body = _body(content)
        if not body.startswith(_FORM):
            raise MessageError(f"a parcel that begins with {body[:8]!r}, expected {_FORM!r}")
        try:
            at = len(_FORM) + _NONCE
            outline, arrays, pieces = _LENGTHS.unpack_from(body, at)
            at += _LENGTHS.size
            ends = at + arrays * _LENGTH.size
            names = ends + pieces * _NAME
            if len(body) < names + outline:
                raise MessageError("a parcel that ends too soon")
            records = recorddict_from_proto(RecordDictProto.FromString(body[names:][:outline]))
        except MessageError:
            raise
        except Exception as error:
            # Whatever Flower's parsers raise on what a stranger sends.
            raise MessageError(f"not a message ({type(error).__name__}: {error!s:.200})") from error
        here = _arrays(records)
        if len(here) != arrays or any(array.data for array in here):
            raise MessageError(f"a parcel of {arrays} arrays, expected {len(here)} without numbers")
        return cls(
            records,
            [length for (length,) in _LENGTH.iter_unpack(body[at:ends])],
            [body[start : start + _NAME].hex() for start in range(ends, names, _NAME)],
            body[names + outline :],
        )


class _Numbers:
    """The numbers of a parcel, taken from it in order; what is taken is there no more."""

    def __init__(self, first: _First, objects: dict[str, bytes]) -> None:
        self._left = self._all(first, objects)
        self._rest = memoryview(b"")

    def take(self, length: int) -> bytes:
        parts = []
        while length:
            if not self._rest:
                self._rest = next(self._left, memoryview(b""))
            if not self._rest:
                raise MessageError(f"{length} bytes of an array's numbers are missing")
            parts.append(self._rest[:length])
            self._rest = self._rest[length:]
            length -= len(parts[-1])
        return b"".join(parts)

    def end(self) -> None:
        if self._rest or next(self._left, None) is not None:
            raise MessageError("more numbers than the arrays have")

    @staticmethod
    def _all(first: _First, objects: dict[str, bytes]) -> Iterator[memoryview]:
        if first.numbers:
            yield memoryview(first.numbers)
        for number, name in enumerate(first.pieces):
            body = _body(objects.pop(name))[_NONCE:]
            if body[: _NUMBER.size] != _NUMBER.pack(number) or len(body) == _NUMBER.size:
                raise MessageError(f"piece {number} of a parcel is another one, or empty")
            yield memoryview(body)[_NUMBER.size :]


def _arrays(records: RecordDict) -> list[Array]:
    held = [record for record in records.values() if isinstance(record, ArrayRecord)]
    return [array for record in held for array in record.values()]


def _outline(records: RecordDict) -> bytes:
    bare = RecordDict()
    for name, record in records.items():
        bare[name] = record
        if isinstance(record, ArrayRecord):
            bare[name] = ArrayRecord(
                {key: Array(a.dtype, a.shape, a.stype, b"") for key, a in record.items()}
            )
    return bytes(recorddict_to_proto(bare).SerializeToString())


def _object(body: bytes) -> bytes:
    """Bytes in Flower's form, which its store checks: kind, children, length; NUL; the bytes."""
    return b"ArrayChunk  %d\0%b" % (len(body), body)


def _body(content: bytes) -> bytes:
    return content.partition(b"\0")[2]


def _name(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
