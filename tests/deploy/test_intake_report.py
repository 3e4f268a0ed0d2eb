"""The de-identification report: it agrees with the desk, and holds no identity."""

from __future__ import annotations

import base64
import json
import os
import re
import stat
import sys
from collections import Counter
from collections.abc import Callable
from datetime import UTC, datetime
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from pydicom import dcmread
from pydicom.datadict import tag_for_keyword
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence
from rich.console import Console

from client.intake.decision import Decision
from client.intake.deid.profile import Profile
from client.intake.deid.rules import Rule
from client.intake.desk import Desk, State
from client.intake.dicom import FileResult
from client.intake.keys import SiteKey
from common.clock import Clock
from common.errors import ConfigError
from deploy import intake_report_words as words
from deploy.intake_report import HTML, JSON, write_report
from deploy.intake_report import __doc__ as told_keys
from deploy.intake_report_picture import fate
from deploy.intake_review import Case, Queue, decide, overview

ULTRASOUND, CAPTURE, FILM = "GREYSCALE_IMAGE.dcm", "SC_rgb_2frame.dcm", "2_ORIGINAL.dcm"
NOON = Clock(date=lambda: datetime(2026, 3, 1, 12, tzinfo=UTC))


def report_of(ward: Any) -> tuple[Path, Path, dict[str, Any]]:
    """The page, the JSON, and what the JSON says."""
    with ward.desk() as desk:
        page = write_report(desk, ward.profile, NOON)
    assert page == desk.path / HTML
    data = desk.path / JSON
    return page, data, json.loads(data.read_text(encoding="utf-8"))


