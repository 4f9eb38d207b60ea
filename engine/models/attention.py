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

from engine.kernels import ops
from engine.kernels.calls import AttentionOptions, CachedSequence, HeadShape
from engine.kernels.reference_attention import softmax_with_sinks
from engine.models.prefix_attention import Prefixes, join_prefixes
from engine.models.prompt_attention import Prompt, attend_prompts, fused
from engine.spec.kv_format import KVFormat
from engine.spec.layout import QUERY_ROWS
from engine.spec.precision import MatmulPrecision

ATTENTION_NAME = "tierbench"

_HARMLESS = {
    *("position_ids", "position_embeddings", "cache_position", "use_cache", "dropout", "is_causal"),
    *("output_attentions", "output_hidden_states", "return_dict"),
}
"""Arguments that layers pass on and that do not change the result."""


class KeyValues(Protocol):
    """Keys and values of one device batch at one layer."""

    form: KVFormat | None
    """How past tokens are packed; None where they are exact."""

    def extend(self, index: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor] | CachedSequence:
        """Append a sequence's fresh keys [T, G, D] and values [T, G, E]; return all of them.

        Returns [n, G, D] and [n, G, E], the fresh ones last and unchanged, or for a single fresh token
        what the kernels need of all; valid until the next call for this layer.
        """
        ...

    def decode(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        shape: HeadShape,
        options: AttentionOptions,
        out: Tensor,
        lse: Tensor | None,
    ) -> bool:
        """Append one token per sequence and attend for all at once, if that can be done; whether it was.

        Then there is no more to be asked for this layer. Queries [S, H, D], keys [S, G, D], values
        [S, G, E] of the fresh tokens; ``out`` is [S, H, E], ``lse`` as of `ops.attention`.
        """
        ...

    def commit(self) -> None:
        """All sequences of the batch have been attended to."""
        ...


class HostSequences(Protocol):
    """Sequences of a device batch that are attended to on the host, where their KV cache lies."""

    @property
    def indices(self) -> Sequence[int]:
        """Which they are of the batch; each has one fresh token, for which `KeyValues` is not asked."""
        ...

    def begin(
        self, query: Tensor, key: Tensor, value: Tensor, shape: HeadShape, options: AttentionOptions
    ) -> Callable[[], tuple[Tensor, Tensor]]:
        """Begin to attend: query [S, H, D], key [S, G, D] and value [S, G, E] of all S of them.

        What is returned is called once, after the device's own work, and yields [S, H, E] and the lse
        [S, H], as of `ops.attention`.
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
    """What the host attends to beside the device; None for nothing."""

    prefixes: Prefixes | None = None
    """Prefixes that are computed or attended to beside the sequences' own tokens; None for none."""

    padding: Sequence[int] = ()
    """Fresh tokens at the beginning of each sequence that nothing attends to; empty for none anywhere."""

    precision: MatmulPrecision = MatmulPrecision.HIGHEST
    """Of products of whole prompts, where the CPU's kernels attend to them."""


_current: ContextVar[AttentionBatch] = ContextVar("attention_batch")


@contextmanager
def attending(batch: AttentionBatch) -> Iterator[None]:
    """Make ``batch`` the one that attention reads while a layer runs."""
    token = _current.set(batch)
    try:
        yield
    finally:
        _current.reset(token)


