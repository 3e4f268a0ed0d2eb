"""The review page, as the one browser meets it that was given its address, and as others do."""

from __future__ import annotations

import itertools
import re
import socket
import sqlite3
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass, replace
from http.client import HTTPConnection
from pathlib import Path
from typing import Any
from urllib.parse import urlencode, urlsplit

import pytest

from client.intake.decision import Decision
from client.intake.deid.burned_in import Box
from client.intake.desk import State
from common.clock import Clock
from common.errors import ConfigError
from deploy.intake_page import MOST_BYTES, Page
from deploy.intake_review import Case, Queue, decide, parsed_box, queued

ULTRASOUND, CAPTURE, FILM = "GREYSCALE_IMAGE.dcm", "SC_rgb_2frame.dcm", "2_ORIGINAL.dcm"
FORM = "application/x-www-form-urlencoded"


@dataclass(frozen=True)
class Answer:
    """What came back."""

    status: int
    headers: dict[str, str]
    content: bytes

    @property
    def text(self) -> str:
        return self.content.decode()


class Browser:
    """Sends what a browser would, but for what a test changes."""

    def __init__(self, page: Page, thread: threading.Thread) -> None:
        self.page = page
        self.thread = thread
        self.url = urlsplit(page.address)
        self.base = self.url.path
        self.host = str(self.url.netloc)
        self.cookie = ""

    def open(self) -> Answer:
        """Follow the address, and keep the cookie."""
        answer = self.get(f"{self.url.path}?{self.url.query}", cookie="")
        self.cookie = answer.headers.get("set-cookie", "").partition(";")[0]
        return answer

    def get(self, path: str = "", *, method: str = "GET", **changes: str | None) -> Answer:
        return self._send(method, self._full(path), self._headers(changes), None)

    def post(
        self, path: str, fields: dict[str, str], body: bytes | None = None, **changes: str | None
    ) -> Answer:
        headers = {"origin": f"http://{self.host}", "content-type": FORM} | self._headers(changes)
        kept = {name: value for name, value in headers.items() if value is not None}
        content = urlencode(fields).encode() if body is None else body
        return self._send("POST", self._full(path), kept, content)

    def form(self, path: str) -> dict[str, str]:
        """The hidden fields of a page's form."""
        found = re.findall(
            r'<input type="hidden" name="(\w+)" value="([^"]*)"', self.get(path).text
        )
        assert found
        return dict(found)

    def _full(self, path: str) -> str:
        return path if path.startswith("/") else self.base + path

    def _headers(self, changes: dict[str, str | None]) -> dict[str, Any]:
        named = {name.replace("_", "-"): value for name, value in changes.items()}
        return {"host": self.host, "cookie": self.cookie} | named

    def _send(self, method: str, path: str, headers: dict[str, Any], body: bytes | None) -> Answer:
        connection = HTTPConnection(str(self.url.hostname), self.url.port, timeout=60)
        try:
            connection.putrequest(method, path, skip_host=True, skip_accept_encoding=True)
            if body is not None and "content-length" not in headers:
                headers = headers | {"content-length": str(len(body))}
            for name, value in headers.items():
                if value is not None:
                    connection.putheader(name, value)
            connection.endheaders(body)
            came = connection.getresponse()
            told = {name.lower(): value for name, value in came.getheaders()}
            return Answer(came.status, told, came.read())
        finally:
            connection.close()


@pytest.fixture
def serve() -> Iterator[Callable[..., Browser]]:
    """`serve(ward, **changes)`: a browser before a page that is served until the test ends."""
    with ExitStack() as ends:

        def start(ward: Any, *, clock: Clock | None = None, **changes: Any) -> Browser:
            clock, stop = clock or Clock(), threading.Event()
            ticking = replace(clock, now=lambda: float("inf") if stop.is_set() else clock.now())
            told: dict[str, Any] = {"name": "Ada", "named": True} | changes
            page = ends.enter_context(Page(ward.desk, clock=ticking, **told))
            thread = threading.Thread(target=page.serve)
            browser = Browser(page, thread)

            def end() -> None:
                stop.set()
                with suppress(OSError):  # it need not wait for its next look at the clock
                    socket.create_connection(("127.0.0.1", browser.url.port or 0), 60).close()
                thread.join(60)

            thread.start()
            ends.callback(end)
            return browser

        yield start


