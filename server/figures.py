"""The report's figures: matplotlib, each an SVG inside a data URI, with a text alternative.

Colours are of Okabe and Ito's set, which people with any colour vision can tell apart; what a
colour says is also said by a line's style, a letter or a table. Text stays text and takes the
page's font. Names in a figure are untrusted: they are never parsed as mathematics.
"""

from __future__ import annotations

import base64
import io
import logging
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

from common.tasks.metrics import Estimate
from server.curves import GRID, Calibration, Curve
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
_STYLES = ("-", (0, (5, 2)), (0, (1.5, 1.5)))
_LONGEST_NAME = 26
_MOST_LETTERS = 80
_MOST_KEYS = 10
_MARGINS = (0.6, 0.52, 0.12, 0.38)
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


@dataclass(frozen=True)
class Named:
    """A curve and what it is of; the empty name where there is only one."""

    name: str
    curve: Curve


def by_round(title: str, series: Sequence[Series], chosen: int | None) -> Picture:
    """A metric by round with its interval bands, and a mark at the `chosen` round."""
    with _figure(4.9, 2.75) as (figure, axes):
        axes.set_title(title)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8, steps=[1, 2, 5, 10]))
        axes.set_xlabel("round")
        colours = {"test": (BLUE, "-"), "validation": (VERMILION, (0, (4, 2)))}
        for one in series:
            _draw_series(axes, one, *colours[one.name])
        if chosen is not None:
            axes.axvline(chosen, color=_MUTED, linewidth=1, linestyle=(0, (1, 2)), zorder=1)
        axes.margins(x=0.02)
        if series:
            axes.legend(loc="best", ncols=2, handlelength=2.2)
        return _picture(figure, f"{title} by round. " + " ".join(map(_in_words, series)))


def roc_figure(curves: Sequence[Named]) -> Picture:
    """Receiver operating curves; a single one has its band."""
    with _figure(3.9, 3.7) as (figure, axes):
        axes.set_title("Receiver operating curve")
        axes.plot([0, 1], [0, 1], color=_MUTED, linewidth=1, linestyle=(0, (1, 2)))
        _draw_curves(axes, curves, axes.plot)
        _unit_square(axes, "1 − specificity", "sensitivity")
        return _picture(
            figure,
            "Receiver operating curve: "
            + _points_in_words(
                curves, "at a false positive rate of", "the sensitivity is", (0.05, 0.1, 0.2)
            ),
        )


def precision_recall_figure(curves: Sequence[Named], prevalence: float | None) -> Picture:
    """Precision-recall curves; the dotted line is the precision of chance."""
    with _figure(3.9, 3.7) as (figure, axes):
        axes.set_title("Precision and recall")
        if prevalence is not None:
            axes.axhline(prevalence, color=_MUTED, linewidth=1, linestyle=(0, (1, 2)))
        _draw_curves(axes, curves, _stepping(axes))
        _unit_square(axes, "recall (sensitivity)", "precision")
        return _picture(
            figure,
            "Precision-recall curve: "
            + _points_in_words(curves, "at a recall of", "the precision is", (0.5, 0.8, 0.95)),
        )


def calibration_figure(found: Calibration) -> Picture:
    """The reliability diagram over a histogram of the images in each bin."""
    with _figure(3.9, 3.7) as (figure, axes):
        axes.set_title("Calibration")
        axes.plot([0, 1], [0, 1], color=_MUTED, linewidth=1, linestyle=(0, (1, 2)))
        width = found.images / found.images.max() * 0.16
        axes.bar(found.confidence, width, width=0.05, color="#C9D6DC", zorder=1)
        bars = np.abs(np.stack([found.frequency - found.low, found.high - found.frequency]))
        axes.errorbar(
            found.confidence,
            found.frequency,
            yerr=bars,
            color=BLUE,
            marker="o",
            markersize=5,
            linewidth=1.6,
            elinewidth=1.2,
            ecolor="#7FB8D8",
        )
        _unit_square(axes, "predicted probability", "observed frequency")
        pairs = zip(found.confidence, found.frequency, found.images, strict=True)
        words = "; ".join(f"{c:.2f} predicted, {f:.2f} observed, {n} images" for c, f, n in pairs)
        return _picture(figure, f"Reliability diagram, by bin: {words}.")


