"""An enrolled site that attacks what the coordinator keeps, and its neighbours by way of it.

The hostile site speaks Flower's own messages, as it likes, over a real socket; a grid conducts a
run meanwhile, and another site answers it honestly.
"""

from __future__ import annotations

import hashlib
import logging
import math
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import uvicorn
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.common.serde import message_to_proto
from flwr.proto.fleet_pb2 import DeactivateNodeRequest, PushMessagesRequest
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest
from flwr.proto.message_pb2 import (
    ConfirmMessageReceivedRequest,
    ObjectTree,
    PullObjectRequest,
    PushObjectRequest,
)
from flwr.proto.node_pb2 import Node
from flwr.supercore.primitives.asymmetric import public_key_to_bytes
from sqlalchemy import text

from client.link import Answer, FleetLink, Letter
from common.errors import LinkError
from common.parcel import Parcel
from server.allowance import BOUND, Allowance, RefusedError
from server.link import Exchange, LinkGrid, bundle, fleet_app
from server.telling import Few

MEGABYTE = 2**20
LARGEST = 4 * MEGABYTE
SECRET = RecordDict({"answer": ConfigRecord({"said": b"of north alone"})})


class Hostile:
    """A site that is enrolled, and says whatever it likes."""

    def __init__(self, link: FleetLink) -> None:
        self.link = link
        self.node = Node(node_id=link.activate())
        self.client = link._client

    def answer(self, letter: Letter, records: RecordDict) -> PushMessagesRequest:
        """What an honest site would announce, to be changed."""
        answer = Answer(letter, Parcel.of(records))
        return PushMessagesRequest(
            node=self.node,
            messages_list=[message_to_proto(answer.message)],
            message_object_trees=[answer.parcel.tree],
        )

    def push(self, run: int, session: str, content: bytes, name: str | None = None) -> bool:
        said = PushObjectRequest(
            node=self.node,
            run_id=run,
            session_id=session,
            object_id=name or hashlib.sha256(content).hexdigest(),
            object_content=content,
        )
        return bool(self.client.PushObject(said).stored)

    def send(self, letter: Letter, parts: dict[str, bytes], tree: ObjectTree) -> None:
        """Answer with any parts, in any tree; what cannot be stored is not."""
        request = self.answer(letter, RecordDict())
        request.message_object_trees[0].CopyFrom(tree)
        request.messages_list[0].metadata.message_id = tree.object_id
        session = self.client.PushMessages(request).session_id
        for name, content in parts.items():
            self.push(letter.run, session, content, name)


@dataclass
class Place:
    exchange: Exchange
    grid: LinkGrid
    run: int
    north: FleetLink
    hostile: Hostile
    here: dict[str, int]

    def ask(self, name: str, kind: str = "train.step", records: RecordDict | None = None) -> str:
        """Ask a site; the question's identity."""
        asked = records or RecordDict({"question": ConfigRecord({"round": 1})})
        message = self.grid.create_message(asked, kind, self.here[name], "", ttl=60.0)
        (identity,) = self.grid.push_messages([message])
        return str(identity)

    def asked(self, name: str) -> Letter:
        """What a site finds when it looks."""
        link = self.north if name == "north" else self.hostile.link
        letter = link.receive()
        assert letter is not None
        return letter

    def answers(self, *identities: str, seconds: float = 30.0) -> list[Message]:
        """The answers to all of these."""
        found: list[Message] = []
        until = time.monotonic() + seconds
        while len(found) < len(identities) and time.monotonic() < until:
            found += self.grid.pull_messages(identities)
            time.sleep(0.01)
        return found

    @property
    def stored(self) -> int:
        """Bytes of all parts that are kept."""
        with self.exchange.state.session() as session:
            found = session.execute(text("SELECT TOTAL(LENGTH(content)) FROM objects"))
            return int(found.scalar_one())

    def rows(self, table: str) -> int:
        with self.exchange.state.session() as session:
            return int(session.execute(text(f"SELECT COUNT(*) FROM {table}")).scalar_one())  # noqa: S608

    def north_goes_on(self) -> None:
        """The neighbour is asked and answers, as if nothing had been."""
        identity = self.ask("north")
        letter = self.asked("north")
        letter.fetch()
        self.north.reply(letter, SECRET)
        (reply,) = self.answers(identity)
        assert reply.content == SECRET
        assert reply.metadata.src_node_id == self.here["north"]


