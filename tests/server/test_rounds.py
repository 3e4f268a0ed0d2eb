"""The round loop, against sites that do as they are told, on a clock that is set by hand."""

from __future__ import annotations

import json
import shutil
import tracemalloc
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, RecordDict
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity
from matplotlib.figure import Figure
from numpy.typing import NDArray
from safetensors.numpy import load_file

from common import accounting
from common.accounting import SubsampledGaussian
from common.clock import Clock
from common.cohort import Cohort
from common.errors import RefusalCode, RunError
from common.messages import (
    Closed,
    Closing,
    Counts,
    EvaluationTask,
    Invitation,
    NodeCard,
    RefusalReply,
    Release,
    TrainTask,
    read_request,
)
from common.spec import Behind, RunSpec
from common.tasks import counts
from server.evaluation import CentralEvaluator
from server.members import Anybody, Members
from server.rounds import Conduct, FederatedRun

Arrays = dict[str, NDArray[np.float32]]
Request = Invitation | TrainTask | EvaluationTask | Closing

INVITED, CLOSED, COUNTED = 0, -1, -2
"""What stands for a round in a site's script, and in what was asked, where there is none."""

# --- Doubles ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Say:
    """What comes of a message that a site was sent.

    Attributes:
        records: the reply's content; None for an error of Flower's own.
        after: seconds until it is there; infinity: never.
        sent: what `push_messages` says of the message, where it is no identity.
    """

    records: RecordDict | None = None
    after: float = 0.0
    sent: str | None = "an identity"


NEVER = Say(after=float("inf"))
ERROR = Say(records=None)


def number_of(request: Request) -> int:
    if isinstance(request, TrainTask):
        return request.round_number
    kinds = {Invitation: INVITED, Closing: CLOSED, EvaluationTask: COUNTED}
    return kinds[type(request)]


def witness(entry: int, head: str = "a") -> str:
    """What a node's ledger shows at `entry`, if it is the one with this head."""
    return f"{entry}:{head * 64}:{head * 64}"


@dataclass
class Site:
    """A site that is honest unless its script has something else for a round.

    Attributes:
        witness: what its card shows.
        closing: what it shows when the run is over; as the card, if empty.
        given: the witness of each of its tasks.
    """

    name: str
    declared_size: int = 40
    script: dict[int, Callable[[Site, Any], Say]] = field(default_factory=dict)
    update: Callable[[TrainTask], Mapping[str, Any]] | None = None
    paced: bool = True
    synthetic: Behind | None = None
    witness: str = witness(1)
    closing: str = ""
    given: list[str] = field(default_factory=list)

    def hear(self, request: Request) -> Say:
        if isinstance(request, TrainTask | EvaluationTask):
            self.given.append(request.witness)
        told = self.script.get(number_of(request), Site.honest)
        return told(self, request)

    def honest(self, request: Any) -> Say:
        if isinstance(request, Invitation):
            return Say(self.card(request.spec).to_records())
        if isinstance(request, Closing):
            return Say(
                Closed(digest=request.digest, witness=self.closing or self.witness).to_records()
            )
        if isinstance(request, EvaluationTask):
            return Say(self.counts(request.spec).to_records())
        return Say(self.release(request).to_records())

    def card(self, spec: RunSpec) -> NodeCard:
        return NodeCard(
            digest=spec.digest,
            site=self.name,
            version="0",
            declared_size=self.declared_size,
            paced=self.paced,
            synthetic=self.synthetic,
            witness=self.witness,
        )

    def counts(self, spec: RunSpec) -> Counts:
        mechanism = accounting.evaluation_of(spec)
        assert mechanism is not None
        return Counts(spec.digest, mechanism, np.ones(counts.shape(spec), dtype=np.float32))

    def release(self, task: TrainTask) -> Release:
        whole = accounting.planned(task.spec, self.declared_size)
        mechanism = whole and whole.of_steps(task.spec.local.steps)
        update = (self.update or small_step)(task)
        return Release(task.spec.digest, task.round_number, mechanism, update)


def small_step(task: TrainTask) -> Arrays:
    return {name: np.full_like(a, 0.01 * task.round_number) for name, a in task.weights.items()}


class ScriptedGrid(Grid):
    """A Flower Grid whose nodes are `sites`, numbered from 1; messages cross as protobuf.

    Attributes:
        asked: (site's name, round) of every message that was pushed.
        at: when each of them was.
    """

    def __init__(self, sites: Sequence[Site], now: Callable[[], float]) -> None:
        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 0, 0
        self._sites = dict(enumerate(sites, start=1))
        self._now = now
        self._due: dict[str, tuple[float, Message, Say]] = {}
        self.asked: list[tuple[str, int]] = []
        self.at: list[float] = []
        self.connected: Callable[[], Iterable[int]] = lambda: list(self._sites)

    @property
    def run(self) -> Run:
        return Run.create_empty(1)

    def set_run(self, run: Run) -> None: ...

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        return self.connected()

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        return [self._push(message) for message in messages]

    def pull_messages(self, message_ids: Iterable[str]) -> Iterator[Message]:
        for identity in message_ids:
            due, request, said = self._due.get(identity, (float("inf"), None, None))
            if request is not None and said is not None and due <= self._now():
                del self._due[identity]
                yield self._reply(request, said)

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        raise NotImplementedError

    def _push(self, message: Message) -> str:
        site = self._sites[message.metadata.dst_node_id]
        request = read_request(message.content)
        self.asked.append((site.name, number_of(request)))
        self.at.append(self._now())
        said = site.hear(request)
        if not said.sent:
            return said.sent  # type: ignore[return-value]  # Flower says None as well
        identity = f"message-{len(self.asked)}"
        message.metadata.__dict__["_message_id"] = identity
        self._due[identity] = self._now() + said.after, message, said
        return identity

    def _reply(self, request: Message, said: Say) -> Message:
        if said.records is None:
            return Message(Error(code=3, reason="it crashed"), reply_to=request)
        reply = Message(said.records, reply_to=request)
        return message_from_proto(message_to_proto(reply))


class HandClock:
    """Time that passes only when somebody sleeps."""

    def __init__(self) -> None:
        self.time = 1000.0

    def now(self) -> float:
        return self.time

    def sleep(self, seconds: float) -> None:
        self.time += seconds


class Watching:
    """Writes down what an observer is told; may have enough of a run after a round."""

    def __init__(self, stop_after: int | None = None) -> None:
        self.told: list[Any] = []
        self._stop_after = stop_after

    def run_opened(self, spec: RunSpec, sites: list[str], finished_rounds: int) -> None:
        self.told.append(("opened", sites, finished_rounds))

    def sites_wait(self, waiting: Mapping[str, str]) -> None:
        self.told.append(("wait", dict(waiting)))

    def round_opened(self, number: int) -> None:
        self.told.append(("round", number))

    def site_answered(self, number: int, site: str, status: str) -> None:
        self.told.append((number, site, status))

    def round_closed(self, row: Mapping[str, Any]) -> None:
        self.told.append(("closed", row["round"]))
        if row["round"] == self._stop_after:
            raise KeyboardInterrupt


# --- A run ------------------------------------------------------------------------------------


