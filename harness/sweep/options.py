"""What a curve is told to do, and what it expects of an engine beyond what a suite does."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from engine.spec.hardware import Budgets
from engine.spec.policy import Policy
from engine.spec.request import Output, Progress, Request
from harness.suite.options import EngineLike


@dataclass(frozen=True)
class CurveOptions:
    """The command line of a curve; ``run_helm.py curve --help`` says what each means."""

    model: str
    model_name: str
    base: Policy
    """Where everything lives, for every format."""

    formats: Sequence[Policy]
    """The formats on top of it, without the reference."""

    suite: str
    output_path: Path
    run_entries: Sequence[str] = ()
    conf_paths: Sequence[str] = ()
    max_eval_instances: int | None = None
    plugins: Sequence[str] = ()
    answers: int = 100
    """Most correct answers per run entry whose likelihood is measured."""

    text: Path | None = None
    dataset: str | None = None
    """Running text: a file, a data set or neither."""

    window: int | None = None
    """Tokens of a window of running text; None is the model's own, at most 256 for the demo's text."""

    stride: int | None = None
    """Scored tokens of each window; None is half of it."""

    text_tokens: int = 4096
    last_word: str | None = None
    """Passages: a file, ``lambada`` or none."""

    divergence_tokens: int = 4096
    repeats: int = 3
    accept: float = 0.99
    published: bool = False
    """Whether the paper's figures stand beside the table."""

    keep_reference: bool = False
    budgets: Budgets = field(default_factory=Budgets)
    offload_dir: Path | None = None
    store: Path | None = None
    verify: bool = False
    device: str = "auto"
    seed: int = 0
    weights: Literal["trained", "random"] = "trained"
    trust_remote_code: bool = False

    @property
    def folder(self) -> Path:
        """Where the curve's files go."""
        return self.output_path / "curves" / self.suite

    @property
    def offload(self) -> Path:
        """Folder of the disk tier."""
        return self.offload_dir or self.output_path / "offload"


OnLogits = Callable[[int, int, Any], None]


class CurveEngine(EngineLike, Protocol):
    """The part of `engine.engine.Engine` that a curve uses; see there for what each does."""

    def answer(
        self,
        requests: Sequence[Request],
        *,
        on_output: Callable[[int, Output], None] | None = None,
        on_progress: Callable[[Progress], None] | None = None,
        on_logits: OnLogits | None = None,
    ) -> list[Output]: ...

    def largest_block(self, prompt_tokens: int, new_tokens: int) -> int: ...


CurveEngineFactory = Callable[..., CurveEngine]
"""Called as `engine.engine.Engine` is."""
