"""Where sequences lie in the KV cache: one region per sequence in the tier of its slot.

A region holds for every layer its *data*, bytes that are only ever appended to (packed blocks of tokens or,
in an uncompressed cache, their exact rows), and *loose rows*: a packed cache's newest tokens, exact until
they fill a block. In memory both lie side by side. On disk a region has a slot of the run's one file, in
which whole units of the data lie; the rest of the data and the loose rows are in its tail in host memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate

from torch import Tensor

from engine.spec.hardware import Tier
from engine.spec.kv_layout import KVLayer, KVSlot


@dataclass(frozen=True)
class DiskSlot:
    """One slot of the file, and its tail."""

    layout: KVSlot
    index: int
    """Which slot of the file."""

    tail: Tensor
    """uint8 in host memory, `KVSlot.tail_bytes`."""

    def begin(self, layer: int) -> int:
        """Offset of a layer's data in the file."""
        return self.index * self.layout.nbytes + self.layout.begins[layer]

    def tail_data(self, layer: int, begin: int, end: int) -> Tensor:
        """Bytes ``begin`` to ``end`` of what follows the units on disk."""
        first = self.layout.tail_begins[layer]
        return self.tail[first + begin : first + end]

    def rows(self, layer: int, begin: int, end: int) -> Tensor:
        """Bytes ``begin`` to ``end`` of the loose rows."""
        first = self.layout.tail_rows_begin(layer)
        return self.tail[first + begin : first + end]


@dataclass
class Region:
    """Where one sequence's KV cache lives."""

    tier: Tier
    capacity: int
    layers: tuple[KVLayer, ...]
    data: Tensor | None = None
    """uint8, all layers one after the other, where the tier is memory."""

    slot: DiskSlot | None = None
    """Where the tier is disk."""

    length: int = 0
    """Tokens that are in it."""

    padding: int = 0
    """Number of the first of them that are never attended to."""

    @cached_property
    def begins(self) -> list[int]:
        """Offset of every layer in memory, and the end."""
        return [0, *accumulate(layer.nbytes(self.capacity) for layer in self.layers)]

    @cached_property
    def addresses(self) -> list[int]:
        """Where in memory every layer begins."""
        assert self.data is not None
        return [self.data.data_ptr() + begin for begin in self.begins]

    @property
    def nbytes(self) -> int:
        """Bytes of all layers as one piece."""
        return self.begins[-1]

    def data_of(self, layer: int, begin: int, end: int) -> Tensor:
        """Bytes ``begin`` to ``end`` of a layer's data, in memory."""
        assert self.data is not None
        first = self.begins[layer]
        return self.data[first + begin : first + end]

    def rows(self, layer: int, begin: int, end: int) -> Tensor:
        """Bytes ``begin`` to ``end`` of a layer's loose rows, in memory: the region itself or its tail."""
        if self.slot is not None:
            return self.slot.rows(layer, begin, end)
        assert self.data is not None
        first = self.begins[layer] + self.layers[layer].rows_begin(self.capacity)
        return self.data[first + begin : first + end]


@dataclass
class LayerPart:
    """One sequence's KV cache at one layer where it is computed with: in its region, or in a buffer."""

    region: Region
    layer: int
    data: Tensor
    """uint8: the data, long enough for what this pass adds; of exact numbers the bytes of ``rows``."""

    rows: Tensor
    """[n, keys + values] of the computing precision: exact past tokens, then at least the fresh ones."""

    fresh: int

    past: int = field(init=False)
    """Tokens before this pass."""

    packed_tokens: int = field(init=False)
    """Those of them that are packed."""

    tail: int = field(init=False)
    """Those of them that are exact rows."""

    newly_packed: int = field(init=False)
    """Tokens to be packed at the end of this pass, the oldest rows first."""

    def __post_init__(self) -> None:
        self.past = self.region.length
        self.packed_tokens = self.form.packed_tokens(self.past)
        self.tail = self.past - self.packed_tokens
        self.newly_packed = self.form.packed_tokens(self.past + self.fresh) - self.packed_tokens

    @property
    def form(self) -> KVLayer:
        """How it is laid out."""
        return self.region.layers[self.layer]

    @property
    def new_blocks(self) -> Tensor:
        """Where the blocks lie that this pass fills."""
        return self.data[self.form.packed_bytes(self.past) : self.form.packed_bytes(self.past + self.fresh)]

    @property
    def is_last(self) -> bool:
        """Whether the sequence ends with this pass, so that nothing of it is read again."""
        return self.past + self.fresh >= self.region.capacity


def past_in_memory(region: Region, layer: int) -> Iterator[tuple[bool, int, Tensor]]:
    """The past of a region that has to be copied from memory: (whether loose rows, offset there, bytes)."""
    form, length = region.layers[layer], region.length
    begin, end = 0, form.data_bytes(length)
    if region.slot is not None:
        begin = region.slot.layout.written(layer, length)
    if end > begin:
        source = (
            region.data_of(layer, 0, end)
            if region.slot is None
            else region.slot.tail_data(layer, 0, end - begin)
        )
        yield False, begin, source
    loose = form.loose_tokens(length) * form.row_bytes
    if loose:
        yield True, 0, region.rows(layer, 0, loose)
