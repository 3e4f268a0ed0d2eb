"""Who a pseudonym stands for: written by the intake, read by one person elsewhere."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
from multiprocessing import get_context
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.hpke import AEAD, KDF, KEM, Suite
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from client.intake.keys import SiteKey
from client.intake.reidentify import (
    Identity,
    ReidentificationTable,
    TableContent,
    create_officer_key,
    read_officer_key,
    read_table,
)
from client.keyfile import NodeKey
from common.errors import ConfigError, IntakeError, SealError

PASSPHRASE = "a long enough passphrase"  # noqa: S105 - of a test
HEADER, RECORD = 62, 1072
PATIENTS = [
    ("0" * 31 + "1", "North Hospital", "4711"),
    ("0" * 31 + "2", "", "GARCÍA^José"),
    ("0" * 31 + "3", "山田病院", "\udcff-\x00-1" + "x" * 57),
]


@pytest.fixture
def officer(tmp_path: Path) -> Path:
    """The officer's own machine."""
    folder = tmp_path / "officer"
    folder.mkdir()
    create_officer_key(folder / "officer.key", folder / "officer.pem", PASSPHRASE)
    return folder


@pytest.fixture
def site(tmp_path: Path, officer: Path) -> Path:
    """The intake's machine, with all that lies there."""
    folder = tmp_path / "site"
    folder.mkdir()
    (folder / "officer.pem").write_bytes((officer / "officer.pem").read_bytes())
    SiteKey.from_file(folder / "site.key")
    NodeKey.create(folder / "node.key")
    NodeKey.create(folder / "cohort.key")
    return folder


def table_at(site: Path) -> ReidentificationTable:
    return ReidentificationTable(site / "table", site / "officer.pem")


def fill(site: Path) -> Path:
    with table_at(site) as table:
        for patient in PATIENTS:
            table.add(*patient)
    return site / "table"


def read(file: Path, officer: Path) -> TableContent:
    return read_table(file, read_officer_key(officer / "officer.key", PASSPHRASE))


EVERYBODY = {name: (Identity(issuer, patient),) for name, issuer, patient in PATIENTS}


def test_the_officer_reads_what_the_intake_wrote(site: Path, officer: Path) -> None:
    found = read(fill(site), officer)

    assert found == TableContent(EVERYBODY, (), torn=False)


def test_a_record_is_hpke_as_rfc_9180_has_it(site: Path, officer: Path) -> None:
    key = read_officer_key(officer / "officer.key", PASSPHRASE)
    record = fill(site).read_bytes()[HEADER : HEADER + RECORD]

    suite = Suite(KEM.X25519, KDF.HKDF_SHA256, AEAD.AES_256_GCM)
    content = suite.decrypt(record, key, b"cloister re-identification 1")

    texts = [text.encode() for text in PATIENTS[0]]
    assert content.rstrip(b"\0") == b"".join(len(t).to_bytes(2, "big") + t for t in texts)


def test_lengths_and_places_tell_nothing_of_whom_a_record_is(site: Path) -> None:
    with table_at(site) as table:
        for number, patient in enumerate(["", "1", "9" * 64, "界" * 64]):
            table.add(f"{number:032x}", patient, patient)
            size = (site / "table").stat().st_size
            assert size == HEADER + (number + 1) * RECORD
    assert stat.S_IMODE((site / "table").stat().st_mode) == 0o600


def test_a_patient_is_added_once_a_process_and_read_once_of_many(site: Path, officer: Path) -> None:
    with table_at(site) as table:
        for _ in range(3):
            table.add(*PATIENTS[0])
    assert (site / "table").stat().st_size == HEADER + RECORD

    with table_at(site) as table:
        table.add(*PATIENTS[0])
        table.add(*PATIENTS[1])

    content = (site / "table").read_bytes()
    assert len(content) == HEADER + 3 * RECORD
    assert content[HEADER : HEADER + RECORD] != content[HEADER + RECORD : HEADER + 2 * RECORD]
    assert read(site / "table", officer).identities == {
        name: EVERYBODY[name] for name, _, _ in PATIENTS[:2]
    }


def test_one_pseudonym_of_two_patients_is_shown_as_it_is(site: Path, officer: Path) -> None:
    for patient in ("4711", "a lie"):
        with table_at(site) as table:
            table.add("f" * 32, "", patient)

    found = read(site / "table", officer).identities["f" * 32]

    assert found == (Identity("", "4711"), Identity("", "a lie"))


# --- Attacks ------------------------------------------------------------------------------------


