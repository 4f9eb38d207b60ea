"""Names, configurations and settings as they are given on the command line."""

from __future__ import annotations

import pytest

from engine.errors import UsageError
from harness.baselines import registry


def names(*texts: str) -> list[str]:
    return [f"{baseline.name}/{configuration}" for baseline, configuration in registry.chosen(texts)]


def test_names_stand_for_their_default_configurations() -> None:
    assert names("ours,accelerate", "llama-cpp/q8_0") == [
        "ours/full", "ours/4bit", "accelerate/disk", "llama-cpp/q8_0",
    ]  # fmt: skip
    assert names("ours/full", "ours") == ["ours/full", "ours/4bit"]


def test_wrong_names_are_refused_with_a_cure() -> None:
    with pytest.raises(UsageError, match="did you mean 'accelerate'"):
        registry.chosen(["acelerate"])
    with pytest.raises(UsageError, match=r"no configuration 'q5': it has f32, f16"):
        registry.chosen(["llama-cpp/q5"])


def test_settings_have_the_type_of_their_default() -> None:
    found = registry.overrides(["llama-cpp.repack=False", "llama-cpp.n_batch=128", "accelerate.map=auto:0.2"])
    assert found == {"llama-cpp": {"repack": False, "n_batch": 128}, "accelerate": {"map": "auto:0.2"}}
    for text, message in (
        ("llama-cpp.repack=maybe", "is true or false"),
        ("llama-cpp.n_batch=many", "is a number"),
        ("llama-cpp.speed=1", "has no setting 'speed'"),
        ("repack=true", "SYSTEM.KEY=VALUE"),
    ):
        with pytest.raises(UsageError, match=message):
            registry.overrides([text])


def test_a_readers_setting_wins_over_configuration_and_default() -> None:
    baseline = registry.get("llama-cpp")
    assert registry.settings_of(baseline, "q4_0", {})["weights"] == "q4_0"
    assert registry.settings_of(baseline, "q4_0", {"weights": "q8_0"})["weights"] == "q8_0"
    assert registry.settings_of(baseline, "q4_0", {})["kv"] == "f16"
