"""Two hospitals that differ by one patient cannot be told apart by anything but the noised array.

Twin nodes have one policy, one key, one history in the ledger and one clock, and are asked the
same things: in `SCENES` every kind of answer comes about. What a node says is compared as Flower
serialises it, whole messages, and so is when each one leaves. Masked, at their length, are the
numbers in an update (their privacy is the noise's: ``tests/client/test_sensitivity.py``), the
incident's random number, the two seals of a witness that the node's own ledger bears out (keyed,
over a random number: they say nothing), and two fields of Flower's that hold the time of day of
the reply.

Time is simulated: loading, training and counting take as many seconds each as the cohort has
patients.
"""

from __future__ import annotations

import itertools
import math
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.serde import message_to_proto
from numpy.typing import NDArray

from client.app import register
from client.approval import Asked
from client.gate import Gate
from client.gate import Site as Behind
from client.home import KEY_FILE, NodeHome, cohort_digest, counter_of
from client.keyfile import create_key
from client.ledger import Ledger, Place, Signed
from client.policy import Policy
from client.training import Compute, LocalTrainer
from common.accounting import SubsampledGaussian, shares
from common.clock import Clock
from common.cohort import Cohort
from common.errors import RefusalCode
from common.messages import (
    CLOSE,
    COUNT,
    INVITE,
    TRAIN,
    Arrays,
    Closed,
    Closing,
    Counts,
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
from common.noise import Keystream, KeystreamSource, fresh_keystream
from common.spec import RunSpec
from deploy.local_engine import identify

Spec = Callable[..., RunSpec]
Scene = Callable[["Node"], None]
Leak = Callable[["Node", Reply], Reply]

DECLARED, PATIENTS = 40, 23
COHORTS: dict[str, Sequence[int]] = {
    "one": range(PATIENTS),
    "without the last": range(PATIENTS - 1),
    "without the first": range(1, PATIENTS),
    "empty": (),
}
RNG = np.random.default_rng(1)
LABELS = RNG.integers(0, 2, PATIENTS)
PIXELS = RNG.integers(0, 65536, (PATIENTS, 1, 16, 16), dtype=np.uint16)
DEADLINE, PACE = 100.0, 0.5
SLOT = DEADLINE * PACE  # what every training takes here lies within it
DAY = 24 * 3600.0
NOON = datetime(2026, 1, 5, 12).astimezone()  # on the machine's clock, as `hours` are
SOMEBODY = Signed("A. Person", "a reason")
KINDS = {Invitation: INVITE, TrainTask: TRAIN, EvaluationTask: COUNT, Closing: CLOSE}
ANSWERS = {NodeCard: "card", Release: "release", Counts: "counts", Closed: "closed"}
ON_CPU = Compute(torch.device("cpu"))


class Time:
    """A clock that stands still unless somebody waits."""

    def __init__(self) -> None:
        self.passed = 0.0
        self.clock = Clock(lambda: self.passed, self.wait, self.date)

    def wait(self, seconds: float) -> None:
        self.passed += seconds

    def until(self, passed: float) -> None:
        assert passed >= self.passed
        self.passed = passed

    def date(self) -> datetime:
        return NOON + timedelta(seconds=self.passed)


class Said(NamedTuple):
    """One answer, as somebody beyond the walls sees it.

    Attributes:
        what: ``card``, ``closed``, ``release`` or the code of a refusal.
        waited: virtual seconds from the request to the answer.
        length: of the message in bytes.
        masked: the message, without what may differ.
    """

    what: str
    waited: float
    length: int
    masked: bytes


@dataclass
class Node:
    """One of the twins. `ask` it, and it is in the transcript; the rest is what befalls it.

    Attributes:
        leak: what a node that leaks does to its answers; it knows its own number of patients.
        trouble: where the next attempts fail.
        keystream: where randomness comes from when nothing fails.
    """

    place: Place
    policy: Policy
    cohort: Cohort
    time: Time
    make_spec: Spec
    weights: Callable[[RunSpec], Any]
    leak: Leak = lambda _, reply: reply
    trouble: str = ""
    keystream: KeystreamSource = fresh_keystream
    transcript: list[Said] = field(default_factory=list)
    expected: list[str] = field(default_factory=list)
    noised: list[NDArray[np.float32]] = field(default_factory=list)
    incidents: list[str] = field(default_factory=list)
    witnesses: list[str] = field(default_factory=list)
    witness: str = ""

    @property
    def patients(self) -> int:
        return len(self.cohort.patients)

    # --- What is asked of it ----------------------------------------------------------------------

    def run(self, name: str = "first", **changes: Any) -> RunSpec:
        federation = {"deadline_seconds": DEADLINE}
        return self.make_spec(**({"name": name, "federation": federation} | changes))

    def invite(self, spec: RunSpec, expected: str = "card") -> None:
        self.ask(Invitation(spec), expected)

    def train(self, spec: RunSpec, number: int, expected: str = "release", **other: Any) -> None:
        task = TrainTask(spec, number, self.weights(spec), self.witness)
        self.ask(replace(task, **other), expected)

    def count(self, spec: RunSpec, expected: str = "counts", **other: Any) -> None:
        task = EvaluationTask(spec, self.weights(spec), self.witness)
        self.ask(replace(task, **other), expected)

    def close(self, spec: RunSpec, expected: str = "closed") -> None:
        self.ask(Closing(spec.digest), expected)

    def ask(self, request: Request, expected: str) -> None:
        self.send(request.to_records(), KINDS[type(request)], expected)

    def send(self, records: RecordDict, kind: str, expected: str) -> None:
        """Deliver a message to the node's ClientApp, and note what comes back and when."""
        identify(node_id=1)
        app = ClientApp()
        register(app, lambda _: self._gate)
        asked, began = Message(records, 1, kind, ttl=10 * DEADLINE), self.time.passed
        answer = app(asked, Context(1, 1, {}, RecordDict(), {}))
        self._note(asked, answer, self.time.passed - began)
        self.expected.append(expected)

    def _note(self, asked: Message, answer: Message, waited: float) -> None:
        reply = read_reply(answer.content)
        shown = reply.witness if isinstance(reply, NodeCard | Closed) else ""
        if isinstance(reply, NodeCard):
            self.witness = shown
        if isinstance(reply, Release | Counts):
            self.noised.append(flat(reply))
        if isinstance(reply, RefusalReply) and reply.incident:
            self.incidents.append(reply.incident)
        proto = message_to_proto(answer)
        sealed = shown if shown and shown == self.ledger.witness else None
        content = masked(proto, asked, sealed)
        self.witnesses += [sealed] if sealed else []
        self.transcript.append(Said(name_of(reply), waited, proto.ByteSize(), content))

    # --- What befalls it --------------------------------------------------------------------------

    def start(self) -> None:
        """As its process starts: the ledger is opened and checked, nothing else is known."""
        node = self

        class Leaky(Gate):
            def invite(self, invitation: Invitation) -> Any:
                return node.leak(node, super().invite(invitation))

            def train(self, task: TrainTask) -> Any:
                return node.leak(node, super().train(task))

            def count(self, task: EvaluationTask) -> Any:
                return node.leak(node, super().count(task))

            def close(self, closing: Closing) -> Any:
                return node.leak(node, super().close(closing))

        self.ledger = Ledger(self.place)
        home, cohort = self._home, self._cohort_digest
        behind = Behind(self.policy, self.ledger, cohort, home.requests, home.diary)
        self._gate = Leaky(
            behind,
            trainer_for=self._trainer,
            counter=self._counter,
            keystream=self._attempt,
            clock=self.time.clock,
        )

    def decide(self, spec: RunSpec, *, approved: bool) -> None:
        asked = Asked(spec, self._cohort_digest, shares(spec, DECLARED))
        approval = asked.digest
        self.ledger.decide(spec.digest, approved=approved, approval=approval, signed=SOMEBODY)

    def admit(self, cohort: str = "") -> None:
        self.ledger.admit(cohort or self._cohort_digest, SOMEBODY)

    @contextmanager
    def failing(self, where: str) -> Iterator[None]:
        self.trouble = where
        yield
        self.trouble = ""
        releases = self.place.folder / "releases"
        if releases.is_file():
            releases.unlink()
            releases.mkdir()

    @contextmanager
    def rolled_back(self) -> Iterator[None]:
        """What is done within is forgotten: the machine is put back in time, witness file too."""
        copy = self._home.path.with_suffix(".copy")
        shutil.copytree(self._home.path, copy)
        yield
        shutil.rmtree(self._home.path)
        copy.rename(self._home.path)
        self.start()

    @property
    def _home(self) -> NodeHome:
        return NodeHome(self.place.folder.parent, self.policy)

    @property
    def _cohort_digest(self) -> str:
        return cohort_digest(self.cohort.path)

    def _fail(self, where: str) -> None:
        if self.trouble == where:
            raise MemoryError(f"{self.patients} patients, p{self.patients:05d} was the last")

    def _attempt(self, *, run_id: str, round_number: int) -> Keystream:
        self._fail("keystream")
        if self.trouble == "disk":
            releases = self.place.folder / "releases"
            shutil.rmtree(releases)
            releases.touch()
        return self.keystream(run_id=run_id, round_number=round_number)

    def _trainer(self, spec: RunSpec, mechanism: SubsampledGaussian | None) -> LocalTrainer:
        node = self
        self.time.wait(self.patients)
        self._fail("factory")

        class Slow(LocalTrainer):
            def train(self, weights: Any, round_number: int, keystream: Keystream) -> Any:
                node.time.wait(node.patients)
                node._fail("training")
                result = super().train(weights, round_number, keystream)
                if node.trouble == "surplus":
                    return replace(result, update={**result.update, "n": array_of(node.patients)})
                return result

        return Slow(spec, self.cohort, declared_size=DECLARED, mechanism=mechanism, compute=ON_CPU)

    def _counter(self, spec: RunSpec, weights: Arrays, keystream: Keystream) -> Any:
        self.time.wait(self.patients)
        self._fail("counting")
        return counter_of(lambda: self.cohort, ON_CPU)(spec, weights, keystream)


def name_of(reply: Reply) -> str:
    if isinstance(reply, RefusalReply):
        return reply.code.value
    return ANSWERS[type(reply)]


def flat(reply: Release | Counts) -> NDArray[np.float32]:
    arrays = [reply.table] if isinstance(reply, Counts) else reply.update.values()
    return np.concatenate([array.ravel() for array in arrays])


def masked(proto: Any, asked: Message, sealed: str | None) -> bytes:
    """The bytes of a message without the numbers in its update and what is random or a date.

    `sealed` is the witness in it, where the node's own ledger bears it out.
    """
    metadata = proto.metadata
    expires = asked.metadata.created_at + asked.metadata.ttl
    assert metadata.created_at + metadata.ttl == pytest.approx(expires, abs=1e-3)
    metadata.created_at = metadata.ttl = 1.0
    for item in proto.content.items:
        if item.key in ("update", "table"):
            for named in item.array_record.items:
                size = 4 * math.prod(named.value.shape)
                named.value.data = named.value.data[:-size] + bytes(size)
        for scalar in item.config_record.items:
            if scalar.key == "incident" and scalar.value.string:
                assert re.fullmatch(r"[0-9a-f]+", scalar.value.string)
                scalar.value.string = "0" * len(scalar.value.string)
            if sealed and scalar.key == "witness" and scalar.value.string == sealed:
                number, head, seal = sealed.split(":")
                scalar.value.string = f"{number}:{'0' * len(head)}:{'0' * len(seal)}"
    content: bytes = proto.SerializeToString(deterministic=True)
    return content


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Two threads wait longer for each other than so small a network takes to train."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def make_node(
    tmp_path: Path, make_spec: Spec, make_policy: Any, write_cohort: Any, global_weights: Any
) -> Callable[..., Node]:
    """A node with these owners of images; every one has the same key and a clock of its own."""
    create_key(tmp_path / KEY_FILE)

    def make(owners: Sequence[int], name: str, **changes: Any) -> Node:
        plain = {"release": {"pace": PACE}, "declared_size": DECLARED}
        budget = {"order": 8.0} | changes.pop("budget", {})
        policy = make_policy(**(plain | changes), budget=budget)
        rows = list(owners)
        cohort = write_cohort(
            make_spec(), rows, labels=LABELS[rows], pixels=PIXELS[rows], name=f"{name}/cohort"
        )
        home, time = NodeHome(tmp_path / name, policy), Time()
        shutil.copy(tmp_path / KEY_FILE, home.path)
        place = replace(home.place, clock=time.clock)
        ledger = Ledger.create(place, site=policy.site, by=SOMEBODY.by)
        ledger.set_budget(policy.budget.limit, SOMEBODY)
        node = Node(place, policy, cohort, time, make_spec, global_weights)
        node.start()
        node.admit()
        return node

    return make


