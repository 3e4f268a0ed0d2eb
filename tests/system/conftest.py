"""What the whole system's tests share: a federation of processes, a disk that can be full, a clock.

The federation is a coordinator and two sites over TLS on loopback. The sites' randomness is seeded
(field_site.py); all else is what is shipped. So whatever happens to a run, its weights have to be
those of a run to which nothing happened, and of a simulation.
"""

from __future__ import annotations

import json
import os
import resource
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from client import credentials
from client.folder import NodeFolder, cohort_digest
from client.health import last_report
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
PATIENCE = 600.0
FEDERATION = """
[federation]
quorum = 2
deadline_seconds = 600.0
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


ROOM = 2**30
CLOCK = r"""
#include <fcntl.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

static volatile int64_t *ahead;

__attribute__((constructor)) static void look(void) {
    const char *path = getenv("CLOCK_AHEAD");
    int file = path ? open(path, O_RDONLY | O_CLOEXEC) : -1;
    void *found = file < 0 ? MAP_FAILED : mmap(0, 8, PROT_READ, MAP_SHARED, file, 0);
    if (found != MAP_FAILED) ahead = found;
}

int clock_gettime(clockid_t which, struct timespec *now) {
    int failed = syscall(SYS_clock_gettime, which, now);
    if (!failed && ahead && (which == CLOCK_REALTIME || which == CLOCK_REALTIME_COARSE))
        now->tv_sec += *ahead;
    return failed;
}

int gettimeofday(struct timeval *now, void *zone) {
    struct timespec exact;
    (void)zone;
    clock_gettime(CLOCK_REALTIME, &exact);
    now->tv_sec = exact.tv_sec;
    now->tv_usec = exact.tv_nsec / 1000;
    return 0;
}

