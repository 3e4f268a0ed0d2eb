"""A run as the person at the terminal sees it: a progress bar, the sites, the last rounds."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from common.spec import RunSpec

_SHOWN_ROUNDS = 8
_MARKS = {
    "training": ("…", "cyan"),
    "ok": ("✓", "green"),
    "late": ("late", "yellow"),
    "failed": ("failed", "red"),
    "refused": ("refused", "magenta"),
    "rejected": ("rejected", "red"),
}


_WAITS = {"approval": "a person's approval", "later": "its time"}
_MARKS |= {what: (f"waits for {what}", "yellow") for what in _WAITS.values()}


class LiveObserver:
    """Shows a run while it goes on; on anything but a terminal, one plain line a round."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._sites: dict[str, str] = {}
        self._rows: deque[Mapping[str, Any]] = deque(maxlen=_SHOWN_ROUNDS)
        self._metric = "auroc"
        self._progress = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=console,
        )
        self._live: Live | None = None

    @contextmanager
    def showing(self) -> Iterator[LiveObserver]:
        """Draw for as long as the run goes on; the last picture stays."""
        if not self._console.is_terminal:
            yield self
            return
        with Live(
            console=self._console, refresh_per_second=8, get_renderable=self._picture
        ) as live:
            self._live = live
            yield self
        self._live = None

    def run_opened(self, spec: RunSpec, sites: list[str], finished_rounds: int) -> None:
        """See `server.rounds.Observer`."""
        self._metric = spec.evaluation.metric
        self._sites = dict.fromkeys(sites, "")
        for earlier in list(self._progress.task_ids):  # a run that goes on is opened again
            self._progress.remove_task(earlier)
        self._progress.add_task(f"{spec.name}: round", total=spec.rounds, completed=finished_rounds)

    def sites_wait(self, waiting: Mapping[str, str]) -> None:
        """See `server.rounds.Observer`."""
        self._sites = {name: _WAITS.get(code, code) for name, code in sorted(waiting.items())}
        if self._live is None and waiting:
            told = ", ".join(f"{name} ({what})" for name, what in self._sites.items())
            self._console.print(f"the run waits for {told}", highlight=False, markup=False)

    def round_opened(self, number: int) -> None:
        """See `server.rounds.Observer`."""
        self._sites = dict.fromkeys(self._sites, "training")

    def site_answered(self, number: int, site: str, status: str) -> None:
        """See `server.rounds.Observer`."""
        self._sites[site] = status

    def round_closed(self, row: Mapping[str, Any]) -> None:
        """See `server.rounds.Observer`."""
        self._rows.append(row)
        for task in self._progress.task_ids:
            self._progress.update(task, completed=row["round"])
        if self._live is None:
            self._console.print(self._line(row), highlight=False)

    def _line(self, row: Mapping[str, Any]) -> str:
        odd = [f"{name} {site['status']}" for name, site in row["sites"].items()]
        odd = [text for text in odd if not text.endswith(" ok")]
        parts = [f"round {row['round']:>4}", f"{row['seconds']:6.2f} s"]
        parts += [f"{name} {text}" for name, text in self._scores(row).items() if text != "–"]
        return "   ".join(parts + odd)

    def _scores(self, row: Mapping[str, Any]) -> dict[str, str]:
        evaluation = row["evaluation"] or {}
        return {
            f"{part} {self._metric}": _estimate(
                (evaluation.get(part) or {}).get("metrics", {}), self._metric
            )
            for part in ("validation", "test")
        }

    def _picture(self) -> Group:
        table = [self._table()] if self._rows else []
        return Group(self._progress, self._site_line(), *table)

    def _site_line(self) -> Text:
        line = Text()
        for name, status in self._sites.items():
            mark, style = _MARKS.get(status, ("·", "dim"))
            line.append(f"  {name} ").append(mark, style=style)
        return line

    def _table(self) -> Table:
        table = Table(box=None, header_style="dim", padding=(0, 2))
        for column in ("round", "seconds", *self._scores({"evaluation": None}), "update"):
            table.add_column(column, justify="right")
        for row in self._rows:
            scores = self._scores(row).values()
            table.add_row(
                str(row["round"]), f"{row['seconds']:.2f}", *scores, f"{row['update_norm']:.3g}"
            )
        return table


def _estimate(metrics: Mapping[str, Any], name: str) -> str:
    found = metrics.get(name)
    if not found or found["value"] is None:
        return "–"
    if found["low"] is None:
        return f"{found['value']:.3f}"
    return f"{found['value']:.3f} ({found['low']:.3f}–{found['high']:.3f})"
