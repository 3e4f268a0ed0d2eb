"""Labels from structured reports: coded findings count, text and guesses do not."""

from __future__ import annotations

import copy
import io
import stat
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import pydicom
import pytest
from pydicom import dcmread
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.sr.codedict import codes
from pydicom.sr.coding import Code
from pydicom.uid import (
    UID,
    BasicTextSRStorage,
    Comprehensive3DSRStorage,
    ComprehensiveSRStorage,
    EnhancedSRStorage,
    ExplicitVRLittleEndian,
    XRayRadiationDoseSRStorage,
)

from client.intake import findings
from client.intake.findings import Findings, Labelled, read_codes, write_labels
from client.intake.labels import read_labels
from client.intake.source import NotUsed
from client.intake.structured_report import Coded, Presence, presence_of, statements
from common.errors import ConfigError, IntakeError
from common.task_sections import Classification

STUDY = "1.2.3.4"
PACKAGED = Path(pydicom.__file__).parent / "data" / "test_files"
FINDING, PNEUMOTHORAX = ("121071", "DCM"), ("36118008", "SCT")
NODULE, DIAMETER = ("27925004", "SCT"), ("81827009", "SCT")
YES, NO, UNDETERMINED = ("373066001", "SCT"), ("373067005", "SCT"), ("373068000", "SCT")
PRESENT, ABSENT, PRESENCE = ("121053", "DCM"), ("121054", "DCM"), ("121052", "DCM")
GROUP, REPORT = ("125007", "DCM"), ("126000", "DCM")
BINARY = Classification(kind="binary", classes=("normal", "pneumothorax"))
MANY = Classification(kind="multilabel", classes=("pneumothorax", "nodule"))
KINDS = Classification(kind="multiclass", classes=("normal", "pneumothorax", "nodule"))

ASKED = """
[[finding]]
class = "pneumothorax"
concept = ["36118008", "SCT"]
"""
FOUND = """
[[finding]]
class = "pneumothorax"
concept = ["121071", "DCM"]
value = ["36118008", "SCT"]
"""
MEASURED = """
[[finding]]
class = "nodule"
concept = ["81827009", "SCT"]
at_least = 8.0
unit = "mm"
"""
NORMAL = """
[[finding]]
class = "normal"
concept = ["121071", "DCM"]
value = ["17621005", "SCT"]
"""


@dataclass(frozen=True)
class Memory:
    """An item whose bytes are in memory."""

    data: bytes
    place: str = "report"
    stamp: str = ""

    def open(self, limit: int) -> BinaryIO:
        return io.BytesIO(self.data)


def code(pair: tuple[str, str]) -> list[Dataset]:
    made = Dataset()
    keyword = "LongCodeValue" if len(pair[0]) > 16 else "CodeValue"
    setattr(made, keyword, pair[0])
    made.CodingSchemeDesignator = pair[1]
    made.CodeMeaning = "a meaning that nobody reads"
    return [made]


def content(
    kind: str, name: tuple[str, str] | None, *below: Dataset, relation: str = "CONTAINS"
) -> Dataset:
    made = Dataset()
    made.RelationshipType, made.ValueType = relation, kind
    if name:
        made.ConceptNameCodeSequence = code(name)
    if below:
        made.ContentSequence = list(below)
    return made


def coded(
    name: tuple[str, str], value: tuple[str, str], *below: Dataset, relation: str = "CONTAINS"
) -> Dataset:
    made = content("CODE", name, *below, relation=relation)
    made.ConceptCodeSequence = code(value)
    return made


def measured(
    name: tuple[str, str], value: str | None, unit: str = "mm", *below: Dataset
) -> Dataset:
    made = content("NUM", name, *below)
    made.MeasuredValueSequence = []
    if value is not None:
        one = Dataset()
        one.NumericValue, one.MeasurementUnitsCodeSequence = value, code((unit, "UCUM"))
        made.MeasuredValueSequence = [one]
    return made


