"""The options of a suite."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from engine.spec.policy import Policy
from engine.spec.settings import EngineSettings


@dataclass(frozen=True)
class SuiteOptions:
    """The command line of a suite; ``run_helm.py run --help`` says what each means."""

    settings: EngineSettings
    model_name: str
    """The model's name in tables."""

    policies: Sequence[Policy]
    suite: str
    output_path: Path
    run_entries: Sequence[str] = ()
    conf_paths: Sequence[str] = ()
    max_eval_instances: int | None = None
    num_train_trials: int | None = None
    forbid_truncation: bool = False
    plugins: Sequence[str] = ()
    local_path: Path = Path("prod_env")
    """HELM's configuration folder."""

    only_accepted: Path | None = None
    """A curve.json whose gate has to have accepted how every policy compresses."""

    dry_run: bool = False
    report: bool = True
    quiet: bool = False
    """Whether no progress is shown."""
