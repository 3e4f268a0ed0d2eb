"""The runs on disk, as other processes see them."""

from __future__ import annotations

from pathlib import Path

from server.rounds import LogObserver
from server.runs import EventLog, Follower, Run


class Told(LogObserver):
    """Keeps which rounds it is told of."""

    def __init__(self) -> None:
        self.rounds: list[int] = []

    def round_opened(self, number: int) -> None:
        self.rounds.append(number)


def test_a_line_that_a_full_disk_has_cut_takes_no_other_with_it(tmp_path: Path):
    path, told = tmp_path / "events.jsonl", Told()
    follower = Follower(Run(tmp_path), told)
    EventLog(path, LogObserver()).round_opened(1)
    with path.open("ab") as file:
        file.write(path.read_bytes()[:30])
    follower.follow()
    for number in (2, 3):  # by the next conductor, and by the one after it
        EventLog(path, LogObserver()).round_opened(number)
        follower.follow()
    assert told.rounds == [1, 2, 3]


def test_who_watches_a_run_that_is_resumed_is_told_nothing_of_what_failed(tmp_path: Path):
    run, told = Run(tmp_path), Told()
    assert run.told == 0
    path = tmp_path / "events.jsonl"
    EventLog(path, LogObserver()).round_opened(1)
    follower = Follower(run, told, run.told)
    EventLog(path, LogObserver()).round_opened(2)
    follower.follow()
    assert told.rounds == [2]
