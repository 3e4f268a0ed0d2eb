"""A trained model on new studies: what it sees, what it says, what is refused, what is left."""

from __future__ import annotations

import csv
import hashlib
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import highdicom
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from pydicom import dcmread
from pydicom.sr.codedict import codes
from pydicom.uid import (
    CTImageStorage,
    SecondaryCaptureImageStorage,
    XRayAngiographicImageStorage,
)
from torch import Tensor, nn

from client.intake.deid.profile import Profile
from client.intake.items import listed
from client.intake.pixels import box_to_shape, mask_to_shape
from client.intake.take import take_in
from client.prediction import explained
from client.prediction.answering import Model
from client.prediction.dicom_objects import Reports, Segmentations
from client.prediction.explained import Explainer
from client.prediction.geometry import boxes_to_source, mask_to_source
from client.prediction.output import safe
from client.prediction.predict import (
    AMBIGUOUS,
    COPY,
    NOT_NUMBERS,
    NOT_WRITTEN,
    TWO_NAMES,
    TWO_ORDERS,
    TWO_PATIENTS,
    UNEXPLAINED,
    Order,
    ToldStudy,
    predict,
    predict_cohort,
)
from client.prediction.reading import CHANGED, CUT_OFF, NO_MODALITY, NOWHERE, Prepare, Prepared
from client.prediction.rows import PARTLY, UNPLACED, WARNING, Rows
from client.prediction.tables import head_of
from common import explanation
from common.calibration import Calibration
from common.cohort import PIXEL, Cohort
from common.errors import CohortError, ConfigError, PackageError
from common.package import Package
from common.spec import Input
from common.tasks.preprocess import normalise

SEGMENTATION: dict[str, Any] = {
    "task": {"name": "segmentation", "kind": "mask", "classes": ["ground", "organ", "tumour"]},
    "model": {"name": "unet", "width": 4},
    "input": {"height": 32, "width": 32, "window": "range"},
    "loss": {"name": "dice"},
    "evaluation": {"metric": "dice"},
}
DETECTION: dict[str, Any] = {
    "task": {"name": "detection", "kind": "boxes", "classes": ["cell"]},
    "model": {"name": "centernet", "width": 4},
    "input": {"height": 32, "width": 32},
    "loss": {"name": "heatmap"},
    "evaluation": {"metric": "map50", "threshold": 0.3},
}


# --- What the network sees ------------------------------------------------------------------------


def seen_by_predict(model: Model, folder: Path, profile: Profile) -> Iterator[bytes]:
    order = Order(model, folder, folder / "none", profile)
    for item in listed(folder).items:
        digest = hashlib.sha256((folder / item.place).read_bytes()).hexdigest()
        found = order.reader(Prepare(item, digest))
        assert isinstance(found, Prepared)
        assert not found.reason, found.reason
        yield from (frame.pixels.astype(PIXEL).tobytes() for frame in found.frames)


def stored_by_intake(cohort: Cohort) -> list[bytes]:
    raw = (cohort.path / "images.u16").read_bytes()
    each = cohort.meta.image_bytes
    return sorted(raw[start : start + each] for start in range(0, len(raw), each))


def test_it_sees_bit_for_bit_what_the_intake_stores(clinic: Any) -> None:
    values = np.random.default_rng(1).integers(0, 4096, (40, 30), dtype=np.uint16)
    clinic.hospital.film("a.dcm", values)
    clinic.hospital.film("b.dcm", values, PhotometricInterpretation="MONOCHROME1", PatientID="P2")
    clinic.hospital.film("c.dcm", values, WindowCenter="900", WindowWidth="700", PatientID="P3")
    labels = clinic.hospital.labels({"P1": "normal", "P2": "normal", "P3": "finding"})
    taken = clinic.hospital.take_in(labels)
    ours = seen_by_predict(clinic.model(), clinic.hospital.folder, Profile())
    assert sorted(ours) == stored_by_intake(taken.cohort)
    others = seen_by_predict(
        clinic.model(input={"window": "percentile"}), clinic.hospital.folder, Profile()
    )
    assert sorted(others) != stored_by_intake(taken.cohort)


@pytest.mark.parametrize(
    "name",
    [
        "deid-data/ultrasounds/RGB_IMAGE.dcm",
        "presidio/docs/samples/python/sample_data/2_ORIGINAL.dcm",
        "highdicom/ct_image.dcm",
    ],
)
def test_it_sees_of_real_files_what_the_intake_stores(
    clinic: Any, shared_data: Path, name: str
) -> None:
    shutil.copy(shared_data / "dicom" / name, clinic.hospital.folder / "one.dcm")
    header = dcmread(clinic.hospital.folder / "one.dcm", stop_before_pixels=True)
    shape = {"height": 128, "width": 96, "frames": "all"}
    labels = clinic.hospital.labels({str(header.PatientID): "normal"})
    profile = Profile(risky_pixels="blank", faces="keep")
    order = clinic.hospital.order(labels, profile=profile, input=shape)
    take_in(order, pool=clinic.in_this_process)
    stored = stored_by_intake(Cohort.open(order.cohort))
    assert stored
    found = sorted(seen_by_predict(clinic.model(input=shape), clinic.hospital.folder, profile))
    assert found == stored


def test_its_probabilities_are_the_network_s_on_a_cohort_of_the_same_files(clinic: Any) -> None:
    generator = np.random.default_rng(2)
    for number in range(5):
        values = generator.integers(0, 4096, (20, 30), dtype=np.uint16)
        of = {"PatientID": f"P{number}", "StudyInstanceUID": f"1.2.3.{number}"}
        clinic.hospital.film(f"{number}.dcm", values, **of)
    labels = clinic.hospital.labels({f"P{number}": "normal" for number in range(5)})
    cohort = clinic.hospital.take_in(labels).cohort
    model = clinic.model()
    seen = normalise(torch.from_numpy(cohort.images(range(5))), model.package.spec.input)
    with torch.no_grad():
        expected = torch.sigmoid(model.package.network()(seen)[:, 0]).tolist()
    rows = clinic.answer(model).json["images"]
    found = [row["raw_probability"]["finding"] for row in rows]
    assert sorted(found) == pytest.approx(sorted(expected), abs=2e-6)
    assert len(set(found)) == 5


# --- What is said --------------------------------------------------------------------------------


def test_a_cohort_is_answered_as_its_source_is_under_its_pseudonyms(clinic: Any) -> None:
    generator = np.random.default_rng(7)
    for number in range(6):
        values = generator.integers(0, 4096, (20, 30), dtype=np.uint16)
        study = f"1.2.3.{number // 2}"
        patient = f"P{number // 2}"
        clinic.hospital.film(f"{number}.dcm", values, PatientID=patient, StudyInstanceUID=study)
    labels = clinic.hospital.labels({f"P{number}": "normal" for number in range(3)})
    cohort = clinic.hospital.take_in(labels).cohort
    model = clinic.model()
    target = clinic.hospital.place / "of-cohort"
    predict_cohort(Order(model, cohort.path, target), cohort)
    ours, theirs = clinic.read(target).json, clinic.answer(model).json
    for key, of in (("images", "raw_probability"), ("studies", "mean_raw_probability")):
        found, expected = (sorted(row[of]["finding"] for row in one[key]) for one in (ours, theirs))
        assert found == pytest.approx(expected, abs=2e-6)
    assert {row["patient_id"] for row in ours["images"]} == set(cohort.patients)
    assert "Pseudonyms" in ours["identities"]
    assert all(NO_MODALITY in row["caveats"] for row in ours["images"])
    meant = clinic.model(use={"modalities": ["CT"], "body_parts": ["HEAD"]})
    predict_cohort(Order(meant, cohort.path, target.with_name("meant")), cohort)
    for row in clinic.read(target.with_name("meant")).json["images"]:
        assert "meant for modalities CT; body parts HEAD" in " ".join(row["caveats"])
    other = clinic.model(input={"window": "percentile"})
    with pytest.raises(CohortError, match="another preprocessing"):
        predict_cohort(Order(other, cohort.path, target.with_name("x")), cohort)
    reports = (Reports(model.package),)
    with pytest.raises(ConfigError, match="needs DICOM files"):
        predict_cohort(Order(model, cohort.path, target.with_name("x"), additions=reports), cohort)


