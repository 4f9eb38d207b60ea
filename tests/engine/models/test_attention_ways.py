"""Families whose attention has no interface, attends in chunks, or has other widths in each layer."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import CONFIG_MAPPING

from engine.engine import Engine
from engine.errors import UnsupportedModelError, UsageError
from engine.models.decoder.ways import Way
from engine.models.twin import check_architecture
from engine.spec.policy import Policy
from engine.spec.request import Request
from tests.support.agreement import COMPARISON
from tests.support.engine_models import NEW_TOKENS, Family, prompts

REQUESTS = [Request(prompt, NEW_TOKENS, prompt_logprobs=True) for prompt in prompts()]
OFFLOADED = "weights=0/0.3/0.7,kv=0.3/0.3/0.4,device_batch=3,num_device_batches=2"
OWN = ("falcon", "bloom", "mpt", "gptj")
"""Families whose attention is transformers' own code."""


@pytest.mark.parametrize("policy", ["", OFFLOADED, f"{OFFLOADED},schedule=sequential,padding=8"])
@pytest.mark.parametrize("device", ["cpu", "pretend"])
@pytest.mark.parametrize("name", [*OWN, "llama4_text", "gemma4_text"])
def test_answers_are_those_of_transformers(
    name: str, device: str, policy: str, family: Callable[[str], Family], offload: Path
) -> None:
    made = family(name)
    with Engine(
        made.folder, Policy.parse(policy) if policy else None, device=device, offload_dir=offload
    ) as engine:
        assert engine.spec.own_attention is (name in OWN)
        outputs = engine.answer(REQUESTS)
        peaks = engine.record().memory
    for request, output, expected in zip(REQUESTS, outputs, made.expected, strict=True):
        COMPARISON.check(name, request, output, expected)
    watched = ("device", "disk") if device == "cpu" else ("device", "host", "disk")
    assert all(peaks[tier].peak <= peaks[tier].planned for tier in watched)


@pytest.mark.parametrize("policy", ["prefix_sharing=on", "prefix_sharing=on,weights=0/0.5/0.5,kv=0/0.5/0.5"])
def test_chunks_go_on_behind_a_shared_prefix(
    policy: str, family: Callable[[str], Family], offload: Path
) -> None:
    """The prefix ends in the middle of a chunk, whose other tokens are the requests' own."""
    made = family("llama4_text")
    common = prompts((21,), seed=5)[0]
    requests = [Request((*common, *tail), NEW_TOKENS, prompt_logprobs=True) for tail in prompts((1, 4, 13))]
    with Engine(made.folder, Policy.parse(policy), device="cpu", offload_dir=offload) as engine:
        shared = engine.answer(requests)
    with Engine(made.folder, Policy.parse("prefix_sharing=off"), device="cpu", offload_dir=offload) as engine:
        alone = engine.answer(requests)
    for one, two in zip(shared, alone, strict=True):
        assert one.tokens == two.tokens
        assert one.logprobs == pytest.approx(two.logprobs, abs=1e-4)
        assert one.prompt_logprobs == pytest.approx(two.prompt_logprobs, abs=1e-4)


def test_a_packed_cache_is_unpacked_for_own_attention(family: Callable[[str], Family], offload: Path) -> None:
    made = family("bloom")
    policy = Policy.parse(f"{OFFLOADED},kv_quant=8,weight_quant=8")
    with Engine(made.folder, policy, device="cpu", offload_dir=offload) as engine:
        outputs = engine.answer(REQUESTS)
    for output, expected in zip(outputs, made.expected, strict=True):
        assert output.logprobs[0] == pytest.approx(expected.logprobs[0], abs=0.2)
        assert len(output.tokens) == NEW_TOKENS


@pytest.mark.parametrize("setting", ["prefix_sharing=on", "attention_fraction=0.5"])
def test_what_own_attention_cannot_do_is_refused(
    setting: str, family: Callable[[str], Family], offload: Path
) -> None:
    with pytest.raises(UsageError, match=setting.split("=")[0]):
        Engine(family("bloom").folder, Policy.parse(setting), device="cpu", offload_dir=offload)


FULL_SIZE: dict[str, dict[str, Any]] = {
    "granitemoehybrid": {
        "hidden_size": 2048, "num_hidden_layers": 40, "num_attention_heads": 16, "num_key_value_heads": 4,
        "layer_types": ["attention"] * 40, "num_local_experts": 0, "num_experts_per_tok": 0,
        "intermediate_size": 4096,
        "shared_intermediate_size": 4096, "position_embedding_type": "rope",
    },
    "gemma4_text": {},
    "laguna": {},
    "mimo_v2_flash": {},
    "jetmoe": {},
    "phimoe": {"sliding_window": 131072, "max_position_embeddings": 131072},
    "llama4_text": {},
    "falcon": {},
    "deepseek_v3": {},
    "gemma3": {},
}  # fmt: skip
"""Full-size configs that a check must neither refuse nor take long for."""


@pytest.mark.parametrize("model_type", FULL_SIZE)
def test_full_size_configs_pass_the_check(model_type: str) -> None:
    config = CONFIG_MAPPING[model_type](**FULL_SIZE[model_type])
    begin = time.perf_counter()
    assert isinstance(check_architecture(config), Way)
    assert time.perf_counter() - begin < 20  # three seconds on an idle machine


def test_families_whose_cache_changes_their_answers_are_refused() -> None:
    """RoBERTa's positions begin elsewhere when transformers generates than in a forward of the whole text."""
    with pytest.raises(UnsupportedModelError, match="with its cache than without"):
        check_architecture(CONFIG_MAPPING["roberta"](is_decoder=True))
