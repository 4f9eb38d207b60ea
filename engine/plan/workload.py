"""What passes have to do: requests as lengths, and the passes that the batching rules make of them.

Free of tokens and tensors; the rules are those of `engine.runtime.batching.Block`, walked on lengths alone.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from engine.plan.memory import SequenceNeed
from engine.plan.prefix import Arrangement, arrange_requests, computed_tokens, padding_of
from engine.spec.policy import Policy
from engine.spec.request import Request


@dataclass(frozen=True)
class RequestShape:
    """One request as lengths."""

    prompt: int
    """Tokens."""

    generated: int
    """Tokens, at most; 0 for a request that is only scored."""

    scored: int = 0
    """Prompt tokens whose log-probability is wanted."""

    shared: int = 0
    """Prompt tokens, from the first on, that a segment of the run computes and keeps: this one attends to
    them and neither computes nor keeps them. 0 where nothing is shared."""

    expected: int | None = None
    """Tokens that it is expected to generate before it ends; None for all it may."""

    segment: bool = False
    """Whether it is no request but a prefix that requests share, fed in one pass."""

    padding: int = 0
    """Tokens by which its prompt is filled up."""

    @cached_property
    def need(self) -> SequenceNeed:
        """What it takes in the KV cache and feeds at once; see `engine.runtime.sequences.need_of`."""
        scored_only = self.generated == 0 and not self.segment
        computed = max(1, self.prompt - scored_only - self.shared) + self.padding
        cached = computed + self.generated - 1 if self.generated > 1 else 0
        return SequenceNeed(computed, cached, self.shared)

    @property
    def passes(self) -> int:
        """How many passes it takes part in."""
        return max(1, self.generated if self.expected is None else min(self.expected, self.generated))

    @classmethod
    def of(
        cls, request: Request, policy: Policy, shared: int = 0, expected: int | None = None
    ) -> RequestShape:
        """The shape of a request."""
        prompt, new = len(request.prompt), request.max_new_tokens
        scored = prompt - 1 - max(0, shared - 1) if request.prompt_logprobs else 0
        padding = padding_of(len(computed_tokens(request)) - shared, policy)
        return cls(prompt, new, scored, shared, expected if policy.early_leaving else None, padding=padding)


@dataclass(frozen=True)
class BatchWork:
    """What one device batch does in one pass."""

    sequences: int
    new_tokens: int
    """Computed by every layer."""

    prompts: int = 0
    """Sequences that feed more than a token."""

    prompt_pairs: float = 0.0
    """Pairs of a query and a key that it sees, of all prompts."""

    prompt_tokens: int = 0
    decodes: int = 0
    """Sequences that feed one token after others."""

    context: float = 0.0
    """Tokens that the decoding sequences attend to, the own one included, those of shared prefixes too."""

    kv_past: float = 0.0
    """Tokens in the KV cache that belong to the batch's sequences alone, before the pass."""

    kv_shared: float = 0.0
    """Tokens of shared prefixes that the batch attends to, each prefix once."""

    kv_new: int = 0
    """Tokens that the pass adds to the KV cache."""

    head_rows: int = 0
    """Positions whose logits are wanted."""

    kept: int = 0
    """Sequences with a place in the KV cache."""

    slots: tuple[int, ...] = ()
    """Which slots they have; empty where it does not matter."""

    @property
    def mean_context(self) -> float:
        """Tokens that one decoding sequence attends to."""
        return self.context / self.decodes if self.decodes else 0.0

    @property
    def mean_prompt(self) -> float:
        """Tokens of one prompt."""
        return self.prompt_tokens / self.prompts if self.prompts else 0.0


@dataclass(frozen=True)
class PassWork:
    """What one pass does."""

    batches: tuple[BatchWork, ...]
    generated: int = 0
    """Tokens that come out of it."""

    @property
    def new_tokens(self) -> int:
        """Of all batches."""
        return sum(batch.new_tokens for batch in self.batches)

    @property
    def has_prompts(self) -> bool:
        """Whether any sequence feeds its prompt, so that the pass counts as prefill."""
        return any(batch.prompts for batch in self.batches)

    @property
    def composition(self) -> tuple[object, ...]:
        """Same for passes that differ in their contexts only."""
        return tuple((b.sequences, b.new_tokens, b.prompts, b.head_rows, b.kept) for b in self.batches)


@dataclass
class _Admitted:
    shape: RequestShape
    slot: int
    done: int = 0
    produced: int = 0

    @property
    def fresh(self) -> int:
        return 1 if self.done else self.shape.need.computed

    @property
    def past(self) -> int:
        """Tokens that its next ones see before themselves."""
        return self.done + self.shape.shared


