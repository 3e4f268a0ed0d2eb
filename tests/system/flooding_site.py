"""An enrolled site that has gone bad: it sends its coordinator whatever it takes, without end.

`python flooding_site.py HOME TALLY`: with the identity in HOME it answers what it is asked with far
too much, answers again with something else, answers what nobody asked, goes and comes, and begins
anew. How many bytes it has offered is in the file TALLY.
"""

from __future__ import annotations

import hashlib
import os
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
from flwr.app import RecordDict
from flwr.common.serde import message_to_proto
from flwr.proto.fleet_pb2 import DeactivateNodeRequest, PushMessagesRequest
from flwr.proto.message_pb2 import ObjectTree, PushObjectRequest
from flwr.proto.node_pb2 import Node

from client.credentials import Credentials
from client.link import Answer, FleetLink, Letter
from common.errors import LinkError
from common.parcel import Parcel

PIECE = 4 * 2**20
PIECES = 100
offered, counting = [0], threading.Lock()


def part() -> bytes:
    body = os.urandom(PIECE)
    return b"ArrayChunk  %d\0%b" % (len(body), body)


class Flood:
    """One connection of many."""

    def __init__(self, home: Path) -> None:
        found = Credentials.open(home)
        address = found.address.removeprefix("https://")
        self.link = FleetLink(
            address, found.private_key, found.ssl_context(), most_bytes=1000 * PIECE
        )
        self.client: Any = self.link._client

    def come(self) -> None:
        with suppress(LinkError):
            self.node = Node(node_id=self.link.activate())

    def answer(self, letter: Letter) -> None:
        """With a hundred parts of 4 MiB, and then with others, and others."""
        honest = Answer(letter, Parcel.of(RecordDict()))
        for _ in range(3):
            parts = [part() for _ in range(3)]
            names = [hashlib.sha256(each).hexdigest() for each in parts]
            names += [hashlib.sha256(os.urandom(8)).hexdigest() for _ in range(PIECES)]
            tree = ObjectTree(
                object_id=honest.parcel.identity, children=[ObjectTree(object_id=n) for n in names]
            )
            request = PushMessagesRequest(
                node=self.node,
                messages_list=[message_to_proto(honest.message)],
                message_object_trees=[tree],
            )
            session = self.say(self.client.PushMessages, request)
            for _ in range(PIECES if session else 3):
                each = parts.pop() if parts else part()
                self.push(letter.run, session.session_id if session else "", each)
            honest.message.metadata.__dict__["_reply_to_message_id"] = "0" * 64

    def push(self, run: int, session: str, content: bytes) -> None:
        name = hashlib.sha256(content).hexdigest()
        said = PushObjectRequest(
            node=self.node, run_id=run, session_id=session, object_id=name, object_content=content
        )
        self.say(self.client.PushObject, said)

    def say(self, call: Any, request: Any) -> Any:
        with counting:
            offered[0] += request.ByteSize()
        with suppress(httpx.HTTPError, RuntimeError):
            return call(request)

    def leave(self) -> None:
        with suppress(httpx.HTTPError, RuntimeError):
            self.client.DeactivateNode(DeactivateNodeRequest(node_id=self.node.node_id))


def flood(home: Path) -> None:
    one = Flood(home)
    while True:
        one.come()
        with suppress(LinkError, AttributeError):
            letter = one.link.receive()
            if letter is None:
                one.push(1, "", part())
            else:
                one.answer(letter)
                one.leave()


def main(home: Path, tally: Path) -> None:
    for _ in range(4):
        threading.Thread(target=flood, args=(home,), daemon=True).start()
    while True:
        written = tally.with_suffix(".partial")
        written.write_text(str(offered[0]))
        written.rename(tally)
        time.sleep(0.2)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
