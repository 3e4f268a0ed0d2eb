"""What goes wrong in a federation of processes: after each fault, nothing was spent twice, no round
was lost, and the record tells what happened."""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from server.runs import Run, Standing

Federation = Any
WrongClock = Any
pytestmark = pytest.mark.slow


def test_a_site_that_dies_is_late_with_the_reason_and_charged_for_what_it_had_begun(
    federation: Federation,
):
    with federation.in_round(1, "south", quorum="1", deadline_seconds="45.0") as run:
        federation.wait(lambda: federation.answered(run, 1, "north"), "north")
        federation.dies("south")
    federation.ends(run, Standing.FINISHED)
    assert federation.statuses(run, "south") == ["late"] * 3
    site = federation.rows(run)[-1]["sites"]["south"]
    assert site["reason"].startswith("not connected since 2")
    assert federation.charges("south", run) == 1
    federation.comes("south")


def test_a_slow_site_is_late_by_name_and_asked_again(federation: Federation):
    """It is connected, and in training, and not through when the round closes."""
    with federation.in_round(2, "south", quorum="1", deadline_seconds="40.0") as run:
        federation.wait(lambda: federation.answered(run, 2, "south"), "the deadline")
    federation.ends(run, Standing.FINISHED)
    assert federation.statuses(run, "south") == ["ok", "late", "ok"]
    late = federation.rows(run)[1]["sites"]["south"]
    assert late["reason"] == "no answer before the deadline"
    assert federation.charges("south", run) == 3  # it finished round 2, for nobody


def test_a_site_that_is_revoked_in_mid_run_is_out_at_once_and_in_the_record(
    federation: Federation,
):
    with federation.in_round(2, "south", quorum="1", deadline_seconds="600.0") as run:
        federation.wait(lambda: federation.answered(run, 2, "north"), "north")
        federation.revoke("south")
        federation.ends(run, Standing.FINISHED)  # nobody waits for its deadline
        gone = federation.running["south"].wait(600)
    rows = federation.rows(run)
    assert federation.statuses(run, "south") == ["ok", "failed", "failed"]
    assert federation.statuses(run, "north") == ["ok"] * 3
    for row in rows[1:]:
        assert row["sites"]["south"]["reason"].startswith("revoked at 2")
    assert gone == os.EX_NOPERM
    assert "revoked" in federation.log_of("south")
    assert "Invalid destination" not in (run.path / "conductor.log").read_text()  # not asked
    privacy = json.loads((run.path / "privacy.json").read_text())
    assert privacy["sites"]["south"]["rounds"] == 2  # it had its task of the second
    assert federation.charges("south", run) == 2

    federation.enrol("south")
    federation.comes("south")


def test_a_coordinator_whose_disk_is_full_takes_no_more_and_goes_on_when_it_is_not(
    federation: Federation, undisturbed: Run
):
    """The last room is the run's own: sites are sent away, keep their answers and come again."""
    refused = "is refused (507): the coordinator's disk is nearly full"
    disk = federation.disks["coordinator"]
    if not disk.is_real and os.environ.get("CI") != "true":
        pytest.skip("this machine allows no mounts, so no disk can be made small")
    with federation.in_round(2, "south") as run:
        conductor = federation.conductor(run)
        with disk.full(federation.service.pid, conductor):
            federation.let_go("south")
            for name in federation.sites:
                said = f"{name} {refused}"
                federation.wait(lambda said=said: said in federation.log_of("coordinator"), said)
            time.sleep(2.0)
            assert federation.service.poll() is None
            assert len(federation.rows(run)) == 1
    federation.ends(run, Standing.FINISHED)
    assert federation.service.poll() is None
    assert [row["round"] for row in federation.rows(run)] == [1, 2, 3]
    assert federation.weights(run.path) == federation.weights(undisturbed.path)
    assert [federation.charges(name, run) for name in federation.sites] == [3, 3]


def test_a_site_whose_disk_is_full_says_no_and_takes_part_when_it_is_not(federation: Federation):
    begun = len(federation.begun("south"))
    with federation.in_round(2, "south", quorum="1", rounds="4") as run:
        federation.hold("north", 3)
        with federation.disks["south"].full(*federation.family("south")[1:]):
            federation.let_go("south")
            federation.wait(lambda: federation.answered(run, 3, "south"), "south")
        federation.let_go("north")
    federation.ends(run, Standing.FINISHED)
    assert federation.statuses(run, "south") == ["ok", "refused", "refused", "ok"]
    assert federation.statuses(run, "north") == ["ok"] * 4
    assert federation.charges("south", run) == len(federation.begun("south")) - begun


@pytest.fixture
def copied(federation: Federation, tmp_path: Path) -> Iterator[str]:
    """The name of a site that is south's folder as it is now, on another machine."""
    shutil.copytree(federation.sites["south"], tmp_path / "south")
    federation.sites["copy"] = tmp_path / "south"
    yield "copy"
    federation.kill("copy")
    del federation.sites["copy"]


def test_a_copy_of_a_site_is_kept_out_and_what_it_has_not_booked_is_noticed(
    federation: Federation, copied: str
):
    federation.site(copied, another=5.0)
    run = federation.launch()
    federation.ends(run, Standing.FINISHED)
    assert federation.statuses(run, "south") == ["ok"] * 3
    assert federation.running[copied].wait(600) == os.EX_TEMPFAIL
    assert "another machine has a copy of it" in federation.log_of(copied)

    federation.leaves("south")
    federation.site(copied)  # its ledger knows nothing of that run
    federation.wait(lambda: not federation.missing, "the copy")
    run = federation.launch(quorum="1")
    federation.ends(run, Standing.FINISHED)
    assert [sorted(row["sites"]) for row in federation.rows(run)] == [["north"]] * 3
    declined = json.loads((run.path / "environment.json").read_text())["declined"]
    assert any("put back" in reason for reason in declined.values()), declined
    assert federation.charges(copied, run) == 0
    assert "train.step" not in federation.heard(copied)

    federation.leaves(copied)
    federation.comes("south")


def test_a_site_whose_clock_is_an_hour_off_is_told_so_and_takes_part_when_it_is_right(
    federation: Federation, clock: WrongClock
):
    federation.leaves("south")
    clock.set(3600)
    heard, opened, since = federation.heard("south"), federation.opened("south"), time.monotonic()
    federation.site("south", **clock.environment)
    for ahead, said in ((3600, r"\+3\d\d\d"), (-3600, r"-3\d\d\d")):
        clock.set(ahead)
        trouble = re.compile(f"because of its clock, which is {said} s off")
        federation.wait(lambda t=trouble: t.search(federation.trouble("south")), str(ahead))
    assert federation.running["south"].poll() is None
    run = federation.launch(quorum="1")
    federation.ends(run, Standing.FINISHED)
    assert [sorted(row["sites"]) for row in federation.rows(run)] == [["north"]] * 3
    declined = json.loads((run.path / "environment.json").read_text())["declined"]
    assert declined["south"].startswith("not connected since 2")
    assert (federation.charges("south", run), federation.heard("south")) == (0, heard)
    tries, seconds = federation.opened("south") - opened, time.monotonic() - since
    assert 2 <= tries <= 3 + seconds  # a second and more between two: it waits, and does not loop

    clock.set(0)
    federation.wait(lambda: not federation.missing, "south")
    run = federation.launch()
    federation.ends(run, Standing.FINISHED)
    assert federation.statuses(run, "south") == ["ok"] * 3
    federation.leaves("south")
    federation.comes("south")
