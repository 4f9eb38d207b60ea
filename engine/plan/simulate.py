"""How long a pass takes: the very steps that the executor walks, over lanes that share resources.

A discrete-event simulation. A lane does its steps in order; a step begins when those it waits for are
finished and the computation before it in the order of issue is, for one thread issues all. Steps that
want one resource at once share it, and some resources slow each other; both are the profile's.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from engine.plan.cost import CostModel, Phases
from engine.plan.linear import Fractions, Share
from engine.plan.schedule import PREFETCHED, Op, PassShape, Step, schedule
from engine.plan.workload import BatchWork, PassWork
from engine.spec.hardware import Tier
from engine.spec.layout import MemoryPlan
from engine.spec.policy import Schedule
from engine.spec.profile import HardwareProfile
from engine.spec.rates import Resource

_RESOURCES = tuple(Resource)
_COMPUTE = _RESOURCES.index(Resource.COMPUTE)
_DELAY = len(_RESOURCES)
"""Stands for time that passes whatever else is busy."""

_SAMPLED_LAYERS = (3, 7)
"""Layers of the two short passes from which a long one is extrapolated: edges and steady state."""

_K = TypeVar("_K")

Demands = list[list[tuple[int, float]]]
"""A step's phases; each a list of (resource, seconds alone)."""


@dataclass
class PassTime:
    """What a simulated pass took."""

    seconds: float
    busy: dict[Resource, float] = field(default_factory=dict)
    """Seconds during which a resource was wanted by some step."""

    lanes: dict[str, float] = field(default_factory=dict)
    """Seconds during which a lane had a step under way."""

    @property
    def binding(self) -> Resource:
        """The resource that was busy the longest."""
        return max(self.busy, key=lambda resource: self.busy[resource])

    def plus(self, other: PassTime, factor: float = 1.0) -> PassTime:
        """The sum with so many of another one."""
        return PassTime(
            self.seconds + factor * other.seconds,
            _plus(self.busy, other.busy, factor),
            _plus(self.lanes, other.lanes, factor),
        )


class Simulator:
    """Passes of one policy on one machine, with the placement that is really achieved."""

    def __init__(self, cost: CostModel, plan: MemoryPlan) -> None:
        """Prepare.

        Args:
            plan: the engine's own, which says where every weight and every seat is.
        """
        self._cost, self._plan = cost, plan
        self._overlapped = cost.policy.schedule is Schedule.OVERLAPPED
        spec, weights = cost.spec, plan.weights
        self._needed = tuple(
            any(weights[name].brought(stage) for name in names) for stage, names in enumerate(spec.stages)
        )
        self._weights = [
            _shares("weights", ((weights[n].tier, weights[n].tensor.numel) for n in names))
            for names in spec.stages
        ]
        layers = [name for names in spec.stages[1:-1] for name in names]
        self._mean_layer = _shares("weights", ((weights[n].tier, weights[n].tensor.numel) for n in layers))
        self._hidden_moves = any(tier is not Tier.DEVICE for tier in plan.activation_seats)
        self._first_slot = 0
        self._speeds = Speeds(cost.profile)

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
        needed = tuple(self._needed[stage] for stage in stages)
        prefetches = self._overlapped and any(needed[:PREFETCHED])
        shape = PassShape(
            len(stages), len(work.batches), needed, self._plan.kv_moves, self._hidden_moves,
            preloaded=prefetches and not first, prefetch_next=prefetches and not last,
        )  # fmt: skip
        steps = list(schedule(shape, lookahead=1 if self._overlapped else 0))
        placed = [self._placed(batch, index) for index, batch in enumerate(work.batches)]
        cache: dict[tuple[object, ...], Demands] = {}
        demands = []
        for step in steps:
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
        return run(steps, demands, self._speeds, one_lane=not self._overlapped, per_wait=per_wait)

    def _demands(self, op: Op, phases: Phases, shares: Fractions) -> Demands:
        found: Demands = []
        for phase in phases:
            wanted = []
            for resource, form in phase.items():
                seconds = form.at(shares)
                if seconds > 0:
                    latency = 0.0 if op is Op.COMPUTE else self._cost.latency(resource)
                    wanted.append((_RESOURCES.index(resource), seconds + latency))
            if wanted:
                found.append(wanted)
        delay = self._cost.profile.overheads.per_step
        if op is not Op.COMPUTE and delay:
            found.insert(0, [(_DELAY, delay)])
        return found

    def _placed(self, batch: BatchWork, index: int) -> dict[Share, float]:
        """The shares of a device batch's seats."""
        size = self._cost.policy.device_batch
        seats = batch.seats or range(index * size, index * size + batch.sequences)
        return {
            **_shares("kv", ((self._plan.kv_seats[seat], 1) for seat in seats)),
            **_shares("activations", ((self._plan.activation_seats[seat], 1) for seat in seats)),
            **_shares("weights", ()),
        }