# --- Everything that a node can be asked and can meet -------------------------------------------


@dataclass(frozen=True)
class Story:
    """A scene, and what the policy says in it beside `make_policy`."""

    scene: Scene
    policy: dict[str, Any]


SCENES: dict[str, Story] = {}


def scene(**policy: Any) -> Callable[[Scene], Scene]:
    def add(made: Scene) -> Scene:
        SCENES[made.__name__.replace("_", " ")] = Story(made, policy)
        return made

    return add


@scene()
def several_runs_one_after_the_other(node: Node) -> None:
    for name in ("first", "second", "third"):
        spec = node.run(name)
        node.invite(spec)
        for number in (1, 2, 3):
            node.train(spec, number)
            node.train(spec, number)  # once more: from the disk
        node.invite(spec)  # its card's witness knows the releases
        node.close(spec)


@scene()
def a_process_that_is_started_again_in_the_middle(node: Node) -> None:
    spec = node.run()
    node.invite(spec)
    node.train(spec, 1)
    node.start()
    node.train(spec, 1)
    node.train(spec, 2)
    with node.failing("training"):
        node.train(spec, 3, "incident")
    node.start()
    node.train(spec, 3)
    node.invite(spec)


@scene()
def failures_wherever_they_happen(node: Node) -> None:
    spec = node.run()
    node.invite(spec)
    for where in ("factory", "keystream", "training", "surplus", "disk"):
        with node.failing(where):
            node.train(spec, 1, "incident")
            node.train(spec, 1, "incident")
        node.invite(spec)
    node.train(spec, 1)
    with node.failing("training"):
        node.train(spec, 2, "incident")
    node.train(spec, 2)
    node.invite(spec)


