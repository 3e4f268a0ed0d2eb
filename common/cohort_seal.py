"""A cohort sealed at rest: what is on the disk, and what each piece of it is bound to.

``images.sealed``
    one piece of fixed length an image (`common.sealed`, `OVERHEAD` bytes more than its pixels),
    bound to cohort, row and the SHA-256 that the index has of it: rows cannot be swapped, nor
    images moved between cohorts, nor an older version of one put back under a newer index.
``index.sealed``
    the whole SQLite index in pieces, each bound to cohort, number and how many there are.
``sealed.json``
    plain: format, the cohort's random number, and which key (`key_id`); nothing else.

The site's key itself seals nothing: each cohort has a key of its own, derived from it.
"""

from __future__ import annotations

import hmac
import json
import re
import secrets
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from common.errors import CohortError
from common.sealed import KEY_BYTES, OVERHEAD, Seal

SEALED_FORMAT = 2
SEALED_INDEX = "index.sealed"
SEALED_IMAGES = "images.sealed"
SEAL_FILE = "sealed.json"
_INDEX_PIECE = 1 << 24
_LONGEST_SEAL_FILE = 4096
_IDENTIFIER = re.compile(r"[0-9a-f]{32}")


@dataclass(frozen=True)
class CohortSeal:
    """Seals and opens the parts of one cohort.

    Args:
        key: the site's key for cohorts, 32 bytes; it never appears in `repr`.
        cohort: 32 hexadecimal digits, random, the cohort's own.

    Raises:
        CohortError: if one of them has another length.
    """

    key: bytes = field(repr=False)
    cohort: str

    def __post_init__(self) -> None:
        if len(self.key) != KEY_BYTES or not _IDENTIFIER.fullmatch(self.cohort):
            raise CohortError(
                f"a key of {len(self.key)} bytes for the cohort {self.cohort!r}; expected "
                f"{KEY_BYTES} bytes, and 32 hexadecimal digits"
            )
        own = hmac.digest(self.key, f"cloister cohort key 1 {self.cohort}".encode(), "sha256")
        object.__setattr__(self, "_seal", Seal(own))

    @classmethod
    def new(cls, key: bytes) -> Self:
        """For a cohort that is about to be made."""
        return cls(key, secrets.token_hex(16))

    @classmethod
    def of(cls, folder: Path, key: bytes | None) -> Self:
        """For the sealed cohort in `folder`.

        Raises:
            CohortError: if there is no key, or another one sealed it, or the folder does not say.
        """
        cohort, expected = _read_seal_file(folder / SEAL_FILE)
        if key is None:
            raise CohortError(
                f"{folder}: sealed under the key {expected}; expected the file of that key: "
                "[intake.encryption] in a node's node.toml names it, and the commands that take a "
                "sealed cohort have `--node` and `--cohort-key`"
            )
        seal = cls(key, cohort)
        if not hmac.compare_digest(key_id(key), expected):
            raise CohortError(
                f"{folder}: sealed under the key {expected}, given was the key {key_id(key)}; "
                "expected the key file that was in use when the cohort was taken in"
            )
        return seal

    @property
    def content(self) -> bytes:
        """What ``sealed.json`` says."""
        said = {"format": SEALED_FORMAT, "cohort": self.cohort, "key": key_id(self.key)}
        return json.dumps(said).encode() + b"\n"

    def close_image(self, row: int, pixels: bytes, sha256: str) -> bytes:
        """The piece of one image; `sha256` is that of its pixels."""
        return self._pieces.close(pixels, self._image(row, sha256))

    def open_image(self, row: int, piece: bytes, sha256: str) -> bytes:
        """The pixels of image `row`, of which the index has `sha256`.

        Raises:
            SealError: if they are not what was sealed for that row.
        """
        return self._pieces.open(piece, self._image(row, sha256))

    def close_index(self, content: bytes) -> bytes:
        """All pieces of the index, one after another."""
        parts = _parts(content, _INDEX_PIECE)
        return b"".join(
            self._pieces.close(part, self._index(number, len(parts)))
            for number, part in enumerate(parts)
        )

    def open_index(self, sealed: bytes) -> bytes:
        """The index.

        Raises:
            SealError: if it is not what was sealed, whole.
        """
        parts = _parts(sealed, _INDEX_PIECE + OVERHEAD)
        return b"".join(
            self._pieces.open(part, self._index(number, len(parts)))
            for number, part in enumerate(parts)
        )

    @property
    def _pieces(self) -> Seal:
        seal: Seal = self._seal  # type: ignore[attr-defined]
        return seal

    def _image(self, row: int, sha256: str) -> str:
        return f"cohort {self.cohort} image {row} {sha256}"

    def _index(self, number: int, of: int) -> str:
        return f"cohort {self.cohort} index, piece {number + 1} of {of}"


def key_id(key: bytes) -> str:
    """16 hexadecimal digits that tell one key from another, and nothing else of it."""
    return hmac.digest(key, b"cloister cohort key 1: which key", "sha256")[:8].hex()


def _parts(content: bytes, length: int) -> list[bytes]:
    """`content` cut up; at least one part, so that nothing at all is a piece as well."""
    return [content[at : at + length] for at in range(0, len(content) or 1, length)]


def _read_seal_file(file: Path) -> tuple[str, str]:
    """The cohort's number, and the key that is expected."""
    try:
        with file.open("rb") as opened:
            said = json.loads(opened.read(_LONGEST_SEAL_FILE))
        found, cohort, key = said["format"], said["cohort"], said["key"]
        sound = _IDENTIFIER.fullmatch(cohort) and re.fullmatch(r"[0-9a-f]{16}", key)
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise CohortError(f"{file}: cannot be read ({error}); put it back, or take in again") from (
            error
        )
    if found != SEALED_FORMAT or not sound or len(said) != 3:
        raise CohortError(
            f"{file}: format {found!r}; expected {SEALED_FORMAT}, and nothing but the cohort's "
            "number and the key's; put the file back, or take in again"
        )
    return cohort, key