def report(*below: Dataset, **values: Any) -> FileDataset:
    """A signed and complete report on a study."""
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    made = FileDataset("", {}, b"\0" * 128, meta, is_implicit_VR=False)
    plain = {
        "SOPClassUID": ComprehensiveSRStorage,
        "SOPInstanceUID": f"{STUDY}.9",
        "StudyInstanceUID": STUDY,
        "PatientID": "P1",
        "VerificationFlag": "VERIFIED",
        "CompletionFlag": "COMPLETE",
    }
    for keyword, value in (plain | values).items():
        setattr(made, keyword, value)
    meta.MediaStorageSOPClassUID = UID(made.SOPClassUID)
    meta.MediaStorageSOPInstanceUID = UID(made.SOPInstanceUID or "1.2")
    made.ValueType, made.ConceptNameCodeSequence = "CONTAINER", code(REPORT)
    made.ContentSequence = list(below)
    return made


def item(dataset: FileDataset, place: str = "report") -> Memory:
    buffer = io.BytesIO()
    dataset.save_as(buffer, enforce_file_format=True)
    return Memory(buffer.getvalue(), place)


Ask = Callable[..., Labelled]


@pytest.fixture
def ask(tmp_path: Path) -> Ask:
    """`ask(text, task, report, …)`: the labels, and who has none."""

    def _ask(text: str, task: Classification, *reports: FileDataset | Memory) -> Labelled:
        path = tmp_path / "codes.toml"
        path.write_text(text)
        gathered = Findings(read_codes(path, task), task)
        for one in reports:
            gathered.take(one if isinstance(one, Memory) else item(one))
        return gathered.labels()

    return _ask


def why(labelled: Labelled) -> str:
    """The one reason of the one study without a label."""
    assert not labelled.labels
    (one,) = labelled.not_labelled
    assert one.what == STUDY
    return one.reason


def test_a_finding_is_the_positive_class(ask: Ask) -> None:
    found = ask(FOUND, BINARY, report(coded(FINDING, PNEUMOTHORAX)))

    assert found == Labelled({STUDY: 1}, ())


@pytest.mark.parametrize(
    ("value", "label"),
    [
        (YES, 1),
        (PRESENT, 1),
        (("52101004", "SCT"), 1),
        (("R-0038D", "SRT"), 1),
        (NO, 0),
        (ABSENT, 0),
        (("272519000", "SCT"), 0),
        (("R-00339", "SRT"), 0),
    ],
)
def test_a_question_that_is_answered(ask: Ask, value: tuple[str, str], label: int) -> None:
    assert ask(ASKED, BINARY, report(coded(PNEUMOTHORAX, value))).labels == {STUDY: label}


@pytest.mark.parametrize(
    "value",
    [UNDETERMINED, ("121059", "DCM"), ("415684004", "SCT"), ("7771000", "SCT"), ("1", "99X")],
)
def test_an_answer_that_is_neither_yes_nor_no_is_unclear(ask: Ask, value: tuple[str, str]) -> None:
    assert "unclear: 'pneumothorax'" in why(ask(ASKED, BINARY, report(coded(PNEUMOTHORAX, value))))


def test_the_codes_of_pydicoms_context_groups_are_known() -> None:
    # CID 230, 240 and 250 as pydicom has them, which it takes from PS3.16.
    groups = {
        Presence.PRESENT: ("Yes", "Present", "Positive"),
        Presence.ABSENT: ("No", "Absent", "Negative"),
        Presence.UNCLEAR: ("Undetermined",),
    }
    for presence, names in groups.items():
        for name in names:
            known = getattr(codes.SCT, name)
            said = presence_of(Coded.of(known.value, known.scheme_designator))
            assert said is presence, name


def test_findings_count_at_any_depth(ask: Ask) -> None:
    deep = coded(FINDING, PNEUMOTHORAX)
    for _ in range(40):
        deep = content("CONTAINER", GROUP, deep)

    assert ask(FOUND, BINARY, report(deep)).labels == {STUDY: 1}


@pytest.mark.parametrize("kind", [BasicTextSRStorage, EnhancedSRStorage, Comprehensive3DSRStorage])
def test_classes_of_reports(ask: Ask, kind: UID) -> None:
    made = report(coded(FINDING, PNEUMOTHORAX), SOPClassUID=kind)

    assert ask(FOUND, BINARY, made).labels == {STUDY: 1}


