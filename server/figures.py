"""The report's figures: charts by matplotlib, each an SVG inside a data URI, and pictures as PNG.

Colours are of Okabe and Ito's set, which people with any colour vision can tell apart; what a
colour says is also said by a line's style, a letter or a table. Text stays text and takes the
page's font. Names in a figure are untrusted: they are never parsed as mathematics. Each figure has
a text alternative.
"""

from __future__ import annotations

import base64
import io
import logging
import math
import textwrap
import unicodedata
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import cycle
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray
from PIL import Image

from common.tasks.estimates import Estimate
from common.tasks.exhibits import Bars, Chart, Gallery, Line
from server.record import STATUSES, Status

BLUE, ORANGE, GREEN, PINK, SKY, VERMILION, YELLOW, BLACK = (
    "#0072B2",
    "#E69F00",
    "#009E73",
    "#CC79A7",
    "#56B4E9",
    "#D55E00",
    "#F0E442",
    "#000000",
)
STATUS_COLOURS: dict[Status, str] = {
    "ok": "#BFDDEE",
    "late": ORANGE,
    "failed": VERMILION,
    "rejected": PINK,
    "refused": "#3B4750",
}
FONTS = "Inter, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, 'Liberation Sans', sans-serif"

_INK, _MUTED, _GRID = "#1F2D36", "#56656F", "#E3E6E4"
_LETTERS = {"ok": "", "late": "L", "failed": "F", "rejected": "X", "refused": "R"}
_LINES = (BLUE, VERMILION, GREEN, PINK, ORANGE, SKY, BLACK)
_STYLES = ("-", (0, (5, 2)), (0, (1.5, 1.5)), (0, (6, 2, 1.5, 2)))  # as many as share no factor
_DOTS = (0, (1, 2))
_BAR, _GROUND_BAR = "#7FB8D8", "#C9D6DC"
_LONGEST_NAME = 26
_LONGEST_LABEL, _TITLE_LINE = 40, 32
STRIPS = (10.6, 4.3)  # inches: of a broad page, of a narrow one
_MOST_LETTERS = 7.5  # rounds an inch of a strip
_TICKS = 1.0  # of a strip, an inch
_MOST_KEYS = 10
_KEY, _BROADEST_KEY = 0.19, 16  # inches; letters of a name, above which a key has a line of its own
_MARKS = 20  # rounds: where there are more, what was measured needs no mark
_MARKERS = "osD^v"
_CHART = 3.9, 3.7  # inches, without the key and a title's second line
_MARGINS = (0.6, 0.52, 0.12, 0.38)
_WIDER = (0.78, 0.52, 0.12, 0.38)  # for ticks of more digits than a part of 1 has
_STYLE: dict[Any, Any] = {
    "font.family": ["DejaVu Sans"],
    "font.size": 10.5,
    "text.color": _INK,
    "text.parse_math": False,
    "axes.edgecolor": _MUTED,
    "axes.labelcolor": _MUTED,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.titlesize": 12,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 10,
    "grid.color": _GRID,
    "grid.linewidth": 0.8,
    "xtick.color": _MUTED,
    "ytick.color": _MUTED,
    "legend.frameon": False,
    "legend.fontsize": 9.5,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
    "svg.fonttype": "none",
    "svg.hashsalt": "cloister",
}


@dataclass(frozen=True)
class Picture:
    """An image for a page: where it is (a data URI), and what it shows in words."""

    uri: str
    alt: str


@dataclass(frozen=True)
class Series:
    """A metric over the rounds of one part; an estimate may have no value."""

    name: str
    rounds: Sequence[int]
    estimates: Sequence[Estimate]


