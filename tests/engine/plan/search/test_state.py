"""The planner places recurrent state: it fits, it costs what links cost, and more memory never hurts."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest

from engine.plan.memory import check_plan
from engine.plan.paper.named import opt_spec
from engine.plan.search.alternatives import alternatives
from engine.plan.search.blocks import Constraints
from engine.plan.search.policy_search import Search, limits_for
from engine.plan.state import StateDraft
from engine.plan.workload import Workload
from engine.spec.hardware import Budgets, Tier
from engine.spec.model import StateTensor
from engine.spec.policy import Policy
from engine.spec.rates import Resource
from engine.units import GIB
from tests.support.profiles import GB, make_profile

PLAIN = opt_spec("opt-1.3b")
KEPT = StateTensor(0, "recurrent", 0, (32, 128, 128), "float32")
RECURRENT = [layer % 4 != 3 for layer in range(PLAIN.num_layers)]
"""Three layers with a state of 2 MiB a sequence, then one that attends, as hybrids have them."""

SPEC = replace(
    PLAIN,
    states=tuple((KEPT,) if one else () for one in RECURRENT),
    kv_widths=tuple((0, 0) if one else PLAIN.kv_widths[0] for one in RECURRENT),
)
COUNT = 64
WORK = Workload.uniform(64, 8, COUNT)


def search(device: int, host: int, unified: bool = False, disk: int = 100 * GIB) -> Search:
    profile = make_profile(unified)
    limits = limits_for(profile, Budgets(None if unified else device, host, disk))
    return Search(profile, SPEC, WORK, limits, Constraints())


@pytest.mark.parametrize("unified", [False, True])
def test_what_is_found_fits_with_its_state(unified: bool) -> None:
    asked = search(3 * GIB, 8 * GIB, unified)
    result = asked.run()
    for found in (result.best, *result.others):
        check_plan(found.memory, asked.limits)
        draft = StateDraft(SPEC, found.policy, unified, COUNT, 0)
        rows = min(COUNT, found.policy.block_size)
        planned = sum(nbytes for _, use, nbytes in draft.uses(found.memory.state) if use == "state")
        assert planned == sum(found.memory.tiers[tier].get("state", 0) for tier in Tier)
        assert planned >= rows * sum(RECURRENT) * KEPT.nbytes
        assert Policy.parse(found.policy.name).state == found.policy.state


def test_other_places_for_state_are_among_the_alternatives() -> None:
    asked = search(3 * GIB, 8 * GIB)
    names = [other.name for other in alternatives(asked, asked.run().best)]
    assert any(name.startswith("recurrent state ") for name in names)


@pytest.mark.parametrize(
    "sizes", [(2 * GIB, 8 * GIB), pytest.param((2 * GIB, 4 * GIB, 8 * GIB), marks=pytest.mark.slow)]
)
def test_more_memory_never_hurts(sizes: tuple[int, ...]) -> None:
    speeds = [search(size, 8 * GIB).run().best.estimate.throughput for size in sizes]
    assert all(less <= more * 1.01 for less, more in pairwise(speeds))


def test_state_on_disk_takes_as_long_as_it_is_read_and_written() -> None:
    asked = search(14 * GIB, 100 * GIB)
    policy = Policy.parse("device_batch=16,num_device_batches=4")
    near, far = (replace(policy, state=Policy.parse(f"state={tier}").state) for tier in ("device", "disk"))
    times = [asked.simulate(one, asked.plan(one), exact=True) for one in (near, far)]
    passes = times[1].passes - 1  # that read what the first has left
    least = passes * COUNT * sum(RECURRENT) * KEPT.nbytes / (2 * GB)
    assert times[1].busy[Resource.DISK_READ] == pytest.approx(least, rel=0.1)
    assert times[1].seconds > times[0].seconds + 0.5 * least


def test_fewer_bits_of_state_take_fewer_bytes_and_less_time() -> None:
    asked = search(14 * GIB, 100 * GIB)
    found = []
    for form in ("float32", "bfloat16", "8"):
        policy = Policy.parse(f"state=disk,state_quant={form},device_batch=16,num_device_batches=4")
        plan = asked.plan(policy)
        found.append((plan.tiers[Tier.DISK]["state"], asked.simulate(policy, plan, exact=True).seconds))
    assert found == sorted(found, reverse=True)
    assert found[2][0] < 0.27 * found[0][0]
