"""How many bytes a policy takes in each tier, before anything is loaded.

The figures are upper bounds: the engine allocates what this plan says, and the byte ledger refuses
more. Whoever adds a buffer to the engine adds its line here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from engine.errors import BudgetError
from engine.plan.placement import needs_loading, place_seats, place_weights, stored_bytes
from engine.plan.schedule import SLOTS
from engine.spec.hardware import Budgets, Tier
from engine.spec.model import ModelSpec
from engine.spec.policy import Policy
from engine.units import MIB, format_bytes

LOGITS_ROWS = 64
"""Positions whose logits are held at once."""

QUERY_ROWS = 256
"""Queries whose attention scores are held at once."""

CONVERT_BYTES = 8 * MIB
"""Most bytes of one temporary while a tensor is packed, unpacked or converted."""


@dataclass(frozen=True)
class SequenceNeed:
    """What one request takes, in tokens."""

    fed: int
    """Most tokens given to the model in one pass: the prompt, without the last token if it is only scored."""

    cached: int
    """Most tokens kept in the KV cache; 0 if nothing is generated after the first pass."""


@dataclass(frozen=True)
class MemoryPlan:
    """Where everything will be and the most bytes it will take."""

    weights: Mapping[str, Tier]
    kv_seats: Sequence[Tier]
    activation_seats: Sequence[Tier]
    """Tier of every weight, and of every seat of the block for its KV cache and its hidden states."""

    tiers: Mapping[Tier, Mapping[str, int]]
    """Bytes per tier and purpose."""

    batch_tokens: int
    """Most packed tokens of one device batch in a pass."""

    kv_rows: int
    """Most tokens in the KV cache of one device batch that have to be brought to the device at once."""

    longest: int
    """Most tokens in the KV cache of one sequence."""

    stage_buffer: int
    """Values of the largest stage's weights that have to be loaded: the size of a weight buffer."""

    unified: bool = field(default=False)
    """Whether device and host are one memory."""

    def total(self, tier: Tier) -> int:
        """Most bytes in one tier."""
        return sum(self.tiers[tier].values())

    def check(self, limits: Mapping[Tier, int]) -> None:
        """Compare with what each tier may hold.

        Raises:
            BudgetError: for the first tier that is too small, naming its largest use.
        """
        for tier in Tier:
            uses = dict(self.tiers[tier])
            if self.unified and tier is not Tier.DISK:
                if tier is Tier.DEVICE:
                    continue
                for use, count in self.tiers[Tier.DEVICE].items():
                    uses[use] = uses.get(use, 0) + count
            needed = sum(uses.values())
            if needed > limits[tier]:
                largest = sorted(uses.items(), key=lambda item: -item[1])[:3]
                detail = ", ".join(f"{use} {format_bytes(count)}" for use, count in largest if count)
                raise BudgetError(tier.value, needed, limits[tier], f"the policy ({detail})", _cure(largest[0][0], tier))


def plan_memory(spec: ModelSpec, policy: Policy, needs: Sequence[SequenceNeed], unified: bool) -> MemoryPlan:
    """Place everything and count its bytes.

    Args:
        needs: one entry per request of the run; their order does not matter.
        unified: whether device and host are one memory (a CPU-only machine).
    """
    weights = place_weights(spec, policy.weights)
    kv_seats = place_seats(policy, policy.kv)
    activation_seats = place_seats(policy, policy.activations)
    cached = sorted((need.cached for need in needs), reverse=True)
    longest_prompt = max((need.fed for need in needs), default=1)
    batch_tokens = _batch_tokens(policy, needs, longest_prompt)
    tiers: dict[Tier, dict[str, int]] = {tier: {} for tier in Tier}

    def add(tier: Tier, use: str, count: int) -> None:
        if count:
            tiers[tier][use] = tiers[tier].get(use, 0) + count

    compute = spec.compute_bytes
    for name, tensor in spec.tensors.items():
        add(weights[name], "weights", stored_bytes(tensor, weights[name], policy, compute))
    moved = [spec.tensors[n] for n in spec.tensors if needs_loading(spec.tensors[n], weights[n], policy)]
    stage_buffer = max(
        sum(spec.tensors[n].numel for n in names if needs_loading(spec.tensors[n], weights[n], policy))
        for names in spec.stages
    )
    add(Tier.DEVICE, "weight buffers", SLOTS * stage_buffer * compute)
    largest = max((stored_bytes(tensor, Tier.HOST, policy, compute) for tensor in moved), default=0)
    add(Tier.HOST, "staging", largest)
    add(Tier.HOST, "loading", 2 * max(tensor.nbytes for tensor in spec.tensors.values()) + 2 * CONVERT_BYTES)
    if not unified:
        add(Tier.DEVICE, "staging", largest)

    per_token = kv_token_bytes(spec, policy)
    for tier in Tier:
        add(tier, "KV cache", sum(cached[: kv_seats.count(tier)]) * per_token)
    moved_seats = _most_moved_seats(policy, kv_seats)
    kv_rows = sum(cached[:moved_seats])
    widest = max(key + value for key, value in spec.kv_widths)
    longest = cached[0] if cached else 0
    if moved_seats and longest:
        add(Tier.DEVICE, "KV buffers", SLOTS * kv_rows * widest * compute)
        row = max(row_bytes(key, policy, compute) + row_bytes(value, policy, compute) for key, value in spec.kv_widths)
        add(Tier.HOST, "staging", 2 * longest * row)
        if not unified:
            add(Tier.DEVICE, "staging", 2 * longest * row)

    hidden = batch_tokens * spec.hidden_size * compute
    batches = policy.num_device_batches
    for tier in Tier:
        if tier is Tier.DEVICE or tier in activation_seats:
            add(tier, "activations", batches * hidden)
    if any(tier is not Tier.DEVICE for tier in activation_seats):
        add(Tier.DEVICE, "activation buffers", SLOTS * hidden)
        add(Tier.HOST, "staging", 2 * hidden)
    add(Tier.DEVICE, "workspace", workspace_bytes(spec, batch_tokens, batches, longest_prompt + longest, len(needs)))
    return MemoryPlan(
        weights=weights, kv_seats=kv_seats, activation_seats=activation_seats, tiers=tiers,
        batch_tokens=batch_tokens, kv_rows=kv_rows, longest=longest, stage_buffer=stage_buffer, unified=unified,
    )  # fmt: skip


