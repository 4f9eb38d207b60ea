"""What a result says about how its figures came about, computed from a plan and from counts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from engine.plan.placement import achieved
from engine.spec.hardware import Tier
from engine.spec.kv_layout import kv_bytes
from engine.spec.memory_plan import MemoryPlan
from engine.spec.model import ModelSpec
from engine.spec.policy import Policy


def placement_of(spec: ModelSpec, plan: MemoryPlan, kv_placed: Mapping[Tier, int]) -> dict[str, Any]:
    """Fractions per tier that were achieved, of weights, KV cache and hidden states."""
    sizes = {name: tensor.numel for name, tensor in spec.tensors.items()}
    held = sum(kv_placed.values())
    return {
        "weights": achieved(sizes, {name: kept.tier for name, kept in plan.weights.items()}),
        "kv": {tier.value: kv_placed[tier] / held for tier in Tier}
        if held
        else achieved([1] * len(plan.kv_slot_tiers), plan.kv_slot_tiers),
        "activations": achieved([1] * len(plan.activation_tiers), plan.activation_tiers),
    }


def stored_of(spec: ModelSpec, plan: MemoryPlan, policy: Policy, cached: int) -> dict[str, Any]:
    """Bytes of the weights and of one token in the KV cache as they are kept.

    Args:
        cached: tokens of the longest sequence in the KV cache; 0 where nothing is kept.
    """
    weights = sum(kept.nbytes for kept in plan.weights.values())
    tokens = cached or (spec.max_positions or 2048)
    return {
        "weight_bytes": weights,
        "bytes_per_parameter": weights / spec.num_parameters,
        "kv_bytes_per_token": kv_bytes(spec, policy, tokens) / tokens,
        "kv_tokens": tokens,
    }


def savings_of(totals: Mapping[str, int], policy: Policy) -> dict[str, Any]:
    """What shared prefixes, early leaving and refilling saved; all of it counted, nothing estimated.

    ``computed_tokens`` were given to the model. ``needed_tokens`` had to be, once: nodes of the tree that the
    prompts form, and every generated token. ``shared_tokens`` of prompts were taken from a prefix,
    ``occupancy`` is the mean fraction of the block's slots that were taken in a pass, ``kv_bytes_saved`` what
    the requests' own copies of their prefixes would have taken more in the KV cache.
    """
    needed = totals["distinct_tokens"] + totals["generated_tokens"]
    slots = totals["passes"] * policy.block_size
    return {
        "prompt_tokens": totals["prompt_tokens"],
        "generated_tokens": totals["generated_tokens"],
        "computed_tokens": totals["computed_tokens"],
        "needed_tokens": needed,
        "computed_per_needed": totals["computed_tokens"] / needed if needed else None,
        "padding_tokens": totals["padding_tokens"],
        "shared_tokens": totals["shared_tokens"],
        "passes": totals["passes"],
        "occupancy": totals["slots_taken"] / slots if slots else None,
        "kv_bytes_saved": totals["kv_bytes_saved"],
    }
