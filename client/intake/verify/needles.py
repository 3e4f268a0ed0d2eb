"""Many strings looked for at once, in time that grows with what is searched and not with them.

Every string has at least as many bytes as a window. Of each place the bytes in the window are
looked up in a table of hashes, then among the strings' first bytes, and only then compared.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from functools import cached_property
from typing import Literal

import numpy as np
from numpy.typing import NDArray

_FACTOR = np.uint64(0x9E3779B97F4A7C15)
_TABLE_BITS = 20
_CHUNK = 2**22


class Needles:
    """A set of byte strings to look for, in any case of ASCII letters.

    Args:
        strings: those shorter than the window are left out.
        window: bytes of each string that are compared first.
    """

    def __init__(self, strings: Iterable[bytes], window: Literal[4, 8]) -> None:
        self._window = window
        folded = {string.lower() for string in strings if len(string) >= window}
        self._strings = frozenset(folded)
        self._lengths: defaultdict[int, set[int]] = defaultdict(set)
        for string in folded:
            self._lengths[int.from_bytes(string[:window], "little")].add(len(string))
        self._longest = max(map(len, folded), default=0)

    def __len__(self) -> int:
        return len(self._strings)

    @cached_property
    def _keys(self) -> NDArray[np.uint64]:
        return np.array(sorted(self._lengths), dtype=np.uint64)

    @cached_property
    def _table(self) -> NDArray[np.bool_]:
        table = np.zeros(2**_TABLE_BITS, dtype=np.bool_)
        table[_hashed(self._keys)] = True
        return table

    def _is_key(self, values: NDArray[np.uint64]) -> NDArray[np.bool_]:
        keys = self._keys
        nearest = np.minimum(np.searchsorted(keys, values), len(keys) - 1)
        equal: NDArray[np.bool_] = keys[nearest] == values
        return equal

    def find(self, data: bytes) -> Iterator[tuple[int, bytes]]:
        """Offset and string of every occurrence, overlapping ones too; offsets ascend by chunk."""
        if not self._strings:
            return
        for start in range(0, len(data), _CHUNK):
            piece = data[start : start + _CHUNK + self._longest].lower()
            for at in self._candidates(piece):
                if at < _CHUNK:
                    yield from ((start + at, string) for string in self._at(piece, at))

    def _at(self, piece: bytes, at: int) -> Iterator[bytes]:
        key = int.from_bytes(piece[at : at + self._window], "little")
        for length in self._lengths.get(key, ()):
            string = piece[at : at + length]
            if string in self._strings:
                yield string

    def _candidates(self, piece: bytes) -> list[int]:
        """Places whose first bytes are those of a string."""
        found = []
        for shift in range(self._window):
            count = (len(piece) - shift) // self._window
            if count > 0:
                dtype = f"<u{self._window}"
                views = np.frombuffer(piece, dtype, count=count, offset=shift).astype(np.uint64)
                places = np.flatnonzero(self._table[_hashed(views)])
                if places.size:
                    exact = places[self._is_key(views[places])]
                    found.append(exact * self._window + shift)
        return sorted(int(at) for at in np.concatenate(found)) if found else []


def _hashed(keys: NDArray[np.uint64]) -> NDArray[np.int64]:
    hashed: NDArray[np.int64] = ((keys * _FACTOR) >> np.uint64(64 - _TABLE_BITS)).astype(np.int64)
    return hashed
