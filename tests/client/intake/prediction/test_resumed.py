"""A prediction that is killed goes on where it was: the same answers, none twice, none lost."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydicom import dcmread

from client.intake.deid.profile import Profile
from client.prediction.dicom_objects import Reports
from client.prediction.explained import Explainer
from client.prediction.output import Results, working_folder
from client.prediction.predict import LATE, Order, predict, predict_cohort
from common.cohort import Cohort
from common.errors import ConfigError, RunError

STUDIES = 7


@pytest.fixture
def source(clinic: Any) -> Any:
    """Seven studies of two images, of seven patients, and two files that cannot be answered."""
    generator = np.random.default_rng(8)
    for number in range(2 * STUDIES):
        values = generator.integers(0, 4096, (20, 30), dtype=np.uint16)
        study = f"1.2.3.{number // 2}"
        clinic.hospital.film(
            f"{number}.dcm", values, StudyInstanceUID=study, PatientID=f"P{number // 2}"
        )
    shutil.copy(clinic.hospital.folder / "0.dcm", clinic.hospital.folder / "copy.dcm")
    clinic.hospital.film("cut.dcm", StudyInstanceUID="1.2.3.2", PatientID="P2", PixelData=b"\0\0")
    return clinic


class Killed(BaseException):
    """Ends a prediction as nothing catches it."""


def stop_at(monkeypatch: pytest.MonkeyPatch, name: str, count: int) -> None:
    """The `count`-th call of a method of `Results` does not come to its end."""
    plain, calls = getattr(Results, name), [0]

    def stopped(self: Any, *of: Any) -> Any:
        calls[0] += 1
        if calls[0] == count:
            raise Killed
        return plain(self, *of)

    monkeypatch.setattr(Results, name, stopped)


def said(folder: Path) -> dict[str, Any]:
    """All that is said, but when."""
    found: dict[str, Any] = json.loads((folder / "predictions.json").read_text())
    return found | {"made": ""}


def asked(clinic: Any, name: str, **order: Any) -> Order:
    model = order.pop("model", None) or clinic.model()
    additions = (Reports(model.package),)
    target = clinic.hospital.place / name
    plain = Order(model, clinic.hospital.folder, target, additions=additions)
    return replace(plain, pictures=Explainer(model), **order)


@pytest.mark.parametrize(("name", "count"), [("commit", 3), ("write", 8), ("finish", 1)])
def test_it_goes_on_where_it_was_ended(
    source: Any, monkeypatch: pytest.MonkeyPatch, name: str, count: int
) -> None:
    model = source.model()
    with monkeypatch.context() as patch:
        stop_at(patch, name, count)
        with pytest.raises(Killed):
            predict(asked(source, "out", model=model), pool=source.in_this_process)
    target = source.hospital.place / "out"
    assert not target.exists()
    assert working_folder(target).stat().st_mode & 0o777 == 0o700
    calls, plain = [], type(model).answers

    def counted(self: Any, seen: Any, pictures: Any = None) -> Any:
        calls.append(1)
        return plain(self, seen, pictures)

    monkeypatch.setattr(type(model), "answers", counted)
    again = predict(asked(source, "out", model=model), pool=source.in_this_process)
    assert again.before == {"commit": 2, "write": 2, "finish": STUDIES}[name]
    assert len(calls) == STUDIES - again.before
    assert not working_folder(target).exists()
    once = predict(asked(source, "once", model=model), pool=source.in_this_process)
    assert said(target) == said(source.hospital.place / "once")
    assert (again.images, again.studies, again.decisions) == (
        once.images, once.studies, once.decisions,
    )  # fmt: skip
    assert sorted(map(str, again.refused)) == sorted(map(str, once.refused))
    for table in ("predictions.csv", "studies.csv", "refused.csv"):
        whole = (source.hospital.place / "once" / table).read_bytes()
        assert (target / table).read_bytes() == whole
    pngs = {p.name: p.read_bytes() for p in (target / "explanations").iterdir()}
    assert pngs == {
        p.name: p.read_bytes() for p in (source.hospital.place / "once" / "explanations").iterdir()
    }
    reports = [dcmread(path).StudyInstanceUID for path in sorted((target / "sr").iterdir())]
    assert sorted(reports) == sorted({row["study_instance_uid"] for row in said(target)["studies"]})


def test_a_line_that_was_cut_off_is_asked_again(
    source: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = source.model()
    with monkeypatch.context() as patch:
        stop_at(patch, "commit", 4)
        with pytest.raises(Killed):
            predict(asked(source, "out", model=model), pool=source.in_this_process)
    journal = working_folder(source.hospital.place / "out") / "journal.jsonl"
    journal.write_bytes(journal.read_bytes()[:-20])
    again = predict(asked(source, "out", model=model), pool=source.in_this_process)
    assert again.before == 2
    predict(asked(source, "once", model=model), pool=source.in_this_process)
    assert said(source.hospital.place / "out") == said(source.hospital.place / "once")


@pytest.fixture
def ended(source: Any, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What waits of a prediction that was ended in its fifth study."""
    with monkeypatch.context() as patch:
        stop_at(patch, "commit", 5)
        with pytest.raises(Killed):
            predict(asked(source, "out"), pool=source.in_this_process)
    return working_folder(source.hospital.place / "out")


