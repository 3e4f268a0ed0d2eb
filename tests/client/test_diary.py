"""The hospital's own pages: what was trained here, round by round, on this disk alone."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from client.diary import Diary, Page
from client.training import LocalResult
from common.errors import ConfigError

RUN = "a" * 64


def page(number: int, loss: float = 0.7) -> Page:
    result = LocalResult({}, None, loss, (3, 5), 1)
    return Page.of(number, "2026-01-01T00:00:00.000+00:00", 1.5, result)


def test_pages_come_back_as_they_were_written(tmp_path: Path):
    pages = [page(1), page(2, float("nan")), page(3, 0.5)]
    for one in pages:
        Diary(tmp_path / "runs").add(RUN, one)
    assert Diary(tmp_path / "runs").read(RUN) == pages
    assert pages[1].mean_loss is None
    assert Diary(tmp_path / "runs").read("b" * 64) == []


def test_nobody_else_reads_them(tmp_path: Path):
    Diary(tmp_path / "runs").add(RUN, page(1))
    modes = [tmp_path / "runs", tmp_path / "runs" / f"{RUN}.jsonl"]
    assert [stat.S_IMODE(path.stat().st_mode) for path in modes] == [0o700, 0o600]


@pytest.mark.parametrize("line", ["{}", "[]", "no", '{"round_number": 1}'])
def test_a_line_that_is_no_page_is_named(tmp_path: Path, line: str):
    (tmp_path / f"{RUN}.jsonl").write_text(line + "\n")
    with pytest.raises(ConfigError, match=RUN):
        Diary(tmp_path).read(RUN)


def test_a_line_that_a_full_disk_cut_short_is_left_out_and_spoils_no_other(tmp_path: Path):
    diary, file = Diary(tmp_path), tmp_path / f"{RUN}.jsonl"
    diary.add(RUN, page(1))
    with file.open("a") as torn:
        torn.write('{"round_number": 2, "ti')
    assert diary.read(RUN) == [page(1)]
    diary.add(RUN, page(3))
    assert diary.read(RUN) == [page(1), page(3)]


def test_a_diary_that_cannot_be_read_is_named(tmp_path: Path):
    (tmp_path / f"{RUN}.jsonl").mkdir()
    with pytest.raises(ConfigError, match=f"{RUN}.*cannot be read"):
        Diary(tmp_path).read(RUN)
