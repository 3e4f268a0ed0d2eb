"""Who is who in a federation: one EC P-384 key each, X.509 over it, and TLS 1.3 both ways.

The federation's authority signs the coordinator's certificate and one for each node. A certificate
is for one use alone: a node's cannot stand in for the coordinator's, nor the other way round. What
is read is checked against exactly the profile that the authority writes (RFC 5280): anything else
is refused, however valid it would be elsewhere. The time of every check is handed in.

A key is known by its *bytes* (SubjectPublicKeyInfo, DER), and between people by its fingerprint.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import os
import re
import ssl
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta
from enum import Enum
from functools import lru_cache
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_der_public_key,
    load_pem_private_key,
    load_pem_public_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID, ObjectIdentifier

from common.errors import ConfigError, IdentityError
from common.files import write_durably

PrivateKey = ec.EllipticCurvePrivateKey
PublicKey = ec.EllipticCurvePublicKey
Certificate = x509.Certificate

LARGEST_FILE = 64 * 1024
"""Bytes of a key, a certificate, a request or a bundle; a longer file is none of them."""
BACKDATED = timedelta(hours=1)
"""A certificate begins so long before it was made: clocks differ."""
SITE_NAME = r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,62}$"

_HASH = hashes.SHA384()
_GROUPS, _GROUP = 8, 5  # 40 decimal digits, 132 bits: nobody makes a second key that fits
_LABEL = re.compile(r"[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?")
_UNREADABLE = (ValueError, TypeError, UnsupportedAlgorithm, x509.InvalidVersion)


class Use(Enum):
    """What a certificate may be shown for."""

    COORDINATOR = ExtendedKeyUsageOID.SERVER_AUTH
    NODE = ExtendedKeyUsageOID.CLIENT_AUTH


# --- Keys ---------------------------------------------------------------------------------------


def new_key() -> PrivateKey:
    """A new key on P-384, from the operating system's randomness."""
    return ec.generate_private_key(ec.SECP384R1())


def key_bytes(key: PrivateKey | PublicKey) -> bytes:
    """What a key is known by: its public part as SubjectPublicKeyInfo, DER."""
    public = key.public_key() if isinstance(key, PrivateKey) else key
    return public.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)


def public_key(content: bytes) -> PublicKey:
    """The key with these bytes.

    Raises:
        IdentityError: if it is no key on P-384.
    """
    try:
        return p384(load_der_public_key(content), "key")
    except _UNREADABLE as error:
        raise IdentityError(f"no public key ({error}); expected one on P-384") from None


def p384(key: object, what: str) -> PublicKey:
    """`key`, if it is of the one kind that is used here.

    Raises:
        IdentityError: naming the kind that it is.
    """
    if isinstance(key, PublicKey) and isinstance(key.curve, ec.SECP384R1):
        return key
    kind = key.curve.name if isinstance(key, PublicKey) else type(key).__name__.lstrip("_")
    raise IdentityError(f"{what}: a key of the kind {kind}; expected EC P-384, as `cloister` makes")


@lru_cache(maxsize=1024)
def key_of_pem(content: bytes) -> bytes:
    """The bytes of a public key in PEM, as Flower's requests carry it.

    Raises:
        IdentityError: if it is no key on P-384.
    """
    try:
        return key_bytes(p384(load_pem_public_key(content), "key"))
    except _UNREADABLE as error:
        raise IdentityError(f"no public key ({error}); expected PEM") from None


@lru_cache(maxsize=1024)
def key_of_certificate(der: bytes) -> bytes:
    """The bytes of the key of a certificate, as ``ssl_object.getpeercert(True)`` gives it.

    Raises:
        IdentityError: if it is no certificate over a key on P-384.
    """
    try:
        return key_bytes(p384(x509.load_der_x509_certificate(der).public_key(), "certificate"))
    except _UNREADABLE as error:
        raise IdentityError(f"no certificate ({error}); expected X.509, DER") from None


def fingerprint(key: bytes) -> str:
    """What two people read to each other: 8 groups of 5 decimal digits, of the key's SHA-256.

    Decimal digits are the same in every language and are not mistaken on the phone as letters are.
    """
    number = int.from_bytes(hashlib.sha256(key).digest(), "big") % 10 ** (_GROUPS * _GROUP)
    digits = f"{number:0{_GROUPS * _GROUP}d}"
    return " ".join(digits[at : at + _GROUP] for at in range(0, len(digits), _GROUP))


def is_fingerprint(typed: str, key: bytes) -> bool:
    """Whether `typed` is the whole fingerprint of `key`, however its groups are set apart."""
    digits = re.sub(r"[\s-]", "", typed)
    return hmac.compare_digest(digits.encode(), fingerprint(key).replace(" ", "").encode())


def key_pem(key: PrivateKey) -> bytes:
    """A private key as a file holds it: PEM, PKCS #8, not encrypted."""
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def sign(key: PrivateKey, purpose: str, content: bytes) -> str:
    """A signature (ECDSA with SHA-384, in hex) over content of one purpose."""
    return key.sign(_purposed(purpose, content), ec.ECDSA(_HASH)).hex()


