"""What is fed in a pass: requests on their way, and prefixes that several of them share.

Both feed tokens at positions that follow those of a chain of prefixes, and both may have log-probabilities
wanted. This module does not know tensors, tiers or slots' order.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch import Tensor

from engine.errors import RequestError
from engine.plan.memory import SequenceNeed
from engine.plan.prefix import Segment, computed_tokens, padding_of
from engine.runtime.sampling import Sampler, finish_reason
from engine.spec.model import ModelSpec
from engine.spec.policy import Policy
from engine.spec.request import FinishReason, Output, Request

if TYPE_CHECKING:
    from engine.memory.kv.cache import Region
    from engine.memory.kv.prefix import PrefixRegion

PAD_TOKEN = 0
"""Fills up a prompt; nothing attends to it."""


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
    new_positions = max(0, request.max_new_tokens - 1)
    positions = len(computed_tokens(request)) + new_positions
    if spec.max_positions is not None and positions > spec.max_positions:
        raise RequestError(
            f"request {index} needs {positions:,} positions ({len(request.prompt):,} prompt tokens, "
            f"{request.max_new_tokens:,} to generate), the model has {spec.max_positions:,}: shorten it"
        )


def need_of(request: Request, policy: Policy, shared: int = 0) -> SequenceNeed:
    """Tokens that a request feeds at once and keeps in the KV cache, besides ``shared`` ones of prefixes.

    The last token of a sequence is never fed: nothing comes after it.
    """
    computed = len(computed_tokens(request)) - shared
    computed += padding_of(computed, policy)
    cached = computed + request.max_new_tokens - 1 if request.max_new_tokens > 1 else 0
    return SequenceNeed(computed, cached, shared)


@dataclass
class Scores:
    """Log-probabilities of tokens, and whether each was the most probable one at its place."""

    logprobs: list[float] = field(default_factory=list)
    greedy: list[bool] = field(default_factory=list)

    def add(self, logprob: float, greedy: bool) -> None:
        """One more."""
        self.logprobs.append(logprob)
        self.greedy.append(greedy)


@dataclass(eq=False)
class Prefix:
    """A segment that is computed once, with what the requests through it need of it."""

    segment: Segment
    parent: Prefix | None
    waiting: int = 0
    """Requests through it that have no slot yet."""

    users: int = 0
    """Requests through it that have one."""

    started: bool = False
    """Whether it is being computed or has been."""

    region: PrefixRegion | None = None
    decodes: bool = False
    """Whether any request through it generates more than one token, and so sees it in a later pass."""

    scored: bool = False
    """Whether the log-probabilities of its tokens are wanted."""

    inner: Scores = field(default_factory=Scores)
    """Of its tokens but the first."""

    following: dict[int, tuple[float, bool]] = field(default_factory=dict)
    """Of the tokens that come after it and are wanted."""

    @property
    def chain(self) -> list[Prefix]:
        """Those before it and itself, the first one first."""
        found, prefix = [self], self.parent
        while prefix:
            found.append(prefix)
            prefix = prefix.parent
        return found[::-1]


@dataclass(frozen=True)
class WantedRow:
    """A position whose logits are wanted."""

    offset: int
    """Among the fresh tokens."""

    token: int | None
    """The token after it whose log-probability is wanted; None to choose one."""


@dataclass(eq=False)
class SlotSequence(ABC):
    """What a pass feeds for one slot."""

    slot: int
    fresh: list[int]
    """Token ids to feed in the next pass."""

    chain: list[Prefix]
    """Prefixes that it attends to besides its own tokens, the first one first."""

    done: int = 0
    """Tokens fed so far, padding among them."""

    region: Region | None = None
    padding: int = 0
    """How many of the first tokens fed are padding."""

    @property
    def begin(self) -> int:
        """Position of its first own token."""
        return self.chain[-1].segment.end if self.chain else 0

    def position(self, offset: int) -> int:
        """Position of a fresh token; of padding 0."""
        return max(0, self.begin + self.done + offset - self.padding)

    @property
    @abstractmethod
    def name(self) -> str:
        """How errors call it."""

    @abstractmethod
    def rows(self) -> list[WantedRow]:
        """Positions of the fresh tokens whose logits are wanted."""

    def choose(self, logits: Tensor, best: int) -> int:
        """The next token for logits [V], of which ``best`` is the most probable."""
        return best

    @abstractmethod
    def take(self, row: WantedRow, token: int, logprob: float, greedy: bool) -> None:
        """Note the log-probability of a wanted or chosen token."""


@dataclass(eq=False)
class PrefixSequence(SlotSequence):
    """A prefix in the one pass that computes it."""

    prefix: Prefix = field(kw_only=True)

    @property
    def name(self) -> str:
        """How errors call it."""
        return f"the shared prefix of {self.prefix.waiting + self.prefix.users} requests"

    def rows(self) -> list[WantedRow]:
        """All its tokens predict the next one; the last predicts those that follow it."""
        if not self.prefix.scored:
            return []
        rows = [WantedRow(i, token) for i, token in enumerate(self.fresh[1:])]
        return rows + [WantedRow(len(self.fresh) - 1, token) for token in self.prefix.following]

    def take(self, row: WantedRow, token: int, logprob: float, greedy: bool) -> None:
        """Note the log-probability of a token of the prefix or of one that follows it."""
        if row.offset < len(self.fresh) - 1:
            self.prefix.inner.add(logprob, greedy)
        else:
            self.prefix.following[token] = logprob, greedy


@dataclass(eq=False)
class RequestSequence(SlotSequence):
    """One request on its way through the engine."""

    index: int = field(kw_only=True)
    request: Request = field(kw_only=True)
    sampler: Sampler = field(init=False)
    tokens: list[int] = field(default_factory=list)
    generated: Scores = field(default_factory=Scores)
    prompt: Scores = field(default_factory=Scores)
    """Of the prompt's own tokens, those that no prefix holds, as far as they are predicted by one of them."""

    answered: bool = False
    """Whether its answer was given, and it is computed on for the time it takes alone."""

    passes: int = 0
    block_sizes: int = 0
    block_seconds: float = 0.0

    def __post_init__(self) -> None:
        self.sampler = Sampler(self.request)

    @classmethod
    def of(
        cls, index: int, request: Request, slot: int, prefix: Prefix | None, policy: Policy
    ) -> RequestSequence:
        """A request that takes a slot, behind a prefix that it shares."""
        chain = prefix.chain if prefix else []
        own = computed_tokens(request)[chain[-1].segment.end if chain else 0 :]
        padding = padding_of(len(own), policy)
        fresh = [PAD_TOKEN] * padding + list(own)
        return cls(slot, fresh, chain, padding=padding, index=index, request=request)

    @property
    def name(self) -> str:
        """How errors call it."""
        return f"request {self.index}"

    @property
    def prefilling(self) -> bool:
        """Whether the prompt is fed in this pass."""
        return self.done == 0

    def rows(self) -> list[WantedRow]:
        """Prompt tokens that are scored, and the last position where a token is generated."""
        rows = []
        if self.request.prompt_logprobs and self.prefilling:
            wanted = self.request.prompt[self.begin + 1 :]
            rows = [WantedRow(self.padding + i, token) for i, token in enumerate(wanted)]
        if self.request.max_new_tokens:
            rows.append(WantedRow(len(self.fresh) - 1, None))
        return rows

    def choose(self, logits: Tensor, best: int) -> int:
        """The next token for logits [V], of which ``best`` is the most probable."""
        if self.answered:
            return best
        if self.request.forced:
            return self.request.forced[len(self.tokens)]
        return best if self.request.temperature == 0 else self.sampler.choose(logits)

    def take(self, row: WantedRow, token: int, logprob: float, greedy: bool) -> None:
        """Note a token's log-probability: of one of the prompt, or of the next one."""
        if row.token is not None:
            self.prompt.add(logprob, greedy)
            return
        self.tokens.append(token)
        self.generated.add(logprob, greedy)

    def finish_reason(self) -> FinishReason | None:
        """Why the sequence is finished, or None if it is not."""
        return finish_reason(self.request, self.tokens)

    def output(self, reason: FinishReason) -> Output:
        """The finished answer."""
        prompt = self._prompt_scores() if self.request.prompt_logprobs else None
        return Output(
            tokens=tuple(self.tokens),
            logprobs=tuple(self.generated.logprobs),
            prompt_logprobs=None if prompt is None else tuple(prompt.logprobs),
            finish_reason=reason,
            block_size=self.block_sizes / max(self.passes, 1),
            block_seconds=self.block_seconds,
            prompt_greedy=None if prompt is None else tuple(prompt.greedy),
            greedy=tuple(self.generated.greedy),
        )

    def _prompt_scores(self) -> Scores:
        """Those of its prefixes' tokens, then its own."""
        found = Scores()
        for prefix in self.chain:
            if prefix.parent:
                found.add(*prefix.parent.following[prefix.segment.tokens[0]])
            found.logprobs += prefix.inner.logprobs
            found.greedy += prefix.inner.greedy
        if self.chain and self.begin < len(self.request.prompt):
            found.add(*self.chain[-1].following[self.request.prompt[self.begin]])
        found.logprobs += self.prompt.logprobs
        found.greedy += self.prompt.greedy
        return found
