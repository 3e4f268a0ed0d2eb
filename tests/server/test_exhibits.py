"""A task that the house has never seen, from its evidence to the page: drawn, bounded, refused."""

from __future__ import annotations

import base64
import dataclasses
import io
import json
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from client.intake.builder import CohortBuilder, ImageRecord
from common.cohort import Cohort, CohortMeta
from common.errors import RunError
from common.spec import Metric, RunSpec
from common.spec import Task as Section
from common.tasks import TASKS, TaskEntry
from common.tasks.estimates import Estimate, means
from common.tasks.exhibits import Bars, Chart, Exhibit, Gallery, Line, Matrix, Table
from common.tasks.task import Evidence, Task
from server import figures
from server.card import write_card
from server.evaluation import CentralEvaluator, EarlyStopping, EvaluationResult, score_part
from server.record import RunRecord
from server.report import write_report

HOSTILE = "\x07<script>alert(1)</script> $\\frac{1}{2}$ {{ 7 * 7 }}"
PNG, SVG = "data:image/png;base64,", "data:image/svg+xml;base64,"
PICTURES = 7


class ToySection(Section):
    """Guess each image's brightness."""

    LOSSES: ClassVar[tuple[str, ...]] = ("mse",)
    METRICS: ClassVar[Mapping[str, Metric]] = {
        "error": Metric("Level error", lower_is_better=True, unit="dB", note="As one hears it."),
        "hits": Metric("Hits"),
        "ratio": Metric("Ratio"),
    }
    NETWORK: ClassVar[str] = "image"
    CAVEATS: ClassVar[tuple[str, ...]] = ("It is a toy.",)

    name: Literal["toy"]
    kind: Literal["none"] = "none"

    def problem_with(self, kind: str, classes: tuple[str, ...]) -> str:
        return ""


class Toy(Task):
    """Keeps a figure an image, and more pictures than it may, in a wrong place too."""

    def losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return outputs.float().square().mean(dim=(1, 2, 3))

    def measured(self, outputs: Tensor, images: Tensor, targets: Tensor) -> Evidence:
        levels = images.mean(dim=(1, 2, 3)).cpu().numpy()
        return {"levels": levels, "gallery_stray": np.zeros((len(levels), 2))}

    def pictures(self, network: nn.Module, cohort: Cohort, device: torch.device) -> Evidence:
        return {"gallery_images": (cohort.images(range(PICTURES)) * 255).astype(np.uint8)}

    def score(
        self,
        evidence: Evidence,
        patients: NDArray[np.int64],
        *,
        resamples: int,
        generator: np.random.Generator,
    ) -> Mapping[str, Estimate]:
        levels = evidence["levels"]
        rows = {"error": 20 * levels, "hits": levels, "ratio": 3 * levels}
        return means(rows, patients, resamples=resamples, generator=generator)

    def exhibits(self, evidence: Evidence, patients: NDArray[np.int64]) -> Sequence[Exhibit]:
        levels = np.sort(evidence["levels"])
        x = np.arange(len(levels), dtype=np.float64)
        lines = [Line("low", x, levels), Line(HOSTILE, x, levels + 1, steps=True)]
        counts = np.array([[3, 1], [0, 2]])
        every = (
            np.zeros((PICTURES, 20, 30, 3), np.uint8)
            + np.arange(PICTURES, dtype=np.uint8)[:, None, None, None]
        )
        return [
            Chart("Levels", "image", "level", lines, "Levels in words, as they rise.", level=0.4),
            Chart("More", "a", "b", lines[:1], "More, again in words.", note="Read it so."),
            Table("Rows", ("What", "How many", "Interval"), [(HOSTILE, "1,204", "0.1 to 0.2")]),
            Matrix("First", ("yes", HOSTILE), counts, "A reading."),
            Matrix("Second", ("a", "b"), counts),
            Gallery("Shown", every, [f"number {n}" for n in range(PICTURES)], "Pictures.", "Blue."),
        ]


