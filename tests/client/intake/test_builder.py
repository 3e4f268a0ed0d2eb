"""A cohort is written whole or not at all."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from client.intake.builder import CohortBuilder, ImageRecord
from common.cohort import Cohort, CohortMeta
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
