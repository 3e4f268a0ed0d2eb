"""Who is enrolled, as far as a run has to know it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

from common.certificates import shown
from common.errors import CloisterError, ConfigError, IdentityError, UpdateError
from common.messages import NodeCard
from server.roster import Roster


class Members(Protocol):
    """Who may take part in a run, who is waited for, and what is known of who is silent."""

    def names(self) -> frozenset[str]:
        """The sites that are waited for; none where whoever is there takes part."""

    def check(self, name: str, card: NodeCard) -> None:
        """Check what the node that is enrolled under `name` says of itself.

        Raises:
            PeerError: if it is not what was enrolled.
        """

    def barred(self, name: str) -> str:
        """Why a site may take part no longer; empty if it may."""

    def absent(self, name: str) -> str:
        """What is known of a site that does not answer; empty if nothing is."""


class Anybody:
    """Whoever is connected: in a simulation nobody is enrolled."""

    def names(self) -> frozenset[str]:
        """See `Members`."""
        return frozenset()

    def check(self, name: str, card: NodeCard) -> None:
        """See `Members`."""

    def barred(self, name: str) -> str:
        """See `Members`."""
        return ""

    def absent(self, name: str) -> str:
        """See `Members`."""
        return ""


class Enrolled:
    """The sites of the roster, as it is at each question.

    A roster that cannot be relied on bars nobody here who takes part: the fleet's guard lets nobody
    in meanwhile, and a run is not to be ended by it. Nobody can be checked by it either.

    Args:
        roster: the federation's.
        left: when each of the sites that are not connected was last seen to go; empty if never.
    """

    def __init__(self, roster: Roster, left: Callable[[], Mapping[str, str]]) -> None:
        self._roster, self._left = roster, left

    def names(self) -> frozenset[str]:
        """See `Members`."""
        try:
            return frozenset(site.name for site in self._roster.sites() if site.keys)
        except CloisterError:
            return frozenset()

    def check(self, name: str, card: NodeCard) -> None:
        """See `Members`."""
        if card.site != name:
            raise IdentityError(f"it calls itself {card.site!r}, and is enrolled as {name!r}")
        try:
            sites = self._roster.sites()
        except ConfigError as error:
            raise IdentityError(f"it cannot be checked: {error}") from error
        most = {site.name: site.greatest_declared_size for site in sites}.get(name)
        if most is None:
            raise IdentityError(f"site {name!r} is not enrolled any more")
        if card.declared_size > most:
            raise UpdateError(
                f"it declares {card.declared_size}, and is enrolled with at most {most}; have it "
                "declare less, or revoke it and enrol it anew with another limit"
            )

    def barred(self, name: str) -> str:
        """See `Members`."""
        try:
            content = self._roster.content()
        except CloisterError:
            return ""
        if content.site(name) is not None:
            return ""
        gone = [key.since for key in content.all_keys if key.site == name]
        return f"revoked at {shown(max(gone))}" if gone else "not enrolled"

    def absent(self, name: str) -> str:
        """See `Members`."""
        barred = self.barred(name)
        if barred:
            return barred
        left = self._left().get(name)
        if left is None:
            return ""
        return f"not connected since {left[:19]} UTC" if left else "it has never connected"
