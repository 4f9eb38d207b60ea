"""How attention of packed tokens runs: through `transformers`' interface, or sequence by sequence.

A family without an attention interface, or one that counts positions from its cache, is given each sequence
apart: the base model is run for it alone, with a cache of ours in which its past is, so that masks, ALiBi and
positions are those that `transformers` itself makes. What is split by sequences is the attention module where
the rest of the layer takes packed tokens, otherwise the layer.
"""

from __future__ import annotations

import enum
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Cache

from engine.errors import UnsupportedModelError
from engine.kernels.calls import CachedSequence
from engine.kernels.reference_attention import unpack_tokens
from engine.models.attention import ATTENTION_NAME, AttentionBatch, attending, current_batch
from engine.models.decoder.parts import Parts
from engine.models.decoder.stand_ins import LayerCall, StandIn, hidden_of, record_layers
from engine.spec.kv_format import KVFormat


class Way(enum.Enum):
    """How a model's attention runs, the fastest first."""

    PACKED = "packed"
    """All sequences at once, through the attention interface."""

    ATTENTION = "attention"
    """The attention module of each layer, one sequence after the other."""

    LAYER = "layer"
    """Each layer, one sequence after the other."""

    @property
    def implementation(self) -> str:
        """Name of the attention implementation that the model is built with."""
        return ATTENTION_NAME if self is Way.PACKED else "eager"


class SequenceCache(Cache):
    """`transformers`' view of one sequence's keys and values at the layer that is running."""

    def __init__(self, index: int, past: int) -> None:
        """Args: index of the sequence in its device batch, and its tokens before this pass."""
        self.layers: list[Any] = []
        self.layer_class_to_replicate = None
        self.offloading = False
        self._index, self._past = index, past
        self._added: dict[int, int] = {}  # by layer, in this pass

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self._past + self._added.get(layer_idx, 0)

    def get_query_offset(self, layer_idx: int = 0) -> int:
        return self._past

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        return self._past + query_length, 0

    def get_max_length(self, layer_idx: int = 0) -> int:
        return -1

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int = 0, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append fresh keys [1, G, T, D] and values [1, G, T, E]; return all n tokens' [1, G, n, D or E]."""
        self._added[layer_idx] = key_states.shape[2]
        batch = current_batch()
        padding = batch.padding[self._index] if batch.padding else 0
        key, value = (
            F.pad(part[0].transpose(0, 1), (0, 0, 0, 0, padding, 0)) for part in (key_states, value_states)
        )
        found = batch.key_values.extend(self._index, key, value)
        if isinstance(found, CachedSequence):
            found = _unpacked(found, batch.key_values.form, key, value)
        return found[0].transpose(0, 1)[None], found[1].transpose(0, 1)[None]


def _unpacked(
    cached: CachedSequence, form: KVFormat | None, key: Tensor, value: Tensor
) -> tuple[Tensor, Tensor]:
    """All keys [n, G, D] and values [n, G, E] of a sequence of which some tokens may be packed."""
    rows, keys = cached.rows, key[0].numel()
    if cached.packed_tokens:
        assert form is not None
        past = rows.new_empty(cached.packed_tokens, rows.shape[1])
        unpack_tokens(cached.packed, cached.packed_tokens, form, keys, value[0].numel(), past)
        rows = torch.cat([past, rows])
    return rows[:, :keys].unflatten(1, key.shape[1:]), rows[:, keys:].unflatten(1, value.shape[1:])


