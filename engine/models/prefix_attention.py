"""Attention to prefixes that sequences share, and its union with attention to their own tokens.

Softmax over the union of two sets of keys is the mean of the two attentions, weighted by their sums of
exp(score): with the log-sum-exp of each part at hand, the parts can be computed apart and joined exactly. So
the queries of all sequences attend to one prefix in two large products.

Axes: R rows that attend to a prefix, n tokens of it, H query heads, G key-value heads, D head width, E value
head width, P packed tokens of the device batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor

from engine.kernels.calls import AttentionCall, AttentionOptions, PrefixRows
from engine.spec.layout import QUERY_ROWS


class Prefixes(Protocol):
    """The prefixes of a device batch at one layer."""

    def write(self, index: int, key: Tensor, value: Tensor) -> bool:
        """Keep keys [T, G, D] and values [T, G, E] if ``index`` is a prefix; False if it is a request."""
        ...

    def parts(self) -> Iterator[tuple[Tensor, Tensor, PrefixRows]]:
        """Keys [G, n, D] and values [G, n, E] of every prefix that is attended to, and by which rows."""
        ...


def join_prefixes(prefixes: Prefixes, call: AttentionCall, sinks: Tensor | None) -> None:
    """Join attention to prefixes, and to sinks [H], to that to the own tokens, which is done.

    Args:
        call: its ``out`` and ``lse`` are of the own tokens, and become those of all.
    """
    query, out, lse = call.query.transpose(0, 1), call.out, call.lse  # [H, P, D], [P, H, E], [P, H]
    assert lse is not None
    for keys, values, use in prefixes.parts():
        queries = query if use.places is None else query.index_select(1, use.places)
        for begin in range(0, queries.shape[1], QUERY_ROWS):
            rows = slice(begin, begin + QUERY_ROWS)
            visible = _visible(use, rows, keys.shape[1], call.options)
            result, total = attend_all(queries[:, rows], keys, values, call.options, visible)
            if use.places is None:
                places: Tensor | slice = rows
            else:
                places = use.places[rows]
            before = lse[places]
            joined = torch.logaddexp(before, total)
            kept, added = (before - joined).exp_()[..., None], (total - joined).exp_()[..., None]
            out[places] = (out[places] * kept + result * added).to(out.dtype)
            lse[places] = joined
    if sinks is not None:
        out *= torch.sigmoid(lse - sinks.float())[..., None].to(out.dtype)


def _visible(use: PrefixRows, rows: slice, tokens: int, options: AttentionOptions) -> Tensor | None:
    """Which tokens of a prefix some rows see, [R, n]; None for all of them."""
    window, chunk = options.window, options.chunk
    if window is None and chunk is None:
        return None
    positions = use.positions[rows]
    if chunk is None and int(positions.max()) - use.begin < (window or 0):
        return None
    places = torch.arange(use.begin, use.begin + tokens, device=positions.device)
    seen = torch.ones(len(positions), tokens, dtype=torch.bool, device=positions.device)
    if window is not None:
        seen &= positions[:, None] - places < window
    if chunk is not None:
        seen &= positions[:, None] // chunk == places // chunk
    return seen


def attend_all(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    options: AttentionOptions,
    visible: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Attention of every row to all visible tokens: [R, H, E] and its log-sum-exp [R, H].

    A row that sees none has a log-sum-exp of -inf, and any finite mean.

    Args:
        query: [H, R, D]; keys [G, n, D]; values [G, n, E].
        visible: [R, n]; None for all.
    """
    heads, rows, _ = query.shape
    groups = len(keys)
    folded = query.reshape(groups, heads // groups * rows, -1)  # the query heads of a group as rows
    scores = torch.bmm(folded, keys.transpose(1, 2)).float().mul_(options.scale)  # [G, H/G * R, n]
    if options.softcap is not None:
        scores = scores.div_(options.softcap).tanh_().mul_(options.softcap)
    if visible is not None:
        hidden = ~visible.repeat(heads // groups, 1)
        scores.masked_fill_(hidden, torch.finfo(torch.float32).min)
    highest = scores.amax(-1)
    weights = torch.softmax(scores, dim=-1)
    lse = highest - weights.amax(-1).log_()  # the highest score's weight is exp(highest) / sum
    if visible is not None:
        lse.masked_fill_(hidden.all(-1), float("-inf"))
    result = torch.bmm(weights.to(values.dtype), values)
    return result.view(heads, rows, -1).transpose(0, 1), lse.view(heads, rows).T
