"""Kept releases: encrypted, bound to their attempt, and gone when their run is over."""

from __future__ import annotations

import os
import stat
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save

from client.kept import KeptReleases
from client.keyfile import NodeKey
from client.ledger import Ledger, Place, Signed, TaskKey
from common.accounting import SubsampledGaussian
from common.errors import LedgerError, Refusal, RefusalCode

KEY = NodeKey(bytes(range(32)))
MECHANISM = SubsampledGaussian(0.1, 1.5, 4, "patient")
RUN = "a" * 64
FIRST = TaskKey(RUN, "training", 1, "1" * 64)


def files(place: Place) -> list[str]:
    return sorted(path.name for path in (place.folder / "releases").iterdir())


def file_of(place: Place, number: int = 0) -> Path:
    return place.folder / "releases" / files(place)[number]


def attempt_at(ledger: Ledger, number: int, release: bytes | None) -> int:
    attempt = ledger.reserve(TaskKey(RUN, "training", number, str(number) * 64), MECHANISM)
    if release is not None:
        ledger.commit(attempt, release)
    return attempt.number


def refused(place: Place, task: TaskKey = FIRST) -> str:
    with pytest.raises(Refusal) as error:
        Ledger(place).released(task)
    assert error.value.code is RefusalCode.REPLAY
    return error.value.detail


def test_the_same_task_gets_the_same_bytes_in_another_process_as_well(lived: Place):
    assert Ledger(lived).released(FIRST) == b"release 1" * 20
    assert Ledger(lived).released(replace_digest(FIRST, "2" * 64, 2)) == b"release 2" * 20
    assert Ledger(lived).released(replace_digest(FIRST, "3" * 64, 3)) is None


def replace_digest(task: TaskKey, digest: str, number: int) -> TaskKey:
    return task._replace(digest=digest, round_number=number)


def test_a_release_of_a_megabyte_comes_back_and_nothing_of_it_is_on_the_disk(lived: Place):
    update = save({"weights": np.random.default_rng(1).standard_normal(2**17)})
    ledger = Ledger(lived)
    attempt_at(ledger, 4, update)
    assert ledger.released(TaskKey(RUN, "training", 4, "4" * 64)) == update
    home = lived.folder.parent
    written = [path for path in home.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in written) > len(update)
    windows = [update[start : start + 12] for start in range(0, len(update) - 12, 4096)]
    for path in written:
        content = path.read_bytes()
        assert not any(window in content for window in windows), path


def test_the_search_would_find_a_release_that_is_not_encrypted(lived: Place, tmp_path: Path):
    (tmp_path / "plain").write_bytes(b"x" + b"release 1" * 20)
    found = [p for p in tmp_path.rglob("*") if p.is_file() and b"release 1" in p.read_bytes()]
    assert found == [tmp_path / "plain"]


