"""From logits to the next token: log-probabilities, rules, choice, stop rules.

Everything here is per sequence and independent of its batch: a random stream belongs to the request, and what
penalties need is taken from the tokens so far.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from engine.spec.request import NO_RULES, FinishReason, Request, TopTokens


def log_probabilities(logits: Tensor, targets: Tensor, lse: Tensor) -> Tensor:
    """log p(target) for every row: logits [R, V], ids [R], log-sum-exp of logits [R] -> float32 [R]."""
    return logits.gather(-1, targets[:, None])[:, 0].float() - lse


def top_tokens(logits: Tensor, lse: float, token: int, best: int, count: int) -> TopTokens:
    """The ``count`` most probable tokens for logits [V], and the rank of ``token`` among all.

    Args:
        lse: log-sum-exp of the logits.
        best: the first of the most probable tokens, which stays the first one here.
    """
    values, places = (found.tolist() for found in logits.topk(min(count, len(logits))))
    pairs = dict(zip(places, values, strict=True))
    if best not in pairs:  # one of more equals than are wanted
        del pairs[places[-1]]
        pairs[best] = values[0]
    ordered = sorted(pairs, key=lambda place: (-pairs[place], place))
    rank = 1 + int((logits > logits[token]).sum())
    return TopTokens(tuple(ordered), tuple(pairs[place] - lse for place in ordered), rank)


_GREEDY_BELOW = 1e-5  # below it nothing but the most probable token has a chance (as in FlexGen and vLLM)


class Sampler:
    """Chooses one request's tokens, one after the other."""

    def __init__(self, request: Request) -> None:
        self._request, self._rules = request, None if request.rules == NO_RULES else request.rules
        self._guide = request.rules.guide() if request.rules.guide else None
        self._generator = None
        if request.temperature > _GREEDY_BELOW:
            self._generator = torch.Generator().manual_seed(request.seed & (1 << 63) - 1)
        self._prompt: Tensor | None = None
        """Distinct tokens of the prompt; None until a penalty asks."""

    def choose(self, logits: Tensor, tokens: Sequence[int], best: int) -> int:
        """The next token: the most probable by the rules, or a draw from the request's own stream.

        Args:
            logits: [V].
            tokens: generated so far.
            best: the most probable one without any rule.
        """
        if self._generator is None and self._rules is None and self._guide is None:
            return best
        scores = logits.to("cpu", torch.float64, copy=True)
        if self._guide is not None:
            scores[~_unpacked(self._guide.allowed(), len(scores))] = -torch.inf
        if self._rules is not None:
            scores = self._ruled(scores, tokens)
        token = int(scores.argmax()) if self._generator is None else self._draw(scores, self._generator)
        if self._guide is not None:
            self._guide.accept(token)
        return token

    def _ruled(self, scores: Tensor, tokens: Sequence[int]) -> Tensor:
        """Scores [V] by the rules that hold for greedy choices too."""
        rules = self._request.rules
        if len(tokens) < rules.min_tokens:
            kept = scores.clone()
            kept[list(self._request.stop_token_ids)] = -torch.inf
            if kept.max() > -torch.inf:  # else the grammar allows nothing but the end
                scores = kept
        if rules.bias:
            places, biases = zip(*rules.bias, strict=True)
            scores[list(places)] += torch.tensor(biases, dtype=scores.dtype)
        generated = torch.tensor(tokens, dtype=torch.int64)
        if rules.repetition_penalty != 1:
            if self._prompt is None:
                self._prompt = torch.tensor(self._request.prompt).unique()
            seen = torch.cat([self._prompt, generated]).unique()
            found, penalty = scores[seen], rules.repetition_penalty
            scores[seen] = torch.where(found > 0, found / penalty, found * penalty)
        if tokens and (rules.frequency_penalty or rules.presence_penalty):
            places, counts = generated.unique(return_counts=True)
            scores[places] -= rules.frequency_penalty * counts + rules.presence_penalty
        return scores

    def _draw(self, scores: Tensor, generator: torch.Generator) -> int:
        """A token drawn by scores [V], with temperature, min-p, top-k and top-p."""
        request, min_p = self._request, self._request.rules.min_p
        scaled = scores / request.temperature
        order = torch.argsort(scaled, descending=True, stable=True)
        probabilities = torch.softmax(scaled[order], dim=-1)
        if min_p:
            probabilities[probabilities < min_p * probabilities[0]] = 0
        if request.top_k:
            probabilities[request.top_k :] = 0
        cumulative = probabilities.cumsum(-1)
        if request.top_p < 1:
            probabilities[cumulative - probabilities >= request.top_p * cumulative[-1]] = 0
            cumulative = probabilities.cumsum(-1)
        draw = torch.rand((), dtype=torch.float64, generator=generator) * cumulative[-1]
        rank = int(torch.searchsorted(cumulative, draw, right=True))
        if rank == len(order):  # a draw that was rounded up to the sum
            rank = int(probabilities.count_nonzero()) - 1
        return int(order[rank])


def _unpacked(mask: bytes, count: int) -> Tensor:
    """The first bits of a mask, the lowest of each byte first, as bool [count]."""
    packed = torch.frombuffer(bytearray(mask), dtype=torch.uint8)
    bits = (packed[:, None] >> torch.arange(8, dtype=torch.uint8)) & 1  # [bytes, 8]
    found = torch.zeros(count, dtype=torch.bool)
    known = bits.flatten()[:count].bool()
    found[: len(known)] = known
    return found


def finish_reason(request: Request, tokens: Sequence[int]) -> FinishReason | None:
    """Why a sequence with these generated tokens is finished, or None if it is not."""
    if request.forced:
        return "length" if len(tokens) >= len(request.forced) else None
    if tokens and tokens[-1] in request.stop_token_ids:
        return "eos"
    if len(tokens) > request.rules.min_tokens and request.stop is not None and request.stop(tokens):
        return "stop"
    return "length" if len(tokens) >= request.max_new_tokens else None
