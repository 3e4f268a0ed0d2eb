"""The coordinator's process and two nodes, each a process of its own, over TLS, from enrolment on.

The sites' randomness is seeded (field_site.py); all else is what is shipped.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from client import credentials
from client.folder import NodeFolder, cohort_digest
from client.intake.builder import CohortBuilder, ImageRecord
from client.ledger import Signed as SignedAtNode
from common.clock import Clock
from common.cohort import CohortMeta
from common.spec import RunSpec, parse_run_text
from server.authority import Authority, Lifetimes, NewFederation, Signed
from server.launch import launch
from server.link import Exchange
from server.runs import OPEN, CoordinatorHome, Run, Standing

SITE_PROGRAM = Path(__file__).with_name("field_site.py")
ROOT = Path(__file__).parents[2]
PASSPHRASE = "five words that were drawn by lot"  # noqa: S105 - of this test
SIGNED = Signed("Ada", "a test")
PATIENCE = 240.0
FEDERATION = """
[federation]
quorum = 2
deadline_seconds = 200.0
"""

NODE = """\
site = "SITE"
declared_size = 40
cohort = "COHORT"
approval = "automatic"
[budget]
epsilon = 500.0
delta = 1e-4
[limits]
operators = "any"
models = "any"
greatest_open_runs = 50
greatest_new_runs_a_day = 100
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


def unused_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


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
    running: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    logs: list[Path] = field(default_factory=list)

    def _start(self, arguments: list[str], name: str) -> subprocess.Popen[bytes]:
        log = self.home.path.parent / f"{name}.{len(self.logs)}.log"
        self.logs.append(log)
        with log.open("wb") as output:
            process = subprocess.Popen(
                arguments, env=ENVIRONMENT, stdout=output, stderr=subprocess.STDOUT
            )
        self.running[name] = process
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

    @property
    def service(self) -> subprocess.Popen[bytes]:
        return self.running["coordinator"]

    def command(self, *arguments: str) -> str:
        told = [*command(*arguments), "--home", str(self.home.path)]
        done = subprocess.run(
            told,
            env=ENVIRONMENT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=PATIENCE,
            check=arguments[0] != "doctor",
        )
        return done.stdout.decode()

    def kill(self, name: str) -> None:
        self.running[name].kill()
        self.running[name].wait()

    @property
    def missing(self) -> dict[str, str]:
        return Exchange(self.home.database).left()

    def say_on(self, name: str) -> None:
        """Let a site that was held say what it has to."""
        (self.sites[name] / "hold").write_text("none")

    def conductor(self, run: Run) -> int:
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            with suppress(OSError):
                said = path.read_bytes().split(b"\0")
                if b"server.conductor" in said and run.name.encode() in said:
                    return int(path.parent.name)
        raise LookupError(run.name)

    @contextmanager
    def in_round(self, number: int, waits: str, **changes: str) -> Iterator[Run]:
        """A run at the moment when the site `waits` has its task of a round, and says nothing."""
        before = self.heard(waits).count("train.step")
        hold = self.sites[waits] / "hold"
        hold.write_text(str(number))
        run = self.launch(**changes)
        asked = before + number
        wait_until(lambda: self.heard(waits).count("train.step") >= asked, f"round {number}")
        try:
            yield run
        finally:
            hold.unlink()

    def site(self, name: str) -> subprocess.Popen[bytes]:
        return self._start([sys.executable, str(SITE_PROGRAM), str(self.sites[name])], name)

    def launch(self, **changes: Any) -> Run:
        text = self.run_text
        for old, new in changes.items():
            text = text.replace(f"{old} = ", f"{old} = {new} # ")
        path = self.home.path.parent / "run.toml"
        path.write_text(text)
        return launch(self.home, path)

    def ends(self, run: Run, standing: Standing) -> None:
        wait_until(lambda: run.state.standing not in OPEN, "the run's end")
        assert run.state.standing is standing, (run.state, *self.told(run))

    def told(self, run: Run) -> list[str]:
        paths = [*self.logs, run.path / "conductor.log"]
        return [path.read_text()[-3000:] for path in paths if path.exists()]

    def log_of(self, name: str) -> str:
        return "".join(log.read_text() for log in self.logs if log.name.startswith(f"{name}."))

    def charges(self, name: str, run: Run) -> int:
        """How many rounds of a run the site's ledger has booked as trained."""
        ledger = NodeFolder.open(self.sites[name]).ledger()
        try:
            return len(ledger.book.attempts_of(run.spec.digest))
        finally:
            ledger.disconnect()

    def heard(self, name: str) -> list[str]:
        path = self.sites[name] / "heard"
        return path.read_text().split("\n")[:-1] if path.exists() else []

    def rows(self, run: Run) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (run.path / "metrics.jsonl").open()]

    def close(self) -> None:
        for process in self.running.values():
            process.terminate()
        for process in self.running.values():
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def enrol(authority: Authority, home: Path, site: str) -> None:
    """By a key of its own, which is new where there was one."""
    afresh = (home / "identity").exists()
    ask = credentials.request_afresh if afresh else credentials.request
    bundle = authority.enrol(ask(home, site), 100, 30, SIGNED)
    path = home / "bundle.json"
    path.write_bytes(bundle.content)
    credentials.offered(home, path, Clock().date()).accept()


