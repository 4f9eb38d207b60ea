"""From logits to the next token: log-probabilities, choice, stop rules.

Everything here is per sequence and independent of its batch: a random stream belongs to the request.
"""

from __future__ import annotations

import torch
from torch import Tensor

from engine.spec.request import FinishReason, Request


def log_probabilities(logits: Tensor, targets: Tensor, lse: Tensor) -> Tensor:
    """log p(target) for every row: logits [R, V], ids [R], log-sum-exp of logits [R] -> float32 [R]."""
    return logits.gather(-1, targets[:, None])[:, 0].float() - lse


_GREEDY_BELOW = 1e-5  # below it nothing but the most probable token has a chance (as in FlexGen and vLLM)


class Sampler:
    """Chooses one request's tokens, one after the other."""

    def __init__(self, request: Request) -> None:
        self._request = request
        self._generator = None
        if request.temperature > _GREEDY_BELOW:
            self._generator = torch.Generator().manual_seed(request.seed & (1 << 63) - 1)

    def choose(self, logits: Tensor) -> int:
        """The next token for logits [V]: the most probable, or a draw from the request's own stream."""
        if self._generator is None:
            return int(logits.argmax())
        scaled = logits.double().cpu() / self._request.temperature
        order = torch.argsort(scaled, descending=True, stable=True)
        probabilities = torch.softmax(scaled[order], dim=-1)
        if self._request.top_k:
            probabilities[self._request.top_k :] = 0
        if self._request.top_p < 1:
            before = probabilities.cumsum(-1) - probabilities
            probabilities[before >= self._request.top_p] = 0
        cumulative = probabilities.cumsum(-1)
        draw = torch.rand((), dtype=torch.float64, generator=self._generator) * cumulative[-1]
        rank = int(torch.searchsorted(cumulative, draw, right=True))
        return int(order[min(rank, len(order) - 1)])


def finish_reason(request: Request, tokens: list[int]) -> FinishReason | None:
    """Why a sequence with these generated tokens is finished, or None if it is not."""
    if request.forced:
        return "length" if len(tokens) >= len(request.forced) else None
    if tokens and tokens[-1] in request.stop_token_ids:
        return "eos"
    if tokens and request.stop is not None and request.stop(tokens):
        return "stop"
    return "length" if len(tokens) >= request.max_new_tokens else None
