"""Law 1 over a whole federation: nothing leaves a node but a release.

Hospitals with planted secrets take part in runs, and meet failures of every kind. Every byte that
crosses is kept, in both directions, and searched for every secret in several writings. This is the
second net: a search sees only what it looks for, and a count under another guise is not among
it. That two cohorts that differ by a patient cannot be told apart is tested in ``test_twins.py``.

The bytes are tapped between Flower's Grid and a node's ClientApp: in this process, and at the
socket of real node processes, which run what is shipped (``client.app:app``) on a folder that
``CLOISTER_NODE_HOME`` names. On Ray there is nothing to tap: Flower's simulation hands messages
over in the memory of its own process and in Ray's object store. The ClientApp that answers there
is made of the same `register` and `Gate`, and no hospital runs it.

Flower puts into a reply's metadata who answers which message of what type (`METADATA`), and two
times: ``created_at``, the time of day at which the reply was made, and ``ttl``, what is left
until the request expires, which says the same once more. Both are taken after the gate has held
the reply to its slot. No field holds a duration or a count.
"""

from __future__ import annotations

import base64
import itertools
import os
import re
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto.message_pb2 import Message as MessageProto
from flwr.proto.message_pb2 import Metadata as MetadataProto

from client.app import register
from client.gate import Gate, Site
from client.home import KEY_FILE, POLICY_FILE, NodeHome, cohort_digest, compute_of, counter_of
from client.intake.builder import CohortBuilder, ImageRecord
from client.ledger import Signed
from client.policy import Policy
from client.training import LocalTrainer
from common import models
from common.cohort import IMAGES_FILE, INDEX_FILE, Cohort, CohortMeta
from common.errors import LedgerError, MessageError, Refusal, RefusalCode, RunError
from common.messages import (
    CLOSE,
    COUNT,
    INVITE,
    TRAIN,
    Closed,
    Closing,
    Counts,
    EvaluationTask,
    Invitation,
    NodeCard,
    RefusalReply,
    Release,
    Request,
    TrainTask,
    read_reply,
)
from common.spec import RunSpec
from common.tasks import counts
from deploy.local_engine import ClientAppAt, LocalGrid
from server.evaluation import CentralEvaluator
from server.rounds import Conduct, FederatedRun

Spec = Callable[..., RunSpec]
Carry = Callable[[int, bytes], bytes]
Secret = str | bytes | float

DECLARED = 200
TRAINING, IMAGES, HELD_OUT = 137, 151, 19
COUNTS = {TRAINING, IMAGES, HELD_OUT, TRAINING + HELD_OUT, IMAGES + HELD_OUT}
FIELDS = {
    "card": {"protocol", "digest", "site", "version", "declared_size", "paced", "witness"},
    "refusal": {"protocol", "code", "incident"},
    "release": {
        "protocol",
        "digest",
        "round",
        "private",
        "sampling_rate",
        "noise_multiplier",
        "steps",
        "unit",
    },
    "counts": {"protocol", "digest", "noise_multiplier", "unit"},
    "closed": {"protocol", "digest", "witness"},
}
METADATA = {
    "run_id": "of Flower: the same for all of a run",
    "message_id": "empty until the link gives one",
    "src_node_id": "of Flower: who answers",
    "dst_node_id": "of Flower: the coordinator",
    "reply_to_message_id": "what is answered",
    "group_id": "as in the request: empty",
    "ttl": "what is left until the request expires, once it is answered",
    "message_type": "as in the request",
    "created_at": "when the reply was made, after its slot",
    "src_task_id": "of Flower: of its process",
    "dst_task_id": "of Flower: of its process",
}
KINDS = {Invitation: INVITE, TrainTask: TRAIN, EvaluationTask: COUNT, Closing: CLOSE}
PERSON = Signed("Prof. Quirin Abendroth", "Ethikvotum Zeisig-4711 liegt vor")
TEXT = "Befund Annalena Wiesengrund: /srv/pacs/Oberlechner/0017.dcm"
NODE_TOML = """
site = "{site}"
declared_size = {declared}
cohort = "{cohort}"
approval = "automatic"
[budget]
epsilon = 17.31807
delta = 1e-4
order = 8.0
[limits]
operators = ["Consortium-A", "Consortium-Nachtigall"]
models = ["small-cnn", "tiny-net-Goldammer"]
greatest_parameters = 7654321
least_noise_multiplier = 0.31807
federated_evaluation = true
hours = ["00:00-12:07", "12:07-00:00"]
[data]
unit = "patient"
kind = "binary"
classes = ["normal", "finding"]
shape = [1, 16, 16]
preprocessing = "{preprocessing}"
[release]
pace = {pace}
least_slot = 0.01
"""


