"""A site that has gone bad floods its coordinator while a run is going; each in its own process."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from server.runs import Standing

PROGRAM = Path(__file__).with_name("flooding_site.py")
MEGABYTE = 2**20
MOST = 400 * MEGABYTE
"""What one site may make the coordinator keep: an answer to each open question of a small run is
at most 64 MiB, and a few lie there at once; and as much again that SQLite has not yet put away."""


def stored(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("flower.sqlite*"))


@pytest.mark.slow
def test_a_site_that_floods_the_coordinator_neither_fills_its_disk_nor_ends_the_run(
    federation: Any, tmp_path: Path
):
    home, tally = federation.home, tmp_path / "tally"
    before = stored(home.service)
    federation.leaves("south")
    words = [sys.executable, str(PROGRAM), str(federation.sites["south"]), str(tally)]
    federation._start(words, "south")
    federation.wait(lambda: tally.exists() and int(tally.read_text()) > 0, "the flood")

    run = federation.launch(quorum="1", deadline_seconds="90.0")
    peaks = []

    def over() -> bool:
        peaks.append(stored(home.service))
        return run.state.standing not in (Standing.QUEUED, Standing.RUNNING, Standing.WAITING)

    federation.wait(over, "the run's end")
    federation.kill("south")
    assert run.state.standing is Standing.FINISHED, (run.state, *federation.told(run))
    assert federation.statuses(run, "north") == ["ok", "ok", "ok"]
    assert federation.charges("north", run) == 3
    assert run.state.deaths == 0
    assert not any(
        row["sites"].get("south", {}).get("status") == "ok" for row in federation.rows(run)
    )
    offered = int(tally.read_text())
    assert max(peaks) - before < MOST, (max(peaks), before, offered)
    assert offered > MOST / 4, "no flood"
    assert "south is refused (4" in federation.log_of("coordinator")

    federation.comes("south")
    federation.ends(honest := federation.launch(), Standing.FINISHED)
    assert federation.statuses(honest, "south") == ["ok", "ok", "ok"]
