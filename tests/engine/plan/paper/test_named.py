"""Named models are those that the engine itself would describe."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from engine.engine import Engine
from engine.errors import ModelError
from engine.plan.paper.named import config_names, named_config, opt_spec


def test_sizes() -> None:
    assert config_names()[0] == "opt-125m" and config_names()[-1] == "opt-175b"
    billions = {name: opt_spec(name).num_parameters / 1e9 for name in ("opt-6.7b", "opt-30b", "opt-175b")}
    assert billions == pytest.approx({"opt-6.7b": 6.66, "opt-30b": 29.97, "opt-175b": 174.6}, rel=2e-3)


def test_the_same_as_the_engine_s(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(named_config("facebook/opt-125m")))
    with Engine(tmp_path, weights="random", device="cpu") as engine:
        described = engine.spec
    counted = opt_spec("opt-125m", "float32")
    assert replace(counted, path=described.path) == described and counted.digest == "named:opt-125m"


def test_refusals() -> None:
    with pytest.raises(ModelError, match="opt-125m"):
        named_config("opt-1t")
    with pytest.raises(ModelError, match="projected"):
        opt_spec("opt-350m")
