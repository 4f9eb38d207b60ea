"""A memory cgroup of version 1 or 2, to run a child process under a real limit."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_ROOT = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class MemoryGroup:
    """One cgroup, to limit and measure the memory of processes that `join` it and of their children."""

    folder: Path
    version: int

    def join(self, process: int) -> None:
        """Move a process into the group; memory that it has already stays charged to its old group."""
        (self.folder / "cgroup.procs").write_text(str(process))

    def limit(self, count: int) -> None:
        """Limit the memory to ``count`` bytes from now on, without swap."""
        if self.version == 1:
            (self.folder / "memory.limit_in_bytes").write_text(str(count))
            with contextlib.suppress(OSError):
                (self.folder / "memory.memsw.limit_in_bytes").write_text(str(count))
            return
        with contextlib.suppress(OSError):
            (self.folder / "memory.swap.max").write_text("0")
        (self.folder / "memory.max").write_text(str(count))

    @property
    def held(self) -> int:
        """Bytes charged now, without the page cache, which the kernel can drop."""
        usage, cache = ("usage_in_bytes", "cache") if self.version == 1 else ("current", "file")
        statistics = dict(
            line.split(maxsplit=1) for line in (self.folder / "memory.stat").read_text().splitlines()
        )
        return int((self.folder / f"memory.{usage}").read_text()) - int(statistics[cache])

    @property
    def kills(self) -> int:
        """How often a process has been killed for lack of memory."""
        name = "memory.oom_control" if self.version == 1 else "memory.events"
        lines = (self.folder / name).read_text().splitlines()
        return next((int(line.split()[1]) for line in lines if line.split()[0] == "oom_kill"), 0)


@contextlib.contextmanager
def memory_group(name: str) -> Iterator[MemoryGroup | str]:
    """A new group below this process's own, or the reason why there is none; removed at the end."""
    made = _make(f"{name}-{os.getpid()}")
    if isinstance(made, str):
        yield made
        return
    try:
        yield made
    finally:
        for _ in range(50):  # a process that was killed is charged until it is gone
            with contextlib.suppress(OSError):
                made.folder.rmdir()
                break
            time.sleep(0.1)


def _make(name: str) -> MemoryGroup | str:
    try:
        entries = [
            line.split(":", 2) for line in Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines()
        ]
    except OSError as error:
        return f"no cgroups: {error.strerror}"
    reason = "no memory cgroup is mounted"
    for _, controllers, own in entries:
        version = 1 if "memory" in controllers.split(",") else 2
        if version == 2 and controllers:
            continue
        base = _ROOT / "memory" if version == 1 else _ROOT
        limit = "memory.limit_in_bytes" if version == 1 else "memory.max"
        for parent in dict.fromkeys((base / own.lstrip("/"), base)):
            folder = parent / name
            try:
                folder.mkdir()
            except OSError as error:
                reason = f"{parent} cannot be written ({error.strerror})"
                continue
            if os.access(folder / limit, os.W_OK):
                return MemoryGroup(folder, version)
            folder.rmdir()
            reason = f"{parent} hands no memory limit down"
    return reason
