"""Attention in C over packed and exact tokens: one query per sequence, given as tensors or as addresses."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from engine.kernels.calls import AttentionCall, CachedSequence, DecodeTable, HeadShape
from engine.kernels.cpu.calls import (
    Format,
    check,
    check_results,
    describe,
    fields,
    format_of,
    library,
    plain,
    pointer,
    threads_of,
)  # fmt: skip
from engine.spec.kv_format import KVFormat


class _AttentionArguments(ctypes.Structure):
    """`attention_call` of csrc/attention.c."""

    _fields_ = [
        *fields(ctypes.POINTER(Format), "keys values"),
        *fields(ctypes.c_int64, "block_tokens block_bytes key_bytes"),
        *fields(ctypes.c_int64, "heads groups key_width value_width"),
        ("sinks", ctypes.c_void_p),
        *fields(ctypes.c_double, "scale softcap"),
        ("sequences", ctypes.c_int64),
        *fields(ctypes.c_void_p, "packed packed_tokens rows row_counts row_strides"),
        ("window", ctypes.c_int64),
        ("fraction", ctypes.c_double),
        *fields(ctypes.c_void_p, "query out lse"),
        *fields(ctypes.c_int64, "query_stride out_stride"),
    ]


class _DecodeArguments(ctypes.Structure):
    """`decode_call` of csrc/decoding.c."""

    _fields_ = [
        ("attention", _AttentionArguments),
        *fields(ctypes.c_void_p, "packed packed_tokens rows row_counts packs keys values"),
        *fields(ctypes.c_int64, "key_stride value_stride"),
    ]


_EXACT = KVFormat()  # where all tokens are exact, nothing is packed in it


def attention(
    call: AttentionCall,
    sequences: Sequence[CachedSequence],
    form: KVFormat | None = None,
    threads: int | None = None,
) -> Tensor:
    """See `engine.kernels.reference_attention.attention`."""
    count, shape, out, form = len(sequences), call.shape, call.out, form or _EXACT
    query = _rows("query", call.query, (count, shape.heads, shape.key_width))
    direct = out.dtype == torch.float32 and out.is_contiguous()
    result = out if direct else torch.empty(out.shape)
    check_results(result, call.lse, count, shape)
    exact = [plain(sequence.rows) for sequence in sequences]
    table = _sequence_table(sequences, exact, form, shape)
    arguments = _AttentionArguments.from_buffer_copy(_template(form, shape))
    sinks = call.options.sinks  # has to outlive the call, as does the table
    sinks = None if sinks is None else sinks.float().contiguous()
    _complete(arguments, call, query, sinks, result)
    (
        arguments.packed, arguments.packed_tokens, arguments.rows, arguments.row_counts, arguments.row_strides
    ) = (column.ctypes.data for column in table)  # fmt: skip
    check(library().attend_sequences(pointer(arguments), threads_of(threads)))
    return out if direct else out.copy_(result)


def decode(
    call: AttentionCall, table: DecodeTable, form: KVFormat | None = None, threads: int | None = None
) -> None:
    """Append one token per sequence to its exact rows, attend, and pack the rows that are to be packed.

    Does for a whole batch, from addresses, what `attention` and `pack_tokens` do from tensors.

    Args:
        call: with ``out`` [S, H, E] float32, contiguous.
        form: how packed tokens are kept, in blocks of one token; None where none are.

    Raises:
        ValueError: if a value is not finite or a group exceeds the range of fp16.
    """
    shape, out, count = call.shape, call.out, len(call.query)
    query = _rows("query", call.query, (count, shape.heads, shape.key_width))
    key = _rows("keys", call.key, (count, shape.groups, shape.key_width))
    value = _rows("values", call.value, (count, shape.groups, shape.value_width))
    check_results(out, call.lse, count, shape)
    if len(table) != count:
        raise ValueError(f"the past of {len(table)} sequences is not that of {count}")
    arguments = _DecodeArguments(
        _template(form or _EXACT, shape), *table.addresses, key.data_ptr(), value.data_ptr(), key.stride(0),
        value.stride(0),
    )  # fmt: skip
    sinks = call.options.sinks  # has to outlive the call
    sinks = None if sinks is None else sinks.float().contiguous()
    _complete(arguments.attention, call, query, sinks, out)
    check(library().decode_sequences(pointer(arguments), threads_of(threads)))


@lru_cache(maxsize=64)
def _template(form: KVFormat, shape: HeadShape) -> _AttentionArguments:
    """Arguments with what all layers of a model have in common."""
    return _AttentionArguments(
        keys=ctypes.pointer(format_of(form.keys, shape.keys)),
        values=ctypes.pointer(format_of(form.values, shape.values)),
        block_tokens=form.block_tokens, block_bytes=form.block_bytes(shape.keys, shape.values),
        key_bytes=form.key_bytes(shape.keys), heads=shape.heads, groups=shape.groups,
        key_width=shape.key_width, value_width=shape.value_width,
    )  # fmt: skip


def _rows(name: str, heads: Tensor, wanted: tuple[int, int, int]) -> Tensor:
    """[S, heads, width] as float32, each sequence's values consecutive; the tensor itself if it is so."""
    if heads.shape != wanted:
        raise ValueError(f"{name} {describe(heads)} are not {list(wanted)}")
    _, between, step = heads.stride()
    if heads.dtype == torch.float32 and step == 1 and between == heads.shape[2]:
        return heads
    return heads.to(torch.float32).contiguous()


def _complete(
    arguments: _AttentionArguments, call: AttentionCall, query: Tensor, sinks: Tensor | None, out: Tensor
) -> None:
    """Fill in what differs from call to call, except the sequences; ``query`` and ``out`` as C takes them."""
    options, lse = call.options, call.lse
    arguments.sinks = None if sinks is None else sinks.data_ptr()
    arguments.scale, arguments.softcap = options.scale, options.softcap or 0.0
    arguments.window, arguments.fraction = options.window or 0, options.fraction
    arguments.sequences = query.shape[0]
    arguments.query, arguments.query_stride = query.data_ptr(), query.stride(0)
    arguments.out, arguments.out_stride = out.data_ptr(), out.stride(0)
    arguments.lse = None if lse is None else lse.data_ptr()


def _sequence_table(
    sequences: Sequence[CachedSequence], exact: Sequence[Tensor], form: KVFormat, shape: HeadShape
) -> np.ndarray:
    """Of each sequence, int64 [5, S]: packed, packed_tokens, rows, row_counts, row_strides."""
    tokens, block_bytes = form.block_tokens, form.block_bytes(shape.keys, shape.values)
    width = shape.keys + shape.values
    table = []
    for sequence, rows in zip(sequences, exact, strict=True):
        packed, packed_tokens = sequence.packed, sequence.packed_tokens
        needed = -(-packed_tokens // tokens) * block_bytes
        if rows.ndim != 2 or rows.shape[1] != width:
            raise ValueError(f"exact tokens {describe(rows)} are not [n, {width}]")
        if packed.dtype != torch.uint8 or packed.numel() < needed or not packed.is_contiguous():
            raise ValueError(
                f"{describe(packed)} does not hold {needed} contiguous bytes of {packed_tokens} tokens"
            )
        if packed_tokens + len(rows) < 1:
            raise ValueError("a sequence without tokens has nothing to attend to")
        table.append((packed.data_ptr(), packed_tokens, rows.data_ptr(), len(rows), rows.stride(0)))
    return np.array(table, dtype=np.int64).reshape(-1, 5).T.copy()