def test_an_answer_names_whom_it_is_of(clinic: Any) -> None:
    path = clinic.hospital.film("deep/a.dcm", PatientID="P7", AccessionNumber="A9")
    header = dcmread(path)
    (row,) = clinic.answer(clinic.model()).json["images"]
    assert (row["patient_id"], row["accession_number"], row["file"]) == ("P7", "A9", "deep/a.dcm")
    assert row["study_instance_uid"] == header.StudyInstanceUID
    assert row["series_instance_uid"] == header.SeriesInstanceUID
    assert row["sop_instance_uid"] == header.SOPInstanceUID
    assert (row["rows"], row["columns"], row["frame"]) == (20, 30, 1)
    assert sum(row["raw_probability"].values()) == pytest.approx(1, abs=1e-5)


def test_everything_is_for_its_owner_s_eyes_alone(clinic: Any) -> None:
    clinic.hospital.film("a.dcm")
    model = clinic.model()
    found = clinic.answer(model, additions=(Reports(model.package),))
    entries = [found.folder, *found.folder.rglob("*")]
    modes = {path.name: path.stat().st_mode & 0o777 for path in entries}
    assert modes == {
        "answers": 0o700,
        "sr": 0o700,
        "1.dcm": 0o600,
        "predictions.json": 0o600,
        "predictions.csv": 0o600,
        "studies.csv": 0o600,
        "refused.csv": 0o600,
        "not_made.csv": 0o600,
    }
    assert "must stay within the hospital" in found.json["identities"]


def test_a_calibration_is_applied_and_what_the_network_said_stands_beside(clinic: Any) -> None:
    clinic.hospital.film("a.dcm")
    model = clinic.model()
    before = clinic.answer(model)
    heat = Calibration(kind="binary", temperatures=(0.1,), images=40, patients=40)
    (model.package.path / "calibration.json").write_text(heat.model_dump_json())
    after = clinic.answer(Model(Package.open(model.package.path, unsigned=True)), "after")
    (raw,), (put_right,) = before.json["images"], after.json["images"]
    assert raw["probability"] is None
    assert put_right["raw_probability"] == raw["raw_probability"]
    odds = raw["raw_probability"]["finding"] / raw["raw_probability"]["normal"]
    expected = odds**10 / (1 + odds**10)
    assert put_right["probability"]["finding"] == pytest.approx(expected, abs=1e-4)
    assert put_right["probability"] != raw["raw_probability"]
    (line,) = after.table("predictions.csv")
    assert float(line["probability {finding}"]) == put_right["probability"]["finding"]
    assert "probability {finding}" not in before.table("predictions.csv")[0]


def test_a_study_has_the_mean_and_the_largest_of_its_images(clinic: Any) -> None:
    generator = np.random.default_rng(3)
    for number in range(6):
        values = generator.integers(0, 4096, (20, 30), dtype=np.uint16)
        study = f"1.2.3.{number // 3}"
        clinic.hospital.film(f"{number}.dcm", values, StudyInstanceUID=study)
    found = clinic.answer(clinic.model()).json
    for study in found["studies"]:
        mine = [
            row["raw_probability"]["finding"]
            for row in found["images"]
            if row["study_instance_uid"] == study["study_instance_uid"]
        ]
        assert len(mine) == study["images"] == 3
        assert study["mean_raw_probability"]["finding"] == pytest.approx(np.mean(mine), abs=1e-6)
        assert study["largest_raw_probability"]["finding"] == pytest.approx(max(mine), abs=1e-6)
    assert len(found["studies"]) == 2


def test_images_of_studies_that_lie_anywhere_come_together_in_the_order_they_were_taken(
    clinic: Any,
) -> None:
    for number, place in enumerate(("z", "a", "m", "b")):
        attributes = {"StudyInstanceUID": f"1.2.3.{number % 2}", "InstanceNumber": 9 - number}
        clinic.hospital.film(f"{place}.dcm", **attributes)
    rows = clinic.answer(clinic.model()).json["images"]
    assert [row["file"] for row in rows] == ["m.dcm", "z.dcm", "b.dcm", "a.dcm"]
    assert [row["number"] for row in rows] == [1, 2, 3, 4]


def test_nothing_declared_and_text_that_is_likely_are_said_of_each_image(clinic: Any) -> None:
    clinic.hospital.film("a.dcm", BurnedInAnnotation="YES", LossyImageCompression="01")
    (row,) = clinic.answer(clinic.model()).json["images"]
    said = " ".join(row["caveats"])
    for words in ("for which modalities", "for which body parts", "text in its pixels", "loss"):
        assert words in said
    use = {"modalities": ["CR"], "body_parts": ["CHEST"]}
    clinic.hospital.film("a.dcm", BodyPartExamined="CHEST")
    (row,) = clinic.answer(clinic.model(use=use), "again").json["images"]
    assert row["caveats"] == []


# --- What is refused ------------------------------------------------------------------------------

USE = {"modalities": ["CR", "DX"], "body_parts": ["CHEST"], "smallest_side": 20, "largest_side": 64}
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"Modality": "MR"}, "its modality is 'MR'; the model is meant for CR, DX"),
    ({"Modality": None}, "its modality is not given"),
    ({"BodyPartExamined": "HAND"}, "; the model is meant for CHEST"),
    ({"BodyPartExamined": None}, "its body part is not given"),
    ({"pixels": np.zeros((19, 40), np.uint16)}, "sides of at least 20"),
    ({"pixels": np.zeros((20, 65), np.uint16)}, "sides of at most 64"),
    ({"SOPClassUID": SecondaryCaptureImageStorage}, "secondary capture"),
    ({"SOPClassUID": "1.2.840.10008.5.1.4.1.1.88.22"}, "SOP class"),
    ({"PhotometricInterpretation": "CIELAB"}, "photometric interpretation"),
    ({"Rows": 65000, "Columns": 65000}, "at most"),
    ({"PixelData": b"\0\0"}, "cut short"),
    ({"PixelData": None}, "no pixel data"),
    ({"StudyInstanceUID": None}, "StudyInstanceUID is missing or no UID"),
    ({"SOPInstanceUID": "../../../etc/passwd"}, "SOPInstanceUID is missing or no UID"),
    ({"SeriesInstanceUID": "1." + "2" * 70}, "SeriesInstanceUID is missing or no UID"),
]


@pytest.mark.filterwarnings("ignore:.*:UserWarning:pydicom")
@pytest.mark.parametrize(("attributes", "reason"), REFUSED, ids=lambda value: str(value)[:30])
def test_what_the_model_is_not_meant_for_is_refused_and_costs_no_other(
    clinic: Any, attributes: dict[str, Any], reason: str
) -> None:
    clinic.hospital.film("good.dcm", BodyPartExamined="CHEST")
    clinic.hospital.film("bad.dcm", **{"BodyPartExamined": "CHEST", **attributes})
    found = clinic.answer(clinic.model(use=USE))
    assert reason in found.refused["bad.dcm"]
    assert [row["file"] for row in found.json["images"]] == ["good.dcm"]
    (line,) = found.table("refused.csv")
    assert line["reason"] == found.refused["bad.dcm"]
    assert {path.name for path in clinic.hospital.place.iterdir()} == {"source", "run", "answers"}


def test_what_is_no_dicom_or_damaged_is_refused(clinic: Any) -> None:
    whole = clinic.hospital.film("good.dcm").read_bytes()
    for name, content in (("a.txt", b"hello"), ("b.dcm", whole[:300]), ("c.dcm", b"")):
        (clinic.hospital.folder / name).write_bytes(content)
    found = clinic.answer(clinic.model())
    assert set(found.refused) == {"a.txt", "b.dcm", "c.dcm"}
    assert len(found.json["images"]) == 1


@pytest.mark.parametrize("seed", range(12))
def test_bytes_that_were_changed_anywhere_never_end_it(clinic: Any, seed: int) -> None:
    generator = np.random.default_rng(seed)
    content = bytearray(clinic.hospital.film("a.dcm").read_bytes())
    for place in generator.integers(0, len(content) - 1200, 12):
        content[place] = generator.integers(256)
    (clinic.hospital.folder / "a.dcm").write_bytes(content)
    model = clinic.model()
    found = clinic.answer(model, additions=(Reports(model.package),))
    assert found.summary.images + len(found.summary.refused) >= 1