def row_bytes(width: int, policy: Policy, compute_bytes: int) -> int:
    """Bytes of one token's keys (or values) of one layer in the KV cache."""
    return policy.kv_quant.row_bytes(width) if policy.kv_quant else width * compute_bytes


def kv_token_bytes(spec: ModelSpec, policy: Policy) -> int:
    """Bytes of one token in the KV cache, over all layers."""
    return sum(
        row_bytes(key, policy, spec.compute_bytes) + row_bytes(value, policy, spec.compute_bytes)
        for key, value in spec.kv_widths
    )


def workspace_bytes(spec: ModelSpec, tokens: int, batches: int, context: int, requests: int) -> int:
    """Temporaries of one layer, or of the head, for a device batch of so many packed tokens.

    Counted are the tensors that live at once in transformers' layers: about eight of the hidden
    width, three of the inner width, queries, keys and values twice with their rotations; per batch
    the positions' embeddings; attention scores for a bounded number of queries; logits for a bounded
    number of positions, three times (as computed, in float32, and normalised).
    """
    compute = spec.compute_bytes
    widest = max(key + value for key, value in spec.kv_widths)
    inner = 8 * spec.hidden_size + 3 * spec.intermediate_size + 6 * widest
    positions = batches * tokens * 4 * max(key for key, _ in spec.kv_widths)
    queries = min(tokens, QUERY_ROWS)
    scores = 4 * queries * context * spec.num_heads * 4 + 3 * context * widest * compute
    logits = min(LOGITS_ROWS, max(tokens, 1)) * spec.vocab_size * (compute + 8)
    return tokens * inner * compute + positions + max(scores, logits)


def _batch_tokens(policy: Policy, needs: Sequence[SequenceNeed], longest_prompt: int) -> int:
    """A batch takes prompts up to a limit, or one longer prompt, beside the others' single tokens."""
    longest_first = sorted((need.fed for need in needs), reverse=True)[: policy.device_batch]
    most = max(policy.max_batch_tokens, longest_prompt)
    return max(1, min(sum(longest_first), most + policy.device_batch - 1))


def _most_moved_seats(policy: Policy, seats: Sequence[Tier]) -> int:
    if policy.kv_quant:
        return policy.device_batch
    size = policy.device_batch
    return max(
        sum(tier is not Tier.DEVICE for tier in seats[start : start + size]) for start in range(0, len(seats), size)
    )


def _cure(largest_use: str, tier: Tier) -> str:
    cures = {
        "weights": "place more weights in another tier, or use weight_bits=4",
        "weight buffers": "raise the budget; two layers' weights must fit beside everything else",
        "KV cache": "lower device_batch or num_device_batches, place more of kv in another tier, or use kv_bits=4",
        "KV buffers": "lower device_batch",
        "activations": "lower max_batch_tokens or num_device_batches",
        "workspace": "lower max_batch_tokens or device_batch",
    }
    return f"raise --{'disk' if tier is Tier.DISK else f'{tier.value}-memory'} or {cures.get(largest_use, 'lower device_batch')}"


def limits_of(budgets: Budgets, capacities: Mapping[Tier, int]) -> dict[Tier, int]:
    """What each tier may hold: its budget, or all that is free where none is given."""
    return {tier: capacities[tier] if (budget := budgets.of(tier)) is None else budget for tier in Tier}
