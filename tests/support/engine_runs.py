"""Runs the engine and checks what must hold after every run: memory given back, no thread, no file."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from engine.engine import Engine
from engine.spec.hardware import Tier
from engine.spec.policy import Policy
from engine.spec.request import Output, Request


def answers(
    model: Path,
    policy: str | Policy,
    requests: Sequence[Request],
    offload_dir: Path,
    device: str = "cpu",
    **options: Any,
) -> list[Output]:
    """Answer with a fresh engine that is closed again.

    Args:
        policy: a policy, or its ``key=value`` pairs.
        options: further arguments of `Engine`.
    """
    chosen = Policy.parse(policy) if isinstance(policy, str) else policy
    with Engine(model, chosen, offload_dir=offload_dir, device=device, **options) as engine:
        outputs = engine.answer(requests)
        assert stream_threads() == []
        assert all(held >= 0 for held in engine._tiers.ledger.held.values())
    assert files_below(offload_dir) == []
    assert io_threads() == []
    return outputs


def stream_threads() -> list[str]:
    """Names of the threads that carry streams; none outside of a pass over a run."""
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("stream-")]


def io_threads() -> list[str]:
    """Names of the threads that read and write the disk; none once every engine is closed."""
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("io-")]


def files_below(folder: Path) -> list[Path]:
    """Every file and folder below ``folder``."""
    return sorted(folder.rglob("*")) if folder.exists() else []


def bytes_below(folder: Path) -> int:
    """Bytes of all files below ``folder``, as reserved on the disk or as long, whichever is more."""
    stats = [path.stat() for path in files_below(folder) if path.is_file()]
    return sum(stat.st_size for stat in stats)


def held(engine: Engine) -> dict[str, int]:
    """What every tier of an engine holds now, in bytes."""
    return {tier.value: engine._tiers.ledger.held[tier] for tier in Tier}
