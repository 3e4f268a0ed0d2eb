"""For which images a model is meant: what a header says of the body, and what is no image."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydicom.dataset import Dataset
from pydicom.sr._concepts_dict import concepts
from pydicom.sr.codedict import codes
from pydicom.sr.coding import Code
from pydicom.uid import EnhancedCTImageStorage

from client.prediction.anatomy import PARTS, body_parts
from client.prediction.reading import TWO_PARTS
from client.prediction.rows import PARTLY

CONCEPTS: Any = concepts
CHEST, LIVER = codes.SCT.Chest, codes.SCT.Liver


def region(*found: Code) -> list[Dataset]:
    items = []
    for code in found:
        item = Dataset()
        item.CodeValue, item.CodeMeaning = code.value, code.meaning
        item.CodingSchemeDesignator = code.scheme_designator
        items.append(item)
    return items


SAID: list[tuple[dict[str, Any], tuple[str, ...]]] = [
    ({"BodyPartExamined": "Chest"}, ("CHEST",)),
    ({"BodyPartExamined": "HAND", "AnatomicRegionSequence": region(CHEST)}, ("HAND",)),
    ({"BodyPartExamined": "", "AnatomicRegionSequence": region(CHEST)}, ("CHEST",)),
    ({"AnatomicRegionSequence": region(LIVER, CHEST, LIVER)}, ("LIVER", "CHEST")),
    ({"AnatomicRegionSequence": region(Code("T-D3000", "SRT", "Chest"))}, ("CHEST",)),
    ({"AnatomicRegionSequence": region(Code("T-62000", "SNM3", "Liver"))}, ("LIVER",)),
    ({"AnatomicRegionSequence": region(Code("51185008", "SCT", "Chest"))}, ("CHEST",)),
    ({"AnatomicRegionSequence": region(Code("51185008", "99LOCAL", "Chest"))}, ()),
    ({"AnatomicRegionSequence": region(Code("1", "SCT", "Chest"))}, ()),
    ({"AnatomicRegionSequence": []}, ()),
    ({}, ()),
]


@pytest.mark.parametrize(("attributes", "expected"), SAID, ids=lambda value: str(value)[:40])
def test_a_header_names_the_body_by_a_word_or_by_codes(
    attributes: dict[str, Any], expected: tuple[str, ...]
) -> None:
    header = Dataset()
    for keyword, value in attributes.items():
        setattr(header, keyword, value)
    assert body_parts(header) == expected


def test_an_enhanced_object_names_it_in_its_functional_groups() -> None:
    header, group, anatomy = Dataset(), Dataset(), Dataset()
    anatomy.AnatomicRegionSequence = region(LIVER)
    group.FrameAnatomySequence = [anatomy]
    header.SharedFunctionalGroupsSequence = [group]
    assert body_parts(header) == ("LIVER",)


HEAD = Code("69536005", "SCT", "Head")
CT = {"SOPClassUID": EnhancedCTImageStorage, "Modality": "CT", "RescaleIntercept": 0,
      "RescaleSlope": 1, "ImageType": ["ORIGINAL", "PRIMARY", "VOLUME", "NONE"]}  # fmt: skip


def enhanced(clinic: Any, *codes: Code | None, **attributes: Any) -> None:
    """An enhanced CT, of whose frames each has the anatomy of its own that is given, or none."""
    frames = []
    for code in codes:
        group, anatomy = Dataset(), Dataset()
        if code is not None:
            anatomy.AnatomicRegionSequence = region(code)
            group.FrameAnatomySequence = [anatomy]
        frames.append(group)
    values = np.random.default_rng(4).integers(0, 4096, (len(codes), 20, 30), dtype=np.uint16)
    made = {**CT, "NumberOfFrames": len(codes), "PerFrameFunctionalGroupsSequence": frames}
    made |= {"Rows": 20, "Columns": 30}
    clinic.hospital.film("e.dcm", values, **made | attributes)


JUDGED: list[tuple[tuple[Code | None, ...], str, list[int], str]] = [
    ((HEAD, CHEST), "", [2], "frame 1 is 'HEAD'; the model is meant for CHEST"),
    ((HEAD, CHEST, LIVER, HEAD), "CHEST", [2], "frames 1, 3-4 is 'HEAD', 'LIVER'; the model"),
    ((None, CHEST), "", [2], "frame 1 is not given"),
    ((HEAD, None), "CHEST", [2], "frame 1 is 'HEAD'"),
    ((CHEST, CHEST), "HEAD", [1, 2], ""),
    ((HEAD, HEAD), "CHEST", [], "its body part is 'HEAD'; the model is meant for CHEST"),
]


@pytest.mark.parametrize(("codes", "word", "answered", "reason"), JUDGED)
def test_a_frame_that_says_what_it_shows_is_judged_by_that(
    clinic: Any, codes: tuple[Code | None, ...], word: str, answered: list[int], reason: str
) -> None:
    enhanced(clinic, *codes, BodyPartExamined=word)
    asked = clinic.model(use={"body_parts": ["CHEST"]}, input={"frames": "all"})
    found = clinic.answer(asked)
    rows = found.json["images"]
    assert [row["frame"] for row in rows] == answered
    assert reason in found.refused.get("e.dcm", "")
    assert bool(reason) == bool(found.refused)
    for row in rows:
        alone = codes[row["frame"] - 1] is None
        assert (TWO_PARTS in row["caveats"]) == (word == "HEAD" and not alone)
    if rows and reason:
        assert PARTLY.format(1) in found.json["studies"][0]["caveats"]
    plain = clinic.answer(clinic.model(input={"frames": "all"}), "plain")
    assert len(plain.json["images"]) == len(codes)


def test_the_one_frame_that_is_taken_has_to_be_of_the_part(clinic: Any) -> None:
    enhanced(clinic, CHEST, HEAD, CHEST)
    use = {"body_parts": ["CHEST"]}
    found = clinic.answer(clinic.model(use=use, input={"frames": "middle"}))
    assert "frame 2 is 'HEAD'" in found.refused["e.dcm"]
    assert clinic.answer(clinic.model(use=use, input={"frames": "first"}), "first").refused == {}


def test_a_word_and_a_code_that_disagree_are_said(clinic: Any) -> None:
    said = {"a": [HEAD], "b": [CHEST, HEAD], "c": []}
    for name, codes_of in said.items():
        of = region(*codes_of)
        clinic.hospital.film(f"{name}.dcm", BodyPartExamined="CHEST", AnatomicRegionSequence=of)
    found = clinic.answer(clinic.model(use={"body_parts": ["CHEST"]}))
    caveats = {row["file"]: row["caveats"] for row in found.json["images"]}
    assert {name: TWO_PARTS in said for name, said in caveats.items()} == {
        "a.dcm": True,
        "b.dcm": False,
        "c.dcm": False,
    }


WORDS = {"CSPINE": "cervical", "TSPINE": "thoracic", "LSPINE": "lumbar", "CHEST": "thora",
         "WHOLEBODY": "body", "SSPINE": "sacrum", "HIP": "hip", "CALF": "calf"}  # fmt: skip


@pytest.mark.parametrize("code", [code for code, part in PARTS.items() if part in WORDS])
def test_the_table_says_of_a_code_what_the_standard_s_name_for_it_says(code: str) -> None:
    named = [names for of in CONCEPTS["SCT"].values() for key, names in of.items() if key == code]
    assert WORDS[PARTS[code]] in str(named).lower()


def test_every_code_of_the_table_is_one_of_the_standard_s() -> None:
    known = {code for of in CONCEPTS["SCT"].values() for code in of}
    assert set(PARTS) <= known
    assert all(len(part) <= 16 and part == part.upper() for part in PARTS.values())


def test_a_model_for_the_chest_takes_what_says_so_by_a_code_and_refuses_the_rest(
    clinic: Any,
) -> None:
    clinic.hospital.film("word.dcm", BodyPartExamined="CHEST")
    clinic.hospital.film("code.dcm", AnatomicRegionSequence=region(CHEST))
    clinic.hospital.film("liver.dcm", AnatomicRegionSequence=region(LIVER))
    clinic.hospital.film("none.dcm")
    found = clinic.answer(clinic.model(use={"body_parts": ["CHEST"]}))
    assert {row["file"] for row in found.json["images"]} == {"word.dcm", "code.dcm"}
    assert "its body part is not given" in found.refused["none.dcm"]
    assert "the model is meant for CHEST" in found.refused["liver.dcm"]


NO_IMAGES = [
    ("seg_image_ct_binary.dcm", "it is a segmentation, no picture of a patient"),
    ("seg_image_sm_control_labelmap.dcm", "it is a label map segmentation, no picture"),
    ("sr_document.dcm", "its SOP class is"),
]


@pytest.mark.parametrize("changes", [{}, {"input": {"images": 2}}, "volumes"])
@pytest.mark.parametrize(("name", "reason"), NO_IMAGES)
def test_what_was_drawn_upon_images_is_none(
    clinic: Any, shared_data: Path, name: str, reason: str, changes: Any
) -> None:
    """Real objects of many frames beside a film: refused by name, and the film is answered."""
    if changes == "volumes":
        changes = {
            "task": {"name": "segmentation", "kind": "mask", "classes": ["a", "b"]},
            "model": {"name": "unet", "width": 4}, "loss": {"name": "dice"},
            "evaluation": {"metric": "dice"},
            "input": {"height": 32, "width": 32, "depth": 32, "spacing": [1, 1, 1],
                      "direction": "axial"},
        }  # fmt: skip
    shutil.copy(shared_data / "dicom" / "highdicom" / name, clinic.hospital.folder / name)
    clinic.hospital.film("film.dcm")
    found = clinic.answer(clinic.model(**changes))
    assert reason in found.refused[name]
    assert name not in {row["file"] for row in found.json["images"]}
    assert len(found.json["images"]) == ("depth" not in changes.get("input", {}))
