"""The `cloister` command as a person meets it: help, prices, mistakes in one message."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import pytest
import typer.main

from common import accounting
from common.accounting import SubsampledGaussian
from deploy import cli
from deploy.simulation import prepare

Write = Callable[..., Path]
Cloister = Callable[..., Any]


def commands(group: click.Command, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Every command and every group of commands, by the words that are typed for it."""
    yield path
    if isinstance(group, click.Group):
        for name, command in group.commands.items():
            yield from commands(command, (*path, name))


EVERY = list(commands(typer.main.get_command(cli.app)))


def test_the_commands_are_found():
    assert {("simulate",), ("spec", "explain"), ("intake", "run"), ("demo",)} <= set(EVERY)


@pytest.mark.parametrize("path", EVERY, ids=" ".join)
def test_every_command_says_what_it_is_for(cloister: Cloister, path: tuple[str, ...]):
    said = cloister(*path, "--help")
    assert said.code == 0
    assert "Usage: cloister" in said.out
    words = re.sub(r"[^A-Za-z ]", " ", said.out.partition("Usage:")[2]).split()
    assert len(words) > 15
    assert said.err == ""


def test_help_is_there_before_anything_heavy_is_imported():
    """Each of these costs a tenth of a second or more, for a person who only wants to read."""
    heavy = {"cryptography", "flwr", "numpy", "pydantic", "pydicom", "torch"}
    code = f"import sys, deploy.cli; print(sorted({heavy!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("path", [(), ("spec",), ("intake",), ("node",)])
def test_a_group_alone_shows_its_commands(cloister: Cloister, path: tuple[str, ...]):
    said = cloister(*path)
    within = {names[-1] for names in EVERY if names and names[:-1] == path}
    listed = set(re.findall(r"^│ ([a-z-]+) ", said.out, re.MULTILINE))
    assert within
    assert within <= listed


def test_every_network_of_the_registry_is_listed_with_the_tasks_that_take_it(cloister: Cloister):
    said = cloister("models")
    assert said.code == 0
    listed = dict(line.split(maxsplit=1) for line in said.out.splitlines())
    assert listed["small-cnn"] == "classification"
    assert listed["resnet18"] == "classification"
    assert listed["unet"] == "segmentation"
    assert listed["vae"] == "reconstruction"


# --- What a run will cost -----------------------------------------------------------------------


def test_a_run_is_explained_with_its_price_at_each_site(cloister: Cloister, write_run: Write):
    said = cloister("spec", "explain", write_run(), "--declared-size", 40)
    assert said.code == 0
    for text in (
        "learns a binary classification (normal, finding) with small-cnn from 1 x 16 x 16 images",
        "3 rounds; in each, every site makes 1 step of sgd at a learning rate of 0.1",
        "on 4 patients expected",
        "aggregation by fedavg, weighted by declared size",
        "differential privacy per patient by DP-SGD: clip norm 1, noise multiplier 1",
        "a retried round costs again",
    ):
        assert text in " ".join(said.out.split())
    for site, size in (("a site of 40", 40), ("north", 20), ("south", 30)):
        cost = accounting.epsilon([SubsampledGaussian(4 / size, 1.0, 3, "patient")], 1e-4)
        (line,) = (line for line in said.out.splitlines() if site in line)
        assert f"{cost:.3f}" in line
        assert f"{4 / size:.4f}" in line


def test_a_robust_rule_is_not_said_to_weigh(cloister: Cloister, write_run: Write):
    median = '[aggregation]\nstrategy = "median"\n[federation]\nquorum = 3\n[evaluation]'
    said = cloister("spec", "explain", write_run(changes=[("[evaluation]", median)]))
    assert "aggregation by median, all sites alike" in " ".join(said.out.split())


def test_a_run_without_privacy_is_explained_as_one(cloister: Cloister, write_run: Write):
    table = 'mechanism = "dp-sgd"\nnoise_multiplier = 1.0\ndelta = 1e-4'
    said = cloister("spec", "explain", write_run(changes=[(table, 'mechanism = "none"')]))
    assert "NO differential privacy: updates leave the sites as they are" in said.out
    assert "ε" not in said.out


def test_a_run_without_sites_asks_for_their_sizes(cloister: Cloister, write_run: Write):
    said = cloister("spec", "explain", write_run(""))
    assert said.code == 0
    assert "--declared-size" in said.out


# --- Mistakes -----------------------------------------------------------------------------------


def test_a_mistake_is_one_message_with_everything_that_it_names(
    cloister: Cloister, write_run: Write
):
    run_file = write_run("")
    for arguments in (("simulate", run_file), ("spec", "explain", run_file.with_name("[b].toml"))):
        said = cloister(*arguments)
        assert said.code == 2
        assert said.out == ""
        assert said.err.startswith("error: ")
        assert "Traceback" not in said.err
    said = cloister("simulate", run_file)
    assert f"{run_file}: the table [simulation] is missing" in said.err  # unbroken, with brackets
    assert "[[simulation.site]]" in said.err
    assert "[b].toml" in cloister("spec", "explain", "[b].toml").err


