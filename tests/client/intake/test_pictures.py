"""Folders of PNG and JPEG: as they are shown, within the folder, and never a bomb."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from client.intake.keys import SiteKey
from client.intake.pictures import Pictures
from client.intake.run import IntakeSummary, intake
from common.cohort import Cohort
from common.spec import RunSpec

GREY = np.random.default_rng(0).integers(0, 256, (16, 16), dtype=np.uint8)
Take = Callable[..., tuple[Cohort, dict[str, str], IntakeSummary]]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "pictures"
    (path / "deep").mkdir(parents=True)
    return path


@pytest.fixture
def take(tmp_path: Path, folder: Path, make_spec: Callable[..., RunSpec]) -> Take:
    def _take(csv: str, **changes: Any) -> tuple[Cohort, dict[str, str], IntakeSummary]:
        (tmp_path / "labels.csv").write_text(csv)
        run = make_spec(**changes)
        source = Pictures.of(folder, tmp_path / "labels.csv", run, SiteKey.random())
        summary = intake(source, tmp_path / "cohort", run)
        reasons = {item.what.partition(" (")[0]: item.reason for item in summary.not_used}
        return Cohort.open(tmp_path / "cohort"), reasons, summary

    return _take


def test_grey_colour_and_deep_pictures(folder: Path, take: Take) -> None:
    deep = GREY.astype(np.uint16) * 257
    colour = np.stack([GREY, GREY, GREY], axis=-1)
    for name, pixels in (("grey", GREY), ("deep", deep), ("colour", colour)):
        Image.fromarray(pixels).save(folder / f"{name}.png")
    Image.fromarray(GREY).convert("P").save(folder / "palette.png")
    Image.fromarray(GREY).convert("LA").save(folder / "alpha.png")
    names = ("grey", "deep", "colour", "palette", "alpha")

    cohort, reasons, _ = take("file,label\n" + "".join(f"{name}.png,normal\n" for name in names))

    assert reasons == {}
    assert cohort.unit == "image"
    for image in cohort.images(range(5))[:, 0]:
        np.testing.assert_allclose(image, GREY / 255, atol=1e-4)


def test_with_a_patient_column_the_unit_is_the_patient(folder: Path, take: Take) -> None:
    for name in ("a.png", "b.jpg", "deep/c.JPEG", "d.png"):
        Image.fromarray(GREY).save(folder / name)

    cohort, reasons, _ = take(
        "file,label,patient,split\na.png,normal,P1,train\nb.jpg,finding,P1,train\n"
        "deep/c.JPEG,normal,P2,test\nd.png,normal,,test\n"
    )

    assert (cohort.unit, len(cohort), len(cohort.patients)) == ("patient", 3, 2)
    assert sorted(cohort.splits) == ["test", "train", "train"]
    assert reasons == {"d.png": "no patient identifier"}


def marked(text: str, path: Path) -> None:
    """A picture with a text in it, as `cloister generate` writes its own."""
    marks = PngInfo()
    marks.add_text("Comment", text)
    Image.fromarray(GREY).save(path, pnginfo=marks)


def behind_its_pixels(path: Path) -> None:
    """Move the text of a PNG behind its pixels, where other programs put it."""
    raw, chunks, at = path.read_bytes(), list[bytes](), 8
    while at < len(raw):
        end = at + 12 + int.from_bytes(raw[at : at + 4])
        chunks.append(raw[at:end])
        at = end
    last = sorted(chunks, key=lambda chunk: (chunk[4:8] == b"IEND", chunk[4:8] == b"tEXt"))
    assert last != chunks
    path.write_bytes(raw[:8] + b"".join(last))


def test_a_picture_that_says_that_it_is_synthetic_is_no_patient_s(folder: Path, take: Take) -> None:
    for name, text in (
        ("made.png", "synthetic; my-run"),
        ("late.png", "Synthetic; my-run"),
        ("bare.png", "synthetic"),
        ("real.png", "no synthetic image; checked"),
    ):
        marked(text, folder / name)
    behind_its_pixels(folder / "late.png")
    Image.fromarray(GREY).save(folder / "stored.jpg", comment="synthetic; my-run")
    names = ("made.png", "late.png", "bare.png", "real.png", "stored.jpg")

    cohort, reasons, _ = take("file,label\n" + "".join(f"{name},normal\n" for name in names))

    assert len(cohort) == 1
    assert set(reasons) == set(names) - {"real.png"}
    assert all("name the cohort that `cloister generate` wrote" in r for r in reasons.values())


def bomb(width: int, height: int) -> bytes:
    """A PNG of a few hundred bytes that says it is huge."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        body = kind + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    pixels = zlib.compress(bytes(10_000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels)


