"""A run in words: what it will do and cost before it runs, what it reached and cost after."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from common import accounting
from common.errors import SpecError
from common.spec import DpSgd, RunSpec, read_run_file
from deploy.run_words import sentences
from deploy.simulation import read_simulation

_ARROW = "  • "


def explain_run(run_file: Path, declared_sizes: list[int]) -> Iterator[RenderableType]:
    """What the run in `run_file` will do, and its price for each site.

    Args:
        run_file: the run's TOML file.
        declared_sizes: sizes to price it for, beside the sites of its ``[simulation]`` table.

    Raises:
        SpecError: if the file is wrong, or the run makes no sense at one of the sizes.
    """
    read = read_run_file(run_file)
    sites = {f"a site of {size}": size for size in declared_sizes}
    if read.simulation:
        simulation = read_simulation(read.simulation, str(run_file))
        sites |= {name: simulation.declared(n) for n, name in enumerate(simulation.names)}
    spec = read.spec
    yield Text(f"{spec.name}", style="bold")
    yield Text(f"digest {spec.digest}", style="dim")
    for line in sentences(spec):
        yield Text(_ARROW + line)
    yield from _price(spec, sites)


def _price(spec: RunSpec, sites: dict[str, int]) -> Iterator[RenderableType]:
    privacy = spec.privacy
    if not isinstance(privacy, DpSgd):
        return
    if not sites:
        yield Text("price: name a site's declared size with --declared-size", style="yellow")
        return
    table = Table(title=f"what it costs each site, per {privacy.unit}", title_justify="left")
    for column in ("site", "declared size", "sampling rate", "noise", "steps", "ε", "δ"):
        table.add_column(column, justify="left" if column == "site" else "right")
    for name, declared in sites.items():
        mechanism = accounting.planned(spec, declared)
        if mechanism is None:
            raise SpecError("a run with DP-SGD has no mechanism")
        cost = accounting.epsilon([mechanism], privacy.delta)
        table.add_row(
            name,
            str(declared),
            f"{mechanism.sampling_rate:.4f}",
            f"{mechanism.noise_multiplier:.3f}",
            str(mechanism.steps),
            f"{cost:.3f}",
            f"{privacy.delta:g}",
        )
    yield table
    yield Text(
        "ε by PLD for adding or removing one "
        f"{privacy.unit}'s whole record, over the whole run; a retried round costs again.",
        style="dim",
    )


def outcome(folder: Path) -> Iterator[RenderableType]:
    """What the finished run in `folder` reached, and what each site spent."""
    privacy = json.loads((folder / "privacy.json").read_text())
    last = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    yield Text(f"finished after {last['round']} rounds", style="bold")
    table = Table(title="what each site spent", title_justify="left")
    for column in ("site", "declared size", "unit", "rounds", "ε", "δ"):
        table.add_column(column, justify="left" if column == "site" else "right")
    for name, site in privacy["sites"].items():
        spent = "no privacy" if site["epsilon"] is None else f"{site['epsilon']:.3f}"
        delta = "–" if site["delta"] is None else f"{site['delta']:g}"
        table.add_row(
            name, str(site["declared_size"]), site["unit"], str(site["rounds"]), spent, delta
        )
    yield table
    if again := [n for n, s in privacy["sites"].items() if s["rounds"] > last["round"]]:
        yield Text(
            f"{', '.join(again)}: asked more often than there were rounds; one that is asked again "
            "after an interruption counts again, so that ε can exceed what the run's file asks for",
            style="yellow",
        )
    if not privacy["protected"]:
        yield Text(
            "accounted, not protected: the randomness of this simulation came from a seed",
            style="yellow",
        )
