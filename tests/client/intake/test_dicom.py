"""A folder of DICOM: every file has an outcome, and a patient is a patient."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from client.intake.deid.engine import Engine
from client.intake.deid.profile import Profile
from client.intake.deid.seam import CleanFile, CleanFrame, CohortDeidentifier
from client.intake.dicom import FileReader
from client.intake.items import walk
from client.intake.keys import SiteKey
from client.intake.pixels import Floats
from client.intake.take import take_in
from common.cohort import Cohort
from common.errors import CohortError, IntakeError

STUDY = "1.2.3.4.5"


def film_of(number: int) -> NDArray[np.uint16]:
    return np.random.default_rng(number).integers(0, 4096, (16, 16), dtype=np.uint16)


def test_any_depth_any_name_and_the_label_by_patient(hospital: Any) -> None:
    for name, patient in (("a/b/c/IM0001", "P1"), ("Müller, Anna.DCM.bak", "P2"), ("1.2", "P1")):
        hospital.film(name, PatientID=patient)

    taken = hospital.take_in(hospital.labels({"P1": "finding", "P2": "normal"}))

    cohort = taken.cohort
    assert taken.summary.not_used == ()
    assert (cohort.unit, len(cohort), len(cohort.patients)) == ("patient", 3, 2)
    owners = [cohort.patients[number] for number in cohort.patient_index]
    one, two = (hospital.key.pseudonym("patient", "", name) for name in ("P1", "P2"))
    assert dict(zip(owners, cohort.labels.tolist(), strict=True)) == {one: 1, two: 0}
    cohort.verify()


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("PatientID", "P1"),
        ("StudyInstanceUID", STUDY),
        ("AccessionNumber", "A1"),
        ("SOPInstanceUID", f"{STUDY}.6.1"),
    ],
)
def test_each_identifier_can_be_the_key(hospital: Any, column: str, value: str) -> None:
    hospital.film("x")

    assert hospital.take_in(hospital.labels({value: "finding"}, column)).cohort.labels == [1]


def test_pixels_come_through_as_stored(hospital: Any) -> None:
    stored = film_of(1)
    hospital.film("x", stored, WindowCenter=2048, WindowWidth=4096)

    image = hospital.take_in(hospital.labels({"P1": "normal"})).cohort.images([0])[0, 0]

    np.testing.assert_allclose(image, stored / 4095, atol=1e-5)


def directory() -> bytes:
    """File meta information that says that a file is a DICOMDIR, whatever it is called."""
    return b"\0" * 128 + b"DICM\x02\x00\x02\x00UI\x14\x001.2.840.10008.1.3.10"


def test_dicomdirs_are_passed_over_and_other_files_listed(hospital: Any) -> None:
    hospital.film("x")
    (hospital.folder / "DICOMDIR").write_bytes(b"\0" * 128 + b"DICM")
    (hospital.folder / "index").write_bytes(directory())
    (hospital.folder / "notes.txt").write_text("patient is doing well")
    (hospital.folder / "empty").write_bytes(b"")
    (hospital.folder / "zeros").write_bytes(bytes(5000))

    taken = hospital.take_in(hospital.labels({"P1": "normal"}))

    assert len(taken.cohort) == 1
    assert taken.reasons == dict.fromkeys(("notes.txt", "empty", "zeros"), "not a DICOM file")


def test_label_without_image_and_image_without_label_are_listed(hospital: Any) -> None:
    for patient in ("P1", "P2", "P3"):
        hospital.film(patient, PatientID=patient)
    hospital.film("P5", PatientID="P5", PixelData=None)
    table = hospital.labels({"P1": "normal", "P2": "finding", "P4": "normal", "P5": "normal"})

    taken = hospital.take_in(table)

    assert len(taken.cohort) == 2
    assert taken.reasons == {
        "P3": "no label: its PatientID is not in the label table",
        "P5": "it has no pixel data (Computed Radiography Image Storage)",
        f"{table}:4 (PatientID P4)": "label without a usable image",
        f"{table}:5 (PatientID P5)": "label without a usable image",
    }


def test_an_image_without_the_key_is_listed(hospital: Any) -> None:
    hospital.film("x", AccessionNumber="")

    taken = hospital.take_in(hospital.labels({"A1": "normal"}, "AccessionNumber"))

    assert taken.reasons["x"] == "no label: its AccessionNumber is empty"


@pytest.mark.parametrize("blank", ["", "   ", None])
def test_a_blank_patient_is_not_used_where_others_are_named(
    hospital: Any, blank: str | None
) -> None:
    for name, patient in (("a", blank), ("b", "P1"), ("c", blank)):
        hospital.film(name, PatientID=patient)

    taken = hospital.take_in(hospital.labels({STUDY: "normal"}, "StudyInstanceUID"))

    assert (taken.cohort.unit, len(taken.cohort)) == ("patient", 1)
    assert taken.reasons == dict.fromkeys("ac", "no patient identifier")


def test_a_named_patient_counts_even_if_the_file_cannot_be_used(hospital: Any) -> None:
    hospital.film("a", PatientID="")
    hospital.film("b", PatientID="P1", PixelData=b"\0" * 10)

    taken = hospital.take_in(hospital.labels({STUDY: "normal"}, "StudyInstanceUID"))

    assert (taken.cohort.unit, len(taken.cohort)) == ("patient", 0)


def test_a_source_without_patients_makes_an_image_level_cohort_and_says_so(hospital: Any) -> None:
    for name in "abc":
        hospital.film(name, PatientID="")

    taken = hospital.take_in(hospital.labels({STUDY: "normal"}, "StudyInstanceUID"))

    assert (taken.cohort.unit, len(taken.cohort), len(taken.cohort.patients)) == ("image", 3, 3)
    assert any("the unit is the image" in warning for warning in taken.summary.contents.warnings)
    with pytest.raises(CohortError, match="unit"):
        taken.cohort.check_fits(hospital.make_spec())


def test_the_issuer_is_part_of_a_patient(hospital: Any) -> None:
    for name, issuer in (("a", "North"), ("b", "South"), ("c", "North")):
        hospital.film(name, IssuerOfPatientID=issuer)

    cohort = hospital.take_in(hospital.labels({"P1": "normal"})).cohort

    assert sorted(np.bincount(cohort.patient_index)) == [1, 2]


def test_a_copy_is_used_once(hospital: Any) -> None:
    for name, uid, number in (
        ("a", "1.2", 0),
        ("b", "1.2", 0),
        ("c", None, 1),
        ("d", None, 1),
        ("e", None, 2),
    ):
        hospital.film(name, film_of(number), SOPInstanceUID=uid)

    taken = hospital.take_in(hospital.labels({"P1": "normal"}))

    assert len(taken.cohort) == 3
    assert list(taken.reasons.values()) == ["a copy of an image already taken in"] * 2


def stack_of(hospital: Any, count: int) -> NDArray[np.uint16]:
    stack = np.stack([film_of(number) for number in range(count)])
    size = {"NumberOfFrames": count, "Rows": 16, "Columns": 16}
    hospital.film("x", stack, WindowCenter=2048, WindowWidth=4096, **size)
    return stack


@pytest.mark.parametrize(
    ("rule", "frames"), [("first", [0]), ("middle", [2]), ("all", [0, 1, 2, 3, 4])]
)
def test_frames_by_rule(hospital: Any, rule: str, frames: list[int]) -> None:
    stack = stack_of(hospital, 5)

    cohort = hospital.take_in(hospital.labels({"P1": "normal"}), input={"frames": rule}).cohort

    seen = np.rint(cohort.images(range(len(cohort)))[:, 0] * 4095).astype(np.int64)
    np.testing.assert_array_equal(seen, stack[frames])
    assert len(cohort.patients) == 1


def test_frames_are_refused_by_default(hospital: Any) -> None:
    stack_of(hospital, 5)

    assert "it has 5 frames" in hospital.take_in(hospital.labels({"P1": "normal"})).reasons["x"]


def test_one_class_is_a_loud_warning(hospital: Any) -> None:
    hospital.film("x")

    warnings = hospital.take_in(hospital.labels({"P1": "normal"})).summary.contents.warnings

    assert any("of one class, 'normal'" in text for text in warnings)


def test_an_empty_folder_makes_an_empty_cohort_and_a_loud_warning(hospital: Any) -> None:
    taken = hospital.take_in(hospital.labels({"P1": "normal"}))

    assert (len(taken.cohort), taken.cohort.unit) == (0, "patient")
    assert any("The cohort is empty" in text for text in taken.summary.contents.warnings)
    assert len(taken.summary.not_used) == 1


def test_a_missing_folder_is_named(hospital: Any) -> None:
    hospital.folder.rmdir()

    with pytest.raises(IntakeError, match=r"source: no such folder"):
        hospital.take_in(hospital.labels({"P1": "normal"}))
    assert not (hospital.place / "cohort").exists()


def test_what_is_no_regular_file_is_listed(hospital: Any) -> None:
    hospital.film("x")
    os.mkfifo(hospital.folder / "pipe")
    (hospital.folder / "dangling").symlink_to(hospital.folder / "nowhere")
    (hospital.folder / "loop").symlink_to(hospital.folder)

    taken = hospital.take_in(hospital.labels({"P1": "normal"}))

    assert taken.reasons["pipe"] == "not a regular file"
    assert taken.reasons["dangling"] == "not a regular file"
    assert taken.reasons["loop"].startswith("a link to a folder")
    assert len(taken.cohort) == 1


@pytest.fixture
def nobody() -> Iterator[None]:
    """What the superuser may do is taken away for the length of a test."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def test_a_folder_that_cannot_be_listed_is_not_passed_over(tmp_path: Path, request: Any) -> None:
    folder = tmp_path / "source"
    (folder / "ward" / "closed").mkdir(parents=True)
    (folder / "ward" / "film").touch()
    (folder / "ward" / "closed").chmod(0)
    for parent in (folder, *folder.parents):
        if "pytest-" in str(parent):
            parent.chmod(0o755)
    request.getfixturevalue("nobody")

    assert sorted(walk(folder)) == [folder / "ward" / "closed", folder / "ward" / "film"]


