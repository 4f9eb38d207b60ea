"""From passes to a whole run: prefill, decoding with growing contexts, slots that are refilled."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

from engine.plan.simulation.events import PassTime
from engine.plan.simulation.simulate import Simulator
from engine.plan.workload import PassWork, Workload
from engine.spec.policy import Policy
from engine.spec.rates import Resource


@dataclass(frozen=True)
class RunEstimate:
    """What a run of a workload is predicted to take, without loading."""

    prefill_seconds: float
    """Of the passes in which some sequence computes a prompt."""

    decode_seconds: float
    """Of all others."""

    passes: int
    generated: int
    busy: dict[Resource, float]
    """Seconds of each resource."""

    streams: dict[str, float]
    block_seconds: float
    """From the first pass of a sequence to its last, for the first that take their slots."""

    simulated_passes: int
    """How many were walked; the others lie between them."""

    @property
    def seconds(self) -> float:
        """Of all passes."""
        return self.prefill_seconds + self.decode_seconds

    @property
    def throughput(self) -> float:
        """Generated tokens per second, as in the paper."""
        return self.generated / self.seconds if self.seconds else 0.0

    @property
    def binding(self) -> Resource:
        """The resource that is busy the longest."""
        return max(self.busy, key=lambda resource: self.busy[resource])

    def to_dict(self) -> dict[str, object]:
        """For results."""
        return {
            "kind": "simulated",
            "seconds": self.seconds,
            "prefill_seconds": self.prefill_seconds,
            "decode_seconds": self.decode_seconds,
            "passes": self.passes,
            "generated_tokens": self.generated,
            "generation_throughput": self.throughput,
            "block_seconds": self.block_seconds,
            "binding": self.binding.value,
            "busy": {resource.value: seconds for resource, seconds in self.busy.items() if seconds},
            "streams": self.streams,
        }


def estimate(
    simulator: Simulator, workload: Workload, policy: Policy, *, most: int | None = None, exact: bool = True
) -> RunEstimate:
    """Time a run.

    Args:
        most: maximum of passes of each kind (with prompts and without) that are walked; others are
            interpolated, those with prompts by their tokens. None walks all.
        exact: see `Simulator.time`.
    """
    works = list(workload.passes(policy))
    total = PassTime(0.0)
    parts = {True: 0.0, False: 0.0}
    times: list[float] = [0.0] * len(works)
    walked = 0
    for with_prompts in (True, False):
        indices = [i for i, work in enumerate(works) if work.has_prompts is with_prompts]
        sample = _sample(indices, works, most)
        known: dict[int, PassTime] = {}
        same: dict[PassWork, PassTime] = {}
        for index in sample:
            work, edge = works[index], (index == 0, index == len(works) - 1)
            if any(edge) or work not in same:
                same[work] = simulator.time(work, first=edge[0], last=edge[1], exact=exact)
                walked += 1
            known[index] = same[work]
        for index in indices:
            found = known.get(index) or _between(index, sample, known, works, with_prompts)
            times[index] = found.seconds
            total = total.plus(found)
            parts[with_prompts] += found.seconds
    stay = max((request.generated for request in workload.requests[:1]), default=1)
    return RunEstimate(
        prefill_seconds=parts[True],
        decode_seconds=parts[False],
        passes=len(works),
        generated=workload.generated,
        busy=total.busy,
        streams=total.streams,
        block_seconds=sum(times[: max(stay, 1)]),
        simulated_passes=walked,
    )


def _sample(indices: Sequence[int], works: Sequence[PassWork], most: int | None) -> list[int]:
    """Passes to walk: both ends of the longest stretch of passes that differ in their contexts only, and
    ``most`` of those before or after which something changes, evenly spread."""
    if most is None or len(indices) <= most:
        return list(indices)
    starts = [
        place
        for place, index in enumerate(indices)
        if not place or works[index].composition != works[indices[place - 1]].composition
    ]
    stretches = list(zip(starts, [*starts[1:], len(indices)], strict=True))
    longest = max(stretches, key=lambda ends: ends[1] - ends[0])
    edges = sorted({indices[place] for start, end in stretches for place in (start, end - 1)})
    step = (len(edges) - 1) / max(most - 1, 1)
    spread = {edges[round(i * step)] for i in range(most)}
    return sorted(spread | {indices[longest[0]], indices[longest[1] - 1]})


def _between(
    index: int, sample: Sequence[int], known: dict[int, PassTime], works: Sequence[PassWork], by_tokens: bool
) -> PassTime:
    """A pass between two that were walked, by linear interpolation."""
    place = bisect_left(sample, index)
    low, high = sample[max(place - 1, 0)], sample[min(place, len(sample) - 1)]
    weight = (index - low) / (high - low) if high > low else 0.0

    def scale(other: int) -> float:
        return works[index].new_tokens / works[other].new_tokens if by_tokens else 1.0

    nothing = PassTime(0.0)
    return nothing.plus(known[low], (1 - weight) * scale(low)).plus(known[high], weight * scale(high))