class Shown(HTMLParser):
    """The elements and the text of a page, as a browser reads them."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: Counter[str] = Counter()
        self.links: list[str] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        assert not any(name.startswith("on") for name, _ in attrs)
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "action")]

    def handle_data(self, data: str) -> None:
        self.text += data


# --- It agrees with the desk ----------------------------------------------------------------------


def test_its_numbers_are_those_of_the_desk(ward: Any):
    _, _, told = report_of(ward)
    with ward.desk() as desk:
        states = Counter(entry.state.value for entry in desk.entries())
        blanked = [desk.entry(number) for number in desk.blanked()]
    assert {name: count for name, count in told["objects"].items() if count} == {
        **states,
        "all": sum(states.values()),
    }
    assert states == {"kept": 3, "waits": 2, "refused": 1}
    assert told["pixels"]["objects"] == len(blanked) == 2
    assert told["pixels"]["boxes"] == sum(entry.boxes for entry in blanked) > 0
    assert told["images"] == 3
    for state, reasons in told["not_kept"].items():
        assert sum(one["objects"] for one in reasons) == states[state]


def test_every_element_of_what_is_kept_is_counted_once(ward: Any):
    _, _, told = report_of(ward)
    counted: Counter[str] = Counter()
    for action in told["actions"]:
        assert action["elements"] == sum(one["elements"] for one in action["attributes"])
        for one in action["attributes"]:
            counted[one["attribute"]] += one["elements"]
    assert sum(one["elements"] for one in told["by_origin"]) == counted.total()
    # Counted again by pydicom, from the source: attributes that stand at the top alone.
    kept = [ward.source / name for name in ("RGB_IMAGE.dcm", FILM, "ct_image.dcm")]
    headers = [dcmread(file, stop_before_pixels=True) for file in kept]
    top = Counter(element.keyword for header in headers for element in header)
    all_levels = Counter(element.keyword for header in headers for element in header.iterall())
    alone = {name: count for name, count in top.items() if name and all_levels[name] == count}
    assert len(alone) > 60
    assert {name: counted[name] for name in alone} == alone


def test_an_attribute_is_shown_under_its_standard_name_and_tag(ward: Any):
    page, _, told = report_of(ward)
    (birth,) = [
        (action["rule"], one)
        for action in told["actions"]
        for one in action["attributes"]
        if one["attribute"] == "PatientBirthDate"
    ]
    assert birth == (
        "table: empty",
        {
            "attribute": "PatientBirthDate",
            "tag": "(0010,0030)",
            "name": "Patient's Birth Date",
            "elements": 3,
        },
    )
    assert "Patient's Birth Date" in Shown(page.read_text()).text


def test_the_most_frequent_stands_first_and_equals_are_in_order(ward: Any):
    _, _, told = report_of(ward)
    totals = [(-action["elements"], action["rule"]) for action in told["actions"]]
    assert totals == sorted(totals)
    for action in told["actions"]:
        counts = [(-one["elements"], one["attribute"]) for one in action["attributes"]]
        assert counts == sorted(counts)


def test_the_keys_of_the_json_are_those_that_are_documented_in_their_order(ward: Any):
    _, _, told = report_of(ward)
    assert told_keys
    documented = re.findall(r"^    (\w+)  ", told_keys, re.MULTILINE)
    assert list(told) == documented


def test_the_page_and_the_json_say_the_same(ward: Any):
    page, _, told = report_of(ward)
    text = Shown(page.read_text()).text
    for action in told["actions"]:
        assert action["title"] in text
        assert action["means"] in text
        for one in action["attributes"]:
            assert one["attribute"] in text
    for reasons in told["not_kept"].values():
        for one in reasons:
            assert one["reason"] in text
    for one in (*told["profile"]["codes"],):
        assert one["value"] in text
        assert one["meaning"] in text
    for digest in told["digests"].values():
        assert digest in text
    assert told["standard"]["edition"] in text


def test_the_same_desk_at_the_same_time_gives_the_same_bytes(ward: Any):
    page, data, _ = report_of(ward)
    before = page.read_bytes(), data.read_bytes()
    report_of(ward)
    assert (page.read_bytes(), data.read_bytes()) == before


# --- What it says of the profile ------------------------------------------------------------------

EVERYTHING = Profile(
    dates="full",
    retain_patient_characteristics=True,
    retain_device_identity=True,
    retain_institution_identity=True,
    retain_uids=True,
    retain_safe_private=("(0019,xx0C) SIEMENS MR HEADER",),
    clean_descriptors=True,
    clean_structured_content=True,
    clean_graphics=True,
    risky_pixels="blank",
    faces="keep",
)


def test_the_shift_of_dates_is_told_with_what_reveals_it():
    told = dict(words.choices(Profile(dates="modified")))["Dates modified"]
    assert "10 years" in told
    assert "one true date" in told
    assert "Dates modified" not in dict(words.choices(Profile()))


def test_every_option_has_its_code_and_its_sentence(ward: Any, make_ward: Any, tmp_path: Path):
    place = tmp_path / "all"
    place.mkdir()
    everything = make_ward(ward.source, place, EVERYTHING)
    page, _, told = report_of(everything)
    text = Shown(page.read_text()).text
    assert [code["value"] for code in told["profile"]["codes"]] == [
        *("113100", "113101", "113103", "113104", "113105", "113106", "113108", "113109"),
        *("113110", "113111", "113112"),
    ]
    for title in (words.OPTIONS[option] for option in EVERYTHING.options if "dates" not in option):
        assert title in text
    assert "(0019,xx0C) SIEMENS MR HEADER" in text
    origins = {one["origin"]: one["elements"] for one in told["by_origin"]}
    assert {words.OPTIONS["uids"], words.OPTIONS["full_dates"], words.OPTIONS["patient"]} <= set(
        origins
    )
    _, _, basic = report_of(ward)
    assert {one["origin"] for one in basic["by_origin"]} == {words.BASIC, words.DENY}


def test_everything_that_can_happen_has_words():
    assert set(words.RULES) == set(Rule)
    assert set(words.TITLES) == set(words.OF_STATE) == set(State)
    assert all(title and means for title, means in words.RULES.values())
    assert len({title for title, _ in words.RULES.values()}) == len(Rule)
    for name in ("SeriesDate", "PatientID", "PixelData"):
        assert tag_for_keyword(name)


def test_a_report_of_another_profile_is_refused_and_nothing_is_written(ward: Any):
    with ward.desk() as desk, pytest.raises(ConfigError, match="not the profile of the intake"):
        write_report(desk, Profile(dates="modified"), NOON)
    assert not (desk.path / HTML).exists()
    assert not (desk.path / JSON).exists()


# --- It holds no identity -------------------------------------------------------------------------

PLANTED = {
    "PatientName": "ZIMMERMANN^QUILLA",
    "PatientID": "QX77120934",
    "OtherPatientNames": "VANDERBRINK^OTTILIE",
    "PatientBirthDate": "19470423",
    "PatientAddress": "KRONPRINZENALLEE 88",
    "InstitutionName": "SANKT WENDELIN SPITAL",
    "StudyDescription": "WUNSCHKONSIL FUER ZIMMERMANN",
    "StudyID": "STUD5512097",
    "AccessionNumber": "ACC9913377",
    "StudyInstanceUID": "1.2.840.99887766.5511",
    "SeriesInstanceUID": "1.2.840.99887766.5512",
    "DeviceSerialNumber": "SER4455871",
    "StationName": "KABINE7MUELLER",
    "ReferringPhysicianName": "PFEFFERKORN^ALOIS",
    "PatientComments": "HAUSARZT DOKTOR TRAUTWEIN",
}
HOSTILE = "<script>alert('ZIMMERMANN')</script>"
# Attributes of which a reason tells: each takes the file out, and must not carry its value along.
BROKEN: dict[str, Any] = {
    "PhotometricInterpretation": "ZIMMERMANNQUIL",
    "SOPClassUID": "1.2.840.99887766.5513",
    "BitsStored": None,
    "Rows": None,
    "PixelData": b"ZIMMERMANN",
    "NumberOfFrames": "7712",
    "Modality": "ZIMMERMANN",
    "VOILUTFunction": "ZIMMERMANN",
}
TOKENS = [
    *("zimmermann", "quilla", "qx77120934", "vanderbrink", "ottilie", "19470423", "kronprinzen"),
    *("wendelin", "wunschkonsil", "stud5512097", "acc9913377", "99887766", "ser4455871"),
    *("kabine7", "pfefferkorn", "trautwein", "geheimordner", "schmidthuber", "alert("),
]


def found_in(text: str) -> set[str]:
    return {token for token in TOKENS if token in text.lower()}


@pytest.fixture
def planted(tmp_path: Path, ward: Any, make_ward: Callable[..., Any]) -> Any:
    """Files with an identity in every field, file name and folder; some broken, some decided on."""
    source, place = tmp_path / "GEHEIMORDNER", tmp_path / "at"
    folder = source / "SCHMIDTHUBER ANNA 19470423"
    folder.mkdir(parents=True)
    place.mkdir()
    changes: list[dict[str, Any]] = [{}, *({name: value} for name, value in BROKEN.items())]
    for number, change in enumerate(changes):
        file = dcmread(ward.source / "ct_image.dcm")
        _plant(file, number)
        for name, value in change.items():
            setattr(file, name, value)
        file.save_as(folder / f"ZIMMERMANN_{number}{HOSTILE.replace('/', '')}.dcm")
    waits = dcmread(ward.source / CAPTURE)
    _plant(waits, 90)
    waits.save_as(folder / "QUILLA_waits.dcm")
    (folder / "KABINE7.txt").write_text("ZIMMERMANN")
    made = make_ward(source, place)
    with made.desk() as desk:
        case = Case.of(desk, made.entry("QUILLA_waits.dcm"))
        decide(desk, case, Decision("reject", by="Ada", why="it shows ZIMMERMANN^QUILLA"), NOON)
    return made


def _plant(file: Dataset, number: int) -> None:
    for name, value in PLANTED.items():
        setattr(file, name, value)
    file.SOPInstanceUID = f"1.2.840.99887766.{number + 1}"
    file.file_meta.MediaStorageSOPInstanceUID = file.SOPInstanceUID
    item = Dataset()
    item.PatientName = PLANTED["PatientName"]
    item.TextValue = PLANTED["PatientComments"]
    file.RequestAttributesSequence = Sequence([item])
    block = file.private_block(0x0019, "ZIMMERMANN", create=True)
    block.add_new(0x01, "LO", "VANDERBRINK^OTTILIE")


def test_no_planted_identity_is_in_the_report(planted: Any):
    page, data, told = report_of(planted)
    assert told["objects"]["kept"] >= 1
    assert told["objects"]["refused"] >= 4
    assert told["decisions"][0]["by"] == "Ada"
    text = page.read_text(encoding="utf-8")
    pictures = re.findall(r"base64,([^\"]+)", text)
    assert len(pictures) == 1
    shown = text + Shown(text).text + data.read_text() + base64.b64decode(pictures[0]).decode()
    assert found_in(shown) == set()
    # The control: the search finds what the person at the terminal is shown, and the sealed words.
    console = Console(width=4000, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    with planted.desk() as desk:
        for part in overview(desk, Queue.DECIDED, 10):
            console.print(part)
        (decision,) = [said for _, _, said in desk.decisions()]
    assert {"quilla", "schmidthuber"} <= found_in(console.export_text())
    assert found_in(decision.why) == {"zimmermann", "quilla"}
    assert set(TOKENS) - {"alert(", "geheimordner", "schmidthuber"} <= found_in(
        " ".join(map(str, PLANTED.values()))
    )


def test_a_reason_that_would_be_markup_is_text_and_steers_nothing(ward: Any):
    with ward.desk() as desk:
        for number, reason in zip(
            desk.numbers(State.WAITS),
            (f"{HOSTILE}<img src=x onerror=y>", "\x1b[31m\u202egnilims\r" + "x" * 5000),
            strict=True,
        ):
            desk.record([(number, State.REFUSED, FileResult(reason=reason), ())])
    page, data, told = report_of(ward)
    shown = Shown(page.read_text())
    assert shown.tags["script"] == 0
    assert shown.tags["img"] == 1
    assert HOSTILE in shown.text
    for text in (page.read_text(), data.read_text()):
        assert not re.search("[\x00-\x08\x0b-\x1f\u202e]", text)
    assert max(len(one["reason"]) for one in told["not_kept"]["refused"]) <= 400


def test_the_page_loads_nothing_and_runs_nothing(ward: Any):
    page, _, _ = report_of(ward)
    shown = Shown(page.read_text())
    assert all(link.startswith("data:image/svg+xml;base64,") for link in shown.links)
    assert not {"script", "link", "iframe", "form", "object", "embed"} & set(shown.tags)
    assert "default-src 'none'" in page.read_text()


def test_decisions_are_told_without_their_words(ward: Any):
    with ward.desk() as desk:
        for name, said in (
            (ULTRASOUND, Decision("release", found=False, by="Ada", why="Mary's arm")),
            (CAPTURE, Decision("reject", by="<b>Grace</b>", why="Mary's leg")),
        ):
            decide(desk, Case.of(desk, ward.entry(name)), said, NOON)
    page, data, told = report_of(ward)
    assert [list(said.values()) for said in told["decisions"]] == [
        [NOON.date().isoformat(), ward.entry(ULTRASOUND).short, "release", 0, False, "Ada", False],
        [
            *(NOON.date().isoformat(), ward.entry(CAPTURE).short, "reject", 0, True),
            *("<b>Grace</b>", False),
        ],
    ]
    shown = Shown(page.read_text())
    assert "Mary" not in page.read_text() + data.read_text()
    assert "<b>Grace</b>" in shown.text
    assert "by the next run" in shown.text
    ward.take_in()
    page, _, told = report_of(ward)
    assert all(said["acted"] for said in told["decisions"])
    assert "by the next run" not in page.read_text()


# --- On the disk ----------------------------------------------------------------------------------


def test_both_files_are_their_owners_alone(ward: Any):
    before = os.umask(0)
    try:
        page, data, _ = report_of(ward)
    finally:
        os.umask(before)
    for file in (page, data):
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert not list(page.parent.glob("*.partial"))


def test_a_disk_that_refuses_leaves_the_old_report(ward: Any):
    page, data, _ = report_of(ward)
    before = data.read_bytes()
    page.unlink()
    page.mkdir()
    with pytest.raises(ConfigError, match="cannot be written"):
        report_of(ward)
    assert data.read_bytes() == before
    assert not list(page.parent.glob("*.partial"))


def test_without_the_libraries_of_pages_there_is_the_json_and_no_older_page(
    ward: Any, monkeypatch: pytest.MonkeyPatch
):
    page, data, _ = report_of(ward)
    data.unlink()
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with ward.desk() as desk:
        assert write_report(desk, ward.profile, NOON) == data
    assert json.loads(data.read_text())["objects"]["all"] == 6
    assert not page.exists()


def test_an_empty_desk_has_a_report(tmp_path: Path):
    with Desk.create(tmp_path / "empty.intake", SiteKey.random()) as desk:
        page = write_report(desk, Profile(), NOON)
    text = Shown(page.read_text()).text
    assert "Nothing is kept, so nothing was done" in text
    assert "Nobody has decided" in text


# --- The picture ----------------------------------------------------------------------------------


def test_the_picture_shows_every_state_in_its_share(ward: Any):
    page, _, _ = report_of(ward)
    drawn = re.findall(r"base64,([^\"]+)\" alt=\"([^\"]+)\"", page.read_text())
    assert len(drawn) == 1
    svg = ElementTree.fromstring(base64.b64decode(drawn[0][0]))  # noqa: S314
    text = "".join(svg.itertext())
    for title in ("kept: 1", "kept, with pixels blanked: 2", "wait for a person: 2", "refused: 1"):
        assert title in text
    assert drawn[0][1] == (
        "What became of the objects: 1 kept, 2 kept, with pixels blanked, "
        "2 wait for a person, 1 refused."
    )
    widths = bar_widths(svg)
    assert len(widths) == 4
    assert np.allclose(np.array(widths) / sum(widths), np.array([1, 2, 2, 1]) / 6, atol=1e-3)


def bar_widths(svg: ElementTree.Element) -> list[float]:
    """Of the parts of the bar: the tall rectangles, as against the keys' small ones."""
    found = []
    for path in svg.iter("{http://www.w3.org/2000/svg}path"):
        numbers = [float(text) for text in re.findall(r"-?\d+\.?\d*", path.get("d", ""))]
        xs, ys = numbers[0::2], numbers[1::2]
        if len(xs) == 4 and max(ys) - min(ys) > 30:
            found.append(max(xs) - min(xs))
    return found


def test_no_objects_need_no_picture():
    assert fate({"all": 0}, 0) is None
    assert fate({"refused": 3, "all": 3}, 0) is not None


def test_thousands_are_told_in_groups():
    assert words.thousands(1234567) == "1\u202f234\u202f567"
    assert "1\u202f000 kept" in words.lead(dict.fromkeys(State, 0) | {"kept": 1000, "all": 1000})
