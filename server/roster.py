"""Who is in the federation: the roster, which the authority signs and the coordinator obeys.

    roster.json    sites, their keys and bounds, and every key that was revoked; signed
    record.jsonl   a line for each change: when, what, by whom, why, and the roster that came of it

To read it takes no secret: the machine that faces the network needs no passphrase, and who steals
the file learns public keys, names, sizes and dates. A roster that was edited does not fit its
signature. An older one that is put back is found by the record, which knows how far the roster
went, and by a process that has seen the newer; a machine that was put back in time with all its
files, by a copy of the record elsewhere alone.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import AwareDatetime, Field, ValidationError, model_validator

from common import certificates
from common.certificates import SITE_NAME, Certificate, PrivateKey, fingerprint, shown
from common.clock import Clock
from common.errors import ConfigError, IdentityError
from common.spec import Count, Section

AUTHORITY, ROSTER, RECORD = "ca.pem", "roster.json", "record.jsonl"
_COPY = "nobody is let in meanwhile; put the newest copy back"
_WAY_OUT = (
    f"{_COPY}, or have the holder of the passphrase go on from the roster that is there: "
    "`cloister coordinator roster --go-on`"
)
_LARGEST = 16 * 2**20
_Name = Annotated[str, Field(pattern=SITE_NAME)]
_Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class Standing(StrEnum):
    """What a key may do.

    ``leaving``: another key has taken its place; it is good until its date, so that its node can
    take the new one without stopping. ``revoked``: nothing, for ever.
    """

    ENROLLED = "enrolled"
    LEAVING = "leaving"
    REVOKED = "revoked"


class KnownKey(Section):
    """A key that the authority has signed once: it is never forgotten.

    Attributes:
        site: whose it is or was.
        key: its bytes, in base64.
        standing: what it may do.
        since: when it came to stand so.
        until: the end of its newest certificate, or an earlier end that was set.
    """

    site: _Name
    key: Annotated[str, Field(pattern=r"^[A-Za-z0-9+/]{1,1000}={0,2}$")]
    standing: Annotated[Standing, Field(strict=False)]
    since: AwareDatetime
    until: AwareDatetime

    @property
    def content(self) -> bytes:
        """The bytes of the key."""
        return base64.b64decode(self.key)


class EnrolledSite(Section):
    """A site, and the greatest size that it may declare."""

    name: _Name
    greatest_declared_size: Count
    since: AwareDatetime


class RosterContent(Section):
    """What the authority signs.

    Attributes:
        federation: SHA-256 of the authority's key.
        address: where nodes find the coordinator.
        number: of this roster; each change makes the next.
        previous: SHA-256 of the one before; zeros for the first.
        sites: enrolled, and not revoked.
        all_keys: that were ever enrolled, revoked ones too.
    """

    format: Literal["cloister roster 1"] = "cloister roster 1"
    federation: _Digest
    address: Annotated[str, Field(max_length=300)]
    number: Count
    previous: _Digest
    written: AwareDatetime
    sites: tuple[EnrolledSite, ...] = ()
    all_keys: tuple[KnownKey, ...] = ()

    @model_validator(mode="after")
    def _is_whole(self) -> Self:
        names = [site.name for site in self.sites]
        speaking = {each.site for each in self.all_keys if each.standing is not Standing.REVOKED}
        if len(set(names)) < len(names) or set(names) != speaking:
            raise ValueError("each site has one entry, and a key that is not revoked")
        if len({each.key for each in self.all_keys}) < len(self.all_keys):
            raise ValueError("a key stands there twice")
        return self

    @property
    def canonical(self) -> bytes:
        """What is signed."""
        fields = self.model_dump(mode="json")
        return json.dumps(fields, sort_keys=True, separators=(",", ":")).encode()

    @property
    def digest(self) -> str:
        """SHA-256 of what is signed."""
        return hashlib.sha256(self.canonical).hexdigest()

    def known(self, key: bytes) -> KnownKey | None:
        """What is known of a key."""
        return next((each for each in self.all_keys if each.content == key), None)

    def site(self, name: str) -> EnrolledSite | None:
        """The enrolled site of that name, however it is written in capitals."""
        same = (each for each in self.sites if each.name.casefold() == name.casefold())
        return next(same, None)


class _Signed(Section):
    roster: RosterContent
    signature: Annotated[str, Field(pattern=r"^([0-9a-f]{2}){1,200}$")]


class Line(Section):
    """A change of the roster, in the record.

    Attributes:
        roster: the number of the roster that came of it.
        digest: its SHA-256.
        by, reason: of the person; they are in no other file.
    """

    roster: Count
    digest: _Digest
    time: AwareDatetime
    what: str
    site: str
    key: str
    by: str
    reason: str


@dataclass(frozen=True)
class Site:
    """An enrolled site.

    Attributes:
        name: its public name.
        greatest_declared_size: that it may state.
        since: when it was enrolled.
        keys: bytes of the keys under which it may speak now; two while it takes a new one.
        until: when the last of them ends; past that the site has to be renewed.
    """

    name: str
    greatest_declared_size: int
    since: datetime
    keys: tuple[bytes, ...]
    until: datetime


class Roster:
    """The roster in a coordinator's folder, as it is at each question.

    A question costs a look at the file's date. A change holds at once for every process; a file
    that was damaged, edited or put back answers nobody (fail closed), and says so.

    Raises:
        ConfigError: if it cannot be relied on.
        IdentityError: if the authority's certificate is not in force.
    """

    def __init__(self, folder: Path, clock: Clock | None = None) -> None:
        self._folder = folder
        self._clock = clock or Clock()
        self.authority = read_authority(folder)
        certificates.check_authority(self.authority, self._clock.date())
        self._seen: _Seen | None = None
        self._now()

    def site_of(self, key: bytes) -> Site:
        """Whose key this is, if it may speak now.

        Args:
            key: bytes of a public key (`common.certificates.key_of_pem`, `key_of_certificate`).

        Raises:
            IdentityError: if it was never enrolled, is revoked, or has ended.
            ConfigError: if the roster cannot be relied on.
        """
        seen, now = self._now(), self._clock.date()
        known = seen.keys.get(key)
        if known is None:
            raise IdentityError(f"key {fingerprint(key)}: not enrolled in this federation")
        _check_standing(known, now)
        return seen.site(seen.sites[known.site], now)

    def sites(self) -> tuple[Site, ...]:
        """Every enrolled site, by name: those that are waited for, whether they speak or not.

        Raises:
            ConfigError: if the roster cannot be relied on.
        """
        seen, now = self._now(), self._clock.date()
        return tuple(seen.site(seen.sites[name], now) for name in sorted(seen.sites))

    def content(self) -> RosterContent:
        """All of it, as it is now.

        Raises:
            ConfigError: if it is missing, damaged, not as the authority signed it, or older than
                one that was seen.
        """
        return self._now().content

    def _now(self) -> _Seen:
        stamp, seen = _stamp(self._folder / ROSTER), self._seen
        if seen is not None and seen.stamp == stamp:
            return seen
        content = read_roster(self._folder, self.authority)
        if seen is not None:
            _check_follows(self._folder, content, seen.content.number, seen.content.digest)
        self._seen = _Seen.of(stamp, content)
        return self._seen


@dataclass(frozen=True)
class _Seen:
    """A roster as it was read, in the order in which it is asked."""

    stamp: tuple[int, ...]
    content: RosterContent
    keys: dict[bytes, KnownKey]
    sites: dict[str, EnrolledSite]
    ours: dict[str, list[tuple[bytes, KnownKey]]]

    @classmethod
    def of(cls, stamp: tuple[int, ...], content: RosterContent) -> _Seen:
        keys = {each.content: each for each in content.all_keys}
        ours: dict[str, list[tuple[bytes, KnownKey]]] = {each.name: [] for each in content.sites}
        for key, known in keys.items():
            if known.standing is not Standing.REVOKED:
                ours[known.site].append((key, known))
        return cls(stamp, content, keys, {each.name: each for each in content.sites}, ours)

    def site(self, site: EnrolledSite, now: datetime) -> Site:
        ours = self.ours[site.name]
        speaking = tuple(key for key, known in ours if known.until >= now)
        until = max(known.until for _, known in ours)
        return Site(site.name, site.greatest_declared_size, site.since, speaking, until)


def read_authority(folder: Path) -> Certificate:
    """The federation's certificate in a coordinator's folder.

    Raises:
        ConfigError: if there is none.
    """
    path = folder / AUTHORITY
    content = certificates.read_bounded(path, "authority's certificate")
    try:
        return certificates.certificate(content, str(path))
    except IdentityError as error:
        raise ConfigError(f"{error}; put it back from a copy") from None


def read_roster(folder: Path, authority: Certificate, *, behind: bool = False) -> RosterContent:
    """The roster in a folder: signed by the authority, and none older than the record says.

    Args:
        folder: of the coordinator.
        authority: the federation's certificate.
        behind: whether one that is older than the record says is taken all the same.

    Raises:
        ConfigError: if it is missing, damaged, edited, or older.
    """
    path = folder / ROSTER
    try:
        with path.open("rb") as file:
            signed = _Signed.model_validate_json(file.read(_LARGEST))
    except OSError as error:
        raise ConfigError(f"{path}: the roster cannot be read ({error}); {_COPY}") from None
    except ValidationError as error:
        wrong = error.errors()[0]
        where = ".".join(map(str, wrong["loc"])) or "the file"
        raise ConfigError(f"{path}: damaged ({where}: {wrong['msg']}); {_COPY}") from None
    content, key = signed.roster, certificates.key_of(authority, AUTHORITY)
    try:
        certificates.check_signature(key, "roster", content.canonical, signed.signature)
    except IdentityError:
        raise ConfigError(
            f"{path}: not as the authority signed it: it was edited, or is another federation's; "
            f"{_COPY}"
        ) from None
    if not behind:
        newest = last_line(folder)
        _check_follows(folder, content, newest.roster, newest.digest)
    return content


def signed_roster(content: RosterContent, authority: PrivateKey) -> bytes:
    """The file of a roster, signed."""
    signature = certificates.sign(authority, "roster", content.canonical)
    return _Signed(roster=content, signature=signature).model_dump_json(indent=1).encode() + b"\n"


def lines(folder: Path) -> Iterator[Line]:
    """The record, as it was written; an end that a crash has torn is left out.

    Raises:
        ConfigError: if it is missing or holds something else.
    """
    path = folder / RECORD
    try:
        with path.open("rb") as file:
            whole = [line for line in file.read(_LARGEST).splitlines(True) if line.endswith(b"\n")]
    except OSError as error:
        raise ConfigError(f"{path}: the record cannot be read ({error}); {_WAY_OUT}") from None
    for number, line in enumerate(whole, 1):
        try:
            yield Line.model_validate_json(line)
        except ValidationError:
            raise ConfigError(f"{path}: line {number} is damaged; {_WAY_OUT}") from None


def last_line(folder: Path) -> Line:
    """The newest line of the record.

    Raises:
        ConfigError: if there is none.
    """
    newest = max(lines(folder), key=lambda line: line.roster, default=None)
    if newest is None:
        raise ConfigError(f"{folder / RECORD}: the record is empty; {_WAY_OUT}")
    return newest


def add_line(folder: Path, line: Line) -> None:
    """Add a line to the record, durably."""
    descriptor = os.open(folder / RECORD, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
    try:
        size = os.fstat(descriptor).st_size
        end = os.pread(descriptor, size, 0).rfind(b"\n") + 1
        if end < size:  # what a crash has torn
            os.ftruncate(descriptor, end)
        os.write(descriptor, line.model_dump_json().encode() + b"\n")
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _check_follows(folder: Path, content: RosterContent, number: int, digest: str) -> None:
    """Check that a roster is the one that was seen last, or came after it."""
    if content.number < number or (content.number == number and content.digest != digest):
        raise ConfigError(
            f"{folder / ROSTER}: number {content.number}, and number {number} was seen here: an "
            f"older or another roster was put back, and with it keys that were revoked; {_WAY_OUT}"
        )


def _check_standing(known: KnownKey, now: datetime) -> None:
    if known.standing is Standing.REVOKED:
        raise IdentityError(
            f"site {known.site}: this key was revoked at {shown(known.since)}; coming back takes "
            "a new one: `cloister node request --afresh`, and enrolment"
        )
    if now > known.until:
        raise IdentityError(
            f"site {known.site}: this key ended at {shown(known.until)}, and the clock here says "
            f"{shown(now)}; `cloister node renew`, and `cloister coordinator renew`"
        )


def _stamp(path: Path) -> tuple[int, ...]:
    try:
        found = path.stat()
    except OSError as error:
        raise ConfigError(f"{path}: the roster cannot be read ({error}); {_COPY}") from None
    return (found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)
