"""What CI runs: both kinds of tests, and the fast ones once more by an interpreter without asserts.

`.ci/run` and the Makefile are run as they are, in a checkout whose whole suite is two tests.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SUITE = """\
import sys
from pathlib import Path
import pytest

def say(kind):
    with Path("said").open("a") as said:
        said.write(f"{kind}{' -O' * sys.flags.optimize}\\n")

def test_alone():
    say("fast")

@pytest.mark.slow
def test_whole_system():
    say("slow")
    if Path("broken").exists():
        raise ValueError
"""
TOOL = "#!/bin/sh\necho {name} >> said\n"
PYTHON = f'#!/bin/sh\nexec {sys.executable} "$@"\n'


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """With an environment in which ruff and mypy only say that they were called."""
    for name in ("Makefile", "pyproject.toml", "constraints.txt", ".ci/run"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_it.py").write_text(SUITE)
    tools = tmp_path / ".venv" / "bin"
    tools.mkdir(parents=True)
    texts = {"python": PYTHON} | {name: TOOL.format(name=name) for name in ("ruff", "mypy")}
    for name, text in texts.items():
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    (tools.parent / ".installed").touch()
    return tmp_path


@pytest.fixture
def ci(checkout: Path) -> Callable[[], tuple[int, list[str]]]:
    """Its exit code, and what it came to, in order."""

    def run() -> tuple[int, list[str]]:
        # One process of tests is enough, and what this one was told is not meant for it.
        own = {"PYTEST_XDIST_AUTO_NUM_WORKERS": "1"}
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST", "MAKE", "CI"))}
        kept.pop("PYTHONOPTIMIZE", None)
        done = subprocess.run(
            [checkout / ".ci" / "run"], env=kept | own, capture_output=True, check=False
        )
        said = checkout / "said"
        return done.returncode, said.read_text().splitlines() if said.exists() else []

    return run


def test_ci_runs_the_checks_the_fast_tests_the_slow_ones_and_the_fast_ones_without_asserts(ci):
    assert ci() == (0, ["ruff", "ruff", "mypy", "fast", "slow", "fast -O"])


def test_a_slow_test_that_fails_fails_ci(ci, checkout):
    (checkout / "broken").touch()
    code, said = ci()
    assert code != 0
    assert said[-1] == "slow"
