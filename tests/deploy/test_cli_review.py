"""`cloister intake review` as a person at a terminal meets it, on real files."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable
from http.client import HTTPConnection
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest

from client.intake.desk import Desk, State
from client.intake.keys import SiteKey
from common.cohort import Cohort

Cloister = Callable[..., Any]
ULTRASOUND, CAPTURE, FILM = "GREYSCALE_IMAGE.dcm", "SC_rgb_2frame.dcm", "2_ORIGINAL.dcm"
ADA = ("--by", "Ada", "--yes")


@pytest.fixture
def review(cloister: Cloister, ward: Any) -> Cloister:
    """`review(*arguments)`: the command on the ward."""

    def run(*arguments: object) -> Any:
        return cloister("intake", "review", ward.cohort, "--site-key", ward.key_file, *arguments)

    return run


def said(ward: Any) -> list[Any]:
    """Every decision in the journal."""
    with ward.desk() as desk:
        return [decision for _, _, decision in desk.decisions()]


def half_dark(cohort: Path) -> list[bool]:
    """For each image, whether its left half is black and its right half is not."""
    opened = Cohort.open(cohort)
    images = np.array(opened.images(range(len(opened))))
    return [not image[..., :62].any() and bool(image[..., 66:].any()) for image in images]


# --- Looking ------------------------------------------------------------------------------------


def test_what_waits_is_listed_with_reason_frames_boxes_and_place(review: Cloister, ward: Any):
    shown = review()
    assert shown.code == 0, shown
    assert "2 wait for a person" in shown.words
    for name, counts in ((ULTRASOUND, ("1", "5")), (CAPTURE, ("2", "0"))):
        entry = ward.entry(name)
        line = next(line for line in shown.out.splitlines() if entry.short in line)
        assert re.search(rf"\s{counts[0]}\s+{counts[1]}\s", line), line
        assert name[:12] in shown.out
    assert "secondary capture" in shown.words
    assert "for your eyes alone" in shown.words
    assert ward.entry("ct_image.dcm").short not in shown.out


def test_a_long_list_is_cut_and_says_how_to_see_all(review: Cloister, ward: Any):
    shown = review("--rows", 1)
    assert "and 1 more: --rows 2 lists all" in shown.words
    listed = [ward.entry(name).short in shown.out for name in (ULTRASOUND, CAPTURE)]
    assert sorted(listed) == [False, True]


def test_one_object_is_shown_with_what_was_found_in_it(review: Cloister, ward: Any):
    entry = ward.entry(ULTRASOUND)
    shown = review(entry.short)
    assert shown.code == 0, shown
    with ward.desk() as desk:
        boxes = desk.shots(entry)[0].boxes
    assert len(boxes) == 5
    for found in boxes:
        assert ",".join(map(str, found)) in shown.words
    assert "768 x 1024" in shown.words
    assert ULTRASOUND in shown.words


def test_what_was_kept_with_blanked_pixels_is_a_list_of_its_own(review: Cloister, ward: Any):
    shown = review("--list", "blanked")
    assert "2 kept, with pixels blanked" in shown.words
    for name in ("RGB_IMAGE.dcm", FILM):
        assert ward.entry(name).short in shown.out
    assert ward.entry(ULTRASOUND).short not in shown.out


def test_a_place_cannot_steer_the_terminal(
    cloister: Cloister, tmp_path: Path, ward: Any, make_ward: Any
):
    source, place = tmp_path / "odd", tmp_path / "at"
    source.mkdir()
    place.mkdir()
    name = "\x1b[31m[bold]DOE\r.dcm"
    (source / name).write_bytes((ward.source / CAPTURE).read_bytes())
    odd = make_ward(source, place)
    for more in ((), (odd.entry(".dcm").short,)):
        shown = cloister("intake", "review", odd.cohort, "--site-key", odd.key_file, *more)
        assert shown.code == 0, shown
        assert "\x1b" not in shown.out
        assert "\r" not in shown.out
        assert "[bold]" in shown.out.replace("\n", "")


# --- Deciding -----------------------------------------------------------------------------------


def test_a_decision_is_recorded_with_who_and_when_and_is_listed(review: Cloister, ward: Any):
    entry = ward.entry(ULTRASOUND)
    boxes = ("--blank", "0,0,40,1024", "--blank", "700, 0, 720, 10")
    done = review(entry.short, "--release", *boxes, "--because", "seen by me", *ADA)
    assert done.code == 0, done
    assert "The next `cloister intake run` acts on it" in done.words

    (recorded,) = said(ward)
    assert recorded.verdict == "release"
    assert [tuple(box) for box in recorded.blank] == [(0, 0, 40, 1024), (700, 0, 720, 10)]
    assert recorded.found
    assert recorded.by == "Ada"
    assert recorded.why == "seen by me"
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", recorded.at)

    listed = review("--decisions")
    for text in ("Ada", "seen by me", entry.short, "by the next run"):
        assert text in listed.words
    assert "1 wait for a person" in review().words
    assert entry.short in review("--list", "decided").out


@pytest.mark.slow
def test_the_next_run_acts_on_what_was_decided(cloister: Cloister, review: Cloister, ward: Any):
    waits, kept = ward.entry(ULTRASOUND), ward.entry(FILM)
    before = half_dark(ward.cohort)
    assert before == [False, False, False]
    why = ("--because", "not ours", *ADA)
    assert review(waits.short, "--release", "--blank", "0,0,768,512", *ADA).code == 0
    assert review(kept.short, "--reject", *why).code == 0

    files = ("--spec", ward.place / "run.toml", "--labels", ward.place / "labels.csv")
    run = cloister("intake", "run", ward.source, ward.cohort, *files, "--site-key", ward.key_file)
    assert run.code == 0, run

    assert ward.entry(ULTRASOUND).state is State.KEPT
    assert ward.entry(FILM).state is State.REJECTED
    assert sorted(half_dark(ward.cohort)) == [False, False, True]
    assert "by the next run" not in review("--decisions").words


def test_nothing_is_recorded_without_a_yes(review: Cloister, ward: Any):
    entry = ward.entry(ULTRASOUND)
    refused = review(entry.short, "--release", "--by", "Ada")
    assert refused.code == 2
    assert "nobody can be asked here" in refused.words
    assert said(ward) == []


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--release",), "ID is missing"),
        (("ID", "--blank", "0,0,1,1"), "--release or --reject"),
        (("ID", "--release", "--reject"), "expected one of them"),
        (("ID", "--reject"), "needs a reason"),
        (("ID", "--reject", "--blank", "0,0,1,1", "--because", "x"), "keeps nothing"),
        (("ID", "--release", "--blank", "0,0,1"), "no rectangle"),
        (("ID", "--release", "--blank", "-1,0,5,5"), "no rectangle"),
        (("ID", "--release", "--blank", "5,0,5,5"), "no rectangle"),
        (("ID", "--release", "--blank", "0,0,769,5"), "768 rows and 1024 columns"),
        (("ID", "--release", "--blank", "0,0,5,1025"), "768 rows and 1024 columns"),
        (("ID", "--release", "--because", "x" * 2001), "at most 2000"),
        (("ID", "--release", "--by", "A" * 121), "at most 120"),
        (("ffffffffffffffffffffffffffffffff", "--release"), "no object begins"),
        (("--list", "all"), "expected one of waits"),
    ],
)
def test_what_makes_no_sense_is_refused_and_nothing_is_recorded(
    review: Cloister, ward: Any, arguments: tuple[str, ...], told: str
):
    entry = ward.entry(ULTRASOUND)
    words = [entry.short if word == "ID" else word for word in arguments]
    refused = review(*words, "--yes")
    assert refused.code == 2, refused
    assert told in refused.words
    assert said(ward) == []


def test_what_can_never_be_kept_cannot_be_released(review: Cloister, ward: Any):
    entry = ward.entry("seg_image_ct_binary.dcm")
    refused = review(entry.short, "--release", *ADA)
    assert refused.code == 2
    assert "it is refused" in refused.words
    assert said(ward) == []


# --- Keys ---------------------------------------------------------------------------------------


def test_the_command_that_an_intake_names_is_the_one_that_opens_its_review(
    cloister: Cloister, ward: Any
):
    exported, key = ward.place / "to publish", ward.place / "own.key"
    done = cloister("intake", "export", ward.source, exported, "--site-key", key)
    assert done.code == 0, done
    _, named = next(
        line.split(" wait for a person: ") for line in done.out.splitlines() if "wait for" in line
    )
    shown = cloister(*shlex.split(named)[1:])
    assert shown.code == 0, shown
    assert ULTRASOUND in shown.words
    assert cloister("intake", "review", exported).code == 2


def test_another_key_opens_nothing_and_a_missing_one_is_not_made(cloister: Cloister, ward: Any):
    other = ward.place / "other.key"
    other.write_text("00" * 32)
    other.chmod(0o600)
    refused = cloister("intake", "review", ward.cohort, "--site-key", other)
    assert refused.code == 2
    assert "the site's key" in refused.words
    assert ULTRASOUND not in refused.words

    home, gone = ward.place / "node", ward.place / "gone.key"
    size = ("--declared-size", 400, "--epsilon", 8, "--delta", 1e-5, "--by", "Ada")
    assert cloister("node", "init", home, "--site", "north", *size).code == 0
    refused = cloister("intake", "review", ward.cohort, "--node", home)
    assert refused.code == 2
    assert "no site key" in refused.words
    assert not (home / "site.key").exists()
    ward.key_file.rename(home / "site.key")
    assert cloister("intake", "review", ward.cohort, "--node", home).code == 0

    assert cloister("intake", "review", ward.cohort, "--site-key", gone).code == 2
    assert cloister("intake", "review", ward.cohort).code == 2
    assert cloister("intake", "review", ward.place / "none", "--site-key", gone).code == 2
    assert not gone.exists()
    assert not (ward.place / "north.cohort.intake" / "site.key").exists()
    assert not (ward.place / "none.intake").exists()


def test_the_desk_of_a_sealed_cohort_needs_its_key_too(cloister: Cloister, tmp_path: Path):
    keys = [tmp_path / "site.key", tmp_path / "cohort.key"]
    for number, file in enumerate(keys):
        file.write_text(f"{number:02x}" * 32 + "\n")
        file.chmod(0o600)
    Desk.create(tmp_path / "c.intake", SiteKey(bytes(32)), bytes([1] * 32)).close()
    asked = ("intake", "review", tmp_path / "c", "--site-key", keys[0])
    refused = cloister(*asked)
    assert refused.code == 2
    assert "the key of the sealed cohort" in refused.words
    opened = cloister(*asked, "--cohort-key", keys[1])
    assert opened.code == 0, opened
    assert "0 wait for a person" in opened.words


def test_a_key_beside_the_desk_needs_no_option(cloister: Cloister, ward: Any):
    ward.key_file.rename(ward.place / "north.cohort.intake" / "site.key")
    shown = cloister("intake", "review", ward.cohort)
    assert shown.code == 0, shown
    assert "2 wait for a person" in shown.words


# --- The page -----------------------------------------------------------------------------------


def test_the_page_is_there_until_it_is_interrupted(ward: Any):
    command = [sys.executable, "-c", "from deploy.cli import main; main()", "intake", "review"]
    options = [str(ward.cohort), "--site-key", str(ward.key_file), "--page", "--by", "Ada"]
    with subprocess.Popen(
        [*command, *options],
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
        env=os.environ | {"NO_COLOR": "1", "COLUMNS": "100"},
    ) as process:
        try:
            assert process.stdout
            address = next(
                line.strip() for line in process.stdout if line.startswith("http://127.0.0.1:")
            )
            url = urlsplit(address)
            connection = HTTPConnection(str(url.hostname), url.port, timeout=60)
            connection.request("GET", f"{url.path}?{url.query}")
            assert connection.getresponse().status == 200
            process.send_signal(signal.SIGINT)
            rest = process.stdout.read()
            assert process.wait(60) == 0
        finally:
            process.kill()
    assert "The page is closed" in rest
    assert ULTRASOUND not in rest
