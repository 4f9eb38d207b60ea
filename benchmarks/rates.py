"""The rate of each stream alone: direct disk requests, streaming reads of memory, the engine's own products.

The disk is measured without the engine's classes, so that their inefficiencies do not lower the bound.
"""

from __future__ import annotations

import ctypes
import itertools
import mmap
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from engine.engine import Engine
from engine.kernels.backend import kernels_for
from engine.units import MIB

_MAX_ROWS = 512
"""More rows are measured as this many: rates no longer change, and outputs stay small."""

_STAGES = 4

_BUFFER_BYTES = 64 * MIB
"""Bytes per thread that its requests fill in turn, as a pass fills whole layers: data that is read again and
again into the same few MiB lands in the CPU's cache, up to a third faster than in memory."""


class DiskRates:
    """Direct reads and writes of a scratch file, by a few threads with large requests."""

    def __init__(self, folder: Path, size: int = 1024 * MIB) -> None:
        """Write the scratch file and find the best number of threads and request size.

        Raises:
            OSError: if the folder cannot be written.
        """
        folder.mkdir(parents=True, exist_ok=True)
        self._path, self._size = folder / "stream-alone.bin", size
        flags = os.O_RDWR | os.O_CREAT | os.O_TRUNC
        try:
            self._descriptor = os.open(self._path, flags | os.O_DIRECT, 0o600)
            self.direct = True
        except OSError:
            self._descriptor = os.open(self._path, flags, 0o600)
            self.direct = False
        os.posix_fallocate(self._descriptor, 0, size)
        self._run(os.pwritev, 2, 16 * MIB, seconds=60, most=size)
        settings = [(1, 16), (2, 4), (2, 16), (4, 4), (4, 16)]
        self.settings = {
            name: max(settings, key=lambda s: self._run(call, s[0], s[1] * MIB, 0.3))
            for name, call in (("read", os.preadv), ("write", os.pwritev))
        }
        """Number of threads and MiB per request that were fastest."""

    def read(self, seconds: float = 0.4) -> float:
        """Bytes per second, now."""
        threads, size = self.settings["read"]
        return self._run(os.preadv, threads, size * MIB, seconds)

    def write(self, seconds: float = 0.4) -> float:
        """Bytes per second, now."""
        threads, size = self.settings["write"]
        return self._run(os.pwritev, threads, size * MIB, seconds)

    def close(self) -> None:
        """Delete the scratch file."""
        os.close(self._descriptor)
        self._path.unlink(missing_ok=True)

    def _run(
        self, call: Callable[..., int], threads: int, request: int, seconds: float, most: int | None = None
    ) -> float:
        if not self.direct:
            os.fdatasync(self._descriptor)
            os.posix_fadvise(self._descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        places = self._size // request
        turn = itertools.count()  # next() of it is atomic
        moved = [0] * threads
        start = threading.Barrier(threads + 1)
        until = [0.0]

        def work(index: int) -> None:
            buffer = _huge_pages(_BUFFER_BYTES)
            parts = itertools.cycle(buffer[at : at + request] for at in range(0, _BUFFER_BYTES, request))
            start.wait()
            while time.perf_counter() < until[0]:
                place = next(turn)
                if most is not None and place * request >= most:
                    break
                moved[index] += call(self._descriptor, [next(parts)], place % places * request)

        workers = [threading.Thread(target=work, args=(index,)) for index in range(threads)]
        for worker in workers:
            worker.start()
        until[0] = time.perf_counter() + 3600
        start.wait()
        begin = time.perf_counter()
        until[0] = begin + seconds
        for worker in workers:
            worker.join()
        return sum(moved) / (time.perf_counter() - begin)


def _huge_pages(size: int) -> memoryview:
    """Memory in huge pages: direct requests into small pages are split, and slower."""
    page = 2 * MIB
    memory = mmap.mmap(-1, size + page, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    begin = -ctypes.addressof(ctypes.c_char.from_buffer(memory)) % page
    buffer = memoryview(memory)[begin : begin + size]
    buffer[:] = os.urandom(4096) * (size // 4096)
    return buffer


class MemoryRate:
    """Streaming reads of a tensor far larger than any cache, by all of torch's threads."""

    def __init__(self, size: int = 1024 * MIB) -> None:
        self._values = torch.ones(size // 4)
        ways: list[Callable[[], Tensor]] = [
            self._values.sum,
            self._values.amax,
            lambda: torch.dot(self._values, self._values),
        ]
        for way in ways:
            way()
        self._way = min(ways, key=lambda way: seconds_of(way, 0.1))

    def read(self, seconds: float = 0.25) -> float:
        """Bytes per second, now."""
        return self._values.nbytes / seconds_of(self._way, seconds)


def seconds_of(call: Callable[[], object], seconds: float, least: int = 1) -> float:
    """Shortest time of a call, repeated for ``seconds`` and at least ``least`` times."""
    best = float("inf")
    until = time.perf_counter() + seconds
    while least > 0 or time.perf_counter() < until:
        begin = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - begin)
        least -= 1
    return best


class ProductRates:
    """The matrix products of a model's own layers, with its weights in the engine's formats."""

    def __init__(self, engine: Engine) -> None:
        """The engine must have answered a request, so that its weights are in place."""
        self._engine = engine

    @torch.inference_mode()
    def layers(self, rows: int, seconds: float = 0.3) -> float:
        """Operations per second of all linear modules of a few layers, in turn, at ``rows`` tokens."""
        rows = min(rows, _MAX_ROWS)
        model, spec = self._engine._model, self._engine.spec
        chosen = list(range(1, spec.num_layers + 1))
        chosen = chosen[:: max(1, len(chosen) // _STAGES)][:_STAGES]
        if self._store.needed()[1]:
            chosen = chosen[:2]  # there are two buffers
        inputs: dict[int, Tensor] = {}
        parts = []
        for buffer_index, stage in enumerate(chosen):
            parts.append((stage, self._ready(stage, buffer_index, rows)))
        flops = best = 0.0
        until = time.perf_counter() + seconds
        turn = 0
        while turn < 2 or time.perf_counter() < until:
            stage, tensors = parts[turn % len(parts)]
            flops = spent = 0.0
            places = model.places(stage, tensors)
            places.fill()
            for module in model.layers[stage - 1].modules():
                if not isinstance(module, nn.Linear):
                    continue
                wide = module.in_features
                x = inputs.setdefault(wide, torch.randn(rows, wide).to(self._dtype))
                begin = time.perf_counter()
                module(x)
                spent += time.perf_counter() - begin
                flops += 2.0 * rows * wide * module.out_features
            places.empty()
            best = max(best, flops / spent)
            turn += 1
        return best

    @torch.inference_mode()
    def head(self, rows: int, seconds: float = 0.1) -> float:
        """Operations per second of the output embedding."""
        rows = min(rows, _MAX_ROWS)
        model, spec = self._engine._model, self._engine.spec
        stage = spec.num_stages - 1
        hidden = torch.randn(1, rows, spec.hidden_size).to(self._dtype)
        places = model.places(stage, self._ready(stage, 0, rows))
        places.fill()
        spent = seconds_of(lambda: model.head(hidden), seconds, least=2)
        places.empty()
        return 2.0 * rows * spec.hidden_size * spec.vocab_size / spent

    def _ready(self, stage: int, buffer_index: int, rows: int) -> dict[str, object]:
        if self._store.needed()[stage]:
            self._store.load(stage, buffer_index % 2, rows)
        return self._store.tensors(stage, buffer_index % 2)

    @property
    def _store(self):  # type: ignore[no-untyped-def]
        store = self._engine._weights
        assert store is not None, "the weights are not in place yet"
        return store

    @property
    def _dtype(self) -> torch.dtype:
        dtype: torch.dtype = getattr(torch, self._engine.spec.compute_dtype)
        return dtype


def kernels() -> str:
    """The kernels that compute on this machine, for the record."""
    return kernels_for(torch.device("cpu")).name