def by_round(title: str, series: Sequence[Series], chosen: int | None) -> Picture:
    """A metric by round with its interval bands, and a mark at the `chosen` round."""
    with _figure(4.9, 2.75) as (figure, axes):
        axes.set_title(title)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8, steps=[1, 2, 5, 10]))
        axes.set_xlabel("round", loc="left")
        colours = {"test": (BLUE, "-"), "validation": (VERMILION, (0, (4, 2)))}
        for one in series:
            _draw_series(axes, one, *colours[one.name])
        if chosen is not None:
            axes.axvline(chosen, color=_MUTED, linewidth=1, linestyle=_DOTS, zorder=1)
        axes.margins(x=0.02)
        _never_below_zero(axes, series)
        axes.legend(loc="upper right", bbox_to_anchor=(1.02, -0.1), ncols=2, handlelength=2.2)
        return _picture(figure, f"{title} by round. " + " ".join(map(_in_words, series)))


def chart(shown: Chart) -> Picture:
    """The curves of a task's chart; a single one has its band."""
    title = textwrap.wrap(_name(shown.title, 2 * _TITLE_LINE), _TITLE_LINE)
    left, bottom, right, top = _MARGINS if shown.unit_square else _WIDER
    more, below = 0.2 * (len(title) - 1), _KEY * _lines_of_keys(shown.lines)
    margins = (left, bottom + below, right, top + more)
    with _figure(_CHART[0], _CHART[1] + more + below, margins) as (figure, axes):
        axes.set_title("\n".join(title))
        if shown.diagonal:
            axes.axline((0, 0), slope=1, color=_MUTED, linewidth=1, linestyle=_DOTS)
        if shown.level is not None:
            axes.axhline(shown.level, color=_MUTED, linewidth=1, linestyle=_DOTS)
        _draw_lines(axes, shown)
        _draw_keys(axes, shown.lines, _CHART[1] - bottom - top)
        if shown.unit_square:
            _unit_square(axes)
        if shown.bars is not None:
            _draw_bars(axes, shown.bars, unit_square=shown.unit_square)
        axes.set_xlabel(_name(shown.x, _LONGEST_LABEL))
        y = _name(shown.y, _LONGEST_LABEL)
        axes.set_ylabel(y, rotation_mode="anchor", ha="center", va="bottom")
        return _picture(figure, shown.says)


def tiles(gallery: Gallery, most_bytes: int) -> list[Picture]:
    """A gallery's pictures, as PNG; a caption is a picture's words.

    Args:
        gallery: what is shown.
        most_bytes: of all its pixels together; if they are more, each picture is made smaller.

    Raises:
        ValueError: if pictures or captions are not what `Gallery` says.
    """
    pictures, captions = gallery.pictures, gallery.captions
    if pictures.ndim != 4 or pictures.shape[-1] != 3 or pictures.dtype != np.uint8:
        raise ValueError(f"pictures of shape {pictures.shape}, {pictures.dtype}: not (N, H, W, 3)")
    if len(captions) != len(pictures):
        raise ValueError(f"{len(captions)} captions of {len(pictures)} pictures")
    factor = min(1.0, math.sqrt(most_bytes / max(1, pictures.nbytes)))
    height, width = (max(1, int(side * factor)) for side in pictures.shape[1:3])
    return [
        _png(pixels, (width, height), caption or gallery.says)
        for pixels, caption in zip(pictures, captions, strict=True)
    ]


def _png(pixels: NDArray[np.uint8], size: tuple[int, int], alt: str) -> Picture:
    picture, content = Image.fromarray(pixels), io.BytesIO()
    if picture.size != size:
        picture = picture.resize(size, Image.Resampling.BOX)
    picture.save(content, format="PNG", optimize=True)
    return Picture("data:image/png;base64," + base64.b64encode(content.getvalue()).decode(), alt)


