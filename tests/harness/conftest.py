"""Suites over a tiny random model, for the tests of the harness."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from engine.spec.policy import Policy
from harness.suite.options import SuiteOptions

OptionsMaker = Callable[..., SuiteOptions]

PLUGIN = "tests.support.toy_scenarios"

METHODS = (
    "toy_generation",
    "toy_sampling",
    "toy_joint",
    "toy_separate",
    "toy_calibrated",
    "toy_language_modeling",
    "toy_ranking",
)
"""Run entries, one per adaptation method."""


@pytest.fixture(scope="session")
def make_options(tiny_opt_dir: Path) -> OptionsMaker:
    """Makes the options of a suite over the tiny model; only the output path is a must."""

    def make(output_path: Path, **changes: Any) -> SuiteOptions:
        values: dict[str, Any] = {
            "model": str(tiny_opt_dir),
            "model_name": "tiny-opt",
            "policies": [Policy(name="resident")],
            "suite": "toy",
            "output_path": output_path,
            "run_entries": ["toy_generation"],
            "plugins": [PLUGIN],
            "local_path": output_path / "prod_env",
        }
        return SuiteOptions(**(values | changes))

    return make
