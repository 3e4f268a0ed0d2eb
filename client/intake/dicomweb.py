"""Studies of a DICOMweb server into an inbox: QIDO-RS finds them, WADO-RS brings them (PS3.18).

The server is believed as little as anybody on the network. Its answers have bounds in bytes and
time, a redirect is not followed (the token would go with it), and an object that is not the one
that was asked for is not kept. Objects go to the disk as they come, byte by byte, and only those
that are not there yet: a fetch that was broken off goes on where it was.
"""

from __future__ import annotations

import io
import logging
import os
import re
import stat
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from ipaddress import ip_address
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import SplitResult, urlsplit

import requests
import urllib3
from dicomweb_client import DICOMwebClient
from requests.auth import AuthBase

from client.intake.inbox import TAKEN, Arrival, Inbox, Names, NotKeptError, Outcome, Trouble
from client.intake.quiet import quiet
from common.clock import Clock
from common.errors import ConfigError, IntakeError, PeerError

_UID = re.compile(r"[0-9A-Za-z.]{0,63}[0-9A-Za-z]")  # not all in the field are of digits alone
_DATES = re.compile(r"\d{8}|\d{8}-\d{8}|\d{8}-|-\d{8}")
_TOKEN = re.compile(r"(?:(?:Bearer|Basic) )?[A-Za-z0-9._~+/=-]+")
_LONGEST_TOKEN = 2**14
_ACCEPT = 'multipart/related; type="application/dicom"; transfer-syntax=*'
_DICOM = "application/dicom"
_BLOCK = 2**16
_PAGE = 500
_PAGE_BYTES = 2**26
_MOST_STUDIES = 100_000
_PART_HEADER = 2**14
_LONGEST_BOUNDARY = 70  # RFC 2046 5.1.1
_CONNECT, _SILENT = 10.0, 60.0
_DENIED = (401, 403)
_MOST_FAILURES = 10
_CLASS, _INSTANCE, _STUDY, _SERIES, _MODALITY = (
    "00080016", "00080018", "0020000D", "0020000E", "00080060",
)  # fmt: skip
_TALKATIVE = (
    logging.getLogger("dicomweb_client"),
    logging.getLogger("pydicom"),
    logging.getLogger("urllib3"),
)


@dataclass(frozen=True)
class Access:
    """Where a server is, and how it knows us.

    Args:
        url: of the service, as ``https://pacs.example.org/dicom-web``; ``http`` on this machine
            alone.
        token: what goes with each request; alone it is a bearer token (RFC 6750).
        authority: PEM of the authority of the server's certificate; else the public ones.
        certificate, key: our own, for a server that asks for one.

    Raises:
        ConfigError: if the URL or the token cannot be used.
    """

    url: str
    token: str = field(default="", repr=False)
    authority: Path | None = None
    certificate: Path | None = None
    key: Path | None = None

    def __post_init__(self) -> None:
        parts = self.parts
        if not parts.hostname or parts.scheme not in ("http", "https"):
            raise ConfigError("URL: expected one such as https://pacs.example.org/dicom-web")
        if parts.username is not None or parts.password is not None:
            raise ConfigError("URL: it holds a password; expected --token-file or --token-env")
        if parts.query or parts.fragment:
            raise ConfigError("URL: it goes on after a ? or #; expected the service's root alone")
        if parts.scheme == "http" and not _is_loopback(parts.hostname):
            raise ConfigError(
                f"URL: http to {parts.hostname} can be read by anybody on the way; expected https"
            )
        if not re.fullmatch(_TOKEN, self.token or "none"):
            raise ConfigError("the token is no token: expected its letters and digits on one line")
        for path in (self.authority, self.certificate, self.key):
            if path is not None and not path.is_file():
                raise ConfigError(f"{path}: no such file; expected PEM")
        if (self.certificate is None) != (self.key is None):
            raise ConfigError("expected a certificate and its key, or neither")

    @property
    def parts(self) -> SplitResult:
        """The URL in parts."""
        return urlsplit(self.url)

    @property
    def origin(self) -> str:
        """Scheme, host and port."""
        return f"{self.parts.scheme}://{self.parts.netloc}"


