"""What an enrolled node may do to Flower's state: take what it was asked, and answer that once.

Flower's handlers know who is speaking, and believe the rest: an answer to nothing, as many parts
as somebody likes, the name of anything in the store. Here each request is held against what the
coordinator has asked this node. What one site can make the coordinator keep is then one answer
to each open question, within the run's bound; and when the disk is nearly full, nothing is taken
from anybody.
"""

from __future__ import annotations

import json
import math
import re
import shutil
import sqlite3
import threading
from collections import OrderedDict
from collections.abc import Callable, Set
from pathlib import Path
from typing import Any

from flwr.proto.fleet_pb2 import PushMessagesRequest
from flwr.proto.message_pb2 import (
    ConfirmMessageReceivedRequest,
    ObjectTree,
    PullObjectRequest,
    PushObjectRequest,
)
from flwr.supercore.utils import uint64_to_int64

from common.errors import PeerError

MOST_PARTS = 2100
"""Of an answer: one of `LARGEST_REPLY` has fewer (`common.parcel`)."""
LARGEST_REPLY = 2**33
"""Bytes of an answer, where the run says nothing else."""
BOUND = "largest-reply"
"""Under this name a run's configuration says how large an answer to it may be, in bytes."""
LEAST_FREE = 2**28
"""Bytes that stay free on the disk of the state, so that the coordinator can go on."""

_NAME = re.compile(r"[0-9a-f]{64}")
_LARGEST_HEAD = 4096
_OPEN_ANSWERS = 8
_KNOWN = 256
_BYTES = """
SELECT SUM(LENGTH(content)) FROM objects
WHERE object_id = ?1 OR object_id IN (SELECT child_id FROM object_children WHERE parent_id = ?1)
"""
_SENT_TO = """
SELECT 1 FROM message_ins WHERE dst_node_id = ?2 AND (message_id = ?1
    OR message_id IN (SELECT parent_id FROM object_children WHERE child_id = ?1)) LIMIT 1
"""


class RefusedError(PeerError):
    """A request that is not allowed.

    Attributes:
        status: of HTTP.
    """

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status


