"""The node's process against a coordinator that is honest, gone, wrong or hostile."""

from __future__ import annotations

import hashlib
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from io import BytesIO
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import pytest
import uvicorn
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.supercore.primitives.asymmetric import public_key_to_bytes

from client.folder import NodeFolder, cohort_digest
from client.ledger import Signed
from client.link import FleetLink
from client.node import NodeService, Pace
from common.errors import RefusalCode
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
QUICK = Pace(idle=0.1, busy=0.1, beat=0.2, another=3.0, retry=0.2, grace=20.0, look=0.1)
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

    def open(self) -> None:
        app = fleet_app(self.exchange.factory)
        self.server = uvicorn.Server(uvicorn.Config(app, port=self.port, log_level="warning"))
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
        wait_until(lambda: bool(replies.extend(self._grid.pull_messages([identity])) or replies))
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
        self.error: BaseException | None = None
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self) -> None:
        try:
            self.service.run()
        except BaseException as error:
            self.error = error

    def stop(self) -> None:
        self.service.stop()
        self.service.stop()
        self.thread.join(PATIENCE)
        assert not self.thread.is_alive()


NODE = """\
site = "north"
declared_size = 40
cohort = "../cohort"
approval = "automatic"

[budget]
epsilon = 20.0
delta = 1e-4

[limits]
operators = "any"
models = "any"
greatest_parameters = 100000

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


@pytest.fixture
def home(tmp_path: Path, make_spec: Spec, write_cohort: Any) -> Path:
    """A whole node, whose cohort a person admitted."""
    write_cohort(make_spec(), range(23))
    path = tmp_path / "north"
    path.mkdir(mode=0o700)
    digest = make_spec().input.preprocessing_digest
    (path / "node.toml").write_text(NODE.replace("PREPROCESSING", digest))
    ledger = NodeFolder.open(path).create(by="Ada")
    ledger.admit(cohort_digest(tmp_path / "cohort"), Signed("Ada", "looked at"))
    ledger.disconnect()
    return path


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