def test_nobody_else_reads_what_is_kept(lived: Place):
    ledger = Ledger(lived)
    attempt_at(ledger, 4, b"release")
    for path in (lived.folder, lived.folder / "releases"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o700


# --- What is not as it was put there ------------------------------------------------------------


def altered(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("place", [0, 5, 6, 17, 18, 100, -1])
def test_one_altered_bit_is_refused_wherever_it_lies(lived: Place, place: int):
    altered(file_of(lived), place)
    assert "damaged" in refused(lived)


@pytest.mark.parametrize("length", [0, 1, 5, 6, 17, 18, 33, 34, 100])
def test_a_truncated_file_is_refused(lived: Place, length: int):
    path = file_of(lived)
    path.write_bytes(path.read_bytes()[:length])
    assert "damaged" in refused(lived)


def test_a_file_with_more_in_it_is_refused(lived: Place):
    path = file_of(lived)
    path.write_bytes(path.read_bytes() + b"\0")
    assert "damaged" in refused(lived)


def test_a_file_that_is_gone_is_refused_and_booked_as_released_all_the_same(lived: Place):
    file_of(lived).unlink()
    assert "no longer kept" in refused(lived)
    ledger = Ledger(lived)
    with pytest.raises(Refusal) as error:
        ledger.reserve(FIRST, MECHANISM)
    assert error.value.code is RefusalCode.LATER
    assert ledger.book.last == 101


def test_two_files_that_were_exchanged_are_refused(lived: Place):
    one, two, aside = file_of(lived, 0), file_of(lived, 1), lived.folder / "aside"
    one.rename(aside)
    two.rename(one)
    aside.rename(two)
    assert "damaged" in refused(lived)
    assert "damaged" in refused(lived, replace_digest(FIRST, "2" * 64, 2))


def test_the_file_of_another_attempt_with_the_same_content_is_refused(tmp_path: Path):
    kept = KeptReleases(tmp_path, KEY)
    digest = kept.put(1, b"release")
    assert kept.put(2, b"release") == digest
    (tmp_path / "00000002.sealed").replace(tmp_path / "00000001.sealed")
    with pytest.raises(Refusal, match="damaged"):
        kept.get(1, digest)


def test_a_file_of_another_site_is_refused(lived: Place, tmp_path: Path):
    folder = tmp_path / "elsewhere"
    KeptReleases(folder, NodeKey(bytes(32))).put(9, b"release 1" * 20)
    (theirs,) = folder.iterdir()
    theirs.replace(file_of(lived))
    assert "damaged" in refused(lived)


def test_the_same_release_is_never_encrypted_alike_twice(tmp_path: Path):
    kept = KeptReleases(tmp_path, KEY)
    seen = set()
    for _ in range(50):
        digest = kept.put(1, b"release")
        (path,) = tmp_path.iterdir()
        seen.add(path.read_bytes())
        assert kept.get(1, digest) == b"release"
    assert len({content[6:18] for content in seen}) == 50


# --- Forgetting ---------------------------------------------------------------------------------


def test_pruning_drops_the_bytes_of_all_but_the_newest_rounds_of_that_run_alone(lived: Place):
    ledger, other = Ledger(lived), "9" * 64
    attempt_at(ledger, 4, b"release 4")
    ledger.earmark(other, [])
    mine = TaskKey(other, "training", 1, "1" * 64)
    ledger.commit(ledger.reserve(mine, None), b"another run's")
    ledger.prune(RUN, keep=2)
    assert "no longer kept" in refused(lived)
    assert ledger.released(replace_digest(FIRST, "2" * 64, 2)) == b"release 2" * 20
    assert ledger.released(replace_digest(FIRST, "4" * 64, 4)) == b"release 4"
    assert ledger.released(mine) == b"another run's"
    ledger.prune(RUN, keep=2)
    ledger.prune("unknown")
    assert len(files(lived)) == 3


def test_pruning_rounds_of_training_leaves_the_evaluation(lived: Place):
    """Its round is 1, and a last round of training may be asked for again after it."""
    ledger = Ledger(lived)
    evaluation = TaskKey(RUN, "evaluation", 1, "e" * 64)
    ledger.commit(ledger.reserve(evaluation, MECHANISM), b"counts")
    ledger.prune(RUN, keep=1)
    assert ledger.released(evaluation) == b"counts"
    ledger.prune(RUN)
    with pytest.raises(Refusal, match="no longer kept"):
        ledger.released(evaluation)


def test_closing_a_run_leaves_none_of_its_bytes_and_all_of_its_bookings(lived: Place):
    ledger = Ledger(lived)
    before = ledger.book.divergence(8.0)
    assert len(files(lived)) == 2
    ledger.close(RUN, Signed("a person", "it is over"))
    assert files(lived) == []
    assert "no longer kept" in refused(lived)
    spent = [MECHANISM.of_steps(12)]
    assert Ledger(lived).book.spent() == spent
    assert Ledger(lived).book.divergence(8.0) < before


def test_what_crashed_attempts_left_behind_goes_with_their_round(lived: Place):
    ledger, kept = Ledger(lived), KeptReleases(lived.folder / "releases", KEY)
    number = attempt_at(ledger, 4, None)
    kept.put(number, b"killed before it was booked")
    torn = lived.folder / "releases" / f"{number:08d}.sealed.4711.partial"
    torn.write_bytes(b"killed while it was written")
    ledger.prune(RUN, keep=1)
    assert len(files(lived)) == 3  # it is newer than what is kept: another process may be at it
    attempt_at(ledger, 5, b"release 5")
    ledger.prune(RUN, keep=1)
    assert len(files(lived)) == 1
    assert ledger.released(TaskKey(RUN, "training", 4, "4" * 64)) is None


def test_rounds_that_are_asked_for_backwards_do_not_fill_the_disk(lived: Place):
    ledger = Ledger(lived)
    for number in (9, 8, 7, 6, 5, 4):
        attempt_at(ledger, number, b"release")
        ledger.prune(RUN, keep=2)
        assert len(files(lived)) == 2


@pytest.mark.parametrize(
    "name",
    [
        "notes.txt",
        "x.sealed",
        "\u0669.sealed",
        "9.sealed",
        "00000009.sealed.old",
        "99999999.sealed",
    ],
)
def test_files_of_somebody_else_are_left_alone(lived: Place, name: str):
    foreign = lived.folder / "releases" / name
    foreign.write_bytes(b"mine")
    Ledger(lived).close(RUN, Signed("a person", "it is over"))
    assert files(lived) == [name]


# --- Committing ---------------------------------------------------------------------------------


def test_a_second_commit_of_one_attempt_is_refused_and_the_first_stands(lived: Place):
    ledger = Ledger(lived)
    attempt = ledger.reserve(TaskKey(RUN, "training", 4, "4" * 64), MECHANISM)
    ledger.commit(attempt, b"first")
    with pytest.raises(LedgerError, match="no attempt that waits"):
        ledger.commit(attempt, b"second")
    with pytest.raises(LedgerError, match="no attempt that waits"):
        ledger.commit(replace(attempt, number=77), b"third")
    assert Ledger(lived).released(attempt.task) == b"first"


@pytest.mark.parametrize("another_process", [False, True])
def test_of_two_attempts_at_one_task_the_first_release_stands_and_both_are_spent(
    lived: Place, another_process: bool
):
    ledger = Ledger(lived)
    second = Ledger(lived) if another_process else ledger
    task = TaskKey(RUN, "training", 4, "4" * 64)
    one, two = ledger.reserve(task, MECHANISM), second.reserve(task, MECHANISM)
    before = files(lived)
    second.commit(two, b"second attempt")
    with pytest.raises(Refusal) as error:
        ledger.commit(one, b"first attempt")
    assert error.value.code is RefusalCode.LATER
    assert ledger.released(task) == Ledger(lived).released(task) == b"second attempt"
    assert len(files(lived)) == len(before) + 1
    assert ledger.book.run(RUN).spent() == [MECHANISM.of_steps(20)]
    with pytest.raises(Refusal, match="released meanwhile"):
        ledger.reserve(task, MECHANISM)


def test_bytes_that_cannot_be_kept_are_no_release_and_are_spent(lived: Place):
    ledger, folder = Ledger(lived), lived.folder / "releases"
    attempt = ledger.reserve(TaskKey(RUN, "training", 4, "4" * 64), MECHANISM)
    folder.rename(lived.folder / "aside")
    folder.write_bytes(b"nothing can be put into a file")
    with pytest.raises(OSError, match="File exists"):
        ledger.commit(attempt, b"release")
    assert ledger.released(attempt.task) is None
    assert ledger.book.run(RUN).spent() == [MECHANISM.of_steps(16)]


def test_a_folder_of_releases_that_is_gone_is_made_again(lived: Place):
    (lived.folder / "releases").rename(lived.folder.parent / "aside")
    ledger = Ledger(lived)
    assert "no longer kept" in refused(lived)
    attempt_at(ledger, 4, b"release")
    assert os.listdir(lived.folder / "releases") == [f"{102:08d}.sealed"]
    assert ledger.released(TaskKey(RUN, "training", 4, "4" * 64)) == b"release"
