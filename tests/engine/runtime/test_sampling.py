"""Sampling depends on the request's seed and not on its batch, and the distribution is right."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from engine.kernels.backend import kernels_for
from engine.runtime.sampling import Sampler, finish_reason, log_probabilities
from engine.spec.request import LogitRules, Request
from tests.support.engine_models import Family, full_forwards, prompts
from tests.support.engine_runs import answers

LOGITS = torch.tensor([2.0, -1.0, 0.5, 3.0, 0.5, -4.0, 1.0])
DRAWS = 1500


def allowed_distribution(temperature: float, top_k: int, top_p: float) -> list[float]:
    """The distribution that the draws must follow, in plain Python."""
    weights = [math.exp(float(logit) / temperature) for logit in LOGITS]
    ranked = sorted(range(len(weights)), key=lambda token: (-weights[token], token))
    ranked = ranked[: top_k or None]
    total, kept, reached = sum(weights[token] for token in ranked), [], 0.0
    for token in ranked:
        if top_p < 1 and reached >= top_p:
            break
        kept.append(token)
        reached += weights[token] / total
    share = sum(weights[token] for token in kept)
    return [weights[token] / share if token in kept else 0.0 for token in range(len(weights))]


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [
        (1.0, 0, 1.0),
        (0.5, 0, 1.0),
        (2.0, 0, 1.0),
        (1.0, 1, 1.0),
        (1.0, 3, 1.0),
        (1.0, 4, 1.0),
        (1.0, 0, 0.6),
        (1.0, 0, 0.9),
        (1.0, 0, 1e-9),
        (1.5, 4, 0.8),
        (1.0, 100, 1.0),
    ],
)
def test_draws_follow_the_allowed_distribution(temperature: float, top_k: int, top_p: float) -> None:
    sampler = Sampler(Request((1,), 1, temperature=temperature, top_k=top_k, top_p=top_p, seed=3))
    counts = torch.zeros(len(LOGITS))
    for _ in range(DRAWS):
        counts[sampler.choose(LOGITS, [], 3)] += 1
    for share, expected in zip(
        (counts / DRAWS).tolist(), allowed_distribution(temperature, top_k, top_p), strict=True
    ):
        if expected == 0:
            assert share == 0, "a token that top_k or top_p rules out was drawn"
        assert abs(share - expected) < 5 * math.sqrt(expected * (1 - expected) / DRAWS) + 1e-9


def test_greedy_takes_the_most_probable() -> None:
    assert Sampler(Request((1,), 1)).choose(LOGITS, [], 3) == 3


def test_stream_is_decided_by_the_seed() -> None:
    def stream(seed: int) -> list[int]:
        sampler = Sampler(Request((1,), 1, temperature=1.0, seed=seed))
        return [sampler.choose(LOGITS, [], 3) for _ in range(30)]

    assert stream(7) == stream(7)
    assert stream(7) != stream(8)
    assert stream(-1) == stream(-1), "any whole number is a seed"
    assert stream(1 << 70) == stream(1 << 70)


def test_log_probabilities_are_those_of_the_whole_distribution() -> None:
    logits = torch.randn(4, 50, generator=torch.Generator().manual_seed(0)) * 30
    targets = torch.tensor([0, 49, 7, 7])
    expected = torch.log_softmax(logits.double(), -1)[torch.arange(4), targets]
    found = log_probabilities(logits, targets, kernels_for(logits.device).summarise(logits)[1])
    assert torch.allclose(found.double(), expected, atol=1e-5)


def test_finish_reasons() -> None:
    request = Request((1,), 3, stop_token_ids=frozenset({9}), stop=lambda tokens: tokens[-1] == 5)
    assert finish_reason(request, [1, 2]) is None
    assert finish_reason(request, [1, 9]) == "eos"
    assert finish_reason(request, [5]) == "stop"
    assert finish_reason(request, [1, 2, 3]) == "length"
    assert finish_reason(Request((1,)), []) == "length"
    late = replace(request, max_new_tokens=9, rules=LogitRules(min_tokens=2))
    assert finish_reason(late, [1, 5]) is None and finish_reason(late, [1, 5, 5]) == "stop"


def test_samples_do_not_depend_on_the_batch(llama: Family, offload: Path) -> None:
    requests = [
        Request(prompt, 6, temperature=1.0, top_k=20, top_p=0.95, seed=seed)
        for prompt in prompts((4, 11))
        for seed in range(4)
    ]
    alone = [answers(llama.folder, "weights=device", [request], offload)[0].tokens for request in requests]
    for policy in (
        "device_batch=3,num_device_batches=1",
        "kv=disk,weights=disk,device_batch=2,num_device_batches=4",
    ):
        together = answers(llama.folder, policy, requests, offload, "pretend")
        assert [output.tokens for output in together] == alone
    assert len(set(alone)) == len(alone), "seeds differ, so the samples do"


def test_logprobs_of_samples_are_unscaled(llama: Family, offload: Path) -> None:
    (prompt,) = prompts((6,))
    (output,) = answers(
        llama.folder, "weights=device", [Request(prompt, 4, temperature=0.3, top_k=5, seed=1)], offload
    )
    scores = full_forwards(llama.model, prompt + output.tokens, 1).prompt_logprobs[len(prompt) - 1 :]
    assert output.logprobs == pytest.approx(scores, abs=1e-4)
