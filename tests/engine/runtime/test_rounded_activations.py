"""Weights of 8 or 4 bits and activations of 8 answer as `transformers` with rounded products; smoothing."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from engine.engine import Engine
from engine.errors import PolicyError
from engine.kernels import reference_attention
from engine.kernels.backend import kernels_for
from engine.kernels.calls import PackedMatrix
from engine.kernels.reference import pack, unpack
from engine.memory.weights.smoothing import read_statistics
from engine.spec.policy import Policy
from engine.spec.quant import QuantSpec
from engine.spec.request import Request
from tests.support.engine_models import NEW_TOKENS, Family, full_forwards, make_family, prompts
from tests.support.engine_runs import answers

W8A8, W4A8 = QuantSpec.parse("w8a8"), QuantSpec.parse("w4a8")


def rounded_product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x [M, K] times weight [N, K], both rounded to 8 bits, in exact integers of numpy."""
    values, matrix = x.double().numpy(), weight.double().numpy()
    steps = (np.abs(values.astype(np.float32)).max(1, keepdims=True) / np.float32(127)).astype(np.float32)
    inputs = np.rint(values.astype(np.float32) / np.where(steps > 0, steps, 1)).astype(np.int64)
    farthest = np.take_along_axis(matrix, np.abs(matrix).argmax(1)[:, None], 1)
    scales = (farthest / -128).astype(np.float16).astype(np.float64)
    codes = np.clip(np.rint(matrix / np.where(scales != 0, scales, 1)), -128, 127).astype(np.int64)
    product = torch.from_numpy((inputs @ codes.T) * steps.astype(np.float64) * scales.T).float()
    return product if bias is None else product + bias


def grouped_product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The same with weights of 4 bits and both operands rounded per group of 32, in float64."""
    rows, width = weight.shape
    data = pack(weight, W4A8, torch.empty(rows, W4A8.block_bytes(width), dtype=torch.uint8))
    kept = unpack(data, W4A8, torch.empty(rows, width)).double()
    groups = [rounded(part) for part in x.float().split(W4A8.group_size, dim=1)]
    product = (torch.cat(groups, dim=1) @ kept.T).float()
    return product if bias is None else product + bias


def rounded(values: Tensor) -> Tensor:
    """Each row as 8-bit integers times a step, float64."""
    steps = values.abs().amax(1, keepdim=True) / 127
    return torch.round(values / torch.where(steps > 0, steps, 1.0)).double() * steps.double()


PRODUCTS = {"w8a8": rounded_product, "w4a8": grouped_product}


def rounded_forward(name: str, weight: Tensor, bias: Tensor | None) -> Callable[[Tensor], Tensor]:
    """A linear layer's arithmetic with both operands rounded."""

    def forward(x: Tensor) -> Tensor:
        flat = PRODUCTS[name](x.detach().reshape(-1, x.shape[-1]), weight, bias)
        return flat.detach().view(*x.shape[:-1], -1)

    return forward


def packed(weight: Tensor, scale: Tensor | None = None) -> PackedMatrix:
    rows, width = weight.shape
    data = torch.empty(rows, W8A8.block_bytes(width), dtype=torch.uint8)
    return PackedMatrix(pack(weight, W8A8, data), W8A8, rows, width, scale)


@pytest.mark.parametrize("chosen", [True, False])
@pytest.mark.parametrize("shape", [(1, 8, 3), (5, 100, 33), (40, 256, 64)])
def test_products_are_those_of_integers(chosen: bool, shape: tuple[int, int, int]) -> None:
    kernels = kernels_for(torch.device("cpu")) if chosen else reference_attention
    count, width, rows = shape
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(count, width, generator=generator), torch.randn(rows, width, generator=generator)
    x[0] = 0
    bias = torch.randn(rows, generator=generator)
    got = kernels.matmul(x, packed(weight), bias)
    assert torch.allclose(got, rounded_product(x, weight, bias), rtol=1e-5, atol=1e-5)
    scale = torch.rand(width, generator=generator) + 0.5
    got = kernels.matmul(x * scale, packed(weight, scale), bias)
    assert torch.allclose(got, rounded_product(x, weight, bias), rtol=1e-3, atol=0.3)


