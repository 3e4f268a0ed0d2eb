"""A secret of 32 random bytes in a file that only its owner may read.

A site has up to three: the node's key, which seals its ledger and its kept releases, the key of
its pseudonyms (`client.intake.keys`), and the key of its sealed cohorts (`client.intake.settings`).
None of them ever leaves the site.
"""

from __future__ import annotations

import hmac
import itertools
import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Self

from common.errors import ConfigError
from common.files import flush_folder, locked

KEY_BYTES = 32


@dataclass(frozen=True)
class NodeKey:
    """The node's own secret; each use has a key of its own, derived from it by HMAC-SHA-256.

    Args:
        secret: 32 random bytes; they never appear in `repr`.
    """

    secret: bytes = field(repr=False)

    def __post_init__(self) -> None:
        if len(self.secret) != KEY_BYTES:
            raise ValueError(f"a key of {len(self.secret)} bytes, expected {KEY_BYTES}")

    @classmethod
    def create(cls, path: Path) -> Self:
        """A new key, put into `path`.

        Raises:
            ConfigError: if there is one already, or it cannot be written.
        """
        if not create_key(path):
            raise ConfigError(f"{path}: there is a key already; it is never written over")
        return cls.read(path)

    @classmethod
    def read(cls, path: Path) -> Self:
        """The key in `path`.

        Raises:
            ConfigError: if it is missing, others may read it, or it holds no key.
        """
        return cls(read_key(path, "node key"))

    def derive(self, purpose: str) -> bytes:
        """32 bytes for one purpose."""
        return hmac.digest(self.secret, f"cloister node key 1 {purpose}".encode(), "sha256")


def create_key(path: Path) -> bool:
    """Put a new random key into `path` (hex, mode 0600) unless it exists; whether it was made.

    Raises:
        ConfigError: if it cannot be written.
    """
    if path.exists():
        return False
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _drawn(path) as new:
            try:
                os.link(new, path)
            except FileExistsError:
                return False  # another process made it in this moment: theirs is used
            flush_folder(path.parent)  # a ledger that outlives its key can never be opened
    except OSError as error:
        raise ConfigError(f"{path}: the key cannot be made ({error})") from error
    return True


def rotate_key(path: Path, today: date) -> Path:
    """Set the key in `path` aside under the date, and put a new one in its place.

    Killed at any moment, it leaves the old key or the new one in `path`, and never loses the old.

    Returns:
        Where the old key lies.

    Raises:
        ConfigError: if there is no key that could be set aside, or it cannot be done; then the
            old one is still in its place.
    """
    read_key(path, "key")
    if path.is_symlink():
        raise ConfigError(f"{path}: a link; expected the file itself, {path.resolve()}")
    try:
        with locked(path.parent), _drawn(path) as new:
            old = _set_aside(path, today)
            flush_folder(path.parent)
            new.replace(path)
            flush_folder(path.parent)
    except BlockingIOError:
        raise ConfigError(f"{path.parent}: another process changes keys there") from None
    except OSError as error:
        raise ConfigError(f"{path}: the key cannot be changed ({error})") from error
    return old


def _set_aside(path: Path, today: date) -> Path:
    """A second name for the file, with the date in it, that nothing had before."""
    for number in itertools.count(1):
        more = f".{number}" if number > 1 else ""
        old = path.with_name(f"{path.name}.until-{today.isoformat()}{more}")
        try:
            os.link(path, old)
        except FileExistsError:
            continue
        break
    return old


@contextmanager
def _drawn(path: Path) -> Iterator[Path]:
    """A file beside `path` with a new key, on the disk; it goes at the end, if still there."""
    new = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "w", encoding="ascii") as file:
            file.write(secrets.token_hex(KEY_BYTES) + "\n")
            file.flush()
            os.fsync(file.fileno())
        yield new
    finally:
        new.unlink(missing_ok=True)


def read_key(path: Path, what: str) -> bytes:
    """The 32 bytes in `path`; `what` it is called in errors.

    Raises:
        ConfigError: if it is missing, others may read it, or it holds no key.
    """
    try:
        mode = stat.S_IMODE(path.stat().st_mode)
        text = path.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: the {what} cannot be read ({error})") from error
    if mode & 0o077:
        raise ConfigError(
            f"{path}: the {what} has mode {mode:04o}, others may reach it; expected 0600: "
            f"run `chmod 600 {path}` and think about who has read it"
        )
    try:
        key = bytes.fromhex(text)
    except ValueError:
        key = b""
    if len(key) != KEY_BYTES:
        raise ConfigError(f"{path}: not a {what}; expected {2 * KEY_BYTES} hexadecimal digits")
    return key
