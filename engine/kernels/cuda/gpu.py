"""The kernels on a CUDA device, with the signatures and the results of the references.

Triton is imported by the first call, so that this module imports wherever torch does. Nothing here
waits for the device but `pack`, once per call, to refuse what cannot be packed.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from functools import lru_cache
from types import ModuleType
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.kernels import reference, reference_attention
from engine.kernels.calls import AttentionCall, CachedSequence, PackedMatrix
from engine.spec.float_format import FloatSpec, MatrixForm
from engine.spec.kv_format import KVFormat
from engine.spec.layout import FUSED_ROWS
from engine.spec.precision import MatmulPrecision
from engine.spec.quant import PLANES, WHOLE_ROW, Along, Fit, QuantSpec

if TYPE_CHECKING:
    from engine.kernels.cuda.triton_kernels import PackedLayout

PROGRAMS = 512
"""Programs that keep a large device busy; products and attention are split until there are as many."""

_TILE_VALUES = 2048
_TILE_BYTES = 16384  # of keys: twice that and the values fit in the shared memory of any device
_SHORTEST_SPLIT = 4  # tiles
_NO_WINDOW = 2**30
_INT8_ROWS = 32  # torch._int_mm wants more than 16 on CUDA


def available() -> bool:
    """Whether these kernels can run here: a CUDA device, and Triton, which comes with torch's CUDA builds."""
    return importlib.util.find_spec("triton") is not None and torch.cuda.is_available()


