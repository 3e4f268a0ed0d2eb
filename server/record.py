"""What a finished run left in its directory, read and checked: the source of report and card.

Nothing in it is trusted to be what it should be: a file may have been edited, and the names of
sites are what others typed. Values are checked here; text is escaped where it is printed.
"""

from __future__ import annotations

import hashlib
import zipfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from common.errors import RunError, SpecError
from common.spec import Behind, RunSpec
from common.tasks import task_for
from common.tasks.estimates import Estimate
from common.tasks.exhibits import Exhibit, Gallery
from server.evaluation import PARTS, PATIENTS, PREFIXES, UNIT, PartName, PartResult, score_part
from server.federated import FEDERATED_FILE

SPEC_FILE = "spec.json"
ENVIRONMENT_FILE = "environment.json"
METRICS_FILE = "metrics.jsonl"
PRIVACY_FILE = "privacy.json"
EVALUATION_FILE = "evaluation.npz"
MODEL_FILE = "model.safetensors"

Status = Literal["ok", "late", "failed", "rejected", "refused"]
STATUSES: tuple[Status, ...] = ("ok", "late", "failed", "rejected", "refused")

_DAMAGE = (
    OSError,
    EOFError,
    MemoryError,
    ArithmeticError,
    LookupError,
    TypeError,
    ValueError,
    RuntimeError,
    zipfile.BadZipFile,
)
_WAY_OUT = "expected what the run wrote; restore the file, or resume the run to write it again"


class _Read(BaseModel):
    """A JSON object of the run directory; keys of later versions are let be."""

    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False)


class Environment(_Read):
    """``environment.json``: what ran, where, and from which randomness."""

    versions: dict[str, str]
    engine: str
    device: str
    seeded: bool
    started: str
    finished: str
    wall_seconds: float
    training_seconds: float
    model_round: int | None = None


class SiteRound(_Read):
    """What became of one site in one round."""

    status: Status
    reason: str = ""


class Part(_Read):
    """A part of the central cohort after one round."""

    images: int
    patients: int
    metrics: dict[str, Estimate]


class Evaluated(_Read):
    """Both parts after one round."""

    validation: Part | None
    test: Part | None


class Round(_Read):
    """One line of ``metrics.jsonl``."""

    number: Annotated[int, Field(alias="round", ge=1)]
    seconds: float
    sites: dict[str, SiteRound]
    evaluation: Evaluated | None = None

    def part(self, name: PartName) -> Part | None:
        """A part's result, if this round was evaluated on it."""
        return None if self.evaluation is None else getattr(self.evaluation, name)


class Spend(_Read):
    """What a site spent in this run; None in every figure where there is no privacy.

    ``paced``: whether its replies were held to a slot; a record that does not say so had none.
    ``synthetic``: of a run that mixed in synthetic images, whether those behind the site's own are
    known to be protected.
    """

    declared_size: int
    paced: bool = False
    synthetic: Behind | None = None
    unit: Literal["patient", "image"]
    mechanism: str
    sampling_rate: float | None = None
    noise_multiplier: float | None = None
    clip_norm: float | None = None
    steps: int
    rounds: int
    epsilon: float | None = None
    delta: float | None = None


class Privacy(_Read):
    """``privacy.json``: each site's own spending, and the composition over all of them."""

    protected: bool
    sites: dict[str, Spend]
    all_sites_epsilon: float | None = None
    all_sites_delta: float | None = None


class Federated(_Read):
    """``federated.json``: see `server.federated.FederatedResult`."""

    sites: dict[str, str]
    patients: float
    deviation: float
    metrics: dict[str, Estimate]

    @property
    def answered(self) -> tuple[str, ...]:
        """The sites whose counts are in it."""
        return tuple(sorted(name for name, status in self.sites.items() if status == "ok"))


