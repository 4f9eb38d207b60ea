"""How many bytes a policy takes in each tier, before anything is loaded.

The figures are upper bounds: the engine allocates what this plan says, and the byte ledger refuses
more. Whoever adds a buffer to the engine adds its line here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from engine.errors import BudgetError
from engine.plan.placement import place_slots, place_weights
from engine.spec.hardware import Budgets, Tier
from engine.spec.kv_layout import KVLayer, KVSlot, kv_bytes, kv_layers, prefix_bytes, prefix_stage_bytes
from engine.spec.layout import (
    ALIGNMENT,
    CONVERT_VALUES,
    HOST_ATTENTION_BUFFERS,
    IN_MEMORY,
    KV_STAGE,
    LOGITS_ROWS,
    QUERY_ROWS,
    STAGE_BUFFERS,
    STAGING_BUFFERS,
    STAGING_BYTES,
    KeptWeight,
    aligned,
    is_near,
    kept_weight,
    stage_buffer_bytes,
    stays_in_place,
)
from engine.spec.memory_plan import MemoryPlan
from engine.spec.model import ModelSpec
from engine.spec.policy import Policy
from engine.spec.quant import QuantSpec
from engine.units import KIB, MIB, format_bytes

_SCRATCH_TOKENS, _SCRATCH_PANELS = 512, 4 * MIB

LOADING = "loading"
_LOADING_BASE = 64 * KIB
"""Small tensors that are alive while a checkpoint is read: a model's own buffers, headers."""

PROCESS, _PROCESS_BYTES = "process", 4 * MIB
"""What a run adds to the process beside tensors: threads, the disk's small buffers, page tables."""


@dataclass(frozen=True)
class SequenceNeed:
    """What one request takes, in tokens."""

    computed: int
    """Most tokens given to the model in one pass: the prompt, without the last token if it is only scored."""

    cached: int
    """Most tokens kept in the KV cache; 0 if nothing is generated after the first pass."""

    before: int = 0
    """Tokens of shared prefixes that it attends to besides; they are kept elsewhere."""


