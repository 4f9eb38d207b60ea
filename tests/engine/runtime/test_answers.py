"""Answers: mixed calls, early ends, refilled slots, order, progress, refused requests."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine.engine import Engine
from engine.errors import RequestError
from engine.spec.policy import Placement, Policy, Schedule
from engine.spec.request import CallProgress, Output, Request
from tests.support.agreement import COMPARISON
from tests.support.engine_models import Family, full_forwards, prompts
from tests.support.engine_runs import answers

SMALL = "weights=0/0.5/0.5,kv=0.3/0.3/0.4,activations=0.5/0.5/0,device_batch=2,num_device_batches=2"


def near(output: Output, other: Output) -> bool:
    """Whether tokens are equal, and log-probabilities equal up to the order of float additions."""
    pairs = list(zip(output.logprobs, other.logprobs, strict=True))
    pairs += zip(output.prompt_logprobs or (), other.prompt_logprobs or (), strict=True)
    return (
        (output.tokens, output.finish_reason) == (other.tokens, other.finish_reason)
        and (output.prompt_logprobs is None) == (other.prompt_logprobs is None)
        and all(abs(a - b) < 1e-5 for a, b in pairs)
    )


def test_same_answers_whatever_the_batch_size(llama: Family, offload: Path) -> None:
    requests = [
        Request(prompt, 4, prompt_logprobs=index % 2 == 0, temperature=index % 3 / 2, seed=index)
        for index, prompt in enumerate(prompts((5, 1, 12, 3, 30, 2, 7)))
    ]
    alone = [answers(llama.folder, "weights=device", [request], offload)[0] for request in requests]
    for batch, batches in ((1, 1), (1, 7), (7, 1), (2, 2), (3, 2), (16, 4)):
        policy = f"{SMALL},device_batch={batch},num_device_batches={batches}"
        together = answers(llama.folder, policy, requests, offload)
        assert all(near(one, other) for one, other in zip(alone, together, strict=True))


def test_scoring_alone_generates_nothing(llama: Family, offload: Path) -> None:
    (prompt,) = prompts((9,))
    scored, neither = answers(
        llama.folder, SMALL, [Request(prompt, prompt_logprobs=True), Request(prompt)], offload
    )
    assert scored.tokens == neither.tokens == scored.logprobs == ()
    assert scored.prompt_logprobs is not None and len(scored.prompt_logprobs) == 8
    assert neither.prompt_logprobs is None
    assert scored.finish_reason == "length"


def test_prompt_of_one_token_has_no_log_probability(llama: Family, offload: Path) -> None:
    (output,) = answers(llama.folder, SMALL, [Request((7,), 2, prompt_logprobs=True)], offload)
    assert output.prompt_logprobs == () and len(output.tokens) == 2


def test_shorthands_equal_answer(llama: Family, offload: Path) -> None:
    with Engine(llama.folder, Policy(), offload_dir=offload, device="cpu") as engine:
        generated = engine.generate(prompts()[:3], 3)
        scored = engine.score(prompts()[:3])
    for output, expected in zip(generated, llama.expected, strict=False):
        assert output.tokens == expected.tokens[:3]
    for got, expected in zip(scored, llama.expected, strict=False):
        assert got == pytest.approx(expected.prompt_logprobs, abs=1e-4)


def test_end_of_sequence_stops_and_stays_in_the_output(llama: Family, offload: Path) -> None:
    prompt, expected = prompts()[0], llama.expected[0]
    end = expected.tokens[2]
    length = expected.tokens.index(end) + 1
    (output,) = answers(llama.folder, SMALL, [Request(prompt, 5, stop_token_ids=frozenset({end}))], offload)
    assert output.tokens == expected.tokens[:length]
    assert (output.finish_reason, len(output.logprobs)) == ("eos", length)


def test_stop_check_sees_all_tokens_so_far(llama: Family, offload: Path) -> None:
    seen: list[tuple[int, ...]] = []

    def stop(tokens: Sequence[int]) -> bool:
        seen.append(tuple(tokens))
        return len(tokens) == 3

    (output,) = answers(llama.folder, SMALL, [Request(prompts()[0], 5, stop=stop)], offload)
    tokens = llama.expected[0].tokens
    assert seen == [tokens[:1], tokens[:2], tokens[:3]]
    assert (output.tokens, output.finish_reason) == (tokens[:3], "stop")


@pytest.mark.parametrize("schedule", list(Schedule))
@pytest.mark.parametrize("device", ["cpu", "pretend"])
def test_seats_are_refilled_when_sequences_leave(
    schedule: Schedule, device: str, llama: Family, offload: Path
) -> None:
    """Ten requests of unlike lengths over three slots; each is answered as if alone."""
    lengths = (4, 1, 19, 2, 8, 1, 27, 3, 6, 11)
    wanted = (1, 6, 2, 5, 0, 3, 1, 4, 2, 6)
    requests = [
        Request(prompt, count, prompt_logprobs=True)
        for prompt, count in zip(prompts(lengths, seed=5), wanted, strict=True)
    ]
    finished: list[int] = []
    policy = Policy.parse(f"{SMALL},device_batch=3,num_device_batches=1,schedule={schedule}")
    with Engine(llama.folder, policy, offload_dir=offload, device=device) as engine:
        outputs = engine.answer(requests, on_output=lambda index, output: finished.append(index))
    for request, output in zip(requests, outputs, strict=True):
        COMPARISON.check("llama", request, output, full_forwards(llama.model, request.prompt, 6))
    assert sorted(finished) == list(range(10))
    assert finished[:3] == [3, 1, 9], "those that may generate most begin, and wait for nobody"
    assert all(output.block_size >= 1 and output.block_seconds > 0 for output in outputs)


def test_progress_counts_up_to_the_whole(llama: Family, offload: Path) -> None:
    reports: list[CallProgress] = []
    order: list[str] = []
    requests = [Request(prompt, 1 + index) for index, prompt in enumerate(prompts((3, 4, 5, 6, 7)))]

    def note(progress: CallProgress) -> None:
        reports.append(progress)
        order.append("pass")

    with Engine(llama.folder, Policy.parse(SMALL), offload_dir=offload, device="cpu") as engine:
        engine.answer(requests, on_output=lambda *_: order.append("output"), on_progress=note)
        totals = engine.record().totals
    assert [report.passes for report in reports] == list(range(1, len(reports) + 1))
    for earlier, later in itertools.pairwise(reports):
        assert earlier.finished <= later.finished
        assert earlier.generated_tokens <= later.generated_tokens
        assert earlier.seconds <= later.seconds
    last = reports[-1]
    assert (last.finished, last.total) == (5, 5)
    assert (last.prompt_tokens, last.generated_tokens, last.eta_seconds) == (25, 15, 0)
    passes_left = order[order.index("output") :].count("pass")
    assert passes_left > 1, "answers come as they are ready"
    assert (totals.requests, totals.prompt_tokens, totals.generated_tokens) == (5, 25, 15)
    assert totals.seconds > 0 and totals.load_seconds > 0


def test_nothing_asked_nothing_loaded(llama: Family, offload: Path) -> None:
    with Engine(llama.folder, Policy.parse(SMALL), offload_dir=offload, device="cpu") as engine:
        assert engine.answer([]) == []
        assert engine._weights is None


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        (Request(()), "empty prompt"),
        (Request((3, 128)), "token id 128"),
        (Request((3, -1)), "token id -1"),
        (Request((3,), -1), "max_new_tokens=-1"),
        (Request((3,), 1, temperature=-0.5), "temperature=-0.5"),
        (Request((3,), 1, temperature=float("nan")), "temperature=nan"),
        (Request((3,), 1, top_p=0.0), "top_p=0"),
        (Request((3,), 1, top_p=1.5), "top_p=1.5"),
        (Request((3,), 1, top_k=-2), "top_k=-2"),
        (Request((3,) * 120, 10), "needs 129 positions"),
        (Request((3,) * 129, 1), "needs 129 positions"),
        (Request((3,) * 130, prompt_logprobs=True), "needs 129 positions"),
    ],
)
def test_impossible_requests_are_refused_before_loading(
    request_: Request, words: str, llama: Family, offload: Path
) -> None:
    with Engine(llama.folder, Policy.parse(SMALL), offload_dir=offload, device="cpu") as engine:
        with pytest.raises(RequestError) as caught:
            engine.answer([Request((3, 4), 1), request_])
        assert engine._weights is None
    message = str(caught.value)
    assert words in message and "request 1" in message and "\n" not in message


def test_window_is_used_to_its_last_position(llama: Family, offload: Path) -> None:
    """With 128 positions, 129 tokens can be scored, and 128 prompt tokens give one new token."""
    (long,) = prompts((129,))
    score, one, most = (
        Request(long, prompt_logprobs=True),
        Request(long[:128], 1),
        Request(long[:120], 9),
    )
    outputs = answers(llama.folder, SMALL, [score, one, most], offload)
    assert len(outputs[0].prompt_logprobs or ()) == 128
    expected = full_forwards(llama.model, long[:128], 1)
    COMPARISON.check("llama", one, outputs[1], expected)
    COMPARISON.check("llama", most, outputs[2], full_forwards(llama.model, long[:120], 9))
    assert (outputs[0].prompt_logprobs or ())[:127] == pytest.approx(expected.prompt_logprobs, abs=1e-4)


@st.composite
def placements(draw: st.DrawFn) -> Placement:
    """Fractions of three tiers in tenths, which sum to one."""
    device = draw(st.integers(0, 10))
    host = draw(st.integers(0, 10 - device))
    return Placement(device / 10, host / 10, (10 - device - host) / 10)


@given(
    weights=placements(), kv=placements(), activations=placements(),
    shape=st.tuples(st.integers(1, 5), st.integers(1, 4)),
    max_batch_tokens=st.integers(1, 60),
    schedule=st.sampled_from(list(Schedule)),
    device=st.sampled_from(["cpu", "pretend"]),
    sizes=st.lists(st.tuples(st.integers(1, 40), st.integers(0, 5), st.booleans()), min_size=1, max_size=9),
)  # fmt: skip
@settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_any_policy_equals_the_sequential_resident_run(
    weights: Placement, kv: Placement, activations: Placement, shape: tuple[int, int], max_batch_tokens: int,
    schedule: Schedule, device: str, sizes: list[tuple[int, int, bool]], llama: Family, offload: Path,
) -> None:  # fmt: skip
    requests = [
        Request(prompt, count, prompt_logprobs=scored)
        for prompt, (_, count, scored) in zip(prompts([size for size, _, _ in sizes]), sizes, strict=True)
    ]
    plain = answers(
        llama.folder, "device_batch=1,num_device_batches=1,schedule=sequential", requests, offload
    )
    policy = Policy(
        weights=weights, kv=kv, activations=activations, device_batch=shape[0], num_device_batches=shape[1],
        max_batch_tokens=max_batch_tokens, schedule=schedule,
    )  # fmt: skip
    got = answers(llama.folder, policy, requests, offload, device)
    assert all(near(one, other) for one, other in zip(plain, got, strict=True))
