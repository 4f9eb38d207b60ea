"""Every format: its bytes read bit by bit, its rounding error, and what is refused."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from engine.kernels.reference import pack, unpack
from engine.spec.quant import WHOLE_ROW, Along, Fit, Offset, QuantSpec
from tests.support.packed_bytes import code_at, decoded, error_bound, grouped

FORMATS = [
    QuantSpec(bits, size, offset, along)
    for bits, size, offset, along in itertools.product(
        (2, 3, 4, 8), (8, 32, 64, 128, WHOLE_ROW), Offset, Along
    )
    if along is Along.ROW or size != WHOLE_ROW
]


def packed_by(values: Tensor, spec: QuantSpec) -> Tensor:
    rows, width = values.shape
    return pack(values, spec, torch.empty(spec.blocks(rows), spec.block_bytes(width), dtype=torch.uint8))


def round_trip(values: Tensor, spec: QuantSpec) -> Tensor:
    return unpack(packed_by(values, spec), spec, torch.empty(values.shape, dtype=torch.float32))


def noise(rows: int, width: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))


def assert_near(values: Tensor, spec: QuantSpec) -> None:
    got, exact = round_trip(values, spec).double().numpy(), values.double().numpy()
    assert (np.abs(got - exact) <= error_bound(exact, spec)).all()


@pytest.mark.parametrize("spec", FORMATS, ids=str)
def test_bytes_are_what_the_layout_says(spec: QuantSpec) -> None:
    rows, width = (7, 75) if spec.along is Along.ROW else (spec.group_size + 3, 5)
    values = noise(rows, width)
    packed = packed_by(values, spec)
    exact = decoded(packed.numpy().tobytes(), rows, width, spec)
    got = unpack(packed, spec, torch.empty(rows, width)).double().numpy()
    assert np.abs(got - exact).max() <= 2.0**-22 * np.abs(exact).max()


@pytest.mark.parametrize("spec", FORMATS, ids=str)
def test_codes_are_the_nearest(spec: QuantSpec) -> None:
    """Each code is the float64 nearest of its group's grid, up to ties in float32."""
    rows, width = (3, 40) if spec.along is Along.ROW else (spec.group_size, 4)
    values = noise(rows, width, 1)
    data = packed_by(values, spec).numpy().tobytes()
    for row in range(rows):
        for column in range(width):
            code, scale, offset = code_at(data, row, column, width, spec)
            value = float(values[row, column])
            if spec.offset is Offset.MINIMUM:
                place = (value - offset) / scale
            else:
                place = value / scale + (offset if spec.offset is Offset.ZERO else 2 ** (spec.bits - 1))
            assert abs(code - min(max(place, 0), spec.levels)) <= 0.5 + 1e-4


@pytest.mark.parametrize("spec", FORMATS, ids=str)
def test_any_shape_comes_back_within_a_step(spec: QuantSpec) -> None:
    for rows, width in itertools.product((1, 5, 70), (1, 2, 31, 33, 64, 65, 129, 640)):
        if rows * width < 5000:
            assert_near(noise(rows, width), spec)


@pytest.mark.parametrize("spec", FORMATS, ids=str)
def test_narrow_and_wide_groups(spec: QuantSpec) -> None:
    for scale in (0.0, 1e-12, 6e-8, 1e-6, 1e-4, 1.0, 1e4):
        for offset in (0.0, 1e-7, -3.0, 100.0, -6e4):
            assert_near((noise(3, 70) * scale + offset).clamp(-65504, 65504), spec)


@pytest.mark.parametrize("spec", [spec for spec in FORMATS if spec.offset is Offset.MINIMUM], ids=str)
def test_constant_groups_are_kept_but_for_the_half_precision_of_their_value(spec: QuantSpec) -> None:
    values = torch.tensor([0.0, 1.0, -2.5, 0.1, -0.1, 6e-8, -65504.0]).repeat_interleave(9)[:, None]
    if spec.along is Along.COLUMN:
        values = values.t()
    values = values.expand(63, 63).contiguous()
    precision = values.double().abs() * 2.0**-11 + 2.0**-25
    assert ((round_trip(values, spec).double() - values.double()).abs() <= precision).all()


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_a_group_narrower_than_fp16_can_divide_by_keeps_its_values_apart(bits: int) -> None:
    """FlexGen keeps the inverse of the step in fp16, which is infinite below a range of 2.3e-4."""
    values = torch.linspace(0, 1e-4, 64)[None]
    got = round_trip(values, QuantSpec(bits))
    assert len(got.unique()) == min(2**bits, 64) or bits == 8
    assert (got - values).abs().max() <= 1e-4 / (2**bits - 1) / 2 + 2**-24 * 2