@dataclass
class Conducted:
    """A run on scripted sites, and what it left."""

    spec: RunSpec
    folder: Path
    evaluator: CentralEvaluator
    clock: HandClock = field(default_factory=HandClock)
    witnesses: Path | None = None
    members: Members = field(default_factory=Anybody)

    def grid(self, sites: Sequence[Site]) -> ScriptedGrid:
        return ScriptedGrid(sites, self.clock.now)

    def run(self, *sites: Site, observer: Any = None) -> ScriptedGrid:
        grid = self.grid(sites)
        self.run_on(grid, observer)
        return grid

    def run_on(self, grid: Grid, observer: Any = None) -> bool:
        clock = Clock(self.clock.now, self.clock.sleep)
        conduct = Conduct(
            observer=observer or Watching(),
            clock=clock,
            witnesses=self.witnesses,
            members=self.members,
        )
        made = FederatedRun(self.spec, self.folder, evaluator=self.evaluator, conduct=conduct)
        return made.run(grid)

    @property
    def rows(self) -> list[dict[str, Any]]:
        lines = (self.folder / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]

    @property
    def weights(self) -> Arrays:
        return load_file(self.folder / "model.safetensors")

    def file(self, name: str) -> Any:
        return json.loads((self.folder / name).read_text())

    def statuses(self, number: int) -> dict[str, str]:
        return {name: site["status"] for name, site in self.rows[number - 1]["sites"].items()}


def not_drawn(_: Figure, file: TextIO, **__: Any) -> None:
    file.write("<svg/>")


