"""In every format the engine computes what the format defines: with rounded weights and KV cache."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

from engine.engine import Engine
from engine.errors import CheckpointError
from engine.models.adapter import LayeredModel
from engine.models.attention import ATTENTION_NAME
from engine.spec.hardware import Tier
from engine.spec.kv_format import KVFormat
from engine.spec.policy import Policy
from engine.spec.request import Output, Request
from engine.spec.weight_formats import WeightFormats
from tests.support.agreement import Expected
from tests.support.engine_compression import rounded, with_rounded_past
from tests.support.engine_models import NEW_TOKENS, Family, full_forwards, make_family, prompts
from tests.support.engine_runs import answers

WEIGHTS = ["device", "host", "disk", "0.3/0.3/0.4"]
FAMILY_FORMATS = {
    "llama": "4",
    "opt": "flexgen",
    "gpt2": "3-g32-mse",
    "qwen3_moe": "4-g32-symmetric-mse",
    "mixtral": "8-row-symmetric",
    "gpt_oss": "4-column-zero",
    "deepseek_v3": "2-g32-mse",
}
"""A format for every family; llama is run in all formats besides."""

FORMATS = ["2", "3", "8", "4-g32", "4-g128", "4-row", "3-column", "2-symmetric", "4-zero", "flexgen", "best4"]
KV_FORMATS = {
    "llama": [
        "2",
        "3",
        "4",
        "8",
        "4-channel-g8/4+4",
        "kivi2",
        "2-channel-g8/3-channel-g8+5",
        "4-g8-mse+3",
        "float16",
        "bfloat16/3+2",
    ],
    "opt": ["4-g32", "4-channel-g8/4", "float16"],
    "gemma2": ["4", "bfloat16", "4-channel-g8/4-symmetric+6"],
    "gpt_oss": ["4", "3-channel-g16/4"],
    "deepseek_v3": ["4-g32", "4-channel-g8/2-g16+2"],
    "gpt_bigcode": ["4", "4-channel-g8/4"],
    "mistral": ["8", "2-channel-g8/2-g8-zero+1"],
}


def compressed_reference(family: Family, offload: Path, form: str) -> list[Expected]:
    """`transformers` with rounded values for the weights that the engine compresses."""
    model = copy.deepcopy(family.model)
    formats = WeightFormats.parse(form)
    with Engine(family.folder, Policy(), offload_dir=offload, device="cpu") as engine:
        chosen = {name: formats.of(tensor) for name, tensor in engine.spec.tensors.items()}
        specs = engine.spec.tensors
    parameters = dict(model.named_parameters())
    if formats.default is not None:
        layers = [name for name, value in parameters.items() if value.dim() > 1 and "embed" not in name]
        assert sum(map(bool, chosen.values())) >= 0.6 * len(layers), "most matrices are compressed"
    with torch.no_grad():
        for name, spec in chosen.items():
            if spec is None:
                continue
            weight = parameters[name]
            matrix = weight.t() if specs[name].transposed else weight.reshape(specs[name].matrix)
            kept = rounded(matrix, spec)
            weight.copy_(kept.t() if specs[name].transposed else kept.view(weight.shape))
    return [full_forwards(model, prompt, NEW_TOKENS) for prompt in prompts()]


def check_weights(family: Family, offload: Path, form: str) -> None:
    """Assert that the engine over packed weights answers as `transformers` over the rounded weights."""
    expected = compressed_reference(family, offload, form)
    requests = [Request(prompt, NEW_TOKENS, prompt_logprobs=True) for prompt in prompts()]
    for weights, device in (("device", "cpu"), ("0.3/0.3/0.4", "cpu"), ("0.3/0.3/0.4", "pretend")):
        policy = f"weights={weights},weight_quant={form},device_batch=3,num_device_batches=2"
        for output, wanted in zip(
            answers(family.folder, policy, requests, offload, device), expected, strict=True
        ):
            assert output.tokens == wanted.tokens
            assert output.logprobs == pytest.approx(wanted.logprobs, abs=1e-4)
            assert output.prompt_logprobs == pytest.approx(wanted.prompt_logprobs, abs=1e-4)
    assert any(a.logprobs != b.logprobs for a, b in zip(expected, family.expected, strict=True))


@pytest.mark.parametrize("name", FAMILY_FORMATS)
def test_compressed_weights_answer_as_transformers_with_rounded_weights(
    name: str, family: Callable[[str], Family], offload: Path
) -> None:
    check_weights(family(name), offload, FAMILY_FORMATS[name])


@pytest.mark.parametrize("form", FORMATS)
def test_every_format_of_weights(form: str, llama: Family, offload: Path) -> None:
    check_weights(llama, offload, form)


@pytest.mark.parametrize(
    ("name", "form"),
    [
        ("llama", "mlp=3;self_attn.v=16;default=4-g32"),
        ("llama", "embed_tokens|lm_head=8;default=16"),
        ("gpt2", "wte=4;mlp=2-g32;default=4"),
        ("opt", "embed_tokens=4-column;embed_positions=8;default=4"),
    ],
)
def test_formats_by_name_reach_embeddings_and_head(
    name: str, form: str, family: Callable[[str], Family], offload: Path
) -> None:
    check_weights(family(name), offload, form)


def assert_same(outputs: Sequence[Output], expected: Sequence[Expected]) -> None:
    """Assert that all answers agree, except for one, in which a code may differ by one.

    A value half-way between two codes is rounded by the last bit of a float32 sum, which depends on
    the number of rows that are computed together.
    """
    near = [
        output.tokens == wanted.tokens and output.logprobs == pytest.approx(wanted.logprobs, abs=1e-4)
        for output, wanted in zip(outputs, expected, strict=True)
    ]
    assert sum(near) >= len(near) - 1
    for output, wanted in zip(outputs, expected, strict=True):
        assert output.logprobs[0] == pytest.approx(wanted.logprobs[0], abs=1e-4)
        if output.tokens == wanted.tokens:
            assert output.logprobs == pytest.approx(wanted.logprobs, abs=0.1)


@pytest.mark.parametrize(("name", "form"), [(name, form) for name in KV_FORMATS for form in KV_FORMATS[name]])
def test_compressed_kv_cache_answers_as_a_rounded_past(
    name: str, form: str, family: Callable[[str], Family], offload: Path
) -> None:
    model = copy.deepcopy(family(name).model)
    model.set_attn_implementation(ATTENTION_NAME)
    layered = LayeredModel(model)
    expected = [with_rounded_past(layered, prompt, NEW_TOKENS, KVFormat.parse(form)) for prompt in prompts()]
    requests = [Request(prompt, NEW_TOKENS) for prompt in prompts()]
    for kv, device, schedule in (
        ("device", "cpu", "overlapped"),
        ("0.3/0.3/0.4", "pretend", "sequential"),
        ("disk", "cpu", "overlapped"),
    ):
        policy = f"kv={kv},kv_quant={form},schedule={schedule},device_batch=3,num_device_batches=2"
        assert_same(answers(family(name).folder, policy, requests, offload, device), expected)
    if "+" not in form:
        assert any(a.logprobs != b.logprobs for a, b in zip(expected, family(name).expected, strict=True))


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_oss"])
@pytest.mark.parametrize("form", ["16", "4", "4-channel-g8/4+4", "float16"])
def test_sparse_attention_keeps_the_best_scores(
    name: str, form: str, family: Callable[[str], Family], offload: Path
) -> None:
    model = copy.deepcopy(family(name).model)
    model.set_attn_implementation(ATTENTION_NAME)
    layered = LayeredModel(model)
    kept = None if form == "16" else KVFormat.parse(form)
    requests = [Request(prompt, NEW_TOKENS) for prompt in prompts()]
    for fraction in (0.3, 1.0):
        expected = [with_rounded_past(layered, prompt, NEW_TOKENS, kept, fraction) for prompt in prompts()]
        for kv, device in (("device", "cpu"), ("0.3/0.3/0.4", "pretend")):
            policy = f"kv={kv},kv_quant={form},attention_fraction={fraction},device_batch=3"
            assert_same(answers(family(name).folder, policy, requests, offload, device), expected)
        if fraction < 1:
            dense = [with_rounded_past(layered, prompt, NEW_TOKENS, kept) for prompt in prompts()]
            assert any(one.logprobs != two.logprobs for one, two in zip(expected, dense, strict=True))


def test_compressed_answers_do_not_depend_on_the_tier(llama: Family, offload: Path) -> None:
    requests = [Request(prompt, 4, prompt_logprobs=True) for prompt in prompts()]
    both = "weight_quant=4,kv_quant=4,device_batch=4,num_device_batches=2"
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


@pytest.mark.parametrize("group", ["g8", "g24", "row"])
def test_groups_whose_numbers_are_not_aligned(group: str, llama: Family, offload: Path) -> None:
    """If the codes of a row take an odd number of bytes, the fp16 numbers after them are not aligned."""
    requests = [Request(prompt, 3) for prompt in prompts((1, 2, 5))]
    for device in ("cpu", "pretend"):
        for shape in ("device_batch=1,num_device_batches=1", "device_batch=3"):
            policy = f"weight_quant=3-{group},kv_quant=3-{group},weights=disk,kv=disk,{shape}"
            assert all(
                len(output.tokens) == 3 for output in answers(llama.folder, policy, requests, offload, device)
            )


@pytest.mark.parametrize("tier", list(Tier))
def test_compressed_bytes_are_four_and_a_half_bits_per_value(
    tier: Tier, llama: Family, offload: Path
) -> None:
    """llama's rows have 64 values (one group) and 96 (one and a half, which take two)."""
    policy = Policy.parse(
        f"weights={tier},kv={tier},weight_quant=4,kv_quant=4,device_batch=1,num_device_batches=1"
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
        # 13 tokens are kept (the last one is never computed), in 2 layers, keys and values of 64 each
        packed = 13 * 2 * 2 * 64 * 4.5 / 8
        if tier is Tier.DISK:  # layers begin at pages; rows that do not fill a unit stay in memory
            assert plan.tiers[tier]["KV cache"] == 2 * 4096
            assert packed <= plan.tiers[Tier.HOST]["KV tails"] < packed + 2 * 64
        else:
            assert packed <= plan.tiers[tier]["KV cache"] < packed + 2 * 64, "layers begin at cache lines"


def test_weights_that_cannot_be_compressed_are_named(tmp_path: Path, offload: Path) -> None:
    family = make_family("llama", tmp_path / "model")
    name = "model.layers.1.mlp.up_proj.weight"
    with torch.no_grad():
        dict(family.model.named_parameters())[name][3, 5] = float("inf")
    family.model.save_pretrained(family.folder)
    with (
        Engine(family.folder, Policy.parse("weight_quant=4"), offload_dir=offload, device="cpu") as engine,
        pytest.raises(CheckpointError) as caught,
    ):
        engine.answer([Request((5,), 1)])
    assert name in str(caught.value) and "\n" not in str(caught.value)
