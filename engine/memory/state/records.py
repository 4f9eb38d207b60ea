"""One layer's state of several sequences as bytes, and as the tensors that are computed with.

Axes: n records, S of them.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from engine.kernels.calls import StateKey
from engine.spec.model import StateTensor
from engine.spec.state_layout import SCALE_BYTES, Kept, StateLayer

States = dict[StateKey, Tensor]
"""The states of one module, [S, ...] each."""

_LARGEST = 127
"""Largest magnitude of an integer of 8 bits that stands for a value."""


def views(records: Tensor, layer: StateLayer, module: int) -> States:
    """A module's states [S, ...] in records uint8 [S, bytes], which are kept as they are computed."""
    return {key: _typed(part, tensor) for key, tensor, part in _parts(records, layer, module)}


def copies(records: Tensor, layer: StateLayer, module: int) -> States:
    """A module's states [S, ...], unpacked from records uint8 [S, bytes]."""
    found: States = {}
    for key, tensor, part in _parts(records, layer, module):
        match layer.kept(tensor):
            case Kept.EXACT:
                found[key] = _typed(part, tensor).clone()
            case Kept.BFLOAT16:
                rounded = part.contiguous().view(torch.bfloat16).unflatten(1, tensor.shape)
                found[key] = rounded.to(getattr(torch, tensor.dtype))
            case Kept.INT8:
                codes, scales = _coded(part, tensor)
                values = codes.float().mul_(scales)
                found[key] = values.view(len(part), *tensor.shape).to(getattr(torch, tensor.dtype))
    return found


def empty(count: int, layer: StateLayer, module: int, device: torch.device) -> States:
    """Room for a module's states of ``count`` sequences."""
    return {
        (tensor.kind, tensor.index): torch.empty(
            (count, *tensor.shape), dtype=getattr(torch, tensor.dtype), device=device
        )
        for tensor in layer.tensors
        if tensor.module == module
    }


def keep(states: States, records: Tensor, layer: StateLayer, module: int) -> None:
    """Pack a module's states [S, ...] into records uint8 [S, bytes]."""
    for key, tensor, part in _parts(records, layer, module):
        state = states[key]
        match layer.kept(tensor):
            case Kept.EXACT:
                _typed(part, tensor).copy_(state)
            case Kept.BFLOAT16:
                part.copy_(state.to(torch.bfloat16).flatten(1).view(torch.uint8))
            case Kept.INT8:
                rows = state.float().reshape(len(part), -1, tensor.shape[-1])
                scales = rows.abs().amax(-1, keepdim=True).div_(_LARGEST)
                codes = (rows / scales.clamp_min(torch.finfo(torch.float32).tiny)).round_()
                part[:, : tensor.numel] = codes.to(torch.int8).flatten(1).view(torch.uint8)
                part[:, tensor.numel :] = scales.flatten(1).view(torch.uint8)


def _parts(records: Tensor, layer: StateLayer, module: int) -> Iterator[tuple[StateKey, StateTensor, Tensor]]:
    """The bytes [S, n] of every state of a module."""
    for tensor, begin in zip(layer.tensors, layer.begins, strict=False):
        if tensor.module == module:
            yield (tensor.kind, tensor.index), tensor, records[:, begin : begin + layer.nbytes_of(tensor)]


def _typed(part: Tensor, tensor: StateTensor) -> Tensor:
    """Bytes [S, n] of a state that is kept as it is computed, as its numbers [S, ...]."""
    return part.view(getattr(torch, tensor.dtype)).unflatten(1, tensor.shape)


def _coded(part: Tensor, tensor: StateTensor) -> tuple[Tensor, Tensor]:
    """Codes int8 [S, rows, width] and scales float32 [S, rows, 1] in bytes [S, n] of 8 bits per value."""
    whole = part.contiguous()
    codes = whole[:, : tensor.numel].contiguous().view(torch.int8)
    scales = whole[:, tensor.numel :].contiguous().view(torch.float32)
    assert scales.shape[1] * SCALE_BYTES == whole.shape[1] - tensor.numel
    return codes.view(len(part), -1, tensor.shape[-1]), scales.unsqueeze(-1)