def test_two_files_of_one_instance_are_answered_once_or_not_at_all(clinic: Any) -> None:
    uid = "1.2.3.77"
    one = clinic.hospital.film("a.dcm", SOPInstanceUID=uid)
    shutil.copy(one, clinic.hospital.folder / "b.dcm")
    clinic.hospital.film("c.dcm")
    found = clinic.answer(clinic.model())
    assert found.refused == {"b.dcm": COPY}
    clinic.hospital.film("d.dcm", np.zeros((20, 30), np.uint16), SOPInstanceUID=uid)
    again = clinic.answer(clinic.model(), "again")
    assert again.refused == dict.fromkeys(["a.dcm", "b.dcm", "d.dcm"], AMBIGUOUS)
    assert [row["file"] for row in again.json["images"]] == ["c.dcm"]


@pytest.mark.parametrize("other", [{"PatientID": "P2"}, {"IssuerOfPatientID": "ELSEWHERE"}])
def test_a_study_of_two_patients_is_of_none(clinic: Any, other: dict[str, str]) -> None:
    clinic.hospital.film("a.dcm", StudyInstanceUID="1.2.3.1")
    clinic.hospital.film("b.dcm", StudyInstanceUID="1.2.3.1", **other)
    clinic.hospital.film("c.dcm", StudyInstanceUID="1.2.3.2")
    model = clinic.model()
    found = clinic.answer(model, additions=(Reports(model.package),))
    assert found.refused == dict.fromkeys(["a.dcm", "b.dcm"], TWO_PATIENTS)
    assert [row["file"] for row in found.json["images"]] == ["c.dcm"]
    assert len(found.files("sr")) == 1


DOE = {"PatientName": "Doe^Jane", "PatientBirthDate": "19500101", "PatientSex": "F"}
TWO_PEOPLE: list[tuple[str, dict[str, str]]] = [
    ("1", {"PatientName": "Roe^Max", "PatientBirthDate": "19600101"}),
    ("1", {"PatientBirthDate": "19500102"}),
    ("1", {"PatientSex": "M"}),
    ("", {"PatientName": "Roe^Jane"}),
    ("", {"PatientName": ""}),
    ("", {"PatientSex": "M"}),
]
ONE_PERSON: list[tuple[str, dict[str, str], bool]] = [
    ("1", {"PatientName": "Roe^Jane"}, True),
    ("1", {"PatientName": "", "PatientBirthDate": "", "PatientSex": ""}, False),
    ("", {"PatientName": "DOE^JANE^^", "PatientBirthDate": "1950.01.01"}, False),
    ("", {"PatientName": "Doe Jane==\uff24\uff4f\uff45", "PatientSex": ""}, False),
]


@pytest.mark.filterwarnings("ignore:.*:UserWarning:pydicom")
@pytest.mark.parametrize(("identifier", "other"), TWO_PEOPLE, ids=str)
def test_a_study_of_two_people_under_one_identifier_is_of_neither(
    clinic: Any, identifier: str, other: dict[str, str]
) -> None:
    of = {"StudyInstanceUID": "1.2.3.1", "PatientID": identifier, **DOE}
    clinic.hospital.film("a.dcm", **of)
    clinic.hospital.film("b.dcm", **of | other)
    model = clinic.model()
    found = clinic.answer(model, additions=(Reports(model.package),))
    assert found.refused == dict.fromkeys(["a.dcm", "b.dcm"], TWO_PATIENTS)
    assert found.files("sr") == []


@pytest.mark.filterwarnings("ignore:.*:UserWarning:pydicom")
@pytest.mark.parametrize(("identifier", "other", "named"), ONE_PERSON, ids=str)
def test_one_person_may_be_written_in_two_ways_and_another_name_is_said(
    clinic: Any, identifier: str, other: dict[str, str], named: bool
) -> None:
    of = {"StudyInstanceUID": "1.2.3.1", "PatientID": identifier, **DOE}
    clinic.hospital.film("a.dcm", **of)
    clinic.hospital.film("b.dcm", **of | other | {"SpecificCharacterSet": "ISO_IR 192"})
    model = clinic.model()
    found = clinic.answer(model, additions=(Reports(model.package),))
    assert found.refused == {}
    rows = [*found.json["images"], *found.json["studies"]]
    assert [TWO_NAMES in row["caveats"] for row in rows] == [named] * 3
    (report,) = map(dcmread, found.files("sr"))
    said = [one.value for one in report.iterall() if one.keyword == "TextValue"]
    assert sum(TWO_NAMES in text for text in said) == 2 * named


def test_two_accession_numbers_of_a_study_are_said_of_each_image(clinic: Any) -> None:
    for name, number in (("a", "A1"), ("b", "A2")):
        clinic.hospital.film(f"{name}.dcm", StudyInstanceUID="1.2.3.1", AccessionNumber=number)
    clinic.hospital.film("c.dcm", StudyInstanceUID="1.2.3.2")
    found = clinic.answer(clinic.model()).json
    said = {row["file"]: TWO_ORDERS in row["caveats"] for row in found["images"]}
    assert said == {"a.dcm": True, "b.dcm": True, "c.dcm": False}
    assert [TWO_ORDERS in study["caveats"] for study in found["studies"]] == [True, False]


@dataclass(frozen=True)
class Replaced:
    """A reader before which a file becomes another patient's, once it has been looked at."""

    reader: Any
    path: Path

    def __call__(self, task: Any) -> Any:
        if isinstance(task, Prepare):
            header = dcmread(self.path)
            header.PatientID = "P2"
            header.save_as(self.path)
        return self.reader(task)


def test_a_file_that_is_replaced_on_the_way_is_nobody_s(clinic: Any) -> None:
    path = clinic.hospital.film("a.dcm")

    def pool(reader: Any, *rest: Any) -> Any:
        return clinic.in_this_process(Replaced(reader, path), *rest)

    target = clinic.hospital.place / "answers"
    predict(Order(clinic.model(), clinic.hospital.folder, target), pool=pool)
    assert clinic.read(target).refused == {"a.dcm": CHANGED}


def test_no_report_is_made_of_a_file_that_was_replaced_after_its_answer(clinic: Any) -> None:
    path = clinic.hospital.film("a.dcm")

    class Later(Reports):
        def of_study(self, study: ToldStudy) -> Iterator[Any]:
            header = dcmread(path)
            header.PatientName = "Another"
            header.save_as(path)
            yield from super().of_study(study)

    model = clinic.model()
    found = clinic.answer(model, additions=(Later(model.package),))
    assert found.files("sr") == []
    assert CHANGED in found.json["not_made"][0]["reason"]
    assert found.refused == {}


@pytest.mark.parametrize(
    "attributes",
    [{"PixelSpacing": ["1e200", "1e200"]}, {"ImagePositionPatient": [0, 0, "1e300"]}],
)
def test_a_header_of_impossible_measures_costs_its_areas_alone(
    clinic: Any, attributes: dict[str, Any]
) -> None:
    marked_slices(clinic)
    made = slice_of(9, np.full((16, 64), 4000, np.uint16)) | attributes
    clinic.hospital.film("9.dcm", SeriesInstanceUID="1.2.3.9", **made)
    found = clinic.answer(clinic.model(Everywhere(), **SEGMENTATION))
    assert found.refused == {}
    areas = {row["file"]: row["area_mm2"]["organ"] for row in found.json["images"]}
    assert areas.pop("9.dcm") is None
    assert len(areas) == 3
    assert all(areas.values())
    assert [NOWHERE in row["caveats"] for row in found.json["images"]].count(True) == 1


