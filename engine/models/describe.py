"""From a `transformers` config and an empty model to the `ModelSpec` that planning needs."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PretrainedConfig

from engine.models.adapter import LayeredModel
from engine.spec.model import ModelSpec, TensorSpec
from engine.spec.quant import QuantSpec


def kv_widths(config: PretrainedConfig) -> tuple[tuple[int, int], ...]:
    """Values per token of each layer's keys and values, from the config alone.

    Multi-head latent attention (DeepSeek) is cached expanded: keys of nope + rope width per head,
    values of their own, narrower width. The architecture check compares this with a real pass.
    """
    text: Any = config.get_text_config()
    heads = int(text.num_attention_heads)
    groups = int(getattr(text, "num_key_value_heads", None) or heads)
    if getattr(text, "multi_query", False):
        groups = 1
    key = value = groups * _head_width(text)
    if _is_latent(text):
        key, value = heads * _head_width(text), heads * int(text.v_head_dim)
    return ((key, value),) * int(text.num_hidden_layers)


@dataclass(frozen=True)
class Origin:
    """Where a model's weights come from, and how they are kept there."""

    path: str
    kind: str
    """``trained`` or ``random``."""

    digest: str
    dtypes: Mapping[str, torch.dtype]
    """The checkpoint's own number format per tensor name."""

    packed: Mapping[str, QuantSpec]
    """Formats of the tensors that the checkpoint itself keeps packed."""

    in_files: Collection[str]
    """Names of those that its files hold byte by byte as the model takes them."""


def describe(
    config: PretrainedConfig, model: LayeredModel, compute_dtype: torch.dtype, origin: Origin
) -> ModelSpec:
    """Build the spec of an empty model."""
    text: Any = config.get_text_config()
    tensors = _describe_tensors(model, origin)
    floating = [tensor.dtype for tensor in tensors.values() if len(tensor.shape) > 1]
    hidden = int(text.hidden_size)
    return ModelSpec(
        architecture=type(model.model).__name__,
        model_type=str(config.model_type),
        num_layers=model.num_layers,
        hidden_size=hidden,
        intermediate_size=_intermediate_size(text, hidden),
        num_heads=int(text.num_attention_heads),
        vocab_size=int(text.vocab_size),
        max_positions=_max_positions(text),
        experts_per_token=int(getattr(text, "num_experts_per_tok", None) or 0),
        query_width=int(text.num_attention_heads) * _head_width(text),
        plain_scores=(
            getattr(text, "attn_logit_softcapping", None) is None
            and not any("sinks" in name for name in tensors)
        ),
        kv_widths=kv_widths(config),
        tensors=tensors,
        stages=tuple(tuple(names) for names in model.stage_tensors),
        dtype=max(set(floating), key=floating.count) if floating else _dtype_name(compute_dtype),
        compute_dtype=_dtype_name(compute_dtype),
        digest=origin.digest,
        weights=origin.kind,
        path=origin.path,
    )


def _describe_tensors(model: LayeredModel, origin: Origin) -> dict[str, TensorSpec]:
    state = model.model.state_dict()
    tensors: dict[str, TensorSpec] = {}
    for stage, names in enumerate(model.stage_tensors):
        in_layer = 0 < stage <= model.num_layers
        for name in names:
            if name in tensors:  # tied, and described in an earlier stage
                continue
            shape = tuple(state[name].shape)
            is_matrix = len(shape) > 1 and name.endswith(("weight", "_proj", "_experts"))
            tensors[name] = TensorSpec(
                name=name,
                shape=shape,
                dtype=_dtype_name(origin.dtypes.get(name, state[name].dtype)),
                compressible=in_layer and is_matrix,
                fused=model.computes_packed(name),
                transposed=model.is_transposed(name),
                table=stage == 0 and model.is_table(name),
                in_file=name in origin.in_files,
                packed=origin.packed.get(name),
            )
    return tensors


def _is_latent(text: Any) -> bool:
    return bool(getattr(text, "kv_lora_rank", None) and getattr(text, "qk_nope_head_dim", None))


def _head_width(text: Any) -> int:
    """Of a query, and of a key as it is cached."""
    if _is_latent(text):
        return int(text.qk_nope_head_dim) + int(text.qk_rope_head_dim)
    return int(getattr(text, "head_dim", None) or text.hidden_size // int(text.num_attention_heads))


def _max_positions(text: Any) -> int | None:
    """Most tokens of a sequence.

    Where rotary frequencies change with the longest sequence of a *batch* (longrope, dynamic), answers
    would depend on their neighbours beyond the original window; the window ends there.
    """
    limits = [getattr(text, "max_position_embeddings", None)]
    rope = getattr(text, "rope_parameters", None) or {}
    for parameters in [rope, *(value for value in rope.values() if isinstance(value, dict))]:
        if parameters.get("rope_type") in ("longrope", "dynamic"):
            limits.append(parameters.get("original_max_position_embeddings"))
            limits.append(getattr(text, "original_max_position_embeddings", None))
    return min((int(limit) for limit in limits if limit), default=None)


def _intermediate_size(text: Any, hidden: int) -> int:
    """Widest inner row of one token: of the MLP, or of all experts that a token visits."""
    given = (getattr(text, key, None) for key in ("intermediate_size", "ffn_dim", "n_inner"))
    dense = next(filter(None, given), 4 * hidden)
    experts = int(getattr(text, "num_experts_per_tok", None) or 0)
    return max(int(dense), experts * int(getattr(text, "moe_intermediate_size", None) or dense))


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
