"""What a run leaves on disk for people and programs to read: see `docs/run-folder.md`.

``spec.json`` the run; ``metrics.jsonl`` one line a round; ``privacy.json`` what each site spent;
``environment.json`` versions and times; ``federated.json`` the federated evaluation, if any;
``model.safetensors`` and ``evaluation.npz`` the result; ``report.html`` and the model card for
people.
"""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from safetensors.numpy import save

from common import accounting
from common.accounting import SubsampledGaussian
from common.files import write_durably
from common.messages import Arrays, NodeCard
from common.spec import Behind, DpSgd, RunSpec
from server.card import write_card
from server.evaluation import EarlyStopping, EvaluationResult
from server.federated import FEDERATED_FILE, FederatedResult
from server.report import write_report

_VERSIONS = ("cloister", "flwr", "torch", "opacus", "dp-accounting", "numpy")


class SiteEntry(NamedTuple):
    """A site that took part: what it declared, its mechanism of the whole run, its pacing.

    And of a run that mixes in synthetic images, whether those behind its own are protected.
    """

    declared_size: int
    mechanism: SubsampledGaussian | None
    paced: bool
    synthetic: Behind | None = None

    @classmethod
    def of_card(cls, card: NodeCard, mechanism: SubsampledGaussian | None) -> Self:
        """What a site's yes says."""
        return cls(card.declared_size, mechanism, card.paced, card.synthetic)

    @classmethod
    def of_json(cls, saved: Mapping[str, Any]) -> Self:
        """What `to_json` made.

        Raises:
            KeyError, TypeError, ValueError: if it is something else.
        """
        made = saved["mechanism"]
        mechanism = SubsampledGaussian(**made) if made else None
        return cls(saved["declared_size"], mechanism, saved["paced"], saved.get("synthetic"))

    def to_json(self) -> dict[str, Any]:
        """For the checkpoint."""
        return self._asdict() | {"mechanism": self.mechanism and asdict(self.mechanism)}


