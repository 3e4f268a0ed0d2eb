"""What a person says yes to, and what waits for one: nothing that a coordinator can decide."""

from __future__ import annotations

import json
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from client.approval import Asked, Requests
from client.gate import Gate, Site
from client.ledger import Ledger, Signed
from client.policy import Policy
from common import accounting
from common.errors import ConfigError, Refusal, RefusalCode
from common.messages import Closing, Invitation, RefusalReply, Release, TrainTask
from common.spec import RunSpec

Spec = Callable[..., RunSpec]

COHORT = "c" * 64  # as `make_ledger` admits
PERSON = Signed("Ada", "it is what we agreed upon")


@dataclass
class Node:
    """A node in ``ask`` mode, and the desk at which a person decides."""

    policy: Policy
    ledger: Ledger
    folder: Path
    trainer_for: Callable[..., Any]
    cohort: str = COHORT

    @property
    def requests(self) -> Requests:
        return Requests(self.folder)

    @property
    def gate(self) -> Gate:
        """As after a start: nothing is remembered but what is on the disk."""
        site = Site(self.policy, self.ledger, self.cohort, self.requests)
        return Gate(site, trainer_for=self.trainer_for)

    def invite(self, spec: RunSpec) -> RefusalCode | None:
        reply = self.gate.invite(Invitation(spec))
        return reply.code if isinstance(reply, RefusalReply) else None

    def asked(self, spec: RunSpec) -> Asked:
        return Asked(spec, self.cohort, self.policy.judge(spec, 1))

    def approve(self, spec: RunSpec) -> None:
        self.ledger.approve(self.asked(spec), PERSON)

    def deny(self, spec: RunSpec) -> None:
        approval = self.asked(spec).digest
        self.ledger.decide(spec.digest, approved=False, approval=approval, signed=PERSON)

    @property
    def entries(self) -> list[Any]:
        return list(self.ledger.entries())


@pytest.fixture
def node(
    make_policy: Any, make_ledger: Any, make_trainer: Any, write_cohort: Any, make_spec: Spec
) -> Node:
    policy = make_policy(approval="ask")
    cohort = write_cohort(make_spec(), range(23))

    def trainer_for(spec: RunSpec, _: Any) -> Any:
        return make_trainer(spec, cohort, 40)

    folder = cohort.path.with_name("requests")
    return Node(policy, make_ledger(policy), folder, trainer_for)


# --- What is approved -------------------------------------------------------------------------


@pytest.fixture
def asked(make_spec: Spec) -> Asked:
    spec = make_spec()
    return Asked(spec, COHORT, accounting.shares(spec, 40))


def changes(asked: Asked, make_spec: Spec) -> Iterator[tuple[str, Asked]]:
    (share,) = asked.shares
    yield "the version", replace(asked, version="0.0.9")
    yield "the spec", replace(asked, spec=make_spec(seed=2))
    yield "the run's identity", replace(asked, spec=asked.spec.identified("another"))
    yield "the cohort", replace(asked, cohort="d" * 64)
    yield "what is mixed in", replace(asked, synthetic=f"{'e' * 64}, not known to be protected")
    yield "the declared size", replace(asked, shares=accounting.shares(asked.spec, 41))
    yield "the rounds", replace(asked, shares=(share._replace(rounds=4),))
    noise = replace(share.mechanism, noise_multiplier=1.0000001)  # it shows in no figure
    yield "the noise by a hair", replace(asked, shares=(share._replace(mechanism=noise),))
    yield "no privacy", replace(asked, shares=())


def test_a_yes_is_to_everything_that_was_shown(asked: Asked, make_spec: Spec):
    found = dict(changes(asked, make_spec))
    assert len({asked.digest, *(other.digest for other in found.values())}) == 1 + len(found)
    assert replace(asked).digest == asked.digest


def test_what_is_shown_is_what_the_whole_run_costs(asked: Asked, make_spec: Spec):
    (share,) = asked.shares
    assert asked.epsilon == accounting.epsilon([share.whole], asked.spec.privacy.delta)  # type: ignore[union-attr]
    plain = make_spec(privacy={"mechanism": "none"})
    assert Asked(plain, COHORT, ()).epsilon is None


# --- The node asks ----------------------------------------------------------------------------


def test_a_run_waits_until_a_person_says_yes(node: Node, make_spec: Spec, global_weights: Any):
    spec = make_spec()
    task = TrainTask(spec, 1, global_weights(spec))
    before = node.entries
    for _ in range(2):
        assert node.invite(spec) is RefusalCode.APPROVAL
        assert node.gate.train(task) == RefusalReply(code=RefusalCode.APPROVAL)
    assert node.entries == before
    assert [waiting.digest for waiting in node.requests.waiting()] == [spec.digest]
    node.approve(spec)
    assert node.invite(spec) is None
    assert isinstance(node.gate.train(task), Release)


def test_a_run_that_a_person_denied_is_told_so_in_either_mode(
    node: Node, make_policy: Any, make_spec: Spec, global_weights: Any
):
    spec = make_spec()
    node.invite(spec)
    node.deny(spec)
    for mode in ("ask", "automatic"):
        node.policy = make_policy(approval=mode)
        assert node.invite(spec) is RefusalCode.DENIED
        task = TrainTask(spec, 1, global_weights(spec))
        assert node.gate.train(task) == RefusalReply(code=RefusalCode.DENIED)
    assert node.invite(make_spec(seed=2)) is None  # the no was to that run