def test_text_is_never_interpreted(ask: Ask) -> None:
    text = content("TEXT", FINDING)
    text.TextValue = "Pneumothorax. 36118008 SCT"
    other = coded(FINDING, ("1", "SCT"))
    other.ConceptCodeSequence[0].CodeMeaning = "Pneumothorax"

    assert why(ask(FOUND, BINARY, report(text, other))) == findings.SILENT


def test_another_scheme_is_another_concept(ask: Ask) -> None:
    made = report(coded(FINDING, ("36118008", "99LOCAL")))

    assert why(ask(FOUND, BINARY, made)) == findings.SILENT


def test_a_long_code_value(ask: Ask) -> None:
    long = ("12345678901234567890", "SCT")
    codes = FOUND.replace("36118008", long[0])

    assert ask(codes, BINARY, report(coded(FINDING, long))).labels == {STUDY: 1}


def presence(value: tuple[str, str], relation: str) -> Dataset:
    return coded(PRESENCE, value, relation=relation)


@pytest.mark.parametrize("relation", ["HAS PROPERTIES", "HAS CONCEPT MOD"])
@pytest.mark.parametrize(
    ("value", "outcome"),
    [(PRESENT, 1), (ABSENT, 0), (UNDETERMINED, "unclear"), (("1", "99X"), "unclear")],
)
def test_a_qualifier_of_presence(
    ask: Ask, relation: str, value: tuple[str, str], outcome: int | str
) -> None:
    below = coded(FINDING, PNEUMOTHORAX, presence(value, relation))
    beside = content("CONTAINER", GROUP, coded(FINDING, PNEUMOTHORAX), presence(value, "CONTAINS"))
    for made in (below, beside):
        found = ask(FOUND, BINARY, report(made))
        if outcome == "unclear":
            assert "unclear" in why(found)
        else:
            assert found.labels == {STUDY: outcome}


def test_a_property_that_is_absent_does_not_make_its_finding_absent(ask: Ask) -> None:
    calcified = coded(("129748009", "SCT"), ABSENT, relation="HAS PROPERTIES")

    found = ask(FOUND, BINARY, report(coded(FINDING, PNEUMOTHORAX, calcified)))

    assert found.labels == {STUDY: 1}


def test_what_is_said_below_an_absent_finding_is_said_of_nothing(ask: Ask) -> None:
    task = Classification(classes=("none", "nodule"))
    there = coded(FINDING, NODULE, measured(DIAMETER, "9"))
    absent = coded(FINDING, NODULE, presence(ABSENT, "HAS PROPERTIES"), measured(DIAMETER, "9"))

    assert ask(MEASURED, task, report(there)).labels == {STUDY: 1}
    assert why(ask(MEASURED, task, report(absent))) == findings.SILENT


def test_a_no_in_the_name_of_a_finding_is_unclear(ask: Ask) -> None:
    modified = coded(("1", "99LOCAL"), NO, relation="HAS CONCEPT MOD")

    assert "unclear" in why(ask(FOUND, BINARY, report(coded(FINDING, PNEUMOTHORAX, modified))))


def test_a_certainty_is_unclear(ask: Ask) -> None:
    certainty = measured(("111012", "DCM"), "55", "%")

    assert "unclear" in why(ask(FOUND, BINARY, report(coded(FINDING, PNEUMOTHORAX, certainty))))


def test_no_to_what_is_absent_is_unclear(ask: Ask) -> None:
    twice = coded(PNEUMOTHORAX, NO, presence(ABSENT, "HAS PROPERTIES"))

    assert "unclear" in why(ask(ASKED, BINARY, report(twice)))


@pytest.mark.parametrize(
    "around",
    [
        lambda one: content("CONTAINER", ("121060", "DCM"), one),  # History
        lambda one: content("CONTAINER", ("11329-0", "LN"), one),  # History General
        lambda one: content("CONTAINER", ("121068", "DCM"), content("CONTAINER", GROUP, one)),
        lambda one: content(
            "CONTAINER",
            GROUP,
            one,
            coded(("121024", "DCM"), ("121026", "DCM"), relation="HAS OBS CONTEXT"),  # a fetus
        ),
        lambda one: content("CONTAINER", GROUP, one, relation="HAS OBS CONTEXT"),
        lambda one: content("CONTAINER", GROUP, one, relation="HAS ACQ CONTEXT"),
    ],
)
def test_what_is_not_of_this_patient_now_is_no_finding(
    ask: Ask, around: Callable[[Dataset], Dataset]
) -> None:
    one = coded(FINDING, PNEUMOTHORAX)
    assert ask(FOUND, BINARY, report(content("CONTAINER", GROUP, one))).labels == {STUDY: 1}

    assert why(ask(FOUND, BINARY, report(around(copy.deepcopy(one))))) == findings.SILENT


