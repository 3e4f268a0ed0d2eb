"""The C-STORE service against real senders, and against those who mean harm."""

from __future__ import annotations

import json
import logging
import socket
import ssl
import struct
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from pydantic import ValidationError
from pydicom.dataset import FileDataset
from pydicom.pixels.decoders.base import get_decoder
from pydicom.uid import UID, AllTransferSyntaxes
from pynetdicom import AE, _config, build_context
from pynetdicom.dimse_messages import C_FIND_RQ, C_STORE_RQ
from pynetdicom.dimse_primitives import C_FIND, C_STORE
from pynetdicom.dsutils import encode
from pynetdicom.pdu import P_DATA_TF

from client.intake.inbox import TAKEN, Inbox, Outcome, Trouble
from client.intake.listen import SYNTAXES, Listener, bounds
from client.intake.reception import Caller, Listen
from common.errors import ConfigError

CR = "1.2.840.10008.5.1.4.1.1.1"
UNKNOWN_TO_DCMTK = "1.2.840.10008.5.1.4.1.1.66.7"
PDF = "1.2.840.10008.5.1.4.1.1.104.1"
OUT_OF_RESOURCES, MISMATCH, NOT_UNDERSTOOD, CLASS_NOT_SUPPORTED = 0xA700, 0xA900, 0xC000, 0x0122
# What storescu is told to propose, so that it sends each file as it is.
PROPOSALS = {
    "1.2.840.10008.1.2": "-xi",
    "1.2.840.10008.1.2.1": "-xe",
    "1.2.840.10008.1.2.2": "-xb",
    "1.2.840.10008.1.2.5": "-xr",
    "1.2.840.10008.1.2.4.50": "-xy",
    "1.2.840.10008.1.2.4.51": "-xx",
    "1.2.840.10008.1.2.4.70": "-xs",
    "1.2.840.10008.1.2.4.80": "-xt",
    "1.2.840.10008.1.2.4.81": "-xu",
    "1.2.840.10008.1.2.4.90": "-xv",
    "1.2.840.10008.1.2.4.91": "-xw",
}


class Service:
    """A running service and its inbox."""

    def __init__(self, listener: Listener, settings: Listen) -> None:
        self.listener, self.inbox, self.port = listener, listener.inbox, settings.port

    @property
    def files(self) -> list[Path]:
        """Everything that lies in the inbox but its key."""
        return [
            file
            for file in self.inbox.path.rglob("*")
            if file.is_file() and file.name != "inbox.key"
        ]

    def wait_until(self, holds: Callable[[], bool], seconds: float = 30.0) -> bool:
        until = time.monotonic() + seconds
        while not (held := holds()) and time.monotonic() < until:
            time.sleep(0.02)
        return held

    def is_idle(self) -> bool:
        return self.listener.associations == 0

    def echo(self, title: str = "PACS") -> bool:
        """Whether somebody else is served."""
        association = associate(self.port, title, contexts=[build_context("1.2.840.10008.1.1")])
        if not association.is_established:
            return False
        status = association.send_c_echo()
        association.release()
        return bool(status and status.Status == 0)


@pytest.fixture
def start(tmp_path: Path, free_port: Callable[[], int]) -> Iterator[Callable[..., Service]]:
    """`start(…)`: a service over plain TCP on this machine, with changes of its settings."""
    with ExitStack() as stack:

        def begin(**changes: Any) -> Service:
            usual: dict[str, Any] = {
                "callers": (Caller(ae_title="PACS"), Caller(ae_title="ORTHANC")),
                "transport": "plain",
                "port": free_port(),
                "least_free_gib": 0.01,
                "idle_seconds": 20.0,
            }
            settings = Listen(**(usual | changes))
            path = tmp_path / f"inbox{settings.port}"
            opened = Inbox.opened(path, bounds(settings), silence=0.5)
            listener = Listener(settings, tmp_path, stack.enter_context(opened))
            stack.enter_context(listener.serving(grace=2.0))
            return Service(listener, settings)

        yield begin


@pytest.fixture
def start_tls(
    start: Callable[..., Service], authority: Callable[[str], Any]
) -> Callable[..., Service]:
    """`start_tls(…)`: a service with a certificate of the hospital, for callers with one."""

    def begin(**changes: Any) -> Service:
        hospital = authority("hospital")
        own = hospital.issue("cloister")
        usual = {
            "transport": "tls",
            "host": "127.0.0.1",
            "certificate": str(own.certificate),
            "key": str(own.key),
            "callers_certificates": str(hospital.file),
        }
        return start(**(usual | changes))

    return begin


