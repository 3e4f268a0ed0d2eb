"""Table E.1-1 is the standard's: row by row as two independent copies have it."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping
from pathlib import Path

import pytest
from pydicom.tag import Tag

from client.intake.deid.table import RESOLVED, Action, Row, standard_table

Copy = Mapping[str, Mapping[str, str]]

# Columns of `profile.csv`, and what the two copies call them.
JSON_2024B = {
    "name": "name",
    "basic": "basicProfile",
    "safe_private": "rtnSafePrivOpt",
    "uids": "rtnUIDsOpt",
    "device": "rtnDevIdOpt",
    "institution": "rtnInstIdOpt",
    "patient": "rtnPatCharsOpt",
    "full_dates": "rtnLongFullDatesOpt",
    "modified_dates": "rtnLongModifDatesOpt",
    "descriptors": "cleanDescOpt",
    "structured": "cleanStructContOpt",
    "graphics": "cleanGraphOpt",
    "in_iod": "stdCompIOD",
}
CSV_2025C = {
    "name": "Attribute Name",
    "basic": "Basic Prof.",
    "safe_private": "Rtn. Safe Priv. Opt.",
    "uids": "Rtn. UIDs Opt.",
    "device": "Rtn. Dev. Id. Opt.",
    "institution": "Rtn. Inst. Id. Opt.",
    "patient": "Rtn. Pat. Chars. Opt.",
    "full_dates": "Rtn. Long. Full Dates Opt.",
    "modified_dates": "Rtn. Long. Modif. Dates Opt.",
    "descriptors": "Clean Desc. Opt.",
    "structured": "Clean Struct. Cont. Opt.",
    "graphics": "Clean Graph. Opt.",
    "in_iod": "In Std. Comp. IOD (from PS3.3)",
    "retired": "Retd. (from PS3.6)",
}

NEW_IN_2026C = {
    "(0040,0556)": "Acquisition Context Description",
    "(003A,020C)": "Channel Derivation Description",
    "(003A,0203)": "Channel Label",
    "(0040,E012)": "Display URI",
    "(003A,0020)": "Multiplex Group Label",
    "(0070,0006)": "Unformatted Text Value",
    "(0040,B020)": "Waveform Annotation Sequence",
}
"""Rows that neither copy has: the standard added them after both were made."""

NEW_IN_2025C = 28
"""Rows that the copy of 2024b cannot have: names to use, gender identity, diagnoses, montages …"""

EXPLAINED = {
    ("(0010,2160)", "in_iod"): "2025c: Ethnic Group was retired and left every IOD",
}
"""Cells in which the copy of 2024b differs, and why ours is right."""


def spelled(tag: str) -> str:
    if "odd" in tag.lower():
        return "(odd,xxxx)"
    return tag.replace(" ", "").upper().replace("X", "x")


def named(name: str) -> str:
    """Without the reference to a note, and with one kind of apostrophe."""
    return name.replace("’", "'").partition("(see Note")[0].strip()


def copy_of(rows: list[dict[str, str]], columns: Mapping[str, str]) -> Copy:
    tag = "tag" if "tag" in rows[0] else "Tag"
    return {
        spelled(row[tag]): {
            ours: named(value) if ours == "name" else value
            for ours, theirs in columns.items()
            for value in [row.get(theirs, "")]
        }
        for row in rows
    }


@pytest.fixture(scope="module")
def ours() -> Copy:
    file = Path(__file__).parents[4] / "client" / "intake" / "deid" / "profile.csv"
    with file.open(encoding="utf-8", newline="") as lines:
        return {row["tag"]: row for row in csv.DictReader(lines)}


@pytest.fixture(scope="module")
def copy_2024b(shared_data: Path) -> Copy:
    file = shared_data / "standard" / "confidentiality_profile_attributes.json"
    return copy_of(json.loads(file.read_text("utf-8")), JSON_2024B)


@pytest.fixture(scope="module")
def copy_2025c(shared_data: Path) -> Copy:
    file = shared_data / "standard" / "ps3.15_table_E.1-1_2025c.csv"
    with file.open(encoding="utf-8", newline="") as lines:
        return copy_of(list(csv.DictReader(lines)), CSV_2025C)


def differences(ours: Copy, copy: Copy) -> dict[tuple[str, str], tuple[str, str]]:
    """Cells of the rows that both have."""
    return {
        (tag, column): (ours[tag][column], value)
        for tag, row in copy.items()
        if tag in ours
        for column, value in row.items()
        if ours[tag][column] != value
    }


def test_it_is_the_copy_of_2025c_and_the_rows_of_2026c(ours: Copy, copy_2025c: Copy) -> None:
    assert differences(ours, copy_2025c) == {}
    assert copy_2025c.keys() - ours.keys() == set()
    assert {tag: ours[tag]["name"] for tag in ours.keys() - copy_2025c.keys()} == NEW_IN_2026C
    assert len(ours) == 656


def test_it_differs_from_the_copy_of_2024b_as_explained(ours: Copy, copy_2024b: Copy) -> None:
    assert differences(ours, copy_2024b).keys() == EXPLAINED.keys()
    assert copy_2024b.keys() - ours.keys() == set()
    later = ours.keys() - copy_2024b.keys() - NEW_IN_2026C.keys()
    assert len(later) == NEW_IN_2025C
    assert {ours[tag]["edition"] for tag in later} == {"2025c"}


def test_a_changed_cell_is_found(ours: Copy, copy_2025c: Copy) -> None:
    changed = {**ours, "(0010,0010)": {**ours["(0010,0010)"], "basic": "K"}}

    assert differences(changed, copy_2025c) == {("(0010,0010)", "basic"): ("K", "Z")}


def test_each_row_says_of_which_edition_it_is(ours: Copy) -> None:
    assert {tag for tag, row in ours.items() if row["edition"] == "2026c"} == NEW_IN_2026C.keys()
    assert {row["edition"] for row in ours.values()} == {"2025c", "2026c"}


def test_no_option_relaxes_a_row_whose_options_are_not_known() -> None:
    rows = [row for row in standard_table().rows if row.edition == "2026c"]

    assert len(rows) == 7
    assert not any(row.options for row in rows)


def test_every_action_of_the_table_is_settled() -> None:
    assert {row.basic for row in standard_table().rows} <= RESOLVED.keys()
    said = {value for row in standard_table().rows for value in row.options.values()}
    assert said == {Action.KEEP.value, Action.CLEAN.value}


@pytest.mark.parametrize(
    ("tag", "name"),
    [
        (0x00100010, "Patient's Name"),
        (0x60003000, "Overlay Data"),
        (0x601E3000, "Overlay Data"),
        (0x60FE4000, "Overlay Comments"),
        (0x50000010, "Curve Data"),
        (0x50FE3000, "Curve Data"),
        (0x00180050, None),
        (0x60000010, None),
        (0x00091001, None),
    ],
)
def test_rows_are_found_by_tag(tag: int, name: str | None) -> None:
    found: Row | None = standard_table().find(Tag(tag))

    assert (None if found is None else found.name) == name
