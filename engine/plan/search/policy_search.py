"""Finds a policy: blocks and formats are enumerated, and fractions come from the linear program.

What the program finds is rounded to achievable placements, checked by the engine's own memory plan, and
simulated.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any, NamedTuple

from engine.errors import BudgetError, InfeasibleError
from engine.plan.memory import check_plan, limits_of, plan_memory
from engine.plan.placement import place_slots
from engine.plan.search.blocks import (
    BATCHES,
    FORMATS,
    LARGEST_BATCH,
    Candidate,
    Constraints,
    Point,
    Space,
    device_batches,
)
from engine.plan.search.infeasible import too_small
from engine.plan.search.lp import Program, Solution, solve
from engine.plan.search.rows import Typical, memory_rows, pass_rows, shortened, works
from engine.plan.simulation.cost import CostModel
from engine.plan.simulation.estimate import RunEstimate, estimate
from engine.plan.simulation.linear import KINDS, Fractions, LinearForm, Share
from engine.plan.simulation.simulate import Simulator
from engine.plan.workload import Workload
from engine.spec.hardware import Budgets, Tier
from engine.spec.memory_plan import MemoryPlan
from engine.spec.model import ModelSpec
from engine.spec.policy import HostAttention, Placement, Policy
from engine.spec.profile import HardwareProfile

_STRIDE = 2
_BEAM = 3
"""Every `_STRIDE`-th block is tried, then the neighbours of the `_BEAM` best of each choice of formats."""

_MOST_PROGRAMS = 240
_SIMULATED, _SIMULATED_OF_EACH = 10, 3
"""How many of the best linear programs are simulated: of all, and at least of each choice of formats and of
where decoding attends, which the programs tell apart less well."""

_EXACT = 3
"""How many of the best are simulated again, layer by layer."""

_HOPELESS = 0.9
"""A policy below this fraction of the best throughput, simulated by a few layers, is not simulated by all."""

_DIGITS = 3
_REPAIRS = 8


@dataclass(frozen=True)
class PlannedPolicy:
    """One policy that fits, and what it is predicted to do."""

    policy: Policy
    memory: MemoryPlan
    estimate: RunEstimate
    tight: tuple[str, ...] = ()
    """Names of the memory that the linear program used up."""


@dataclass
class PlanResult:
    """What a search found."""

    best: PlannedPolicy
    others: list[PlannedPolicy]
    """The next best, best first."""

    programs: int
    """Linear programs that were solved."""

    enumerated: int
    limits: Mapping[Tier, int]


class _Solved(NamedTuple):
    """A block and its linear program's solution."""

    seconds: float
    """Of one sequence."""

    point: Point
    candidate: Candidate
    solution: Solution


_Fitting = tuple[Policy, MemoryPlan, tuple[str, ...]]


