"""Identity and TLS between the two sides, with real sockets and OpenSSL as a second judge."""

from __future__ import annotations

import base64
import socket
import ssl
import stat
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.x509.oid import NameOID
from flwr.supercore.primitives.asymmetric import public_key_to_bytes, uses_nist_ec_curve

from common import certificates
from common.certificates import Use
from common.clock import Clock
from common.enrolment import Bundle, Request, check_address
from common.errors import ConfigError, IdentityError
from server.authority import Authority, Lifetimes, NewFederation, Signed
from server.tls import ServerTls

WORDS = "five words drawn by lot"
ADA = Signed("Ada", "as agreed")


def at(days: float = 0.0) -> Clock:
    """A clock that stands so many days from now."""
    when = datetime.now(UTC) + timedelta(days=days)
    return Clock(date=lambda: when)


def pem(key: certificates.PrivateKey, certificate: bytes) -> bytes:
    return certificates.key_pem(key) + certificate


@dataclass(frozen=True)
class Federation:
    """A federation on the disk, with its authority open, and ways to make members of it."""

    authority: Authority

    @property
    def folder(self) -> Path:
        return self.authority.folder

    def member(self, site: str, days: int = 365, *, clock: Clock | None = None) -> Member:
        authority = self.authority
        if clock is not None:
            authority = replace(authority, clock=clock)
        key = certificates.new_key()
        bundle = authority.enrol(Request.make(key, site), 500, days, ADA)
        return Member(key, bundle)

    def server(self) -> ssl.SSLContext:
        return ServerTls(self.folder).context


@dataclass(frozen=True)
class Member:
    """A node's key and bundle."""

    key: certificates.PrivateKey
    bundle: Bundle

    @property
    def pem(self) -> bytes:
        return pem(self.key, self.bundle.offer.certificate.encode())

    def client(self) -> ssl.SSLContext:
        return certificates.client_context(self.pem, self.bundle.authority)


@pytest.fixture(scope="module")
def make_federation(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Federation]:
    def make(name: str = "chest") -> Federation:
        folder = tmp_path_factory.mktemp("federations") / name
        new = NewFederation(name, ["coordinator.example.org"], 9092, Lifetimes(3650, 365))
        made = Authority.create(folder, new, WORDS, ADA, at(-30))
        return Federation(replace(made, clock=Clock()))

    return make


@pytest.fixture(scope="module")
def chest(make_federation: Callable[..., Federation]) -> Federation:
    return make_federation()


@pytest.fixture(scope="module")
def north(chest: Federation) -> Member:
    return chest.member("north")


@dataclass
class Met:
    """What came of a connection: what the server saw, and what went wrong on either side."""

    peer: bytes = b""
    version: str = ""
    heard: bytes = b""
    server_error: Exception | None = None
    client_error: Exception | None = None

    @property
    def well(self) -> bool:
        return self.heard == b"welcome"


def meet(server: ssl.SSLContext, client: ssl.SSLContext | None, host: str = "localhost") -> Met:
    """Both sides over a real socket; without a client context in plain text."""
    met = Met()
    listener = socket.create_server(("127.0.0.1", 0))
    listener.settimeout(60)

    def serve() -> None:
        try:
            plain, _ = listener.accept()
            plain.settimeout(60)
            with server.wrap_socket(plain, server_side=True) as secure:
                met.peer = secure.getpeercert(True) or b""
                met.version = str(secure.version())
                secure.recv(5)
                secure.sendall(b"welcome")
        except OSError as error:
            met.server_error = error

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        with socket.create_connection(listener.getsockname(), timeout=60) as plain:
            wrapped = client.wrap_socket(plain, server_hostname=host) if client else plain
            with wrapped as secure:
                secure.sendall(b"hello")
                met.heard = secure.recv(7)
    except OSError as error:
        met.client_error = error
    finally:
        thread.join(60)
        listener.close()
    return met


# --- Both sides speak ---------------------------------------------------------------------------


