"""The engine at 4 bits computes what it says: with rounded weights, and over a past that is rounded."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from engine.engine import Engine
from engine.errors import CheckpointError, PolicyError
from engine.models.adapter import LayeredModel
from engine.models.attention import ATTENTION_NAME
from engine.spec.hardware import Tier
from engine.spec.policy import Policy
from engine.spec.request import Request
from tests.support.engine_compression import rounded, with_rounded_past
from tests.support.engine_models import NEW_TOKENS, Expected, Family, full_forwards, make_family, prompts
from tests.support.engine_runs import answers

WEIGHTS = ["device", "host", "disk", "0.3/0.3/0.4"]
GROUPS = {
    "llama": 64,
    "opt": 32,
    "gpt2": 64,
    "qwen3_moe": 16,
    "mixtral": 64,
    "gpt_oss": 64,
    "deepseek_v3": 32,
}


def compressed_reference(family: Family, offload: Path, group_size: int) -> list[Expected]:
    """`transformers` with the weights that 4 bits leave of those that the engine compresses."""
    model = copy.deepcopy(family.model)
    with Engine(family.folder, Policy(), offload_dir=offload, device="cpu") as engine:
        names = [tensor.name for tensor in engine.spec.tensors.values() if tensor.compressible]
    parameters = dict(model.named_parameters())
    layers = [name for name, value in parameters.items() if value.dim() > 1 and "embed" not in name]
    assert len(names) >= 0.6 * len(layers), "most matrices are compressed"
    with torch.no_grad():
        for name in names:
            matrix = parameters[name]
            matrix.copy_(rounded(matrix.reshape(-1, matrix.shape[-1]), group_size).view(matrix.shape))
    return [full_forwards(model, prompt, NEW_TOKENS) for prompt in prompts()]


@pytest.mark.parametrize("name", GROUPS)
def test_compressed_weights_answer_as_transformers_with_rounded_weights(
    name: str, family: Callable[[str], Family], offload: Path
) -> None:
    size = GROUPS[name]
    expected = compressed_reference(family(name), offload, size)
    requests = [Request(prompt, NEW_TOKENS, prompt_logprobs=True) for prompt in prompts()]
    for weights, device in (("device", "cpu"), ("0.3/0.3/0.4", "pretend")):
        policy = f"weights={weights},weight_bits=4,group_size={size},device_batch=3,num_device_batches=2"
        for output, wanted in zip(
            answers(family(name).folder, policy, requests, offload, device), expected, strict=True
        ):
            assert output.tokens == wanted.tokens
            assert output.logprobs == pytest.approx(wanted.logprobs, abs=1e-4)
            assert output.prompt_logprobs == pytest.approx(wanted.prompt_logprobs, abs=1e-4)
    assert any(a.logprobs != b.logprobs for a, b in zip(expected, family(name).expected, strict=True))


@pytest.mark.parametrize(
    "name", ["llama", "opt", "gemma2", "gpt_oss", "deepseek_v3", "gpt_bigcode", "mistral"]
)
def test_compressed_kv_cache_answers_as_a_rounded_past(
    name: str, family: Callable[[str], Family], offload: Path
) -> None:
    size = 32 if name == "opt" else 64
    model = copy.deepcopy(family(name).model)
    model.set_attn_implementation(ATTENTION_NAME)
    layered = LayeredModel(model)
    expected = [with_rounded_past(layered, prompt, NEW_TOKENS, size) for prompt in prompts()]
    requests = [Request(prompt, NEW_TOKENS) for prompt in prompts()]
    for kv, device, schedule in (("device", "cpu", "overlapped"), ("0.3/0.3/0.4", "pretend", "sequential")):
        policy = (
            f"kv={kv},kv_bits=4,group_size={size},schedule={schedule},device_batch=3,num_device_batches=2"
        )
        for output, wanted in zip(
            answers(family(name).folder, policy, requests, offload, device), expected, strict=True
        ):
            assert output.tokens == wanted.tokens
            assert output.logprobs == pytest.approx(wanted.logprobs, abs=1e-4)
    assert any(a.logprobs != b.logprobs for a, b in zip(expected, family(name).expected, strict=True))


def test_compressed_answers_do_not_depend_on_the_tier(llama: Family, offload: Path) -> None:
    requests = [Request(prompt, 4, prompt_logprobs=True) for prompt in prompts()]
    both = "weight_bits=4,kv_bits=4,device_batch=4,num_device_batches=2"
    base = answers(llama.folder, both, requests, offload)
    for tier in WEIGHTS:
        for schedule in ("sequential", "overlapped"):
            policy = f"{both},weights={tier},kv={tier},activations={tier},schedule={schedule}"
            for device in ("cpu", "pretend"):
                for one, other in zip(
                    base, answers(llama.folder, policy, requests, offload, device), strict=True
                ):
                    assert one.tokens == other.tokens
                    assert one.logprobs == pytest.approx(other.logprobs, abs=1e-5)
                    assert one.prompt_logprobs == pytest.approx(other.prompt_logprobs, abs=1e-5)


@pytest.mark.parametrize("group_size", [2, 4, 6, 12, 64])
def test_every_group_size_that_a_policy_accepts(group_size: int, llama: Family, offload: Path) -> None:
    """Where half a group is an odd number of bytes, the fp16 numbers behind the codes are not aligned."""
    try:
        Policy.parse(f"weight_bits=4,group_size={group_size}")
    except PolicyError as error:
        assert "group_size" in str(error)
        return
    requests = [Request(prompt, 3) for prompt in prompts((1, 2, 5))]
    for device in ("cpu", "pretend"):
        for shape in ("device_batch=1,num_device_batches=1", "device_batch=3"):
            policy = f"weight_bits=4,kv_bits=4,weights=disk,kv=disk,group_size={group_size},{shape}"
            assert all(
                len(output.tokens) == 3 for output in answers(llama.folder, policy, requests, offload, device)
            )


@pytest.mark.parametrize("tier", list(Tier))
def test_compressed_bytes_are_four_and_a_half_bits_per_value(
    tier: Tier, llama: Family, offload: Path
) -> None:
    """llama's rows are of 64 and 96 values: one group, and one and a half that take two."""
    policy = Policy.parse(
        f"weights={tier},kv={tier},weight_bits=4,kv_bits=4,device_batch=1,num_device_batches=1"
    )
    with Engine(llama.folder, policy, offload_dir=offload, device="pretend") as engine:
        (prompt,) = prompts((10,))
        plan = engine.check([Request(prompt, 4)])
        groups = sum(
            tensor.numel // tensor.shape[-1] * -(-tensor.shape[-1] // 64)
            for tensor in engine.spec.tensors.values()
            if tensor.compressible
        )
        whole = sum(tensor.nbytes for tensor in engine.spec.tensors.values() if not tensor.compressible)
        padding = plan.tiers[tier]["weights"] - (groups * 36 + whole)
        assert 0 <= padding <= (4095 * len(engine.spec.tensors) if tier is Tier.DISK else 0)
        # 13 tokens are kept (the last one is never fed), in 2 layers, keys and values of 64 each
        assert plan.tiers[tier]["KV cache"] == 13 * 2 * 2 * 64 * 4.5 / 8


def test_weights_that_cannot_be_compressed_are_named(tmp_path: Path, offload: Path) -> None:
    family = make_family("llama", tmp_path / "model")
    name = "model.layers.1.mlp.up_proj.weight"
    with torch.no_grad():
        dict(family.model.named_parameters())[name][3, 5] = float("inf")
    family.model.save_pretrained(family.folder)
    with (
        Engine(family.folder, Policy.parse("weight_bits=4"), offload_dir=offload, device="cpu") as engine,
        pytest.raises(CheckpointError) as caught,
    ):
        engine.answer([Request((5,), 1)])
    assert name in str(caught.value) and "\n" not in str(caught.value)
