"""Keys at the command line, and a node whose cohort is sealed."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import Result
from typer.testing import CliRunner

from client.home import NodeHome
from client.intake.builder import CohortBuilder, ImageRecord
from client.intake.keys import SiteKey
from client.intake.reidentify import ReidentificationTable
from client.keyfile import create_key, read_key
from common.cohort import CohortMeta
from common.cohort_seal import SEALED_IMAGES, SEALED_INDEX, key_id
from common.errors import CohortError, ConfigError
from common.spec import RunSpec
from deploy.cli_intake import intake_app

PASSPHRASE = "a long enough passphrase"  # noqa: S105 - of a test


def call(*arguments: object, typed: str = "") -> Result:
    runner = CliRunner(env={"COLUMNS": "200", "TERM": "dumb", "NO_COLOR": "1"})
    return runner.invoke(intake_app, list(map(str, arguments)), input=typed)


def test_a_key_is_made_once(tmp_path: Path) -> None:
    assert call("new-key", tmp_path / "cohort.key").exit_code == 0
    before = read_key(tmp_path / "cohort.key", "cohort key")

    again = call("new-key", tmp_path / "cohort.key")

    assert isinstance(again.exception, ConfigError)
    assert read_key(tmp_path / "cohort.key", "cohort key") == before


def test_rotation_says_what_it_means(tmp_path: Path) -> None:
    first = SiteKey.from_file(tmp_path / "site.key")

    done = call("rotate-key", tmp_path / "site.key")

    said = " ".join(done.output.split())
    assert "the same patient has another pseudonym" in said
    assert "cannot be linked" in said
    kept = re.search(r"site\.key\.until-\d{4}-\d\d-\d\d", said)
    assert kept
    assert (
        SiteKey.from_file(tmp_path / kept[0]) == first != SiteKey.from_file(tmp_path / "site.key")
    )


@pytest.fixture
def officer(tmp_path: Path) -> Path:
    keys = (tmp_path / "officer.key", tmp_path / "officer.pem")
    made = call("officer-key", *keys, typed=f"{PASSPHRASE}\n{PASSPHRASE}\n")
    assert made.exit_code == 0, made.output
    assert PASSPHRASE not in made.output
    return tmp_path


def test_the_officer_finds_a_patient_and_nobody_else_does(officer: Path) -> None:
    with ReidentificationTable(officer / "table", officer / "officer.pem") as table:
        table.add("a" * 32, "North", "4711")
        table.add("b" * 32, "", "evil\x1b[2Jname")
    command = ("reidentify", officer / "table", "--key", officer / "officer.key")

    found = call(*command, "a" * 32, "b" * 32, typed=f"{PASSPHRASE}\n")
    missing = call(*command, "a" * 32, "c" * 32, typed=f"{PASSPHRASE}\n")
    wrong = call(*command, "a" * 32, typed="another passphrase\n")

    assert found.exit_code == 0
    assert re.search(rf"{'a' * 32}\W+4711\W+North", found.output)
    assert "\x1b[2J" not in found.output
    assert "evil\\x1b[2Jname" in found.output
    assert missing.exit_code == 1
    assert f"Not in the table: {'c' * 32}" in missing.output
    assert isinstance(wrong.exception, ConfigError)
    assert "4711" not in wrong.output + str(wrong.exception)


def test_a_damaged_record_is_told_of(officer: Path) -> None:
    with ReidentificationTable(officer / "table", officer / "officer.pem") as table:
        for name in "ab":
            table.add(name * 32, "", name)
    content = bytearray((officer / "table").read_bytes())
    content[-1] ^= 1
    (officer / "table").write_bytes(content + b"half a record")
    command = ("reidentify", officer / "table", "--key", officer / "officer.key")

    said = call(*command, "a" * 32, typed=f"{PASSPHRASE}\n")

    assert said.exit_code == 0
    assert "damaged or of another key: 2." in said.output
    assert "ends within a record" in said.output


# --- A node whose cohort is sealed --------------------------------------------------------------


class Site:
    """A node beside a cohort, sealed or not."""

    def __init__(self, folder: Path, spec: RunSpec, cloister: Callable[..., Any]) -> None:
        self.folder, self.spec, self.cloister = folder, spec, cloister
        self.home, self.cohort, self.key = folder / "north", folder / "c", folder / "cohort.key"
        create_key(self.key)

    def write(self, *, sealed: bool) -> None:
        key = read_key(self.key, "cohort key") if sealed else None
        pixels = np.zeros(self.spec.input.shape, dtype=np.uint16)
        with CohortBuilder(self.cohort, self.spec.input.shape, key) as builder:
            for number in range(60):
                split = "test" if number < 5 else "train"
                record = ImageRecord(f"p{number}", "", "", f"{number}", number % 2, 9, 9, split)
                builder.add(record, pixels)
            meta = CohortMeta.of(self.spec, unit="patient", source="test", created="2026-01-01")
            builder.finish(meta)

    def init(self, *more: object) -> Any:
        says = ("--site", "north", "--declared-size", "60", "--epsilon", "8", "--delta", "1e-3")
        return self.cloister("node", "init", self.home, *says, "--cohort", self.cohort, *more)

    def admit(self) -> Any:
        return self.cloister("node", "admit", self.home, "--reason", "looked at", "--by", "me")


@pytest.fixture
def site(tmp_path: Path, make_spec: Callable[..., RunSpec], cloister: Callable[..., Any]) -> Site:
    return Site(tmp_path, make_spec(), cloister)


def test_a_node_is_set_up_admits_and_opens_on_a_sealed_cohort(site: Site) -> None:
    site.write(sealed=True)
    without = site.init()
    assert without.code != 0
    assert "--cohort-key" in without.words
    assert not site.home.exists()

    made = site.init("--cohort-key", site.key)
    assert made.code == 0, made.words
    admitted = site.admit()
    assert admitted.code == 0, admitted.words
    assert "sealed on the disk" in admitted.words
    home = NodeHome.open(site.home)
    home.gate()
    home.open_cohort().check_fits(site.spec)
    shown = call("show", site.cohort, "--verify", "--cohort-key", site.key)
    assert "All 60 images are as they were stored" in shown.output
    assert {path.name for path in site.cohort.iterdir()} == {
        SEALED_IMAGES,
        SEALED_INDEX,
        "sealed.json",
    }


def test_a_node_without_its_key_does_not_open(site: Site) -> None:
    site.write(sealed=True)
    site.init("--cohort-key", site.key)
    site.admit()
    expected = key_id(read_key(site.key, "cohort key"))
    site.key.rename(site.folder / "elsewhere")

    with pytest.raises(ConfigError, match=r"cohort\.key: the cohort key cannot be read"):
        NodeHome.open(site.home).gate()
    create_key(site.key)
    with pytest.raises(CohortError, match=f"sealed under the key {expected}, given was the key"):
        NodeHome.open(site.home).open_cohort()


def test_an_unsealed_cohort_is_not_admitted_where_the_file_wants_it_sealed(site: Site) -> None:
    site.write(sealed=False)
    assert site.init("--cohort-key", site.key).code == 0

    refused = site.admit()

    assert refused.code == 1
    assert "It lies there unsealed" in refused.words
    home = NodeHome.open(site.home)
    assert home.ledger().book.admitted == ""
    file = site.home / "node.toml"
    file.write_text(file.read_text().partition("[intake.encryption]")[0])
    assert site.admit().code == 0  # the same cohort, where the file does not ask for it
