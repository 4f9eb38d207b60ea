"""What a run is predicted to take on a machine, beside what it took: an engine's own plan, simulated.

The harness asks here, as it does not know plans. Nothing is measured in this module.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from engine.engine import Engine
from engine.plan.memory import check_plan, plan_memory
from engine.plan.paper.named import config_names, is_named, named_config
from engine.plan.simulation.estimate import RunEstimate, estimate
from engine.plan.simulation.simulate import Simulator
from engine.plan.workload import RequestShape, Workload
from engine.planner import spec_for
from engine.spec.hardware import Tier
from engine.spec.policy import HostAttention, Policy
from engine.spec.profile import HardwareProfile
from engine.spec.request import Request

__all__ = ["Prediction", "config_names", "is_named", "predict", "shipped_model", "simulate_shipped"]


@dataclass(frozen=True)
class Prediction:
    """A run's simulated time and planned memory."""

    estimate: RunEstimate
    planned: dict[str, int]
    """Peak bytes per tier."""


def predict(
    engine: Engine,
    requests: Sequence[Request],
    profile: HardwareProfile,
    most: int | None = None,
    lengths: Sequence[int] | None = None,
) -> Prediction:
    """What `Engine.answer` would take for these requests.

    Args:
        most: maximum of passes of each kind that are simulated; None for all.
        lengths: tokens of each answer; None if every answer has its ``max_new_tokens``.

    Raises:
        RequestError, BudgetError: as `Engine.check`.
    """
    plan = engine.check(requests)
    simulator = Simulator(profile, engine.spec, engine.policy, plan)
    found = estimate(simulator, Workload.of(requests, engine.policy, lengths), engine.policy, most=most)
    return Prediction(found, {tier.value: plan.total(tier) for tier in Tier})


@contextmanager
def shipped_model(name: str, layers: int | None = None) -> Iterator[Path]:
    """A folder with the config of a model that ships as data, without weights, for `Engine` to read.

    Args:
        layers: number of layers, instead of the model's own.

    Raises:
        ModelError: if no model is called so.
    """
    config = named_config(name)
    with tempfile.TemporaryDirectory(prefix="config-") as folder:
        changed = config if layers is None else {**config, "num_hidden_layers": layers}
        (Path(folder) / "config.json").write_text(json.dumps(changed), encoding="utf-8")
        yield Path(folder)


def simulate_shipped(
    name: str,
    policy: Policy,
    requests: Sequence[tuple[int, int]],
    profile: HardwareProfile,
    most: int | None = 8,
) -> Prediction:
    """What a machine that may not be here would take for a model that ships as data.

    Args:
        requests: prompt tokens and generated tokens of each.
        most: as for `predict`.

    Raises:
        ModelError: if no model is called so.
        BudgetError: if the machine cannot hold what the policy asks for.
    """
    spec = spec_for(name, profile)
    workload = Workload([RequestShape(prompt, generated) for prompt, generated in requests])
    on_host = not profile.unified and bool(policy.kv.host) and policy.host_attention is not HostAttention.OFF
    plan = plan_memory(spec, policy, workload.needs, profile.unified, profile.unified, on_host)
    check_plan(plan, profile.capacity)
    found = estimate(Simulator(profile, spec, policy, plan), workload, policy, most=most, exact=False)
    return Prediction(found, {tier.value: plan.total(tier) for tier in Tier})
