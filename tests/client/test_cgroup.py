"""How much memory a node may take, as the kernel's files say it: each tree as a machine has it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from client.cgroup import memory_limit

GIB = 2**30
V2 = "30 23 0:26 {shown} /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate\n"
V1 = "33 31 0:29 {shown} /sys/fs/cgroup/memory rw,nosuid shared:16 - cgroup cgroup rw,memory\n"
CPU = "34 31 0:30 / /sys/fs/cgroup/cpu rw,nosuid shared:17 - cgroup cgroup rw,cpu,cpuacct\n"


def tree(
    root: Path, cgroup: str, mounts: str, limits: dict[str, str], shown: str = "/"
) -> int | None:
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text(cgroup)
    (root / "proc/self/mountinfo").write_text(mounts.format(shown=shown))
    for path, said in limits.items():
        (root / "sys/fs/cgroup" / path).parent.mkdir(parents=True, exist_ok=True)
        (root / "sys/fs/cgroup" / path).write_text(f"{said}\n")
    return memory_limit(root)


def test_the_limit_of_a_unit_is_that_of_its_own_cgroup(tmp_path: Path):
    limits = {"system.slice/node.service/memory.max": str(8 * GIB)}
    assert tree(tmp_path, "0::/system.slice/node.service\n", V2, limits) == 8 * GIB


@pytest.mark.parametrize("least", ["a", "a/b", "a/b/c"])
def test_of_nested_cgroups_the_least_counts(tmp_path: Path, least: str):
    limits = {f"{each}/memory.max": str(16 * GIB) for each in ("a", "a/b", "a/b/c")}
    limits |= {"memory.max": "max", f"{least}/memory.max": str(3 * GIB)}
    limits["a/b/c/d/memory.max"] = str(GIB)  # of what is below this process, nothing
    limits["other/memory.max"] = str(GIB)
    assert tree(tmp_path, "0::/a/b/c\n", V2, limits) == 3 * GIB


def test_in_a_container_with_a_namespace_the_limit_stands_at_the_top(tmp_path: Path):
    assert tree(tmp_path, "0::/\n", V2, {"memory.max": str(2 * GIB)}) == 2 * GIB


def test_in_a_container_without_a_namespace_the_mount_shows_its_own_cgroup(tmp_path: Path):
    limits = {"memory.max": str(2 * GIB), "inner/memory.max": str(GIB)}
    cgroup = "0::/docker/0123/inner\n"
    assert tree(tmp_path, cgroup, V2, limits, shown="/docker/0123") == GIB


def test_version_1_and_the_mixture_of_both(tmp_path: Path):
    cgroup = "9:cpu,cpuacct:/elsewhere\n5:memory:/batch/job7\n0::/user.slice\n"
    limits = {
        "memory/memory.limit_in_bytes": str(2**63 - 4096),  # none
        "memory/batch/memory.limit_in_bytes": str(6 * GIB),
        "memory/batch/job7/memory.limit_in_bytes": str(4 * GIB),
        "cpu/elsewhere/memory.limit_in_bytes": str(GIB),
    }
    assert tree(tmp_path, cgroup, CPU + V1, limits) == 4 * GIB


@pytest.mark.parametrize("said", ["max", "", "nonsense", "-1", "0", str(2**63 - 4096)])
def test_what_is_no_limit_is_none(tmp_path: Path, said: str):
    assert tree(tmp_path, "0::/a\n", V2, {"a/memory.max": said, "memory.max": "max"}) is None


def test_a_cgroup_outside_of_the_namespace_leads_nowhere(tmp_path: Path):
    (tmp_path / "memory.max").write_text(str(GIB))
    cgroup = "0::/../../../..\n"
    assert tree(tmp_path / "root", cgroup, V2, {"memory.max": str(2 * GIB)}) == 2 * GIB


def test_a_machine_that_shows_nothing_has_no_limit(tmp_path: Path):
    assert memory_limit(tmp_path) is None


def test_this_machine_s_limit_is_one_of_its_own_files():
    limit = memory_limit()
    files = [*Path("/sys/fs/cgroup").rglob("memory.max")]
    files += Path("/sys/fs/cgroup").rglob("memory.limit_in_bytes")
    said = {path.read_text().strip() for path in files if os.access(path, os.R_OK)}
    assert limit is None or str(limit) in said