@scene()
def a_gate_that_does_not_open(node: Node) -> None:
    del node._gate
    node.invite(node.run(), "incident")


@scene()
def messages_of_no_known_form(node: Node) -> None:
    spec = node.run()
    for records in (
        RecordDict(),
        RecordDict({"invitation": ConfigRecord({"protocol": 2, "patients": 1})}),
        RecordDict({**Closing(spec.digest).to_records(), **Invitation(spec).to_records()}),
    ):
        node.send(records, INVITE, "malformed")
    node.send(RecordDict({"task": ConfigRecord({"protocol": 1})}), TRAIN, "malformed")
    other = RecordDict({"invitation": ConfigRecord({"protocol": 1})})
    node.send(other, INVITE, "version")
    node.invite(spec)
    node.train(spec, 1, "malformed", witness=f"7:{'0' * 64}:{'0' * 64}")


@scene()
def runs_that_make_no_sense_or_are_beyond_the_limits(node: Node) -> None:
    for changes, code in (
        ({"local": {"batch_size": DECLARED + 1}}, "spec"),
        ({"local": {"steps": 1000}}, "policy"),
        ({"privacy": {"mechanism": "none"}}, "policy"),
        ({"rounds": 300}, "budget"),
    ):
        spec = node.run(**changes)
        node.invite(spec, code)
        node.train(spec, 1, "approval" if code == "budget" else code)
    spec = node.run()
    node.invite(spec)
    node.admit("d" * 64)
    node.invite(spec, "policy")
    node.train(spec, 1, "policy")
    node.admit()
    node.train(spec, 1)


