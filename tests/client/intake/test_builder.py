"""A cohort is written whole or not at all."""

from __future__ import annotations

import hashlib
import os
import signal
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from client.intake.builder import CohortBuilder, ImageFile, ImageRecord, write_index
from common.cohort import IMAGES_FILE, INDEX_FILE, Cohort, CohortMeta
from common.cohort_seal import SEALED_IMAGES, SEALED_INDEX, CohortSeal
from common.errors import CohortError
from common.spec import RunSpec

RECORD = ImageRecord("p", "st", "se", "i", 0, 20, 30)
PIXELS = np.zeros((1, 16, 16), dtype=np.uint16)


@pytest.fixture
def meta(make_spec: Callable[..., RunSpec]) -> CohortMeta:
    return CohortMeta.of(make_spec(), unit="patient", source="test", created="2026-01-01")


def everything_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_finished_cohort_is_all_that_is_left_and_its_owners_alone(
    tmp_path: Path, meta: CohortMeta
) -> None:
    with CohortBuilder(tmp_path / "c", meta.shape) as builder:
        builder.add(RECORD, PIXELS)
        assert len(builder) == 1
        builder.finish(meta)

    assert everything_in(tmp_path) == ["c"]
    assert everything_in(tmp_path / "c") == ["images.u16", "index.sqlite"]
    assert stat.S_IMODE((tmp_path / "c").stat().st_mode) == 0o700
    for file in (tmp_path / "c").iterdir():
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert len(Cohort.open(tmp_path / "c")) == 1


def test_nothing_is_there_before_the_end(tmp_path: Path, meta: CohortMeta) -> None:
    with CohortBuilder(tmp_path / "c", meta.shape) as builder:
        builder.add(RECORD, PIXELS)
        with pytest.raises(CohortError, match="not a cohort"):
            Cohort.open(tmp_path / "c")
        builder.finish(meta)


def test_an_error_leaves_nothing(tmp_path: Path, meta: CohortMeta) -> None:
    def interrupted() -> None:
        with CohortBuilder(tmp_path / "c", meta.shape) as builder:
            builder.add(RECORD, PIXELS)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()

    assert everything_in(tmp_path) == []


def test_an_unfinished_cohort_leaves_nothing(tmp_path: Path, meta: CohortMeta) -> None:
    with CohortBuilder(tmp_path / "c", meta.shape) as builder:
        builder.add(RECORD, PIXELS)

    assert everything_in(tmp_path) == []


@pytest.mark.parametrize("kind", ["file", "folder", "dangling link"])
def test_an_existing_target_is_refused_and_untouched(
    tmp_path: Path, meta: CohortMeta, kind: str
) -> None:
    target = tmp_path / "c"
    if kind == "file":
        target.write_text("mine")
    elif kind == "folder":
        target.mkdir()
    else:
        target.symlink_to(tmp_path / "nowhere")

    with pytest.raises(CohortError, match="exists already"):
        CohortBuilder(target, meta.shape)

    assert everything_in(tmp_path) == ["c"]


def test_a_target_that_appears_meanwhile_is_not_overwritten(
    tmp_path: Path, meta: CohortMeta
) -> None:
    with CohortBuilder(tmp_path / "c", meta.shape) as builder:
        (tmp_path / "c").mkdir()
        (tmp_path / "c" / "mine").write_text("mine")
        with pytest.raises(CohortError, match="cannot be written"):
            builder.finish(meta)

    assert everything_in(tmp_path) == ["c"]
    assert everything_in(tmp_path / "c") == ["mine"]


@pytest.mark.parametrize(
    "pixels", [np.zeros((1, 8, 16), dtype=np.uint16), np.zeros((1, 16, 16), dtype=np.float32)]
)
def test_an_image_of_another_shape_or_type_is_refused(
    tmp_path: Path, meta: CohortMeta, pixels: np.ndarray
) -> None:
    with CohortBuilder(tmp_path / "c", meta.shape) as builder:
        with pytest.raises(CohortError, match="expected"):
            builder.add(RECORD, pixels)
        builder.finish(meta)
    assert len(Cohort.open(tmp_path / "c")) == 0


