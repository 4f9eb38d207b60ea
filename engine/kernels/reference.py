"""Packing and unpacking in plain torch: the definition of every format, and the oracle of faster kernels.

The layout of the bytes is described in `engine.spec.quant`. All functions work on any device.

Axes: R rows, W values of a row, B blocks, N groups of all blocks, g values of a group.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from engine.spec.float_format import FloatSpec, MatrixForm
from engine.spec.kv_format import KVFormat
from engine.spec.layout import CONVERT_VALUES
from engine.spec.quant import PLANES, Along, Fit, Offset, QuantSpec

SHRINKS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.5)
"""Parts of a group's range that `Fit.ERROR` tries."""

_SMALLEST_NORMAL, _SMALLEST_STEP = 2.0**-14, 2.0**-24  # of float16


def pack(values: Tensor, spec: MatrixForm, out: Tensor) -> Tensor:
    """Quantise [R, W] of any float kind into uint8 [B, spec.block_bytes(W)]; returns ``out``.

    Raises:
        ValueError: if a value is not finite or a group exceeds the range of fp16.
    """
    if isinstance(spec, FloatSpec):
        rounded = values.to(getattr(torch, spec.dtype))
        if not bool(torch.isfinite(rounded).all()):
            raise ValueError(f"a value is not finite or beyond the range of {spec.dtype}")
        out[: len(values)] = rounded.view(torch.uint8)
        return out
    for start, stop in row_chunks(values, spec):
        first = start // spec.block_rows
        _pack(values[start:stop].float(), spec, out[first : first + spec.blocks(stop - start)])
    return out


def unpack(packed: Tensor, spec: MatrixForm, out: Tensor) -> Tensor:
    """Restore uint8 [B, spec.block_bytes(W)] into ``out`` [R, W], rounded to its kind of number."""
    if isinstance(spec, FloatSpec):
        return out.copy_(floats(packed[: len(out)], spec))
    for start, stop in row_chunks(out, spec):
        first = start // spec.block_rows
        _unpack(packed[first : first + spec.blocks(stop - start)], spec, out[start:stop])
    return out


def pack_tokens(
    rows: Sequence[Tensor],
    form: KVFormat,
    keys: int,
    values: int,
    targets: Sequence[Tensor],
    pack: Callable[[Tensor, MatrixForm, Tensor], Tensor] = pack,
) -> None:
    """Pack full blocks of tokens of several sequences.

    Args:
        rows: per sequence [T, keys + values], T a multiple of ``form.block_tokens``.
        targets: per sequence uint8, flat, exactly its blocks.

    Raises:
        ValueError: if a value is not finite or a group exceeds the range of fp16.
    """
    size, key_bytes = form.block_bytes(keys, values), form.key_bytes(keys)
    for source, target in zip(rows, targets, strict=True):
        blocks = target.view(-1, size)
        for part, spec, numbers in (
            (blocks[:, :key_bytes], form.keys, source[:, :keys]),
            (blocks[:, key_bytes:], form.values, source[:, keys:]),
        ):
            size_of_part = spec.blocks(len(numbers)), spec.block_bytes(numbers.shape[1])
            part.copy_(pack(numbers, spec, part.new_empty(size_of_part)).view(len(blocks), -1))


