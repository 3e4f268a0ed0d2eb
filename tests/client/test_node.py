"""The node's process against a coordinator that is honest, gone, wrong or hostile."""

from __future__ import annotations

import hashlib
import os
import resource
import shutil
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from email.utils import formatdate
from io import BytesIO
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import pytest
import uvicorn
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.proto.fab_pb2 import Fab, GetFabResponse
from flwr.supercore.primitives.asymmetric import public_key_to_bytes
from flwr.supercore.state.schema.linkstate_models import MessageIns
from flwr.superlink.routers.fleet import node_auth
from flwr.superlink.servicer.fleet import fleet_handlers
from sqlalchemy import select

from client.bundle import LARGEST_BUNDLE
from client.folder import NodeFolder
from client.health import (
    GPU,
    LIVE,
    READY,
    STATUS_FILE,
    Device,
    Machine,
    Watch,
    ask,
    faults,
    gpu_fault,
    is_live,
    last_report,
    report,
)
from client.link import FleetLink
from client.node import (
    AlreadyRunningError,
    DuplicateError,
    Growing,
    NodeService,
    Pace,
    State,
    exit_code,
)
from common.errors import CloisterError, LinkError, LinkRefusedError, RefusalCode
from common.messages import (
    CLOSE,
    INVITE,
    TRAIN,
    Closed,
    Closing,
    Invitation,
    NodeCard,
    RefusalReply,
    Release,
    Reply,
    TrainTask,
    read_reply,
)
from common.spec import RunSpec
from server.link import Exchange, LinkGrid, fleet_app

Spec = Callable[..., RunSpec]
MEGABYTE = 2**20
PATIENCE = 120.0
QUICK = Pace(idle=0.1, busy=0.1, beat=0.2, another=3.0, retry=0.2, grace=PATIENCE, look=0.1)
PROJECT = """\
[project]
name = "cloister"
version = "0.1.0"

[tool.flwr.app]
publisher = "cloister"
fab-include = ["LICENSE"]

[tool.flwr.app.components]
serverapp = "server.app:app"
clientapp = "client.app:app"

[tool.flwr.app.config]
spec = ""
"""


def bundle_of(files: dict[str, bytes]) -> bytes:
    """A bundle with these files and a manifest that fits them."""
    lines = [f"{n},{hashlib.sha256(c).hexdigest()},{8 * len(c)}" for n, c in files.items()]
    made = BytesIO()
    with ZipFile(made, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
        archive.writestr(".info/CONTENT", "\n".join(lines))
    return made.getvalue()


HONEST = bundle_of({"pyproject.toml": PROJECT.encode(), "LICENSE": b"Apache-2.0"})


@dataclass
class Plain:
    """A way to a coordinator on loopback without TLS: made here, and by no option."""

    address: str
    key: ec.EllipticCurvePrivateKey

    def open(self, most_bytes: int) -> FleetLink:
        return FleetLink(self.address, self.key, None, most_bytes=most_bytes)

    def superseded(self) -> bool:
        return False

    def days_left(self, now: datetime) -> float:
        return 100.0


class Place:
    """A fleet API on loopback, the state behind it, and what is asked through it."""

    def __init__(self, folder: Path) -> None:
        self.exchange = Exchange(folder / "flower.sqlite")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.address = f"127.0.0.1:{self.port}"
        self.key = ec.generate_private_key(ec.SECP384R1())
        self.number = self.exchange.register(public_key_to_bytes(self.key.public_key()), "north")
        self.open()

    def open(self, ahead: float = 0.0) -> None:
        """Serve; with a clock that is so many seconds ahead in what it says."""
        app = fleet_app(self.exchange.factory)
        config = uvicorn.Config(app, port=self.port, log_level="warning")
        if ahead:
            config.date_header = False
            config.headers = [("date", formatdate(time.time() + ahead, usegmt=True))]
        self.server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self.server.run, daemon=True)
        self._thread.start()
        wait_until(lambda: self.server.started)

    def close(self) -> None:
        self.server.should_exit = True
        self._thread.join()

    @contextmanager
    def conducting(self, bundle: bytes = HONEST) -> Iterator[Run]:
        number = self.exchange.submit(bundle, {"spec": "{}"})
        with self.exchange.conducting(number) as grid:
            yield Run(self, grid)


