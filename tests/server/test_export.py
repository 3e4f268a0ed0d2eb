"""A package, and what somebody may do to it on its way to a hospital."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from common import certificates, package
from common.certificates import Use
from common.clock import Clock
from common.errors import ConfigError, IdentityError, PackageError, RunError
from common.package import Manifest, Package, check_folder, entry_of
from server.authority import Authority, NewFederation, Signed
from server.card import write_card
from server.export import Described, Signing, export, write_folder
from server.issuing import Wish, issue

Runs = Callable[..., Path]
ADA = Signed("ada")
NOW = datetime(2026, 8, 1, 12, tzinfo=UTC)


def at(moment: datetime) -> Clock:
    return Clock(date=lambda: moment)


def federation(folder: Path) -> Authority:
    new = NewFederation("chest", ["coordinator.example.org"], 9092)
    return Authority.create(folder, new, "a passphrase of many words", ADA, at(NOW))


@pytest.fixture(scope="module")
def coordinator(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return federation(tmp_path_factory.mktemp("ours") / "home")


@pytest.fixture(scope="module")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    """Another federation of the same name, as anybody can make one."""
    return federation(tmp_path_factory.mktemp("theirs") / "home")


@pytest.fixture(scope="module")
def signing(coordinator: Authority) -> Signing:
    return Signing.open(coordinator.folder, at(NOW))


@pytest.fixture(scope="module")
def template(
    prepared_runs: Runs,
    finish_run: Runs,
    signing: Signing,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """A finished run and its signed package, not to be changed."""
    place = tmp_path_factory.mktemp("made")
    run = finish_run(Path(shutil.copytree(prepared_runs(), place / "run")))
    export(run, place / "signed", "package", signing=signing, clock=at(NOW))
    return place


@pytest.fixture
def run(template: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(template / "run", tmp_path / "run"))


@pytest.fixture
def signed(template: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(template / "signed", tmp_path / "signed"))


def opened(folder: Path, coordinator: Authority, **changes: Any) -> Package:
    asked: dict[str, Any] = {"authority": coordinator.certificate, "clock": at(NOW)} | changes
    return Package.open(folder, **asked)


def sign_again(folder: Path, signing: Signing, **changes: Any) -> None:
    """A manifest of what lies there now, signed, with `changes`."""
    old = Manifest.model_validate_json((folder / package.MANIFEST).read_bytes())
    files = {name: entry_of(folder / name) for name in old.files if (folder / name).exists()}
    content = {**json.loads(old.model_dump_json()), "files": {}} | changes
    content["files"] |= {n: e.model_dump() for n, e in files.items()} | changes.get("files", {})
    raw = json.dumps(content).encode()
    (folder / package.MANIFEST).write_bytes(raw)
    (folder / package.SIGNATURE).write_bytes(signing.sign(raw))


# --- What is right --------------------------------------------------------------------------------


def test_a_signed_package_says_who_made_it_and_holds_the_runs_network(
    run: Path, signed: Path, coordinator: Authority
):
    found = opened(signed, coordinator)
    assert found.signer is not None
    assert found.signer.federation == "chest"
    assert found.signer.coordinator == "coordinator.example.org"
    assert found.signer.fingerprint == certificates.fingerprint(coordinator.authority_key)
    assert found.signer.signed == NOW
    network, weights = found.network(), load_file(run / "model.safetensors")
    assert not network.training
    assert all(np.array_equal(weights[n], t.numpy()) for n, t in network.state_dict().items())
    assert found.card["model"]["safetensors_sha256"] == found.model_sha256


def test_what_was_calibrated_on_the_validation_part_is_in_it_and_in_its_card(
    signed: Path, coordinator: Authority
):
    found = opened(signed, coordinator)
    assert found.calibration is not None
    assert found.card["calibration"]["temperatures"] == list(found.calibration.temperatures)
    assert "## Calibration" in (signed / package.CARD_TEXT).read_text()


def test_an_unsigned_one_and_a_runs_folder_are_taken_in_so_many_words_alone(
    run: Path, tmp_path: Path
):
    export(run, tmp_path / "plain", "package", signing=None)
    for folder in (tmp_path / "plain", run):
        assert Package.open(folder, unsigned=True).signer is None
        with pytest.raises(PackageError, match="signed"):
            Package.open(folder)


def test_a_package_can_be_exported_again_and_signed(
    run: Path, signing: Signing, coordinator: Authority, tmp_path: Path
):
    export(run, tmp_path / "plain", "package", signing=None)
    knows = replace(signing, unsigned=True)
    export(tmp_path / "plain", tmp_path / "again", "package", signing=knows, clock=at(NOW))
    export(tmp_path / "again", tmp_path / "third", "package", signing=signing, clock=at(NOW))
    first, again, third = (Described.of(tmp_path / name) for name in ("plain", "again", "third"))
    assert opened(tmp_path / "third", coordinator).signer is not None
    assert first.files() == again.files() == third.files()


def of_a_stranger(folder: Path, stranger: Signing) -> None:
    sign_again(folder, stranger)


def with_a_new_manifest(folder: Path, _: Signing) -> None:
    swap_the_card(folder)


def without_its_signature(folder: Path, _: Signing) -> None:
    swap_the_card(folder)
    (folder / package.SIGNATURE).unlink()


def without_its_manifest(folder: Path, _: Signing) -> None:
    for name in (package.SIGNATURE, package.MANIFEST):
        (folder / name).unlink()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (of_a_stranger, "this federation's authority did not sign it"),
        (with_a_new_manifest, "signature does not fit"),
        (without_its_signature, "nobody has signed it"),
        (without_its_manifest, "nobody has signed it"),
    ],
    ids=lambda each: getattr(each, "__name__", ""),
)
def test_what_is_not_ours_does_not_become_ours_by_being_signed(
    signed: Path,
    signing: Signing,
    stranger: Authority,
    change: Callable[[Path, Signing], None],
    says: str,
):
    change(signed, Signing.open(stranger.folder, at(NOW)))
    out, kinds = signed.parent / "out", get_args(package.Kind)
    for kind in kinds:
        with pytest.raises((IdentityError, PackageError), match=says):
            export(signed, out, kind, signing=signing, clock=at(NOW))
    assert not out.exists()
    # Whoever has it in hand may export it; nobody then vouches for it.
    assert export(signed, out, "package", signing=None).signer is None


def test_the_word_for_what_nobody_has_signed_is_none_for_what_a_stranger_has(
    signed: Path, signing: Signing, stranger: Authority, tmp_path: Path
):
    sign_again(signed, Signing.open(stranger.folder, at(NOW)))
    knows = replace(signing, unsigned=True)
    with pytest.raises(IdentityError, match="this federation's authority did not sign it"):
        export(signed, tmp_path / "ours", "package", signing=knows, clock=at(NOW))


@pytest.mark.parametrize("kind", ["package", "onnx", "monai"])
def test_whoever_writes_it_no_personal_model_is_signed(
    run: Path, signing: Signing, tmp_path: Path, kind: package.Kind
):
    files = Described.of(run).files()
    card = json.loads(files[package.CARD]) | {package.PERSONAL: {"warning": "ours alone"}}
    files |= {package.CARD: json.dumps(card).encode()}
    with pytest.raises(PackageError, match="no federation signs it"):
        write_folder(tmp_path / "out", kind, files, signing=signing, clock=at(NOW))
    assert not (tmp_path / "out").exists()
    assert write_folder(tmp_path / "out", kind, files).signer is None


def test_a_model_outlives_the_certificate_of_its_coordinator(signed: Path, coordinator: Authority):
    later = NOW + timedelta(days=3000)
    assert opened(signed, coordinator, clock=at(later)).signer is not None


def test_another_coordinators_key_signs_under_the_same_authority(
    run: Path, signed: Path, coordinator: Authority, tmp_path: Path
):
    """A renewed certificate neither voids what was signed before nor needs a new pin."""
    shutil.copytree(coordinator.folder, tmp_path / "renewed")
    replace(coordinator, folder=tmp_path / "renewed").renew_tls((), None, 365, ADA)
    signing = Signing.open(tmp_path / "renewed", at(NOW))
    export(run, tmp_path / "new", "package", signing=signing, clock=at(NOW))
    assert opened(tmp_path / "new", coordinator).signer is not None
    assert opened(signed, coordinator).signer is not None


# --- What was done to it --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["model.safetensors", "spec.json", "model_card.json", "model_card.md"]
)
def test_one_changed_bit_of_any_file_is_told_by_name(
    signed: Path, coordinator: Authority, name: str
):
    content = bytearray((signed / name).read_bytes())
    content[len(content) // 2] ^= 1
    (signed / name).write_bytes(content)
    with pytest.raises(PackageError, match=f"{name}: altered"):
        opened(signed, coordinator)


@pytest.mark.parametrize("name", ["model.safetensors", "model_card.md", "calibration.json"])
def test_a_missing_file_is_told_by_name(signed: Path, coordinator: Authority, name: str):
    (signed / name).unlink()
    with pytest.raises(PackageError, match=f"{name}: is missing"):
        opened(signed, coordinator)


@pytest.mark.parametrize("name", ["readme.txt", ".hidden", "model.pt", "more/code.py"])
def test_an_additional_file_is_told_by_name(signed: Path, coordinator: Authority, name: str):
    (signed / name).parent.mkdir(exist_ok=True)
    (signed / name).write_text("x")
    with pytest.raises(PackageError, match=f"holds '{name}'"):
        opened(signed, coordinator)


def swap_the_card(folder: Path) -> None:
    """A better looking card, with the manifest made to fit; the signature cannot be."""
    card = json.loads((folder / package.CARD).read_text())
    card["privacy"]["warning"] = None
    (folder / package.CARD).write_text(json.dumps(card))
    manifest = json.loads((folder / package.MANIFEST).read_text())
    manifest["files"][package.CARD] = entry_of(folder / package.CARD).model_dump()
    (folder / package.MANIFEST).write_text(json.dumps(manifest))


def test_a_manifest_that_was_made_to_fit_loses_its_signature(signed: Path, coordinator: Authority):
    swap_the_card(signed)
    with pytest.raises(IdentityError, match="signature does not fit"):
        opened(signed, coordinator)
    with pytest.raises(IdentityError, match="signature does not fit"):
        opened(signed, coordinator, unsigned=True)  # the word is for what has no signature


def test_without_its_signature_or_its_manifest_it_is_not_taken_for_a_signed_one(
    signed: Path, coordinator: Authority
):
    (signed / package.SIGNATURE).unlink()
    with pytest.raises(PackageError, match="nobody has signed it"):
        opened(signed, coordinator)
    (signed / package.MANIFEST).unlink()
    with pytest.raises(PackageError, match="a run's folder, which nobody has signed"):
        opened(signed, coordinator)


def test_a_signature_of_another_model_of_the_same_federation_does_not_fit(
    run: Path, signed: Path, signing: Signing, finish_run: Runs, coordinator: Authority
):
    other = finish_run(run, seed=9)
    export(other, run.parent / "older", "package", signing=signing, clock=at(NOW))
    shutil.copy(run.parent / "older" / package.SIGNATURE, signed / package.SIGNATURE)
    with pytest.raises(IdentityError, match="signature does not fit"):
        opened(signed, coordinator)


def test_the_weights_of_one_and_the_card_of_another_are_no_package_even_if_signed(
    run: Path, signed: Path, signing: Signing, finish_run: Runs, coordinator: Authority
):
    other = finish_run(run, seed=9)
    shutil.copy(other / package.MODEL, signed / package.MODEL)
    sign_again(signed, signing)
    with pytest.raises(PackageError, match="card of another model"):
        opened(signed, coordinator)


def test_another_federation_is_not_believed(
    run: Path, stranger: Authority, coordinator: Authority, tmp_path: Path
):
    theirs = Signing.open(stranger.folder, at(NOW))
    export(run, tmp_path / "theirs", "package", signing=theirs, clock=at(NOW))
    assert opened(tmp_path / "theirs", stranger).signer is not None
    for unsigned in (False, True):
        with pytest.raises(IdentityError, match="this federation's authority did not sign it"):
            opened(tmp_path / "theirs", coordinator, unsigned=unsigned)


def test_a_signed_one_is_not_believed_by_the_certificate_that_it_brings_along(signed: Path):
    with pytest.raises(PackageError, match="no authority is known"):
        Package.open(signed)
    assert Package.open(signed, unsigned=True).signer is None  # whole, and of nobody


def test_a_node_of_the_same_federation_cannot_sign_as_its_coordinator(
    signed: Path, signing: Signing, coordinator: Authority
):
    key = certificates.new_key()
    wish = Wish("north", key, Use.NODE, 365)
    node = issue(wish, coordinator.key, coordinator.certificate, NOW)
    sign_again(signed, replace(signing, key=key, certificate=node))
    with pytest.raises(IdentityError, match="not made for a coordinator"):
        opened(signed, coordinator)


def test_the_coordinators_signature_on_something_else_does_not_fit(
    signed: Path, signing: Signing, coordinator: Authority
):
    manifest = (signed / package.MANIFEST).read_bytes()
    other = certificates.sign(signing.key, "something else", manifest)
    found = json.loads((signed / package.SIGNATURE).read_text()) | {"signature": other}
    (signed / package.SIGNATURE).write_text(json.dumps(found))
    with pytest.raises(IdentityError, match="signature does not fit"):
        opened(signed, coordinator)


@pytest.mark.parametrize(
    ("made", "says"),
    [
        (NOW + timedelta(days=366), "not in force"),
        (NOW - timedelta(days=1), "not in force"),
        (NOW + timedelta(days=30), "set the clock right"),
    ],
)
def test_a_certificate_counts_at_the_time_of_signing(
    signed: Path, signing: Signing, coordinator: Authority, made: datetime, says: str
):
    sign_again(signed, signing, made=made.isoformat())
    clock = at(NOW if "clock" in says else NOW + timedelta(days=2000))
    with pytest.raises(IdentityError, match=says):
        opened(signed, coordinator, clock=clock)


def test_a_coordinator_whose_certificate_has_ended_signs_nothing(coordinator: Authority):
    with pytest.raises(IdentityError, match="ended"):
        Signing.open(coordinator.folder, at(NOW + timedelta(days=400)))


@pytest.mark.parametrize(
    "name", ["../escape", "/etc/passwd", "a/../../b", "", ".", "a//b", "a\\b", "a\nb", "x" * 200]
)
def test_a_name_that_leads_elsewhere_is_none(
    signed: Path, signing: Signing, coordinator: Authority, name: str
):
    (signed.parent / "escape").write_text("x")
    entry = {"sha256": "0" * 64, "size": 1}
    sign_again(signed, signing, files={name: entry})
    with pytest.raises(PackageError, match="not as this version writes it"):
        opened(signed, coordinator)


def link(place: Path) -> None:
    target = place.rename(place.parent.parent / "kept")
    place.symlink_to(target)


def pipe(place: Path) -> None:
    place.unlink()
    os.mkfifo(place)


def folder_link(place: Path) -> None:
    (place.parent / "more").symlink_to(place.parent.parent)


@pytest.mark.parametrize("change", [link, pipe, folder_link], ids=lambda each: each.__name__)
def test_links_and_pipes_are_no_files_of_a_package(
    signed: Path, coordinator: Authority, change: Callable[[Path], None]
):
    change(signed / package.MODEL)
    with pytest.raises(PackageError, match="a link, or no plain file"):
        opened(signed, coordinator)


def test_a_huge_file_is_refused_by_its_size_and_never_read(
    signed: Path, signing: Signing, coordinator: Authority
):
    with (signed / package.MODEL).open("r+b") as file:
        file.truncate(1 << 42)  # a hole: nothing is on disk
    with pytest.raises(PackageError, match="altered"):
        opened(signed, coordinator)
    with (signed / package.MODEL).open("r+b") as file:
        file.truncate(1 << 26)
    sign_again(signed, signing)
    with pytest.raises(PackageError, match="expected at most"):
        opened(signed, coordinator)  # vouched for, and still no weights of this network


def test_a_folder_full_of_files_or_folders_ends_the_reading(signed: Path, coordinator: Authority):
    deep = signed / "a" / "b" / "c" / "d"
    deep.mkdir(parents=True)
    with pytest.raises(PackageError, match="more files or folders"):
        opened(signed, coordinator)
    shutil.rmtree(signed / "a")
    for number in range(200):
        (signed / f"f{number}").touch()
    with pytest.raises(PackageError, match="more files or folders"):
        opened(signed, coordinator)


def test_an_export_for_others_is_no_package(
    run: Path, signing: Signing, coordinator: Authority, tmp_path: Path
):
    files = Described.of(run).files()
    write_folder(tmp_path / "onnx", "onnx", files, signing=signing, clock=at(NOW))
    assert check_folder(tmp_path / "onnx", authority=coordinator.certificate, clock=at(NOW))
    with pytest.raises(PackageError, match="kind 'onnx'"):
        opened(tmp_path / "onnx", coordinator)


# --- Weights --------------------------------------------------------------------------------------


def spoilt(run: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    weights = load_file(run / package.MODEL)
    change(weights)
    save_file(weights, run / package.MODEL)
    write_card(run)
    return run


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda w: w[min(w)].fill(np.nan), "no finite numbers"),
        (lambda w: w[min(w)].fill(np.inf), "no finite numbers"),
        (lambda w: w.update({min(w): w[min(w)].astype(np.float64)}), "not those of small-cnn"),
        (lambda w: w.pop(min(w)), "not those of small-cnn"),
        (lambda w: w.update({"more": np.zeros(3, np.float32)}), "not those of small-cnn"),
        (lambda w: w.update({min(w): w[min(w)].reshape(1, -1)}), "not those of small-cnn"),
    ],
)
def test_weights_that_cannot_work_are_refused(run: Path, change: Any, says: str):
    with pytest.raises(PackageError, match=says):
        Package.open(spoilt(run, change), unsigned=True).network()


def test_weights_that_change_after_the_check_are_not_loaded(signed: Path, coordinator: Authority):
    found = opened(signed, coordinator)
    content = bytearray((signed / package.MODEL).read_bytes())
    content[-1] ^= 1
    (signed / package.MODEL).write_bytes(content)
    with pytest.raises(PackageError, match="changed while it was being used"):
        found.network()


def test_a_run_whose_card_is_of_an_earlier_model_is_refused(run: Path):
    weights = load_file(run / package.MODEL)
    save_file({name: array + 1 for name, array in weights.items()}, run / package.MODEL)
    with pytest.raises(PackageError, match="card of another model"):
        Package.open(run, unsigned=True)


@pytest.mark.parametrize("content", ["[]", "{", "[" * 100_000, "nonsense"])
def test_a_card_that_is_none_is_refused(run: Path, content: str):
    (run / package.CARD).write_text(content)
    with pytest.raises(PackageError, match=r"model_card\.json"):
        Package.open(run, unsigned=True)


# --- Writing --------------------------------------------------------------------------------------


def test_nothing_is_written_over_and_nothing_half_written_stays(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "there").mkdir()
    with pytest.raises(ConfigError, match="is there already"):
        export(run, tmp_path / "there", "package", signing=None)
    before = sorted(tmp_path.iterdir())

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("server.export.write_durably", full)
    with pytest.raises(RunError, match="No space left"):
        export(run, tmp_path / "new", "package", signing=None)
    assert sorted(tmp_path.iterdir()) == before


def no_number(card: dict[str, Any]) -> None:
    card["privacy"]["all_sites_epsilon"] = float("nan")


def no_privacy(card: dict[str, Any]) -> None:
    del card["privacy"]


@pytest.mark.parametrize("change", [no_number, no_privacy], ids=lambda each: each.__name__)
def test_a_card_that_another_version_wrote_is_not_handed_on(
    run: Path, tmp_path: Path, change: Callable[[dict[str, Any]], None]
):
    card = json.loads((run / package.CARD).read_text())
    change(card)
    (run / package.CARD).write_text(json.dumps(card))
    with pytest.raises(PackageError, match="not as this version writes it"):
        export(run, tmp_path / "new", "package", signing=None)


def test_a_run_without_a_card_says_what_writes_one(run: Path, tmp_path: Path):
    (run / package.CARD).unlink()
    with pytest.raises(PackageError, match="cloister report"):
        export(run, tmp_path / "new", "package", signing=None)


def test_a_key_that_others_may_read_signs_nothing(coordinator: Authority, tmp_path: Path):
    shutil.copytree(coordinator.folder, tmp_path / "open")
    (tmp_path / "open" / "tls.pem").chmod(0o644)
    with pytest.raises(ConfigError, match="0600"):
        Signing.open(tmp_path / "open", at(NOW))
