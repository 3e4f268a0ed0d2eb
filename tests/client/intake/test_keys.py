"""Pseudonyms: stable under a key, unrelated without it."""

from __future__ import annotations

import hashlib
import hmac
import stat
import uuid
from pathlib import Path

import pytest

from client.intake.keys import MOST_SHIFTED, Domain, SiteKey
from common.errors import ConfigError

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
