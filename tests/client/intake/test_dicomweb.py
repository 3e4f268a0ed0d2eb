"""DICOMweb against a real PACS behind HTTPS, and against servers that lie."""

from __future__ import annotations

import json
import logging
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pydicom
import pytest
from pydicom.dataset import FileDataset

from client.intake.dicomweb import Access, Fetched, Query, Server, fetch, token_from
from client.intake.inbox import TAKEN, Bounds, Inbox, NotKeptError, Outcome, Trouble
from client.intake.listen import SYNTAXES
from client.intake.quiet import quiet
from common.errors import ConfigError, PeerError

pytestmark = pytest.mark.filterwarnings("ignore:Invalid value for VR UI")
STUDY, SERIES, INSTANCE = "1.2.3.4.5", "1.2.3.4.5.6", "1.2.3.4.5.6.7"
CR = "1.2.840.10008.5.1.4.1.1.1"
TOKEN = "a-secret-token-of-a-test"  # noqa: S105


def data_set(path: Path) -> tuple[str, bytes]:
    """The transfer syntax of a file, and all bytes behind its file meta information."""
    meta = pydicom.filereader.read_file_meta_info(path)
    length = 128 + 4 + 12 + int(meta.FileMetaInformationGroupLength)
    return str(meta.TransferSyntaxUID), path.read_bytes()[length:]


def read(path: Path) -> pydicom.Dataset:
    with quiet():
        return pydicom.dcmread(path, force=True, stop_before_pixels=True)


@pytest.fixture
def inbox(tmp_path: Path) -> Iterator[Inbox]:
    with Inbox.opened(tmp_path / "inbox", Bounds(least_free=0), silence=1e6) as opened:
        yield opened


def files(inbox: Inbox) -> list[Path]:
    return [file for file in inbox.path.rglob("*") if file.is_file() and file.suffix != ".key"]


