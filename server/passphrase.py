"""The authority's private key at rest: under a key that scrypt draws from a passphrase.

scrypt (RFC 7914) takes 128 MiB and about a third of a second for each guess. The file says with
which cost it was made, so that a later version may ask for more.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import unicodedata
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Base64Bytes, Field, ValidationError

from common import certificates
from common.certificates import PrivateKey
from common.errors import ConfigError, SealError
from common.sealed import Seal
from common.spec import Section

LEAST_PASSPHRASE = 16
_COST = 17  # of scrypt: N = 2^17
_LABEL = "authority's key"


class _SealedKey(Section):
    """``ca.key``: `cost` is the logarithm of scrypt's N; r is 8, p is 1."""

    format: Literal["cloister authority key 1"] = "cloister authority key 1"
    cost: Annotated[int, Field(ge=14, le=20)]
    salt: Base64Bytes
    sealed: Base64Bytes


def check_passphrase(passphrase: str) -> None:
    """Check that a passphrase is one.

    Raises:
        ConfigError: if it is too short.
    """
    if len(passphrase) < LEAST_PASSPHRASE:
        raise ConfigError(
            f"a passphrase of {len(passphrase)} characters; expected {LEAST_PASSPHRASE} or more, "
            "such as five words drawn by lot"
        )


def sealed_key(key: PrivateKey, passphrase: str) -> bytes:
    """The file of a key, sealed under a passphrase."""
    salt = os.urandom(16)
    sealed = _seal(passphrase, salt, _COST).close(certificates.key_pem(key), _LABEL)
    fields = {
        "format": "cloister authority key 1",
        "cost": _COST,
        "salt": base64.b64encode(salt).decode(),
        "sealed": base64.b64encode(sealed).decode(),
    }
    return json.dumps(fields, indent=1).encode() + b"\n"


def open_key(content: bytes, passphrase: str, path: Path) -> PrivateKey:
    """The key in the content of the file `path`.

    Raises:
        ConfigError: if the passphrase is another one, or the file was changed or is another.
    """
    try:
        held = _SealedKey.model_validate_json(content)
    except ValidationError as error:
        raise ConfigError(
            f"{path}: not the key of an authority ({error.errors()[0]['msg']}); put it back from "
            "a copy"
        ) from None
    try:
        pem = _seal(passphrase, held.salt, held.cost).open(held.sealed, _LABEL)
    except SealError:
        raise ConfigError(f"{path}: another passphrase, or the file was changed") from None
    return certificates.private_key(pem, path)


def _seal(passphrase: str, salt: bytes, cost: int) -> Seal:
    # A keyboard may send an accent by itself, another one the letter with it.
    typed = unicodedata.normalize("NFC", passphrase).encode("utf-8", "surrogateescape")
    drawn = hashlib.scrypt(typed, salt=salt, n=2**cost, r=8, p=1, maxmem=2**31 - 1, dklen=32)
    return Seal(drawn)
