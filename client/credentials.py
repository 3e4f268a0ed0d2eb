"""Who a node is: its key, which never leaves, and the bundle that made it a member.

    identity/DIGITS.key     a private key, mode 0600, named after its public part
    identity/request.pem    the request that waits for a bundle
    identity/bundle.json    the bundle in force: authority, address, site, certificate

The bundle says which key is the node's, so a new one comes into force by replacing one file: what
reads it sees the old identity or the new one, and never half of each. A key goes only when neither
the bundle nor the request needs it.

The first bundle is believed because two people have compared the authority's fingerprint. From then
on the authority is pinned: a bundle of any other is refused.
"""

from __future__ import annotations

import hashlib
import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path
from typing import Self

from common import certificates
from common.certificates import Certificate, PrivateKey, PublicKey
from common.clock import Clock
from common.enrolment import Bundle, Request
from common.errors import ConfigError, IdentityError
from common.files import locked

FOLDER = "identity"
_REQUEST, _BUNDLE = "request.pem", "bundle.json"
_DAY = timedelta(days=1)


@dataclass(frozen=True)
class Credentials:
    """What a node shows to its coordinator, as it was when this was opened.

    Attributes:
        home: the node's folder.
        bundle: in force.
        private_key: of the node, for TLS and for the signatures that Flower asks for.
    """

    home: Path
    bundle: Bundle
    private_key: PrivateKey = field(repr=False)

    @classmethod
    def open(cls, home: Path, clock: Clock | None = None) -> Self:
        """The identity in the folder of a node, checked whole.

        Raises:
            ConfigError: if the node has joined no federation, or its key is missing.
            IdentityError: if its certificate, or the authority's, is not in force.
        """
        identity = _Identity(home)
        bundle = identity.bundle()
        if bundle is None:
            raise ConfigError(
                f"{home}: has joined no federation; `cloister node request` asks for it, and "
                "`cloister node join` does it"
            )
        bundle.check((clock or Clock()).date())
        return cls(home, bundle, identity.key(bundle.key))

    @property
    def public_key(self) -> PublicKey:
        """The other half of the key."""
        return self.private_key.public_key()

    @property
    def site(self) -> str:
        """The name under which the site is enrolled."""
        return self.bundle.offer.site

    @property
    def address(self) -> str:
        """Of the coordinator: ``https://HOST:PORT``."""
        return self.bundle.offer.address

    @property
    def greatest_declared_size(self) -> int:
        """That this site may state in this federation."""
        return self.bundle.offer.greatest_declared_size

    @property
    def ends(self) -> datetime:
        """When the first of the two certificates ends."""
        both = (self.bundle.certificate, self.bundle.authority)
        return min(each.not_valid_after_utc for each in both)

    def days_left(self, now: datetime) -> float:
        """Until the node cannot connect any more; below 0 if it cannot."""
        return (self.ends - now) / _DAY

    def ssl_context(self) -> ssl.SSLContext:
        """TLS 1.3 with this certificate, to this authority's coordinator alone; a new one."""
        pem = certificates.key_pem(self.private_key) + self._certificate
        return certificates.client_context(pem, self.bundle.authority)

    def superseded(self) -> bool:
        """Whether another bundle has come into force since; then open it and connect anew.

        Raises:
            ConfigError: if it cannot be read.
            IdentityError: if it is damaged.
        """
        found = _Identity(self.home).bundle()
        return found is None or found.content != self.bundle.content

    @property
    def _certificate(self) -> bytes:
        return certificates.certificate_pem(self.bundle.certificate)


class NotJoinedError(ConfigError):
    """A node that has joined no federation."""


def pinned_authority(home: Path) -> Certificate:
    """The authority that a node believes; its own certificate need not be in force any more.

    Raises:
        ConfigError: if its bundle cannot be read.
        IdentityError: if the bundle is damaged.
        NotJoinedError: if the node has joined no federation.
    """
    bundle = _Identity(home).bundle()
    if bundle is None:
        raise NotJoinedError(
            f"{home}: has joined no federation, so it knows none to believe; `cloister node join` "
            "does it"
        )
    return bundle.authority