def test_the_source_is_left_as_it_was(hospital: Any) -> None:
    path = hospital.film("x")
    before = path.read_bytes(), path.stat().st_mtime_ns

    hospital.take_in(hospital.labels({"P1": "normal"}))

    assert (path.read_bytes(), path.stat().st_mtime_ns) == before


def test_the_same_key_gives_the_same_cohort_and_another_key_another(hospital: Any) -> None:
    for number in range(8):
        hospital.film(str(number), PatientID=f"P{number % 4}")
    table = hospital.labels({f"P{number}": "normal" for number in range(4)})

    one, again = hospital.take_in(table, "a").cohort, hospital.take_in(table, "b").cohort
    hospital.key = SiteKey.random()
    other = hospital.take_in(table, "c").cohort

    for name in ("index.sqlite", "images.u16"):
        assert (one.path / name).read_bytes() == (again.path / name).read_bytes()
    assert len(other.patients) == len(one.patients) == 4
    assert not set(one.patients) & set(other.patients)


def test_the_order_of_images_does_not_follow_the_names(hospital: Any) -> None:
    names = [f"P{number:02d}" for number in range(12)]
    for name in names:
        hospital.film(name, PatientID=name)
    table = hospital.labels(dict.fromkeys(names, "normal"))

    orders = set()
    for secret in range(4):
        hospital.key = SiteKey(bytes([secret]) * 32)
        cohort = hospital.take_in(table, f"cohort{secret}").cohort
        by_name = [hospital.key.pseudonym("patient", "", name) for name in names]
        orders.add(tuple(by_name.index(cohort.patients[p]) for p in cohort.patient_index))

    assert len(orders) == 4
    assert tuple(range(12)) not in orders


