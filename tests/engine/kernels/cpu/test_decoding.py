"""One new token per sequence, called by addresses, against the same computation step by step on tensors."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from engine.kernels import reference_attention
from engine.kernels.calls import AttentionCall, AttentionOptions, CachedSequence, DecodeTable, HeadShape
from engine.kernels.cpu import native
from engine.spec.kv_format import KVFormat
from tests.engine.kernels.cpu.native_inputs import attention_call, noise, packed_tokens, quick

pytestmark = pytest.mark.usefixtures("library")

SHAPES = (HeadShape(4, 4, 64, 64), HeadShape(6, 2, 24, 40), HeadShape(4, 1, 1, 8))
NOTHING = torch.empty(0, dtype=torch.uint8)


def fresh_tokens(count: int, shape: HeadShape) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values as models produce them: a token's heads contiguous, or strided."""
    query = noise(shape.heads, count, shape.key_width, seed=1).transpose(0, 1)
    key = noise(count, shape.groups, 2 * shape.key_width, seed=2)[..., : shape.key_width]
    return query, key, noise(count, shape.groups, shape.value_width, seed=3)


@quick
@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=5), st.sampled_from(SHAPES),
    st.sampled_from([None, 1, 7, 500]), st.sampled_from([1.0, 0.5, 0.01]), st.booleans(), st.integers(1, 3),
)  # fmt: skip
def test_over_exact_tokens(
    lengths: list[int], shape: HeadShape, window: int | None, fraction: float, sinks: bool, threads: int
) -> None:
    options = AttentionOptions(0.2, window, fraction=fraction, sinks=noise(shape.heads) if sinks else None)
    width = shape.keys + shape.values
    rows = [noise(length + 2, width, seed=length) for length in lengths]  # more rows than are needed
    before = [row.clone() for row in rows]
    query, key, value = fresh_tokens(len(lengths), shape)
    nothing = [0] * len(lengths)
    table = DecodeTable(nothing, nothing, [row.data_ptr() for row in rows], lengths, nothing)
    out, lse = (
        torch.empty(len(lengths), shape.heads, shape.value_width),
        torch.empty(len(lengths), shape.heads),
    )
    native.decode(AttentionCall(query, key, value, shape, options, out, lse), table, None, threads)
    fresh = torch.cat([key.flatten(1), value.flatten(1)], dim=1)
    for index, (row, length) in enumerate(zip(rows, lengths, strict=True)):
        assert torch.equal(row[length], fresh[index])
        untouched = [place for place in range(length + 2) if place != length]
        assert torch.equal(row[untouched], before[index][untouched])
    past = [CachedSequence(NOTHING, 0, row[: n + 1]) for row, n in zip(rows, lengths, strict=True)]
    expected, summed = torch.empty_like(out), torch.empty_like(lse)
    reference_attention.attention(attention_call(query, shape, options, expected, summed), past)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(lse, summed, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["4", "float16", "8-symmetric/3", "bfloat16/4"])
@pytest.mark.parametrize("shape", SHAPES[:2], ids=str)
def test_over_packed_tokens_and_packed_itself(name: str, shape: HeadShape) -> None:
    form, options, lengths = KVFormat.parse(name), AttentionOptions(0.2), (1, 30, 5)
    size, width = form.block_bytes(shape.keys, shape.values), shape.keys + shape.values
    data = [torch.full(((length + 2) * size,), 7, dtype=torch.uint8) for length in lengths]
    for stream, length in zip(data, lengths, strict=True):
        stream[: length * size] = packed_tokens(
            noise(length, width, seed=length), form, shape.keys, shape.values
        )
    packs = (True, False, True)  # the second one's row stays exact
    rows = torch.empty(3, width)
    begins, row_begins = [stream.data_ptr() for stream in data], [row.data_ptr() for row in rows]
    table = DecodeTable(begins, lengths, row_begins, [0] * 3, packs)
    query, key, value = fresh_tokens(3, shape)
    out = torch.empty(3, shape.heads, shape.value_width)
    native.decode(AttentionCall(query, key, value, shape, options, out), table, form, 2)
    fresh = torch.cat([key.flatten(1), value.flatten(1)], dim=1)
    past = [
        CachedSequence(stream, length, row[None])
        for stream, length, row in zip(data, lengths, fresh, strict=True)
    ]
    call = attention_call(query, shape, options, torch.empty_like(out))
    expected = reference_attention.attention(call, past, form)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)
    for index, (stream, length) in enumerate(zip(data, lengths, strict=True)):
        written = stream[length * size : (length + 1) * size]
        if packs[index]:
            assert torch.equal(written, packed_tokens(fresh[index][None], form, shape.keys, shape.values))
        else:
            assert (written == 7).all()
        assert (stream[(length + 1) * size :] == 7).all()


def test_a_value_that_cannot_be_packed() -> None:
    form, shape = KVFormat.parse("4"), SHAPES[0]
    stream = torch.zeros(2 * form.block_bytes(shape.keys, shape.values), dtype=torch.uint8)
    row = torch.empty(shape.keys + shape.values)
    table = DecodeTable([stream.data_ptr()], [1], [row.data_ptr()], [0], [1])
    query, key, value = fresh_tokens(1, shape)
    value = value.clone()
    value[0, 1, 3] = float("inf")
    call = AttentionCall(query, key, value, shape, AttentionOptions(1), torch.empty(1, 4, 64))
    with pytest.raises(ValueError, match="not finite"):
        native.decode(call, table, form)


def test_memory_is_not_touched_where_shapes_do_not_fit() -> None:
    shape, options = SHAPES[0], AttentionOptions(1.0)
    table = DecodeTable([0], [0], [0], [0], [0])
    query, key, value = fresh_tokens(1, shape)
    out = torch.empty(1, 4, 64)
    call = AttentionCall(query, key, value, shape, options, out)
    for wrong, match in (
        ({"query": query[:, :3]}, "query"), ({"key": key[..., :3]}, "keys"),
        ({"value": value[:, :1]}, "values"), ({"out": out.double()}, "output"),
        ({"lse": torch.empty(2, 4)}, "lse"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=match):
            native.decode(dataclasses.replace(call, **wrong), table)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="past of 0"):
        native.decode(call, DecodeTable([], [], [], [], []))


def test_sinks_of_other_kinds_of_numbers() -> None:
    shape = SHAPES[0]
    rows = noise(3, shape.keys + shape.values)
    query, key, value = fresh_tokens(1, shape)
    found = []
    for sinks in (noise(4).half(), noise(4).half().float()):
        out = torch.empty(1, 4, 64)
        options = dataclasses.replace(AttentionOptions(0.1), sinks=sinks)
        table = DecodeTable([0], [0], [rows.data_ptr()], [2], [0])
        native.decode(AttentionCall(query, key, value, shape, options, out), table)
        found.append(out)
    assert torch.equal(*found)