class Front:
    """TLS before a server that has none: what comes in goes on to it as it is.

    Debian 12's Orthanc dies of its first HTTPS connection (CivetWeb 1.15 with OpenSSL 3).
    """

    def __init__(self, behind: int, certificate: Path, key: Path) -> None:
        self._behind = behind
        self._tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._tls.load_cert_chain(certificate, key)
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listening.getsockname()[1])
        threading.Thread(target=self._serve, daemon=True).start()

    def close(self) -> None:
        self._listening.close()

    def _serve(self) -> None:
        with suppress(OSError):
            while True:
                caller, _ = self._listening.accept()
                threading.Thread(target=self._connect, args=(caller,), daemon=True).start()

    def _connect(self, caller: socket.socket) -> None:
        with (
            suppress(OSError),
            self._tls.wrap_socket(caller, server_side=True) as secured,
            socket.create_connection(("127.0.0.1", self._behind)) as server,
        ):
            back = threading.Thread(target=self._forward, args=(server, secured), daemon=True)
            back.start()
            self._forward(secured, server)
            back.join()

    @staticmethod
    def _forward(source: socket.socket, target: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(2**16):
                target.sendall(data)
        with suppress(OSError):
            target.shutdown(socket.SHUT_WR)


class Pacs:
    """An Orthanc behind HTTPS with a password, and what was put into it."""

    def __init__(self, orthanc: Any, port: int, authority: Path, sent: list[Path]) -> None:
        self.url, self.orthanc = f"https://127.0.0.1:{port}/dicom-web", orthanc
        self.authority = authority
        self.headers = {path: read(path) for path in sent}
        for path in sent:
            orthanc.upload(path)

    def server(self, **changes: Any) -> Server:
        usual = {"token": self.orthanc.basic, "authority": self.authority}
        return Server(Access(self.url, **(usual | changes)))

    def where(self, **attributes: str) -> set[tuple[str, bytes]]:
        """The data sets of those with these values."""
        wanted = attributes.items()
        return {
            data_set(path)
            for path, header in self.headers.items()
            if all(str(header.get(name, "")) == value for name, value in wanted)
        }


@pytest.fixture(scope="module")
def pacs(
    start_orthanc: Callable[..., Any], authority: Callable[[str], Any], shared_data: Path
) -> Iterator[Pacs]:
    by_instance: dict[str, Path] = {}
    for folder in ("flywheel-tcia-pseudophi", "presidio", "nifi-lgg", "pydicom-data"):
        for path in sorted((shared_data / "dicom" / folder).rglob("*")):
            if path.is_file() and path.stat().st_size < 3_000_000:
                header = read(path)
                named = header.get("StudyInstanceUID") and header.get("SeriesInstanceUID")
                known = "file_meta" in vars(header) and header.file_meta.get("TransferSyntaxUID")
                taken = header.get("SOPClassUID") in TAKEN and known in SYNTAXES
                if taken and named and header.get("PatientID"):
                    by_instance.setdefault(str(header.SOPInstanceUID), path)
    started, hospital = start_orthanc(), authority("hospital")
    own = hospital.issue("dicomweb")
    front = Front(started.port, own.certificate, own.key)
    yield Pacs(started, front.port, hospital.file, list(by_instance.values())[:60])
    front.close()


def test_what_a_pacs_has_is_fetched_byte_by_byte(pacs: Pacs, inbox: Inbox):
    done = fetch(pacs.server(), Query(study_date="19000101-"), inbox)
    dated = {data_set(p) for p, header in pacs.headers.items() if header.get("StudyDate")}
    assert len(dated) > 20
    assert {data_set(file) for file in files(inbox)} == dated
    assert done.counts == {Outcome.NEW.value: len(dated)}
    assert inbox.studies() == (0, done.studies)


@pytest.mark.parametrize("modality", ["MR", "CT"])
def test_only_what_is_asked_for_is_fetched(pacs: Pacs, inbox: Inbox, modality: str):
    fetch(pacs.server(), Query(modality=modality), inbox)
    wanted = pacs.where(Modality=modality)
    assert wanted
    assert {data_set(file) for file in files(inbox)} == wanted


def test_studies_are_found_by_date_description_and_uid(pacs: Pacs, tmp_path: Path):
    header = next(h for h in pacs.headers.values() if " " in str(h.get("StudyDescription", "")))
    day, described = str(header.StudyDate), str(header.StudyDescription)
    first, *_, last = described.split()  # this PACS decodes no blank in a query
    study = str(header.StudyInstanceUID)
    for number, (query, wanted) in enumerate(
        (
            (Query(study_date=day), pacs.where(StudyDate=day)),
            (Query(study_date=f"{day}-{day}"), pacs.where(StudyDate=day)),
            (Query(description=f"{first}*{last}"), pacs.where(StudyDescription=described)),
            (Query(studies=(study,)), pacs.where(StudyInstanceUID=study)),
            (Query(study_date="18000101-18991231"), set()),
        )
    ):
        bounds = Bounds(least_free=0)
        with Inbox.opened(tmp_path / f"inbox{number}", bounds, silence=1.0) as inbox:
            fetch(pacs.server(), query, inbox)
            assert {data_set(file) for file in files(inbox)} == wanted, query


def test_a_fetch_that_is_repeated_fetches_only_what_is_missing(pacs: Pacs, inbox: Inbox):
    first = fetch(pacs.server(), Query(modality="MR"), inbox)
    whole = {data_set(file) for file in files(inbox)}
    files(inbox)[3].unlink()
    second = fetch(pacs.server(), Query(modality="MR"), inbox)
    count = first.counts[Outcome.NEW]
    assert second.counts == {Outcome.NEW.value: 1, "there already": count - 1}
    assert {data_set(file) for file in files(inbox)} == whole


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"authority": None}, "not of an authority that we know"),
        ({"token": "Basic d3Jvbmc6cGFzc3dvcmQ="}, "denies access"),
        ({"token": ""}, "denies access"),
    ],
)
def test_without_the_right_authority_and_token_nothing_is_fetched(
    pacs: Pacs, inbox: Inbox, change: dict[str, Any], message: str
):
    with pytest.raises(PeerError, match=message) as error:
        fetch(pacs.server(**change), Query(modality="MR"), inbox)
    assert "d3Jvbmc6cGFzc3dvcmQ" not in str(error.value)
    assert files(inbox) == []