@pytest.mark.parametrize("form", PRODUCTS)
@pytest.mark.parametrize("name", ["llama", "opt", "gpt2"])
def test_answers_as_transformers_with_rounded_products(
    name: str, form: str, family: Callable[[str], Family], offload: Path
) -> None:
    model = copy.deepcopy(family(name).model)
    head = model.get_output_embeddings()
    for module in model.modules():
        if type(module) in (nn.Linear, Conv1D) and module is not head:
            weight = module.weight if isinstance(module, nn.Linear) else module.weight.T

            module.forward = rounded_forward(form, weight.detach(), module.bias)
    expected = [full_forwards(model, prompt, NEW_TOKENS) for prompt in prompts()]
    requests = [Request(prompt, NEW_TOKENS, prompt_logprobs=True) for prompt in prompts()]
    for weights, device in (("device", "cpu"), ("0.3/0.3/0.4", "pretend")):
        policy = f"weights={weights},weight_quant={form},device_batch=3,num_device_batches=2"
        outputs = answers(family(name).folder, policy, requests, offload, device)
        worst = [
            max(abs(a - b) for a, b in zip(output.logprobs, wanted.logprobs, strict=True))
            for output, wanted in zip(outputs, expected, strict=True)
            if output.tokens == wanted.tokens
        ]
        # a value half-way between two integers goes either way: most answers agree closely, all nearly
        assert len(worst) >= len(outputs) - 1 and sorted(worst)[len(worst) // 2] < 2e-3 and max(worst) < 0.1
    whole = [one.logprobs for one in family(name).expected]
    assert any(one.logprobs != exact for one, exact in zip(outputs, whole, strict=True))


def test_smoothing_takes_the_harm_out_of_outliers(tmp_path: Path, offload: Path) -> None:
    """One channel of every norm is a hundred times as large, and every weight that reads it as small."""
    family = make_family("llama", tmp_path / "model")
    with torch.no_grad():
        for layer in family.model.model.layers:
            for norm, readers in (
                (
                    layer.input_layernorm,
                    (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj),
                ),
                (layer.post_attention_layernorm, (layer.mlp.gate_proj, layer.mlp.up_proj)),
            ):
                norm.weight[7] *= 100
                for reader in readers:
                    reader.weight[:, 7] /= 100
    family.model.save_pretrained(family.folder)
    statistics = tmp_path / "statistics.safetensors"
    with Engine(family.folder, Policy(), offload_dir=offload, device="cpu") as engine:
        assert engine.calibrate(prompts(), statistics) == sum(map(len, prompts()))
    requests = [Request(prompt, prompt_logprobs=True) for prompt in prompts((25, 30, 17))]
    exact, plain, smooth = (
        [output.prompt_logprobs for output in answers(family.folder, policy, requests, offload)]
        for policy in ("", "weight_quant=w8a8", f"weight_quant=w8a8,calibration={statistics}")
        for policy in (policy or "device_batch=16",)
    )

    def distance(found: list[tuple[float, ...] | None]) -> float:
        pairs = zip((found or [])[:], exact, strict=True)
        return max(abs(a - b) for one, two in pairs for a, b in zip(one or (), two or (), strict=True))

    assert distance(smooth) < 0.2 * distance(plain)


def test_statistics_that_do_not_belong_are_refused(llama: Family, tmp_path: Path, offload: Path) -> None:
    path = tmp_path / "statistics.safetensors"

    def refused(words: str) -> None:
        with pytest.raises(PolicyError) as caught:
            Engine(
                llama.folder, Policy.parse(f"weight_quant=w8a8,calibration={path}"), offload_dir=offload,
                device="cpu",
            )  # fmt: skip
        assert words in str(caught.value) and "\n" not in str(caught.value)

    refused("cannot be read")
    path.write_bytes(b"not safetensors")
    refused("cannot be read")
    save_file({"a": torch.zeros(3)}, path)
    refused("was not written by run_helm.py calibrate")
    with Engine(llama.folder, Policy(), offload_dir=offload, device="cpu") as engine:
        engine.calibrate(prompts(), path)
        found = read_statistics(path, engine.spec.digest)
        assert set(found) >= {name for name, spec in engine.spec.tensors.items() if spec.compressible}
    save_file({"a": torch.zeros(3)}, path, {"format": "tierbench-calibration", "model": "another"})
    refused("belongs to another model")
