"""Pseudonyms: stable under a key, unrelated without it."""

from __future__ import annotations

import hashlib
import hmac
import signal
import stat
import subprocess
import sys
import uuid
from datetime import date
from pathlib import Path

import pytest

from client.intake.keys import MOST_SHIFTED, Domain, SiteKey
from client.keyfile import rotate_key
from common.errors import ConfigError
from common.files import locked

DOMAINS: tuple[Domain, ...] = ("patient", "study", "series", "instance", "order")


def test_is_hmac_sha256_over_framed_parts() -> None:
    secret = bytes(range(32))
    pieces = [b"cloister pseudonym 1 patient", b"Hospital", b"4711"]
    message = b"".join(len(piece).to_bytes(8, "big") + piece for piece in pieces)

    expected = hmac.new(secret, message, hashlib.sha256).hexdigest()[:32]

    assert SiteKey(secret).pseudonym("patient", "Hospital", "4711") == expected


def test_same_key_same_pseudonym_other_key_another() -> None:
    one, other = SiteKey.random(), SiteKey.random()

    assert one.pseudonym("patient", "P") == SiteKey(one.secret).pseudonym("patient", "P")
    assert one.pseudonym("patient", "P") != other.pseudonym("patient", "P")


def test_each_domain_is_its_own() -> None:
    key = SiteKey.random()

    assert len({key.pseudonym(domain, "same") for domain in DOMAINS}) == len(DOMAINS)


def test_parts_do_not_run_into_each_other() -> None:
    key = SiteKey.random()

    assert key.pseudonym("patient", "a", "bc") != key.pseudonym("patient", "ab", "c")
    assert key.pseudonym("patient", "", "a") != key.pseudonym("patient", "a", "")


def test_undecodable_names_have_pseudonyms_too() -> None:
    assert SiteKey.random().pseudonym("patient", "\udcff") != ""


def test_the_secret_is_not_printed() -> None:
    key = SiteKey.random()

    assert key.secret.hex() not in repr(key)
    assert repr(key.secret) not in repr(key)


def test_a_key_file_is_made_once_and_kept(tmp_path: Path) -> None:
    path = tmp_path / "keys" / "site.key"

    first = SiteKey.from_file(path)

    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert SiteKey.from_file(path) == first
    assert SiteKey.from_file(tmp_path / "other.key") != first
    assert [file.name for file in path.parent.iterdir()] == ["site.key"]


def test_a_key_that_others_may_read_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "site.key"
    SiteKey.from_file(path)
    path.chmod(0o640)

    with pytest.raises(ConfigError, match=r"mode 0640.*chmod 600"):
        SiteKey.from_file(path)


@pytest.mark.parametrize("content", ["", "abc", "zz" * 32, "00" * 31, "ü"])
def test_what_is_no_key_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "site.key"
    path.write_text(content, encoding="utf-8")
    path.chmod(0o600)

    with pytest.raises(ConfigError):
        SiteKey.from_file(path)


def test_a_folder_is_no_key(tmp_path: Path) -> None:
    tmp_path.chmod(0o700)

    with pytest.raises(ConfigError, match="cannot be read"):
        SiteKey.from_file(tmp_path)


def test_a_uid_stands_for_the_same_original_everywhere() -> None:
    key = SiteKey(bytes(range(32)))

    one = key.uid("1.2.840.1")

    assert one == key.uid("1.2.840.1") != key.uid("1.2.840.2")
    assert one != SiteKey.random().uid("1.2.840.1")
    number = uuid.UUID(int=int(one.removeprefix("2.25.")))
    assert (number.version, number.variant) == (8, uuid.RFC_4122)
    assert len(one) <= 64


def test_date_shifts_are_within_ten_years_and_never_none() -> None:
    key = SiteKey(bytes(range(32)))

    shifts = [key.date_shift("", str(number)) for number in range(4000)]

    assert 0 not in shifts
    assert max(map(abs, shifts)) <= MOST_SHIFTED
    assert min(shifts) < -3600 < 3600 < max(shifts)
    assert abs(sum(shifts) / len(shifts)) < 4 * 2109 / 4000**0.5
    assert key.date_shift("a", "bc") != key.date_shift("ab", "c")


