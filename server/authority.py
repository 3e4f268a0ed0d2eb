"""The federation's authority: it signs who takes part, under a key that a passphrase seals.

    ca.key     the authority's private key: AES-256-GCM under a key that scrypt (RFC 7914) draws
               from the passphrase; needed to enrol, renew and revoke, and never while rounds run.
               It may lie on a medium of its own
    ca.pem     its certificate
    tls.pem    the coordinator's key and certificate, mode 0600, in one file: replaced at once
    roster.json, record.jsonl   see `server.roster`

Every change is made under a lock and in an order that a crash cannot turn into a half: what is
handed out is signed first, the roster says that it holds, and the record keeps who and why.
"""

from __future__ import annotations

import base64
import hashlib
import os
import secrets
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path
from typing import NamedTuple, Self

from common import certificates
from common.certificates import Certificate, PrivateKey, Use, fingerprint, hosts_of, shown
from common.clock import Clock
from common.enrolment import Bundle, Offer, Request, address_of, check_site_name
from common.errors import ConfigError, IdentityError
from common.files import flush_folder, locked, write_durably
from server.issuing import Wish, issue
from server.passphrase import check_passphrase, open_key, sealed_key
from server.roster import (
    AUTHORITY,
    RECORD,
    ROSTER,
    EnrolledSite,
    KnownKey,
    Line,
    RosterContent,
    Standing,
    add_line,
    last_line,
    read_authority,
    read_roster,
    signed_roster,
)

SEALED_KEY, TLS = "ca.key", "tls.pem"
LOOPBACK = ("localhost", "127.0.0.1", "::1")
"""Always among the names of the coordinator's certificate: its own machine may ask after it."""
LEAVING = timedelta(days=14)
"""For so long a node's old key is good beside its new one."""


class Lifetimes(NamedTuple):
    """Days for which certificates are in force."""

    authority: int = 3650
    coordinator: int = 365
    node: int = 365


class Signed(NamedTuple):
    """Who decided, and why."""

    by: str
    reason: str = ""


@dataclass(frozen=True)
class NewFederation:
    """What a person says of a new federation.

    Attributes:
        name: of the federation; public.
        hosts: names and addresses of the coordinator; the first is the one that nodes are given.
        port: on which it listens.
        lifetimes: of certificates.
    """

    name: str
    hosts: Sequence[str]
    port: int
    lifetimes: Lifetimes = field(default_factory=Lifetimes)


