"""Checkpoints of 16-bit numbers are computed without conversion and answer as in float32 in every placement.

The oracle is `transformers` in float32 over the same rounded numbers.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from engine.engine import Engine
from engine.kernels.cpu import native
from engine.spec.policy import Policy
from engine.spec.request import Request
from tests.support.agreement import COMPARISON
from tests.support.engine_models import FAMILIES, NEW_TOKENS, Family, prompts
from tests.support.engine_runs import answers, held

MIXED = "0.3/0.3/0.4"
RUNS = {
    "resident": ("device_batch=16,num_device_batches=1", "cpu"),
    "on disk": ("weights=disk,kv=disk,device_batch=3,num_device_batches=2", "cpu"),
    "every tier": (f"weights={MIXED},kv={MIXED},device_batch=2,num_device_batches=3", "pretend"),
}
REQUESTS = [Request(prompt, NEW_TOKENS, prompt_logprobs=True) for prompt in prompts()]


def rounded(family: Family, dtype: torch.dtype, folder: Path) -> Family:
    """A family's model with its numbers rounded to 16 bits on disk, and in float32 in memory."""
    model = copy.deepcopy(family.model)
    for parameter in model.parameters():  # not the buffers: rotary frequencies are not rounded
        parameter.data = parameter.data.to(dtype).float()
    on_disk = copy.deepcopy(model).to(dtype)
    on_disk.config.dtype = dtype
    on_disk.save_pretrained(folder)
    return Family(family.name, folder, model)


@pytest.mark.parametrize(("name", "dtype"), [
    *((name, torch.float16) for name in FAMILIES),
    *((name, torch.bfloat16) for name in ("opt", "llama", "gpt2", "mixtral", "gemma2", "deepseek_v3")),
], ids=str)  # fmt: skip
def test_sixteen_bits_answer_as_float32(
    name: str, dtype: torch.dtype, family: Callable[[str], Family], tmp_path: Path, offload: Path
) -> None:
    model = rounded(family(name), dtype, tmp_path / "model")
    for policy, device in RUNS.values():
        outputs = answers(model.folder, policy, REQUESTS, offload, device)
        for request, output, expected in zip(REQUESTS, outputs, model.expected, strict=True):
            COMPARISON.check(name, request, output, expected)


def test_resident_weights_take_sixteen_bits(llama: Family, tmp_path: Path, offload: Path) -> None:
    if not native.available():
        pytest.skip("without a compiler weights are kept in the precision that is computed in")
    model = rounded(llama, torch.float16, tmp_path / "model")
    with Engine(model.folder, Policy(), offload_dir=offload, device="cpu") as engine:
        plan = engine.check(REQUESTS)
        matrices = sum(t.numel for t in engine.spec.tensors.values() if t.is_matrix)
        vectors = engine.spec.num_parameters - matrices
        assert sum(kept.nbytes for kept in plan.weights.values()) == 2 * matrices + 4 * vectors
        engine.answer(REQUESTS[:1])
        assert held(engine)["device"] == 2 * matrices + 4 * vectors
