"""Reads the weights' file of an entry back, piece by piece, and compares checksums.

Checksums are CRC-32: they detect what disks and cables do by accident, not what an adversary does, and zlib
computes several GB/s without the interpreter's lock, where SHA-256 reaches a fraction of that.
"""

from __future__ import annotations

import queue
import random
import zlib
from collections import deque
from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import islice
from pathlib import Path

from engine.errors import storage_errors
from engine.memory.disk.aligned import small_buffer
from engine.memory.disk.files import DirectFile
from engine.memory.disk.io_pool import IOPool
from engine.memory.store.index import PIECE, PlacedTensor
from engine.spec.layout import aligned

VARIABLE = "TIERBENCH_STORE"
"""Environment variable that names the store's folder."""

store_errors = partial(
    storage_errors,
    elsewhere=f"choose another folder with --store or {VARIABLE}",
    free="free space, remove entries with run_helm.py store remove,",
)

THREADS = 2
"""Number of pieces that are read or written at once."""

SPOT_CHECKED = 0.01
"""Part of an entry's pieces that is compared with its checksums whenever it is used."""


def chosen_pieces(tensors: Mapping[str, PlacedTensor]) -> set[int]:
    """Numbers of the pieces for a spot check: `SPOT_CHECKED` of them, on average, others each time."""
    total = sum(len(placed.checksums) for placed in tensors.values())
    draw = random.SystemRandom()  # whatever seeds others set
    count = int(SPOT_CHECKED * total + draw.random())
    return set(draw.sample(range(total), count))


def damaged_part(
    path: Path, tensors: Mapping[str, PlacedTensor], chosen: Collection[int] | None = None
) -> str:
    """Read a file of weights and name the first part whose checksum is wrong; empty if none is.

    Args:
        chosen: numbers of the pieces to read, counted over all tensors; None for all.

    Raises:
        StorageError: if the disk fails or the file is too short.
    """
    file = DirectFile(path, IOPool(), errors=store_errors)
    buffers: queue.SimpleQueue[memoryview] = queue.SimpleQueue()
    largest = max((placed.tensor.nbytes for placed in tensors.values()), default=0)
    for _ in range(THREADS):
        buffers.put(small_buffer(min(PIECE, aligned(max(1, largest)))))

    def checksum(offset: int, count: int) -> int:
        buffer = buffers.get()
        try:
            file.transfer_blocks(offset, buffer[: aligned(count)], writing=False)
            return zlib.crc32(buffer[:count])
        finally:
            buffers.put(buffer)

    try:
        with ThreadPoolExecutor(THREADS, thread_name_prefix="store-reader") as threads:
            requests = (
                (name, offset, count, expected, threads.submit(checksum, offset, count))
                for number, (name, offset, count, expected) in enumerate(_parts(tensors))
                if chosen is None or number in chosen
            )
            running = deque(islice(requests, 4 * THREADS))
            while running:
                name, offset, count, expected, found = running.popleft()
                if found.result() != expected:
                    place = f"bytes {offset:,} to {offset + count:,} of the file"
                    return f"tensor {name!r} differs somewhere in {place}"
                running += islice(requests, 1)
    finally:
        file.close()
    return ""


def _parts(tensors: Mapping[str, PlacedTensor]) -> Iterator[tuple[str, int, int, int]]:
    """Tensor, offset, bytes and checksum of every piece."""
    for name, placed in tensors.items():
        for begin, checksum in zip(range(0, placed.tensor.nbytes, PIECE), placed.checksums, strict=True):
            yield name, placed.offset + begin, min(PIECE, placed.tensor.nbytes - begin), checksum
