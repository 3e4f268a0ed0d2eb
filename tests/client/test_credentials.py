"""A node's identity: what lies on its disk, what it asks for, and which bundles it believes."""

from __future__ import annotations

import shutil
import signal
import stat
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from client import credentials
from client.credentials import Credentials
from common import certificates
from common.clock import Clock
from common.enrolment import Bundle, Request
from common.errors import CloisterError, ConfigError, IdentityError
from common.files import locked
from server.authority import Authority, NewFederation, Signed

WORDS = "five words drawn by lot"
ADA = Signed("Ada", "as agreed")
START = datetime(2030, 1, 1, tzinfo=UTC)
DAY = timedelta(days=1)


def clock(when: datetime) -> Clock:
    return Clock(date=lambda: when)


@dataclass
class Site:
    """A node's folder and the authority that it asks, with a mailbox between them."""

    home: Path
    authority: Authority
    mail: Path
    now: datetime = START

    def sign(self, request: Request, *, how: str = "enrol") -> Bundle:
        authority = replace(self.authority, clock=clock(self.now))
        if how == "enrol":
            return authority.enrol(request, 500, 365, ADA)
        return authority.renew(request, 365, ADA)

    def take(self, bundle: Bundle) -> None:
        self.mail.write_bytes(bundle.content)
        credentials.offered(self.home, self.mail, self.now).accept()

    def join(self) -> None:
        self.take(self.sign(credentials.request(self.home, "north")))

    def open(self) -> Credentials:
        return Credentials.open(self.home, clock(self.now))

    def files(self) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in (self.home / "identity").iterdir()}


@pytest.fixture(scope="module")
def templates(tmp_path_factory: pytest.TempPathFactory) -> list[Authority]:
    folder = tmp_path_factory.mktemp("authorities")
    new = NewFederation("chest", ["coordinator.example.org"], 9092)
    return [
        Authority.create(folder / name, new, WORDS, ADA, clock(START)) for name in ("one", "two")
    ]


@pytest.fixture
def make_site(templates: list[Authority], tmp_path: Path) -> Callable[..., Site]:
    def make(name: str = "north", *, federation: int = 0) -> Site:
        template = templates[federation]
        folder = tmp_path / template.folder.name
        if not folder.exists():
            shutil.copytree(template.folder, folder)
        (tmp_path / name).mkdir()
        return Site(tmp_path / name, replace(template, folder=folder), tmp_path / f"{name}.mail")

    return make


@pytest.fixture
def north(make_site: Callable[..., Site]) -> Site:
    return make_site()


@pytest.fixture
def joined(north: Site) -> Site:
    north.join()
    return north


# --- Asking and joining -------------------------------------------------------------------------


def test_the_key_is_made_at_the_node_and_nothing_that_leaves_holds_it(north: Site):
    asked = credentials.request(north.home, "north")
    (path,) = (north.home / "identity").glob("*.key")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    key = certificates.private_key(path.read_bytes(), path)
    assert certificates.key_bytes(key) == asked.key
    secret = key.private_numbers().private_value.to_bytes(48, "big")
    bundle = north.sign(asked)
    for left in (asked.pem, bundle.content):
        assert secret not in left
        assert b"PRIVATE" not in left
    assert "PRIVATE" not in repr(Credentials(north.home, bundle, key))


def test_a_node_that_has_joined_knows_all_that_its_process_needs(joined: Site):
    own = joined.open()
    assert own.site == "north"
    assert own.address == "https://coordinator.example.org:9092"
    assert own.greatest_declared_size == 500
    assert own.days_left(START) == 365
    assert own.days_left(START + 400 * DAY) == -35
    assert own.public_key.public_numbers() == own.private_key.public_key().public_numbers()
    assert certificates.key_bytes(own.private_key) == own.bundle.key
    assert own.ssl_context() is not own.ssl_context()
    assert not own.superseded()
    assert set(joined.files()) == {"bundle.json", *(f for f in joined.files() if "key" in f)}


def test_the_pinned_authority_is_known_as_long_as_the_bundle_lies_there(
    north: Site,
):
    """Also when the node's own certificate has ended: a model outlives a membership."""
    with pytest.raises(ConfigError, match="has joined no federation"):
        credentials.pinned_authority(north.home)
    north.join()
    assert credentials.pinned_authority(north.home) == north.authority.certificate
    with pytest.raises(IdentityError):
        Credentials.open(north.home, clock(START + 4000 * DAY))
    assert credentials.pinned_authority(north.home) == north.authority.certificate
    bundle = north.home / "identity" / "bundle.json"
    bundle.write_bytes(bundle.read_bytes().replace(b"north", b"south"))
    with pytest.raises(IdentityError):
        credentials.pinned_authority(north.home)


def test_a_request_that_is_asked_again_is_the_same(north: Site):
    first = credentials.request(north.home, "north")
    assert credentials.request(north.home, "north") == first
    with pytest.raises(ConfigError, match=r"enrolled as north, and the policy's site is south"):
        credentials.request(north.home, "south")
    assert credentials.request_afresh(north.home, "south").key != first.key
    assert len(list((north.home / "identity").glob("*.key"))) == 1


