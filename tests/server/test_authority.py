"""The authority and its roster: who is let in, at once and for ever, and what a thief would get."""

from __future__ import annotations

import base64
import json
import resource
import shutil
import signal
import stat
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from common import certificates
from common.certificates import PrivateKey, Use
from common.clock import Clock
from common.enrolment import Bundle, Request
from common.errors import CloisterError, ConfigError, IdentityError
from common.files import locked
from server import passphrase
from server.authority import (
    LEAVING,
    Authority,
    Lifetimes,
    NewFederation,
    Signed,
    tls_certificate,
)
from server.roster import Roster, Standing, lines
from server.tls import ServerTls

WORDS = "five words drawn by lot"
ADA = Signed("Ada", "as agreed")
START = datetime(2030, 1, 1, tzinfo=UTC)
DAY = timedelta(days=1)


def hosts(folder: Path) -> tuple[str, ...]:
    return certificates.hosts_of(tls_certificate(folder))


class Time:
    """A clock that is set by hand."""

    def __init__(self) -> None:
        self.when = START

    @property
    def clock(self) -> Clock:
        return Clock(date=lambda: self.when)


@dataclass
class Desk:
    """An operator's desk: a federation on the disk, its authority open, a clock to set."""

    authority: Authority
    time: Time

    @property
    def folder(self) -> Path:
        return self.authority.folder

    @property
    def clock(self) -> Clock:
        return self.time.clock

    def roster(self) -> Roster:
        return Roster(self.folder, self.clock)

    def enrol(self, site: str, size: int = 500, days: int = 365) -> tuple[PrivateKey, Bundle]:
        key = certificates.new_key()
        return key, self.authority.enrol(Request.make(key, site), size, days, ADA)

    def files(self) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in self.folder.iterdir()}


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    folder = tmp_path_factory.mktemp("authority") / "federation"
    new = NewFederation("chest", ["Coordinator.Example.org", "192.0.2.7"], 9092)
    return Authority.create(folder, new, WORDS, ADA, Time().clock)


@pytest.fixture
def desk(template: Authority, tmp_path: Path) -> Desk:
    shutil.copytree(template.folder, tmp_path / "federation")
    time = Time()
    return Desk(replace(template, folder=tmp_path / "federation", clock=time.clock), time)


def refused(roster: Roster, key: PrivateKey, words: str) -> None:
    with pytest.raises(IdentityError, match=words):
        roster.site_of(certificates.key_bytes(key))


# --- The beginning ------------------------------------------------------------------------------


def test_a_federation_begins_with_an_empty_roster_and_files_for_its_owner_alone(desk: Desk):
    assert desk.roster().sites() == ()
    content = desk.roster().content()
    assert (content.number, content.address) == (1, "https://coordinator.example.org:9092")
    for path in desk.folder.iterdir():
        secret = path.name != "ca.pem"
        assert bool(stat.S_IMODE(path.stat().st_mode) & 0o077) is not secret, path
    assert stat.S_IMODE(desk.folder.stat().st_mode) & 0o077 == 0


def test_the_coordinators_certificate_has_its_hosts_and_loopback(desk: Desk):
    expected = ("coordinator.example.org", "192.0.2.7", "localhost", "127.0.0.1", "::1")
    assert hosts(desk.folder) == expected
    served = ServerTls(desk.folder, desk.clock)
    assert served.hosts == expected
    assert served.days_left(START) == 365


def test_lifetimes_are_as_they_were_asked_and_none_outlives_the_authority(tmp_path: Path):
    new = NewFederation("chest", ["host"], 1, Lifetimes(authority=100, coordinator=30))
    made = Authority.create(tmp_path / "federation", new, WORDS, ADA, Time().clock)
    assert made.certificate.not_valid_after_utc == START + 100 * DAY
    assert ServerTls(made.folder, made.clock).ends == START + 30 * DAY
    bundle = made.enrol(Request.make(certificates.new_key(), "north"), 1, 365, ADA)
    assert bundle.certificate.not_valid_after_utc == START + 100 * DAY


