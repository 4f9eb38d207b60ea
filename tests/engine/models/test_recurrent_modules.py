"""What recurrent modules keep is found without weights, and is what `transformers` keeps in a real run."""

from __future__ import annotations

import pytest
import torch

from engine.models.adapter import LayeredModel
from engine.models.check.tiny import tiny_model
from engine.models.recurrent.mixers import mixer_workspace, mixers_of
from tests.support.recurrent_models import CONFIGS, recurrent_config

OTHER_CACHES = {"recurrent_gemma", "minimax"}
"""Families that keep their state in attributes or in a cache of their own."""

FOLLOWS_ALONE = {"mamba", "falcon_mamba", "jamba", "recurrent_gemma"}
"""Families in which `transformers` starts several tokens anew, whatever the state before them."""


@pytest.mark.parametrize("name", sorted(CONFIGS.keys() - OTHER_CACHES))
def test_states_are_those_of_a_real_run(name: str) -> None:
    model = tiny_model(recurrent_config(name))
    with torch.inference_mode():
        out = model(input_ids=torch.arange(3, 14)[None], use_cache=True)
    cache = out.past_key_values if "past_key_values" in out else out.cache_params
    layered = LayeredModel.empty(model.config, torch.float32)
    assert any(layered.states)
    for layer, states in zip(cache.layers, layered.states, strict=True):
        kept = {
            (kind, index): tensor
            for kind in ("conv", "recurrent")
            for index, tensor in getattr(layer, f"{kind}_states", {}).items()
            if tensor is not None
        }
        assert {(state.kind, state.index): (1, *state.shape) for state in states} == {
            key: tuple(tensor.shape) for key, tensor in kept.items()
        }
        assert [state.dtype for state in states] == [
            str(t.dtype).removeprefix("torch.") for t in kept.values()
        ]


@pytest.mark.parametrize("name", CONFIGS)
def test_modules_that_start_anew_are_known(name: str) -> None:
    layered = LayeredModel.empty(recurrent_config(name), torch.float32)
    found = {mixer.found.continues for mixer in mixers_of(layered.layers)}
    assert found == {name not in FOLLOWS_ALONE}


def test_a_chunk_takes_more_bytes_than_a_token_and_none_is_forgotten() -> None:
    layered = LayeredModel.empty(recurrent_config("qwen3_next"), torch.float32)
    chunk, each = mixer_workspace(layered.layers, 64, 1)
    width = 2 * 2 * 16 + 4 * 16  # of queries, keys and values of one token
    assert chunk > 512 * width * 4
    assert 0 < each < chunk / 50


def test_models_without_state_have_no_mixers() -> None:
    from tests.support.engine_models import FAMILIES, twin_config

    layered = LayeredModel.empty(twin_config(FAMILIES["llama"]()), torch.float32)
    assert not any(layered.states) and not list(mixers_of(layered.layers))