@dataclass
class Search:
    """A search for the fastest policy within limits and constraints."""

    profile: HardwareProfile
    spec: ModelSpec
    workload: Workload
    limits: Mapping[Tier, int]
    constraints: Constraints = field(default_factory=Constraints)
    computes_packed: bool | None = None
    """Whether products are computed straight from packed weights; None for on a CPU only."""

    _rows: dict[tuple[Policy, bool], list[tuple[str, LinearForm, Tier]]] = field(
        default_factory=dict, repr=False
    )
    """Of the linear programs, by block and formats; copies that differ in their limits share them."""

    def run(self) -> PlanResult:
        """Search.

        Raises:
            InfeasibleError: if no policy fits, naming the constraint that leaves none.
        """
        spaces = self._spaces()
        solved, programs = self._solve_blocks(spaces)
        ranked = self._simulate_best(solved)
        if not ranked:
            raise self._infeasible()
        ranked[:_EXACT] = [
            replace(found, estimate=self.simulate(found.policy, found.memory, exact=True))
            for found in ranked[:_EXACT]
        ]
        ranked.sort(key=lambda found: -found.estimate.throughput)
        if (better := self._local_search(ranked[0])) is not ranked[0]:
            ranked.insert(0, better)
        enumerated = sum(space.count for space in spaces)
        return PlanResult(ranked[0], ranked[1:11], programs, enumerated, self.limits)

    def _solve_blocks(self, spaces: Sequence[Space]) -> tuple[list[_Solved], int]:
        """The blocks that have a solution, the fastest first, and how many linear programs were solved."""
        points: list[Point] = [
            (number, size, batches, 0)
            for number, space in enumerate(spaces)
            for size in range(0, len(space.sizes), _STRIDE)
            for batches in range(1, len(BATCHES), _STRIDE)
            if space.holds(size, batches, 0)
        ]
        points += [(number, 0, 0, 0) for number in range(len(spaces))]
        known: dict[Point, _Solved | None] = {}
        expanded: set[Point] = set()
        while points:
            for point in points:
                if point not in known and len(known) < _MOST_PROGRAMS:
                    known[point] = self._solve_block(point, spaces[point[0]].candidate(*point[1:]))
            best = _first(_ranked(known.values()), 0, _BEAM)
            points = []
            for block in best:
                if block.point not in expanded:
                    expanded.add(block.point)
                    points += spaces[block.point[0]].around(block.point)
        return _ranked(known.values()), len(known)

    def _solve_block(self, point: Point, candidate: Candidate) -> _Solved | None:
        linear = self._program(candidate)
        solution = None if linear.too_large() else solve(linear)
        if solution is None:
            return None
        return _Solved(solution.seconds / candidate.policy.block_size, point, candidate, solution)

    def _simulate_best(self, solved: Sequence[_Solved]) -> list[PlannedPolicy]:
        """The policies of the best blocks that fit, the fastest first; of others if none of those does."""
        found: dict[str, PlannedPolicy] = {}
        first = _first(solved, _SIMULATED, _SIMULATED_OF_EACH)
        for rank, block in enumerate(first + [block for block in solved if block not in first]):
            if found and rank >= len(first):
                break
            fitting = self._fit(block.candidate, block.solution)
            if fitting is None or fitting[0].name in found:
                continue
            policy, memory, tight = fitting
            predicted = self.simulate(policy, memory, exact=self.constraints.block_seconds is not None)
            if self._is_quick(predicted):
                found[policy.name] = PlannedPolicy(policy, memory, predicted, tight)
        return sorted(found.values(), key=lambda one: -one.estimate.throughput)

    @cached_property
    def typical(self) -> Typical:
        """Means over the workload."""
        return Typical.of(self.workload)

    @cached_property
    def _pinned(self) -> dict[Share, float]:
        """Fractions that are fixed, as device and host are one memory or the disk is not to be used."""
        pinned: dict[Share, float] = {}
        if self.profile.unified:
            pinned = {Share(kind, Tier.HOST): 0.0 for kind in KINDS[:3]}
            pinned[Share("activations", Tier.DEVICE)] = 1.0
        if not self.constraints.disk or not self.limits[Tier.DISK]:
            pinned.update({Share(kind, Tier.DISK): 0.0 for kind in KINDS})
        return pinned

    @property
    def _packed(self) -> bool:
        return self.profile.unified if self.computes_packed is None else self.computes_packed

    def plan(self, policy: Policy) -> MemoryPlan:
        """The engine's own plan of a policy that the planner wrote for this workload."""
        on_host = policy.host_attention is HostAttention.ON and policy.kv.host > 0
        return self._plan(self.spec, policy, on_host and not self.profile.unified)

    def _plan(self, spec: ModelSpec, policy: Policy, host_attention: bool) -> MemoryPlan:
        prefixes = self.workload.arrangement.most_alive(policy.block_size)
        needs, unified = self.workload.needs, self.profile.unified
        return plan_memory(spec, policy, needs, unified, self._packed, host_attention, prefixes)

    def simulate(self, policy: Policy, memory: MemoryPlan, exact: bool = False) -> RunEstimate:
        """Time the workload under a policy that fits."""
        simulator = Simulator(self.profile, self.spec, policy, memory)
        return estimate(simulator, self._walked, policy, most=9 if exact else 3, exact=exact)

    def _is_quick(self, predicted: RunEstimate) -> bool:
        most = self.constraints.block_seconds
        return most is None or predicted.block_seconds <= most

    def _local_search(self, best: PlannedPolicy) -> PlannedPolicy:
        """Move a whole kind of tensor to one tier as long as that is faster.

        The rows of the linear program do not know in which order streams wait.
        """
        kinds = KINDS[:3] if self.spec.has_state else KINDS[:2]
        allowed = [
            (kind, tier) for kind in kinds for tier in Tier if self._pinned.get(Share(kind, tier)) != 0.0
        ]
        for kind, tier in allowed:
            moved: dict[str, Any] = {kind: Placement.all_in(tier), "host_attention": HostAttention.AUTO}
            policy = replace(best.policy, **moved)
            if policy.kv.host and not self.profile.unified:
                kept = best.policy.host_attention
                policy = replace(policy, host_attention=kept if best.policy.kv.host else HostAttention.OFF)
            policy = replace(policy, name=policy.text)
            memory = self.plan(policy)
            try:
                check_plan(memory, self.limits)
            except BudgetError:
                continue
            if self.simulate(policy, memory).throughput < _HOPELESS * best.estimate.throughput:
                continue
            predicted = self.simulate(policy, memory, exact=True)
            if predicted.throughput > best.estimate.throughput and self._is_quick(predicted):
                best = PlannedPolicy(policy, memory, predicted)
        return best

    @cached_property
    def _walked(self) -> Workload:
        """The workload, or every n-th of its requests where it is very large."""
        stride = 1 + self.workload.generated // 400_000
        if stride == 1:
            return self.workload
        return Workload(
            [shape for i, shape in enumerate(self.workload.requests) if shape.segment or not i % stride]
        )

    def _spaces(self) -> list[Space]:
        """All blocks, by formats of weights and KV cache and by whether decoding attends on the host."""
        asked, count = self.constraints, self.typical.count
        hosts = [False]
        if not self.profile.unified and self.profile.attention.decode_host and self.typical.generated > 1:
            hosts.append(True)
        sizes = sorted({*device_batches(min(count, LARGEST_BATCH)), min(count, 48)})
        found = []
        usual = FORMATS[asked.accuracy]
        formats = asked.weight_formats or usual, asked.kv_formats or usual
        for weights, kv, on_host in itertools.product(*formats, hosts):
            kept = Policy.from_mapping({"weight_quant": weights, "kv_quant": kv}, asked.kept)
            cost = CostModel(
                self.profile, self.spec, kept, host_attention=on_host, computes_packed=self._packed
            )
            found.append(Space(cost, sizes, self.typical))
        return found

    @cached_property
    def _short(self) -> tuple[ModelSpec, ModelSpec]:
        if self.spec.has_state:
            return self.spec, self.spec
        return shortened(self.spec, 1), shortened(self.spec, 2)

    def _program(self, candidate: Candidate, limits: Mapping[Tier, float] | None = None) -> Program:
        """The linear program of one block and its formats; seconds are those of one block."""
        policy, cost = candidate.policy, candidate.cost
        key = policy, cost.host_attention
        if key not in self._rows:
            self._rows[key] = memory_rows(self._plan, self.spec, self._short, *key, self.profile.unified)
        batches = policy.num_device_batches
        return Program(
            [(pass_rows(cost, work, batches), count) for work, count in works(self.typical, policy)],
            [(name, form, (limits or self.limits)[tier]) for name, form, tier in self._rows[key]],
            self.constraints.block_seconds,
            self._pinned,
        )

    def _fit(self, candidate: Candidate, solution: Solution) -> _Fitting | None:
        """Round a solution; where the engine's own plan exceeds a limit, solve again for a little less.

        Returns None if that does not help.
        """
        limits: dict[Tier, float] = dict(self.limits)
        for _ in range(_REPAIRS):
            policy = self._rounded(candidate, solution.fractions)
            memory = self.plan(policy)
            try:
                check_plan(memory, self.limits)
                return policy, memory, solution.tight
            except BudgetError as error:
                tier = Tier(error.tier)
                limits[tier] -= 1.05 * (error.needed - error.available) + 1e-3 * self.limits[tier]
            found = solve(self._program(candidate, limits)) if limits[tier] > 0 else None
            if found is None:
                break
            solution = found
        return None

    def _rounded(self, candidate: Candidate, fractions: Fractions) -> Policy:
        placed = {kind: _round([fractions[Share(kind, tier)] for tier in Tier]) for kind in KINDS}
        for kind in KINDS[1:]:  # shares of less than a slot are nothing
            slots = set(place_slots(candidate.policy, placed[kind]))
            placed[kind] = _round([placed[kind].of(tier) if tier in slots else 0.0 for tier in Tier])
        attention = HostAttention.AUTO
        if not self.profile.unified and placed["kv"].host:
            attention = HostAttention.ON if candidate.cost.host_attention else HostAttention.OFF
        policy = replace(candidate.policy, host_attention=attention, **placed)  # type: ignore[arg-type]
        return replace(policy, name=policy.text)

    def _infeasible(self) -> InfeasibleError:
        """Name the one constraint without which something would fit."""
        candidates = [space.candidate(0, 0, 0) for space in self._spaces()]
        most_packed = max(map(_packs, candidates))
        smallest = [candidate for candidate in candidates if _packs(candidate) == most_packed]
        if self.constraints.block_seconds is not None and solve(
            replace(self._program(smallest[0]), most_seconds=None)
        ):
            return InfeasibleError(
                "latency",
                f"no policy answers a block within {self.constraints.block_seconds:g} s "
                f"on {self.profile.name}: allow more seconds, or more compression",
            )
        return too_small(self.limits, self.profile.unified, self.spec.path, partial(self._fits, smallest))

    def _fits(self, candidates: Sequence[Candidate], tier: Tier, most: int) -> bool:
        """Whether one of these blocks would fit if a tier had ``most`` bytes."""
        other = replace(self, limits={**self.limits, tier: most})
        found = ((candidate, solve(other._program(candidate))) for candidate in candidates)
        return any(solution and other._fit(candidate, solution) for candidate, solution in found)


