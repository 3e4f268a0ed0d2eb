"""Both ends of the line upon Flower's own code: a contract that fails when Flower moves."""

from __future__ import annotations

import asyncio
import gzip
import socket
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import uvicorn
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.cli.build import build_fab_from_disk
from flwr.supercore.primitives.asymmetric import public_key_to_bytes
from starlette.types import ASGIApp, Receive, Scope, Send

from client.link import FleetLink
from common.clock import Clock
from common.errors import LinkBusyError, LinkError, LinkRefusedError, MessageError, RunError
from deploy.ray_engine import _BUNDLE
from server.link import Exchange, LinkGrid, fleet_app
from server.post import Post

MEGABYTE = 2**20


class Place:
    """A fleet API on loopback, without TLS, and the state behind it.

    Attributes:
        requests: the paths that were asked for.
        twist: answers in place of the fleet API, by path.
    """

    def __init__(self, folder: Path) -> None:
        self.requests: list[str] = []
        self.twist: dict[str, ASGIApp] = {}
        self.database = folder / "flower.sqlite"
        self.exchange = Exchange(self.database)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.address = f"127.0.0.1:{free.getsockname()[1]}"
        port = int(self.address.rpartition(":")[2])
        self.app = fleet_app(self.exchange.factory)
        self.server = uvicorn.Server(
            uvicorn.Config(
                self._answer, port=port, log_level="warning", lifespan="off", interface="asgi3"
            )
        )
        self._thread = threading.Thread(target=self.server.run, daemon=True)
        self._thread.start()
        until = time.monotonic() + 30
        while not self.server.started and time.monotonic() < until:
            time.sleep(0.01)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope["path"].rpartition("/")[2]
        self.requests.append(path)
        await self.twist.get(path, self.app)(scope, receive, send)

    def rows(self, question: str) -> list[tuple[Any, ...]]:
        """What Flower's database says."""
        with closing(sqlite3.connect(self.database)) as database:
            return database.execute(question).fetchall()

    def node(self, name: str, most_bytes: int = 8 * MEGABYTE) -> FleetLink:
        key = ec.generate_private_key(ec.SECP384R1())
        self.exchange.register(public_key_to_bytes(key.public_key()), name)
        return FleetLink(self.address, key, None, most_bytes=most_bytes)

    def close(self) -> None:
        self.server.should_exit = True
        self._thread.join()


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    made = Place(tmp_path)
    yield made
    made.close()


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    folder = tmp_path_factory.mktemp("bundle")
    (folder / "LICENSE").write_text("Apache-2.0")
    (folder / "pyproject.toml").write_text(_BUNDLE)
    return build_fab_from_disk(folder)


def ask(grid: LinkGrid, node: int, kind: str, records: RecordDict) -> str:
    (identity,) = grid.push_messages([grid.create_message(records, kind, node, "", ttl=60.0)])
    return str(identity)


def answer(grid: LinkGrid, identity: str) -> Message:
    until = time.monotonic() + 30
    while time.monotonic() < until:
        for reply in grid.pull_messages([identity]):
            return reply
        time.sleep(0.01)
    raise TimeoutError(identity)


def test_a_question_reaches_the_node_and_its_answer_comes_back(place: Place, bundle: bytes) -> None:
    run = place.exchange.submit(bundle, {"spec": "{}"})
    with place.node("north") as node:
        number = node.activate()
        node.beat()
        assert node.receive() is None
        with Exchange(place.database).conducting(run) as grid:
            assert [(each.name, each.online) for each in place.exchange.nodes()] == [
                ("north", True)
            ]
            asked = RecordDict({"question": ConfigRecord({"round": 3, "weights": b"w" * MEGABYTE})})
            identity = ask(grid, number, "train.step", asked)
            letter = node.receive()
            assert letter is not None
            assert (letter.kind, letter.run) == ("train.step", run)
            assert letter.content == asked
            assert node.receive() is None
            node.reply(letter, RecordDict({"answer": ConfigRecord({"said": b"r" * MEGABYTE})}))
            reply = answer(grid, identity)
    assert reply.content["answer"] == {"said": b"r" * MEGABYTE}
    assert not place.exchange.nodes()[0].online


