"""Times calls: the mean of repetitions, and their spread.

A pass takes the sum of its parts, so the mean counts and not the median, which is less where some repetitions
are interrupted; one that was interrupted for long counts as `_MOST` medians.

Knows devices, because work that was issued is not work that is done, and nothing of what is timed.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

_MOST = 4.0

_slowness: list[Callable[[], float]] = []  # at most one


@dataclass(frozen=True)
class Timing:
    """Seconds of one call, repeated."""

    seconds: float
    """Mean of the repetitions, each capped at `_MOST` medians."""

    low: float
    high: float
    """Quartiles of the repetitions: half of them lie between."""

    count: int

    @property
    def spread(self) -> float:
        """Distance of the quartiles as a fraction of the mean."""
        return (self.high - self.low) / self.seconds if self.seconds else 0.0

    @classmethod
    def of(cls, samples: list[float]) -> Timing:
        """Summarise repetitions, at least one."""
        ordered = sorted(samples)
        quarter, most = len(ordered) // 4, _MOST * statistics.median(ordered)
        mean = statistics.fmean(min(sample, most) for sample in ordered)
        return cls(mean, ordered[quarter], ordered[-1 - quarter], len(ordered))


@contextmanager
def steadied(slowness: Callable[[], float]) -> Iterator[None]:
    """Within it, timings are corrected for the machine's pace.

    Args:
        slowness: how many times as long as at that pace everything takes now; asked before and after
            a call is timed.
    """
    _slowness.append(slowness)
    try:
        yield
    finally:
        _slowness.remove(slowness)


def wait_for(device: torch.device) -> None:
    """Return once everything that was issued to a device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(
    call: Callable[[], object] | Sequence[Callable[[], object]],
    seconds: float,
    device: torch.device,
    least: int = 3,
    warm_up: bool = True,
) -> Timing:
    """Repeat a call for ``seconds``, at least ``least`` times; the first, which warms up, does not count.

    Several calls are made in turn, so that each finds its data as cold as the others leave it.
    """
    calls = [call] if callable(call) else call
    if warm_up:
        calls[0]()
    wait_for(device)
    before = _slowness[-1]() if _slowness else 1.0
    samples: list[float] = []
    until = time.perf_counter() + seconds
    turn = 1
    while len(samples) < least or time.perf_counter() < until:
        begin = time.perf_counter()
        calls[turn % len(calls)]()
        wait_for(device)
        samples.append(time.perf_counter() - begin)
        turn += 1
    slow = (before + _slowness[-1]()) / 2 if _slowness else 1.0
    return Timing.of([sample / slow for sample in samples])
