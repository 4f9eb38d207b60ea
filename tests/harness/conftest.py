"""Options of suites over a tiny random model."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import pytest

from engine.spec.policy import Policy
from engine.spec.settings import EngineSettings
from harness.suite.options import SuiteOptions
from harness.sweep.options import CurveOptions

OptionsMaker = Callable[..., SuiteOptions]
Options = TypeVar("Options", SuiteOptions, CurveOptions)

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
    """Makes the options of a suite over the tiny model; only the output path is required."""

    def make(output_path: Path, **changes: Any) -> SuiteOptions:
        values: dict[str, Any] = {
            "model_name": "tiny-opt",
            "policies": [Policy(name="resident")],
            "suite": "toy",
            "output_path": output_path,
            "run_entries": ["toy_generation"],
            "plugins": [PLUGIN],
            "local_path": output_path / "prod_env",
        }
        own = {one.name for one in dataclasses.fields(EngineSettings)}
        about = {key: changes.pop(key) for key in own & changes.keys()}
        model = about.pop("model", str(tiny_opt_dir))
        settings = EngineSettings(model, **{"offload_dir": output_path / "offload"} | about)
        return SuiteOptions(settings, **(values | changes))

    return make


def with_settings(options: Options, **changes: Any) -> Options:
    """Options with other settings of the engine."""
    settings = dataclasses.replace(options.settings, **changes)
    return dataclasses.replace(options, settings=settings)