def participation(
    sites: Sequence[str],
    rounds: Sequence[int],
    status: Callable[[str, int], Status | None],
    inches: float,
) -> Picture:
    """Who took part: a strip of rounds for each site, coloured by what became of it.

    `inches` is how broad it is; where there is no room for letters, colours stand alone, and the
    counts beside them.
    """
    codes = np.array(
        [
            [-1 if (s := status(site, n)) is None else STATUSES.index(s) for n in rounds]
            for site in sites
        ]
    )
    names = [_name(site) for site in sites]
    left = 0.3 + 0.082 * max(map(len, names))
    with _figure(inches, 0.4 + 0.34 * len(sites), (left, 0.3, 0.1, 0.1)) as (figure, axes):
        shown = np.ma.masked_less(codes, 0)
        colours = ListedColormap([STATUS_COLOURS[name] for name in STATUSES])
        axes.imshow(
            shown,
            aspect="auto",
            cmap=colours,
            vmin=-0.5,
            vmax=len(STATUSES) - 0.5,
            interpolation="nearest",
        )
        axes.set_yticks(range(len(sites)), names)
        _round_ticks(axes, rounds, _TICKS * inches)
        axes.grid(visible=False)
        axes.spines[:].set_visible(False)
        axes.tick_params(which="both", length=0)
        _separate(axes, codes, _MOST_LETTERS * inches)
        return _picture(
            figure,
            f"Who took part in rounds {rounds[0]} to {rounds[-1]}; counts are below.",
        )


# --- Drawing ----------------------------------------------------------------------------------


@contextmanager
def _figure(
    width: float, height: float, margins: tuple[float, float, float, float] = _MARGINS
) -> Iterator[tuple[Figure, Axes]]:
    """A figure of one plot; sizes and margins (left, bottom, right, top) are in inches."""
    left, bottom, right, top = margins
    inner = (width - left - right) / width, (height - bottom - top) / height
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(width, height))
        yield figure, figure.add_axes((left / width, bottom / height, *inner))


def _picture(figure: Figure, alt: str) -> Picture:
    content = io.StringIO()
    with warnings.catch_warnings(), _quiet_fonts():
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        metadata = {"Date": None, "Creator": None, "Format": None, "Type": None}
        figure.savefig(content, format="svg", metadata=metadata)
    svg = content.getvalue().replace("'DejaVu Sans'", FONTS)
    return Picture("data:image/svg+xml;base64," + base64.b64encode(svg.encode()).decode(), alt)


@contextmanager
def _quiet_fonts() -> Iterator[None]:
    """Missing glyphs are the page's affair: the text is drawn in its font."""
    log = logging.getLogger("matplotlib.font_manager")
    before = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(before)


def _draw_series(axes: Axes, series: Series, colour: str, style: Any) -> None:
    rounds = np.asarray(series.rounds)
    value, low, high = (
        np.array([getattr(e, key) for e in series.estimates], dtype=np.float64)
        for key in ("value", "low", "high")
    )
    axes.fill_between(rounds, low, high, color=colour, alpha=0.16, linewidth=0)
    marker = "o" if len(rounds) <= _MARKS else None
    axes.plot(
        rounds,
        value,
        color=colour,
        linestyle=style,
        linewidth=1.8,
        marker=marker,
        markersize=4.5,
        label=series.name,
    )


def _draw_lines(axes: Axes, shown: Chart) -> None:
    lines = shown.lines
    if len(lines) == 1:
        _draw_limits(axes, lines[0])
    styles = zip(cycle(_LINES), cycle(_STYLES), strict=False)
    for (colour, style), marker, one in zip(styles, cycle(_MARKERS), lines, strict=False):
        axes.plot(
            one.x,
            one.y,
            color=colour,
            linestyle=style,
            linewidth=1.6 if one.marks else 1.8,
            marker=marker if one.marks else None,
            markersize=5,
            drawstyle="steps-pre" if one.steps else "default",
            label=_name(one.name),
        )


def _columns_of_keys(lines: Sequence[Line]) -> int:
    return 1 if max(len(_name(one.name)) for one in lines) > _BROADEST_KEY else 2


