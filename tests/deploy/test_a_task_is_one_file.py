"""A task that the house has never heard of: this file, and one line in the registry.

It learns how bright an image is on the whole, from images without any label.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from client.intake.builder import CohortBuilder, ImageRecord
from common import tasks
from common.cohort import Cohort, CohortMeta
from common.errors import CohortError, ModelError, SpecError
from common.spec import Metric, RunSpec, parse_run_text
from common.spec import Task as Section
from common.tasks.estimates import Estimate, means
from common.tasks.exhibits import Exhibit, Table
from common.tasks.task import Evidence, Task
from deploy.simulation import prepare, simulate

RUN = """
name = "how-bright"
rounds = 6
[task]
name = "brightness"
power = 1
[model]
name = "small-cnn"
width = 8
[input]
height = 16
width = 16
[loss]
name = "squared"
[optimizer]
name = "adam"
learning_rate = 0.03
[local]
batch_size = 20
steps = 4
[privacy]
mechanism = "dp-sgd"
noise_multiplier = 0.5
delta = 1e-4
[federation]
quorum = 2
[evaluation]
metric = "error"
bootstrap = 50
[simulation]
evaluation = "evaluation"
[[simulation.site]]
name = "north"
cohort = "north"
declared_size = 60
[[simulation.site]]
name = "south"
cohort = "south"
declared_size = 60
"""


class BrightnessSection(Section):
    """How bright an image is, to a power."""

    LOSSES: ClassVar[tuple[str, ...]] = ("squared",)
    METRICS: ClassVar[Mapping[str, Metric]] = {
        "error": Metric("Error of the brightness", lower_is_better=True, unit="parts of white")
    }
    NETWORK: ClassVar[str] = "vector"

    name: Literal["brightness"]
    kind: Literal["none"] = "none"
    power: int

    @property
    def outputs(self) -> int:
        return 1


class Brightness(Task):
    def __init__(self, spec: RunSpec) -> None:
        super().__init__(spec)
        self.power = spec.task_as(BrightnessSection).power

    def examples(
        self, images: Tensor, targets: Tensor, network: nn.Module, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        return images, self._true(images)

    def losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return (outputs[:, 0] - targets).square()

    def measured(self, outputs: Tensor, images: Tensor, targets: Tensor) -> Evidence:
        return {"said": outputs[:, 0].numpy(), "true": self._true(images).numpy()}

    def score(
        self,
        evidence: Evidence,
        patients: NDArray[np.int64],
        *,
        resamples: int,
        generator: np.random.Generator,
    ) -> Mapping[str, Estimate]:
        rows = {"error": np.abs(evidence["said"] - evidence["true"])}
        return means(rows, patients, resamples=resamples, generator=generator)

    def exhibits(self, evidence: Evidence, patients: NDArray[np.int64]) -> Sequence[Exhibit]:
        darkest = float(evidence["true"].min())
        return [Table("Extremes", ("image", "brightness"), [("the darkest", f"{darkest:.4f}")])]

    def _true(self, images: Tensor) -> Tensor:
        return images.mean(dim=(1, 2, 3)) ** self.power


@pytest.fixture
def brightness(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = tasks.TaskEntry(f"{__name__}:BrightnessSection", f"{__name__}:Brightness")
    monkeypatch.setitem(tasks.TASKS, "brightness", entry)


@pytest.fixture
def run_file(brightness: None, tmp_path: Path) -> Path:
    path = tmp_path / "run.toml"
    path.write_text(RUN)
    spec = parse_run_text(RUN, source="run.toml").spec
    for number, name in enumerate(("north", "south", "evaluation")):
        write(tmp_path / name, spec, 60, seed=number)
    return path


def write(path: Path, spec: RunSpec, images: int, *, seed: int) -> None:
    """Images of any brightness, two of each patient."""
    rng = np.random.default_rng(seed)
    with CohortBuilder(path, spec.input.shape, task=spec.task) as builder:
        for row in range(images):
            level = rng.uniform(0, 65535)
            pixels = rng.normal(level, 3000, spec.input.shape).clip(0, 65535).astype(np.uint16)
            builder.add(ImageRecord(f"p{row // 2:03d}", "", "", str(row), 0, 16, 16), pixels)
        builder.finish(CohortMeta.of(spec, unit="patient", source="test", created="2026-01-01"))


@pytest.fixture
def folder(run_file: Path, watching: Callable[[], Any]) -> Path:
    made = prepare(run_file, run_file.parent / "runs")
    simulate(made, workers=0, observer=watching())
    return made


def test_a_task_in_one_file_goes_from_its_run_file_to_its_report(folder: Path):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["sites"]["south"]["status"] for row in rows] == ["ok"] * 6
    chosen = [row["evaluation"]["validation"]["metrics"]["error"]["value"] for row in rows]
    errors = [row["evaluation"]["test"]["metrics"]["error"] for row in rows]
    best = errors[int(np.argmin(chosen))]  # of an error the least, on the part that decides
    assert best["value"] < errors[0]["value"] / 2  # it has learned
    assert best["low"] < best["value"] < best["high"]

    with np.load(folder / "evaluation.npz", allow_pickle=False) as kept:
        assert float(np.abs(kept["said"] - kept["true"]).mean()) == pytest.approx(best["value"])
        darkest = float(kept["true"].min())

    page = (folder / "report.html").read_text()
    for said in ("Error of the brightness", "parts of white", "Extremes", "the darkest"):
        assert said in page
    assert f"{darkest:.4f}" in page
    assert f"{best['value']:.2f} parts of white" in page
    assert "AUROC" not in page
    card = json.loads((folder / "model_card.json").read_text())
    assert "brightness" in json.dumps(card)
    assert set(json.loads((folder / "privacy.json").read_text())["sites"]) == {"north", "south"}


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        (
            '"brightness"',
            '"brightnes"',
            ["task.name = 'brightnes'", "classification", "brightness"],
        ),
        ("power = 1", "power = 1.5", ["run.toml:6: task.power = 1.5", "integer"]),
        ("power = 1", "powr = 1", ["task.powr = 1: unknown key", "did you mean 'power'"]),
        ('"squared"', '"dice"', ["run.toml:14: loss.name = 'dice'", "expected one of squared"]),
        ('"error"', '"auroc"', ["evaluation.metric = 'auroc'", "expected one of error"]),
        (
            "bootstrap = 50",
            "federated = { noise_multiplier = 1.0 }",
            ["evaluation.federated: brightness has no noised counts"],
        ),
    ],
)
def test_its_own_keys_are_checked_as_strictly(
    brightness: None, old: str, new: str, said: list[str]
):
    with pytest.raises(SpecError) as caught:
        parse_run_text(RUN.replace(old, new), source="run.toml")
    for part in said:
        assert part in str(caught.value)


def test_its_spec_travels_as_any_other(brightness: None):
    spec = parse_run_text(RUN, source="run.toml").spec
    again = RunSpec.from_json(spec.canonical_json)
    assert (again, again.digest) == (spec, spec.digest)
    assert again.task_as(BrightnessSection).power == 1
    assert '"power":1' in spec.canonical_json


def test_a_network_that_gives_something_else_is_refused_before_anything_is_trained(
    run_file: Path,
):
    run_file.write_text(RUN.replace('"small-cnn"', '"unet"'))
    with pytest.raises(ModelError, match=r"it gives 'map', and brightness takes 'vector'"):
        prepare(run_file, run_file.parent / "runs")


def test_a_cohort_of_labels_does_not_serve_it(run_file: Path, write_cohort: Any, make_spec: Any):
    labelled: Cohort = write_cohort(make_spec(), range(4), name="labelled")
    spec = parse_run_text(RUN, source="run.toml").spec
    with pytest.raises(CohortError, match=r"task\.kind is binary, the run asks for none"):
        labelled.check_fits(spec)
