"""What a run is predicted to take on a machine, beside what it took: an engine's own plan, simulated.

The harness asks here, as it does not know plans. Nothing is measured in this module.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from engine.engine import Engine
from engine.plan.cost import CostModel
from engine.plan.estimate import RunEstimate, estimate
from engine.plan.simulate import Simulator
from engine.plan.workload import PassWork, Workload
from engine.spec.hardware import Tier
from engine.spec.layout import MemoryPlan
from engine.spec.policy import Policy
from engine.spec.profile import HardwareProfile
from engine.spec.request import Request


@dataclass(frozen=True)
class Prediction:
    """A run before it is made."""

    estimate: RunEstimate
    planned: dict[str, int]
    """Most bytes per tier."""


def simulator_of(engine: Engine, plan: MemoryPlan, profile: HardwareProfile) -> Simulator:
    """Passes of an engine's model and policy, placed as the engine placed them, on a machine."""
    cost = CostModel(
        profile, engine.spec, engine.policy, host_attention=plan.host_attention,
        computes_packed=plan.computes_packed, kv_slot=plan.kv_slot,
    )  # fmt: skip
    return Simulator(cost, plan)


def predict(
    engine: Engine, requests: Sequence[Request], profile: HardwareProfile, most: int | None = None
) -> Prediction:
    """What `Engine.answer` would take for these requests if every answer were as long as it may be.

    Args:
        most: passes of a kind that are simulated at most; None for all.

    Raises:
        RequestError, BudgetError: as `Engine.check`.
    """
    plan = engine.check(requests)
    found = estimate(simulator_of(engine, plan, profile), Workload.of(requests), engine.policy, most=most)
    return Prediction(found, {tier.value: plan.total(tier) for tier in Tier})


def predict_passes(
    engine: Engine, requests: Sequence[Request], profile: HardwareProfile
) -> list[tuple[PassWork, float]]:
    """Every pass of such a run: what it does and the seconds it is predicted to take.

    Raises:
        RequestError, BudgetError: as `Engine.check`.
    """
    simulator = simulator_of(engine, engine.check(requests), profile)
    works = list(works_of(requests, engine.policy))
    return [
        (work, simulator.time(work, first=index == 0, last=index == len(works) - 1).seconds)
        for index, work in enumerate(works)
    ]


def works_of(requests: Sequence[Request], policy: Policy) -> list[PassWork]:
    """What each pass of a run does."""
    return list(Workload.of(requests).passes(policy))
