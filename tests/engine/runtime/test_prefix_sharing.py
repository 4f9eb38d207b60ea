"""Shared prefixes, padding and admission change what is computed, never the answers."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine.engine import Engine
from engine.errors import PolicyError
from engine.spec.hardware import Tier
from engine.spec.policy import Policy
from engine.spec.request import Output, Request
from tests.support.agreement import TOLERANCE
from tests.support.engine_models import FAMILIES, Family, full_forwards

SMALL = "device_batch=4,num_device_batches=2"
PLAIN = "prefix_sharing=off"
FLEXGEN = "prefix_sharing=off,refill=off,early_leaving=off,padding=16"


def load(seed: int = 1, count: int = 14) -> list[Request]:
    """Few-shot prompts: common examples, three questions, several continuations; and some unusual ones."""
    draw = random.Random(seed)

    def text(length: int) -> tuple[int, ...]:
        return tuple(draw.randrange(3, 90) for _ in range(length))

    examples, questions = text(26), [text(12) for _ in range(3)]
    prompts = [(*examples, *questions[i % 3], *text(1 + i % 4)) for i in range(count)]
    prompts += [prompts[0], examples, examples[:1], prompts[0][:30], text(9)]
    new = [draw.choice((0, 1, 4, 7)) for _ in prompts]
    return [
        Request(prompt, count, prompt_logprobs=not count or draw.random() < 0.5)
        for prompt, count in zip(prompts, new, strict=True)
    ]


def agree(ours: list[Output], others: list[Output]) -> None:
    """Assert the same tokens and greedy flags, and log-probabilities within the tolerance."""
    assert len(ours) == len(others)
    for one, other in zip(ours, others, strict=True):
        assert one.tokens == other.tokens and one.finish_reason == other.finish_reason
        assert one.prompt_greedy == other.prompt_greedy and one.greedy == other.greedy
        for mine, theirs in ((one.logprobs, other.logprobs), (one.prompt_logprobs, other.prompt_logprobs)):
            assert (mine is None) == (theirs is None)
            assert mine == pytest.approx(theirs, abs=TOLERANCE)


@pytest.mark.parametrize("name", FAMILIES)
def test_answers_of_every_family_are_those_without_sharing(
    name: str, family: Callable[[str], Family], offload: Path
) -> None:
    requests = load(count=6)
    with Engine(family(name).folder, Policy.parse(f"{SMALL},{PLAIN}"), offload_dir=offload) as engine:
        expected = engine.answer(requests)
    with Engine(
        family(name).folder, Policy.parse(f"{SMALL},prefix_sharing=on"), offload_dir=offload
    ) as engine:
        agree(engine.answer(requests), expected)
        totals = engine.record().totals
    assert totals.shared_tokens > 6 * 26 and totals.computed_tokens < 0.6 * totals.prompt_tokens


@pytest.mark.parametrize("bits", ["16", "4", "2-g32/8"])
@pytest.mark.parametrize("device", ["cpu", "pretend"])
@pytest.mark.parametrize(
    "where",
    [
        "kv=device",
        "kv=host",
        "kv=0.3/0.3/0.4,schedule=sequential",
        "weights=disk,kv=disk,activations=host",
        "prefix_kv=host,kv=0.5/0/0.5",
        "prefix_kv=disk,weights=disk",
        "prefix_kv=disk,schedule=sequential",
    ],
)
def test_answers_do_not_depend_on_tiers_and_bits(
    where: str, device: str, bits: str, llama: Family, offload: Path
) -> None:
    """Prompts attend to an exact prefix, decoding to the policy's format, as if each sequence had its own."""
    requests = load()
    policies = [
        Policy.parse(f"{SMALL},{where},kv_quant={bits},{sharing}") for sharing in (PLAIN, "prefix_sharing=on")
    ]
    answers = []
    for policy in policies:
        with Engine(llama.folder, policy, offload_dir=offload, device=device) as engine:
            answers.append(engine.answer(requests))
            memory = engine.record().memory
        assert all(memory[tier.value].peak <= memory[tier.value].planned for tier in (Tier.DEVICE, Tier.DISK))
    agree(answers[1], answers[0])


@pytest.mark.parametrize(
    "ways",
    [
        "refill=off", "padding=16", FLEXGEN, "refill=off,prefix_sharing=on", "max_batch_tokens=33",
        "early_leaving=off", "padding=64,kv=disk", "padding=64,kv=host,kv_quant=8", f"{FLEXGEN},kv_quant=8",
    ],
)  # fmt: skip
@pytest.mark.parametrize("device", ["cpu", "pretend"])
def test_answers_do_not_depend_on_how_requests_are_taken(
    ways: str, device: str, llama: Family, offload: Path
) -> None:
    requests = load(2)
    kept = "kv_quant=8" if "kv_quant=8" in ways else "kv_quant=16"
    with Engine(llama.folder, Policy.parse(f"{SMALL},{PLAIN},{kept}"), offload_dir=offload) as engine:
        expected = engine.answer(requests)
    with Engine(llama.folder, Policy.parse(f"{SMALL},{ways}"), offload_dir=offload, device=device) as engine:
        agree(engine.answer(requests), expected)


def test_a_shared_load_is_answered_as_transformers_does(llama: Family, offload: Path) -> None:
    requests = [request for request in load(3) if request.max_new_tokens]
    with Engine(llama.folder, Policy.parse(f"{SMALL},prefix_sharing=on"), offload_dir=offload) as engine:
        outputs = engine.answer(requests)
    for request, output in zip(requests, outputs, strict=True):
        expected = full_forwards(llama.model, request.prompt, request.max_new_tokens)
        assert output.tokens == expected.tokens
        assert output.logprobs == pytest.approx(expected.logprobs, abs=TOLERANCE)
        if request.prompt_logprobs:
            assert output.prompt_logprobs == pytest.approx(expected.prompt_logprobs, abs=TOLERANCE)