def test_a_description_of_another_shape_is_refused(tmp_path: Path, meta: CohortMeta) -> None:
    with pytest.raises(CohortError), CohortBuilder(tmp_path / "c", meta.shape) as builder:
        builder.finish(replace(meta, shape=(3, 16, 16)))

    assert everything_in(tmp_path) == []


def test_a_description_of_masks_where_there_are_none_is_refused(
    tmp_path: Path, meta: CohortMeta
) -> None:
    masks = replace(meta, kind="mask")
    with (
        pytest.raises(CohortError, match="described as mask, written for None"),
        CohortBuilder(tmp_path / "c", meta.shape) as builder,
    ):
        builder.finish(masks)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path, meta: CohortMeta) -> None:
    (tmp_path / "file").write_text("")

    with pytest.raises(CohortError, match=r"file.c: cannot be written"):
        CohortBuilder(tmp_path / "file" / "c", meta.shape)


def test_two_at_once_are_refused(tmp_path: Path, meta: CohortMeta) -> None:
    with CohortBuilder(tmp_path / "c", meta.shape) as builder:
        with pytest.raises(CohortError, match="another intake"):
            CohortBuilder(tmp_path / "c", meta.shape)
        builder.add(RECORD, PIXELS)
        builder.finish(meta)
    assert len(Cohort.open(tmp_path / "c")) == 1


KILLED = """
import sys, time
from pathlib import Path
import numpy as np
from client.intake.builder import CohortBuilder, ImageRecord
builder = CohortBuilder(Path(sys.argv[1]), (1, 16, 16))
for number in range(100):
    builder.add(ImageRecord("p", "", "", "i", 0, 1, 1), np.zeros((1, 16, 16), dtype=np.uint16))
print("ready", flush=True)
time.sleep(60)
"""