@pytest.fixture
def browser(serve: Callable[..., Browser], ward: Any) -> Browser:
    """A browser that has opened the page of the ward."""
    made = serve(ward)
    made.open()
    return made


def said(ward: Any) -> list[Decision]:
    with ward.desk() as desk:
        return [decision for _, _, decision in desk.decisions()]


def content(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, but for what SQLite keeps beside a database."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and not path.name.endswith(("-wal", "-shm"))
    }


# --- The door -----------------------------------------------------------------------------------


def test_the_address_opens_once_and_sets_a_cookie_for_its_own_path(serve: Any, ward: Any):
    browser = serve(ward)
    opened = browser.open()
    assert opened.status == 200
    cookie = opened.headers["set-cookie"]
    assert f"Path={browser.base};" in cookie
    assert cookie.endswith("HttpOnly; SameSite=Strict")
    assert re.search(r"=[\w-]{32};", cookie)
    assert f"url={browser.base}" in opened.text
    assert ward.entry(CAPTURE).short in browser.get().text

    again = Browser(browser.page, browser.thread)
    again.url = browser.url
    assert again.open().status == 403
    assert again.get().status == 403


def test_without_the_cookie_or_the_path_there_is_nothing(browser: Browser, ward: Any):
    good = browser.cookie
    entry = ward.entry(CAPTURE)
    paths = ("", f"object/{entry.id}", f"object/{entry.id}/0/before.png", "review.css", "nothing")
    for path, cookie in itertools.product(
        paths, ("", "cloister-review=", f"{good}x", good[:-1], "cloister-review=\xe9", ";;=;\x01")
    ):
        refused = browser.get(path, cookie=cookie)
        assert (refused.status, len(refused.content) < 300) == (403, True), (path, cookie)
        assert entry.short not in refused.text
    for path in ("/", "/x/", browser.base[:-2] + "/", f"/{'A' * 24}/", "//"):
        assert browser.get(path).status == 403, path
    assert browser.get("").status == 200  # the control: with both it is there


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "localhost:{port}",
        "127.0.0.1",
        "127.0.0.1:1",
        "{host}.evil.example",
        "",
        None,
    ],
)
def test_under_another_name_there_is_nothing(browser: Browser, ward: Any, host: str | None):
    name = host and host.format(port=browser.url.port, host=browser.host)
    refused = browser.get("", host=name)
    assert refused.status == 421
    assert ward.entry(CAPTURE).short not in refused.text
    fields = browser.form(f"object/{ward.entry(CAPTURE).id}")
    sent = browser.post(
        f"object/{ward.entry(CAPTURE).id}", fields | {"verdict": "release"}, host=name
    )
    assert sent.status == 421
    assert said(ward) == []


def test_a_name_that_is_said_twice_is_none(browser: Browser):
    request = (
        f"GET {browser.base} HTTP/1.1\r\nHost: {browser.host}\r\nHost: evil.example\r\n"
        f"Cookie: {browser.cookie}\r\n\r\n"
    )
    with socket.create_connection((str(browser.url.hostname), browser.url.port), 60) as line:
        line.sendall(request.encode())
        assert line.makefile("rb").readline().split()[1] == b"421"


def test_it_listens_on_one_loopback_address_alone(browser: Browser):
    port = browser.url.port or 0
    assert browser.url.hostname == "127.0.0.1"
    with socket.create_connection(("127.0.0.1", port), 60):
        pass
    with pytest.raises(OSError, match="refused"):
        socket.create_connection(("127.0.0.2", port), 60)


def test_another_page_cannot_ask_for_anything(browser: Browser, ward: Any):
    path = f"object/{ward.entry(CAPTURE).id}/0/before.png"
    for site, status in (("cross-site", 403), ("same-site", 403), ("same-origin", 200)):
        assert browser.get(path, sec_fetch_site=site).status == status, site
    headers = browser.get(path).headers
    assert headers["cross-origin-resource-policy"] == "same-origin"
    assert headers["x-frame-options"] == "DENY"
    assert "access-control-allow-origin" not in headers


