"""Child processes under a memory limit."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from harness.baselines.sandbox.cgroup import MemoryGroup, counter, parents

MIB = 1 << 20


def test_groups_of_either_version_are_found(tmp_path: Path) -> None:
    (tmp_path / "memory" / "jobs").mkdir(parents=True)
    (tmp_path / "user.slice").mkdir()
    groups = "5:cpu,cpuacct:/jobs\n4:memory:/jobs\n1:name=systemd:/x\n"
    assert parents(groups, tmp_path) == [(1, tmp_path / "memory" / "jobs")]
    assert parents("0::/user.slice\n", tmp_path) == [(2, tmp_path / "user.slice")]
    assert parents("4:memory:/gone\n", tmp_path) == []


def test_counters_are_read_by_their_whole_name() -> None:
    assert counter("oom_kill_disable 1\nunder_oom 0\noom_kill 3\n", "oom_kill") == 3
    assert counter("low 0\nhigh 0\n", "oom_kill") == 0


def test_a_machine_without_groups_is_named(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="no memory control group can be made"):
        MemoryGroup(MIB, tmp_path / "nothing")


def test_groups_of_the_dead_are_removed(group: MemoryGroup) -> None:
    dead = group._folder.with_name(f"tierbench-{1 << 30}-1")
    dead.mkdir()
    MemoryGroup(64 * MIB).remove()
    assert not dead.exists()
    assert group._folder.exists()


@pytest.fixture
def group() -> Iterator[MemoryGroup]:
    """64 MiB, where this process may make a group."""
    try:
        made = MemoryGroup(64 * MIB)
    except OSError as error:
        pytest.skip(str(error))
    yield made
    made.remove()


def run(group: MemoryGroup, code: str) -> int:
    """The exit code of a Python program in the group."""
    return subprocess.run(group.inside([sys.executable, "-c", code]), timeout=60).returncode


def test_a_child_is_limited(group: MemoryGroup) -> None:
    assert run(group, "pass") == 0
    assert 0 < group.peak() <= 64 * MIB and group.oom_kills() == 0
    assert run(group, "raise SystemExit(3)") == 3 and group.oom_kills() == 0
    assert run(group, "x = bytearray(300 << 20); x[::4096]") == -signal.SIGKILL
    assert group.oom_kills() == 1 and group.peak() <= 64 * MIB
    assert group.processes() == []
    group.remove()
    assert not group._folder.exists()
