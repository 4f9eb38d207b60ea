"""An oracle that reads packed matrices bit by bit, by the layout in `engine.spec.quant`, in float64."""

from __future__ import annotations

import struct

import numpy as np

from engine.spec.quant import PLANES, Along, Offset, QuantSpec


def value_at(data: bytes, row: int, column: int, width: int, spec: QuantSpec) -> float:
    """One value of a packed matrix."""
    code, scale, offset = code_at(data, row, column, width, spec)
    if spec.offset is Offset.MINIMUM:
        return offset + code * scale
    return (code - (offset if spec.offset is Offset.ZERO else 2 ** (spec.bits - 1))) * scale


def code_at(data: bytes, row: int, column: int, width: int, spec: QuantSpec) -> tuple[int, float, float]:
    """One value's code, and its group's scale and offset (0 if the format has none)."""
    by_column = spec.along is Along.COLUMN
    block = data[row // spec.block_rows * spec.block_bytes(width) :][: spec.block_bytes(width)]
    size = spec.group(width)
    group, place = (column, row % size) if by_column else (column // size, column % size)
    code = low = plane_begin = 0
    for bits in PLANES[spec.bits]:
        fields = 8 // bits
        field, byte = divmod(place, size // fields)
        if by_column:
            at = plane_begin * width + byte * width + group
        else:
            at = group * size * spec.bits // 8 + plane_begin + byte
        code |= (block[at] >> field * bits & 2**bits - 1) << low
        low += bits
        plane_begin += size * bits // 8
    groups = spec.groups(width)
    numbers = block[spec.code_bytes(width) :]
    (scale,) = struct.unpack_from("<e", numbers, 2 * group)
    offset = struct.unpack_from("<e", numbers, 2 * (groups + group))[0] if spec.has_offsets else 0.0
    return code, scale, offset


def decoded(data: bytes, rows: int, width: int, spec: QuantSpec) -> np.ndarray:
    """All values, float64 [rows, width]."""
    return np.array([[value_at(data, row, at, width, spec) for at in range(width)] for row in range(rows)])


def grouped(values: np.ndarray, spec: QuantSpec) -> list[tuple[slice, slice]]:
    """Index of each group of a matrix [rows, width]."""
    rows, width = values.shape
    if spec.along is Along.COLUMN:
        size = spec.group_size
        return [
            (slice(row, row + size), slice(column, column + 1))
            for row in range(0, rows, size)
            for column in range(width)
        ]
    size = spec.group(width)
    return [
        (slice(row, row + 1), slice(column, column + size))
        for row in range(rows)
        for column in range(0, width, size)
    ]


def error_bound(values: np.ndarray, spec: QuantSpec) -> np.ndarray:
    """The largest error that rounding may cause in each float64 value, [rows, width].

    It is the sum of half a step (a whole step where a symmetric grid ends one code short of the opposite
    extreme), the rounding of the minimum and, once per level, of the scale to fp16 (precision 2^-11, smallest
    step 2^-24), and the rounding of float32 arithmetic.
    """
    bound = np.empty_like(values)
    for where in grouped(values, spec):
        group = values[where]
        low, high = group.min(), group.max()
        largest = max(abs(low), abs(high))
        in_half = 0.0
        if spec.offset is Offset.MINIMUM:
            in_half = 2.0**-11 * abs(low) + 2.0**-25
            step = (high - low + in_half) / spec.levels
        elif spec.offset is Offset.ZERO:
            step = (max(high, 0) - min(low, 0)) / spec.levels
        else:
            step = largest / 2 ** (spec.bits - 1)
        rounding = step / 2 if spec.offset is Offset.MINIMUM else step
        rounding += in_half + spec.levels * (2.0**-11 * step + 2.0**-24)
        bound[where] = rounding + 2.0**-21 * largest
    return bound
