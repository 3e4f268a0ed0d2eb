"""`cloister intake`: what a person types, and what they then see."""

from __future__ import annotations

import json
import stat
from pathlib import Path

import numpy as np
import pytest
from click.testing import Result
from typer.testing import CliRunner

from client.intake.keys import SiteKey
from client.intake.reidentify import create_officer_key, read_officer_key, read_table
from common.cohort import Cohort
from common.errors import CohortError, ConfigError
from deploy.cli_intake import intake_app
from deploy.hospitals import Hospital, make_hospitals


@pytest.fixture
def run_file(tmp_path: Path, spec_text: str) -> Path:
    path = tmp_path / "run.toml"
    path.write_text(spec_text.replace('"finding"', '"opacity"'))
    return path


@pytest.fixture
def hospital(tmp_path: Path) -> Hospital:
    return make_hospitals(tmp_path / "hospitals", seed=1, size=0.02)[0]


def call(*arguments: object) -> Result:
    runner = CliRunner(env={"COLUMNS": "200", "TERM": "dumb", "NO_COLOR": "1"})
    return runner.invoke(intake_app, list(map(str, arguments)))


def test_run_then_show(hospital: Hospital, run_file: Path, tmp_path: Path) -> None:
    cohort, key, listing = tmp_path / "c", tmp_path / "site.key", tmp_path / "not-used.csv"
    files = ("--spec", run_file, "--labels", hospital.labels)
    options = ("--site-key", key, "--not-used", listing, "--split", "train")

    taken = call("run", hospital.folder, cohort, *files, *options)

    assert taken.exit_code == 0, taken.output
    for text in ("its pixel data is cut short", "not a DICOM file", "unit of privacy", "opacity"):
        assert text in taken.output
    assert set(Cohort.open(cohort).splits) == {"train"}
    assert SiteKey.from_file(key)
    assert listing.read_text().count("\n") == 1 + hospital.unusable
    assert stat.S_IMODE(listing.stat().st_mode) == 0o600

    shown = call("show", cohort, "--verify", "--sheet", tmp_path / "sheet.png")

    assert shown.exit_code == 0, shown.output
    assert f"All {hospital.images} images are as they were stored" in shown.output
    assert (tmp_path / "sheet.png").read_bytes().startswith(b"\x89PNG")


def test_one_key_makes_the_same_patients_in_every_cohort(
    hospital: Hospital, run_file: Path, tmp_path: Path
) -> None:
    options = ("--spec", run_file, "--labels", hospital.labels)
    for name in ("a", "b"):
        call("run", hospital.folder, tmp_path / name, *options, "--site-key", tmp_path / "key")
    call("run", hospital.folder, tmp_path / "c", *options)

    a, b, c = (set(Cohort.open(tmp_path / name).patients) for name in "abc")
    assert a == b
    assert not a & c


def test_what_was_begun_with_a_key_goes_on_with_it_and_none_is_made_in_its_place(
    hospital: Hospital, run_file: Path, tmp_path: Path
) -> None:
    """Not in the desk, where none was named, nor where another one is said to be."""
    options = ("--spec", run_file, "--labels", hospital.labels)
    key, gone, cohort = tmp_path / "site.key", tmp_path / "gone.key", tmp_path / "c"
    begun = call("run", hospital.folder, cohort, *options, "--site-key", key)
    assert begun.exit_code == 0, begun.output

    for other in ((), ("--site-key", gone)):
        refused = call("run", hospital.folder, cohort, *options, *other)
        assert isinstance(refused.exception, ConfigError)
        assert "was begun with one; name that one with --site-key" in str(refused.exception)
    assert list(tmp_path.rglob("*.key")) == [key]
    assert call("run", hospital.folder, cohort, *options, "--site-key", key).exit_code == 0


def test_medmnist_warns_of_its_unit(run_file: Path, tmp_path: Path) -> None:
    images, labels = np.zeros((3, 8, 8), dtype=np.uint8), np.eye(3, 1, dtype=np.uint8)
    np.savez(tmp_path / "x.npz", test_images=images, test_labels=labels)

    words = ("medmnist", tmp_path / "x.npz", tmp_path / "c", "--spec", run_file, "--part", "test")
    taken = call(*words)

    assert taken.exit_code == 0, taken.output
    assert "Attention: The source names no patients: the unit is the image" in taken.output
    assert len(Cohort.open(tmp_path / "c")) == 3
    again = call(*words)
    assert "is there already" in str(again.exception)
    assert again.output == ""  # it refuses before it begins


