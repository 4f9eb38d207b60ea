"""Every family under every placement answers as plain `transformers` does."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import pytest

from engine.spec.request import Request
from tests.support.agreement import COMPARISON
from tests.support.engine_models import FAMILIES, NEW_TOKENS, Family, prompts
from tests.support.engine_runs import answers

MIXED = "0.3/0.3/0.4"
RUNS = {
    "resident": ("device_batch=16,num_device_batches=1", "cpu"),
    "everything on disk": (
        "weights=disk,kv=disk,activations=disk,device_batch=3,num_device_batches=2",
        "pretend",
    ),
    "every tier, in order": (
        f"weights={MIXED},kv={MIXED},activations={MIXED},device_batch=2,num_device_batches=3,schedule=sequential",
        "cpu",
    ),
}


def all_kinds() -> list[Request]:
    """Requests for each prompt: completion with scoring, scoring only, and a single token."""
    return (
        [Request(prompt, NEW_TOKENS, prompt_logprobs=True) for prompt in prompts()]
        + [Request(prompt, 0, prompt_logprobs=True) for prompt in prompts()]
        + [Request(prompt, 1) for prompt in prompts()[:3]]
    )


def check(family: Family, requests: list[Request], policy: str, device: str, offload: Path) -> None:
    known = dict(zip(prompts(), family.expected, strict=True))
    for request, output in zip(
        requests, answers(family.folder, policy, requests, offload, device), strict=True
    ):
        COMPARISON.check(family.name, request, output, known[request.prompt])


@pytest.mark.parametrize("name", FAMILIES)
def test_family_answers_as_transformers(name: str, family: Callable[[str], Family], offload: Path) -> None:
    for policy, device in RUNS.values():
        check(family(name), all_kinds(), policy, device, offload)


@pytest.mark.parametrize("weights", ["device", "host", "disk", MIXED])
@pytest.mark.parametrize("kv", ["device", "host", "disk", MIXED])
def test_every_placement(weights: str, kv: str, llama: Family, offload: Path) -> None:
    requests = [Request(prompt, 2, prompt_logprobs=True) for prompt in prompts()[:3]]
    for activations, schedule, device in itertools.product(
        ["device", "host", "disk", MIXED], ["sequential", "overlapped"], ["cpu", "pretend"]
    ):
        policy = (
            f"weights={weights},kv={kv},activations={activations},schedule={schedule},"
            "device_batch=2,num_device_batches=2"
        )
        check(llama, requests, policy, device, offload)


@pytest.mark.parametrize("shape", [(1, 1), (1, 4), (2, 1), (3, 2), (5, 3), (16, 1)])
@pytest.mark.parametrize("tokens", [1, 20, 2048])
def test_every_block_shape(shape: tuple[int, int], tokens: int, llama: Family, offload: Path) -> None:
    policy = (
        f"weights=0/0.5/0.5,kv={MIXED},activations=0.5/0.5/0,device_batch={shape[0]},"
        f"num_device_batches={shape[1]},max_batch_tokens={tokens}"
    )
    check(llama, all_kinds(), policy, "pretend", offload)