def changed_line(journal: bytes) -> bytes:
    return journal.replace(b'"P1"', b'"P2"', 1)


def without_its_second_line(journal: bytes) -> bytes:
    first, _, *rest = journal.splitlines(keepends=True)
    return b"".join([first, *rest])


@pytest.mark.parametrize(
    "damage",
    [
        changed_line,
        without_its_second_line,
        lambda _: b"\n",
        lambda _: b"{}\n",
        lambda _: b"\xff\xfe\0\n",
        lambda _: b"[" * 200_000 + b"\n",
        lambda journal: journal + b"\0" * 512 + b"\n",
    ],
)
def test_a_journal_that_is_not_as_it_was_written_is_named_and_nothing_is_lost(
    source: Any, ended: Path, damage: Callable[[bytes], bytes]
) -> None:
    journal = ended / "journal.jsonl"
    was = journal.read_bytes()
    journal.write_bytes(damage(was))
    assert journal.read_bytes() != was
    kept = {path: path.read_bytes() for path in ended.rglob("*") if path.is_file()}
    with pytest.raises(
        ConfigError, match=r"journal\.jsonl: line \d is not as it was; .*begins anew"
    ):
        predict(asked(source, "out"), pool=source.in_this_process)
    assert {path: path.read_bytes() for path in ended.rglob("*") if path.is_file()} == kept
    shutil.rmtree(ended)  # as it says
    assert predict(asked(source, "out"), pool=source.in_this_process).before == 0


@pytest.mark.parametrize("text", ["[1]", "3", "", "[" * 200_000, "{", "null"])
def test_a_question_that_cannot_be_read_is_another(source: Any, ended: Path, text: str) -> None:
    (ended / "asked.json").write_text(text)
    with pytest.raises(ConfigError, match="was not said, and is"):
        predict(asked(source, "out"), pool=source.in_this_process)


def test_a_file_that_is_gone_is_missed(source: Any, ended: Path) -> None:
    (ended / "answers" / "sr" / "2.dcm").unlink()
    with pytest.raises(ConfigError, match=r"sr/2\.dcm: was written, and is gone"):
        predict(asked(source, "out"), pool=source.in_this_process)