@dataclass(frozen=True)
class Offered:
    """A bundle that fits this node, before it is accepted.

    Attributes:
        bundle: checked in itself, for a key of this node.
        known: whether its authority is the one that is pinned; else people have to compare its
            fingerprint first.
    """

    home: Path
    bundle: Bundle
    known: bool

    def accept(self) -> None:
        """Put the bundle in force: it pins the authority, the address and the site.

        Raises:
            ConfigError: if it cannot be written; what was in force still is.
            IdentityError: if another bundle has come into force meanwhile which it does not fit.
        """
        identity = _Identity(self.home)
        with identity.changing():
            _fitting(identity, self.bundle)
            certificates.write_secret(identity.folder / _BUNDLE, self.bundle.content)
            identity.answered(self.bundle)
            identity.tidy()


def request(home: Path, site: str) -> Request:
    """Ask to be enrolled as `site` with a key of its own, which is made here; nothing leaves.

    Asked again before an answer has come, it is the same request.

    Raises:
        ConfigError: if the node has joined already, waits under another name, or nothing can be
            written.
    """
    identity = _Identity(home)
    with identity.changing():
        if identity.bundle() is not None:
            raise ConfigError(
                f"{home}: has joined a federation; `cloister node renew` goes on with it. After "
                "a revocation: `cloister node request --afresh`"
            )
        waiting = identity.request()
        if waiting is None:
            return identity.ask(certificates.new_key(), site)
        if waiting.site != site:
            raise ConfigError(
                f"{home}: waits to be enrolled as {waiting.site}, and the policy's site is "
                f"{site}; `cloister node request --afresh` asks anew"
            )
        return waiting


def request_afresh(home: Path, site: str) -> Request:
    """Ask with a new key that no older one vouches for, as after a revocation.

    An identity that is in force stays so until the bundle has come.

    Raises:
        ConfigError: if nothing can be written.
    """
    identity = _Identity(home)
    with identity.changing():
        made = identity.ask(certificates.new_key(), site)
        identity.tidy()
        return made


def renew(home: Path, *, new_key: bool) -> Request:
    """Ask for a new certificate, over the same key or a new one; the present key vouches for it.

    What is in force stays so until the bundle has come; it may have ended. While a new key waits
    for its bundle, it is asked for again, whatever `new_key` says.

    Raises:
        ConfigError: if the node has joined no federation, or nothing can be written.
    """
    identity = _Identity(home)
    with identity.changing():
        bundle = identity.bundle()
        if bundle is None:
            raise ConfigError(f"{home}: has joined no federation; see `cloister node request`")
        waiting = identity.request()
        if waiting and waiting.key != bundle.key and waiting.vouched_by == bundle.key:
            return waiting  # the coordinator may have let go of the present key for it already
        present = identity.key(bundle.key)
        key = certificates.new_key() if new_key else present
        made = identity.ask(key, bundle.offer.site, old=present)
        identity.tidy()
        return made


def offered(home: Path, path: Path, now: datetime) -> Offered:
    """Read a bundle for this node, and check all of it but whether its authority is the right one.

    Raises:
        ConfigError: if it cannot be read, or this node has asked for nothing.
        IdentityError: if it is damaged, not in force, another node's, another federation's, or
            older than what this node has.
    """
    bundle = Bundle.read(path)
    bundle.check(now)
    return Offered(home, bundle, _fitting(_Identity(home), bundle))


