"""What an operator reads of a federation's runs and health."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from common.spec import RunSpec
from server.doctor import examined
from server.runs import Run, Standing, open_home

WHY = "2 of 3 sites at the deadline; mend it, and `cloister coordinator resume chest-1 --home f`"


@pytest.fixture
def home(tmp_path: Path) -> Path:
    (tmp_path / "ca.pem").touch()
    return tmp_path


def test_a_reason_is_below_the_table_with_its_command_whole(
    cloister: Any, make_spec: Callable[..., RunSpec], home: Path, monkeypatch: pytest.MonkeyPatch
):
    run = Run(home / "runs" / "chest-1")
    run.path.mkdir(parents=True)
    (run.path / "spec.json").write_text(make_spec().identified(run.name).canonical_json)
    run.write(Standing.FAILED, WHY)
    monkeypatch.setenv("COLUMNS", "80")
    lines = cloister("coordinator", "runs", "--home", home).out.splitlines()
    assert f"chest-1: {WHY}" in lines  # unbroken
    assert any("chest-1" in line and "failed" in line for line in lines)


def test_a_service_that_does_not_run_is_neither_in_order_nor_at_fault(cloister: Any, home: Path):
    said = cloister("coordinator", "doctor", "--home", home)
    assert "--  service: does not run; `cloister coordinator start` starts it" in said.out
    assert "!!  certificate" in said.out  # there is none
    assert said.code == 1
    found = {finding.what: finding.well for finding in examined(open_home(home))}
    assert (found["service"], found["certificate"]) == (None, False)