# --- What a hospital knows and may not say ------------------------------------------------------


@dataclass(frozen=True)
class Hospital:
    """A node's folder with something to hide in every part of it."""

    home: NodeHome
    spec: RunSpec

    @property
    def cohort(self) -> Cohort:
        return Cohort.open(self.home.cohort_path)

    @property
    def secrets(self) -> dict[str, list[Secret]]:
        """What it knows by now, by kind."""
        pages = self.home.diary.read(self.spec.digest)
        key = self.home.path / KEY_FILE
        return {
            "patients": list(self.cohort.patients),
            "studies": ["1.2.840.99.17", "1.2.840.99.18", "1.2.840.99.19"],
            "paths": [str(self.home.path.parent), self.home.path.name, self.home.policy.cohort],
            "files": [KEY_FILE, POLICY_FILE, IMAGES_FILE, INDEX_FILE, "ledger.sqlite", ".sealed"],
            "limits": [17.31807, 0.31807, 7654321.0, "7654321", "12:07", "Goldammer", "Nachtigall"],
            "people": [PERSON.by, PERSON.reason, "Abendroth"],
            "other runs": ["Projekt-Feldlerche", "Vorlauf-Rotkehlchen"],
            "keys": [key.read_text().strip(), bytes.fromhex(key.read_text())],
            "errors": [TEXT, "Wiesengrund", "Traceback", "No such file", "MemoryError"],
            "losses": [page.mean_loss for page in pages if page.mean_loss is not None],
            "durations": [page.seconds for page in pages],
        }


def writings(secret: Secret) -> Iterator[bytes]:
    """A secret as it might be written into a message."""
    if isinstance(secret, float):
        yield from (f"{secret:.4f}".encode(), repr(secret).encode())
        yield from (struct.pack(form, secret) for form in ("<d", ">d", "<f", ">f"))
        return
    plain = secret.encode() if isinstance(secret, str) else secret
    yield from (plain, plain.hex().encode(), plain.hex().upper().encode())
    yield from (in_base64(plain, shift) for shift in range(3))
    if isinstance(secret, str):
        yield from (secret.encode("utf-16-le"), secret.encode("utf-16-be"))


