"""What a result says about how its figures came about, computed from a plan and from counts."""

from __future__ import annotations

from collections.abc import Mapping

from engine.memory.storage import ByteLedger
from engine.plan.placement import achieved
from engine.spec.hardware import Budgets, Tier
from engine.spec.kv_layout import kv_bytes
from engine.spec.memory_plan import MemoryPlan
from engine.spec.model import ModelSpec
from engine.spec.policy import Policy
from engine.spec.record import ModelRecord, SavingsRecord, StoredRecord, TierRecord, TotalsRecord


def model_of(spec: ModelSpec) -> ModelRecord:
    """The model, for the record of a run."""
    return ModelRecord(
        spec.path, spec.architecture, spec.digest, spec.weights, spec.num_parameters, spec.dtype,
        spec.compute_dtype, dict(spec.left_out),
    )  # fmt: skip


def memory_of(plan: MemoryPlan | None, budgets: Budgets, ledger: ByteLedger) -> dict[str, TierRecord]:
    """Budget, planned bytes and peak of every tier."""
    return {
        tier.value: TierRecord(budgets.of(tier), plan.total(tier) if plan else 0, ledger.peak[tier])
        for tier in Tier
    }


def placement_of(
    spec: ModelSpec, plan: MemoryPlan, placed: Mapping[tuple[str, Tier], int]
) -> dict[str, dict[str, float]]:
    """Achieved fractions per tier of weights, KV cache, recurrent state and hidden states.

    Args:
        placed: bytes of the KV cache (``kv``) and of ``state`` by tier.
    """
    sizes = {name: tensor.numel for name, tensor in spec.tensors.items()}
    slots = {"kv": plan.kv_slot_tiers, "state": plan.state.slot_tiers}
    found = {"weights": achieved(sizes, {name: kept.tier for name, kept in plan.weights.items()})}
    for kind in ("kv", "state") if spec.has_state else ("kv",):
        total = sum(placed[kind, tier] for tier in Tier)
        found[kind] = (
            {tier.value: placed[kind, tier] / total for tier in Tier}
            if total
            else achieved([1] * len(slots[kind]), slots[kind])
        )
    found["activations"] = achieved([1] * len(plan.activation_tiers), plan.activation_tiers)
    return found


def stored_of(spec: ModelSpec, plan: MemoryPlan, policy: Policy, cached: int, kernels: str) -> StoredRecord:
    """Bytes of the weights and of one token in the KV cache, in their formats.

    Args:
        cached: tokens of the longest sequence in the KV cache; 0 if it is empty.
        kernels: what computes with packed numbers.
    """
    weights = sum(kept.nbytes for kept in plan.weights.values())
    tokens = cached or (spec.max_positions or 2048)
    return StoredRecord(
        weight_bytes=weights,
        bytes_per_parameter=weights / spec.num_parameters,
        kv_bytes_per_token=kv_bytes(spec, policy, tokens) / tokens,
        kv_tokens=tokens,
        kernels=kernels,
    )


def savings_of(totals: TotalsRecord, policy: Policy) -> SavingsRecord:
    """What shared prefixes, early leaving and refilling saved."""
    needed = totals.distinct_tokens + totals.generated_tokens
    slots = totals.passes * policy.block_size
    return SavingsRecord(
        needed_tokens=needed,
        computed_per_needed=totals.computed_tokens / needed if needed else None,
        occupancy=totals.slots_taken / slots if slots else None,
    )
