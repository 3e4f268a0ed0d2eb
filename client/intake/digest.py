"""What an intake's result depends on beside the source and the key, in one digest."""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path

from client.intake.deid.profile import Profile

_HERE = Path(__file__).parent


def deidentification_digest(profile: Profile) -> str:
    """SHA-256 over the profile, the table, and the code of the intake."""
    parts = (profile.digest, table_digest(), code_digest())
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


@cache
def table_digest() -> str:
    """SHA-256 of the table of PS3.15 E.1-1, and of our own beside it, as they are installed."""
    return _digest("*.csv")


@cache
def code_digest() -> str:
    """SHA-256 over all modules of the intake, by name, as they are installed."""
    return _digest("*.py")


def _digest(pattern: str) -> str:
    digest = hashlib.sha256()
    for file in sorted(_HERE.rglob(pattern)):
        content = file.read_bytes()
        digest.update(f"{file.relative_to(_HERE).as_posix()} {len(content)}\n".encode())
        digest.update(content)
    return digest.hexdigest()