def test_a_node_and_its_coordinator_speak_tls_1_3_and_know_each_other(
    chest: Federation, north: Member
):
    met = meet(chest.server(), north.client())
    assert met.well, met
    assert met.version == "TLSv1.3"
    assert certificates.key_of_certificate(met.peer) == north.bundle.key
    assert certificates.key_of_certificate(met.peer) == certificates.key_bytes(north.key)


@pytest.mark.parametrize("host", ["coordinator.example.org", "127.0.0.1", "localhost"])
def test_the_coordinators_certificate_covers_its_hosts_and_loopback(
    chest: Federation, north: Member, host: str
):
    assert meet(chest.server(), north.client(), host).well


def test_a_host_that_the_certificate_does_not_cover_is_not_spoken_to(
    chest: Federation, north: Member
):
    met = meet(chest.server(), north.client(), "elsewhere.example.org")
    assert isinstance(met.client_error, ssl.SSLCertVerificationError)
    assert "elsewhere.example.org" in str(met.client_error)


def test_openssl_itself_finds_the_certificates_in_order(chest: Federation, north: Member, tmp_path):
    own = tmp_path / "north.pem"
    own.write_text(north.bundle.offer.certificate)
    for purpose, file, good in (
        ("sslclient", own, True),
        ("sslserver", own, False),
        ("sslserver", chest.folder / "tls.pem", True),
        ("sslclient", chest.folder / "tls.pem", False),
    ):
        said = subprocess.run(
            [
                *("openssl", "verify", "-x509_strict", "-purpose", purpose),
                *("-CAfile", chest.folder / "ca.pem", file),
            ],
            capture_output=True,
            check=False,
        )
        assert (said.returncode == 0) is good, said


# --- Who is not let in --------------------------------------------------------------------------


