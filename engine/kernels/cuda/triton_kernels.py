"""Triton kernels that pack, unpack and multiply in the layout of `engine.spec.quant`.

They know pointers, strides and one `PackedLayout`; `engine.kernels.cuda.gpu` chooses tiles and grids. Tiles
whose sizes are no power of two are cut by masks. All arithmetic is the reference's, in float32 and in its
order, so that unpacked values and packed bytes are bit-identical to the reference's.
"""

# mypy: disable-error-code="no-untyped-def"
# (Triton: what is annotated are the compile-time constants)

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl


class PackedLayout(NamedTuple):
    """A `QuantSpec` for rows of one width, in the numbers that address it; a compile-time constant."""

    width: int
    bits: int
    planes: tuple[tuple[int, int], ...]
    """(bits, lowest bit of the code) of each plane."""

    offset: str
    along_row: bool
    group: int
    """Values of a group."""

    groups: int
    """Groups of a block."""

    group_step: int
    """Bytes from a group's codes to the next group's."""

    byte_step: int
    """Bytes from one byte of a group's codes to its next."""

    code_bytes: int
    block_bytes: int
    even: bool
    """Whether all fp16 numbers have even addresses; three bits may leave them at odd ones."""


@triton.jit
def _half(address, mask, FORM: tl.constexpr):
    """The fp16 number at an address, as float32."""
    if FORM.even:
        halves = address.to(tl.pointer_type(tl.float16), bitcast=True)
        return tl.load(halves, mask=mask, other=0).to(tl.float32)
    else:
        low = tl.load(address, mask=mask, other=0).to(tl.uint16)
        high = tl.load(address + 1, mask=mask, other=0).to(tl.uint16)
        return (low | (high << 8)).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def _plane(codes, index, mask, FORM: tl.constexpr, PLANE: tl.constexpr):
    """The bits of codes that one plane holds, in their place."""
    bits: tl.constexpr = FORM.planes[PLANE][0]
    low: tl.constexpr = FORM.planes[PLANE][1]
    span: tl.constexpr = FORM.group * bits // 8
    byte = FORM.group * low // 8 + index % span
    packed = tl.load(codes + byte * FORM.byte_step, mask=mask, other=0).to(tl.int32)
    return ((packed >> (index // span * bits)) & (2**bits - 1)) << low


@triton.jit
def decode(block, group, index, stored, within, FORM: tl.constexpr):
    """Values ``index`` of groups of blocks, float32; the shapes broadcast.

    ``stored`` masks the pairs of block and group, ``within`` the rest.
    Masked values are finite and have no meaning.
    """
    codes = block + group * FORM.group_step
    code = _plane(codes, index, stored & within, FORM, 0)
    for plane in tl.static_range(1, len(FORM.planes)):
        code |= _plane(codes, index, stored & within, FORM, plane)
    numbers = block + FORM.code_bytes + group * 2
    scale = _half(numbers, stored, FORM)
    if FORM.offset == "minimum":
        return code.to(tl.float32) * scale + _half(numbers + 2 * FORM.groups, stored, FORM)
    elif FORM.offset == "zero":
        return (code.to(tl.float32) - _half(numbers + 2 * FORM.groups, stored, FORM)) * scale
    else:
        return (code.to(tl.float32) - 2 ** (FORM.bits - 1)) * scale


@triton.jit
def unpack(packed, out, rows, blocks, block_stride, row_stride, column_stride,
           FORM: tl.constexpr, GROUPS: tl.constexpr, VALUES: tl.constexpr):  # fmt: skip
    """Restore a tile of ``VALUES`` values of ``GROUPS`` groups."""
    number = tl.program_id(0) * GROUPS + tl.arange(0, GROUPS)[:, None]
    block = (number // FORM.groups).to(tl.int64)
    group = number % FORM.groups
    index = tl.program_id(1) * VALUES + tl.arange(0, VALUES)[None, :]
    stored, within = block < blocks, index < FORM.group
    values = decode(packed + block * block_stride, group, index, stored, within, FORM)
    if FORM.along_row:
        row, column = block, group * FORM.group + index
    else:
        row, column = block * FORM.group + index, group
    mask = stored & within & (row < rows) & (column < FORM.width)
    tl.store(out + row * row_stride + column * column_stride, values.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _clipped(index, COUNT: tl.constexpr, STEP: tl.constexpr):
    """Indices below ``COUNT``, the last one for those that tiles of ``STEP`` have beyond it."""
    if COUNT % STEP:
        return tl.minimum(index, COUNT - 1)
    else:
        return index


@triton.jit
def _values(source, block, group, index, stored, FORM: tl.constexpr):
    """float32 values of groups; those that a group lacks are its own last one."""
    values, rows, row_stride, column_stride = source
    if FORM.along_row:
        row, column = block, _clipped(group * FORM.group + index, FORM.width, FORM.group)
    else:
        row, column = tl.minimum(block * FORM.group + index, rows - 1), group
    return tl.load(values + row * row_stride + column * column_stride, mask=stored, other=0).to(tl.float32)


@triton.jit
def _to_half(scale):
    """fp16, away from zero where fp16 has few bits left: a narrow group's scale must not vanish."""
    size = tl.abs(scale)
    stepped = tl.ceil(size * 16777216.0) * (1 / 16777216)  # 2**24: the smallest steps of fp16
    return tl.where(size < 1 / 16384, tl.where(scale < 0, -stepped, stepped), scale).to(tl.float16)


@triton.jit
def _nearest(values, HIGHEST: tl.constexpr):
    """The nearest whole number from 0 to ``HIGHEST``, halves to even: 2**23 leaves no bit below one."""
    return tl.clamp(values, 0.0, HIGHEST * 1.0) + 8388608.0 - 8388608.0


@triton.jit
def _fit_range(low, high, FORM: tl.constexpr):
    """fp16 scales and offsets that spread all codes over each range."""
    levels: tl.constexpr = 2**FORM.bits - 1
    if FORM.offset == "middle":
        extreme = tl.where(-low >= high, low, high)
        return _to_half(extreme * (-1 / 2 ** (FORM.bits - 1))), tl.zeros_like(low).to(tl.float16)
    elif FORM.offset == "zero":
        low, high = tl.minimum(low, 0.0), tl.maximum(high, 0.0)
        scale = _to_half(tl.div_rn(high - low, tl.full(low.shape, levels, tl.float32)))
        divisor = tl.where(scale != 0, scale.to(tl.float32), 1.0)
        return scale, _nearest(tl.div_rn(-low, divisor), levels).to(tl.float16)
    else:
        minimum = low.to(tl.float16)
        extent = tl.maximum(high - minimum.to(tl.float32), 0.0)
        return _to_half(tl.div_rn(extent, tl.full(low.shape, levels, tl.float32))), minimum


@triton.jit
def _store_half(address, values, mask, FORM: tl.constexpr):
    if FORM.even:
        tl.store(address.to(tl.pointer_type(tl.float16), bitcast=True), values, mask=mask)
    else:
        bits = values.to(tl.uint16, bitcast=True)
        tl.store(address, (bits & 255).to(tl.uint8), mask=mask)
        tl.store(address + 1, (bits >> 8).to(tl.uint8), mask=mask)


@triton.jit
def _store_plane(source, codes, place, rounding,
                 FORM: tl.constexpr, PLANE: tl.constexpr, VALUES: tl.constexpr):  # fmt: skip
    """Encode ``VALUES`` values at a time and store the bits that one plane holds."""
    block, group, stored = place
    divisor, shift = rounding
    bits: tl.constexpr = FORM.planes[PLANE][0]
    low: tl.constexpr = FORM.planes[PLANE][1]
    span: tl.constexpr = FORM.group * bits // 8
    levels: tl.constexpr = 2**FORM.bits - 1
    step: tl.constexpr = VALUES * bits // 8
    for start in range(0, span, step):
        offset = start + tl.arange(0, step)[None, :]
        byte = group * 0 + offset * 0
        for field in tl.static_range(8 // bits):
            index = field * span + _clipped(offset, span, step)
            some = _values(source, block, group, index, stored, FORM)
            if FORM.offset == "minimum":
                code = _nearest(tl.div_rn(some - shift, divisor), levels).to(tl.int32)
            else:
                code = _nearest(tl.div_rn(some, divisor) + shift, levels).to(tl.int32)
            byte |= ((code >> low) & (2**bits - 1)) << (field * bits)
        address = codes + (FORM.group * low // 8 + offset) * FORM.byte_step
        tl.store(address, byte.to(tl.uint8), mask=stored & (offset < span))


@triton.jit
def pack(values, out, broken, rows, blocks, row_stride, column_stride, block_stride,
         FORM: tl.constexpr, GROUPS: tl.constexpr, VALUES: tl.constexpr):  # fmt: skip
    """Quantise ``GROUPS`` groups, ``VALUES`` values at a time; ``broken`` [1] becomes 1 if one cannot be."""
    number = tl.program_id(0) * GROUPS + tl.arange(0, GROUPS)[:, None]
    block = (number // FORM.groups).to(tl.int64)
    group = number % FORM.groups
    stored = block < blocks
    source = (values, rows, row_stride, column_stride)
    low = tl.full([GROUPS, 1], float("inf"), tl.float32)
    high = tl.full([GROUPS, 1], float("-inf"), tl.float32)
    unknown = tl.zeros([GROUPS, 1], tl.int32)  # NaN, which comparisons pass over
    for start in range(0, FORM.group, VALUES):
        index = _clipped(start + tl.arange(0, VALUES)[None, :], FORM.group, VALUES)
        some = _values(source, block, group, index, stored, FORM)
        low = tl.minimum(low, tl.min(some, 1, keep_dims=True))
        high = tl.maximum(high, tl.max(some, 1, keep_dims=True))
        unknown |= tl.max((some != some).to(tl.int32), 1, keep_dims=True)
    scale, offset = _fit_range(low, high, FORM)
    divisor = tl.where(scale != 0, scale.to(tl.float32), 1.0)
    shift = offset.to(tl.float32)
    whole = (unknown == 0) & (tl.abs(divisor) < float("inf")) & (tl.abs(shift) < float("inf"))
    tl.store(broken + number * 0, number * 0 + 1, mask=stored & (whole == 0))

    address = out + block * block_stride
    numbers = address + FORM.code_bytes + group * 2
    _store_half(numbers, scale, stored, FORM)
    if FORM.offset == "middle":
        shift += 2 ** (FORM.bits - 1)
    else:
        _store_half(numbers + 2 * FORM.groups, offset, stored, FORM)
    codes = address + group * FORM.group_step
    for plane in tl.static_range(len(FORM.planes)):
        _store_plane(source, codes, (block, group, stored), (divisor, shift), FORM, plane, VALUES)


@triton.jit
def matmul(x, packed, out, count, rows, x_stride, block_stride, splits,
           FORM: tl.constexpr, COUNT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):  # fmt: skip
    """A part of x [count, FORM.width] times ``ROWS`` rows of a matrix: float32 [splits, count, rows].

    A tile of the matrix lies in one group per row (groups along rows) or in one block (along columns),
    so that it has one vector of scales.
    """
    tile, split = tl.program_id(0), tl.program_id(1)
    m = tl.arange(0, COUNT)
    if FORM.along_row:
        chunks: tl.constexpr = (FORM.group + COLUMNS - 1) // COLUMNS
        steps = FORM.groups * chunks
        row = tile * ROWS + tl.arange(0, ROWS)
        row_known = row < rows
        block = packed + row.to(tl.int64)[None, :] * block_stride
    else:
        tiles: tl.constexpr = (FORM.group + ROWS - 1) // ROWS
        steps = tl.cdiv(FORM.width, COLUMNS)
        row_index = tile % tiles * ROWS + tl.arange(0, ROWS)
        row = tile // tiles * FORM.group + row_index
        row_known = (row < rows) & (row_index < FORM.group)
        block = packed + (tile // tiles).to(tl.int64) * block_stride
    product = tl.zeros([COUNT, ROWS], tl.float32)
    part = tl.cdiv(steps, splits)
    for step in range(split * part, tl.minimum(steps, (split + 1) * part)):
        if FORM.along_row:
            group = step // chunks
            index = step % chunks * COLUMNS + tl.arange(0, COLUMNS)
            column = group * FORM.group + index
            column_known = (column < FORM.width) & (index < FORM.group)
            weight = decode(block, group, index[:, None], row_known[None, :], column_known[:, None], FORM)
        else:
            column = step * COLUMNS + tl.arange(0, COLUMNS)
            column_known = column < FORM.width
            weight = decode(
                block, column[:, None], row_index[None, :], column_known[:, None], row_known[None, :], FORM
            )
        some = tl.load(
            x + m[:, None] * x_stride + column[None, :],
            mask=(m < count)[:, None] & column_known[None, :], other=0,
        )  # fmt: skip
        product = tl.dot(some, weight.to(x.dtype.element_ty), product, input_precision="ieee")
    target = out + (split * count + m[:, None]) * rows + row[None, :]
    tl.store(target, product, mask=(m < count)[:, None] & row_known[None, :])
