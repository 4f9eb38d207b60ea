"""Simulated passes: small cases with known times, and changes that must never make a pass slower."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.plan.memory import plan_memory
from engine.plan.paper.named import opt_spec
from engine.plan.schedule import Op, Step
from engine.plan.simulation.estimate import RunEstimate, estimate
from engine.plan.simulation.events import Timeline, contention_on
from engine.plan.simulation.simulate import Simulator
from engine.plan.workload import Workload
from engine.spec.hardware import Tier
from engine.spec.policy import HostAttention, Policy, Schedule
from engine.spec.profile import HardwareProfile
from engine.spec.rates import Link, Resource
from tests.support.profiles import make_profile

SPEC = opt_spec("opt-125m")
COMPUTE, READ = (list(Resource).index(resource) for resource in (Resource.COMPUTE, Resource.DISK_READ))


def timed(policy: Policy, profile: HardwareProfile, workload: Workload | None = None) -> RunEstimate:
    workload = workload or Workload.uniform(64, 6, policy.block_size)
    host = policy.host_attention is HostAttention.ON
    plan = plan_memory(SPEC, policy, workload.needs, profile.unified, profile.unified, host)
    return estimate(Simulator(profile, SPEC, policy, plan), workload, policy)


def step(op: Op, stage: int, *after: tuple[Op, int, int]) -> Step:
    return Step(op, stage, 0, 0, after)


def test_lanes_overlap_and_wait() -> None:
    load, compute = Op.LOAD_WEIGHTS, Op.COMPUTE
    steps = [step(load, 1), step(compute, 1, (load, 1, 0)), step(load, 2), step(compute, 2, (load, 2, 0))]
    demands = [[{READ: 2.0}], [{COMPUTE: 3.0}], [{READ: 4.0}], [{COMPUTE: 1.0}]]
    speeds = contention_on(make_profile())
    issued_after_what_computes = Timeline(steps).walk(demands, speeds)
    assert issued_after_what_computes.seconds == pytest.approx(2 + 3 + 4 + 1)
    ahead = [steps[0], steps[2], steps[1], steps[3]]
    found = Timeline(ahead).walk([demands[0], demands[2], demands[1], demands[3]], speeds)
    assert found.seconds == pytest.approx(2 + 4 + 1)
    assert max(found.busy.values()) == found.busy[Resource.DISK_READ] == pytest.approx(6)
    assert found.streams["compute"] == pytest.approx(4)
    assert Timeline(ahead, one_stream=True).walk(demands, speeds).seconds == pytest.approx(10)


def test_computation_that_waited_takes_longer() -> None:
    load, compute = Op.LOAD_WEIGHTS, Op.COMPUTE
    steps = [
        step(load, 1), step(load, 2), step(compute, 1, (load, 1, 0)), step(compute, 2, (load, 2, 0)),
        step(compute, 3),
    ]  # fmt: skip
    demands = [[{READ: 2.0}], [{READ: 4.0}], [{COMPUTE: 3.0}], [{COMPUTE: 1.0}], [{COMPUTE: 1.0}]]
    found = Timeline(steps).walk(demands, contention_on(make_profile()), per_wait=0.25)
    assert found.seconds == pytest.approx(2 + 4 + 1.25 + 1), "of the first two, the second is the last to end"
    assert found.streams["compute"] == pytest.approx(3.25 + 1.25 + 1)


def test_one_resource_is_shared_and_others_slow_each_other() -> None:
    steps = [step(Op.LOAD_WEIGHTS, 1), step(Op.LOAD_KV, 1)]
    both = [[{READ: 2.0}], [{READ: 2.0}]]
    assert Timeline(steps).walk(both, contention_on(make_profile())).seconds == pytest.approx(4)
    slow = make_profile(slowdown={Resource.COMPUTE: {Resource.DISK_READ: 2.0}})
    steps = [step(Op.LOAD_WEIGHTS, 2), step(Op.COMPUTE, 1)]
    demands = [[{READ: 2.0}], [{COMPUTE: 3.0}]]
    half_as_fast_for_two_seconds = Timeline(steps).walk(demands, contention_on(slow))
    assert half_as_fast_for_two_seconds.seconds == pytest.approx(4)


POLICIES = (
    "device_batch=4,num_device_batches=2",
    "weights=0/0.5/0.5,device_batch=4,num_device_batches=2",
    "weights=0.2/0.3/0.5,kv=0.5/0/0.5,activations=host,device_batch=2,num_device_batches=3",
    "weights=host,kv=host,host_attention=on,device_batch=4,num_device_batches=2",
    "weights=disk,kv=disk,activations=disk,weight_quant=4,kv_quant=4,device_batch=4",
    "weights=0/0.5/0.5,schedule=sequential,device_batch=4,num_device_batches=2",
)


@settings(max_examples=15, deadline=None)
@given(st.sampled_from(POLICIES), st.sampled_from(list(Tier)), st.sampled_from(list(Tier)), st.floats(1, 20))
def test_more_bandwidth_never_slows(text: str, source: Tier, target: Tier, factor: float) -> None:
    policy, profile = Policy.parse(text), make_profile()
    links = tuple(
        Link(link.source, link.target, link.bandwidth.scaled(factor))
        if (link.source, link.target) == (source, target)
        else link
        for link in profile.links
    )
    before, after = timed(policy, profile), timed(policy, replace(profile, links=links))
    assert after.seconds <= before.seconds * (1 + 1e-9)


@pytest.mark.parametrize("text", POLICIES)
@pytest.mark.parametrize("unified", [False, True])
def test_overlap_never_loses_and_parts_add_up(text: str, unified: bool) -> None:
    policy, profile = Policy.parse(text), make_profile(unified)
    if unified:
        policy = policy.replace(host_attention=HostAttention.AUTO)
    overlapped = timed(policy.replace(schedule=Schedule.OVERLAPPED), profile)
    sequential = timed(policy.replace(schedule=Schedule.SEQUENTIAL), profile)
    assert overlapped.seconds <= sequential.seconds * (1 + 1e-9)
    for found in (overlapped, sequential):
        assert max(found.busy.values()) <= found.seconds * (1 + 1e-9)
        assert found.seconds == pytest.approx(found.prefill_seconds + found.decode_seconds)
        assert found.passes == 6 and found.generated == 6 * policy.block_size
        assert found.throughput == pytest.approx(found.generated / found.seconds)


def test_passes_that_are_not_walked_lie_between_those_that_are() -> None:
    policy, profile = Policy.parse(POLICIES[2]), make_profile()
    workload = Workload.uniform(48, 20, 14)
    simulator = Simulator(profile, SPEC, policy, plan_memory(SPEC, policy, workload.needs, unified=False))
    whole, some = (estimate(simulator, workload, policy, most=most) for most in (None, 4))
    assert some.simulated_passes < whole.simulated_passes
    assert some.seconds == pytest.approx(whole.seconds, rel=0.05)
    coarse = estimate(simulator, workload, policy, exact=False)
    assert coarse.seconds == pytest.approx(whole.seconds, rel=0.1)


def test_packed_weights_on_disk_read_fewer_bytes() -> None:
    exact, packed = (
        timed(
            Policy.parse(f"weights=disk,device_batch=1,num_device_batches=1,weight_quant={bits}"),
            make_profile(),
        )
        for bits in (16, 4)
    )
    assert packed.busy[Resource.DISK_READ] < 0.6 * exact.busy[Resource.DISK_READ]


def test_packed_weights_need_no_disk() -> None:
    profile = make_profile()
    memory = {**profile.capacity, Tier.DISK: 0}
    links = tuple(link for link in profile.links if Tier.DISK not in (link.source, link.target))
    policy = Policy.parse("weights=host,device_batch=1,num_device_batches=1,weight_quant=4")
    assert timed(policy, replace(profile, capacity=memory, links=links)) == timed(policy, profile)
