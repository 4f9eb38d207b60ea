"""Writes checkpoints of GPTQ and AWQ by definition, number by number, says what they mean, and loads them."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from engine.kernels.calls import PackedMatrix
from engine.kernels.reference import unpack
from engine.models.adapter import LayeredModel
from engine.models.checkpoint import Checkpoint, load_config
from engine.spec.quant import QuantSpec

GPTQ: dict[str, Any] = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": False, "desc_act": False}
AWQ: dict[str, Any] = {
    "quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm",
}  # fmt: skip
"""Each a ``quantization_config``."""

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""The outputs that AWQ puts into a word, from its lowest bits up."""

Integers = NDArray[np.int64]


@dataclass(frozen=True)
class Rounded:
    """A weight [out, in] as integers; groups are runs of inputs, the last one may be shorter."""

    codes: Integers
    """[out, in]."""

    zeros: Integers
    """[out, groups]."""

    scales: NDArray[np.float16]
    """[out, groups]."""

    group: int

    def values(self) -> Tensor:
        """(code - zero) * scale in float32, where nothing is rounded: 11 bits times at most 9."""
        of_input = np.arange(self.codes.shape[1]) // self.group
        exact = (self.codes - self.zeros[:, of_input]) * self.scales[:, of_input].astype(np.float64)
        values = exact.astype(np.float32)
        assert np.array_equal(values, exact)
        return torch.from_numpy(values)


