"""The last witness of each site's ledger: what a node cannot take back (docs/privacy.md 11).

A node's card says how far its ledger went. The coordinator keeps the last such witness of each
site in one JSON file, and uses it in two ways. A site whose card goes back behind it, or shows
something else at the same entry, is declined. And it goes to the site with each task, so that the
node itself looks whether its ledger still leads there: only the node can.

A card's witness takes the place of the one before it when the site has answered a task that
carried the one before. A ledger that was put back and has grown past it since would otherwise be
believed at its next card, before its node has faced what it forgot.
"""

from __future__ import annotations

import fcntl
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from pydantic import ValidationError

from common.errors import LedgerError, RunError
from common.files import write_durably
from common.messages import Name, Witness
from common.spec import Section

WITNESS_FILE = "witnesses.json"


class _Kept(Section):
    """The file's content."""

    format: Literal[1] = 1
    sites: Mapping[Name, Witness] = {}


class WitnessBook:
    """The witnesses in the file at `path`, which several runs may share.

    It is read anew at each use, and one process at a time changes it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> Mapping[str, str]:
        """Site -> the last witness; nothing for a file that is not there.

        Raises:
            RunError: if the file cannot be read, or does not hold witnesses.
        """
        try:
            return _Kept.model_validate_json(self.path.read_bytes()).sites
        except FileNotFoundError:
            return {}
        except (OSError, ValidationError) as error:
            said = error.errors()[0]["msg"] if isinstance(error, ValidationError) else error
            raise RunError(
                f"{self.path}: the sites' witnesses cannot be read ({said}); put the file back "
                "from a copy. Without it nobody here sees that a site's ledger was put back"
            ) from error

    def check(self, site: str, shown: str, kept: Mapping[str, str]) -> None:
        """Whether the ledger that shows `shown` can be the one that is `kept` of the site.

        Args:
            site: its name.
            shown: the witness on its card.
            kept: what `read` gave before the site was asked for the card.

        Raises:
            LedgerError: if it went back, or is another at the same entry; the text has the way
                out.
        """
        before = kept.get(site, shown)
        if entry_of(shown) > entry_of(before) or shown == before:
            return
        raise LedgerError(
            f"site {site!r}: its ledger is at entry {entry_of(shown)}, but was seen at entry "
            f"{entry_of(before)} before, and does not lead there: it was put back, or made anew. "
            "Have its security officer look with `cloister node audit` and go on with `cloister "
            f"node recover`, each with --witness {before}. If the site was set up anew on "
            f"purpose, take {site!r} out of {self.path}"
        )

    def keep(self, shown: Mapping[str, str]) -> None:
        """Keep, durably, each of these witnesses that goes farther than the one that is kept.

        Args:
            shown: site -> the witness on its card; the site has answered a task since.

        Raises:
            RunError: if the file cannot be read or written.
        """
        if not self._later(shown):
            return
        try:
            with self._alone():
                sites = dict(self.read()) | self._later(shown)  # another run may have been here
                write_durably(self.path, _Kept(sites=sites).model_dump_json(indent=2).encode())
        except OSError as error:
            raise RunError(
                f"{self.path}: the sites' witnesses cannot be written ({error}); mend the disk, "
                "then resume the run"
            ) from error

    def _later(self, shown: Mapping[str, str]) -> dict[str, str]:
        kept = self.read()
        return {
            site: token
            for site, token in shown.items()
            if site not in kept or entry_of(token) > entry_of(kept[site])
        }

    @contextmanager
    def _alone(self) -> Iterator[None]:
        with self.path.with_suffix(".lock").open("ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


def entry_of(token: str) -> int:
    """The number of the ledger's entry that a witness speaks of."""
    return int(token.partition(":")[0])
