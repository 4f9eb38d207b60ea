"""Rules for logits are those of transformers' processors in vLLM's order, and hold in every batch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from engine.errors import RequestError
from engine.runtime.sampling import Sampler, top_tokens
from engine.spec.request import LogitRules, Request
from tests.support.engine_models import Family, prompts
from tests.support.engine_runs import answers

VOCABULARY, ENDS = 40, frozenset({3, 7})
PROMPT, GENERATED = (5, 9, 9, 30), [9, 12, 12, 12, 8]

RULES = [
    LogitRules(),
    LogitRules(repetition_penalty=1.4),
    LogitRules(repetition_penalty=0.7),
    LogitRules(frequency_penalty=0.8, presence_penalty=-0.5),
    LogitRules(presence_penalty=1.5),
    LogitRules(bias=((3, 4.0), (12, -100.0), (30, 2.5))),
    LogitRules(min_tokens=6),
    LogitRules(min_tokens=5),
    LogitRules(min_p=0.2),
    LogitRules(
        min_tokens=9, bias=((9, 3.0), (3, 50.0)), repetition_penalty=1.2, frequency_penalty=0.3,
        presence_penalty=0.2, min_p=0.05,
    ),
]  # fmt: skip
SAMPLING = [
    {"temperature": 0.0},
    {"temperature": 1.0},
    {"temperature": 0.6, "top_k": 5},
    {"temperature": 1.7, "top_p": 0.7},
    {"temperature": 1.2, "top_k": 8, "top_p": 0.6},
]


def processed(logits: torch.Tensor, request: Request, tokens: Sequence[int]) -> torch.Tensor:
    """Scores [V] by transformers' processors; the two penalties that it lacks are in plain Python."""
    rules, ids = request.rules, torch.tensor([[*request.prompt, *tokens]])
    before = LogitsProcessorList()
    if rules.min_tokens:
        before.append(
            MinNewTokensLengthLogitsProcessor(
                len(request.prompt), rules.min_tokens, sorted(request.stop_token_ids)
            )
        )
    if rules.bias:
        before.append(SequenceBiasLogitsProcessor([[[token], bias] for token, bias in rules.bias]))
    before.append(RepetitionPenaltyLogitsProcessor(rules.repetition_penalty))
    scores = before(ids, logits[None].double())
    for token in set(tokens):
        scores[0, token] -= rules.frequency_penalty * tokens.count(token) + rules.presence_penalty
    after = LogitsProcessorList()
    if request.temperature:
        after.append(TemperatureLogitsWarper(request.temperature))
        if rules.min_p:
            after.append(MinPLogitsWarper(rules.min_p))
        if request.top_k:
            after.append(TopKLogitsWarper(request.top_k))
        if request.top_p < 1:
            after.append(TopPLogitsWarper(request.top_p))
    return after(ids, scores)[0]