@scene(budget={"epsilon": 6.0})
def a_budget_that_ends_in_the_middle(node: Node) -> None:
    spec = node.run(rounds=3)
    node.invite(spec)
    node.train(spec, 1)
    with node.failing("training"):
        node.train(spec, 2, "incident")
    node.train(spec, 2, "budget")
    node.invite(node.run("second"), "budget")


@scene(approval="ask")
def runs_that_a_person_decides_on(node: Node) -> None:
    spec, other = node.run(), node.run("second")
    node.invite(spec, "approval")
    node.train(spec, 1, "approval")
    node.decide(spec, approved=True)
    node.train(spec, 1, "approval")  # it was never set aside
    node.invite(spec)
    node.train(spec, 1)
    node.invite(other, "approval")
    node.decide(other, approved=False)
    node.invite(other, "denied")
    node.train(other, 1, "denied")
    node.train(spec, 2)
    node.invite(spec)


@scene(limits={"greatest_rounds_a_day": 2, "greatest_open_runs": 1, "lapse_days": 30})
def what_has_to_wait_and_what_was_forgotten(node: Node) -> None:
    spec, other = node.run(rounds=4), node.run("second")
    node.invite(spec)
    node.invite(other, "later")
    node.train(spec, 1)
    node.train(spec, 2)
    node.train(spec, 3, "later")
    node.time.wait(DAY)
    node.train(spec, 3)
    node.time.wait(31 * DAY)
    node.invite(other)
    node.train(spec, 4, "approval")  # it lapsed


