"""Messages to nodes, and their answers, by Flower's Grid."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from common.clock import Clock

_LONGEST_SLEEP, _SLEEP_SHARE = 0.25, 0.01


class Post:
    """Messages to nodes, and their answers: each once, as it comes, until the deadline.

    One reply is held at a time, as far as the Grid's own `pull_messages` goes.
    """

    def __init__(self, grid: Grid, clock: Clock, deadline: float) -> None:
        self._grid, self._clock, self._deadline = grid, clock, deadline
        self._started = clock.now()
        self._unsent: list[int] = []
        self._sent: dict[str, tuple[int, float]] = {}
        self._quiet = False

    def send(
        self, kind: str, requests: Mapping[int, RecordDict], *, patience: float = math.inf
    ) -> None:
        """Send each node its request, and wait at most `patience` seconds for the answer to it."""
        if not requests:
            return
        now = self._clock.now()
        end = min(self._deadline, now + patience)
        messages = [
            self._grid.create_message(records, kind, node, group_id="", ttl=max(1.0, end - now))
            for node, records in requests.items()
        ]
        identities = list(self._grid.push_messages(messages)) or [""] * len(messages)
        for identity, node in zip(identities, requests, strict=True):
            if identity:
                self._sent[identity] = node, end
            else:
                self._unsent.append(node)

    @property
    def open(self) -> bool:
        """Whether an answer can still come."""
        waits = bool(self._sent) and self._clock.now() < self._deadline
        return waits or bool(self._unsent)

    def answers(self) -> Iterator[tuple[int, RecordDict | None]]:
        """What has come since the last time.

        None for a node whose message could not be sent, that answers with an error, or with
        which the patience, not the deadline, is at its end.
        """
        unsent, self._unsent = self._unsent, []
        yield from ((node, None) for node in unsent)
        self._quiet = not unsent
        if not self._sent:
            return
        for reply in self._grid.pull_messages(list(self._sent)):
            node, _ = self._sent.pop(reply.metadata.reply_to_message_id, (None, 0.0))
            if node is not None:
                self._quiet = False
                yield node, _content(reply)
        now = self._clock.now()
        for identity in [i for i, (_, end) in self._sent.items() if end <= now < self._deadline]:
            yield self._sent.pop(identity)[0], None

    def rest(self) -> None:
        """Sleep a moment, unless something has just come or nothing is waited for."""
        if self._quiet and self._sent:
            passed = self._clock.now() - self._started
            self._clock.sleep(min(_LONGEST_SLEEP, max(0.001, _SLEEP_SHARE * passed)))


def names_of(grid: Grid) -> Callable[[int], str]:
    """How people call a node: by the name under which it was enrolled, where it has one."""
    names = {node.node_id: node.name for node in grid.get_nodes()}
    return lambda node_id: names.get(node_id) or f"node {node_id}"


def _content(reply: Message) -> RecordDict | None:
    return reply.content if reply.has_content() else None
