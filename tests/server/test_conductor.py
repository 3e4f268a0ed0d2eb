"""The process that conducts a run, and the pipe by which the service speaks to it."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from common.clock import Clock
from common.package import Package
from common.spec import parse_run_text
from server import conductor as conducting
from server.authority import Authority, NewFederation, Signed
from server.roster import read_authority
from server.runs import CoordinatorHome, Run, Standing

ROOT = Path(__file__).parents[2]
PATIENCE = 300.0


@pytest.fixture
def run(tmp_path: Path, spec_text: str) -> Run:
    """A run that cannot begin: nobody has made the cohort on which it is evaluated."""
    spec = parse_run_text(spec_text, source="run.toml").spec.identified("a-run")
    home = CoordinatorHome(tmp_path)
    made = Run(home.runs / spec.run_id)
    made.path.mkdir(parents=True)
    (made.path / "spec.json").write_text(spec.canonical_json)
    made.write(Standing.RUNNING)
    return made


def conductor(run: Run) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-P", "-m", "server.conductor", str(run.path.parent.parent), run.name],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )


@pytest.mark.slow
def test_a_conductor_that_ends_while_the_service_listens_ends_in_order(run: Run):
    """At its end a thread still waits for the service's word; it must not hold the end up."""
    process = conductor(run)
    assert process.wait(PATIENCE) == 0
    assert process.stdout is not None
    said = process.stdout.read().decode()
    assert "Fatal Python error" not in said
    assert run.state.standing is Standing.FAILED
    assert "evaluation" in run.state.reason


@pytest.mark.slow
def test_a_conductor_whose_service_is_gone_ends_and_says_nothing_of_its_run(run: Run):
    process = conductor(run)
    assert process.stdin is not None
    process.stdin.close()
    assert process.wait(PATIENCE) == 1
    assert run.state.standing is Standing.RUNNING  # the next one goes on with it


# --- The model is handed out ----------------------------------------------------------------------


@pytest.fixture
def conducted(
    prepared_runs: Callable[..., Path], finish_run: Callable[..., Path], tmp_path: Path
) -> tuple[CoordinatorHome, Run]:
    """A coordinator's folder with a run that has left a model."""
    new = NewFederation("chest", ["coordinator.example.org"], 9092)
    home = CoordinatorHome(tmp_path / "home")
    Authority.create(home.path, new, "a passphrase of many words", Signed("ada"), Clock())
    made = Path(shutil.copytree(prepared_runs(), home.runs / "a-run"))
    return home, Run(finish_run(made))


@pytest.mark.parametrize("standing", Standing)
def test_the_model_of_a_run_that_is_over_is_signed_and_of_no_other(
    conducted: tuple[CoordinatorHome, Run], standing: Standing
):
    home, run = conducted
    run.write(standing)
    conducting.hand_out(home, run)
    there = (run.path / conducting.PACKAGE).exists()
    assert there is (standing in (Standing.FINISHED, Standing.STOPPED))
    if there:
        authority = read_authority(home.path)
        assert Package.open(run.path / conducting.PACKAGE, authority=authority).signer


@pytest.mark.parametrize("fault", [MemoryError(), ValueError("odd"), OSError(28, "full")])
def test_no_failure_of_the_hand_out_costs_a_run_its_end(
    conducted: tuple[CoordinatorHome, Run],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    fault: Exception,
):
    home, run = conducted
    run.write(Standing.FINISHED)

    def fail(*_: object, **__: object) -> None:
        raise fault

    monkeypatch.setattr(conducting, "export", fail)
    with caplog.at_level(logging.ERROR):
        conducting.hand_out(home, run)
    assert "cloister export --sign" in caplog.text
    assert run.state.standing is Standing.FINISHED
    assert not (run.path / conducting.PACKAGE).exists()