@pytest.mark.parametrize(
    ("changes", "passphrase", "words"),
    [
        ({"name": "a name"}, WORDS, "expected 1 to 63 letters"),
        ({"hosts": []}, WORDS, "--host: expected"),
        ({"hosts": ["https://here"]}, WORDS, "without port, scheme"),
        ({"port": 70000}, WORDS, "expected 1 to 65535"),
        ({}, "short", "5 characters; expected 16 or more"),
    ],
)
def test_what_makes_no_federation_leaves_nothing(
    changes: dict[str, object], passphrase: str, words: str, tmp_path: Path
):
    new = replace(NewFederation("chest", ["host"], 9092), **changes)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=words):
        Authority.create(tmp_path / "federation", new, passphrase, ADA, Clock())
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_holds_something_is_not_begun_in(desk: Desk):
    before = desk.files()
    with pytest.raises(ConfigError, match="takes a new folder"):
        Authority.create(desk.folder, NewFederation("x", ["h"], 1), WORDS, ADA, Clock())
    assert desk.files() == before


# --- The passphrase -----------------------------------------------------------------------------


def test_a_guess_at_the_passphrase_takes_128_mib(
    cost_of_a_guess: int, monkeypatch: pytest.MonkeyPatch
):
    """RFC 7914: 128 r N bytes, r = 8."""
    monkeypatch.setattr(passphrase, "_COST", cost_of_a_guess)
    made = json.loads(passphrase.sealed_key(certificates.new_key(), WORDS))
    assert 128 * 8 * 2 ** made["cost"] == 128 * 2**20


def test_the_authoritys_key_opens_under_its_passphrase_alone(desk: Desk):
    opened = Authority.open(desk.folder, WORDS, clock=desk.clock)
    assert opened.authority_key == desk.authority.authority_key
    with pytest.raises(ConfigError, match="another passphrase, or the file was changed"):
        Authority.open(desk.folder, f"{WORDS}!", clock=desk.clock)


def test_the_sealed_key_shows_nothing_and_no_bit_of_it_can_be_changed(desk: Desk):
    path = desk.folder / "ca.key"
    sealed = path.read_bytes()
    secret = desk.authority.key.private_numbers().private_value.to_bytes(48, "big")
    held = json.loads(sealed)
    inside = base64.b64decode(held["sealed"])
    assert secret not in inside
    assert b"PRIVATE" not in sealed + inside
    held["sealed"] = base64.b64encode(inside[:40] + bytes([inside[40] ^ 1]) + inside[41:]).decode()
    dearer = json.dumps(json.loads(sealed) | {"cost": 30}).encode()
    for content in (json.dumps(held).encode(), b"{}", b"", dearer):
        path.write_bytes(content)
        with pytest.raises(ConfigError, match=r"another passphrase|not the key of an authority"):
            Authority.open(desk.folder, WORDS, clock=desk.clock)
    path.write_bytes(sealed)
    path.chmod(0o644)
    with pytest.raises(ConfigError, match="chmod 600"):
        Authority.open(desk.folder, WORDS, clock=desk.clock)


def test_the_authoritys_key_may_lie_elsewhere_and_the_coordinator_serves_without_it(
    desk: Desk, tmp_path: Path
):
    (desk.folder / "ca.key").rename(tmp_path / "stick.key")
    desk.roster()
    ServerTls(desk.folder, desk.clock)
    with pytest.raises(ConfigError, match=r"ca\.key: .* cannot be read"):
        Authority.open(desk.folder, WORDS, clock=desk.clock)
    Authority.open(desk.folder, WORDS, sealed_key=tmp_path / "stick.key", clock=desk.clock)


def test_the_key_of_another_authority_is_refused(desk: Desk, tmp_path: Path):
    new = NewFederation("chest", ["host"], 9092)
    other = Authority.create(tmp_path / "other", new, WORDS, ADA, desk.clock)
    with pytest.raises(ConfigError, match="key of another authority"):
        Authority.open(desk.folder, WORDS, sealed_key=other.folder / "ca.key", clock=desk.clock)


