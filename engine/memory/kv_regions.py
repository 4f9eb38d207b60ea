"""Room for sequences in the KV cache: one region per sequence in the tier of its seat.

A region holds for every layer packed blocks of tokens, if the policy packs, and rows of exact numbers:
all tokens of an uncompressed cache, the newest ones of a packed one.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate

from torch import Tensor

from engine.memory.storage import DiskFile
from engine.spec.hardware import Tier
from engine.spec.layout import KVLayer


@dataclass
class Region:
    """Where one sequence's KV cache lives."""

    tier: Tier
    capacity: int
    layers: tuple[KVLayer, ...]
    data: Tensor | None = None
    file: DiskFile | None = None
    length: int = 0
    """Tokens that are in it."""

    @cached_property
    def begins(self) -> list[int]:
        """Offset of every layer, and the end."""
        return [0, *accumulate(layer.nbytes(self.capacity) for layer in self.layers)]

    @property
    def nbytes(self) -> int:
        """Bytes of all layers."""
        return self.begins[-1]

    def read(self, offset: int, into: Tensor) -> int:
        """Fill ``into``, uint8, with the bytes at an offset; returns the bytes read from disk."""
        if self.file is not None:
            self.file.read(offset, into)
            return len(into)
        assert self.data is not None
        into.copy_(self.data[offset : offset + len(into)])
        return 0

    def write(self, offset: int, source: Tensor) -> int:
        """Keep ``source``, uint8, at an offset; returns the bytes written to disk."""
        if self.file is not None:
            self.file.write(offset, source)
            return len(source)
        assert self.data is not None
        self.data[offset : offset + len(source)].copy_(source)
        return 0


@dataclass
class LayerPart:
    """One sequence's KV cache at one layer where it is computed with: at home, or in a buffer."""

    region: Region
    layer: int
    data: Tensor
    """uint8: packed blocks, then rows."""

    rows: Tensor
    """[room, keys + values] of the computing precision: exact past tokens, then fresh ones."""

    fresh: int

    past: int = field(init=False)
    """Tokens before this pass."""

    packed_tokens: int = field(init=False)
    """How many of them are packed."""

    tail: int = field(init=False)
    """How many of them are exact rows."""

    newly_packed: int = field(init=False)
    """Tokens that are to be packed at the end of this pass, the oldest rows first."""

    def __post_init__(self) -> None:
        self.past = self.region.length
        self.packed_tokens = self.form.packed_tokens(self.past)
        self.tail = self.past - self.packed_tokens
        self.newly_packed = self.form.packed_tokens(self.past + self.fresh) - self.packed_tokens

    @property
    def form(self) -> KVLayer:
        """How it is laid out."""
        return self.region.layers[self.layer]
