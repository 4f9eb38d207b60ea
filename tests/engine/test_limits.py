"""Limits that bind, of memory and of processors, on machines that are made of files, and on this one."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, LlamaConfig

from engine.engine import Engine
from engine.errors import BudgetError, StorageError
from engine.limits import memory_errors, memory_limits, require_memory, usable_cores
from engine.units import MIB
from tests.support.cgroup import memory_group

MACHINE = 8192 * MIB
V1 = "/sys/fs/cgroup/memory"
V1_MOUNT = "35 31 0:32 {top} {place} rw,relatime shared:9 - cgroup cgroup rw,memory"
V2_MOUNT = "41 31 0:38 {top} {place} rw,nosuid - cgroup2 cgroup2 rw"
CPU_MOUNT = "33 31 0:33 {top} {place} rw - cgroup cgroup rw,cpu,cpuacct"


def machine(
    root: Path,
    groups: str = "",
    mounts: str = "",
    files: Mapping[str, object] | None = None,
    limits: str = "",
    cpus: str = "0-7",
) -> Path:
    """Write a machine's /proc and /sys: 8 GiB of memory, 8 processors."""
    contents = {
        "/proc/meminfo": f"MemTotal: 99999999 kB\nMemAvailable: {MACHINE >> 10} kB\n",
        "/proc/self/cgroup": groups,
        "/proc/self/mountinfo": mounts,
        "/proc/self/limits": limits,
        "/proc/self/status": f"Name:\tx\nVmSize:\t  1024 kB\nVmData:\t  512 kB\nCpus_allowed_list:\t{cpus}\n",
        **(files or {}),
    }
    for name, content in contents.items():
        path = root / name.lstrip("/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{content}\n")
    return root


def v1(folder: str, limit: int, used: int, cache: int = 0, least: int | None = None) -> dict[str, object]:
    """The files of a group of version 1; sizes in MiB."""
    statistics = f"cache 1\ntotal_inactive_file {cache * MIB}"
    if least is not None:
        statistics += f"\nhierarchical_memory_limit {least * MIB}"
    return {
        f"{folder}/memory.limit_in_bytes": limit * MIB,
        f"{folder}/memory.usage_in_bytes": used * MIB,
        f"{folder}/memory.stat": statistics,
        f"{folder}/memory.use_hierarchy": 1,
    }


def v2(folder: str, limit: int | str, used: int, high: int | str = "max") -> dict[str, object]:
    """The files of a group of version 2; sizes in MiB, or max."""
    most, slow = (value if isinstance(value, str) else value * MIB for value in (limit, high))
    return {
        f"{folder}/memory.max": most,
        f"{folder}/memory.high": slow,
        f"{folder}/memory.current": used * MIB,
        f"{folder}/memory.stat": f"inactive_file {10 * MIB}",
    }


@pytest.fixture
def tiny_config(tmp_path: Path) -> Path:
    """A model's folder with an architecture that no other test has tried."""
    LlamaConfig(
        hidden_size=24, intermediate_size=40, num_hidden_layers=1, num_attention_heads=3, vocab_size=77,
        architectures=["LlamaForCausalLM"],
    ).save_pretrained(tmp_path / "model")  # fmt: skip
    return tmp_path / "model"


