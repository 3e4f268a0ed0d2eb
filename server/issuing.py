"""Certificates as the federation's authority makes them (RFC 5280)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import datetime, timedelta
from typing import NamedTuple

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.x509.oid import NameOID

from common.certificates import BACKDATED, Certificate, PrivateKey, PublicKey, Use, host_name


class Wish(NamedTuple):
    """A certificate to be made; `use` None: the authority's own."""

    name: str
    key: PrivateKey | PublicKey
    use: Use | None
    days: int
    hosts: Sequence[str] = ()


def issue(
    wish: Wish, signer: PrivateKey, authority: Certificate | None, now: datetime
) -> Certificate:
    """Make a certificate; it does not outlive that of the `authority` (None: it is the one)."""
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, wish.name)])
    key = wish.key.public_key() if isinstance(wish.key, PrivateKey) else wish.key
    ends = now.replace(microsecond=0) + timedelta(days=wish.days)
    if authority is not None:
        ends = min(ends, authority.not_valid_after_utc)
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(authority.subject if authority else subject)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now.replace(microsecond=0) - BACKDATED)
        .not_valid_after(ends)
    )
    for extension, critical in _extensions(wish, key, signer):
        builder = builder.add_extension(extension, critical)
    return builder.sign(signer, hashes.SHA384())


def _extensions(
    wish: Wish, key: PublicKey, signer: PrivateKey
) -> Iterator[tuple[x509.ExtensionType, bool]]:
    """RFC 5280 4.2: what a certificate may be used for."""
    ca = wish.use is None
    yield x509.BasicConstraints(ca=ca, path_length=0 if ca else None), True
    yield _usage(ca=ca), True
    yield x509.SubjectKeyIdentifier.from_public_key(key), False
    yield x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key()), False
    if wish.use is not None:
        yield x509.ExtendedKeyUsage([wish.use.value]), True
    if wish.hosts:
        yield x509.SubjectAlternativeName(map(host_name, wish.hosts)), False


def _usage(*, ca: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not ca,
        key_cert_sign=ca,
        crl_sign=ca,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )
