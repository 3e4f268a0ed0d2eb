"""A node as a hospital runs it: `cloister node start`, real TLS, a real enrolment, real signals."""

from __future__ import annotations

import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from flwr.app import Message, RecordDict
from flwr.supercore.primitives.asymmetric import public_key_to_bytes

from client import credentials
from client.folder import NodeFolder, cohort_digest
from client.health import last_report
from client.ledger import Signed
from client.node import alone, running
from common.clock import Clock
from common.cohort import index_file
from common.messages import (
    INVITE,
    TRAIN,
    Invitation,
    NodeCard,
    Release,
    Reply,
    TrainTask,
    read_reply,
)
from common.spec import RunSpec
from server.authority import Authority, NewFederation
from server.authority import Signed as Who
from server.link import Exchange, LinkGrid, bundle, fleet_app
from server.tls import ServerTls

pytestmark = pytest.mark.slow

Spec = Callable[..., RunSpec]
PATIENCE = 600.0
WORDS = "a passphrase of a test"
ADA = Who("Ada")
PROGRAM = [sys.executable, "-c", "from deploy.cli import main; main()"]
NODE = """\
site = "north"
declared_size = 40
cohort = "../cohort"
approval = "automatic"

[budget]
epsilon = 1000.0
delta = 1e-4

[limits]
operators = "any"
models = "any"

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


def wait_until(true: Callable[[], bool], seconds: float = PATIENCE) -> None:
    last = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < last, "waited in vain"
        time.sleep(0.02)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


class Federation:
    """An authority, its coordinator's fleet API over TLS 1.3 on loopback, and one enrolled node."""

    def __init__(self, folder: Path, home: Path, host: str) -> None:
        self.home, self.port = home, free_port()
        self.folder = folder / "federation"
        new = NewFederation("chest", [host], self.port)
        self.authority = Authority.create(self.folder, new, WORDS, ADA, Clock())
        request = credentials.request(home, "north")
        made = self.authority.enrol(request, 500, 365, ADA)
        (folder / "bundle.json").write_bytes(made.content)
        credentials.offered(home, folder / "bundle.json", Clock().date()).accept()
        self.exchange = Exchange(folder / "flower.sqlite")
        key = credentials.Credentials.open(home).public_key
        self.number = self.exchange.register(public_key_to_bytes(key), "north")
        self.open()

    def open(self) -> None:
        context = ServerTls(self.folder).context
        app = fleet_app(self.exchange.factory)
        config = uvicorn.Config(
            app, port=self.port, log_level="warning", ssl_context_factory=lambda *_: context
        )
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, daemon=True)
        self._thread.start()
        wait_until(lambda: self._server.started)

    def close(self) -> None:
        self._server.should_exit = True
        self._thread.join()

    @contextmanager
    def conducting(self) -> Iterator[Run]:
        number = self.exchange.submit(bundle(), {})
        with self.exchange.conducting(number) as grid:
            yield Run(self, grid)


class Run:
    """What a conductor asks of the one node."""

    def __init__(self, federation: Federation, grid: LinkGrid) -> None:
        self._federation, self._grid = federation, grid

    def push(self, kind: str, records: RecordDict) -> str:
        number = self._federation.number
        message = self._grid.create_message(records, kind, number, "", ttl=600.0)
        (identity,) = self._grid.push_messages([message])
        return str(identity)

    def answer(self, identity: str) -> Reply:
        replies: list[Message] = []

        def came() -> bool:
            replies.extend(self._grid.pull_messages([identity]))
            return bool(replies)

        wait_until(came)
        return read_reply(replies[0].content)

    def ask(self, kind: str, records: RecordDict) -> Reply:
        return self.answer(self.push(kind, records))


class Process:
    """`cloister node start`, or another program, with its log in a file."""

    def __init__(self, home: Path, *program: str, **environment: str) -> None:
        self.home, self.log = home, home / "log.txt"
        shipped = [*PROGRAM, "node", "start", str(home), "--health", "none"]
        with self.log.open("ab") as output:
            self.process = subprocess.Popen(
                program or shipped,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=clean() | environment,
            )

    def is_ready(self) -> bool:
        assert self.process.poll() is None, self.log.read_text()[-4000:]
        found = last_report(self.home)
        return found is not None and found.ready and found.pid == self.process.pid

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def end(self) -> int:
        self.process.terminate()
        return self.process.wait(PATIENCE)


def clean() -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if not k.lower().endswith("_proxy")}
    return kept | {"OMP_NUM_THREADS": "1", "FLWR_TELEMETRY_ENABLED": "0"}


def command(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*PROGRAM, "node", *words],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        env=clean() | {"COLUMNS": "200"} | environment,
        check=False,
    )


