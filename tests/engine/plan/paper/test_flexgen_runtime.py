"""FlexGen's own rule of placement and its loops, on the paper's machine."""

from __future__ import annotations

from dataclasses import replace

import pytest

from engine.plan.paper.flexgen_runtime import FlexGenRun, effective, simulate
from engine.plan.paper.named import opt_spec, published_profile
from engine.spec.hardware import Tier
from engine.spec.policy import Placement, Policy

ATTENTION, MLP = (0.25,) * 4, (0.5, 0.5)


def on_device(fraction: float) -> float:
    """The fractions of a whole layer on the device; attention is a third of a layer."""
    asked = Placement(fraction, 1 - fraction, 0)
    return effective(asked, ATTENTION)[Tier.DEVICE] / 3 + effective(asked, MLP)[Tier.DEVICE] * 2 / 3


@pytest.mark.parametrize("asked,held", [(0.10, 0), (0.20, 1 / 12), (0.30, 5 / 12), (0.50, 0.5), (0.90, 1.0)])
def test_what_is_asked_is_not_what_is_held(asked: float, held: float) -> None:
    assert on_device(asked) == pytest.approx(held)


def test_the_rest_is_on_disk_first() -> None:
    held = effective(Placement(0, 0.5, 0.5), ATTENTION)
    assert held == {Tier.DEVICE: 0, Tier.HOST: 0.5, Tier.DISK: 0.5}


def test_loops() -> None:
    spec, t4 = opt_spec("opt-30b"), published_profile("t4")
    host = Placement(0, 1, 0)
    policy = Policy(weights=host, kv=host, activations=host, device_batch=48, num_device_batches=3)
    usual = FlexGenRun(policy, 512, 32, host_attention=True)
    found = simulate(spec, t4, usual)
    assert found.generated == 144 * 32
    without_overlap = simulate(spec, t4, replace(usual, overlap=False))
    assert without_overlap.prefill_seconds > found.prefill_seconds
    assert without_overlap.decode_seconds > found.decode_seconds
    packed = simulate(spec, t4, replace(usual, packed_kv=True))
    assert packed.decode_seconds > found.decode_seconds  # unpacked by elementwise operations, batch by batch
    single = replace(usual, policy=policy.replace(num_device_batches=1))
    assert simulate(spec, t4, single).throughput < found.throughput
    assert simulate(spec, t4, replace(usual, generated=1)).decode_seconds == 0