def associate(port: int, title: str = "PACS", *, contexts: Any = None, called: str = "CLOISTER"):
    ae = AE(title)
    ae.acse_timeout = ae.dimse_timeout = ae.network_timeout = 30
    asked = contexts or [build_context(CR, list(SYNTAXES[:1]))]
    return ae.associate("127.0.0.1", port, contexts=asked, ae_title=called)


def answer(port: int, what: FileDataset | Path) -> int:
    """The status that an object is answered with; a path is sent byte by byte."""
    association = associate(port)
    assert association.is_established
    status = association.send_c_store(what)
    association.release()
    return int(status.Status)


def hold(association: Any) -> None:
    """Leave what is answered for `status_of`, as pynetdicom's own requests do."""
    association._reactor_checkpoint.clear()
    while not association._is_paused:
        time.sleep(0.01)


def status_of(association: Any) -> int:
    """The status of the next answer; the association goes on by itself."""
    _, response = association.dimse.get_msg(block=True)
    association._reactor_checkpoint.set()
    assert response is not None
    return int(response.Status)


def run(*command: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*map(str, command)], capture_output=True, text=True, timeout=60, check=False
    )


def data_set(path: Path) -> tuple[str, bytes]:
    """The transfer syntax of a file, and all bytes behind its file meta information."""
    meta = pydicom.filereader.read_file_meta_info(path)
    length = 128 + 4 + 12 + int(meta.FileMetaInformationGroupLength)
    return str(meta.TransferSyntaxUID), path.read_bytes()[length:]


def real_files(data: Path, *folders: str) -> list[Path]:
    found = []
    for folder in folders:
        for path in sorted((data / "dicom" / folder).rglob("*")):
            if path.is_file() and path.stat().st_size < 4_000_000:
                header = pydicom.dcmread(path, force=True, specific_tags=["SOPClassUID"])
                taken = header.get("SOPClassUID") in TAKEN - {UNKNOWN_TO_DCMTK}
                if taken and header.file_meta.get("TransferSyntaxUID") in PROPOSALS:
                    found.append(path)
    return found


@contextmanager
def connected(port: int) -> Iterator[socket.socket]:
    with socket.create_connection(("127.0.0.1", port), timeout=30) as connection:
        yield connection


@pytest.fixture
def receiver(
    tmp_path: Path, program: Callable[[str], str], free_port: Callable[[], int]
) -> Iterator[tuple[int, Path]]:
    """dcmtk's own receiver, which writes what it receives bit by bit: its port and folder."""
    port, folder = free_port(), tmp_path / "received"
    folder.mkdir()
    command = [program("storescp"), "+xa", "+B", "+uf", "-od", str(folder), str(port)]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
        until = time.monotonic() + 30
        with socket.socket() as probe:
            while probe.connect_ex(("127.0.0.1", port)) and time.monotonic() < until:
                time.sleep(0.05)
        yield port, folder
        process.terminate()


def test_real_files_sent_by_storescu_arrive_as_another_receiver_writes_them_bit_by_bit(
    start: Callable[..., Service],
    program: Callable[[str], str],
    receiver: tuple[int, Path],
    shared_data: Path,
):
    """The sender itself writes lengths of sequences anew, so some differ from what it read."""
    service, storescu, (port, received) = start(), program("storescu"), receiver
    sent = real_files(
        shared_data, "cornerstone-ct-ts", "flywheel-tcia-pseudophi", "deid-data", "highdicom"
    )
    by_syntax: dict[str, list[Path]] = {}
    for path in sent:
        by_syntax.setdefault(data_set(path)[0], []).append(path)
    assert len(by_syntax) > 8
    for syntax, paths in by_syntax.items():
        for to in (service.port, port):
            titles = ("-aet", "PACS", "-aec", "CLOISTER")
            done = run(storescu, "-R", PROPOSALS[syntax], *titles, "127.0.0.1", to, *paths)
            assert done.returncode == 0, done.stderr
    arrived = {data_set(file) for file in service.files}
    assert arrived == {data_set(file) for file in received.iterdir()}
    assert service.inbox.tally.total() == len(sent)
    assert len(arrived & {data_set(path) for path in sent}) > len(sent) / 2


def test_a_pacs_sends_over_mutual_tls_and_its_files_arrive_byte_by_byte(
    start_tls: Callable[..., Service], orthanc: Any, shared_data: Path
):
    service = start_tls()
    sent = real_files(shared_data, "flywheel-tcia-pseudophi", "dicom2nifti")[:20]
    result = orthanc.send(service.port, [orthanc.upload(path) for path in sent], tls=True)
    assert result["FailedInstancesCount"] == 0
    assert {data_set(file) for file in service.files} == {data_set(path) for path in sent}