@pytest.fixture
def make_home(tmp_path: Path, make_spec: Spec, write_cohort: Any) -> Callable[[str], Path]:
    """`make_home("north")`: a folder of that name with a fresh node in it; all have one cohort."""
    write_cohort(make_spec(), range(23))

    def make(name: str) -> Path:
        path = tmp_path / name
        path.mkdir(mode=0o700)
        digest = make_spec().input.preprocessing_digest
        (path / "node.toml").write_text(NODE.replace("PREPROCESSING", digest))
        ledger = NodeFolder.open(path).create(by="Ada")
        ledger.admit(cohort_digest(tmp_path / "cohort"), Signed("Ada", "looked at"))
        ledger.disconnect()
        return path

    return make


@pytest.fixture
def home(make_home: Callable[[str], Path]) -> Path:
    return make_home("north")


@pytest.fixture
def federation(tmp_path: Path, home: Path) -> Iterator[Federation]:
    made = Federation(tmp_path, home, "127.0.0.1")
    yield made
    made.close()


@pytest.fixture
def start(home: Path) -> Iterator[Callable[..., Process]]:
    """`start()`: a node's process; ended with the test."""
    made: list[Process] = []

    def started(**environment: str) -> Process:
        made.append(Process(home, **environment))
        return made[-1]

    yield started
    for process in made:
        process.kill()
    wait_until(lambda: running(home) is None)


@pytest.fixture
def task(make_spec: Spec, global_weights: Any) -> TrainTask:
    """Training that takes some seconds."""
    spec = make_spec(local={"steps": 200}).identified("a-run")
    return TrainTask(spec, 1, global_weights(spec))


def attempts(home: Path) -> int:
    ledger = NodeFolder.open(home).ledger()
    try:
        return len(ledger.book.charges)
    finally:
        ledger.disconnect()


def as_bytes(release: Reply) -> dict[str, bytes]:
    assert isinstance(release, Release)
    return {name: array.tobytes() for name, array in release.update.items()}


def test_a_node_that_is_killed_at_any_moment_comes_back_and_spends_nothing_twice(
    federation: Federation, start: Callable[..., Process], home: Path, task: TrainTask
):
    first = start()
    wait_until(first.is_ready)
    with federation.conducting() as run:
        assert isinstance(run.ask(INVITE, Invitation(task.spec).to_records()), NodeCard)
        run.push(TRAIN, task.to_records())
        wait_until(lambda: attempts(home) == 1)
        first.kill()  # in training: what was booked stays booked
        federation.exchange.state.deactivate_node(federation.number)  # or wait for a minute
        second = start()
        wait_until(second.is_ready)
        release = as_bytes(run.ask(TRAIN, task.to_records()))
        assert attempts(home) == 2
        second.kill()  # after the release: it is there for the asking
        federation.exchange.state.deactivate_node(federation.number)
        third = start()
        wait_until(third.is_ready)
        assert as_bytes(run.ask(TRAIN, task.to_records())) == release
        assert attempts(home) == 2
    assert third.end() == 0
    assert not federation.exchange.nodes()[0].online
    assert command("audit", str(home)).returncode == 0


SEEDED = Path(__file__).with_name("field_site.py")


@pytest.mark.parametrize("shipped", [True, False], ids=["shipped", "seeded"])
def test_the_noise_of_a_shipped_node_is_its_own(
    tmp_path: Path, make_home: Callable[[str], Path], task: TrainTask, shipped: bool
):
    """Two nodes of one site, with one cohort, given one task in fresh homes.

    What is shipped answers twice otherwise. The control is handed one seed: all else is the same.
    """

    def answered(name: str) -> dict[str, bytes]:
        home, folder = make_home(name), tmp_path / f"{name}-coordinator"
        folder.mkdir()
        federation = Federation(folder, home, "127.0.0.1")
        words = [] if shipped else [sys.executable, str(SEEDED), str(home), "1", str(folder)]
        process = Process(home, *words, PYTHONPATH=str(Path(__file__).parents[2]))
        try:
            wait_until(process.is_ready)
            with federation.conducting() as run:
                assert isinstance(run.ask(INVITE, Invitation(task.spec).to_records()), NodeCard)
                return as_bytes(run.ask(TRAIN, task.to_records()))
        finally:
            process.kill()
            federation.close()

    first, second = answered("first"), answered("second")
    assert first.keys() == second.keys()
    assert [first[name] == second[name] for name in first] == [not shipped] * len(first)


def test_a_revoked_node_ends_with_a_code_that_says_so(
    federation: Federation, start: Callable[..., Process], home: Path
):
    process = start()
    wait_until(process.is_ready)
    assert command("status", str(home)).returncode == 0
    federation.exchange.unregister(federation.number)
    assert process.process.wait(PATIENCE) == os.EX_NOPERM
    assert "revoked" in process.log.read_text()
    shown = command("status", str(home))
    assert shown.returncode == 1
    assert "does not run" in shown.stdout
    doctor = command("doctor", str(home))
    assert doctor.returncode == 1
    assert "✗ roster" in doctor.stdout