def make_cohort(path: Path, spec: RunSpec, patients: int) -> Path:
    rng, shape = np.random.default_rng(patients), spec.input.shape
    with CohortBuilder(path, shape) as builder:
        for row in range(patients):
            image = rng.integers(0, 65536, shape, dtype=np.uint16)
            record = ImageRecord(f"p{row:05d}", "st", "se", str(row), row % 2, 20, 20)
            builder.add(record, image)
        unit = spec.privacy.unit
        builder.finish(CohortMeta.of(spec, unit=unit, source="test", created="2026-01-01"))
    return path


def make_site(path: Path, site: str, cohort: Path, spec: RunSpec) -> None:
    path.mkdir(mode=0o700)
    text = NODE.replace("SITE", site).replace("COHORT", str(cohort))
    digest = spec.input.preprocessing_digest
    (path / "node.toml").write_text(text.replace("PREPROCESSING", digest))
    ledger = NodeFolder.open(path).create(by="Ada")
    ledger.admit(cohort_digest(cohort), SignedAtNode("Ada", "looked at"))
    ledger.disconnect()


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory, spec_text: str) -> Iterator[Federation]:
    """One for all tests; each leaves the service and both sites running."""
    folder = tmp_path_factory.mktemp("federation")
    text = spec_text + FEDERATION
    spec = parse_run_text(text, source="run.toml").spec
    new = NewFederation("chest", ["localhost"], unused_port(), Lifetimes())
    authority = Authority.create(folder / "home", new, PASSPHRASE, SIGNED, Clock())
    home = CoordinatorHome(folder / "home")
    make_cohort(home.evaluation, spec, 40)
    sites = {}
    for number, name in enumerate(("north", "south")):
        cohort = make_cohort(folder / f"cohort-{name}", spec, 20 + number)
        sites[name] = folder / name
        make_site(sites[name], name, cohort, spec)
        enrol(authority, sites[name], name)
    made = Federation(home, authority, text, sites)
    made.serve()
    for name in sites:
        made.site(name)
    yield made
    made.close()


@pytest.fixture(scope="module")
def undisturbed(federation: Federation) -> Run:
    """A run that nothing happened to; launched and watched as an operator does it."""
    path = federation.home.path.parent / "run.toml"
    path.write_text(federation.run_text)
    said = federation.command("launch", str(path))
    *_, run = federation.home.all_runs()
    assert run.state.standing is Standing.FINISHED, (said, *federation.told(run))
    assert all(f"round    {number}" in said for number in (1, 2, 3))
    assert (run.path / "report.html").as_uri() in said
    return run


