"""A federation on one machine, from a run's file to its result, with real cohorts."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.numpy import load_file

from client.keyfile import NodeKey
from client.ledger import Ledger, Place
from common.clock import Clock
from common.cohort import Cohort
from common.errors import CohortError, ModelError, RunError, SpecError
from common.files import locked
from common.spec import RunSpec
from common.tasks.generation import Drawn
from deploy.local_engine import ClientAppAt, LocalGrid
from deploy.simulation import Simulation, load, prepare, read_simulation, simulate
from deploy.synthetic import write_cohort as write_drawn
from server.evaluation import CentralEvaluator
from server.rounds import Conduct, FederatedRun

Write = Callable[..., Path]
Arrays = dict[str, NDArray[np.float32]]

EXTRA = "[evaluation]\n"
SITES = """
[simulation]
evaluation = "evaluation"
[[simulation.site]]
name = "north"
cohort = "north"
declared_size = 20
[[simulation.site]]
name = "south"
cohort = "south"
declared_size = 30
"""
SPLIT = """
[simulation]
evaluation = "evaluation"
cohort = "south"
partition = "iid"
sites = 3
declared_size = 12
"""


def weights_of(folder: Path) -> Arrays:
    return load_file(folder / "model.safetensors")


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def statuses(folder: Path) -> list[dict[str, str]]:
    return [
        {name: site["status"] for name, site in row["sites"].items()} for row in rows_of(folder)
    ]


def close(one: Arrays, other: Arrays, tolerance: float) -> None:
    assert one.keys() == other.keys()
    for name, array in one.items():
        np.testing.assert_allclose(array, other[name], rtol=0, atol=tolerance)


@pytest.fixture
def run(tmp_path: Path, watching: Any) -> Callable[..., Path]:
    """Prepare a run's file below ``runs`` and simulate it; gives the run's folder."""

    def of(run_file: Path, *, workers: int = 0, observer: Any = None) -> Path:
        folder = prepare(run_file, tmp_path / "runs")
        simulate(folder, workers=workers, observer=observer or watching())
        return folder

    return of


@pytest.fixture
def made(tmp_path: Path, make_spec: Callable[..., RunSpec]) -> str:
    """Six synthetic images of nobody knows which model; the key that names them."""
    (tmp_path / "made").mkdir()
    drawn = Drawn(torch.rand(6, *make_spec().input.shape), torch.tensor([0, 1] * 3))
    write_drawn(tmp_path / "made" / "cohort", drawn, make_spec())
    return 'synthetic = "made/cohort"\n'


def test_synthetic_images_are_mixed_in_and_the_card_says_whose_they_may_be(
    write_run: Write, run: Callable[..., Path], made: str
):
    plain = run(write_run())
    named = SITES.replace("[[", f"{made}synthetic_without_privacy = true\n[[", 1)
    mixing = "\n[augmentation]\nsynthetic = 3\n"
    asked = (EXTRA, f"{mixing}{EXTRA}")
    with pytest.raises(CohortError, match=r"synthetic_without_privacy = true beside the cohort"):
        run(write_run(SITES.replace("[[", f"{made}[[", 1), [asked]))
    with pytest.raises(CohortError, match=r"or a run that says augmentation\.synthetic_without"):
        run(write_run(named, [asked]))
    folder = run(write_run(named, [(EXTRA, f"{mixing}synthetic_without_privacy = true\n{EXTRA}")]))
    assert any(np.any(weights_of(plain)[n] != a) for n, a in weights_of(folder).items())
    card = json.loads((folder / "model_card.json").read_text())
    assert card["privacy"]["protected"] is False
    assert {name: site["synthetic"] for name, site in card["privacy"]["sites"].items()} == {
        "north": "unprotected",
        "south": "unprotected",
    }
    assert "Those of north and south are not known to be" in " ".join(card["privacy"]["claim"])
    assert "mixed in the same synthetic images" in " ".join(card["limitations"])


def test_a_simulation_trains_on_synthetic_images_alone_where_it_claims_to_protect_nobody(
    write_run: Write, made: str, tmp_path: Path
):
    alone = SPLIT.replace('"south"', '"made/cohort"').replace("sites = 3", "sites = 1")
    private = 'mechanism = "dp-sgd"\nnoise_multiplier = 1.0\ndelta = 1e-4'
    image = (private, f'{private}\nunit = "image"')
    with pytest.raises(CohortError, match=r"its source is 'synthetic'.*expected patients"):
        prepare(write_run(alone, [image]), tmp_path / "runs")
    none = (private, 'mechanism = "none"\nunit = "image"')
    assert prepare(write_run(alone, [none]), tmp_path / "runs").is_dir()


def test_nobody_is_trained_on_who_is_evaluated_on(write_run: Write, tmp_path: Path):
    same = SPLIT.replace('evaluation = "evaluation"', 'evaluation = "south"')
    with pytest.raises(CohortError, match=r"trains on are in the .* part.*\(split\)"):
        prepare(write_run(same), tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


# --- From file to result ------------------------------------------------------------------------


def test_a_run_goes_from_its_file_to_its_report(write_run: Write, run: Any, watching: Any):
    observer = watching()
    folder = run(write_run(), observer=observer)
    assert observer.sites == ["north", "south"]
    assert statuses(folder) == [{"north": "ok", "south": "ok"}] * 3
    privacy = json.loads((folder / "privacy.json").read_text())
    assert not privacy["protected"]  # the randomness came from a seed
    assert {n: s["declared_size"] for n, s in privacy["sites"].items()} == {
        "north": 20,
        "south": 30,
    }
    assert "Accounted, not protected" in (folder / "report.html").read_text()
    environment = json.loads((folder / "environment.json").read_text())
    assert (environment["engine"], environment["seeded"]) == ("local", True)


@pytest.mark.slow
def test_worker_processes_give_the_same_weights_as_one_process(write_run: Write, run: Any):
    run_file = write_run(changes=[("batch_size = 4", "batch_size = 4\nsteps = 2")])
    one = run(run_file, workers=0)
    two = run(run_file, workers=2)
    close(weights_of(one), weights_of(two), 1e-6)
    assert one.name != two.name


def test_the_seed_decides_the_result(write_run: Write, run: Any):
    first = weights_of(run(write_run()))
    again = weights_of(run(write_run()))
    other = weights_of(run(write_run(changes=[("rounds = 3", "rounds = 3\nseed = 2")])))
    close(first, again, 0)
    assert any(not np.allclose(first[name], other[name], atol=1e-3) for name in first)


@pytest.mark.parametrize("partition", ["iid", "dirichlet", "quantity"])
def test_one_cohort_is_dealt_out_by_patient(write_run: Write, run: Any, partition: str):
    changes = [('"iid"', f'"{partition}"'), ("sites = 3", "sites = 3\nallow_odd_sites = true")]
    run_file = write_run(SPLIT, changes, south=([n // 2 for n in range(60)], None))
    folder = prepare(run_file, run_file.parent / "runs")
    spec, simulation = load(folder)
    parts = [simulation.cohort_of(number, spec.seed) for number in range(3)]
    again = [simulation.cohort_of(number, spec.seed) for number in range(3)]
    assert [part.patients for part in parts] == [part.patients for part in again]
    dealt = sorted(patient for part in parts for patient in part.patients)
    assert dealt == [f"p{number:05d}" for number in range(30)]
    assert sum(len(part) for part in parts) == 60
    assert simulation.names == ("site-1", "site-2", "site-3")


def test_a_dealt_out_cohort_is_trained_on(write_run: Write, run: Any):
    folder = run(write_run(SPLIT.replace("12", "[12, 10, 8]"), [("rounds = 3", "rounds = 1")]))
    privacy = json.loads((folder / "privacy.json").read_text())
    sizes = {name: site["declared_size"] for name, site in privacy["sites"].items()}
    assert sizes == {"site-1": 12, "site-2": 10, "site-3": 8}


def test_training_sees_neither_validation_nor_test_images(
    write_run: Write, write_cohort: Any, make_spec: Any
):
    path = write_run(SPLIT)
    table = read_simulation({"evaluation": "e", "cohort": "south", "declared_size": 9}, "run.toml")
    whole = table.absolute(path.parent).cohort_of(0, 1)
    assert set(whole.splits) <= {"", "train"}


# --- What is wrong is said before anything runs --------------------------------------------------

WRONG: dict[str, tuple[str, list[str]]] = {
    "no table": ("", ["run.toml: the table [simulation] is missing", "evaluation"]),
    "an unknown key": (
        SPLIT + "alfa = 0.3\n",
        ["run.toml: simulation.alfa = 0.3: unknown key"],
    ),
    "an unknown key of a site": (
        '[simulation]\nevaluation = "e"\n[[simulation.site]]\nname = "a"\ncohort = "c"\n'
        "declared_size = 3\nsize = 4\n",
        ["simulation.site.0.size = 4: unknown key"],
    ),
    "no evaluation": (
        SPLIT.replace('evaluation = "evaluation"', ""),
        ["run.toml: simulation.evaluation is missing"],
    ),
    "a site without a size": (
        '[simulation]\nevaluation = "e"\n[[simulation.site]]\nname = "a"\ncohort = "c"\n',
        ["run.toml: simulation.site.0.declared_size is missing"],
    ),
    "neither sites nor a cohort": (
        '[simulation]\nevaluation = "e"\n',
        ["run.toml: simulation", "either [[simulation.site]] tables, or cohort"],
    ),
    "both sites and a cohort": (
        SPLIT + '[[simulation.site]]\nname = "a"\ncohort = "c"\ndeclared_size = 3\n',
        ["either [[simulation.site]] tables, or cohort and partition"],
    ),
    "sites that are to be dealt out": (
        '[simulation]\nevaluation = "e"\npartition = "dirichlet"\nsites = 3\n'
        '[[simulation.site]]\nname = "a"\ncohort = "c"\ndeclared_size = 3\n',
        ["partition, sites", "mean nothing beside [[simulation.site]]"],
    ),
    "two sites of one name": (
        '[simulation]\nevaluation = "e"\n'
        + '[[simulation.site]]\nname = "a"\ncohort = "c"\ndeclared_size = 3\n' * 2,
        ["two [[simulation.site]] tables have one name"],
    ),
    "a name that is a path": (
        '[simulation]\nevaluation = "e"\n'
        '[[simulation.site]]\nname = "../a"\ncohort = "c"\ndeclared_size = 3\n',
        ["simulation.site.0.name = '../a'"],
    ),
    "no declared size": (
        SPLIT.replace("declared_size = 12", ""),
        ["declared_size is missing: the public size"],
    ),
    "sizes of other sites": (
        SPLIT.replace("12", "[12, 12]"),
        ["declared_size has not one number for each of 3 sites"],
    ),
    "an unknown partition": (
        SPLIT.replace('"iid"', '"by-age"'),
        ["simulation.partition = 'by-age'", "'iid', 'dirichlet' or 'quantity'"],
    ),
    "a concentration of nothing": (
        SPLIT + "alpha = 0.0\n",
        ["simulation.alpha = 0.0", "greater than 0"],
    ),
    "a quorum above the sites": (
        SPLIT + "[federation]\nquorum = 4\n",
        ["federation.quorum = 4", "3 sites"],
    ),
    "a batch above a declared size": (
        SPLIT.replace("12", "[12, 3, 12]"),
        ["local.batch_size = 4", "declares 3"],
    ),
    "delta above one patient in the site": (
        SPLIT.replace("12", "20000"),
        ["privacy.delta = 0.0001", "20000"],
    ),
}


@pytest.mark.parametrize(("table", "parts"), WRONG.values(), ids=WRONG)
def test_a_wrong_table_is_named_and_nothing_is_made(
    write_run: Write, tmp_path: Path, table: str, parts: list[str]
):
    with pytest.raises(SpecError) as caught:
        prepare(write_run(table), tmp_path / "runs")
    for part in parts:
        assert part in str(caught.value)
    assert not (tmp_path / "runs").exists()


def test_the_table_that_the_wrong_ones_are_made_from_is_right(write_run: Write, tmp_path: Path):
    assert prepare(write_run(SPLIT), tmp_path / "runs").is_dir()


@pytest.mark.parametrize(
    ("south", "reason"),
    [
        (([], []), "no training image"),
        (([1, 2, 3], [0, 0, 0]), "one class only"),
        (([1, 2, 3], [1, 1, 1]), "one class only"),
    ],
    ids=["empty", "all negative", "all positive"],
)
def test_an_odd_site_is_settled_by_a_person_before_the_run(
    write_run: Write, run: Any, tmp_path: Path, south: Any, reason: str
):
    run_file = write_run(south=south)
    with pytest.raises(CohortError, match=f"site 'south' .*{reason}.*allow_odd_sites = true"):
        prepare(run_file, tmp_path / "runs")
    assert not (tmp_path / "runs").exists()
    allowed = ('evaluation = "evaluation"', 'evaluation = "evaluation"\nallow_odd_sites = true')
    folder = run(write_run(changes=[allowed, ("rounds = 3", "rounds = 1")], south=south))
    assert statuses(folder) == [{"north": "ok", "south": "ok"}]  # it releases noise like any other


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        (('cohort = "north"', 'cohort = "elsewhere"'), CohortError, "elsewhere: not a cohort"),
        (('"evaluation"', '"elsewhere"'), CohortError, "elsewhere: not a cohort"),
        (("height = 16", "height = 17"), CohortError, "does not fit the run"),
        (('"normal", "finding"', '"a", "b"'), CohortError, "task.classes"),
        (('mechanism = "dp-sgd"', 'mechanism = "dp-sgd"\nunit = "image"'), CohortError, "unit"),
        (('"small-cnn"', '"huge-cnn"'), ModelError, "model.name = 'huge-cnn'"),
        (("height = 16\nwidth = 16", "height = 8\nwidth = 8"), ModelError, "at least 16"),
    ],
    ids=lambda value: "" if isinstance(value, type) else str(value)[:30],
)
def test_what_does_not_fit_is_said_before_a_folder_is_made(
    write_run: Write, tmp_path: Path, change: tuple[str, str], error: type[Exception], said: str
):
    with pytest.raises(error, match=re.escape(said)):
        prepare(write_run(changes=[change]), tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


def test_a_batch_above_the_declared_size_is_refused_without_privacy_as_well(
    write_run: Write, tmp_path: Path
):
    nothing = [('mechanism = "dp-sgd"\nnoise_multiplier = 1.0\ndelta = 1e-4', 'mechanism = "none"')]
    with pytest.raises(SpecError, match="sampling rate would be above 1"):
        prepare(write_run(SPLIT.replace("12", "3"), nothing), tmp_path / "runs")


def test_the_longest_name_that_a_run_may_have_can_be_launched(write_run: Write, tmp_path: Path):
    name = "a" * 63
    run_file = write_run(changes=[('name = "small"', f'name = "{name}"')])
    folder = prepare(run_file, tmp_path / "runs")
    assert load(folder)[0].name == name


def test_each_launch_has_a_folder_of_its_own(write_run: Write, tmp_path: Path):
    run_file = write_run()
    folders = {prepare(run_file, tmp_path / "runs") for _ in range(5)}
    assert len(folders) == 5


def test_a_folder_that_is_no_run_is_named(tmp_path: Path, watching: Any):
    with pytest.raises(RunError, match="not the folder of a simulated run"):
        simulate(tmp_path, observer=watching())


def test_a_table_comes_back_from_the_runs_folder_as_it_was(write_run: Write, tmp_path: Path):
    for text in (SPLIT, None):
        run_file = write_run(text) if text else write_run()
        _, simulation = load(prepare(run_file, tmp_path / "runs"))
        again = Simulation.model_validate_json(simulation.model_dump_json(exclude_unset=True))
        assert again == simulation
        assert Path(simulation.evaluation).is_absolute()


def test_a_run_is_conducted_by_one_process_at_a_time(
    write_run: Write, tmp_path: Path, watching: Any
):
    folder = prepare(write_run(), tmp_path / "runs")
    with (
        locked(folder),
        pytest.raises(RunError, match="another process conducts this run"),
    ):
        simulate(folder, workers=0, observer=watching())
    assert not (folder / "metrics.jsonl").exists()  # the other's record is not touched
    assert not (folder / "sites").exists()  # and no site was charged
    simulate(folder, workers=0, observer=watching())
    assert len(rows_of(folder)) == 3


# --- The sites' ledgers -------------------------------------------------------------------------


def ledger_of(folder: Path, site: str) -> Ledger:
    place = folder / "sites" / site
    return Ledger(Place(place, NodeKey.read(place / "node.key")))


def stop_after(number: int) -> Callable[[int, str], None]:
    """For an observer: somebody presses Ctrl-C when this round has been answered."""

    def then(seen: int, site: str) -> None:
        if (seen, site) == (number, "south"):
            raise KeyboardInterrupt

    return then


def test_a_finished_run_is_over_at_its_sites_and_one_that_was_stopped_is_not(
    write_run: Write, tmp_path: Path, watching: Any
):
    folder = prepare(write_run(), tmp_path / "runs")
    with pytest.raises(KeyboardInterrupt):
        simulate(folder, workers=0, observer=watching(stop_after(2)))
    run = load(folder)[0].digest
    for site in ("north", "south"):
        assert ledger_of(folder, site).book.run(run).state == "open"
        assert list((folder / "sites" / site / "releases").glob("*.sealed"))
    simulate(folder, workers=0, observer=watching())
    for site in ("north", "south"):
        assert ledger_of(folder, site).book.run(run).state == "closed"
        assert not list((folder / "sites" / site / "releases").glob("*.sealed"))
    simulate(folder, workers=0, observer=watching())  # it stays over, and is no error
    assert len(rows_of(folder)) == 3


@pytest.mark.slow
def test_a_site_whose_ledger_was_made_anew_is_declined_when_the_run_goes_on(
    write_run: Write, tmp_path: Path, watching: Any
):
    folder = prepare(write_run(), tmp_path / "runs")
    with pytest.raises(KeyboardInterrupt):
        simulate(folder, workers=0, observer=watching(stop_after(2)))
    shutil.rmtree(folder / "sites" / "south")
    simulate(folder, workers=1, observer=watching())  # another process: this one would notice
    assert [set(row) for row in statuses(folder)] == [{"north", "south"}, {"north"}, {"north"}]
    declined = json.loads((folder / "environment.json").read_text())["declined"]
    assert list(declined) == ["2"]
    assert "site 'south': its ledger is at entry" in declined["2"]


def test_a_simulation_is_never_paced_and_says_so(write_run: Write, run: Any):
    folder = run(write_run(changes=[("rounds = 3", "rounds = 1")]))
    sites = json.loads((folder / "privacy.json").read_text())["sites"]
    assert [site["paced"] for site in sites.values()] == [False, False]
    told = "Replies of every site were not paced: how long training took says something"
    assert told in (folder / "report.html").read_text()
    assert told in (folder / "model_card.md").read_text()


# --- Killed -------------------------------------------------------------------------------------

CONDUCT = """
import sys
from pathlib import Path
from deploy.simulation import simulate
from server.rounds import LogObserver