def test_every_use_of_the_key_has_its_own_domain() -> None:
    key = SiteKey(bytes(range(32)))
    plain = hmac.new(key.secret, b"P", hashlib.sha256).hexdigest()

    pseudonyms = {key.pseudonym(domain, "P") for domain in DOMAINS}
    uid = f"{int(key.uid('P').removeprefix('2.25.')):032x}"

    assert not {pseudonym[:12] for pseudonym in pseudonyms} & {uid[:12], plain[:12]}


# --- Rotation -----------------------------------------------------------------------------------

TODAY = date(2026, 3, 1)


def test_a_new_key_takes_the_place_and_the_old_one_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "site.key"
    first = SiteKey.from_file(path)

    old = rotate_key(path, TODAY)
    second = SiteKey.from_file(path)
    older = rotate_key(path, TODAY)

    assert (old.name, older.name) == ("site.key.until-2026-03-01", "site.key.until-2026-03-01.2")
    assert SiteKey.from_file(old) == first
    assert SiteKey.from_file(older) == second
    assert len({first, second, SiteKey.from_file(path)}) == 3
    assert {file.name for file in tmp_path.iterdir()} == {"site.key", old.name, older.name}
    for file in tmp_path.iterdir():
        assert stat.S_IMODE(file.stat().st_mode) == 0o600


def test_the_same_patient_is_another_one_after_a_rotation(tmp_path: Path) -> None:
    path = tmp_path / "site.key"
    before = SiteKey.from_file(path)
    old = rotate_key(path, TODAY)
    after = SiteKey.from_file(path)

    for told in (
        lambda key: key.pseudonym("patient", "", "4711"),
        lambda key: key.uid("1.2.3"),
        lambda key: key.date_shift("", "4711"),
        lambda key: key.derive("purpose"),
    ):
        assert told(before) != told(after)
        assert told(before) == told(SiteKey.from_file(old))


def test_what_cannot_be_rotated_is_left_as_it_is(tmp_path: Path) -> None:
    path, link = tmp_path / "site.key", tmp_path / "link"
    with pytest.raises(ConfigError, match="cannot be read"):
        rotate_key(path, TODAY)
    assert list(tmp_path.iterdir()) == []
    SiteKey.from_file(path)
    link.symlink_to(path)
    content = path.read_bytes()

    with pytest.raises(ConfigError, match="a link; expected the file itself"):
        rotate_key(link, TODAY)
    with locked(tmp_path), pytest.raises(ConfigError, match="another process"):
        rotate_key(path, TODAY)
    path.chmod(0o644)
    with pytest.raises(ConfigError, match="mode 0644"):
        rotate_key(path, TODAY)

    assert path.read_bytes() == content
    assert {file.name for file in tmp_path.iterdir()} == {"site.key", "link"}


KILLED = """
import os, signal, sys
from datetime import date
from pathlib import Path
from client.keyfile import rotate_key
left = [int(sys.argv[2])]
def count(event, arguments):
    if event in ("open", "os.link", "os.rename", "os.remove"):
        left[0] -= 1
        if left[0] < 0:
            os.kill(os.getpid(), signal.SIGKILL)
path, today = Path(sys.argv[1]), date(2026, 3, 1)
sys.addaudithook(count)
rotate_key(path, today)
left[0] = 1000
print("done")
"""


def test_a_rotation_that_is_killed_at_any_step_leaves_a_key_and_loses_none(tmp_path: Path) -> None:
    seen = set()
    for step in range(100):
        path = tmp_path / str(step) / "site.key"
        first = SiteKey.from_file(path)
        command = [sys.executable, "-c", KILLED, str(path), str(step)]
        ended = subprocess.run(command, capture_output=True, text=True, check=False)

        kept = path.with_name("site.key.until-2026-03-01")
        rotated = SiteKey.from_file(path) != first
        assert SiteKey.from_file(kept if rotated else path) == first
        assert rotate_key(path, TODAY).exists()  # and another goes on from there
        assert first in map(SiteKey.from_file, path.parent.glob("site.key*"))
        seen.add((rotated, kept.exists(), ended.returncode))
        if ended.returncode == 0:
            break
        assert ended.returncode == -signal.SIGKILL, ended.stderr
    assert {(rotated, code) for rotated, _, code in seen} == {(False, -9), (True, -9), (True, 0)}
