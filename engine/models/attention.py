"""The attention function that `transformers` calls inside a layer.

Tokens of a device batch are packed in one row without padding, so attention runs per sequence over
its own keys and values. Where those live and how they are kept is behind `KeyValues`; this module
does not know tiers or compression.

Axes: T fresh tokens of one sequence, n all its tokens so far, H query heads, G key-value heads,
D head width, E value head width, P packed tokens of the device batch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface

from engine.kernels.backend import Kernels
from engine.kernels.calls import AttentionCall, AttentionOptions, CachedSequence, HeadShape, each_window
from engine.kernels.reference_attention import softmax_with_sinks
from engine.models.decoder import masks
from engine.models.decoder.chunks import has_chunks, pieces
from engine.models.decoder.masks import Visible
from engine.models.prefix_attention import Prefixes, join_prefixes
from engine.models.prompt_attention import Prompt, attend_prompts, fused
from engine.spec.kv_format import KVFormat
from engine.spec.layout import QUERY_ROWS
from engine.spec.precision import MatmulPrecision

ATTENTION_NAME = "tierbench"

_UNDERSTOOD = {
    *("sliding_window", "softcap", "s_aux"),
    *("position_ids", "position_embeddings", "cache_position", "use_cache", "dropout", "is_causal"),
    *("output_attentions", "output_hidden_states", "return_dict"),
}
"""Arguments that are read, and those that layers pass on and that do not change the result."""


class KeyValues(Protocol):
    """Keys and values of one device batch at one layer."""

    kernels: Kernels
    """Those that attend to them."""

    form: KVFormat | None
    """How past tokens are packed; None where they are exact."""

    def extend(self, index: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor] | CachedSequence:
        """Append a sequence's fresh keys [T, G, D] and values [T, G, E]; return all of them.

        Returns [n, G, D] and [n, G, E], the fresh ones last and unchanged, or for a single fresh token
        what `Kernels.attention` needs; valid until the next call for this layer.
        """
        ...

    def decode(self, call: AttentionCall) -> bool:
        """Append one token per sequence and attend for all at once; False if this batch cannot.

        After True neither `extend` nor `commit` is called for this layer.
        """
        ...

    def commit(self) -> None:
        """All sequences of the batch have been attended to."""
        ...


class HostSequences(Protocol):
    """Sequences of a device batch that are attended to on the host, where their KV cache lies."""

    @property
    def indices(self) -> Sequence[int]:
        """Their places in the batch; each has one fresh token, for which `KeyValues` is not called."""
        ...

    def begin(self, call: AttentionCall) -> Callable[[], None]:
        """Begin to attend for these S sequences, ``call`` being of them alone.

        Call what is returned once, after the device's own work: it writes ``call.out`` and ``call.lse``.
        """
        ...


@dataclass
class AttentionBatch:
    """What the attention function needs to know about the device batch in flight."""

    lengths: Sequence[int]
    """Fresh tokens T of each sequence, in packed order."""

    key_values: KeyValues

    fraction: float = 1.0
    """Part of its past tokens that each head attends to in decoding."""

    host: HostSequences | None = None
    """Those that the host attends to beside the device; None for none."""

    prefixes: Prefixes | None = None
    """Prefixes that are computed or attended to beside the sequences' own tokens; None for none."""

    padding: Sequence[int] = ()
    """Fresh tokens at the beginning of each sequence that nothing attends to; empty for none anywhere."""

    begins: Sequence[int] = ()
    """Position of each sequence's first fresh token after its padding, for layers that attend in chunks."""

    precision: MatmulPrecision = MatmulPrecision.HIGHEST
    """Of the products of whole prompts where the CPU's kernels attend to them."""


_current: ContextVar[AttentionBatch] = ContextVar("attention_batch")


@contextmanager
def attending(batch: AttentionBatch) -> Iterator[None]:
    """Make ``batch`` the one that attention reads while a layer runs."""
    token = _current.set(batch)
    try:
        yield
    finally:
        _current.reset(token)


def current_batch() -> AttentionBatch:
    """The device batch whose layer is running."""
    return _current.get()


