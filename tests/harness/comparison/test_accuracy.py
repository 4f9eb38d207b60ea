"""Another system as a suite's engine: groups, stops, log-probabilities, failures."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest

from engine.errors import StorageError, UsageError
from engine.spec.request import Request
from engine.spec.settings import EngineSettings
from harness.baselines import registry
from harness.baselines.sandbox.environments import environment_of
from harness.commands.run import DEMO_MODEL
from harness.comparison.accuracy import SystemEngine, stopped
from harness.comparison.measure import Bench
from harness.comparison.options import CompareOptions, MemoryCap, Model
from harness.comparison.series import Series
from tests.harness.baselines.test_child import FAKE


def engine(tmp_path: Path, way: str) -> SystemEngine:
    baseline = registry.get("accelerate")
    options = CompareOptions(DEMO_MODEL, "x", ["accelerate"], timeout_s=30.0)
    command = [sys.executable, "-I", "-S", str(FAKE), way]
    bench = Bench(options, Model.read(DEMO_MODEL), tmp_path, lambda _: command)
    series = Series(
        baseline, environment_of(baseline), "disk", MemoryCap("all in RAM", None),
        registry.settings_of(baseline, "disk", {}), {}, 16, batch=2,
    )  # fmt: skip
    return SystemEngine(series, bench, EngineSettings(str(DEMO_MODEL)))


def test_requests_are_answered_in_their_order(tmp_path: Path) -> None:
    child = engine(tmp_path, "answers")
    asked = [
        Request((5, 6), 3, stop_token_ids=frozenset({8})),
        Request((1,), 2, prompt_logprobs=True),
        Request((9, 10), 3),
        Request((20, 21), 3, stop=lambda ids: ids[-1] == 22),
        Request((3, 4, 5), 0, prompt_logprobs=True),
    ]
    seen: list[int] = []
    try:
        outputs = child.answer(asked, on_output=lambda index, _: seen.append(index))
    finally:
        child.close()
    assert [output.tokens for output in outputs] == [(7, 8), (2, 3), (11, 12, 13), (22,), ()]
    assert [output.finish_reason for output in outputs] == ["eos", "length", "length", "stop", "length"]
    assert [len(output.logprobs) for output in outputs] == [2, 2, 3, 1, 0]
    assert outputs[4].prompt_logprobs == (-0.5, -0.5)
    assert outputs[0].prompt_logprobs is None
    assert sorted(seen) == [0, 1, 2, 3, 4]
    assert outputs[0].block_size == 2.0  # two of the three of one length


def test_a_system_without_scores_is_not_given_zeros(tmp_path: Path) -> None:
    child = engine(tmp_path, "mute-score")
    try:
        (output,) = child.answer([Request((1, 2), 2)])
    finally:
        child.close()
    assert all(map(math.isnan, output.logprobs))


def test_failures_and_sampling_are_said(tmp_path: Path) -> None:
    child = engine(tmp_path, "dies")
    try:
        with pytest.raises(UsageError, match="answers greedily"):
            child.answer([Request((1,), 1, temperature=1.0)])
        with pytest.raises(StorageError, match="accelerate/disk: failed, ended with code 3"):
            child.answer([Request((1,), 1)])
    finally:
        child.close()


def test_a_stop_ends_before_what_follows() -> None:
    request = Request((1,), 3, stop_token_ids=frozenset({7}))
    assert stopped(request, [5, 7, 9]) == ([5, 7], "eos")
    assert stopped(request, [5, 6, 8, 9]) == ([5, 6, 8], "length")
