"""Attention over a packed KV cache and the product with a packed matrix in plain torch: the oracles."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.kernels.calls import AttentionCall, CachedSequence, PackedMatrix
from engine.kernels.reference import floats, unpack
from engine.spec.float_format import FloatSpec
from engine.spec.kv_format import KVFormat
from engine.spec.precision import MatmulPrecision
from engine.spec.quant import WHOLE_ROW, QuantSpec


def matmul(
    x: Tensor,
    matrix: PackedMatrix,
    bias: Tensor | None = None,
    precision: MatmulPrecision = MatmulPrecision.HIGHEST,
) -> Tensor:
    """x [..., width] times the unpacked matrix, transposed: [..., rows], as `F.linear`.

    Args:
        precision: of the C kernels; here it changes nothing.
    """
    if matrix.input_scale is not None:
        x = x / matrix.input_scale
    if matrix.spec.activation_bits == 8:
        return _matmul_rounded(x.reshape(-1, matrix.width), matrix, bias).view(*x.shape[:-1], matrix.rows)
    if isinstance(matrix.spec, FloatSpec):
        return F.linear(x, floats(matrix.data[: matrix.rows], matrix.spec).to(x.dtype), bias)
    weight = torch.empty(matrix.rows, matrix.width, dtype=x.dtype, device=x.device)
    return F.linear(x, unpack(matrix.data, matrix.spec, weight), bias)


def _matmul_rounded(x: Tensor, matrix: PackedMatrix, bias: Tensor | None) -> Tensor:
    """x [M, width] rounded to 8 bits per row and group, times the matrix: [M, rows].

    float64 holds the sums of these products of integers exactly (up to 2**39 of them).
    """
    assert isinstance(matrix.spec, QuantSpec)  # floats round nothing
    if matrix.spec.group_size != WHOLE_ROW:
        weight = torch.empty(matrix.rows, matrix.width, dtype=torch.float64, device=x.device)
        unpack(matrix.data, matrix.spec, weight)
        result = round_groups(x, matrix.spec.group_size).double() @ weight.T
        return (result if bias is None else result + bias.double()).to(x.dtype)
    integers, scales = round_rows(x)
    codes = matrix.data[: matrix.rows, : matrix.width]  # whole bytes, one group per row
    products = integers.double() @ (codes.double() - 128).T
    return scale_products(products, scales, matrix, bias, x.dtype)


def round_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Each row [M, width] as integers -127 to 127, int8, times its scale, float32 [M, 1]."""
    scales = x.float().abs().amax(1, keepdim=True) / 127
    divisor = torch.where(scales > 0, scales, 1.0)
    return (x.float() / divisor).round_().clamp_(-127, 127).to(torch.int8), scales


def round_groups(x: Tensor, size: int) -> Tensor:
    """Rows [M, width] with each group of ``size`` values rounded as by `round_rows`: float32 [M, width]."""
    count, width = x.shape
    padded = F.pad(x.float(), (0, -width % size)).view(-1, size)
    integers, scales = round_rows(padded)
    return (integers.float() * scales).view(count, -1)[:, :width]


def scale_products(
    products: Tensor, scales: Tensor, matrix: PackedMatrix, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """Products of integers [M, rows] times both sides' scales, [M, 1] and one per row, plus the bias."""
    assert isinstance(matrix.spec, QuantSpec)  # floats have no scales
    end = matrix.spec.code_bytes(matrix.width)
    row_scales = matrix.data[: matrix.rows, end : end + 2].contiguous().view(torch.float16)[:, 0].float()
    result = products.float() * scales * row_scales
    return (result if bias is None else result + bias.float()).to(dtype)


def softmax_with_sinks(scores: Tensor, sinks: Tensor | None) -> Tensor:
    """Softmax of scores [G, H/G, ..., k] beside sinks [H], which carry no value: [G, H/G, ..., k]."""
    if sinks is None:
        return torch.softmax(scores, dim=-1)
    sink = sinks.float().view(*scores.shape[:2], *[1] * (scores.dim() - 2)).expand(*scores.shape[:-1], 1)
    return torch.softmax(torch.cat([scores, sink], dim=-1), dim=-1)[..., :-1]


def unpack_tokens(packed: Tensor, tokens: int, form: KVFormat, keys: int, values: int, out: Tensor) -> None:
    """Unpack blocks of tokens into ``out`` [tokens, keys + values]; a block may reach beyond ``tokens``.

    Args:
        packed: uint8, contiguous, at least the blocks of ``tokens``.
        keys, values: values of one token's keys and values.
    """
    blocks = -(-tokens // form.block_tokens)
    size, key_bytes = form.block_bytes(keys, values), form.key_bytes(keys)
    data = packed.view(-1)[: blocks * size].view(blocks, size)
    whole = blocks * form.block_tokens
    target = out if whole == tokens else out.new_empty(whole, keys + values)
    for part, spec, columns in (
        (data[:, :key_bytes], form.keys, slice(0, keys)),
        (data[:, key_bytes:], form.values, slice(keys, None)),
    ):
        width = columns.stop or values
        unpack(part.reshape(-1, spec.block_bytes(width)), spec, target[:, columns])
    if target is not out:
        out.copy_(target[:tokens])


def attention(
    call: AttentionCall, sequences: Sequence[CachedSequence], form: KVFormat | None = None
) -> Tensor:
    """One query per sequence over its packed and exact tokens; returns ``call.out`` [S, H, E].

    Args:
        call: ``query`` is of the newest token of each of the S ``sequences``.
        form: how packed tokens are kept; None where none are.
    """
    shape, options, form = call.shape, call.options, form or KVFormat()
    per_group = shape.heads // shape.groups
    for index, sequence in enumerate(sequences):
        total = sequence.packed_tokens + len(sequence.rows)
        rows = call.query.new_empty(total, shape.keys + shape.values)
        unpack_tokens(
            sequence.packed, sequence.packed_tokens, form, shape.keys, shape.values,
            rows[: sequence.packed_tokens],
        )  # fmt: skip
        rows[sequence.packed_tokens :] = sequence.rows
        if options.window and options.window < total:
            rows = rows[-options.window :]
        keys = rows[:, : shape.keys].view(len(rows), shape.groups, -1).transpose(0, 1)  # [G, n, D]
        values = rows[:, shape.keys :].view(len(rows), shape.groups, -1).transpose(0, 1)  # [G, n, E]
        grouped = call.query[index].view(shape.groups, per_group, -1)
        scores = torch.matmul(grouped, keys.transpose(1, 2)).float() * options.scale  # [G, H/G, n]
        if options.softcap is not None:
            scores = torch.tanh(scores / options.softcap) * options.softcap
        past = scores[..., :-1]  # the last token always stays
        dropped = past.shape[-1] - options.kept(past.shape[-1])
        if dropped > 0:
            past.scatter_(-1, past.topk(dropped, dim=-1, largest=False).indices, float("-inf"))
        weights = softmax_with_sinks(scores, options.sinks)
        if call.lse is not None:
            own = scores.logsumexp(-1).view(-1)
            call.lse[index] = own if options.sinks is None else torch.logaddexp(own, options.sinks.float())
        call.out[index] = torch.matmul(weights.to(values.dtype), values).view(shape.heads, -1)
    return call.out