def test_a_pacs_without_tls_is_not_heard_where_tls_is_asked_for(
    start_tls: Callable[..., Service], orthanc: Any, shared_data: Path
):
    service = start_tls()
    sent = orthanc.upload(real_files(shared_data, "flywheel-tcia-pseudophi")[0])
    with pytest.raises(OSError, match="500"):
        orthanc.send(service.port, [sent], tls=False)
    assert service.files == []


def test_a_study_is_complete_after_silence_and_again_after_more_of_it(
    start: Callable[..., Service], film: Callable[..., FileDataset]
):
    service = start()
    assert answer(service.port, film(SOPInstanceUID="1.2.3.1")) == 0
    assert service.inbox.studies() == (1, 0)
    assert service.wait_until(lambda: service.inbox.settle() == 1)
    assert answer(service.port, film(SOPInstanceUID="1.2.3.2")) == 0
    assert service.inbox.studies() == (1, 1)
    assert service.wait_until(lambda: service.inbox.settle() == 1)
    assert service.inbox.studies() == (0, 1)
    assert len(service.files) == 2


def test_an_object_that_is_sent_twice_is_kept_once(
    start: Callable[..., Service], film: Callable[..., FileDataset]
):
    service = start()
    assert answer(service.port, film()) == answer(service.port, film()) == 0
    assert len(service.files) == 1
    assert service.inbox.tally == {Outcome.NEW: 1, Outcome.AGAIN: 1}
    assert answer(service.port, film(PatientName="Other^Name")) == 0
    assert len(service.files) == 2
    assert service.inbox.tally[Outcome.VERSION] == 1


@pytest.mark.parametrize(
    ("names", "reason"),
    [
        (("NOBODY", "CLOISTER"), "Calling AE Title Not Recognized"),
        (("pacs", "CLOISTER"), "Calling AE Title Not Recognized"),
        (("PACS", "ANY-SCP"), "Called AE Title Not Recognized"),
    ],
)
def test_a_stranger_is_turned_away_with_the_reason_of_the_standard(
    start: Callable[..., Service],
    program: Callable[[str], str],
    caplog: pytest.LogCaptureFixture,
    names: tuple[str, str],
    reason: str,
):
    (title, called), service, echoscu = names, start(), program("echoscu")
    done = run(echoscu, "-aet", title, "-aec", called, "127.0.0.1", service.port)
    assert done.returncode != 0
    assert "Rejected Permanent, Source: Service User" in done.stderr
    assert reason in done.stderr
    assert repr(title) in caplog.text
    assert sum(service.listener.turned_away.values()) == 1
    done = run(echoscu, "-aet", "PACS", "-aec", "CLOISTER", "127.0.0.1", service.port)
    assert done.returncode == 0, done.stderr


def test_a_caller_from_another_address_is_turned_away(start: Callable[..., Service]):
    elsewhere = Caller(ae_title="PACS", addresses=("192.0.2.7", "198.51.100.0/24"))
    here = Caller(ae_title="NEAR", addresses=("127.0.0.0/8",))
    service = start(callers=(elsewhere, here))
    assert not service.echo("PACS")
    assert service.echo("NEAR")


def test_what_a_stranger_calls_himself_is_quoted_in_the_log(
    start: Callable[..., Service], caplog: pytest.LogCaptureFixture
):
    service = start()
    title = b"\x1b[2J\nroot: ok 12"
    with connected(service.port) as peer:
        peer.sendall(association_request(title.ljust(16)))
        peer.settimeout(30)
        assert peer.recv(1) in (b"\x03", b"\x07")
    assert "\x1b" not in caplog.text
    assert "\nroot" not in caplog.text


def association_request(calling: bytes) -> bytes:
    """An A-ASSOCIATE-RQ for verification (PS3.8 9.3.2), made by hand."""

    def item(kind: int, content: bytes) -> bytes:
        return struct.pack(">BxH", kind, len(content)) + content

    context = item(0x30, b"1.2.840.10008.1.1") + item(0x40, b"1.2.840.10008.1.2")
    user = item(0x51, struct.pack(">I", 16384)) + item(0x52, b"1.2.3.4")
    body = struct.pack(">HH16s16s32x", 1, 0, b"CLOISTER".ljust(16), calling)
    body += item(0x10, b"1.2.840.10008.3.1.1.1")
    body += item(0x20, bytes([1, 0, 0, 0]) + context) + item(0x50, user)
    return struct.pack(">BxI", 1, len(body)) + body


