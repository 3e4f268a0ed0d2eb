"""What a run knows of who is enrolled, from a roster that changes under it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from common import certificates
from common.clock import Clock
from common.enrolment import Request
from common.errors import IdentityError, PeerError
from common.messages import NodeCard
from server.authority import Authority, Lifetimes, NewFederation, Signed
from server.members import Anybody, Enrolled
from server.roster import Roster

SIGNED = Signed("Ada", "a test")


def card(site: str, size: int) -> NodeCard:
    return NodeCard(
        digest="a" * 64,
        site=site,
        version="0",
        declared_size=size,
        paced=True,
        witness=f"1:{'a' * 64}:{'a' * 64}",
    )


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    new = NewFederation("chest", ["localhost"], 9092, Lifetimes())
    folder = tmp_path_factory.mktemp("members") / "home"
    passphrase = "five words drawn by lot"  # noqa: S105 - of this test
    return Authority.create(folder, new, passphrase, SIGNED, Clock())


@contextmanager
def enrolled(authority: Authority, *names: str) -> Iterator[None]:
    for name in names:
        authority.enrol(Request.make(certificates.new_key(), name), 100, 30, SIGNED)
    yield
    for name in names:
        if authority.roster().site(name):
            authority.revoke(name, SIGNED)


def test_the_sites_of_the_roster_are_waited_for(authority: Authority):
    members = Enrolled(Roster(authority.folder), dict)
    with enrolled(authority, "north", "south"):
        assert members.names() == {"north", "south"}
        assert Anybody().names() == frozenset()


def test_a_site_is_what_it_was_enrolled_as(authority: Authority):
    members = Enrolled(Roster(authority.folder), dict)
    with enrolled(authority, "east", "west"):
        members.check("east", card("east", 100))
        with pytest.raises(PeerError, match="calls itself 'west', and is enrolled as 'east'"):
            members.check("east", card("west", 100))
        with pytest.raises(PeerError, match="declares 101, and is enrolled with at most 100"):
            members.check("east", card("east", 101))
        authority.revoke("east", SIGNED)
        with pytest.raises(PeerError, match="not enrolled any more"):
            members.check("east", card("east", 1))


def test_who_is_silent_is_told_by_name_with_what_is_known(authority: Authority):
    left = {"up": "2026-07-11T09:30:00.123+00:00", "down": ""}
    members = Enrolled(Roster(authority.folder), lambda: left)
    with enrolled(authority, "up", "down", "here"):
        assert members.absent("up") == "not connected since 2026-07-11T09:30:00 UTC"
        assert members.absent("down") == "it has never connected"
        assert members.absent("here") == ""
        authority.revoke("up", SIGNED)
        assert members.absent("up").startswith("revoked at 2")
        assert members.barred("up").startswith("revoked at 2")
        assert members.barred("here") == ""
        assert members.barred("elsewhere") == "not enrolled"


def test_a_roster_in_trouble_ends_no_run(authority: Authority):
    members = Enrolled(Roster(authority.folder), dict)
    with enrolled(authority, "left", "right"):
        path: Path = authority.folder / "roster.json"
        kept = path.read_bytes()
        path.write_bytes(b"{}")
        assert members.barred("left") == ""
        assert members.names() == frozenset()
        with pytest.raises(IdentityError, match="cannot be checked"):
            members.check("left", card("left", 1))
        path.write_bytes(kept)
        assert "left" in members.names()
