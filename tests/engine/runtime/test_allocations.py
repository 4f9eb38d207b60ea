"""Live tensor memory never exceeds the ledger's books, while loading and while running."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PretrainedConfig

from engine.engine import Engine
from engine.spec.hardware import Tier
from engine.spec.policy import Policy
from engine.spec.request import Request
from tests.support.engine_allocations import LiveBytes
from tests.support.engine_models import Family, prompts

POLICIES = {
    "resident": "weights=device",
    "on disk": "weights=disk,kv=disk,activations=disk",
    "every tier": "weights=0.3/0.3/0.4,kv=0.3/0.3/0.4,activations=0.4/0.3/0.3",
    "4 bits": "weights=host,kv=0.5/0.5/0,weight_quant=4,kv_quant=4",
}

SMALL_VOCABULARY = {
    "vocab_size": 128,
    "bos_token_id": 1,
    "eos_token_id": 1,
    "pad_token_id": 0,
    "dtype": "float32",
}
SHAPES: dict[str, tuple[str, dict[str, object]]] = {
    "wide queries": ("llama", {
        "hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 16, "num_key_value_heads": 1,
        "head_dim": 64, "num_hidden_layers": 1}),
    "many experts": ("qwen3_moe", {
        "hidden_size": 128, "intermediate_size": 256, "moe_intermediate_size": 48, "num_experts": 16,
        "num_experts_per_tok": 8, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32,
        "num_hidden_layers": 1}),
    "clamped experts": ("gpt_oss", {
        "hidden_size": 144, "intermediate_size": 144, "num_local_experts": 8, "num_experts_per_tok": 4,
        "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 32, "num_hidden_layers": 2}),
    "wide experts": ("gpt_oss", {
        "hidden_size": 48, "intermediate_size": 192, "num_local_experts": 6, "num_experts_per_tok": 6,
        "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 16, "num_hidden_layers": 2}),
    "wide inner": ("opt", {
        "hidden_size": 128, "word_embed_proj_dim": 128, "ffn_dim": 1024, "num_attention_heads": 4,
        "num_hidden_layers": 1}),
    "capped scores": ("gemma2", {
        "hidden_size": 72, "intermediate_size": 288, "num_attention_heads": 8, "num_key_value_heads": 4,
        "head_dim": 16, "num_hidden_layers": 2, "sliding_window": 64}),
    "narrow values": ("deepseek_v3", {
        "hidden_size": 64, "intermediate_size": 128, "moe_intermediate_size": 32, "n_routed_experts": 4,
        "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2, "num_attention_heads": 8,
        "num_key_value_heads": 8, "q_lora_rank": 32, "kv_lora_rank": 32, "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 8, "v_head_dim": 8, "num_hidden_layers": 2, "first_k_dense_replace": 1}),
    "large vocabulary": ("opt", {
        "hidden_size": 16, "word_embed_proj_dim": 16, "ffn_dim": 32, "num_attention_heads": 2,
        "num_hidden_layers": 1, "vocab_size": 30_000}),
}  # fmt: skip
"""Random models in which one part of the workspace is much the largest."""

LOADS = {
    "one long prompt": ((1400,), 2, "device_batch=1,num_device_batches=1"),
    "many short prompts": ((8,) * 24, 2, "device_batch=12,num_device_batches=2"),
    "scoring": ((90, 300, 1), 0, "device_batch=3,num_device_batches=1"),
}


@dataclass
class Measured:
    """Live bytes minus charged bytes at the tightest moments (negative if some were left), peak and plan."""

    while_loading: int
    while_running: int
    peak: int
    planned: int


def measure(
    model: Path, policy: str, requests: list[Request], offload: Path, device: str,
    weights: Literal["trained", "random"] = "trained",
) -> Measured:  # fmt: skip
    """Measure a sequential run, in which this thread makes all tensors."""
    chosen = Policy.parse(f"{policy},schedule=sequential")
    with Engine(model, chosen, offload_dir=offload, device=device, weights=weights) as engine:
        ledger = engine._tiers.ledger
        watch = LiveBytes(allowed=lambda: ledger.held[Tier.DEVICE] + ledger.held[Tier.HOST])
        first = Request(requests[0].prompt[:1], 1)
        with watch:
            engine.answer([first])
            assert watch.tightest is not None
            loading, peak = watch.tightest.excess, watch.peak
            watch.begin()
            engine.answer(requests)
            assert watch.tightest is not None
            running, peak = watch.tightest.excess, max(peak, watch.peak)
        plans = [engine.check([first]), engine.check(requests)]
    return Measured(
        loading, running, peak, max(plan.total(Tier.DEVICE) + plan.total(Tier.HOST) for plan in plans)
    )


def check(measured: Measured) -> None:
    assert measured.while_loading <= 0
    assert measured.while_running <= 0
    assert measured.peak <= measured.planned


@pytest.mark.parametrize(
    "name", ["opt", "gpt2", "gemma2", "phi3", "mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3"]
)
def test_families_stay_within_their_plan(name: str, family: Callable[[str], Family], offload: Path) -> None:
    """With real checkpoints, so that tensors that loading makes from several files are measured, too."""
    requests = [Request(prompt, 2, prompt_logprobs=True) for prompt in prompts((60, 3, 1, 25))]
    for policy, device in (("resident", "cpu"), ("every tier", "pretend")):
        shaped = f"{POLICIES[policy]},device_batch=2,num_device_batches=2"
        check(measure(family(name).folder, shaped, requests, offload, device))


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("device", ["cpu", "pretend"])
def test_policies_stay_within_their_plan(policy: str, device: str, llama: Family, offload: Path) -> None:
    for lengths, shape in (
        ((120, 1, 30), "device_batch=3,num_device_batches=1"),
        ((3,) * 6, "device_batch=2,num_device_batches=3"),
    ):
        requests = [Request(prompt, 3, prompt_logprobs=True) for prompt in prompts(lengths)]
        check(measure(llama.folder, f"{POLICIES[policy]},{shape}", requests, offload, device))


def config_of(name: str) -> PretrainedConfig:
    model_type, sizes = SHAPES[name]
    return CONFIG_MAPPING[model_type](**{**SMALL_VOCABULARY, **sizes})


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("load", LOADS)
def test_lopsided_models_stay_within_their_plan(name: str, load: str, tmp_path: Path, offload: Path) -> None:
    lengths, new_tokens, shape = LOADS[load]
    config_of(name).save_pretrained(tmp_path / "model")
    requests = [Request(prompt, new_tokens, prompt_logprobs=True) for prompt in prompts(lengths)]
    for policy in ("resident", "on disk") if load == "scoring" else ("resident",):
        check(measure(tmp_path / "model", f"{POLICIES[policy]},{shape}", requests, offload, "cpu", "random"))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("policy", ["resident", "on disk", "4 bits"])
def test_loading_stays_within_its_plan(dtype: str, policy: str, tmp_path: Path, offload: Path) -> None:
    """Matrices are large enough to be packed in chunks, and loading takes more memory than running."""
    config = CONFIG_MAPPING["opt"](
        vocab_size=600, hidden_size=512, word_embed_proj_dim=512, ffn_dim=4096, num_attention_heads=8,
        num_hidden_layers=1, max_position_embeddings=64, dtype=dtype,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    model.save_pretrained(tmp_path / "model")
    for weights in ("trained", "random"):
        check(measure(tmp_path / "model", POLICIES[policy], [Request((5, 6), 1)], offload, "cpu", weights))  # type: ignore[arg-type]


def test_the_watch_sees_what_is_kept_and_what_is_dropped() -> None:
    watch = LiveBytes(allowed=lambda: 1000)
    with torch.inference_mode(), watch:
        kept = torch.zeros(100)
        assert watch.live == 400
        view = kept.view(10, 10)[2:]
        assert watch.live == 400, "a view is no new memory"
        dropped = kept + 1
        assert watch.live == watch.peak == 800
        del dropped
        assert watch.live == 400
        del kept
        assert watch.live == 400, "the view still holds it"
        del view
        assert (watch.live, watch.peak) == (0, 800)
    assert watch.tightest is not None and watch.tightest.excess == -200
