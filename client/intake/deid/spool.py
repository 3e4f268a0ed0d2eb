"""Pixel data on its way into a new object: in memory if it is small, else in a file without a name.

Such a file has no name from the start, so nothing is left of it, however the process ends.
"""

from __future__ import annotations

import io
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common.errors import IntakeError

Buffer = bytes | memoryview
_MOST_HELD = 2**24
"""Bytes in memory."""
_ITEM = b"\xfe\xff\x00\xe0"
_ITEM_HEAD = 8
_MOST_OFFSET = 2**32 - 1


class Spool:
    """Bytes in the order in which they come.

    Args:
        size: about how many there will be.
        folder: for the file; the system's for temporary files if not given.

    Raises:
        IntakeError: if the disk refuses.
    """

    def __init__(self, size: int, folder: Path | None) -> None:
        held = size <= _MOST_HELD
        with _told():
            # Open until nobody uses it any more: it is the value of an element then.
            self._file: Any = (
                io.BytesIO() if held else tempfile.TemporaryFile(dir=folder)  # noqa: SIM115
            )

    def write(self, data: Buffer) -> None:
        """Append bytes."""
        with _told():
            self._file.write(data)

    def value(self) -> io.BufferedIOBase:
        """All of it, from its beginning; with a byte more if its length is odd (PS3.5 8.2)."""
        if self._file.seek(0, io.SEEK_END) % 2:
            self.write(b"\0")
        with _told():
            self._file.seek(0)
        buffered: io.BufferedIOBase = self._file
        return buffered


class NativeSpool(Spool):
    """Frames uncompressed, little endian, colour by pixel (PS3.5 8.1, 8.2).

    Args:
        size: as of `Spool`.
        folder: as of `Spool`.
        packed: whether a sample is one bit; frames then follow each other without a gap.
    """

    def __init__(self, size: int, folder: Path | None, *, packed: bool) -> None:
        super().__init__(size, folder)
        self._packed = packed
        self._rest: NDArray[Any] = np.zeros(0, dtype=np.uint8)

    def add(self, frame: NDArray[Any]) -> None:
        """Append a frame."""
        if not self._packed:
            self.write(_little(frame))
            return
        bits = np.concatenate([self._rest, frame.ravel()])
        whole = len(bits) // 8 * 8
        self.write(np.packbits(bits[:whole], bitorder="little").tobytes())
        self._rest = bits[whole:]

    def value(self) -> io.BufferedIOBase:
        """See `Spool`."""
        self.write(np.packbits(self._rest, bitorder="little").tobytes())
        self._rest = self._rest[:0]
        return super().value()


class FrameSpool(Spool):
    """Compressed frames, each one fragment behind a basic offset table (PS3.5 A.4).

    Args:
        frames: how many there will be.
        size: as of `Spool`.
        folder: as of `Spool`.
    """

    def __init__(self, frames: int, size: int, folder: Path | None) -> None:
        super().__init__(size, folder)
        self._offsets: list[int] = []
        self._next = 0
        self._frames = frames
        self.write(_ITEM + (4 * frames).to_bytes(4, "little") + bytes(4 * frames))

    def add(self, frame: bytes) -> None:
        """Append a frame."""
        padded = frame + bytes(len(frame) % 2)
        self._offsets.append(self._next)
        self._next += _ITEM_HEAD + len(padded)
        self.write(_ITEM + len(padded).to_bytes(4, "little"))
        self.write(padded)

    def value(self) -> io.BufferedIOBase:
        """See `Spool`."""
        if len(self._offsets) == self._frames and self._offsets[-1] <= _MOST_OFFSET:
            self._file.seek(_ITEM_HEAD)
            self.write(np.array(self._offsets, dtype="<u4").tobytes())
        return super().value()


@contextmanager
def _told() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise IntakeError(
            f"its pixels cannot be put aside on the disk while it is read ({error.strerror})"
        ) from None


def _little(stored: NDArray[Any]) -> memoryview:
    return np.ascontiguousarray(stored, dtype=stored.dtype.newbyteorder("<")).data