def test_an_answer_is_kept_for_whoever_asks_though_its_node_has_left(
    place: Place, bundle: bytes
) -> None:
    """A node that stops in order answers first; whoever comes for the answer later gets it."""
    run = place.exchange.submit(bundle, {"spec": "{}"})
    node = place.node("north")
    number = node.activate()
    with Exchange(place.database).conducting(run) as grid:
        answered = ask(grid, number, "train.step", RecordDict())
        unanswered = ask(grid, number, "query.close", RecordDict())
        letter = node.receive()
        assert letter is not None
        assert letter.kind == "train.step"
        node.reply(letter, RecordDict({"answer": ConfigRecord({"said": "done"})}))
        node.close()
        assert not place.exchange.nodes()[0].online

        assert answer(grid, answered).content["answer"] == {"said": "done"}
        assert not answer(grid, unanswered).has_content()


def test_what_a_run_consists_of_comes_unopened(place: Place, bundle: bytes) -> None:
    run = place.exchange.submit(bundle, {"spec": "{}"})
    with place.node("north") as node:
        number = node.activate()
        with place.exchange.conducting(run) as grid:
            ask(grid, number, "query.invite", RecordDict())
            letter = node.receive()
            assert letter is not None
            said = node.bundle(letter.run)

    assert said.content == bundle
    assert said.app == "cloister/cloister-simulation"


def test_an_unregistered_key_is_refused_and_one_that_was_taken_away(place: Place) -> None:
    stranger = FleetLink(
        place.address, ec.generate_private_key(ec.SECP384R1()), None, most_bytes=MEGABYTE
    )
    with pytest.raises(LinkBusyError, match="does not know this node"):
        stranger.activate()
    with place.node("north") as node:
        number = node.activate()
        place.exchange.unregister(number)
        with pytest.raises(LinkRefusedError):
            node.receive()
        with pytest.raises(LinkRefusedError):
            node.beat()


