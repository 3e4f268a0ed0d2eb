"""The inbox: what is acknowledged is on the disk, whole, once, under a name that says nothing."""

from __future__ import annotations

import io
import os
import random
import resource
import signal
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from pydicom import dcmread
from pydicom.dataset import FileDataset
from pydicom.uid import DeflatedExplicitVRLittleEndian

from client.intake.inbox import Bounds, Inbox, Names, NotKeptError, Outcome, Trouble
from common.clock import Clock
from common.errors import ConfigError

ROOT = Path(__file__).parents[3]
ROOMY = Bounds(least_free=0)


class Time:
    """A clock that goes on when it is told to."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.clock = Clock(now=lambda: self.now)


@pytest.fixture
def opened(tmp_path: Path) -> Callable[..., Any]:
    """`opened()`: the inbox of this test, as one process after the other opens it."""

    def make(bounds: Bounds = ROOMY, silence: float = 60.0, clock: Clock | None = None) -> Any:
        return Inbox.opened(tmp_path / "inbox", bounds, silence=silence, clock=clock)

    return make


@pytest.fixture
def part10(film: Callable[..., FileDataset]) -> Callable[..., bytes]:
    """`part10(number)`: a file of PS3.10, the instance of that number of one study."""

    def make(number: int = 1, **attributes: Any) -> bytes:
        buffer = io.BytesIO()
        made = film(**({"SOPInstanceUID": f"1.2.3.{number}"} | attributes))
        made.save_as(buffer, enforce_file_format=True)
        return buffer.getvalue()

    return make


def receive(inbox: Inbox, content: bytes, announced: Names | None = None) -> Outcome:
    arrival = inbox.arrival()
    arrival.write(content)
    return inbox.keep(arrival, announced)


def files(inbox: Inbox) -> list[Path]:
    return [file for file in inbox.path.rglob("*") if file.is_file() and file.suffix != ".key"]


def test_an_object_is_flushed_then_named_then_its_folder_is_flushed(
    opened: Callable[..., Any], part10: Callable[..., bytes], monkeypatch: pytest.MonkeyPatch
):
    done: list[tuple[str, Path]] = []
    flush, rename = os.fsync, os.rename

    def flushing(descriptor: int) -> None:
        done.append(("flush", Path(os.readlink(f"/proc/self/fd/{descriptor}"))))
        flush(descriptor)

    def renaming(source: Path, target: Path) -> None:
        done.append(("name", Path(target)))
        rename(source, target)

    with opened() as inbox:
        monkeypatch.setattr(os, "fsync", flushing)
        monkeypatch.setattr(os, "rename", renaming)
        receive(inbox, part10())
        (kept,) = files(inbox)
        incoming = inbox.path / "incoming"
        steps = [(what, incoming if path.parent == incoming else path) for what, path in done]
        assert steps == [
            ("flush", incoming),
            ("flush", kept.parents[1]),
            ("name", kept),
            ("flush", kept.parent),
        ]
        assert kept.read_bytes() == part10()


KEEPER = """\
import sys
from pathlib import Path
from client.intake.inbox import Bounds, Inbox
with Inbox.opened(Path(sys.argv[1]), Bounds(least_free=0), silence=0.0) as inbox:
    for number, path in enumerate(sorted(Path(sys.argv[2]).iterdir())):
        arrival = inbox.arrival()
        content = path.read_bytes()
        for at in range(0, len(content), 500):
            arrival.write(content[at:at + 500])
        inbox.keep(arrival)
        print(path.name, flush=True)
        if number % 3 == 0:
            inbox.settle()