NONE = 1 << 43  # MiB: what version 1 writes for no limit
MEMORY_CASES = {
    "no limit": ("", "", {}, 8192),
    "version 1, own group": ("4:memory:/a/b", V1_MOUNT.format(top="/", place=V1),
        v1(f"{V1}/a/b", 1200, 300, cache=100) | v1(f"{V1}/a", NONE, 700) | v1(V1, NONE, 5000), 1000),
    "version 1, parent": ("4:memory:/a/b", V1_MOUNT.format(top="/", place=V1),
        v1(f"{V1}/a/b", NONE, 300) | v1(f"{V1}/a", 1200, 700) | v1(V1, NONE, 5000), 500),
    "version 1, far above, as Slurm's": ("4:memory:/slurm/uid_1/job_2/step_0/task_0",
        V1_MOUNT.format(top="/", place=V1),
        v1(f"{V1}/slurm/uid_1/job_2/step_0/task_0", NONE, 1) | v1(f"{V1}/slurm/uid_1/job_2/step_0", NONE, 1)
        | v1(f"{V1}/slurm/uid_1/job_2", 900, 200) | v1(f"{V1}/slurm/uid_1", 800, 300), 500),
    "version 1, a container that sees its own group only": ("4:memory:/docker/1f",
        V1_MOUNT.format(top="/docker/1f", place=V1), v1(V1, 1200, 300), 900),
    "version 1, a mount over another": ("4:memory:/a/b",
        V1_MOUNT.format(top="/", place=V1) + "\n" + V1_MOUNT.format(top="/a/b", place=V1),
        v1(V1, 1200, 300), 900),
    "version 1, limit of a group that is not visible": ("4:memory:/pod/1f",
        V1_MOUNT.format(top="/pod/1f", place=V1), v1(V1, NONE, 300, least=1000), 700),
    "version 1, a group of which nothing is visible but the top": ("4:memory:/elsewhere/x",
        V1_MOUNT.format(top="/pod/1f", place=V1), v1(V1, 600, 100), 500),
    "version 1, without hierarchy": ("4:memory:/a/b", V1_MOUNT.format(top="/", place=V1),
        v1(f"{V1}/a/b", 1200, 300) | v1(f"{V1}/a", 100, 50) | {f"{V1}/a/memory.use_hierarchy": 0}, 900),
    "version 1 and 2 at once": ("4:memory:/a\n0::/b",
        V1_MOUNT.format(top="/", place=V1) + "\n" + V2_MOUNT.format(top="/", place="/sys/fs/cgroup/unified"),
        v1(f"{V1}/a", 1200, 300) | {"/sys/fs/cgroup/unified/b/cgroup.procs": 1}, 900),
    "version 2, own group": ("0::/a/b", V2_MOUNT.format(top="/", place="/sys/fs/cgroup"),
        v2("/sys/fs/cgroup/a/b", 1000, 110) | v2("/sys/fs/cgroup/a", "max", 500), 900),
    "version 2, a slice above": ("0::/user.slice/user-1.slice/x.scope",
        V2_MOUNT.format(top="/", place="/sys/fs/cgroup"),
        v2("/sys/fs/cgroup/user.slice/user-1.slice/x.scope", "max", 10)
        | v2("/sys/fs/cgroup/user.slice/user-1.slice", 2000, 410)
        | v2("/sys/fs/cgroup/user.slice", "max", 999), 1600),
    "version 2, slowed down before it is killed": ("0::/a",
        V2_MOUNT.format(top="/", place="/sys/fs/cgroup"), v2("/sys/fs/cgroup/a", 4000, 110, high=1000), 900),
    "version 2, a container with a namespace": ("0::/", V2_MOUNT.format(top="/", place="/sys/fs/cgroup"),
        v2("/sys/fs/cgroup", 1000, 110), 900),
    "version 2, outside of its namespace": ("0::/../../x", V2_MOUNT.format(top="/..", place="/sys/fs/cgroup"),
        v2("/sys/fs/cgroup", 1000, 110), 900),
    "a place with a space": ("0::/a", V2_MOUNT.format(top="/", place=r"/mnt/c\040g"),
        v2("/mnt/c g/a", 1000, 110), 900),
    "more is used than the limit": ("0::/a", V2_MOUNT.format(top="/", place="/sys/fs/cgroup"),
        v2("/sys/fs/cgroup/a", 100, 500), 0),
}  # fmt: skip


@pytest.mark.parametrize("name", MEMORY_CASES)
def test_the_least_limit_binds(name: str, tmp_path: Path) -> None:
    groups, mounts, files, expected = MEMORY_CASES[name]
    found = memory_limits(machine(tmp_path, groups, mounts, files))
    assert found.free == expected * MIB, found
    assert not found.unread


@pytest.mark.parametrize(
    ("line", "free", "name"),
    [
        ("Max address space      2147483648     unlimited     bytes", 2047 * MIB, "ulimit -v"),
        ("Max data size          104857600      unlimited     bytes", 99.5 * MIB, "ulimit -d"),
        ("Max address space      unlimited      unlimited     bytes", MACHINE, "machine"),
        ("Max address space      1000           unlimited     bytes", 0, "ulimit -v"),
    ],
)  # fmt: skip
def test_ulimits_bind(line: str, free: float, name: str, tmp_path: Path) -> None:
    found = memory_limits(machine(tmp_path, limits=line))
    assert found.free == free and name in found.binding.name


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    hidden = memory_limits(machine(tmp_path / "a", "4:memory:/x/y"))
    assert hidden.free == MACHINE
    assert [line.split(" cannot")[0] for line in hidden.unread] == ["the memory limit of control group /x/y"]
    files = {"/sys/fs/cgroup/a/memory.max": "much"}
    damaged = memory_limits(
        machine(tmp_path / "b", "0::/a", V2_MOUNT.format(top="/", place="/sys/fs/cgroup"), files)
    )
    assert damaged.free == MACHINE and "it is no number" in damaged.unread[0]
    assert not memory_limits(machine(tmp_path / "c", "4:memory:/")).unread, "the root group has no limit"


