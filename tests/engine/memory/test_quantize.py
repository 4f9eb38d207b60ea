"""4-bit rows: the bytes they take, how near they come back, and what is refused."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from engine.errors import PolicyError
from engine.memory.quantize import pack_rows, unpack_rows
from engine.spec.policy import QuantSpec
from tests.support.engine_compression import error_bound, rounded


def accepted(group_size: int) -> bool:
    try:
        return bool(QuantSpec(4, group_size))
    except PolicyError:
        return False


GROUP_SIZES = [size for size in (2, 4, 6, 8, 10, 12, 32, 64, 128) if accepted(size)]


def round_trip(rows: Tensor, group_size: int = 64) -> Tensor:
    spec = QuantSpec(4, group_size)
    packed = pack_rows(rows, spec)
    assert packed.dtype == torch.uint8
    assert packed.shape == (len(rows), spec.row_bytes(rows.shape[1]))
    return unpack_rows(packed, spec, torch.empty(rows.shape, dtype=torch.float32))


def assert_near(rows: Tensor, group_size: int = 64) -> None:
    got = round_trip(rows, group_size)
    exact = rows.double()
    assert ((got.double() - exact).abs() <= error_bound(exact, group_size)).all()
    assert torch.equal(got, rounded(rows, group_size))


def noise(rows: int, width: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("width", [1, 2, 3, 31, 32, 33, 63, 64, 65, 100, 127, 128, 129, 640, 1000])
@pytest.mark.parametrize("group_size", GROUP_SIZES)
def test_any_width_comes_back_within_half_a_step(width: int, group_size: int) -> None:
    assert_near(noise(5, width), group_size)
    assert_near(noise(1, width), group_size)


@pytest.mark.parametrize("scale", [0.0, 1e-12, 1e-8, 6e-8, 1e-6, 1e-4, 1.0, 1e3, 1e4])
@pytest.mark.parametrize("offset", [0.0, 1e-7, -3.0, 100.0, -6e4])
def test_narrow_and_wide_groups(scale: float, offset: float) -> None:
    assert_near((noise(7, 130) * scale + offset).clamp(-65504, 900_000))


def test_constant_groups_are_kept_but_for_the_half_precision_of_their_value() -> None:
    values = torch.tensor([0.0, 1.0, -2.5, 0.1, -0.1, 6e-8, -65504.0])[:, None].expand(-1, 96).contiguous()
    precision = values.double().abs() * 2.0**-11 + 2.0**-25
    assert ((round_trip(values).double() - values.double()).abs() <= precision).all()
    whole = torch.tensor([0.0, 1.0, -2.5, -65504.0])[:, None].expand(-1, 96).contiguous()
    assert torch.equal(round_trip(whole), whole)


def test_sixteen_levels_are_exact() -> None:
    rows = (torch.arange(128) % 16).float()[None] * 0.25 - 2
    assert torch.equal(round_trip(rows), rows)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_kinds_of_number(dtype: torch.dtype) -> None:
    rows = noise(3, 128).to(dtype)
    spec = QuantSpec()
    assert torch.equal(pack_rows(rows, spec), pack_rows(rows.float(), spec))
    out = unpack_rows(pack_rows(rows, spec), spec, torch.empty(3, 128, dtype=dtype))
    assert torch.equal(out, rounded(rows.float()).to(dtype))


def test_more_rows_than_fit_one_chunk() -> None:
    assert_near(noise(70, 20_000))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 1e30, -1e30, -7e4, 1e6, 3e38])
@pytest.mark.parametrize("column", [0, 63, 64, 99])
def test_what_fp16_cannot_hold_is_refused(bad: float, column: int) -> None:
    rows = noise(4, 100)
    rows[2, column] = bad
    with pytest.raises(ValueError, match="finite or beyond"):
        pack_rows(rows, QuantSpec())


def test_four_and_a_half_bits_per_value() -> None:
    for groups in (1, 2, 7, 192):
        assert QuantSpec().row_bytes(64 * groups) * 8 == 4.5 * 64 * groups
    assert QuantSpec().row_bytes(65) == 2 * QuantSpec().row_bytes(64), "the last group is padded"
    assert QuantSpec(4, 128).row_bytes(128) * 8 == 4.25 * 128


@given(
    width=st.integers(1, 200), rows=st.integers(1, 4), group_size=st.sampled_from(GROUP_SIZES),
    low=st.floats(-6e4, 6e4), span=st.floats(0, 5e3), seed=st.integers(0, 99),
)  # fmt: skip
@settings(max_examples=60, deadline=None, derandomize=True)
def test_round_trip_property(
    width: int, rows: int, group_size: int, low: float, span: float, seed: int
) -> None:
    values = torch.rand(rows, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    assert_near((low + span * values).float(), group_size)
