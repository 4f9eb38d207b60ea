"""Times single passes of the engine: prefill, and decoding at any context without its prefill.

Decoding at a long context would require its prompts to be computed first, which takes minutes on two cores.
Here slots begin with a KV cache full of zeros instead. Its numbers do not change the time of a pass, which
`--check-filled` of limits.py verifies.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

import engine.runtime.run
from benchmarks.page_cache import drop_files
from engine.engine import Engine
from engine.memory.disk.aligned import empty_aligned
from engine.memory.kv.regions import Region
from engine.memory.storage import DiskFile
from engine.profiling.passes import PassClock, timed_passes
from engine.runtime.sequences import SlotSequence
from engine.spec.hardware import Tier
from engine.spec.policy import PrefixSharing
from engine.spec.request import Request
from engine.units import MIB


def timed(engine_: Engine, requests: Sequence[Request], cold: Sequence[Path] = ()) -> list[float]:
    """Answer requests; returns the seconds of each pass. The engine's trace starts anew.

    Args:
        cold: folders whose files leave the page cache after every pass.

    Raises:
        TierbenchError: as `Engine.answer`.
    """
    return timed_passes(engine_, requests, PassClock(lambda took: drop_files(cold)) if cold else None)


def set_block(engine_: Engine, batch: int, batches: int, prompt: int, filled: bool = False) -> None:
    """Change the block of an engine whose weights may be in place already; the placement stays.

    Prefix sharing is switched off.

    Args:
        filled: whether the KV cache begins filled, so that device batches have few tokens.
    """
    tokens = prompt + batch if filled else batch * prompt + batch
    engine_.policy = engine_.policy.replace(
        device_batch=batch, num_device_batches=batches, max_batch_tokens=tokens,
        prefix_sharing=PrefixSharing.OFF,
    )  # fmt: skip


def have_memory(engine_: Engine, requests: Sequence[Request]) -> None:
    """Allocate as much memory as these requests will need, and free it again.

    The host of a virtual machine reclaims memory that has been free for some seconds and returns it at about
    0.5 GB/s, which the first pass would have to wait for.
    """
    plan, ledger = engine_.check(requests), engine_._tiers.ledger
    memory = (Tier.DEVICE, Tier.HOST)
    empty_aligned(max(0, sum(plan.total(tier) - ledger.held[tier] for tier in memory)))


@contextmanager
def past_filled() -> Iterator[None]:
    """Within it, requests begin as if all tokens of the prompt but the last one had been computed."""
    original: Any = engine.runtime.run.Block  # type: ignore[attr-defined]

    class FilledBlock(original):  # type: ignore[misc,valid-type]
        def refill(self, admit: Callable[[SlotSequence], None]) -> None:
            while True:
                before = {id(sequence) for sequence in self.active}
                super().refill(admit)
                new = [sequence for sequence in self.active if id(sequence) not in before]
                if not new:
                    return
                for sequence in new:
                    past = len(sequence.request.prompt) - 1
                    sequence.fresh = [sequence.request.prompt[-1]]
                    sequence.done = past
                    if sequence.region is not None:
                        cache = admit.__self__._kv_cache  # type: ignore[attr-defined]
                        fill(sequence.region, getattr(cache, "_file", None))
                        sequence.region.length = past

    engine.runtime.run.Block = FilledBlock  # type: ignore[attr-defined]
    try:
        yield
    finally:
        engine.runtime.run.Block = original  # type: ignore[attr-defined]


def fill(region: Region, file: DiskFile | None) -> None:
    """Fill a whole region with zeros, so that its pages, or its blocks of the cache's file, exist."""
    if region.slot is None:
        assert region.data is not None
        region.data.zero_()
        return
    assert file is not None
    region.slot.tail.zero_()
    begin, size = region.slot.begin(0), region.slot.layout.nbytes
    zeros = torch.zeros(min(size, 16 * MIB), dtype=torch.uint8)
    for offset in range(0, size, len(zeros)):
        file.write(begin + offset, zeros[: min(len(zeros), size - offset)])
