"""Label tables: what is read, and what is refused with file and line."""

from __future__ import annotations

from pathlib import Path

import pytest

from client.intake.labels import DICOM_KEYS, LabelTable, read_labels
from common.errors import ConfigError
from common.spec import Task
from common.task_sections import Classification, Reconstruction

BINARY = Classification(kind="binary", classes=("normal", "finding"))
MANY = Classification(kind="multilabel", classes=("effusion", "nodule", "mass"))


def read(tmp_path: Path, text: str, task: Task = BINARY) -> LabelTable:
    path = tmp_path / "labels.csv"
    path.write_bytes(text.encode("utf-8"))
    return read_labels(path, task)


@pytest.mark.parametrize("key", DICOM_KEYS)
def test_the_header_names_the_key(tmp_path: Path, key: str) -> None:
    table = read(tmp_path, f"{key},label\n1.2,finding\n1.3,normal\n")

    assert table.key == key
    assert {name: entry.label for name, entry in table.entries.items()} == {"1.2": 1, "1.3": 0}
    assert [entry.line for entry in table.entries.values()] == [2, 3]


def test_spaces_blank_lines_a_byte_order_mark_and_other_columns_do_no_harm(tmp_path: Path) -> None:
    table = read(tmp_path, '\ufeffPatientID , note,label\r\n\r\n a ,"x, y", normal \r\n,,\r\n')

    assert list(table.entries) == ["a"]


def test_splits(tmp_path: Path) -> None:
    table = read(tmp_path, "PatientID,label,split\na,normal,train\nb,normal,\nc,finding,test\n")

    assert [entry.split for entry in table.entries.values()] == ["train", "", "test"]


def test_multilabel_has_a_column_for_each_class(tmp_path: Path) -> None:
    table = read(tmp_path, "PatientID,mass,nodule,effusion\na,1,0,0\nb,0,0,0\n", MANY)

    assert [entry.label for entry in table.entries.values()] == [(0, 0, 1), (0, 0, 0)]


def test_the_same_line_twice_is_one_label(tmp_path: Path) -> None:
    table = read(tmp_path, "PatientID,label\na,normal\nb,finding\na,normal\n")

    assert len(table.entries) == 2


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("", r"labels.csv:1: the header is nothing"),
        ("PatientID,label\n", r"labels.csv: has a header and no line"),
        ("PatientID,label\n\n,\n", r"labels.csv: has a header and no line"),
        (
            "Patient,label\na,normal\n",
            r":1: the header is 'Patient', 'label'; expected exactly one",
        ),
        ("PatientID;label\na;normal\n", r"separated by commas"),
        ("PatientID,StudyInstanceUID,label\na,b,normal\n", r":1: .*exactly one of PatientID"),
        ("PatientID,diagnosis\na,normal\n", r":1: column 'label' is missing"),
        ("PatientID,label,label\na,normal,finding\n", r":1: column 'label' stands there twice"),
        ("PatientID,label\na,normal\nb,Normal\n", r":3: label 'Normal' is unknown.*'normal'"),
        ("PatientID,label\na,\n", r":2: the label is empty"),
        ("PatientID,label\n ,normal\n", r":2: PatientID is empty"),
        ("PatientID,label\na,normal\n\nb,normal\na,finding\n", r":5: PatientID 'a'.*line 2"),
        ("PatientID,label,split\na,normal,train\na,normal,test\n", r":3: .*another split"),
        ("PatientID,label,split\na,normal,dev\n", r":2: split 'dev' is unknown"),
        ("PatientID,label\na,normal,more\n", r":2: has not as many values"),
        ("PatientID,label,split\na,normal\n", r":2: has not as many values"),
        ('PatientID,label\na,"normal\n', r"cannot be read as a CSV"),
    ],
)
def test_refuses_with_file_and_line(tmp_path: Path, text: str, error: str) -> None:
    with pytest.raises(ConfigError, match=error):
        read(tmp_path, text)


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("PatientID,effusion,mass\na,0,1\n", r":1: column 'nodule' is missing"),
        ("PatientID,effusion,nodule,mass\na,0,yes,1\n", r":2: column 'nodule' has 'yes'"),
        ("PatientID,effusion,nodule,mass\na,0,,1\n", r":2: column 'nodule' has ''"),
    ],
)
def test_refuses_multilabel_with_file_and_line(tmp_path: Path, text: str, error: str) -> None:
    with pytest.raises(ConfigError, match=error):
        read(tmp_path, text, MANY)


def test_names_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.csv: cannot be read"):
        read_labels(tmp_path / "nowhere.csv", BINARY)


def test_names_a_file_that_is_not_text(tmp_path: Path) -> None:
    path = tmp_path / "labels.csv"
    path.write_bytes(b"PatientID,label\n\xff\xfe,normal\n")

    with pytest.raises(ConfigError, match=r"labels\.csv: cannot be read as a CSV in UTF-8"):
        read_labels(path, BINARY)


def test_a_task_without_labels_needs_no_label_column(tmp_path: Path) -> None:
    task = Reconstruction(name="reconstruction")
    table = read(tmp_path, "PatientID,split\nA,train\nB,\n", task)
    assert {name: (entry.label, entry.split) for name, entry in table.entries.items()} == {
        "A": (0, "train"),
        "B": (0, ""),
    }
    with pytest.raises(ConfigError, match="'label' is missing"):
        read(tmp_path, "PatientID,split\nA,train\n", BINARY)
