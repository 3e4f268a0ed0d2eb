"""A file is whole, old or new, whatever happens while it is written."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from common.errors import ConfigError, RunError
from common.files import flush_folder, locked, new_folder, write_durably

WRITER = """
import sys
from pathlib import Path
from common.files import write_durably
path, letter, times, size = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
print("ready", flush=True)
for _ in range(times):
    write_durably(path, letter.encode() * size)
"""


HOLDER = """
import sys
from pathlib import Path
from common.files import locked
try:
    with locked(Path(sys.argv[1])):
        pass
except BlockingIOError:
    sys.exit(7)
"""


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}


def writer(path: Path, letter: str, times: int, size: int) -> subprocess.Popen[bytes]:
    """Another process that writes one letter `size` times over, again and again."""
    command = [sys.executable, "-c", WRITER, str(path), letter, str(times), str(size)]
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        env=environment(),
    )


def await_start(process: subprocess.Popen[bytes]) -> None:
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """A disk that takes no file beyond `size` bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("content", [b"", b"new", bytes(3_000_000)])
def test_the_new_content_replaces_the_old(tmp_path: Path, content: bytes):
    path = tmp_path / "state.json"
    path.write_bytes(b"old, and longer than the new one")
    write_durably(path, content)
    assert path.read_bytes() == content
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_that_is_not_there_is_an_error(tmp_path: Path):
    with pytest.raises(FileNotFoundError):
        write_durably(tmp_path / "missing" / "state.json", b"new")
    with pytest.raises(FileNotFoundError):
        flush_folder(tmp_path / "missing")


def test_a_full_disk_leaves_the_old_content_and_nothing_else(tmp_path: Path):
    path = tmp_path / "state.json"
    write_durably(path, b"old")
    with largest_file(100_000), pytest.raises(OSError, match="File too large"):
        write_durably(path, bytes(1_000_000))
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_two_processes_do_not_mix_their_contents(tmp_path: Path):
    path = tmp_path / "state.json"
    processes = [writer(path, letter, times=150, size=100_000) for letter in "ab"]
    while any(process.poll() is None for process in processes):
        if path.exists():
            assert len(set(path.read_bytes())) == 1
            assert path.stat().st_size == 100_000
        time.sleep(0.001)
    assert [process.wait() for process in processes] == [0, 0]


def test_a_killed_writer_leaves_one_whole_content(tmp_path: Path):
    path = tmp_path / "state.json"
    write_durably(path, b"o" * 1_000_000)
    for attempt in range(5):
        process = writer(path, str(attempt), times=10_000, size=1_000_000)
        await_start(process)
        time.sleep(0.003 * attempt)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        content = path.read_bytes()
        assert len(content) == 1_000_000
        assert len(set(content)) == 1


def test_a_folder_is_held_by_one_and_free_again_when_it_ends(tmp_path: Path):
    with locked(tmp_path):
        with pytest.raises(BlockingIOError), locked(tmp_path):
            raise AssertionError
        held = subprocess.run(
            [sys.executable, "-c", HOLDER, str(tmp_path)], env=environment(), check=False
        )
        assert held.returncode == 7
    with locked(tmp_path):
        pass
    free = subprocess.run(
        [sys.executable, "-c", HOLDER, str(tmp_path)], env=environment(), check=False
    )
    assert free.returncode == 0


# --- A folder whole, or not at all ----------------------------------------------------------------


def test_a_folder_has_its_name_when_all_of_it_is_there(tmp_path: Path):
    out = tmp_path / "deep" / "out"
    with new_folder(out) as work:
        (work / "one").write_text("1")
        assert not out.exists()
        assert work.parent == out.parent
    assert (out / "one").read_text() == "1"
    assert out.stat().st_mode & 0o777 == 0o700
    assert list(out.parent.iterdir()) == [out]


@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt()])
def test_what_ends_the_work_leaves_nothing(tmp_path: Path, error: BaseException):
    def fail() -> None:
        with new_folder(tmp_path / "out") as work:
            (work / "one").write_text("1")
            raise error

    with pytest.raises(type(error)):
        fail()
    assert not list(tmp_path.iterdir())


def test_a_disk_that_refuses_is_named_with_the_folder(tmp_path: Path):
    with (
        pytest.raises(RunError, match=r"out: cannot be written \(full\)"),
        new_folder(tmp_path / "out"),
    ):
        raise OSError("full")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["folder", "file", "link"])
@pytest.mark.parametrize("when", ["before", "meanwhile"])
def test_nothing_is_written_over(tmp_path: Path, kind: str, when: str):
    out = tmp_path / "out"

    def make() -> None:
        if kind == "link":
            out.symlink_to(tmp_path / "nowhere")
        else:
            out.mkdir() if kind == "folder" else out.touch()

    if when == "before":
        make()
    with pytest.raises(ConfigError, match="is there already"), new_folder(out):
        make()  # of what was there before, this fails in another way
    assert list(tmp_path.iterdir()) == [out]