def test_a_node_that_has_not_joined_has_no_identity(north: Site):
    with pytest.raises(ConfigError, match=r"has joined no federation; `cloister node request`"):
        north.open()
    with pytest.raises(ConfigError, match="see `cloister node request`"):
        credentials.renew(north.home, new_key=False)
    credentials.request(north.home, "north")
    with pytest.raises(ConfigError, match="has joined no federation"):
        north.open()


def test_a_node_that_has_joined_asks_by_renewal(joined: Site):
    with pytest.raises(ConfigError, match="`cloister node renew` goes on"):
        credentials.request(joined.home, "north")


def test_the_first_bundle_has_to_be_confirmed_and_a_later_one_is_known(north: Site):
    bundle = north.sign(credentials.request(north.home, "north"))
    north.mail.write_bytes(bundle.content)
    first = credentials.offered(north.home, north.mail, START)
    assert not first.known
    assert "bundle.json" not in north.files()  # looking at it has changed nothing
    first.accept()
    renewed = north.sign(credentials.renew(north.home, new_key=False), how="renew")
    north.mail.write_bytes(renewed.content)
    assert credentials.offered(north.home, north.mail, START).known


# --- Bundles that are not believed --------------------------------------------------------------


def unbelieved(site: Site, bundle: Bundle, words: str) -> None:
    before = site.files()
    with pytest.raises(IdentityError, match=words):
        site.take(bundle)
    assert site.files() == before


def test_a_bundle_of_another_node_is_refused(north: Site, make_site: Callable[..., Site]):
    south = make_site("south")
    theirs = south.sign(credentials.request(south.home, "south"))
    credentials.request(north.home, "north")
    unbelieved(north, theirs, "for another node, or for an older request")
    north.join()
    unbelieved(north, theirs, "for another node")


def test_a_bundle_of_another_federation_is_refused_once_one_is_pinned(
    joined: Site, make_site: Callable[..., Site]
):
    other = make_site("elsewhere", federation=1)
    key = joined.open().private_key
    theirs = other.authority.enrol(Request.make(key, "north"), 500, 365, ADA)
    assert theirs.federation == joined.open().bundle.federation  # of the same name
    unbelieved(joined, theirs, "of another federation.*whose authority is pinned")


def test_a_bundle_under_another_name_is_refused(north: Site):
    asked = credentials.request(north.home, "north")
    key = certificates.private_key(
        next((north.home / "identity").glob("*.key")).read_bytes(), north.home
    )
    assert certificates.key_bytes(key) == asked.key
    other = north.sign(Request.make(key, "south"))
    unbelieved(north, other, "for the site south, and this node has asked to be enrolled as north")


def test_a_node_that_has_joined_is_not_given_another_name(
    joined: Site, templates: list[Authority], tmp_path: Path
):
    shutil.copytree(templates[0].folder, tmp_path / "twin")  # the same authority, knowing nobody
    twin = replace(templates[0], folder=tmp_path / "twin")
    key = joined.open().private_key
    renamed = twin.enrol(Request.make(key, "south"), 500, 365, ADA)
    unbelieved(joined, renamed, "for the site south, and this node is north")


def test_a_bundle_for_a_key_that_is_damaged_here_is_not_put_in_force(north: Site):
    bundle = north.sign(credentials.request(north.home, "north"))
    (path,) = (north.home / "identity").glob("*.key")
    path.write_bytes(certificates.key_pem(certificates.new_key()))
    with pytest.raises(ConfigError, match="another key than its name says"):
        north.take(bundle)
    assert "bundle.json" not in north.files()


def test_an_older_bundle_is_not_taken_back(joined: Site):
    older = joined.open().bundle
    joined.now += 30 * DAY
    joined.take(joined.sign(credentials.renew(joined.home, new_key=False), how="renew"))
    unbelieved(joined, older, "older than the one in force")


def test_a_bundle_that_has_ended_or_not_begun_is_refused_and_the_clock_is_named(north: Site):
    bundle = north.sign(credentials.request(north.home, "north"))
    for when, words in (
        (START - 2 * DAY, r"begins at .* clock says 2029-12-30 .*set the clock right"),
        (START + 366 * DAY, r"ended at 2031-01-01"),
        (START + 4000 * DAY, r"the authority's certificate ended"),
    ):
        north.now = when
        unbelieved(north, bundle, words)


def test_a_bundle_whose_certificate_is_the_coordinators_is_refused(north: Site):
    """Signed by the authority, for this key, and made for another use."""
    credentials.request(north.home, "north")
    tls = certificates.certificate((north.authority.folder / "tls.pem").read_bytes(), "")
    good = north.sign(credentials.request(north.home, "north"))
    changes = {"certificate": certificates.certificate_pem(tls).decode(), "site": "north"}
    with pytest.raises(IdentityError, match="not that of the site"):
        Bundle.make(good.offer.model_copy(update=changes), north.authority.key)
    changes["site"] = "coordinator.example.org"
    forged = Bundle.make(good.offer.model_copy(update=changes), north.authority.key)
    unbelieved(north, forged, "not made for a node")