@dataclass(frozen=True)
class Authority:
    """The authority in a coordinator's folder, with its key.

    Attributes:
        folder: of the coordinator.
        certificate: the federation's.
        key: the authority's, while this object lives.
        clock: gives the dates.
    """

    folder: Path
    certificate: Certificate
    key: PrivateKey = field(repr=False)
    clock: Clock = field(default_factory=Clock)

    @classmethod
    def create(
        cls, folder: Path, new: NewFederation, passphrase: str, signed: Signed, clock: Clock
    ) -> Self:
        """Make the folder of a coordinator: its authority, its certificate, an empty roster.

        All of it is made, or nothing.

        Raises:
            ConfigError: if the folder holds something, or what was said makes no federation.
        """
        _check_new(folder, new, passphrase)
        folder = Path(os.path.abspath(folder))
        made = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}.partial")
        try:
            made.mkdir(mode=0o700, parents=True)
            cls._make(made, new, passphrase, clock)._begin(new, signed)
            made.rename(folder)  # onto nothing, or onto an empty folder
            flush_folder(folder.parent)
        except OSError as error:
            raise ConfigError(f"{folder}: cannot be set up ({error})") from error
        finally:
            shutil.rmtree(made, ignore_errors=True)
        return cls.open(folder, passphrase, clock=clock)

    @classmethod
    def _make(cls, folder: Path, new: NewFederation, passphrase: str, clock: Clock) -> Self:
        key = certificates.new_key()
        days = new.lifetimes.authority
        own = issue(Wish(new.name, key, None, days), key, None, clock.date())
        certificates.write_secret(folder / SEALED_KEY, sealed_key(key, passphrase))
        write_durably(folder / AUTHORITY, certificates.certificate_pem(own))
        return cls(folder, own, key, clock)

    def _begin(self, new: NewFederation, signed: Signed) -> None:
        self._write_tls(new.hosts, new.lifetimes.coordinator)
        first = RosterContent(
            federation=hashlib.sha256(self.authority_key).hexdigest(),
            address=address_of(_written(new.hosts[0]), new.port),
            number=1,
            previous="0" * 64,
            written=_seconds(self.clock.date()),
        )
        self._put(first, _Change("the federation began", new.name, self.authority_key, signed))

    @classmethod
    def open(
        cls,
        folder: Path,
        passphrase: str,
        *,
        sealed_key: Path | None = None,
        clock: Clock | None = None,
    ) -> Self:
        """Open the authority's key.

        Args:
            folder: of the coordinator.
            passphrase: of the key.
            sealed_key: where it lies, if not in the folder.
            clock: gives the dates.

        Raises:
            ConfigError: if a file is missing, or the passphrase is another one.
            IdentityError: if the authority's certificate is not in force.
        """
        clock, path = clock or Clock(), sealed_key or folder / SEALED_KEY
        own = read_authority(folder)
        certificates.check_authority(own, clock.date())
        sealed = certificates.read_secret(path, "authority's key")
        key = open_key(sealed, passphrase, path)
        if certificates.key_bytes(key) != certificates.key_bytes(certificates.key_of(own, "")):
            raise ConfigError(f"{path}: the key of another authority than that in {AUTHORITY}")
        return cls(folder, own, key, clock)

    @property
    def authority_key(self) -> bytes:
        """Bytes of the authority's key; people compare its fingerprint."""
        return certificates.key_bytes(self.key)

    def roster(self) -> RosterContent:
        """The roster as it is now.

        Raises:
            ConfigError: if it cannot be relied on.
        """
        return read_roster(self.folder, self.certificate)

    # --- Changes --------------------------------------------------------------------------------

    def enrol(
        self, request: Request, greatest_declared_size: int, days: int, signed: Signed
    ) -> Bundle:
        """Take a site into the federation.

        Args:
            request: the site's; two people have compared the fingerprint of its key.
            greatest_declared_size: that the site may state.
            days: for which its certificate is in force.
            signed: by whom, and why.

        Raises:
            IdentityError: if its key is known already: enrolled, revoked, or that of another.
            ConfigError: if a site has that name, or the roster cannot be relied on.
        """
        with self._changing():
            roster, now = self.roster(), _seconds(self.clock.date())
            self._check_new_site(roster, request)
            site = EnrolledSite(
                name=request.site, greatest_declared_size=greatest_declared_size, since=now
            )
            bundle = self._bundle(roster, site, request.key, days)
            known = _known(site.name, request.key, bundle, now)
            changed = _next(
                roster, now, sites=(*roster.sites, site), all_keys=(*roster.all_keys, known)
            )
            self._put(changed, _Change("enrolled", site.name, request.key, signed))
            return bundle

    def renew(
        self,
        request: Request,
        days: int,
        signed: Signed,
        *,
        greatest_declared_size: int | None = None,
    ) -> Bundle:
        """Give an enrolled site a new certificate, over its key or over one that its key vouches.

        A key that is replaced is good for `LEAVING` more, or until its certificate ends.

        Args:
            request: the site's.
            days: for which the certificate is in force.
            signed: by whom, and why.
            greatest_declared_size: that the site may state from now on; None: as before.

        Raises:
            IdentityError: if the key that speaks for it is not an enrolled one of that site.
            ConfigError: if the roster cannot be relied on.
        """
        with self._changing():
            roster, now = self.roster(), _seconds(self.clock.date())
            site = _speaking(roster, request)
            if greatest_declared_size is not None:
                changes = {"greatest_declared_size": greatest_declared_size}
                site = site.model_copy(update=changes)
            sites = tuple(site if each.name == site.name else each for each in roster.sites)
            bundle = self._bundle(roster, site, request.key, days)
            kept = [
                _left(each, now) if each.site == site.name and each.content != request.key else each
                for each in roster.all_keys
                if each.content != request.key
            ]
            known = _known(site.name, request.key, bundle, now)
            what = "renewed" if roster.known(request.key) else "renewed with a new key"
            changed = _next(roster, now, sites=sites, all_keys=(*kept, known))
            self._put(changed, _Change(what, site.name, request.key, signed))
            return bundle

    def revoke(self, name: str, signed: Signed) -> tuple[bytes, ...]:
        """Put a site out of the federation: every key of it is refused at once, and for ever.

        Returns:
            The keys that are refused from now on.

        Raises:
            ConfigError: if no site of that name is enrolled, or the roster cannot be relied on.
        """
        with self._changing():
            roster, now = self.roster(), _seconds(self.clock.date())
            if all(site.name != name for site in roster.sites):
                known = ", ".join(site.name for site in roster.sites) or "none"
                raise ConfigError(f"site {name!a}: not enrolled; the sites are: {known}")
            keys = tuple(
                _revoked(each, now) if each.site == name else each for each in roster.all_keys
            )
            gone = [each for each in roster.all_keys if each.site == name]
            gone = [each for each in gone if each.standing is not Standing.REVOKED]
            sites = tuple(site for site in roster.sites if site.name != name)
            self._put(
                _next(roster, now, sites=sites, all_keys=keys),
                _Change("revoked", name, gone[-1].content, signed),
            )
            return tuple(each.content for each in gone)

    def renew_tls(self, hosts: Sequence[str], port: int | None, days: int, signed: Signed) -> None:
        """Give the coordinator a new key and certificate; a process that serves takes it by itself.

        Args:
            hosts: new names and addresses, the first of which new bundles give; none: as before.
            port: that new bundles give; None: as before.
            days: for which the certificate is in force.
            signed: by whom, and why.

        Raises:
            ConfigError: if a host is none, or the files cannot be relied on.
        """
        with self._changing():
            roster, now = self.roster(), _seconds(self.clock.date())
            self._write_tls(hosts or hosts_of(tls_certificate(self.folder)), days)
            address = _address(roster.address, hosts, port)
            changed = _next(roster, now, address=address)
            change = _Change("the coordinator's certificate was renewed", "", b"", signed)
            self._put(changed, change)

    def go_on(self, signed: Signed) -> RosterContent:
        """Go on from the roster that is there, though the record knows a newer one or is lost.

        What the newer one said is lost: keys that it revoked have to be revoked again.

        Raises:
            ConfigError: if the roster is not as the authority signed it.
        """
        with self._changing():
            roster = read_roster(self.folder, self.certificate, behind=True)
            try:
                highest = last_line(self.folder).roster
            except ConfigError:
                highest = 0
                _set_aside(self.folder / RECORD)
            base = roster.model_copy(update={"number": max(roster.number, highest)})
            now = _seconds(self.clock.date())
            changed = _next(base, now, previous=roster.digest)
            self._put(changed, _Change("went on from an older roster", "", b"", signed))
            return changed

    # --- What they share ------------------------------------------------------------------------

    @contextmanager
    def _changing(self) -> Iterator[None]:
        certificates.check_authority(self.certificate, self.clock.date())
        try:
            with locked(self.folder.resolve()):
                for name in (ROSTER, TLS):  # what a killed command has left
                    for path in self.folder.glob(f"{name}.*.partial"):
                        path.unlink()
                yield
        except BlockingIOError:
            raise ConfigError(f"{self.folder}: another command changes it; try again") from None
        except OSError as error:
            raise ConfigError(f"{self.folder}: cannot be written ({error})") from error

    def _check_new_site(self, roster: RosterContent, request: Request) -> None:
        known = roster.known(request.key)
        if known is not None and known.standing is Standing.REVOKED:
            raise IdentityError(
                f"its key was revoked at {shown(known.since)}, as that of {known.site}; coming "
                "back takes a new key: `cloister node request --afresh`"
            )
        if known is not None:
            raise IdentityError(
                f"its key is enrolled already, as that of {known.site}; nothing was done. If its "
                "bundle was lost: `cloister coordinator renew` with the same file writes another"
            )
        if request.key == self.authority_key:
            raise IdentityError("its key is the authority's own")
        taken = roster.site(request.site)
        if taken is not None:
            raise ConfigError(
                f"site {taken.name!a} is enrolled already, with another key. A site that changes "
                "its key asks by `cloister node renew --new-key`; one whose key is lost is "
                "revoked first; another hospital takes another name in its node.toml"
            )

    def _bundle(self, roster: RosterContent, site: EnrolledSite, key: bytes, days: int) -> Bundle:
        wish = Wish(site.name, certificates.public_key(key), Use.NODE, days)
        made = issue(wish, self.key, self.certificate, self.clock.date())
        offer = Offer(
            address=roster.address,
            site=site.name,
            greatest_declared_size=site.greatest_declared_size,
            authority=certificates.certificate_pem(self.certificate).decode(),
            certificate=certificates.certificate_pem(made).decode(),
        )
        return Bundle.make(offer, self.key)

    def _write_tls(self, hosts: Sequence[str], days: int) -> None:
        key = certificates.new_key()
        names = list(dict.fromkeys(_written(host) for host in (*hosts, *LOOPBACK)))
        wish = Wish(names[0], key, Use.COORDINATOR, days, names)
        made = issue(wish, self.key, self.certificate, self.clock.date())
        content = certificates.key_pem(key) + certificates.certificate_pem(made)
        certificates.write_secret(self.folder / TLS, content)

    def _put(self, roster: RosterContent, change: _Change) -> None:
        """The roster first: a revocation holds, whatever becomes of the line that tells of it."""
        line = _line(roster, change)  # what cannot be told is not done
        certificates.write_secret(self.folder / ROSTER, signed_roster(roster, self.key))
        add_line(self.folder, line)


