"""What the kernels are called with: a packed matrix, and the cached keys and values of one sequence."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from engine.spec.float_format import MatrixForm
from engine.spec.precision import MatmulPrecision


@dataclass(frozen=True)
class PackedMatrix:
    """A weight [rows, width] (output features, input features) in few bits, or in 16-bit floats."""

    data: Tensor
    """uint8 [blocks, block_bytes], contiguous."""

    spec: MatrixForm
    rows: int
    width: int

    input_scale: Tensor | None = None
    """float [width]: divides the activations first, where their outliers were smoothed into the weight."""

    prepared: Any = field(default=None, init=False, repr=False, compare=False)
    """What the C kernels keep of it from the first product on."""


@dataclass(frozen=True)
class RowSource:
    """An embedding table that stays where it is kept: only the rows that are asked for are brought."""

    gather: Callable[[Tensor], Tensor]
    """ids [...] -> [..., width] in the computing precision, on the device of the ids."""


Computable = Tensor | PackedMatrix | RowSource
"""What a module may find in the place of a weight."""


@dataclass(frozen=True)
class HeadShape:
    """H query heads of width D over G key-value heads; values have width E."""

    heads: int
    groups: int
    key_width: int
    value_width: int

    @property
    def keys(self) -> int:
        """Values of one token's keys."""
        return self.groups * self.key_width

    @property
    def values(self) -> int:
        """Values of one token's values."""
        return self.groups * self.value_width


@dataclass(frozen=True)
class CachedSequence:
    """All n tokens that one query, the newest token's, attends to: packed ones, then exact ones."""

    packed: Tensor
    """uint8, contiguous: blocks of tokens, see `engine.spec.kv_format`."""

    packed_tokens: int

    rows: Tensor
    """[n - packed_tokens, keys + values] of the computing precision, the query's own token last."""


class DecodeTable:
    """Where the past of every sequence of a batch lies that decodes one token each; made for every layer."""

    def __init__(
        self,
        packed: Sequence[int],
        packed_tokens: Sequence[int],
        rows: Sequence[int],
        row_counts: Sequence[int],
        packs: Sequence[int],
    ) -> None:
        """Take for each sequence

        - the address of its packed tokens, contiguous blocks; where nothing is packed it is not read,
        - how many they are,
        - the address of its exact rows of float32, keys then values of a token, the oldest first, with room
          for one more,
        - how many they are,
        - whether (1) or not (0) the fresh row is packed behind the packed tokens once it was attended to.
        """
        self._count = len(packed)
        self._columns = array("q", [*packed, *packed_tokens, *rows, *row_counts, *packs])
        first, _ = self._columns.buffer_info()
        step = self._columns.itemsize * self._count
        self.addresses = (first, first + step, first + 2 * step, first + 3 * step, first + 4 * step)
        """Of the five columns, int64 [S] each, for as long as this object is kept."""

    def __len__(self) -> int:
        return self._count


@dataclass(frozen=True)
class AttentionOptions:
    """What changes the scores."""

    scale: float
    window: int | None = None
    """Newest tokens that are visible, the query's own among them; None for all."""

    softcap: float | None = None
    sinks: Tensor | None = None
    """[H] scores that take part in the softmax and carry no value."""

    fraction: float = 1.0
    """Part of the visible past tokens, by score, that each query head attends to beside its own token.

    The others' values are not read (FlexGen paper, section 5, "Sparse Attention").
    """

    precision: MatmulPrecision = MatmulPrecision.HIGHEST
    """Of the products of whole prompts on a CPU."""

    def kept(self, past: int) -> int:
        """How many of so many visible past tokens a head attends to; at least one, if there is one."""
        return past if self.fraction >= 1 else min(past, max(1, int(self.fraction * past)))
