"""The roster and its record, as tables."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime, timedelta

from rich.table import Table
from rich.text import Text

from common.certificates import fingerprint
from deploy.screen import printable
from server.roster import Line, Site

_SOON = timedelta(days=30)


def sites(found: Iterable[Site], now: datetime) -> Table:
    """A site a row: its bound, its keys' first groups, and how long it may speak."""
    table = Table("site", "may declare", "enrolled", "certificate", "key begins with")
    for site in found:
        keys = ", ".join(fingerprint(key)[:11] for key in site.keys) or "none"
        row = (site.name, str(site.greatest_declared_size), f"{site.since:%Y-%m-%d}")
        table.add_row(*row, _until(site.until, now), keys)
    return table


def changes(record: Iterable[Line]) -> Table:
    """A change a row."""
    table = Table("roster", "when", "what", "site", "by", "why")
    for line in record:
        row = (str(line.roster), f"{line.time:%Y-%m-%d %H:%M}", line.what, line.site)
        table.add_row(*(Text(printable(text)) for text in (*row, line.by, line.reason)))
    return table


def _until(until: datetime, now: datetime) -> Text:
    if until < now:
        return Text(f"ended {until:%Y-%m-%d}", style="bold red")
    return Text(f"until {until:%Y-%m-%d}", style="yellow" if until - now < _SOON else "")