@pytest.mark.parametrize(
    ("groups", "mounts", "files", "cpus", "cores"),
    [
        ("", "", {}, "0-7", 8),
        ("", "", {}, "0,2-3,9", 4),
        ("0::/a/b", V2_MOUNT.format(top="/", place="/sys/fs/cgroup"),
         {"/sys/fs/cgroup/a/cpu.max": "150000 100000", "/sys/fs/cgroup/a/b/cpu.max": "max 100000"}, "0-7", 2),
        ("0::/a", V2_MOUNT.format(top="/", place="/sys/fs/cgroup"),
         {"/sys/fs/cgroup/a/cpu.max": "10000 100000"}, "0-7", 1),
        ("3:cpu,cpuacct:/a", CPU_MOUNT.format(top="/", place="/sys/fs/cgroup/cpu,cpuacct"),
         {"/sys/fs/cgroup/cpu,cpuacct/a/cpu.cfs_quota_us": 300000,
          "/sys/fs/cgroup/cpu,cpuacct/a/cpu.cfs_period_us": 100000}, "0-7", 3),
        ("3:cpu,cpuacct:/a", CPU_MOUNT.format(top="/", place="/sys/fs/cgroup/cpu,cpuacct"),
         {"/sys/fs/cgroup/cpu,cpuacct/a/cpu.cfs_quota_us": -1,
          "/sys/fs/cgroup/cpu,cpuacct/a/cpu.cfs_period_us": 100000}, "4", 1),
    ],
)  # fmt: skip
def test_cores(
    groups: str, mounts: str, files: Mapping[str, object], cpus: str, cores: int, tmp_path: Path
) -> None:
    assert usable_cores(machine(tmp_path, groups, mounts, files, cpus=cpus)) == cores


def test_this_machine() -> None:
    assert 1 <= usable_cores() <= (os.cpu_count() or 1)
    assert 0 < memory_limits().free < 1 << 50


def test_a_real_group_binds_whether_it_is_the_own_or_one_above() -> None:
    program = (
        "import sys; from engine.limits import memory_limits; sys.stdin.readline(); "
        "print(memory_limits().free)"
    )
    with memory_group("tierbench-limit") as group:
        if isinstance(group, str):
            pytest.skip(group)
        group.limit(700 * MIB)
        below = group.folder / "below"
        below.mkdir()
        try:
            for folder in (group.folder, below):
                child = subprocess.Popen(
                    [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
                )
                (folder / "cgroup.procs").write_text(str(child.pid))
                said, _ = child.communicate("go\n")
                assert 500 * MIB < int(said) <= 700 * MIB
        finally:
            below.rmdir()


def test_memory_is_asked_for_before_it_is_taken(tmp_path: Path) -> None:
    root = machine(tmp_path, limits="Max data size 2097152 unlimited bytes")
    require_memory(MIB, "a library", root)
    with pytest.raises(BudgetError, match=r"^a library needs 2\.00 MiB .*ulimit -d leaves no more"):
        require_memory(2 * MIB, "a library", root)


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: not enough memory: you tried"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
        RuntimeError("std::bad_alloc"),
        RuntimeError("can't start new thread"),
        OSError(12, "Cannot allocate memory"),
        ImportError("libx.so: failed to map segment from shared object"),
    ],
)
def test_lacking_memory_is_one_line_whoever_says_so(error: Exception) -> None:
    with pytest.raises(StorageError, match="given no more memory") as caught, memory_errors():
        raise error
    assert "\n" not in str(caught.value)


def test_lacking_memory_is_no_fault_of_a_model(monkeypatch: pytest.MonkeyPatch, tiny_config: Path) -> None:
    """What is raised while an architecture is tried, or a model built, is not the reason to refuse it."""

    def lacking(*args: object, **kwargs: object) -> None:
        raise RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes")

    monkeypatch.setattr(AutoModelForCausalLM, "from_config", lacking)
    with pytest.raises(StorageError, match="given no more memory"):
        Engine(tiny_config, weights="random", device="cpu")


@pytest.mark.parametrize(
    "error", [RuntimeError("shapes differ"), OSError(2, "No such file"), ImportError("x")]
)
def test_other_errors_pass(error: Exception) -> None:
    with pytest.raises(type(error)) as caught, memory_errors():
        raise error
    assert caught.value is error