def _fitting(identity: _Identity, bundle: Bundle) -> bool:
    """Check that a bundle is for this node; whether its authority is pinned already."""
    identity.key_for(bundle)
    present, waiting = identity.bundle(), identity.request()
    if present is None:
        if waiting is not None and waiting.site != bundle.offer.site:
            raise IdentityError(
                f"the bundle is for the site {bundle.offer.site}, and this node has asked to be "
                f"enrolled as {waiting.site}; speak with the coordinator's operator"
            )
        return False
    if present.authority_key != bundle.authority_key:
        raise IdentityError(
            f"the bundle is of another federation ({bundle.federation}); this node is in "
            f"{present.federation}, whose authority is pinned. A node is in one federation: take "
            f"a folder of its own for another, or put {identity.folder} away by hand"
        )
    if bundle.offer.site != present.offer.site and not _asked(waiting, bundle):
        raise IdentityError(
            f"the bundle is for the site {bundle.offer.site}, and this node is {present.offer.site}"
        )
    if bundle.certificate.not_valid_before_utc < present.certificate.not_valid_before_utc:
        raise IdentityError("the bundle is older than the one in force; ask for the newest")
    return True


def _asked(waiting: Request | None, bundle: Bundle) -> bool:
    return waiting is not None and (waiting.site, waiting.key) == (bundle.offer.site, bundle.key)


class _Identity:
    """The folder `identity/` of a node."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.folder = home / FOLDER

    @contextmanager
    def changing(self) -> Iterator[None]:
        """Hold the folder for this process alone; it is made if there is none."""
        try:
            self.folder.mkdir(mode=0o700, exist_ok=True)
            self.folder.chmod(0o700)
            with locked(self.folder):
                yield
        except BlockingIOError:
            raise ConfigError(f"{self.folder}: another process changes it; try again") from None
        except OSError as error:
            raise ConfigError(f"{self.folder}: cannot be written ({error})") from error

    def bundle(self) -> Bundle | None:
        """The bundle in force; None before there is one."""
        path = self.folder / _BUNDLE
        if not path.exists():
            return None
        return Bundle.parse(certificates.read_secret(path, "bundle"), str(path))

    def request(self) -> Request | None:
        """The request that waits; None if none does."""
        path = self.folder / _REQUEST
        return Request.read(path) if path.exists() else None

    def ask(self, key: PrivateKey, site: str, *, old: PrivateKey | None = None) -> Request:
        """Keep the key, then a request of it."""
        made = Request.make(key, site, old=old)
        path = self._path(made.key)
        if not path.exists():
            certificates.write_secret(path, certificates.key_pem(key))
        certificates.write_secret(self.folder / _REQUEST, made.pem)
        return made

    def key(self, content: bytes) -> PrivateKey:
        """The private key of a public one.

        Raises:
            ConfigError: if it is not here, or not that one, or others may read it.
        """
        path = self._path(content)
        key = certificates.private_key(certificates.read_secret(path, "node's key"), path)
        if certificates.key_bytes(key) != content:
            raise ConfigError(f"{path}: another key than its name says; put it back from a copy")
        return key

    def key_for(self, bundle: Bundle) -> None:
        """Check that a bundle is for a key of this node.

        Raises:
            IdentityError: if it is for another's.
        """
        if not self._path(bundle.key).exists():
            raise IdentityError(
                "the bundle is for a key that this node does not have: for another node, or for "
                "an older request; send the newest request to the coordinator's operator"
            )
        self.key(bundle.key)

    def answered(self, bundle: Bundle) -> None:
        """Forget the request that this bundle answers."""
        waiting = self.request()
        if waiting is not None and waiting.key == bundle.key:
            (self.folder / _REQUEST).unlink()

    def tidy(self) -> None:
        """Remove the keys that neither the bundle nor the request needs any more."""
        needed = {self._path(each.key) for each in (self.bundle(), self.request()) if each}
        for pattern in ("*.key", "*.partial"):  # the second: what a killed command has left
            for path in self.folder.glob(pattern):
                if path not in needed:
                    path.unlink()

    def _path(self, key: bytes) -> Path:
        return self.folder / f"{hashlib.sha256(key).hexdigest()[:16]}.key"
