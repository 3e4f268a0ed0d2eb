"""Every task, with and without differential privacy: four sites, real data, one table.

    python benchmarks/tasks.py                              # all that is not there yet
    python benchmarks/tasks.py --only hippocampus bccd --seeds 1
    python benchmarks/tasks.py --table                      # the table alone, of what is there
    python benchmarks/tasks.py --list

A trial is a run's file of ``benchmarks/tasks`` (or ``benchmarks/pneumonia``), its cohort and the
figure it is about. Each seed is one run of `cloister simulate`'s own engine in a folder of its own
below ``--work``; one that was cut off goes on, one that is finished is not run again, and one whose
file has changed is. The table goes into ``docs/results.md``, all figures into ``results.json``
beside it. The data is read from ``../shared/data``.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import mean, median
from typing import Any

import numpy as np
import task_cohorts
import torch
from numpy.typing import NDArray
from rich.console import Console

from client.intake.run import IntakeSummary
from common.accounting import Unit
from common.cohort import Cohort
from common.errors import ConfigError
from common.files import write_durably
from common.spec import RunSpec, read_run_file
from common.task_sections import Generation as Section
from common.tasks import metrics, pictures, task_for
from common.tasks.estimates import Estimate, Floats, estimates, means
from common.tasks.generation import SYNTHETIC, Drawn, Generation
from common.tasks.metrics import Predictions
from common.tasks.task import Evidence
from deploy import simulation
from server.record import RunRecord
from server.rounds import LogObserver

HERE = Path(__file__).resolve().parent
DATA = HERE.parents[1] / "shared" / "data"
PAGE = HERE.parent / "docs" / "results.md"
BEGIN, END = "<!-- made by benchmarks/tasks.py -->", "<!-- to here -->"

COHORTS: Mapping[str, Callable[[Path, Path, Path, RunSpec], IntakeSummary]] = {
    "hippocampus": task_cohorts.hippocampus,
    "hippocampus-3d": task_cohorts.hippocampus,
    "bccd": task_cohorts.bccd,
    "pneumonia": task_cohorts.pneumonia,
}
TSTR = "AUROC, trained on synthetic images"
REFERENCES = tuple(
    f"PSNR above {what} (dB)" for what in ("the noisy image", "median 3x3", "median 5x5")
)
REAL = "The same classifiers, trained on real images"
BESIDE = "beside.json"
WORKERS = 2
_AS_LABELLED = "generation"  # PneumoniaMNIST is taken in once, with its labels, for all tasks
_SIXTEENTH = -3  # of the references of a reconstruction: a sixteenth of the numbers


@dataclass(frozen=True)
class Trial:
    """One line of the table.

    Attributes:
        name: by which it is asked for.
        preset: the run's file below ``benchmarks``, without its ending.
        data: a key of `COHORTS`.
        declared_size: of each of the four sites.
        title: for people.
        changes: keys of the preset that are other here, as ``table.key``.
        aims: by the title of a figure, at least so much.
    """

    name: str
    preset: str
    data: str
    declared_size: int
    title: str
    changes: Mapping[str, str] = field(default_factory=dict)
    aims: Mapping[str, float] = field(default_factory=dict)


TRIALS = {
    trial.name: trial
    for trial in (
        Trial(
            "hippocampus",
            "tasks/hippocampus",
            "hippocampus",
            30,
            "Segmentation",
            aims={"Dice": 0.83},
        ),
        Trial("hippocampus-eps8", "tasks/hippocampus-eps8", "hippocampus", 30, "Segmentation"),
        Trial("hippocampus-3d", "tasks/hippocampus-3d", "hippocampus-3d", 30, "Segmentation, 3-D"),
        Trial(
            "hippocampus-3d-eps8",
            "tasks/hippocampus-3d-eps8",
            "hippocampus-3d",
            30,
            "Segmentation, 3-D",
        ),
        Trial("bccd", "tasks/bccd", "bccd", 51, "Detection", aims={"mAP at 0.5": 0.6}),
        Trial("bccd-eps8", "tasks/bccd-eps8", "bccd", 51, "Detection"),
        Trial("generation", "tasks/generation", "pneumonia", 1177, "Generation", aims={TSTR: 0.88}),
        Trial(
            "generation-eps8",
            "tasks/generation-eps8",
            "pneumonia",
            1177,
            "Generation",
            aims={TSTR: 0.8},
        ),
        Trial(
            "denoising",
            "tasks/denoising",
            "pneumonia",
            1177,
            "Denoising",
            aims=dict.fromkeys(REFERENCES, 4.0),
        ),
        Trial("denoising-eps8", "tasks/denoising-eps8", "pneumonia", 1177, "Denoising"),
        Trial("compression", "tasks/compression", "pneumonia", 1177, "Compression"),
        Trial("anomalies", "tasks/anomalies", "pneumonia", 1177, "Anomalies"),
        Trial("classification", "pneumonia/none", "pneumonia", 1177, "Classification"),
        Trial(
            "classification-eps8",
            "pneumonia/eps3",
            "pneumonia",
            1177,
            "Classification",
            {"privacy.target_epsilon": "8.0"},
        ),
        Trial("vit-eps8", "tasks/vit-eps8", "pneumonia", 1177, "Classification, vit"),
        Trial("alexnet-eps8", "tasks/alexnet-eps8", "pneumonia", 1177, "Classification, alexnet"),
    )
}

PLAN = """
[simulation]
evaluation = "{cohort}"
cohort = "{cohort}"
partition = "iid"
sites = 4
declared_size = {size}
"""


@dataclass(frozen=True)
class Finished:
    """What a finished run says of its model, on the test part.

    Attributes:
        seed: of the run.
        round: whose model it is: the best by the validation part.
        rounds: of the run.
        metrics: by name, each with its interval over patients.
        validation: the headline on the validation part, by which settings are chosen; None
            without one.
        images: of the test part.
        patients: of the test part.
        unit: of privacy.
        epsilon: the largest of a site; None without privacy.
        delta: likewise.
        seconds: of the whole run.
    """

    seed: int
    round: int
    rounds: int
    metrics: Mapping[str, Estimate]
    validation: float | None
    images: int
    patients: int
    unit: Unit
    epsilon: float | None
    delta: float | None
    seconds: float


def main() -> None:
    """Run what is asked for and missing, then write the table."""
    asked = _asked()
    console = Console()
    if asked.list:
        for trial in TRIALS.values():
            console.print(f"{trial.name:20} benchmarks/{trial.preset}.toml", highlight=False)
        return
    if not asked.table:
        for seed in asked.seeds:
            for name in asked.only:
                console.print(f"[bold]{name}, seed {seed}")
                folder = run(TRIALS[name], seed, asked.work, data=asked.data, rounds=asked.rounds)
                console.print(figures(folder))
    write(asked.page, asked.work)


def _asked() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", nargs="+", choices=TRIALS, default=list(TRIALS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--rounds", type=int, help="other than the preset's, for a trial run")
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--work", type=Path, default=HERE.parent / "runs" / "tasks")
    parser.add_argument("--page", type=Path, default=PAGE)
    parser.add_argument("--table", action="store_true", help="run nothing")
    parser.add_argument("--list", action="store_true")
    return parser.parse_args()


class Progress(LogObserver):
    """Says on one line a round how far a run is, and how long it may take still."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._rounds = 0
        self._seconds: list[float] = []

    def run_opened(self, spec: RunSpec, sites: list[str], finished_rounds: int) -> None:
        """See `Observer`."""
        self._rounds = spec.rounds

    def round_closed(self, row: Mapping[str, Any]) -> None:
        """See `Observer`."""
        self._seconds.append(row["seconds"])
        left = (self._rounds - row["round"]) * median(self._seconds) / 60
        print(
            f"{self._name}: round {row['round']} of {self._rounds}, {left:.1f} min left",
            flush=True,
        )


