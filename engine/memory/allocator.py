"""How the C library allocates memory: kept for the next tensor during a run, given back at its end.

By default glibc takes every large block from the system and returns it when it is freed, so that every
temporary of a layer faults its pages in again, at about 1 GB/s, which takes longer than many of the
operations themselves. So freed memory is kept. Other C libraries are left alone.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from functools import cache
from pathlib import Path

from engine.units import KIB

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # malloc.h
_NEVER, _TRIM_DEFAULT, _MMAP_DEFAULT = 2**31 - 1, 128 * KIB, 65_536


@cache
def _glibc() -> ctypes.CDLL | None:
    try:
        library = ctypes.CDLL(None)
    except (OSError, TypeError):
        return None
    return library if hasattr(library, "gnu_get_libc_version") else None


def keep_freed_memory(keep: bool = True) -> bool:
    """Let this process keep freed memory for its next allocations; returns whether that took effect.

    Meant for passes, whose temporaries repeat. While weights are loaded, sizes hardly ever repeat, and the
    memory kept between them would come on top of the plan: use ``keep=False`` until then.
    """
    library = _glibc()
    if library is None:
        return False
    done = library.mallopt(_M_MMAP_MAX, 0 if keep else _MMAP_DEFAULT)
    return bool(done and library.mallopt(_M_TRIM_THRESHOLD, _NEVER if keep else _TRIM_DEFAULT))


def give_back() -> bool:
    """Return all free memory to the system; returns whether there was any."""
    library = _glibc()
    return library is not None and bool(library.malloc_trim(0))


def private_bytes() -> int:
    """Bytes of this process's memory that no file backs; 0 where the system does not say."""
    try:
        resident, shared = Path("/proc/self/statm").read_text(encoding="utf-8").split()[1:3]
    except (OSError, ValueError):
        return 0
    return (int(resident) - int(shared)) * os.sysconf("SC_PAGE_SIZE")


class Overhang:
    """Keeps the memory that a process holds beyond the ledger from growing.

    Freed memory that is kept is fragmented. Where every pass has temporaries of different sizes, as when
    prompts start one after another, fewer and fewer of them fit into the fragments, and the process outgrows
    its plan.
    """

    def __init__(self, accounted: Callable[[], int]) -> None:
        """What is held beyond ``accounted()`` now is the process's own: interpreter, libraries, code."""
        self._accounted = accounted
        self._own = private_bytes() - accounted()

    def trim(self) -> bool:
        """Give back free memory if the process holds more than its own; returns whether it did.

        What remains afterwards is in use, and counts as the process's own from then on.
        """
        if private_bytes() - self._accounted() <= self._own:
            return False
        give_back()
        self._own = max(self._own, private_bytes() - self._accounted())
        return True
