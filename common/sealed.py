"""Bytes at rest that only the holder of a key can read, and nobody can change unseen.

AES-256-GCM (NIST SP 800-38D) with a random nonce for each piece. A piece is bound to a label that
says what it is: one piece cannot stand in for another.
"""

from __future__ import annotations

import os

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from common.errors import SealError

KEY_BYTES = 32
_NONCE = 12
OVERHEAD = _NONCE + 16
"""Bytes by which a sealed piece is longer than its content."""


class Seal:
    """Closes and opens pieces under one key.

    Args:
        key: 32 bytes, used for nothing else.

    Raises:
        ValueError: if it has another length.
    """

    def __init__(self, key: bytes) -> None:
        if len(key) != KEY_BYTES:
            raise ValueError(f"a key of {len(key)} bytes; expected {KEY_BYTES}")
        self._cipher = AESGCM(key)

    def close(self, content: bytes, label: str) -> bytes:
        """Seal `content`; it can be opened under the same label alone."""
        nonce = os.urandom(_NONCE)
        return nonce + self._cipher.encrypt(nonce, content, label.encode())

    def open(self, sealed: bytes, label: str) -> bytes:
        """What was sealed.

        Raises:
            SealError: if it was changed, or sealed under another key or label; nothing tells which.
        """
        try:
            return self._cipher.decrypt(sealed[:_NONCE], sealed[_NONCE:], label.encode())
        except (InvalidTag, ValueError) as error:
            raise SealError(
                f"{label}: cannot be opened: it is damaged, or another key sealed it; expected "
                "the key that was in use when it was written"
            ) from error
