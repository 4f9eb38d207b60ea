"""What is asked of the engine and what it answers: token ids only, never text."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

from engine.errors import RequestError
from engine.spec.model import ModelSpec

StopCheck = Callable[[Sequence[int]], bool]
"""Given the ids generated so far, says whether the sequence is finished.

Stop *strings* are a matter of text, which the engine does not know; whoever knows the tokenizer
passes this function. It is called once per generated token, with the newest id last.
"""

FinishReason = Literal["length", "stop", "eos"]


class Guide(Protocol):
    """Says, token by token, how one sequence may go on: a grammar that its text has to follow."""

    def allowed(self) -> bytes:
        """A bit for each token id, the lowest first in each byte: whether it may come next."""

    def accept(self, token: int) -> None:
        """Note the token that came, one of those that were allowed."""


NewGuide = Callable[[], Guide]
"""Makes a guide at the beginning of a sequence; called once each time that its request is answered."""


@dataclass(frozen=True)
class LogitRules:
    """What is done to logits before a token is chosen, in this order: the guide's, ``min_tokens``,
    ``bias``, the penalties; then come temperature, ``min_p``, top-k and top-p. The definitions are vLLM's.
    """

    guide: NewGuide | None = field(default=None, compare=False)
    """Makes the guide that the sequence follows; None for none."""

    min_tokens: int = 0
    """Tokens that are generated before anything but the limit may end the sequence."""

    bias: tuple[tuple[int, float], ...] = ()
    """Token ids and what is added to their logits."""

    repetition_penalty: float = 1.0
    """Of tokens of the prompt and generated ones: positive logits are divided by it, negative multiplied."""

    frequency_penalty: float = 0.0
    """Subtracted from a token's logit for each time that it was generated."""

    presence_penalty: float = 0.0
    """Subtracted from the logits of tokens that were generated."""

    min_p: float = 0.0
    """Tokens less probable than this fraction of the most probable one are not sampled."""


NO_RULES = LogitRules()


@dataclass(frozen=True)
class Request:
    """One sequence to complete, to score, or both.

    ``max_new_tokens=0`` with ``prompt_logprobs=True`` is pure scoring: nothing is generated and the
    last prompt token never goes through the model, so a prompt may be one token longer than the window.
    """

    prompt: tuple[int, ...]
    """Token ids, at least one, including a beginning-of-text id where the model expects one."""

    max_new_tokens: int = 0
    """Upper limit of generated tokens."""

    prompt_logprobs: bool = False
    """Whether the log-probability of every prompt token but the first is wanted."""

    top_logprobs: int = 0
    """How many of the most probable tokens are wanted beside each generated one; see `TopTokens`."""

    prompt_top_logprobs: int = 0
    """The same beside each token whose log-probability ``prompt_logprobs`` asks for."""

    temperature: float = 0.0
    """0 is greedy; otherwise logits are divided by it before sampling."""

    top_k: int = 0
    """Sample among the k most probable tokens only; 0 is no limit."""

    top_p: float = 1.0
    """Sample among the smallest set of tokens whose probabilities reach this sum."""

    rules: LogitRules = NO_RULES
    """What else is done to the logits."""

    seed: int = 0
    """Seeds this request's own random stream, so that an answer never depends on its batch."""

    forced: tuple[int, ...] = ()
    """Continuation that is computed instead of the model's own choices, one token per pass.

    As many as ``max_new_tokens``; the output holds them with their log-probabilities. Unlike the tokens
    of a prompt they are scored against the KV cache as it is kept, not as it was computed.
    """

    stop_token_ids: frozenset[int] = frozenset()
    """Ids that end the sequence (finish reason "eos"); the id itself is part of the output."""

    stop: StopCheck | None = field(default=None, compare=False)
    """Ends the sequence (finish reason "stop") when it returns true; see `StopCheck`."""

    @property
    def computed_tokens(self) -> tuple[int, ...]:
        """Prompt tokens that go through the model: all but the last one where nothing is generated."""
        return self.prompt if self.max_new_tokens else self.prompt[: max(1, len(self.prompt) - 1)]


