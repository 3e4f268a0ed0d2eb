"""A sealed table of who each pseudonym stands for: the intake adds to it, and cannot read it.

Kept only where the hospital asks for it. Each record is sealed to a public key by HPKE (RFC 9180:
DHKEM(X25519, HKDF-SHA256), HKDF-SHA256, AES-256-GCM, mode base); the private key belongs to one
person, such as the data protection officer, and to another machine. So whoever takes over the
machine of the intake, with all its files and keys, learns nothing of the patients before.

The file is a header (format, and which public key) and records of one length, whoever they are of.
A record is opened by itself: one that was changed is lost alone. Nothing proves who wrote a record:
the public key is enough to add a false one.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

from cryptography.exceptions import InvalidTag, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.hpke import AEAD, KDF, KEM, Suite
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
    load_pem_public_key,
)

from common.errors import ConfigError, DataError, IntakeError, SealError

LEAST_PASSPHRASE = 16
_SUITE = Suite(KEM.X25519, KDF.HKDF_SHA256, AEAD.AES_256_GCM)
_INFO = b"cloister re-identification 1"
_CONTENT = 1024
_RECORD = 32 + _CONTENT + 16
_HEADER = re.compile(rb"cloister re-identification 1 ([0-9a-f]{32})\n")
_HEADER_BYTES = 29 + 32 + 1


class Identity(NamedTuple):
    """A patient as the source had it: who issued the identifier, or ``""``, and the identifier."""

    issuer: str
    patient: str


@dataclass(frozen=True)
class TableContent:
    """What the holder of the private key reads; it names patients.

    Attributes:
        identities: of each pseudonym, as they were added; more than one is a contradiction that a
            person has to look into.
        damaged: numbers of the records that cannot be opened, from 1.
        torn: whether the file ends within a record, as after a crash.
    """

    identities: Mapping[str, tuple[Identity, ...]]
    damaged: tuple[int, ...]
    torn: bool


class ReidentificationTable:
    """Adds to a table; use it as a context manager, or `close` it.

    Several processes may add to one table. What this process keeps in memory are pseudonyms.

    Args:
        path: the file; made if there is none.
        public_key: file of the public key, PEM.

    Raises:
        ConfigError: if there is no such key, or the table is another's, or cannot be opened.
    """

    def __init__(self, path: Path, public_key: Path) -> None:
        self._path = path
        self._key = _read_public(public_key)
        self._added: set[str] = set()
        self._descriptor = -1
        with self._writing():
            path.parent.mkdir(parents=True, exist_ok=True)
            flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW
            self._descriptor = os.open(path, flags, 0o600)
        try:
            self._begin()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def add(self, pseudonym: str, issuer: str, patient: str) -> None:
        """Add a patient, durably; one that this process has added already is not added again.

        Raises:
            IntakeError: if the identifier is longer than any that the standard allows.
            ConfigError: if the disk refuses; nothing of the record is left then.
        """
        if pseudonym in self._added:
            return
        record = _SUITE.encrypt(_packed(pseudonym, issuer, patient), self._key, _INFO)
        with self._writing(), self._alone() as size:
            end = size - (size - _HEADER_BYTES) % _RECORD
            if end < size:  # what a killed process had begun
                os.ftruncate(self._descriptor, end)
            self._put(record, end)
        self._added.add(pseudonym)

    def close(self) -> None:
        """Close the file; a second time does nothing."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def _begin(self) -> None:
        """Write the header of a new table, or check that the table is the same officer's."""
        ours = f"cloister re-identification 1 {_key_id(self._key)}\n".encode()
        with self._writing(), self._alone() as size:
            found = os.pread(self._descriptor, _HEADER_BYTES, 0)
            if size < _HEADER_BYTES and ours.startswith(found):  # new, or begun and killed
                os.ftruncate(self._descriptor, 0)
                self._put(ours, 0)
                found = ours
        if found != ours:
            raise ConfigError(
                f"{self._path}: not a table for the public key {_key_id(self._key)}; expected one, "
                "or no file: name another file for another officer's table"
            )

    @contextmanager
    def _alone(self) -> Iterator[int]:
        """Hold the file for this process alone; gives its size."""
        fcntl.flock(self._descriptor, fcntl.LOCK_EX)
        try:
            yield os.fstat(self._descriptor).st_size
        finally:
            fcntl.flock(self._descriptor, fcntl.LOCK_UN)

    def _put(self, content: bytes, end: int) -> None:
        try:
            if os.write(self._descriptor, content) < len(content):
                raise OSError("the disk is full")
            os.fsync(self._descriptor)
        except OSError:
            os.ftruncate(self._descriptor, end)
            raise

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise ConfigError(
                f"{self._path}: the table cannot be written ({error}); check the folder, its "
                "rights and its space"
            ) from error