def test_a_decision_comes_from_its_own_form_alone(browser: Browser, ward: Any):
    path = f"object/{ward.entry(CAPTURE).id}"
    good = browser.form(path) | {"verdict": "release"}
    attacks: list[tuple[dict[str, str], dict[str, Any], int]] = [
        (good, {"origin": "http://evil.example"}, 403),
        (good, {"origin": "null"}, 403),
        (good, {"origin": None}, 403),
        (good, {"origin": f"https://{browser.host}"}, 403),
        (good, {"origin": f"http://localhost:{browser.url.port}"}, 403),
        (good, {"sec_fetch_site": "same-site"}, 403),
        (good, {"content_type": "text/plain"}, 415),
        (good, {"content_type": None}, 415),
        (good | {"form": ""}, {}, 403),
        (good | {"form": good["form"][:-1]}, {}, 403),
        ({name: value for name, value in good.items() if name != "form"}, {}, 403),
        (good, {"cookie": ""}, 403),
    ]
    for fields, changes, status in attacks:
        assert browser.post(path, fields, **changes).status == status, (fields, changes)
    assert browser.get(f"{path}?{urlencode(good)}").status == 200  # a link decides nothing
    assert said(ward) == []
    assert browser.post(path, good).status == 303  # the control: the same with nothing changed
    assert len(said(ward)) == 1


@pytest.mark.parametrize(
    "path",
    [
        "../../../../etc/passwd",
        "..%2f..%2f..%2fetc/passwd",
        "review.css/../../cli.py",
        "intake_page.py",
        "object/../journal.sqlite",
        "object/{id}/../../journal.sqlite",
        "object/{id}/0/before.png/../../../site.key",
        "object/{id}/0/../../{id}.sealed",
        "object/{id}%00",
        "object/{id}\\..\\x",
        "object/{short}",
        "object/{upper}",
        "object/" + "f" * 32,
        "object/" + "0" * 4000,
        "object/{id}'--",
        "object/{id}/99/before.png",
        "object/{id}/-1/before.png",
        "object/{id}/0/record.png",
        "object/{id}/1e1/before.png",
        "object/{id}/",
    ],
)
def test_nothing_else_is_there(browser: Browser, ward: Any, path: str):
    entry = ward.entry(CAPTURE)
    asked = path.format(id=entry.id, short=entry.short, upper=entry.id.upper())
    before = content(ward.place)
    refused = browser.get(asked)
    assert refused.status == 404, asked
    assert len(refused.content) < 100
    assert browser.post(asked, browser.form(f"object/{entry.id}")).status == 404
    assert content(ward.place) == before


def test_a_form_that_is_too_large_is_not_read(browser: Browser, ward: Any):
    path = f"object/{ward.entry(CAPTURE).id}"
    good = browser.form(path) | {"verdict": "release"}
    small = urlencode(good).encode()
    sizes = {str(MOST_BYTES + 1): 413, "9" * 30: 413, "-1": 411, "1e3": 411, "\u0663": 411, "": 411}
    for length, status in sizes.items():
        sent = length.encode().decode("latin-1")
        assert browser.post(path, {}, body=b"", content_length=sent).status == status, length
    chunked = browser.post(path, {}, body=small, transfer_encoding="chunked")
    assert chunked.status == 411
    assert said(ward) == []
    padded = small + b"&because=" + b"x" * (MOST_BYTES - len(small) - 9)
    assert len(padded) == MOST_BYTES
    assert browser.post(path, {}, body=padded).status == 400  # read, and too long a reason
    assert said(ward) == []


def test_another_method_does_nothing(browser: Browser, ward: Any):
    for method in ("HEAD", "PUT", "DELETE", "OPTIONS", "TRACE"):
        answer = browser.get("", method=method)
        assert answer.status == 501, method
        assert ward.entry(CAPTURE).short not in answer.text


def test_every_answer_forbids_keeping_framing_and_loading_from_elsewhere(
    browser: Browser, ward: Any
):
    path = f"object/{ward.entry(CAPTURE).id}"
    for answer in (
        *map(browser.get, ("", path, f"{path}/0/before.png", "review.js", "nothing")),
        browser.get("", cookie=""),
        browser.get("", method="PUT"),
    ):
        headers = answer.headers
        assert headers["cache-control"].startswith("no-store")
        assert "default-src 'none'" in headers["content-security-policy"]
        assert "unsafe" not in headers["content-security-policy"]
        assert "http" not in headers["content-security-policy"]
        assert headers["x-content-type-options"] == "nosniff"
        assert "python" not in headers["server"].lower()
    for page in (browser.get().text, browser.get(path).text):
        assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)|\sstyle=|\son\w+=", page)
        assert not re.search(r"<script(?! src=)", page)


