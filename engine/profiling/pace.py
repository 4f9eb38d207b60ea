"""The machine's pace from moment to moment, by repeating the same measurements.

A processor that is shared computes at one moment half as fast again as at another, for seconds or minutes on
end, and all arithmetic with it; a disk may be throttled once a burst is over. Figures of different moments
become comparable by what the same measurement gave beside each of them.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections import deque
from collections.abc import Callable, Sequence
from operator import truediv
from typing import TypeVar

import torch
from torch import Tensor

from engine.memory.disk.aligned import empty_aligned
from engine.memory.storage import Tiers
from engine.plan.simulation.pace import FEW, MANY
from engine.profiling.links import fill
from engine.profiling.products import multiply, pool_of, random_rows, usual_form
from engine.profiling.timing import wait_for
from engine.spec.rates import Pace
from engine.units import MIB

OUTPUTS, INPUTS = 2048, 768
_SECONDS = 0.015
"""Of a sample of each number of rows. Longer ones come out faster: every pace is a mean of such samples."""

_REQUESTS, _REQUEST = 8, 4 * MIB
_EVERY, _WINDOW = 0.25, 1.6
_NOMINAL = 6

Sample = tuple[float, ...]
"""Rates of one measurement."""

_Found = TypeVar("_Found")


class Yardstick:
    """The same measurements every time: products with weights that no cache holds, and reads of one file."""

    def __init__(self, device: torch.device, tiers: Tiers) -> None:
        """Prepare; the file lies in the tiers' folder until they are closed."""
        self._device = device
        self._weights = itertools.cycle(pool_of(usual_form(device), OUTPUTS, INPUTS, device))
        self._rows = {rows: random_rows(rows, INPUTS, device) for rows in (FEW, MANY)}
        buffer = empty_aligned(_REQUESTS * _REQUEST).fill_(1)
        self._parts = list(buffer.split(_REQUEST))
        self._file = tiers.file(4 * len(buffer), "scratch")
        self._turns = itertools.cycle(range(0, self._file.size, len(buffer)))
        fill(self._file, buffer)

    def computing(self) -> Sample:
        """FLOP/s of few rows and of many."""
        self._product(self._rows[FEW], 0.0)  # wakes the threads
        return tuple(self._product(self._rows[rows], _SECONDS) for rows in (FEW, MANY))

    def pace(self, computing: float = 0.0, reading: float = 0.0, sampled: Sequence[Sample] = ()) -> Pace:
        """The machine's pace now.

        Args:
            computing: seconds to measure products for.
            reading: seconds to measure reads for.
            sampled: of computing, beside the work that the pace is asked for; they count as those of now.
        """
        samples = [*sampled, *repeated(self.computing, computing)]  # the disk ends meanwhile what it does
        return Pace(*_usual(samples), *_usual(repeated(self.reading, reading)))

    def reading(self) -> Sample:
        """Bytes per second of requests that are made together."""
        begin, offset = time.perf_counter(), next(self._turns)
        self._file.read_many([(offset + i * _REQUEST, part) for i, part in enumerate(self._parts)])
        return (_REQUESTS * _REQUEST / (time.perf_counter() - begin),)

    @torch.inference_mode()
    def _product(self, x: Tensor, seconds: float) -> float:
        calls, begin = 0, time.perf_counter()
        while (taken := time.perf_counter() - begin) < seconds or not calls:
            multiply(x, next(self._weights))
            wait_for(self._device)
            calls += 1
        return 2.0 * len(x) * OUTPUTS * INPUTS * calls / taken


def repeated(measure: Callable[[], _Found], seconds: float) -> list[_Found]:
    """Repeat a measurement, at least once, until ``seconds`` are over."""
    begin, found = time.perf_counter(), [measure()]
    while time.perf_counter() - begin < seconds:
        found.append(measure())
    return found


def _usual(samples: Sequence[Sample]) -> Sample:
    """Harmonic mean of each rate, without the quarter of samples at either end.

    A thread that has to wait for its processor spoils a sample of a few milliseconds, and no pass of seconds.
    """
    quarter = len(samples) // 4
    return tuple(
        statistics.harmonic_mean(sorted(rates)[quarter : len(rates) - quarter])
        for rates in zip(*samples, strict=True)
    )


class Steady:
    """Follows the pace of a processor or a disk, relative to its first samples, while it is measured."""

    def __init__(self, sample: Callable[[], Sample]) -> None:
        """Take the first samples: of computing or of reading."""
        self._sample = sample
        sample()
        self.samples = [sample() for _ in range(_NOMINAL)]
        self.nominal = self.usual
        """Rates at which `slowness` is 1."""

        self._recent: deque[tuple[float, float]] = deque()

    @property
    def usual(self) -> Sample:
        """Rates over all samples so far."""
        return _usual(self.samples)

    def slowness(self) -> float:
        """How many times as long as at first the same work takes, over the last second or two."""
        now = time.perf_counter()
        if not self._recent or now - self._recent[-1][0] >= _EVERY:
            rates = self._sample()
            self.samples.append(rates)
            slow = statistics.geometric_mean(map(truediv, self.nominal, rates))
            self._recent.append((time.perf_counter(), slow))
        while now - self._recent[0][0] > _WINDOW and len(self._recent) > 1:
            self._recent.popleft()
        return statistics.median(slow for _, slow in self._recent)
