"""How many bytes a policy takes in each tier, before anything is loaded.

The figures are upper bounds: the engine allocates what this plan says, and the byte ledger refuses
more. Whoever adds a buffer to the engine adds its line here.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from engine.errors import BudgetError
from engine.plan.cures import cure_of
from engine.plan.placement import place_slots, place_weights
from engine.plan.state import StateDraft, state_workspace
from engine.plan.workspace import loading_bytes, workspace_bytes
from engine.spec.hardware import Budgets, Tier
from engine.spec.kv_layout import KVLayer, KVSlot, kv_bytes, kv_layers, prefix_bytes, prefix_stage_bytes
from engine.spec.layout import (
    ALIGNMENT,
    HOST_ATTENTION_BUFFERS,
    IN_MEMORY,
    KV_STAGE,
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
from engine.spec.memory_plan import MemoryPlan, StatePlan
from engine.spec.model import ModelSpec
from engine.spec.policy import Policy
from engine.units import MIB, format_bytes

LOADING = "loading"

PROCESS, _PROCESS_BYTES = "process", 4 * MIB
"""What a run adds to the process beside tensors: threads, the disk's small buffers, page tables."""

Weights = Mapping[str, KeptWeight]
"""How and where every weight is kept, by its name."""


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
    return _Draft(spec, policy, needs, unified, computes_packed, host_attention, prefixes).finish()