@scene(limits={"hours": ["11:00-13:00"]})
def hours_in_which_nothing_is_trained(node: Node) -> None:
    spec = node.run()
    node.invite(spec)
    node.time.until(3600.0 - 1)  # at the end of them, what takes long is not cut off
    node.train(spec, 1)
    node.train(spec, 2, "later")
    node.train(spec, 1)  # from the disk at any time


@scene(limits={"greatest_rounds_a_day": 1})
def the_moment_at_which_a_day_is_over(node: Node) -> None:
    spec = node.run()
    node.invite(spec)
    node.train(spec, 1)
    for seconds in (-1.0, 0.0, 1.0):
        node.time.until(DAY + seconds)
        node.train(spec, 2, "release" if seconds > 0 else "later")


@scene(limits={"lapse_days": 1, "greatest_open_runs": 1})
def the_moment_at_which_a_run_lapses(node: Node) -> None:
    spec, other = node.run(), node.run("second")
    node.invite(spec)
    node.train(spec, 1)
    for seconds in (-1.0, 0.0, 1.0):
        node.time.until(DAY + seconds)
        node.invite(other, "card" if seconds > 0 else "later")


@scene(budget={"period": {"days": 7, "epsilon": 3.5}})
def a_budget_that_is_paced(node: Node) -> None:
    spec = node.run()
    node.invite(spec)
    node.train(spec, 1)
    node.train(spec, 2, "later")
    node.time.wait(8 * DAY)
    node.train(spec, 2)