def test_the_machine_of_the_intake_cannot_open_its_own_table(site: Path, officer: Path) -> None:
    """Whoever has all files and keys there, and the memory of a table that is open."""
    file = fill(site)
    table = table_at(site)
    table.add(*PATIENTS[0])
    secrets = [
        bytes.fromhex(path.read_text()) for path in site.glob("*.key") if path.name != "officer.key"
    ]
    assert len(secrets) == 3
    everything = b"".join(path.read_bytes() for path in site.iterdir())

    for _, issuer, patient in PATIENTS:
        for text in (issuer, patient):
            told = text.encode("utf-8", "surrogatepass")
            assert len(told) < 3 or told not in everything
    assert "4711" not in repr(vars(table))
    secrets += [SiteKey(secret).derive("re-identification") for secret in secrets]
    for secret in (*secrets, bytes(32), file.read_bytes()[HEADER : HEADER + 32]):
        with pytest.raises(SealError, match="none of 4 records can be opened"):
            read_table(file, X25519PrivateKey.from_private_bytes(secret))
    table.close()
    assert len(read(file, officer).identities) == 3  # the officer can


@pytest.mark.parametrize("at", [0, 31, 32, 500, RECORD - 1])
def test_a_changed_record_is_named_and_the_others_are_read(
    site: Path, officer: Path, at: int
) -> None:
    file = fill(site)
    content = bytearray(file.read_bytes())
    content[HEADER + RECORD + at] ^= 1
    file.write_bytes(content)

    found = read(file, officer)

    assert found.damaged == (2,)
    assert set(found.identities) == {PATIENTS[0][0], PATIENTS[2][0]}


def test_records_of_nonsense_are_refused_by_number(site: Path, officer: Path) -> None:
    """The public key is enough to seal anything: what is inside is not trusted either."""
    file = fill(site)
    key = read_officer_key(officer / "officer.key", PASSPHRASE).public_key()
    suite = Suite(KEM.X25519, KDF.HKDF_SHA256, AEAD.AES_256_GCM)
    with file.open("ab") as opened:
        for content in (b"\0\1\xff" + bytes(1021), b"\xff" * 1024):
            opened.write(suite.encrypt(content, key, b"cloister re-identification 1"))

    found = read(file, officer)

    assert found.damaged == (4, 5)
    assert found.identities == EVERYBODY


def test_another_officers_key_is_refused(site: Path, tmp_path: Path) -> None:
    file = fill(site)
    create_officer_key(tmp_path / "b.key", tmp_path / "b.pem", PASSPHRASE)

    with pytest.raises(SealError, match=r"none of 3 records.*another public key"):
        read_table(file, read_officer_key(tmp_path / "b.key", PASSPHRASE))
    before = file.read_bytes()
    with pytest.raises(ConfigError, match="another officer's table"):
        ReidentificationTable(file, tmp_path / "b.pem")
    assert file.read_bytes() == before


@pytest.mark.parametrize(
    "content", [b"x", b"node.toml = 1\n", b"cloister re-identification 2", bytes(70_000)]
)
def test_a_file_that_is_no_table_is_left_as_it_is(
    site: Path, officer: Path, content: bytes
) -> None:
    (site / "table").write_bytes(content)

    with pytest.raises(ConfigError, match="not a table"):
        table_at(site)
    with pytest.raises(ConfigError, match="not a table"):
        read(site / "table", officer)

    assert (site / "table").read_bytes() == content


def test_a_link_is_not_followed(site: Path) -> None:
    (site / "table").symlink_to(site / "elsewhere")

    with pytest.raises(ConfigError, match="cannot be written"):
        table_at(site)

    assert not (site / "elsewhere").exists()


@pytest.mark.parametrize("torn", [1, RECORD - 1])
def test_a_torn_record_is_cut_off_by_the_next(site: Path, officer: Path, torn: int) -> None:
    file = fill(site)
    with file.open("ab") as opened:
        opened.write(bytes(torn))
    assert read(file, officer) == TableContent(EVERYBODY, (), torn=True)

    with table_at(site) as table:
        table.add("e" * 32, "", "next")

    found = read(file, officer)
    assert (found.damaged, found.torn) == ((), False)
    assert set(found.identities) == {*EVERYBODY, "e" * 32}


def test_a_torn_header_is_written_anew(site: Path, officer: Path) -> None:
    table_at(site).close()
    os.truncate(site / "table", 40)

    assert read(fill(site), officer).identities == EVERYBODY


KILLED = """
import sys
from pathlib import Path
from client.intake.reidentify import ReidentificationTable
table = ReidentificationTable(Path(sys.argv[1]), Path(sys.argv[2]))
for number in range(100_000):
    table.add(f"{number:032x}", "", str(number))
    print(number, flush=True)
"""