def read_table(path: Path, private_key: X25519PrivateKey) -> TableContent:
    """Open every record of a table.

    Raises:
        ConfigError: if there is no such file, or it is no such table.
        SealError: if there are records and the key opens none of them.
    """
    identities: defaultdict[str, dict[Identity, None]] = defaultdict(dict)
    damaged: list[int] = []
    try:
        with path.open("rb") as file:
            if not _HEADER.fullmatch(file.read(_HEADER_BYTES)):
                raise ConfigError(f"{path}: not a table of re-identification")
            number = 0
            while len(record := file.read(_RECORD)) == _RECORD:
                number += 1
                try:
                    pseudonym, identity = _opened(record, private_key)
                except DataError:
                    damaged.append(number)
                else:
                    identities[pseudonym][identity] = None
    except OSError as error:
        raise ConfigError(f"{path}: the table cannot be read ({error})") from error
    if number and len(damaged) == number:
        raise SealError(
            f"{path}: none of {number} records can be opened: another public key sealed them than "
            f"{_key_id(private_key.public_key())}, or all are damaged"
        )
    found = {pseudonym: tuple(several) for pseudonym, several in identities.items()}
    return TableContent(found, tuple(damaged), torn=bool(record))


def create_officer_key(private: Path, public: Path, passphrase: str) -> None:
    """Make a pair of keys: `private` under a passphrase (PKCS #8, mode 0600), `public` for all.

    Raises:
        ConfigError: if the passphrase is shorter than `LEAST_PASSPHRASE` characters, or one of the
            files is there already or cannot be written; none of them is left then.
    """
    if len(passphrase) < LEAST_PASSPHRASE:
        raise ConfigError(
            f"a passphrase of {len(passphrase)} characters; expected {LEAST_PASSPHRASE} or more: "
            "it is all that guards the key if the file is copied"
        )
    key = X25519PrivateKey.generate()
    encryption = BestAvailableEncryption(_bytes(passphrase))
    secret = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, encryption)
    shown = key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    _create(private, secret, 0o600)
    try:
        _create(public, shown, 0o644)
    except BaseException:
        private.unlink()
        raise


def read_officer_key(path: Path, passphrase: str) -> X25519PrivateKey:
    """The private key in `path`.

    Raises:
        ConfigError: if it is none, or the passphrase is another.
    """
    try:
        key = load_pem_private_key(path.read_bytes(), _bytes(passphrase))
    except (OSError, ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise ConfigError(
            f"{path}: the private key cannot be opened ({error}); expected the file and the "
            "passphrase of `cloister intake officer-key`"
        ) from error
    if not isinstance(key, X25519PrivateKey):
        raise ConfigError(f"{path}: a private key of another kind; expected X25519")
    return key


def _bytes(passphrase: str) -> bytes:
    return passphrase.encode("utf-8", "surrogateescape")


def _read_public(path: Path) -> X25519PublicKey:
    try:
        content = path.read_bytes()
        if b"PRIVATE" in content:
            raise ConfigError(
                f"{path}: a private key; expected the public one. Whoever reads this file can read "
                "the table: take it off this machine, and make a new pair"
            )
        key = load_pem_public_key(content)
        if not isinstance(key, X25519PublicKey):
            raise ConfigError(f"{path}: a public key of another kind; expected X25519")
        _SUITE.encrypt(b"", key, _INFO)  # a point of low order is found now
    except (OSError, ValueError, UnsupportedAlgorithm) as error:
        raise ConfigError(
            f"{path}: the officer's public key cannot be read ({error}); expected the PEM file of "
            "`cloister intake officer-key`"
        ) from error
    return key


def _key_id(key: X25519PublicKey) -> str:
    return hashlib.sha256(key.public_bytes_raw()).hexdigest()[:32]


def _packed(pseudonym: str, issuer: str, patient: str) -> bytes:
    """The three texts with their lengths, in as many bytes whoever it is."""
    texts = [text.encode("utf-8", "surrogatepass") for text in (pseudonym, issuer, patient)]
    framed = b"".join(len(text).to_bytes(2, "big") + text for text in texts if len(text) < _CONTENT)
    if len(framed) > _CONTENT or any(len(text) >= _CONTENT for text in texts):
        raise IntakeError(
            "the patient's identifier and its issuer are too long for the table of "
            "re-identification; expected at most 64 characters each, as an LO has"
        )
    return framed.ljust(_CONTENT, b"\0")


def _opened(record: bytes, key: X25519PrivateKey) -> tuple[str, Identity]:
    try:
        pseudonym, issuer, patient = _unpacked(_SUITE.decrypt(record, key, _INFO))
    except (InvalidTag, ValueError) as error:
        raise SealError("it cannot be opened") from error
    return pseudonym, Identity(issuer, patient)


def _unpacked(content: bytes) -> Iterable[str]:
    at = 0
    for _ in range(3):
        length = int.from_bytes(content[at : at + 2], "big")
        yield content[at + 2 : at + 2 + length].decode("utf-8", "surrogatepass")
        at += 2 + length


def _create(path: Path, content: bytes, mode: int) -> None:
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    except FileExistsError:
        raise ConfigError(f"{path}: exists already; a key is never written over") from None
    except OSError as error:
        raise ConfigError(f"{path}: the key cannot be made ({error})") from error