class SequenceCalls:
    """How one layer wants to be called for each sequence of a device batch."""

    def __init__(self, calls: Sequence[LayerCall], rows: Sequence[slice], tokens: int) -> None:
        """Args: ``rows`` of each sequence among the ``tokens`` that are packed, padding left out."""
        self.calls, self.rows, self.tokens = calls, rows, tokens
        self._of: dict[int, list[Any]] = {}
        for values in zip(*(_values(call) for call in calls), strict=True):
            self._note(values)

    def _note(self, values: tuple[Any, ...]) -> None:
        first = values[0]
        if isinstance(first, (Tensor, Cache, tuple, list)):
            self._of[id(first)] = list(values)
        if isinstance(first, (tuple, list)):
            for parts in zip(*values, strict=True):
                self._note(parts)

    def part(self, value: Any, index: int) -> Any:
        """What stands for an argument of all packed tokens in the call of one sequence."""
        if id(value) in self._of:
            return self._of[id(value)][index]
        if isinstance(value, Tensor) and value.dim() > 1 and value.shape[1] == self.tokens:
            return value[:, self.rows[index]]
        if isinstance(value, (tuple, list)):
            return type(value)(self.part(part, index) for part in value)
        return value

    def apart(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call a function of [1, P, ...] for each sequence and put the results [1, T, ...] together again."""
        whole: Tensor | None = None
        rest: tuple[Any, ...] | None = None
        for index, rows in enumerate(self.rows):
            own = {name: self.part(value, index) for name, value in kwargs.items()}
            out = function(*(self.part(value, index) for value in args), **own)
            first = hidden_of(out)
            if whole is None:
                whole = first.new_zeros(1, self.tokens, *first.shape[2:])
                rest = tuple(out[1:]) if first is not out else None
            whole[:, rows] = first
        return whole if rest is None else (whole, *rest)


def _values(call: LayerCall) -> list[Any]:
    return [*call.args, *call.kwargs.values()]


class _Apart(StandIn):
    """Stands in for an attention module: calls it for each sequence."""

    def __init__(self, module: nn.Module, calls: SequenceCalls) -> None:
        super().__init__(module)
        self._calls = calls

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._calls.apart(self._module[0], args, kwargs)


def record_sequences(
    parts: Parts,
    outputs: int,
    input_ids: Tensor,
    position_ids: Tensor,
    lengths: Sequence[int],
    padding: Sequence[int],
    last: int | None = None,
) -> tuple[Tensor, list[SequenceCalls | None]]:
    """Embed packed tokens sequence by sequence.

    Args:
        outputs, last: see `record_layers`.
        input_ids: [1, P]; position_ids: [1, P] their positions within each sequence.
        lengths: fresh tokens of each sequence; padding: how many of them come before it, empty for none.

    Returns:
        Hidden states [1, P, hidden] and, for every layer, how it wants to be called for each sequence.
    """
    starts = list(accumulate(lengths, initial=0))
    takes = inspect.signature(parts.base.forward).parameters
    if not any(name == "past_key_values" or each.kind is each.VAR_KEYWORD for name, each in takes.items()):
        raise UnsupportedModelError(
            f"{type(parts.causal).__name__} is refused: it keeps no keys and values of earlier tokens"
        )
    whole: Tensor | None = None
    recorded, rows = [], []
    for index, length in enumerate(lengths):
        begin = starts[index] + (padding[index] if padding else 0)
        own = slice(begin, starts[index] + length)
        cache = SequenceCache(index, int(position_ids[0, begin]))
        inputs = {"input_ids": input_ids[:, own], "past_key_values": cache, "use_cache": True}
        hidden, calls = record_layers(parts, inputs, outputs, last)
        if whole is None:
            whole = hidden.new_zeros(1, input_ids.shape[1], *hidden.shape[2:])
        whole[:, own] = hidden
        recorded.append(calls)
        rows.append(own)
    assert whole is not None
    return whole, [
        SequenceCalls([call for call in calls if call is not None], rows, input_ids.shape[1])
        if calls[0] is not None
        else None
        for calls in zip(*recorded, strict=True)
    ]


def run_apart(layer: nn.Module, hidden: Tensor, calls: SequenceCalls, batch: AttentionBatch, way: Way) -> Any:
    """One layer over a device batch: its result for hidden states [1, P, hidden]."""
    with attending(batch):
        if way is Way.LAYER:
            out = None
            for index, rows in enumerate(calls.rows):
                call = calls.calls[index]
                part = layer(hidden[:, rows], *call.args, **call.kwargs)
                part = hidden_of(part)
                out = torch.zeros_like(hidden) if out is None else out
                out[:, rows] = part
        else:
            call = calls.calls[0]
            with _split_attention(layer, calls):
                out = layer(hidden, *call.args, **call.kwargs)
    batch.key_values.commit()
    return out


@contextmanager
def _split_attention(layer: nn.Module, calls: SequenceCalls) -> Iterator[None]:
    """Let a layer's attention modules be called sequence by sequence."""
    places = attention_modules(layer)
    for owner, name, module in places:
        owner._modules[name] = _Apart(module, calls)
    try:
        yield
    finally:
        for owner, name, module in places:
            owner._modules[name] = module


def attention_modules(layer: nn.Module) -> list[tuple[nn.Module, str, nn.Module]]:
    """The outermost modules of a layer that are attention by their class: owner, name and module."""
    found: list[tuple[nn.Module, str, nn.Module]] = []
    for name, child in layer.named_children():
        if "attention" in type(child).__name__.lower():
            found.append((layer, name, child))
        else:
            found += attention_modules(child)
    return found
