"""What the kernels are called with: packed matrices, attention calls, cached keys and values.

Axes: P tokens of a device batch packed in one row, S sequences with one fresh token each, H query heads,
G key-value heads, D head width, E value head width.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
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
    """Set by the C kernels at the first product: addresses and sizes that stay the same."""


@dataclass(frozen=True)
class RowSource:
    """An embedding table that stays in its tier: only the rows that are looked up are copied."""

    gather: Callable[[Tensor], Tensor]
    """ids [...] -> [..., width] in the computing precision, on the device of the ids."""


Computable = Tensor | PackedMatrix | RowSource
"""What a module may compute with in place of a parameter."""


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
    """All n tokens that the newest one's query attends to: packed ones, then exact ones."""

    packed: Tensor
    """uint8, contiguous: blocks of tokens, see `engine.spec.kv_format`."""

    packed_tokens: int

    rows: Tensor
    """[n - packed_tokens, G * D + G * E] of the computing precision, the query's own token last."""


class DecodeTable:
    """Addresses of the past of each of S decoding sequences; made for every layer of every pass."""

    def __init__(
        self,
        packed: Sequence[int],
        packed_tokens: Sequence[int],
        rows: Sequence[int],
        row_counts: Sequence[int],
        packs: Sequence[int],
    ) -> None:
        """Take one number per sequence from each.

        Args:
            packed: address of its packed tokens, contiguous blocks; not read where there are none.
            packed_tokens: their number.
            rows: address of its exact rows, float32 [n + 1, G * D + G * E], the oldest first; the last one
                is free for the fresh token.
            row_counts: n.
            packs: 1 if the fresh row is packed behind the packed tokens after attention, else 0.
        """
        self._count = len(packed)
        self._columns = array("q", [*packed, *packed_tokens, *rows, *row_counts, *packs])
        first, _ = self._columns.buffer_info()
        step = self._columns.itemsize * self._count
        self.addresses = (first, first + step, first + 2 * step, first + 3 * step, first + 4 * step)
        """Of the five columns, int64 [S] each, valid as long as this object lives."""

    def __len__(self) -> int:
        return self._count


@dataclass(frozen=True)
class AttentionOptions:
    """What changes the scores."""

    scale: float
    window: int | None = None
    """Number of newest tokens that are visible, the query's own among them; None for all."""

    softcap: float | None = None
    sinks: Tensor | None = None
    """Attention sinks [H]: scores that take part in the softmax and carry no value."""

    fraction: float = 1.0
    """Sparse attention: each query head attends to this fraction of the visible past tokens, those with the
    highest scores, and to its own. Values of the others are not read (FlexGen paper, section 5)."""

    precision: MatmulPrecision = MatmulPrecision.HIGHEST
    """Of the products in attention of whole prompts on a CPU."""

    chunk: int | None = None
    """Tokens see those of the same chunk of so many positions; None where all are in one. Kernels need not
    know: they are called for pieces of a prompt, and for decoding sequences with windows of their own."""

    def kept(self, past: int) -> int:
        """How many of ``past`` visible past tokens a head attends to; at least one, if there is one."""
        return past if self.fraction >= 1 else min(past, max(1, int(self.fraction * past)))


@dataclass(frozen=True)
class AttentionCall:
    """What one layer asks for: attention of a device batch's fresh tokens. All kernels read it.

    What the tokens attend to is handed over beside it, as each kernel wants it: a `DecodeTable`, a
    `CachedSequence` for each query, or the places of whole prompts.
    """

    query: Tensor
    """[P, H, D]; [S, H, D] where every sequence has one fresh token."""

    key: Tensor
    """[P, G, D], of the fresh tokens; not read where these are in a `CachedSequence` already."""

    value: Tensor
    """[P, G, E], likewise."""

    shape: HeadShape
    options: AttentionOptions
    out: Tensor
    """[P, H, E], written."""

    lse: Tensor | None = None
    """float32 [P, H], written: the log-sum-exp of each query's scores, by which attention to other tokens
    can be joined to it; None if it is not needed."""

    windows: Sequence[int] | None = None
    """How many of its newest tokens each decoding sequence sees, where they differ; see `each_window`."""


def each_window(
    attention: Callable[..., Any], call: AttentionCall, sequences: Sequence[CachedSequence], form: Any
) -> None:
    """Attend for S decoding sequences, one by one where each sees another number of tokens.

    Args:
        attention: takes one window for all: `Kernels.attention`.
        call: ``query`` [S, H, D], ``key`` [S, G, D] and ``value`` [S, G, E]; ``out`` [S, H, E] is written.
        form: how packed tokens are kept; None where none are.
    """
    if call.windows is None:
        attention(call, sequences, form)
        return
    for index, window in enumerate(call.windows):
        one = slice(index, index + 1)
        lse = None if call.lse is None else call.lse[one]
        part = replace(
            call, query=call.query[one], key=call.key[one], value=call.value[one], out=call.out[one], lse=lse,
            options=replace(call.options, window=window, chunk=None), windows=None,
        )  # fmt: skip
        attention(part, [sequences[index]], form)


@dataclass(frozen=True)
class PrefixRows:
    """Rows of a device batch that attend to one shared prefix."""

    begin: int
    """Position of the prefix's first token."""

    places: Tensor | None
    """int64 [R]: which of the packed tokens; None for all of them."""

    positions: Tensor
    """int64 [R]: their positions."""


StateKey = tuple[str, int]
"""Which state of a recurrent module: its kind, ``conv`` or ``recurrent``, and its number among them."""


@dataclass(frozen=True)
class StateGroup:
    """S sequences that a recurrent module computes together, T tokens of each."""

    places: slice | Tensor
    """Of their tokens among the packed ones, sequence after sequence; int64 [S * T] where it is a tensor."""

    sequences: int
    tokens: int
    """Of each of them; 1 where there are several."""

    tensors: Mapping[StateKey, Tensor]
    """[S, ...] each: read where there is a past, and updated; empty where nothing is kept."""

    has_past: bool