def check_signature(key: PublicKey, purpose: str, content: bytes, signature: str) -> None:
    """Check what `sign` made.

    Raises:
        IdentityError: if it is not the signature of that key on this content for that purpose.
    """
    try:
        key.verify(bytes.fromhex(signature), _purposed(purpose, content), ec.ECDSA(_HASH))
    except (InvalidSignature, ValueError):
        raise IdentityError(f"{purpose}: the signature does not fit; it was changed") from None


def _purposed(purpose: str, content: bytes) -> bytes:
    return f"cloister {purpose} 1\n".encode() + content


# --- Files --------------------------------------------------------------------------------------


def read_bounded(path: Path, what: str) -> bytes:
    """The content of a small file.

    Raises:
        ConfigError: if it cannot be read, or is longer than anything of ours.
    """
    return _read(path, what)[0]


def read_secret(path: Path, what: str) -> bytes:
    """The content of a file that its owner alone may read.

    Raises:
        ConfigError: if others may read it, too.
    """
    content, mode = _read(path, what)
    if mode & 0o077:
        raise ConfigError(
            f"{path}: the {what} has mode {mode:04o}, others may reach it; expected 0600: "
            f"run `chmod 600 {path}` and think about who has read it"
        )
    return content


def write_secret(path: Path, content: bytes) -> None:
    """Replace a file that its owner alone may read: whole and durable, or not at all."""
    write_durably(path, content, mode=0o600)


def private_key(content: bytes, source: Path) -> PrivateKey:
    """The private key in the content of the file `source`, which may hold a certificate as well.

    Raises:
        ConfigError: if there is none on P-384.
    """
    try:
        key = load_pem_private_key(content, None)
        if isinstance(key, PrivateKey) and isinstance(key.curve, ec.SECP384R1):
            return key
        problem = f"of the kind {type(key).__name__}"
    except _UNREADABLE as error:
        problem = str(error)
    raise ConfigError(f"{source}: no private key on P-384 ({problem}); put it back from a copy")


def _read(path: Path, what: str) -> tuple[bytes, int]:
    try:
        with path.open("rb") as file:
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
            content = file.read(LARGEST_FILE + 1)
    except OSError as error:
        raise ConfigError(f"{path}: the {what} cannot be read ({error})") from error
    if len(content) > LARGEST_FILE:
        raise ConfigError(
            f"{path}: more than {LARGEST_FILE // 1024} KiB; expected a {what}, which is shorter"
        )
    return content, mode


# --- Certificates -------------------------------------------------------------------------------


def certificate_pem(certificate: Certificate) -> bytes:
    """A certificate as a file holds it."""
    return certificate.public_bytes(Encoding.PEM)


def certificate(content: bytes, what: str) -> Certificate:
    """The first certificate in PEM.

    Raises:
        IdentityError: if there is none.
    """
    try:
        return x509.load_pem_x509_certificate(content)
    except _UNREADABLE as error:
        raise IdentityError(f"{what}: no certificate in PEM ({error})") from None


def key_of(certificate: Certificate, what: str) -> PublicKey:
    """The key of a certificate.

    Raises:
        IdentityError: if it is not on P-384.
    """
    try:
        return p384(certificate.public_key(), what)
    except _UNREADABLE as error:
        raise IdentityError(f"{what}: no public key ({error})") from None


def name_of(certificate: Certificate) -> str:
    """Of whom a certificate speaks: its common name; empty if it has not exactly one."""
    names = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    return str(names[0].value) if len(names) == 1 else ""


def check_authority(authority: Certificate, now: datetime) -> None:
    """Check that a certificate is a federation's authority, signed by itself, and in force.

    Raises:
        IdentityError: saying what is wrong.
    """
    what = "the authority's certificate"
    _check_issued(authority, authority, what)
    basic, usage = _extensions(authority, what)[:2]
    if not (basic.ca and basic.path_length == 0 and usage.key_cert_sign):
        raise IdentityError(f"{what}: it may not sign others; expected a federation's authority")
    check_time(authority, now, what)


def check_certificate(
    certificate: Certificate, authority: Certificate, use: Use, now: datetime
) -> None:
    """Check that `authority` made this certificate for `use`, and that it is in force.

    Raises:
        IdentityError: saying what is wrong.
    """
    what = f"the certificate of {name_of(certificate)!a}"
    _check_issued(certificate, authority, what)
    basic, usage, uses = _extensions(certificate, what)
    if basic.ca or usage.key_cert_sign or not usage.digital_signature:
        raise IdentityError(f"{what}: of an authority; expected one for a {use.name.lower()}")
    if uses != [use.value]:
        raise IdentityError(
            f"{what}: not made for a {use.name.lower()}; a certificate has one use, and cannot "
            "stand in for another"
        )
    check_time(certificate, now, what)