def bare(authority: x509.Certificate) -> ssl.SSLContext:
    """A client that believes the right authority, and shows nothing."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(cadata=certificates.certificate_pem(authority).decode())
    return context


def test_a_stranger_without_a_certificate_does_not_get_a_word_in(chest: Federation):
    met = meet(chest.server(), bare(chest.authority.certificate))
    assert not met.well
    assert "peer did not return a certificate" in str(met.server_error)


def test_plain_text_is_not_answered(chest: Federation):
    met = meet(chest.server(), None)
    assert not met.well
    assert isinstance(met.server_error, ssl.SSLError)


def test_tls_1_2_is_not_spoken_even_by_a_member(chest: Federation, north: Member):
    old = bare(chest.authority.certificate)
    certificates.load_identity(old, north.pem)
    assert meet(chest.server(), old).well, "the same client comes in when it may speak 1.3"
    old.maximum_version = ssl.TLSVersion.TLSv1_2
    met = meet(chest.server(), old)
    assert not met.well
    assert "UNSUPPORTED_PROTOCOL" in str(met.server_error)


def test_a_member_of_another_federation_of_the_same_name_is_a_stranger(
    chest: Federation, make_federation: Callable[..., Federation]
):
    other = make_federation("chest")
    theirs = other.member("north")
    bold = bare(chest.authority.certificate)
    certificates.load_identity(bold, theirs.pem)
    met = meet(chest.server(), bold)
    assert not met.well
    assert met.peer == b""
    assert isinstance(met.server_error, ssl.SSLError)
    met = meet(other.server(), theirs.client())
    assert met.well, "and at home it comes in"


def test_a_coordinator_of_another_federation_is_not_believed(
    north: Member, make_federation: Callable[..., Federation]
):
    met = meet(make_federation("chest").server(), north.client())
    assert isinstance(met.client_error, ssl.SSLCertVerificationError)


def test_another_hospital_cannot_play_the_coordinator(chest: Federation, north: Member):
    """Its certificate is of the same authority, and not made for it."""
    met = meet(certificates.server_context(north.pem, chest.authority.certificate), north.client())
    assert isinstance(met.client_error, ssl.SSLCertVerificationError)
    assert "purpose" in str(met.client_error)


def test_the_coordinators_certificate_cannot_play_a_node(chest: Federation, north: Member):
    tls = (chest.folder / "tls.pem").read_bytes()
    met = meet(chest.server(), certificates.client_context(tls, chest.authority.certificate))
    assert not met.well
    assert met.peer == b""
    assert "purpose" in str(met.server_error)


def test_a_certificate_is_of_no_use_without_its_key(chest: Federation, north: Member):
    stolen = pem(certificates.new_key(), north.bundle.offer.certificate.encode())
    with pytest.raises(ssl.SSLError, match="KEY_VALUES_MISMATCH"):
        certificates.client_context(stolen, chest.authority.certificate)
    # So the thief has to show a certificate of another key, which the authority has not signed.
    key = certificates.new_key()
    forged = certificates.key_pem(key) + self_signed(key, "north")
    bold = bare(chest.authority.certificate)
    certificates.load_identity(bold, forged)
    met = meet(chest.server(), bold)
    assert not met.well
    assert met.peer == b""


def test_a_certificate_that_has_ended_is_refused_in_the_handshake(chest: Federation):
    ended = chest.member("ended", 1, clock=at(-3))
    met = meet(chest.server(), ended.client())
    assert not met.well
    assert "expired" in str(met.server_error)
    with pytest.raises(IdentityError, match="ended at"):
        ended.bundle.check(datetime.now(UTC))


def test_every_connection_shows_its_certificate_anew(chest: Federation, north: Member):
    """No ticket lets a client in on what an earlier connection has shown."""
    client = north.client()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        context = chest.server()

        def serve() -> None:
            plain, _ = listener.accept()
            with context.wrap_socket(plain, server_side=True) as secure:
                secure.sendall(b"welcome")
                secure.recv(1)

        thread = threading.Thread(target=serve)
        thread.start()
        with (
            socket.create_connection(listener.getsockname(), timeout=60) as plain,
            client.wrap_socket(plain, server_hostname="localhost") as secure,
        ):
            assert secure.recv(7) == b"welcome"
            session = secure.session
            secure.sendall(b"x")
        thread.join(60)
    assert session is None or not session.has_ticket


# --- Fingerprints -------------------------------------------------------------------------------


def test_a_fingerprint_is_forty_digits_of_the_keys_sha_256(tmp_path: Path):
    key = certificates.key_bytes(certificates.new_key())
    (tmp_path / "key.der").write_bytes(key)
    said = subprocess.run(["sha256sum", tmp_path / "key.der"], capture_output=True, check=True)
    number = str(int(said.stdout.split()[0], 16))[-40:].zfill(40)
    groups = certificates.fingerprint(key).split(" ")
    assert "".join(groups) == number
    assert {len(group) for group in groups} == {5}


def test_a_fingerprint_may_be_typed_with_any_gaps_and_has_to_be_whole():
    key = certificates.key_bytes(certificates.new_key())
    whole = certificates.fingerprint(key)
    for typed in (whole, whole.replace(" ", ""), whole.replace(" ", "-"), f" {whole}\n"):
        assert certificates.is_fingerprint(typed, key)
    wrong = whole[:-1] + str((int(whole[-1]) + 1) % 10)
    for typed in ("", wrong, whole[:-1], whole[:11], f"{whole}0", whole[::-1], f"{whole}٣"):
        assert not certificates.is_fingerprint(typed, key), typed


# --- Requests and bundles -----------------------------------------------------------------------


def self_signed(key: Any, name: str) -> bytes:
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    now = datetime.now(UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .sign(key, hashes.SHA384())
    )
    return certificates.certificate_pem(made)


def asked_by(key: Any, *names: str, extension: bool = False) -> bytes:
    """A request that other software has made."""
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name) for name in names])
    builder = x509.CertificateSigningRequestBuilder().subject_name(subject)
    if extension:
        builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=None), True)
    algorithm = None if isinstance(key, ed25519.Ed25519PrivateKey) else hashes.SHA384()
    return builder.sign(key, algorithm).public_bytes(serialization.Encoding.PEM)


def test_a_request_says_who_asks_with_which_key_and_is_a_plain_pkcs_10(tmp_path: Path):
    key = certificates.new_key()
    made = Request.make(key, "north")
    (tmp_path / "request").write_bytes(made.pem)
    said = subprocess.run(
        ["openssl", "req", "-in", tmp_path / "request", "-verify", "-noout", "-subject"],
        capture_output=True,
        check=True,
    )
    assert b"CN = north" in said.stdout or b"CN=north" in said.stdout
    read = Request.read(tmp_path / "request")
    assert (read.site, read.key, read.vouched_by) == ("north", certificates.key_bytes(key), b"")


def test_an_old_key_speaks_for_a_new_one_and_for_no_other():
    old, new, other = (certificates.new_key() for _ in range(3))
    made = Request.make(new, "north", old=old)
    assert made.vouched_by == certificates.key_bytes(old)
    # The old key's word, taken over into the request of another key, or for another site.
    attribute = x509.load_pem_x509_csr(made.pem).attributes
    (vouched,) = list(attribute)
    for key, site in ((other, "north"), (new, "south")):
        builder = x509.CertificateSigningRequestBuilder().subject_name(
            x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, site)])
        )
        forged = builder.add_attribute(vouched.oid, vouched.value).sign(key, hashes.SHA384())
        with pytest.raises(IdentityError, match="signature does not fit"):
            Request.parse(forged.public_bytes(serialization.Encoding.PEM), "forged")


WEAK = {
    "rsa": lambda: rsa.generate_private_key(65537, 2048),
    "p256": lambda: ec.generate_private_key(ec.SECP256R1()),
    "p521": lambda: ec.generate_private_key(ec.SECP521R1()),
    "k1": lambda: ec.generate_private_key(ec.SECP256K1()),
    "ed25519": ed25519.Ed25519PrivateKey.generate,
}


@pytest.mark.parametrize("kind", WEAK)
def test_a_request_with_a_key_of_another_kind_is_refused_by_its_name(kind: str):
    with pytest.raises(IdentityError, match=r"of the kind \S+; expected EC P-384"):
        Request.parse(asked_by(WEAK[kind](), "north"), "request")


def changed(content: bytes, at: int) -> bytes:
    """A PEM whose DER differs in one bit."""
    der = bytearray(x509.load_pem_x509_csr(content).public_bytes(serialization.Encoding.DER))
    der[at] ^= 1
    body = base64.encodebytes(bytes(der)).decode()
    name = "CERTIFICATE REQUEST"
    return f"-----BEGIN {name}-----\n{body}-----END {name}-----\n".encode()


def test_a_request_that_was_changed_in_any_byte_is_refused():
    made = Request.make(certificates.new_key(), "north")
    length = len(x509.load_pem_x509_csr(made.pem).public_bytes(serialization.Encoding.DER))
    taken = []
    for place in range(length):
        with suppress(IdentityError):
            taken.append(Request.parse(changed(made.pem, place), "request"))
    # DER says how many of the signature's last bits count; saying one less leaves it as it is.
    assert len(taken) <= 1
    assert all((each.site, each.key) == (made.site, made.key) for each in taken)


def odd_requests() -> Iterator[tuple[str, bytes]]:
    good = Request.make(certificates.new_key(), "north").pem
    key = certificates.new_key()
    yield "empty", b""
    yield "text", b"please enrol us"
    yield "two of them", good + good
    yield "words before", b"north\n" + good
    yield "half", good[: len(good) // 2]
    yield "a certificate", self_signed(key, "north")
    yield "a private key", certificates.key_pem(key)
    yield "zeros", b"\0" * 1000
    yield "no name", asked_by(key)
    yield "two names", asked_by(key, "north", "south")
    yield "a path", asked_by(key, "../north")
    yield "a line", asked_by(key, "north\n")
    yield "blank", asked_by(key, " ")
    yield "letters of another script", asked_by(key, "nоrth")  # noqa: RUF001
    yield "asks to be an authority", asked_by(key, "north", extension=True)


ODD = dict(odd_requests())


@pytest.mark.parametrize("what", ODD)
def test_what_is_no_request_of_ours_is_refused(what: str):
    with pytest.raises(IdentityError, match=r"^request: "):
        Request.parse(ODD[what], "request")


@pytest.mark.parametrize("read", [Request.read, Bundle.read])
def test_a_file_that_is_too_long_is_not_read(read: Callable[[Path], Any], tmp_path: Path):
    (tmp_path / "long").write_bytes(b"-" * (certificates.LARGEST_FILE + 1))
    for path in (tmp_path / "long", Path("/dev/zero")):
        with pytest.raises(ConfigError, match="more than 64 KiB"):
            read(path)
    with pytest.raises(ConfigError, match="cannot be read"):
        read(tmp_path / "missing")


def test_a_bundle_that_was_changed_anywhere_is_refused(north: Member):
    whole = north.bundle.content.decode()
    offer = north.bundle.offer
    for old, new in (
        (offer.address, "https://elsewhere.example.org:9092"),
        ('"site": "north"', '"site": "south"'),
        ('"greatest_declared_size": 500', '"greatest_declared_size": 5000'),
        ('"greatest_declared_size": 500', '"greatest_declared_size": 500, "more": 1'),
        ("cloister bundle 1", "cloister bundle 2"),
        ('"signature": "30', '"signature": "31'),
        ('"signature": "30', '"signature": "'),
    ):
        assert old in whole
        with pytest.raises(IdentityError):
            Bundle.parse(whole.replace(old, new).encode(), "bundle")
    for content in (b"", b"{}", b"[]", whole.encode()[:-20], b"\xff" * 100):
        with pytest.raises(IdentityError, match="not a bundle"):
            Bundle.parse(content, "bundle")
    assert Bundle.parse(whole.encode(), "bundle").offer == offer


@pytest.mark.parametrize(
    "address",
    [
        "http://coordinator.example.org:9092",
        "https://coordinator.example.org",
        "https://coordinator.example.org:0",
        "https://coordinator.example.org:99999",
        "https://coordinator.example.org:9092/path",
        "https://user@coordinator.example.org:9092",
        "https://Coordinator.example.org:9092",
        "https://*.example.org:9092",
        "https://:9092",
        "",
    ],
)
def test_an_address_is_https_with_a_host_and_a_port(address: str):
    with pytest.raises(IdentityError, match="expected https://HOST:PORT"):
        check_address(address)


@pytest.mark.parametrize("host", ["coordinator.example.org", "192.0.2.7", "[2001:db8::1]", "host"])
def test_names_and_addresses_of_both_families_are_addresses(host: str):
    check_address(f"https://{host}:9092")


# --- Certificates and keys ----------------------------------------------------------------------


def test_a_certificate_of_one_use_is_refused_for_the_other(chest: Federation, north: Member):
    now, ca = datetime.now(UTC), chest.authority.certificate
    tls = certificates.certificate((chest.folder / "tls.pem").read_bytes(), "tls")
    certificates.check_certificate(tls, ca, Use.COORDINATOR, now)
    certificates.check_certificate(north.bundle.certificate, ca, Use.NODE, now)
    for wrong, use in (
        (tls, Use.NODE),
        (north.bundle.certificate, Use.COORDINATOR),
        (ca, Use.NODE),
        (ca, Use.COORDINATOR),
    ):
        with pytest.raises(IdentityError, match=r"not made for|of an authority"):
            certificates.check_certificate(wrong, ca, use, now)
    with pytest.raises(IdentityError, match=r"may not sign others|did not sign"):
        certificates.check_authority(tls, now)
    with pytest.raises(IdentityError, match="did not sign"):
        certificates.check_certificate(ca, tls, Use.NODE, now)


def crafted(
    signer: certificates.PrivateKey, issuer: str, *, ca: bool, signs: bool, use: Use | None
) -> certificates.Certificate:
    """A certificate of a profile that no authority of ours writes, over the signer's own key."""
    now = datetime.now(UTC)
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, issuer)])
    usage = dict.fromkeys(USAGES, False) | {"key_cert_sign": signs, "digital_signature": not signs}
    builder = (
        x509.CertificateBuilder(name, name, signer.public_key(), 7)
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.BasicConstraints(ca=ca, path_length=0 if ca else None), True)
        .add_extension(x509.KeyUsage(**usage), True)
    )
    if use is not None:
        builder = builder.add_extension(x509.ExtendedKeyUsage([use.value]), True)
    return builder.sign(signer, hashes.SHA384())