"""


def test_killed_at_any_moment_nothing_acknowledged_is_lost_and_nothing_is_half_there(
    tmp_path: Path, opened: Callable[..., Any], part10: Callable[..., bytes]
):
    source, kept = tmp_path / "source", set()
    source.mkdir()
    for number in range(1, 201):
        study = f"1.2.3.{number % 4}.9"
        (source / f"{number:03d}").write_bytes(part10(number, StudyInstanceUID=study))
    rng = random.Random(3)  # noqa: S311
    for _ in range(6):
        command = [sys.executable, "-c", KEEPER, str(tmp_path / "inbox"), str(source)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as keeper:
            assert keeper.stdout is not None
            kept.add(keeper.stdout.readline().strip())
            time.sleep(rng.uniform(0, 0.6))
            keeper.send_signal(signal.SIGKILL)
            kept |= {line.strip() for line in keeper.stdout}
        with opened() as inbox:
            assert list((inbox.path / "incoming").iterdir()) == []
            there = [file.read_bytes() for file in files(inbox)]
            assert len(there) == len(set(there))
            assert set(there) <= {path.read_bytes() for path in source.iterdir()}
            assert {(source / name).read_bytes() for name in kept} <= set(there)
    assert len(kept) > 10


def test_a_study_completes_after_silence_and_what_comes_later_joins_it(
    opened: Callable[..., Any], part10: Callable[..., bytes]
):
    passing = Time()
    with opened(silence=60.0, clock=passing.clock) as inbox:
        receive(inbox, part10(1))
        passing.now += 40
        receive(inbox, part10(2))
        passing.now += 59
        assert inbox.settle() == 0
        assert inbox.studies() == (1, 0)
        passing.now += 1
        assert inbox.settle() == 1
        assert inbox.studies() == (0, 1)
        receive(inbox, part10(3))
        assert inbox.studies() == (1, 1)
        assert len(list((inbox.path / "complete").rglob("*.dcm"))) == 2
        passing.now += 60
        assert inbox.settle() == 1
        (study,) = (inbox.path / "complete").iterdir()
        assert len(list(study.iterdir())) == 3
        assert list((inbox.path / "arriving").iterdir()) == []


def test_what_was_arriving_when_the_process_ended_goes_on_and_completes(
    opened: Callable[..., Any], part10: Callable[..., bytes]
):
    passing = Time()
    with opened(clock=passing.clock) as inbox:
        receive(inbox, part10(1))
    passing.now += 1000
    with opened(clock=passing.clock) as inbox:
        assert inbox.settle() == 0, "whoever was sending may not have noticed"
        receive(inbox, part10(2))
        passing.now += 60
        assert inbox.settle() == 1
        assert len(list((inbox.path / "complete").rglob("*.dcm"))) == 2


def test_the_same_object_is_kept_once_wherever_the_first_one_lies(
    opened: Callable[..., Any], part10: Callable[..., bytes]
):
    with opened(silence=0.0) as inbox:
        first, other = part10(1), part10(1, PatientName="Other^Name")
        assert receive(inbox, first) is Outcome.NEW
        assert receive(inbox, first) is Outcome.AGAIN
        assert inbox.settle() == 1
        assert receive(inbox, first) is Outcome.AGAIN
        assert inbox.studies() == (0, 1), "nothing came that was not there"
        assert receive(inbox, other) is Outcome.VERSION
        assert inbox.settle() == 1
        assert receive(inbox, other) is Outcome.AGAIN
        assert receive(inbox, first) is Outcome.AGAIN
        assert {file.read_bytes() for file in files(inbox)} == {first, other}
    with opened() as inbox:
        assert receive(inbox, first) is Outcome.AGAIN
        assert inbox.has(Names(instance="1.2.3.1", study="1.2.3.4.5"))
        assert not inbox.has(Names(instance="1.2.3.2", study="1.2.3.4.5"))


def test_another_senders_file_meta_information_makes_no_other_object(
    opened: Callable[..., Any], film: Callable[..., FileDataset], part10: Callable[..., bytes]
):
    other = film(SOPInstanceUID="1.2.3.1")
    other.file_meta.SourceApplicationEntityTitle = "ANOTHER"
    buffer = io.BytesIO()
    other.save_as(buffer, enforce_file_format=True)
    with opened() as inbox:
        assert receive(inbox, part10(1)) is Outcome.NEW
        assert receive(inbox, buffer.getvalue()) is Outcome.AGAIN


def test_nothing_is_lost_between_those_who_keep_and_the_one_who_completes(
    opened: Callable[..., Any], part10: Callable[..., bytes]
):
    contents = [part10(number) for number in range(1, 121)]
    with opened(silence=0.0) as inbox:
        senders = [
            threading.Thread(target=lambda part: [receive(inbox, each) for each in part], args=(p,))
            for p in (contents[at::4] for at in range(4))
        ]
        for sender in senders:
            sender.start()
        while any(sender.is_alive() for sender in senders):
            inbox.settle()
        inbox.settle()
        assert inbox.tally == {Outcome.NEW: 120}
        (study,) = (inbox.path / "complete").iterdir()
        assert sorted(file.read_bytes() for file in study.iterdir()) == sorted(contents)
        assert list((inbox.path / "arriving").iterdir()) == []


def test_old_complete_studies_are_removed_and_no_others(
    opened: Callable[..., Any], part10: Callable[..., bytes]
):
    today = datetime(2026, 3, 31, 12, tzinfo=UTC)
    with opened(silence=0.0, clock=Clock(date=lambda: today)) as inbox:
        for number in range(1, 4):
            receive(inbox, part10(number, StudyInstanceUID=f"1.2.{number}"))
        inbox.settle()
        receive(inbox, part10(4, StudyInstanceUID="1.2.4"))
        ages = {"1.2.1": 8, "1.2.2": 6, "1.2.3": 8, "1.2.4": 8}
        for uid, days in ages.items():
            pseudonym = inbox._key.pseudonym("study", uid)
            (folder,) = inbox.path.glob(f"*/{pseudonym}")
            seconds = today.timestamp() - days * 86_400
            for path in (folder, *folder.iterdir()):
                os.utime(path, (seconds, seconds))
        os.utime(next(inbox.path.glob("complete/*/*.dcm")))  # whichever it is, it is new now
        before = {path.name: newest(path) for path in (inbox.path / "complete").iterdir()}
        limit = today.timestamp() - 7 * 86_400
        inbox.expire(7)
        left = {path.name for path in (inbox.path / "complete").iterdir()}
        assert left == {name for name, last in before.items() if last >= limit}
        assert 0 < len(left) < 3
        assert inbox.studies()[0] == 1, "what is arriving is never old"


def newest(folder: Path) -> float:
    return max(path.stat().st_mtime for path in (folder, *folder.iterdir()))


def test_an_object_that_is_sent_again_makes_its_study_new(
    opened: Callable[..., Any], part10: Callable[..., bytes]
):
    with opened(silence=0.0) as inbox:
        receive(inbox, part10(1))
        inbox.settle()
        (study,) = (inbox.path / "complete").iterdir()
        for path in (study, *study.iterdir()):
            os.utime(path, (0, 0))
        assert receive(inbox, part10(1)) is Outcome.AGAIN
        assert inbox.expire(1) == 0
        assert len(files(inbox)) == 1


def test_one_process_at_a_time_has_an_inbox(opened: Callable[..., Any]):
    with opened(), pytest.raises(ConfigError, match="another process"), opened():
        pass
    with opened():
        pass


def test_an_inbox_that_others_may_look_into_is_refused(
    opened: Callable[..., Any], tmp_path: Path, part10: Callable[..., bytes]
):
    (tmp_path / "inbox").mkdir(mode=0o755)
    with pytest.raises(ConfigError, match="chmod 700"), opened():
        pass
    (tmp_path / "inbox").chmod(0o700)
    before = os.umask(0)
    try:
        with opened(silence=0.0) as inbox:
            receive(inbox, part10(1))
            inbox.settle()
            receive(inbox, part10(2))
    finally:
        os.umask(before)
    for path in (tmp_path / "inbox").rglob("*"):
        assert path.stat().st_mode & 0o077 == 0, path


@contextmanager
def small_files(most: int) -> Iterator[None]:
    """The system lets no file grow beyond `most` bytes: a write fails as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("size", [3000, 300_000])