def test_what_is_no_bundle_changes_nothing(joined: Site):
    before = joined.files()
    for content in (b"", b"{}", b"\0" * 100_000, joined.open().bundle.content[:-10]):
        joined.mail.write_bytes(content)
        with pytest.raises(CloisterError):
            credentials.offered(joined.home, joined.mail, START)
    assert joined.files() == before


# --- Renewal ------------------------------------------------------------------------------------


@pytest.mark.parametrize("new_key", [False, True])
def test_a_renewal_comes_into_force_at_once_and_a_node_that_runs_notices(
    joined: Site, new_key: bool
):
    running = joined.open()
    asked = credentials.renew(joined.home, new_key=new_key)
    assert asked.vouched_by == running.bundle.key
    assert (asked.key != running.bundle.key) is new_key
    assert not running.superseded()
    joined.now += 30 * DAY
    joined.take(joined.sign(asked, how="renew"))
    assert running.superseded()
    own = joined.open()
    assert own.days_left(joined.now) == 365
    assert own.bundle.key == asked.key
    assert len(list((joined.home / "identity").glob("*.key"))) == 1
    assert "request.pem" not in joined.files()


def test_while_a_new_key_waits_it_is_asked_for_again(joined: Site):
    """The coordinator may have let go of the present key for it."""
    first = credentials.renew(joined.home, new_key=True)
    assert credentials.renew(joined.home, new_key=True) == first
    assert credentials.renew(joined.home, new_key=False) == first
    joined.open()  # what is in force is still whole


def test_a_node_whose_certificate_has_ended_can_ask_for_another(joined: Site):
    joined.now += 400 * DAY
    with pytest.raises(IdentityError, match=r"'north' ended at 2031-01-01.*renew it"):
        joined.open()
    joined.take(joined.sign(credentials.renew(joined.home, new_key=False), how="renew"))
    assert joined.open().days_left(joined.now) == 365


def test_after_a_revocation_a_new_key_comes_back_under_the_same_name(joined: Site):
    old = joined.open().bundle.key
    joined.authority.revoke("north", ADA)
    with pytest.raises(IdentityError, match="revoked"):
        joined.sign(credentials.renew(joined.home, new_key=True), how="renew")
    asked = credentials.request_afresh(joined.home, "north")
    assert asked.key != old
    assert asked.vouched_by == b""
    joined.take(joined.sign(asked))
    assert joined.open().bundle.key == asked.key


# --- The disk -----------------------------------------------------------------------------------


def test_a_key_that_others_may_read_or_that_is_gone_stops_the_node(joined: Site):
    (path,) = (joined.home / "identity").glob("*.key")
    path.chmod(0o640)
    with pytest.raises(ConfigError, match="chmod 600"):
        joined.open()
    path.chmod(0o600)
    content = path.read_bytes()
    path.write_bytes(certificates.key_pem(certificates.new_key()))
    with pytest.raises(ConfigError, match="another key than its name says"):
        joined.open()
    path.write_bytes(content[:50])
    with pytest.raises(ConfigError, match="no private key on P-384"):
        joined.open()
    path.unlink()
    with pytest.raises(ConfigError, match=r"the node's key cannot be read"):
        joined.open()


def test_two_commands_do_not_change_an_identity_at_once(joined: Site):
    before = joined.files()
    held = locked(joined.home / "identity")
    with held, pytest.raises(ConfigError, match="another process changes it"):
        credentials.renew(joined.home, new_key=True)
    assert joined.files() == before


KILLED = """
import os, sys
from datetime import datetime
from pathlib import Path
from client import credentials

home, mail, now, wanted = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], int(sys.argv[4])
offer = credentials.offered(home, mail, datetime.fromisoformat(now))
seen = 0

def kill(event, arguments):
    global seen
    written = event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR)
    if written or event in ("os.rename", "os.remove"):
        seen += 1
        if seen == wanted:
            os.kill(os.getpid(), 9)

sys.addaudithook(kill)
offer.accept()
"""


def test_killed_at_any_moment_of_a_change_a_node_has_one_whole_identity(joined: Site):
    before = joined.open().bundle
    asked = credentials.renew(joined.home, new_key=True)
    joined.now += DAY
    after = joined.sign(asked, how="renew")
    joined.mail.write_bytes(after.content)
    shutil.copytree(joined.home, joined.home.with_name("kept"))
    held = []
    for moment in range(1, 20):
        shutil.rmtree(joined.home)
        shutil.copytree(joined.home.with_name("kept"), joined.home)
        done = subprocess.run(
            [sys.executable, "-c", KILLED, joined.home, joined.mail, str(joined.now), str(moment)],
            capture_output=True,
            check=False,
            timeout=300,
        )
        held.append(joined.open().bundle.key)
        joined.take(after)  # and the change can be made again
        assert joined.open().bundle.key == after.key
        assert len(joined.files()) == 2, joined.files().keys()
        if done.returncode == 0:
            break
        assert done.returncode == -signal.SIGKILL, done.stderr
    assert set(held) == {before.key, after.key}
    assert held == sorted(held, key=[before.key, after.key].index)
    assert len(held) >= 4
