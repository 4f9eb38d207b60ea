"""Passes of the engine, one by one: predicted and measured seconds, and the machine's pace.

Nothing of what is timed here is known to the cost model but by the profile that is given.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from transformers import PretrainedConfig

from engine.engine import Engine
from engine.files.scratch import Scratch
from engine.plan.simulation.pace import at_pace
from engine.plan.simulation.simulate import Simulator
from engine.plan.workload import PassWork, Workload
from engine.profiling.pace import Sample, Yardstick, repeated
from engine.spec.policy import Policy
from engine.spec.profile import HardwareProfile
from engine.spec.rates import Pace
from engine.spec.request import CallProgress, Request
from engine.trace import Trace

_WITHIN = 0.1
"""Seconds of computing for the yardstick whenever a pass tells how far it is, once a second. Little, as the
disk goes on meanwhile with what it was asked for."""

_EVERY = 0.5
"""Seconds of passes that follow each other before the pace is measured, so that short ones find caches and
threads as the pass before left them."""

_AFTER = 0.15
"""Seconds of computing for the yardstick then, and of reading at least: some samples, as a single one may be
spoilt."""

_READING = 0.1
"""Seconds of reading, as a fraction of those of the passes."""


@contextmanager
def random_engine(device: str, offload_dir: Path, config: PretrainedConfig, policy: str) -> Iterator[Engine]:
    """An engine of a model with random weights; its folder is deleted afterwards."""
    with Scratch(offload_dir) as scratch:
        folder = scratch.path / "small"
        config.save_pretrained(folder)
        with Engine(
            folder, Policy.parse(policy), device=device, weights="random", offload_dir=offload_dir
        ) as engine:
            yield engine


def predict_passes(
    engine: Engine,
    requests: Sequence[Request],
    profile: HardwareProfile,
    paces: Sequence[Pace] | None = None,
) -> list[tuple[PassWork, float]]:
    """Every pass of a run: its work and its predicted seconds.

    Args:
        paces: the machine's at each pass; the profile's own by default.

    Raises:
        RequestError, BudgetError: as `Engine.check`.
    """
    plan = engine.check(requests)
    works = works_of(requests, engine.policy)
    profiles = [profile] * len(works) if paces is None else [at_pace(profile, pace) for pace in paces]
    simulators = [Simulator(one, engine.spec, engine.policy, plan) for one in profiles]
    return [
        (work, simulator.time(work, first=index == 0, last=index == len(works) - 1).seconds)
        for index, (work, simulator) in enumerate(zip(works, simulators, strict=True))
    ]


def works_of(requests: Sequence[Request], policy: Policy) -> list[PassWork]:
    """The work of each pass of a run."""
    return list(Workload.of(requests, policy).passes(policy))


@dataclass
class PassClock:
    """Takes the seconds of every pass of a call, without those of the callbacks.

    Give it to `Engine.answer` as ``on_progress``.
    """

    between: Callable[[float], None] | None = None
    """Called after every pass with the seconds that it took."""

    within: Callable[[], None] | None = None
    """Called from within passes, about once a second. Meanwhile the streams move what was asked of them."""

    seconds: list[float] = field(default_factory=list)
    _begin: float | None = None

    def __call__(self, progress: CallProgress) -> None:
        now = time.perf_counter()
        if progress.loaded < 1:
            return
        if self._begin is None:
            self._begin = now - progress.seconds
        if progress.pass_done < 1:
            if self.within is not None:
                self.within()
                self._begin += time.perf_counter() - now
        elif progress.passes > len(self.seconds):
            self.seconds.append(now - self._begin)
            if self.between is not None:
                self.between(self.seconds[-1])
            self._begin = time.perf_counter()


def timed_passes(engine: Engine, requests: Sequence[Request], clock: PassClock | None = None) -> list[float]:
    """Answer requests; seconds of each pass, by ``clock`` if one is given. The engine's trace is reset.

    Raises:
        TierbenchError: as `Engine.answer`.
    """
    clock = clock or PassClock()
    engine.trace = Trace()
    engine.answer(requests, on_progress=clock)
    return clock.seconds


@dataclass(frozen=True)
class ComparedPass:
    """One pass, predicted and measured."""

    work: PassWork
    seconds: float
    predicted: float
    """At the pace of the profile."""

    paced: float
    """At the pace that the machine had within the pass and soon after it, while it was still under load."""

    pace: Pace


def compare_passes(
    engine: Engine, requests: Sequence[Request], profile: HardwareProfile, yardstick: Yardstick
) -> list[ComparedPass]:
    """Answer requests; every pass, predicted and measured, with the pace of the machine.

    Raises:
        TierbenchError: as `Engine.answer`.
    """
    known = predict_passes(engine, requests, profile)
    paces: list[Pace] = []
    within: list[Sample] = []
    waiting: list[float] = []  # seconds of passes whose pace is not known yet

    def between(took: float) -> None:
        waiting.append(took)
        total, last = sum(waiting), len(paces) + len(waiting) == len(known)
        if total >= _EVERY or last:
            pace = yardstick.pace(_AFTER, max(_AFTER, _READING * total), within)
            paces.extend([pace] * len(waiting))
            waiting.clear()
            within.clear()

    clock = PassClock(between, lambda: within.extend(repeated(yardstick.computing, _WITHIN)))
    seconds = timed_passes(engine, requests, clock)
    assert len(seconds) == len(known), "the batching rules were walked differently"
    paced = predict_passes(engine, requests, profile, paces)
    return [
        ComparedPass(work, took, own, now, pace)
        for (work, own), (_, now), took, pace in zip(known, paced, seconds, paces, strict=True)
    ]
