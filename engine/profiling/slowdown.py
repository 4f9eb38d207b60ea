"""How much products slow transfers down, and transfers products, while both go on."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable
from statistics import geometric_mean

import torch

from engine.memory.disk.aligned import empty_aligned
from engine.memory.storage import DiskFile, Tiers
from engine.profiling.links import fill, scratch_file
from engine.profiling.products import multiply, pool_of, random_rows, usual_form
from engine.profiling.timing import Timing, timed, wait_for
from engine.spec.rates import Resource
from engine.units import MIB

_PIECE = 16 * MIB
_WEIGHT = (2048, 2048)
_ROWS = (8, 64)
"""Of decoding, which reads memory more than it computes, and of prompts; their slowdowns are averaged."""


def measure_slowdown(
    tiers: Tiers, seconds: float, size: int = 256 * MIB
) -> dict[Resource, dict[Resource, float]]:
    """Factors of at least 1, by the resource that is slowed and the one that slows it."""
    device = tiers.device
    size = max(size // _PIECE, 1) * _PIECE
    with scratch_file(tiers, size) as file:
        moves = _moves(tiers, file)
        computes = [_compute(device, rows) for rows in _ROWS]
        share = seconds / (len(moves) * (1 + 3 * len(computes)))
        found: dict[Resource, dict[Resource, float]] = {Resource.COMPUTE: {}}
        for resource, move in moves.items():
            move_alone = timed(move, share, device, least=2).seconds
            computing, moving = [], []
            for compute in computes:
                alone = timed(compute, share, device).seconds
                both, beside = _together(compute, move, 2 * share, device)
                computing.append(max(1.0, both / alone))
                moving.append(max(1.0, beside / move_alone))
            found[Resource.COMPUTE][resource] = geometric_mean(computing)
            found[resource] = {Resource.COMPUTE: geometric_mean(moving)}
    return found


def _compute(device: torch.device, rows: int) -> Callable[[], object]:
    """Products with all of a pool of weights, which no cache holds."""
    weights = pool_of(usual_form(device), *_WEIGHT, device)
    x = random_rows(rows, _WEIGHT[1], device)

    def compute() -> None:
        with torch.inference_mode():
            for weight in weights:
                multiply(x, weight)

    return compute


def _moves(tiers: Tiers, file: DiskFile) -> dict[Resource, Callable[[], object]]:
    """One call per kind of moving, of several MiB each."""
    places = itertools.cycle(range(0, file.size, _PIECE))
    into, out = empty_aligned(_PIECE), empty_aligned(_PIECE).fill_(1)
    fill(file, out)
    moves: dict[Resource, Callable[[], object]] = {
        Resource.DISK_READ: lambda: file.read(next(places), into),
        Resource.DISK_WRITE: lambda: file.write(next(places), out),
    }
    if not tiers.unified:
        on_cuda = tiers.device.type == "cuda"
        host = torch.ones(_PIECE, dtype=torch.uint8, pin_memory=on_cuda)
        on_device = torch.ones(_PIECE, dtype=torch.uint8, device=tiers.device)
        cuda_stream = torch.cuda.Stream(tiers.device) if on_cuda else None

        def copy(target: torch.Tensor, source: torch.Tensor) -> None:
            with torch.cuda.stream(cuda_stream):
                target.copy_(source, non_blocking=True)
                if cuda_stream is not None:
                    cuda_stream.synchronize()

        moves[Resource.TO_DEVICE] = lambda: copy(on_device, host)
        moves[Resource.TO_HOST] = lambda: copy(host, on_device)
    return moves


def _together(
    compute: Callable[[], object], move: Callable[[], object], seconds: float, device: torch.device
) -> tuple[float, float]:
    """Mean seconds of either call while the other one is repeated in another thread."""
    ended = threading.Event()
    moved: list[float] = []

    def keep_moving() -> None:
        while not ended.is_set():
            begin = time.perf_counter()
            move()
            moved.append(time.perf_counter() - begin)

    thread = threading.Thread(target=keep_moving, name="profile-moves")
    thread.start()
    try:
        computing = timed(compute, seconds, device, least=5).seconds
        wait_for(device)
    finally:
        ended.set()
        thread.join()
    return computing, Timing.of(moved).seconds if moved else 0.0