def test_a_fault_is_told_by_its_kind_alone(
    browser: Browser, ward: Any, capfd: pytest.CaptureFixture[str]
):
    entry = ward.entry(CAPTURE)
    sealed = ward.place / "north.cohort.intake" / "review" / f"{entry.id}.sealed"
    damaged = bytearray(sealed.read_bytes())
    damaged[100] ^= 1
    sealed.write_bytes(damaged)
    broken = browser.get(f"object/{entry.id}/0/before.png")
    assert broken.status == 500
    assert b"cannot be opened" in broken.content
    assert CAPTURE not in broken.text
    with socket.create_connection((str(browser.url.hostname), browser.url.port), 60) as line:
        line.sendall(b"\x16\x03\x01 no http at all\r\n\r\n")
        line.makefile("rb").read()
    journal = ward.place / "north.cohort.intake" / "journal.sqlite"
    with closing(sqlite3.connect(journal)) as database:
        database.execute('ALTER TABLE item RENAME TO "DOE^JOHN"')
    lost = browser.get()
    assert lost.status == 500
    assert lost.text == "something went wrong here (OperationalError)\n"
    journal.write_bytes(b"DOE^JOHN" * 999)
    assert "the journal cannot be opened (file is not a database)" in browser.get().text
    said_aloud = capfd.readouterr()
    assert "Traceback" not in said_aloud.err + said_aloud.out
    assert entry.short not in said_aloud.err + said_aloud.out


def test_a_browser_that_goes_away_in_the_middle_of_a_picture_is_no_fault(
    browser: Browser, ward: Any, capfd: pytest.CaptureFixture[str]
):
    for _ in range(8):
        line = socket.create_connection((str(browser.url.hostname), browser.url.port), 60)
        line.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        picture = f"{browser.base}object/{ward.entry(ULTRASOUND).id}/0/before.png"
        request = (
            f"GET {picture} HTTP/1.0\r\nHost: {browser.host}\r\nCookie: {browser.cookie}\r\n\r\n"
        )
        line.sendall(request.encode())
        line.close()
    assert browser.get().status == 200
    said_aloud = capfd.readouterr()
    assert "Traceback" not in said_aloud.err + said_aloud.out


# --- What is shown --------------------------------------------------------------------------------


def test_the_pictures_are_those_of_the_sealed_store_and_nothing_is_written(
    browser: Browser, ward: Any
):
    before = content(ward.place)
    entry, kept = ward.entry(ULTRASOUND), ward.entry(FILM)
    with ward.desk() as desk:
        shown, of_kept = desk.shots(entry)[0], desk.shots(kept)[0]
    page = browser.get(f"object/{entry.id}").text
    assert browser.get(f"object/{entry.id}/0/before.png").content == shown.before
    assert browser.get(f"object/{entry.id}/0/after.png").status == 404  # nothing of it is kept
    assert browser.get(f"object/{kept.id}/0/after.png").content == of_kept.after
    assert of_kept.after != of_kept.before
    assert f'viewBox="0 0 {shown.columns} {shown.rows}"' in page
    for found in shown.boxes:
        width, height = found.right - found.left, found.bottom - found.top
        drawn = f'x="{found.left}" y="{found.top}" width="{width}" height="{height}"'
        assert page.count(drawn) == 3  # a line with a halo before, black after
    for queue in Queue:
        assert browser.get(f"?queue={queue}").status == 200
    assert content(ward.place) == before
    pictures = [shown.before, of_kept.before, of_kept.after]
    assert not any(picture[:64] in data for picture in pictures for data in before.values())


def test_lists_go_page_by_page_and_odd_pages_are_the_last(
    browser: Browser, monkeypatch: pytest.MonkeyPatch, ward: Any
):
    monkeypatch.setattr("deploy.intake_page.ROWS", 1)
    seen = set()
    for start in ("0", "1", "7", "-1", "x", "9" * 20):
        page = browser.get(f"?from={start}").text
        shown = re.findall(r'class="id" href="[^"]*/object/(\w+)', page)
        assert len(shown) == 1, start
        seen.update(shown)
    assert seen == {ward.entry(ULTRASOUND).id, ward.entry(CAPTURE).id}