def plan_memory(
    spec: ModelSpec,
    policy: Policy,
    needs: Sequence[SequenceNeed],
    unified: bool,
    computes_packed: bool = False,
    host_attention: bool = False,
    prefixes: Sequence[int] = (),
) -> MemoryPlan:
    """Place everything and count its bytes.

    Args:
        needs: one entry per request and per shared prefix of the run; their order does not matter.
        unified: whether device and host are one memory (a CPU-only machine).
        computes_packed: whether the kernels compute straight from packed weights.
        host_attention: whether decoding attends on the CPU to the KV cache in host memory.
        prefixes: tokens of the shared prefixes that may be kept at once.
    """
    weights = {
        name: kept_weight(spec.tensors[name], tier, policy, spec.compute_dtype, unified, computes_packed)
        for name, tier in place_weights(spec, policy.weights).items()
    }
    kv_slot_tiers = place_slots(policy, policy.kv)
    activation_tiers = place_slots(policy, policy.activations)
    cached = sorted((need.cached for need in needs), reverse=True)
    longest_prompt = max((need.computed for need in needs), default=1)
    batch_tokens = _batch_tokens(policy, needs, longest_prompt)
    tiers: dict[Tier, dict[str, int]] = {tier: {} for tier in Tier}

    def add(tier: Tier, use: str, count: int) -> None:
        if count:
            tiers[tier][use] = tiers[tier].get(use, 0) + count

    compute = spec.compute_bytes
    for kept in weights.values():
        add(kept.tier, "weights", aligned(kept.nbytes) if kept.tier is Tier.DISK else kept.nbytes)
    in_stages = [[weights[name] for name in names] for names in spec.stages]
    sizes = stage_buffer_bytes(in_stages)
    stays = stays_in_place(sizes, in_stages[-1])
    shared = max(sizes[1:-1] if stays else sizes[1:], default=0)
    stage_buffers = (*[shared] * STAGE_BUFFERS, sizes[0], sizes[-1] if stays else 0)
    add(Tier.DEVICE, "weight buffers", sum(stage_buffers))
    converting = max((kept.nbytes for kept in weights.values() if kept.staged), default=0)
    staging = _staging_bytes(spec, weights, unified)
    add(Tier.HOST, "staging", staging * (1 if unified else STAGING_BUFFERS))
    if not unified:
        add(Tier.DEVICE, "staging", converting)
    at_load = {tier: sum(tiers[tier].values()) for tier in Tier}

    layers = kv_layers(spec, policy)
    kinds = dict.fromkeys(layers)  # most models have one kind of layer, and many of it
    for tier in (Tier.DEVICE, Tier.HOST):
        admitted = Counter(cached[: kv_slot_tiers.count(tier)])
        held = (count * kv_bytes(spec, policy, tokens) for tokens, count in admitted.items())
        add(tier, "KV cache", sum(held))
    add(policy.prefix_kv, "shared KV cache", sum(prefix_bytes(layers, tokens) for tokens in prefixes))
    prefix_stage = 0 if is_near(policy.prefix_kv, unified) else prefix_stage_bytes(layers, prefixes)
    if prefix_stage:
        add(Tier.DEVICE, "KV buffers", STAGE_BUFFERS * (prefix_stage + ALIGNMENT))
        if policy.prefix_kv is Tier.DISK and not unified:
            add(Tier.HOST, "staging", STAGING_BUFFERS * (ALIGNMENT + min(KV_STAGE, prefix_stage)))
    kv_slot = KVSlot(layers, cached[0] if cached else 0)
    kv_disk_slots = sum(tokens > 0 for tokens in cached[: kv_slot_tiers.count(Tier.DISK)])
    add(Tier.DISK, "KV cache", kv_disk_slots * kv_slot.nbytes)
    add(Tier.HOST, "KV tails", kv_disk_slots * kv_slot.tail_bytes)
    fresh_rows = batch_tokens * max(layer.row_bytes for layer in kinds)
    moved = cached[: _most_moved_slots(policy, kv_slot_tiers, unified)]
    kv_moves = sum(moved) > 0

    def held_by(layer: KVLayer, sequences: Sequence[int], beside: int = 0) -> int:
        return sum(count * (layer.nbytes(tokens) + beside) for tokens, count in Counter(sequences).items())

    kv_buffer = kv_stage = host_attention_stage = 0
    if policy.kv_quant:
        add(Tier.DEVICE, "KV buffers", fresh_rows)
    if kv_moves:
        kv_buffer = ALIGNMENT + fresh_rows
        kv_buffer += max(held_by(layer, moved, beside=IN_MEMORY + ALIGNMENT) for layer in kinds)
        if host_attention:  # of sequences in host memory only the prompts come, to be packed and kept
            read = moved[: _most_slots(policy, kv_slot_tiers, {Tier.DISK})]
            kv_buffer = (
                ALIGNMENT
                + len(moved) * (2 * IN_MEMORY + ALIGNMENT)
                + max(
                    layer.row_bytes * batch_tokens + layer.data_bytes(batch_tokens) + held_by(layer, read)
                    for layer in kinds
                )
            )
            host_attention_stage = _host_attention_bytes(spec, policy, kv_slot_tiers)
            add(Tier.HOST, "staging", HOST_ATTENTION_BUFFERS * host_attention_stage)
        add(Tier.DEVICE, "KV buffers", STAGE_BUFFERS * kv_buffer)
        if kv_disk_slots and not unified:
            kv_stage = ALIGNMENT + min(KV_STAGE, aligned(kv_buffer))
            add(Tier.HOST, "staging", STAGING_BUFFERS * kv_stage)

    hidden = batch_tokens * spec.hidden_size * compute
    in_flight = policy.num_device_batches * hidden
    context = max((need.before + need.computed for need in needs), default=1)
    context += max((need.before + need.cached for need in needs if need.cached), default=0)
    fused = unified and spec.plain_scores and not prefixes
    temporary = workspace_bytes(spec, policy, batch_tokens, context, computes_packed, fused)
    if prefixes:  # queries, means and totals of those that attend to one
        temporary += batch_tokens * (3 * spec.query_width * compute + 8 * spec.num_heads)
    if any(tier is not Tier.DEVICE for tier in activation_tiers):
        for tier in set(activation_tiers):
            add(tier, "activations", policy.num_device_batches * hidden)
        add(Tier.DEVICE, "activation buffers", STAGE_BUFFERS * hidden)
        add(Tier.HOST, "staging", 2 * hidden)
        add(Tier.DEVICE, "workspace", temporary + in_flight)
    else:
        add(Tier.DEVICE, "activations", in_flight)
        add(Tier.DEVICE, "workspace", temporary)

    loading = _loading_bytes(spec, policy, weights, unified)
    later = sum(tiers[Tier.HOST].values()) - at_load[Tier.HOST]
    if unified:
        later += sum(tiers[Tier.DEVICE].values()) - at_load[Tier.DEVICE]
    add(Tier.HOST, LOADING, max(0, loading - later))
    add(Tier.HOST, PROCESS, _PROCESS_BYTES)
    return MemoryPlan(
        weights=weights,
        kv_slot_tiers=kv_slot_tiers,
        activation_tiers=activation_tiers,
        tiers=tiers,
        batch_tokens=batch_tokens,
        kv_buffer=kv_buffer,
        prefix_stage=prefix_stage,
        kv_slot=kv_slot,
        kv_disk_slots=kv_disk_slots,
        kv_stage=kv_stage,
        host_attention=host_attention,
        host_attention_stage=host_attention_stage,
        kv_moves=kv_moves,
        stage_buffers=stage_buffers,
        staging=staging,
        converting=converting,
        computes_packed=computes_packed,
        loading=loading,
        reserved=temporary + in_flight,
        unified=unified,
    )


