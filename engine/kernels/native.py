"""The kernels in C, with the signatures and the results of the references; tensors are on the CPU.

Knows how tensors are handed to C and what must hold before memory is touched; the arithmetic is in
``csrc``, in float32: other kinds of numbers are converted on the way in and out. All functions take the
number of threads, torch's own where none is given. They raise RuntimeError where there is no library.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from engine.kernels import build, reference
from engine.kernels.calls import AttentionOptions, CachedSequence, HeadShape, PackedMatrix
from engine.spec.float_format import FloatSpec, MatrixForm
from engine.spec.kv_format import KVFormat
from engine.spec.layout import CONVERT_VALUES
from engine.spec.quant import Along, Fit, Offset, QuantSpec

_OFFSETS = {Offset.MINIMUM: 0, Offset.ZERO: 1, Offset.MIDDLE: 2}
_KINDS = {"float16": 1, "bfloat16": 2, "float32": 3}  # 0: codes
_LARGEST_INT8_WIDTH = 65536  # products of 255 * 127 whose sum 32 bits hold


class _Format(ctypes.Structure):
    """`format` of csrc/formats.h."""

    _fields_ = [
        (name, ctypes.c_int64)
        for name in (
            "bits",
            "group",
            "offset",
            "along",
            "fit",
            "width",
            "groups",
            "code_bytes",
            "block_rows",
            "kind",
        )
    ]


class _AttentionCall(ctypes.Structure):
    """`attention_call` of csrc/attention.c."""

    _fields_ = [
        ("keys", ctypes.POINTER(_Format)),
        ("values", ctypes.POINTER(_Format)),
        *((name, ctypes.c_int64) for name in ("block_tokens", "block_bytes", "key_bytes")),
        *((name, ctypes.c_int64) for name in ("heads", "groups", "key_width", "value_width")),
        ("sinks", ctypes.c_void_p),
        ("scale", ctypes.c_double),
        ("softcap", ctypes.c_double),
        ("sequences", ctypes.c_int64),
        *(
            (name, ctypes.c_void_p)
            for name in ("packed", "packed_tokens", "rows", "row_counts", "row_strides")
        ),
        *((name, ctypes.c_void_p) for name in ("first", "kept", "query", "out")),
        *((name, ctypes.c_int64) for name in ("query_stride", "out_stride")),
    ]


@lru_cache(maxsize=256)
def _format(spec: MatrixForm, width: int) -> _Format:
    if isinstance(spec, FloatSpec):
        return _Format(bits=spec.bits, width=width, block_rows=1, kind=_KINDS[spec.dtype])
    return _Format(
        bits=spec.bits,
        group=spec.group(width),
        offset=_OFFSETS[spec.offset],
        along=int(spec.along is Along.COLUMN),
        fit=int(spec.fit is Fit.ERROR),
        width=width,
        groups=spec.groups(width),
        code_bytes=spec.code_bytes(width),
        block_rows=spec.block_rows,
    )


def available() -> bool:
    """Whether the kernels can be used."""
    return build.library() is not None


def reason() -> str:
    """Why they cannot, in one line; empty where they can."""
    return build.reason()


def pack(values: Tensor, spec: QuantSpec, out: Tensor, threads: int | None = None) -> Tensor:
    """See `engine.kernels.reference.pack`. Values that are not float32 pass through a small buffer.

    Raises:
        ValueError: if a value is not finite or a group exceeds the range of fp16.
    """
    count, width = values.shape
    _check_packed(out, spec, count, width)
    for start, stop in _row_chunks(values, spec):
        part = values[start:stop]
        if part.dtype != torch.float32 or part.stride(1) != 1:
            part = part.to(torch.float32, memory_format=torch.contiguous_format)
        status = _library().pack_matrix(
            _pointer(_format(spec, width)), _address(part), _int(part.stride(0)), _int(stop - start),
            _address(out[start // spec.block_rows :]), _int(out.stride(0)), _threads(threads),
        )  # fmt: skip
        _check(status)
    return out


def unpack(packed: Tensor, spec: MatrixForm, out: Tensor, threads: int | None = None) -> Tensor:
    """See `engine.kernels.reference.unpack`. Rows may be strided on both sides."""
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
        _library().unpack_matrix(
            _pointer(_format(spec, width)), _address(packed[start // spec.block_rows :]),
            _int(packed.stride(0)), _int(stop - start), _address(part), _int(part.stride(0)),
            _threads(threads),
        )  # fmt: skip
        if part is buffer:
            out[start:stop] = part
    return out


def matmul(
    x: Tensor,
    matrix: PackedMatrix,
    bias: Tensor | None = None,
    out: Tensor | None = None,
    threads: int | None = None,
) -> Tensor:
    """See `engine.kernels.reference_attention.matmul`; the weights are never unpacked as a whole.

    Where the format has 8-bit activations, x is rounded per token, symmetrically, and products are exact
    integers.

    Args:
        x: [M, width] of any float kind.
        out: float32 [M, rows] that receives the result; a new one of x's kind if None. Rows may be strided.
    """
    spec, width = matrix.spec, matrix.width
    if x.ndim != 2 or x.shape[1] != width:
        raise ValueError(f"activations {_describe(x)} are not [M, {width}]")
    _check_packed(matrix.data, spec, matrix.rows, width)
    if spec.activation_bits == 8 and width > _LARGEST_INT8_WIDTH:
        raise ValueError(f"rows of {width} 8-bit products may exceed 32 bits: use another format")
    if matrix.input_scale is not None:
        x = x / matrix.input_scale
    place = (matrix.data.data_ptr(), matrix.data.stride(0), matrix.rows)
    return _multiply(_format(spec, width), place, x, bias, out, threads, spec.activation_bits == 8)


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    out: Tensor | None = None,
    threads: int | None = None,
) -> Tensor:
    """x [M, width] times a float32 weight [rows, width], transposed, as `F.linear`; see `matmul`."""
    rows, width = weight.shape
    if x.ndim != 2 or x.shape[1] != width:
        raise ValueError(f"activations {_describe(x)} are not [M, {width}]")
    if weight.dtype != torch.float32 or weight.stride(1) != 1:
        raise ValueError(f"weight {_describe(weight)} is not float32 with consecutive values in a row")
    form = _Format(bits=32, width=width, block_rows=1, kind=_KINDS["float32"])
    return _multiply(form, (weight.data_ptr(), 4 * weight.stride(0), rows), x, bias, out, threads)


def _multiply(
    form: _Format,
    place: tuple[int, int, int],
    x: Tensor,
    bias: Tensor | None,
    out: Tensor | None,
    threads: int | None,
    int8: bool = False,
) -> Tensor:
    """The product with a matrix at an address, so many bytes from block to block, of so many rows."""
    address, stride, rows = place
    kind, x = x.dtype, _plain(x)
    result = torch.empty(len(x), rows) if out is None else out
    if result.dtype != torch.float32 or result.shape != (len(x), rows) or result.stride(1) != 1:
        raise ValueError(f"output {_describe(result)} is not float32 [{len(x)}, {rows}]")
    bias = None if bias is None else bias.float().contiguous()
    multiply = _library().multiply_int8 if int8 else _library().multiply
    status = multiply(
        _pointer(form), ctypes.c_void_p(address), _int(stride), _int(rows), _address(x), _int(x.stride(0)),
        _int(len(x)), None if bias is None else _address(bias), _address(result), _int(result.stride(0)),
        _threads(threads),
    )  # fmt: skip
    _check(status)
    return result if out is not None else result.to(kind)


def pack_tokens(
    rows: Sequence[Tensor],
    form: KVFormat,
    keys: int,
    values: int,
    targets: Sequence[Tensor],
    threads: int | None = None,
) -> None:
    """Pack full blocks of tokens of several sequences.

    Args:
        rows: per sequence [T, keys + values], T a multiple of `KVFormat.block_tokens`. May be strided.
        targets: per sequence contiguous uint8 for exactly its blocks.

    Raises:
        ValueError: if a value is not finite or a group exceeds the range of fp16.
    """
    tokens, block_bytes = form.block_tokens, form.block_bytes(keys, values)
    plain = [_plain(part) for part in rows]
    table = np.empty((4, len(rows)), dtype=np.int64)  # blocks, rows, strides, targets
    for index, (part, target) in enumerate(zip(plain, targets, strict=True)):
        blocks, rest = divmod(len(part), tokens)
        if rest or part.shape[1] != keys + values:
            raise ValueError(f"tokens {_describe(part)} are not [n * {tokens}, {keys + values}]")
        if (
            target.dtype != torch.uint8
            or target.numel() != blocks * block_bytes
            or not target.is_contiguous()
        ):
            raise ValueError(f"{_describe(target)} is not {blocks} contiguous blocks of {block_bytes} bytes")
        table[:, index] = blocks, part.data_ptr(), part.stride(0), target.data_ptr()
    status = _library().pack_sequences(
        _pointer(_format(form.keys, keys)), _pointer(_format(form.values, values)), _int(tokens),
        _int(form.key_bytes(keys)), _int(block_bytes), _int(len(rows)),
        *(ctypes.c_void_p(row.ctypes.data) for row in table), _threads(threads),
    )  # fmt: skip
    _check(status)


def attention(
    query: Tensor,
    sequences: Sequence[CachedSequence],
    form: KVFormat,
    shape: HeadShape,
    options: AttentionOptions,
    out: Tensor,
    threads: int | None = None,
) -> Tensor:
    """See `engine.kernels.reference_attention.attention`."""
    count = len(sequences)
    for name, tensor, width in (("query", query, shape.key_width), ("output", out, shape.value_width)):
        if tensor.shape != (count, shape.heads, width):
            raise ValueError(f"{name} {_describe(tensor)} is not [{count}, {shape.heads}, {width}]")
    query = query.float().contiguous()
    direct = out.dtype == torch.float32 and out.is_contiguous()
    result = out if direct else torch.empty(out.shape)
    sinks = None if options.sinks is None else options.sinks.float().contiguous()
    exact = [_plain(sequence.rows) for sequence in sequences]
    table = _sequence_table(sequences, exact, form, shape, options)
    packed, packed_tokens, rows, row_counts, row_strides, first, kept = (row.ctypes.data for row in table)
    call = _AttentionCall(
        keys=ctypes.pointer(_format(form.keys, shape.keys)),
        values=ctypes.pointer(_format(form.values, shape.values)),
        block_tokens=form.block_tokens, block_bytes=form.block_bytes(shape.keys, shape.values),
        key_bytes=form.key_bytes(shape.keys), heads=shape.heads, groups=shape.groups,
        key_width=shape.key_width, value_width=shape.value_width,
        sinks=None if sinks is None else sinks.data_ptr(), scale=options.scale,
        softcap=options.softcap or 0.0, sequences=count, packed=packed, packed_tokens=packed_tokens,
        rows=rows, row_counts=row_counts, row_strides=row_strides, first=first, kept=kept,
        query=query.data_ptr(), out=result.data_ptr(), query_stride=query.stride(0),
        out_stride=result.stride(0),
    )  # fmt: skip
    _check(_library().attend_sequences(_pointer(call), _threads(threads)))
    return out if direct else out.copy_(result)


def _sequence_table(
    sequences: Sequence[CachedSequence],
    exact: Sequence[Tensor],
    form: KVFormat,
    shape: HeadShape,
    options: AttentionOptions,
) -> np.ndarray:
    """What C has to know of each sequence, int64 [7, S]: addresses, lengths, what is visible, what counts."""
    tokens, block_bytes = form.block_tokens, form.block_bytes(shape.keys, shape.values)
    width, window = shape.keys + shape.values, options.window
    table = []
    for sequence, rows in zip(sequences, exact, strict=True):
        packed, packed_tokens = sequence.packed, sequence.packed_tokens
        needed = -(-packed_tokens // tokens) * block_bytes
        if rows.ndim != 2 or rows.shape[1] != width:
            raise ValueError(f"exact tokens {_describe(rows)} are not [n, {width}]")
        if packed.dtype != torch.uint8 or packed.numel() < needed or not packed.is_contiguous():
            raise ValueError(
                f"{_describe(packed)} does not hold {needed} contiguous bytes of {packed_tokens} tokens"
            )
        total = packed_tokens + len(rows)
        if total < 1:
            raise ValueError("a sequence without tokens has nothing to attend to")
        visible = min(total, window or total)
        table.append((
            packed.data_ptr(), packed_tokens, rows.data_ptr(), len(rows), rows.stride(0), total - visible,
            options.kept(visible - 1),
        ))  # fmt: skip
    return np.array(table, dtype=np.int64).reshape(-1, 7).T.copy()


def _library() -> ctypes.CDLL:
    library = build.library()
    if library is None:
        raise RuntimeError(f"the compiled kernels are not available: {build.reason()}")
    return library


def _row_chunks(rows: Tensor, spec: MatrixForm) -> list[tuple[int, int]]:
    """Ranges of rows: all at once where C takes them as they are, else few at a time to bound the buffer."""
    count, width = rows.shape
    if count == 0 or width == 0:
        return []
    step = count
    if rows.dtype != torch.float32 or rows.stride(1) != 1:
        step = max(1, CONVERT_VALUES // (width * spec.block_rows)) * spec.block_rows
    return [(start, min(start + step, count)) for start in range(0, count, step)]


def _check_packed(packed: Tensor, spec: MatrixForm, rows: int, width: int) -> None:
    blocks, size = spec.blocks(rows), spec.block_bytes(width)
    if packed.dtype != torch.uint8 or packed.ndim != 2 or len(packed) < blocks or packed.shape[1] != size:
        raise ValueError(
            f"packed {_describe(packed)} is not uint8 [{blocks}, {size}] of {rows} rows as {spec}"
        )
    if packed.stride(1) != 1:
        raise ValueError("the bytes of a packed block have to be consecutive")


def _plain(rows: Tensor) -> Tensor:
    """float32 with consecutive values in a row: the tensor itself where it is so."""
    if rows.dtype != torch.float32:
        rows = rows.float()
    return rows if rows.stride(-1) == 1 else rows.contiguous()


def _describe(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def _check(status: int) -> None:
    if status == 1:
        raise ValueError("a value is not finite or beyond the range of float16")
    if status:
        raise MemoryError("no memory for the buffers of the compiled kernels")


def _threads(threads: int | None) -> int:
    return threads or torch.get_num_threads()


_pointer, _int = ctypes.byref, ctypes.c_int64


def _address(tensor: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())
