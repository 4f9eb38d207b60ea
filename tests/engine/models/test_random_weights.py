"""Random weights depend on seed and name only, in any part, and are nearly normal; norms are 1, biases 0."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, OPTConfig, PretrainedConfig

from engine.kernels import random
from engine.models.adapter import LayeredModel
from engine.models.random_weights import RandomWeights


def config(dtype: torch.dtype = torch.float16) -> PretrainedConfig:
    return OPTConfig(
        vocab_size=300, hidden_size=64, word_embed_proj_dim=64, ffn_dim=128, num_hidden_layers=2,
        num_attention_heads=4, dtype=dtype, initializer_range=0.5,
    )  # fmt: skip


@pytest.fixture(scope="module")
def model() -> LayeredModel:
    return LayeredModel.empty(config(), torch.float32, False)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_pieces_and_parts_are_those_of_the_whole(dtype: torch.dtype, model: LayeredModel) -> None:
    source = RandomWeights(config(dtype), seed=3)
    whole = dict(source.stream(model))
    assert whole.keys() == source.dtypes(model).keys()
    assert all(value.dtype == dtype for value in whole.values())
    made: dict[str, list[torch.Tensor]] = {}
    for name, start, part in source.pieces(model, 1000):
        assert start == sum(map(len, made.get(name, []))) and len(part) <= 1000
        made.setdefault(name, []).append(part.clone())
    assert list(made) == list(whole)
    assert all(torch.equal(torch.cat(parts), whole[name].view(-1)) for name, parts in made.items())
    name = "model.decoder.layers.1.fc1.weight"
    assert torch.equal(source.fill(name, 130, torch.empty(64, dtype=dtype)), whole[name].view(-1)[130:194])


def test_kinds_of_tensors(model: LayeredModel) -> None:
    for name, value in RandomWeights(config()).stream(model):
        if value.dim() > 1:
            assert abs(value.float().std() - 0.5) < 0.05 and abs(value.float().mean()) < 0.05
        else:
            assert value.unique().tolist() == [float(name.endswith("weight"))]


def test_only_what_is_asked_for(model: LayeredModel) -> None:
    source = RandomWeights(config())
    name = "model.decoder.layers.0.fc2.weight"
    ((got, value),) = source.stream(model, {name})
    assert got == name and torch.equal(value, dict(source.stream(model))[name])
    assert {got for got, _, _ in source.pieces(model, 100, {name})} == {name}


def test_the_digest_names_what_decides_the_values(
    model: LayeredModel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def digest(seed: int = 0, **changes: Any) -> str:
        changed = config()
        changed.update(changes)
        return RandomWeights(changed, seed).digest

    first = digest()
    config().save_pretrained(tmp_path)
    assert digest() == first == digest(**{"hidden_size": 64})
    others = {digest(1), digest(hidden_size=32), digest(initializer_range=0.1)}
    monkeypatch.setattr(random, "VERSION", random.VERSION + 1)
    assert len({first, digest(), *others}) == 5
    assert AutoConfig.from_pretrained(tmp_path).initializer_range == 0.5