def round_weight(weight: Tensor, bits: int, group_size: int, symmetric: bool) -> Rounded:
    """Round [out, in] to the nearest, in float64; ``group_size`` -1 for one group of all inputs."""
    matrix = weight.double().numpy()
    width = matrix.shape[1]
    group = width if group_size == -1 else group_size
    top = 2**bits - 1
    codes, zeros, scales = [], [], []
    for start in range(0, width, group):
        part = matrix[:, start : start + group]
        low, high = np.minimum(part.min(1), 0), np.maximum(part.max(1), 0)
        if symmetric:
            high = np.maximum(-low, high)
            low = -high
        scale = ((high - low) / top + 1e-4).astype(np.float16)
        exact = scale.astype(np.float64)
        zero = np.full(len(part), (top + 1) // 2) if symmetric else np.clip(np.rint(-low / exact), 0, top)
        codes.append(np.clip(np.rint(part / exact[:, None]) + zero[:, None], 0, top))
        zeros.append(zero)
        scales.append(scale)
    return Rounded(
        np.concatenate(codes, axis=1).astype(np.int64),
        np.stack(zeros, axis=1).astype(np.int64),
        np.stack(scales, axis=1),
        group,
    )


def words_of(numbers: Integers, bits: int, order: Collection[int] | None = None) -> Integers:
    """Pack each row [A, B] into words of 32 bits [A, B * bits / 32], the first number of ``order`` lowest."""
    count = 32 // bits
    words = np.zeros((numbers.shape[0], numbers.shape[1] // count), dtype=np.int64)
    for row, column in np.ndindex(*words.shape):
        for place, number in enumerate(order or range(count)):
            words[row, column] |= int(numbers[row, column * count + number]) << (place * bits)
    return words


def as_int32(words: Integers) -> Tensor:
    """Words from 0 to 2**32 - 1, or below 0 where something was subtracted, as their 32 bits."""
    return torch.from_numpy(np.mod(words, 2**32).astype(np.uint32).view(np.int32).copy())


def gptq_tensors(rounded: Rounded, bits: int, version: int = 1) -> dict[str, Tensor]:
    """The four tensors of GPTQ; version 1 subtracts a one in every number of the packed zero points."""
    zeros = words_of(rounded.zeros.T, bits)
    if version == 1:
        zeros = zeros - sum(1 << low for low in range(0, 32, bits))
    return {
        "qweight": as_int32(words_of(rounded.codes, bits).T),
        "qzeros": as_int32(zeros),
        "scales": torch.from_numpy(rounded.scales.T.copy()),
        "g_idx": torch.arange(rounded.codes.shape[1], dtype=torch.int32) // rounded.group,
    }


def awq_tensors(rounded: Rounded) -> dict[str, Tensor]:
    """The three tensors of AWQ in its version ``gemm``."""
    return {
        "qweight": as_int32(words_of(rounded.codes.T, 4, AWQ_ORDER)),
        "qzeros": as_int32(words_of(rounded.zeros.T, 4, AWQ_ORDER)),
        "scales": torch.from_numpy(rounded.scales.T.copy()),
    }


def save_quantised(
    model: Any, folder: Path, settings: dict[str, Any], left_out: Callable[[str], bool] = lambda name: False
) -> dict[str, Tensor]:
    """Save a model with the matrices of its layers quantised as ``settings`` (``quantization_config``) say.

    Args:
        left_out: whether a module of this name keeps its weight, as ``modules_to_not_convert`` says.

    Returns:
        What each quantised weight means, in float32 and in the model's own shape, by name.
    """
    model.save_pretrained(folder)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for alias in getattr(model, "all_tied_weights_keys", {}):
        state.pop(alias, None)
    meanings = {}
    for name, module in model.named_modules():
        if not isinstance(module, (nn.Linear, Conv1D)) or name == "lm_head" or left_out(name):
            continue
        turned = isinstance(module, Conv1D)
        weight = state.pop(f"{name}.weight")
        bits = settings["bits"]
        rounded = round_weight(
            weight.T if turned else weight, bits, settings["group_size"], settings.get("sym", False)
        )
        if settings["quant_method"] == "gptq":
            parts = gptq_tensors(rounded, bits, 2 if settings.get("checkpoint_format") == "gptq_v2" else 1)
        else:
            parts = awq_tensors(rounded)
        state |= {f"{name}.{part}": tensor.contiguous() for part, tensor in parts.items()}
        meanings[f"{name}.weight"] = rounded.values().T if turned else rounded.values()
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    set_config(folder, settings)
    return meanings


def edit(folder: Path, tensors: Mapping[str, Tensor | None] | None = None, **settings: Any) -> None:
    """Put in or (with None) take away tensors of a checkpoint; change its ``quantization_config``."""
    state: dict[str, Tensor | None] = {**load_file(folder / "model.safetensors"), **(tensors or {})}
    kept = {name: tensor.contiguous() for name, tensor in state.items() if tensor is not None}
    save_file(kept, folder / "model.safetensors", {"format": "pt"})
    content = json.loads((folder / "config.json").read_text())
    set_config(folder, content.get("quantization_config", {}) | settings)


def set_config(folder: Path, settings: dict[str, Any] | None) -> None:
    """Exchange the ``quantization_config``, or take it away."""
    content = json.loads((folder / "config.json").read_text())
    content.pop("quantization_config", None)
    added = {} if settings is None else {"quantization_config": settings}
    (folder / "config.json").write_text(json.dumps(content | added))


def load(folder: Path) -> tuple[dict[str, Tensor | PackedMatrix], dict[str, QuantSpec]]:
    """Everything that a folder streams, and the formats that it announces."""
    config = load_config(str(folder), folder)
    assert not hasattr(config, "quantization_config")
    model = LayeredModel.empty(config, torch.float32)
    checkpoint = Checkpoint(folder)
    if not checkpoint.ties_hold(model):
        config.tie_word_embeddings = False
        model = LayeredModel.empty(config, torch.float32)
    dtypes = checkpoint.dtypes(model)
    assert dtypes.keys() == {name for names in model.stage_tensors for name in names}
    formats = checkpoint.packed_formats(model)
    assert all(dtype.is_floating_point for dtype in dtypes.values())
    return dict(checkpoint.stream(model)), formats


def unpacked(matrix: Any) -> Tensor:
    """What a packed matrix means, [rows, width] in float32."""
    assert isinstance(matrix, PackedMatrix)
    return unpack(matrix.data, matrix.spec, torch.empty(matrix.rows, matrix.width))