@pytest.fixture(scope="module")
def pair(
    family: Callable[[str], Family], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Engine, Engine]]:
    """Two engines over few slots, without sharing and with it."""
    folder, offload = family("llama").folder, tmp_path_factory.mktemp("offload")
    text = "device_batch=2,num_device_batches=2,max_batch_tokens=40"
    with (
        Engine(folder, Policy.parse(f"{text},{PLAIN}"), offload_dir=offload) as plain,
        Engine(folder, Policy.parse(f"{text},prefix_sharing=on"), offload_dir=offload) as shared,
    ):
        yield plain, shared


@st.composite
def trees(draw: st.DrawFn) -> list[Request]:
    """Requests along random paths of a small tree: repeats, prefixes of one another, single tokens."""
    stretches = [
        draw(st.lists(st.integers(3, 90), min_size=1, max_size=25)) for _ in range(draw(st.integers(1, 4)))
    ]
    requests = []
    for _ in range(draw(st.integers(0, 9))):
        path = draw(st.lists(st.sampled_from(stretches), min_size=1, max_size=3))
        prompt = tuple(token for stretch in path for token in stretch)[: draw(st.integers(1, 75))]
        new = draw(st.sampled_from([0, 0, 1, 3]))
        requests.append(Request(prompt, new, prompt_logprobs=not new or draw(st.booleans())))
    return requests


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(requests=trees())
def test_any_tree_of_prompts_is_answered_alike(requests: list[Request], pair: tuple[Engine, Engine]) -> None:
    plain, shared = pair
    agree(shared.answer(requests), plain.answer(requests))


def test_room_is_given_back_once_and_exactly(llama: Family, offload: Path) -> None:
    """After every call the ledger holds the same bytes as before the second one: the weights."""
    policy = Policy.parse(f"{SMALL},prefix_sharing=on,kv_quant=8")
    with Engine(llama.folder, policy, offload_dir=offload) as engine:
        held = []
        for seed in range(3):
            engine.answer(load(seed))
            held.append(dict(engine._tiers.ledger.held))
        assert held[0] == held[1] == held[2]
        assert held[0][Tier.DEVICE] + held[0][Tier.HOST] < 4 * engine.spec.num_parameters + (1 << 20)


def test_no_request_starves_and_the_order_is_deterministic(llama: Family, offload: Path) -> None:
    """With one slot, which prefixes and requests use in turn."""
    requests = load(4, count=8)
    orders = []
    for _ in range(2):
        order: list[int] = []
        with Engine(
            llama.folder,
            Policy.parse("device_batch=1,num_device_batches=1,prefix_sharing=on"),
            offload_dir=offload,
        ) as engine:
            engine.answer(requests, on_output=lambda index, _, order=order: order.append(index))
        orders.append(order)
    assert sorted(orders[0]) == list(range(len(requests))) and orders[0] == orders[1]


def test_logits_are_shown_for_all_tokens_of_every_request(llama: Family, offload: Path) -> None:
    requests = [Request(request.prompt, prompt_logprobs=True) for request in load(5, count=5)]
    shown: dict[int, int] = {}

    def show(index: int, position: int, logits: object) -> None:
        assert position == shown.get(index, 0)
        shown[index] = position + len(logits)  # type: ignore[arg-type]

    with Engine(llama.folder, Policy.parse(f"{SMALL},prefix_sharing=on"), offload_dir=offload) as engine:
        engine.answer(requests, on_logits=show)
    assert shown == {i: len(r.prompt) - 1 for i, r in enumerate(requests) if len(r.prompt) > 1}


def test_savings_are_counted(llama: Family, offload: Path) -> None:
    examples = tuple(range(3, 43))
    requests = [Request((*examples, 50 + i), 1) for i in range(7)] + [Request((*examples, 60, 61), 3)]
    totals, savings = {}, {}
    for name in ("on", "off"):
        policy = Policy.parse(f"device_batch=8,num_device_batches=2,prefix_sharing={name}")
        with Engine(llama.folder, policy, offload_dir=offload) as engine:
            engine.answer(requests)
            record = engine.record()
        totals[name], savings[name] = record.totals, record.to_json()["savings"]
    prompt = 7 * 41 + 42
    assert totals["off"].computed_tokens == prompt + 2
    assert totals["on"].computed_tokens == 40 + 7 + 2 + 2
    for name, found in savings.items():
        assert found["prompt_tokens"] == prompt and found["generated_tokens"] == 10
        assert found["needed_tokens"] == 40 + 7 + 2 + 10
        assert found["computed_tokens"] == totals[name].computed_tokens
    assert totals["on"].shared_tokens == 8 * 40 and totals["off"].shared_tokens == 0
    assert totals["on"].passes == totals["off"].passes == 3
    assert savings["off"]["occupancy"] == pytest.approx((8 + 1 + 1) / (3 * 16))


@pytest.mark.parametrize("kept", ["kv_quant=kivi", "kv_quant=4+8", "attention_fraction=0.5", "padding=8"])
def test_where_answers_would_differ_nothing_is_shared(kept: str) -> None:
    assert not Policy.parse(kept).shares_prefixes
    with pytest.raises(PolicyError, match="prefix_sharing=on would change answers"):
        Policy.parse(f"{kept},prefix_sharing=on")
