"""The work of a run: requests as lengths, and the passes that the batching rule makes of them.

Free of tokens and tensors: sequences are lengths here, and take their slots as the engine's own do.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from engine.plan.batching import Slots
from engine.plan.memory import SequenceNeed
from engine.plan.prefix import UNSHARED, Arrangement, arrange_requests, padding_of
from engine.spec.model import ModelSpec, TensorSpec
from engine.spec.policy import Policy
from engine.spec.request import Request


@dataclass(frozen=True)
class RequestShape:
    """One request as lengths."""

    prompt: int
    """Tokens."""

    generated: int
    """Most tokens to generate; 0 for a request that is only scored."""

    scored: int = 0
    """Prompt tokens whose log-probability is wanted."""

    shared: int = 0
    """Prompt tokens, from the first on, that a segment of the run computes and keeps: this one attends to
    them and neither computes nor keeps them. 0 where nothing is shared."""

    expected: int | None = None
    """Tokens that it is expected to generate before it ends; None for ``generated``."""

    segment: bool = False
    """Whether it is a prefix that requests share, computed in one pass, and no request."""

    padding: int = 0
    """Padding tokens before its prompt."""

    @cached_property
    def need(self) -> SequenceNeed:
        """What it computes at once and keeps in the KV cache; the last token generated is never computed."""
        scored_only = self.generated == 0 and not self.segment
        computed = max(1, self.prompt - scored_only) - self.shared + self.padding
        cached = computed + self.generated - 1 if self.generated > 1 else 0
        return SequenceNeed(computed, cached, self.shared)

    @property
    def passes(self) -> int:
        """Passes that it takes part in."""
        return max(1, self.generated if self.expected is None else min(self.expected, self.generated))

    @classmethod
    def of(
        cls, request: Request, policy: Policy, shared: int = 0, expected: int | None = None
    ) -> RequestShape:
        """The shape of a request."""
        prompt, new = len(request.prompt), request.max_new_tokens
        scored = prompt - 1 - max(0, shared - 1) if request.prompt_logprobs else 0
        padding = padding_of(len(request.computed_tokens) - shared, policy)
        return cls(prompt, new, scored, shared, expected if policy.early_leaving else None, padding=padding)


@dataclass(frozen=True)
class BatchWork:
    """The work of one device batch in one pass."""

    sequences: int
    new_tokens: int
    """Computed by every layer."""

    prompts: int = 0
    """Sequences that compute their prompt."""

    prompt_pairs: float = 0.0
    """Pairs of a query and a key that it sees, of all prompts."""

    prompt_tokens: int = 0
    decodes: int = 0
    """Sequences that compute one token after others."""

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


@dataclass(frozen=True)
class PassWork:
    """The work of one pass."""

    batches: tuple[BatchWork, ...]
    generated: int = 0
    """Tokens that come out of it."""

    @property
    def new_tokens(self) -> int:
        """Of all batches."""
        return sum(batch.new_tokens for batch in self.batches)

    @property
    def has_prompts(self) -> bool:
        """Whether any sequence computes its prompt, so that the pass counts as prefill."""
        return any(batch.prompts for batch in self.batches)

    @property
    def composition(self) -> tuple[object, ...]:
        """Same for passes that differ in their contexts only."""
        return tuple((b.sequences, b.new_tokens, b.prompts, b.head_rows, b.kept) for b in self.batches)


@dataclass
class _Admitted:
    """A request of the workload on its way through the block."""

    shape: RequestShape
    slot: int = -1
    done: int = 0
    """Tokens computed so far."""

    produced: int = 0
    """Passes that it took part in."""

    @property
    def new_tokens(self) -> int:
        return 1 if self.done else self.shape.need.computed

    @property
    def past(self) -> int:
        """Tokens that its next ones see before themselves."""
        return self.done + self.shape.shared


@dataclass
class Workload:
    """All requests of a run, and the segments that they share, in the order in which they are admitted."""

    requests: Sequence[RequestShape]
    arrangement: Arrangement = UNSHARED
    """Order and segments; none of lengths alone, which share nothing."""

    needs: list[SequenceNeed] = field(init=False)

    def __post_init__(self) -> None:
        self.needs = [request.need for request in self.requests]

    @classmethod
    def uniform(cls, prompt: int, generated: int, count: int, expected: int | None = None) -> Workload:
        """``count`` requests of one shape; see `RequestShape`."""
        return cls([RequestShape(prompt, generated, expected=expected)] * count)

    @classmethod
    def of(
        cls, requests: Iterable[Request], policy: Policy | None = None, expected: Sequence[int] | None = None
    ) -> Workload:
        """The shapes of requests as the engine arranges them.

        Args:
            policy: its prefix sharing, padding and early leaving count; None for the default policy.
            expected: tokens that each request is expected to generate; None for the most it may.
        """
        asked, policy = list(requests), policy or Policy()
        found = arrange_requests(asked, policy)
        shapes: list[RequestShape] = []
        for index, is_segment in found.queue():
            if is_segment:
                segment = found.segments[index]
                shape = RequestShape(segment.end, 0, shared=segment.begin, segment=True)
            else:
                own = None if expected is None else expected[index]
                shape = RequestShape.of(asked[index], policy, found.begin(index), own)
            if shape.need.computed:  # a request without tokens of its own takes no slot
                shapes.append(shape)
        return cls(shapes, found)

    @property
    def generated(self) -> int:
        """Tokens that are expected."""
        return sum(request.passes for request in self.requests if request.generated)

    def passes(self, policy: Policy) -> Iterator[PassWork]:
        """Walk the run pass by pass, as `engine.runtime.run.Run` does with answers as expected."""
        queue = deque(map(_Admitted, self.requests))
        slots: Slots[_Admitted] = Slots(policy)
        while True:
            slots.admit(lambda: queue[0] if queue else None, lambda _: queue.popleft())
            active = slots.active
            if not active:
                return
            generated = sum(admitted.shape.generated > 0 for admitted in active)
            yield PassWork(tuple(_work(batch) for batch in slots.batches if batch), generated)
            for admitted in active:
                admitted.done += admitted.new_tokens
                admitted.produced += 1
                if admitted.produced >= admitted.shape.passes:
                    slots.free(admitted)


@dataclass(frozen=True)
class Operations:
    """What the tokens of a pass cost, in multiplications of the model: the weights' part goes by tokens, that
    of attention by context. The time of a pass is shared among its sequences by it."""

    per_token: float
    """With the weights of all layers."""

    per_pair: float
    """Of a query and a key that it sees, in all layers."""

    per_row: float
    """Of a position whose logits are wanted."""

    @classmethod
    def of(cls, spec: ModelSpec) -> Operations:
        """Those of a model; of experts count those that a token visits."""
        per_stage = [sum(_visited(spec.tensors[name], spec) for name in names) for names in spec.stages]
        return cls(sum(per_stage[1:-1]), 2.0 * spec.query_width * spec.num_layers, per_stage[-1])

    def of_tokens(self, tokens: int, before: int, rows: int) -> float:
        """Of a sequence's ``tokens`` in one pass, which follow ``before`` others that they attend to."""
        pairs = tokens * before + tokens * (tokens + 1) / 2
        return tokens * self.per_token + pairs * self.per_pair + rows * self.per_row


