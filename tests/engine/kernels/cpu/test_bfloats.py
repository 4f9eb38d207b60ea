"""Products of many rows on a processor's bfloat16 unit, against float64 and the documented rounding."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from engine.kernels import reference
from engine.kernels.backend import kernels_for, precision_of
from engine.kernels.calls import PackedMatrix
from engine.kernels.cpu import native
from engine.spec.float_format import FLOAT_KINDS, FloatSpec
from engine.spec.precision import VECTOR_ROWS, MatmulPrecision
from engine.spec.quant import QuantSpec
from tests.engine.kernels.cpu.native_inputs import noise, packed_matrix, quick

FORMS = (*FLOAT_KINDS, "float32", "4", "3", "8", "4-column", "4-g32-mse", "2")
HIGH, MEDIUM, HIGHEST = MatmulPrecision.HIGH, MatmulPrecision.MEDIUM, MatmulPrecision.HIGHEST

BOUNDS = {HIGHEST: 1e-6, HIGH: 3.01 * 2.0**-16, MEDIUM: 2.01 * 2.0**-8}
"""Largest `error`. A bfloat16 is up to 2**-8 from its number, two are up to 2**-16: once for each factor, and
once more for the product of the low parts, which is left out. A hundredth is for float32's own rounding."""


with_unit = pytest.mark.usefixtures("unit")


def weight_of(form: str, rows: int, width: int) -> tuple[Tensor | PackedMatrix, Tensor]:
    """A weight as it is stored, and its values [R, W] in float32."""
    if form == "float32":
        exact = noise(rows, width)
        return exact, exact
    if form in FLOAT_KINDS:
        kept = noise(rows, width).to(getattr(torch, form))
        return PackedMatrix(kept.view(torch.uint8).view(rows, -1), FloatSpec(form), rows, width), kept.float()
    matrix = packed_matrix(QuantSpec.parse(form), rows, width)
    return matrix, reference.unpack(matrix.data, matrix.spec, torch.empty(rows, width))


def multiply(
    x: Tensor, weight: Tensor | PackedMatrix, bias: Tensor | None, precision: MatmulPrecision, threads: int
) -> Tensor:
    """Call the kernel directly."""
    if isinstance(weight, PackedMatrix):
        return native.matmul(x, weight, bias, threads=threads, precision=precision)
    return native.linear(x, weight, bias, threads=threads, precision=precision)


