"""Writes an entry of the packed store, completely or not at all, and reads it back before publishing it."""

from __future__ import annotations

import fcntl
import os
import queue
import shutil
import time
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from engine.errors import StorageError
from engine.files.whole import sync_folder
from engine.memory.disk.aligned import small_buffer
from engine.memory.disk.files import DirectFile
from engine.memory.disk.io_pool import IOPool
from engine.memory.store.index import PIECE, About, Index, StoredTensor, place
from engine.memory.store.pieces import THREADS, damaged_part, store_errors
from engine.spec.layout import STORE_BUFFERS, aligned

if TYPE_CHECKING:
    from typing import Self

    from torch import Tensor

WEIGHTS, INDEX = "weights.bin", "index.json"


class Writer:
    """An entry that is being written: a context manager that publishes it if it ends without an error.

    Tensors come in any order; one may come in consecutive parts, before the next one begins. The bytes are
    copied at once and written in the background, in a fixed amount of memory.
    """

    def __init__(
        self, folder: Path, about: About, tensors: Sequence[StoredTensor], publish: Callable[[], None]
    ) -> None:
        """Lock the folder, which has just been created.

        Args:
            publish: gives the folder its final name.

        Raises:
            StorageError: if nothing can be written there; the folder is removed then.
        """
        self._folder, self._about, self._publish = folder, about, publish
        self._placed, self._length = place(tensors)
        self._checksums: dict[str, list[Future[int]]] = {}
        self._current: str | None = None
        self._done = 0  # bytes of the current tensor
        self._buffer: memoryview | None = None
        self._free: queue.SimpleQueue[memoryview] = queue.SimpleQueue()
        self._failure: BaseException | None = None
        self._path = folder / WEIGHTS
        try:
            self._file = DirectFile(self._path, IOPool(), create=0, errors=store_errors)
            with store_errors(self._path, "lock"):
                fcntl.flock(self._file.buffered, fcntl.LOCK_EX)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="store-writer")

    def __enter__(self) -> Self:
        """Reserve the space.

        Raises:
            StorageError: if the disk is full; the folder is removed then.
        """
        try:
            self._file.reserve(self._length)
        except BaseException:
            self._end(whole=False)
            raise
        for _ in range(STORE_BUFFERS):
            self._free.put(small_buffer(min(PIECE, aligned(self._length))))
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        whole = False
        try:
            if kind is None:
                self._finish()
                whole = True
        finally:
            self._end(whole)

    def _end(self, whole: bool) -> None:
        self._threads.shutdown(wait=True, cancel_futures=True)
        if not whole:
            shutil.rmtree(self._folder, ignore_errors=True)
        self._file.close()

    def put(self, name: str, data: Tensor) -> None:
        """Write a tensor's bytes, or its next part.

        Args:
            data: [...] uint8, contiguous, on the CPU; only the number of bytes matters.

        Raises:
            ValueError: if ``data`` is anything else, or not what has to come next.
            StorageError: if the disk fails.
        """
        if str(data.dtype) != "torch.uint8" or data.device.type != "cpu" or not data.is_contiguous():
            raise ValueError(f"bytes of {name!r} are not contiguous uint8 on the CPU")
        self._begin(name)
        view, tensor = data.view(-1).numpy().data, self._placed[name].tensor
        if self._done + len(view) > tensor.nbytes:
            raise ValueError(f"{name!r} has {tensor.nbytes:,} bytes and is given {self._done + len(view):,}")
        at = 0
        while at < len(view):
            if self._buffer is None:
                self._buffer = self._free.get()
            if self._failure is not None:
                raise self._failure
            within = self._done % PIECE
            count = min(PIECE - within, len(view) - at)
            self._buffer[within : within + count] = view[at : at + count]
            at += count
            self._done += count
            if self._done % PIECE == 0 or self._done == tensor.nbytes:
                buffer, self._buffer, end = self._buffer, None, within + count
                offset = self._placed[name].offset + self._done - end
                self._checksums[name].append(self._threads.submit(self._write, buffer, end, offset))
        if self._done == tensor.nbytes:
            self._current = None

    def _begin(self, name: str) -> None:
        if name == self._current:
            return
        if name not in self._placed:
            raise ValueError(f"the entry was not to hold {name!r}")
        if self._current is not None or name in self._checksums:
            raise ValueError(f"{name!r} comes before {self._current!r} is whole, or for a second time")
        self._current, self._done = name, 0
        self._checksums[name] = []

    def _write(self, buffer: memoryview, count: int, offset: int) -> int:
        """Write the first bytes of a buffer, and zeros up to a multiple of the alignment: their checksum."""
        try:
            checksum = zlib.crc32(buffer[:count])
            whole = aligned(count)
            buffer[count:whole] = bytes(whole - count)
            self._file.transfer_blocks(offset, buffer[:whole], writing=True)
            return checksum
        except BaseException as error:
            self._failure = error
            raise
        finally:
            self._free.put(buffer)

    def _finish(self) -> None:
        missing = [name for name in self._placed if name not in self._checksums]
        if missing or self._current is not None:
            raise ValueError(f"the entry ends without the whole of {self._current or missing[0]!r}")
        tensors = {
            name: replace(placed, checksums=tuple(part.result() for part in self._checksums[name]))
            for name, placed in self._placed.items()
        }
        self._file.sync()
        self._free = queue.SimpleQueue()  # its buffers; reading back takes others
        found = damaged_part(self._path, tensors)
        if found:
            raise StorageError(f"{self._path} does not read back as written: {found}: the disk may be faulty")
        index = Index(self._about, time.time(), self._length, tensors)
        with store_errors(self._folder / INDEX, "write"):
            with (self._folder / INDEX).open("w", encoding="utf-8") as file:
                file.write(index.to_json())
                file.flush()
                os.fsync(file.fileno())
            sync_folder(self._folder)
        self._publish()