def token_from(file: Path | None, variable: str | None) -> str:
    """The token in a file that only its owner may read, or in a variable of the environment.

    Raises:
        ConfigError: if it is not there, or others may read it.
    """
    if file is not None and variable is not None:
        raise ConfigError("--token-file and --token-env: expected one of them")
    if variable is not None:
        if not os.environ.get(variable):
            raise ConfigError(f"--token-env {variable}: this variable is not set, or empty")
        return os.environ[variable].strip()
    if file is None:
        return ""
    try:
        mode = stat.S_IMODE(file.stat().st_mode)
        with file.open("rb") as opened:
            token = opened.read(_LONGEST_TOKEN).decode("ascii").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: no token can be read ({type(error).__name__})") from None
    if mode & 0o077:
        raise ConfigError(
            f"{file}: this token has mode {mode:04o}, others may read it; expected 0600: run "
            f"`chmod 600 {file}` and think about who has read it"
        )
    return token


@dataclass(frozen=True)
class Query:
    """Which studies are wanted (PS3.18 8.3.4); what is empty does not narrow them.

    Attributes:
        studies: their UIDs.
        modality: of the series; series of another are not fetched.
        study_date: ``20260131``, or from and to with a hyphen in between, or one of them.
        description: of the study; ``*`` and ``?`` stand for letters.

    Raises:
        ConfigError: if nothing narrows them, or a value cannot be one.
    """

    studies: tuple[str, ...] = ()
    modality: str = ""
    study_date: str = ""
    description: str = ""

    def __post_init__(self) -> None:
        if not (self.studies or self.modality or self.study_date or self.description):
            raise ConfigError(
                "which studies? Expected --modality, --study-date, --description or --study"
            )
        if any(not re.fullmatch(_UID, uid) for uid in self.studies):
            raise ConfigError("--study: expected a Study Instance UID such as 1.2.840.99.7")
        if self.study_date and not re.fullmatch(_DATES, self.study_date):
            raise ConfigError(
                "--study-date: expected 20260131, or 20260101-20260331, 20260101- or -20260331"
            )

    @property
    def filters(self) -> dict[str, str]:
        """As QIDO-RS asks for studies."""
        asked = {
            "ModalitiesInStudy": self.modality,
            "StudyDate": self.study_date,
            "StudyDescription": self.description,
        }
        return {keyword: value for keyword, value in asked.items() if value}


class Place(NamedTuple):
    """Where an instance is at the server, and what it says of its class."""

    study: str
    series: str
    instance: str
    sop_class: str


@dataclass
class Fetched:
    """What a fetch did.

    Attributes:
        counts: objects by what became of them.
        studies: how many were found.
        unfinished: of how many something is missing that another fetch may bring.
    """

    counts: Counter[str] = field(default_factory=Counter)
    studies: int = 0
    unfinished: int = 0


