"""Every system against a child that behaves or misbehaves: a record comes back, whatever happens."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from harness.baselines import registry
from harness.baselines.base import Baseline, Configuration
from harness.baselines.sandbox.environments import Environment
from harness.comparison.measure import Bench
from harness.comparison.options import CompareOptions, Model, Trial
from tests.harness.baselines.test_child import FAKE, can_limit

MIB = 1 << 20

# What a trial's record says for each way in which tests/support/fake_child.py behaves.
ENDS = {
    "answers": ("ok", ""),
    "hangs": ("timeout", "no answer to generate"),
    "dies": ("failed", "ended with code 3"),
    "rubbish": ("failed", "is not one"),
    "too-few": ("failed", "4 tokens were asked for, 3 came"),
    "wrong-ids": ("failed", "something other than token ids below 50"),
    "lies": ("failed", "it reports 100.01 s, our clock"),
    "unsupported": ("unsupported", "it is unsupported indeed"),
}


def bench(tmp_path: Path, way: str, timeout: float = 30.0) -> Bench:
    """A bench on a folder that only looks like a checkpoint; all children are the fake one."""
    model = tmp_path / "model"
    model.mkdir(exist_ok=True)
    (model / "config.json").write_text(json.dumps({"vocab_size": 50}))
    (model / "model.safetensors").write_bytes(b"x" * 1000)
    options = CompareOptions(model, "test", ["ours"], gen_len=4, prompt_len=3, timeout_s=timeout)
    command = [sys.executable, "-I", "-S", str(FAKE), way]
    return Bench(options, Model.read(model), tmp_path / "work", lambda _: command)


def trial_of(baseline: Baseline, cap: int | None = None, score: bool = False) -> Trial:
    configuration = next(iter(baseline.configurations))
    settings = registry.settings_of(baseline, configuration, {})
    return Trial(baseline.name, configuration, settings, cap, 2, 3, 4, "repeat", 1, score)


@pytest.mark.parametrize("way", ENDS)
@pytest.mark.parametrize("name", registry.NAMES)
def test_a_record_comes_back(name: str, way: str, tmp_path: Path) -> None:
    baseline = registry.get(name)
    record = bench(tmp_path, way, 0.4 if way == "hangs" else 30.0).run(
        Environment(baseline, tmp_path / "env"), trial_of(baseline)
    )
    status, reason = ENDS[way]
    assert record["status"] == status, record
    assert reason in record["reason"]
    assert (tmp_path / "work").is_dir()
    if status == "ok":
        # Two sequences, 3 prompt and 4 new tokens each; the fake child reports 0.01 s + 0.01 s.
        assert record["generated_tokens_per_s"] == pytest.approx(2 * 4 / 0.02)
        assert record["total_tokens_per_s"] == pytest.approx(2 * (3 + 4) / 0.02)
        assert record["versions"] == {"fake": "1"}


@pytest.mark.parametrize("name", registry.NAMES)
def test_a_kill_for_memory_is_a_record(name: str, tmp_path: Path) -> None:
    if reason := can_limit():
        pytest.skip(reason)
    baseline = registry.get(name)
    record = bench(tmp_path, "hungry").run(
        Environment(baseline, tmp_path / "env"), trial_of(baseline, cap=64 * MIB)
    )
    assert record["status"] == "out_of_memory"
    assert record["cap_enforced"].startswith("cgroup v")
    assert 0 < record["peak_bytes"] <= 64 * MIB


@pytest.mark.parametrize("name", registry.NAMES)
def test_what_a_system_declares_holds_together(name: str) -> None:
    baseline = registry.get(name)
    assert baseline.name == name
    assert len(baseline.choices) > 60
    assert set(baseline.default_configurations) <= set(baseline.configurations)
    for key, configuration in baseline.configurations.items():
        assert isinstance(configuration, Configuration)
        assert configuration.bits in (4, 8, 16)
        for capped in (False, True):
            variants = baseline.variants(key, capped)
            assert variants
            for settings in (configuration.settings, *variants):
                assert set(settings) <= set(baseline.defaults), "a setting that nobody can override"
    for pin in baseline.requirements:
        assert any(sign in pin for sign in ("==", "<")) or pin in ("wheel", "ninja")


def test_scores_are_kept_or_said_to_be_missing(tmp_path: Path) -> None:
    baseline = registry.get("accelerate")
    environment = Environment(baseline, tmp_path / "env")
    record = bench(tmp_path, "answers").run(environment, trial_of(baseline, score=True))
    assert record["logprobs"] == {"0": [-0.5] * 4, "1": [-0.5] * 4}
    record = bench(tmp_path, "mute-score").run(environment, trial_of(baseline, score=True))
    assert record["status"] == "ok"
    assert record["unscored"] == "no scores"
