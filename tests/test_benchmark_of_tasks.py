"""`benchmarks/tasks.py` on data of a few images: what is run, kept, read and written."""

from __future__ import annotations

import importlib
import json
import zipfile
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest

from common.accounting import planned
from common.cohort import Cohort
from common.errors import ConfigError
from common.spec import DpSgd, parse_run_text, read_run_file
from common.tasks import reconstruction
from common.tasks.estimates import Estimate

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
TINY = {"local.batch_size": "4", "local.steps": "1", "evaluation.gallery": "2"}


@pytest.fixture
def tasks(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(BENCHMARKS)
    module = importlib.import_module("tasks")
    monkeypatch.setattr(module, "WORKERS", 0)
    return module


@pytest.fixture
def trial(tasks: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    made = tasks.Trial("tiny", "tasks/denoising", "pneumonia", 10, "Denoising", TINY)
    monkeypatch.setattr(tasks, "TRIALS", {"tiny": made})
    return made


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """As ../shared/data: 40, 10 and 12 X-rays that are noise."""
    generator = np.random.default_rng(1)
    arrays: dict[str, Any] = {}
    for part, count in (("train", 40), ("val", 10), ("test", 12)):
        arrays[f"{part}_images"] = generator.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        arrays[f"{part}_labels"] = (np.arange(count, dtype=np.uint8) % 2)[:, None]
    (tmp_path / "data" / "medmnist").mkdir(parents=True)
    np.savez(tmp_path / "data" / "medmnist" / "pneumoniamnist.npz", **arrays)
    return tmp_path / "data"


def test_a_trial_is_run_once_and_its_table_says_what_the_run_s_folder_says(
    tasks: Any, trial: Any, data: Path, tmp_path: Path
) -> None:
    work, page = tmp_path / "work", tmp_path / "results.md"
    page.write_text(f"before\n{tasks.BEGIN}\nold\n{tasks.END}\nafter\n")
    folder = tasks.run(trial, 7, work, data=data, rounds=1)

    assert tasks.run(trial, 7, work, data=data, rounds=1) == folder
    tasks.write(page, work)

    last = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    truth = last["evaluation"]["test"]["metrics"]["psnr"]
    line = json.loads(page.with_suffix(".json").read_text())["tiny"]["lines"][0]
    assert (line["value"], line["low"], line["high"]) == pytest.approx(tuple(truth.values()))
    assert line["seeds"] == [7]
    assert f"| PSNR (dB) | {truth['value']:.2f}" in page.read_text()
    assert page.read_text().startswith("before\n")
    assert page.read_text().endswith("\nafter\n")
    assert "old" not in page.read_text()


def test_the_gain_over_a_median_filter_is_the_difference_of_both(
    tasks: Any, trial: Any, data: Path, tmp_path: Path
) -> None:
    folder = tasks.run(trial, 7, tmp_path / "work", data=data, rounds=1)
    kept = np.load(folder / "evaluation.npz")
    found = tasks.figures(folder)
    for column, name in enumerate(tasks.REFERENCES):
        own, other = kept["psnr"].mean(), kept["references"][:, column, 0].mean()
        assert found[name].value == pytest.approx(own - other, abs=1e-4)


def test_each_half_of_the_anomaly_score_has_the_area_that_pairs_of_images_give(
    tasks: Any, monkeypatch: pytest.MonkeyPatch, data: Path, tmp_path: Path
) -> None:
    changes = TINY | {"model.width": "8"}
    made = tasks.Trial("tiny", "tasks/anomalies", "pneumonia", 10, "Anomalies", changes)
    folder = tasks.run(made, 7, tmp_path / "work", data=data, rounds=1)
    kept = np.load(folder / "evaluation.npz")
    ratios = list(reconstruction._RATIOS)
    transform = kept["references"][:, -len(ratios) + ratios.index(16), 0]
    ill = kept["abnormal"] > 0
    for name, score in (("squared error alone", kept["mse"]), ("its PSNR", transform)):
        pairs = np.sign(score[ill][:, None] - score[~ill])
        (found,) = [value for title, value in tasks.figures(folder).items() if name in title]
        assert found.value == pytest.approx((pairs.mean() + 1) / 2)


def test_a_run_whose_file_has_changed_is_run_anew(
    tasks: Any, trial: Any, data: Path, tmp_path: Path
) -> None:
    first = tasks.run(trial, 7, tmp_path / "work", data=data, rounds=1)
    second = tasks.run(trial, 7, tmp_path / "work", data=data, rounds=2)
    assert not first.exists()
    assert tasks.read(second).rounds == 2


def test_a_run_that_was_cut_off_goes_on_and_is_in_no_table_before(
    tasks: Any, trial: Any, data: Path, tmp_path: Path
) -> None:
    work = tmp_path / "work"
    folder = tasks.run(trial, 7, work, data=data, rounds=1)
    (folder / "report.html").unlink()
    assert tasks.finished(work, "tiny") == []
    assert tasks.run(trial, 7, work, data=data, rounds=1) == folder
    assert tasks.finished(work, "tiny") == [folder]


def test_the_line_of_several_seeds_has_their_mean_and_the_widest_interval(
    tasks: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    seeds = {Path("a"): (2, Estimate(0.9, 0.8, 0.95)), Path("b"): (1, Estimate(0.6, 0.5, 0.7))}
    monkeypatch.setattr(tasks, "figures", lambda folder: {"Dice": seeds[folder][1]})
    monkeypatch.setattr(tasks, "seed_of", lambda folder: seeds[folder][0])
    made = tasks.Trial("x", "", "", 1, "", aims={"Dice": 0.74})

    (line,) = tasks.lines(made, list(seeds))
    assert (line.seeds, line.values) == ((1, 2), (0.6, 0.9))
    assert line.value == pytest.approx(0.75)
    assert (line.low, line.high) == (0.5, 0.95)
    assert line.met == "met"


@pytest.mark.parametrize(
    ("values", "met"), [((0.5,), "**not met**"), ((0.9, None), "**not met**"), ((0.8,), "met")]
)
def test_an_aim_is_met_by_the_mean_of_all_seeds(
    tasks: Any, values: tuple[float | None, ...], met: str
) -> None:
    seeds = tuple(range(len(values)))
    assert tasks.Line("Dice", seeds, values, 0.0, 1.0, 0.8).met == met


def test_a_page_without_the_place_for_the_table_is_refused(tasks: Any, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("nothing")
    with pytest.raises(ConfigError, match="expected the lines"):
        tasks.write(page, tmp_path)
    assert page.read_text() == "nothing"


def test_a_key_that_the_preset_does_not_have_is_refused(tasks: Any) -> None:
    text = "seed = 1\n[a]\nseed = 2\n[b]\nseed = 3\n"
    assert tasks.changed(text, {"b.seed": "4"}) == "seed = 1\n[a]\nseed = 2\n[b]\nseed = 4\n"
    with pytest.raises(ValueError, match=r"c\.seed: expected a line"):
        tasks.changed(text, {"c.seed": "4"})


@pytest.mark.parametrize("name", ["tasks", "site_size"])
def test_every_trial_and_every_curve_has_a_file_that_is_a_run(
    tasks: Any, name: str, tmp_path: Path
) -> None:
    module = importlib.import_module(name)
    texts = (
        [
            module.changed((BENCHMARKS / f"{one.preset}.toml").read_text(), one.changes)
            for one in module.TRIALS.values()
        ]
        if name == "tasks"
        else [module.text_of(one, one.sizes[-1], 1) for one in module.CURVES.values()]
    )
    for text in texts:
        (tmp_path / "run.toml").write_text(text)
        assert read_run_file(tmp_path / "run.toml").spec.rounds


@pytest.mark.parametrize(("name", "size"), [("hippocampus", 3000), ("bccd", 5100)])
def test_scaled_noise_is_that_of_a_real_site_of_so_many_patients(
    tasks: Any, name: str, size: int
) -> None:
    """On the mean gradient of a step, when every step takes the same part of its patients."""
    site_size = importlib.import_module("site_size")
    curve = site_size.CURVES[name]
    scaled = parse_run_text(site_size.text_of(curve, size, 1), source=name).spec
    text = (BENCHMARKS / f"{curve.preset}.toml").read_text()
    larger = scaled.local.batch_size * size // curve.there
    real = parse_run_text(tasks.changed(text, {"local.batch_size": str(larger)}), source=name).spec
    mechanism = planned(real, size)
    assert mechanism is not None
    assert isinstance(scaled.privacy, DpSgd)
    ours = scaled.privacy.noise_multiplier or 0.0
    assert ours / scaled.local.batch_size == pytest.approx(
        mechanism.noise_multiplier / larger, rel=1e-3
    )


@pytest.mark.parametrize(("name", "rows"), [("hippocampus", 4), ("hippocampus-3d", 2)])
def test_two_volumes_of_one_patient_are_on_one_side_of_the_split(
    tasks: Any, name: str, rows: int, tmp_path: Path
) -> None:
    (tmp_path / "hippocampus").mkdir()
    generator = np.random.default_rng(1)
    with zipfile.ZipFile(tmp_path / "hippocampus" / "msd_task04_subset.zip", "w") as archive:
        for number in range(1, 41):
            for what in ("images", "labels"):
                values = generator.integers(0, 3, (2, 8, 8)).astype(np.float32)
                volume = nibabel.Nifti1Image(values, np.eye(4))
                nibabel.save(volume, tmp_path / "volume.nii.gz")
                archive.write(tmp_path / "volume.nii.gz", f"{what}/hippocampus_{number:03}.nii.gz")
    text = (BENCHMARKS / "tasks" / f"{name}.toml").read_text()
    cohort = Cohort.open(tasks.cohort_of(name, tmp_path / "work", tmp_path, text))

    splits = [set(cohort.splits[cohort.rows_of(n)]) for n in range(len(cohort.patients))]
    assert len(cohort.patients) == 20
    assert all(len(cohort.rows_of(n)) == rows for n in range(20))
    assert all(len(split) == 1 for split in splits)
    of = [split.pop() for split in splits]
    assert [of.count(name) for name in ("train", "validation", "test")] == [14, 2, 4]