def test_no_proxy_of_the_environment_is_used(
    pacs: Pacs, inbox: Inbox, monkeypatch: pytest.MonkeyPatch, free_port: Callable[[], int]
):
    for name in ("HTTPS_PROXY", "HTTP_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{free_port()}")
    assert fetch(pacs.server(), Query(modality="CT"), inbox).counts[Outcome.NEW] > 0


class Liar:
    """An HTTP server on this machine that answers as `qido` and `wado` say.

    Attributes:
        asked: paths of all requests, and tokens that came with them.
    """

    def __init__(self) -> None:
        self.asked: list[tuple[str, str]] = []
        self.qido: Callable[[str], Any] = self.honest
        self.wado: Callable[[BaseHTTPRequestHandler], None] = lambda handler: reply(
            handler, b"not there", status=404
        )
        liar = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                liar.asked.append((self.path, self.headers.get("Authorization", "")))
                with suppress(ConnectionError):
                    if "/instances/" in self.path:
                        liar.wado(self)
                        return
                    answer = liar.qido(self.path)
                    body = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
                    reply(self, body, "application/dicom+json")

            def log_message(self, *_: Any) -> None: ...

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}/dicom-web"
        threading.Thread(target=self.http.serve_forever, args=(0.05,), daemon=True).start()

    @staticmethod
    def honest(path: str) -> Any:
        """One study, series and instance."""
        what = path.partition("?")[0].rsplit("/", 1)[1]
        tag, uid = {
            "studies": ("0020000D", STUDY),
            "series": ("0020000E", SERIES),
            "instances": ("00080018", INSTANCE),
        }[what]
        return [{tag: {"vr": "UI", "Value": [uid]}, "00080016": {"vr": "UI", "Value": [CR]}}]

    def server(self, **options: Any) -> Server:
        return Server(Access(self.url, TOKEN), **options)

    def fetch(self, inbox: Inbox, **options: Any) -> Fetched:
        return fetch(self.server(**options), Query(study_date="20200101-"), inbox)


def reply(
    handler: BaseHTTPRequestHandler,
    body: bytes,
    media: str = "text/plain",
    status: int = 200,
    **headers: str,
) -> None:
    handler.send_response(status)
    handler.send_header("Content-Type", media)
    handler.send_header("Content-Length", str(len(body)))
    for name, value in headers.items():
        handler.send_header(name.replace("_", "-"), value)
    handler.end_headers()
    handler.wfile.write(body)


@pytest.fixture
def liar() -> Iterator[Callable[[], Liar]]:
    """`liar()`: a server that can be told what to answer."""
    with ExitStack() as stack:

        def start() -> Liar:
            made = Liar()
            stack.callback(made.http.server_close)
            stack.callback(made.http.shutdown)
            return made

        yield start


@pytest.fixture
def object_bytes(film: Callable[..., FileDataset]) -> Callable[..., bytes]:
    """A file of PS3.10, by default the one that the liar lists."""

    def make(**attributes: Any) -> bytes:
        usual = {"StudyInstanceUID": STUDY, "SeriesInstanceUID": SERIES, "SOPInstanceUID": INSTANCE}
        buffer = BytesIO()
        film(**(usual | attributes)).save_as(buffer, enforce_file_format=True)
        return buffer.getvalue()

    return make


def multipart(*parts: bytes, media: str = "application/dicom") -> bytes:
    head = f"\r\n--frontier\r\nContent-Type: {media}\r\n\r\n".encode()
    return b"".join(head + part for part in parts) + b"\r\n--frontier--\r\n"


