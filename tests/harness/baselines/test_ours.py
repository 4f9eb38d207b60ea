"""Our own engine as one of the systems: it takes as much of the batch at once as its memory allows."""

from __future__ import annotations

from pathlib import Path

from engine.spec.hardware import Tier
from engine.spec.request import Request
from harness.baselines.face import Job
from harness.baselines.ours import Ours
from harness.commands.run import DEMO_MODEL

BATCH, PROMPT, NEW = 8, 40, 4


def job(work: Path) -> Job:
    settings = {**Ours.defaults, "policy": "weights=disk,kv=disk"}
    return Job(model=str(DEMO_MODEL), work=str(work), settings=settings, batch=BATCH, prompt_len=PROMPT,
               new_tokens=NEW)  # fmt: skip


def needed(ours: Ours, work: Path, size: int) -> int:
    """Bytes of host memory with so many sequences computed at once."""
    requests = [Request((index, *(4,) * (PROMPT - 1)), NEW) for index in range(BATCH)]
    with ours._made(job(work), size, None) as engine:
        plan = engine.check(requests)
        return plan.total(Tier.HOST) + plan.total(Tier.DEVICE)


def test_the_largest_device_batch_that_fits_is_taken(tmp_path: Path) -> None:
    ours = Ours()
    whole, half = (needed(ours, tmp_path, size) for size in (BATCH, BATCH // 2))
    assert half < whole
    for budget, expected in ((None, BATCH), (whole, BATCH), (whole - 1, BATCH // 2), (1, 1)):
        with ours._largest(job(tmp_path), budget) as engine:
            assert (engine.policy.device_batch, engine.policy.block_size) == (expected, BATCH)
