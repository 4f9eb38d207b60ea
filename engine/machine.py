"""This machine: its devices, its hardware and software, and the free bytes of each tier."""

from __future__ import annotations

import contextlib
import os
import platform
import shutil
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import transformers

from engine.errors import UsageError
from engine.spec.hardware import Budgets, Tier

VERSION = "0.1.0"
"""The package's version; pyproject.toml reads it from here."""


def pick_device(name: str, budgets: Budgets) -> tuple[torch.device, bool]:
    """Parse ``auto``, ``cpu``, ``cuda``, ``cuda:N`` or ``pretend``.

    Returns the device that computes and whether device and host tier are one memory. ``pretend`` computes
    on the CPU but keeps the device tier apart, with real copies and a budget of its own.

    Raises:
        UsageError: if there is no such device, or a device budget is given where none can be kept.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "pretend":
        return torch.device("cpu"), False
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise UsageError(f"device {name!r} is unknown: use auto, cpu, cuda, cuda:N or pretend")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UsageError(
            f"device {name!r} is not there: torch {torch.__version__} sees no CUDA device; use --device cpu"
        )
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UsageError(f"device {name!r} is not there: torch sees {torch.cuda.device_count()} CUDA devices")
    if device.type == "cpu" and device.index:
        raise UsageError(f"device {name!r} is not there: a CPU has no number, use cpu")
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    if device.type == "cpu" and budgets.device is not None:
        raise UsageError(
            "--device-memory has no meaning on a CPU-only machine, where device and host are one memory: "
            "give --host-memory, or --device pretend to keep them apart"
        )
    return device, device.type == "cpu"


def capacities(device: torch.device, offload_dir: Path) -> dict[Tier, int]:
    """Free bytes of each tier at this moment."""
    host = _free_host_memory()
    existing = next(folder for folder in (offload_dir, *offload_dir.resolve().parents) if folder.exists())
    return {
        Tier.DEVICE: torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else host,
        Tier.HOST: host,
        Tier.DISK: shutil.disk_usage(existing).free,
    }


def hardware(device: torch.device, pretend: bool) -> dict[str, Any]:
    """The machine, for the record of a run."""
    name = str(device)
    if device.type == "cuda":
        name = f"cuda: {torch.cuda.get_device_name(device)}"
    elif pretend:
        name = "pretend (device tier on the CPU)"
    return {
        "cpu": _proc_value("cpuinfo", "model name") or platform.processor() or platform.machine(),
        "cores": os.cpu_count() or 1,
        "threads": torch.get_num_threads(),
        "memory_bytes": _memory_bytes(),
        "device": name,
        "platform": platform.platform(),
    }


def software() -> dict[str, str]:
    """Versions of what computes, for the record of a run."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "safetensors": metadata.version("safetensors"),
        "tierbench": VERSION,
    }


def peak_rss() -> int:
    """Peak resident memory of this process so far, in bytes."""
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _free_host_memory() -> int:
    available = _proc_value("meminfo", "MemAvailable")
    free = int(available.split()[0]) * 1024 if available else _memory_bytes()
    return min(free, _cgroup_free())


def _memory_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _cgroup_free() -> int:
    """Free bytes under this process's memory cgroup, of either version; huge if there is no limit."""
    free = 1 << 62
    try:
        groups = [line.split(":", 2) for line in Path("/proc/self/cgroup").read_text().splitlines()]
    except OSError:
        return free
    for number, controllers, path in groups:
        for root, limit, usage in (
            (Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes", "memory.usage_in_bytes"),
            (Path("/sys/fs/cgroup"), "memory.max", "memory.current"),
        ):
            if (number == "0") == (limit == "memory.max") and (
                number == "0" or "memory" in controllers.split(",")
            ):
                folder = root / path.lstrip("/")
                with contextlib.suppress(OSError, ValueError):
                    used = int((folder / usage).read_text()) - _reclaimable(folder)
                    free = min(free, int((folder / limit).read_text()) - used)
    return max(free, 0)


def _reclaimable(group: Path) -> int:
    """Bytes of page cache charged to a memory cgroup that the system reclaims when memory is needed."""
    lines = (group / "memory.stat").read_text().splitlines()
    counts = dict(line.split(" ", 1) for line in lines)
    return int(counts.get("total_inactive_file", counts.get("inactive_file", 0)))


def _proc_value(file: str, key: str) -> str:
    """The first value of a key in a file of /proc; empty if it is not there."""
    with contextlib.suppress(OSError):
        for line in Path("/proc", file).read_text().splitlines():
            if line.startswith(key):
                return line.split(":", 1)[1].strip()
    return ""
