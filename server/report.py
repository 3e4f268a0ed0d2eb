"""The run's report: one HTML page that needs no network and no script.

The page carries its style and its figures in itself, and a content security policy that forbids
a browser to load anything. Every text that comes from the run directory is escaped.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from numpy.typing import NDArray

from common.files import write_durably
from common.spec import RunSpec
from common.tasks.metrics import NAMES, Estimate, Predictions, Scores, score
from server import curves, figures, wording
from server.evaluation import PARTS, PartName, PartResult
from server.figures import Picture
from server.record import STATUSES, RunRecord, Status

REPORT_FILE = "report.html"

_TEMPLATE = "report.html.j2"
_CURVES_BY_ROUND = ("auroc", "auprc", "accuracy", "brier")
_MOST_INCIDENTS = 40
_MOST_COLUMNS = 24
_DARK = 0.55  # from this share on, a cell of the confusion matrix has white text


def write_report(run_directory: Path) -> Path:
    """Write ``report.html`` into a run directory from what lies there.

    Returns:
        Where it is.

    Raises:
        RunError: naming the file of the run directory that is missing or wrong.
    """
    page = render(RunRecord.read(run_directory))
    path = run_directory / REPORT_FILE
    write_durably(path, page.encode())
    return path


def render(record: RunRecord) -> str:
    """The page of a run."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "number": wording.number,
        "interval": wording.interval,
        "epsilon": wording.epsilon,
        "epsilon_of": wording.epsilon_of,
        "pacing": wording.pacing,
        "scientific": wording.scientific,
        "plain": wording.plain,
        "duration": wording.duration,
    }
    return environment.get_template(_TEMPLATE).render(
        record=record,
        spec=record.spec,
        environment=record.environment,
        privacy=record.privacy,
        final=record.final,
        banner=wording.banner(record),
        claim=wording.claim(record),
        timing=wording.timing(record),
        not_for_clinical_use=wording.NOT_FOR_CLINICAL_USE,
        counted=wording.counted,
        headline=_headline(record),
        largest=wording.largest(record.privacy.sites),
        metrics=_metric_rows(record),
        confusion=_confusion(record),
        titles=wording.METRIC_TITLES,
        by_class=_class_rows(record),
        federated=record.federated,
        curve_pictures=_curve_pictures(record),
        round_pictures=_round_pictures(record),
        strip=_strip(record),
        status_colours=figures.STATUS_COLOURS,
        statuses=STATUSES,
        incidents=_incidents(record)[:_MOST_INCIDENTS],
        incidents_left=max(0, len(_incidents(record)) - _MOST_INCIDENTS),
        settings=_settings(record.spec),
    )


# --- Headline and metrics ---------------------------------------------------------------------


@dataclass(frozen=True)
class Headline:
    """What stands on top: the part it is of, its AUROC, and why there is none."""

    auroc: Estimate
    part: PartResult | None
    why_not: str


def _headline(record: RunRecord) -> Headline:
    part = record.final.get("test")
    if part is None:
        return Headline(Estimate(None), None, "The evaluation cohort has no test part.")
    auroc = part.scores.metrics["auroc"]
    if auroc.value is not None:
        return Headline(auroc, part, "")
    if not part.predictions.finite:
        return Headline(auroc, part, "The model's probabilities are not finite.")
    return Headline(auroc, part, "The test part has images of one class only.")


@dataclass(frozen=True)
class MetricRow:
    """A metric of the final model on both parts; a part that is missing has no value."""

    title: str
    test: Estimate
    validation: Estimate


def _metric_rows(record: RunRecord) -> list[MetricRow]:
    def of(name: str, part: PartName) -> Estimate:
        return record.final[part].scores.metrics[name] if part in record.final else Estimate(None)

    return [
        MetricRow(wording.METRIC_TITLES[name], of(name, "test"), of(name, "validation"))
        for name in NAMES
    ]


@dataclass(frozen=True)
class Cell:
    """A cell of a confusion matrix: images, their share of the row, and whether text is light."""

    images: int
    share: float
    light: bool


@dataclass(frozen=True)
class Confusion:
    """A confusion matrix, rows by truth and columns by decision."""

    names: Sequence[str]
    rows: Sequence[Sequence[Cell]]


def _confusion(record: RunRecord) -> Confusion | None:
    """That of the test part; None without one, and where labels do not exclude each other."""
    part = record.final.get("test")
    if part is None or record.spec.task.kind == "multilabel":
        return None
    return Confusion(record.spec.task.classes, _cells(part.scores.confusion))