@dataclass
class _Draft:
    """A plan in the making: methods add the bytes of one kind of tensor each. Fields: see `plan_memory`."""

    _spec: ModelSpec
    _policy: Policy
    _needs: Sequence[SequenceNeed]
    _unified: bool
    _computes_packed: bool
    _host_attention: bool
    _prefixes: Sequence[int]

    def __post_init__(self) -> None:
        policy = self._policy
        self._tiers: dict[Tier, Counter[str]] = {tier: Counter() for tier in Tier}
        self._kv_tiers = place_slots(policy, policy.kv)
        self._activation_tiers = place_slots(policy, policy.activations)
        self._layers = kv_layers(self._spec, policy)
        self._kinds = list(dict.fromkeys(self._layers))  # most models have one kind of layer
        self._cached = sorted((need.cached for need in self._needs), reverse=True)
        computed = sorted((need.computed for need in self._needs), reverse=True)
        longest, size = computed[0] if computed else 1, policy.device_batch
        most = max(policy.max_batch_tokens, longest) + size - 1  # by the rule of `engine.plan.batching`
        self._batch_tokens = max(1, min(sum(computed[:size]), most))

    def finish(self) -> MemoryPlan:
        """Place everything."""
        weights = self._weights()
        stage_buffers, staging, converting = self._weight_buffers(weights)
        at_load = self._held()
        kv_slot, kv_disk_slots = self._kv_cache()
        prefix_stage = self._prefix_cache()
        kv_buffer, kv_stage, host_attention_stage = self._kv_buffers(kv_disk_slots)
        state = self._state()
        reserved = self._activations()
        loading = loading_bytes(self._spec, self._policy, weights, self._unified)
        while_loading = self._loading(loading, at_load)
        self._add(Tier.HOST, PROCESS, _PROCESS_BYTES)
        return MemoryPlan(
            weights=weights,
            kv_slot_tiers=self._kv_tiers,
            activation_tiers=self._activation_tiers,
            tiers=self._tiers,
            batch_tokens=self._batch_tokens,
            kv_buffer=kv_buffer,
            stage_buffers=stage_buffers,
            staging=staging,
            converting=converting,
            prefix_stage=prefix_stage,
            kv_slot=kv_slot,
            kv_disk_slots=kv_disk_slots,
            host_attention=self._host_attention,
            host_attention_stage=host_attention_stage,
            kv_stage=kv_stage,
            computes_packed=self._computes_packed,
            while_loading=while_loading,
            reserved=reserved,
            unified=self._unified,
            state=state,
        )

    def _add(self, tier: Tier, use: str, count: int) -> None:
        if count:
            self._tiers[tier][use] += count

    def _held(self) -> dict[Tier, int]:
        """Bytes so far in every tier."""
        return {tier: sum(uses.values()) for tier, uses in self._tiers.items()}

    def _loading(self, needed: int, at_load: Mapping[Tier, int]) -> dict[Tier, int]:
        """Bytes of each tier that reading a checkpoint takes: those of what comes later, and more if need be.

        Args:
            needed: bytes in all.
            at_load: what each tier holds at the end of it.
        """
        taken, held = dict[Tier, int](), self._held()
        for tier in (Tier.HOST, Tier.DEVICE) if self._unified else (Tier.HOST,):
            taken[tier] = min(needed - sum(taken.values()), held[tier] - at_load[tier])
        beyond = needed - sum(taken.values())
        self._add(Tier.HOST, LOADING, beyond)
        taken[Tier.HOST] += beyond + _PROCESS_BYTES
        return taken

    def _most_slots(self, tiers: set[Tier]) -> int:
        """Most slots of one device batch whose KV cache lies in some tiers."""
        size, slots = self._policy.device_batch, self._kv_tiers
        return max(
            sum(tier in tiers for tier in slots[start : start + size]) for start in range(0, len(slots), size)
        )

    # Weights

    def _weights(self) -> dict[str, KeptWeight]:
        """Place the weights."""
        spec, policy = self._spec, self._policy
        compute, unified, packed = spec.compute_dtype, self._unified, self._computes_packed
        weights = {
            name: kept_weight(spec.tensors[name], tier, policy, compute, unified, packed)
            for name, tier in place_weights(spec, policy.weights).items()
        }
        for kept in weights.values():
            self._add(kept.tier, "weights", aligned(kept.nbytes) if kept.tier is Tier.DISK else kept.nbytes)
        return weights

    def _weight_buffers(self, weights: Weights) -> tuple[tuple[int, ...], int, int]:
        """Add buffers for weights that the device cannot read where they are kept.

        Returns `MemoryPlan.stage_buffers`, `MemoryPlan.staging` and `MemoryPlan.converting`.
        """
        in_stages = [[weights[name] for name in names] for names in self._spec.stages]
        sizes = stage_buffer_bytes(in_stages)
        stays = stays_in_place(sizes, in_stages[-1])
        shared = max(sizes[1:-1] if stays else sizes[1:], default=0)
        stage_buffers = (*[shared] * STAGE_BUFFERS, sizes[0], sizes[-1] if stays else 0)
        self._add(Tier.DEVICE, "weight buffers", sum(stage_buffers))
        converting = max((kept.nbytes for kept in weights.values() if kept.staged), default=0)
        staging = self._weight_staging(weights)
        self._add(Tier.HOST, "staging", staging * (1 if self._unified else STAGING_BUFFERS))
        if not self._unified:
            self._add(Tier.DEVICE, "staging", converting)
        return stage_buffers, staging, converting

    def _weight_staging(self, weights: Weights) -> int:
        """Bytes of one buffer in host memory through which weights on disk pass to a stage's buffers.

        Where device and host are one memory, only what has to be converted passes, whole, as far from a
        multiple of `ALIGNMENT` as in its file; else everything does, in pieces.
        """
        if self._unified:
            staged = [kept.nbytes for kept in weights.values() if kept.staged and kept.tier is Tier.DISK]
            return max(staged) + ALIGNMENT if staged else 0
        on_disk = {name: kept.nbytes for name, kept in weights.items() if kept.tier is Tier.DISK}
        per_stage = (
            sum(aligned(on_disk[name] + ALIGNMENT) for name in names if name in on_disk)
            for names in self._spec.stages
        )
        return min(STAGING_BYTES, max(per_stage))

    # KV cache

    def _kv_cache(self) -> tuple[KVSlot, int]:
        """Place the sequences' own KV cache; the layout of a slot on disk, and how many are in use."""
        for tier in (Tier.DEVICE, Tier.HOST):
            lengths = Counter(self._cached[: self._kv_tiers.count(tier)])
            held = (count * kv_bytes(self._spec, self._policy, tokens) for tokens, count in lengths.items())
            self._add(tier, "KV cache", sum(held))
        slot = KVSlot(self._layers, self._cached[0] if self._cached else 0)
        disk_slots = sum(tokens > 0 for tokens in self._cached[: self._kv_tiers.count(Tier.DISK)])
        self._add(Tier.DISK, "KV cache", disk_slots * slot.nbytes)
        self._add(Tier.HOST, "KV tails", disk_slots * slot.tail_bytes)
        return slot, disk_slots

    def _prefix_cache(self) -> int:
        """Place shared prefixes; bytes of the buffer that brings one layer of them to the device."""
        tier, layers = self._policy.prefix_kv, self._layers
        self._add(tier, "shared KV cache", sum(prefix_bytes(layers, tokens) for tokens in self._prefixes))
        stage = 0 if is_near(tier, self._unified) else prefix_stage_bytes(layers, self._prefixes)
        if stage:
            self._add(Tier.DEVICE, "KV buffers", STAGE_BUFFERS * (stage + ALIGNMENT))
            if tier is Tier.DISK and not self._unified:
                self._add(Tier.HOST, "staging", STAGING_BUFFERS * (ALIGNMENT + min(KV_STAGE, stage)))
        return stage

    def _kv_buffers(self, disk_slots: int) -> tuple[int, int, int]:
        """Add buffers for a layer's KV cache that the device cannot read where it is kept.

        Returns `MemoryPlan.kv_buffer`, `MemoryPlan.kv_stage` and `MemoryPlan.host_attention_stage`.
        """
        new_rows = self._batch_tokens * max(layer.row_bytes for layer in self._kinds)
        if self._policy.kv_quant:
            self._add(Tier.DEVICE, "KV buffers", new_rows)
        if not new_rows:  # no layer attends
            return 0, 0, 0
        moved = self._cached[: self._most_slots({tier for tier in Tier if not is_near(tier, self._unified)})]
        if not sum(moved):
            return 0, 0, 0
        kv_stage = host_attention_stage = 0
        if self._host_attention:
            kv_buffer = self._kv_buffer_of_prompts(len(moved))
            host_attention_stage = self._host_attention_stage()
            self._add(Tier.HOST, "staging", HOST_ATTENTION_BUFFERS * host_attention_stage)
        else:
            kv_buffer = ALIGNMENT + new_rows
            kv_buffer += max(_layer_bytes(kind, moved, beside=IN_MEMORY + ALIGNMENT) for kind in self._kinds)
        self._add(Tier.DEVICE, "KV buffers", STAGE_BUFFERS * kv_buffer)
        if disk_slots and not self._unified:
            kv_stage = ALIGNMENT + min(KV_STAGE, aligned(kv_buffer))
            self._add(Tier.HOST, "staging", STAGING_BUFFERS * kv_stage)
        return kv_buffer, kv_stage, host_attention_stage

    def _kv_buffer_of_prompts(self, sequences: int) -> int:
        """Bytes of one buffer if the host attends to its own sequences, whose prompts come to be packed."""
        read, tokens = self._cached[: self._most_slots({Tier.DISK})], self._batch_tokens
        largest = max(
            kind.row_bytes * tokens + kind.data_bytes(tokens) + _layer_bytes(kind, read)
            for kind in self._kinds
        )
        return ALIGNMENT + sequences * (2 * IN_MEMORY + ALIGNMENT) + largest

    def _host_attention_stage(self) -> int:
        """Bytes of a batch's queries, new rows, results and sinks on the host."""
        spec, rows = self._spec, self._most_slots({Tier.HOST})
        widths = max(
            spec.query_width + key + value + -(-spec.query_width * value // key)
            for key, value in spec.kv_widths
            if key
        )
        lse = rows * spec.num_heads * 4
        return ALIGNMENT + (rows * widths + spec.num_heads) * spec.compute_bytes + lse + 5 * IN_MEMORY

    # State

    def _state(self) -> StatePlan:
        """Place recurrent and convolution state."""
        kept = sum(tokens > 0 for tokens in self._cached)
        draft = StateDraft(self._spec, self._policy, self._unified, kept, len(self._prefixes))
        plan = draft.plan()
        for use in draft.uses(plan):
            self._add(*use)
        return plan

    # Activations

    def _activations(self) -> int:
        """Add hidden states and temporaries; the bytes that torch allocates by itself."""
        hidden = self._batch_tokens * self._spec.hidden_size * self._spec.compute_bytes
        in_flight = self._policy.num_device_batches * hidden
        temporary = self._temporary()
        if any(tier is not Tier.DEVICE for tier in self._activation_tiers):
            for tier in set(self._activation_tiers):
                self._add(tier, "activations", in_flight)
            self._add(Tier.DEVICE, "activation buffers", STAGE_BUFFERS * hidden)
            self._add(Tier.HOST, "staging", 2 * hidden)
            self._add(Tier.DEVICE, "workspace", temporary + in_flight)
        else:
            self._add(Tier.DEVICE, "activations", in_flight)
            self._add(Tier.DEVICE, "workspace", temporary)
        return temporary + in_flight

    def _temporary(self) -> int:
        """Bytes of a stage's temporaries at the longest contexts."""
        spec, tokens = self._spec, self._batch_tokens
        context = max((need.before + need.computed for need in self._needs), default=1)
        context += max((need.before + need.cached for need in self._needs if need.cached), default=0)
        fused = self._unified and spec.plain_scores and not self._prefixes
        longest = max((need.computed for need in self._needs), default=1)
        temporary = workspace_bytes(
            spec, self._policy, tokens, context, self._computes_packed, fused, longest
        )
        temporary += state_workspace(spec, self._policy)
        if self._prefixes:  # queries, means and log-sum-exps of those that attend to one
            temporary += tokens * (3 * spec.query_width * spec.compute_bytes + 8 * spec.num_heads)
        return temporary


def _layer_bytes(layer: KVLayer, lengths: Sequence[int], beside: int = 0) -> int:
    """Bytes of one layer's KV cache of sequences of these lengths, each with some bytes beside its own."""
    return sum(count * (layer.nbytes(tokens) + beside) for tokens, count in Counter(lengths).items())


def check_plan(plan: MemoryPlan, limits: Mapping[Tier, int], host_limit: str = "") -> None:
    """Refuse a plan that takes more than a tier's limit.

    Args:
        host_limit: what limits the host tier where no budget does; for the message.

    Raises:
        BudgetError: for the first tier that is too small, naming its largest uses.
    """
    for tier in Tier:
        uses = Counter(plan.tiers[tier])
        if plan.unified and tier is Tier.DEVICE:
            continue  # counted with the host
        if plan.unified and tier is Tier.HOST:
            uses.update(plan.tiers[Tier.DEVICE])
        needed = sum(uses.values())
        if needed > limits[tier]:
            # What every process takes is nothing to change; it is named only where there is nothing else.
            largest = sorted(uses.items(), key=lambda item: (item[0] == PROCESS, -item[1]))[:3]
            detail = ", ".join(f"{use} {format_bytes(count)}" for use, count in largest if count)
            cure = cure_of(largest[0][0], tier, host_limit if tier is Tier.HOST else "")
            raise BudgetError(tier.value, needed, limits[tier], f"the policy ({detail})", cure)


def most_that_fit(check: Callable[[int], None], most: int) -> int:
    """The largest number of sequences, up to twice ``most``, for which a check raises no `BudgetError`.

    Raises:
        BudgetError: if it does so for one sequence.
    """

    def fits(count: int) -> bool:
        try:
            check(count)
        except BudgetError:
            return False
        return True

    check(1)
    high = 2
    while high <= most and fits(high):
        high *= 2
    return bisect_left(range(high), True, lo=high // 2 + 1, key=lambda count: not fits(count)) - 1


def limits_of(budgets: Budgets, capacities: Mapping[Tier, int]) -> dict[Tier, int]:
    """Bytes that each tier may hold: its budget, or all that is free where none is given."""
    return {tier: capacities[tier] if (budget := budgets.of(tier)) is None else budget for tier in Tier}