@pytest.mark.parametrize(
    ("numbers", "outcome"),
    [
        (["8.0"], 1),
        (["7.99"], 0),
        (["3", "12"], 1),
        (["3", "4"], 0),
        ([None], "unclear"),
        (["12", None], "unclear"),
        (["1e400"], "unclear"),
    ],
)
def test_a_measurement_against_its_threshold(
    ask: Ask, numbers: Sequence[str | None], outcome: int | str
) -> None:
    task = Classification(classes=("none", "nodule"))
    found = ask(MEASURED, task, report(*(measured(DIAMETER, number) for number in numbers)))

    if outcome == "unclear":
        assert "unclear" in why(found)
    else:
        assert found.labels == {STUDY: outcome}


def test_a_measurement_in_another_unit_is_unclear(ask: Ask) -> None:
    found = ask(
        MEASURED, Classification(classes=("none", "nodule")), report(measured(DIAMETER, "9", "cm"))
    )

    assert "unclear" in why(found)


def test_a_range(ask: Ask) -> None:
    codes = MEASURED.replace("unit", "below = 30\nunit")
    task = Classification(classes=("none", "nodule"))

    labels = [ask(codes, task, report(measured(DIAMETER, n))).labels for n in ("29.9", "30")]

    assert labels == [{STUDY: 1}, {STUDY: 0}]


def test_reports_that_contradict_each_other_are_a_conflict(ask: Ask) -> None:
    first = report(coded(PNEUMOTHORAX, YES))
    second = report(coded(PNEUMOTHORAX, NO), SOPInstanceUID="1.2.3.10")

    for order in ((first, second), (second, first)):
        assert "said to be present and to be absent" in why(ask(ASKED, BINARY, *order))


def test_two_contents_of_one_instance_are_a_conflict(ask: Ask) -> None:
    both = [report(coded(PNEUMOTHORAX, value)) for value in (YES, NO)]

    assert "conflict" in why(ask(ASKED, BINARY, *both))


def test_a_copy_of_a_report_is_no_conflict(ask: Ask) -> None:
    one = report(coded(PNEUMOTHORAX, YES))

    assert ask(ASKED, BINARY, one, copy.deepcopy(one)).labels == {STUDY: 1}


def test_a_report_that_replaces_another_stands_for_it(ask: Ask) -> None:
    first = report(coded(PNEUMOTHORAX, NO))
    later = report(coded(PNEUMOTHORAX, YES), SOPInstanceUID="1.2.3.10")
    study, series, document = Dataset(), Dataset(), Dataset()
    document.ReferencedSOPInstanceUID = first.SOPInstanceUID
    series.ReferencedSOPSequence = [document]
    study.ReferencedSeriesSequence = [series]
    later.PredecessorDocumentsSequence = [study]

    for order in ((first, later), (later, first)):
        assert ask(ASKED, BINARY, *order).labels == {STUDY: 1}


def test_only_signed_reports_count_unless_the_file_says_otherwise(ask: Ask) -> None:
    draft = report(coded(PNEUMOTHORAX, YES), VerificationFlag="UNVERIFIED")

    assert why(ask(ASKED, BINARY, draft)) == findings.NOT_VERIFIED
    assert ask("verified = false\n" + ASKED, BINARY, draft).labels == {STUDY: 1}


def test_a_study_without_a_report_is_listed(
    ask: Ask, film: Callable[..., FileDataset], shared_data: Path
) -> None:
    seen = item(film(StudyInstanceUID=STUDY))
    dose = report(coded(PNEUMOTHORAX, YES), SOPClassUID=XRayRadiationDoseSRStorage)

    assert why(ask(ASKED, BINARY, seen)) == findings.NO_REPORT
    assert why(ask(ASKED, BINARY, dose)) == findings.NOT_READ


