"""Enrolment as two people do it: commands at both ends, files between them, and a telephone."""

from __future__ import annotations

import io
import os
import re
import shlex
import shutil
import socket
import ssl
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from client.credentials import Credentials
from common import certificates
from common.certificates import fingerprint
from common.clock import Clock
from common.enrolment import Bundle, Request
from common.errors import IdentityError
from deploy.cli import app
from server.authority import Authority, NewFederation, Signed
from server.roster import Roster
from server.tls import ServerTls

Cloister = Callable[..., Any]
DOCS = Path(__file__).parents[2] / "docs"
WORDS = "five words drawn by lot"


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A federation that was begun by the command, to be copied."""
    folder = tmp_path_factory.mktemp("begun")
    secret = folder / "passphrase"
    secret.touch(mode=0o600)
    secret.write_text(f"{WORDS}\n")
    words = ["coordinator", "init", folder / "federation", "--name", "chest", "--host", "localhost"]
    done = CliRunner().invoke(app, [*map(str, words), "--passphrase-file", str(secret)])
    assert done.exit_code == 0, done.output
    return folder


class Desk:
    """The operator's and the hospital's screens, and the mail between them."""

    def __init__(self, cloister: Cloister, folder: Path) -> None:
        self.cloister, self.folder = cloister, folder
        self.federation, self.north = folder / "federation", folder / "north"

    def coordinator(self, command: str, *words: object) -> Any:
        place = ("--home", self.federation, "--passphrase-file", self.folder / "passphrase")
        return self.cloister("coordinator", command, *words, *place, "--by", "Ada")

    def request(self, home: Path | None = None, *words: object) -> str:
        """Ask, and read the fingerprint from the screen."""
        said = self.cloister("node", "request", home or self.north, *words)
        assert said.code == 0, said
        return spoken(said.out)

    def enrol(self, digits: str, *words: object, site: str = "north") -> Any:
        asked = (f"{site}.request.pem", "--site", site, "--declared-size-limit", 500)
        return self.coordinator("enrol", *asked, "--fingerprint", digits, *words)

    def join(self, digits: str = "", *, site: str = "north", home: Path | None = None) -> Any:
        words = ("--fingerprint", digits) if digits else ()
        return self.cloister(
            "node", "join", f"{site}.bundle.json", "--home", home or self.north, *words
        )

    def joined(self) -> Credentials:
        """The whole main path."""
        said = self.enrol(self.request())
        assert said.code == 0, said
        said = self.join(spoken(said.out))
        assert said.code == 0, said
        Path("north.bundle.json").unlink()
        return Credentials.open(self.north)

    def mailed(self) -> set[str]:
        return {path.name for path in self.folder.iterdir() if path.is_file()} - {"passphrase"}


def spoken(screen: str) -> str:
    """The one fingerprint on a screen."""
    found = re.findall(r"^ {4}((?:\d{5} ){7}\d{5})$", screen, re.MULTILINE)
    assert len(set(found)) == 1, screen
    return str(found[0])


@pytest.fixture
def desk(cloister: Cloister, begun: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Desk:
    shutil.copytree(begun, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    made = new_node(cloister, tmp_path / "north", "north")
    assert made.code == 0, made
    return Desk(cloister, tmp_path)


def new_node(cloister: Cloister, home: Path, site: str) -> Any:
    sizes = ("--declared-size", 400, "--epsilon", 8, "--delta", 1e-5, "--by", "Grace")
    return cloister("node", "init", home, "--site", site, *sizes)


@contextmanager
def serving(context: ssl.SSLContext, roster: Roster) -> Iterator[int]:
    """A coordinator in small: TLS, and a word by what the roster says of the caller's key."""
    listener = socket.create_server(("127.0.0.1", 0))

    def answer(plain: socket.socket) -> None:
        with plain:
            try:
                with context.wrap_socket(plain, server_side=True) as secure:
                    while secure.recv(1):
                        key = certificates.key_of_certificate(secure.getpeercert(True) or b"")
                        try:
                            secure.sendall(f"{roster.site_of(key).name}\n".encode())
                        except IdentityError:
                            secure.sendall(b"refused\n")
            except OSError:
                return

    def serve() -> None:
        while True:
            try:
                plain, _ = listener.accept()
            except OSError:
                return
            plain.settimeout(60)
            threading.Thread(target=answer, args=(plain,)).start()

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield int(listener.getsockname()[1])
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join(60)


class Line:
    """A node's connection, open until it is closed."""

    def __init__(self, own: Credentials, port: int) -> None:
        plain = socket.create_connection(("127.0.0.1", port), timeout=60)
        self._secure = own.ssl_context().wrap_socket(plain, server_hostname="localhost")

    def ask(self) -> str:
        self._secure.sendall(b"?")
        return self._secure.recv(64).decode().strip()

    @property
    def serial(self) -> object:
        return (self._secure.getpeercert() or {}).get("serialNumber")

    def close(self) -> None:
        self._secure.close()


