"""Attention to prefixes that sequences share, and its union with attention to their own tokens.

Softmax over the union of two sets of keys is the mean of the two attentions, weighted by their sums of
exp(score): with their logarithms at hand the parts can be computed apart and joined exactly. So many queries
attend to one prefix in two large products, whoever's they are.

Axes: R rows that attend to a prefix, n tokens of it, H query heads, G key-value heads, D head width, E value
head width, P packed tokens of the device batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor

from engine.kernels.calls import AttentionOptions
from engine.spec.layout import QUERY_ROWS


class PrefixUse(Protocol):
    """Rows of the device batch that attend to one prefix."""

    @property
    def begin(self) -> int:
        """Position of the prefix's first token."""
        ...

    @property
    def places(self) -> Tensor | None:
        """int64 [R]: which of the packed tokens; None for all of them."""
        ...

    @property
    def positions(self) -> Tensor:
        """int64 [R]: their positions."""
        ...


class Prefixes(Protocol):
    """The prefixes of a device batch at one layer."""

    def write(self, index: int, key: Tensor, value: Tensor) -> bool:
        """Keep keys [T, G, D] and values [T, G, E] of a prefix that is computed; False for a request's."""
        ...

    def parts(self) -> Iterator[tuple[Tensor, Tensor, PrefixUse]]:
        """Keys [G, n, D] and values [G, n, E] of every prefix that is attended to, and by whom."""
        ...


def join_prefixes(
    prefixes: Prefixes,
    query: Tensor,  # [H, P, D]
    options: AttentionOptions,
    out: Tensor,  # [P, H, E]
    lse: Tensor,  # [P, H]
) -> None:
    """Join attention to prefixes, and the sinks, to attention to the own tokens that is in ``out``.

    Args:
        lse: float32, of ``out`` the logarithms of the sums of exp(score), without sinks.
    """
    for keys, values, use in prefixes.parts():
        asked = query if use.places is None else query.index_select(1, use.places)
        for begin in range(0, asked.shape[1], QUERY_ROWS):
            rows = slice(begin, begin + QUERY_ROWS)
            visible = _visible(use, rows, keys.shape[1], options.window)
            result, total = attend_all(asked[:, rows], keys, values, options, visible)
            if use.places is None:
                places: Tensor | slice = rows
            else:
                places = use.places[rows]
            before = lse[places]
            joined = torch.logaddexp(before, total)
            kept, added = (before - joined).exp_()[..., None], (total - joined).exp_()[..., None]
            out[places] = (out[places] * kept + result * added).to(out.dtype)
            lse[places] = joined
    if options.sinks is not None:
        out *= torch.sigmoid(lse - options.sinks.float())[..., None].to(out.dtype)


def _visible(use: PrefixUse, rows: slice, tokens: int, window: int | None) -> Tensor | None:
    """Which tokens of a prefix some rows see, [R, n]; None for all of them."""
    if window is None:
        return None
    positions = use.positions[rows]
    if int(positions.max()) - use.begin < window:
        return None
    places = torch.arange(use.begin, use.begin + tokens, device=positions.device)
    return positions[:, None] - places < window


def attend_all(
    query: Tensor,  # [H, R, D]
    keys: Tensor,  # [G, n, D]
    values: Tensor,  # [G, n, E]
    options: AttentionOptions,
    visible: Tensor | None,  # [R, n]
) -> tuple[Tensor, Tensor]:
    """Attention of every row to all visible tokens: [R, H, E] and the logarithms of the sums, [R, H].

    A row that sees none has a sum of zero, and any finite mean.
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
