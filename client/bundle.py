"""What a run may consist of at a node: a name and a licence, and no code (law 4).

Flower gives every run a bundle, a ZIP archive that a stock node unpacks and imports. Here nothing
is unpacked and nothing imported: the archive is read in memory, within bounds, and refused unless
it is exactly what a coordinator of ours submits. `client.app:app` is what the hospital installed.
"""

from __future__ import annotations

import hashlib
import re
import tomllib
import zipfile
import zlib
from dataclasses import dataclass, field
from io import BytesIO
from typing import Any

from common.errors import MessageError

LARGEST_BUNDLE = 256 * 1024
"""Bytes of a bundle; of each file in it as well."""
PROJECT, LICENCE, MANIFEST = "pyproject.toml", "LICENSE", ".info/CONTENT"
COMPONENTS = {"serverapp": "server.app:app", "clientapp": "client.app:app"}
KIND = "flwr-serverapp"
"""Flower's type of a run that a ServerApp conducts."""

_FILES = {PROJECT, LICENCE, MANIFEST}
_PUBLISHER, _NAME = "cloister", re.compile(r"cloister(-[a-z0-9]+)*")
_BEGINS = b"PK\x03\x04"  # APPNOTE 4.3.7: the first file's header; nothing lies before it
_ENCRYPTED = 0x1  # APPNOTE 4.4.4
_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
_UNREADABLE = (
    zipfile.BadZipFile,
    zlib.error,
    EOFError,
    OSError,
    ValueError,
    NotImplementedError,
    RuntimeError,
    OverflowError,
    MemoryError,
)


@dataclass(frozen=True)
class Bundle:
    """What the coordinator says that a run consists of, unopened.

    Attributes:
        app: publisher and name, as the run has them.
        digest: SHA-256, as the run has it.
        kind: Flower's type of the run's first task.
        content: the bundle's bytes.
    """

    app: str
    digest: str
    kind: str
    content: bytes = field(repr=False)


def check_bundle(bundle: Bundle) -> None:
    """Check that a run consists of our app's name and licence, and of nothing else.

    Raises:
        MessageError: saying what is not so.
    """
    if bundle.kind != KIND:
        raise MessageError(f"a run of the type {bundle.kind!a:.80}; expected {KIND}")
    if len(bundle.content) > LARGEST_BUNDLE:
        raise MessageError(f"a bundle of {len(bundle.content)} bytes; at most {LARGEST_BUNDLE}")
    seen = hashlib.sha256(bundle.content).hexdigest()
    if seen != bundle.digest:
        raise MessageError(f"the bundle's SHA-256 is {seen}, the run says {bundle.digest!a:.80}")
    try:
        files = _files(bundle.content)
    except _UNREADABLE as error:
        raise MessageError(f"the bundle is no archive that can be read ({error!s:.200})") from error
    _check_manifest(files)
    _check_project(files[PROJECT], bundle.app)


def _files(content: bytes) -> dict[str, bytes]:
    """Every file of the archive, each read in memory and within bounds."""
    if not content.startswith(_BEGINS):
        raise MessageError("the bundle does not begin as a ZIP archive does")
    with zipfile.ZipFile(BytesIO(content)) as archive:
        infos = archive.infolist()
        names = sorted(info.orig_filename for info in infos)
        if names != sorted(_FILES):
            raise MessageError(
                f"the bundle holds {names!a:.300}; expected exactly {sorted(_FILES)}: a node runs "
                "what its hospital installed, and no code of a run"
            )
        return {info.orig_filename: _read(archive, info) for info in infos}


def _read(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> bytes:
    if info.compress_type not in _METHODS or info.flag_bits & _ENCRYPTED:
        raise MessageError(f"{info.orig_filename}: packed in a way that no bundle of ours is")
    with archive.open(info) as file:
        content = file.read(LARGEST_BUNDLE + 1)
    if len(content) > LARGEST_BUNDLE:
        raise MessageError(f"{info.orig_filename}: unpacks to more than {LARGEST_BUNDLE} bytes")
    return content


def _check_manifest(files: dict[str, bytes]) -> None:
    """Flower's manifest has a line for each other file: path, SHA-256, size in bits."""
    expected = {
        f"{name},{hashlib.sha256(content).hexdigest()},{8 * len(content)}".encode()
        for name, content in files.items()
        if name != MANIFEST
    }
    if set(files[MANIFEST].split(b"\n")) != expected:
        raise MessageError(f"{MANIFEST}: does not fit the files in the bundle")


def _check_project(content: bytes, app: str) -> None:
    try:
        project = tomllib.loads(content.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise MessageError(f"{PROJECT}: cannot be read ({error!s:.200})") from error
    name = _at(project, "project", "name")
    publisher = _at(project, "tool", "flwr", "app", "publisher")
    if publisher != _PUBLISHER or not isinstance(name, str) or not _NAME.fullmatch(name):
        raise MessageError(f"{PROJECT}: the app {publisher!a:.80}/{name!a:.80}; expected ours")
    if app != f"{publisher}/{name}":
        raise MessageError(f"the run is of the app {app!a:.80}, its bundle of {publisher}/{name}")
    components = _at(project, "tool", "flwr", "app", "components")
    if components != COMPONENTS:
        raise MessageError(f"{PROJECT}: components {components!a:.300}; expected {COMPONENTS}")


def _at(table: Any, *path: str) -> Any:
    for key in path:
        table = table.get(key) if isinstance(table, dict) else None
    return table
