"""A federated evaluation over a whole simulated run: booked, reported, near the truth."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from client.intake.builder import CohortBuilder, ImageRecord
from common.accounting import SubsampledGaussian, epsilon, planned
from common.cohort import CohortMeta
from common.spec import RunSpec
from deploy.simulation import load, prepare, simulate
from server.rounds import LogObserver

RUN = """
[evaluation]
bootstrap = 20
federated = { noise_multiplier = 2.0, bins = 10 }
[simulation]
evaluation = "evaluation"
[[simulation.site]]
name = "north"
cohort = "north"
declared_size = 200
[[simulation.site]]
name = "south"
cohort = "south"
declared_size = 100
"""


def bright_or_dark(path: Path, spec: RunSpec, patients: int, splits: list[str], seed: int) -> None:
    """A cohort in which the finding is brighter, and a network can learn it."""
    rng = np.random.default_rng(seed)
    with CohortBuilder(path, spec.input.shape) as builder:
        for number in range(patients):
            label = number % 2
            image = np.clip(rng.normal(20000 + 20000 * label, 9000, spec.input.shape), 0, 65535)
            patient, split = f"{path.name}-{number:04d}", splits[number // 2 % len(splits)]
            record = ImageRecord(patient, "st", "se", str(number), label, 16, 16, split)
            builder.add(record, image.astype(np.uint16))
        builder.finish(CohortMeta.of(spec, unit="patient", source="test", created="2026-01-01"))


@pytest.fixture(scope="module")
def run_folder(
    tmp_path_factory: pytest.TempPathFactory, spec_text: str, make_spec: Callable[..., RunSpec]
) -> Path:
    tmp_path, spec = tmp_path_factory.mktemp("federated"), make_spec()
    bright_or_dark(tmp_path / "north", spec, 400, ["train", "test"], 1)
    bright_or_dark(tmp_path / "south", spec, 200, ["train", "test"], 2)
    bright_or_dark(tmp_path / "evaluation", spec, 80, [""], 3)
    text = spec_text.replace("rounds = 3", "rounds = 8").replace(
        "batch_size = 4", "batch_size = 40\nsteps = 2"
    )
    (tmp_path / "run.toml").write_text(text + RUN)
    folder = prepare(tmp_path / "run.toml", tmp_path / "runs")
    simulate(folder, workers=0, observer=LogObserver())
    return folder


def test_the_sites_own_patients_say_what_the_central_ones_say_and_it_is_booked(run_folder: Path):
    result = json.loads((run_folder / "federated.json").read_text())
    assert result["sites"] == {"north": "ok", "south": "ok"}
    assert result["patients"] == pytest.approx(200 + 100, abs=80)
    assert result["deviation"] == pytest.approx(2.0 * 2**0.5)
    central = json.loads((run_folder / "metrics.jsonl").read_text().splitlines()[-1])
    auroc = central["evaluation"]["test"]["metrics"]["auroc"]["value"]
    assert auroc > 0.8
    assert result["metrics"]["auroc"]["value"] == pytest.approx(auroc, abs=0.12)

    spec, _ = load(run_folder)
    spent: Any = json.loads((run_folder / "privacy.json").read_text())["sites"]
    for name, size in (("north", 200), ("south", 100)):
        training = planned(spec, size)
        assert training is not None
        both = [training, SubsampledGaussian(1.0, 2.0, 1, "patient")]
        assert spent[name]["epsilon"] == pytest.approx(epsilon(both, spec.privacy.delta))  # type: ignore[union-attr]
        assert spent[name]["epsilon"] > epsilon([training], spec.privacy.delta)  # type: ignore[union-attr]


def test_report_and_card_show_it_with_the_noise_in_words(run_folder: Path):
    page = (run_folder / "report.html").read_text()
    assert "own held-out patients" in page
    assert "10 public thresholds" in page
    card = (run_folder / "model_card.md").read_text()
    assert "own held-out patients of 2 sites" in card


def test_once_the_sites_were_told_that_the_run_is_over_nothing_more_is_spent_there(
    run_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    folder = tmp_path / run_folder.name
    shutil.copytree(run_folder, folder)
    (folder / "federated.json").unlink()
    entries = [(folder / "sites" / n / "ledger.sqlite").read_bytes() for n in ("north", "south")]
    simulate(folder, workers=0, observer=LogObserver())
    assert "no federated evaluation" in caplog.text
    assert not (folder / "federated.json").exists()
    after = [(folder / "sites" / n / "ledger.sqlite").read_bytes() for n in ("north", "south")]
    assert after == entries
