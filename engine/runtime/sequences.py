"""What a pass computes: requests in progress, and prefixes that several of them share.

Both compute tokens at positions that follow those of a chain of prefixes, and both may have log-probabilities
wanted. This module knows neither tiers nor the order of slots.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor

from engine.memory.kv.prefix import PrefixRegion
from engine.memory.kv.regions import Region
from engine.memory.state.batch import Snapshot, StateRegion, StateUse
from engine.plan.prefix import Segment, padding_of
from engine.plan.workload import Operations
from engine.runtime.sampling import Sampler
from engine.spec.policy import Policy
from engine.spec.request import FinishReason, Output, Request, TopTokens

PAD_TOKEN = 0
"""Padding; nothing attends to it."""


class Score(NamedTuple):
    """How probable a token was at its place."""

    logprob: float
    greedy: bool
    """Whether it was the most probable one."""

    top: TopTokens | None = None
    """The most probable ones, where they are wanted."""


@dataclass
class Scores:
    """Scores of tokens, part by part: those of many tokens take few bytes."""

    logprobs: list[float] = field(default_factory=list)
    greedy: list[bool] = field(default_factory=list)
    top: list[TopTokens] = field(default_factory=list)
    """As many as the others where they are wanted; else none."""

    def add(self, score: Score) -> None:
        """Append one token's."""
        self.logprobs.append(score.logprob)
        self.greedy.append(score.greedy)
        if score.top is not None:
            self.top.append(score.top)

    def extend(self, other: Scores) -> None:
        """Append those of other tokens."""
        self.logprobs += other.logprobs
        self.greedy += other.greedy
        self.top += other.top


@dataclass(frozen=True)
class PassShare:
    """A sequence's share of a pass."""

    number: int
    """Which pass of the call, from 1."""

    wall: float
    """Seconds of the whole pass."""

    seconds: float
    """Of it, those that are the sequence's."""


@dataclass(eq=False)
class Prefix:
    """A segment in the prefix cache, and what the requests that share it need of it."""

    segment: Segment
    parent: Prefix | None
    waiting: int = 0
    """Requests that share it and have no slot yet."""

    users: int = 0
    """Requests that share it and have one."""

    region: PrefixRegion | None = None
    snapshot: Snapshot | None = None
    """The state at its end, of a model that has any."""

    decodes: bool = False
    """Whether any of its requests generates more than one token, and so attends to it in a later pass."""

    scored: bool = False
    """Whether the log-probabilities of its tokens are wanted."""

    top: int = 0
    """How many of the most probable tokens are wanted beside each."""

    inner: Scores = field(default_factory=Scores)
    """Scores of its tokens but the first."""

    following: dict[int, Score] = field(default_factory=dict)
    """Score of each wanted token that may follow it."""

    requests: int = 0
    """All that share it."""

    computed_in: PassShare | None = None
    """Of the pass that computed it: what its requests have together."""

    @property
    def chain(self) -> list[Prefix]:
        """Its parents and itself, the first one first."""
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

    top: int = 0
    """How many of the most probable tokens are wanted beside it."""


