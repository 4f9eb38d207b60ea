"""The C kernels against the references, compiled for several kinds of machine."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engine.kernels import reference, reference_attention
from engine.kernels.calls import AttentionOptions, HeadShape, PackedMatrix
from engine.kernels.cpu import native
from engine.spec.kv_format import KVFormat
from engine.spec.quant import FORMATS, Along, Fit, Offset, QuantSpec
from tests.engine.kernels.cpu.native_inputs import (
    attention_call,
    cached_sequence,
    empty_packed,
    noise,
    packed_matrix,
    packed_tokens,
    quick,
    specs,
)

# The library is chosen per module and not changed by any test.

pytestmark = pytest.mark.usefixtures("library")


@quick
@given(specs(), st.integers(1, 150), st.integers(1, 200), st.integers(0, 3), st.integers(1, 3))
def test_pack_repeats_the_reference_bit_by_bit(
    spec: QuantSpec, rows: int, width: int, seed: int, threads: int
) -> None:
    values = noise(rows, width + 5, seed=seed)[:, :width]
    expected = reference.pack(values, spec, empty_packed(spec, rows, width))
    assert torch.equal(native.pack(values, spec, empty_packed(spec, rows, width), threads), expected)


@pytest.mark.parametrize("offset", Offset)
@pytest.mark.parametrize("along", Along)
@pytest.mark.parametrize("size", [1e-9, 1e-6, 1e-4, 1.0, 1e4, 6e4])
def test_pack_of_narrow_wide_and_constant_groups(offset: Offset, along: Along, size: float) -> None:
    values = torch.cat([noise(64, 64).clamp(-1, 1) * size, torch.full((64, 64), size)], dim=1)
    values[:, 7] = 0
    for bits in (2, 3, 4, 8):
        spec = QuantSpec(bits, 64, offset, along)
        expected = reference.pack(values, spec, empty_packed(spec, 64, 128))
        assert torch.equal(native.pack(values, spec, empty_packed(spec, 64, 128)), expected)


@quick
@given(specs(fits=(Fit.ERROR,)), st.integers(1, 70), st.integers(1, 140), st.sampled_from((1e-3, 1.0, 50.0)))
def test_the_fit_of_least_error_repeats_the_reference_bit_by_bit(
    spec: QuantSpec, rows: int, width: int, size: float
) -> None:
    values = noise(rows, width) ** 3 * size
    expected = reference.pack(values, spec, empty_packed(spec, rows, width))
    assert torch.equal(native.pack(values, spec, empty_packed(spec, rows, width)), expected)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf"), 7e7, -7e7])
@pytest.mark.parametrize("name", ["4", "4-zero", "4-symmetric", "3-column", "8-mse", "2-g128-symmetric-mse"])
def test_what_fp16_cannot_scale_is_refused(value: float, name: str) -> None:
    spec = QuantSpec.parse(name)
    values = noise(130, 200)
    values[77, 190] = value
    with pytest.raises(ValueError, match="not finite"):
        native.pack(values, spec, empty_packed(spec, 130, 200))
    form = KVFormat(spec, spec)
    with pytest.raises(ValueError, match="not finite"):
        target = torch.empty(128 // form.block_tokens * form.block_bytes(100, 100), dtype=torch.uint8)
        native.pack_tokens([values[:128]], form, 100, 100, [target])


@quick
@given(specs(), st.integers(1, 150), st.integers(1, 400), st.integers(1, 3))
def test_unpack(spec: QuantSpec, rows: int, width: int, threads: int) -> None:
    data = packed_matrix(spec, rows, width).data
    framed = torch.cat([data, data[:, :3]], dim=1)[:, :-3]  # blocks that are not contiguous
    expected = reference.unpack(data, spec, torch.empty(rows, width))
    out = torch.full((rows, width + 2), 9.0)
    native.unpack(framed, spec, out[:, :width], threads)
    if spec.offset is Offset.MINIMUM:  # a fused multiply-add rounds once
        torch.testing.assert_close(out[:, :width], expected, rtol=1e-6, atol=1e-6)
    else:
        assert torch.equal(out[:, :width], expected)
    assert (out[:, width:] == 9).all()


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", ["4-symmetric", "3-g128-column-symmetric"])
def test_other_kinds_of_numbers_pass_through_a_buffer(kind: torch.dtype, name: str) -> None:
    spec, rows, width = QuantSpec.parse(name), 1100, 300  # more than fit the buffer at once
    values = noise(rows, width).to(kind)
    expected = reference.pack(values, spec, empty_packed(spec, rows, width))
    assert torch.equal(native.pack(values, spec, empty_packed(spec, rows, width)), expected)
    out = native.unpack(expected, spec, torch.empty(rows, width, dtype=kind))
    assert torch.equal(out, reference.unpack(expected, spec, torch.empty(rows, width, dtype=kind)))


@quick
@given(specs(), st.integers(1, 70), st.integers(1, 150), st.integers(1, 300), st.booleans(), st.booleans())
def test_matmul(spec: QuantSpec, tokens: int, rows: int, width: int, biased: bool, scaled: bool) -> None:
    matrix = packed_matrix(spec, rows, width)
    if scaled:
        matrix = PackedMatrix(matrix.data, spec, rows, width, input_scale=noise(width, seed=3).abs() + 0.5)
    x = noise(tokens, width + 3, seed=1)[:, :width]
    bias = noise(rows, seed=2) if biased else None
    expected = reference_attention.matmul(x.double(), matrix, None if bias is None else bias.double())
    torch.testing.assert_close(native.matmul(x, matrix, bias).double(), expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 5, 8, 9, 16, 33, 513, 600])
@pytest.mark.parametrize("name", ["4", "flexgen", "3-g32-mse"])
def test_matmul_of_any_number_of_tokens(tokens: int, name: str) -> None:
    """Whole chunks of columns and a remainder, and more tokens than are computed at once."""
    matrix, x = packed_matrix(QuantSpec.parse(name), 67, 1400), noise(tokens, 1400, seed=1)
    out = torch.full((tokens, 70), 9.0)
    for threads in (1, 3):
        native.matmul(x, matrix, out=out[:, :67], threads=threads)
        torch.testing.assert_close(out[:, :67], reference_attention.matmul(x, matrix), rtol=1e-4, atol=1e-3)
    assert (out[:, 67:] == 9).all()


@pytest.mark.parametrize(
    ("tokens", "rows", "width"), [(1, 64, 4), (3, 9, 100), (9, 33, 4096), (64, 70, 1500)]
)
def test_products_of_8_bit_activations_are_exact_integers(tokens: int, rows: int, width: int) -> None:
    spec = FORMATS["w8a8"]
    matrix, x = packed_matrix(spec, rows, width), noise(tokens, width, seed=1) * 3
    x[0] = 0
    end = spec.code_bytes(width)
    weights = matrix.data[:, :width].numpy().astype(np.int64) - 128
    scales = matrix.data[:, end:].contiguous().view(torch.float16).double().numpy()[:, 0]
    steps = x.abs().amax(1, keepdim=True) / 127
    codes = torch.round(x / torch.where(steps > 0, steps, 1.0)).numpy().astype(np.int64)
    expected = (codes @ weights.T) * scales * steps.double().numpy() + 1
    got = native.matmul(x, matrix, torch.ones(rows)).double().numpy()
    np.testing.assert_allclose(got, expected, rtol=3e-7, atol=3e-7 * np.abs(expected).max())


@quick
@given(
    st.sampled_from((32, 64, 128)), st.integers(1, 150), st.integers(1, 70), st.integers(1, 300),
    st.booleans(), st.integers(1, 3),
)  # fmt: skip
def test_products_of_4_bit_weights_and_8_bit_activations(
    size: int, tokens: int, rows: int, width: int, biased: bool, threads: int
) -> None:
    """Against integers and scales of numpy; a difference of one code would be far beyond the tolerance."""
    spec = QuantSpec.parse(f"4-g{size}-symmetric-a8")
    matrix, x = packed_matrix(spec, rows, width), noise(tokens, width, seed=1) * 3
    x[0] = 0
    weights = reference.unpack(matrix.data, spec, torch.empty(rows, width)).double().numpy()
    expected = np.zeros((tokens, rows))
    for begin in range(0, width, size):
        part = x[:, begin : begin + size]
        steps = part.abs().amax(1, keepdim=True) / 127
        codes = torch.round(part / torch.where(steps > 0, steps, 1.0)).double()
        expected += (codes * steps.double()).numpy() @ weights[:, begin : begin + size].T
    bias = noise(rows, seed=2) if biased else None
    expected += 0 if bias is None else bias.double().numpy()
    out = torch.full((tokens, rows + 3), 9.0)
    got = native.matmul(x, matrix, bias, out=out[:, :rows], threads=threads).double().numpy()
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6 * max(1, np.abs(expected).max()))
    assert (out[:, rows:] == 9).all()
    torch.testing.assert_close(
        reference_attention.matmul(x, matrix, bias).double(), torch.from_numpy(expected), rtol=1e-5, atol=1e-5
    )


def test_each_group_of_activations_has_its_own_scale() -> None:
    """A value a thousand times as large as the others makes only its own group less accurate."""
    matrix, x = packed_matrix(QuantSpec.parse("4-g32-symmetric-a8"), 8, 96), noise(2, 96)
    exact = dataclasses.replace(matrix, spec=QuantSpec.parse("4-g32-symmetric"))
    weight = native.unpack(matrix.data, exact.spec, torch.empty(8, 96))
    x[:, 40] = 1000
    error = native.matmul(x, matrix) - native.matmul(x, exact)
    alone = x[:, 32:64].clone()
    alone[:, 8] = 0
    assert error.abs().max() < (alone.abs() @ weight[:, 32:64].abs().T).max() + 0.05


@pytest.mark.parametrize("name", ["w8a8", "w4a8"])
@pytest.mark.parametrize("value", ["nan", "inf"])
def test_activations_that_are_not_finite_are_not_hidden_by_rounding(name: str, value: str) -> None:
    x = noise(3, 64)
    x[1, 5] = float(value)
    got = native.matmul(x, packed_matrix(FORMATS[name], 8, 64))
    assert torch.isnan(got[1]).all()
    assert torch.isfinite(got[[0, 2]]).all()


KV_FORMATS = [
    "4", "kivi", "2-channel/2+64", "3", "8-symmetric", "4-g32-zero/4-g32-column", "4-row", "2-g8", "float16",
    "bfloat16", "float16/3", "4-g8-channel/bfloat16",
]  # fmt: skip
SHAPES = [
    HeadShape(4, 4, 64, 64),
    HeadShape(4, 2, 80, 80),
    HeadShape(6, 2, 128, 64),
    HeadShape(8, 1, 32, 32),
    HeadShape(6, 3, 12, 20),
    HeadShape(40, 20, 96, 96),
]
OPTIONS = {
    "plain": AttentionOptions(0.1),
    "window": AttentionOptions(0.1, window=33),
    "soft cap": AttentionOptions(0.7, softcap=5.0),
    "sinks": AttentionOptions(0.1),
    "fraction": AttentionOptions(0.3, fraction=0.2),
    "all": AttentionOptions(0.3, window=50, softcap=20.0, fraction=0.1),
}


@pytest.mark.parametrize("name", KV_FORMATS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_attention(name: str, shape: HeadShape) -> None:
    form = KVFormat.parse(name)
    sequences = [cached_sequence(form, shape, tokens, seed=tokens) for tokens in (1, 7, 70, 300)]
    query = noise(len(sequences), shape.heads, shape.key_width, seed=5)
    for case, options in OPTIONS.items():
        if case in ("sinks", "all"):
            options = dataclasses.replace(options, sinks=noise(shape.heads))
        out = torch.empty(len(sequences), shape.heads, shape.value_width)
        expected = reference_attention.attention(
            attention_call(query, shape, options, torch.empty_like(out)), sequences, form
        )
        for threads in (1, 3):
            native.attention(attention_call(query, shape, options, out), sequences, form, threads)
            assert torch.allclose(out, expected, rtol=1e-4, atol=1e-4), (case, threads)


def test_attention_in_another_kind_of_number() -> None:
    form, shape = KVFormat.parse("4"), HeadShape(4, 2, 64, 64)
    sequences = [cached_sequence(form, shape, 40)]
    query, options = noise(1, 4, 64), AttentionOptions(0.1)
    out = torch.empty(1, 4, 64)
    exact = native.attention(attention_call(query, shape, options, out), sequences, form)
    call = attention_call(query.double(), shape, options, out.double())
    rounded = native.attention(call, sequences, form)
    torch.testing.assert_close(rounded.float(), exact)


@pytest.mark.parametrize("name", KV_FORMATS)
@pytest.mark.parametrize(("keys", "values"), [(64, 64), (160, 160), (36, 60), (200, 72)])
def test_blocks_of_tokens_are_packed_as_matrices(name: str, keys: int, values: int) -> None:
    form = KVFormat.parse(name)
    rows = [noise(count * form.block_tokens, keys + values + 3, seed=count)[:, :-3] for count in (1, 0, 3)]
    targets = [torch.empty(len(r) // form.block_tokens * form.block_bytes(keys, values)).byte() for r in rows]
    native.pack_tokens(rows, form, keys, values, targets)
    for part, target in zip(rows, targets, strict=True):
        assert torch.equal(target, packed_tokens(part, form, keys, values))


def test_memory_is_not_touched_where_shapes_do_not_fit() -> None:
    spec, form, shape = QuantSpec(), KVFormat(), HeadShape(2, 2, 64, 64)
    small = torch.empty(3, spec.block_bytes(64), dtype=torch.uint8)
    with pytest.raises(ValueError, match="packed"):
        native.pack(noise(4, 64), spec, small)
    with pytest.raises(ValueError, match="packed"):
        native.unpack(small, spec, torch.empty(3, 65))
    with pytest.raises(ValueError, match="packed"):
        native.matmul(noise(1, 64), PackedMatrix(small, spec, 4, 64))
    with pytest.raises(ValueError, match="activations"):
        native.matmul(noise(1, 63), PackedMatrix(small, spec, 3, 64))
    with pytest.raises(ValueError, match="output"):
        native.matmul(noise(1, 64), PackedMatrix(small, spec, 3, 64), out=torch.empty(1, 4))
    with pytest.raises(ValueError, match="contiguous blocks"):
        native.pack_tokens([noise(2, 256)], form, 128, 128, [torch.empty(10, dtype=torch.uint8)])
    with pytest.raises(ValueError, match="query"):
        call = attention_call(noise(1, 2, 32), shape, AttentionOptions(1.0), torch.empty(0, 2, 64))
        native.attention(call, [], form)