@pytest.mark.parametrize("name", ["out", "a/out", "link/out"])
def test_results_do_not_grow_among_what_is_read(source: Any, name: str) -> None:
    folder = source.hospital.folder
    (folder / "a").mkdir()
    (source.hospital.place / "link").symlink_to(folder)
    base = source.hospital.place if name.startswith("link") else folder
    order = replace(asked(source, "x"), target=base / name)
    with pytest.raises(ConfigError, match=r"lies in .*name a place outside of it"):
        predict(order, pool=source.in_this_process)
    assert not working_folder(base / name).exists()
    beside = replace(order, target=folder.with_name(f"{folder.name}-answers"))
    assert predict(beside, pool=source.in_this_process).studies == STUDIES


OTHER: dict[str, tuple[Callable[[Any], dict[str, Any]], str]] = {
    "model": (lambda clinic: {"model": clinic.model(seed=9)}, "the model was"),
    "options": (lambda _: {"additions": ()}, "what is made was tables and structured report"),
    "profile": (lambda _: {"profile": Profile(faces="keep")}, "the profile was"),
    "source": (lambda clinic: {"source": clinic.hospital.place / "moved"}, "the source was"),
}


@pytest.mark.parametrize(("other", "words"), OTHER.values(), ids=OTHER.keys())
def test_answers_to_two_questions_are_never_in_one_folder(
    source: Any, monkeypatch: pytest.MonkeyPatch, other: Callable[[Any], Any], words: str
) -> None:
    with monkeypatch.context() as patch:
        stop_at(patch, "commit", 3)
        with pytest.raises(Killed):
            predict(asked(source, "out"), pool=source.in_this_process)
    shutil.copytree(source.hospital.folder, source.hospital.place / "moved")
    place = working_folder(source.hospital.place / "out")
    before = {path: path.read_bytes() for path in place.rglob("*") if path.is_file()}
    with pytest.raises(ConfigError, match=words):
        predict(asked(source, "out", **other(source)), pool=source.in_this_process)
    assert {path: path.read_bytes() for path in place.rglob("*") if path.is_file()} == before
    predict(asked(source, "another", **other(source)), pool=source.in_this_process)


def cohort_of(clinic: Any, seed: int) -> Any:
    """Four studies of four patients, of whom no other seed has one, always at the same place."""
    place = clinic.hospital.place
    for old in (clinic.hospital.folder, place / "cohort", place / "cohort.intake"):
        shutil.rmtree(old, ignore_errors=True)
    generator = np.random.default_rng(seed)
    for number in range(4):
        values = generator.integers(0, 4096, (20, 30), dtype=np.uint16)
        named = {"StudyInstanceUID": f"1.2.{seed}.{number}", "PatientID": f"S{seed}P{number}"}
        clinic.hospital.film(f"{number}.dcm", values, **named)
    labels = {f"S{seed}P{number}": "normal" for number in range(4)}
    return clinic.hospital.take_in(clinic.hospital.labels(labels)).cohort


