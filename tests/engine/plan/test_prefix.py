"""Shared prefixes as data: properties that the segments of any set of prompts must have."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.plan.prefix import (
    LEAST_SAVED,
    LEAST_SAVED_GENERATING,
    SHORTEST_CUT,
    Arrangement,
    arrange,
)

LONG = 10_000
token = st.integers(1, 2)


@st.composite
def prompts(draw: st.DrawFn) -> list[tuple[int, ...]]:
    """Prompts over two tokens, many of which begin with parts of a common text; some are repeated."""
    base = draw(st.lists(token, min_size=0, max_size=60))
    found: list[tuple[int, ...]] = []
    for _ in range(draw(st.integers(0, 9))):
        if found and draw(st.booleans()):
            earlier = found[draw(st.integers(0, len(found) - 1))]
            found.append((*earlier, *draw(st.lists(token, max_size=20))))
            continue
        begin = tuple(base[: draw(st.integers(0, len(base)))])
        found.append((*begin, *draw(st.lists(token, min_size=1, max_size=40))))
    return found


def own_tokens(arrangement: Arrangement, computed: list[tuple[int, ...]]) -> list[tuple[int, ...]]:
    return [prompt[arrangement.begin(index) :] for index, prompt in enumerate(computed)]


@settings(max_examples=300, deadline=None)
@given(computed=prompts(), most=st.sampled_from([1, 40, LONG]), data=st.data())
def test_segments_and_own_tokens_are_the_prompts(
    computed: list[tuple[int, ...]], most: int, data: st.DataObject
) -> None:
    ranks = [data.draw(st.integers(-2, 0)) for _ in computed]
    generating = [data.draw(st.booleans()) for _ in computed]
    found = arrange(computed, ranks, generating, share=True, most_tokens=most)
    assert sorted(found.order) == list(range(len(computed)))
    nodes = {prompt[:end] for prompt in computed for end in range(1, len(prompt) + 1)}
    assert found.distinct == len(nodes)
    for index, (prompt, own) in enumerate(zip(computed, own_tokens(found, computed), strict=True)):
        shared: tuple[int, ...] = ()
        for place in found.chain(found.inner[index]):
            segment = found.segments[place]
            assert segment.begin == len(shared) and 0 < len(segment.tokens) <= max(most, SHORTEST_CUT)
            shared += segment.tokens
        assert (*shared, *own) == prompt
        assert len(own) <= max(most, SHORTEST_CUT)
        assert own or not generating[index], "what comes after the last token is asked of this request alone"
    computed_tokens = sum(len(s.tokens) for s in found.segments) + sum(map(len, own_tokens(found, computed)))
    assert len(nodes) <= computed_tokens <= sum(map(len, computed))
    assert found == arrange(computed, ranks, generating, share=True, most_tokens=most), "it is deterministic"


@settings(max_examples=200, deadline=None)
@given(computed=prompts(), block=st.integers(1, 5), seed=st.integers(0, 1000))
def test_no_more_is_alive_than_planned(computed: list[tuple[int, ...]], block: int, seed: int) -> None:
    """Requests take slots in order and leave in any; those with a slot and the next keep their chains."""
    found = arrange(computed, [0] * len(computed), [True] * len(computed), share=True, most_tokens=LONG)
    planned, leaving = sum(found.most_alive(block)), random.Random(seed)
    waiting, admitted = list(found.order), []
    while waiting or admitted:
        while waiting and len(admitted) < block:
            admitted.append(waiting.pop(0))
        holders = [*admitted, *waiting[:1]]
        alive = {place for request in holders for place in found.chain(found.inner[request])}
        assert sum(len(found.segments[place].tokens) for place in alive) <= planned
        admitted.remove(leaving.choice(admitted))


def test_requests_of_a_segment_are_neighbours_and_ranks_decide_between_them() -> None:
    first, second = (1,) * 30, (2,) * 30
    computed = [(*first, 5), (*second, 5), (*first, 6), (*second, 6), (7,)]
    found = arrange(computed, [0, -9, 0, 0, -5], [True] * 5, share=True, most_tokens=LONG)
    assert found.order == (1, 3, 4, 0, 2)
    unshared = arrange(computed, [0, -9, 0, 0, -5], [True] * 5, share=False, most_tokens=LONG)
    assert unshared.order == (1, 4, 0, 2, 3) and not unshared.segments and unshared.distinct == 65


@pytest.mark.parametrize("generating,least", [(True, LEAST_SAVED_GENERATING), (False, LEAST_SAVED)])
def test_what_saves_too_little_is_not_shared(generating: bool, least: int) -> None:
    for length, shared in ((least, True), (least - 1, False)):
        computed = [((3,) * length) + (4, 4), ((3,) * length) + (5, 5)]
        found = arrange(computed, [0, 0], [generating] * 2, share=True, most_tokens=LONG)
        assert bool(found.segments) is shared


def test_nothing_and_single_tokens_have_no_segments() -> None:
    assert arrange([], [], [], share=True, most_tokens=LONG) == Arrangement((), (), (), 0)
    single = arrange([(1,)] * 40, [0] * 40, [True] * 40, share=True, most_tokens=LONG)
    assert not single.segments and single.distinct == 1


def test_a_scored_prompt_that_others_begin_with_has_no_token_of_its_own() -> None:
    text = tuple(range(50))
    computed = [text, (*text, 1), (*text, 2), text]
    found = arrange(computed, [0] * 4, [False] * 4, share=True, most_tokens=LONG)
    assert [len(own) for own in own_tokens(found, computed)] == [0, 1, 1, 0]


def test_each_longer_prompt_adds_its_new_tokens_only() -> None:
    """Hundreds of prompts, each the one before and a little more, neither recurse nor repeat."""
    computed = [tuple(range(20 * count)) for count in range(1, 2000)]
    found = arrange(computed, [0] * len(computed), [False] * len(computed), share=True, most_tokens=LONG)
    total = sum(len(s.tokens) for s in found.segments) + sum(map(len, own_tokens(found, computed)))
    assert total == found.distinct == len(computed[-1])


def test_a_long_prompt_is_cut_though_nobody_shares_it() -> None:
    found = arrange([tuple(range(1000))], [0], [True], share=True, most_tokens=300)
    assert [len(s.tokens) for s in found.segments] == [300, 300, 300]
    exact = arrange([tuple(range(600))], [0], [True], share=True, most_tokens=300)
    assert [len(s.tokens) for s in exact.segments] == [300] and exact.begin(0) == 300
