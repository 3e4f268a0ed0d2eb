"""ZIPs: every member is read as it is or refused with a reason, and nothing is written."""

from __future__ import annotations

import io
import pickle
import random
import resource
import shutil
import struct
import subprocess
import sys
import time
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from pydicom import dcmread

from client.intake.archive import MemberItem
from client.intake.items import Listing, listed
from common.errors import IntakeError

LIMIT = 2**20
NOISE = random.Random(1).randbytes(3000)  # noqa: S311


class Entry(NamedTuple):
    """A member as a ZIP written by hand has it; what is None is what is true."""

    name: bytes
    data: bytes = b""
    method: int = 0
    flags: int = 0
    crc: int | None = None
    size: int | None = None
    packed_size: int | None = None
    start: int | None = None
    extra: bytes = b""
    mode: int = 0


def packed(entry: Entry) -> bytes:
    deflater = zlib.compressobj(9, zlib.DEFLATED, -15)
    if entry.method == zipfile.ZIP_DEFLATED:
        return deflater.compress(entry.data) + deflater.flush()
    return entry.data


def forged(*entries: Entry, claim: int | None = None) -> bytes:
    """A ZIP of any claims (APPNOTE 4.3)."""
    body, directory = bytearray(), bytearray()
    for entry in entries:
        start = len(body) if entry.start is None else entry.start
        data = packed(entry)
        sizes = (
            zlib.crc32(entry.data) if entry.crc is None else entry.crc,
            len(data) if entry.packed_size is None else entry.packed_size,
            len(entry.data) if entry.size is None else entry.size,
        )
        head = (20, entry.flags, entry.method, 0, 0x21, *sizes, len(entry.name), len(entry.extra))
        if entry.start is None:
            body += struct.pack("<4s5H3I2H", b"PK\3\4", *head) + entry.name + entry.extra + data
        mode = (entry.mode << 16, start)
        made_by = 3 << 8 | 20
        directory += struct.pack("<4s6H3I5H2I", b"PK\1\2", made_by, *head, 0, 0, 0, *mode)
        directory += entry.name + entry.extra
    count = min(len(entries) if claim is None else claim, 0xFFFF)
    end = struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, count, count, len(directory), len(body), 0)
    return bytes(body + directory + end)


Look = Callable[[bytes], Listing]


@pytest.fixture
def look(tmp_path: Path) -> Look:
    """The listing of an archive given as bytes."""

    def _look(data: bytes) -> Listing:
        path = tmp_path / "study.zip"
        path.write_bytes(data)
        return listed(path)

    return _look


def by_zipfile(**members: Any) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return buffer.getvalue()


def zipped(made: Path, folder: Path, *options: str) -> Path:
    """A folder, by the `zip` program."""
    if shutil.which("zip") is None:
        pytest.skip("the program zip is not there; this test reads what it writes")
    subprocess.run(["zip", "-qr", *options, made, "."], cwd=folder, check=True)
    return made


def outcome(listing: Listing, limit: int = LIMIT) -> dict[str, bytes | str]:
    """Of each place the bytes, or the reason why there are none."""
    found: dict[str, bytes | str] = {one.what: one.reason for one in listing.unusable}
    for item in listing.items:
        try:
            found[item.place] = item.open(limit).read()
        except IntakeError as error:
            found[item.place] = str(error)
    return found


def test_the_forger_is_an_honest_writer_when_nothing_is_forged(look: Look) -> None:
    data = forged(Entry(b"a", NOISE), Entry(b"d/b", NOISE * 9, zipfile.ZIP_DEFLATED), Entry(b"e/"))

    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        assert archive.testzip() is None
    assert outcome(look(data)) == {"a": NOISE, "d/b": NOISE * 9}


@pytest.mark.parametrize("options", [["-0"], ["-9"], ["-fd"], ["-fz"]], ids=str)
def test_archives_of_the_zip_program_have_the_bytes_of_their_files(
    tmp_path: Path, shared_data: Path, options: list[str]
) -> None:
    folder = shared_data / "dicom" / "highdicom"

    listing = listed(zipped(tmp_path / "study.zip", folder, *options))

    assert not listing.unusable
    assert outcome(listing, 2**27) == {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*.dcm")
    }


