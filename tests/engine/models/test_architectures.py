"""Architectures that the engine would answer wrongly are refused by name, before anything is loaded."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import CONFIG_MAPPING

from engine.engine import Engine
from engine.errors import UnsupportedModelError
from engine.kernels.calls import AttentionOptions
from engine.models import attention
from engine.models.adapter import LayeredModel
from engine.models.attention import attend
from engine.models.decoder.ways import Way
from engine.models.describe import kv_widths
from engine.models.twin import Twin, check_architecture, twin_config
from tests.support.engine_models import FAMILIES

REFUSED = {
    "openai-gpt": "OpenAIGPTLMHeadModel",
    "bert": "BertLMHeadModel",
    "doge": "DogeForCausalLM",
    "rwkv": "RwkvForCausalLM",
}
"""Model type -> class: no cache, not causal, or a state that is kept outside of attention."""


@pytest.mark.parametrize("model_type", REFUSED)
def test_refused_by_name(model_type: str, tmp_path: Path) -> None:
    config = CONFIG_MAPPING[model_type](architectures=[REFUSED[model_type]])
    config.save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError) as caught:
        Engine(tmp_path, device="cpu", offload_dir=tmp_path / "offload", weights="random")
    message = str(caught.value)
    assert message.startswith(f"{REFUSED[model_type]} is refused: ")
    assert "transformers itself" in message and "\n" not in message and caught.value.exit_code == 2


@pytest.mark.parametrize("model_type", ["t5", "bert", "vit"])
def test_models_that_are_no_causal_language_models(model_type: str, tmp_path: Path) -> None:
    CONFIG_MAPPING[model_type]().save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError) as caught:
        Engine(tmp_path, device="cpu", offload_dir=tmp_path / "offload", weights="random")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", FAMILIES)
def test_accepted_families_pass_the_check(name: str) -> None:
    check_architecture(FAMILIES[name]())


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_bigcode", "gemma3_text", "deepseek_v3"])
def test_widths_of_the_cache_are_those_of_a_real_pass(name: str) -> None:
    """The widths that are measured on shapes alone are those that attention gets in a pass."""
    seen: list[tuple[int, int]] = []

    def spy(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, *rest: object) -> None:
        seen.append((keys[0].numel(), values[0].numel()))
        attend(query, keys, values, *rest)  # type: ignore[arg-type]

    config = twin_config(FAMILIES[name]())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "attend", spy)
        assert Twin(config).compare(Way.PACKED) == ""
    assert set(seen) == set(kv_widths(LayeredModel.empty(config, torch.float32)))


@pytest.mark.parametrize("damage", ["window", "softcap", "scale", "position"])
def test_the_check_notices_wrong_arithmetic(damage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A subtle error in the arithmetic makes the check refuse the architecture."""
    if damage == "position":
        embed = LayeredModel.embed
        monkeypatch.setattr(
            LayeredModel, "embed", lambda self, ids, at, *rest: embed(self, ids, at.clamp(max=20), *rest)
        )
    else:

        def wrong(query, keys, values, out, options, lse):  # type: ignore[no-untyped-def]
            if damage == "window" and options.window:
                options = replace(options, window=options.window + 1)
            if damage == "softcap":
                options = replace(options, softcap=None)
            if damage == "scale":
                options = replace(options, scale=options.scale * 1.01)
            attend(query, keys, values, out, options, lse)

        monkeypatch.setattr(attention, "attend", wrong)
    config = twin_config(FAMILIES["gemma2"]())
    config.attn_logit_softcapping = 1.0  # near the scores of random weights
    assert "differ" in Twin(config).compare(Way.PACKED)


@pytest.mark.parametrize("fresh,total", [(1, 1), (1, 40), (7, 7), (7, 40), (300, 300), (300, 310)])
@pytest.mark.parametrize("window", [None, 1, 5, 1000])
@pytest.mark.parametrize("kind", ["plain", "softcap", "sinks"])
@pytest.mark.parametrize("widths", [(16, 16), (24, 8)])
def test_attention_equals_plain_softmax(
    fresh: int, total: int, window: int | None, kind: str, widths: tuple[int, int]
) -> None:
    heads, groups = 4, 2
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(heads, fresh, widths[0], generator=generator)
    keys = torch.randn(total, groups, widths[0], generator=generator)
    values = torch.randn(total, groups, widths[1], generator=generator)
    softcap = 2.0 if kind == "softcap" else None
    sinks = torch.randn(heads, generator=generator) if kind == "sinks" else None
    out = torch.empty(fresh, heads, widths[1])
    attend(query, keys, values, out, AttentionOptions(0.3, window, softcap, sinks))
    for head in range(heads):
        scores = query[head].double() @ keys[:, head // 2].double().T * 0.3  # [fresh, total]
        if softcap is not None:
            scores = torch.tanh(scores / softcap) * softcap
        back = torch.arange(total - fresh, total)[:, None] - torch.arange(total)[None]
        scores[(back < 0) | (back >= (window or total))] = -torch.inf
        top = scores if sinks is None else torch.cat([scores, sinks[head].double().expand(fresh, 1)], 1)
        shares = torch.softmax(top, -1)[:, :total]
        assert torch.allclose(out[:, head].double(), shares @ values[:, head // 2].double(), atol=1e-5)


@pytest.mark.parametrize("fraction", [0.001, 0.1, 0.5, 0.99])
@pytest.mark.parametrize("kind", ["plain", "window", "softcap", "sinks"])
def test_sparse_attention_drops_all_but_the_best_scores(fraction: float, kind: str) -> None:
    heads, groups, total, width = 4, 2, 50, 16
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(heads, 1, width, generator=generator)
    keys = torch.randn(total, groups, width, generator=generator)
    values = torch.randn(total, groups, width, generator=generator)
    window = 20 if kind == "window" else None
    softcap = 2.0 if kind == "softcap" else None
    sinks = torch.randn(heads, generator=generator) if kind == "sinks" else None
    out = torch.empty(1, heads, width)
    attend(query, keys, values, out, AttentionOptions(0.3, window, softcap, sinks, fraction))
    visible = range(total - (window or total), total)
    for head in range(heads):
        scores = {t: float(query[head, 0].double() @ keys[t, head // 2].double()) * 0.3 for t in visible}
        if softcap is not None:
            scores = {t: math.tanh(score / softcap) * softcap for t, score in scores.items()}
        past = sorted(list(visible)[:-1], key=lambda t: -scores[t])
        kept = [*past[: max(1, int(fraction * len(past)))], total - 1]
        sunk = math.exp(float(sinks[head])) if sinks is not None else 0
        mass = sum(math.exp(scores[t]) for t in kept) + sunk
        wanted = sum(math.exp(scores[t]) / mass * values[t, head // 2].double() for t in kept)
        assert torch.allclose(out[0, head].double(), torch.as_tensor(wanted), atol=1e-5)
