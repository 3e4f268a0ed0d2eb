"""What a source of images gives to the intake, whatever its format."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from client.intake.builder import ImageRecord, stored
from common.cohort import Unit


@dataclass(frozen=True)
class Kept:
    """One image, ready for a cohort: all that is carried over from the source.

    ``pixels`` has the run's shape, 0..65535; ``mask`` is (height, width) class numbers, where the
    run's task has masks.
    """

    record: ImageRecord
    pixels: NDArray[np.uint16]
    mask: NDArray[np.uint16] | None = None

    @property
    def stored(self) -> bytes:
        """The pixels as a cohort stores them, and the mask behind them."""
        return stored(self.pixels, self.mask)

    @property
    def sha256(self) -> str:
        """Of `stored`."""
        return hashlib.sha256(self.stored).hexdigest()


@dataclass(frozen=True)
class NotUsed:
    """Something of the source that is not in the cohort, for the hospital's own eyes only.

    ``what`` is a path within the source, or a line of the label table: it may well name a
    patient. It is shown and then forgotten.
    """

    what: str
    reason: str


@dataclass(frozen=True)
class Step:
    """What became of one file (or one other piece) of the source, named by `what`."""

    what: str
    images: tuple[Kept, ...] = ()
    not_used: tuple[NotUsed, ...] = ()


class Source(Protocol):
    """A source of images.

    Attributes:
        kind: its format in a word, stored in the cohort.
        unit: what its pseudonyms stand for; settled when `steps` has ended.
    """

    kind: str
    unit: Unit

    def __len__(self) -> int:
        """Steps to expect, for a progress bar."""

    def steps(self) -> Iterator[Step]:
        """Go through the source once, lazily; a step holds at most a few images.

        Raises:
            DataError: if the source as a whole cannot be used.
        """