@dataclass
class Server:
    """A DICOMweb server.

    Args:
        access: where and how.
        clock: for the time that an answer has.
        object_seconds: for one object.
    """

    access: Access
    clock: Clock = field(default_factory=Clock)
    object_seconds: float = 1800.0

    def studies(self, query: Query) -> list[str]:
        """UIDs of the studies that a query finds; those that it names are taken at their word.

        Raises:
            PeerError: if the server cannot be reached, denies access, or its answer is none.
        """
        if query.studies:
            return list(query.studies)
        found = self._pages(_STUDY, self._client.search_for_studies, query.filters)
        return [uid for uid, _ in found]

    def places(self, study: str, modality: str = "") -> Iterator[Place]:
        """The instances of a study, series by series, of one modality if it is given.

        Raises:
            PeerError: as `studies` does.
        """
        for series, found in self._pages(_SERIES, self._client.search_for_series, {}, study):
            if modality and _value(found, _MODALITY) != modality:
                continue
            search = self._client.search_for_instances
            for instance, item in self._pages(_INSTANCE, search, {}, study, series):
                yield Place(study, series, instance, _value(item, _CLASS))

    def bring(self, place: Place, arrival: Arrival) -> None:
        """Write an instance as the server has it.

        Raises:
            PeerError: if the server does not send it, or sends something else.
            NotKeptError: if there was trouble with it; the rest is not read.
        """
        url = (
            f"{self.access.url.rstrip('/')}/studies/{place.study}/series/{place.series}"
            f"/instances/{place.instance}"
        )
        until = self.clock.now() + self.object_seconds
        with _at_server(self.access.origin):
            headers = {"Accept": _ACCEPT}
            with self._session.get(
                url, headers=headers, stream=True, timeout=(_CONNECT, _SILENT)
            ) as answer:
                _check_status(answer)
                for block in _content(answer, self._blocks(answer, until)):
                    arrival.write(block)
                    if arrival.trouble is not None:
                        raise NotKeptError(arrival.trouble)

    def _blocks(self, answer: requests.Response, until: float) -> Iterator[bytes]:
        for block in answer.raw.stream(_BLOCK, decode_content=False):
            if self.clock.now() > until:
                raise PeerError(f"an object takes longer than {self.object_seconds:g} s")
            yield block

    @cached_property
    def _session(self) -> _Session:
        return _Session(self.access, self.clock)

    @cached_property
    def _client(self) -> DICOMwebClient:
        client = DICOMwebClient(
            self.access.url.rstrip("/"),
            session=self._session,
            permissive_uid=True,
            timeout=(_CONNECT, _SILENT),
        )
        client.set_http_retry_params(retry=False)  # it would ask again after a lie as well
        return client

    def _pages(
        self, tag: str, search: Callable[..., Any], filters: dict[str, str], *within: str
    ) -> Iterator[tuple[str, dict[str, Any]]]:
        """Page after page of what is found, each UID once; a page without a new one is the last."""
        seen: set[str] = set()
        while True:
            with _at_server(self.access.origin):
                page = search(*within, limit=_PAGE, offset=len(seen), search_filters=filters)
                named = {_uid(item, tag): item for item in page}
            new = {uid: item for uid, item in named.items() if uid not in seen}
            if not new:
                return
            seen |= new.keys()
            if len(seen) > _MOST_STUDIES:
                raise PeerError(f"more than {_MOST_STUDIES} are found; narrow the query")
            yield from new.items()
            if len(page) < _PAGE:
                return


def fetch(
    server: Server,
    query: Query,
    inbox: Inbox,
    progress: Callable[[int, int, int], None] = lambda *_: None,
) -> Fetched:
    """Fetch what a query finds and what is not there yet; each study is complete when it is whole.

    Args:
        server: where from.
        query: which studies.
        inbox: where to.
        progress: told studies done, studies found, objects fetched.

    Raises:
        PeerError: if the server cannot be worked with.
        NotKeptError: if the inbox's disk is full.
    """
    with quiet(), _silent():
        done = Fetched()
        found = server.studies(query)
        for study in found:
            progress(done.studies, len(found), done.counts[Outcome.NEW])
            failed = False
            for place in server.places(study, query.modality):
                outcome = _one(server, place, inbox)
                done.counts[outcome] += 1
                failed = failed or outcome == _NOT_SENT
                progress(done.studies, len(found), done.counts[Outcome.NEW])
                if done.counts[_NOT_SENT] >= _MOST_FAILURES:
                    raise PeerError(
                        f"{server.access.origin}: {_MOST_FAILURES} objects were not sent; see its "
                        "log, then fetch again: what is there is not fetched twice"
                    )
            done.studies += 1
            done.unfinished += failed
            if not failed:
                inbox.complete(study)
        progress(done.studies, len(found), done.counts[Outcome.NEW])
        return done


_THERE, _NO_IMAGE, _NOT_SENT = "there already", "of a class that is not taken", "not sent"


def _one(server: Server, place: Place, inbox: Inbox) -> str:
    """What became of one object, in words."""
    names = Names(place.sop_class, place.instance, place.study)
    if place.sop_class and place.sop_class not in TAKEN:
        return _NO_IMAGE
    if inbox.has(names):
        return _THERE
    arrival = inbox.arrival()
    try:
        server.bring(place, arrival)
        return inbox.keep(arrival, names).value
    except NotKeptError as error:
        if error.trouble is Trouble.DISK_FULL:
            raise
        return error.trouble.value
    except _NotSentError:
        return _NOT_SENT
    finally:
        arrival.drop()