def test_of_a_write_that_the_system_refuses_nothing_is_left(
    opened: Callable[..., Any], part10: Callable[..., bytes], size: int
):
    content = part10(1) + bytes(size)
    with opened() as inbox:
        with small_files(1000), pytest.raises(NotKeptError) as error:
            receive(inbox, content)
        assert error.value.trouble is Trouble.DISK_FULL
        assert files(inbox) == []
        assert inbox.tally == {Trouble.DISK_FULL: 1}
        assert receive(inbox, content) is Outcome.NEW, "the disk has room again"


@pytest.mark.parametrize(
    ("bounds", "trouble"),
    [
        (Bounds(object_bytes=1000, least_free=0), Trouble.TOO_LARGE),
        (Bounds(least_free=2**62), Trouble.DISK_FULL),
    ],
)
def test_beyond_a_bound_nothing_is_kept(
    opened: Callable[..., Any], part10: Callable[..., bytes], bounds: Bounds, trouble: Trouble
):
    with opened(bounds) as inbox:
        with pytest.raises(NotKeptError) as error:
            receive(inbox, part10(1))
        assert error.value.trouble is trouble
        assert files(inbox) == []


def hostile(part10: Callable[..., bytes]) -> dict[str, bytes]:
    whole = part10(1)
    start = whole.index(b"\x08\x00\x16\x00UI")  # SOPClassUID, where the data set begins
    empty_sequences = b"\x08\x00\x15\x11SQ\x00\x00\xff\xff\xff\xff" * 200_000
    return {
        "nothing": b"",
        "no preamble": whole[128:],
        "half a file meta": whole[:180],
        "no data set": whole[:start],
        "half a data set": whole[: start + 30],
        "no tags at all": whole[:start] + bytes(range(1, 250)) * 400,
        "a length beyond the file": whole[:start] + b"\x08\x00\x16\x00OB\x00\x00\xf0\xff\xff\xff",
        "a million of sequences within each other": whole[:start] + empty_sequences,
        "a study behind nine megabytes": part10(1, RetrieveURL="x" * 9 * 2**20),
    }