def check_request(index: int, request: Request, spec: ModelSpec) -> None:
    """Refuse a request that the model cannot answer.

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
    _check_ranges(index, request, spec.vocab_size)
    new_positions = max(0, request.max_new_tokens - 1)
    positions = len(request.computed_tokens) + new_positions
    if spec.max_positions is not None and positions > spec.max_positions:
        raise RequestError(
            f"request {index} needs {positions:,} positions ({len(request.prompt):,} prompt tokens, "
            f"{request.max_new_tokens:,} to generate), the model has {spec.max_positions:,}: shorten it"
        )


def _check_ranges(index: int, request: Request, vocab_size: int) -> None:
    rules = request.rules
    ranges = (
        ("max_new_tokens", request.max_new_tokens, request.max_new_tokens >= 0, "at least 0"),
        ("temperature", request.temperature, 0 <= request.temperature < math.inf, "at least 0 and finite"),
        ("top_k", request.top_k, request.top_k >= 0, "at least 0"),
        ("top_p", request.top_p, 0 < request.top_p <= 1, "in (0, 1]"),
        ("min_p", rules.min_p, 0 <= rules.min_p <= 1, "in [0, 1]"),
        ("min_tokens", rules.min_tokens, rules.min_tokens >= 0, "at least 0"),
        (
            "repetition_penalty", rules.repetition_penalty,
            0 < rules.repetition_penalty < math.inf, "above 0",
        ),
        ("frequency_penalty", rules.frequency_penalty, math.isfinite(rules.frequency_penalty), "finite"),
        ("presence_penalty", rules.presence_penalty, math.isfinite(rules.presence_penalty), "finite"),
        *(
            (name, count, 0 <= count <= vocab_size, f"0 to {vocab_size}, the size of the vocabulary")
            for name, count in (
                ("top_logprobs", request.top_logprobs),
                ("prompt_top_logprobs", request.prompt_top_logprobs),
            )
        ),
        *(
            (f"bias of token id {token}", bias, 0 <= token < vocab_size and math.isfinite(bias),
             f"finite, for a token id of 0 to {vocab_size - 1}")
            for token, bias in rules.bias
        ),
    )  # fmt: skip
    for name, value, holds, limit in ranges:
        if not holds:
            raise RequestError(f"request {index} is out of range: {name}={value} must be {limit}")


@dataclass(frozen=True)
class TopTokens:
    """The most probable tokens at one place, the most probable one first."""

    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    rank: int
    """Of the token that stands there: 1 if no token is more probable."""

    def first(self, count: int) -> TopTokens:
        """The ``count`` most probable ones."""
        return TopTokens(self.tokens[:count], self.logprobs[:count], self.rank)


@dataclass(frozen=True)
class Output:
    """The answer to one `Request`.

    Log-probabilities are natural logarithms of the model's own, unscaled distribution: temperature,
    top-k, top-p and `LogitRules` never change them.
    """

    tokens: tuple[int, ...]
    """Generated ids, including the one that ended the sequence."""

    logprobs: tuple[float, ...]
    """One per generated token."""

    prompt_logprobs: tuple[float, ...] | None
    """log p(prompt[i] | prompt[:i]) for i = 1 .. len(prompt) - 1, or None if not asked for."""

    finish_reason: FinishReason

    block_size: float
    """How many requests of this one's work the passes it took part in had room for: their wall time over
    its share of it, which is given by the work of its tokens."""

    block_seconds: float
    """Wall time of those passes, and of those that computed the prefixes it shares."""

    prompt_greedy: tuple[bool, ...] | None = None
    """Beside each of `prompt_logprobs`: whether that token was the most probable one at its place."""

    greedy: tuple[bool, ...] = ()
    """Beside each of `logprobs`: the same."""

    top_logprobs: tuple[TopTokens, ...] = ()
    """Beside each of `logprobs`: the most probable tokens; empty if not asked for."""

    prompt_top_logprobs: tuple[TopTokens, ...] = ()
    """Beside each of `prompt_logprobs`: the same."""

    shared_tokens: int = 0
    """Prompt tokens that were computed once for this request and others of the call."""

    @property
    def seconds(self) -> float:
        """Its share of those passes; the shares of all requests of a call sum to the call's passes."""
        return self.block_seconds / self.block_size


@dataclass(frozen=True)
class CallProgress:
    """State of a call to the engine, reported after every pass."""

    finished: int
    """Requests answered so far."""

    total: int
    """Requests of this call."""

    passes: int
    """Passes walked so far."""

    generated_tokens: int
    prompt_tokens: int
    """Tokens generated and prompt tokens processed so far."""

    seconds: float
    """Wall time since the first pass began."""

    eta_seconds: float
    """Estimate of the wall time left, of loading while ``loaded`` is below 1."""

    loaded: float = 1.0
    """Fraction of the weights that are in place."""

    pass_done: float = 1.0
    """Fraction of the pass in flight that is computed; 1 between passes."""

    busy_seconds: Mapping[str, float] = field(default_factory=dict)
    """Seconds that each stream was busy since the engine began, by the stream's name."""

    held: Mapping[str, int] = field(default_factory=dict)
    """Bytes that each tier holds now, by the tier's name."""

    limits: Mapping[str, int] = field(default_factory=dict)
    """Most bytes that each tier may hold: its budget, or what was free."""

    in_progress: Mapping[int, int] = field(default_factory=dict)
    """Tokens generated so far of every request that has a slot and no answer yet, by its index."""


OnOutput = Callable[[int, Output], None]
"""Called with a request's index and its output as soon as it is finished."""

OnProgress = Callable[[CallProgress], None]
"""Called with a call's state after every pass."""
