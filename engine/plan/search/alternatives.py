"""Why a policy's obvious alternatives lose: each changes one thing, and is planned and simulated."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from engine.errors import BudgetError, PolicyError
from engine.plan.memory import check_plan
from engine.plan.search.policy_search import PlannedPolicy, Search
from engine.plan.simulation.estimate import RunEstimate
from engine.plan.simulation.linear import KINDS
from engine.spec.hardware import Tier
from engine.spec.kv_format import KVFormat
from engine.spec.policy import HostAttention, Placement, Policy, Schedule
from engine.spec.weight_formats import WeightFormats
from engine.units import format_bytes

_FOUR_BITS = "4"
_CLOSE = 0.9
"""Fraction of the best throughput above which a coarse simulation cannot tell which is faster."""


@dataclass(frozen=True)
class Alternative:
    """A policy that differs in one thing from the best one."""

    name: str
    policy: Policy
    estimate: RunEstimate | None
    """None where it does not fit."""

    share: float
    """Of the best policy's throughput."""

    why: str


def alternatives(search: Search, best: PlannedPolicy) -> list[Alternative]:
    """The alternatives to a search's best policy."""
    found = []
    coarse, exact = (search.simulate(best.policy, best.memory, exact=exact) for exact in (False, True))
    for name, policy in _changed(search, best.policy):
        memory = search.plan(policy)
        try:
            check_plan(memory, search.limits)
        except BudgetError as error:
            tier = "host memory" if error.tier == Tier.HOST else error.tier
            why = f"does not fit: {format_bytes(error.needed)} of {format_bytes(error.available)} in {tier}"
            found.append(Alternative(name, policy, None, 0.0, why))
            continue
        predicted = search.simulate(policy, memory)  # what is compared is simulated alike
        share = predicted.throughput / coarse.throughput
        if share > _CLOSE:
            predicted = search.simulate(policy, memory, exact=True)
            share = predicted.throughput / exact.throughput
        why = f"{share:.2f} of the throughput; {predicted.binding} is busy longest"
        found.append(Alternative(name, policy, predicted, share, why))
    return found


def _changed(search: Search, best: Policy) -> Iterator[tuple[str, Policy]]:
    unified = search.profile.unified
    places = {Tier.DEVICE: "in memory" if unified else "on the device"}
    if not unified:
        places[Tier.HOST] = "in host memory"
    if search.limits[Tier.DISK]:
        places[Tier.DISK] = "on disk"
    near = Placement.all_in(Tier.DEVICE)
    changes: list[tuple[str, dict[str, object]]] = [
        (f"everything {places[Tier.DEVICE]}", dict.fromkeys(KINDS, near))
    ]
    for tier, place in places.items():
        changes.append((f"weights {place}", {"weights": Placement.all_in(tier)}))
        changes.append((f"KV cache {place}", {"kv": Placement.all_in(tier)}))
        if search.spec.has_state:
            changes.append((f"recurrent state {place}", {"state": Placement.all_in(tier)}))
    if best.num_device_batches > 1:
        changes.append(("one device batch", {"num_device_batches": 1}))
    changes.append(("loads and computation one after the other", {"schedule": Schedule.SEQUENTIAL}))
    if best.host_attention is HostAttention.ON:
        changes.append(("attention on the device alone", {"host_attention": HostAttention.OFF}))
    if best.weight_quant:
        changes.append(("weights uncompressed", {"weight_quant": WeightFormats()}))
    else:
        changes.append(("weights in 4 bits", {"weight_quant": WeightFormats.parse(_FOUR_BITS)}))
    if best.kv_quant:
        changes.append(("KV cache uncompressed", {"kv_quant": None}))
    else:
        changes.append(("KV cache in 4 bits", {"kv_quant": KVFormat.parse(_FOUR_BITS)}))
    for name, change in changes:
        kv = change.get("kv", best.kv)
        if isinstance(kv, Placement) and not kv.host and not unified:
            change = {**change, "host_attention": HostAttention.AUTO}
        try:
            policy = replace(best, **change)  # type: ignore[arg-type]
        except PolicyError:
            continue
        if policy != best:
            yield name, policy
