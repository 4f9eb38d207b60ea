"""Checkpoints are read correctly in every format; random weights depend on their seed only."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig

from engine.engine import Engine
from engine.spec.policy import Policy
from engine.spec.request import Request
from tests.support.agreement import COMPARISON
from tests.support.engine_models import (
    NEW_TOKENS,
    Expected,
    Family,
    full_forwards,
    make_family,
    prompts,
)
from tests.support.engine_runs import answers

REQUESTS = [Request(prompt, NEW_TOKENS, prompt_logprobs=True) for prompt in prompts()[:4]]


@pytest.fixture
def copy(llama: Family, tmp_path: Path) -> Path:
    """A checkpoint to be damaged."""
    return Path(shutil.copytree(llama.folder, tmp_path / "model"))


def check_answers(folder: Path, offload: Path, expected: list[Expected], **options: Any) -> None:
    for request, output, wanted in zip(
        REQUESTS, answers(folder, "weights=0.3/0.3/0.4", REQUESTS, offload, **options), expected, strict=False
    ):
        COMPARISON.check("llama", request, output, wanted)


def test_shards_answer_as_the_single_file(llama: Family, tmp_path: Path, offload: Path) -> None:
    llama.model.save_pretrained(tmp_path / "shards", max_shard_size="60KB")
    assert len(list((tmp_path / "shards").glob("model-*.safetensors"))) > 2
    check_answers(tmp_path / "shards", offload, llama.expected)


@pytest.mark.parametrize("shards", [1, 3])
def test_pickled_weights_answer_as_the_single_file(
    shards: int, llama: Family, copy: Path, offload: Path
) -> None:
    (copy / "model.safetensors").unlink()
    state = llama.model.state_dict()
    if shards == 1:
        torch.save(state, copy / "pytorch_model.bin")
    else:
        weight_map: dict[str, str] = {}
        for number in range(shards):
            part = {name: state[name] for name in list(state)[number::shards]}
            name = f"pytorch_model-{number + 1:05d}-of-{shards:05d}.bin"
            torch.save(part, copy / name)
            weight_map |= dict.fromkeys(part, name)
        (copy / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    check_answers(copy, offload, llama.expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_kept_on_disk_and_computed_in_float32(
    dtype: torch.dtype, tmp_path: Path, offload: Path
) -> None:
    family = make_family("llama", tmp_path / "model")
    family.model.to(dtype).save_pretrained(family.folder)
    reference = AutoModelForCausalLM.from_pretrained(
        family.folder, dtype=torch.float32, attn_implementation="eager"
    )
    expected = [full_forwards(reference, prompt, NEW_TOKENS) for prompt in prompts()[:4]]
    check_answers(family.folder, offload, expected)
    with Engine(family.folder, Policy.parse("weights=disk"), offload_dir=offload, device="cpu") as engine:
        assert (engine.spec.dtype, engine.spec.compute_dtype) == (
            str(dtype).removeprefix("torch."),
            "float32",
        )
        assert all(tensor.nbytes == 2 * tensor.numel for tensor in engine.spec.tensors.values())


def test_mixed_precision_is_kept_tensor_by_tensor(llama: Family, copy: Path, offload: Path) -> None:
    state = load_file(copy / "model.safetensors")
    half = {n: v.half() if "mlp" in n else v for n, v in state.items()}
    save_file(half, copy / "model.safetensors", {"format": "pt"})
    with Engine(copy, Policy.parse("weights=host"), offload_dir=offload, device="cpu") as engine:
        kinds = {name: tensor.dtype for name, tensor in engine.spec.tensors.items()}
        assert kinds["model.layers.0.mlp.up_proj.weight"] == "float16"
        assert kinds["model.layers.0.self_attn.q_proj.weight"] == "float32"
    model = AutoModelForCausalLM.from_pretrained(
        llama.folder, dtype=torch.float32, attn_implementation="eager"
    )
    model.load_state_dict({name: value.float() for name, value in half.items()})
    check_answers(copy, offload, [full_forwards(model, prompt, NEW_TOKENS) for prompt in prompts()[:4]])


@pytest.mark.parametrize("name", ["opt", "gpt2", "gemma2", "qwen3_moe", "mixtral", "gpt_neox", "deepseek_v3"])
def test_every_value_arrives(name: str, family: Callable[[str], Family]) -> None:
    """Streamed tensors, renamed, fused and tied ones included, are those that `transformers` loads."""
    made = family(name)
    state = made.model.state_dict()
    with Engine(made.folder, device="cpu", offload_dir=made.folder / "off") as engine:
        streamed = dict(engine._source.stream(engine._model))
        assert set(streamed) == set(engine.spec.tensors)
    for tensor, value in streamed.items():
        assert torch.equal(value, state[tensor]), tensor
    total = sum(parameter.numel() for parameter in made.model.parameters())
    buffers = sum(value.numel() for value in state.values()) >= total
    assert buffers and engine.spec.num_parameters >= total


def test_digest_follows_config_and_contents(llama: Family, copy: Path) -> None:
    def digest(folder: Path) -> str:
        with Engine(folder, device="cpu", offload_dir=folder / "off") as engine:
            return engine.spec.digest

    first = digest(llama.folder)
    assert first.startswith("sha256:") and digest(copy) == first
    data = bytearray((copy / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (copy / "model.safetensors").write_bytes(data)
    changed = digest(copy)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-5}))
    assert len({first, changed, digest(copy)}) == 3


def random_answers(folder: Path, offload: Path, seed: int, policy: str = "weights=device") -> list[Any]:
    return [
        (output.tokens, output.logprobs)
        for output in answers(folder, policy, REQUESTS, offload, weights="random", seed=seed)
    ]


def test_random_weights_are_decided_by_the_seed(tmp_path: Path, offload: Path) -> None:
    """A config is enough, and the placement of the weights does not change their values."""
    LlamaConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        dtype="float32",
    ).save_pretrained(tmp_path)
    first = random_answers(tmp_path, offload, 0)
    assert random_answers(tmp_path, offload, 0) == first
    assert [tokens for tokens, _ in random_answers(tmp_path, offload, 0, "weights=disk")] == [
        t for t, _ in first
    ]
    assert random_answers(tmp_path, offload, 1) != first
    with Engine(tmp_path, device="cpu", offload_dir=offload, weights="random", seed=0) as engine:
        assert engine.spec.weights == "random" and engine.spec.digest.startswith("random-sha256:")
        streamed = dict(engine._source.stream(engine._model))
    assert len({value.double().sum().item() for value in streamed.values() if value.dim() > 1}) == sum(
        value.dim() > 1 for value in streamed.values()
    ), "no two matrices are the same"
    with Engine(tmp_path, device="cpu", offload_dir=offload, weights="random", seed=1) as other:
        assert other.spec.digest != engine.spec.digest
