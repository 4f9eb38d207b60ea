"""The text part of a wrapper runs as its decoder; what text does not need is left out, counted and named."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.engine import Engine
from engine.errors import CheckpointError
from engine.spec.policy import Policy
from engine.spec.request import Request
from tests.support.agreement import COMPARISON
from tests.support.engine_models import NEW_TOKENS, Family, prompts

REQUESTS = [Request(prompt, NEW_TOKENS, prompt_logprobs=True) for prompt in prompts()]
POLICIES = {
    "resident": "",
    "offloaded": "weights=0/0.3/0.7,kv=0/0.5/0.5,device_batch=3,num_device_batches=2",
}
WRAPPERS = ("gemma3", "llava", "qwen2_vl", "blip-2", "mllama")
"""Windows, none, positions on three axes, a causal model inside, layers that text does not pass through."""


def engine_of(folder: Path, policy: str, **settings: object) -> Engine:
    return Engine(
        folder, Policy.parse(policy) if policy else None, offload_dir=folder / "offload",
        store=folder / "store", **({"device": "cpu"} | settings),
    )  # fmt: skip


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", WRAPPERS)
def test_answers_are_those_of_the_wrapper(name: str, policy: str, family: Callable[[str], Family]) -> None:
    made = family(name)
    for device in ("cpu", "pretend") if name == "gemma3" else ("cpu",):
        with engine_of(made.folder, POLICIES[policy], device=device) as engine:
            outputs = engine.answer(REQUESTS)
            assert engine.spec.left_out == {}  # only text was saved
        for request, output, expected in zip(REQUESTS, outputs, made.expected, strict=True):
            COMPARISON.check(name, request, output, expected)


@pytest.fixture
def wrapper(family: Callable[[str], Family], tmp_path: Path) -> Path:
    return Path(shutil.copytree(family("gemma3").folder, tmp_path / "model", ignore=lambda *_: ["offload"]))


def resave(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors", {"format": "pt"})


def test_what_is_left_out_is_counted_and_named(wrapper: Path, family: Callable[[str], Family]) -> None:
    extra = [
        "vision_tower.vision_model.embeddings.patch_embedding.weight",
        "vision_tower.vision_model.post_layernorm.weight",
        "multi_modal_projector.mm_soft_emb_norm.weight",
        "mtp.fc.weight",
        "medusa_head.0.weight",
        "mtp.layers.0.input_layernorm.weight",
    ]
    resave(wrapper, lambda state: state.update({name: torch.ones(3) for name in extra}))
    notices: list[str] = []
    with engine_of(wrapper, "", on_notice=notices.append) as engine:
        outputs = engine.answer(REQUESTS[:2])
        left_out = engine.record().model.left_out
    assert sum(left_out.values()) == len(extra)
    assert {"mtp.fc": 1, "mtp.layers": 1, "medusa_head.0": 1}.items() <= left_out.items()
    assert len(notices) == 1 and "6 tensors" in notices[0] and "medusa_head" in notices[0]
    for request, output, expected in zip(REQUESTS, outputs, family("gemma3").expected, strict=False):
        COMPARISON.check("gemma3", request, output, expected)


def test_a_missing_text_tensor_is_named(wrapper: Path) -> None:
    found = [name for name in load_file(wrapper / "model.safetensors") if "layers.1.mlp.up_proj" in name]

    def without(state: dict[str, torch.Tensor]) -> None:
        del state[found[0]]
        state["vision_tower.vision_model.post_layernorm.weight"] = torch.ones(3)

    resave(wrapper, without)
    with (
        pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.up_proj\.weight"),
        engine_of(wrapper, "") as e,
    ):
        e.answer(REQUESTS[:1])


@pytest.mark.parametrize("leaf", ["k_scale", "v_scale", "q_scale"])
def test_scales_of_other_engines_caches_are_left_out(
    leaf: str, family: Callable[[str], Family], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(family("llama").folder, tmp_path / "model"))
    resave(folder, lambda state: state.update({f"model.layers.0.self_attn.{leaf}": torch.ones(1)}))
    with engine_of(folder, "") as engine:
        assert engine.spec.left_out == {"model.layers.0": 1}
        engine.answer(REQUESTS[:1])


@pytest.mark.parametrize("leaf", ["bias", "SCB", "weight_scale"])
def test_what_belongs_to_a_weight_is_not_left_out(
    leaf: str, family: Callable[[str], Family], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(family("llama").folder, tmp_path / "model"))
    resave(folder, lambda state: state.update({f"model.layers.0.mlp.up_proj.{leaf}": torch.ones(96)}))
    with pytest.raises(CheckpointError, match=rf"up_proj\.{leaf}"), engine_of(folder, "") as engine:
        engine.answer(REQUESTS[:1])


def test_integers_in_the_place_of_weights_are_refused(
    family: Callable[[str], Family], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(family("llama").folder, tmp_path / "model"))
    name = "model.layers.0.mlp.up_proj.weight"
    resave(folder, lambda state: state.update({name: state[name].mul(100).to(torch.int8)}))
    with pytest.raises(CheckpointError, match=r"up_proj\.weight.*int8"), engine_of(folder, "") as engine:
        engine.answer(REQUESTS[:1])
