"""Which families of the installed `transformers` the engine answers, found by trying; and what a model is.

A family is a config type for which `transformers` has a causal language model or a wrapper of several
modalities. Its default config is tried by the architecture check, as a model from a folder would be.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from transformers import CONFIG_MAPPING, PretrainedConfig
from transformers.models.auto import modeling_auto

from engine.errors import UnsupportedModelError, printable
from engine.models.decoder.parts import text_config
from engine.models.twin import check_architecture
from engine.spec.model import ModelSpec

_MAPPINGS = (
    "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES",
    "MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES",
    "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
)
"""Wrappers first: their checkpoints name them, though some have a causal language model, too."""

_ENCODERS = (
    "bert", "bert-generation", "big_bird", "camembert", "data2vec-text", "electra", "ernie", "megatron-bert",
    "rembert", "roberta", "roberta-prelayernorm", "roc_bert", "roformer", "xlm-roberta", "xlm-roberta-xl",
    "xmod",
)  # fmt: skip
"""Encoders, which are causal language models only with a switch."""

_ON_THREE_AXES = (
    "qwen2_vl", "qwen2_5_vl", "qwen2_5_omni_thinker", "qwen2_5_omni", "glm4v", "glm46v", "glm_ocr",
    "paddleocr_vl",
)  # fmt: skip
_THREE_AXES = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [16, 24, 24]}
_HALF_ROTARY = {
    "rope_type": "default", "rope_theta": 10000.0, "mrope_section": [8, 12, 12], "partial_rotary_factor": 0.5
}  # fmt: skip

_GIVEN: Mapping[str, Mapping[str, Any]] = {
    **{name: {"is_decoder": True} for name in _ENCODERS},
    "deepseek_v2": {"n_routed_experts": 64, "num_experts_per_tok": 6, "n_shared_experts": 2},
    "dots1": {"n_routed_experts": 64, "num_experts_per_tok": 6, "n_shared_experts": 2},
    "hunyuan_v1_dense": {"head_dim": 128},
    "hunyuan_v1_moe": {"head_dim": 128},
    "ministral": {"head_dim": 128},
    "nemotron": {"head_dim": 128},
    "whisper": {"d_model": 384},
    **{name: {"text_config": {"rope_parameters": _HALF_ROTARY}} for name in ("glm4v_moe", "glmga")},
    **{name: {"text_config": {"rope_parameters": _THREE_AXES}} for name in _ON_THREE_AXES},
}  # fmt: skip
"""What checkpoints of a family say and its default config lacks, by config type."""


@dataclass(frozen=True)
class Family:
    """A config type, and what became of its default config."""

    model_type: str
    architecture: str
    is_wrapper: bool
    """Whether the text decoder is one part of several."""

    verdict: str
    """``equal``, ``refused``, ``failed`` where it could not be tried to the end, or ``no config`` where the
    defaults of transformers do not fit together."""

    detail: str
    """How attention runs, or the reason."""

    seconds: float
    """Of the architecture check."""


def family_types() -> list[str]:
    """All config types, in the order of the alphabet."""
    names = {name for mapping in _MAPPINGS for name in getattr(modeling_auto, mapping)}
    return sorted(name for name in names if name in CONFIG_MAPPING)


def class_of(model_type: str) -> str:
    """The class of a config type in transformers."""
    for mapping in _MAPPINGS:
        found = getattr(modeling_auto, mapping).get(model_type)
        if found:
            return str(found if isinstance(found, str) else found[0])
    return model_type


def default_config(model_type: str) -> PretrainedConfig:
    """The default config of a type, with what it lacks.

    Raises:
        Exception: whatever transformers raises where the defaults do not fit together.
    """
    return CONFIG_MAPPING[model_type](architectures=[class_of(model_type)], **_GIVEN.get(model_type, {}))


def try_family(model_type: str) -> Family:
    """Try one."""
    name, begin = class_of(model_type), time.perf_counter()
    try:
        config = default_config(model_type)
        is_wrapper = text_config(config) is not config
    except Exception as error:
        return Family(model_type, name, False, "no config", _one_line(error), 0.0)
    try:
        verdict, detail = "equal", check_architecture(config).value
    except UnsupportedModelError as error:
        reason = str(error).split(" is refused: ", 1)[-1]
        verdict, detail = "refused", reason.removesuffix("; run it with transformers itself")
    except Exception as error:  # one that needs more memory than there is must not end the table
        verdict, detail = "failed", _one_line(error)
    return Family(model_type, name, is_wrapper, verdict, detail, time.perf_counter() - begin)


def _one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {printable(str(error))[:160]}"


@dataclass(frozen=True)
class LayerKind:
    """Layers of one kind."""

    what: str
    """What they do, for instance ``attention, experts``."""

    count: int
    key_values: int
    """Values of keys and values that one token adds."""

    weight_bytes: int
    """Of the largest of them, as the checkpoint keeps it."""


def layer_kinds(spec: ModelSpec) -> list[LayerKind]:
    """The layers of a model by kind, in order of first appearance."""
    found: Counter[tuple[str, int]] = Counter()
    largest: dict[tuple[str, int], int] = {}
    for index, (keys, values) in enumerate(spec.kv_widths):
        tensors = [spec.tensors[name] for name in spec.stages[index + 1]]
        parts = ["attention"] if keys + values else []
        if spec.states and spec.states[index]:
            parts.append("state")
        if any("experts" in tensor.name for tensor in tensors):
            parts.append("experts")
        kind = ", ".join(parts) or "no attention", keys + values
        found[kind] += 1
        largest[kind] = max(largest.get(kind, 0), sum(tensor.nbytes for tensor in tensors))
    return [LayerKind(what, count, width, largest[what, width]) for (what, width), count in found.items()]
