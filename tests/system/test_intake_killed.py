"""`cloister intake run` as a hospital starts it: killed, its workers killed, interrupted."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from client.intake.keys import SiteKey
from common.cohort import Cohort
from deploy.hospitals import Hospital, make_hospitals

pytestmark = pytest.mark.slow


@pytest.fixture
def hospital(tmp_path: Path) -> Hospital:
    return make_hospitals(tmp_path / "hospitals", seed=1, size=0.25)[0]


@pytest.fixture
def command(tmp_path: Path, hospital: Hospital, spec_text: str) -> list[str]:
    run_file = tmp_path / "run.toml"
    run_file.write_text(spec_text.replace('"finding"', '"opacity"'))
    SiteKey.from_file(tmp_path / "site.key")
    program = "from deploy.cli import main; main()"
    options = ["--spec", run_file, "--labels", hospital.labels, "--workers", "2"]
    options += ["--site-key", tmp_path / "site.key"]
    words = ["intake", "run", hospital.folder, *options]
    return [sys.executable, "-c", program, *map(str, words)]


def workers(parent: int) -> list[int]:
    """All processes below `parent`, at any depth."""
    children = Path(f"/proc/{parent}/task/{parent}/children")
    try:
        found = [int(pid) for pid in children.read_text().split()]
    except FileNotFoundError:
        return []
    return [pid for child in found for pid in (child, *workers(child))]


def alive(pids: list[int]) -> Iterator[int]:
    for pid in pids:
        try:
            if "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[:1]:
                yield pid
        except (FileNotFoundError, ProcessLookupError):
            continue


def content(cohort: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(cohort.iterdir())}


def test_killed_and_started_again_it_makes_the_same_cohort(
    command: list[str], tmp_path: Path
) -> None:
    began = time.monotonic()
    subprocess.run([*command[:6], str(tmp_path / "reference"), *command[6:]], check=True)
    length = time.monotonic() - began
    again = [*command[:6], str(tmp_path / "cohort"), *command[6:]]
    draw, left, hits = random.Random(1), [], 0  # noqa: S311
    for _ in range(6):
        process = subprocess.Popen(again, stdout=subprocess.DEVNULL)
        time.sleep(draw.uniform(0.3, 0.9) * length)
        left += workers(process.pid)
        process.kill()
        hits += process.wait() == -signal.SIGKILL

    subprocess.run(again, check=True)

    assert hits >= 2
    assert content(tmp_path / "cohort") == content(tmp_path / "reference")
    until = time.monotonic() + 30
    while list(alive(left)) and time.monotonic() < until:
        time.sleep(0.1)
    assert list(alive(left)) == []


def readers(parent: int) -> list[int]:
    """The processes that read: children of the server that starts them."""
    return [pid for child in workers(parent) for pid in workers(child)]


def test_workers_that_somebody_kills_cost_nothing(
    command: list[str], tmp_path: Path, hospital: Hospital
) -> None:
    again = [*command[:6], str(tmp_path / "cohort"), *command[6:]]
    process = subprocess.Popen(again, stdout=subprocess.PIPE, text=True)
    images = tmp_path / "cohort.intake" / "work" / "images.u16"
    until = time.monotonic() + 60
    while time.monotonic() < until and not (images.exists() and images.stat().st_size):
        time.sleep(0.02)
    lost = set(readers(process.pid))
    for worker in lost:
        os.kill(worker, signal.SIGKILL)
    said, _ = process.communicate(timeout=120)

    assert lost
    assert process.returncode == 0
    assert "process that read it" not in said
    assert len(Cohort.open(tmp_path / "cohort")) == hospital.images


def test_interrupted_it_says_how_to_go_on_and_goes_on(
    command: list[str], tmp_path: Path, hospital: Hospital
) -> None:
    again = [*command[:6], str(tmp_path / "cohort"), *command[6:]]
    process = subprocess.Popen(again, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    images = tmp_path / "cohort.intake" / "work" / "images.u16"
    until = time.monotonic() + 60
    while time.monotonic() < until and not (images.exists() and images.stat().st_size):
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    out, error = process.communicate(timeout=60)

    assert process.returncode == 130, error
    assert "the same command goes on where it was" in out
    assert "Traceback" not in out + error
    subprocess.run(again, check=True, stdout=subprocess.DEVNULL)
    assert len(Cohort.open(tmp_path / "cohort")) == hospital.images
