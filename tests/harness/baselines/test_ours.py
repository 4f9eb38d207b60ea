"""Our own engine as one of the systems: it computes as many sequences at once as its memory allows."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from engine.spec.hardware import Tier
from engine.spec.policy import Placement
from engine.spec.request import Request
from harness.baselines.base import Job
from harness.baselines.systems.ours import Ours
from harness.commands.run import DEMO_MODEL

BATCH, PROMPT, NEW = 8, 40, 4


def job(work: Path, kv: str = "disk") -> Job:
    """The demo model with weights on disk; no memory limit."""
    settings = {**Ours.defaults, "policy": f"weights=disk,kv={kv}"}
    return Job(model=str(DEMO_MODEL), work=str(work), scratch=str(work), settings=settings, batch=BATCH,
               prompt_len=PROMPT, new_tokens=NEW)  # fmt: skip


def needed(ours: Ours, work: Path, size: int, kv: str = "disk") -> int:
    """Bytes of host memory that the plan needs for ``size`` sequences at once."""
    requests = [Request((index, *(4,) * (PROMPT - 1)), NEW) for index in range(BATCH)]
    with ours._made(job(work, kv), size, None) as engine:
        plan = engine.check(requests)
        return plan.total(Tier.HOST) + plan.total(Tier.DEVICE)


def test_the_largest_device_batch_that_fits_is_taken(tmp_path: Path) -> None:
    ours = Ours()
    whole, half = (needed(ours, tmp_path, size) for size in (BATCH, BATCH // 2))
    assert half < whole
    for budget, expected in ((None, BATCH), (whole, BATCH), (whole - 1, BATCH // 2), (1, 1)):
        with ours._largest(job(tmp_path), budget) as engine:
            assert (engine.policy.device_batch, engine.policy.block_size) == (expected, BATCH)


def test_a_kv_cache_that_memory_cannot_hold_goes_to_the_disk(tmp_path: Path) -> None:
    ours = Ours()
    in_memory, on_disk = needed(ours, tmp_path, 1, "host"), needed(ours, tmp_path, 2)
    assert on_disk < in_memory
    for budget, tier in ((in_memory, Tier.HOST), (on_disk, Tier.DISK)):
        with ours._largest(job(tmp_path, "host"), budget) as engine:
            assert engine.policy.kv.of(tier) == 1


def test_what_room_is_left_holds_weights(tmp_path: Path) -> None:
    """As many tenths as fit, and one more does not; the answers are the same as with all weights on disk."""
    prompts, answers, parts = [[5, 6, 7, 8]] * BATCH, [], []
    streamed = needed(Ours(), tmp_path, BATCH)
    # The demo model's layers take 3.2 MB in float32: to spare are nothing, about a tenth, more than all.
    for fill, spare in ((0, 10**9), (1, 0), (1, 300_000), (1, 10**9)):
        ours, asked = Ours(), job(tmp_path)
        asked.settings["fill"] = fill
        ours._engine = ours._largest(asked, streamed + spare)
        with ours._engine as engine:
            if fill:
                ours._fill(asked)
            parts.append(engine.policy.weights.host)
            answers.append(ours.generate(prompts, NEW).tokens)
            if 0 < parts[-1] < 0.9:
                more = parts[-1] + 0.1
                engine.policy = engine.policy.replace(weights=Placement(0, more, 1 - more))
                assert not ours._fits(engine, asked)
    assert parts[0] == 0 and parts[1] < parts[2] < parts[3] == 0.9
    assert all(found == answers[0] for found in answers)


def test_what_imports_take_is_no_part_of_the_budget(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The process is measured after the model's code is imported, and before anything is placed."""
    events: list[str] = []
    made = Ours._made

    def watched(self: Ours, *arguments: Any) -> Any:
        events.append(f"engine with {arguments[2]}")
        return made(self, *arguments)

    def measured() -> int:
        events.append("measured")
        return 300 << 20

    monkeypatch.setattr(Ours, "_made", watched)
    monkeypatch.setattr("harness.baselines.systems.ours.anonymous_bytes", measured)
    ours, asked = Ours(), dataclasses.replace(job(tmp_path), cap_bytes=1 << 30)
    asked.settings["margin"] = 24 << 20
    loaded = ours.load(asked)
    ours._engine.close()
    assert loaded["host_budget"] == 700 << 20  # 1024 MiB - 300 measured - 24 margin
    assert events == ["engine with None", "measured", f"engine with {700 << 20}"]