def packed_attention(
    module: torch.nn.Module,
    query: Tensor,  # [1, H, P, D]
    key: Tensor,  # [1, G, P, D]
    value: Tensor,  # [1, G, P, E]
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Causal attention of each sequence over its own past; signature of `AttentionInterface`.

    Returns [1, P, H, E]. ``softcap`` squashes the scores (Gemma 2), ``s_aux`` are attention sinks
    per head (gpt-oss), ``sliding_window`` counts the query's own position.

    Raises:
        NotImplementedError: for an argument that changes the result and is not understood; the
            architecture check turns it into a refusal by name.
    """
    unknown = {name for name in kwargs.keys() - _HARMLESS if kwargs[name] is not None}
    if attention_mask is not None:
        unknown.add("attention_mask")
    if kwargs.get("is_causal") is False:
        unknown.add("is_causal=False")
    if unknown:
        raise NotImplementedError(f"attention with {', '.join(sorted(unknown))}")
    batch = _current.get()
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    options = AttentionOptions(scale, sliding_window, softcap, s_aux, batch.fraction, batch.precision)
    out = query.new_empty(query.shape[2], query.shape[1], value.shape[3])  # [P, H, E]
    if batch.prefixes is None:
        _attend_own(query, key, value, batch, options, out, None)
        return out.unsqueeze(0), None
    lse = torch.empty(out.shape[:2], device=out.device)  # [P, H]
    _attend_own(query, key, value, batch, dataclasses.replace(options, sinks=None), out, lse)
    join_prefixes(batch.prefixes, query[0], options, out, lse)
    return out.unsqueeze(0), None


def _attend_own(
    query: Tensor,  # [1, H, P, D]
    key: Tensor,  # [1, G, P, D]
    value: Tensor,  # [1, G, P, E]
    batch: AttentionBatch,
    options: AttentionOptions,
    out: Tensor,  # [P, H, E]
    lse: Tensor | None,  # [P, H]
) -> None:
    """Attention of every sequence to its own tokens; its lse where they are asked for."""
    shape = HeadShape(query.shape[1], key.shape[1], key.shape[3], value.shape[3])
    whole = [part[0].transpose(0, 1) for part in (query, key, value)]  # [P, heads, width] each
    if batch.host is None and batch.key_values.decode(whole[0], whole[1], whole[2], shape, options, out, lse):
        return
    starts = list(accumulate(batch.lengths, initial=0))
    on_host: Sequence[int] = ()
    if batch.host is not None:
        on_host = batch.host.indices
        places = torch.tensor([starts[index] for index in on_host], device=query.device)
        theirs = [part[places] for part in whole]  # [S, heads, width] each
        result = batch.host.begin(theirs[0], theirs[1], theirs[2], shape, options)
    cached: list[tuple[int, CachedSequence]] = []  # place of the one query, what it attends to
    prompts: list[Prompt] = []
    for index, length in enumerate(batch.lengths):
        if index in on_host:
            continue
        rows = slice(starts[index], starts[index] + length)
        fresh = whole[1][rows], whole[2][rows]
        if batch.prefixes is not None and batch.prefixes.write(index, *fresh):
            prompts.append((rows.start, length))
            continue
        found = batch.key_values.extend(index, *fresh)
        if isinstance(found, CachedSequence):
            cached.append((rows.start, found))
            continue
        left_out = batch.padding[index] if batch.padding else 0
        if left_out:  # of a prompt, so that there is nothing before it
            out[rows.start : rows.start + left_out] = 0
        if left_out or len(found[0]) == length:
            prompts.append((rows.start + left_out, length - left_out))
        else:
            part = None if lse is None else lse[rows]
            attend(query[0, :, rows], *found, out[rows], options, part)
    for start, length in attend_prompts(prompts, query[0], key[0], value[0], options, out, lse):
        rows = slice(start, start + length)
        part = None if lse is None else lse[rows]
        attend(query[0, :, rows], whole[1][rows], whole[2][rows], out[rows], options, part)
    if cached:
        _attend_cached(whole[0], cached, batch.key_values.form, shape, options, out, lse)
    batch.key_values.commit()
    if batch.host is not None:
        out[places], theirs_lse = result()
        if lse is not None:
            lse[places] = theirs_lse


def _attend_cached(
    query: Tensor,  # [P, H, D]
    cached: Sequence[tuple[int, CachedSequence]],
    form: KVFormat | None,
    shape: HeadShape,
    options: AttentionOptions,
    out: Tensor,  # [P, H, E]
    lse: Tensor | None,  # [P, H]
) -> None:
    """Attend one query per sequence to packed and exact tokens, all sequences at once."""
    form = form or KVFormat()  # where all are exact, nothing is packed in it
    sequences = [sequence for _, sequence in cached]
    if len(cached) == len(query):  # a pass that only decodes
        ops.attention(query.contiguous(), sequences, form, shape, options, out, lse)
        return
    places = torch.tensor([place for place, _ in cached], device=query.device)
    result = out.new_empty(len(cached), *out.shape[1:])
    found = None if lse is None else lse.new_empty(len(cached), shape.heads)
    ops.attention(query[places], sequences, form, shape, options, result, found)
    out[places] = result
    if lse is not None and found is not None:
        lse[places] = found


def attend(
    query: Tensor,  # [H, T, D]
    keys: Tensor,  # [n, G, D]
    values: Tensor,  # [n, G, E]
    out: Tensor,  # [T, H, E]
    options: AttentionOptions,
    lse: Tensor | None = None,  # [T, H]
) -> None:
    """Attend one sequence's last T positions to all its n, causally, into ``out``.

    Only a single query, which decodes, leaves tokens out (``options.fraction``).
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
    lse: Tensor | None,  # [t, H]
) -> Tensor:
    """Attention with scores written out, for soft-capping, sinks and leaving tokens out: [H, t, E]."""
    heads, rows, width = query.shape
    groups = key.shape[0]
    grouped = query.reshape(groups, heads // groups, rows, width)
    scores = torch.matmul(grouped, key[:, None].transpose(-1, -2)).float() * options.scale  # [G, H/G, t, k]
    if options.softcap is not None:
        scores = torch.tanh(scores / options.softcap) * options.softcap
    scores = scores.masked_fill(~visible, float("-inf"))
    if sparse:
        return attend_sparse(scores, value, options).reshape(heads, rows, -1)
    if lse is not None:  # of a part that sinks are joined to later
        lse.copy_(scores.logsumexp(-1).view(heads, rows).T)
    probabilities = softmax_with_sinks(scores, options.sinks)
    return torch.matmul(probabilities.to(value.dtype), value[:, None]).reshape(heads, rows, -1)


def attend_sparse(scores: Tensor, value: Tensor, options: AttentionOptions) -> Tensor:
    """The highest scores [G, H/G, 1, k] of the past tokens and the own one's; only their values are read.

    The weights of those that are kept sum to one. Returns [G, H/G, 1, E].
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