def _visited(tensor: TensorSpec, spec: ModelSpec) -> float:
    """Values of a weight with which one token is multiplied."""
    if not tensor.is_matrix:
        return 0.0
    experts = len(tensor.shape) > 2 and spec.experts_per_token
    return tensor.numel * (min(1.0, experts / tensor.shape[0]) if experts else 1.0)


def _work(batch: Sequence[_Admitted]) -> BatchWork:
    """The counts of a device batch as it is now."""
    prompts = [admitted for admitted in batch if not admitted.done]
    decoding = [admitted for admitted in batch if admitted.done]
    rows = sum(admitted.shape.generated > 0 for admitted in batch)
    return BatchWork(
        sequences=len(batch),
        new_tokens=sum(admitted.new_tokens for admitted in batch),
        prompts=len(prompts),
        prompt_pairs=sum(s.new_tokens * s.past + s.new_tokens * (s.new_tokens + 1) / 2 for s in prompts),
        prompt_tokens=sum(admitted.new_tokens for admitted in prompts),
        decodes=len(decoding),
        context=sum(admitted.past + 1 for admitted in decoding),
        kv_past=sum(admitted.done for admitted in batch if admitted.shape.need.cached),
        kv_shared=max((admitted.shape.shared for admitted in batch), default=0),
        kv_new=sum(admitted.new_tokens for admitted in batch if admitted.shape.need.cached),
        head_rows=rows + sum(admitted.shape.scored for admitted in prompts),
        kept=sum(admitted.shape.need.cached > 0 for admitted in batch),
        slots=tuple(admitted.slot for admitted in batch),
    )
