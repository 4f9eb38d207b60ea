"""Control groups that limit the memory of a child process, page cache included.

It uses cgroup version 1 or 2, whichever lets this process make a group. Swap is limited, too, where the
kernel counts it.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Sequence
from pathlib import Path

_POLL = 0.05


class MemoryGroup:
    """A control group with a memory limit.

    Attributes:
        version: 1 or 2.
    """

    def __init__(self, limit: int, root: Path = Path("/sys/fs/cgroup")) -> None:
        """Make the group below this process's own.

        Raises:
            OSError: if this process can make one in neither version; the message says what was tried.
        """
        tried = []
        for version, parent in parents(Path("/proc/self/cgroup").read_text(encoding="utf-8"), root):
            _remove_abandoned(parent)
            self.version, self._folder = version, parent / f"tierbench-{os.getpid()}-{time.monotonic_ns()}"
            try:
                self._folder.mkdir()
            except OSError as error:
                tried.append(f"version {version} in {parent}: {error.strerror}")
                continue
            try:
                self._write("memory.max" if version == 2 else "memory.limit_in_bytes", limit)
            except OSError as error:
                tried.append(f"version {version} in {parent}: no memory limit ({error.strerror})")
                self._folder.rmdir()
                continue
            with contextlib.suppress(OSError):  # kernels that do not count swap
                self._write(
                    *(("memory.swap.max", 0) if version == 2 else ("memory.memsw.limit_in_bytes", limit))
                )
            return
        raise OSError(f"no memory control group can be made: {'; '.join(tried) or 'none is mounted'}")

    def inside(self, command: Sequence[str]) -> list[str]:
        """The command line that runs a command in the group: a shell joins first, so that all is counted."""
        return ["/bin/sh", "-c", 'echo $$ > "$0" && exec "$@"', str(self._folder / "cgroup.procs"), *command]

    def processes(self) -> list[int]:
        """Ids of the processes that are in the group now."""
        try:
            return [int(line) for line in (self._folder / "cgroup.procs").read_text(encoding="utf-8").split()]
        except OSError:
            return []

    def peak(self) -> int:
        """Peak bytes so far."""
        name = "memory.peak" if self.version == 2 else "memory.max_usage_in_bytes"
        try:
            return int((self._folder / name).read_text(encoding="utf-8"))
        except OSError:
            return 0  # kernels before 5.19

    def oom_kills(self) -> int:
        """How many processes have been killed for lack of memory so far."""
        name = "memory.events" if self.version == 2 else "memory.oom_control"
        return counter((self._folder / name).read_text(encoding="utf-8"), "oom_kill")

    def remove(self) -> None:
        """Remove the group, whose processes must have ended."""
        for _ in range(100):
            try:
                self._folder.rmdir()
                return
            except OSError:
                time.sleep(_POLL)

    def _write(self, name: str, value: int) -> None:
        (self._folder / name).write_text(str(value), encoding="utf-8")


def _remove_abandoned(parent: Path) -> None:
    """Remove the empty groups of processes that were killed before they could do so."""
    for folder in parent.glob("tierbench-*-*"):
        process = folder.name.split("-")[1]
        if process.isdecimal() and not Path(f"/proc/{process}").exists():
            with contextlib.suppress(OSError):
                folder.rmdir()


def parents(groups: str, root: Path = Path("/sys/fs/cgroup")) -> list[tuple[int, Path]]:
    """Version and folder of the groups, in ``/proc/self/cgroup``, below which a memory group may be made."""
    found = []
    for line in groups.splitlines():
        number, controllers, path = line.split(":", 2)
        below = path.lstrip("/")
        if number == "0" and not controllers:
            found.append((2, root / below))
        elif "memory" in controllers.split(","):
            found.append((1, root / "memory" / below))
    return [(version, folder) for version, folder in found if folder.is_dir()]


def counter(text: str, name: str) -> int:
    """One value from a file of ``name value`` lines; 0 where the name is missing."""
    return int(dict(line.split(" ", 1) for line in text.splitlines()).get(name, 0))
