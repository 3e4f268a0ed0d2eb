"""Messages to nodes that go away, come back, are started anew, or never were there."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import pytest
from flwr.app import ConfigRecord, Error, Message, RecordDict
from flwr.common.constant import ErrorCode
from flwr.proto.node_pb2 import NodeInfo
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from common.clock import Clock
from server.post import Post

QUESTION = RecordDict({"asked": ConfigRecord({"round": 1})})
ANSWER = RecordDict({"said": ConfigRecord({"round": 1})})


@dataclass
class Fleet(Grid):
    """Nodes that are here since a time, and answer when a test says so; a clock set by hand.

    A message to a node that goes is answered as Flower does: the node is not available.
    """

    here: dict[int, str]
    time: float = 0.0
    slow: float = 0.0  # seconds that sending takes
    asked: list[int] = field(default_factory=list)
    waiting: dict[str, Message] = field(default_factory=dict)
    said: dict[str, Message] = field(default_factory=dict)

    def __post_init__(self) -> None:
        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 0, 1

    @property
    def clock(self) -> Clock:
        return Clock(now=lambda: self.time, sleep=self.pass_by)

    def pass_by(self, seconds: float) -> None:
        self.time += seconds

    def answer(self, node: int) -> None:
        for identity, message in list(self.waiting.items()):
            if message.metadata.dst_node_id == node:
                self.said[identity] = Message(ANSWER, reply_to=self.waiting.pop(identity))

    def go(self, node: int) -> None:
        del self.here[node]

    def set_run(self, run: Run) -> None:
        raise NotImplementedError

    @property
    def run(self) -> Run:
        raise NotImplementedError

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        raise NotImplementedError

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
        return list(self.here)

    def get_nodes(self) -> Iterable[NodeInfo]:
        return [NodeInfo(node_id=n, last_activated_at=at) for n, at in self.here.items()]

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        identities = []
        self.pass_by(self.slow)
        for message in messages:
            if message.metadata.ttl <= self.slow:
                raise ValueError("['Message TTL has expired']")
            identity = f"message {len(self.asked)}"
            message.metadata.__dict__["_message_id"] = identity
            self.asked.append(message.metadata.dst_node_id)
            self.waiting[identity] = message
            identities.append(identity)
        return identities

    def pull_messages(self, message_ids: Iterable[str]) -> Iterator[Message]:
        for identity in message_ids:
            message = self.waiting.get(identity)
            if identity in self.said:
                yield self.said.pop(identity)
            elif message is not None and message.metadata.dst_node_id not in self.here:
                error = Error(ErrorCode.NODE_UNAVAILABLE, "gone")
                yield Message(error, reply_to=self.waiting.pop(identity))


def collect(post: Post) -> list[tuple[int, bool]]:
    return [(node, reply is not None) for node, reply in post.answers()]


@pytest.fixture
def fleet() -> Fleet:
    return Fleet({1: "monday", 2: "monday"})


@pytest.fixture
def post(fleet: Fleet) -> Post:
    made = Post(fleet, fleet.clock, 100.0, least=2)
    made.send("train.step", {1: QUESTION, 2: QUESTION})
    return made


def test_a_node_that_goes_and_comes_back_is_asked_again(fleet: Fleet, post: Post):
    fleet.answer(1)
    fleet.go(2)
    assert collect(post) == [(1, True)]
    for _ in range(20):
        fleet.pass_by(1.0)
        assert collect(post) == []
    assert post.open
    assert fleet.asked == [1, 2]
    fleet.here[2] = "tuesday"
    fleet.pass_by(1.0)
    assert collect(post) == []
    assert fleet.asked == [1, 2, 2]
    fleet.answer(2)
    assert collect(post) == [(2, True)]
    assert not post.open


def test_a_question_whose_time_runs_out_while_it_is_sent_is_a_late_answer(fleet: Fleet):
    fleet.slow = 3.0
    post = Post(fleet, fleet.clock, 2.0, least=2)
    post.send("train.step", {1: QUESTION, 2: QUESTION})
    assert collect(post) == []
    assert not post.open
    assert post.waits == (1, 2)


def test_a_question_that_flower_refuses_for_another_reason_is_an_error(fleet: Fleet):
    def refused(messages: Iterable[Message]) -> Iterable[str]:
        raise ValueError("no such node")

    fleet.push_messages = refused  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="no such node"):
        Post(fleet, fleet.clock, 100.0, least=2).send("train.step", {1: QUESTION})


def test_a_node_that_was_started_anew_between_two_looks_is_asked_again(fleet: Fleet, post: Post):
    fleet.here[2] = "tuesday"
    fleet.pass_by(1.0)
    assert collect(post) == []
    assert fleet.asked == [1, 2, 2]
    fleet.pass_by(1.0)
    assert collect(post) == []
    assert fleet.asked == [1, 2, 2]


def test_an_answer_to_the_first_asking_is_not_taken_twice(fleet: Fleet, post: Post):
    fleet.here[2] = "tuesday"
    fleet.pass_by(1.0)
    collect(post)
    fleet.answer(2)  # to both
    assert collect(post) == [(2, True)]
    assert collect(post) == []


def test_waiting_for_a_node_that_is_away_ends_at_the_deadline(fleet: Fleet, post: Post):
    fleet.answer(1)
    fleet.go(2)
    collect(post)
    fleet.pass_by(99.5)
    assert post.open
    fleet.pass_by(0.5)
    assert not post.open
    assert collect(post) == []


def test_nobody_waits_for_a_node_that_was_away_from_the_start_but_it_is_asked(fleet: Fleet):
    fleet.here[3] = "monday"
    fleet.go(2)
    post = Post(fleet, fleet.clock, 100.0, least=2)
    post.send("train.step", dict.fromkeys((1, 2, 3), QUESTION))
    assert collect(post) == []
    fleet.answer(1)
    assert collect(post) == [(1, True)]
    fleet.here[2] = "tuesday"
    fleet.pass_by(1.0)
    collect(post)
    fleet.answer(3)
    assert collect(post) == [(3, True)]
    assert post.open  # it is there now
    fleet.answer(2)
    assert collect(post) == [(2, True)]

    fleet.go(2)
    post = Post(fleet, fleet.clock, 300.0, least=2)
    post.send("train.step", dict.fromkeys((1, 2, 3), QUESTION))
    fleet.answer(1)
    fleet.answer(3)
    assert collect(post) == [(1, True), (3, True)]
    assert not post.open


def test_with_too_few_there_those_that_are_away_are_waited_for(fleet: Fleet):
    fleet.go(2)
    post = Post(fleet, fleet.clock, 100.0, least=2)
    post.send("train.step", {1: QUESTION, 2: QUESTION})
    fleet.answer(1)
    assert collect(post) == [(1, True)]
    assert post.open


def test_a_node_that_is_forgotten_is_waited_for_no_longer(fleet: Fleet, post: Post):
    fleet.answer(1)
    collect(post)
    assert post.waits == (2,)
    post.forget(2)
    assert not post.open
    fleet.answer(2)
    assert collect(post) == []


def test_an_error_of_the_node_s_own_is_an_answer(fleet: Fleet, post: Post):
    message = fleet.waiting.pop("message 1")
    error = Error(ErrorCode.CLIENT_APP_CRASHED, "it crashed")
    fleet.said["message 1"] = Message(error, reply_to=message)
    assert collect(post) == [(2, False)]
    assert post.waits == (1,)


def test_an_answer_whose_time_runs_out_on_its_way_is_late_and_no_failure(fleet: Fleet, post: Post):
    """Flower puts an error in the place of an answer that is fetched too late."""
    message = fleet.waiting.pop("message 1")
    error = Error(ErrorCode.REPLY_MESSAGE_UNAVAILABLE, "expired")
    fleet.said["message 1"] = Message(error, reply_to=message)
    fleet.pass_by(100.0)
    assert collect(post) == []
    assert post.waits == (1, 2)
    assert not post.open


def test_an_answer_that_is_not_to_be_had_before_the_deadline_is_a_failure(fleet: Fleet, post: Post):
    message = fleet.waiting.pop("message 1")
    error = Error(ErrorCode.REPLY_MESSAGE_UNAVAILABLE, "too large")
    fleet.said["message 1"] = Message(error, reply_to=message)
    fleet.pass_by(99.0)
    assert collect(post) == [(2, False)]