@contextmanager
def served(exchange: Exchange) -> Iterator[str]:
    server = uvicorn.Server(
        uvicorn.Config(fleet_app(exchange.factory), port=0, log_level="critical")
    )
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    until = time.monotonic() + 30
    while not server.started and time.monotonic() < until:
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield f"127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="module")
def sites(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Exchange, dict[str, Any]]]:
    """A coordinator's door, and two sites that came in by it."""
    exchange = Exchange(tmp_path_factory.mktemp("exchange") / "flower.sqlite")
    with served(exchange) as address, ExitStack() as held:
        links = {}
        for name in ("north", "hostile"):
            key = ec.generate_private_key(ec.SECP384R1())
            exchange.register(public_key_to_bytes(key.public_key()), name)
            links[name] = FleetLink(address, key, None, most_bytes=64 * MEGABYTE)
            held.enter_context(links[name])
        here = {"north": links["north"].activate()}
        hostile = Hostile(links["hostile"])
        yield exchange, {"north": links["north"], "hostile": hostile, "here": here}


@pytest.fixture
def place(sites: tuple[Exchange, dict[str, Any]]) -> Iterator[Place]:
    """A run of its own for each test; nothing is left of the one before."""
    exchange, there = sites
    hostile = there["hostile"]
    here = there["here"] | {"hostile": hostile.node.node_id}
    run = exchange.submit(bundle(), {BOUND: LARGEST})
    with exchange.conducting(run, largest_reply=LARGEST) as grid:
        yield Place(exchange, grid, run, there["north"], hostile, here)


def refused(status: int) -> Any:
    return pytest.raises(httpx.HTTPStatusError, match=str(status))


def leaf(content: bytes) -> bytes:
    """An object of Flower's without children, of any content."""
    return b"ArrayChunk  %d\x00" % len(content) + content


