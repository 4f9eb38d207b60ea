"""Staging buffers: aligned, charged, one holder at a time, never reused before their copy is done."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from engine.errors import BudgetError
from engine.memory.staging import StagingPool, aligned_bytes
from engine.memory.storage import Tiers
from engine.spec.hardware import Tier
from engine.spec.layout import ALIGNMENT

SIZE = 3 * ALIGNMENT


@pytest.fixture
def tiers(tmp_path: Path) -> Iterator[Tiers]:
    """Tiers with ten buffers' worth of memory each."""
    limits = dict.fromkeys(Tier, 10 * SIZE)
    made = Tiers(torch.device("cpu"), False, limits, tmp_path)
    yield made
    made.close()


def test_buffers_are_aligned_and_charged(tiers: Tiers) -> None:
    pool = StagingPool(tiers, 2, SIZE)
    assert tiers.ledger.held[Tier.HOST] == 2 * SIZE
    with pool.take(pool.capacity) as first, pool.take(10) as second:
        assert (len(first), len(second)) == (SIZE - ALIGNMENT, 10)
        assert first.data_ptr() % ALIGNMENT == second.data_ptr() % ALIGNMENT == 0
        assert first.data_ptr() != second.data_ptr()
    with pytest.raises(ValueError, match="do not fit"), pool.take(pool.capacity + 1):
        pass
    with pytest.raises(BudgetError):
        StagingPool(tiers, 9, SIZE)
    assert aligned_bytes(tiers, Tier.DEVICE, SIZE, "x").data_ptr() % ALIGNMENT == 0


def test_no_buffer_has_two_holders_and_a_failure_gives_it_back(tiers: Tiers) -> None:
    pool = StagingPool(tiers, 2, SIZE)
    held: set[int] = set()
    clashes: list[int] = []
    lock = threading.Lock()

    def work(seed: int) -> None:
        for turn in range(200):
            try:
                with pool.take(64) as buffer:
                    with lock:
                        if buffer.data_ptr() in held:
                            clashes.append(seed)
                        held.add(buffer.data_ptr())
                    buffer.fill_(seed)
                    if not bool((buffer == seed).all()):
                        clashes.append(seed)
                    with lock:
                        held.remove(buffer.data_ptr())
                    if turn % 7 == seed % 7:
                        raise KeyError(seed)
            except KeyError:
                pass

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert not clashes and not any(thread.is_alive() for thread in threads)


class Clock:
    """Replaces a CUDA event and logs when it is recorded and when it is waited for."""

    def __init__(self, log: list[str]) -> None:
        self._log = log

    def record(self, stream: object) -> None:
        self._log.append("recorded")

    def synchronize(self) -> None:
        self._log.append("waited")


def test_whoever_takes_a_buffer_waits_for_the_copy_that_used_it_last(
    tiers: Tiers, monkeypatch: pytest.MonkeyPatch
) -> None:
    log: list[str] = []
    pool = StagingPool(tiers, 1, SIZE)
    buffer, _ = pool._free.get()
    pool._free.put((buffer, Clock(log)))  # type: ignore[arg-type]
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: None)
    for _ in range(2):
        with pool.take(8):
            log.append("used")
    assert log == ["waited", "used", "recorded"] * 2
