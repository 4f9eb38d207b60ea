"""How things are laid out where they are kept: shared by who plans the bytes and who allocates them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from itertools import accumulate

from engine.spec.float_format import FLOAT_KINDS, FloatSpec, MatrixForm
from engine.spec.hardware import Tier
from engine.spec.kv_format import KVFormat
from engine.spec.model import DTYPE_BYTES, ModelSpec, TensorSpec
from engine.spec.policy import Policy
from engine.units import MIB

SLOTS = 2
"""Buffers per kind that loads alternate between: one in use, one being filled."""

FIRST_STAGE_SLOT = SLOTS
WEIGHT_SLOTS = SLOTS + 1
"""Weight buffers: two that the layers and the head share in turn, and one of the first stage alone, which is
small: of embedding tables elsewhere only the rows that are asked for are brought."""

LOGITS_ROWS = 64
"""Positions whose logits are held at once."""

FUSED_ROWS = 16
"""Most rows of activations whose product on an accelerator reads the packed matrix itself; more are worth
unpacking it once."""

QUERY_ROWS = 256
"""Queries whose attention scores are held at once, where they must be written out."""

CONVERT_VALUES = 1 << 18
"""Values that are packed or unpacked at once; bounds the temporaries."""


ALIGNMENT = 4096
"""Bytes: every weight on disk begins at a multiple of it, as reads past the page cache want."""


LARGEST_RAW = 1 * MIB
"""Bytes of a weight that is converted from a stage's own buffer; larger ones share one for all stages."""

STAGING_BUFFERS = 3
"""Pinned buffers of one kind between disk and a device that is a memory of its own."""

STAGING_BYTES = 16 * MIB
"""Size of each of those through which weights pass, at most."""

KV_UNIT = 128 << 10
"""Bytes of one layer of one sequence's KV cache that are written to disk at once, at least."""

KV_TAIL_SHARE = 8
"""Such a unit, which host memory holds until it is full, is at most one of so many parts of the layer's."""

KV_STAGE = 8 << 20
"""Bytes of the KV cache that are staged at once between disk and a device that is a memory of its own."""


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

    weights: Mapping[str, KeptWeight]
    """How and where every weight is kept."""

    kv_seats: Sequence[Tier]
    activation_seats: Sequence[Tier]
    """Tier of every seat of the block, for its KV cache and its hidden states."""

    tiers: Mapping[Tier, Mapping[str, int]]
    """Bytes per tier and purpose."""

    batch_tokens: int
    """Most packed tokens of one device batch in a pass."""

    kv_moves: bool
    """Whether some of the KV cache has to be brought to the device for attention and written back."""

    kv_buffer: int
    """Bytes that hold what a device batch needs of one layer's KV cache, fresh rows included."""

    stage_buffers: tuple[int, ...]
    """Bytes of each of the `WEIGHT_SLOTS` buffers: of the largest stage that is brought into it."""

    staging: int
    """Bytes of one buffer between the disk and a stage's buffers, see `KeptWeight.staged`; 0 for none."""

    converting: int
    """Bytes of the largest weight that is staged."""

    prefix_stage: int
    """Bytes of a buffer that holds one layer of the shared prefixes in use; 0 where they are near."""

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

    @property
    def together(self) -> int:
        """Most bytes of device and host, which are one memory on a machine without an accelerator."""
        return self.total(Tier.DEVICE) + self.total(Tier.HOST)


class Ready(StrEnum):
    """In which form a weight is computed with."""

    IN_PLACE = "in place"
    """Where it is kept, exact or packed."""

    AS_KEPT = "as kept"
    """Brought into a buffer and not changed: packed, or already in the precision that is computed in."""

    EXACT = "exact"
    """Brought into a buffer and unpacked or converted."""


