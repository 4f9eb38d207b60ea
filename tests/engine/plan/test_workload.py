"""The planner's passes are those that the engine's own batching makes."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from engine.batching import Block, need_of
from engine.plan.workload import RequestShape, Workload
from engine.spec.policy import Policy
from engine.spec.request import Request

lengths = st.tuples(st.integers(1, 40), st.integers(0, 6))


def walked(requests: list[Request], policy: Policy) -> list[list[list[tuple[int, int, int]]]]:
    """Per pass and device batch (seat, fresh tokens, tokens before), as the engine has them."""
    block = Block(requests, policy)
    passes = []
    while True:
        block.refill(lambda seat, request: None)
        if not block.active:
            return passes
        passes.append([[(s.seat, len(s.fresh), s.done) for s in batch] for batch in block.batches if batch])
        for sequence in block.active:
            sequence.done += len(sequence.fresh)
            sequence.fresh = [0]
            sequence.passes += 1
            if sequence.passes >= max(sequence.request.max_new_tokens, 1):
                block.leave(sequence)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(lengths, min_size=1, max_size=25),
    st.integers(1, 5),
    st.integers(1, 3),
    st.integers(1, 60),
)
def test_same_passes(shapes: list[tuple[int, int]], size: int, batches: int, tokens: int) -> None:
    policy = Policy(device_batch=size, num_device_batches=batches, max_batch_tokens=tokens)
    requests = [Request((0,) * prompt, new, prompt_logprobs=new == 0) for prompt, new in shapes]
    workload = Workload.of(requests)
    assert workload.needs == [need_of(request) for request in requests]
    expected = walked(requests, policy)
    found = list(workload.passes(policy))
    assert len(found) == len(expected)
    for work, batches_then in zip(found, expected, strict=True):
        assert len(work.batches) == len(batches_then)
        for batch, sequences in zip(work.batches, batches_then, strict=True):
            assert batch.sequences == len(sequences)
            assert sorted(batch.seats) == sorted(seat for seat, _, _ in sequences)
            assert batch.new_tokens == sum(fresh for _, fresh, _ in sequences)
            assert batch.context == sum(done + 1 for _, _, done in sequences if done)
            pairs = sum(fresh * (fresh + 1) / 2 for _, fresh, done in sequences if not done)
            assert batch.prompt_pairs == pairs
    assert sum(work.generated for work in found) == workload.generated


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
    (work,) = Workload.of([Request((0,) * 10, prompt_logprobs=True)] * 2).passes(Policy())
    assert work.batches[0].head_rows == 18 and work.batches[0].kv_new == 0
