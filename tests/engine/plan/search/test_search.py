"""The search: its policies fit and meet the constraints, more memory never hurts, the impossible is named."""

from __future__ import annotations

import re

import pytest

from engine.errors import InfeasibleError
from engine.plan.memory import check_plan, plan_memory
from engine.plan.paper.named import opt_spec
from engine.plan.search.alternatives import alternatives
from engine.plan.search.blocks import Compression, Constraints
from engine.plan.search.policy_search import PlanResult, Search, limits_for
from engine.plan.workload import Workload
from engine.spec.hardware import Budgets, Tier
from engine.spec.policy import Policy
from engine.units import GIB, MIB, parse_bytes
from tests.support.profiles import make_profile

SPEC = opt_spec("opt-1.3b")
WORK = Workload.uniform(128, 16, 16)


def search(
    device: int = 2 * GIB, host: int = 8 * GIB, disk: int = 100 * GIB, constraints: Constraints | None = None,
    unified: bool = False,
) -> tuple[Search, PlanResult]:  # fmt: skip
    profile = make_profile(unified)
    budgets = Budgets(None if unified else device, host, disk)
    found = Search(profile, SPEC, WORK, limits_for(profile, budgets), constraints or Constraints())
    return found, found.run()


@pytest.fixture(scope="module")
def usual() -> tuple[Search, PlanResult]:
    return search()


def test_all_that_is_found_fits_and_is_sorted(usual: tuple[Search, PlanResult]) -> None:
    asked, result = usual
    for found in (result.best, *result.others):
        check_plan(found.memory, asked.limits)
        again = asked.plan(Policy.parse(found.policy.name))
        assert {t: again.total(t) for t in Tier} == {t: found.memory.total(t) for t in Tier}
        for placement in (found.policy.weights, found.policy.kv, found.policy.activations):
            assert placement.device + placement.host + placement.disk == pytest.approx(1)
    speeds = [found.estimate.throughput for found in result.others]
    assert result.best.estimate.throughput >= max(speeds) * 0.999
    assert result.programs > 10 and result.enumerated >= result.programs


def test_none_of_the_alternatives_wins(usual: tuple[Search, PlanResult]) -> None:
    asked, result = usual
    others = alternatives(asked, result.best)
    assert any("does not fit: " in other.why for other in others)
    for other in others:
        if other.estimate is not None and "4 bits" not in other.name:
            assert other.share <= 1.02, other.name


def test_more_memory_never_hurts() -> None:
    speeds = [search(device=size)[1].best.estimate.throughput for size in (1 * GIB, 2 * GIB, 4 * GIB)]
    assert speeds[0] <= speeds[1] * 1.01 and speeds[1] <= speeds[2] * 1.01


def test_wishes_hold() -> None:
    _, without_disk = search(constraints=Constraints(disk=False))
    for found in (without_disk.best, *without_disk.others):
        assert not found.policy.weights.disk and not found.policy.kv.disk
        assert not found.memory.total(Tier.DISK)
        assert not found.policy.weight_quant and found.policy.kv_quant is None
    slow = without_disk.best.estimate.block_seconds
    _, quick = search(constraints=Constraints(disk=False, block_seconds=slow * 0.8))
    assert quick.best.estimate.block_seconds <= slow * 0.8
    _, packed = search(constraints=Constraints(Compression.FOUR_BITS, disk=False))
    assert packed.best.estimate.throughput >= without_disk.best.estimate.throughput * 0.99


def test_one_memory() -> None:
    _, result = search(host=2 * GIB, unified=True)
    policy = result.best.policy
    assert policy.weights.disk > 0 and policy.weights.host == 0 and policy.activations.device == 1
    memory = result.best.memory
    assert memory.total(Tier.DEVICE) + memory.total(Tier.HOST) <= 2 * GIB
    assert memory.computes_packed


@pytest.mark.parametrize(
    "budgets,binding",
    [
        ({"host": 700 * MIB, "device": GIB, "disk": 64 * MIB}, "disk"),
        ({"device": 1 * MIB}, "device memory"),
        ({"host": 1 * MIB}, "host memory"),
    ],
)
def test_what_is_infeasible_names_what_binds(budgets: dict[str, int], binding: str) -> None:
    with pytest.raises(InfeasibleError, match="raise it, or allow more compression") as refused:
        search(**budgets)
    assert refused.value.binding == binding
    asked = re.search(r"needs about ([\d.]+ \w+) of", str(refused.value))
    assert asked
    tier = binding.split()[0]
    assert search(**{**budgets, tier: int(1.02 * parse_bytes(asked[1]))}), "what it asks for would do"


def test_loading_alone_may_be_too_much() -> None:
    """The memory of loading is not in the linear program; its refusal names the same tier."""
    with pytest.raises(InfeasibleError, match="of host memory") as refused:
        search(host=200 * MIB)
    assert refused.value.binding == "host memory"


def test_too_little_time_is_named() -> None:
    with pytest.raises(InfeasibleError, match="no policy answers a block within") as refused:
        search(constraints=Constraints(block_seconds=0.001))
    assert refused.value.binding == "latency"


@pytest.mark.parametrize("kind", ["weights", "kv", "activations"])
def test_peak_bytes_are_monotone(kind: str) -> None:
    """A larger fraction in host memory means more peak bytes there and fewer on disk."""
    held = []
    for tenth in range(0, 11, 2):
        policy = Policy.parse(f"{kind}=0/{tenth / 10}/{1 - tenth / 10},device_batch=4,num_device_batches=2")
        plan = plan_memory(SPEC, policy, WORK.needs, False)
        held.append((plan.total(Tier.HOST), plan.total(Tier.DISK)))
    assert [host for host, _ in held] == sorted(host for host, _ in held)
    assert [disk for _, disk in held] == sorted((disk for _, disk in held), reverse=True)


def test_a_policy_as_text_is_read_back() -> None:
    policy = Policy.parse("weights=0.1/0.2/0.7,kv=disk,weight_quant=4,kv_quant=kivi,device_batch=3")
    assert Policy.parse(policy.text).replace(name="same") == policy.replace(name="same")
    assert Policy().text == "resident"