@dataclass(eq=False)
class SlotSequence(ABC):
    """A sequence that takes a slot of the block."""

    fresh: list[int]
    """Token ids that the next pass computes."""

    chain: list[Prefix]
    """Prefixes that it attends to besides its own tokens, the first one first."""

    slot: int = -1
    """Its place in the block; -1 before it has one."""

    done: int = 0
    """Tokens computed so far, padding included."""

    region: Region | None = None
    """Its place in the KV cache; None before it has one, or where nothing is kept."""

    state: StateRegion | None = None
    """Its recurrent state; None before it has one, or where nothing is kept."""

    padding: int = 0
    """How many of its first tokens are padding."""

    def state_use(self, first: int) -> StateUse:
        """What it has to do with state in the next pass, its first fresh token being at place ``first``."""
        begins, padding = self.done == 0, self.padding if self.done == 0 else 0
        after = self.done + len(self.fresh)
        return StateUse(
            first + padding, len(self.fresh) - padding, self.state, has_past=not begins,
            source=self.chain[-1].snapshot if begins and self.chain else None,
            target=self._snapshot(),
            is_last=self.state is None or after >= self.state.tokens,
        )  # fmt: skip

    def _snapshot(self) -> Snapshot | None:
        """Where its state is left for others."""
        return None

    @property
    def new_tokens(self) -> int:
        """How many tokens the next pass computes."""
        return len(self.fresh)

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
        """What error messages call it."""

    @abstractmethod
    def rows(self) -> list[WantedRow]:
        """Positions of the fresh tokens whose logits are wanted."""

    @property
    @abstractmethod
    def wanted(self) -> int:
        """How many `rows` there are."""

    def work(self, operations: Operations) -> float:
        """What its fresh tokens cost; to be asked before the pass."""
        return operations.of_tokens(len(self.fresh), self.begin + self.done, self.wanted)

    def choose(self, logits: Tensor, best: int) -> int:
        """The next token for logits [V], of which ``best`` is the most probable."""
        return best

    @abstractmethod
    def take(self, row: WantedRow, token: int, score: Score) -> None:
        """Note the score of a wanted or chosen token."""


@dataclass(eq=False)
class PrefixSequence(SlotSequence):
    """A shared prefix, in the one pass that computes it."""

    prefix: Prefix = field(kw_only=True)

    @classmethod
    def of(cls, prefix: Prefix) -> PrefixSequence:
        """The tokens of a prefix, behind those of its parents."""
        before = prefix.parent.chain if prefix.parent else []
        return cls(list(prefix.segment.tokens), before, prefix=prefix)

    @property
    def name(self) -> str:
        return f"the shared prefix of {self.prefix.waiting + self.prefix.users} requests"

    def _snapshot(self) -> Snapshot | None:
        return self.prefix.snapshot

    def rows(self) -> list[WantedRow]:
        """All its tokens predict the next one; the last predicts those that follow it."""
        if not self.prefix.scored:
            return []
        top, last = self.prefix.top, len(self.fresh) - 1
        rows = [WantedRow(i, token, top) for i, token in enumerate(self.fresh[1:])]
        return rows + [WantedRow(last, token, top) for token in self.prefix.following]

    @property
    def wanted(self) -> int:
        return len(self.fresh) - 1 + len(self.prefix.following) if self.prefix.scored else 0

    def take(self, row: WantedRow, token: int, score: Score) -> None:
        """Note the score of a token of the prefix or of one that follows it."""
        if row.offset < len(self.fresh) - 1:
            self.prefix.inner.add(score)
        else:
            self.prefix.following[token] = score