def test_a_row_that_cannot_be_written_costs_no_other(
    clinic: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = Rows.of_image

    def wrong(*of: Any) -> Any:
        row = made(*of)
        return row | ({"area": float("inf")} if row["file"] == "a.dcm" else {})

    monkeypatch.setattr(Rows, "of_image", wrong)
    for name in ("a", "b", "c"):
        clinic.hospital.film(f"{name}.dcm")
    model = clinic.model()
    found = clinic.answer(model, pictures=Explainer(model))
    assert found.refused == {"a.dcm": NOT_WRITTEN}
    assert [row["file"] for row in found.json["images"]] == ["b.dcm", "c.dcm"]
    assert len(list((found.folder / "explanations").iterdir())) == 2


class Diverged(nn.Module):
    """Answers NaN for a bright image."""

    def forward(self, images: Tensor) -> Tensor:
        mean = images.mean(dim=(1, 2, 3))
        return torch.where(mean > 0, torch.nan, mean)[:, None]


def test_an_answer_that_is_no_number_is_none(clinic: Any) -> None:
    clinic.hospital.film("bright.dcm", np.full((20, 30), 4000, np.uint16), WindowCenter=100,
                         WindowWidth=50)  # fmt: skip
    clinic.hospital.film("dark.dcm", np.zeros((20, 30), np.uint16))
    found = clinic.answer(clinic.model(Diverged()))
    assert found.refused == {"bright.dcm": NOT_NUMBERS}
    assert [row["file"] for row in found.json["images"]] == ["dark.dcm"]


@pytest.mark.parametrize(
    "identifier", ['=HYPERLINK("http://x","y")', "+1", "-1+1", "@SUM(A1)", "\t=1", "\uff1d1"]
)
def test_an_identifier_is_no_formula_in_a_spreadsheet(clinic: Any, identifier: str) -> None:
    clinic.hospital.film("=1+1.dcm", SpecificCharacterSet="ISO_IR 192", PatientID=identifier)
    found = clinic.answer(clinic.model())
    assert found.json["images"][0]["patient_id"] == identifier.strip()
    for table in ("predictions.csv", "studies.csv"):
        text = (found.folder / table).read_bytes().decode()
        for line in csv.reader(text.splitlines()):
            assert not any(cell.startswith(("=", "+", "-", "@", "\t", "\uff1d")) for cell in line)
    assert safe(-0.5) == -0.5
    assert safe("P1") == "P1"


def test_a_file_s_name_that_is_no_text_stops_nothing(clinic: Any) -> None:
    path = clinic.hospital.film("a.dcm")
    odd = os.fsdecode(b"\xff.dcm")
    path.rename(path.with_name(odd))
    clinic.hospital.film("b.dcm")
    found = clinic.answer(clinic.model())
    assert {row["file"] for row in found.json["images"]} == {odd, "b.dcm"}
    assert len(found.table("predictions.csv")) == 2


def test_results_are_never_put_over_something_and_never_half(
    clinic: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    clinic.hospital.film("a.dcm")
    model = clinic.model()
    clinic.answer(model)
    before = (clinic.hospital.place / "answers" / "predictions.csv").read_bytes()
    with pytest.raises(ConfigError, match="expected a new name"):
        clinic.answer(model)
    assert (clinic.hospital.place / "answers" / "predictions.csv").read_bytes() == before

    def broken(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(model.network, "forward", broken)
    with suppress(KeyboardInterrupt):
        clinic.answer(model, "later")
    assert {path.name for path in clinic.hospital.place.iterdir()} == {"source", "run", "answers"}


GENERATION = {
    "task": {"name": "generation", "classes": ["normal", "finding"]},
    "model": {"name": "dcgan", "width": 4},
    "loss": {"name": "adversarial"},
    "evaluation": {"metric": "tstr-auroc"},
}
DENOISING = {
    "task": {"name": "reconstruction", "kind": "none", "classes": [], "goal": "denoise",
             "noise": 0.1},
    "model": {"name": "autoencoder", "width": 4},
    "loss": {"name": "mse"},
    "evaluation": {"metric": "psnr"},
}  # fmt: skip


@pytest.mark.parametrize(
    "changes", [GENERATION, DENOISING, {"input": {"images": 2, "together": "patient"}}]
)
def test_a_model_that_says_nothing_of_an_image_is_refused_whole(
    clinic: Any, changes: dict[str, Any]
) -> None:
    with pytest.raises(PackageError, match="cannot be used by predict"):
        clinic.model(**changes)


def test_a_card_of_another_preprocessing_is_refused(clinic: Any) -> None:
    model = clinic.model()
    spec, package = model.package.spec, model.package
    other = spec.input.model_dump(mode="json") | {"window": "percentile"}
    card = {
        "spec_sha256": spec.digest,
        "model": {"safetensors_sha256": package.model_sha256, "input": other},
    }
    (package.path / "model_card.json").write_text(json.dumps(card))
    clinic.hospital.film("a.dcm")
    with pytest.raises(PackageError, match="another preprocessing"):
        clinic.answer(Model(Package.open(package.path, unsigned=True)))
    assert not (clinic.hospital.place / "answers").exists()


# --- Back to the source's geometry ----------------------------------------------------------------


@pytest.mark.parametrize("fit", ["pad", "crop", "stretch"])
@pytest.mark.parametrize("size", [(40, 60), (60, 40), (33, 47), (96, 128), (8, 100)])
def test_a_mask_goes_back_to_where_its_image_came_from(fit: Any, size: tuple[int, int]) -> None:
    settings = Input(height=48, width=64, fit=fit)
    mask = np.random.default_rng(4).integers(0, 5, (48, 64)).astype(np.uint16)
    found = mask_to_source(mask, size, settings)
    rows, columns = size
    scale = min(48 / rows, 64 / columns) if fit == "pad" else max(48 / rows, 64 / columns)
    tall, wide = (max(1, round(rows * scale)), max(1, round(columns * scale)))
    for row, column in np.ndindex(*size):
        if fit == "stretch":
            at = ((row + 0.5) / rows * 48, (column + 0.5) / columns * 64)
        elif fit == "pad":
            at = (
                (row + 0.5) / rows * tall + (48 - tall) // 2,
                (column + 0.5) / columns * wide + (64 - wide) // 2,
            )
        else:
            at = (
                (row + 0.5 - rows / 2) * scale + 24,
                (column + 0.5 - columns / 2) * scale + 32,
            )
        inside = 0 <= at[0] < 48 and 0 <= at[1] < 64
        near = min(abs(value - round(value)) for value in at) < 1e-6  # on the edge of two pixels
        if not near:
            assert found[row, column] == (mask[int(at[0]), int(at[1])] if inside else 0)


@pytest.mark.parametrize("fit", ["pad", "crop", "stretch"])
def test_there_and_back_a_mask_of_a_smaller_image_is_as_it_was(fit: Any) -> None:
    settings = Input(height=60, width=90, fit=fit)
    mask = np.random.default_rng(5).integers(0, 3, (20, 30)).astype(np.uint16)
    there = mask_to_shape(mask, settings)
    assert (mask_to_source(there, mask.shape, settings) == mask).all()


@pytest.mark.parametrize("fit", ["pad", "crop", "stretch"])
@pytest.mark.parametrize("size", [(40, 60), (300, 200)])
def test_a_box_goes_back_to_where_it_came_from(fit: Any, size: tuple[int, int]) -> None:
    settings = Input(height=48, width=64, fit=fit)
    box = (size[1] * 0.4, size[0] * 0.45, size[1] * 0.5, size[0] * 0.6)
    there = box_to_shape(box, size, settings)
    assert there is not None
    (back,) = boxes_to_source(np.array([there], dtype=np.float32), size, settings)
    assert back == pytest.approx(box, abs=1e-3)


# --- Masks, boxes, and DICOM ---------------------------------------------------------------------


class Bright(nn.Module):
    """Class 1 where an image is bright, class 2 where it is half bright, the rest class 0."""

    def forward(self, images: Tensor) -> Tensor:
        x = images[:, 0] * 0.25 + 0.5
        return torch.stack([-(x - 0.0).abs(), -(x - 1.0).abs(), -(x - 0.5).abs()], dim=1)


class Everywhere(nn.Module):
    """Class 1 on every other row, class 2 on the rest."""

    def forward(self, images: Tensor) -> Tensor:
        rows = torch.arange(images.shape[2])[:, None].expand(images.shape[2:]) % 2
        maps = torch.stack([torch.zeros_like(rows), rows, 1 - rows]).float()
        return maps.expand(len(images), *maps.shape)


def slice_of(number: int, marked: NDArray[Any]) -> dict[str, Any]:
    """A CT slice, 3 mm above the one before it."""
    return {
        "pixels": marked,
        "SOPClassUID": CTImageStorage,
        "Modality": "CT",
        "InstanceNumber": number,
        "ImagePositionPatient": [0.0, 0.0, 3.0 * number],
        "ImageOrientationPatient": [1.0, 0.0, 0.0, 0.0, 1.0, 0.0],
        "PixelSpacing": [0.5, 2.0],
        "SliceThickness": 3.0,
        "FrameOfReferenceUID": "1.2.3.4",
        "ImageType": ["ORIGINAL", "PRIMARY", "AXIAL"],
        "RescaleIntercept": 0,
        "RescaleSlope": 1,
        "PatientName": "Doe^Jane",
        "PatientSex": "F",
        "PatientBirthDate": "19500101",
        "StudyDate": "20260101",
        "StudyTime": "101112",
        "StudyID": "1",
        "ReferringPhysicianName": "",
        "Manufacturer": "M",
    }


def marked_slices(clinic: Any, count: int = 3, **attributes: Any) -> list[NDArray[np.uint16]]:
    masks = []
    for number in range(count):
        values = np.zeros((16, 64), np.uint16)
        values[4 : 8 + 2 * number, 8:24] = 4000
        values[4:8, 40:48] = 2000
        made = slice_of(number, values) | attributes
        clinic.hospital.film(f"{count - number}.dcm", made.pop("pixels"), **made)
        masks.append(np.where(values == 4000, 1, np.where(values == 2000, 2, 0)))
    return masks


@pytest.fixture
def segmented(clinic: Any) -> tuple[Any, list[NDArray[np.uint16]]]:
    masks = marked_slices(clinic)
    size = {"height": 64, "width": 64, "window": "range"}
    model = clinic.model(Bright(), **{**SEGMENTATION, "input": size})
    additions = (Reports(model.package), Segmentations(model.package))
    return clinic.answer(model, additions=additions), masks


def test_a_mask_comes_back_as_a_segmentation_in_its_source_s_pixels(segmented: Any) -> None:
    found, masks = segmented
    (path,) = found.files("seg")
    segmentation = highdicom.seg.segread(path)
    for number, mask in enumerate(masks):
        rows = [row for row in found.json["images"] if row["file"] == f"{3 - number}.dcm"]
        uid = rows[0]["sop_instance_uid"]
        pixels = segmentation.get_pixels_by_source_instance([uid], combine_segments=True)
        assert (pixels[0] == mask).all()
        assert mask.any()
    assert [segment.SegmentLabel for segment in segmentation.SegmentSequence] == ["organ", "tumour"]
    assert segmentation.PatientID == "P1"
    algorithm = segmentation.SegmentSequence[0].SegmentationAlgorithmIdentificationSequence[0]
    assert algorithm.AlgorithmVersion == found.json["model"]["model_sha256"]


def test_slices_of_other_pixel_spacing_are_a_segmentation_of_their_own(clinic: Any) -> None:
    spacings = [[0.5, 2.0], [0.5, 2.0], [0.7, 0.7]]
    for number, spacing in enumerate(spacings):
        made = slice_of(number, np.full((16, 64), 4000, np.uint16)) | {"PixelSpacing": spacing}
        clinic.hospital.film(f"{number}.dcm", **made)
    model = clinic.model(Everywhere(), **SEGMENTATION)
    found = clinic.answer(model, additions=(Segmentations(model.package),))
    seen = {}
    for path in found.files("seg"):
        header = dcmread(path)
        (shared,) = header.SharedFunctionalGroupsSequence
        down, across = map(float, shared.PixelMeasuresSequence[0].PixelSpacing)
        (series,) = header.ReferencedSeriesSequence
        seen[down, across] = len(series.ReferencedInstanceSequence)
    assert seen == {(0.5, 2.0): 2, (0.7, 0.7): 1}


def test_a_series_that_can_be_no_segmentation_takes_none_from_another(clinic: Any) -> None:
    class Picky(Segmentations):
        def header(self, item: Any, sha256: str) -> Any:
            found = super().header(item, sha256)
            if item.place == "0.dcm":
                del found.Rows
            return found

    for number in range(2):
        made = slice_of(number, np.full((16, 64), 4000, np.uint16))
        made |= {"SeriesInstanceUID": f"1.2.3.{number}"}
        clinic.hospital.film(f"{number}.dcm", **made)
    model = clinic.model(Everywhere(), **SEGMENTATION)
    found = clinic.answer(model, additions=(Picky(model.package),))
    (path,) = found.files("seg")
    assert dcmread(path).ReferencedSeriesSequence[0].SeriesInstanceUID == "1.2.3.1"
    (lost,) = found.json["not_made"]
    assert lost["what"] == "segmentation of series 1.2.3.0"
    assert lost["reason"] == "it could not be made: a header lacks Rows"
    assert (found.refused, len(found.summary.not_made)) == ({}, 1)
    assert found.json["studies"][0]["refused"] == 0


def codes_of(path: Path) -> dict[str, str]:
    """Codes of our own in an object: the values by their meanings."""
    found = [element.value for element in dcmread(path).iterall() if element.VR == "SQ"]
    return {
        str(item.CodeMeaning): str(item.CodeValue)
        for sequence in found
        for item in sequence
        if item.get("CodingSchemeDesignator") == "99CLOISTER"
    }


def test_a_code_is_of_one_class_whatever_the_model(clinic: Any) -> None:
    clinic.hospital.film("a.dcm", **slice_of(0, np.full((16, 64), 4000, np.uint16)))
    seen = []
    for name, classes in (
        ("x", ["ground", "organ", "tumour"]),
        ("y", ["ground", "vessel", "organ"]),
    ):
        task = SEGMENTATION["task"] | {"classes": classes}
        model = clinic.model(Everywhere(), **{**SEGMENTATION, "task": task})
        additions = (Reports(model.package), Segmentations(model.package))
        found = clinic.answer(model, name, additions=additions)
        files = (*found.files("sr"), *found.files("seg"))
        seen.append({key: value for path in files for key, value in codes_of(path).items()})
    first, second = seen
    assert {"organ", "Pixels: organ"} <= first.keys() & second.keys()
    assert all(first[name] == second[name] for name in first.keys() & second.keys())
    values = list((first | second).values())
    assert len(set(values)) == len(values)
    assert max(map(len, values)) <= 16


def texts_of(path: Path) -> str:
    """All that an object's text items say."""
    found = dcmread(path).iterall()
    return "\n".join(str(element.value) for element in found if element.keyword == "TextValue")


def test_a_report_says_what_must_be_borne_in_mind_and_what_is_missing(clinic: Any) -> None:
    of = {"StudyInstanceUID": "1.2.3.1", "Modality": "CR"}
    clinic.hospital.film("a.dcm", **of, LossyImageCompression="01")
    clinic.hospital.film("b.dcm", **of)
    clinic.hospital.film("c.dcm", **{**of, "Modality": "MR"})
    model = clinic.model(use={"modalities": ["CR"]}, name="n" * 60)
    found = clinic.answer(model, additions=(Reports(model.package),))
    (path,) = found.files("sr")
    said = texts_of(path)
    assert said.count("answered 2 of 3 objects of the study") == 2
    assert said.count("it was compressed with loss") == 1
    assert "Not for clinical use" in said
    assert "decides by threshold 0.5 of the raw probability" in said
    assert dcmread(path).SeriesDescription.startswith("NOT FOR CLINICAL USE: nnn")


MULTICLASS: dict[str, Any] = {
    "task": {"name": "classification", "kind": "multiclass", "classes": ["a", "b", "c"]},
    "loss": {"name": "cross-entropy"},
}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, "threshold 0.5 of the raw"),
        (MULTICLASS, "the likeliest class"),
        (SEGMENTATION, "the likeliest class of each pixel"),
        (DETECTION, "a certainty above 0.3"),
    ],
)
def test_how_a_model_decides_is_said_as_its_kind_does(
    clinic: Any, changes: dict[str, Any], words: str
) -> None:
    said = head_of(clinic.model(**changes))["model"]["decision"]
    assert words in said
    assert ("threshold" in said) == (not changes)
    assert len(said) <= 64