def test_the_last_word_of_a_person_holds(node: Node, make_spec: Spec, global_weights: Any):
    spec = make_spec()
    node.approve(spec)
    node.deny(spec)
    assert node.invite(spec) is RefusalCode.DENIED
    node.approve(spec)
    assert node.invite(spec) is None
    assert isinstance(node.gate.train(TrainTask(spec, 1, global_weights(spec))), Release)
    node.deny(spec)  # in the middle of the run
    task = TrainTask(spec, 2, global_weights(spec))
    assert node.gate.train(task) == RefusalReply(code=RefusalCode.DENIED)


@pytest.mark.parametrize("change", ["cohort", "declared size", "version"])
def test_whatever_changes_after_a_yes_asks_again(
    node: Node, make_policy: Any, make_spec: Spec, change: str
):
    spec = make_spec()
    if change == "version":
        node.ledger.approve(replace(node.asked(spec), version="0.0.9"), PERSON)
    else:
        node.approve(spec)
        assert node.invite(spec) is None
    if change == "cohort":
        node.cohort = "d" * 64
        node.ledger.admit(node.cohort, PERSON)
    elif change == "declared size":
        node.policy = make_policy(approval="ask", declared_size=44)
    assert node.invite(spec) is RefusalCode.APPROVAL
    node.approve(spec)
    assert node.invite(spec) is None


def test_a_yes_to_one_run_is_none_to_its_copy(node: Node, make_spec: Spec):
    spec = make_spec()
    node.approve(spec)
    for copy in (spec.identified("again"), make_spec(rounds=4), make_spec(operator="somebody")):
        assert node.invite(copy) is RefusalCode.APPROVAL


def test_a_yes_does_not_outlive_its_run(node: Node, make_spec: Spec):
    spec = make_spec()
    node.approve(spec)
    assert node.invite(spec) is None
    node.gate.close(Closing(spec.digest))
    assert node.invite(spec) is RefusalCode.REPLAY


def test_nothing_beyond_the_limits_is_ever_put_before_a_person(node: Node, make_spec: Spec):
    assert node.invite(make_spec(privacy={"mechanism": "none"})) is RefusalCode.POLICY
    assert node.invite(make_spec(local={"batch_size": 41})) is RefusalCode.SPEC
    assert node.requests.waiting() == []


# --- What lies on the disk --------------------------------------------------------------------


def test_no_file_that_a_coordinator_can_bring_about_is_a_decision(node: Node, make_spec: Spec):
    """All that it can have written is the run itself; a yes is an entry under the node's key."""
    spec = make_spec()
    node.invite(spec)
    (file,) = node.folder.iterdir()
    assert file.name == f"{spec.digest}.json"
    assert file.read_text() == spec.canonical_json
    said = {"approved": True, "by": "Ada", "approval": node.asked(spec).digest}
    for name in (f"{spec.digest}.json", f"{spec.digest}.approved", "approved.json", "decision"):
        (node.folder / name).write_text(json.dumps(said))
        assert node.invite(spec) is RefusalCode.APPROVAL


def test_nobody_else_reads_what_waits(node: Node, make_spec: Spec):
    node.invite(make_spec())
    assert stat.S_IMODE(node.folder.stat().st_mode) == 0o700


def test_a_coordinator_cannot_fill_the_disk_with_runs_that_wait(node: Node, make_spec: Spec):
    for number in range(60):
        assert node.invite(make_spec(seed=number + 1)) is RefusalCode.APPROVAL
    assert len(list(node.folder.iterdir())) == 50
    first = node.requests.waiting()[0]
    assert node.invite(first) is RefusalCode.APPROVAL  # one that waits already, waits
    node.requests.drop(first)
    node.invite(make_spec(seed=60))
    assert len(list(node.folder.iterdir())) == 50
    assert 60 in {spec.seed for spec in node.requests.waiting()}


def test_too_many_that_wait_are_refused_by_name(tmp_path: Path, make_spec: Spec):
    requests = Requests(tmp_path / "requests")
    for number in range(50):
        requests.put(make_spec(seed=number + 1))
    with pytest.raises(Refusal, match="50 runs wait already") as refused:
        requests.put(make_spec(seed=51))
    assert refused.value.code is RefusalCode.APPROVAL


def test_what_waits_is_found_by_the_beginning_of_its_digest(tmp_path: Path, make_spec: Spec):
    requests = Requests(tmp_path / "requests")
    assert requests.waiting() == []
    specs = [make_spec(name=name) for name in ("b", "a", "c")]
    for spec in specs:
        requests.put(spec)
    assert [spec.name for spec in requests.waiting()] == ["a", "b", "c"]
    for spec in specs:
        assert requests.find(spec.digest[:12]) == spec
        assert requests.find(spec.digest.upper()) == spec
    with pytest.raises(ConfigError, match="0 waiting runs"):
        requests.find("0" * 64)
    for start in ("", "a", specs[0].digest[:5], "x" * 8, f"{specs[0].digest}0", "\n"):
        with pytest.raises(ConfigError, match="at least 6 hexadecimal digits"):
            requests.find(start)
    requests.drop(specs[0])
    requests.drop(specs[0])
    assert len(requests.waiting()) == 2


@pytest.mark.parametrize("content", [b"{}", b"", b"\xff\xfe", b"[" * 100_000, b"1" * 5000, None])
def test_a_file_that_holds_no_run_is_named_and_keeps_no_other_from_being_seen(
    tmp_path: Path, make_spec: Spec, content: bytes | None
):
    requests, spec = Requests(tmp_path / "requests"), make_spec()
    requests.put(spec)
    odd = tmp_path / "requests" / "odd.json"
    odd.mkdir() if content is None else odd.write_bytes(content)
    assert requests.waiting() == [spec]
    assert requests.find(spec.digest) == spec
    (fault,) = requests.faults()
    assert "odd.json" in fault
