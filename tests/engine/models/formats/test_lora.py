"""A LoRA adapter is merged as `peft` merges it; what is more than plain LoRA is refused by name."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from engine.engine import Engine
from engine.errors import ModelError, UsageError
from engine.spec.request import Request
from tests.support.engine_models import Family, full_forwards, prompts
from tests.support.prequantised_models import GPTQ, save_quantised

RANK, ALPHA = 4, 6
Q, UP = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj"
ANSWERED = prompts()[:3]


def save_adapter(
    folder: Path, shapes: dict[str, tuple[int, int]], ranks: dict[str, int] | None = None, **settings: Any
) -> dict[str, tuple[Tensor, Tensor]]:
    """Write an adapter with random factors for modules [out, in]; returns A and B by module."""
    folder.mkdir(parents=True, exist_ok=True)
    generator, factors, state = torch.Generator().manual_seed(3), {}, {}
    for module, (rows, width) in shapes.items():
        rank = (ranks or {}).get(module, RANK)
        a = torch.randn(rank, width, generator=generator) * 0.2
        b = torch.randn(rows, rank, generator=generator) * 0.2
        factors[module] = a, b
        state |= {f"base_model.model.{module}.lora_{part}.weight": t for part, t in (("A", a), ("B", b))}
    save_file(state, folder / "adapter_model.safetensors")
    usual = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "lora_dropout": 0.1, "bias": "none"}
    text = json.dumps(usual | settings)
    (folder / "adapter_config.json").write_text(text, encoding="utf-8")
    return factors


def answers(model: Path, adapter: Path | None, offload: Path, policy: str = "") -> list[Any]:
    from engine.spec.policy import Policy

    with Engine(
        model, Policy.parse(policy) if policy else None, device="cpu", offload_dir=offload, adapter=adapter,
        store=offload / "store",
    ) as engine:  # fmt: skip
        return engine.answer([Request(prompt, 5, prompt_logprobs=True) for prompt in ANSWERED])


def check(found: list[Any], model: Any) -> None:
    for prompt, output in zip(ANSWERED, found, strict=True):
        expected = full_forwards(model, prompt, 5)
        assert tuple(output.tokens) == tuple(expected.tokens)
        assert torch.allclose(torch.tensor(output.logprobs), torch.tensor(expected.logprobs), atol=1e-4)


def merge_by_hand(
    model: Any, factors: dict[str, tuple[Tensor, Tensor]], scale: Callable[[str], float]
) -> Any:
    """A copy of the model with W + scale * B @ A."""
    import copy

    merged = copy.deepcopy(model)
    with torch.no_grad():
        for module, (a, b) in factors.items():
            weight = merged.get_submodule(module).weight
            delta = scale(module) * (b @ a)
            weight += delta if weight.shape == delta.shape else delta.t()
    return merged


SHAPES = {Q: (64, 64), UP: (96, 64)}


@pytest.mark.parametrize("policy", ["", "weights=disk", "weights=0.3/0.3/0.4,kv=host"])
def test_an_adapter_is_merged_wherever_weights_lie(
    policy: str, llama: Family, tmp_path: Path, offload: Path
) -> None:
    factors = save_adapter(tmp_path / "lora", SHAPES)
    wanted = merge_by_hand(llama.model, factors, lambda _: ALPHA / RANK)
    check(answers(llama.folder, tmp_path / "lora", offload, policy), wanted)
    check(answers(llama.folder, None, offload, policy), llama.model)  # nothing of it stays behind


@pytest.mark.parametrize(("settings", "scale"), [
    ({"use_rslora": True}, lambda module: ALPHA / math.sqrt(RANK)),
    ({"alpha_pattern": {"up_proj": 16}}, lambda module: (16 if module == UP else ALPHA) / RANK),
    ({"alpha_pattern": {r"layers\.0\..*": 2}}, lambda module: (2 if module == Q else ALPHA) / RANK),
    ({"rank_pattern": {"q_proj": 2}}, lambda module: ALPHA / (2 if module == Q else RANK)),
])  # fmt: skip
def test_scales(
    settings: dict[str, Any], scale: Callable[[str], float], llama: Family, tmp_path: Path, offload: Path
) -> None:
    ranks = {Q: 2} if "rank_pattern" in settings else None
    factors = save_adapter(tmp_path / "lora", SHAPES, ranks, **settings)
    check(answers(llama.folder, tmp_path / "lora", offload), merge_by_hand(llama.model, factors, scale))


def test_turned_weights(family: Callable[[str], Family], tmp_path: Path, offload: Path) -> None:
    """GPT-2 keeps its linear weights turned."""
    gpt2 = family("gpt2")
    module = "transformer.h.0.attn.c_attn"
    width, rows = gpt2.model.get_submodule(module).weight.shape
    factors = save_adapter(tmp_path / "lora", {module: (rows, width)}, fan_in_fan_out=True)
    wanted = merge_by_hand(gpt2.model, factors, lambda _: ALPHA / RANK)
    check(answers(gpt2.folder, tmp_path / "lora", offload), wanted)


def test_as_peft_merges_it(llama: Family, tmp_path: Path, offload: Path) -> None:
    peft = pytest.importorskip("peft")
    import copy

    base = copy.deepcopy(llama.model)
    config = peft.LoraConfig(
        r=4, lora_alpha=7, use_rslora=False, target_modules=["q_proj", "down_proj", "embed_tokens"],
        rank_pattern={"down_proj": 2}, alpha_pattern={r"layers\.1\..*q_proj": 20}, init_lora_weights=False,
        modules_to_save=["norm"],
    )  # fmt: skip
    torch.manual_seed(5)
    trained = peft.get_peft_model(base, config)
    with torch.no_grad():
        for parameter in trained.parameters():
            if parameter.requires_grad:
                parameter.normal_(0, 0.2)
    trained.save_pretrained(tmp_path / "lora")
    found = answers(llama.folder, tmp_path / "lora", offload)
    check(found, trained.merge_and_unload().eval())


def test_digest_record_and_keys_name_it(llama: Family, tmp_path: Path, offload: Path) -> None:
    save_adapter(tmp_path / "one", SHAPES)
    save_adapter(tmp_path / "two", SHAPES, lora_alpha=7)
    digests, paths = set(), []
    for adapter in (None, tmp_path / "one", tmp_path / "two"):
        with Engine(llama.folder, device="cpu", offload_dir=offload, adapter=adapter) as engine:
            digests.add(engine.spec.digest)
            paths.append(engine.record().model.path)
    assert len(digests) == 3
    assert paths[1] == f"{llama.folder} + {tmp_path / 'one'}"


@pytest.mark.parametrize(("settings", "said"), [
    ({"peft_type": "IA3"}, "IA3"),
    ({"use_dora": True}, "use_dora=True"),
    ({"lora_bias": True}, "lora_bias=True"),
    ({"init_lora_weights": "pissa_niter_4"}, "pissa_niter_4"),
    ({"trainable_token_indices": [1]}, "trainable_token_indices"),
    ({"layer_replication": [[0, 2]]}, "layer_replication"),
    ({"something_new": {"a": 1}}, "something_new"),
    ({"r": 0}, "r=0"),
    ({"r": 3}, "its rank is not as its settings say"),
    ({"lora_alpha": "x"}, "lora_alpha='x'"),
    ({"alpha_pattern": {"(a+)+": 3}}, "alpha_pattern"),
])  # fmt: skip
def test_what_is_not_plain_lora_is_refused(
    settings: dict[str, Any], said: str, llama: Family, tmp_path: Path, offload: Path
) -> None:
    save_adapter(tmp_path / "lora", SHAPES, **settings)
    with pytest.raises(ModelError) as caught:
        answers(llama.folder, tmp_path / "lora", offload)
    assert said in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(("change", "said"), [
    ({"base_model.model.model.layers.9.mlp.up_proj.lora_A.weight": torch.zeros(4, 64),
      "base_model.model.model.layers.9.mlp.up_proj.lora_B.weight": torch.zeros(96, 4)}, "lacks"),
    ({f"base_model.model.{UP}.lora_B.weight": torch.zeros(95, 4)}, "[95, 64]"),
    ({f"base_model.model.{UP}.lora_magnitude_vector": torch.zeros(96)}, "none of LoRA's"),
    ({f"base_model.model.{UP}.weight": torch.zeros(96, 64)}, "twice"),
    ({"base_model.model.model.layers.0.mlp.up_proj.lora_A.weight": torch.zeros(4, 64)}, "one of the two"),
])  # fmt: skip
def test_tensors_that_do_not_fit_are_named(
    change: dict[str, Tensor], said: str, llama: Family, tmp_path: Path, offload: Path
) -> None:
    save_adapter(tmp_path / "lora", SHAPES)
    path = tmp_path / "lora" / "adapter_model.safetensors"
    save_file(load_file(path) | change, path)
    with pytest.raises(ModelError) as caught:
        answers(llama.folder, tmp_path / "lora", offload)
    assert said in str(caught.value)


def test_where_it_cannot_be_applied(llama: Family, tmp_path: Path, offload: Path) -> None:
    save_adapter(tmp_path / "lora", SHAPES)
    with pytest.raises(ModelError, match=r"no adapter_config\.json"):
        answers(llama.folder, tmp_path, offload)
    with pytest.raises(UsageError, match="weights=random has none"):
        Engine(llama.folder, device="cpu", weights="random", adapter=tmp_path / "lora")
    save_quantised(llama.model, tmp_path / "gptq", GPTQ)
    with pytest.raises(ModelError, match="in few bits already"):
        answers(tmp_path / "gptq", tmp_path / "lora", offload)
