"""The options of a sweep over compression formats."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from engine.spec.policy import Policy
from engine.spec.settings import EngineSettings
from harness.tokenizer import ChatMode


@dataclass(frozen=True)
class CurveOptions:
    """The command line of a curve; ``run_helm.py curve --help`` says what each means."""

    settings: EngineSettings
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
    chat: ChatMode = "auto"
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

    @property
    def folder(self) -> Path:
        """Where the curve's files go."""
        return self.output_path / "curves" / self.suite