def check_time(certificate: Certificate, now: datetime, what: str) -> None:
    """Check that a certificate is in force.

    Raises:
        IdentityError: naming its time, this machine's, and the way out.
    """
    begins, ends = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    if now < begins:
        raise IdentityError(
            f"{what} begins at {shown(begins)}, and this machine's clock says {shown(now)}; set "
            "the clock right"
        )
    if now > ends:
        raise IdentityError(
            f"{what} ended at {shown(ends)}, and this machine's clock says {shown(now)}; renew "
            "it, or set the clock right"
        )


def shown(when: datetime) -> str:
    """A time as errors and people read it."""
    return f"{when:%Y-%m-%d %H:%M} UTC"


def _check_issued(certificate: Certificate, authority: Certificate, what: str) -> None:
    key_of(certificate, what)
    key_of(authority, "the authority's certificate")
    algorithm = certificate.signature_hash_algorithm
    if not isinstance(algorithm, hashes.SHA384):
        raise IdentityError(f"{what}: not signed as a federation's authority does (SHA-384)")
    try:
        certificate.verify_directly_issued_by(authority)
    except (InvalidSignature, *_UNREADABLE):
        raise IdentityError(f"{what}: this federation's authority did not sign it") from None


def _extensions(
    certificate: Certificate, what: str
) -> tuple[x509.BasicConstraints, x509.KeyUsage, list[ObjectIdentifier]]:
    try:
        found = certificate.extensions
        basic = found.get_extension_for_class(x509.BasicConstraints).value
        usage = found.get_extension_for_class(x509.KeyUsage).value
    except (x509.ExtensionNotFound, x509.DuplicateExtension, ValueError) as error:
        raise IdentityError(
            f"{what}: not as a federation's authority writes it ({error})"
        ) from None
    try:
        uses = list(found.get_extension_for_class(x509.ExtendedKeyUsage).value)
    except x509.ExtensionNotFound:
        uses = []
    return basic, usage, uses


# --- Hosts --------------------------------------------------------------------------------------


def host_name(text: str) -> x509.DNSName | x509.IPAddress:
    """A host's name or address, for a certificate.

    Raises:
        ConfigError: if it is neither.
    """
    try:
        return x509.IPAddress(ipaddress.ip_address(text))
    except ValueError:
        pass
    labels = text.split(".")
    if len(text) <= 253 and all(map(_LABEL.fullmatch, labels)) and not labels[-1].isdigit():
        return x509.DNSName(text.lower())
    raise ConfigError(
        f"host {text!a}: expected a name such as coordinator.example.org, without port, scheme "
        "or wildcard, or an address such as 192.0.2.7"
    )


def hosts_of(certificate: Certificate) -> tuple[str, ...]:
    """The names and addresses that a coordinator's certificate covers."""
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except (x509.ExtensionNotFound, ValueError):
        return ()
    return tuple(str(name.value) for name in names)


# --- TLS ----------------------------------------------------------------------------------------


def server_context(identity: bytes, authority: Certificate) -> ssl.SSLContext:
    """TLS 1.3 for a coordinator: a client without this authority's certificate does not come in.

    Tickets are off: every connection shows its certificate, whatever one before it has shown.

    Args:
        identity: private key and certificate, PEM.
        authority: the only one that is believed.
    """
    context = _context(ssl.PROTOCOL_TLS_SERVER, authority)
    context.num_tickets = 0
    load_identity(context, identity)
    return context


def client_context(identity: bytes, authority: Certificate) -> ssl.SSLContext:
    """TLS 1.3 for a node: the coordinator's certificate must be this authority's, for its host.

    Args:
        identity: private key and certificate, PEM.
        authority: the only one that is believed, the system's are not.
    """
    context = _context(ssl.PROTOCOL_TLS_CLIENT, authority)
    context.check_hostname = True
    context.hostname_checks_common_name = False
    load_identity(context, identity)
    return context


def load_identity(context: ssl.SSLContext, identity: bytes) -> None:
    """Give a context this key and certificate; new connections have it, those that are open not."""
    with _in_memory(identity) as path:
        context.load_cert_chain(path)


def _context(protocol: int, authority: Certificate) -> ssl.SSLContext:
    context = ssl.SSLContext(protocol)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.verify_mode = ssl.CERT_REQUIRED
    context.verify_flags |= ssl.VerifyFlags.VERIFY_X509_STRICT
    context.load_verify_locations(cadata=certificate_pem(authority).decode("ascii"))
    return context


@contextmanager
def _in_memory(content: bytes) -> Iterator[str]:
    """A file that is on no disk: `ssl` takes a key from a path alone."""
    descriptor = os.memfd_create("cloister", os.MFD_CLOEXEC)
    try:
        with os.fdopen(os.dup(descriptor), "wb") as file:
            file.write(content)
        yield f"/proc/self/fd/{descriptor}"
    finally:
        os.close(descriptor)