@pytest.fixture
def conducted(
    make_spec: Any,
    tmp_path: Path,
    write_cohort: Any,
    linear_network: str,
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[..., Conducted]:
    """`conducted(rounds=5, …)`: a run of one linear layer, evaluated on bright and dark images.

    An image of the positive class is bright: with positive weights the AUROC is 1, with negative
    ones 0. Its report is written, but its pictures are left blank: `test_report` has them drawn.
    """
    monkeypatch.setattr(Figure, "savefig", not_drawn)
    evaluation: list[Cohort] = []

    def make(name: str = "run", **changes: Any) -> Conducted:
        plain: dict[str, Any] = {
            "model": {"name": linear_network},
            "federation": {"quorum": 2, "deadline_seconds": 60},
            "evaluation": {"bootstrap": 0, "validation_fraction": 0.0},
        }
        for key, value in changes.items():
            merged = {**plain.get(key, {}), **value} if isinstance(value, dict) else value
            plain[key] = merged
        spec = make_spec(**plain)
        if not evaluation:
            labels = [number % 2 for number in range(12)]
            pixels = np.array([[[[20_000 + 30_000 * one]]] for one in labels], dtype=np.uint16)
            shaped = np.broadcast_to(pixels, (12, *spec.input.shape))
            cohort = write_cohort(spec, range(12), labels=labels, pixels=shaped, name="evaluation")
            evaluation.append(cohort)
        return Conducted(spec, tmp_path / name, CentralEvaluator(spec, evaluation[0]))

    return make


def sites(*names: str, **options: Any) -> list[Site]:
    return [Site(name, **options) for name in names]


def towards(*values: float) -> Callable[[TrainTask], Arrays]:
    """In round n the update that makes every weight the n-th of `values`."""

    def update(task: TrainTask) -> Arrays:
        target = values[task.round_number - 1]
        return {name: np.float32(target) - array for name, array in task.weights.items()}

    return update


def close(one: Mapping[str, Any], other: Mapping[str, Any], tolerance: float = 1e-6) -> None:
    assert one.keys() == other.keys()
    for name, array in one.items():
        np.testing.assert_allclose(array, other[name], rtol=0, atol=tolerance)


# --- All is well ------------------------------------------------------------------------------


def test_a_run_goes_from_invitation_to_result(conducted: Any, global_weights: Any):
    run = conducted(rounds=3)
    watching = Watching()
    grid = run.run(*sites("north", "south"), observer=watching)
    messages = (INVITED, 1, 2, 3, CLOSED)
    assert grid.asked == [(name, number) for number in messages for name in ("north", "south")]
    assert [run.statuses(number) for number in (1, 2, 3)] == [{"north": "ok", "south": "ok"}] * 3
    start = global_weights(run.spec)
    close(run.weights, {name: array + np.float32(0.06) for name, array in start.items()})
    assert watching.told[0] == ("opened", ["north", "south"], 0)
    assert watching.told[1:5] == [
        ("round", 1),
        (1, "north", "ok"),
        (1, "south", "ok"),
        ("closed", 1),
    ]
    for name in ("spec.json", "report.html", "model_card.md", "evaluation.npz", "privacy.json"):
        assert (run.folder / name).stat().st_size > 0


def test_updates_count_by_declared_size_or_all_alike(conducted: Any, global_weights: Any):
    for weighting, expected in (("declared", 0.7), ("uniform", 0.5)):
        aggregation = {"strategy": "fedavg", "weighting": weighting}
        run = conducted(weighting, rounds=1, aggregation=aggregation)
        small, large = Site("a", 30), Site("b", 70)
        small.update, large.update = towards(0.0), towards(1.0)
        run.run(small, large)
        close(run.weights, {n: np.full_like(a, expected) for n, a in run.weights.items()})


def test_what_each_site_spent_is_counted_by_the_rounds_that_it_did_not_refuse(conducted: Any):
    run = conducted(rounds=3, federation={"quorum": 1})
    refusing = Site("b", script={2: lambda *_: Say(RefusalReply(code="budget").to_records())})  # type: ignore[arg-type]
    late = Site("c", 80, script={2: lambda *_: NEVER})
    run.run(Site("a"), refusing, late)
    privacy = run.file("privacy.json")
    spent = {name: site["steps"] for name, site in privacy["sites"].items()}
    assert spent == {"a": 3, "b": 2, "c": 3}
    mechanism = SubsampledGaussian(4 / 80, 1.0, 3, "patient")
    assert privacy["sites"]["c"]["epsilon"] == accounting.epsilon([mechanism], 1e-4)
    assert privacy["protected"]


def test_whether_replies_were_paced_is_recorded_for_each_site_over_the_whole_run(conducted: Any):
    run = conducted(rounds=3)
    paced, unpaced, changing = Site("a"), Site("b", paced=False), Site("c")
    for number, now in enumerate([True, False, True], start=1):
        changing.paced = now
        with pytest.raises(KeyboardInterrupt):
            run.run(paced, unpaced, changing, observer=Watching(stop_after=number))
    run.run(paced, unpaced, changing)
    recorded = {name: site["paced"] for name, site in run.file("privacy.json")["sites"].items()}
    assert recorded == {"a": True, "b": False, "c": False}  # one answer in its time tells
    page = (run.folder / "report.html").read_text()
    assert "Replies of a were paced" in page
    assert "Replies of b and c were not paced" in page


# --- Synthetic images that the sites mix in -------------------------------------------------------

MIXING = {"synthetic": 2, "synthetic_without_privacy": True}


def test_one_site_without_privacy_behind_its_synthetic_images_ends_the_claim_of_the_run(
    conducted: Any,
):
    run = conducted(augmentation=MIXING)
    changing = Site("c", synthetic="unprotected")
    with pytest.raises(KeyboardInterrupt):
        run.run(
            *(Site("a", synthetic="protected"), Site("b", synthetic="protected"), changing),
            observer=Watching(stop_after=1),
        )
    changing.synthetic = "protected"  # what it sent before stays in the model
    run.run(Site("a", synthetic="protected"), Site("b", synthetic="protected"), changing)
    privacy = run.file("privacy.json")
    assert privacy["protected"] is False
    assert {name: site["synthetic"] for name, site in privacy["sites"].items()} == {
        "a": "protected",
        "b": "protected",
        "c": "unprotected",
    }
    card = run.file("model_card.json")["privacy"]
    assert card["protected"] is False
    assert "Synthetic images that c mixed in are not known" in card["warning"]
    assert "Those of c are not known to be of a generator" in " ".join(card["claim"])
    for page in ("report.html", "model_card.md"):
        assert "Synthetic images that c mixed in are not known" in (run.folder / page).read_text()


def test_protected_ones_leave_the_claim_and_the_card_says_what_it_leaves_out(conducted: Any):
    run = conducted(augmentation={"synthetic": 2})
    run.run(*(Site(name, synthetic="protected") for name in "abc"))
    card = run.file("model_card.json")["privacy"]
    assert (card["protected"], card["warning"]) == (True, None)
    assert "A patient of both bears the sum" in " ".join(card["claim"])
    plain = conducted("plain")
    plain.run(Site("a"), Site("b"), Site("c"))
    assert "ynthetic" not in (plain.folder / "model_card.md").read_text()
    assert "synthetic" not in plain.file("privacy.json")["sites"]["a"]


@pytest.mark.parametrize(
    ("augmentation", "said", "why"),
    [
        ({"synthetic": 2}, "unprotected", "takes no synthetic images whose patients"),
        ({"synthetic": 2}, None, "both sides need the same version"),  # a node from before it
        (MIXING, None, "both sides need the same version"),
        ({}, "protected", "both sides need the same version"),
    ],
)
def test_who_does_not_say_who_is_behind_its_synthetic_images_takes_no_part(
    conducted: Any, augmentation: dict[str, Any], said: Any, why: str
):
    run = conducted(augmentation=augmentation, federation={"quorum": 2})
    right: Behind | None = "protected" if augmentation else None
    run.run(Site("a", synthetic=right), Site("b", synthetic=right), Site("c", synthetic=said))
    assert set(run.file("privacy.json")["sites"]) == {"a", "b"}
    assert run.file("privacy.json")["protected"] is True
    assert why in " ".join(run.file("environment.json")["declined"].values())


# --- One site of three does wrong ---------------------------------------------------------------


def releasing(change: Callable[[Release], Any]) -> Callable[[Site, TrainTask], Say]:
    """The honest release, changed."""

    def say(site: Site, task: TrainTask) -> Say:
        return Say(change(site.release(task)).to_records())

    return say


def with_update(change: Callable[[Arrays], Any]) -> Callable[[Site, TrainTask], Say]:
    def changed(release: Release) -> Release:
        copied = {name: array.copy() for name, array in release.update.items()}
        return replace(release, update=change(copied) or copied)

    return releasing(changed)


def put(value: float) -> Callable[[Arrays], None]:
    def change(update: Arrays) -> None:
        update["1.weight"][0, -1] = value

    return change


def with_mechanism(change: Callable[[Any], Any]) -> Callable[[Site, TrainTask], Say]:
    return releasing(lambda release: replace(release, mechanism=change(release.mechanism)))


def with_bytes(content: bytes) -> Callable[[Site, TrainTask], Say]:
    """A release whose one array has these bytes."""

    def say(site: Site, task: TrainTask) -> Say:
        records = site.release(task).to_records()
        array = Array(dtype="float32", shape=(1, 256), stype="numpy.ndarray", data=content)
        records["update"] = ArrayRecord({"1.weight": array})
        return Say(records)

    return say


FAULTS: dict[str, tuple[Any, str, str]] = {
    "silent": (lambda *_: NEVER, "late", "no answer before the deadline"),
    "a day late": (lambda s, t: replace(s.honest(t), after=86_400.0), "late", "deadline"),
    "an error": (lambda *_: ERROR, "failed", "an error"),
    "not sent": (lambda *_: Say(sent=""), "failed", "not at all"),
    "not sent, in other words": (lambda *_: Say(sent=None), "failed", "not at all"),
    "refused": (
        lambda *_: Say(RefusalReply(code=RefusalCode.BUDGET).to_records()),
        "refused",
        "budget",
    ),
    "an incident": (
        lambda *_: Say(RefusalReply(code=RefusalCode.INCIDENT, incident="0a" * 8).to_records()),
        "refused",
        "incident 0a0a0a0a0a0a0a0a",
    ),
    "not a number": (with_update(put(np.nan)), "rejected", "1.weight: not finite"),
    "infinite": (with_update(put(np.inf)), "rejected", "1.weight: not finite"),
    "too large": (with_update(put(1e6)), "rejected", "above aggregation.max_update_norm = 100"),
    "another shape": (
        with_update(lambda u: {n: a[:, :-1] for n, a in u.items()}),
        "rejected",
        "1.weight: shape (1, 255), expected (1, 256)",
    ),
    "flat": (
        with_update(lambda u: {n: a.ravel() for n, a in u.items()}),
        "rejected",
        "expected (1, 256)",
    ),
    "an array too many": (
        with_update(lambda u: u | {"extra": np.ones(1, dtype=np.float32)}),
        "rejected",
        "'extra'",
    ),
    "another array": (
        with_update(lambda u: {"other": u["1.weight"]}),
        "rejected",
        "'1.weight', 'other'",
    ),
    "double precision": (
        with_update(lambda u: {n: a.astype(float) for n, a in u.items()}),
        "rejected",
        "expected float32",
    ),
    "less noise": (with_mechanism(lambda m: replace(m, noise_multiplier=0.5)), "rejected", "0.5"),
    "another rate": (with_mechanism(lambda m: replace(m, sampling_rate=0.2)), "rejected", "0.2"),
    "more steps": (with_mechanism(lambda m: m.of_steps(9)), "rejected", "steps=9"),
    "another unit": (with_mechanism(lambda m: replace(m, unit="image")), "rejected", "image"),
    "no mechanism": (with_mechanism(lambda _: None), "rejected", "mechanism None"),
    "another round": (
        releasing(lambda release: replace(release, round_number=1)),
        "rejected",
        "a release of round 1, expected 2",
    ),
    "another run": (
        releasing(lambda release: replace(release, digest="0" * 64)),
        "rejected",
        "not a release of this run",
    ),
    "a card": (lambda s, t: Say(s.card(t.spec).to_records()), "rejected", "not a release"),
    "nothing": (lambda *_: Say(RecordDict()), "rejected", "records []"),
    "a loss": (
        lambda s, t: Say(
            RecordDict({**s.release(t).to_records(), "metrics": ConfigRecord({"loss": 0.1})})
        ),
        "rejected",
        "metrics",
    ),
    "bytes that are nothing": (with_bytes(b"nothing"), "rejected", "1.weight"),
    "an archive": (with_bytes(b"PK\x05\x06" + bytes(18)), "rejected", "1.weight"),
    "a header that no parser ends": (
        with_bytes(b"\x93NUMPY\x01\x00\x08\x00{(((((\n"),
        "rejected",
        "1.weight",
    ),
}


def limited(conducted: Any, name: str, *others: Site) -> Conducted:
    """Three rounds of two honest sites and `others`, up to the last round's end."""
    run: Conducted = conducted(
        name, rounds=3, aggregation={"strategy": "fedavg", "max_update_norm": 100.0}
    )
    honest = sites("one", "two", update=towards(0.1, 0.3, 0.5))
    with pytest.raises(KeyboardInterrupt):
        run.run(*honest, *others, observer=Watching(stop_after=3))
    return run


@pytest.mark.parametrize(("fault", "status", "reason"), FAULTS.values(), ids=FAULTS)
def test_a_fault_is_recorded_by_name_and_the_round_goes_on_without_it(
    conducted: Any, fault: Any, status: str, reason: str
):
    bad = towards(5.0, 5.0, 0.5)
    run = limited(conducted, "run", Site("bad", 900, {2: fault}, bad))
    assert run.statuses(1) == {"bad": "ok", "one": "ok", "two": "ok"}
    assert run.statuses(2) == {"bad": status, "one": "ok", "two": "ok"}
    assert reason in run.rows[1]["sites"]["bad"]["reason"]
    assert run.statuses(3) == run.statuses(1)  # asked again, and taken again
    without = limited(conducted, "without", Site("bad", 900, {2: lambda *_: NEVER}, bad))
    assert run.rows[1]["update_norm"] == without.rows[1]["update_norm"]


def test_without_the_fault_the_same_release_counts(conducted: Any):  # the control
    bad = towards(5.0, 5.0, 0.5)
    run, without = limited(conducted, "run", Site("bad", 900, {}, bad)), limited(conducted, "less")
    assert run.statuses(2)["bad"] == "ok"
    assert run.rows[1]["update_norm"] != without.rows[1]["update_norm"]


@pytest.mark.parametrize("sent", ["", None])
def test_several_messages_that_could_not_be_sent_are_all_failures(conducted: Any, sent: Any):
    run = conducted(rounds=1)
    unsent = sites("c", "d", "e", script={1: lambda *_: Say(sent=sent)})
    run.run(*sites("a", "b"), *unsent)
    failed = dict.fromkeys("cde", "failed")
    assert run.statuses(1) == {"a": "ok", "b": "ok"} | failed
    assert run.clock.time < 1001  # nobody waited for them


def test_a_payload_that_flower_finds_too_large_stops_the_run_with_a_reason(conducted: Any):
    class TooLarge(ScriptedGrid):
        def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
            return []

    run = conducted()
    with pytest.raises(RunError, match="0 of 2 nodes take part"):
        run.run_on(TooLarge(sites("a", "b"), run.clock.now))


def test_a_reply_that_nobody_asked_for_is_ignored(conducted: Any):
    class Echoing(ScriptedGrid):
        """Gives every reply twice."""

        def pull_messages(self, message_ids: Iterable[str]) -> Iterator[Message]:
            for reply in super().pull_messages(message_ids):
                yield reply
                yield reply

    run, plain = conducted(rounds=2), conducted("plain", rounds=2)
    run.run_on(Echoing(sites("a", "b"), run.clock.now))
    plain.run(*sites("a", "b"))
    close(run.weights, plain.weights, tolerance=0)


# --- Waiting ----------------------------------------------------------------------------------


def test_a_round_waits_for_everybody_and_no_longer(conducted: Any):
    run = conducted(rounds=1)
    slow = Site("slow", script={1: lambda s, t: replace(s.honest(t), after=20.0)})
    run.run(*sites("a", "b"), slow)
    assert run.statuses(1)["slow"] == "ok"
    assert 1020 <= run.clock.time < 1021
    assert 20 <= run.rows[0]["seconds"] < 21


def test_a_round_with_its_quorum_closes_at_the_deadline(conducted: Any):
    run = conducted(rounds=1)
    run.run(*sites("a", "b"), Site("never", script={1: lambda *_: NEVER}))
    assert run.statuses(1) == {"a": "ok", "b": "ok", "never": "late"}
    assert 1060 <= run.clock.time < 1061


def test_what_comes_after_the_deadline_belongs_to_no_later_round(conducted: Any):
    run = conducted(rounds=2)
    late = Site("late", script={1: lambda s, t: replace(s.honest(t), after=61.0)})
    grid = run.run(*sites("a", "b"), late)
    assert [run.statuses(number)["late"] for number in (1, 2)] == ["late", "ok"]
    assert grid.asked.count(("late", 2)) == 1


def test_a_run_waits_for_its_nodes_to_connect(conducted: Any):
    run = conducted(rounds=1)
    grid = run.grid(sites("a", "b", "c"))
    grid.connected = lambda: [1, 2, 3] if run.clock.time > 1030 else [2]
    run.run_on(grid)
    assert set(run.statuses(1)) == {"a", "b", "c"}


def test_a_run_does_not_wait_for_nodes_for_ever(conducted: Any):
    run = conducted(rounds=1)
    grid = run.grid(sites("a"))
    grid.connected = list
    with pytest.raises(RunError, match="0 of 0 nodes take part, the quorum is 2; none is connect"):
        run.run_on(grid)
    assert run.clock.time < 1061


# --- Who takes part -----------------------------------------------------------------------------

DECLINING: dict[str, tuple[Site, str]] = {
    "refuses": (
        Site("c", script={0: lambda *_: Say(RefusalReply(code=RefusalCode.POLICY).to_records())}),
        "it refused: policy",
    ),
    "is silent": (Site("c", script={0: lambda *_: NEVER}), "no answer to the invitation"),
    "fails": (Site("c", script={0: lambda *_: ERROR}), "no answer to the invitation"),
    "cannot be reached": (Site("c", script={0: lambda *_: Say(sent="")}), "no answer"),
    "has another's name": (Site("a"), "a second node calls itself 'a'"),
    "means another run": (
        Site(
            "c",
            script={
                0: lambda s, i: Say(
                    s.card(i.spec).model_copy(update={"digest": "0" * 64}).to_records()
                )
            },
        ),
        "no card for this run",
    ),
    "is too small": (Site("c", declared_size=3), "local.batch_size = 4"),
    "babbles": (Site("c", script={0: lambda *_: Say(RecordDict())}), "records []"),
}


def test_nodes_that_do_not_take_part_are_in_the_record(conducted: Any):
    run = conducted(rounds=1)
    odd = [replace(site, name=f"{site.name}{n}") for n, (site, _) in enumerate(DECLINING.values())]
    odd[list(DECLINING).index("has another's name")].name = "a"
    grid = run.run(*sites("a", "b"), *odd)
    assert run.statuses(1) == {"a": "ok", "b": "ok"}
    assert [name for name, number in grid.asked if number > 0] == ["a", "b"]
    declined = run.file("environment.json")["declined"]
    assert {int(node) for node in declined} == set(range(3, 3 + len(odd)))
    for node, (_, reason) in enumerate(DECLINING.values(), start=3):
        assert reason in declined[str(node)]


@pytest.mark.parametrize(("odd", "reason"), DECLINING.values(), ids=DECLINING)
def test_a_run_that_too_few_join_says_why(conducted: Any, odd: Site, reason: str):
    run = conducted(federation={"quorum": 3})
    with pytest.raises(RunError, match="2 of 3 nodes take part, the quorum is 3") as caught:
        run.run(*sites("a", "b"), odd)
    assert reason in str(caught.value)


# --- Who has yet to say yes or no ----------------------------------------------------------------


def no(code: RefusalCode) -> Callable[..., Say]:
    return lambda *_: Say(RefusalReply(code=code).to_records())


def in_turn(*answers: Callable[[Site, Any], Say]) -> dict[int, Callable[[Site, Any], Say]]:
    """A script that answers each invitation by the next of these, and then by the last."""
    left = list(answers)

    def say(site: Site, request: Any) -> Say:
        return (left.pop(0) if len(left) > 1 else left[0])(site, request)

    return {INVITED: say}


def moments(grid: ScriptedGrid, name: str, number: int) -> list[float]:
    """When a site got this message, in seconds after the first."""
    asked = zip(grid.asked, grid.at, strict=True)
    return [at - grid.at[0] for sent, at in asked if sent == (name, number)]


@pytest.mark.parametrize("code", [RefusalCode.APPROVAL, RefusalCode.LATER])
def test_a_site_that_waits_for_a_person_is_asked_again_until_it_says_yes(
    conducted: Any, code: RefusalCode
):
    run, watching = conducted(rounds=1, federation={"deadline_seconds": 1000}), Watching()
    slow = Site("slow", script=in_turn(no(code), no(code), Site.honest))
    grid = run.run(*sites("a", "b"), slow, observer=watching)
    assert moments(grid, "slow", INVITED) == pytest.approx([0, 15, 30], abs=1)
    assert moments(grid, "a", INVITED) == [0]  # who has said yes is not asked again
    assert min(moments(grid, "a", 1)) >= 30  # and waits
    assert run.statuses(1) == dict.fromkeys(["a", "b", "slow"], "ok")
    assert watching.told[:3] == [
        ("wait", {"node 3": code.value}),
        ("wait", {}),
        ("opened", ["a", "b", "slow"], 0),
    ]
    assert run.file("environment.json")["declined"] == {}


@pytest.mark.parametrize(
    ("code", "way_out"),
    [
        (RefusalCode.APPROVAL, "`cloister node approve {digest}`, then resume the run"),
        (RefusalCode.LATER, "said `later` until the deadline"),
    ],
)
def test_a_site_that_never_says_yes_is_declined_at_the_deadline_and_the_others_go_on(
    conducted: Any, code: RefusalCode, way_out: str
):
    run = conducted(rounds=1)
    grid = run.run(*sites("a", "b"), Site("never", script=in_turn(no(code))))
    asked = moments(grid, "never", INVITED)
    assert np.diff(asked) == pytest.approx([6] * 9, abs=0.3)  # a tenth of the deadline
    assert moments(grid, "a", 1) == pytest.approx([60], abs=1)
    assert run.statuses(1) == {"a": "ok", "b": "ok"}
    declined = run.file("environment.json")["declined"]
    assert list(declined) == ["3"]
    assert way_out.format(digest=run.spec.digest[:12]) in declined["3"]


def test_a_run_whose_quorum_waits_for_a_person_says_so_and_can_be_resumed(conducted: Any):
    run = conducted(rounds=1)
    waiting = Site("b", script=in_turn(no(RefusalCode.APPROVAL)))
    with pytest.raises(RunError, match=r"1 of 2 nodes .*cloister node approve .*resume the run"):
        run.run(Site("a"), waiting)
    assert 1060 <= run.clock.time < 1061
    run.run(*sites("a", "b"))
    assert run.statuses(1) == {"a": "ok", "b": "ok"}


@pytest.mark.parametrize("answer", ["denied", "policy", "budget", "ledger", "incident"])
def test_a_no_is_final_and_nobody_waits_for_it(conducted: Any, answer: str):
    run = conducted(rounds=1)
    refusing = Site("c", script=in_turn(no(RefusalCode(answer))))
    grid = run.run(*sites("a", "b"), refusing)
    assert moments(grid, "c", INVITED) == [0]
    assert run.clock.time < 1001
    assert run.file("environment.json")["declined"] == {"3": f"it refused: {answer}"}


def test_a_no_after_a_while_is_final_as_well(conducted: Any):
    run = conducted(rounds=1)
    script = in_turn(no(RefusalCode.APPROVAL), no(RefusalCode.DENIED))
    grid = run.run(*sites("a", "b"), Site("c", script=script))
    assert moments(grid, "c", INVITED) == pytest.approx([0, 6], abs=1)
    assert run.file("environment.json")["declined"] == {"3": "it refused: denied"}


AWAY = {"an error": ERROR, "not sent": Say(sent=""), "silent": NEVER}


@pytest.mark.parametrize("away", AWAY.values(), ids=AWAY)
def test_a_site_that_is_away_while_it_waits_is_asked_again(conducted: Any, away: Say):
    """A node is restarted after its officer has approved: what it was asked before is lost."""
    run = conducted(rounds=1, federation={"deadline_seconds": 1000})
    script = in_turn(no(RefusalCode.APPROVAL), lambda *_: away, Site.honest)
    grid = run.run(*sites("a", "b"), Site("c", script=script))
    lost = 60 if away is NEVER else 0
    assert moments(grid, "c", INVITED) == pytest.approx([0, 15, 30 + lost], abs=1)
    assert run.statuses(1) == dict.fromkeys("abc", "ok")


def test_a_silent_site_does_not_keep_a_waiting_one_from_being_asked_again(conducted: Any):
    run = conducted(rounds=1)
    silent = Site("silent", script={INVITED: lambda *_: NEVER})
    script = in_turn(no(RefusalCode.APPROVAL), Site.honest)
    grid = run.run(*sites("a", "b"), silent, Site("c", script=script))
    assert moments(grid, "c", INVITED) == pytest.approx([0, 6], abs=1)
    assert run.statuses(1) == dict.fromkeys("abc", "ok")
    assert "no answer to the invitation" in run.file("environment.json")["declined"]["3"]


@pytest.mark.parametrize("first", [lambda *_: NEVER, no(RefusalCode.APPROVAL)])
def test_a_member_that_could_not_say_yes_in_time_joins_later(
    conducted: Any, first: Callable[[Site, Any], Say]
):
    """Silent at the invitation, or approved after its deadline: it is asked again."""

    class Expected(Anybody):
        def names(self) -> frozenset[str]:
            return frozenset({"node 1", "node 2", "node 3"})

    def slow(site: Site, request: Any) -> Say:
        return replace(site.honest(request), after=50.0)

    run = conducted(rounds=9)
    run.members = Expected()
    begun = run.clock.now()

    def at_last(site: Site, request: Any) -> Say:
        return (first if run.clock.now() < begun + 100 else Site.honest)(site, request)

    script = dict.fromkeys(range(1, 10), slow)
    run.run(*sites("a", "b", script=script), Site("c", script={INVITED: at_last}))
    assert "c" not in run.statuses(1)
    assert run.statuses(9) == dict.fromkeys("abc", "ok")
    assert "3" not in run.file("environment.json")["declined"]


def test_in_a_round_later_is_a_refusal_with_its_reason(conducted: Any):
    run = conducted(rounds=2)
    grid = run.run(*sites("a", "b"), Site("c", script={1: no(RefusalCode.LATER)}))
    assert run.rows[0]["sites"]["c"] == {"status": "refused", "reason": "later"}
    assert run.statuses(2)["c"] == "ok"
    assert grid.asked.count(("c", 1)) == 1


# --- Ledgers that were put back -------------------------------------------------------------------


def kept(run: Conducted) -> dict[str, str]:
    sites: dict[str, str] = run.file("witnesses.json")["sites"]
    return sites


def test_a_task_carries_the_last_witness_that_was_kept_of_its_site(conducted: Any):
    first, second = witness(7), witness(30, "b")
    run = conducted(rounds=2)
    one, other = Site("a", witness=first), Site("b", witness=witness(2))
    with pytest.raises(KeyboardInterrupt):
        run.run(one, other, observer=Watching(stop_after=1))
    assert one.given == [""]  # nothing was known of it
    assert kept(run) == {"a": first, "b": witness(2)}
    one.witness = second
    run.run(one, other)
    assert one.given == ["", first]
    assert other.given == ["", witness(2)]
    assert kept(run) == {"a": second, "b": witness(2)}


def test_from_the_second_round_on_a_task_carries_the_witness_of_this_runs_card(conducted: Any):
    run = conducted(rounds=3)
    site = Site("a", witness=witness(7))
    run.run(site, Site("b"))
    assert site.given == ["", witness(7), witness(7)]


PUT_BACK = {
    "behind": witness(6),
    "at the beginning": witness(0),
    "at the same entry with another head": witness(7, "b"),
    "at the same entry with another seal": f"7:{'a' * 64}:{'b' * 64}",
}


@pytest.mark.parametrize("shown", PUT_BACK.values(), ids=PUT_BACK)
def test_a_site_whose_ledger_went_back_is_declined_by_name(conducted: Any, shown: str):
    run = conducted("first", rounds=1)
    run.run(Site("a"), Site("b"), Site("c", witness=witness(7)))
    later = conducted("later", rounds=1)
    later.witnesses = run.folder / "witnesses.json"
    grid = later.run(Site("a"), Site("b"), Site("c", witness=shown))
    reason = later.file("environment.json")["declined"]["3"]
    for part in ("site 'c'", "was seen at entry 7 before", "node audit", "node recover"):
        assert part in reason
    assert witness(7) in reason  # which the site needs in order to go on
    assert str(later.witnesses) in reason
    assert ("c", 1) not in grid.asked
    assert kept(run)["c"] == witness(7)  # it stays


@pytest.mark.parametrize("shown", [witness(7), witness(8, "b")], ids=["the same", "farther"])
def test_a_site_whose_ledger_did_not_go_back_takes_part(conducted: Any, shown: str):
    run = conducted("first", rounds=1)
    run.run(Site("a"), Site("c", witness=witness(7)))
    later = conducted("later", rounds=1)
    later.witnesses = run.folder / "witnesses.json"
    site = Site("c", witness=shown)
    later.run(Site("a"), site)
    assert site.given == [witness(7)]
    assert kept(run)["c"] == shown


def test_a_witness_is_kept_until_its_site_has_answered_for_it(conducted: Any):
    """A ledger that was put back and grew past it: its node has to face what it forgot."""
    run = conducted(rounds=1)
    run.run(*sites("a", "b"), Site("c", witness=witness(7)))
    for number, fault in enumerate([no(RefusalCode.LEDGER), lambda *_: NEVER, lambda *_: ERROR]):
        later = conducted(f"later-{number}", rounds=1)
        later.witnesses = run.folder / "witnesses.json"
        grown = Site("c", witness=witness(9 + number, "b"), script={1: fault})
        later.run(*sites("a", "b"), grown)
        assert grown.given == [witness(7)]
        assert kept(run)["c"] == witness(7)
    later.run(*sites("a", "b"))


def test_a_resumed_run_still_gives_a_site_the_witness_that_it_has_not_answered_for(conducted: Any):
    run, later = conducted("first", rounds=1), conducted("later", rounds=1)
    run.run(Site("a"), Site("b", witness=witness(7)))
    later.witnesses = run.folder / "witnesses.json"
    grown = Site("b", witness=witness(9, "b"), script={1: lambda *_: ERROR})
    with pytest.raises(RunError):
        later.run(Site("a"), grown)
    grown.witness, grown.script = witness(10, "b"), {1: no(RefusalCode.LEDGER)}
    with pytest.raises(RunError):
        later.run(Site("a"), grown)
    assert grown.given == [witness(7), witness(7)]


def test_a_forged_witness_stops_nothing(conducted: Any):
    run = conducted(rounds=2)
    forger = Site("c", witness=f"{10**12 - 1}:{'f' * 64}:{'0' * 64}")
    run.run(*sites("a", "b"), forger)
    assert run.statuses(2) == dict.fromkeys("abc", "ok")


def test_a_node_that_calls_itself_by_anothers_name_does_not_move_its_witness(conducted: Any):
    run = conducted(rounds=1)
    run.run(Site("a", witness=witness(7)), Site("b"), Site("a", witness=witness(999, "f")))
    assert kept(run)["a"] == witness(7)


@pytest.mark.parametrize("shown", ["", "7", "7:x:y", f"-1:{'a' * 64}:{'a' * 64}", "9" * 400])
def test_a_malformed_witness_declines_its_site_and_stops_nothing(conducted: Any, shown: str):
    def say(site: Site, invitation: Any) -> Say:
        records: Any = site.card(invitation.spec).to_records()
        records["card"]["witness"] = shown
        return Say(records)

    run = conducted(rounds=1)
    run.run(*sites("a", "b"), Site("c", script={INVITED: say}))
    assert "card.witness = " in run.file("environment.json")["declined"]["3"]
    assert set(kept(run)) == {"a", "b"}


def test_a_site_that_does_not_know_its_witness_is_refused_with_the_way_out(conducted: Any):
    run = conducted(rounds=3)
    refusing = {number: no(RefusalCode.MALFORMED) for number in (1, 2)}
    site = Site("c", witness=witness(7), script={2: refusing[2]})
    run.run(*sites("a", "b"), site, Site("d", script={1: refusing[1]}))
    reason = run.rows[1]["sites"]["c"]["reason"]
    assert f"take the site out of {run.folder / 'witnesses.json'}" in reason
    assert run.rows[0]["sites"]["d"]["reason"] == "malformed"  # it was given none


def test_witnesses_that_cannot_be_read_stop_a_run_before_anybody_is_asked(conducted: Any):
    run = conducted(rounds=1)
    run.folder.mkdir()
    (run.folder / "witnesses.json").write_text('{"sites": {"a": "7:x"}}')
    grid = run.grid(sites("a", "b"))
    with pytest.raises(RunError, match=r"witnesses\.json: .*cannot be read .*from a copy"):
        run.run_on(grid)
    assert grid.asked == []


def test_two_runs_at_once_share_the_witnesses_and_take_none_back(conducted: Any):
    """While one waits for a site, the other is answered by the same site, and goes farther."""
    book = conducted("folder").folder.with_name("witnesses.json")
    first, second = conducted("first", rounds=1), conducted("second", rounds=1)
    first.witnesses = second.witnesses = book

    def meanwhile(site: Site, invitation: Any) -> Say:
        said = site.honest(invitation)
        second.run(Site("a", witness=witness(12)), Site("b"))
        return said

    site = Site("a", witness=witness(10), script={INVITED: meanwhile})
    first.run(site, Site("b"))
    assert first.statuses(1) == {"a": "ok", "b": "ok"}
    assert site.given == [witness(12)]
    assert json.loads(book.read_text())["sites"]["a"] == witness(12)


# --- The end is said ------------------------------------------------------------------------------


def test_the_sites_are_told_once_and_after_the_result_is_on_disk_that_the_run_is_over(
    conducted: Any,
):
    run = conducted(rounds=2)
    there: list[bool] = []

    def hear(site: Site, closing: Any) -> Say:
        there.append((run.folder / "report.html").exists())
        assert closing.digest == run.spec.digest
        return site.honest(closing)

    declining = Site("c", script={INVITED: no(RefusalCode.POLICY)})
    grid = run.run(*sites("a", "b", script={CLOSED: hear}), declining)
    assert there == [True, True]
    assert [number for name, number in grid.asked if name == "a"] == [INVITED, 1, 2, CLOSED]
    assert run.clock.time < 1001


def test_how_far_a_ledger_went_at_the_end_is_kept_where_its_site_has_answered(conducted: Any):
    run = conducted(rounds=1, federation={"quorum": 1})
    there = Site("a", closing=witness(9))
    mute = Site("b", closing=witness(9), script={1: lambda *_: ERROR})
    run.run(there, mute)
    assert run.file("witnesses.json")["sites"] == {"a": witness(9)}


UNCLOSED: dict[str, Any] = {
    "silent": lambda *_: NEVER,
    "an error": lambda *_: ERROR,
    "not sent": lambda *_: Say(sent=""),
    "its ledger is halted": no(RefusalCode.LEDGER),
    "another run's": lambda *_: Say(Closed(digest="0" * 64, witness=witness(900)).to_records()),
    "babble": lambda *_: Say(RecordDict()),
}


@pytest.mark.parametrize("answer", UNCLOSED.values(), ids=UNCLOSED)
def test_a_site_that_does_not_confirm_the_end_is_logged_and_no_error(
    conducted: Any, answer: Any, caplog: pytest.LogCaptureFixture
):
    run = conducted(rounds=1)
    run.run(Site("a"), Site("b", script={CLOSED: answer}))
    told = [r.getMessage() for r in caplog.records if "that the run is over" in r.getMessage()]
    assert told == ["node 2 has not confirmed that the run is over"]


@pytest.mark.parametrize(("deadline", "waited"), [(3, 3), (60, 10)])
def test_a_silent_site_is_waited_for_a_few_seconds_at_the_end(
    conducted: Any, deadline: int, waited: int
):
    run = conducted(rounds=1, federation={"deadline_seconds": deadline})
    run.run(Site("a"), Site("b", script={CLOSED: lambda *_: NEVER}))
    assert 1000 + waited <= run.clock.time < 1000.3 + waited


def test_a_site_that_has_gone_is_told_in_vain(conducted: Any):
    run = conducted(rounds=1)
    grid = run.grid([Site("a"), Site("b", script={CLOSED: lambda *_: Say(sent="")})])
    grid.connected = lambda: [1] if ("b", 1) in grid.asked else [1, 2]
    run.run_on(grid)
    assert ("b", CLOSED) in grid.asked
    assert run.clock.time < 1001


def test_a_run_that_can_be_resumed_is_not_over(conducted: Any):
    run = conducted(rounds=2)
    grid = run.grid([Site("a"), Site("b", script={2: lambda *_: ERROR})])
    with pytest.raises(RunError):
        run.run_on(grid)
    with pytest.raises(RunError):
        conducted("other", federation={"quorum": 3}).run_on(grid)
    with pytest.raises(KeyboardInterrupt):
        run.run_on(grid := run.grid(sites("a", "b")), Watching(stop_after=2))
    assert CLOSED not in {number for _, number in grid.asked}
    assert run.run(*sites("a", "b")).asked == [("a", CLOSED), ("b", CLOSED)]


FEDERATED = {"federated": {"noise_multiplier": 2.0, "bins": 10}}


def test_the_sites_are_asked_for_their_counts_before_they_are_told_that_the_run_is_over(
    conducted: Any,
):
    run = conducted(rounds=1, evaluation=FEDERATED)
    site = Site("a", witness=witness(7))
    grid = run.run(site, Site("b"))
    assert [n for name, n in grid.asked if name == "a"] == [INVITED, 1, COUNTED, CLOSED]
    assert site.given == ["", witness(7)]
    assert run.file("federated.json")["sites"] == {"a": "ok", "b": "ok"}


def test_a_run_whose_counts_are_still_to_be_asked_for_is_not_over(conducted: Any):
    def stop(*_: Any) -> Say:
        raise KeyboardInterrupt

    run = conducted(rounds=1, evaluation=FEDERATED)
    with pytest.raises(KeyboardInterrupt):
        run.run(*sites("a", "b", script={COUNTED: stop}))
    too_few = run.grid([Site("a")])
    assert not run.run_on(too_few)
    assert too_few.asked == []  # a closed run could not be counted any more
    assert run.run_on(enough := run.grid(sites("a", "b")))
    assert [number for name, number in enough.asked if name == "a"] == [INVITED, COUNTED, CLOSED]
    assert run.file("federated.json")["sites"] == {"a": "ok", "b": "ok"}


# --- Stopping and going on ----------------------------------------------------------------------


def test_a_round_without_its_quorum_stops_the_run_which_goes_on_later(conducted: Any):
    run = conducted(rounds=4)
    faults = {3: with_update(put(np.nan))}
    with pytest.raises(RunError) as caught:
        run.run(Site("a"), Site("b", script=faults), Site("c", script={3: lambda *_: NEVER}))
    for part in (
        "round 3: 1 updates, the quorum is 2",
        "a: ok",
        "b: rejected 1.weight: not finite",
        "c: late no answer",
        "resume the run",
    ):
        assert part in str(caught.value)
    assert [row["round"] for row in run.rows] == [1, 2]
    assert not (run.folder / "model.safetensors").exists()
    watching = Watching()
    grid = run.run(*sites("a", "b", "c"), observer=watching)
    assert watching.told[0] == ("opened", ["a", "b", "c"], 2)
    assert {number for _, number in grid.asked} == {INVITED, 3, 4, CLOSED}
    assert [row["round"] for row in run.rows] == [1, 2, 3, 4]
    whole = conducted("whole", rounds=4)
    whole.run(*sites("a", "b", "c"))
    close(run.weights, whole.weights, tolerance=0)


def test_an_attempt_without_its_quorum_is_counted_as_spent(conducted: Any):
    """The sites trained, whatever became of the round: asked again, they are counted again."""
    run = conducted(rounds=2)
    with pytest.raises(RunError):
        run.run(Site("a"), Site("b", script={2: with_update(put(np.nan))}))
    run.run(*sites("a", "b"))
    spent = json.loads((run.folder / "privacy.json").read_text())["sites"]
    whole = conducted("whole", rounds=2)
    whole.run(*sites("a", "b"))
    once = json.loads((whole.folder / "privacy.json").read_text())["sites"]
    assert {site["rounds"] for site in spent.values()} == {3}
    assert {site["rounds"] for site in once.values()} == {2}
    assert spent["a"]["epsilon"] > once["a"]["epsilon"]


GOING_ON: list[dict[str, Any]] = [
    {"aggregation": {"strategy": "fedavgm"}},
    {"aggregation": {"strategy": "fedyogi", "average_decay": 0.5}},
    {"evaluation": {"every": 2, "patience": 2, "validation_fraction": 0.5}},
    {"privacy": {"mechanism": "none"}},
]


@pytest.mark.parametrize("changes", GOING_ON, ids=str)
def test_a_run_that_is_ended_again_and_again_ends_with_the_same_result(
    conducted: Any, changes: dict[str, Any]
):
    def honest() -> list[Site]:
        return sites("a", "b", update=towards(0.5, -0.2, 0.7, 0.1, 0.2))

    whole, run = conducted("whole", rounds=5, **changes), conducted(rounds=5, **changes)
    whole.run(*honest())
    for number in {1, 2, len(whole.rows)}:
        with pytest.raises(KeyboardInterrupt):
            run.run(*honest(), observer=Watching(stop_after=number))
        assert len(run.rows) == number
        assert not (run.folder / "model.safetensors").exists()
    run.run(*honest())
    close(run.weights, whole.weights, tolerance=0)
    times = ("seconds", "waited_seconds")
    for mine, theirs in zip(run.rows, whole.rows, strict=True):
        assert {k: v for k, v in mine.items() if k not in times} == {
            k: v for k, v in theirs.items() if k not in times
        }
    assert run.file("privacy.json") == whole.file("privacy.json")


def test_a_finished_run_asks_nobody_again(conducted: Any):
    run = conducted(rounds=2)
    run.run(*sites("a", "b"))
    before = run.weights
    (run.folder / "model.safetensors").unlink()
    grid = run.run(*sites("a", "b"))
    assert grid.asked == [("a", CLOSED), ("b", CLOSED)]
    close(run.weights, before, tolerance=0)


def test_the_folder_of_another_run_is_refused(conducted: Any):
    conducted("folder", rounds=2).run(*sites("a", "b"))
    with pytest.raises(RunError, match="another run's"):
        conducted("folder", rounds=3).run(*sites("a", "b"))


@pytest.mark.filterwarnings("ignore:overflow")
def test_a_model_that_is_no_longer_finite_stops_the_run_before_it_is_kept(conducted: Any):
    fast = {"strategy": "fedavgm", "server_learning_rate": 10.0}
    run = conducted(rounds=3, aggregation=fast)
    with pytest.raises(RunError, match=r"round 2: .*not finite.*max_update_norm"):
        run.run(*sites("a", "b", update=towards(1.0, 3e38, 1.0)))
    assert [row["round"] for row in run.rows] == [1]
    watching = Watching(stop_after=2)
    with pytest.raises(KeyboardInterrupt):
        run.run(*sites("a", "b"), observer=watching)
    assert watching.told[0] == ("opened", ["a", "b"], 1)  # round 1 was kept as it was


def test_a_model_that_no_site_would_take_stops_the_run_before_it_is_kept(conducted: Any):
    fast = {"strategy": "fedavgm", "server_learning_rate": 1e6}
    run = conducted(rounds=3, aggregation=fast)
    with pytest.raises(RunError, match=r"round 1: .*beyond 1e\+06.*smaller learning_rate"):
        run.run(*sites("a", "b", update=towards(10.0)))
    assert run.rows == []


def test_rounds_whose_checkpoint_is_gone_are_not_written_over(conducted: Any, tmp_path: Path):
    run = conducted("folder", rounds=2)
    run.run(*sites("a", "b"))
    record = (run.folder / "metrics.jsonl").read_bytes()
    shutil.rmtree(run.folder / "checkpoint")
    with pytest.raises(RunError, match=r"holds rounds, but .* holds no checkpoint"):
        conducted("folder", rounds=2).run(*sites("a", "b"))
    assert (run.folder / "metrics.jsonl").read_bytes() == record


@pytest.mark.parametrize("notes", [{}, {"sites": {"a": 3}}, {"stopping": 1}, {"stopping": {}}])
def test_a_checkpoint_with_odd_notes_is_damaged(conducted: Any, notes: dict[str, Any]):
    run = conducted("folder", rounds=2)
    run.run(*sites("a", "b"))
    path = run.folder / "checkpoint" / "state.json"
    state = json.loads(path.read_text())
    kept = {"stopping": state["notes"]["stopping"]} if "sites" in notes else {}
    path.write_text(json.dumps(state | {"notes": kept | notes}))
    with pytest.raises(RunError, match="checkpoint"):
        conducted("folder", rounds=2).run(*sites("a", "b"))


# --- Which model ------------------------------------------------------------------------------


def auroc(row: dict[str, Any], part: str = "validation") -> Any:
    return row["evaluation"][part]["metrics"]["auroc"]["value"]


def test_the_best_model_by_the_validation_part_is_kept(conducted: Any):
    run = conducted(rounds=4, evaluation={"validation_fraction": 0.5})
    run.run(*sites("a", "b", update=towards(-1.0, 2.0, 1.0, -3.0)))
    assert [auroc(row) for row in run.rows] == [0.0, 1.0, 1.0, 0.0]
    close(run.weights, {n: np.full_like(a, 2.0) for n, a in run.weights.items()})
    assert run.file("environment.json")["model_round"] == 2
    assert not run.file("environment.json")["stopped_early"]


def test_without_a_validation_part_the_last_model_is_kept(conducted: Any):
    run = conducted(rounds=3)
    run.run(*sites("a", "b", update=towards(2.0, 1.0, -3.0)))
    assert [auroc(row, "test") for row in run.rows] == [1.0, 1.0, 0.0]
    close(run.weights, {n: np.full_like(a, -3.0) for n, a in run.weights.items()})
    assert run.file("environment.json")["model_round"] == 3


def test_a_run_stops_when_its_patience_is_at_its_end(conducted: Any):
    run = conducted(rounds=9, evaluation={"patience": 2, "validation_fraction": 0.5})
    values = (-1.0, 1.0, -1.0, -1.0, 5.0, 5.0, 5.0, 5.0, 5.0)
    grid = run.run(*sites("a", "b", update=towards(*values)))
    assert [row["round"] for row in run.rows] == [1, 2, 3, 4]
    assert max(number for _, number in grid.asked) == 4
    close(run.weights, {n: np.full_like(a, 1.0) for n, a in run.weights.items()})
    assert run.file("environment.json")["stopped_early"]
    again = run.run(*sites("a", "b"))
    assert {number for _, number in again.asked} == {CLOSED}  # it stays stopped


def test_the_average_is_evaluated_and_kept(conducted: Any):
    average = {"strategy": "fedavg", "average_decay": 0.9}
    run = conducted(rounds=2, aggregation=average)
    run.run(*sites("a", "b", update=towards(1.0, -1.5)))
    decay = 2 / 11
    expected = decay * 1.0 + (1 - decay) * -1.5
    close(run.weights, {n: np.full_like(a, expected) for n, a in run.weights.items()})
    half = {"validation_fraction": 0.5}
    bright = conducted("bright", rounds=2, aggregation=average, evaluation=half)
    bright.run(*sites("a", "b", update=towards(10.0, -1.5)))
    assert auroc(bright.rows[1]) == 1.0  # of the average, where the weights' own is 0


def test_evaluation_comes_every_so_many_rounds_and_after_the_last(conducted: Any):
    run = conducted(rounds=5, evaluation={"every": 2})
    run.run(*sites("a", "b"))
    assert [row["evaluation"] is not None for row in run.rows] == [False, True, False, True, True]


# --- Memory -----------------------------------------------------------------------------------


class Measuring(Watching):
    """Measures memory from the opening of the first round to the last answer."""

    peak = 0

    def round_opened(self, number: int) -> None:
        tracemalloc.start()

    def site_answered(self, number: int, site: str, status: str) -> None:
        self.peak = tracemalloc.get_traced_memory()[1]

    def round_closed(self, row: Mapping[str, Any]) -> None:
        tracemalloc.stop()
        raise KeyboardInterrupt


class LazyGrid(ScriptedGrid):
    """Makes a reply when it is pulled: what the sites hold is not the coordinator's memory."""

    def _push(self, message: Message) -> str:
        self.asked.append(("", 0))
        identity = f"message-{len(self.asked)}"
        message.metadata.__dict__["_message_id"] = identity
        self._due[identity] = 0.0, message, NEVER
        return identity

    def _reply(self, request: Message, said: Say) -> Message:
        site = self._sites[request.metadata.dst_node_id]
        return super()._reply(request, site.hear(read_request(request.content)))


class EagerGrid(LazyGrid):
    """Gives all replies at once, as Flower's own grid does."""

    def pull_messages(self, message_ids: Iterable[str]) -> Any:
        return list(super().pull_messages(message_ids))


@pytest.mark.parametrize(("kind", "grows"), [(LazyGrid, False), (EagerGrid, True)])
def test_memory_does_not_grow_with_the_sites_beyond_what_the_grid_holds(
    conducted: Any, kind: type[LazyGrid], grows: bool
):
    side, peaks = 256, []  # a model of 256 kB
    for count in (3, 23):
        run = conducted(f"run-{count}", rounds=1, input={"height": side, "width": side})
        measuring = Measuring()
        with pytest.raises(KeyboardInterrupt):
            run.run_on(kind(sites(*map(str, range(count))), run.clock.now), measuring)
        peaks.append(measuring.peak)
    model = 4 * side * side
    assert (peaks[1] - peaks[0] > 10 * model) == grows
    assert grows or peaks[1] - peaks[0] < model