def packed_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Visible | None = None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Causal attention of each sequence over its own past; signature of `AttentionInterface`.

    Args:
        query: [1, H, P, D]; key [1, G, P, D]; value [1, G, P, E].
        attention_mask: what stands for a mask (`engine.models.decoder.masks`).
        kwargs: ``softcap`` squashes the scores (Gemma 2), ``s_aux`` are attention sinks per head (gpt-oss),
            ``sliding_window`` counts the query's own position.

    Returns:
        [1, P, H, E].

    Raises:
        NotImplementedError: for an argument that changes the result and is not understood; the
            architecture check turns it into a refusal by name.
    """
    visible = Visible() if attention_mask is None else attention_mask
    unknown = {name for name in kwargs.keys() - _UNDERSTOOD if kwargs[name] is not None}
    if not isinstance(visible, Visible) or unknown or kwargs.get("is_causal") is False:
        names = unknown | (set() if isinstance(visible, Visible) else {"attention_mask"})
        raise NotImplementedError(f"attention with {', '.join(sorted(names)) or 'is_causal=False'}")
    batch = _current.get(None)
    if batch is None:
        raise NotImplementedError("attention outside of its decoder layers")
    chunk = visible.chunk if has_chunks(visible.chunk, batch.begins, batch.lengths) else None
    heads, width = query.shape[1], query.shape[3]
    sinks = kwargs.get("s_aux")
    options = AttentionOptions(
        width**-0.5 if scaling is None else scaling, kwargs.get("sliding_window") or visible.window,
        kwargs.get("softcap"), sinks if batch.prefixes is None else None, batch.fraction, batch.precision,
        chunk,
    )  # fmt: skip
    out = query.new_empty(query.shape[2], heads, value.shape[3])
    lse = None if batch.prefixes is None else torch.empty(out.shape[:2], device=out.device)
    call = AttentionCall(
        query[0].transpose(0, 1), key[0].transpose(0, 1), value[0].transpose(0, 1),
        HeadShape(heads, key.shape[1], width, value.shape[3]), options, out, lse,
    )  # fmt: skip
    if batch.host is not None or chunk or not batch.key_values.decode(call):
        _attend_each(batch, call)
    if batch.prefixes is not None:
        join_prefixes(batch.prefixes, call, sinks)
    return out.unsqueeze(0), None


def _attend_each(batch: AttentionBatch, call: AttentionCall) -> None:
    """Attention of every sequence to its own tokens, sorted by what it needs: host, kernels, or torch."""
    starts, options = list(accumulate(batch.lengths, initial=0)), call.options
    on_host: Sequence[int] = ()
    if batch.host is not None:
        on_host = batch.host.indices
        places = torch.tensor([starts[index] for index in on_host], device=call.query.device)
        theirs = _select(call, places, _windows(batch, call, on_host))
        finish = batch.host.begin(theirs)
    cached: dict[int, tuple[int, CachedSequence]] = {}  # place of the one query, what it attends to
    prompts: list[Prompt] = []
    for index, length in enumerate(batch.lengths):
        if index in on_host:
            continue
        rows = slice(starts[index], starts[index] + length)
        fresh = call.key[rows], call.value[rows]
        begin = batch.begins[index] if options.chunk else 0
        if batch.prefixes is not None and batch.prefixes.write(index, *fresh):
            parts = pieces(options.chunk, begin, length)
            prompts += [(rows.start + first, count) for first, count, _ in parts]
            continue
        extended = batch.key_values.extend(index, *fresh)
        if isinstance(extended, CachedSequence):
            cached[index] = rows.start, extended
            continue
        padding = batch.padding[index] if batch.padding else 0
        if padding:  # of a prompt, so that there is nothing before it
            call.out[rows.start : rows.start + padding] = 0
        own, keys = length - padding, len(extended[0])
        unseen = keys - own if padding else 0  # a cache leaves padding out, a sequence without one does not
        for first, count, before in pieces(options.chunk, begin, own):
            start = rows.start + padding + first
            last = keys - own + first + count  # of the keys that it sees
            low = max(unseen, last - count - before) if options.chunk else unseen
            if last - low == count:
                prompts.append((start, count))
            else:
                attend_rows(call, slice(start, start + count), extended[0][low:last], extended[1][low:last])
    for start, length in attend_prompts(call, prompts, batch.key_values.kernels):
        rows = slice(start, start + length)
        attend_rows(call, rows, call.key[rows], call.value[rows])
    if cached:
        _attend_cached(batch.key_values, call, list(cached.values()), _windows(batch, call, list(cached)))
    batch.key_values.commit()
    if batch.host is not None:
        finish()
        _scatter(theirs, call, places)


def _windows(batch: AttentionBatch, call: AttentionCall, indices: Sequence[int]) -> Sequence[int] | None:
    """How many of its newest tokens each of some decoding sequences sees where there are chunks."""
    chunk = call.options.chunk
    return None if chunk is None else [batch.begins[index] % chunk + 1 for index in indices]


def _select(call: AttentionCall, places: Tensor, windows: Sequence[int] | None) -> AttentionCall:
    """The same for some of the packed tokens, int64 [S], with results of its own."""
    return dataclasses.replace(
        call, query=call.query[places], key=call.key[places], value=call.value[places],
        out=call.out.new_empty(len(places), *call.out.shape[1:]),
        lse=None if call.lse is None else call.lse.new_empty(len(places), call.shape.heads), windows=windows,
    )  # fmt: skip


def _scatter(part: AttentionCall, call: AttentionCall, places: Tensor) -> None:
    """Write the results of `_select` where they belong."""
    call.out[places] = part.out
    if call.lse is not None and part.lse is not None:
        call.lse[places] = part.lse


def _attend_cached(
    key_values: KeyValues,
    call: AttentionCall,
    cached: Sequence[tuple[int, CachedSequence]],
    windows: Sequence[int] | None,
) -> None:
    """Attend one query per sequence to packed and exact tokens, all sequences at once."""
    sequences = [sequence for _, sequence in cached]
    attention = key_values.kernels.attention
    if len(cached) == len(call.query):  # a pass that only decodes
        each_window(attention, dataclasses.replace(call, windows=windows), sequences, key_values.form)
        return
    places = torch.tensor([place for place, _ in cached], device=call.query.device)
    part = _select(call, places, windows)
    each_window(attention, part, sequences, key_values.form)
    _scatter(part, call, places)


def attend_rows(call: AttentionCall, rows: slice, keys: Tensor, values: Tensor) -> None:
    """Attend a sequence's tokens in ``rows`` to keys [n, G, D] and values [n, G, E], their own the last."""
    lse = None if call.lse is None else call.lse[rows]
    attend(call.query[rows].transpose(0, 1), keys, values, call.out[rows], call.options, lse)


