"""Messages to nodes, and their answers, by Flower's Grid."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from flwr.app import Message, RecordDict
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid

from common.clock import Clock

log = logging.getLogger("cloister.post")

_LONGEST_SLEEP, _SLEEP_SHARE = 0.25, 0.01
_LOOK_SECONDS = 1.0


@dataclass
class _Asked:
    """What a node was asked.

    Attributes:
        end: when its answer is waited for no longer.
        since: when its process said that it is there, as Flower has it; another process of the
            node knows nothing of a message that an earlier one took.
        away: whether it went before it answered; it is asked again when it is back.
        awaited: whether it is waited for while it is away.
    """

    kind: str
    records: RecordDict
    end: float
    since: str
    away: bool = False
    awaited: bool = True


class Post:
    """Messages to nodes, and their answers: each once, as it comes, until the deadline.

    A node that goes before it has answered, and comes back, is asked again; it is waited for. One
    that was not there in the first place is not, unless without it too few are; it is asked when
    it comes.

    One reply is held at a time, as far as the Grid's own `pull_messages` goes.

    Args:
        grid: carries the messages.
        clock: time.
        deadline: when waiting ends, by the clock.
        least: as long as fewer nodes than this are there, those that are away are waited for.
    """

    def __init__(self, grid: Grid, clock: Clock, deadline: float, *, least: int = 0) -> None:
        self._grid, self._clock, self._deadline, self._least = grid, clock, deadline, least
        self._started = self._looked = clock.now()
        self._unsent: list[int] = []
        self._asked: dict[int, _Asked] = {}
        self._sent: dict[str, int] = {}
        self._quiet = False

    def send(
        self, kind: str, requests: Mapping[int, RecordDict], *, patience: float = math.inf
    ) -> None:
        """Send each node its request, and wait at most `patience` seconds for the answer to it."""
        if not requests:
            return
        end = min(self._deadline, self._clock.now() + patience)
        here = self._here()
        enough = len(here.keys() & requests.keys()) >= self._least
        for node, records in requests.items():
            there = node in here
            since = here.get(node, "")
            self._asked[node] = _Asked(kind, records, end, since, not there, there or not enough)
        self._push(list(requests))

    @property
    def open(self) -> bool:
        """Whether an answer can still come."""
        waits = any(each.awaited for each in self._asked.values())
        return (waits and self._clock.now() < self._deadline) or bool(self._unsent)

    @property
    def waits(self) -> tuple[int, ...]:
        """The nodes whose answer has not come."""
        return tuple(self._asked)

    def answers(self) -> Iterator[tuple[int, RecordDict | None]]:
        """What has come since the last time.

        None for a node whose message could not be sent, that answers with an error, or with
        which the patience, not the deadline, is at its end.
        """
        unsent, self._unsent = self._unsent, []
        yield from ((node, None) for node in unsent)
        self._quiet = not unsent
        if not self._asked:
            return
        self._ask_again()
        for reply in self._grid.pull_messages(list(self._sent)):
            node = self._sent.pop(reply.metadata.reply_to_message_id, None)
            if node is None or self._gone(node, reply) or self._expired(node, reply):
                continue
            self._quiet = False
            del self._asked[node]
            yield node, _content(reply)
        now = self._clock.now()
        for node in [n for n, each in self._asked.items() if each.end <= now < self._deadline]:
            self.forget(node)
            yield node, None

    def rest(self) -> None:
        """Sleep a moment, unless something has just come or nothing is waited for."""
        if self._quiet and self._asked:
            passed = self._clock.now() - self._started
            self._clock.sleep(min(_LONGEST_SLEEP, max(0.001, _SLEEP_SHARE * passed)))

    def _push(self, nodes: list[int]) -> None:
        now = self._clock.now()
        messages = []
        for node in nodes:
            each = self._asked[node]
            ttl = max(1.0, each.end - now)
            made = self._grid.create_message(each.records, each.kind, node, group_id="", ttl=ttl)
            messages.append(made)
        try:
            identities = list(self._grid.push_messages(messages)) or [""] * len(messages)
        except ValueError:
            # Flower raises where a message's time ran out on its way: nobody waits for it then.
            if all(self._asked[node].end > self._clock.now() for node in nodes):
                raise
            log.warning("the time of what was asked ran out before it could be sent")
            return
        for identity, node in zip(identities, nodes, strict=True):
            if identity:
                self._sent[identity] = node
            else:
                self._unsent.append(node)
                del self._asked[node]

    def _gone(self, node: int, reply: Message) -> bool:
        """Whether this only says that the node went before it could answer."""
        if not reply.has_error() or reply.error.code != ErrorCode.NODE_UNAVAILABLE:
            return False
        self._asked[node].away = True
        return True

    def _expired(self, node: int, reply: Message) -> bool:
        """Whether this only says that the time ran out while the answer was on its way."""
        return bool(reply.has_error()) and self._clock.now() >= self._asked[node].end

    def _ask_again(self) -> None:
        """Send what was asked to nodes that are back, and to those that were started anew."""
        now = self._clock.now()
        if now - self._looked < _LOOK_SECONDS:
            return
        self._looked = now
        here, back = self._here(), []
        for node, each in self._asked.items():
            if node in here and (each.away or here[node] != each.since):
                each.away, each.awaited, each.since = False, True, here[node]
                back.append(node)
        if back:
            self._sent = {i: node for i, node in self._sent.items() if node not in back}
            self._push(back)

    def forget(self, node: int) -> None:
        """Wait for this node no longer."""
        del self._asked[node]
        self._sent = {identity: other for identity, other in self._sent.items() if other != node}

    def _here(self) -> dict[int, str]:
        return {node.node_id: node.last_activated_at for node in self._grid.get_nodes()}


def names_of(grid: Grid) -> Callable[[int], str]:
    """How people call a node: by the name under which it was enrolled, where it has one."""
    names = {node.node_id: node.name for node in grid.get_nodes()}
    return lambda node_id: names.get(node_id) or f"node {node_id}"


def _content(reply: Message) -> RecordDict | None:
    return reply.content if reply.has_content() else None
