"""Runs the engine and checks that nothing is left after a run: no memory, no thread, no file."""

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
    """Answer with a new engine, which is closed again.

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
    """Names of the threads that carry streams; empty outside of a run."""
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("stream-")]


def io_threads() -> list[str]:
    """Names of the threads that read and write the disk; empty once every engine is closed."""
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("io-")]


def files_below(folder: Path) -> list[Path]:
    """Every file and folder below ``folder``."""
    return sorted(folder.rglob("*")) if folder.exists() else []


def bytes_below(folder: Path) -> int:
    """Sum of the sizes of all files below ``folder``, without the mark of a run."""
    files = [path for path in files_below(folder) if path.name != "tierbench.json"]
    stats = [path.stat() for path in files if path.is_file()]
    return sum(stat.st_size for stat in stats)


def held(engine: Engine) -> dict[str, int]:
    """Bytes that the ledger has on its books now, by tier."""
    return {tier.value: engine._tiers.ledger.held[tier] for tier in Tier}