def test_silence_is_listed_unless_the_file_says_what_it_means(ask: Ask) -> None:
    silent = report(coded(FINDING, NODULE))

    assert why(ask(FOUND, BINARY, silent)) == findings.SILENT
    told = 'unmentioned = "absent"\n' + FOUND
    assert ask(told, BINARY, silent).labels == {STUDY: 0}
    partial = report(coded(FINDING, NODULE), CompletionFlag="PARTIAL")
    assert why(ask(told, BINARY, partial)) == findings.SILENT


@pytest.mark.parametrize(
    ("values", "outcome"),
    [
        ([NORMAL], 0),
        ([PNEUMOTHORAX], 1),
        ([NORMAL, PNEUMOTHORAX], "conflict"),
        ([NODULE], findings.SILENT),
    ],
)
def test_a_negative_class_of_its_own(ask: Ask, values: list[Any], outcome: int | str) -> None:
    normal = ("17621005", "SCT")
    made = report(*(coded(FINDING, normal if one is NORMAL else one) for one in values))
    found = ask(FOUND + NORMAL, BINARY, made)

    if isinstance(outcome, str):
        assert outcome in why(found)
    else:
        assert found.labels == {STUDY: outcome}


def test_not_normal_is_not_the_positive_class(ask: Ask) -> None:
    not_normal = coded(FINDING, ("17621005", "SCT"), presence(ABSENT, "HAS PROPERTIES"))

    assert why(ask(FOUND + NORMAL, BINARY, report(not_normal))) == findings.SILENT


@pytest.mark.parametrize(
    ("made", "outcome"),
    [
        ([coded(FINDING, PNEUMOTHORAX)], 1),
        ([coded(FINDING, PNEUMOTHORAX), measured(DIAMETER, "3")], 1),
        ([measured(DIAMETER, "9")], 2),
        ([coded(FINDING, PNEUMOTHORAX), measured(DIAMETER, "9")], "exclude each other"),
        ([measured(DIAMETER, "3")], findings.SILENT),
    ],
)
def test_one_class_of_many(ask: Ask, made: list[Dataset], outcome: int | str) -> None:
    found = ask(FOUND + NORMAL + MEASURED, KINDS, report(*map(copy.deepcopy, made)))

    if isinstance(outcome, str):
        assert outcome in why(found)
    else:
        assert found.labels == {STUDY: outcome}


def test_many_labels_need_a_word_on_each(ask: Ask) -> None:
    both = report(coded(PNEUMOTHORAX, NO), measured(DIAMETER, "9"))
    one = report(measured(DIAMETER, "9"))

    assert ask(ASKED + MEASURED, MANY, both).labels == {STUDY: (0, 1)}
    assert why(ask(ASKED + MEASURED, MANY, one)) == "nothing is said of 'pneumothorax'"
    told = 'unmentioned = "absent"\n' + ASKED + MEASURED
    assert ask(told, MANY, one).labels == {STUDY: (0, 1)}


def test_objects_of_two_patients_in_one_study_are_a_conflict(
    ask: Ask, film: Callable[..., FileDataset]
) -> None:
    other = item(film(StudyInstanceUID=STUDY, PatientID="P2"))

    assert why(ask(ASKED, BINARY, report(coded(PNEUMOTHORAX, YES)), other)) == (
        findings.OTHER_PATIENT
    )


def test_a_report_that_is_broken_takes_the_label_of_its_study(ask: Ask) -> None:
    deep = coded(FINDING, PNEUMOTHORAX)
    for _ in range(100):
        deep = content("CONTAINER", GROUP, deep)
    too_deep = item(report(deep, SOPInstanceUID="1.2.3.11"), "too deep")

    found = ask(ASKED, BINARY, report(coded(PNEUMOTHORAX, YES)), too_deep)

    assert not found.labels
    assert found.not_labelled == (
        NotUsed(STUDY, findings.BROKEN),
        NotUsed("too deep", "cannot be read (ValueError)"),
    )


