"""A coordinator that answers as no server does; the node is on the other end of a real socket."""

from __future__ import annotations

import math
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.proto.fab_pb2 import Fab, GetFabResponse
from flwr.proto.fleet_pb2 import (
    ActivateNodeResponse,
    PullMessagesResponse,
    PushMessagesResponse,
)
from flwr.proto.message_pb2 import Message, Metadata, ObjectTree, PullObjectResponse
from flwr.proto.recorddict_pb2 import RecordDict as RecordDictProto

from client import link as module
from client.link import Answer, FleetLink, Letter
from common.errors import LinkError, MessageError, RefusalCode
from common.messages import RefusalReply
from common.parcel import Parcel

KIND = "application/protobuf"
Says = Callable[[str, bytes], bytes]


def answer(body: bytes = b"", *heads: str, status: str = "200 OK") -> bytes:
    lines = [f"HTTP/1.1 {status}", f"content-type: {KIND}", f"content-length: {len(body)}", *heads]
    return "\r\n".join([*lines, "", ""]).encode() + body


class Coordinator:
    """Answers each request with what `says` says of its path and body; keeps their heads."""

    def __init__(self) -> None:
        self.says: Says = lambda path, body: answer()
        self.heads: list[str] = []
        self.bodies: list[tuple[str, bytes]] = []
        self.pieces: Callable[[socket.socket, bytes], None] = socket.socket.sendall
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._socket.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._socket.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                line, _ = self._socket.accept()
                threading.Thread(target=self._speak, args=(line,), daemon=True).start()

    def _speak(self, line: socket.socket) -> None:
        with suppress(OSError, ValueError), line, line.makefile("rb") as read:
            while first := read.readline():
                head = b"".join(iter(read.readline, b"\r\n")).decode()
                self.heads.append(head)
                lengths = [x.partition(":")[2] for x in head.lower().split("\r\n")
                           if x.startswith("content-length")]  # fmt: skip
                body = read.read(int(lengths[0])) if lengths else b""
                path = first.split()[1].decode().rpartition("/")[2]
                self.bodies.append((path, body))
                if path == "activate-node":
                    line.sendall(answer(ActivateNodeResponse(node_id=7).SerializeToString()))
                else:
                    self.pieces(line, self.says(path, body))


@pytest.fixture
def coordinator() -> Iterator[Coordinator]:
    made = Coordinator()
    yield made
    made.close()


@pytest.fixture
def link(coordinator: Coordinator, monkeypatch: pytest.MonkeyPatch) -> Iterator[FleetLink]:
    """One that waits for a byte of an answer for seconds, not for half a minute."""
    monkeypatch.setattr(module, "_SECONDS", 5.0)
    with FleetLink(
        coordinator.address, ec.generate_private_key(ec.SECP384R1()), None, most_bytes=2**20
    ) as made:
        made.activate()
        yield made


def asked(tree: ObjectTree | None = None, /, **changes: Any) -> bytes:
    """A message as an honest coordinator announces it, with changes of its head."""
    head: dict[str, Any] = {
        "run_id": 3, "message_id": "a" * 64, "src_node_id": 1, "dst_node_id": 7,
        "message_type": "train.step", "ttl": 60.0, "created_at": time.time(),
    }  # fmt: skip
    made = PullMessagesResponse(
        messages_list=[Message(metadata=Metadata(**head | changes), content=RecordDictProto())],
        message_object_trees=[tree or ObjectTree(object_id="a" * 64)],
    )
    return bytes(made.SerializeToString())


def field(made: Any, name: str, content: bytes) -> bytes:
    """A field of a message, whatever is in it (the encoding of protocol buffers)."""
    head, size = made.DESCRIPTOR.fields_by_name[name].number << 3 | 2, len(content)
    length = b""
    while size > 0x7F:
        length, size = length + bytes([size & 0x7F | 0x80]), size >> 7
    return bytes([head]) + length + bytes([size]) + content