time_t time(time_t *into) {
    struct timespec exact;
    clock_gettime(CLOCK_REALTIME, &exact);
    if (into) *into = exact.tv_sec;
    return exact.tv_sec;
}
"""
"""Stands before the C library (ld.so(8), LD_PRELOAD): the date, so many seconds ahead as a file
says, while the process runs. What measures spans is left as it is, as on a machine with a wrong
date."""


DISK = "cloister-test-"
"""What a disk of ours is called among the mounts (proc(5)), with the process that made it."""


class Disk:
    """A folder that is a disk of its own, where this machine allows mounts."""

    def __init__(self, path: Path) -> None:
        path.mkdir()
        self.path = path
        self.is_real = self._mount(
            "-t", "tmpfs", "-o", f"size={ROOM},mode=0700", f"{DISK}{os.getpid()}"
        )

    @contextmanager
    def full(self, *processes: int) -> Iterator[None]:
        """No byte more goes on it (ENOSPC).

        Where it is no disk of its own, no file of these processes grows beyond what the smallest
        of ours has already (EFBIG).
        """
        with self._without_room() if self.is_real else small_files(processes):
            yield

    def close(self) -> None:
        if self.is_real:
            subprocess.run(["umount", "--lazy", str(self.path)], check=True)

    @contextmanager
    def _without_room(self) -> Iterator[None]:
        tries = (self._resize(self._used) for _ in range(1000))  # somebody may just write
        assert any(tries), f"{self.path}: cannot be made full"
        try:
            yield
        finally:
            assert self._resize(ROOM)

    @property
    def _used(self) -> int:
        found = os.statvfs(self.path)
        return (found.f_blocks - found.f_bfree) * found.f_frsize

    def _resize(self, size: int) -> bool:
        return self._mount("-o", f"remount,size={size}")

    def _mount(self, *words: str) -> bool:
        with suppress(FileNotFoundError):
            done = subprocess.run(
                ["mount", *words, str(self.path)], capture_output=True, check=False
            )
            return done.returncode == 0
        return False


def left_mounted() -> Iterator[str]:
    """Where disks are of processes that are gone: one that was killed has unmounted nothing."""
    for line in Path("/proc/mounts").read_text().splitlines():
        name, place, *_ = line.split()
        if name.startswith(DISK) and not Path("/proc", name.removeprefix(DISK)).exists():
            yield place


@contextmanager
def small_files(processes: tuple[int, ...]) -> Iterator[None]:
    before = {}
    for each in processes:
        with suppress(ProcessLookupError):
            limit = (64, resource.RLIM_INFINITY)
            before[each] = resource.prlimit(each, resource.RLIMIT_FSIZE, limit)
    yield
    for each, limit in before.items():
        with suppress(ProcessLookupError):
            resource.prlimit(each, resource.RLIMIT_FSIZE, limit)


class WrongClock:
    """The clock of a machine: of every process that is started with `environment`."""

    def __init__(self, folder: Path, compiler: str) -> None:
        source, made = folder / "clock.c", folder / "clock.so"
        source.write_text(CLOCK)
        subprocess.run([compiler, "-shared", "-fPIC", "-o", made, source], check=True)
        self._ahead = folder / "ahead"
        self.environment = {"LD_PRELOAD": str(made), "CLOCK_AHEAD": str(self._ahead)}
        self.set(0)

    def set(self, ahead: int) -> None:
        """Have it go so many seconds ahead of the true time, from now on."""
        descriptor = os.open(self._ahead, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            os.pwrite(descriptor, struct.pack("=q", ahead), 0)
        finally:
            os.close(descriptor)


def unused_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_until(true: Callable[[], Any], what: str, seconds: float = PATIENCE) -> None:
    last = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < last, f"waited in vain for {what}"
        time.sleep(0.05)


PROGRAM = [sys.executable, "-c", "from deploy.cli import main; main()"]


def command(*arguments: str) -> list[str]:
    return [*PROGRAM, "coordinator", *arguments]


ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "COLUMNS": "200"}


@dataclass
class Federation:
    """A coordinator's home, its sites' homes, and every process that was started on them."""

    folder: Path
    home: CoordinatorHome
    authority: Authority
    run_text: str
    sites: dict[str, Path]
    disks: dict[str, Disk]
    running: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    logs: list[Path] = field(default_factory=list)

    def _start(
        self, arguments: list[str], name: str, **environment: str
    ) -> subprocess.Popen[bytes]:
        log = self.folder / f"{name}.{len(self.logs)}.log"
        self.logs.append(log)
        with log.open("wb") as output:
            process = subprocess.Popen(
                arguments, env=ENVIRONMENT | environment, stdout=output, stderr=subprocess.STDOUT
            )
        self.running[name] = process
        return process

    wait = staticmethod(wait_until)

    def serve(self) -> subprocess.Popen[bytes]:
        arguments = command("start", str(self.home.path), "--listen", "127.0.0.1")
        process = self._start(arguments, "coordinator")
        log = self.logs[-1]
        self.wait(
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

    def cloister(self, *words: str) -> None:
        """A command that has to succeed."""
        done = subprocess.run(
            [*PROGRAM, *words],
            env=ENVIRONMENT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=PATIENCE,
            check=False,
        )
        assert done.returncode == 0, done.stdout.decode()

    def enrol(self, name: str) -> None:
        enrol(self.authority, self.sites[name], name)

    def revoke(self, name: str) -> None:
        self.authority.revoke(name, SIGNED)

    def kill(self, name: str) -> None:
        self.running[name].kill()
        self.running[name].wait()

    @property
    def missing(self) -> dict[str, str]:
        return Exchange(self.home.database).left()

    def hold(self, name: str, number: int) -> None:
        """Have a site begin a round, and not go on with it."""
        (self._told(name) / "hold").write_text(str(number))

    def let_go(self, name: str) -> None:
        """Let a site that was held go on."""
        (self._told(name) / "hold").unlink(missing_ok=True)

    def family(self, name: str) -> list[int]:
        """A site's processes, its worker among them."""
        return descendants(self.running[name].pid)

    def conductor(self, run: Run) -> int:
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            with suppress(OSError):
                said = path.read_bytes().split(b"\0")
                if b"server.conductor" in said and run.name.encode() in said:
                    return int(path.parent.name)
        raise LookupError(run.name)

    @contextmanager
    def in_round(self, number: int, waits: str, **changes: str) -> Iterator[Run]:
        """A run at the moment when the site `waits` is in training, and does not come to an end."""
        before = len(self.begun(waits))
        self.hold(waits, number)
        run = self.launch(**changes)
        try:
            self.wait(lambda: len(self.begun(waits)) >= before + number, f"round {number}")
            yield run
        finally:
            self.let_go(waits)

    def site(self, name: str, another: float = 90.0, **environment: str) -> None:
        """Start a site, which waits so many seconds for another process of it to be gone."""
        words = [SITE_PROGRAM, self.sites[name], self.seed, self._told(name), another]
        self._start([sys.executable, *map(str, words)], name, **environment)

    def comes(self, name: str) -> None:
        """Start a site, and wait until it is connected."""
        self.site(name)
        self.wait(lambda: name not in self.missing, name)

    def leaves(self, name: str) -> None:
        """Stop a site in order."""
        self.running[name].terminate()
        assert self.running[name].wait(PATIENCE) == 0, self.log_of(name)[-3000:]

    def dies(self, name: str) -> None:
        """Kill a site, and wait until the coordinator has noticed."""
        self.kill(name)
        self.wait(lambda: name in self.missing, f"{name} to be missed")

    def launch(self, **changes: Any) -> Run:
        text = self.run_text
        for old, new in changes.items():
            text = text.replace(f"{old} = ", f"{old} = {new} # ")
        path = self.folder / "run.toml"
        path.write_text(text)
        return launch(self.home, path)

    def answered(self, run: Run, number: int, name: str) -> bool:
        """Whether the coordinator has an outcome of a site in a round."""
        wanted = {"event": "site_answered", "number": number, "site": name}
        lines = (run.path / "events.jsonl").read_text().splitlines()
        return any(wanted.items() <= json.loads(line).items() for line in lines)

    def ends(self, run: Run, standing: Standing) -> None:
        self.wait(lambda: run.state.standing not in OPEN, "the run's end")
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
        """The kinds of all requests that a site has had."""
        return self._lines(name, "heard")

    def opened(self, name: str) -> int:
        """How often a site has opened its way to the coordinator."""
        return len(self._lines(name, "opened"))

    def begun(self, name: str) -> list[str]:
        """The rounds that a site has booked and begun to train, in all runs."""
        return self._lines(name, "begun")

    def _told(self, name: str) -> Path:
        path = self.folder / f"told-{name}"
        path.mkdir(exist_ok=True)
        return path

    def _lines(self, name: str, file: str) -> list[str]:
        path = self._told(name) / file
        return path.read_text().split("\n")[:-1] if path.exists() else []

    @property
    def seed(self) -> int:
        """Of the runs, and of the sites' randomness."""
        return parse_run_text(self.run_text, source="run.toml").spec.seed

    def rows(self, run: Run) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (run.path / "metrics.jsonl").open()]

    def weights(self, folder: Path) -> dict[str, bytes]:
        """Of a run's model, bit by bit."""
        found = load_file(folder / "model.safetensors")
        return {name: array.tobytes() for name, array in found.items()}

    def trouble(self, name: str) -> str:
        """What stands in a site's way, as it says itself."""
        found = last_report(self.sites[name])
        return "" if found is None else " ".join(found.faults)

    def statuses(self, run: Run, name: str) -> list[str]:
        """What became of a site in each round."""
        return [row["sites"][name]["status"] for row in self.rows(run)]

    def close(self) -> None:
        for process in self.running.values():
            process.terminate()
        for process in self.running.values():
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def descendants(pid: int) -> list[int]:
    """A process, and those that it and they have started (proc(5))."""
    children: list[int] = []
    for thread in Path(f"/proc/{pid}/task").glob("*/children"):
        with suppress(OSError):
            children += map(int, thread.read_text().split())
    return [pid, *(later for child in children for later in descendants(child))]


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
def disk() -> Iterator[Callable[[Path], Disk]]:
    """`disk(path)`: a new folder that can be full; unmounted at the end."""
    made: list[Disk] = []
    for place in left_mounted():
        subprocess.run(["umount", "--lazy", place], check=False)

    def make(path: Path) -> Disk:
        made.append(Disk(path))
        return made[-1]

    try:
        yield make
    finally:
        with ExitStack() as last:  # one that cannot be unmounted keeps none of the others mounted
            for each in made:
                last.callback(each.close)


