"""The machine's pace is measured beside other figures, which are then converted to one pace."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from engine.engine import Engine
from engine.plan.paper.named import published_profile
from engine.profiling.links import scratch_tiers
from engine.profiling.pace import Steady, Yardstick
from engine.profiling.passes import PassClock, compare_passes
from engine.profiling.timing import steadied, timed
from engine.spec.policy import Policy
from engine.spec.rates import Pace
from engine.spec.request import CallProgress, Request
from tests.support.tiny_models import save_tiny_opt

CPU = torch.device("cpu")


def test_what_is_timed_while_all_is_slow_counts_as_at_the_usual_pace() -> None:
    asked: list[float] = []

    def slowness() -> float:
        asked.append(4.0)
        return asked[-1]

    with steadied(slowness):
        steady = timed(lambda: time.sleep(0.02), 0.05, CPU)
    assert len(asked) == 2, "before and after"
    assert 0.005 <= steady.seconds < 0.02
    assert timed(lambda: time.sleep(0.02), 0.05, CPU).seconds >= 0.02, "it ends with the block"


def test_what_is_called_within_and_between_passes_is_not_their_time(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def lasts(seconds: float) -> None:
        now[0] += seconds

    took: list[float] = []

    def between(seconds: float) -> None:
        took.append(seconds)
        lasts(8.0)

    clock = PassClock(between, lambda: lasts(4.0))

    def tells(passes: int, pass_done: float, loaded: float = 1.0) -> None:
        clock(
            CallProgress(
                finished=0, total=1, passes=passes, generated_tokens=0, prompt_tokens=0,
                seconds=0.25, eta_seconds=0, pass_done=pass_done, loaded=loaded,
            )
        )  # fmt: skip

    tells(0, 1.0, loaded=0.5)  # loading is not a pass
    tells(0, 0.3)
    lasts(0.5)
    tells(0, 0.6)
    lasts(0.125)
    tells(1, 1.0)
    lasts(2.0)
    tells(2, 1.0)
    tells(2, 1.0)  # the end of the call
    assert clock.seconds == took == [0.25 + 0.5 + 0.125, 2.0]


def test_the_pace_counts_what_was_sampled_before(tmp_path: Path) -> None:
    with scratch_tiers(CPU, True, tmp_path) as tiers:
        yardstick = Yardstick(CPU, tiers)
        slow = yardstick.pace(sampled=[(1e3, 1e3)])
        usual = yardstick.pace(sampled=[(1e3, 1e3), (2e3, 3e3), (2e3, 3e3)])
    assert 1e3 < slow.few < 2.1e3 and 1e3 < slow.many < 2.1e3, "by the time that work took"
    assert (usual.few, usual.many) == (pytest.approx(2e3), pytest.approx(3e3)), "without the ends"
    assert slow.read > 1e6


def test_passes_are_predicted_at_the_pace_beside_them(tmp_path: Path) -> None:
    with scratch_tiers(CPU, True, tmp_path / "tiers") as tiers:
        yardstick = Yardstick(CPU, tiers)
        now = yardstick.pace()
        assert min(now.few, now.many) > 1e6 and now.read > 1e6
        for sample in (yardstick.computing, yardstick.reading):
            assert 0.01 < Steady(sample).slowness() < 100
        profile = replace(published_profile("t4"), pace=Pace(now.few * 1e3, now.many * 1e3, now.read * 1e3))
        folder = save_tiny_opt(tmp_path / "model")
        policy = Policy.parse("weights=host,kv=host,device_batch=2,num_device_batches=1,host_attention=off")
        with Engine(folder, policy, device="pretend", offload_dir=tmp_path / "offload") as engine:
            passes = compare_passes(engine, [Request((5, 6, 7), 3), Request((8, 9), 3)], profile, yardstick)
    assert len(passes) == 3
    for one in passes:
        assert one.paced > one.predicted > 0, "the machine is far slower than the profile's pace says"
    assert not list((tmp_path / "tiers").iterdir()), "the yardstick's file stays behind"