if __name__ == "__main__":
    simulate(Path(sys.argv[1]), workers=2, observer=LogObserver())
"""


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return b"zombie" not in Path(f"/proc/{pid}/status").read_bytes()


def children_of(pid: int) -> list[int]:
    """All descendants."""
    direct = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        direct += [int(child) for child in task.read_text().split()]
    return direct + [grandchild for child in direct for grandchild in children_of(child)]


@pytest.mark.slow
def test_a_run_that_is_killed_again_and_again_ends_with_the_weights_of_an_unkilled_one(
    write_run: Write, run: Any, tmp_path: Path, watching: Any
):
    run_file = write_run(changes=[("rounds = 3", "rounds = 40"), ("width = 4", "width = 8")])
    whole = run(run_file, workers=0)
    folder = prepare(run_file, tmp_path / "runs")
    script = tmp_path / "conduct.py"
    script.write_text(CONDUCT)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    moments, finished = np.random.default_rng(0).uniform(0.05, 1.0, 2), 0
    for moment in moments:
        with (tmp_path / "said").open("ab") as said:
            command = [sys.executable, str(script), str(folder)]
            process = subprocess.Popen(command, env=environment, stderr=said)
        await_progress(folder, finished, process)
        time.sleep(moment)
        started = children_of(process.pid)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        assert started
        await_end(started)
        finished = len(rows_of(folder))
        assert finished < 40  # or it was not killed at work
    assert "Traceback" not in (tmp_path / "said").read_text()  # of workers left alone
    observer = watching()
    simulate(folder, workers=0, observer=observer)
    assert observer.finished_rounds >= finished > 0
    close(weights_of(folder), weights_of(whole), 1e-6)
    assert [row["round"] for row in rows_of(folder)] == list(range(1, 41))
    assert statuses(folder) == statuses(whole)
    spent, once = (
        json.loads((path / "privacy.json").read_text())["sites"] for path in (folder, whole)
    )
    for name, site in spent.items():  # a round that was asked again is counted again
        assert 40 <= site["rounds"] <= 40 + observer.finished_rounds
        assert (site["epsilon"] > once[name]["epsilon"]) == (site["rounds"] > 40)


def await_progress(folder: Path, finished: int, process: subprocess.Popen[bytes]) -> None:
    """Until the process has finished a round of its own."""
    path, deadline = folder / "metrics.jsonl", time.monotonic() + 120
    while not path.exists() or path.read_text().count("\n") <= finished:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)


def await_end(processes: list[int]) -> None:
    """Workers end by themselves when nobody is there any more."""
    deadline = time.monotonic() + 30
    while any(alive(pid) for pid in processes):
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.fixture
def grid_run(
    write_run: Write, tmp_path: Path, watching: Any
) -> Callable[..., tuple[Path, Callable[..., Any]]]:
    """A prepared run, and what conducts it on two real workers.

    The observer's `then` is called with the grid, the round and the site that has answered; if
    it says so, the deadline has passed.
    """

    def prepared(changes: list[tuple[str, str]]) -> tuple[Path, Callable[..., Any]]:
        folder = prepare(write_run(changes=changes), tmp_path / "runs")
        spec, simulation = load(folder)
        config = {"spec": spec.canonical_json, "simulation": str(folder)}
        client = ClientAppAt("deploy.simulation", "client_app", config)

        def conduct(then: Callable[[LocalGrid, int, str], bool | None]) -> None:
            ahead = [0.0]

            def watch(number: int, site: str) -> None:
                ahead[0] += spec.federation.deadline_seconds if then(grid, number, site) else 0

            clock = Clock(now=lambda: time.monotonic() + ahead[0])
            with LocalGrid(simulation.names, client, workers=2) as grid:
                cohort = Cohort.open(Path(simulation.evaluation))
                conducted = Conduct("local", seeded=True, observer=watching(watch), clock=clock)
                evaluator = CentralEvaluator(spec, cohort)
                FederatedRun(spec, folder, evaluator=evaluator, conduct=conducted).run(grid)

        return folder, conduct

    return prepared


def kill_south_in_round_2(grid: LocalGrid, number: int, site: str) -> None:
    """Its worker holds the task and has not answered when it dies."""
    if (number, site) == (2, ""):
        os.kill(grid.processes[1], signal.SIGSTOP)
    if (number, site) == (2, "north"):
        os.kill(grid.processes[1], signal.SIGKILL)


@pytest.mark.slow
def test_a_worker_killed_in_mid_round_fails_by_name_and_the_quorum_goes_on(grid_run: Any):
    folder, conduct = grid_run([])
    conduct(kill_south_in_round_2)
    both = {"north": "ok", "south": "ok"}
    assert statuses(folder) == [both, both | {"south": "failed"}, both]
    assert "error" in rows_of(folder)[1]["sites"]["south"]["reason"]
    privacy = json.loads((folder / "privacy.json").read_text())
    assert privacy["sites"]["south"]["rounds"] == 3  # what it was asked may have been spent


@pytest.mark.slow
def test_without_the_quorum_a_killed_worker_stops_the_run_which_goes_on_later(grid_run: Any):
    folder, conduct = grid_run([("[evaluation]", "[federation]\nquorum = 2\n[evaluation]")])
    with pytest.raises(RunError, match=r"round 2: 1 updates, the quorum is 2 .*south: failed"):
        conduct(kill_south_in_round_2)
    assert len(rows_of(folder)) == 1
    conduct(lambda *_: None)
    assert statuses(folder) == [{"north": "ok", "south": "ok"}] * 3


@pytest.mark.slow
def test_a_worker_that_hangs_is_late_by_name_and_is_asked_again(grid_run: Any):
    folder, conduct = grid_run([])

    def hang(grid: LocalGrid, number: int, site: str) -> bool:
        if (number, site) == (2, ""):
            os.kill(grid.processes[1], signal.SIGSTOP)
        if (number, site) == (3, ""):
            os.kill(grid.processes[1], signal.SIGCONT)
        return (number, site) == (2, "north")

    conduct(hang)
    both = {"north": "ok", "south": "ok"}
    assert statuses(folder) == [both, both | {"south": "late"}, both]


@pytest.mark.slow
def test_a_grid_ends_workers_that_hear_no_signal(grid_run: Any):
    folder, conduct = grid_run([])
    seen: list[int] = []

    def stop(grid: LocalGrid, number: int, site: str) -> None:
        if (number, site) == (3, "south"):  # its worker has answered for the last time
            seen.append(grid.processes[1])
            os.kill(grid.processes[1], signal.SIGSTOP)

    conduct(stop)  # and ends
    assert len(rows_of(folder)) == 3
    assert not alive(seen[0])


@pytest.mark.slow
def test_ctrl_c_ends_a_run_without_the_stacks_of_its_workers(
    write_run: Write, tmp_path: Path, watching: Any
):
    run_file = write_run(changes=[("rounds = 3", "rounds = 40"), ("width = 4", "width = 8")])
    folder = prepare(run_file, tmp_path / "runs")
    command = "from deploy.cli import main; main()"
    with (tmp_path / "said").open("wb") as said:
        process = subprocess.Popen(
            [sys.executable, "-c", command, "simulate", "--resume", str(folder), "--workers", "2"],
            env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            stdout=said,
            stderr=said,
            start_new_session=True,
        )
    await_progress(folder, 0, process)
    started = children_of(process.pid)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    assert process.wait(30) != 0
    await_end(started)
    text = (tmp_path / "said").read_text()
    assert "Traceback" not in text
    assert "cloister simulate --resume" in text
    simulate(folder, workers=0, observer=watching())
    assert len(rows_of(folder)) == 40
