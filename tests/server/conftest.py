"""A run directory as a real run leaves it, with results that a real model could have."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from common import models
from common.spec import RunSpec, parse_run_text
from server.card import write_card
from server.evaluation import EvaluationResult, score_part

RUN = """
name = "chest-finding"
seed = 7
rounds = {rounds}
[task]
kind = "{kind}"
classes = {classes}
[model]
name = "small-cnn"
[input]
height = 64
width = 64
[augmentation]
rotate = 8
shift = 0.05
multiplicity = 4
[optimizer]
name = "sgd"
learning_rate = 0.5
[schedule]
name = "cosine"
[local]
steps = 2
batch_size = 64
{privacy}
[federation]
quorum = 2
deadline_seconds = 60
[aggregation]
strategy = "fedavgm"
average_decay = 0.9
[evaluation]
bootstrap = 60
"""
DP = """
[privacy]
mechanism = "dp-sgd"
unit = "patient"
clip_norm = 1.0
target_epsilon = 3.0
delta = 1e-4
"""
CLASSES = {
    "binary": ("clear", "finding"),
    "multiclass": ("clear", "nodule", "effusion"),
    "multilabel": ("cardiomegaly", "nodule", "effusion"),
}
SIZES = {"Northgate University Hospital": 800, "St Brigid": 400, "Southbank": 600, "Westmoor": 250}
STATUSES = {
    ("Westmoor", 4): ("late", "no answer within 60 s"),
    ("Westmoor", 5): ("late", "no answer within 60 s"),
    ("Southbank", 9): ("failed", "incident 4f1c09"),
    ("St Brigid", 12): ("rejected", "update of layer head.weight is not finite"),
}


def answers(
    spec: RunSpec, images: int, skill: float, seed: int
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """What a model of some skill says of `images`, and whose these are; the same for one seed."""
    rng = np.random.default_rng(seed)
    classes = len(spec.task.classes)
    patients = np.sort(rng.integers(0, int(images * 0.7), images))
    noise = rng.normal(size=(images, classes))
    if spec.task.kind == "multilabel":
        labels: np.ndarray = (rng.random((images, classes)) < 0.3).astype(np.float32)
        probabilities = 1 / (1 + np.exp(1 - skill * (1.5 * labels - 0.4) - noise))
    elif spec.task.kind == "binary":
        labels = (rng.random(images) < 0.35).astype(np.int64)
        positive = 1 / (1 + np.exp(0.6 - skill * (labels - 0.5) - 0.9 * noise[:, 0]))
        probabilities = np.stack([1 - positive, positive], axis=1)
    else:
        labels = rng.integers(0, classes, images)
        powers = np.exp(noise + skill * np.eye(classes)[labels])
        probabilities = powers / powers.sum(axis=1, keepdims=True)
    return {"probabilities": probabilities.astype(np.float32), "labels": labels}, patients


def evaluation(spec: RunSpec, skill: float) -> EvaluationResult:
    return EvaluationResult(
        score_part(spec, "validation", *answers(spec, 150, skill, 1), "patient"),
        score_part(spec, "test", *answers(spec, 350, skill, 2), "patient"),
    )


def skill_after(round_number: int) -> float:
    wobble = np.random.default_rng(round_number).normal(0, 0.12)
    return float(1.8 * (1 - np.exp(-round_number / 7)) + wobble)


def round_line(spec: RunSpec, number: int, sites: list[str]) -> dict[str, Any]:
    asked = {
        name: dict(zip(("status", "reason"), STATUSES.get((name, number), ("ok", "")), strict=True))
        for name in sites
    }
    return {
        "round": number,
        "seconds": 1.8 + 0.1 * (number % 3),
        "learning_rate": spec.learning_rate(number, 0),
        "sites": asked,
        "update_norm": 1.4 / number**0.5,
        "evaluation": evaluation(spec, skill_after(number)).to_json(),
    }


def spending(spec: RunSpec, size: int, rounds: int, *, paced: bool) -> dict[str, Any]:
    entry = {
        "paced": paced,
        "declared_size": size,
        "unit": spec.privacy.unit,
        "mechanism": "none",
        "sampling_rate": None,
        "noise_multiplier": None,
        "clip_norm": None,
        "steps": 2 * rounds,
        "rounds": rounds,
        "epsilon": None,
        "delta": None,
    }
    if spec.privacy.mechanism == "none":
        return entry
    return entry | {
        "mechanism": "Poisson-subsampled Gaussian",
        "sampling_rate": 64 / size,
        "noise_multiplier": round(0.9 + 200 / size, 3),
        "clip_norm": 1.0,
        "epsilon": 2.9981 - 0.02 * (spec.rounds - rounds),
        "delta": 1e-4,
    }


def write_run(
    directory: Path,
    *,
    rounds: int = 14,
    kind: str = "binary",
    protection: str = "seeded",
    paced: Sequence[str] = (),
) -> Path:
    """Write a run directory of four sites, some of them `paced`.

    `protection` is protected, seeded or none.
    """
    private = protection != "none"
    privacy = DP if private else '[privacy]\nmechanism = "none"\n'
    text = RUN.format(
        rounds=rounds,
        kind=kind,
        classes=json.dumps(CLASSES[kind]),
        privacy=privacy,
    )
    spec = parse_run_text(text, source="run.toml").spec.identified("chest-finding-20260711-8f2c")
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "spec.json").write_text(spec.canonical_json)
    lines = [round_line(spec, number, sorted(SIZES)) for number in range(1, rounds + 1)]
    (directory / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    took_part = {
        name: sum(line["sites"][name]["status"] in ("ok", "late", "rejected") for line in lines)
        for name in SIZES
    }
    spent = {
        name: spending(spec, size, took_part[name], paced=name in paced)
        for name, size in SIZES.items()
    }
    write_json(
        directory / "privacy.json",
        {
            "protected": protection == "protected",
            "sites": spent,
            "all_sites_epsilon": 8.8112 if private else None,
            "all_sites_delta": 4e-4 if private else None,
        },
    )
    write_json(directory / "environment.json", environment(protection != "protected", rounds))
    evaluation(spec, skill_after(rounds - 1)).save(directory / "evaluation.npz")
    (directory / "model.safetensors").write_bytes(b"not really weights")
    return directory


def environment(seeded: bool, rounds: int) -> dict[str, Any]:
    versions = {
        "cloister": "0.1.0",
        "python": "3.11.11",
        "torch": "2.13.0",
        "flwr": "1.41.0",
        "opacus": "1.6.0",
    }
    return {
        "versions": versions,
        "engine": "local",
        "device": "cpu",
        "seeded": seeded,
        "started": "2026-07-11T09:12:04+00:00",
        "finished": "2026-07-11T09:13:31+00:00",
        "wall_seconds": 87.2,
        "training_seconds": 80.6,
        "model_round": rounds - 1,
    }


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value))


def change(path: Path, **values: Any) -> None:
    """Overwrite some keys of a JSON file."""
    write_json(path, json.loads(path.read_text()) | values)


@pytest.fixture(scope="session")
def prepared_runs(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """One run directory for each set of options, not to be changed."""

    @cache
    def prepared(**options: Any) -> Path:
        return write_run(tmp_path_factory.mktemp("prepared") / "run", **options)

    return prepared


@pytest.fixture
def build_run(tmp_path: Path, prepared_runs: Callable[..., Path]) -> Callable[..., Path]:
    """Call it with the options of `write_run`; gives a run directory of the test's own."""

    def build(**options: Any) -> Path:
        return Path(shutil.copytree(prepared_runs(**options), tmp_path / "run"))

    return build


@pytest.fixture(scope="session")
def finish_run() -> Callable[..., Path]:
    """Call it with a run directory, and a seed: gives it real weights, and the card of these."""

    def finish(run: Path, seed: int = 1) -> Path:
        spec = RunSpec.from_json((run / "spec.json").read_text())
        source = torch.Generator().manual_seed(seed)
        weights = {
            name: (tensor + 0.1 * torch.randn(tensor.shape, generator=source)).numpy()
            for name, tensor in models.build(spec).state_dict().items()
        }
        save_file(weights, run / "model.safetensors")
        write_card(run)
        return run

    return finish


@pytest.fixture
def edit() -> Callable[..., None]:
    """`change`, for tests that damage a run directory."""
    return change
