"""Randomness for privacy: one keystream, whose key decides how far it protects.

`Keystream` is ChaCha20 (RFC 8439) read as random bits. A node makes one for each attempt with
`Keystream.fresh`, keyed by the operating system *after* any fork; the simulation and tests hand
in `Keystream.seeded`, where a person wants the same run twice. The arithmetic is the same; only
the key differs, so what the simulation tests is what the node runs. Nothing but a constructor
chooses between the two: no flag, variable, setting or message (docs/privacy.md 4).

Noise is Box-Muller in float64: the guarantee is for real arithmetic, and the keystream is
hardening against a guessable generator, not a proof about floating point.
"""

from __future__ import annotations

import hashlib
import hmac
import os
from typing import Protocol

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
from numpy.typing import NDArray

from common.errors import CloisterError

_CHUNK = 1 << 18


class ForkedKeystreamError(CloisterError):
    """A keystream was used in another process than the one that made it."""


class Keystream:
    """Random bits from one 256-bit key; never the same bits twice.

    Two children of one parent would draw the same bits, and their noise would cancel. So a
    keystream refuses to be used in any process but its own, and cannot be pickled.
    """

    def __init__(self, key: bytes) -> None:
        if len(key) != 32:
            raise ValueError(f"a key of {len(key)} bytes; expected 32")
        self._key = key
        self._process = os.getpid()
        self._cipher = Cipher(algorithms.ChaCha20(key, bytes(16)), mode=None).encryptor()

    @classmethod
    def fresh(cls) -> Keystream:
        """A stream that nobody can predict: keyed by the operating system, now."""
        return cls(os.urandom(32))

    @classmethod
    def seeded(cls, seed: int, *labels: str | int) -> Keystream:
        """A stream that can be drawn again. It protects nobody from who knows the seed."""
        text = "\x1f".join(["cloister seeded keystream", str(seed), *map(str, labels)])
        return cls(hashlib.sha256(text.encode()).digest())

    def derive(self, purpose: str) -> Keystream:
        """An independent stream for one purpose, by HMAC-SHA-256 of the key."""
        self._check_process()
        return Keystream(hmac.digest(self._key, purpose.encode(), "sha256"))

    def __reduce__(self) -> str:
        raise ForkedKeystreamError("a keystream stays in its process: it cannot be pickled")

    def words(self, count: int) -> NDArray[np.uint64]:
        """`count` uniform 64-bit words."""
        self._check_process()
        return np.frombuffer(self._cipher.update(bytes(8 * count)), dtype="<u8")

    def uniform(self, count: int) -> NDArray[np.float64]:
        """`count` numbers in [0, 1), multiples of 2^-53."""
        return (self.words(count) >> np.uint64(11)).astype(np.float64) * 2.0**-53

    def gaussian(self, count: int) -> NDArray[np.float64]:
        """`count` independent standard normal numbers, by Box-Muller."""
        drawn = np.empty(count + count % 2)
        for start in range(0, len(drawn), _CHUNK):
            part = drawn[start : start + _CHUNK]
            first, second = self.uniform(len(part)).reshape(2, -1)
            radius = np.sqrt(-2.0 * np.log1p(-first))
            part[: len(first)] = radius * np.cos(2.0 * np.pi * second)
            part[len(first) :] = radius * np.sin(2.0 * np.pi * second)
        return drawn[:count]

    def below(self, bounds: NDArray[np.int64]) -> NDArray[np.int64]:
        """For each bound b >= 1 a uniform integer in 0..b-1 (bias below b / 2^53)."""
        return np.minimum((self.uniform(len(bounds)) * bounds).astype(np.int64), bounds - 1)

    def seed(self) -> int:
        """A 63-bit seed for a generator that needs no secrecy (augmentation, dropout)."""
        return int(self.words(1)[0] >> np.uint64(1))

    def _check_process(self) -> None:
        if os.getpid() != self._process:
            raise ForkedKeystreamError(
                f"this keystream was made in process {self._process} and used in {os.getpid()}; "
                "make it after the fork"
            )


class KeystreamSource(Protocol):
    """Gives the keystream of one attempt at one task; called in the process that trains."""

    def __call__(self, *, run_id: str, round_number: int) -> Keystream:
        """The keystream of one attempt at `round_number` of the run."""

    def __hash__(self) -> int:
        """A source stands for itself: what is opened with one is kept by it."""


def fresh_keystream(*, run_id: str, round_number: int) -> Keystream:
    """The source of every node: a new unpredictable key for each attempt, whatever the task."""
    return Keystream.fresh()
