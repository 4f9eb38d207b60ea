"""A large file, written and read piece by piece past the page cache, with a checksum per piece.

Direct I/O where the file system allows it; elsewhere buffered, and what was moved is dropped from the page
cache, so that a limit on memory is not exceeded by a copy of the disk. Knows no tensors.

Checksums are CRC-32: they have to find what disks and cables do by accident, not what an adversary does, and
zlib's makes several GB/s without holding the interpreter's lock, where SHA-256 makes a fraction of that.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import mmap
import os
import queue
import threading
import zlib
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from pathlib import Path

from engine.errors import StorageError
from engine.memory.store.index import PIECE
from engine.spec.layout import aligned
from engine.units import MIB, format_bytes

VARIABLE = "TIERBENCH_STORE"
"""Environment variable that names the store's folder."""

_THREADS = 2
_BUFFERS = _THREADS + 2
_DROP_EVERY = 64 * MIB  # bytes that buffered writes leave in the page cache at most
_AHEAD = 4 * _THREADS  # pieces that are asked for at once

_ELSEWHERE = f"choose another folder with --store or {VARIABLE}"
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NO_RIGHT = (errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EEXIST)


@contextlib.contextmanager
def one_line(action: str, path: Path) -> Iterator[None]:
    """Turn the operating system's errors into one line with the limit and the cure.

    Raises:
        StorageError: for every OSError.
    """
    try:
        yield
    except OSError as error:
        limit, cure = "", f"check the disk, or {_ELSEWHERE}"
        if error.errno in _NO_SPACE:
            limit = _free_space(path)
            cure = f"free space, remove entries with run_helm.py store remove, or {_ELSEWHERE}"
        elif error.errno in _NO_RIGHT:
            cure = f"{_ELSEWHERE} that can be written"
        what = error.strerror or str(error)
        raise StorageError(f"cannot {action} {path}{limit}: {what}: {cure}") from error


def _free_space(path: Path) -> str:
    for folder in (path, *path.parents):
        with contextlib.suppress(OSError):
            found = os.statvfs(folder)
            return f", where {format_bytes(found.f_bavail * found.f_frsize)} are free"
    return ""


def open_direct(path: Path, flags: int) -> tuple[int, bool]:
    """A descriptor past the page cache where that is possible, and whether it is."""
    try:
        return os.open(path, flags | os.O_DIRECT, 0o600), True
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return os.open(path, flags & ~os.O_EXCL, 0o600), False  # the refused call may have made the file


class PieceWriter:
    """Writes pieces of a file of known length in the background, with a few buffers that are reused.

    Attributes:
        descriptor: of the file, for locks.
        direct: whether the page cache is passed by.
    """

    def __init__(self, path: Path) -> None:
        """Create the file; raises OSError. `reserve` comes next."""
        self.path = path
        self.descriptor, self.direct = open_direct(path, os.O_RDWR | os.O_CREAT | os.O_EXCL)
        self._pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="store-writer")
        self._free: queue.SimpleQueue[memoryview] = queue.SimpleQueue()
        self._failure: BaseException | None = None
        self._written = 0
        self._lock = threading.Lock()

    def reserve(self, nbytes: int) -> None:
        """Take the space, so that a full disk is met now and not midway; raises OSError."""
        if nbytes:
            os.posix_fallocate(self.descriptor, 0, nbytes)
        for _ in range(_BUFFERS):
            self._free.put(memoryview(mmap.mmap(-1, PIECE)))

    def buffer(self) -> memoryview:
        """Memory for the next piece; waits while all is in flight. Raises what an earlier piece met."""
        free = self._free.get()
        if self._failure is not None:
            self._free.put(free)
            raise self._failure
        return free

    def write(self, buffer: memoryview, count: int, offset: int) -> Future[int]:
        """Write the first ``count`` bytes of a `buffer`, which is given back; yields their checksum.

        ``offset`` is a multiple of the alignment; up to the next one behind the bytes zeros are written.
        """
        return self._pool.submit(self._write, buffer, count, offset)

    def _write(self, buffer: memoryview, count: int, offset: int) -> int:
        try:
            checksum = zlib.crc32(buffer[:count])
            whole = aligned(count)
            buffer[count:whole] = bytes(whole - count)
            done = 0
            while done < whole:
                done += self._write_some(buffer[done:whole], offset + done)
            if not self.direct:
                self._drop(whole)
            return checksum
        except BaseException as error:
            self._failure = error
            raise
        finally:
            self._free.put(buffer)

    def _write_some(self, view: memoryview, offset: int) -> int:
        try:
            return os.pwritev(self.descriptor, [view], offset)
        except OSError as error:
            if error.errno != errno.EINVAL or not self.direct:
                raise
        flags = fcntl.fcntl(self.descriptor, fcntl.F_GETFL)  # accepted when opened, refused when used
        fcntl.fcntl(self.descriptor, fcntl.F_SETFL, flags & ~os.O_DIRECT)
        self.direct = False
        return os.pwritev(self.descriptor, [view], offset)

    def _drop(self, count: int) -> None:
        with self._lock:
            self._written += count
            if self._written < _DROP_EVERY:
                return
            self._written = 0
        self.sync()

    def sync(self) -> None:
        """Bring everything that was written to the disk and out of the page cache; raises OSError."""
        os.fsync(self.descriptor)
        os.posix_fadvise(self.descriptor, 0, 0, os.POSIX_FADV_DONTNEED)

    def stop(self) -> None:
        """Wait for what is in flight and end the threads; the descriptor stays open."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    def close(self) -> None:
        """Close the file, and with it give up its lock."""
        self.stop()
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1


def checksums_of(path: Path, parts: Iterable[tuple[int, int]]) -> Iterator[int]:
    """The checksum of each part (offset, bytes; at most `PIECE`) of a file, in order, read from the disk.

    Offsets are multiples of the alignment. Raises OSError.
    """
    descriptor, direct = open_direct(path, os.O_RDONLY)
    buffers: queue.SimpleQueue[memoryview] = queue.SimpleQueue()
    for _ in range(_THREADS):
        buffers.put(memoryview(mmap.mmap(-1, PIECE)))

    def read(part: tuple[int, int]) -> int:
        buffer = buffers.get()
        try:
            _read(descriptor, buffer, *part)
            if not direct:
                os.posix_fadvise(descriptor, part[0], part[1], os.POSIX_FADV_DONTNEED)
            return zlib.crc32(buffer[: part[1]])
        finally:
            buffers.put(buffer)

    remaining = iter(parts)
    try:
        if not direct:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)  # nothing ahead of what is dropped
        with ThreadPoolExecutor(_THREADS, thread_name_prefix="store-reader") as pool:
            running = [pool.submit(read, part) for part in islice(remaining, _AHEAD)]
            while running:
                yield running.pop(0).result()
                running += [pool.submit(read, part) for part in islice(remaining, 1)]
    finally:
        if not direct:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def _read(descriptor: int, buffer: memoryview, offset: int, count: int) -> None:
    whole, done = aligned(count), 0
    while done < count:
        got = os.preadv(descriptor, [buffer[done:whole]], offset + done)
        if not got:
            raise OSError(errno.EIO, f"the file ends at byte {offset + done:,}")
        done += got
