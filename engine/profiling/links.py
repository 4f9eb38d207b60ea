"""Bandwidths between tiers as the engine moves bytes: direct disk I/O, and copies between memories.

What is read was written and synced before and never lies in the page cache; what is written goes to blocks
of a fresh file that were never written, as a run's KV cache does. Knows no model.
"""

from __future__ import annotations

import contextlib
import os
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from engine.memory.disk.aligned import empty_aligned
from engine.memory.storage import DiskFile, Tiers
from engine.profiling.timing import Timing, timed
from engine.spec.hardware import Tier
from engine.spec.layout import ALIGNMENT
from engine.spec.rates import Link, RateTable
from engine.units import KIB, MIB

SIZES = (16 * KIB, 64 * KIB, 256 * KIB, 1 * MIB, 4 * MIB, 16 * MIB, 64 * MIB)
"""Bytes of one transfer: from a unit of one sequence's KV cache to the weights of a large layer."""

_TOGETHER = 16 * MIB
"""Bytes that are asked for at once, at least, as those of a batch's sequences or of a layer are."""

_MOST_PIECES = 64


@dataclass(frozen=True)
class Transfers:
    """One direction of a link, measured."""

    link: Link
    spread: float
    """Largest distance of quartiles, as a fraction of the mean."""


@contextlib.contextmanager
def scratch_tiers(device: torch.device, unified: bool, offload_dir: Path) -> Iterator[Tiers]:
    """The engine's tiers without budgets; its files are deleted in the end."""
    tiers = Tiers(device, unified, dict.fromkeys(Tier, 1 << 62), offload_dir)
    try:
        yield tiers
    finally:
        tiers.close()


@contextlib.contextmanager
def scratch_file(tiers: Tiers, size: int, content: Tensor | None = None) -> Iterator[DiskFile]:
    """A file of the disk tier, full of copies of ``content`` [bytes], if any; deleted in the end."""
    file = tiers.file(size, "scratch")
    try:
        if content is not None:
            fill(file, content)
        yield file
    finally:
        tiers.free(file)


def fill(file: DiskFile, content: Tensor) -> None:
    """Write ``content`` [bytes] all over a file: blocks never written would not be read from the disk."""
    for begin in range(0, file.size, len(content)):
        file.write(begin, content[: file.size - begin])
    file.sync()


def measure_disk(
    tiers: Tiers, seconds: float, size: int = 512 * MIB, sizes: Sequence[int] = SIZES
) -> list[Transfers]:
    """Rates of reading and writing a file of ``size`` bytes in the offload folder, in ``seconds``."""
    sizes = [one for one in sizes if one <= size]
    share = seconds / (2 * len(sizes) + 1)
    buffer = empty_aligned(max(*sizes, min(size, _TOGETHER)))
    buffer.view(torch.int64).copy_(torch.arange(buffer.numel() // 8))
    with scratch_file(tiers, size, buffer) as file:
        with contextlib.suppress(OSError):
            os.sync()
        reads = {one: timed_pieces(file, buffer, one, share, writing=False) for one in sizes}

        def read_first() -> None:
            file.read(random.randrange(size // ALIGNMENT) * ALIGNMENT, buffer[:ALIGNMENT])

        least = timed(read_first, share / 4, torch.device("cpu")).seconds
    writes = {}
    for one in sizes:
        with scratch_file(tiers, size) as fresh:
            writes[one] = timed_pieces(fresh, buffer, one, share, writing=True)
    return [
        _transfers(Tier.DISK, Tier.HOST, reads, least, size),
        _transfers(Tier.HOST, Tier.DISK, writes, least, size),
    ]


def timed_pieces(file: DiskFile, buffer: Tensor, size: int, seconds: float, writing: bool) -> Timing:
    """Seconds of a batch of requests of ``size`` bytes of ``buffer`` [bytes]; writes take blocks in order."""
    count = pieces_of(size, file.size)
    slices = file.size // (count * size)
    turns = iter(random.sample(range(slices), slices) if not writing else range(slices))
    parts = [buffer[i * size : (i + 1) * size] for i in range(count)]

    def move() -> None:
        nonlocal turns
        turn = next(turns, None)
        if turn is None:
            turns = iter(range(slices))
            turn = next(turns)
        begin = turn * count * size
        pieces = [(begin + i * size, part) for i, part in enumerate(parts)]
        (file.write_many if writing else file.read_many)(pieces)

    return timed(move, seconds, torch.device("cpu"), least=min(3, slices), warm_up=False)


def pieces_of(size: int, whole: int) -> int:
    """Requests of ``size`` bytes that are made at once, of a file of ``whole`` bytes."""
    return max(1, min(_MOST_PIECES, _TOGETHER // size, whole // size))


def measure_copies(tiers: Tiers, seconds: float, sizes: Sequence[int] = SIZES) -> list[Transfers]:
    """Rates of copies between host and device, pinned and not; only where they are two memories."""
    device, found = tiers.device, []
    kinds = (True, False) if device.type == "cuda" else (True,)
    share = seconds / (2 * len(kinds) * len(sizes))
    for pinned in kinds:
        on_host = torch.ones(max(sizes), dtype=torch.uint8, pin_memory=pinned and device.type == "cuda")
        on_device = torch.ones(max(sizes), dtype=torch.uint8, device=device)
        for source, target, ends in (
            (on_host, on_device, (Tier.HOST, Tier.DEVICE)),
            (on_device, on_host, (Tier.DEVICE, Tier.HOST)),
        ):
            times = {}
            for size in sizes:
                part, place = source[:size], target[:size]
                times[size] = timed(partial(place.copy_, part, non_blocking=True), share, device)
            least = times[sizes[0]].seconds / 2
            found.append(_transfers(*ends, times, least, 1, pinned))
    return found


def _transfers(
    source: Tier, target: Tier, times: dict[int, Timing], least: float, whole: int, pinned: bool = True
) -> Transfers:  # fmt: skip
    """Bandwidths without the latency, which every step meets once; ``whole`` is what `pieces_of` takes."""
    least = min(least, *(timing.seconds / 2 for timing in times.values()))
    rates = {}
    for size, timing in times.items():
        rates[float(size)] = size * pieces_of(size, whole) / (timing.seconds - least)
    link = Link(source, target, RateTable.line(rates), least, pinned)
    return Transfers(link, max(timing.spread for timing in times.values()))