@dataclass(eq=False)
class RequestSequence(SlotSequence):
    """One request in progress."""

    index: int = field(kw_only=True)
    request: Request = field(kw_only=True)
    sampler: Sampler = field(init=False)
    tokens: list[int] = field(default_factory=list)
    generated: Scores = field(default_factory=Scores)
    prompt: Scores = field(default_factory=Scores)
    """Of the prompt's own tokens, those that no prefix holds, as far as they are predicted by one of them."""

    answered: bool = False
    """Whether its output was handed out; without early leaving it is computed on for its time alone."""

    passes: int = 0
    first_pass: int = 0
    """The number of the first pass that it took part in; 0 before it has."""

    wall: float = 0.0
    """Seconds of the passes that it took part in."""

    seconds: float = 0.0
    """Its shares of them."""

    def __post_init__(self) -> None:
        self.sampler = Sampler(self.request)

    @classmethod
    def of(cls, index: int, request: Request, prefix: Prefix | None, policy: Policy) -> RequestSequence:
        """A request's own tokens, behind the prefix that it shares."""
        chain = prefix.chain if prefix else []
        own = request.computed_tokens[chain[-1].segment.end if chain else 0 :]
        padding = padding_of(len(own), policy)
        fresh = [PAD_TOKEN] * padding + list(own)
        return cls(fresh, chain, padding=padding, index=index, request=request)

    @property
    def name(self) -> str:
        return f"request {self.index}"

    def rows(self) -> list[WantedRow]:
        """Prompt tokens that are scored, and the last position where a token is generated."""
        rows, request = [], self.request
        if request.prompt_logprobs and self.done == 0:
            wanted, top = request.prompt[self.begin + 1 :], request.prompt_top_logprobs
            rows = [WantedRow(self.padding + i, token, top) for i, token in enumerate(wanted)]
        if request.max_new_tokens:
            rows.append(WantedRow(len(self.fresh) - 1, None, request.top_logprobs))
        return rows

    @property
    def wanted(self) -> int:
        scored = self.request.prompt_logprobs and self.done == 0
        own = max(0, len(self.request.prompt) - self.begin - 1) if scored else 0
        return own + (self.request.max_new_tokens > 0)

    def work(self, operations: Operations) -> float:
        """None once it is answered: what is computed on is nobody's."""
        return 0.0 if self.answered else super().work(operations)

    def choose(self, logits: Tensor, best: int) -> int:  # logits [V]
        if self.answered:
            return best
        if self.request.forced:
            return self.request.forced[len(self.tokens)]
        return self.sampler.choose(logits, self.tokens, best)

    def take(self, row: WantedRow, token: int, score: Score) -> None:
        """Note a token's score: of one of the prompt, or of the next one."""
        if row.token is not None:
            self.prompt.add(score)
            return
        self.tokens.append(token)
        self.generated.add(score)

    def take_part(self, share: PassShare) -> None:
        """Count a pass."""
        self.passes += 1
        self.first_pass = self.first_pass or share.number
        self.wall += share.wall
        self.seconds += share.seconds

    def output(self, reason: FinishReason) -> Output:
        """The finished answer."""
        prompt = self._prompt_scores() if self.request.prompt_logprobs else None
        wall, seconds = self._times()
        return Output(
            tokens=tuple(self.tokens),
            logprobs=tuple(self.generated.logprobs),
            prompt_logprobs=None if prompt is None else tuple(prompt.logprobs),
            finish_reason=reason,
            block_size=wall / seconds if seconds else 1.0,
            block_seconds=wall,
            prompt_greedy=None if prompt is None else tuple(prompt.greedy),
            greedy=tuple(self.generated.greedy),
            top_logprobs=tuple(self.generated.top),
            prompt_top_logprobs=self._first_of(prompt.top) if prompt else (),
            shared_tokens=self.begin,
        )

    def _first_of(self, found: list[TopTokens]) -> tuple[TopTokens, ...]:
        """As many as this request wants: others that share its prefix may have wanted more."""
        wanted = self.request.prompt_top_logprobs
        return tuple(top.first(wanted) for top in found) if wanted else ()

    def _times(self) -> tuple[float, float]:
        """Seconds of its passes and of those that computed its prefixes, and its share of them."""
        shared = [(prefix.computed_in, prefix.requests) for prefix in self.chain if prefix.computed_in]
        earlier = {share.number: share.wall for share, _ in shared if share.number < self.first_pass}
        own = sum(share.seconds / requests for share, requests in shared)
        return self.wall + sum(earlier.values()), self.seconds + own

    def _prompt_scores(self) -> Scores:
        """The scores of its prefixes' tokens, then of its own."""
        found = Scores()
        for prefix in self.chain:
            if prefix.parent:
                found.add(prefix.parent.following[prefix.segment.tokens[0]])
            found.extend(prefix.inner)
        if self.chain and self.begin < len(self.request.prompt):
            found.add(self.chain[-1].following[self.request.prompt[self.begin]])
        found.extend(self.prompt)
        return found
