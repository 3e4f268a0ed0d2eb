"""What an intake's result depends on beside the source and the key, in one digest."""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

from client.intake.deid.profile import Profile

_HERE = Path(__file__).parent
_PACKAGE = "client.intake"


def deidentification_digest(profile: Profile) -> str:
    """SHA-256 over the profile, the table, and the code of the intake."""
    parts = (profile.digest, table_digest(), code_digest())
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


@cache
def table_digest() -> str:
    """SHA-256 of the table of PS3.15 E.1-1, and of our own beside it, as they are installed."""
    return _digest(_HERE.rglob("*.csv"))


@cache
def code_digest() -> str:
    """SHA-256 of all modules that reading one object takes, as they are installed."""
    return _digest(modules())


def modules() -> set[Path]:
    """The files of the intake on which what is made of an object depends."""
    found: set[Path] = set()
    new = {_HERE / "dicom.py"}
    while new:
        found |= new
        new = {file for module in new for file in _imported(module)} - found
    return found


def _imported(module: Path) -> Iterator[Path]:
    """The files of the intake that a module imports by ``from client.intake…``."""
    for node in ast.walk(ast.parse(module.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(_PACKAGE):
            place = _HERE.joinpath(*(node.module or "").split(".")[2:])
            files = [place.with_suffix(".py"), *(place / f"{name.name}.py" for name in node.names)]
            yield from (file for file in files if file.is_file())


def _digest(files: Iterable[Path]) -> str:
    digest = hashlib.sha256()
    for file in sorted(files):
        content = file.read_bytes()
        digest.update(f"{file.relative_to(_HERE).as_posix()} {len(content)}\n".encode())
        digest.update(content)
    return digest.hexdigest()
