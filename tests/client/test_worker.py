"""The process that answers, when it dies, hangs, takes too much, or is handed nonsense."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from flwr.app import RecordDict

from client.app import REQUESTS
from client.folder import NodeFolder
from client.worker import AbandonedError, Asked, Bounds, Worker, WorkerLostError
from common.errors import ConfigError, LedgerError, RefusalCode
from common.messages import (
    CLOSE,
    COUNT,
    INVITE,
    TRAIN,
    Closing,
    EvaluationTask,
    Invitation,
    NodeCard,
    RefusalReply,
    Release,
    Reply,
    Request,
    TrainTask,
    read_reply,
)
from common.parcel import Parcel
from common.spec import RunSpec

Spec = Callable[..., RunSpec]
PATIENCE = 180.0
MALFORMED = RefusalReply(code=RefusalCode.MALFORMED)


@pytest.fixture
def home(whole_node: Callable[..., Path]) -> Path:
    return whole_node()


@pytest.fixture
def worker(home: Path) -> Iterator[Worker]:
    with Worker(home) as made:
        yield made


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


def never() -> bool:
    return False


def hand(worker: Worker, kind: str, records: RecordDict, seconds: float = PATIENCE) -> Reply:
    asked = Asked(kind, Parcel.of(records))
    return read_reply(worker.answer(asked, time.monotonic() + seconds, never).records())


def ask(worker: Worker, request: Request, seconds: float = PATIENCE) -> Reply:
    kind = next(kind for kind, expected in REQUESTS.items() if isinstance(request, expected))
    return hand(worker, kind, request.to_records(), seconds)


def test_a_worker_that_cannot_be_started_is_a_worker_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The node waits for another time; it does not end."""

    class Process:
        def __init__(self, **_: Any) -> None: ...

        def start(self) -> None:
            raise OSError(11, "Resource temporarily unavailable")

    with Worker(tmp_path) as worker:
        monkeypatch.setattr(worker._context, "Process", Process)
        for _ in range(2):
            with pytest.raises(WorkerLostError, match="Resource temporarily unavailable"):
                worker.start()
            assert worker.pid is None


def test_one_process_answers_everything(worker: Worker, task: TrainTask):
    worker.start()
    first = worker.pid
    assert isinstance(ask(worker, Invitation(task.spec)), NodeCard)
    assert isinstance(ask(worker, task), Release)
    assert worker.pid == first


def test_what_cannot_be_read_is_refused_and_costs_nothing(worker: Worker, home: Path):
    for parcel in (
        Parcel("a" * 64, {"a" * 64: b"nonsense"}),
        Parcel("a" * 64, {}),
        Parcel("", {"": b""}),
        Parcel("a" * 64, {"a" * 64: b"Message " + b"b" * 64 + b" 0\x00"}),
    ):
        for kind in (INVITE, TRAIN, COUNT, CLOSE):
            asked = Asked(kind, Parcel(parcel.identity, dict(parcel.objects)))
            said = worker.answer(asked, time.monotonic() + PATIENCE, never)
            assert read_reply(said.records()) == MALFORMED
    assert attempts(home) == 0


def test_a_request_under_another_ones_kind_is_refused(worker: Worker, home: Path, task: TrainTask):
    evaluation = EvaluationTask(task.spec, task.weights)
    for request in (Invitation(task.spec), evaluation, Closing(task.spec.digest)):
        assert hand(worker, TRAIN, request.to_records()) == MALFORMED
    assert attempts(home) == 0


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV])
def test_a_worker_that_dies_takes_one_request_with_it(
    worker: Worker, task: TrainTask, number: signal.Signals
):
    worker.start()
    os.kill(worker.pid or 0, signal.SIGSTOP)
    os.kill(worker.pid or 0, number)
    os.kill(worker.pid or 0, signal.SIGCONT)
    with pytest.raises(WorkerLostError, match=number.name):
        worker._answered(Asked(INVITE, Parcel.of(RecordDict())), time.monotonic() + 60, never)
    assert isinstance(ask(worker, Invitation(task.spec)), NodeCard)


def test_a_worker_that_hangs_is_ended_at_its_time(worker: Worker, home: Path, task: TrainTask):
    worker.start()
    os.kill(worker.pid or 0, signal.SIGSTOP)
    started = time.monotonic()
    with pytest.raises(WorkerLostError, match="took longer"):
        ask(worker, task, seconds=1.0)
    assert time.monotonic() - started < 30
    assert worker.pid is None
    assert isinstance(ask(worker, Invitation(task.spec)), NodeCard)


def test_training_that_is_abandoned_ends_and_stays_booked(
    worker: Worker, home: Path, task: TrainTask
):
    ask(worker, Invitation(task.spec))
    asked = Asked(TRAIN, Parcel.of(task.to_records()))
    with pytest.raises(AbandonedError):
        worker.answer(asked, time.monotonic() + PATIENCE, lambda: attempts(home) == 1)
    assert worker.pid is None
    assert attempts(home) == 1
    assert isinstance(ask(worker, task), Release)
    assert attempts(home) == 2


def test_a_worker_has_its_memory_and_no_more(home: Path, make_spec: Spec, global_weights: Any):
    spec = make_spec(model={"name": "small-cnn", "width": 256}).identified("a-heavy-run")
    heavy = TrainTask(spec, 1, global_weights(spec))
    with Worker(home, Bounds(memory=96 * 2**20)) as small:
        assert isinstance(ask(small, Invitation(spec)), NodeCard)
        first = small.pid
        lost = ask(small, heavy)
        assert isinstance(lost, RefusalReply)
        assert lost.code is RefusalCode.INCIDENT
        assert small.pid == first
        assert isinstance(ask(small, Invitation(spec)), NodeCard)
    with Worker(home) as roomy:
        assert isinstance(ask(roomy, heavy), Release)


def test_a_folder_that_is_not_in_order_stops_it_with_the_reason(worker: Worker, home: Path):
    key = (home / "node.key").rename(home / "lost")
    with pytest.raises(ConfigError, match="node key cannot be read"):
        worker.start()
    key.rename(home / "node.key")
    (home / "ledger" / "ledger.sqlite").rename(home / "ledger" / "away")
    with pytest.raises(LedgerError, match="the ledger is missing"):
        worker.start()
    (home / "ledger" / "away").rename(home / "ledger" / "ledger.sqlite")
    worker.start()
