"""What travels between a hospital and its coordinator when a site is enrolled: two small files.

    request   node -> coordinator   PEM, PKCS #10 (RFC 2986): the site's name, the node's new
                                    public key, signed by that key. Where the node is enrolled
                                    already, its old key has signed the new one in an attribute.
    bundle    coordinator -> node   JSON, signed by the authority: the authority's certificate,
                                    the node's, the coordinator's address, the site's bound

Neither holds a secret: they may travel by mail. That they arrive as they were sent is what two
people make sure of on the phone, by fingerprint. Whoever reads one checks all of it, and refuses
what this version would not have written.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Annotated, Literal, Self
from urllib.parse import urlsplit

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID
from pydantic import Field, ValidationError

from common import certificates
from common.certificates import SITE_NAME, Certificate, PrivateKey, Use
from common.errors import ConfigError, IdentityError
from common.spec import Count, Section

_VOUCHED = x509.ObjectIdentifier("2.25.321244284673421838934106982768885516713")
"""Attribute of a request: the old key and its signature on the new one (an arc from an UUID)."""
_BLOCK = re.compile(
    rb"-----BEGIN CERTIFICATE REQUEST-----[^-]+-----END CERTIFICATE REQUEST-----\s*"
)
_MALFORMED = (ValueError, TypeError, UnsupportedAlgorithm, x509.InvalidVersion)


def check_site_name(name: str) -> None:
    """Check that a site, or a federation, may be called so.

    Raises:
        ConfigError: saying what a name is made of.
    """
    if not re.fullmatch(SITE_NAME, name):
        raise ConfigError(
            f"name {name!a}: expected 1 to 63 letters of ASCII, digits, dots, hyphens and "
            "underscores, the first a letter or a digit"
        )


# --- Requests -----------------------------------------------------------------------------------


class _Vouched(Section):
    """The attribute of a request by which an enrolled key speaks for a new one."""

    key: Annotated[str, Field(pattern=r"^([0-9a-f]{2}){1,500}$")]
    signature: Annotated[str, Field(pattern=r"^([0-9a-f]{2}){1,200}$")]


@dataclass(frozen=True)
class Request:
    """A node asks to be enrolled, or goes on with another key.

    Attributes:
        site: as which it asks.
        key: bytes of its key; whoever made the request has that key.
        vouched_by: bytes of the older key that has signed the new one; empty if none has.
        pem: the file.
    """

    site: str
    key: bytes
    vouched_by: bytes
    pem: bytes

    @classmethod
    def make(cls, key: PrivateKey, site: str, *, old: PrivateKey | None = None) -> Self:
        """The request of `key`, vouched for by the `old` one if there is one.

        Raises:
            ConfigError: if no site may have that name.
        """
        check_site_name(site)
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, site)])
        builder = x509.CertificateSigningRequestBuilder().subject_name(subject)
        if old is not None:
            signature = certificates.sign(old, "renewal", _new(site, key))
            vouched = _Vouched(key=certificates.key_bytes(old).hex(), signature=signature)
            builder = builder.add_attribute(_VOUCHED, vouched.model_dump_json().encode())
        return cls.parse(builder.sign(key, hashes.SHA384()).public_bytes(Encoding.PEM), "request")

    @classmethod
    def read(cls, path: Path) -> Self:
        """The request in a file.

        Raises:
            ConfigError: if there is no such file, or it is too long.
            IdentityError: as `parse`.
        """
        return cls.parse(certificates.read_bounded(path, "request"), str(path))

    @classmethod
    def parse(cls, content: bytes, source: str) -> Self:
        """The request in `content`, which came from `source`.

        Raises:
            IdentityError: if it is none, its signatures do not fit, its key is of another kind,
                or it holds what no request of ours does.
        """
        if not _BLOCK.fullmatch(content):
            raise IdentityError(
                f"{source}: not an enrolment request; expected the PEM file that `cloister node "
                "request` has written, and nothing else in it"
            )
        try:
            return cls._parsed(x509.load_pem_x509_csr(content), content)
        except IdentityError as error:
            raise IdentityError(f"{source}: {error}") from None
        except _MALFORMED as error:
            raise IdentityError(
                f"{source}: a damaged request ({error}); ask for it again"
            ) from None

    @classmethod
    def _parsed(cls, asked: x509.CertificateSigningRequest, pem: bytes) -> Self:
        key = certificates.p384(asked.public_key(), "its key")
        if not asked.is_signature_valid:
            raise IdentityError("its signature is not that of its key: it was changed on the way")
        names = [str(name.value) for name in asked.subject]
        if len(names) != 1 or not re.fullmatch(SITE_NAME, names[0]):
            raise IdentityError(f"it asks for {names!a:.200}; expected one site's name")
        if any(each.oid != _VOUCHED for each in asked.attributes):
            raise IdentityError("it asks for more than a name and a key; only those are given")
        content = certificates.key_bytes(key)
        return cls(names[0], content, _vouched_by(asked, names[0], content), pem)


def _vouched_by(asked: x509.CertificateSigningRequest, site: str, key: bytes) -> bytes:
    """Bytes of the old key that signed this one; empty if none is named."""
    try:
        vouched = _Vouched.model_validate_json(
            asked.attributes.get_attribute_for_oid(_VOUCHED).value
        )
    except x509.AttributeNotFound:
        return b""
    except ValidationError:
        raise IdentityError("the part in which an old key speaks for it is damaged") from None
    old = bytes.fromhex(vouched.key)
    signed = _renewal(site, key)
    certificates.check_signature(certificates.public_key(old), "renewal", signed, vouched.signature)
    return old


def _new(site: str, key: PrivateKey) -> bytes:
    return _renewal(site, certificates.key_bytes(key))


def _renewal(site: str, key: bytes) -> bytes:
    return f"{site}\n".encode() + key


# --- Bundles ------------------------------------------------------------------------------------


class Offer(Section):
    """What the authority signs for a node.

    Attributes:
        address: of the coordinator, such as ``https://coordinator.example.org:9092``.
        site: the name under which the site is enrolled.
        greatest_declared_size: that the site may state.
        authority: the federation's certificate, PEM.
        certificate: the node's, PEM.
    """

    format: Literal["cloister bundle 1"] = "cloister bundle 1"
    address: Annotated[str, Field(max_length=300)]
    site: Annotated[str, Field(pattern=SITE_NAME)]
    greatest_declared_size: Count
    authority: Annotated[str, Field(max_length=5000)]
    certificate: Annotated[str, Field(max_length=5000)]


class _Signed(Section):
    offer: Offer
    signature: Annotated[str, Field(pattern=r"^([0-9a-f]{2}){1,200}$")]


@dataclass(frozen=True)
class Bundle:
    """A node's place in a federation: whole, and signed by the authority that it names.

    Whether that authority is to be trusted is for people to say, by its fingerprint.
    """

    offer: Offer
    content: bytes
    authority: Certificate
    certificate: Certificate

    @classmethod
    def make(cls, offer: Offer, authority: PrivateKey) -> Self:
        """Sign what is offered."""
        signed = _Signed(
            offer=offer, signature=certificates.sign(authority, "bundle", _canonical(offer))
        )
        return cls.parse(signed.model_dump_json(indent=1).encode() + b"\n", "bundle")

    @classmethod
    def read(cls, path: Path) -> Self:
        """The bundle in a file.

        Raises:
            ConfigError: if there is no such file, or it is too long.
            IdentityError: as `parse`.
        """
        return cls.parse(certificates.read_bounded(path, "bundle"), str(path))

    @classmethod
    def parse(cls, content: bytes, source: str) -> Self:
        """The bundle in `content`, which came from `source`.

        Raises:
            IdentityError: if it is none, or not as the authority in it signed it.
        """
        try:
            signed = _Signed.model_validate_json(content)
        except ValidationError as error:
            wrong = error.errors()[0]
            where = ".".join(map(str, wrong["loc"])) or "the file"
            raise IdentityError(
                f"{source}: not a bundle ({where}: {wrong['msg']}); expected the file that "
                "`cloister coordinator enrol` has written"
            ) from None
        try:
            return cls._parsed(signed, content)
        except IdentityError as error:
            raise IdentityError(f"{source}: {error}") from None

    @classmethod
    def _parsed(cls, signed: _Signed, content: bytes) -> Self:
        offer = signed.offer
        authority = certificates.certificate(offer.authority.encode(), "authority")
        key = certificates.key_of(authority, "authority")
        certificates.check_signature(key, "bundle", _canonical(offer), signed.signature)
        check_address(offer.address)
        own = certificates.certificate(offer.certificate.encode(), "certificate")
        if certificates.name_of(own) != offer.site:
            raise IdentityError(f"its certificate is not that of the site {offer.site}")
        return cls(offer, content, authority, own)

    @property
    def federation(self) -> str:
        """The federation's name."""
        return certificates.name_of(self.authority)

    @property
    def authority_key(self) -> bytes:
        """Bytes of the key that everything rests on."""
        return certificates.key_bytes(certificates.key_of(self.authority, "authority"))

    @property
    def key(self) -> bytes:
        """Bytes of the node's key."""
        return certificates.key_bytes(certificates.key_of(self.certificate, "certificate"))

    def check(self, now: datetime) -> None:
        """Check both certificates: made for this, and in force.

        Raises:
            IdentityError: saying what is wrong.
        """
        certificates.check_authority(self.authority, now)
        certificates.check_certificate(self.certificate, self.authority, Use.NODE, now)


def address_of(host: str, port: int) -> str:
    """Where a coordinator is found."""
    return f"https://[{host}]:{port}" if ":" in host else f"https://{host}:{port}"


def check_address(address: str) -> None:
    """Check that a coordinator's address is one, and HTTPS.

    Raises:
        IdentityError: if it is not.
    """
    try:
        parts = urlsplit(address)
        host, port = parts.hostname or "", parts.port or 0
        certificates.host_name(host)
        if address == address_of(host, port) and port:
            return
    except (ValueError, ConfigError):
        pass
    raise IdentityError(f"address {address!a:.200}: expected https://HOST:PORT")


def _canonical(offer: Offer) -> bytes:
    return json.dumps(offer.model_dump(mode="json"), sort_keys=True, separators=(",", ":")).encode()
