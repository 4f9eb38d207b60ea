"""How the C library hands out memory: kept for the next tensor while a run goes on, given back at its end.

By default glibc takes every large block from the system and returns it when it is freed, so that every
temporary of a layer is touched for the first time again: page faults at about 1 GB/s, more than many
of the operations themselves take. What is freed is better kept. Other C libraries are left alone.
"""

from __future__ import annotations

import ctypes
from functools import cache

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
