"""How long a pass takes: the steps that the executor walks, simulated on streams that share resources.

What a step wants of each resource is the cost model's; `engine.plan.simulation.events` lets the steps run.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache

from engine.plan.schedule import PREFETCHED, Op, PassShape, schedule
from engine.plan.simulation.cost import CostModel
from engine.plan.simulation.events import DELAY, RESOURCES, Demands, PassTime, Timeline, contention_on
from engine.plan.simulation.linear import Fractions, Share
from engine.plan.simulation.state_cost import Phases
from engine.plan.workload import BatchWork, PassWork
from engine.spec.hardware import Tier
from engine.spec.memory_plan import MemoryPlan
from engine.spec.model import ModelSpec
from engine.spec.policy import Policy, Schedule
from engine.spec.profile import HardwareProfile

_SAMPLED_LAYERS = (3, 7)
"""Layers of the two short passes from which a long one is extrapolated: edges and steady state."""


class Simulator:
    """Passes of one policy on one machine, with the placement that is really achieved."""

    def __init__(self, profile: HardwareProfile, spec: ModelSpec, policy: Policy, plan: MemoryPlan) -> None:
        """Prepare.

        Args:
            plan: the engine's own, which says where every weight and every slot is.
        """
        self._cost = CostModel(
            profile,
            spec,
            policy,
            host_attention=plan.host_attention,
            computes_packed=plan.computes_packed,
            kv_slot=plan.kv_slot,
        )
        self._plan = plan
        self._overlapped = policy.schedule is Schedule.OVERLAPPED
        weights = plan.weights
        self._needed = tuple(
            any(weights[name].brought(stage) for name in names) for stage, names in enumerate(spec.stages)
        )
        self._weights = [
            _shares("weights", ((weights[n].tier, weights[n].tensor.numel) for n in names))
            for names in spec.stages
        ]
        layers = [name for names in spec.stages[1:-1] for name in names]
        self._mean_layer = _shares("weights", ((weights[n].tier, weights[n].tensor.numel) for n in layers))
        self._hidden_moves = any(tier is not Tier.DEVICE for tier in plan.activation_tiers)
        self._speeds = contention_on(profile)

    def time(
        self, work: PassWork, *, first: bool = False, last: bool = False, exact: bool = True
    ) -> PassTime:
        """Simulate one pass.

        Args:
            first: whether no pass before it brought its first weights.
            last: whether none follows whose first weights it brings.
            exact: whether all layers are walked with their own weights' tiers; else a few with the mean
                ones, and the others are extrapolated.
        """
        layers = self._cost.spec.num_layers
        exact = exact or self._cost.spec.has_state  # whose layers are not alike
        if exact or layers <= 2 * _SAMPLED_LAYERS[1]:
            found = self._walk(work, list(range(self._cost.spec.num_stages)), first, last, exact)
        else:
            short, long = (
                self._walk(work, [0, *range(1, count + 1), layers + 1], first, last, exact)
                for count in _SAMPLED_LAYERS
            )
            per_layer = long.plus(short, -1.0)
            found = long.plus(
                per_layer, (layers - _SAMPLED_LAYERS[1]) / (_SAMPLED_LAYERS[1] - _SAMPLED_LAYERS[0])
            )
        found.seconds += self._cost.profile.overheads.per_pass
        return found

    def _walk(self, work: PassWork, stages: list[int], first: bool, last: bool, exact: bool) -> PassTime:
        brought = [self._needed[stage] for stage in stages]
        needed = (*brought[:-1], brought[-1] and (first or not self._plan.head_stays))
        prefetches = self._overlapped and any(needed[:PREFETCHED])
        shape = PassShape(
            len(stages), len(work.batches), needed, self._plan.kv_moves, self._hidden_moves,
            state=self._state_moves(len(stages)),
            preloaded=prefetches and not first, prefetch_next=prefetches and not last,
        )  # fmt: skip
        timeline = _timeline(shape, self._overlapped)
        placed = [self._placed(batch, index) for index, batch in enumerate(work.batches)]
        cache: dict[tuple[object, ...], Demands] = {}
        demands = []
        for step in timeline.steps:
            stage = stages[step.stage % len(stages)]
            weights = self._weights[stage] if exact or stage in (stages[0], stages[-1]) else self._mean_layer
            kind = 0 if stage == 0 else 2 if stage == stages[-1] else 1
            by_stage = step.op in (Op.LOAD_WEIGHTS, Op.COMPUTE)  # all else is the same at every layer
            key = (step.op, (stage if exact else kind) if by_stage else None, step.batch)
            if key not in cache:
                batch = None if step.op is Op.LOAD_WEIGHTS else work.batches[step.batch]
                shares = weights if batch is None else {**placed[step.batch], **weights}
                cache[key] = self._demands(step.op, self._cost.step(step.op, stage, batch), shares)
            demands.append(cache[key])
        per_wait = self._cost.profile.overheads.per_wait
        return timeline.walk(demands, self._speeds, per_wait)

    def _state_moves(self, stages: int) -> tuple[bool, ...]:
        """Per stage whether state is brought; at every layer alike, for costs are means over the layers."""
        return (False, *[True] * (stages - 2), False) if self._plan.state.buffer else ()

    def _demands(self, op: Op, phases: Phases, shares: Fractions) -> Demands:
        found = []
        for phase in phases:
            wanted = {}
            for resource, form in phase.items():
                seconds = form.at(shares)
                if seconds > 0:
                    latency = 0.0 if op is Op.COMPUTE else self._cost.latency(resource)
                    wanted[RESOURCES.index(resource)] = seconds + latency
            if wanted:
                found.append(wanted)
        delay = self._cost.profile.overheads.per_step
        if op is not Op.COMPUTE and delay:
            found.insert(0, {DELAY: delay})
        return found

    def _placed(self, batch: BatchWork, index: int) -> dict[Share, float]:
        """The shares of a device batch's slots."""
        size = self._cost.policy.device_batch
        slots = batch.slots or range(index * size, index * size + batch.sequences)
        tiers = self._plan.state.slot_tiers
        return {
            **_shares("kv", ((self._plan.kv_slot_tiers[slot], 1) for slot in slots)),
            **_shares("state", ((tiers[slot], 1) for slot in slots if tiers)),
            **_shares("activations", ((self._plan.activation_tiers[slot], 1) for slot in slots)),
            **_shares("weights", ()),
        }


@lru_cache(maxsize=8)
def _timeline(shape: PassShape, overlapped: bool) -> Timeline:
    return Timeline(list(schedule(shape, lookahead=1 if overlapped else 0)), one_stream=not overlapped)


def _shares(kind: str, held: Iterable[tuple[Tier, float]]) -> dict[Share, float]:
    """The fractions of what is held where; all on the device where nothing is."""
    total = dict.fromkeys(Tier, 0.0)
    for tier, size in held:
        total[tier] += size
    whole = sum(total.values())
    if not whole:
        total[Tier.DEVICE] = whole = 1.0
    return {Share(kind, tier): size / whole for tier, size in total.items()}