def test_everything_else_has_a_reason(folder: Path, tmp_path: Path, take: Take) -> None:
    Image.fromarray(GREY).save(folder / "good.png")
    Image.fromarray(GREY).save(folder / "unlabelled.png")
    Image.fromarray(GREY).save(tmp_path / "outside.png")
    Image.fromarray(GREY).save(folder / "other.gif")
    (folder / "text.png").write_text("no picture")
    (folder / "cut.png").write_bytes((folder / "good.png").read_bytes()[:100])
    (folder / "large.png").write_bytes(bomb(9000, 9000))
    (folder / "bomb.png").write_bytes(bomb(60_000, 60_000))
    outside = ("../outside.png", str(tmp_path / "outside.png"))
    broken = ("other.gif", "text.png", "cut.png", "large.png", "bomb.png")
    names = ("good.png", "missing.png", *outside, *broken)

    cohort, reasons, _ = take("file,label\n" + "".join(f"{name},normal\n" for name in names))

    assert len(cohort) == 1
    assert reasons.pop("unlabelled.png").startswith("no label: ")
    assert reasons.pop("missing.png").startswith("label without a picture")
    for name in outside:
        assert reasons.pop(name).startswith("it lies outside the folder")
    assert reasons.pop("large.png").startswith("it has 9000 x 9000 pixels")
    assert reasons.pop("other.gif") == reasons.pop("text.png") == "it is neither PNG nor JPEG"
    assert reasons.pop("cut.png").startswith("it cannot be read")
    assert reasons.pop("bomb.png").startswith("it cannot be read (DecompressionBomb")
    assert reasons == {}


def test_a_name_that_no_file_can_have_and_a_linked_folder_have_a_reason(
    folder: Path, tmp_path: Path, take: Take
) -> None:
    Image.fromarray(GREY).save(folder / "good.png")
    (tmp_path / "archive").mkdir()
    (folder / "archive").symlink_to(tmp_path / "archive")
    long = "a" * 300 + ".png"

    cohort, reasons, _ = take(f"file,label\ngood.png,normal\n{long},normal\n")

    assert len(cohort) == 1
    assert reasons.pop(long) == "label without a picture: File name too long"
    assert reasons.pop("archive").startswith("a link to a folder")
    assert reasons == {}


def test_a_picture_is_turned_upright(folder: Path, take: Take) -> None:
    upright = np.zeros((16, 16), dtype=np.uint8)
    upright[:8] = 255
    exif = Image.Exif()
    exif[0x0112] = 3
    Image.fromarray(upright[::-1, ::-1]).save(folder / "x.jpg", exif=exif, quality=100)

    cohort, _, _ = take("file,label\nx.jpg,normal\n")

    np.testing.assert_allclose(cohort.images([0])[0, 0], upright / 255, atol=0.05)


def test_names_and_patients_are_not_in_the_cohort(folder: Path, take: Take) -> None:
    Image.fromarray(GREY).save(folder / "Mustermann_Erika.png")

    cohort, _, _ = take("file,label,patient\nMustermann_Erika.png,normal,MRN-4711\n")

    content = (cohort.path / "index.sqlite").read_bytes()
    assert b"Mustermann" not in content
    assert b"MRN-4711" not in content