def _ranked(blocks: Iterable[_Solved | None]) -> list[_Solved]:
    """Those with a solution, the fastest first."""
    return sorted((block for block in blocks if block), key=lambda block: block[:2])


def _first(ranking: Sequence[_Solved], most: int, of_each: int) -> list[_Solved]:
    """The first ``most``, and at least the first ``of_each`` of each choice of formats."""
    chosen = list(ranking[:most])
    seen = Counter(block.point[0] for block in chosen)
    for block in ranking[most:]:
        if seen[block.point[0]] < of_each:
            seen[block.point[0]] += 1
            chosen.append(block)
    return chosen


def limits_for(profile: HardwareProfile, budgets: Budgets) -> dict[Tier, int]:
    """Bytes that each tier may hold: its capacity, or a smaller budget."""
    asked = limits_of(budgets, profile.capacity)
    limits = {tier: min(asked[tier], profile.capacity[tier]) for tier in Tier}
    if profile.unified:
        limits[Tier.DEVICE] = limits[Tier.HOST]
    return limits


def _round(values: Sequence[float]) -> Placement:
    """Fractions of few digits that sum to 1; what rounding leaves goes to the largest."""
    rounded = [round(value, _DIGITS) for value in values]
    largest = max(range(3), key=lambda index: rounded[index])
    rounded[largest] = round(rounded[largest] + 1 - sum(rounded), _DIGITS)
    return Placement(*rounded)


def _packs(candidate: Candidate) -> int:
    return bool(candidate.policy.weight_quant) + (candidate.policy.kv_quant is not None)