def summarise(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Logits [R, V] -> index of the first maximum of each row [R], log-sum-exp float32 [R].

    The log-sum-exp is NaN where one of a row's logits is NaN.
    """
    return logits.argmax(-1), torch.logsumexp(logits.float(), dim=-1)


def floats(packed: Tensor, spec: FloatSpec) -> Tensor:
    """Rows of raw floats, uint8 [R, 2 W], as what they are, [R, W]: a view if they lie at even addresses."""
    if packed.storage_offset() % 2 or packed.stride(0) % 2:
        packed = packed.clone(memory_format=torch.contiguous_format)
    return packed.view(getattr(torch, spec.dtype))


def row_chunks(rows: Tensor, spec: MatrixForm) -> list[tuple[int, int]]:
    """Ranges of rows [R, W], whole blocks few enough at a time to bound the temporaries."""
    count, width = rows.shape
    step = max(1, CONVERT_VALUES // max(width * spec.block_rows, 1)) * spec.block_rows
    return [(start, min(start + step, count)) for start in range(0, count, step)]


def _pack(values: Tensor, spec: QuantSpec, out: Tensor) -> None:
    width = values.shape[1]
    grouped = _to_groups(values, spec)  # [B, groups, g]
    present = _present(values, spec)
    present = None if present is None else present.expand(grouped.shape).reshape(-1, grouped.shape[-1])
    scales, offsets = fit_groups(grouped.reshape(-1, grouped.shape[-1]), spec, present)
    if not bool(torch.isfinite(scales).all() & torch.isfinite(offsets).all()):
        raise ValueError("a value is not finite or beyond the range of float16")
    codes = encode(grouped.reshape(-1, grouped.shape[-1]), scales, offsets, spec).view(grouped.shape)
    blocks, groups = len(out), spec.groups(width)
    end = spec.code_bytes(width)
    out[:, :end] = to_planes(codes, spec)
    out[:, end : end + 2 * groups] = scales.view(blocks, groups).view(torch.uint8)
    if spec.has_offsets:
        out[:, end + 2 * groups :] = offsets.view(blocks, groups).view(torch.uint8)


def _unpack(packed: Tensor, spec: QuantSpec, out: Tensor) -> None:
    count, width = out.shape
    groups, end = spec.groups(width), spec.code_bytes(width)
    numbers = packed[:, end:].clone(memory_format=torch.contiguous_format).view(torch.float16).float()
    scales = numbers[:, :groups, None]
    codes = _from_planes(packed[:, :end], spec, groups, spec.group(width)).float()  # [B, groups, g]
    if spec.offset is Offset.MINIMUM:
        values = codes.mul_(scales).add_(numbers[:, groups:, None])
    elif spec.offset is Offset.ZERO:
        values = codes.sub_(numbers[:, groups:, None]).mul_(scales)
    else:
        values = codes.sub_(2 ** (spec.bits - 1)).mul_(scales)
    if spec.along is Along.COLUMN:
        values = values.transpose(1, 2)
    out.copy_(values.reshape(len(packed) * spec.block_rows, -1)[:count, :width])


def _to_groups(values: Tensor, spec: QuantSpec) -> Tensor:
    """[R, W] -> [B, groups, g]; what a group lacks is filled with its own last value."""
    count, width = values.shape
    if spec.along is Along.COLUMN:
        missing = spec.blocks(count) * spec.block_rows - count
        if missing:
            values = torch.cat([values, values[-1:].expand(missing, -1)])
        return values.view(-1, spec.block_rows, width).transpose(1, 2)
    groups, size = spec.groups(width), spec.group(width)
    if groups * size > width:
        values = torch.cat([values, values[:, -1:].expand(-1, groups * size - width)], dim=1)
    return values.reshape(count, groups, size)


def _present(values: Tensor, spec: QuantSpec) -> Tensor | None:
    """What is no filling, as 1, the rest as 0: expands to [B, groups, g]; None where nothing is filled."""
    count, width = values.shape
    if spec.along is Along.COLUMN:
        held, size, shape = count, spec.block_rows, (-1, 1, spec.block_rows)
    else:
        held, size, shape = width, spec.group(width), (1, -1, spec.group(width))
    if held % size == 0:
        return None
    places = torch.arange(-(-held // size) * size, device=values.device)
    return (places < held).view(shape).float()


def to_planes(codes: Tensor, spec: QuantSpec) -> Tensor:
    """uint8 codes [B, groups, g] -> bytes [B, spec.code_bytes]."""
    blocks, groups, size = codes.shape
    planes = []
    low = 0
    for bits in PLANES[spec.bits]:
        fields = 8 // bits
        parts = ((codes >> low) & (2**bits - 1)).view(blocks, groups, fields, size // fields)
        plane = parts[:, :, 0].clone()
        for field in range(1, fields):
            plane |= parts[:, :, field] << (field * bits)
        planes.append(plane)
        low += bits
    if spec.along is Along.COLUMN:
        return torch.cat([plane.transpose(1, 2).reshape(blocks, -1) for plane in planes], dim=1)
    return torch.cat(planes, dim=2).view(blocks, -1)


def _from_planes(packed: Tensor, spec: QuantSpec, groups: int, size: int) -> Tensor:
    """Bytes [B, spec.code_bytes] -> uint8 codes [B, groups, g]."""
    blocks = len(packed)
    codes = torch.zeros(blocks, groups, size, dtype=torch.uint8, device=packed.device)
    low = start = 0
    for bits in PLANES[spec.bits]:
        fields, count = 8 // bits, size * bits // 8
        if spec.along is Along.COLUMN:
            plane = packed[:, start * groups : (start + count) * groups]
            plane = plane.reshape(blocks, count, groups).transpose(1, 2)
        else:
            plane = packed.reshape(blocks, groups, -1)[:, :, start : start + count]
        parts = codes.view(blocks, groups, fields, count)
        for field in range(fields):
            parts[:, :, field] |= ((plane >> (field * bits)) & (2**bits - 1)) << low
        low += bits
        start += count
    return codes


def encode(groups: Tensor, scales: Tensor, offsets: Tensor, spec: QuantSpec) -> Tensor:
    """The nearest codes, uint8 [N, g], of values [N, g] under fp16 scales and offsets [N]."""
    scale = scales.float()
    divisor = torch.where(scale != 0, scale, 1.0)[:, None]
    if spec.offset is Offset.MINIMUM:
        codes = (groups - offsets.float()[:, None]) / divisor
    else:
        codes = groups / divisor + zeros(offsets, spec)
    return codes.round_().clamp_(0, spec.levels).to(torch.uint8)


def decode(codes: Tensor, scales: Tensor, offsets: Tensor, spec: QuantSpec) -> Tensor:
    """float32 [N, g] of codes [N, g]."""
    if spec.offset is Offset.MINIMUM:
        return codes.float() * scales.float()[:, None] + offsets.float()[:, None]
    return (codes.float() - zeros(offsets, spec)) * scales.float()[:, None]


def zeros(offsets: Tensor, spec: QuantSpec) -> Tensor | float:
    """The code that stands for zero, [N, 1] or the same for all."""
    return offsets.float()[:, None] if spec.offset is Offset.ZERO else 2.0 ** (spec.bits - 1)


def fit_groups(groups: Tensor, spec: QuantSpec, present: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Scales and offsets, fp16 [N] each, of float32 groups [N, g]; offsets are 0 where none are stored.

    Args:
        present: [N, g], 1 for values and 0 for filling, which decides nothing; None for values alone.
    """
    scales, offsets = _fit_range(groups, spec, 1.0)  # filling repeats a value, which widens no range
    if spec.fit is Fit.RANGE:
        return scales, offsets
    present = torch.ones(1, groups.shape[1], device=groups.device) if present is None else present
    _, best = _search(groups, scales, offsets, spec, present)
    for shrink in SHRINKS:
        tried = _fit_range(groups, spec, shrink)
        codes, _ = _search(groups, *tried, spec, present)
        tried = _refine(groups, codes, *tried, spec, present)
        _, error = _search(groups, *tried, spec, present)
        better = error < best
        scales, offsets = (
            torch.where(better, new, old) for new, old in zip(tried, (scales, offsets), strict=True)
        )
        best = torch.where(better, error, best)
    return scales, offsets


def _fit_range(groups: Tensor, spec: QuantSpec, shrink: float) -> tuple[Tensor, Tensor]:
    """The given part of each group's range spread over all codes."""
    low, high = groups.aminmax(dim=-1)
    if spec.offset is Offset.MIDDLE:  # the value farthest from zero is the first code, as in GGML's Q4_0
        extreme = torch.where(-low >= high, low, high)
        return _to_half(extreme * (shrink / -(2.0 ** (spec.bits - 1)))), torch.zeros_like(low).half()
    if spec.offset is Offset.ZERO:
        low, high = low.clamp_max(0) * shrink, high.clamp_min(0) * shrink
        scales = _to_half((high - low) / spec.levels)
        divisor = torch.where(scales != 0, scales.float(), 1.0)
        return scales, (-low / divisor).round_().clamp_(0, spec.levels).half()
    inset = (high - low) * ((1 - shrink) / 2)
    minima = (low + inset).half()
    return _to_half((high - inset - minima.float()).clamp_min(0) / spec.levels), minima


def _search(
    groups: Tensor, scales: Tensor, offsets: Tensor, spec: QuantSpec, present: Tensor
) -> tuple[Tensor, Tensor]:
    """Codes [N, g] as floats, and the squared error [N] of what they stand for, infinity if undefined.

    Multiplies by the inverse of the step, which is faster than what `encode` does and as good to compare by.
    """
    scale, offset = scales.float(), offsets.float()
    inverse = torch.where(scale != 0, scale, 1.0).reciprocal()[:, None]
    if spec.offset is Offset.MINIMUM:
        shift: Tensor | float = -offset[:, None] * inverse
    else:
        shift = zeros(offsets, spec)
    codes = (groups * inverse + shift).clamp_(0, spec.levels).round_()
    error = _sum((decode(codes, scales, offsets, spec) - groups).square_(), present)
    return codes, torch.where(torch.isfinite(error), error, torch.inf)


def _refine(
    groups: Tensor, codes: Tensor, scales: Tensor, offsets: Tensor, spec: QuantSpec, present: Tensor
) -> tuple[Tensor, Tensor]:
    """Scale and minimum that suit the codes best, by least squares."""
    code_mean, mean = zeros(offsets, spec), torch.zeros(1, device=groups.device)
    if spec.offset is Offset.MINIMUM:
        count = _sum(present, present)
        code_mean = (_sum(codes, present) / count).float()[:, None]
        mean = (_sum(groups, present) / count).float()[:, None]
    codes = codes - code_mean
    power = _sum(codes.square(), present)
    slope = _sum(codes * (groups - mean), present) / torch.where(power > 0, power, 1.0)
    scales = _to_half(torch.where(power > 0, slope.float(), scales.float()))
    if spec.offset is Offset.MINIMUM:
        offsets = (mean - scales.float()[:, None] * code_mean)[:, 0].half()
    return scales, offsets


def _sum(values: Tensor, present: Tensor) -> Tensor:
    """[N] of [N, g], in float64: in whatever order it is summed, what is made of it is rounded alike."""
    return torch.where(present > 0, values, 0.0).sum(-1, dtype=torch.float64)


def _to_half(scales: Tensor) -> Tensor:
    """fp16, away from zero where fp16 has few bits left: a narrow group's scale must not vanish."""
    stepped = torch.copysign((scales.abs() / _SMALLEST_STEP).ceil() * _SMALLEST_STEP, scales)
    return torch.where(scales.abs() < _SMALLEST_NORMAL, stepped, scales).half()