RELATED = 'multipart/related; type="application/dicom"; boundary="frontier"'


def sends(body: bytes, media: str = RELATED, **options: Any) -> Callable[..., None]:
    return lambda handler: reply(handler, body, media, **options)


def test_an_honest_answer_of_the_same_server_is_kept(
    liar: Callable[[], Liar], inbox: Inbox, object_bytes: Callable[..., bytes]
):
    server, whole = liar(), object_bytes()
    server.wado = sends(multipart(whole))
    assert server.fetch(inbox).counts == {Outcome.NEW.value: 1}
    assert [file.read_bytes() for file in files(inbox)] == [whole]
    assert {token for _, token in server.asked} == {f"Bearer {TOKEN}"}


def test_an_answer_that_is_the_object_itself_is_kept(
    liar: Callable[[], Liar], inbox: Inbox, object_bytes: Callable[..., bytes]
):
    server = liar()
    server.wado = sends(object_bytes(), "application/dicom")
    assert server.fetch(inbox).counts == {Outcome.NEW.value: 1}


def test_a_part_arrives_whole_wherever_its_pieces_are_cut(
    liar: Callable[[], Liar], inbox: Inbox, object_bytes: Callable[..., bytes]
):
    """Bytes within the object that look like the beginning of a boundary are no boundary."""
    trap = b"\r\n--fronti" * 100 + b"\r\n--frontie" * 100
    server, uids = liar(), [f"{INSTANCE}.{number}" for number in range(1, 40)]
    wholes = {uid: object_bytes(SOPInstanceUID=uid) + trap for uid in uids}

    def in_two_pieces(handler: BaseHTTPRequestHandler) -> None:
        uid = handler.path.rsplit("/", 1)[1]
        body, back = multipart(wholes[uid]), int(uid.rsplit(".", 1)[1])
        handler.send_response(200)
        handler.send_header("Content-Type", RELATED)
        handler.send_header("Transfer-Encoding", "chunked")
        handler.end_headers()
        for piece in (body[:back], body[back:-back], body[-back:]):
            handler.wfile.write(f"{len(piece):x}\r\n".encode() + piece + b"\r\n")
        handler.wfile.write(b"0\r\n\r\n")

    server.qido = lambda path: instances(uids) if "instances" in path else Liar.honest(path)
    server.wado = in_two_pieces
    assert server.fetch(inbox).counts == {Outcome.NEW.value: len(uids)}
    assert sorted(file.read_bytes() for file in files(inbox)) == sorted(wholes.values())


def instances(uids: list[str]) -> list[Any]:
    return [{"00080018": {"Value": [uid]}, "00080016": {"Value": [CR]}} for uid in uids]


@pytest.mark.parametrize(
    "lie",
    [
        {"StudyInstanceUID": "1.2.3.4.999"},
        {"SOPInstanceUID": "1.2.3.4.999"},
        {"SOPClassUID": "1.2.840.10008.5.1.4.1.1.2"},
    ],
)
def test_another_object_than_the_one_asked_for_is_not_kept(
    liar: Callable[[], Liar],
    inbox: Inbox,
    object_bytes: Callable[..., bytes],
    lie: dict[str, str],
):
    server = liar()
    server.wado = sends(multipart(object_bytes(**lie)))
    assert server.fetch(inbox).counts == {Trouble.FOREIGN.value: 1}
    assert files(inbox) == []


def test_a_redirect_is_not_followed_and_the_token_stays_here(
    liar: Callable[[], Liar], inbox: Inbox, object_bytes: Callable[..., bytes]
):
    server, thief = liar(), liar()
    thief.wado = sends(multipart(object_bytes()))
    server.wado = lambda handler: reply(
        handler, b"", status=302, Location=f"{thief.url}/instances/1"
    )
    with pytest.raises(PeerError, match=r"sends us on to '127\.0\.0\.1'"):
        server.fetch(inbox)
    assert thief.asked == []
    assert files(inbox) == []