@pytest.mark.parametrize("card", [{}, {"limitations": []}, {"not_for_clinical_use": ""}])
def test_that_it_is_not_for_clinical_use_is_said_whatever_the_card_says(
    clinic: Any, card: dict[str, Any]
) -> None:
    clinic.hospital.film("a.dcm")
    found = clinic.answer(carded(clinic, card))
    assert found.json["warnings"][0] == WARNING
    for name in ("predictions.csv", "studies.csv"):
        (line,) = found.table(name)
        assert line["warning"] == WARNING
        assert line["model_sha256"] == found.json["model"]["model_sha256"]


@pytest.mark.parametrize(
    "card", [{"limitations": 3}, {"limitations": [3]}, {"intended_use": {}}, {"limitations": "x"}]
)
def test_a_card_of_other_types_is_refused(clinic: Any, card: dict[str, Any]) -> None:
    clinic.hospital.film("a.dcm")
    with pytest.raises(PackageError, match="is no text"):
        clinic.answer(carded(clinic, card))
    assert not (clinic.hospital.place / "answers").exists()


def carded(clinic: Any, card: dict[str, Any]) -> Model:
    """The clinic's model, with a card; none if that is empty."""
    package = clinic.model().package
    if card:
        bound = {
            "spec_sha256": package.spec.digest,
            "model": {"safetensors_sha256": package.model_sha256},
        }
        (package.path / "model_card.json").write_text(json.dumps(bound | card))
    return Model(Package.open(package.path, unsigned=True))


