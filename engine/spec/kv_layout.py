"""How the KV cache is laid out where it is kept, in memory and on disk."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

from engine.spec.kv_format import KVFormat
from engine.spec.layout import ALIGNMENT, IN_MEMORY, aligned
from engine.spec.model import DTYPE_BYTES, ModelSpec
from engine.spec.policy import Policy

KV_UNIT = 128 << 10
"""Bytes of one layer of one sequence's KV cache that are written to disk at once, at least."""

KV_TAIL_SHARE = 8
"""Such a unit, which host memory holds until it is full, is at most this fraction, 1 / 8, of the layer's."""


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
        """How many of ``tokens`` are packed."""
        return self.form.packed_tokens(tokens) if self.form else 0

    def packed_bytes(self, tokens: int) -> int:
        """Bytes of those of ``tokens`` that are packed."""
        return self.packed_tokens(tokens) // self.form.block_tokens * self.block_bytes if self.form else 0

    def rows_begin(self, capacity: int) -> int:
        """Offset of the exact rows in a region for ``capacity`` tokens."""
        return aligned(self.packed_bytes(capacity), IN_MEMORY)

    def rows_held(self, capacity: int) -> int:
        """Exact rows that such a region can hold, one of them for the next token.

        None where every token is packed at once.
        """
        if self.form is None:
            return capacity
        return min(capacity, self.form.tail_tokens + 1) if self.form.tail_tokens else 0

    def nbytes(self, capacity: int) -> int:
        """Bytes of a region for ``capacity`` tokens."""
        return self.rows_begin(capacity) + aligned(self.rows_held(capacity) * self.row_bytes, IN_MEMORY)

    def data_bytes(self, tokens: int) -> int:
        """Bytes of ``tokens`` that are only ever appended: packed blocks or, uncompressed, all rows."""
        return self.packed_bytes(tokens) if self.form else tokens * self.row_bytes

    def loose_tokens(self, tokens: int) -> int:
        """How many of ``tokens`` are exact rows that are packed later."""
        return tokens - self.packed_tokens(tokens) if self.form else 0


@dataclass(frozen=True)
class KVSlot:
    """Where a slot on disk keeps one sequence: whole units of every layer on disk, the newest in memory.

    A layer's data (packed blocks or, uncompressed, rows) is written a unit at a time. What does not
    fill one yet, and exact rows that are packed later, stay in the slot's *tail* in host memory.
    """

    layers: tuple[KVLayer, ...]
    capacity: int
    """Tokens."""

    @cached_property
    def units(self) -> tuple[int, ...]:
        """Per layer the bytes of a unit, a multiple of `ALIGNMENT`: as `KV_UNIT` and `KV_TAIL_SHARE` say."""
        shares = (layer.data_bytes(self.capacity) // KV_TAIL_SHARE for layer in self.layers)
        return tuple(max(ALIGNMENT, min(KV_UNIT, share // ALIGNMENT * ALIGNMENT)) for share in shares)

    @cached_property
    def begins(self) -> tuple[int, ...]:
        """Offset of every layer in the slot on disk, and the end."""
        return (0, *accumulate(aligned(layer.data_bytes(self.capacity)) for layer in self.layers))

    @property
    def nbytes(self) -> int:
        """Bytes of the slot on disk."""
        return self.begins[-1]

    def written(self, layer: int, tokens: int) -> int:
        """Bytes of a layer's data of ``tokens`` that are on disk."""
        unit = self.units[layer]
        return self.layers[layer].data_bytes(tokens) // unit * unit

    @cached_property
    def tail_begins(self) -> tuple[int, ...]:
        """Offset of every layer in the tail, and the end: up to a unit of its data, then exact rows."""
        return (
            0,
            *accumulate(self._tail_data_bytes(i) + self._tail_rows(i) for i in range(len(self.layers))),
        )

    @property
    def tail_bytes(self) -> int:
        """Bytes of the tail in host memory."""
        return self.tail_begins[-1]

    def tail_rows_begin(self, layer: int) -> int:
        """Offset of a layer's exact rows in the tail."""
        return self.tail_begins[layer] + self._tail_data_bytes(layer)

    def _tail_data_bytes(self, layer: int) -> int:
        most = self.layers[layer].data_bytes(self.capacity)
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
    """Offset of every layer of a shared prefix of ``tokens`` in one version of it, and the end.

    A layer holds its keys and then its values, in the precision that is computed in; it begins where a read
    past the page cache can.
    """
    return [0, *accumulate(aligned(tokens * layer.row_bytes) for layer in layers)]


def prefix_bytes(layers: Sequence[KVLayer], tokens: int) -> int:
    """Most bytes that a shared prefix takes: of two versions, exact and rounded, where the policy packs."""
    return prefix_begins(layers, tokens)[-1] * (2 if layers and layers[0].form else 1)


def prefix_stage_bytes(layers: Sequence[KVLayer], prefixes: Sequence[int]) -> int:
    """Bytes of a buffer for one layer of prefixes of these lengths, both versions."""
    versions = 2 if layers and layers[0].form else 1
    widest = max((layer.row_bytes for layer in layers), default=0)
    return versions * sum(aligned(tokens * widest) for tokens in prefixes)
