"""The budget as a picture: by run, and over time. SVG or PNG, by the file's ending."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.dates import AutoDateLocator, ConciseDateFormatter
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from client.book import Entry, Kind
from common import accounting
from common.errors import ConfigError
from deploy.node_budget import Figures, RunShare, allowed

_SPENT, _ASIDE, _CARRIED, _LIMIT = "#0072B2", "#E69F00", "#CC79A7", "#D55E00"
_INK, _LINES = "#1F2D36", "#E3E6E4"
_MOST_RUNS, _FEWEST_ROWS = 12, 5
_ROOM = 1.12  # for the figure behind a whole bar
_DAY = timedelta(days=1)  # a time axis is no shorter
_BELOW: dict[str, Any] = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.14), "ncols": 3}
STYLE: dict[Any, Any] = {
    "font.family": ["DejaVu Sans"],
    "font.size": 10,
    "text.color": _INK,
    "text.parse_math": False,  # names are somebody else's
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.titlelocation": "left",
    "grid.color": _LINES,
    "legend.frameon": False,
    "svg.fonttype": "none",
}
"""Of every picture at a node's desk."""


class Point(NamedTuple):
    """How much of the whole budget was spent and carried at a time."""

    time: datetime
    part: float


def timeline(entries: Sequence[Entry], figures: Figures) -> list[Point]:
    """The part of the budget that was gone after each entry that took some."""
    order, whole = figures.limit.order, allowed(figures.limit)
    points, total = [], 0.0
    for entry in entries:
        if entry.kind == Kind.RESERVED and entry.mechanism is not None:
            total += accounting.divergence(entry.mechanism, order) / whole
        elif entry.kind == Kind.CARRIED:
            total += (entry.divergence or 0.0) / whole
        else:
            continue
        points.append(Point(datetime.fromisoformat(entry.time), total))
    return points


def draw(path: Path, site: str, figures: Figures, points: Sequence[Point]) -> None:
    """Write the picture to `path`.

    Raises:
        ConfigError: if it cannot be written, or the ending is not .svg or .png.
    """
    if path.suffix.lower() not in (".svg", ".png"):
        raise ConfigError(f"{path}: expected a name that ends in .svg or .png")
    limit = figures.limit
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(10, 4.4), layout="constrained")
        figure.suptitle(
            f"{site}: privacy budget for life, ε = {limit.epsilon:g} at δ = {limit.delta:g}; "
            f"{figures.left:.0%} left",
            x=0.01,
            ha="left",
            fontweight="bold",
        )
        left, right = figure.subplots(1, 2)
        _by_run(left, figures)
        _over_time(right, figures, points)
        try:
            figure.savefig(path, dpi=150)
        except OSError as error:
            raise ConfigError(f"{path}: the picture cannot be written ({error})") from error


def _by_run(axes: Axes, figures: Figures) -> None:
    runs = _rows(figures)
    names = [f"{run.name or run.digest[:8]} {run.digest[:4]}" for run in runs]
    if figures.carried:
        runs, names = [*runs, _empty("carried")], [*names, "carried over"]
    rows = range(len(runs))
    spent = [run.spent for run in runs]
    axes.barh(rows, spent, color=_SPENT, label="spent")
    aside = [run.aside for run in runs]
    lines: dict[str, Any] = {"hatch": "//", "edgecolor": "white", "linewidth": 0}
    axes.barh(rows, aside, left=spent, color=_ASIDE, label="set aside", **lines)
    if figures.carried:
        axes.barh([len(runs) - 1], [figures.carried], color=_CARRIED, hatch="..", label="carried")
    axes.set_yticks(list(rows), names)
    axes.set_ylim(max(len(runs), _FEWEST_ROWS) - 0.4, -0.6)  # the first on top, none too thick
    ends = [run.spent + run.aside for run in runs]
    if figures.carried:
        ends[-1] = figures.carried
    for row, end in zip(rows, ends, strict=True):
        axes.annotate(f"{end:.1%}", (end, row), (4, 0), textcoords="offset points", va="center")
    axes.set_xlim(0, max(1.0, *ends, 0.0) * _ROOM)
    axes.set_title("by run, in parts of the whole budget")
    axes.xaxis.set_major_formatter(PercentFormatter(1.0))
    axes.grid(axis="x")
    if runs:
        axes.legend(**_BELOW)
    else:
        axes.text(0.5, 0.5, "nothing yet", ha="center", transform=axes.transAxes)


def _rows(figures: Figures) -> list[RunShare]:
    """The greatest runs, and the others together."""
    shown = [run for run in figures.runs[:_MOST_RUNS] if run.spent or run.aside]
    rest = figures.runs[_MOST_RUNS:]
    if not rest:
        return shown
    spent, aside = sum(run.spent for run in rest), sum(run.aside for run in rest)
    return [*shown, _empty(f"{len(rest)} more runs")._replace(spent=spent, aside=aside)]


def _empty(name: str) -> RunShare:
    return RunShare("", name, "", 0, 0, 0.0, 0.0)


def _over_time(axes: Axes, figures: Figures, points: Sequence[Point]) -> None:
    now = figures.spent + figures.carried
    if points:
        last = points[-1].time
        begin = min(points[0].time, last - _DAY)
        end: Any = last + (last - begin) / 12  # so that what came last is a line, and no edge
        times = [begin, *(point.time for point in points), end]
        parts = [0.0, *(point.part for point in points), points[-1].part]
        axes.step(times, parts, where="post", color=_SPENT, label="spent and carried")
        axes.fill_between(times, parts, step="post", color=_SPENT, alpha=0.15)
        axes.set_xlim(times[0], end)
        if figures.aside:
            level = now + figures.aside
            axes.axhline(level, color=_ASIDE, linestyle=":", label="with what is set aside")
        ticks: Any = AutoDateLocator(minticks=3, maxticks=8)  # type: ignore[no-untyped-call]
        axes.xaxis.set_major_locator(ticks)
        axes.xaxis.set_major_formatter(ConciseDateFormatter(ticks))  # type: ignore[no-untyped-call]
    axes.axhline(1.0, color=_LIMIT, linestyle="--", label="the budget")
    axes.set_ylim(0, max(1.08, (now + figures.aside) * 1.05))
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.set_title("over time")
    axes.grid(axis="y")
    axes.legend(**_BELOW)
