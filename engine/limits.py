"""What binds this process on its machine: memory that it may still take, and processors that it may use.

Of memory the least counts of what the machine has available, what every control group leaves in which this
process is, from its own up to the root (version 1 and 2, also in a container that sees a part of them), and
what ``ulimit`` leaves. What cannot be read is named. All files are read below a root folder, so that tests
can describe other machines; this module knows neither tensors nor tiers.
"""

from __future__ import annotations

import contextlib
import math
import os
import platform
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from engine.errors import BudgetError, OutOfMemoryError, raise_if_memory
from engine.units import KIB, format_bytes

_UNLIMITED = 1 << 60
"""From here on a limit of a control group stands for none: version 1 writes the largest number it has."""

_V1, _V2 = "cgroup", "cgroup2"


@dataclass(frozen=True)
class Limit:
    """A limit of memory."""

    name: str
    """For people: what sets it."""

    free: int
    """Bytes that it leaves to this process, at least 0."""


@dataclass(frozen=True)
class MemoryLimits:
    """All limits of memory that were found."""

    limits: tuple[Limit, ...]
    unread: tuple[str, ...] = ()
    """One line for each that there may be and that could not be read."""

    @property
    def binding(self) -> Limit:
        """The one that leaves least."""
        return min(self.limits, key=lambda limit: limit.free)

    @property
    def free(self) -> int:
        """Bytes that this process may still take."""
        return self.binding.free


def memory_limits(root: Path = Path("/")) -> MemoryLimits:
    """Look at all limits of memory as they are now."""
    proc, unread = root / "proc", list[str]()
    limits = [Limit("the machine's memory", _available(proc))]
    groups = _control_groups(root, "memory", unread)
    for group in groups:
        limits += _group_limits(group, unread)
    limits += _ulimits(proc)
    return MemoryLimits(tuple(limits), tuple(dict.fromkeys(unread)))


def usable_cores(root: Path = Path("/")) -> int:
    """Processors that this process may use at once: by its affinity, and by the quotas of its control groups.

    A part of a processor counts as one.
    """
    counts = [len(_allowed(root)) or 1]
    for group in _control_groups(root, "cpu", []):
        for folder in group.levels:
            if group.kind == _V1:
                quota, period = (_number(folder / f"cpu.cfs_{name}_us") for name in ("quota", "period"))
            else:
                quota, period = _numbers(folder / "cpu.max", 2)
            if quota and period and quota > 0:
                counts.append(max(1, math.ceil(quota / period)))
    return min(counts)


def busy_seconds(root: Path = Path("/")) -> float:
    """Seconds so far in which the processors of this process were not idle, whoever used them.

    0 where the system does not say.
    """
    ticks, allowed = 0, _allowed(root)
    for line in _text(root / "proc/stat").splitlines():
        name, *counts = line.split()
        if name.startswith("cpu") and name[3:].isdigit() and int(name[3:]) in allowed:
            user, nice, system, _idle, _wait, *interrupts = map(int, counts[:8])
            ticks += user + nice + system + sum(interrupts)
    return ticks / os.sysconf("SC_CLK_TCK")


def _allowed(root: Path) -> frozenset[int]:
    """Numbers of the processors on which this process may run."""
    own = status_value(root / "proc/self/status", "Cpus_allowed_list")
    return _ranges(own or _text(root / "sys/devices/system/cpu/online"))


def processor() -> str:
    """The processor's name."""
    named = status_value(Path("/proc/cpuinfo"), "model name")
    return named or platform.processor() or platform.machine()


class OtherWork:
    """How much other processes compute from now on, or while a block of code runs.

    Attributes:
        cores: processors that they kept busy, on average; None where the system does not say, or the time was
            too short for its count.
    """

    def __init__(self) -> None:
        self.cores: float | None = None
        self._began, self._busy, self._own = time.monotonic(), busy_seconds(), time.process_time()

    def __enter__(self) -> OtherWork:
        return self

    def __exit__(self, *error: object) -> None:
        self.look()

    def look(self) -> float | None:
        """How many it was so far; see ``cores``."""
        passed = time.monotonic() - self._began
        if self._busy and passed > _SHORTEST:
            busy, own = busy_seconds() - self._busy, time.process_time() - self._own
            self.cores = max(0.0, (busy - own) / passed)
        return self.cores


_SHORTEST = 0.1
"""Seconds below which the system's own count, in steps of a hundredth, says little."""