class RunJournal:
    """Writes the folder of one run.

    Args:
        folder: where it lies.
        spec: the run.
        history: the finished rounds; ``metrics.jsonl`` is made to hold exactly these.
        engine: what carries the messages, for the record.
        seeded: whether the sites' randomness comes from a seed.
    """

    def __init__(
        self,
        folder: Path,
        spec: RunSpec,
        history: Sequence[Mapping[str, Any]],
        *,
        engine: str,
        seeded: bool,
    ) -> None:
        self._folder, self._spec, self._history = folder, spec, history
        self._engine, self._seeded = engine, seeded
        self._started, self._opened = _now(), time.monotonic()
        self.declined: dict[str, str] = {}
        self.sites: dict[str, SiteEntry] = {}
        self._counted: Mapping[str, str] = {}
        folder.mkdir(parents=True, exist_ok=True)
        write_durably(folder / "spec.json", spec.canonical_json.encode())
        lines = "".join(json.dumps(row) + "\n" for row in history)
        write_durably(folder / "metrics.jsonl", lines.encode())
        self._asked = _whole_lines(folder / _ASKED)
        write_durably(folder / _ASKED, "".join(f"{line}\n" for line in self._asked).encode())

    def ask(self, round_number: int, sites: Collection[str]) -> None:
        """Note durably, before any task is sent, who is about to be asked.

        A round that no record speaks of, because the process was killed or the quorum did not
        come, was trained all the same.
        """
        self._ask({"round": round_number, "sites": sorted(sites)})

    def ask_counts(self, sites: Collection[str]) -> None:
        """The same before the sites are asked for the counts of a federated evaluation."""
        self._ask({"evaluation": True, "sites": sorted(sites)})

    def _ask(self, asked: Mapping[str, Any]) -> None:
        line = json.dumps(asked)
        with (self._folder / _ASKED).open("a", encoding="utf-8") as file:
            file.write(line + "\n")
            file.flush()
            os.fsync(file.fileno())
        self._asked.append(line)

    def enter(self, name: str, entry: SiteEntry) -> None:
        """Note that a site takes part.

        It was paced, and those behind its synthetic images protected, if so in every process.
        """
        before = self.sites.get(name, entry)
        worse = before.synthetic if before.synthetic == "unprotected" else entry.synthetic
        self.sites[name] = entry._replace(paced=entry.paced and before.paced, synthetic=worse)

    def sites_to_json(self) -> dict[str, Any]:
        """The sites that ever took part, for the checkpoint."""
        return {name: entry.to_json() for name, entry in self.sites.items()}

    def restore_sites(self, saved: Mapping[str, Any]) -> None:
        """What `sites_to_json` wrote, when a run goes on."""
        for name, entry in saved.items():
            self.sites[name] = SiteEntry.of_json(entry)

    def append(self, row: Mapping[str, Any]) -> None:
        """Add one round's line. The checkpoint is the durable copy; a lost line comes back."""
        with (self._folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def conclude(self, weights: Arrays, result: EvaluationResult, stopping: EarlyStopping) -> None:
        """Write the model, what it reaches, what it cost, and the pages for people."""
        model = save(dict(weights), metadata={"spec": self._spec.canonical_json})
        write_durably(self._folder / "model.safetensors", model)
        result.save(self._folder / "evaluation.npz")
        self._write("privacy.json", self._privacy())
        self._write("environment.json", self._environment(stopping))
        write_card(self._folder)
        write_report(self._folder)

    @property
    def has_federated(self) -> bool:
        """Whether the federated evaluation's result is here."""
        return (self._folder / FEDERATED_FILE).exists()

    def federate(self, result: FederatedResult) -> None:
        """Write the federated evaluation's result, what it cost, and the pages for people again."""
        self._write(FEDERATED_FILE, result.to_json())
        self._counted = result.sites
        self._write("privacy.json", self._privacy())
        write_card(self._folder)
        write_report(self._folder)

    def _privacy(self) -> dict[str, Any]:
        """What each site spent, as far as the coordinator knows; its own ledger has the last word.

        Every task that a site was asked and did not refuse counts: also one whose release never
        came, and one of a round that was asked again after a crash.
        """
        spent = {name: self._spent(name) for name in sorted(self.sites)}
        together = [m for taken, _ in spent.values() for m in taken]
        privacy = self._spec.privacy
        exposed = any(entry.synthetic == "unprotected" for entry in self.sites.values())
        private = isinstance(privacy, DpSgd) and not exposed
        delta = privacy.delta if isinstance(privacy, DpSgd) else None
        return {
            "protected": private and not self._seeded,
            "sites": {name: self._site(name, *parts) for name, parts in spent.items()},
            "all_sites_epsilon": accounting.epsilon(together, delta) if delta else None,
            "all_sites_delta": delta,
        }

    def _spent(self, name: str) -> tuple[list[SubsampledGaussian], int]:
        """What was taken: training with its steps, then counts; and in how many rounds."""
        planned = self.sites[name].mechanism
        asked = [line for line in map(json.loads, self._asked) if name in line["sites"]]
        seen = [row["sites"].get(name, {}).get("status") for row in self._history]
        rounds = max(0, sum("round" in line for line in asked) - seen.count("refused"))
        steps = rounds * self._spec.local.steps
        taken = [planned.of_steps(steps)] if planned and steps else []
        counted = accounting.evaluation_of(self._spec)
        times = sum("evaluation" in line for line in asked)
        times -= self._counted.get(name, "").startswith("refused")
        return [*taken, *([counted.of_steps(times)] if counted and times > 0 else [])], rounds

    def _site(self, name: str, taken: list[SubsampledGaussian], rounds: int) -> dict[str, Any]:
        entry, privacy = self.sites[name], self._spec.privacy
        shared: dict[str, Any] = {
            "declared_size": entry.declared_size,
            "unit": privacy.unit,
            "rounds": rounds,
            "paced": entry.paced,
        }
        if entry.synthetic is not None:
            shared["synthetic"] = entry.synthetic
        if not isinstance(privacy, DpSgd):
            return shared | dict.fromkeys(_FIGURES) | {"mechanism": "none", "steps": 0}
        training = taken[0] if rounds else None
        return shared | {
            "mechanism": "Poisson-subsampled Gaussian",
            "sampling_rate": training.sampling_rate if training else None,
            "noise_multiplier": training.noise_multiplier if training else None,
            "clip_norm": privacy.clip_norm,
            "steps": training.steps if training else 0,
            "epsilon": accounting.epsilon(taken, privacy.delta),
            "delta": privacy.delta,
        }

    def _environment(self, stopping: EarlyStopping) -> dict[str, Any]:
        versions = {name: version(name) for name in _VERSIONS}
        return {
            "versions": versions | {"python": platform.python_version()},
            "engine": self._engine,
            "device": _device(),
            "seeded": self._seeded,
            "started": self._started,
            "finished": _now(),
            "wall_seconds": time.monotonic() - self._opened,
            "training_seconds": sum(row["waited_seconds"] for row in self._history),
            "model_round": stopping.best_round or len(self._history),
            "stopped_early": stopping.stop and len(self._history) < self._spec.rounds,
            "declined": self.declined,
        }

    def _write(self, name: str, content: Mapping[str, Any]) -> None:
        write_durably(self._folder / name, json.dumps(content, indent=2).encode())


_ASKED = "asked.jsonl"
_FIGURES = ("sampling_rate", "noise_multiplier", "clip_norm", "epsilon", "delta")


def _whole_lines(path: Path) -> list[str]:
    """The lines that were written to their end; before any other, nothing was sent."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    return [line.rstrip("\n") for line in lines if line.endswith("\n")]


def _device() -> str:
    """What the coordinator's machine computes on; in a simulation the sites' as well."""
    if torch.cuda.is_available():
        return str(torch.cuda.get_device_name())
    return f"CPU, {os.cpu_count()} cores"


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
