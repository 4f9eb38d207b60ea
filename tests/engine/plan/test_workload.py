"""The planner's passes equal those of the engine's own batching."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from engine.plan.memory import SequenceNeed
from engine.plan.prefix import Arrangement, arrange_requests
from engine.plan.workload import RequestShape, Workload
from engine.runtime.batching import Block
from engine.runtime.sequences import Prefix, RequestSequence
from engine.spec.policy import Policy, PrefixSharing
from engine.spec.request import Request

texts = st.lists(st.tuples(st.sampled_from(["", "a", "ab", "ac"]), st.integers(1, 40), st.integers(0, 6)),
                 min_size=1, max_size=25)  # fmt: skip
"""Which long stretches a prompt begins with, how many tokens follow, how many are generated."""

STRETCH = 30


def prompt_of(stretches: str, own: int, index: int) -> tuple[int, ...]:
    """Stretches that other prompts share, then tokens of its own."""
    shared = tuple(1 + ord(letter) for letter in stretches for _ in range(STRETCH))
    return (*shared, *range(1000 * (index + 1), 1000 * (index + 1) + own))


def walked(requests: list[Request], policy: Policy) -> list[list[list[tuple[int, int, int, int]]]]:
    """Per pass and device batch (slot, fresh tokens, own tokens before, shared ones), as the engine does."""
    block = Block(requests, policy, arrange_requests(requests, policy))
    passes = []
    while True:
        block.refill(lambda computed: None)
        for sequence in list(block.prefix_only):
            block.leave(sequence)
        if not block.active:
            return passes
        passes.append(
            [[(s.slot, len(s.fresh), s.done, s.begin) for s in batch] for batch in block.batches if batch]
        )
        for computed in block.active:
            computed.done += len(computed.fresh)
            computed.fresh = [0]
            if isinstance(computed, RequestSequence):
                computed.passes += 1
                if computed.passes < max(computed.request.max_new_tokens, 1):
                    continue
            block.leave(computed)


@settings(max_examples=60, deadline=None)
@given(
    texts,
    st.integers(1, 5),
    st.integers(1, 3),
    st.integers(1, 120),
    st.sampled_from(list(PrefixSharing)[::2]),
    st.booleans(),
)
def test_same_passes(
    shapes: list[tuple[str, int, int]],
    size: int,
    batches: int,
    tokens: int,
    sharing: PrefixSharing,
    refill: bool,
) -> None:
    policy = Policy(
        device_batch=size,
        num_device_batches=batches,
        max_batch_tokens=tokens,
        prefix_sharing=sharing,
        refill=refill,
    )
    requests = [
        Request(prompt_of(stretches, own, i), new, prompt_logprobs=new == 0)
        for i, (stretches, own, new) in enumerate(shapes)
    ]
    workload = Workload.of(requests, policy)
    expected = walked(requests, policy)
    found = list(workload.passes(policy))
    assert len(found) == len(expected)
    for work, batches_then in zip(found, expected, strict=True):
        assert len(work.batches) == len(batches_then)
        for batch, sequences in zip(work.batches, batches_then, strict=True):
            assert batch.sequences == len(sequences)
            assert sorted(batch.slots) == sorted(slot for slot, *_ in sequences)
            assert batch.new_tokens == sum(fresh for _, fresh, _, _ in sequences)
            assert batch.context == sum(done + begin + 1 for _, _, done, begin in sequences if done)
            pairs = sum(
                fresh * begin + fresh * (fresh + 1) / 2 for _, fresh, done, begin in sequences if not done
            )
            assert batch.prompt_pairs == pairs
    assert sum(work.generated for work in found) == workload.generated


def own_sequence(request: Request, index: int, policy: Policy, arrangement: Arrangement) -> RequestSequence:
    """The engine's sequence of a request."""
    inner, chain = None, arrangement.chain(arrangement.inner[index])
    for place in chain:
        inner = Prefix(arrangement.segments[place], inner)
    return RequestSequence.of(index, request, inner, policy)


def test_needs_are_what_the_engine_computes_and_keeps() -> None:
    """Including padding, sharing and scoring; the last generated token is never computed."""
    requests = [
        Request(prompt_of("ab", 1 + i, i), new, prompt_logprobs=not new) for i, new in enumerate((0, 1, 2, 9))
    ]
    for text in ("padding=16", "prefix_sharing=off", "prefix_sharing=on"):
        policy = Policy.parse(text)
        arrangement = arrange_requests(requests, policy)
        needs = []
        for i, request in enumerate(requests):
            own = own_sequence(request, i, policy, arrangement)
            cached = own.new_tokens + request.max_new_tokens - 1 if request.max_new_tokens > 1 else 0
            needs.append(SequenceNeed(own.new_tokens, cached, own.begin))
            assert RequestShape.of(request, policy, own.begin).need == needs[-1]
        needs += [SequenceNeed(len(segment.tokens), 0, segment.begin) for segment in arrangement.segments]
        found = Workload.of(requests, policy).needs
        assert sorted(found, key=repr) == sorted((need for need in needs if need.computed), key=repr)


def test_shared_prefixes_are_attended_to_and_not_computed() -> None:
    alone = Workload([RequestShape(100, 3)] * 4)
    shared = Workload([RequestShape(100, 3), *[RequestShape(100, 3, shared=80)] * 3])
    policy = Policy(device_batch=4, num_device_batches=1)
    first, later, _ = shared.passes(policy)
    plain, plain_later, _ = alone.passes(policy)
    assert first.new_tokens == 100 + 3 * 20 and plain.new_tokens == 400
    assert first.batches[0].prompt_pairs == 100 * 101 / 2 + 3 * (20 * 80 + 20 * 21 / 2)
    assert later.batches[0].context == plain_later.batches[0].context
    assert later.batches[0].kv_past == 160 and later.batches[0].kv_shared == 80
    assert shared.needs[1].cached == 22


def test_scored_positions_want_logits() -> None:
    plain = Policy.parse("prefix_sharing=off")
    (work,) = Workload.of([Request((0,) * 10, prompt_logprobs=True)] * 2, plain).passes(plain)
    assert work.batches[0].head_rows == 18 and work.batches[0].kv_new == 0