def nested(depth: int) -> bytes:
    tree = b""
    for _ in range(depth):
        tree = field(ObjectTree, "children", tree)
    return field(PullMessagesResponse, "message_object_trees", tree)


BAD: dict[str, bytes] = {
    "no body at all": b"HTTP/1.1 200 OK\r\n\r\n",
    "no HTTP": b"SSH-2.0-OpenSSH_9.6\r\n",
    "another protocol": b"HTTP/1.1 101 Switching Protocols\r\nupgrade: x\r\n\r\n",
    "a redirect": answer(status="307 Temporary Redirect").replace(
        b"\r\n\r\n", b"\r\nlocation: http://127.0.0.1:1/elsewhere\r\n\r\n"
    ),
    "two lengths": b"HTTP/1.1 200 OK\r\ncontent-length: 3\r\ncontent-length: 4\r\n\r\nabcd",
    "a head without end": b"HTTP/1.1 200 OK\r\nx: " + b"a" * 2**20,
    "heads without end": b"HTTP/1.1 200 OK\r\n" + b"x: y\r\n" * 2**18,
    "a chunk without end": b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n" + b"f" * 2**17,
    "a packed answer": answer(b"\x1f\x8b", "content-encoding: gzip"),
    "no protobuf": answer(b"\xff" * 1000),
    "a deep tree": answer(nested(20_000)),
    "a message without a tree": answer(
        PullMessagesResponse(messages_list=[Message(metadata=Metadata())]).SerializeToString()
    ),
    "a message without a head": answer(
        PullMessagesResponse(
            messages_list=[Message()], message_object_trees=[ObjectTree()]
        ).SerializeToString()
    ),
    "an error": answer(b'{"detail": "' + b"x" * 10**6 + b'"}', status="500 No"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_answer_is_an_error_of_ours_and_the_next_one_is_read(
    coordinator: Coordinator, link: FleetLink, name: str
):
    coordinator.says = lambda path, body: BAD[name]
    with suppress(LinkError):
        letter = link.receive()
        assert letter is not None
        assert letter.kind == ""
    coordinator.says = lambda path, body: answer(asked())
    found = link.receive()
    assert found is not None
    assert found.kind == "train.step"


@pytest.mark.parametrize("name", ["no protobuf", "a packed answer", "an error"])
def test_whatever_is_said_to_a_node_that_leaves_it_leaves(coordinator: Coordinator, name: str):
    """It leaves for a new certificate as well, and is to come back."""
    with FleetLink(
        coordinator.address, ec.generate_private_key(ec.SECP384R1()), None, most_bytes=2**20
    ) as link:
        link.activate()
        coordinator.says = lambda path, body: BAD[name]
    assert coordinator.bodies[-1][0] == "deactivate-node"


@pytest.mark.parametrize("which", ["ttl", "created_at"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e308, -1e308])
def test_a_time_that_is_none_ends_by_itself(
    coordinator: Coordinator, link: FleetLink, which: str, value: float
):
    coordinator.says = lambda path, body: answer(asked(**{which: value}))
    letter = link.receive()
    assert letter is not None
    assert 0 <= letter.ends - time.monotonic() + 1 <= 9 * 86_400
    assert 0 <= letter.lifetime <= 8 * 86_400


def test_informational_answers_without_end_are_given_up(
    coordinator: Coordinator, link: FleetLink, monkeypatch: pytest.MonkeyPatch
):
    """Each is read with a patience of its own: without an end to them all the node would hang."""
    monkeypatch.setattr(module, "_LONGEST_ANSWER", 2.0)

    def on_and_on(line: socket.socket, said: bytes) -> None:
        until = time.monotonic() + 20
        while time.monotonic() < until:
            line.sendall(b"HTTP/1.1 103 Early Hints\r\nlink: x\r\n\r\n")
            time.sleep(0.05)

    coordinator.pieces = on_and_on
    began = time.monotonic()
    with pytest.raises(LinkError):
        link.receive()
    assert time.monotonic() - began < 15
    coordinator.pieces = socket.socket.sendall
    coordinator.says = lambda path, body: answer(asked())
    assert link.receive() is not None


def test_a_head_that_drips_is_given_up(
    coordinator: Coordinator, link: FleetLink, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(module, "_LONGEST_ANSWER", 2.0)

    def drips(line: socket.socket, said: bytes) -> None:
        line.sendall(b"HTTP/1.1 200 OK\r\nx: ")
        until = time.monotonic() + 20
        while time.monotonic() < until:
            line.sendall(b"a")
            time.sleep(0.05)

    coordinator.pieces = drips
    began = time.monotonic()
    with pytest.raises(LinkError):
        link.receive()
    assert time.monotonic() - began < 15
    coordinator.pieces = socket.socket.sendall
    coordinator.says = lambda path, body: answer(asked())
    assert link.receive() is not None


def test_nothing_that_it_is_told_to_keep_is_kept_or_told_again(
    coordinator: Coordinator, link: FleetLink
):
    coordinator.says = lambda path, body: answer(
        asked(), "set-cookie: who=north; path=/", "flwr-version-incompatibility-message: x"
    )
    for _ in range(3):
        link.receive()
    assert not any("cookie" in head.lower() for head in coordinator.heads)
    assert not any("who=north" in head for head in coordinator.heads)


def letter_of(link: FleetLink, coordinator: Coordinator, tree: ObjectTree | None = None) -> Letter:
    coordinator.says = lambda path, body: answer(asked(tree))
    found = link.receive()
    assert found is not None
    return found


def test_a_list_of_parts_without_end_is_refused_before_one_is_asked_for(
    coordinator: Coordinator, link: FleetLink
):
    parts = [ObjectTree(object_id=f"{number:064x}") for number in range(100_001)]
    letter = letter_of(link, coordinator, ObjectTree(object_id="a" * 64, children=parts))
    with pytest.raises(MessageError, match="parts"):
        letter.fetch()
    assert not [path for path, _ in coordinator.bodies if path == "pull-object"]


def test_parts_that_are_larger_than_was_agreed_are_not_kept(
    coordinator: Coordinator, link: FleetLink
):
    letter = letter_of(link, coordinator)
    large = PullObjectResponse(
        object_found=True, object_available=True, object_content=b"x" * (2**20 + 1)
    ).SerializeToString()
    coordinator.says = lambda path, body: answer(large)
    with pytest.raises(MessageError, match="more than"):
        letter.fetch()


def test_a_bundle_without_end_is_no_message_of_ours_and_is_not_fetched_again(
    coordinator: Coordinator, link: FleetLink
):
    large = GetFabResponse(fab=Fab(content=b"x" * 2 * 2**20)).SerializeToString()
    coordinator.says = lambda path, body: answer(large if path == "get-fab" else b"")
    with pytest.raises(MessageError, match="more than"):
        link.bundle(3)


def test_a_coordinator_gets_no_part_but_those_of_the_answer(
    coordinator: Coordinator, link: FleetLink
):
    """It says what it still needs; what it says is a choice among what is sent, and no order."""
    letter = letter_of(link, coordinator)
    records = RefusalReply(code=RefusalCode.MALFORMED).to_records()
    made = Answer(letter, Parcel.of(records))
    said = PushMessagesResponse(
        objects_to_push=["/etc/passwd", "b" * 64, made.parcel.identity], session_id="s"
    ).SerializeToString()
    coordinator.says = lambda path, body: answer(said)
    with suppress(LinkError, MessageError):
        link.send(made)
    pushed = [body for path, body in coordinator.bodies if path == "push-object"]
    assert all(made.parcel.objects[made.parcel.identity] in body for body in pushed)
    assert pushed
