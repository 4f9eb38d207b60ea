"""Group-wise quantisation of rows: pack, unpack. The plain torch form, and the oracle of faster ones.

Each row is cut into groups of g values; a group becomes 4-bit codes, a scale and a minimum in fp16
(FlexGen paper, section 5): ``x ~ minimum + code * scale``. A packed row is

    codes, group after group: byte b of a group holds value b (low half) and value b + g/2 (high half)
    scales of all groups, fp16
    minima of all groups, fp16

Unlike FlexGen, which stores the inverse of the scale, no group's fp16 scale can become infinite
because the group is narrow.
"""

from __future__ import annotations

import torch
from torch import Tensor

from engine.spec.layout import CONVERT_VALUES
from engine.spec.policy import QuantSpec

_LEVELS = 15


def pack_rows(rows: Tensor, spec: QuantSpec, out: Tensor | None = None) -> Tensor:
    """Quantise [R, n] of any float kind into uint8 [R, spec.row_bytes(n)].

    Raises:
        ValueError: if a value is not finite or a group exceeds the range of fp16.
    """
    count, width = rows.shape
    if out is None:
        out = torch.empty(count, spec.row_bytes(width), dtype=torch.uint8, device=rows.device)
    step = max(1, CONVERT_VALUES // max(width, 1))
    for start in range(0, count, step):
        _pack(rows[start : start + step].float(), spec, out[start : start + step])
    return out


def unpack_rows(packed: Tensor, spec: QuantSpec, out: Tensor) -> Tensor:
    """Restore uint8 [R, spec.row_bytes(n)] into ``out`` [R, n], rounded to its kind of number."""
    count, width = out.shape
    step = max(1, CONVERT_VALUES // max(width, 1))
    for start in range(0, count, step):
        _unpack(packed[start : start + step], spec, out[start : start + step])
    return out


def _pack(rows: Tensor, spec: QuantSpec, out: Tensor) -> None:
    count, width = rows.shape
    groups, size = spec.groups(width), spec.group_size
    if groups * size > width:  # pad with the row's own last value, which widens no group
        rows = torch.cat([rows, rows[:, -1:].expand(-1, groups * size - width)], dim=1)
    grouped = rows.view(count, groups, size)
    low, high = grouped.amin(-1), grouped.amax(-1)
    minima = low.half()
    scales = ((high - minima.float()).clamp_min(0) / _LEVELS).half()
    if not bool(torch.isfinite(minima).all() & torch.isfinite(scales).all()):
        raise ValueError("a value is not finite or beyond the range of float16")
    divisor = torch.where(scales > 0, scales.float(), 1.0)
    codes = (
        ((grouped - minima.float()[..., None]) / divisor[..., None])
        .round_()
        .clamp_(0, _LEVELS)
        .to(torch.uint8)
    )
    half = size // 2
    code_bytes = groups * half
    out[:, :code_bytes] = (codes[..., :half] | codes[..., half:] << 4).view(count, code_bytes)
    out[:, code_bytes : code_bytes + 2 * groups] = scales.view(torch.uint8)
    out[:, code_bytes + 2 * groups :] = minima.view(torch.uint8)


def _unpack(packed: Tensor, spec: QuantSpec, out: Tensor) -> None:
    count, width = out.shape
    groups, half = spec.groups(width), spec.group_size // 2
    code_bytes = groups * half
    codes = packed[:, :code_bytes].view(count, groups, half)
    numbers = (
        packed[:, code_bytes:].clone(memory_format=torch.contiguous_format).view(torch.float16).float()
    )  # [R, 2 * groups]
    scales, minima = numbers[:, :groups, None], numbers[:, groups:, None]
    values = torch.empty(count, groups, 2, half, dtype=torch.float32, device=packed.device)
    torch.mul(codes & 15, scales, out=values[:, :, 0])
    torch.mul(codes >> 4, scales, out=values[:, :, 1])
    values.add_(minima[..., None])
    out.copy_(values.view(count, -1)[:, :width])