# --- Running ------------------------------------------------------------------------------------


def run(trial: Trial, seed: int, work: Path, *, data: Path, rounds: int | None = None) -> Path:
    """The folder of a trial's finished run; it is run, or goes on, if it has to.

    Args:
        trial: which.
        seed: of partition, weights and noise.
        work: where cohorts and runs are kept.
        data: as ``../shared/data``.
        rounds: other than the preset's.
    """
    place = work / "runs" / trial.name / f"seed-{seed}"
    changes = {"seed": str(seed)} | dict(trial.changes)
    if rounds is not None:
        changes |= {"rounds": str(rounds), "evaluation.every": str(rounds)}
    text = changed((HERE / f"{trial.preset}.toml").read_text(), changes)
    cohort = cohort_of(trial.data, work, data, text)
    folder = conduct(place, text, cohort, trial.declared_size)
    spec, _ = simulation.load(folder)
    if spec.task.name == "generation" and not (place / BESIDE).exists():
        real = taught_on_real(spec, Cohort.open(cohort))
        write_durably(place / BESIDE, json.dumps({REAL: real.to_json()}).encode())
    return folder


def conduct(place: Path, text: str, cohort: Path, declared_size: int) -> Path:
    """The folder of the finished run of that file, four sites, below `place`; see `run`."""
    place.mkdir(parents=True, exist_ok=True)
    file = place / "run.toml"
    file.write_text(text + PLAN.format(cohort=cohort.resolve(), size=declared_size))
    folder = _begun(place, read_run_file(file).spec) or simulation.prepare(file, place)
    if not (folder / "report.html").exists():
        watched = f"{place.parent.name}, {place.name}"
        simulation.simulate(folder, workers=WORKERS, observer=Progress(watched))
    return folder


