"""The least work of a pass, and its time at the rates of each stream alone.

Work is counted from the model, the policy and the placement, never from what the engine moved. Wherever there
is a choice, the smaller count is taken, so that the result is a bound.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from engine.spec.hardware import Tier
from engine.spec.kv_layout import KVLayer, kv_layers
from engine.spec.memory_plan import MemoryPlan
from engine.spec.model import ModelSpec, TensorSpec
from engine.spec.policy import Policy


@dataclass(frozen=True)
class Work:
    """Bytes and floating-point operations of one pass."""

    disk_read: int
    disk_write: int
    weight_bytes: int
    """Weights read from memory, each once, in the precision in which they are kept."""

    kv_bytes: int
    """Keys and values read from memory, from whichever tier they came, and written."""

    layer_flops: int
    """Matrix products of the layers: two operations per weight and token."""

    head_flops: int
    """Product with the output embedding, for one position per sequence."""

    attention_flops: int
    """Scores and weighted values."""


@dataclass(frozen=True)
class Rates:
    """Rate of each stream alone, in bytes or operations per second."""

    disk_read: float
    disk_write: float
    memory: float
    layers: float
    head: float

    def mean(self, other: Rates) -> Rates:
        """The mean of the rates before and after a repetition."""
        mine, theirs = asdict(self), asdict(other)
        return Rates(**{name: (mine[name] + theirs[name]) / 2 for name in mine})


@dataclass(frozen=True)
class Bound:
    """Lower bound on the seconds of a pass."""

    streams: Mapping[str, float]
    """Seconds per stream; the bound is the largest."""

    in_order: float
    """The largest of the disk streams and of products and attention one after the other, as the same
    cores do both: products at their rate, attention at the rate of products or of memory."""

    @property
    def seconds(self) -> float:
        """The bound: the largest of the streams."""
        return max(self.streams.values())

    @property
    def stream(self) -> str:
        """The stream that sets the bound."""
        return max(self.streams, key=lambda stream: self.streams[stream])


def kept_bytes(tensor: TensorSpec, policy: Policy) -> int:
    """Bytes of a weight as the policy keeps it: packed, or in the checkpoint's own precision."""
    form = policy.weight_quant.of(tensor)
    return form.nbytes(*tensor.matrix) if form else tensor.nbytes


def pass_work(
    spec: ModelSpec, policy: Policy, plan: MemoryPlan, fresh: Sequence[int], past: Sequence[int]
) -> Work:
    """Count one pass, not the first one: a head that stays in its buffer is not read again.

    Args:
        fresh: computed tokens of each sequence, in the order of the slots.
        past: tokens of each sequence in the KV cache before the pass.
    """
    tokens = sum(fresh)
    later = {name for names in spec.stages[1:] for name in names}
    head = set(spec.stages[-1])
    in_layers = {name for names in spec.stages[1:-1] for name in names}
    disk_read = weight_bytes = layer_weights = head_weights = 0
    for name, tensor in spec.tensors.items():
        count = kept_bytes(tensor, policy)
        if name not in later and tensor.is_matrix:  # a table of which only the tokens' rows are needed
            count = min(count, tokens * count // tensor.matrix[0])
        weight_bytes += count
        if plan.weights[name].tier is Tier.DISK and not (name in head and plan.head_stays):
            disk_read += count
        if tensor.is_matrix and name in in_layers:
            layer_weights += tensor.numel
        if tensor.is_matrix and name in head:
            head_weights += tensor.numel
    kv_bytes = disk_write = 0
    layers = kv_layers(spec, policy)
    for slot, (new, old) in enumerate(zip(fresh, past, strict=True)):
        read = sum(_kept(layer, old) for layer in layers)
        written = sum(_written(layer, new, old) for layer in layers)
        kv_bytes += read + written
        if plan.kv_slot_tiers[slot] is Tier.DISK:
            assert plan.kv_slot is not None  # the newest tokens of a slot on disk are in memory
            held = plan.kv_slot.written
            disk_read += sum(held(index, old) for index in range(len(layers)))
            disk_write += sum(held(index, old + new) - held(index, old) for index in range(len(layers)))
    seen = sum(new * old + new * (new + 1) // 2 for new, old in zip(fresh, past, strict=True))
    return Work(
        disk_read=disk_read,
        disk_write=disk_write,
        weight_bytes=weight_bytes,
        kv_bytes=kv_bytes,
        layer_flops=2 * layer_weights * tokens,
        head_flops=2 * head_weights * len(fresh),
        attention_flops=4 * spec.num_layers * spec.query_width * seen,
    )


def _kept(layer: KVLayer, tokens: int) -> int:
    """KV cache bytes of ``tokens`` tokens of one sequence at one layer."""
    return layer.packed_bytes(tokens) + (tokens - layer.packed_tokens(tokens)) * layer.row_bytes


def _written(layer: KVLayer, fresh: int, past: int) -> int:
    """KV cache bytes that a pass writes: blocks that it fills, and new tokens that stay exact."""
    packed = layer.packed_bytes(past + fresh) - layer.packed_bytes(past)
    exact = min(fresh, past + fresh - layer.packed_tokens(past + fresh))
    return packed + exact * layer.row_bytes


def bound(work: Work, rates: Rates) -> Bound:
    """Time of every stream, and so of the busiest one."""
    disk = {
        "disk read": work.disk_read / rates.disk_read if work.disk_read else 0.0,
        "disk write": work.disk_write / rates.disk_write if work.disk_write else 0.0,
    }
    products = work.layer_flops / rates.layers + work.head_flops / rates.head
    attention = work.attention_flops / rates.layers
    read = work.kv_bytes / rates.memory
    streams = {
        **disk,
        "memory": work.weight_bytes / rates.memory + read,
        "compute": products + attention,
    }
    in_order = max(*streams.values(), products + max(attention, read))
    return Bound(streams, in_order)