def test_areas_and_volumes_are_those_of_the_source(segmented: Any) -> None:
    found, masks = segmented
    for row, mask in zip(found.json["images"], masks, strict=True):
        counts = {"organ": int((mask == 1).sum()), "tumour": int((mask == 2).sum())}
        assert row["pixels"] == counts
        assert row["area_mm2"] == pytest.approx(counts)  # 0.5 mm x 2 mm
    (study,) = found.json["studies"]
    (volume,) = study["volume_mm3"].values()
    assert volume["organ"] == pytest.approx(3.0 * sum((mask == 1).sum() for mask in masks))


def test_slices_with_a_gap_have_no_volume(clinic: Any) -> None:
    marked_slices(clinic, 4)
    (clinic.hospital.folder / "2.dcm").unlink()
    model = clinic.model(Bright(), **SEGMENTATION)
    (study,) = clinic.answer(model).json["studies"]
    assert list(study["volume_mm3"].values()) == [None]


def test_a_report_is_of_the_model_unverified_and_names_its_images(segmented: Any) -> None:
    found, _ = segmented
    (path,) = found.files("sr")
    report = highdicom.sr.srread(path)
    assert (report.VerificationFlag, report.CompletionFlag) == ("UNVERIFIED", "PARTIAL")
    uids = {row["sop_instance_uid"] for row in found.json["images"]}
    evidence = report.CurrentRequestedProcedureEvidenceSequence
    assert {
        item.ReferencedSOPInstanceUID
        for study in evidence
        for series in study.ReferencedSeriesSequence
        for item in series.ReferencedSOPSequence
    } == uids
    assert isinstance(report.content, highdicom.sr.MeasurementReport)
    groups = report.content.get_image_measurement_groups()
    assert len(groups) == 3
    named = {group.source_images[0].referenced_sop_instance_uid: group for group in groups}
    for row in found.json["images"]:
        group = named[row["sop_instance_uid"]]
        values = {m.name.meaning: float(m.value) for m in group.get_measurements()}
        assert values["Pixels: organ"] == row["pixels"]["organ"]
        assert values["Area: tumour"] == row["area_mm2"]["tumour"]
    assert report.PreliminaryFlag == "PRELIMINARY"
    assert report.SeriesDescription.startswith("NOT FOR CLINICAL USE: ")
    (observer,) = report.content.get_observer_contexts(codes.DCM.Device)
    model = found.json["model"]["model_sha256"]
    said = observer.observer_identifying_attributes
    assert isinstance(said, highdicom.sr.DeviceObserverIdentifyingAttributes)
    assert said.serial_number == model
    assert report.PatientName == "Doe^Jane"
    assert report.StudyInstanceUID == found.json["images"][0]["study_instance_uid"]


NAMES = [
    ("ISO_IR 126", "Παπαδόπουλος^Νίκος", "Ω7"),
    ("ISO_IR 192", "王^小东", "号7"),
    ("ISO_IR 100", "Müller^Jörg", "Ä7"),
    (None, "Müller^Jörg", "Ä7"),
    (["", "ISO 2022 IR 87"], "Yamada^Tarou=山田^太郎=やまだ^たろう", "P7"),
    (["ISO 2022 IR 6", "ISO 2022 IR 149"], "Hong^Gildong=洪^吉洞=홍^길동", "P7"),
    ("GB18030", "王^小东", "号7"),
]


@pytest.mark.filterwarnings("ignore:.*:UserWarning:pydicom")
@pytest.mark.parametrize(("charset", "name", "patient"), NAMES)
def test_a_patient_s_name_is_in_every_object_as_it_was(
    clinic: Any, charset: str | list[str] | None, name: str, patient: str
) -> None:
    path = clinic.hospital.folder / "a.dcm"
    made = slice_of(0, np.full((16, 64), 4000, np.uint16))
    made |= {"PatientName": name, "PatientID": patient, "WindowCenter": 100, "WindowWidth": 50}
    made |= {"StudyDescription": name, "ReferringPhysicianName": name}
    clinic.hospital.film("a.dcm", SpecificCharacterSet=charset or "ISO_IR 100", **made)
    if charset is None:
        header = dcmread(path)
        del header.SpecificCharacterSet
        header.save_as(path)
    classes = ["ground", "όγκος", "瘤"]
    model = clinic.model(
        Everywhere(), **{**SEGMENTATION, "task": SEGMENTATION["task"] | {"classes": classes}}
    )
    additions = (Reports(model.package), Segmentations(model.package))
    found = clinic.answer(model, additions=additions)
    assert found.refused == {}
    assert found.json["not_made"] == []
    for written in (*found.files("sr"), *found.files("seg")):
        header = dcmread(written)
        assert (str(header.PatientName), header.PatientID) == (name, patient)
        assert str(header.ReferringPhysicianName) == name
        assert header.SpecificCharacterSet == "ISO_IR 192"
        assert name.encode() in written.read_bytes()
    segments = dcmread(found.files("seg")[0]).SegmentSequence
    assert [segment.SegmentLabel for segment in segments] == classes[1:]


@pytest.mark.parametrize(("tool", "words"), [("dsrdump", "UNVERIFIED"), ("dciodvfy", "")])
def test_other_tools_read_what_was_written(segmented: Any, tool: str, words: str) -> None:
    if shutil.which(tool) is None:
        pytest.skip(f"{tool} is not installed")
    found, _ = segmented
    files = found.files("sr") + (found.files("seg") if tool == "dciodvfy" else [])
    for path in files:
        done = subprocess.run([tool, str(path)], capture_output=True, text=True, check=False)
        said = done.stdout + done.stderr
        assert words in said
        assert "Error" not in said, said


class Boxed(nn.Module):
    """One box of 8 x 16 pixels with its centre in cell (3, 2) of the grid."""

    def forward(self, images: Tensor) -> Tensor:
        maps = torch.full((len(images), 5, 8, 8), -9.0)
        maps[:, 0, 3, 2] = 2.0
        maps[:, 1, 3, 2], maps[:, 2, 3, 2] = 2.0, 4.0
        maps[:, 3:, 3, 2] = 0.5
        return maps


def test_a_box_stands_in_pixels_of_its_source_in_table_and_report(clinic: Any) -> None:
    clinic.hospital.film("a.dcm", np.zeros((96, 96), np.uint16))
    model = clinic.model(Boxed(), **DETECTION)
    found = clinic.answer(model, additions=(Reports(model.package),))
    ((box,),) = (row["boxes"] for row in found.json["images"])
    assert box["class"] == "cell"
    assert box["score"] == pytest.approx(1 / (1 + np.exp(-2)), abs=1e-5)
    corners = [box[side] for side in ("left", "top", "right", "bottom")]
    assert corners == pytest.approx([18, 18, 42, 66])  # (10 ± 4, 14 ± 8) pixels of 32, times 3
    report = highdicom.sr.srread(found.files("sr")[0])
    assert isinstance(report.content, highdicom.sr.MeasurementReport)
    (group,) = report.content.get_planar_roi_measurement_groups()
    assert group.roi is not None
    assert group.roi.value.min(axis=0).tolist() == [18, 18]
    assert group.roi.value.max(axis=0).tolist() == [42, 66]
    (study,) = found.json["studies"]
    assert study["boxes"] == {"cell": 1}
    assert [line["boxes"] for line in found.table("predictions.csv")] == ["1"]
    assert [line["boxes {cell}"] for line in found.table("studies.csv")] == ["1"]


