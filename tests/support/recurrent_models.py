"""Tiny random models with recurrent layers of every kind that `transformers` caches, and their answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, PretrainedConfig

from tests.support.engine_models import Family, tiny_model

_COMMON: dict[str, Any] = {
    "vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 256, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_EXPERTS: dict[str, Any] = {
    "moe_intermediate_size": 48, "shared_expert_intermediate_size": 48, "num_experts": 4,
    "num_experts_per_tok": 2,
}  # fmt: skip
_DELTA: dict[str, Any] = {
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16,
    "linear_value_head_dim": 16, "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "num_hidden_layers": 3,
}  # fmt: skip
_MAMBA_2: dict[str, Any] = {
    "mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 16, "mamba_n_groups": 1, "mamba_chunk_size": 16,
}  # fmt: skip

CONFIGS: dict[str, dict[str, Any]] = {
    "qwen3_next": {**_COMMON, **_EXPERTS, **_DELTA},
    "qwen3_5_text": {**_COMMON, **_DELTA},
    "qwen3_5_moe_text": {**_COMMON, **_EXPERTS, **_DELTA},
    "mamba": {**_COMMON, "state_size": 16, "num_hidden_layers": 2, "time_step_rank": 4},
    "mamba2": {
        **_COMMON, "num_heads": 8, "head_dim": 16, "state_size": 16, "n_groups": 2, "chunk_size": 16,
        "num_hidden_layers": 2,
    },
    "falcon_mamba": {**_COMMON, "state_size": 16, "num_hidden_layers": 2, "time_step_rank": 4},
    "falcon_h1": {**_COMMON, **_MAMBA_2, "mamba_d_ssm": 128, "num_hidden_layers": 2},
    "jamba": {
        **_COMMON, "mamba_d_state": 16, "mamba_dt_rank": 4, "num_hidden_layers": 4, "attn_layer_offset": 1,
        "attn_layer_period": 2, "expert_layer_period": 2, "expert_layer_offset": 1, "num_experts": 4,
    },
    "granitemoehybrid": {
        **_COMMON, **_MAMBA_2, "layer_types": ["mamba", "attention", "mamba"], "num_hidden_layers": 3,
        "num_local_experts": 4, "num_experts_per_tok": 2, "shared_intermediate_size": 48,
    },
    "bamba": {**_COMMON, **_MAMBA_2, "attn_layer_indices": [1], "num_hidden_layers": 3},
    "zamba2": {
        **_COMMON, "n_mamba_heads": 8, "mamba_headdim": 16, "mamba_ngroups": 1, "mamba_d_state": 16,
        "attention_hidden_size": 128, "attention_head_dim": 32, "num_key_value_heads": 4,
        "num_hidden_layers": 4,
        "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"], "num_mem_blocks": 1, "chunk_size": 16,
        "adapter_rank": 4,
    },
    "nemotron_h": {
        **_COMMON, "mamba_num_heads": 8, "mamba_head_dim": 16, "ssm_state_size": 16, "n_groups": 1,
        "chunk_size": 16, "layers_block_type": ["mamba", "attention", "mamba", "mlp"], "num_hidden_layers": 4,
    },
    "lfm2": {**_COMMON, "layer_types": ["conv", "full_attention", "conv"], "num_hidden_layers": 3},
    "lfm2_moe": {
        **_COMMON, **_EXPERTS, "layer_types": ["conv", "conv", "full_attention", "conv"],
        "num_hidden_layers": 4, "num_dense_layers": 1,
    },
    "recurrent_gemma": {
        **_COMMON, "lru_width": 64, "attention_window_size": 8, "num_hidden_layers": 3,
        "block_types": ["recurrent", "recurrent", "attention"],
    },
    "kimi_linear": {
        **_COMMON, "num_key_value_heads": 4, "moe_intermediate_size": 48, "num_local_experts": 4,
        "num_experts_per_tok": 2, "kv_lora_rank": 32, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16,
        "v_head_dim": 8, "linear_head_dim": 16, "linear_num_heads": 4, "num_hidden_layers": 3,
        "layer_types": ["linear_attention", "full_attention", "linear_attention"],
        "mlp_layer_types": ["dense", "sparse", "sparse"],
    },
    "olmo_hybrid": {**_COMMON, **_DELTA},
    "minimax": {
        **_COMMON, "num_local_experts": 4, "num_experts_per_tok": 2, "block_size": 16, "num_hidden_layers": 3,
        "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    },
}  # fmt: skip
"""Model type -> fields of a config."""


def recurrent_config(name: str, **changes: Any) -> PretrainedConfig:
    """The config of a tiny model with recurrent layers."""
    return CONFIG_MAPPING[name](**{**CONFIGS[name], **changes})


def recurrent_family(name: str, folder: Path) -> Family:
    """Build a tiny model with recurrent layers and save it with `save_pretrained`."""
    model = tiny_model(recurrent_config(name))
    generator = torch.Generator().manual_seed(5)
    for parameter in model.parameters():
        if parameter.dim() == 1:  # decays, time steps and biases that differ from head to head
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(folder)
    return Family(name, folder, model)
