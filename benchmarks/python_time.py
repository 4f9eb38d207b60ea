"""The time of a pass's main thread by kind: our Python, the frameworks' Python, kernels, I/O.

These are self times of the deterministic profiler. A built-in function counts for its caller, unless it
belongs to torch or to the operating system.
"""

from __future__ import annotations

import cProfile
import pstats
from collections.abc import Sequence
from pathlib import Path

from engine.engine import Engine
from engine.profiling.passes import PassClock
from engine.spec.request import Request
from engine.trace import Trace

KINDS = ("engine", "transformers and torch.nn", "torch and kernels", "I/O and waiting")
_ENGINE = str(Path(__file__).resolve().parent.parent / "engine")
_KERNELS = "kernels/cpu/"  # files of whose functions the self time is that of the C code they call
_IO_WORDS = ("preadv", "pwritev", "posix.", "io_uring", "'acquire' of", "wait")

_Function = tuple[str, int, str]


def profile_passes(engine: Engine, requests: Sequence[Request]) -> tuple[dict[str, float], int]:
    """Answer requests of one block; self seconds per kind over all passes but the first, and their number.

    What a run does once, at its beginning and at its end, is no pass's.
    """
    profiler = cProfile.Profile()
    clock = PassClock()
    last = max(request.max_new_tokens for request in requests)

    def between(_seconds: float) -> None:
        if len(clock.seconds) == 1:
            profiler.enable()
        if len(clock.seconds) == last:
            profiler.disable()

    clock.between = between
    engine.trace = Trace()
    try:
        engine.answer(requests, on_progress=clock)
    finally:
        profiler.disable()
    return sum_kinds(pstats.Stats(profiler).stats), len(clock.seconds) - 1  # type: ignore[attr-defined]


def sum_kinds(stats: dict[_Function, tuple]) -> dict[str, float]:  # type: ignore[type-arg]
    """Self seconds per kind, from the table that `pstats` makes."""
    sums = dict.fromkeys(KINDS, 0.0)
    for function, (_, _, own, _, callers) in stats.items():
        kind = kind_of(function)
        if kind is not None:
            sums[kind] += own
            continue
        left = own
        for caller, (_, _, part, _) in callers.items():
            sums[kind_of(caller) or KINDS[1]] += part
            left -= part
        sums[KINDS[1]] += max(left, 0.0)
    return sums


def kind_of(function: _Function) -> str | None:
    """What a function's self time is; None for a built-in that counts for its caller."""
    file, _, name = function
    if file == "~":
        if any(word in name for word in _IO_WORDS):
            return KINDS[3]
        return KINDS[2] if "torch" in name or "Tensor" in name or "mkldnn" in name else None
    if _KERNELS in file:
        return KINDS[2]
    if file.startswith(_ENGINE):
        return KINDS[0]
    if file.endswith(("torch/_ops.py", "threading.py", "queue.py")):
        return KINDS[2] if file.endswith("_ops.py") else KINDS[3]
    return KINDS[1]