USAGES = (
    *("digital_signature", "content_commitment", "key_encipherment", "data_encipherment"),
    *("key_agreement", "key_cert_sign", "crl_sign", "encipher_only", "decipher_only"),
)


def test_a_certificate_that_could_sign_others_is_no_members(chest: Federation):
    key, ca, now = chest.authority.key, chest.authority.certificate, datetime.now(UTC)
    plain = crafted(key, "chest", ca=False, signs=False, use=Use.NODE)
    certificates.check_certificate(plain, ca, Use.NODE, now)
    for own, signs in ((True, True), (True, False), (False, True)):
        odd = crafted(key, "chest", ca=own, signs=signs, use=Use.NODE)
        with pytest.raises(IdentityError, match="of an authority"):
            certificates.check_certificate(odd, ca, Use.NODE, now)


def test_a_certificate_that_signs_itself_is_not_an_authority_by_that():
    key, now = certificates.new_key(), datetime.now(UTC)
    certificates.check_authority(crafted(key, "x", ca=True, signs=True, use=None), now)
    for own, signs in ((True, False), (False, True), (False, False)):
        with pytest.raises(IdentityError, match="may not sign others"):
            certificates.check_authority(crafted(key, "x", ca=own, signs=signs, use=None), now)


def test_the_clock_that_is_asked_decides(chest: Federation, north: Member):
    own = north.bundle.certificate
    begins, ends = own.not_valid_before_utc, own.not_valid_after_utc
    for good in (begins, ends):
        certificates.check_time(own, good, "it")
    second = timedelta(seconds=1)
    with pytest.raises(IdentityError, match=r"begins at .* clock says .*; set the clock right"):
        certificates.check_time(own, begins - second, "it")
    with pytest.raises(IdentityError, match=r"ended at .* clock says .*; renew it"):
        certificates.check_time(own, ends + second, "it")


