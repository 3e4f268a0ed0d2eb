"""How much memory the kernel gives this process: the least that a cgroup above it allows.

A container engine, a systemd unit or a batch system sets it, for the cgroup of the process itself
or for any above it; cgroups(7), and Documentation/admin-guide/cgroup-v2.rst of the kernel.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path, PurePosixPath

_UNLIMITED = 2**60  # version 1 writes a number where there is no limit
_V1, _V2 = "memory.limit_in_bytes", "memory.max"


def memory_limit(root: Path = Path("/")) -> int | None:
    """Bytes; None where nobody has set a limit, or the kernel shows none.

    Args:
        root: below which ``proc`` and ``sys`` lie.
    """
    limits = [limit for path in _files(root) if (limit := _limit(path)) is not None]
    return min(limits, default=None)


def _files(root: Path) -> Iterator[Path]:
    """Where limits may stand, from the cgroup of this process upwards."""
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if not controllers:
            name = _V2
        elif "memory" in controllers.split(","):
            name = _V1
        else:
            continue
        for mount, shown in _mounts(root, controllers):
            yield from (folder / name for folder in _upwards(root, mount, shown, path))


def _mounts(root: Path, controllers: str) -> Iterator[tuple[str, str]]:
    """Where a hierarchy is mounted, and which of its cgroups is shown there; proc_pid_mountinfo(5).

    A container without a namespace of its own sees a part of the hierarchy at the mount's place.
    """
    for line in _text(root / "proc/self/mountinfo").splitlines():
        fields, _, rest = line.partition(" - ")
        kind, _, options = rest.partition(" ")
        names = options.rpartition(" ")[2].split(",")
        ours = kind == "cgroup" and "memory" in names if controllers else kind == "cgroup2"
        if ours and len(fields.split()) > 4:
            _, _, _, shown, mount = fields.split()[:5]
            yield mount, shown


def _upwards(root: Path, mount: str, shown: str, path: str) -> Iterator[Path]:
    top = root / mount.lstrip("/")
    yield top
    cgroup = PurePosixPath(path)
    if ".." in cgroup.parts:  # it lies outside of what this namespace shows
        return
    if cgroup.is_relative_to(shown):
        cgroup = PurePosixPath("/") / cgroup.relative_to(shown)
    for part in (cgroup, *cgroup.parents):
        yield top / str(part).lstrip("/")


def _limit(path: Path) -> int | None:
    said = _text(path).strip()
    return int(said) if said.isdigit() and 0 < int(said) < _UNLIMITED else None


def _text(path: Path) -> str:
    try:
        return path.read_text("ascii")
    except (OSError, UnicodeDecodeError):
        return ""