def require_memory(count: int, what: str, root: Path = Path("/")) -> None:
    """Refuse to begin what takes more memory than there is, before the system kills the process for it.

    Args:
        count: bytes that it takes.
        what: names it.

    Raises:
        BudgetError: if there is less.
    """
    binding = memory_limits(root).binding
    if count > binding.free:
        raise BudgetError("host", count, binding.free, what, f"give more ({binding.name} leaves no more)")


@contextlib.contextmanager
def memory_errors() -> Iterator[None]:
    """Turn the error of an allocation that failed, whoever's it is, into an `OutOfMemoryError` of one line.

    Raises:
        OutOfMemoryError: for every error that says that memory is lacking; others pass.
    """
    try:
        yield
    except (OutOfMemoryError, MemoryError, RuntimeError, OSError, ImportError) as error:
        try:
            raise_if_memory(error)
        except OutOfMemoryError as found:
            if " leaves " in str(found):  # said by a call within this one
                raise
            binding = memory_limits().binding
            left = f"{binding.name} leaves {format_bytes(binding.free)} now"
            raise OutOfMemoryError(f"{found} ({left})") from error
        raise


# Memory of the machine and of the process


def _available(proc: Path) -> int:
    """Bytes that can be had without swapping; all of the memory where the system does not say."""
    for name in ("MemAvailable", "MemTotal"):
        if kilobytes := status_value(proc / "meminfo", name):
            return int(kilobytes.split()[0]) * KIB
    return _UNLIMITED


def _ulimits(proc: Path) -> Iterator[Limit]:
    """What the limits of ``ulimit`` leave: addresses (-v), and data (-d)."""
    used = {"Max address space": ("VmSize", "ulimit -v"), "Max data size": ("VmData", "ulimit -d")}
    for line in _text(proc / "self" / "limits").splitlines():
        for name, (key, shown) in used.items():
            if line.startswith(name) and (words := line[len(name) :].split()) and words[0].isdigit():
                taken = status_value(proc / "self" / "status", key)
                held = int(taken.split()[0]) * KIB if taken else 0
                yield Limit(shown, max(0, int(words[0]) - held))


# Control groups


@dataclass(frozen=True)
class _Group:
    """A control group that this process is in, as far as it can be seen."""

    kind: str
    """Type of its file system: that of version 1 or of version 2."""

    path: str
    """As ``/proc/self/cgroup`` names it."""

    levels: tuple[Path, ...]
    """Its folder and those of the groups around it, the outermost last."""


def _control_groups(root: Path, controller: str, unread: list[str]) -> list[_Group]:
    """The groups of this process that may limit something; lines are added for those that cannot be seen."""
    own = _text(root / "proc/self/cgroup")
    mounts = _mounts(root, controller)
    found = []
    for line in filter(None, own.splitlines()):
        number, controllers, path = line.split(":", 2)
        if number != "0" and controller not in controllers.split(","):
            continue
        kind = _V1 if number != "0" else _V2
        places = [(_below(path, top), root / place.lstrip("/")) for top, place in mounts.get(kind, ())]
        seen = [_levels(place, below) for below, place in places if below is not None]
        seen += [(place,) for _, place in places if place.is_dir()]  # at least a container sees its own
        levels = next(filter(None, seen), ())
        if levels:
            found.append(_Group(kind, path, levels))
        elif path != "/":
            unread.append(
                f"the {controller} limit of control group {path} cannot be read: it is not mounted here"
            )
    return found


def _mounts(root: Path, controller: str) -> dict[str, list[tuple[str, str]]]:
    """By type: which group is mounted, and where; of several mounts at one place only the last is visible."""
    places: dict[str, tuple[str, str]] = {}
    for line in _text(root / "proc/self/mountinfo").splitlines():
        before, _, after = line.partition(" - ")
        words, about = before.split(" "), after.split(" ")
        if len(words) < 5 or len(about) < 3:
            continue
        is_meant = about[0] == _V2 or (about[0] == _V1 and controller in about[2].split(","))
        place = _unescaped(words[4])
        places.pop(place, None)
        if is_meant:
            places[place] = about[0], _unescaped(words[3])
    kinds: dict[str, list[tuple[str, str]]] = {}
    for place, (kind, top) in places.items():
        kinds.setdefault(kind, []).append((top, place))
    return kinds


