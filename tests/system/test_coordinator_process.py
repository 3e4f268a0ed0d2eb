"""Runs of the coordinator's process with two nodes: from enrolment to the report, and resumed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from typing import Any

import pytest

from common.package import Package
from server.roster import read_authority
from server.runs import Run, Standing

pytestmark = pytest.mark.slow

Federation = Any


def test_a_run_from_enrolment_to_its_report(federation: Federation, undisturbed: Run):
    rows = federation.rows(undisturbed)
    assert [row["round"] for row in rows] == [1, 2, 3]
    assert all(site["status"] == "ok" for row in rows for site in row["sites"].values())
    assert {name for row in rows for name in row["sites"]} == {"north", "south"}
    assert (undisturbed.path / "report.html").stat().st_size > 1000
    authority = read_authority(federation.home.path)
    federation.wait((undisturbed.path / "package").exists, "the package")  # the end comes before
    model = Package.open(undisturbed.path / "package", authority=authority)
    assert model.signer is not None
    assert model.network()
    for name in federation.sites:
        heard = federation.heard(name)
        assert heard == ["query.invite", *["train.step"] * 3, "query.close"]
        assert federation.charges(name, undisturbed) == 3
    assert undisturbed.name in (listed := federation.command("runs"))
    assert "3 of 3" in listed
    status = federation.command("status")
    assert "The service runs." in status
    assert status.count("connected") == 2
    assert "!!" not in federation.command("doctor").replace("!!  disk", "")


def test_the_model_is_that_of_a_simulation_of_the_same_run(
    federation: Federation, undisturbed: Run
):
    """The simulation has the same cohorts and draws the same noise, and no network."""
    path, runs = federation.folder / "simulation.toml", federation.folder / "simulated"
    sites = "".join(
        f'[[simulation.site]]\nname = "{name}"\ndeclared_size = 40\n'
        f'cohort = "{federation.folder / f"cohort-{name}"}"\n'
        for name in federation.sites
    )
    table = f'[simulation]\nevaluation = "{federation.home.evaluation}"\n{sites}'
    path.write_text(federation.run_text + table)
    federation.cloister("simulate", str(path), "--runs", str(runs), "--workers", "0")
    (simulated,) = runs.iterdir()
    assert federation.weights(simulated) == federation.weights(undisturbed.path)
    found = [json.loads(line)["update_norm"] for line in (simulated / "metrics.jsonl").open()]
    assert found == [row["update_norm"] for row in federation.rows(undisturbed)]


def test_a_coordinator_that_is_killed_in_mid_round_goes_on_with_the_same_model(
    federation: Federation, undisturbed: Run
):
    before = len(federation.heard("north"))
    with federation.in_round(2, "south") as run:
        federation.service.send_signal(signal.SIGKILL)
        federation.service.wait()
        assert run.finished_rounds == 1
    federation.serve()
    federation.ends(run, Standing.FINISHED)

    assert [row["round"] for row in federation.rows(run)] == [1, 2, 3]
    assert federation.weights(run.path) == federation.weights(undisturbed.path)
    heard = federation.heard("north")[before:]
    assert heard.count("train.step") == 4  # round 2 was asked twice, and trained once
    assert federation.charges("north", run) == federation.charges("south", run) == 3
    assert run.state.deaths == 0


def test_a_conductor_that_is_killed_is_started_again(federation: Federation, undisturbed: Run):
    with federation.in_round(2, "south") as run:
        submission = run.state.submission
        os.kill(federation.conductor(run), signal.SIGKILL)
        federation.wait(lambda: run.state.deaths == 1, "its death to be seen")
    federation.ends(run, Standing.FINISHED)
    assert run.state.submission != submission
    assert federation.weights(run.path) == federation.weights(undisturbed.path)
    assert federation.charges("south", run) == 3


def test_a_run_that_a_person_ends_is_over_at_the_sites(federation: Federation):
    def closings(name: str) -> int:
        return list(federation.heard(name)).count("query.close")

    before = {name: closings(name) for name in federation.sites}
    with federation.in_round(2, "south") as run:
        federation.command("stop", run.name)
        federation.wait(lambda: closings("north") == before["north"] + 1, "north to be told")
    federation.ends(run, Standing.STOPPED)
    assert [row["round"] for row in federation.rows(run)] == [1]
    assert (run.path / "report.html").exists()
    said = (run.path / "conductor.log").read_text()
    told = closings("south") == before["south"] + 1
    assert told != ("south has not confirmed that the run is over" in said), said
    with pytest.raises(subprocess.CalledProcessError) as error:
        federation.command("resume", run.name)
    assert "is stopped; launch a new one" in str(error.value.stdout)


def test_a_site_that_is_killed_in_mid_round_is_asked_again(
    federation: Federation, undisturbed: Run
):
    with federation.in_round(2, "south") as run:
        federation.kill("south")
    federation.site("south")
    federation.ends(run, Standing.FINISHED)
    assert federation.statuses(run, "south") == ["ok"] * 3
    assert federation.weights(run.path) == federation.weights(undisturbed.path)
    assert federation.charges("south", run) == 4  # what was lost in training stays booked


def test_a_run_without_its_quorum_says_so_and_is_resumed(federation: Federation):
    federation.leaves("south")
    federation.wait(lambda: "south" in federation.missing, "south to be missed")
    run = federation.launch(deadline_seconds="30.0")
    federation.ends(run, Standing.FAILED)
    assert "1 connected at the deadline of the invitation, the quorum is 2" in run.state.reason
    assert "south: not connected since 2" in run.state.reason
    federation.comes("south")
    said = federation.command("resume", run.name)
    assert run.state.standing is Standing.FINISHED, said


def test_a_site_that_comes_late_is_missed_by_name_and_joins(federation: Federation):
    federation.leaves("south")
    with federation.in_round(2, "north", quorum="1") as run:
        federation.comes("south")
    federation.ends(run, Standing.FINISHED)
    assert [sorted(row["sites"]) for row in federation.rows(run)] == [
        ["north"],
        ["north"],
        ["north", "south"],
    ]