def name_of(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


# --- Its disk -------------------------------------------------------------------------------------


def test_an_honest_answer_within_the_bound_is_taken(place: Place):
    identity = place.ask("hostile")
    letter = place.asked("hostile")
    records = RecordDict({"answer": ConfigRecord({"said": b"x" * (LARGEST - MEGABYTE)})})
    place.hostile.link.reply(letter, records)
    (reply,) = place.answers(identity)
    assert reply.content == records


def test_an_answer_cannot_be_sent_again_with_ever_more_parts(place: Place):
    place.ask("hostile")
    letter = place.asked("hostile")
    request = place.hostile.answer(letter, SECRET)
    place.hostile.client.PushMessages(request)
    before = place.rows("objects")
    for number in range(3):
        again = PushMessagesRequest.FromString(request.SerializeToString())
        extra = [ObjectTree(object_id=name_of(b"%d %d" % (number, i))) for i in range(100)]
        again.message_object_trees[0].children.extend(extra)
        with refused(403):
            place.hostile.client.PushMessages(again)
    place.hostile.client.PushMessages(request)  # the same one, as after a lost reply
    assert place.rows("objects") == before
    assert place.rows("object_push_sessions") <= 1
    place.north_goes_on()


def test_a_part_beyond_the_run_s_bound_is_not_stored(place: Place):
    place.ask("hostile")
    letter = place.asked("hostile")
    parts = [leaf(bytes([number]) * MEGABYTE) for number in range(8)]
    tree = ObjectTree(
        object_id=name_of(b"root"), children=[ObjectTree(object_id=name_of(p)) for p in parts]
    )
    request = place.hostile.answer(letter, RecordDict())
    request.message_object_trees[0].CopyFrom(tree)
    request.messages_list[0].metadata.message_id = tree.object_id
    session = place.hostile.client.PushMessages(request).session_id
    before = place.stored
    with refused(413):
        for part in parts:
            place.hostile.push(letter.run, session, part)
    assert before < place.stored < before + LARGEST
    place.north_goes_on()


def test_a_part_that_is_sent_again_since_it_could_not_be_stored_counts_once(place: Place):
    place.ask("hostile")
    letter = place.asked("hostile")
    parts = [leaf(bytes([number]) * MEGABYTE) for number in range(3)]
    request = place.hostile.answer(letter, SECRET)
    request.message_object_trees[0].children.extend(
        ObjectTree(object_id=name_of(part)) for part in parts
    )
    session = place.hostile.client.PushMessages(request).session_id
    allowance = Allowance(Path(place.exchange.factory.database))
    for part in parts * 5:
        said = PushObjectRequest(
            node=place.hostile.node,
            run_id=letter.run,
            session_id=session,
            object_id=name_of(part),
            object_content=part,
        )
        allowance.check(said)


def test_what_a_site_was_not_asked_leaves_nothing_behind(place: Place):
    place.ask("hostile")
    letter = place.asked("hostile")
    before = [place.rows(t) for t in ("objects", "message_res", "object_push_sessions")]
    for change in (
        lambda m: setattr(m.metadata, "reply_to_message_id", "0" * 64),
        lambda m: setattr(m.metadata, "reply_to_message_id", ""),
        lambda m: setattr(m.metadata, "run_id", 7),
        lambda m: setattr(m.metadata, "message_type", "query.close"),
    ):
        request = place.hostile.answer(letter, SECRET)
        change(request.messages_list[0])
        with refused(403):
            place.hostile.client.PushMessages(request)
    with refused(403):
        place.hostile.push(letter.run, "", leaf(b"x" * MEGABYTE))
    with refused(403):
        place.hostile.push(letter.run, "no such session", leaf(b"x" * MEGABYTE))
    assert [place.rows(t) for t in ("objects", "message_res", "object_push_sessions")] == before
    place.north_goes_on()


def test_a_second_answer_and_one_to_two_questions_are_refused(place: Place):
    place.ask("hostile")
    place.ask("hostile", "query.count")
    letter, other = place.asked("hostile"), place.asked("hostile")
    first = place.hostile.answer(letter, SECRET)
    place.hostile.client.PushMessages(first)
    with refused(403):
        place.hostile.client.PushMessages(place.hostile.answer(letter, RecordDict()))
    second = place.hostile.answer(other, RecordDict())
    second.messages_list[0].metadata.message_id = first.message_object_trees[0].object_id
    second.message_object_trees[0].CopyFrom(first.message_object_trees[0])
    with refused(403):
        place.hostile.client.PushMessages(second)
    assert place.rows("message_res") == 1


def test_who_comes_and_goes_is_asked_again_and_leaves_one_answer(place: Place):
    """Each time it comes back it is asked again: what it answered before is nobody's any more."""
    big = RecordDict({"answer": ConfigRecord({"said": b"x" * (LARGEST - MEGABYTE)})})
    for _ in range(4):
        identity = place.ask("hostile")
        letter = place.asked("hostile")
        place.hostile.link.reply(letter, big)
    assert place.stored < 2 * LARGEST
    assert place.rows("message_res") == 1
    assert place.rows("message_ins") == 1
    (reply,) = place.answers(identity)
    assert reply.content == big
    assert place.stored < MEGABYTE


def test_an_answer_of_too_many_parts_is_not_begun(place: Place):
    place.ask("hostile")
    letter = place.asked("hostile")
    request = place.hostile.answer(letter, SECRET)
    extra = [ObjectTree(object_id=name_of(b"%d" % number)) for number in range(2100)]
    request.message_object_trees[0].children.extend(extra)
    before = place.rows("objects")
    with refused(413):
        place.hostile.client.PushMessages(request)
    assert place.rows("objects") == before


def test_a_disk_that_is_nearly_full_takes_nothing_from_anybody(tmp_path: Path):
    left = [2**40]
    _ = Exchange(tmp_path / "flower.sqlite").state
    allowance = Allowance(tmp_path / "flower.sqlite", lambda _: left[0])
    said = PushObjectRequest(object_content=b"x" * MEGABYTE)
    with pytest.raises(RefusedError) as error:
        allowance.check(said)
    assert error.value.status == 403  # there is room, and it is nobody's answer
    left[0] = 2**28 + MEGABYTE - 1
    with pytest.raises(RefusedError, match="nearly full") as error:
        allowance.check(said)
    assert error.value.status == 507


# --- Its neighbours -------------------------------------------------------------------------------


def test_a_site_cannot_fetch_what_another_was_sent_or_has_answered(place: Place):
    place.ask("north", records=SECRET)
    letter = place.asked("north")
    parcel = letter.fetch()
    place.north.send(answer := Answer(letter, Parcel.of(SECRET)))
    names = [*parcel.objects, *answer.parcel.objects]
    for name in names:
        with refused(403):
            place.hostile.client.PullObject(
                PullObjectRequest(node=place.hostile.node, run_id=place.run, object_id=name)
            )


def test_a_site_cannot_have_forgotten_what_another_was_sent(place: Place):
    identity = place.ask("north")
    before = place.rows("objects")
    with refused(403):
        place.hostile.client.ConfirmMessageReceived(
            ConfirmMessageReceivedRequest(
                node=place.hostile.node, run_id=place.run, message_object_id=identity
            )
        )
    assert place.rows("objects") == before
    letter = place.asked("north")
    letter.fetch()
    place.north.reply(letter, SECRET)
    assert place.answers(identity)[0].content == SECRET


def test_a_site_cannot_add_to_the_answer_of_another(place: Place):
    place.ask("north")
    answer = Answer(place.asked("north"), Parcel.of(SECRET))
    request = PushMessagesRequest(
        node=place.north._here,
        messages_list=[message_to_proto(answer.message)],
        message_object_trees=[answer.parcel.tree],
    )
    session = place.north._client.PushMessages(request).session_id
    for name, part in answer.parcel.objects.items():
        for said in (session, ""):
            with refused(403):
                place.hostile.push(place.run, said, part, name)


def test_a_site_does_not_send_another_away(place: Place):
    for said, call in (
        (
            DeactivateNodeRequest(node_id=place.here["north"]),
            place.hostile.client.DeactivateNode,
        ),
        (
            SendNodeHeartbeatRequest(
                node=Node(node_id=place.here["north"]), heartbeat_interval=30.0
            ),
            place.hostile.client.SendNodeHeartbeat,
        ),
    ):
        with refused(401):
            call(said)
    place.north_goes_on()


# --- The run --------------------------------------------------------------------------------------


def garbage(place: Place, letter: Letter) -> Iterator[tuple[dict[str, bytes], ObjectTree]]:
    """Answers that Flower's store takes, and that are none."""
    chunk = leaf(b"x")
    yield {name_of(chunk): chunk}, ObjectTree(object_id=name_of(chunk))  # no message
    for kind in (b"Message", b"RecordDict", b"ConfigRecord", b"ArrayRecord", b"Array"):
        broken = kind + b"  3\x00abc"
        yield {name_of(broken): broken}, ObjectTree(object_id=name_of(broken))
    whole = Parcel.of(RecordDict({"answer": ArrayRecord([np.ones(2**19, np.float32)])}))
    (piece,) = (name for name in whole.objects if name != whole.identity)
    yield whole.objects | {piece: chunk}, whole.tree  # a content that is not of this name
    first = whole.objects[whole.identity].replace(piece.encode(), name_of(chunk).encode())
    yield {name_of(first): first, name_of(chunk): chunk}, tree_of(first, chunk)  # too few numbers
    yield whole.objects, ObjectTree(object_id=whole.identity)  # without the numbers
    deep = ObjectTree(object_id=whole.identity, children=[tree_of(chunk, b"below")])
    yield whole.objects, deep


def tree_of(first: bytes, *others: bytes) -> ObjectTree:
    children = [ObjectTree(object_id=name_of(each)) for each in others]
    return ObjectTree(object_id=name_of(first), children=children)


@pytest.mark.parametrize("number", range(10))
def test_an_answer_that_is_none_costs_its_site_its_round_and_nothing_else(
    place: Place, number: int
):
    identity = place.ask("hostile")
    letter = place.asked("hostile")
    parts, tree = list(garbage(place, letter))[number]
    try:
        place.hostile.send(letter, parts, tree)
    except (httpx.HTTPStatusError, LinkError):
        place.north_goes_on()
        return
    for reply in place.grid.pull_messages([identity]):
        assert reply.metadata.reply_to_message_id == identity
        assert not reply.has_content() or reply.content == RecordDict()
    place.north_goes_on()


@pytest.mark.parametrize("field", ["created_at", "ttl"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e308])
def test_a_time_that_is_none_does_not_stop_the_run(place: Place, field: str, value: float):
    identity = place.ask("hostile")
    letter = place.asked("hostile")
    request = place.hostile.answer(letter, SECRET)
    setattr(request.messages_list[0].metadata, field, value)
    try:
        place.hostile.client.PushMessages(request)
    except httpx.HTTPStatusError:
        assert place.rows("message_res") == 0
    list(place.grid.pull_messages([identity]))
    place.north_goes_on()


def test_how_long_something_took_is_not_kept_and_hurts_nobody(place: Place):
    for value in (math.inf, -math.inf, math.nan, 1e308):
        place.ask("hostile")
        letter = place.asked("hostile")
        request = place.hostile.answer(letter, SECRET)
        request.clientapp_runtime_list.append(value)
        place.hostile.client.PushMessages(request)
    (run,) = place.exchange.state.get_run_info(run_ids=[place.run])
    assert run.clientapp_runtime == 0.0
    place.ask("north")
    place.north.bundle(place.asked("north").run)


def test_a_name_that_can_be_guessed_is_not_to_be_had_with_other_parts(place: Place):
    """A neighbour's numbers, or the next task's: registered as something else, nobody could send
    them any more.
    """
    numbers = RecordDict({"answer": ArrayRecord([np.ones(2**19, np.float32)])})
    ours = Parcel.of(numbers)
    (piece,) = (name for name in ours.objects if name != ours.identity)
    place.ask("hostile")
    letter = place.asked("hostile")
    request = place.hostile.answer(letter, RecordDict())
    taken = ObjectTree(object_id=piece, children=[ObjectTree(object_id=name_of(b"other"))])
    request.message_object_trees[0].children.append(taken)
    with refused(400):
        place.hostile.client.PushMessages(request)
    identity = place.ask("north", records=numbers)
    letter = place.asked("north")
    assert letter.fetch().records() == numbers
    place.north.reply(letter, numbers)
    (reply,) = place.answers(identity)
    assert reply.content == numbers


def test_the_same_numbers_have_other_names_in_another_process(tmp_path: Path):
    """A run that goes on after its conductor's death sends what its sites have seen before."""
    program = (
        "import numpy; from flwr.app import ArrayRecord, RecordDict; from common.parcel import *;"
        "print(*Parcel.of(RecordDict({'a': ArrayRecord([numpy.ones(2**19, 'f4')])})).objects)"
    )
    here = Parcel.of(RecordDict({"a": ArrayRecord([np.ones(2**19, np.float32)])})).objects
    again = Parcel.of(RecordDict({"a": ArrayRecord([np.ones(2**19, np.float32)])})).objects
    assert len(here.keys() & again.keys()) == 1  # within one it is sent and kept once
    said = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True)
    assert not here.keys() & set(said.stdout.decode().split())


def test_what_is_refused_again_and_again_does_not_fill_the_log(caplog: pytest.LogCaptureFixture):
    log = logging.getLogger("cloister.test")
    few = Few(most=3, seconds=0.5)
    log.addFilter(few)
    for number in range(1000):
        log.warning("line %d", number)
    assert [record.getMessage() for record in caplog.records] == ["line 0", "line 1", "line 2"]
    time.sleep(0.6)
    log.warning("line %d", 1000)
    assert caplog.records[-1].getMessage() == "line 1000 (and 997 lines before)"
    log.removeFilter(few)
