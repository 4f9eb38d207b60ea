"""As many threads as processors are free: other work on the machine leaves fewer of them.

Threads that share a product wait for each other. Where another process has one of their processors, all of
them wait for its share of the time at every product, and a run of seconds takes a minute. With a thread less,
each of two runs on one machine has a part of it to itself.
"""

from __future__ import annotations

import time

import torch

from engine.limits import OtherWork, usable_cores

_INTERVAL = 0.5
"""Seconds over which others' work is counted."""


class Threads:
    """Sets the number of threads of the calling thread's products, as long as it is not restored."""

    def __init__(self) -> None:
        self._most, self._cores = torch.get_num_threads(), usable_cores()
        self._began = time.monotonic()
        self._others = OtherWork()

    def adjust(self) -> None:
        """Follow what other processes did lately; cheap, to be called often."""
        now = time.monotonic()
        if self._most == 1 or now - self._began < _INTERVAL:
            return
        others = self._others.look()
        if others is not None:
            wanted = max(1, min(self._most, round(self._cores - others)))
            if wanted != torch.get_num_threads():
                torch.set_num_threads(wanted)
        self._began, self._others = now, OtherWork()

    def restore(self) -> None:
        """Set the number back to what it was at first."""
        if torch.get_num_threads() != self._most:
            torch.set_num_threads(self._most)