def attend(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    out: Tensor,
    options: AttentionOptions,
    lse: Tensor | None = None,
) -> None:
    """Attend one sequence's last T positions to all its n, causally, into ``out``.

    Only a single query, which decodes, leaves tokens out (``options.fraction``).

    Args:
        query: [H, T, D]; keys [n, G, D]; values [n, G, E].
        out: [T, H, E]; lse float32 [T, H].
    """
    heads, fresh, _ = query.shape
    total, groups, _ = keys.shape
    scale = options.scale
    window = options.window if options.window and options.window < total else None
    sparse = fresh == 1 and options.fraction < 1
    plain = options.softcap is None and options.sinks is None and not sparse and lse is None
    key, value = keys.transpose(0, 1), values.transpose(0, 1)  # [G, n, D], [G, n, E]
    if plain and fresh == 1:
        if window:
            key, value = key[:, -window:], value[:, -window:]
        folded = query.reshape(groups, heads // groups, -1)  # the query heads of one group as rows
        result = F.scaled_dot_product_attention(folded[None], key[None], value[None], scale=scale)
        out.copy_(result.reshape(1, heads, -1))
        return
    past = total - fresh
    for begin in range(0, fresh, QUERY_ROWS):
        end = min(begin + QUERY_ROWS, fresh)
        low = max(0, past + begin + 1 - window) if window else 0
        high = past + end
        distance = (
            torch.arange(past + begin, high, device=query.device)[:, None]
            - torch.arange(low, high, device=query.device)[None]
        )  # [t, k], how far back a key lies; negative is the future
        visible = distance >= 0
        if window:
            visible &= distance < window
        part = query[:, begin:end]
        if plain:
            keys_seen, values_seen = key[None, :, low:high], value[None, :, low:high]
            result = fused(part[None], keys_seen, values_seen, scale, mask=visible)[0]
        else:
            summed = None if lse is None else lse[begin:end]
            result = _explicit(part, key[:, low:high], value[:, low:high], visible, options, sparse, summed)
        out[begin:end] = result.transpose(0, 1)


def _explicit(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    visible: Tensor,
    options: AttentionOptions,
    sparse: bool,
    lse: Tensor | None,
) -> Tensor:
    """Attention with scores written out, for soft-capping, sinks and sparse attention: [H, t, E].

    Args:
        query: [H, t, D]; key [G, k, D]; value [G, k, E]; visible [t, k].
        lse: [t, H].
    """
    heads, rows, width = query.shape
    groups = key.shape[0]
    grouped = query.reshape(groups, heads // groups, rows, width)
    scores = torch.matmul(grouped, key[:, None].transpose(-1, -2)).float() * options.scale  # [G, H/G, t, k]
    if options.softcap is not None:
        scores = torch.tanh(scores / options.softcap) * options.softcap
    scores = scores.masked_fill(~visible, float("-inf"))
    if sparse:
        return attend_sparse(scores, value, options).reshape(heads, rows, -1)
    if lse is not None:  # sinks are joined later
        lse.copy_(scores.logsumexp(-1).view(heads, rows).T)
    probabilities = softmax_with_sinks(scores, options.sinks)
    return torch.matmul(probabilities.to(value.dtype), value[:, None]).reshape(heads, rows, -1)


def attend_sparse(scores: Tensor, value: Tensor, options: AttentionOptions) -> Tensor:
    """Attend to the past tokens with the highest scores [G, H/G, 1, k] and to the own one; [G, H/G, 1, E].

    The weights of those that are kept sum to one; only their values [G, k, E] are read.
    """
    groups, _, _, tokens = scores.shape
    kept = options.kept(tokens - 1)
    best = scores[..., :-1].topk(kept, dim=-1).indices
    own = best.new_full((*best.shape[:-1], 1), tokens - 1)
    chosen = torch.cat([best, own], dim=-1)  # [G, H/G, 1, kept + 1]
    weights = softmax_with_sinks(scores.gather(-1, chosen), options.sinks).to(value.dtype)
    group = torch.arange(groups, device=value.device)[:, None, None, None]
    return torch.einsum("ghtk,ghtke->ghte", weights, value[group, chosen])


AttentionInterface.register(ATTENTION_NAME, packed_attention)
masks.register(ATTENTION_NAME)