def _line(roster: RosterContent, change: _Change) -> Line:
    by, reason = change.signed
    try:
        (by + reason).encode()
    except UnicodeEncodeError:  # bytes of the command line that are no text
        raise ConfigError(f"by {by!a}, reason {reason!a}: expected text in UTF-8") from None
    return Line(
        roster=roster.number,
        digest=roster.digest,
        time=roster.written,
        what=change.what,
        site=change.site,
        key=fingerprint(change.key) if change.key else "",
        by=by,
        reason=reason,
    )


def tls_certificate(folder: Path) -> Certificate:
    """The coordinator's certificate as it lies in its folder, whether in force or not.

    Raises:
        ConfigError: if there is none.
    """
    content = certificates.read_secret(folder / TLS, "coordinator's certificate")
    try:
        return certificates.certificate(content, str(folder / TLS))
    except IdentityError as error:
        raise ConfigError(f"{error}; `cloister coordinator renew --host …` makes one") from None


class _Change(NamedTuple):
    """What the record will say of a change."""

    what: str
    site: str
    key: bytes
    signed: Signed


# --- The roster's next state --------------------------------------------------------------------


def _next(roster: RosterContent, now: datetime, **changes: object) -> RosterContent:
    fields = dict(roster) | {
        "number": roster.number + 1,
        "previous": roster.digest,
        "written": now,
        **changes,
    }
    return RosterContent.model_validate(fields)


