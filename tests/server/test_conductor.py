"""The process that conducts a run, and the pipe by which the service speaks to it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from common.spec import parse_run_text
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


def test_a_conductor_that_ends_while_the_service_listens_ends_in_order(run: Run):
    """At its end a thread still waits for the service's word; it must not hold the end up."""
    process = conductor(run)
    assert process.wait(PATIENCE) == 0
    assert process.stdout is not None
    said = process.stdout.read().decode()
    assert "Fatal Python error" not in said
    assert run.state.standing is Standing.FAILED
    assert "evaluation" in run.state.reason


def test_a_conductor_whose_service_is_gone_ends_and_says_nothing_of_its_run(run: Run):
    process = conductor(run)
    assert process.stdin is not None
    process.stdin.close()
    assert process.wait(PATIENCE) == 1
    assert run.state.standing is Standing.RUNNING  # the next one goes on with it