def test_the_doctor_says_what_to_mend(federation: Federation, home: Path, tmp_path: Path):
    good = command("doctor", str(home))
    assert good.returncode == 0, good.stdout + good.stderr
    for what in ("ledger", "cohort", "identity", "name", "port", "tls", "clock", "roster"):
        assert f"✓ {what}" in good.stdout
    federation.close()
    away = command("doctor", str(home))
    assert away.returncode == 1
    assert "✗ port" in away.stdout
    assert "firewall" in away.stdout
    federation.open()
    (home / "node.key").rename(tmp_path / "lost")
    lost = command("doctor", str(home))
    assert "✗ ledger" in lost.stdout
    assert "✓ roster" in lost.stdout


class Proxy:
    """An HTTP proxy that knows CONNECT alone (RFC 9110, section 9.3.6), and leads to one port."""

    def __init__(self, port: int) -> None:
        self.asked: list[str] = []
        self._port = port
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listening.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._listening.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                caller, _ = self._listening.accept()
                threading.Thread(target=self._lead, args=(caller,), daemon=True).start()

    def _lead(self, caller: socket.socket) -> None:
        head = b""
        while b"\r\n\r\n" not in head:
            head += caller.recv(4096)
        self.asked.append(head.split(b"\r\n")[0].decode())
        with caller, socket.create_connection(("127.0.0.1", self._port)) as there:
            caller.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
            pairs = {caller: there, there: caller}
            with suppress(OSError):
                while True:
                    for ready in select.select(list(pairs), [], [])[0]:
                        content = ready.recv(65536)
                        if not content:
                            return
                        pairs[ready].sendall(content)


def test_a_node_behind_a_proxy_is_led_through_it_and_loopback_never_is(
    tmp_path: Path, home: Path, start: Callable[..., Process], task: TrainTask
):
    """The coordinator's name is known to the proxy alone."""
    federation = Federation(tmp_path, home, "coordinator.invalid")
    proxy = Proxy(federation.port)
    try:
        process = start(HTTPS_PROXY=proxy.url, HTTP_PROXY=proxy.url)
        wait_until(process.is_ready)
        with federation.conducting() as run:
            assert isinstance(run.ask(INVITE, Invitation(task.spec).to_records()), NodeCard)
        doctor = command("doctor", str(home), HTTPS_PROXY=proxy.url)
        assert "left to the proxy" in doctor.stdout
        assert f"process {process.process.pid}" in doctor.stdout
        assert doctor.returncode == 0, doctor.stdout
        assert process.end() == 0
        expected = f"CONNECT coordinator.invalid:{federation.port} HTTP/1.1"
        assert set(proxy.asked) == {expected}
    finally:
        proxy.close()
        federation.close()


def test_a_worker_of_a_node_that_is_gone_does_not_stay(
    federation: Federation, start: Callable[..., Process], home: Path, task: TrainTask
):
    process = start()
    wait_until(process.is_ready)
    family = descendants(process.process.pid)
    assert family
    with federation.conducting() as run:
        run.ask(INVITE, Invitation(task.spec).to_records())
        run.push(TRAIN, task.to_records())
        wait_until(lambda: attempts(home) == 1)
        process.process.send_signal(signal.SIGKILL)
        wait_until(lambda: not any(Path(f"/proc/{each}").exists() for each in family), 30)


def descendants(pid: int) -> list[int]:
    """The processes that `pid` started, and those that they did (proc(5))."""
    children: list[int] = []
    for thread in Path(f"/proc/{pid}/task").glob("*/children"):
        with suppress(OSError):
            children += map(int, thread.read_text().split())
    return children + [later for child in children for later in descendants(child)]


def test_a_node_says_first_where_it_goes_and_why_it_takes_no_run(
    federation: Federation, home: Path
):
    def said() -> str:
        with alone(home):  # so that it ends there
            done = command("start", str(home), "--health", "none")
        assert done.returncode == os.EX_TEMPFAIL
        return done.stderr

    assert f"north, coordinator https://127.0.0.1:{federation.port}" in (good := said())
    assert "takes no run" not in good
    with index_file(NodeFolder.open(home).cohort_path).open("ab") as index:
        index.write(b"\n")
    assert "takes no run yet: the cohort is not admitted (`cloister node admit`)" in said()


def test_what_stops_a_node_before_it_begins_has_a_code(tmp_path: Path, home: Path):
    none = command("start", str(tmp_path), "--health", "none")
    assert none.returncode == os.EX_CONFIG
    assert "node.toml" in none.stderr
    (home / "ledger" / "ledger.sqlite").unlink()
    lost = command("start", str(home), "--health", "none")
    assert lost.returncode == os.EX_DATAERR
    assert "the ledger is missing" in lost.stderr
