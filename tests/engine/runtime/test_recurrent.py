"""Models with recurrent layers answer as `transformers` does, wherever their state is kept."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from engine.engine import Engine
from engine.errors import BudgetError
from engine.memory.state.batch import Snapshot, StateRegion
from engine.memory.state.store import StateStore
from engine.spec.hardware import Budgets, Tier
from engine.spec.policy import Policy
from engine.spec.request import Output, Request
from tests.support.agreement import COMPARISON, TOLERANCE
from tests.support.engine_models import NEW_TOKENS, Family, prompts
from tests.support.engine_runs import answers
from tests.support.recurrent_models import CONFIGS, recurrent_family

MIXED = "0.3/0.3/0.4"
RUNS = {
    "resident": ("device_batch=16,num_device_batches=1", "cpu"),
    "all on disk": (
        "weights=disk,kv=disk,state=disk,activations=disk,device_batch=3,num_device_batches=2",
        "pretend",
    ),
    "every tier, in order": (
        f"weights={MIXED},kv={MIXED},state={MIXED},activations={MIXED},device_batch=2,"
        "num_device_batches=3,schedule=sequential",
        "cpu",
    ),
    "every tier, a prompt at a time": (
        f"weights=host,kv=host,state={MIXED},device_batch=4,num_device_batches=2,max_batch_tokens=8",
        "pretend",
    ),
}


@pytest.fixture(scope="module")
def recurrent(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Family]:
    """The tiny model of a family with recurrent layers, made at its first use."""
    made: dict[str, Family] = {}

    def get(name: str) -> Family:
        if name not in made:
            made[name] = recurrent_family(name, tmp_path_factory.mktemp("recurrent") / name)
        return made[name]

    return get


def all_kinds() -> list[Request]:
    """Requests for each prompt: completion with scoring, scoring only, fewer tokens, which leave early."""
    return (
        [Request(prompt, NEW_TOKENS, prompt_logprobs=True) for prompt in prompts()]
        + [Request(prompt, 0, prompt_logprobs=True) for prompt in prompts()]
        + [Request(prompt, 1 + i % NEW_TOKENS) for i, prompt in enumerate(prompts())]
    )


def check(family: Family, requests: list[Request], policy: str, device: str, offload: Path) -> None:
    known = dict(zip(prompts(), family.expected, strict=True))
    outputs = answers(family.folder, policy, requests, offload, device)
    for request, output in zip(requests, outputs, strict=True):
        COMPARISON.check(family.name, request, output, known[request.prompt])


@pytest.mark.parametrize("name", CONFIGS)
def test_family_answers_as_transformers(name: str, recurrent: Callable[[str], Family], offload: Path) -> None:
    for policy, device in RUNS.values():
        check(recurrent(name), all_kinds(), policy, device, offload)


def shared_load(seed: int = 1, count: int = 9) -> list[Request]:
    """Prompts with common beginnings of two lengths, and some that stand alone."""
    draw = random.Random(seed)

    def text(length: int) -> tuple[int, ...]:
        return tuple(draw.randrange(3, 90) for _ in range(length))

    examples, questions = text(26), [text(12) for _ in range(2)]
    found = [(*examples, *questions[i % 2], *text(1 + i % 4)) for i in range(count)]
    found += [found[0], examples, examples[:1], text(9)]
    return [
        Request(prompt, draw.choice((0, 1, 4, 7)), prompt_logprobs=index % 2 == 0)
        for index, prompt in enumerate(found)
    ]


def agree(ours: list[Output], others: list[Output], tolerance: float = TOLERANCE) -> None:
    for one, other in zip(ours, others, strict=True):
        assert one.tokens == other.tokens
        for mine, theirs in ((one.logprobs, other.logprobs), (one.prompt_logprobs, other.prompt_logprobs)):
            assert mine == pytest.approx(theirs, abs=tolerance)


CHAINS = [(10, "sequential"), (32, "overlapped"), (2048, "overlapped")]
"""Tokens a batch and schedule: chains of several segments, or one."""

ALL_CHAINS = [(tokens, schedule) for tokens in (10, 32, 2048) for schedule in ("sequential", "overlapped")]
USUAL = {"qwen3_next": "pretend", "mamba2": "cpu", "mamba": "pretend", "recurrent_gemma": "cpu"}
SHARED = [pytest.param(name, device, CHAINS, id=f"{name}-{device}") for name, device in USUAL.items()] + [
    pytest.param(name, device, ALL_CHAINS, id=f"{name}-{device}-all", marks=pytest.mark.slow)
    for name in USUAL
    for device in ("cpu", "pretend")
]
"""Each kind of state on one device by default; everything where slow tests are asked for."""


@pytest.mark.parametrize(("name", "device", "chains"), SHARED)
def test_a_shared_prefix_gives_the_answers_of_none_shared(
    name: str, device: str, chains: list[tuple[int, str]], recurrent: Callable[[str], Family], offload: Path
) -> None:
    folder, requests = recurrent(name).folder, shared_load()
    small = f"state={MIXED},kv={MIXED},device_batch=3,num_device_batches=2"
    expected = answers(folder, f"{small},prefix_sharing=off", requests, offload, device)
    for tokens, schedule in chains:
        policy = f"{small},prefix_sharing=on,max_batch_tokens={tokens},schedule={schedule}"
        agree(answers(folder, policy, requests, offload, device), expected)


@pytest.mark.parametrize("way", ["refill=off", "early_leaving=off", "padding=16", "state_quant=float32"])
def test_admission_and_padding_change_no_answer(
    way: str, recurrent: Callable[[str], Family], offload: Path
) -> None:
    small = "state=0.5/0/0.5,device_batch=2,num_device_batches=2"
    for name in ("qwen3_next", "falcon_h1"):
        check(recurrent(name), all_kinds(), f"{small},{way}", "cpu", offload)


@pytest.mark.parametrize("form, most", [("bfloat16", 0.03), ("8", 0.1)])
def test_fewer_bits_change_answers_a_little(
    form: str, most: float, recurrent: Callable[[str], Family], offload: Path
) -> None:
    family = recurrent("qwen3_next")
    forced = [Request(prompt, 4, forced=expected.tokens[:4]) for prompt, expected in zip(
        prompts(), family.expected, strict=True
    )]  # fmt: skip
    for place, device in (("device", "cpu"), (MIXED, "pretend")):
        policy = f"state={place},state_quant={form},device_batch=3,num_device_batches=2"
        outputs = answers(family.folder, policy, forced, offload, device)
        apart = [
            abs(mine - theirs)
            for output, expected in zip(outputs, family.expected, strict=True)
            for mine, theirs in zip(output.logprobs, expected.logprobs[:4], strict=True)
        ]
        assert 1e-6 < max(apart) < most


def test_state_is_freed_exactly_once(
    recurrent: Callable[[str], Family], offload: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    count: Counter[str] = Counter()
    allocate, free, drop = StateStore.allocate, StateStore.free, StateStore.drop

    def allocating(store: StateStore, slot: int, tokens: int) -> StateRegion | None:
        region = allocate(store, slot, tokens)
        count["taken"] += region is not None
        return region

    def freeing(store: StateStore, region: StateRegion) -> None:
        free(store, region)  # which refuses a second time
        count["freed"] += 1

    def dropping(store: StateStore, snapshot: Snapshot) -> None:
        drop(store, snapshot)
        count["dropped"] += 1

    monkeypatch.setattr(StateStore, "allocate", allocating)
    monkeypatch.setattr(StateStore, "free", freeing)
    monkeypatch.setattr(StateStore, "drop", dropping)
    requests = shared_load()
    policy = "device_batch=2,num_device_batches=2,prefix_sharing=on"
    answers(recurrent("mamba2").folder, policy, requests, offload)
    assert count["taken"] == count["freed"] == sum(request.max_new_tokens > 1 for request in requests)
    assert count["dropped"] > 0


@pytest.mark.parametrize("device", ["cpu", "pretend"])
@pytest.mark.parametrize("form", ["float32", "8"])
def test_no_tier_holds_more_than_planned(
    device: str, form: str, recurrent: Callable[[str], Family], offload: Path
) -> None:
    policy = Policy.parse(f"state={MIXED},state_quant={form},device_batch=2,num_device_batches=3")
    with Engine(recurrent("qwen3_next").folder, policy, offload_dir=offload, device=device) as engine:
        plan = engine.check(shared_load())
        engine.answer(shared_load())
        record = engine.record()
    assert record.together.peak <= plan.together
    for tier in Tier:
        if device == "pretend" or tier is Tier.DISK:
            assert record.memory[tier.value].peak <= plan.total(tier)
        assert plan.tiers[tier]["state"] > 0
        assert record.placement["state"][tier.value] > 0


def test_state_that_does_not_fit_is_refused_by_name(
    recurrent: Callable[[str], Family], offload: Path
) -> None:
    policy = Policy.parse("device_batch=2048,num_device_batches=8")
    requests = [Request(tuple(range(3, 9)), 3, prompt_logprobs=False)] * 16384
    budgets = Budgets(host=64 << 20)
    with (
        Engine(
            recurrent("mamba2").folder, policy, offload_dir=offload, device="cpu", budgets=budgets
        ) as engine,
        pytest.raises(BudgetError, match="state") as caught,
    ):
        engine.check(requests)
    assert "state_quant=8" in str(caught.value)
