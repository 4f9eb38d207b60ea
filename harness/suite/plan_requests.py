"""The requests that run entries really make of a model, without answering one."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from engine.spec.policy import Policy
from engine.spec.request import Request
from engine.spec.settings import EngineSettings
from harness.suite.options import SuiteOptions
from harness.suite.runner import run_suite


class _Heard(Exception):
    """What was asked is known."""

    def __init__(self, requests: Sequence[Request]) -> None:
        super().__init__()
        self.requests = requests


class _Listener:
    """Stands where an engine stands and is told what is asked."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        from engine.engine import Engine

        self._engine = Engine(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def check(self, requests: Sequence[Request]) -> Any:
        """Told."""
        raise _Heard(requests)

    def close(self) -> None:
        """Nothing was loaded."""
        self._engine.close()


def requests_of(args: argparse.Namespace) -> list[Request]:
    """Ask HELM what the run entries of a command line ask.

    Raises:
        TierbenchError: as `harness.suite.runner.run_suite`.
    """
    with tempfile.TemporaryDirectory(prefix="plan-") as folder:
        options = SuiteOptions(
            settings=EngineSettings(
                args.model,
                weights="random",
                offload_dir=Path(folder) / "offload",
                trust_remote_code=args.trust_remote_code,
            ),
            model_name="planned",
            policies=[Policy()],
            suite="plan",
            output_path=Path(folder),
            run_entries=args.run_entries,
            conf_paths=args.conf_paths,
            max_eval_instances=args.max_eval_instances,
            plugins=args.plugins,
            local_path=Path(folder) / "prod_env",
            dry_run=True,
            report=False,
        )
        try:
            run_suite(options, _Listener)
        except _Heard as heard:
            return list(heard.requests)
    raise AssertionError("a dry run checks what it would ask")