def test_no_more_associations_than_allowed_are_open(start: Callable[..., Service]):
    service = start(greatest_associations=1)
    verification = [build_context("1.2.840.10008.1.1")]
    first = associate(service.port, contexts=verification)
    assert first.is_established
    second = associate(service.port, contexts=verification)
    assert second.is_rejected
    refused = second.acceptor.primitive
    assert (refused.result, refused.result_source, refused.diagnostic) == (2, 3, 2)
    first.release()
    assert service.wait_until(service.is_idle)
    assert service.echo()


def storescu_tls(program: Callable[[str], str], port: int, *tls: object) -> Any:
    return run(program("echoscu"), "-aet", "PACS", "-aec", "CLOISTER", *tls, "127.0.0.1", port)


def test_only_a_caller_with_a_certificate_of_the_hospital_is_heard(
    start_tls: Callable[..., Service], program: Callable[[str], str], authority: Callable[..., Any]
):
    service = start_tls()
    known, stranger = authority("hospital"), authority("somebody")
    good, bad = known.issue("pacs"), stranger.issue("pacs")
    trust = ("+cf", known.file)
    good_pair, bad_pair = ((each.key, each.certificate) for each in (good, bad))
    assert storescu_tls(program, service.port, "+tls", *good_pair, *trust).returncode == 0
    assert storescu_tls(program, service.port, "+tls", *bad_pair, *trust).returncode != 0
    assert storescu_tls(program, service.port, "+tla", *trust).returncode != 0
    assert storescu_tls(program, service.port).returncode != 0
    away = service.listener.turned_away
    assert service.wait_until(lambda: sum(away.values()) == 3)
    assert any("CERTIFICATE" in why for why in away)


def test_a_caller_does_not_take_a_stranger_for_this_node(
    start_tls: Callable[..., Service], program: Callable[[str], str], authority: Callable[..., Any]
):
    pretended = authority("somebody").issue("cloister")
    service = start_tls(certificate=str(pretended.certificate), key=str(pretended.key))
    known = authority("hospital")
    pair = (known.issue("pacs").key, known.issue("pacs").certificate)
    done = storescu_tls(program, service.port, "+tls", *pair, "+cf", known.file)
    assert done.returncode != 0


def test_a_callers_own_certificate_may_be_named_instead_of_an_authority(
    start_tls: Callable[..., Service], program: Callable[[str], str], authority: Callable[..., Any]
):
    known = authority("hospital")
    pinned, other = known.issue("pinned"), known.issue("other")
    service = start_tls(callers_certificates=str(pinned.certificate))
    trust = ("+cf", known.file)
    one = storescu_tls(program, service.port, "+tls", pinned.key, pinned.certificate, *trust)
    another = storescu_tls(program, service.port, "+tls", other.key, other.certificate, *trust)
    assert (one.returncode, another.returncode != 0) == (0, True), one.stderr


def shown(port: int, own: Any) -> bytes:
    """The certificate that a caller with one of its own is shown."""
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.load_cert_chain(own.certificate, own.key)
    with (
        socket.create_connection(("127.0.0.1", port), timeout=30) as plain,
        context.wrap_socket(plain) as line,
    ):
        found = line.getpeercert(True)
    assert found is not None
    return found


def test_a_new_certificate_is_shown_to_the_next_caller_and_a_broken_one_to_nobody(
    start_tls: Callable[..., Service],
    program: Callable[[str], str],
    authority: Callable[..., Any],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
):
    known = authority("hospital")
    first, second, pacs = (known.issue(name) for name in ("first", "second", "pacs"))
    mine, key, callers = (tmp_path / name for name in ("mine.pem", "mine.key", "callers.pem"))
    mine.write_bytes(first.certificate.read_bytes())
    key.write_bytes(first.key.read_bytes())
    key.chmod(0o600)
    callers.write_bytes(known.file.read_bytes())
    service = start_tls(certificate=str(mine), key=str(key), callers_certificates=str(callers))
    before = shown(service.port, pacs)

    mine.write_bytes(second.certificate.read_bytes())  # and its key is on its way
    assert shown(service.port, pacs) == before
    assert shown(service.port, pacs) == before
    assert caplog.text.count("is not taken") == 1
    key.write_bytes(second.key.read_bytes())
    after = shown(service.port, pacs)
    assert after == ssl.PEM_cert_to_DER_cert(second.certificate.read_text()) != before
    key.chmod(0o644)
    assert shown(service.port, pacs) == after
    mine.unlink()
    assert shown(service.port, pacs) == after

    pair, trust = ("+tls", pacs.key, pacs.certificate), ("+cf", known.file)
    assert storescu_tls(program, service.port, *pair, *trust).returncode == 0
    mine.write_bytes(second.certificate.read_bytes())
    key.chmod(0o600)
    callers.write_bytes(authority("somebody").file.read_bytes())  # the PACS is known no longer
    assert storescu_tls(program, service.port, *pair, *trust).returncode != 0


