"""A run's bundle as a hostile coordinator could make it: refused, and never unpacked."""

from __future__ import annotations

import hashlib
import struct
import warnings
import zipfile
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import pytest
from flwr.cli.build import build_fab_from_disk

from client.bundle import KIND, LARGEST_BUNDLE, Bundle, check_bundle
from common.errors import MessageError

PROJECT = """\
[project]
name = "cloister"
version = "0.1.0"

[tool.flwr.app]
publisher = "cloister"
fab-include = ["LICENSE"]

[tool.flwr.app.components]
serverapp = "server.app:app"
clientapp = "client.app:app"
"""
HONEST = {"pyproject.toml": PROJECT.encode(), "LICENSE": b"Apache-2.0"}


def manifest(files: dict[str, bytes]) -> bytes:
    lines = (f"{n},{hashlib.sha256(c).hexdigest()},{8 * len(c)}" for n, c in files.items())
    return "\n".join(lines).encode()


def archive(entries: list[tuple[str, bytes]], method: int = zipfile.ZIP_DEFLATED) -> bytes:
    made = BytesIO()
    with zipfile.ZipFile(made, "w", method) as written, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of names that come twice
        for name, content in entries:
            written.writestr(name, content)
    return made.getvalue()


def packed(files: dict[str, bytes], listed: bytes | None = None) -> bytes:
    content = manifest(files) if listed is None else listed
    return archive([*files.items(), (".info/CONTENT", content)])


def changed(old: str, new: str) -> bytes:
    assert old in PROJECT
    return packed(HONEST | {"pyproject.toml": PROJECT.replace(old, new).encode()})


def bundle(content: bytes, app: str = "cloister/cloister", kind: str = KIND) -> Bundle:
    return Bundle(app, hashlib.sha256(content).hexdigest(), kind, content)


def test_what_flower_builds_of_our_name_and_licence_is_taken(tmp_path: Path):
    (tmp_path / "cloister").mkdir()
    for name, content in HONEST.items():
        (tmp_path / "cloister" / name).write_bytes(content)
    check_bundle(bundle(build_fab_from_disk(tmp_path / "cloister")))
    check_bundle(bundle(packed(HONEST)))


def encrypted() -> bytes:
    content = bytearray(packed(HONEST))
    for signature, at in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        struct.pack_into("<H", content, content.index(signature) + at, 1)
    return bytes(content)


def lying_name() -> bytes:
    """The list at the end names LICENSE; the file's own header names a program."""
    content = packed(HONEST)
    at = content.index(b"LICENSE")
    return content[:at] + b"evil.py" + content[at + 7 :]


CODE = b"raise SystemExit"
FILES = r"holds \[.*expected exactly"
HOSTILE: dict[str, tuple[Callable[[], bytes], str]] = {
    "code": (lambda: packed(HONEST | {"client/app.py": CODE}), FILES),
    "a path beside it": (lambda: packed(HONEST | {"../../client/app.py": CODE}), FILES),
    "an absolute path": (lambda: packed(HONEST | {"/etc/cron.d/x": CODE}), FILES),
    "a null in a name": (lambda: packed(HONEST | {"LICENSE\0.py": CODE}), FILES),
    "a file twice": (
        lambda: archive([*HONEST.items(), (".info/CONTENT", manifest(HONEST)), ("LICENSE", CODE)]),
        FILES,
    ),
    "a file missing": (lambda: archive(list(HONEST.items())), FILES),
    "nothing": (lambda: archive([]), "does not begin"),
    "no archive": (lambda: b"this is no archive", "does not begin"),
    "an empty answer": (lambda: b"", "does not begin"),
    "half an archive": (lambda: packed(HONEST)[:-40], "no archive that can be read"),
    "a program before it": (lambda: b"#!/bin/sh\n" + packed(HONEST), "does not begin"),
    "two names for a file": (lying_name, "no archive that can be read"),
    "a bomb": (
        lambda: packed(HONEST | {"LICENSE": bytes(2**27)}),
        "LICENSE: unpacks to more than",
    ),
    "a heavy bundle": (lambda: bytes(LARGEST_BUNDLE + 1), "a bundle of .* at most"),
    "a password": (encrypted, "packed in a way"),
    "another packing": (
        lambda: archive([*HONEST.items(), (".info/CONTENT", manifest(HONEST))], zipfile.ZIP_LZMA),
        "packed in a way",
    ),
    "another manifest": (lambda: packed(HONEST, b"LICENSE,00,8"), "does not fit"),
    "another publisher": (lambda: changed('publisher = "cloister"', 'publisher = "x"'), "the app"),
    "another app": (lambda: changed('name = "cloister"', 'name = "other"'), "the app"),
    "a table for a name": (lambda: changed('name = "cloister"', "name = {a = 1}"), "the app"),
    "another client app": (lambda: changed("client.app:app", "client.evil:app"), "components"),
    "a third component": (
        lambda: changed('serverapp = "server', 'agentapp = "x:app"\nserverapp = "server'),
        "components",
    ),
    "no project": (lambda: packed(HONEST | {"pyproject.toml": b"\xff\xfe"}), "cannot be read"),
    "a deep project": (
        lambda: packed(HONEST | {"pyproject.toml": b"a = " + b"[" * 100_000}),
        "cannot be read",
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_anything_else_is_refused_with_a_word(name: str):
    made, words = HOSTILE[name]
    with pytest.raises(MessageError, match=words):
        check_bundle(bundle(made()))


def test_a_bundle_is_what_its_run_says():
    content = packed(HONEST)
    with pytest.raises(MessageError, match="SHA-256"):
        check_bundle(Bundle("cloister/cloister", "0" * 64, KIND, content))
    with pytest.raises(MessageError, match="the run is of the app"):
        check_bundle(bundle(content, app="cloister/other"))
    with pytest.raises(MessageError, match="flwr-agentapp"):
        check_bundle(bundle(content, kind="flwr-agentapp"))