def test_names_with_brackets_are_shown_as_they_are(run_file: Path, tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "[bold]x.png").write_text("no picture")
    (tmp_path / "labels.csv").write_text("file,label\n[bold]x.png,normal\n")
    options = ("--spec", run_file, "--labels", tmp_path / "labels.csv")

    taken = call("pictures", tmp_path / "pictures", tmp_path / "c", *options)

    assert taken.exit_code == 0, taken.output
    assert "[bold]x.png" in taken.output
    assert "The cohort is empty" in taken.output


def test_mistakes_are_errors_of_ours(hospital: Hospital, run_file: Path, tmp_path: Path) -> None:
    options = ("--spec", run_file, "--labels", hospital.labels)
    (tmp_path / "there").mkdir()

    existing = call("run", hospital.folder, tmp_path / "there", *options)
    nowhere = call("run", tmp_path / "archvie", tmp_path / "c", *options)
    unknown = call("export", tmp_path / "archvie", tmp_path / "c")
    unlabelled = call(
        "run",
        hospital.folder,
        tmp_path / "c",
        "--spec",
        run_file,
        "--labels",
        tmp_path / "no.csv",
    )

    assert isinstance(existing.exception, CohortError)
    assert isinstance(unlabelled.exception, ConfigError)
    for mistake in (nowhere, unknown):
        assert "archvie: no such folder or file" in str(mistake.exception)
    assert not list(tmp_path.glob("c*"))


@pytest.mark.parametrize("command", ["run", "medmnist", "pictures", "show"])
def test_help_teaches_with_an_example(command: str) -> None:
    assert f"Example: cloister intake {command}" in call(command, "--help").output


def test_a_nodes_file_says_how_its_hospital_takes_in(
    hospital: Hospital, run_file: Path, tmp_path: Path
) -> None:
    """Profile, site key, a sealed cohort and the officer's table, all of them by --node."""
    node = tmp_path / "node"
    node.mkdir()
    (node / "node.toml").write_text(NODE)
    call("new-key", node / "cohort.key")
    create_officer_key(tmp_path / "officer.key", node / "officer.pem", PASSPHRASE)
    options = ("--spec", run_file, "--labels", hospital.labels, "--node", node)

    taken = call("run", hospital.folder, tmp_path / "c", *options)
    plain = call("show", tmp_path / "c")
    shown = call("show", tmp_path / "c", "--verify", "--node", node)
    sought = call("verify", tmp_path / "c", "--against", hospital.folder, "--node", node)
    twice = call("show", tmp_path / "c", "--node", node, "--cohort-key", node / "cohort.key")
    both = call("run", hospital.folder, tmp_path / "d", *options, "--site-key", node / "site.key")

    assert taken.exit_code == 0, taken.output
    assert isinstance(plain.exception, CohortError)
    assert f"All {hospital.images} images are as they were stored" in shown.output
    assert sought.exit_code == 0, sought.output
    assert isinstance(twice.exception, ConfigError)
    assert isinstance(both.exception, ConfigError)
    key = bytes.fromhex((node / "cohort.key").read_text())
    cohort = Cohort.open(tmp_path / "c", key)
    private = read_officer_key(tmp_path / "officer.key", PASSPHRASE)
    table = read_table(node / "table.sealed", private)
    assert set(cohort.patients) == set(table.identities)
    named = {identity.patient for found in table.identities.values() for identity in found}
    assert len(named) == hospital.patients
    assert named <= hospital.planted
    report = json.loads((tmp_path / "c.intake" / "report.json").read_text())
    assert "113107" in json.dumps(report)  # the profile's modified dates


PASSPHRASE = "correct horse battery staple"  # noqa: S105
NODE = """
site = "north"
declared_size = 400
cohort = "c"

[budget]
epsilon = 8.0
delta = 1e-5

[data]
unit = "patient"
kind = "binary"
classes = ["normal", "opacity"]
shape = [1, 16, 16]
preprocessing = "0000000000000000000000000000000000000000000000000000000000000000"

[intake]
site_key = "site.key"

[intake.profile]
dates = "modified"

[intake.encryption]
key_file = "cohort.key"

[intake.reidentification]
public_key = "officer.pem"
table = "table.sealed"
"""