# --- Enrolment ----------------------------------------------------------------------------------


def test_an_enrolled_key_is_its_sites_and_no_other_is(desk: Desk):
    roster = desk.roster()
    key, bundle = desk.enrol("north", size=500)
    site = roster.site_of(certificates.key_bytes(key))
    assert (site.name, site.greatest_declared_size) == ("north", 500)
    assert site.keys == (certificates.key_bytes(key),)
    assert site.until == START + 365 * DAY
    assert bundle.offer.greatest_declared_size == 500
    bundle.check(START)
    certificates.check_certificate(bundle.certificate, desk.authority.certificate, Use.NODE, START)
    refused(roster, certificates.new_key(), "not enrolled")
    with pytest.raises(IdentityError, match="not enrolled"):
        roster.site_of(b"")


def test_every_enrolled_site_is_listed_by_name_whether_it_speaks_or_not(desk: Desk):
    for name in ("south", "north", "east"):
        desk.enrol(name)
    assert [site.name for site in desk.roster().sites()] == ["east", "north", "south"]
    desk.time.when += 400 * DAY
    assert [site.keys for site in desk.roster().sites()] == [(), (), ()]


def test_the_same_request_twice_enrols_once(desk: Desk):
    request = Request.make(certificates.new_key(), "north")
    desk.authority.enrol(request, 500, 365, ADA)
    before = desk.files()
    with pytest.raises(IdentityError, match=r"enrolled already.*cloister coordinator renew"):
        desk.authority.enrol(request, 500, 365, ADA)
    assert desk.files() == before


@pytest.mark.parametrize("name", ["north", "North", "NORTH"])
def test_a_name_is_one_sites_however_it_is_written(desk: Desk, name: str):
    desk.enrol("north")
    before = desk.files()
    with pytest.raises(ConfigError, match="enrolled already, with another key"):
        desk.enrol(name)
    assert desk.files() == before


def test_one_key_is_one_sites(desk: Desk):
    key, _ = desk.enrol("north")
    with pytest.raises(IdentityError, match="enrolled already, as that of north"):
        desk.authority.enrol(Request.make(key, "south"), 500, 365, ADA)
    with pytest.raises(IdentityError, match="the authority's own"):
        desk.authority.enrol(Request.make(desk.authority.key, "south"), 500, 365, ADA)


# --- Renewal ------------------------------------------------------------------------------------


def test_a_renewal_over_the_same_key_lengthens_it(desk: Desk):
    key, _ = desk.enrol("north")
    desk.time.when += 400 * DAY
    roster = desk.roster()
    refused(roster, key, "ended at 2031-01-01.*cloister node renew")
    bundle = desk.authority.renew(Request.make(key, "north", old=key), 365, ADA)
    assert roster.site_of(certificates.key_bytes(key)).until == START + 765 * DAY
    assert bundle.certificate.not_valid_after_utc == START + 765 * DAY


def test_a_renewal_with_a_new_key_lets_both_speak_until_the_node_has_changed(desk: Desk):
    old, _ = desk.enrol("north")
    new = certificates.new_key()
    desk.authority.renew(Request.make(new, "north", old=old), 365, ADA)
    roster = desk.roster()
    for key in (old, new):
        assert roster.site_of(certificates.key_bytes(key)).name == "north"
    assert len(roster.sites()) == 1
    desk.time.when += LEAVING + timedelta(seconds=1)
    refused(roster, old, "this key ended")
    assert roster.site_of(certificates.key_bytes(new)).keys == (certificates.key_bytes(new),)


def test_a_renewal_may_be_asked_again_when_its_bundle_was_lost(desk: Desk):
    old, _ = desk.enrol("north")
    new = certificates.new_key()
    request = Request.make(new, "north", old=old)
    first = desk.authority.renew(request, 365, ADA)
    again = desk.authority.renew(request, 365, ADA)
    assert first.key == again.key
    standing = [each.standing for each in desk.roster().content().all_keys]
    assert sorted(standing) == [Standing.ENROLLED, Standing.LEAVING]