class Beside(nn.Module):
    """One box in the first cell of the grid, above the image where it was padded."""

    def forward(self, images: Tensor) -> Tensor:
        maps = torch.full((len(images), 5, 8, 8), -9.0)
        maps[:, 0, 0, 2] = 2.0
        maps[:, 1:3, 0, 2] = 2.0
        maps[:, 3:, 0, 2] = 0.5
        return maps


def test_a_box_in_the_padding_is_none(clinic: Any) -> None:
    clinic.hospital.film("a.dcm", np.zeros((32, 96), np.uint16))
    found = clinic.answer(clinic.model(Beside(), **DETECTION))
    assert found.json["images"][0]["boxes"] == []
    clinic.hospital.film("a.dcm", np.zeros((96, 96), np.uint16))
    found = clinic.answer(clinic.model(Beside(), **DETECTION), "whole")
    assert len(found.json["images"][0]["boxes"]) == 1


class Certain(nn.Module):
    """Is as sure as a number can be."""

    def forward(self, images: Tensor) -> Tensor:
        return torch.full((len(images), 1), 90.0)


def test_no_probability_is_printed_as_certain(clinic: Any) -> None:
    clinic.hospital.film("a.dcm")
    (row,) = clinic.answer(clinic.model(Certain())).json["images"]
    assert row["raw_probability"] == {"normal": 1e-6, "finding": 1 - 1e-6}


def test_a_series_of_which_a_slice_was_refused_has_no_volume(clinic: Any) -> None:
    marked_slices(clinic, 3)
    made = slice_of(3, np.zeros((16, 64), np.uint16)) | {"PhotometricInterpretation": "CIELAB"}
    clinic.hospital.film("3b.dcm", **made)
    (study,) = clinic.answer(clinic.model(Bright(), **SEGMENTATION)).json["studies"]
    assert list(study["volume_mm3"].values()) == [None]


def series_at(path: Path) -> int:
    """Where in a file the value of its Series Instance UID ends."""
    uid = str(dcmread(path).SeriesInstanceUID)
    return path.read_bytes().index(b"\x20\x00\x0e\x00UI") + 8 + len(uid)


@pytest.mark.parametrize("cut", [0, 150, 400, -1, -2, -3, -4, 0.5], ids=str)
def test_a_slice_that_breaks_anywhere_costs_the_volume_and_is_said(clinic: Any, cut: float) -> None:
    """Also the last one, of which the rest are evenly spaced; -1 cuts the last digit of its UID."""
    marked_slices(clinic, 5, SeriesInstanceUID="1.2.3.98.76")
    model = clinic.model(Bright(), **SEGMENTATION)
    (study,) = clinic.answer(model, "whole").json["studies"]
    assert [each["organ"] for each in study["volume_mm3"].values()] == [1920.0]
    assert not any("no volume is said" in word for word in study["caveats"])
    path = clinic.hospital.folder / "1.dcm"
    whole, end = path.read_bytes(), series_at(path)
    far = int(len(whole) * cut) if isinstance(cut, float) else cut
    path.write_bytes(whole[: end + far if far < 0 else far])
    found = clinic.answer(model, additions=(Reports(model.package),))
    (study,) = found.json["studies"]
    assert set(found.refused) == {"1.dcm"}
    assert list(study["volume_mm3"].values()) == [None]
    placed = cut == 0.5
    assert (UNPLACED.format(1) in study["caveats"]) == (not placed)
    (report,) = found.files("sr")
    assert (UNPLACED.format(1) in texts_of(report)) == (not placed)
    assert cut in (0, 150, 400) or "answered 4 of 5 objects" in texts_of(report)


def test_slices_in_two_frames_of_reference_have_no_volume(clinic: Any) -> None:
    marked_slices(clinic, 4)
    for name in ("1.dcm", "2.dcm"):
        header = dcmread(clinic.hospital.folder / name)
        header.FrameOfReferenceUID = "1.2.9.9"
        header.save_as(clinic.hospital.folder / name)
    (study,) = clinic.answer(clinic.model(Bright(), **SEGMENTATION)).json["studies"]
    assert list(study["volume_mm3"].values()) == [None]


class DarkAlone(nn.Module):
    """Answers dark images alone with a number."""

    def forward(self, images: Tensor) -> Tensor:
        mean = images.mean(dim=(1, 2, 3))
        return torch.where(mean > mean.median(), torch.nan, mean)[:, None]


def test_an_object_of_which_some_frames_are_answered_is_one_object(clinic: Any) -> None:
    frames = np.zeros((6, 20, 30), np.uint16)
    frames[:3] = np.random.default_rng(0).integers(0, 4000, (3, 20, 30))
    frames[:3, 0] = 4000
    clinic.hospital.film("m.dcm", frames[0], NumberOfFrames=6, PixelData=frames.tobytes())
    clinic.hospital.film("bad.dcm", PhotometricInterpretation="CIELAB")
    model = clinic.model(DarkAlone(), input={"frames": "all", "window": "range"})
    found = clinic.answer(model, additions=(Reports(model.package),))
    (study,) = found.json["studies"]
    assert (study["images"], study["refused"]) == (3, 1)
    assert PARTLY.format(1) in study["caveats"]
    assert sorted(row["file"] for row in found.json["refused"]) == ["bad.dcm", "m.dcm"]
    said = texts_of(found.files("sr")[0])
    assert "answered 1 of 2 objects of the study" in said
    assert PARTLY.format(1) in said


def test_an_image_without_a_box_has_none(clinic: Any) -> None:
    clinic.hospital.film("a.dcm", np.zeros((96, 96), np.uint16))
    changes = {**DETECTION, "evaluation": {"metric": "map50", "threshold": 0.999}}
    model = clinic.model(Boxed(), **changes)
    found = clinic.answer(model, additions=(Reports(model.package),))
    assert found.json["images"][0]["boxes"] == []
    assert [line["boxes"] for line in found.table("predictions.csv")] == ["0"]
    assert found.refused == {}
    assert len(found.files("sr")) == 1


def test_a_mask_of_an_image_that_lies_nowhere_is_a_segmentation_too(clinic: Any) -> None:
    values = np.zeros((16, 64), np.uint16)
    values[4:8, 8:24] = 4000
    uid = "1.2.3.55"
    clinic.hospital.film("a.dcm", values, SOPInstanceUID=uid)
    size = {"height": 64, "width": 64, "window": "range"}
    model = clinic.model(Bright(), **{**SEGMENTATION, "input": size})
    found = clinic.answer(model, additions=(Segmentations(model.package),))
    assert found.refused == {}
    segmentation = highdicom.seg.segread(found.files("seg")[0])
    pixels = segmentation.get_pixels_by_source_instance([uid], combine_segments=True)
    assert (pixels[0] == (values == 4000)).all()
    assert found.json["images"][0]["area_mm2"] == {"organ": None, "tumour": None}


def masks_of(clinic: Any, frames: str = "all") -> tuple[Any, list[dict[str, NDArray[Any]]]]:
    """What is answered, and of each segmentation the mask of each source image, read by pydicom."""
    size = {"height": 64, "width": 64, "window": "range", "frames": frames}
    model = clinic.model(Bright(), **{**SEGMENTATION, "input": size})
    found = clinic.answer(model, additions=(Segmentations(model.package),))
    every = []
    for header in map(dcmread, found.files("seg")):
        masks: dict[str, NDArray[Any]] = {}
        stack = header.pixel_array.reshape(-1, header.Rows, header.Columns)
        for values, group in zip(stack, header.PerFrameFunctionalGroupsSequence, strict=True):
            uid = group.DerivationImageSequence[0].SourceImageSequence[0].ReferencedSOPInstanceUID
            number = group.SegmentIdentificationSequence[0].ReferencedSegmentNumber
            masks.setdefault(uid, np.zeros(values.shape, int))[values > 0] = number
        every.append(masks)
    return found, every


def striped(number: int) -> NDArray[np.uint16]:
    values = np.zeros((16, 64), np.uint16)
    values[2 : 4 + number, 8:24] = 4000
    values[12:14, number : number + 4] = 2000
    return values


