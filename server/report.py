"""The run's report: one HTML page that needs no network and no script.

The page carries its style and its figures in itself, and a content security policy that forbids
a browser to load anything. Every text that comes from the run directory is escaped.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from numpy.typing import NDArray

from common.files import write_durably
from common.spec import Metric, RunSpec
from common.tasks import words
from common.tasks.estimates import Estimate
from common.tasks.exhibits import Chart, Exhibit, Gallery, Matrix, Table
from server import figures, wording
from server.evaluation import PARTS, PartResult
from server.figures import Picture
from server.record import STATUSES, RunRecord, Status

REPORT_FILE = "report.html"

_TEMPLATE = "report.html.j2"
_CURVES_BY_ROUND = 4
_MOST_INCIDENTS = 40
_GALLERY_BYTES = 16 << 20  # of pixels; a page of more would not open on a phone
_DARK = 0.55  # from this share on, a cell of the confusion matrix has white text
_SHOWN_WIDTH = 210  # of a picture in a gallery, at least, where there is room
_SHEET = 16  # pictures, above which each is shown smaller
_BROAD = 2  # times its height, from which on a picture needs more room
_FIGURE = re.compile(r"–|[-−+]?[0-9][0-9.,]*( ?\S{1,3})?")
_INTERVAL = re.compile(r"|[-−]?[0-9][0-9.,]* to [-−]?[0-9][0-9.,]*")
_ESTIMATE = re.compile(r"–|[-−+]?[0-9][0-9.,]*( ?\S{1,3})?( \([-−0-9., to]+\))?")


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
    """The page of a run.

    Raises:
        RunError: if what the task keeps of the evaluation cannot be shown.
    """
    beside, shown = _laid_out(record)
    environment = _environment()
    return environment.get_template(_TEMPLATE).render(
        record=record,
        spec=record.spec,
        environment=record.environment,
        privacy=record.privacy,
        final=record.final,
        banner=wording.banner(record),
        no_spread=wording.SAME,
        claim=wording.claim(record),
        timing=wording.timing(record),
        not_for_clinical_use=wording.NOT_FOR_CLINICAL_USE,
        intended_inputs=wording.intended_inputs(record.spec),
        counted=words.counted,
        task=words.task(record.spec.task),
        headline=_headline(record),
        largest=wording.largest(record.privacy.sites),
        metrics=_metric_rows(record),
        metric_notes=wording.metric_notes(_shown_metrics(record).values()),
        beside=beside,
        shown=shown,
        federated=record.federated,
        federated_rows=_federated_rows(record),
        round_pictures=_round_pictures(record),
        strips=_strips(record),
        status_colours=figures.STATUS_COLOURS,
        statuses=STATUSES,
        incidents=_incidents(record)[:_MOST_INCIDENTS],
        incidents_left=max(0, len(_incidents(record)) - _MOST_INCIDENTS),
        settings=_settings(record.spec),
    )


def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "epsilon": wording.epsilon,
        "epsilon_of": wording.epsilon_of,
        "pacing": wording.pacing,
        "scientific": wording.scientific,
        "plain": wording.plain,
        "duration": wording.duration,
    }
    environment.tests |= {
        "matrix": lambda one: isinstance(one, ShownMatrix),
        "table": lambda one: isinstance(one, ShownTable),
        "gallery": lambda one: isinstance(one, ShownGallery),
    }
    return environment


def _laid_out(record: RunRecord) -> tuple[ShownMatrix | None, list[Shown]]:
    """The first matrix, which stands beside the metrics, and everything else."""
    with record.evidence():
        shown = _shown(record.exhibits(), record.spec.evaluation.gallery)
    matrices = [one for one in shown if isinstance(one, ShownMatrix)]
    beside = matrices[0] if matrices else None
    return beside, [one for one in shown if one is not beside]


# --- Headline and metrics ---------------------------------------------------------------------


@dataclass(frozen=True)
class Headline:
    """What stands on top: a metric on the test part, and why it has no value."""

    title: str
    value: str
    interval: str
    part: PartResult | None
    why_not: str


def _headline(record: RunRecord) -> Headline:
    name, part = record.headline, record.final.get("test")
    metric = record.spec.metrics[name]
    found = part.metrics[name] if part else Estimate(None)
    return Headline(
        metric.title,
        wording.figure(found, metric),
        words.interval(found, words.digits(metric)),
        part,
        record.why_no_headline(),
    )


@dataclass(frozen=True)
class MetricRow:
    """A metric of the final model on both parts, in words; a part that is missing has a dash.

    `bar` is the test part's where it lies on a scale from 0 to 1.
    """

    title: str
    test: str
    interval: str
    validation: str
    bar: Estimate | None
    strong: bool


def _shown_metrics(record: RunRecord) -> Mapping[str, Metric]:
    """Those that have a value on either part, and the headline."""
    return {
        name: metric
        for name, metric in record.spec.metrics.items()
        if name == record.headline
        or any(part.metrics[name].value is not None for part in record.final.values())
    }


def _metric_rows(record: RunRecord) -> list[MetricRow]:
    rows = []
    for name, metric in _shown_metrics(record).items():
        validation, test = (
            record.final[part].metrics[name] if part in record.final else Estimate(None)
            for part in PARTS
        )
        rows.append(
            MetricRow(
                metric.title,
                wording.figure(test, metric),
                wording.interval(test, metric),
                wording.figure(validation, metric, None if test.value is None else test),
                None if metric.unit or not _within_one(test) else test,
                name == record.headline,
            )
        )
    return rows


def _within_one(found: Estimate) -> bool:
    known = [value for value in (found.value, found.low, found.high) if value is not None]
    return bool(known) and all(0 <= value <= 1 for value in known)


@dataclass(frozen=True)
class FederatedRow:
    """A metric of the federated evaluation, in words."""

    title: str
    value: str
    interval: str


def _federated_rows(record: RunRecord) -> list[FederatedRow]:
    """Nothing without one."""
    if record.federated is None:
        return []
    return [
        FederatedRow(
            (metric := record.spec.metrics[name]).title,
            wording.figure(found, metric),
            words.interval(found, words.digits(metric)),
        )
        for name, found in record.federated.metrics.items()
    ]


# --- What the task shows ----------------------------------------------------------------------


@dataclass(frozen=True)
class Cell:
    """A cell of a matrix: how many, their share of the row, and whether text is light."""

    count: int
    share: float
    light: bool


@dataclass(frozen=True)
class ShownMatrix:
    """A matrix with its cells, rows by truth and columns by decision."""

    matrix: Matrix
    rows: Sequence[Sequence[Cell]]


@dataclass(frozen=True)
class ShownTable:
    """A table, and how each of its columns is set."""

    table: Table
    classes: Sequence[str]


@dataclass(frozen=True)
class ShownGallery:
    """A gallery and its pictures; coarse ones are enlarged by the browser, pixel by pixel.

    `broad` are those in which several stand beside each other, `many` those of which a sheet shows
    more than a page has room for.
    """

    gallery: Gallery
    pictures: Sequence[Picture]
    coarse: bool
    broad: bool
    many: bool


@dataclass(frozen=True)
class ShownCharts:
    """Charts that stand side by side, and how they are to be read: one by one, or several alike."""

    pictures: Sequence[Picture]
    captions: Sequence[str]
    note: str


Shown = ShownMatrix | ShownTable | ShownGallery | ShownCharts


def _shown(exhibits: Sequence[Exhibit], most_pictures: int) -> list[Shown]:
    """What is drawn, in the task's order; neighbouring charts stand side by side."""
    galleries = sum(isinstance(one, Gallery) for one in exhibits)
    most_bytes = _GALLERY_BYTES // max(1, galleries)
    found: list[Shown] = []
    for kind, group in groupby(exhibits, type):
        if kind is Chart:
            charts = [one for one in group if isinstance(one, Chart)]
            found.append(_charts(charts))
            continue
        for one in group:
            if isinstance(one, Matrix):
                found.append(ShownMatrix(one, _cells(one.counts)))
            elif isinstance(one, Table):
                found.append(ShownTable(one, _columns(one)))
            elif isinstance(one, Gallery):
                found.append(_gallery(one, most_pictures, most_bytes))
    return found


