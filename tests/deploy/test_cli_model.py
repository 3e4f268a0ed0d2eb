"""`cloister export`, `verify-model` and `optimise`, as a person meets them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from common.clock import Clock
from common.errors import ConfigError, IdentityError, PackageError
from common.package import CARD, MANIFEST, PERSONAL, SPEC, Manifest, Package, entry_of, origins_of
from deploy.cli_model import believed_authority, opened_model
from deploy.fine_tune import MUST_NOT_LEAVE
from server.authority import Authority, NewFederation, Signed

Cloister = Callable[..., Any]


@pytest.fixture
def run(cloister: Cloister, write_run: Callable[..., Path], tmp_path: Path) -> Path:
    """What a simulation of one round leaves."""
    toml = write_run(changes=[("rounds = 3", "rounds = 1")])
    assert cloister("simulate", toml, "--runs", tmp_path / "runs", "--workers", 0).code == 0
    (folder,) = (tmp_path / "runs").iterdir()
    return Path(folder)


@pytest.fixture
def home(tmp_path: Path) -> Path:
    new = NewFederation("chest", ["coordinator.example.org"], 9092)
    words, who = "a passphrase of many words", Signed("ada")
    return Authority.create(tmp_path / "home", new, words, who, Clock()).folder


def test_a_simulated_model_is_exported_signed_checked_and_made_smaller(
    cloister: Cloister, run: Path, home: Path, tmp_path: Path
):
    plain, signed, smaller = (tmp_path / name for name in ("plain", "signed", "smaller"))
    said = cloister("export", run, plain)
    assert said.code == 0, said.err
    assert "unsigned" in said.words
    said = cloister("verify-model", plain)
    assert said.code == 2
    assert "nobody has signed it" in said.words
    assert "--unsigned takes one" in said.words
    assert cloister("verify-model", plain, "--unsigned").code == 0

    said = cloister("export", plain, signed, "--sign", "--home", home)
    assert said.code == 2
    assert "nobody has signed it" in said.words
    said = cloister("export", plain, signed, "--sign", "--home", home, "--unsigned")
    assert "Signed on" in said.words
    believed = ("--authority", home / "ca.pem")
    said = cloister("verify-model", signed, *believed)
    assert said.code == 0
    assert "of the federation chest" in said.words
    sha256 = Package.open(run, unsigned=True).model_sha256
    assert sha256 in said.words
    assert cloister("verify-model", signed, *believed, "--expect", sha256).code == 0
    said = cloister("verify-model", signed, *believed, "--expect", "0" * 64)
    assert said.code == 2
    assert "an older one" in said.words

    said = cloister("optimise", run, smaller, "--prune", 0.5, "--sign", "--home", home)
    assert said.code == 0, said.err
    assert "pruned" in said.words
    assert "of every layer but the last" not in said.words
    assert "AUROC" in said.words
    assert "the file has the size that it had until it is compressed" in said.words
    assert cloister("verify-model", smaller / "pruned", *believed).code == 0
    table = json.loads((smaller / "optimise.json").read_text())
    assert set(table) == {"as it is", "pruned"}
    assert not (smaller / "quantised").exists()

    (signed / "model_card.md").write_text("the best model of all")
    said = cloister("verify-model", signed, *believed)
    assert said.code == 2
    assert "model_card.md: altered" in said.words


def test_a_model_of_a_sites_own_is_signed_by_no_command_and_says_that_it_must_stay(
    cloister: Cloister, run: Path, home: Path, tmp_path: Path
):
    card = json.loads((run / CARD).read_text()) | {PERSONAL: {"warning": "ours"}}
    (run / CARD).write_text(json.dumps(card))
    out, sign = tmp_path / "out", ("--sign", "--home", home)
    for command in (("export", run, out), ("optimise", run, out, "--prune", 0.5)):
        said = cloister(*command, *sign)
        assert said.code == 2
        assert "no federation signs it" in said.words
        assert not out.exists()
        said = cloister(*command)
        assert said.code == 0, said.err
        assert MUST_NOT_LEAVE in said.words
        shutil.rmtree(out)


def test_what_a_node_believes_is_asked_even_where_an_unsigned_model_would_be_taken(
    run: Path, tmp_path: Path
):
    bundle = tmp_path / "north" / "identity" / "bundle.json"
    bundle.parent.mkdir(parents=True)
    assert opened_model(run, tmp_path / "north", None, unsigned=True).signer is None
    bundle.write_text("{}")
    for mode in (0o644, 0o600):  # others can write in it; damaged
        bundle.chmod(mode)
        with pytest.raises((ConfigError, IdentityError), match=r"bundle\.json"):
            opened_model(run, tmp_path / "north", None, unsigned=True)


@pytest.mark.parametrize(
    ("command", "says"),
    [
        (("export", "missing", "out"), "not the folder of a finished run"),
        (("export", "missing", "."), "is there already"),
        (("export", "missing", "out", "--sign", "--home", "."), "tls.pem"),
        (("verify-model", "missing"), "cannot be read"),
        (("verify-model", "x", "--node", "n", "--authority", "a"), "expected one of them"),
        (("verify-model", "x", "--home", "n", "--authority", "a"), "expected one of them"),
        (("optimise", "missing", "out"), "nothing to do"),
        (("optimise", "missing", "out", "--structured", "--quantise"), "give --prune"),
        (("optimise", "missing", "out", "--quantise"), "name it: --cohort"),
    ],
)
def test_a_mistake_is_one_message_and_leaves_nothing(
    cloister: Cloister,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    command: tuple[str, ...],
    says: str,
):
    monkeypatch.chdir(tmp_path)
    said = cloister(*command)
    assert said.code == 2
    assert says in said.words
    assert "Traceback" not in said.words
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_written_leaves_nothing(
    cloister: Cloister, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "file").write_text("x")
    monkeypatch.chdir(tmp_path)
    assert cloister("export", "missing", "file").code == 2
    assert (tmp_path / "file").read_text() == "x"


def test_who_is_believed_is_named_by_a_person(home: Path, tmp_path: Path):
    assert believed_authority(None, None) is None
    shutil.copy(home / "ca.pem", tmp_path / "theirs.pem")
    assert believed_authority(None, tmp_path / "theirs.pem") is not None


def test_a_withdrawn_model_and_what_is_made_of_it_is_refused_by_the_node(
    cloister: Cloister, run: Path, make_node: Callable[..., Path], tmp_path: Path
):
    """Signed or not: what a signature says is true for ever, and does not say that it is good."""
    node, smaller, onnx = make_node(), tmp_path / "smaller", tmp_path / "onnx"
    pruned, sha256 = smaller / "pruned", Package.open(run, unsigned=True).model_sha256
    said = cloister("optimise", run, smaller, "--prune", 0.5, "--structured")
    assert said.code == 0
    assert "50% of the filters of every layer but the last" in said.words
    assert f"It lies in {smaller}" in said.out
    assert cloister("export", pruned, onnx, "--format", "onnx").code == 0
    for model in (run, pruned):
        assert opened_model(model, node, None, unsigned=True)
    settings = node / "node.toml"
    empty, named = "withdrawn = []", f'withdrawn = ["{sha256}"]'
    settings.write_text(settings.read_text().replace(empty, named))
    for model in (run, pruned):
        with pytest.raises(PackageError, match=f"{sha256}, which this site has withdrawn"):
            opened_model(model, node, None, unsigned=True)
    answers = tmp_path / "answers"
    said = cloister("predict", run, tmp_path / "cohort", answers, "--node", node, "--unsigned")
    assert (said.code, answers.exists()) == (2, False)
    assert "withdrawn" in said.words
    spec = Package.open(pruned, unsigned=True).spec
    assert sha256 in origins_of(spec, json.loads((onnx / CARD).read_bytes()))
    settings.write_text(settings.read_text().replace(sha256, "no digest"))
    with pytest.raises(ConfigError, match=r"limits\.withdrawn"):  # never taken for an empty list
        opened_model(run, node, None, unsigned=True)


@pytest.mark.parametrize(
    "card",
    [
        {"model": {"safetensors_sha256": "a" * 64}},
        {"smaller": {"of_model_sha256": "a" * 64}, "model": None},
        {PERSONAL: {"began_with": "a" * 64}, "smaller": []},
    ],
)
def test_what_a_model_was_made_of_is_read_from_any_card(make_spec: Any, card: dict[str, Any]):
    spec = make_spec(start={"model_sha256": "b" * 64})
    assert origins_of(spec, card) == {"a" * 64, "b" * 64}
    assert origins_of(make_spec(), {"model": "x", "smaller": {"of_model_sha256": 3}}) == frozenset()


@pytest.mark.parametrize(
    ("file", "says"),
    [
        ((SPEC, None), SPEC),
        ((SPEC, b"\xff\xfe"), "finished run"),
        ((CARD, None), CARD),
        ((CARD, b"[]"), "a JSON object"),
        ((CARD, b"[" * 200_000), "no JSON"),
        ((CARD, b"\xff{"), "no JSON"),
    ],
)
def test_an_export_that_is_whole_and_makes_no_sense_is_refused_in_a_line(
    cloister: Cloister,
    make_spec: Callable[..., Any],
    tmp_path: Path,
    file: tuple[str, bytes | None],
    says: str,
):
    found = dict([(SPEC, make_spec().canonical_json.encode()), (CARD, b"{}"), file])
    there = {each: inner for each, inner in found.items() if inner is not None}
    for each, inner in there.items():
        (tmp_path / each).write_bytes(inner)
    files = {each: entry_of(tmp_path / each) for each in there}
    made = Manifest(kind="onnx", made=Clock().date(), files=files)
    (tmp_path / MANIFEST).write_text(made.model_dump_json())
    said = cloister("verify-model", tmp_path, "--unsigned")
    assert said.code == 2
    assert says in said.words


def test_the_name_of_a_file_steers_no_terminal(cloister: Cloister, tmp_path: Path):
    (tmp_path / "a").touch()
    files = {"a": entry_of(tmp_path / "a")}
    made = Manifest(kind="onnx", made=Clock().date(), files=files)
    (tmp_path / MANIFEST).write_text(made.model_dump_json())
    (tmp_path / "a\x1b]0;owned\x07\x1b[2J").symlink_to(tmp_path)
    said = cloister("verify-model", tmp_path, "--unsigned")
    assert said.code == 2
    assert "\\x1b[2J" in said.err
    assert "\x1b" not in said.err
