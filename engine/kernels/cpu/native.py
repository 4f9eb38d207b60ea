"""The kernels in C, with the signatures and the results of the references; tensors are on the CPU.

Knows how tensors are handed to C and what must hold before memory is touched; the arithmetic is in
``csrc``, in float32: other kinds of numbers are converted on the way in and out. All functions take the
number of threads, by default torch's own. They raise RuntimeError where there is no library.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from engine.kernels import reference
from engine.kernels.calls import PackedMatrix
from engine.kernels.cpu import build
from engine.kernels.cpu.attention import attention as attention
from engine.kernels.cpu.attention import decode as decode
from engine.kernels.cpu.build import reason as reason
from engine.kernels.cpu.calls import (
    KINDS,
    Format,
    check,
    describe,
    format_of,
    library,
    plain,
    pointer,
    threads_of,
)
from engine.kernels.cpu.prompts import attend_prompts as attend_prompts
from engine.spec.float_format import FloatSpec, MatrixForm
from engine.spec.kv_format import KVFormat
from engine.spec.precision import VECTOR_ROWS, MatmulPrecision

_LARGEST_INT8_WIDTH = 65536  # products of 255 * 127 whose sum 32 bits hold


def available() -> bool:
    """Whether the kernels can be used."""
    return build.library() is not None


def gains_by(precision: MatmulPrecision) -> bool:
    """Whether this processor's products of many rows are faster at a precision than in float32."""
    return precision.parts > 0 and available() and bool(library().gains_by_bfloats(precision.parts))


def has_unit(precision: MatmulPrecision) -> bool:
    """Whether this processor can compute products of many rows at a precision, faster or not."""
    return precision.parts > 0 and available() and bool(library().takes_bfloats(precision.parts))


def uses_bfloats(rows: int, precision: MatmulPrecision) -> bool:
    """Whether a product of ``rows`` rows splits its numbers into bfloat16."""
    return rows > VECTOR_ROWS and has_unit(precision)


def gains_by_prompts() -> bool:
    """Whether `attend_prompts` is faster on this processor than torch's attention."""
    return available() and bool(library().gains_by_prompts())


def work_alone() -> None:
    """Make torch and the kernels use one thread in the calling thread from now on.

    GNU's OpenMP lets threads spin before they sleep only while all that it manages, of all callers, are no
    more than there are processors. A second caller with threads of its own makes every product wait until
    the first one's are awake.
    """
    torch.get_num_threads()  # sets the number for a thread that has not read it yet
    if available():
        library().work_alone()


def summarise(logits: Tensor, threads: int | None = None) -> tuple[Tensor, Tensor]:
    """Logits [R, V] -> [R] and float32 [R]: see `engine.kernels.reference.summarise`; in float32."""
    logits = plain(logits)
    rows, count = logits.shape
    places, lse = torch.empty(rows, dtype=torch.int64), torch.empty(rows)
    library().summarise(
        logits.data_ptr(), logits.stride(0), rows, count, places.data_ptr(), lse.data_ptr(),
        threads_of(threads),
    )  # fmt: skip
    return places, lse