def test_a_redirect_of_the_search_is_not_followed(
    liar: Callable[[], Liar], inbox: Inbox, monkeypatch: pytest.MonkeyPatch
):
    server, thief = liar(), liar()
    handler = server.http.RequestHandlerClass
    monkeypatch.setattr(
        handler, "do_GET",
        lambda self: reply(self, b"", status=307, Location=f"{thief.url}/studies"),
    )  # fmt: skip
    with pytest.raises(PeerError, match="sends us on"):
        server.fetch(inbox)
    assert thief.asked == []


def endless(handler: BaseHTTPRequestHandler) -> None:
    handler.send_response(200)
    handler.send_header("Content-Type", RELATED)
    handler.end_headers()
    handler.wfile.write(b"\r\n--frontier\r\nContent-Type: application/dicom\r\n\r\n")
    for _ in range(100_000):
        handler.wfile.write(bytes(2**16))


def test_an_object_without_an_end_is_read_up_to_the_bound(liar: Callable[[], Liar], tmp_path: Path):
    server = liar()
    server.wado = endless
    bounds = Bounds(object_bytes=2**20, least_free=0)
    with Inbox.opened(tmp_path / "inbox", bounds, silence=1.0) as inbox:
        assert server.fetch(inbox).counts == {Trouble.TOO_LARGE.value: 1}
        assert files(inbox) == []


def test_an_object_that_trickles_in_has_its_time(liar: Callable[[], Liar], inbox: Inbox):
    def trickling(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.send_header("Content-Type", RELATED)
        handler.end_headers()
        handler.wfile.write(b"\r\n--frontier\r\nContent-Type: application/dicom\r\n\r\n")
        for _ in range(300):
            handler.wfile.write(bytes(2**16))
            handler.wfile.flush()
            time.sleep(0.05)

    server = liar()
    server.wado = trickling
    begun = time.monotonic()
    with pytest.raises(PeerError, match="takes longer than"):
        server.fetch(inbox, object_seconds=0.5)
    assert time.monotonic() - begun < 10
    assert files(inbox) == []


def endless_lines(handler: BaseHTTPRequestHandler) -> None:
    handler.send_response(200)
    handler.send_header("Content-Type", RELATED)
    handler.end_headers()
    for _ in range(10_000):
        handler.wfile.write(b"X: y\r\n" * 1000)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda whole: sends(multipart(whole, whole)), "more objects than the one"),
        (lambda whole: sends(multipart(*[whole] * 500)), "more objects than the one"),
        (lambda whole: sends(multipart(whole), "text/html"), "something else than an object"),
        (lambda whole: sends(multipart(whole, media="text/html")), "something else"),
        (lambda whole: sends(multipart(whole), "multipart/related"), "something else"),
        (lambda whole: sends(multipart(whole), Content_Encoding="gzip"), "packs its answer"),
        (lambda _: endless_lines, "begins with something endless"),
    ],
)
def test_an_answer_that_is_not_one_object_ends_the_fetch(
    liar: Callable[[], Liar],
    inbox: Inbox,
    object_bytes: Callable[..., bytes],
    answer: Callable[[bytes], Any],
    message: str,
):
    server = liar()
    server.wado = answer(object_bytes())
    with pytest.raises(PeerError, match=message):
        server.fetch(inbox)
    assert files(inbox) == []


@pytest.mark.parametrize(
    "answer",
    [
        lambda whole: sends(multipart(whole)[:-40]),
        lambda whole: sends(multipart(whole)[:-4]),
        lambda _: sends(b""),
        lambda _: sends(b"gone", status=404),
        lambda _: sends(b"no", status=500),
    ],
)
def test_an_object_that_is_not_sent_leaves_its_study_unfinished(
    liar: Callable[[], Liar],
    inbox: Inbox,
    object_bytes: Callable[..., bytes],
    answer: Callable[[bytes], Any],
):
    server = liar()
    server.wado = answer(object_bytes())
    done = server.fetch(inbox)
    assert (done.counts, done.unfinished) == ({"not sent": 1}, 1)
    assert files(inbox) == []
    server.wado = sends(multipart(object_bytes()))
    assert server.fetch(inbox).unfinished == 0
    assert len(files(inbox)) == 1


