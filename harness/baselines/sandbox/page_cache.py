"""Drops files from the page cache, so that the disk is measured and not memory."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

_DROP_CACHES = Path("/proc/sys/vm/drop_caches")


def drop_files(folders: Iterable[Path]) -> int:
    """Write back every file in these folders, drop it from the page cache, and return the number of files."""
    count = 0
    for folder in folders:
        files = [folder] if folder.is_file() else [path for path in folder.rglob("*") if path.is_file()]
        for path in files:
            try:
                descriptor = os.open(path, os.O_RDONLY)
            except OSError:
                continue  # deleted in the meantime
            try:
                os.fdatasync(descriptor)
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
                count += 1
            finally:
                os.close(descriptor)
    return count


def drop(folders: Iterable[Path], everything: bool) -> str:
    """Drop the files of these folders and, if asked and allowed, the whole cache; return what was done."""
    drop_files(folders)
    if everything:
        try:
            _DROP_CACHES.write_text("1", encoding="utf-8")
        except OSError:
            return "posix_fadvise (drop_caches is not writable)"
        return "posix_fadvise and drop_caches"
    return "posix_fadvise"