def pack(values: Tensor, spec: MatrixForm, out: Tensor, threads: int | None = None) -> Tensor:
    """Pack [R, W], see `engine.kernels.reference.pack`. What is not float32 passes through a small buffer.

    Raises:
        ValueError: if a value is not finite or a group exceeds the range of fp16.
    """
    count, width = values.shape
    _check_packed(out, spec, count, width)
    for start, stop in _row_chunks(values, spec):
        part = values[start:stop]
        if part.dtype != torch.float32 or part.stride(1) != 1:
            part = part.to(torch.float32, memory_format=torch.contiguous_format)
        status = library().pack_matrix(
            pointer(format_of(spec, width)), part.data_ptr(), part.stride(0), stop - start,
            out[start // spec.block_rows :].data_ptr(), out.stride(0), threads_of(threads),
        )  # fmt: skip
        check(status)
    return out


def unpack(packed: Tensor, spec: MatrixForm, out: Tensor, threads: int | None = None) -> Tensor:
    """Unpack to [R, W], see `engine.kernels.reference.unpack`. Rows may be strided on both sides."""
    count, width = out.shape
    _check_packed(packed, spec, count, width)
    if isinstance(spec, FloatSpec) and out.dtype != torch.float32:
        return reference.unpack(packed, spec, out)  # a conversion that torch has
    buffer = None
    for start, stop in _row_chunks(out, spec):
        part = out[start:stop]
        if part.dtype != torch.float32 or part.stride(1) != 1:
            buffer = torch.empty(part.shape) if buffer is None else buffer[: stop - start]
            part = buffer
        library().unpack_matrix(
            pointer(format_of(spec, width)), packed[start // spec.block_rows :].data_ptr(),
            packed.stride(0), stop - start, part.data_ptr(), part.stride(0), threads_of(threads),
        )  # fmt: skip
        if part is buffer:
            out[start:stop] = part
    return out


class _Matrix(NamedTuple):
    """What C has to know of a matrix, checked: all that is the same at every product with it."""

    place: tuple[Any, int, int, int]
    """Its format, its first byte, bytes from block to block, rows."""

    width: int
    product: str = "multiply"
    """Name of the C function; the others multiply 8-bit activations with integers of 4 or 8 bits."""


def matmul(
    x: Tensor,
    matrix: PackedMatrix,
    bias: Tensor | None = None,
    precision: MatmulPrecision = MatmulPrecision.HIGHEST,
    out: Tensor | None = None,
    threads: int | None = None,
) -> Tensor:
    """See `engine.kernels.reference_attention.matmul`; the weights are never unpacked as a whole.

    Where the format has 8-bit activations, x is rounded per token and group, symmetrically, and the products
    of a group are exact integers.

    Args:
        x: [..., width] of any float kind, M tokens.
        out: float32 [M, rows] that receives the result, rows may be strided; a new one [..., rows] of x's
            kind if None.
    """
    prepared: _Matrix | None = matrix.prepared
    if prepared is None:
        prepared = _prepare(matrix)
        object.__setattr__(matrix, "prepared", prepared)
    if matrix.input_scale is not None:
        x = x / matrix.input_scale
    return _multiply(prepared, x, bias, precision, out, threads)


def _prepare(matrix: PackedMatrix) -> _Matrix:
    spec, width, data = matrix.spec, matrix.width, matrix.data
    _check_packed(data, spec, matrix.rows, width)
    place = pointer(format_of(spec, width)), data.data_ptr(), data.stride(0), matrix.rows
    if spec.activation_bits != 8:
        return _Matrix(place, width)
    if spec.bits == 8 and width > _LARGEST_INT8_WIDTH:  # of one group
        raise ValueError(f"rows of {width} 8-bit products may exceed 32 bits: use another format")
    return _Matrix(place, width, f"multiply_int{spec.bits}")


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    precision: MatmulPrecision = MatmulPrecision.HIGHEST,
    out: Tensor | None = None,
    threads: int | None = None,
) -> Tensor:
    """x [..., width] times a float32 weight [rows, width], transposed, as `F.linear`; see `matmul`."""
    rows, width = weight.shape
    if weight.dtype != torch.float32 or weight.stride(1) != 1:
        raise ValueError(f"weight {describe(weight)} is not float32 with consecutive values in a row")
    form = Format(bits=32, width=width, block_rows=1, kind=KINDS["float32"])
    place = pointer(form), weight.data_ptr(), 4 * weight.stride(0), rows
    return _multiply(_Matrix(place, width), x, bias, precision, out, threads)


def _multiply(
    matrix: _Matrix,
    x: Tensor,
    bias: Tensor | None,
    precision: MatmulPrecision,
    out: Tensor | None,
    threads: int | None,
) -> Tensor:
    """x [..., width] -> [..., rows]. Called for every linear layer of every pass, so overhead counts."""
    rows, width, shape, kind = matrix.place[3], matrix.width, x.shape, x.dtype
    if not shape or shape[-1] != width:
        raise ValueError(f"activations {describe(x)} are not [..., {width}]")
    count, stride = x.numel() // width, width
    if kind != torch.float32 or not x.is_contiguous():
        x = plain(x.reshape(-1, width))
        stride = x.stride(0)
    if out is None:
        result, result_stride = torch.empty((*shape[:-1], rows)), rows
    elif out.dtype != torch.float32 or out.shape != (count, rows) or out.stride(1) != 1:
        raise ValueError(f"output {describe(out)} is not float32 [{count}, {rows}]")
    else:
        result, result_stride = out, out.stride(0)
    if bias is not None and (bias.dtype != torch.float32 or not bias.is_contiguous()):
        bias = bias.float().contiguous()
    arguments = (
        *matrix.place, x.data_ptr(), stride, count, None if bias is None else bias.data_ptr(),
        result.data_ptr(), result_stride,
    )  # fmt: skip
    parts = (precision.parts,) if matrix.product == "multiply" else ()
    check(getattr(library(), matrix.product)(*arguments, *parts, threads_of(threads)))
    return result if out is not None or kind == torch.float32 else result.to(kind)


def pack_tokens(
    rows: Sequence[Tensor],
    form: KVFormat,
    keys: int,
    values: int,
    targets: Sequence[Tensor],
    threads: int | None = None,
) -> None:
    """Pack rows [T, keys + values], which may be strided, see `engine.kernels.reference.pack_tokens`."""
    tokens, block_bytes = form.block_tokens, form.block_bytes(keys, values)
    exact = [plain(part) for part in rows]
    table = np.empty((4, len(rows)), dtype=np.int64)  # blocks, rows, strides, targets
    for index, (part, target) in enumerate(zip(exact, targets, strict=True)):
        blocks, rest = divmod(len(part), tokens)
        if rest or part.shape[1] != keys + values:
            raise ValueError(f"tokens {describe(part)} are not [n * {tokens}, {keys + values}]")
        size = blocks * block_bytes
        if target.dtype != torch.uint8 or target.numel() != size or not target.is_contiguous():
            raise ValueError(f"{describe(target)} is not {blocks} contiguous blocks of {block_bytes} bytes")
        table[:, index] = blocks, part.data_ptr(), part.stride(0), target.data_ptr()
    status = library().pack_sequences(
        pointer(format_of(form.keys, keys)), pointer(format_of(form.values, values)), tokens,
        form.key_bytes(keys), block_bytes, len(rows), *(row.ctypes.data for row in table),
        threads_of(threads),
    )  # fmt: skip
    check(status)


def _row_chunks(rows: Tensor, spec: MatrixForm) -> list[tuple[int, int]]:
    """Ranges of rows: all at once if C takes them as they are, else a few at a time to bound the buffer."""
    if not rows.numel():
        return []
    if rows.dtype == torch.float32 and rows.stride(1) == 1:
        return [(0, len(rows))]
    return reference.row_chunks(rows, spec)


def _check_packed(packed: Tensor, spec: MatrixForm, rows: int, width: int) -> None:
    blocks, size = spec.blocks(rows), spec.block_bytes(width)
    if packed.dtype != torch.uint8 or packed.ndim != 2 or packed.shape[0] < blocks or packed.shape[1] != size:
        raise ValueError(
            f"packed {describe(packed)} is not uint8 [{blocks}, {size}] of {rows} rows as {spec}"
        )
    if packed.stride(1) != 1:
        raise ValueError("the bytes of a packed block have to be consecutive")
