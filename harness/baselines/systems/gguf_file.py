"""Writes a checkpoint of the Llama family as GGUF, llama.cpp's file format, from the same safetensors.

It knows names and shapes of tensors. No tokenizer is written, since only token ids are exchanged. It needs
the packages gguf and numpy of llama.cpp's environment, and refuses what it cannot convert exactly.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from harness.baselines.base import Unsupported

ARCHITECTURES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "llama",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}

_OUTER = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
_LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def write(model: Path, out: Path, dtype: str) -> None:
    """Write one file with matrices as f32 or f16 and vectors as f32.

    Raises:
        Unsupported: for an unknown architecture, position encoding or tensor.
    """
    import gguf
    import numpy as np

    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    name = (config.get("architectures") or ["?"])[0]
    if name not in ARCHITECTURES:
        raise Unsupported(
            f"this conversion to GGUF does not know {name}: it knows {', '.join(ARCHITECTURES)}"
        )
    architecture = ARCHITECTURES[name]
    writer = gguf.GGUFWriter(str(out), architecture, use_temp_file=False)
    heads = config["num_attention_heads"]
    kv_heads = config.get("num_key_value_heads") or heads
    head = config.get("head_dim") or config["hidden_size"] // heads
    rope = {**config, **(config.get("rope_parameters") or {})}
    scaling = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if scaling.get("rope_type", scaling.get("type", "default")) != "default":
        raise Unsupported("this conversion to GGUF supports plain rotary positions only, not scaled ones")
    if config.get("mlp_bias") or (config.get("attention_bias") and architecture == "llama"):
        raise Unsupported("this conversion to GGUF supports Llama without biases only")
    writer.add_name(model.name)
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("none")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_rope_dimension_count(head)
    writer.add_rope_freq_base(float(rope.get("rope_theta", 10000.0)))
    writer.add_layer_norm_rms_eps(float(config["rms_norm_eps"]))
    writer.add_file_type({"f32": 0, "f16": 1}[dtype])
    tied = bool(config.get("tie_word_embeddings"))
    for source, values in _tensors(model):
        if tied and source == "lm_head.weight":
            continue
        if architecture == "llama" and source.endswith(("q_proj.weight", "k_proj.weight")):
            values = interleaved(values, heads if "q_proj" in source else kv_heads)
        wide = values.ndim == 1 or dtype == "f32"
        writer.add_tensor(translated(source), values.astype(np.float32 if wide else np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def interleaved(values: Any, heads: int) -> Any:
    """A query or key projection [heads * head_dim, ...] with its rows in the order of llama.cpp's rotation.

    A checkpoint rotates row i of a head with row i + head_dim / 2; llama.cpp's "llama" rotates neighbours.
    """
    rows = values.reshape(heads, 2, values.shape[0] // heads // 2, *values.shape[1:])
    return rows.swapaxes(1, 2).reshape(values.shape)


def translated(name: str) -> str:
    """A tensor's name in GGUF; raises Unsupported for an unknown one."""
    if name in _OUTER:
        return _OUTER[name]
    parts = name.split(".")
    if name.startswith("model.layers.") and len(parts) > 4:
        inner, kind = ".".join(parts[3:-1]), parts[-1]
        if inner in _LAYER:
            return f"blk.{parts[2]}.{_LAYER[inner]}.{kind}"
    raise Unsupported(f"the checkpoint holds {name}, which this conversion to GGUF does not know")


def _tensors(model: Path) -> Iterator[tuple[str, Any]]:
    """All tensors by name as numpy arrays; bfloat16, which numpy lacks, as float32."""
    import numpy as np

    kinds: dict[str, Any] = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype("<u2")}
    for file in sorted(model.glob("*.safetensors")):
        with file.open("rb") as stream:
            size = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(size))
        header.pop("__metadata__", None)
        for name, entry in header.items():
            if name.endswith("rotary_emb.inv_freq"):
                continue
            if entry["dtype"] not in kinds:
                raise Unsupported(f"{name} is {entry['dtype']}: this conversion reads F32, F16 and BF16")
            begin, end = entry["data_offsets"]
            kind: Any = kinds[entry["dtype"]]
            values: Any = np.memmap(file, kind, "r", 8 + size + begin, ((end - begin) // kind.itemsize,))
            if entry["dtype"] == "BF16":
                values = (values.astype(np.uint32) << 16).view(np.float32)
            yield name, values.reshape(entry["shape"])