def test_a_foreign_certificate_of_the_right_name_is_not_the_authoritys(chest: Federation):
    key = certificates.new_key()
    forged = certificates.certificate(self_signed(key, "chest"), "forged")
    with pytest.raises(IdentityError, match=r"not as a federation's authority|did not sign"):
        certificates.check_authority(forged, datetime.now(UTC))
    with pytest.raises(IdentityError, match="did not sign"):
        certificates.check_certificate(
            forged, chest.authority.certificate, Use.NODE, datetime.now(UTC)
        )


def test_flowers_header_and_the_handshake_name_the_same_key(north: Member):
    header = public_key_to_bytes(north.key.public_key())
    assert certificates.key_of_pem(header) == north.bundle.key
    assert uses_nist_ec_curve(north.key.public_key())
    for content in (b"", b"x" * 100, north.pem[:200]):
        with pytest.raises(IdentityError):
            certificates.key_of_pem(content)
        with pytest.raises(IdentityError):
            certificates.key_of_certificate(content)


def test_a_key_that_others_may_read_is_not_used(tmp_path: Path):
    path = tmp_path / "key"
    certificates.write_secret(path, b"secret")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert certificates.read_secret(path, "key") == b"secret"
    for mode in (0o640, 0o604, 0o660):
        path.chmod(mode)
        with pytest.raises(ConfigError, match=f"mode {mode:04o}.*chmod 600"):
            certificates.read_secret(path, "key")


@pytest.mark.parametrize(
    "host", ["a b", "-a", "a-", "a..b", "*.a.org", "https://a", "a:1", "", "ä", "1.2.3"]
)
def test_what_is_no_host_is_refused(host: str):
    with pytest.raises(ConfigError, match="expected a name such as"):
        certificates.host_name(host)


def test_no_key_is_left_on_the_disk_when_a_context_is_made(
    chest: Federation, north: Member, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setenv("SSLKEYLOGFILE", str(tmp_path / "keys"))
    assert meet(chest.server(), north.client()).well
    assert list(tmp_path.iterdir()) == []
