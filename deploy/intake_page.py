"""The review page: pictures of what waits, served from memory to the browser of this machine alone.

Nothing of it is written to the disk: a file would lay patients' images open. What may reach it:

- It listens on 127.0.0.1, and takes requests only that name it so (a name that is made to lead
  here by DNS is another name).
- Its address has a path that nobody can guess, and opens once: it sets a cookie that holds for
  that path alone, so no other service of this machine is ever sent it (cookies know no ports),
  and an address that is found later, in a history or a list of processes, opens nothing.
- A decision has to come from a form of its own: same origin, and with the form's secret.
- A browser may keep none of it, load nothing from elsewhere and show it in no other page's frame.

It ends by itself when nobody has asked for anything in a while.
"""

from __future__ import annotations

import hmac
import logging
import re
import secrets
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from http import HTTPStatus
from http.cookies import CookieError, SimpleCookie
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self
from urllib.parse import parse_qs

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from client.intake.decision import LONGEST, Decision, Shot
from client.intake.deid.burned_in import Box
from client.intake.desk import Desk, Entry
from common.clock import Clock
from common.errors import CloisterError, ConfigError
from deploy.intake_review import (
    LONGEST_NAME,
    LONGEST_WORDS,
    Case,
    Queue,
    decide,
    in_words,
    parsed_box,
    queued,
    written,
)
from deploy.node_pages import day

_log = logging.getLogger("cloister.review")

IDLE_SECONDS = 1800.0
MOST_BYTES = 65536
"""Of what a form may send."""
ROWS = 25
_LOOPBACK = "127.0.0.1"
_SOCKET_SECONDS = 20.0
_COOKIE = "cloister-review"
_HERE = Path(__file__).parent
_FILES = {
    "review.css": ("intake_page.css", "text/css; charset=utf-8"),
    "review.js": ("intake_page.js", "text/javascript; charset=utf-8"),
}
_TITLES = {
    Queue.WAITS: "Waiting",
    Queue.DECIDED: "Decided",
    Queue.BLANKED: "Blanked and kept",
    Queue.REJECTED: "Rejected",
}
_NOTHING = {
    Queue.WAITS: "Nothing waits for a person.",
    Queue.DECIDED: "No decision waits for the next run.",
    Queue.BLANKED: "Nothing that was kept has blanked pixels.",
    Queue.REJECTED: "Nothing was rejected.",
}
_OBJECT = re.compile(r"object/([0-9a-f]{32})")
_PICTURE = re.compile(r"object/([0-9a-f]{32})/([0-9]{1,3})/(before|after)\.png")
_SECURITY = (
    ("Cache-Control", "no-store, max-age=0"),
    (
        "Content-Security-Policy",
        "default-src 'none'; img-src 'self'; style-src 'self'; script-src 'self'; "
        "form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
    ),
    ("Cross-Origin-Opener-Policy", "same-origin"),
    ("Cross-Origin-Resource-Policy", "same-origin"),
    # Not "no-referrer": a browser would then name no origin with a form.
    ("Referrer-Policy", "same-origin"),
    ("X-Content-Type-Options", "nosniff"),
    ("X-Frame-Options", "DENY"),
)


class Asked(NamedTuple):
    """A request as it came; nothing of it is trusted. Header names are in lower case."""

    method: str
    target: str
    headers: Mapping[str, str]
    body: bytes = b""

    @property
    def path(self) -> str:
        """What stands before the question mark."""
        return self.target.partition("?")[0]

    @property
    def query(self) -> dict[str, str]:
        """The first value of each name."""
        return _fields(self.target.partition("?")[2])

    @property
    def form(self) -> dict[str, str]:
        """The first value of each field of a form."""
        return _fields(self.body.decode("utf-8", "replace"))


class Reply(NamedTuple):
    """What goes back."""

    status: int
    content: bytes
    kind: str = "text/html; charset=utf-8"
    headers: tuple[tuple[str, str], ...] = ()


class TurnedAwayError(Exception):
    """A request that is not served."""

    def __init__(self, status: HTTPStatus, words: str) -> None:
        super().__init__(words)
        self.status = status
        self.words = words


