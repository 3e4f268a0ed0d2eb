"""One run as its own hospital sees it: losses, numbers of patients, what it cost. It never leaves.

The page carries its figure in itself and loads nothing; every text that a coordinator chose is
escaped.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib as mpl
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from client.book import Book
from client.diary import Page
from common import accounting
from common.errors import ConfigError
from common.files import write_durably
from deploy.node_picture import STYLE

_TEMPLATE = "node_run.html.j2"
_LOSS, _PATIENTS = "#0072B2", "#E69F00"


class RunAtSite(NamedTuple):
    """What the page shows.

    Attributes:
        site: the site's name.
        digest: of the run's spec.
        name, state: of the run.
        attempted, released: rounds.
        epsilon: what its attempts cost at `delta`, by PLD; None without privacy or a budget.
        delta: the budget's.
        pages: of the diary, in the order in which they were written.
    """

    site: str
    digest: str
    name: str
    state: str
    attempted: int
    released: int
    epsilon: float | None
    delta: float | None
    pages: Sequence[Page]


def run_at_site(book: Book, digest: str, pages: Sequence[Page]) -> RunAtSite:
    """Gather it from the ledger and the diary."""
    run, delta = book.run(digest), book.limit and book.limit.delta
    spent = run.spent()
    return RunAtSite(
        site=book.site,
        digest=digest,
        name=run.name,
        state=run.state or "never set aside",
        attempted=len(run.attempts),
        released=len(run.released),
        epsilon=accounting.epsilon(spent, delta) if spent and delta else None,
        delta=delta,
        pages=pages,
    )


def write_page(path: Path, shown: RunAtSite) -> None:
    """Write the page, readable by its owner alone.

    Raises:
        ConfigError: if it cannot be written, or the name does not end in .html: a slip must not
            write over the node's key.
    """
    if path.suffix.lower() not in (".html", ".htm"):
        raise ConfigError(f"{path}: expected a name that ends in .html")
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template(_TEMPLATE).render(
        run=shown, figure=_figure(shown.pages) if shown.pages else None
    )
    try:
        path.touch(mode=0o600)
        write_durably(path, page.encode())
        path.chmod(0o600)
    except OSError as error:
        raise ConfigError(f"{path}: the page cannot be written ({error})") from error


def _figure(pages: Sequence[Page]) -> str:
    """A data URI of the loss and of the patients in each step, by round."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(9, 3.4), layout="constrained")
        left, right = figure.subplots(1, 2)
        _losses(left, pages)
        _patients(right, pages)
        content = io.BytesIO()
        figure.savefig(content, format="svg")
    return f"data:image/svg+xml;base64,{base64.b64encode(content.getvalue()).decode()}"


def _losses(axes: Axes, pages: Sequence[Page]) -> None:
    known = [(page.round_number, page.mean_loss) for page in pages if page.mean_loss is not None]
    axes.plot([n for n, _ in known], [loss for _, loss in known], color=_LOSS, marker=".")
    _label(axes, "mean loss of the sampled patients")


def _patients(axes: Axes, pages: Sequence[Page]) -> None:
    steps: list[Any] = [(page.round_number, count) for page in pages for count in page.patients]
    axes.scatter([n for n, _ in steps], [count for _, count in steps], s=9, color=_PATIENTS)
    axes.margins(y=0.08)
    axes.set_ylim(bottom=0)
    _label(axes, "patients sampled in each step")


def _label(axes: Axes, title: str) -> None:
    axes.set_title(title)
    axes.set_xlabel("round")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(axis="y")
