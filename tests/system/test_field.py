"""A federation as two people bring it up and keep it, by the commands alone, from DICOM to report.

The operator's machine and three hospitals' machines are network namespaces of their own, joined
by a bridge, where this machine allows it; else one loopback address. Nothing is injected: what
runs is what is shipped, over TLS 1.3. The tests share one federation, and each launches a run of
its own; what one has ended is started again for the next.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from client.book import Book
from client.folder import NodeFolder
from client.health import last_report
from deploy.hospitals import make_hospitals
from server.runs import OPEN, Run, Standing, open_home

pytestmark = pytest.mark.slow

SITES = {"north": 30, "harbour": 30, "hill": 20}
PATIENCE = 600.0
PORT = 9092
FINGERPRINT = re.compile(r"(?:\d{5} ){7}\d{5}")
PROGRAM = [sys.executable, "-c", "from deploy.cli import main; main()"]
PASSPHRASE = "five words that were drawn by lot"  # noqa: S105 - of this test
RUN = """\
name = "field"
operator = "trial-office"
rounds = 3
[task]
kind = "binary"
classes = ["normal", "opacity"]
[model]
name = "small-cnn"
width = 4
[input]
height = 32
width = 32
[optimizer]
name = "sgd"
learning_rate = 0.1
[local]
steps = STEPS
batch_size = 4
[privacy]
mechanism = "dp-sgd"
noise_multiplier = 1.0
delta = 1e-4
[federation]
quorum = 2
deadline_seconds = 600.0
[evaluation]
bootstrap = 100
"""
OFFICER = {  # what an officer writes into node.toml
    "operators = []": 'operators = ["trial-office"]',
    "models = []": 'models = ["small-cnn"]',
    'approval = "ask"': 'approval = "automatic"',
    "least_patients = 50": "least_patients = 5",
    "pace = 0.5": "pace = 0.0",
    'device = "auto"': 'device = "cpu"',
}
QUICK, LONG = 4, 200


# --- Machines -----------------------------------------------------------------------------------


class Machines:
    """Where commands run: a network namespace a machine, or this machine for all of them."""

    def __init__(self, names: Sequence[str]) -> None:
        self._tag = f"cl{os.getpid() % 100000}"
        self._names = list(names)
        self._wires: dict[str, str] = {}
        self.apart = self._parted()
        self.host = "10.77.0.1" if self.apart else "127.0.0.2"

    @contextmanager
    def cut(self, name: str, process: subprocess.Popen[bytes]) -> Iterator[None]:
        """Nothing comes or goes at a machine; where it is none of its own, its process halts."""
        self._link(name, "down", lambda: process.send_signal(signal.SIGSTOP))
        try:
            yield
        finally:
            self._link(name, "up", lambda: process.send_signal(signal.SIGCONT))

    def _link(self, name: str, state: str, otherwise: Callable[[], None]) -> None:
        if self.apart:
            self._inside(name, "link", "set", self._wires[name], state)
        else:
            otherwise()

    def prefix(self, name: str) -> list[str]:
        return ["ip", "netns", "exec", self._space(name)] if self.apart else []

    def close(self) -> None:
        if self.apart:
            for name in self._names:
                self._ip("netns", "del", self._space(name))

    def _space(self, name: str) -> str:
        return f"{self._tag}-{name}"

    def _parted(self) -> bool:
        """Make them, the first with a bridge; False where that is not allowed."""
        if os.geteuid() != 0 or shutil.which("ip") is None:
            return False
        try:
            for name in self._names:
                self._ip("netns", "add", self._space(name))
                self._inside(name, "link", "set", "lo", "up")
            hub = self._names[0]
            self._inside(hub, "link", "add", "hub", "type", "bridge")
            self._inside(hub, "addr", "add", "10.77.0.1/24", "dev", "hub")
            self._inside(hub, "link", "set", "hub", "up")
            for number, name in enumerate(self._names[1:], start=10):
                self._wire(hub, name, number)
        except subprocess.CalledProcessError:
            for name in self._names:
                subprocess.run(
                    ["ip", "netns", "del", self._space(name)], capture_output=True, check=False
                )
            return False
        return True

    def _wire(self, hub: str, name: str, number: int) -> None:
        near, far = f"{self._tag}h{number}", f"{self._tag}n{number}"
        self._inside(hub, "link", "add", near, "type", "veth", "peer", "name", far)
        self._inside(hub, "link", "set", far, "netns", self._space(name))
        self._inside(hub, "link", "set", near, "master", "hub", "up")
        self._inside(name, "addr", "add", f"10.77.0.{number}/24", "dev", far)
        self._inside(name, "link", "set", far, "up")
        self._wires[name] = far

    def _inside(self, name: str, *words: str) -> None:
        self._ip("-n", self._space(name), *words)

    def _ip(self, *words: str) -> None:
        subprocess.run(["ip", *words], check=True, capture_output=True)


# --- The federation -----------------------------------------------------------------------------


@dataclass
class Federation:
    """What two people have on their disks, and the processes that they have started."""

    folder: Path
    machines: Machines
    port: int
    running: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    # --- Commands

    def cloister(self, machine: str, *words: object) -> str:
        """What a person types on a machine, and reads there."""
        done = subprocess.run(
            [*self.machines.prefix(machine), *PROGRAM, *map(str, words)],
            cwd=self.folder / machine,
            env=environment(),
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            check=False,
        )
        said = f"{done.stdout}{done.stderr}"
        assert done.returncode == 0, f"cloister {' '.join(map(str, words))}: {said}{self.tails()}"
        return said

    def operator(self, *words: object) -> str:
        return self.cloister("coordinator", "coordinator", *words)

    def begin(self) -> None:
        secret = self.folder / "coordinator" / "passphrase"
        secret.touch(mode=0o600)
        secret.write_text(PASSPHRASE)
        said = self.operator(
            *("init", "federation", "--name", "chest", "--host", self.machines.host),
            *("--port", self.port, "--passphrase-file", "passphrase"),
        )
        assert FINGERPRINT.search(said), said

    def take_in(self, machine: str, films: Path, labels: Path, cohort: str) -> None:
        self.cloister(
            *(machine, "intake", "run", films, cohort, "--spec", self.folder / "run.toml"),
            *("--labels", labels, "--workers", "1"),
        )

    def set_up(self, site: str) -> None:
        """The officer makes the node, and takes responsibility for its cohort."""
        self.cloister(
            *(site, "node", "init", "node", "--site", site, "--declared-size", SITES[site]),
            *("--epsilon", "1000", "--delta", "1e-4", "--cohort", "cohort"),
        )
        policy = self.folder / site / "node" / "node.toml"
        text = policy.read_text()
        for before, after in OFFICER.items():
            assert before in text, before
            text = text.replace(before, after)
        policy.write_text(text)
        self.cloister(site, "node", "admit", "node", "--reason", "checked")

    def enrol(self, site: str, *afresh: str) -> None:
        """Two files by mail, and a call in which each reads a fingerprint to the other."""
        here, there = self.folder / site, self.folder / "coordinator"
        asked = self.cloister(site, "node", "request", "node", *afresh)
        shutil.copy(here / f"{site}.request.pem", there)
        answered = self.operator(
            *("enrol", f"{site}.request.pem", "--site", site, "--declared-size-limit", 100),
            *("--fingerprint", spoken(asked), "--home", "federation"),
            *("--passphrase-file", "passphrase"),
        )
        shutil.copy(there / f"{site}.bundle.json", here)
        authority = spoken(answered)
        join = ("node", "join", f"{site}.bundle.json", "--home", "node")
        self.cloister(site, *join, "--fingerprint", authority)

    # --- Processes

    def start(self, machine: str) -> None:
        """Start what belongs on a machine, and wait until it is at work."""
        before = self.running.get(machine)
        if before is not None and before.poll() is None:
            return
        words = ["node", "start", "node", "--health", "none"]
        if machine == "coordinator":
            words = ["coordinator", "start", "federation", "--listen", self.machines.host]
        with self.log(machine).open("ab") as log:
            started = self.running[machine] = subprocess.Popen(
                [*self.machines.prefix(machine), *PROGRAM, *words],
                cwd=self.folder / machine,
                env=environment(),
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        if machine == "coordinator":
            said = self.folder / machine / "federation" / "service" / "service.json"
            ours = f'"process": {started.pid}'
            self.wait(lambda: said.exists() and ours in said.read_text(), "the coordinator")

    def ready(self, site: str) -> bool:
        found = last_report(self.folder / site / "node")
        return found is not None and found.ready and found.pid == self.running[site].pid

    def kill(self, machine: str) -> None:
        self.running[machine].kill()
        self.running[machine].wait()

    def log(self, machine: str) -> Path:
        return self.folder / machine / "log.txt"

    def close(self) -> None:
        for process in self.running.values():
            process.terminate()
        for process in self.running.values():
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    # --- What is there to see

    def launch(self, steps: int, **changes: object) -> Run:
        """The operator launches a run; it goes on by itself."""
        text = RUN.replace("STEPS", str(steps))
        for key, value in changes.items():
            text = text.replace(f"{key} = ", f"{key} = {value} # ")
        path = self.folder / "coordinator" / "run.toml"
        path.write_text(text)
        self.operator("launch", "run.toml", "--home", "federation", "--detach")
        return open_home(self.folder / "coordinator" / "federation").all_runs()[-1]

    def ends(self, run: Run) -> list[dict[str, Any]]:
        """Wait for a run's end; the rows of its record."""
        self.wait(lambda: run.state.standing not in OPEN, f"the end of {run.name}")
        assert run.state.standing is Standing.FINISHED, f"{run.state}{self.tails()}"
        return self.rows(run)

    def rows(self, run: Run) -> list[dict[str, Any]]:
        path = run.path / "metrics.jsonl"
        return [json.loads(line) for line in path.open()] if path.exists() else []

    def attempts(self, site: str) -> int:
        """How often a hospital has paid, in all runs."""
        return len(self._book(site).charges)

    def rounds(self, site: str, run: Run) -> list[int]:
        """The rounds of a run that a hospital has paid for, each as often as it has."""
        found = self._book(site).runs.get(run.spec.digest)
        return [] if found is None else [number for _, number in found.numbers.values()]

    def released(self, site: str, run: Run) -> list[int]:
        """The rounds of a run that a hospital has an answer to."""
        found = self._book(site).runs.get(run.spec.digest)
        return [] if found is None else sorted(number for _, number in found.released)

    @contextmanager
    def in_round_one(self) -> Iterator[Run]:
        """A new run in its first round, which does not close: north trains, and says nothing."""
        paid = self.attempts("north")
        run = self.launch(LONG)
        self.wait(lambda: self.attempts("north") > paid, "north to begin")
        process = self.running["north"]
        process.send_signal(signal.SIGSTOP)
        try:
            assert self.rows(run) == [], "north was too quick to be held"
            yield run
        finally:
            process.send_signal(signal.SIGCONT)

    def _book(self, site: str) -> Book:
        ledger = NodeFolder.open(self.folder / site / "node").ledger()
        try:
            return ledger.book
        finally:
            ledger.disconnect()

    def wait(self, true: Callable[[], Any], what: str) -> None:
        last = time.monotonic() + PATIENCE
        while not true():
            assert time.monotonic() < last, f"waited in vain for {what}{self.tails()}"
            time.sleep(0.05)

    def tails(self) -> str:
        """The ends of all logs, for who reads why a test failed."""
        home = self.folder / "coordinator" / "federation"
        conductors = sorted(home.glob("runs/*/conductor.log"))[-1:]
        logs = [*map(self.log, ("coordinator", *SITES)), *conductors]
        where = "namespaces" if self.machines.apart else "loopback"
        found = [f"\n--- {log}\n{log.read_text()[-3000:]}" for log in logs if log.exists()]
        return f"\n({where})" + "".join(found)


