"""A discrete-event simulation of steps on streams that share resources and slow each other.

A stream does its steps in order; a step begins when those it waits for are finished and the computation
before it in the order of issue is, for one thread issues all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
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

    def plus(self, other: PassTime, factor: float = 1.0) -> PassTime:
        """The sum with another one, taken ``factor`` times."""
        return PassTime(
            self.seconds + factor * other.seconds,
            _plus(self.busy, other.busy, factor),
            _plus(self.streams, other.streams, factor),
        )


class Contention(NamedTuple):
    """How work goes while certain resources are wanted."""

    speeds: Sequence[float]
    """Of one step's work on each resource, as a fraction of its speed alone."""

    busy: Sequence[int]
    """The resources that are wanted."""


Speeds = Callable[[tuple[int, ...]], Contention]
"""How fast work goes for steps under way that want these resources, each listed as often as it is wanted."""


def contention_on(profile: HardwareProfile) -> Speeds:
    """How fast work on each resource of a machine goes while others are busy."""

    @cache
    def speeds(wanted: tuple[int, ...]) -> Contention:
        counts = [wanted.count(resource) for resource in range(DELAY + 1)]
        speeds = [1.0] * len(counts)
        for mine, resource in enumerate(RESOURCES):
            if counts[mine]:
                speeds[mine] = 1 / counts[mine]
                for theirs, other in enumerate(RESOURCES):
                    if theirs != mine and counts[theirs]:
                        speeds[mine] /= profile.slowed(resource, other)
        return Contention(speeds, sorted(set(wanted)))

    return speeds


@dataclass(slots=True)
class _Active:
    """A step under way on a stream."""

    stream: int
    index: int
    phase: int
    left: Mapping[int, float]
    """Seconds alone that its phase still wants of each resource."""


class Timeline:
    """The steps of a pass on their streams, which can be walked with one set of durations after another.

    Attributes:
        streams: their names.
        queues: per stream the indices of its steps, in order.
        waits: per step how many others have to be finished before it begins.
        followers: per step the indices of those that wait for it.
    """

    def __init__(self, steps: Sequence[Step], one_stream: bool = False) -> None:
        """Arrange the steps on their streams.

        Args:
            steps: in the order in which they are issued.
            one_stream: whether every step waits for the one before it.
        """
        self.steps = steps
        queues: dict[str, list[int]] = {}
        self.followers: list[list[int]] = [[] for _ in steps]
        self.waits: list[int] = []
        index_of: dict[tuple[Op, int, int], int] = {}
        computed = None
        for index, step in enumerate(steps):
            before = [index_of[key] for key in step.after]
            if computed is not None:
                before.append(computed)
            for other in before:
                self.followers[other].append(index)
            self.waits.append(len(before))
            index_of[step.key] = index
            queues.setdefault("all" if one_stream else step.stream, []).append(index)
            if step.op is Op.COMPUTE:
                computed = index
        self.streams, self.queues = tuple(queues), tuple(queues.values())

    def walk(self, demands: Sequence[Demands], speeds: Speeds, per_wait: float = 0.0) -> PassTime:
        """Simulate one pass.

        Args:
            demands: of each step.
            speeds: how steps slow each other.
            per_wait: seconds by which a computation is longer that begins later than the one before it ended.
        """
        walk = _Walk(self, demands, per_wait)
        walk.begin()
        while walk.active:
            walk.advance(speeds)
        busy = dict(zip(RESOURCES, walk.busy, strict=False))
        return PassTime(walk.now, busy, dict(zip(self.streams, walk.spent, strict=True)))


class _Walk:
    """One simulation of a timeline: the steps under way, and what they still want."""

    def __init__(self, timeline: Timeline, demands: Sequence[Demands], per_wait: float) -> None:
        self._timeline, self._demands, self._per_wait = timeline, demands, per_wait
        self._waits = list(timeline.waits)
        self._at = [0] * len(timeline.queues)
        """Per stream the place in its queue."""

        self._idle = set(range(len(timeline.queues)))
        self._computed_at = 0.0
        self.active: list[_Active] = []
        self.now = 0.0
        self.busy, self.spent = [0.0] * (DELAY + 1), [0.0] * len(timeline.queues)

    def begin(self) -> None:
        """Start what can start; steps that take no time may let others start."""
        begun = True
        while begun:
            begun = False
            for stream in list(self._idle):
                queue = self._timeline.queues[stream]
                while self._at[stream] < len(queue) and not self._waits[index := queue[self._at[stream]]]:
                    if self._demands[index]:
                        self._idle.discard(stream)
                        self.active.append(self._started(stream, index))
                        break
                    self._finish(stream, index)
                    begun = True

    def advance(self, speeds: Speeds) -> None:
        """Let time pass until a step is done with all that its phase wants of some resource."""
        contention = speeds(tuple([resource for each in self.active for resource in each.left]))
        speed = contention.speeds
        spans = [left / speed[resource] for each in self.active for resource, left in each.left.items()]
        span = min(spans)
        self.now += span
        for resource in contention.busy:
            self.busy[resource] += span
        nothing = 1e-12 * self.now
        ended = False
        for each in self.active:
            self.spent[each.stream] += span
            each.left = {
                resource: rest
                for resource, left in each.left.items()
                if (rest := left - span * speed[resource]) > nothing
            }
            if each.left:
                continue
            each.phase += 1
            if each.phase < len(self._demands[each.index]):
                each.left = self._demands[each.index][each.phase]
                continue
            ended = True
            self._finish(each.stream, each.index)
            self._idle.add(each.stream)
            if self._timeline.steps[each.index].op is Op.COMPUTE:
                self._computed_at = self.now
        if ended:
            self.active = [each for each in self.active if each.left]
            self.begin()

    def _started(self, stream: int, index: int) -> _Active:
        """A step's first phase; of a computation that had to wait, waking up comes before it, as phase -1."""
        computes = self._timeline.steps[index].op is Op.COMPUTE
        if self._per_wait and computes and self.now > self._computed_at:
            return _Active(stream, index, -1, {_COMPUTE: self._per_wait})
        return _Active(stream, index, 0, self._demands[index][0])

    def _finish(self, stream: int, index: int) -> None:
        self._at[stream] += 1
        for follower in self._timeline.followers[index]:
            self._waits[follower] -= 1


def _plus(mine: Mapping[_K, float], theirs: Mapping[_K, float], factor: float) -> dict[_K, float]:
    return {key: mine.get(key, 0.0) + factor * theirs.get(key, 0.0) for key in {**mine, **theirs}}