def changed(text: str, changes: Mapping[str, str]) -> str:
    """A run's file with other values of keys that stand in it.

    Args:
        text: TOML.
        changes: by ``key`` or ``table.key``, the value as TOML has it.

    Raises:
        ValueError: if a key does not stand there.
    """
    lines, table, left = text.splitlines(), "", dict(changes)
    for number, line in enumerate(lines):
        if header := re.match(r"\[(\w+)\]", line):
            table = f"{header[1]}."
        elif (entry := re.match(r"(\w+) *=", line)) and table + entry[1] in left:
            lines[number] = f"{entry[1]} = {left.pop(table + entry[1])}"
    if left:
        raise ValueError(f"{', '.join(left)}: expected a line for it in the preset")
    return "\n".join(lines) + "\n"


def cohort_of(name: str, work: Path, data: Path, preset: str, *, fewer: int | None = None) -> Path:
    """The cohort of that name for runs of the preset's input; taken in if it is not there.

    `fewer` images of PneumoniaMNIST's training part are drawn, if that is given.
    """
    work.mkdir(parents=True, exist_ok=True)
    file = work / f"{name}.toml"
    text = preset if name != "pneumonia" else (HERE / f"tasks/{_AS_LABELLED}.toml").read_text()
    file.write_text(text)
    spec = read_run_file(file).spec
    suffix = f"-{fewer}" if fewer else ""
    cohort = work / "cohorts" / f"{name}-{spec.input.preprocessing_digest[:8]}{suffix}"
    if not cohort.exists():
        cohort.parent.mkdir(parents=True, exist_ok=True)
        if fewer:
            summary = task_cohorts.pneumonia(data, work, cohort, spec, fewer=fewer)
        else:
            summary = COHORTS[name](data, work / "unpacked", cohort, spec)
        reasons = [f"{one.what}: {one.reason}" for one in summary.not_used]
        print(f"{cohort.name}: not used: {len(reasons)}", *reasons, sep="\n  ")
    return cohort


def _begun(place: Path, spec: RunSpec) -> Path | None:
    """The run of this spec below `place`, begun or finished; others are removed."""
    for folder in sorted(path for path in place.iterdir() if path.is_dir()):
        begun, _ = simulation.load(folder)
        if begun.identified("").digest == spec.digest:
            return folder
        shutil.rmtree(folder)
    return None


# --- Reading ------------------------------------------------------------------------------------


def finished(work: Path, name: str) -> list[Path]:
    """The folders of a trial's finished runs; one that is not finished is left out."""
    return sorted(page.parent for page in (work / "runs" / name).glob("seed-*/*/report.html"))