def _charts(charts: Sequence[Chart]) -> ShownCharts:
    notes = [one.note or one.says for one in charts]
    shared = [note for note, times in Counter(notes).items() if times > 1]
    captions = ["" if note in shared else note for note in notes]
    return ShownCharts([figures.chart(one) for one in charts], captions, " ".join(shared))


def _cells(counts: NDArray[np.int64]) -> list[list[Cell]]:
    totals = np.maximum(counts.sum(axis=1, keepdims=True), 1)
    pairs = zip(counts.tolist(), (counts / totals).tolist(), strict=True)
    return [[Cell(n, share, share > _DARK) for n, share in zip(*row, strict=True)] for row in pairs]


def _columns(table: Table) -> list[str]:
    """Figures are set to the right, intervals quietly; the first column names the row."""
    return ["", *(_column([row[n] for row in table.rows]) for n in range(1, len(table.head)))]


def _column(texts: Sequence[str]) -> str:
    if all(_FIGURE.fullmatch(text) for text in texts):
        return "n"
    if all(_INTERVAL.fullmatch(text) for text in texts):
        return "quiet nowrap"
    return "nowrap" if all(_ESTIMATE.fullmatch(text) for text in texts) else ""


def _gallery(gallery: Gallery, most: int, most_bytes: int) -> ShownGallery:
    kept = replace(gallery, pictures=gallery.pictures[:most], captions=gallery.captions[:most])
    height, width = gallery.pictures.shape[1:3]
    tiles = figures.tiles(kept, most_bytes)
    broad = width > _BROAD * height
    many = not broad and len(tiles) > _SHEET
    return ShownGallery(kept, tiles, width < _SHOWN_WIDTH, broad, many)


# --- Rounds and sites -------------------------------------------------------------------------


def _round_pictures(record: RunRecord) -> list[Picture]:
    """Nothing of a run that was evaluated once: the figures of that round stand above."""
    metrics = record.spec.metrics
    drawn = record.spec.task.DRAWN or tuple(metrics)[:_CURVES_BY_ROUND]
    names = dict.fromkeys((record.spec.evaluation.metric, *drawn))
    chosen = record.environment.model_round
    every = {name: list(_series(record, name)) for name in names}
    return [
        figures.by_round(wording.titled(metrics[name]), series, chosen)
        for name, series in every.items()
        if any(len(one.rounds) > 1 for one in series)
    ]


def _series(record: RunRecord, metric: str) -> Iterator[figures.Series]:
    for part in reversed(PARTS):
        found = [(r.number, p) for r in record.rounds if (p := r.part(part)) is not None]
        known = [(n, p.metrics[metric]) for n, p in found if metric in p.metrics]
        if known:
            yield figures.Series(part, *zip(*known, strict=True))


def _strips(record: RunRecord) -> tuple[Picture, Picture]:
    """Who took part: one for a broad page, one for a narrow one."""
    by_number = {entry.number: entry for entry in record.rounds}

    def status(site: str, number: int) -> Status | None:
        found = by_number[number].sites.get(site)
        return None if found is None else found.status

    broad, narrow = (
        figures.participation(record.sites, list(by_number), status, inches)
        for inches in figures.STRIPS
    )
    return broad, narrow


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