def test_without_certificates_of_callers_the_file_says_so_and_they_are_heard(
    start_tls: Callable[..., Service], program: Callable[[str], str], authority: Callable[..., Any]
):
    service = start_tls(ask_callers_for="nothing", callers_certificates=None)
    trust = ("+cf", authority("hospital").file)
    assert storescu_tls(program, service.port, "+tla", *trust).returncode == 0


@pytest.mark.parametrize(
    ("version", "served"),
    [
        (ssl.TLSVersion.TLSv1_1, False),
        (ssl.TLSVersion.TLSv1_2, True),
        (ssl.TLSVersion.TLSv1_3, True),
    ],
)
def test_tls_is_of_1_2_or_newer(
    start_tls: Callable[..., Service],
    authority: Callable[..., Any],
    version: ssl.TLSVersion,
    served: bool,
):
    service, known = start_tls(), authority("hospital")
    mine = known.issue("pacs")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(known.file)
    context.load_cert_chain(mine.certificate, mine.key)
    context.set_ciphers("ALL:@SECLEVEL=0")
    context.minimum_version = context.maximum_version = version
    with connected(service.port) as peer:
        try:
            with context.wrap_socket(peer, server_hostname="localhost") as secured:
                assert secured.version() == version.name.replace("_", ".")
                worked = True
        except ssl.SSLError:
            worked = False
    assert worked is served


def test_a_handshake_that_nobody_goes_on_with_holds_up_nobody_else(
    start_tls: Callable[..., Service], program: Callable[[str], str], authority: Callable[..., Any]
):
    service, known = start_tls(idle_seconds=15.0), authority("hospital")
    mine = known.issue("pacs")
    with ExitStack() as stack:
        for _ in range(5):
            stack.enter_context(connected(service.port)).sendall(b"\x16\x03\x01")
        begun = time.monotonic()
        done = storescu_tls(
            program, service.port, "+tls", mine.key, mine.certificate, "+cf", known.file
        )
        assert done.returncode == 0, done.stderr
        assert time.monotonic() - begun < 10


def test_a_handshake_that_trickles_in_has_its_time(start_tls: Callable[..., Service]):
    service = start_tls(idle_seconds=1.5)
    begun = time.monotonic()
    with connected(service.port) as peer, suppress(OSError):
        for byte in b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(300):
            peer.sendall(bytes([byte]))
            time.sleep(0.1)
    assert time.monotonic() - begun < 15
    assert any("no TLS" in why for why in service.listener.turned_away)


def test_whoever_comes_from_nowhere_on_the_list_is_not_even_asked_who_he_is(
    start: Callable[..., Service],
):
    service = start(callers=(Caller(ae_title="PACS", addresses=("192.0.2.7",)),))
    assert not service.echo()
    assert service.listener.turned_away == {"no caller's address": 1}


def hostile_units() -> dict[str, bytes]:
    whole = association_request(b"PACS".ljust(16))
    return {
        "random bytes": bytes(range(7, 256)) * 40,
        "a request with a hole": whole[:60] + b"\xff" * 40 + whole[100:],
        "half a request": whole[:100],
        "an answer where a request belongs": struct.pack(">BxI", 2, 4) + bytes(4),
        "a message before any request": struct.pack(">BxI", 4, 10) + bytes(10),
        "an empty part of a message": whole + struct.pack(">BxIIB", 4, 5, 1, 1),
        "http": b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
    }


@pytest.mark.parametrize("name", hostile_units())
def test_a_malformed_unit_ends_its_connection_and_nothing_else(
    start: Callable[..., Service], name: str, capfd: pytest.CaptureFixture[str]
):
    service = start(idle_seconds=2.0)
    with connected(service.port) as peer:
        peer.settimeout(30)
        try:
            peer.sendall(hostile_units()[name])
            while peer.recv(65536):
                pass  # until it is closed: a service that hung would not do that
        except ConnectionError:
            pass
    assert service.wait_until(service.is_idle)
    assert service.echo()
    assert service.files == []
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.parametrize("first", [b"", association_request(b"PACS".ljust(16))])
def test_a_unit_of_gigantic_length_is_not_waited_for(start: Callable[..., Service], first: bytes):
    service, kind = start(idle_seconds=60.0), 4 if first else 1
    with connected(service.port) as peer:
        peer.sendall(first)
        if first:
            assert peer.recv(1) == b"\x02"  # the association is accepted
        begun = time.monotonic()
        peer.settimeout(50)
        with suppress(ConnectionError):
            peer.sendall(struct.pack(">BxI", kind, 0xFFFFFFF0) + bytes(1000))
            while peer.recv(65536):
                pass
        assert time.monotonic() - begun < 40
    assert service.wait_until(service.is_idle)
    assert service.echo()


