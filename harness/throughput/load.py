"""The paper's synthetic load: equal prompts of random ids, a fixed number of tokens, timed pass by pass.

Throughput is counted as the FlexGen paper counts it: b sequences with prompts of s tokens and n tokens each
have a prefill throughput of b*s / prefill time, a decode throughput of b*(n-1) / decode time, and a
(generation) throughput of b*n / both. It does not know how an engine or a prediction comes about.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from engine.engine import Engine
from engine.errors import UsageError
from engine.prediction import Prediction, predict
from engine.profiling.passes import PassClock, works_of
from engine.spec.hardware import Tier
from engine.spec.memory_plan import MemoryPlan
from engine.spec.profile import HardwareProfile
from engine.spec.record import EngineRecord
from engine.spec.request import CallProgress, Request

MEASURED, SIMULATED, PROJECTED = "measured", "simulated", "projected"
MEMORY = "memory"
"""Device and host tier where they are one memory, whose peaks at different times say nothing."""

_FIRST_ID = 4  # the ids before mark ends and padding


@dataclass(frozen=True)
class Load:
    """What is asked for."""

    prompt_len: int
    gen_len: int
    requests: int

    def prompts(self, vocabulary: int, generated: int | None = None, seed: int = 0) -> list[Request]:
        """The requests, or ones that generate fewer tokens."""
        rng = random.Random(seed)
        low = min(_FIRST_ID, vocabulary - 1)
        length = self.gen_len if generated is None else generated
        return [
            Request(tuple(rng.randrange(low, vocabulary) for _ in range(self.prompt_len)), length)
            for _ in range(self.requests)
        ]


@dataclass(frozen=True)
class Times:
    """Seconds of a load, and what kind of figures they are."""

    kind: str
    prefill_seconds: float
    decode_seconds: float

    @classmethod
    def predicted(cls, prediction: Prediction) -> Times:
        """Those that a prediction simulated."""
        estimate = prediction.estimate
        return cls(SIMULATED, estimate.prefill_seconds, estimate.decode_seconds)

    def rates(self, load: Load) -> dict[str, float | None]:
        """Tokens per second in the paper's three definitions; None where nothing of the kind is computed."""
        tokens = {
            "prefill": (load.requests * load.prompt_len, self.prefill_seconds),
            "decode": (load.requests * (load.gen_len - 1), self.decode_seconds),
            "total": (load.requests * load.gen_len, self.prefill_seconds + self.decode_seconds),
        }
        return {
            name: count / seconds if count and seconds else None for name, (count, seconds) in tokens.items()
        }

    def to_dict(self, load: Load) -> dict[str, Any]:
        """For results."""
        return {**asdict(self), "throughput": self.rates(load)}


@dataclass(frozen=True)
class MeasuredLoad:
    """One run, or the projection of a shorter one, beside what was predicted of the whole."""

    load: Load
    times: Times
    predicted: Times | None
    """None without a profile of this machine."""

    peaks: dict[str, dict[str, int | None]]
    """Per tier ``planned`` and ``peak`` bytes; a shorter run's peak is not that of the whole, and None."""

    record: EngineRecord
    """`Engine.record`."""

    def to_dict(self) -> dict[str, Any]:
        """For results."""
        return {
            **self.times.to_dict(self.load),
            "load": asdict(self.load),
            "predicted": None if self.predicted is None else self.predicted.to_dict(self.load),
            "memory": self.peaks,
            "engine": self.record.to_json(),
        }


def measure(
    engine: Engine,
    load: Load,
    profile: HardwareProfile | None = None,
    passes: int | None = None,
    on_progress: Callable[[CallProgress], None] = lambda progress: None,
) -> MeasuredLoad:
    """Answer a load and time its passes.

    Args:
        profile: of this machine, to predict by.
        passes: measure this number of decode passes, at least 2, and project the others.

    Raises:
        UsageError: if passes cannot be told apart.
        RequestError, BudgetError, StorageError: as `Engine.answer`.
    """
    whole = load.prompts(engine.spec.vocab_size)
    planned = engine.check(whole)
    run, short = whole, False
    if passes is not None and passes + 1 < load.gen_len:
        run, short = load.prompts(engine.spec.vocab_size, passes + 1), True
    clock = PassClock()

    def note(progress: CallProgress) -> None:
        clock(progress)
        on_progress(progress)

    engine.answer(run, on_progress=note)
    seconds = clock.seconds
    prompting = [work.has_prompts for work in works_of(run, engine.policy)]
    if len(prompting) != len(seconds):
        raise UsageError("an answer ended early, so that passes cannot be told apart: use random weights")
    prefill = sum(taken for taken, prompts in zip(seconds, prompting, strict=True) if prompts)
    decode = [taken for taken, prompts in zip(seconds, prompting, strict=True) if not prompts]
    times = Times(MEASURED, prefill, sum(decode))
    if short:
        count = sum(not work.has_prompts for work in works_of(whole, engine.policy))
        times = Times(PROJECTED, prefill, extrapolated(decode, count))
    predicted = Times.predicted(predict(engine, whole, profile)) if profile else None
    record = engine.record()
    return MeasuredLoad(load, times, predicted, peaks_of(planned, None if short else record), record)


def peaks_of(plan: MemoryPlan, record: EngineRecord | None) -> dict[str, dict[str, int | None]]:
    """Planned and measured most bytes of each tier, or of device and host together where they are one memory.

    Args:
        record: of the engine that ran the whole plan; None where none did.
    """
    if plan.unified:
        together = record.together.peak if record and record.together else None
        planned = plan.total(Tier.DEVICE) + plan.total(Tier.HOST)
        memory: dict[str, dict[str, int | None]] = {MEMORY: {"planned": planned, "peak": together}}
        tiers = [Tier.DISK]
    else:
        memory, tiers = {}, list(Tier)
    for tier in tiers:
        peak = record.memory[tier.value].peak if record else None
        memory[tier.value] = {"planned": plan.total(tier), "peak": peak}
    return memory


def extrapolated(seconds: Sequence[float], count: int) -> float:
    """Seconds of a number of decode passes, of which the first ones are known.

    A pass grows with its context, by as much as the middle of all pairs of passes says (Theil and Sen's
    slope, which a single slow pass does not move), and never shrinks.
    """
    if not seconds:
        return 0.0
    pairs = [
        (seconds[j] - seconds[i]) / (j - i) for i in range(len(seconds)) for j in range(i + 1, len(seconds))
    ]
    slope = max(0.0, statistics.median(pairs)) if pairs else 0.0
    level = statistics.median(taken - slope * i for i, taken in enumerate(seconds))
    return sum(seconds) + sum(level + slope * i for i in range(len(seconds), count))


def deeper(shallow: Times, deep: Times, layers: tuple[int, int], whole: int) -> Times:
    """The times of a model of ``whole`` layers, projected from those of two with fewer."""

    def project(less: float, more: float) -> float:
        return max(more, more + (more - less) / (layers[1] - layers[0]) * (whole - layers[1]))

    return Times(
        PROJECTED,
        project(shallow.prefill_seconds, deep.prefill_seconds),
        project(shallow.decode_seconds, deep.decode_seconds),
    )
