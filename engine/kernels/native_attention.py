"""Attention in C over packed and exact tokens: one query per sequence, given as tensors or as addresses."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from engine.kernels.calls import AttentionOptions, CachedSequence, DecodeTable, HeadShape
from engine.kernels.native_calls import (
    Format,
    address,
    array,
    check,
    describe,
    format_of,
    integer,
    library,
    plain,
    pointer,
    threads_of,
)  # fmt: skip
from engine.spec.kv_format import KVFormat


class _AttentionCall(ctypes.Structure):
    """`attention_call` of csrc/attention.c."""

    _fields_ = [
        ("keys", ctypes.POINTER(Format)),
        ("values", ctypes.POINTER(Format)),
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
        *((name, ctypes.c_void_p) for name in ("first", "kept", "query", "out", "totals")),
        *((name, ctypes.c_int64) for name in ("query_stride", "out_stride")),
    ]


def attention(
    query: Tensor,
    sequences: Sequence[CachedSequence],
    form: KVFormat,
    shape: HeadShape,
    options: AttentionOptions,
    out: Tensor,
    threads: int | None = None,
    totals: Tensor | None = None,
) -> Tensor:
    """See `engine.kernels.reference_attention.attention`."""
    count = len(sequences)
    for name, tensor, width in (("query", query, shape.key_width), ("output", out, shape.value_width)):
        if tensor.shape != (count, shape.heads, width):
            raise ValueError(f"{name} {describe(tensor)} is not [{count}, {shape.heads}, {width}]")
    query = query.float().contiguous()
    direct = out.dtype == torch.float32 and out.is_contiguous()
    result = out if direct else torch.empty(out.shape)
    exact = [plain(sequence.rows) for sequence in sequences]
    places = _Places(*_sequence_table(sequences, exact, form, shape, options))
    _attend(query, places, form, shape, options, result, totals, threads)
    return out if direct else out.copy_(result)


def decode(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    table: DecodeTable,
    form: KVFormat | None,
    shape: HeadShape,
    options: AttentionOptions,
    out: Tensor,
    threads: int | None = None,
    totals: Tensor | None = None,
) -> None:
    """Append one token per sequence to its exact rows, attend, and pack the rows that are to be packed.

    Does for a whole batch, from addresses, what `attention` and `pack_tokens` do from tensors.

    Args:
        query: float32 [S, H, D]; key [S, G, D] and value [S, G, E] of the fresh tokens.
        form: how packed tokens are kept, blocks of one token; None where none are.
        out: float32 [S, H, E], contiguous.
        totals: see `engine.kernels.reference_attention.attention`.

    Raises:
        ValueError: if a value is not finite or a group exceeds the range of fp16.
    """
    count = len(query)
    query, keys, values = (plain(part.reshape(count, -1)) for part in (query, key, value))
    for name, tensor, width in (("query", query, shape.heads * shape.key_width), ("keys", keys, shape.keys),
                                ("values", values, shape.values)):  # fmt: skip
        if tensor.shape[1] != width:
            raise ValueError(f"{name} {describe(tensor)} are not [{count}, {width}]")
    wanted = (count, shape.heads, shape.value_width)
    if out.dtype != torch.float32 or not out.is_contiguous() or out.shape != wanted:
        raise ValueError(f"output {describe(out)} is not float32 {list(wanted)}")
    library().append_rows(
        integer(count), array(table.rows), array(table.row_counts), address(keys), integer(keys.stride(0)),
        integer(shape.keys), address(values), integer(values.stride(0)), integer(shape.values),
    )  # fmt: skip
    known = form or KVFormat()  # where all are exact, nothing is packed in it
    total = table.packed_tokens + table.row_counts + 1
    visible = total if options.window is None else np.minimum(total, options.window)
    places = _Places(
        table.packed, table.packed_tokens, table.rows, table.row_counts + 1,
        np.full(count, shape.keys + shape.values), total - visible, options.kept_of(visible - 1),
    )  # fmt: skip
    _attend(query, places, known, shape, options, out, totals, threads)
    if form is None or not table.packs.any():
        return
    chosen = np.flatnonzero(table.packs)
    size = form.block_bytes(shape.keys, shape.values)
    targets = table.packed[chosen] + table.packed_tokens[chosen] * size
    columns = np.ones(len(chosen), np.int64), table.rows[chosen], places.row_strides[chosen], targets
    check(library().pack_sequences(
        pointer(format_of(form.keys, shape.keys)), pointer(format_of(form.values, shape.values)), integer(1),
        integer(form.key_bytes(shape.keys)), integer(size), integer(len(chosen)), *map(array, columns),
        threads_of(threads),
    ))  # fmt: skip


class _Places(NamedTuple):
    """What C has to know of each sequence, int64 [S] each: addresses, lengths, what is visible and counts."""

    packed: np.ndarray
    packed_tokens: np.ndarray
    rows: np.ndarray
    row_counts: np.ndarray
    row_strides: np.ndarray
    first: np.ndarray
    kept: np.ndarray


def _attend(
    query: Tensor, places: _Places, form: KVFormat, shape: HeadShape, options: AttentionOptions, out: Tensor,
    totals: Tensor | None, threads: int | None,
) -> None:  # fmt: skip
    """Call C: float32 queries [S, H * D], consecutive in a row, to a contiguous float32 output."""
    wanted = (len(query), shape.heads)
    if totals is not None and (
        totals.shape != wanted or totals.dtype != torch.float32 or not totals.is_contiguous()
    ):
        raise ValueError(f"totals {describe(totals)} are not float32 {list(wanted)}")
    sinks = None if options.sinks is None else options.sinks.float().contiguous()
    arrays = [np.ascontiguousarray(column, dtype=np.int64) for column in places]
    packed, packed_tokens, rows, row_counts, row_strides, first, kept = (each.ctypes.data for each in arrays)
    call = _AttentionCall(
        keys=ctypes.pointer(format_of(form.keys, shape.keys)),
        values=ctypes.pointer(format_of(form.values, shape.values)),
        block_tokens=form.block_tokens, block_bytes=form.block_bytes(shape.keys, shape.values),
        key_bytes=form.key_bytes(shape.keys), heads=shape.heads, groups=shape.groups,
        key_width=shape.key_width, value_width=shape.value_width,
        sinks=None if sinks is None else sinks.data_ptr(), scale=options.scale,
        softcap=options.softcap or 0.0, sequences=len(query), packed=packed, packed_tokens=packed_tokens,
        rows=rows, row_counts=row_counts, row_strides=row_strides, first=first, kept=kept,
        query=query.data_ptr(), out=out.data_ptr(), query_stride=query.stride(0), out_stride=out.stride(0),
        totals=None if totals is None else totals.data_ptr(),
    )  # fmt: skip
    check(library().attend_sequences(pointer(call), threads_of(threads)))


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
            raise ValueError(f"exact tokens {describe(rows)} are not [n, {width}]")
        if packed.dtype != torch.uint8 or packed.numel() < needed or not packed.is_contiguous():
            raise ValueError(
                f"{describe(packed)} does not hold {needed} contiguous bytes of {packed_tokens} tokens"
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
