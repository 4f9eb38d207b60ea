"""What suites, sweeps and front ends need of an engine."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from engine.spec.hardware import Tier
from engine.spec.memory_plan import MemoryPlan
from engine.spec.model import ModelSpec
from engine.spec.policy import Policy
from engine.spec.record import EngineRecord
from engine.spec.request import CallProgress, Output, Request
from engine.spec.settings import EngineSettings

OnLogits = Callable[[int, int, Any], None]
OnNotice = Callable[[str], None]
"""Called with one line when there is something to wait for."""


class TraceLike(Protocol):
    """What every stream did."""

    def write_chrome(self, path: Path) -> None: ...


class EngineLike(Protocol):
    """The part of `engine.engine.Engine` that a suite uses; see there for what each does."""

    @property
    def spec(self) -> ModelSpec: ...

    @property
    def trace(self) -> TraceLike: ...

    def check(self, requests: Sequence[Request]) -> MemoryPlan | None:
        """None where no plan is made: then it shows in `answer` what does not fit."""

    def answer(
        self,
        requests: Sequence[Request],
        *,
        on_output: Callable[[int, Output], None] | None = None,
        on_progress: Callable[[CallProgress], None] | None = None,
    ) -> list[Output]: ...

    def record(self) -> EngineRecord: ...

    def close(self) -> None: ...


class SweepEngine(EngineLike, Protocol):
    """What a sweep over formats uses besides."""

    def answer(
        self,
        requests: Sequence[Request],
        *,
        on_output: Callable[[int, Output], None] | None = None,
        on_progress: Callable[[CallProgress], None] | None = None,
        on_logits: OnLogits | None = None,
    ) -> list[Output]: ...

    @property
    def limits(self) -> Mapping[Tier, int]: ...

    def largest_block(
        self, prompt_tokens: int, new_tokens: int, limits: Mapping[Tier, int] | None = None
    ) -> int: ...


EngineFactory = Callable[[EngineSettings, Policy, OnNotice], EngineLike]
"""Makes the engine of a policy; `engine.engine.Engine` is one."""

SweepEngineFactory = Callable[[EngineSettings, Policy, OnNotice], SweepEngine]
