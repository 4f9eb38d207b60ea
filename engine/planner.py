"""The planner's interface: a policy for requests, a machine and budgets, and what it is predicted to do.

The harness asks here, as it does not know plans. Nothing is loaded and nothing measured in this module,
and torch is imported only where a model is not known by name.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.errors import ProfileError
from engine.plan.memory import SequenceNeed
from engine.plan.paper.flexgen_runtime import FlexGenRun, FlexGenTime, simulate
from engine.plan.paper.named import find_profile as find_profile
from engine.plan.paper.named import is_named, named_config, opt_spec
from engine.plan.paper.named import profile_names as profile_names
from engine.plan.search.alternatives import Alternative, alternatives
from engine.plan.search.blocks import Compression, Constraints
from engine.plan.search.policy_search import PlannedPolicy, PlanResult, Search, limits_for
from engine.plan.workload import Workload
from engine.spec.hardware import Budgets, Tier
from engine.spec.model import ModelSpec
from engine.spec.policy import Policy
from engine.spec.profile import HardwareProfile
from engine.spec.request import Request, check_request
from engine.spec.weight_formats import EXACT
from engine.units import MIB

if TYPE_CHECKING:
    from engine.engine import Engine


_MARGIN = 64 * MIB
"""Of free memory without a budget: what a policy is not planned to fill."""


@dataclass(frozen=True)
class Plan:
    """The result of a search, with what it was asked."""

    profile: HardwareProfile
    spec: ModelSpec
    workload: Workload
    result: PlanResult
    alternatives: Sequence[Alternative]

    @property
    def best(self) -> PlannedPolicy:
        """The policy to run."""
        return self.result.best

    def to_dict(self) -> dict[str, Any]:
        """For ``--json`` and manifests: every figure is simulated."""
        return {
            "kind": "simulated",
            "profile": {"name": self.profile.name, "kind": self.profile.kind.value},
            "model": {"path": self.spec.path, "parameters": self.spec.num_parameters},
            "requests": len(self.workload.requests),
            "best": self._entry(self.best),
            "others": [self._entry(found) for found in self.result.others],
            "alternatives": [
                {
                    "name": other.name,
                    "why": other.why,
                    "generation_throughput": other.estimate.throughput if other.estimate else None,
                }
                for other in self.alternatives
            ],
            "linear_programs": self.result.programs,
            "blocks": self.result.enumerated,
        }

    def _entry(self, found: PlannedPolicy) -> dict[str, Any]:
        limits = self.result.limits
        return {
            "policy": found.policy.to_dict(),
            "predicted": found.estimate.to_dict(),
            "memory": {t.value: {"planned": found.memory.total(t), "limit": limits[t]} for t in Tier},
            "binding": {"resource": found.estimate.binding.value, "memory": list(found.tight)},
        }


def make_plan(
    profile: HardwareProfile,
    spec: ModelSpec,
    workload: Workload,
    constraints: Constraints | None = None,
    *,
    computes_packed: bool | None = None,
    explain: bool = True,
) -> Plan:
    """Find the fastest policy.

    Args:
        computes_packed: as `engine.plan.memory.plan_memory`; by default on a CPU only.
        explain: whether the alternatives are simulated, too.

    Raises:
        InfeasibleError: if no policy fits, naming the constraint that leaves none.
    """
    constraints = constraints or Constraints()
    limits = limits_for(profile, constraints.budgets)
    search = Search(profile, spec, workload, limits, constraints, computes_packed)
    result = search.run()
    return Plan(profile, spec, workload, result, alternatives(search, result.best) if explain else ())


def spec_for(model: str, profile: HardwareProfile, trust_remote_code: bool = False) -> ModelSpec:
    """A model as data: by its name where its config ships with the program, else from its folder.

    Raises:
        ModelError: for a model that cannot be used.
    """
    if is_named(model) and not Path(model).exists() and named_config(model)["do_layer_norm_before"]:
        return opt_spec(model, "float32" if profile.unified else "float16")
    from engine.engine import Engine

    with Engine(model, weights="random", device="cpu", trust_remote_code=trust_remote_code) as engine:
        spec = engine.spec
    if profile.unified:
        return spec
    return replace(spec, compute_dtype=spec.dtype if spec.dtype in ("float16", "bfloat16") else "float32")


def own_profile(folder: Path, device: str) -> HardwareProfile | None:
    """The newest profile in a folder that was measured on this machine; None if there is none.

    Raises:
        ProfileError: if a file in the folder is not a profile.
    """
    from engine.profiler import check_machine

    files = sorted(folder.glob("*.json"), key=lambda file: -file.stat().st_mtime) if folder.is_dir() else []
    for file in files:
        profile = HardwareProfile.load(file)
        try:
            check_machine(profile, device)
        except ProfileError:
            continue
        return profile
    return None


def plan_for(
    engine: Engine, requests: Sequence[Request], profile: HardwareProfile, budgets: Budgets, kept: Policy
) -> Plan:
    """Find the policy with which an engine's model answers requests within what is free now.

    Args:
        engine: of any policy; it is asked for its model and its limits only.
        kept: its formats, calibration and part of attention are kept.

    Raises:
        RequestError: if the model cannot take a request.
        InfeasibleError: if no policy fits, naming the constraint that leaves none.
    """
    for index, request in enumerate(requests):
        check_request(index, request, engine.spec)
    kernels = engine.plan_for([SequenceNeed(1, 0)], Policy())
    constraints = Constraints(
        weight_formats=(str(kept.weight_quant),),
        kv_formats=(str(kept.kv_quant or EXACT),),
        budgets=budgets,
        kept=kept,
    )
    free = {tier: min(profile.capacity[tier], engine.limits[tier]) for tier in Tier}
    if budgets.host is None:  # until the policy is run, the program and others may take some more
        free[Tier.HOST] -= min(_MARGIN, free[Tier.HOST] // 10)
    if profile.unified:
        free[Tier.DEVICE] = free[Tier.HOST]
    return make_plan(
        replace(profile, capacity=free), engine.spec, Workload.of(requests, kept), constraints,
        computes_packed=kernels.computes_packed, explain=False,
    )  # fmt: skip


@dataclass(frozen=True)
class PaperCell:
    """FlexGen's own setting on its own runtime, and what the planner finds for the same requests."""

    flexgen: FlexGenTime
    planned: PlannedPolicy | None
    """None where nothing was planned."""


def paper_cell(
    model: str,
    run: FlexGenRun,
    profile: HardwareProfile,
    requests: int = 0,
    most: Compression = Compression.EXACT,
) -> PaperCell:
    """Simulate one of FlexGen's published settings.

    Args:
        requests: for how many of its prompts the planner finds a policy of its own; 0 for none.
        most: how much compression it may use.

    Raises:
        ModelError: if no model is called so.
    """
    spec = opt_spec(model)
    found = None
    if requests:
        workload = Workload.uniform(run.prompt, run.generated, requests)
        found = make_plan(profile, spec, workload, Constraints(most), explain=False).best
    return PaperCell(simulate(spec, profile, run), found)