def test_a_lost_first_bundle_is_written_again_from_the_same_request(desk: Desk):
    key = certificates.new_key()
    request = Request.make(key, "north")
    desk.authority.enrol(request, 500, 365, ADA)
    bundle = desk.authority.renew(request, 365, ADA, greatest_declared_size=700)
    assert (bundle.offer.site, bundle.offer.greatest_declared_size) == ("north", 700)
    assert desk.roster().sites()[0].greatest_declared_size == 700


def test_who_may_not_speak_renews_nothing(desk: Desk):
    old, _ = desk.enrol("north")
    other, _ = desk.enrol("south")
    middle, new = certificates.new_key(), certificates.new_key()
    desk.authority.renew(Request.make(middle, "north", old=old), 365, ADA)
    desk.authority.revoke("south", ADA)
    before = desk.files()
    for request, words in (
        (Request.make(new, "north"), "no enrolled key speaks for it"),
        (Request.make(new, "north", old=certificates.new_key()), "no enrolled key speaks"),
        (Request.make(new, "north", old=old), "is leaving since"),
        (Request.make(old, "north", old=middle), "is leaving since"),
        (Request.make(new, "south", old=other), "is revoked since"),
        (Request.make(other, "north", old=middle), "is revoked since"),
        (Request.make(new, "south", old=middle), "a site keeps its name"),
    ):
        with pytest.raises(IdentityError, match=words):
            desk.authority.renew(request, 365, ADA)
    assert desk.files() == before
    desk.authority.renew(Request.make(new, "north", old=middle), 365, ADA)


# --- Revocation ---------------------------------------------------------------------------------


def test_a_revocation_holds_at_once_in_a_process_that_serves(desk: Desk):
    roster = desk.roster()
    key, bundle = desk.enrol("north")
    roster.site_of(bundle.key)
    assert desk.authority.revoke("north", ADA) == (bundle.key,)
    refused(roster, key, "was revoked at 2030-01-01 00:00 UTC.*request --afresh")
    assert roster.sites() == ()


def test_a_revocation_takes_every_key_of_the_site(desk: Desk):
    old, _ = desk.enrol("north")
    new = certificates.new_key()
    desk.authority.renew(Request.make(new, "north", old=old), 365, ADA)
    roster = desk.roster()
    assert len(desk.authority.revoke("north", ADA)) == 2
    for key in (old, new):
        refused(roster, key, "was revoked")


def test_coming_back_takes_a_new_key_and_the_old_one_is_refused_for_ever(desk: Desk):
    old, _ = desk.enrol("north")
    desk.authority.revoke("north", ADA)
    for name in ("north", "south"):
        with pytest.raises(IdentityError, match=r"was revoked.*a new key"):
            desk.authority.enrol(Request.make(old, name), 500, 365, ADA)
    new, _ = desk.enrol("north")
    roster = desk.roster()
    assert roster.site_of(certificates.key_bytes(new)).name == "north"
    refused(roster, old, "was revoked")
    desk.time.when += 3000 * DAY
    refused(roster, old, "was revoked")
    with pytest.raises(IdentityError, match="was revoked"):
        desk.authority.enrol(Request.make(old, "west"), 500, 365, ADA)


def test_who_is_not_enrolled_cannot_be_revoked(desk: Desk):
    desk.enrol("north")
    with pytest.raises(ConfigError, match="not enrolled; the sites are: north"):
        desk.authority.revoke("nort", ADA)


def test_the_record_has_who_and_why_and_the_roster_has_not(desk: Desk):
    desk.enrol("north")
    desk.authority.revoke("north", Signed("Grace Hopper", "its machine was stolen"))
    told = [(line.roster, line.what, line.site, line.by) for line in lines(desk.folder)]
    assert told == [
        (1, "the federation began", "chest", "Ada"),
        (2, "enrolled", "north", "Ada"),
        (3, "revoked", "north", "Grace Hopper"),
    ]
    roster = (desk.folder / "roster.json").read_text()
    assert "Grace" not in roster
    assert "stolen" not in roster