def test_what_a_killed_process_left_is_removed_by_the_next(
    tmp_path: Path, meta: CohortMeta
) -> None:
    target = tmp_path / "c"
    command = [sys.executable, "-c", KILLED, str(target)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        with pytest.raises(CohortError, match="another intake"):
            CohortBuilder(target, meta.shape)
        os.kill(process.pid, signal.SIGKILL)
    assert not target.exists()
    assert len(everything_in(tmp_path)) == 1

    with CohortBuilder(target, meta.shape) as builder:
        builder.finish(meta)

    assert everything_in(tmp_path) == ["c"]
    assert len(Cohort.open(target)) == 0


# --- What a writer that goes on is made of ------------------------------------------------------

KEY = bytes(range(32))
SEALS = [None, CohortSeal(KEY, "0" * 32)]
each_form = pytest.mark.parametrize("seal", SEALS, ids=["plain", "sealed"])


def image(number: int) -> bytes:
    return np.random.default_rng(number).integers(0, 65536, 256, dtype=np.uint16).tobytes()


def record(number: int) -> ImageRecord:
    return ImageRecord(f"p{number % 3}", "st", "se", f"i{number}", number % 2, 20, 30)


def write(folder: Path, meta: CohortMeta, count: int, seal: CohortSeal | None) -> None:
    folder.mkdir()
    images = ImageFile(folder, meta.image_bytes, seal)
    rows = [(record(number), images.append(image(number))) for number in range(count)]
    images.flush()
    images.close()
    assert write_index(folder, meta, iter(rows), seal) == count


def the_same(one: Path, other: Path, key: bytes) -> bool:
    a, b = Cohort.open(one, key), Cohort.open(other, key)
    a.verify()
    return (a.patients, a.labels.tolist(), a.images(range(len(a))).tolist()) == (
        b.patients,
        b.labels.tolist(),
        b.images(range(len(b))).tolist(),
    )


def test_the_same_rows_are_the_same_bytes(tmp_path: Path, meta: CohortMeta) -> None:
    write(tmp_path / "a", meta, 50, None)
    write(tmp_path / "b", meta, 50, None)
    write(tmp_path / "fewer", meta, 49, None)
    with CohortBuilder(tmp_path / "c", meta.shape) as builder:
        for number in range(50):
            pixels = np.frombuffer(image(number), dtype=np.uint16).reshape(meta.shape)
            builder.add(record(number), pixels)
        builder.finish(meta)

    for name in (INDEX_FILE, IMAGES_FILE):
        one, *others = ((tmp_path / cohort / name).read_bytes() for cohort in "abc")
        assert others == [one, one]
        assert (tmp_path / "fewer" / name).read_bytes() != one


@each_form
@pytest.mark.parametrize("torn", [0, 1, 100])
def test_a_file_of_images_is_gone_on_with_where_whole_images_end(
    tmp_path: Path, meta: CohortMeta, seal: CohortSeal | None, torn: int
) -> None:
    write(tmp_path / "whole", meta, 5, seal)
    folder = tmp_path / "resumed"
    folder.mkdir()
    images = ImageFile(folder, meta.image_bytes, seal)
    digests = [images.append(image(number)) for number in range(4)]
    images.close()
    file = folder / (IMAGES_FILE if seal is None else SEALED_IMAGES)
    with file.open("ab") as opened:
        opened.write(bytes(torn))  # what a killed process had begun

    images = ImageFile(folder, meta.image_bytes, seal)
    assert len(images) == 4
    images.truncate(3)
    digests[3:] = [images.append(image(number)) for number in (3, 4)]
    images.close()
    write_index(folder, meta, zip(map(record, range(5)), digests, strict=True), seal)

    assert the_same(folder, tmp_path / "whole", KEY)
    if seal is None:
        assert file.read_bytes() == (tmp_path / "whole" / IMAGES_FILE).read_bytes()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


@each_form
def test_images_that_were_lost_are_not_made_up(
    tmp_path: Path, meta: CohortMeta, seal: CohortSeal | None
) -> None:
    images = ImageFile(tmp_path, meta.image_bytes, seal)
    images.append(image(0))

    for count in (2, -1):
        with pytest.raises(CohortError, match=f"1 images, expected at least {count}"):
            images.truncate(count)
    with pytest.raises(CohortError, match=r"511 bytes; expected 512"):
        images.append(image(0)[:-1])
    assert len(images) == 1
    images.close()
    images.close()


FULL = """
import resource, signal, sys
from pathlib import Path
from client.intake.builder import ImageFile
from common.errors import CohortError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
images = ImageFile(Path(sys.argv[1]), 512)
images.append(bytes(512))
resource.setrlimit(resource.RLIMIT_FSIZE, (700, 700))
try:
    images.append(bytes(512))
except CohortError as error:
    print(error, len(images))
"""


def test_what_a_full_disk_took_of_an_image_is_cut_off_again(tmp_path: Path) -> None:
    command = [sys.executable, "-c", FULL, str(tmp_path)]

    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout

    assert "cannot be written" in said
    assert said.endswith(" 1\n")
    assert (tmp_path / IMAGES_FILE).stat().st_size == 512


@each_form
def test_an_index_is_replaced_whole(
    tmp_path: Path, meta: CohortMeta, seal: CohortSeal | None
) -> None:
    folder = tmp_path / "c"
    write(folder, meta, 3, seal)
    name = INDEX_FILE if seal is None else SEALED_INDEX
    (folder / f"{name}.partial").write_bytes(b"what a killed process left")
    before = (folder / name).read_bytes()

    def failing() -> Iterator[tuple[ImageRecord, str]]:
        yield record(0), "0" * 64
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_index(folder, meta, failing(), seal)
    assert (folder / name).read_bytes() == before
    images = ImageFile(folder, meta.image_bytes, seal)
    images.truncate(1)
    images.close()
    write_index(folder, meta, [(record(0), hashlib.sha256(image(0)).hexdigest())], seal)

    assert len(Cohort.open(folder, KEY)) == 1
    assert not list(folder.glob("*.partial"))


def test_a_sealed_cohort_is_never_plain_on_the_disk_while_it_is_written(
    tmp_path: Path, meta: CohortMeta
) -> None:
    pixels = np.frombuffer(image(0), dtype=np.uint16).reshape(meta.shape)
    marked = replace(RECORD, patient="pseudonym-of-somebody")

    def found() -> set[bytes]:
        files = [file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()]
        return {told for told in secrets if any(told in content for content in files)}

    secrets = {b"pseudonym-of-somebody", image(0)}

    for key, name, expected in ((KEY, "sealed", set()), (None, "plain", secrets)):
        with CohortBuilder(tmp_path / name, meta.shape, key) as builder:
            for _ in range(20_000):  # more than SQLite keeps to itself
                builder.add(marked, pixels)
            assert found() == expected
            builder.finish(meta)
        assert found() == expected
