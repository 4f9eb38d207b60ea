"""This machine: its devices, its hardware and software, and the free bytes of each tier."""

from __future__ import annotations

import contextlib
import os
import platform
import shutil
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import transformers

from engine.errors import UsageError
from engine.limits import memory_limits, processor, status_value, usable_cores
from engine.plan.memory import limits_of
from engine.spec.hardware import Budgets, Tier
from engine.spec.settings import EngineSettings
from engine.units import KIB

VERSION = "0.1.0"
"""The package's version; pyproject.toml reads it from here."""


def pick_device(name: str, budgets: Budgets) -> tuple[torch.device, bool]:
    """Parse ``auto``, ``cpu``, ``cuda``, ``cuda:N`` or ``pretend``.

    Returns the device that computes and whether device and host tier are one memory. ``pretend`` computes
    on the CPU but keeps the device tier apart, with real copies and a budget of its own.

    Raises:
        UsageError: if there is no such device, or a device budget is given where none can be kept.
    """
    use_cores()
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


def capacities(device: torch.device, offload_dir: Path, host: int) -> dict[Tier, int]:
    """Free bytes of each tier at this moment, of which ``host`` in memory (`engine.limits.memory_limits`)."""
    existing = next(folder for folder in (offload_dir, *offload_dir.resolve().parents) if folder.exists())
    return {
        Tier.DEVICE: torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else host,
        Tier.HOST: host,
        Tier.DISK: shutil.disk_usage(existing).free,
    }


def tier_limits(
    settings: EngineSettings, device: torch.device, on_notice: Callable[[str], None] | None = None
) -> tuple[dict[Tier, int], str]:
    """Bytes that each tier may hold: its budget, or all that is free now where none is given.

    Args:
        on_notice: told, once in a process, what limits of memory there may be and cannot be read.

    Returns:
        The bytes, and what limits the host tier where no budget does; empty where one does.
    """
    found = memory_limits()
    limits = limits_of(settings.budgets, capacities(device, settings.offload_dir, found.free))
    if settings.budgets.host is not None:
        return limits, ""
    if on_notice is not None:
        for line in set(found.unread) - _said:
            on_notice(f"{line}: give --host-memory if there is one")
        _said.update(found.unread)
    return limits, found.binding.name


_said: set[str] = set()


def hardware(device: torch.device, pretend: bool) -> dict[str, Any]:
    """The machine, for the record of a run."""
    name = str(device)
    if device.type == "cuda":
        name = f"cuda: {torch.cuda.get_device_name(device)}"
    elif pretend:
        name = "pretend (device tier on the CPU)"
    return {
        "cpu": processor(),
        "cores": usable_cores(),
        "threads": torch.get_num_threads(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
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
    """Most bytes of this process that were resident at once, since it began or since `forget_peak`."""
    if kilobytes := status_value(Path("/proc/self/status"), "VmHWM"):
        return int(kilobytes.split()[0]) * KIB
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * KIB


def forget_peak() -> None:
    """Let `peak_rss` begin anew, where the system allows it."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def use_cores() -> None:
    """Let torch use no more threads than this process may use processors, unless a user chose their number.

    More of them than a quota allows wait for each other through most of every period.
    """
    cores = usable_cores()
    if "OMP_NUM_THREADS" not in os.environ and torch.get_num_threads() > cores:
        torch.set_num_threads(cores)