def spoken(said: str) -> str:
    """The fingerprint on a screen, as it is read out on the phone."""
    (found,) = set(FINGERPRINT.findall(said))
    return str(found)


def environment() -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if not k.lower().endswith("_proxy")}
    ours = {"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    return kept | ours | {"COLUMNS": "200", "NO_COLOR": "1"}


def unused_port(host: str) -> int:
    with socket.socket() as free:
        free.bind((host, 0))
        return int(free.getsockname()[1])


@pytest.fixture(scope="module")
def enrolled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    """The coordinator and three enrolled nodes, each with its cohort; nothing runs."""
    folder = tmp_path_factory.mktemp("field")
    machines = Machines(["coordinator", *SITES])
    port = PORT if machines.apart else unused_port(machines.host)
    made = Federation(folder, machines, port)
    for machine in ("coordinator", *SITES):
        (folder / machine).mkdir()
    (folder / "run.toml").write_text(RUN.replace("STEPS", str(QUICK)))
    hospitals = {each.name: each for each in make_hospitals(folder / "films", seed=1, size=0.06)}

    def bring_up(name: str) -> None:
        machine, cohort = name, "cohort"
        if name == "evaluation":
            machine, cohort = "coordinator", "federation/evaluation"
            made.begin()
        made.take_in(machine, hospitals[name].folder, hospitals[name].labels, cohort)
        if name in SITES:
            made.set_up(name)

    try:
        with ThreadPoolExecutor(2) as people:
            list(people.map(bring_up, ("evaluation", *SITES)))
        for site in SITES:
            made.enrol(site)
        yield made
    finally:
        made.close()
        machines.close()


@pytest.fixture
def federation(enrolled: Federation, record_property: Callable[..., None]) -> Federation:
    """All of it at work."""
    record_property("machines", "namespaces" if enrolled.machines.apart else "loopback")
    for machine in ("coordinator", *SITES):
        enrolled.start(machine)
    enrolled.wait(lambda: all(map(enrolled.ready, SITES)), "three nodes to be connected")
    return enrolled


def statuses(rows: list[dict[str, Any]]) -> list[dict[str, str]]:
    return [{name: site["status"] for name, site in row["sites"].items()} for row in rows]


ALL_OK = dict.fromkeys(SITES, "ok")


def test_a_run_from_films_to_its_report_by_commands_alone(federation: Federation):
    path = federation.folder / "coordinator" / "run.toml"
    path.write_text(RUN.replace("STEPS", str(QUICK)))
    shown = federation.operator("launch", "run.toml", "--home", "federation")
    assert "report.html" in shown
    run = open_home(federation.folder / "coordinator" / "federation").all_runs()[-1]
    rows = federation.ends(run)

    assert [row["round"] for row in rows] == [1, 2, 3]
    assert statuses(rows) == [ALL_OK] * 3
    (run.path / "report.html").unlink()
    federation.operator("report", run.name, "--home", "federation")
    page = (run.path / "report.html").read_text()
    for site in SITES:
        assert site in page
        assert federation.rounds(site, run) == [1, 2, 3], federation.tails()
        assert "ready" in federation.cloister(site, "node", "status", "node")
        federation.cloister(site, "node", "audit", "node")
    status = federation.operator("status", "--home", "federation")
    assert status.count("connected") == len(SITES), status
    assert run.name in federation.operator("runs", "--home", "federation")


def test_a_node_that_is_killed_in_mid_training_answers_the_same_round(federation: Federation):
    paid = federation.attempts("north")
    run = federation.launch(LONG)
    federation.wait(lambda: federation.attempts("north") > paid, "north to begin")
    federation.kill("north")
    assert federation.released("north", run) == [], "it was too quick to be killed in training"
    assert federation.rounds("north", run) == [1]
    federation.start("north")
    rows = federation.ends(run)

    assert statuses(rows) == [ALL_OK] * 3, federation.tails()
    # What was lost in training stays booked, and is made anew with fresh noise; nothing else is.
    assert federation.rounds("north", run) == [1, 1, 2, 3]
    assert federation.released("north", run) == [1, 2, 3]
    assert [federation.rounds(site, run) for site in ("harbour", "hill")] == [[1, 2, 3]] * 2
    federation.cloister("north", "node", "audit", "node")


def test_a_coordinator_that_is_killed_in_mid_round_goes_on_and_nobody_pays_twice(
    federation: Federation,
):
    with federation.in_round_one() as run:
        others = ("harbour", "hill")
        federation.wait(lambda: [federation.released(s, run) for s in others] == [[1]] * 2, "two")
        federation.kill("coordinator")
        assert federation.rows(run) == []
        federation.start("coordinator")
    rows = federation.ends(run)

    assert [row["round"] for row in rows] == [1, 2, 3]
    assert statuses(rows) == [ALL_OK] * 3, federation.tails()
    for site in SITES:
        assert federation.rounds(site, run) == [1, 2, 3]
        assert federation.released(site, run) == [1, 2, 3]


def test_a_node_that_is_cut_off_for_longer_than_the_deadline_and_back_loses_nothing(
    federation: Federation,
):
    paid = federation.attempts("hill")
    run = federation.launch(LONG, quorum=3, deadline_seconds=90.0)
    federation.wait(lambda: federation.attempts("hill") > paid, "hill to begin")
    with federation.machines.cut("hill", federation.running["hill"]):
        federation.wait(lambda: run.state.standing not in OPEN, "the deadline")
        assert run.state.standing is Standing.FAILED, f"{run.state}{federation.tails()}"
        assert "the quorum is 3" in run.state.reason, run.state
        assert "hill: late" in run.state.reason, run.state
        assert federation.running["hill"].poll() is None
    federation.operator("resume", run.name, "--home", "federation", "--detach")
    federation.wait(lambda: not run.asked("resume"), "the run to be taken up")
    rows = federation.ends(run)

    assert statuses(rows) == [ALL_OK] * 3, federation.tails()
    for site in SITES:  # round 1 was asked twice, and paid for once
        assert federation.rounds(site, run) == [1, 2, 3]
        assert federation.released(site, run) == [1, 2, 3]


def test_a_node_that_is_revoked_in_mid_run_is_gone_and_comes_back_with_a_new_key(
    federation: Federation,
):
    with federation.in_round_one() as run:
        federation.wait(lambda: federation.released("hill", run) == [1], "hill")
        federation.operator(
            *("revoke", "hill", "--reason", "its machine was stolen", "--yes"),
            *("--home", "federation", "--passphrase-file", "passphrase"),
        )
    rows = federation.ends(run)

    assert [row["round"] for row in rows] == [1, 2, 3]
    for row in rows[1:]:
        hill = row["sites"].get("hill", {"status": "not asked", "reason": "revoked"})
        assert hill["status"] != "ok", rows
        assert "revoked" in hill["reason"], rows
        assert {row["sites"][name]["status"] for name in ("north", "harbour")} == {"ok"}
    assert federation.rounds("hill", run) == [1]
    assert "its machine was stolen" in federation.operator(
        *("roster", "--history", "--home", "federation")
    )
    federation.wait(lambda: federation.running["hill"].poll() is not None, "hill to end")
    assert federation.running["hill"].returncode == os.EX_NOPERM, federation.tails()
    assert "revoked" in federation.log("hill").read_text()

    federation.enrol("hill", "--afresh")
    federation.start("hill")
    federation.wait(lambda: federation.ready("hill"), "hill to come back")
    assert statuses(federation.ends(federation.launch(QUICK))) == [ALL_OK] * 3
