"""The pieces of a large file: written in the background and read back, with a checksum per piece.

Checksums are CRC-32: they detect what disks and cables do by accident, not what an adversary does, and zlib
computes several GB/s without the interpreter's lock, where SHA-256 reaches a fraction of that.
"""

from __future__ import annotations

import queue
import zlib
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from itertools import islice
from pathlib import Path

from engine.errors import storage_errors
from engine.memory.disk.aligned import small_buffer
from engine.memory.disk.files import DirectFile
from engine.memory.disk.io_pool import IOPool
from engine.memory.store.index import PIECE
from engine.spec.layout import aligned

VARIABLE = "TIERBENCH_STORE"
"""Environment variable that names the store's folder."""

store_errors = partial(
    storage_errors,
    elsewhere=f"choose another folder with --store or {VARIABLE}",
    free="free space, remove entries with run_helm.py store remove,",
)

_THREADS = 2
_BUFFERS = _THREADS + 2
_AHEAD = 4 * _THREADS  # pieces that are requested at once


class PieceWriter:
    """Writes pieces of a file of known length in the background, with a few buffers that are reused.

    Attributes:
        file: the file; empty until `reserve`.
    """

    def __init__(self, path: Path) -> None:
        """Create the file.

        Raises:
            StorageError: if it cannot be created.
        """
        self.file = DirectFile(path, IOPool(), create=0, errors=store_errors)
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="store-writer")
        self._free: queue.SimpleQueue[memoryview] = queue.SimpleQueue()
        self._failure: BaseException | None = None

    def reserve(self, nbytes: int) -> None:
        """Reserve the space, so that a full disk shows now and not midway.

        Raises:
            StorageError: if the disk is full.
        """
        self.file.reserve(nbytes)
        for _ in range(_BUFFERS):
            self._free.put(small_buffer(PIECE))

    def buffer(self) -> memoryview:
        """Memory for the next piece; waits while all buffers are in flight.

        Raises:
            StorageError: if an earlier piece could not be written.
        """
        free = self._free.get()
        if self._failure is not None:
            self._free.put(free)
            raise self._failure
        return free

    def write(self, buffer: memoryview, count: int, offset: int) -> Future[int]:
        """Write the first ``count`` bytes of a `buffer`, which is given back; yields their checksum.

        ``offset`` is a multiple of the alignment; zeros follow the bytes up to the next multiple.
        """
        return self._threads.submit(self._write, buffer, count, offset)

    def _write(self, buffer: memoryview, count: int, offset: int) -> int:
        try:
            checksum = zlib.crc32(buffer[:count])
            whole = aligned(count)
            buffer[count:whole] = bytes(whole - count)
            self.file.transfer_blocks(offset, buffer[:whole], writing=True)
            return checksum
        except BaseException as error:
            self._failure = error
            raise
        finally:
            self._free.put(buffer)

    def stop(self) -> None:
        """Wait for what is in flight and end the threads; the file stays open."""
        self._threads.shutdown(wait=True, cancel_futures=True)

    def close(self) -> None:
        """Close the file, which releases its lock."""
        self.stop()
        self.file.close()


def checksums_of(path: Path, parts: Iterable[tuple[int, int]]) -> Iterator[int]:
    """The checksum of each part (offset, bytes) of a file, in order, read from the disk.

    Offsets are multiples of the alignment, parts have at most `PIECE` bytes, and the file ends at a
    multiple of the alignment.

    Raises:
        StorageError: if the disk fails or the file is too short.
    """
    file = DirectFile(path, IOPool(), errors=store_errors)
    buffers: queue.SimpleQueue[memoryview] = queue.SimpleQueue()
    for _ in range(_THREADS):
        buffers.put(small_buffer(PIECE))

    def read(part: tuple[int, int]) -> int:
        offset, count = part
        buffer = buffers.get()
        try:
            file.transfer_blocks(offset, buffer[: aligned(count)], writing=False)
            return zlib.crc32(buffer[:count])
        finally:
            buffers.put(buffer)

    remaining = iter(parts)
    try:
        with ThreadPoolExecutor(_THREADS, thread_name_prefix="store-reader") as threads:
            running = [threads.submit(read, part) for part in islice(remaining, _AHEAD)]
            while running:
                yield running.pop(0).result()
                running += [threads.submit(read, part) for part in islice(remaining, 1)]
    finally:
        file.close()