@pytest.mark.parametrize("sampling", SAMPLING, ids=str)
@pytest.mark.parametrize("rules", RULES, ids=range(len(RULES)))
def test_choices_are_those_of_transformers(rules: LogitRules, sampling: dict[str, Any]) -> None:
    """A draw is the place of one random number in the cumulative sum of the sorted probabilities."""
    noise = torch.Generator().manual_seed(1)
    for seed in range(25):
        logits = torch.randn(VOCABULARY, generator=noise) * 2
        before = logits.clone()
        request = Request(PROMPT, 20, rules=rules, stop_token_ids=ENDS, seed=seed, **sampling)
        found = Sampler(request).choose(logits, GENERATED, int(logits.argmax()))
        assert torch.equal(logits, before), "log-probabilities are taken from them afterwards"
        scores = processed(logits, request, GENERATED)
        if not request.temperature:
            assert found == int(scores.argmax())
            continue
        sorted_, order = torch.softmax(scores, -1).sort(descending=True, stable=True)
        draw = torch.rand((), dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        place = int(torch.searchsorted(sorted_.cumsum(-1), draw, right=True))
        assert found == int(order[min(place, int(sorted_.count_nonzero()) - 1)])


class Alternating:
    """A guide that allows even and odd ids in turn, and at last the end alone."""

    def __init__(self, length: int) -> None:
        self._taken: list[int] = []
        self._length = length

    def allowed(self) -> bytes:
        if len(self._taken) == self._length:
            return bytes([1 << 3])
        return bytes([0b01010101 << len(self._taken) % 2] * 5)

    def accept(self, token: int) -> None:
        self._taken.append(token)


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_a_guide_says_what_may_come(temperature: float) -> None:
    rules = LogitRules(guide=lambda: Alternating(6), bias=((1, -100.0),), min_tokens=3)
    request = Request(PROMPT, 20, rules=rules, stop_token_ids=ENDS, temperature=temperature)
    sampler, tokens = Sampler(request), []
    for seed in range(7):
        logits = torch.randn(VOCABULARY + 3, generator=torch.Generator().manual_seed(seed)) * 3
        tokens.append(sampler.choose(logits, tokens, int(logits.argmax())))
    assert [token % 2 for token in tokens[:6]] == [0, 1] * 3 and tokens[6] == 3
    assert max(tokens) < VOCABULARY, "what the guide does not know is not allowed"


def test_min_tokens_gives_way_where_a_guide_allows_the_end_alone() -> None:
    rules = LogitRules(guide=lambda: Alternating(0), min_tokens=5)
    request = Request(PROMPT, 20, rules=rules, stop_token_ids=ENDS)
    assert Sampler(request).choose(torch.zeros(VOCABULARY), [], 0) == 3


def test_top_tokens_are_the_most_probable_ones() -> None:
    logits = torch.tensor([1.0, 3.0, 3.0, -2.0, 3.0, 0.5])
    lse = float(logits.logsumexp(-1))
    assert top_tokens(logits, lse, token=0, best=1, count=1).tokens == (1,), "as greedy as the choice"
    found = top_tokens(logits, lse, token=5, best=1, count=4)
    assert found.tokens == (1, 2, 4, 0) and found.rank == 5
    assert found.logprobs == pytest.approx([3 - lse] * 3 + [1 - lse])
    assert found.first(2).tokens == (1, 2) and found.first(2).rank == 5
    assert top_tokens(logits, lse, token=4, best=1, count=9).tokens == (1, 2, 4, 0, 5, 3)


RULED = LogitRules(
    repetition_penalty=1.3, frequency_penalty=0.4, presence_penalty=0.3, min_p=0.02, min_tokens=4,
    bias=((17, 1.5), (40, -3.0)),
)  # fmt: skip


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_rules_hold_in_every_batch(llama: Family, offload: Path, temperature: float) -> None:
    """Alone, ragged, refilled, from disk, and behind a shared prefix."""
    (shared,) = prompts((20,), seed=5)
    requests = [
        Request(
            (*shared[: 20 * (i % 2)], *prompt), 3 + 2 * i, temperature=temperature, top_p=0.9, seed=i,
            rules=RULED if i % 3 else LogitRules(), stop_token_ids=frozenset({50, 60, 70}),
            top_logprobs=i % 3,
        )
        for i, prompt in enumerate(prompts((4, 11, 1, 7, 2, 9, 5)))
    ]  # fmt: skip
    alone = [answers(llama.folder, "weights=device", [request], offload)[0] for request in requests]
    for policy in (
        "device_batch=3,num_device_batches=1",
        "device_batch=2,num_device_batches=1,early_leaving=off,refill=off",
        "kv=disk,weights=disk,device_batch=2,num_device_batches=2",
    ):
        together = answers(llama.folder, policy, requests, offload, "pretend")
        assert [output.tokens for output in together] == [output.tokens for output in alone]
        assert [len(output.top_logprobs) for output in together] == [
            len(output.tokens) if request.top_logprobs else 0
            for output, request in zip(together, requests, strict=True)
        ]


def test_greedy_answers_with_rules_are_those_of_transformers(llama: Family, offload: Path) -> None:
    rules = LogitRules(repetition_penalty=1.5, bias=((17, 3.0),), min_tokens=6)
    for prompt in prompts((5, 12)):
        free = llama.model.generate(
            torch.tensor([prompt]), max_new_tokens=12, do_sample=False, repetition_penalty=1.5,
            sequence_bias=[[[17], 3.0]], eos_token_id=None, pad_token_id=0,
        )[0, len(prompt) :].tolist()  # fmt: skip
        ends = [free[2], free[8]]
        expected = llama.model.generate(
            torch.tensor([prompt]), max_new_tokens=12, do_sample=False, repetition_penalty=1.5,
            sequence_bias=[[[17], 3.0]], min_new_tokens=6, eos_token_id=ends, pad_token_id=0,
        )[0, len(prompt) :].tolist()  # fmt: skip
        request = Request(prompt, 12, rules=rules, stop_token_ids=frozenset(ends))
        (output,) = answers(llama.folder, "weights=device", [request], offload)
        assert list(output.tokens) == expected and output.tokens[2] != free[2]


@pytest.mark.parametrize("sharing", ["on", "off"])
def test_most_probable_tokens_are_those_of_full_forwards(llama: Family, offload: Path, sharing: str) -> None:
    """Of prompts that share prefixes and ask for different counts."""
    first, second = prompts((24, 18), seed=3)
    asked = [((*first, *second[:6]), 3, 2), ((*first, *second), 0, 4), (first, 2, 0), ((*first, 5), 1, 7)]
    requests = [
        Request(prompt, new, prompt_logprobs=True, top_logprobs=3, prompt_top_logprobs=count)
        for prompt, new, count in asked
    ]
    policy = f"device_batch=3,prefix_sharing={sharing}"
    for request, output in zip(requests, answers(llama.folder, policy, requests, offload), strict=True):
        ids = (*request.prompt, *output.tokens)
        with torch.inference_mode():
            table = llama.model(torch.tensor([ids])).logits[0].float().log_softmax(-1)
        assert output.prompt_logprobs is not None and len(output.top_logprobs) == len(output.tokens)
        wanted = request.prompt_top_logprobs
        assert len(output.prompt_top_logprobs) == (len(request.prompt) - 1 if wanted else 0)
        places = [
            *((i, found, wanted) for i, found in enumerate(output.prompt_top_logprobs)),
            *((i, found, 3) for i, found in enumerate(output.top_logprobs, start=len(request.prompt) - 1)),
        ]
        for place, found, count in places:
            assert found.logprobs == pytest.approx(table[place].topk(count).values.tolist(), abs=1e-4)
            assert [float(table[place, token]) for token in found.tokens] == pytest.approx(
                found.logprobs, abs=1e-4
            )
            own = table[place, ids[place + 1]]
            assert (
                int((table[place] > own + 1e-4).sum()) < found.rank <= int((table[place] >= own - 1e-4).sum())
            )
        assert output.shared_tokens == 0 or sharing == "on"
    assert sharing == "off" or output.shared_tokens > 20


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"rules": LogitRules(min_p=1.5)}, "min_p=1.5 must be in [0, 1]"),
        ({"rules": LogitRules(repetition_penalty=0)}, "repetition_penalty=0 must be above 0"),
        ({"rules": LogitRules(presence_penalty=math.nan)}, "presence_penalty=nan must be finite"),
        ({"rules": LogitRules(bias=((10**6, 1.0),))}, "bias of token id 1000000"),
        ({"rules": LogitRules(min_tokens=-1)}, "min_tokens=-1 must be at least 0"),
        ({"top_logprobs": -1}, "top_logprobs=-1 must be 0 to"),
        ({"prompt_top_logprobs": 10**6}, "the size of the vocabulary"),
        ({"temperature": math.inf}, "temperature=inf"),
        ({"top_p": 0.0}, "top_p=0.0 must be in (0, 1]"),
    ],
)
def test_what_is_out_of_range_is_refused(
    llama: Family, offload: Path, changes: dict[str, Any], reason: str
) -> None:
    with pytest.raises(RequestError) as caught:
        answers(llama.folder, "weights=device", [replace(Request((5, 6), 2), **changes)], offload)
    assert reason in str(caught.value)