class Run:
    """What a conductor asks of the one node."""

    def __init__(self, place: Place, grid: LinkGrid) -> None:
        self._place, self._grid = place, grid

    def push(self, kind: str, records: RecordDict, ttl: float = 600.0) -> str:
        message = self._grid.create_message(records, kind, self._place.number, "", ttl=ttl)
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


def wait_until(true: Callable[[], bool], seconds: float = PATIENCE) -> None:
    last = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < last, "waited in vain"
        time.sleep(0.02)


class Node:
    """A service in a thread."""

    def __init__(self, service: NodeService) -> None:
        self.service = service
        self.error: CloisterError | None = None
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self) -> None:
        try:
            self.service.run()
        except CloisterError as error:
            self.error = error

    def stop(self) -> None:
        self.service.stop()
        self.service.stop()
        self.thread.join(PATIENCE)
        assert not self.thread.is_alive()


@pytest.fixture
def home(whole_node: Callable[..., Path]) -> Path:
    return whole_node("greatest_parameters = 100000")


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    made = Place(tmp_path)
    yield made
    made.close()


@pytest.fixture
def node(home: Path, place: Place) -> Iterator[Node]:
    started = Node(NodeService(home, Plain(place.address, place.key), QUICK))
    wait_until(lambda: started.service.state.contact is not None or started.error is not None)
    yield started
    started.stop()
    assert started.error is None


@pytest.fixture
def spec(make_spec: Spec) -> RunSpec:
    return make_spec().identified("a-run")


@pytest.fixture
def task(spec: RunSpec, global_weights: Any) -> TrainTask:
    return TrainTask(spec, 1, global_weights(spec))


def attempts(home: Path) -> int:
    ledger = NodeFolder.open(home).ledger()
    try:
        return len(ledger.book.charges)
    finally:
        ledger.disconnect()


def test_a_run_goes_through_the_process(
    node: Node, place: Place, home: Path, spec: RunSpec, task: TrainTask
):
    with place.conducting() as run:
        assert isinstance(run.ask(INVITE, Invitation(spec).to_records()), NodeCard)
        first = run.ask(TRAIN, task.to_records())
        assert isinstance(first, Release)
        again = run.ask(TRAIN, task.to_records())
        assert isinstance(again, Release)
        assert {k: v.tobytes() for k, v in first.update.items()} == {
            k: v.tobytes() for k, v in again.update.items()
        }
        assert attempts(home) == 1
        assert isinstance(run.ask(CLOSE, Closing(spec.digest).to_records()), Closed)


# --- What a hostile coordinator sends -----------------------------------------------------------


@pytest.fixture
def hostile(monkeypatch: pytest.MonkeyPatch) -> Hostile:
    return Hostile(monkeypatch)