def test_all_levels_are_exact() -> None:
    for spec in (QuantSpec(4), QuantSpec(3), QuantSpec(2, 8), QuantSpec(4, along=Along.COLUMN)):
        rows = (torch.arange(128) % (spec.levels + 1)).float() * 0.25 - 2
        values = rows[None] if spec.along is Along.ROW else rows[:, None]
        assert torch.equal(round_trip(values, spec), values)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_kinds_of_number(dtype: torch.dtype) -> None:
    values = noise(64, 128).to(dtype)
    for spec in (QuantSpec(), QuantSpec(3, along=Along.COLUMN)):
        assert torch.equal(packed_by(values, spec), packed_by(values.float(), spec))
        out = unpack(packed_by(values, spec), spec, torch.empty(values.shape, dtype=dtype))
        assert torch.equal(out, round_trip(values.float(), spec).to(dtype))


@pytest.mark.parametrize("spec", [QuantSpec(), QuantSpec(3, along=Along.COLUMN)], ids=str)
def test_more_rows_than_fit_one_chunk(spec: QuantSpec) -> None:
    values = noise(150, 20_000)
    whole = round_trip(values, spec)
    step = 64  # a multiple of the blocks' rows
    for start in range(0, 150, step):
        assert torch.equal(whole[start : start + step], round_trip(values[start : start + step], spec))


@pytest.mark.parametrize("spec", FORMATS[::7], ids=str)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 1e30, -1e30, 3e38])
def test_what_fp16_cannot_hold_is_refused(bad: float, spec: QuantSpec) -> None:
    for fit in Fit:
        values = noise(4, 100)
        values[2, 63] = bad
        with pytest.raises(ValueError, match="finite or beyond"):
            packed_by(values, spec.replace(fit=fit))


@pytest.mark.parametrize("spec", FORMATS, ids=str)
def test_ranges_of_least_error_are_no_worse_than_the_whole_range_in_any_group(spec: QuantSpec) -> None:
    values = torch.distributions.StudentT(4.0).sample((128, 128)).float()
    exact = values.double().numpy()
    plain, fitted = (
        np.square(round_trip(values, spec.replace(fit=fit)).double().numpy() - exact) for fit in Fit
    )
    for where in grouped(exact, spec):
        assert fitted[where].sum() <= plain[where].sum() * (1 + 1e-5) + 1e-12
    if spec.bits <= 4 and spec.group_size in (64, 128):
        assert fitted.sum() < 0.97 * plain.sum(), "and better on the whole"


@pytest.mark.parametrize("offset", Offset)
@pytest.mark.parametrize("along", Along)
def test_filling_of_a_group_decides_nothing(offset: Offset, along: Along) -> None:
    """The scale of a last group that is mostly padding depends on its real values only."""
    values = noise(40, 40) ** 3
    values[-1, -1] = 0.3  # the value that the padding repeats
    whole = round_trip(values, QuantSpec(4, 40, offset, along, Fit.ERROR))
    filled = round_trip(values, QuantSpec(4, 128, offset, along, Fit.ERROR))
    assert torch.equal(filled, whole)


def test_keys_appended_token_by_token_are_those_packed_at_once() -> None:
    values = noise(128, 48)
    for spec, step in ((QuantSpec(4), 1), (QuantSpec(2, 32, along=Along.COLUMN), 32)):
        parts = [packed_by(values[start : start + step], spec) for start in range(0, 128, step)]
        assert torch.equal(torch.cat(parts), packed_by(values, spec))


@pytest.mark.parametrize("spec", FORMATS, ids=str)
def test_bytes_per_value(spec: QuantSpec) -> None:
    rows, width = 256, 4096
    bits = spec.nbytes(rows, width) * 8 / (rows * width)
    assert spec.bits_per_value() <= bits <= spec.bits_per_value() * 1.01


@settings(max_examples=200, deadline=None)
@given(
    spec=st.sampled_from(FORMATS), rows=st.integers(1, 70), width=st.integers(1, 200),
    low=st.floats(-100, 100), span=st.floats(0, 100), seed=st.integers(0, 2**31),
)  # fmt: skip
def test_any_values(spec: QuantSpec, rows: int, width: int, low: float, span: float, seed: int) -> None:
    values = torch.rand(rows, width, generator=torch.Generator().manual_seed(seed)) * span + low
    assert_near(values, spec)
