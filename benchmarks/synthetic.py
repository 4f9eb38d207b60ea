"""Synthetic OPT and Llama checkpoints: real files in the published shapes, with random numbers for weights.

Random weights are as fast as trained ones; their answers mean nothing.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch
from accelerate import init_empty_weights
from transformers import AutoModelForCausalLM, LlamaConfig, OPTConfig

from engine.memory.store.pieces import VARIABLE

_TILE = 1 << 24  # random values, repeated throughout the checkpoint
_PIECE = 64 << 20
VOCABULARY = 50_272
SHAPES = {
    "125m": (12, 768, 12),
    "350m": (24, 1024, 16),
    "1.3b": (24, 2048, 32),
    "2.7b": (32, 2560, 32),
    "6.7b": (32, 4096, 32),
    "13b": (40, 5120, 40),
    "30b": (48, 7168, 56),
    "66b": (64, 9216, 72),
    "175b": (96, 12288, 96),
}
"""Layers, hidden size and heads of the OPT models (Zhang et al. 2022, table 1)."""

LLAMA_SHAPES = {
    "llama-tiny": (2, 64, 4, 2, 128, 1024),
    "llama-134m": (12, 768, 12, 12, 2048, 32_000),
    "llama-1.1b": (22, 2048, 32, 4, 5632, 32_000),
}
"""Layers, hidden size, heads, KV heads, inner size and vocabulary; the last one is TinyLlama's."""

TINY = "tiny"
"""A shape for trying the scripts; its figures mean nothing."""


def config_of(shape: str, layers: int | None = None) -> OPTConfig | LlamaConfig:
    """The config of an OPT of a published size or of a Llama; with ``layers`` of its first layers only."""
    if shape in LLAMA_SHAPES:
        depth, hidden, heads, kv_heads, inner, vocabulary = LLAMA_SHAPES[shape]
        return LlamaConfig(
            num_hidden_layers=layers or depth, hidden_size=hidden, intermediate_size=inner,
            num_attention_heads=heads, num_key_value_heads=kv_heads, vocab_size=vocabulary, dtype="float16",
            max_position_embeddings=2048, architectures=["LlamaForCausalLM"], tie_word_embeddings=False,
        )  # fmt: skip
    depth, hidden, heads = (2, 64, 4) if shape == TINY else SHAPES[shape]
    return OPTConfig(
        num_hidden_layers=layers or depth, hidden_size=hidden, ffn_dim=4 * hidden, num_attention_heads=heads,
        word_embed_proj_dim=hidden, vocab_size=1024 if shape == TINY else VOCABULARY, dtype="float16",
        max_position_embeddings=2048, architectures=["OPTForCausalLM"],
    )  # fmt: skip


def checkpoint(parent: Path, shape: str, layers: int | None = None, seed: int = 0) -> Path:
    """A folder with ``config.json`` and float16 ``model.safetensors``, written if it does not exist.

    The weights are streamed to the file, and synced, so that their pages can be dropped.
    """
    name = shape if shape in LLAMA_SHAPES else f"opt-{shape}"
    folder = parent / (f"{name}-{layers}-layers" if layers else name)
    file = folder / "model.safetensors"
    if file.exists():
        return folder
    config = config_of(shape, layers)
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(folder)
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(config)
    tied = set(getattr(model, "all_tied_weights_keys", {}))
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items() if name not in tied}
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, size in shapes.items():
        count = 2 * torch.Size(size).numel()
        header[name] = {"dtype": "F16", "shape": list(size), "data_offsets": [at, at + count]}
        at += count
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    generator = torch.Generator().manual_seed(seed)
    numbers = (torch.randn(_TILE, generator=generator) * 0.02).half().numpy().tobytes()
    ones = torch.ones(1 << 16, dtype=torch.float16).numpy().tobytes()
    partial = folder / "model.safetensors.partial"
    with partial.open("wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        place = 0
        for name, size in shapes.items():
            left = 2 * torch.Size(size).numel()
            tile = ones if name.endswith("norm.weight") else numbers
            while left:
                place %= len(tile)
                piece = tile[place : place + min(left, _PIECE)]
                out.write(piece)
                left -= len(piece)
                place += len(piece)
        out.flush()
        os.fsync(out.fileno())
    partial.rename(file)
    return folder


def own_store(work: Path) -> Path:
    """Use a packed store of the benchmark's own, whose pages can be dropped; returns its folder."""
    store = work.resolve() / "store"
    os.environ[VARIABLE] = str(store)
    return store


def prompts(count: int, tokens: int, vocabulary: int, seed: int = 0) -> list[tuple[int, ...]]:
    """Random prompts of one length, without the first ids, which mark ends and padding."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(4, vocabulary, (count, tokens), generator=generator)
    return [tuple(row) for row in ids.tolist()]