def _cells(counts: NDArray[np.int64]) -> list[list[Cell]]:
    totals = np.maximum(counts.sum(axis=1, keepdims=True), 1)
    pairs = zip(counts.tolist(), (counts / totals).tolist(), strict=True)
    return [[Cell(n, share, share > _DARK) for n, share in zip(*row, strict=True)] for row in pairs]


@dataclass(frozen=True)
class ClassRow:
    """One class (against the rest) or label on the test part."""

    name: str
    images: int
    scores: Scores
    shown: Sequence[str]


def _class_rows(record: RunRecord) -> list[ClassRow]:
    part = record.final.get("test")
    if part is None or record.spec.task.kind == "binary" or not part.predictions.finite:
        return []
    decided = ("sensitivity", "specificity") if record.spec.task.kind == "multilabel" else ()
    shown = ("auroc", "auprc", *decided)
    return [
        ClassRow(name, int(column.truths.sum()), _score_column(column, record.spec), shown)
        for name, column in _columns(part, record.spec)
    ]


def _score_column(column: curves.Column, spec: RunSpec) -> Scores:
    both = np.stack([1 - column.scores, column.scores], axis=1)
    labels, settings = column.truths.astype(np.int64), spec.evaluation
    alone = Predictions("binary", both, labels, column.patients, settings.threshold)
    generator = np.random.default_rng(spec.seed)
    return score(alone, resamples=settings.bootstrap, generator=generator)


# --- Figures ----------------------------------------------------------------------------------


def _columns(part: PartResult, spec: RunSpec) -> Iterator[tuple[str, curves.Column]]:
    p = part.predictions
    names = ("",) if spec.task.kind == "binary" else spec.task.classes
    for name, scores, truths in zip(names, p.scores.T, p.truths.T, strict=True):
        yield name, curves.Column(scores, truths, p.patients, spec.seed)


def _curve_pictures(record: RunRecord) -> list[Picture]:
    part = record.final.get("test")
    if part is None:
        return []
    drawn = [(name, c) for name, c in _columns(part, record.spec) if c.drawable][:_MOST_COLUMNS]
    if not drawn:
        return []
    chance = drawn[0][1].prevalence if len(drawn) == 1 else None
    return [
        figures.roc_figure([figures.Named(name, curves.roc(c)) for name, c in drawn]),
        figures.precision_recall_figure(
            [figures.Named(name, curves.precision_recall(c)) for name, c in drawn], chance
        ),
        figures.calibration_figure(curves.calibration(_calibrated(part, record.spec))),
    ]


def _calibrated(part: PartResult, spec: RunSpec) -> curves.Column:
    """What the calibration error is of; the labels of a multilabel task are taken together."""
    confidences, outcomes = part.predictions.calibrated
    patients = np.repeat(part.predictions.patients, confidences.shape[1])
    return curves.Column(confidences.ravel(), outcomes.ravel(), patients, spec.seed)


def _round_pictures(record: RunRecord) -> list[Picture]:
    names = dict.fromkeys((record.spec.evaluation.metric, *_CURVES_BY_ROUND))
    chosen = record.environment.model_round
    return [
        figures.by_round(wording.METRIC_TITLES[name], series, chosen)
        for name in names
        if (series := list(_series(record, name)))
    ]


def _series(record: RunRecord, metric: str) -> Iterator[figures.Series]:
    for part in reversed(PARTS):
        found = [(r.number, p) for r in record.rounds if (p := r.part(part)) is not None]
        known = [(n, p.metrics[metric]) for n, p in found if metric in p.metrics]
        if known:
            yield figures.Series(part, *zip(*known, strict=True))


def _strip(record: RunRecord) -> Picture:
    by_number = {entry.number: entry for entry in record.rounds}

    def status(site: str, number: int) -> Status | None:
        found = by_number[number].sites.get(site)
        return None if found is None else found.status

    return figures.participation(record.sites, list(by_number), status)


# --- Sites, settings --------------------------------------------------------------------------


@dataclass(frozen=True)
class Incident:
    """A round in which a site did not end well, and why."""

    round_number: int
    site: str
    status: Status
    reason: str


def _incidents(record: RunRecord) -> list[Incident]:
    return [
        Incident(entry.number, site, found.status, found.reason)
        for entry in record.rounds
        for site, found in sorted(entry.sites.items())
        if found.status != "ok"
    ]


def _settings(spec: RunSpec) -> Mapping[str, Mapping[str, str]]:
    """The spec as tables of words; what stands outside a table is under ``run``."""
    tables: dict[str, dict[str, str]] = {"run": {}}
    for key, value in spec.model_dump(mode="json").items():
        if isinstance(value, dict):
            tables[key] = {name: wording.setting(entry) for name, entry in value.items()}
        else:
            tables["run"][key] = wording.setting(value)
    return tables