def test_splits_from_the_table_or_for_all(hospital: Any) -> None:
    hospital.film("x")
    table = hospital.place / "labels.csv"
    table.write_text("PatientID,label,split\nP1,normal,train\n")

    assert hospital.take_in(table, "a").cohort.splits == ["train"]
    assert hospital.take_in(table, "b", split="test").cohort.splits == ["test"]


class OneFile:
    """Of one file: P2 is refused, and every other image is made black."""

    def __init__(self, plain: CleanFile, patient: str, seen: list[Any]) -> None:
        self.header, self.account = plain.header, plain.account
        self._plain, self._patient, self._seen = plain, patient, seen

    def check(self, segmentations: object = ()) -> None:
        if self._patient == "P2":
            raise IntakeError("burned-in text")

    def frame(self, number: int, pixels: Floats) -> CleanFrame:
        self._seen.append((self._patient, number, pixels.shape))
        clean = self._plain.frame(number, pixels)
        return CleanFrame("aa", "bb", "cc", clean.instance, np.zeros_like(pixels))


def test_every_image_passes_the_seam_and_only_what_it_gives_is_kept(
    hospital: Any, in_this_process: Any
) -> None:
    for patient in ("P1", "P2"):
        hospital.film(patient, PatientID=patient, PatientName=f"Name^{patient}")
    order = hospital.order(hospital.labels({"P1": "normal", "P2": "normal"}), "c")
    plain = CohortDeidentifier(Engine(Profile(), hospital.key))
    seen: list[Any] = []

    def deidentify(unverified: Any, decision: Any = None) -> OneFile:
        return OneFile(plain(unverified, decision), str(unverified.PatientID), seen)

    reader = FileReader(order.spec.input, order.labels, deidentify)
    summary = take_in(order, pool=lambda *_: in_this_process(reader))

    cohort = Cohort.open(order.cohort)
    assert seen == [("P1", 0, (20, 30))]
    assert cohort.patients == ("aa",)
    assert cohort.images([0]).max() == 0
    assert {item.what: item.reason for item in summary.not_used}["P2"] == "burned-in text"


def test_progress_comes_to_its_end(hospital: Any, in_this_process: Any) -> None:
    for name in "abc":
        hospital.film(name, PatientID="")
    table = hospital.labels({STUDY: "normal"}, "StudyInstanceUID")
    calls: list[tuple[int, int]] = []
    note: Callable[[int, int], None] = lambda done, total: calls.append((done, total))  # noqa: E731

    take_in(hospital.order(table), progress=note, pool=in_this_process)

    assert calls[-1] == (3, 3)
    assert [done for done, _ in calls] == sorted(done for done, _ in calls)
