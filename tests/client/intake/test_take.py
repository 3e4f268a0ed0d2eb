"""An intake from beginning to end: nothing twice, nothing lost, whatever a person said holds."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import random
import shutil
import signal
import time
from collections.abc import Callable, Mapping
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from client.intake.decision import Decision
from client.intake.deid.burned_in import Box
from client.intake.deid.profile import Profile
from client.intake.desk import Desk, State
from client.intake.keys import SiteKey
from client.intake.registry import Registry
from client.intake.take import Order, desk_of, take_in
from common.cohort import Cohort
from common.errors import CohortError, ConfigError, IntakeError

DAY = date(2026, 1, 2)
EVERYBODY = {f"P{number}": "normal" for number in range(60)}


@pytest.fixture
def filled(hospital: Any) -> Any:
    """A hospital of twelve films of six patients, one that is flagged, one that is no DICOM."""
    for number in range(12):
        hospital.film(f"P{number % 6}/{number}", PatientID=f"P{number % 6}")
    hospital.film("Muster^Erika", PatientID="P7", BurnedInAnnotation="YES")
    (hospital.folder / "notes of Muster.txt").write_text("a note")
    return hospital


@pytest.fixture
def go(filled: Any, in_this_process: Any) -> Callable[..., Cohort]:
    """`go(order)` takes in and opens the cohort."""

    def _go(order: Order) -> Cohort:
        take_in(order, pool=in_this_process, today=DAY)
        return Cohort.open(order.cohort, order.cohort_key)

    return _go


def content(cohort: Path) -> Mapping[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(cohort.iterdir())}


def waiting(order: Order) -> tuple[Desk, Any]:
    desk = Desk(order.desk, order.key, order.cohort_key)
    (entry,) = desk.entries(State.WAITS)
    return desk, entry


def test_processes_make_the_cohort_that_one_makes(filled: Any, go: Any) -> None:
    table = filled.labels(EVERYBODY)
    one = go(filled.order(table, "one"))
    two = dataclasses.replace(filled.order(table, "two"), workers=2)

    take_in(two, today=DAY)

    assert len(one) == 12
    assert content(two.cohort) == content(one.path)


def test_a_second_start_changes_nothing(filled: Any, go: Any) -> None:
    order = filled.order(filled.labels(EVERYBODY))
    go(order)
    first = content(order.cohort)

    go(order)

    assert content(order.cohort) == first


def test_a_source_under_another_way_to_it_is_the_same(filled: Any, go: Any) -> None:
    order = filled.order(filled.labels(EVERYBODY))
    go(order)
    (filled.place / "link").symlink_to(filled.folder)

    for way in (filled.place / "link", filled.folder / "P0" / ".."):
        go(dataclasses.replace(order, source=way))

    with Desk(order.desk, order.key) as desk:
        assert len(list(desk.entries())) == 14


def test_what_is_new_in_the_source_is_added_and_the_rest_is_not_read_again(
    filled: Any, go: Any
) -> None:
    order = filled.order(filled.labels(EVERYBODY))
    before = go(order)
    first = before.images(range(12))
    for path in list(filled.folder.rglob("*")):
        if path.is_file():
            path.unlink()  # what was taken in is not needed any more
    filled.film("P8/new", PatientID="P8")

    after = go(order)

    assert (len(after), len(after.patients)) == (13, 7)
    np.testing.assert_array_equal(after.images(range(12)), first)
    after.verify()


def test_what_vanishes_before_it_is_read_is_said_and_read_when_it_is_back(
    filled: Any, in_this_process: Any
) -> None:
    order = filled.order(filled.labels(EVERYBODY))
    lost = filled.folder / "P0" / "0"
    aside = filled.place / "elsewhere"

    class Interrupted(in_this_process):  # type: ignore[misc]
        def map(self, tasks: Any) -> Any:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        take_in(order, pool=Interrupted, today=DAY)
    lost.rename(aside)
    summary = take_in(order, pool=in_this_process, today=DAY)
    reasons = {item.what: item.reason for item in summary.not_used}
    assert reasons["P0/0"] == "it is no longer in the source"
    assert len(Cohort.open(order.cohort)) == 11

    aside.rename(lost)
    take_in(order, pool=in_this_process, today=DAY)
    assert len(Cohort.open(order.cohort)) == 12


def test_a_release_takes_the_file_in_and_blanks_what_was_marked(filled: Any, go: Any) -> None:
    order = filled.order(filled.labels(EVERYBODY), input={"height": 20, "width": 30})
    assert len(go(order)) == 12
    desk, entry = waiting(order)
    with desk:
        assert "burned-in annotation" in entry.reason
        (shot,) = desk.shots(entry)
        assert shot.before.startswith(b"\x89PNG")
        assert shot.after == b""
        assert desk.place(entry) == "Muster^Erika"
        desk.decide(entry, Decision("release", (Box(0, 0, 10, 30),), by="Dr. A", at="now"))

    cohort = go(order)

    assert len(cohort) == 13
    fresh = cohort.images([12])[0, 0]
    assert fresh[:10].max() == 0
    assert fresh[10:].max() > 0.4
    with Desk(order.desk, order.key) as desk:
        assert not desk.numbers(State.WAITS)
        assert [said.by for _, _, said in desk.decisions()] == ["Dr. A"]


def test_a_rejection_takes_out_what_was_kept(filled: Any, go: Any) -> None:
    order = filled.order(filled.labels(EVERYBODY))
    go(order)
    with Desk(order.desk, order.key) as desk:
        kept = next(entry for entry in desk.entries(State.KEPT))
        desk.decide(kept, Decision("reject", by="Dr. A", why="not ours"))

    cohort = go(order)

    assert len(cohort) == 11
    cohort.verify()
    with Desk(order.desk, order.key) as desk:
        assert desk.entry(kept.number).state is State.REJECTED
        desk.decide(desk.entry(kept.number), Decision("release", by="Dr. B"))
    assert len(go(order)) == 12


def test_a_decision_holds_for_the_bytes_that_were_looked_at(filled: Any, go: Any) -> None:
    order = filled.order(filled.labels(EVERYBODY))
    go(order)
    desk, entry = waiting(order)
    with desk:
        desk.decide(entry, Decision("release", by="Dr. A"))
    filled.film("Muster^Erika", PatientID="P7", BurnedInAnnotation="YES", PatientComments="other")

    assert len(go(order)) == 12

    desk, entry = waiting(order)
    with desk:
        assert "no longer those that a person decided on" in entry.reason
        desk.decide(entry, Decision("release", by="Dr. A"))
    assert len(go(order)) == 13


def test_a_release_of_what_is_gone_waits_until_it_is_back(filled: Any, go: Any) -> None:
    order = filled.order(filled.labels(EVERYBODY))
    go(order)
    desk, entry = waiting(order)
    with desk:
        desk.decide(entry, Decision("release", by="Dr. A"))
    lost, aside = filled.folder / "Muster^Erika", filled.place / "elsewhere"
    lost.rename(aside)

    assert len(go(order)) == 12
    with Desk(order.desk, order.key) as desk:
        assert desk.entry(entry.number).state is State.GONE

    aside.rename(lost)
    assert len(go(order)) == 13


def test_bytes_that_a_person_rejected_do_not_come_back_under_another_name(
    filled: Any, go: Any
) -> None:
    order = filled.order(filled.labels(EVERYBODY))
    go(order)
    with Desk(order.desk, order.key) as desk:
        kept = next(desk.entries(State.KEPT))
        again = filled.folder / "again"
        shutil.copy(filled.folder / desk.place(kept), again)
        desk.decide(kept, Decision("reject", by="Dr. A", why="not ours"))
    go(order)
    with Desk(order.desk, order.key) as desk:
        copies = [entry for entry in desk.entries(State.REJECTED) if entry.number != kept.number]
        assert [desk.place(entry) for entry in copies] == ["again"]
        desk.decide(copies[0], Decision("release", by="Dr. B"))

    assert len(go(order)) == 12


def test_one_instance_of_two_patients_is_said_and_no_copy(filled: Any, go: Any) -> None:
    shutil.copy(filled.folder / "P0" / "0", filled.folder / "copy")
    filled.film("other", PatientID="P9", SOPInstanceUID="1.2.3.4.5.6.1")
    brighter = np.full((20, 30), 9, dtype=np.uint16)
    filled.film("changed", brighter, PatientID="P0", SOPInstanceUID="1.2.3.4.5.6.1")
    order = dataclasses.replace(filled.order(filled.labels(EVERYBODY)), batch=1)

    assert len(go(order)) == 12

    with Desk(order.desk, order.key) as desk:
        said = {desk.place(entry): entry for entry in desk.entries()}
    four = [said[name] for name in ("P0/0", "copy", "other", "changed")]
    first = min(four, key=lambda entry: entry.number)
    assert first.state is State.KEPT
    others = [entry for entry in four if entry is not first]
    copies = sum(entry.state is State.COPY for entry in others)
    assert copies == (first in (said["P0/0"], said["copy"]))
    refused = [entry for entry in others if entry.state is State.REFUSED]
    assert len(refused) == 3 - copies
    assert all("SOP Instance UID is that of another" in entry.reason for entry in refused)


def test_what_was_refused_is_read_again_when_it_is_another_file(filled: Any, go: Any) -> None:
    order = filled.order(filled.labels(EVERYBODY))
    whole = filled.film("P8/new", PatientID="P8").read_bytes()
    (filled.folder / "P8" / "new").write_bytes(whole[:-100])
    assert len(go(order)) == 12
    first = content(order.cohort)
    assert content(go(order).path) == first

    (filled.folder / "P8" / "new").write_bytes(whole)

    assert len(go(order)) == 13


def test_nobody_decides_on_what_was_read_again_meanwhile(filled: Any, go: Any) -> None:
    order = filled.order(filled.labels(EVERYBODY))
    go(order)
    desk, entry = waiting(order)
    with desk:
        desk.decide(entry, Decision("reject", by="Dr. A"))
        go(order)
        with pytest.raises(ConfigError, match="look at it again"):
            desk.decide(entry, Decision("release", by="Dr. B"))
        refused = next(desk.entries(State.REFUSED))
        with pytest.raises(ConfigError, match="only what waits"):
            desk.decide(refused, Decision("release", by="Dr. B"))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"key": SiteKey(bytes(32))}, "the site's key"),
        ({"profile": Profile(faces="keep")}, "profile"),
        ({"split": "train"}, "split"),
        ({"cohort_key": bytes(32)}, "the site's key"),
    ],
)
def test_another_order_is_refused_and_nothing_is_touched(
    filled: Any, go: Any, change: dict[str, Any], named: str
) -> None:
    order = filled.order(filled.labels(EVERYBODY))
    go(order)
    before = content(order.cohort)

    with pytest.raises(ConfigError, match=named):
        go(dataclasses.replace(order, **change))

    assert content(order.cohort) == before


def test_a_label_that_changes_or_goes_is_refused(filled: Any, go: Any) -> None:
    go(filled.order(filled.labels(EVERYBODY)))
    fewer = {name: label for name, label in EVERYBODY.items() if name != "P1"}

    with pytest.raises(ConfigError, match=r"0 lines .* gone .* 1 say something else"):
        go(filled.order(filled.labels(EVERYBODY | {"P1": "finding"})))
    with pytest.raises(ConfigError, match=r"1 lines .* gone"):
        go(filled.order(filled.labels(fewer)))


def test_a_label_table_may_grow_and_be_sorted_otherwise(
    filled: Any, go: Any, in_this_process: Any
) -> None:
    some = {name: label for name, label in EVERYBODY.items() if name != "P1"}
    assert len(go(filled.order(filled.labels(some)))) == 10

    order = filled.order(filled.labels(dict(reversed(EVERYBODY.items()))))
    summary = take_in(order, pool=in_this_process, today=DAY)

    assert len(Cohort.open(order.cohort)) == 12
    without = {item.what.split("PatientID ")[1].strip(")") for item in summary.not_used[2:]}
    assert without == EVERYBODY.keys() - {f"P{number}" for number in range(6)}
    everything = b"".join(path.read_bytes() for path in order.desk.rglob("*") if path.is_file())
    assert b"P59" not in everything


def test_a_foreign_cohort_is_never_touched(filled: Any, go: Any) -> None:
    order = filled.order(filled.labels(EVERYBODY))
    order.cohort.mkdir()
    (order.cohort / "theirs").write_text("x")

    with pytest.raises(CohortError, match="exists already"):
        go(order)
    assert not order.desk.exists()
    Desk.create(order.desk, order.key).close()
    with pytest.raises(CohortError, match="is not of this intake"):
        go(order)

    assert content(order.cohort) == {"theirs": b"x"}


def test_a_cohort_that_is_gone_is_missed(filled: Any, go: Any) -> None:
    order = filled.order(filled.labels(EVERYBODY))
    go(order)
    shutil.rmtree(order.cohort)

    with pytest.raises(CohortError, match="its cohort is gone"):
        go(order)


def interrupted_before_its_name(order: Order, pool: Any) -> None:
    """Take in until all but the name is done."""
    rename = Path.rename

    def interrupt(path: Path, target: Path) -> Path:
        if path.name == "work":
            raise KeyboardInterrupt
        return rename(path, target)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "rename", interrupt)
        with pytest.raises(KeyboardInterrupt):
            take_in(order, pool=pool, today=DAY)


def test_a_foreign_cohort_that_came_meanwhile_is_never_touched(
    filled: Any, go: Any, in_this_process: Any
) -> None:
    order = filled.order(filled.labels(EVERYBODY))
    interrupted_before_its_name(order, in_this_process)
    order.cohort.mkdir()
    (order.cohort / "theirs").write_text("x")

    for _ in range(2):
        with pytest.raises(CohortError, match="is not of this intake"):
            go(order)

    assert content(order.cohort) == {"theirs": b"x"}
    shutil.rmtree(order.cohort)
    assert len(go(order)) == 12


def test_a_cohort_that_was_exchanged_is_neither_read_nor_replaced(filled: Any, go: Any) -> None:
    order, other = (filled.order(filled.labels(EVERYBODY), name) for name in ("one", "two"))
    go(order)
    filled.film("P8/new", PatientID="P8")
    go(other)
    shutil.rmtree(order.cohort)
    shutil.copytree(other.cohort, order.cohort)

    with pytest.raises(CohortError, match="is not of this intake"):
        go(order)

    assert content(order.cohort) == content(other.cohort)


def test_an_interrupted_last_step_is_done_again(filled: Any, go: Any, in_this_process: Any) -> None:
    order = filled.order(filled.labels(EVERYBODY))
    go(order)
    filled.film("P8/new", PatientID="P8")
    interrupted_before_its_name(order, in_this_process)

    assert len(go(order)) == 13
    assert not (order.desk / "superseded").exists()


def test_nothing_is_made_within_its_source_nor_around_it(filled: Any, go: Any) -> None:
    inside = filled.order(filled.labels(EVERYBODY), "source/cohort")
    around = dataclasses.replace(filled.order(filled.labels(EVERYBODY)), source=filled.folder)
    around = dataclasses.replace(around, cohort=filled.folder.parent)
    before = sorted(filled.folder.rglob("*"))

    for order in (inside, around):
        with pytest.raises(CohortError, match="within the source"):
            go(order)

    assert sorted(filled.folder.rglob("*")) == before


def test_images_that_were_changed_are_not_carried_on(filled: Any, go: Any) -> None:
    order = filled.order(filled.labels(EVERYBODY))
    go(order)
    images = order.cohort / "images.u16"
    images.write_bytes(b"\xff" + images.read_bytes()[1:])
    filled.film("P8/new", PatientID="P8")

    with pytest.raises(CohortError, match="damaged or was changed"):
        go(order)


def test_two_intakes_do_not_write_one_cohort(filled: Any, go: Any, in_this_process: Any) -> None:
    order = filled.order(filled.labels(EVERYBODY))

    class Another(in_this_process):  # type: ignore[misc]
        def map(self, tasks: Any) -> Any:
            with pytest.raises(CohortError, match="another intake is at work"):
                go(order)
            return super().map(tasks)

    take_in(order, pool=Another, today=DAY)

    assert len(Cohort.open(order.cohort)) == 12


def test_patients_that_come_later_do_not_make_images_of_a_cohort_of_images(
    hospital: Any, in_this_process: Any
) -> None:
    hospital.film("a", PatientID="")
    order = hospital.order(hospital.labels({"1.2.3.4.5": "normal"}, "StudyInstanceUID"))
    take_in(order, pool=in_this_process)
    before = content(order.cohort)
    hospital.film("b", PatientID="P1")

    for _ in range(2):
        with pytest.raises(IntakeError, match="its unit is the image"):
            take_in(order, pool=in_this_process)

    assert content(order.cohort) == before


def test_images_of_nobody_that_were_kept_before_a_patient_came_are_no_patients(
    hospital: Any, in_this_process: Any
) -> None:
    """Killed while it reads what names nobody; then somebody is named."""
    for number in range(6):
        hospital.film(f"b{number}", PatientID="")
    order = hospital.order(hospital.labels({"1.2.3.4.5": "normal"}, "StudyInstanceUID"))
    order = dataclasses.replace(order, batch=2)

    class Interrupted(in_this_process):  # type: ignore[misc]
        def map(self, tasks: Any) -> Any:
            for number, answer in enumerate(super().map(tasks)):
                if number == 3 and answer.images:
                    raise KeyboardInterrupt
                yield answer

    with pytest.raises(KeyboardInterrupt):
        take_in(order, pool=Interrupted)
    hospital.film("named", PatientID="P1")

    with pytest.raises(IntakeError, match="its unit is the image"):
        take_in(order, pool=in_this_process)
    assert not order.cohort.exists()


def test_a_source_that_was_empty_settles_nothing(hospital: Any, in_this_process: Any) -> None:
    order = hospital.order(hospital.labels({"1.2.3.4.5": "normal"}, "StudyInstanceUID"))
    take_in(order, pool=in_this_process)
    hospital.film("a", PatientID="")
    take_in(order, pool=in_this_process)

    assert Cohort.open(order.cohort).unit == "image"


def test_a_full_disk_ends_the_intake_and_costs_no_object(
    filled: Any, go: Any, small_files: Any
) -> None:
    order = dataclasses.replace(filled.order(filled.labels(EVERYBODY)), batch=3)

    with small_files(70_000), pytest.raises(CohortError, match="cannot be written"):
        go(order)

    assert not order.cohort.exists()
    assert len(go(order)) == 12


def test_a_table_that_cannot_be_written_ends_the_intake_and_costs_no_object(
    filled: Any, go: Any
) -> None:
    order = filled.order(filled.labels(EVERYBODY))
    missing = Registry(filled.place / "table", filled.place / "officer.pem")

    with pytest.raises(CohortError, match=r"officer\.pem: the officer's public key cannot be read"):
        go(dataclasses.replace(order, registry=missing))

    assert not order.cohort.exists()
    assert len(go(order)) == 12


def test_no_number_of_a_header_is_in_a_reason(hospital: Any, in_this_process: Any) -> None:
    """The number of a patient may stand in any attribute of numbers."""
    for name, rows in (("one", 1), ("two", 0xFFFF)):
        pixels = np.zeros((1, 1), dtype=np.uint16)
        hospital.film(name, pixels, Rows=rows, Columns=rows, NumberOfFrames="1945051234")
    order = hospital.order(hospital.labels(EVERYBODY))
    several = hospital.order(hospital.labels(EVERYBODY), "all", input={"frames": "all"})
    first = hospital.order(hospital.labels(EVERYBODY), "first", input={"frames": "first"})

    for one in (order, several, first):
        told = [item.reason for item in take_in(one, pool=in_this_process).not_used[:2]]
        assert any("frames" in reason or "cut short" in reason for reason in told)
        assert not any("45051" in reason or "389010" in reason for reason in told)


def test_a_sealed_cohort_grows_and_nothing_of_it_is_ever_plain(filled: Any, go: Any) -> None:
    order = dataclasses.replace(filled.order(filled.labels(EVERYBODY)), cohort_key=bytes(range(32)))
    plain = go(filled.order(filled.labels(EVERYBODY), "plain"))
    go(order)
    desk, entry = waiting(order)
    with desk:
        desk.decide(entry, Decision("release", by="Dr. A"))

    cohort = go(order)

    assert len(cohort) == 13
    np.testing.assert_array_equal(cohort.images(range(12)), plain.images(range(12)))
    written = [path for top in (order.cohort, order.desk) for path in top.rglob("*")]
    everything = b"".join(path.read_bytes() for path in written if path.is_file())
    pixels = (plain.path / "images.u16").read_bytes()
    size = len(pixels) // 12
    seen = [hashlib.sha256(pixels[at : at + size]).hexdigest() for at in range(0, 12 * size, size)]
    for secret in (*cohort.patients, "Muster", "notes of", *seen):
        assert secret.encode() not in everything
    assert plain.patients[0].encode() in (plain.path / "index.sqlite").read_bytes()


def test_no_name_of_a_file_is_at_the_desk(filled: Any, go: Any) -> None:
    order = filled.order(filled.labels(EVERYBODY))
    go(order)

    everything = b"".join(path.read_bytes() for path in order.desk.rglob("*") if path.is_file())

    assert b"Muster" not in everything
    assert b"P0/" not in everything
    assert all(path.stat().st_mode & 0o077 == 0 for path in [order.desk, *order.desk.rglob("*")])


# --- Killed --------------------------------------------------------------------------------


def killed(work: Callable[[], object], after: float) -> bool:
    """Do `work` in a process that is killed after some seconds; whether the kill came in time."""
    child = os.fork()
    if child == 0:
        try:
            work()
        finally:
            os._exit(0)
    time.sleep(after)
    os.kill(child, signal.SIGKILL)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
def test_killed_at_random_moments_it_comes_to_the_same_bytes(
    filled: Any, in_this_process: Any, seed: int
) -> None:
    """Ten lives each: killed again and again, and once more while it adds what is new."""
    table = filled.labels(EVERYBODY)
    for number in range(14):
        filled.film(f"more/{number}", PatientID=f"P{number + 10}")
    source = filled.folder.with_name("complete")
    shutil.copytree(filled.folder, source)

    def order(name: str) -> Order:
        ordered: Order = filled.order(table, name)
        return dataclasses.replace(ordered, batch=3)

    def work(name: str) -> Callable[[], object]:
        return lambda: take_in(order(name), pool=in_this_process, today=DAY)

    def grow(name: str) -> None:
        """The second pass: more has come, one file was released and one rejected."""
        with Desk(desk_of(order(name).cohort), filled.key) as desk:
            (entry,) = desk.entries(State.WAITS)
            desk.decide(entry, Decision("release", by="Dr. A"))
            desk.decide(desk.entry(desk.numbers(State.KEPT)[1]), Decision("reject", by="Dr. A"))

    began = time.monotonic()
    work("reference")()
    length = time.monotonic() - began
    first = content(order("reference").cohort)
    lives = [f"life{number}" for number in range(5)]
    draw = random.Random(seed)  # noqa: S311
    hits = 0
    for name in lives:
        hits += killed(work(name), draw.uniform(0, length))
        hits += killed(work(name), draw.uniform(0, length / 2))
        work(name)()
        assert content(order(name).cohort) == first

    filled.film("late", PatientID="P40")
    for name in ("reference", *lives):
        grow(name)
    began = time.monotonic()
    work("reference")()
    length = time.monotonic() - began
    second = content(order("reference").cohort)
    for name in lives:
        hits += killed(work(name), draw.uniform(0, length))
        work(name)()
        assert content(order(name).cohort) == second
        assert not (order(name).desk / "work").exists()
        assert not (order(name).desk / "superseded").exists()
    assert second != first
    assert hits >= 5