def greeted(own: Credentials, port: int) -> str:
    line = Line(own, port)
    try:
        return line.ask()
    finally:
        line.close()


# --- The main path ------------------------------------------------------------------------------


def test_from_two_empty_folders_to_two_machines_that_know_each_other(desk: Desk):
    own = desk.joined()
    assert (own.site, own.address) == ("north", "https://localhost:9092")
    with serving(ServerTls(desk.federation).context, Roster(desk.federation)) as port:
        assert greeted(own, port) == "north"


def test_nothing_secret_is_in_the_mail(desk: Desk):
    said = desk.enrol(desk.request())
    assert desk.mailed() == {"north.request.pem", "north.bundle.json"}
    for name in desk.mailed():
        content = Path(name).read_bytes()
        assert b"PRIVATE" not in content
        assert b"CERTIFICATE" in content
    assert WORDS not in said.words
    for path in [*desk.federation.rglob("*"), *(desk.north / "identity").rglob("*")]:
        if b"PRIVATE" in path.read_bytes():
            assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_the_roster_is_shown_with_what_a_person_needs(desk: Desk):
    desk.joined()
    said = desk.cloister("coordinator", "roster", "--home", desk.federation, "--history")
    assert said.code == 0
    for word in ("north", "500", "until", "enrolled", "Ada", "the federation began", "Roster 2"):
        assert word in said.words, word


# --- The telephone ------------------------------------------------------------------------------


def test_a_site_is_known_before_the_service_has_run(desk: Desk):
    desk.joined()
    said = desk.cloister("coordinator", "status", "--home", desk.federation)
    assert said.code == 1
    assert "The service does not run." in said.words
    assert re.search(r"north +│ it has never connected", said.out)


def answered(*words: object, typed: str) -> Any:
    return CliRunner().invoke(app, [*map(str, words)], input=typed)


def enrolment(desk: Desk) -> list[object]:
    asked = ["coordinator", "enrol", "north.request.pem", "--site", "north"]
    place = ["--home", desk.federation, "--passphrase-file", desk.folder / "passphrase"]
    return [*asked, "--declared-size-limit", 500, *place]


def test_the_operator_is_shown_the_fingerprint_and_asked(desk: Desk):
    digits = desk.request()
    done = answered(*enrolment(desk), typed="n\n")
    assert isinstance(done.exception, IdentityError)
    assert digits in done.output
    assert Roster(desk.federation).sites() == ()
    assert desk.mailed() == {"north.request.pem"}
    assert answered(*enrolment(desk), typed="y\n").exit_code == 0
    assert [site.name for site in Roster(desk.federation).sites()] == ["north"]


def test_to_press_return_is_no_yes(desk: Desk):
    desk.request()
    assert isinstance(answered(*enrolment(desk), typed="\n").exception, IdentityError)
    assert Roster(desk.federation).sites() == ()


def test_a_request_that_was_put_in_place_of_the_sites_is_found_on_the_phone(desk: Desk):
    digits = desk.request()
    stranger = Request.make(certificates.new_key(), "north")
    Path("north.request.pem").write_bytes(stranger.pem)
    said = desk.enrol(digits)
    assert said.code == 2
    assert fingerprint(stranger.key) in said.words
    assert "what came is not what was sent" in said.words
    assert Roster(desk.federation).sites() == ()
    assert not Path("north.bundle.json").exists()


def test_a_federation_that_was_put_in_place_of_the_true_one_is_found_on_the_phone(desk: Desk):
    said = desk.enrol(desk.request())
    truth = spoken(said.out)
    new = NewFederation("chest", ["localhost"], 9092)
    false = Authority.create(desk.folder / "false", new, WORDS, Signed("Eve"), Clock())
    asked = Request.read(Path("north.request.pem"))
    Path("north.bundle.json").write_bytes(false.enrol(asked, 500, 365, Signed("Eve")).content)
    said = desk.join(truth)
    assert said.code == 2
    assert fingerprint(false.authority_key) in said.words
    assert not (desk.north / "identity" / "bundle.json").exists()
    done = answered("node", "join", "north.bundle.json", "--home", desk.north, typed="n\n")
    assert isinstance(done.exception, IdentityError)
    assert not (desk.north / "identity" / "bundle.json").exists()


# --- The passphrase -----------------------------------------------------------------------------


def test_the_passphrase_is_asked_for_twice_and_never_shown(tmp_path: Path):
    words = ("coordinator", "init", tmp_path / "federation", "--host", "localhost")
    other = answered(*words, typed=f"{WORDS}\nanother altogether\n{WORDS}\n{WORDS}\n")
    assert other.exit_code == 0, other.output
    assert "do not match" in other.output
    assert WORDS not in other.output
    Authority.open(tmp_path / "federation", WORDS)


