"""Images of the modalities that a run asks for: by their header, by a table, and all others."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from client.intake.keys import SiteKey
from client.intake.medmnist import MedMnist
from client.intake.pictures import Pictures
from client.intake.run import IntakeSummary, intake
from client.intake.summary import summarise
from common.cohort import Cohort
from common.errors import ConfigError, IntakeError
from common.spec import RunSpec

TWO = {"height": 16, "width": 16, "modalities": ["CT", "MR"]}
VIEWS = {"height": 16, "width": 16, "modalities": ["FRONTAL", "LATERAL"]}


def reasons(summary: IntakeSummary) -> list[str]:
    return sorted(item.reason for item in summary.not_used)


# --- DICOM ---------------------------------------------------------------------------------------


def test_a_file_says_its_modality_and_one_that_is_not_asked_for_is_not_used(hospital: Any) -> None:
    for name, patient, modality in (
        ("a.dcm", "P1", "CT"),
        ("b.dcm", "P1", "MR"),
        ("c.dcm", "P2", "MR"),
        ("d.dcm", "P2", "CR"),
    ):
        hospital.film(name, PatientID=patient, Modality=modality)
    taken = hospital.take_in(hospital.labels({"P1": "normal", "P2": "finding"}), input=TWO)
    assert sorted(taken.cohort.modalities) == ["CT", "MR", "MR"]
    assert taken.cohort.meta.modalities == ("CT", "MR")
    assert reasons(taken.summary) == ["its modality is none of CT, MR (input.modalities)"]
    taken.cohort.check_fits(hospital.make_spec(input=TWO | {"images": 3}))


def test_where_none_is_asked_for_none_is_kept(hospital: Any) -> None:
    hospital.film("a.dcm", PatientID="P1", Modality="CT")
    taken = hospital.take_in(hospital.labels({"P1": "normal"}))
    assert taken.cohort.modalities.tolist() == [""]
    assert taken.cohort.meta.modalities == ()


def test_a_table_of_images_says_what_their_headers_do_not(hospital: Any) -> None:
    """A frontal and a lateral film are both CR; the table knows."""
    one = hospital.film("a.dcm", PatientID="P1", SOPInstanceUID="1.2.3.1")
    hospital.film("b.dcm", PatientID="P1", SOPInstanceUID="1.2.3.2")
    hospital.film("c.dcm", PatientID="P2", SOPInstanceUID="1.2.3.3")
    assert one.is_file()
    table = hospital.place / "labels.csv"
    table.write_text(
        "SOPInstanceUID,label,modality\n1.2.3.1,normal,FRONTAL\n1.2.3.2,normal,LATERAL\n"
        "1.2.3.3,finding,\n"
    )
    taken = hospital.take_in(table, input=VIEWS)
    assert sorted(taken.cohort.modalities) == ["FRONTAL", "LATERAL"]
    assert reasons(taken.summary)[0].startswith("its modality is none of FRONTAL, LATERAL")


def test_a_table_of_patients_does_not_say_how_each_image_was_made(hospital: Any) -> None:
    hospital.film("a.dcm", PatientID="P1", Modality="CT")
    hospital.film("b.dcm", PatientID="P1", Modality="MR")
    table = hospital.place / "labels.csv"
    table.write_text("PatientID,label,modality\nP1,normal,MR\n")
    assert sorted(hospital.take_in(table, input=TWO).cohort.modalities) == ["CT", "MR"]


def test_an_intake_for_other_modalities_is_another_intake(hospital: Any) -> None:
    hospital.film("a.dcm", PatientID="P1", Modality="CT")
    labels = hospital.labels({"P1": "normal"})
    hospital.take_in(labels, input=TWO)
    with pytest.raises(ConfigError, match="not that of the intake's first start"):
        hospital.take_in(labels, input=TWO | {"modalities": ["CT"]})


# --- Pictures, and what names none ---------------------------------------------------------------


@pytest.fixture
def take(tmp_path: Path, make_spec: Callable[..., RunSpec]) -> Callable[..., Any]:
    def take(csv: str) -> tuple[Cohort, IntakeSummary]:
        (tmp_path / "pictures").mkdir()
        for line in csv.splitlines()[1:]:
            pixels = np.random.default_rng(len(line)).integers(0, 255, (16, 16), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "pictures" / line.split(",")[0])
        (tmp_path / "labels.csv").write_text(csv)
        run = make_spec(input=VIEWS)
        key = SiteKey.random()
        source = Pictures.of(tmp_path / "pictures", tmp_path / "labels.csv", run, key)
        summary = intake(source, tmp_path / "cohort", run)
        return Cohort.open(tmp_path / "cohort"), summary

    return take


def test_pictures_are_of_the_modality_in_their_line(take: Any) -> None:
    cohort, summary = take(
        "file,label,patient,modality\na.png,normal,P1,FRONTAL\nb.png,normal,P1,LATERAL\n"
        "c.png,finding,P2,FRONTAL\nd.png,finding,P2,OBLIQUE\ne.png,finding,P2,\n"
    )
    assert sorted(cohort.modalities) == ["FRONTAL", "FRONTAL", "LATERAL"]
    assert len(cohort.patients) == 2
    assert reasons(summary) == [
        "its modality is none of FRONTAL, LATERAL (input.modalities)",
        "nothing says its modality; expected one of FRONTAL, LATERAL (input.modalities)",
    ]
    assert summary.contents.modalities == {"FRONTAL": 2, "LATERAL": 1}


def test_a_table_without_modalities_is_refused_before_anything_is_written(
    take: Any, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=r"labels.csv: names no modality.*FRONTAL or LATERAL"):
        take("file,label,patient\na.png,normal,P1\n")
    assert not (tmp_path / "cohort").exists()


def test_one_picture_has_one_modality(take: Any) -> None:
    with pytest.raises(ConfigError, match=r"labels.csv:3: file 'a.png' has another modality"):
        take("file,label,patient,modality\na.png,normal,P1,FRONTAL\na.png,normal,P1,LATERAL\n")


def test_a_file_that_names_no_modality_is_no_source(
    make_spec: Callable[..., RunSpec], tmp_path: Path
) -> None:
    with pytest.raises(IntakeError, match=r"names no modality.*cloister intake pictures"):
        MedMnist(tmp_path / "some.npz", make_spec(input=VIEWS), SiteKey.random())


def test_a_cohort_without_any_image_of_one_modality_says_so(
    make_spec: Callable[..., RunSpec], write_cohort: Any
) -> None:
    cohort = write_cohort(make_spec(input=TWO), [0, 1], labels=[0, 1], modalities=["CT", "CT"])
    assert "No image of the modality 'MR'." in summarise(cohort).warnings