@pytest.mark.parametrize("name", hostile(lambda *_, **__: bytes(128) + b"\x08\x00\x16\x00UI"))
def test_what_cannot_be_read_is_refused_in_time(
    opened: Callable[..., Any], part10: Callable[..., bytes], name: str
):
    begun = time.monotonic()
    with opened() as inbox:
        with pytest.raises(NotKeptError) as error:
            receive(inbox, hostile(part10)[name])
        assert error.value.trouble is Trouble.UNREADABLE
        assert files(inbox) == []
    assert time.monotonic() - begun < 30


def test_a_deflated_object_is_read_and_one_that_is_a_bomb_is_refused(
    opened: Callable[..., Any], film: Callable[..., FileDataset]
):
    made = film(SOPInstanceUID="1.2.3.1")
    made.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
    buffer = io.BytesIO()
    made.save_as(buffer, enforce_file_format=True)
    whole = buffer.getvalue()
    packer = zlib.compressobj(9, wbits=-zlib.MAX_WBITS)
    bomb = b"".join(packer.compress(bytes(2**20)) for _ in range(512)) + packer.flush()
    meta = dcmread(io.BytesIO(whole)).file_meta
    head = whole[: 132 + 12 + int(meta.FileMetaInformationGroupLength)]
    with opened() as inbox:
        assert receive(inbox, whole) is Outcome.NEW
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        with pytest.raises(NotKeptError):
            receive(inbox, head + bomb)
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        assert grown < 200_000, "KiB; the bomb has half a GiB"


@pytest.mark.parametrize(
    ("announced", "kept"),
    [
        (Names(instance="1.2.3.1"), True),
        (Names(study="1.2.3.4.5"), True),
        (Names(), True),
        (Names(instance="1.2.3.2"), False),
        (Names(study="1.2.3.4.6"), False),
        (Names(sop_class="1.2.840.10008.5.1.4.1.1.2"), False),
    ],
)
def test_only_what_was_announced_is_kept(
    opened: Callable[..., Any], part10: Callable[..., bytes], announced: Names, kept: bool
):
    with opened() as inbox:
        with nullcontext() if kept else pytest.raises(NotKeptError, match="was announced"):
            receive(inbox, part10(1), announced)
        assert len(files(inbox)) == int(kept)
        assert inbox.tally == {Outcome.NEW if kept else Trouble.FOREIGN: 1}
