"""What a source holds: folders, ZIPs within them, and what nobody can look into."""

from __future__ import annotations

import io
import os
import pickle
import socket
import subprocess
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydicom import dcmread

from client.intake.items import FileItem, Item, listed, walk
from common.errors import IntakeError

LIMIT = 2**20


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A folder with a file, a file below it, and a DICOMDIR."""
    folder = tmp_path / "source"
    (folder / "a" / "b").mkdir(parents=True)
    (folder / "one").write_bytes(b"1")
    (folder / "a" / "b" / "two.dcm").write_bytes(b"22")
    (folder / "a" / "DICOMDIR").write_bytes(b"it lists")
    return folder


def contents(items: tuple[Item, ...]) -> dict[str, bytes]:
    return {item.place: item.open(LIMIT).read() for item in items}


def put_zip(path: Path, **members: bytes) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return path


def test_a_folder_gives_its_files_at_any_depth_but_no_dicomdir(source: Path) -> None:
    listing = listed(source)

    assert contents(listing.items) == {"one": b"1", "a/b/two.dcm": b"22"}
    assert not listing.unusable


def test_a_zip_in_a_folder_gives_its_members(source: Path) -> None:
    put_zip(source / "a" / "Export.ZIP", two=b"not that two", DICOMDIR=b"it lists")

    assert contents(listed(source).items) == {
        "one": b"1",
        "a/b/two.dcm": b"22",
        "a/Export.ZIP!two": b"not that two",
    }


def test_a_broken_zip_in_a_folder_leaves_the_others(source: Path) -> None:
    whole = put_zip(source / "good.zip", x=b"x").read_bytes()
    (source / "cut.zip").write_bytes(whole[:-30])

    listing = listed(source)

    assert "good.zip!x" in contents(listing.items)
    assert [one.what for one in listing.unusable] == ["cut.zip"]
    assert "damaged, cut short" in listing.unusable[0].reason


def test_dicom_that_is_called_a_zip_is_read_as_what_it_is(source: Path, film: object) -> None:
    film().save_as(source / "film.zip", enforce_file_format=True)  # type: ignore[operator]

    (item,) = (item for item in listed(source).items if item.place == "film.zip")

    assert dcmread(item.open(LIMIT)).PatientID == "P1"


def test_a_file_that_has_the_place_of_a_member_does_not_take_it_away(source: Path) -> None:
    put_zip(source / "x.zip", one=b"member")
    (source / "x.zip!one").write_bytes(b"file")
    (source / "x.zip!one (2)").write_bytes(b"another file")

    found = contents(listed(source).items)

    assert sorted(name for name in found if name.startswith("x.zip")) == [
        "x.zip!one",
        "x.zip!one (2)",
        "x.zip!one (3)",
    ]
    assert found["x.zip!one"] == b"file"
    assert found["x.zip!one (3)"] == b"member"


def test_what_is_no_file_is_unusable_and_says_why(source: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "secret").write_bytes(b"secret")
    (source / "link").symlink_to(elsewhere, target_is_directory=True)
    (source / "up").symlink_to(source, target_is_directory=True)
    (source / "dangling").symlink_to("nowhere")
    (source / "round").symlink_to("round")
    os.mkfifo(source / "pipe")
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(os.fspath(source / "socket"))
    listener.close()

    listing = listed(source)

    assert {item.place for item in listing.items} == {"one", "a/b/two.dcm"}
    reasons = {one.what: one.reason for one in listing.unusable}
    assert set(reasons) == {"link", "up", "dangling", "round", "pipe", "socket"}
    assert "nobody looked into it" in reasons["link"]
    assert "nobody looked into it" in reasons["up"]
    assert {reasons[name] for name in ("dangling", "round", "pipe", "socket")} == {
        "not a regular file"
    }


def test_a_link_to_a_file_is_that_file(source: Path) -> None:
    (source / "also").symlink_to("one")

    assert contents(listed(source).items)["also"] == b"1"


def test_a_folder_that_cannot_be_listed_is_unusable(
    source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scan = os.scandir

    def refuse(path: Path) -> object:
        # Whoever runs the tests may be root, whom no mode stops.
        if Path(path).name == "b":
            raise PermissionError(13, "Permission denied", os.fspath(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)
    listing = listed(source)

    assert [one.what for one in listing.unusable] == ["a/b"]
    assert "cannot be listed" in listing.unusable[0].reason
    assert set(walk(source)) == {source / "one", source / "a" / "b"}


@pytest.fixture
def deep(tmp_path: Path) -> Iterator[Path]:
    """A folder that is taken away again without recursion."""
    folder = tmp_path / "deep"
    folder.mkdir()
    yield folder
    subprocess.run(["rm", "-rf", folder], check=True)


def test_folders_deeper_than_pythons_stack(deep: Path) -> None:
    top = here = os.open(deep, os.O_RDONLY | os.O_DIRECTORY)
    for _ in range(1500):
        os.mkdir("d", dir_fd=here)
        below = os.open("d", os.O_RDONLY | os.O_DIRECTORY, dir_fd=here)
        if here != top:
            os.close(here)
        here = below
    with os.fdopen(os.open("f", os.O_WRONLY | os.O_CREAT, dir_fd=here), "wb") as file:
        file.write(b"deep")
    os.close(here)
    os.close(top)

    assert contents(listed(deep).items) == {"d/" * 1500 + "f": b"deep"}


def test_names_that_are_no_text(source: Path) -> None:
    name = os.fsdecode(b"M\xfcller\x1b[2J\n")
    (source / name).write_bytes(b"x")

    found = {item.place: item for item in listed(source).items}

    assert pickle.loads(pickle.dumps(found[name])).open(LIMIT).read() == b"x"  # noqa: S301


@pytest.mark.parametrize("kind", ["nothing", "text", "pipe", "named DICOMDIR"])
def test_a_source_of_no_kind_that_is_read_is_refused(tmp_path: Path, kind: str) -> None:
    path = tmp_path / ("DICOMDIR" if kind == "named DICOMDIR" else "thing")
    if kind == "pipe":
        os.mkfifo(path)
    elif kind != "nothing":
        path.write_bytes(b"no DICOM")

    with pytest.raises(IntakeError, match=r"expected a folder of DICOM files, a ZIP, or a DICOMD"):
        listed(path)


def test_an_item_is_small_and_opens_when_it_is_asked(source: Path) -> None:
    (item,) = (item for item in listed(source).items if item.place == "one")
    sent = pickle.loads(pickle.dumps(item))  # noqa: S301

    assert isinstance(sent, FileItem)
    assert sent == item
    assert len(pickle.dumps(item)) < 400
    (source / "one").unlink()
    with pytest.raises(IntakeError, match="cannot be opened"):
        sent.open(LIMIT)


def test_one_read_of_a_file_is_bounded(source: Path) -> None:
    (source / "one").write_bytes(b"x" * 100)
    (item,) = (item for item in listed(source).items if item.place == "one")

    with item.open(50) as stream:
        assert stream.read(50) == b"x" * 50
        stream.seek(0, io.SEEK_SET)
        with pytest.raises(IntakeError, match="100 bytes; at most 50"):
            stream.read()
