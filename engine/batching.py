"""Requests become sequences, sequences take seats of the block, and leave them when they are finished.

A seat freed by a finished sequence goes to the next waiting request at the next pass, so prefill,
decode and scoring share passes. This module does not know tensors.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field

from torch import Tensor

from engine.errors import RequestError
from engine.memory.kv_cache import Region
from engine.plan.memory import SequenceNeed
from engine.sampling import Sampler, finish_reason
from engine.spec.model import ModelSpec
from engine.spec.policy import Policy
from engine.spec.request import FinishReason, Output, Request


def need_of(request: Request) -> SequenceNeed:
    """Tokens that a request feeds at once and keeps in the KV cache.

    The last token of a sequence is never fed: nothing comes after it.
    """
    if request.max_new_tokens == 0:
        return SequenceNeed(fed=max(1, len(request.prompt) - 1), cached=0)
    cached = len(request.prompt) + request.max_new_tokens - 1 if request.max_new_tokens > 1 else 0
    return SequenceNeed(fed=len(request.prompt), cached=cached)


def check_request(index: int, request: Request, spec: ModelSpec) -> None:
    """Refuse what the model cannot answer.

    Raises:
        RequestError: naming the request's index, the value and the limit.
    """
    if not request.prompt:
        raise RequestError(f"request {index} has an empty prompt: give at least one token id")
    if request.forced and len(request.forced) != request.max_new_tokens:
        raise RequestError(
            f"request {index} forces {len(request.forced)} tokens and asks for {request.max_new_tokens}: "
            "make max_new_tokens their number"
        )
    for token in (*request.prompt, *request.forced):
        if not 0 <= token < spec.vocab_size:
            raise RequestError(
                f"request {index} has token id {token}, the model knows 0 to {spec.vocab_size - 1}: "
                "use the model's own tokenizer"
            )
    if (
        request.max_new_tokens < 0
        or not request.temperature >= 0
        or not 0 < request.top_p <= 1
        or request.top_k < 0
    ):
        raise RequestError(
            f"request {index} is out of range: max_new_tokens={request.max_new_tokens}, "
            f"top_k={request.top_k} and temperature={request.temperature} must be at least 0, "
            f"top_p={request.top_p} in (0, 1]"
        )
    need = need_of(request)
    positions = max(need.fed, need.cached)
    if spec.max_positions is not None and positions > spec.max_positions:
        raise RequestError(
            f"request {index} needs {positions:,} positions ({len(request.prompt):,} prompt tokens, "
            f"{request.max_new_tokens:,} to generate), the model has {spec.max_positions:,}: shorten it"
        )


@dataclass
class Sequence:
    """One request on its way through the engine."""

    index: int
    request: Request
    seat: int
    region: Region | None
    fresh: list[int]
    """Token ids to feed in the next pass."""

    sampler: Sampler
    done: int = 0
    """Tokens fed so far."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    prompt_logprobs: list[float] = field(default_factory=list)
    prompt_greedy: list[bool] = field(default_factory=list)
    greedy: list[bool] = field(default_factory=list)
    passes: int = 0
    block_sizes: int = 0
    block_seconds: float = 0.0

    @property
    def scoring(self) -> bool:
        """Whether the log-probabilities of the tokens now fed are wanted."""
        return self.request.prompt_logprobs and self.done == 0

    @property
    def generating(self) -> bool:
        """Whether this pass yields a new token."""
        return self.request.max_new_tokens > 0

    def choose(self, logits: Tensor, best: int) -> int:
        """The next token for logits [V], of which ``best`` is the most probable."""
        if self.request.forced:
            return self.request.forced[len(self.tokens)]
        return best if self.request.temperature == 0 else self.sampler.choose(logits)

    def take(self, token: int, logprob: float, greedy: bool, scored: bool) -> None:
        """Note a token's log-probability: of one of the prompt, or of the next one."""
        if scored:
            self.prompt_logprobs.append(logprob)
            self.prompt_greedy.append(greedy)
            return
        self.tokens.append(token)
        self.logprobs.append(logprob)
        self.greedy.append(greedy)

    def finish_reason(self) -> FinishReason | None:
        """Why the sequence is finished, or None if it is not."""
        return finish_reason(self.request, self.tokens)

    def output(self, reason: FinishReason) -> Output:
        """The finished answer."""
        return Output(
            tokens=tuple(self.tokens),
            logprobs=tuple(self.logprobs),
            prompt_logprobs=tuple(self.prompt_logprobs) if self.request.prompt_logprobs else None,
            finish_reason=reason,
            block_size=self.block_sizes / max(self.passes, 1),
            block_seconds=self.block_seconds,
            prompt_greedy=tuple(self.prompt_greedy) if self.request.prompt_logprobs else None,
            greedy=tuple(self.greedy),
        )


class Block:
    """The seats of a policy, grouped in device batches, and the requests that wait for one."""

    def __init__(self, requests: Seq[Request], policy: Policy) -> None:
        self._policy = policy
        self._waiting = deque(enumerate(requests))
        self.batches: list[list[Sequence]] = [[] for _ in range(policy.num_device_batches)]
        self._free = [
            list(range(batch * policy.device_batch, (batch + 1) * policy.device_batch))
            for batch in range(policy.num_device_batches)
        ]

    @property
    def waiting(self) -> int:
        """Requests that have not begun."""
        return len(self._waiting)

    @property
    def active(self) -> list[Sequence]:
        """Sequences on their way, batch after batch."""
        return [sequence for batch in self.batches for sequence in batch]

    def refill(self, admit: Callable[[int, Request], Region | None]) -> None:
        """Seat waiting requests, in order, where there is a seat and room for their prompt's tokens.

        Args:
            admit: called with (seat, request) to make room in the KV cache; returns its `Region`.
        """
        for batch, free in zip(self.batches, self._free, strict=True):
            tokens = sum(len(sequence.fresh) for sequence in batch)
            has_prompt = False
            while free and self._waiting:
                index, request = self._waiting[0]
                fed = need_of(request).fed
                if has_prompt and tokens + fed > self._policy.max_batch_tokens:
                    break
                if tokens + fed > max(self._policy.max_batch_tokens, fed + self._policy.device_batch - 1):
                    break
                self._waiting.popleft()
                seat = free.pop(0)
                region = admit(seat, request)
                batch.append(
                    Sequence(index, request, seat, region, list(request.prompt[:fed]), Sampler(request))
                )
                tokens, has_prompt = tokens + fed, True

    def leave(self, sequence: Sequence) -> None:
        """Free a finished sequence's seat."""
        batch = sequence.seat // self._policy.device_batch
        self.batches[batch].remove(sequence)
        self._free[batch].append(sequence.seat)
        self._free[batch].sort()
