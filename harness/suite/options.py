"""What a suite is told to do, and what it expects of an engine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from engine.spec.hardware import Budgets
from engine.spec.policy import Policy
from engine.spec.request import Output, Progress, Request

if TYPE_CHECKING:
    from engine.spec.model import ModelSpec


@dataclass(frozen=True)
class SuiteOptions:
    """The command line of a suite; ``run_helm.py run --help`` says what each means."""

    model: str
    """Local folder or hub name."""

    model_name: str
    """How tables call it."""

    policies: Sequence[Policy]
    suite: str
    output_path: Path
    run_entries: Sequence[str] = ()
    conf_paths: Sequence[str] = ()
    max_eval_instances: int | None = None
    num_train_trials: int | None = None
    budgets: Budgets = field(default_factory=Budgets)
    offload_dir: Path | None = None
    """None is the folder ``offload`` in the output path."""

    store: Path | None = None
    """Folder of the packed store; None is the user's."""

    verify: bool = False
    """Whether the store's checksums are compared before its weights are used."""

    device: str = "auto"
    seed: int = 0
    weights: Literal["trained", "random"] = "trained"
    trust_remote_code: bool = False
    forbid_truncation: bool = False
    plugins: Sequence[str] = ()
    local_path: Path = Path("prod_env")
    """HELM's configuration folder."""

    only_accepted: Path | None = None
    """A curve.json whose gate has to have accepted how every policy compresses."""

    dry_run: bool = False
    report: bool = True
    quiet: bool = False
    """Whether nothing is said of progress."""


class EngineLike(Protocol):
    """The part of `engine.engine.Engine` that a suite uses; see there for what each does."""

    @property
    def spec(self) -> ModelSpec: ...

    @property
    def trace(self) -> Any: ...

    def check(self, requests: Sequence[Request]) -> Any: ...

    def answer(
        self,
        requests: Sequence[Request],
        *,
        on_output: Callable[[int, Output], None] | None = None,
        on_progress: Callable[[Progress], None] | None = None,
    ) -> list[Output]: ...

    def record(self) -> dict[str, Any]: ...

    def close(self) -> None: ...


EngineFactory = Callable[..., EngineLike]
"""Called as `engine.engine.Engine` is: ``factory(model, policy, budgets=..., offload_dir=..., ...)``."""