def test_what_came_with_a_file_is_no_markup(
    serve: Any, ward: Any, tmp_path: Path, make_ward: Callable[..., Any]
):
    source, place = tmp_path / "odd", tmp_path / "at"
    source.mkdir()
    place.mkdir()
    name = "<script>alert(1)<&'\"DOE^JOHN.dcm"
    (source / name).write_bytes((ward.source / CAPTURE).read_bytes())
    odd = make_ward(source, place)
    browser = serve(odd, name="<b>Ada</b>")
    browser.open()
    entry = odd.entry(".dcm")
    for path in ("", f"object/{entry.id}"):
        page = browser.get(path).text
        assert "<script>alert" not in page
        assert "&lt;script&gt;alert(1)&lt;&amp;&#39;&#34;DOE^JOHN.dcm" in page
        assert "<b>Ada" not in page


def test_who_decides_is_asked_first(serve: Any, ward: Any):
    browser = serve(ward, name="login", named=False)
    browser.open()
    entry = ward.entry(CAPTURE)
    for path in ("", f"object/{entry.id}", f"object/{entry.id}/0/before.png"):
        page = browser.get(path)
        assert "Who decides?" in page.text
        assert entry.short not in page.text
    form = browser.form("")
    for name in ("", "   ", "A" * 121, "A\x1bB"):
        assert browser.post("who", form | {"name": name}).status == 400
    assert browser.post("who", form | {"name": " Ada Lovelace "}).status == 303
    assert entry.short in browser.get().text
    fields = browser.form(f"object/{entry.id}") | {"verdict": "release"}
    browser.post(f"object/{entry.id}", fields)
    assert [decision.by for decision in said(ward)] == ["Ada Lovelace"]


def test_it_can_open_at_one_object(serve: Any, ward: Any):
    entry = ward.entry(FILM)
    browser = serve(ward, first=entry.id)
    assert f"url={browser.base}object/{entry.id}" in browser.open().text
    assert "Blanked and kept" in browser.get(f"object/{entry.id}").text


# --- What is decided ------------------------------------------------------------------------------


def test_a_decision_is_recorded_and_the_next_object_follows(browser: Browser, ward: Any):
    with ward.desk() as desk:
        first, second = (desk.entry(number) for number in queued(desk, Queue.WAITS))
    fields = browser.form(f"object/{first.id}")
    drawn = {"verdict": "release", "blank": "1,2,30,40\r\n\r\n 5,6,7,8 ", "found": "yes"}
    gone = browser.post(f"object/{first.id}?queue=waits", fields | drawn | {"because": "a\r\nb"})
    assert gone.status == 303
    assert gone.headers["location"] == (
        f"{browser.base}object/{second.id}?queue=waits&done={first.id}"
    )
    (recorded,) = said(ward)
    assert recorded == Decision(
        "release", (Box(1, 2, 30, 40), Box(5, 6, 7, 8)), True, "Ada", recorded.at, "a\nb"
    )
    follow = browser.get(gone.headers["location"])
    assert f"{first.short}: released, 2 drawn boxes blanked" in follow.text

    fields = browser.form(f"object/{second.id}") | {"verdict": "reject", "because": "not ours"}
    last = browser.post(f"object/{second.id}?queue=waits", fields)
    assert last.headers["location"] == f"{browser.base}?queue=waits&done={second.id}"
    assert "Nothing waits for a person" in browser.get(last.headers["location"]).text
    assert [decision.verdict for decision in said(ward)] == ["release", "reject"]


def test_a_decision_can_be_changed_until_a_run_acts_on_it(browser: Browser, ward: Any):
    entry = ward.entry(CAPTURE)
    path = f"object/{entry.id}"
    browser.post(path, browser.form(path) | {"verdict": "release", "blank": "0,0,9,9"})
    page = browser.get(f"{path}?queue=decided").text
    assert ">0,0,9,9</textarea>" in page
    assert "checked" not in re.findall(r"<input type=\"checkbox\"[^>]*>", page)[0]
    browser.post(path, browser.form(path) | {"verdict": "reject", "because": "no"})
    ward.take_in()
    assert ward.entry(CAPTURE).state is State.REJECTED


def test_what_was_kept_can_be_decided_otherwise(browser: Browser, ward: Any):
    entry = ward.entry(FILM)
    path = f"object/{entry.id}?queue=blanked"
    assert browser.post(path, browser.form(path) | {"verdict": "release"}).status == 303
    ward.take_in()
    after = ward.entry(FILM)
    assert (after.state, after.boxes) == (State.KEPT, 0)  # its text was left as it is
    assert entry.boxes > 0


