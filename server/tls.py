"""The coordinator's side of TLS 1.3, whose certificate is replaced while it serves."""

from __future__ import annotations

import ssl
from datetime import datetime, timedelta
from pathlib import Path

from common import certificates
from common.certificates import Certificate, Use
from common.clock import Clock
from common.errors import ConfigError, IdentityError
from server.authority import TLS
from server.roster import read_authority


class ServerTls:
    """What the fleet's listener shows and asks for: no caller without the authority's certificate.

    Attributes:
        context: one for as long as the listener lives; new connections see what was refreshed.

    Raises:
        ConfigError: if a file is missing or damaged, or others may read the key.
        IdentityError: if a certificate is not in force, or not the authority's.
    """

    def __init__(self, folder: Path, clock: Clock | None = None) -> None:
        self._path = folder / TLS
        self._clock = clock or Clock()
        self._authority = read_authority(folder)
        self._shown = self._read()
        self._certificate = self._checked(self._shown)
        self.context: ssl.SSLContext = certificates.server_context(self._shown, self._authority)

    def refresh(self) -> bool:
        """Take the certificate that is on the disk now, if it is another one; whether it is.

        Raises:
            ConfigError: if it cannot be used; what was in force still is.
            IdentityError: likewise.
        """
        found = self._read()
        if found == self._shown:
            return False
        checked = self._checked(found)
        certificates.load_identity(self.context, found)
        self._shown, self._certificate = found, checked
        return True

    @property
    def hosts(self) -> tuple[str, ...]:
        """The names and addresses that the certificate covers."""
        return certificates.hosts_of(self._certificate)

    @property
    def ends(self) -> datetime:
        """When the first of the two certificates ends."""
        return min(each.not_valid_after_utc for each in (self._certificate, self._authority))

    def days_left(self, now: datetime) -> float:
        """Until no node can connect any more; below 0 if none can."""
        return (self.ends - now) / timedelta(days=1)

    def _read(self) -> bytes:
        return certificates.read_secret(self._path, "coordinator's certificate")

    def _checked(self, content: bytes) -> Certificate:
        key = certificates.private_key(content, self._path)
        found = certificates.certificate(content, str(self._path))
        now = self._clock.date()
        try:
            certificates.check_authority(self._authority, now)
            certificates.check_certificate(found, self._authority, Use.COORDINATOR, now)
        except IdentityError as error:
            raise IdentityError(f"{error}; `cloister coordinator renew` makes another") from None
        if certificates.key_bytes(certificates.key_of(found, TLS)) != certificates.key_bytes(key):
            raise ConfigError(f"{self._path}: key and certificate do not belong together")
        return found