def split(values: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest bfloat16, and the nearest to the remainder, as float64."""
    high = values.bfloat16().float()
    return high.double(), (values - high).bfloat16().double()


def error(got: Tensor, expected: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> float:
    """The largest error relative to the largest possible product of such numbers.

    A sum with a larger bias is rounded to float32, whose digits are finer than a 64th of the bounds here.
    """
    scale = x.double().norm(dim=1)[:, None] * weight.double().norm(dim=1)[None]
    if bias is not None:
        scale = scale + bias.double().abs() / 64
    return float(((got.double() - expected).abs() / scale).max())


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("precision", MatmulPrecision)
@pytest.mark.parametrize(("tokens", "rows", "width"), [(17, 33, 40), (48, 67, 2100), (1100, 5, 33)])
def test_every_precision_is_as_near_as_its_name_says(
    form: str, precision: MatmulPrecision, tokens: int, rows: int, width: int
) -> None:
    """Sums of several chunks, more tokens than are taken at once, and what does not fill a tile; on machines
    without the unit all are float32."""
    weight, values = weight_of(form, rows, width)
    x, bias = noise(tokens, width, seed=1), noise(rows, seed=2)
    expected = F.linear(x.double(), values.double(), bias.double())
    for threads in (1, 3):
        got = multiply(x, weight, bias, precision, threads)
        assert error(got, expected, x, values, bias) < BOUNDS[precision]


@with_unit
@pytest.mark.parametrize("form", FORMS)
def test_numbers_are_rounded_as_is_said_and_no_further(form: str) -> None:
    weight, values = weight_of(form, 70, 300)
    x = noise(40, 300, seed=1)
    (x_high, x_low), (w_high, w_low) = split(x), split(values)
    medium, high = x_high @ w_high.T, x_high @ w_high.T + x_low @ w_high.T + x_high @ w_low.T
    assert error(multiply(x, weight, None, MEDIUM, 2), medium, x, values) < 1e-6
    exact = x.double() @ values.double().T
    assert (
        error(multiply(x, weight, None, HIGH, 2), high if native.has_unit(HIGH) else exact, x, values) < 1e-6
    )
    assert error(medium, exact, x, values) > 1e-5  # so a wrong precision would be noticed
    assert error(high, exact, x, values) > 1e-8


@with_unit
@quick
@given(
    st.sampled_from(FORMS), st.integers(VECTOR_ROWS + 1, 90), st.integers(1, 150), st.integers(1, 300),
    st.booleans(), st.integers(1, 3), st.sampled_from((HIGH, MEDIUM)),
)  # fmt: skip
def test_products_of_any_shape(
    form: str, tokens: int, rows: int, width: int, biased: bool, threads: int, precision: MatmulPrecision
) -> None:
    weight, values = weight_of(form, rows, width)
    x, bias = noise(tokens, width + 3, seed=1)[:, :width], noise(rows, seed=2) if biased else None
    expected = F.linear(x.double(), values.double(), None if bias is None else bias.double())
    got = multiply(x, weight, bias, precision, threads)
    assert error(got, expected, x, values, bias) < BOUNDS[precision]


@with_unit
@pytest.mark.parametrize("precision", [HIGH, MEDIUM])
def test_what_is_beside_the_result_is_left_alone(precision: MatmulPrecision) -> None:
    weight, _ = weight_of("float16", 37, 50)
    assert isinstance(weight, PackedMatrix)
    out = torch.full((21, 40), 9.0)
    native.matmul(noise(20, 50), weight, out=out[:20, :37], precision=precision)
    assert (out[:, 37:] == 9).all() and (out[20] == 9).all() and not (out[:20, :37] == 9).any()


@with_unit
@pytest.mark.parametrize("kind", FLOAT_KINDS)
@pytest.mark.parametrize("precision", [HIGH, MEDIUM])
def test_what_is_not_finite_stays_so(kind: str, precision: MatmulPrecision) -> None:
    kept = noise(20, 40).to(getattr(torch, kind))
    kept[3, 7], kept[11, 39] = float("inf"), float("nan")
    matrix = PackedMatrix(kept.view(torch.uint8).view(20, -1), FloatSpec(kind), 20, 40)
    x = torch.ones(24, 40)
    x[5, 2] = float("-inf")
    got = native.matmul(x, matrix, precision=precision)
    others = [row for row in range(24) if row != 5]
    assert not torch.isfinite(got[:, [3, 11]]).any()
    assert torch.isfinite(got[others][:, [0, 2, 4, 10, 12, 19]]).all()
    assert not torch.isfinite(got[5]).any()


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("form", FORMS)
def test_few_rows_are_float32_at_every_precision(form: str) -> None:
    """So decoding few sequences stays exact and fast."""
    weight, _ = weight_of(form, 40, 96)
    x = noise(VECTOR_ROWS, 96, seed=1)
    exact = multiply(x, weight, None, HIGHEST, 2)
    assert torch.equal(multiply(x, weight, None, MEDIUM, 2), exact)


@with_unit
def test_the_engines_products_use_it_where_they_are_asked_to() -> None:
    x, exact = noise(VECTOR_ROWS + 1, 96, seed=1), noise(40, 96)
    matrix, _ = weight_of("4", 40, 96)
    assert isinstance(matrix, PackedMatrix)
    kernels = kernels_for(torch.device("cpu"))
    for product in (
        lambda precision: kernels.linear(x, exact, None, precision),
        lambda precision: kernels.matmul(x, matrix, None, precision),
    ):
        found = [product(precision) for precision in (HIGHEST, HIGH, MEDIUM)]
        assert torch.equal(found[0], found[1]) is not native.has_unit(HIGH)
        assert not torch.equal(found[1], found[2])


@pytest.mark.parametrize("faster", [(), (MEDIUM,), (HIGH, MEDIUM)])
def test_a_policy_gets_what_gains_here_and_float32_in_place_of_what_does_not(
    faster: tuple[MatmulPrecision, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "gains_by", lambda precision: precision in faster)
    monkeypatch.setattr(native, "available", lambda: True)
    cpu = torch.device("cpu")
    for wanted in MatmulPrecision:
        assert precision_of(wanted, cpu) is (wanted if wanted in faster else HIGHEST)
        assert precision_of(wanted, torch.device("cuda")) is HIGHEST
    names = " and ".join(faster)
    assert kernels_for(cpu).name == (f"C, faster at {names}" if faster else "C")
