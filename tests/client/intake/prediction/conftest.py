"""What the tests of prediction share: a hospital with a model, and what it answers."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file
from torch import nn

from client.prediction.answering import Model
from client.prediction.predict import Order, Summary, predict
from common import models
from common.package import Package
from common.spec import RunSpec


@dataclass
class Answers:
    """What a prediction has left."""

    summary: Summary
    folder: Path

    @property
    def json(self) -> dict[str, Any]:
        def strict(name: str) -> None:
            raise AssertionError(name)

        text = (self.folder / "predictions.json").read_text()
        found: dict[str, Any] = json.loads(text, parse_constant=strict)
        return found

    def table(self, name: str) -> list[dict[str, str]]:
        with (self.folder / name).open(newline="") as file:
            return list(csv.DictReader(file))

    @property
    def refused(self) -> dict[str, str]:
        return {row["file"]: row["reason"] for row in self.json["refused"]}

    def files(self, kind: str) -> list[Path]:
        return sorted((self.folder / kind).glob("*.dcm"))


@dataclass
class Clinic:
    """A hospital with a model."""

    hospital: Any
    in_this_process: Any
    make_spec: Callable[..., RunSpec]
    changes: Mapping[str, Any] = field(default_factory=dict)

    def model(self, network: nn.Module | None = None, **changes: Any) -> Model:
        spec = self.make_spec(**{**self.changes, **changes})
        folder = self.hospital.place / "run"
        folder.mkdir(exist_ok=True)
        (folder / "spec.json").write_text(spec.canonical_json)
        save_file(models.build(spec).state_dict(), folder / "model.safetensors")
        made = Model(Package.open(folder, unsigned=True))
        made.network = network or made.network
        return made

    def answer(self, model: Model, name: str = "answers", **order: Any) -> Answers:
        target = self.hospital.place / name
        asked = Order(model, order.pop("source", self.hospital.folder), target, **order)
        return Answers(predict(asked, pool=self.in_this_process), target)

    @staticmethod
    def read(folder: Path) -> Answers:
        """What lies in a folder of answers."""
        return Answers(Summary(), folder)


@pytest.fixture
def clinic(hospital: Any, in_this_process: Any, make_spec: Callable[..., RunSpec]) -> Clinic:
    return Clinic(hospital, in_this_process, make_spec)
