"""A site under observation: its trainer, each step as the optimiser sees it, and its ledger."""

from __future__ import annotations

import shutil
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from opacus.grad_sample import GradSampleModule
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.optim import optimizer as torch_optimizer

from client.book import Limit
from client.folder import NodeFolder, cohort_digest
from client.keyfile import NodeKey
from client.ledger import Ledger, Place, Signed, TaskKey
from client.training import Compute, LocalTrainer
from client.witness import Witness, Witnesses
from common.accounting import Share, SubsampledGaussian, planned
from common.cohort import Cohort
from common.errors import LedgerError
from common.spec import RunSpec


@dataclass(frozen=True)
class Step:
    """One local step, as torch's own optimiser meets it.

    Attributes:
        rate: the learning rate.
        gradient: (D,) what is applied, over all parameters.
        summed: (D,) the sum of the clipped gradients before noise; None without privacy.
    """

    rate: float
    gradient: NDArray[np.float32]
    summed: NDArray[np.float32] | None


def _flat(tensors: list[Tensor]) -> NDArray[np.float32]:
    return torch.cat([tensor.detach().flatten() for tensor in tensors]).cpu().numpy().copy()


@pytest.fixture
def watch_steps() -> Callable[[], AbstractContextManager[list[Step]]]:
    """`with watch_steps() as steps:` lists every step of every trainer meanwhile."""

    @contextmanager
    def watch() -> Iterator[list[Step]]:
        steps: list[Step] = []

        def see(optimizer: Any, args: Any, kwargs: Any) -> None:
            group = optimizer.param_groups[0]
            private = hasattr(group["params"][0], "summed_grad")
            summed = _flat([p.summed_grad for p in group["params"]]) if private else None
            gradient = _flat([parameter.grad for parameter in group["params"]])
            steps.append(Step(group["lr"], gradient, summed))

        handle = torch_optimizer.register_optimizer_step_pre_hook(see)
        try:
            yield steps
        finally:
            handle.remove()

    return watch


@contextmanager
def _seen_by_the_network() -> Iterator[list[Tensor]]:
    inputs: list[Tensor] = []

    def see(module: nn.Module, arguments: Any) -> None:
        if isinstance(module, GradSampleModule):
            inputs.append(arguments[0].detach().clone())

    handle = register_module_forward_pre_hook(see)
    try:
        yield inputs
    finally:
        handle.remove()


@pytest.fixture(scope="session")
def seen_by_the_network() -> Callable[[], AbstractContextManager[list[Tensor]]]:
    """`with seen_by_the_network() as inputs:` lists those of every pass under DP-SGD meanwhile."""
    return _seen_by_the_network


@pytest.fixture
def make_trainer() -> Callable[..., LocalTrainer]:
    """`make_trainer(spec, cohort, declared_size)`: on the CPU, with the planned mechanism."""

    def make(
        spec: RunSpec,
        cohort: Cohort,
        declared_size: int,
        *,
        physical_images: int | None = None,
        device: str = "cpu",
    ) -> LocalTrainer:
        return LocalTrainer(
            spec,
            cohort,
            declared_size=declared_size,
            mechanism=planned(spec, declared_size),
            compute=Compute(torch.device(device), physical_images),
        )

    return make


# --- A ledger that has seen everything ----------------------------------------------------------

LIVED_KEY = NodeKey(bytes(range(32)))
LIVED_RUNS = tuple(letter * 64 for letter in "abcd")
LIVED_MECHANISM = SubsampledGaussian(0.1, 1.5, 4, "patient")