@dataclass(frozen=True)
class RunRecord:
    """A run directory, read and checked.

    Attributes:
        directory: where it lies.
        spec: the run's description.
        environment: what ran and where.
        rounds: in their order, at least one.
        privacy: what was spent.
        final: the published model's result on each part of the central cohort that there is.
        federated: what the sites' own held-out patients say; None if nobody was asked.
        model_digest: SHA-256 of ``model.safetensors`` in hex; None if there is no such file.
    """

    directory: Path
    spec: RunSpec
    environment: Environment
    rounds: tuple[Round, ...]
    privacy: Privacy
    final: Mapping[PartName, PartResult]
    federated: Federated | None
    model_digest: str | None

    @classmethod
    def read(cls, directory: Path) -> Self:
        """Read a run directory.

        Raises:
            RunError: naming the file that is missing or wrong, and the way out.
        """
        spec = _read_spec(directory / SPEC_FILE)
        record = cls(
            directory=directory,
            spec=spec,
            environment=_parse(directory / ENVIRONMENT_FILE, Environment),
            rounds=_read_rounds(directory / METRICS_FILE),
            privacy=_parse(directory / PRIVACY_FILE, Privacy),
            final=_read_final(directory / EVALUATION_FILE, spec),
            federated=_read_federated(directory / FEDERATED_FILE, spec),
            model_digest=_digest(directory / MODEL_FILE),
        )
        if not record.sites:
            raise RunError(f"{directory / PRIVACY_FILE}: names no site; {_WAY_OUT}")
        return record

    def exhibits(self) -> Sequence[Exhibit]:
        """What the task shows of the test part; no picture but where the run's file asks for it.

        Raises:
            RunError: if the evidence is not what the task wrote.
        """
        part = self.final.get("test")
        if part is None:
            return ()
        with self.evidence():
            shown = task_for(self.spec).shown(part.evidence, part.patient_index)
        pictures = self.spec.evaluation.gallery > 0
        return [one for one in shown if pictures or not isinstance(one, Gallery)]

    def evidence(self) -> AbstractContextManager[None]:
        """A context in which errors of reading the evidence become a `RunError` of its file."""
        return _evidence_of(self.directory / EVALUATION_FILE)

    @property
    def headline(self) -> str:
        """The name of the metric on top."""
        return self.spec.task.HEADLINE or self.spec.evaluation.metric

    def why_no_headline(self) -> str:
        """Why the headline has no value, in a sentence; empty where it has one."""
        part = self.final.get("test")
        if part is None:
            return "The evaluation cohort has no test part."
        if part.metrics[self.headline].value is not None:
            return ""
        return task_for(self.spec).without_value(part.evidence)

    @cached_property
    def sites(self) -> tuple[str, ...]:
        """Every site that was asked or declared, sorted."""
        asked = {name for entry in self.rounds for name in entry.sites}
        return tuple(sorted(asked | set(self.privacy.sites)))

    def outcomes(self, site: str) -> Counter[Status]:
        """How often a site ended in each status."""
        return Counter(entry.sites[site].status for entry in self.rounds if site in entry.sites)

    @property
    def seconds_of_a_round(self) -> float:
        """The median round."""
        return float(np.median([entry.seconds for entry in self.rounds]))


_Kind = TypeVar("_Kind", bound=_Read)


def _parse(path: Path, kind: type[_Kind]) -> _Kind:
    return _validate(_text(path), kind, str(path))


def _validate(text: str, kind: type[_Kind], source: str) -> _Kind:
    try:
        return kind.model_validate_json(text)
    except ValidationError as error:
        detail = error.errors()[0]
        key = ".".join(str(part) for part in detail["loc"]) or "content"
        raise RunError(
            f"{source}: {key} = {str(detail['input'])[:80]!r}: {detail['msg']}; {_WAY_OUT}"
        ) from None


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RunError(f"{path}: cannot be read ({error}); {_WAY_OUT}") from error


def _read_spec(path: Path) -> RunSpec:
    try:
        return RunSpec.from_json(_text(path), source=str(path))
    except SpecError as error:
        raise RunError(f"{error}; {_WAY_OUT}") from error


def _read_rounds(path: Path) -> tuple[Round, ...]:
    lines = enumerate(_text(path).splitlines(), start=1)
    rounds = tuple(_validate(line, Round, f"{path}:{n}") for n, line in lines if line.strip())
    if not rounds:
        raise RunError(f"{path}: no round is finished, so there is nothing to report")
    for before, after in pairwise(rounds):
        if after.number <= before.number:
            raise RunError(f"{path}: round {after.number} follows {before.number}; {_WAY_OUT}")
    return rounds


def _read_final(path: Path, spec: RunSpec) -> dict[PartName, PartResult]:
    with _evidence_of(path), np.load(path, allow_pickle=False) as stored:
        arrays: dict[str, NDArray[Any]] = dict(stored)
    other = tuple(prefix for prefix in PREFIXES.values() if prefix)
    found: dict[PartName, PartResult] = {}
    for name in PARTS:
        prefix = PREFIXES[name]
        part = {
            key.removeprefix(prefix): array
            for key, array in arrays.items()
            if (key.startswith(prefix) if prefix else not key.startswith(other))
        }
        if part:
            with _evidence_of(path):
                found[name] = _read_part(part, name, spec)
    return found


def _read_part(arrays: dict[str, NDArray[Any]], name: PartName, spec: RunSpec) -> PartResult:
    patients, unit = arrays.pop(PATIENTS), str(arrays.pop(UNIT, np.array("patient")))
    return score_part(spec, name, arrays, patients, "image" if unit == "image" else "patient")


@contextmanager
def _evidence_of(path: Path) -> Iterator[None]:
    """What is raised on evidence of another form, whatever the task: the file is not the run's."""
    try:
        yield
    except _DAMAGE as error:
        what = str(error) or type(error).__name__
        raise RunError(f"{path}: cannot be used ({what}); {_WAY_OUT}") from error


def _read_federated(path: Path, spec: RunSpec) -> Federated | None:
    if not path.exists():
        return None
    found, known = _parse(path, Federated), spec.metrics
    for name in sorted(found.metrics.keys() - known.keys()):
        raise RunError(f"{path}: metric {name!r}: expected one of {', '.join(known)}; {_WAY_OUT}")
    return found


def _digest(path: Path) -> str | None:
    if not path.is_file():
        return None
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
