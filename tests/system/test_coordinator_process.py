"""The coordinator's process and two nodes, each a process of its own, over TLS, from enrolment on.

The sites' randomness is seeded (field_site.py); all else is what is shipped.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file

from client import credentials
from client.folder import NodeFolder, cohort_digest
from client.ledger import Signed as SignedAtNode
from common.clock import Clock
from common.spec import RunSpec, parse_run_text
from server.authority import Authority, Lifetimes, NewFederation, Signed
from server.runs import OPEN, CoordinatorHome, Run, Standing

SITE_PROGRAM = Path(__file__).with_name("field_site.py")
ROOT = Path(__file__).parents[2]
PASSPHRASE = "five words that were drawn by lot"  # noqa: S105 - of this test
SIGNED = Signed("Ada", "a test")
PATIENCE = 240.0

NODE = """\
site = "SITE"
declared_size = 40
cohort = "COHORT"
approval = "automatic"
[budget]
epsilon = 50.0
delta = 1e-4
[limits]
operators = "any"
models = "any"
greatest_parameters = 100000
least_patients = 1
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


def wait_until(true: Callable[[], Any], what: str, seconds: float = PATIENCE) -> None:
    last = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < last, f"waited in vain for {what}"
        time.sleep(0.05)


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-c", "from deploy.cli import main; main()", "coordinator", *arguments]


ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "COLUMNS": "200"}


@dataclass
class Federation:
    """A coordinator's home, its sites' homes, and every process that was started on them."""

    home: CoordinatorHome
    authority: Authority
    run_text: str
    sites: dict[str, Path]
    running: list[subprocess.Popen[bytes]] = field(default_factory=list)
    logs: list[Path] = field(default_factory=list)

    def _start(self, arguments: list[str], name: str) -> subprocess.Popen[bytes]:
        log = self.home.path.parent / f"{name}.{len(self.logs)}.log"
        self.logs.append(log)
        with log.open("wb") as output:
            process = subprocess.Popen(
                arguments, env=ENVIRONMENT, stdout=output, stderr=subprocess.STDOUT
            )
        self.running.append(process)
        return process

    def serve(self) -> subprocess.Popen[bytes]:
        arguments = command("start", str(self.home.path), "--listen", "127.0.0.1")
        process = self._start(arguments, "coordinator")
        log = self.logs[-1]
        wait_until(
            lambda: b"Nodes are heard" in log.read_bytes() or process.poll() is not None, "service"
        )
        assert process.poll() is None, log.read_text()
        return process

    def site(self, name: str) -> subprocess.Popen[bytes]:
        return self._start([sys.executable, str(SITE_PROGRAM), str(self.sites[name])], name)

    def launch(self, **changes: Any) -> Run:
        text = self.run_text
        for old, new in changes.items():
            text = text.replace(f"{old} = ", f"{old} = {new} # ")
        path = self.home.path.parent / "run.toml"
        path.write_text(text)
        return self.home.launch(path)

    def ends(self, run: Run, standing: Standing) -> None:
        wait_until(lambda: run.state.standing not in OPEN, "the run's end")
        told = [log.read_text() for log in [*self.logs, run.path / "conductor.log"]]
        assert run.state.standing is standing, (run.state, *told)

    def heard(self, name: str) -> list[str]:
        path = self.sites[name] / "heard"
        return path.read_text().split("\n")[:-1] if path.exists() else []

    def rows(self, run: Run) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (run.path / "metrics.jsonl").open()]

    def close(self) -> None:
        for process in self.running:
            process.terminate()
        for process in self.running:
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def enrol(authority: Authority, home: Path, site: str, most: int = 100) -> None:
    request = credentials.request(home, site)
    bundle = authority.enrol(request, most, 30, SIGNED)
    path = home / "bundle.json"
    path.write_bytes(bundle.content)
    credentials.offered(home, path, Clock().date()).accept()


def make_site(path: Path, site: str, cohort: Path, spec: RunSpec) -> None:
    path.mkdir(mode=0o700)
    text = NODE.replace("SITE", site).replace("COHORT", str(cohort))
    digest = spec.input.preprocessing_digest
    (path / "node.toml").write_text(text.replace("PREPROCESSING", digest))
    ledger = NodeFolder.open(path).create(by="Ada")
    ledger.admit(cohort_digest(cohort), SignedAtNode("Ada", "looked at"))
    ledger.disconnect()


@pytest.fixture
def federation(
    tmp_path: Path, spec_text: str, write_cohort: Any, free_port: Callable[[], int]
) -> Iterator[Federation]:
    text = spec_text + "\n[federation]\nquorum = 2\ndeadline_seconds = 120.0\n"
    spec = parse_run_text(text, source="run.toml").spec
    new = NewFederation("chest", ["localhost"], free_port(), Lifetimes())
    authority = Authority.create(tmp_path / "home", new, PASSPHRASE, SIGNED, Clock())
    home = CoordinatorHome(tmp_path / "home")
    shutil.move(write_cohort(spec, range(40)).path, home.evaluation)
    sites = {}
    for number, name in enumerate(("north", "south")):
        cohort = write_cohort(spec, range(20 + number), name=f"cohort-{name}").path
        sites[name] = tmp_path / name
        make_site(sites[name], name, cohort, spec)
        enrol(authority, sites[name], name)
    made = Federation(home, authority, text, sites)
    yield made
    made.close()


def test_a_run_from_enrolment_to_its_report(federation: Federation):
    federation.serve()
    for name in federation.sites:
        federation.site(name)
    run = federation.launch()
    federation.ends(run, Standing.FINISHED)

    rows = federation.rows(run)
    assert [row["round"] for row in rows] == [1, 2, 3]
    assert all(site["status"] == "ok" for row in rows for site in row["sites"].values())
    assert {name for row in rows for name in row["sites"]} == {"north", "south"}
    assert (run.path / "report.html").stat().st_size > 1000
    for name in federation.sites:
        heard = federation.heard(name)
        assert heard == ["query.invite", *["train.step"] * 3, "query.close"]


def test_a_coordinator_that_is_killed_in_mid_round_goes_on_with_the_same_model(
    federation: Federation,
):
    federation.serve()
    for name in federation.sites:
        federation.site(name)
    undisturbed = federation.launch()
    federation.ends(undisturbed, Standing.FINISHED)

    service = federation.running[0]
    run = federation.launch()
    wait_until(lambda: run.finished_rounds >= 1, "a round")
    (federation.sites["south"] / "hold").touch()
    before = len(federation.heard("south"))
    wait_until(lambda: len(federation.heard("south")) > before, "a task")
    service.send_signal(signal.SIGKILL)
    service.wait()
    done = run.finished_rounds
    (federation.sites["south"] / "hold").unlink()
    federation.serve()
    federation.ends(run, Standing.FINISHED)

    assert done < 3
    assert [row["round"] for row in federation.rows(run)] == [1, 2, 3]
    first, second = (load_file(each.path / "model.safetensors") for each in (undisturbed, run))
    assert {k: v.tobytes() for k, v in first.items()} == {k: v.tobytes() for k, v in second.items()}