def test_what_was_added_before_a_kill_is_there(site: Path, officer: Path) -> None:
    command = [sys.executable, "-c", KILLED, str(site / "table"), str(site / "officer.pem")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        said = [int(process.stdout.readline()) for _ in range(20)]
        os.kill(process.pid, signal.SIGKILL)
        said += [int(line) for line in process.stdout.read().split("\n")[:-1]]

    found = read(fill(site), officer)

    assert found.damaged == ()
    assert {f"{number:032x}" for number in said} <= set(found.identities)


def _add_many(site: Path, start: int) -> None:
    with table_at(site) as table:
        for number in range(start, start + 50):
            table.add(f"{number:032x}", "", str(number))


def test_several_processes_add_at_once(site: Path, officer: Path) -> None:
    with get_context("fork").Pool(4) as pool:
        pool.starmap(_add_many, [(site, start) for start in (0, 50, 100, 150)])
        pool.close()
        pool.join()

    found = read(site / "table", officer)

    assert found.damaged == ()
    assert found.identities == {f"{n:032x}": (Identity("", str(n)),) for n in range(200)}


@pytest.mark.parametrize(("issuer", "patient"), [("", "9" * 2000), ("9" * 600, "9" * 600)])
def test_an_identifier_that_does_not_fit_is_refused_and_not_quoted(
    site: Path, issuer: str, patient: str
) -> None:
    with table_at(site) as table, pytest.raises(IntakeError, match="too long") as refused:
        table.add("a" * 32, issuer, patient)

    assert "999" not in str(refused.value)
    assert (site / "table").stat().st_size == HEADER


FULL = """
import resource, signal, sys
from pathlib import Path
from client.intake.reidentify import ReidentificationTable
from common.errors import ConfigError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
table = ReidentificationTable(Path(sys.argv[1]), Path(sys.argv[2]))
table.add("a" * 32, "", "one")
resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
try:
    table.add("b" * 32, "", "secret-two")
except ConfigError as error:
    print(error)
"""


def test_a_full_disk_leaves_whole_records(site: Path, officer: Path) -> None:
    command = [sys.executable, "-c", FULL, str(site / "table"), str(site / "officer.pem")]

    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout

    assert "cannot be written" in said
    assert "secret" not in said
    found = read(site / "table", officer)
    assert (set(found.identities), found.torn) == ({"a" * 32}, False)


# --- The officer's keys -------------------------------------------------------------------------


def test_the_private_key_is_its_owners_and_under_a_passphrase(officer: Path) -> None:
    private, public = officer / "officer.key", officer / "officer.pem"

    assert stat.S_IMODE(private.stat().st_mode) == 0o600
    assert b"ENCRYPTED PRIVATE KEY" in private.read_bytes()
    assert public.read_bytes().startswith(b"-----BEGIN PUBLIC KEY")
    for wrong in ("", "another passphrase", PASSPHRASE + " ", "\udcff"):
        with pytest.raises(ConfigError, match="cannot be opened"):
            read_officer_key(private, wrong)
    assert read_officer_key(private, PASSPHRASE)


def test_a_short_passphrase_makes_no_key(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="15 characters; expected 16"):
        create_officer_key(tmp_path / "a", tmp_path / "b", "p" * 15)

    assert list(tmp_path.iterdir()) == []


def test_no_key_is_written_over(officer: Path) -> None:
    before = {path.name: path.read_bytes() for path in officer.iterdir()}

    for private, public in (("officer.key", "new.pem"), ("new.key", "officer.pem")):
        with pytest.raises(ConfigError, match="never written over"):
            create_officer_key(officer / private, officer / public, PASSPHRASE)

    assert {path.name: path.read_bytes() for path in officer.iterdir()} == before


def test_what_is_no_public_key_is_refused(site: Path, officer: Path) -> None:
    low = X25519PublicKey.from_public_bytes(bytes(32))  # whoever sees a record could open it
    curve = generate_private_key(SECP256R1()).public_key()
    pem = (Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    for content, reason in (
        (b"", "cannot be read"),
        (b"no key", "cannot be read"),
        ((officer / "officer.key").read_bytes(), "a private key"),
        (curve.public_bytes(*pem), "another kind"),
        (low.public_bytes(*pem), "cannot be read"),
    ):
        (site / "officer.pem").write_bytes(content)
        with pytest.raises(ConfigError, match=reason):
            table_at(site)
    (site / "officer.pem").unlink()
    with pytest.raises(ConfigError, match="cannot be read"):
        table_at(site)
    assert not (site / "table").exists()
