"""Pseudonyms: keyed, one domain for each kind of identifier.

A pseudonym is HMAC-SHA-256 under the site's key (RFC 2104), cut to 128 bits. Without the key
nobody can try identifiers against it, which a plain hash allows. Every kind of identifier has a
domain of its own, so equal texts of two kinds have unrelated pseudonyms.

By default the key is random and forgotten: two cohorts of one site share no pseudonym. Kept in a
file, it gives the same patient the same pseudonym in every cohort of the site; whoever holds that
file can recognise patients, so it is guarded as they are.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Self

from client.keyfile import KEY_BYTES, create_key, read_key
from common.errors import ConfigError

PSEUDONYM_BYTES = 16
MOST_SHIFTED = 3652
"""Days by which dates are shifted at most: ten years, either way."""
Domain = Literal["patient", "study", "series", "instance", "order", "item", "content", "label"]
_DerivedDomain = Literal["uid", "date shift", "derived key"]


@dataclass(frozen=True)
class SiteKey:
    """The secret of a site's pseudonyms.

    Args:
        secret: 32 random bytes; they never appear in `repr`.

    Raises:
        ConfigError: if it has another length.
    """

    secret: bytes = field(repr=False)

    def __post_init__(self) -> None:
        if len(self.secret) != KEY_BYTES:
            raise ConfigError(f"a site key has {KEY_BYTES} bytes; this one has {len(self.secret)}")

    @classmethod
    def random(cls) -> Self:
        """A new key from the operating system's cryptographic source."""
        return cls(secrets.token_bytes(KEY_BYTES))

    @classmethod
    def from_file(cls, path: Path) -> Self:
        """The key in `path`; on first use a random one is put there (hex, mode 0600).

        Raises:
            ConfigError: if others than the owner may read it, it holds no key, or none can be made.
        """
        create_key(path)
        return cls(read_key(path, "site key"))

    def pseudonym(self, domain: Domain, *parts: str) -> str:
        """32 hexadecimal digits for an identifier, given as its `parts` in order.

        The parts are encoded with their lengths: ``("a", "bc")`` and ``("ab", "c")`` differ.
        """
        return self._digest(domain, parts)[:PSEUDONYM_BYTES].hex()

    def uid(self, original: str) -> str:
        """The UID that stands for `original`: the same one wherever the original stands.

        It is an UUID in the form of PS3.5 B.2, of version 8 (RFC 9562 5.8).
        """
        digest = self._digest("uid", (original,))
        low = (int.from_bytes(digest[:16], "big") & ~(0xF << 76) | (8 << 76)) & ~(3 << 62)
        return f"2.25.{low | (2 << 62)}"

    def date_shift(self, *patient: str) -> int:
        """Days by which all dates of a patient move: uniform within `MOST_SHIFTED`, never 0.

        Whoever knows one true date of a patient knows the shift, and with it all the others.

        Args:
            patient: issuer and identifier, as for the pseudonym.
        """
        drawn = int.from_bytes(self._digest("date shift", patient), "big") % (2 * MOST_SHIFTED)
        return drawn - MOST_SHIFTED + (drawn >= MOST_SHIFTED)

    def derive(self, purpose: str) -> bytes:
        """32 bytes for one purpose; they say nothing of the key, nor of those for another."""
        return self._digest("derived key", (purpose,))

    def _digest(self, domain: Domain | _DerivedDomain, parts: tuple[str, ...]) -> bytes:
        message = [f"cloister pseudonym 1 {domain}".encode()]
        message += [part.encode("utf-8", "surrogatepass") for part in parts]
        framed = b"".join(len(piece).to_bytes(8, "big") + piece for piece in message)
        return hmac.new(self.secret, framed, hashlib.sha256).digest()
