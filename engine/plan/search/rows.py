"""The rows of the linear program for one block and its formats: seconds of a pass, bytes of the plan."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from engine.plan.memory import LOADING, SequenceNeed
from engine.plan.schedule import Op
from engine.plan.simulation.cost import CostModel
from engine.plan.simulation.linear import KINDS, LinearForm, Share
from engine.plan.workload import BatchWork, Workload
from engine.spec.hardware import Tier
from engine.spec.memory_plan import MemoryPlan
from engine.spec.model import ModelSpec
from engine.spec.policy import HostAttention, Placement, Policy
from engine.spec.rates import Resource


@dataclass(frozen=True)
class Typical:
    """The mean request of a workload."""

    prompt: float
    generated: float
    scored: float
    count: int
    longest: SequenceNeed

    @classmethod
    def of(cls, workload: Workload) -> Typical:
        """Means over all requests."""
        requests, count = workload.requests, len(workload.requests)
        return cls(
            sum(request.need.computed for request in requests) / count,
            workload.generated / count,
            sum(request.scored for request in requests) / count,
            count,
            SequenceNeed(max(n.computed for n in workload.needs), max(n.cached for n in workload.needs)),
        )


def works(typical: Typical, policy: Policy) -> list[tuple[BatchWork, float]]:
    """A device batch with prompts and one that decodes, and how many passes of each one block takes."""
    sequences = policy.device_batch
    prompt, generated = typical.prompt, typical.generated
    together = max(1, min(sequences, int(policy.max_batch_tokens // max(prompt, 1))))
    prefills = math.ceil(sequences / together)
    kept = generated > 1
    tokens = round(together * prompt)
    first = BatchWork(
        sequences=together,
        new_tokens=tokens,
        prompts=together,
        prompt_pairs=together * prompt * (prompt + 1) / 2,
        prompt_tokens=tokens,
        kv_new=tokens if kept else 0,
        head_rows=round(together * ((generated > 0) + typical.scored)),
        kept=together if kept else 0,
    )
    context = prompt + generated / 2
    later = BatchWork(
        sequences=sequences,
        new_tokens=sequences,
        decodes=sequences,
        context=sequences * context,
        kv_past=sequences * (context - 1),
        kv_new=sequences,
        head_rows=sequences,
        kept=sequences,
    )
    return [(first, prefills), (later, generated - 1)] if generated > 1 else [(first, prefills)]


def pass_rows(cost: CostModel, work: BatchWork, batches: int) -> list[LinearForm]:
    """Lower bounds of a pass of ``batches`` such device batches, seconds: one per resource or chain."""
    on: dict[Resource, LinearForm] = {}
    host_chain = LinearForm()
    for op, stage, count in _steps(cost, batches):
        for index, phase in enumerate(cost.step(op, stage, work)):
            for resource, form in phase.items():
                on[resource] = on.get(resource, LinearForm()) + form * count
            if op is Op.COMPUTE:
                resource = Resource.HOST if index and Resource.HOST in phase else Resource.COMPUTE
                host_chain = host_chain + phase.get(resource, LinearForm()) * count
    always = LinearForm(cost.profile.overheads.per_pass)
    return [form + always for form in (*on.values(), host_chain) if form]


def _steps(cost: CostModel, batches: int) -> Iterator[tuple[Op, int, int]]:
    """Kinds of steps of a pass and how often each comes."""
    for stage, count in Counter(cost.equivalents).items():
        if not (cost.head_stays and stage == cost.spec.num_stages - 1):
            yield Op.LOAD_WEIGHTS, stage, count
        yield Op.COMPUTE, stage, count * batches
        if 0 < stage < cost.spec.num_stages - 1:
            for op in _AROUND:
                yield op, stage, count * batches


_AROUND = (
    Op.LOAD_KV, Op.STORE_KV, Op.LOAD_STATE, Op.STORE_STATE, Op.LOAD_HIDDEN, Op.STORE_HIDDEN,
)  # fmt: skip


def memory_rows(
    plan: Callable[[ModelSpec, Policy, bool], MemoryPlan],
    spec: ModelSpec,
    short: tuple[ModelSpec, ModelSpec],
    policy: Policy,
    host_attention: bool,
    unified: bool,
) -> list[tuple[str, LinearForm, Tier]]:
    """(name, bytes, tier whose limit holds), from the engine's own plan at the corners of the fractions.

    Between corners buffers can be smaller than a mix of those at the corners, and what loading takes only
    counts beyond what is taken later; so the policy that is found is planned itself afterwards.

    Args:
        plan: the engine's plan for the requests, of a model under a policy that attends on the host or not.
        short: the same model with one layer and with two, from which the others are counted; the whole one
            twice where its layers are not alike.
    """
    placements = {kind: Placement(1, 0, 0) for kind in KINDS}

    def bytes_with(kind: str | None = None, tier: Tier = Tier.DEVICE) -> dict[Tier, float]:
        changed = {**placements, **({kind: Placement.all_in(tier)} if kind else {})}
        at_host = host_attention and kind == "kv" and tier is Tier.HOST
        corner = replace(policy, host_attention=HostAttention.AUTO, **changed)  # type: ignore[arg-type]
        plans = [plan(few, corner, at_host) for few in short]
        more = spec.num_layers - short[0].num_layers
        one, two = ({t: held.total(t) - held.tiers[t].get(LOADING, 0) for t in Tier} for held in plans)
        return {t: one[t] + more * (two[t] - one[t]) for t in Tier}

    base = bytes_with()
    forms = {tier: LinearForm(base[tier]) for tier in Tier}
    for kind in (kind for kind in KINDS if kind != "state" or spec.has_state):
        for where in (Tier.HOST, Tier.DISK):
            found = bytes_with(kind, where)
            for tier in Tier:
                forms[tier] = forms[tier] + LinearForm(0.0, {Share(kind, where): found[tier] - base[tier]})
    if unified:
        rows = [("host memory", forms[Tier.DEVICE] + forms[Tier.HOST], Tier.HOST)]
    else:
        rows = [(f"{tier.value} memory", forms[tier], tier) for tier in (Tier.DEVICE, Tier.HOST)]
    return [*rows, ("disk", forms[Tier.DISK], Tier.DISK)]


def shortened(spec: ModelSpec, layers: int) -> ModelSpec:
    """The same model with only its first ``layers`` layers."""
    if layers >= spec.num_layers:
        return spec
    stages = (*spec.stages[: layers + 1], spec.stages[-1])
    names = dict.fromkeys(name for stage in stages for name in stage)
    return replace(
        spec,
        num_layers=layers,
        kv_widths=spec.kv_widths[:layers],
        states=spec.states[:layers],
        stages=stages,
        tensors={name: tensor for name, tensor in spec.tensors.items() if name in names},
    )