def test_what_is_no_object_of_dicom_is_not_kept(liar: Callable[[], Liar], inbox: Inbox):
    server = liar()
    server.wado = sends(multipart(b"<html>" * 100))
    assert server.fetch(inbox).counts == {Trouble.UNREADABLE.value: 1}
    assert files(inbox) == []


def listing(*uids: Any) -> list[Any]:
    return [{"0020000D": {"vr": "UI", "Value": [uid]}} for uid in uids]


@pytest.mark.parametrize(
    "answer",
    [
        b"<html>",
        b"[" * 100_000,
        b"\xff\xfe",
        [1, 2],
        listing("1.2/../../patients"),
        listing("1.2.3?x=Doe"),
        listing(".."),
        listing("."),
        listing("1" * 65),
        listing(7),
        [{}],
        {"0020000D": 3},
    ],
)
def test_a_search_that_is_answered_with_nonsense_ends_the_fetch(
    liar: Callable[[], Liar], inbox: Inbox, answer: Any
):
    server = liar()
    server.qido = lambda _: answer
    with pytest.raises(PeerError, match="not what QIDO-RS gives") as error:
        server.fetch(inbox)
    assert "Doe" not in str(error.value)
    assert len(server.asked) == 1


def test_a_search_without_an_end_is_read_up_to_a_bound(
    liar: Callable[[], Liar], inbox: Inbox, monkeypatch: pytest.MonkeyPatch
):
    server = liar()
    monkeypatch.setattr(server.http.RequestHandlerClass, "do_GET", endless)
    with pytest.raises(PeerError, match="more than 67108864 bytes"):
        server.fetch(inbox)


def test_a_search_that_gives_the_same_page_for_ever_ends(liar: Callable[[], Liar], inbox: Inbox):
    server, page = liar(), listing(*(f"1.2.{number}" for number in range(1, 501)))
    server.qido = lambda path: page if path.partition("?")[0].endswith("studies") else []
    assert server.fetch(inbox).studies == 500
    assert sum("/studies?" in path for path, _ in server.asked) == 2


def test_a_server_that_is_gone_in_the_middle_is_named_and_the_rest_is_fetched_later(
    liar: Callable[[], Liar], inbox: Inbox, object_bytes: Callable[..., bytes]
):
    server, uids = liar(), [f"{INSTANCE}.{number}" for number in range(1, 31)]
    going = {"left": 12}

    def wado(handler: BaseHTTPRequestHandler) -> None:
        going["left"] -= 1
        if going["left"] < 0:
            handler.connection.close()
            return
        reply(
            handler, multipart(object_bytes(SOPInstanceUID=handler.path.rsplit("/")[-1])), RELATED
        )

    server.qido = lambda path: instances(uids) if "instances" in path else Liar.honest(path)
    server.wado = wado
    with pytest.raises(PeerError, match="cannot be reached"):
        server.fetch(inbox)
    assert len(files(inbox)) == 12
    assert inbox.studies() == (1, 0)
    going["left"] = 100
    assert server.fetch(inbox).counts == {Outcome.NEW.value: 18, "there already": 12}
    assert inbox.studies() == (0, 1)


def test_on_a_full_disk_the_fetch_ends_and_nothing_is_left(
    liar: Callable[[], Liar], tmp_path: Path, object_bytes: Callable[..., bytes]
):
    server = liar()
    server.wado = sends(multipart(object_bytes()))
    with Inbox.opened(tmp_path / "inbox", Bounds(least_free=2**62), silence=1.0) as inbox:
        with pytest.raises(NotKeptError, match="disk is full"):
            server.fetch(inbox)
        assert files(inbox) == []