class Hostile:
    """A coordinator that changes what Flower's handlers would say."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._patch = monkeypatch
        self.asked = 0

    def honest(self) -> None:
        self._patch.undo()

    def bundle(self, content: bytes) -> None:
        def run(*args: Any, **named: Any) -> Any:
            said = _GET_RUN(*args, **named)
            said.run.fab_hash = hashlib.sha256(content).hexdigest()
            return said

        def fab(*_: Any, **__: Any) -> Any:
            return GetFabResponse(fab=Fab(hash_str="", content=content))

        self._patch.setattr(fleet_handlers, "get_run", run)
        self._patch.setattr(fleet_handlers, "get_fab", fab)

    def written(self, seconds: float) -> None:
        """Every message was written so long ago."""

        def pulled(*args: Any, **named: Any) -> Any:
            self.asked += 1
            said = _PULL(*args, **named)
            for message in said.messages_list:
                message.metadata.created_at -= seconds
            return said

        self._patch.setattr(fleet_handlers, "pull_messages", pulled)


_GET_RUN, _PULL = fleet_handlers.get_run, fleet_handlers.pull_messages
MALFORMED = RefusalReply(code=RefusalCode.MALFORMED)


def test_a_bundle_with_anything_in_it_is_refused_and_the_next_run_is_honest(
    node: Node, place: Place, hostile: Hostile, spec: RunSpec, home: Path
):
    marker = home.parent / "marker"
    code = f"from pathlib import Path\nPath({str(marker)!r}).touch()\n".encode()
    honest = {"pyproject.toml": PROJECT.encode(), "LICENSE": b"Apache-2.0"}
    planted = {"client/app.py": code, "client/__init__.py": code, "sitecustomize.py": code}
    for content in (
        bundle_of(honest | planted),
        bundle_of(honest | {"../../client/app.py": code}),
        b"this is no archive",
        bytes(LARGEST_BUNDLE + 1),
    ):
        hostile.bundle(content)
        with place.conducting() as run:
            for _ in range(2):  # what was refused once stays so
                assert run.ask(INVITE, Invitation(spec).to_records()) == MALFORMED
        hostile.honest()
    with place.conducting() as run:
        assert isinstance(run.ask(INVITE, Invitation(spec).to_records()), NodeCard)
    assert not marker.exists()
    assert attempts(home) == 0


def test_what_is_no_message_of_ours_is_answered_and_the_next_one_works(
    node: Node, place: Place, home: Path, spec: RunSpec, task: TrainTask
):
    heavy = RecordDict({"task": ConfigRecord({"weights": bytes(16 * MEGABYTE)})})
    with place.conducting() as run:
        assert run.ask("query.secrets", Invitation(spec).to_records()) == MALFORMED
        assert run.ask("train", task.to_records()) == MALFORMED
        assert run.ask(TRAIN, Invitation(spec).to_records()) == MALFORMED
        assert run.ask(INVITE, RecordDict()) == MALFORMED
        assert run.ask(TRAIN, heavy) == MALFORMED
        assert isinstance(run.ask(INVITE, Invitation(spec).to_records()), NodeCard)
    assert attempts(home) == 0


def test_a_message_that_comes_too_late_costs_nothing(
    node: Node, place: Place, hostile: Hostile, home: Path, task: TrainTask
):
    spec = task.spec
    with place.conducting() as run:
        assert isinstance(run.ask(INVITE, Invitation(spec).to_records()), NodeCard)
        hostile.written(3600)
        wait_until(lambda: hostile.asked > 0)  # what was asked of the honest one is answered
        run.push(TRAIN, task.to_records())
        wait_until(lambda: not pending(place))
        hostile.honest()
        assert isinstance(run.ask(INVITE, Invitation(spec).to_records()), NodeCard)
        assert attempts(home) == 0


def pending(place: Place) -> bool:
    """Whether a message waits for the node."""
    with place.exchange.state.session() as session:
        asked = select(MessageIns).where(MessageIns.delivered_at == "")
        return session.scalar(asked) is not None


# --- What befalls a node ------------------------------------------------------------------------


@pytest.fixture
def long_task(make_spec: Spec, global_weights: Any) -> TrainTask:
    """Training that takes some seconds."""
    spec = make_spec(local={"steps": 200}).identified("a-long-run")
    return TrainTask(spec, 1, global_weights(spec))


def test_a_worker_that_is_killed_in_training_is_an_incident_and_is_booked(
    node: Node, place: Place, home: Path, long_task: TrainTask
):
    with place.conducting() as run:
        run.ask(INVITE, Invitation(long_task.spec).to_records())
        asked = run.push(TRAIN, long_task.to_records())
        wait_until(lambda: attempts(home) == 1)
        first = node.service._worker.pid
        assert first is not None
        os.kill(first, signal.SIGKILL)
        lost = run.answer(asked)
        assert isinstance(lost, RefusalReply)
        assert lost.code is RefusalCode.INCIDENT
        assert isinstance(run.ask(TRAIN, long_task.to_records()), Release)
        assert attempts(home) == 2
        assert node.service._worker.pid != first


def test_a_full_disk_refuses_and_goes_on_when_there_is_room(
    node: Node, place: Place, home: Path, spec: RunSpec, task: TrainTask
):
    with place.conducting() as run:
        run.ask(INVITE, Invitation(spec).to_records())
        worker = node.service._worker.pid
        assert worker is not None
        resource.prlimit(worker, resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
        full = run.ask(TRAIN, task.to_records())
        assert isinstance(full, RefusalReply)
        assert full.code in (RefusalCode.INCIDENT, RefusalCode.LEDGER)
        spent = attempts(home)
        resource.prlimit(
            worker, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
        )
        assert isinstance(run.ask(TRAIN, task.to_records()), Release)
        assert attempts(home) == spent + 1


def test_a_coordinator_that_goes_away_is_waited_for(
    node: Node, place: Place, spec: RunSpec, caplog: pytest.LogCaptureFixture
):
    place.close()
    wait_until(lambda: "cannot be reached" in node.service.state.trouble)
    place.open()
    wait_until(lambda: node.service.state.phase == "waiting" and not node.service.state.trouble)
    with place.conducting() as run:
        assert isinstance(run.ask(INVITE, Invitation(spec).to_records()), NodeCard)
    assert sum("cannot be reached" in record.message for record in caplog.records) <= 2


def test_after_a_line_that_was_lost_the_node_comes_again(home: Path):
    """A message that was on its way here is lost with the line, and nobody would ask again."""
    service = NodeService(home, pace=QUICK)

    class Line:
        """Is lost once; what is asked of it is in `asked`."""

        skew = 0.0

        def __init__(self) -> None:
            self.asked: list[str] = []

        def activate(self) -> int:
            self.asked.append("activate")
            return 7

        def come_again(self) -> None:
            self.asked.append("come again")

        def receive(self) -> None:
            self.asked.append("receive")
            if len(self.asked) == 2:
                raise LinkError("the line is lost")
            if len(self.asked) > 4:
                service.stop()

    line: Any = Line()
    service._serve(line, Growing(0.01, 0.01), refused=False)
    assert line.asked == ["activate", "receive", "come again", "receive", "receive"]


def test_an_answer_that_the_line_loses_is_sent_again(
    node: Node, place: Place, home: Path, long_task: TrainTask
):
    with place.conducting() as run:
        run.ask(INVITE, Invitation(long_task.spec).to_records())
        asked = run.push(TRAIN, long_task.to_records())
        wait_until(lambda: attempts(home) == 1)
        place.close()
        wait_until(lambda: "cannot be reached" in node.service.state.trouble)
        place.open()
        assert isinstance(run.answer(asked), Release)
        assert attempts(home) == 1


def test_a_clock_that_is_an_hour_off_is_named_and_waited_for(
    home: Path, place: Place, monkeypatch: pytest.MonkeyPatch
):
    place.close()
    ahead = datetime.now(UTC) + timedelta(hours=1)
    monkeypatch.setattr(node_auth, "now", lambda: ahead)
    place.open(ahead=3600.0)
    node = Node(NodeService(home, Plain(place.address, place.key), QUICK))
    wait_until(lambda: "because of its clock, which is -3" in node.service.state.trouble)
    assert report(node.service, Device()).ready is False
    time.sleep(1)
    assert node.thread.is_alive()
    place.close()
    monkeypatch.undo()
    place.open()
    wait_until(lambda: node.service.state.contact is not None)
    wait_until(lambda: not node.service.state.trouble)
    node.stop()
    assert node.error is None


# --- Who may run it -----------------------------------------------------------------------------


def test_a_node_that_is_revoked_ends_and_says_so(home: Path, place: Place):
    node = Node(NodeService(home, Plain(place.address, place.key), QUICK))
    wait_until(lambda: node.service.state.phase == "waiting")
    place.exchange.unregister(place.number)
    node.thread.join(25)
    assert isinstance(node.error, LinkRefusedError)
    assert "revoked" in str(node.error)
    assert exit_code(node.error) == os.EX_NOPERM


def test_a_node_that_is_revoked_in_training_stops_within_25_seconds(
    home: Path, place: Place, make_spec: Spec, global_weights: Any
):
    (home / "node.toml").write_text(
        (home / "node.toml").read_text().replace("pace = 0.0", "pace = 0.5")
    )
    spec = make_spec(federation={"deadline_seconds": 600}).identified("a-slow-run")
    node = Node(NodeService(home, Plain(place.address, place.key), QUICK))
    wait_until(lambda: node.service.state.phase == "waiting")
    with place.conducting() as run:
        run.ask(INVITE, Invitation(spec).to_records())
        run.push(TRAIN, TrainTask(spec, 1, global_weights(spec)).to_records())
        wait_until(lambda: attempts(home) == 1)
        place.exchange.unregister(place.number)
        node.thread.join(25)
    assert isinstance(node.error, LinkRefusedError)


def test_a_second_process_of_a_node_is_refused_here_and_elsewhere(
    node: Node, home: Path, place: Place, tmp_path: Path
):
    with pytest.raises(AlreadyRunningError, match=f"process {os.getpid()} runs this node"):
        NodeService(home, Plain(place.address, place.key), QUICK).run()
    shutil.copytree(home, tmp_path / "copy")  # on another machine
    other = Node(NodeService(tmp_path / "copy", Plain(place.address, place.key), QUICK))
    other.thread.join(PATIENCE)
    assert isinstance(other.error, DuplicateError)
    assert exit_code(other.error) == os.EX_TEMPFAIL
    assert node.thread.is_alive()


def test_a_round_under_way_is_finished_before_the_node_stops(
    home: Path, place: Place, long_task: TrainTask
):
    node = Node(NodeService(home, Plain(place.address, place.key), QUICK))
    wait_until(lambda: node.service.state.phase == "waiting")
    with place.conducting() as run:
        run.ask(INVITE, Invitation(long_task.spec).to_records())
        asked = run.push(TRAIN, long_task.to_records())
        wait_until(lambda: attempts(home) == 1)
        node.service.stop()
        assert isinstance(run.answer(asked), Release)
        node.thread.join(PATIENCE)
        assert node.error is None
        assert attempts(home) == 1
        (left,) = place.exchange.nodes()
        assert not left.online  # it has said goodbye


# --- Health -------------------------------------------------------------------------------------


def test_probes_tell_alive_from_ready(node: Node, place: Place, home: Path):
    watch = Watch(node.service, "127.0.0.1:0", every=0.1)
    with watch.watching():
        address = f"127.0.0.1:{watch.port}"
        wait_until(lambda: ask(address, READY))
        assert ask(address, LIVE)
        found = last_report(home)
        assert found is not None
        assert found.ready
        assert oct((home / STATUS_FILE).stat().st_mode)[-3:] == "600"
        place.close()
        wait_until(lambda: not ask(address, READY))
        assert ask(address, LIVE)
        place.open()
        wait_until(lambda: ask(address, READY))
        stuck = node.service.state
        stuck.tick = lambda: None  # type: ignore[method-assign]
        stuck.ticked -= 3600
        wait_until(lambda: not ask(address, LIVE))


def test_a_node_that_was_not_looked_at_yet_serves_nothing(
    node: Node, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(Watch, "look", lambda _: None)
    watch = Watch(node.service, "127.0.0.1:0")
    with watch.watching():
        for name in ("", LIVE, READY, GPU):
            assert not ask(f"127.0.0.1:{watch.port}", name)


def test_a_gpu_that_is_lost_is_seen_while_the_node_stays_connected(
    node: Node, place: Place, home: Path
):
    lost: list[str] = []
    device = Device(lambda device: "".join(lost))
    watch = Watch(node.service, "127.0.0.1:0", every=0.1, device=device)
    with watch.watching():
        address = f"127.0.0.1:{watch.port}"
        wait_until(lambda: ask(address, READY))
        assert ask(address, GPU)
        lost.append("the GPU is lost")
        wait_until(lambda: not ask(address, GPU))
        assert not ask(address, READY)
        assert ask(address, LIVE)
        found = last_report(home)
        assert found is not None
        assert found.gpu == "the GPU is lost"
        assert found.faults == ("the GPU is lost",)
        assert [each.online for each in place.exchange.nodes()] == [True]
        lost.clear()
        wait_until(lambda: ask(address, GPU))
        wait_until(lambda: ask(address, READY))


def test_a_driver_that_hangs_is_a_fault_and_holds_nobody():
    answers, asked = threading.Event(), []

    def hangs(device: str) -> str:
        asked.append(device)
        answers.wait()
        return ""

    device = Device(hangs, seconds=0.1)
    began = time.monotonic()
    for _ in range(3):
        assert device.fault("cuda:0") == "the driver of cuda:0 has not answered within 0.1 s"
    assert time.monotonic() - began < 30
    assert asked == ["cuda:0"]  # it is not asked again while it is silent
    answers.set()
    wait_until(lambda: not device.fault("cuda:0"))


def test_a_probe_that_fails_is_a_fault():
    def fails(device: str) -> str:
        raise RuntimeError(device)

    assert Device(fails).fault("cuda") == "cuda cannot be asked for (RuntimeError)"
    assert not Device().fault("cpu")


def test_a_gpu_is_missed_where_it_cannot_be_opened(tmp_path: Path):
    assert not gpu_fault("cpu", tmp_path)
    assert "no /dev/nvidia0 is there" in gpu_fault("cuda", tmp_path)
    (tmp_path / "dev").mkdir()
    for name in ("nvidiactl", "nvidia0", "nvidia1"):
        (tmp_path / "dev" / name).touch()
    assert "/dev/" not in gpu_fault("cuda:0", tmp_path)
    for name in ("nvidia1", "nvidiactl"):
        (tmp_path / "dev" / name).unlink()
        (tmp_path / "dev" / name).mkdir()  # as a device that may not be opened
        assert f"/dev/{name}" in gpu_fault("cuda:0", tmp_path)


def test_what_stands_in_the_way_is_named():
    good = Machine(certificate_days=100.0, free_bytes=2**40, gpu="")
    state = State(phase="waiting", ticked=1000.0, contact=990.0, skew=0.4)
    assert not list(faults(state, good, 1000.0))
    for changes, machine, word in (
        ({"contact": 900.0}, good, "not answered for 100 s"),
        ({"contact": None}, good, "not answered yet"),
        ({"skew": -4.0}, good, "clock is -4 s off"),
        ({"ledger": "rolled back"}, good, "rolled back"),
        ({"phase": "starting"}, good, "is starting"),
        ({}, replace(good, certificate_days=-0.5), "certificate has ended"),
        ({}, replace(good, free_bytes=2**20), "1 MiB are free"),
        ({}, replace(good, gpu="GPU gone"), "GPU gone"),
    ):
        (found,) = faults(replace(state, **changes), machine, 1000.0)
        assert word in found
    assert is_live(state, 1060.0)
    assert not is_live(state, 1300.0)
    assert is_live(replace(state, until=5000.0), 1300.0)
