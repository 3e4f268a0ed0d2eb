"""De-identified files: each whole under its pseudonyms, gone on with, and taken back."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydicom import dcmread

from client.intake.decision import Decision
from client.intake.deid.burned_in import Box
from client.intake.deid.profile import Profile
from client.intake.desk import Desk, State
from client.intake.export import ExportOrder, ExportSummary, export, place_of
from client.intake.pool import WorkerLostError
from client.intake.quiet import quiet
from client.intake.take import desk_of, take_in
from common.errors import CohortError, ConfigError, IntakeError

Go = Callable[..., ExportSummary]


@pytest.fixture
def order(hospital: Any) -> ExportOrder:
    for number in range(6):
        hospital.film(
            f"Muster^Erika/{number}", PatientID=f"P{number % 3}", PatientName="Muster^Erika"
        )
    hospital.film("screen", PatientID="P7", PatientName="Muster^Erika", BurnedInAnnotation="YES")
    hospital.film("nobody", PatientID="")
    return ExportOrder(hospital.folder, hospital.place / "out", hospital.key)


@pytest.fixture
def go(in_this_process: Any) -> Go:
    return lambda order: export(order, pool=in_this_process)


def files(folder: Path) -> dict[str, bytes]:
    found = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}


def test_each_object_is_written_under_its_pseudonyms(order: ExportOrder, go: Go) -> None:
    summary = go(order)

    assert (summary.files, summary.patients) == (6, 3)
    assert {item.what: item.reason.split(";")[0] for item in summary.not_used} == {
        "screen": "its header says that it has burned-in annotation, so text in its pixels is "
        "likely: a person has to look at it",
        "nobody": "its patient identifier is blank",
    }
    assert len(files(order.folder)) == 6
    for name, data in files(order.folder).items():
        assert b"Muster" not in data
        written = dcmread(order.folder / name)
        assert written.PatientIdentityRemoved == "YES"
        parts = (written.PatientID, written.StudyInstanceUID, written.SeriesInstanceUID)
        assert name == "/".join((*parts, f"{written.SOPInstanceUID}.dcm"))
    for path in (order.folder, *order.folder.rglob("*")):
        assert path.stat().st_mode & 0o077 == 0
    desk = b"".join(files(desk_of(order.folder)).values())
    assert b"Muster" not in desk


def test_processes_write_what_one_writes_and_again_changes_nothing(
    order: ExportOrder, go: Go
) -> None:
    go(order)
    other = dataclasses.replace(order, folder=order.folder.with_name("two"), workers=2)
    export(other)

    assert files(other.folder) == files(order.folder)
    assert go(order).files == 6
    assert files(other.folder) == files(order.folder)


def test_an_interrupted_export_goes_on_and_leaves_nothing_half_written(
    order: ExportOrder, go: Go, in_this_process: Any
) -> None:
    class Interrupted(in_this_process):  # type: ignore[misc]
        def map(self, tasks: Any) -> Any:
            for number, answer in enumerate(super().map(tasks)):
                if number == 4:
                    raise KeyboardInterrupt
                yield answer

    whole = dataclasses.replace(order, folder=order.folder.with_name("whole"))
    go(whole)
    with pytest.raises(KeyboardInterrupt):
        export(dataclasses.replace(order, batch=2), pool=Interrupted)

    assert go(order).files == 6
    assert files(order.folder) == files(whole.folder)
    assert not (desk_of(order.folder) / "work").exists()


def test_what_a_person_releases_is_written_and_what_is_rejected_is_taken_back(
    order: ExportOrder, go: Go
) -> None:
    go(order)
    with Desk(desk_of(order.folder), order.key) as desk:
        (waits,) = desk.entries(State.WAITS)
        assert len(desk.shots(waits)) == 1
        desk.decide(waits, Decision("release", (Box(0, 0, 5, 30),), by="Dr. A"))
        kept = next(desk.entries(State.KEPT))
        desk.decide(kept, Decision("reject", by="Dr. A"))

    assert go(order).files == 6
    released = [dcmread(order.folder / name) for name in files(order.folder)]
    blanked = [item for item in released if not item.pixel_array[:5].any()]
    assert len(released) == 6
    assert len(blanked) == 1
    assert blanked[0].pixel_array[5:].any()
    with Desk(desk_of(order.folder), order.key) as desk:
        shots = desk.shots(desk.entry(waits.number))
        assert len(shots) == 1
        assert shots[0].after != shots[0].before


def test_a_copy_is_written_once_whichever_process_is_faster(
    order: ExportOrder, go: Go, hospital: Any
) -> None:
    shutil.copy(order.source / "Muster^Erika" / "0", order.source / "again")

    summary = go(order)

    assert summary.files == 6
    assert sum("a copy" in item.reason for item in summary.not_used) == 1


def test_one_instance_of_two_patients_is_said_and_no_copy(
    order: ExportOrder, go: Go, hospital: Any
) -> None:
    hospital.film("other", PatientID="P9", SOPInstanceUID="1.2.3.4.5.6.1")

    summary = go(order)

    assert summary.files == 6
    assert sum("SOP Instance UID is that of another" in one.reason for one in summary.not_used) == 1


def test_a_desk_of_files_is_none_of_a_cohort(order: ExportOrder, go: Go, hospital: Any) -> None:
    go(order)
    other = hospital.order(hospital.labels({"P1": "normal"}), "out")

    with pytest.raises(ConfigError, match="what the desk is of"):
        take_in(other)


def test_what_changed_after_its_release_is_not_written(
    order: ExportOrder, go: Go, hospital: Any
) -> None:
    go(order)
    with Desk(desk_of(order.folder), order.key) as desk:
        (waits,) = desk.entries(State.WAITS)
        desk.decide(waits, Decision("release", by="Dr. A"))
    hospital.film("screen", PatientID="P7", BurnedInAnnotation="YES", PatientComments="other")

    assert go(order).files == 6

    assert len(files(order.folder)) == 6
    with Desk(desk_of(order.folder), order.key) as desk:
        assert "no longer those" in desk.entry(waits.number).reason


def test_a_worker_that_is_lost_when_its_file_was_written_leaves_nothing(
    order: ExportOrder, in_this_process: Any
) -> None:
    class Lost(in_this_process):  # type: ignore[misc]
        def map(self, tasks: Any) -> Any:
            for _ in super().map(tasks):
                yield WorkerLostError("the process that read it ended")

    assert export(order, pool=Lost).files == 0
    assert not (desk_of(order.folder) / "work").exists()


def test_a_full_disk_ends_the_export_and_costs_no_object(
    order: ExportOrder, go: Go, hospital: Any, small_files: Any
) -> None:
    hospital.film("large", np.zeros((512, 512), dtype=np.uint16), PatientID="P8")

    with small_files(300_000), pytest.raises(CohortError, match="File too large"):
        go(order)

    assert not any("large" in item.what for item in go(order).not_used)
    assert len(files(order.folder)) == 7


def test_pictures_are_few_and_only_of_frames_that_changed(
    order: ExportOrder, go: Go, hospital: Any
) -> None:
    frames = np.arange(31 * 600, dtype=np.uint16).reshape(31, 20, 30) % 4096
    several = {"Rows": 20, "Columns": 30, "NumberOfFrames": 31}
    hospital.film("many", frames, PatientID="P8", BurnedInAnnotation="YES", **several)
    go(order)
    with Desk(desk_of(order.folder), order.key) as desk:
        (many,) = [entry for entry in desk.entries(State.WAITS) if desk.place(entry) == "many"]
        assert len(desk.shots(many)) == 16
        desk.decide(many, Decision("release", (Box(0, 0, 5, 30),), found=False, by="Dr. A"))

    go(order)

    with Desk(desk_of(order.folder), order.key) as desk:
        shots = desk.shots(desk.entry(many.number))
    assert len(shots) == 16
    assert {shot.boxes for shot in shots} == {(Box(0, 0, 5, 30),)}


def test_files_that_are_gone_are_missed(order: ExportOrder, go: Go) -> None:
    go(order)
    shutil.rmtree(order.folder)

    with pytest.raises(CohortError, match="it is gone"):
        go(order)


@pytest.mark.parametrize("part", ["", "..", ".hidden", "a/b", "a\0b", "MUSTER.ERIKA", "1" * 65])
def test_no_identifier_leads_out_of_the_folder(part: str, order: ExportOrder, go: Go) -> None:
    go(order)
    with Desk(desk_of(order.folder), order.key) as desk:
        record = next(desk.rows()).record

    with pytest.raises(IntakeError, match="identifiers"):
        place_of(order.folder, dataclasses.replace(record, study=part))


def test_retained_uids_that_are_paths_are_refused(
    order: ExportOrder, go: Go, hospital: Any
) -> None:
    with quiet():
        hospital.film("bad", PatientID="P9", StudyInstanceUID="../../../../tmp/evil")
    profile = Profile(retain_uids=True, dates="full")

    summary = go(dataclasses.replace(order, profile=profile))

    assert "bad" in {item.what for item in summary.not_used}
    assert summary.files == 6


def test_pixels_are_those_of_the_source(order: ExportOrder, go: Go) -> None:
    go(order)

    source = dcmread(order.source / "Muster^Erika" / "0").pixel_array
    for name in files(order.folder):
        np.testing.assert_array_equal(dcmread(order.folder / name).pixel_array, source)