@pytest.mark.parametrize("undefined", [False, True])
def test_a_report_that_is_cut_anywhere_gives_no_label_of_its_own(ask: Ask, undefined: bool) -> None:
    made = report(coded(FINDING, NODULE), measured(DIAMETER, "9"), coded(PNEUMOTHORAX, YES))
    made["ContentSequence"].is_undefined_length = undefined
    for one in made.ContentSequence:
        one.is_undefined_length_sequence_item = undefined
    whole = item(made).data
    text = 'unmentioned = "absent"\n' + ASKED
    assert ask(text, BINARY, Memory(whole)).labels == {STUDY: 1}

    for length in range(len(whole)):
        assert not ask(text, BINARY, Memory(whole[:length])).labels, length


@pytest.mark.parametrize("uid", ["", "=HYPERLINK(1)", "MUELLER^ANNA", "1.2.3\n1.2.4,finding"])
def test_a_study_uid_that_is_none_does_not_reach_the_table(ask: Ask, uid: str) -> None:
    with pydicom.config.disable_value_validation():
        made = item(report(coded(PNEUMOTHORAX, YES), StudyInstanceUID=uid))

    found = ask(ASKED, BINARY, made)

    assert not found.labels
    assert [one.what for one in found.not_labelled] == ["report"]
    assert "ANNA" not in found.not_labelled[0].reason


def test_what_is_no_dicom_is_listed(ask: Ask) -> None:
    found = ask(ASKED, BINARY, Memory(b"no DICOM", "x"))

    assert found.not_labelled == (NotUsed("x", "not a DICOM file"),)


def test_real_reports_say_what_they_say(shared_data: Path) -> None:
    folder = shared_data / "dicom" / "highdicom"
    one = dcmread(folder / "sr_document.dcm")
    groups = dcmread(folder / "sr_document_with_multiple_groups.dcm")

    said = {(told.name, told.value or told.number) for told in statements(groups)}

    # As dcmtk's dsrdump prints them.
    assert said == {
        (("X6K6", "IBSI"), -119.07385253906),
        (("51845000", "SCT"), ("243911007", "SCT")),
        (("276214006", "SCT"), ("49755003", "SCT")),
        (("276214006", "SCT"), ("91723000", "SCT")),
        (("121071", "DCM"), ("27925004", "SCT")),
        (("121071", "DCM"), ("15825003", "SCT")),
        (("121071", "DCM"), ("51282000", "SCT")),
        (("81827009", "SCT"), 10.0),
        (("81827009", "SCT"), 20.0),
        (("121403", "DCM"), ("371928007", "SCT")),
        (("118565006", "SCT"), 200.0),
    }
    old = {(told.name, told.value or told.number) for told in statements(one)}
    assert (("131184002", "SCT"), 1.7) in old  # G-A16A in SNOMED RT
    assert (("121071", "DCM"), ("2748008", "SCT")) in old  # T-A7010


def test_real_reports_give_labels(shared_data: Path, ask: Ask) -> None:
    report_file = shared_data / "dicom" / "highdicom" / "sr_document_with_multiple_groups.dcm"
    packaged = [PACKAGED / name for name in ("reportsi.dcm", "test-SR.dcm", "CT_small.dcm")]
    files = [Memory(path.read_bytes(), path.name) for path in (report_file, *packaged)]
    task = Classification(classes=("none", "nodule"))
    studies = [str(dcmread(path).StudyInstanceUID) for path in packaged]

    signed = ask(MEASURED, task, *files)
    found = ask("verified = false\n" + MEASURED, task, *files)

    assert not signed.labels
    assert {one.what: one.reason for one in signed.not_labelled} == {
        studies[0]: findings.NOT_VERIFIED,
        studies[1]: findings.SILENT,
        studies[2]: findings.NOT_VERIFIED,
    }
    assert found.labels == {studies[2]: 1}  # the report is on the study of pydicom's CT


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("", "finding is missing"),
        ("x = 1\n" + FOUND, "x = 1: unknown key"),
        (FOUND.replace("pneumothorax", "Pneumothorax"), "class 'Pneumothorax': the run's classes"),
        (NORMAL, r"class 'pneumothorax' has no \[\[finding\]\]"),
        (FOUND.replace('["36118008", "SCT"]', '"36118008"'), r"finding.0.value"),
        (FOUND.replace('["36118008", "SCT"]', '["36118008"]'), r"finding.0.value"),
        (FOUND.replace('"SCT"', '" "'), r"finding.0.value.1"),
        (FOUND + 'at_least = 1\nunit = "mm"', "one or the other"),
        (ASKED + "at_least = 1", "needs a unit"),
        (ASKED + 'unit = "mm"', "needs a unit"),
        (ASKED + 'at_least = 2\nbelow = 2\nunit = "mm"', "not less than below"),
        (ASKED + 'at_least = nan\nunit = "mm"', "at_least"),
        ('unmentioned = "no"\n' + FOUND, "unmentioned"),
        ("[[finding", "expected a TOML file"),
    ],
)
def test_refuses_a_file_with_the_key_at_fault(tmp_path: Path, text: str, error: str) -> None:
    path = tmp_path / "codes.toml"
    path.write_text(text)

    with pytest.raises(ConfigError, match=error) as refused:
        read_codes(path, BINARY)
    assert "codes.toml" in str(refused.value)


