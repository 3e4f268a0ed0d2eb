"""A model of several images of a study at work: one decision, and what each image weighed in it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import highdicom
import numpy as np
import pytest
import torch
from PIL import Image
from pydicom import dcmread
from pydicom.uid import CTImageStorage

from client.prediction.dicom_objects import Reports
from client.prediction.explained import Explainer
from client.prediction.predict import NOT_NUMBERS, Order, predict_cohort
from client.prediction.rows import NOT_ALL, NOT_THERE
from common.errors import ConfigError
from common.studies import Studies, rows_for
from common.tasks.preprocess import normalise

PLACES = 3
COUNTS = {"1.2.3.1": 2, "1.2.3.2": 3, "1.2.3.3": 5}


@pytest.fixture
def films(clinic: Any) -> Any:
    """Three studies of two, three and five images, which lie anywhere."""
    generator = np.random.default_rng(5)
    for study, count in COUNTS.items():
        for number in range(count):
            values = generator.integers(0, 4096, (20, 30), dtype=np.uint16)
            clinic.hospital.film(
                f"{number}/{study}.dcm",
                values,
                StudyInstanceUID=study,
                SeriesInstanceUID=f"{study}.1",
                PatientID=f"P{study[-1]}",
                InstanceNumber=number + 1,
            )
    return clinic


@pytest.fixture
def model(clinic: Any) -> Callable[..., Any]:
    def _model(**changes: Any) -> Any:
        torch.manual_seed(3)
        return clinic.model(**{"input": {"images": PLACES}, **changes})

    return _model


def test_a_study_has_the_one_answer_that_it_has_as_a_cohort(films: Any, model: Any) -> None:
    """Beside what the network gives for the cohort of the same files, study by study."""
    asked = model()
    spec = asked.package.spec
    labels = films.hospital.labels({f"P{number}": "normal" for number in (1, 2, 3)})
    cohort = films.hospital.take_in(labels, input={"images": PLACES}).cohort
    rows = Studies(cohort, PLACES)
    with torch.no_grad():
        seen = normalise(torch.from_numpy(rows.images(np.arange(3))), spec.input)
        expected = torch.sigmoid(asked.package.network()(seen)[:, 0]).numpy()
    found = films.answer(asked).json
    few = [row for row in found["studies"] if row["images"] <= PLACES]
    said = sorted(row["raw_probability"]["finding"] for row in few)
    own = [len(rows.images_of(study)) <= PLACES for study in range(3)]
    assert said == pytest.approx(sorted(expected[own].tolist()), abs=2e-6)
    assert len(set(said)) == len(few) == 2
    for row in found["studies"]:
        likely = row["raw_probability"]["finding"] > spec.evaluation.threshold
        assert row["model_decision"] == ("finding" if likely else "normal")
    target = films.hospital.place / "of-cohort"
    predict_cohort(Order(asked, cohort.path, target), cohort)
    again = films.read(target).json["studies"]
    own_words = sorted(row["raw_probability"]["finding"] for row in again)
    assert own_words == pytest.approx(sorted(expected.tolist()), abs=2e-6)


def test_of_too_many_images_some_are_seen_evenly_spaced_and_weights_add_up(
    films: Any, model: Any
) -> None:
    found = films.answer(model())
    for study, count in COUNTS.items():
        mine = [row for row in found.json["images"] if row["study_instance_uid"] == study]
        seen = [number for number, row in enumerate(mine) if row["seen"]]
        assert seen == ([0, 2, 4] if count == 5 else list(range(count)))
        assert sum(row["attention"] or 0 for row in mine) == pytest.approx(1, abs=1e-5)
        assert all((row["attention"] is None) == (not row["seen"]) for row in mine)
        assert not any("raw_probability" in row for row in mine)
    assert found.summary.images == 2 + 3 + 3
    assert sum(found.summary.decisions.values()) == 3
    lines = found.table("studies.csv")
    assert [float(line["raw_probability {finding}"]) for line in lines] == [
        row["raw_probability"]["finding"] for row in found.json["studies"]
    ]
    assert {line["seen"] for line in found.table("predictions.csv")} == {"True", "False"}


def test_what_is_refused_of_a_study_is_said_of_its_decision(films: Any, model: Any) -> None:
    films.hospital.film(
        "bad.dcm", StudyInstanceUID="1.2.3.1", PatientID="P1", SOPClassUID=CTImageStorage,
        PixelData=b"\0\0",
    )  # fmt: skip
    found = films.answer(model())
    assert set(found.refused) == {"bad.dcm"}
    said = {row["study_instance_uid"]: row for row in found.json["studies"]}
    assert NOT_ALL.format(1) in said["1.2.3.1"]["caveats"]
    assert said["1.2.3.1"]["refused"] == 1
    assert not any("were not answered" in word for word in said["1.2.3.2"]["caveats"])


def test_a_study_that_gives_no_number_is_refused_with_all_its_images(
    films: Any, model: Any
) -> None:
    asked = model()
    plain = asked.network.attended

    def torn(images: Any) -> Any:
        outputs, weights = plain(images)
        few = bool(images[0, -1].isnan().all())
        return (outputs * torch.nan if few else outputs), weights

    asked.network.attended = torn
    found = films.answer(asked)
    assert found.refused == dict.fromkeys(["0/1.2.3.1.dcm", "1/1.2.3.1.dcm"], NOT_NUMBERS)
    assert [row["study_instance_uid"] for row in found.json["studies"]] == ["1.2.3.2", "1.2.3.3"]


def test_a_report_has_the_study_s_decision_and_the_images_that_were_seen(
    films: Any, model: Any
) -> None:
    asked = model()
    found = films.answer(asked, additions=(Reports(asked.package),))
    reports = {
        str(one.StudyInstanceUID): one for one in map(highdicom.sr.srread, found.files("sr"))
    }
    assert len(reports) == 3
    for row in found.json["studies"]:
        report = reports[row["study_instance_uid"]]
        assert isinstance(report.content, highdicom.sr.MeasurementReport)
        (group,) = report.content.get_image_measurement_groups()
        values = {m.name.meaning: float(m.value) for m in group.get_measurements()}
        expected = row["raw_probability"]["finding"]
        assert values["Probability, not calibrated: finding"] == pytest.approx(expected)
        (decided,) = (
            getattr(one.value, "meaning", None)
            for one in group.get_qualitative_evaluations()
            if one.name.meaning == "Class that the model decided for"
        )
        assert decided == row["model_decision"]
        uids = {one.referenced_sop_instance_uid for one in group.source_images}
        mine = [
            r for r in found.json["images"] if r["study_instance_uid"] == report.StudyInstanceUID
        ]
        assert uids == {r["sop_instance_uid"] for r in mine if r["seen"]}


def test_each_image_that_was_seen_has_a_picture_of_what_moved_the_decision(
    films: Any, model: Any
) -> None:
    asked = model()
    found = films.answer(asked, pictures=Explainer(asked))
    studies = {row["study_instance_uid"]: row for row in found.json["studies"]}
    for row in found.json["images"]:
        assert ("explanation" in row) == row["seen"]
        if row["seen"]:
            picture = np.asarray(Image.open(found.folder / row["explanation"]))
            assert picture.shape[1] > 2 * picture.shape[0]
            assert row["explains"] == studies[row["study_instance_uid"]]["model_decision"]
    said = found.json["explained"]
    assert set(said) == {"grad-cam", "integrated-gradients"}
    assert all((each["images"], each["patients"]) == (8, 3) for each in said.values())


def test_a_study_that_is_more_than_can_be_held_is_refused(
    films: Any, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = model()
    each = int(np.prod(asked.package.spec.input.shape)) * 2
    limits = Order(asked, films.hospital.folder, films.hospital.place / "x").reader.limits
    monkeypatch.setattr(type(limits), "stored_bytes", 3 * each)
    monkeypatch.setattr(
        type(limits).__init__, "__defaults__",
        (limits.frame_samples, limits.samples, 3 * each, limits.read_bytes),
    )  # fmt: skip
    found = films.answer(asked)
    assert len(found.json["studies"]) == 2
    assert set(found.refused.values()) == {"its study has 5 images, more than are held at once"}
    assert len(found.refused) == 5


def test_images_of_two_modalities_go_to_their_encoders_as_those_of_a_cohort_do(
    clinic: Any, model: Any
) -> None:
    """A study of both, one of one alone, and one of neither, which has no answer."""
    generator = np.random.default_rng(6)
    kinds = {"1.2.3.1": "CCDDDC", "1.2.3.2": "DD", "1.2.3.3": "M"}
    names = {"C": "CR", "D": "DX", "M": "MG"}
    for study, of in kinds.items():
        for number, kind in enumerate(of):
            clinic.hospital.film(
                f"{study}.{number}.dcm",
                generator.integers(0, 4096, (20, 30), dtype=np.uint16),
                StudyInstanceUID=study,
                PatientID=f"P{study[-1]}",
                InstanceNumber=number + 1,
                Modality=names[kind],
            )
    seen = {"images": 3, "modalities": ["DX", "CR"]}
    asked = model(input=seen)
    labels = clinic.hospital.labels({f"P{number}": "normal" for number in (1, 2, 3)})
    cohort = clinic.hospital.take_in(labels, input=seen).cohort
    rows = rows_for(asked.package.spec, cohort)
    with torch.no_grad():
        images = torch.from_numpy(rows.images(np.arange(len(rows))))
        inputs = normalise(images, asked.package.spec.input)
        expected = torch.sigmoid(asked.package.network()(inputs)[:, 0]).tolist()
    found = clinic.answer(asked, additions=(Reports(asked.package),))
    said = [row["raw_probability"]["finding"] for row in found.json["studies"]]
    assert sorted(said) == pytest.approx(sorted(expected), abs=2e-6)
    assert len(set(said)) == 2
    assert found.refused == {"1.2.3.3.0.dcm": "no image of its study is of DX, CR"}
    lacks = NOT_THERE.format("CR")
    assert {
        row["study_instance_uid"]: lacks in row["caveats"] for row in found.json["studies"]
    } == {
        "1.2.3.1": False,
        "1.2.3.2": True,
    }
    reports = [dcmread(path) for path in found.files("sr")]
    told = {
        report.StudyInstanceUID: any(lacks in str(element.value) for element in report.iterall())
        for report in reports
    }
    assert told == {"1.2.3.1": False, "1.2.3.2": True}
    mine = [row for row in found.json["images"] if row["study_instance_uid"] == "1.2.3.1"]
    for name in ("CR", "DX"):
        weights = [row["attention"] for row in mine if row["modality"] == name]
        assert sum(weights) == pytest.approx(1, abs=1e-5)
    with pytest.raises(ConfigError, match="cannot be explained"):
        Explainer(asked)


@pytest.mark.filterwarnings("ignore:Invalid value for VR CS")
def test_a_modality_that_a_device_writes_small_is_the_same(clinic: Any, model: Any) -> None:
    values = np.random.default_rng(7).integers(0, 4096, (20, 30), dtype=np.uint16)
    for name in ("DX", "dx"):
        patient = {"StudyInstanceUID": f"1.2.{len(name)}{ord(name[0])}", "PatientID": name}
        for kind in ("CR", name):
            clinic.hospital.film(f"{name}{kind}.dcm", values, Modality=kind, **patient)
    found = clinic.answer(model(input={"images": 3, "modalities": ["DX", "CR"]}))
    one, other = found.json["studies"]
    assert one["raw_probability"] == other["raw_probability"]
    assert [row["modality"] for row in found.json["images"]].count("DX") == 2
    assert not found.refused
