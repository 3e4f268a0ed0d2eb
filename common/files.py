"""Files that are whole and on disk, or not there at all."""

from __future__ import annotations

import errno
import fcntl
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from common.errors import ConfigError, RunError

_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EMFILE, errno.ENFILE}


def write_durably(path: Path, content: bytes, mode: int = 0o666) -> None:
    """Replace `path` by `content` at once: written aside, flushed, renamed, the folder flushed.

    `mode` is that of a new file, less what the process' umask takes away.

    Several processes may write one path: the last to finish wins, and none sees half of another.
    """
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode)
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    flush_folder(path.parent)


def flush_folder(folder: Path) -> None:
    """Make the names in `folder` durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def refuse_what_is_there(out: Path) -> None:
    """Raise ConfigError if `out` is there."""
    if out.exists() or out.is_symlink():
        raise ConfigError(
            f"{out}: is there already; give a folder that is not: nothing is written over"
        )


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A folder to write into, which becomes `out` when the block ends well, and else is gone.

    Only its owner may read in it. What is killed outright leaves a hidden ``.….partial`` beside
    `out`.

    Raises:
        ConfigError: if `out` is there, before or meanwhile.
        RunError: if it cannot be written.
    """
    refuse_what_is_there(out)
    work = out.with_name(f".{out.name}.{secrets.token_hex(4)}.partial")
    try:
        work.mkdir(parents=True, mode=0o700)
        yield work
        flush_folder(work)
        refuse_what_is_there(out)  # a rename would take the place of an empty folder
        work.rename(out)
        flush_folder(out.parent)
    except OSError as error:
        raise RunError(
            f"{out}: cannot be written ({error}); check the folder, its rights and its space"
        ) from error
    finally:
        shutil.rmtree(work, ignore_errors=True)


def disk_refuses(error: BaseException) -> str:
    """What the system said, if it had no room for more behind this error; else empty."""
    link: BaseException | None = error
    while link is not None:
        if isinstance(link, OSError) and link.errno in _NO_ROOM:
            return os.strerror(link.errno)
        link = link.__cause__ or link.__context__
    return ""


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold `folder` for this process alone; the system lets go of it when the process ends.

    Raises:
        BlockingIOError: if another holds it.
    """
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)