def test_what_the_record_could_not_tell_is_not_done(desk: Desk):
    desk.enrol("north")
    before = desk.files()
    for signed in (Signed("\udcff", "stolen"), Signed("Ada", "\udcff")):
        with pytest.raises(ConfigError, match="expected text in UTF-8"):
            desk.authority.revoke("north", signed)
    assert desk.files() == before


def test_a_federation_behind_a_link_is_the_same(desk: Desk, tmp_path: Path):
    (tmp_path / "link").symlink_to(desk.folder)
    desk.enrol("north")
    replace(desk.authority, folder=tmp_path / "link").revoke("north", ADA)
    assert desk.roster().sites() == ()


def test_a_stolen_roster_gives_public_keys_names_sizes_and_dates(desk: Desk):
    key, bundle = desk.enrol("north")
    told = json.loads((desk.folder / "roster.json").read_text())["roster"]
    assert told.pop("sites") == [
        {"name": "north", "greatest_declared_size": 500, "since": "2030-01-01T00:00:00Z"}
    ]
    (known,) = told.pop("all_keys")
    assert base64.b64decode(known.pop("key")) == bundle.key == certificates.key_bytes(key)
    assert set(known) == {"site", "standing", "since", "until"}
    assert set(told) == {"format", "federation", "address", "number", "previous", "written"}


# --- A roster that somebody touched -------------------------------------------------------------


def test_a_roster_that_was_edited_lets_nobody_in_and_says_so(desk: Desk):
    key, bundle = desk.enrol("north")
    desk.enrol("south")
    desk.authority.revoke("south", ADA)
    path = desk.folder / "roster.json"
    whole = path.read_text()
    roster = desk.roster()
    for old, new in (
        ('"revoked"', '"enrolled"'),
        ('"number": 4', '"number": 5'),
        ('"greatest_declared_size": 500', '"greatest_declared_size": 501'),
        ('"north"', '"norte"'),
        ("2031-01-01", "2041-01-01"),
        ("coordinator.example.org", "elsewhere.example.org"),
        (
            "}",
            "",
        ),
    ):
        assert old in whole
        path.write_text(whole.replace(old, new))
        for asked in (roster, None):
            with pytest.raises(ConfigError, match=r"edited|damaged"):
                (asked or desk.roster()).site_of(bundle.key)
        with pytest.raises(ConfigError, match=r"edited|damaged"):
            desk.enrol("west")
    path.write_text(whole)
    assert roster.site_of(certificates.key_bytes(key)).name == "north"


def test_a_roster_of_another_federation_is_not_this_ones(desk: Desk, tmp_path: Path):
    new = NewFederation("chest", ["host"], 9092)
    other = Authority.create(tmp_path / "other", new, WORDS, ADA, desk.clock)
    shutil.copy(other.folder / "roster.json", desk.folder)
    with pytest.raises(ConfigError, match="another federation's"):
        desk.roster()


def test_an_older_roster_that_is_put_back_is_noticed(desk: Desk):
    _, bundle = desk.enrol("north")
    path = desk.folder / "roster.json"
    before = path.read_bytes()
    desk.authority.revoke("north", ADA)
    serving = desk.roster()
    path.write_bytes(before)
    for roster in (lambda: serving, desk.roster):
        with pytest.raises(ConfigError, match=r"number 2, and number 3 was seen.*older"):
            roster().site_of(bundle.key)
    with pytest.raises(ConfigError, match="older"):
        desk.enrol("south")


def test_a_process_that_serves_notices_even_if_the_record_is_put_back_too(desk: Desk):
    _, bundle = desk.enrol("north")
    before = desk.files()
    desk.authority.revoke("north", ADA)
    serving = desk.roster()
    for name, content in before.items():
        (desk.folder / name).write_bytes(content)
    with pytest.raises(ConfigError, match="older"):
        serving.site_of(bundle.key)
    # Without it nothing on this machine knows better: negative control of what is documented.
    assert desk.roster().site_of(bundle.key).name == "north"