def test_a_message_beyond_the_limit_is_refused_and_the_next_one_comes(
    place: Place, bundle: bytes
) -> None:
    run = place.exchange.submit(bundle, {"spec": "{}"})
    with place.node("north", most_bytes=MEGABYTE // 4) as node:
        number = node.activate()
        with place.exchange.conducting(run) as grid:
            heavy = RecordDict({"x": ConfigRecord({"weights": b"w" * MEGABYTE})})
            ask(grid, number, "train.step", heavy)
            letter = node.receive()
            assert letter is not None
            with pytest.raises(MessageError, match="more than"):
                letter.fetch()
            ask(grid, number, "query.close", RecordDict())
            letter = node.receive()
            assert letter is not None
            assert letter.kind == "query.close"


def weights(*sizes: int) -> ArrayRecord:
    """Arrays of so many numbers."""
    drawn = np.random.default_rng(0).normal
    return ArrayRecord({f"w{i}": Array(drawn(size=n).astype("f4")) for i, n in enumerate(sizes)})


def test_a_task_of_many_arrays_and_its_answer_are_four_requests(
    place: Place, bundle: bytes
) -> None:
    """Flower itself makes two of each array: 260 requests."""
    run = place.exchange.submit(bundle, {"spec": "{}"})
    with place.node("north") as node, place.exchange.conducting(run) as grid:
        number = node.activate()
        records = RecordDict({"task": ConfigRecord({"round": 1}), "weights": weights(*[9] * 60)})
        identity = ask(grid, number, "train.step", records)
        place.requests.clear()
        letter = node.receive()
        assert letter is not None
        node.reply(letter, letter.content)
        reply = answer(grid, identity)
    assert place.requests[:4] == ["pull-messages", "pull-object", "push-messages", "push-object"]
    assert place.requests[4:] == ["deactivate-node"]
    assert reply.content == records


def test_large_weights_cross_in_pieces_that_are_stored_once_and_go_when_they_are_answered(
    place: Place, bundle: bytes
) -> None:
    run = place.exchange.submit(bundle, {"spec": "{}"})
    shared = weights(2_000_000, 1_000_000)
    with (
        place.node("north", 16 * MEGABYTE) as north,
        place.node("south", 16 * MEGABYTE) as south,
        place.exchange.conducting(run) as grid,
    ):
        asked = {}
        for node in (north, south):
            records = RecordDict({"task": ConfigRecord({"round": 1}), "weights": shared})
            message = grid.create_message(records, "train.step", node.activate(), "", ttl=60.0)
            asked[node] = message
        identities = list(grid.push_messages(asked.values()))
        assert place.rows("SELECT COUNT(*) FROM objects") == [(2 + 3,)]
        for node, identity in zip(asked, identities, strict=True):
            letter = node.receive()
            assert letter is not None
            node.reply(letter, letter.content)
            assert answer(grid, identity).content["weights"] == shared
        assert place.rows("SELECT COUNT(*) FROM objects") == [(0,)]


def test_a_node_that_asks_gets_what_comes_a_moment_later(place: Place, bundle: bytes) -> None:
    run = place.exchange.submit(bundle, {"spec": "{}"})
    with place.node("north") as node, place.exchange.conducting(run) as grid:
        number = node.activate()
        later = threading.Timer(0.3, ask, (grid, number, "query.close", RecordDict()))
        later.start()
        place.requests.clear()
        letter = node.receive()
        later.join()
        assert letter is not None
        assert place.requests == ["pull-messages"]
        started = time.monotonic()
        assert node.receive() is None
        assert 0.9 < time.monotonic() - started < 30


def test_a_question_that_the_line_loses_is_asked_again(place: Place, bundle: bytes) -> None:
    """Flower gives a message out once, and has no word of whether it came."""

    async def lose(scope: Scope, receive: Receive, send: Send) -> None:
        async def nowhere(_: Any) -> None: ...

        await place.app(scope, receive, nowhere)
        raise ConnectionError("the line is cut")

    run = place.exchange.submit(bundle, {"spec": "{}"})
    with place.node("north") as node, place.exchange.conducting(run) as grid:
        number = node.activate()
        post = Post(grid, Clock(), Clock().now() + 60.0)
        place.twist["pull-messages"] = lose
        post.send("query.invite", {number: RecordDict({"x": ConfigRecord({"a": 1})})})
        with pytest.raises(LinkError):
            node.receive()
        place.twist.clear()
        assert node.receive() is None
        node.come_again()
        until, letter = time.monotonic() + 30.0, None
        while letter is None and time.monotonic() < until:
            assert not list(post.answers())
            letter = node.receive()
        assert letter is not None
        assert letter.content["x"] == {"a": 1}
        node.reply(letter, RecordDict())
        assert [of for of, _ in post.answers()] == [number]


def test_a_node_that_is_killed_is_held_for_alive_for_half_a_minute(place: Place) -> None:
    with place.node("north") as node:
        for sign in (node.activate, node.beat):
            sign()
            ((until,),) = place.rows("SELECT online_until FROM node")
            assert 20 < until - time.time() <= 30.5


@pytest.mark.parametrize("error", [LinkError, MessageError])
def test_a_part_that_is_cut_off_or_never_ends_is_given_up_and_can_be_asked_for_again(
    place: Place, bundle: bytes, error: type[Exception]
) -> None:
    async def cut_or_flood(scope: Scope, receive: Receive, send: Send) -> None:
        head = [(b"content-length", b"100000")] if error is LinkError else []
        await send({"type": "http.response.start", "status": 200, "headers": head})
        for _ in range(1 if error is LinkError else 100):
            body = b"x" * (MEGABYTE if error is MessageError else 10)
            await send({"type": "http.response.body", "body": body, "more_body": True})
        raise ConnectionError("the line is cut")

    run = place.exchange.submit(bundle, {"spec": "{}"})
    with place.node("north") as node, place.exchange.conducting(run) as grid:
        number = node.activate()
        ask(grid, number, "query.close", RecordDict({"x": ConfigRecord({"a": 1})}))
        letter = node.receive()
        assert letter is not None
        place.twist["pull-object"] = cut_or_flood
        with pytest.raises(error):
            letter.fetch()
        place.twist.clear()
        assert letter.content["x"] == {"a": 1}


def test_a_part_that_drips_is_given_up(
    place: Place, bundle: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("client.link._LONGEST_ANSWER", 1.0)
    over = threading.Event()

    async def drip(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        while not over.is_set():
            await send({"type": "http.response.body", "body": b"x", "more_body": True})
            await asyncio.sleep(0.1)

    run = place.exchange.submit(bundle, {"spec": "{}"})
    with place.node("north") as node, place.exchange.conducting(run) as grid:
        ask(grid, node.activate(), "query.close", RecordDict())
        letter = node.receive()
        assert letter is not None
        place.twist["pull-object"] = drip
        with pytest.raises(LinkError, match="more than 1 s"):
            letter.fetch()
        over.set()


@pytest.mark.parametrize(
    "path", ["/", "/docs", "/openapi.json", "/v1/control/start-run", "/v1/runtime/acquire-task"]
)
def test_only_the_fleet_api_is_there(place: Place, path: str) -> None:
    for call in (httpx.get, httpx.post):
        assert call(f"http://{place.address}{path}").status_code == 404


def test_a_run_is_conducted_once(place: Place, bundle: bytes) -> None:
    run = place.exchange.submit(bundle, {"spec": "{}"})
    other = Exchange(place.database)
    with (
        place.exchange.conducting(run),
        pytest.raises(RunError, match="conducted already"),
        other.conducting(run),
    ):
        pass
    with pytest.raises(RunError, match="over"), place.exchange.conducting(run):
        pass


def test_a_coordinator_that_is_not_there_or_talks_nonsense_is_an_error_of_ours() -> None:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        address = f"127.0.0.1:{server.getsockname()[1]}"
        key = ec.generate_private_key(ec.SECP384R1())

        def nonsense() -> None:
            peer, _ = server.accept()
            peer.recv(65536)
            peer.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nhello")
            peer.close()

        threading.Thread(target=nonsense, daemon=True).start()
        with pytest.raises(LinkError, match="nonsense"):
            FleetLink(address, key, None, most_bytes=MEGABYTE).activate()
    with pytest.raises(LinkError, match="cannot be reached"):
        FleetLink(address, key, None, most_bytes=MEGABYTE).activate()


def test_no_packed_answer_is_unpacked() -> None:
    """A few kilobytes of it could fill the memory."""
    bomb = gzip.compress(bytes(64 * MEGABYTE))
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"

        def peer() -> None:
            caller, _ = server.accept()
            assert b"accept-encoding: identity" in caller.recv(65536)
            head = f"HTTP/1.1 200 OK\r\ncontent-encoding: gzip\r\ncontent-length: {len(bomb)}"
            caller.sendall(f"{head}\r\n\r\n".encode() + bomb)
            caller.close()

        threading.Thread(target=peer, daemon=True).start()
        key = ec.generate_private_key(ec.SECP384R1())
        with pytest.raises(LinkError, match="packs its answer"):
            FleetLink(address, key, None, most_bytes=MEGABYTE).activate()


def test_no_redirect_is_followed_and_no_endless_answer_is_read() -> None:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        address = f"127.0.0.1:{server.getsockname()[1]}"
        link = FleetLink(address, ec.generate_private_key(ec.SECP384R1()), None, most_bytes=1000)
        asked: list[bytes] = []

        def peers() -> None:
            peer, _ = server.accept()
            asked.append(peer.recv(65536))
            head = f"HTTP/1.1 307 X\r\nlocation: http://{address}/away\r\n"
            peer.sendall(f"{head}content-length: 0\r\nconnection: close\r\n\r\n".encode())
            peer.close()
            peer, _ = server.accept()
            asked.append(peer.recv(65536))
            peer.sendall(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n")
            try:
                while True:
                    peer.sendall(b"10000\r\n" + b"x" * 65536 + b"\r\n")
            except OSError:
                pass

        threading.Thread(target=peers, daemon=True).start()
        with pytest.raises(LinkError, match="307"):
            link.activate()
        with pytest.raises(LinkError, match="more than"):
            link.activate()
    assert b"/away" not in asked[1]
