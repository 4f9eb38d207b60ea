"""Weights are read from the model's own files or from the packed store, which is written once and checked."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from engine.engine import Engine
from engine.memory.disk import files as disk
from engine.models.checkpoint import Checkpoint
from engine.spec.policy import Policy
from engine.spec.request import Output, Request
from tests.support.engine_models import Family, prompts

REQUESTS = [Request(prompt, 3, prompt_logprobs=True) for prompt in prompts()[:4]]


@pytest.fixture
def streamed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the tensors that went through transformers' conversion, in order."""
    names: list[str] = []
    stream = Checkpoint.stream

    def noted(*args: Any, **kwargs: Any) -> Iterator[Any]:
        for name, value in stream(*args, **kwargs):
            names.append(name)
            yield name, value

    monkeypatch.setattr(Checkpoint, "stream", noted)
    return names


def run(model: Path, policy: str, tmp_path: Path, **options: Any) -> tuple[list[Output], dict[str, Any]]:
    chosen, folder = Policy.parse(policy), tmp_path / "offload"
    with Engine(
        model, chosen, offload_dir=folder, device="cpu", store=tmp_path / "store", **options
    ) as engine:
        return engine.answer(REQUESTS), engine.record().weights_from


@pytest.mark.parametrize("policy", ["weights=device", "weights=disk", "weights=0.3/0.3/0.4"])
def test_plain_weights_are_read_from_the_models_own_files(
    policy: str, llama: Family, tmp_path: Path, streamed: list[str]
) -> None:
    _, origin = run(llama.folder, policy, tmp_path)
    assert (origin.streamed, origin.store_entry) == (0, None)
    assert streamed == [] and not (tmp_path / "store").exists(), "one copy on the disk, the checkpoint"


def test_a_weight_that_is_converted_is_read_straight(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = CONFIG_MAPPING["opt"](
        vocab_size=200, hidden_size=512, word_embed_proj_dim=512, ffn_dim=64, num_attention_heads=8,
        num_hidden_layers=1, max_position_embeddings=1500, dtype="float16",
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config, dtype=torch.float16).save_pretrained(tmp_path / "model")
    read, through = disk._read_group, []

    def noted(group: list[Any]) -> None:
        through.append(sum(len(piece.view) for piece in group))
        read(group)

    monkeypatch.setattr(disk, "_read_group", noted)
    run(tmp_path / "model", "weights=disk", tmp_path)
    assert through and max(through) < disk.BOUNCE_BYTES, "edges and small weights, not positions"


@pytest.mark.parametrize("weights", ["device", "disk"])
def test_what_is_packed_is_packed_once(
    weights: str, llama: Family, tmp_path: Path, streamed: list[str]
) -> None:
    policy = f"weights={weights},weight_quant=4"
    first, origin = run(llama.folder, policy, tmp_path)
    packed = len(streamed)
    assert origin.store_entry and packed
    again, other = run(llama.folder, policy, tmp_path)
    assert len(streamed) == packed, "nothing is packed a second time"
    assert (again, other.store_entry) == (first, origin.store_entry) or near(first, again)
    placed, third = run(llama.folder, "weights=0.5/0/0.5,weight_quant=4", tmp_path)
    assert len(streamed) == packed and third.store_entry == origin.store_entry, "wherever it is placed"
    assert near(first, placed)
    _, eight = run(llama.folder, f"weights={weights},weight_quant=8", tmp_path)
    assert eight.store_entry != origin.store_entry, "other bits are another entry"


def near(outputs: list[Output], others: list[Output]) -> bool:
    """Whether outputs are equal, except for times."""
    return all(
        output.tokens == other.tokens
        and torch.allclose(torch.tensor(output.logprobs), torch.tensor(other.logprobs), atol=1e-5)
        for output, other in zip(outputs, others, strict=True)
    )


def test_a_damaged_entry_is_noticed_when_asked_to_verify_and_made_anew(llama: Family, tmp_path: Path) -> None:
    policy = "weights=disk,weight_quant=4"
    first, _ = run(llama.folder, policy, tmp_path)
    (weights,) = (tmp_path / "store").glob("*/weights.bin")
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 0xFF
    weights.write_bytes(content)
    notices: list[str] = []
    again, _ = run(llama.folder, policy, tmp_path, verify=True, on_notice=notices.append)
    assert len(notices) == 1 and "damaged" in notices[0] and "made anew" in notices[0]
    assert near(first, again)
    notices.clear()
    run(llama.folder, policy, tmp_path, verify=True, on_notice=notices.append)
    assert notices == []


def test_divisors_of_activations_come_back_from_the_store(llama: Family, tmp_path: Path) -> None:
    statistics = tmp_path / "statistics.safetensors"
    with Engine(llama.folder, device="cpu", offload_dir=tmp_path / "offload") as engine:
        engine.calibrate([request.prompt for request in REQUESTS], statistics)
    policy = f"weight_quant=w8a8,calibration={statistics}"
    first, origin = run(llama.folder, policy, tmp_path)
    again, other = run(llama.folder, policy, tmp_path)
    assert origin.store_entry == other.store_entry is not None
    assert near(first, again)
    plain, without = run(llama.folder, "weight_quant=w8a8", tmp_path)
    assert without.store_entry != origin.store_entry
    assert [output.logprobs for output in plain] != [output.logprobs for output in first]