def _staging_bytes(spec: ModelSpec, weights: Mapping[str, KeptWeight], unified: bool) -> int:
    """One buffer of host memory through which weights on disk pass on their way to a stage's buffers.

    Where device and host are one memory, only what has to be converted passes, whole, as far from a multiple
    of `ALIGNMENT` as in its file; else everything does, in pieces.
    """
    if unified:
        staged = [k.nbytes for k in weights.values() if k.staged and k.tier is Tier.DISK]
        return max(staged) + ALIGNMENT if staged else 0
    per_stage = (
        sum(aligned(weights[name].nbytes + ALIGNMENT) for name in names if weights[name].tier is Tier.DISK)
        for names in spec.stages
    )
    return min(STAGING_BYTES, max(per_stage))


def _loading_bytes(
    spec: ModelSpec,
    policy: Policy,
    weights: Mapping[str, KeptWeight],
    unified: bool,
) -> int:
    """Host memory while weights are brought in, beside those in place.

    A tensor that goes through transformers' conversion is held as parts, whole and packed; one that a file
    holds as it is kept is read in place, and by way of a copy if it is converted or goes to a device.
    """
    streamed = [
        kept.tensor.nbytes
        for kept in weights.values()
        if not kept.tensor.in_file or isinstance(kept.form, QuantSpec)
    ]
    copied = [
        kept.tensor.nbytes
        for kept in weights.values()
        if kept.tier is not Tier.DISK
        and (not unified or (kept.form is None and kept.dtype != kept.tensor.dtype))
    ]
    loading = max(3 * max(streamed, default=0), max(copied, default=0)) + _LOADING_BASE
    return loading + (_convert_bytes(spec) if streamed and _packs_weights(spec, policy) else 0)


def check_plan(plan: MemoryPlan, limits: Mapping[Tier, int]) -> None:
    """Compare a plan with what each tier may hold.

    Raises:
        BudgetError: for the first tier that is too small, naming its largest uses.
    """
    for tier in Tier:
        uses = dict(plan.tiers[tier])
        if plan.unified and tier is Tier.DEVICE:
            continue  # counted with the host
        if plan.unified and tier is Tier.HOST:
            for use, count in plan.tiers[Tier.DEVICE].items():
                uses[use] = uses.get(use, 0) + count
        needed = sum(uses.values())
        if needed > limits[tier]:
            # What every process takes is nothing to change; it is named only where there is nothing else.
            largest = sorted(uses.items(), key=lambda item: (item[0] == PROCESS, -item[1]))[:3]
            detail = ", ".join(f"{use} {format_bytes(count)}" for use, count in largest if count)
            cure = _cure(largest[0][0], tier)
            raise BudgetError(tier.value, needed, limits[tier], f"the policy ({detail})", cure)


def workspace_bytes(
    spec: ModelSpec,
    policy: Policy,
    tokens: int,
    context: int,
    computes_packed: bool = False,
    fused: bool = False,
) -> int:
    """Temporaries while a stage computes a device batch of so many packed tokens, and while streams convert.

    Counted are the tensors that live at once in transformers' layers: about eight of the hidden
    width, three of the inner width (nine with experts, and every expert's input and output twice), queries,
    keys and values twice with their rotations; for every batch of the block its positions' embeddings;
    attention scores of a bounded number of queries over the longest context, or where attention of prompts is
    always ``fused`` a mask of them (places, bits, floats) and the scores of one query that decodes; logits of
    a bounded number of positions as computed, in float32 and normalised.
    """
    compute = spec.compute_bytes
    widest = max(key + value for key, value in spec.kv_widths)
    queries_beyond_hidden = max(0, spec.query_width - spec.hidden_size)
    values = 8 * spec.hidden_size + 3 * spec.intermediate_size + 7 * widest
    values += 3 * queries_beyond_hidden
    if spec.experts_per_token:
        values += 6 * spec.intermediate_size + 4 * spec.experts_per_token * spec.hidden_size
    layer = tokens * values * compute
    positions = policy.num_device_batches * tokens * 4 * max(key for key, _ in spec.kv_widths)
    queries = min(tokens, QUERY_ROWS)
    scores = 4 * (1 if fused else queries) * context * spec.num_heads * 4 + 3 * context * widest * compute
    if fused:
        scores += 2 * queries * context * (8 + 1 + 4)
    logits = min(LOGITS_ROWS, tokens) * spec.vocab_size * (compute + 8)
    convert = 0
    if policy.kv_quant or _packs_weights(spec, policy):
        convert = _scratch_bytes(spec, tokens) if computes_packed else 3 * _convert_bytes(spec)
    return layer + positions + max(scores, logits) + convert


