"""Discrete events: steps that walk over streams, share resources and slow each other.

A stream does its steps in order; a step begins when those it waits for are finished and the computation
before it in the order of issue is, for one thread issues all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, TypeVar

from engine.plan.schedule import Op, Step
from engine.spec.profile import HardwareProfile
from engine.spec.rates import Resource

RESOURCES = tuple(Resource)
DELAY = len(RESOURCES)
"""Stands for time that passes whatever else is busy."""

_COMPUTE = RESOURCES.index(Resource.COMPUTE)

_K = TypeVar("_K")

Demands = Sequence[Mapping[int, float]]
"""A step's phases; each says how many seconds it wants of every resource, if it has it alone."""


@dataclass
class PassTime:
    """What a simulated pass took."""

    seconds: float
    busy: dict[Resource, float] = field(default_factory=dict)
    """Seconds during which a resource was wanted by some step."""

    streams: dict[str, float] = field(default_factory=dict)
    """Seconds during which a stream had a step under way."""

    @property
    def binding(self) -> Resource:
        """The resource that was busy the longest."""
        return max(self.busy, key=lambda resource: self.busy[resource])

    def plus(self, other: PassTime, factor: float = 1.0) -> PassTime:
        """The sum with so many of another one."""
        return PassTime(
            self.seconds + factor * other.seconds,
            _plus(self.busy, other.busy, factor),
            _plus(self.streams, other.streams, factor),
        )


class Pace(NamedTuple):
    """How work goes while certain resources are wanted."""

    speeds: Sequence[float]
    """Of one step's work on each resource, as a part of its speed alone."""

    busy: Sequence[int]
    """The resources that are wanted."""


class Speeds:
    """How fast work on each resource goes while others are busy."""

    def __init__(self, profile: HardwareProfile) -> None:
        self._profile = profile
        self._known: dict[tuple[int, ...], Pace] = {}

    def of(self, wanted: tuple[int, ...]) -> Pace:
        """For steps under way that want these resources; one is named as often as it is wanted."""
        pace = self._known.get(wanted)
        if pace is None:
            pace = self._known[wanted] = self._find(wanted)
        return pace

    def _find(self, wanted: tuple[int, ...]) -> Pace:
        counts = [wanted.count(resource) for resource in range(DELAY + 1)]
        speeds = [1.0] * len(counts)
        for mine, resource in enumerate(RESOURCES):
            if counts[mine]:
                speeds[mine] = 1 / counts[mine]
                for theirs, other in enumerate(RESOURCES):
                    if theirs != mine and counts[theirs]:
                        speeds[mine] /= self._profile.slowed(resource, other)
        return Pace(speeds, sorted(set(wanted)))


@dataclass(slots=True)
class _Active:
    """A step under way on a stream."""

    stream: int
    index: int
    phase: int
    left: Mapping[int, float]
    """Seconds alone that its phase still wants of each resource."""


class Timeline:
    """The steps of a pass on their streams, which can be walked with one set of durations after another."""

    def __init__(self, steps: Sequence[Step], one_stream: bool = False) -> None:
        """Arrange them.

        Args:
            one_stream: whether every step waits for the one before it.
        """
        self.steps = steps
        queues: dict[str, list[int]] = {}
        self._followers: list[list[int]] = [[] for _ in steps]
        self._waits: list[int] = []
        index_of: dict[tuple[Op, int, int], int] = {}
        computed = None
        for index, step in enumerate(steps):
            before = [index_of[key] for key in step.after]
            if computed is not None:
                before.append(computed)
            for other in before:
                self._followers[other].append(index)
            self._waits.append(len(before))
            index_of[step.key] = index
            queues.setdefault("all" if one_stream else step.stream, []).append(index)
            if step.op is Op.COMPUTE:
                computed = index
        self._streams, self._queues = tuple(queues), tuple(queues.values())

    def walk(self, demands: Sequence[Demands], speeds: Speeds, per_wait: float = 0.0) -> PassTime:
        """Simulate.

        Args:
            demands: of each step.
            per_wait: seconds by which a computation is longer that begins later than the one before it ended.
        """
        steps, queues, waits = self.steps, self._queues, list(self._waits)
        at = [0] * len(queues)
        idle = set(range(len(queues)))
        active: list[_Active] = []
        now, computed_at = 0.0, 0.0
        busy, spent = [0.0] * (DELAY + 1), [0.0] * len(queues)

        def finish(stream: int, index: int) -> None:
            at[stream] += 1
            for follower in self._followers[index]:
                waits[follower] -= 1

        def begin() -> None:
            """Start what can start; steps that take no time may let others start."""
            begun = True
            while begun:
                begun = False
                for stream in list(idle):
                    queue = queues[stream]
                    while at[stream] < len(queue) and not waits[index := queue[at[stream]]]:
                        if demands[index]:
                            idle.discard(stream)
                            if per_wait and steps[index].op is Op.COMPUTE and now > computed_at:
                                # waking up after a wait is phase -1 of a computation
                                active.append(_Active(stream, index, -1, {_COMPUTE: per_wait}))
                            else:
                                active.append(_Active(stream, index, 0, demands[index][0]))
                            break
                        finish(stream, index)
                        begun = True

        begin()
        while active:
            pace = speeds.of(tuple([resource for each in active for resource in each.left]))
            speed = pace.speeds
            span = min([left / speed[resource] for each in active for resource, left in each.left.items()])
            now += span
            for resource in pace.busy:
                busy[resource] += span
            nothing = 1e-12 * now
            ended = False
            for each in active:
                spent[each.stream] += span
                each.left = {
                    resource: rest
                    for resource, left in each.left.items()
                    if (rest := left - span * speed[resource]) > nothing
                }
                if each.left:
                    continue
                each.phase += 1
                if each.phase < len(demands[each.index]):
                    each.left = demands[each.index][each.phase]
                    continue
                ended = True
                finish(each.stream, each.index)
                idle.add(each.stream)
                if steps[each.index].op is Op.COMPUTE:
                    computed_at = now
            if ended:
                active = [each for each in active if each.left]
                begin()
        return PassTime(
            now,
            dict(zip(RESOURCES, busy, strict=False)),
            dict(zip(self._streams, spent, strict=True)),
        )


def _plus(mine: Mapping[_K, float], theirs: Mapping[_K, float], factor: float) -> dict[_K, float]:
    return {key: mine.get(key, 0.0) + factor * theirs.get(key, 0.0) for key in {**mine, **theirs}}