@pytest.fixture(scope="session")
def _lived(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Made once: every ledger has to be written to disk, entry by entry."""
    home = tmp_path_factory.mktemp("lived")
    place = Place(home / "ledger", LIVED_KEY, home / "ledger.witness")
    ledger, signed = Ledger.create(place, site="north", by="x"), Signed("a person", "a reason")
    ledger.set_budget(Limit(3.0, 1e-5, 8.0), signed)
    ledger.admit("c" * 64, signed)
    first, second, third, fourth = LIVED_RUNS
    ledger.decide(first, approved=True, approval="d" * 64, signed=signed, name="first")
    ledger.decide(second, approved=False, approval="d" * 64, signed=signed, name="second")
    for run in (first, third, fourth):
        ledger.earmark(run, [Share("training", LIVED_MECHANISM, 5)], name="run", run_id=run[:8])
    for number in (1, 2):
        task = TaskKey(first, "training", number, str(number) * 64)
        attempt = ledger.reserve(task, LIVED_MECHANISM, cohort="c" * 64)
        ledger.commit(attempt, f"release {number}".encode() * 20)
    ledger.reserve(TaskKey(first, "training", 3, "3" * 64), LIVED_MECHANISM, cohort="c" * 64)
    ledger.lapse(third)
    ledger.close(fourth, signed)
    witness = Witnesses(LIVED_KEY).token(Witness(99, "f" * 64))
    with pytest.raises(LedgerError):
        ledger.check_witness(witness)
    ledger.carry(0.25, signed)
    ledger.admit("e" * 64, signed)
    ledger.disconnect()
    return home


@pytest.fixture
def lived(_lived: Path, tmp_path: Path) -> Place:
    """Where a ledger lies that holds an entry of every kind, in a folder of its own.

    Its first run has rounds 1 and 2 released and round 3 reserved; its third lapsed, its fourth is
    closed; it was halted by a witness of entry 99, and carried on at 100.
    """
    home = tmp_path / "lived"
    shutil.copytree(_lived, home)
    return Place(home / "ledger", LIVED_KEY, home / "ledger.witness")


@contextmanager
def _hand(place: Place) -> Iterator[sqlite3.Connection]:
    with closing(sqlite3.connect(place.database)) as database:
        database.execute("PRAGMA synchronous=OFF")  # it is in a hurry
        found = "SELECT name, sql FROM sqlite_schema WHERE type = 'trigger'"
        triggers = database.execute(found).fetchall()
        for name, _ in triggers:
            database.execute(f"DROP TRIGGER {name}")
        yield database
        for _, sql in triggers:
            database.execute(sql)
        database.commit()
        database.execute("PRAGMA wal_checkpoint(TRUNCATE)")


@pytest.fixture
def hand() -> Callable[[Place], AbstractContextManager[sqlite3.Connection]]:
    """`with hand(place) as database:` writes where only a node may, and covers its tracks.

    It takes the triggers away and puts them back; it has everything but the key.
    """
    return _hand


@pytest.fixture(scope="session")
def moves() -> Callable[[int, Callable[[list[int]], NDArray[np.float64]], float], Any]:
    """`moves(patients, sum_of, clip_norm)`: by how many clip norms each one's leaving moves it.

    `sum_of` gives the sum before noise of the patients that it is told. Not finite is infinite.
    """

    def of(
        patients: int, sum_of: Callable[[list[int]], NDArray[np.float64]], clip_norm: float
    ) -> NDArray[np.float64]:
        moved = []
        for patient in range(patients):
            others = [other for other in range(patients) if other != patient]
            difference = sum_of([*others, patient]) - sum_of(others)
            moved.append(float(np.linalg.norm(difference)) / clip_norm)
        return np.asarray(np.nan_to_num(np.array(moved), nan=np.inf), dtype=np.float64)

    return of


# --- A whole node -------------------------------------------------------------------------------

NODE = """\
site = "north"
declared_size = 40
cohort = "../cohort"
approval = "automatic"

[budget]
epsilon = 1000.0
delta = 1e-4

[limits]
operators = "any"
models = "any"
LIMITS

[data]
unit = "patient"
kind = "binary"
classes = ["normal", "finding"]
shape = [1, 16, 16]
preprocessing = "PREPROCESSING"

[release]
pace = 0.0

[machine]
device = "cpu"
"""


@pytest.fixture
def whole_node(
    tmp_path: Path, make_spec: Callable[..., RunSpec], write_cohort: Any
) -> Callable[..., Path]:
    """`whole_node(limits)`: the folder of one whose cohort a person admitted."""

    def make(limits: str = "") -> Path:
        write_cohort(make_spec(), range(23))
        path = tmp_path / "north"
        path.mkdir(mode=0o700)
        digest = make_spec().input.preprocessing_digest
        policy = NODE.replace("PREPROCESSING", digest).replace("LIMITS", limits)
        (path / "node.toml").write_text(policy)
        ledger = NodeFolder.open(path).create(by="Ada")
        ledger.admit(cohort_digest(tmp_path / "cohort"), Signed("Ada", "looked at"))
        ledger.disconnect()
        return path

    return make