@dataclass
class Workload:
    """All requests of a run, and the segments that they share, in the order in which they are admitted."""

    requests: Sequence[RequestShape]
    arrangement: Arrangement | None = None
    """Where the segments come from; None where nothing is shared."""

    needs: list[SequenceNeed] = field(init=False)

    def __post_init__(self) -> None:
        self.needs = [request.need for request in self.requests]

    @classmethod
    def uniform(cls, prompt: int, generated: int, count: int) -> Workload:
        """So many requests of one shape."""
        return cls([RequestShape(prompt, generated)] * count)

    @classmethod
    def of(
        cls, requests: Iterable[Request], policy: Policy | None = None, expected: Sequence[int] | None = None
    ) -> Workload:
        """The shapes of requests as the engine arranges them.

        Args:
            policy: how requests are taken: sharing, padding, early leaving; None for the usual way.
            expected: tokens that each request is expected to generate; None for all that it may.
        """
        asked, policy = list(requests), policy or Policy()
        found = arrange_requests(asked, policy)
        shapes: list[RequestShape] = []
        begun: set[int] = set()
        for index in found.order:
            for place in found.chain(found.inner[index]):
                if place not in begun:
                    segment = found.segments[place]
                    shapes.append(RequestShape(segment.end, 0, shared=segment.begin, segment=True))
                    begun.add(place)
            own = None if expected is None else expected[index]
            if found.begin(index) < len(
                computed_tokens(asked[index])
            ):  # one without tokens of its own takes no slot
                shapes.append(RequestShape.of(asked[index], policy, found.begin(index), own))
        return cls(shapes, found if found.segments else None)

    @property
    def generated(self) -> int:
        """Tokens that are expected."""
        return sum(request.passes for request in self.requests if request.generated)

    def prefixes(self, block_size: int) -> list[int]:
        """Tokens of the segments that may be kept at once; see `Arrangement.most_alive`."""
        return self.arrangement.most_alive(block_size) if self.arrangement else []

    def passes(self, policy: Policy) -> Iterator[PassWork]:
        """Walk the run pass by pass, as `engine.runtime.run.Run` does with answers as expected."""
        waiting = deque(self.requests)
        size = policy.device_batch
        batches: list[list[_Admitted]] = [[] for _ in range(policy.num_device_batches)]
        free = [list(range(i * size, (i + 1) * size)) for i in range(policy.num_device_batches)]
        while True:
            if policy.refill or not any(batches):
                for batch, slots in zip(batches, free, strict=True):
                    _refill(batch, slots, waiting, policy)
            active = [batch for batch in batches if batch]
            if not active:
                return
            yield PassWork(
                tuple(map(_work, active)),
                sum(admitted.shape.generated > 0 for batch in active for admitted in batch),
            )
            for index, batch in enumerate(batches):
                for admitted in list(batch):
                    admitted.done += admitted.fresh
                    admitted.produced += 1
                    if admitted.produced >= admitted.shape.passes:
                        batch.remove(admitted)
                        free[index].append(admitted.slot)
                free[index].sort()


def _refill(batch: list[_Admitted], free: list[int], waiting: deque[RequestShape], policy: Policy) -> None:
    tokens = sum(admitted.fresh for admitted in batch)
    has_prompt = False
    while free and waiting:
        computed = waiting[0].need.computed
        if has_prompt and tokens + computed > policy.max_batch_tokens:
            return
        if tokens + computed > max(policy.max_batch_tokens, computed + policy.device_batch - 1):
            return
        batch.append(_Admitted(waiting.popleft(), free.pop(0)))
        tokens, has_prompt = tokens + computed, True


def _work(batch: Sequence[_Admitted]) -> BatchWork:
    """The counts of a device batch as it is now."""
    prompts = [admitted for admitted in batch if not admitted.done]
    decoding = [admitted for admitted in batch if admitted.done]
    rows = sum(admitted.shape.generated > 0 for admitted in batch)
    return BatchWork(
        sequences=len(batch),
        new_tokens=sum(admitted.fresh for admitted in batch),
        prompts=len(prompts),
        prompt_pairs=sum(s.fresh * s.past + s.fresh * (s.fresh + 1) / 2 for s in prompts),
        prompt_tokens=sum(admitted.fresh for admitted in prompts),
        decodes=len(decoding),
        context=sum(admitted.past + 1 for admitted in decoding),
        kv_past=sum(admitted.done for admitted in batch if admitted.shape.need.cached),
        kv_shared=max((admitted.shape.shared for admitted in batch), default=0),
        kv_new=sum(admitted.fresh for admitted in batch if admitted.shape.need.cached),
        head_rows=rows + sum(admitted.shape.scored for admitted in prompts),
        kept=sum(admitted.shape.need.cached > 0 for admitted in batch),
        slots=tuple(admitted.slot for admitted in batch),
    )