def _lines_of_keys(lines: Sequence[Line]) -> int:
    """How many lines of keys stand below a chart; none of a single curve, none of a crowd."""
    if not 1 < len(lines) <= _MOST_KEYS or not any(one.name for one in lines):
        return 0
    return -(-len(lines) // _columns_of_keys(lines))


def _draw_keys(axes: Axes, lines: Sequence[Line], inches: float) -> None:
    """Below axes so many inches tall, where they hide no curve."""
    if not _lines_of_keys(lines):
        return
    axes.legend(
        loc="upper left",
        bbox_to_anchor=(-0.04, -0.46 / inches),
        ncols=_columns_of_keys(lines),
        handlelength=2.2,
        labelspacing=0.35,
        borderaxespad=0,
    )


def _never_below_zero(axes: Axes, series: Sequence[Series]) -> None:
    """Of what is nowhere negative the axis does not go on below zero."""
    limits = [e for one in series for e in one.estimates]
    known = [v for e in limits for v in (e.value, e.low, e.high) if v is not None]
    if known and min(known) >= 0 > axes.get_ylim()[0]:
        axes.set_ylim(bottom=0)


def _draw_limits(axes: Axes, line: Line) -> None:
    """A band, or a bar at each mark."""
    if line.low is None or line.high is None:
        return
    at = line.x if line.limits_at is None else line.limits_at
    if line.marks:
        bars = np.abs(np.stack([line.y - line.low, line.high - line.y]))
        axes.errorbar(line.x, line.y, yerr=bars, fmt="none", elinewidth=1.2, ecolor=_BAR)
    else:
        axes.fill_between(at, line.low, line.high, color=BLUE, alpha=0.16, linewidth=0)


def _draw_bars(axes: Axes, bars: Bars, *, unit_square: bool) -> None:
    """Bars below the curves, the tallest a sixth of the frame."""
    limits = axes.axis()
    left, right, ground, top = (0, 1, 0, 1) if unit_square else limits
    heights = bars.counts / max(1, bars.counts.max(initial=0)) * 0.16 * (top - ground)
    width = 0.05 * (right - left)
    axes.bar(bars.x, heights, width=width, bottom=ground, color=_GROUND_BAR, zorder=1)
    axes.axis(limits)


def _unit_square(axes: Axes) -> None:
    axes.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), aspect="equal")
    ticks = [0, 0.25, 0.5, 0.75, 1]
    axes.set_xticks(ticks, ["0", ".25", ".5", ".75", "1"])
    axes.set_yticks(ticks, ["0", ".25", ".5", ".75", "1"])


def _round_ticks(axes: Axes, rounds: Sequence[int], most: float) -> None:
    step = max(1, round(len(rounds) / most))
    places = [0, *range(step - 1 if step > 1 else 1, len(rounds), step)]
    places = [place for place in places if place == 0 or place >= step / 2]
    axes.set_xticks(places, [str(rounds[place]) for place in places])


def _separate(axes: Axes, codes: NDArray[np.int64], most: float) -> None:
    """White lines between the cells, and a letter in each that is not as it should be."""
    sites, rounds = codes.shape
    axes.set_yticks(np.arange(sites + 1) - 0.5, minor=True)
    axes.grid(visible=True, which="minor", axis="y", color="white", linewidth=3)
    if rounds > most:
        return
    axes.set_xticks(np.arange(rounds + 1) - 0.5, minor=True)
    axes.grid(visible=True, which="minor", axis="x", color="white", linewidth=1.5)
    for site, number in np.argwhere(codes > 0):
        status = STATUSES[codes[site, number]]
        colour = "white" if status == "refused" else _INK
        axes.text(
            number, site, _LETTERS[status], ha="center", va="center", fontsize=8.5, color=colour
        )


def _name(text: str, longest: int = _LONGEST_NAME) -> str:
    """A text from outside, in one short line."""
    clean = "".join(c if unicodedata.category(c)[0] != "C" else " " for c in text)
    return clean if len(clean) <= longest else clean[: longest - 1] + "…"


# --- In words ---------------------------------------------------------------------------------


def _in_words(series: Series) -> str:
    known = [
        (n, e.value)
        for n, e in zip(series.rounds, series.estimates, strict=True)
        if e.value is not None
    ]
    if not known:
        return f"{series.name.capitalize()}: no value."
    (first, start), (last, end) = known[0], known[-1]
    return f"{series.name.capitalize()}: {start:.3f} in round {first}, {end:.3f} in round {last}."