@pytest.fixture
def clock(tmp_path: Path, program: Callable[[str], str]) -> WrongClock:
    """A clock that is right, and can be set wrong."""
    return WrongClock(tmp_path, program("cc"))


@pytest.fixture(scope="module")
def federation(
    tmp_path_factory: pytest.TempPathFactory, spec_text: str, disk: Callable[[Path], Disk]
) -> Iterator[Federation]:
    """One for all tests; each leaves the service and both sites running."""
    folder = tmp_path_factory.mktemp("federation")
    disks = {name: disk(folder / f"disk-{name}") for name in ("coordinator", "south")}
    text = spec_text + FEDERATION
    spec = parse_run_text(text, source="run.toml").spec
    new = NewFederation("chest", ["localhost"], unused_port(), Lifetimes())
    home = CoordinatorHome(disks["coordinator"].path / "home")
    authority = Authority.create(home.path, new, PASSPHRASE, SIGNED, Clock())
    make_cohort(home.evaluation, spec, 40)
    sites = {}
    for number, name in enumerate(("north", "south")):
        cohort = make_cohort(folder / f"cohort-{name}", spec, 20 + number)
        sites[name] = (disks[name].path if name in disks else folder) / name
        make_site(sites[name], name, cohort, spec)
        enrol(authority, sites[name], name)
    made = Federation(folder, home, authority, text, sites, disks)
    try:
        made.serve()
        for name in sites:
            made.site(name)
        wait_until(lambda: not made.missing, "both sites")
        yield made
    finally:
        made.close()


@pytest.fixture(scope="module")
def undisturbed(federation: Federation) -> Run:
    """A run that nothing happened to; launched and watched as an operator does it."""
    path = federation.folder / "run.toml"
    path.write_text(federation.run_text)
    said = federation.command("launch", str(path))
    *_, run = federation.home.all_runs()
    assert run.state.standing is Standing.FINISHED, (said, *federation.told(run))
    assert all(f"round    {number}" in said for number in (1, 2, 3))
    assert (run.path / "report.html").as_uri() in said
    return run
