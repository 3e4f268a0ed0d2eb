"""The picture of the de-identification report: what became of all objects of a source."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from typing import NamedTuple

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from client.intake.desk import State
from deploy.intake_report_words import TITLES
from deploy.node_picture import STYLE

_INK = "#1F2D36"
_NARROWEST = 0.045
"""Share of the bar from which on a part has room for its number."""
_COLUMNS = 4
_FONTS = "Inter, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, 'Liberation Sans', sans-serif"


class _Part(NamedTuple):
    """A part of the bar: colours of Okabe and Ito's set, and a hatch that says it without them."""

    title: str
    colour: str
    hatch: str
    light: bool


_PARTS: Mapping[str, _Part] = {
    State.KEPT: _Part("kept", "#0072B2", "", True),
    "blanked": _Part("kept, with pixels blanked", "#56B4E9", "", False),
    State.WAITS: _Part(TITLES[State.WAITS], "#E69F00", "//", False),
    State.REJECTED: _Part(TITLES[State.REJECTED], "#CC79A7", "xx", False),
    State.REFUSED: _Part(TITLES[State.REFUSED], "#3B4750", "", True),
    State.COPY: _Part(TITLES[State.COPY], "#B9C2C5", "..", False),
    State.IGNORED: _Part(TITLES[State.IGNORED], "#DFE3E2", "", False),
    State.GONE: _Part(TITLES[State.GONE], "#F0E442", "--", False),
    State.OPEN: _Part(TITLES[State.OPEN], "#FFFFFF", "", False),
    State.ASIDE: _Part(TITLES[State.ASIDE], "#FFFFFF", "oo", False),
}


class Picture(NamedTuple):
    """An image for a page: a data URI, and what it shows in words."""

    uri: str
    alt: str


def fate(objects: Mapping[str, int], blanked: int) -> Picture | None:
    """One bar of all objects by what became of them; None if there are none.

    Args:
        objects: how many, by state, and "all".
        blanked: how many of the kept ones have blanked pixels.
    """
    counts = {name: objects.get(name, 0) for name in _PARTS}
    counts["blanked"] = blanked
    counts[State.KEPT] -= blanked
    drawn = {name: count for name, count in counts.items() if count > 0}
    if not drawn:
        return None
    with mpl.rc_context(STYLE | {"svg.hashsalt": "cloister", "hatch.linewidth": 0.7}):
        figure = Figure(figsize=(9.6, 1.4), facecolor="none")
        _bar(figure.add_axes((0, 0.5, 1, 0.48)), drawn)
        content = io.StringIO()
        metadata = {"Date": None, "Creator": None, "Format": None, "Type": None}
        figure.savefig(content, format="svg", metadata=metadata)
    told = ", ".join(f"{count} {_PARTS[name].title}" for name, count in drawn.items())
    svg = content.getvalue().replace("'DejaVu Sans'", _FONTS)
    uri = f"data:image/svg+xml;base64,{base64.b64encode(svg.encode()).decode()}"
    return Picture(uri, f"What became of the objects: {told}.")


def _bar(axes: Axes, drawn: Mapping[str, int]) -> None:
    total, left = sum(drawn.values()), 0
    for name, count in drawn.items():
        part = _PARTS[name]
        axes.barh(
            0,
            count,
            left=left,
            color=part.colour,
            label=f"{part.title}: {count:,}",
            edgecolor=_INK,
            linewidth=0.6,
            hatch=part.hatch,
        )
        if count / total >= _NARROWEST:
            colour = "white" if part.light else _INK
            plate = (
                None if part.light else {"facecolor": part.colour, "edgecolor": "none", "pad": 2}
            )
            axes.text(
                left + count / 2,
                0,
                f"{count:,}",
                ha="center",
                va="center",
                color=colour,
                fontsize=13,
                bbox=plate,
            )
        left += count
    axes.set(xlim=(0, total), ylim=(-0.42, 0.42))
    axes.axis("off")
    _keys(axes)


def _keys(axes: Axes) -> None:
    """Below the bar, row by row in the bar's order; matplotlib would fill columns."""
    handles, labels = axes.get_legend_handles_labels()
    order = [place for start in range(_COLUMNS) for place in range(start, len(labels), _COLUMNS)]
    axes.legend(
        [handles[place] for place in order],
        [labels[place] for place in order],
        loc="upper left",
        bbox_to_anchor=(-0.008, -0.04),
        ncols=_COLUMNS,
        fontsize=10,
        columnspacing=1.6,
    )
