"""Releases, kept encrypted until their run is over: the same task, the same bytes."""

from __future__ import annotations

import os
import re
from collections.abc import Collection
from hashlib import sha256
from pathlib import Path

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from client.keyfile import NodeKey
from common.errors import Refusal, RefusalCode
from common.files import write_durably

_FORMAT = b"CLREL1"
_NONCE = 12
_OURS = re.compile(r"([0-9]{8,})\.sealed(\.[0-9]+\.partial)?")


class KeptReleases:
    """The releases in `folder`, by the number of their attempt, under the node's key (AES-256-GCM).

    Each is bound to its attempt and to its content: no file can stand in for another.
    """

    def __init__(self, folder: Path, key: NodeKey) -> None:
        self._folder = folder
        self._cipher = AESGCM(key.derive("release at rest"))

    def put(self, attempt: int, release: bytes) -> str:
        """Keep the release of an attempt durably; returns its SHA-256.

        Raises:
            OSError: if it cannot be written; then nothing of it is left.
        """
        digest, nonce = sha256(release).hexdigest(), os.urandom(_NONCE)
        sealed = self._cipher.encrypt(nonce, release, _label(attempt, digest))
        self._folder.mkdir(mode=0o700, exist_ok=True)
        write_durably(self._path(attempt), _FORMAT + nonce + sealed)
        return digest

    def get(self, attempt: int, digest: str) -> bytes:
        """The release of `attempt` whose SHA-256 is `digest`.

        Raises:
            Refusal: ``replay`` if it is no longer kept, or not as it was put there.
        """
        try:
            content = self._path(attempt).read_bytes()
        except FileNotFoundError:
            raise Refusal(RefusalCode.REPLAY, "that release is no longer kept") from None
        start = len(_FORMAT)
        nonce, sealed = content[start : start + _NONCE], content[start + _NONCE :]
        try:
            if content[:start] != _FORMAT:
                raise ValueError(f"begins with {content[:start]!r}, expected {_FORMAT!r}")
            return self._cipher.decrypt(nonce, sealed, _label(attempt, digest))
        except (InvalidTag, ValueError) as error:
            path = self._path(attempt)
            raise Refusal(RefusalCode.REPLAY, f"{path}: damaged ({error!r})") from None

    def drop(self, attempts: Collection[int]) -> None:
        """Forget these, and what a crash left of writing them; other files stay."""
        for path in self._folder.glob("*.sealed*"):
            found = _OURS.fullmatch(path.name)
            if found and int(found[1]) in attempts:
                path.unlink(missing_ok=True)

    def _path(self, attempt: int) -> Path:
        return self._folder / f"{attempt:08d}.sealed"


def _label(attempt: int, digest: str) -> bytes:
    return f"{attempt} {digest}".encode()