def read(folder: Path) -> Finished:
    """What a finished run's folder says.

    Raises:
        RunError: if it is not the folder of a finished run.
        ValueError: if it has no test part.
    """
    record = RunRecord.read(folder)
    if "test" not in record.final:
        raise ValueError(f"{folder}: it was not evaluated on a test part")
    part, spent = record.final["test"], list(record.privacy.sites.values())
    held = record.final.get("validation")
    worst = max(spent, key=lambda site: site.epsilon or 0.0)
    return Finished(
        seed=record.spec.seed,
        round=record.environment.model_round or len(record.rounds),
        rounds=len(record.rounds),
        metrics=dict(part.metrics),
        validation=held.metrics[record.spec.evaluation.metric].value if held else None,
        images=part.images,
        patients=part.patients,
        unit=worst.unit,
        epsilon=worst.epsilon,
        delta=worst.delta,
        seconds=record.environment.wall_seconds,
    )


# --- What the table is about --------------------------------------------------------------------


def figures(folder: Path) -> dict[str, Estimate]:
    """What a run's lines of the table say, by title: the headline first, then what is beside it."""
    record = RunRecord.read(folder)
    headline, part = record.spec.evaluation.metric, record.final["test"]
    metric = record.spec.task.METRICS[headline]
    title = metric.title + (f" ({metric.unit})" if metric.unit else "")
    found = {title: part.metrics[headline]}
    goal = getattr(record.spec.task, "goal", "")
    if goal == "compress":
        found["PSNR above the cosine transform of as many numbers (dB)"] = part.metrics["gain"]
    elif goal in BESIDES:
        found |= BESIDES[goal](part.evidence, part.patient_index)
    beside = folder.parent / BESIDE
    if beside.exists():
        kept = json.loads(beside.read_text())
        found |= {name: Estimate(**estimate) for name, estimate in kept.items()}
    return found


def above_filters(evidence: Evidence, patients: NDArray[np.int64]) -> dict[str, Estimate]:
    """PSNR above that of the noisy image and of each median filter."""
    own, others = evidence["psnr"], evidence["references"][:, :, 0]
    gains = {name: own - others[:, column] for column, name in enumerate(REFERENCES)}
    return means(gains, patients, resamples=500, generator=np.random.default_rng(1))


def unlearned_scores(evidence: Evidence, patients: NDArray[np.int64]) -> dict[str, Estimate]:
    """AUROC of the two halves of the anomaly score, each as a score of its own.

    They are the squared error, and that of the cosine transform of a sixteenth of the numbers,
    for which nothing is learned and which is the greater, the less hazy an image is.
    """
    transform = evidence["references"][:, _SIXTEENTH, 0]
    scores = {
        "AUROC of the squared error alone": evidence["mse"],
        "AUROC of the cosine transform alone: its PSNR": transform,
    }
    truths = evidence["abnormal"] > 0

    def areas(weights: Floats) -> dict[str, Floats]:
        ranked = {name: metrics.ranking(score, truths, weights) for name, score in scores.items()}
        return {name: metrics.auroc(curve) for name, curve in ranked.items()}

    return estimates(areas, patients, resamples=500, generator=np.random.default_rng(1))


BESIDES = {"denoise": above_filters, "anomaly": unlearned_scores}


def taught_on_real(spec: RunSpec, cohort: Cohort) -> Estimate:
    """AUROC on the test part of the classifiers that judge synthetic images, taught on real ones.

    They see as many of the training part, evenly spread.
    """
    task, train, test = task_for(spec), cohort.with_split("train"), cohort.with_split("test")
    if not isinstance(task, Generation):
        raise TypeError(f"{spec.name}: a run of {spec.task.name}; expected one of generation")
    rows = pictures.spread(len(train), SYNTHETIC)
    labels = torch.from_numpy(train.targets(rows))
    real = Drawn(torch.from_numpy(train.images(rows)), labels)
    said = task.judged(real, test, torch.device("cpu"))
    kind = spec.task_as(Section).kind
    return metrics.score(
        Predictions(kind, said["probabilities"], said["labels"], test.patient_index, 0.5),
        resamples=spec.evaluation.bootstrap,
        generator=np.random.default_rng(spec.seed),
    ).metrics["auroc"]


