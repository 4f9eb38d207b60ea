"""A config of the same class and features with a few small layers of each kind."""

from __future__ import annotations

import copy
import re
from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig
from transformers.initialization import no_init_weights

from engine.models.decoder.build import build
from engine.models.decoder.parts import LAYER_COUNTS, find_parts, text_config
from engine.models.recurrent.sizes import shrink_state, write

_MOST_KINDS = 12
"""Layers of a twin; a model of more kinds shows the first ones."""

_SMALL: dict[str, int] = {
    "vocab_size": 128, "hidden_size": 64, "d_model": 64, "n_embd": 64, "word_embed_proj_dim": 64,
    "intermediate_size": 96, "ffn_dim": 96, "n_inner": 96, "moe_intermediate_size": 48,
    "shared_expert_intermediate_size": 48, "head_dim": 16, "num_experts": 4, "num_local_experts": 4,
    "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "n_shared_experts": 1,
    "sliding_window": 8, "attention_chunk_size": 8, "max_position_embeddings": 128, "n_positions": 128,
    "q_lora_rank": 32, "kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 8,
    "qk_head_dim": 32, "rotary_dim": 8, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "swa_head_dim": 16, "swa_v_head_dim": 8, "kv_channels": 16, "num_experts_per_token": 2,
    "moe_num_experts": 4, "moe_topk": 2, "moe_k": 2, "top_k_experts": 2, "decoder_ffn_dim": 96,
    "encoder_ffn_dim": 96, "intermediate_size_mlp": 96, "dim_ff": 96, "dff": 96, "ffn_hidden_size": 96,
    "expert_ffn_hidden_size": 48, "shared_intermediate_size": 48, "moe_shared_expert_intermediate_size": 48,
    "vocab_size_per_layer_input": 128, "hidden_size_per_layer_input": 16, "dim_head": 16, "n_ctx": 128,
    "max_seq_len": 128, "keep_window_size": 8, "window_size": 8, "local_window_size": 8, "swa_window": 8,
    "attention_window_size": 8,
}  # fmt: skip
"""Sizes of a twin, by the names that configs use; only those that a config has are set."""

_HEADS = (
    "num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads",
    "swa_num_attention_heads",
)  # fmt: skip
_GROUPS = (
    "num_key_value_heads", "num_kv_heads", "n_kv_heads", "num_global_key_value_heads",
    "swa_num_key_value_heads",
)  # fmt: skip

_TOWER_LAYERS = (
    "num_hidden_layers", "num_layers", "depth", "encoder_layers", "decoder_layers", "n_layers",
    "encoder_depth",
)  # fmt: skip

_PLACE = re.compile(r"idx|index|layer_id|layer_number")
"""Names of what tells a layer where it is, not what it is."""


def twin_config(config: PretrainedConfig) -> Any:
    """A config of the same class and features with a few small layers of each kind.

    Of a wrapper only the text part is shrunk; the others are never given weights.
    """
    twin = _with_small_towers(copy.deepcopy(config))
    text = text_config(twin)
    overrides = _take_overrides(text)
    _shrink_sizes(text)
    shrink_state(text)
    _shrink_rope(text)
    _pick_layers(twin, text, overrides)
    twin._attn_implementation = None
    return twin


def _with_small_towers(config: Any) -> Any:
    """The same wrapper with one layer in each other part, where that can be built: it is made sooner."""
    text = text_config(config)
    if text is config:
        return config
    small = copy.deepcopy(config)
    _shrink_towers(small, text_config(small))
    try:
        _structure_of(small)
    except Exception:  # some name single layers of a tower
        return config
    return small


def _shrink_towers(config: Any, text: Any) -> None:
    for part in vars(config).values():
        if isinstance(part, PretrainedConfig) and part is not text:
            _shrink_towers(part, text)
            if text_config(part) is not text:
                for name in _TOWER_LAYERS:
                    if isinstance(read(part, name), int):
                        write(part, name, 1)


def read(config: Any, name: str) -> Any:
    """A config's attribute; None where it has none or cannot tell."""
    try:
        return getattr(config, name, None)
    except Exception:  # configs compute some attributes
        return None


