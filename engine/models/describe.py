"""From a `transformers` config and an empty model to the `ModelSpec` that planning needs."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PretrainedConfig

from engine.models.adapter import LayeredModel
from engine.models.decoder.parts import text_config
from engine.models.decoder.ways import Way
from engine.models.recurrent.mixers import mixer_workspace
from engine.spec.model import ModelSpec, TensorSpec
from engine.spec.quant import QuantSpec

_EXPERTS_PER_TOKEN = (
    "num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_top_k", "moe_k", "top_k_experts"
)  # fmt: skip
"""Names of the number of experts that a token visits."""


@dataclass(frozen=True)
class Origin:
    """Where a model's weights come from, and how they are kept there."""

    path: str
    kind: str
    """``trained`` or ``random``."""

    identify: Callable[[], str]
    """Finds the digest of config and weights."""

    dtypes: Mapping[str, torch.dtype]
    """The checkpoint's own number format per tensor name."""

    packed: Mapping[str, QuantSpec]
    """Formats of the tensors that the checkpoint itself keeps packed."""

    in_files: Collection[str]
    """Names of those that its files hold byte by byte as the model takes them."""

    left_out: Mapping[str, int] = field(default_factory=dict)
    """How many tensors of its files text does not need, by the first parts of their names."""


def describe(
    config: PretrainedConfig, model: LayeredModel, compute_dtype: torch.dtype, origin: Origin
) -> ModelSpec:
    """Build the spec of an empty model."""
    text = text_config(config)
    tensors = _describe_tensors(model, origin)
    floating = [tensor.dtype for tensor in tensors.values() if len(tensor.shape) > 1]
    hidden, shapes = model.measured.hidden, [shape for shape in model.measured.shapes if shape]
    return ModelSpec(
        architecture=type(model.model).__name__,
        model_type=str(config.model_type),
        num_layers=model.num_layers,
        hidden_size=hidden,
        intermediate_size=_intermediate_size(text, hidden),
        num_heads=max((shape.heads for shape in shapes), default=1),
        vocab_size=number(text, "vocab_size"),
        max_positions=_max_positions(text),
        experts_per_token=number(text, *_EXPERTS_PER_TOKEN),
        query_width=max((shape.heads * shape.key_width for shape in shapes), default=hidden),
        own_attention=model.way is not Way.PACKED,
        plain_scores=(
            model.way is Way.PACKED
            and getattr(text, "attn_logit_softcapping", None) is None
            and not any("sinks" in name for name in tensors)
        ),
        kv_widths=kv_widths(model),
        tensors=tensors,
        stages=tuple(tuple(names) for names in model.stage_tensors),
        dtype=max(set(floating), key=floating.count) if floating else _dtype_name(compute_dtype),
        compute_dtype=_dtype_name(compute_dtype),
        identify=origin.identify,
        weights=origin.kind,
        path=origin.path,
        left_out=origin.left_out,
        states=model.states if any(model.states) else (),
        state_workspace=mixer_workspace(model.layers, hidden, model.state_count)
        if any(model.states)
        else (0, 0),
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


def kv_widths(model: LayeredModel) -> tuple[tuple[int, int], ...]:
    """Values per token of each layer's keys and values; none of a layer without attention."""
    return tuple((shape.keys, shape.values) if shape else (0, 0) for shape in model.measured.shapes)


def number(text: Any, *names: str) -> int:
    """The largest number that a config gives under the first of some names that it has; 0 for none."""
    for name in names:
        try:
            value = getattr(text, name, None)
        except AttributeError:  # one that differs between layers
            continue
        values: list[Any] = [part for part in value if part] if isinstance(value, (list, tuple)) else [value]
        if values and all(isinstance(part, (int, float)) for part in values):
            return int(max(values))
    return 0


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
    dense = number(text, "intermediate_size", "ffn_dim", "n_inner", "decoder_ffn_dim") or 4 * hidden
    experts = number(text, *_EXPERTS_PER_TOKEN)
    return max(dense, experts * (number(text, "moe_intermediate_size") or dense))


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