@dataclass
class Door:
    """Lets the one browser in that was given the address, and nobody else.

    Args:
        host: as that browser names this service: address and port.
        first: the path within the room to which it leads.
    """

    host: str
    first: str = ""
    _room: str = field(default_factory=lambda: secrets.token_urlsafe(18), repr=False)
    _once: str = field(default_factory=lambda: secrets.token_urlsafe(24), repr=False)
    _cookie: str = field(default_factory=lambda: secrets.token_urlsafe(24), repr=False)
    form: str = field(default_factory=lambda: secrets.token_urlsafe(24), repr=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    @property
    def address(self) -> str:
        """Opens the page, once."""
        return f"http://{self.host}{self.base}?open={self._once}"

    @property
    def base(self) -> str:
        """The path of everything that is served."""
        return f"/{self._room}/"

    def admit(self, asked: Asked) -> str | Reply:
        """The path within the room; for the one request that opens it, the answer.

        Raises:
            TurnedAwayError: for every other request.
        """
        if not _same(asked.headers.get("host", ""), self.host):
            raise TurnedAwayError(
                HTTPStatus.MISDIRECTED_REQUEST,
                f"this is {self.host}, and was asked for under another name; from another machine: "
                "ssh -L PORT:127.0.0.1:PORT with the same PORT on both sides",
            )
        if not _same(asked.path[: len(self.base)], self.base):
            raise _not_open()
        if asked.method == "GET" and asked.path == self.base and "open" in asked.query:
            return self._open(asked.query["open"])
        if not _same(_cookie_of(asked), self._cookie):
            raise _not_open()
        if asked.headers.get("sec-fetch-site", "none") not in ("none", "same-origin"):
            raise TurnedAwayError(HTTPStatus.FORBIDDEN, "another page asked for this")
        if asked.method == "POST":
            self._check_form(asked)
        return asked.path[len(self.base) :]

    def _open(self, secret: str) -> Reply:
        with self._lock:
            if not self._once or not _same(secret, self._once):
                raise _not_open()
            self._once = ""
        cookie = f"{_COOKIE}={self._cookie}; Path={self.base}; HttpOnly; SameSite=Strict"
        # A redirect would count as the site's that linked here, and SameSite=Strict would hold
        # the cookie back; a page that goes on by itself does not.
        on = self.base + self.first
        page = (
            '<!doctype html><meta charset="utf-8"><title>Review</title>'
            f'<meta http-equiv="refresh" content="0;url={on}">'
            f'<p><a href="{on}">To the review</a>'
        )
        return Reply(HTTPStatus.OK, page.encode(), headers=(("Set-Cookie", cookie),))

    def _check_form(self, asked: Asked) -> None:
        if not _same(asked.headers.get("origin", ""), f"http://{self.host}"):
            raise TurnedAwayError(HTTPStatus.FORBIDDEN, "the form came from another page")
        if not asked.headers.get("content-type", "").startswith(
            "application/x-www-form-urlencoded"
        ):
            raise TurnedAwayError(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "expected a form")
        if not _same(asked.form.get("form", ""), self.form):
            raise TurnedAwayError(HTTPStatus.FORBIDDEN, "the form is not of this review")


def _not_open() -> TurnedAwayError:
    return TurnedAwayError(
        HTTPStatus.FORBIDDEN,
        "this address opens nothing; it opens once: end `cloister intake review` in its terminal "
        "and start it again for a new one",
    )


class Room:
    """What is behind the door: the lists, the objects, their pictures, and decisions on them.

    Args:
        open_desk: opens the desk; each request opens it for itself.
        door: before it.
        name: of whoever decides, or a guess.
        named: whether the name is that person's own word.
        clock: dates decisions.
    """

    def __init__(
        self,
        open_desk: Callable[[], Desk],
        door: Door,
        *,
        name: str,
        named: bool = False,
        clock: Clock | None = None,
    ) -> None:
        self._open_desk = open_desk
        self._form = door.form
        self._base = door.base
        self._first = door.first
        self._name = name
        self._named = named
        self._clock = clock or Clock()

    def answer(self, path: str, asked: Asked) -> Reply:
        """What is at a path of the room.

        Raises:
            TurnedAwayError: if nothing is.
        """
        if path in _FILES and asked.method == "GET":
            file, kind = _FILES[path]
            return Reply(HTTPStatus.OK, (_HERE / file).read_bytes(), kind)
        if asked.method == "POST" and path == "who":
            return self._take_name(asked.form)
        if not self._named:
            return self._page("who", name=self._name, most=LONGEST_NAME)
        with self._open_desk() as desk:
            return self._of_desk(desk, path, asked)

    def _of_desk(self, desk: Desk, path: str, asked: Asked) -> Reply:
        if asked.method == "GET" and not path:
            return self._list(desk, asked.query)
        if asked.method == "GET" and (found := _PICTURE.fullmatch(path)):
            return self._picture(desk, found[1], int(found[2]), found[3])
        if found := _OBJECT.fullmatch(path):
            entry = _entry(desk, found[1])
            queue = _queue_of(desk, entry, asked.query.get("queue", ""))
            if asked.method == "POST":
                return self._take_decision(desk, entry, queue, asked.form)
            return self._object(desk, entry, queue, done=asked.query.get("done", ""))
        raise TurnedAwayError(HTTPStatus.NOT_FOUND, "there is nothing here")

    # Who it is.

    def _take_name(self, form: Mapping[str, str]) -> Reply:
        name = form.get("name", "").strip()
        if not 0 < len(name) <= LONGEST_NAME or not name.isprintable():
            words = f"Say who decides, in at most {LONGEST_NAME} printable characters."
            return self._page(
                "who",
                status=HTTPStatus.BAD_REQUEST,
                name=self._name,
                most=LONGEST_NAME,
                error=words,
            )
        self._name, self._named = name, True
        return self._go(self._first)

    # What waits.

    def _list(self, desk: Desk, query: Mapping[str, str]) -> Reply:
        queue = _queue(query.get("queue", ""))
        counts = {name: queued(desk, name) for name in Queue}
        numbers = counts[queue]
        start = min(_whole(query.get("from", "")), max(0, len(numbers) - 1)) // ROWS * ROWS
        shown = numbers[start : start + ROWS]
        return self._page(
            "list",
            queue=queue,
            counts={name: len(found) for name, found in counts.items()},
            cases=[Case.of(desk, desk.entry(number)) for number in shown],
            start=start,
            rows=ROWS,
            nothing=_NOTHING[queue],
            done=self._done(desk, query.get("done", "")),
        )

    def _object(
        self,
        desk: Desk,
        entry: Entry,
        queue: Queue,
        *,
        done: str = "",
        error: str = "",
        form: Mapping[str, str] | None = None,
    ) -> Reply:
        case, numbers = Case.of(desk, entry), queued(desk, queue)
        return self._page(
            "object",
            status=HTTPStatus.BAD_REQUEST if error else HTTPStatus.OK,
            case=case,
            frames=[_frame(case, shot) for shot in case.shots],
            queue=queue,
            around=_around(desk, numbers, entry.number),
            values=_typed(form) if form else _before(case),
            done=self._done(desk, done),
            error=error,
            longest=LONGEST_WORDS,
        )

    def _picture(self, desk: Desk, name: str, place: int, which: str) -> Reply:
        shots = desk.shots(_entry(desk, name))
        content = getattr(shots[place], which) if place < len(shots) else b""
        if not content:
            raise TurnedAwayError(HTTPStatus.NOT_FOUND, "there is no such picture")
        return Reply(HTTPStatus.OK, content, "image/png")

    # What is decided.

    def _take_decision(
        self, desk: Desk, entry: Entry, queue: Queue, form: Mapping[str, str]
    ) -> Reply:
        case, numbers = Case.of(desk, entry), queued(desk, queue)
        following = _around(desk, numbers, entry.number).following
        try:
            if not _same(form.get("seen", ""), case.seen):
                raise ConfigError("it was read again meanwhile: look at it again")
            decide(desk, case, _decision(form, self._name), self._clock)
        except ConfigError as error:
            return self._object(desk, entry, queue, error=str(error), form=form)
        going = f"object/{following}" if following and following != entry.id else ""
        return self._go(f"{going}?queue={queue}&done={entry.id}")

    def _done(self, desk: Desk, name: str) -> str:
        """What was just decided, in words."""
        if not re.fullmatch(r"[0-9a-f]{32}", name):
            return ""
        entry = _entry(desk, name)
        said = [decision for _, _, decision in desk.decisions(entry)]
        return f"{entry.short}: {in_words(said[-1])}." if said else ""

    def _go(self, path: str) -> Reply:
        return Reply(HTTPStatus.SEE_OTHER, b"", headers=(("Location", self._base + path),))

    def _page(self, kind: str, /, status: HTTPStatus = HTTPStatus.OK, **values: Any) -> Reply:
        told = {"error": "", "done": ""} | values
        template = _environment().get_template(f"intake_page_{kind}.html.j2")
        page = template.render(
            base=self._base,
            form=self._form,
            person=self._name if self._named else "",
            titles=_TITLES,
            **told,
        )
        return Reply(status, page.encode("utf-8", "backslashreplace"))


class _Around(NamedTuple):
    """Where an object is in its queue: ids of its neighbours, empty at the ends."""

    previous: str
    following: str
    place: int
    of: int


def _around(desk: Desk, numbers: Sequence[int], number: int) -> _Around:
    before = [other for other in numbers if other < number]
    after = [other for other in numbers if other > number]
    return _Around(
        previous=desk.entry(before[-1]).id if before else "",
        following=desk.entry((after or before)[0]).id if after or before else "",
        place=len(before) + 1,
        of=len(numbers),
    )


@dataclass(frozen=True)
class _Frame:
    """A picture on the page; sizes and boxes in the frame's own rows and columns."""

    shot: Shot
    found: tuple[Box, ...]

    @property
    def share(self) -> int:
        """Its size as a picture in percent: small text may be lost in a smaller one."""
        return min(100, round(100 * LONGEST / max(self.shot.rows, self.shot.columns)))


def _frame(case: Case, shot: Shot) -> _Frame:
    """What was drawn is among the boxes of what was read since: it is the form's to show."""
    drawn = set(case.drawn)
    return _Frame(shot, tuple(found for found in shot.boxes if found not in drawn))


def _before(case: Case) -> dict[str, str]:
    """What the form says first: what was said last."""
    last = case.said[-1] if case.said else Decision("release")
    return {
        "blank": "\n".join(map(written, case.drawn)),
        "found": "yes" if last.found else "",
        "because": "",
    }


def _typed(form: Mapping[str, str]) -> dict[str, str]:
    return {name: form.get(name, "") for name in ("blank", "found", "because")}


def _decision(form: Mapping[str, str], name: str) -> Decision:
    why = form.get("because", "").replace("\r\n", "\n")
    if form.get("verdict") == "reject":
        return Decision("reject", by=name, why=why)
    if form.get("verdict") != "release":
        raise ConfigError("say what you decide: release or reject")
    boxes = tuple(parsed_box(line) for line in form.get("blank", "").splitlines() if line.strip())
    return Decision("release", boxes, found=bool(form.get("found")), by=name, why=why)


def _entry(desk: Desk, name: str) -> Entry:
    try:
        return desk.find(name)
    except ConfigError:
        raise TurnedAwayError(HTTPStatus.NOT_FOUND, "there is no such object") from None


def _queue(name: str) -> Queue:
    return Queue(name) if name in set(Queue) else Queue.WAITS


def _queue_of(desk: Desk, entry: Entry, name: str) -> Queue:
    """The queue that an object is looked at in: the one that is named, or one that has it."""
    if name in set(Queue):
        return Queue(name)
    return next((queue for queue in Queue if entry.number in queued(desk, queue)), Queue.WAITS)


def _whole(text: str) -> int:
    return int(text) if text.isascii() and text.isdecimal() and len(text) <= 9 else 0


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(_HERE),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"in_words": in_words, "day": day}
    return environment


