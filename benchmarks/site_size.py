"""What size of site differential privacy takes: curves by simulation, in one picture.

    python benchmarks/site_size.py                       # all that is not there yet
    python benchmarks/site_size.py --only classification --seeds 1

Four sites at epsilon 8 and delta 1e-4 each. Two kinds of curve:

- ``drawn``, of PneumoniaMNIST: each site has N images, drawn from the training part, and every
  step takes one in eight of them. Nothing is put on: epsilon is 8 at each N.
- ``scaled``, where there are not enough patients to draw from: the sites keep the patients that
  there are, and the noise on the mean gradient of a step is that of a site of N patients from
  which every step takes the same part. Its sum has the noise of epsilon 8; the mean is over N / 30
  times as many patients (N / 51 for BCCD). What so many patients would teach beyond those that
  are there, is not in the curve, and its runs themselves spend far more than epsilon 8.

Runs are kept and read as those of ``benchmarks/tasks.py``.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean
from typing import Literal

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from tasks import DATA, HERE, TRIALS, cohort_of, conduct, figures, finished, lines
from tasks import changed as with_keys

from common.accounting import planned
from common.files import write_durably
from common.spec import parse_run_text

DOCS = HERE.parent / "docs"
EPSILON = "target_epsilon = 8.0"


@dataclass(frozen=True)
class Curve:
    """One curve, and what it is drawn beside.

    Attributes:
        title: for people.
        kind: see above.
        plain: the trial of `tasks` that is this without privacy, at the sites of the table.
        preset: below ``benchmarks``.
        data: of `cohort_of`.
        sizes: N, patients or images of each site.
        there: of each site, where noise is scaled.
        changes: keys of the preset that are other here.
    """

    title: str
    kind: Literal["drawn", "scaled"]
    plain: str
    preset: str
    data: str
    sizes: tuple[int, ...]
    there: int = 0
    changes: Mapping[str, str] = field(default_factory=dict)


FIGURES = {
    "Classification": "AUROC",
    "Denoising": "PSNR (dB)",
    "Generation": "AUROC on real images",
    "Segmentation": "Dice",
    "Detection": "mAP at 0.5",
}
_SIZES = (50, 100, 200, 400, 800, 1177)
_PNEUMONIA = {"privacy.target_epsilon": "8.0"}
CURVES = {
    "classification": Curve(
        "Classification",
        "drawn",
        "classification",
        "pneumonia/eps3",
        "pneumonia",
        _SIZES,
        changes=_PNEUMONIA,
    ),
    "denoising": Curve(
        "Denoising", "drawn", "denoising", "tasks/denoising-eps8", "pneumonia", _SIZES
    ),
    "generation": Curve(
        "Generation", "drawn", "generation", "tasks/generation-eps8", "pneumonia", _SIZES
    ),
    "hippocampus": Curve(
        "Segmentation",
        "scaled",
        "hippocampus",
        "tasks/hippocampus-eps8",
        "hippocampus",
        (30, 1000, 3000, 9000),
        there=30,
    ),
    "bccd": Curve(
        "Detection", "scaled", "bccd", "tasks/bccd-eps8", "bccd", (51, 1700, 5100, 9000), there=51
    ),
}


def main() -> None:
    """Run what is asked for and missing, then draw what there is."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", nargs="+", choices=CURVES, default=list(CURVES))
    parser.add_argument("--sizes", nargs="+", type=int, help="only these")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1])
    parser.add_argument("--rounds", type=int, help="other than the preset's, for a trial run")
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--work", type=Path, default=HERE.parent / "runs" / "tasks")
    parser.add_argument("--docs", type=Path, default=DOCS)
    parser.add_argument("--draw", action="store_true", help="run nothing")
    asked = parser.parse_args()
    for seed in () if asked.draw else asked.seeds:
        for name in asked.only:
            for size in CURVES[name].sizes:
                if size != CURVES[name].there and size in (asked.sizes or CURVES[name].sizes):
                    text = text_of(CURVES[name], size, seed, asked.rounds)
                    run(name, size, text, asked.work, data=asked.data)
    draw(asked.work, asked.docs)