def units(what: FileDataset, part: int = 16000) -> list[bytes]:
    """The P-DATA-TF units of a C-STORE request in the first presentation context."""
    request = C_STORE()
    request.MessageID = 1
    request.AffectedSOPClassUID = what.SOPClassUID
    request.AffectedSOPInstanceUID = what.SOPInstanceUID
    request.Priority = 2
    request.DataSet = BytesIO(encode(what, False, True) or b"")
    message = C_STORE_RQ()
    message.primitive_to_message(request)
    return [P_DATA_TF(each).encode() for each in message.encode_msg(1, part)]


@pytest.fixture
def large(film: Callable[..., FileDataset]) -> FileDataset:
    """An object of about two megabytes."""
    return film(np.zeros((1000, 1000), dtype=np.uint16))


def test_of_an_object_that_stops_in_the_middle_nothing_is_left(
    start: Callable[..., Service], large: FileDataset
):
    service = start(idle_seconds=1.0)
    association = associate(service.port)
    sent = b"".join(units(large))
    association.dul.socket.socket.sendall(sent[: len(sent) // 2])
    assert service.wait_until(lambda: bool(service.files))
    assert service.echo()
    assert service.wait_until(service.is_idle)
    assert service.files == []
    assert service.inbox.tally == {}


def test_of_an_object_whose_sender_dies_nothing_is_left(
    start: Callable[..., Service], large: FileDataset
):
    service = start()
    association = associate(service.port)
    sent = b"".join(units(large))
    association.dul.socket.socket.sendall(sent[: len(sent) // 2])
    assert service.wait_until(lambda: bool(service.files))
    association.dul.socket.socket.shutdown(socket.SHUT_RDWR)
    assert service.wait_until(service.is_idle)
    assert service.files == []


def test_an_object_that_trickles_in_has_its_time(start: Callable[..., Service], large: FileDataset):
    service = start(object_seconds=1.5)
    association = associate(service.port)
    begun = time.monotonic()
    with suppress(OSError):
        for unit in units(large, 2000):
            association.dul.socket.socket.sendall(unit)
            time.sleep(0.05)
            if not association.is_established:
                break
    assert time.monotonic() - begun < 20
    assert service.wait_until(service.is_idle)
    assert service.files == []


def test_on_a_full_disk_an_object_is_refused_and_its_sender_told_so(
    start: Callable[..., Service], large: FileDataset, program: Callable[[str], str], tmp_path: Path
):
    service = start(least_free_gib=1e6)
    assert answer(service.port, large) == OUT_OF_RESOURCES
    large.save_as(tmp_path / "large.dcm", enforce_file_format=True)
    done = run(
        *(program("storescu"), "-v", "-aet", "PACS", "-aec", "CLOISTER", "127.0.0.1"),
        *(service.port, tmp_path / "large.dcm"),
    )
    assert "Refused: OutOfResources" in done.stdout + done.stderr
    assert service.files == []
    assert service.inbox.tally == {Trouble.DISK_FULL: 2}


def test_an_object_beyond_the_bound_is_refused_and_the_next_one_taken(
    start: Callable[..., Service], film: Callable[..., FileDataset], large: FileDataset
):
    service = start(greatest_object_mib=1)
    association = associate(service.port)
    statuses = [association.send_c_store(each).Status for each in (large, film())]
    association.release()
    assert statuses == [OUT_OF_RESOURCES, 0]
    assert len(service.files) == 1


def test_an_object_without_an_end_is_not_heard_for_ever(
    start: Callable[..., Service], large: FileDataset
):
    service = start(greatest_object_mib=1)
    association = associate(service.port)
    begin, *middle = units(large)
    peer = association.dul.socket.socket
    peer.sendall(begin)
    endless = middle[0]  # no unit of it is the last
    sent = 0
    with suppress(OSError):
        while sent < 2**30:
            peer.sendall(endless)
            sent += len(endless)
    assert sent < 2**30
    assert service.wait_until(service.is_idle)
    assert service.files == []


def test_a_study_has_no_more_objects_than_allowed(
    start: Callable[..., Service], film: Callable[..., FileDataset]
):
    service = start(greatest_objects_a_study=2)
    numbers = [answer(service.port, film(SOPInstanceUID=f"1.2.3.{n}")) for n in range(1, 4)]
    assert numbers == [0, 0, OUT_OF_RESOURCES]
    assert answer(service.port, film(SOPInstanceUID="1.2.3.1")) == 0  # it is there
    assert answer(service.port, film(SOPInstanceUID="1.2.9", StudyInstanceUID="1.2.8")) == 0
    assert len(service.files) == 3


@pytest.fixture
def announced(
    tmp_path: Path, film: Callable[..., FileDataset], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Path]:
    """A file that is sent as it is, and announced by its file meta information."""
    monkeypatch.setattr(_config, "STORE_SEND_CHUNKED_DATASET", True)

    def write(**meta: str) -> Path:
        made = film()
        made.file_meta.MediaStorageSOPInstanceUID = made.SOPInstanceUID
        for keyword, value in meta.items():
            setattr(made.file_meta, keyword, UID(value))
        made.save_as(tmp_path / "announced.dcm", enforce_file_format=False)
        return tmp_path / "announced.dcm"

    return write


def test_an_object_that_is_not_the_announced_one_is_refused(
    start: Callable[..., Service], announced: Callable[..., Path]
):
    service = start()
    assert answer(service.port, announced(MediaStorageSOPInstanceUID="1.2.3.99")) == MISMATCH
    assert service.files == []
    assert answer(service.port, announced()) == 0  # the same, as itself


def test_an_object_of_another_class_than_agreed_on_is_refused(
    start: Callable[..., Service], film: Callable[..., FileDataset]
):
    service = start()
    association = associate(service.port)
    document = film(SOPClassUID=PDF)
    hold(association)
    association.dul.socket.socket.sendall(b"".join(units(document)))
    assert status_of(association) == CLASS_NOT_SUPPORTED
    assert service.files == []


def test_a_data_set_that_names_no_study_is_refused(
    start: Callable[..., Service], film: Callable[..., FileDataset]
):
    service = start()
    assert answer(service.port, film(StudyInstanceUID=None)) == NOT_UNDERSTOOD
    assert service.files == []


def test_what_is_no_image_is_not_agreed_on(start: Callable[..., Service]):
    service = start()
    association = associate(service.port, contexts=[build_context(PDF), build_context(CR)])
    assert [each.abstract_syntax for each in association.accepted_contexts] == [CR]
    association.release()
    assert not associate(service.port, contexts=[build_context(PDF)]).accepted_contexts


def test_every_class_that_is_taken_is_agreed_on_in_every_syntax(start: Callable[..., Service]):
    service, uids = start(), sorted(TAKEN)
    for syntax in SYNTAXES:
        association = associate(service.port, contexts=[build_context(u, syntax) for u in uids])
        assert {each.abstract_syntax for each in association.accepted_contexts} == TAKEN, syntax
        association.release()


def test_what_can_be_decoded_is_what_is_agreed_on():
    def decodes(uid: str) -> bool:
        try:
            return bool(get_decoder(UID(uid)).is_available)
        except NotImplementedError:
            return False

    assert {str(uid) for uid in AllTransferSyntaxes if decodes(uid)} == set(SYNTAXES)


def test_a_service_that_is_not_offered_ends_the_association(start: Callable[..., Service]):
    service = start()
    association = associate(service.port)
    query = C_FIND()
    query.MessageID, query.AffectedSOPClassUID, query.Priority = 1, UID(CR), 2
    query.Identifier = BytesIO(bytes(64))
    message = C_FIND_RQ()
    message.primitive_to_message(query)
    for each in message.encode_msg(1, 16000):
        association.dul.socket.socket.sendall(P_DATA_TF(each).encode())
    assert service.wait_until(lambda: association.is_aborted)
    assert service.wait_until(service.is_idle)
    assert service.files == []


def test_a_flood_of_requests_without_waiting_for_answers_is_ended(
    start: Callable[..., Service], film: Callable[..., FileDataset]
):
    service = start()
    association = associate(service.port)
    flood = b"".join(
        b"".join(units(film(SOPInstanceUID=f"1.2.3.{number}"))) for number in range(200)
    )
    with suppress(OSError):
        association.dul.socket.socket.sendall(flood)
    assert service.wait_until(service.is_idle)
    assert service.inbox.tally.total() < 20
    assert not list((service.inbox.path / "incoming").iterdir())
    assert service.echo()


def test_at_the_end_an_object_on_its_way_may_arrive_and_no_other(
    start: Callable[..., Service], large: FileDataset, film: Callable[..., FileDataset]
):
    service = start()
    idle, sending = associate(service.port), associate(service.port)
    hold(sending)
    sent = b"".join(units(large))
    peer = sending.dul.socket.socket
    peer.sendall(sent[: len(sent) // 2])
    assert service.wait_until(lambda: bool(service.files))
    stopping = threading.Thread(target=service.listener._stop, args=(20.0,))
    stopping.start()
    assert service.wait_until(lambda: idle.is_aborted)
    assert not service.echo()
    peer.sendall(sent[len(sent) // 2 :])
    assert status_of(sending) == 0
    stopping.join(30)
    assert len(service.files) == 1


def test_nothing_of_an_object_is_logged_and_no_name_in_the_inbox_tells_of_it(
    start: Callable[..., Service],
    film: Callable[..., FileDataset],
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
):
    caplog.set_level(logging.DEBUG)
    service = start(greatest_objects_a_study=1)
    secret = {"PatientName": "Geheim^Anna", "PatientID": "4711", "PatientBirthDate": "notadate"}
    for uid in ("1.2.3.111", "1.2.3.222"):
        answer(service.port, film(SOPInstanceUID=uid, StudyInstanceUID="1.2.3.333", **secret))
    written = caplog.text + capfd.readouterr().err
    names = " ".join(str(path) for path in service.inbox.path.rglob("*"))
    for told in (*secret.values(), "Geheim", "1.2.3.111", "1.2.3.222", "1.2.3.333"):
        assert told not in written
        assert told not in names
    assert "more objects than this node takes" in written
    assert b"Geheim^Anna" in service.files[0].read_bytes()


def test_what_lies_in_the_inbox_is_for_its_owner_alone(
    start: Callable[..., Service], film: Callable[..., FileDataset]
):
    service = start()
    answer(service.port, film())
    for path in (service.inbox.path, *service.inbox.path.rglob("*")):
        assert path.stat().st_mode & 0o077 == 0, path


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"transport": "tls"}, "certificate is missing"),
        ({"transport": "tls", "certificate": "a", "key": "b"}, "callers_certificates is missing"),
        ({"callers": [{"ae_title": "A" * 17}]}, "callers.0.ae_title"),
        ({"callers": [{"ae_title": "A\\B"}]}, "callers.0.ae_title"),
        ({"callers": []}, "callers"),
        ({"callers": [{"ae_title": "A", "addresses": ["10.0.0.1/24"]}]}, "expected an address"),
        ({"silence_seconds": 0}, "silence_seconds"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(change: dict[str, Any], message: str):
    usual = {"callers": [{"ae_title": "PACS"}], "transport": "plain"}
    assert Listen.model_validate_json(json.dumps(usual)).address == "127.0.0.1"
    with pytest.raises(ValidationError, match=message):
        Listen.model_validate_json(json.dumps(usual | change))


def test_plain_tcp_is_heard_on_this_machine_alone_unless_the_file_says_where():
    callers = (Caller(ae_title="PACS"),)
    assert Listen(callers=callers, transport="plain").address == "127.0.0.1"
    assert Listen(callers=callers, transport="plain", host="10.0.0.5").address == "10.0.0.5"
    files: dict[str, Any] = {"certificate": "a", "key": "b", "callers_certificates": "c"}
    assert Listen(callers=callers, **files).address == "0.0.0.0"  # noqa: S104


def test_a_key_that_others_may_read_is_not_used(
    start_tls: Callable[..., Service], authority: Callable[..., Any]
):
    loose = authority("hospital").issue("loose")
    loose.key.chmod(0o640)
    with pytest.raises(ConfigError, match="chmod 600"):
        start_tls(certificate=str(loose.certificate), key=str(loose.key))


def test_a_certificate_that_cannot_be_used_is_named(
    start_tls: Callable[..., Service], tmp_path: Path, authority: Callable[..., Any]
):
    with pytest.raises(ConfigError, match=r"none\.pem"):
        start_tls(certificate=str(tmp_path / "none.pem"))
    other = authority("hospital").issue("of-another-key")
    with pytest.raises(ConfigError, match="expected a certificate and its key"):
        start_tls(key=str(other.key))


def test_a_port_that_is_taken_is_named(start: Callable[..., Service]):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        taken = other.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"127\.0\.0\.1:{taken}: cannot listen there"):
            start(port=taken)