def _packs_weights(spec: ModelSpec, policy: Policy) -> bool:
    """Whether some weight is kept in few bits, by the policy or by its checkpoint."""
    return any(policy.weight_quant.of(tensor) for tensor in spec.tensors.values())


def _scratch_bytes(spec: ModelSpec, tokens: int) -> int:
    """What the compiled kernels keep for themselves: a few hundred tokens rearranged, panels per thread."""
    widest = max(tensor.matrix[1] for tensor in spec.tensors.values() if tensor.is_matrix)
    return 4 * min(tokens, _SCRATCH_TOKENS) * widest + _SCRATCH_PANELS


def _convert_bytes(spec: ModelSpec) -> int:
    """Temporaries of packing or unpacking one chunk: six float32 tensors of its size."""
    return 24 * min(CONVERT_VALUES, max(tensor.numel for tensor in spec.tensors.values()))


def _batch_tokens(policy: Policy, needs: Sequence[SequenceNeed], longest_prompt: int) -> int:
    """A batch takes prompts up to a limit, or one longer prompt, beside the others' single tokens."""
    longest_first = sorted((need.computed for need in needs), reverse=True)[: policy.device_batch]
    most = max(policy.max_batch_tokens, longest_prompt)
    return max(1, min(sum(longest_first), most + policy.device_batch - 1))


def _most_moved_slots(policy: Policy, slots: Sequence[Tier], unified: bool) -> int:
    return _most_slots(policy, slots, {tier for tier in Tier if not is_near(tier, unified)})


def _most_slots(policy: Policy, slots: Sequence[Tier], tiers: set[Tier]) -> int:
    """Most slots of one device batch that lie in some tiers."""
    size = policy.device_batch
    return max(
        sum(tier in tiers for tier in slots[start : start + size]) for start in range(0, len(slots), size)
    )


def _host_attention_bytes(spec: ModelSpec, policy: Policy, slots: Sequence[Tier]) -> int:
    """Queries, fresh rows and results of a batch's sequences in host memory, and the sinks."""
    rows = _most_slots(policy, slots, {Tier.HOST})
    widths = max(
        spec.query_width + key + value + -(-spec.query_width * value // key) for key, value in spec.kv_widths
    )
    totals = rows * spec.num_heads * 4
    return ALIGNMENT + (rows * widths + spec.num_heads) * spec.compute_bytes + totals + 5 * IN_MEMORY


def _cure(largest_use: str, tier: Tier) -> str:
    cures = {
        "weights": "place more weights in another tier, or use fewer bits (weight_quant=4 or less)",
        "weight buffers": "raise the budget; two layers' weights must fit beside everything else",
        "KV cache": "lower device_batch or num_device_batches, place kv in another tier, or use fewer bits "
        "(kv_quant=4 or less)",
        "shared KV cache": "place prefix_kv in another tier, use prefix_sharing=off, or a smaller block",
        "KV tails": "lower device_batch or num_device_batches, or place kv in another tier",
        "KV buffers": "lower device_batch",
        "activations": "lower max_batch_tokens or num_device_batches",
        "workspace": "lower max_batch_tokens or device_batch",
    }
    flag = "--disk" if tier is Tier.DISK else f"--{tier.value}-memory"
    return f"raise {flag} or {cures.get(largest_use, 'lower device_batch')}"


def limits_of(budgets: Budgets, capacities: Mapping[Tier, int]) -> dict[Tier, int]:
    """What each tier may hold: its budget, or all that is free where none is given."""
    return {tier: capacities[tier] if (budget := budgets.of(tier)) is None else budget for tier in Tier}