@dataclass(frozen=True)
class KeptWeight:
    """How one weight is kept, and what has to be done before it can be computed with."""

    tensor: TensorSpec
    tier: Tier

    form: MatrixForm | None
    """What its bytes are; None for plain numbers that no kernel computes with as they are."""

    dtype: str
    """Kind of number that is kept; ``uint8`` for packed ones."""

    ready: Ready
    nbytes: int
    """Bytes in its tier."""

    raw_room: int
    """Bytes of a stage's buffer for what is kept, as it is brought from elsewhere."""

    exact_room: int
    """Bytes of a stage's buffer for the numbers that are made of it."""

    near: bool
    """Whether the device reads it where it is kept."""

    @property
    def room(self) -> int:
        """Bytes of a stage's buffer."""
        return self.raw_room + self.exact_room

    def brought(self, stage: int) -> bool:
        """Whether it is brought into the buffer of a stage that reads it."""
        return self.ready is not Ready.IN_PLACE and not (stage == 0 and self.by_rows)

    @property
    def by_rows(self) -> bool:
        """Whether the first stage brings only those of its rows that are asked for."""
        whole_rows = self.form is None or isinstance(self.form, FloatSpec)
        return self.tensor.table and whole_rows and not self.near

    @property
    def staged(self) -> bool:
        """Whether it is brought into a buffer that all stages share, and unpacked or converted from there."""
        return self.ready is Ready.EXACT and not self.raw_room and not self.near


def kept_weight(
    tensor: TensorSpec, tier: Tier, policy: Policy, compute_dtype: str, unified: bool, computes_packed: bool
) -> KeptWeight:
    """Decide it for one weight.

    Args:
        unified: whether device and host are one memory.
        computes_packed: whether products are computed straight from packed weights, whatever their rows.
    """
    form, near = kept_form(tensor, policy, computes_packed), is_near(tier, unified)
    compute_bytes = DTYPE_BYTES[compute_dtype]
    if form is None:
        # Vectors are few bytes: where they are near they are kept as they are needed.
        as_needed = tier is Tier.DEVICE or (near and not tensor.is_matrix)
        dtype = compute_dtype if as_needed else tensor.dtype
        nbytes = tensor.numel * DTYPE_BYTES[dtype]
        converts = dtype != compute_dtype
    else:
        dtype, nbytes = "uint8", form.nbytes(*tensor.matrix)
        integer = form.activation_bits != 16  # a product of integers cannot be made of unpacked numbers
        converts = not tensor.fused or not (computes_packed or integer)
    ready = Ready.EXACT if converts else Ready.IN_PLACE if near else Ready.AS_KEPT
    raw_room = 0
    if not near and (ready is Ready.AS_KEPT or nbytes <= LARGEST_RAW):
        raw_room = aligned(nbytes + ALIGNMENT) if tier is Tier.DISK else aligned(nbytes, IN_MEMORY)
    exact_room = aligned(tensor.numel * compute_bytes, IN_MEMORY) if converts else 0
    return KeptWeight(tensor, tier, form, dtype, ready, nbytes, raw_room, exact_room, near)


def kept_form(tensor: TensorSpec, policy: Policy, computes_packed: bool) -> MatrixForm | None:
    """What the bytes of a weight are.

    Numbers of 16 bits are computed with as they are where the kernels can, for a CPU's own arithmetic
    in 16 bits is emulated, and float32 would take twice the room and the time to convert.
    """
    form = policy.weight_quant.of(tensor)
    raw = computes_packed and tensor.fused and not tensor.transposed and len(tensor.shape) == 2
    if form is None and raw and tensor.dtype in FLOAT_KINDS:
        return FloatSpec(tensor.dtype)
    return form


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


def prefix_begins(layers: Sequence[KVLayer], tokens: int) -> list[int]:
    """Offset of every layer of a shared prefix of so many tokens in one version of it, and the end.

    A layer holds its keys and then its values, in the precision that is computed in; it begins where a read
    past the page cache can.
    """
    return [0, *accumulate(aligned(tokens * layer.row_bytes) for layer in layers)]


def prefix_bytes(layers: Sequence[KVLayer], tokens: int) -> int:
    """Most bytes that a shared prefix takes: of two versions, exact and rounded, where the policy packs."""
    return prefix_begins(layers, tokens)[-1] * (2 if layers and layers[0].form else 1)


def prefix_stage_bytes(layers: Sequence[KVLayer], prefixes: Sequence[int]) -> int:
    """Bytes of a buffer for one layer of all prefixes of so many tokens, both versions."""
    versions = 2 if layers and layers[0].form else 1
    widest = max((layer.row_bytes for layer in layers), default=0)
    return versions * sum(aligned(tokens * widest) for tokens in prefixes)