def test_where_nobody_can_be_asked_a_command_says_what_to_give_instead(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
):
    words = ["coordinator", "init", "new", "--host", "192.0.2.7"]
    done = subprocess.run(
        [sys.executable, "-c", "from deploy.cli import main; main()", *words],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        start_new_session=True,  # without a terminal
    )
    assert done.returncode == 2
    assert "without a terminal; give the passphrase with --passphrase-file" in done.stderr
    assert not Path("new").exists()
    desk.enrol(desk.request())
    monkeypatch.setattr("sys.stdin", io.StringIO())
    said = desk.join()
    assert said.code == 2
    assert "with --fingerprint" in said.words


def test_a_passphrase_comes_from_a_pipe_and_from_no_file_that_others_read(
    desk: Desk, tmp_path: Path
):
    digits = desk.request()
    (desk.folder / "passphrase").chmod(0o644)
    said = desk.enrol(digits)
    assert said.code == 2
    assert "chmod 600" in said.words
    reading, writing = os.pipe()
    os.write(writing, f"{WORDS}\n".encode())
    os.close(writing)
    words = enrolment(desk)[:-1]
    said = desk.cloister(*words, f"/dev/fd/{reading}", "--fingerprint", digits)
    os.close(reading)
    assert said.code == 0, said


def test_a_wrong_passphrase_changes_nothing(desk: Desk):
    digits = desk.request()
    (desk.folder / "passphrase").write_text("another one altogether\n")
    said = desk.enrol(digits)
    assert said.code == 2
    assert "another passphrase" in said.words
    assert Roster(desk.federation).sites() == ()
    assert not Path("north.bundle.json").exists()


# --- What is refused ----------------------------------------------------------------------------


def test_a_replayed_enrolment_is_refused_and_changes_nothing(desk: Desk):
    desk.joined()
    before = {path.name: path.read_bytes() for path in desk.federation.iterdir()}
    request = Request.read(Path("north.request.pem"))
    said = desk.enrol(fingerprint(request.key))
    assert said.code == 2
    assert "enrolled already" in said.words
    assert {path.name: path.read_bytes() for path in desk.federation.iterdir()} == before
    assert not Path("north.bundle.json").exists()


def test_the_name_on_the_command_has_to_be_the_one_that_the_node_asks_for(desk: Desk):
    digits = desk.request()
    Path("north.request.pem").rename("south.request.pem")
    said = desk.enrol(digits, site="south")
    assert said.code == 2
    assert "asks to be enrolled as north, and --site is south" in said.words


def test_a_bundle_is_not_written_over_another_file(desk: Desk):
    digits = desk.request()
    Path("north.bundle.json").write_text("kept")
    said = desk.enrol(digits)
    assert said.code == 2
    assert Path("north.bundle.json").read_text() == "kept"
    assert Roster(desk.federation).sites() == ()


def test_a_request_is_not_written_over_another_file(desk: Desk):
    Path("north.request.pem").write_text("my notes")
    said = desk.cloister("node", "request", desk.north)
    assert said.code == 2
    assert "no request" in said.words
    assert Path("north.request.pem").read_text() == "my notes"


def test_a_node_that_declares_more_than_its_bound_does_not_join(desk: Desk):
    said = desk.enrol(desk.request())
    policy = desk.north / "node.toml"
    policy.write_text(policy.read_text().replace("declared_size = 400", "declared_size = 4000"))
    said = desk.join(spoken(said.out))
    assert said.code == 2
    assert "declares 4000, and the federation takes at most 500" in said.words
    assert not (desk.north / "identity" / "bundle.json").exists()


def test_a_bundle_of_another_node_is_refused(desk: Desk):
    desk.joined()
    south = desk.folder / "south"
    assert new_node(desk.cloister, south, "south").code == 0
    assert desk.enrol(desk.request(south), site="south").code == 0
    said = desk.join(site="south")
    assert said.code == 2
    assert Credentials.open(desk.north).site == "north"


# --- Renewal and revocation, while it runs ------------------------------------------------------


def renewed(desk: Desk, *words: object) -> None:
    said = desk.cloister("node", "renew", desk.north, *words)
    assert said.code == 0, said
    said = desk.coordinator("renew", "north.request.pem")
    assert said.code == 0, said
    said = desk.join()
    assert said.code == 0, said
    Path("north.bundle.json").unlink()