def test_a_query_arrives_as_it_was_meant(liar: Callable[[], Liar], inbox: Inbox):
    server, described = liar(), "Chest? W+WO*, 50% & more/ü"
    fetch(server.server(), Query(description=described, modality="CT"), inbox)
    asked = urlsplit(server.asked[0][0])
    assert asked.path.endswith("/studies")
    assert {"StudyDescription": [described], "ModalitiesInStudy": ["CT"]}.items() <= (
        parse_qs(asked.query.replace("+", "%2B"), strict_parsing=True).items()
    )
    assert "*" in asked.query


def test_what_is_no_image_is_not_fetched(
    liar: Callable[[], Liar], inbox: Inbox, object_bytes: Callable[..., bytes]
):
    server = liar()
    document = {"00080016": {"Value": ["1.2.840.10008.5.1.4.1.1.104.1"]}}
    server.qido = lambda path: [Liar.honest(path)[0] | document]
    server.wado = sends(multipart(object_bytes()))
    assert server.fetch(inbox).counts == {"of a class that is not taken": 1}
    assert not [path for path, _ in server.asked if "/instances/" in path]


def test_no_token_and_no_study_is_told_in_logs_or_errors(
    liar: Callable[[], Liar], inbox: Inbox, caplog: pytest.LogCaptureFixture
):
    caplog.set_level(logging.DEBUG)
    server = liar()
    told = []
    for wado in (sends(b"", status=403), sends(b"x", "text/html"), sends(b"", status=404)):
        server.wado = wado
        try:
            server.fetch(inbox)
        except PeerError as error:
            told.append(str(error))
    told += [repr(server.server()), caplog.text]
    assert len(told) == 4
    for secret in (TOKEN, STUDY, INSTANCE):
        assert secret not in " ".join(told)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("http://pacs.example.org/dicom-web", "expected https"),
        ("http://192.0.2.1/dicom-web", "expected https"),
        ("https://user:secret@pacs.example.org/", "it holds a password"),
        ("https://pacs.example.org/?token=secret", r"after a \? or #"),
        ("ftp://pacs.example.org/", "expected one such as"),
        ("pacs.example.org", "expected one such as"),
    ],
)
def test_a_url_that_would_give_something_away_is_refused(url: str, message: str):
    with pytest.raises(ConfigError, match=message) as error:
        Access(url)
    assert "secret" not in str(error.value)
    assert Access("http://127.0.0.1:8042/dicom-web").origin == "http://127.0.0.1:8042"
    assert Access("http://localhost:8042/dicom-web").parts.port == 8042


def test_a_token_comes_from_a_file_of_its_owner_or_from_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    file = tmp_path / "token"
    file.write_text(f"{TOKEN}\n")
    file.chmod(0o644)
    with pytest.raises(ConfigError, match="chmod 600"):
        token_from(file, None)
    file.chmod(0o600)
    assert token_from(file, None) == TOKEN
    monkeypatch.setenv("PACS_TOKEN", TOKEN)
    assert token_from(None, "PACS_TOKEN") == TOKEN
    with pytest.raises(ConfigError, match="not set"):
        token_from(None, "ANOTHER")
    with pytest.raises(ConfigError, match="no token"):
        token_from(tmp_path / "none", None)
    with pytest.raises(ConfigError, match="is no token") as error:
        Access("https://pacs.example.org", "two words of\nTOKEN")
    assert "words" not in str(error.value)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({}, "which studies"),
        ({"studies": ("1.2/3",)}, "expected a Study Instance UID"),
        ({"study_date": "2026-01-01"}, "expected 20260131"),
    ],
)
def test_a_query_that_cannot_be_meant_is_refused(asked: dict[str, Any], message: str):
    with pytest.raises(ConfigError, match=message):
        Query(**asked)