# --- The table ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Line:
    """One figure of a trial, over its seeds.

    Attributes:
        title: of the figure.
        seeds: in the order of `values`.
        values: of each seed.
        low: the lowest lower end of the seeds' 95 % intervals over patients.
        high: the highest upper end.
        aim: at least so much, or None.
    """

    title: str
    seeds: tuple[int, ...]
    values: tuple[float | None, ...]
    low: float | None
    high: float | None
    aim: float | None

    @property
    def value(self) -> float | None:
        """The mean over the seeds; None where one has none."""
        return mean(known) if len(known := self._known) == len(self.values) else None

    @property
    def met(self) -> str:
        """In a word; empty without an aim."""
        if self.aim is None:
            return ""
        return "met" if self.value is not None and self.value >= self.aim else "**not met**"

    @property
    def _known(self) -> list[float]:
        return [value for value in self.values if value is not None]


def seed_of(folder: Path) -> int:
    """The seed of the run in that folder."""
    return simulation.load(folder)[0].seed


def lines(trial: Trial, folders: list[Path]) -> list[Line]:
    """A trial's lines, over the folders of its finished runs."""
    found = {seed_of(folder): figures(folder) for folder in folders}
    seeds = tuple(sorted(found))
    made = []
    for title in (one for one in found[seeds[0]] if all(one in found[seed] for seed in seeds)):
        each = [found[seed][title] for seed in seeds]
        lows = [one.low for one in each if one.low is not None]
        highs = [one.high for one in each if one.high is not None]
        aim = trial.aims.get(title)
        values = tuple(one.value for one in each)
        ends = min(lows, default=None), max(highs, default=None)
        made.append(Line(title, seeds, values, *ends, aim))
    return made


def write(page: Path, work: Path) -> None:
    """Put the table between the marks of the page, and all figures beside it."""
    rows, kept = [], {}
    for trial in TRIALS.values():
        folders = finished(work, trial.name)
        if not folders:
            continue
        runs = [read(folder) for folder in folders]
        of_it = lines(trial, folders)
        rows += [row(trial, runs, line, first=not number) for number, line in enumerate(of_it)]
        kept[trial.name] = {
            "preset": f"benchmarks/{trial.preset}.toml",
            "changes": dict(trial.changes),
            "lines": [asdict(line) | {"value": line.value} for line in of_it],
            "runs": [asdict(one) for one in runs],
        }
    header = f"| {' | '.join(COLUMNS)} |"
    table = "\n".join([header, "|---" * len(COLUMNS) + "|", *rows])
    before, _, rest = page.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    if not after:
        raise ConfigError(f"{page}: expected the lines {BEGIN!r} and {END!r}, the table between")
    write_durably(page, f"{before}{BEGIN}\n\n{table}\n\n{END}{after}".encode())
    write_durably(page.with_suffix(".json"), f"{json.dumps(kept, indent=1)}\n".encode())


COLUMNS = (
    "task",
    "each site",
    "privacy (unit)",
    "figure",
    "value",
    "95 % interval",
    "seeds",
    "aim",
    "rounds",
    "time",
)


def row(trial: Trial, runs: list[Finished], line: Line, *, first: bool) -> str:
    """One line of Markdown; what all lines of a trial have in common stands in the first."""
    worst = max(runs, key=lambda one: one.epsilon or 0.0)
    private = worst.epsilon is not None
    privacy = f"ε = {worst.epsilon:.2f} ({worst.unit})" if private else "none"
    units = f"{trial.declared_size} {worst.unit}s"
    minutes = mean(one.seconds for one in runs) / 60
    of_runs = (f"{runs[0].rounds}", f"{minutes:.0f} min") if first else ("", "")
    named = (
        f"[{trial.title}](../benchmarks/{trial.preset}.toml)",
        units,
        privacy,
    )
    aim = "" if line.aim is None else f"{line.aim:g}: {line.met}"
    shown = "; ".join(words(value) for value in line.values) if len(line.seeds) > 1 else "one seed"
    interval = "" if line.low is None else f"{words(line.low)} to {words(line.high)}"
    cells = (
        *(named if first else ("", "", "")),
        line.title,
        words(line.value),
        interval,
        shown,
        aim,
    )
    return "| " + " | ".join((*cells, *of_runs)) + " |"


def words(value: float | None) -> str:
    """A figure as the page has it."""
    return "none" if value is None else f"{value:.2f}" if abs(value) >= 10 else f"{value:.3f}"


if __name__ == "__main__":
    main()
