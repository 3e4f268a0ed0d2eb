"""What the engine keeps, what it makes anew, and that the same patient stays the same."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from datetime import date
from io import BytesIO
from typing import Any

import pytest
from pydicom.dataelem import RawDataElement
from pydicom.dataset import Dataset, FileDataset
from pydicom.sequence import Sequence
from pydicom.tag import Tag
from pydicom.uid import UID

from client.intake.deid.engine import Engine
from client.intake.deid.profile import Profile
from client.intake.deid.save import save
from client.intake.keys import MOST_SHIFTED, SiteKey
from common.errors import IntakeError

Film = Callable[..., FileDataset]
Clean = Callable[..., Any]


def day(text: str) -> date:
    return date(int(text[:4]), int(text[4:6]), int(text[6:]))


def item(**attributes: Any) -> Dataset:
    made = Dataset()
    for keyword, value in attributes.items():
        setattr(made, keyword, value)
    return made


def test_it_says_what_was_done(film: Film, clean: Clean) -> None:
    again = clean(film(BurnedInAnnotation=None), dates="modified").again

    assert again.PatientIdentityRemoved == "YES"
    assert again.DeidentificationMethod[:2] == ["Cloister", "PS3.15 annex E"]
    codes = [code.CodeValue for code in again.DeidentificationMethodCodeSequence]
    assert codes == ["113100", "113101", "113107"]
    assert again.BurnedInAnnotation == "NO"
    assert again.LongitudinalTemporalInformationModified == "MODIFIED"


@pytest.mark.parametrize(
    ("dates", "word"), [("removed", "REMOVED"), ("full", "UNMODIFIED"), ("modified", "MODIFIED")]
)
def test_it_says_what_became_of_dates(film: Film, clean: Clean, dates: str, word: str) -> None:
    assert clean(film(), dates=dates).again.LongitudinalTemporalInformationModified == word


def test_one_shift_for_all_dates_of_a_patient(film: Film, clean: Clean, engine: Engine) -> None:
    first = film(StudyDate="20230101", AcquisitionDateTime="20230103101530.250000+0100")
    second = film(StudyDate="20231231", StudyTime="101530")
    other = film(StudyDate="20230101", PatientID="P2")

    one, two, three = (clean(made, dates="modified").again for made in (first, second, other))

    shift = (day(one.StudyDate) - date(2023, 1, 1)).days
    assert shift == engine.key.date_shift("", "P1")
    assert 0 < abs(shift) <= MOST_SHIFTED
    assert (day(two.StudyDate) - day(one.StudyDate)).days == 364
    assert two.StudyTime == "101530"
    assert (day(one.AcquisitionDateTime[:8]) - day(one.StudyDate)).days == 2
    assert one.AcquisitionDateTime[8:] == "101530.250000+0100"
    assert three.StudyDate != one.StudyDate


def test_a_date_that_is_none_goes_as_in_basic(film: Film, clean: Clean) -> None:
    made = film()
    made.add_new("StudyDate", "LO", "the 3rd")
    for dates in ("modified", "full"):
        assert not clean(made, dates=dates).again.StudyDate


def test_the_same_is_the_same_everywhere_and_unlinkable_elsewhere(
    film: Film, clean: Clean, engine: Engine
) -> None:
    uid = "1.2.3.4.5.6.7"
    reference = item(
        ReferencedSOPClassUID="1.2.840.10008.5.1.4.1.1.1", ReferencedSOPInstanceUID=uid
    )
    referring = film(SOPInstanceUID="1.2.9", ReferencedImageSequence=Sequence([reference]))
    elsewhere = dataclasses.replace(engine, key=SiteKey(bytes(32)))

    one, two = clean(film()).again, clean(referring).again
    abroad = clean(film(), elsewhere).again

    assert one.PatientID == two.PatientID == engine.key.pseudonym("patient", "", "P1")
    assert one.StudyInstanceUID == two.StudyInstanceUID
    assert one.SOPInstanceUID.startswith("2.25.")
    kept = two.ReferencedImageSequence[0]
    assert kept.ReferencedSOPInstanceUID == one.SOPInstanceUID
    assert kept.ReferencedSOPClassUID == reference.ReferencedSOPClassUID
    for keyword in ("PatientID", "StudyInstanceUID", "SOPInstanceUID"):
        assert one[keyword].value != abroad[keyword].value


def test_the_issuer_is_part_of_a_patient(film: Film, clean: Clean) -> None:
    north, south = (clean(film(IssuerOfPatientID=name)).again for name in ("North", "South"))

    assert north.PatientID != south.PatientID
    assert "IssuerOfPatientID" not in north


def test_the_same_file_gives_the_same_bytes(film: Film, clean: Clean) -> None:
    assert clean(film()).data == clean(film()).data


@pytest.mark.parametrize("uid", ["\\\\", "1.2\\3.4"])
def test_what_has_no_readable_name_of_its_own_is_refused(
    film: Film, clean: Clean, as_bytes: Any, uid: str
) -> None:
    data = as_bytes(film(SOPInstanceUID="1.2.345"))
    named = data.replace(
        b"\x08\0\x18\0UI\x08\x001.2.345\0", b"\x08\0\x18\0UI\x08\0" + uid.encode().ljust(8, b"\0")
    )
    assert named != data

    with pytest.raises(IntakeError, match="is not readable"):
        clean(named)


def test_a_delimiter_that_stands_where_an_attribute_belongs_goes(
    film: Film, clean: Clean, as_bytes: Any
) -> None:
    data = as_bytes(film(ReceiveCoilName="C"))
    head = b"\x18\0\x50\x12SH\x02\0"
    assert head in data

    again = clean(data.replace(head, b"\xfe\xff\0\xe0" + head[4:])).again

    assert 0xFFFEE000 not in again


def test_file_meta_and_name_are_new(film: Film, clean: Clean) -> None:
    result = clean(film())

    meta = result.again.file_meta
    assert meta.MediaStorageSOPInstanceUID == result.again.SOPInstanceUID
    assert meta.ImplementationVersionName == "CLOISTER_DEID_1"
    assert result.cleaned.name == f"{result.again.SOPInstanceUID}.dcm"
    assert result.data[:128] == bytes(128)


@pytest.mark.parametrize(
    ("keyword", "value", "kept"),
    [
        ("SliceThickness", "1.25", "1.25"),
        ("SliceThickness", "4711081512", None),
        ("InstanceNumber", "17", 17),
        ("InstanceNumber", "4711081", None),
        ("NumberOfPatientRelatedStudies", "3", None),
        ("ScanOptions", ["FS", "MUSTERMANN"], "FS"),
        ("BodyPartExamined", "CHEST", "CHEST"),
        ("BodyPartExamined", "MUSTERMANN", ""),
        ("ImageType", ["ORIGINAL", "PRIMARY", "MUSTERMANN"], ["ORIGINAL", "PRIMARY"]),
        ("ImageType", ["MUSTERMANN"], ["DERIVED", "SECONDARY"]),
        ("Manufacturer", "SIEMENS", "SIEMENS"),
        ("Manufacturer", "Mustermann", "REMOVED"),
        ("ConvolutionKernel", "B30f", "B30f"),
        ("LUTExplanation", "of Mrs Mustermann", "REMOVED"),
        ("ReceiveCoilName", "Mustermann", ""),
    ],
)
def test_what_no_table_names_is_kept_by_its_value(
    film: Film, clean: Clean, keyword: str, value: Any, kept: Any
) -> None:
    assert clean(film(**{keyword: value})).again[keyword].value == kept


def test_codes_have_the_standards_meaning(film: Film, clean: Clean) -> None:
    code = item(CodeValue="T-28000", CodingSchemeDesignator="SRT", CodeMeaning="of Mrs M")
    local = item(CodeValue="17", CodingSchemeDesignator="99LOCAL", CodeMeaning="of Mrs M")

    again = clean(film(AnatomicRegionSequence=Sequence([code, local]))).again

    first, second = again.AnatomicRegionSequence
    assert (first.CodeValue, first.CodeMeaning[:4]) == ("T-28000", "Lung")
    assert (second.CodeValue, second.CodeMeaning) == ("261665006", "Unknown")


def test_unknown_representation_is_read_again(film: Film, clean: Clean) -> None:
    buffer = BytesIO()
    item(ReferencedSOPInstanceUID="1.2.3.4.5.6.7").save_as(
        buffer, implicit_vr=True, little_endian=True, enforce_file_format=False
    )
    data = b"\xfe\xff\x00\xe0" + len(buffer.getvalue()).to_bytes(4, "little") + buffer.getvalue()
    made = film()
    for keyword, value in (("ReferencedImageSequence", data), ("SliceThickness", b"1.25")):
        tag = Tag(keyword)
        made[tag] = RawDataElement(tag, "UN", len(value), value, 0, False, True)

    again = clean(made).again

    assert again.SliceThickness == 1.25
    assert again.ReferencedImageSequence[0].ReferencedSOPInstanceUID == again.SOPInstanceUID


def test_what_an_option_retains_is_well_formed(film: Film, clean: Clean) -> None:
    made = film(PatientAge="094Y", PatientWeight="71.5", PatientSex="F")
    again = clean(made, retain_patient_characteristics=True).again
    assert (again.PatientAge, again.PatientWeight, again.PatientSex) == ("090Y", 71.5, "F")

    made.add_new("PatientAge", "LO", "as old as Mrs M")
    made["PatientAge"].VR = "AS"
    assert not clean(made, retain_patient_characteristics=True).again.PatientAge


def test_descriptors_keep_technical_words_alone(film: Film, clean: Clean) -> None:
    made = film(SeriesDescription="CT Thorax Mustermann 12.08.1964, axial (4711)")

    assert "SeriesDescription" not in clean(made).again
    assert clean(made, clean_descriptors=True).again.SeriesDescription == "CT THORAX AXIAL"

    named = film(SeriesDescription="Carl Philips, Max White: CHEST")
    assert clean(named, clean_descriptors=True).again.SeriesDescription == "CHEST"


def test_institution_device_and_uids_stay_if_wished(film: Film, clean: Clean) -> None:
    made = film(InstitutionName="North", StationName="CT1", DeviceSerialNumber="SN1")

    plain = clean(made).again
    assert plain.InstitutionName == plain.StationName == plain.DeviceSerialNumber == "REMOVED"
    assert clean(made, retain_institution_identity=True).again.InstitutionName == "North"
    assert clean(made, retain_device_identity=True).again.StationName == "CT1"
    kept = clean(made, retain_uids=True, dates="full").again
    assert kept.SOPInstanceUID == made.SOPInstanceUID


def test_safe_private_attributes_by_list_and_nothing_beside_them(film: Film, clean: Clean) -> None:
    made = film()
    block = made.private_block(0x0019, "SIEMENS MR HEADER", create=True)
    block.add_new(0x0C, "IS", "1000")
    block.add_new(0x0D, "LO", "Mustermann")
    made.private_block(0x0019, "SOMEBODY ELSE", create=True).add_new(0x0C, "IS", "4711")

    again = clean(made, retain_safe_private=("(0019,xx0C) SIEMENS MR HEADER",)).again

    private = [element for element in again if element.tag.is_private]
    assert [str(element.value) for element in private] == ["SIEMENS MR HEADER", "1000"]
    assert not [element for element in clean(made).again if element.tag.is_private]


def test_acquisition_context_under_clean_structured_content(film: Film, clean: Clean) -> None:
    name = item(CodeValue="113014", CodingSchemeDesignator="DCM", CodeMeaning="Study")
    context = item(TextValue="Mrs Mustermann", ConceptNameCodeSequence=Sequence([name]))
    made = film(AcquisitionContextSequence=Sequence([context]))

    assert not clean(made).again.AcquisitionContextSequence
    (kept,) = clean(made, clean_structured_content=True).again.AcquisitionContextSequence
    assert kept.TextValue == "REMOVED"
    assert kept.ConceptNameCodeSequence[0].CodeMeaning == "Study"


def test_the_account_counts_and_quotes_nothing(film: Film, clean: Clean) -> None:
    made = film(PatientName="Mustermann", ReceiveCoilName="Mustermann")
    made.private_block(0x0009, "MUSTERMANN", create=True).add_new(1, "LO", "Mustermann")

    account = clean(made).cleaned.account

    assert account.counts["table: empty", "PatientName"] == 1
    assert account.counts["term", "ReceiveCoilName"] == 1
    assert account.by_rule()["private"] == 2
    assert "ustermann" not in repr(account)
    assert (account + account).by_rule()["private"] == 4


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"PatientID": "  "}, "its patient identifier is blank"),
        ({"SOPInstanceUID": None}, "its SOP Instance UID is blank"),
        ({"SOPClassUID": "1.2.840.10008.5.1.4.1.1.104.1"}, "'Encapsulated PDF Storage'"),
        ({"SOPClassUID": "1.2.3"}, "one that the standard does not register"),
        ({"BitsStored": 12, "HighBit": 15}, "its BitsStored is '12', its HighBit '15'"),
    ],
)
def test_reasons(film: Film, clean: Clean, changes: dict[str, Any], reason: str) -> None:
    made = film(**changes)
    made.file_meta.MediaStorageSOPInstanceUID = UID("1.2.3")

    with pytest.raises(IntakeError, match=reason):
        clean(made)


def test_it_is_saved_whole_under_its_new_name(film: Film, clean: Clean, tmp_path: Any) -> None:
    result = clean(film())

    path = save(result.cleaned, tmp_path)

    assert path.read_bytes() == result.data
    assert path.stat().st_mode & 0o777 == 0o600
    assert [entry.name for entry in tmp_path.iterdir()] == [result.cleaned.name]


@pytest.mark.filterwarnings("ignore:A value of type 'str' cannot be assigned")  # it is the point
def test_what_cannot_be_saved_leaves_nothing(film: Film, clean: Clean, tmp_path: Any) -> None:
    cleaned = clean(film()).cleaned
    cleaned.dataset.add_new("Rows", "US", "many")

    with pytest.raises(IntakeError, match="not encodable"):
        save(cleaned, tmp_path)
    with pytest.raises(IntakeError, match="No such file"):
        save(cleaned, tmp_path / "nowhere")
    assert not list(tmp_path.iterdir())


def test_the_engine_works_by_its_profile(film: Film, engine: Engine) -> None:
    assert engine.profile == Profile()
    with pytest.raises(dataclasses.FrozenInstanceError):
        engine.profile = Profile(faces="keep")  # type: ignore[misc]