@scene(limits={"federated_evaluation": True})
def counts_of_the_held_out_patients(node: Node) -> None:
    spec = node.run(evaluation={"federated": {"noise_multiplier": 2.0}})
    node.count(spec, "approval")
    node.invite(spec)
    for number in (1, 2, 3):
        node.train(spec, number)
    for where in ("keystream", "counting", "disk"):
        with node.failing(where):
            node.count(spec, "incident")
    node.count(spec)
    node.count(spec)  # from the disk
    node.count(spec, "replay", weights={n: a / 2 for n, a in node.weights(spec).items()})
    node.invite(spec)
    node.close(spec)
    node.count(spec, "replay")
    node.count(node.run("second"), "spec")


@scene()
def weights_that_cannot_be_trained_from(node: Node) -> None:
    spec = node.run()
    node.invite(spec)
    plain = node.weights(spec)
    name = min(plain)
    for odd in (plain[name] * np.float32("nan"), plain[name][:1]):
        node.train(spec, 1, "weights", weights=plain | {name: odd})
    node.train(spec, 1)


@scene()
def rounds_that_are_asked_again_otherwise_or_too_late(node: Node) -> None:
    spec = node.run()
    node.invite(spec)
    node.train(spec, 1)
    node.train(spec, 1, "replay", weights={n: a / 2 for n, a in node.weights(spec).items()})
    node.train(spec, 2)
    for kept in (node.place.folder / "releases").glob("*.sealed"):
        kept.write_bytes(kept.read_bytes()[:-1])
    node.train(spec, 2, "replay")
    node.train(spec, 3)
    node.train(spec, 1, "replay")  # its bytes are gone
    node.close(spec)
    node.train(spec, 3, "replay")
    node.invite(spec, "replay")
    node.close(spec)


@scene()
def a_ledger_that_was_put_back_in_time(node: Node) -> None:
    spec = node.run()
    node.invite(spec)
    with node.rolled_back():
        node.train(spec, 1)
        node.invite(spec)
    node.train(spec, 1, "ledger", witness=node.witness)
    node.invite(spec, "ledger")
    node.close(spec, "ledger")
    node.ledger.carry(1.0, SOMEBODY, after=20)
    node.invite(spec)
    node.train(spec, 1)


@scene()
def a_witness_file_that_cannot_be_written(node: Node) -> None:
    spec = node.run()
    node.invite(spec)
    witness = node.place.witness
    assert witness is not None
    witness.rename(witness.with_suffix(".aside"))
    witness.mkdir()
    node.train(spec, 1, "ledger")
    witness.rmdir()
    witness.with_suffix(".aside").rename(witness)
    node.train(spec, 1)


# --- The twins ----------------------------------------------------------------------------------

Played = dict[str, Node]


@pytest.fixture
def play(make_node: Callable[..., Node]) -> Callable[..., Played]:
    """Play a scene at a node with each of these cohorts, with these parts replaced."""
    numbers = itertools.count()

    def played(story: Story, cohorts: Sequence[str] = tuple(COHORTS), **parts: Any) -> Played:
        nodes, number = {}, next(numbers)
        for name in cohorts:
            nodes[name] = node = make_node(COHORTS[name], f"{number} {name}", **story.policy)
            for part, value in parts.items():
                setattr(node, part, value)
            story.scene(node)
        return nodes

    return played


def apart(nodes: Played) -> list[str]:
    """Which nodes are told apart from the first, and by which of their answers."""
    (_, first), *others = nodes.items()
    return [
        f"{name}, answer {number}: {theirs.what} for {ours.what}"
        for name, node in others
        for number, (ours, theirs) in enumerate(
            itertools.zip_longest(first.transcript, node.transcript), start=1
        )
        if ours != theirs
    ]


@pytest.mark.parametrize("name", SCENES)
def test_twins_cannot_be_told_apart(play: Callable[..., Played], name: str):
    nodes = play(SCENES[name])
    for node in nodes.values():
        assert [answer.what for answer in node.transcript] == node.expected
    assert apart(nodes) == []
    incidents = [number for node in nodes.values() for number in node.incidents]
    assert len(set(incidents)) == len(incidents)
    heads = [{token.split(":")[1] for token in node.witnesses} for node in nodes.values()]
    assert not any(one & other for one, other in itertools.combinations(heads, 2))


