"""How the C library hands out memory: kept for the next tensor while a run goes on, given back at its end.

By default glibc takes every large block from the system and returns it when it is freed, so that every
temporary of a layer is touched for the first time again: page faults at about 1 GB/s, more than many
of the operations themselves take. What is freed is better kept. Other C libraries are left alone.
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
    """Let this process keep what it frees for what it allocates next; whether that took effect.

    Meant for passes, whose temporaries are the same again and again. While weights are loaded no two
    sizes are, and what is kept between them would come on top of the plan: ``keep=False`` until then.
    """
    library = _glibc()
    if library is None:
        return False
    done = library.mallopt(_M_MMAP_MAX, 0 if keep else _MMAP_DEFAULT)
    return bool(done and library.mallopt(_M_TRIM_THRESHOLD, _NEVER if keep else _TRIM_DEFAULT))


def give_back() -> bool:
    """Return all memory that is free to the system; whether there was any."""
    library = _glibc()
    return library is not None and bool(library.malloc_trim(0))


def private_bytes() -> int:
    """Bytes of memory that this process holds and no file backs; 0 where the system does not say."""
    try:
        resident, shared = Path("/proc/self/statm").read_text().split()[1:3]
    except (OSError, ValueError):
        return 0
    return (int(resident) - int(shared)) * os.sysconf("SC_PAGE_SIZE")


class Overhang:
    """What a process holds beyond what is accounted for, kept from growing.

    Freed memory that is kept lies in pieces. Where every pass has temporaries of other sizes, as when prompts
    begin one after the other, fewer and fewer of them fit into those, and the process grows past its plan.
    """

    def __init__(self, accounted: Callable[[], int]) -> None:
        """What is held now without being accounted for is the process's own: interpreter, libraries, code."""
        self._accounted = accounted
        self._own = private_bytes() - accounted()

    def trim(self) -> bool:
        """Give back what is free if there is more than the process's own; whether that was done.

        What is still there afterwards is in use, and is not looked for again.
        """
        if private_bytes() - self._accounted() <= self._own:
            return False
        give_back()
        self._own = max(self._own, private_bytes() - self._accounted())
        return True
