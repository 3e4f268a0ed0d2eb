"""The node's key: made once, read by its owner alone, never shown."""

from __future__ import annotations

import hashlib
import hmac
import os
import stat
import threading
from pathlib import Path

import pytest

from client.keyfile import KEY_BYTES, NodeKey, create_key, read_key
from common.errors import ConfigError


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "node.key"


def test_a_new_key_is_32_random_bytes_in_a_file_of_its_owner_alone(path: Path):
    key = NodeKey.create(path)
    assert len(key.secret) == KEY_BYTES
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert bytes.fromhex(path.read_text()) == key.secret
    assert [file.name for file in path.parent.iterdir()] == ["node.key"]


def test_a_key_comes_back_as_it_was_made(path: Path):
    assert NodeKey.create(path) == NodeKey.read(path)


def test_no_two_keys_are_one(tmp_path: Path):
    assert len({NodeKey.create(tmp_path / str(n)).secret for n in range(20)}) == 20


def test_a_key_is_never_written_over(path: Path):
    key = NodeKey.create(path)
    with pytest.raises(ConfigError, match="there is a key already"):
        NodeKey.create(path)
    assert not create_key(path)
    assert NodeKey.read(path) == key


def test_of_many_that_make_a_key_at_once_all_use_the_one_that_was_made(path: Path):
    start, made = threading.Barrier(16), []

    def make() -> None:
        start.wait()
        made.append((create_key(path), read_key(path, "node key")))

    threads = [threading.Thread(target=make) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(first for first, _ in made) == 1
    assert len({key for _, key in made}) == 1
    assert [file.name for file in path.parent.iterdir()] == ["node.key"]


def test_a_key_that_leads_nowhere_is_not_made_over(path: Path):
    path.symlink_to(path.with_name("somewhere"))
    assert not create_key(path)
    with pytest.raises(ConfigError, match="cannot be read"):
        NodeKey.read(path)


def test_a_key_that_cannot_be_made_is_said(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be made"):
        NodeKey.create(tmp_path / "file" / "node.key")


# --- Reading ------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o606, 0o610, 0o601, 0o777])
def test_a_key_that_others_may_reach_is_refused_with_the_way_out(path: Path, mode: int):
    NodeKey.create(path)
    path.chmod(mode)
    with pytest.raises(ConfigError, match=f"mode {mode:04o}.*chmod 600 {path}"):
        NodeKey.read(path)
    path.chmod(0o600)
    NodeKey.read(path)


@pytest.mark.parametrize("mode", [0o400, 0o600, 0o700])
def test_a_key_of_its_owner_alone_is_read(path: Path, mode: int):
    key = NodeKey.create(path)
    path.chmod(mode)
    assert NodeKey.read(path) == key


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\n",
        b"0" * 63,
        b"0" * 65,
        b"0" * 62,
        b"0" * 128,
        b"g" * 64,
        b"0x" + b"0" * 62,
        b"0" * 32 + b"\n" + b"0" * 32 + b"\n" + b"0",
        b"5a" * 16,
        b"\xff" * 64,
        "\u0660".encode() * 64,
        bytes(32),
    ],
)
def test_what_is_no_key_is_refused_and_left_as_it_is(path: Path, content: bytes):
    path.write_bytes(content)
    path.chmod(0o600)
    with pytest.raises(ConfigError, match=r"hexadecimal digits|cannot be read") as refused:
        NodeKey.read(path)
    assert str(path) in str(refused.value)
    assert path.read_bytes() == content


def test_a_missing_key_is_refused_and_not_made(path: Path):
    with pytest.raises(ConfigError, match="node key cannot be read"):
        NodeKey.read(path)
    assert not path.exists()


def test_what_is_wrong_with_a_key_never_says_the_key(path: Path):
    secret = os.urandom(31).hex()
    path.write_text(secret)
    path.chmod(0o600)
    with pytest.raises(ConfigError) as refused:
        NodeKey.read(path)
    assert not any(secret[n : n + 6] in str(refused.value) for n in range(len(secret) - 6))


# --- Using it -----------------------------------------------------------------------------------


def test_each_purpose_has_a_key_of_its_own():
    key = NodeKey(bytes(range(32)))
    purposes = ["ledger head", "ledger seal", "ledger witness", "release at rest", ""]
    derived = {purpose: key.derive(purpose) for purpose in purposes}
    assert len(set(derived.values())) == len(purposes)
    assert key.secret not in derived.values()
    for purpose, found in derived.items():
        plain = hmac.new(key.secret, b"cloister node key 1 " + purpose.encode(), hashlib.sha256)
        assert found == plain.digest()
    assert NodeKey(bytes(32)).derive("ledger head") != derived["ledger head"]


@pytest.mark.parametrize("length", [0, 1, 31, 33, 64])
def test_a_key_of_another_length_is_no_key(length: int):
    with pytest.raises(ValueError, match=f"{length} bytes, expected 32"):
        NodeKey(bytes(length))


def test_a_key_is_not_shown(path: Path):
    key = NodeKey.create(path)
    for shown in (repr(key), str(key), f"{key}", repr([key])):
        assert key.secret.hex() not in shown
        assert repr(key.secret) not in shown