def run(name: str, size: int, text: str, work: Path, *, data: Path) -> Path:
    """The folder of the finished run of one point of a curve, whose file is `text`."""
    curve = CURVES[name]
    fewer = None if curve.kind == "scaled" else 4 * size
    cohort = cohort_of(curve.data, work, data, text, fewer=fewer)
    seed = parse_run_text(text, source=curve.preset).spec.seed
    place = work / "sizes" / name / str(size) / f"seed-{seed}"
    return conduct(place, text, cohort, curve.there or size)


def text_of(curve: Curve, size: int, seed: int, rounds: int | None = None) -> str:
    """The run's file of one point."""
    text = (HERE / f"{curve.preset}.toml").read_text()
    changes = dict(curve.changes) | {"seed": str(seed)}
    if curve.kind != "scaled":
        changes["local.batch_size"] = str(-(-size // 8))
    if rounds is not None:
        changes |= {"rounds": str(rounds)}
    text = with_keys(text, changes)
    if curve.kind == "scaled":
        mechanism = planned(parse_run_text(text, source=curve.preset).spec, curve.there)
        if mechanism is None:
            raise ValueError(f"{curve.preset}: expected a preset with differential privacy")
        scaled = mechanism.noise_multiplier * curve.there / size
        return text.replace(EPSILON, f"noise_multiplier = {scaled:.6g}")
    return text


# --- The picture --------------------------------------------------------------------------------


def points(work: Path, name: str) -> dict[int, list[dict[str, float | None]]]:
    """By size, the headline of each seed with its interval."""
    found: dict[int, list[dict[str, float | None]]] = {}
    for size in CURVES[name].sizes:
        place = work / "sizes" / name / str(size)
        if size == CURVES[name].there:  # nothing is scaled: it is the run of the table
            place = work / "runs" / Path(CURVES[name].preset).name
        folders = sorted(place.glob("seed-*/*/report.html"))
        if folders:
            found[size] = [next(iter(figures(page.parent).values())).to_json() for page in folders]
    return found


def draw(work: Path, docs: Path) -> None:
    """``images/site-size.png``, and its figures in ``site-size.json``."""
    found = {name: points(work, name) for name in CURVES}
    kept = {name: by_size for name, by_size in found.items() if by_size}
    titles = list(dict.fromkeys(CURVES[name].title for name in kept))
    if not titles:
        return
    columns = min(2, len(titles))
    rows = -(-len(titles) // columns)
    figure = Figure(figsize=(4.5 * columns, 3.2 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis, title in zip(axes.flat, titles, strict=False):
        for name, by_size in kept.items():
            if CURVES[name].title == title:
                _line(axis, name, by_size)
                _plain(axis, work, CURVES[name].plain)
        axis.set(title=title, xscale="log", xlabel="patients (images) of each of four sites")
        axis.set_ylabel(FIGURES[title])
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    for axis in axes.flat[len(titles) :]:
        axis.remove()
    (docs / "images").mkdir(parents=True, exist_ok=True)
    figure.savefig(docs / "images" / "site-size.png", dpi=120)
    write_durably(docs / "site-size.json", f"{json.dumps(kept, indent=1)}\n".encode())


def _line(axis: Axes, name: str, by_size: Mapping[int, list[dict[str, float | None]]]) -> None:
    """One curve: the mean over the seeds, the widest of their 95 % intervals."""
    sizes = sorted(by_size)
    each = [
        [[one[key] or 0.0 for one in by_size[size]] for key in ("value", "low", "high")]
        for size in sizes
    ]
    values = [mean(value) for value, _, _ in each]
    below = [value - min(low) for value, (_, low, _) in zip(values, each, strict=True)]
    above = [max(high) - value for value, (_, _, high) in zip(values, each, strict=True)]
    label = {"drawn": "ε = 8", "scaled": "noise of ε = 8 at that size"}[CURVES[name].kind]
    axis.errorbar(sizes, values, yerr=[below, above], marker="o", capsize=3, label=label)


def _plain(axis: Axes, work: Path, trial: str) -> None:
    """What the table has without privacy, if it is there."""
    folders = finished(work, trial)
    if folders and (value := lines(TRIALS[trial], folders)[0].value) is not None:
        axis.axhline(value, color="grey", linestyle="--", label="no privacy (table)")


if __name__ == "__main__":
    main()
