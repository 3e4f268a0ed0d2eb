"""What carries messages on one machine: each reply once, to who asked for it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from flwr.app import ConfigRecord, Message, RecordDict

from common.errors import RefusalCode
from common.messages import INVITE, RefusalReply, read_reply
from deploy.local_engine import ClientAppAt, LocalGrid

NOWHERE = ClientAppAt("deploy.simulation", "client_app", {"simulation": "/nowhere"})


@pytest.fixture
def grid() -> Iterator[LocalGrid]:
    """Three sites of one process; each answers that it cannot open its run."""
    with LocalGrid(["a", "b", "c"], NOWHERE, workers=0) as made:
        yield made


def asked(grid: LocalGrid, node: int) -> Message:
    content = RecordDict({"odd": ConfigRecord({"a": 1})})
    return grid.create_message(content, INVITE, node, group_id="")


def test_sites_are_nodes_with_names(grid: LocalGrid):
    assert list(grid.get_node_ids()) == [1, 2, 3]
    assert [node.name for node in grid.get_nodes()] == ["a", "b", "c"]


def test_each_reply_comes_once_and_to_who_asked_for_it(grid: LocalGrid):
    first, second = grid.push_messages([asked(grid, 1), asked(grid, 2)])
    assert first != second
    assert list(grid.pull_messages(["unknown"])) == []
    replies = [*grid.pull_messages([second]), *grid.pull_messages([second])]
    assert [reply.metadata.reply_to_message_id for reply in replies] == [second]
    assert [reply.metadata.src_node_id for reply in replies] == [2]
    assert read_reply(replies[0].content) == RefusalReply(code=RefusalCode.MALFORMED)
    assert [r.metadata.reply_to_message_id for r in grid.pull_messages([first, second])] == [first]
    assert list(grid.pull_messages([first, second])) == []


def test_a_reply_that_nobody_fetched_is_forgotten_when_its_site_is_asked_again(grid: LocalGrid):
    (late,) = grid.push_messages([asked(grid, 1)])
    (other,) = grid.push_messages([asked(grid, 2)])
    list(grid.pull_messages([other]))
    list(grid.pull_messages([other]))
    (again,) = grid.push_messages([asked(grid, 1)])
    assert [r.metadata.reply_to_message_id for r in grid.pull_messages([again])] == [again]
    assert list(grid.pull_messages([late])) == []


def test_waiting_without_a_bound_is_not_offered(grid: LocalGrid):
    with pytest.raises(NotImplementedError, match="push_messages and pull_messages"):
        grid.send_and_receive([])