def weights(run: Run) -> dict[str, bytes]:
    found = load_file(run.path / "model.safetensors")
    return {name: array.tobytes() for name, array in found.items()}


def test_a_run_from_enrolment_to_its_report(federation: Federation, undisturbed: Run):
    rows = federation.rows(undisturbed)
    assert [row["round"] for row in rows] == [1, 2, 3]
    assert all(site["status"] == "ok" for row in rows for site in row["sites"].values())
    assert {name for row in rows for name in row["sites"]} == {"north", "south"}
    assert (undisturbed.path / "report.html").stat().st_size > 1000
    for name in federation.sites:
        heard = federation.heard(name)
        assert heard == ["query.invite", *["train.step"] * 3, "query.close"]
        assert federation.charges(name, undisturbed) == 3
    assert undisturbed.name in (listed := federation.command("runs"))
    assert "3 of 3" in listed
    status = federation.command("status")
    assert "The service runs." in status
    assert status.count("connected") == 2
    assert "!!" not in federation.command("doctor").replace("!!  disk", "")


@pytest.mark.slow
def test_a_coordinator_that_is_killed_in_mid_round_goes_on_with_the_same_model(
    federation: Federation, undisturbed: Run
):
    before = len(federation.heard("north"))
    with federation.in_round(2, "south") as run:
        federation.service.send_signal(signal.SIGKILL)
        federation.service.wait()
        assert run.finished_rounds == 1
    federation.serve()
    federation.ends(run, Standing.FINISHED)

    assert [row["round"] for row in federation.rows(run)] == [1, 2, 3]
    assert weights(run) == weights(undisturbed)
    heard = federation.heard("north")[before:]
    assert heard.count("train.step") == 4  # round 2 was asked twice, and trained once
    assert federation.charges("north", run) == 3
    assert run.state.deaths == 0


@pytest.mark.slow
def test_a_conductor_that_is_killed_is_started_again(federation: Federation, undisturbed: Run):
    with federation.in_round(2, "south") as run:
        submission = run.state.submission
        os.kill(federation.conductor(run), signal.SIGKILL)
        wait_until(lambda: run.state.deaths == 1, "its death to be seen")
    federation.ends(run, Standing.FINISHED)
    assert run.state.submission != submission
    assert weights(run) == weights(undisturbed)
    assert federation.charges("south", run) == 3


@pytest.mark.slow
def test_a_run_that_a_person_ends_is_over_at_the_sites(federation: Federation):
    before = {name: federation.heard(name).count("query.close") for name in federation.sites}
    with federation.in_round(2, "south") as run:
        federation.command("stop", run.name)
        time.sleep(1.0)
    federation.ends(run, Standing.STOPPED)
    assert [row["round"] for row in federation.rows(run)] == [1]
    assert (run.path / "report.html").exists()
    for name, closings in before.items():
        assert federation.heard(name).count("query.close") == closings + 1
    with pytest.raises(subprocess.CalledProcessError) as error:
        federation.command("resume", run.name)
    assert "is stopped; launch a new one" in str(error.value.stdout)


@pytest.mark.slow
def test_a_site_that_is_killed_in_mid_round_is_asked_again(
    federation: Federation, undisturbed: Run
):
    with federation.in_round(2, "south") as run:
        federation.kill("south")
    federation.site("south")
    federation.ends(run, Standing.FINISHED)
    assert [row["sites"]["south"]["status"] for row in federation.rows(run)] == ["ok"] * 3
    assert weights(run) == weights(undisturbed)


@pytest.mark.slow
def test_a_run_without_its_quorum_says_so_and_is_resumed(federation: Federation):
    federation.kill("south")
    wait_until(lambda: "south" in federation.missing, "south to be missed")
    run = federation.launch(deadline_seconds="8.0")
    federation.ends(run, Standing.FAILED)
    assert "1 connected at the deadline of the invitation, the quorum is 2" in run.state.reason
    assert "south: not connected since 2" in run.state.reason
    federation.site("south")
    wait_until(lambda: not federation.missing, "south")
    said = federation.command("resume", run.name)
    assert run.state.standing is Standing.FINISHED, said