def test_the_scenes_know_every_answer(play: Callable[..., Played]):
    played = [play(story, ["empty"])["empty"] for story in SCENES.values()]
    said = {answer.what for node in played for answer in node.transcript}
    assert said == {*RefusalCode, *ANSWERS.values()}


def test_what_was_booked_takes_a_slot_and_all_else_no_time(play: Callable[..., Played]):
    node = play(SCENES["failures wherever they happen"], ["one"])["one"]
    waited = {(answer.what, answer.waited) for answer in node.transcript}
    assert waited == {("card", 0.0), ("incident", SLOT), ("release", SLOT)}


# --- The noised arrays --------------------------------------------------------------------------

LONG = "several runs one after the other"


def correlated(nodes: Played) -> int:
    """Pairs of releases, each asked twice, that are more alike than noise is."""
    flat = [array for node in nodes.values() for array in node.noised[::2]]
    alike = np.abs(np.corrcoef(np.stack(flat))) > 6 / np.sqrt(len(flat[0]))
    return int(alike.sum() - len(flat)) // 2


def test_twins_share_no_noise(play: Callable[..., Played]):
    nodes = play(SCENES[LONG])
    assert all(len(node.noised) == 18 for node in nodes.values())
    assert correlated(nodes) == 0
    for node in nodes.values():
        assert all(map(np.array_equal, node.noised[::2], node.noised[1::2]))


def test_twins_whose_keystream_can_be_drawn_again_share_their_noise(play: Callable[..., Played]):
    def seeded(*, run_id: str, round_number: int) -> Keystream:
        return Keystream.seeded(1, run_id, round_number)

    assert correlated(play(SCENES[LONG], keystream=seeded)) > 0


def test_without_noise_a_patient_moves_what_leaves_by_no_more_than_the_clip_norm(
    play: Callable[..., Played], quiet_keystream: Callable[[], Keystream]
):
    def one_round_of_everybody(node: Node) -> None:
        spec = node.run(local={"batch_size": DECLARED})
        node.invite(spec)
        node.train(spec, 1)

    story = Story(one_round_of_everybody, {"limits": {"greatest_sampling_rate": 1.0}})
    nodes = play(story, keystream=lambda **_: quiet_keystream())
    spec = nodes["one"].run()
    unit = spec.learning_rate(1, 0) * spec.privacy.clip_norm / DECLARED  # type: ignore[union-attr]
    whole = nodes["one"].noised[0].astype(float)
    for other in ("without the last", "without the first"):
        moved = np.linalg.norm(whole - nodes[other].noised[0]) / unit
        assert 0.01 < moved < 1 + 1e-4
    assert np.linalg.norm(whole) / unit > 1 + 1e-4  # all of them move it farther


# --- The controls: one count that leaks is seen ---------------------------------------------------


def in_the_card(change: Callable[[Node, NodeCard], dict[str, Any]]) -> Leak:
    def leak(node: Node, reply: Reply) -> Reply:
        if not isinstance(reply, NodeCard):
            return reply
        return reply.model_copy(update=change(node, reply))

    return leak


def in_the_release(change: Callable[[Node, Release], dict[str, Any]]) -> Leak:
    def leak(node: Node, reply: Reply) -> Reply:
        return replace(reply, **change(node, reply)) if isinstance(reply, Release) else reply

    return leak


def in_the_mechanism(change: Callable[[Node, SubsampledGaussian], dict[str, Any]]) -> Leak:
    def mechanism(node: Node, reply: Release) -> dict[str, Any]:
        assert reply.mechanism is not None
        return {"mechanism": replace(reply.mechanism, **change(node, reply.mechanism))}

    return in_the_release(mechanism)


