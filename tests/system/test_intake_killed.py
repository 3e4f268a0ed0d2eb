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


def test_a_worker_that_is_killed_costs_the_file_it_was_at(
    command: list[str], tmp_path: Path, hospital: Hospital
) -> None:
    again = [*command[:6], str(tmp_path / "cohort"), *command[6:]]
    process = subprocess.Popen(again, stdout=subprocess.PIPE, text=True)
    until = time.monotonic() + 60
    reading = tmp_path / "cohort.intake" / "work"
    while not reading.exists() and time.monotonic() < until:
        time.sleep(0.02)
    time.sleep(1.0)
    for pid in workers(process.pid):
        name = Path(f"/proc/{pid}/cmdline")
        if pid in workers(process.pid) and b"forkserver" in name.read_bytes():
            for worker in workers(pid):
                os.kill(worker, signal.SIGKILL)
    said, _ = process.communicate(timeout=120)

    assert process.returncode == 0
    assert f"{hospital.images} images" in said or "the process that read it ended" in said


def test_interrupted_it_says_how_to_go_on_and_goes_on(
    command: list[str], tmp_path: Path, hospital: Hospital
) -> None:
    again = [*command[:6], str(tmp_path / "cohort"), *command[6:]]
    process = subprocess.Popen(again, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    time.sleep(2.5)
    process.send_signal(signal.SIGINT)
    out, error = process.communicate(timeout=60)

    assert process.returncode in (0, 130), error
    assert "Traceback" not in out + error
    done = subprocess.run(again, check=True, stdout=subprocess.PIPE, text=True)
    assert f"{hospital.images}" in done.stdout