class Allowance:
    """Holds each request of a node against what it was asked; reads, and writes nothing.

    Args:
        database: Flower's state.
        free: bytes that are free on the disk of a file.
    """

    def __init__(
        self,
        database: Path,
        free: Callable[[Path], int] = lambda path: shutil.disk_usage(path.parent).free,
    ) -> None:
        self._path, self._free = database, free
        self._lock = threading.Lock()
        self._database: sqlite3.Connection | None = None
        self._bounds: OrderedDict[int, int] = OrderedDict()
        self._sizes: OrderedDict[str, dict[str, int]] = OrderedDict()

    def check(self, said: Any) -> None:
        """Check a request whose sender has proved that it is the node which it says.

        Raises:
            RefusedError: 401 for another's name, 403 for what the node was not asked, 400 for
                nonsense, 413 for too much, 429 for too many, 507 where the disk is nearly full.
        """
        match said:
            case PushMessagesRequest():
                self._check_room(said.ByteSize())
                self._check_answer(said)
                del said.clientapp_runtime_list[:]  # how long something took is nobody's business
            case PushObjectRequest():
                self._check_room(len(said.object_content))
                self._check_part(said)
            case PullObjectRequest():
                self._check_question(said.node.node_id, said.object_id)
            case ConfirmMessageReceivedRequest():
                if self._asked(said.message_object_id, said.node.node_id) is None:
                    raise RefusedError(403, "a message that was not sent to it")

    def _check_room(self, size: int) -> None:
        if self._free(self._path) - size < LEAST_FREE:
            raise RefusedError(507, "the coordinator's disk is nearly full")

    # --- Answers --------------------------------------------------------------------------------

    def _check_answer(self, said: PushMessagesRequest) -> None:
        if len(said.messages_list) != 1 or len(said.message_object_trees) != 1:
            raise RefusedError(401, "not one answer")
        (message,), (tree,) = said.messages_list, said.message_object_trees
        head = message.metadata
        if head.src_node_id != said.node.node_id:
            raise RefusedError(401, "an answer in another node's name")
        if message.ByteSize() > _LARGEST_HEAD or message.HasField("error"):
            raise RefusedError(400, "a head that no answer of ours has")
        if not (math.isfinite(head.created_at) and math.isfinite(head.ttl)):
            raise RefusedError(400, "an answer of no time")
        asked = self._asked(head.reply_to_message_id, said.node.node_id)
        if asked is None or asked != (uint64_to_int64(head.run_id), head.message_type):
            raise RefusedError(403, "an answer to what it was not asked, or is asked no longer")
        if tree.object_id != head.message_id:
            raise RefusedError(400, "an answer whose parts are another's")
        self._check_once(said.node.node_id, head, _pieces(tree))

    def _check_once(self, node: int, head: Any, pieces: Set[str]) -> None:
        """One answer to a question: sent again it is the same; and few wait to be fetched."""
        there = self._rows(
            "SELECT reply_to_message_id, message_id FROM message_res"
            " WHERE src_node_id = ? AND run_id = ?",
            uint64_to_int64(node),
            uint64_to_int64(head.run_id),
        )
        answers = dict(there)
        before = answers.get(head.reply_to_message_id)
        if before is None and head.message_id in answers.values():
            raise RefusedError(403, "one answer to two questions")
        if before is None and len(answers) >= _OPEN_ANSWERS:
            raise RefusedError(429, f"{len(answers)} answers that wait to be fetched")
        if before is not None and before != head.message_id:
            raise RefusedError(403, "a second answer to one question")
        if before is not None and self._announced(head.message_id) != pieces:
            raise RefusedError(403, "an answer that is sent again with other parts")

    def _announced(self, part: str) -> set[str]:
        """What a part that is known consists of."""
        found = self._rows("SELECT child_id FROM object_children WHERE parent_id = ?", part)
        return {name for (name,) in found}

    def _check_part(self, said: PushObjectRequest) -> None:
        """A part of an answer that is open, within the run's bound."""
        roots = self._rows(
            "SELECT root_object_id FROM object_push_session_roots"
            " JOIN message_res ON message_id = root_object_id"
            " WHERE session_id = ? AND src_node_id = ? AND run_id = ?",
            said.session_id,
            uint64_to_int64(said.node.node_id),
            uint64_to_int64(said.run_id),
        )
        if not roots:
            raise RefusedError(403, "a part of no answer of its own that is open")
        awaited = self._rows(
            "SELECT 1 FROM object_push_session_pending WHERE session_id = ? AND object_id = ?",
            said.session_id,
            said.object_id,
        )
        if not awaited:
            return  # it is there already; Flower says so
        self._count(said, roots[0][0])

    def _count(self, said: PushObjectRequest, root: str) -> None:
        """Each part once: one that could not be stored, or was slow, is sent again."""
        bound = self._bound(said.run_id)
        before = self._sizes.get(root) or {"": self._size(root)}
        sizes = before | {said.object_id: len(said.object_content)}
        if sum(sizes.values()) > bound:
            raise RefusedError(413, f"an answer of more than {bound} bytes")
        _remember(self._sizes, root, sizes)

    def _size(self, root: str) -> int:
        """Bytes that are there already, as before the service was started again."""
        return int(self._rows(_BYTES, root)[0][0] or 0)

    def _bound(self, run: int) -> int:
        if run not in self._bounds:
            found = self._rows(
                "SELECT override_config FROM run WHERE run_id = ?", uint64_to_int64(run)
            )
            said = json.loads(found[0][0]).get(BOUND) if found else None
            _remember(self._bounds, run, int(said or LARGEST_REPLY))
        return self._bounds[run]

    # --- Questions ------------------------------------------------------------------------------

    def _asked(self, message: str, node: int) -> tuple[int, str] | None:
        """Run and kind of a message that was sent to a node; None if it was not."""
        found = self._rows(
            "SELECT run_id, message_type FROM message_ins WHERE message_id = ? AND dst_node_id = ?",
            message,
            uint64_to_int64(node),
        )
        return (found[0][0], found[0][1]) if found else None

    def _check_question(self, node: int, part: str) -> None:
        """A part may be fetched by whom it was sent to; who knows its name alone may not."""
        if not self._rows(_SENT_TO, part, uint64_to_int64(node)):
            raise RefusedError(403, "a part of no message that was sent to it")

    def _rows(self, question: str, *values: Any) -> list[Any]:
        with self._lock:
            if self._database is None:
                path = self._path.absolute().as_uri()
                self._database = sqlite3.connect(
                    f"{path}?mode=ro", uri=True, check_same_thread=False
                )
            return self._database.execute(question, values).fetchall()


def _pieces(tree: ObjectTree) -> set[str]:
    """What an answer consists of, beside its first part.

    Raises:
        RefusedError: if it is too much, or not as answers of ours are.
    """
    if len(tree.children) >= MOST_PARTS:
        raise RefusedError(413, f"an answer of {len(tree.children)} parts, at most {MOST_PARTS}")
    found = {piece.object_id for piece in tree.children}
    names = found | {tree.object_id}
    if len(names) != 1 + len(tree.children) or any(piece.children for piece in tree.children):
        raise RefusedError(400, "an answer whose parts are not as they should be")
    if not all(_NAME.fullmatch(name) for name in names):
        raise RefusedError(400, "an answer of parts without names")
    return found


def _remember(known: OrderedDict[Any, Any], key: Any, value: Any) -> None:
    known[key] = value
    known.move_to_end(key)
    while len(known) > _KNOWN:
        known.popitem(last=False)
