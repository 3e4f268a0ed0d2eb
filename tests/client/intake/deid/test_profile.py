"""A profile: what its options allow together, what they forbid, and what each does to a row."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError
from pydicom.tag import Tag

from client.intake.deid.profile import PrivateElement, Profile, parse_profile
from client.intake.deid.table import Action, standard_table
from common.errors import ConfigError

SAFE = "(0019,xx0C) SIEMENS MR HEADER"


def action(keyword: str, **chosen: Any) -> Action:
    row = standard_table().find(Tag(keyword))
    assert row is not None
    return Profile(**chosen).action(row)


@pytest.mark.parametrize(
    ("keyword", "chosen", "expected"),
    [
        ("PatientName", {}, Action.EMPTY),
        ("PatientAge", {}, Action.REMOVE),
        ("PatientAge", {"retain_patient_characteristics": True}, Action.KEEP),
        ("Allergies", {"retain_patient_characteristics": True}, Action.CLEAN),
        ("StudyDescription", {}, Action.REMOVE),
        ("StudyDescription", {"clean_descriptors": True}, Action.CLEAN),
        ("StudyDate", {}, Action.EMPTY),
        ("StudyDate", {"dates": "modified"}, Action.CLEAN),
        ("StudyDate", {"dates": "full"}, Action.KEEP),
        ("PatientBirthDate", {"dates": "full"}, Action.EMPTY),
        ("ContentDate", {}, Action.DUMMY),
        ("StudyInstanceUID", {}, Action.REPLACE_UID),
        ("StudyInstanceUID", {"retain_uids": True, "dates": "full"}, Action.KEEP),
        ("StationName", {"retain_device_identity": True}, Action.KEEP),
        ("InstitutionName", {"retain_institution_identity": True}, Action.KEEP),
        ("InstitutionName", {"retain_device_identity": True}, Action.DUMMY),
        ("ContentSequence", {}, Action.DUMMY),
        ("ContentSequence", {"clean_structured_content": True}, Action.CLEAN),
        ("GraphicAnnotationSequence", {"clean_graphics": True}, Action.CLEAN),
        ("ReferencedImageSequence", {}, Action.REPLACE_UID),
        ("ReferencedStudySequence", {}, Action.REMOVE),
    ],
)
def test_what_a_profile_does_to_an_attribute(
    keyword: str, chosen: dict[str, Any], expected: Action
) -> None:
    assert action(keyword, **chosen) == expected


@pytest.mark.parametrize(
    ("dates", "expected"),
    [("removed", Action.DUMMY), ("modified", Action.CLEAN), ("full", Action.KEEP)],
)
def test_only_the_date_options_let_a_date_through(dates: Any, expected: Action) -> None:
    """A treatment's date and time is in the column of device identities too."""
    assert (
        action("BeamHoldTransitionDateTime", dates=dates, retain_device_identity=True) == expected
    )


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ({"retain_uids": True}, "expected dates = 'full' beside it"),
        ({"retain_uids": True, "dates": "modified"}, "expected dates = 'full' beside it"),
        ({"clean_graphics": True, "clean_pixel_data": False}, "expected both"),
        ({"risky_pixels": "blank", "clean_pixel_data": False}, "nothing would be blanked"),
        ({"retain_safe_private": (SAFE, SAFE)}, "named twice"),
        ({"retain_safe_private": ("(0018,xx0C) SIEMENS",)}, "expected an odd group"),
        ({"retain_safe_private": ("(0019,100C) SIEMENS",)}, "names no private attribute"),
        ({"retain_safe_private": ("(0019,xx0C)",)}, "names no private attribute"),
        ({"dates": "shifted"}, "'removed', 'modified' or 'full'"),
        ({"keep_everything": True}, "Extra inputs are not permitted"),
    ],
)
def test_what_a_profile_forbids(chosen: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Profile(**chosen)


def test_a_hospital_writes_it_in_toml() -> None:
    text = f"""
    dates = "modified"
    retain_patient_characteristics = true
    retain_safe_private = ['{SAFE}']
    faces = "keep"
    """

    profile = parse_profile(text, source="node.toml")
    assert parse_profile(f"[intake.profile]\n{text}", source="node.toml") == profile

    assert profile.options == {"modified_dates", "patient", "safe_private"}
    assert profile.safe_private == {PrivateElement(0x0019, 0x0C, "SIEMENS MR HEADER")}
    assert profile.digest != Profile().digest


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("dates = shifted", "node.toml: this is not TOML"),
        (
            'dates = "shifted"',
            r"node.toml: dates = 'shifted': input should be 'removed', 'modified'",
        ),
        ("faces = true\ndates = 3", r"(?s)node.toml: dates = 3: .*node.toml: faces = True"),
        ("[intake.profile]\nface = 1", "node.toml: intake.profile.face = 1: unknown key"),
        ("intake = 3", "node.toml: intake = 3"),
        ("[intake]\nprofile = 3", "node.toml: intake.profile = 3"),
        ("retain_uids = true", r"^node.toml: retain_uids .* expected dates = 'full' beside it"),
    ],
)
def test_a_mistake_is_named_with_file_key_and_value(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_profile(text, source="node.toml")


def test_its_codes_say_what_is_done() -> None:
    everything = Profile(
        dates="full",
        retain_patient_characteristics=True,
        retain_device_identity=True,
        retain_institution_identity=True,
        retain_uids=True,
        retain_safe_private=(SAFE,),
        clean_descriptors=True,
        clean_structured_content=True,
        clean_graphics=True,
    )

    assert [value for value, _ in Profile(clean_pixel_data=False).codes] == ["113100"]
    assert [value for value, _ in Profile(dates="modified").codes] == ["113100", "113101", "113107"]
    assert len(everything.codes) == 11
    assert all(len(meaning) <= 64 for _, meaning in everything.codes)


def test_nothing_is_kept_unless_it_is_asked_for() -> None:
    assert Profile().options == set()
    kept = {Action.KEEP, Action.CLEAN}
    assert not [row for row in standard_table().rows if Profile().action(row) in kept]


def test_it_is_frozen() -> None:
    with pytest.raises(ValidationError):
        setattr(Profile(), "faces", "keep")  # noqa: B010