# --- The service ----------------------------------------------------------------------------------


class Page:
    """The page's service on a port of 127.0.0.1; use it as a context manager.

    Args:
        open_desk: opens the desk.
        name: of whoever decides, or a guess.
        named: whether it is that person's own word; otherwise the page asks.
        first: id of the object that is shown first.
        port: 0 for any that is free.
        idle: seconds after which it ends if nobody asks for anything.
        clock: counts them, and dates decisions.

    Raises:
        ConfigError: if the port is taken.
    """

    def __init__(
        self,
        open_desk: Callable[[], Desk],
        name: str = "",
        *,
        named: bool = False,
        first: str = "",
        port: int = 0,
        idle: float = IDLE_SECONDS,
        clock: Clock | None = None,
    ) -> None:
        self._clock = clock or Clock()
        self._idle = idle
        try:
            self._server = _Server((_LOOPBACK, port), partial(_Handler, self))
        except OSError as error:
            raise ConfigError(
                f"port {port} of {_LOOPBACK} cannot be had ({error.strerror}); "
                "--port 0 takes any that is free"
            ) from error
        self._server.timeout = 0.5
        path = f"object/{first}" if first else ""
        self.door = Door(f"{_LOOPBACK}:{self._server.server_port}", path)
        self._room = Room(open_desk, self.door, name=name, named=named, clock=self._clock)
        self._asked_at = self._clock.now()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._server.server_close()

    @property
    def address(self) -> str:
        """Opens the page in a browser, once."""
        return self.door.address

    def serve(self) -> None:
        """Serve until nobody has asked for anything in `idle` seconds."""
        while self._clock.now() - self._asked_at < self._idle:
            self._server.handle_request()

    def answer(self, asked: Asked) -> Reply:
        """The answer to one request, whatever it is."""
        try:
            admitted = self.door.admit(asked)
            self._asked_at = self._clock.now()
            if isinstance(admitted, Reply):
                return admitted
            return self._room.answer(admitted, asked)
        except TurnedAwayError as away:
            return _words(away.status, away.words)
        except CloisterError as error:
            return _words(HTTPStatus.INTERNAL_SERVER_ERROR, str(error))
        except Exception as error:  # noqa: BLE001
            # The text of what was not foreseen may quote anything.
            _log.error("a request of the review page failed (%s)", type(error).__name__)
            words = f"something went wrong here ({type(error).__name__})"
            return _words(HTTPStatus.INTERNAL_SERVER_ERROR, words)