def unpack(packed: Tensor, spec: MatrixForm, out: Tensor) -> Tensor:
    """To ``out`` [R, W]: see `engine.kernels.reference.unpack`."""
    if isinstance(spec, FloatSpec):
        return reference.unpack(packed, spec, out)
    rows, width = out.shape
    form, blocks = _layout(spec, width, _odd(packed)), spec.blocks(rows)
    values, groups = _tile(spec, width)
    grid = (-(-blocks * form.groups // groups), -(-form.group // values))
    _kernels().unpack[grid](
        packed, out, rows, blocks, packed.stride(0), *out.stride(),
        FORM=form, GROUPS=groups, VALUES=values,
    )  # fmt: skip
    return out


def pack(values: Tensor, spec: MatrixForm, out: Tensor) -> Tensor:
    """Pack [R, W], see `engine.kernels.reference.pack`.

    The kernel sets one number on the device if a group cannot be packed; reading it is the one time that a
    call waits for the device. `Fit.ERROR`, used for weights, once, is left to the reference.

    Raises:
        ValueError: if a value is not finite or a group exceeds the range of fp16.
    """
    if isinstance(spec, FloatSpec) or spec.fit is Fit.ERROR:
        return reference.pack(values, spec, out)
    rows, width = values.shape
    form, blocks = _layout(spec, width, _odd(out)), spec.blocks(rows)
    size, groups = _tile(spec, width)
    broken = torch.zeros(1, dtype=torch.int32, device=values.device)
    _kernels().pack[(-(-blocks * form.groups // groups),)](
        values, out, broken, rows, blocks, *values.stride(), out.stride(0),
        FORM=form, GROUPS=groups, VALUES=size,
    )  # fmt: skip
    if broken.item():
        raise ValueError("a value is not finite or beyond the range of float16")
    return out


def matmul(
    x: Tensor,
    matrix: PackedMatrix,
    bias: Tensor | None = None,
    precision: MatmulPrecision = MatmulPrecision.HIGHEST,
) -> Tensor:
    """x [..., width] times the unpacked matrix, transposed: [..., rows], as `F.linear`.

    Up to `FUSED_ROWS` rows read the packed matrix; more unpack it first. Where the format has 8 bits and
    rounds activations, too, the product is one of 8-bit integers and exact but for the rounding of its
    factors; with 4 bits it is one of floats whose activations were rounded. Floats of x's own kind are
    multiplied where they lie.

    Args:
        precision: of the C kernels; here it changes nothing.
    """
    flat = x.reshape(-1, matrix.width)
    if matrix.input_scale is not None:
        flat = (flat / matrix.input_scale).to(x.dtype)
    return _matmul(flat, matrix, bias).view(*x.shape[:-1], matrix.rows)


def _matmul(x: Tensor, matrix: PackedMatrix, bias: Tensor | None) -> Tensor:
    """x [M, width] -> [M, rows]."""
    spec = matrix.spec
    if isinstance(spec, FloatSpec):
        if x.dtype == getattr(torch, spec.dtype):
            return F.linear(x, reference.floats(matrix.data[: matrix.rows], spec), bias)
    else:
        if spec.activation_bits == 8:
            if spec.group_size == WHOLE_ROW:  # torch multiplies integers of whole rows, not of groups
                return _matmul_int8(x, matrix, spec, bias)
            x = reference_attention.round_groups(x, spec.group_size).to(x.dtype)
        if len(x) <= FUSED_ROWS:
            return _matmul_fused(x, matrix, spec, bias)
    return F.linear(x, unpack(matrix.data, spec, x.new_empty(matrix.rows, matrix.width)), bias)


def _matmul_fused(x: Tensor, matrix: PackedMatrix, spec: QuantSpec, bias: Tensor | None) -> Tensor:
    form = _layout(spec, matrix.width, _odd(matrix.data))
    along_row = spec.along is Along.ROW
    size = max(16, min(64, _power_of_2(form.group)))  # of the tile, along the group
    tile_rows, tile_columns = (32, size) if along_row else (min(32, size), 64)
    if along_row:
        tiles, steps = -(-matrix.rows // tile_rows), form.groups * -(-form.group // tile_columns)
    else:
        tiles, steps = len(matrix.data) * -(-form.group // tile_rows), -(-matrix.width // tile_columns)
    splits = _splits(tiles, steps)
    x = x.contiguous()
    parts = torch.empty(splits, len(x), matrix.rows, dtype=torch.float32, device=x.device)
    _kernels().matmul[(tiles, splits)](
        x, matrix.data, parts, len(x), matrix.rows, x.stride(0), matrix.data.stride(0), splits,
        FORM=form, COUNT=FUSED_ROWS, ROWS=tile_rows, COLUMNS=tile_columns,
    )  # fmt: skip
    product = parts.sum(0)
    return (product if bias is None else product + bias).to(x.dtype)


def _matmul_int8(x: Tensor, matrix: PackedMatrix, spec: QuantSpec, bias: Tensor | None) -> Tensor:
    """x [M, width] rounded to 8 bits per row, times codes of 8 bits: [M, rows]."""
    width = spec.group(matrix.width)
    integers, scales = reference_attention.round_rows(x)
    padded = torch.zeros(max(len(x), _INT8_ROWS), width, dtype=torch.int8, device=x.device)
    padded[: len(x), : matrix.width] = integers
    weight = matrix.data.new_empty(-(-matrix.rows // 8) * 8, width)  # whole eights, as torch wants them
    # In two's complement, to flip the highest bit is to subtract 128.
    torch.bitwise_xor(matrix.data[:, :width], 128, out=weight[: matrix.rows])
    products = torch._int_mm(padded, weight.view(torch.int8).t())[: len(x), : matrix.rows]
    return reference_attention.scale_products(products, scales, matrix, bias, x.dtype)


def attention(
    call: AttentionCall, sequences: Sequence[CachedSequence], form: KVFormat | None = None
) -> Tensor:
    """One query per sequence over its packed and exact tokens, as the reference; returns [S, H, E].

    Packed tokens are read where they lie. All formats of integers, heads of any width, windows, soft caps
    and sinks are served by one kernel. A ``fraction`` below 1 needs all scores before the first value: that
    is left to the reference, sequence by sequence, as are tokens kept in 16-bit floats.
    """
    form, shape, options = form or KVFormat(), call.shape, call.options
    if options.fraction < 1 or isinstance(form.keys, FloatSpec) or isinstance(form.values, FloatSpec):
        return reference_attention.attention(call, sequences, form)
    kernels = _attention_kernels()
    query = call.query.contiguous()
    count, longest = len(sequences), max((sequence.packed_tokens for sequence in sequences), default=0)
    tokens = _TILE_BYTES // (max(_padded(shape.key_width), _padded(shape.value_width)) * query.itemsize)
    tokens = max(16, min(64, tokens))
    splits = _splits(count * shape.groups, -(-longest // tokens)) if longest else 0
    parts = query.new_empty(splits + 1, count, shape.heads, shape.value_width, dtype=torch.float32)
    logarithms = query.new_empty(splits + 1, count, shape.heads, dtype=torch.float32)
    table, aligned = _table(sequences, query.is_cuda)
    size, key_bytes = form.block_bytes(shape.keys, shape.values), form.key_bytes(shape.keys)
    odd = (size | key_bytes | (not aligned)) & 1
    per_group = shape.heads // shape.groups
    kernels.attend[(count, shape.groups, splits + 1)](
        query, table.to(query.device, non_blocking=True), parts, logarithms, options.scale,
        options.window or _NO_WINDOW, options.softcap or 1.0, splits,
        CONSTANTS=kernels.Constants(
            form.block_tokens, size, key_bytes, per_group, _padded(per_group),
            capped=options.softcap is not None, aligned=aligned,
        ),
        KEYS=_layout(form.keys, shape.keys, odd), VALUES=_layout(form.values, shape.values, odd),
        KEY_TILE=kernels.Tile(tokens, shape.key_width, _padded(shape.key_width)),
        VALUE_TILE=kernels.Tile(tokens, shape.value_width, _padded(shape.value_width)),
        num_stages=2,
    )  # fmt: skip
    whole = logarithms.logsumexp(0)
    if options.sinks is not None:
        whole = torch.logaddexp(whole, options.sinks.float())
    if call.lse is not None:
        call.lse.copy_(whole)
    return call.out.copy_(torch.einsum("ksh,kshe->she", (logarithms - whole).exp(), parts))


def _table(sequences: Sequence[CachedSequence], cuda: bool) -> tuple[Tensor, bool]:
    """Where each sequence lies, int64 [S, 5] on the host, and whether all of it is aligned to 16 bytes.

    The kernel follows these addresses, so that no cache is gathered.
    """
    table = torch.tensor(
        [
            [
                sequence.packed.data_ptr(), sequence.packed_tokens,
                sequence.rows.data_ptr(), len(sequence.rows), sequence.rows.stride(0),
            ]
            for sequence in sequences
        ],
        dtype=torch.int64, pin_memory=cuda,
    )  # fmt: skip
    return table, not bool((table[:, [0, 2, 4]] % 16).any())


@lru_cache(maxsize=256)
def _layout(spec: QuantSpec, width: int, odd: int) -> PackedLayout:
    """The format in numbers; ``odd`` is 1 where a block may start at an odd address."""
    low, planes = 0, []
    for bits in PLANES[spec.bits]:
        planes.append((bits, low))
        low += bits
    along_row, group = spec.along is Along.ROW, spec.group(width)
    code_bytes, block_bytes = spec.code_bytes(width), spec.block_bytes(width)
    return _kernels().PackedLayout(
        width, spec.bits, tuple(planes), spec.offset.value, along_row, group, spec.groups(width),
        group_step=group * spec.bits // 8 if along_row else 1, byte_step=1 if along_row else width,
        code_bytes=code_bytes, block_bytes=block_bytes, even=not (code_bytes | block_bytes | odd) & 1,
    )  # fmt: skip


def _tile(spec: QuantSpec, width: int) -> tuple[int, int]:
    """Values of a group, and groups, that one program works on at a time."""
    values = min(_power_of_2(spec.group(width)), 128 if spec.along is Along.ROW else 16)
    return values, _TILE_VALUES // values


def _splits(tiles: int, steps: int) -> int:
    """Into how many parts the sum of ``steps`` is split for each of ``tiles``, to keep the device busy."""
    return max(1, min(steps // _SHORTEST_SPLIT, -(-PROGRAMS // tiles)))


def _odd(packed: Tensor) -> int:
    """Whether blocks may start at odd addresses."""
    if packed.dtype != torch.uint8 or packed.stride(1) != 1:
        raise ValueError("packed blocks are rows of uint8 whose bytes stand side by side")
    return (packed.data_ptr() | packed.stride(0)) & 1


def _power_of_2(number: int) -> int:
    return 1 << (number - 1).bit_length()


def _padded(width: int) -> int:
    """The width of a tile that a matrix product takes."""
    return max(16, _power_of_2(width))


def _kernels() -> ModuleType:
    from engine.kernels.cuda import triton_kernels as gpu_kernels

    return gpu_kernels


def _attention_kernels() -> ModuleType:
    from engine.kernels.cuda import attention as gpu_attention

    return gpu_attention