def _shrink_sizes(text: Any) -> None:
    heads = next((read(text, name) for name in _HEADS if isinstance(read(text, name), int)), 4)
    small = dict(_SMALL) | dict.fromkeys(_HEADS, 4)
    for name in _GROUPS:
        groups = read(text, name)
        if isinstance(groups, int):
            small[name] = 4 if groups >= heads else 1 if groups == 1 else 2
    head, rotated = read(text, "head_dim"), read(text, "qk_rope_head_dim")
    if isinstance(head, int) and rotated and head % rotated == 0:  # a part of it may be what is rotated
        small["head_dim"] = small["qk_rope_head_dim"] * (head // rotated)
    for wide in ("word_embed_proj_dim", "embedding_size"):  # a narrower embedding stays narrower
        if read(text, wide) not in (None, read(text, "hidden_size")):
            small[wide] = 32
    for name, value in small.items():
        before = read(text, name)
        if isinstance(before, (list, tuple)) and not name.endswith("token_id"):
            write(text, name, type(before)(value if part else part for part in before))
        elif before is not None and not (before == 0 and name not in ("pad_token_id", "bos_token_id")):
            write(text, name, value)
    for name, cap in (("attn_logit_softcapping", 2.0), ("final_logit_softcapping", 5.0)):
        if read(text, name):  # low enough for a small random model's scores to reach it
            write(text, name, cap)
    if read(text, "pad_token_id") is None:
        write(text, "pad_token_id", 0)


def _shrink_rope(text: Any) -> None:
    """Keep rope factors per dimension, and sections of several axes, as long as the rotary dimension."""
    rope = read(text, "rope_parameters")
    if not isinstance(rope, dict):
        return
    head = read(text, "head_dim") or text.hidden_size // text.num_attention_heads
    usual = read(text, "partial_rotary_factor") or 1.0
    for parameters in [rope, *(value for value in rope.values() if isinstance(value, dict))]:
        pairs = int(head * (parameters.get("partial_rotary_factor") or usual)) // 2
        for key in ("short_factor", "long_factor"):
            if isinstance(parameters.get(key), list):
                parameters[key] = parameters[key][:pairs]
        sections = parameters.get("mrope_section")
        if isinstance(sections, list) and sum(sections):
            scaled = [max(1, pairs * part // sum(sections)) for part in sections]
            scaled[0] += pairs - sum(scaled)
            parameters["mrope_section"] = scaled
        if "original_max_position_embeddings" in parameters:
            parameters["original_max_position_embeddings"] = 64


# Layers


def _take_overrides(text: Any) -> dict[int, dict[str, Any]]:
    """Take what a config says of single layers away from it, shrunk, by the layer's index."""
    spec = vars(text).get("_heterogeneity_spec")
    if spec is None:
        return {}
    overrides = copy.deepcopy(spec.per_layer_overrides)
    text.per_layer_config = None
    for values in overrides.values():
        for name, value in values.items():
            if name in _GROUPS and isinstance(value, int):
                values[name] = 1 if value == 1 else 2
            elif name in _SMALL and isinstance(value, int):
                usual = read(text, name)
                values[name] = _SMALL[name] * (2 if isinstance(usual, int) and value > usual else 1)
    return overrides


def _pick_layers(twin: Any, text: Any, overrides: dict[int, dict[str, Any]]) -> None:
    """Cut to a few layers that show every kind the model has, in order of first appearance."""
    count = next((read(text, name) for name in LAYER_COUNTS if isinstance(read(text, name), int)), 0)
    if not count:
        return
    columns = {
        name: list(value)
        for name, value in vars(text).items()
        if isinstance(value, (list, tuple))
        and len(value) == count > 1
        and list(value) != list(range(count))
        and not name.startswith("_")
    }
    dense = read(text, "first_k_dense_replace") or 0
    _cut(text, columns, overrides, list(range(count)), dense)
    kinds = _kinds(twin, [*columns.values(), *[[overrides.get(index) for index in range(count)]]], count)
    firsts = [kinds.index(kind) for kind in dict.fromkeys(kinds)][:_MOST_KINDS]
    others = [index for index in range(count) if index not in firsts]
    few = sorted([*firsts, *others][: max(2, len(firsts))])
    for chosen in (few, list(range(max(2, min(max(firsts) + 1, count))))):
        _cut(text, columns, overrides, chosen, dense)
        if len(set(_kinds(twin, [], len(chosen)))) >= len({kinds[index][0] for index in firsts}):
            return
    raise ValueError(f"its {len(firsts)} kinds of layers are not all in a few of them")


def _cut(
    text: Any,
    columns: dict[str, list[Any]],
    overrides: dict[int, dict[str, Any]],
    chosen: list[int],
    dense: int,
) -> None:
    """Keep the layers of some indices.

    Args:
        dense: how many layers are dense before those with experts begin.
    """
    for name, column in columns.items():
        write(text, name, [column[index] for index in chosen])
    for name in LAYER_COUNTS:
        if isinstance(read(text, name), int):
            write(text, name, len(chosen))
    if dense:
        write(text, "first_k_dense_replace", sum(index < dense for index in chosen))
    kept = {place: dict(overrides[index]) for place, index in enumerate(chosen) if index in overrides}
    if overrides:
        text.per_layer_config = None
        text.per_layer_config = kept


def _kinds(twin: Any, columns: Sequence[list[Any]], count: int) -> list[tuple[Hashable, ...]]:
    """What kind each layer is of: by its modules, where a model can be built, and by its row of columns."""
    try:
        layers: Sequence[nn.Module | None] = list(find_parts(_structure_of(twin)).layers)
    except Exception:  # the check says why, when it builds the twin
        layers = [None] * count
    return [
        (None if layer is None else _structure(layer), *(repr(column[index]) for column in columns))
        for index, layer in enumerate(layers[:count])
    ]


def _structure_of(config: Any) -> Any:
    """An empty model of which only classes, shapes and settings are looked at."""
    with no_init_weights():
        return build(config, torch.float32, "eager", empty=True)


def _structure(layer: nn.Module) -> Hashable:
    """Classes, shapes and settings of a layer's modules."""
    return tuple(
        (
            name,
            type(module).__name__,
            tuple(
                (key, None if value is None else tuple(value.shape))
                for key, value in module._parameters.items()
            ),
            tuple(
                (key, value)
                for key, value in sorted(vars(module).items())
                if (value is None or isinstance(value, (bool, int, str))) and not _PLACE.search(key)
            ),
        )
        for name, module in layer.named_modules()
    )