def test_what_makes_no_sense_is_told_and_what_was_typed_stays(browser: Browser, ward: Any):
    entry = ward.entry(ULTRASOUND)
    path = f"object/{entry.id}"
    good = browser.form(path) | {"verdict": "release", "found": "yes"}
    attempts = [
        (good | {"verdict": "reject"}, "needs a reason"),
        (good | {"verdict": "keep"}, "release or reject"),
        (good | {"blank": "0,0,1"}, "no rectangle"),
        (good | {"blank": "0,0,769,1"}, "768 rows and 1024 columns"),
        (good | {"blank": "\n".join(f"0,0,1,{n}" for n in range(1, 502))}, "at most 500"),
        (good | {"because": "x" * 2001}, "at most 2000"),
        (good | {"seen": "0" * 32}, "look at it again"),
    ]
    for fields, told in attempts:
        answer = browser.post(path, fields)
        assert answer.status == 400, fields
        assert told in answer.text
    assert said(ward) == []
    assert "<i>kept</i>" not in browser.post(path, good | {"blank": "<i>kept</i>"}).text
    assert "&lt;i&gt;kept" in browser.post(path, good | {"blank": "<i>kept</i>"}).text


def test_what_was_read_again_has_to_be_looked_at_again(browser: Browser, ward: Any):
    entry = ward.entry(ULTRASOUND)
    path = f"object/{entry.id}"
    fields = browser.form(path) | {"verdict": "release", "found": "yes"}
    with ward.desk() as desk:
        case = Case.of(desk, entry)
        decide(desk, case, Decision("release", by="Grace"))
    ward.take_in()
    late = browser.post(path, fields)
    assert late.status == 400
    assert "read again meanwhile" in late.text
    with ward.desk() as desk, pytest.raises(ConfigError, match="read again meanwhile"):
        decide(desk, case, Decision("reject", by="Ada", why="late"))
    assert [decision.by for decision in said(ward)] == ["Grace"]


def test_two_people_at_once_leave_both_their_words(serve: Any, ward: Any):
    browsers = [serve(ward, name=name) for name in ("Ada", "Grace")]
    for browser in browsers:
        browser.open()
    path = f"object/{ward.entry(CAPTURE).id}"
    forms = [browser.form(path) | {"verdict": "release"} for browser in browsers]
    threads = [
        threading.Thread(target=browser.post, args=(path, form))
        for browser, form in zip(browsers, forms, strict=True)
        for _ in range(5)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    names = [decision.by for decision in said(ward)]
    assert sorted(names) == ["Ada"] * 5 + ["Grace"] * 5


# --- Its end --------------------------------------------------------------------------------------


def test_it_ends_when_nobody_asks_and_strangers_do_not_keep_it(serve: Any, ward: Any):
    now = [0.0]
    browser = serve(ward, idle=100.0, clock=Clock(now=lambda: now[0]))
    browser.open()
    for moment in (60.0, 120.0, 180.0):
        now[0] = moment
        assert browser.get().status == 200
    now[0] = 250.0
    assert browser.get(cookie="").status == 403
    now[0] = 281.0
    browser.thread.join(60)
    assert not browser.thread.is_alive()


def test_a_port_that_is_taken_is_named(serve: Any, ward: Any):
    browser = serve(ward)
    with pytest.raises(ConfigError, match=rf"port {browser.url.port} .*--port 0"):
        Page(ward.desk, port=browser.url.port or 0)


# --- What is read of a person ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        *("", "1,2,3", "1,2,3,4,5", "1;2;3;4", "a,b,c,d", "-1,0,4,4", "4,0,4,4", "5,0,4,4"),
        *("0,4,4,4", "1.0,0,2,2", "0,0,1e3,4", "0x0,0,4,4", "0,0,\u0663,\u0663"),
    ],
)
def test_what_is_no_rectangle_is_refused(text: str):
    with pytest.raises(ConfigError, match="TOP,LEFT,BOTTOM,RIGHT"):
        parsed_box(text)


def test_a_rectangle_is_read_as_it_is_written():
    assert parsed_box(" 1, 2 ,30,40 ") == Box(1, 2, 30, 40)


def test_pictures_that_do_not_show_all_say_so(ward: Any):
    with ward.desk() as desk:
        case = Case.of(desk, ward.entry(CAPTURE))
    assert case.caution == ""
    first, second = case.shots
    assert "Not every frame" in replace(case, shots=(first, replace(second, frame=5))).caution
    assert "no picture" in replace(case, shots=()).caution
