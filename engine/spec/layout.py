"""How things are laid out where they are kept: shared by who plans the bytes and who allocates them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from itertools import accumulate

from engine.spec.hardware import Tier
from engine.spec.kv_format import KVFormat
from engine.spec.model import DTYPE_BYTES, ModelSpec, TensorSpec
from engine.spec.policy import Policy

SLOTS = 2
"""Buffers per kind that loads alternate between: one in use, one being filled."""

LOGITS_ROWS = 64
"""Positions whose logits are held at once."""

QUERY_ROWS = 256
"""Queries whose attention scores are held at once, where they must be written out."""

CONVERT_VALUES = 1 << 18
"""Values that are packed or unpacked at once; bounds the temporaries."""


ALIGNMENT = 4096
"""Bytes: every weight on disk begins at a multiple of it, as reads past the page cache want."""


KV_UNIT = 128 << 10
"""Bytes of one layer of one sequence's KV cache that are written to disk at once, at least."""

KV_TAIL_SHARE = 8
"""Such a unit, which host memory holds until it is full, is at most one of so many parts of the layer's."""

KV_STAGE = 8 << 20
"""Bytes of the KV cache that are staged at once between disk and a device that is a memory of its own."""

STAGING_BUFFERS = 3
"""Staging buffers of the KV cache: two that alternate on the way in, one on the way out."""


HOST_ATTENTION_BUFFERS = 2
"""Buffers through which queries come to the host and results go back."""


IN_MEMORY = 64
"""Bytes: whatever begins within a buffer begins at a multiple of it, a cache line."""


