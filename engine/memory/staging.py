"""A fixed number of host buffers between disk and device: taken, filled, copied from, given back.

On CUDA the buffers are pinned, and a copy may still be running when its buffer is given back. An event marks
its end; whoever takes the buffer next waits for that event alone, never for a whole stream. This module does
not know what the bytes mean.
"""

from __future__ import annotations

import queue
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from engine.memory.disk.files import DirectFile
from engine.memory.storage import Tiers
from engine.spec.hardware import Tier
from engine.spec.layout import ALIGNMENT


def aligned_bytes(tiers: Tiers, tier: Tier, nbytes: int, what: str) -> Tensor:
    """uint8 [nbytes - ALIGNMENT] whose address is a multiple of `ALIGNMENT`, in an allocation of ``nbytes``.

    Raises:
        BudgetError, StorageError: as `Tiers.tensor`.
    """
    whole = tiers.tensor(tier, (nbytes,), torch.uint8, what)
    begin = -whole.data_ptr() % ALIGNMENT
    return whole[begin : begin + nbytes - ALIGNMENT]


class StagingPool:
    """A fixed number of host buffers of one size, for any number of threads."""

    def __init__(self, tiers: Tiers, count: int, nbytes: int) -> None:
        """Allocate ``count`` buffers of ``nbytes`` each, of which `capacity` can be used.

        Raises:
            BudgetError, StorageError: as `Tiers.tensor`.
        """
        self.capacity = nbytes - ALIGNMENT
        self._free: queue.SimpleQueue[tuple[Tensor, torch.cuda.Event | None]] = queue.SimpleQueue()
        for _ in range(count):
            buffer = aligned_bytes(tiers, Tier.HOST, nbytes, "staging")
            self._free.put((buffer, torch.cuda.Event() if tiers.device.type == "cuda" else None))

    @contextmanager
    def take(self, nbytes: int) -> Iterator[Tensor]:
        """The first bytes of a buffer: [nbytes] uint8, aligned to `ALIGNMENT`, no longer being copied from.

        Copies on the current stream may still be running when it is given back. Blocks until a buffer is
        free: a thread that holds one must not take a second one from a shared pool.
        """
        if nbytes > self.capacity:
            raise ValueError(f"{nbytes} bytes do not fit a staging buffer of {self.capacity}")
        buffer, event = self._free.get()
        try:
            if event is not None:
                event.synchronize()  # returns at once if it was never recorded
            yield buffer[:nbytes]
        finally:
            if event is not None:
                event.record(torch.cuda.current_stream())
            self._free.put((buffer, event))


def transfer_through(
    pool: StagingPool, file: DirectFile, pieces: Sequence[tuple[int, Tensor]], write: bool
) -> int:
    """Read pieces of a file into device tensors, or write them; returns their bytes.

    Args:
        pieces: offset and tensor [nbytes] uint8 of each; all but the last are multiples of `ALIGNMENT` long.
    """
    moved = 0
    for group in _groups(pieces, pool.capacity):
        sizes = [len(piece) for _, piece in group]
        with pool.take(sum(sizes)) as staged:
            parts = [(at, piece, part) for (at, piece), part in zip(group, staged.split(sizes), strict=True)]
            if write:
                for _, source, part in parts:
                    part.copy_(source, non_blocking=True)
                if staged.is_pinned():
                    torch.cuda.current_stream().record_event().synchronize()
            transfer = file.write_many if write else file.read_many
            moved += transfer([(at, part) for at, _, part in parts])
            if not write:
                for _, target, part in parts:
                    target.copy_(part, non_blocking=True)
    return moved


def _groups(pieces: Sequence[tuple[int, Tensor]], capacity: int) -> Iterator[list[tuple[int, Tensor]]]:
    """Cut pieces so that each group of them fits a staging buffer."""
    capacity = capacity // ALIGNMENT * ALIGNMENT
    group: list[tuple[int, Tensor]] = []
    left = capacity
    for offset, tensor in pieces:
        done = 0
        while done < len(tensor):
            size = min(left, len(tensor) - done)
            group.append((offset + done, tensor[done : done + size]))
            done, left = done + size, left - size
            if not left:
                yield group
                group, left = [], capacity
    if group:
        yield group


def read_through(pool: StagingPool, file: DirectFile, pieces: Sequence[tuple[int, Tensor]]) -> int:
    """Read adjacent pieces of a file into device tensors; returns the bytes read, gaps included.

    While one buffer is copied to the device, the next one is being filled.

    Args:
        pieces: offset and tensor [nbytes] uint8 of each, in the order of the file.
    """
    begin, end = pieces[0][0], pieces[-1][0] + len(pieces[-1][1])
    at = begin // ALIGNMENT * ALIGNMENT
    while at < end:
        stop = min(at + pool.capacity, end)
        with pool.take(stop - at) as buffer:
            first = max(begin, at)
            file.read(first, buffer[first - at :])
            for offset, target in pieces:
                low, high = max(offset, at), min(offset + len(target), stop)
                if low < high:
                    target[low - offset : high - offset].copy_(
                        buffer[low - at : high - at], non_blocking=True
                    )
        at = stop
    return end - begin