def run(
    steps: Sequence[Step],
    demands: Sequence[Demands],
    speeds: Speeds,
    one_lane: bool = False,
    per_wait: float = 0.0,
) -> PassTime:
    """Walk steps over their lanes.

    Args:
        demands: of each step.
        one_lane: whether every step waits for the one before it.
        per_wait: seconds by which a computation is longer that begins later than the one before it ended.
    """
    queues: dict[str, list[int]] = {}
    waits: list[list[int]] = []
    index_of: dict[tuple[Op, int, int], int] = {}
    computed = None
    for index, step in enumerate(steps):
        before = [index_of[key] for key in step.after]
        if computed is not None:
            before.append(computed)
        waits.append(before)
        index_of[step.key] = index
        queues.setdefault("all" if one_lane else step.lane, []).append(index)
        if step.op is Op.COMPUTE:
            computed = index
    done = [False] * len(steps)
    at = dict.fromkeys(queues, 0)
    active: dict[str, tuple[int, int, dict[int, float]]] = {}  # lane -> step, phase, seconds left by resource
    now, busy, lanes = 0.0, [0.0] * (_DELAY + 1), dict.fromkeys(queues, 0.0)
    computed_at = 0.0  # waking up after a wait is phase -1 of a computation
    while True:
        begun = True
        while begun:
            begun = False
            for lane, queue in queues.items():
                while lane not in active and at[lane] < len(queue):
                    index = queue[at[lane]]
                    if not all(done[other] for other in waits[index]):
                        break
                    if demands[index]:
                        if per_wait and steps[index].op is Op.COMPUTE and now > computed_at:
                            active[lane] = index, -1, {_COMPUTE: per_wait}
                        else:
                            active[lane] = index, 0, dict(demands[index][0])
                    else:
                        done[index], begun = True, True
                        at[lane] += 1
        if not active:
            break
        counts = [0] * (_DELAY + 1)
        for _, _, left in active.values():
            for resource in left:
                counts[resource] += 1
        speed = speeds.of(tuple(counts))
        span = min(
            seconds / speed[resource] for _, _, left in active.values() for resource, seconds in left.items()
        )
        now += span
        for resource, count in enumerate(counts):
            if count:
                busy[resource] += span
        for lane, (index, phase, left) in list(active.items()):
            lanes[lane] += span
            for resource in list(left):
                rest = left[resource] - span * speed[resource]
                if rest <= 1e-12 * now:
                    del left[resource]
                else:
                    left[resource] = rest
            if left:
                continue
            if phase + 1 < len(demands[index]):
                active[lane] = index, phase + 1, dict(demands[index][phase + 1])
            else:
                del active[lane]
                done[index] = True
                if steps[index].op is Op.COMPUTE:
                    computed_at = now
                at[lane] += 1
    return PassTime(now, dict(zip(_RESOURCES, busy, strict=False)), lanes)


class Speeds:
    """How fast work on each resource goes while others are busy."""

    def __init__(self, profile: HardwareProfile) -> None:
        self._profile = profile
        self._known: dict[tuple[int, ...], list[float]] = {}

    def of(self, counts: tuple[int, ...]) -> list[float]:
        """Per resource, for so many steps that want each."""
        if counts not in self._known:
            speeds = [1.0] * len(counts)
            for mine, resource in enumerate(_RESOURCES):
                if counts[mine]:
                    speeds[mine] = 1 / counts[mine]
                    for theirs, other in enumerate(_RESOURCES):
                        if theirs != mine and counts[theirs]:
                            speeds[mine] /= self._profile.slowed(resource, other)
            self._known[counts] = speeds
        return self._known[counts]


def _shares(kind: str, held: Iterable[tuple[Tier, float]]) -> dict[Share, float]:
    """The fractions of what is held where; all on the device where nothing is."""
    total = dict.fromkeys(Tier, 0.0)
    for tier, size in held:
        total[tier] += size
    whole = sum(total.values())
    if not whole:
        total[Tier.DEVICE] = whole = 1.0
    return {Share(kind, tier): size / whole for tier, size in total.items()}


def _plus(mine: Mapping[_K, float], theirs: Mapping[_K, float], factor: float) -> dict[_K, float]:
    return {key: mine.get(key, 0.0) + factor * theirs.get(key, 0.0) for key in {**mine, **theirs}}