def _known(site: str, key: bytes, bundle: Bundle, now: datetime) -> KnownKey:
    return KnownKey(
        site=site,
        key=base64.b64encode(key).decode(),
        standing=Standing.ENROLLED,
        since=now,
        until=bundle.certificate.not_valid_after_utc,
    )


def _left(known: KnownKey, now: datetime) -> KnownKey:
    """An enrolled key when another takes its place."""
    if known.standing is not Standing.ENROLLED:
        return known
    changes = {"standing": Standing.LEAVING, "since": now, "until": min(known.until, now + LEAVING)}
    return known.model_copy(update=changes)


def _revoked(known: KnownKey, now: datetime) -> KnownKey:
    if known.standing is Standing.REVOKED:
        return known
    return known.model_copy(update={"standing": Standing.REVOKED, "since": now})


def _speaking(roster: RosterContent, request: Request) -> EnrolledSite:
    """The site whose enrolled key speaks in a request for renewal."""
    known = roster.known(request.key) or roster.known(request.vouched_by)
    if known is None:
        raise IdentityError(
            "no enrolled key speaks for it; a site that comes for the first time, or whose key "
            "is lost, is enrolled: `cloister coordinator enrol`"
        )
    if known.standing is not Standing.ENROLLED:
        raise IdentityError(
            f"the key that speaks for it is {known.standing.value} since {shown(known.since)}; "
            "only an enrolled one can: `cloister node request --afresh`, and enrolment"
        )
    if known.site != request.site:
        raise IdentityError(
            f"it asks as {request.site}, and the key that speaks for it is that of {known.site}; "
            "a site keeps its name"
        )
    return next(site for site in roster.sites if site.name == known.site)


def _address(address: str, hosts: Sequence[str], port: int | None) -> str:
    before, _, old_port = address.rpartition(":")
    new_port = port or int(old_port)
    return address_of(_written(hosts[0]), new_port) if hosts else f"{before}:{new_port}"


def _seconds(now: datetime) -> datetime:
    return now.replace(microsecond=0)


def _set_aside(path: Path) -> None:
    if path.exists():
        path.rename(path.with_name(f"{path.name}.{secrets.token_hex(4)}.damaged"))


def _written(host: str) -> str:
    """A host as a certificate has it."""
    return str(certificates.host_name(host).value)


def _check_new(folder: Path, new: NewFederation, passphrase: str) -> None:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{folder}: holds something already; a federation takes a new folder")
    check_site_name(new.name)
    check_passphrase(passphrase)
    if not new.hosts:
        raise ConfigError("--host: expected the name or address at which nodes find this machine")
    for host in new.hosts:
        certificates.host_name(host)
    if not 0 < new.port < 65536:
        raise ConfigError(f"--port {new.port}: expected 1 to 65535")
