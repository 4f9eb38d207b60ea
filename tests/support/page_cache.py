"""How much of a file the operating system keeps in its page cache."""

from __future__ import annotations

import ctypes
import mmap
from pathlib import Path


def resident(path: Path) -> float:
    """The share of a file's pages that are in the page cache."""
    return resident_pages(path) / -(-path.stat().st_size // mmap.PAGESIZE)


def resident_pages(path: Path) -> int:
    """The number of a file's pages that are in the page cache."""
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as mapped:
        flags = (ctypes.c_ubyte * -(-len(mapped) // mmap.PAGESIZE))()
        address = ctypes.addressof(ctypes.c_char.from_buffer(mapped))
        library = ctypes.CDLL(None, use_errno=True)
        assert library.mincore(ctypes.c_void_p(address), ctypes.c_size_t(len(mapped)), flags) == 0
        return sum(flag & 1 for flag in flags)