class _Server(ThreadingHTTPServer):
    """A thread for each connection."""

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A browser that went away is no error; of others the kind is told, and no stack."""
        kind = sys.exc_info()[0]
        if kind is not None and not issubclass(kind, OSError):
            _log.error("a connection of the review page failed (%s)", kind.__name__)


def _words(status: HTTPStatus, words: str) -> Reply:
    return Reply(status, f"{words}\n".encode(), "text/plain; charset=utf-8")


class _Handler(BaseHTTPRequestHandler):
    """Bytes of a connection into `Asked`, and a `Reply` into bytes; it logs nothing."""

    server_version, sys_version = "cloister", ""
    timeout = _SOCKET_SECONDS

    def __init__(self, page: Page, *arguments: Any) -> None:
        self._page = page
        super().__init__(*arguments)

    def do_GET(self) -> None:
        """See `Page.answer`."""
        self._reply(self._page.answer(self._asked(b"")))

    def do_POST(self) -> None:
        """See `Page.answer`; a form that is too large is not read."""
        length = self.headers.get("Content-Length", "")
        if "Transfer-Encoding" in self.headers or not length.isascii() or not length.isdecimal():
            self._reply(_words(HTTPStatus.LENGTH_REQUIRED, "say how long the form is"))
        elif len(length) > 9 or int(length) > MOST_BYTES:
            words = f"a form has at most {MOST_BYTES} bytes"
            self._reply(_words(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, words))
        else:
            self._reply(self._page.answer(self._asked(self.rfile.read(int(length)))))

    def _asked(self, body: bytes) -> Asked:
        named = {name.lower() for name in self.headers}
        # Of a header that stands twice none is right.
        headers = {
            name: every[0] for name in named if len(every := self.headers.get_all(name, [])) == 1
        }
        return Asked(self.command, self.path, headers, body)

    def _reply(self, reply: Reply) -> None:
        self.send_response(reply.status)
        for name, value in (*_SECURITY, *reply.headers):
            self.send_header(name, value)
        self.send_header("Content-Type", reply.kind)
        self.send_header("Content-Length", str(len(reply.content)))
        self.end_headers()
        self.wfile.write(reply.content)

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """As every other answer, where the connection itself is at fault."""
        status = HTTPStatus(code)
        self.close_connection = True
        self._reply(_words(status, status.phrase))

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing: what is asked for names objects."""


def _same(seen: str, expected: str) -> bool:
    """Whether two texts are equal, in a time that does not tell where they differ."""
    return hmac.compare_digest(seen.encode("utf-8", "replace"), expected.encode())


def _cookie_of(asked: Asked) -> str:
    try:
        cookies = SimpleCookie(asked.headers.get("cookie", ""))
    except CookieError:
        return ""
    return cookies[_COOKIE].value if _COOKIE in cookies else ""


def _fields(text: str) -> dict[str, str]:
    try:
        found = parse_qs(text, keep_blank_values=True, max_num_fields=16)
    except ValueError:
        return {}
    return {name: values[0] for name, values in found.items()}