def test_another_roster_of_the_same_number_is_noticed(desk: Desk, tmp_path: Path):
    shutil.copytree(desk.folder, tmp_path / "twin")
    twin = replace(desk.authority, folder=tmp_path / "twin")
    desk.enrol("north")
    twin.enrol(Request.make(certificates.new_key(), "south"), 500, 365, ADA)
    shutil.copy(twin.folder / "roster.json", desk.folder)
    with pytest.raises(ConfigError, match="another roster was put back"):
        desk.roster()


@pytest.mark.parametrize("lost", ["missing", "empty", "damaged"])
def test_without_its_record_nobody_is_let_in_until_a_person_goes_on(desk: Desk, lost: str):
    _, bundle = desk.enrol("north")
    path = desk.folder / "record.jsonl"
    if lost == "missing":
        path.unlink()
    else:
        path.write_bytes(b"" if lost == "empty" else b"{}\n")
    with pytest.raises(ConfigError, match="cloister coordinator roster --go-on"):
        desk.roster()
    desk.authority.go_on(ADA)
    assert desk.roster().site_of(bundle.key).name == "north"
    if lost == "damaged":
        (aside,) = desk.folder.glob("record.jsonl.*.damaged")
        assert aside.read_bytes() == b"{}\n"


def test_a_person_may_go_on_from_an_older_roster_beyond_the_newest_number(desk: Desk):
    _, bundle = desk.enrol("north")
    path = desk.folder / "roster.json"
    before = path.read_bytes()
    desk.authority.revoke("north", ADA)
    serving = desk.roster()
    path.write_bytes(before)
    assert desk.authority.go_on(ADA).number == 4
    assert serving.site_of(bundle.key).name == "north"
    desk.authority.revoke("north", ADA)
    with pytest.raises(IdentityError, match="revoked"):
        serving.site_of(bundle.key)


def test_a_record_whose_last_line_a_crash_has_torn_is_read_and_written_on(desk: Desk):
    desk.enrol("north")
    path = desk.folder / "record.jsonl"
    path.write_bytes(path.read_bytes()[:-30])
    desk.roster()
    desk.enrol("south")
    assert [line.roster for line in lines(desk.folder)] == [1, 3]
    assert [site.name for site in desk.roster().sites()] == ["north", "south"]


# --- Two at once, and killed --------------------------------------------------------------------


def test_two_commands_do_not_change_the_roster_at_once(desk: Desk):
    with locked(desk.folder), pytest.raises(ConfigError, match="another command changes it"):
        desk.enrol("north")
    assert desk.roster().sites() == ()


KILLED = """
import os, sys
from datetime import timedelta
from pathlib import Path
from common import certificates
from common.clock import Clock
from server.authority import Authority, Signed

folder, moment = Path(sys.argv[1]), sys.argv[2]
own = certificates.certificate((folder / "ca.pem").read_bytes(), "")
now = own.not_valid_before_utc + timedelta(hours=1)
key = certificates.private_key(sys.stdin.buffer.read(), folder)
authority = Authority(folder, own, key, Clock(date=lambda: now))

def kill(event, arguments):
    at_rename = event == "os.rename" and moment == "before the roster is replaced"
    added = event == "open" and str(arguments[0]).endswith(".jsonl") and arguments[2] & os.O_APPEND
    if at_rename or (added and moment == "before the record is written"):
        os.kill(os.getpid(), 9)

sys.addaudithook(kill)
authority.revoke("north", Signed("Ada", "killed"))
"""