class _NotSentError(PeerError):
    """The server does not send one object; others it may."""


class _Token(AuthBase):
    """Puts the token on a request; nowhere else does it stand."""

    def __init__(self, token: str) -> None:
        self._value = token if " " in token else f"Bearer {token}"

    def __call__(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        request.headers["Authorization"] = self._value
        return request


class _Session(requests.Session):
    """Requests to one server: no redirect, no proxy and no password of the environment.

    An answer that is read whole is read up to a bound.
    """

    def __init__(self, access: Access, clock: Clock) -> None:
        super().__init__()
        self.trust_env = False
        self.verify = str(access.authority) if access.authority else True
        if access.certificate is not None:
            self.cert = (str(access.certificate), str(access.key))
        if access.token:
            self.auth = _Token(access.token)
        self.headers["Accept-Encoding"] = "identity"
        self._clock = clock

    def get_redirect_target(self, resp: requests.Response) -> str | None:
        """Follow nowhere.

        Raises:
            PeerError: if the server asks for it.
        """
        if resp.is_redirect:
            where = urlsplit(resp.headers.get("location", "")).hostname or "itself"
            raise PeerError(
                f"the server sends us on to {where[:64]!r}; nothing is sent there: if that is "
                "right, fetch from there"
            )
        return None

    def send(self, request: requests.PreparedRequest, **kwargs: Any) -> requests.Response:
        """Send a request, and read what is not streamed.

        Raises:
            PeerError: if the answer is packed, redirects, or is too long.
        """
        request.headers.pop("Host", None)  # dicomweb-client leaves the port out
        parts = urlsplit(str(request.url))
        request.url = parts._replace(query=_plainly(parts.query)).geturl()
        whole = not kwargs.get("stream")
        answer = super().send(request, **(kwargs | {"stream": True}))
        if answer.headers.get("Content-Encoding", "identity") != "identity":
            answer.close()
            raise PeerError("the server packs its answer, which was not asked for")
        if whole:
            answer.raw = io.BytesIO(self._read(answer))
        return answer

    def _read(self, answer: requests.Response) -> bytes:
        read, until = bytearray(), self._clock.now() + _SILENT
        for block in answer.raw.stream(_BLOCK, decode_content=False):
            read += block
            if len(read) > _PAGE_BYTES or self._clock.now() > until:
                answer.close()
                raise PeerError(f"an answer has more than {_PAGE_BYTES} bytes, or takes too long")
        return bytes(read)


def _plainly(query: str) -> str:
    """A query as RFC 3986 has it: a + is a +, and what PS3.4 C.2.2.2.4 matches by stands as it is.

    The client library encodes as forms do, which not every server decodes.
    """
    return query.replace("+", "%20").replace("%2A", "*").replace("%3F", "?")


def _content(answer: requests.Response, blocks: Iterator[bytes]) -> Iterator[bytes]:
    """The one object of an answer (PS3.18 8.6.1.2.1), as it comes.

    Raises:
        PeerError: if the answer is something else, or has several.
    """
    media, parameters = _media_type(answer.headers.get("Content-Type", ""))
    if media == _DICOM:
        return blocks
    boundary = parameters.get("boundary", "")
    if media != "multipart/related" or not 0 < len(boundary) <= _LONGEST_BOUNDARY:
        raise PeerError("the server answers with something else than an object of DICOM")
    return _OnePart(blocks).content(boundary.encode("latin-1"))


class _OnePart:
    """The single part of a multipart body (RFC 2046 5.1); it holds a block at a time."""

    def __init__(self, blocks: Iterator[bytes]) -> None:
        self._blocks = blocks
        self._buffer = bytearray(b"\r\n")  # a first boundary may stand at the very beginning

    def content(self, boundary: bytes) -> Iterator[bytes]:
        """What the part holds.

        Raises:
            PeerError: if it ends too early, is no object of DICOM, or another one follows.
        """
        delimiter = b"\r\n--" + boundary
        self._until(delimiter)
        media, _ = _media_type(_header(self._until(b"\r\n\r\n"), "content-type"))
        if media not in (_DICOM, ""):
            raise PeerError("the server sends something else than an object of DICOM")
        keep = len(delimiter) - 1
        while (at := self._buffer.find(delimiter)) < 0:
            if len(self._buffer) > keep:
                yield bytes(self._buffer[:-keep])
                del self._buffer[:-keep]
            self._more()
        yield bytes(self._buffer[:at])
        del self._buffer[: at + len(delimiter)]
        while len(self._buffer) < 2:
            self._more()
        if self._buffer[:2] != b"--":
            raise PeerError("the server sends more objects than the one that was asked for")

    def _until(self, mark: bytes) -> bytes:
        while (at := self._buffer.find(mark)) < 0:
            if len(self._buffer) > _PART_HEADER:
                raise PeerError("the server's answer begins with something endless")
            self._more()
        taken = bytes(self._buffer[:at])
        del self._buffer[: at + len(mark)]
        return taken

    def _more(self) -> None:
        block = next(self._blocks, None)
        if block is None:
            raise _NotSentError("the server's answer ends in the middle")
        self._buffer += block


def _header(lines: bytes, name: str) -> str:
    for line in lines.decode("latin-1").splitlines():
        key, _, value = line.partition(":")
        if key.strip().lower() == name:
            return value.strip()
    return ""


def _media_type(text: str) -> tuple[str, dict[str, str]]:
    media, *rest = text.split(";")
    pairs = (part.partition("=") for part in rest)
    return media.strip().lower(), {
        key.strip().lower(): value.strip().strip('"') for key, _, value in pairs
    }


def _check_status(answer: requests.Response) -> None:
    if answer.status_code in _DENIED:
        raise PeerError(f"the server denies access (status {answer.status_code}); see the token")
    if answer.status_code != requests.codes.ok:
        raise _NotSentError(f"status {answer.status_code}")


@contextmanager
def _at_server(origin: str) -> Iterator[None]:
    """Errors of the network in words: what libraries say of them may name studies.

    Raises:
        PeerError: for all of them.
    """
    try:
        yield
    except IntakeError:
        raise
    except _NotSentError as error:
        raise _NotSentError(f"{origin}: {error}") from None
    except PeerError as error:
        raise PeerError(f"{origin}: {error}") from None
    except requests.exceptions.SSLError:
        raise PeerError(
            f"{origin}: no TLS with it: its certificate is not of an authority that we know "
            "(--ca), or it asks for one of ours (--cert, --key)"
        ) from None
    except requests.exceptions.HTTPError as error:
        status = error.response.status_code if error.response is not None else 0
        said = "denies access" if status in _DENIED else "cannot answer"
        raise PeerError(f"{origin}: it {said} (status {status})") from None
    except (ValueError, RecursionError, TypeError, AttributeError, KeyError) as error:
        kind = type(error).__name__
        raise PeerError(f"{origin}: its answer is not what QIDO-RS gives ({kind})") from None
    except (requests.exceptions.RequestException, urllib3.exceptions.HTTPError, OSError) as error:
        raise PeerError(f"{origin}: it cannot be reached ({type(error).__name__})") from None


def _uid(item: Any, tag: str) -> str:
    """The UID of something found.

    Raises:
        ValueError: if it has none.
    """
    found = _value(item, tag)
    if not re.fullmatch(_UID, found):
        raise ValueError
    return found


def _value(item: Any, tag: str) -> str:
    """The first value of an attribute in DICOM JSON (PS3.18 F.2), as text."""
    values = item.get(tag, {}).get("Value") or [""]
    return values[0] if isinstance(values[0], str) else ""


def _is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


@contextmanager
def _silent() -> Iterator[None]:
    """Keep the libraries from logging: they log URLs, which name studies."""
    levels = [logger.level for logger in _TALKATIVE]
    for logger in _TALKATIVE:
        logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        for logger, level in zip(_TALKATIVE, levels, strict=True):
            logger.setLevel(level)