def in_the_arrays(change: Callable[[Node, Arrays], Arrays]) -> Leak:
    return in_the_release(lambda node, reply: {"update": change(node, reply.update)})


def rotated(node: Node, update: Arrays) -> Arrays:
    names = sorted(update)
    first = node.patients % len(names)
    return {name: update[name] for name in names[first:] + names[:first]}


def reshaped(node: Node, update: Arrays) -> Arrays:
    extra = (1,) * (node.patients % 2)
    return {name: array.reshape(*extra, *array.shape) for name, array in update.items()}


def in_a_refusal(node: Node, reply: Reply) -> Reply:
    if not isinstance(reply, RefusalReply):
        return reply
    return RefusalReply(code=RefusalCode.LATER if node.patients % 2 else RefusalCode.WEIGHTS)


def in_an_incident(node: Node, reply: Reply) -> Reply:
    if not (isinstance(reply, RefusalReply) and reply.incident):
        return reply
    return RefusalReply(code=reply.code, incident="0" * node.patients)


def in_the_time(node: Node, reply: Reply) -> Reply:
    node.time.wait(node.patients / 1000)
    return reply


def in_the_ledger(node: Node, reply: Reply) -> Reply:
    if isinstance(reply, Release):
        for _ in range(node.patients):
            node.ledger.carry(0.0, SOMEBODY)
    return reply


def further(witness: str, entries: int) -> str:
    number, _, rest = witness.partition(":")
    return f"{int(number) + entries}:{rest}"


def array_of(size: int) -> NDArray[np.float32]:
    return np.zeros(size, dtype=np.float32)


LEAKS: dict[str, Leak] = {
    "the declared size": in_the_card(lambda node, _: {"declared_size": 1 + node.patients}),
    "the version's length": in_the_card(lambda node, _: {"version": "1" * node.patients}),
    "whether it is paced": in_the_card(lambda node, _: {"paced": node.patients == PATIENTS}),
    "the witness's number": in_the_card(
        lambda node, card: {"witness": further(card.witness, node.patients)}
    ),
    "the witness's head": in_the_card(
        lambda node, _: {"witness": f"7:{node.patients:064x}:{'0' * 64}"}
    ),
    "what the ledger counts": in_the_ledger,
    "the steps": in_the_mechanism(lambda node, made: {"steps": made.steps + node.patients}),
    "the sampling rate": in_the_mechanism(
        lambda node, _: {"sampling_rate": 4 / (node.patients or DECLARED)}
    ),
    "the noise multiplier": in_the_mechanism(
        lambda node, _: {"noise_multiplier": 1.0 + node.patients * 1e-12}
    ),
    "an extra array's name": in_the_arrays(
        lambda node, update: {**update, f"n{node.patients:02}": array_of(1)}
    ),
    "an extra array's length": in_the_arrays(
        lambda node, update: {**update, "n": array_of(1 + node.patients)}
    ),
    "the arrays' shape": in_the_arrays(reshaped),
    "the arrays' order": in_the_arrays(rotated),
    "the code of a refusal": in_a_refusal,
    "the length of an incident's number": in_an_incident,
    "the time of leaving": in_the_time,
}


@pytest.mark.parametrize("where", LEAKS)
def test_a_count_that_leaks_is_seen(play: Callable[..., Played], where: str):
    story = SCENES["failures wherever they happen"]
    for other in ("without the last", "empty"):
        assert apart(play(story, ["one", other], leak=LEAKS[where])) != []


@pytest.mark.parametrize("pace", [0.0, 0.3], ids=["no pace", "a slot shorter than training"])
def test_how_long_training_takes_is_seen_where_nothing_hides_it(
    play: Callable[..., Played], pace: float
):
    scene = SCENES["failures wherever they happen"].scene
    nodes = play(Story(scene, {"release": {"pace": pace}}), ["one", "empty"])
    assert {message.split(": ")[1] for message in apart(nodes)} >= {"release for release"}