def test_a_cohort_that_took_the_place_of_another_gets_its_own_answers(
    clinic: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, cohort = clinic.model(), cohort_of(clinic, 7)
    order = Order(model, cohort.path, clinic.hospital.place / "out")
    with monkeypatch.context() as patch:
        stop_at(patch, "commit", 3)
        with pytest.raises(Killed):
            predict_cohort(order, cohort)
    kept = clinic.hospital.place / "kept"
    shutil.copytree(cohort.path, kept)
    other = cohort_of(clinic, 8)
    assert other.path == cohort.path
    with pytest.raises(ConfigError, match=r"the cohort was [0-9a-f]{64}, and is [0-9a-f]{64}\."):
        predict_cohort(order, other)
    predict_cohort(replace(order, target=clinic.hospital.place / "another"), other)
    told = {row["patient_id"] for row in said(clinic.hospital.place / "another")["images"]}
    assert told == set(other.patients)
    shutil.rmtree(other.path)
    kept.rename(cohort.path)
    assert predict_cohort(order, Cohort.open(cohort.path)).before == 2
    told = {row["patient_id"] for row in said(order.target)["images"]}
    assert told == set(cohort.patients)


def test_what_came_to_a_study_that_was_answered_is_refused_and_the_rest_is_new(
    source: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        stop_at(patch, "commit", 3)
        with pytest.raises(Killed):
            predict(asked(source, "out"), pool=source.in_this_process)
    source.hospital.film("late.dcm", StudyInstanceUID="1.2.3.0", PatientID="P0")
    source.hospital.film("new.dcm", StudyInstanceUID="1.2.3.99", PatientID="P99")
    header = dcmread(source.hospital.folder / "2.dcm")
    header.PatientName = "Changed"
    header.save_as(source.hospital.folder / "2.dcm")
    predict(asked(source, "out"), pool=source.in_this_process)
    found = said(source.hospital.place / "out")
    reasons = {row["file"]: row["reason"] for row in found["refused"]}
    assert (reasons["late.dcm"], reasons["2.dcm"]) == (LATE, LATE)
    files = [row["file"] for row in found["images"]]
    assert len(files) == len(set(files)) == 2 * STUDIES + 1
    assert "new.dcm" in files


def made_before(place: Path, name: str, mode: int) -> Path:
    """What waits, as another may have made it; all else of it is as it should be."""
    place.mkdir(mode=0o700)
    (place / "answers").mkdir(mode=0o700)
    (place / "journal.jsonl").touch(mode=0o600)
    (place / "asked.json").touch(mode=0o600)
    (place / name).chmod(mode)
    return place / name


OPEN = {"": 0o001, "answers": 0o002, "journal.jsonl": 0o004, "asked.json": 0o040}


@pytest.mark.parametrize(("name", "bit"), [*OPEN.items(), ("", 0o010), ("", 0o020)])
def test_nothing_is_written_where_others_may_look(clinic: Any, name: str, bit: int) -> None:
    clinic.hospital.film("0.dcm")
    target = clinic.hospital.place / "out"
    path = made_before(working_folder(target), name, 0o700 | bit)
    with path.open("rb") if path.is_file() else nullcontext() as reader:
        with pytest.raises(ConfigError, match=rf"{path}: is open to others \(mode 07..\)") as said:
            predict(asked(clinic, "out"), pool=clinic.in_this_process)
        assert reader is None or reader.read() == b""
    assert f"Give another name, or remove {working_folder(target)}" in str(said.value)
    assert not target.exists()
    path.chmod(0o700)
    assert predict(asked(clinic, "out"), pool=clinic.in_this_process).images == 1


def test_nothing_is_written_where_another_is_the_owner(
    clinic: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    clinic.hospital.film("0.dcm")
    path = made_before(working_folder(clinic.hospital.place / "out"), "", 0o700)
    monkeypatch.setattr(os, "geteuid", lambda: path.stat().st_uid + 1)
    with pytest.raises(ConfigError, match=f"{path}: belongs to another user"):
        predict(asked(clinic, "out"), pool=clinic.in_this_process)
    assert not any((path / "answers").iterdir())


@pytest.mark.parametrize(
    ("name", "there"), [*((name, True) for name in OPEN), ("", False), ("journal.jsonl", False)]
)
def test_no_link_is_followed_to_where_answers_would_go(clinic: Any, name: str, there: bool) -> None:
    clinic.hospital.film("0.dcm")
    place, away = working_folder(clinic.hospital.place / "out"), clinic.hospital.place / "away"
    if there:
        made_before(away, "", 0o700)
    if name:
        made_before(place, "", 0o700)
        path = place / name
        path.rmdir() if path.is_dir() else path.unlink()
    (place / name).symlink_to(away / name)
    with pytest.raises(ConfigError, match=f"{place / name}: is a link, no "):
        predict(asked(clinic, "out"), pool=clinic.in_this_process)
    assert not there or not [p for p in away.rglob("*") if p.is_file() and p.stat().st_size]


def test_a_file_where_answers_would_wait_is_left_and_named(clinic: Any) -> None:
    clinic.hospital.film("0.dcm")
    place = working_folder(clinic.hospital.place / "out")
    place.write_text("mine")
    place.chmod(0o600)
    with pytest.raises(ConfigError, match=f"{place}: is no folder"):
        predict(asked(clinic, "out"), pool=clinic.in_this_process)
    assert place.read_text() == "mine"


def test_a_link_among_the_answers_is_neither_followed_nor_kept(
    source: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        stop_at(patch, "commit", 3)
        with pytest.raises(Killed):
            predict(asked(source, "out"), pool=source.in_this_process)
    away = source.hospital.place / "away"
    away.write_text("mine")
    answers = working_folder(source.hospital.place / "out") / "answers"
    for name in ("predictions.json", "folder"):
        (answers / name).symlink_to(away if name != "folder" else source.hospital.folder)
    (answers / "studies.csv").symlink_to("nowhere")
    assert predict(asked(source, "out"), pool=source.in_this_process).before == 2
    assert away.read_text() == "mine"
    assert not [p for p in (source.hospital.place / "out").rglob("*") if p.is_symlink()]


def test_two_at_once_do_not_write_into_one_folder(source: Any) -> None:
    order = asked(source, "out")

    class Meanwhile(Reports):
        def of_study(self, study: Any) -> Any:
            with pytest.raises(ConfigError, match="another prediction is writing there"):
                predict(order, pool=source.in_this_process)
            return super().of_study(study)

    both = replace(order, additions=(Meanwhile(order.model.package),))
    assert predict(both, pool=source.in_this_process).studies == STUDIES


def test_a_full_disk_keeps_what_was_answered_and_says_so(
    source: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, calls = Results.write, [0]

    def full(self: Any, *of: Any) -> None:
        calls[0] += 1
        if calls[0] == 8:
            raise OSError(28, "No space left on device")
        plain(self, *of)

    with monkeypatch.context() as patch:
        patch.setattr(Results, "write", full)
        with pytest.raises(RunError, match=r"give the same command again: what was answered waits"):
            predict(asked(source, "out"), pool=source.in_this_process)
    assert predict(asked(source, "out"), pool=source.in_this_process).before == 2


def test_what_was_killed_with_its_results_in_place_leaves_nothing(
    source: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", lambda *_, **__: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            predict(asked(source, "out"), pool=source.in_this_process)
    place = working_folder(source.hospital.place / "out")
    assert place.exists()
    with pytest.raises(ConfigError, match="expected a new name"):
        predict(asked(source, "out"), pool=source.in_this_process)
    assert not place.exists()
    assert len(said(source.hospital.place / "out")["studies"]) == STUDIES


def test_a_process_that_is_killed_goes_on(source: Any) -> None:
    """SIGKILL while it works; the next start is through, and all is there, once."""
    model = source.model()
    target = source.hospital.place / "out"
    command = [
        sys.executable, "-c", "from deploy.cli import main; main()", "predict",
        str(model.package.path), str(source.hospital.folder), str(target),
        "--unsigned", "--workers", "1", "--sr",
    ]  # fmt: skip
    journal = working_folder(target) / "journal.jsonl"
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, start_new_session=True) as one:
        while one.poll() is None and not _lines(journal):
            time.sleep(0.002)
        assert one.poll() is None, "it was through before it was killed"
        os.killpg(one.pid, signal.SIGKILL)
    assert 0 < _lines(journal) < STUDIES
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "by an earlier start" in " ".join(done.stdout.split())
    order = replace(asked(source, "once", model=model), pictures=None)
    predict(order, pool=source.in_this_process)
    ours, theirs = said(target), said(source.hospital.place / "once")
    assert ours == theirs
    assert len(list((target / "sr").iterdir())) == STUDIES


def _lines(journal: Path) -> int:
    try:
        return journal.read_bytes().count(b"\n")
    except FileNotFoundError:
        return 0