@pytest.mark.parametrize("words", [(), ("--new-key",)])
def test_a_node_is_renewed_without_anything_being_stopped(desk: Desk, words: tuple[str, ...]):
    old = desk.joined()
    with serving(ServerTls(desk.federation).context, Roster(desk.federation)) as port:
        line = Line(old, port)
        assert line.ask() == "north"
        renewed(desk, *words)
        assert old.superseded()
        assert line.ask() == "north"
        assert greeted(Credentials.open(desk.north), port) == "north"
        line.close()
    kept = Credentials.open(desk.north).bundle.key == old.bundle.key
    assert kept is not bool(words)


def test_the_coordinator_is_renewed_without_anything_being_stopped(desk: Desk):
    own = desk.joined()
    tls = ServerTls(desk.federation)
    with serving(tls.context, Roster(desk.federation)) as port:
        before = Line(own, port)
        serial = before.serial
        assert before.ask() == "north"
        assert desk.coordinator("renew").code == 0
        assert tls.refresh()
        after = Line(own, port)
        assert after.ask() == before.ask() == "north"
        assert after.serial != serial
        before.close()
        after.close()


def test_a_revoked_site_is_refused_on_the_connection_that_it_has_open(desk: Desk):
    own = desk.joined()
    with serving(ServerTls(desk.federation).context, Roster(desk.federation)) as port:
        line = Line(own, port)
        assert line.ask() == "north"
        said = desk.coordinator("revoke", "north", "--reason", "stolen", "--yes")
        assert said.code == 0, said
        assert line.ask() == "refused"
        assert greeted(own, port) == "refused"
        line.close()
        # A renewal of what was stolen does not bring it back; a new key and two people do.
        assert desk.cloister("node", "renew", desk.north).code == 0
        said = desk.coordinator("renew", "north.request.pem")
        assert said.code == 2
        assert "is revoked since" in said.words
        assert desk.enrol(desk.request(None, "--afresh")).code == 0
        assert desk.join().code == 0
        assert greeted(Credentials.open(desk.north), port) == "north"
        assert greeted(own, port) == "refused"


def test_a_revocation_wants_a_reason_and_a_yes(desk: Desk):
    desk.joined()
    assert desk.coordinator("revoke", "north", "--reason", " ", "--yes").code == 2
    place = ("--home", desk.federation, "--passphrase-file", desk.folder / "passphrase")
    done = answered("coordinator", "revoke", "north", "--reason", "stolen", *place, typed="\n")
    assert done.exit_code == 1
    assert [site.name for site in Roster(desk.federation).sites()] == ["north"]


def test_the_bound_of_a_site_is_changed_by_its_renewal(desk: Desk):
    desk.joined()
    assert desk.cloister("node", "renew", desk.north).code == 0
    said = desk.coordinator("renew", "north.request.pem", "--declared-size-limit", 700)
    assert said.code == 0, said
    assert Roster(desk.federation).sites()[0].greatest_declared_size == 700
    assert Bundle.read(Path("north.bundle.json")).offer.greatest_declared_size == 700
    said = desk.coordinator("renew", "--declared-size-limit", 700)
    assert said.code == 2


def test_a_roster_that_was_put_back_in_time_is_told_and_gone_on_from(desk: Desk):
    desk.joined()
    before = (desk.federation / "roster.json").read_bytes()
    assert desk.coordinator("revoke", "north", "--reason", "stolen", "--yes").code == 0
    (desk.federation / "roster.json").write_bytes(before)
    said = desk.cloister("coordinator", "roster", "--home", desk.federation)
    assert said.code == 2
    assert "older" in said.words
    said = desk.coordinator("roster", "--go-on", "--reason", "the copy was lost")
    assert said.code == 0, said
    assert "north" in said.words


PHONED = ("enrol", "join", "revoke")
"""Commands that ask a person before they do anything."""


# --- The page -----------------------------------------------------------------------------------


def test_every_command_of_the_page_does_what_the_page_says(
    cloister: Cloister, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    assert new_node(cloister, tmp_path / "north", "north").code == 0
    secret = tmp_path / "passphrase"
    secret.touch(mode=0o600)
    secret.write_text(WORDS)
    text = (DOCS / "enrolment.md").read_text()
    heard, seen = "", set()
    for command in re.findall(r"^\$ cloister (.*)$", text, re.MULTILINE):
        words = [word.replace("FINGERPRINT", heard) for word in shlex.split(command)]
        if words[0] == "coordinator" and words[1] != "roster":
            words += ["--passphrase-file", str(secret)]
        done = answered(*words, typed="y\n" if words[1] in PHONED else "")
        assert done.exit_code == 0, (command, done.output)
        shown = re.findall(r"^ {4}((?:\d{5} ){7}\d{5})$", done.output, re.MULTILINE)
        heard = shown[-1] if shown else heard
        seen.add(" ".join(words[:2]))
    assert seen >= {
        f"coordinator {name}" for name in ["init", "enrol", "renew", "revoke", "roster"]
    }
    assert seen >= {"node request", "node join", "node renew"}