def in_base64(plain: bytes, shift: int) -> bytes:
    """The characters that stand for `plain` alone where `shift` bytes come before it."""
    whole = base64.b64encode(bytes(shift) + plain)
    return whole[-(-8 * shift // 6) : 8 * (shift + len(plain)) // 6]


def parsed(content: bytes) -> Message:
    return message_from_proto(MessageProto.FromString(content))


def packed(message: Message) -> bytes:
    content: bytes = message_to_proto(message).SerializeToString()
    return content


@dataclass
class Capture:
    """Every byte that crossed: what nodes were asked, and what they replied."""

    requests: list[bytes] = field(default_factory=list)
    replies: list[bytes] = field(default_factory=list)

    @property
    def contents(self) -> list[RecordDict]:
        return [parsed(content).content for content in self.replies]

    @property
    def answers(self) -> list[Any]:
        return [read_reply(records) for records in self.contents]

    @property
    def codes(self) -> set[RefusalCode]:
        return {a.code for a in self.answers if isinstance(a, RefusalReply)}

    def told(self, secrets: Mapping[str, list[Secret]]) -> set[str]:
        """The kinds of secret of which one crossed in some writing, either way."""
        every = b"\0".join([*self.requests, *self.replies])
        return {
            kind
            for kind, known in secrets.items()
            if any(writing in every for secret in known for writing in writings(secret))
        }

    def counted(self) -> list[str]:
        """Where a reply holds a number of patients or images: a scalar, a text, a size."""
        found = []
        for content in self.replies:
            message = parsed(content)
            if message.has_content():
                found += [
                    name for name, value in values_in(message.content) if COUNTS & numbers_in(value)
                ]
        return found

    def odd(self, spec: RunSpec) -> list[str]:
        """What is in a reply without being on the closed list for such a run."""
        found = []
        for content in self.replies:
            message = parsed(content)
            found += (
                off_the_list(message.content, spec)
                if message.has_content()
                else [str(message.error)]
            )
            found += [message.metadata.group_id] if message.metadata.group_id else []
        return found


def values_in(records: RecordDict) -> Iterator[tuple[str, Any]]:
    """Every value of every record, with its name."""
    for name, record in records.items():
        for key, value in record.items():
            yield f"{name}.{key}", key
            if isinstance(value, Array):
                yield f"{name}.{key}", [*value.shape]
                yield f"{name}.{key}", value.numpy().ravel().tolist()
            else:
                yield f"{name}.{key}", value


def numbers_in(value: Any) -> set[float]:
    if isinstance(value, list):
        return {len(value), *(number for each in value for number in numbers_in(each))}
    if isinstance(value, str):
        return {float(digits) for digits in re.findall(r"(?<!\w)\d{1,9}(?!\w)", value)}
    return {float(value)} if isinstance(value, int | float) else set()


def off_the_list(records: RecordDict, spec: RunSpec) -> list[str]:
    shapes = {"update": models.shapes(spec), "table": {"counts": counts.shape(spec)}}
    odd = []
    for name, record in records.items():
        if isinstance(record, ArrayRecord):
            seen = {key: tuple(array.shape) for key, array in record.items()}
            odd += [] if seen == shapes.get(name) else [name]
        else:
            odd += [f"{name}.{key}" for key in record if key not in FIELDS.get(name, ())]
    try:
        read_reply(records)
    except MessageError as error:
        odd.append(str(error))
    return odd


# --- Hospitals, and what carries the messages to them -------------------------------------------


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Two threads wait longer for each other than so small a network takes to train."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def spec(make_spec: Spec) -> RunSpec:
    return make_spec(
        operator="Consortium-A",
        evaluation={"bootstrap": 0, "federated": {"noise_multiplier": 2.0}},
        federation={"deadline_seconds": 600.0},
        local={"batch_size": 16},
        privacy={"noise_multiplier": 2.0},
    ).identified("leaves-1")


def records_of(number: int) -> Iterator[ImageRecord]:
    """More images than patients, and some patients held out."""
    owners = [*range(TRAINING), *range(IMAGES - TRAINING), *range(TRAINING, TRAINING + HELD_OUT)]
    for row, owner in enumerate(owners):
        yield ImageRecord(
            patient=f"Wiesengrund^Annalena^{number}-{owner:04}",
            study=f"1.2.840.99.17.{row}",
            series=f"1.2.840.99.18.{row}",
            instance=f"1.2.840.99.19.{row}",
            label=owner % 2,
            height=20,
            width=20,
            split="train" if owner < TRAINING else "test",
        )


@pytest.fixture
def make_hospital(tmp_path: Path, spec: RunSpec, make_spec: Spec) -> Callable[..., Hospital]:
    """A hospital's folder, set up by a person."""
    numbers = itertools.count(1)

    def make(*, pace: float = 0.0) -> Hospital:
        number = next(numbers)
        folder = tmp_path / f"Herzzentrum-{number}"
        cohort = f"Station-Oberlechner-{number}"
        rng = np.random.default_rng(number)
        with CohortBuilder(folder / cohort, spec.input.shape) as builder:
            for record in records_of(number):
                pixels = rng.integers(0, 65536, spec.input.shape, dtype=np.uint16)
                builder.add(record, pixels)
            builder.finish(CohortMeta.of(spec, unit="patient", source="t", created="2026-01-01"))
        (folder / POLICY_FILE).write_text(
            NODE_TOML.format(
                site=f"site-{number}",
                declared=DECLARED,
                cohort=cohort,
                preprocessing=spec.input.preprocessing_digest,
                pace=pace,
            )
        )
        home = NodeHome.open(folder)
        ledger = home.create(by=PERSON.by)
        ledger.admit(cohort_digest(home.cohort_path), PERSON)
        ledger.earmark("f" * 64, (), name="Vorlauf-Rotkehlchen")
        ledger.disconnect()
        home.requests.put(make_spec(name="Projekt-Feldlerche", operator="Consortium-Nachtigall"))
        return Hospital(home, spec)

    return make


class Wire:
    """Stands where a node's ClientApp would: every message passes here as bytes, and is kept."""

    def __init__(self, carry: Carry) -> None:
        self._carry = carry
        self.capture = Capture()

    def __call__(self, message: Message, context: object) -> Message:
        request = packed(message)
        self.capture.requests.append(request)
        reply = self._carry(message.metadata.dst_node_id, request)
        self.capture.replies.append(reply)
        return parsed(reply)


class Inside:
    """Nodes in this process: from the second on as they are shipped, the first as it is told.

    Attributes:
        parts: what `Gate` is made with at the first node, beside what its folder gives.
        opening: raised when the first node's gate is opened, if not None.
        leak: what becomes of each reply of the first node.
    """

    def __init__(self, hospitals: list[Hospital]) -> None:
        self._hospitals = hospitals
        self._gates = [hospital.home.gate() for hospital in hospitals]
        self.opening: Exception | None = None
        self.leak: Callable[[Message, Message], Message] = lambda _, reply: reply

    def rebuild(self, policy: Policy | None = None, **parts: Any) -> None:
        """Make the first node's gate anew with these parts."""
        home, cohort = self._hospitals[0].home, self._hospitals[0].cohort
        policy, compute = policy or home.policy, compute_of(home.policy)

        def trainer_for(spec: RunSpec, mechanism: Any) -> LocalTrainer:
            return LocalTrainer(
                spec,
                cohort.with_split("train"),
                declared_size=policy.declared_size,
                mechanism=mechanism,
                compute=compute,
            )

        usual = {"trainer_for": trainer_for, "counter": counter_of(lambda: cohort, compute)}
        site = Site(
            policy, home.ledger(), cohort_digest(home.cohort_path), home.requests, home.diary
        )
        self._gates[0] = Gate(site, **(usual | parts))

    def __call__(self, node_id: int, request: bytes) -> bytes:
        app, message = ClientApp(), parsed(request)
        register(app, lambda _: self._gate(node_id))
        reply = app(message, Context(1, node_id, {}, RecordDict(), {}))
        return packed(self.leak(message, reply) if node_id == 1 else reply)

    def _gate(self, node_id: int) -> Gate:
        if node_id == 1 and self.opening is not None:
            raise self.opening
        return self._gates[node_id - 1]


NODE = """
import sys
from multiprocessing.connection import Connection
from deploy.local_engine import ClientAppAt, serve
serve(Connection(int(sys.argv[1])), ClientAppAt("client.app", "app", {}), threads=1)
"""
TIMING = struct.calcsize("<dd")  # of the engine, beside the message: for its own benchmarks


@contextmanager
def node_process(home: Path) -> Iterator[Connection]:
    """A node as it is shipped, in a process of its own."""
    paths = os.pathsep.join(filter(None, sys.path))
    environment = os.environ | {"CLOISTER_NODE_HOME": str(home), "PYTHONPATH": paths}
    ours, theirs = Pipe()
    with (home.parent / f"{home.name}.log").open("wb") as output, theirs:
        command, kept = [sys.executable, "-c", NODE, str(theirs.fileno())], [theirs.fileno()]
        process = subprocess.Popen(command, env=environment, stderr=output, pass_fds=kept)
    with process, ours:  # it ends when nobody is at the other end any more
        yield ours


def through(pipes: list[Connection]) -> Carry:
    def carry(node_id: int, request: bytes) -> bytes:
        pipe = pipes[node_id - 1]
        pipe.send_bytes(request)
        return pipe.recv_bytes()[TIMING:]

    return carry


class Coordinator:
    """Asks the sites of a grid, by a whole run or one message at a time."""

    def __init__(self, grid: LocalGrid, wire: Wire, folder: Path, evaluation: Cohort) -> None:
        self._grid, self._folder, self._evaluation = grid, folder, evaluation
        self.capture = wire.capture

    def run(self, spec: RunSpec) -> None:
        """A whole run, or as much of it as comes about."""
        evaluator = CentralEvaluator(spec, self._evaluation)
        conduct = Conduct(engine="local")
        try:
            FederatedRun(spec, self._folder, evaluator=evaluator, conduct=conduct).run(self._grid)
        except RunError:
            assert self.capture.replies

    def ask(self, request: Request, *expected: type | RefusalCode) -> Any:
        """One message to the first site; its answer, which is to be one of `expected`."""
        return self.send(request.to_records(), KINDS[type(request)], *expected)

    def send(self, records: RecordDict, kind: str, *expected: type | RefusalCode) -> Any:
        message = self._grid.create_message(records, kind, 1, group_id="", ttl=600.0)
        (reply,) = self._grid.pull_messages(self._grid.push_messages([message]))
        answer = read_reply(reply.content)
        said = answer.code if isinstance(answer, RefusalReply) else type(answer)
        assert said in expected
        return answer


@pytest.fixture
def coordinate(
    tmp_path: Path, spec: RunSpec, write_cohort: Any, monkeypatch: pytest.MonkeyPatch
) -> Callable[[Carry, int], Coordinator]:
    """A coordinator whose messages to so many sites go by `carry`."""
    numbers = itertools.count(1)

    def coordinator(carry: Carry, sites: int) -> Coordinator:
        number, wire = next(numbers), Wire(carry)
        name = f"wire_{number}"
        monkeypatch.setitem(sys.modules, name, SimpleNamespace(app=wire))
        grid = LocalGrid(
            [f"site-{n}" for n in range(sites)], ClientAppAt(name, "app", {}), workers=0
        )
        evaluation = write_cohort(spec, range(12), labels=[0, 1] * 6, name=f"evaluation-{number}")
        folder = tmp_path / f"run-{number}"
        folder.mkdir()
        return Coordinator(grid, wire, folder, evaluation)

    return coordinator


def check_sealed(capture: Capture, hospitals: list[Hospital]) -> None:
    """Nothing that a hospital hides crossed, and nothing that is not on the list."""
    for hospital in hospitals:
        assert capture.told(hospital.secrets) == set()
    assert capture.counted() == []
    assert capture.odd(hospitals[0].spec) == []


# --- The law ------------------------------------------------------------------------------------


def test_nothing_leaves_but_cards_and_releases(
    make_hospital: Callable[..., Hospital], coordinate: Any, spec: RunSpec
):
    hospitals = [make_hospital(), make_hospital()]
    coordinator = coordinate(Inside(hospitals), 2)
    coordinator.run(spec)
    kinds = [type(answer) for answer in coordinator.capture.answers]
    assert kinds[:8] == [NodeCard] * 2 + [Release] * 6
    assert set(kinds[8:]) <= {Closed, Counts}
    check_sealed(coordinator.capture, hospitals)
    for hospital in hospitals:  # it was there to be told
        assert len(hospital.secrets["losses"]) == len(hospital.secrets["durations"]) == 3


def test_two_releases_share_no_noise(
    make_hospital: Callable[..., Hospital], coordinate: Any, spec: RunSpec
):
    coordinator = coordinate(Inside([make_hospital(), make_hospital()]), 2)
    coordinator.run(spec)
    releases = [a for a in coordinator.capture.answers if isinstance(a, Release)]
    flat = [np.concatenate([a.ravel() for a in r.update.values()]) for r in releases]
    correlations = np.corrcoef(np.stack(flat))[~np.eye(len(flat), dtype=bool)]
    assert len(flat) == 6
    assert np.abs(correlations).max() < 6 / np.sqrt(len(flat[0]))


def test_metadata_says_who_answers_what_and_when_and_nothing_else(
    make_hospital: Callable[..., Hospital], coordinate: Any, spec: RunSpec
):
    hospital = make_hospital(pace=0.0005)
    coordinator = coordinate(Inside([hospital]), 1)
    coordinator.run(spec)
    assert set(MetadataProto.DESCRIPTOR.fields_by_name) == set(METADATA)
    capture = coordinator.capture
    for asked, replied in zip(capture.requests, capture.replies, strict=True):
        request = MessageProto.FromString(asked).metadata
        reply = MessageProto.FromString(replied).metadata
        seen = {descriptor.name: value for descriptor, value in reply.ListFields()}
        made, left = seen.pop("created_at"), seen.pop("ttl")
        assert made + left == pytest.approx(request.created_at + request.ttl, abs=1e-3)
        if reply.message_type in (TRAIN, COUNT):
            assert made - request.created_at >= hospital.home.policy.release.slot(spec)
        assert seen == {
            "run_id": request.run_id,
            "src_node_id": request.dst_node_id,
            "reply_to_message_id": request.message_id,
            "message_type": request.message_type,
            "dst_task_id": request.src_task_id,
        }


# --- Failures -----------------------------------------------------------------------------------

ERRORS: list[Exception] = [
    ValueError(TEXT),
    OSError(5, TEXT, "/srv/pacs/Oberlechner/0017.dcm"),
    KeyError("Wiesengrund"),
    MemoryError(),
    RuntimeError(TEXT * 1000),
    UnicodeDecodeError("utf-8", TEXT.encode(), 0, 1, TEXT),
]


class Failing:
    """A trainer that fails."""

    def __init__(self, error: Exception) -> None:
        self._error = error

    def train(self, *_: object) -> Any:
        raise self._error


def failing(error: Exception) -> Callable[..., Any]:
    def fail(*_: object, **__: object) -> Any:
        raise error

    return fail


@contextmanager
def broken(path: Path) -> Iterator[None]:
    """Another file, with a patient's name in it, lies where something was."""
    aside = path.with_name(f"{path.name}.aside")
    if path.exists():
        path.rename(aside)
    path.write_text(TEXT)
    path.chmod(0o600)
    yield
    path.unlink()
    if aside.exists():
        aside.rename(path)


@dataclass
class Trial:
    """A hospital whose first gate fails as it is told, and who asks it."""

    hospital: Hospital
    inside: Inside
    coordinator: Coordinator
    weights: Any

    @property
    def ask(self) -> Callable[..., Any]:
        return self.coordinator.ask

    @property
    def home(self) -> NodeHome:
        return self.hospital.home

    def task(self, number: int = 1, spec: RunSpec | None = None) -> TrainTask:
        return TrainTask(spec or self.hospital.spec, number, self.weights)

    @property
    def counting(self) -> EvaluationTask:
        return EvaluationTask(self.hospital.spec, self.weights)

    def check(self) -> None:
        check_sealed(self.coordinator.capture, [self.hospital])


@pytest.fixture
def trial(
    make_hospital: Callable[..., Hospital], coordinate: Any, spec: RunSpec, global_weights: Any
) -> Trial:
    hospital = make_hospital()
    inside = Inside([hospital])
    return Trial(hospital, inside, coordinate(inside, 1), global_weights(spec))


def test_a_failure_leaves_as_a_number_alone(trial: Trial, spec: RunSpec):
    trial.ask(Invitation(spec), NodeCard)
    for error in ERRORS:
        trial.inside.rebuild(trainer_for=failing(error))
        trial.ask(trial.task(), RefusalCode.INCIDENT)
        trial.inside.opening = error
        trial.ask(trial.task(), RefusalCode.INCIDENT)
        trial.inside.opening = None
    trial.inside.rebuild(trainer_for=lambda *_: Failing(ValueError(TEXT)))
    trial.ask(trial.task(), RefusalCode.INCIDENT)
    trial.inside.rebuild(keystream=failing(ValueError(TEXT)))
    trial.ask(trial.task(), RefusalCode.INCIDENT)
    trial.inside.rebuild(counter=failing(ValueError(TEXT)))
    trial.ask(trial.counting, RefusalCode.INCIDENT)
    trial.inside.rebuild()
    with broken(trial.home.path / "ledger" / "releases"):
        trial.ask(trial.task(), RefusalCode.INCIDENT)
    with broken(trial.home.path / "runs"):
        trial.ask(trial.task(), Release)
    trial.ask(trial.counting, Counts)
    trial.check()
    answers = trial.coordinator.capture.answers
    incidents = [a.incident for a in answers if isinstance(a, RefusalReply)]
    assert len(set(incidents)) == len(incidents) == 2 * len(ERRORS) + 4


def test_errors_of_our_own_leave_as_their_code_alone(trial: Trial, spec: RunSpec):
    trial.ask(Invitation(spec), NodeCard)
    for error, code in (
        (Refusal(RefusalCode.WEIGHTS, TEXT), RefusalCode.WEIGHTS),
        (LedgerError(TEXT), RefusalCode.LEDGER),
        (MessageError(TEXT), RefusalCode.MALFORMED),
    ):
        trial.inside.rebuild(trainer_for=failing(error))
        trial.ask(trial.task(), code)
    trial.inside.opening = LedgerError(TEXT)
    trial.ask(trial.task(), RefusalCode.LEDGER)
    trial.check()


def test_every_refusal_is_a_code_alone(trial: Trial, spec: RunSpec, make_spec: Spec):
    ask, policy = trial.ask, trial.home.policy
    mine = {"operator": "Consortium-A"}
    trial.coordinator.send(RecordDict(), INVITE, RefusalCode.MALFORMED)
    other = RecordDict({"invitation": ConfigRecord({"protocol": 1})})
    trial.coordinator.send(other, INVITE, RefusalCode.VERSION)
    for changes, code in (
        ({"local": {"batch_size": DECLARED + 1}}, RefusalCode.SPEC),
        ({"operator": "Consortium-Z"}, RefusalCode.POLICY),
        ({"privacy": {"noise_multiplier": 0.4}, "rounds": 999}, RefusalCode.BUDGET),
    ):
        ask(Invitation(make_spec(**(mine | changes))), code)
    ask(trial.task(), RefusalCode.APPROVAL)
    ask(Invitation(spec), NodeCard)
    ask(TrainTask(spec, 1, {"x": np.zeros(1, dtype=np.float32)}), RefusalCode.WEIGHTS)
    ask(trial.task(), Release)
    half = {name: array / 2 for name, array in trial.weights.items()}
    ask(TrainTask(spec, 1, half), RefusalCode.REPLAY)
    limits = policy.limits.model_copy(update={"greatest_rounds_a_day": 1})
    trial.inside.rebuild(policy.model_copy(update={"limits": limits}))
    ask(trial.task(2), RefusalCode.LATER)
    trial.inside.rebuild(policy.model_copy(update={"approval": "ask"}))
    waiting = make_spec(name="waiting", **mine)
    with broken(trial.home.path / "requests"):
        ask(Invitation(waiting), RefusalCode.INCIDENT)
    ask(Invitation(waiting), RefusalCode.APPROVAL)
    trial.home.ledger().decide(waiting.digest, approved=False, approval="a" * 64, signed=PERSON)
    ask(Invitation(waiting), RefusalCode.DENIED)
    trial.inside.rebuild()
    with broken(trial.home.place.database):
        ask(Invitation(spec), RefusalCode.LEDGER)
    assert trial.coordinator.capture.codes == set(RefusalCode)
    trial.check()


@pytest.mark.slow
def test_nodes_in_processes_of_their_own_say_no_more(
    make_hospital: Callable[..., Hospital], coordinate: Any, spec: RunSpec, global_weights: Any
):
    hospitals = [make_hospital(), make_hospital()]
    home = hospitals[0].home
    with ExitStack() as running:
        pipes = [running.enter_context(node_process(h.home.path)) for h in hospitals]
        coordinator = coordinate(through(pipes), 2)
        codes = (RefusalCode.INCIDENT, RefusalCode.LEDGER)
        for path in (
            home.path / POLICY_FILE,
            home.path / KEY_FILE,
            home.cohort_path / INDEX_FILE,
            home.place.database,
            home.witness,
        ):
            with broken(path):
                coordinator.ask(Invitation(spec), *codes)
        with broken(home.cohort_path / IMAGES_FILE):
            coordinator.ask(Invitation(spec), NodeCard)
            coordinator.ask(TrainTask(spec, 1, global_weights(spec)), RefusalCode.INCIDENT)
        coordinator.run(spec)
        later = spec.identified("leaves-2")
        coordinator.ask(Invitation(later), NodeCard)
        with broken(home.path / "ledger" / "releases"):
            task = TrainTask(later, 1, global_weights(spec))
            coordinator.ask(task, RefusalCode.INCIDENT)
    capture = coordinator.capture
    assert capture.codes == set(codes)
    assert sum(isinstance(answer, Release) for answer in capture.answers) == 6
    check_sealed(capture, hospitals)
    log = home.path.with_suffix(".log").read_text()
    assert home.path.name in log  # it was there to be told


# --- The controls: what would leave is seen -------------------------------------------------------


def first_record(reply: Message) -> Any:
    """The record of the reply's scalars."""
    return next(iter(reply.content.values()))


def as_a_note(reply: Message, secret: bytes) -> Message:
    first_record(reply)["note"] = secret
    return reply


def as_a_text(reply: Message, secret: bytes) -> Message:
    first_record(reply)["note"] = f"seen: {secret.decode('latin-1')}!"
    return reply


def as_a_name(reply: Message, secret: bytes) -> Message:
    reply.content[secret.decode("latin-1")] = ConfigRecord()
    return reply


def in_an_array(reply: Message, secret: bytes) -> Message:
    numbers = np.frombuffer(secret + bytes(-len(secret) % 4), dtype="<f4")
    reply.content["update"] = ArrayRecord({"layer": Array(numbers)})
    return reply


def as_a_group(reply: Message, secret: bytes) -> Message:
    reply.metadata.group_id = secret.decode("latin-1")
    return reply


def as_an_error(reply: Message, secret: bytes) -> Message:
    proto = message_to_proto(reply)
    proto.ClearField("content")
    proto.error.reason = secret.decode("latin-1")
    return message_from_proto(proto)


PLACES = (as_a_note, as_a_text, as_a_name, in_an_array, as_a_group, as_an_error)
SECRETS = (
    "patients",
    "studies",
    "paths",
    "files",
    "limits",
    "people",
    "other runs",
    "keys",
    "errors",
    "losses",
    "durations",
)


def is_text(writing: bytes) -> bool:
    return writing.isascii() and writing.decode().isprintable()


def test_a_secret_is_found_in_every_writing_and_place(trial: Trial, spec: RunSpec):
    trial.ask(Invitation(spec), NodeCard)
    trial.ask(trial.task(), Release)
    secrets = trial.hospital.secrets
    assert set(secrets) == set(SECRETS)
    plain = trial.coordinator.capture.replies[0]
    for kind, known in secrets.items():
        for secret, place in itertools.product(known[:4], PLACES):
            for writing in writings(secret):
                if is_text(writing) or place in (as_a_note, in_an_array):
                    leaky = Capture(replies=[packed(place(parsed(plain), writing))])
                    assert kind in leaky.told({kind: [secret]}), (kind, secret, writing, place)
                    assert leaky.odd(spec), (kind, place)


@pytest.mark.parametrize(("number", "kind"), list(enumerate(SECRETS)))
def test_a_secret_that_leaves_in_a_run_is_seen(trial: Trial, number: int, kind: str):
    spec = trial.hospital.spec
    told: list[bytes] = []

    def leak(asked: Message, reply: Message) -> Message:
        secrets = trial.hospital.secrets[kind]
        if "release" not in reply.content or not secrets:
            return reply
        texts = [writing for writing in writings(secrets[-1]) if is_text(writing)]
        told.append(texts[number % len(texts)])
        return PLACES[number % len(PLACES)](reply, told[-1])

    trial.inside.leak = leak
    trial.coordinator.run(spec)
    assert told
    assert kind in trial.coordinator.capture.told(trial.hospital.secrets)
    assert trial.coordinator.capture.odd(spec)


def say_the_count_in_the_card(reply: Message) -> None:
    if "card" in reply.content:
        first_record(reply)["declared_size"] = TRAINING


def say_the_count_as_steps(reply: Message) -> None:
    if "release" in reply.content:
        first_record(reply)["steps"] = IMAGES


def say_the_count_as_a_metric(reply: Message) -> None:
    reply.content["metrics"] = MetricRecord({"num-examples": TRAINING, "loss": 0.5})


def say_the_count_in_words(reply: Message) -> None:
    first_record(reply)["note"] = f"{HELD_OUT} held out"


def say_the_count_as_a_number_of_arrays(reply: Message) -> None:
    reply.content["update"] = ArrayRecord({"n": Array(np.zeros((1, IMAGES), dtype=np.float32))})


def say_the_count_in_an_array(reply: Message) -> None:
    reply.content["update"] = ArrayRecord({"n": Array(np.full(3, TRAINING, dtype=np.float32))})


@pytest.mark.parametrize(
    ("leak", "where"),
    [
        (say_the_count_in_the_card, "card.declared_size"),
        (say_the_count_as_steps, "release.steps"),
        (say_the_count_as_a_metric, "metrics.num-examples"),
        (say_the_count_in_words, "card.note"),
        (say_the_count_as_a_number_of_arrays, "update.n"),
        (say_the_count_in_an_array, "update.n"),
    ],
)
def test_a_count_that_leaves_is_seen(trial: Trial, leak: Callable[[Message], None], where: str):
    def leaking(_: Message, reply: Message) -> Message:
        leak(reply)
        return reply

    trial.inside.leak = leaking
    trial.coordinator.run(trial.hospital.spec)
    assert where in trial.coordinator.capture.counted()