@pytest.fixture(autouse=True)
def toy_task(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = TaskEntry(f"{__name__}:ToySection", f"{__name__}:Toy")
    monkeypatch.setitem(TASKS, "toy", entry)


def toy_spec(known: RunSpec, gallery: int = 0, metric: str = "error", **task: str) -> RunSpec:
    """The prepared run's spec, for the toy."""
    changed = known.model_dump(mode="json")
    changed["task"] = {"name": "toy"} | task
    changed["loss"] = {"name": "mse"}
    changed["evaluation"] |= {"metric": metric, "gallery": gallery}
    return RunSpec.from_json(json.dumps(changed))


def a_cohort(path: Path, spec: RunSpec, images: int = 40) -> Cohort:
    """Images that grow brighter, two of each patient, of a kind that the toy does not look at."""
    labelled = spec.model_dump(mode="json")
    labelled["task"] = {"name": "classification", "classes": ["a", "b"]}
    labelled["evaluation"] |= {"metric": "auroc"}
    labelled["loss"] = {"name": "cross-entropy"}
    with CohortBuilder(path, spec.input.shape) as builder:
        for n in range(images):
            record = ImageRecord(f"p{n // 2:02}", "s", "s", f"i{n}", n % 2, 8, 8, "")
            builder.add(record, np.full(spec.input.shape, 1500 * n, np.uint16))
        meta = CohortMeta.of(
            RunSpec.from_json(json.dumps(labelled)), unit="patient", source="t", created="2026"
        )
        builder.finish(meta)
    return Cohort.open(path)


class Nothing(nn.Module):
    """A network that is not asked."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, images: Tensor) -> Tensor:
        return images


@pytest.fixture
def toy_run(build_run: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    """Call it with the arguments of `toy_spec`: a run's folder as the house leaves it."""

    def build(**settings: Any) -> Path:
        directory = build_run(rounds=2)
        spec = toy_spec(RunSpec.from_json((directory / "spec.json").read_text()), **settings)
        result = CentralEvaluator(spec, a_cohort(tmp_path / "c", spec)).evaluate(
            Nothing(), pictures=True
        )
        (directory / "spec.json").write_text(spec.canonical_json)
        lines = [json.loads(x) for x in (directory / "metrics.jsonl").read_text().splitlines()]
        text = "".join(json.dumps(x | {"evaluation": result.to_json()}) + "\n" for x in lines)
        (directory / "metrics.jsonl").write_text(text)
        result.save(directory / "evaluation.npz")
        return directory

    return build


def words_of(page: str) -> str:
    return " ".join(re.sub(r"<style>.*?</style>|<[^>]*>", " ", page, flags=re.S).split())


def pictures_of(page: str) -> list[Image.Image]:
    found = re.findall(rf'src="{PNG}([^"]*)"', page)
    return [Image.open(io.BytesIO(base64.b64decode(one))) for one in found]


# --- A whole page -----------------------------------------------------------------------------


def test_a_task_that_nobody_knows_has_its_page_and_its_card(toy_run):
    directory = toy_run(gallery=4)
    page = write_report(directory).read_text()
    text = words_of(page)
    error = RunRecord.read(directory).final["test"].metrics["error"]
    assert f"Level error · test part {error.value:.2f} dB" in text
    assert f"95 % interval {error.low:.2f} to {error.high:.2f}" in text
    assert "small-cnn for toy." in text
    assert "Lower is better: Level error. As one hears it." in text
    assert re.search(r'alt="Level error \(dB\) by round\.', page)
    titles = ("Levels in words", "More, again")
    assert all(f'alt="{title}' in page for title in titles)
    visible = ("Read it so.", "1,204", "A reading.", "Second", "number 3", "Blue.", "Pictures.")
    for said in (*visible, "Levels in words, as they rise."):
        assert said in text
    card = write_card(directory)
    described = json.loads(card.json.read_text())
    assert described["metrics"]["error"] == {
        "title": "Level error",
        "lower_is_better": True,
        "unit": "dB",
    }
    assert "It is a toy." in described["limitations"]
    assert described["model"]["threshold"] is None
    written = card.markdown.read_text()
    assert f"| Level error | {error.value:.2f} dB (" in written
    assert "network for toy, trained by" in written


def test_the_headline_is_the_metric_that_the_run_chose_by(toy_run):
    text = words_of(write_report(toy_run(metric="hits")).read_text())
    assert re.search(r"Hits · test part 0\.\d{3} 95 %", text)


def test_a_metric_beyond_one_has_no_bar_on_a_scale_from_nought_to_one(toy_run):
    page = write_report(toy_run()).read_text()
    rows = dict(re.findall(r'<tr[^>]*><th scope="row">([\w ]+)</th>(.*?)</tr>', page, re.S))
    assert {name: "dot" in rows[name] for name in ("Level error", "Hits", "Ratio")} == {
        "Level error": False,
        "Hits": True,
        "Ratio": False,
    }


def test_what_a_task_says_stays_text(toy_run):
    page = write_report(toy_run(gallery=1)).read_text()
    assert "<script>" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert "{{ 7 * 7 }}" in words_of(page)
    sources = re.findall(rf'src="{re.escape(SVG)}([^"]*)"', page)
    drawn = [base64.b64decode(one).decode() for one in sources]
    assert any("alert(1)" in text for text in drawn)
    for text in drawn:
        assert "<script" not in text
        assert "\x07" not in text  # it would be no XML


def test_the_page_is_written_again_from_the_folder_alone(toy_run, tmp_path):
    directory = toy_run(gallery=4)
    first = write_report(directory).read_bytes()
    shutil.rmtree(tmp_path / "c")
    (directory / "report.html").unlink()
    assert write_report(directory).read_bytes() == first


def test_a_metric_that_a_task_did_not_give_has_no_value(build_run, monkeypatch):
    spec = toy_spec(RunSpec.from_json((build_run(rounds=2) / "spec.json").read_text()))
    monkeypatch.setattr(Toy, "score", lambda *_, **__: {"hits": Estimate(0.5)})
    part = score_part(spec, "test", {"levels": np.zeros(4)}, np.arange(4), "patient")
    assert part.metrics == {
        "error": Estimate(None), "hits": Estimate(0.5), "ratio": Estimate(None)
    }  # fmt: skip


def test_the_best_round_of_an_error_is_the_lowest(build_run):
    known = RunSpec.from_json((build_run(rounds=2) / "spec.json").read_text())
    patients, state = np.arange(4), EarlyStopping.of(toy_spec(known))
    for number, level in enumerate((0.5, 0.2, 0.3), start=1):
        evidence = {"levels": np.full(4, level)}
        part = score_part(toy_spec(known), "validation", evidence, patients, "patient")
        state = state.after(number, EvaluationResult(part, None))
    assert state.best_round == 2


# --- Pictures of patients ---------------------------------------------------------------------


def test_no_picture_is_kept_or_shown_unless_the_run_asks(toy_run):
    directory = toy_run()
    with np.load(directory / "evaluation.npz") as stored:
        assert not [key for key in stored if "gallery" in key]
        assert stored["levels"].shape == (28,)  # the control: other evidence is there
    page = write_report(directory).read_text()
    assert PNG not in page
    assert "evaluation.gallery" not in page


def test_as_many_pictures_as_were_asked_for_and_of_the_test_part_alone(toy_run):
    directory = toy_run(gallery=3)
    with np.load(directory / "evaluation.npz") as stored:
        assert [key for key in stored if "gallery" in key] == ["gallery_images"]
        assert len(stored["gallery_images"]) == 3
    page = write_report(directory).read_text()
    assert len(pictures_of(page)) == 3  # of the seven that the task would show
    assert "number 2" in page
    assert "number 3" not in page
    assert "They may show patients" in page
    assert "asked for up to 3 pictures of that cohort" in words_of(page)


def test_a_folder_with_pictures_that_were_not_asked_for_is_refused(toy_run):
    directory = toy_run(gallery=3)
    spec = toy_spec(RunSpec.from_json((directory / "spec.json").read_text()), gallery=2)
    (directory / "spec.json").write_text(spec.canonical_json)
    with pytest.raises(RunError, match=r"evaluation\.npz: .*gallery_images: 3 rows.*at most 2"):
        write_report(directory)


def test_pictures_keep_their_colours(toy_run):
    first, second = pictures_of(write_report(toy_run(gallery=2)).read_text())
    assert (first.size, first.mode) == ((30, 20), "RGB")
    assert (first.getpixel((0, 0)), second.getpixel((5, 5))) == ((0, 0, 0), (1, 1, 1))


def gallery(count: int, height: int, width: int) -> Gallery:
    noise = np.random.default_rng(0).integers(0, 256, (count, height, width, 3), dtype=np.uint8)
    return Gallery("Shown", noise, [""] * count, "Noise.")


@pytest.mark.parametrize(("count", "height", "width"), [(4, 200, 100), (16, 333, 333), (1, 1, 9)])
def test_pictures_together_are_bounded_and_keep_their_form(count, height, width):
    most = 60_000
    tiles = figures.tiles(gallery(count, height, width), most)
    drawn = [Image.open(io.BytesIO(base64.b64decode(t.uri[len(PNG) :]))) for t in tiles]
    assert len(drawn) == count
    pixels = sum(3 * one.width * one.height for one in drawn)
    asked = 3 * count * height * width
    assert pixels <= most
    assert pixels == asked if asked <= most else pixels > 0.9 * most
    assert drawn[0].width / drawn[0].height == pytest.approx(width / height, rel=0.05)
    assert all(len(t.uri) < most for t in tiles)  # noise does not grow by being packed
    assert [t.alt for t in tiles] == ["Noise."] * count


@pytest.mark.parametrize(
    ("pictures", "captions"),
    [
        (np.zeros((2, 4, 4), np.uint8), ["", ""]),
        (np.zeros((2, 4, 4, 1), np.uint8), ["", ""]),
        (np.zeros((2, 4, 4, 3), np.float32), ["", ""]),
        (np.zeros((2, 4, 4, 3), np.uint8), [""]),
    ],
)
def test_pictures_of_another_form_are_refused(pictures, captions):
    with pytest.raises(ValueError, match="pictures"):
        figures.tiles(Gallery("Shown", pictures, captions, "None."), 1000)


# --- Charts -----------------------------------------------------------------------------------


def svg(chart: Chart) -> str:
    return base64.b64decode(figures.chart(chart).uri[len(SVG) :]).decode()


def a_chart(**settings: Any) -> Chart:
    x = np.linspace(0, 4, 9)
    both: dict[str, Any] = {"lines": [Line("", x, x**2)], "unit_square": True} | settings
    return Chart("A title", "to the right", "up", says="In words.", **both)


def paths(text: str) -> int:
    return len(re.findall(r"<(?:path|use)\b", text))


def test_everything_that_a_chart_has_is_drawn():
    x = np.array([0, 0.5, 1])
    plain = a_chart(lines=[Line("", x, x)])
    for text in ("A title", "to the right", "up"):
        assert f">{text}<" in svg(plain)
    assert figures.chart(plain).alt == "In words."
    richer: dict[str, dict[str, Any]] = {
        "band": {"lines": [Line("", x, x, x - 1, x + 1)]},
        "band elsewhere": {
            "lines": [Line("", x, x, np.zeros(7), np.ones(7), np.linspace(0, 1, 7))]
        },
        "marks": {"lines": [Line("", x, x, x - 1, x + 1, marks=True)]},
        "level": {"lines": plain.lines, "level": 0.5},
        "diagonal": {"lines": plain.lines, "diagonal": True},
        "bars": {"lines": plain.lines, "bars": Bars(x, np.array([1, 5, 2]))},
        "second": {"lines": [*plain.lines, Line("", x, 1 - x)]},
    }
    for what, settings in richer.items():
        assert paths(svg(a_chart(**settings))) > paths(svg(plain)), what


def test_steps_hold_a_value_and_several_lines_have_no_bands():
    x = np.array([0, 0.5, 1])
    straight, steps = (svg(a_chart(lines=[Line("", x, x, steps=s)])) for s in (False, True))
    assert straight != steps
    both = [Line("", x, x), Line("", x, 1 - x)]
    banded = [dataclasses.replace(line, low=line.y - 0.1, high=line.y + 0.1) for line in both]
    assert svg(a_chart(lines=banded)) == svg(a_chart(lines=both))
    assert svg(a_chart(lines=banded[:1])) != svg(a_chart(lines=both[:1]))


def test_a_long_title_goes_on_in_a_second_line_and_no_further():
    whole = "Trained on synthetic images, tested on real ones"
    chart = dataclasses.replace(a_chart(), title=whole)
    lines = [line for line in re.findall(r">([^<>]+)</(?:text|tspan)>", svg(chart))]
    assert {"Trained on synthetic images,", "tested on real ones"} <= set(lines)
    endless = svg(dataclasses.replace(chart, title="much " * 40))
    assert endless.count("much") == 12
    assert "\u2026" in endless
    assert "A title" in svg(dataclasses.replace(chart, title="A title"))
    figures.chart(dataclasses.replace(chart, title=""))


def test_lines_differ_by_more_than_their_colour():
    x = np.arange(3.0)
    drawn = svg(a_chart(lines=[Line(f"line {n}", x, n * x) for n in range(8)]))
    styles = re.findall(r'style="(fill: none; [^"]*)"', drawn)
    curves = {s for s in styles if "width: 1.8" in s}
    dashes = [tuple(re.findall(r"dasharray: ([\d.,]+)", style)) for style in curves]
    assert len(curves) == 8
    assert {dashes.count(each) for each in dashes} == {2}


def test_a_key_stands_below_the_axes_where_it_hides_no_curve():
    x = np.linspace(0, 1, 9)
    drawn = svg(a_chart(lines=[Line("first", x, x), Line("second", x, 1 - x)]))
    axes = re.search(r'id="patch_2">\s*<path d="M [\d.]+ ([\d.]+)', drawn)
    label = re.search(r'y="([\d.]+)"[^>]*>to the right<', drawn)
    height = re.search(r'height="([\d.]+)pt"', drawn)
    keys = [float(y) for y in re.findall(r'y="([\d.]+)"[^>]*>(?:first|second)<', drawn)]
    assert axes
    assert label
    assert height
    assert float(axes[1]) < float(label[1]) < min(keys) - 9  # points, of the key's letters
    assert max(keys) < float(height[1])


def test_several_lines_have_a_key_and_one_has_none():
    x = np.arange(3.0)
    assert ">first<" in svg(a_chart(lines=[Line("first", x, x), Line("second", x, -x)]))
    assert ">first<" not in svg(a_chart(lines=[Line("first", x, x)]))


@pytest.mark.parametrize(
    "y", [np.array([]), np.array([np.nan, np.nan]), np.array([np.inf, 1.0]), np.array([2.0, 2.0])]
)
@pytest.mark.parametrize("square", [True, False])
def test_odd_figures_are_still_a_chart(y, square, recwarn):
    line = Line("", np.arange(len(y), dtype=float), y, y, y)
    bars = Bars(np.arange(2.0), np.zeros(2))
    assert "A title" in svg(a_chart(lines=[line], unit_square=square, bars=bars))
    assert not [str(w.message) for w in recwarn]


# --- What is no evidence ----------------------------------------------------------------------

PATIENTS = np.array([0, 0, 1, 2])


@pytest.mark.parametrize(
    ("evidence", "patients", "words"),
    [
        ({"levels": np.zeros(3)}, PATIENTS, "levels: 3 rows, expected 4"),
        ({"levels": np.zeros(())}, PATIENTS, "levels: .*expected numbers"),
        ({"levels": np.array(["a"] * 4)}, PATIENTS, "levels: .*expected numbers"),
        ({"levels": np.zeros(4)}, PATIENTS.astype(float), "patients: float64"),
        ({"levels": np.zeros(4)}, PATIENTS.reshape(2, 2), r"patients: .*\(2, 2\)"),
        ({"levels": np.zeros(4), "unit": np.zeros(4)}, PATIENTS, "unit: a name"),
        ({"levels": np.zeros(4), "validation_x": np.zeros(4)}, PATIENTS, "validation_x: a name"),
        ({"levels": np.zeros(4), "gallery": np.zeros((1, 2))}, PATIENTS, "gallery: 1 rows"),
    ],
)
def test_evidence_that_cannot_be_a_parts_is_refused(build_run, evidence, patients, words):
    spec = toy_spec(RunSpec.from_json((build_run(rounds=2) / "spec.json").read_text()))
    with pytest.raises(ValueError, match=words):
        score_part(spec, "test", evidence, patients, "patient")


def test_a_record_without_what_the_task_needs_is_refused_by_name(toy_run):
    directory = toy_run()
    with np.load(directory / "evaluation.npz") as stored:
        kept = {key: array for key, array in stored.items() if key != "levels"}
    np.savez(directory / "evaluation.npz", allow_pickle=False, **kept)
    with pytest.raises(RunError, match=r"evaluation\.npz: cannot be used \('levels'\)"):
        write_report(directory)


def test_a_federated_metric_that_the_task_has_not_is_refused(toy_run):
    directory = toy_run()
    found = {"sites": {}, "patients": 1.0, "deviation": 1.0, "metrics": {"luck": {"value": 1.0}}}
    (directory / "federated.json").write_text(json.dumps(found))
    for write in (write_report, write_card):
        with pytest.raises(RunError, match=r"federated\.json: metric 'luck'"):
            write(directory)


def test_any_damage_to_the_evidence_is_named_or_none(build_run):
    directory = build_run(rounds=2)
    path = directory / "evaluation.npz"
    whole = path.read_bytes()
    expected = {n: p.to_json() for n, p in RunRecord.read(directory).final.items()}
    rng = np.random.default_rng(0)
    one_array = io.BytesIO()
    np.save(one_array, np.zeros(3))
    damaged = [b"", one_array.getvalue(), *(whole[:n] for n in rng.integers(0, len(whole), 40))]
    for place in rng.integers(0, len(whole), 80):
        damaged.append(whole[:place] + bytes([whole[place] ^ 0x55]) + whole[place + 1 :])
    refused = []
    for content in damaged:
        path.write_bytes(content)
        try:
            found = RunRecord.read(directory).final
        except RunError as error:
            refused.append(str(error))
        else:
            assert {name: part.to_json() for name, part in found.items()} == expected
    assert len(refused) > 100
    assert all(said.startswith(f"{path}: ") for said in refused)
