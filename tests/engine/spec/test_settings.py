"""Settings of an engine: from a path, from a flat mapping and back, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from engine.engine import Engine
from engine.errors import UsageError
from engine.spec.hardware import Budgets
from engine.spec.policy import Policy
from engine.spec.settings import EngineSettings

SETTINGS = EngineSettings(
    "a/model", "random", 3, "pretend", Budgets(host=1 << 20), Path("here"), Path("store"), True, True
)


@pytest.mark.parametrize("settings", [SETTINGS, EngineSettings("b")])
def test_they_are_read_back(settings: EngineSettings) -> None:
    assert EngineSettings.from_dict(settings.to_dict()) == settings


def test_unknown_settings_are_named() -> None:
    with pytest.raises(
        UsageError, match=r"unknown setting 'modle' of an engine: known are adapter, device, "
    ):
        EngineSettings.from_dict({"model": "m", "modle": "n"})
    with pytest.raises(UsageError, match="weights='trianed' is unknown: use trained or random"):
        EngineSettings.from_dict({"model": "m", "weights": "trianed"})


def test_an_engine_takes_them_whole_or_one_by_one(tiny_opt_dir: Path, tmp_path: Path) -> None:
    settings = EngineSettings(str(tiny_opt_dir), device="cpu", offload_dir=tmp_path)
    with (
        Engine(settings, Policy()) as whole,
        Engine(tiny_opt_dir, Policy(), device="cpu", offload_dir=tmp_path) as single,
        Engine(settings, Policy(), seed=1) as changed,
    ):
        assert whole.settings == single.settings == settings
        assert changed.settings.seed == 1 and changed.settings.offload_dir == tmp_path
    with pytest.raises(TypeError, match="modle"):
        Engine(tiny_opt_dir, modle="m")