def participation(
    sites: Sequence[str], rounds: Sequence[int], status: Callable[[str, int], Status | None]
) -> Picture:
    """Who took part: a strip of rounds for each site, coloured by what became of it."""
    codes = np.array(
        [
            [-1 if (s := status(site, n)) is None else STATUSES.index(s) for n in rounds]
            for site in sites
        ]
    )
    names = [_name(site) for site in sites]
    left = 0.3 + 0.082 * max(map(len, names))
    with _figure(10.6, 0.4 + 0.34 * len(sites), (left, 0.3, 0.1, 0.1)) as (figure, axes):
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
        _round_ticks(axes, rounds)
        axes.grid(visible=False)
        axes.spines[:].set_visible(False)
        axes.tick_params(which="both", length=0)
        _separate(axes, codes)
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
    marker = "o" if len(rounds) == 1 else None
    axes.plot(
        rounds,
        value,
        color=colour,
        linestyle=style,
        linewidth=1.8,
        marker=marker,
        label=series.name,
    )


def _draw_curves(axes: Axes, curves: Sequence[Named], draw: Callable[..., Any]) -> None:
    if len(curves) == 1:
        axes.fill_between(
            GRID, curves[0].curve.low, curves[0].curve.high, color=BLUE, alpha=0.16, linewidth=0
        )
    styles = ((colour, style) for style in cycle(_STYLES) for colour in _LINES)
    for (colour, style), one in zip(styles, curves, strict=False):
        draw(
            one.curve.x,
            one.curve.y,
            color=colour,
            linestyle=style,
            linewidth=1.8,
            label=_name(one.name),
        )
    if 1 < len(curves) <= _MOST_KEYS:
        axes.legend(loc="lower right", handlelength=2.2)


def _stepping(axes: Axes) -> Callable[..., Any]:
    def draw(x: NDArray[Any], y: NDArray[Any], **style: Any) -> None:
        axes.plot(x, y, drawstyle="steps-pre", **style)

    return draw


def _unit_square(axes: Axes, x: str, y: str) -> None:
    axes.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), aspect="equal", xlabel=x)
    axes.set_ylabel(y, rotation_mode="anchor", ha="center", va="bottom")
    ticks = [0, 0.25, 0.5, 0.75, 1]
    axes.set_xticks(ticks, ["0", ".25", ".5", ".75", "1"])
    axes.set_yticks(ticks, ["0", ".25", ".5", ".75", "1"])


def _round_ticks(axes: Axes, rounds: Sequence[int]) -> None:
    step = max(1, round(len(rounds) / 10))
    places = [0, *range(step - 1 if step > 1 else 1, len(rounds), step)]
    places = [place for place in places if place == 0 or place >= step / 2]
    axes.set_xticks(places, [str(rounds[place]) for place in places])


def _separate(axes: Axes, codes: NDArray[np.int64]) -> None:
    """White lines between the cells, and a letter in each that is not as it should be."""
    sites, rounds = codes.shape
    axes.set_yticks(np.arange(sites + 1) - 0.5, minor=True)
    axes.grid(visible=True, which="minor", axis="y", color="white", linewidth=3)
    if rounds > _MOST_LETTERS:
        return
    axes.set_xticks(np.arange(rounds + 1) - 0.5, minor=True)
    axes.grid(visible=True, which="minor", axis="x", color="white", linewidth=1.5)
    for site, number in np.argwhere(codes > 0):
        status = STATUSES[codes[site, number]]
        colour = "white" if status == "refused" else _INK
        axes.text(
            number, site, _LETTERS[status], ha="center", va="center", fontsize=8.5, color=colour
        )


def _name(text: str) -> str:
    """A name from outside, in one short line."""
    clean = "".join(c if unicodedata.category(c)[0] != "C" else " " for c in text)
    return clean if len(clean) <= _LONGEST_NAME else clean[: _LONGEST_NAME - 1] + "…"


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


def _points_in_words(curves: Sequence[Named], at: str, reads: str, places: Sequence[float]) -> str:
    words = []
    for one in curves:
        values = np.interp(places, one.curve.x, one.curve.y)
        pairs = (f"{at} {p:g} {reads} {v:.2f}" for p, v in zip(places, values, strict=True))
        words.append((f"{_name(one.name)}: " if one.name else "") + ", ".join(pairs))
    return "; ".join(words) + "."