def _below(path: str, top: str) -> str | None:
    """A group's path relative to the group that is mounted; None if it is not below that."""
    own, mounted = PurePosixPath(path), PurePosixPath(top)
    if ".." in own.parts or not own.is_relative_to(mounted):
        return None
    return str(own.relative_to(mounted))


def _levels(place: Path, below: str) -> tuple[Path, ...]:
    """The folder of a group below a mount, and its parents up to there; none if it is not there."""
    folder = place / below
    if not folder.is_dir():
        return ()
    return tuple(parent for parent in (folder, *folder.parents) if parent.is_relative_to(place))


def _group_limits(group: _Group, unread: list[str]) -> Iterator[Limit]:
    """What each level of a group leaves, and what levels leave that are not visible."""
    for number, folder in enumerate(group.levels):
        name = f"control group {group.path}" + (f", {number} levels up" if number else "")
        try:
            if group.kind == _V1:
                if number and _text(folder / "memory.use_hierarchy").strip() == "0":
                    return  # what its children hold is not charged to it
                most, used = _read(folder / "memory.limit_in_bytes"), folder / "memory.usage_in_bytes"
            else:
                set_here = _read(folder / "memory.max"), _read(folder / "memory.high")  # killed, slowed down
                most = min((value for value in set_here if value is not None), default=None)
                used = folder / "memory.current"
            if most is not None and most < _UNLIMITED:
                yield Limit(name, max(0, most - _held(folder, used)))
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is no number"
            unread.append(f"the memory limit of {name} cannot be read below {folder}: {reason}")
    if group.kind == _V1 and group.levels:
        yield from _hidden_limit(group)


def _hidden_limit(group: _Group) -> Iterator[Limit]:
    """The least limit of all levels, which version 1 tells every group, by what the visible levels hold."""
    least = _statistics(group.levels[0]).get("hierarchical_memory_limit", _UNLIMITED)
    visible = (_number(folder / "memory.limit_in_bytes") for folder in group.levels)
    if least < min(filter(None, visible), default=_UNLIMITED):
        top = group.levels[-1]
        held = _held(top, top / "memory.usage_in_bytes") if (top / "memory.usage_in_bytes").exists() else 0
        yield Limit(f"a control group around {group.path}", max(0, least - held))


def _held(folder: Path, usage: Path) -> int:
    """Bytes of a group, without page cache that the system takes back when memory is needed."""
    counts = _statistics(folder)
    cache = sum(
        counts.get(f"total_{kind}_file", counts.get(f"{kind}_file", 0)) for kind in ("inactive", "active")
    )
    return max(0, (_read(usage) or 0) - cache)


def _statistics(folder: Path) -> dict[str, int]:
    lines = (line.split() for line in _text(folder / "memory.stat").splitlines())
    return {words[0]: int(words[1]) for words in lines if len(words) == 2 and words[1].isdigit()}


def _read(file: Path) -> int | None:
    """The number in a file; None for no limit, and where there is no such file: that level sets none.

    Raises:
        OSError, ValueError: for one that cannot be read.
    """
    try:
        text = file.read_text(encoding="utf-8").strip()
    except FileNotFoundError:
        return None
    return None if text == "max" else int(text)


# Files


def _text(file: Path) -> str:
    """The content of a file; empty where it cannot be read."""
    try:
        return file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def status_value(file: Path, key: str) -> str:
    """What stands behind a key, up to the end of its line; empty where the key is not there."""
    for line in _text(file).splitlines():
        name, _, value = line.partition(":")
        if name.strip() == key:
            return value.strip()
    return ""


def _number(file: Path) -> int:
    (number,) = _numbers(file, 1)
    return number


def _numbers(file: Path, count: int) -> tuple[int, ...]:
    """The numbers in a file; 0 for each that is not there."""
    words = [*_text(file).split(), *["0"] * count][:count]
    return tuple(int(word) if word.lstrip("-").isdigit() else 0 for word in words)


def _ranges(text: str) -> frozenset[int]:
    """The numbers that a list of ranges names: ``0-3,8``."""
    numbers: set[int] = set()
    for part in text.strip().split(","):
        if found := re.fullmatch(r"(\d+)(?:-(\d+))?", part.strip()):
            numbers.update(range(int(found[1]), int(found[2] or found[1]) + 1))
    return frozenset(numbers)


def _unescaped(path: str) -> str:
    """A path of ``mountinfo``, where octal numbers stand for spaces and the like."""
    return re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), path)