def test_silence_means_nothing_among_exclusive_classes(tmp_path: Path) -> None:
    path = tmp_path / "codes.toml"
    path.write_text('unmentioned = "absent"\n' + FOUND + NORMAL + MEASURED)

    with pytest.raises(ConfigError, match="unmentioned = 'absent' in a multiclass task"):
        read_codes(path, KINDS)


@pytest.mark.parametrize(
    ("task", "label"), [(BINARY, 1), (KINDS, 2), (MANY, (0, 1))], ids=["binary", "kinds", "many"]
)
def test_the_table_is_one_that_the_intake_reads(
    tmp_path: Path, task: Classification, label: int | tuple[int, ...]
) -> None:
    path = tmp_path / "labels.csv"

    write_labels(path, {STUDY: label}, task)
    table = read_labels(path, task)

    assert table.key == "StudyInstanceUID"
    assert table.entries[STUDY].label == label
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    with pytest.raises(ConfigError, match="nothing is overwritten"):
        write_labels(path, {STUDY: label}, task)


def test_an_item_that_cannot_be_opened_is_listed(ask: Ask) -> None:
    class Closed(Memory):
        def open(self, limit: int) -> BinaryIO:
            raise IntakeError("closed")

    assert ask(ASKED, BINARY, Closed(b"", "x")).not_labelled == (NotUsed("x", "closed"),)


def test_a_report_that_highdicom_wrote(ask: Ask, shared_data: Path) -> None:
    sr = pytest.importorskip("highdicom.sr", reason="highdicom is not installed")
    film = dcmread(shared_data / "dicom" / "highdicom" / "ct_image.dcm")
    who = sr.ObserverContext(
        observer_type=Code("121006", "DCM", "Person"),
        observer_identifying_attributes=sr.PersonObserverIdentifyingAttributes(name="Foo^Bar"),
    )
    groups = [
        sr.MeasurementsAndQualitativeEvaluations(
            tracking_identifier=sr.TrackingIdentifier(identifier="1"),
            source_images=[sr.SourceImageForMeasurementGroup.from_source_image(film)],
            finding_type=Code(*NODULE, "Nodule"),
            measurements=[
                sr.Measurement(
                    name=Code(*DIAMETER, "Diameter"), value=9.5, unit=Code("mm", "UCUM", "mm")
                )
            ],
            qualitative_evaluations=[
                sr.QualitativeEvaluation(
                    name=Code(*PNEUMOTHORAX, "Pneumothorax"), value=Code(*NO, "No")
                )
            ],
        )
    ]
    content = sr.MeasurementReport(
        observation_context=sr.ObservationContext(observer_person_context=who),
        procedure_reported=Code("363679005", "SCT", "Imaging procedure"),
        imaging_measurements=groups,
    )
    made = sr.ComprehensiveSR(
        evidence=[film],
        content=content,
        series_instance_uid="1.2.3.5",
        series_number=1,
        sop_instance_uid="1.2.3.6",
        instance_number=1,
        manufacturer="Manufacturer",
        is_complete=True,
        is_verified=True,
        verifying_observer_name="Foo^Bar",
        verifying_organization="Bar",
    )

    found = ask(ASKED + MEASURED, MANY, item(made))

    assert found.labels == {str(film.StudyInstanceUID): (0, 1)}