def test_a_message_with_marks_in_it_is_shown_as_it_is(cloister: Cloister, write_run: Write):
    run_file = write_run(changes=[("batch_size = 4", 'batch_size = "[/red] [bold]"')])
    said = cloister("simulate", run_file)
    assert said.code == 2
    assert "local.batch_size = '[/red] [bold]'" in said.err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("simulate",), "--resume"),
        (("simulate", "run.toml", "--resume", "runs/x"), "--resume"),
        (("simulate", "run.toml", "--engine", "cloud"), "local or ray"),
        (("simulate", "run.toml", "--workers", "-1"), "workers"),
        (("simulate", "missing.toml"), "missing.toml: cannot be read (No such file or directory)"),
        (("simulate", "--resume", "missing"), "missing: not the folder of a simulated run"),
        (("spec", "explain", "missing.toml"), "missing.toml: cannot be read"),
        (("spec", "explain", "missing.toml", "--declared-size", "0"), "declared-size"),
        (("report", "missing"), "missing"),
        (("unknown",), "unknown"),
    ],
    ids=" ".join,
)
def test_what_cannot_be_done_is_said_without_a_stack(
    cloister: Cloister, arguments: tuple[str, ...], said: str
):
    result = cloister(*arguments)
    assert result.code == 2
    assert said in result.err
    assert "Traceback" not in result.err
    assert result.out == ""  # it refuses before it begins


def test_a_folder_that_is_no_run_has_no_report(cloister: Cloister, tmp_path: Path):
    said = cloister("report", tmp_path)
    assert said.code == 2
    assert said.err.startswith("error: ")
    assert str(tmp_path) in said.err


@pytest.mark.parametrize("command", ["report", "export", "generate"])
def test_a_run_that_is_not_over_says_how_far_it_is_and_how_it_goes_on(
    cloister: Cloister, write_run: Write, tmp_path: Path, command: str
):
    folder = prepare(write_run(), tmp_path / "runs")
    (folder / "metrics.jsonl").write_text("{}\n{}\n")
    words = [command, folder] if command == "report" else [command, folder, tmp_path / "out"]
    said = cloister(*words)
    assert said.code == 2
    way = f"cloister simulate --resume {folder}"
    assert f"not finished, after 2 of 3 rounds; go on with `{way}`" in said.err
    (folder / "simulation.json").rename(folder / "standing.json")
    assert f"`cloister coordinator resume {folder.name}`" in cloister(*words).err


def test_runs_that_cannot_be_written_are_said_without_a_stack(
    cloister: Cloister, write_run: Write, tmp_path: Path
):
    (tmp_path / "file").write_text("not a folder")
    said = cloister("simulate", write_run(), "--runs", tmp_path / "file")
    assert said.code == 2
    assert said.err.startswith("error: ")
    assert str(tmp_path / "file") in said.err


def test_a_process_of_its_own_ends_with_the_same_code_and_message(tmp_path: Path):
    command = [
        sys.executable,
        "-c",
        "from deploy.cli import main; main()",
        "spec",
        "explain",
        "no.toml",
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: no.toml: cannot be read")


# --- A whole run --------------------------------------------------------------------------------


def test_a_run_shows_its_rounds_its_cost_and_where_its_report_is(
    cloister: Cloister, write_run: Write, tmp_path: Path
):
    run_file, runs = write_run(), tmp_path / "runs"
    said = cloister("simulate", run_file, "--runs", runs, "--workers", 0)
    assert said.code == 0
    (folder,) = runs.iterdir()
    assert [f"round {number:>4}" in said.out for number in (1, 2, 3)] == [True] * 3
    assert "finished after 3 rounds" in said.out
    assert "accounted, not protected" in said.out
    assert (folder / "report.html").as_uri() in said.out.split()
    for site in ("north", "south"):
        assert site in said.out
    again = cloister("simulate", "--resume", folder, "--workers", 0)
    assert again.code == 0
    assert "round    1" not in again.out
    (folder / "report.html").unlink()
    assert cloister("report", folder).code == 0
    assert (folder / "report.html").exists()
    assert "asked more often" not in again.words


def test_a_round_that_was_asked_twice_is_said_to_count_twice(
    cloister: Cloister, write_run: Write, tmp_path: Path
):
    folder = prepare(write_run(), tmp_path / "runs")
    # Killed before anything of the round was recorded.
    (folder / "asked.jsonl").write_text('{"round": 1, "sites": ["north"]}\n')
    said = cloister("simulate", "--resume", folder, "--workers", 0)
    assert said.code == 0
    assert "north: asked more often than there were rounds" in said.words
