"""What waits for a person: classes that are no images, likely text, and faces."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from pydicom.dataset import Dataset, FileDataset
from pydicom.sequence import Sequence
from pydicom.uid import UID

from client.intake.deid.burned_in import Box, risk_of, ultrasound_regions
from client.intake.deid.classes import ALLOWED
from client.intake.deid.faces import shows_face
from client.intake.quiet import quiet
from common.errors import IntakeError

Film = Callable[..., FileDataset]
Clean = Callable[..., Any]
STORAGE = "1.2.840.10008.5.1.4.1.1."


def region(*corners: int) -> Dataset:
    made = Dataset()
    for name, corner in zip(("MinX0", "MinY0", "MaxX1", "MaxY1"), corners, strict=True):
        setattr(made, f"RegionLocation{name}", corner)
    return made


def test_every_allowed_class_is_the_standards() -> None:
    for uid in ALLOWED:
        name = UID(uid).name
        assert "Storage" in name, uid
        assert not any(word in name for word in ("SR", "PDF", "Presentation State", "Video", "RT "))


@pytest.mark.parametrize(
    ("attributes", "reason"),
    [
        ({"BurnedInAnnotation": "YES"}, "says that it has burned-in annotation"),
        ({"BurnedInAnnotation": "Yes"}, "says that it has burned-in annotation"),
        ({"SOPClassUID": f"{STORAGE}7"}, "secondary capture"),
        ({"SOPClassUID": f"{STORAGE}7.4"}, "secondary capture"),
        ({"ConversionType": "SD"}, "converted from a screen"),
        ({"Modality": "OT"}, "its modality"),
        ({"ImageType": ["DERIVED", "SECONDARY", "SCREEN SAVE"]}, "its image type"),
        ({"ImageType": ["DERIVED", "SECONDARY", "OTHER", "CT_SOM5 PROT"]}, "its image type"),
        ({"SpecimenLabelInImage": "YES"}, "label of a specimen"),
        ({"SOPClassUID": f"{STORAGE}6.1", "Modality": "US"}, "without regions"),
        ({"BurnedInAnnotation": "NO"}, ""),
        ({"ImageType": ["DERIVED", "SECONDARY", "MPR"]}, ""),
    ],
)
def test_where_text_is_likely(
    film: Film, clean: Clean, attributes: dict[str, Any], reason: str
) -> None:
    with quiet():
        header = film(**attributes)

    assert reason in risk_of(header)
    assert bool(reason) == bool(risk_of(header))
    if reason:
        with pytest.raises(IntakeError, match="a person has to look at it"):
            clean(header)
    assert clean(header, risky_pixels="blank").again.BurnedInAnnotation == "NO"


def test_regions_are_held_within_the_image(film: Film) -> None:
    regions = [region(0, 0, 9, 9), region(5, 5, 99, 99), region(50, 50, 60, 60), Dataset()]
    header = film(SOPClassUID=f"{STORAGE}6.1", SequenceOfUltrasoundRegions=Sequence(regions))

    assert list(ultrasound_regions(header, 20, 30)) == [Box(0, 0, 10, 10), Box(5, 5, 20, 30)]


@pytest.mark.parametrize("modality", ["CT", "MR", "PT"])
@pytest.mark.parametrize(
    ("keyword", "value"),
    [
        ("BodyPartExamined", "HEAD"),
        ("StudyDescription", "MRT Schädel nativ"),
        ("SeriesDescription", "t1_mprage_sag"),
        ("ProtocolName", "02_brain_routine"),
        ("ReceiveCoilName", "8HRBRAIN"),
        ("StudyDescription", "PET/CT whole-body"),
        ("SeriesDescription", "NNH"),
    ],
)
def test_a_head_is_recognised(
    film: Film, clean: Clean, modality: str, keyword: str, value: str
) -> None:
    header = film(SOPClassUID=f"{STORAGE}4", Modality=modality, **{keyword: value})

    assert shows_face(header)
    with pytest.raises(IntakeError, match=r"faces = 'keep' in the profile would take it"):
        clean(header)
    assert clean(header, faces="keep").again.RecognizableVisualFeatures == "YES"


def test_a_head_in_the_groups_of_an_enhanced_object(film: Film) -> None:
    anatomy, frame, code = Dataset(), Dataset(), Dataset()
    code.CodeMeaning = "Head"
    anatomy.AnatomicRegionSequence = Sequence([code])
    frame.FrameAnatomySequence = Sequence([anatomy])

    assert shows_face(film(Modality="MR", SharedFunctionalGroupsSequence=Sequence([frame])))


def _segments(label: str) -> Dataset:
    """A segmentation of one segment that is called so."""
    segment, made = Dataset(), Dataset()
    segment.SegmentLabel, made.SegmentSequence = label, Sequence([segment])
    return made


@pytest.mark.parametrize(
    "label",
    [
        "Eyes", "Eye_L", "eye_right", "EyeL", "LEye", "Eyeball left", "Parotid_L", "ParotidRight",
        "Lens_R", "lens 2", "Lens opacity", "OpticChiasm", "Optic_Nerve_L", "OpticNrv_R",
        "Cochlea_R", "Tongue", "Teeth", "Tooth38", "Cavity_Oral", "Glnd_Submand_L", "Auge",
        "Zähne", "Hippocampus", "Left-Hippocampus", "WhiteMatter", "Brainstem", "BrainStem",
    ],
)  # fmt: skip
def test_a_head_is_recognised_by_what_is_drawn_in_it(film: Film, label: str) -> None:
    chest = film(Modality="CT", BodyPartExamined="CHEST")
    assert shows_face(chest, [_segments("Liver"), _segments(label)])


@pytest.mark.parametrize(
    "label",
    [
        "Liver", "Eyelet", "Lensing", "Optical depth", "Hip_L", "Ellipse", "Lipoma", "Lingula",
        "Kidney_L", "Tumour2", "RetinaculumFlexorum", "Caudate lobe", "Left ventricle", "Augmented",
        "LungLowerLobe", "SpinalCanal", "Renal cortex", "Pancreas", "GTV1", "",
    ],
)  # fmt: skip
def test_what_is_drawn_elsewhere_is_no_head(film: Film, label: str) -> None:
    assert not shows_face(film(Modality="CT", BodyPartExamined="CHEST"), [_segments(label)])


@pytest.mark.parametrize(
    "attributes",
    [
        {"Modality": "CR", "BodyPartExamined": "SKULL"},
        {"Modality": "CT", "BodyPartExamined": "CHEST"},
        {"Modality": "CT", "StudyDescription": "abdomen, year 2, early phase"},
        {"Modality": "MR"},
    ],
)
def test_what_is_no_head(film: Film, attributes: dict[str, Any]) -> None:
    assert not shows_face(film(**attributes))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"SOPClassUID": f"{STORAGE}7"}, "it is a secondary capture"),
        ({"SOPClassUID": f"{STORAGE}77.1.4"}, "its SOP class is 'VL Photographic Image Storage'"),
        ({"Modality": "CT", "BodyPartExamined": "BRAIN"}, "it is a slice of a head"),
        ({"BurnedInAnnotation": "YES"}, "burned-in annotation"),
    ],
)
def test_a_folder_is_taken_in_by_the_same_rules(
    hospital: Any, changes: dict[str, Any], reason: str
) -> None:
    hospital.film("fine")
    hospital.film("not", **changes)

    taken = hospital.take_in(hospital.labels({"P1": "normal"}))

    assert len(taken.cohort) == 1
    assert reason in taken.reasons["not"]