@pytest.mark.slow
def test_a_site_that_comes_late_is_missed_by_name_and_joins(federation: Federation):
    federation.kill("south")
    wait_until(lambda: "south" in federation.missing, "south to be missed")
    with federation.in_round(2, "north", quorum="1") as run:
        federation.site("south")
        wait_until(lambda: not federation.missing, "south")
    federation.ends(run, Standing.FINISHED)
    assert [sorted(row["sites"]) for row in federation.rows(run)] == [
        ["north"],
        ["north"],
        ["north", "south"],
    ]
    with federation.in_round(1, "north", quorum="1", deadline_seconds="80.0") as run:
        federation.kill("south")
        wait_until(lambda: "south" in federation.missing, "south to be missed")
    federation.ends(run, Standing.FINISHED)
    site = federation.rows(run)[-1]["sites"]["south"]
    assert site["status"] == "late"
    assert site["reason"].startswith("not connected since 2")
    federation.site("south")
    wait_until(lambda: not federation.missing, "south")


@pytest.mark.slow
def test_a_site_that_is_revoked_in_mid_run_is_out_at_once_and_in_the_record(
    federation: Federation,
):
    with federation.in_round(2, "south", quorum="1", deadline_seconds="600.0") as run:
        wait_until(lambda: federation.heard("north")[-2:] == ["train.step"] * 2, "north")
        federation.authority.revoke("south", SIGNED)
        federation.ends(run, Standing.FINISHED)  # nobody waits for its deadline
    rows = federation.rows(run)
    assert rows[0]["sites"]["south"]["status"] == "ok"
    assert rows[1]["sites"]["south"]["status"] == "failed"
    assert rows[1]["sites"]["south"]["reason"].startswith("revoked at 2")
    assert rows[2]["sites"]["north"]["status"] == "ok"
    wait_until(lambda: "401" in federation.log_of("south"), "its refusal")
    privacy = json.loads((run.path / "privacy.json").read_text())
    assert privacy["sites"]["south"]["rounds"] == 2  # it had its task of the second

    federation.kill("south")
    enrol(federation.authority, federation.sites["south"], "south")
    federation.site("south")
    federation.ends(federation.launch(), Standing.FINISHED)


@contextmanager
def full_disk(process: int) -> Iterator[None]:
    """No file of a process grows beyond what the smallest of ours has already."""
    before = resource.prlimit(process, resource.RLIMIT_FSIZE, (64, resource.RLIM_INFINITY))
    yield
    with suppress(ProcessLookupError):
        resource.prlimit(process, resource.RLIMIT_FSIZE, before)


@pytest.mark.slow
def test_a_conductor_whose_disk_is_full_goes_on_when_it_is_not(
    federation: Federation, undisturbed: Run
):
    with federation.in_round(2, "south") as run, full_disk(federation.conductor(run)):
        federation.say_on("south")
        wait_until(lambda: run.state.deaths == 1, "its death to be seen")
    federation.ends(run, Standing.FINISHED)
    assert [row["round"] for row in federation.rows(run)] == [1, 2, 3]
    assert weights(run) == weights(undisturbed)
    assert federation.charges("south", run) == 3


@pytest.mark.slow
def test_a_service_whose_disk_is_full_stays_and_goes_on_when_it_is_not(
    federation: Federation, undisturbed: Run
):
    with federation.in_round(2, "south") as run:
        with full_disk(federation.service.pid):
            federation.say_on("south")
            time.sleep(5.0)
            assert federation.service.poll() is None
        assert federation.service.poll() is None
    federation.ends(run, Standing.FINISHED)
    assert weights(run) == weights(undisturbed)