@pytest.mark.parametrize(
    ("options", "reason"),
    [(["-P", "secret"], "encrypted within the ZIP"), (["-Z", "bzip2"], "by method 12,")],
)
def test_what_else_the_zip_program_makes_is_unusable(
    tmp_path: Path, options: list[str], reason: str
) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "x").write_bytes(NOISE * 9)

    listing = listed(zipped(tmp_path / "study.zip", tmp_path / "folder", *options))

    assert not listing.items
    assert reason in listing.unusable[0].reason


def test_a_member_is_decoded_as_its_file_is(tmp_path: Path, shared_data: Path) -> None:
    film = shared_data / "dicom" / "highdicom" / "ct_image.dcm"
    with zipfile.ZipFile(tmp_path / "x.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.write(film, "MÜLLER^ANNA/1")

    (item,) = listed(tmp_path / "x.zip").items
    stream = pickle.loads(pickle.dumps(item)).open(LIMIT)  # noqa: S301

    assert item.place == "MÜLLER^ANNA/1"
    assert stream.seekable()
    np.testing.assert_array_equal(dcmread(stream).pixel_array, dcmread(film).pixel_array)


def test_a_member_beyond_the_limit_names_it_and_the_way_out(look: Look) -> None:
    listing = look(by_zipfile(small=b"x" * 1000, large=b"x" * 1001))

    found = outcome(listing, limit=1000)

    assert found["small"] == b"x" * 1000
    assert "1001 bytes" in str(found["large"])
    assert "at most 1000" in str(found["large"])
    assert "unpack the ZIP" in str(found["large"])


BOMB = """
import resource, sys
from pathlib import Path
from client.intake.items import listed
from common.errors import IntakeError
(item,) = listed(Path(sys.argv[1])).items
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    item.open(2**22)
except IntakeError as error:
    print(error)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


@pytest.mark.parametrize("claim", [None, 1000, 2**22], ids=["honest", "small", "the limit"])
def test_a_bomb_takes_no_more_memory_than_the_limit(tmp_path: Path, claim: int | None) -> None:
    deflater = zlib.compressobj(9, zlib.DEFLATED, -15)
    bomb = b"".join(deflater.compress(bytes(2**20)) for _ in range(256)) + deflater.flush()
    entry = Entry(b"bomb", bomb, crc=1, size=2**28 if claim is None else claim)
    data = forged(entry).replace(b"\0\0\x21\0", b"\0\0\x21\0")
    data = data.replace(struct.pack("<4H", 20, 0, 0, 0), struct.pack("<4H", 20, 0, 8, 0))
    path = tmp_path / "bomb.zip"
    path.write_bytes(data)
    assert len(data) < 300_000

    done = subprocess.run(
        [sys.executable, "-c", BOMB, path], capture_output=True, text=True, check=True
    )
    reason, mebibytes = done.stdout.splitlines()

    assert ("at most 4194304" if claim is None else "damaged within the ZIP") in reason
    assert int(mebibytes) < 40


@pytest.mark.parametrize(
    "lie",
    [
        {"size": 2999},
        {"size": 3001},
        {"size": 0},
        {"crc": 5},
        {"packed_size": 2000},
        {"method": zipfile.ZIP_DEFLATED, "size": 2999, "crc": zlib.crc32(NOISE[:2999])},
        {"method": zipfile.ZIP_DEFLATED, "size": 3001},
        {"method": zipfile.ZIP_DEFLATED, "packed_size": 1000},
    ],
    ids=str,
)
def test_sizes_that_lie_are_refused(look: Look, lie: dict[str, Any]) -> None:
    listing = look(forged(Entry(b"lie", NOISE)._replace(**lie), Entry(b"true", NOISE)))

    found = outcome(listing)

    assert "damaged within the ZIP" in str(found["lie"])
    assert found["true"] == NOISE


def test_members_that_share_bytes_are_refused_and_the_others_are_not(look: Look) -> None:
    first = Entry(b"a" * 8, NOISE)
    start = len(forged(first)) - 22 - 46 - 8  # its header and bytes
    listing = look(
        forged(
            first,
            Entry(b"b" * 8, NOISE),
            Entry(b"c" * 8, NOISE, start=start),  # the same as b
            Entry(b"d" * 8, NOISE, start=start + 200, packed_size=100),  # a part of b
            Entry(b"e" * 8, NOISE, start=2**31),
            Entry(b"f" * 8, NOISE),
        )
    )

    found = outcome(listing)

    assert found["a" * 8] == found["f" * 8] == NOISE
    for letter in "bcde":
        assert "shares bytes with another member" in str(found[letter * 8])


def test_a_member_whose_own_header_reaches_into_the_next_is_refused(look: Look) -> None:
    data = forged(Entry(b"a", NOISE, extra=bytes(50)), Entry(b"b", NOISE))
    reaching = bytearray(data)
    reaching[28:30] = struct.pack("<H", 150)  # the length of its extra field

    assert outcome(look(data)) == {"a": NOISE, "b": NOISE}
    assert "shares bytes" in str(outcome(look(bytes(reaching)))["a"])


def test_a_member_without_a_header_of_its_own_is_refused(look: Look) -> None:
    data = forged(Entry(b"a", NOISE), Entry(b"b", NOISE))
    at = data.rindex(b"PK\3\4")

    found = outcome(look(data[:at] + b"PK\5\4" + data[at + 4 :]))

    assert found["a"] == NOISE
    assert "damaged within the ZIP" in str(found["b"])


def test_the_same_name_twice_is_two_items(look: Look) -> None:
    listing = look(forged(Entry(b"x", b"1"), Entry(b"x", b"2"), Entry(b"x (2)", b"3")))

    assert outcome(listing) == {"x": b"1", "x (2)": b"2", "x (2) (2)": b"3"}


def test_names_that_lead_elsewhere_lead_nowhere(
    look: Look, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [b"../../escaped", b"/etc/passwd", b"C:\\x", b"..\\y", b"a\0.dcm", b"", b"\x1b[2J\n"]
    inside = tmp_path / "x" / "y"
    inside.mkdir(parents=True)
    before = set(tmp_path.rglob("*"))

    monkeypatch.chdir(inside)
    listing = look(forged(*(Entry(name, b"%d" % n) for n, name in enumerate(names))))
    found = outcome(listing)

    assert set(found.values()) == {b"%d" % number for number in range(len(names))}
    assert set(tmp_path.rglob("*")) - before == {tmp_path / "study.zip"}
    assert all(item.archive == tmp_path / "study.zip" for item in listing.items)  # type: ignore[attr-defined]


def test_names_in_odd_encodings_have_places_of_their_own(look: Look) -> None:
    names = ["Müller".encode("latin-1"), "Müller".encode("cp437"), "山田".encode("shift-jis")]
    entries = [Entry(name, name) for name in names]
    modern = Entry("山田".encode(), b"utf-8", flags=0x800)

    found = outcome(look(forged(*entries, modern)))

    assert len(found) == 4
    assert found["Müller"] == "Müller".encode("cp437")
    assert found["山田"] == b"utf-8"


def test_a_name_that_is_not_in_the_encoding_that_it_says(look: Look) -> None:
    with pytest.raises(IntakeError, match="directory is damaged"):
        look(forged(Entry(b"\xff\xfe", b"x", flags=0x800)))


@pytest.mark.parametrize(
    ("entry", "reason"),
    [
        (Entry(b"x", NOISE, flags=1), "encrypted within the ZIP"),
        (Entry(b"x", NOISE, flags=0x41), "encrypted within the ZIP"),
        (Entry(b"x", NOISE, flags=0x2000), "encrypted within the ZIP"),
        (Entry(b"x", NOISE, method=9), "compressed by method 9,"),
        (Entry(b"x", NOISE, method=12), "compressed by method 12,"),
        (Entry(b"x", NOISE, method=14), "compressed by method 14,"),
        (Entry(b"X.Zip", by_zipfile(y=b"y")), "a ZIP within a ZIP"),
        (Entry(b"x", b"/etc/passwd", mode=0o120777), "not a regular file"),
        (Entry(b"x", b"", mode=0o010644), "not a regular file"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_be_read_of_a_zip_is_unusable(look: Look, entry: Entry, reason: str) -> None:
    listing = look(forged(entry, Entry(b"good", NOISE)))

    assert [item.place for item in listing.items] == ["good"]
    assert reason in listing.unusable[0].reason
    assert outcome(listing)["good"] == NOISE


def test_a_folder_that_has_bytes_is_no_folder(look: Look) -> None:
    assert outcome(look(forged(Entry(b"hidden/", b"x"), Entry(b"plain/")))) == {"hidden/": b"x"}


def test_an_archive_with_something_before_it(look: Look) -> None:
    # Self-extracting archives have a program there.
    assert outcome(look(b"#!/bin/sh\n" * 99 + by_zipfile(x=NOISE))) == {"x": NOISE}


def test_an_empty_archive_has_no_items(look: Look) -> None:
    assert look(forged()) == Listing(())


def test_a_small_file_that_says_it_has_a_million_members(look: Look) -> None:
    started = time.process_time()

    assert outcome(look(forged(Entry(b"x", b"1"), claim=1_000_000))) == {"x": b"1"}
    assert time.process_time() - started < 5


def test_a_hundred_thousand_names_of_the_same_bytes_are_no_items(look: Look) -> None:
    entries = [Entry(b"%d" % number, start=0, size=2**19, packed_size=9) for number in range(10**5)]
    started = time.process_time()

    listing = look(forged(Entry(b"x", NOISE), *entries))

    assert not listing.items
    assert len(listing.unusable) == 100_001
    assert time.process_time() - started < 60


def test_a_directory_of_gigabytes_is_not_read(tmp_path: Path) -> None:
    size, path = 2**33, tmp_path / "huge.zip"
    with path.open("wb") as file:
        file.write(b"PK\1\2")
        file.truncate(size)  # a hole: it takes no place on the disk
        file.seek(size)
        file.write(struct.pack("<4sQ2H2I4Q", b"PK\6\6", 44, 45, 45, 0, 0, 1, 1, size, 0))
        file.write(struct.pack("<4sIQI", b"PK\6\7", 0, size, 1))
        file.write(
            struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, 0xFFFF, 0xFFFF, 2**32 - 1, 2**32 - 1, 0)
        )
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    with pytest.raises(IntakeError, match=r"8589934592 bytes; at most 134217728"):
        listed(path)

    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**18  # KiB


def test_an_archive_cut_anywhere_is_refused_or_whole(look: Look) -> None:
    data = by_zipfile(a=NOISE, b=NOISE * 2)
    whole = outcome(look(data))
    assert len(whole) == 2

    for length in [*range(2, 60), *range(60, len(data), 101), *range(len(data) - 60, len(data))]:
        with pytest.raises(IntakeError, match="cut short"):
            look(data[:length])


def test_no_change_of_a_byte_breaks_more_than_a_reason(look: Look) -> None:
    data = forged(Entry(b"a", NOISE[:100], 8), Entry(b"b", NOISE[:50]), Entry(b"c", NOISE[:50], 8))
    honest = {NOISE[:100], NOISE[:50]}
    refused = 0
    for at in range(len(data)):
        for mask in (0x01, 0x80, 0xFF):
            changed = bytearray(data)
            changed[at] ^= mask
            try:
                found = outcome(look(bytes(changed)))
            except IntakeError:
                refused += 1
                continue
            bad = [one for one in found.values() if isinstance(one, bytes) and one not in honest]
            assert not bad, at
            refused += any(isinstance(one, str) for one in found.values())
    assert refused > 300


def test_an_archive_that_changes_after_it_was_listed(look: Look, tmp_path: Path) -> None:
    listing = look(by_zipfile(a=NOISE))
    path = tmp_path / "study.zip"
    path.write_bytes(path.read_bytes()[:100])
    assert "damaged" in str(outcome(listing)["a"])

    path.unlink()
    assert "cannot be read (No such file or directory)" in str(outcome(listing)["a"])


def test_an_item_of_an_archive_is_small(look: Look) -> None:
    (item,) = look(by_zipfile(a=NOISE)).items

    assert isinstance(item, MemberItem)
    assert not hasattr(item, "__dict__")
    assert len(pickle.dumps(item)) < 400