def aligned(offset: int, to: int = ALIGNMENT) -> int:
    """The next offset at which a weight on disk, or with `IN_MEMORY` a part of a buffer, may begin."""
    return -(-offset // to) * to


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

    kv_moves: bool
    """Whether some of the KV cache has to be brought to the device for attention and written back."""

    kv_buffer: int
    """Bytes that hold what a device batch needs of one layer's KV cache, fresh rows included."""

    kv_slot: KVSlot
    """How a seat on disk is laid out; its capacity is that of the largest sequence."""

    kv_slots: int
    """Most sequences whose KV cache is on disk at once."""

    host_attention: bool
    """Whether decoding attends to the KV cache in host memory where it lies, which is not the device's."""

    host_attention_stage: int
    """Bytes that the queries, fresh rows and results of one device batch take on the host; 0 for none."""

    kv_stage: int
    """Bytes of one of the KV cache's staging buffers; 0 where nothing is staged."""

    stage_buffer: int
    """Bytes of the largest stage's weights that have to be loaded: the size of a weight buffer."""

    computes_packed: bool
    """Whether products and attention are computed straight from packed numbers, whatever their rows."""

    loading: int
    """Bytes of host memory that reading a checkpoint takes at most, beside the weights already in place."""

    reserved: int
    """Bytes of the device tier for what torch allocates by itself: hidden states in flight, temporaries."""

    unified: bool
    """Whether device and host are one memory."""

    def total(self, tier: Tier) -> int:
        """Most bytes in one tier."""
        return sum(self.tiers[tier].values())


def stored_bytes(tensor: TensorSpec, tier: Tier, policy: Policy, compute_bytes: int) -> int:
    """Bytes that one weight takes in its tier.

    Compressed weights are packed wherever they are. Uncompressed ones are ready to compute with in
    the device tier and in the checkpoint's own precision elsewhere.
    """
    form = policy.weight_quant.of(tensor)
    if form is not None:
        return form.nbytes(*tensor.matrix)
    return tensor.numel * compute_bytes if tier is Tier.DEVICE else tensor.nbytes


class Ready(StrEnum):
    """In which form a weight is computed with."""

    IN_PLACE = "in place"
    """Where it is kept, exact or packed."""

    PACKED = "packed"
    """Brought into a buffer, still packed."""

    EXACT = "exact"
    """Brought into a buffer and unpacked or converted."""


def readiness(tensor: TensorSpec, tier: Tier, policy: Policy, unified: bool, computes_packed: bool) -> Ready:
    """What has to be done before a weight can be computed with.

    Args:
        unified: whether device and host are one memory.
        computes_packed: whether products are computed straight from packed weights.
    """
    form = policy.weight_quant.of(tensor)
    if form is None:
        return Ready.IN_PLACE if tier is Tier.DEVICE else Ready.EXACT
    integer = form.activation_bits != 16  # a product of integers cannot be made of unpacked numbers
    if not tensor.fused or not (computes_packed or integer):
        return Ready.EXACT
    return Ready.IN_PLACE if is_near(tier, unified) else Ready.PACKED


def buffer_bytes(tensor: TensorSpec, ready: Ready, policy: Policy, compute_bytes: int) -> int:
    """Bytes that a weight takes in a stage's buffer."""
    if ready is Ready.IN_PLACE:
        return 0
    if ready is Ready.EXACT:
        return aligned(tensor.numel * compute_bytes, IN_MEMORY)
    return aligned(stored_bytes(tensor, Tier.HOST, policy, compute_bytes), IN_MEMORY)


def is_near(tier: Tier, unified: bool) -> bool:
    """Whether the device computes with what lies in a tier without moving it."""
    return tier is Tier.DEVICE or (unified and tier is Tier.HOST)


@dataclass(frozen=True)
class KVLayer:
    """The bytes of one sequence's KV cache at one layer: packed blocks, then rows of exact numbers."""

    key_width: int
    value_width: int
    form: KVFormat | None
    compute_bytes: int

    @cached_property
    def width(self) -> int:
        """Values of one token."""
        return self.key_width + self.value_width

    @cached_property
    def row_bytes(self) -> int:
        """Bytes of one token's exact row."""
        return self.width * self.compute_bytes

    @cached_property
    def block_bytes(self) -> int:
        """Bytes of one packed block of tokens; 0 where nothing is packed."""
        return self.form.block_bytes(self.key_width, self.value_width) if self.form else 0

    def packed_tokens(self, tokens: int) -> int:
        """How many of so many tokens are packed."""
        return self.form.packed_tokens(tokens) if self.form else 0

    def packed_bytes(self, tokens: int) -> int:
        """Bytes of the packed ones of so many tokens."""
        return self.packed_tokens(tokens) // self.form.block_tokens * self.block_bytes if self.form else 0

    def rows_begin(self, capacity: int) -> int:
        """Offset of the exact rows in a region for so many tokens."""
        return aligned(self.packed_bytes(capacity), IN_MEMORY)

    def rows_held(self, capacity: int) -> int:
        """Exact rows that such a region has room for, one of them for the token that comes.

        None where every token is packed at once.
        """
        if self.form is None:
            return capacity
        return min(capacity, self.form.tail_tokens + 1) if self.form.tail_tokens else 0

    def nbytes(self, capacity: int) -> int:
        """Bytes of a region for so many tokens."""
        return self.rows_begin(capacity) + aligned(self.rows_held(capacity) * self.row_bytes, IN_MEMORY)

    def stream_bytes(self, tokens: int) -> int:
        """Bytes of so many tokens that are only ever added to: packed blocks or, uncompressed, all rows."""
        return self.packed_bytes(tokens) if self.form else tokens * self.row_bytes

    def loose_tokens(self, tokens: int) -> int:
        """How many of so many tokens are exact rows that are packed later."""
        return tokens - self.packed_tokens(tokens) if self.form else 0


@dataclass(frozen=True)
class KVSlot:
    """Where a seat on disk keeps one sequence: whole units of every layer on disk, the newest in memory.

    A layer's stream (packed blocks or, uncompressed, rows) is written a unit at a time. What does not
    fill one yet, and exact rows that are packed later, stay in the seat's *tail* in host memory.
    """

    layers: tuple[KVLayer, ...]
    capacity: int
    """Tokens."""

    @cached_property
    def units(self) -> tuple[int, ...]:
        """Per layer the bytes of a unit, a multiple of `ALIGNMENT`: as `KV_UNIT` and `KV_TAIL_SHARE` say."""
        shares = (layer.stream_bytes(self.capacity) // KV_TAIL_SHARE for layer in self.layers)
        return tuple(max(ALIGNMENT, min(KV_UNIT, share // ALIGNMENT * ALIGNMENT)) for share in shares)

    @cached_property
    def begins(self) -> tuple[int, ...]:
        """Offset of every layer in the slot on disk, and the end."""
        return (0, *accumulate(aligned(layer.stream_bytes(self.capacity)) for layer in self.layers))

    @property
    def nbytes(self) -> int:
        """Bytes of the slot on disk."""
        return self.begins[-1]

    def written(self, layer: int, tokens: int) -> int:
        """Bytes of a layer's stream of so many tokens that are on disk."""
        unit = self.units[layer]
        return self.layers[layer].stream_bytes(tokens) // unit * unit

    @cached_property
    def tail_begins(self) -> tuple[int, ...]:
        """Offset of every layer in the tail, and the end: up to a unit of its stream, then exact rows."""
        return (0, *accumulate(self._tail_stream(i) + self._tail_rows(i) for i in range(len(self.layers))))

    @property
    def tail_bytes(self) -> int:
        """Bytes of the tail in host memory."""
        return self.tail_begins[-1]

    def tail_rows_begin(self, layer: int) -> int:
        """Offset of a layer's exact rows in the tail."""
        return self.tail_begins[layer] + self._tail_stream(layer)

    def _tail_stream(self, layer: int) -> int:
        most = self.layers[layer].stream_bytes(self.capacity)
        return aligned(min(self.units[layer], most), IN_MEMORY)

    def _tail_rows(self, layer: int) -> int:
        form = self.layers[layer]
        rows = form.rows_held(self.capacity) if form.form else 0
        return aligned(rows * form.row_bytes, IN_MEMORY)


def kv_layers(spec: ModelSpec, policy: Policy) -> tuple[KVLayer, ...]:
    """Per layer how the KV cache is laid out."""
    size = DTYPE_BYTES[spec.compute_dtype]
    return tuple(KVLayer(key, value, policy.kv_quant, size) for key, value in spec.kv_widths)


def kv_bytes(spec: ModelSpec, policy: Policy, tokens: int) -> int:
    """Bytes of one sequence's region in the KV cache, over all layers."""
    return sum(layer.nbytes(tokens) for layer in kv_layers(spec, policy)) if tokens else 0