@pytest.mark.parametrize(
    ("moment", "holds"),
    [("before the roster is replaced", False), ("before the record is written", True)],
)
def test_a_revocation_that_is_killed_holds_whole_or_not_at_all(
    desk: Desk, moment: str, holds: bool
):
    _, bundle = desk.enrol("north")
    done = subprocess.run(
        [sys.executable, "-c", KILLED, desk.folder, moment],
        input=certificates.key_pem(desk.authority.key),
        capture_output=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    names = [site.name for site in desk.roster().sites()]  # it can be relied on either way
    assert names == ([] if holds else ["north"])
    if not holds:
        desk.authority.revoke("north", ADA)
    desk.enrol("south")
    with pytest.raises(IdentityError, match="revoked"):
        desk.roster().site_of(bundle.key)
    assert not list(desk.folder.glob("*.partial"))


def test_a_full_disk_leaves_the_roster_as_it_was(desk: Desk, monkeypatch: pytest.MonkeyPatch):
    desk.enrol("north")
    before = desk.files()
    limit = len(before["roster.json"]) // 2

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    old = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with pytest.raises(ConfigError, match="cannot be written"):
            desk.enrol("south")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, old)
    assert desk.files() == before
    desk.enrol("south")


# --- The coordinator's own certificate ----------------------------------------------------------


def test_the_coordinators_certificate_is_renewed_under_a_serving_context(desk: Desk):
    served = ServerTls(desk.folder, desk.clock)
    context = served.context
    assert not served.refresh()
    desk.time.when += 300 * DAY
    desk.authority.renew_tls((), None, 365, ADA)
    assert served.refresh()
    assert not served.refresh()
    assert served.context is context
    assert served.days_left(desk.time.when) == 365
    assert served.hosts == hosts(desk.folder)


def test_a_new_host_is_in_the_certificate_and_in_the_next_bundles(desk: Desk):
    desk.authority.renew_tls(["new.example.org"], 443, 365, ADA)
    assert hosts(desk.folder) == ("new.example.org", "localhost", "127.0.0.1", "::1")
    assert desk.enrol("north")[1].offer.address == "https://new.example.org:443"
    desk.authority.renew_tls((), 9443, 365, ADA)
    assert desk.enrol("south")[1].offer.address == "https://new.example.org:9443"


def test_a_bad_certificate_on_the_disk_leaves_the_good_one_in_force(desk: Desk):
    served = ServerTls(desk.folder, desk.clock)
    before, path = served.hosts, desk.folder / "tls.pem"
    good = path.read_bytes()
    key, bundle = desk.enrol("north")
    half = good[: len(good) // 2]
    nodes = certificates.key_pem(key) + bundle.offer.certificate.encode()
    mixed = certificates.key_pem(key) + good[good.index(b"-----BEGIN CERTIFICATE") :]
    for content in (b"", half, nodes, mixed):
        path.write_bytes(content)
        with pytest.raises(CloisterError):
            served.refresh()
        with pytest.raises(CloisterError):
            ServerTls(desk.folder, desk.clock)
    assert served.hosts == before
    path.write_bytes(good)
    path.chmod(0o644)
    with pytest.raises(ConfigError, match="chmod 600"):
        served.refresh()


def test_a_certificate_that_has_ended_is_not_served(desk: Desk):
    desk.time.when += 366 * DAY
    with pytest.raises(IdentityError, match=r"ended at .*cloister coordinator renew"):
        ServerTls(desk.folder, desk.clock)
    desk.time.when = START - 2 * DAY
    with pytest.raises(IdentityError, match="set the clock right"):
        ServerTls(desk.folder, desk.clock)


def test_an_authority_that_has_ended_signs_nothing_and_its_roster_lets_nobody_in(desk: Desk):
    desk.enrol("north")
    desk.time.when += 3651 * DAY
    with pytest.raises(IdentityError, match="the authority's certificate ended"):
        desk.enrol("south")
    with pytest.raises(IdentityError, match="the authority's certificate ended"):
        desk.roster()


def test_a_question_to_the_roster_is_cheap(desk: Desk):
    """It is asked for every request of every node."""
    keys = [desk.enrol(f"site-{number}")[1].key for number in range(30)]
    roster = desk.roster()
    start = time.process_time()
    for _ in range(100):
        for key in keys:
            roster.site_of(key)
    assert (time.process_time() - start) / 3000 < 0.005