def test_echoes_and_phases_at_one_place_are_a_segmentation_each(clinic: Any) -> None:
    true = {}
    for number, (place, echo) in enumerate((p, e) for p in range(3) for e in range(2)):
        made = slice_of(place, striped(number)) | {"InstanceNumber": number}
        made["SOPInstanceUID"] = f"1.2.3.8.{echo}.{place}"
        true[made["SOPInstanceUID"]] = made["pixels"]
        clinic.hospital.film(f"{number}.dcm", **made)
    found, masks = masks_of(clinic)
    assert found.json["not_made"] == []
    assert sorted(map(len, masks)) == [3, 3]
    assert sorted({uid.split(".")[4] for uid in each}.pop() for each in masks) == ["0", "1"]
    for uid, mask in (pair for each in masks for pair in each.items()):
        assert (mask == np.select([true[uid] == 4000, true[uid] == 2000], [1, 2])).all()


@pytest.mark.parametrize("place", [{}, {"ImagePositionPatient": [0, 0, 1]}])
def test_images_without_a_frame_of_reference_are_a_segmentation_each(
    clinic: Any, place: dict[str, Any]
) -> None:
    place = place and place | {
        "ImageOrientationPatient": [1, 0, 0, 0, 1, 0],
        "PixelSpacing": [1, 1],
    }
    for number in range(2):
        clinic.hospital.film(f"{number}.dcm", striped(number), **place)
    found, masks = masks_of(clinic)
    assert found.json["not_made"] == []
    assert [len(each) for each in masks] == [1, 1]
    assert not any("FrameOfReferenceUID" in dcmread(path) for path in found.files("seg"))


ANGIO: dict[str, Any] = {
    "SOPClassUID": XRayAngiographicImageStorage, "Modality": "XA", "NumberOfFrames": 3,
    "Rows": 16, "Columns": 64,
}  # fmt: skip
NOWHERE_AT_ALL = dict.fromkeys(
    ["ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "FrameOfReferenceUID"]
)
NO_SEGMENTATION: list[tuple[dict[str, Any], str, str]] = [
    (ANGIO | NOWHERE_AT_ALL, "all", "it has several frames and does not say where they lie"),
    (ANGIO | NOWHERE_AT_ALL, "middle", "it has several frames and does not say where they lie"),
    ({"FrameOfReferenceUID": None}, "all", "or in which frame of reference; an object of its kind"),
    ({"FrameOfReferenceUID": ""}, "all", "or in which frame of reference; an object of its kind"),
    (ANGIO, "all", "several of its frames lie at one place, such as echoes or phases"),
]


@pytest.mark.parametrize(("attributes", "frames", "reason"), NO_SEGMENTATION)
def test_why_there_is_no_segmentation_is_said_in_words(
    clinic: Any, attributes: dict[str, Any], frames: str, reason: str
) -> None:
    values = np.stack([striped(number) for number in range(attributes.get("NumberOfFrames", 1))])
    clinic.hospital.film("a.dcm", **slice_of(0, values.squeeze()) | attributes)
    found, masks = masks_of(clinic, frames)
    assert (found.refused, masks) == ({}, [])
    (lost,) = found.json["not_made"]
    assert reason in lost["reason"]


def test_an_answer_is_explained_by_a_picture_that_nothing_of_a_patient_names(
    clinic: Any,
) -> None:
    values = np.random.default_rng(6).integers(0, 4096, (20, 30), dtype=np.uint16)
    clinic.hospital.film("a.dcm", values)
    model = clinic.model()
    found = clinic.answer(model, pictures=Explainer(model))
    (row,) = found.json["images"]
    assert (row["explanation"], row["explains"]) == (
        "explanations/000001.png",
        row["model_decision"],
    )
    opened = Image.open(found.folder / row["explanation"])
    number = ["normal", "finding"].index(row["model_decision"])
    assert f"for class {number}: {row['model_decision']}\n" in opened.info["Description"]
    assert "Not for clinical use" in opened.info["Description"]
    assert opened.info["Model SHA-256"] == model.package.model_sha256
    picture = np.asarray(opened)
    assert (picture[..., 0] != picture[..., 2]).any()
    words = picture[-20:]  # beneath the maps: black on white
    assert words.max() == 255
    assert words.min() == 0
    assert (words[..., 0] == words[..., 2]).all()
    assert (found.folder / row["explanation"]).stat().st_mode & 0o777 == 0o600
    with pytest.raises(ConfigError, match="cannot be explained"):
        Explainer(clinic.model(**DETECTION))


def test_what_explains_is_compared_with_random_weights(clinic: Any) -> None:
    rng = np.random.default_rng(6)
    for number in range(5):
        values = rng.integers(0, 4096, (20, 30), dtype=np.uint16)
        of = {"PatientID": f"P{number}", "StudyInstanceUID": f"1.2.3.{number}"}
        clinic.hospital.film(f"{number}.dcm", values, **of)
    model = clinic.model()
    said = clinic.answer(model, pictures=Explainer(model)).json["explained"]
    assert set(said) == {"grad-cam", "integrated-gradients"}
    for method in said.values():
        assert (method["images"], method["patients"]) == (5, 5)
        rank = method["rank_correlation_with_random_weights"]
        assert -1 <= rank["low"] <= rank["value"] <= rank["high"] <= 1
        assert "what was learned" in method["map"]


def test_images_of_one_patient_do_not_say_whether_an_explanation_is_one(clinic: Any) -> None:
    rng = np.random.default_rng(6)
    for number in range(5):
        clinic.hospital.film(f"{number}.dcm", rng.integers(0, 4096, (20, 30), dtype=np.uint16))
    model = clinic.model()
    said = clinic.answer(model, pictures=Explainer(model)).json["explained"]
    assert said
    for method in said.values():
        assert method["patients"] == 1
        assert method["map"].startswith("not known")


@pytest.mark.parametrize("broken", ["explain", "dependence"])
def test_what_cannot_be_explained_costs_no_answer(
    clinic: Any, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    def full(*_: Any) -> Any:
        raise RuntimeError("out of memory")

    clinic.hospital.film("a.dcm")
    model = clinic.model()
    where = explained if broken == "explain" else explanation
    monkeypatch.setattr(where, broken, full)
    found = clinic.answer(model, pictures=Explainer(model))
    (row,) = found.json["images"]
    assert (UNEXPLAINED in row["caveats"]) == (broken == "explain")
    assert ("explanation" in row) == (broken != "explain")
    maps = {method["map"] for method in found.json["explained"].values()}
    assert maps == (set() if broken == "explain" else {explained._NOT_COMPARED})


def test_what_was_cut_off_is_said(clinic: Any) -> None:
    clinic.hospital.film("wide.dcm", np.zeros((20, 30), np.uint16))
    clinic.hospital.film("square.dcm", np.zeros((24, 24), np.uint16))
    crop = {"height": 24, "width": 24, "fit": "crop"}
    for fit, expected in (("crop", {"wide.dcm"}), ("pad", set())):
        found = clinic.answer(clinic.model(input={**crop, "fit": fit}), fit)
        cut = {row["file"] for row in found.json["images"] if CUT_OFF in row["caveats"]}
        assert cut == expected


@pytest.mark.filterwarnings("ignore:Invalid value for VR DA:UserWarning")
def test_a_header_that_cannot_be_written_costs_the_report_and_not_the_answer(
    clinic: Any,
) -> None:
    class Never(Reports):
        def of_study(self, _: ToldStudy) -> Iterator[bytes]:
            yield b"x"
            raise ValueError("Doe^Jane")

    clinic.hospital.film("a.dcm", PatientBirthDate="***", StudyDate="****")
    model = clinic.model()
    fine = clinic.answer(model, additions=(Reports(model.package),))
    assert dcmread(BytesIO(fine.files("sr")[0].read_bytes())).PatientBirthDate == ""
    found = clinic.answer(model, "again", additions=(Never(model.package),))
    assert len(found.json["images"]) == 1
    assert found.refused == {}
    (lost,) = found.table("not_made.csv")
    assert lost["reason"] == "it could not be made: the headers do not allow it (ValueError)"
    assert [study["refused"] for study in found.json["studies"]] == [0]
